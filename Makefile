# Each target makes .venv and installs what it needs, once. Then, from a fresh clone: `make demo`, `make test`.
#
# pip takes torch 2.13.0 from wherever pip looks: PyPI's Linux wheel is the CUDA build (several GB with NVIDIA's
# libraries, and it runs without a GPU too). For the small CPU build point PIP_EXTRA_INDEX_URL at PyTorch's CPU index.

# The first interpreter that runs (a pyenv shim may not), can make a virtual environment, and is new enough.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.10; do \
    $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
# What `make test-oldest` runs: where releases of torch, transformers and Triton differ. Under four minutes.
OLDEST_TESTS := tests/density tests/objectives/test_losses.py tests/training/test_graphs.py \
    tests/training/test_reinsertion.py tests/training/test_training.py tests/kernels/test_gated.py \
    tests/kernels/test_linear_loss.py tests/kernels/test_norms.py tests/kernels/test_rotary.py \
    $(addprefix tests/model/test_,decoder.py packing.py patch.py patch_users.py prefix_cache.py)

.PHONY: demo test test-slow test-oldest lint bench venv clean

demo: $(STAMP)
	$(VENV)/bin/kunbr-fast demo

test: $(STAMP)
	$(VENV)/bin/pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile

test-slow: $(STAMP)
	$(VENV)/bin/pytest -m slow

# With constraints-oldest.txt, in a .venv-oldest of its own
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile $(OLDEST_TESTS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# All suites on this machine: results.csv, results.json, report.html and plots in bench-out. `make bench BENCH=density`
bench: $(STAMP)
	$(VENV)/bin/kunbr-fast bench $(BENCH)

venv: $(STAMP)

# An editable install: the demo and the tests run the code of this checkout. The stamp comes last, so that an
# installation that was cut short is taken up again.
$(STAMP): CONSTRAINTS := constraints.txt
$(OLDEST)/.installed: CONSTRAINTS := constraints-oldest.txt
$(STAMP) $(OLDEST)/.installed: setup.py pyproject.toml constraints.txt constraints-oldest.txt $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "need Python >= 3.10 with the venv module (Debian: apt install python3-venv); \
	or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "installing into $(@D) (once; minutes where torch has to be downloaded)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
	    -c $(CONSTRAINTS) -e '.[test,gguf,evaluate,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .ruff_cache
