"""What a request gives back."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from icportrait_client.errors import InvalidRequest


@dataclass(frozen=True)
class Portraits:
    """The portraits of one request."""

    images: tuple[bytes, ...] = field(repr=False)
    """Encoded pictures in the request's ``output_format``."""
    metadata: dict[str, Any]
    """What the server did: seed, steps, scheduler, guidance_scale, mask_ratio, size, crops, match_confidence,
    stage_ms, versions."""

    def picture(self, i: int = 0) -> Image.Image:
        """Portrait ``i``, decoded.

        Raises:
            InvalidRequest: there is no such portrait.
        """
        if not 0 <= i < len(self.images):
            raise InvalidRequest(f"portrait: {i}, expected 0..{len(self.images) - 1}")
        picture = Image.open(io.BytesIO(self.images[i]))
        picture.load()
        return picture

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the portraits as they came, in their ``output_format`` whatever the path's suffix says.

        Args:
            path: where one portrait goes; several go beside it, numbered: ``anna.png`` makes ``anna-1.png``,
                ``anna-2.png``.

        Returns:
            The files written, in the order of ``images``.

        Raises:
            OSError: a file can't be written.
        """
        return _save(self.images, Path(path))


@dataclass(frozen=True)
class Progress:
    """How far a request is, after each of its steps."""

    step: int
    total_steps: int
    previews: tuple[bytes, ...] = field(default=(), repr=False)
    """What the portraits look like by now, encoded as they will be; empty at a step without a preview."""
    portraits: Portraits | None = None
    """The answer; None in all but the last."""

    def save_previews(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the previews, several numbered as by ``Portraits.save``.

        Args:
            path: where one preview goes.

        Returns:
            The files written; none at a step without a preview.

        Raises:
            OSError: a file can't be written.
        """
        return _save(self.previews, Path(path))


def _save(images: tuple[bytes, ...], path: Path) -> list[Path]:
    paths = [path] * len(images)
    if len(images) > 1:
        paths = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, len(images) + 1)]
    for each, image in zip(paths, images, strict=True):
        each.write_bytes(image)
    return paths
