# make train: install, train a small SKNet on real digits, classify held-out ones through timm.
# make test:  install, run the tests.
# make test-export: install every runtime that sk-plugins export writes for, run its tests in them.
# make det:   the environment for detection, with mmdetection and mmcv's compiled ops.
# make docs:  the site, from docs/ and the docstrings; it says where to look.
# make bench: install, time SKNet-50 against timm's and ResNeXt-50 on this CPU, into results/.
# make bench-host: the same for what Python and the operators cost, the GPU path's too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OPENMMLAB_VENV ?= .venv-openmmlab
DET_VENV ?= .venv-det
EXPORT_VENV ?= .venv-export
# Where wheels of mmcv's compiled ops stay, for the next environment with the same torch.
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sk-plugins/wheels
WORK_DIR := work_dirs/sknet_digits
# One process of one thread for every core; a file's tests stay in one process, for the sake of what they share.
JOBS ?= auto
PYTEST := -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile

.PHONY: train test test-versions test-machines test-slow test-kill test-reliability fuzz test-openmmlab det test-det test-scenes test-export lint docs table bench bench-host bench-gpu bench-det clean

train: $(VENV)/.installed
	$(BIN)/python tools/train.py configs/sknet_digits.py --work-dir $(WORK_DIR)
	$(BIN)/python tools/classify_digits.py "$$(cat $(WORK_DIR)/last_checkpoint)"

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# The core tests with the ends of what pyproject.toml claims of torch, timm and Python, one environment of 5 to 7 GB at
# a time. ROWS="2.7.0 newest" chooses rows, PYTHONS names interpreters that are not on PATH, WRITE=1 renews the table in
# CONTRIBUTING.md.
test-versions:
	$(PYTHON) .ci/versions.py $(ROWS) $(VERSIONS_OPTIONS) $(if $(WRITE),--write)

# The numeric tests under the instruction sets and threads that make one machine several.
test-machines: $(VENV)/.installed
	$(BIN)/python .ci/machines.py $(if $(WRITE),--write)

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

# A run that is killed 24 times and ends as if it had never been.
test-kill: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/openmmlab/runtime/test_kill_and_resume.py

# All slow proofs of docs/reliability.md.
test-reliability: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow tests/openmmlab/runtime

# Arguments and checkpoints drawn at random, some 500 a test.
fuzz: $(VENV)/.installed
	HYPOTHESIS_PROFILE=thorough OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz

# The OpenMMLab side on mmengine, mmcv and mmpretrain themselves, which cannot be installed beside their continuation.
test-openmmlab: $(OPENMMLAB_VENV)/.installed
	OMP_NUM_THREADS=1 $(OPENMMLAB_VENV)/bin/python $(PYTEST) tests/mmpretrain_models tests/openmmlab/test_datasets.py \
		tests/weights/test_files.py tests/weights/test_names.py tests/weights/convert tests/tools tests/configs

det: $(DET_VENV)/.installed

test-det: $(DET_VENV)/.installed
	OMP_NUM_THREADS=1 $(DET_VENV)/bin/python $(PYTEST) tests/configs/test_detection.py tests/configs/test_finetune.py \
		tests/configs/test_rotated.py tests/tools/test_benchmark_detection.py \
		tests/tools/test_frameworks.py tests/configs/test_scenes.py tests/tools/test_prepare_scenes.py \
		tests/tools/test_export_dense.py tests/tools/test_draw_predictions.py tests/fuse/test_networks.py::test_mmdet

# The figures of results/scenes, shortened: half an hour on one core.
test-scenes: $(DET_VENV)/.installed
	OMP_NUM_THREADS=1 $(DET_VENV)/bin/python -m pytest -m slow tests/tools/test_scenes_accuracy.py

# Every target of sk-plugins export, its page from the first command to the last, and the server. RUNTIMES chooses files.
RUNTIMES ?= tests/tools/test_export.py tests/tools/test_export_refusals.py tests/test_deployment_pages.py

test-export: $(EXPORT_VENV)/.installed
	OMP_NUM_THREADS=1 $(EXPORT_VENV)/bin/python $(PYTEST) --dist load -m 'slow or not slow' $(RUNTIMES)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Warnings are errors, among them links that lead nowhere.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html
	@echo "Look at docs/_build/html/index.html"

table: $(VENV)/.installed
	$(BIN)/python tools/model_table.py --write
	$(BIN)/python tools/benchmark.py --report results/benchmark_cpu.json --readme README.md

