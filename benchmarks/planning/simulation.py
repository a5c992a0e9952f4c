"""A server in virtual time: requests' ways through it, by the denoising loop's and admission's own code.

The loop (``DenoisingLoop`` with its scheduler, batch, jobs and times), admission with its leases and forecasts, the
encoder's cache and the order of waiting pictures are the server's. What is modelled is the time around them:

    gateway     reads and checks a request, asks for a lease                      front_ms
    workers     decode both pictures and find faces, and encode portraits         prepare_ms, encode_ms
    encoder     both pictures in Triton's dynamic batches of all callers          to_encoder_ms, to_loop_ms
    loop        warping and steps                                                 join_ms, step_outside_ms
    decoder     in dynamic batches                                                to_decoder_ms, to_gateway_ms
    device      runs one engine at a time, first come first served                 the engines' times

Triton's dynamic batching without a delay takes what waits, once its instance is free, up to the largest batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.planning.profile import ServiceProfile
from benchmarks.planning.virtual import TINY_PRESET, Device, NoLatents, Servers, VirtualInbox, VirtualTime
from benchmarks.planning.workload import Call
from icportrait.contract import Array, ModelSpec, batch_axis, latent_spec, pixels_spec
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import DeadlineMissed, IcPortraitError, Unavailable
from icportrait.gateway.settings import Settings
from icportrait.loop.job import DenoiseResult, Job
from icportrait.loop.loop import DenoisingLoop
from icportrait.metrics import Metrics
from icportrait.pictures.prepare import Kept
from icportrait.policy import ServingPolicy, rank
from icportrait.request import PortraitRequest
from icportrait.runtime.load import DECODER_ROWS
from icportrait.serving.admission import Admission, Lease, Limits
from icportrait.serving.control import Demand
from icportrait.serving.encoder_cache import RowCache

OK, MISSED = "OK", "DEADLINE"
PICTURE_BYTES = 40_000
"""Bytes of a request's pictures, where nothing else is known; they count towards the queue's limit."""
_SCHEDULE = NoiseSchedule.from_config({})
_LATENT = latent_spec(TINY_PRESET, "latent", batch_axis(64))
_PICTURE = ModelSpec("vae_encoder", (pixels_spec(TINY_PRESET, "pixels", batch_axis(64)),), (_LATENT,))
_GATEWAY = Settings()


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a simulated server."""

    policy: ServingPolicy = field(default_factory=ServingPolicy)
    pictures_kept: int = _GATEWAY.pictures_kept
    pictures_kept_s: float = _GATEWAY.pictures_kept_s
    picture_bytes: int = PICTURE_BYTES


@dataclass(slots=True, eq=False)
class Passage:
    """One request's way. Times are virtual; NaN where the request did not come so far."""

    call: Call
    code: str = ""
    """``OK``, a reason of ``metrics.REFUSALS``, ``pending`` or ``DEADLINE``."""
    leased_s: float = math.nan
    prepared_s: float = math.nan
    """Both pictures are crops."""
    arrived_s: float = math.nan
    """Arrival at the loop."""
    joined_s: float = math.nan
    """Begin of its warping."""
    conditioned_s: float = math.nan
    denoised_s: float = math.nan
    decoded_s: float = math.nan
    """The gateway has the pixels."""
    made_s: float = math.nan
    """The gateway has the files."""
    answered_s: float = math.nan

    @property
    def latency_s(self) -> float:
        """Return the time from sending to the answer, whatever it was."""
        return self.answered_s - self.call.send_s

    @property
    def stage_ms(self) -> dict[str, float]:
        """Return the milliseconds by stage, as answers' metadata has them."""
        stages = {
            "front": self.leased_s - self.call.send_s,
            "preprocess": self.prepared_s - self.leased_s,
            "encode": self.arrived_s - self.prepared_s,
            "queue": self.joined_s - self.arrived_s,
            "warp": self.conditioned_s - self.joined_s,
            "denoise": self.denoised_s - self.conditioned_s,
            "decode": self.decoded_s - self.denoised_s,
            "postprocess": self.made_s - self.decoded_s,
            "back": self.answered_s - self.made_s,
        }
        return {name: 1000 * seconds for name, seconds in stages.items()}


