"""The home of ``F_ref`` while requests are denoised: rows that are written once and read at every step.

    launch_warping, wait_warping    warping network -> F_ref of a job, into every row that the job was given
    launch, wait                    UNet over the first n rows, which takes their latents and timesteps
    move                            a row's F_ref into another row, so that the rows in use stay the first ones

Engines on a GPU run from ``launch`` on, beside the caller's thread. Engines that need the caller's thread run in
``wait``. The caller decides which job owns which rows. The content of rows that aren't in use never reaches the others:
the UNet computes every row by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from icportrait.contract import Array, ModelSpec
from icportrait.runtime.engine import Engine

Inputs = Mapping[str, Array]


class Slots(Protocol):
    """The rows of the UNet's batch with their ``F_ref``. Not thread-safe."""

    rows: int
    """Number of rows."""
    max_jobs: int
    """The most that ``launch_warping`` takes at once."""
    version: str
    """The runtime and its version, for a request's metadata."""
    step_s: Mapping[int, float]
    """Seconds of a step by its rows, as far as they were measured at start-up."""

    @property
    def engine_s(self) -> float | None:
        """Return the seconds that the engine of the last ``wait`` or ``wait_warping`` computed, without copies.

        None where the engine doesn't tell.
        """
        ...

    def launch_warping(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]]) -> None:
        """Begin to run the warping network over jobs and to put each one's ``F_ref`` into its rows.

        Args:
            jobs: for each the warping network's inputs by name, [1, ...].
            rows: for each the rows that share its ``F_ref``, one or more.

        Raises:
            ContractError: an input breaks the warping network's specification. Here or in ``wait_warping``.
        """
        ...

    def wait_warping(self) -> Array:
        """Wait for ``launch_warping``, and return each job's match confidence, [jobs] float32."""
        ...

    def clear(self, rows: Sequence[int]) -> None:
        """Set ``F_ref`` to zero: the unconditional rows of guidance."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a row's ``F_ref`` to another row, which is free."""
        ...

    def launch(self, canvas_latent: Array, timestep: Array) -> None:
        """Begin to run the UNet over the first n rows.

        Args:
            canvas_latent: [n, 4, s, 2 s] float32; it must stay as it is until ``wait`` has ended.
            timestep: [n] float32, likewise.

        Raises:
            ContractError: an input breaks the UNet's specification. Here or in ``wait``.
        """
        ...

    def wait(self) -> Array:
        """Wait for ``launch``, and return ``noise_pred``, [n, 4, s, 2 s] float32; it stays until the next ``wait``."""
        ...


class HostSlots:
    """Rows in the host's memory, over any two engines, which run in ``wait`` and ``wait_warping``."""

    engine_s: float | None = None
    step_s: Mapping[int, float] = MappingProxyType({})

    def __init__(self, warping: Engine, unet: Engine, rows: int) -> None:
        """Make the rows.

        Args:
            warping: the warping network.
            unet: the UNet.
            rows: at most the UNet's largest batch are made.
        """
        self._warping, self._unet = warping, unet
        self.rows, self.max_jobs = min(rows, unet.spec.batch.max), warping.spec.batch.max
        self.version = unet.version
        # Pages that no row has used yet take no memory: zeros is lazy.
        self._f_ref = {
            spec.name: np.zeros(spec.shape(batch=self.rows), spec.dtype.numpy)
            for spec in unet.spec.inputs
            if spec.name in f_ref_names(warping.spec)
        }
        self._to_warp: tuple[Sequence[Inputs], Sequence[Sequence[int]]] = ([], [])
        self._to_step: dict[str, Array] = {}

    def launch_warping(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]]) -> None:
        """Implement ``Slots.launch_warping``."""
        self._to_warp = (jobs, rows)

    def wait_warping(self) -> Array:
        """Implement ``Slots.wait_warping``."""
        jobs, rows = self._to_warp
        outputs = self._warping.run(joined(self._warping.spec, jobs))
        for name, array in self._f_ref.items():
            for index, targets in enumerate(rows):
                array[list(targets)] = outputs[name][index]
        return outputs["match_confidence"]

    def clear(self, rows: Sequence[int]) -> None:
        """Implement ``Slots.clear``."""
        for array in self._f_ref.values():
            array[list(rows)] = 0

    def move(self, source: int, target: int) -> None:
        """Implement ``Slots.move``."""
        for array in self._f_ref.values():
            array[target] = array[source]

    def launch(self, canvas_latent: Array, timestep: Array) -> None:
        """Implement ``Slots.launch``."""
        f_ref = {name: array[: len(timestep)] for name, array in self._f_ref.items()}
        self._to_step = {"canvas_latent": canvas_latent, "timestep": timestep, **f_ref}

    def wait(self) -> Array:
        """Implement ``Slots.wait``."""
        return self._unet.run(self._to_step)["noise_pred"]


def joined(warping: ModelSpec, jobs: Sequence[Inputs]) -> dict[str, Array]:
    """Join the jobs' inputs to a batch."""
    return {spec.name: np.concatenate([job[spec.name] for job in jobs]) for spec in warping.inputs}


def f_ref_names(warping: ModelSpec) -> list[str]:
    return [spec.name for spec in warping.outputs if spec.name.startswith("f_ref_")]
