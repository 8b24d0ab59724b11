# make train: install, train a small SKNet on real digits, classify held-out ones through timm.
# make test:  install, run the tests.
# make bench: install, time SKNet-50 against timm's and ResNeXt-50 on this CPU, into results/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OPENMMLAB_VENV ?= .venv-openmmlab
WORK_DIR := work_dirs/sknet_digits
# One process of one thread for every core; a file's tests stay in one process, for the sake of what they share.
JOBS ?= auto
PYTEST := -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile

.PHONY: train test test-slow test-openmmlab lint table bench bench-gpu clean

train: $(VENV)/.installed
	$(BIN)/python tools/train.py configs/sknet_digits.py --work-dir $(WORK_DIR)
	$(BIN)/python tools/classify_digits.py "$$(cat $(WORK_DIR)/last_checkpoint)"

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The OpenMMLab side on mmengine, mmcv and mmpretrain themselves, which cannot be installed beside their continuation.
test-openmmlab: $(OPENMMLAB_VENV)/.installed
	OMP_NUM_THREADS=1 $(OPENMMLAB_VENV)/bin/python $(PYTEST) tests/test_mmpretrain_models.py tests/test_mmpretrain_datasets.py \
		tests/test_checkpoints.py tests/test_foreign.py tests/tools tests/configs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

table: $(VENV)/.installed
	$(BIN)/python tools/model_table.py --write

# To be run while the machine does nothing else.
bench: $(VENV)/.installed
	$(BIN)/python tools/benchmark.py --set standard \
		--json results/benchmark_cpu.json --markdown results/benchmark_cpu.md --plot results/benchmark_cpu.png

bench-gpu: $(VENV)/.installed
	$(BIN)/python tools/benchmark.py --set gpu \
		--json results/benchmark_gpu.json --markdown results/benchmark_gpu.md --plot results/benchmark_gpu.png

clean:
	rm -rf $(VENV) $(OPENMMLAB_VENV) build dist

$(VENV)/.installed: EXTRAS := mm,dev
$(OPENMMLAB_VENV)/.installed: EXTRAS := openmmlab,dev
%/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv --clear $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@
