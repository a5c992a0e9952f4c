"""Checkpoints: geometry, files, what is refused, and the adaptation of Stable Diffusion models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from export.adapt import main as adapt
from icportrait.errors import CheckpointError, NotEnoughDisk
from icportrait.nn import (
    Checkpoint,
    WarpingNetwork,
    engine_modules,
    from_stable_diffusion,
    load_checkpoint,
    random_checkpoint,
    save_checkpoint,
)
from icportrait.nn.geometry import preset_from_configs, unet_config, unet_from_preset, vae_config, vae_from_preset
from icportrait.presets import DEMO_128, SD15_512, Preset
from tests.full_disk import full_disk
from tests.tiny import TINY

MODELS = ("unet", "vae", "warping_network")
WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a checkpoint was looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_checkpoint(random_checkpoint(TINY), directory)
    return directory


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """Copy a checkpoint that the test may change."""
    return shutil.copytree(saved_once, tmp_path / "checkpoint")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], Any], target: Path | None = None) -> None:
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    edit(weights)
    save_file(weights, target or path, metadata={"format": "pt"})


def to_half(weights: dict[str, Tensor]) -> None:
    weights.update({name: weight.half() for name, weight in weights.items()})


def assert_same_weights(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    expected, got = first.state_dict(), second.state_dict()
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, **(tolerance or {"rtol": 0, "atol": 0}))


# Geometry

PUBLISHED_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
PUBLISHED_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""Stable Diffusion 1.5's ``config.json`` files."""


def published_preset(unet: dict[str, Any], vae: dict[str, Any] | None = None, **options: Any) -> Preset:
    return preset_from_configs(PUBLISHED_UNET | unet, PUBLISHED_VAE | (vae or {}), prompt_tokens=77, **options)


def test_sd15_models_are_stable_diffusion_15s() -> None:
    with torch.device("meta"):
        unet, vae = unet_from_preset(SD15_512), vae_from_preset(SD15_512)
    assert unet.num_parameters() == 859_520_964
    assert vae.num_parameters() == 83_653_863
    for model, published in ((unet, PUBLISHED_UNET), (vae, PUBLISHED_VAE)):
        for name, value in published.items():
            if not name.startswith("_"):
                built = model.config[name]
                assert (list(built) if isinstance(built, tuple) else built) == value, name


def test_published_configs_are_the_known_preset() -> None:
    assert published_preset({}) is SD15_512
    assert published_preset({"upcast_attention": None}) is SD15_512
    demo = preset_from_configs(unet_config(DEMO_128), vae_config(DEMO_128), prompt_tokens=4)
    assert demo is DEMO_128


def test_other_sizes_make_a_custom_preset() -> None:
    preset = published_preset({}, image_size=256)
    assert preset == dataclasses.replace(SD15_512, name="custom", image_size=256)
    tiny = preset_from_configs(unet_config(TINY), vae_config(TINY), prompt_tokens=6)
    assert dataclasses.replace(tiny, max_warping_batch=TINY.max_warping_batch) == TINY


