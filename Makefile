# `make train` and `make test` are the two commands of README.md. Each sets up its environment in .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# One environment for all extras. If PYTHON is given, the environment must be one of this Python.
environment = @PYTHON='$(PYTHON)' sh environment.sh $(VENV) $(1) $(if $(filter file,$(origin PYTHON)),,asked)

# Otherwise OpenMP's threads spin while other processes need the cores (see train.py).
export OMP_WAIT_POLICY ?= passive

.PHONY: train test lint docs bench gpu timm-suite release-check clean

train:
	$(call environment,demo)
	$(RUN) train.py --config recipes/digits.yaml

# Two tests run at a time, each with one core: more would need more memory.
test:
	$(call environment,test)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal

lint:
	$(call environment,dev)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# The pages as a site in docs/_build. Each warning is an error.
docs:
	$(call environment,docs)
	$(RUN) -m sphinx --builder html --fail-on-warning --keep-going --nitpicky docs docs/_build

# Compares the depthwise operation with PyTorch's, and measures the sampling of kernels. Appends to benchmarks/results/.
# Threads wait as they do for users, so nothing else should run.
bench:
	$(call environment,demo)
	env -u OMP_WAIT_POLICY $(RUN) benchmarks/depthwise.py --picture docs/depthwise.png
	env -u OMP_WAIT_POLICY $(RUN) benchmarks/models.py

# Checks and measures everything on a GPU. Installs nothing, as a machine with a GPU may have no connection: without an
# environment, $(PYTHON) runs the checkout as it is. Arguments: make gpu ARGS='--phase check'
gpu:
	$(or $(wildcard $(RUN)),$(PYTHON)) benchmarks/gpu.py $(ARGS)

# Runs timm's own model tests on the models of this package.
timm-suite:
	$(call environment,test)
	$(RUN) tests/timm_suite.py

# Builds the files of a release in dist, checks them, and uses them as somebody who has installed them.
release-check:
	$(call environment,release)
	$(RUN) tests/release_check.py

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info
