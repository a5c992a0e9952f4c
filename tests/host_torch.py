"""torch.cuda on the stand-in for CUDA: an operator's work is put on torch's current stream, and done on the host.

An operator gives a tensor of the right shape at once, and of NaN or zeros until its stream is synchronised. While the
stream is captured, its operators are recorded with the tensors that they were recorded with, and every replay does them
again. ``torch.cuda.graph`` is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import runtime
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from icportrait.runtime.cuda import DeviceArray
from tests.host_cuda import DEFAULT_STREAM, SUCCESS, HostCuda, view

READS_ON_THE_HOST = (torch.ops.aten._local_scalar_dense.default,)
"""Operators that wait for the GPU, such as ``item``."""


class HostTorch(TorchDispatchMode):
    """Torch's side of a GPU: the current stream, and the operators that run on it."""

    def __init__(self, cuda: HostCuda) -> None:
        super().__init__()
        self.cuda, self.stream = cuda, DEFAULT_STREAM
        """Handle of the current stream."""
        self.operators: set[str] = set()
        """Names of all operators that ran on the GPU."""
        self.pools: list[object] = []
        """The memory of each graph."""
        self.is_on_gpu = False
        """Operators run on the GPU; else on the host."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        as_tensor, to = torch.as_tensor, torch.nn.Module.to

        def tensor_of(data: Any, **options: Any) -> torch.Tensor:
            if not isinstance(data, DeviceArray):
                return as_tensor(data, **options)
            assert options == {"device": "cuda"} and data.dtype.kind in "fiu", "no type that torch can read"
            return torch.from_numpy(view(data.pointer, data.shape, data.dtype))

        def moved(module: torch.nn.Module, *where: Any, **options: Any) -> torch.nn.Module:
            if where != ("cuda",) and not hasattr(module, "is_on_gpu"):
                return to(module, *where, **options)
            with OnStream(self, self.stream):
                if where == ("cuda",):
                    module.is_on_gpu = True
                    return module._apply(torch.clone)
                return to(module, *where, **options)

        answers = {
            "is_available": lambda: True,
            "synchronize": lambda: _raise_failed(runtime.cudaDeviceSynchronize()),
            "graph_pool_handle": object,
            "ExternalStream": lambda handle: SimpleNamespace(handle=handle),
            "stream": lambda stream: OnStream(self, stream.handle),
            "CUDAGraph": partial(HostGraph, self),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch, "as_tensor", tensor_of)
        monkeypatch.setattr(torch.nn.Module, "to", moved)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        work = partial(operator, *arguments, **options)
        if not self.is_on_gpu:
            return work()
        with self:  # an operator that is made of others, such as "contiguous"
            if (result := operator.decompose(*arguments, **options)) is not NotImplemented:
                return result
        if operator in READS_ON_THE_HOST:
            _raise_failed(runtime.cudaStreamSynchronize(self.stream))
            return work()
        changed = [each for each in operator._schema.arguments if each.alias_info and each.alias_info.is_write]
        if not changed and any(each.alias_info for each in operator._schema.returns):
            return work()  # a view of the same memory
        self.operators.add(operator._schema.name)
        if changed:
            self._put(work)
            return arguments[0]
        result = work()
        # A parameter may get other memory before the work is done.
        given = tree_map_only(torch.Tensor, torch.Tensor.detach, (arguments, options))
        if any(each is result for each in arguments):
            return result
        for tensor in tree_leaves(result):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        self._put(partial(_repeat, partial(operator, *given[0], **given[1]), result))
        return result

    def _put(self, work: Callable[[], object]) -> None:
        def do() -> None:
            with torch.inference_mode(), _disable_current_modes():
                work()

        self.cuda.put(self.stream, "execute", do)


class OnStream:
    """``torch.cuda.stream``."""

    def __init__(self, torch_gpu: HostTorch, stream: int) -> None:
        self._gpu, self._stream = torch_gpu, stream

    def __enter__(self) -> None:
        self._before = self._gpu.stream, self._gpu.is_on_gpu
        self._gpu.stream, self._gpu.is_on_gpu = self._stream, True

    def __exit__(self, *_: object) -> None:
        self._gpu.stream, self._gpu.is_on_gpu = self._before


class HostGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, torch_gpu: HostTorch) -> None:
        self._gpu, self._stream, self._graph = torch_gpu, DEFAULT_STREAM, None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global", **options: object) -> None:
        self._gpu.pools.append(pool)
        _raise_failed(runtime.cudaStreamBeginCapture(self._gpu.stream, capture_error_mode))
        self._stream = self._gpu.stream

    def capture_end(self) -> None:
        recorded = _raise_failed(runtime.cudaStreamEndCapture(self._stream))
        self._graph = _raise_failed(runtime.cudaGraphInstantiate(recorded, 0))

    def replay(self) -> None:
        """Start the graph on the current stream, whichever that is, as torch does."""
        _raise_failed(runtime.cudaGraphLaunch(self._graph, self._gpu.stream))


def _repeat(work: Callable[[], Any], result: Any) -> None:
    for target, source in zip(tree_leaves(result), tree_leaves(work()), strict=True):
        target.copy_(source)


def _raise_failed(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != SUCCESS:
        raise RuntimeError(f"CUDA error: {status.name}")
    return values[0] if values else None
