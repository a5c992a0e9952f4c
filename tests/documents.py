"""The documents as tests read them: fenced blocks, commands, links, and the tables that are generated.

``python -m tests.documents`` writes the generated columns of the tables in ``docs/api.md`` again.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from icportrait.request import INPUTS, OUTPUTS, RequestInput

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
FOLDERS = ("README.md", "CHANGELOG.md", "docs/**/*.md", *(f"{name}/README.md" for name in ("benchmarks", "client")))
DOCUMENTS = sorted(
    path for pattern in (*FOLDERS, "examples/README.md", "training/README.md") for path in ROOT.glob(pattern)
)
GUIDES = [path for path in DOCUMENTS if path.parent.name != "adr" and path.name != "CHANGELOG.md"]
"""The documents that describe the project as it stands; decisions and changes also name files that are gone."""

CLIENTS = {".venv/bin/icportrait", "icportrait"}

_FENCE = re.compile(r"^( *)```(.*)$")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    path: Path
    line: int
    """The first of its text, counted from 1."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def needs_server(self) -> bool:
        """Tell whether the block asks only a running server, so that an end-to-end test runs all of it."""
        if self.language == "python":
            return "localhost:8001" in self.text
        programs = {line.split()[0] for line in logical_lines(self.text)}
        return self.language == "sh" and bool(programs & {"curl", "jq"} or programs <= CLIENTS)


def read(path: Path) -> tuple[str, list[Block]]:
    """Split a document into its prose, with empty lines where blocks are, and its blocks."""
    prose: list[str] = []
    blocks: list[Block] = []
    inside: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and inside is None:
            inside = number + 1, fence[2].strip(), []
        elif fence and inside:
            start, language, lines = inside
            blocks.append(Block(path, start, language, "\n".join(lines) + "\n"))
            inside = None
        elif inside:
            inside[2].append(line)
        prose.append(line if inside is None and not fence else "")
    assert inside is None, f"{path}: a block has no end"
    return "\n".join(prose), blocks


BLOCKS = [block for path in DOCUMENTS for block in read(path)[1]]


def logical_lines(script: str) -> list[str]:
    """Join lines that end with a backslash; drop comments and empty lines."""
    joined = re.sub(r"\\\n\s*", "", script)
    return [line for line in map(_without_comment, joined.splitlines()) if line]


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#\s.*$", "", line).strip()


def variants(line: str) -> list[list[str]]:
    """Read a synopsis: the words of a command without its ``[optional]`` parts, and with all of them."""
    texts = dict.fromkeys((_OPTIONAL.sub("", line), _OPTIONAL.sub(r"\1", line)))
    return [_until_redirection(shlex.split(text)) for text in texts]


def _until_redirection(words: list[str]) -> list[str]:
    ends = (index for index, word in enumerate(words) if word in (">", ">>", "|", "<"))
    return words[: next(ends, len(words))]


def links(path: Path) -> list[str]:
    """List the targets of a document's links."""
    return _LINK.findall(_CODE.sub("", read(path)[0]))


def code_spans(path: Path) -> list[list[str]]:
    """List the words of each part of a document's prose that is set as code."""
    return [span.split() for span in _CODE.findall(read(path)[0]) if span.strip()]


def anchors(path: Path) -> set[str]:
    """List the anchors that GitHub gives the headings of a document."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", read(path)[0], re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


# Tables of docs/api.md.


def with_tables(text: str) -> str:
    """Write the generated columns of ``docs/api.md`` again; its last columns stay."""
    text = _with_table(text, "inputs", ([field.name, *_columns(field)] for field in INPUTS))
    rows = ([name, dtype.triton, f"[{size}]"] for name, dtype, size in OUTPUTS)
    return _with_table(text, "outputs", rows)


def _with_table(text: str, name: str, rows: Iterable[list[str]]) -> str:
    start, end = text.index(f"<!-- {name}:"), text.index(f"<!-- /{name} -->")
    head, old = [], {}
    for line in text[start:end].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`\w+`", cells[0]):
            old[cells[0]] = cells[-1]
        else:
            head.append(line)
    while not head[-1]:
        head.pop()
    lines = [f"| `{first}` | {' | '.join(rest)} | {old.get(f'`{first}`', '')} |" for first, *rest in rows]
    return text[:start] + "\n".join([*head, *lines]) + "\n\n" + text[end:]


def _columns(field: RequestInput) -> list[str]:
    return [field.dtype.triton, f"[{field.size}]", "; ".join(_values(field))]


def _values(field: RequestInput) -> Iterator[str]:
    if field.choices:
        yield ", ".join(f"`{choice}`" for choice in field.choices)
    if field.minimum is not None:
        yield f"{field.minimum}..{field.maximum}"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    yield "required" if field.required else "optional" if default is None else f"default `{default}`"


def main() -> int:
    API.write_text(with_tables(API.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
