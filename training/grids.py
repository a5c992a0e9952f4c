"""Sheets of small pictures with names: what training and evaluation show of their work."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.flow_picture import flow_picture

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
    """Draw several flows by ``flow_picture``.

    Args:
        flow: ``[N, s * s]`` or ``[N, s, s]`` integers, positions y * s + x in the profile's grid.

    Returns:
        ``[N, 3, s, s]`` uint8.
    """
    side = math.isqrt(flow[0].numel())
    pictures = [np.asarray(flow_picture(item.view(side, side).numpy())) for item in flow.cpu()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
