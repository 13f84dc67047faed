"""Kills povfarm at every point at which it writes, and looks whether anything was lost.

    python tests/tools/crash.py [--all] [--count N] [--seed S] [start|serve|work ...]

A first run is only watched by `strace`: which system calls change a file or send an answer, and
how many of each a thread makes. Then it is run again for each of them, and killed as it comes to
that call. What the kill left on the disk is looked at; the process is started again, as an init
system would; and the farm has to go on by itself:

  start   the coordinator, from its start in a new directory
  serve   the coordinator, while it serves two jobs (one of them in slices) from submit to delete
  work    a worker, with real POV-Ray, while it renders a job

A fourth look is at the order of the calls: in a power cut, a file's contents outlive nothing that
was not flushed, nor does its name. At the end every image is what plain POV-Ray makes, no accepted image was asked for again, the
data is without contradictions, and nothing half-written is left. Without --all, some of the
points. Needs povray and strace.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

import povfarm
from helpers.base import POVFARM, wait_until
from helpers.invariants import broken
from helpers.pictures import crop_rows
from helpers.sockets import free_port
from helpers.trust import join_at
from povfarm import Client, RequestRefused

CALLS = ("write,pwrite64,writev,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,"
         "fsync,fdatasync,ftruncate,link,linkat,symlink,symlinkat,utimensat,sendto,sendmsg")
# A call and which of them in its thread (strace counts by both): "rename:3". Empty for none.
Point = str
SCENE = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 1, -5> look_at 0 }
light_source { <5, 5, -5>, 1 }
sphere { <clock, 0, 0>, 1 pigment { checker rgb <1, clock, 0.5> rgb 1 } }
"""
FRAMES, WIDTH, HEIGHT = 4, 32, 24
TALL = 96  # the height of the still that is rendered in slices
LEASE_TIME = 1.0


class Lost(AssertionError):
    """Something that was finished is gone, or wrong, or left over."""


