"""The public streaming model: like ``ic_portrait``, for callers on a stream."""

from icportrait.triton_backend import FrontModel


class TritonPythonModel(FrontModel):
    """Forwards to the ensemble; see ``FrontModel``."""
