"""Retries, hedges, streams that go on elsewhere, and the choice of servers, in virtual time and without a network."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from icportrait_client import (
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    Portrait,
    Progress,
    ServerError,
    ServerOverloaded,
    ServerUnavailable,
    wire,
)
from icportrait_client.attempts import MOST_PAUSE_S, PAUSE_S, POLL_S, RETRIES_AT_ONCE, Attempts, Policy
from icportrait_client.contract import load_contract
from icportrait_client.errors import from_status
from icportrait_client.messages import Request, build_request
from icportrait_client.servers import HELD_S, Addresses, Balance, Servers

from icportrait.gateway.kserve import KserveModels
from icportrait.policy import ServingPolicy

T = TypeVar("T")
METADATA = KserveModels(ServingPolicy()).metadata("ic_portrait").SerializeToString()
FULL = "UNAVAILABLE: the queue is full; retry_after_ms: 340"


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once when nothing else is to be done."""

    now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now_s = max(self.now_s, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run(main: Coroutine[Any, Any, T]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def now() -> float:
    return asyncio.get_running_loop().time()


class FakeServer:
    """Takes ``step_s`` for each of ``steps``, fails as it is told, and notes what it was asked."""

    def __init__(self, numerics_id: str | None = "same", step_s: float = 0.1, steps: int = 5) -> None:
        self.numerics_id, self.step_s, self.steps = numerics_id, step_s, steps
        self.failures: list[tuple[str, str]] = []
        self.breaks_after: int | None = None
        """The step after which a stream's connection is cut, once."""
        self.is_ready = True
        self.metadata = METADATA
        self.asked: list[tuple[float, str, dict[str, wire.Tensor]]] = []
        self.ended_after_steps: list[int] = []
        self.polls = self.checks = 0

    def infers(self) -> int:
        return len(self.asked)

    def value(self, index: int, name: str) -> int | None:
        tensor = self.asked[index][2].get(name)
        return None if tensor is None else int.from_bytes(tensor.data, "little")

    async def steps_of(self, address: str, message: bytes, timeout_s: float) -> AsyncGenerator[int, None]:
        model, inputs = wire.read_infer_request(message)
        self.asked.append((now(), model, inputs))
        ends_s, done = now() + timeout_s, 0
        try:
            if self.failures:
                raise from_status(*self.failures.pop(0), address, timeout_s)
            for done in range(1, self.steps + 1):
                if now() + self.step_s > ends_s:
                    await asyncio.sleep(ends_s - now())
                    raise from_status("DEADLINE_EXCEEDED", "", address, timeout_s)
                await asyncio.sleep(self.step_s)
                yield done
                if done == self.breaks_after:
                    self.breaks_after = None
                    raise from_status("UNAVAILABLE", "Socket closed", address, timeout_s)
        finally:
            self.ended_after_steps.append(done)

    def answer(self, seed: int) -> list[wire.Tensor]:
        metadata = {
            "seed": seed,
            "steps": self.steps,
            "numerics_id": self.numerics_id,
            "stage_ms": {"denoise": 1000 * self.step_s * self.steps},
        }
        data = wire.bytes_elements([json.dumps(metadata).encode()])
        picture = b"%d of %s" % (seed, str(self.numerics_id).encode())
        return [
            wire.Tensor("image", "BYTES", (1,), wire.bytes_elements([picture])),
            wire.Tensor("metadata", "BYTES", (1,), data),
        ]


class FakeNetwork:
    """A ``Transport`` to ``FakeServer``s by their addresses."""

    def __init__(self, **servers: FakeServer) -> None:
        self.servers = {f"{name}:1": server for name, server in servers.items()}

    async def unary(self, address: str, method: str, message: bytes, timeout_s: float) -> bytes:
        server = self.servers[address]
        if method == "ServerReady":
            server.polls += 1
            return wire.flag(server.is_ready)
        if method == "ModelMetadata":
            server.checks += 1
            return server.metadata
        async for _ in server.steps_of(address, message, timeout_s):
            pass
        return wire.infer_response("ic_portrait", server.answer(seed_of(message)))

    async def stream(self, address: str, method: str, message: bytes, timeout_s: float) -> AsyncGenerator[bytes, None]:
        server = self.servers[address]
        async with aclosing(server.steps_of(address, message, timeout_s)) as steps:
            async for step in steps:
                counts = [
                    wire.Tensor(name, "INT32", (1,), struct.pack("<i", value))
                    for name, value in (("step", step), ("total_steps", server.steps))
                ]
                last = server.answer(seed_of(message)) if step == server.steps else []
                yield wire.stream_answer("ic_portrait_stream", [*last, *counts])

    async def close(self) -> None:
        pass

    def attempts(self, balance: Balance = "round-robin", **policy: Any) -> Attempts:
        servers = Servers(self.servers, balance)
        servers._turn = iter(range(10**9))  # type: ignore[assignment]
        return Attempts(self, Addresses(tuple(self.servers)), servers, Policy(**policy))


def seed_of(message: bytes) -> int:
    return int.from_bytes(wire.read_infer_request(message)[1]["seed"].data, "little")


def asked(seed: int = 7, **options: Any) -> Request:
    return build_request(b"p", b"r", {"seed": seed, **options})


async def steps_and_portrait(attempts: Attempts, timeout_s: float = 60, **options: Any) -> tuple[list[int], Portrait]:
    *steps, portrait = [event async for event in attempts.stream(asked(**options), timeout_s)]
    assert isinstance(portrait, Portrait)
    return [step.step for step in steps if isinstance(step, Progress)], portrait


async def tell(network: FakeNetwork, attempts: Attempts) -> None:
    """Let every server answer once, so that its ``numerics_id`` is known."""
    for _ in network.servers:
        await attempts.generate(asked(), 60)
    for server in network.servers.values():
        assert server.infers() == 1
        server.asked.clear()
        server.ended_after_steps.clear()


# Retries.


def test_another_server_is_tried_at_once_and_gets_the_same_request() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        a, b = network.servers.values()
        a.failures = [("UNAVAILABLE", "Socket closed")]
        request = build_request(b"p", b"r", {})
        began = now()
        portrait = await network.attempts().generate(request, 60)
        assert now() - began == pytest.approx(0.5), "five steps, and no pause"
        assert (a.infers(), b.infers()) == (1, 1)
        assert a.value(0, "seed") == b.value(0, "seed") == portrait.metadata.seed

    run(main())


def test_the_only_server_is_tried_again_after_its_hint() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer())
        (a,) = network.servers.values()
        a.failures = [("UNAVAILABLE", FULL)]
        attempts = network.attempts()
        await attempts.generate(asked(), 60)
        first, second = (at_s for at_s, *_ in a.asked)
        assert 0.34 + PAUSE_S / 2 <= second - first <= 0.34 + PAUSE_S
        assert (attempts.counts.attempts, attempts.counts.retries) == (2, 1)

    run(main())


def test_pauses_double_up_to_a_limit_and_are_never_the_same() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer())
        (a,) = network.servers.values()
        a.failures = [("UNAVAILABLE", "Connection refused")] * 9
        with pytest.raises(ServerUnavailable, match="no server answers"):
            await network.attempts(attempts=9).generate(asked(), 60)
        times = [at_s for at_s, *_ in a.asked]
        pauses = [later - earlier for earlier, later in pairwise(times)]
        for number, pause in enumerate(pauses):
            longest = min(PAUSE_S * 2**number, MOST_PAUSE_S)
            assert longest / 2 <= pause <= longest
        assert len(set(pauses)) == 8

    run(main())


