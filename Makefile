# Two commands for a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := examples/sms-spam/run.yaml
OUT := runs/sms-spam

.PHONY: quickstart test install lint unit dist chaos-slice e2e clean

quickstart: install  ## The whole line on real data: prepare, train on 2 processes, evaluate, export, reload
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/sms-spam/quickstart.sh $(RUN) $(OUT)

test: install lint unit dist chaos-slice e2e  ## Everything that must pass, in at most 15 minutes on 2 cores

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

unit: install  ## Seconds: every module, every error
	$(BIN)/python -m pytest tests/unit sft_dist launch

dist: install  ## Real ranks on gloo: exactness, elasticity, whole runs that must be equal
	$(BIN)/python -m pytest tests/dist tests/invariants

chaos-slice: install  ## Ctrl-C, SIGTERM, SIGUSR1 and kill -9 against real runs
	$(BIN)/python -m pytest tests/chaos

e2e: install  ## What the README says, executed
	$(BIN)/python -m pytest tests/e2e

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:  ## Removes the virtual environment; never a run
	rm -rf $(VENV)
