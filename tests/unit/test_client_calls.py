"""Both clients through real gRPC against ``FakePortraitServer``, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from icportrait_client import (
    AsyncPortraitClient,
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    Portrait,
    PortraitClient,
    PortraitError,
    PortraitRequest,
    Progress,
    RequestCancelled,
    ServerError,
    ServerOverloaded,
    ServerUnavailable,
    Tls,
    wire,
)
from icportrait_client.servers import read_addresses
from icportrait_client.testing import FakePortraitServer

from tests.conftest import ROOT
from tests.unit.test_client import PICTURES

WAIT_S = 10
THREAD = "icportrait-client"


@pytest.fixture
def fake() -> Iterator[FakePortraitServer]:
    with FakePortraitServer() as fake:
        yield fake


@pytest.fixture
def client(fake: FakePortraitServer) -> Iterator[PortraitClient]:
    with PortraitClient(fake.address, timeout_s=30) as client:
        yield client


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def requests(count: int, **options: Any) -> list[PortraitRequest]:
    return [{**PICTURES, "seed": seed, "num_inference_steps": 2, **options} for seed in range(count)]


def threads() -> int:
    return sum(thread.name == THREAD for thread in threading.enumerate())


# Submit and map.


def test_a_handle_waits_and_cancels(fake: FakePortraitServer, client: PortraitClient) -> None:
    fake.delay_s = WAIT_S
    slow = client.submit(**PICTURES)
    until(lambda: len(fake.calls) == 1)
    assert not slow.done
    slow.cancel()
    with pytest.raises(RequestCancelled, match=r"^the request was cancelled$"):
        slow.result()
    until(lambda: fake.cancelled == 1)
    fake.delay_s = 0
    quick = client.submit(**PICTURES, seed=3)
    assert quick.result().metadata.seed == 3
    assert quick.done
    with pytest.raises(InvalidRequest, match=r"^seed: -1"):
        client.submit(**PICTURES, seed=-1)


def test_map_keeps_order_and_bounds_what_is_under_way(fake: FakePortraitServer, client: PortraitClient) -> None:
    """Answer later requests sooner, and count how many are there at once."""
    lock, running, most = threading.Lock(), 0, 0

    def answer(call: Any) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.03 - 0.001 * call.inputs["seed"])
        with lock:
            running -= 1
        return b"%d" % call.inputs["seed"]

    fake.answer = answer
    portraits = list(client.map(requests(24), concurrency=4))
    assert [portrait.bytes for portrait in portraits if isinstance(portrait, Portrait)] == [
        b"%d" % n for n in range(24)
    ]
    assert 2 <= most <= 4


def test_map_takes_requests_as_it_can_send_them(fake: FakePortraitServer, client: PortraitClient) -> None:
    taken = []

    def endless() -> Iterator[PortraitRequest]:
        for request in requests(1000):
            taken.append(request)
            yield request

    portraits = client.map(endless(), concurrency=2)
    next(portraits)
    assert len(taken) <= 1 + 8 * 2
    portraits.close()  # type: ignore[attr-defined]


def test_map_returns_failures_in_their_places(fake: FakePortraitServer, client: PortraitClient) -> None:
    many = requests(4)
    many[1]["seed"] = -1
    many[2]["profile"] = "no/such.jpg"
    first, second, third, fourth = client.map(many, concurrency=1)
    assert isinstance(first, Portrait)
    assert isinstance(second, InvalidRequest)
    assert isinstance(third, InvalidRequest)
    assert isinstance(fourth, Portrait)
    with pytest.raises(InvalidRequest, match=r"^concurrency: 0, expected 1 or more"):
        client.map(many, concurrency=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        list(client.map([{**PICTURES, "colour": "red"}]))  # type: ignore[list-item]


def test_leaving_a_map_cancels_what_is_under_way(fake: FakePortraitServer, client: PortraitClient) -> None:
    fake.step_s = WAIT_S
    many = requests(3)
    many[0]["num_inference_steps"] = 0  # refused here
    portraits = client.map(many)
    assert isinstance(next(portraits), InvalidRequest)
    until(lambda: len(fake.calls) == 2)
    portraits.close()  # type: ignore[attr-defined]
    until(lambda: fake.cancelled == 2)


def test_map_shows_its_progress_where_asked(
    client: PortraitClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(client.map(requests(20)))
    assert not capsys.readouterr().err
    list(client.map(requests(20), progress=True))
    assert capsys.readouterr().err.splitlines()[-1] == "20 of 20 portraits"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(client.map(iter(requests(2)), progress=True))
    assert capsys.readouterr().err == "1 portraits\r2 portraits\r\n"


# asyncio.


def test_the_asyncio_client_does_the_same(fake: FakePortraitServer) -> None:
    async def arrived(count: int) -> None:
        while len(fake.calls) < count:
            await asyncio.sleep(0.01)

    async def main() -> None:
        async with AsyncPortraitClient(fake.address) as client:
            portrait = await client.generate(**PICTURES, seed=5, num_portraits=2)
            assert (portrait.metadata.seed, len(portrait.images)) == (5, 2)
            steps = [event async for event in client.stream(**PICTURES, num_inference_steps=3)]
            assert [type(event) for event in steps] == [Progress, Progress, Progress, Portrait]
            assert [each.metadata.seed async for each in client.map(requests(5)) if isinstance(each, Portrait)] == [
                *range(5)
            ]

            async def asked() -> AsyncIterator[PortraitRequest]:
                for request in requests(3):
                    yield request

            assert len([each async for each in client.map(asked(), concurrency=1)]) == 3
            assert await client.is_ready()
            fake.delay_s = WAIT_S
            before = len(fake.calls)
            handle = client.submit(**PICTURES)
            await arrived(before + 1)
            handle.cancel()
            with pytest.raises(RequestCancelled):
                await handle.result()
            task = asyncio.create_task(client.generate(**PICTURES))
            await arrived(before + 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            waiting = asyncio.create_task(client.generate(**PICTURES))
            await arrived(before + 3)
        with pytest.raises(RequestCancelled, match=r"^the client was closed$"):
            await waiting
        with pytest.raises(PortraitError, match=r"^the client is closed"):
            await client.generate(**PICTURES)

    asyncio.run(main())
    until(lambda: fake.cancelled == 3)


def test_an_asyncio_stream_that_is_left_is_cancelled(fake: FakePortraitServer) -> None:
    async def main() -> None:
        async with AsyncPortraitClient(fake.address) as client, aclosing(client.stream(**PICTURES)) as events:
            async for _ in events:
                break

    fake.step_s = 0.05
    asyncio.run(main())
    until(lambda: fake.cancelled == 1)


def test_a_client_belongs_to_one_event_loop(fake: FakePortraitServer) -> None:
    client = AsyncPortraitClient(fake.address)
    asyncio.run(client.generate(**PICTURES))
    with pytest.raises(PortraitError, match="belongs to another event loop"):
        asyncio.run(client.generate(**PICTURES))


def test_many_streams_of_threads_and_of_asyncio_leave_nothing_behind(fake: FakePortraitServer) -> None:
    fake.step_s = 0.002
    before = threading.active_count()

    def watch(client: PortraitClient, number: int) -> None:
        with closing(client.stream(**PICTURES, num_inference_steps=8, seed=number)) as events:
            for event in events:
                if isinstance(event, Progress) and event.step == number % 12:
                    return

    async def watch_all(url: str) -> None:
        async with AsyncPortraitClient(url) as client:

            async def one(number: int) -> None:
                async with aclosing(client.stream(**PICTURES, num_inference_steps=8)) as events:
                    async for event in events:
                        if isinstance(event, Progress) and event.step == number % 12:
                            return

            await asyncio.gather(*map(one, range(24)))

    with PortraitClient(fake.address) as client, ThreadPoolExecutor(12) as pool:
        watching = [pool.submit(watch, client, number) for number in range(24)]
        asyncio.run(watch_all(fake.address))
        for each in watching:
            each.result(WAIT_S)
    gc.collect()
    until(lambda: threading.active_count() <= before + 64)  # the server's own threads stay
    assert threads() == 0


# Servers that misbehave: each in its own way, and each within its time.


@contextmanager
def odd_server(answers: dict[str, Any]) -> Iterator[str]:
    """Serve methods of the protocol by raw bytes, or by functions that use the context."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            method = details.method.rpartition("/")[2]
            if method not in answers:
                return None
            answer = answers[method]
            if method == "ModelStreamInfer":
                return grpc.stream_stream_rpc_method_handler(lambda messages, context: answer(context))
            return grpc.unary_unary_rpc_method_handler(
                lambda message, context: answer(context) if callable(answer) else answer
            )

    server = grpc.server(futures.ThreadPoolExecutor(4), [Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def metadata() -> bytes:
    return FakePortraitServer()._metadata(wire.named_request("ic_portrait"), None)


def nothing(context: Any) -> Iterator[bytes]:
    return iter(())


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ({}, ContractMismatch, "UNIMPLEMENTED.*is this an IC-Portrait Server"),
        ({"ModelMetadata": b"\xff\xff\xff"}, ContractMismatch, "the model can't be read"),
        ({"ModelMetadata": b""}, ContractMismatch, "it serves no ic_portrait"),
        (
            {"ModelInfer": b"\xff\xff\xff", "ModelStreamInfer": nothing},
            ServerError,
            "answer can't be read|ended without",
        ),
        (
            {"ModelInfer": b"", "ModelStreamInfer": lambda _: iter([b"\xff\xff"])},
            ServerError,
            "no portraits|can't be read",
        ),
    ],
)
def test_garbage_is_an_error_of_the_server(answers: dict[str, Any], error: type[PortraitError], message: str) -> None:
    full = {"ModelMetadata": metadata(), **answers} if answers else {}
    with odd_server(full) as url, PortraitClient(url, timeout_s=5) as client:
        for ask in (lambda: client.generate(**PICTURES), lambda: list(client.stream(**PICTURES))):
            with pytest.raises(PortraitError, match=message) as caught:
                ask()
            assert type(caught.value) is error


