"""The tritonserver that is started: the embedded one, or the one that is on PATH in NVIDIA's container."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from icportrait.deploy.libpython import libpython_directory, missing_libpython
from icportrait.errors import RuntimeNotAvailable
from icportrait.runtime.tensorrt.products import TENSORRT


@dataclass(frozen=True)
class Installation:
    """A tritonserver with its backends."""

    root: Path
    """Holds ``bin``, ``backends`` and ``caches``."""
    libraries: Path | None = None
    """The embedded one's own; None where the machine's loader knows them."""

    @property
    def binary(self) -> Path:
        return self.root / "bin" / "tritonserver"

    @property
    def tensorrt_backend(self) -> Path:
        """Return the folder of Triton's TensorRT backend, which may not exist."""
        return self.root / "backends" / "tensorrt"

    def prepare_backends(self, folder: Path) -> Path:
        """Return the backend directory. The embedded server's is made in ``folder``, with this Python's stub in it.

        Raises:
            RuntimeNotAvailable: the embedded server has no stub for this Python.
        """
        if self.libraries is None:
            return self.root / "backends"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = self.root / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise RuntimeNotAvailable(f"the embedded tritonserver has no stub for Python {version}; use 3.11 or 3.12")
        # Triton wants the stub beside the backend's library.
        python = folder / "python"
        python.mkdir(parents=True)
        for path in (*(self.root / "backends" / "python").glob("*.*"), stub):
            (python / path.name).symlink_to(path)
        return folder

    def environment(self) -> dict[str, str]:
        """Return the server's environment: its libraries, Python's library, and this Python first on PATH for the stub.

        Raises:
            RuntimeNotAvailable: this Python has no shared library.
        """
        libpython = libpython_directory()
        if libpython is None:
            raise RuntimeNotAvailable(missing_libpython())
        paths = [str(self.libraries or ""), str(libpython), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",
        }


def find_installation(runtime: str) -> Installation:
    """Find the tritonserver for a repository's runtime. For ``tensorrt``, prefer the one on PATH to the embedded one.

    Raises:
        RuntimeNotAvailable: there is none.
    """
    spec = importlib.util.find_spec("pytriton")
    wheel = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    on_path = shutil.which("tritonserver")
    if on_path and (runtime == TENSORRT.name or wheel is None):
        return Installation(Path(on_path).resolve().parents[1])
    if wheel is None:
        raise RuntimeNotAvailable('the embedded tritonserver (nvidia-pytriton) is not installed; run "make setup"')
    return Installation(wheel / "tritonserver", libraries=wheel.parent / "nvidia_pytriton.libs")
