"""Where ``F_ref`` lives while requests are denoised: rows that are written once and read at every step.

    condition   warping network -> F_ref of a job, into every row that the job was given
    predict     UNet over the first n rows; only their latents and timesteps are handed over
    move        a row's F_ref into another row, so that the rows in use stay the first ones when some end

Whoever owns the rows decides which job has which; nothing of that is known here. What lies in rows that aren't in use
never reaches the others: the UNet computes every row by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from icportrait.contract import Array, ModelSpec, engine_specs
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime.engine import Engine, load_engine, pinned_rows
from icportrait.runtime.flavours import FLAVOURS
from icportrait.runtime.placement import Placed, put

if TYPE_CHECKING:
    from icportrait.runtime.tensorrt import TensorRtEngine

Inputs = Mapping[str, Placed]
ALIGNMENT_BYTES = 256
"""Of every address that TensorRT is given."""


class Slots(Protocol):
    """The rows of the UNet's batch with their ``F_ref``. Not thread-safe."""

    rows: int
    """How many there are."""
    max_jobs: int
    """What ``condition`` takes at once."""
    version: str
    """The runtime and its version, for a request's metadata."""
    overlaps: bool
    """Whether ``condition`` and ``predict`` leave this thread free while their engine runs."""

    def condition(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]], meanwhile: Callable[[], None]) -> Array:
        """Run the warping network over jobs and put each one's ``F_ref`` into its rows.

        Args:
            jobs: for each the warping network's inputs by name, [1, ...], in the host's memory or the GPU's.
            rows: for each the rows that share its ``F_ref``, one or more.
            meanwhile: is called once: as soon as the engine runs where this thread is free then, and it may sleep for
                nearly as long; else before.

        Returns:
            Each job's match confidence, [jobs] float32.

        Raises:
            ContractError: an input breaks the warping network's specification.
        """
        ...

    def clear(self, rows: Sequence[int]) -> None:
        """Set ``F_ref`` to zero: the unconditional rows of guidance."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a row's ``F_ref`` to another row, which is free."""
        ...

    def predict(self, canvas_latent: Array, timestep: Array, meanwhile: Callable[[], None]) -> Array:
        """The UNet over the first n rows.

        Args:
            canvas_latent: [n, 4, s, 2 s] float32.
            timestep: [n] float32.
            meanwhile: see ``condition``.

        Returns:
            ``noise_pred``, [n, 4, s, 2 s] float32; it stays as it is until the next call's ``meanwhile`` has ended.

        Raises:
            ContractError: an input breaks the UNet's specification.
        """
        ...

    def to_host(self, array: Placed) -> Array:
        """An array of either memory in the host's."""
        ...


class HostSlots:
    """Rows in the host's memory, over any two engines."""

    overlaps = False

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
            if spec.name in _f_ref_names(warping.spec)
        }

    def condition(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]], meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.condition``."""
        meanwhile()
        names = [spec.name for spec in self._warping.spec.inputs]
        outputs = self._warping.run({name: np.concatenate([job[name] for job in jobs]) for name in names})
        for name, array in self._f_ref.items():
            for index, targets in enumerate(rows):
                array[list(targets)] = outputs[name][index]
        return outputs["match_confidence"]

    def clear(self, rows: Sequence[int]) -> None:
        """See ``Slots.clear``."""
        for array in self._f_ref.values():
            array[list(rows)] = 0

    def move(self, source: int, target: int) -> None:
        """See ``Slots.move``."""
        for array in self._f_ref.values():
            array[target] = array[source]

    def predict(self, canvas_latent: Array, timestep: Array, meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.predict``."""
        meanwhile()
        f_ref = {name: array[: len(timestep)] for name, array in self._f_ref.items()}
        return self._unet.run({"canvas_latent": canvas_latent, "timestep": timestep, **f_ref})["noise_pred"]

    def to_host(self, array: Placed) -> Array:
        """See ``Slots.to_host``."""
        assert isinstance(array, np.ndarray), "a runtime of the host gets no array in GPU memory"
        return array


class DeviceSlots:
    """Rows in the UNet engine's own input buffers: a step uploads latents and timesteps, and copies nothing else."""

    overlaps = True

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
        self._f_ref = {name: unet.inputs[name] for name in _f_ref_names(warping.spec)}

    def condition(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]], meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.condition``.

        The warping network writes straight into the rows where its bucket is full, so that it writes none but theirs,
        and the jobs' first rows follow one another. Further rows of a job are copies within the GPU's memory.
        """
        placed = [self._put_inputs(job, index) for index, job in enumerate(jobs)]
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
        meanwhile()
        confidence = self._stream.download(self._warping.outputs["match_confidence"].rows(0, count))
        self._stream.synchronize()
        del placed  # which the uploads have read by now
        return confidence

    def clear(self, rows: Sequence[int]) -> None:
        """See ``Slots.clear``."""
        for array in self._f_ref.values():
            for row in rows:
                self._stream.fill(array.rows(row, 1), 0)

    def move(self, source: int, target: int) -> None:
        """See ``Slots.move``."""
        for array in self._f_ref.values():
            self._stream.copy(array.rows(source, 1), array.rows(target, 1))

    def predict(self, canvas_latent: Array, timestep: Array, meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.predict``."""
        count = len(timestep)
        given = {"canvas_latent": np.ascontiguousarray(canvas_latent), "timestep": np.ascontiguousarray(timestep)}
        self._unet.spec.check_inputs(given | {name: array.rows(0, count) for name, array in self._f_ref.items()})
        for name, array in given.items():
            self._stream.upload(array, self._unet.inputs[name].rows(0, count))
        self._unet.execute(count)
        meanwhile()
        noise_pred = self._stream.download(self._unet.outputs["noise_pred"].rows(0, count))
        self._stream.synchronize()
        return noise_pred

    def to_host(self, array: Placed) -> Array:
        """See ``Slots.to_host``."""
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


def load_slots(directory: Path, manifest: Manifest, policy: ServingPolicy) -> Slots:
    """Load the warping network and the UNet, and make the rows where the policy's runtime computes.

    Args:
        directory: holds both engines' files; see ``load_engine``.
        manifest: the export's manifest.
        policy: says which runtime and how many rows.
    """
    if policy.uses_plans:
        from icportrait.runtime.loading import load_plans

        names = ("warping_network", "unet")
        specs = engine_specs(manifest.preset, manifest.precision)
        rows = {name: count for name in names if (count := pinned_rows(specs[name], policy))}
        plans = load_plans(names, directory, manifest, FLAVOURS[policy.runtime], rows)
        return DeviceSlots(plans["warping_network"], plans["unet"], policy.slots)
    if policy.is_simulated:
        from icportrait.runtime.simulated import SimulatedSlots, load_simulated

        engines = load_simulated(("warping_network", "unet"), directory, manifest, policy)
        return SimulatedSlots(engines["warping_network"], engines["unet"], policy.slots)
    warping, unet = (load_engine(name, directory, manifest, policy) for name in ("warping_network", "unet"))
    return HostSlots(warping, unet, policy.slots)


def _f_ref_names(warping: ModelSpec) -> list[str]:
    return [spec.name for spec in warping.outputs if spec.name.startswith("f_ref_")]
