"""What the repository's ``model.py`` files have in common: the way between Triton's requests and the stages.

Every class has one boundary where exceptions end: a caller's mistake goes back as its own sentence under its code, a
failure of ours is logged with its traceback and answered without it.

``triton_python_backend_utils`` exists only inside Triton's stub process, so it is imported where it is used.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import BoundedSemaphore, Event, Lock, Thread
from typing import Any, TypeVar

import numpy as np

from icportrait.cancellation import CancelListener, send_cancel
from icportrait.contract import ENSEMBLE
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable, from_wire, to_caller, to_wire
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.request import OUTPUTS
from icportrait.runtime import Engine, Slots, load_engine, load_slots
from icportrait.runtime.cuda import Stream
from icportrait.runtime.placement import Placed, join, private_copy
from icportrait.serving import DenoiseStage, FrontStage, Tensors

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Answer = Callable[[Tensors | IcPortraitError], None]


class ModelContext:
    """What Triton tells a Python model when it is loaded, in this package's terms."""

    def __init__(self, args: Mapping[str, str]) -> None:
        """Read ``initialize``'s arguments.

        Args:
            args: Triton's; ``model_config`` is the ``config.pbtxt`` as JSON.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.name: str = config["name"]
        self.input_names = [tensor["name"] for tensor in config["input"]]
        self.directory = Path(args["model_repository"]) / args["model_version"]
        self.policy = ServingPolicy.from_parameters(parameters)
        self.manifest = Manifest.read(self.directory)

    @cached_property
    def stream(self) -> Stream:
        """What is done with tensors that come in GPU memory is done on it."""
        return Stream()

    def engine(self, name: str) -> Engine:
        return load_engine(name, self.directory, self.manifest, self.policy)

    def slots(self) -> Slots:
        return load_slots(self.directory, self.manifest, self.policy)

    def inputs(self, request: Any) -> dict[str, Any]:
        """Copies of the request's tensors: Triton takes its memory back, and some are used from other threads.

        A tensor stays in the memory that it came in. Only models whose configuration asks for it get any in the GPU's.
        """
        import triton_python_backend_utils as pb_utils

        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.input_names}
        return {name: self._copy(tensor) for name, tensor in tensors.items() if tensor is not None}

    def _copy(self, tensor: Any) -> Placed:
        return np.array(tensor.as_numpy()) if tensor.is_cpu() else private_copy(tensor, self.stream)


class StageModel:
    """A Python model around a synchronous stage; its ``model.py`` says which in ``load``."""

    def load(self, context: ModelContext) -> Callable[[Tensors], Tensors]:
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        self.context = ModelContext(args)
        self._stage = self.load(self.context)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [_respond(self._attempt(request)) for request in requests]

    def _attempt(self, request: Any) -> Tensors | IcPortraitError:
        return attempt(self.context.name, lambda: self._stage(self.context.inputs(request)))


class EngineModel(StageModel):
    """A Python model around one engine; the requests that Triton batched run as one batch."""

    def execute(self, requests: list[Any]) -> list[Any]:
        answers = attempt(self.context.name, lambda: self._run(requests))
        if isinstance(answers, IcPortraitError):
            return [_respond(answers) for _ in requests]
        return [_respond(answer) for answer in answers]

    def _run(self, requests: list[Any]) -> list[Tensors]:
        """Every request's outputs, in the host's memory: what comes next, the loop or a file's encoder, works there."""
        inputs = [self.context.inputs(request) for request in requests]
        ends = np.cumsum([next(iter(tensors.values())).shape[0] for tensors in inputs])
        names = self.context.input_names
        outputs = self._stage({name: self._join([tensors[name] for tensors in inputs]) for name in names})
        parts = {name: np.split(output, ends[:-1]) for name, output in outputs.items()}
        return [{name: arrays[index] for name, arrays in parts.items()} for index in range(len(requests))]

    def _join(self, parts: list[Any]) -> Any:
        on_host = all(isinstance(part, np.ndarray) for part in parts)
        return np.concatenate(parts) if on_host else join(parts, self.context.stream)


class DenoiseModel:
    """The decoupled Python model around the denoising loop."""

    def load(self, context: ModelContext) -> DenoiseStage:
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        self.context = ModelContext(args)
        self._stage = self.load(self.context)
        self._cancels = CancelListener(self.context.directory, self._stage.cancel)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            answer = _answer_with(request.get_response_sender())
            failed = attempt(
                self.context.name,
                lambda: self._stage.submit(self.context.inputs(request), answer),  # noqa: B023
            )
            if isinstance(failed, IcPortraitError):
                answer(failed)

    def finalize(self) -> None:
        self._cancels.close()
        self._stage.close()


