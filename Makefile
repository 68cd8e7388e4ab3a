# make demo   the main job on real pictures: train, eval, predict, export, benchmark
# make test   the tests
# make trust  the long tests: hundreds of kills, tens of thousands of mutants; prints their figures
# make lint   ruff, mypy, import-linter

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/mvcr/datasets/elpv
TIME   ?= 3m
RUN    ?= runs/demo

.PHONY: demo test trust lint install clean

install: $(VENV)/installed
test-install: $(VENV)/installed-dev

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[onnx]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Solar cells, lit by their own current; a crack decides. The pictures may not be passed on, so they are downloaded.
demo: $(VENV)/installed
	$(BIN)/python examples/elpv.py $(DATA)
	rm -rf $(RUN)
	$(BIN)/mvcr train $(DATA) --run $(RUN) --time $(TIME) --offline --turn --vflip --crop 1 --shear 0 --zoom-range 0.1 --trivial 0.3 --label-smoothing 0
	$(BIN)/mvcr eval --run $(RUN)
	$(BIN)/mvcr predict "$$(find $(DATA)/val/defective -name '*.png' | sort | head -n 1)" --run $(RUN) --format jsonl
	$(BIN)/mvcr export --run $(RUN) --format onnx --overwrite
	$(BIN)/mvcr benchmark --run $(RUN) --batch 1,8 --rounds 9

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

trust: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
