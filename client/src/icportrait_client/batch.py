"""Many pairs of pictures, and a folder of portraits that can be filled in several runs.

A portrait is written as soon as it is answered, and then noted in ``batch.jsonl`` with a hash of its request. A later
run makes the portraits that aren't noted, that are gone, or whose pictures or options have changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from icportrait_client.aio import AsyncPortraitClient
from icportrait_client.contract import load_contract
from icportrait_client.errors import (
    ContractMismatch,
    InvalidRequest,
    NotAllowed,
    PortraitError,
    RequestCancelled,
    ServerOverloaded,
    ServerUnavailable,
)
from icportrait_client.options import PortraitOptions

DONE = "batch.jsonl"
FAILED = "failed.csv"
FAILED_COLUMNS = ("name", "profile", "reference", "error", "text")
_OF_ALL = (NotAllowed, ContractMismatch, ServerUnavailable, RequestCancelled)
"""Errors that the other pairs would meet too, so that they end the run."""
_NAME = re.compile(r"[^\s/\\.][^/\\\0]{0,200}")
_ROLES = ("profile", "reference")
_PICTURES = re.compile(r"(.+)[-_.](profile|reference)\.(?:jpe?g|png|webp|avif|heic|heif)", re.IGNORECASE)
_SUFFIXES = {"jpeg": ".jpg"}
_SHOWN = 3


@dataclass(frozen=True)
class Pair:
    """A row of the batch."""

    name: str
    """Name of the portrait's file, without its suffix."""
    profile: Path
    reference: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of this row."""


@dataclass
class Summary:
    """The outcome of a run."""

    made: int = 0
    skipped: int = 0
    """Portraits that were there."""
    failed: int = 0
    total: int = 0


def read_pairs(source: Path) -> list[Pair]:
    """Read a CSV file, or look for pairs in a folder.

    A CSV has the columns ``profile`` and ``reference``, paths from the file's folder on; ``name``, else the profile's
    name; and any option of a request, such as ``seed``. In a folder ``anna-profile.jpg`` and ``anna-reference.png`` are
    the pair ``anna``.

    Raises:
        InvalidRequest: there is no pair, a picture has no partner, a column or a value isn't known, or two rows have
            one name.
        OSError: the source can't be read.
    """
    pairs = list(_of_folder(source) if source.is_dir() else _of_csv(source))
    if not pairs:
        raise InvalidRequest(
            f"'{source}': no pairs, expected NAME-profile.jpg beside NAME-reference.jpg, or rows of CSV"
        )
    seen: dict[str, Pair] = {}
    for pair in pairs:
        if not _NAME.fullmatch(pair.name):
            raise InvalidRequest(f"'{source}': name: {pair.name!r}, expected a file's name without / and leading dot")
        if (folded := pair.name.casefold()) in seen:
            raise InvalidRequest(f"'{source}': name: {pair.name!r} is there twice; give rows names of their own")
        seen[folded] = pair
    return pairs


async def run(
    client: AsyncPortraitClient,
    pairs: Sequence[Pair],
    folder: Path,
    options: Mapping[str, Any],
    concurrency: int,
    answered: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Make the portraits that aren't in the folder yet, several at once.

    Args:
        client: the servers.
        pairs: what ``read_pairs`` found.
        folder: where portraits, ``batch.jsonl`` and ``failed.csv`` go; made where it isn't there.
        options: of all requests; a row's own go before them.
        concurrency: requests under way at once.
        answered: called after each pair.

    Raises:
        InvalidRequest: two pairs would write one file.
        PortraitError: an error that other pairs would meet too, as a missing key or a server that is down.
        OSError: a file can't be written.
    """
    _check_files(pairs, options)
    folder.mkdir(parents=True, exist_ok=True)
    summary, waiting = Summary(total=len(pairs)), iter(pairs)
    done = _read_done(folder)
    failures = (folder / FAILED).open("w", newline="", encoding="utf-8")
    with failures, (folder / DONE).open("a", encoding="utf-8") as notes:
        csv.writer(failures).writerow(FAILED_COLUMNS)

        async def work() -> None:
            # Each worker takes the next pair when it is free. A portrait isn't held back by a slower one before it.
            for pair in waiting:
                try:
                    is_made = await _make(client, pair, folder, {**options, **pair.options}, done, notes)
                except PortraitError as error:
                    if isinstance(error, _OF_ALL) and not isinstance(error, ServerOverloaded):
                        raise
                    summary.failed += 1
                    _note_failure(failures, pair, error)
                else:
                    summary.made += is_made
                    summary.skipped += not is_made
                answered(summary)

        workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    if not summary.failed:
        (folder / FAILED).unlink()
    return summary


