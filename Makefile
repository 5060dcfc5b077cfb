# The two commands a newcomer needs are `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test bench lint clean

setup: .venv/.done

# One stamp file: a second `make setup` does nothing unless the pins or the metadata changed.
.venv/.done: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ldct_dist needs Python 3.11 or newer: make setup PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "no venv module: apt install python3-venv"; exit 2; }
	@echo "installing into .venv: a minute or two, longer where torch brings CUDA along"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed]'
	@command -v g++ >/dev/null || echo "note: no g++ here, so train.compile=true is refused on CPU; all else works (apt install g++)"
	@touch $@

demo: setup
	$(BIN)/ldct-dist demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

bench: setup
	@for b in bench/*.py; do echo "== $$b"; $(BIN)/python $$b | tail -n 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info
