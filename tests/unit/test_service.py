"""A request's way through the service, before an engine that does what the test says."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icportrait.contract import Array
from icportrait.errors import DeadlineMissed, IcPortraitError, InvalidRequest, PermissionDenied, Unavailable
from icportrait.gateway import c2pa_signing, service
from icportrait.gateway.api import Caller, Event, Portraits
from icportrait.gateway.devices import Devices
from icportrait.gateway.engine import EngineLostError
from icportrait.gateway.service import ENCODED_ASIDE_BYTES, TOLD_APART, Service
from icportrait.gateway.settings import Settings
from icportrait.manifest import Manifest
from icportrait.pictures.imaging import DIGITAL_SOURCE_TYPE, encode_picture
from icportrait.pictures.prepare import Kept
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.serving.control import Demand
from tests.certificates import Chain, captured, make_chain, report
from tests.trivial_engines import write_trivial_export

SIDE = DEMO_128.image_size
LATENT = np.zeros((1, DEMO_128.latent_channels, DEMO_128.latent_size, DEMO_128.latent_size), np.float32)
WAITED_NS = {"prepare": 5_000_000, "encode_picture": 7_000_000}
REPORT = {
    "arrived_ns": 1,
    "joined_ns": 2,
    "conditioned_ns": 3,
    "denoised_ns": 4,
    "match_confidence": 0.5,
    "engine": "none",
    "warp_ms": 1.0,
    "rows_shared": 1.0,
    "engine_ms": 1.0,
    "numerics_id": "none",
}


class Engine:
    """The part of an engine that the service knows; the test says when it answers."""

    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()
        self.said: list[tuple[Any, ...]] = []
        self.asked: list[Any] = []
        self.pixels = asyncio.get_running_loop().create_future()
        self.preview = asyncio.get_running_loop().create_future()
        self.preview.set_result(np.zeros((1, SIDE, SIDE, 3), np.uint8))
        self.listener: Any = None
        self.listens: dict[str, Any] = {}
        self.lease_refusal: IcPortraitError | EngineLostError | None = None
        self.rows = 0

    async def lease(self, key: str, demand: Demand, replayed: bool = False) -> None:
        self.said.append(("lease", replayed))
        if self.lease_refusal:
            raise self.lease_refusal

    def cancel(self, key: str) -> None:
        self.said.append(("cancel",))

    def seen(self, key: str) -> None:
        self.said.append(("seen",))

    def release(self, key: str, stage_ms: dict[str, float] | None = None) -> None:
        self.said.append(("release", bool(stage_ms)))

    def listen(self, key: str, listener: Any) -> None:
        self.listener = listener or self.listener
        self.listens.pop(key, None)
        if listener:
            self.listens[key] = listener

    async def portraits(
        self, profile: Array, reference: Array, visibility: Array, request: bytes, partition: str
    ) -> Any:
        self.asked.append((profile.shape, reference.shape, visibility.shape, json.loads(request)))
        await asyncio.wait({self.pixels, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        if self.lost.done():
            raise EngineLostError("lost")
        return self.pixels.result(), REPORT

    async def decode(self, latent: Array) -> Array:
        assert latent.shape == LATENT.shape
        pixels: Array = await asyncio.shield(self.preview)
        return pixels

    def answer(self, count: int = 1) -> None:
        self.pixels.set_result(np.zeros((count, SIDE, SIDE, 3), np.uint8))

    def lose(self) -> None:
        self.lost.set_result(None)


class Host:
    """One engine after another; none while ``engines`` is empty."""

    def __init__(self) -> None:
        self.engines: list[Engine] = [Engine()]
        self.ended = asyncio.get_running_loop().create_future()

    @property
    def up(self) -> Engine | None:
        return self.engines[0] if self.engines and not self.engines[0].lost.done() else None

    @property
    def refusal(self) -> Unavailable | None:
        return None if self.up else Unavailable("being restarted; retry_after_ms: 700")

    async def engine(self) -> Engine:
        while not self.up:
            if self.ended.done():
                raise Unavailable("has ended")
            await asyncio.sleep(0)
        return self.up


class Workers:
    """Does the work at once, or when the test lets it."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.runs: list[str] = []
        self.fails: dict[str, IcPortraitError] = {}

    async def run(
        self, owner: Any, function: Callable[..., Any], *arguments: Any, on_waited: Callable[[int], None], **_: Any
    ) -> Any:
        self.runs.append(function.__name__)
        await self.gate.wait()
        if error := self.fails.get(function.__name__):
            raise error
        on_waited(WAITED_NS.get(function.__name__, 0))
        return function(*arguments)