@pytest.mark.parametrize(
    ("unet", "vae", "named"),
    [
        ({"in_channels": 9}, {}, r"unet/config.json: in_channels is 9, supported: 4"),
        (
            {"attention_head_dim": [5, 10, 20, 20]},
            {},
            r"attention_head_dim is \[5, 10, 20, 20\], supported: one integer",
        ),
        ({"addition_embed_type": "text_time"}, {}, "addition_embed_type is 'text_time', supported: None"),
        ({"class_embed_type": "projection"}, {}, "class_embed_type is 'projection'"),
        ({"cross_attention_dim": [768, 768, 768, 768]}, {}, r"cross_attention_dim is \[768"),
        ({"use_linear_projection": True}, {}, "use_linear_projection is True, supported: False"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, {}, "down_block_types has 'AttnDownBlock2D', supported: Cross"),
        ({"up_block_types": ["UpBlock2D"] * 4}, {}, r"up_block_types is \['UpBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2D"}, {}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"act_fn": "gelu"}, {}, "act_fn is 'gelu', supported: 'silu'"),
        ({"norm_eps": 1e-6}, {}, "norm_eps is 1e-06"),
        ({"layers_per_block": [2, 2, 2, 2]}, {}, "layers_per_block is"),
        ({"layers_per_block": 3000}, {}, "layers_per_block is 3000, supported: one integer of 1 to 64"),
        ({}, {"layers_per_block": 3000}, "vae/config.json: layers_per_block is 3000, supported: one integer of"),
        ({"sample_size": None}, {}, "sample_size is None.*image_size"),
        ({"a_new_switch": 1}, {}, "a_new_switch isn't an entry that is known"),
        ({}, {"latent_channels": 16}, "unet/config.json: in_channels is 4, supported: 16"),
        ({}, {"latents_mean": [0.0]}, "vae/config.json: latents_mean"),
        ({}, {"use_quant_conv": False}, "vae/config.json: use_quant_conv is False, supported: True"),
        ({"sample_size": 65}, {}, "image_size is 520, expected a multiple of 64"),
        ({"sample_size": True}, {}, "sample_size is True, expected an integer of 1 to 1048576"),
        ({"down_block_types": [["DownBlock2D"]]}, {}, r"down_block_types has \['DownBlock2D'\], supported: Cross"),
        ({"reverse_transformer_layers_per_block": []}, {}, r"layers_per_block is \[\], supported: None"),
        ({"down_block_types": 4}, {}, "down_block_types is 4, expected a name for each level"),
        ({"block_out_channels": 320}, {}, "unet/config.json: block_out_channels is 320, expected an integer of 1 to"),
        ({}, {"block_out_channels": [128, "256"]}, r"vae/config.json: block_out_channels is \[128, '256'\], expected"),
        ({}, {"block_out_channels": [1] * 17}, "block_out_channels is .* for each of 1 to 16 levels"),
        ({"norm_num_groups": 0}, {}, "norm_num_groups is 0, supported: one integer of 1 to"),
        ({}, {"layers_per_block": [2, 2]}, r"vae/config.json: layers_per_block is \[2, 2\], supported: one integer"),
        ({}, {"latent_channels": None}, "vae/config.json: latent_channels is None"),
        ({}, {"scaling_factor": "1"}, "vae/config.json: scaling_factor is '1', expected a number above 0"),
        ({}, {"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({}, {"scaling_factor": 10**400}, "scaling_factor is 1000.* at most 1048576"),
        ({}, {"latent_channels": 2**20 + 1}, "latent_channels is 1048577"),
    ],
)
def test_unsupported_geometries_are_refused_by_name(unet: dict[str, Any], vae: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        published_preset(unet, vae)


# Random checkpoints


def test_random_weights_follow_the_seed() -> None:
    first, again, other = random_checkpoint(TINY, 3), random_checkpoint(TINY, 3), random_checkpoint(TINY, 4)
    for name in MODELS:
        assert_same_weights(getattr(first, name), getattr(again, name))
        assert not torch.equal(*(next(getattr(draw, name).parameters()) for draw in (first, other)))
    assert torch.equal(first.prompt_embedding, again.prompt_embedding)
    assert torch.equal(first.warping_network.prompt_embedding, first.prompt_embedding)


def test_random_weights_leave_nothing_unset() -> None:
    checkpoint = random_checkpoint(TINY)
    for name in MODELS:
        for key, weight in getattr(checkpoint, name).state_dict().items():
            assert weight.device.type == "cpu" and weight.isfinite().all(), key
            assert weight.any() or key.endswith("bias"), key
    assert all(net.conv_in.weight[:, 4].any() for net in (checkpoint.warping_network.matching_net,))


# Files


def test_round_trip(saved: Path) -> None:
    checkpoint = dataclasses.replace(random_checkpoint(TINY), guidance_scale=2.5, num_inference_steps=7)
    save_checkpoint(checkpoint, saved)
    loaded = load_checkpoint(saved)
    for name in MODELS:
        assert_same_weights(getattr(checkpoint, name), getattr(loaded, name))
        assert not getattr(loaded, name).training
    assert torch.equal(loaded.prompt_embedding, checkpoint.prompt_embedding)
    assert loaded.scheduler_config == checkpoint.scheduler_config
    assert (loaded.guidance_scale, loaded.num_inference_steps) == (2.5, 7)
    assert dataclasses.replace(loaded.preset, max_warping_batch=TINY.max_warping_batch) == TINY


def test_a_checkpoint_can_be_saved_over_itself(saved: Path) -> None:
    before = load_checkpoint(saved)
    expected = before.unet.conv_in.weight.clone()
    save_checkpoint(before, saved)
    assert torch.equal(load_checkpoint(saved).unet.conv_in.weight, expected)
    assert sorted(path.name for path in saved.iterdir()) == [
        "model_index.json",
        "prompt_embedding.safetensors",
        "scheduler",
        "unet",
        "vae",
        "warping_network",
    ]
    assert str(saved.parent) not in (saved / "unet" / "config.json").read_text()


def test_an_interrupted_save_leaves_nothing_that_loads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(saved)
    replace = Path.replace

    def fail_at_the_vae(self: Path, target: Path) -> Path:
        if "vae" in target.parts:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_vae)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(checkpoint, saved)
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        load_checkpoint(saved)


