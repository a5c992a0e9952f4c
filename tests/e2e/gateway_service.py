"""A small portrait service for the doors' tests: what callers see of the real one, step by step as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from icportrait.contract import Array
from icportrait.errors import DeadlineMissed, IcPortraitError
from icportrait.gateway.api import Caller, Event, OnEvent, Portraits, Statistics
from icportrait.request import parse_request

IMAGE = b"\x89PNG picture \x00\xff"


class SmallService:
    """Answers with the pictures' lengths. Requests of 150 steps wait for ``go_on`` or their cancel."""

    def __init__(self) -> None:
        self.statistics: dict[str, Statistics] = {"ic_portrait": Statistics(succeeded=2**53 + 1)}
        self.is_ready = True
        self.refuses: IcPortraitError | None = None
        self.fails: Exception | None = None
        self.callers: list[Caller] = []
        self.running = self.cancelled = self.served = 0
        self.go_on = asyncio.Event()
        self.patience_s: float | None = None
        """Seconds that a caller has to take an event."""
        self.image, self.preview = IMAGE, b"cHJldmlldw=="

    def refusal(self) -> IcPortraitError | None:
        return self.refuses

    async def generate(self, inputs: Mapping[str, Array], caller: Caller, on_event: OnEvent | None = None) -> Portraits:
        self.callers.append(caller)
        defaults = {"num_inference_steps": 4, "guidance_scale": 1.0}
        request, profile, reference = parse_request(inputs, defaults, is_streamed=on_event is not None)
        self.running += 1
        try:
            steps = request.num_inference_steps
            for step in range(1, steps):
                if on_event:
                    every = request.preview_every
                    event = Event(step, steps, (self.preview,) if every and step % every == 0 else ())
                    try:
                        await asyncio.wait_for(on_event(event), self.patience_s)
                    except TimeoutError:
                        raise DeadlineMissed("deadline_ms: passed") from None
                await asyncio.sleep(0.001)
                if steps == 150:
                    await self.go_on.wait()
            if self.fails:
                raise self.fails
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        self.served += 1
        self.statistics["ic_portrait"].succeeded += 1
        self.statistics["ic_portrait"].queued_ns += 1
        image = b"aW1hZ2U=" if request.encoding == "base64" else self.image
        metadata = {"seed": request.seed, "profile_bytes": len(profile), "reference_bytes": len(reference)}
        options = {"scheduler": request.scheduler, "guidance_scale": request.guidance_scale, "box": request.profile_box}
        return Portraits((image,) * request.num_portraits, json.dumps(metadata | options).encode(), steps)
