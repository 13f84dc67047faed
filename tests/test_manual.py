"""The manual, the help and the program say the same of commands and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest

import povfarm
from helpers.base import ROOT

MANUAL = (ROOT / "docs" / "manual.md").read_text(encoding="utf-8")
PAPERS = {path.name: path.read_text(encoding="utf-8")
          for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = povfarm._commands()


def test_the_words_for_several_commands_mean_those_of_the_program() -> None:
    told = re.search(r"In the table, \*talk\* stands for (.*?)\. \*job\* stands for (.*?)\.\n",
                     MANUAL, re.DOTALL)
    assert told
    for group, text in zip(("talk", "job"), told.groups()):
        assert set(re.findall(r"`(\w+)`", text)) == {
            name for name, (tag, _) in COMMANDS.items() if group in tag.groups}, group


def test_the_help_of_a_command_shows_its_options_and_no_others() -> None:
    for name, (tag, _) in COMMANDS.items():
        shown = povfarm._command_help(tag)
        assert max(map(len, shown.splitlines()[2:])) <= 80
        own, rows = {name, *tag.groups} - {"talk"}, tag.settings()
        assert re.findall(r"^  --([a-z-]+)", shown, re.MULTILINE) == [
            row.name for first in (True, False) for row in rows
            if bool(own & set(row.commands.split())) is first]
        words = " ".join(shown.split())
        assert all(" ".join(row.help.split()) in words for row in tag.settings())


def test_every_command_is_in_the_manual() -> None:
    assert {name for name in COMMANDS if f"povfarm.py {name}" not in MANUAL} == set()


def typed() -> List[Any]:
    """Every command line in the papers, with what it is given."""
    found = []
    for paper, text in PAPERS.items():
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"povfarm\.py ([a-z]+)\b([^|>)&]*)", line.partition(" #")[0])
                if match:
                    found.append(pytest.param(match[1], match[2], id=f"{paper}: {line}"))
    return found


@pytest.mark.parametrize(("name", "rest"), typed())
def test_what_the_papers_type_is_understood(name: str, rest: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POVFARM_DATA", str(tmp_path))
    assert name in COMMANDS
    words = [word.replace("JOB", "1") for word in shlex.split(rest)]
    povfarm._parse(COMMANDS[name][0], [word for word in words if word != "4f2a..."]
                   + ["1"] * (words[-1:] == ["4f2a..."]))


def test_the_table_of_json_has_every_command_that_prints_it() -> None:
    table = MANUAL.partition("| command | what it prints |")[2].partition("\n\n")[0]
    told: Set[str] = {name.split()[0] for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
                      for name in re.findall("`(.*?)`", cell)}
    rows: Dict[str, List[str]] = {name: [row.name for row in tag.settings()]
                                  for name, (tag, _) in COMMANDS.items()}
    assert told == {name for name, options in rows.items() if "json" in options}
