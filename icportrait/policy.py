"""How a server runs its models: instances, batch sizes and limits. What the tensors are is ``contract``'s to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

RUNTIMES = ("onnxruntime", "torch", "tensorrt", "tensorrt-rtx")
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

    @property
    def uses_plans(self) -> bool:
        return self.runtime in PLAN_RUNTIMES

    def to_parameters(self) -> dict[str, str]:
        return {key: str(value) for key, value in asdict(self).items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServingPolicy:
        given = {key: type(default)(parameters[key]) for key, default in asdict(cls()).items() if key in parameters}
        return cls(**given)
