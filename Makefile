# make demo | serve | test | check | clean. Everything goes into .venv; a second run installs nothing.

# The first that runs: a name on the path may be a shim of a version that is not there.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c pass 2>/dev/null && command -v $$p && break; done)
PROMPT ?= a fox on a blue background
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
INPUTS := pyproject.toml client/pyproject.toml constraints.txt

.PHONY: demo serve test check format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@$(BIN)/fluxserve demo "$(PROMPT)" $(if $(SERVER),--server "$(SERVER)")

serve: $(VENV)/.demo
	@$(BIN)/fluxserve serve $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(if $(SERVER),--server "$(SERVER)")

test: check
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@scripts/system-packages.sh $(PYTHON)
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(VENV)/bin/python
	@echo "installing into $(VENV); the first time it downloads PyTorch and Triton, 0.6 GB or more"
	@$(PIP) --editable '.[server]' --editable ./client
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(PIP) --editable '.[server,test]' --editable ./client
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info client/*.egg-info .mypy_cache .ruff_cache .pytest_cache demo.png
