"""Errors as data, and remedies that tell what to type or what is allowed."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crane_core import errors
from crane_core.errors import CraneError, UnexpectedError, error_from, error_of

PROJECT = Path(__file__).parents[2]
KINDS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, CraneError)]
SHORTEST = 20
"""Characters of a remedy: less has no room for a command or a value."""
EMPTY = (
    "correct the flag",
    "correct these fields",
    "correct the file",
    "look at",
    "quote or correct it",
    "run it again",
    "try again",
    "fix it",
    "see the log",
)


@pytest.mark.parametrize("kind", KINDS)
@given(found=st.text(), remedy=st.text())
def test_an_error_is_the_same_after_json_and_after_pickle(kind: type[CraneError], found: str, remedy: str) -> None:
    error = kind(found, remedy)
    again = error_from(json.loads(json.dumps(error.as_dict())))
    for copy in (again, pickle.loads(pickle.dumps(error))):
        assert copy is not None and copy.as_dict() == error.as_dict() == {
            "error": error.name,
            "found": found,
            "remedy": remedy,
        }
        assert (type(copy), copy.exit_code, str(copy)) == (kind, kind.exit_code, str(error))


@pytest.mark.parametrize(
    "data",
    [{}, {"error": "DataError"}, {"error": "DataError", "found": "a", "remedy": None}, {"found": "a", "remedy": "b"}],
)
def test_a_mapping_that_describes_no_error_is_none(data: dict[str, str]) -> None:
    assert error_from(data) is None


@pytest.mark.parametrize(
    ("exception", "found"),
    [(KeyError("a"), "'a'"), (ZeroDivisionError(), "ZeroDivisionError()"), (OSError("x" * 5000), f"{'x' * 2000} ...")],
)
def test_an_exception_of_another_class_keeps_its_class_and_text(exception: Exception, found: str) -> None:
    error = error_of(exception, "Read the log.")
    assert isinstance(error, UnexpectedError) and error.exit_code == errors.EXIT_UNEXPECTED
    assert error.as_dict() == {"error": type(exception).__name__, "found": found, "remedy": "Read the log."}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("crane_core", "jobs", "dags"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def texts(node: ast.expr, module: ast.Module) -> Iterator[str]:
    """Every text that an expression can be, with `*` for what is put in; nothing for what is not in the source."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            yield "".join(each.value if isinstance(each, ast.Constant) else "*" for each in values)
        case ast.IfExp(body=body, orelse=orelse):
            yield from texts(body, module)
            yield from texts(orelse, module)
        case ast.BoolOp(values=choices):
            for each in choices:
                yield from texts(each, module)
        case ast.Name(id=name):
            for each in ast.walk(module):
                if isinstance(each, ast.Assign) and any(
                    isinstance(to, ast.Name) and to.id == name for to in each.targets
                ):
                    yield from texts(each.value, module)


def remedies() -> Iterator[tuple[str, str]]:
    """File with line, and text, of every remedy in the source."""
    names = {kind.__name__ for kind in KINDS} | {"LeaseLost"}
    for path, module in sources():
        for call in ast.walk(module):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                continue
            position = 1 if call.func.id in names else 3 if call.func.id == "Finding" else None
            if position is not None and len(call.args) > position:
                for text in texts(call.args[position], module):
                    yield f"{path.relative_to(PROJECT)}:{call.lineno}", text


def test_remedies_tell_what_to_type_or_what_is_allowed() -> None:
    found = list(remedies())
    assert len(found) > 150, "the source is searched as it is written"
    empty = [
        (where, text)
        for where, text in found
        if len(text) < SHORTEST or any(phrase in text.lower() for phrase in EMPTY)
    ]
    assert empty == []


def test_no_message_is_cut_apart_by_its_remedy() -> None:
    cut = [
        f"{path.relative_to(PROJECT)}:{call.lineno}"
        for path, module in sources()
        for call in ast.walk(module)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"split", "rsplit", "partition", "rpartition", "index", "find", "removeprefix"}
        and any("Remedy" in str(each.value) for each in ast.walk(call) if isinstance(each, ast.Constant))
    ]
    assert cut == []
