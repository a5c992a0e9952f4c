"""A build's progress as a bar, and its end on an interrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from icportrait.runtime.tensorrt.products import Flavour


@contextmanager
def progress_monitor(flavour: Flavour, title: str) -> Iterator[Any]:
    """Show TensorRT's progress as a bar.

    An interrupt stops the build at its next step, because Python can't raise through TensorRT.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.load()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            bar.total += steps
            bar.set_postfix_str(phase.lower(), refresh=False)
            bar.refresh()

        def step_complete(self, phase: str, step: int) -> bool:
            if self.steps.get(phase, 0):
                self.steps[phase] -= 1
                bar.update()
            return not self.stopped

        def phase_finish(self, phase: str) -> None:
            bar.update(self.steps.pop(phase, 0))

    monitor = Monitor()

    def stop(*_: object) -> None:
        monitor.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        with tqdm(total=0, desc=title, unit="step") as bar:
            yield monitor
    finally:
        signal.signal(signal.SIGINT, before)
