"""ONNX files through TensorRT's own parser."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icportrait.errors import VerificationError
from icportrait.runtime.tensorrt.products import Flavour

if TYPE_CHECKING:
    import tensorrt as trt

HARMLESS = {"scales to fp32": "fp16 scales of a quantised layer become fp32, which is exact"}
"""Parts of warnings that say nothing against a graph, and why. Any other may mean other values than torch's."""

PLANNED = ("Max Scratch Memory: ", "Layers:")
"""Beginnings of the builder's messages about the memory of a profile, and about the kernels of all."""


@dataclass
class ParsedNetwork:
    """A network and what it can't live without."""

    flavour: Flavour
    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser
    warnings: list[str]
    """Warnings of TensorRT since parsing began; a build adds to them."""
    planned: list[str]
    """The builder's messages about scratch memory and kernels."""


def parse(flavour: Flavour, onnx: Path) -> ParsedNetwork:
    """Parse a graph as a strongly typed network.

    Args:
        flavour: the product whose parser it is.
        onnx: the graph; its external data, if any, lies beside it.

    Raises:
        RuntimeNotAvailable: the product isn't installed.
        VerificationError: TensorRT can't take the graph; the text names the node.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.load()
    logger = _logger(flavour)
    warnings, planned = list[str](), list[str]()
    logger.warnings, logger.planned = warnings, planned
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        text = "; ".join(f"node {error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors)
        reasons = " ".join((text or "; ".join(warnings)).split())
        raise VerificationError(f"{onnx}: TensorRT can't parse it: {reasons}")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as its base class
            assert isinstance(layer, trt.IAttentionInputLayer)
            # There is no kernel for every size in every type, none for fp32: what has none may be taken apart.
            layer.attention.decomposable = True
    return ParsedNetwork(flavour, builder, network, parser, warnings, planned)


def warnings_that_matter(warnings: list[str]) -> list[str]:
    """Return the warnings that aren't known to be harmless, each once."""
    return [text for text in dict.fromkeys(warnings) if not any(part in text for part in HARMLESS)]


@cache
def _logger(flavour: Flavour) -> Any:
    """Make one logger, because TensorRT keeps the first logger that it sees for the whole process."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.load()

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: list[str] = []
            self.planned: list[str] = []

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.warnings.append(message)
            elif message.startswith(PLANNED):
                self.planned.append(message)

    return Logger()
