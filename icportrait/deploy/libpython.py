"""Find Python's shared library, which Triton's Python stub links; also run as a script by ``setup.sh``.

It imports nothing but the standard library, so that it runs before anything is installed.
"""

import sys
import sysconfig
from pathlib import Path


def libpython_directory() -> Path | None:
    """Find the folder of this Python's ``libpython3.X.so``. Return None where there is none."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    library = f"libpython{version}.so.1.0"
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    prefix = Path(sys.base_prefix) / "lib"
    folders = [Path(sysconfig.get_config_var("LIBDIR") or prefix), prefix, Path("/usr/lib")]
    candidates = [folder / sub for folder in folders for sub in ("", multiarch)]
    return next((folder for folder in candidates if (folder / library).is_file()), None)


def missing_libpython() -> str:
    """Return the advice to a user whose Python has no shared library."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"tritonserver's Python stub needs libpython{version}.so.1.0, which this Python ({sys.base_prefix}) lacks; "
        f"on Debian or Ubuntu: apt-get install libpython{version}"
    )


if __name__ == "__main__":
    sys.exit(None if libpython_directory() else f"error: {missing_libpython()}")