@pytest.mark.parametrize(
    ("code", "text", "error"),
    [
        ("INVALID_ARGUMENT", "seed: wrong", InvalidRequest),
        ("INTERNAL", "INTERNAL: the server failed", ServerError),
        ("UNAVAILABLE", "UNAVAILABLE: deadline_ms: passed after 3 of 20 steps", DeadlineExceeded),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED: a message of 99 bytes", ServerError),
    ],
)
def test_what_another_attempt_would_not_mend_is_not_tried_again(code: str, text: str, error: type[Exception]) -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        a, b = network.servers.values()
        a.failures = [(code, text)]
        with pytest.raises(error):
            await network.attempts().generate(asked(), 60)
        assert (a.infers(), b.infers()) == (1, 0)

    run(main())


def test_one_time_limit_holds_for_all_attempts() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(step_s=1.0))
        (a,) = network.servers.values()
        a.failures = [("UNAVAILABLE", "UNAVAILABLE: later; retry_after_ms: 1000")]
        began = now()
        with pytest.raises(DeadlineExceeded, match=r"a:1: no answer within 3 s; allow more with timeout_s$"):
            await network.attempts().generate(asked(), 3)
        assert now() - began == pytest.approx(3)
        a.failures = [("UNAVAILABLE", "UNAVAILABLE: later; retry_after_ms: 5000")]
        began = now()
        with pytest.raises(ServerUnavailable) as refusal:
            await network.attempts().generate(asked(), 3)
        assert now() == began, "there is no time for another attempt, which is known at once"
        assert refusal.value.retry_after_ms == 5000

    run(main())


