"""TensorRT plans behind the ``Engine`` protocol, for both products.

    plan --deserialised once--> engine --one context per bucket--> CUDA graph per bucket

An engine may also come as several plans, one per bucket. A bucket always runs whole, at its profile's largest batch.

Inputs and outputs live in static buffers of the largest batch; a bucket of b uses their first b rows. A caller that
keeps its data there (``inputs``, ``outputs``) copies nothing from step to step, and may bind an output to another
engine's rows. Contexts own no scratch memory: engines that never run at once share one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - NumPy learns bfloat16
import numpy as np

from icportrait.contract import Array, ModelSpec, TensorSpec
from icportrait.errors import PlanError, RuntimeNotAvailable
from icportrait.runtime.cuda import DeviceArray, DeviceMemory, Graph, Stream, as_device_array, find_gpu
from icportrait.runtime.tensorrt.plans import PlanHost, PlanManifest, buckets_of, check_content, check_host, read_plan
from icportrait.runtime.tensorrt.products import TENSORRT_RTX, Flavour

if TYPE_CHECKING:
    import tensorrt as trt

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
}


@dataclass
class _Bucket:
    """An execution context whose shapes never change."""

    context: trt.IExecutionContext
    graph: Graph | None = None


class TensorRtEngine:
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
    ) -> None:
        """Check the plans, load them and make buffers and contexts.

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
        host = PlanHost(flavour.name, version, contract_hash, gpu.compute_capability)
        paths = [plans] if isinstance(plans, Path) else plans
        manifests = {plan: PlanManifest.read(plan) for plan in paths}
        for plan, manifest in manifests.items():  # all of it before the first native call
            check_host(plan, manifest, host)
            check_content(plan, manifest)
        self.spec, self.stream = spec, stream
        self.version = f"{flavour.name}-{version}"
        self._runtime = trt.Runtime(trt.Logger(trt.ILogger.WARNING))
        self.inputs, self.outputs = _buffers(spec.inputs), _buffers(spec.outputs)
        for array in self.inputs.values():
            stream.fill(array, 0)  # what lies in a bucket's unused rows is computed with
        self._engines: list[trt.ICudaEngine] = []
        self._buckets: dict[int, _Bucket] = {}
        for plan, manifest in manifests.items():
            engine = self._runtime.deserialize_cuda_engine(read_plan(plan, manifest, host))
            if engine is None:
                raise PlanError(f"{plan}: {flavour.name} {version} can't load it on {gpu.name}; build it again here")
            _compare(plan, spec, engine)
            self._engines.append(engine)
            for index, batches in enumerate(manifest.batch_ranges):
                for batch in buckets_of([batches]):
                    if pinned in (None, batch):
                        self._buckets[batch] = self._context(engine, flavour, index, batch)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Return the batches that the engine has a context for, smallest first."""
        return tuple(sorted(self._buckets))

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of scratch memory that the largest bucket needs."""
        return max(engine.device_memory_size_v2 for engine in self._engines)

    def share_scratch(self, memory: DeviceMemory) -> None:
        """Use ``memory``, of ``scratch_bytes`` or more, while running; nothing else may use it then."""
        for bucket in self._buckets.values():
            bucket.context.set_device_memory(memory.pointer, memory.nbytes)
            bucket.graph = None
        self._scratch = memory

    def bucket(self, batch: int) -> int:
        """Return the smallest bucket that holds ``batch`` rows."""
        return min(size for size in self._buckets if size >= batch)

    def execute(self, batch: int, outputs: Mapping[str, DeviceArray] | None = None) -> None:
        """Start the bucket that holds the first ``batch`` rows of the buffers; it is done when the stream says so.

        Args:
            batch: rows that matter; those up to the bucket's size are computed too.
            outputs: write these outputs there and not into ``self.outputs``; each must hold the bucket's rows.
        """
        size = self.bucket(batch)
        bucket = self._buckets[size]
        if outputs:
            for name, array in outputs.items():
                if array.shape[0] < size:
                    raise ValueError(f"{self.spec.name}: {name} has {array.shape[0]} rows, expected {size}")
                bucket.context.set_tensor_address(name, array.pointer)
            try:
                self._enqueue(bucket.context)
            finally:
                for name in outputs:
                    bucket.context.set_tensor_address(name, self.outputs[name].pointer)
            return
        if bucket.graph is None:
            self._enqueue(bucket.context)  # TensorRT finishes its lazy work outside of the recording
            self.stream.synchronize()
            with self.stream.capture() as graph:
                self._enqueue(bucket.context)
            bucket.graph = graph
        bucket.graph.launch()

    def execute_directly(self, batch: int) -> None:
        """Execute a batch without a CUDA graph, for comparison with ``execute``."""
        self._enqueue(self._buckets[self.bucket(batch)].context)

    def fill_outputs(self, byte: int) -> None:
        """Set every byte of the output buffers: what a run leaves of it, it didn't write."""
        for array in self.outputs.values():
            self.stream.fill(array, byte)

    def run(self, inputs: Mapping[str, Any], *, directly: bool = False) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``. Inputs may also be arrays in GPU memory, of any library.

        Args:
            inputs: by name.
            directly: without a CUDA graph.
        """
        batch = self.spec.check_inputs(inputs)[self.spec.batch.name]
        keep = []
        for spec in self.spec.inputs:
            target = self.inputs[spec.name].rows(0, batch)
            if isinstance(inputs[spec.name], np.ndarray):
                keep.append(np.ascontiguousarray(inputs[spec.name]))
                self.stream.upload(keep[-1], target)
            else:
                self.stream.copy(as_device_array(inputs[spec.name], self.stream), target)
        if directly:
            self.execute_directly(batch)
        else:
            self.execute(batch)
        found = {name: self.stream.download(array.rows(0, batch)) for name, array in self.outputs.items()}
        self.stream.synchronize()
        return found

    def _context(self, engine: trt.ICudaEngine, flavour: Flavour, profile: int, batch: int) -> _Bucket:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.load()
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if flavour is TENSORRT_RTX:
            _specialise_kernels_at_once(flavour, config)
        context = engine.create_execution_context(config)
        if context is None:
            raise RuntimeNotAvailable(
                f"{self.spec.name}: TensorRT made no context of profile {profile}; its log says why"
            )
        done = [context.set_optimization_profile_async(profile, self.stream.handle)]
        self.stream.synchronize()
        done += [context.set_input_shape(spec.name, spec.shape(batch=batch)) for spec in self.spec.inputs]
        done += [
            context.set_tensor_address(name, array.pointer) for name, array in (self.inputs | self.outputs).items()
        ]
        if not all(done):
            raise PlanError(f"{self.spec.name}: TensorRT refused profile {profile} at batch {batch}; its log says why")
        return _Bucket(context)

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(self.stream.handle):
            raise PlanError(f"{self.spec.name}: TensorRT refused to run it; its log says why")


def share_scratch(engines: Iterable[TensorRtEngine]) -> DeviceMemory:
    """Give engines that never run at once one block of scratch memory, as large as the largest needs."""
    engines = list(engines)
    memory = DeviceMemory(max(engine.scratch_bytes for engine in engines))
    for engine in engines:
        engine.share_scratch(memory)
    return memory


def _specialise_kernels_at_once(flavour: Flavour, config: Any) -> None:
    """Let TensorRT-RTX compile a shape's kernels before the shape's first run.

    Else TensorRT-RTX runs general kernels until it has compiled the shape's own in the background, and a CUDA graph
    would keep the general ones. The full product's bindings don't have this.
    """
    strategies = flavour.load().DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER


def _buffers(specs: tuple[TensorSpec, ...]) -> dict[str, DeviceArray]:
    """Allocate arrays of the specifications' largest batches."""
    arrays = {}
    for spec in specs:
        shape = spec.shape(batch=spec.axes[0].max)
        arrays[spec.name] = DeviceMemory(spec.nbytes(shape[0])).array(shape, np.dtype(spec.dtype.numpy))
    return arrays


def _compare(plan: Path, spec: ModelSpec, engine: trt.ICudaEngine) -> None:
    """Check that the engine's tensors are the specification's, by name and type."""
    found = {
        (name, _DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name))
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    }
    expected = {(tensor.name, tensor.dtype.numpy) for tensor in (*spec.inputs, *spec.outputs)}
    if found != expected:
        raise PlanError(f"{plan}: tensors are {sorted(found)}, expected {sorted(expected)}; export and build again")
