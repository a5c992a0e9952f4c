"""A mix of callers: some stay, some leave early, some send mistakes or large pictures, over both doors."""

from __future__ import annotations

import base64
import io
import random
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from icportrait_client import InvalidRequest, Portrait, PortraitClient, PortraitError, Progress
from PIL import Image

from tests.e2e.caller import generate

CALLERS = 8
LARGE_BYTES = (5_000_000, 10_000_000, 15_000_000, 19_500_000)
OPTIONS: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 10}
TIMEOUT_S, ATTEMPTS = 120.0, 100
STEADY = "gRPC"
"""The kind of request whose latency is watched: its options and pictures are always the same."""
OK, LEFT, REFUSED = "portrait", "left", "refused"


@dataclass(frozen=True)
class Kind:
    """A kind of request: its share of the load, and how each of them must end."""

    share: int
    ends: str


KINDS = {
    STEADY: Kind(30, OK),
    "gRPC stream, previews": Kind(12, OK),
    "gRPC stream, left early": Kind(12, LEFT),
    "gRPC call, left early": Kind(8, LEFT),
    "HTTP JSON": Kind(10, OK),
    "HTTP form": Kind(10, OK),
    "5 to 20 MB": Kind(6, OK),
    "wrong option": Kind(6, REFUSED),
    "no picture": Kind(6, REFUSED),
}


