"""The paper for those who come from other programs: what it types and names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest

import povfarm
from helpers.base import ROOT

PAPER = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
COMMANDS = povfarm._commands()
CELLS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
         for line in PAPER.splitlines() if line.startswith("| ")]
FEATURES = [row for row in CELLS if len(row) == 4 and row[0] != "system"]


def typed() -> List[Any]:
    """Every command that stands on the right."""
    words = [code for row in CELLS if len(row) in (2, 4)
             for code in re.findall("`(.*?)`", row[1] if len(row) == 2 else row[2])]
    return sorted({code for code in words if code.split()[0] in COMMANDS})


def names_in(file: str) -> Set[str]:
    text = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
    return set(re.findall(r"^def (\w+)", text, re.MULTILINE))


def test_every_system_of_the_documents_has_its_rows() -> None:
    counted: Dict[str, int] = {}
    for system, *_ in FEATURES:
        counted[system] = counted.get(system, 0) + 1
    assert {"HTTPov", "BSAC", "SheepIt", "RenderOnline"} <= {
        name for name, number in counted.items() if number >= 8}
    assert len(typed()) > 60


@pytest.mark.parametrize("code", typed())
def test_what_stands_on_the_right_is_understood(
        code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POVFARM_DATA", str(tmp_path))
    name, *rest = shlex.split(code)
    tag = COMMANDS[name][0]
    values = povfarm._parse(tag, [*rest, *(["7"] * (not rest and not tag.takes(0)))])
    assert vars(values)
    ways = {way.split(" ")[0]: way for way in tag.arguments.strip("[]").split(" | ")}
    if len(ways) > 1 and rest and "[" not in ways.get(rest[0], "["):
        assert "..." in ways[rest[0]] or len(values.rest) == len(ways[rest[0]].split()), tag.arguments


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: f"{row[0]}: {row[1]}")
def test_every_feature_names_a_test_and_a_command(row: List[str]) -> None:
    _, _, here, test = row
    found = re.fullmatch("`(test_[a-z_]+)::(test_[a-z0-9_]+)`", test)
    assert found and found[2] in names_in(found[1]), test
    assert here.strip("`").split()[0] in COMMANDS, here
