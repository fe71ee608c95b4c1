# make demo | serve | export | test | check | clean. Everything goes into .venv; a second run installs nothing.
#
#   make demo                                          the tiny model through the faster engine for a CPU
#   make demo ENGINE=onnxruntime PRECISION=fp8         with FP8, simulated
#   make demo ENGINE=torch_eager                       the checkpoint as it is
#   make serve                                         Triton, the gateway, and its web page
#   make serve PAGE=                                   Triton alone

# The first that runs: a name on the path may be a shim of a version that is not there.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c pass 2>/dev/null && command -v $$p && break; done)
PROMPT ?= a fox on a blue background
ENGINE ?= onnxruntime
PRECISION ?= fp32
ARTIFACT ?= artifacts/tiny-$(ENGINE)-$(PRECISION)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
INPUTS := pyproject.toml client/pyproject.toml gateway/pyproject.toml constraints.txt

# The tiny model is exported once for ONNX Runtime; another checkpoint or engine is served as it is, another artifact too.
ifneq ($(CHECKPOINT),)
MODEL := --checkpoint "$(CHECKPOINT)"
else ifeq ($(ENGINE),onnxruntime)
MODEL := --artifact "$(ARTIFACT)"
NEEDED := $(if $(findstring ://,$(SERVER))$(filter-out file,$(origin ARTIFACT)),,$(ARTIFACT).made)
else
MODEL := --engine "$(ENGINE)"
endif

# The gateway stands in front of a server that is started here.
PAGE ?= yes
FRONT := $(if $(findstring ://,$(SERVER)),,$(if $(PAGE),--page))

.PHONY: demo serve export test check format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo $(NEEDED)
	@$(BIN)/fluxserve demo "$(PROMPT)" $(MODEL) $(if $(SERVER),--server "$(SERVER)")

serve: $(VENV)/.demo $(NEEDED) $(if $(FRONT),$(VENV)/.page)
	@$(BIN)/fluxserve serve $(MODEL) $(if $(SERVER),--server "$(SERVER)") $(FRONT)

export: $(ARTIFACT).made

$(ARTIFACT).made: $(VENV)/.demo $(wildcard export/src/fluxserve_export/*.py checkpoints/tiny/*/*.safetensors)
	@echo "exporting the tiny model to $(ARTIFACT); the next time it is there"
	@$(BIN)/fluxserve export checkpoints/tiny --out "$(ARTIFACT)" --work artifacts/work \
	    --engine $(ENGINE) --precision $(PRECISION) --max-size 512x512
	@touch $@

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
	@$(PIP) --editable '.[server,onnxruntime,export]' --editable ./client
	@touch $@

$(VENV)/.page: $(VENV)/.demo
	@echo "installing the gateway and its page into $(VENV)"
	@$(PIP) --editable './gateway[page]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@scripts/system-packages.sh $(PYTHON) test
	@$(PIP) --editable '.[server,onnxruntime,export,provenance,tensorrt-rtx,test]' --editable ./client --editable './gateway[jobs,page,postgresql,tracing]'
	@touch $@

clean:
	rm -rf $(VENV) artifacts build *.egg-info client/*.egg-info gateway/*.egg-info .mypy_cache .ruff_cache .pytest_cache demo.png
