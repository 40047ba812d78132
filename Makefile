# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the stamp depends on is what a rebuild of the extension needs.
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(wildcard cmake/*.cmake) $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz docs bench info lint format test-asan gpu-report clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Two steps, so that the demo waits for what it needs and not for the tests' rivals, loggers and linters.
$(VENV)/.built: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	@echo "installing torch and the build tools (constraints.txt) ..."
	$(BIN)/pip install -q -c constraints.txt torch triton numpy "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
	@echo "building mmkd ..."
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[demo,plot]"
	@touch $@

$(VENV)/.installed: $(VENV)/.built
	@echo "installing what the tests need ..."
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation "mmkd[dev]"  # of the mmkd that is there: nothing is built
	@touch $@

install: $(VENV)/.installed ## the environment .venv with mmkd in it

demo: $(VENV)/.built ## train on real purchases and print the table
	$(BIN)/mmkd train --data demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: install ## all tests
	$(BIN)/python -m pytest tests $(PYTEST_ARGS)

# A build of its own, in build/asan: the installed libraries are left alone. Python itself is not built with the sanitizers,
# so their libraries are loaded first; leaks are not looked for, since the interpreter has its own.
ASAN := build/asan
test-asan: install ## the op, sampler and CSR tests under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(CURDIR)/$(BIN):$$PATH" MMKD_BUILD=asan MMKD_SANITIZE=address,undefined MMKD_CUDA=off MMKD_OUT=$(ASAN) \
	$(BIN)/python setup.py -q build_ext
	preload=; for lib in libasan.so libubsan.so libstdc++.so; do preload="$$preload:$$($${CXX:-c++} -print-file-name=$$lib)"; done; \
	LD_PRELOAD="$${preload#:}" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MMKD_OUT=$(CURDIR)/$(ASAN) \
	$(BIN)/python -m pytest tests/ops tests/test_sampling.py tests/test_graph.py -q -p no:cacheprovider $(PYTEST_ARGS)

fuzz: install ## 100,000 damaged files against every reader (FUZZ=N for another number)
	MMKD_FUZZ=$(or $(FUZZ),100000) $(BIN)/python -m pytest tests/faults/test_fuzz.py -s -k damaged_files $(PYTEST_ARGS)

docs: install ## the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: install ## every op against its rivals (keep the machine idle)
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

info: install ## what is built and which implementation each op uses
	$(BIN)/mmkd info

lint: install ## ruff and clang-format, checking only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

gpu-report: install ## docs/gpu.md: registers, memory and load widths of every GPU kernel, predicted times (10 minutes)
	TRITON_INTERPRET=0 $(BIN)/python tools/gpu_report.py

format: install ## ruff and clang-format, rewriting
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

clean: ## removes the environment and everything built
	rm -rf $(VENV) build mmkd/lib mmkd/*.so *.egg-info
