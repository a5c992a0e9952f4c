# Every task of the project. Each target does its own set-up; `make help` lists them.

# Else each of the many processes that tests start would compile the project again.
unexport PYTHONDONTWRITEBYTECODE

PRESET ?= demo-128
NEEDS_OPSET_23 := $(filter bf16 int8 fp8,$(PRECISION))
# fp16 is what GPUs are fast in, and as good (docs/tensorrt.md); on the CPU it gains nothing.
PRECISION ?= $(if $(filter demo-128-20,$(PRESET)-$(OPSET))$(filter demo-128-openvino,$(PRESET)-$(RUNTIME)),fp32,fp16)
# Which of a CPU's is better for a preset was measured (ADR 0010).
CPU_RUNTIME := $(if $(filter demo-128,$(PRESET))$(NEEDS_OPSET_23),onnxruntime,openvino)
RUNTIME ?= $(CPU_RUNTIME)
# "make serve" without a RUNTIME, or with RUNTIME=auto, takes the best that this machine runs.
IS_CHOSEN := $(filter-out file,$(origin RUNTIME))
ifeq ($(RUNTIME),auto)
override RUNTIME := $(CPU_RUNTIME)
IS_CHOSEN :=
endif
BATCHING ?= in-flight
# 1, for runtimes other than onnxruntime: a seed's bytes are the same whatever shares its batch (docs/determinism.md).
DETERMINISTIC ?=
PLAN_RUNTIME := $(filter tensorrt tensorrt-rtx,$(RUNTIME))
TARGET ?= $(or $(PLAN_RUNTIME),tensorrt-rtx)
CHECKPOINT ?= checkpoints/demo-128
# Of the larger presets there are no weights here: random ones show that the path works.
WEIGHTS ?= $(if $(filter demo-128,$(PRESET))$(filter-out file,$(origin CHECKPOINT)),checkpoint,random)
GRPC_PORT ?= 8001
HTTP_PORT ?= 8000
METRICS_PORT ?= 8002

BOOT_PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
QUANTIZER := .venv-quantizer
QUANTIZER_STAMP := $(QUANTIZER)/.setup-stamp
# Graphs for ONNX Runtime's CPU kernels; TensorRT and OpenVINO get attentions and group norms whole, which came later
# (ADR 0006).
TENSORRT_OPSET := 23
OPSET ?= $(if $(PLAN_RUNTIME)$(NEEDS_OPSET_23)$(filter openvino,$(RUNTIME)),$(TENSORRT_OPSET),20)
EXPORT := build/export/$(PRESET)-$(PRECISION)$(if $(filter-out 20,$(OPSET)),-opset$(OPSET))
REPOSITORY := build/repository/$(RUNTIME)
QUALITY_EXPORT := build/export/$(PRESET)
PLANS := build/engines/$(TARGET)/$(PRESET)-$(PRECISION)

ifeq ($(WEIGHTS),random)
EXPORT_FROM := --random-weights --preset $(PRESET)
WEIGHT_FILES :=
else
EXPORT_FROM := --checkpoint $(CHECKPOINT)
WEIGHT_FILES := $(CHECKPOINT)/model_index.json $(wildcard $(CHECKPOINT)/*.safetensors $(CHECKPOINT)/*/*.*)
endif

# Tests that share a server have the same worker (tests/conftest.py).
WORKERS := --dist loadgroup --numprocesses

.DEFAULT_GOAL := help
.PHONY: FORCE help setup quantizer quality demo serve compare bench bench-check export engines plans gpu-acceptance accept repository configs heads test unit test-full mutants fuzz lint sbom audit format clean chaos soak serve-on locks image-check scale-test

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with everything the other targets need

$(STAMP): setup.sh pyproject.toml client/pyproject.toml constraints.txt
	@BOOT_PYTHON="$(BOOT_PYTHON)" sh setup.sh $(VENV)
	@touch $@

quantizer: $(QUANTIZER_STAMP) ## make .venv-quantizer, which int8 and fp8 exports need