@dataclass(frozen=True)
class Run:
    """A simulation as it went."""

    passages: Sequence[Passage]
    duration_s: float
    """Virtual seconds until the last answer."""
    busy: Mapping[str, float]
    """Share of the time in which each part was at work, until the last request was sent."""
    occupancy: float
    """Rows of a step, on average."""
    batches: Mapping[str, float]
    """Rows of an engine's run, on average, by engine."""


class _Counted(Metrics):
    """Keeps the last refusal's reason, and nothing else: nobody reads a simulated server's metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def count(self, name: str, **labels: str) -> None:
        """Keep a refusal's reason."""
        self.reason = labels.get("reason", self.reason)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Do nothing."""


class _Slots:
    """``Slots`` in virtual time."""

    engine_s: float | None = None
    step_s: Mapping[int, float] = MappingProxyType({})

    def __init__(self, server: SimulatedServer) -> None:
        profile, policy = server.profile, server.settings.policy
        self.rows, self.version = min(policy.slots, profile.preset.max_unet_batch), "virtual"
        self.max_jobs = profile.preset.max_warping_batch
        self._time, self._device = server.time, server.device
        self._warping_s = [0.0, *(each / 1000 for each in profile.engine_ms["warping_network"].values())]
        self._unet_s = [0.0, *(each / 1000 for each in profile.engine_ms["unet"].values())]
        self._outside_s = [profile.host.outside_ms(rows) / 1000 for rows in range(self.rows + 1)]
        self._late_s, self._join_s = profile.host.late_ms / 1000, profile.host.join_ms / 1000
        self._warped: list[Passage] = []
        self._end_s = 0.0
        self.stepped_s = 0.0
        """End of the last step. A job that leaves is answered before the next one ends."""
        self.steps = self.step_rows = self.warpings = 0

    def launch_warping(self, jobs: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[int]]) -> None:
        self._warped = [job["profile_latent"] for job in jobs]
        for passage in self._warped:
            passage.joined_s = self._time.now_s
        self.warpings += 1
        self._time.wait_until(self._time.now_s + self._join_s)
        self._launch(self._warping_s[len(jobs)])

    def wait_warping(self) -> Array:
        self._wait()
        for passage in self._warped:
            passage.conditioned_s = self._time.now_s
        return np.zeros(len(self._warped), np.float32)

    def launch(self, canvas_latent: Any, timestep: Any) -> None:
        rows = len(timestep)
        self.steps, self.step_rows = self.steps + 1, self.step_rows + rows
        self._time.wait_until(self._time.now_s + self._outside_s[rows])
        self._launch(self._unet_s[rows])

    def wait(self) -> Any:
        self._wait()
        self.stepped_s = self._end_s

    def clear(self, rows: Sequence[int]) -> None: ...

    def move(self, source: int, target: int) -> None: ...

    def _launch(self, duration_s: float) -> None:
        self._device.hold()
        duration_s += self._late_s
        self._end_s = self._time.now_s + duration_s
        self._device.begin(duration_s)

    def _wait(self) -> None:
        self._time.wait_until(self._end_s)
        self._device.release()


class _Batched:
    """A model of Triton's with dynamic batching: one instance, and one batch at a time of what waits."""

    def __init__(self, server: SimulatedServer, engine: str, run: Callable[[list[Any]], int] | None = None) -> None:
        """Begin without requests.

        Args:
            server: whose model it is.
            engine: its name.
            run: takes what the requests of a batch have brought, and returns the rows to compute; None computes all.
        """
        times = server.profile.engine_ms[engine]
        self._device, self._run = server.device, run
        late_ms, self._most = server.profile.host.late_ms, max(times)
        self._at_once = DECODER_ROWS if engine == "vae_decoder" else self._most
        self._run_s = [0.0, *((each + late_ms) / 1000 for each in times.values())]
        self._waiting: deque[tuple[int, Any, Callable[[], None]]] = deque()
        self._is_busy = False
        self.runs = self.rows = 0

    def ask(self, rows: int, brought: Any, answer: Callable[[], None]) -> None:
        """Take a request of a number of rows; ``answer`` is called at its end."""
        self._waiting.append((rows, brought, answer))
        if not self._is_busy:
            self._begin()

    def _begin(self) -> None:
        self._is_busy = True
        batch, rows = [self._waiting.popleft()], 0
        rows = batch[0][0]
        while self._waiting and rows + self._waiting[0][0] <= self._most:
            batch.append(self._waiting.popleft())
            rows += batch[-1][0]
        computed = self._run([brought for _, brought, _ in batch]) if self._run else rows
        if computed:
            self.runs, self.rows = self.runs + 1, self.rows + computed
        self._compute(computed, batch)

    def _compute(self, left: int, batch: Sequence[tuple[int, Any, Callable[[], None]]]) -> None:
        """Compute a batch's rows in portions, between which others have the device."""
        if left:
            rows = min(left, self._at_once)
            self._device.run(self._run_s[rows], lambda: self._compute(left - rows, batch))
        else:
            self._end(batch)

    def _end(self, batch: Sequence[tuple[int, Any, Callable[[], None]]]) -> None:
        self._is_busy = False
        if self._waiting:
            self._begin()
        for _, _, answer in batch:
            answer()


