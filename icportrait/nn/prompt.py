"""The constant prompt's embedding: from a Stable Diffusion text encoder, or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from icportrait.errors import CheckpointError
from icportrait.nn.component_files import read_tensor, weights_variant

_PLACEHOLDER_EOS = 2
"""Number in CLIP configurations of Stable Diffusion 1.5's time, in place of the real end token."""


def read_prompt_embedding(path: Path) -> Tensor:
    """Read ``prompt_embedding``, [tokens, channels] or [1, tokens, channels], of a safetensors file.

    Returns:
        [1, tokens, channels] float32.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    embedding = read_tensor(path, "prompt_embedding")
    if embedding.ndim == 2:
        embedding = embedding.unsqueeze(0)
    if embedding.ndim != 3 or embedding.shape[0] != 1:
        raise CheckpointError(
            f"{path}: prompt_embedding is {list(embedding.shape)}, expected [tokens, channels] or [1, tokens, channels]"
        )
    return embedding


@torch.no_grad()
def encode_prompt(directory: Path, prompt: str) -> Tensor:
    """Embed a prompt as Stable Diffusion 1.5 does: CLIP's last hidden state, padded with end tokens, without a mask.

    Args:
        directory: a Stable Diffusion directory with ``text_encoder/``, and ``tokenizer/`` unless the prompt is empty.
        prompt: the text.

    Returns:
        [1, tokens, channels] float32.

    Raises:
        CheckpointError: a component is missing, isn't safetensors, or the token ids aren't in its vocabulary.
    """
    text_encoder = _read_text_encoder(directory / "text_encoder")
    tokenizer = directory / "tokenizer"
    if tokenizer.is_dir():
        ids = _tokenize(tokenizer, prompt, text_encoder.config.max_position_embeddings)
    elif prompt:
        raise CheckpointError(f"{tokenizer}: the directory is missing, expected for the prompt {prompt!r}")
    else:
        ids = _empty_prompt_ids(text_encoder.config)
    vocabulary = text_encoder.config.vocab_size
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise CheckpointError(
            f"{directory / 'text_encoder' / 'config.json'}: vocab_size is {vocabulary}, but the prompt's token ids are "
            f"{min(ids)}..{max(ids)}; give prompt_embedding instead"
        )
    hidden: Tensor = text_encoder(torch.tensor([ids])).last_hidden_state
    return hidden


def _read_text_encoder(directory: Path) -> Any:
    variant = weights_variant(directory, "model")
    try:
        model, info = CLIPTextModel.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: {str(error).splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{directory}: {len(missing)} weights are missing, first {missing[0]}")
    return model.eval()


def _tokenize(directory: Path, prompt: str, length: int) -> list[int]:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
        ids: list[int] = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory}: can't be read as a CLIP tokenizer: {error}") from error
    return ids


def _empty_prompt_ids(config: Any) -> list[int]:
    """Return the begin token and end tokens up to the full length, as CLIP's tokenizer makes of the empty prompt."""
    begin, end = config.bos_token_id, config.eos_token_id
    if end == _PLACEHOLDER_EOS:
        begin, end = config.vocab_size - 2, config.vocab_size - 1  # CLIP's vocabulary ends with these two
    return [begin] + [end] * (config.max_position_embeddings - 1)
