"""TensorRT and TensorRT-RTX: plans, their engines, and the slots in an engine's own buffers."""
