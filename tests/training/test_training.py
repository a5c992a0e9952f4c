"""Training runs: resumed ones end as if they had never stopped; the command line and what it writes."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from icportrait.errors import NotEnoughDisk
from icportrait.nn import Checkpoint, load_checkpoint, random_checkpoint, save_checkpoint
from tests.full_disk import full_disk
from tests.tiny import TINY
from tests.training.tiny import stage, write_views
from tests.unit.test_checkpoint import StableDiffusion
from training.__main__ import RECIPES, main
from training.data import RenderedPairs
from training.new_weights import new_checkpoint
from training.trainer import LOSSES, STATE, Trainer, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


# Resuming


def trainer_of(kind: str, source: RenderedPairs, directory: Path, **settings: Any) -> Trainer:
    return Trainer(stage(kind, source, random_checkpoint(TINY), **({"batch": 2} | settings)), directory)


def resumed(kind: str, source: RenderedPairs, directory: Path, **settings: Any) -> Trainer:
    """Run on with nothing but the directory."""
    trainer = trainer_of(kind, source, directory, **settings)
    trainer.resume()
    trainer.run()
    return trainer


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("kind", "steps", "optimizer"),
    [("vae", 6, "adamw"), ("matching", 6, "muon"), ("appearance", 12, "adamw"), ("refine", 6, "muon")],
)
def test_a_resumed_run_ends_as_an_unbroken_one(
    tiny_pairs: RenderedPairs, tmp_path: Path, kind: str, steps: int, optimizer: str
) -> None:
    """Compare to the bit, on one machine with one number of threads."""
    settings = {"steps": steps, "warmup_steps": steps // 3, "optimizer": optimizer}
    whole = trainer_of(kind, tiny_pairs, tmp_path / "whole", **settings)
    whole.run(steps // 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    whole.run()
    halves = resumed(kind, tiny_pairs, tmp_path / "halves", **settings)
    assert halves.step == whole.step == len(whole.losses) == steps
    assert halves.losses == whole.losses
    assert_same(weights(whole.stage.trained), weights(halves.stage.trained))
    assert_same(weights(whole.mean), weights(halves.mean))
    for name in (LOSSES, "checkpoint/warping_network/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_needs_all_of_its_state(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    settings = {"steps": 4, "warmup_steps": 4}
    whole = trainer_of("vae", tiny_pairs, tmp_path / "whole", **settings)
    whole.run(2)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    whole.run()
    new = trainer_of("vae", tiny_pairs, tmp_path / "new", **settings)
    at_the_start = {
        "modules": new.stage.trained.state_dict(),
        "mean": new.mean.state_dict(),
        "optimizer": new.optimizer.state_dict(),
        "generator": new.generator.get_state(),
    }
    for part, value in at_the_start.items():
        shutil.copytree(tmp_path / "half", tmp_path / part)
        state = torch.load(tmp_path / part / STATE, weights_only=True)
        torch.save(state | {part: value}, tmp_path / part / STATE)
        forgetful = resumed("vae", tiny_pairs, tmp_path / part, **settings)
        with pytest.raises(AssertionError):
            assert_same(weights(whole.mean), weights(forgetful.mean))


@pytest.mark.usefixtures("no_pictures")
def test_only_a_run_of_the_same_recipe_is_resumed(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"state.pt: is missing; start the run without --resume"):
        Trainer(stage("vae", tiny_pairs), tmp_path).resume()
    trainer_of("vae", tiny_pairs, tmp_path, steps=2).run(1)
    with pytest.raises(TrainingError, match=r"state.pt: was saved with batch 2, and the recipe has 3"):
        trainer_of("vae", tiny_pairs, tmp_path, steps=2, batch=3).resume()


# The loop


@pytest.mark.usefixtures("no_pictures")
def test_what_is_saved_is_the_running_mean(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    for decay, same in ((0.0, True), (0.999, False)):
        settings: dict[str, Any] = {"steps": 4, "ema_decay": decay, "warmup_steps": 0}
        trainer = trainer_of("matching", tiny_pairs, tmp_path / str(decay), **settings)
        trainer.run()
        network = load_checkpoint(tmp_path / str(decay) / "checkpoint").warping_network
        saved = weights(network.matching_net)
        assert_same(weights(trainer.mean.module["matching_net"]), saved)
        trained = weights(trainer.stage.trained["matching_net"])
        assert all(torch.allclose(saved[name], value, rtol=0, atol=1e-6) for name, value in trained.items()) is same
        assert all(module.training for module in trainer.stage.trained.modules())


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(TINY)
    with torch.no_grad():
        checkpoint.unet.conv_out.bias.fill_(torch.nan)
    trainer = Trainer(stage("appearance", tiny_pairs, checkpoint, steps=2), tmp_path)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; start again with a lower learning_rate"):
        trainer.run()
    assert not list(tmp_path.iterdir())


# The command


def command(kind: str, base: Path, out: Path, *settings: str, options: tuple[str, ...] = ()) -> int:
    settings = ("steps=2", "batch=2", "sample_every=1", "warmup_steps=0", "bf16=false", *settings)
    changes = [part for text in settings for part in ("--set", text)]
    return main([kind, "--base", str(base), "--out", str(out), "--device", "cpu", *changes, *options])


def parts(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    network = checkpoint.warping_network
    names = ("matching_net", "matching_head", "appearance_net", "zero_convs")
    return {"unet": checkpoint.unet, "vae": checkpoint.vae} | {name: getattr(network, name) for name in names}


def assert_trained(before: Checkpoint, out: Path, *expected: str) -> Checkpoint:
    """Check that only these parts changed, and that the run has all its records."""
    after = load_checkpoint(out / "checkpoint")
    changed = set()
    for name, part in parts(before).items():
        old, new = weights(part), weights(parts(after)[name])
        if not all(torch.equal(old[key], new[key]) for key in old):
            changed.add(name)
    assert changed == set(expected)
    rows = list(csv.DictReader((out / LOSSES).read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2"] and all(float(row["loss"]) > 0 for row in rows)
    assert sorted(path.name for path in out.glob("samples-*.png")) == ["samples-000001.png", "samples-000002.png"]
    for name in ("samples-000002.png", "losses.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    record = json.loads((out / "run.json").read_text())
    assert (record["step"], record["recipe"]["batch"], record["recipe"]["steps"]) == (2, 2, 2)
    assert record["stage"] == out.name
    return after


def test_a_model_is_trained_stage_by_stage(tiny_pairs: RenderedPairs, pair_cache: Path, tmp_path: Path) -> None:
    assert len(tiny_pairs) == 64  # rendered by now, so that the command finds them
    data = (f'data.cache="{pair_cache}"', "data.pairs=64")
    base = new_checkpoint(TINY)
    save_checkpoint(base, tmp_path / "base")
    assert command("vae", tmp_path / "base", tmp_path / "vae", *data) == 0
    coded = assert_trained(base, tmp_path / "vae", "vae")
    assert command("matching", tmp_path / "vae" / "checkpoint", tmp_path / "matching", *data) == 0
    matched = assert_trained(coded, tmp_path / "matching", "matching_net", "matching_head")
    appearance = ("appearance", tmp_path / "matching" / "checkpoint", tmp_path / "appearance", *data)
    assert command(*appearance, options=("--until", "1")) == 0
    assert json.loads((tmp_path / "appearance" / "run.json").read_text())["step"] == 1
    assert command(*appearance, options=("--resume",)) == 0
    assert_trained(matched, tmp_path / "appearance", "appearance_net", "zero_convs", "unet")


def test_a_stable_diffusion_model_is_adapted_to_a_folder_of_pictures(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    base = StableDiffusion(tmp_path / "base")
    write_views(tmp_path / "views", tiny_pairs.pairs[:2])
    options = ("--recipe", str(RECIPES / "sd15.toml"))
    data = f'data.pictures="{tmp_path / "views"}"'
    assert command("matching", base.directory, tmp_path / "matching", data, options=options) == 0
    matched = load_checkpoint(tmp_path / "matching" / "checkpoint")
    torch.testing.assert_close(weights(matched.unet), weights(base.unet), rtol=0, atol=0)
    base_parts = replace(
        matched, warping_network=matched.warping_network.from_unet(TINY, base.unet, matched.prompt_embedding)
    )
    assert_trained(base_parts, tmp_path / "matching", "matching_net", "matching_head")
    out = tmp_path / "appearance"
    assert command("appearance", tmp_path / "matching" / "checkpoint", out, data, options=options) == 0
    after = assert_trained(matched, out, "appearance_net", "zero_convs")
    assert after.scheduler_config["_class_name"] == "PNDMScheduler"


@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk_ends_a_run_in_one_sentence_and_its_last_save_is_whole(
    tiny_pairs: RenderedPairs, tmp_path: Path
) -> None:
    trainer = trainer_of("vae", tiny_pairs, tmp_path / "run", steps=2, save_every=1)
    trainer.run(until=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    largest = max(before, key=lambda path: len(before[path]))
    assert largest.name == STATE
    with full_disk(len(before[largest]) - 1), pytest.raises(NotEnoughDisk, match="too large while writing the run, "):
        trainer.run()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint", STATE, LOSSES, "run.json"}
    assert largest.read_bytes() == before[largest]
    resumed("vae", tiny_pairs, tmp_path / "run", steps=2, save_every=1)


def test_callers_never_see_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(new_checkpoint(TINY), tmp_path / "base")
    (tmp_path / "views" / "someone").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (tmp_path / "views" / "someone" / name).write_text("no picture")
    wrong: list[tuple[Path, tuple[str, ...], tuple[str, ...], str]] = [
        (tmp_path / "nowhere", (), (), "nowhere"),
        (tmp_path / "base", ("step=1",), (), "step is unknown"),
        (tmp_path / "base", ('data.pictures="nobody"',), (), "nobody has no folder"),
        (tmp_path / "base", (f'data.pictures="{tmp_path / "views"}"',), (), "a.png"),
        (
            tmp_path / "base",
            (f'data.pictures="{tmp_path / "views"}"',),
            ("--resume",),
            "start the run without --resume",
        ),
    ]
    for base, settings, options, message in wrong:
        assert command("vae", base, tmp_path / "out", *settings, options=options) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "empty.toml").write_text("")
    assert main(["vae", "--recipe", str(tmp_path / "empty.toml"), "--out", str(tmp_path / "out")]) == 1
    assert "preset is '', expected one of demo-128, sd15-512; or name a --base" in capsys.readouterr().err
