"""What several of the unit tests share."""

from __future__ import annotations

import pytest

from tests.label_slots import LabelSlots


@pytest.fixture(params=[False, True], ids=["waits", "overlaps"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the loop's thread is free while engines run; then it decides a step ahead."""
    monkeypatch.setattr(LabelSlots, "overlaps", request.param)
    return bool(request.param)
