"""Reading a checkpoint's files: safetensors and JSON, from this machine only, with errors that name the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from icportrait.errors import CheckpointError

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:
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
    variant = weights_variant(directory, "diffusion_pytorch_model")
    read_json(directory / "config.json")
    try:
        model, info = model_class.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            low_cpu_mem_usage=False,  # True needs the accelerate package and would only save memory
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: {_reason(error)}") from error
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


def weights_variant(directory: Path, stem: str) -> str | None:
    """Which weights of a component to read: None for the plain ones, "fp16" where there are only those.

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


def _reason(error: Exception) -> str:
    if match := _SIZE_MISMATCH.search(str(error)):
        name, found, expected = match.groups()
        return f"{name} is {found}, expected {expected} by config.json"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
