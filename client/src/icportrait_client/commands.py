"""The commands of ``icportrait``: each takes the parsed arguments, prints, and returns the exit code."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest
from icportrait_client.options import PortraitOptions

if TYPE_CHECKING:
    from icportrait_client.batch import Summary
    from icportrait_client.client import PortraitClient
    from icportrait_client.marks import Marks
    from icportrait_client.portraits import Portrait
    from icportrait_client.settings import ClientOptions

OK, NEGATIVE = 0, 3
"""The exit codes of an answer: all is well, or some of it isn't. Errors have codes of their own, in ``cli``."""
KEY_VARIABLE = "ICPORTRAIT_API_KEY"
"""On the command line every user of the machine could read it."""
_SET_BY_SWEEP = ("num_portraits", "reference_box", "output_format")
"""Options that are the same in all requests of a sweep. ``--format`` is the strip's."""
_DRAWN_SEEDS = 2**31
_SUFFIX_FORMATS = {"jpg": "jpeg"}
_EVERY_STEPS = 5
"""Steps between previews, where a folder for them is given and no number."""
_BAR = 24

Rows = Sequence[tuple[str, ...]]


def generate(args: argparse.Namespace) -> int:
    """Make portraits of one pair."""
    _check_output(args.output)
    options = _options(args)
    if args.preview_dir is not None:
        args.preview_dir.mkdir(parents=True, exist_ok=True)
        args.preview_every = _EVERY_STEPS if args.preview_every is None else args.preview_every
    with _connect(args) as client:
        if _is_shown(args) or args.preview_every is not None:
            portrait = _streamed(client, args, options)
        else:
            portrait = client.generate(profile=args.profile, reference=args.reference, **options)
    paths = portrait.save(args.output)
    if args.json:
        _print_json({"files": [str(path) for path in paths], **portrait.metadata.raw})
    else:
        print(_table([*_file_rows(paths), *_stage_rows(portrait)]))
    return OK


def batch(args: argparse.Namespace) -> int:
    """Make the portraits of many pairs that aren't there yet."""
    from icportrait_client.aio import AsyncPortraitClient
    from icportrait_client.batch import DONE, FAILED, Summary, read_pairs, run
    from icportrait_client.settings import check_concurrency

    check_concurrency(args.concurrency)
    pairs, last = read_pairs(args.pairs), Summary()

    def answered(summary: Summary) -> None:
        nonlocal last
        last = summary
        count = summary.made + summary.skipped + summary.failed
        if _is_shown(args):
            failed = f", {summary.failed} failed" if summary.failed else ""
            _show_progress(f"{count} of {summary.total} portraits{failed}", count, summary.total)

    async def all_of_them() -> Summary:
        async with AsyncPortraitClient(args.url, **_client_options(args)) as client:
            return await run(client, pairs, args.output, _options(args), args.concurrency, answered)

    try:
        summary = asyncio.run(all_of_them())
    except BaseException:
        # An interrupt too: what is done isn't lost, and its reader should know.
        there = last.made + last.skipped
        print(f"{there} of {len(pairs)} portraits are in {args.output}; run again for the rest", file=sys.stderr)
        raise
    if args.json:
        _print_json({**dataclasses.asdict(summary), "folder": str(args.output), "done": DONE, "failures": FAILED})
    else:
        rows = [("made", str(summary.made), ""), ("there before", str(summary.skipped), "")]
        where = f"listed in {args.output / FAILED}" if summary.failed else ""
        print(_table([*rows, ("failed", str(summary.failed), where)]))
    return NEGATIVE if summary.failed else OK


def sweep(args: argparse.Namespace) -> int:
    """Make one profile's portraits under many lights and views, and one picture of them."""
    _check_output(args.output)
    from icportrait_client.sweep import ROWS, save_strip, strip, sweep

    options: dict[str, Any] = {name: value for name, value in _options(args).items() if name not in _SET_BY_SWEEP}
    if options["seed"] is None:
        options["seed"] = random.randrange(_DRAWN_SEEDS)
    count, started = sum(map(len, ROWS)), time.monotonic()
    with _connect(args) as client:
        portraits = sweep(
            client.generate,
            args.profile,
            options,
            lambda answered: _show_progress(f"{answered:2} of {count} portraits", answered, count),
        )
    save_strip(strip(args.profile, portraits), args.output, args.output_format or "png")
    if args.json:
        answers = [{reference.kind: reference.degrees, **portraits[reference].metadata.raw} for reference in portraits]
        _print_json({"files": [str(args.output)], "portraits": answers})
    else:
        elapsed_s = time.monotonic() - started
        rows = [(f"{count} portraits", f"{elapsed_s:.1f}", "s"), ("seed", str(options["seed"]), "")]
        print(_table([*_file_rows([args.output]), *rows]))
    return OK