def test_deadline_ms_is_what_is_left_of_it() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer())
        (a,) = network.servers.values()
        a.failures = [("UNAVAILABLE", FULL)]
        await network.attempts().generate(asked(deadline_ms=9000), 60)
        assert a.value(0, "deadline_ms") == 9000
        second = a.value(1, "deadline_ms")
        assert second is not None
        assert 9000 - 340 - 100 <= second <= 9000 - 340 - 50

    run(main())


def test_servers_that_fall_with_many_requests_under_way_cost_none_of_them() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        for server in network.servers.values():
            server.failures = [("UNAVAILABLE", "Stream removed")] * 20
        attempts = network.attempts()
        portraits = await asyncio.gather(*(attempts.generate(asked(), 60) for _ in range(40)))
        assert len(portraits) == 40 and attempts.counts.retries == 40

    run(main())


def test_a_budget_keeps_retries_few_while_all_servers_are_gone() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        for server in network.servers.values():
            server.failures = [("UNAVAILABLE", "Connection refused")] * 10_000
        attempts = network.attempts()
        for _ in range(1000):
            with pytest.raises(ServerUnavailable):
                await attempts.generate(asked(), 60)
        assert attempts.counts.retries <= RETRIES_AT_ONCE + 0.2 * 1000
        # Answers that say when to come again cost none.
        for server in network.servers.values():
            server.failures = [("UNAVAILABLE", FULL)]
        assert await attempts.generate(asked(), 60)

    run(main())


def test_a_server_that_cannot_be_reached_is_left_alone_until_it_is_ready() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        a, b = network.servers.values()
        a.failures = [("UNAVAILABLE", "Connection refused")]
        a.is_ready = False
        attempts = network.attempts()
        for _ in range(10):
            await attempts.generate(asked(), 60)
        assert (a.infers(), b.infers()) == (1, 10)
        a.is_ready = True
        await asyncio.sleep(2 * POLL_S)
        for _ in range(4):
            await attempts.generate(asked(), 60)
        assert (a.infers(), b.infers()) == (3, 12)
        assert a.polls >= 2
        await attempts.close()

    run(main())


def test_a_server_that_has_begun_to_stop_is_noticed_by_asking() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        a, _ = network.servers.values()
        attempts = network.attempts()
        await attempts.generate(asked(), 60)
        a.is_ready = False
        await asyncio.sleep(2 * POLL_S)
        before = a.infers()
        for _ in range(6):
            await attempts.generate(asked(), 60)
        assert (a.infers(), attempts.counts.retries) == (before, 0)
        await attempts.close()

    run(main())


# The choice.


async def share(balance: Balance, **step_s: float) -> Counter[str]:
    network = FakeNetwork(**{name: FakeServer(step_s=value) for name, value in step_s.items()})
    attempts = network.attempts(balance)
    waiting = [asked(seed) for seed in range(120)]

    async def caller() -> None:
        while waiting:
            await attempts.generate(waiting.pop(), 60)

    await asyncio.gather(*(caller() for _ in range(8)))
    await attempts.close()
    return Counter({address[0]: server.infers() for address, server in network.servers.items()})


