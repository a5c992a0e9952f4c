"""What the full tests share: a Stable Diffusion directory on its way to an export and plans, as its owner takes it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from icportrait.presets import SD15_512
from tests.conftest import ROOT

TIME_BUDGET_S = 12 * 60
"""On two cores that nothing else uses; it is printed and not asserted, as the cores may be slow or shared."""
EXPORT = ROOT / "build/export/sd15-512-fp16-opset23"
PLANS = ROOT / "build/engines/tensorrt-rtx/sd15-512-fp16"
STABLE_DIFFUSION = ROOT / "build/full/stable-diffusion"
CHECKPOINT = ROOT / "build/full/adapted"
WHAT = ("PRESET=sd15-512", f"CHECKPOINT={CHECKPOINT.relative_to(ROOT)}")
SEED = 0


@dataclass(frozen=True)
class Step:
    """A command that was run."""

    name: str
    output: str
    seconds: float
    peak_bytes: int
    """The largest resident size of any one of its processes; they work one after another."""


def make(*arguments: str) -> Step:
    """Run make; see ``run``."""
    return run(["make", *arguments], f"make {arguments[0]}")


def run(command: Sequence[str | Path], name: str) -> Step:
    """Run a command and print what it says, as it says it."""
    # Were this make told of the one that runs the tests, it would take over that one's variables.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{name} failed"
    return Step(name, "".join(lines), time.monotonic() - started, usage.ru_maxrss * 1024)


def write_stable_diffusion(directory: Path) -> None:
    """Random weights in Stable Diffusion 1.5's layout: the fp16 variant, its scheduler, its text encoder's sizes."""
    import json

    import torch
    from diffusers import PNDMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from icportrait.nn import random_checkpoint
    from icportrait.nn.random_weights import SCHEDULER_CONFIG

    torch.manual_seed(SEED)
    drawn = random_checkpoint(SD15_512, SEED)
    for name, model in (("unet", drawn.unet), ("vae", drawn.vae)):
        model.half().save_pretrained(directory / name, variant="fp16")
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, bos_token_id=0, eos_token_id=2
    )
    CLIPTextModel(text).half().save_pretrained(directory / "text_encoder", variant="fp16")
    # Untrained nets keep latents near 1 where they are taken to predict v.
    beta = {name: SCHEDULER_CONFIG[name] for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    PNDMScheduler(**beta, skip_prk_steps=True, steps_offset=1).save_pretrained(directory / "scheduler")
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def draw_zero_convs(checkpoint: Path) -> None:
    """What training does first: without it ``F_ref`` is zero, and nothing of the warping network is seen."""
    import torch
    from safetensors.torch import load_file, save_file

    from icportrait.nn.random_weights import F_REF_SCALE

    path = checkpoint / "warping_network" / "diffusion_pytorch_model.safetensors"
    weights, generator = load_file(path), torch.Generator().manual_seed(SEED)
    for name, weight in weights.items():
        if name.startswith("zero_convs.") and name.endswith(".weight"):
            weight.normal_(0, F_REF_SCALE * weight.shape[1] ** -0.5, generator=generator)
    path.unlink()  # it is mapped
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def steps() -> Iterator[list[Step]]:
    write_stable_diffusion(STABLE_DIFFUSION)
    adapt = [sys.executable, "-m", "export.adapt", "--stable-diffusion", STABLE_DIFFUSION, "--out", CHECKPOINT]
    done = [run(adapt, "export.adapt")]
    draw_zero_convs(CHECKPOINT)
    # make takes an export that is there for up to date.
    (EXPORT / "manifest.json").unlink(missing_ok=True)
    for plan in PLANS.glob("*"):
        plan.unlink()
    done += [make("export", *WHAT, "OPSET=23"), make("engines", *WHAT)]
    yield done
    print()
    for step in done:
        print(f"{step.name}: {step.seconds:.0f} s, largest process {step.peak_bytes / 1e9:.1f} GB")
    print(f"together: {sum(step.seconds for step in done):.0f} s of {TIME_BUDGET_S}")