def test_a_slow_server_is_left_at_the_time_limit(fake: FakePortraitServer, client: PortraitClient) -> None:
    fake.delay_s = WAIT_S
    for ask in (
        lambda: client.generate(**PICTURES, timeout_s=0.2),
        lambda: list(client.stream(**PICTURES, timeout_s=0.2)),
    ):
        with pytest.raises(DeadlineExceeded, match=r": no answer within 0\.2 s; allow more with timeout_s$") as caught:
            ask()
        assert isinstance(caught.value, TimeoutError)
    until(lambda: fake.cancelled == len(fake.calls))
    with pytest.raises(InvalidRequest, match=r"^timeout_s: 0, expected a number of seconds above 0"):
        client.generate(**PICTURES, timeout_s=0)


def test_a_server_that_refuses_says_so(fake: FakePortraitServer, client: PortraitClient) -> None:
    fake.fail("UNAVAILABLE", "UNAVAILABLE: the queue is full; retry_after_ms: 1", times=100)
    for ask in (lambda: client.generate(**PICTURES), lambda: list(client.stream(**PICTURES))):
        with pytest.raises(ServerOverloaded, match="the queue is full"):
            ask()
    assert client.counts.attempts == 10


@contextmanager
def tcp_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Hold a port, and talk to everyone who connects, without any HTTP/2."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    talk(connection)
            except OSError:
                return

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for connection in kept:
                connection.close()


