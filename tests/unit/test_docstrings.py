"""A docstring begins with a verb or a noun, and a function's with an imperative verb.

Nothing else begins one: a word like "what" or "of" leaves its subject out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.conftest import ROOT

PACKAGES = (
    "icportrait",
    "client/src",
    "engines",
    "export",
    "training",
    "benchmarks",
    "examples",
    "triton_repo",
    "tests",
)
BANNED = frozenset(
    {
        "all",
        "as",
        "by",
        "for",
        "how",
        "its",
        "likewise",
        "nothing",
        "of",
        "see",
        "that",
        "those",
        "what",
        "when",
        "where",
        "whether",
        "which",
        "who",
        "whoever",
        "whose",
    }
)
VERBS = frozenset(
    re.findall(
        r"\w+",
        """
    Adapt Add Advance Allocate Answer Ask Assemble Begin Bound Build Call Cancel Change Check Choose Close Compare
    Complete Compute Configure Connect Convert Copy Count Cover Cut Damage Decide Decode Denoise Describe Divide Do Drag
    Draw Drop Embed Encode End Estimate Execute Export Extract Fill Find Finish Fit Flush Forecast Forget Give Grant
    Group Grow Guide Hand Hang Hash Have Hold Illuminate Implement Infer Inflate Install Join Judge Keep Kill Launch
    Leave Let Lift Link List Load Lock Look Make Mark Measure Mix Move Name Note Notice Open Order Paint Parse Place
    Predict Prepare Print Publish Put Queue Raise Read Receive Record Refuse Remember Remove Render Replace Report
    Rescale Reshape Retrieve Return Round Run Say Scale Search Send Separate Serve Set Show Sign Simulate Skip Smooth
    Specify Split Stand Start Step Stop Submit Sum Summarise Take Tell Test Train Try Turn Undo Use Wait Wake Warp Watch
    Work Write Yield
    """,
    )
)
"""Verbs that begin a function's docstring. A verb that is missing here can be added, a noun or an article can't."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(node: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield every docstring's line and text, and whether it is a function's.

    The others are a module's, a class's, or stand after an attribute.
    """
    is_function = isinstance(node, FUNCTIONS)
    # Expressions are left out because they are most of a tree and hold no docstring.
    for block in ("body", "orelse", "handlers", "finalbody"):
        if isinstance(statements := getattr(node, block, None), list):
            for statement in statements:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    if isinstance(text := statement.value.value, str):
                        yield statement.lineno, text, is_function and statement is statements[0]
                else:
                    yield from docstrings(statement)


def wrong_beginnings(source: str) -> list[tuple[int, str]]:
    """List the lines of docstrings that begin wrongly, and their first words."""
    wrong = []
    for line, text, is_function in docstrings(ast.parse(source)):
        found = re.match(r"\W*(\w*)( of\b)?", text)
        assert found
        is_verb = found[1] in VERBS and not found[2]
        if found[1].lower() in BANNED or (is_function and not is_verb):
            wrong.append((line, found[0].strip()))
    return wrong


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    wrong = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found = wrong_beginnings(path.read_text(encoding="utf-8"))
            wrong += [f'{name}:{line}: the docstring begins with "{words}"' for line, words in found]
    mend = (
        'begin a function\'s docstring with an imperative verb and its object, as in "Return the rows in use."; '
        "a verb that VERBS hasn't belongs there; begin any other docstring with the noun that it is about"
    )
    assert not wrong, "\n".join([*wrong, mend])


def test_the_check_sees_every_kind_of_docstring() -> None:
    source = '''"""What a module has."""
class A:
    """Whose it is."""
    b: int
    """Of the class."""
    def c(self):
        """Return it."""
        "".join("Of")
        if self:
            def e(self):
                """The answer."""
async def d():
    """See ``c``."""
    f = 1
    """A variable."""
def g():
    """Count of rows."""
def h():
    """``size`` in pixels."""
def i():
    """Returns nothing."""
'''
    other = [(1, "What"), (3, "Whose"), (5, "Of")]
    functions = [(11, "The"), (13, "See"), (17, "Count of"), (19, "``size"), (21, "Returns")]
    assert wrong_beginnings(source) == other + functions