def test_the_known_presets_keep_their_name(tmp_path: Path) -> None:
    save_checkpoint(random_checkpoint(DEMO_128), tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["preset"] == "demo-128"
    assert load_checkpoint(tmp_path).preset is DEMO_128


def test_half_precision_files_are_read_as_fp32(saved: Path) -> None:
    original = load_checkpoint(saved)
    files = [saved / name / WEIGHTS for name in MODELS] + [saved / "prompt_embedding.safetensors"]
    for file in files:
        edit_weights(file, to_half)
    loaded = load_checkpoint(saved)
    for name in MODELS:
        assert {weight.dtype for weight in getattr(loaded, name).state_dict().values()} == {torch.float32}
        assert_same_weights(getattr(original, name), getattr(loaded, name), rtol=1e-3, atol=1e-4)
    assert loaded.prompt_embedding.dtype == torch.float32


def test_the_fp16_variant_is_read_where_there_is_only_that(saved: Path) -> None:
    original = load_checkpoint(saved)
    file = saved / "unet" / WEIGHTS
    variant = file.with_name("diffusion_pytorch_model.fp16.safetensors")
    edit_weights(file, to_half, variant)
    assert_same_weights(original.unet, load_checkpoint(saved).unet)
    file.unlink()
    loaded = load_checkpoint(saved)
    assert loaded.unet.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, original.unet.conv_in.weight.half().float())


def test_shards_are_read(saved: Path) -> None:
    original = load_checkpoint(saved)
    (saved / "unet" / WEIGHTS).unlink()
    original.unet.save_pretrained(saved / "unet", max_shard_size="100KB")
    assert len(list((saved / "unet").glob("*.safetensors"))) > 1
    assert_same_weights(original.unet, load_checkpoint(saved).unet)


