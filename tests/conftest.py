"""What every test may use: the module under test, the real POV-Ray, and figures for its end."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = Path("/usr/share/doc/povray/examples")

sys.path.insert(0, str(ROOT))

REQUIRED = set(filter(None, os.environ.get("POVFARM_TEST_REQUIRE", "").split(",")))


TRIED: Dict[str, Dict[str, int]] = {}


def tried(what: str, number: int = 1, **wrong: int) -> None:
    """Add to the figures that are printed when the tests have run: ``let_in=0`` and the like."""
    figures = TRIED.setdefault(what, {"tried": 0})
    for name, more in {"tried": number, **wrong}.items():
        figures[name] = figures.get(name, 0) + more


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was tried against the farm, and how much of it came to something."""
    for what, figures in TRIED.items():
        terminalreporter.write_line(f"{what}: " + ", ".join(
            f"{number:,} {name.replace('_', ' ')}" for name, number in figures.items()))


def need(name: str, present: bool, why: str) -> None:
    """Skip the test when something is missing here, or fail where it must be there."""
    if present:
        return
    if name in REQUIRED:
        pytest.fail(f"{name} is required here: {why}")
    pytest.skip(why)


@pytest.fixture(scope="session")
def povray() -> str:
    """The path of the real POV-Ray."""
    path = shutil.which("povray")
    need("povray", path is not None, "POV-Ray is not installed: apt-get install povray")
    assert path is not None
    return path


@pytest.fixture(scope="session")
def examples() -> Path:
    """The directory of POV-Ray's own example scenes."""
    need("examples", EXAMPLES.is_dir(), "apt-get install povray-examples")
    return EXAMPLES


def run_povray(args: List[str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run plain POV-Ray as a person would, without a display window."""
    return subprocess.run(
        ["povray", *args, "-D"], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, errors="replace", timeout=600, check=False,
    )


class SlowLink:
    """A socket through which little goes at a time, and that only after most of the timeout.

    No time passes for that.
    """

    def __init__(self) -> None:
        self.arrived = b""
        self.timeout = 0.0

    def settimeout(self, seconds: float) -> None:
        """Set the timeout, as of a socket."""
        self.timeout = seconds

    def send(self, data: Any) -> int:
        """Take at most 1000 bytes, as a socket may."""
        self.arrived += bytes(data[:1000])
        return min(len(data), 1000)

    def sendall(self, data: Any) -> None:
        """Send in no more time than the timeout for all of it, as Python's sockets do."""
        self.send(data)
        if len(data) > 1000:
            raise socket.timeout("timed out")


def pixels_of(path: Path) -> Tuple[int, bytes]:
    """The width of a PPM picture, and its pixels: three bytes or three pairs of bytes each."""
    data = path.read_bytes()
    header = re.match(rb"P6\s+(?:#.*\n)*(\d+)\s+\d+\s+\d+\s", data)
    assert header, data[:50]
    return int(header[1]), data[header.end() :]
