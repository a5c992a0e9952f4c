"""The command ``icportrait``."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from icportrait_client import DEFAULT_TIMEOUT_S, DEFAULT_URL, __version__
from icportrait_client.contract import InputSpec, load_contract
from icportrait_client.errors import InvalidRequest, PortraitError

if TYPE_CHECKING:
    from icportrait_client.client import PortraitClient
    from icportrait_client.portraits import Portraits

# Flag, the contract's name, what it is. Types, ranges, choices and defaults come from the contract.
_OPTIONS = (
    ("--seed", "seed", "same seed, same portraits"),
    ("--num-portraits", "num_portraits", "how many portraits to draw"),
    ("--steps", "num_inference_steps", "denoising steps"),
    ("--guidance-scale", "guidance_scale", "how strongly the pictures guide the result"),
    ("--mask-ratio", "mask_ratio", "share of the reference that is hidden from the model"),
    ("--scheduler", "scheduler", "the sampler"),
    ("--priority", "priority", "the request's class, 0 first"),
    ("--deadline-ms", "deadline_ms", "after which the server drops the request"),
    ("--profile-box", "profile_box", "the profile's crop, as shares of its width and height"),
    ("--reference-box", "reference_box", "the reference's crop, likewise"),
    ("--format", "output_format", "how OUT is encoded"),
)
_SET_BY_SWEEP = ("num_portraits", "reference_box", "output_format")
"""What is the same in all requests of a sweep. ``--format`` is the strip's."""
_DRAWN_SEEDS = 2**31
_SUFFIX_FORMATS = {"jpg": "jpeg"}
_INTERRUPTED = 130
_KEY_VARIABLE = "ICPORTRAIT_API_KEY"
"""On the command line every user of the machine could read it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}; see "{self.prog} --help"\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, or 1 after an error. A wrong command line ends the process with 2, as argparse does.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.output_format is None:
            args.output_format = _format_of(args.output)
    except InvalidRequest as error:
        parser.error(str(error))
    try:
        args.run(args)
    except (PortraitError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="icportrait", description="Personalised portraits from an IC-Portrait Server.")
    parser.add_argument("--version", action="version", version=f"icportrait {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="two pictures in, portraits out")
    generate.set_defaults(run=_generate)
    generate.add_argument("--profile", required=True, metavar="PICTURE", help="who it is: JPEG, PNG, WebP, AVIF, HEIC")
    generate.add_argument("--reference", required=True, metavar="PICTURE", help="the view and the light")
    generate.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="OUT",
        help="file to write; several portraits get -1, -2 and so on before the suffix",
    )
    _add_connection(generate)
    _add_options(generate)
    generate.add_argument("--progress", action="store_true", help="say on standard error which step is done")
    preview_every = load_contract().inputs["preview_every"]
    meaning = "steps between previews; the latest is in OUT with -preview before the suffix, written over each time"
    generate.add_argument("--preview-every", **_argument(preview_every, meaning))
    sweep = commands.add_parser("sweep", help="one picture of a profile under eight lights and in eight views")
    sweep.set_defaults(run=_sweep)
    sweep.add_argument("--profile", required=True, metavar="PICTURE", help="who it is: JPEG, PNG, WebP, AVIF, HEIC")
    sweep.add_argument(
        "-o",
        "--output",
        "--out",
        default=Path("sweep.png"),
        type=Path,
        metavar="OUT",
        help="file to write (default: %(default)s)",
    )
    _add_connection(sweep)
    _add_options(sweep, without=("num_portraits", "reference_box"))
    return parser


def _add_connection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default=DEFAULT_URL, help="the server's gRPC address (default: %(default)s)")
    command.add_argument(
        "--timeout",
        default=DEFAULT_TIMEOUT_S,
        type=float,
        metavar="SECONDS",
        help="how long to wait for an answer (default: %(default)g)",
    )
    command.add_argument(
        "--tls",
        nargs="?",
        const=True,
        default=False,
        metavar="PEM",
        help="speak TLS; with the file of an authority where the server's certificate is signed by your own",
    )
    command.epilog = f"An API key, where the server asks for one, is read from the environment: {_KEY_VARIABLE}."


def _connect(args: argparse.Namespace) -> PortraitClient:
    from icportrait_client.client import PortraitClient

    return PortraitClient(args.url, timeout_s=args.timeout, api_key=os.environ.get(_KEY_VARIABLE), tls=args.tls)


def _add_options(command: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    for flag, name, meaning in _OPTIONS:
        if name not in without:
            command.add_argument(flag, dest=name, **_argument(load_contract().inputs[name], meaning))
    command.add_argument("--json", action="store_true", help="print the metadata as JSON instead of a table")


def _argument(spec: InputSpec, meaning: str) -> dict[str, Any]:
    """The keywords of ``add_argument`` for one input."""
    default = "chosen by the server" if spec.default is None else spec.default
    if spec.name == "seed":
        default = "drawn at random"
    if spec.name == "output_format":
        default = f"by OUT's suffix, else {spec.default}"
    if spec.choices:
        return {"choices": spec.choices, "help": f"{meaning} (default: {default})"}
    keywords: dict[str, Any] = {
        "type": int if spec.dtype.startswith("INT") else float,
        "help": f"{meaning}, {spec.expected} (default: {default})",
        "metavar": "N",
    }
    if spec.size == 4:
        keywords |= {"nargs": 4, "metavar": ("X0", "Y0", "X1", "Y1")}
    return keywords


def _format_of(output: Path) -> str | None:
    suffix = output.suffix.lower().removeprefix(".")
    if not suffix:
        return None
    spec = load_contract().inputs["output_format"]
    name = _SUFFIX_FORMATS.get(suffix, suffix)
    if name not in spec.choices:
        raise InvalidRequest(f"--output: suffix is .{suffix}, expected {spec.expected}, or the format with --format")
    return name


def _generate(args: argparse.Namespace) -> None:
    _check_output(args.output)
    options = {name: getattr(args, name) for _, name, _ in _OPTIONS}
    with _connect(args) as client:
        if args.progress or args.preview_every is not None:
            portraits = _streamed(client, args, options)
        else:
            portraits = client.generate(profile=args.profile, reference=args.reference, **options)
    paths = portraits.save(args.output)
    if args.json:
        print(json.dumps({"files": [str(path) for path in paths], **portraits.metadata}, indent=2))
    else:
        print(_table([*_file_rows(paths), *_stage_rows(portraits)]))


def _streamed(client: PortraitClient, args: argparse.Namespace, options: dict[str, Any]) -> Portraits:
    preview_path = args.output.with_stem(f"{args.output.stem}-preview")
    request = {"profile": args.profile, "reference": args.reference, "preview_every": args.preview_every, **options}
    with closing(client.stream(**request)) as answers:
        for progress in answers:
            progress.save_previews(preview_path)
            if args.progress:
                last = progress.portraits is not None
                _show_progress(f"step {progress.step:{len(str(progress.total_steps))}} of {progress.total_steps}", last)
    # The last of a stream that ended without an error.
    assert progress.portraits
    return progress.portraits


def _sweep(args: argparse.Namespace) -> None:
    _check_output(args.output)
    from icportrait_client.sweep import ROWS, save_strip, strip, sweep

    options = {name: getattr(args, name) for _, name, _ in _OPTIONS if name not in _SET_BY_SWEEP}
    if options["seed"] is None:
        options["seed"] = random.randrange(_DRAWN_SEEDS)
    count, started = sum(map(len, ROWS)), time.monotonic()
    with _connect(args) as client:
        portraits = sweep(
            client.generate,
            args.profile,
            options,
            lambda answered: _show_progress(f"{answered:2} of {count} portraits", answered == count),
        )
    save_strip(strip(args.profile, portraits), args.output, args.output_format or "png")
    if args.json:
        answers = [{reference.kind: reference.degrees, **portraits[reference].metadata} for reference in portraits]
        print(json.dumps({"files": [str(args.output)], "portraits": answers}, indent=2))
    else:
        elapsed_s = time.monotonic() - started
        rows = [(f"{count} portraits", f"{elapsed_s:.1f}", "s"), ("seed", str(options["seed"]), "")]
        print(_table([*_file_rows([args.output]), *rows]))


def _check_output(output: Path) -> None:
    # Found before the portrait is paid for, not after.
    if output.is_dir() or not output.parent.is_dir():
        raise InvalidRequest(f"--output: '{output}', expected a file's path in a directory that exists")


def _show_progress(text: str, last: bool) -> None:
    """A line that is written over on a terminal, and lines in a log."""
    end = "\r" if sys.stderr.isatty() and not last else "\n"
    print(text, end=end, file=sys.stderr, flush=True)


def _file_rows(paths: Iterable[Path]) -> list[tuple[str, str, str]]:
    return [(str(path), f"{path.stat().st_size / 1000:.1f}", "kB") for path in paths]


def _stage_rows(portraits: Portraits) -> list[tuple[str, str, str]]:
    stage_ms = portraits.metadata.get("stage_ms", {})
    stages = [*stage_ms.items(), ("total", sum(stage_ms.values()))]
    unit = "ms, simulated" if portraits.metadata.get("simulated") else "ms"
    return [(stage, f"{duration_ms:.1f}", unit) for stage, duration_ms in stages]


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {figure:>{figures}} {unit}".rstrip() for name, figure, unit in rows)
