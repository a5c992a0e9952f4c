"""The peer's warping_network: a model of its own, called at a request's begin."""

from collections.abc import Callable

from icportrait.contract import Tensors
from icportrait.serving.triton_models import EngineModel, ModelContext


class TritonPythonModel(EngineModel):
    """Runs the ``warping_network`` engine on the requests that Triton batched."""

    def load(self, context: ModelContext) -> Callable[..., Tensors]:
        return context.engine("warping_network").run