class _CountedEngine:
    """An engine for ``RowCache`` that counts rows; the time comes afterwards."""

    spec, version = _PICTURE, "virtual"

    def __init__(self) -> None:
        self.computed = 0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.computed = len(inputs["pixels"])
        return {"latent": np.zeros(_LATENT.shape(batch=self.computed), np.float32)}


@dataclass(eq=False)
class _Life:
    """A request on its way through the server."""

    server: SimulatedServer
    passage: Passage
    demand: Demand
    key: str
    lease: Lease | None = None
    is_over: bool = False
    left: int = 0
    """Pictures or portraits that are still worked on."""


class SimulatedServer:
    """One server in virtual time; ``run`` sends it requests."""

    def __init__(
        self, profile: ServiceProfile, settings: ServerSettings | None = None, time: VirtualTime | None = None
    ) -> None:
        """Make a server that has had no request.

        Args:
            profile: the times of its parts.
            settings: its own.
            time: of its own; None begins at 0 s.
        """
        self.profile, self.settings = profile, settings or ServerSettings()
        policy, host = self.settings.policy, profile.host
        self.time = time or VirtualTime()
        self.device = Device(self.time)
        self._workers = Servers(self.time, host.workers)
        self._gateway = Servers(self.time, 1)
        self._slots = _Slots(self)
        self._inbox = VirtualInbox(self.time, self._at_end)
        self._metrics = _Counted()
        self._runs: list[Callable[[], None]] = []
        self._loop = DenoisingLoop(
            self._slots,
            _SCHEDULE,
            TINY_PRESET,
            policy.batching,
            clock=self.time.clock,
            metrics=self._metrics,
            inbox=self._inbox,
            start=self._start,
            latents=NoLatents,
        )
        limits = Limits(policy.max_queued_slots, policy.max_queued_bytes)
        self._admission = Admission(self._loop.rows, limits, self._loop.pace, self.time.clock, self._metrics)
        self._engine = _CountedEngine()
        side, kept_rows = profile.preset.latent_size, _LATENT.nbytes(1)
        latents_kept = policy.cache_bytes // (4 * profile.preset.latent_channels * side**2)
        self._cache = RowCache(
            self._engine,
            latents_kept * kept_rows,
            keep_s=policy.cache_s,
            clock=self.time.clock,
        )
        self._kept = Kept(self.settings.pictures_kept, self.settings.pictures_kept_s, self.time.clock)
        self._preparing: dict[int, list[Callable[[], None]]] = {}
        self._encoder = _Batched(self, "vae_encoder", self._encode)
        self._decoder = _Batched(self, "vae_decoder")
        self.pending = self.answers = 0
        """Requests under way, and requests answered with portraits."""
        self._references = 0
        self._latest_s = 0.0
        self._busy: dict[str, float] = {}

    def run(self, calls: Sequence[Call]) -> Run:
        """Send requests at their moments, and run until all are answered. A server runs once."""
        passages = [self.send(call) for call in calls]
        self.time.at(calls[-1].send_s, self._note_busy)
        self.serve()
        slots = self._slots
        batches = {
            "unet": slots.step_rows / max(1, slots.steps),
            "vae_encoder": self._encoder.rows / max(1, self._encoder.runs),
            "vae_decoder": self._decoder.rows / max(1, self._decoder.runs),
        }
        return Run(passages, self._latest_s, self._busy, batches["unet"], batches)

    def send(self, call: Call) -> Passage:
        """Send a request at its moment, which is to come, and return its way, which is noted as it goes."""
        passage = Passage(call)
        self.time.at(call.send_s, lambda: self._send(passage))
        return passage

    def serve(self) -> None:
        """Run until no event is left. A server runs once."""
        self._runs.pop()()

    @property
    def queued_requests(self) -> int:
        """Return the metric of that name."""
        return self._admission.queued_requests

    @property
    def active_slots(self) -> int:
        """Return the metric of that name."""
        return self._loop.used_rows

    def _start(self, run: Callable[[], None]) -> Callable[[], None]:
        self._runs.append(run)
        return lambda: None

    def _at_end(self) -> None:
        self._loop.close()

    def _note_busy(self) -> None:
        now_s, workers = max(self.time.now_s, 1e-9), self._workers
        self._busy = {
            "device": self.device.busy_s / now_s,
            "workers": workers.busy_s / now_s / workers.count,
            "gateway": self._gateway.busy_s / now_s,
            "loop": (now_s - self._inbox.idle_s) / now_s,
        }

    # A request's way.

    def _send(self, passage: Passage) -> None:
        call, policy = passage.call, self.settings.policy
        self.pending += 1
        life = _Life(
            self,
            passage,
            Demand(call.phases, call.priority, call.deadline_ms, self.time.now_s, self.settings.picture_bytes),
            str(id(passage)),
        )
        if self.pending > policy.max_pending_requests:
            self._answer(life, "pending")
            return
        self._gateway.serve(self.profile.host.front_ms / 1000, lambda: self._lease(life))

    def _lease(self, life: _Life) -> None:
        try:
            life.lease = self._admission.lease(life.key, life.demand)
        except Unavailable:
            self._answer(life, self._metrics.reason)
            return
        life.passage.leased_s = self.time.now_s
        if life.demand.deadline_s < math.inf:
            self.time.at(max(life.demand.deadline_s, self.time.now_s), lambda: self._end(life, MISSED))
        call = life.passage.call
        life.left = 2
        for picture in (("profile", call.profile), ("reference", call.reference)):
            self._prepare(life, picture)

    def _prepare(self, life: _Life, picture: tuple[str, int]) -> None:
        def done() -> None:
            life.left -= 1
            if not life.left and not life.is_over:
                life.passage.prepared_s = self.time.now_s
                self.time.after(self.profile.host.to_encoder_ms / 1000, lambda: self._ask_encoder(life))

        if self._kept.get(picture):
            self.time.after(self.profile.host.kept_ms / 1000, done)
            return
        if waiting := self._preparing.get(picture):  # type: ignore[call-overload]
            waiting.append(done)
            return
        self._preparing[picture] = [done]  # type: ignore[index]

        def prepared() -> None:
            self._kept.put(picture, (None, None))  # type: ignore[arg-type]
            for each in self._preparing.pop(picture):  # type: ignore[call-overload]
                each()

        work_s = (self.profile.host.prepare_ms + self.profile.host.kept_ms) / 1000
        self._workers.serve(work_s, prepared, lambda now_s: rank(life.demand, now_s))

    def _ask_encoder(self, life: _Life) -> None:
        life.left = 2
        self._references += 1

        def done() -> None:
            life.left -= 1
            if not life.left:
                self.time.after(self.profile.host.to_loop_ms / 1000, lambda: self._submit(life))

        self._encoder.ask(1, life.passage.call.profile, done)
        # A reference's hidden patches are its request's own, so none is the same as another's.
        self._encoder.ask(1, -self._references, done)

    def _encode(self, pictures: list[int]) -> int:
        """Look pictures up in the encoder's cache, and return how many the engine must encode."""
        self._engine.computed = 0
        self._cache({"pixels": np.array(pictures, np.int64)[:, None]})
        return self._engine.computed

    def _submit(self, life: _Life) -> None:
        lease, demand, call = life.lease, life.demand, life.passage.call
        assert lease
        if lease.is_cancelled:
            return
        life.passage.arrived_s = self.time.now_s
        request = PortraitRequest(
            seed=0,
            num_portraits=call.portraits,
            num_inference_steps=call.steps,
            guidance_scale=call.guidance_scale,
            guidance_interval=call.guidance_interval,
            mask_ratio=0.8,
            scheduler="ddim",
            output_format="png",
            encoding="binary",
        )

        def on_done(result: DenoiseResult | IcPortraitError) -> None:
            lease.denoised_s = self.time.now_s
            if isinstance(result, DenoiseResult):
                life.passage.denoised_s = self._slots.stepped_s
                if not life.is_over:
                    self.time.after(self.profile.host.to_decoder_ms / 1000, lambda: self._ask_decoder(life))
            else:
                self._end(life, MISSED if isinstance(result, DeadlineMissed) else type(result).__name__)

        lease.job = job = Job(
            request,
            life.passage,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            on_done,
            priority=demand.priority,
            deadline_s=demand.deadline_s,
        )
        self._loop.submit(job)
        self._loop.pace.arrived(self.time.now_s - demand.arrived_s)

    def _ask_decoder(self, life: _Life) -> None:
        def done() -> None:
            self.time.after(self.profile.host.to_gateway_ms / 1000, lambda: self._make_files(life))

        self._decoder.ask(life.passage.call.portraits, None, done)

    def _make_files(self, life: _Life) -> None:
        if life.is_over:
            return
        life.passage.decoded_s = self.time.now_s
        life.left = life.passage.call.portraits

        def done() -> None:
            life.left -= 1
            if not life.left and not life.is_over:
                life.passage.made_s = self.time.now_s
                assert life.lease and life.lease.denoised_s is not None
                self._loop.pace.answered(self.time.now_s - life.lease.denoised_s)
                self.time.after(self.profile.host.back_ms / 1000, lambda: self._end(life, OK))

        for _ in range(life.passage.call.portraits):
            self._workers.serve(self.profile.host.encode_ms / 1000, done, lambda now_s: rank(life.demand, now_s))

    def _end(self, life: _Life, code: str) -> None:
        if life.is_over:
            return
        self._admission.release(life.key)
        if code != OK and life.lease:
            life.lease.cancel()
        self._answer(life, code)

    def _answer(self, life: _Life, code: str) -> None:
        life.is_over = True
        self.pending -= 1
        self.answers += code == OK
        life.passage.code, life.passage.answered_s = code, self.time.now_s
        self._latest_s = max(self._latest_s, self.time.now_s)
