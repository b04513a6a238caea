# Every target sets itself up: on a fresh machine `make demo` and `make test` first create .venv and install into it,
# once, and again when pyproject.toml or constraints.txt change. pip's own settings (PIP_INDEX_URL, ...) are respected.

PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
# Tools run as modules: pip makes no script in .venv for what the base Python already has. -P keeps the repository root
# off sys.path, as the script would.
TOOL := $(RUN) -P -m
PIP := $(TOOL) pip --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-sweeps test-oldest test-contracts test-gpu lint format type bench bench-gpu
.PHONY: gpu-session kernel-package kernel-resources dev
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## distil a real Transformer, push it to a Hub, load it back (about eight minutes)
	$(TOOL) ssm_zoo.cli.demo --hub-stand-in tests/support/hub_stand_in.py

# A process for each logical core, up to JOBS, each with one thread; a file's tests stay together, as they share fixtures.
JOBS ?= 4
test: $(STAMP) ## run all tests (PYTEST_ARGS adds arguments)
	OMP_NUM_THREADS=1 $(TOOL) pytest -q -n logical --maxprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

# The oldest transformers that pyproject.toml allows, in an environment of its own.
OLDEST := $(shell sed -n 's/^ *"transformers>=\(.*\)",$$/\1/p' pyproject.toml)
test-oldest: .venv-oldest/.installed ## run all tests with the oldest transformers allowed (PYTEST_ARGS adds arguments)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -P -m pytest -q -n logical --maxprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-sweeps: $(STAMP) ## compile every head of every family, train each in two processes in every way, and more (PYTEST_ARGS)
	OMP_NUM_THREADS=1 SSM_ZOO_SWEEPS=1 $(TOOL) pytest -q tests/modeling/test_compile.py tests/modeling/test_distributed.py \
		tests/training/test_trainer_checkpoints.py tests/training/test_earlier_runs.py \
		tests/kernels/test_compiled_kernels.py tests/kernels/test_hub_layers.py tests/kernels/test_kernel_resources.py \
		tests/benchmarks/test_retrieval_benchmark.py tests/distill/test_several_processes.py $(PYTEST_ARGS)

# Their source distributions come from the package index once, into ~/.cache/ssm-zoo/contracts (XDG_CACHE_HOME).
test-contracts: $(VENV)/.contracts ## run transformers' and peft's own tests on every family (CONTRACTS_ARGS adds arguments)
	OMP_NUM_THREADS=1 $(TOOL) pytest -q -c tests/contracts/pytest.ini -n logical --maxprocesses $(JOBS) --dist worksteal \
		tests/contracts $(CONTRACTS_ARGS)

test-gpu: $(STAMP) ## run the kernel tests on the CUDA device
	@$(RUN) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() \
	else f'make test-gpu: torch {torch.__version__} finds no CUDA device; use make test')"
	$(TOOL) pytest -q tests/kernels $(PYTEST_ARGS)

lint: $(STAMP) ## check style and formatting
	$(TOOL) ruff check .
	$(TOOL) ruff format --check .

format: $(STAMP) ## repair what `make lint` finds, where it can be done mechanically
	$(TOOL) ruff check --fix .
	$(TOOL) ruff format .

type: $(STAMP) ## check types
	$(TOOL) pyright --pythonpath $(RUN)

bench: $(STAMP) ## time the CPU paths of the kernels against transformers (BENCH_ARGS adds arguments)
	$(RUN) benchmarks/kernels/cpu_paths.py $(BENCH_ARGS)
	$(RUN) benchmarks/kernels/cpu_mixers.py

bench-gpu: $(STAMP) ## time the kernels beside their peers; without a CUDA device at small sizes (BENCH_ARGS adds arguments)
	$(RUN) benchmarks/kernels/gpu_kernels.py $(BENCH_ARGS)

gpu-session: ## test and time the kernels on a GPU, in steps, with $(PYTHON) as it is (GPU_SESSION_ARGS adds arguments)
	$(PYTHON) benchmarks/kernels/gpu_session.py $(GPU_SESSION_ARGS)

kernel-resources: $(STAMP) ## compile every Triton kernel without a GPU, predict times (RESOURCES_ARGS adds arguments)
	OMP_NUM_THREADS=1 nice $(RUN) benchmarks/kernels/resources.py --plot $(RESOURCES_ARGS)

KERNEL_PACKAGE ?= dist/ssm-zoo-kernels
kernel-package: $(STAMP) ## write the kernels as a Kernel Hub repository into dist/ (KERNEL_PACKAGE_ARGS adds arguments)
	$(TOOL) ssm_zoo.cli.kernel_package $(KERNEL_PACKAGE) $(KERNEL_PACKAGE_ARGS)

docs: $(VENV)/.docs ## build the documentation into site/, without a warning
	NO_MKDOCS_2_WARNING=1 $(TOOL) mkdocs build --strict --quiet

dev: $(STAMP) ## set up for development, with the pre-commit hooks
	$(TOOL) pre_commit install

$(VENV)/.docs: $(STAMP)
	$(PIP) install -c constraints.txt --editable '.[docs]'
	@touch $@

.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -P -m pip --quiet --disable-pip-version-check --no-input install -c constraints.txt \
		'transformers==$(OLDEST).*' --editable '.[dev]'
	@touch $@

# What the libraries' tests import: nothing else needs it.
$(VENV)/.contracts: $(STAMP)
	$(PIP) install -c constraints.txt --editable '.[contracts]'
	@touch $@

# Without an NVIDIA GPU the constraints apply. With one, a torch that the base Python already sees the device with is
# kept: it was built for that machine's driver, and a second copy of several gigabytes may not fit it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'ssm-zoo needs Python 3.11 or newer; \
	$(PYTHON) is %d.%d. Choose another: make PYTHON=python3.12 ...' % sys.version_info[:2])"
	@echo "setting up $(VENV) (once; this downloads torch and transformers)"
	@set -e; \
	constraints="-c constraints.txt"; site=""; \
	if command -v nvidia-smi > /dev/null 2>&1; then \
		constraints=""; \
		if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" > /dev/null 2>&1; then \
			site="--system-site-packages"; \
		fi; \
	fi; \
	$(PYTHON) -m venv $$site $(VENV); \
	$(PIP) install $$constraints --editable '.[dev]'
	@touch $@
