"""PROCESS: renderers are started, measured and ended, and never outlive the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, Union

import pytest
from conftest import ROOT, need

from povfarm import Bounds, Launcher, WindowsLauncher, make_launcher


@pytest.fixture(params=["fork", "windows"])
def launcher(request: pytest.FixtureRequest) -> Iterator[Union[Launcher, WindowsLauncher]]:
    """Both launchers do the same; the one for Windows works everywhere."""
    launcher = make_launcher() if request.param == "fork" else WindowsLauncher()
    yield launcher
    launcher.close()


def start(launcher: Union[Launcher, WindowsLauncher], cwd: Path, code: str):  # type: ignore[no-untyped-def]
    """Start a Python program as if it were a renderer."""
    return launcher.start([sys.executable, "-S", "-c", code], cwd, {"PATH": os.defpath})


def test_output_exit_code_and_directory(launcher: Launcher, tmp_path: Path) -> None:
    process = start(launcher, tmp_path, (
        "import os, sys; print(os.getcwd()); sys.stderr.write('a\\rb\\rc'); sys.exit(3)"))
    lines = list(process.lines())
    assert process.wait().code == 3
    assert lines == ["a", "b", f"c{os.path.realpath(tmp_path)}"]


def test_a_progress_line_comes_before_it_is_ended(launcher: Launcher, tmp_path: Path) -> None:
    process = start(launcher, tmp_path, (
        "import sys, time; sys.stdout.write('half\\r'); sys.stdout.flush(); time.sleep(60)"))
    assert next(iter(process.lines())) == "half"
    process.kill()
    assert process.wait().code != 0


def test_a_line_without_end_is_parted(launcher: Launcher, tmp_path: Path) -> None:
    lines = list(start(launcher, tmp_path, "print('x' * 1_000_000, end='')").lines())
    assert "".join(lines) == "x" * 1_000_000 and max(map(len, lines)) < 200_000


def test_what_a_process_cost(tmp_path: Path) -> None:
    launcher = make_launcher()
    try:
        process = start(launcher, tmp_path, (
            "x = bytearray(80_000_000)\nimport time\nend = time.process_time() + 0.4\n"
            "while time.process_time() < end: pass"))
        list(process.lines())
        ended = process.wait()
        assert ended.code == 0 and 0.35 < ended.cpu < 2 and ended.memory > 80_000_000
    finally:
        launcher.close()


def test_a_program_that_cannot_be_started_says_so(launcher: Launcher, tmp_path: Path) -> None:
    if isinstance(launcher, WindowsLauncher):
        with pytest.raises(OSError, match="gone"):
            launcher.start(["/nowhere/gone"], tmp_path, {})
        return
    process = launcher.start(["/nowhere/gone"], tmp_path, {})
    assert "cannot start /nowhere/gone" in "".join(process.lines())
    assert process.wait().code == 127


LIMITS = """
import os, resource
print(os.nice(0), *resource.getrlimit(resource.RLIMIT_CORE), *resource.getrlimit(resource.RLIMIT_NOFILE),
      *resource.getrlimit(resource.RLIMIT_DATA), *resource.getrlimit(resource.RLIMIT_FSIZE),
      open("/proc/self/oom_score_adj").read())
"""


def test_what_a_renderer_is_held_to(tmp_path: Path) -> None:
    """It steps back, dumps no core, opens few files, and goes first when memory runs out."""
    need("linux", sys.platform == "linux", "one of them is read from /proc")
    launcher = make_launcher(nice=3)
    try:
        process = launcher.start([sys.executable, "-S", "-c", LIMITS], tmp_path, {},
                                 Bounds(None, 10**9, 10**8))
        text = "".join(process.lines())
    finally:
        launcher.close()
    assert [int(word) for word in text.split()] == [
        min(os.nice(0) + 3, 19), 0, 0, 1024, 1024, 10**9, 10**9, 10**8, 10**8, 1000]


def test_a_renderer_ends_with_its_launcher(tmp_path: Path) -> None:
    need("linux", sys.platform == "linux", "process states are read from /proc")
    launcher = make_launcher()
    process = start(launcher, tmp_path, "import time; print('here', flush=True); time.sleep(600)")
    assert next(iter(process.lines())) == "here"
    parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    os.kill(parent, signal.SIGKILL)
    end = time.monotonic() + 10
    while runs(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not runs(process.pid)
    launcher.close()


def test_many_at_a_time(tmp_path: Path) -> None:
    launcher = make_launcher()
    try:
        processes = [start(launcher, tmp_path, f"import sys; print({n}); sys.exit({n})")
                     for n in range(20)]
        for number, process in enumerate(processes):
            assert list(process.lines()) == [str(number)]
            assert process.wait().code == number
    finally:
        launcher.close()


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import povfarm, pathlib
launcher = povfarm.make_launcher()
process = launcher.start(
    [sys.executable, "-S", "-c",
     "import os, time; pid = os.fork(); print(os.getpid(), flush=True); time.sleep(600)"],
    pathlib.Path("."), {})
lines = process.lines()
print(next(lines), next(lines), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_worker_that_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    """Not the renderer, and not what the renderer has started."""
    need("linux", sys.platform == "linux", "process states are read from /proc")
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(ROOT)], cwd=tmp_path,
                              stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    pids = [int(pid) for pid in worker.stdout.readline().split()]
    assert len(set(pids)) == 2
    worker.send_signal(how)
    worker.wait()
    worker.stdout.close()
    end = time.monotonic() + 10
    while any(runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(runs(pid) for pid in pids)


def runs(pid: int) -> bool:
    """Tell whether a process is there and not a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"
