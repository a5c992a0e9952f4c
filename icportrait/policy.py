"""The settings by which a server runs models, and the order of waiting requests. ``contract`` specifies the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from icportrait.errors import IcPortraitError
from icportrait.presets import Preset

SIMULATED = "simulated"
RUNTIMES = ("onnxruntime", "openvino", "torch", "tensorrt", "tensorrt-rtx", SIMULATED)
CPU_RUNTIMES = ("onnxruntime", "openvino")
"""Runtimes that run exported graphs on a CPU."""
SMALL_IMAGE_SIZE = 256
"""Up to this picture size a CPU gains by batches, and their memory is no matter."""
POLICY_VARIABLE = "ICPORTRAIT_POLICY"
"""Environment variable with the settings that start-up chose for this machine, as JSON.

These settings go before the repository's own.
"""
LOOP_VARIABLE = "ICPORTRAIT_LOOP"
"""Environment variable with the control line's socket. A loop's process without it runs standalone."""
KEEPS_FAILING = 3
"""Failures of an engine, one run after another, after which the process is given up."""
AGING_S = 10.0
"""Seconds of waiting that move a request up a priority class, so that no request waits for ever."""
PLAN_RUNTIMES = ("tensorrt", "tensorrt-rtx")
"""Runtimes that run plans on a GPU: the names of TensorRT's products."""


@dataclass(frozen=True)
class BatchingMode:
    """The times at which requests join a batch and leave it."""

    joins_running: bool
    """A request joins between any two steps; else only once all of the batch before have ended."""
    leaves_early: bool
    """A request leaves when its own steps are done; else with the last of its batch."""
    equal_steps: bool = False
    """Only requests with the same number of steps share a batch."""


BATCHING_MODES = {
    "in-flight": BatchingMode(joins_running=True, leaves_early=True),
    "whole": BatchingMode(joins_running=False, leaves_early=False),
    "whole-leave-early": BatchingMode(joins_running=False, leaves_early=True),
    "whole-equal-steps": BatchingMode(joins_running=False, leaves_early=False, equal_steps=True),
}
"""``whole`` batches requests as other servers do; the two after it are ``whole`` at its fairest."""


class Ranked(Protocol):
    """Fields that the order of waiting requests depends on."""

    @property
    def priority(self) -> int:
        """Return the request's class; 0 goes first."""
        ...

    @property
    def deadline_s(self) -> float:
        """Return the time at which the answer is worth nothing any more; infinite without a deadline."""
        ...

    @property
    def arrived_s(self) -> float: ...


def rank(item: Ranked, now_s: float, aging_s: float = AGING_S) -> tuple[int, float, float]:
    """Return the order of a waiting request, the smallest first: class, then deadline, then arrival.

    A request that has waited through all classes goes before every request that hasn't. Among such requests the
    earlier arrival goes first. None of them waits for ever, whatever deadlines come after it.
    """
    aged = math.floor((now_s - item.arrived_s) / aging_s)
    if aged > item.priority:
        return -1, item.arrived_s, item.arrived_s
    return item.priority - aged, item.deadline_s, item.arrived_s


@dataclass(frozen=True)
class ServingPolicy:
    """The settings of one deployment; they travel to the Python models as ``config.pbtxt`` parameters."""

    runtime: str = "onnxruntime"
    slots: int = 16
    """Rows of the largest UNet batch; a guided portrait takes two."""
    max_queued_slots: int = 64
    """Slots beyond ``slots`` that admitted requests wait for. A request beyond them is refused with UNAVAILABLE."""
    max_queued_bytes: int = 256 * 2**20
    """Bytes of the pictures of all admitted requests. A request beyond them is refused with UNAVAILABLE."""
    max_pending_requests: int = 128
    """Requests that the gateway holds, running or waiting. A request beyond them is refused with UNAVAILABLE."""
    engine_threads: int = 0
    """Threads one engine computes with; 0 leaves it to the runtime."""
    rows_at_once: int = 16
    """Rows that a CPU's engine computes in one run; more are run in portions. OpenVINO's engines are compiled for each
    power of two up to it, each with weights of its own."""
    preprocess_instances: int = 1
    postprocess_instances: int = 1
    batching: str = "in-flight"
    """One of ``BATCHING_MODES``: when requests join the denoising batch and leave it."""
    latency_table: str = ""
    """The simulated device's, a path: absolute, or within the folder of the model that reads it."""
    cache_bytes: int = 256 * 2**20
    """Latents that the VAE encoder's Python model keeps of pictures it has encoded; 0 keeps none."""
    cache_s: float = 3600.0
    """Seconds that the VAE encoder's model keeps a latent, for requests of the same API key only."""
    deterministic: bool = False
    """A row's bits don't depend on what shares its batch: plans always run one and the same bucket, OpenVINO and torch
    row by row. With ONNX Runtime on the CPU they never do."""

    def __post_init__(self) -> None:
        if self.slots < 1 or self.rows_at_once < 1:
            raise IcPortraitError(f"slots, rows_at_once: {self.slots}, {self.rows_at_once}, expected 1 or more of each")
        if self.batching not in BATCHING_MODES:
            raise IcPortraitError(f"batching: {self.batching!r}, expected one of {', '.join(BATCHING_MODES)}")
        if self.deterministic and self.is_simulated:
            raise IcPortraitError(
                f"deterministic: runtime {SIMULATED} always draws a grey ramp, in times that know nothing of this; "
                f"expected one of {', '.join(name for name in RUNTIMES if name != SIMULATED)}"
            )

    @property
    def uses_plans(self) -> bool:
        return self.runtime in PLAN_RUNTIMES

    @property
    def is_simulated(self) -> bool:
        return self.runtime == SIMULATED

    def to_parameters(self) -> dict[str, str]:
        return {key: str(value) for key, value in asdict(self).items() if value != ""}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServingPolicy:
        defaults = asdict(cls())
        return cls(**{key: _parse(key, parameters[key], defaults[key]) for key in defaults if key in parameters})


def cpu_defaults(preset: Preset, precision: str, runtime: str | None = None) -> dict[str, Any]:
    """Return the runtime and rows at once that measured best on a CPU, as ``ServingPolicy`` takes them (ADR 0010).

    Args:
        preset: of the export.
        precision: of the export; OpenVINO was tried with float32 and float16.
        runtime: the one to take, where it was asked for.
    """
    is_small = preset.image_size <= SMALL_IMAGE_SIZE
    chosen = runtime or ("onnxruntime" if is_small or precision not in ("fp32", "fp16") else "openvino")
    # torch on a GPU gains by batches at every size.
    return {"runtime": chosen} | ({} if is_small or chosen not in CPU_RUNTIMES else {"rows_at_once": 1})


def _parse(key: str, text: str, default: Any) -> Any:
    """Parse ``text`` in the default's type; "False" as a truth value isn't what ``bool`` makes of it."""
    if not isinstance(default, bool):
        return type(default)(text)
    if text not in ("True", "False"):
        raise IcPortraitError(f"{key}: {text!r}, expected True or False")
    return text == "True"
