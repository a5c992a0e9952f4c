"""Engines alone, one runtime beside the other: equal inputs go to each in turn, so that both see the same machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.spread import ratio, spread
from icportrait.contract import ENGINES, Array, ModelSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime import Engine, load_engine
from icportrait.runtime.latency_table import TFLOP_A_ROW

LEAST_RUNS = 5
MOST_RUNS = 200
_WARM_UPS = 2


def engines_alone(
    export: Path, runtimes: tuple[str, ...], seconds: float, peak: Mapping[str, float], say: Any = lambda _: None
) -> list[dict[str, Any]]:
    """Measure each engine in each runtime, by batch size.

    Args:
        export: written by ``python -m export``.
        runtimes: names of ``policy.CPU_RUNTIMES``; a runtime that isn't installed is left out.
        seconds: time for one engine at one batch size, in all runtimes together.
        peak: ``machine.measured_peak``.
        say: is told what goes on, a line at a time.

    Returns:
        A row for each engine, batch size and runtime. ``floor_ms`` is the longer of two times: the engine's operations
        at the peak of a matrix product, and the bytes of its weights, inputs and outputs at the peak of a copy.
        ``ratio_to_first`` is of the same moments' runs, to the first runtime's.
    """
    manifest = Manifest.read(export)
    rows: list[dict[str, Any]] = []
    for name in ENGINES:
        spec = engine_specs(manifest.preset, manifest.precision)[name]
        weights_bytes = sum(path.stat().st_size for path in manifest.files(name, export))
        with _loaded(name, export, runtimes) as engines:
            for batch in (2**power for power in range(spec.batch.max.bit_length())):
                times = _times(engines, spec.dummy_inputs(batch), seconds)
                gflop = 1000 * batch * TFLOP_A_ROW[manifest.preset.name][name]
                moved = weights_bytes + _bytes(spec, batch)
                floor_ms = 1000 * max(gflop / peak["gflops"], moved / 1e9 / peak["gb_per_s"])
                first = next(iter(times.values()))
                for runtime, measured in times.items():
                    found = spread(measured)
                    rows.append(
                        {
                            "engine": name,
                            "batch": batch,
                            "runtime": runtime,
                            "ms": found,
                            "gflop": round(gflop, 2),
                            "megabytes": round(moved / 1e6, 2),
                            "floor_ms": round(floor_ms, 3),
                            "share_of_floor": round(floor_ms / found["p50"], 3),
                            "ratio_to_first": ratio(measured, first),
                        }
                    )
        say(f"{name}: measured")
    return rows


def load_linked(name: str, export: Path, runtime: str, folder: Path) -> Engine:
    """Load an engine of an export as a server would, from a link below ``folder``.

    A runtime may keep what it compiles beside the repository, so each has a repository of its own there.
    """
    place = folder / runtime / "repository" / name / "1"
    place.parent.mkdir(parents=True)
    place.symlink_to(export.resolve(), target_is_directory=True)
    return load_engine(name, place, Manifest.read(export), ServingPolicy(runtime=runtime))


@contextmanager
def _loaded(name: str, export: Path, runtimes: tuple[str, ...]) -> Iterator[dict[str, Engine]]:
    """Load one engine in each runtime that is installed, by the runtime's version."""
    engines = {}
    with tempfile.TemporaryDirectory(prefix="icportrait-engines-") as folder:
        for runtime in runtimes:
            try:
                engine = load_linked(name, export, runtime, Path(folder))
            except RuntimeNotAvailable:
                continue
            engines[engine.version] = engine
        yield engines


def _times(engines: Mapping[str, Engine], inputs: Mapping[str, Array], seconds: float) -> dict[str, list[float]]:
    """Run all engines by turns, and return the milliseconds of each run."""
    for _ in range(_WARM_UPS):
        for engine in engines.values():
            engine.run(inputs)
    times: dict[str, list[float]] = {name: [] for name in engines}
    until_s = time.perf_counter() + seconds
    for count in range(MOST_RUNS):
        if count >= LEAST_RUNS and time.perf_counter() > until_s:
            break
        for name, engine in engines.items():
            began_s = time.perf_counter()
            engine.run(inputs)
            times[name].append(1000 * (time.perf_counter() - began_s))
    return times


def _bytes(spec: ModelSpec, batch: int) -> int:
    return sum(tensor.nbytes(batch) for tensor in (*spec.inputs, *spec.outputs))
