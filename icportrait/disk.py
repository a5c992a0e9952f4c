"""Gigabytes are written to a disk that may be full: the writer says so in one sentence and leaves no half."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from icportrait.errors import NotEnoughDisk

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, none for this user, and a file longer than ``ulimit -f`` or the file system allows."""
_NUMBER = re.compile(r"(?:\[Errno |os error )(\d+)[\])]")
"""The system's error number in the texts of Python's and of Rust's errors; safetensors raises a class of its own."""


@contextmanager
def room_for(what: str, place: Path, need_bytes: int, partial: Sequence[str] = ()) -> Iterator[None]:
    """Write ``what`` within the block; a disk without room for it ends the block with NotEnoughDisk.

    Args:
        what: for the sentence, such as "the checkpoint".
        place: the directory or the file that is written; it needn't be there yet.
        need_bytes: about how much is written. With less room the block isn't entered.
        partial: patterns of the files and folders in ``place`` that the block replaces, and that are worth nothing
            unless it ends. They count as room, and are removed where the disk is full.

    Raises:
        NotEnoughDisk: there is less room than that, or the disk is full before the block ends.
    """
    check_room(what, place, need_bytes, partial)
    try:
        yield
    except NotEnoughDisk:
        raise
    except Exception as error:
        number = _full(error)
        if number is None:
            raise
        _remove(place, partial)
        raise NotEnoughDisk(
            f"{place}: {os.strerror(number)} while writing {what}, about {_size(need_bytes)} in all; "
            f"{_size(free_bytes(place))} are free now; make room, or write it elsewhere"
        ) from error


def check_room(what: str, place: Path, need_bytes: int, replaced: Sequence[str] = ()) -> None:
    """Make sure that ``need_bytes`` can be written at ``place``, in the place of what is there.

    Args:
        what: for the sentence, as for ``room_for``.
        place: the directory or the file.
        need_bytes: about how much is written.
        replaced: patterns of files in ``place`` that go before the new ones are written.

    Raises:
        NotEnoughDisk: there is less room; the text has both numbers.
    """
    free = free_bytes(place) + sum(_frees(path) for pattern in replaced for path in place.glob(pattern))
    if free < need_bytes:
        raise NotEnoughDisk(
            f"{place}: about {_size(need_bytes)} of disk are needed for {what}, and {_size(free)} are free; make room, "
            "or write it elsewhere"
        )


def free_bytes(place: Path) -> int:
    """Return the bytes that this user may still write at a path, whether it is there yet or not."""
    return shutil.disk_usage(existing(place)).free


def existing(place: Path) -> Path:
    """Return a path, or the nearest folder above it that is there: what is written at the path goes on that disk."""
    place = place.resolve()
    return next(path for path in (place, *place.parents) if path.exists())


def _full(error: BaseException) -> int | None:
    """Find the system's number of a full disk in an error, or in an error that it was raised behind."""
    seen: BaseException | None = error
    while seen is not None:
        found = _NUMBER.search(str(seen))
        for number in (getattr(seen, "errno", None), int(found[1]) if found else None):
            if number in FULL:
                return number
        seen = seen.__cause__ or seen.__context__
    return None


def _frees(path: Path) -> int:
    """Return the bytes that the removal of a file or of a folder frees: none while another link keeps them."""
    files = (file.stat() for file in (path, *path.rglob("*")) if file.is_file())
    return sum(file.st_size for file in files if file.st_nlink == 1)


def _remove(place: Path, partial: Sequence[str]) -> None:
    for pattern in partial:
        for path in place.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # it may hold something else, or not be there
        place.rmdir()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
