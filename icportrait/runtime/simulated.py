"""Engines that compute nothing and take the time that a latency table says, for load tests and capacity work.

Everything around the engines is real: processes, batching, queues, pictures in and out. What is simulated says so: the
version in every answer's metadata is ``simulated-<device>``.

    {"device": "...", "engines": {"unet": {"1": 10.0, "16": 14.0}, "vae_encoder": {...}, ...}}

A table gives each engine's milliseconds by batch size, measured on hardware or computed from FLOPs.
"""

from __future__ import annotations

import json
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icportrait.contract import ENGINES, Array, DType, ModelSpec, TensorSpec, engine_specs
from icportrait.errors import LatencyTableError, RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime.shared_device import SharedDevice
from icportrait.runtime.slots import HostSlots, Inputs

LATENCY_TABLE_NAME = "latency.json"
"""In a repository, beside the manifest of every model that runs engines."""
LONGEST_MS = 600_000
NOISE_LEVELS = 4
LONGEST_SPIN_S = 0.002
"""A sleep ends late, by as much as the machine makes it; so the last bit is spun, at most this long."""


@dataclass(frozen=True)
class LatencyTable:
    """What a device takes for a batch, by engine."""

    device: str
    latency_ms: dict[str, dict[int, float]]
    """Milliseconds by engine and batch size, the sizes ascending."""

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Read a table's JSON file. Members beside ``device`` and ``engines`` are notes, and aren't read.

        Raises:
            LatencyTableError: the file can't be read, or isn't such a table; the text says what was expected.
        """
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise LatencyTableError(f"{path}: can't be read as JSON ({' '.join(str(error).split())})") from error
        try:
            return cls._parse(fields)
        except LatencyTableError as error:
            raise LatencyTableError(f"{path}: {error}") from error

    @classmethod
    def _parse(cls, fields: object) -> LatencyTable:
        if not isinstance(fields, dict):
            raise LatencyTableError(f"is {_told(fields)}, expected an object with device and engines")
        device, engines = fields.get("device"), fields.get("engines")
        if not isinstance(device, str) or not device.strip() or not device.isprintable():
            raise LatencyTableError(f"device is {_told(device)}, expected its name, in one line")
        if not isinstance(engines, dict) or set(engines) != set(ENGINES):
            found = ", ".join(engines) or "empty" if isinstance(engines, dict) else _told(engines)
            raise LatencyTableError(f"engines is {found}, expected an object with {', '.join(ENGINES)}")
        return cls(device.strip(), {name: _points(name, engines[name]) for name in ENGINES})

    def of(self, engine: str, batch: int) -> float:
        """Milliseconds for a batch: linear between the listed sizes, and below the smallest as long as that.

        Beyond the largest, the line through the last two goes on; where it falls, or with one size, it stays level.
        """
        points = self.latency_ms[engine]
        sizes, times = list(points), list(points.values())
        if batch <= sizes[0] or len(sizes) == 1:
            return times[0]
        right = min(bisect_left(sizes, batch), len(sizes) - 1)
        slope = (times[right] - times[right - 1]) / (sizes[right] - sizes[right - 1])
        if batch > sizes[-1]:
            slope = max(slope, 0.0)
        return times[right] + slope * (batch - sizes[right])


def _points(engine: str, given: object) -> dict[int, float]:
    if not isinstance(given, dict) or not given:
        raise LatencyTableError(f"{engine} is {_told(given)}, expected milliseconds by batch size")
    points = {}
    for size, latency_ms in given.items():
        if not re.fullmatch("[1-9][0-9]{0,5}", size):
            raise LatencyTableError(f"{engine}: batch size is {_told(size)}, expected a whole number from 1")
        is_number = isinstance(latency_ms, int | float) and not isinstance(latency_ms, bool)
        if not is_number or not 0 < latency_ms <= LONGEST_MS:
            raise LatencyTableError(
                f"{engine}: batch {size} is {_told(latency_ms)}, expected milliseconds above 0, up to {LONGEST_MS}"
            )
        points[int(size)] = float(latency_ms)
    return dict(sorted(points.items()))


def _told(value: Any) -> str:
    """A JSON value as an error's text names it."""
    return "missing" if value is None else json.dumps(value)[:60]


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

    def run(self, inputs: Mapping[str, Array], meanwhile: Callable[[], None] = lambda: None) -> dict[str, Array]:
        """Hold the device for the batch's time; see ``Engine.run``. The outputs are read-only views of the same.

        ``meanwhile`` is called within that time: a GPU computes beside the host.
        """
        batch = self.spec.check_inputs(inputs)[self.spec.batch.name]
        with self._device.held():
            end_s = time.perf_counter() + self._latency_s[batch]
            meanwhile()
            _WAIT.until(end_s)
        return {name: array[:batch] for name, array in self._outputs.items()}


class SimulatedSlots(HostSlots):
    """Rows without content. A GPU copies ``F_ref`` in next to no time, and this machine shall not take longer."""

    overlaps = True

    def __init__(self, warping: SimulatedEngine, unet: SimulatedEngine, rows: int) -> None:
        """See ``HostSlots``; here ``F_ref`` takes no memory."""
        super().__init__(warping, unet, rows)
        self._simulated_warping, self._simulated_unet = warping, unet
        self._f_ref = {name: np.broadcast_to(array[:1, :1, :1, :1], array.shape) for name, array in self._f_ref.items()}

    def condition(self, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]], meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.condition``."""
        names = [spec.name for spec in self._warping.spec.inputs]
        outputs = self._simulated_warping.run(
            {name: np.concatenate([job[name] for job in jobs]) for name in names}, meanwhile
        )
        return outputs["match_confidence"]

    def predict(self, canvas_latent: Array, timestep: Array, meanwhile: Callable[[], None]) -> Array:
        """See ``Slots.predict``."""
        f_ref = {name: array[: len(timestep)] for name, array in self._f_ref.items()}
        inputs = {"canvas_latent": canvas_latent, "timestep": timestep, **f_ref}
        return self._simulated_unet.run(inputs, meanwhile)["noise_pred"]

    def clear(self, rows: Sequence[int]) -> None:
        """See ``Slots.clear``."""

    def move(self, source: int, target: int) -> None:
        """See ``Slots.move``."""


def load_simulated(
    names: Iterable[str], directory: Path, manifest: Manifest, policy: ServingPolicy
) -> dict[str, SimulatedEngine]:
    """Engines of a model directory, ``<repository>/<model>/<version>``.

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
    """The output of the largest batch: zeros, which are finite and take no memory until they are read, or a picture.

    Pictures shade from corner to corner under a little noise: encoding one takes as long as encoding a photograph does,
    which plain black wouldn't.
    """
    shape = spec.shape(batch=spec.axes[0].max)
    if spec.dtype is DType.UINT8:
        _, height, width, _ = shape
        rows, columns = np.ogrid[:height, :width]
        shade = (rows + columns) * 255 // (height + width - 2)
        noise = np.random.default_rng(0).integers(-NOISE_LEVELS, NOISE_LEVELS + 1, shape)
        array: Array = np.clip(shade[None, :, :, None] + noise, 0, 255).astype(np.uint8)
    else:
        array = np.zeros(shape, spec.dtype.numpy)
    array.flags.writeable = False
    return array


def _learn_bfloat16() -> None:
    try:
        import ml_dtypes  # noqa: F401 - NumPy learns bfloat16
    except ImportError as error:
        raise RuntimeNotAvailable(f"a bf16 export needs ml_dtypes ({error}); pip install ml_dtypes") from error
