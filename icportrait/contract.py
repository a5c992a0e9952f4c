"""Specifications of every tensor that crosses a boundary: names, types and axes.

ONNX axes and dummy inputs, TensorRT optimization profiles, Triton's ``config.pbtxt`` and the runtime checks are all
derived from the specifications here; nothing else states a shape. The engines, with b for the batch, S the picture's
side, s the latent's side, C_k and s_k the channels and side of residual k:

    vae_encoder      pixels [b, S, S, 3]  ->  latent [b, 4, s, s]
    warping_network  profile_latent, reference_latent [b, 4, s, s], visibility [b, 1, s, s]
                     ->  f_ref_NN [b, C_k, s_k, 2 s_k],  flow_L [b, s_L, s_L],  match_confidence [b]
    unet             canvas_latent [b, 4, s, 2 s], timestep [b], f_ref_NN  ->  noise_pred [b, 4, s, 2 s]
    vae_decoder      portrait_latent [b, 4, s, s]  ->  portrait_pixels [b, S, S, 3]
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icportrait.errors import ContractError
from icportrait.presets import Preset

ENGINES = ("vae_encoder", "warping_network", "unet", "vae_decoder")
MODEL_ENGINES = ("vae_encoder", "vae_decoder")
"""The engines that are Triton models of their own, batched across callers; ``denoise`` owns the others."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
QUANTIZED_PRECISIONS = ("int8", "fp8")
"""The UNet's convolutions and linears in this type, by Q/DQ; everything else, and ``F_ref``, in fp16."""
ENSEMBLE = "portrait_pipeline"
"""The private pipeline: crops in, pixels out; the gateway decodes and encodes pictures."""
STANDALONE_ENSEMBLE = "standalone_pipeline"
"""The same behind any other tritonserver: files in, files out."""
PARTITION_PARAMETER = "partition"
"""Parameter of a request to the private pipeline, which Triton hands on to its models: the owner of cached latents."""
Array = NDArray[Any]
Tensors = dict[str, Array]
"""Arrays by name."""


class DType(Enum):
    """An element type under its numpy, Triton and ONNX names."""

    FLOAT32 = ("float32", "FP32", "FLOAT")
    FLOAT16 = ("float16", "FP16", "FLOAT16")
    BFLOAT16 = ("bfloat16", "BF16", "BFLOAT16")
    """A NumPy type once ``ml_dtypes`` is imported."""
    UINT8 = ("uint8", "UINT8", "UINT8")
    INT32 = ("int32", "INT32", "INT32")
    INT64 = ("int64", "INT64", "INT64")
    BYTES = ("object", "BYTES", "STRING")

    @property
    def numpy(self) -> str:
        return self.value[0]

    @property
    def triton(self) -> str:
        return self.value[1]

    @property
    def onnx(self) -> str:
        return self.value[2]


