"""The service behind the doors: a request's way from its inputs to portraits.

    check      all but the pictures; a seed is drawn where none came
    lease      the loop lets it in, or says when to come again
    prepare    pictures to crops, in processes of their own (``workers``)
    denoise    crops to pixels, through a private Triton (``engine``); steps and previews come beside it
    encode     pixels to files, signed where the operator says so, in those processes

An engine that ends on the way is started again (``host``), and what was let in is asked of the next one.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Coroutine, Hashable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from icportrait.contract import Array
from icportrait.deploy.triton_config import STREAM, UNARY
from icportrait.diffusion.masking import hide, reference_visibility
from icportrait.errors import DeadlineMissed, IcPortraitError, PermissionDenied, Unavailable
from icportrait.gateway.api import Caller, Event, OnEvent, Portraits, Statistics
from icportrait.gateway.c2pa_signing import MARK, Ingredient, Signed, encode_and_sign, read_ingredient
from icportrait.gateway.engine import Engine, EngineLostError
from icportrait.gateway.records import CURRENT, phase
from icportrait.gateway.settings import Settings
from icportrait.gateway.workers import Workers
from icportrait.manifest import Manifest
from icportrait.phases import row_steps
from icportrait.pictures.faces import Crop
from icportrait.pictures.imaging import encode_picture
from icportrait.pictures.prepare import Box, Kept, prepare
from icportrait.policy import ServingPolicy
from icportrait.request import PortraitRequest
from icportrait.serving.control import Demand
from icportrait.serving.stages import AnswerMetadata, FrontStage

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
MAX_REPLAYS = 3
"""Replays of a request. A request that was there each time when this many engines ended may be the cause."""
LOST_WITHIN_S = 5.0
"""Seconds within which an engine that fails as if it were ending has ended."""
TOLD_APART = 16
"""Queued steps that a slow reader is told one by one; beyond them the reader is told the last step only."""
HASHED_ASIDE_BYTES = 2**18
"""Size above which files are hashed on a thread, because other requests' events would wait."""
ENCODED_ASIDE_BYTES = 2**16
"""Portraits up to this size are encoded on a thread, in a millisecond: the way to a process and back takes two more."""
RETRY = "retry_after_ms: 1000"


class Engines(Protocol):
    """Gives the engines that requests run on, one or several."""

    @property
    def count(self) -> int:
        """Return the number of engines, up or not."""

    @property
    def refusal(self) -> Unavailable | None:
        """Return the error that says why there is no engine now, None where there is one."""

    async def lease(self, key: str, demand: Demand, profile: Hashable = None, failed: Engine | None = None) -> Engine:
        """Take a lease on an engine, and return the engine.

        Args:
            key: the request's.
            demand: what it will take.
            profile: equal for requests with the same profile; None for a request that may go anywhere.
            failed: the engine that has let it in before, and that has ended or has failed it. An engine that is not up
                yet is then waited for.

        Raises:
            Unavailable: no engine lets it in, or none is up.
        """