@pytest.mark.parametrize(
    ("talk", "error", "timeout_s"),
    [
        (lambda connection: None, DeadlineExceeded, 1.0),
        (lambda connection: connection.close(), ServerUnavailable, WAIT_S),
        (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), ServerUnavailable, WAIT_S),
    ],
    ids=["silent", "cut", "HTTP/1"],
)
def test_what_speaks_no_grpc_is_noticed(
    talk: Callable[[socket.socket], None], error: type[PortraitError], timeout_s: float
) -> None:
    with tcp_server(talk) as url, PortraitClient(url, timeout_s=timeout_s, attempts=2) as client:
        with pytest.raises(PortraitError) as caught:
            client.generate(**PICTURES)
        assert type(caught.value) is error


def test_a_server_that_goes_and_comes_back(fake: FakePortraitServer) -> None:
    with FakePortraitServer() as other, PortraitClient([fake.address, other.address], timeout_s=30) as client:
        for _ in range(4):
            client.generate(**PICTURES)
        fake.stop()
        for _ in range(8):
            client.generate(**PICTURES)
        fake.start()
        before = len(fake.calls)
        until(lambda: bool(client.generate(**PICTURES)) and len(fake.calls) > before)
        assert client.counts.attempts <= client.counts.requests + 2


def test_a_stream_that_is_cut_goes_on_at_the_other_server(fake: FakePortraitServer) -> None:
    with FakePortraitServer() as other, PortraitClient([fake.address, other.address], timeout_s=30) as client:
        for _ in range(4):
            client.generate(**PICTURES)
        before = len(fake.calls) + len(other.calls)
        for server in (fake, other):
            server.fail("UNAVAILABLE", "Socket closed", after_steps=3)
        with pytest.raises(ServerUnavailable, match="Socket closed"):
            list(client.stream(**PICTURES, num_inference_steps=6, seed=5))  # both fail
        for _ in range(4):
            client.generate(**PICTURES)
        fake.fail("UNAVAILABLE", "Socket closed", after_steps=3)
        whole = [list(client.stream(**PICTURES, num_inference_steps=6, seed=5)) for _ in range(2)]
        for *steps, portrait in whole:
            assert [event.step for event in steps if isinstance(event, Progress)] == [1, 2, 3, 4, 5, 6]
            assert isinstance(portrait, Portrait)
            assert portrait.metadata.seed == 5
        assert client.counts.resumed == 2
        assert len(fake.calls) + len(other.calls) == before + 2 + 4 + 3


