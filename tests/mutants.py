"""``python -m tests.mutants``: whether the unit tests notice a changed line, shown by mutmut on a fixed random sample.

mutmut changes one expression of a function at a time and runs the tests that call the function. A mutant that no test
fails on survives. ``[tool.mutmut]`` in pyproject.toml says which modules are changed and which tests are run.
``docs/testing.md`` says how to read the figures.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path("build/mutants")
LOG = "mutmut.log"
PROGRESS = re.compile(r"🎉 (\d+) 🫥 (\d+)  ⏰ (\d+)  🤔 (\d+)  🙁 (\d+)")
"""Mutants that were killed, had no test, ran into their time limit, ended pytest oddly, survived."""


@dataclass(frozen=True)
class Settings:
    sample: int = 150
    """Mutants of all modules together."""
    seed: int = 0
    least_percent: float = 80.0
    jobs: int = 1
    """Mutants that are tested at the same time."""


@dataclass(frozen=True)
class Outcome:
    """A mutant's result.

    Attributes:
        result: "killed", "timeout", "survived" or "no test".
        line: the first one that was changed, in the module's file.
    """

    name: str
    path: str
    result: str
    line: int
    before: str
    after: str

    @property
    def is_noticed(self) -> bool:
        return self.result in ("killed", "timeout")


def main(argv: Sequence[str] | None = None) -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=defaults.sample, help="mutants to test (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the sample (%(default)s)")
    parser.add_argument("--least", type=float, default=defaults.least_percent, help="score in %% (%(default)s)")
    parser.add_argument("--jobs", type=int, default=defaults.jobs, help="mutants at the same time (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print every mutant as JSON")
    given = parser.parse_args(argv)
    settings = Settings(given.sample, given.seed, given.least, given.jobs)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # because a time limit's signal would leave a core file
    lay_out()
    chosen = choose(all_mutants(), settings.sample, settings.seed)
    if not run_mutmut(chosen, settings.jobs):
        print(f"error: mutmut ended early; the end of {FOLDER / LOG} says why", file=sys.stderr)
        return 2
    outcomes = read_outcomes(chosen)
    score = percent(outcomes)
    if given.json:
        print(json.dumps({"settings": asdict(settings), "score": score, "mutants": [asdict(o) for o in outcomes]}))
    else:
        print_report(outcomes, settings)
    return 0 if score >= settings.least_percent else 1


def lay_out() -> None:
    """Make the folder that mutmut works in: links to what is tested, so that its copies lie under ``build/``."""
    os.chdir(ROOT)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if not entry.name.startswith((".", "build")):
            (FOLDER / entry.name).symlink_to(entry)
    os.chdir(FOLDER)


def all_mutants() -> list[str]:
    """Write every module with its mutants, and list them, as ``icportrait.pictures.faces.x_find_face__mutmut_3``."""
    from mutmut.__main__ import create_mutants
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.utils.file_utils import copy_src_dir, walk_mutatable_files

    Path("mutants").mkdir()
    copy_src_dir()
    with redirect_stdout(io.StringIO()):  # it names every file
        create_mutants(1)
    mutants: list[str] = []
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        mutants += data.exit_code_by_key
    return mutants


def choose(mutants: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw mutants of every module in proportion to its number of them.

    A mutant's place in the draw depends on the seed, its module's last name and its function alone, because then a
    change of one function, or of a module's package, leaves the other functions' mutants in the sample.
    """

    def place(mutant: str) -> str:
        return hashlib.sha256(f"{seed} {'.'.join(mutant.split('.')[-2:])}".encode()).hexdigest()

    modules = {module: sorted(names, key=place) for module, names in groupby(mutants, module_of)}
    shares = {module: count * len(names) / len(mutants) for module, names in modules.items()}
    counts = {module: int(share) for module, share in shares.items()}
    by_remainder = sorted(shares, key=lambda module: counts[module] - shares[module])
    for module in by_remainder[: count - sum(counts.values())]:
        counts[module] += 1
    return [mutant for module, names in modules.items() for mutant in names[: counts[module]]]