def health(args: argparse.Namespace) -> int:
    """Tell whether each server takes requests."""
    from icportrait_client.inspection import ask_health
    from icportrait_client.settings import check_seconds

    found = asyncio.run(ask_health(args.url, _client_options(args), check_seconds("timeout_s", args.timeout)))
    if args.json:
        _print_json([dataclasses.asdict(server) for server in found])
    else:
        rows = [
            (
                server.address,
                "ready" if server.is_ready else "not ready",
                server.reason if server.answer_ms is None or server.reason else f"{server.answer_ms:.1f} ms",
            )
            for server in found
        ]
        print(_columns(rows))
    return OK if found and all(server.is_ready for server in found) else NEGATIVE


def info(args: argparse.Namespace) -> int:
    """Tell the versions and the limits of each server."""
    from icportrait_client.inspection import ask_info, limits
    from icportrait_client.settings import check_seconds

    timeout_s = check_seconds("timeout_s", args.timeout)
    found = asyncio.run(ask_info(args.url, _client_options(args), timeout_s, args.portrait))
    if args.json:
        servers = [
            {
                "address": server.address,
                "server": server.server,
                "version": server.version,
                "settings": server.settings,
                "metadata": server.portrait.raw if server.portrait else None,
            }
            for server in found
        ]
        _print_json({"servers": servers, "limits": limits()})
        return OK
    rows: list[tuple[str, ...]] = []
    for server in found:
        rows += [("server", server.address), ("version", f"{server.server} {server.version}".strip())]
        if server.portrait:
            metadata = server.portrait
            rows += [(name, str(value)) for name, value in dataclasses.asdict(metadata.versions).items() if value]
            rows += [("size", " x ".join(map(str, metadata.size)))] if metadata.size else []
            rows += [("numerics_id", metadata.numerics_id)] if metadata.numerics_id else []
            rows += [("simulated", "engines are simulated")] if metadata.simulated else []
        rows += sorted(server.settings.items())
        rows.append(("", ""))
    print(_columns([*rows, *limits().items()]))
    return OK


def playground(args: argparse.Namespace) -> int:
    """Serve the page to try a server with, until it is interrupted."""
    try:
        from icportrait_client.playground import serve
    except ModuleNotFoundError as error:
        text = f"playground: needs the package {error.name}; pip install 'icportrait-client[playground]'"
        raise InvalidRequest(text) from None
    serve(args.url, _client_options(args), args.host, args.port)
    return OK


def verify(args: argparse.Namespace) -> int:
    """Tell whether each picture is marked as generated, and by what."""
    from icportrait_client.marks import read_marks

    found: dict[Path, Marks | InvalidRequest] = {}
    for path in args.pictures:
        try:
            found[path] = read_marks(path.read_bytes())
        except OSError as error:
            found[path] = InvalidRequest(f"can't be read ({error.strerror})")
        except InvalidRequest as error:
            found[path] = error
    if args.json:
        print(json.dumps([_marks_json(path, marks) for path, marks in found.items()], indent=2))
    else:
        print("\n".join(_marks_text(path, marks) for path, marks in found.items()))
    are_marked = all(not isinstance(marks, InvalidRequest) and marks.is_generated for marks in found.values())
    return OK if are_marked else NEGATIVE


def _marks_json(path: Path, marks: Marks | InvalidRequest) -> dict[str, Any]:
    if isinstance(marks, InvalidRequest):
        return {"file": str(path), "is_generated": False, "error": str(marks)}
    return {"file": str(path), "is_generated": marks.is_generated, **dataclasses.asdict(marks)}


