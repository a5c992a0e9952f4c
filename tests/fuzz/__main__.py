"""Fuzz the server that this starts: ``make fuzz SEED=7 REQUESTS=100000 CORPUS=folder``.

The engines compute nothing, so that the doors, the pictures and the loop get all of the machine. The seed chooses every
case. A finding is written to a file with the command that sends its case alone. The status is 1 where there is any.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.exports import ROOT

BUILD = ROOT / "build" / "fuzz"
KEPT_PICTURES, CACHE_BYTES = 32, 2**16
"""So few that they are full after a tenth."""
REPEATS = 3
"""A replayed case is sent so often."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    made.add_argument("--seed", type=int, default=0, help="chooses every case (default: %(default)s)")
    made.add_argument("--requests", type=int, default=100_000, help="how many are sent (default: %(default)s)")
    made.add_argument("--corpus", type=Path, help="folder of more pictures, and of cases that are sent first")
    made.add_argument("--replay", type=Path, help="send the case of this file alone")
    made.add_argument("--only", type=int, help="send the seed's case of this number alone")
    made.add_argument("--write-corpus", type=Path, help="write the seed's pictures into this folder, and end")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.corpus and not args.corpus.is_dir():
        print(f"error: corpus: {args.corpus} isn't a folder", file=sys.stderr)
        return 2
    if args.replay and not args.replay.is_file():
        print(f"error: replay: {args.replay} isn't a file", file=sys.stderr)
        return 2
    from tests.fuzz.corpus import Corpus

    if args.write_corpus:
        Corpus(args.seed).write(args.write_corpus)
        return 0
    from icportrait.presets import DEMO_128
    from tests.fuzz import keys
    from tests.fuzz.cases import Case
    from tests.fuzz.run import Plan, Run, table

    with server() as (watched, ports, folder):
        plan = Plan(
            args.seed,
            args.requests,
            f"127.0.0.1:{ports.grpc}",
            f"127.0.0.1:{ports.http}",
            (keys.bearer("plain"),),
            corpus=args.corpus,
            run_folder=folder,
            metrics_url=f"127.0.0.1:{ports.metrics}",
            findings=BUILD / "findings",
        )
        run = Run(plan, DEMO_128, watched)
        if args.replay or args.only is not None:
            case = Case.read(args.replay) if args.replay else run.cases.make(args.only)
            return asyncio.run(_replay(run, case))
        outcome = asyncio.run(run.all())
    print(table(outcome))
    return 1 if outcome.findings else 0


async def _replay(run: object, case: object) -> int:
    """Send one case, and show its answer."""
    from tests.fuzz.callers import Callers
    from tests.fuzz.cases import Case
    from tests.fuzz.run import Run

    assert isinstance(run, Run) and isinstance(case, Case)
    folder, wrong = run.plan.run_folder, False
    assert folder
    async with Callers(run.plan.grpc_url, run.plan.http_url, lambda: run.watched.control_path(folder)) as callers:
        for _ in range(REPEATS):
            began_s = time.monotonic()
            answer, faults = await run.one(callers, case)
            await asyncio.sleep(0.5)
            faults += run.watched.log_faults() + run.watched.ended()
            wrong = wrong or bool(faults)
            code, text = (answer.code, answer.text[:500]) if answer else ("none", "")
            print(f"{case.name} ({case.kind}): {code} {text!r} after {time.monotonic() - began_s - 0.5:.2f} s")
            print("\n".join(f"  FAULT {fault}" for fault in faults) or "  as it should be")
    return int(wrong)


@contextmanager
def server() -> Iterator[tuple[object, object, Path]]:
    """Start a server of its own, whose log is kept in ``build/fuzz``."""
    from tests.e2e.conftest import simulated_repository
    from tests.e2e.supervised import supervised
    from tests.fuzz import keys
    from tests.fuzz.watch import Watched

    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="icf-") as temporary:
        folder = Path(temporary)
        keys.write(folder / "keys.toml")
        repository = simulated_repository(folder, {}, cache_bytes=CACHE_BYTES)
        limits = ("--max-queued-slots=4096", "--max-pending-requests=1024", f"--pictures-kept={KEPT_PICTURES}")
        flags = ("--api-keys", str(folder / "keys.toml"), *limits)
        (folder / "run").mkdir()
        try:
            with supervised(repository, folder / "run", flags=flags) as running:
                yield Watched(running.process.pid, folder / "run" / "server.log"), running.ports, folder / "run"
        finally:
            shutil.copy(folder / "run" / "server.log", BUILD / "server.log")


if __name__ == "__main__":
    sys.exit(main())
