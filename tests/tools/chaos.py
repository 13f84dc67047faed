"""A whole farm while everything goes wrong: real processes, real POV-Ray, bad networks.

    python tests/tools/chaos.py [--minutes N] [--seed S]

A coordinator and four workers render one job after the other. Meanwhile

* workers, the processes that start their renderers, renderers and the coordinator are killed or
  held still, and some renderers are never let go again;
* the disk of the coordinator and that of one worker fill up, and the coordinator's data can only
  be read;
* three workers reach the coordinator by networks that cut, delay and repeat requests, damage
  pictures and files, lose answers to what was done, and deliver pictures when their lease is over;
* the fourth is at the end of a real cable in a network namespace, which is cut and made slow;
* the clocks of one worker and of the coordinator are wrong, and jump.

Then it becomes quiet, and every job must be complete and, to the pixel, what plain POV-Ray makes;
or have failed and tell why. A job whose renderers were killed until its tries were used up is
retried. No process, no lease, no file may be left over.

The seed decides which faults are tried in which order. What needs root, a Linux with namespaces
or a package that is not here is named as not tried.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import (
    Any,
    Callable,
    Counter,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

import povfarm
from helpers.base import POVFARM, wait_until
from helpers.sockets import free_port
from tools.crash import SCENE, Lost, check_data, pixels

LEASE_TIME = 3.0
FRAME_TIMEOUT = 7  # seconds: for renderers that are held still for good
EXCUSES = "killed|Timed out waiting|took longer than"  # of a job that fails although it is good
DAY = 86400
CLOCKS = (-4000 * DAY, -400 * DAY, -7200, -1, 0, 1, 5400, 3 * DAY, 400 * DAY, 4000 * DAY)
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
# libfaketime 0.9.10 breaks the system call by which Python sleeps, also with a true monotonic clock.
HONEST_SLEEP = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds)\n"
TRY_CLOCK = """import sys, threading, time
start = time.monotonic()
threading.Event().wait(0.1)
time.sleep(0.1)
sys.exit(not 0.2 <= time.monotonic() - start < 5 or abs(time.time() - float(sys.argv[1])) < 86400)
"""
BROKEN = SCENE + "sphere {\n"
# name: scene, POV-Ray's arguments, povfarm's options
JOBS: Dict[str, Tuple[str, List[str], List[str]]] = {
    "film": (SCENE, ["+W48", "+H36", "+KFF8"], []),
    "sliced": (SCENE, ["+W80", "+H128"], ["--slices", "4"]),
    "in-order": (SCENE, ["+W48", "+H36", "+KFF3"], ["--in-order"]),
    "broken": (BROKEN, ["+W48", "+H36"], []),
    "heavy": (SCENE.replace("sphere {", "#declare N = 0; #while (N < 200000) #declare N = N + 1; "
                            "#end\nsphere {"), ["+W48", "+H36", "+KFF4", "+A0.3"], []),
}


_T = TypeVar("_T")


class Fault(NamedTuple):
    """Something that should not happen; the numbers from 0 to 1 are drawn, whatever it needs."""

    kind: str
    pause: float  # seconds after the fault before
    strength: float
    pick: float


# What must be there for it.
KINDS: Dict[str, str] = {
    "worker killed": "", "worker held": "", "coordinator killed": "", "coordinator held": "",
    "renderer killed": "", "renderer held": "", "renderer held for good": "",
    "launcher killed": "", "coordinator's disk full": "small disks", "worker's disk full": "small disks",
    "data read-only": "chattr", "link cut": "namespaces", "link slow": "namespaces",
    "worker's clock jumps": "faketime", "coordinator's clock jumps": "faketime",
}


def plan(seed: int) -> Iterator[Fault]:
    """Give the faults of a seed, without an end: every kind once, then again in another order."""
    chance = random.Random(seed)
    while True:
        for kind in chance.sample(sorted(KINDS), len(KINDS)):
            yield Fault(kind, chance.uniform(0.1, 0.9), chance.random(), chance.random())


class Network:
    """Passes connections on to the coordinator, and does to them what networks do."""

    def __init__(self, to: Tuple[str, int], seed: str) -> None:
        self.faults: Counter[str] = collections.Counter()
        self.bad = True
        self._to = to
        self._held_until = 0.0
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Pass on one request after the other, and their answers."""
        with contextlib.suppress(OSError), client, \
                socket.create_connection(self._to, 5) as server:
            while True:
                request, whole = _message(client)
                if not whole:
                    return
                fault = self._fault(request)
                self.faults[fault] += bool(fault)
                if fault == "cut":
                    server.sendall(request[:self._random.randrange(len(request))])
                    return
                if fault == "delayed":
                    time.sleep(self._random.uniform(0.1, 3))
                if fault == "late":
                    # Nothing comes through meanwhile, or beats would keep the lease alive.
                    self._held_until = time.monotonic() + LEASE_TIME + self._random.uniform(1.5, 3)
                time.sleep(max(self._held_until - time.monotonic(), 0))
                if fault == "damaged":
                    request = self._damage(request)
                server.sendall(request)
                if fault == "repeated":
                    with socket.create_connection(self._to, 5) as again:
                        again.sendall(request)
                        _message(again)
                answer, whole = _message(server)
                if fault == "answer lost" or not whole:
                    return
                if fault == "answer cut":
                    client.sendall(answer[:self._random.randrange(len(answer) or 1)])
                    return
                if request.startswith(b"GET /api/v1/blobs/") and fault == "answer damaged":
                    answer = self._damage(answer)
                client.sendall(answer)

    def _fault(self, request: bytes) -> str:
        if not self.bad or self._random.random() > 0.25:
            return ""
        # Pictures and files have hashes; what JSON says is guarded by TLS only.
        kinds = ["cut", "delayed", "repeated", "answer lost", "answer cut"]
        if request.startswith(b"PUT "):
            kinds += ["damaged"] * 3 + ["late"] * 2
        kinds += ["answer damaged"] * 3 if request.startswith(b"GET /api/v1/blobs/") else []
        return self._random.choice(kinds)

    def _damage(self, message: bytes) -> bytes:
        start = message.find(b"\r\n\r\n") + 4
        if start >= len(message):
            return message
        at = self._random.randrange(start, len(message))
        return message[:at] + bytes([message[at] ^ 1 << self._random.randrange(8)]) + message[at + 1:]