# Addresses and security.


@pytest.mark.parametrize(
    ("servers", "named", "is_tls", "is_resolved"),
    [
        ("localhost:8001", ("localhost:8001",), False, False),
        ("https://a.example", ("a.example:443",), True, False),
        ("HTTPS://a.example:8001/", ("a.example:8001",), True, False),
        ("grpc://[::1]:8001", ("[::1]:8001",), False, False),
        (["a:1", "b:1", "a:1"], ("a:1", "b:1"), False, False),
        ("dns:///all.example:8001", ("all.example:8001",), False, True),
        ("unix:/run/icportrait.sock", ("unix:/run/icportrait.sock",), False, False),
    ],
)
def test_addresses_of_every_kind(servers: Any, named: tuple[str, ...], is_tls: bool, is_resolved: bool) -> None:
    addresses = read_addresses(servers)
    assert (addresses.named, addresses.is_tls, addresses.is_resolved) == (named, is_tls, is_resolved)


@pytest.mark.parametrize("servers", [[], ["https://a:1", "b:1"], ["dns:///a:1", "b:1"]])
def test_addresses_that_do_not_belong_together(servers: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^servers: "):
        PortraitClient(servers)


def test_a_name_is_resolved_to_all_its_servers(fake: FakePortraitServer) -> None:
    port = fake.address.rpartition(":")[2]
    with PortraitClient(f"dns:///localhost:{port}") as client:
        assert client.generate(**PICTURES).metadata.steps == 20
    with (
        PortraitClient("dns:///no.such.name.invalid:1") as client,
        pytest.raises(ServerUnavailable, match="no such name"),
    ):
        client.generate(**PICTURES)


def test_headers_and_key_are_sent_and_no_proxy_is_asked(
    fake: FakePortraitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with PortraitClient(fake.address, api_key="sesame", headers={"x-team": "studio"}, attempts=1) as client:
        client.generate(**PICTURES)
        list(client.stream(**PICTURES))
    for call in fake.calls:
        assert (call.headers["authorization"], call.headers["x-team"]) == ("Bearer sesame", "studio")
    with PortraitClient(fake.address, use_proxy=True, attempts=1) as client, pytest.raises(ServerUnavailable):
        client.generate(**PICTURES)


def test_requests_of_one_profile_have_one_header_that_no_other_has(fake: FakePortraitServer) -> None:
    other = {**PICTURES, "profile": PICTURES["reference"]}
    with PortraitClient(fake.address, sticky=True) as client:
        for pictures in (PICTURES, other):
            client.generate(**pictures, seed=1)
            list(client.stream(**pictures, seed=2))
    mine, again, theirs, again_theirs = (call.headers["x-profile"] for call in fake.calls)
    assert mine == again != theirs == again_theirs
    with PortraitClient(fake.address) as client:
        client.generate(**PICTURES)
    assert "x-profile" not in fake.calls[-1].headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sticky": True, "headers": {"x-profile": "a"}}, "sticky: headers has an x-profile already"),
        ({"api_key": "open sesame"}, "api_key: has a character that no key has"),
        ({"api_key": "a", "headers": {"authorization": "b"}}, "api_key: headers has an authorization already"),
        ({"headers": {"X-Team": "a"}}, "headers: 'X-Team', expected a name of lower-case letters"),
        ({"headers": {"x-team": "a\nb"}}, "headers: x-team: has a character that no header has"),
        ({"tls": "no/such.pem"}, "tls.authority: 'no/such.pem' can't be read"),
        ({"tls": Tls(certificate="a.pem")}, "tls: certificate and key belong together"),
        ({"balance": "random"}, "balance: 'random', expected least-loaded or round-robin"),
        ({"keepalive_s": -1}, "keepalive_s: -1, expected a number of seconds above 0"),
    ],
)
def test_a_wrong_argument_of_a_client_is_named(options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{message}"):
        PortraitClient("a:1", **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        PortraitClient("a:1", colour="red")  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an authority, and certificates of it for a server and a client."""
    folder = tmp_path_factory.mktemp("certificates")
    commands = [
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout authority.key -out authority.pem"
    ]
    for name in ("server", "client"):
        (folder / f"{name}.ext").write_text("subjectAltName=DNS:localhost\n")
        commands += [
            f"openssl req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr",
            f"openssl x509 -req -days 2 -in {name}.csr -CA authority.pem -CAkey authority.key -set_serial 7 "
            f"-extfile {name}.ext -out {name}.pem",
        ]
    for command in commands:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


def test_tls_and_certificates_of_both_sides(certificates: Path) -> None:
    files = {path.name: path.read_bytes() for path in certificates.iterdir()}
    server = FakePortraitServer()
    server.start(
        grpc.ssl_server_credentials(
            [(files["server.key"], files["server.pem"])], files["authority.pem"], require_client_auth=True
        )
    )
    try:
        port = server.address.rpartition(":")[2]
        authority, own = certificates / "authority.pem", (certificates / "client.pem", certificates / "client.key")
        both = Tls(authority, *own)
        for servers in (f"localhost:{port}", f"https://localhost:{port}", f"dns:///localhost:{port}"):
            with PortraitClient(servers, tls=both, timeout_s=20) as client:
                assert client.generate(**PICTURES).metadata.steps == 20
        for tls in (True, authority, Tls(authority, *own, server_name="elsewhere.example")):
            options: Any = {"tls": tls, "attempts": 1, "timeout_s": 5}
            with PortraitClient(f"localhost:{port}", **options) as client, pytest.raises(ServerUnavailable):
                client.generate(**PICTURES)
        with PortraitClient(f"localhost:{port}", attempts=1, timeout_s=5) as client, pytest.raises(ServerUnavailable):
            client.generate(**PICTURES)
    finally:
        server.stop()


# Threads, forks and the end of a program.


def program(text: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GRPC_VERBOSITY": "ERROR"}
    command = [sys.executable, "-W", "error", "-c", text, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_a_client_made_before_a_fork_works_after_it_and_one_that_was_used_says_why_not(
    fake: FakePortraitServer,
) -> None:
    text = """
import os, sys
from icportrait_client import PortraitClient, PortraitError
picture = b"\\xff\\xd8\\xff"
client = PortraitClient(sys.argv[1])
if sys.argv[2] == "used":
    client.generate(profile=picture, reference=picture)
for worker in range(2):
    if not (pid := os.fork()):
        try:
            print(client.generate(profile=picture, reference=picture, seed=worker).metadata.seed, flush=True)
        except PortraitError as error:
            print(error, flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""
    assert program(text, fake.address, "made").split() == ["0", "1"]
    said = "the client was used before this process was forked; make a new one in each process"
    assert program(text, fake.address, "used").splitlines() == [said] * 2


def test_a_program_that_closes_nothing_ends(fake: FakePortraitServer) -> None:
    text = """
import sys
from icportrait_client import PortraitClient
picture = b"\\xff\\xd8\\xff"
client = PortraitClient(sys.argv[1])
events = client.stream(profile=picture, reference=picture)
print(next(events).step, client.generate(profile=picture, reference=picture).metadata.steps)
"""
    assert program(text, fake.address).split() == ["1", "20"]


def test_closing_twice_and_unused_is_fine(fake: FakePortraitServer) -> None:
    client = PortraitClient(fake.address)
    client.close()
    client.close()
    with PortraitClient(fake.address) as client:
        client.generate(**PICTURES)
    client.close()
    assert threads() == 0


def test_every_way_to_call_takes_a_guidance_interval(client: PortraitClient) -> None:
    request: PortraitRequest = {**PICTURES, "guidance_interval": (0.25, 0.75)}
    portraits = [
        client.generate(**request),
        client.submit(**request).result(),
        *client.map([request]),
        [*client.stream(**request)][-1],
    ]
    assert all(isinstance(portrait, Portrait) for portrait in portraits)
    assert [portrait.metadata.guidance_interval for portrait in portraits] == 4 * [(0.25, 0.75)]
    assert client.generate(**PICTURES).metadata.guidance_interval == (0.0, 1.0)
