# Every task of the project. Each target does its own set-up; `make help` lists them.

PRESET ?= demo-128
PRECISION ?= fp32
RUNTIME ?= onnxruntime
GRPC_PORT ?= 8001
HTTP_PORT ?= 8000
METRICS_PORT ?= 8002

BOOT_PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
EXPORT := build/export/$(PRESET)-$(PRECISION)
REPOSITORY := build/repository/$(RUNTIME)

.DEFAULT_GOAL := help
.PHONY: help setup demo serve export repository configs test lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with everything the other targets need

$(STAMP): setup.sh pyproject.toml client/pyproject.toml constraints.txt
	@BOOT_PYTHON="$(BOOT_PYTHON)" sh setup.sh $(VENV)
	@touch $@

demo: repository ## two pictures -> a portrait, through the real server
	@$(PYTHON) -m examples.demo --export $(EXPORT) --repository $(REPOSITORY)

export: $(EXPORT)/manifest.json ## export the preset's engines to verified ONNX

$(EXPORT)/manifest.json: $(STAMP) $(wildcard export/*.py icportrait/nn/*.py) icportrait/contract.py icportrait/presets.py
	@$(PYTHON) -m export --random-weights --preset $(PRESET) --precision $(PRECISION) --out $(EXPORT)

repository: $(EXPORT)/manifest.json ## assemble build/repository/<runtime> from triton_repo/ and the export
	@$(PYTHON) -m icportrait.repository --export $(EXPORT) --out $(REPOSITORY) --runtime $(RUNTIME)

serve: repository ## run the embedded tritonserver on loopback until Ctrl-C
	@exec $(PYTHON) -m icportrait.server --repository $(REPOSITORY) \
		--grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) --metrics-port $(METRICS_PORT)

configs: $(STAMP) ## regenerate the committed config.pbtxt files and the client's contract
	@$(PYTHON) -m icportrait.repository --configs

test: lint ## lint, types, and the unit, contract and e2e tests
	@$(PYTHON) -m pytest

lint: $(STAMP) ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: $(STAMP) ## let ruff format the code
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

clean: ## remove everything that was built
	@rm -rf build
