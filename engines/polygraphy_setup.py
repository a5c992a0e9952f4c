"""Polygraphy, which reads the product that it is to work with from the environment, once, when it is imported."""

from __future__ import annotations

import os

from icportrait.runtime.tensorrt.products import TENSORRT_RTX, Flavour

PRODUCT_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"


def prepare_polygraphy(flavour: Flavour | None = None) -> None:
    """Call this before Polygraphy is imported: chooses its product and silences its log.

    Args:
        flavour: the product to build with, one for the whole process. None where none is needed; then a choice that
            was made before stays.
    """
    if flavour is None:
        os.environ.setdefault(PRODUCT_VARIABLE, "1")
    else:
        os.environ[PRODUCT_VARIABLE] = str(int(flavour is TENSORRT_RTX))
    from polygraphy.logger import G_LOGGER

    # It logs what it then raises, and TensorRT's own messages come through our logger.
    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1
