"""One device for all processes of a server: the process that computes holds it, and the others wait.

The kernel keeps two locks, and takes them back from a process that dies:

    turn    held while waiting for the device, so that its last user goes behind the processes that wait already
    busy    held while computing

Without ``turn``, the denoising loop, which is back within a fraction of a millisecond, would often be faster than a
waiter is woken: against a loop of 5 ms steps it then waited 7.2 ms (median; longest 18) instead of 2.2 (longest 6).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import threading
import weakref
from pathlib import Path

DEVICE_FOLDER = "device"
"""In a running server's own folder, beside its link to the repository."""


class SharedDevice:
    """A handle on a device: engines in one process or in several that name the same folder never run at once."""

    def __init__(self, folder: Path) -> None:
        """Open the locks' files, and make them if this is the first.

        Args:
            folder: stands for the device.
        """
        self._turn, self._busy = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("turn", "busy"))
        for descriptor in (self._turn, self._busy):
            weakref.finalize(self, os.close, descriptor)
        # The kernel's locks are a descriptor's, and tell no threads apart that share one.
        self._thread = threading.Lock()

    @classmethod
    def of(cls, directory: Path) -> SharedDevice:
        """Open the device of the server that runs the model in ``directory``, ``<repository>/<model>/<version>``."""
        return cls(device_folder(directory.absolute().parents[1]))

    def acquire(self) -> None:
        """Wait for the device, and have it until ``release`` from the same thread."""
        self._thread.acquire()
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            try:
                fcntl.flock(self._busy, fcntl.LOCK_EX)
            finally:
                fcntl.flock(self._turn, fcntl.LOCK_UN)
        except BaseException:
            self._thread.release()
            raise

    def release(self) -> None:
        """Give the device back."""
        fcntl.flock(self._busy, fcntl.LOCK_UN)
        self._thread.release()


def device_folder(repository: Path) -> Path:
    """Return the folder of the locks of a server's device.

    ``icportrait.server`` serves a repository through a link in a folder of the server's own. That folder has a place
    for the locks, and goes with the server. A tritonserver that was started otherwise gets a folder in the temporary
    directory, by the repository's path.

    Args:
        repository: as the server names it, links not followed.
    """
    own = repository.parent / DEVICE_FOLDER
    if repository.is_symlink() and own.is_dir():
        return own
    name = hashlib.sha256(os.fsencode(repository.resolve())).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"icportrait-device-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
