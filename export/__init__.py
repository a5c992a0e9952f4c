"""Checkpoint to verified ONNX: ``python -m export``."""

import icportrait  # noqa: F401  (before ONNX Runtime, which it keeps from reporting)
