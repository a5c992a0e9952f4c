"""The events of a request: progress, previews, and portraits at its end."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icportrait_client.errors import ServerError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Versions:
    """The model that made a portrait.

    >>> client.generate(profile=profile, reference=reference).metadata.versions.preset
    'fake-64'
    """

    preset: str = ""
    precision: str = ""
    model_version: str = ""
    weights: str = ""
    """``checkpoint``, or ``random`` where the weights show no more than that the path works."""
    engine: str = ""


@dataclass(frozen=True)
class Crop:
    """The part of a picture that the server used.

    >>> client.generate(profile=profile, reference=reference).metadata.crops["profile"].source
    'centre'
    """

    box: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)
    """x0, y0, x1, y1 as shares of the upright picture's width and height."""
    source: str = ""
    """``given``, ``face`` or ``centre``."""
    face: Mapping[str, Any] | None = None
    """The found face's ``box``, its ``score``, and ``largest_of``, the number of faces."""


@dataclass(frozen=True)
class Metadata:
    """The server's report on a request; times are in milliseconds.

    A field that the server left out has its default, and ``raw`` has everything.

    >>> metadata = client.generate(profile=profile, reference=reference, seed=7).metadata
    >>> metadata.seed, metadata.steps, metadata.scheduler
    (7, 20, 'dpmpp_2m')
    """

    raw: dict[str, Any] = field(repr=False)
    """The server's own words, also of fields that this version of the client doesn't know."""
    seed: int = 0
    num_portraits: int = 1
    steps: int = 0
    scheduler: str = ""
    guidance_scale: float = 0.0
    guidance_interval: tuple[float, ...] = ()
    mask_ratio: float = 0.0
    size: tuple[int, ...] = ()
    output_format: str = ""
    crops: Mapping[str, Crop] = field(default_factory=dict)
    match_confidence: float = 0.0
    """Mean of the best cosine similarity of every position, -1..1."""
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    queue_ms: float = 0.0
    encode_ms: float = 0.0
    warp_ms: float = 0.0
    engine_ms: float = 0.0
    rows_shared: float = 0.0
    numerics_id: str | None = None
    """Equal ids promise equal bytes for equal requests; None promises nothing."""
    versions: Versions = field(default_factory=Versions)
    simulated: bool = False
    c2pa: Mapping[str, Any] | None = None

    @property
    def total_ms(self) -> float:
        """Return the time of all stages and of the wait before them."""
        return sum(self.stage_ms.values()) + self.queue_ms

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Metadata:
        """Read the server's report.

        Raises:
            ServerError: a value has another type than this version of the client knows.
        """
        try:
            known = {name: raw[name] for name in _METADATA if name in raw}
            for name in ("seed", "num_portraits", "steps"):
                if not isinstance(known.get(name, 0), int):
                    raise TypeError(f"{name} is {known[name]!r}")
                float(known.get(name, 0))
            for name in ("queue_ms", "engine_ms", "match_confidence"):
                if name in known:
                    known[name] = float(known[name])
            for name in ("size", "guidance_interval"):
                if name in known:
                    known[name] = tuple(known[name])
            if "stage_ms" in known:
                known["stage_ms"] = {stage: float(value) for stage, value in known["stage_ms"].items()}
            if "crops" in known:
                known["crops"] = {
                    name: Crop(tuple(crop["box"]), crop["source"], crop.get("face"))
                    for name, crop in known["crops"].items()
                }
            if "versions" in known:
                known["versions"] = Versions(**{name: known["versions"].get(name, "") for name in _VERSIONS})
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ServerError(f"the answer's metadata can't be read ({error})") from None
        return cls(raw, **known)


_METADATA = tuple(each.name for each in fields(Metadata) if each.name != "raw")
_VERSIONS = tuple(each.name for each in fields(Versions))


class _Pictures:
    """Decoding and saving of one or several encoded pictures."""

    files: tuple[bytes, ...]

    @property
    def bytes(self) -> bytes:
        """Return the first picture's file."""
        return self.files[0]

    @property
    def image(self) -> Image.Image:
        """Decode the first picture."""
        return _decoded(self.files[0])

    @property
    def images(self) -> list[Image.Image]:
        """Decode every picture."""
        return [_decoded(data) for data in self.files]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the pictures as they came, in their ``output_format`` whatever the path's suffix says.

        Args:
            path: where one picture goes; several go beside it, numbered: ``anna.png`` makes ``anna-1.png``,
                ``anna-2.png``.

        Returns:
            The files written, in the order of ``files``.

        Raises:
            OSError: a file can't be written.
        """
        path = Path(path)
        paths = [path] * len(self.files)
        if len(paths) > 1:
            paths = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, len(paths) + 1)]
        for each, data in zip(paths, self.files, strict=True):
            each.write_bytes(data)
        return paths


@dataclass(frozen=True)
class Progress:
    """A step that is done.

    >>> from icportrait_client import Progress
    >>> events = client.stream(profile=profile, reference=reference, num_inference_steps=3)
    >>> [event.step for event in events if isinstance(event, Progress)]
    [1, 2, 3]
    """

    step: int
    total_steps: int


@dataclass(frozen=True)
class Preview(_Pictures, Progress):
    """A step that is done, and what the portraits look like by now, without their noise.

    >>> from icportrait_client import Preview
    >>> events = client.stream(profile=profile, reference=reference, num_inference_steps=4, preview_every=2)
    >>> [(event.step, event.image.size) for event in events if isinstance(event, Preview)]
    [(2, (64, 64))]
    """

    files: tuple[bytes, ...] = field(default=(), repr=False)
    """A picture for each portrait, in the request's ``output_format``."""


@dataclass(frozen=True)
class Portrait(_Pictures):
    """The answer to a request: one portrait, or as many as ``num_portraits`` asked for.

    ``bytes`` and ``image`` are the first; ``files`` and ``images`` are all.

    >>> portrait = client.generate(profile=profile, reference=reference, seed=7)
    >>> portrait.image.size
    (64, 64)
    >>> portrait.save(folder / "out.png")[0].name
    'out.png'
    """

    files: tuple[bytes, ...] = field(repr=False)
    """Encoded pictures in the request's ``output_format``."""
    metadata: Metadata


def _decoded(data: bytes) -> Image.Image:
    from PIL import Image

    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture
