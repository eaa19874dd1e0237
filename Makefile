# What people and CI run. Every target works on a bare machine: .venv is made on first use, and brought up to date
# whenever pyproject.toml, constraints.txt or this file change.

PYTHON ?= python3
READY := .venv/.ready
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q

# Nothing here needs the network once .venv stands. OpenMP threads that wait by spinning cost more than they save on few cores.
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := passive

.PHONY: demo test check slow matrix clean

demo: $(READY)
	.venv/bin/python -m rewright demo

test: $(READY)
	$(PYTEST) -n 2 --durations=20

check: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

slow: $(READY)
	$(PYTEST) -m slow

# Every architecture of tools/architectures.py, minutes; the result goes to benchmarks/matrix.json and matrix.txt.
matrix: .venv/.matrix
	OMP_NUM_THREADS=1 .venv/bin/python -m rewright matrix -o benchmarks/matrix.json

clean:
	rm -rf .venv .make .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# timm asks for torchvision, whose wheel for this torch wants CUDA: hence --no-deps, and tools/torchvision_stand_in.py.
$(READY): pyproject.toml constraints.txt Makefile
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-deps timm
	touch $@

.venv/.matrix: $(READY)
	.venv/bin/python -m pip install --quiet -c constraints.txt requests importlib_metadata pillow
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-deps diffusers
	touch $@
