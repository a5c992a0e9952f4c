"""Portraits in batches, for samples during training and for evaluation.

What ``icportrait.nn.ReferencePipeline`` makes one request at a time, for many pairs at once: row i gets the mask, the
noise and the steps that the pipeline gives a request of seed i, and so, but for rounding, its portrait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from icportrait.diffusion.masking import hide, reference_visibility
from icportrait.diffusion.randomness import canvas_noise
from icportrait.diffusion.sampling import NoiseSchedule, Trajectory, advance, guide
from icportrait.nn import Checkpoint, engine_modules
from icportrait.nn.matching import join_canvas, split_canvas
from icportrait.phases import ALL_STEPS, guided_steps
from icportrait.presets import Preset


@dataclass(frozen=True, eq=False)
class Portraits:
    """N portraits, on the CPU."""

    picture: Tensor
    """``[N, 3, S, S]`` uint8."""
    latent: Tensor
    """``[N, latent_channels, s, s]`` float32: what the pictures were decoded from."""
    visible: Tensor
    """``[N, 3, S, S]`` uint8: the references as the networks saw them."""
    flows: tuple[Tensor, ...]
    """The matches found, ``[N, s_L^2]`` int64 profile cells y * s_L + x for each level, finest first."""
    match_confidence: Tensor
    """``[N]`` float32: mean cosine similarity of the finest level's matches."""


@torch.no_grad()
def make_portraits(
    checkpoint: Checkpoint,
    profile: Tensor,
    reference: Tensor,
    seeds: Sequence[int],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] = ALL_STEPS,
    mask_ratio: float = 0.8,
    scheduler: str = "dpmpp_2m",
    known_flows: Sequence[Tensor] | None = None,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda _: None,
) -> Portraits:
    """Make a portrait of each profile's person in its reference's view and light, where the checkpoint's models are.

    Args:
        checkpoint: its models are left in the mode, training or evaluation, in which they came.
        profile: ``[N, 3, S, S]``, uint8 or floating point in -1..1, on any device.
        reference: like ``profile``, not hidden yet.
        seeds: N seeds; each decides what of its reference is hidden, and the noise.
        num_inference_steps: UNet calls per portrait, or twice as many under guidance; None takes the checkpoint's.
        guidance_scale: weight of the conditioning; None takes the checkpoint's, 1 does without guidance.
        guidance_interval: begin and end of the steps with guidance, as shares of all (``phases.guided_steps``).
        mask_ratio: share of the references that is hidden.
        scheduler: one of ``request.SCHEDULERS``.
        known_flows: warp by these and not by the matches found: ``[N, s_L^2]`` int64 for each level, finest first.
        batch_size: rows that are denoised together.
        progress: called after each step of a batch with the number of its rows: N * num_inference_steps in all.

    Raises:
        InvalidRequest: a setting is out of range.
        ValueError: pictures, seeds and checkpoint don't fit each other.
    """
    preset = checkpoint.preset
    expected = (len(seeds), 3, preset.image_size, preset.image_size)
    for name, pictures in (("profile", profile), ("reference", reference)):
        if tuple(pictures.shape) != expected:
            raise ValueError(f"{name}: {list(pictures.shape)}, expected {list(expected)}: one picture for each seed")
    guidance_scale = checkpoint.guidance_scale if guidance_scale is None else guidance_scale
    trajectory = NoiseSchedule.from_config(checkpoint.scheduler_config).trajectory(
        scheduler, num_inference_steps or checkpoint.num_inference_steps
    )
    steps = len(trajectory.timesteps)
    guided = guided_steps(guidance_scale, guidance_interval, steps)
    scales = [guidance_scale if step in guided else 1.0 for step in range(steps)]
    profile, reference = whole_levels(profile), whole_levels(reference)
    batches = []
    with _modules(checkpoint) as modules:
        for start in range(0, len(seeds), batch_size):
            rows = slice(start, start + batch_size)
            flows = None if known_flows is None else [flow[rows] for flow in known_flows]
            visible, visibility = _hidden(preset, reference[rows], mask_ratio, seeds[rows])
            canvas = _Canvas(preset, modules, profile[rows], visible, visibility, flows)
            latent = canvas.denoise(seeds[rows], trajectory, scales, progress)
            picture = modules["vae_decoder"](latent).permute(0, 3, 1, 2)
            batches.append((picture, latent, visible, canvas.match_confidence, *canvas.flows))
    picture, latent, visible, confidence, *found = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    return Portraits(picture, latent, visible, tuple(found), confidence)


