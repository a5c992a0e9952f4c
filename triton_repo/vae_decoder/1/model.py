"""The VAE decoder: latents to pixels, batched across callers."""

from icportrait.serving.triton_models import EngineModel, ModelContext


class TritonPythonModel(EngineModel):
    """Runs the ``vae_decoder`` engine on the requests that Triton batched."""

    def load(self, context: ModelContext):
        return context.engine("vae_decoder").run