class World:
    """A service, and what is behind it."""

    def __init__(self, folder: Path, engines: int = 1, **settings: Any) -> None:
        self.hosts, self.workers = [Host() for _ in range(engines)], Workers()
        policy = ServingPolicy(max_pending_requests=2)
        hosts: Any = {str(number): host for number, host in enumerate(self.hosts)}
        parts: Any = Devices(hosts), self.workers
        self.service = Service(Manifest.read(folder), policy, Settings(**settings), *parts)
        self.events: list[Event] = []
        self.files: dict[str, bytes] = {}
        """Inputs that aren't ``picture``."""

    @property
    def engine(self) -> Engine:
        return self.host.engines[0]

    @property
    def host(self) -> Host:
        return self.hosts[0]

    async def tell(self, event: Event) -> None:
        self.events.append(event)

    def call(self, caller: Caller = Caller(), on_event: Any = None, **values: Any) -> asyncio.Task[Portraits]:  # noqa: B008
        types = {"seed": np.int64, "deadline_ms": np.int32}
        inputs = {name: np.array([value], types.get(name, np.int32)) for name, value in values.items()}
        for name in ("profile", "reference"):
            inputs[name] = np.array([self.files.get(name, picture())], np.object_)
        return asyncio.create_task(self.service.generate(inputs, caller, on_event))

    async def denoising(self, count: int = 1) -> None:
        """Wait until so many requests are in the engine."""
        await until(lambda: len(self.engine.asked) == count)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0)


