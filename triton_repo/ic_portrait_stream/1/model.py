"""The public streaming model: like ``ic_portrait``, with progress and previews before the portraits."""

from icportrait.front import FrontModel


class TritonPythonModel(FrontModel):
    """Forwards to the ensemble; see ``FrontModel``."""

    is_stream = True
