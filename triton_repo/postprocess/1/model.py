"""Last step of the standalone pipeline: pixels to encoded pictures, and the metadata."""

from icportrait.errors import to_caller
from icportrait.serving.stages import PostprocessStage
from icportrait.serving.triton_models import ModelContext, StageModel


class TritonPythonModel(StageModel):
    """Runs ``PostprocessStage`` on one request at a time."""

    error_text = staticmethod(to_caller)

    def load(self, context: ModelContext) -> PostprocessStage:
        return PostprocessStage(context.manifest, context.policy)