async def _make(
    client: AsyncPortraitClient,
    pair: Pair,
    folder: Path,
    options: dict[str, Any],
    done: Mapping[str, dict[str, Any]],
    notes: TextIO,
) -> bool:
    """Make one portrait; return False where it is there."""
    pictures = await asyncio.to_thread(lambda: [_read(getattr(pair, role), role) for role in _ROLES])
    request = _hash(pictures, options)
    noted = done.get(pair.name)
    if noted and noted.get("request") == request and all((folder / name).is_file() for name in noted["files"]):
        return False
    portrait = await client.generate(profile=pictures[0], reference=pictures[1], **options)
    names = _files(pair, options, len(portrait.files))
    for name, data in zip(names, portrait.files, strict=True):
        _write(folder / name, data)
    note = {"name": pair.name, "request": request, "files": names, "metadata": portrait.metadata.raw}
    notes.write(json.dumps(note) + "\n")
    notes.flush()
    return True


def _files(pair: Pair, options: Mapping[str, Any], count: int) -> list[str]:
    """Return the names of a pair's portraits."""
    file_format = options.get("output_format") or "png"
    suffix = _SUFFIXES.get(file_format, f".{file_format}")
    if count == 1:
        return [f"{pair.name}{suffix}"]
    return [f"{pair.name}-{number}{suffix}" for number in range(1, count + 1)]


def _check_files(pairs: Iterable[Pair], options: Mapping[str, Any]) -> None:
    written: dict[str, str] = {}
    for pair in pairs:
        own = {**options, **pair.options}
        for name in _files(pair, own, own.get("num_portraits") or 1):
            if (other := written.setdefault(name.casefold(), pair.name)) != pair.name:
                raise InvalidRequest(
                    f"name: {other!r} and {pair.name!r} would both write {name}; give them other names"
                )


def _read(path: Path, role: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{role}: '{path}' can't be read ({error.strerror})") from None


def _hash(pictures: Iterable[bytes], options: Mapping[str, Any]) -> str:
    known = {name: value for name, value in options.items() if value is not None}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for data in pictures:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or isn't there, whenever the process ends."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _read_done(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = (folder / DONE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    done = {}
    for line in lines:
        # A line may have been cut when the machine went down.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            note = json.loads(line)
            done[str(note["name"])] = {"request": note["request"], "files": list(note["files"])}
    return done


def _note_failure(failures: TextIO, pair: Pair, error: PortraitError) -> None:
    text = " ".join(str(error).split())
    csv.writer(failures).writerow([pair.name, pair.profile, pair.reference, type(error).__name__, text])
    failures.flush()


def _of_folder(folder: Path) -> Iterator[Pair]:
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _PICTURES.fullmatch(path.name):
            roles = found.setdefault(match[1], {})
            if (role := match[2].lower()) in roles:
                raise InvalidRequest(f"'{folder}': {match[1]}: two pictures are its {role}, expected one")
            roles[role] = path
    alone = [name for name, roles in found.items() if len(roles) == 1]
    if alone:
        more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
        names = ", ".join(alone[:_SHOWN])
        raise InvalidRequest(f"'{folder}': {names}{more}: expected a profile and a reference, and found one of them")
    for name, roles in found.items():
        yield Pair(name, roles["profile"], roles["reference"])


def _of_csv(path: Path) -> Iterator[Pair]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = csv.DictReader(file, strict=True)
            columns = rows.fieldnames or []
            if missing := [role for role in _ROLES if role not in columns]:
                raise InvalidRequest(f"'{path}': no column {missing[0]}, expected {' and '.join(_ROLES)}")
            unknown = [name for name in columns if name not in (*_ROLES, "name", *PortraitOptions.__annotations__)]
            if unknown:
                raise InvalidRequest(f"'{path}': column {unknown[0]!r}, expected name, profile, reference or an option")
            for row in rows:
                where = f"'{path}': line {rows.line_num}"
                if None in row or None in row.values():
                    raise InvalidRequest(f"{where}: expected {len(columns)} columns")
                texts = {name: text.strip() for name, text in row.items()}
                if empty := next((role for role in _ROLES if not texts[role]), None):
                    raise InvalidRequest(f"{where}: {empty} is empty, expected a picture's path")
                options = {
                    name: _value(where, name, text)
                    for name, text in texts.items()
                    if text and name not in (*_ROLES, "name")
                }
                profile, reference = (path.parent / texts[role] for role in _ROLES)
                yield Pair(texts.get("name") or profile.stem, profile, reference, options)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidRequest(f"'{path}': can't be read as CSV in UTF-8 ({error})") from None


def _value(where: str, name: str, text: str) -> Any:
    spec = load_contract().inputs[name]
    if spec.dtype == "BYTES":
        value: Any = text
    else:
        kind = int if spec.dtype.startswith("INT") else float
        try:
            value = kind(text) if spec.size == 1 else [float(each) for each in text.split()]
        except ValueError:
            raise InvalidRequest(f"{where}: {name}: {text!r}, expected {spec.expected or 'a number'}") from None
    try:
        spec.elements(value)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from None
    return value
