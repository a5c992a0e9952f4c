"""The distance of pictures from the truth, and of matches from the true ones.

Pictures are ``[N, 3, h, w]``, uint8 or levels 0..255 of sRGB in floating point. A mask ``[N, h, w]`` bool says which
pixels count; without one all do. Every figure is worked out for each picture by itself, ``[N]`` float32, over its own
pixels under the mask, and NaN where there are none; means are taken over pictures afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of ``values`` [N, h, w] under the mask, for each item: ``[N]``."""
    if mask is None:
        return values.mean(dim=(1, 2))
    return torch.where(mask, values, 0).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))


def psnr(pictures: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the PSNR in dB, infinite for equal pictures: 10 log10(255^2 / mean squared error)."""
    error = (pictures.float() - truth.float()).square().mean(dim=1)
    return 10 * torch.log10(255**2 / masked_mean(error, mask))


def ssim(pictures: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the structural similarity, 1 for equal pictures: the mean of ``ssim_map``.

    A margin of 5 pixels doesn't count, because ``ssim_map`` has none.
    """
    margin = _WINDOW // 2
    inner = None if mask is None else mask[:, margin:-margin, margin:-margin]
    return masked_mean(ssim_map(pictures, truth), inner)


def ssim_map(pictures: Tensor, truth: Tensor) -> Tensor:
    """Compute the structural similarity about each pixel, the mean over the three colours.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, equation 13: Gaussian
    window of 11 x 11, sigma 1.5.

    A window that is centred under a mask also sees up to 5 pixels beside it.

    Returns:
        ``[N, h - 10, w - 10]`` float32: only where the window lies within the picture.
    """
    x, y = pictures.float(), truth.float()
    values = torch.cat((x, y, x * x, y * y, x * y), dim=1)
    offsets = torch.arange(_WINDOW, device=x.device) - _WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    # The window is a product of a column and a row; a group for each channel, as torch is slow with single channels.
    column = (window / window.sum()).view(1, 1, -1, 1).expand(values.shape[1], -1, -1, -1)
    # Variances are small differences of large squares: fewer digits leave nothing of them.
    with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        values = functional.conv2d(values, column, groups=values.shape[1])
        values = functional.conv2d(values, column.transpose(2, 3), groups=values.shape[1])
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = values.chunk(5, dim=1)
    variance_x, variance_y, covariance = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2))
    return similarity.mean(dim=1)


@torch.no_grad()
def vae_features(vae: AutoencoderKL, pictures: Tensor) -> list[Tensor]:
    """Encode pictures up to each of the VAE encoder's down blocks: ``[N, C, h, w]`` float32 a block, finest first."""
    weight = vae.encoder.conv_in.weight
    hidden = vae.encoder.conv_in((pictures.to(weight.device).float() / 127.5 - 1).to(weight.dtype))
    features = []
    for block in vae.encoder.down_blocks:
        hidden = block(hidden)
        features.append(hidden.float().cpu())
    return features


