"""The settings of a training run: one frozen dataclass a stage, read from a TOML file and the command line."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from icportrait.errors import IcPortraitError

FLOWS = ("true", "matched")
OPTIMIZERS = ("adamw", "muon")
VARIETIES = ("narrow", "wide")


class RecipeError(IcPortraitError):
    """A recipe file or an override doesn't fit its stage."""


@dataclass(frozen=True)
class Recipe:
    """The settings of every stage."""

    stage: ClassVar[str]

    steps: int = 1000
    """Optimizer steps of the whole run; the learning rate falls to zero over them."""
    batch: int = 16
    optimizer: str = "adamw"
    """One of ``OPTIMIZERS``."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    """Decay of the running mean of the weights. Samples are made with the mean, and it is saved as the checkpoint."""
    gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 0
    """Seed of the weights where there is no base, and of everything that is drawn while training."""
    bf16: bool = True
    """Run the networks under bfloat16 autocast."""
    keep_latents: bool = True
    """Keep every picture's latent once it is encoded; for data that is seen many times and fits into memory."""
    flip: bool = True
    """Mirror half of the pairs."""
    mask_ratio: float = 0.8
    """Share of the reference that is hidden."""
    same_identity_share: float = 0.25
    """Part of the rendered pairs whose reference is the target itself, as in the paper's data."""
    sample_every: int = 500
    save_every: int = 500


@dataclass(frozen=True)
class VaeRecipe(Recipe):
    """The autoencoder."""

    stage: ClassVar[str] = "vae"

    crop_px: int = 64
    """Side of the random crops that are trained on; the picture's side for whole pictures."""
    kl_weight: float = 2e-4
    """Weight of the mean KL divergence of a latent number, beside the mean absolute error of a pixel in -1..1."""


@dataclass(frozen=True)
class MatchingRecipe(Recipe):
    """View-consistent adaptation: the matching net."""

    stage: ClassVar[str] = "matching"

    temperature: float = 0.05
    """Temperature of the softmax over the cost volume, at the start; cosines are divided by it."""
    final_temperature: float = 0.02
    spread_cells: float = 0.7
    """Standard deviation of the distribution about the true cell that the softmax is trained to give."""
    unseen_share: float = 0.1
    """Part of the target cells whose place the profile doesn't show that are trained on, drawn anew every step."""


@dataclass(frozen=True)
class AppearanceRecipe(Recipe):
    """Lighting-aware stitching: the appearance net, the zero convolutions and the UNet."""

    stage: ClassVar[str] = "appearance"

    flows: str = "matched"
    """``true``: warp by the data's correspondence; ``matched``: by the matching net's, which isn't trained here."""
    noise_bias: float = 2.0
    """Timesteps are drawn as T (1 - u^bias), u uniform: above 1, strong noise is drawn more often. The portrait is
    decided there, and few steps are taken elsewhere."""
    f_ref_drop: float = 0.1
    """Part of the rows that are denoised without ``F_ref``, for guidance (arXiv 2207.12598)."""
    head_weight: float = 1.0
    """Weight of the errors where the target shows the head, beside 1 elsewhere; for data with the head's place."""
    decoded_rows: int = 0
    """Rows of a batch whose portrait, as the prediction stands for it, is decoded and compared with the target."""
    decoded_weight: float = 0.5
    """Weight of that comparison, beside the diffusion loss."""
    train_unet: bool = True
    """Also train the UNet; a base that can draw already may be left as it is."""


@dataclass(frozen=True)
class DecoderRecipe(Recipe):
    """The autoencoder's decoder once more, on what the UNet predicts."""

    stage: ClassVar[str] = "decoder"

    num_inference_steps: int = 1
    """Steps of the portraits that the decoder is trained on."""
    true_share: float = 0.25
    """Part of the rows whose latent is the target's own, so that true latents are decoded as well as before."""
    head_weight: float = 3.0
    """Weight of the errors where the target shows the head, as in ``AppearanceRecipe``."""
    likeness_weight: float = 1.0
    """Weight of 1 - SSIM, beside the mean absolute error of a pixel in -1..1."""


@dataclass(frozen=True)
class RefineRecipe(Recipe):
    """Appearance net, UNet and decoder once more and together, by portraits of one step."""

    stage: ClassVar[str] = "refine"

    truth_weight: float = 0.5
    """Share of the loss that compares with the truth; the rest compares with the teacher, see ``RefineStage``."""
    head_weight: float = 3.0
    """Weight of the errors where the target shows the head, as in ``AppearanceRecipe``."""
    likeness_weight: float = 4.0
    """Weight of 1 - SSIM, beside the mean absolute error of a pixel in -1..1."""


@dataclass(frozen=True)
class Data:
    """The source of the pairs."""

    pairs: int = 8192
    """Rendered pairs."""
    seed: int = 0
    variety: str = "narrow"
    """Variety of rendered heads and views, one of ``VARIETIES``; ``drawing.Variety`` describes it."""
    cache: str = "build/pairs"
    """Folder for rendered pairs."""
    pictures: str = ""
    """A folder with one folder of views an identity, used in place of rendered pairs."""


STAGES: dict[str, type[Recipe]] = {
    recipe.stage: recipe for recipe in (VaeRecipe, MatchingRecipe, AppearanceRecipe, DecoderRecipe, RefineRecipe)
}


def load_recipe(path: Path, stage: str, overrides: list[str]) -> tuple[str, Data, Recipe]:
    """Read a stage's recipe.

    Args:
        path: a TOML file with ``preset``, the tables ``[data]`` and ``[all]``, and a table for each stage.
        stage: one of ``STAGES``.
        overrides: ``key=value`` in TOML, for the stage, or ``data.key=value``.

    Returns:
        The preset's name, empty where the base decides, the data and the recipe.

    Raises:
        RecipeError: the file can't be read, or something in it isn't known or isn't of its field's type.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if unknown := sorted(tables.keys() - {"preset", "data", "all", *STAGES}):
        raise RecipeError(f"{path}: {unknown[0]} is unknown, expected preset, [data], [all] or [{'], ['.join(STAGES)}]")
    for name in ("data", "all", *STAGES):
        if not isinstance(tables.get(name, {}), dict):
            raise RecipeError(f"{path}: {name} is {tables[name]!r}, expected a table [{name}]")
    data, settings = dict(tables.get("data", {})), tables.get("all", {}) | tables.get(stage, {})
    for text in overrides:
        try:
            ((key, value),) = tomllib.loads(text.removeprefix("data.")).items()
        except (tomllib.TOMLDecodeError, ValueError) as error:
            raise RecipeError(f"--set {text}: expected key=value in TOML, such as steps=100") from error
        (data if text.startswith("data.") else settings)[key] = value
    return tables.get("preset", ""), _build(Data, data, path), _build(STAGES[stage], settings, path)


def _build(kind: type[Any], values: dict[str, Any], path: Path) -> Any:
    known = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{path}: {key} is unknown to {kind.__name__}, expected one of {', '.join(known)}")
        if known[key] is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not known[key]:
            raise RecipeError(f"{path}: {key} is {value!r}, expected {known[key].__name__}")
    for key, choices in (("flows", FLOWS), ("optimizer", OPTIMIZERS), ("variety", VARIETIES)):
        if values.get(key, choices[0]) not in choices:
            raise RecipeError(f"{path}: {key} is {values[key]!r}, expected one of {', '.join(choices)}")
    return kind(**values)
