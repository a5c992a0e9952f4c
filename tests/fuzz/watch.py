"""The server under the fuzz: its processes, their memory, and its log."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from icportrait.gateway.workers import LOOK_EVERY_S, RESTS_AFTER_S
from icportrait.server import ServerProcess
from tests.e2e.supervised import named_processes, resident_bytes, runs

GROWTH = 0.03
REST_S = RESTS_AFTER_S + 6 * LOOK_EVERY_S
"""Until pictures' processes, one after another, have given back what is free."""
WRONG = re.compile(r"^[EF]\d{4} |Traceback|\bERROR\b|\bCRITICAL\b|Segmentation|never awaited|was never retrieved")
RIGHT = re.compile(r"a message on the control line|a control line (began|said)|HINT|CUDA|pinned memory")
"""Lines that cases for the control line bring about, and lines of a tritonserver without a GPU."""


@dataclass(frozen=True)
class Memory:
    """A process's memory."""

    part: str
    pid: int
    rss_bytes: int


class Watched:
    """A server's processes and its log."""

    def __init__(self, pid: int, log: Path | None) -> None:
        self.pid, self._log = pid, log
        self._read_bytes = log.stat().st_size if log else 0
        self._first = {pid: part for pid, part in self.parts().items() if part != "pictures"}

    @classmethod
    def of(cls, server: ServerProcess) -> Watched:
        assert server.process
        # ``ServerProcess`` starts it through a shell that becomes the server.
        return cls(server.process.pid, server.log_file)

    def parts(self) -> dict[int, str]:
        """Name each process of the server by what it does."""
        return {pid: part for pid, part in named_processes(self.pid).items() if part not in ("", "python3 -c")}

    def memory(self) -> list[Memory]:
        """Read each process's resident memory."""
        read = []
        for pid, part in self.parts().items():
            try:
                read.append(Memory(part, pid, resident_bytes(pid)))
            except (OSError, IndexError):
                continue
        return sorted(read, key=lambda each: (each.part, -each.rss_bytes))

    def ended(self) -> list[str]:
        """Name the processes that were there at first, and have ended; a picture worker may."""
        return [f"process {pid} ({part}) has ended" for pid, part in self._first.items() if not runs(pid)]

    def log_faults(self) -> list[str]:
        """Return new lines of the log that tell of a fault of the server."""
        if not self._log:
            return []
        with self._log.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(new)
        lines = new.decode(errors="replace").splitlines()
        return [f"the log says: {line[:300]}" for line in lines if WRONG.search(line) and not RIGHT.search(line)]

    def control_path(self, folder: Path) -> Path | None:
        """Find the loop's socket, of a server that keeps its temporary files in ``folder``."""
        return next(iter(folder.glob("icportrait-server-run-*/loop")), None)


def growth(before: list[Memory], after: list[Memory]) -> list[tuple[Memory, Memory | None, bool]]:
    """Compare the memory of each process with what it was.

    Returns:
        Each process now, the same or its like before, and whether it grew by more than ``GROWTH``. A picture worker
        that was replaced is compared with the largest.
    """
    compared = []
    for now in after:
        same = next((each for each in before if each.pid == now.pid), None)
        like = same or max(
            (each for each in before if each.part == now.part), key=lambda each: each.rss_bytes, default=None
        )
        compared.append((now, like, like is None or now.rss_bytes > (1 + GROWTH) * like.rss_bytes))
    return compared


async def resting(watched: Watched, seconds: float = REST_S) -> list[Memory]:
    """Wait until what callers left behind is gone, and read the memory."""
    await asyncio.sleep(seconds)
    return watched.memory()
