"""The peer's unet: a model of its own, called at every step."""

from collections.abc import Callable

from icportrait.contract import Tensors
from icportrait.serving.triton_models import EngineModel, ModelContext


class TritonPythonModel(EngineModel):
    """Runs the ``unet`` engine on the requests that Triton batched."""

    def load(self, context: ModelContext) -> Callable[..., Tensors]:
        return context.engine("unet").run
