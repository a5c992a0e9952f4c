"""Two portraits through the real server, and a picture of how they came about: ``make demo``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from icportrait_client import Portrait, PortraitClient, PortraitError, Versions
from PIL import Image
from tqdm import tqdm

from examples.comparison import Pair, Panels, psnr_db, sheet
from icportrait.errors import IcPortraitError
from icportrait.manifest import Manifest
from icportrait.presets import DEMO_128
from icportrait.server import Ports, ServerProcess

EXAMPLES = Path(__file__).parent
HEADS = Pair(*(EXAMPLES / "heads" / f"{name}.png" for name in ("profile", "reference", "ground_truth")))
SEED = 7
TIMEOUT_S = 3600.0
"""At Stable Diffusion's size a CPU takes minutes for a portrait."""
RANDOM_STEPS = 2
"""Asked of random weights, without guidance: more steps would show no more."""
RANDOM_WEIGHTS = "The weights are random, drawn from a fixed seed: the portraits show that the path works, no likeness."
SYNTHETIC_ONLY = (
    "The demo checkpoint was trained on synthetic heads only: it makes synthetic-looking heads of photographs."
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--export", type=Path, required=True, help="directory written by python -m export")
    parser.add_argument(
        "--repository", type=Path, required=True, help="assembled by python -m icportrait.deploy.repository"
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument(
        "--profile", type=Path, default=EXAMPLES / "hopper.jpg", help="of the photographs (default: %(default)s)"
    )
    parser.add_argument("--reference", type=Path, default=EXAMPLES / "astronaut.jpg", help="likewise")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped in order then, too
    try:
        _demo(args)
    except (IcPortraitError, PortraitError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _demo(args: argparse.Namespace) -> None:
    photographs = Pair(args.profile, args.reference)
    started = time.monotonic()
    is_random = "random_weights" in Manifest.read(args.export).source
    if is_random:
        print(RANDOM_WEIGHTS, flush=True)
    print("starting tritonserver", flush=True)
    with ServerProcess(
        args.repository, Ports.free(), args.out / "tritonserver.log", say=partial(print, flush=True)
    ) as server:
        ready = time.monotonic()
        with PortraitClient(server.grpc_url, timeout_s=TIMEOUT_S) as client:
            of_heads, of_photographs = (
                _portraits(client, pair, name, is_random)
                for name, pair in (("rendered heads", HEADS), ("photographs", photographs))
            )
        answered = time.monotonic()
    note = weights_note(of_heads.metadata.versions)
    panels = Panels(args.export)
    heads = panels(HEADS, SEED, of_heads.image)
    photographed = panels(photographs, SEED, of_photographs.image)
    portrait = of_heads.save(args.out / "portrait.png")[0]
    comparison = args.out / "comparison.png"
    sheet([("rendered heads", heads), (f"photographs. {note}".strip(), photographed)]).save(comparison)

    print(f"\n  {'server start':<16}{ready - started:8.2f} s")
    print(f"  {'two requests':<16}{answered - ready:8.2f} s, of which the rendered heads'")
    unit = "ms, simulated" if of_heads.metadata.simulated else "ms"
    for stage, duration_ms in of_heads.metadata.stage_ms.items():
        print(f"    {stage:<14}{duration_ms:8.1f} {unit}")
    _print_likeness(heads)
    print(f"\n{portrait}\n{comparison}")
    if note:
        print(note)


def _portraits(client: PortraitClient, pair: Pair, name: str, is_random: bool) -> Portrait:
    """Ask for a pair's portrait, and show the steps as they are done."""
    # Before the first step, both pictures are encoded and warped: its clock shows that this goes on.
    with tqdm(desc=f"  {name}", unit="step", leave=False) as bar, _refreshed(bar):
        for event in client.stream(
            profile=pair.profile,
            reference=pair.reference,
            seed=SEED,
            num_inference_steps=RANDOM_STEPS if is_random else None,
            guidance_scale=1.0 if is_random else None,
            **pair.boxes,
        ):
            if isinstance(event, Portrait):
                return event
            bar.total = event.total_steps
            bar.update(event.step - bar.n)
    raise AssertionError("a stream ends with a portrait or an error")


@contextmanager
def _refreshed(bar: tqdm[NoReturn]) -> Iterator[None]:
    """Draw the bar anew every second."""
    ended = threading.Event()

    def draw() -> None:
        while not ended.wait(1):
            bar.refresh()

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        yield
    finally:
        ended.set()
        drawing.join()


def weights_note(versions: Versions) -> str:
    """Return the note on the weights that a viewer must read; empty for checkpoints that aren't this project's."""
    if versions.weights == "random":
        return RANDOM_WEIGHTS
    return SYNTHETIC_ONLY if versions.preset == DEMO_128.name else ""


def _print_likeness(panels: dict[str, Image.Image]) -> None:
    print("\n  PSNR against the rendered ground truth, higher is nearer")
    for name, label in (
        ("portrait", "the portrait"),
        ("reference", "a copy of the reference"),
        ("profile", "a copy of the profile"),
    ):
        print(f"    {label:<24}{psnr_db(panels[name], panels['ground truth']):6.2f} dB")


if __name__ == "__main__":
    sys.exit(main())