def expected_images() -> Dict[str, bytes]:
    """Render both jobs with plain POV-Ray: the image of each file name."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "ball.pov").write_text(SCENE)
        for args in ([f"+KFF{FRAMES}", f"+H{HEIGHT}"], [f"+H{TALL}", "+Ostill.ppm"]):
            subprocess.run(["povray", "ball.pov", "+FP", f"+W{WIDTH}", "-D", *args], cwd=place,
                           check=True, stdin=subprocess.DEVNULL, capture_output=True)
        return {path.name: path.read_bytes() for path in Path(place).glob("*.ppm")}


def pixels(image: bytes) -> bytes:
    """Return what follows the header of a PPM, which holds the time."""
    return image.partition(b"\n255\n")[2]


class Victim:
    """A povfarm process that is killed at one point, and then started again like new.

    The kill leaves a copy of what was on the disk at that moment in ``after``.
    Without a point, the calls are written to ``log``.
    """

    def __init__(self, place: Path, log: Optional[Path], *args: str) -> None:
        self.command = [*POVFARM, *args]
        self.log = log
        self.killed = 0
        self.after = place / "after"
        self._place = place
        self._ended = threading.Event()
        self._process: Any = None
        self._tracer: Optional["subprocess.Popen[str]"] = None

    def start(self, strace: Sequence[str] = ()) -> None:
        """Start the process; from now on it is started again when it was killed."""
        self._process = self._spawn([*strace, *self.command])
        self._thread = threading.Thread(target=self._guard, daemon=True)
        self._thread.start()

    def attach(self, pid: int, point: Point) -> None:
        """Begin to watch a process that runs already."""
        self._tracer = subprocess.Popen([*self.strace(point), "-p", str(pid)], text=True,
                                        stderr=subprocess.PIPE)
        assert self._tracer.stderr is not None
        line = self._tracer.stderr.readline()
        assert "attached" in line, line

    def wait(self) -> int:
        """Wait until the process, which is not killed any more, ends by itself."""
        self._thread.join(60)
        return int(self._process.returncode)

    def stop(self) -> None:
        """End it for good."""
        self._ended.set()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._thread.join(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._tracer is not None:
            self._tracer.communicate(timeout=20)
        if "Traceback" in (self._place / "output.txt").read_text(errors="replace"):
            raise Lost("it made a mistake: " + (self._place / "output.txt").read_text()[-1000:])

    def strace(self, point: Point) -> List[str]:
        """Return the command that kills at a point, or writes the log."""
        # Not into the renderers, of which each would be killed in the same way again and again.
        command = ["strace", "-f", "--detach-on=execve", "-e", "signal=none"]
        if not point:
            log = os.devnull if self.log is None else str(self.log)
            return [*command, "-y", "-e", f"trace={CALLS}", "-o", log]
        call, _, number = point.partition(":")
        return [*command, "-o", os.devnull, "-e", f"trace={call}",
                "-e", f"inject={call}:signal=KILL:when={number}"]

    def _spawn(self, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command, cwd=self._place, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=open(self._place / "output.txt", "ab"), start_new_session=True)

    def _guard(self) -> None:
        # A worker ends by itself, with an error, when it was what starts its renderers that was killed.
        while self._process.wait() != 0:
            if self._ended.is_set():
                return
            self.killed += 1
            if self.killed > 1:
                return
            with contextlib.suppress(FileNotFoundError):
                shutil.copytree(self._place / "data", self.after)
            self._process = self._spawn(self.command)


class Script:
    """What a person and a worker do with a coordinator, in one thread on one connection.

    So one thread of the coordinator answers it all, and its calls have an order.
    """

    def __init__(self, url: str, key: str, images: Dict[str, bytes]) -> None:
        self.client = Client(url, key, retry_for=60)
        self.key = key
        self.images = images
        self.accepted: List[int] = []

    def submit(self, name: str, options: Dict[str, Any], **values: str) -> int:
        """Submit a job and send its scene."""
        data = SCENE.encode()
        sha256 = hashlib.sha256(data).hexdigest()
        job = {
            "name": name, "ticket": name, "options": options,
            "pov": {"values": {"Input_File_Name": "ball.pov", "Output_File_Type": "P",
                               "Width": str(WIDTH), **values},
                    "declares": [], "library": ["%POVRAY%"], "run_dir": ".", "uses": []},
            "manifest": {"files": [{"path": "ball.pov", "sha256": sha256, "size": len(data),
                                    "mtime": 1.0, "after_frame": None}]}}
        reply = self.client.request("POST", "/api/v1/jobs", json=job).json()
        if reply["missing"]:
            self.client.request("PUT", f"/api/v1/blobs/{sha256}", body=data)
        return int(reply["id"])

    def join(self) -> str:
        """Join as a worker and return its token."""
        info = {"name": "anna", "cores": 4, "memory": 1 << 30, "system": "Linux",
                "engines": {"povray": "3.7"}, "tags": []}
        return join_at(self.client, info)

    def render(self, token: str, jobs: Sequence[int]) -> None:
        """Deliver what plain POV-Ray has rendered until all of the jobs are done."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            self.client.token = self.key
            if all(self.job(job)["state"] == "done" for job in jobs):
                return
            self.client.token = token
            offer = {"want": 2, "slots": 2, "idle": 2, "wait": 0.2}
            for lease in self.client.request("POST", "/api/v1/lease", json=offer).json()["leases"]:
                for task in lease["tasks"]:
                    self.deliver(lease["id"], task)
        raise Lost("the jobs are not finished")

    def deliver(self, lease: str, task: Dict[str, Any]) -> None:
        """Deliver one picture or strip."""
        if task["id"] in self.accepted:
            raise Lost(f"task {task['id']} was accepted, and is asked for again")
        image = self.images[task["name"]]
        if task["kind"] == "slice":
            image = crop_rows(image, ".ppm", task["top"], task["bottom"] - task["top"])
        with contextlib.suppress(RequestRefused):  # the lease may be over
            reply = self.client.request("PUT", f"/api/v1/leases/{lease}/tasks/{task['id']}?log=3",
                                        body=b"log" + image)
            if reply.json()["accepted"]:
                self.accepted.append(task["id"])

    def job(self, job: int) -> Dict[str, Any]:
        """Return a job as the API shows it."""
        view: Dict[str, Any] = self.client.request("GET", f"/api/v1/jobs/{job}").json()
        return view

    def check(self, jobs: Sequence[int]) -> None:
        """Get every image and compare it with plain POV-Ray's."""
        self.client.token = self.key
        for job in jobs:
            path = f"/api/v1/jobs/{job}/frames"
            for frame in self.client.request("GET", path).json()["frames"]:
                image = self.client.request("GET", f"{path}/{frame['frame']}/image").body
                if pixels(image) != pixels(self.images[frame["name"]]):
                    raise Lost(f"{frame['name']} of job {job} is wrong")

    def delete(self, job: int) -> None:
        """Delete a job; that it is gone already may be because an answer was lost."""
        try:
            self.client.request("DELETE", f"/api/v1/jobs/{job}")
        except RequestRefused as error:
            if error.status != 404:
                raise


