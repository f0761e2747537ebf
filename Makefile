# Everything a user or developer runs.  `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICK ?=
quick := $(if $(QUICK),--quick)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench aot-tpu aot-gpu aot-gpu-312 clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(VENV)/.demo ## train, calibrate and report on real text (QUICK=1: a minute)
	$(BIN)/python -m examples.quickstart $(quick)

test: $(VENV)/.test ## run every test
	$(BIN)/python -m pytest -n 2

# A `python3.12` on the PATH may be a version manager's shim that fails: try it.
python312 = for python in python3.12 \
  $$HOME/.pyenv/versions/3.12*/bin/python3.12; do \
  if "$$python" -c 'import ensurepip' 2>/dev/null; then \
    exec $(MAKE) $(1) PYTHON="$$python"; \
  fi; \
done

test-all: test ## run every test on python3 and, where there is one, python3.12
	@$(call python312,test VENV=.venv312); \
	  echo 'no working python3.12 here: tested on $(PYTHON) only'

lint: $(VENV)/.dev ## format, lint, types, import contracts (changes nothing)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.demo ## run every benchmark (QUICK=1: a smoke run)
	$(BIN)/python -m benchmarks $(quick)

aot-gpu: ## compile the GPU kernels for an H100 and read them (python3.12, 5 GB)
	@$(call python312,aot-gpu-312 VENV=.venv-gpu); \
	  echo 'no working python3.12 here'; exit 1

aot-gpu-312: $(VENV)/.aot-gpu
	$(BIN)/python -m benchmarks.gpu_static $(quick)

aot-tpu: $(VENV)/.aot-tpu ## kernels as the TPU compiler sees them, without a TPU (700 MB)
	$(BIN)/python -m pytest tests/kernels/test_tpu_cycles.py tests/kernels/test_linear_attention.py
	$(BIN)/python -m benchmarks.tpu_cycles
	$(BIN)/python -m benchmarks.tpu_linear_attention

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv312 .venv-gpu .cache .hypothesis .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file for each extra: a second call installs nothing.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