class FrontModel:
    """A public model: checks the request, runs the ensemble for it from a thread and restores error codes.

    Both fronts keep the response sender and answer later, so that one instance holds many requests at once.
    """

    def initialize(self, args: dict[str, str]) -> None:
        self.context = ModelContext(args)
        limit = self.context.policy.max_pending_requests
        self._places = BoundedSemaphore(limit)
        self._threads = ThreadPoolExecutor(limit, thread_name_prefix="front")
        self._check = FrontStage(self.context.manifest, self.context.policy)
        self._senders: dict[str, Any] = {}
        # A sender that has given its answer may not be asked any more.
        self._asking = Lock()
        self._stopping = Event()
        self._watcher = Thread(target=self._watch, name="cancelled", daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            answer = _answer_with(sender, restore_code=True)
            if not self._places.acquire(blocking=False):
                limit = self.context.policy.max_pending_requests
                answer(Unavailable(f"{limit} requests are pending, which is this server's limit; try again later"))
                continue
            tensors = attempt(self.context.name, lambda: self._public_inputs(request))  # noqa: B023
            key = secrets.token_hex(16)
            self._senders[key] = sender
            self._threads.submit(self._serve, tensors, answer, key)

    def finalize(self) -> None:
        self._threads.shutdown()
        self._stopping.set()
        self._watcher.join()

    def _watch(self) -> None:
        """Look which callers have gone. Each look asks Triton's process, so more requests are looked at less often."""
        while not self._stopping.wait(0.01 + 0.001 * len(self._senders)):
            for key in list(self._senders):
                if self._is_cancelled(key):
                    send_cancel(self.context.directory, key)

    def _is_cancelled(self, key: str) -> bool:
        with self._asking:
            sender = self._senders.get(key)
            if sender is None or not sender.is_cancelled():
                return False
            del self._senders[key]
            return True

    def _public_inputs(self, request: Any) -> Tensors:
        try:
            parameters = json.loads(request.parameters() or "{}")
        except ValueError as error:
            raise InvalidRequest(f"the request's parameters are no UTF-8 text ({error.__class__.__name__})") from error
        # HTTP generate turns a JSON member that names no input into a parameter: unknown inputs hide there.
        unknown = {name: np.array([value]) for name, value in parameters.items()}
        return unknown | self.context.inputs(request)

    def _serve(self, tensors: Tensors | IcPortraitError, answer: Answer, key: str) -> None:
        outcome = tensors
        if not isinstance(tensors, IcPortraitError):
            outcome = attempt(self.context.name, lambda: self._run_pipeline(self._check(tensors, key)))
        with self._asking:
            self._senders.pop(key, None)
        self._places.release()
        answer(outcome)

    def _run_pipeline(self, inputs: Tensors) -> Tensors:
        import triton_python_backend_utils as pb_utils

        names = [name for name, _, _ in OUTPUTS]
        call = pb_utils.InferenceRequest(
            model_name=ENSEMBLE,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
        )
        outputs: Tensors | None = None
        for response in call.exec(decoupled=True):
            if response.has_error():
                raise _pipeline_error(response.error().message())
            if response.output_tensors():
                outputs = {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names}
        if outputs is None:
            raise RuntimeError("the pipeline ended without an answer")
        return outputs


def _pipeline_error(message: str) -> Exception:
    """A stage's own error, or what Triton says while it stops or has lost a stage's process."""
    if any(sign in message for sign in ("is stopping", "is not ready", "not healthy")):
        return Unavailable("the server is stopping or has lost a part; try again later")
    return from_wire(message) or RuntimeError(message)


def attempt(where: str, run: Callable[[], Result]) -> Result | IcPortraitError:
    """``run``'s value, or the error to answer with: the one place where a model's exceptions end."""
    try:
        return run()
    except IcPortraitError as error:
        return error
    except Exception:
        logger.exception("%s failed", where)
        return IcPortraitError(f"{where} failed on this server; its log has the cause")


def _respond(outcome: Tensors | IcPortraitError, restore_code: bool = False) -> Any:
    """Triton's response; ``restore_code`` gives the error to a caller, else its code is kept for the way there."""
    import triton_python_backend_utils as pb_utils

    if isinstance(outcome, IcPortraitError):
        text = to_caller(outcome) if restore_code else to_wire(outcome)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, outcome.code)))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outcome.items()])


def _answer_with(sender: Any, restore_code: bool = False) -> Answer:
    import triton_python_backend_utils as pb_utils

    def send(outcome: Tensors | IcPortraitError) -> None:
        sender.send(_respond(outcome, restore_code), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(outcome: Tensors | IcPortraitError) -> None:
        try:
            send(outcome)
        except Exception:
            # Such as shared memory that is full: an error needs next to none of it.
            logger.exception("an answer could not be sent")
            send(Unavailable("the answer could not be sent, for want of shared memory; try again later"))

    return answer
