"""Memory that may be taken, as the kernel's files say it; the files are written here as the kernel writes them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from icportrait.deploy.machine_memory import Room, oom_kills, room

GB = 10**9


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Describe a machine of 24 GB, of which 20 are available."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(
        f"MemTotal: {24 * GB // 1024} kB\nMemAvailable: {20 * GB // 1024} kB\nHugePages: 0\n"
    )
    (folder / "vmstat").write_text("pgfault 17\noom_kill 3\n")
    (folder / "self" / "cgroup").write_text("0::/\n")
    return folder


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def unified(folder: Path, limit: str, current: int = 0, inactive_file: int = 0) -> None:
    """Write a group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")


def legacy(folder: Path, limit: int, usage: int = 0, inactive_file: int = 0) -> None:
    """Write a group of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


def test_without_a_limit_the_machine_says_what_there_is(proc: Path, cgroups: Path) -> None:
    unified(cgroups, "max")
    assert room(proc, cgroups) == Room(20 * GB, "this machine")


def test_a_group_has_its_limit_less_what_it_cannot_give_back(proc: Path, cgroups: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/serving/portraits\n")
    unified(cgroups / "serving" / "portraits", str(8 * GB), current=3 * GB, inactive_file=2 * GB)
    assert room(proc, cgroups) == Room(7 * GB, f"control group {cgroups}/serving/portraits")


def test_a_groups_parents_bind_it(proc: Path, cgroups: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/serving/portraits\n")
    unified(cgroups / "serving", str(6 * GB), current=1 * GB)
    unified(cgroups / "serving" / "portraits", "max")
    assert room(proc, cgroups) == Room(5 * GB, f"control group {cgroups}/serving")


@pytest.mark.parametrize("limit", ["max", str(9 * GB)])
def test_a_group_that_is_held_up_before_its_limit_has_less(proc: Path, cgroups: Path, limit: str) -> None:
    unified(cgroups, limit, current=1 * GB)
    (cgroups / "memory.high").write_text(f"{6 * GB}\n")
    assert room(proc, cgroups) == Room(5 * GB, f"control group {cgroups}")
    (cgroups / "memory.high").write_text("max\n")
    assert room(proc, cgroups).free_bytes == (8 * GB if limit != "max" else 20 * GB)


def test_groups_of_version_1_are_read(proc: Path, cgroups: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:cpu:/elsewhere\n4:memory:/portraits\n0::/\n")
    legacy(cgroups / "memory" / "portraits", 8 * GB, usage=5 * GB, inactive_file=1 * GB)
    legacy(cgroups / "memory", 2**63 - 4096)
    assert room(proc, cgroups) == Room(4 * GB, f"control group {cgroups}/memory/portraits")


def test_in_a_container_the_mounts_root_is_the_group(proc: Path, cgroups: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/docker/0123\n")
    unified(cgroups, str(8 * GB), current=1 * GB)
    assert room(proc, cgroups) == Room(7 * GB, f"control group {cgroups}")


def test_what_a_full_group_has_left_is_nothing(proc: Path, cgroups: Path) -> None:
    unified(cgroups, str(1 * GB), current=2 * GB)
    assert room(proc, cgroups).free_bytes == 0


def test_a_limit_of_address_space_is_a_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * GB, resource.RLIM_INFINITY))
    assert room().address_bytes == 8 * GB


def test_this_machine_has_less_than_all_of_its_memory() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < room().free_bytes <= int(total.split()[1]) * 1024
    assert oom_kills() >= 0


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_were_read_twice_can_be_given_back_too(proc: Path, cgroups: Path, version: int) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n" if version == 2 else "4:memory:/\n")
    if version == 2:
        unified(cgroups, str(8 * GB), current=6 * GB)
    else:
        legacy(cgroups / "memory", 8 * GB, usage=6 * GB)
    prefix, folder = ("", cgroups) if version == 2 else ("total_", cgroups / "memory")
    (folder / "memory.stat").write_text(f"{prefix}inactive_file {1 * GB}\n{prefix}active_file {3 * GB}\n")
    assert room(proc, cgroups).free_bytes == 6 * GB


def test_a_sandbox_without_the_kernels_files_says_what_it_can(proc: Path, cgroups: Path) -> None:
    (proc / "vmstat").unlink()
    (proc / "self" / "cgroup").unlink()
    (proc / "meminfo").write_text("MemTotal: 2000 kB\nMemFree: 700 kB\nCached: 300 kB\n")
    assert oom_kills(proc) == 0
    assert room(proc, cgroups) == Room(1000 * 1024, "this machine")


def test_kills_for_memory_are_counted(proc: Path) -> None:
    assert oom_kills(proc) == 3