def _message(sock: socket.socket) -> Tuple[bytes, bool]:
    """Read one HTTP message with a Content-Length, and tell whether it is whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = sock.recv(65536)
        if not block:
            return data, False
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields.get(b"content-length", b"0")) - len(body)
    while left > 0:
        block = sock.recv(65536)
        if not block:
            return data, False
        data += block
        left -= len(block)
    return data, True


class Program:
    """A povfarm process that is started again whenever it has ended, until it is stopped."""

    def __init__(self, place: Path, name: str, *args: str, prefix: Sequence[str] = (),
                 environment: Optional[Dict[str, str]] = None) -> None:
        self.name = name
        self._command = [*prefix, *POVFARM, *args]
        self._environment = {**os.environ, **(environment or {})}
        self._place = place
        self._wanted = True
        self._lock = threading.Lock()
        self._pause = 0.0
        self.process = self._start()
        threading.Thread(target=self._guard, daemon=True).start()

    def signal(self, number: int, pause: float = 0.0) -> bool:
        """Send a signal; when it ends the process, it is away for ``pause`` seconds."""
        self._pause = pause
        return self.process.poll() is None and _kill(self.process.pid, number)

    def stop(self) -> None:
        """End it in good order, and wait for that."""
        with self._lock:
            self._wanted = False
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        self.process.wait(60)

    def kill(self) -> None:
        """End it in any case."""
        self._wanted = False
        self.process.kill()

    def _start(self) -> "subprocess.Popen[bytes]":
        with open(self._place / f"{self.name}.txt", "ab") as output:
            return subprocess.Popen(self._command, cwd=self._place, stdin=subprocess.DEVNULL,
                                    stdout=output, stderr=output, env=self._environment)

    def _guard(self) -> None:
        while True:
            self.process.wait()
            time.sleep(max(self._pause, 0.2))  # it may be unable to start just now
            with self._lock:
                if not self._wanted:
                    return
                self.process = self._start()


class Disk:
    """A small disk of its own, where this user may mount one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.mounted = works("mount", "-t", "tmpfs", "-o", "size=300m", "none", str(place))

    def fill(self, leave: int) -> bool:
        """Fill it to the brim but for so many bytes."""
        with contextlib.suppress(OSError), open(self.place / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.place).free - leave)
            return True
        return False

    def empty(self) -> None:
        """Make room again."""
        (self.place / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        """Take it away, with all that is on it."""
        if self.mounted:
            works("umount", "-l", str(self.place))


class Link:
    """A cable between this computer and a network namespace, where this user may make one.

    ``address`` is this computer's end; the addresses are of those that no real network has.
    """

    def __init__(self) -> None:
        number = os.getpid() % (1 << 14)
        self.address, other = (f"198.18.{number >> 6}.{4 * (number & 63) + end}" for end in (1, 2))
        self.space = f"chaos{os.getpid()}"
        self._ends: Tuple[Tuple[str, ...], ...] = ((), ("-n", self.space))
        self._names = [f"ch{os.getpid()}{end}" for end in "ab"]
        one, two = self._names
        self.there = works("ip", "netns", "add", self.space) and works(
            "ip", "link", "add", one, "type", "veth", "peer", "name", two, "netns", self.space) and \
            self._set(0, other=self.address) and self._set(1, other=other)
        if not self.there:
            self.close()

    def cut(self, end: int) -> bool:
        """Pull the cable out at one end."""
        return works("ip", *self._ends[end], "link", "set", self._names[end], "down")

    def slow(self, kilobits: int) -> bool:
        """Let so little through, in both directions."""
        return all(works("tc", *self._ends[end], "qdisc", "replace", "dev", self._names[end], "root",
                         "tbf", "rate", f"{kilobits}kbit", "burst", "4kb", "latency", "1s")
                   for end in (0, 1))

    def mend(self) -> None:
        """Let everything through again."""
        for end in (0, 1):
            works("ip", *self._ends[end], "link", "set", self._names[end], "up")
            works("tc", *self._ends[end], "qdisc", "del", "dev", self._names[end], "root")

    def close(self) -> None:
        """Take the namespace away, and the cable with it."""
        works("ip", "netns", "del", self.space)

    def _set(self, end: int, other: str) -> bool:
        return works("ip", *self._ends[end], "addr", "add", f"{other}/30", "dev", self._names[end]) \
            and works("ip", *self._ends[end], "link", "set", self._names[end], "up")


class WrongClock:
    """The wall clock of one program, which is wrong where faketime is installed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.environment: Dict[str, str] = {}
        self.jump(CLOCKS[-1])
        modules = file.with_suffix(".modules")
        modules.mkdir()
        (modules / "sitecustomize.py").write_text(HONEST_SLEEP)
        for library in Path("/").glob(FAKETIME[1:]):
            environment = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(file),
                           "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
                           "PYTHONPATH": str(modules)}
            if works("env", *(f"{name}={value}" for name, value in environment.items()),
                     sys.executable, "-c", TRY_CLOCK, str(time.time())):
                self.environment = environment

    def jump(self, seconds: int) -> bool:
        """Let it be wrong by so much from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+}\n")
        new.replace(self._file)
        return True