def check_data(data: Path) -> None:
    """Look for contradictions in a farm's data."""
    store = povfarm.Store(data)
    try:
        problems = broken(povfarm.Scheduler(store, povfarm.Clock()))
    finally:
        store.close()
    if problems:
        raise Lost("; ".join(problems))


def crash_coordinator(point: Point, phase: str, images: Dict[str, bytes],
                      log: Optional[Path] = None) -> int:
    """Run both jobs with a coordinator that is killed at one point; return how often it was."""
    with tempfile.TemporaryDirectory(prefix="crash-") as place:
        data, port = Path(place, "data"), free_port()
        victim = Victim(Path(place), log, "serve", "--data", str(data), "--bind", "127.0.0.1", "--port",
                        str(port), "--no-discovery", "--lease-time", f"{LEASE_TIME}s")
        try:
            victim.start(victim.strace(point) if phase == "start" else ())
            note = wait_until(lambda: _note(data), "the coordinator does not start")
            if phase == "serve":
                victim.attach(note["pid"], point)
            script = Script(f"http://127.0.0.1:{port}", (data / "farm.key").read_text(), images)
            jobs = [script.submit("film", {}, Final_Frame=str(FRAMES), Height=str(HEIGHT)),
                    script.submit("still", {"slices": "3"}, Height=str(TALL),
                                  Output_File_Name="still")]
            script.render(script.join(), jobs)
            script.check(jobs)
            check_data(data)
            script.delete(jobs[0])
        finally:
            victim.stop()
        check_data(data)
        if victim.after.exists():
            check_data(victim.after)
        povfarm.Coordinator(data, bind="127.0.0.1").stop()  # which sweeps
        check_data(data)
        left = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
        wrong = [path for path in left if not (
            path in ("farm.db", "farm.key", "farm.lock", "coordinator.json")
            or path.startswith(("blobs/", f"jobs/{jobs[1]}-still/logs/"))
            or path == f"jobs/{jobs[1]}-still/still.ppm")]
        if wrong or any(path.endswith(".part") for path in left):
            raise Lost(f"left over: {', '.join(sorted(wrong))}")
        return victim.killed


