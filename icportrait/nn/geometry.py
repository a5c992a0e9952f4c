"""From a preset to diffusers' models and back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

from diffusers import AutoencoderKL, UNet2DConditionModel

from icportrait.errors import CheckpointError
from icportrait.presets import PRESETS, Preset

DOWN_BLOCKS = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
UP_BLOCKS = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}

_WITHOUT_EFFECT = {
    "unet": {"sample_size"},
    "vae": {"sample_size", "force_upcast", "shift_factor"},
}
"""Configuration entries that don't decide whether a network can be served: its sizes come from the preset, and the
engine modules honour a shift factor themselves."""

_MOST_LEVELS = 16
_MOST_LAYERS = 64
"""Layers of a level: a network of any depth would be built before its weights are looked at."""
_LARGEST = 2**20
"""Above all sizes and numbers of channels there are; larger ones don't fit into a float or a tensor's shape."""
_NOT_GEOMETRY = {"name", "max_unet_batch", "max_vae_batch", "max_warping_batch"}


def unet_config(preset: Preset) -> dict[str, Any]:
    """Return arguments of ``UNet2DConditionModel``. The ones left out have Stable Diffusion 1.5's values by default."""
    return {
        "sample_size": preset.latent_size,
        "in_channels": preset.latent_channels,
        "out_channels": preset.latent_channels,
        "down_block_types": tuple(DOWN_BLOCKS[attention] for attention in preset.attention_levels),
        "up_block_types": tuple(UP_BLOCKS[attention] for attention in reversed(preset.attention_levels)),
        "block_out_channels": preset.unet_channels,
        "layers_per_block": preset.layers_per_block,
        "attention_head_dim": preset.attention_heads,  # diffusers takes this entry for the number of heads
        "cross_attention_dim": preset.cross_attention_dim,
        "norm_num_groups": preset.norm_num_groups,
    }


def vae_config(preset: Preset) -> dict[str, Any]:
    """Return arguments of ``AutoencoderKL``. The ones left out have Stable Diffusion 1.5's values by default."""
    levels = len(preset.vae_channels)
    return {
        "sample_size": preset.image_size,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": preset.vae_channels,
        "layers_per_block": preset.vae_layers_per_block,
        "latent_channels": preset.latent_channels,
        "norm_num_groups": preset.norm_num_groups,
        "scaling_factor": preset.vae_scaling_factor,
    }


def unet_from_preset(preset: Preset) -> UNet2DConditionModel:
    """Make a denoising UNet with fresh weights, in evaluation mode."""
    return UNet2DConditionModel(**unet_config(preset)).eval()


def vae_from_preset(preset: Preset) -> AutoencoderKL:
    """Make a VAE with fresh weights, in evaluation mode."""
    return AutoencoderKL(**vae_config(preset)).eval()


def preset_from_configs(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    *,
    prompt_tokens: int,
    image_size: int | None = None,
    mask_patch_px: int | None = None,
) -> Preset:
    """Read the geometry out of a UNet's and a VAE's ``config.json``.

    Args:
        unet: the UNet's configuration.
        vae: the VAE's configuration.
        prompt_tokens: tokens of the prompt embedding.
        image_size: side of the pictures in pixels; by default what the UNet's ``sample_size`` stands for.
        mask_patch_px: side of the patches that hide the reference; by default two latent cells.

    Returns:
        One of ``PRESETS`` where the geometry is the same, else a preset called "custom".

    Raises:
        CheckpointError: an entry has a value that isn't supported; the text names it.
    """
    unet = _with_defaults(UNet2DConditionModel, unet)
    vae = _with_defaults(AutoencoderKL, vae)
    vae_channels = _integers("vae", vae, "block_out_channels")
    factor = 2 ** (len(vae_channels) - 1)
    preset = Preset(
        name="custom",
        image_size=image_size or _side("unet", unet) * factor,
        vae_channels=vae_channels,
        unet_channels=_integers("unet", unet, "block_out_channels"),
        attention_levels=_attention_levels(unet["down_block_types"]),
        attention_heads=_integer("unet", unet, "attention_head_dim"),
        cross_attention_dim=_integer("unet", unet, "cross_attention_dim"),
        prompt_tokens=prompt_tokens,
        norm_num_groups=_integer("unet", unet, "norm_num_groups"),
        mask_patch_px=mask_patch_px or 2 * factor,
        layers_per_block=_integer("unet", unet, "layers_per_block", _MOST_LAYERS),
        vae_layers_per_block=_integer("vae", vae, "layers_per_block", _MOST_LAYERS),
        latent_channels=_integer("vae", vae, "latent_channels"),
        vae_scaling_factor=_factor("vae", vae, "scaling_factor"),
    )
    _compare("unet", unet, _with_defaults(UNet2DConditionModel, unet_config(preset)))
    _compare("vae", vae, _with_defaults(AutoencoderKL, vae_config(preset)))
    return next((known for known in PRESETS.values() if same_geometry(known, preset)), preset)


