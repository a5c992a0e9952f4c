"""How a server runs its models: instances, batch sizes and limits. What the tensors are is ``contract``'s to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from icportrait.errors import IcPortraitError
from icportrait.scheduling import BATCHING_MODES

SIMULATED = "simulated"
RUNTIMES = ("onnxruntime", "torch", "tensorrt", "tensorrt-rtx", SIMULATED)
PLAN_RUNTIMES = ("tensorrt", "tensorrt-rtx")
"""Those that run plans on a GPU: the names of TensorRT's products."""


@dataclass(frozen=True)
class ServingPolicy:
    """The settings of one deployment; they travel to the Python models as ``config.pbtxt`` parameters."""

    runtime: str = "onnxruntime"
    slots: int = 16
    """Rows of the largest UNet batch; a guided portrait takes two."""
    max_pending_requests: int = 64
    """Requests one front holds, running or waiting; a further one is refused with UNAVAILABLE."""
    engine_threads: int = 0
    """Threads one engine computes with; 0 leaves it to the runtime."""
    preprocess_instances: int = 1
    postprocess_instances: int = 1
    batching: str = "in-flight"
    """One of ``scheduling.BATCHING_MODES``: when requests join the denoising batch and leave it."""
    latency_table: str = ""
    """The simulated device's, a path: absolute, or within the folder of the model that reads it."""

    def __post_init__(self) -> None:
        if self.batching not in BATCHING_MODES:
            raise IcPortraitError(f"batching: {self.batching!r}, expected one of {', '.join(BATCHING_MODES)}")

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
        given = {key: type(default)(parameters[key]) for key, default in asdict(cls()).items() if key in parameters}
        return cls(**given)
