# README's two commands are `make train` and `make test`; each sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# OpenMP's threads would else spin while other processes want the cores (see train.py)
export OMP_WAIT_POLICY ?= passive

.PHONY: train test lint bench timm-suite clean

train: $(VENV)/demo
	$(RUN) train.py --config recipes/digits.yaml

# two tests at a time, each with a core: more would want more memory
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# the depthwise operation beside PyTorch's, and what drawing the kernels costs; appends to benchmarks/results/.
# Threads wait as they do for users: nothing else should run.
bench: $(VENV)/demo
	env -u OMP_WAIT_POLICY $(RUN) benchmarks/depthwise.py --picture docs/depthwise.png
	env -u OMP_WAIT_POLICY $(RUN) benchmarks/models.py

# timm's own model tests, over this package's models
timm-suite: $(VENV)/test
	$(RUN) tests/timm_suite.py

# One environment; the file named after an extra says that it is installed.
$(VENV)/%: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
