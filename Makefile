# Every task of the project. Each target does its own set-up; `make help` lists them.

PRESET ?= demo-128
PRECISION ?= $(if $(filter demo-128,$(PRESET)),fp32,fp16)
RUNTIME ?= onnxruntime
TARGET ?= tensorrt-rtx
# Of the larger presets there are no weights here: random ones show that the path works.
WEIGHTS ?= $(if $(filter demo-128,$(PRESET)),checkpoint,random)
CHECKPOINT ?= checkpoints/demo-128
GRPC_PORT ?= 8001
HTTP_PORT ?= 8000
METRICS_PORT ?= 8002

BOOT_PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
# Graphs for ONNX Runtime's CPU kernels; TensorRT gets attentions and group norms whole, which came later (ADR 0006).
OPSET ?= 20
TENSORRT_OPSET := 23
EXPORT := build/export/$(PRESET)-$(PRECISION)$(if $(filter-out 20,$(OPSET)),-opset$(OPSET))
REPOSITORY := build/repository/$(RUNTIME)

ifeq ($(WEIGHTS),random)
EXPORT_FROM := --random-weights --preset $(PRESET)
WEIGHT_FILES :=
else
EXPORT_FROM := --checkpoint $(CHECKPOINT)
WEIGHT_FILES := $(CHECKPOINT)/model_index.json $(wildcard $(CHECKPOINT)/*.safetensors $(CHECKPOINT)/*/*.*)
endif

.DEFAULT_GOAL := help
.PHONY: FORCE help setup demo serve export engines plans gpu-acceptance accept repository configs heads test lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with everything the other targets need

$(STAMP): setup.sh pyproject.toml client/pyproject.toml constraints.txt
	@BOOT_PYTHON="$(BOOT_PYTHON)" sh setup.sh $(VENV)
	@touch $@

demo: repository ## rendered heads and photographs -> portraits, through the real server
	@$(PYTHON) -m examples.demo --export $(EXPORT) --repository $(REPOSITORY)

export: $(EXPORT)/manifest.json ## export the preset's engines to verified ONNX

$(EXPORT)/manifest.json: $(STAMP) $(EXPORT).weights $(WEIGHT_FILES) \
		$(wildcard export/*.py icportrait/nn/*.py) icportrait/contract.py icportrait/presets.py
	@$(PYTHON) -m export $(EXPORT_FROM) --precision $(PRECISION) --opset $(OPSET) --out $(EXPORT)

# Older than the export while the same weights are asked for, so that another CHECKPOINT exports again.
$(EXPORT).weights: FORCE
	@mkdir -p $(@D)
	@echo '$(EXPORT_FROM)' | cmp -s - $@ || echo '$(EXPORT_FROM)' > $@

engines: ## export and compile into TensorRT plans (TARGET=tensorrt-rtx needs no GPU)
	@$(MAKE) --no-print-directory plans OPSET=$(TENSORRT_OPSET)

plans: $(EXPORT)/manifest.json
	@$(PYTHON) -m engines build --onnx $(EXPORT) --target $(TARGET) --out build/engines/$(TARGET)/$(PRESET)-$(PRECISION)

gpu-acceptance: ## check and time everything on an NVIDIA GPU: build/gpu-acceptance/report.md
	@$(MAKE) --no-print-directory accept OPSET=$(TENSORRT_OPSET)

accept: $(EXPORT)/manifest.json
	@$(PYTHON) -m engines accept --onnx $(EXPORT) $(if $(filter-out file,$(origin TARGET)),--target $(TARGET))

repository: $(EXPORT)/manifest.json ## assemble build/repository/<runtime> from triton_repo/ and the export
	@$(PYTHON) -m icportrait.repository --export $(EXPORT) --out $(REPOSITORY) --runtime $(RUNTIME)

serve: repository ## run the embedded tritonserver on loopback until Ctrl-C
	@exec $(PYTHON) -m icportrait.server --repository $(REPOSITORY) \
		--grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) --metrics-port $(METRICS_PORT)

configs: $(STAMP) ## regenerate the committed config.pbtxt files and the client's contract
	@$(PYTHON) -m icportrait.repository --configs

heads: $(STAMP) ## render the committed heads of the demo and of the client's sweep again
	@$(PYTHON) -m training.example_heads

test: lint ## lint, types, and the unit, contract and e2e tests
	@$(PYTHON) -m pytest

lint: $(STAMP) ## ruff, and mypy against the real signatures of both TensorRT products
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m engines.stubs
	@$(PYTHON) -m mypy
	@MYPYPATH=build/stubs/tensorrt $(PYTHON) -m mypy -p engines -m icportrait.runtime.tensorrt

format: $(STAMP) ## let ruff format the code
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

clean: ## remove everything that was built
	@rm -rf build
