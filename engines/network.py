"""ONNX files through TensorRT's own parser."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from icportrait.errors import VerificationError


@dataclass
class ParsedNetwork:
    """A network and what it can't live without."""

    trt: Any
    """The product's module."""
    builder: Any
    network: Any
    parser: Any
    warnings: list[str]
    """What TensorRT has warned of since parsing began."""


def parse(trt: Any, onnx: Path) -> ParsedNetwork:
    """Parse a graph as a strongly typed network.

    Args:
        trt: ``Flavour.load()``.
        onnx: the graph; its external data, if any, lies beside it.

    Raises:
        VerificationError: TensorRT can't take the graph; the text names the node.
    """
    logger = _logger(trt)
    warnings: list[str] = []
    logger.warnings = warnings
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        text = "; ".join(f"node {error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors)
        raise VerificationError(f"{onnx}: TensorRT can't parse it: {text or '; '.join(warnings)}")
    return ParsedNetwork(trt, builder, network, parser, warnings)


@cache
def _logger(trt: Any) -> Any:
    """TensorRT keeps the first logger that it sees for the whole process."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.warnings.append(message)

    return Logger()