def _note(data: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        note = json.loads((data / "coordinator.json").read_text())
        socket.create_connection(("127.0.0.1", int(note["url"].rpartition(":")[2])), 1).close()
        return note
    return None


def crash_worker(point: Point, phase: str, images: Dict[str, bytes],
                 log: Optional[Path] = None) -> int:
    """Render a job with a worker that is killed at one point; return how often it was."""
    with tempfile.TemporaryDirectory(prefix="crash-") as place:
        farm = povfarm.Coordinator(Path(place, "data"), bind="127.0.0.1", durable=False,
                                   lease_time=LEASE_TIME)
        farm.start()
        victim = Victim(Path(place), log, "work", "--server", farm.url, "--key", farm.key, "--data",
                        str(Path(place, "worker")), "--cores", "2", "--until-idle")
        try:
            script = Script(farm.url, farm.key, images)
            job = script.submit("film", {}, Final_Frame=str(FRAMES), Height=str(HEIGHT))
            victim.start(victim.strace(point))
            wait_until(lambda: script.job(job)["state"] == "done", "the job is not finished")
            if victim.wait() != 0:
                raise Lost(f"the worker ended with {victim.wait()}")
            script.check([job])
            problems = broken(farm.scheduler)
            left = {path.name for path in Path(place, "worker").iterdir()} - {"cache", "workers"}
            left |= {path.name for path in Path(place, "worker").rglob("*.part")}
            if problems or left:
                raise Lost("; ".join([*problems, *left]))
            return victim.killed
        finally:
            victim.stop()
            farm.stop()


PHASES: Dict[str, Callable[..., int]] = {
    "start": crash_coordinator, "serve": crash_coordinator, "work": crash_worker}


def crash(phase: str, point: Point, images: Dict[str, bytes]) -> Tuple[int, str]:
    """Kill at one point of a phase; return how often that was and what was lost, in words."""
    try:
        return PHASES[phase](point, phase, images), ""
    except Exception as error:  # whatever it is, the other points are tried as well
        return 1, f"{phase} {point}: {type(error).__name__}: {error}"


def watch(phase: str, images: Dict[str, bytes]) -> List[str]:
    """Run a phase without a crash and return the calls that it makes."""
    with tempfile.TemporaryDirectory(prefix="crash-") as place:
        log = Path(place, "calls.txt")
        PHASES[phase]("", phase, images, log)
        return [line for line in log.read_text().splitlines() if _CALL.match(line)]


_CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += [-0-9]")


def points(calls: Sequence[str]) -> List[Point]:
    """Return every point of a phase: as many of each call as the thread with most of them makes."""
    matches = [match for match in map(_CALL.match, calls) if match]
    counts = collections.Counter((match[1], match[2]) for match in matches)
    most: Dict[str, int] = {}
    for (_, call), count in counts.items():
        most[call] = max(most.get(call, 0), count)
    return [f"{call}:{number}" for call in most for number in range(1, most[call] + 1)]


def check_order(calls: Sequence[str]) -> int:
    """Look whether all outlives a power cut; return how many files there were.

    What is renamed to its name must have been flushed, and its directory before
    the same thread writes to the database; and the database before a thread
    answers what it wrote. Whoever flushes does it for all.
    """
    unflushed: Set[str] = set()  # threads
    dirty: Set[str] = set()
    nameless: Set[Tuple[str, str]] = set()  # threads and directories
    renamed = 0
    for line in calls:
        match = _CALL.match(line)
        if match is None or ") = -1 E" in line:
            continue
        call, paths = match[2], re.findall(r'<(/[^>]*)>|"(/[^"]*)"', match[3])
        names = [opened or named for opened, named in paths]
        if call in ("write", "pwrite64") and names and (
                names[0].endswith(".part") or "/incoming/" in names[0]):
            dirty.add(names[0])
        elif call == "pwrite64" and names and names[0].endswith("farm.db-wal") and any(
                thread == match[1] for thread, _ in nameless):
            raise Lost(f"the database goes on before {nameless} outlives a power cut")
        elif call in ("pwrite64", "write") and names and names[0].endswith("farm.db-wal"):
            unflushed.add(match[1])
        elif call == "sendto" and match[1] in unflushed:
            raise Lost("what was done is answered before it outlives a power cut")
        elif call in ("fsync", "fdatasync"):
            if names[0].endswith("farm.db-wal"):
                unflushed.clear()
            dirty -= {names[0]}
            nameless = {(thread, directory) for thread, directory in nameless
                        if directory != names[0]}
        elif call in ("link", "linkat") and names[0] in dirty:
            dirty.add(names[1])
        elif call == "mkdir" and "/incoming" not in names[0]:  # which need not outlive it
            nameless.add((match[1], str(Path(names[0]).parent)))
        elif call == "rename":
            if names[0] in dirty:
                raise Lost(f"{names[1]} gets its name before its contents outlive a power cut")
            nameless.add((match[1], str(Path(names[1]).parent)))
            renamed += 1
    if not renamed:
        raise Lost("no file was named: the calls are not read rightly")
    return renamed


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every point")
    parser.add_argument("--count", type=int, default=10, help="points of each phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("phases", nargs="*", choices=[[], *PHASES], metavar="PHASE")
    options = parser.parse_args()
    images, bad = expected_images(), 0
    for phase in options.phases or PHASES:
        calls = watch(phase, images)
        chosen = points(calls)
        text = f"{phase}: {len(chosen)} points"
        if phase == "serve":
            text += f", {check_order(calls)} files flushed, then named, then recorded"
        if not options.all:
            chosen = random.Random(options.seed).sample(chosen, min(options.count, len(chosen)))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            crashes = [pool.submit(crash, phase, point, images) for point in chosen]
        results = [future.result() for future in crashes]
        lost, killed = [text for _, text in results if text], sum(killed for killed, _ in results)
        if 2 * killed < max(len(chosen), 1):  # threads of a worker differ, but not so much
            lost.append("too few of the kills came: this tells nothing")
        bad += len(lost)
        print(f"{text}; killed at {killed} of {len(chosen)} tried, "
              f"{len(lost)} lost or wrong", *lost, sep="\n  ", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
