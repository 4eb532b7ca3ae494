# `make demo` studies the bundled agent and ends with a report; `make test` checks everything.
# On a fresh clone either one first makes .venv and installs what it needs, in the versions of constraints.txt.

PYTHON ?= python3
OUT ?= dt-lens-study/hopper
ARGS ?=

BIN := .venv/bin
# A process per core, each with one thread; an idle process takes tests over from a busy one.
PYTEST := -n logical --dist worksteal
INSTALLED := .venv/installed

.PHONY: help demo test docs fuzz clean

help:
	@echo "make demo    study the bundled Hopper agent; ARGS='--episodes 100 --seed 1' is passed on, OUT=DIR says where to"
	@echo "make test    ruff, mypy --strict, pytest with doctests; names the ten slowest tests"
	@echo "make docs    the documentation site, its notebooks executed, in build/site; a warning is an error"
	@echo "make fuzz    the properties alone, with examples never tried before, and many of them"
	@echo "make clean   remove .venv and caches"
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made with"

demo: $(INSTALLED)
	$(BIN)/dt-lens study hopper --out "$(OUT)" $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy takes a minute of one core, so it runs beside pytest; what it says comes last, pass or fail.
	@$(BIN)/mypy > .venv/mypy.txt 2>&1 & typed=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST) --durations=10; tested=$$?; \
	wait $$typed; checked=$$?; echo "mypy --strict:"; cat .venv/mypy.txt; \
	[ $$tested = 0 ] && [ $$checked = 0 ]

# Outputs of notebooks are kept in build/notebooks, so only what has changed is executed again.
docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -b html -c docs/site . build/site
	@echo "The documentation is in build/site/index.html"

fuzz: $(INSTALLED)
	HYPOTHESIS_PROFILE=random OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST) -m "acceptance or not acceptance" tests/properties

# torch comes first and by name: pip then settles on one build of it before anything else asks for just any torch.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "There is no $(PYTHON); dt-lens needs Python 3.11 or later: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1) and dt-lens needs 3.11 or later: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing into .venv, once: a few minutes, mostly torch."
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
