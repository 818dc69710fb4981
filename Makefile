# make demo    set everything up on a fresh machine and run the quickstart
# make test    set everything up and run the first tier of tests      make soak   the second      make test-all   both
# make serve   serve the model of the quickstart      make bench   benchmarks      make check   format, lint, types
# make miniature   the method on a model of a million parameters, three seeds      make miniature-base   its base model
# ARGS="--set run.dir=runs/mine --set prompts.limit=120" changes settings of demo and serve; test and soak give ARGS to pytest.
# make test-gpu, make bench-gpu   what only a GPU can show, in ten minutes each (benchmarks/gpu.py)
# DEVICE=cpu|gpu chooses the lock (default: gpu where nvidia-smi answers).  PYTHON=python3.12 chooses the interpreter.

DEVICE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed-$(DEVICE)
SCORERS := .venv/.installed-scorers
STORAGE := .venv/.installed-storage
DEPLOY := .venv/.installed-deploy
# PyTorch keeps its CPU builds in an index of its own; asked only when the default index has no torch+cpu.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Ray starts many processes, and where PYTHONDONTWRITEBYTECODE is set, as in most container images, every one of them
# would compile all that it imports. So it is compiled here, on all cores, but for tests and models by the hundred; and
# what is left is compiled once.
unexport PYTHONDONTWRITEBYTECODE
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/tests?/|/transformers/models/|/vllm/model_executor/models/'
INSTALL := $(BIN)/pip install --quiet --no-deps --no-compile --disable-pip-version-check

.PHONY: setup scorers storage deploy-tools demo test soak test-all serve bench miniature miniature-base check clean
setup: $(STAMP)

$(STAMP): requirements/$(DEVICE).txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "aft_ray needs Python 3.11 or newer on PATH (or PYTHON=/path/to/python3.11 make ...)"; exit 2; }
	@echo "setting up .venv with $(PYTHON) from requirements/$(DEVICE).txt"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) pip==26.3 2>.venv/install.log || true  # installs in half the time of Python 3.11's own
	@$(INSTALL) -r requirements/$(DEVICE).txt 2>.venv/install.log \
		|| $(INSTALL) --extra-index-url $(TORCH_CPU_INDEX) -r requirements/$(DEVICE).txt \
		|| { cat .venv/install.log; exit 1; }
	@$(INSTALL) --no-build-isolation --editable . 2>.venv/install.log || { cat .venv/install.log; exit 1; }
	@$(COMPILE) .venv/lib >/dev/null 2>&1 || true  # some packages carry templates that are no Python
	@touch $@

# Scorers of other projects, for their tests only: one of their packages needs a C compiler.
scorers: $(SCORERS)

$(SCORERS): requirements/scorers.txt $(STAMP)
	@$(INSTALL) -r $<
	@touch $@

# An S3 server on this machine, for tests only.
storage: $(STORAGE)

$(STORAGE): requirements/storage.txt $(STAMP)
	@$(INSTALL) -r $<
	@touch $@

# What checks cluster.yaml, deploy/ and the Dockerfile without a cloud, for tests only.
deploy-tools: $(DEPLOY)

$(DEPLOY): requirements/deploy.txt requirements/gcp.txt requirements/azure.txt $(STAMP)
	@$(INSTALL) -r requirements/deploy.txt -r requirements/gcp.txt -r requirements/azure.txt
	@touch $@

# One GPU takes the place of the two CPU workers that the quickstart trains on.
DEMO_gpu := --set training.num_workers=1 --set training.batch_size_per_worker=4
demo: $(STAMP)
	@$(BIN)/aft-ray run --config configs/demo.yaml $(DEMO_$(DEVICE)) $(ARGS)

TESTS_test := not soak
TESTS_soak := soak
test soak test-all: $(STAMP) $(STORAGE) $(DEPLOY)
	@$(MAKE) --no-print-directory scorers || echo "the tests of the ifeval, ifbench and reasoning_gym scorers will be skipped"
	@$(BIN)/python -m pytest -m '$(TESTS_$@)' $(ARGS)

serve: $(STAMP)
	@$(BIN)/aft-ray serve --config configs/quickstart.yaml $(ARGS)

bench: $(STAMP)
	@$(BIN)/python benchmarks/run.py

test-gpu bench-gpu: $(STAMP)
	@$(BIN)/python benchmarks/gpu.py $(@:-gpu=) --within 600 $(ARGS)

miniature: $(STAMP)
	@$(BIN)/python -m aft_ray.miniature study $(ARGS)

miniature-base: $(STAMP)
	@$(BIN)/python -m aft_ray.miniature base --output configs/miniature/base $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

clean:
	rm -rf .venv .cache runs
