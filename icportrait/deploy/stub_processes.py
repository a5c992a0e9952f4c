"""Processes that this one starts, and the processes that Triton's Python backend runs models in, as /proc shows them.

Tritonserver 2.51 doesn't start such a process again when it has ended. The process's model stays READY. A request to
that model fails after one to three seconds. A request that an ended front had accepted is never answered. The
process stays a zombie.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
STUB = "triton_python_backend_stub"
# Of what follows the name in /proc/<pid>/stat: the fields that proc(5) numbers 3, 4, 22 and 52.
STATE, PARENT, STARTED, EXIT_CODE = 0, 1, 19, 49

_DYING = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {:d}); os.execv(sys.argv[1], sys.argv[1:])"
"""Asks the kernel for a signal once the thread that starts this ends (PR_SET_PDEATHSIG is 1), and becomes the command.
Between fork and exec, a process of many threads may do next to nothing."""


@dataclass(frozen=True)
class StubProcess:
    """One Python model's process, or that of one of its instances."""

    model: str
    pid: int
    started: str
    """Start of the process, in the kernel's clock. It tells the process from a later one with the same number."""

    def ending(self) -> str | None:
        """Describe the process's ending; None while it runs, and where there is no telling now."""
        try:
            fields = _stat(self.pid)
        except OSError:  # too many open files
            return None
        if fields is None or fields[STARTED] != self.started:
            return "ended"
        return describe(os.waitstatus_to_exitcode(int(fields[EXIT_CODE]))) if fields[STATE] in "ZX" else None


def stub_processes(server_pid: int) -> list[StubProcess]:
    """List the stub processes of a tritonserver that run now."""
    found = []
    for pid in descendants(server_pid):
        fields, model = _stat(pid), Path(next(iter(_stub_arguments(pid)), ""))
        # A process that is just being started may have a name, and no arguments yet.
        if fields and len(model.parents) > 1:
            found.append(StubProcess(model.parents[1].name, pid, fields[STARTED]))
    return found


def stubs_of_region(prefix: str) -> list[int]:
    """List the stub processes whose region of shared memory has a prefix, whoever their parent is now."""
    return [pid for pid in _pids() if any(each.startswith(prefix) for each in _stub_arguments(pid)[1:2])]


def runs(program: str) -> bool:
    """Tell whether any process that this one sees runs a program, by the name of its file."""
    return any(Path(arguments[0]).name == program for pid in _pids() if (arguments := _arguments(pid)))


def describe(exit_code: int) -> str:
    """Describe in words an exit code as ``subprocess`` gives it."""
    return f"was ended by signal {-exit_code}" if exit_code < 0 else f"ended with status {exit_code}"


def descendants(pid: int) -> list[int]:
    """List the processes below one, its children before theirs."""
    children: dict[int, list[int]] = {}
    for each in _pids():
        if fields := _stat(each):
            children.setdefault(int(fields[PARENT]), []).append(each)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def _pids() -> list[int]:
    return [int(folder.name) for folder in PROC.iterdir() if folder.name.isdecimal()]


def _stat(pid: int) -> list[str] | None:
    try:
        # A name may hold spaces and brackets.
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _arguments(pid: int) -> list[str]:
    try:
        return os.fsdecode((PROC / str(pid) / "cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def _stub_arguments(pid: int) -> list[str]:
    """Read a stub's arguments, <repository>/<model>/<version>/model.py and its region first; none of others."""
    command, *arguments = _arguments(pid) or [""]
    return arguments if Path(command).name == STUB else []


def is_stopped(pid: int) -> bool:
    """Tell whether a signal has stopped the process; False where a debugger holds it, or where that is unknown."""
    try:
        fields = _stat(pid)
    except OSError:  # too many open files
        return False
    return fields is not None and fields[STATE] == "T"


def dying_with_parent(number: signal.Signals, command: list[str]) -> list[str]:
    """Return a command whose process gets a signal once the thread that started the process ends."""
    return [sys.executable, "-I", "-S", "-c", _DYING.format(number), *command]


def log_hint(log_file: Path | None) -> str:
    """Return the part of a message that points to the cause of an ending: the end of the log, or the output above."""
    if log_file is None:
        return "; its output above has the cause"
    tail = log_file.read_text(errors="replace").splitlines()[-15:]
    return f"; the end of {log_file}: " + " | ".join(tail)
