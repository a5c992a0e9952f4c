"""The two TensorRT products behind one API: what each is called, and what it needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from icportrait.errors import RuntimeNotAvailable


@dataclass(frozen=True)
class Flavour:
    """A TensorRT product. Both have the same API under another module name."""

    name: str
    module: str
    package: str
    """The name that pip installs."""
    compiles_without_gpu: bool
    """Plans are compiled ahead of time and finished where they are loaded; else they are built on the GPU that runs
    them."""

    def load(self) -> Any:
        """Load the product's Python module.

        Raises:
            RuntimeNotAvailable: it isn't installed, or its libraries can't be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise RuntimeNotAvailable(
                f"{self.name} is not installed here ({error}); install it with: pip install {self.package}"
            ) from error

    def supports(self, capability: str) -> bool:
        """Tell whether there are kernels for a compute capability: in TensorRT-RTX for the ones that it names.

        Raises:
            RuntimeNotAvailable: see ``load``.
        """
        named = self.load()
        return not self.compiles_without_gpu or hasattr(named.ComputeCapability, f"SM{capability.replace('.', '')}")

    def version(self) -> str:
        """Return the installed product's version, such as 11.4.0.106.

        Raises:
            RuntimeNotAvailable: see ``load``.
        """
        return str(self.load().__version__)


TENSORRT_RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx-cu13==1.7.1.116", compiles_without_gpu=True)
TENSORRT = Flavour("tensorrt", "tensorrt", "tensorrt-cu13==11.4.0.106", compiles_without_gpu=False)
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT_RTX, TENSORRT)}
