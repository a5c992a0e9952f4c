"""The pipeline's heart: owns the warping network and the UNet and runs the denoising loop."""

from icportrait.admission import Limits
from icportrait.denoise_stage import DenoiseStage
from icportrait.numerics import numerics_id
from icportrait.sampling import NoiseSchedule
from icportrait.triton_backend import DenoiseModel, ModelContext, give_up


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
