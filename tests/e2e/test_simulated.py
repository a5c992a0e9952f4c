"""The real server on simulated engines: at the table's speed, with the batching that was asked for, and labelled."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from icportrait.presets import DEMO_128
from tests.e2e.caller import infer, until_metric
from tests.e2e.conftest import WHOLE_STEP_MS
from tests.e2e.supervised import Supervised


def test_a_portrait_has_the_right_size_and_says_that_it_is_simulated(
    whole: Supervised, pictures: dict[str, bytes]
) -> None:
    assert "SIMULATED" in whole.ready and "test device" in whole.ready
    images, metadata = infer(whole.url, num_portraits=2, num_inference_steps=20, **pictures)
    side = DEMO_128.image_size
    assert [Image.open(io.BytesIO(image)).size for image in images] == [(side, side)] * 2
    assert metadata["simulated"] is True
    assert metadata["versions"]["engine"] == "simulated-test device"
    assert metadata["stage_ms"]["denoise"] >= 20 * WHOLE_STEP_MS
    (device,) = whole.folder.glob("icportrait-server-*/device")
    assert {path.name for path in device.iterdir()} == {"turn", "busy"}
    assert not list(whole.folder.glob("icportrait-device-*"))


def test_whole_batches_keep_a_later_request_waiting(whole: Supervised, pictures: dict[str, bytes]) -> None:
    """Send a later request, which would join an in-flight batch after a step or two."""
    infer(whole.url, num_inference_steps=1, **pictures)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(infer, whole.url, num_inference_steps=150, **pictures)
        until_metric(whole.metrics_url, "icportrait_active_slots", 1)
        infer(whole.url, num_inference_steps=1, **pictures)
        # Its answer may still be on its way.
        _, longer = first.result(5)
    assert longer["stage_ms"]["denoise"] >= 150 * WHOLE_STEP_MS
