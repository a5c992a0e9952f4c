"""What a request may ask for beside its two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class PortraitOptions(TypedDict, total=False):
    """The keyword arguments that ``PortraitClient.generate`` and ``PortraitClient.stream`` share.

    What is left out or None isn't sent, and the server's default holds; ``icportrait generate --help`` lists ranges and
    defaults.
    """

    seed: int | None
    """The same seed with the same pictures and options gives the same portraits."""
    num_portraits: int | None
    """How many to draw."""
    num_inference_steps: int | None
    """Denoising steps."""
    guidance_scale: float | None
    """How strongly the pictures guide the result; 1 is without guidance."""
    mask_ratio: float | None
    """Share of the reference that is hidden from the model."""
    scheduler: str | None
    """The sampler."""
    priority: int | None
    """The request's class, 0 first."""
    deadline_ms: int | None
    """An answer later than this is worth nothing: the server then drops the request."""
    profile_box: Sequence[float] | None
    """The profile's crop, x0, y0, x1, y1 as shares of width and height; the server finds one if None."""
    reference_box: Sequence[float] | None
    """The reference's crop, likewise."""
    output_format: str | None
    """How the portraits, and their previews, are encoded."""