def works(*command: str) -> bool:
    """Run a command that needs rights or a program that may not be there; tell whether it worked."""
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


class Farm:
    """The farm, the jobs that it was given, and the faults that it was dealt."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.faults: Counter[str] = collections.Counter()
        self.jobs: Dict[int, str] = {}
        self.retried = 0
        self._chance = random.Random(f"jobs {seed}")
        self._undoing: List[threading.Thread] = []
        self.data = place / "data"
        self.disks = [Disk(self.data), Disk(place / "carla")]
        self.link = Link()
        self.clocks = [WrongClock(place / name) for name in ("coordinator.clock", "berta.clock")]
        self.missing = {
            "small disks": not all(disk.mounted for disk in self.disks),
            "chattr": not self._read_only(True), "namespaces": not self.link.there,
            "faketime": not self.clocks[0].environment}
        self._read_only(False)
        address, port = self.link.address if self.link.there else "127.0.0.1", free_port()
        self.coordinator = Program(
            place, "coordinator", "serve", "--data", str(self.data), "--bind", address,
            "--port", str(port), "--no-discovery", "--lease-time", f"{LEASE_TIME}s",
            environment=self.clocks[0].environment)
        key = wait_until(self._key, "the coordinator does not start")
        self.client = povfarm.Client(f"http://{address}:{port}", key, retry_for=60)
        self.networks = [Network((address, port), f"{name} {seed}") for name in ("anna", "berta", "carla")]
        urls = [f"http://127.0.0.1:{network.port}" for network in self.networks]
        self.workers = [Program(
            place, name, "work", "--server", url, "--key", key, "--data", str(place / name),
            "--cores", "1", "--worker-name", name, prefix=prefix, environment=environment)
            for name, url, prefix, environment in (
                ("anna", urls[0], [], {}),
                ("berta", urls[1], [], self.clocks[1].environment),
                ("carla", urls[2], [], {}),
                ("dora", self.client.base_url, self._in_namespace(), {}))]
        (place / "project").mkdir()
        for name, (scene, _, _) in JOBS.items():
            (place / "project" / f"{name}.pov").write_text(scene)

    def not_tried(self) -> List[str]:
        """Return the kinds of faults that this machine does not allow, with what is missing."""
        return [f"{kind} (no {need})" for kind, need in KINDS.items() if self.missing.get(need)]

    def submit_until(self, end: float) -> None:
        """Queue one job after the other."""
        while time.monotonic() < end:
            self.submit()
            time.sleep(self._chance.uniform(1, 4))

    def submit(self) -> None:
        """Queue one of the jobs."""
        name = self._chance.choice(list(JOBS))
        _, arguments, options = JOBS[name]
        for _ in range(40):
            result = subprocess.run(
                [*POVFARM, "submit", f"{name}.pov", "+FP", *arguments, *options, "--frame-timeout",
                 f"{FRAME_TIMEOUT}s", "--data", str(self.data), "--server", self.client.base_url],
                cwd=self.place / "project", text=True, stdin=subprocess.DEVNULL, capture_output=True,
                check=False)
            if result.returncode == 0:
                self.jobs[int(result.stdout)] = name
                return
            time.sleep(0.5)  # the disk may be full just now, or read-only
        raise Lost(f"{name} cannot be submitted: {result.stderr}")

    def harm(self, fault: Fault) -> None:
        """Do one thing that should not happen, if it can be done now."""
        for _ in range(0 if self.missing.get(KINDS[fault.kind]) else 20):
            if self._do(fault):
                self.faults[fault.kind] += 1
                return
            time.sleep(0.05)  # until there is a renderer, or somebody runs again

    def _do(self, fault: Fault) -> bool:
        """Do it, and see that it ends; False when there is nothing to do it to."""
        what, _, kind = fault.kind.rpartition(" ")
        do: Dict[str, Callable[[Fault, str], bool]] = {
            "jumps": self._clock, "full": self._disk, "read-only": self._data, "cut": self._cable,
            "slow": self._cable, "killed": self._process, "held": self._process,
            "good": self._process}
        return do[kind](fault, what)

    def _clock(self, fault: Fault, what: str) -> bool:
        return self.clocks[what.startswith("worker")].jump(_chosen(CLOCKS, fault))

    def _disk(self, fault: Fault, what: str) -> bool:
        disk = self.disks[what.startswith("worker")]
        return disk.fill(_chosen((0, 1 << 20), fault)) and self._later(4 * fault.strength, disk.empty)

    def _data(self, fault: Fault, what: str) -> bool:
        return self._read_only(True) and self._later(
            4 * fault.strength, lambda: self._read_only(False))

    def _cable(self, fault: Fault, what: str) -> bool:
        if fault.kind.endswith("cut"):
            done = self.link.cut(_chosen((0, 1), fault))
        else:
            done = self.link.slow(_chosen((16, 64, 256), fault))
        return done and self._later(8 * fault.strength, self.link.mend)

    def _process(self, fault: Fault, what: str) -> bool:
        worker, killed = _chosen(self.workers, fault), fault.kind.endswith("killed")
        programs: Dict[str, Program] = {"worker": worker, "coordinator": self.coordinator}
        program = programs.get(what)
        if program is not None and killed:
            return program.signal(signal.SIGKILL, 2 * fault.strength)
        pids = [program.process.pid] if program is not None else (
            self._launchers(worker) if what == "launcher" else [*self._processes("povray")])
        if not pids or not _kill(
                pid := _chosen(pids, fault), signal.SIGKILL if killed else signal.SIGSTOP):
            return False
        return killed or fault.kind.endswith("for good") or self._later(
            4 * fault.strength, lambda: _kill(pid, signal.SIGCONT))

    def _later(self, seconds: float, undo: Callable[[], Any]) -> bool:
        """Undo something after a time, as soon as it can be undone."""
        def wait() -> None:
            time.sleep(seconds)
            while True:
                with contextlib.suppress(OSError):
                    undo()
                    return
                time.sleep(0.05)

        self._undoing.append(threading.Thread(target=wait, daemon=True))
        self._undoing[-1].start()
        return True

    def settle(self, seconds: float) -> Counter[str]:
        """Wait for all jobs; return how many of them ended how."""
        for network in self.networks:
            network.bad = False
        for thread in self._undoing:
            thread.join()
        end = time.monotonic() + seconds
        ended: Counter[str] = collections.Counter()
        for job, name in self.jobs.items():
            state = self._settled(job, name, end)
            ended[state] += 1
            if (state == "failed") != (name == "broken"):
                raise Lost(f"job {job} ({name}) is {state}")
        with povfarm.Store(self.data).read() as tx:
            if tx.live_attempts():
                raise Lost("a lease is left over")
        check_data(self.data)
        return ended

    def check(self, images: Dict[str, bytes]) -> int:
        """Compare every picture with plain POV-Ray's; return how many there are."""
        count = 0
        for job, name in self.jobs.items():
            path = f"/api/v1/jobs/{job}/frames"
            for frame in self.client.request("GET", path).json()["frames"]:
                if name != "broken":
                    image = self.client.request("GET", f"{path}/{frame['frame']}/image").body
                    count += 1
                    if pixels(image) != pixels(images[frame["name"]]):
                        raise Lost(f"{frame['name']} of job {job} is wrong")
        return count

    def expired(self) -> int:
        """Return how many renders were given to others because their worker was not heard."""
        with contextlib.closing(sqlite3.connect(self.data / "farm.db")) as database:
            return int(database.execute(
                "SELECT count(*) FROM attempt WHERE state = 'expired'").fetchone()[0])

    def stop(self) -> None:
        """End everything in good order and look for what is left."""
        for program in (*self.workers, self.coordinator):
            program.stop()
        def left() -> Dict[int, str]:
            return {**self._processes("povray"), **self._processes("python")}

        try:
            wait_until(lambda: not left(), "", 20)
        except AssertionError:
            raise Lost(f"processes are left over: {left()}") from None
        povfarm.Coordinator(self.data, bind="127.0.0.1").stop()  # which sweeps
        for program in self.workers:
            povfarm._sweep(self.place / program.name / "cache")  # it may not have come so far
        check_data(self.data)
        files = [path for program in self.workers for path in self.place.glob(f"{program.name}/*")
                 if path.name not in ("cache", "workers")]
        files += [path for path in self.data.rglob("*")
                  if path.name.endswith(".part") or path.parent.name == "parts"]
        if files:
            raise Lost(f"files are left over: {files}")
        mistakes = [text for path in self.place.glob("*.txt")
                    for text in (path.read_text(errors="replace"),) if "Traceback" in text]
        if mistakes:
            raise Lost(f"a program made a mistake: {mistakes[0][-2000:]}")

    def close(self) -> None:
        """End what is still there, however this ended."""
        for program in (*self.workers, self.coordinator):
            program.kill()
        for network in self.networks:
            network.close()
        self.link.close()
        self._read_only(False)
        for disk in self.disks:
            disk.close()

    def _settled(self, job: int, name: str, end: float) -> str:
        path = f"/api/v1/jobs/{job}"
        while time.monotonic() < end:
            view = self.client.request("GET", path).json()
            if view["state"] == "done":
                return "done"
            if view["state"] in ("failed", "paused"):
                why = view["failure"]["message"]
                if name == "broken" and "Parse Error" in why:
                    return "failed"
                if not re.search(EXCUSES, why):
                    log = self.client.request(
                        "GET", f"{path}/frames/{view['failure']['frame']}/log").body
                    raise Lost(f"job {job} ({name}) failed: {why}\n{log.decode(errors='replace')}")
                self.retried += 1
                self.client.request("POST", f"{path}/retry", json={})
            time.sleep(0.1)
        raise Lost(f"job {job} ({name}) does not end: {view}")

    def _in_namespace(self) -> List[str]:
        return ["nsenter", f"--net=/run/netns/{self.link.space}"] if self.link.there else []

    def _read_only(self, only: bool) -> bool:
        """Let nothing be made, changed or deleted in the coordinator's data, or let it again."""
        return works("chattr", "-R", "-f", "+i" if only else "-i", str(self.data)) or not only

    def _key(self) -> Optional[str]:
        with contextlib.suppress(OSError, ValueError):
            json.loads((self.data / "coordinator.json").read_text())
            return (self.data / "farm.key").read_text()
        return None

    def _processes(self, name: str) -> Dict[int, str]:
        """Return the processes of a program that work below our directory, and their arguments."""
        found = {}
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                cwd = Path(os.readlink(process / "cwd"))
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                if (process / "comm").read_text().startswith(name) and state != "Z" and (
                        cwd == self.place or self.place in cwd.parents):
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        return found

    def _launchers(self, worker: Program) -> List[int]:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text()
            return [int(pid) for pid in text.split()]
        return []


