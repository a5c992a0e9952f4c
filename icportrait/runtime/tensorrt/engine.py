"""TensorRT plans as the executor of a ``DeviceEngine``, for both products.

    plan --deserialised once--> engine --one context per bucket--> CUDA graph per bucket

An engine may also come as several plans, one per bucket. A context's shapes and addresses are set once. Contexts own no
scratch memory: engines that never run at once share one block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - NumPy learns bfloat16

from icportrait.contract import ModelSpec
from icportrait.errors import PlanError, RuntimeNotAvailable
from icportrait.runtime.cuda import DeviceMemory, Graph, Stream, find_gpu
from icportrait.runtime.device_engine import Buffers, NotRecordable
from icportrait.runtime.tensorrt.plans import PlanHost, PlanManifest, buckets_of, check_host, read_plan
from icportrait.runtime.tensorrt.products import TENSORRT_RTX, Flavour

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
}


class TensorRtExecutor:
    """An engine's plan, or its plans of one bucket each, on the GPU.

    Not thread-safe: one thread at a time loads it, gives it scratch memory with ``share_scratch`` and runs it.
    """

    def __init__(
        self,
        plans: Path | Sequence[Path],
        spec: ModelSpec,
        contract_hash: str,
        flavour: Flavour,
        stream: Stream,
        pinned: int | None = None,
        cache: Path | None = None,
    ) -> None:
        """Check the plans, load them and make contexts.

        A profile of fixed shapes gives one bucket, one for a range of batches one for every batch of ``BUCKETS`` in it
        and one for its largest.

        Args:
            plans: a ``.plan`` file, or several, each with its manifest beside it.
            spec: what the plans must take and give.
            contract_hash: of the contract that ``spec`` is from.
            flavour: the product that built the plans.
            stream: everything is done on it.
            pinned: the one bucket that every batch runs in, so that a row's bits don't depend on how many there are;
                None makes all.
            cache: file of the kernels that TensorRT-RTX has compiled for this GPU; None keeps none.

        Raises:
            RuntimeNotAvailable: there is no GPU, or the product isn't installed.
            PlanError: a plan isn't for this GPU, product, version or contract, was changed, or can't be loaded.
        """
        gpu = find_gpu()
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.load()
        version = flavour.version()
        host = PlanHost(flavour.name, version, contract_hash, gpu.compute_capability, gpu.name)
        paths = [plans] if isinstance(plans, Path) else plans
        manifests = {plan: PlanManifest.read(plan) for plan in paths}
        for plan, manifest in manifests.items():  # all of it before the first native call
            check_host(plan, manifest, host)
        self.spec, self.stream = spec, stream
        self.version = f"{flavour.name}-{version}"
        self._flavour, self._cache_file = flavour, cache if flavour is TENSORRT_RTX else None
        self._runtime: trt.Runtime | None = None
        self._cache: Any = None
        self._engines: list[trt.ICudaEngine] = []
        self._contexts: dict[int, trt.IExecutionContext] = {}
        for plan, manifest in manifests.items():
            content = read_plan(plan, manifest, host)  # hashed here, and never given to TensorRT where it was changed
            if self._runtime is None:
                self._runtime = trt.Runtime(trt.Logger(trt.ILogger.WARNING))
            engine = self._runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise PlanError(f"{plan}: {flavour.name} {version} can't load it on {gpu.name}; build it again here")
            _compare(plan, spec, engine)
            self._engines.append(engine)
            config = self._config(engine)
            for index, batches in enumerate(manifest.batch_ranges):
                for batch in buckets_of([batches]):
                    if pinned in (None, batch):
                        self._contexts[batch] = self._context(engine, config, index, batch)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Return the batches that there is a context for, smallest first."""
        return tuple(sorted(self._contexts))

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of scratch memory that the largest bucket needs."""
        return max(engine.device_memory_size_v2 for engine in self._engines)

    def use_scratch(self, memory: DeviceMemory) -> None:
        """Use ``memory``, of ``scratch_bytes`` or more, while running; nothing else may use it then.

        It comes before the first bucket is recorded, because a graph keeps the address.
        """
        for context in self._contexts.values():
            context.set_device_memory(memory.pointer, memory.nbytes)
        self._scratch = memory

    def bind(self, inputs: Buffers, outputs: Buffers) -> None:
        """Implement ``Executor.bind``."""
        for context in self._contexts.values():
            for name, array in (*inputs.items(), *outputs.items()):
                if not context.set_tensor_address(name, array.pointer):
                    raise PlanError(f"{self.spec.name}: TensorRT refused the buffer of {name}; its log says why")

    def enqueue(self, bucket: int) -> None:
        """Implement ``Executor.enqueue``."""
        if not self._contexts[bucket].execute_async_v3(self.stream.handle):
            raise PlanError(f"{self.spec.name}: TensorRT refused to run it; its log says why")

    def record(self, bucket: int) -> Graph:
        """Implement ``Executor.record``."""
        context: Any = self._contexts[bucket]  # the full product's bindings can't be asked
        if self._flavour is TENSORRT_RTX and not context.is_stream_capturable(self.stream.handle):
            raise NotRecordable(f"{self._flavour.name} says that it can't be captured")
        with self.stream.capture() as graph:
            self.enqueue(bucket)
        return graph

    def keep_cache(self) -> None:
        """Write the kernels that were compiled at this start to the cache's file, for the next start."""
        if self._cache_file is None or self._cache is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        try:
            if not self._cache_file.is_file() or self._cache_file.read_bytes() != content:
                part = self._cache_file.with_suffix(".part")
                part.write_bytes(content)
                part.replace(self._cache_file)
        except OSError as error:
            logger.warning("%s: kernels are compiled again at the next start (%s)", self._cache_file, error)

    def _config(self, engine: trt.ICudaEngine) -> trt.IRuntimeConfig:
        """Make the configuration of an engine's contexts."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._flavour.load()
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._flavour is TENSORRT_RTX:
            _specialise_kernels_at_once(self._flavour, config)
            if self._cache_file is not None:
                self._use_cache(config)
        return config

    def _use_cache(self, config: Any) -> None:
        """Let contexts take kernels from the cache, and add theirs. All of an engine's plans share one."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            file = self._cache_file
            if file and file.is_file() and not self._cache.deserialize(file.read_bytes()):
                logger.warning("%s: of another GPU or TensorRT; kernels are compiled again", file)
        config.set_runtime_cache(self._cache)

    def _context(
        self, engine: trt.ICudaEngine, config: trt.IRuntimeConfig, profile: int, batch: int
    ) -> trt.IExecutionContext:
        context = engine.create_execution_context(config)
        if context is None:
            raise RuntimeNotAvailable(
                f"{self.spec.name}: TensorRT made no context of profile {profile}; its log says why"
            )
        done = [context.set_optimization_profile_async(profile, self.stream.handle)]
        self.stream.synchronize()
        done += [context.set_input_shape(spec.name, spec.shape(batch=batch)) for spec in self.spec.inputs]
        if not all(done):
            raise PlanError(f"{self.spec.name}: TensorRT refused profile {profile} at batch {batch}; its log says why")
        return context


def share_scratch(executors: Iterable[TensorRtExecutor]) -> DeviceMemory:
    """Give engines that never run at once one block of scratch memory, as large as the largest needs."""
    executors = list(executors)
    memory = DeviceMemory(max(executor.scratch_bytes for executor in executors))
    for executor in executors:
        executor.use_scratch(memory)
    return memory


def _specialise_kernels_at_once(flavour: Flavour, config: Any) -> None:
    """Let TensorRT-RTX compile a shape's kernels before the shape's first run.

    Else TensorRT-RTX runs general kernels until it has compiled the shape's own in the background, and a CUDA graph
    would keep the general ones. The full product's bindings don't have this.
    """
    strategies = flavour.load().DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER


def _compare(plan: Path, spec: ModelSpec, engine: trt.ICudaEngine) -> None:
    """Check that the engine's tensors are the specification's, by name and type."""
    found = {
        (name, _DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name))
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    }
    expected = {(tensor.name, tensor.dtype.numpy) for tensor in (*spec.inputs, *spec.outputs)}
    if found != expected:
        raise PlanError(f"{plan}: tensors are {sorted(found)}, expected {sorted(expected)}; export and build again")
