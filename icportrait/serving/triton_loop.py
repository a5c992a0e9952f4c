"""The model around the denoising loop on Triton's side: its answers, its control line and its metrics.

It is apart from ``triton_models``, because the VAE's processes start sooner without what only the loop imports.
"""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from icportrait.contract import Tensors
from icportrait.errors import IcPortraitError, Unavailable, to_caller, to_wire
from icportrait.metrics import PREFIX, Kind, Labels, Metrics, description
from icportrait.serving.control import ControlServer
from icportrait.serving.denoise import Answer, DenoiseStage
from icportrait.serving.triton_models import ModelContext, attempt, end_with_parent, respond

logger = logging.getLogger(__name__)
PUBLISH_EVERY_S = 0.25
PUBLISH_TIMEOUT_S = 10.0
"""Publishing takes milliseconds."""


class DenoiseModel:
    """The Python model around the denoising loop: it answers each request once, as it ends."""

    def load(self, context: ModelContext) -> DenoiseStage:
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        end_with_parent()
        self.context = context = ModelContext(args)
        self._stage = self.load(context)
        self._line = (
            ControlServer(context.loop_path, self._stage.handle, self._stage.peer_has_gone)
            if context.loop_path
            else None
        )
        self._publisher = MetricsPublisher(self._stage.metrics)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            answer = answer_with(request.get_response_sender(), to_wire if self._line else to_caller)
            failed = attempt(
                self.context.name,
                lambda: self._stage.submit(self.context.inputs(request), answer),  # noqa: B023
            )
            if isinstance(failed, IcPortraitError):
                answer(failed)

    def finalize(self) -> None:
        if self._line:
            self._line.close()
        self._stage.close()
        self._publisher.close()


class MetricsPublisher:
    """Brings ``Metrics`` to Triton's metrics endpoint, now and then, on a thread of its own."""

    def __init__(self, metrics: Metrics) -> None:
        """Begin."""
        self._metrics = metrics
        self._published: dict[tuple[str, Labels], tuple[Any, float]] = {}
        self._families: dict[str, Any] = {}
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publish once more, and end."""
        self._stopping.set()
        self._thread.join()
        # Metrics that live longer than their model end tritonserver 2.51's stub with SIGSEGV.
        self._published.clear()
        self._families.clear()

    def _run(self) -> None:
        stops = is_failing = False
        while not stops:
            stops = self._stopping.wait(PUBLISH_EVERY_S)
            # A call into Triton keeps Python's lock. If tritonserver dies in it, no thread here can end the process.
            faulthandler.dump_traceback_later(PUBLISH_TIMEOUT_S, exit=True, file=2)
            try:
                failures = self._publish()
            finally:
                faulthandler.cancel_dump_traceback_later()
            if failures and not is_failing:
                logger.error("%d metrics could not be published", len(failures), exc_info=failures[0])
            is_failing = bool(failures)

    def _publish(self) -> list[Exception]:
        """Publish all series, and return the errors. A series that has failed is tried again the next time."""
        failures = []
        try:
            values = self._metrics.series()
        except Exception as error:
            return [error]
        for series, (kind, value) in values.items():
            try:
                metric, before = self._published.get(series) or (self._make(series, kind), 0.0)
                if value != before:
                    metric.set(value) if kind is Kind.GAUGE else metric.increment(value - before)
                self._published[series] = metric, value
            except Exception as error:
                failures.append(error)
        return failures

    def _make(self, series: tuple[str, Labels], kind: Kind) -> Any:
        import triton_python_backend_utils as pb_utils

        name, labels = series
        if name not in self._families:
            family = pb_utils.MetricFamily
            self._families[name] = family(
                name=PREFIX + name, description=description(name), kind=getattr(family, kind.name)
            )
        return self._families[name].Metric(labels=dict(labels))


def answer_with(sender: Any, text: Callable[[IcPortraitError], str] = to_wire) -> Answer:
    """Return a function that answers a request once, through Triton's sender; ``text``: see ``respond``."""
    import triton_python_backend_utils as pb_utils

    def send(outcome: Tensors | IcPortraitError) -> None:
        sender.send(respond(outcome, text), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(outcome: Tensors | IcPortraitError) -> None:
        try:
            send(outcome)
        except Exception:
            # Such as shared memory that is full: an error needs next to none of it.
            logger.exception("an answer could not be sent")
            send(Unavailable("the answer could not be sent, for want of shared memory; try again later"))

    return answer
