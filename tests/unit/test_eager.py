"""Plain torch behind the engine protocol: how many rows are computed together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from icportrait.contract import engine_specs
from icportrait.runtime.eager import TorchEngine
from tests.tiny import TINY

SPEC = engine_specs(TINY)["vae_decoder"]


class Pixels(torch.nn.Module):
    """Pixels that say how many rows were computed together."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        mean = latent.mean(dim=(1, 2, 3)) + len(latent)
        return mean.reshape(-1, 1, 1, 1).expand(-1, *SPEC.outputs[0].shape(batch=1)[1:]).to(torch.uint8)


@pytest.mark.parametrize(
    ("settings", "most"), [({"row_by_row": True}, 1), ({"rows_at_once": 3}, 3), ({"rows_at_once": 16}, 8), ({}, 8)]
)
def test_a_batch_is_computed_in_as_many_rows_at_once_as_are_allowed(settings: dict[str, Any], most: int) -> None:
    engine, shape = TorchEngine(Pixels(), SPEC, "cpu", **settings), SPEC.inputs[0].shape(batch=1)
    latent = np.concatenate([np.full(shape, 10 * row, np.float32) for row in range(8)])
    for rows in (1, 3, 4, 8):
        (pixels,) = engine.run({SPEC.inputs[0].name: latent[:rows]}).values()
        assert pixels.shape == SPEC.outputs[0].shape(batch=rows)
        together = [min(most, rows - row // most * most) for row in range(rows)]
        assert pixels[:, 0, 0, 0].tolist() == [10 * row + together[row] for row in range(rows)]
