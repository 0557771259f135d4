# On a bare machine with Python 3.11 or newer: `make serve`, `make test`, `make lint`.
# Each makes .venv and installs what it needs once; a second call installs nothing.

PYTHON ?= python3
DATA ?= data

BIN := .venv/bin

SETTINGS = $(strip $(if $(HOST),DINOSCOPE_HOST="$(HOST)") $(if $(PORT),DINOSCOPE_PORT="$(PORT)") \
	$(if $(MODEL),DINOSCOPE_MODEL="$(MODEL)") $(if $(COLLECTIONS),DINOSCOPE_DATA_DIR="$(COLLECTIONS)"))

.PHONY: install serve test lint format model clean

install: .venv/.dev

serve: .venv/.service
	$(SETTINGS) exec $(BIN)/python -m service

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The model in the repository, made anew: RECIPE=training/recipes/tiny_imagenet_gpu.toml on a GPU,
# or tiny_imagenet_cpu.toml; DATA holds the tar files. See docs/model-card.md.
RECIPE ?= training/recipes/tiny_imagenet_gpu.toml
RUN ?= runs/$(basename $(notdir $(RECIPE)))
model: .venv/.dev
	$(BIN)/python -m training.make_default_model $(RECIPE) --data $(DATA) --run-dir $(RUN)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.service: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[service]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ .venv/.service

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
