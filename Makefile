# Each target works on a fresh machine with Linux, Python 3.10+, g++ and make: it first makes a virtual environment here.
#   make demo   train two small networks, predict, look at the result (MNIST=FOLDER: its digits, not scikit-learn's)
#   make test   the whole test suite
#   make bad-commands   a thousand bad requests to the command line (VPFAST_BAD_COMMANDS_SEED: others)
#   make asan   the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer;  make tsan   under ThreadSanitizer
#   make docs   the pages, into build/site
#   make install-matrix PYTHONS="..."   one wheel, installed and run by each of these interpreters and their torch
#   make gpu-check   on a machine with a GPU: build, tests, benchmarks in ten minutes, with the packages of PYTHON, no network
# TORCH is what pip installs as torch (2.11 or later):  make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
# For tests beside a torch that brings none, which a CPU build is.
TRITON ?= triton==3.6.0
# For tests, without the torchvision that it asks for: pip would fetch one with another torch.
LPIPS ?= --no-deps lpips==0.1.4
VENV ?= .venv
# Tests at the same time, each on one thread unless it asks for more.
JOBS ?= 2
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc kernels -type f)

.PHONY: demo test asan tsan bad-commands docs lint format bench gpu-check resources install-matrix soak clean

demo: $(VENV)/installed-demo
	$(BIN)/python -m vpfast.cli.demo --out demo $(if $(MNIST),--mnist '$(MNIST)')

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not alone'
	$(BIN)/python -m pytest -m alone

bad-commands: $(VENV)/installed-dev
	VPFAST_BAD_COMMANDS=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/cli/test_bad_commands.py

# A small part of both is in tests/native/test_instruments.py.
asan tsan: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/native/instruments.py $(if $(filter asan,$@),address,thread)

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

bench: $(VENV)/installed-dev
	$(BIN)/vpfast bench --out benchmarks/results --plot

# Installs nothing: the packages are those that PYTHON sees.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(OUT),--out '$(OUT)')

resources: $(VENV)/installed-dev
	$(BIN)/python benchmarks/resources.py --save

install-matrix: $(VENV)/installed-dev
	$(BIN)/python tests/install_matrix.py $(or $(PYTHONS),$(BIN)/python)

# An hour and a few minutes.
soak: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

clean:
	rm -rf $(VENV) build dist demo *.egg-info vpfast/_C*.so vpfast/_build.json

# torch goes in first, at the version asked for: whatever depends on it then takes the one that is there.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) numpy
	touch $@

$(VENV)/installed-%: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' 'pybind11>=2.13' ninja
	$(if $(filter dev,$*),$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON))
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[$*]'
	$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet $(LPIPS))
	@$(BIN)/python -c "from vpfast.ops._native import build_record as r; print('vpfast built:', r()['built'], '-', r()['reason'])"
	touch $@
