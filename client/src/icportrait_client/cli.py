"""The command ``icportrait``: its arguments. What a command does is in ``commands``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from icportrait_client import DEFAULT_TIMEOUT_S, DEFAULT_URL, __version__
from icportrait_client.contract import InputSpec, load_contract
from icportrait_client.errors import InvalidRequest, PortraitError

# Flag, the contract's name, what it is. Types, ranges, choices and defaults come from the contract.
_OPTIONS = (
    ("--seed", "seed", "same seed, same portraits"),
    ("--num-portraits", "num_portraits", "how many portraits to draw"),
    ("--steps", "num_inference_steps", "denoising steps"),
    ("--guidance-scale", "guidance_scale", "how strongly the pictures guide the result"),
    ("--guidance-interval", "guidance_interval", "the steps with guidance, as shares of all"),
    ("--mask-ratio", "mask_ratio", "share of the reference that is hidden from the model"),
    ("--scheduler", "scheduler", "the sampler"),
    ("--priority", "priority", "the request's class, 0 first"),
    ("--deadline-ms", "deadline_ms", "after which the server drops the request"),
    ("--profile-box", "profile_box", "the profile's crop, as shares of its width and height"),
    ("--reference-box", "reference_box", "the reference's crop, likewise"),
)
_ERROR, _INTERRUPTED = 1, 130
_KINDS = "JPEG, PNG, WebP, AVIF, HEIC"
_CONCURRENCY = 8
_PORT = 8010
_HEALTH_TIMEOUT_S = 5.0
_CODES = (
    "Exit codes: 0 done; 1 an error, in one line; 2 a wrong command line; 3 the answer isn't all well: a pair failed, "
    "a server isn't ready, a picture isn't marked; 130 interrupted, and cancelled on the server."
)
_KEY = "An API key, where the server asks for one, is read from the environment: ICPORTRAIT_API_KEY."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}; see "{self.prog} --help"\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, 1 after an error, 3 where the answer isn't all well, or 130 when interrupted. A wrong command line ends the
        process with 2, as argparse does.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    from icportrait_client import commands

    try:
        if getattr(args, "output_format", "") is None and args.command != "batch":
            args.output_format = commands.format_of(args.output)
    except InvalidRequest as error:
        parser.error(str(error))
    try:
        code: int = getattr(commands, args.command)(args)
    except (PortraitError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return _ERROR
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="icportrait", description="Personalised portraits from an IC-Portrait Server.", epilog=_CODES)
    parser.add_argument("--version", action="version", version=f"icportrait {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands.add_parser("generate", help="two pictures in, portraits out"))
    _add_batch(commands.add_parser("batch", help="many pairs of pictures, and a folder of portraits"))
    _add_sweep(commands.add_parser("sweep", help="one picture of a profile under eight lights and in eight views"))
    health = commands.add_parser("health", help="whether each server takes requests")
    _add_connection(health, _HEALTH_TIMEOUT_S)
    _add_json(health, "print what each server says as JSON")
    info = commands.add_parser("info", help="versions and limits of each server")
    _add_connection(info)
    info.add_argument(
        "--portrait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for a portrait of one step, which names the engines and the weights (default: yes)",
    )
    _add_json(info, "print the versions and limits as JSON")
    verify = commands.add_parser("verify", help="whether pictures are marked as generated, and by what")
    verify.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="a file; no server is asked")
    _add_json(verify, "print the marks as JSON")
    playground = commands.add_parser("playground", help="a page to try a server with, in a browser of this machine")
    _add_connection(playground)
    playground.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; others than this machine's own let others in (default: %(default)s)",
    )
    playground.add_argument(
        "--port", default=_PORT, type=int, metavar="N", help="port to listen on, 0 for any (default: %(default)s)"
    )
    for command in commands.choices.values():
        command.epilog = " ".join(filter(None, (command.epilog, _CODES)))
    return parser


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", required=True, metavar="PICTURE", help=f"who it is: {_KINDS}")
    command.add_argument("--reference", required=True, metavar="PICTURE", help="the view and the light")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="OUT",
        help="file to write; several portraits get -1, -2 and so on before the suffix",
    )
    _add_connection(command)
    _add_options(command)
    _add_progress(command, "which step is done")
    preview_every = load_contract().inputs["preview_every"]
    meaning = "steps between previews; the latest is in OUT with -preview before the suffix, written over each time"
    command.add_argument("--preview-every", **_argument(preview_every, meaning))
    command.add_argument(
        "--preview-dir",
        type=Path,
        metavar="FOLDER",
        help="keep every preview there, numbered by its step; each fifth step's without --preview-every",
    )


def _add_batch(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "pairs",
        type=Path,
        metavar="PAIRS",
        help="a CSV with the columns profile and reference, and maybe name, seed or other options; "
        "or a folder with NAME-profile.jpg beside NAME-reference.jpg",
    )
    command.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="where portraits go; a second run makes only what is missing, failed or changed",
    )
    command.add_argument(
        "--concurrency",
        default=_CONCURRENCY,
        type=int,
        metavar="N",
        help="requests under way at once (default: %(default)s)",
    )
    _add_connection(command)
    _add_options(command, by_suffix=False)
    _add_progress(command, "how many portraits there are")


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", required=True, metavar="PICTURE", help=f"who it is: {_KINDS}")
    command.add_argument(
        "-o",
        "--output",
        "--out",
        default=Path("sweep.png"),
        type=Path,
        metavar="OUT",
        help="file to write (default: %(default)s)",
    )
    _add_connection(command)
    _add_options(command, without=("num_portraits", "reference_box"))


def _add_connection(command: argparse.ArgumentParser, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    command.add_argument(
        "--url",
        default=DEFAULT_URL,
        type=_servers,
        help="the server's gRPC address, or several with commas between them (default: %(default)s)",
    )
    command.add_argument(
        "--timeout",
        default=timeout_s,
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
    command.epilog = _KEY


def _add_options(command: argparse.ArgumentParser, without: Sequence[str] = (), *, by_suffix: bool = True) -> None:
    for flag, name, meaning in _OPTIONS:
        if name not in without:
            command.add_argument(flag, dest=name, **_argument(load_contract().inputs[name], meaning))
    spec = load_contract().inputs["output_format"]
    default = f"by OUT's suffix, else {spec.default}" if by_suffix else spec.default
    meaning = f"how the portraits are encoded (default: {default})"
    command.add_argument("--format", dest="output_format", choices=spec.choices, help=meaning)
    _add_json(command, "print the metadata as JSON instead of a table")


def _add_json(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("--json", action="store_true", help=meaning)


def _add_progress(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"say on standard error {meaning} (default: on a terminal)",
    )


def _servers(text: str) -> str | list[str]:
    addresses = [address.strip() for address in text.split(",")]
    return addresses if len(addresses) > 1 else text


def _argument(spec: InputSpec, meaning: str) -> dict[str, Any]:
    """Return the keywords of ``add_argument`` for one input."""
    default = "chosen by the server" if spec.default is None else spec.default
    if spec.name == "seed":
        default = "drawn at random"
    if spec.is_interval:
        default = " ".join(map(str, spec.default))
    if spec.choices:
        return {"choices": spec.choices, "help": f"{meaning} (default: {default})"}
    keywords: dict[str, Any] = {
        "type": int if spec.dtype.startswith("INT") else float,
        "help": f"{meaning}, {spec.expected} (default: {default})",
        "metavar": "N",
    }
    if spec.is_interval:
        keywords |= {"nargs": 2, "metavar": ("BEGIN", "END")}
    if spec.size == 4:
        keywords |= {"nargs": 4, "metavar": ("X0", "Y0", "X1", "Y1")}
    return keywords
