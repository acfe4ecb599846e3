"""The documents name files, modules and headings that exist, keep their length, and list every module and package."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "crane_core"
_LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.splitlines()
FILES = [path for name in _LISTED if (path := ROOT / name).is_file()]
"""Files of the repository, built and downloaded ones left out."""
PLACES = {*FILES, *(folder for path in FILES for folder in path.parents if folder.is_relative_to(ROOT))}
# A changelog names what once was.
DOCUMENTS = sorted(
    path for path in FILES if path.suffix == ".md" and path.name != "CHANGELOG.md" and "results" not in path.parts
)
SOURCE = {".py", ".md", ".sh", ".toml", ".Dockerfile"}
PATH = re.compile(r"[\w.*/-]+")
MODULE = re.compile(r"(?:crane_core|jobs|tests)(?:\.\w+)+")
LINK = re.compile(r"\]\(([^)\s:]*)\)")
MAX_README_LINES = 130
MAX_WORDS = 25


def in_backticks(text: str) -> list[str]:
    """The words of the code spans and code blocks."""
    blocks = re.findall(r"```(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [word.strip(",;:()'\"") for part in blocks + spans for word in part.split()]


def names_a_file(word: str, folder: Path) -> bool:
    """Whether a word looks like a file or folder of the repository."""
    first, slash, _ = word.partition("/")
    begins_here = bool(first and slash) and any(base / first in PLACES for base in (ROOT, folder))
    return bool(PATH.fullmatch(word)) and (begins_here or Path(word).suffix in SOURCE)


def is_there(word: str, folder: Path) -> bool:
    """Whether a path, from the root or from a folder, exists; a bare name may lie anywhere below the folder."""
    if "/" not in word and any(fnmatch(path.name, word) and path.is_relative_to(folder) for path in FILES):
        return True
    paths = {base / word.rstrip("/") for base in (ROOT, folder)}
    return bool(paths & PLACES) or ("*" in word and any(path.match(str(one)) for one in paths for path in PLACES))


def is_module(name: str) -> bool:
    """Whether a dotted name is a module or package, or something inside one."""
    path = ROOT.joinpath(*name.split("."))
    return any(each.with_suffix(".py").is_file() or each.is_dir() for each in (path, path.parent))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(document: Path, heading: str) -> str:
    """The text below a heading, up to the next one."""
    return document.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, its head left out."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_modules_that_a_document_names_exist(document: Path) -> None:
    words = in_backticks(document.read_text())
    folder = document.parent
    files = {word for word in words if names_a_file(word, folder)}
    modules = {word for word in words if MODULE.fullmatch(word)}
    missing = [word for word in files if not is_there(word, folder)]
    missing += [word for word in modules if not is_module(word)]
    assert not missing, f"{document.relative_to(ROOT)} names {', '.join(sorted(missing))}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_a_planted_wrong_name_is_found() -> None:
    words = in_backticks("`crane_core/graph/none.py` and `crane_core.graph.none.search`, ```\nmake demo\n```")
    assert [word for word in words if names_a_file(word, ROOT)] == ["crane_core/graph/none.py"]
    assert not is_there("crane_core/graph/none.py", ROOT)
    assert [is_module(word) for word in words if MODULE.fullmatch(word)] == [False]
    assert is_module("crane_core.release.registry.served_folder")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_the_glossary_is_short_and_names_a_word_once() -> None:
    words = [word for word, _ in rows(section(CORE / "README.md", "Glossary"))]
    assert 0 < len(words) <= MAX_WORDS
    assert len(set(words)) == len(words)


def test_every_module_of_the_library_is_in_its_tables() -> None:
    """Both tables: that of the packages, and that of the components, where an importer may be named by its file."""
    packages = {cells[0].strip("`/"): cells[2] for cells in rows(section(CORE / "README.md", "The packages"))}
    components = section(CORE / "README.md", "Which file does what")
    for path in sorted(CORE.rglob("*.py")):
        if path.name == "__init__.py":
            continue
        package, *rest = path.relative_to(CORE).parts if path.parent != CORE else ("(root)", path.name)
        name = path.name if package != "raw" or len(rest) == 1 else "importers/"
        assert f"`{name}`" in packages[package], path
        written = {f"`{path.name}`", f"`{path.relative_to(CORE).as_posix()}`"}
        assert any(each in components for each in written), path


def test_the_packages_stand_in_the_order_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    packages = [name for name in layers if (CORE / name).is_dir()]
    table = [cells[0].strip("`/") for cells in rows(section(CORE / "README.md", "The packages"))]
    assert table == ["(root)", *reversed(packages)]
