"""Checkpoint to verified ONNX: ``python -m export``."""
