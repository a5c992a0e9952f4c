"""The first minutes on a GPU: probes that tell the most in the least time (docs/gpu-first-session.md)."""
