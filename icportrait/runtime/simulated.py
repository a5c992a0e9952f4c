"""Engines that compute nothing and take the time that a latency table says, for load tests and capacity work.

Everything around the engines is real: processes, batching, queues, pictures in and out. What is simulated says so: the
version in every answer's metadata is ``simulated-<device>``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from icportrait.contract import Array, DType, ModelSpec, TensorSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime.latency_table import LatencyTable
from icportrait.runtime.shared_device import SharedDevice
from icportrait.runtime.slots import HostSlots, Inputs, joined

NOISE_LEVELS = 4
LONGEST_SPIN_S = 0.002
"""A sleep ends late, by as much as the machine makes it; so the last bit is spun, at most this long."""


class SimulatedEngine:
    """Takes a batch's time on a device that all engines of a server share, and gives outputs of the right shapes."""

    def __init__(self, spec: ModelSpec, table: LatencyTable, device: SharedDevice) -> None:
        """Make the outputs of the largest batch.

        Args:
            spec: what goes in and comes out.
            table: says how long it takes.
            device: is held meanwhile.

        Raises:
            RuntimeNotAvailable: the export is in bf16, and NumPy can't be taught it.
        """
        if any(tensor.dtype is DType.BFLOAT16 for tensor in (*spec.inputs, *spec.outputs)):
            _learn_bfloat16()
        self.spec = spec
        self.version = f"simulated-{table.device}"
        self._device = device
        sizes = range(1, spec.batch.max + 1)
        self._latency_s = {size: table.of(spec.name, size) / 1000 for size in sizes}
        self._outputs = {tensor.name: _plausible(tensor) for tensor in spec.outputs}
        self._batch, self._end_s = 0, 0.0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Hold the device for the batch's time; see ``Engine.run``. The outputs are read-only views of the same."""
        self.launch(inputs)
        return self.wait()

    def launch(self, inputs: Mapping[str, Array]) -> None:
        """Wait for the device, hold it, and let the batch's time begin: a GPU computes beside the host."""
        self._batch = self.spec.check_inputs(inputs)[self.spec.batch.name]
        self._device.acquire()
        self._end_s = time.perf_counter() + self._latency_s[self._batch]

    def wait(self) -> dict[str, Array]:
        """Return the outputs, as ``run``, once the batch's time is over."""
        try:
            _WAIT.until(self._end_s)
        finally:
            self._device.release()
        return {name: array[: self._batch] for name, array in self._outputs.items()}


class SimulatedSlots(HostSlots):
    """Rows without content. A GPU copies ``F_ref`` in next to no time, and this machine shall not take longer."""

    def __init__(self, warping: SimulatedEngine, unet: SimulatedEngine, rows: int) -> None:
        """Make the rows as ``HostSlots`` does, but with an ``F_ref`` that takes no memory."""
        super().__init__(warping, unet, rows)
        self._simulated_warping, self._simulated_unet = warping, unet
        self._f_ref = {name: np.broadcast_to(array[:1, :1, :1, :1], array.shape) for name, array in self._f_ref.items()}

    def launch_warping(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]]) -> None:
        """Implement ``Slots.launch_warping``."""
        self._simulated_warping.launch(joined(self._warping.spec, jobs))

    def wait_warping(self) -> Array:
        """Implement ``Slots.wait_warping``."""
        return self._simulated_warping.wait()["match_confidence"]

    def launch(self, canvas_latent: Array, timestep: Array) -> None:
        """Implement ``Slots.launch``."""
        super().launch(canvas_latent, timestep)
        self._simulated_unet.launch(self._to_step)

    def wait(self) -> Array:
        """Implement ``Slots.wait``."""
        return self._simulated_unet.wait()["noise_pred"]

    def clear(self, rows: Sequence[int]) -> None:
        """Implement ``Slots.clear``."""

    def move(self, source: int, target: int) -> None:
        """Implement ``Slots.move``."""


def load_simulated(
    names: Iterable[str], directory: Path, manifest: Manifest, policy: ServingPolicy
) -> dict[str, SimulatedEngine]:
    """Load engines of a model directory, ``<repository>/<model>/<version>``.

    Args:
        names: of ``contract.ENGINES``.
        directory: where the model lies, and the latency table if the policy names it without a folder.
        manifest: the export's.
        policy: names the latency table.

    Raises:
        LatencyTableError: see ``LatencyTable.read``.
    """
    table, specs = (
        LatencyTable.read(directory / policy.latency_table),
        engine_specs(manifest.preset, manifest.precision),
    )
    return {name: SimulatedEngine(specs[name], table, SharedDevice.of(directory)) for name in names}


class _Wait:
    """Waits to within microseconds at little cost: it sleeps, and spins for as long as sleeps have lately been late."""

    def __init__(self) -> None:
        self._late_s = 0.0

    def until(self, end_s: float) -> None:
        """Return at ``end_s`` of ``time.perf_counter``."""
        asleep_until_s = end_s - min(self._late_s, LONGEST_SPIN_S)
        left_s = asleep_until_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
            # Forgets slowly: a sleep that was late once is followed by others.
            self._late_s = max(time.perf_counter() - asleep_until_s, 0.95 * self._late_s)
        while time.perf_counter() < end_s:
            time.sleep(0)  # the other threads of this process go on meanwhile


_WAIT = _Wait()


def _plausible(spec: TensorSpec) -> Array:
    """Make the largest batch's output: zeros, which are finite and take no memory until they are read, or a picture.

    Pictures shade from corner to corner under a little noise: encoding one takes as long as encoding a photograph does,
    which plain black wouldn't. All rows have the same picture, because a row's bytes may not depend on its place.
    """
    shape = spec.shape(batch=spec.axes[0].max)
    if spec.dtype is DType.UINT8:
        _, height, width, _ = shape
        rows, columns = np.ogrid[:height, :width]
        shade = (rows + columns) * 255 // (height + width - 2)
        noise = np.random.default_rng(0).integers(-NOISE_LEVELS, NOISE_LEVELS + 1, shape[1:])
        picture = np.clip(shade[:, :, None] + noise, 0, 255).astype(np.uint8)
        array: Array = np.repeat(picture[None], shape[0], axis=0)
    else:
        array = np.zeros(shape, spec.dtype.numpy)
    array.flags.writeable = False
    return array


def _learn_bfloat16() -> None:
    try:
        import ml_dtypes  # noqa: F401 - NumPy learns bfloat16
    except ImportError as error:
        raise RuntimeNotAvailable(f"a bf16 export needs ml_dtypes ({error}); pip install ml_dtypes") from error