class Service:
    """Implement ``api.PortraitService``."""

    def __init__(
        self, manifest: Manifest, policy: ServingPolicy, settings: Settings, engines: Engines, workers: Workers
    ) -> None:
        """Begin to take requests.

        Args:
            manifest: the export's.
            policy: the server's, with what start-up and the settings have chosen.
            settings: of the gateway.
            engines: where requests run.
            workers: where pictures are decoded and encoded; started.
        """
        self.statistics = {UNARY: Statistics(), STREAM: Statistics()}
        self.engines, self.workers = engines, workers
        self.preset = manifest.preset
        self.metadata = AnswerMetadata(manifest, policy)
        self.kept = Kept(settings.pictures_kept, settings.pictures_kept_s)
        self.signs = settings.c2pa_certificate is not None
        self.replays = 0
        self._checks = {model: FrontStage(manifest, policy, model == STREAM) for model in self.statistics}
        self._limit = engines.count * policy.max_pending_requests
        self._lives: set[_Life] = set()
        self._stopping = False

    @property
    def is_ready(self) -> bool:
        return not self._stopping and self.engines.refusal is None

    @property
    def pending(self) -> int:
        """Return how many requests are on their way."""
        return len(self._lives)

    def refusal(self) -> IcPortraitError | None:
        if self._stopping:
            return Unavailable(f"the server is stopping; ask another, or try again later; {RETRY}")
        if refusal := self.engines.refusal:
            return refusal
        if len(self._lives) >= self._limit:
            text = f"{self._limit} requests are pending, which is this server's limit; try again later; {RETRY}"
            return Unavailable(text)
        return None

    async def generate(self, inputs: Mapping[str, Array], caller: Caller, on_event: OnEvent | None = None) -> Portraits:
        model = STREAM if on_event else UNARY
        statistics, began_ns = self.statistics[model], time.monotonic_ns()
        life: _Life | None = None
        try:
            if refusal := self.refusal():
                raise refusal
            request, *files = self._checks[model].check(inputs, secrets.token_hex(16))
            if caller.priorities is not None and request.priority not in caller.priorities:
                allowed = ", ".join(map(str, sorted(caller.priorities)))
                raise PermissionDenied(f"priority: {request.priority}, and this API key allows {allowed or 'none'}")
            life = _Life(self, request, files, caller, on_event)
            self._lives.add(life)
            portraits = await life.run()
        except BaseException:
            statistics.failed += 1
            statistics.failed_ns += time.monotonic_ns() - began_ns
            raise
        else:
            statistics.succeeded += 1
            statistics.succeeded_ns += time.monotonic_ns() - began_ns
            statistics.queued_ns += life.queued_ns
            return portraits
        finally:
            statistics.last_ms = time.time_ns() // 10**6
            if life:
                self._lives.discard(life)

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, and wait at most ``timeout_s`` until the requests on their way are answered."""
        self._stopping = True
        end_s = time.monotonic() + timeout_s
        while self._lives and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        for life in self._lives:
            life.end(Unavailable(f"the server has stopped; ask another, or try again later; {RETRY}"))
        while self._lives:
            await asyncio.sleep(0)


class _Life:
    """One request from its lease to its answer."""

    def __init__(
        self,
        service: Service,
        request: PortraitRequest,
        files: Iterable[bytes],
        caller: Caller,
        on_event: OnEvent | None,
    ) -> None:
        if request.deadline_ms or caller.deadline_ms:
            # The answer to one that comes too late says how far it came.
            request = dataclasses.replace(request, is_streamed=True)
        self._service, self._request, self._caller, self._on_event = service, request, caller, on_event
        self._files = dict(zip(("profile", "reference"), files, strict=True))
        self._digests: dict[str, bytes] = {}
        self._ingredients: tuple[Ingredient, ...] = ()
        self._demand = Demand(
            phases=request.phases,
            priority=request.priority,
            deadline_ms=request.deadline_ms,
            arrived_s=request.arrived_ns / 1e9,
            nbytes=sum(map(len, self._files.values())),
        )
        self._engine: Engine | None = None
        self._reason: IcPortraitError | None = None
        self._timeout = asyncio.timeout_at(self._ends_s())
        self._steps = 0
        self._asks_engine = False
        # Of streams: what is to be told, the last step among it, and the last that was told.
        self._events: deque[tuple[int, Array | None, Engine]] = deque()
        self._queued_step = self._told_step = 0
        self._has_event = asyncio.Event()
        self._is_made = False
        self.queued_ns = 0

    def end(self, reason: IcPortraitError) -> None:
        """Answer the request with an error now."""
        self._reason = reason
        self._timeout.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> Portraits:
        """Make the request's portraits, as ``Service.generate`` says."""
        has_failed = False
        try:
            async with self._timeout:
                with phase("lease"):
                    await self._lease()
                return await (self._make_and_tell() if self._on_event else self._make())
        except IcPortraitError:
            has_failed = True
            raise
        except TimeoutError:
            if not self._timeout.expired():
                raise
            raise self._reason or self._missed() from None
        finally:
            # A picture that can't be read is nobody's going away, and the engine was asked for nothing.
            self._let_go(None, is_cancelled=self._asks_engine or not has_failed)

    def _ends_s(self) -> float | None:
        """Return the earlier deadline, the request's own or its call's, by the event loop's clock; None without any."""
        ends = [self._demand.deadline_s] if self._request.deadline_ms is not None else []
        if self._caller.deadline_ms is not None:
            ends.append(self._request.arrived_ns / 1e9 + self._caller.deadline_ms / 1e3)
        return min(ends, default=None)

    def _missed(self) -> DeadlineMissed:
        return DeadlineMissed(f"deadline_ms: passed after {self._steps} of {self._request.num_inference_steps} steps")

    # Leases.

    async def _lease(self, failed: Engine | None = None) -> None:
        engines, profile = self._service.engines, None
        if engines.count > 1:
            profile = await self._picture_key("profile", self._request.profile_box)
        self._engine = engine = await engines.lease(self._request.key, self._demand, profile, failed)
        # What the last engine has said and nobody was told, this one says again.
        self._events.clear()
        self._queued_step = self._told_step
        engine.listen(self._request.key, self)

    async def _replay(self, failed: Engine) -> None:
        """Ask anew for what was let in: another engine, once it is up, or the same one where there is no other."""
        self._service.replays += 1
        logger.debug("a request is asked of an engine anew")
        await self._lease(failed)

    def _let_go(self, stage_ms: Mapping[str, float] | None, is_cancelled: bool = False) -> None:
        """Give the lease back; ``is_cancelled`` also ends what the engine still does."""
        if self._engine:
            self._engine.listen(self._request.key, None)
            if is_cancelled and not self._timeout.expired():
                self._engine.cancel(self._request.key)
            self._engine.release(self._request.key, stage_ms)
            self._engine = None

    # Portraits.

    async def _make(self) -> Portraits:
        began_ns = time.monotonic_ns()
        decoding_waits_ns, encoding_waits_ns = [0], [0]
        with phase("prepare"):
            (profile_crop, profile), (reference_crop, reference) = await _together(
                self._prepare("profile", self._request.profile_box, decoding_waits_ns),
                self._prepare("reference", self._request.reference_box, decoding_waits_ns),
            )
            if self._service.signs:
                self._ingredients = tuple(await _together(*map(self._read_ingredient, self._files)))
        visibility = reference_visibility(self._service.preset, self._request.mask_ratio, self._request.seed)
        crops = profile[None], hide(reference, visibility)[None], visibility
        prepared_ns = time.monotonic_ns()
        with phase("pipeline"):
            pixels, report = await self._denoise(crops)
        pixels_ns = time.monotonic_ns()
        _note_pipeline(report)
        with phase("files"):
            files = await self._encode(pixels, encoding_waits_ns)
        waited_ns = max(decoding_waits_ns) + max(encoding_waits_ns)
        prepared = {
            "crops": {"profile": profile_crop.to_dict(), "reference": reference_crop.to_dict()},
            "started_ns": began_ns,
            "ended_ns": prepared_ns,
            "waited_ns": waited_ns,
        }
        metadata = self._service.metadata(self._request, prepared, report, pixels_ns) | self._signing(files)
        self.queued_ns = report["joined_ns"] - report["arrived_ns"] + waited_ns
        self._let_go(metadata["stage_ms"])
        steps = self._request.num_inference_steps
        return Portraits(self._images(files), json.dumps(metadata).encode(), steps, row_steps(self._request.phases))

    async def _prepare(self, name: str, box: Box | None, waits_ns: list[int]) -> tuple[Crop, Array]:
        """Prepare a picture's crop and pixels, [S, S, 3]; note in ``waits_ns`` how long it waited for a process."""
        service, data, is_base64 = self._service, self._files[name], self._request.encoding == "base64"
        key = await self._picture_key(name, box)
        if kept := service.kept.get(key):
            return kept
        size = service.preset.image_size
        prepared = await service.workers.run(
            self._demand,
            prepare,
            data,
            name,
            box,
            is_base64,
            size,
            name=name,
            key=(key, name),
            on_waited=waits_ns.append,
        )
        service.kept.put(key, prepared)
        return prepared

    async def _picture_key(self, name: str, box: Box | None) -> Hashable:
        """Return a key that is equal for pictures of a caller's with the same content and crop."""
        data = self._files[name]
        if name not in self._digests and len(data) > HASHED_ASIDE_BYTES:
            self._digests[name] = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
        elif name not in self._digests:
            self._digests[name] = hashlib.sha256(data).digest()
        return self._caller.name, self._digests[name], box, self._request.encoding

    async def _denoise(self, crops: tuple[Array, Array, Array]) -> tuple[Array, dict[str, Any]]:
        """Denoise to pixels and a report, on the first engine that doesn't end meanwhile.

        An engine's failure fails all requests of its batch, and may pass: each of them is tried once more.
        """
        self._asks_engine = True
        has_failed = False
        for _ in range(1 + MAX_REPLAYS):
            engine = self._engine
            assert engine
            try:
                return await engine.portraits(*crops, self._request.to_json(), self._caller.name)
            except EngineLostError as error:
                await asyncio.wait([engine.lost], timeout=LOST_WITHIN_S)
                if not engine.lost.done():
                    logger.error("the engine fails and goes on: %s", error)
                    if isinstance(error.__cause__, Unavailable):
                        raise error.__cause__ from None
                    break
            except IcPortraitError as error:
                if has_failed or error.code != IcPortraitError.code:
                    raise
                has_failed = True
                engine.listen(self._request.key, None)
                engine.release(self._request.key)
            await self._replay(engine)
        raise Unavailable(f"the engine has failed under this request; try again later; {RETRY}")

    async def _read_ingredient(self, name: str) -> Ingredient:
        """Read the part of an input's C2PA manifest that the portraits' manifests keep."""
        data, is_base64 = self._files[name], self._request.encoding == "base64"
        if not is_base64 and MARK not in data:
            return Ingredient(name)
        try:
            return await self._service.workers.run(
                self._demand, read_ingredient, data, name, is_base64, name=name, on_waited=lambda _: None
            )
        except IcPortraitError:  # a manifest that can't be read is no reason to refuse a picture that can
            return Ingredient(name, "ignored: it takes too much time to be read")

    async def _encode(self, pixels: Array, waits_ns: list[int]) -> list[Signed]:
        """Make files of [n, S, S, 3] uint8; note in ``waits_ns`` how long each waited for a process."""
        return await _together(*(self._encode_one(portrait, waits_ns) for portrait in pixels))

    async def _encode_one(self, portrait: Array, waits_ns: list[int]) -> Signed:
        """Make a file of [S, S, 3] uint8."""
        output_format, run = self._request.output_format, self._service.workers.run
        if self._service.signs:
            ingredients = self._ingredients
            return await run(
                self._demand, encode_and_sign, portrait, output_format, ingredients, on_waited=waits_ns.append
            )
        if portrait.nbytes <= ENCODED_ASIDE_BYTES:
            return Signed(await asyncio.to_thread(encode_picture, portrait, output_format))
        return Signed(await run(self._demand, encode_picture, portrait, output_format, on_waited=waits_ns.append))

    def _images(self, files: list[Signed]) -> tuple[bytes, ...]:
        """Return files as the caller gets them."""
        is_base64 = self._request.encoding == "base64"
        return tuple(base64.b64encode(signed.file) if is_base64 else signed.file for signed in files)

    def _signing(self, files: list[Signed]) -> dict[str, Any]:
        """Return the metadata's members about C2PA manifests; none where nothing is signed."""
        if not self._service.signs:
            return {}
        dropped = next((signed.dropped for signed in files if signed.dropped), "")
        ingredients = {
            ingredient.name: dropped if dropped and ingredient.archive else ingredient.outcome
            for ingredient in self._ingredients
        }
        return {"c2pa": {"unsigned_sha256": [signed.unsigned_sha256 for signed in files], "ingredients": ingredients}}

    # Streams.

    async def _make_and_tell(self) -> Portraits:
        """Make portraits while steps and previews are told; all that was told comes before them."""
        making, telling = asyncio.create_task(self._make()), asyncio.create_task(self._tell())
        making.add_done_callback(self._end_telling)
        try:
            await asyncio.wait({making, telling}, return_when=asyncio.FIRST_EXCEPTION)
            for task in (telling, making):
                if task.done():
                    task.result()
            return making.result()
        finally:
            making.cancel()
            telling.cancel()
            await asyncio.gather(making, telling, return_exceptions=True)

    def on_step(self, step: int, total_steps: int) -> None:
        """Implement ``engine.Listener.on_step``."""
        self._steps = step
        if self._on_event and step > self._queued_step:
            if len(self._events) >= TOLD_APART and self._events[-1][1] is None:
                self._events.pop()
            self._put(step, None)

    def on_preview(self, step: int, total_steps: int, latent: Array) -> None:
        """Implement ``engine.Listener.on_preview``; ``latent`` has all portraits of the request."""
        assert self._engine
        self._steps = step
        if self._on_event and step > self._queued_step:
            self._put(step, latent)
        else:  # the engine before this one has shown it
            self._engine.seen(self._request.key)

    def _put(self, step: int, latent: Array | None) -> None:
        assert self._engine
        self._events.append((step, latent, self._engine))
        self._queued_step = step
        self._has_event.set()

    def _end_telling(self, _: Any) -> None:
        self._is_made = True
        self._has_event.set()

    async def _tell(self) -> None:
        """Tell the caller what the loop says, one after another, until portraits are made and all is told."""
        assert self._on_event
        while True:
            await self._has_event.wait()
            if not self._events:
                if self._is_made:
                    return
                self._has_event.clear()
                continue
            step, latent, engine = self._events.popleft()
            images: tuple[bytes, ...] = ()
            if latent is not None:
                try:
                    images = self._images(await self._encode(await engine.decode(latent), []))
                except EngineLostError:
                    continue  # the next one shows it
            await self._on_event(Event(step, self._request.num_inference_steps, images))
            self._told_step = step
            if latent is not None:
                engine.seen(self._request.key)


def _note_pipeline(report: Mapping[str, Any]) -> None:
    """Note the parts of the pipeline that its report has, as parts of the current request's way; it has just ended."""
    if record := CURRENT.get():
        _, began_ns, ended_ns = record.phases[-1]
        times = began_ns, *(report[f"{name}_ns"] for name in ("arrived", "joined", "conditioned", "denoised")), ended_ns
        names = "vae_encoder", "queue", "warping", "steps", "vae_decoder"
        record.phases += zip(names, times, times[1:], strict=False)


async def _together(*parts: Coroutine[Any, Any, Result]) -> list[Result]:
    """Wait for the results of all; where one fails, cancel the others."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
