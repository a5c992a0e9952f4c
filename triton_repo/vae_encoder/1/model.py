"""The VAE encoder: pixels to latents, batched across callers; what returns is not encoded again."""

from icportrait.serving.counters import CACHE_COUNTERS, HITS, MISSES, triton_counters
from icportrait.serving.encoder_cache import RowCache
from icportrait.serving.triton_models import EngineModel, ModelContext


class TritonPythonModel(EngineModel):
    """Runs the ``vae_encoder`` engine on the requests that Triton batched."""

    takes_partitions = True

    def load(self, context: ModelContext):
        policy, counters = context.policy, triton_counters(CACHE_COUNTERS)

        def count(hits: int, misses: int) -> None:
            counters[HITS](hits)
            counters[MISSES](misses)

        return RowCache(context.engine("vae_encoder"), policy.cache_bytes, count, policy.cache_s)
