"""The reference implementation: one request, step by step, in plain PyTorch.

Every other way of making portraits is compared with this one, so it is written to be read: no batching of portraits,
no reuse between requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from icportrait.contract import engine_specs
from icportrait.diffusion.masking import hide, reference_visibility
from icportrait.diffusion.randomness import canvas_noise
from icportrait.diffusion.sampling import NoiseSchedule, Trajectory, advance, guide
from icportrait.nn.checkpoint import Checkpoint
from icportrait.nn.engine_modules import engine_modules
from icportrait.nn.matching import join_canvas, split_canvas
from icportrait.phases import ALL_STEPS, guided_steps
from icportrait.presets import Preset


@dataclass(frozen=True, eq=False)
class ReferenceResult:
    """n portraits of one request."""

    portraits: NDArray[np.uint8]
    """[n, S, S, 3] uint8."""
    latents: NDArray[np.float32]
    """[n, latent_channels, s, s] float32: what the portraits were decoded from."""
    flow: NDArray[np.int32]
    """[s, s] int32: for each latent cell of the reference, the cell y * s + x of the profile that fits it best."""
    match_confidence: float
    """Mean cosine similarity of those pairs."""
    visible_pixels: NDArray[np.uint8]
    """[S, S, 3] uint8: the reference as the networks saw it."""


class ReferencePipeline:
    """Runs four engine modules: a checkpoint's (``of``), or anything that computes what they do."""

    def __init__(
        self,
        preset: Preset,
        scheduler_config: Mapping[str, Any],
        modules: Mapping[str, nn.Module],
        *,
        guidance_scale: float,
        num_inference_steps: int,
        device: str = "cpu",
    ) -> None:
        """Hold what makes portraits.

        Args:
            preset: the model's geometry.
            scheduler_config: diffusers' description of the noise schedule.
            modules: by the names of ``contract.ENGINES``, on ``device``.
            guidance_scale: weight of the conditioning where a call doesn't say.
            num_inference_steps: UNet calls per portrait where a call doesn't say.
            device: where the tensors are made.
        """
        self.preset = preset
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps
        self.spec = engine_specs(preset)["vae_encoder"]
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.modules = dict(modules)
        self.device = device

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: str = "cpu") -> ReferencePipeline:
        """Make a checkpoint's pipeline, and move the checkpoint's models to ``device``."""
        return cls(
            checkpoint.preset,
            checkpoint.scheduler_config,
            {name: module.to(device) for name, module in engine_modules(checkpoint).items()},
            guidance_scale=checkpoint.guidance_scale,
            num_inference_steps=checkpoint.num_inference_steps,
            device=device,
        )

    @torch.inference_mode()
    def __call__(
        self,
        profile_pixels: NDArray[np.uint8],
        reference_pixels: NDArray[np.uint8],
        *,
        seed: int,
        num_portraits: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = ALL_STEPS,
        mask_ratio: float = 0.8,
        scheduler: str = "dpmpp_2m",
    ) -> ReferenceResult:
        """Make portraits of the profile's person in the reference's view and light.

        Args:
            profile_pixels: [S, S, 3] uint8.
            reference_pixels: [S, S, 3] uint8, not hidden yet.
            seed: decides what is hidden, and the noise; portrait i draws its noise from ``seed + i``.
            num_portraits: how many portraits to make.
            num_inference_steps: UNet calls per portrait; None takes the checkpoint's.
            guidance_scale: weight of the conditioning; None takes the checkpoint's, 1 does without guidance.
            guidance_interval: begin and end of the steps with guidance, as shares of all (``phases.guided_steps``).
            mask_ratio: share of the reference that is hidden.
            scheduler: one of ``request.SCHEDULERS``.

        Raises:
            InvalidRequest: an argument is out of range or a picture isn't [S, S, 3] uint8.
        """
        for pixels in (profile_pixels, reference_pixels):
            self.spec.check_inputs({"pixels": pixels[np.newaxis]})
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        trajectory = self.schedule.trajectory(scheduler, num_inference_steps or self.num_inference_steps)
        steps = len(trajectory.timesteps)
        guided = guided_steps(guidance_scale, guidance_interval, steps)
        scales = [guidance_scale if step in guided else 1.0 for step in range(steps)]

        visibility = reference_visibility(self.preset, mask_ratio, seed)
        visible_pixels = hide(reference_pixels, visibility)
        profile = self._encode(profile_pixels)
        reference = self._encode(visible_pixels)
        outputs = self.modules["warping_network"](profile, reference, self._tensor(visibility))
        residuals = len(self.preset.residuals)
        f_ref, finest_flow, match_confidence = outputs[:residuals], outputs[residuals], outputs[-1]

        latents = []
        for portrait in range(num_portraits):
            noise = self._tensor(canvas_noise(self.preset, seed + portrait)).unsqueeze(0)
            latents.append(self._denoise(noise, profile, f_ref, trajectory, scales))
        portraits = [self.modules["vae_decoder"](latent) for latent in latents]
        return ReferenceResult(
            portraits=torch.cat(portraits).cpu().numpy(),
            latents=torch.cat(latents).cpu().numpy(),
            flow=finest_flow[0].cpu().numpy(),
            match_confidence=match_confidence.item(),
            visible_pixels=visible_pixels,
        )

    def _denoise(
        self,
        noise: Tensor,
        profile: Tensor,
        f_ref: tuple[Tensor, ...],
        trajectory: Trajectory,
        guidance_scales: Sequence[float],
    ) -> Tensor:
        """Denoise one canvas [1, latent_channels, s, 2 s] and return its right half, the portrait's latent."""
        profile_noise, _ = split_canvas(noise)
        canvas = trajectory.initial_scale * noise
        history = torch.zeros_like(canvas)
        for step in range(len(trajectory.timesteps)):
            # The left half is known at every noise level; what the sampler made of it is overwritten.
            held = float(trajectory.signal_level[step]) * profile + float(trajectory.noise_level[step]) * profile_noise
            _, portrait = split_canvas(canvas)
            canvas = join_canvas(held, portrait)
            prediction = self._predict(canvas, trajectory.timesteps[step], f_ref, guidance_scales[step])
            canvas, history = advance(
                canvas, prediction, history, self._tensor(trajectory.coefficients[step : step + 1])
            )
        _, portrait = split_canvas(canvas)
        return portrait

    def _predict(
        self, canvas: Tensor, timestep: np.float32, f_ref: tuple[Tensor, ...], guidance_scale: float
    ) -> Tensor:
        """Predict with the UNet under guidance. The unconditional row sees the same canvas but no ``F_ref``."""
        unet, time = self.modules["unet"], self._tensor(np.array([timestep], dtype=np.float32))
        conditional: Tensor = unet(canvas, time, *f_ref)
        if guidance_scale == 1:
            return conditional
        unconditional: Tensor = unet(canvas, time, *(torch.zeros_like(residual) for residual in f_ref))
        guided: Tensor = guide(conditional, unconditional, guidance_scale)
        return guided

    def _encode(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Encode a picture [S, S, 3] uint8 as its latent [1, latent_channels, s, s]."""
        latent: Tensor = self.modules["vae_encoder"](self._tensor(pixels[np.newaxis]))
        return latent

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.tensor(array, device=self.device)
