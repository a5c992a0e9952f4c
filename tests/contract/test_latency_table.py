"""The operations that latency tables are checked by are those of the networks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from icportrait.contract import engine_specs
from icportrait.nn import Checkpoint, engine_modules
from icportrait.nn.random_weights import SCHEDULER_CONFIG, WarpingNetwork, unet_from_preset, vae_from_preset
from icportrait.presets import PRESETS
from icportrait.runtime.latency_table import TFLOP_A_ROW


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_has_as_many_operations_as_the_table_says(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        unet, vae, network = unet_from_preset(preset), vae_from_preset(preset), WarpingNetwork(preset.to_dict())
        prompt = torch.zeros(1, preset.prompt_tokens, preset.cross_attention_dim)
    checkpoint = Checkpoint(preset, unet.eval(), vae.eval(), network.eval(), prompt, dict(SCHEDULER_CONFIG))
    found = {}
    for engine, module in engine_modules(checkpoint).items():
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
            module(
                *(
                    torch.zeros(spec.shape(batch=1), dtype=getattr(torch, spec.dtype.numpy))
                    for spec in engine_specs(preset)[engine].inputs
                )
            )
        found[engine] = counter.get_total_flops() / 1e12
    assert found == pytest.approx(TFLOP_A_ROW[name], rel=0.01)
