# Everything runs in .venv, which is made with PYTHON where it does not exist. A target installs only what changed since it last ran.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TIMM := .venv-timm

.PHONY: help demo test coverage test-gpu test-integrations lint docs measure

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/demo.stamp ## compare the learned optimizer with tuned AdamW on small tasks
	$(BIN)/learned-optim demo

test: $(VENV)/test.stamp ## run the tests
	$(BIN)/pytest --numprocesses=auto --dist=worksteal

coverage: $(VENV)/test.stamp ## run the tests and list the lines of learned_optim/ and integrations/ that none of them ran
	$(BIN)/pytest --numprocesses=auto --dist=worksteal --cov --cov-report=term-missing:skip-covered

test-gpu: $(VENV)/test.stamp ## run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

test-integrations: $(VENV)/test-integrations.stamp $(TIMM)/stamp ## run the tests against transformers, trl, lightning, timm and others
	$(BIN)/pytest --numprocesses=auto --dist=loadfile $(INTEGRATIONS)
	$(TIMM)/bin/pytest -k "timm or integrations" $(INTEGRATIONS)

lint: docs ## check style, formatting, types, spelling, and the documentation with its links and examples
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pytest --doctest-modules learned_optim

docs: $(VENV)/test.stamp ## build the guide and reference in site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

measure: $(VENV)/test.stamp ## measure again what depends on the weights, and fill in the tables (hours; resumes)
	$(BIN)/python benchmarks/measure.py $(MEASURE)

# constraints.txt pins torch too: left to itself, pip would take the newest one. The kernels are compiled when the package is installed.
$(VENV)/%.stamp: pyproject.toml constraints.txt $(wildcard learned_optim/kernels/*.c) | $(BIN)/python
	@echo "Installing into $(VENV); the first time, PyTorch takes a few minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS_$*)]"
	@touch $@

EXTRAS_demo := demo
EXTRAS_test := demo,docs,test
EXTRAS_test-integrations := demo,test-integrations
INTEGRATIONS := $(addprefix tests/,test_trainer.py test_trainer_runs.py test_trl.py test_frameworks.py test_integration_examples.py test_documents.py)

# timm needs torchvision, which loads only beside the build of torch that it was made with: an environment of their own, of some 5 GB.
$(TIMM)/stamp: pyproject.toml constraints-timm.txt $(wildcard learned_optim/kernels/*.c) | $(TIMM)/bin/python
	@echo "Installing torch, torchvision and timm into $(TIMM), which takes some minutes."
	$(TIMM)/bin/python -m pip install --quiet -c constraints-timm.txt -e ".[test-timm]"
	@touch $@

$(BIN)/python $(TIMM)/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)