def test_turns_are_equal_and_the_least_loaded_is_the_quicker_one() -> None:
    turns = run(share("round-robin", a=0.1, b=0.1, c=1.0))
    assert max(turns.values()) - min(turns.values()) <= 1
    by_load = run(share("least-loaded", a=0.1, b=0.1, c=1.0))
    assert by_load["c"] <= 12
    assert min(by_load["a"], by_load["b"]) >= 50


def test_equal_servers_get_equal_shares() -> None:
    shares = run(share("least-loaded", a=0.1, b=0.1, c=0.1))
    assert min(shares.values()) >= 30


# Contracts.


def test_a_servers_contract_is_checked_once() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer())
        (a,) = network.servers.values()
        attempts = network.attempts()
        for _ in range(3):
            await attempts.generate(asked(), 60)
        assert a.checks == 1
        a.failures = [("UNAVAILABLE", "Socket closed")]
        await attempts.generate(asked(), 60)
        assert a.checks == 2, "what comes back may be another version"

    run(main())


def changed(**changes: Any) -> bytes:
    """Return a model's metadata with an input or output changed, or without it."""
    served = wire.read_model_metadata(METADATA)
    tensors: dict[str, list[wire.Tensor]] = {}
    for kind in ("inputs", "outputs"):
        tensors[kind] = [
            changes.get(each.name, each) for each in getattr(served, kind) if changes.get(each.name, each) is not None
        ]
    name = changes.get("model", served.name)
    return wire.model_metadata(wire.ModelMetadata(name, tuple(tensors["inputs"]), tuple(tensors["outputs"])))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (changed(mask_ratio=None), "the server has no input mask_ratio; install the client of the server's version"),
        (changed(step=None), "the server has no output step; install"),
        (changed(seed=wire.Tensor("seed", "INT32", (1,))), r"input seed is INT32 \[1\] there, expected INT64 \[1\]"),
        (changed(profile_box=wire.Tensor("profile_box", "FP32", (2,))), r"profile_box is FP32 \[2\] there, expected"),
        (changed(model="resnet"), "it serves no ic_portrait; is this an IC-Portrait Server"),
        (b"", "it serves no ic_portrait"),
        (b"\xff\xff\xff", r"the model can't be read \(.*\); is this an IC-Portrait Server"),
    ],
)
def test_a_server_of_another_version_is_named_before_anything_is_sent(metadata: bytes, message: str) -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer())
        (a,) = network.servers.values()
        a.metadata = metadata
        with pytest.raises(ContractMismatch, match=f"^a:1: .*{message}"):
            await network.attempts().generate(asked(), 60)
        assert not a.asked

    run(main())


def test_a_server_that_has_more_is_fine() -> None:
    async def main() -> None:
        served = wire.read_model_metadata(METADATA)
        more = wire.ModelMetadata(served.name, (*served.inputs, wire.Tensor("x", "FP32", (1,))), served.outputs)
        network = FakeNetwork(a=FakeServer())
        network.servers["a:1"].metadata = wire.model_metadata(more)
        assert await network.attempts().generate(asked(), 60)

    run(main())


def test_the_contracts_own_metadata_are_the_servers() -> None:
    contract = load_contract()
    assert set(contract.outputs) == {tensor.name for tensor in wire.read_model_metadata(METADATA).outputs}


# Hedges.


async def hedged(then: Callable[[FakeNetwork, Attempts], Awaitable[None]], ids: str = "xx", **policy: Any) -> None:
    servers = {name: FakeServer(numerics_id=each) for name, each in zip("ab", ids, strict=True)}
    network = FakeNetwork(**servers)
    attempts = network.attempts(**policy)
    await tell(network, attempts)
    # The next turn is a's, and a is slow now.
    network.servers["a:1"].step_s = 10.0
    await then(network, attempts)
    await attempts.close()


