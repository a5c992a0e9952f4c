"""Plain torch behind the engine protocol, in the deterministic mode: row by row."""

from __future__ import annotations

import numpy as np
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


def test_every_row_is_computed_alone() -> None:
    shape = SPEC.inputs[0].shape(batch=1)
    latent = np.concatenate([np.full(shape, 10 * row, np.float32) for row in range(4)])
    found = {
        row_by_row: [
            TorchEngine(Pixels(), SPEC, "cpu", row_by_row=row_by_row).run({SPEC.inputs[0].name: latent[:rows]})
            for rows in (1, 3, 4)
        ]
        for row_by_row in (True, False)
    }
    for row_by_row, runs in found.items():
        for outputs, rows in zip(runs, (1, 3, 4), strict=True):
            (pixels,) = outputs.values()
            together = 1 if row_by_row else rows
            assert pixels.shape == SPEC.outputs[0].shape(batch=rows)
            assert pixels[:, 0, 0, 0].tolist() == [10 * row + together for row in range(rows)]