Test = Callable[[World], Awaitable[None]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("service") / "export"
    write_trivial_export(folder, DEMO_128)
    yield folder


@pytest.fixture
def run(export: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    # The preset is a small one.
    monkeypatch.setattr(service, "ENCODED_ASIDE_BYTES", 0)

    def run(test: Test, **settings: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(30):
                await test(World(export, **settings))

        asyncio.run(main())

    return run


def test_crops_go_in_and_files_and_metadata_come_out(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        call = world.call(seed=7, num_portraits=2)
        await world.denoising()
        world.engine.answer(2)
        portraits = await call
        assert [Image.open(io.BytesIO(image)).size for image in portraits.images] == [(SIDE, SIDE)] * 2
        metadata = json.loads(portraits.metadata)
        assert (metadata["seed"], metadata["crops"]["profile"]["source"]) == (7, "centre")
        [(profile, reference, visibility, request)] = world.engine.asked
        assert (profile, reference, request["seed"]) == ((1, SIDE, SIDE, 3), (1, SIDE, SIDE, 3), 7)
        assert visibility == (1, 1, DEMO_128.latent_size, DEMO_128.latent_size)
        assert world.engine.said == [("lease", False), ("release", True)]
        statistics = world.service.statistics["ic_portrait"]
        assert (statistics.succeeded, statistics.failed, statistics.queued_ns) == (1, 0, 1 + sum(WAITED_NS.values()))
        assert metadata["queue_ms"] == 12

    run(test)


def test_small_portraits_are_encoded_without_a_process(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.engine.answer()
        assert Image.open(io.BytesIO((await world.call()).images[0])).size == (SIDE, SIDE)
        assert "encode_picture" not in world.workers.runs

    monkeypatch.setattr(service, "ENCODED_ASIDE_BYTES", ENCODED_ASIDE_BYTES)
    run(test)


@pytest.fixture(scope="module")
def chain() -> Iterator[Chain]:
    """Make the chain that this process signs with."""
    made = make_chain()
    c2pa_signing.begin(c2pa_signing.Credentials(made.certificates, made.key, "es256", None))
    yield made
    c2pa_signing.begin(None)


def test_with_a_certificate_portraits_and_previews_are_signed(run: Callable[..., None], chain: Chain) -> None:
    async def test(world: World) -> None:
        world.files["profile"] = captured(chain)
        call = world.call(on_event=world.tell, num_portraits=2, num_inference_steps=2, preview_every=1)
        await world.denoising()
        world.engine.listener.on_preview(1, 2, LATENT)
        world.engine.answer(2)
        portraits = await call
        for image in (*portraits.images, *world.events[0].images):
            found = report(image, "image/png")
            assert (found["validation_state"], len(found["manifests"])) == ("Valid", 2)
        said = json.loads(portraits.metadata)["c2pa"]
        unsigned = hashlib.sha256(encode_picture(np.zeros((SIDE, SIDE, 3), np.uint8), "png")).hexdigest()
        ingredients = {"profile": "kept", "reference": "no manifest"}
        assert said == {"unsigned_sha256": [unsigned] * 2, "ingredients": ingredients}
        assert world.workers.runs.count("read_ingredient") == 1  # of the input that has a manifest

    run(test, c2pa_certificate=Path("chain.pem"))


def test_a_manifest_that_takes_too_long_to_read_costs_nobody_a_portrait(run: Callable[..., None], chain: Chain) -> None:
    async def test(world: World) -> None:
        world.files["reference"] = captured(chain)
        world.workers.fails["read_ingredient"] = InvalidRequest("reference: the picture takes more than 2 s")
        world.engine.answer()
        portraits = await world.call()
        assert len(report(portraits.images[0], "image/png")["manifests"]) == 1
        said = json.loads(portraits.metadata)["c2pa"]["ingredients"]
        assert said == {"profile": "no manifest", "reference": "ignored: it takes too much time to be read"}

    run(test, c2pa_certificate=Path("chain.pem"))


def test_without_a_certificate_inputs_manifests_are_not_looked_for(run: Callable[..., None], chain: Chain) -> None:
    async def test(world: World) -> None:
        world.files["profile"] = captured(chain)
        world.engine.answer()
        portraits = await world.call()
        assert "c2pa" not in json.loads(portraits.metadata)
        assert "read_ingredient" not in world.workers.runs
        assert b"jumb" not in portraits.images[0]

    run(test)


def test_a_stream_tells_every_step_and_its_previews_before_the_portraits(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        call = world.call(on_event=world.tell, num_inference_steps=4, preview_every=2)
        await world.denoising()
        world.engine.listener.on_step(1, 4)
        world.engine.listener.on_preview(2, 4, LATENT)
        world.engine.listener.on_step(3, 4)
        world.engine.answer()
        await call
        assert [(event.step, event.total_steps, len(event.images)) for event in world.events] == [
            (1, 4, 0),
            (2, 4, 1),
            (3, 4, 0),
        ]
        assert world.engine.said.count(("seen",)) == 1
        assert DIGITAL_SOURCE_TYPE.encode() in world.events[1].images[0]

    run(test)


def test_a_preview_is_seen_when_its_caller_has_taken_it_and_steps_meanwhile_are_told_together(
    run: Callable[..., None],
) -> None:
    async def test(world: World) -> None:
        taken = asyncio.Event()

        async def slow(event: Event) -> None:
            world.events.append(event)
            await taken.wait()

        call = world.call(on_event=slow, num_inference_steps=100, preview_every=50)
        await world.denoising()
        world.engine.listener.on_preview(1, 100, LATENT)
        await until(lambda: world.events)
        for step in range(2, 80):
            world.engine.listener.on_step(step, 100)
        await asyncio.sleep(0)
        assert ("seen",) not in world.engine.said
        taken.set()
        world.engine.answer()
        await call
        assert ("seen",) in world.engine.said
        steps = [event.step for event in world.events]
        assert steps == [1, *range(2, TOLD_APART + 1), 79]

    run(test)


@pytest.mark.parametrize("where", ["prepare", "denoise", "encode_picture", "stream"])
def test_a_caller_that_leaves_gives_its_lease_back_wherever_its_request_is(
    run: Callable[..., None], where: str
) -> None:
    async def test(world: World) -> None:
        if where == "prepare":
            world.workers.gate.clear()
        call = world.call(on_event=world.tell if where == "stream" else None)
        await until(lambda: world.workers.runs)
        if where != "prepare":
            await world.denoising()
        if where == "encode_picture":
            world.workers.gate.clear()
            world.engine.answer()
            await until(lambda: "encode_picture" in world.workers.runs)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert world.engine.said == [("lease", False), ("cancel",), ("release", False)]
        assert world.service.pending == 0

    run(test)


def test_a_caller_whose_connection_breaks_while_it_is_told_ends_its_request(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        async def broken(event: Event) -> None:
            raise ConnectionResetError

        call = world.call(on_event=broken)
        await world.denoising()
        world.engine.listener.on_step(1, 20)
        with pytest.raises(ConnectionResetError):
            await call
        assert world.engine.said[-2:] == [("cancel",), ("release", False)]

    run(test)


@pytest.mark.parametrize("of_call", [False, True])
def test_a_deadline_is_answered_when_it_passes_wherever_the_request_is(run: Callable[..., None], of_call: bool) -> None:
    async def test(world: World) -> None:
        values = {} if of_call else {"deadline_ms": 50}
        world.workers.gate.clear()
        caller = Caller(deadline_ms=50 if of_call else None)
        with pytest.raises(DeadlineMissed, match=r"deadline_ms: passed after 0 of 20 steps"):
            await world.call(caller, num_inference_steps=20, **values)
        assert world.engine.said == [("lease", False), ("release", False)]
        world.workers.gate.set()
        # Time enough to get so far on a busy machine.
        values = {} if of_call else {"deadline_ms": 2000}
        caller = Caller(deadline_ms=2000 if of_call else None)
        call = world.call(caller, num_inference_steps=20, **values)
        await world.denoising()
        world.engine.listener.on_step(3, 20)
        with pytest.raises(DeadlineMissed, match=r"deadline_ms: passed after 3 of 20 steps"):
            await call

    run(test)


@pytest.mark.parametrize("phase", ["prepare", "denoise"])
def test_an_engine_that_ends_costs_a_request_time_and_nothing_else(run: Callable[..., None], phase: str) -> None:
    async def test(world: World) -> None:
        if phase == "prepare":
            world.workers.gate.clear()
        call = world.call(on_event=world.tell, num_inference_steps=9)
        if phase == "denoise":
            await world.denoising()
            for step in (1, 2):
                world.engine.listener.on_step(step, 9)
            await until(lambda: len(world.events) == 2)
        else:
            await until(lambda: world.workers.runs)
        first = world.engine
        first.lose()
        assert not world.service.is_ready
        assert "retry_after_ms: 700" in str(world.service.refusal())
        world.workers.gate.set()
        world.host.engines.insert(0, Engine())
        await world.denoising()
        for step in (1, 2, 3):
            world.engine.listener.on_step(step, 9)
        world.engine.answer()
        assert len((await call).images) == 1
        steps = [event.step for event in world.events]
        assert steps == [1, 2, 3]
        assert world.engine.said == [("lease", True), ("release", True)]
        if phase == "denoise":
            assert world.engine.asked[0][3] == first.asked[0][3], "the same request, its seed too"

    run(test)


def test_a_request_under_which_engines_end_again_and_again_is_refused(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        call = world.call()
        for _ in range(4):
            await world.denoising()
            world.engine.lose()
            world.host.engines.insert(0, Engine())
        with pytest.raises(Unavailable, match="the engine has failed under this request"):
            await call

    run(test)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_request_whose_engine_fails_is_tried_once_more(run: Callable[..., None], fails: int) -> None:
    async def test(world: World) -> None:
        portraits, tries = world.engine.portraits, 0

        async def failing(*arguments: Any) -> Any:
            nonlocal tries
            tries += 1
            if tries <= fails:
                raise IcPortraitError("denoising failed on this server; its log has the cause")
            return await portraits(*arguments)

        world.engine.portraits = failing  # type: ignore[method-assign]
        world.engine.answer()
        call = world.call()
        if fails == 1:
            assert len((await call).images) == 1
        else:
            with pytest.raises(IcPortraitError, match="denoising failed"):
                await call
        assert tries == 2 and world.service.replays == 1
        assert world.engine.said[:3] == [("lease", False), ("release", False), ("lease", True)]

    run(test)


def test_what_one_of_two_engines_fails_is_asked_of_the_other(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        failing, other = (host.engines[0] for host in world.hosts)
        failing.pixels.set_exception(IcPortraitError("denoising failed on this server; its log has the cause"))
        other.answer()
        other.rows = 7
        assert len((await world.call()).images) == 1
        assert failing.said == [("lease", False), ("release", False)] and failing.listens == {}
        assert other.said == [("lease", True), ("release", True)]

    run(test, engines=2)


def test_a_profile_that_returns_goes_where_it_was_encoded(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        first, second = (host.engines[0] for host in world.hosts)
        for engine in (first, second):
            engine.answer()
        for profile, caller in (("a", "x"), ("b", "x"), ("b", "x"), ("a", "x"), ("b", "y")):
            world.files["profile"] = picture() + profile.encode()
            await world.call(Caller(caller))
        asked = [len(engine.asked) for engine in (first, second)]
        # a, b and b, a, and b of another caller, whose latents are the caller's own.
        assert asked == [2, 3] and second.said.count(("lease", False)) == 3

    run(test, engines=2)


def test_a_request_whose_engine_is_not_started_again_is_told_so(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        call = world.call()
        await world.denoising()
        world.engine.lose()
        world.host.ended.set_result(None)
        with pytest.raises(Unavailable, match="has ended"):
            await call

    run(test)


def test_what_may_not_run_is_refused_before_a_picture_is_looked_at(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        with pytest.raises(InvalidRequest, match="seed: -1"):
            await world.call(seed=-1)
        with pytest.raises(PermissionDenied, match="priority: 0, and this API key allows 1, 2"):
            await world.call(Caller("key", frozenset({1, 2})), priority=0)
        assert world.engine.said == []
        world.engine.lease_refusal = Unavailable("the queue is full; retry_after_ms: 5")
        with pytest.raises(Unavailable, match="the queue is full"):
            await world.call()
        world.engine.lease_refusal = EngineLostError("lost")
        with pytest.raises(Unavailable, match="retry_after_ms"):
            await world.call()
        assert world.workers.runs == []
        assert world.service.statistics["ic_portrait"].failed == 4

    run(test)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_picture_that_cannot_be_read_is_no_callers_going_away(run: Callable[..., None], is_stream: bool) -> None:
    async def test(world: World) -> None:
        files = {name: np.array([b"no picture"], np.object_) for name in ("profile", "reference")}
        with pytest.raises(InvalidRequest, match="are no picture"):
            await world.service.generate(files, Caller(), world.tell if is_stream else None)
        assert world.engine.said == [("lease", False), ("release", False)]

    run(test)


def test_more_than_the_limit_are_refused_and_places_come_back(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        calls = [world.call(), world.call()]
        await world.denoising(2)
        with pytest.raises(Unavailable, match="2 requests are pending, which is this server's limit"):
            await world.call()
        world.engine.answer()
        await asyncio.gather(*calls)
        assert world.service.refusal() is None

    run(test)


def test_the_limit_is_of_each_engine(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        calls = [world.call() for _ in range(4)]
        await until(lambda: sum(len(host.engines[0].asked) for host in world.hosts) == 4)
        with pytest.raises(Unavailable, match="4 requests are pending"):
            await world.call()
        for host in world.hosts:
            host.engines[0].answer()
        await asyncio.gather(*calls)

    run(test, engines=2)


def test_a_server_that_is_to_stop_answers_what_it_has_let_in_and_no_more(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        call = world.call()
        await world.denoising()
        draining = asyncio.create_task(world.service.drain(60))
        await until(lambda: not world.service.is_ready)
        with pytest.raises(Unavailable, match=r"the server is stopping; .*retry_after_ms"):
            await world.call()
        assert not draining.done()
        world.engine.answer()
        assert len((await call).images) == 1
        await draining

    run(test)


def test_what_takes_longer_than_a_stop_may_is_told_so(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        call = world.call()
        await world.denoising()
        await world.service.drain(0)
        with pytest.raises(Unavailable, match="the server has stopped"):
            await call

    run(test)


def test_prepared_pictures_are_kept_apart_for_each_key(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.engine.answer()
        for name, runs in (("a", 1), ("a", 0), ("b", 1)):
            world.workers.runs.clear()
            await world.call(Caller(name))
            assert world.workers.runs.count("prepare") == runs, name

    run(test)


def test_a_server_may_keep_no_pictures(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.engine.answer()
        for _ in range(2):
            await world.call()
        assert world.workers.runs.count("prepare") == 4

    run(test, pictures_kept=0)


def test_kept_pictures_go_with_their_time_and_the_least_used_first() -> None:
    now = [0.0]
    kept = Kept(2, 10.0, lambda: now[0])
    a, b, c = (("crop", np.full(1, number)) for number in range(3))
    kept.put("a", a)  # type: ignore[arg-type]
    now[0] = 5.0
    kept.put("b", b)  # type: ignore[arg-type]
    assert kept.get("a") is a
    kept.put("c", c)  # type: ignore[arg-type]
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (a, None, c)
    now[0] = 10.0
    assert (kept.get("a"), kept.get("c")) == (None, c)


def test_demand_says_what_a_request_will_take(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        demands: list[Demand] = []
        lease = world.engine.lease

        async def watched(key: str, demand: Demand, replayed: bool = False) -> None:
            demands.append(demand)
            await lease(key, demand, replayed)

        world.engine.lease = watched  # type: ignore[method-assign]
        world.engine.answer()
        await world.call(num_inference_steps=5, priority=3, deadline_ms=60_000)
        found = asdict(demands[0])
        assert (found["phases"], found["priority"], found["deadline_ms"]) == (((5, 1),), 3, 60_000)
        assert found["nbytes"] == 2 * len(picture())

    run(test)
