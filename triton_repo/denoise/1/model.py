"""The pipeline's heart: owns the warping network and the UNet and runs the denoising loop."""

from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.serving.admission import Limits
from icportrait.serving.denoise import DenoiseStage
from icportrait.serving.numerics import numerics_id
from icportrait.serving.triton_loop import DenoiseModel
from icportrait.serving.triton_models import ModelContext, give_up


class TritonPythonModel(DenoiseModel):
    """Runs ``DenoiseStage``; answers leave as their requests end."""

    def load(self, context: ModelContext) -> DenoiseStage:
        slots, policy, manifest = context.slots(), context.policy, context.manifest
        return DenoiseStage(
            slots,
            NoiseSchedule.from_config(manifest.scheduler_config),
            manifest.preset,
            policy.batching,
            Limits(policy.max_queued_slots, policy.max_queued_bytes),
            give_up,
            is_standalone=context.loop_path is None,
            numerics_id=numerics_id(context.directory.parents[1], manifest, policy, slots.version),
        )
