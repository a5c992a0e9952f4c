"""The memory that a server may take here: on the machine, in its control groups, and in a process's address space."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
KIB = 1024
# A control group's files in both versions: its limits, what it has, and of its statistics what it could give back. Over
# memory.high nothing is killed, but all that runs is held up until it has given some back.
FILES = {
    "": (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    "memory": (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


@dataclass(frozen=True)
class Room:
    """The bytes that all processes together may still take, and the address space that one process may take."""

    free_bytes: int
    owner: str
    """Owner of the limit, for a sentence: "this machine", or a control group."""
    address_bytes: int | None = None
    """Address space of one process in bytes, ``ulimit -v``; None without a limit."""


def room(proc: Path = PROC, cgroups: Path = CGROUPS) -> Room:
    """Find the tightest limit of this process and of the processes that it starts.

    Args:
        proc: where the kernel's process information is mounted.
        cgroups: where control groups are, of either version.
    """
    limits = [(_available(proc), "this machine"), *_groups(proc, cgroups)]
    free_bytes, owner = min(limits)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return Room(free_bytes, owner, None if soft == resource.RLIM_INFINITY else soft)


def oom_kills(proc: Path = PROC) -> int:
    """Count the processes that the kernel has killed for want of memory since it started, in any control group."""
    try:
        return _fields(proc / "vmstat").get("oom_kill", 0)
    except OSError:  # not every sandbox has the file; there is then no telling
        return 0


def _available(proc: Path) -> int:
    """Return the bytes that the kernel thinks can be had without swapping, its caches included."""
    fields = _fields(proc / "meminfo")
    if "MemAvailable:" not in fields:  # before Linux 3.14, and in some sandboxes
        return sum(fields.get(name, 0) for name in ("MemFree:", "Cached:")) * KIB
    return fields["MemAvailable:"] * KIB


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[int, str]]:
    """Yield the free bytes of each of this process's control groups. A group's parents bind it, too.

    In a container a group's path may not be the one that is mounted. The mount's root is the container's group then.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:  # not every kernel has control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in FILES:
            continue
        limit_files, usage_file, reclaimable = FILES[kind]
        mount = cgroups / kind
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            limits = [limit for name in limit_files if (limit := _limit(folder / name)) is not None]
            try:
                usage = int((folder / usage_file).read_text())
                statistics = _fields(folder / "memory.stat")
            except (OSError, ValueError):
                continue
            if not limits:
                continue
            # As the kernel counts for the whole machine: files that were read twice can be given back, too.
            usage -= sum(statistics.get(name, 0) for name in reclaimable)
            yield max(0, min(limits) - usage), f"control group {folder}"


def _limit(path: Path) -> int | None:
    """Read a control group's limit. Return None where the group has no limit ("max") or no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """Read a file of names and numbers."""
    return {fields[0]: int(fields[1]) for line in path.read_text().splitlines() if len(fields := line.split()) > 1}
