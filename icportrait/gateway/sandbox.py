"""Less rights for the server's processes: a user of its own in place of root, and a filter for pictures' processes.

The filter (seccomp) takes from a process that decodes and encodes pictures what that never needs: connections, other
programs, other processes' memory, and files that are written. It holds for all threads and until the process ends.
pyseccomp makes it, with the system's libseccomp (ADR 0018).
"""

from __future__ import annotations

import errno
import os
import pwd
import sys
from collections.abc import Iterable
from pathlib import Path

from icportrait.errors import IcPortraitError

MODES = ("auto", "on", "off")
NETWORK = ("socket", "connect", "bind", "listen", "accept", "accept4", "sendto", "sendmsg", "sendmmsg")
DENIED = (
    *("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "open_by_handle_at"),
    *("unlink", "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "symlink", "symlinkat"),
    *("link", "linkat", "mknod", "mknodat", "chmod", "fchmodat", "chown", "fchownat", "truncate", "creat", "openat2"),
    *("io_uring_setup", "bpf", "perf_event_open", "userfaultfd", "add_key", "request_key", "keyctl"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "reboot", "swapon", "swapoff"),
)
OPENING = {"open": 1, "openat": 2}
"""Calls that open files, and which of their arguments has the flags."""
WAYS_TO_WRITE = (os.O_WRONLY, os.O_RDWR)


def can_filter() -> str:
    """Return why no filter can be had here; empty where one can."""
    try:
        import pyseccomp

        pyseccomp.get_api()
    except (ImportError, OSError, RuntimeError) as error:
        return f"{error}; pip install 'icportrait[sandbox]', and on Debian or Ubuntu: apt-get install libseccomp2"
    return ""


def filter_wanted(mode: str) -> bool:
    """Tell whether pictures' processes get the filter.

    Args:
        mode: one of ``MODES``; ``auto`` takes it where it can be had.

    Raises:
        IcPortraitError: it is ``on``, and can't be had.
    """
    reason = can_filter() if mode != "off" else ""
    if mode == "on" and reason:
        raise IcPortraitError(f"picture_sandbox: {reason}")
    return mode != "off" and not reason


def begin_filter(needs_network: bool = False) -> None:
    """Give up, in all threads of this process and for ever, what pictures never need; it is EPERM then.

    Args:
        needs_network: leave connections, because a time-stamp authority is asked for each picture.
    """
    import pyseccomp

    refuse = pyseccomp.ERRNO(errno.EPERM)
    calls = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    calls.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)
    for name in (*DENIED, *(() if needs_network else NETWORK)):
        calls.add_rule(refuse, name)
    for name, argument in OPENING.items():
        for way in WAYS_TO_WRITE:
            calls.add_rule(refuse, name, pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, os.O_ACCMODE, way))
    calls.load()


def become(user: str, reads: Iterable[Path] = (), writes: Iterable[Path] = ()) -> None:
    """Change this process to another user, without a way back. A process that isn't root must be that user already.

    Args:
        user: name, or number, of the user.
        reads: files and folders that are needed afterwards, beside this Python.
        writes: folders in which files are made afterwards.

    Raises:
        IcPortraitError: there is no such user, this process may not become it, or the user can't read or write what is
            needed.
    """
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError) as error:
        raise IcPortraitError(f"user: {user!r}: there is no such user; useradd --system {user} makes one") from error
    if os.geteuid() == entry.pw_uid:
        return
    if os.geteuid() != 0:
        raise IcPortraitError(f"user: {user}: only root can become another user, and this is number {os.geteuid()}")
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir
    os.environ["USER"] = os.environ["LOGNAME"] = entry.pw_name
    check_access(user, (Path(sys.executable), Path(os.__file__), *reads), writes)


def check_access(user: str, reads: Iterable[Path], writes: Iterable[Path]) -> None:
    """Refuse to go on as a user that can't read or write what is needed; see ``become``."""
    for path in reads:
        if not os.access(path, os.R_OK):
            raise IcPortraitError(
                f"user: {user} can't read {path.resolve()}; let that user read it, or install the server elsewhere"
            )
    for path in writes:
        if not os.access(path, os.W_OK):
            raise IcPortraitError(f"user: {user} can't write to {path.resolve()}; give that user the folder")
