"""The ensemble's heart: owns the warping network and the UNet and runs the denoising loop."""

from icportrait.admission import Limits
from icportrait.denoise_stage import DenoiseStage
from icportrait.sampling import NoiseSchedule
from icportrait.triton_backend import DenoiseModel, ModelContext, give_up


class TritonPythonModel(DenoiseModel):
    """Runs ``DenoiseStage``; answers leave as their requests end."""

    def load(self, context: ModelContext) -> DenoiseStage:
        schedule, policy = NoiseSchedule.from_config(context.manifest.scheduler_config), context.policy
        limits = Limits(policy.max_queued_slots, policy.max_queued_bytes)
        return DenoiseStage(context.slots(), schedule, context.manifest.preset, policy.batching, limits, give_up)
