"""The generated configurations: one test for each rule."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from icportrait.contract import ENSEMBLE, MODEL_ENGINES, STANDALONE_ENSEMBLE
from icportrait.deploy.triton_config import (
    PRIVATE_MODELS,
    PUBLIC_MODELS,
    STANDALONE_MODELS,
    model_configs,
    public_configs,
    to_pbtxt,
)
from icportrait.errors import IcPortraitError
from icportrait.policy import PLAN_RUNTIMES, RUNTIMES, ServingPolicy
from icportrait.presets import DEMO_128, SD15_512
from icportrait.request import INPUTS, OUTPUTS
from icportrait.runtime.tensorrt.products import FLAVOURS

CONFIGS = model_configs(DEMO_128, "fp32", ServingPolicy())
RANGES = [(1, 1), (2, 2), (3, 4), (5, 8)]
TENSORRT = model_configs(SD15_512, "fp16", ServingPolicy(runtime="tensorrt"), dict.fromkeys(MODEL_ENGINES, RANGES))
TENSORRT_RTX = model_configs(SD15_512, "fp16", ServingPolicy(runtime="tensorrt-rtx"))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_reads_back_as_the_same_message(name: str) -> None:
    assert text_format.Parse(to_pbtxt(CONFIGS[name]), pb.ModelConfig()) == CONFIGS[name]


def test_public_models_state_the_public_contract_and_triton_has_none_of_them() -> None:
    public = public_configs()
    assert set(public) == set(PUBLIC_MODELS) and not set(public) & set(CONFIGS)
    for name, decoupled in PUBLIC_MODELS.items():
        config = public[name]
        assert config.name == name
        assert config.max_batch_size == 0
        assert config.model_transaction_policy.decoupled is decoupled
        assert [tensor.name for tensor in config.input] == [field.name for field in INPUTS]
        assert [tensor.optional for tensor in config.input] == [not field.required for field in INPUTS]
        assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [
            (name, [size]) for name, _, size in OUTPUTS
        ]
        assert [list(tensor.dims) for tensor in config.output] == [[-1], [1], [1], [1]]


def test_nothing_is_decoupled_or_has_a_queue_policy() -> None:
    """Check every model, because tritonserver 2.51 keeps for ever what a decoupled ensemble's early end leaves."""
    for config in CONFIGS.values():
        assert not config.model_transaction_policy.decoupled
        assert not config.dynamic_batching.HasField("default_queue_policy")


def test_every_model_is_in_a_repository_and_the_private_one_has_no_pictures() -> None:
    assert set(PRIVATE_MODELS) | set(STANDALONE_MODELS) == set(CONFIGS)
    assert set(STANDALONE_MODELS) - set(PRIVATE_MODELS) == {STANDALONE_ENSEMBLE, "preprocess", "postprocess"}
    for name in (ENSEMBLE, STANDALONE_ENSEMBLE):
        models = PRIVATE_MODELS if name == ENSEMBLE else STANDALONE_MODELS
        assert {step.model_name for step in CONFIGS[name].ensemble_scheduling.step} == set(models) - {name}


@pytest.mark.parametrize("name", [ENSEMBLE, STANDALONE_ENSEMBLE])
def test_every_step_of_an_ensemble_is_fed_and_fits(name: str) -> None:
    ensemble = CONFIGS[name]
    known = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        config = CONFIGS[step.model_name]
        batched = config.max_batch_size > 0
        for tensor in config.input:
            data_type, dims = known[step.input_map[tensor.name]]
            assert data_type == tensor.data_type
            assert (dims[1:] if batched else dims) == list(tensor.dims), tensor.name
        for tensor in config.output:
            dims = [-1, *tensor.dims] if batched else list(tensor.dims)
            if step.model_name == "vae_encoder":
                dims[0] = 1
            known[step.output_map[tensor.name]] = (tensor.data_type, dims)
    assert {tensor.name for tensor in ensemble.output} <= set(known)


def test_callers_see_crops_and_pixels_here_and_files_there() -> None:
    private, standalone = CONFIGS[ENSEMBLE], CONFIGS[STANDALONE_ENSEMBLE]
    assert [tensor.name for tensor in private.input] == ["profile_pixels", "reference_pixels", "visibility", "request"]
    assert [tensor.name for tensor in private.output] == ["portrait_pixels", "denoise_report"]
    assert [tensor.name for tensor in standalone.input] == ["profile", "reference", "request"]
    assert [tensor.name for tensor in standalone.output] == ["image", "metadata"]


def test_engine_models_batch_across_callers_up_to_the_contracts_batch() -> None:
    for name in ("vae_encoder", "vae_decoder"):
        assert CONFIGS[name].max_batch_size == DEMO_128.max_vae_batch
        assert CONFIGS[name].HasField("dynamic_batching")


def test_sizes_come_from_the_preset() -> None:
    configs = model_configs(SD15_512, "fp16", ServingPolicy())
    assert list(configs["vae_encoder"].input[0].dims) == [512, 512, 3]
    assert list(configs["denoise"].output[0].dims) == [-1, 4, 64, 64]


