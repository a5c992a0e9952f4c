"""The arguments of a request: two pictures, and the options beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from icportrait_client.pictures import PictureSource


class PortraitOptions(TypedDict, total=False):
    """The keyword arguments that ``generate``, ``stream``, ``submit`` and ``map`` share.

    An option that is left out or None isn't sent, and the server's default holds; a seed is drawn.
    ``icportrait generate --help`` lists ranges and defaults.

    >>> options: PortraitOptions = {"seed": 7, "num_inference_steps": 4}
    >>> client.generate(profile=profile, reference=reference, **options).metadata.steps
    4
    """

    seed: int | None
    """The same seed with the same pictures and options gives the same portraits."""
    num_portraits: int | None
    """Number of portraits to draw."""
    num_inference_steps: int | None
    """Denoising steps."""
    guidance_scale: float | None
    """Strength with which the pictures guide the result; 1 is without guidance."""
    guidance_interval: Sequence[float] | None
    """Begin and end of the steps with guidance, as shares of all steps; a step outside costs half as much."""
    mask_ratio: float | None
    """Share of the reference that is hidden from the model."""
    scheduler: str | None
    """The sampler."""
    priority: int | None
    """The request's class, 0 first."""
    deadline_ms: int | None
    """An answer later than this is worth nothing: the server then drops the request. Counted from the call, over all
    attempts."""
    profile_box: Sequence[float] | None
    """The profile's crop, x0, y0, x1, y1 as shares of width and height; the server finds one if None."""
    reference_box: Sequence[float] | None
    """The reference's crop, in the form of ``profile_box``."""
    output_format: str | None
    """Format of the portraits and of their previews."""


class _Pictures(TypedDict):
    profile: PictureSource
    """The person."""
    reference: PictureSource
    """The view and the light."""


class PortraitRequest(PortraitOptions, _Pictures):
    """One of the requests that ``map`` takes: the keyword arguments of ``generate``.

    >>> requests: list[PortraitRequest] = [
    ...     {"profile": profile, "reference": reference, "seed": seed} for seed in (1, 2)
    ... ]
    >>> [portrait.metadata.seed for portrait in client.map(requests)]
    [1, 2]
    """