def test_a_slow_request_is_asked_elsewhere_too_and_the_loser_is_cancelled() -> None:
    async def then(network: FakeNetwork, attempts: Attempts) -> None:
        a, b = network.servers.values()
        began = now()
        portrait = await attempts.generate(asked(9), 60)
        assert now() - began == pytest.approx(0.7 + 0.5)
        assert portrait.bytes == b"9 of x"
        assert (a.infers(), b.infers()) == (1, 1)
        assert a.ended_after_steps == [1], "within the step that ran"
        assert (attempts.counts.hedges, attempts.counts.hedges_won) == (1, 1)
        a.step_s = 0.1
        await attempts.generate(asked(), 60)
        assert attempts.counts.hedges == 1, "a quick one isn't hedged"

    run(hedged(then, hedge_after_ms=700))


@pytest.mark.parametrize(("ids", "policy", "hedges"), [("xy", {}, 0), ("xy", {"any_numerics": True}, 1)])
def test_a_hedge_goes_only_where_it_gives_the_same_picture(ids: str, policy: Any, hedges: int) -> None:
    async def then(network: FakeNetwork, attempts: Attempts) -> None:
        await attempts.generate(asked(), 60)
        assert attempts.counts.hedges == hedges

    run(hedged(then, ids, hedge_after_ms=700, **policy))


def test_of_servers_that_have_said_nothing_none_is_hedged() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(step_s=1.0), b=FakeServer())
        attempts = network.attempts(hedge_after_ms=700)
        await attempts.generate(asked(), 60)
        assert attempts.counts.hedges == 0

    run(main())


def test_a_hedge_that_fails_is_nobodys_error() -> None:
    async def then(network: FakeNetwork, attempts: Attempts) -> None:
        a, b = network.servers.values()
        a.step_s = 0.3
        b.failures = [("INTERNAL", "INTERNAL: bug")]
        assert await attempts.generate(asked(), 60)
        assert (attempts.counts.hedges, attempts.counts.hedges_won, b.infers()) == (1, 0, 1)

    run(hedged(then, hedge_after_ms=700))


def test_a_percentile_of_the_last_answers_decides_when_to_hedge() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        attempts = network.attempts(hedge_percentile=90)
        for number in range(40):
            for server in network.servers.values():
                server.step_s = 0.2 - 0.001 * number
            await attempts.generate(asked(), 60)
        assert attempts.counts.hedges == 0
        network.servers["a:1"].step_s = 10.0
        began = now()
        await attempts.generate(asked(), 60)
        assert now() - began == pytest.approx(5 * 0.197 + 5 * 0.161, rel=0.02), "nine of ten took less than 0.98 s"
        assert attempts.counts.hedges == 1
        await attempts.close()

    run(main())


def test_cancelling_a_request_cancels_both_attempts() -> None:
    async def then(network: FakeNetwork, attempts: Attempts) -> None:
        a, b = network.servers.values()
        b.step_s = 10.0
        asking = asyncio.create_task(attempts.generate(asked(), 60))
        await asyncio.sleep(1.0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled()
        assert (a.ended_after_steps, b.ended_after_steps) == ([1], [1])

    run(hedged(then, hedge_after_ms=700))


# Streams.


def test_a_broken_stream_goes_on_elsewhere_and_tells_each_step_once() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        attempts = network.attempts()
        await tell(network, attempts)
        a, b = network.servers.values()
        a.breaks_after = 3
        steps, portrait = await steps_and_portrait(attempts)
        assert steps == [1, 2, 3, 4, 5]
        assert portrait.bytes == b"7 of same"
        assert (a.infers(), b.infers(), attempts.counts.resumed) == (1, 1, 1)
        assert a.value(0, "seed") == b.value(0, "seed")

    run(main())


@pytest.mark.parametrize("ids", [("x", "y"), (None, None)])
def test_a_stream_does_not_go_on_where_the_picture_would_be_another(ids: tuple[str | None, str | None]) -> None:
    async def main(**policy: Any) -> tuple[list[int], Portrait]:
        network = FakeNetwork(**{name: FakeServer(each) for name, each in zip("ab", ids, strict=True)})
        attempts = network.attempts(**policy)
        await tell(network, attempts)
        network.servers["a:1"].breaks_after = 3
        return await steps_and_portrait(attempts)

    with pytest.raises(ServerUnavailable, match="no server answers"):
        run(main())
    assert run(main(any_numerics=True))[0] == [1, 2, 3, 4, 5]


def test_a_stream_that_has_told_nothing_may_begin_anywhere() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer("x"), b=FakeServer("y"))
        attempts = network.attempts()
        network.servers["a:1"].failures = [("UNAVAILABLE", FULL)]
        assert (await steps_and_portrait(attempts))[0] == [1, 2, 3, 4, 5]
        assert attempts.counts.resumed == 0

    run(main())


