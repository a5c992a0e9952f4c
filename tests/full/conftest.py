"""Steps that the full tests share: a Stable Diffusion directory on its way to an export and plans."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.full.paths import (
    BUILD,
    CHECKPOINT,
    EXPORT,
    PLANS,
    REFERENCE_PORTRAIT,
    REPOSITORY,
    STABLE_DIFFUSION,
)

WHAT = (
    "PRESET=sd15-512",
    *(
        f"{name}={path.relative_to(ROOT)}"
        for name, path in {
            "CHECKPOINT": CHECKPOINT,
            "EXPORT": EXPORT,
            "PLANS": PLANS,
            "REPOSITORY": REPOSITORY,
        }.items()
    ),
)
SEED = 0


@dataclass(frozen=True)
class Step:
    """A command that was run."""

    name: str
    output: str
    seconds: float
    peak_bytes: int
    """The largest resident size of any one of its processes; they work one after another."""


def say(text: str) -> None:
    """Print at once; a worker of pytest-xdist shows what goes to standard error."""
    print(text, file=sys.stderr, flush=True)


def make(*arguments: str) -> Step:
    """Run make; see ``run``."""
    return run(["make", *arguments], f"make {arguments[0]}")


def run(command: Sequence[str | Path], name: str) -> Step:
    """Run a command and print what it says, as it says it."""
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
            lines.append(line)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{name} failed"
    return Step(name, "".join(lines), time.monotonic() - started, usage.ru_maxrss * 1024)


def environment() -> dict[str, str]:
    """Return a user's environment, with both cores for torch, whose threads yield to the process beside."""
    # Were make told of the one that runs the tests, it would take over that one's variables.
    foreign = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in foreign} | {"OMP_WAIT_POLICY": "PASSIVE"}


def python(module: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", module, *arguments]


@contextmanager
def beside(command: Sequence[str | Path], name: str) -> Iterator[None]:
    """Run a command while the block does; the block ends when both have ended."""
    with subprocess.Popen(command, cwd=ROOT, env=environment()) as process:
        try:
            yield
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, f"{name} failed"


def draw_zero_convs(checkpoint: Path) -> None:
    """Draw zero convolutions, because ``F_ref`` is zero without and hides the warping network."""
    import torch

    from icportrait.nn.random_weights import F_REF_SCALE

    generator = torch.Generator().manual_seed(SEED)
    with (checkpoint / "warping_network" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        for name, tensor in json.loads(file.read(header_bytes)).items():
            if name.startswith("zero_convs.") and name.endswith(".weight"):
                assert tensor["dtype"] == "F16"
                weight = torch.randn(tensor["shape"], generator=generator) * F_REF_SCALE * tensor["shape"][1] ** -0.5
                file.seek(8 + header_bytes + tensor["data_offsets"][0])
                file.write(weight.half().numpy().tobytes())


@pytest.fixture(scope="session")
def steps() -> Iterator[list[Step]]:
    """Run each step, and remove files that no later step reads, so that little disk is taken."""
    shutil.rmtree(BUILD, ignore_errors=True)  # of a run that was killed
    try:
        run(python("tests.full.stable_diffusion", STABLE_DIFFUSION), "tests.full.stable_diffusion")
        adapt = python("export.adapt", "--stable-diffusion", STABLE_DIFFUSION, "--out", CHECKPOINT)
        done = [run(adapt, "export.adapt")]
        shutil.rmtree(STABLE_DIFFUSION)
        draw_zero_convs(CHECKPOINT)
        done.append(make("export", *WHAT, "OPSET=23"))
        # TensorRT's builder has one thread.
        with beside(python("tests.full.reference", CHECKPOINT, REFERENCE_PORTRAIT), "tests.full.reference"):
            done.append(make("engines", *WHAT))
        for weights in CHECKPOINT.rglob("*.safetensors"):
            weights.unlink()
        yield done
        say(
            "\n".join(
                f"{step.name}: {step.seconds:.0f} s, largest process {step.peak_bytes / 1e9:.1f} GB" for step in done
            )
        )
    finally:
        shutil.rmtree(BUILD, ignore_errors=True)
