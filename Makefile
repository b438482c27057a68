# Every target makes what it needs in .venv at the project's root, once.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test trials benchmark lint

$(VENV)/.installed: requirements.txt setup.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

quickstart: $(VENV)/.installed
	$(RUN) -m experiments.quickstart --run.directory runs/quickstart

# Two processes, a file each at a time: most of a test is compiling, on one core.
test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist loadfile

trials: $(VENV)/.installed
	$(RUN) -m pytest -m slow

# The claims of the README's performance tables, on a CPU: most of an hour on a quiet machine of two cores, up to two where
# they are older, and more on first use, when TRL and Tunix are installed in .venv-peers.
benchmark: $(VENV)/.installed
	$(RUN) -m experiments.benchmarks.sampling
	$(RUN) -m experiments.benchmarks.reward
	$(RUN) -m experiments.benchmarks.rollout
	$(RUN) -m experiments.benchmarks.update
	$(RUN) -m experiments.benchmarks.growth
	$(RUN) -m experiments.benchmarks.gpu --dry-run
	$(RUN) -m experiments.benchmarks.peers --shape questions
	$(RUN) -m experiments.benchmarks.peers --shape rpt

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
