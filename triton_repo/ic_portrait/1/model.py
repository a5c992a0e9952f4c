"""The public unary model: one request in, one answer out, any number of requests at once."""

from icportrait.triton_backend import FrontModel


class TritonPythonModel(FrontModel):
    """Forwards to the ensemble; see ``FrontModel``."""
