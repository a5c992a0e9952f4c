"""Reading a checkpoint's files: safetensors and JSON, from this machine only, with errors that name the file."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from icportrait.errors import CheckpointError

WEIGHTS_STEM = "diffusion_pytorch_model"
"""The name of a model component's weights in diffusers' layout, without variant and suffix."""
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SINGLE_FILES = (".safetensors", *_PICKLES)
_PART = r"(-\d+-of-\d+)?"
"""Number of a file among several, before or behind the variant."""
_LFS_POINTER = b"version https://git-lfs"


def check_directory(path: Path) -> None:
    """Make sure that a checkpoint is a directory with components in it.

    Raises:
        CheckpointError: it is missing, or a single file, or has only such a one in it.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such directory")
    single = path
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in _SINGLE_FILES]
        if not files or any(file.is_dir() for file in path.iterdir()):
            return
        single = files[0]
    raise CheckpointError(
        f"{single}: all in one file, expected a directory in diffusers' layout (unet/, vae/, scheduler/, ...). With "
        "diffusers installed, StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIRECTORY) makes one"
    )


def check_file(path: Path) -> None:
    """Make sure that a file is itself and whole, as far as its beginning and its size tell.

    Raises:
        CheckpointError: it is a git-lfs pointer, or a safetensors file that was cut off.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        begin = file.read(len(_LFS_POINTER))
        if begin == _LFS_POINTER:
            raise CheckpointError(f"{path}: a git-lfs pointer in place of the file; fetch it with: git lfs pull")
        if path.suffix != ".safetensors" or len(begin) < 8:
            return
        (header_bytes,) = struct.unpack_from("<Q", begin)
        size = path.stat().st_size
        file.seek(8)
        header = file.read(header_bytes) if header_bytes <= size else b""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + header_bytes + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return  # safetensors' own reader says what is wrong
    if size < expected:
        raise CheckpointError(f"{path}: cut off: {size:,} bytes, expected {expected:,}; copy or download it again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file, as float32.

    Raises:
        CheckpointError: the file is missing or damaged, or has no such tensor, or its values aren't finite.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: only .safetensors files are read, because others can run code when read")
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing, expected a tensor {name!r} in it")
    check_file(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read as safetensors: {error}") from error
    if name not in tensors:
        raise CheckpointError(f"{path}: has {', '.join(sorted(tensors)) or 'no tensors'}, expected {name!r}")
    tensor = tensors[name].float()
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path}: {name} has values that aren't finite")
    return tensor


def read_model(model_class: Any, directory: Path) -> Any:
    """Read a diffusers model component as float32, in evaluation mode.

    Args:
        model_class: a diffusers model class.
        directory: the component's directory: ``config.json`` and weights, ``diffusion_pytorch_model.safetensors``
            before its ``fp16`` variant.

    Raises:
        CheckpointError: files are missing, aren't safetensors, or don't fit the configuration.
    """
    variant = weights_variant(directory, WEIGHTS_STEM)
    config = read_json(directory / "config.json")
    for weights in sorted(directory.glob("*.safetensors")):
        check_file(weights)
    try:
        _check_shapes(model_class, config, directory, variant)
        model, info = model_class.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            low_cpu_mem_usage=False,  # True needs the accelerate package and would only save memory
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever diffusers' code does with entries that mean nothing to it
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{directory}: {reason}") from error
    # diffusers leaves missing weights at random values and drops what it doesn't know: both change pictures silently.
    for kind in ("missing", "unexpected"):
        if names := sorted(info[f"{kind}_keys"]):
            raise CheckpointError(
                f"{directory}: {len(names)} weights are {kind} for the network that config.json describes, "
                f"first {names[0]}"
            )
    # The path is this machine's; without this it would be written into every copy that is saved.
    model.register_to_config(_name_or_path="")
    return model.float()


def _check_shapes(model_class: Any, config: dict[str, Any], directory: Path, variant: str | None) -> None:
    """Compare shapes without memory for them: diffusers makes the network that config.json describes, at any size."""
    suffix = f".{variant}" if variant else ""
    names = re.compile(rf"{WEIGHTS_STEM}{_PART}{re.escape(suffix)}{_PART}\.safetensors")
    with torch.device("meta"):
        expected = model_class.from_config(config).state_dict()
    for path in sorted(path for path in directory.iterdir() if names.fullmatch(path.name)):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it has no iterator
                found = list(weights.get_slice(name).get_shape())
                if name in expected and found != list(expected[name].shape):
                    raise CheckpointError(
                        f"{directory}: {name} is {found}, expected {list(expected[name].shape)} by config.json"
                    )


def weights_variant(directory: Path, stem: str) -> str | None:
    """Choose the weights of a component to read: None for the plain ones, "fp16" where there are no others.

    Raises:
        CheckpointError: there are no safetensors weights.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: the directory is missing")
    for variant, suffix in ((None, ""), ("fp16", ".fp16")):
        names = (f"{stem}{suffix}.safetensors", f"{stem}.safetensors.index{suffix}.json")
        if any((directory / name).is_file() for name in names):
            return variant
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory}: has only {pickles[0]}, expected {stem}.safetensors; pickled weights can run code when they "
            "are read. If you trust their source, convert them on a machine you can spare: load the component with "
            "use_safetensors=False and call save_pretrained(directory, safe_serialization=True)"
        )
    raise CheckpointError(f"{directory}: {stem}.safetensors is missing")
