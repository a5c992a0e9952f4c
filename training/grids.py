"""Sheets of small pictures with names: what training and evaluation show of their work."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_TITLE_PX = 24
_GAP_PX = 4


def picture_grid(columns: Mapping[str, Tensor], panel_px: int = 128) -> Image.Image:
    """Draw one column of pictures under each title; row i holds what belongs to pair i.

    Args:
        columns: title to pictures ``[N, 3, h, w]`` uint8, on any device; sizes may differ from column to column.
        panel_px: side of a panel. Pictures are enlarged without smoothing, so that pixels and flows stay what they are.

    Raises:
        ValueError: a column isn't of that shape and type, or columns differ in length.
    """
    rows = {len(pictures) for pictures in columns.values()}
    if len(rows) != 1:
        raise ValueError(f"columns: of {sorted(rows)} pictures, expected the same number in each")
    pitch = panel_px + _GAP_PX
    sheet = Image.new("RGB", (len(columns) * pitch - _GAP_PX, _TITLE_PX + rows.pop() * pitch - _GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, (title, pictures) in enumerate(columns.items()):
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"{title}: {list(pictures.shape)} {pictures.dtype}, expected [N, 3, h, w] uint8")
        draw.text((column * pitch + 2, 4), title, fill="black", font=font)
        for row, pixels in enumerate(pictures.permute(0, 2, 3, 1).cpu().numpy()):
            smaller = max(pixels.shape[:2]) > panel_px
            resample = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
            panel = Image.fromarray(np.ascontiguousarray(pixels)).resize((panel_px, panel_px), resample)
            sheet.paste(panel, (column * pitch, _TITLE_PX + row * pitch))
    return sheet


def flow_colours(flow: Tensor) -> Tensor:
    """Flows as colours: hue for a displacement's direction, strength for its length.

    Args:
        flow: ``[N, s * s]`` or ``[N, s, s]`` integers, positions y * s + x in the profile's grid.

    Returns:
        ``[N, 3, s, s]`` uint8: white where nothing moved, full colour from a quarter of the picture's side.
    """
    cells = flow.flatten(1).cpu().numpy()
    side = round(cells.shape[1] ** 0.5)
    rows, columns = np.divmod(np.arange(side * side), side)
    down, right = cells // side - rows, cells % side - columns
    hue = (np.arctan2(down, right) / (2 * np.pi) % 1.0) * 255
    saturation = np.minimum(np.hypot(down, right) / (side / 4), 1.0) * 255
    hsv = np.stack([hue, saturation, np.full_like(hue, 255)], axis=-1).astype(np.uint8)
    pictures = [Image.fromarray(item.reshape(side, side, 3), "HSV").convert("RGB") for item in hsv]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
