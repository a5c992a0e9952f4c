"""The network that TensorRT's parser made of a graph: kinds and types of its layers, and types of its arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engines.network import ParsedNetwork

if TYPE_CHECKING:
    import tensorrt as trt

TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
"""Our names of TensorRT's types that arithmetic is done in."""


@dataclass
class Inspection:
    """Counts over a network at batch 1."""

    layers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Layers by kind and the type of their first output, under TensorRT's names."""
    weighted: Counter[str] = field(default_factory=Counter)
    """Multiply-adds of convolutions and linears by type; "mixed" where the two sides differ."""
    products: Counter[str] = field(default_factory=Counter)
    """Multiply-adds of products of two activations, attention's and the cost volume's, by type."""
    attentions: int = 0
    """Attentions that are TensorRT's own (IAttention)."""
    scores: int = 0
    """Elements of the largest attention's scores, which it keeps in scratch memory where it isn't fused."""
    largest: int = 0
    """Elements of the largest tensor that a layer gives."""
    casts: list[str] = field(default_factory=list)
    """Casts between types that arithmetic is done in: "layer: HALF to FLOAT, [shape]"."""

    def share(self, precision: str) -> float:
        """Return the part of the convolutions' and linears' multiply-adds that is done in ``precision``."""
        return self.weighted[precision] / max(self.weighted.total(), 1)


def inspect(parsed: ParsedNetwork) -> Inspection:
    """Count a parsed network's layers and multiply-adds; it stays as it is."""
    with _batch_one(parsed):
        return _count(parsed)


@contextmanager
def _batch_one(parsed: ParsedNetwork) -> Iterator[None]:
    """Give the network's inputs batch 1 within the block, so that every tensor in it has sizes to multiply."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = parsed.flavour.load()
    inputs = [parsed.network.get_input(index) for index in range(parsed.network.num_inputs)]
    before = [list(tensor.shape) for tensor in inputs]
    try:
        for tensor, shape in zip(inputs, before, strict=True):
            tensor.shape = trt.Dims([1 if size < 0 else size for size in shape])
        yield
    finally:
        for tensor, shape in zip(inputs, before, strict=True):
            tensor.shape = trt.Dims(shape)


def _count(parsed: ParsedNetwork) -> Inspection:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = parsed.flavour.load()
    network = parsed.network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    found, kinds = Inspection(), trt.LayerType
    for layer in layers:
        output = layer.get_output(0)
        found.layers[layer.type.name, output.dtype.name] += 1
        found.largest = max(found.largest, abs(math.prod(output.shape)))
        if layer.type == kinds.CONVOLUTION:
            layer.__class__ = trt.IConvolutionLayer  # the bindings give every layer as its base class
            assert isinstance(layer, trt.IConvolutionLayer)
            kernel_volume = math.prod(layer.kernel_size_nd)
            channels = layer.get_input(0).shape[1] // layer.num_groups
            types = [_arithmetic_type(kinds, layer.get_input(0), producers)]
            if (kernel := layer.get_input(1)) is not None:
                types.append(_arithmetic_type(kinds, kernel, producers))
            found.weighted[_common(types)] += math.prod(output.shape) * kernel_volume * channels
        elif layer.type == kinds.MATRIX_MULTIPLY:
            layer.__class__ = trt.IMatrixMultiplyLayer
            assert isinstance(layer, trt.IMatrixMultiplyLayer)
            sides = [layer.get_input(0), layer.get_input(1)]
            inner = sides[0].shape[-2 if layer.op0 == trt.MatrixOperation.TRANSPOSE else -1]
            kind = found.weighted if any(_is_constant(kinds, side, producers) for side in sides) else found.products
            kind[_common([_arithmetic_type(kinds, side, producers) for side in sides])] += (
                math.prod(output.shape) * inner
            )
        elif layer.type == kinds.ATTENTION_INPUT:
            found.attentions += 1
            query, key, value = (layer.get_input(side) for side in range(3))
            found.scores = max(found.scores, math.prod(query.shape[:3]) * key.shape[2])
            types = [_arithmetic_type(kinds, side, producers) for side in (query, key, value)]
            found.products[_common(types)] += (
                math.prod(query.shape) * key.shape[2] + math.prod(output.shape) * key.shape[2]
            )
        elif layer.type == kinds.CAST:
            before, after = layer.get_input(0).dtype.name, output.dtype.name
            if before != after and before in TYPES and after in TYPES:
                found.casts.append(f"{layer.name}: {before} to {after}, {list(output.shape)}")
    return found


_MOVES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "SLICE")
"""Layers that change neither values nor type."""


def _origin(tensor: trt.ITensor, producers: dict[str, trt.ILayer], through: tuple[str, ...]) -> trt.ILayer | None:
    """Find the layer that made a tensor's values, seen through the given kinds of layers. Return None for an input."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type.name in through:
        layer = producers.get(layer.get_input(0).name)
    return layer


def _is_constant(kinds: type[trt.LayerType], tensor: trt.ITensor, producers: dict[str, trt.ILayer]) -> bool:
    origin = _origin(tensor, producers, (*_MOVES, "CAST", "QUANTIZE", "DEQUANTIZE"))
    return origin is not None and origin.type == kinds.CONSTANT


def _arithmetic_type(kinds: type[trt.LayerType], tensor: trt.ITensor, producers: dict[str, trt.ILayer]) -> str:
    """Return the type that a product reads: behind a DequantizeLinear, the quantised one."""
    origin = _origin(tensor, producers, _MOVES)
    if origin is not None and origin.type == kinds.DEQUANTIZE:
        tensor = origin.get_input(0)
    return TYPES.get(tensor.dtype.name, tensor.dtype.name)


def _common(types: list[str]) -> str:
    return types[0] if len(set(types)) == 1 else "mixed"


def table(name: str, found: Inspection, warnings: list[str]) -> str:
    """Write an inspection as text."""
    lines = [f"{name}: {found.layers.total()} layers"]
    by_kind: dict[str, Counter[str]] = {}
    for (kind, dtype), count in found.layers.items():
        by_kind.setdefault(kind, Counter())[dtype] += count
    for kind, counts in sorted(by_kind.items(), key=lambda item: -item[1].total()):
        types = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
        lines.append(f"  {kind.lower():<18}{counts.total():>6}  {types}")
    for title, macs in (("convolutions and linears", found.weighted), ("products of activations", found.products)):
        shares = "".join(f", {100 * count / macs.total():.1f} % {kind}" for kind, count in macs.most_common())
        lines.append(f"  {title}: {macs.total() / 1e9:.3f} G multiply-adds at batch 1{shares}")
    lines.append(f"  TensorRT attentions: {found.attentions}")
    lines.append(f"  casts between arithmetic types: {len(found.casts)}")
    lines += [f"    {cast}" for cast in found.casts]
    return "\n".join([*lines, *warning_lines(warnings)])


def warning_lines(warnings: list[str]) -> list[str]:
    """Write a line for each different warning with its count, because some come for every quantised layer."""
    return [
        f"  warning: {text.strip()}" + (f" ({count} times)" if count > 1 else "")
        for text, count in Counter(warnings).items()
    ]