def test_the_warping_network_is_an_ordinary_diffusers_component(tmp_path: Path) -> None:
    network = random_checkpoint(TINY).warping_network
    network.save_pretrained(tmp_path)
    loaded = WarpingNetwork.from_pretrained(tmp_path, use_safetensors=True, low_cpu_mem_usage=False)
    assert_same_weights(network, loaded)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "prompt_embedding.safetensors",
        "scheduler/scheduler_config.json",
        *(f"{model}/{file}" for model in MODELS for file in ("config.json", WEIGHTS)),
    ],
)
def test_missing_files_are_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(file).name}.* missing") as refusal:
        load_checkpoint(saved)
    assert str(saved / Path(file).parent) in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "'StableDiffusionPipeline', expected.*from_stable_diffusion"),
        ({"_class_name": "FluxPipeline"}, "_class_name is 'FluxPipeline', expected 'ICPortraitPipeline'$"),
        ({"unet": ["diffusers", "UNet2DModel"]}, r"unet is \['diffusers', 'UNet2DModel'\], expected"),
        ({"warping_network": None}, r"warping_network is None, expected \['icportrait.nn', 'WarpingNetwork'\]"),
        ({"preset": "sd21"}, "preset is 'sd21', expected one of demo-128"),
        ({"preset": "demo-128"}, "isn't of the preset demo-128: image_size: 32, 128"),
        ({"image_size": "32"}, "image_size is '32', expected pixels"),
        ({"image_size": 64}, "warping_network/config.json: differs from the rest.*image_size: 32, 64"),
        ({"mask_patch_px": True}, "mask_patch_px is True"),
        ({"mask_patch_px": 3}, "mask_patch_px is 3, expected a divisor"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5, expected a number of at least 1"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"guidance_scale": 10**400}, "guidance_scale is 1000"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_a_wrong_model_index_is_refused(saved: Path, changes: dict[str, Any], named: str) -> None:
    edit_json(saved / "model_index.json", **changes)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(saved)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167540\n"


@pytest.mark.parametrize("file", ["unet/config.json", f"vae/{WEIGHTS}", "prompt_embedding.safetensors"])
def test_a_git_lfs_pointer_is_named(saved: Path, file: str) -> None:
    (saved / file).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{Path(file).name}: a git-lfs pointer .*: git lfs pull$"):
        load_checkpoint(saved)


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", "prompt_embedding.safetensors"])
@pytest.mark.parametrize("lacks", [1, 100])
def test_weights_that_were_cut_off_are_named_with_both_sizes(saved: Path, file: str, lacks: int) -> None:
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[:-lacks])
    text = f"{Path(file).name}: cut off: {len(data) - lacks:,} bytes, expected {len(data):,}; copy or download it again"
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_checkpoint(saved)


@pytest.mark.parametrize("length", [0, 7, 8, 20])
def test_weights_without_a_header_are_damaged(saved: Path, length: int) -> None:
    (saved / "unet" / WEIGHTS).write_bytes((saved / "unet" / WEIGHTS).read_bytes()[:length])
    with pytest.raises(CheckpointError, match="unet"):
        load_checkpoint(saved)


