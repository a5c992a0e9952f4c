"""Milliseconds of a core that marking takes: no mark, IPTC's, and a signed C2PA manifest too.

    python -m benchmarks.marking --certificate chain.pem --key key.pem --out benchmarks/results/NAME.json

One process does by turns what the gateway's processes do with a portrait's pixels, so that all figures are of the same
minutes; ratios are to IPTC's mark alone. It is processor time, because a machine that others use makes the rest longer.
The way to a process and back isn't in it, nor an authority's time stamp.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import conditions_here
from benchmarks.settings import MarkingSettings
from icportrait.contract import Array
from icportrait.errors import IcPortraitError
from icportrait.gateway import c2pa_signing
from icportrait.gateway.c2pa_signing import Ingredient, encode_and_sign, read_credentials, read_ingredient
from icportrait.gateway.settings import Settings
from icportrait.pictures import imaging
from icportrait.pictures.imaging import encode_picture

FORMATS = ("png", "jpeg", "webp")
NO_MARK, XMP, C2PA, C2PA_KEPT = "no mark", "XMP", "XMP, C2PA", "XMP, C2PA with both inputs' manifests"
READING = "reading an input's manifest"
Way = Callable[[], object]


def run_marking(settings: MarkingSettings) -> dict[str, Any]:
    """Measure the time of every way of marking, in every format and size.

    Raises:
        IcPortraitError: nothing can be signed with the certificate and the key.
    """
    credentials = read_credentials(Settings(c2pa_certificate=settings.certificate, c2pa_key=settings.key))
    c2pa_signing.begin(credentials)
    with Image.open(settings.picture) as opened:
        picture = opened.convert("RGB")
    cases: dict[tuple[int, str, str], Way] = {}
    for size in settings.sizes:
        pixels = np.asarray(picture.resize((size, size)))
        for output_format in FORMATS:
            cases |= {(size, output_format, name): way for name, way in _ways(pixels, output_format).items()}
    times_ms = _by_turns(cases, settings.rounds)
    rows = [
        {
            "size": size,
            "format": output_format,
            "marked": name,
            "ms": round(times_ms[size, output_format, name], 2),
            "ratio": round(times_ms[size, output_format, name] / times_ms[size, output_format, XMP], 2),
        }
        for size, output_format, name in cases
    ]
    versions = {name: importlib.metadata.version(name) for name in ("c2pa-python", "pillow", "numpy")}
    return {"rows": rows, "conditions": {**conditions_here(settings), "versions": versions}}


def _ways(pixels: Array, output_format: str) -> dict[str, Way]:
    names = ("profile", "reference")
    bare = tuple(map(Ingredient, names))
    signed = encode_and_sign(pixels, output_format, bare).file
    kept = tuple(read_ingredient(signed, name, is_base64=False) for name in names)
    return {
        NO_MARK: partial(_unmarked, pixels, output_format),
        XMP: partial(encode_picture, pixels, output_format),
        C2PA: partial(encode_and_sign, pixels, output_format, bare),
        C2PA_KEPT: partial(encode_and_sign, pixels, output_format, kept),
        READING: partial(read_ingredient, signed, "profile", is_base64=False),
    }


def _unmarked(pixels: Array, output_format: str) -> bytes:
    mark, imaging.XMP = imaging.XMP, ""
    try:
        return encode_picture(pixels, output_format)
    finally:
        imaging.XMP = mark


def _by_turns(cases: dict[tuple[int, str, str], Way], rounds: int) -> dict[tuple[int, str, str], float]:
    """Return medians in milliseconds."""
    times_s: dict[tuple[int, str, str], list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case, way in cases.items():
            began_s = time.process_time()
            way()
            if number:  # the first round warms up
                times_s[case].append(time.process_time() - began_s)
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {case: 1000 * median(values) for case, values in times_s.items()}


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``run_marking`` as lines for a reader."""
    lines = [f"{'px':>4} {'format':<7}{'marked':<40}{'ms':>8}{'ratio':>7}"]
    for row in report["rows"]:
        lines.append(f"{row['size']:>4} {row['format']:<7}{row['marked']:<40}{row['ms']:>8.2f}{row['ratio']:>7.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.marking", description=__doc__.splitlines()[0])
    for name, meaning in (("certificate", "PEM file, as c2pa_certificate"), ("key", "PEM file, as c2pa_key")):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE", help=meaning)
    rounds = MarkingSettings.rounds
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures and their conditions as JSON")
    args = parser.parse_args(argv)
    try:
        report = run_marking(MarkingSettings(args.certificate, args.key, rounds=args.rounds))
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