@dataclass(frozen=True)
class Axis:
    """One dimension: its name binds across the tensors of a model, its bounds are an optimization profile's."""

    name: str
    min: int
    opt: int
    max: int

    @classmethod
    def fixed(cls, name: str, size: int) -> Axis:
        return cls(name, size, size, size)

    @property
    def is_dynamic(self) -> bool:
        return self.min != self.max

    def __str__(self) -> str:
        return f"{self.min}..{self.max}" if self.is_dynamic else str(self.min)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, type and axes."""

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    below: int | None = None
    """Dummy inputs are whole numbers in 0..below - 1; unit normal where None."""

    def shape(self, **sizes: int) -> tuple[int, ...]:
        """Return the concrete shape, with the sizes of dynamic axes taken from ``sizes`` by axis name."""
        return tuple(sizes[axis.name] if axis.is_dynamic else axis.min for axis in self.axes)

    def nbytes(self, batch: int) -> int:
        """Return the bytes of a tensor of numbers whose only dynamic axis is the batch."""
        return math.prod(self.shape(batch=batch)) * np.dtype(self.dtype.numpy).itemsize


@dataclass(frozen=True)
class ModelSpec:
    """The inputs and outputs of one engine."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> Axis:
        """Return the leading axis, which every tensor of the model shares."""
        return self.inputs[0].axes[0]

    def check_inputs(self, tensors: Mapping[str, Any]) -> dict[str, int]:
        """Check named arrays (anything with ``shape`` and ``dtype``) and return the size of every axis.

        Raises:
            ContractError: a name is missing or unknown, or a type, rank or size isn't what the specification says,
                or two tensors disagree on an axis they share.
        """
        expected = {spec.name: spec for spec in self.inputs}
        if unknown := sorted(set(tensors) - set(expected)):
            raise ContractError(f"{self.name}: no input is called {unknown[0]!r}, expected {', '.join(expected)}")
        bound: dict[str, tuple[int, str]] = {}
        for name, spec in expected.items():
            if name not in tensors:
                raise ContractError(f"{self.name}: input {name} is missing, expected {', '.join(expected)}")
            _bind(self.name, spec, tensors[name], bound)
        return {axis: size for axis, (size, _) in bound.items()}

    def dummy_inputs(self, batch: int, seed: int = 0) -> dict[str, Array]:
        """Draw random inputs of the right types and shapes; see ``TensorSpec.below``."""
        generator = np.random.default_rng(seed)
        dummies: dict[str, Array] = {}
        for spec in self.inputs:
            shape = spec.shape(batch=batch)
            drawn = generator.standard_normal(shape) if spec.below is None else generator.integers(0, spec.below, shape)
            dummies[spec.name] = drawn.astype(spec.dtype.numpy)
        return dummies

    @property
    def optimization_profile(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Return ``{input: (min, opt, max) shape}``, as TensorRT and Polygraphy take it."""
        return {
            spec.name: (
                tuple(axis.min for axis in spec.axes),
                tuple(axis.opt for axis in spec.axes),
                tuple(axis.max for axis in spec.axes),
            )
            for spec in self.inputs
        }


def _bind(model: str, spec: TensorSpec, tensor: Any, bound: dict[str, tuple[int, str]]) -> None:
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    if dtype != spec.dtype.numpy:
        raise ContractError(f"{model}: {spec.name} is {dtype}, expected {spec.dtype.numpy}")
    if len(shape) != len(spec.axes):
        axes = ", ".join(axis.name for axis in spec.axes)
        raise ContractError(
            f"{model}: {spec.name} has {len(shape)} axes {list(shape)}, expected {len(spec.axes)}: [{axes}]"
        )
    for index, (axis, size) in enumerate(zip(spec.axes, shape, strict=True)):
        if not axis.min <= size <= axis.max:
            raise ContractError(f"{model}: {spec.name}: axis {index} ({axis.name}) is {size}, expected {axis}")
        known, first = bound.setdefault(axis.name, (size, spec.name))
        if known != size:
            raise ContractError(
                f"{model}: axis {axis.name} is {known} in {first} but {size} in {spec.name}; they must be equal"
            )


def batch_axis(maximum: int) -> Axis:
    return Axis("batch", 1, min(4, maximum), maximum)


def latent_spec(preset: Preset, name: str, batch: Axis) -> TensorSpec:
    """Specify one picture's latent, scaled by the VAE factor: ``[batch, latent_channels, s, s]`` float32."""
    return TensorSpec(name, DType.FLOAT32, (batch, *_grid(preset.latent_channels, preset.latent_size)))


def pixels_spec(preset: Preset, name: str, batch: Axis) -> TensorSpec:
    """Specify RGB pictures: ``[batch, S, S, 3]`` uint8, 0..255."""
    side = preset.image_size
    axes = (batch, Axis.fixed("height", side), Axis.fixed("width", side), Axis.fixed("rgb", 3))
    return TensorSpec(name, DType.UINT8, axes, below=256)


def visibility_spec(preset: Preset, batch: Axis) -> TensorSpec:
    """Specify the reference's mask: ``[batch, 1, s, s]`` float32, per latent cell 1 where it is visible, else 0."""
    return TensorSpec("visibility", DType.FLOAT32, (batch, *_grid(1, preset.latent_size)), below=2)


def residual_specs(preset: Preset, batch: Axis, precision: str) -> tuple[TensorSpec, ...]:
    """Specify ``F_ref`` as the UNet takes it: ``[batch, C_k, s_k, 2 s_k]`` a residual, in the activations' type."""
    dtype = {"fp32": DType.FLOAT32, "bf16": DType.BFLOAT16}.get(precision, DType.FLOAT16)
    return tuple(
        TensorSpec(
            f"f_ref_{index:02d}",
            dtype,
            (batch, *_grid(residual.channels, preset.level_size(residual.level), canvas=True)),
        )
        for index, residual in enumerate(preset.residuals)
    )


def engine_specs(preset: Preset, precision: str = "fp32") -> dict[str, ModelSpec]:
    """Specify the four engines of a preset by name. Only ``F_ref`` changes type with the precision."""
    vae, warping, unet = (
        batch_axis(size) for size in (preset.max_vae_batch, preset.max_warping_batch, preset.max_unet_batch)
    )
    canvas_axes = (unet, *_grid(preset.latent_channels, preset.latent_size, canvas=True))
    flows = tuple(
        TensorSpec(f"flow_{level}", DType.INT32, (warping, *_grid(None, preset.level_size(level))))
        for level in range(preset.levels)
    )
    specs = (
        ModelSpec("vae_encoder", (pixels_spec(preset, "pixels", vae),), (latent_spec(preset, "latent", vae),)),
        ModelSpec(
            "warping_network",
            (
                latent_spec(preset, "profile_latent", warping),
                latent_spec(preset, "reference_latent", warping),
                visibility_spec(preset, warping),
            ),
            (
                *residual_specs(preset, warping, precision),
                *flows,
                TensorSpec("match_confidence", DType.FLOAT32, (warping,)),
            ),
        ),
        ModelSpec(
            "unet",
            (
                TensorSpec("canvas_latent", DType.FLOAT32, canvas_axes),
                TensorSpec("timestep", DType.FLOAT32, (unet,), below=1000),
                *residual_specs(preset, unet, precision),
            ),
            (TensorSpec("noise_pred", DType.FLOAT32, canvas_axes),),
        ),
        ModelSpec(
            "vae_decoder",
            (latent_spec(preset, "portrait_latent", vae),),
            (pixels_spec(preset, "portrait_pixels", vae),),
        ),
    )
    return {spec.name: spec for spec in specs}


def stage_specs(preset: Preset) -> dict[str, ModelSpec]:
    """Specify the Python stages by name. Only the standalone pipeline has ``preprocess`` and ``postprocess``.

    ``request`` is JSON: for ``preprocess`` an object of public options, for the others a ``PortraitRequest``.
    """
    one, portraits = Axis.fixed("request", 1), Axis("portraits", 1, 1, preset.max_vae_batch)

    def text(name: str) -> TensorSpec:
        return TensorSpec(name, DType.BYTES, (one,))

    visibility = visibility_spec(preset, one)
    specs = (
        ModelSpec(
            "preprocess",
            (text("profile"), text("reference"), text("request")),
            (
                pixels_spec(preset, "profile_pixels", one),
                pixels_spec(preset, "reference_pixels", one),
                visibility,
                text("checked_request"),
                text("preprocess_report"),
            ),
        ),
        ModelSpec(
            "denoise",
            (
                latent_spec(preset, "profile_latent", one),
                latent_spec(preset, "reference_latent", one),
                visibility,
                text("request"),
            ),
            (latent_spec(preset, "portrait_latent", portraits), text("denoise_report")),
        ),
        ModelSpec(
            "postprocess",
            (
                pixels_spec(preset, "portrait_pixels", portraits),
                text("request"),
                text("preprocess_report"),
                text("denoise_report"),
            ),
            (TensorSpec("image", DType.BYTES, (portraits,)), text("metadata")),
        ),
    )
    return {spec.name: spec for spec in specs}


def pipeline_spec(preset: Preset) -> ModelSpec:
    """Specify the private pipeline: crops, mask and ``PortraitRequest`` to pixels and a report.

    The reference's crop arrives with its hidden cells filled.
    """
    stages, one = stage_specs(preset), Axis.fixed("request", 1)
    _, _, visibility, request = stages["denoise"].inputs
    return ModelSpec(
        ENSEMBLE,
        (pixels_spec(preset, "profile_pixels", one), pixels_spec(preset, "reference_pixels", one), visibility, request),
        (stages["postprocess"].inputs[0], stages["denoise"].outputs[1]),
    )


def standalone_spec(preset: Preset) -> ModelSpec:
    """Specify the standalone pipeline: two picture files and an object of public options in, files and metadata out."""
    stages = stage_specs(preset)
    return ModelSpec(STANDALONE_ENSEMBLE, stages["preprocess"].inputs, stages["postprocess"].outputs)


def contract_hash(preset: Preset, precision: str) -> str:
    """Hash all that the engines' specifications say. Engines and servers with different hashes don't fit together."""
    text = json.dumps([str(spec) for spec in engine_specs(preset, precision).values()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _grid(channels: int | None, side: int, canvas: bool = False) -> tuple[Axis, ...]:
    """Return the axes of a feature map. Sizes that differ between levels and kinds get different axis names."""
    width = Axis.fixed(f"canvas_width_{2 * side}", 2 * side) if canvas else Axis.fixed(f"width_{side}", side)
    grid = (Axis.fixed(f"height_{side}", side), width)
    return grid if channels is None else (Axis.fixed(f"channels_{channels}", channels), *grid)


def bytes_tensor(*values: bytes) -> Array:
    """Make a BYTES tensor of shape [len(values)]."""
    return np.array(values, dtype=np.object_)