def _kill(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def _chosen(among: Sequence[_T], fault: Fault) -> _T:
    return among[int(fault.pick * len(among))]


def expected_images() -> Dict[str, bytes]:
    """Render all jobs with plain POV-Ray: the image of each file name."""
    with tempfile.TemporaryDirectory() as place:
        for name, (scene, arguments, _) in JOBS.items():
            Path(place, f"{name}.pov").write_text(scene)
            subprocess.run(["povray", f"{name}.pov", "+FP", *arguments, "-D"], cwd=place,
                           check=name != "broken", stdin=subprocess.DEVNULL, capture_output=True)
        return {path.name: path.read_bytes() for path in Path(place).glob("*.ppm")}


@contextlib.contextmanager
def farm_in(seed: int) -> Iterator[Farm]:
    """Give a farm in a directory that is gone afterwards; after a loss it is kept."""
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    farm = Farm(place, seed)
    try:
        yield farm
    except BaseException:
        print(f"what is left is in {place}", file=sys.stderr)
        farm.close()
        raise
    farm.close()
    shutil.rmtree(place)


def chaos(seconds: float, seed: int) -> str:
    """Harm a farm for so long, then let it settle; return the figures, or raise ``Lost``."""
    images = expected_images()
    with farm_in(seed) as farm:
        end = time.monotonic() + seconds
        with concurrent.futures.ThreadPoolExecutor(1) as person:
            submitting = person.submit(farm.submit_until, end)
            for fault in itertools.takewhile(lambda _: time.monotonic() < end, plan(seed)):
                time.sleep(fault.pause)
                farm.harm(fault)
            submitting.result()
        ended = farm.settle(60 + 2 * seconds)
        count, expired = farm.check(images), farm.expired()
        farm.stop()
        faults = sum((network.faults for network in farm.networks), farm.faults)
        if not (images and count and ended["done"] and sum(faults.values()) > seconds / 10):
            raise Lost(f"too little was tried: {ended}, {count} pictures, {faults}")
        text = ", ".join(f"{number} {kind}" for kind, number in sorted(faults.items()))
        return (f"{sum(ended.values())} jobs ({ended['failed']} failed as they should), "
                f"{count} pictures right, 0 wrong or lost; {sum(faults.values())} faults: {text}; "
                f"{expired} renders given to others because nobody was heard, {farm.retried} jobs retried; "
                f"not tried here: {', '.join(farm.not_tried()) or 'nothing'}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(chaos(60 * options.minutes, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
