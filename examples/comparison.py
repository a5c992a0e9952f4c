"""The picture that the demo draws: how each portrait came about, a row of panels for each pair of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from icportrait.contract import Array, bytes_tensor
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy, cpu_defaults
from icportrait.runtime import load_engine
from icportrait.serving.stages import FrontStage, PreprocessStage
from training.flow_picture import flow_picture

PANEL_PX = 256
CAPTION_PX = 30
NAMES_PX = 24
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Boxes(TypedDict, total=False):
    """The options that say which square of a picture is used."""

    profile_box: tuple[float, float, float, float]
    reference_box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Pair:
    """Two pictures to send, and the picture that ought to come back."""

    profile: Path
    reference: Path
    ground_truth: Path | None = None

    @property
    def boxes(self) -> Boxes:
        """Return boxes of the whole pictures where there is a ground truth, because it shows the whole reference.

        Without a ground truth the server finds the faces.
        """
        return {} if self.ground_truth is None else {"profile_box": WHOLE, "reference_box": WHOLE}


class Panels:
    """The steps between the pictures that are sent and the portrait, by the server's own stages and engines."""

    def __init__(self, export: Path) -> None:
        manifest = Manifest.read(export)
        policy = ServingPolicy(**cpu_defaults(manifest.preset, manifest.precision))
        self._front, self._preprocess = FrontStage(manifest, policy, is_stream=False), PreprocessStage(manifest.preset)
        self._encoder, self._warping = (
            load_engine(name, export, manifest, policy) for name in ("vae_encoder", "warping_network")
        )

    def __call__(self, pair: Pair, seed: int, portrait: Image.Image) -> dict[str, Image.Image]:
        """Return profile, reference, its visible part, the flow, the portrait, and the ground truth where known."""
        request: dict[str, Any] = {
            "profile": bytes_tensor(pair.profile.read_bytes()),
            "reference": bytes_tensor(pair.reference.read_bytes()),
            "seed": np.array([seed]),
            **{name: np.array(box, np.float32) for name, box in dict(pair.boxes).items()},
        }
        unmasked = {**request, "mask_ratio": np.array([0.0], np.float32)}
        hidden, whole = (self._preprocess(self._front(inputs)[1]) for inputs in (request, unmasked))
        panels = {
            "profile": Image.fromarray(whole["profile_pixels"][0]),
            "reference": Image.fromarray(whole["reference_pixels"][0]),
            "visible": Image.fromarray(hidden["reference_pixels"][0]),
            "flow": flow_picture(self._flow(hidden)),
            "portrait": portrait,
        }
        if pair.ground_truth:
            with Image.open(pair.ground_truth) as picture:
                panels["ground truth"] = picture.convert("RGB").resize(portrait.size, Image.Resampling.LANCZOS)
        return panels

    def _flow(self, tensors: Mapping[str, Array]) -> Array:
        """Compute the finest flow [s, s]."""
        latents = {
            f"{name}_latent": self._encoder.run({"pixels": tensors[f"{name}_pixels"]})["latent"]
            for name in ("profile", "reference")
        }
        flow: Array = self._warping.run({**latents, "visibility": tensors["visibility"]})["flow_0"][0]
        return flow


def sheet(rows: Sequence[tuple[str, Mapping[str, Image.Image]]]) -> Image.Image:
    """Draw rows of named panels, each below its caption: as wide as the longest row."""
    row_px = CAPTION_PX + NAMES_PX + PANEL_PX
    picture = Image.new("RGB", (PANEL_PX * max(len(panels) for _, panels in rows), row_px * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (caption, panels) in enumerate(rows):
        top = row * row_px
        draw.text((8, top + 6), caption, fill="black", font=ImageFont.load_default(size=18))
        for column, (name, panel) in enumerate(panels.items()):
            resample = Image.Resampling.NEAREST if name == "flow" else Image.Resampling.BICUBIC
            place = (column * PANEL_PX, top + CAPTION_PX + NAMES_PX)
            picture.paste(panel.convert("RGB").resize((PANEL_PX, PANEL_PX), resample), place)
            names = (column * PANEL_PX + 8, top + CAPTION_PX)
            draw.text(names, name, fill="black", font=ImageFont.load_default(size=16))
    return picture


def psnr_db(picture: Image.Image, truth: Image.Image) -> float:
    """Compute the peak signal-to-noise ratio of two RGB pictures of one size."""
    a, b = (np.asarray(each.convert("RGB"), dtype=np.float64) for each in (picture, truth))
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)
