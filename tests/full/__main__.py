"""Make sure that ``make test-full`` has the disk and the memory that it takes, before minutes are spent."""

from __future__ import annotations

import sys

from icportrait.deploy.machine_memory import room
from icportrait.disk import check_room
from icportrait.errors import NotEnoughDisk
from tests.full.paths import BUILD

DISK_BYTES, MEMORY_BYTES = 12 * 10**9, 16 * 10**9


def main() -> int:
    try:
        check_room("make test-full", BUILD, DISK_BYTES, ["*"])
    except NotEnoughDisk as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = room()
    if found.free_bytes < MEMORY_BYTES:
        print(
            f"error: make test-full takes about {MEMORY_BYTES / 1e9:.0f} GB of memory, and {found.owner} has "
            f"{found.free_bytes / 1e9:.1f} GB left; end other programs",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