def test_the_policy_reaches_the_models_as_parameters() -> None:
    policy = ServingPolicy(runtime="torch", slots=4, preprocess_instances=3, deterministic=True)
    configs = model_configs(DEMO_128, "fp32", policy)
    parameters = {key: value.string_value for key, value in configs["denoise"].parameters.items()}
    assert ServingPolicy.from_parameters(parameters) == policy
    assert configs["preprocess"].instance_group[0].count == 3


def test_a_truth_value_that_is_none_is_refused() -> None:
    assert ServingPolicy.from_parameters({"deterministic": "False"}) == ServingPolicy()
    with pytest.raises(IcPortraitError, match="deterministic: 'yes', expected True or False"):
        ServingPolicy.from_parameters({"deterministic": "yes"})


def test_the_encoders_cache_is_ours_and_as_large_as_the_policy_says() -> None:
    """Check that Triton's response cache is off, because it keeps failures too (ADR 0008)."""
    configs = model_configs(DEMO_128, "fp32", ServingPolicy(cache_bytes=12345))
    assert configs["vae_encoder"].parameters["cache_bytes"].string_value == "12345"
    assert not any(config.response_cache.enable for config in (*configs.values(), *TENSORRT.values()))


# TensorRT


def test_the_runtimes_of_plans_are_tensorrts_products() -> None:
    assert set(PLAN_RUNTIMES) == set(FLAVOURS) <= set(RUNTIMES)


@pytest.mark.parametrize("configs", [TENSORRT, TENSORRT_RTX], ids=["tensorrt", "tensorrt-rtx"])
def test_configurations_for_plans_read_back_as_the_same_messages(configs: dict[str, pb.ModelConfig]) -> None:
    for config in configs.values():
        assert text_format.Parse(to_pbtxt(config), pb.ModelConfig()) == config


@pytest.mark.parametrize(
    ("name", "tensor", "dims"),
    [("vae_encoder", "pixels", [512, 512, 3]), ("vae_decoder", "portrait_latent", [4, 64, 64])],
)
def test_tritons_own_backend_runs_the_vae(name: str, tensor: str, dims: list[int]) -> None:
    config = TENSORRT[name]
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert not config.parameters and not config.default_model_filename
    assert config.max_batch_size == 8
    # The decoder's batches can't be split here, and a step waits for all of one.
    assert config.HasField("dynamic_batching") == (name == "vae_encoder")
    assert [(given.name, list(given.dims)) for given in config.input] == [(tensor, dims)]
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.gpus)) == (1, pb.ModelInstanceGroup.KIND_GPU, [0])
    assert list(group.profile) == ["0", "1", "2", "3"]
    cuda = config.optimization.cuda
    assert cuda.graphs and not cuda.output_copy_stream and not cuda.busy_wait_events
    assert [graph.batch_size for graph in cuda.graph_spec] == [1, 2, 3, 4, 6, 8]
    for graph in cuda.graph_spec:
        assert {key: list(shape.dim) for key, shape in graph.input.items()} == {tensor: dims}


def test_every_batch_has_a_graph_and_each_graph_only_its_own_batches() -> None:
    held = []
    for graph in TENSORRT["vae_decoder"].optimization.cuda.graph_spec:
        lower = graph.graph_lower_bound
        smallest = lower.batch_size if graph.HasField("graph_lower_bound") else graph.batch_size
        if graph.HasField("graph_lower_bound"):
            assert lower.input == graph.input
        held += range(smallest, graph.batch_size + 1)
    assert held == list(range(1, 9))


def test_a_plan_of_one_wide_profile_has_the_same_graphs() -> None:
    wide = dict.fromkeys(MODEL_ENGINES, ((1, 8),))
    configs = model_configs(SD15_512, "fp16", ServingPolicy(runtime="tensorrt"), wide)
    assert configs["vae_encoder"].optimization == TENSORRT["vae_encoder"].optimization
    assert list(configs["vae_encoder"].instance_group[0].profile) == ["0"]


@pytest.mark.parametrize(
    ("configs", "on_gpu"),
    [(TENSORRT, set()), (TENSORRT_RTX, {"vae_encoder", "vae_decoder"}), (CONFIGS, set())],
    ids=["tensorrt", "tensorrt-rtx", "onnxruntime"],
)
def test_the_vae_in_python_takes_tensors_on_the_gpu_and_the_others_do_not(
    configs: dict[str, pb.ModelConfig], on_gpu: set[str]
) -> None:
    for name, config in configs.items():
        if config.backend != "python":
            continue
        (group,) = config.instance_group
        given = config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value if name in on_gpu else "no key"
        assert ("FORCE_CPU_ONLY_INPUT_TENSORS" in config.parameters) is (name in on_gpu)
        assert given == ("no" if name in on_gpu else "no key")
        uses_gpu = name in on_gpu or (name == "denoise" and configs is not CONFIGS)
        kind = pb.ModelInstanceGroup.KIND_GPU if uses_gpu else pb.ModelInstanceGroup.KIND_CPU
        assert (group.kind, list(group.gpus)) == (kind, [0] if uses_gpu else [])
        assert config.parameters["runtime"].string_value in RUNTIMES
