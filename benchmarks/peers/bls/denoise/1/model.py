"""A peer of the denoising loop, in the design of Triton's own Stable Diffusion tutorial: one BLS call a step.

Each request has a loop of its own. The loop asks Triton to run the UNet at every step, and sends the canvas and all of
``F_ref`` with each call. Triton batches calls that come at the same moment.
"""

import json
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from icportrait.contract import Array, Tensors, bytes_tensor, engine_specs
from icportrait.diffusion.randomness import canvas_noise
from icportrait.diffusion.sampling import NoiseSchedule, advance, guide
from icportrait.request import PortraitRequest
from icportrait.serving.triton_models import ModelContext, respond


class TritonPythonModel:
    """Answers one request at a time, as a BLS loop does in an instance of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the checkpoint's schedule."""
        self._context = ModelContext(args)
        self._manifest = self._context.manifest
        self._schedule = NoiseSchedule.from_config(self._manifest.scheduler_config)
        preset, precision = self._manifest.preset, self._manifest.precision
        self._specs = engine_specs(preset, precision)
        self._residuals = [tensor.name for tensor in self._specs["unet"].inputs[2:]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Denoise each request's portraits."""
        return [respond(self._denoise(self._context.inputs(request))) for request in requests]

    def _denoise(self, tensors: Tensors) -> Tensors:
        arrived_ns = time.monotonic_ns()
        request = PortraitRequest.from_json(tensors.pop("request")[0])
        profile = tensors["profile_latent"]
        conditioning = self._call("warping_network", tensors)
        conditioned_ns = time.monotonic_ns()
        f_ref = {name: conditioning[name] for name in self._residuals}
        none = {name: np.zeros_like(residual) for name, residual in f_ref.items()}
        latents = [self._portrait(request, index, profile, f_ref, none) for index in range(request.num_portraits)]
        denoised_ns = time.monotonic_ns()
        report = {
            "arrived_ns": arrived_ns,
            "joined_ns": arrived_ns,
            "conditioned_ns": conditioned_ns,
            "denoised_ns": denoised_ns,
            "match_confidence": conditioning["match_confidence"].item(),
            "engine": "bls",
            "numerics_id": None,
            "warp_ms": (conditioned_ns - arrived_ns) / 1e6,
            "rows_shared": 1.0,
            "engine_ms": (denoised_ns - conditioned_ns) / 1e6,
        }
        return {
            "portrait_latent": np.concatenate(latents),
            "denoise_report": bytes_tensor(json.dumps(report).encode()),
        }

    def _portrait(self, request: PortraitRequest, index: int, profile: Array, f_ref: Tensors, none: Tensors) -> Array:
        """Denoise one portrait; ``icportrait.nn.pipeline`` has the formulas."""
        trajectory = self._schedule.trajectory(request.scheduler, request.num_inference_steps)
        noise = canvas_noise(self._manifest.preset, request.seed + index)[np.newaxis]
        half = noise.shape[-1] // 2
        canvas = trajectory.initial_scale * noise
        history = np.zeros_like(canvas)
        for step, timestep in enumerate(trajectory.timesteps):
            held = trajectory.signal_level[step] * profile + trajectory.noise_level[step] * noise[..., :half]
            canvas = np.concatenate([held, canvas[..., half:]], axis=-1).astype(np.float32)
            inputs = {"canvas_latent": canvas, "timestep": np.array([[timestep]], np.float32)}
            output = self._call("unet", inputs | f_ref)["noise_pred"]
            if step in request.guided_steps:
                unconditional = self._call("unet", inputs | none)["noise_pred"]
                output = guide(output, unconditional, request.guidance_scale)
            canvas, history = advance(canvas, output, history, trajectory.coefficients[step : step + 1])
        return np.ascontiguousarray(canvas[..., half:], np.float32)

    def _call(self, model: str, tensors: Tensors) -> Tensors:
        """Run a model by BLS."""
        call = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[tensor.name for tensor in self._specs[model].outputs],
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()],
        )
        response = call.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
