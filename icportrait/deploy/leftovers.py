"""The files and shared memory that a run of the server keeps, and their removal after a run that was killed.

A run keeps a folder for temporary files, and regions of shared memory. Different machines or containers may or may not
share the places of both. Beside the folder and the regions, a run holds a lock for as long as its process lives. If no
process holds the lock, no process uses the folder or the regions any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import tempfile
from pathlib import Path

from icportrait.deploy.stub_processes import runs, stubs_of_region

SHM = Path("/dev/shm")
LOCK, FOLDER = "icportrait_{token}_lock", "icportrait-server-run-{token}"
"""A file's name, and a folder's, which is its own lock."""
FOLDER_BYTES = 107 - len("/loop")
"""Linux takes no longer paths of sockets."""
PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
"""Triton's Python backend starts its processes through a shell, with their paths unquoted."""
SHORT = Path("/tmp")
"""Parent of the folder if its path would be too long for its sockets, or isn't plain."""
ENVIRONMENTS = Path("/tmp")
"""Triton's Python backend makes a folder here at each start, whatever TMPDIR says, and leaves it where it is killed."""


class Run:
    """One run's folder, which only its user may enter, and the prefix of its regions of shared memory."""

    def __init__(self) -> None:
        """Make the folder and the prefix.

        Raises:
            OSError: there is no room, or no permission.
        """
        self._locks = contextlib.ExitStack()
        try:
            while not (self._take_region() and self._take_folder()):
                self._locks.close()
        except BaseException:
            self.remove()
            raise

    @property
    def shm_prefix(self) -> str:
        """Return the prefix of the names of this run's regions, so that no other run's region is ever touched."""
        return _prefix(self._token)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            _remove_regions(self._token)
        self._locks.close()
        remove_environments()

    def _take_region(self) -> bool:
        self._token = secrets.token_hex(4)
        self.folder = _folder(self._token)
        return self._take(SHM / LOCK.format(token=self._token), os.O_RDWR | os.O_CREAT)

    def _take_folder(self) -> bool:
        self.folder.mkdir(0o700)
        try:
            return self._take(self.folder, os.O_DIRECTORY)
        except FileNotFoundError:  # another server, which starts now, has taken it for a leftover
            return False

    def _take(self, path: Path, flags: int) -> bool:
        if (descriptor := _take(path, flags)) is not None:
            self._locks.callback(os.close, descriptor)
        return descriptor is not None


def remove_leftovers() -> list[str]:
    """Remove what dead runs of this user have left, end their models' processes, and say what it was, by name."""
    removed = []
    for name in sorted(SHM.glob(LOCK.format(token="*"))):
        if (lock := _take_left(name, os.O_RDWR)) is not None:
            before, behind = LOCK.split("{token}")
            token = name.name[len(before) : -len(behind)]
            # A stub whose tritonserver was killed during a request may wait for its answer for ever, holding the
            # interpreter's lock, so that no thread of its own can end it.
            for pid in stubs_of_region(_prefix(token)):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            _remove_regions(token)
            os.close(lock)
            removed.append(name.name)
    pattern = _folder(8 * "?")
    for folder in sorted(pattern.parent.glob(pattern.name)):
        if (lock := _take_left(folder, os.O_DIRECTORY)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            removed.append(folder.name)
    remove_environments()
    return removed


def remove_environments() -> None:
    """Remove the folders of this user that killed Python backends have left, unless a tritonserver runs.

    None of these folders tells which process it is of. A folder with something in it stays.
    """
    # Listed first, because a server that starts meanwhile makes another.
    folders = list(ENVIRONMENTS.glob("python_env_??????"))
    if folders and not runs("tritonserver"):
        for folder in folders:
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == os.getuid():
                    folder.rmdir()


def _take_left(path: Path, flags: int) -> int | None:
    """Lock a file or folder of this user's for its removal. Return None where another process holds the lock."""
    try:
        return _take(path, flags) if path.stat().st_uid == os.getuid() else None
    except OSError:
        return None


def _take(path: Path, flags: int) -> int | None:
    """Return a descriptor that holds the file's lock, or None where another holds the lock or has removed the file."""
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _remove_regions(token: str) -> None:
    lock = SHM / LOCK.format(token=token)
    for region in SHM.glob(f"{_prefix(token)}*"):
        if region != lock:
            region.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)


def _folder(token: str) -> Path:
    parent, name = Path(tempfile.gettempdir()), FOLDER.format(token=token)
    fits = len(os.fsencode(parent / name)) <= FOLDER_BYTES and PLAIN.fullmatch(str(parent))
    return (parent if fits else SHORT) / name


def _prefix(token: str) -> str:
    return f"icportrait_{token}_"
