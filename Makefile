# `make demo` and `make test` are all that a fresh machine needs: each makes .venv if it is not there.
# The environment is made anew only when pyproject.toml or constraints.txt changes.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

# Processes that pytest runs in, and further arguments to it: make test WORKERS=4 ARGS="-k sgld"
WORKERS ?= 2
ARGS ?=

# A Python to use for .venv, instead of the first one found: make test PYTHON=/path/to/python3
PYTHON ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format types docs bench clean distclean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '%-18s%s\n' "$$name" "$$text"; done

demo: $(VENV)/.dev ## Sample two networks on the digits data and compare the kernels
	$(PY) examples/digits.py

test: $(VENV)/.dev ## Run the tests
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.dev ## Check the style of the code
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(VENV)/.dev ## Repair the style of the code
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: $(VENV)/.dev ## Check the types of the package
	$(PY) -m ty check --python $(VENV) numpyro_bdl

docs: $(VENV)/.docs ## Build the documentation into docs/_build/html
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.bench ## Time a gradient step against peers
	$(PY) benchmarks/step.py

clean: ## Remove what the other targets wrote, .venv excepted
	rm -rf build dist docs/_build docs/_notebooks .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)

# One stamp for each set of extras.
$(VENV)/.dev: $(INPUTS) | $(PY)
	@echo 'Installing the package and its tools into $(VENV) (a few minutes the first time)'
	$(PIP) -e '.[dev,demo]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	@touch $@

# Each candidate is run, since a name on PATH may be a launcher with no Python behind it.
$(PY):
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))'; \
	found=; \
	for python in $(or $(PYTHON),python3.12 python3.13 python3.14 python3 python \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python3); do \
	  if "$$python" -c "$$usable" >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'No Python >= 3.12 with the venv module was found$(if $(PYTHON), at PYTHON=$(PYTHON)).'; \
	  echo 'Install one, then run make again:'; \
	  echo '  Debian, Ubuntu  apt install python3.12 python3.12-venv'; \
	  echo '  Fedora          dnf install python3.12'; \
	  echo '  macOS           brew install python@3.12'; \
	  echo '  pyenv           pyenv install 3.12'; \
	  echo '  conda           conda create -n py312 python=3.12'; \
	  echo 'or name one:      make PYTHON=/path/to/python3'; \
	  exit 1; \
	fi >&2; \
	echo "Making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv --clear $(VENV)