# Over the project's environment: what it needs in the same version is taken from there.
$(QUANTIZER_STAMP): $(STAMP) export/quantization-requirements.txt
	@$(PYTHON) -m venv --clear $(QUANTIZER)
	@$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(QUANTIZER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	@$(QUANTIZER)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r export/quantization-requirements.txt
	@touch $@

demo: repository ## rendered heads and photographs -> portraits, through the real server
	@$(PYTHON) -m examples.demo --export $(EXPORT) --repository $(REPOSITORY)

export: $(EXPORT)/manifest.json ## export the preset's engines to verified ONNX

$(EXPORT)/manifest.json: $(STAMP) $(if $(filter int8 fp8,$(PRECISION)),$(QUANTIZER_STAMP)) $(EXPORT).weights $(WEIGHT_FILES) \
		$(wildcard export/*.py icportrait/nn/*.py) icportrait/contract.py icportrait/manifest.py icportrait/presets.py
	@$(PYTHON) -m export $(EXPORT_FROM) --precision $(PRECISION) --opset $(OPSET) --out $(EXPORT)

# Older than the export while the same weights are asked for, so that another CHECKPOINT exports again.
$(EXPORT).weights: FORCE
	@mkdir -p $(@D)
	@echo '$(EXPORT_FROM)' | cmp -s - $@ || echo '$(EXPORT_FROM)' > $@

engines: ## export and compile into TensorRT plans (TARGET=tensorrt-rtx needs no GPU)
	@$(MAKE) --no-print-directory plans OPSET=$(TENSORRT_OPSET)

plans: $(EXPORT)/manifest.json
	@$(PYTHON) -m engines build --onnx $(EXPORT) --target $(TARGET) --out $(PLANS)

# The last file that a build writes.
$(PLANS)/vae_decoder.plan.json: $(EXPORT)/manifest.json
	@$(MAKE) --no-print-directory engines

quality: $(QUANTIZER_STAMP) ## what each precision costs the demo checkpoint's portraits, and how near fp16 is to overflow
	@for precision in fp32 fp16 int8 fp8; do \
		$(MAKE) --no-print-directory export OPSET=$(TENSORRT_OPSET) PRECISION=$$precision || exit 1; done
	@$(PYTHON) -m export.quality $(foreach precision,fp32 fp16 int8 fp8,$(QUALITY_EXPORT)-$(precision)-opset$(TENSORRT_OPSET))
	@$(PYTHON) -m export.magnitudes $(QUALITY_EXPORT)-fp16-opset$(TENSORRT_OPSET)

gpu-acceptance: ## check and time everything on an NVIDIA GPU: build/gpu-acceptance/report.md
	@$(MAKE) --no-print-directory accept OPSET=$(TENSORRT_OPSET)

accept: $(EXPORT)/manifest.json
	@$(PYTHON) -m engines accept --onnx $(EXPORT) $(if $(filter-out file,$(origin TARGET)),--target $(TARGET))

repository: $(EXPORT)/manifest.json $(if $(PLAN_RUNTIME),$(PLANS)/vae_decoder.plan.json) ## assemble build/repository/<runtime> from triton_repo/ and the export
	@$(PYTHON) -m icportrait.deploy.repository --export $(EXPORT) --out $(REPOSITORY) --runtime $(RUNTIME) \
		--batching $(BATCHING) $(if $(LATENCY_TABLE),--latency-table "$(LATENCY_TABLE)") $(if $(PLAN_RUNTIME),--plans $(PLANS)) \
		$(if $(filter 1,$(DETERMINISTIC)),--deterministic)

serve: $(STAMP) ## run the gateway and its tritonserver on loopback until Ctrl-C (RUNTIME=auto: the best here)
	@$(if $(IS_CHOSEN),true,$(PYTHON) -m icportrait.deploy.choice --preset $(PRESET) --out build/choice \
		$(if $(filter-out file,$(origin PRECISION)),--precision $(PRECISION)))
	@exec $(MAKE) --no-print-directory serve-on $(if $(IS_CHOSEN),RUNTIME=$(RUNTIME),$$(cat build/choice))

serve-on: repository
	@exec $(PYTHON) -m icportrait.server --repository $(REPOSITORY) \
		--grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) --metrics-port $(METRICS_PORT)

compare: $(EXPORT)/manifest.json ## in-flight and whole batches under the same loads, with simulated engines: about 17 minutes
	@$(PYTHON) -m benchmarks compare --export $(EXPORT) $(if $(LATENCY_TABLE),--latency-table "$(LATENCY_TABLE)")

bench: $(EXPORT)/manifest.json ## how fast a portrait is, and why: build/bench/latency.html; about 8 minutes
	@mkdir -p build/bench
	@$(PYTHON) -m benchmarks latency --export $(EXPORT) --out build/bench/latency.json --report build/bench/latency.html

bench-check: $(EXPORT)/manifest.json ## the same, and an error where it is slower by its peers than the committed run
	@$(PYTHON) -m benchmarks latency --export $(EXPORT) --compare-with $(wildcard benchmarks/results/latency-*.json)

configs: $(STAMP) ## regenerate the committed config.pbtxt files, the client's contract, docs' tables and Kubernetes' rules
	@$(PYTHON) -m icportrait.deploy.repository --configs
	@$(PYTHON) -m tests.documents
	@$(PYTHON) -m tests.manifests

heads: $(STAMP) ## render the committed heads of the demo and of the client's sweep again
	@$(PYTHON) -m training.example_heads

# Each step ends the run where it fails, and what is quickest to fail comes first. mypy takes one core, for a minute in a
# fresh clone. The last step has two workers more than there are cores, because its tests wait for servers.
test: $(STAMP) ## lint, types, and the unit, contract, training and e2e tests
	@$(MAKE) --no-print-directory --jobs 2 lint unit
	@$(PYTHON) -m tests.exports
	@$(PYTHON) -m pytest $(WORKERS) $$(($$(nproc) + 2)) tests/contract tests/training tests/e2e tests/gpu

unit: $(STAMP)
	@$(PYTHON) -m pytest $(WORKERS) auto tests/unit

test-full: $(QUANTIZER_STAMP) ## the slow tests: thousands of calls, all of sd15-512, int8 and fp8; about 13 minutes, 16 GB of memory, 12 GB of disk
	@$(PYTHON) -m tests.full
	@$(PYTHON) -m pytest -m full -s --numprocesses 2 --dist loadfile

scale-test: $(STAMP) ## servers behind HAProxy and nginx under load: killed, added, rolled, scaled; about 10 minutes
	@$(PYTHON) -m pytest -m scale -q -s tests/scale

mutants: $(STAMP) ## change 150 lines of the loop, admission, sampling and pictures: do the unit tests notice?
	@$(PYTHON) -m tests.mutants $(if $(SEED),--seed $(SEED))

SEED_OF_FUZZ = $(or $(SEED),0)
fuzz: $(STAMP) ## send 100,000 requests, most of them wrong, to a server, and fuzz all parsers: SEED=7 REQUESTS=1000 CORPUS=folder, REPLAY=file
	@$(PYTHON) -m tests.fuzz --seed $(SEED_OF_FUZZ) $(if $(REQUESTS),--requests $(REQUESTS)) $(if $(CORPUS),--corpus "$(CORPUS)") \
		$(if $(REPLAY),--replay "$(REPLAY)")
	@$(if $(REPLAY),true,FUZZ_EXAMPLES=500 $(PYTHON) -m pytest -q --timeout 1200 --hypothesis-seed $(SEED_OF_FUZZ) tests/unit/test_fuzz.py)

chaos: $(STAMP) ## break every part of a server under load: what do callers see, how soon is it back? about 10 minutes
	@$(PYTHON) -c 'import libfaketime' 2> /dev/null || $(PYTHON) -m pip --disable-pip-version-check install --quiet --no-deps \
		--constraint constraints.txt libfaketime 2> /dev/null || true
	@$(PYTHON) -m tests.chaos $(if $(ONLY),--only "$(ONLY)")

soak: $(STAMP) ## 20 minutes of mixed load (DURATION=seconds): does any process grow, do answers get slower?
	@$(PYTHON) -m tests.soak $(if $(DURATION),--duration $(DURATION)) $(if $(SEED),--seed $(SEED))

lint: $(STAMP) ## ruff, and mypy against the real signatures of both TensorRT products
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m engines.stubs
	@$(PYTHON) -m mypy
	@MYPYPATH=build/stubs/tensorrt $(PYTHON) -m mypy -p engines -p icportrait.runtime.tensorrt

# Tools of their own, because they bring many packages that nothing else needs.
AUDITOR := .venv-audit
AUDITOR_STAMP := $(AUDITOR)/.setup-stamp

$(AUDITOR_STAMP): deploy/audit-requirements.txt
	@$(BOOT_PYTHON) -m venv --clear $(AUDITOR)
	@$(AUDITOR)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@touch $@

IMAGES := cpu gpu

locks: $(STAMP) ## lock the packages of the container images with their hashes, at the versions of constraints.txt
	@$(MAKE) --no-print-directory $(IMAGES:%=lock-%)

lock-cpu: PYTHON_OF_IMAGE := 3.11
lock-gpu: PYTHON_OF_IMAGE := 3.12
lock-%:
	@$(VENV)/bin/uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version $(PYTHON_OF_IMAGE) \
		--constraint constraints.txt --extra c2pa --extra sandbox --extra serve --extra tracing \
		--output-file deploy/container/requirements-$*.txt pyproject.toml deploy/container/$*.in

image-check: $(STAMP) ## take the steps of the CPU image in a bare Debian and serve from it: root, debootstrap, 3 GB of disk
	@$(PYTHON) -m pytest tests/image

sbom: $(STAMP) $(AUDITOR_STAMP) ## list all packages: build/sbom.json with licences (CycloneDX), build/sbom-cpu.json and -gpu of the images
	@mkdir -p build
	@for image in $(IMAGES); do $(AUDITOR)/bin/python -W ignore -m cyclonedx_py requirements --output-reproducible --pyproject pyproject.toml \
		--output-file build/sbom-$$image.json deploy/container/requirements-$$image.txt || exit 1; done
	@$(AUDITOR)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --output-file build/sbom.json $(PYTHON)
	@echo build/sbom.json

audit: $(AUDITOR_STAMP) ## look for known vulnerabilities of the pinned packages; needs the network
	@$(AUDITOR)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

format: $(STAMP) ## let ruff format the code
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

clean: ## remove everything that was built
	@rm -rf build