class Load:
    """Callers that keep a server busy until they are told to end; they wait while it is looked at."""

    def __init__(self, grpc_url: str, http_url: str, pictures: dict[str, bytes], seed: int = 0) -> None:
        """Prepare; ``running`` starts it.

        Args:
            grpc_url: of the server.
            http_url: of the server.
            pictures: of most requests.
            seed: of the order of kinds and of what they send.
        """
        self._grpc_url, self._http_url, self._pictures, self._seed = grpc_url, http_url, pictures, seed
        self._large = [noise_png(size) for size in LARGE_BYTES]
        self._ending, self._lock = threading.Event(), threading.Lock()
        self._idle, self._paused = threading.Condition(self._lock), False
        self._busy = 0
        self.ends: Counter[tuple[str, str]] = Counter()
        self._steady_ms: list[float] = []
        self._calls: dict[str, Callable[[PortraitClient, random.Random], str]] = {
            STEADY: self._steady,
            "gRPC stream, previews": lambda client, rng: self._stream(client, rng, leaves=False),
            "gRPC stream, left early": lambda client, rng: self._stream(client, rng, leaves=True),
            "gRPC call, left early": self._cancelled,
            "HTTP JSON": self._json,
            "HTTP form": self._form,
            "5 to 20 MB": self._large_picture,
            "wrong option": lambda client, _: self._refused(client, num_inference_steps=100_000),
            "no picture": lambda client, rng: self._refused(client, profile=rng.randbytes(1000)),
        }

    @property
    def unexpected(self) -> dict[tuple[str, str], int]:
        """Return the counts of requests that didn't end as their kind must."""
        return {(kind, end): count for (kind, end), count in self.ends.items() if end != KINDS[kind].ends}

    def call(self, kind: str, client: PortraitClient, rng: random.Random) -> None:
        """Make one request of a kind and count its end."""
        try:
            end = self._calls[kind](client, rng)
        except (PortraitError, OSError, ValueError) as error:
            end = str(error)[:160]
        with self._lock:
            self.ends[kind, end] += 1

    def client(self) -> PortraitClient:
        """Make a client that sends pictures as they are."""
        return PortraitClient(self._grpc_url, timeout_s=TIMEOUT_S, attempts=ATTEMPTS, shrink=False)

    @contextmanager
    def running(self, callers: int = CALLERS) -> Iterator[None]:
        """Let callers call until the block ends."""
        threads = [threading.Thread(target=self._run, args=(number,)) for number in range(callers)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the callers back for a block, which begins when none has a request under way."""
        with self._idle:
            self._paused = True
            self._idle.wait_for(lambda: not self._busy)
        try:
            yield
        finally:
            with self._idle:
                self._paused = False
                self._idle.notify_all()

    def take_p50_ms(self) -> float:
        """Return the median latency of the steady requests since the last call; NaN where there were none."""
        with self._lock:
            taken, self._steady_ms = self._steady_ms, []
        return statistics.median(taken) if taken else float("nan")

    def _run(self, number: int) -> None:
        rng = random.Random(1000 * self._seed + number)
        names, shares = list(KINDS), [kind.share for kind in KINDS.values()]
        with self.client() as client:
            while not self._ending.is_set():
                with self._idle:
                    self._idle.wait_for(lambda: not self._paused)
                    self._busy += 1
                try:
                    self.call(rng.choices(names, shares)[0], client, rng)
                finally:
                    with self._idle:
                        self._busy -= 1
                        self._idle.notify_all()

    def _steady(self, client: PortraitClient, rng: random.Random) -> str:
        began_s = time.monotonic()
        client.generate(**self._pictures, seed=rng.randrange(1000), **OPTIONS)
        with self._lock:
            self._steady_ms.append(1000 * (time.monotonic() - began_s))
        return OK

    def _stream(self, client: PortraitClient, rng: random.Random, leaves: bool) -> str:
        leaves_at = rng.randint(1, 5)
        events = client.stream(**self._pictures, seed=rng.randrange(1000), preview_every=2, **OPTIONS)
        with closing(events):
            for event in events:
                if isinstance(event, Portrait):
                    return OK
                if leaves and isinstance(event, Progress) and event.step >= leaves_at:
                    return LEFT
        return "a stream without portraits"

    def _cancelled(self, client: PortraitClient, rng: random.Random) -> str:
        handle = client.submit(**self._pictures, seed=rng.randrange(1000), guidance_scale=1.0, num_inference_steps=150)
        time.sleep(rng.uniform(0.0, 0.1))
        handle.cancel()
        return LEFT

    def _refused(self, client: PortraitClient, **wrong: Any) -> str:
        try:
            client.generate(**{**self._pictures, **OPTIONS, **wrong})
        except InvalidRequest:
            return REFUSED
        return OK

    def _large_picture(self, client: PortraitClient, rng: random.Random) -> str:
        # The bytes at the end mean nothing to a decoder, and make it another picture.
        client.generate(**{**self._pictures, "profile": rng.choice(self._large) + rng.randbytes(8)}, **OPTIONS)
        return OK

    def _json(self, _: PortraitClient, rng: random.Random) -> str:
        files = {name: base64.b64encode(data).decode() for name, data in self._pictures.items()}
        return self._until_let_in(
            lambda: generate(self._http_url, **files, encoding="base64", seed=rng.randrange(1000), **OPTIONS)
        )

    def _form(self, _: PortraitClient, rng: random.Random) -> str:
        body, kind = form({**self._pictures, "seed": rng.randrange(1000), **OPTIONS})
        request = urllib.request.Request(f"http://{self._http_url}/v1/portraits", body, {"Content-Type": kind})

        def send() -> tuple[int, Any]:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read()

        return self._until_let_in(send)

    @staticmethod
    def _until_let_in(send: Callable[[], tuple[int, Any]]) -> str:
        for _ in range(ATTEMPTS):
            status, answer = send()
            if status != 503:
                break
            time.sleep(0.2)
        return OK if status == 200 else f"{status}: {answer!r}"[:160]


def noise_png(nbytes: int) -> bytes:
    """Make a PNG file of nearly a size, of noise that doesn't compress."""
    side = int((nbytes / 3) ** 0.5) - 8
    pixels = np.random.default_rng(nbytes).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def form(fields: dict[str, Any]) -> tuple[bytes, str]:
    """Return a multipart body and its content type."""
    boundary, parts = "soak", []
    for name, value in fields.items():
        file = f'; filename="{name}.jpg"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else str(value).encode()
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data)
    return b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def by_kind(ends: Counter[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Group the ends of requests by kind."""
    grouped: dict[str, Counter[str]] = defaultdict(Counter)
    for (kind, end), count in ends.items():
        grouped[kind][end] += count
    return grouped
