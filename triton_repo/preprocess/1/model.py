"""First step of the ensemble: encoded pictures to pixels, and the mask over the reference."""

from icportrait.serving import PreprocessStage
from icportrait.triton_backend import ModelContext, StageModel


class TritonPythonModel(StageModel):
    """Runs ``PreprocessStage`` on one request at a time."""

    def load(self, context: ModelContext) -> PreprocessStage:
        return PreprocessStage(context.manifest.preset)
