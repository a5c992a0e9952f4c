"""The model in torch: networks, checkpoints, and the pipeline that every other way of running it is compared with."""

from icportrait.nn.adaptation import from_stable_diffusion
from icportrait.nn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from icportrait.nn.engine_modules import engine_modules
from icportrait.nn.pipeline import ReferencePipeline, ReferenceResult
from icportrait.nn.random_weights import random_checkpoint
from icportrait.nn.warping import WarpingNetwork

__all__ = [
    "Checkpoint",
    "ReferencePipeline",
    "ReferenceResult",
    "WarpingNetwork",
    "engine_modules",
    "from_stable_diffusion",
    "load_checkpoint",
    "random_checkpoint",
    "save_checkpoint",
]
