"""What every test may use, how the tests are shared out, and the figures for their end."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List, Optional, Tuple

import pytest

from helpers.base import EXAMPLES, TRIED, need, tried, wait_until
from helpers.farm import renderers

# POV-Ray sleeps nine tenths of a small render, so of what renders more run at once than there are cores.
WORKERS_MORE_THAN_CORES = 6
SLOW = re.compile(r"(/usr/bin/)?povray|.*/((povfarm|started)\.py|chromium|chromium-browser|ffmpeg)")
RENDERERS = {"povray", "examples"}
UNDER_WAY: List[pytest.Item] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the one option of ours."""
    parser.addoption("--long", action="store_true", help="some tests are wider, and take longer")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many run at once with ``-n auto``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) + WORKERS_MORE_THAN_CORES


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With ``-n``, give out one test after the other: some take a thousand times as long as most.

    When a process crashes the run ends there: pytest-xdist would wait for ever for its tests.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """What renders is slow; with ``-n``, the small ones come last and fill the gaps."""
    for item in items:
        names = getattr(item, "fixturenames", ())
        if RENDERERS.intersection(names):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _compile(module: str) -> None:
    importlib.import_module(module)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Compile what has changed once: each process would, and takes half a minute for all."""
    here = Path(__file__).parent
    changed = [path.stem for path in here.glob("test_*.py") if not config.option.file_or_dir and not any(
        kept.stat().st_mtime >= path.stat().st_mtime
        for kept in here.glob(f"__pycache__/{path.stem}.*-pytest-*.pyc"))]
    if changed and "fork" in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context("fork").Pool() as pool:  # it has pytest's import hook
            pool.map(_compile, changed, chunksize=1)


def _group(item: pytest.Item) -> str:
    """Name the tests that one process does: each would do again what they look at together."""
    if item.path.stem in ("test_house", "test_layout", "test_limits"):  # they read whole programs
        return "@source"
    found = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    return next((f"@{item.path.stem}-{name}" for name, (*_, fixture) in found.items()
                 if fixture.scope == "module" and RENDERERS.intersection(fixture.argnames)), "")


@pytest.hookimpl(hookwrapper=True)
def pytest_collection_finish(session: pytest.Session) -> Iterator[None]:
    """Name each test with its group for pytest-xdist, whose marks do not reach it from every pytest.

    What was collected stays: to look through it for garbage takes longer than most tests do.
    """
    gc.freeze()
    items = session.items
    if hasattr(session.config, "workerinput"):
        session.items = [SimpleNamespace(nodeid=item.nodeid + _group(item)) for item in items]
    yield
    session.items = items


def pytest_make_parametrize_id(val: object) -> Optional[str]:
    """Name long data by its size: what is in it, such as a time, may differ in each process."""
    return f"{len(val)} bytes" if isinstance(val, bytes) and len(val) > 40 else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Know whether the test that runs may start a program that is slow to start."""
    UNDER_WAY[:] = [item]
    yield
    UNDER_WAY.clear()


PROCESS = os.getpid()


def _refuse_slow_programs(event: str, args: Tuple[Any, ...]) -> None:
    # A launcher that was forked meanwhile goes on with what was under way then.
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn") and UNDER_WAY and (
            os.getpid() == PROCESS):
        words = [os.fsdecode(word) for word in args[1]]
        if not UNDER_WAY[0].get_closest_marker("slow") and any(SLOW.fullmatch(word) for word in words):
            raise AssertionError(f"only tests that are marked as slow start {words[:4]}")


sys.addaudithook(_refuse_slow_programs)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give the figures of a process of ``-n`` to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = TRIED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the figures of a process of ``-n``."""
    for what, figures in getattr(node, "workeroutput", {}).get("tried", {}).items():
        tried(what, **{"number" if name == "tried" else name: n for name, n in figures.items()})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was tried against the farm, and how much of it came to something."""
    for what, figures in sorted(TRIED.items()):
        terminalreporter.write_line(f"{what}: " + ", ".join(
            f"{number:,} {name.replace('_', ' ')}" for name, number in figures.items()))


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


@pytest.fixture
def no_process_is_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, no POV-Ray that it caused may outlive it."""
    yield
    wait_until(lambda: not renderers(tmp_path), "a POV-Ray was left behind")
