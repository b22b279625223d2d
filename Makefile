# Octavo's everyday commands. Each sets up what it needs; a second run is quick.
#   ARGS=...             extra arguments of serve, test and test-kernels
#   MODEL=...            what to serve: a Hugging Face folder or a pulled name
#   TORCH_INDEX_URL=...  an additional package index for torch, for instance https://download.pytorch.org/whl/cpu;
#                        without it pip takes the CUDA build, unless it already knows a source of the CPU build
#   PYTHON=...           the Python 3.11 that .venv is made from

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" 2>/dev/null && echo $$p && break; done)
PACKAGES := $(VENV)/.packages
NATIVE := $(VENV)/.native

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install serve test test-kernels compile-matrix gpu mutate check fix clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1@/p' $(MAKEFILE_LIST) | awk -F@ '{printf "make %-15s %s\n", $$1, $$2}'
	@sed -n 's/^#   /  /p' $(MAKEFILE_LIST)

install: $(NATIVE)  ## set up .venv with everything, native CPU kernels included
	@echo "$(VENV) is up to date"

$(PACKAGES): pyproject.toml
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" 2>/dev/null \
		|| { echo "Octavo needs Python 3.11$(PYTHON:%=; % is not that). Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing packages into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip install -q $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) -e ".[dev]"
	@touch $@

$(NATIVE): $(PACKAGES) kernels/cpu/build.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	@if command -v "$${CXX:-g++}" >/dev/null; then \
		$(BIN)/python -m octavo.kernels.cpu.build && touch $@; \
	else \
		echo "No C++ compiler (g++, or what CXX names): going on without native kernels, much slower" >&2; \
	fi

serve: $(NATIVE)  ## serve MODEL, else the default model (fetched once), on port 8000
	@$(if $(MODEL),,$(BIN)/octavo pull >/dev/null)
	@exec $(BIN)/octavo serve $(MODEL) $(ARGS)

test: $(NATIVE)  ## run the tests, but for those of test-kernels
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

# Triton's interpreter cannot share a process with its compiler.
test-kernels: $(NATIVE)  ## run the slow tests, and all of the GPU kernels' as for sm_80, for sm_90 and in Triton's interpreter
	@$(BIN)/python -m pytest -m slow $(ARGS)
	@OMP_NUM_THREADS=1 GPU_WITHOUT_GPU_ARCH=90 $(BIN)/python -m pytest -n auto tests/gpu --ignore tests/gpu/test_compile.py $(ARGS)
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/gpu --ignore tests/gpu/test_compile.py $(ARGS)

compile-matrix: $(NATIVE)  ## renew the snapshot of what compilers make of the GPU kernels, and docs/kernels.md
	@PYTHONPATH=tests $(BIN)/python -m gpu.compile_matrix

gpu: $(NATIVE)  ## where there is a GPU: test the kernels on it, compare with what is executed without, time them in docs/gpu.md
	@PYTHONPATH=tests $(BIN)/python -m gpu.on_gpu

mutate: $(NATIVE)  ## plant small faults in the Triton kernels and see that tests notice (20 minutes; ARGS=--all: hours)
	@$(BIN)/python tests/mutate_kernels.py $(ARGS)

check: $(PACKAGES)  ## check format, lint and types; changes nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

fix: $(PACKAGES)  ## format the code and mend what the linter can
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:  ## remove what was built, but not the installed packages
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis kernels/cpu/*.so $(NATIVE)
	@find octavo server kernels models benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
