# Each target sets up what it needs in $(VENV); nothing outside the checkout is changed.
# Variables: PYTHON (python3), VENV (.venv), TORCH (torch==2.13.0), ARGS (passed on), MAX_JOBS.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --no-build-isolation --disable-pip-version-check
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
CXX_FILES := $(NATIVE) $(shell find tests benchmarks -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
PACKAGE_PARTS := graphs integrations

.PHONY: help decode test gpu-test scale-test bench lint format build clean
.DELETE_ON_ERROR:

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

decode: $(VENV)/.built  ## generate text with the shipped model and check it (ARGS="--tokens 64 ...")
	$(VENV)/bin/ep-runtime decode --check $(ARGS)

test: $(VENV)/.built  ## every test this machine can run; skipped ones are listed with their reason
	$(RUN) -m pytest -rs -n auto --dist=loadfile $(ARGS)

gpu-test: $(VENV)/.built  ## the whole GPU suite; fails where there is no GPU
	$(RUN) -m benchmarks.gpu_suite $(ARGS)

scale-test: $(VENV)/.built  ## on all GPUs of a host, in 9 minutes: their tests, random replays, benchmarks
	$(RUN) -m benchmarks.scale_test $(ARGS)

bench: $(VENV)/.built  ## low-latency benchmark, results in benchmarks/results
	$(VENV)/bin/ep-runtime bench low-latency $(ARGS)

build: $(VENV)/.built  ## the environment and the native modules

$(VENV)/.environment: .ci/make_venv.py
	$(PYTHON) .ci/make_venv.py $(VENV) --torch '$(TORCH)'
	@touch $@

# What the build reads of its environment: written where it has changed, which builds again.
SETTINGS := $(foreach name,EP_NO_CUDA EP_NVCC EP_CUDA_ARCHS CUDA_HOME CXX CXXFLAGS,$(name)=$($(name)))

$(VENV)/.settings: $(VENV)/.environment FORCE
	@[ "$$(cat $@ 2>/dev/null)" = '$(SETTINGS)' ] || echo '$(SETTINGS)' >$@

FORCE:

# An editable install, so that graphs/ and integrations/ are found inside ep_runtime. Packages that
# are there already are not looked up: this needs no network where nothing is missing.
$(VENV)/.built: $(VENV)/.environment $(VENV)/.settings setup.py pyproject.toml $(NATIVE)
	@mkdir -p build
	@echo "building (the full log is build/build.log)"
	@$(PIP) -v -e '.[test]' >build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep -E '^ *ep_runtime: (built|no )' build/build.log
	@touch $@

$(VENV)/.lint: $(VENV)/.environment pyproject.toml
	$(PIP) -q clang-format==23.1.5 mypy==2.4.1 ruff==0.17.6
	@touch $@

# mypy must see graphs/ and integrations/ where they are imported from: in ep_runtime.
lint: $(VENV)/.built $(VENV)/.lint  ## ruff, mypy --strict, clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -rs $(CURDIR)/ep_runtime build/types/ep_runtime
	cp -rs $(addprefix $(CURDIR)/,$(PACKAGE_PARTS)) build/types/ep_runtime/
	cp -rs $(CURDIR)/examples $(CURDIR)/benchmarks build/types/
	cd build/types && $(abspath $(RUN)) -m mypy --config-file $(CURDIR)/pyproject.toml \
		-p ep_runtime -p examples -p benchmarks
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint  ## let ruff and clang-format rewrite the sources
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:  ## remove what was built; the environment stays (rm -r $(VENV) removes it)
	rm -rf build *.egg-info ep_runtime/*.so $(VENV)/.built $(VENV)/.lint
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
