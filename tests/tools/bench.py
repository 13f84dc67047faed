"""Times povfarm beside bare POV-Ray and GNU parallel, in one run on this machine.

    python tests/tools/bench.py [--rounds N] [NAME ...]
    python tests/tools/bench.py --slices [PROFILE ...]
    python tests/tools/bench.py --moving

Prints a Markdown table: wall seconds of each (the median of the rounds, the start of
everything included), how many times as fast as bare POV-Ray `render` is, and the limit that
the processor sets (CPU-seconds of the bare run / cores). Every image is compared, too.
Needs povray and povray-examples; GNU parallel is used when it is installed.

With --slices, one picture on eight workers whose renderer sleeps for a given time a row: the
ideal time (all the work / the speed of all workers) over that from the submit to the picture.

With --moving, benchmark.pov is rendered by one worker, and then by two, of which the first is
stopped at a third: the CPU-seconds of all workers, programs of theirs included.

Ends with 1 for a figure that cannot be, such as less time than the processor's limit, for a
promise that is not kept, and for a wrong picture.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

from helpers.base import EXAMPLES, POVFARM
from helpers.standin import make_standin


@dataclass(frozen=True)
class Case:
    """One command line; ``least`` is the ratio to bare POV-Ray that the project promises.

    Where bare POV-Ray itself makes other pixels from run to run, nothing is ``exact``.
    """

    name: str
    directory: str
    arguments: Tuple[str, ...]
    frames: int
    least: float
    exact: bool = True


CASES = (
    Case("c_colors", "portfolio", ("c_colors.ini",), 130, 6.0),
    Case("camera2", "animations/camera2", ("camera2.ini", "+W320", "+H240"), 30, 1.9),
    Case("vect1", "animations/vect1", ("vect1.ini", "+W320", "+H240"), 60, 1.0),
    Case("splinefollow", "animations/splinefollow", ("splinefollow.ini", "+W320", "+H240"),
         20, 1.0),
    Case("float1", "animations/float1", ("float1.ini", "+W640", "+H480"), 51, 1.4),
    Case("benchmark", "advanced/benchmark", ("benchmark.pov", "+W120", "+H90", "+A0.3"), 1, 0.95,
         exact=False),
)


def timed(command: List[str], case: Case) -> Tuple[float, float, Dict[str, int]]:
    """Run a command in a fresh copy of the project: wall and CPU seconds, and the images."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(EXAMPLES / case.directory, place, dirs_exist_ok=True)
        before = {path.name for path in Path(place).iterdir()}
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = -usage.ru_utime - usage.ru_stime
        start = time.monotonic()
        subprocess.run(command, cwd=place, check=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = time.monotonic() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        images = {path.name: pixels(path) for path in Path(place).glob("*.png")
                  if path.name not in before}
        return wall, cpu + usage.ru_utime + usage.ru_stime, images


def pixels(path: Path) -> int:
    """Return a checksum of a PNG without the chunks that tell when it was written."""
    data, at, sum_ = path.read_bytes(), 8, 0
    while at < len(data):
        size = int.from_bytes(data[at:at + 4], "big")
        if data[at + 4:at + 8] not in (b"tIME", b"tEXt"):
            sum_ = zlib.crc32(data[at:at + 12 + size], sum_)
        at += 12 + size
    return sum_


def table(rows: Iterable[Tuple[str, Sequence[str]]]) -> bool:
    """Print rows as they come, and what is wrong with each; tell whether that is nothing."""
    good = True
    for row, wrong in rows:
        print(row, flush=True)
        for text in wrong:
            good = False
            print(f"wrong: {text}", file=sys.stderr, flush=True)
    return good


def wrong(**rules: bool) -> List[str]:
    """Return the names of the rules that are broken, as a person reads them."""
    return [name.replace("_", " ") for name, broken in rules.items() if broken]


def measure(case: Case, rounds: int) -> Tuple[str, List[str]]:
    """Return the table's row for a case; each round runs every contestant once."""
    cores = len(os.sched_getaffinity(0))
    contestants = {
        "bare": ["povray", *case.arguments, "-D"],
        "render": [*POVFARM, "render", *case.arguments],
    }
    if shutil.which("parallel") and case.frames > 1:
        contestants["parallel"] = [
            "parallel", f"-j{2 * cores}", "povray", *case.arguments, "-D", "+WT1", "+SF{}", "+EF{}",
            ":::", *map(str, range(1, case.frames + 1))]
    walls: Dict[str, List[float]] = {name: [] for name in contestants}
    cpus, same, cannot_be = [], "same" if case.exact else "not exact", False
    for _ in range(rounds):
        images = {}
        for name, command in contestants.items():
            wall, cpu, images[name] = timed(command, case)
            walls[name].append(wall)
            if name == "bare":
                cpus.append(cpu)
                cannot_be |= not 0 < cpu < 1.1 * wall * cores
        right = images["render"] == images["bare"] or not case.exact
        if not right or len(images["render"]) != case.frames:
            same = "DIFFERENT"
    median = {name: statistics.median(values) for name, values in walls.items()}
    beside = f"{median['parallel']:.1f}" if "parallel" in median else "-"
    ratio = median["bare"] / median["render"]
    verdict = "" if ratio >= case.least else f" (promised: {case.least})"
    limit = statistics.median(cpus) / cores
    row = (f"| {case.name}, {case.frames} x {' '.join(case.arguments[1:]) or 'own size'} "
           f"| {median['bare']:.1f} | {beside} | {median['render']:.1f} "
           f"| {limit:.1f} | {ratio:.2f}{verdict} | {same} |")
    return row, wrong(
        povray_had_no_CPU_seconds_or_more_than_the_cores_have=cannot_be,
        render_was_faster_than_the_processor=median["render"] < 0.8 * limit,
        render_is_slower_than_promised=ratio < case.least, pictures_differ=same == "DIFFERENT")


# --- slices

HEIGHT = 2160
PROFILES: Dict[str, List[float]] = {
    "flat": [1.0] * HEIGHT,
    "top-heavy": [4.0 if row < HEIGHT / 4 else 0.5 for row in range(HEIGHT)],
    "spiky": [6.0 if row % 540 in range(200, 264) else 1.0 for row in range(HEIGHT)],
}
TEAMS: Dict[str, Tuple[List[float], float]] = {
    "8 equal": ([1.0] * 8, 0.90), "8 of 1:2:4": ([1.0, 1, 1, 2, 2, 2, 4, 4], 0.85)}
IDEAL = 60.0  # seconds that a picture takes a team at best
PARSE = 0.3  # seconds before the first row, at speed 1


class Farm:
    """A coordinator and its workers, as processes, with data below ``place``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._environ = {**os.environ, "POVFARM_DATA": str(place / "farm")}
        self.started = [self._start("serve", "--port", "0", "--bind", "127.0.0.1",
                                     "--no-discovery")]
        note = place / "farm" / "coordinator.json"
        while not note.exists():
            time.sleep(0.02)
        key = (place / "farm" / "farm.key").read_text()
        self.talk = ["--server", json.loads(note.read_text())["url"], "--key", key]

    def work(self, name: str, *more: str) -> "subprocess.Popen[bytes]":
        """Start a worker of one core and wait until it is idle."""
        process = self._start("work", *self.talk, "--cores", "1", "--worker-name", name, "--data",
                              str(self.place / name), *more)
        self.started.append(process)
        while True:
            if [view["state"] for view in json.loads(self.ask("workers", "--json"))
                    if view["name"] == name] == ["idle"]:
                return process

    def ask(self, *args: str, cwd: Optional[Path] = None) -> str:
        """Run a command to its end and return what it printed."""
        return subprocess.run(
            [*POVFARM, args[0], *self.talk, *args[1:]], check=True, cwd=cwd,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=self._environ).stdout

    def close(self) -> None:
        """End all that runs."""
        for process in reversed(self.started):
            process.terminate()
            process.wait()

    def _start(self, *args: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*POVFARM, *args], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environ)


def efficiency(profile: str, speeds: Sequence[float]) -> float:
    """Return the ideal time over the one that a team takes for a picture."""
    weight = IDEAL * sum(speeds) / sum(PROFILES[profile])
    rows = [cost * weight for cost in PROFILES[profile]]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "scene").mkdir()
        (place / "scene" / "scene.pov").write_text("sphere { 0, 1 }")
        with contextlib.closing(Farm(place)) as farm:
            for number, speed in enumerate(speeds):
                program = make_standin(place / f"speed{number}", rows, speed, PARSE)
                farm.work(f"w{number}", "--unconfined", "--povray", str(program))
            start = time.monotonic()
            farm.ask("submit", "--wait", "scene.pov", "+W4", f"+H{HEIGHT}", cwd=place / "scene")
            return IDEAL / (time.monotonic() - start)


def slices(names: Sequence[str]) -> Iterator[Tuple[str, List[str]]]:
    """Yield the rows of --slices."""
    for profile in PROFILES:
        for name, (speeds, least) in TEAMS.items() if not names or profile in names else ():
            part = efficiency(profile, speeds)
            yield f"| {profile} | {name} | {part:.2f} | {least} |", wrong(
                better_than_ideal=part > 1, less_than_promised=part < least)


# --- a render that moves house

def moving(size: Sequence[str] = ("+W240", "+H180", "+A0.3")) -> Iterator[Tuple[str, List[str]]]:
    """Yield the CPU-seconds of a render that is stopped at a third and goes on elsewhere."""
    adopt_orphans()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory, "scene")
        shutil.copytree(EXAMPLES / "advanced/benchmark", place)
        plain = subprocess.Popen(
            ["povray", "benchmark.pov", *size, "-D", "+WT1", "+Oplain.png"], cwd=place,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        undisturbed = ended(plain, ())
        yield f"| plain POV-Ray | {undisturbed:.1f} | 1 |", wrong(no_time=undisturbed < 0.1)
        with contextlib.closing(Farm(Path(directory))) as farm:
            first = farm.work("anna")
            job = farm.ask("submit", "benchmark.pov", *size, "--slices", "off", cwd=place).strip()
            until(farm, job, lambda view: view["progress"] > 0)
            second = farm.work("bert")  # it gets nothing as yet: the only frame is anna's
            until(farm, job, lambda view: view["progress"] >= 1 / 3)
            for number in (signal.SIGTERM, signal.SIGINT):  # at the second it finishes nothing
                first.send_signal(number)
            spent = ended(first, farm.started)
            until(farm, job, lambda view: view["state"] == "done")
            farm.ask("fetch", job, "--output", str(place))
            second.terminate()
            rest = ended(second, farm.started)
        same = pixels(place / "benchmark.png") == pixels(place / "plain.png")
    both = (spent + rest) / undisturbed
    yield f"| stopped after {spent:.1f}, then elsewhere | {spent + rest:.1f} | {both:.2f} |", wrong(
        nothing_moved=min(spent, rest) < 0.1 * undisturbed,
        less_than_the_whole_picture_takes=both < 0.9, much_is_rendered_twice=both > 1.25)
    yield f"| the picture | {'same' if same else 'not exact'} | |", ()


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def until(farm: Farm, job: str, reached: Callable[[Dict[str, Any]], bool]) -> None:
    """Ask for a job's view until it is as it should be."""
    while not reached(json.loads(farm.ask("status", job, "--json"))):
        time.sleep(0.2)


def ended(process: "subprocess.Popen[bytes]", others: Sequence["subprocess.Popen[bytes]"]) -> float:
    """Wait for a process; return the CPU-seconds of it and of all that it started.

    A launcher that its worker did not wait for is ours when the worker has ended, as are
    the launcher's renderers after it.
    """
    known, waiting, spent = {other.pid for other in others}, {process.pid}, 0.0
    while waiting:
        for number in waiting:
            usage = os.wait4(number, 0)[2]
            spent += usage.ru_utime + usage.ru_stime
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        known |= waiting
        waiting = {int(number) for number in listed} - known
    return spent


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("names", nargs="*", help="cases; default: all")
    parser.add_argument("--slices", action="store_true", help="one picture on eight workers")
    parser.add_argument("--moving", action="store_true", help="a render that is stopped")
    options = parser.parse_args()
    if options.slices:
        rows = slices(options.names)
        print("| cost by rows | workers | of the ideal | promised |\n|---|---|---|---|")
    elif options.moving:
        rows = moving()
        print("| benchmark.pov | CPU-seconds | of those of plain POV-Ray |\n|---|---|---|")
    else:
        rows = (measure(case, options.rounds) for case in CASES
                if not options.names or case.name in options.names)
        print("| animation | povray | parallel | povfarm render | CPU limit | times as fast "
              "| images |\n|---|---|---|---|---|---|---|")
    sys.exit(0 if table(rows) else 1)


if __name__ == "__main__":
    main()
