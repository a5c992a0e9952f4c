"""Arrays of other libraries on a real GPU: the runner takes them where they are (ADR 0014)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icportrait.errors import ContractError
from icportrait.runtime.cuda import Stream, as_device_array


@pytest.fixture
def gpuarray(request: pytest.FixtureRequest) -> Any:
    """Return pycuda's module of arrays, in the context that CUDA's runtime API uses."""
    pytest.importorskip("pycuda.driver", exc_type=ImportError)
    request.getfixturevalue("gpu")
    import pycuda.autoprimaryctx
    from pycuda import gpuarray

    assert pycuda.autoprimaryctx.context
    return gpuarray


def test_a_pycuda_array_is_taken_where_it_is(gpuarray: Any) -> None:
    values = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    theirs, stream = gpuarray.to_gpu(values), Stream()
    ours = as_device_array(theirs, stream)
    assert (ours.pointer, ours.shape, ours.dtype) == (int(theirs.gpudata), values.shape, values.dtype)
    assert theirs in ours.owner
    rows = stream.download(ours.rows(1, 2))
    stream.synchronize()
    np.testing.assert_array_equal(rows, values[1:3])


def test_a_pycuda_array_in_columns_is_refused(gpuarray: Any) -> None:
    columns = gpuarray.zeros((4, 6), np.float32, order="F")
    with pytest.raises(ContractError, match="C-contiguous"):
        as_device_array(columns, Stream())
