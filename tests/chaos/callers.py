"""Callers of a server under chaos: some try again and must get every portrait, others say what they saw."""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from icportrait_client import PortraitClient, PortraitError
from tritonclient.utils import InferenceServerException

from tests.chaos.site import Site
from tests.conftest import EXAMPLES
from tests.e2e.caller import generate, infer

CALLERS = 16
SEEDS = range(8)
OPTIONS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.0}
TIMEOUT_S = 120.0
ATTEMPTS = 100
"""Attempts of a request: the only server may be away for as long as it takes to start, and there is no other."""
LOOK_EVERY_S = 0.05


class Callers:
    """Sixteen callers, each with a client of this project's that tries again; one caller a door that doesn't."""

    def __init__(
        self, site: Site, pictures: dict[str, bytes], expected: dict[int, bytes], count: int = CALLERS
    ) -> None:
        """Prepare; ``calling`` starts them.

        Args:
            site: the server.
            pictures: of every request.
            expected: the portrait of each seed.
            count: of the callers that try again.
        """
        self._site, self._pictures, self._expected, self._count = site, pictures, expected, count
        self._ending, self._lock = threading.Event(), threading.Lock()
        self.answered = [0] * count
        self.lost: list[str] = []
        self.changed: list[int] = []
        """Seeds whose portrait wasn't the expected one."""
        self.seen: Counter[str] = Counter()
        """Outcomes of callers that don't try again."""
        self.longest_s = 0.0

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Let all of them call, one request after another, until the block ends."""
        targets = [(self._call, (number,)) for number in range(self._count)]
        targets += [(self._look, (look,)) for look in (self._over_grpc, self._over_http)]
        threads = [threading.Thread(target=target, args=arguments) for target, arguments in targets]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join()

    def until_all_were_answered(self) -> None:
        """Wait until each caller has got a portrait that it asked for from now on."""
        before = list(self.answered)
        # A caller's second answer from now on is of a request that was sent from now on.
        self._site.until(
            lambda: all(now >= then + 2 for now, then in zip(self.answered, before, strict=True)), TIMEOUT_S
        )

    def _call(self, number: int) -> None:
        with PortraitClient(self._site.url, timeout_s=TIMEOUT_S, attempts=ATTEMPTS) as client:
            for seed in itertools.islice(itertools.cycle(SEEDS), number, None):
                if self._ending.is_set():
                    return
                began_s = time.monotonic()
                try:
                    portrait = client.generate(**self._pictures, seed=seed, **OPTIONS)
                except PortraitError as error:
                    with self._lock:
                        self.lost.append(str(error))
                    continue
                with self._lock:
                    self.longest_s = max(self.longest_s, time.monotonic() - began_s)
                    if portrait.bytes != self._expected[seed]:
                        self.changed.append(seed)
                self.answered[number] += 1

    def _look(self, look: Any) -> None:
        while not self._ending.wait(LOOK_EVERY_S):
            outcome = look()
            with self._lock:
                self.seen[outcome] += 1

    def _over_grpc(self) -> str:
        try:
            infer(self._site.url, **self._pictures, seed=1, **OPTIONS)
        except InferenceServerException as error:
            code = str(error.status()).removeprefix("StatusCode.")
            text = error.message().removeprefix(f"{code}: ")
            return plain(f"gRPC {code}: {text}")
        return "served"

    def _over_http(self) -> str:
        values = {name: base64.b64encode(data).decode() for name, data in self._pictures.items()}
        try:
            status, answer = generate(self._site.http_url, **values, encoding="base64", seed=1, **OPTIONS)
        except (OSError, ValueError) as error:
            return plain(f"HTTP no answer: {error}")
        return "served" if status == 200 else plain(f"HTTP {status}: {answer.get('error')}")


def plain(text: str) -> str:
    """Return an outcome without its figures and addresses, so that equal ones are counted together."""
    first = text.partition("\n")[0]
    door = first.partition(" ")[0]
    if re.search(r"[Cc]onnection refused|[Ff]ailed to connect", first):
        return f"{door} connection refused"
    if re.search(r"reset|[Cc]losed|IncompleteRead|GOAWAY|without response", first):
        return f"{door} connection cut"
    return re.sub(r"(?<=retry_after_ms: )\d+", "N", first)


def portraits(site: Site, pictures: dict[str, bytes]) -> dict[int, bytes]:
    """Ask for the portrait of each seed."""
    with PortraitClient(site.url, timeout_s=TIMEOUT_S) as client:
        return {seed: client.generate(**pictures, seed=seed, **OPTIONS).bytes for seed in SEEDS}


def watch(url: str, callers: int) -> None:
    """Watch streams with previews, one after another, until the process is killed."""
    pictures = {name: EXAMPLES / file for name, file in (("profile", "hopper.jpg"), ("reference", "astronaut.jpg"))}

    def call(client: PortraitClient) -> None:
        while True:
            with contextlib.suppress(PortraitError):
                for _ in client.stream(**pictures, preview_every=1, guidance_scale=1.0, num_inference_steps=150):
                    pass

    with PortraitClient(url) as client:
        threads = [threading.Thread(target=call, args=(client,)) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
