"""Where things are, what is needed and counted, and waiting for what is to come."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

ROOT = Path(__file__).resolve().parents[2]
POVFARM = [sys.executable, str(ROOT / "tests" / "helpers" / "started.py")]
EXAMPLES = Path("/usr/share/doc/povray/examples")

REQUIRED = set(filter(None, os.environ.get("POVFARM_TEST_REQUIRE", "").split(",")))
TRIED: Dict[str, Dict[str, int]] = {}


def tried(what: str, number: int = 1, **wrong: int) -> None:
    """Add to the figures that are printed when the tests have run: ``let_in=0`` and the like."""
    figures = TRIED.setdefault(what, {"tried": 0})
    for name, more in {"tried": number, **wrong}.items():
        figures[name] = figures.get(name, 0) + more


def need(name: str, present: bool, why: str) -> None:
    """Skip the test when something is missing here, or fail where it must be there."""
    if present:
        return
    if name in REQUIRED:
        pytest.fail(f"{name} is required here: {why}")
    pytest.skip(why)


def run_povray(args: List[str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run plain POV-Ray as a person would, without a display window.

    It gives up when its threads do not start in time, as on a very busy computer: then again.
    """
    for _ in range(10):
        done = subprocess.run(
            ["povray", *args, "-D"], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=600, check=False,
        )
        if "waiting for worker thread startup" not in done.stderr:
            break
    return done


def wait_until(true: Callable[[], Any], why: str = "it does not come about",
               seconds: float = 60) -> Any:
    """Wait for something to become true; it is looked for often, and long enough."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = true()
        if result:
            return result
        time.sleep(0.005)
    raise AssertionError(why)