@pytest.mark.parametrize("read", [load_checkpoint, from_stable_diffusion])
def test_a_single_file_is_told_how_it_becomes_a_directory(tmp_path: Path, read: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path / "model.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"model.safetensors: all in one file, .*from_single_file\(FILE\)"):
            read(path)
    with pytest.raises(CheckpointError, match="there is no such directory"):
        read(tmp_path / "gone")


@pytest.mark.parametrize("writer", ["UniPCMultistepScheduler", "LCMScheduler"])
def test_another_sampler_is_told(saved: Path, caplog: pytest.LogCaptureFixture, writer: str) -> None:
    edit_json(saved / "scheduler" / "scheduler_config.json", _class_name=writer)
    load_checkpoint(saved)
    assert (
        f"{writer} isn't a sampler here; its noise levels hold, and requests run by ddim, euler, dpmpp_2m"
        in caplog.text
    )


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_broken_json_is_named(saved: Path, file: str, content: str) -> None:
    (saved / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=Path(file).name):
        load_checkpoint(saved)


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_dont_fit_are_named(saved: Path, model: str) -> None:
    file = saved / model / WEIGHTS
    first = next(iter(load_file(file)))

    edit_weights(file, lambda weights: weights.update({first: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=rf"{model}: {first} is \[3, 5\], expected \["):
        load_checkpoint(saved)
    edit_weights(file, lambda weights: weights.pop(first))
    with pytest.raises(CheckpointError, match=f"{model}: 1 weights are missing .*{first}"):
        load_checkpoint(saved)


def test_weights_nothing_takes_are_refused(saved: Path) -> None:
    edit_weights(saved / "unet" / WEIGHTS, lambda weights: weights.update({"ip_adapter.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unet: 1 weights are unexpected .*ip_adapter\.weight"):
        load_checkpoint(saved)


@pytest.mark.parametrize("file", ["prompt_embedding.safetensors", f"vae/{WEIGHTS}"])
def test_truncated_weights_are_refused(saved: Path, file: str) -> None:
    (saved / file).write_bytes((saved / file).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=file.split("/")[0]):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"embedding": torch.zeros(1, 6, 12)}, "has embedding, expected 'prompt_embedding'"),
        ({"prompt_embedding": torch.zeros(6, 12)}, r"is \[6, 12\], expected \[1, tokens, cross_attention_dim\]"),
        ({"prompt_embedding": torch.zeros(1, 6, 8)}, "has 8 channels, expected the UNet's cross_attention_dim, 12"),
        ({"prompt_embedding": torch.full((1, 6, 12), torch.nan)}, "finite"),
        ({"prompt_embedding": torch.zeros(1, 6, 12)}, "another prompt"),
        ({"prompt_embedding": torch.zeros(1, 5, 12)}, "prompt_tokens: 6, 5"),
    ],
)
def test_a_wrong_prompt_embedding_is_refused(saved: Path, tensors: dict[str, Tensor], named: str) -> None:
    save_file(tensors, saved / "prompt_embedding.safetensors")
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(saved)


def test_a_schedule_that_cant_be_sampled_is_refused(saved: Path) -> None:
    edit_json(saved / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(CheckpointError, match=r"scheduler: scheduler_config.json: prediction_type is 'sample'"):
        load_checkpoint(saved)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
@pytest.mark.parametrize("model", MODELS)
def test_pickles_are_never_read(saved: Path, model: str, name: str) -> None:
    (saved / model / WEIGHTS).unlink()
    (saved / model / name).write_bytes(pickle.dumps(Trap(saved / "sprung")))
    with pytest.raises(CheckpointError, match=f"{model}: has only {name}, expected {WEIGHTS}.*convert"):
        load_checkpoint(saved)
    assert not (saved / "sprung").exists()


# Adaptation of Stable Diffusion


class StableDiffusion:
    """A tiny model in Stable Diffusion 1.5's layout, as diffusers and transformers write it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.unet, self.vae = UNet2DConditionModel(**unet_config(TINY)).eval(), vae_from_preset(TINY)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=20,
                hidden_size=TINY.cross_attention_dim,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TINY.prompt_tokens,
                bos_token_id=18,
                eos_token_id=19,
            )
        ).eval()
        for name in ("unet", "vae", "text_encoder"):
            getattr(self, name).save_pretrained(directory / name)
        PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
        ).save_pretrained(directory / "scheduler")
        (directory / "safety_checker").mkdir()
        (directory / "safety_checker" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(directory / "sprung")))
        (directory / "model_index.json").write_text(
            json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
        )

    def embed(self, *ids: int) -> Tensor:
        with torch.no_grad():
            return self.text_encoder(torch.tensor([ids])).last_hidden_state

    def add_tokenizer(self) -> None:
        tokenizer = self.directory / "tokenizer"
        tokenizer.mkdir()
        vocabulary = {"a</w>": 0, "b</w>": 1, "a": 2, "b": 3, "ab</w>": 4, "<|startoftext|>": 18, "<|endoftext|>": 19}
        (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
        (tokenizer / "merges.txt").write_text("#version: 0.2\na b</w>\n")


@pytest.fixture
def base(tmp_path: Path) -> StableDiffusion:
    return StableDiffusion(tmp_path / "base")


def predict(checkpoint: Checkpoint, canvas: Tensor, timestep: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Predict under the ``F_ref`` of random latents, and return that ``F_ref`` too."""
    modules = engine_modules(checkpoint)
    latents = torch.randn(2, 2, 4, TINY.latent_size, TINY.latent_size)
    visibility = (torch.rand(2, 1, TINY.latent_size, TINY.latent_size) > 0.8).float()
    with torch.inference_mode():
        f_ref = modules["warping_network"](*latents, visibility)[: len(TINY.residuals)]
        return modules["unet"](canvas, timestep, *f_ref), f_ref


def test_the_adapted_model_predicts_what_its_base_does(base: StableDiffusion) -> None:
    checkpoint = from_stable_diffusion(base.directory)
    canvas, timestep = torch.randn(2, 4, TINY.latent_size, 2 * TINY.latent_size), torch.tensor([1.0, 800.0])
    prediction, f_ref = predict(checkpoint, canvas, timestep)
    with torch.inference_mode():
        prompt = base.embed(18, 19, 19, 19, 19, 19).expand(2, -1, -1)
        expected = base.unet(canvas, timestep, prompt).sample
    assert not any(residual.any() for residual in f_ref)
    assert (prediction - expected).abs().max() <= 1e-5
    assert_same_weights(base.unet, checkpoint.unet)
    assert_same_weights(base.vae, checkpoint.vae)
    assert checkpoint.preset.name == "custom" and checkpoint.preset.image_size == TINY.image_size
    assert checkpoint.scheduler_config["_class_name"] == "PNDMScheduler"
    assert checkpoint.scheduler_config["beta_end"] == 0.012
    assert checkpoint.guidance_scale == 1.0
    assert not (base.directory / "sprung").exists()


def test_a_scheduler_that_clips_pixels_is_taken_over_without_clipping(base: StableDiffusion) -> None:
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(base.directory / "scheduler")
    config = json.loads((base.directory / "scheduler" / "scheduler_config.json").read_text())
    assert config["clip_sample"] is True
    assert from_stable_diffusion(base.directory).scheduler_config == config | {"clip_sample": False}


def test_the_control_nets_start_as_the_bases_encoder(base: StableDiffusion) -> None:
    network = from_stable_diffusion(base.directory).warping_network
    expected = base.unet.state_dict()
    for net in (network.matching_net, network.appearance_net):
        weights = net.state_dict()
        assert any(name.startswith("mid_block") for name in weights)
        conv_in = weights.pop("conv_in.weight")
        assert torch.equal(conv_in[:, :4], expected["conv_in.weight"]) and not conv_in[:, 4].any()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    # Separate weights: training one net leaves the other and the UNet alone.
    nn.init.zeros_(network.matching_net.conv_in.weight)
    assert network.appearance_net.conv_in.weight.any()


def test_an_adapted_model_survives_the_round_trip(base: StableDiffusion, tmp_path: Path) -> None:
    adapted = from_stable_diffusion(base.directory)
    save_checkpoint(adapted, tmp_path / "adapted")
    loaded = load_checkpoint(tmp_path / "adapted")
    assert loaded.scheduler_config == adapted.scheduler_config
    assert torch.equal(loaded.prompt_embedding, adapted.prompt_embedding)
    for name in MODELS:
        assert_same_weights(getattr(adapted, name), getattr(loaded, name))


def test_the_prompt_goes_through_the_tokenizer(base: StableDiffusion) -> None:
    base.add_tokenizer()
    empty = from_stable_diffusion(base.directory).prompt_embedding
    torch.testing.assert_close(empty, base.embed(18, 19, 19, 19, 19, 19))
    prompted = from_stable_diffusion(base.directory, prompt="ab a").prompt_embedding
    torch.testing.assert_close(prompted, base.embed(18, 4, 0, 19, 19, 19))


def test_an_old_configs_placeholder_tokens_arent_used(base: StableDiffusion) -> None:
    edit_json(base.directory / "text_encoder" / "config.json", bos_token_id=0, eos_token_id=2)
    embedding = from_stable_diffusion(base.directory).prompt_embedding
    torch.testing.assert_close(embedding, base.embed(18, 19, 19, 19, 19, 19))


def test_token_ids_outside_the_vocabulary_are_refused(base: StableDiffusion) -> None:
    edit_json(base.directory / "text_encoder" / "config.json", bos_token_id=49406, eos_token_id=49407)
    with pytest.raises(CheckpointError, match=r"vocab_size is 20, but .* 49406..49407"):
        from_stable_diffusion(base.directory)


def test_a_prompt_needs_a_tokenizer(base: StableDiffusion) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer: the directory is missing, expected for the prompt 'ab'"):
        from_stable_diffusion(base.directory, prompt="ab")


def test_the_command_adapts_a_directory_of_the_fp16_variant(
    base: StableDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("unet", "vae"):
        getattr(base, model).half().save_pretrained(base.directory / model, variant="fp16")
        (base.directory / model / WEIGHTS).unlink()
    assert adapt(["--stable-diffusion", str(base.directory), "--out", str(tmp_path / "adapted")]) == 0
    assert "adapted: custom; F_ref is zero until the checkpoint is trained" in capsys.readouterr().out
    assert_same_weights(load_checkpoint(tmp_path / "adapted").unet, base.unet.float())
    for model in MODELS:
        stored = load_file(tmp_path / "adapted" / model / WEIGHTS)
        assert {weight.dtype for weight in stored.values()} == {torch.float16}, model
    shutil.rmtree(base.directory / "vae")
    assert adapt(["--stable-diffusion", str(base.directory), "--out", str(tmp_path / "adapted")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_plain_vae_beside_an_fp16_unet_loses_no_bit(base: StableDiffusion, tmp_path: Path) -> None:
    vae = load_file(base.directory / "vae" / WEIGHTS)
    base.unet.half().save_pretrained(base.directory / "unet", variant="fp16")
    (base.directory / "unet" / WEIGHTS).unlink()
    assert adapt(["--stable-diffusion", str(base.directory), "--out", str(tmp_path / "adapted")]) == 0
    for model, dtype in (("unet", torch.float16), ("warping_network", torch.float16), ("vae", torch.float32)):
        stored = load_file(tmp_path / "adapted" / model / WEIGHTS)
        assert {weight.dtype for weight in stored.values()} == {dtype}, model
    assert all(torch.equal(stored[name], weight) for name, weight in vae.items())


def test_a_full_disk_ends_an_adaptation_in_one_sentence_and_leaves_no_half(
    base: StableDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "adapted"
    with full_disk(100_000):
        assert adapt(["--stable-diffusion", str(base.directory), "--out", str(out)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {out}: File too large while writing the checkpoint, about ")
    assert not out.exists()


def test_a_full_disk_leaves_the_checkpoint_that_was_to_be_replaced(saved: Path) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with full_disk(100_000), pytest.raises(NotEnoughDisk):
        save_checkpoint(random_checkpoint(TINY, seed=1), saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert not list(saved.glob(".saving-*"))


@pytest.mark.parametrize("shape", [(6, 12), (1, 6, 12)])
def test_an_embedding_file_replaces_the_text_encoder(base: StableDiffusion, shape: tuple[int, ...]) -> None:
    shutil.rmtree(base.directory / "text_encoder")
    embedding, file = torch.randn(shape), base.directory / "prompt.safetensors"
    save_file({"prompt_embedding": embedding}, file)
    checkpoint = from_stable_diffusion(base.directory, prompt_embedding=file)
    assert torch.equal(checkpoint.prompt_embedding, embedding.view(1, 6, 12))
    assert torch.equal(checkpoint.warping_network.prompt_embedding, embedding.view(1, 6, 12))
    with pytest.raises(CheckpointError, match="not both"):
        from_stable_diffusion(base.directory, prompt_embedding=file, prompt="ab")


def test_neither_text_encoder_nor_embedding_names_both_ways(base: StableDiffusion) -> None:
    shutil.rmtree(base.directory / "text_encoder")
    with pytest.raises(CheckpointError, match=r"no text_encoder/ .*or give prompt_embedding, a .safetensors file"):
        from_stable_diffusion(base.directory)


@pytest.mark.parametrize("shape", [(2, 6, 12), (12,), (6, 8)])
def test_embedding_files_of_other_shapes_are_refused(base: StableDiffusion, shape: tuple[int, ...]) -> None:
    file = base.directory / "prompt.safetensors"
    save_file({"prompt_embedding": torch.zeros(shape)}, file)
    with pytest.raises(CheckpointError, match="prompt"):
        from_stable_diffusion(base.directory, prompt_embedding=file)


def test_embedding_files_that_arent_safetensors_are_refused(base: StableDiffusion) -> None:
    file = base.directory / "prompt.pt"
    file.write_bytes(pickle.dumps(Trap(base.directory / "sprung")))
    with pytest.raises(CheckpointError, match=r"only .safetensors files are read"):
        from_stable_diffusion(base.directory, prompt_embedding=file)
    assert not (base.directory / "sprung").exists()


def test_another_image_size_can_be_asked_for(base: StableDiffusion) -> None:
    preset = from_stable_diffusion(base.directory, image_size=48).preset
    assert (preset.image_size, preset.latent_size) == (48, 24)
    with pytest.raises(CheckpointError, match="image_size is 47"):
        from_stable_diffusion(base.directory, image_size=47)


def test_fp16_variants_are_adapted_as_fp32(base: StableDiffusion) -> None:
    for component, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        file = base.directory / component / f"{stem}.safetensors"
        edit_weights(file, to_half, file.with_name(f"{stem}.fp16.safetensors"))
        file.unlink()
    file = base.directory / "text_encoder" / "model.safetensors"
    edit_weights(file, to_half, file.with_name("model.fp16.safetensors"))
    file.unlink()
    checkpoint = from_stable_diffusion(base.directory)
    assert_same_weights(base.unet, checkpoint.unet, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        checkpoint.prompt_embedding, base.embed(18, 19, 19, 19, 19, 19), rtol=1e-2, atol=1e-2, check_dtype=True
    )


def test_published_names_of_old_weights_are_understood(base: StableDiffusion) -> None:
    """Write the VAE's attention and the text encoder in the older way of Stable Diffusion 1.5's files."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename_vae(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "mid_block.attentions" in name]:
            new = next((part for part in old if f".{part}." in name), None)
            if new:
                weights[name.replace(f".{new}.", f".{old[new]}.")] = weights.pop(name)

    def rename_text_encoder(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[f"text_model.{name.removeprefix('text_model.')}"] = weights.pop(name)
        weights["text_model.embeddings.position_ids"] = torch.arange(6).unsqueeze(0)

    edit_weights(base.directory / "vae" / WEIGHTS, rename_vae)
    edit_weights(base.directory / "text_encoder" / "model.safetensors", rename_text_encoder)
    assert any(".query." in name for name in load_file(base.directory / "vae" / WEIGHTS))
    checkpoint = from_stable_diffusion(base.directory)
    assert_same_weights(base.vae, checkpoint.vae)
    torch.testing.assert_close(checkpoint.prompt_embedding, base.embed(18, 19, 19, 19, 19, 19))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_components_with_pickles_only_arent_adapted(base: StableDiffusion, component: str) -> None:
    for file in (base.directory / component).glob("*.safetensors"):
        file.unlink()
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    (base.directory / component / name).write_bytes(pickle.dumps(Trap(base.directory / "sprung")))
    with pytest.raises(CheckpointError, match=f"{component}: has only {name}.*convert"):
        from_stable_diffusion(base.directory)
    assert not (base.directory / "sprung").exists()


@pytest.mark.parametrize("component", ["unet", "vae", "scheduler"])
def test_missing_components_are_named(base: StableDiffusion, component: str) -> None:
    shutil.rmtree(base.directory / component)
    with pytest.raises(CheckpointError, match=f"{component}.* missing"):
        from_stable_diffusion(base.directory)


def test_unsupported_bases_are_refused(base: StableDiffusion) -> None:
    edit_json(base.directory / "unet" / "config.json", addition_embed_type="text_time")
    with pytest.raises(CheckpointError, match=r"base: unet/config.json: addition_embed_type is 'text_time'"):
        from_stable_diffusion(base.directory)


def test_the_two_kinds_of_directories_arent_confused(base: StableDiffusion, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="is an IC-Portrait checkpoint already; read it with load_checkpoint"):
        from_stable_diffusion(saved)
    with pytest.raises(CheckpointError, match=r"adapt it with icportrait\.nn\.from_stable_diffusion"):
        load_checkpoint(base.directory)