# To be run while the machine does nothing else.
bench: $(VENV)/.installed
	$(BIN)/python tools/benchmark.py --set standard \
		--json results/benchmark_cpu.json --markdown results/benchmark_cpu.md --plot results/benchmark_cpu.png \
		--picture results/sknet50_cpu.png --readme README.md

bench-host: $(VENV)/.installed
	$(BIN)/python tools/benchmark.py --set host \
		--json results/benchmark_host.json --markdown results/benchmark_host.md --plot results/benchmark_host.png

bench-gpu: $(VENV)/.installed
	$(BIN)/python tools/benchmark.py --set gpu \
		--json results/benchmark_gpu.json --markdown results/benchmark_gpu.md --plot results/benchmark_gpu.png \
		--picture results/sknet50_gpu.png --readme README.md

bench-det: $(DET_VENV)/.installed
	$(DET_VENV)/bin/python tools/benchmark_detection.py --threads 2 \
		--json results/benchmark_detection_cpu.json --markdown results/benchmark_detection_cpu.md

clean:
	rm -rf $(VENV) $(OPENMMLAB_VENV) $(DET_VENV) $(EXPORT_VENV) build dist docs/_build

define create
@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
$(PYTHON) -m venv --clear $(@D)
$(PIP) install --quiet --upgrade pip
endef
PIP = $(@D)/bin/python -m pip

$(VENV)/.installed: EXTRAS := mm,seg,downstream,cam,docs,study,dev
$(OPENMMLAB_VENV)/.installed: EXTRAS := openmmlab,dev
$(EXPORT_VENV)/.installed: EXTRAS := mm,seg,onnx,openvino,executorch,int8,coreml,ncnn,litert,server,dev
$(EXPORT_VENV)/.installed: CONSTRAINTS := --constraint constraints-export.txt
$(EXPORT_VENV)/.installed: constraints-export.txt
%/.installed: CONSTRAINTS ?= --constraint constraints.txt
%/.installed: pyproject.toml constraints.txt
	@echo "installing into $(@D): torch, timm, OpenMMLab's packages and more, several GB with CUDA's; a few minutes"
	$(create)
	$(PIP) install --quiet $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@

# mmcv's ops are compiled against the environment's own torch, so that comes first; with a GPU there they are CUDA's,
# which takes its nvcc and far longer. pip builds nothing where WHEELS has a wheel that fits. Its own cache might hold
# one built without torch and so without ops: hence --no-cache-dir. A wheel gets into WHEELS, and stays there, if its
# ops can be imported.
$(DET_VENV)/.installed: CONSTRAINTS := --constraint constraints-det.txt
$(DET_VENV)/.installed: pyproject.toml constraints-det.txt
	@echo "installing into $(@D), 1 of 3: torch, several GB with CUDA's libraries; a few minutes"
	$(create)
	$(PIP) install --quiet $(CONSTRAINTS) torch torchvision setuptools wheel packaging ninja
	@wheels="$(WHEELS)/$$($(@D)/bin/python -c 'import torch; print("torch", torch.__version__, "-cuda" * torch.cuda.is_available(), sep="")')" \
		&& mkdir -p "$$wheels" \
		&& echo "installing into $(@D), 2 of 3: mmcv's ops, from $$wheels, or built for it, in five to eight minutes on two cores" \
		&& MAX_JOBS=$${MAX_JOBS:-$$(getconf _NPROCESSORS_ONLN)} CFLAGS='-O3 -g0' CXXFLAGS='-O3 -g0' \
			$(PIP) wheel --quiet $(CONSTRAINTS) --no-cache-dir --no-deps --no-build-isolation \
			--find-links "$$wheels" --wheel-dir $(@D)/wheels onedl-mmcv \
		&& echo "installing into $(@D), 3 of 3: mmdetection, mmsegmentation and the rest; a few minutes" \
		&& $(PIP) install --quiet $(CONSTRAINTS) --no-cache-dir --find-links $(@D)/wheels --editable '.[det,seg,scenes,dev]' \
		&& wheel=$$(basename $(@D)/wheels/onedl_mmcv-*.whl) \
		&& if $(@D)/bin/python -c 'from mmcv.ops import nms'; then \
			cp $(@D)/wheels/$$wheel "$$wheels/$$wheel.part" && mv "$$wheels/$$wheel.part" "$$wheels/$$wheel"; \
		else \
			rm -f "$$wheels/$$wheel"; \
			echo "$$wheel has no ops that work, and is not kept in $$wheels: run make det again, which builds one" >&2; \
			exit 1; \
		fi
	@touch $@
