"""TensorRT's classes as the runner uses them, on the stand-in for CUDA: a plan's bytes say which engine it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from icportrait.contract import Array, ModelSpec
from tests.fake_plans import VERSIONS
from tests.host_cuda import HostCuda, view

Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Context:
    """Remembers what it was told, and computes with the addresses that it had when it was put on the stream."""

    def __init__(self, engine: Engine, config: SimpleNamespace) -> None:
        self.engine, self.profile, self.asked = engine, -1, dict(vars(config))
        self.is_switched = False
        """True once the profile's stream is there."""
        self.scratch = (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.bound: list[dict[str, int]] = []
        self.fails = False
        engine.contexts.append(self)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        self.engine.cuda.put(stream, "profile", lambda: setattr(self, "is_switched", True))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert not self.bound, "an address is set after the first run, and so after a recording"
        self.addresses[name] = pointer
        return True

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        self.scratch = (pointer, nbytes)

    def execute_async_v3(self, stream: int) -> bool:
        addresses, scratch = dict(self.addresses), self.scratch
        self.bound.append(addresses)
        if not self.fails:
            self.engine.cuda.put(stream, "execute", lambda: self._compute(addresses, *scratch))
        return not self.fails

    def _compute(self, addresses: dict[str, int], scratch: int, scratch_bytes: int) -> None:
        spec, cuda = self.engine.spec, self.engine.cuda
        assert self.is_switched, "the profile is still being switched on another stream"
        assert all(map(cuda.is_on_device, (*addresses.values(), scratch)))
        view(scratch, (scratch_bytes,), np.dtype(np.uint8))[...] = 1
        batch = self.shapes[spec.inputs[0].name][0]
        arrays = {
            tensor.name: view(addresses[tensor.name], tensor.shape(batch=batch), np.dtype(tensor.dtype.numpy))
            for tensor in (*spec.inputs, *spec.outputs)
        }
        for name, array in self.engine.function({tensor.name: arrays[tensor.name] for tensor in spec.inputs}).items():
            arrays[name][...] = array


class RtxContext(Context):
    """A context of TensorRT-RTX, which has a question more."""

    def is_stream_capturable(self, stream: int) -> bool:
        self.engine.cuda.queue(stream)
        return self.engine.is_capturable


class Engine:
    context_type: type[Context] = Context
    device_memory_size_v2 = 1000
    is_capturable = True

    def __init__(self, spec: ModelSpec, function: Function, cuda: HostCuda) -> None:
        self.spec, self.function, self.cuda, self.contexts = spec, function, cuda, list[Context]()
        self._types = {tensor.name: tensor.dtype.numpy for tensor in (*spec.inputs, *spec.outputs)}
        self.num_io_tensors = len(self._types)

    def get_tensor_name(self, index: int) -> str:
        return list(self._types)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "uint8": "UINT8", "int32": "INT32"}
        return SimpleNamespace(name=names[self._types[name]])

    def create_runtime_config(self) -> Any:
        return (RtxConfig if self.context_type is RtxContext else RuntimeConfig)()

    def create_execution_context(self, config: RuntimeConfig) -> Context:
        return self.context_type(self, config)


class RuntimeCache:
    """Holds what was read into it; what it gives is always the same."""

    def __init__(self) -> None:
        self.read: list[bytes] = []
        CACHES.append(self)

    def deserialize(self, content: bytes) -> bool:
        self.read.append(content)
        return content == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels"


CACHES: list[RuntimeCache] = []


class RuntimeConfig(SimpleNamespace):
    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy


class RtxConfig(RuntimeConfig):
    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        return True


def tensorrt_module(flavour: str, deserialize: Callable[[bytes], Engine]) -> Any:
    """Make the Python module of a product, with the calls that the product's own bindings have.

    Args:
        flavour: its name.
        deserialize: gives the engine of a plan's bytes.
    """
    own: dict[str, Any] = {}

    def deserialized(content: bytes) -> Engine:
        engine = deserialize(content)
        engine.context_type = RtxContext if flavour == "tensorrt-rtx" else Context
        return engine

    if flavour == "tensorrt-rtx":
        own["DynamicShapesKernelSpecializationStrategy"] = SimpleNamespace(LAZY="lazy", EAGER="eager", NONE="none")
    return SimpleNamespace(
        __version__=VERSIONS[flavour],
        Logger=lambda severity: None,
        ILogger=SimpleNamespace(WARNING=1),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialized),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        **own,
    )
