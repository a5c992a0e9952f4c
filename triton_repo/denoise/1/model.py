"""The ensemble's heart: owns the warping network and the UNet and runs the denoising loop."""

from icportrait.batching import Batcher
from icportrait.sampling import NoiseSchedule
from icportrait.serving import DenoiseStage
from icportrait.triton_backend import DenoiseModel, ModelContext


class TritonPythonModel(DenoiseModel):
    """Runs ``DenoiseStage``; answers leave as their requests end."""

    def load(self, context: ModelContext) -> DenoiseStage:
        schedule = NoiseSchedule.from_config(context.manifest.scheduler_config)
        mode = context.policy.batching
        return DenoiseStage(Batcher(context.slots(), schedule, context.manifest.preset, mode))
