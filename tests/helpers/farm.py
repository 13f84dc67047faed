"""Whole farms: real processes, real POV-Ray and real sockets."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

import pytest

import povfarm
from helpers.base import POVFARM, run_povray, wait_until
from helpers.invariants import broken
from helpers.pictures import pixels

SMALL = ["+W40", "+H30"]


STILL = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 1, -5> look_at 0 }
light_source { <5, 5, -5>, 1 }
sphere { <clock, 0, 0>, 1 pigment { rgb <1, clock, 0.5> } }
"""


# Tells nothing until it is done, and has many reflections. Who must find it half done stops it:
# a fast computer would be ready before anybody looks, a slow one after everybody's patience.
HEAVY = STILL + """
#declare N = 0;
#while (N < 40)
  sphere { <mod(N, 7) - 3, mod(N, 5) - 2, N / 10>, 0.45
    pigment { rgbt <1, 1, 1, 0.3> } finish { reflection 0.6 } interior { ior 1.4 } }
  #declare N = N + 1;
#end
"""


def renderers(place: Path) -> List[str]:
    """Return the POV-Ray processes that work below a directory."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (process / "comm").read_text().strip() == "povray":
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                cwd = Path(os.readlink(process / "cwd"))
                if state != "Z" and place in cwd.parents and "/run-" in str(cwd):
                    found.append(process.name)
    return found


def stop_renderer(place: Path) -> str:
    """Stop the first POV-Ray that works below a directory where it is; return its number."""
    held: str = wait_until(lambda: renderers(place), "nothing is rendered")[0]
    os.kill(int(held), signal.SIGSTOP)
    return held


def submit_and_stop(farm: "Farm", place: Path, *args: str) -> Tuple[int, str]:
    """Queue a job whose first renderer is stopped as soon as it runs; return both numbers."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop_renderer, farm.tmp_path)  # a fast computer is done before long
        return farm.submit(place, *args), stopped.result()


def longer_than_a_frame(place: Path) -> str:
    """Return a time limit that no small frame reaches here: six times what one just took."""
    began = time.monotonic()
    assert run_povray(["scene.pov", *SMALL, "-F"], place).returncode == 0
    return f"{6 * (time.monotonic() - began):.1f}s"


def environment(tmp_path: Path) -> Dict[str, str]:
    """The environment of a user whose home and temporary files are the test's own."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    # In a thread, while pytest changes its own variable.
    inherited = {key: os.environ.get(key, "") for key in list(os.environ)}
    return {**inherited, "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"),
            "POVFARM_DATA": str(tmp_path / "farm")}


def run(tmp_path: Path, *args: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a povfarm command to its end."""
    return subprocess.run([*POVFARM, *args], cwd=cwd, env=environment(tmp_path), text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False)


class Farm:
    """A coordinator and workers as processes; all are ended at the end."""

    def __init__(self, tmp_path: Path, lease_time: str = "20s") -> None:
        self.tmp_path = tmp_path
        self.lease_time = lease_time
        self.processes: List["subprocess.Popen[str]"] = []
        self.port = "0"
        self.program = POVFARM  # that the next process runs
        self.coordinator = self.serve()

    def start(self, *args: str) -> "subprocess.Popen[str]":
        """Start a povfarm command."""
        process = subprocess.Popen(
            [*self.program, *args], cwd=self.tmp_path, env=environment(self.tmp_path), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def serve(self) -> "subprocess.Popen[str]":
        """Start the coordinator, at the same port as before."""
        process = self.start("serve", "--bind", "127.0.0.1", "--port", self.port,
                             "--no-discovery", "--lease-time", self.lease_time)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "is at http" in first, first + process.stdout.read()
        note = json.loads((self.tmp_path / "farm" / "coordinator.json").read_text())
        self.port = note["url"].rpartition(":")[2]
        self.client = povfarm.Client(
            note["url"], (self.tmp_path / "farm" / "farm.key").read_text(), retry_for=20)
        return process

    def work(self, *args: str) -> "subprocess.Popen[str]":
        """Start a worker."""
        return self.start("work", *args)

    def submit(self, cwd: Path, *args: str) -> int:
        """Queue a job and return its number."""
        result = run(self.tmp_path, "submit", *args, cwd=cwd)
        assert result.returncode == 0, result.stderr
        return int(result.stdout.split()[0])

    def job(self, job: int) -> Dict[str, Any]:
        """Return a job as the API shows it."""
        view: Dict[str, Any] = self.client.request("GET", f"/api/v1/jobs/{job}").json()
        return view

    def finished(self, job: int, seconds: float = 60) -> Dict[str, Any]:
        """Wait for the end of a job."""
        def ended() -> Any:
            view = self.job(job)
            return view["state"] in ("done", "failed") and view
        view: Dict[str, Any] = wait_until(ended, f"job {job} does not end", seconds)
        return view

    def check(self) -> None:
        """Stop everything and look for damage in the data that is left."""
        self.close()
        store = povfarm.Store(self.tmp_path / "farm")
        try:
            assert broken(povfarm.Scheduler(store, povfarm.Clock())) == []
        finally:
            store.close()

    def close(self) -> None:
        """End every process."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture(name="farm")
def farm_fixture(request: pytest.FixtureRequest, tmp_path: Path, povray: str) -> Iterator[Farm]:
    """A coordinator without workers; its parameter is how long a worker may be silent."""
    farm = Farm(tmp_path, getattr(request, "param", "20s"))
    try:
        yield farm
    finally:
        farm.close()


def project(tmp_path: Path, text: str = STILL, name: str = "scene") -> Path:
    """Make a project of one scene."""
    place = tmp_path / "project"
    place.mkdir(exist_ok=True)
    (place / f"{name}.pov").write_text(text)
    return place


def pictures(place: Path) -> Dict[str, bytes]:
    """Return the pixels of every image below a directory that is not part of a project."""
    return {str(path.relative_to(place)): pixels(path) for path in place.rglob("*.png")}


def made_in(place: Path, before: Iterable[str] = ()) -> Dict[str, bytes]:
    """Return what is new below a directory: the pixels of images, all of other files."""
    found = {str(path.relative_to(place)): path for path in place.rglob("*") if path.is_file()}
    return {name: pixels(path) if name.endswith(".png") else path.read_bytes()
            for name, path in found.items() if name not in before}


Ends = Dict[str, "concurrent.futures.Future[Any]"]


@contextlib.contextmanager
def at_once(do: Callable[[str, Path], Any], names: Iterable[str], root: Path) -> Iterator[Ends]:
    """Do what many tests look at together, each in a place of its own: POV-Ray mostly sleeps.

    Nothing may be left of it, neither a POV-Ray nor a temporary file.
    """
    def in_place(name: str, place: Path) -> Any:
        place.mkdir()
        result = do(name, place)
        assert not (place / "tmp").exists() or os.listdir(place / "tmp") == []
        return result

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        yield {name: pool.submit(in_place, name, root / str(number))
               for number, name in enumerate(names)}
    wait_until(lambda: not renderers(root), "a POV-Ray was left behind")
