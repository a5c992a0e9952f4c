"""Virtual time: a heap of events, a device that runs one thing at a time, and the denoising loop's surroundings.

The loop blocks where it waits: for a message, for the device, for the end of a run. In virtual time such a wait handles
the events until its end comes. So ``DenoisingLoop`` itself runs here, on the caller's thread, and all else is an event.
"""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np

from icportrait.contract import Array
from icportrait.diffusion.latents import RowLatents
from icportrait.presets import Preset

Event = Callable[[], None]
TINY_PRESET = Preset(
    name="virtual",
    image_size=8,
    vae_channels=(1,) * 4,
    unet_channels=(1,),
    attention_levels=(False,),
    attention_heads=1,
    cross_attention_dim=1,
    prompt_tokens=1,
    norm_num_groups=1,
    mask_patch_px=8,
)
"""A geometry without content: rows in virtual time have no latents."""
_NO_NOISE = np.zeros((1, 1, 1, 2), np.float32)


class VirtualTime:
    """A clock that jumps from event to event."""

    def __init__(self) -> None:
        """Begin at 0 s."""
        self.now_s = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._count = 0

    def clock(self) -> float:
        """Return the seconds by now."""
        return self.now_s

    def at(self, time_s: float, event: Event) -> None:
        """Note an event. Events of one moment happen in the order in which they were noted."""
        self._count += 1
        heappush(self._events, (time_s, self._count, event))

    def after(self, delay_s: float, event: Event) -> None:
        """Note an event that happens in a number of seconds."""
        self.at(self.now_s + delay_s, event)

    def next(self) -> bool:
        """Let the next event happen. Return False where there is none."""
        if not self._events:
            return False
        self.now_s, _, event = heappop(self._events)
        event()
        return True

    def wait_until(self, time_s: float) -> None:
        """Let all events happen until a moment."""
        events = self._events
        while events and events[0][0] <= time_s:
            self.now_s, _, event = heappop(events)
            event()
        self.now_s = time_s


class Device:
    """One device for all engines of a server: first come, first served, as ``SharedDevice``."""

    def __init__(self, time: VirtualTime) -> None:
        """Begin without work."""
        self._time = time
        self._waiting: deque[Event] = deque()
        self._is_held = False
        self._runs_s = self._end_s = 0.0

    @property
    def busy_s(self) -> float:
        """Return the seconds of runs until now."""
        return self._runs_s - max(0.0, self._end_s - self._time.now_s)

    def acquire(self, granted: Event) -> None:
        """Call ``granted`` once the device is free for it."""
        if self._is_held:
            self._waiting.append(granted)
        else:
            self._is_held = True
            granted()

    def release(self) -> None:
        """Give the device to the next in turn."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._is_held = False

    def run(self, duration_s: float, ended: Event) -> None:
        """Run for a while once the device is free, then call ``ended``."""

        def end() -> None:
            self.release()
            ended()

        def begin() -> None:
            self.begin(duration_s)
            self._time.after(duration_s, end)

        self.acquire(begin)

    def begin(self, duration_s: float) -> None:
        """Note a run of the device's holder that begins now."""
        self._runs_s += duration_s
        self._end_s = self._time.now_s + duration_s

    def hold(self) -> None:
        """Wait for the device, as the loop's thread does."""
        held: list[bool] = []
        self.acquire(lambda: held.append(True))
        while not held and self._time.next():
            pass


class Servers:
    """A number of equal servers; waiting work is served in the order of its key, then of its coming."""

    def __init__(self, time: VirtualTime, count: int) -> None:
        """Begin without work."""
        self.count = count
        self._time, self._free = time, count
        self._works_s = 0.0
        self._ends_s: list[float] = []
        """A heap: when the work that is being done ends."""
        self._waiting: list[tuple[Any, float, Event]] = []

    @property
    def busy_s(self) -> float:
        """Return the seconds of work until now, summed over servers."""
        return self._works_s - sum(end_s - self._time.now_s for end_s in self._ends_s)

    def serve(self, duration_s: float, ended: Event, key: Callable[[float], Any] | None = None) -> None:
        """Work for a while once a server is free, then call ``ended``.

        Args:
            duration_s: of the work.
            ended: is called at the work's end.
            key: gives the work's order at a moment, the smallest first; None goes by the order of coming.
        """
        self._waiting.append((key, duration_s, ended))
        self._assign()

    def _assign(self) -> None:
        while self._free and self._waiting:
            index, now_s = 0, self._time.now_s
            if len(self._waiting) > 1 and self._waiting[0][0] is not None:
                index = min(range(len(self._waiting)), key=lambda each: self._waiting[each][0](now_s))
            _, duration_s, ended = self._waiting.pop(index)
            self._free -= 1
            self._works_s += duration_s
            heappush(self._ends_s, now_s + duration_s)
            self._time.after(duration_s, lambda ended=ended: self._end(ended))  # type: ignore[misc]

    def _end(self, ended: Event) -> None:
        self._free += 1
        heappop(self._ends_s)
        ended()
        self._assign()


class VirtualInbox:
    """The loop's inbox. A ``get`` lets events happen until a message comes, and ends the loop after the last event."""

    def __init__(self, time: VirtualTime, at_end: Event) -> None:
        """Begin empty.

        Args:
            time: of the events.
            at_end: is called once no event is left; it puts a message.
        """
        self._time, self._at_end = time, at_end
        self._messages: deque[Event] = deque()
        self.idle_s = 0.0
        """Seconds in which the loop had nothing to do."""

    def put(self, item: Event, /) -> None:
        """Add a message."""
        self._messages.append(item)

    def get(self, *, timeout: float | None = None) -> Event:
        """Return the next message.

        Raises:
            queue.Empty: none came in time.
        """
        began_s, until_s = self._time.now_s, math.inf
        timed_out: list[bool] = []
        if timeout is not None and not self._messages:
            until_s = began_s + timeout
            self._time.at(until_s, lambda: timed_out.append(True))
        while not self._messages and not timed_out:
            if not self._time.next():
                self._at_end()
        self.idle_s += self._time.now_s - began_s
        if not self._messages:
            raise queue.Empty
        return self._messages.popleft()

    def empty(self) -> bool:
        """Tell whether no message waits."""
        return not self._messages


class NoLatents(RowLatents):
    """Rows without latents: nothing is computed, and every row is finite."""

    def __init__(self, preset: Preset, rows: int) -> None:
        """Make nothing."""
        self._timesteps = [range(used) for used in range(rows + 1)]

    @staticmethod
    def noise(preset: Preset, seeds: Sequence[int]) -> Array:
        """Return the same zeros for all."""
        return _NO_NOISE

    def canvas(self, used: int) -> Any:
        """Return nothing."""

    def timestep(self, used: int) -> Any:
        """Return something as long as the rows in use."""
        return self._timesteps[used]

    def fill(self, *_: Any) -> None:
        """Do nothing, as all that follow."""

    def move(self, *_: Any) -> None: ...

    def prepare(self, *_: Any) -> None: ...

    def advance(self, *_: Any) -> None: ...

    def complete(self) -> None: ...

    def are_finite(self, rows: Sequence[int]) -> bool:
        """Return True."""
        return True

    def latent(self, rows: Sequence[int]) -> Any:
        """Return nothing."""

    def clean_latent(self, rows: Sequence[int]) -> Any:
        """Return nothing."""
