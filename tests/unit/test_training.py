"""Training runs: resumed ones end as if they had never stopped; recipes; the command line and what it writes."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from icportrait.nn import Checkpoint, load_checkpoint, random_checkpoint, save_checkpoint
from icportrait.presets import PRESETS
from tests.tiny import TINY
from tests.tiny_training import stage, write_views
from tests.unit.test_checkpoint import StableDiffusion
from training.__main__ import RECIPES, main
from training.data import RenderedPairs
from training.new_weights import new_checkpoint
from training.recipe import STAGES, Data, RecipeError, load_recipe
from training.trainer import LOSSES, STATE, Trainer, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


# Resuming

SLIM = replace(TINY, layers_per_block=1, vae_layers_per_block=1)


def run(kind: str, source: RenderedPairs, directory: Path, *stops: int, **settings: Any) -> Trainer:
    """Train up to each stop in turn, each time from nothing but the directory."""
    for stop in stops:
        trainer = Trainer(
            stage(kind, source, random_checkpoint(SLIM), **({"batch": 2, "steps": stops[-1]} | settings)), directory
        )
        if (directory / STATE).is_file():
            trainer.resume()
        trainer.run(stop)
    return trainer


@pytest.mark.parametrize(("kind", "steps"), [("vae", 6), ("matching", 6), ("appearance", 100)])
def test_a_resumed_run_ends_as_an_unbroken_one(
    tiny_pairs: RenderedPairs, tmp_path: Path, kind: str, steps: int
) -> None:
    """To the bit, on one machine with one number of threads."""
    settings = {"warmup_steps": steps // 3}
    whole = run(kind, tiny_pairs, tmp_path / "whole", steps, **settings)
    halves = run(kind, tiny_pairs, tmp_path / "halves", steps // 2, steps, **settings)
    assert halves.step == whole.step == len(whole.losses) == steps
    assert halves.losses == whole.losses
    assert_same(weights(whole.stage.trained), weights(halves.stage.trained))
    assert_same(weights(whole.mean), weights(halves.mean))
    assert halves.seconds > 0
    for name in (LOSSES, "checkpoint/warping_network/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_a_resumed_run_needs_all_of_its_state(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    whole = run("vae", tiny_pairs, tmp_path / "whole", 4)
    run("vae", tiny_pairs, tmp_path / "half", 2, steps=4)
    new = Trainer(stage("vae", tiny_pairs, random_checkpoint(SLIM), batch=2, steps=4), tmp_path / "new")
    at_the_start = {
        "modules": new.stage.trained.state_dict(),
        "mean": new.mean.state_dict(),
        "optimizer": new.optimizer.state_dict(),
        "scheduler": new.scheduler.state_dict(),
        "generator": new.generator.get_state(),
    }
    for part, value in at_the_start.items():
        shutil.copytree(tmp_path / "half", tmp_path / part)
        state = torch.load(tmp_path / part / STATE, weights_only=True)
        torch.save(state | {part: value}, tmp_path / part / STATE)
        resumed = run("vae", tiny_pairs, tmp_path / part, 4)
        with pytest.raises(AssertionError):
            assert_same(weights(whole.mean), weights(resumed.mean))


def test_only_a_run_of_the_same_recipe_is_resumed(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"state.pt: is missing; start the run without --resume"):
        Trainer(stage("vae", tiny_pairs), tmp_path).resume()
    run("vae", tiny_pairs, tmp_path, 1, steps=2)
    with pytest.raises(TrainingError, match=r"state.pt: was saved with batch 2, and the recipe has 3"):
        Trainer(stage("vae", tiny_pairs, random_checkpoint(SLIM), batch=3, steps=2), tmp_path).resume()


# The loop


def test_what_is_saved_is_the_running_mean(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    for decay, same in ((0.0, True), (0.999, False)):
        trainer = run("matching", tiny_pairs, tmp_path / str(decay), 4, ema_decay=decay, warmup_steps=0)
        network = load_checkpoint(tmp_path / str(decay) / "checkpoint").warping_network
        saved = weights(network.matching_net)
        assert_same(weights(trainer.mean.module["matching_net"]), saved)
        trained = weights(trainer.stage.trained["matching_net"])
        assert all(torch.allclose(saved[name], value, rtol=0, atol=1e-6) for name, value in trained.items()) is same
        assert all(module.training for module in trainer.stage.trained.modules())


def test_the_learning_rate_rises_and_falls_to_zero(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    trainer = Trainer(stage("vae", tiny_pairs, steps=12, warmup_steps=4, learning_rate=0.5), tmp_path)
    rates = [0.5 * trainer.scheduler.lr_lambdas[0](step) for step in range(13)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[8] == pytest.approx(0.25) and rates[12] == pytest.approx(0)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.125)


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(TINY)
    with torch.no_grad():
        checkpoint.unet.conv_out.bias.fill_(torch.nan)
    trainer = Trainer(stage("appearance", tiny_pairs, checkpoint, steps=2), tmp_path)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; start again with a lower learning_rate"):
        trainer.run()
    assert not list(tmp_path.iterdir())


# Recipes


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_are_followed(path: Path, kind: str) -> None:
    preset, data, recipe = load_recipe(path, kind, [])
    assert type(recipe) is STAGES[kind] and (preset in PRESETS or preset == "")
    tables = tomllib.loads(path.read_text())
    for key, value in (tables.get("all", {}) | tables.get(kind, {})).items():
        assert getattr(recipe, key) == value
    for key, value in tables.get("data", {}).items():
        assert getattr(data, key) == value


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_nearer_settings_win(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path, 'preset = "demo-128"\n[data]\npairs = 5\n[all]\nsteps = 1\nbatch = 2\n[vae]\nbatch = 3'
    )
    assert load_recipe(path, "vae", [])[2].batch == 3
    preset, data, recipe = load_recipe(path, "matching", ["data.seed=7", "temperature=1", "bf16 = false"])
    assert (preset, data) == ("demo-128", Data(pairs=5, seed=7))
    assert recipe == STAGES["matching"](steps=1, batch=2, temperature=1.0, bf16=False)
    assert load_recipe(path, "vae", ["steps=9", "steps=8"])[2].steps == 8


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[vea]\nsteps = 1", [], r"vea is unknown, expected preset, \[data\], \[all\] or \[vae\]"),
        ("vae = 1", [], r"vae is 1, expected a table"),
        ("[vae]\nstep = 1", [], r"step is unknown to VaeRecipe, expected one of steps, batch"),
        ("[vae]\nf_ref_drop = 0.1", [], r"f_ref_drop is unknown to VaeRecipe"),
        ('[all]\nsteps = "1"', [], r"steps is '1', expected int"),
        ("[all]\nsteps = 1.5", [], r"steps is 1.5, expected int"),
        ("[all]\nsteps = true", [], r"steps is True, expected int"),
        ("[all]\nbf16 = 1", [], r"bf16 is 1, expected bool"),
        ("[data]\nseeds = 1", [], r"seeds is unknown to Data"),
        ("", ["data.pairs=many"], r"--set data.pairs=many: expected key=value in TOML"),
        ("", ["steps"], r"--set steps: expected key=value in TOML, such as steps=100"),
        ("", ["steps=1\nbatch=2"], r"--set steps=1\nbatch=2: expected key=value"),
        ("", ["data.pair=3"], r"pair is unknown to Data"),
        ("", ["all.steps=3"], r"all is unknown to VaeRecipe"),
        ("[vae", [], r"recipe.toml: Expected ']'"),
    ],
)
def test_wrong_recipes_are_refused_by_name(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(tmp_path, text), "vae", overrides)


def test_flows_are_true_or_matched(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"flows is 'guessed', expected one of true, matched"):
        load_recipe(recipe_file(tmp_path, ""), "appearance", ['flows="guessed"'])
    with pytest.raises(RecipeError, match=r"nowhere.toml: .*No such file"):
        load_recipe(tmp_path / "nowhere.toml", "vae", [])


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
    """Only these parts changed, and the run has all its records."""
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
    assert main(["vae", "--recipe", str(recipe_file(tmp_path, "")), "--out", str(tmp_path / "out")]) == 1
    assert "preset is '', expected one of demo-128, sd15-512; or name a --base" in capsys.readouterr().err