def module_of(mutant: str) -> str:
    return mutant.rpartition(".")[0]


def run_mutmut(mutants: Sequence[str], jobs: int) -> bool:
    """Test the mutants. False where mutmut itself fails: a test fails without a mutation, most often."""
    from tqdm import tqdm

    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs), *mutants]
    with (
        Path(LOG).open("w", buffering=1) as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        tqdm(total=len(mutants), unit="mutant", desc="the tests without a mutation") as bar,
    ):
        assert process.stdout is not None
        for line in process.stdout:  # mutmut's status lines end with a carriage return, which is a newline here
            log.write(line)
            if counts := PROGRESS.search(line):
                bar.set_description(f"{counts[5]} survived")
                bar.update(sum(map(int, counts.groups())) - bar.n)
    return process.returncode == 0


def read_outcomes(mutants: Sequence[str]) -> list[Outcome]:
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.stats import status_by_exit_code

    results = {"survived": "survived", "no tests": "no test", "timeout": "timeout"}
    outcomes = []
    for module, names in groupby(mutants, module_of):
        path = Path(*module.split(".")).with_suffix(".py")
        data = SourceFileMutationData(path=path)
        data.load()
        for name in names:
            exit_code = data.exit_code_by_key[name]
            assert exit_code is not None, f"{name} was not tested"
            result = results.get(status_by_exit_code[exit_code], "killed")
            outcomes.append(Outcome(name, str(path), result, *changed_lines(name, path)))
    return sorted(outcomes, key=lambda outcome: (outcome.path, outcome.line))


def print_report(outcomes: Sequence[Outcome], settings: Settings) -> None:
    survivors = [outcome for outcome in outcomes if not outcome.is_noticed]
    for outcome in survivors:
        print(f"\n{outcome.path}:{outcome.line}: {outcome.result}   {outcome.name}")
        print(f"  - {outcome.before}\n  + {outcome.after}")
    print("\n| module | mutants | killed | time limit | survived | no test | score |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = [(Path(path).stem, list(group)) for path, group in groupby(outcomes, lambda outcome: outcome.path)]
    for label, group in [*rows, ("all", outcomes)]:
        results = [outcome.result for outcome in group]
        counts = [len(group), *map(results.count, ("killed", "timeout", "survived", "no test"))]
        print(f"| {label} | {' | '.join(map(str, counts))} | {percent(group):.0f} % |")
    print(f"\n{percent(outcomes):.1f} % of {len(outcomes)} mutants were noticed, ", end="")
    print(f"seed {settings.seed}; expected at least {settings.least_percent:g} %")


def percent(outcomes: Sequence[Outcome]) -> float:
    return 100 * sum(outcome.is_noticed for outcome in outcomes) / len(outcomes)


def changed_lines(mutant: str, path: Path) -> tuple[int, str, str]:
    """Find the first changed line's number in the module's file, and the changed lines before and after."""
    import libcst
    from mutmut.mutation.diff_apply import read_functions_from_index
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    functions = read_functions_from_index(mutant, path)
    assert functions is not None, f"{mutant} is not in {path}'s index"
    before, after = (libcst.Module([function]).code.strip("\n").split("\n") for function in functions)
    _, first, last, new_first, new_last = next(
        opcode for opcode in SequenceMatcher(None, before, after, autojunk=False).get_opcodes() if opcode[0] != "equal"
    )
    function_name, class_name = orig_function_and_class_names_from_key(mutant)
    start = next(index for index, line in enumerate(before) if re.match(r"\s*(async )?def ", line))
    line = definition_line(path, function_name, class_name) + first - start
    return line, joined(before[first:last]), joined(after[new_first:new_last])


def definition_line(path: Path, function: str, class_name: str | None) -> int:
    body = ast.parse(path.read_text()).body
    for name in class_name.split(".") if class_name else []:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name).body
    return next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == function).lineno


def joined(lines: Sequence[str]) -> str:
    return " ".join(line.strip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