def feature_distance(features: Sequence[Tensor], true_features: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Measure how differently a network sees two pictures: 0 for equal ones, at most 4 for each of its layers.

    The form is LPIPS' (Zhang et al., arXiv 1801.03924, equation 1): features of each position are scaled to length 1,
    squared differences summed over channels, averaged over positions and summed over layers. LPIPS' layer weights,
    which were fitted to people's judgements of pairs, are left out: no such weights exist for other networks than its
    own. With ``vae_features`` it is a distance of this project's own, comparable only where the VAE is the same.

    Args:
        features: of the pictures, ``[N, C, h, w]`` for each layer.
        true_features: like ``features``, of the truth.
        mask: pixels that count, ``[N, H, W]`` bool; a position counts by its share of them.
    """
    total = torch.zeros(len(features[0]))
    for layer, truth in zip(features, true_features, strict=True):
        apart = (functional.normalize(layer, dim=1) - functional.normalize(truth, dim=1)).square().sum(dim=1)
        if mask is None:
            total += apart.mean(dim=(1, 2))
            continue
        share = functional.adaptive_avg_pool2d(mask.float(), (apart.shape[1], apart.shape[2]))
        total += (apart * share).sum(dim=(1, 2)) / share.sum(dim=(1, 2))
    return total


def colour_error(pictures: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean colour difference of pixels: delta E of CIE 1976, of which about 2 can just be seen."""
    return masked_mean(_delta_e(pictures.movedim(1, -1), truth.movedim(1, -1)), mask)


def mean_colour_error(pictures: Tensor, truth: Tensor, mask: Tensor, least_pixels: int) -> Tensor:
    """Compute delta E of CIE 1976 between the two mean colours under the mask: ``[N]``.

    Unlike ``colour_error`` it forgives a feature whose edge is a pixel off, and asks whether it has the right colour.
    NaN where the mask has fewer than ``least_pixels`` pixels.
    """
    means = [
        torch.stack([masked_mean(channel, mask) for channel in picture.float().unbind(1)], dim=-1)
        for picture in (pictures, truth)
    ]
    return torch.where(mask.sum(dim=(1, 2)) >= least_pixels, _delta_e(*means), torch.nan)


def lab(colours: Tensor) -> Tensor:
    """Convert sRGB colours (IEC 61966-2-1), ``[..., 3]`` in levels 0..255, to CIE L*a*b*, ``[..., 3]`` float32."""
    encoded = colours.float() / 255
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = linear.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ (to_xyz / to_xyz.sum(dim=1, keepdim=True)).T  # relative to white, which is (1, 1, 1) in linear sRGB
    x, y, z = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=0) ** (1 / 3), xyz * 841 / 108 + 4 / 29).unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-1)


def _delta_e(colours: Tensor, others: Tensor) -> Tensor:
    """Return the distance in CIE L*a*b* of sRGB colours ``[..., 3]``: ``[...]``."""
    return (lab(colours) - lab(others)).square().sum(dim=-1).sqrt()


def end_point_error(flow: Tensor, truth: Tensor, grid: int) -> Tensor:
    """Compute the Euclidean distance between matched and true profile cells, in cells of the grid.

    Args:
        flow: ``[N, grid * grid]`` integers, profile cells y * grid + x.
        truth: like ``flow``.
        grid: cells across a picture.

    Returns:
        ``[N, grid * grid]`` float32.
    """
    down = torch.div(flow, grid, rounding_mode="floor") - torch.div(truth, grid, rounding_mode="floor")
    return torch.hypot(down.float(), (flow % grid - truth % grid).float())


@dataclass(frozen=True)
class MatchingFigures:
    """One level's matches, over all cells whose true place can be seen in the profile."""

    grid: int
    """Cells across a picture."""
    end_point_error: float
    """Mean Euclidean distance to the true place in latent cells, which are the finest level's."""
    within_one_latent_cell: float
    """Share of the matches, 0..1, that are at most one latent cell from the true place."""
    within_one_own_cell: float
    """The same with the level's own cells."""
    unmoved_within_one_own_cell: float
    """The same if every cell were matched with the one at its own place: what is too easy to count."""


def matching_figures(flow: Tensor, truth: Tensor, visible: Tensor, grid: int, latent_size: int) -> MatchingFigures:
    """Compare matches with the true ones. All figures are NaN where nothing is visible.

    Args:
        flow: ``[N, grid * grid]`` integers, profile cells y * grid + x.
        truth: like ``flow``.
        visible: which of the cells count, ``[N, grid * grid]`` bool.
        grid: cells across a picture.
        latent_size: latent cells across a picture.
    """
    error = end_point_error(flow, truth, grid)[visible]
    unmoved = end_point_error(torch.arange(grid * grid).expand_as(truth), truth, grid)[visible]
    latent_cells = latent_size / grid
    return MatchingFigures(
        grid=grid,
        end_point_error=float(error.mean()) * latent_cells,
        within_one_latent_cell=float((error * latent_cells <= 1).float().mean()),
        within_one_own_cell=float((error <= 1).float().mean()),
        unmoved_within_one_own_cell=float((unmoved <= 1).float().mean()),
    )
