"""The page of limits says what the code does, and leaves none out."""

from __future__ import annotations

import ast
import re

import pytest

import povfarm
from helpers.base import ROOT
from helpers.source import tree

PAGE = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| [^|]+ \| ([\d,]+) ?([^|]*?) ?\| `([^`]+)` \|$", PAGE, re.MULTILINE)
UNITS = {"kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
         "TiB": 1 << 40, "minute": 60, "minutes": 60, "hours": 3600}
PLAIN = {"", "bytes", "seconds", "each", "or more"}
# Such names are limits of what others send, or of how long and how much something is kept.
LIMIT = re.compile(r"(MAX|GUARD|KEEP|LEAST|MOST)_\w+|[A-Z]\w+_(LIMIT|TIME)|KEPT_LINES")


def test_every_row_is_read() -> None:
    assert len(ROWS) == len(re.findall(r"^\| .* \| `", PAGE, re.MULTILINE)) > 50


@pytest.mark.parametrize("number, unit, where", ROWS, ids=[row[2] for row in ROWS])
def test_the_page_says_what_the_code_does(number: str, unit: str, where: str) -> None:
    if where.startswith("--"):
        value = povfarm.setting(where[2:]).default
    elif where.startswith("Limits."):
        value = getattr(povfarm.Limits(), where[len("Limits."):])
    else:
        value = getattr(povfarm, where)
    assert unit in UNITS or unit in PLAIN
    assert int(number.replace(",", "")) * UNITS.get(unit, 1) == value


def test_no_limit_is_left_out() -> None:
    names = {name.id for node in tree().body if isinstance(node, ast.Assign)
             for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    limits = {name for name in names if LIMIT.fullmatch(name)}
    own = {f"Limits.{name}" for name in povfarm.Limits.__dataclass_fields__}
    told = {where for _, _, where in ROWS}
    # What says how long a coordinator that stops takes, and what no request comes near to.
    assert (limits | own) - told == {
        "MAX_COST", "Limits.linger_seconds", "Limits.stop_seconds"}
