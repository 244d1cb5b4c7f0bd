# Two commands for a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := examples/sms-spam/run.yaml
OUT := runs/sms-spam

.PHONY: quickstart test install lint docs unit dist slurm chaos-slice chaos e2e clean

quickstart: install  ## The whole line on real data: prepare, train on 2 processes, evaluate, export, reload
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/sms-spam/quickstart.sh $(RUN) $(OUT)

test: install lint docs unit dist slurm chaos-slice e2e  ## Everything that must pass, in about 50 minutes on 2 cores

lint: install  ## The checks of .pre-commit-config.yaml on all files that git knows; they change none
	@PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files --show-diff-on-failure

docs: install  ## The documentation as a site in build/docs; a warning (a page without a place, a dead link or anchor) is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

unit: install  ## Seconds: every module, every error
	$(BIN)/python -m pytest -n auto tests/unit sft_dist launch docs_hooks.py

dist: install  ## Real ranks on gloo: exactness, elasticity, whole runs that must be equal
	$(BIN)/python -m pytest tests/dist tests/invariants

slurm: install  ## slurm/train.sbatch on a real cluster of this machine; skipped, with the line that mends it, where SLURM is not installed
	$(BIN)/python -m pytest tests/slurm -rs

chaos-slice: install  ## Signals, kills, damage and power loss against real runs: a slice of `make chaos`
	$(BIN)/python -m pytest tests/chaos

chaos: install  ## An hour of it: 220 lives killed, signalled, starved and damaged; the summary is benchmarks/results/chaos.json
	$(BIN)/python -m tests.chaos.driver --lives 220 --json benchmarks/results/chaos.json

e2e: install  ## What the README says, executed
	$(BIN)/python -m pytest -n auto --dist loadfile tests/e2e

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:  ## Removes the virtual environment; never a run
	rm -rf $(VENV)
