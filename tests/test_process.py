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

import povfarm
from helpers.base import POVFARM, ROOT, need, wait_until
from povfarm import (
    Bounds,
    Engine,
    Launcher,
    UserError,
    WindowsEngine,
    WindowsLauncher,
    locate_engine,
    make_launcher,
    probed,
)


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
    assert lines == ["a\r", "b\r", f"c{os.path.realpath(tmp_path)}"]


def test_a_progress_line_comes_before_it_is_ended(launcher: Launcher, tmp_path: Path) -> None:
    process = start(launcher, tmp_path, (
        "import sys, time; sys.stdout.write('half\\r'); sys.stdout.flush(); time.sleep(60)"))
    assert next(iter(process.lines())) == "half\r"
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


@pytest.mark.parametrize("by_the_kernel", [True, False])
def test_a_renderer_ends_with_its_launcher(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_the_kernel: bool) -> None:
    """Also on systems that do not see to it by themselves."""
    need("linux", sys.platform == "linux", "process states are read from /proc")
    if not by_the_kernel:
        monkeypatch.setattr(povfarm._Kernel, "end_with", lambda *_: None)
    launcher = make_launcher()
    process = start(launcher, tmp_path, "import time; print('here', flush=True); time.sleep(600)")
    assert next(iter(process.lines())) == "here"
    parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    os.kill(parent, signal.SIGKILL)
    wait_for_the_end(process.pid)
    assert process.wait().code == -signal.SIGKILL and launcher.gone
    launcher.close()


def test_a_renderer_does_not_start_when_its_launcher_is_gone_already(tmp_path: Path) -> None:
    """The kernel tells only those of its end that have asked for it before."""
    need("linux", sys.platform == "linux", "it is Linux that is asked")
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import povfarm\n"
            "povfarm._Kernel().end_with(os.getppid() + int(sys.argv[2])); print('went on')")
    for other, went_on in ((0, "went on\n"), (1, "")):
        result = subprocess.run([sys.executable, "-c", code, str(ROOT), str(other)],
                                stdout=subprocess.PIPE, text=True, check=False)
        assert result.stdout == went_on


def test_what_has_ended_can_be_killed_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS refuses that while nobody has waited for it; the launcher must go on."""
    need("fork", hasattr(os, "fork"), "there is no launcher without it")

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refuse)
    launcher = make_launcher()
    try:
        first = start(launcher, tmp_path, "input()")
        first.kill()
        assert list(start(launcher, tmp_path, "print('on')").lines()) == ["on"]
        assert not launcher.gone
    finally:
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
    wait_for_the_end(*pids)


# --- the version of POV-Ray

def test_povray_tells_its_version(launcher: Launcher, povray: str) -> None:
    assert probed(locate_engine(""), launcher).version.startswith("3.")


def test_povray_for_windows_is_not_asked(launcher: Launcher) -> None:
    engine = WindowsEngine("/nowhere/pvengine.exe", "3.7", ())
    assert probed(engine, launcher) is engine


def program(tmp_path: Path, code: str) -> Engine:
    """Return what is called POV-Ray and is a shell script."""
    fake = tmp_path / "povray"
    fake.write_text(f"#!/bin/sh\n{code}\n")
    fake.chmod(0o700)
    return Engine(str(fake), "", ())


def test_a_program_that_is_not_povray_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not POV-Ray .* says 'hello'"):
        probed(program(tmp_path, "echo hello >&2; exit 3"), launcher)


def test_a_program_that_says_nothing_for_long_is_ended(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it has started, which holds its output open."""
    monkeypatch.setattr(povfarm, "_PROBE_SECONDS", 0.1)
    launcher = make_launcher()
    try:
        with pytest.raises(UserError, match="try it by hand"):
            probed(program(tmp_path, "sleep 600; echo POV-Ray 3.7"), launcher)
    finally:
        launcher.close()


@pytest.mark.slow
def test_what_is_asked_for_its_version_does_not_outlive_a_worker_that_is_killed(
        tmp_path: Path) -> None:
    need("linux", sys.platform == "linux", "process states are read from /proc")
    fake = program(tmp_path, 'echo $$ > part; mv part "$HOME/pid"; exec sleep 600')
    worker = subprocess.Popen(
        [*POVFARM, "work", "--server", "http://127.0.0.1:9",
         "--povray", fake.program, "--data", str(tmp_path / "data")],
        cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)})
    while not (tmp_path / "pid").exists():
        assert worker.poll() is None
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    assert runs(pid)
    worker.kill()
    worker.wait()
    wait_for_the_end(pid)


def wait_for_the_end(*pids: int) -> None:
    """Wait until none of the processes is there."""
    wait_until(lambda: not any(map(runs, pids)), "a process is left over")


def runs(pid: int) -> bool:
    """Tell whether a process is there and not a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"
