"""Last step of the ensemble: pixels to encoded pictures, and the metadata."""

from icportrait.serving import PostprocessStage
from icportrait.triton_backend import ModelContext, StageModel


class TritonPythonModel(StageModel):
    """Runs ``PostprocessStage`` on one request at a time."""

    def load(self, context: ModelContext) -> PostprocessStage:
        return PostprocessStage(context.manifest, context.policy)