def _marks_text(path: Path, marks: Marks | InvalidRequest) -> str:
    from icportrait_client.marks import NOT_VALIDATED

    if isinstance(marks, InvalidRequest):
        return f"{path}: {marks}"
    verdict = "marked as generated" if marks.is_generated else "not marked as generated"
    lines = [f"  IPTC  {marks.source_type}"] if marks.source_type else []
    if manifest := marks.manifest:
        if marks.is_broken:
            verdict = "has a C2PA manifest that isn't valid"
        says = [manifest.state.lower(), manifest.source_type, *manifest.problems]
        says += [f"by {manifest.generator}"] if manifest.generator else []
        says += [f"signed by {manifest.signer}"] if manifest.signer else []
        says += [manifest.signed_at]
        if manifest.state == NOT_VALIDATED:
            says.append("pip install 'icportrait-client[c2pa]' to validate")
        lines.append(f"  C2PA  {', '.join(filter(None, says))}")
    return "\n".join([f"{path}: {verdict}", *lines])


def format_of(output: Path) -> str | None:
    """Return the format that a file's suffix names; None without a suffix.

    Raises:
        InvalidRequest: it names another.
    """
    suffix = output.suffix.lower().removeprefix(".")
    if not suffix:
        return None
    spec = load_contract().inputs["output_format"]
    name = _SUFFIX_FORMATS.get(suffix, suffix)
    if name not in spec.choices:
        raise InvalidRequest(f"--output: suffix is .{suffix}, expected {spec.expected}, or the format with --format")
    return name


def _options(args: argparse.Namespace) -> PortraitOptions:
    options: PortraitOptions = {}
    options.update({name: getattr(args, name, None) for name in PortraitOptions.__annotations__})  # type: ignore[typeddict-item]
    return options


def _client_options(args: argparse.Namespace) -> ClientOptions:
    return {"timeout_s": args.timeout, "api_key": os.environ.get(KEY_VARIABLE), "tls": args.tls}


def _connect(args: argparse.Namespace) -> PortraitClient:
    from icportrait_client.client import PortraitClient

    return PortraitClient(args.url, **_client_options(args))


def _streamed(client: PortraitClient, args: argparse.Namespace, options: PortraitOptions) -> Portrait:
    from icportrait_client.portraits import Portrait, Preview

    request: Any = {"profile": args.profile, "reference": args.reference, "preview_every": args.preview_every}
    with closing(client.stream(**request, **options)) as events:
        for event in events:
            if isinstance(event, Portrait):
                return event
            if isinstance(event, Preview):
                event.save(_preview_path(args, event))
            if _is_shown(args):
                text = f"step {event.step:{len(str(event.total_steps))}} of {event.total_steps}"
                _show_progress(text, event.step, event.total_steps)
    raise AssertionError("a stream ends with a portrait or an error")


def _preview_path(args: argparse.Namespace, event: Any) -> Path:
    output: Path = args.output
    if args.preview_dir is None:
        return output.with_stem(f"{output.stem}-preview")
    folder: Path = args.preview_dir
    return folder / f"{output.stem}-step-{event.step:0{len(str(event.total_steps))}}{output.suffix}"


def _check_output(output: Path) -> None:
    # Found before the portrait is paid for, not after.
    if output.is_dir() or not output.parent.is_dir():
        raise InvalidRequest(f"--output: '{output}', expected a file's path in a directory that exists")


def _is_shown(args: argparse.Namespace) -> bool:
    return sys.stderr.isatty() if args.progress is None else bool(args.progress)


def _show_progress(text: str, count: int, total: int) -> None:
    """Print a bar that the next overwrites on a terminal, or a line that stays in a log."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        return
    filled = _BAR * count // max(total, 1)
    end = "\n" if count == total else "\r"
    print(f"[{'#' * filled}{' ' * (_BAR - filled)}] {text}", end=end, file=sys.stderr, flush=True)


def _file_rows(paths: Iterable[Path]) -> list[tuple[str, str, str]]:
    return [(str(path), f"{path.stat().st_size / 1000:.1f}", "kB") for path in paths]


def _stage_rows(portrait: Portrait) -> list[tuple[str, str, str]]:
    stage_ms = portrait.metadata.stage_ms
    stages = [*stage_ms.items(), ("total", sum(stage_ms.values()))]
    unit = "ms, simulated" if portrait.metadata.simulated else "ms"
    return [(stage, f"{duration_ms:.1f}", unit) for stage, duration_ms in stages]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {figure:>{figures}} {unit}".rstrip() for name, figure, unit in rows)


def _columns(rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
