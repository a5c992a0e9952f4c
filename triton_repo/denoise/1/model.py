"""The ensemble's heart: owns the warping network and the UNet and runs the denoising loop."""

from icportrait.batching import WholeBatcher
from icportrait.sampling import NoiseSchedule
from icportrait.serving import DenoiseStage
from icportrait.triton_backend import DenoiseModel, ModelContext


class TritonPythonModel(DenoiseModel):
    """Runs ``DenoiseStage``; answers leave as their requests end."""

    def load(self, context: ModelContext) -> DenoiseStage:
        batcher = WholeBatcher(
            context.engine("warping_network"),
            context.engine("unet"),
            NoiseSchedule.from_config(context.manifest.scheduler_config),
            context.manifest.preset,
            context.policy.slots,
        )
        return DenoiseStage(batcher)
