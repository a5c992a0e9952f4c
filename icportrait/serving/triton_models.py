"""The common part of the repository's ``model.py`` files: the way between Triton's requests and the stages.

Every class has one boundary where exceptions end: a caller's mistake goes back as its own sentence under its code, a
failure of ours is logged with its traceback and answered without it.

``triton_python_backend_utils`` exists only inside Triton's stub process, so it is imported where it is used.
"""

from __future__ import annotations

import json
import logging
import os
import select
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from icportrait.contract import PARTITION_PARAMETER
from icportrait.errors import ContractError, IcPortraitError, to_wire
from icportrait.manifest import Manifest
from icportrait.policy import KEEPS_FAILING, LOOP_VARIABLE, POLICY_VARIABLE, ServingPolicy
from icportrait.runtime import Engine, Slots, load_engine, load_slots
from icportrait.runtime.cuda import Stream, is_lost
from icportrait.runtime.placement import Placed, join, private_copy
from icportrait.serving.counters import ENGINE_COUNTERS, CountedEngine, triton_counters

if TYPE_CHECKING:
    from icportrait.contract import Tensors

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
GIVE_UP_AFTER_S = 0.2


class ModelContext:
    """Facts that Triton tells a Python model when it loads the model, in this package's terms."""

    def __init__(self, args: Mapping[str, str]) -> None:
        """Read ``initialize``'s arguments.

        Args:
            args: Triton's; ``model_config`` is the ``config.pbtxt`` as JSON.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        parameters |= json.loads(os.environ.get(POLICY_VARIABLE, "{}"))
        self.name: str = config["name"]
        self.input_names = [tensor["name"] for tensor in config["input"]]
        self.directory = Path(args["model_repository"]) / args["model_version"]
        self.policy = ServingPolicy.from_parameters(parameters)
        loop = os.environ.get(LOOP_VARIABLE)
        self.loop_path = Path(loop) if loop else None
        """Path of the control line; None without a gateway."""
        self.manifest = Manifest.read(self.directory)

    @cached_property
    def stream(self) -> Stream:
        """Return the stream for work on tensors that come in GPU memory."""
        return Stream()

    def engine(self, name: str) -> Engine:
        """Load an engine that counts its rows and its time on Triton's metrics endpoint."""
        engine = load_engine(name, self.directory, self.manifest, self.policy)
        return CountedEngine(engine, triton_counters(ENGINE_COUNTERS, engine=name))

    def slots(self) -> Slots:
        return load_slots(self.directory, self.manifest, self.policy)

    def inputs(self, request: Any) -> dict[str, Any]:
        """Copy the request's tensors, because Triton takes its memory back, and some are used from other threads.

        A tensor stays in the memory that it came in. Only models whose configuration asks for it get any in the GPU's.
        """
        import triton_python_backend_utils as pb_utils

        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.input_names}
        return {name: self._copy(tensor) for name, tensor in tensors.items() if tensor is not None}

    def _copy(self, tensor: Any) -> Placed:
        return np.array(tensor.as_numpy()) if tensor.is_cpu() else private_copy(tensor, self.stream)


class StageModel:
    """A Python model around a synchronous stage; its ``model.py`` says which in ``load``."""

    error_text: Callable[[IcPortraitError], str] = staticmethod(to_wire)
    """Text of an error; ``respond`` uses it."""

    def load(self, context: ModelContext) -> Callable[..., Tensors]:
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        end_with_parent()
        self.context = ModelContext(args)
        self._stage = self.load(self.context)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [respond(self._attempt(request), self.error_text) for request in requests]

    def finalize(self) -> None:
        # Metrics that live longer than this end tritonserver 2.51's stub with SIGSEGV.
        del self._stage

    def _attempt(self, request: Any) -> Tensors | IcPortraitError:
        return attempt(self.context.name, lambda: self._stage(self.context.inputs(request)))


class EngineModel(StageModel):
    """A Python model around one engine; the requests that Triton batched run as one batch."""

    takes_partitions = False
    """The stage is also told the partition of each row, which the gateway gives as a request's parameter."""
    _failures = 0

    def execute(self, requests: list[Any]) -> list[Any]:
        answers = attempt(self.context.name, lambda: self._run(requests))
        if isinstance(answers, IcPortraitError):
            self._failures += 1
            if self._failures == KEEPS_FAILING or is_lost():
                give_up()
            return [respond(answers) for _ in requests]
        self._failures = 0
        return [respond(answer) for answer in answers]

    def _run(self, requests: list[Any]) -> list[Tensors]:
        """Return every request's outputs in the host's memory, because the loop or a file's encoder works there."""
        inputs = [self.context.inputs(request) for request in requests]
        counts = [next(iter(tensors.values())).shape[0] for tensors in inputs]
        ends, names = np.cumsum(counts), self.context.input_names
        batch = {name: self._join([tensors[name] for tensors in inputs]) for name in names}
        if self.takes_partitions:
            partitions = [
                _partition(request) for request, count in zip(requests, counts, strict=True) for _ in range(count)
            ]
            outputs = self._stage(batch, partitions)
        else:
            outputs = self._stage(batch)
        parts = {name: np.split(output, ends[:-1]) for name, output in outputs.items()}
        return [{name: arrays[index] for name, arrays in parts.items()} for index in range(len(requests))]

    def _join(self, parts: list[Any]) -> Any:
        on_host = all(isinstance(part, np.ndarray) for part in parts)
        return np.concatenate(parts) if on_host else join(parts, self.context.stream)


def _partition(request: Any) -> str:
    return str(json.loads(request.parameters() or "{}").get(PARTITION_PARAMETER, ""))


@cache
def end_with_parent() -> None:
    """End this process as soon as tritonserver has died.

    Its stub notices that after a second or two, and then may wait for ever for an answer to the last metrics.
    """
    try:
        parent = os.pidfd_open(os.getppid())
    except OSError:  # a kernel without, or one that forbids it
        return

    def wait() -> None:
        select.select([parent], [], [])
        os._exit(os.EX_UNAVAILABLE)

    Thread(target=wait, name="parent", daemon=True).start()


def give_up() -> None:
    """End this process, once its last answers have left: its engines keep failing, as CUDA's do after some errors.

    The gateway sees the control line break and the process end, and starts the server again.
    """
    logger.critical("the engines keep failing; this process ends, so that the server is restarted")
    Timer(GIVE_UP_AFTER_S, os._exit, [os.EX_SOFTWARE]).start()


def attempt(where: str, run: Callable[[], Result]) -> Result | IcPortraitError:
    """Return ``run``'s value, or the error to answer with: the one place where a model's exceptions end.

    A tensor that breaks its specification here is a failure of ours: callers have nothing to do with such tensors.
    """
    try:
        return run()
    except IcPortraitError as error:
        if not isinstance(error, ContractError):
            return error
        logger.exception("%s failed", where)
    except Exception:
        logger.exception("%s failed", where)
    return IcPortraitError(f"{where} failed on this server; its log has the cause")


def respond(outcome: Tensors | IcPortraitError, text: Callable[[IcPortraitError], str] = to_wire) -> Any:
    """Make Triton's response; ``text`` makes an error's, by default one that keeps its code."""
    import triton_python_backend_utils as pb_utils

    if isinstance(outcome, IcPortraitError):
        code = getattr(pb_utils.TritonError, outcome.code)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text(outcome), code))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outcome.items()])
