"""The VAE encoder: pixels to latents, batched across callers."""

from icportrait.triton_backend import EngineModel, ModelContext


class TritonPythonModel(EngineModel):
    """Runs the ``vae_encoder`` engine on the requests that Triton batched."""

    def load(self, context: ModelContext):
        return context.engine("vae_encoder").run
