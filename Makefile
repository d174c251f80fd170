# Each target sets up what it needs: `make demo` and `make test` work on a fresh machine with
# Python >= 3.10 and a C++ compiler, and are quick when repeated.
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= python3

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed-with-$(subst =,-,$(TORCH))

.PHONY: install demo test sanitize bench gpu lint clean

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
	$(VENV)/bin/python -m pytest tests/rlhf > build/tests-rlhf.log 2>&1 & trainer=$$!; \
	$(VENV)/bin/python -m pytest --ignore=tests/rlhf; kernels=$$?; \
	wait $$trainer; trainer=$$?; cat build/tests-rlhf.log; exit $$((kernels ? kernels : trainer))

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

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

clean:
	rm -rf build *.egg-info ppo_kernels/_C.*.so $(INSTALLED)
