"""The public unary model: one request in, one answer out, any number of requests at once."""

from icportrait.front import FrontModel


class TritonPythonModel(FrontModel):
    """Forwards to the ensemble; see ``FrontModel``."""
