"""The server under the fuzz: its processes, their memory, and its log."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from icportrait.deploy.memory import PYTHON_MODELS
from icportrait.gateway.workers import LOOK_EVERY_S, RESTS_AFTER_S
from icportrait.server import ServerProcess
from tests.e2e.supervised import named_processes, runs

GROWTH = 0.03
SHARED, SHARED_STEP_BYTES = "/dev/shm", 2**20
"""Memory that the models' processes share with tritonserver. The Python backend makes a process's region larger by a
step when more requests than ever need it at once, and never smaller."""
REST_S = RESTS_AFTER_S + 6 * LOOK_EVERY_S
"""Until pictures' processes, one after another, have given back what is free."""
WRONG = re.compile(r"^[EF]\d{4} |Traceback|\bERROR\b|\bCRITICAL\b|Segmentation|never awaited|was never retrieved")
RIGHT = re.compile(r"a message on the control line|a control line (began|said)|HINT|CUDA|pinned memory")
"""Lines that cases for the control line bring about, and lines of a tritonserver without a GPU."""


@dataclass(frozen=True)
class Memory:
    """A process's resident memory, without ``SHARED``; and ``SHARED``, which is of no process."""

    part: str
    pid: int
    nbytes: int


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
        """Read each process's memory, and what they share."""
        read, parts = [], self.parts()
        for pid, part in parts.items():
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                read.append(Memory(part, pid, _own_bytes(pid)))
        regions = {path for pid in parts for path in _regions(pid)}
        read.append(Memory(SHARED, 0, sum(path.stat().st_size for path in regions)))
        return sorted(read, key=lambda each: (each.part, -each.nbytes))

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
        Each process now, the same or its like before, and whether it grew by more than ``GROWTH``, or ``SHARED`` by
        more than a step for each model. A picture worker that was replaced is compared with the largest.
    """
    compared = []
    for now in after:
        same = next((each for each in before if each.pid == now.pid), None)
        like = same or max(
            (each for each in before if each.part == now.part), key=lambda each: each.nbytes, default=None
        )
        compared.append((now, like, like is None or now.nbytes > _most_bytes(like)))
    return compared


def _most_bytes(like: Memory) -> float:
    if like.part == SHARED:
        return like.nbytes + PYTHON_MODELS * SHARED_STEP_BYTES
    return (1 + GROWTH) * like.nbytes


def _own_bytes(pid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * sum(int(status[name].split()[0]) for name in ("RssAnon", "RssFile"))


def _regions(pid: int) -> set[Path]:
    """List the files in /dev/shm that a process uses."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {Path(line.split(maxsplit=5)[5]) for line in lines if f" {SHARED}/" in line and "deleted" not in line}
    return set()


async def resting(watched: Watched, seconds: float = REST_S) -> list[Memory]:
    """Wait until what callers left behind is gone, and read the memory."""
    await asyncio.sleep(seconds)
    return watched.memory()
