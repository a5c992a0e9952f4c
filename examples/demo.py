"""One portrait through the real server, and a picture of how it came about: ``make demo``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

import numpy as np
from icportrait_client import PortraitClient, PortraitError
from PIL import Image, ImageDraw, ImageFont

from icportrait.errors import IcPortraitError
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime import load_engine
from icportrait.server import Ports, TritonServer
from icportrait.serving import FrontStage, PreprocessStage, bytes_tensor

EXAMPLES = Path(__file__).parent
SEED = 7
PANEL_PX = 256
RANDOM_WEIGHTS = "The weights are random, drawn from a fixed seed: the portrait shows that the path works, no likeness."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--export", type=Path, required=True, help="directory written by python -m export")
    parser.add_argument("--repository", type=Path, required=True, help="assembled by python -m icportrait.repository")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument("--profile", type=Path, default=EXAMPLES / "hopper.jpg", help="default: %(default)s")
    parser.add_argument("--reference", type=Path, default=EXAMPLES / "astronaut.jpg", help="default: %(default)s")
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
    started = time.monotonic()
    print("starting tritonserver", flush=True)
    with TritonServer(args.repository, Ports.free(), log_file=args.out / "tritonserver.log") as server:
        ready = time.monotonic()
        with PortraitClient(server.grpc_url) as client:
            portraits = client.generate(profile=args.profile, reference=args.reference, seed=SEED)
        answered = time.monotonic()
    portrait = portraits.save(args.out / "portrait.png")[0]
    comparison = args.out / "comparison.png"
    _comparison(args, portraits.picture()).save(comparison)

    print(f"\n  {'server start':<16}{ready - started:8.2f} s")
    print(f"  {'request':<16}{answered - ready:8.2f} s, of which")
    for stage, duration_ms in portraits.metadata["stage_ms"].items():
        print(f"    {stage:<14}{duration_ms:8.1f} ms")
    print(f"\n{portrait}\n{comparison}")
    if portraits.metadata["versions"]["weights"] == "random":
        print(RANDOM_WEIGHTS)


def _comparison(args: argparse.Namespace, portrait: Image.Image) -> Image.Image:
    """Profile, reference, what stays visible of it, the flow and the portrait, side by side with their names."""
    manifest = Manifest.read(args.export)
    front, preprocess = FrontStage(manifest, ServingPolicy()), PreprocessStage(manifest.preset)
    request = {
        "profile": bytes_tensor(args.profile.read_bytes()),
        "reference": bytes_tensor(args.reference.read_bytes()),
        "seed": np.array([SEED]),
    }
    hidden = preprocess(front(request))
    whole = preprocess(front({**request, "mask_ratio": np.array([0.0], np.float32)}))
    flow = _flow(args.export, manifest, hidden)
    panels = {
        "profile": Image.fromarray(whole["profile_pixels"][0]),
        "reference": Image.fromarray(whole["reference_pixels"][0]),
        "visible": Image.fromarray(hidden["reference_pixels"][0]),
        "flow": flow_colours(flow),
        "portrait": portrait,
    }
    font = ImageFont.load_default(size=16)
    sheet = Image.new("RGB", (PANEL_PX * len(panels), PANEL_PX + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, panel) in enumerate(panels.items()):
        resample = Image.Resampling.NEAREST if name == "flow" else Image.Resampling.BICUBIC
        sheet.paste(panel.resize((PANEL_PX, PANEL_PX), resample), (column * PANEL_PX, 28))
        draw.text((column * PANEL_PX + 8, 4), name, fill="black", font=font)
    return sheet


def _flow(export: Path, manifest: Manifest, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The finest flow [s, s], by the exported engines."""
    policy = ServingPolicy()
    encoder, warping = (load_engine(name, export, manifest, policy) for name in ("vae_encoder", "warping_network"))
    latents = {
        f"{name}_latent": encoder.run({"pixels": tensors[f"{name}_pixels"]})["latent"]
        for name in ("profile", "reference")
    }
    return warping.run({**latents, "visibility": tensors["visibility"]})["flow_0"][0]


def flow_colours(flow: np.ndarray) -> Image.Image:
    """A flow [s, s] of positions y * s + x as colours: hue for a displacement's direction, strength for its length."""
    side = flow.shape[-1]
    rows, columns = np.indices(flow.shape)
    down, right = flow // side - rows, flow % side - columns
    length = np.hypot(down, right)
    hue = (np.arctan2(down, right) / (2 * np.pi) % 1.0) * 255
    saturation = length / max(length.max(), 1.0) * 255
    hsv = np.stack([hue, saturation, np.full_like(hue, 255)], axis=-1).astype(np.uint8)
    return Image.fromarray(hsv, "HSV").convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
