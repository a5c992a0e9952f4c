"""The VAE encoder: pixels to latents, batched across callers; what returns is not encoded again."""

from icportrait.row_cache import RowCache, triton_counters
from icportrait.triton_backend import EngineModel, ModelContext


class TritonPythonModel(EngineModel):
    """Runs the ``vae_encoder`` engine on the requests that Triton batched."""

    takes_partitions = True

    def load(self, context: ModelContext):
        policy = context.policy
        return RowCache(context.engine("vae_encoder"), policy.cache_bytes, triton_counters(), policy.cache_s)
