"""Slots in the UNet engine's own input buffers on a GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from icportrait.contract import Array
from icportrait.runtime.cuda import DeviceArray, DeviceMemory, Timer, pinned_array
from icportrait.runtime.device_engine import DeviceEngine
from icportrait.runtime.slots import Inputs, f_ref_names

WARM_UP_STEPS = 2
"""Steps of each bucket at start-up; the fastest is the pace to begin with."""


class DeviceSlots:
    """Rows in the UNet engine's own input buffers: a step uploads latents and timesteps, and copies nothing else.

    All that crosses between host and GPU lies in pinned memory, which is there from the start.
    """

    def __init__(self, warping: DeviceEngine, unet: DeviceEngine, rows: int) -> None:
        """Take the rows, and take one step with each bucket.

        Args:
            warping: the warping network, on the same stream as the UNet; they may share scratch memory.
            unet: the UNet. Both are warm.
            rows: at most the UNet's largest batch are used.
        """
        if warping.stream is not unet.stream:
            raise ValueError("the warping network and the UNet must be on one stream: it keeps what they do in order")
        self._warping, self._unet, self._stream = warping, unet, unet.stream
        self.rows, self.max_jobs = min(rows, unet.spec.batch.max), warping.spec.batch.max
        self.version = unet.version
        self._f_ref = {name: unet.inputs[name] for name in f_ref_names(warping.spec)}
        self._zeros = DeviceMemory(max(array.rows(0, 1).nbytes for array in self._f_ref.values()))
        self._stream.fill(self._zeros.array((self._zeros.nbytes,), np.dtype(np.uint8)), 0)
        self._jobs = {spec.name: _pinned(warping.inputs[spec.name], self.max_jobs) for spec in warping.spec.inputs}
        self._confidence = _pinned(warping.outputs["match_confidence"], self.max_jobs)
        # Two of each, because the caller may still read the last prediction.
        self._given = [
            {name: _pinned(unet.inputs[name], self.rows) for name in ("canvas_latent", "timestep")} for _ in range(2)
        ]
        self._predictions = [_pinned(unet.outputs["noise_pred"], self.rows) for _ in range(2)]
        self._count, self._side = 0, 0
        self._timer = Timer(self._stream)
        self.step_s: Mapping[int, float] = self._measure()

    @property
    def engine_s(self) -> float | None:
        """Implement ``Slots.engine_s``."""
        return self._timer.seconds()

    def launch_warping(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]]) -> None:
        """Implement ``Slots.launch_warping``."""
        count = self._count = len(jobs)
        for index, job in enumerate(jobs):
            self._warping.spec.check_inputs(job)
            for name, array in self._jobs.items():
                array[index] = job[name][0]
        for name, array in self._jobs.items():
            self._stream.upload(array[:count], self._warping.inputs[name].rows(0, count))
        with self._timer:
            self._warping.execute(count)
        self._stream.copy_all(
            [
                (self._warping.outputs[name].rows(index, 1), array.rows(target, 1))
                for index, targets in enumerate(rows)
                for target in targets
                for name, array in self._f_ref.items()
            ]
        )
        self._stream.download(self._warping.outputs["match_confidence"].rows(0, count), self._confidence[:count])

    def wait_warping(self) -> Array:
        """Implement ``Slots.wait_warping``."""
        self._stream.synchronize()
        return self._confidence[: self._count].copy()

    def clear(self, rows: Sequence[int]) -> None:
        """Implement ``Slots.clear``."""
        pairs = []
        for array in self._f_ref.values():
            zeros = self._zeros.array(array.rows(0, 1).shape, array.dtype)
            pairs += [(zeros, array.rows(row, 1)) for row in rows]
        self._stream.copy_all(pairs)

    def move(self, source: int, target: int) -> None:
        """Implement ``Slots.move``."""
        self._stream.copy_all([(array.rows(source, 1), array.rows(target, 1)) for array in self._f_ref.values()])

    def launch(self, canvas_latent: Array, timestep: Array) -> None:
        """Implement ``Slots.launch``."""
        count = self._count = len(timestep)
        given = {"canvas_latent": canvas_latent, "timestep": timestep}
        self._unet.spec.check_inputs(given | {name: array.rows(0, count) for name, array in self._f_ref.items()})
        self._side = 1 - self._side
        for name, staged in self._given[self._side].items():
            staged[:count] = given[name]
            self._stream.upload(staged[:count], self._unet.inputs[name].rows(0, count))
        with self._timer:
            self._unet.execute(count)
        self._stream.download(self._unet.outputs["noise_pred"].rows(0, count), self._predictions[self._side][:count])

    def wait(self) -> Array:
        """Implement ``Slots.wait``."""
        self._stream.synchronize()
        return self._predictions[self._side][: self._count]

    def _measure(self) -> dict[int, float]:
        """Return the seconds of a step by its rows, as each bucket takes them now."""
        canvas, timestep = (array.copy() for array in self._given[0].values())
        of_buckets: dict[int, float] = {}
        for bucket in self._unet.buckets:
            rows, taken = min(bucket, self.rows), []
            for _ in range(WARM_UP_STEPS):
                begun_s = time.perf_counter()
                self.launch(canvas[:rows], timestep[:rows])
                self.wait()
                taken.append(time.perf_counter() - begun_s)
            of_buckets[bucket] = min(taken)
        return {rows: of_buckets[self._unet.bucket(rows)] for rows in range(1, self.rows + 1)}


def _pinned(array: DeviceArray, rows: int) -> Array:
    """Make a pinned array for the first rows of a buffer."""
    return pinned_array((rows, *array.shape[1:]), array.dtype)
