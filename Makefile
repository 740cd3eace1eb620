# make demo   set up, build the bundled model, print where the report is
# make test   set up, run the test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo
STAMP  := $(VENV)/.installed

.PHONY: demo test setup lint

setup: $(STAMP)

# Re-installs only when pyproject.toml or this file changes.
$(STAMP): pyproject.toml Makefile
	tools/setup.sh "$(PYTHON)" "$(VENV)"
	touch $(STAMP)

demo: setup
	tools/demo.sh "$(BIN)" "$(OUT)"

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check tokred_export plugins tests tools