def test_a_server_that_turns_out_to_compute_otherwise_ends_the_stream() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        attempts = network.attempts()
        await tell(network, attempts)
        network.servers["a:1"].breaks_after = 3
        network.servers["b:1"].numerics_id = "of a new version"
        with pytest.raises(ServerError, match="it went on with a stream, and computes otherwise"):
            await steps_and_portrait(attempts)

    run(main())


def test_leaving_a_stream_ends_it_on_the_server() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer())
        events = network.attempts().stream(asked(), 60)
        assert isinstance(await anext(events), Progress)
        await events.aclose()
        assert network.servers["a:1"].ended_after_steps == [1]

    run(main())


# Errors.


@pytest.mark.parametrize(
    ("code", "text", "kind", "retry_after_ms", "has_answered"),
    [
        ("UNAVAILABLE", FULL, ServerOverloaded, 340, True),
        ("UNAVAILABLE", "UNAVAILABLE: 128 requests are pending; retry_after_ms: 1000", ServerOverloaded, 1000, True),
        ("UNAVAILABLE", "UNAVAILABLE: deadline_ms: 300, and it would take more", ServerOverloaded, None, True),
        ("UNAVAILABLE", "UNAVAILABLE: the server is stopping", ServerUnavailable, None, True),
        ("UNAVAILABLE", "failed to connect to all addresses", ServerUnavailable, None, False),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED: key; retry_after_ms: 5", ServerOverloaded, 5, True),
        ("INTERNAL", "Received RST_STREAM with error code 2", ServerUnavailable, None, False),
        ("CANCELLED", "RST_STREAM closed stream", ServerUnavailable, None, False),
        ("UNKNOWN", "Stream removed", ServerUnavailable, None, False),
    ],
)
def test_an_end_of_a_call_becomes_an_error_that_says_whether_a_server_has_spoken(
    code: str, text: str, kind: type[ServerUnavailable], retry_after_ms: int | None, has_answered: bool
) -> None:
    error = from_status(code, text, "a:1", 3)
    assert type(error) is kind
    assert isinstance(error, ServerUnavailable)
    assert (error.retry_after_ms, error.has_answered) == (retry_after_ms, has_answered)


def test_a_server_is_held_until_its_hint_and_another_is_asked() -> None:
    async def main() -> None:
        network = FakeNetwork(a=FakeServer(), b=FakeServer())
        a, b = network.servers.values()
        a.failures = [("UNAVAILABLE", "UNAVAILABLE: the queue is full; retry_after_ms: 5000")]
        attempts = network.attempts()
        for _ in range(6):
            await attempts.generate(asked(), 60)
        assert (a.infers(), b.infers()) == (1, 6)
        await asyncio.sleep(5 - 6 * 0.5 + HELD_S)
        for _ in range(4):
            await attempts.generate(asked(), 60)
        assert (a.infers(), b.infers()) == (3, 8)
        await attempts.close()

    run(main())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"attempts": 0}, "attempts: 0, expected 1 or more"),
        ({"hedge_after_ms": 0}, "hedge_after_ms: 0, expected milliseconds above 0"),
        ({"hedge_percentile": 100}, "hedge_percentile: 100, expected a number between 0 and 100"),
        ({"hedge_after_ms": 1, "hedge_percentile": 90}, "hedge_after_ms, hedge_percentile: both are given"),
    ],
)
def test_a_wrong_policy_is_named(policy: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        Policy(**policy)
