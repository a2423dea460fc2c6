# `make demo` shows what rnnguard does, `make test` checks everything; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Lies in .venv from the start of an installation to its end; where it is found, .venv is made anew.
HALF_MADE := .venv/.half-made

.PHONY: demo test docs lint clean
.NOTPARALLEL:

demo: .venv/.demo
	$(BIN)/rnnguard demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

docs: .venv/.docs
	$(BIN)/sphinx-build -W -q -b html docs docs/_build
	@echo 'The documentation lies in docs/_build/index.html.'

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis rnnguard-*.html
	rm -rf docs/_build docs/rules docs/remedies docs/scenarios.md
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.demo: pyproject.toml constraints.txt
	$(call install,.)

.venv/.test: pyproject.toml constraints.txt
	$(call install,.[test])
	@touch .venv/.demo

.venv/.docs: pyproject.toml constraints.txt
	$(call install,.[docs])

# The pins stand in two variables, since newer pip reads the second for what the build needs.
define install
$(call stop_if,$(complaint))
@$(whole) || { rm -rf .venv && mkdir .venv && touch $(HALF_MADE) && $(PYTHON) -m venv .venv; }
@rm -f .venv/.demo .venv/.test .venv/.docs && touch $(HALF_MADE)
@echo 'Installing into .venv; the first time this takes some minutes ...'
@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
  PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -e '$(1)'
@touch $@ && rm $(HALF_MADE)
endef

whole := { [ ! -e $(HALF_MADE) ] && \
  $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# $(error) prints one line, where a failing command would print its own and make's after it.
stop_if = $(if $(1),$(error $(1)))

# One sentence when .venv has to be made and $(PYTHON) cannot make it, else nothing.
cure := install Python 3.11 or newer, or name one as in `make PYTHON=/path/to/python3.11`
complaint = $(shell \
  $(whole) && exit; \
  answer="$$($(PYTHON) --version 2>&1)" || answer=; \
  IFS=' .'; set -- $$answer; \
  if [ -z "$$3" ]; then \
    echo '`$(PYTHON)` was not found or does not start: $(cure)'; \
  elif [ "$$2" -lt 3 ] || { [ "$$2" -eq 3 ] && [ "$$3" -lt 11 ]; }; then \
    echo '`$(PYTHON)` is Python '"$$2.$$3"', too old for rnnguard: $(cure)'; \
  elif ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
    echo '`$(PYTHON)` lacks the module venv or ensurepip: install it (on Debian and Ubuntu' \
      'with `apt install python3-venv`), or name another Python as in' \
      '`make PYTHON=/path/to/python3.11`'; \
  fi)
