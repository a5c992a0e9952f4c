"""Slots in the UNet engine's own input buffers on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icportrait.contract import Array
from icportrait.runtime.placement import Placed, put
from icportrait.runtime.slots import Inputs, f_ref_names
from icportrait.runtime.tensorrt.engine import TensorRtEngine

ALIGNMENT_BYTES = 256
"""Alignment of every address that TensorRT is given."""


class DeviceSlots:
    """Rows in the UNet engine's own input buffers: a step uploads latents and timesteps, and copies nothing else."""

    def __init__(self, warping: TensorRtEngine, unet: TensorRtEngine, rows: int) -> None:
        """Take the rows.

        Args:
            warping: the warping network, on the same stream as the UNet; they may share scratch memory.
            unet: the UNet.
            rows: at most the UNet's largest batch are used.
        """
        if warping.stream is not unet.stream:
            raise ValueError("the warping network and the UNet must be on one stream: it keeps what they do in order")
        self._warping, self._unet, self._stream = warping, unet, unet.stream
        self.rows, self.max_jobs = min(rows, unet.spec.batch.max), warping.spec.batch.max
        self.version = unet.version
        self._f_ref = {name: unet.inputs[name] for name in f_ref_names(warping.spec)}
        self._placed: list[list[Placed]] = []
        self._given: dict[str, Array] = {}

    def launch_warping(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]]) -> None:
        """Implement ``Slots.launch_warping``.

        The warping network writes straight into the rows if its bucket is full and the jobs' first rows follow one
        another. It then writes no other rows. Further rows of a job are copies within the GPU's memory.
        """
        # Kept until the uploads have read it.
        self._placed = [self._put_inputs(job, index) for index, job in enumerate(jobs)]
        count, first = len(jobs), rows[0][0]
        in_order = [targets[0] for targets in rows] == list(range(first, first + count))
        aligned = all(array.rows(first, 1).pointer % ALIGNMENT_BYTES == 0 for array in self._f_ref.values())
        direct = in_order and aligned and self._warping.bucket(count) == count
        if direct:
            sources = {name: array.rows(first, count) for name, array in self._f_ref.items()}
            self._warping.execute(count, sources)
        else:
            sources = {name: self._warping.outputs[name] for name in self._f_ref}
            self._warping.execute(count)
        for index, targets in enumerate(rows):
            for target in targets[1:] if direct else targets:
                for name, array in self._f_ref.items():
                    self._stream.copy(sources[name].rows(index, 1), array.rows(target, 1))

    def wait_warping(self) -> Array:
        """Implement ``Slots.wait_warping``."""
        confidence = self._stream.download(self._warping.outputs["match_confidence"].rows(0, len(self._placed)))
        self._stream.synchronize()
        self._placed = []
        return confidence

    def clear(self, rows: Sequence[int]) -> None:
        """Implement ``Slots.clear``."""
        for array in self._f_ref.values():
            for row in rows:
                self._stream.fill(array.rows(row, 1), 0)

    def move(self, source: int, target: int) -> None:
        """Implement ``Slots.move``."""
        for array in self._f_ref.values():
            self._stream.copy(array.rows(source, 1), array.rows(target, 1))

    def launch(self, canvas_latent: Array, timestep: Array) -> None:
        """Implement ``Slots.launch``."""
        count = len(timestep)
        # Kept until the uploads have read it.
        given = self._given = {
            "canvas_latent": np.ascontiguousarray(canvas_latent),
            "timestep": np.ascontiguousarray(timestep),
        }
        self._unet.spec.check_inputs(given | {name: array.rows(0, count) for name, array in self._f_ref.items()})
        for name, array in self._given.items():
            self._stream.upload(array, self._unet.inputs[name].rows(0, count))
        self._unet.execute(count)

    def wait(self) -> Array:
        """Implement ``Slots.wait``."""
        noise_pred = self._stream.download(self._unet.outputs["noise_pred"].rows(0, len(self._given["timestep"])))
        self._stream.synchronize()
        return noise_pred

    def to_host(self, array: Placed) -> Array:
        """Implement ``Slots.to_host``."""
        if isinstance(array, np.ndarray):
            return array
        copied = self._stream.download(array)
        self._stream.synchronize()
        return copied

    def _put_inputs(self, job: Inputs, index: int) -> list[Placed]:
        """Copy a job's inputs to row ``index`` of the warping network's; what is returned must outlive the copying."""
        self._warping.spec.check_inputs(job)
        arrays: list[Placed] = []
        for spec in self._warping.spec.inputs:
            array = job[spec.name]
            arrays.append(np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array)
            put(arrays[-1], self._warping.inputs[spec.name].rows(index, 1), self._stream)
        return arrays
