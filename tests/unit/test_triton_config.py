"""The generated configurations: one test for each rule."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128, SD15_512
from icportrait.request import INPUTS
from icportrait.triton_config import ENSEMBLE, FRONTS, model_configs, to_pbtxt

CONFIGS = model_configs(DEMO_128, "fp32", ServingPolicy())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_reads_back_as_the_same_message(name: str) -> None:
    assert text_format.Parse(to_pbtxt(CONFIGS[name]), pb.ModelConfig()) == CONFIGS[name]


def test_fronts_state_the_public_contract() -> None:
    for name, decoupled in FRONTS.items():
        config = CONFIGS[name]
        assert config.max_batch_size == 0
        assert config.model_transaction_policy.decoupled is decoupled
        assert [tensor.name for tensor in config.input] == [field.name for field in INPUTS]
        assert [tensor.optional for tensor in config.input] == [not field.required for field in INPUTS]
        assert [list(tensor.dims) for tensor in config.output] == [[-1], [1]]


def test_fronts_share_one_instance_each_and_no_queue_policy() -> None:
    for config in CONFIGS.values():
        assert not config.dynamic_batching.HasField("default_queue_policy")
    assert [group.count for name in FRONTS for group in CONFIGS[name].instance_group] == [1, 1]


def test_every_step_of_the_ensemble_is_fed_and_fits() -> None:
    ensemble = CONFIGS[ENSEMBLE]
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


def test_nothing_bypasses_the_decoupled_step() -> None:
    """Triton refuses a step that takes tensors from both sides of a decoupled one."""
    steps = CONFIGS[ENSEMBLE].ensemble_scheduling.step
    after = [step.model_name for step in steps].index("denoise") + 1
    given = {tensor for step in steps[after - 1 :] for tensor in step.output_map.values()}
    assert all(tensor in given for step in steps[after:] for tensor in step.input_map.values())


def test_engine_models_batch_across_callers_up_to_the_contracts_batch() -> None:
    for name in ("vae_encoder", "vae_decoder"):
        assert CONFIGS[name].max_batch_size == DEMO_128.max_vae_batch
        assert CONFIGS[name].HasField("dynamic_batching")


def test_sizes_come_from_the_preset() -> None:
    configs = model_configs(SD15_512, "fp16", ServingPolicy())
    assert list(configs["vae_encoder"].input[0].dims) == [512, 512, 3]
    assert list(configs["denoise"].output[0].dims) == [-1, 4, 64, 64]


def test_the_policy_reaches_the_models_as_parameters() -> None:
    policy = ServingPolicy(runtime="torch", slots=4, preprocess_instances=3)
    configs = model_configs(DEMO_128, "fp32", policy)
    parameters = {key: value.string_value for key, value in configs["denoise"].parameters.items()}
    assert ServingPolicy.from_parameters(parameters) == policy
    assert configs["preprocess"].instance_group[0].count == 3