def same_geometry(first: Preset, second: Preset) -> bool:
    """Tell whether two presets have the same tensors and the same mask; names and batch sizes may differ."""
    return not geometry_differences(first, second)


def geometry_differences(first: Preset, second: Preset) -> list[str]:
    """List the fields in which two presets differ, as ``name: value in first, value in second``."""
    names = (field.name for field in dataclasses.fields(Preset) if field.name not in _NOT_GEOMETRY)
    return [
        f"{name}: {getattr(first, name)}, {getattr(second, name)}"
        for name in names
        if getattr(first, name) != getattr(second, name)
    ]


def _with_defaults(model: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete ``config`` as diffusers does, without private entries (which begin with an underscore)."""
    parameters = inspect.signature(model).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return defaults | {name: value for name, value in config.items() if not name.startswith("_")}


def _compare(component: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in _WITHOUT_EFFECT[component]:
            continue
        if name not in expected:
            raise CheckpointError(f"{component}/config.json: {name} isn't an entry that is known (value {value!r})")
        # Converters write null for a switch that is off.
        is_off = all(each is None or each is False for each in (value, expected[name]))
        if _plain(value) != _plain(expected[name]) and not is_off:
            raise CheckpointError(
                f"{component}/config.json: {name} is {value!r}, supported: {_plain(expected[name])!r}; "
                "only networks built like Stable Diffusion 1.5's can be served"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= _LARGEST


def _integer(component: str, config: Mapping[str, Any], name: str, most: int = _LARGEST) -> int:
    value = config[name]
    if not _is_count(value) or value > most:
        raise CheckpointError(
            f"{component}/config.json: {name} is {value!r}, supported: one integer of 1 to {most} for all levels"
        )
    return value


def _integers(component: str, config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = config[name]
    if not isinstance(values, list | tuple) or not 0 < len(values) <= _MOST_LEVELS or not all(map(_is_count, values)):
        raise CheckpointError(
            f"{component}/config.json: {name} is {values!r}, expected an integer of 1 to {_LARGEST} for each of "
            f"1 to {_MOST_LEVELS} levels"
        )
    return tuple(values)


def _factor(component: str, config: Mapping[str, Any], name: str) -> float:
    value = config[name]
    if type(value) not in (int, float) or not 0 < value <= _LARGEST:
        raise CheckpointError(
            f"{component}/config.json: {name} is {value!r}, expected a number above 0, at most {_LARGEST}"
        )
    return float(value)


def _side(component: str, config: Mapping[str, Any]) -> int:
    size = config["sample_size"]
    if not _is_count(size):
        raise CheckpointError(
            f"{component}/config.json: sample_size is {size!r}, expected an integer of 1 to {_LARGEST}; give image_size"
        )
    return size


def _attention_levels(types: Any) -> tuple[bool, ...]:
    attention = {name: level for level, name in DOWN_BLOCKS.items()}
    if not isinstance(types, list | tuple):
        raise CheckpointError(f"unet/config.json: down_block_types is {types!r}, expected a name for each level")
    if unknown := [name for name in types if not isinstance(name, str) or name not in attention]:
        raise CheckpointError(
            f"unet/config.json: down_block_types has {unknown[0]!r}, supported: {', '.join(sorted(attention))}"
        )
    return tuple(attention[name] for name in types)
