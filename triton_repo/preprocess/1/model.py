"""First step of the standalone pipeline: options checked, pictures to pixels, and the mask over the reference."""

from icportrait.errors import to_caller
from icportrait.serving.stages import StandalonePreprocessStage
from icportrait.serving.triton_models import ModelContext, StageModel


class TritonPythonModel(StageModel):
    """Runs ``StandalonePreprocessStage`` on one request at a time."""

    error_text = staticmethod(to_caller)

    def load(self, context: ModelContext) -> StandalonePreprocessStage:
        return StandalonePreprocessStage(context.manifest, context.policy)
