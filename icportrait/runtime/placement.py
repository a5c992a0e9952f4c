"""Arrays that may lie in the host's memory or in the GPU's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np

from icportrait.contract import Array
from icportrait.errors import ContractError
from icportrait.runtime.cuda import DeviceArray, DeviceMemory, Stream, as_device_array

Placed: TypeAlias = Array | DeviceArray


def private_copy(array: Any, stream: Stream) -> DeviceArray:
    """Copy an array in GPU memory that another library owns; see ``join``."""
    return join([as_device_array(array, stream)], stream)


def join(parts: Sequence[Placed], stream: Stream) -> DeviceArray:
    """Join arrays along the leading axis in new GPU memory, which is whole when this returns.

    Args:
        parts: equal in type and in all axes but the leading one.
        stream: the copies are made on it, and the memory is given back in its order.

    Raises:
        ContractError: the parts don't fit together.
    """
    dtype, row = parts[0].dtype, parts[0].shape[1:]
    if any(part.dtype != dtype or part.shape[1:] != row for part in parts):
        raise ContractError("arrays that are batched must be equal in type and in all axes but the first")
    ends = list(accumulate(part.shape[0] for part in parts))
    shape = (ends[-1], *row)
    joined = DeviceMemory(math.prod(shape) * dtype.itemsize, stream).array(shape, dtype)
    for end, part in zip(ends, parts, strict=True):
        put(part, joined.rows(end - part.shape[0], part.shape[0]), stream)
    stream.synchronize()
    return joined


def put(source: Placed, target: DeviceArray, stream: Stream) -> None:
    """Copy from either memory; ``source`` must be C-contiguous and live until the stream is synchronised."""
    if isinstance(source, np.ndarray):
        stream.upload(source, target)
    else:
        stream.copy(source, target)
