# make run    one small real job: a ladder of tokenizers, and Divot on its base; then the paths of their reports
# make test   the whole test suite            make check  format, lint, types
# make bench  speed against named floors      make setup  only build .venv
# Every target sets itself up: Python 3.11, a .venv in the checkout, the versions of requirements.lock.
# A test process that dies ends the tests: with files for units, pytest-xdist waits for ever after it has replaced one.

PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
TORCH := 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: setup run test check bench clean

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml Makefile
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "kinetok needs Python 3.11 or 3.12: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv .venv; }
	.venv/bin/pip install -q --upgrade pip==26.3 setuptools==84.2.1
	if command -v nvidia-smi >/dev/null; then .venv/bin/pip install -q -c requirements.lock torch==$(TORCH); \
	else .venv/bin/pip install -q --no-deps --retries 1 --timeout 20 --index-url $(TORCH_CPU_INDEX) torch==$(TORCH)+cpu \
	  || .venv/bin/pip install -q --no-deps torch==$(TORCH); fi
	.venv/bin/pip install -q -r requirements.lock
	.venv/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

run: setup
	$(PY) -m kinetok.pipelines.cli run jobs/divot.yaml

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: setup
	$(PY) bench/run.py

clean:
	rm -rf work build dist .pytest_cache .mypy_cache .ruff_cache
