# The development environment and what runs in it. `make` alone says what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# More threads than this slow small networks down. The tests set their own number.
export OMP_NUM_THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs bench tables clean FORCE

help:
	@echo "make demo    do every task with the embedded models, and show it in demo/index.html"
	@echo "make test    run the tests"
	@echo "make lint    check style and types"
	@echo "make docs    build the documentation into build/docs"
	@echo "make bench   run the benchmarks"
	@echo "make tables  draw docs/results.md from the kept reports"
	@echo "make clean   remove demo/, builds and caches (the environment $(VENV) stays)"

# The environment depends on what is installed, not on the rest of pyproject.toml, so an edit elsewhere installs
# nothing. The stamp holds the wanted state as text.
define WANTED
import sys, tomllib
toml = tomllib.load(open("pyproject.toml", "rb"))
print(sys.version, toml["build-system"])
print([toml["project"].get(k) for k in ("requires-python", "dependencies", "optional-dependencies", "scripts")])
print(open("constraints.txt").read())
endef
export WANTED

$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is older than 3.11: run make PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "$$WANTED" > $@.wanted
	@cmp -s $@.wanted $@ || \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev,docs,studio,train]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true # on all cores, where pip would take one
	@mv $@.wanted $@

# Every task with the embedded models, and a page with the command of each picture.
demo: $(INSTALLED)
	$(BIN)/python docs/story.py demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Warnings are errors: a link to nothing, a name that is not there. Nothing is fetched.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs . build/docs
	@echo "Open build/docs/index.html"

# Every module of benchmarks/ whose name has no leading underscore runs on its own.
BENCHMARKS := $(filter-out benchmarks/_% benchmarks/tables.py,$(wildcard benchmarks/*.py))

bench: $(BENCHMARKS:%=run/%)

run/%: FORCE $(INSTALLED)
	$(BIN)/python $*

# The page of samplers and processes, from the figures in benchmarks/results/tables.
tables: $(INSTALLED)
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf demo build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