@torch.no_grad()
def through_vae(
    checkpoint: Checkpoint,
    pictures: Tensor,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """Encode and decode pictures: as good as a portrait can be, since every portrait is decoded.

    Args:
        checkpoint: its models are left in the mode in which they came.
        pictures: ``[N, 3, S, S]``, uint8 or floating point in -1..1.
        batch_size: pictures at a time.
        progress: called after each batch with the number of its pictures.

    Returns:
        ``[N, 3, S, S]`` uint8, on the CPU.
    """
    with _modules(checkpoint) as modules:
        coded = []
        for batch in torch.split(whole_levels(pictures), batch_size):
            coded.append(modules["vae_decoder"](_encode(modules, batch)).cpu())
            progress(len(batch))
    return torch.cat(coded).permute(0, 3, 1, 2)


def whole_levels(pictures: Tensor) -> Tensor:
    """Round pictures of floating point in -1..1 to uint8; uint8 is returned as it is."""
    if pictures.dtype == torch.uint8:
        return pictures
    return ((pictures.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


class _Canvas:
    """B canvases: what the pictures alone decide is worked out once, then they are denoised together."""

    def __init__(
        self,
        preset: Preset,
        modules: dict[str, nn.Module],
        profile: Tensor,
        visible: Tensor,
        visibility: Tensor,
        known_flows: list[Tensor] | None,
    ) -> None:
        self.preset, self.modules = preset, modules
        self.profile = _encode(modules, profile)
        reference, device = _encode(modules, visible), self.profile.device
        flows = None if known_flows is None else [flow.to(device) for flow in known_flows]
        outputs = modules["warping_network"](self.profile, reference, visibility.to(device), flows)
        residuals = len(preset.residuals)
        self.f_ref, self.match_confidence = outputs[:residuals], outputs[-1]
        self.flows = [flow.flatten(1).long() for flow in outputs[residuals:-1]]

    def denoise(
        self,
        seeds: Sequence[int],
        trajectory: Trajectory,
        guidance_scales: Sequence[float],
        progress: Callable[[int], object],
    ) -> Tensor:
        """Denoise the portraits' latents, ``[B, latent_channels, s, s]``."""
        device = self.profile.device
        noise = torch.from_numpy(np.stack([canvas_noise(self.preset, seed) for seed in seeds])).to(device)
        coefficients = torch.tensor(trajectory.coefficients, device=device)
        profile_noise, _ = split_canvas(noise)
        canvas = trajectory.initial_scale * noise
        history = torch.zeros_like(canvas)
        for step, (timestep, scale) in enumerate(zip(trajectory.timesteps.tolist(), guidance_scales, strict=True)):
            held = (
                float(trajectory.signal_level[step]) * self.profile
                + float(trajectory.noise_level[step]) * profile_noise
            )
            canvas = join_canvas(held, split_canvas(canvas)[1])
            prediction = self._predict(canvas, torch.full((len(canvas),), timestep, device=device), scale)
            canvas, history = advance(canvas, prediction, history, coefficients[step].expand(len(canvas), -1))
            progress(len(canvas))
        return split_canvas(canvas)[1]

    def _predict(self, canvas: Tensor, timestep: Tensor, guidance_scale: float) -> Tensor:
        unet = self.modules["unet"]
        conditional: Tensor = unet(canvas, timestep, *self.f_ref)
        if guidance_scale == 1:
            return conditional
        unconditional = unet(canvas, timestep, *(torch.zeros_like(residual) for residual in self.f_ref))
        guided: Tensor = guide(conditional, unconditional, guidance_scale)
        return guided


def _hidden(preset: Preset, reference: Tensor, mask_ratio: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Fill references' hidden cells, ``[B, 3, S, S]`` uint8, and return the visibility ``[B, 1, s, s]`` too."""
    visibility = [reference_visibility(preset, mask_ratio, seed) for seed in seeds]
    pixels = reference.permute(0, 2, 3, 1).cpu().numpy()
    visible = np.stack([hide(picture, seen) for picture, seen in zip(pixels, visibility, strict=True)])
    return torch.from_numpy(visible).permute(0, 3, 1, 2), torch.from_numpy(np.concatenate(visibility))


def _encode(modules: dict[str, nn.Module], pictures: Tensor) -> Tensor:
    """Encode pictures ``[B, 3, S, S]`` uint8 as latents, on the models' device."""
    encoder = modules["vae_encoder"]
    latent: Tensor = encoder(pictures.permute(0, 2, 3, 1).to(next(encoder.parameters()).device))
    return latent


@contextmanager
def _modules(checkpoint: Checkpoint) -> Iterator[dict[str, nn.Module]]:
    """Yield the engine modules in evaluation mode. The modules that trained before train on afterwards."""
    training = {module for model in checkpoint.models for module in model.modules() if module.training}
    try:
        device = next(checkpoint.unet.parameters()).device
        yield {name: module.to(device) for name, module in engine_modules(checkpoint).items()}
    finally:
        for module in training:
            module.training = True
