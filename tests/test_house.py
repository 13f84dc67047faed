"""The house of the tests: what lies where, and what is slow."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Set

import pytest

import helpers.base
import povfarm
from helpers.base import POVFARM, ROOT
from helpers.source import SECTIONS, owners

TESTS = ROOT / "tests"
RENDERS = {"povray", "examples"}  # fixtures of what renders


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, with the names that it takes of a package."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_tests_are_in_tests_and_nothing_else() -> None:
    assert {path.name for path in TESTS.glob("*.py") if not path.name.startswith("test_")} == {
        "conftest.py"}
    for place in ("helpers", "tools"):
        assert not [path for path in (TESTS / place).glob("*.py") if "\ndef test_" in path.read_text()]


def test_tests_do_not_import_each_other() -> None:
    for path in sorted(TESTS.rglob("*.py")):
        for name in imported(path):
            assert not re.match(r"(test_|conftest)", name), f"{path.name} imports {name}"
            if path.parent.name == "helpers":
                assert not name.startswith("tools."), f"{path.name} imports {name}"


def test_tools_say_how_they_are_started() -> None:
    for path in (TESTS / "tools").glob("[a-z]*.py"):
        text = path.read_text(encoding="utf-8")
        assert f"\n    python tests/tools/{path.name}" in (ast.get_docstring(tree(path)) or ""), path.name
        assert '\nif __name__ == "__main__":\n' in text, path.name


def test_the_files_that_the_papers_name_are_there() -> None:
    """Tests, helpers and tools."""
    for paper in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = paper.read_text(encoding="utf-8")
        for name in re.findall(r"\btests/[\w/]+\.py", text):
            assert (ROOT / name).is_file(), f"{paper.name}: {name}"
        for name in re.findall(r"`(test_\w+\.py)`", text):
            assert (TESTS / name).is_file(), f"{paper.name}: {name}"


# --- the fast lane

def test_what_is_not_slow_starts_no_povray() -> None:
    for program in ("povray", "/usr/bin/povray", str(ROOT / "povfarm.py"), POVFARM[1]):
        with pytest.raises(AssertionError, match="marked as slow"):
            subprocess.run([program, "--version"], check=False, capture_output=True)


@pytest.mark.slow
def test_what_is_slow_may_start_it() -> None:
    subprocess.run([*map(str, (povfarm.sys.executable, ROOT / "povfarm.py")), "--version"], check=True,
                   capture_output=True)


def test_what_renders_is_slow(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        if RENDERS & set(getattr(item, "fixturenames", ())):
            assert item.get_closest_marker("slow") is not None, item.nodeid


def is_slow(node: ast.AST) -> bool:
    return any(ast.unparse(mark) == "pytest.mark.slow"
               for mark in getattr(node, "decorator_list", ()))


def fast_tests(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """The tests of a file that are in the fast lane."""
    if not any("slow" in ast.unparse(node) or "povray" in ast.unparse(node) for node in module.body
               if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"):
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not (
                    is_slow(node) or {argument.arg for argument in node.args.args} & RENDERS):
                yield node


def words_in(node: ast.AST, own: Dict[str, ast.AST]) -> Set[str]:
    """The names in a piece of code, in what it uses of its file and in the fixtures it asks for."""
    words: Set[str] = set()
    left = [node]
    while left:
        for part in ast.walk(left.pop()):
            name = part.id if isinstance(part, ast.Name) else part.arg if isinstance(
                part, ast.arg) else part.attr if isinstance(part, ast.Attribute) else ""
            if name not in words and name in own:
                left.append(own[name])
            words.add(name)
    return words


def test_the_fast_lane_covers_every_section() -> None:
    """As far as names tell: at least five tests for each."""
    covering: Dict[str, List[str]] = {section: [] for section in SECTIONS}
    for path in sorted(TESTS.glob("test_*.py")):
        module = tree(path)
        own = {node.name.replace("_fixture", ""): node for node in module.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for test in fast_tests(module):
            for section in {owners()[name] for name in words_in(test, own) & set(owners())}:
                covering[section].append(test.name)
    assert not {section for section, tests in covering.items() if len(tests) < 5}


def test_the_figures_of_all_processes_are_added(
        request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pytest-xdist, each process has counted for itself."""
    figures: Dict[str, Dict[str, int]] = {"a": {"tried": 2, "lost": 1}}
    monkeypatch.setattr(helpers.base, "TRIED", figures)

    conftest: Any = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    conftest.pytest_testnodedown(SimpleNamespace(
        workeroutput={"tried": {"a": {"tried": 3, "lost": 0}, "b": {"tried": 5}}}))
    assert figures == {"a": {"tried": 5, "lost": 1}, "b": {"tried": 5}}


@pytest.mark.slow
def test_what_shares_something_is_done_by_one_process() -> None:
    pytest.importorskip("xdist")
    done = subprocess.run([povfarm.sys.executable, "-m", "pytest", "-vv", "-n", "2", "tests/test_limits.py"],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(set(re.findall(r"\[gw\d\]", done.stdout))) == 1, done.stdout


# --- what is promised about security

def promises() -> List[str]:
    """The bullets and paragraphs of security.md that promise something, after their section's name."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8").partition("\n## Who can do what")[0]
    found, section = [], ""
    for block in re.split(r"\n\s*\n|\n(?=[*#|])", text):
        if block.startswith("#"):
            section = block.strip("# \n")
        elif block.strip() and not block.startswith(("|", "```")) and section not in ("What is left", "Security"):
            found.append(f"{section}: " + " ".join(block.replace("*", "").replace("`", "").split()))
    return found


def test_every_promise_has_its_tests_and_every_test_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [re.findall("[^|]+", line) for line in
            text.partition("## Every promise and its test")[2].partition("\n## ")[0].splitlines()
            if re.match(r"\| (?!promise)", line)]
    names = {row[0].strip(): re.findall("`(.*?)`", row[1]) for row in rows}
    there = {f"{path.stem[5:]}::{node.name[5:]}" for path in TESTS.glob("test_*.py")
             for node in tree(path).body if isinstance(node, ast.FunctionDef)}
    assert [name for tests in names.values() for name in tests if name not in there] == []
    assert [name for name, tests in names.items() if not tests] == [] and len(names) == len(rows)
    held = {one: [name for name in names if one.startswith(name)] for one in promises()}
    assert len(held) > 60 and [one for one, by in held.items() if not by] == []
    assert set(names) == {name for by in held.values() for name in by}, "a row of a promise that is gone"


@pytest.mark.slow
@pytest.mark.parametrize("tool", sorted(path.name for path in (TESTS / "tools").glob("[a-z]*.py")))
def test_a_tool_can_be_typed_as_the_docs_have_it(tool: str, tmp_path: Path) -> None:
    """In any directory, with nothing but Python; of itself it finds the helpers, and povfarm."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='imported')"
    subprocess.run([sys.executable, "-I", "-c", code, str(TESTS / "tools" / tool)], cwd=tmp_path, check=True)
