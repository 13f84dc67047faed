"""A whole farm while everything goes wrong: real processes, real POV-Ray, a bad network.

    python tests/chaos.py [--minutes N] [--seed S]

A coordinator and three workers render one job after the other. Meanwhile workers, the
processes that start their renderers, renderers and the coordinator are killed or held still,
the disk of the coordinator fills up (where this user may mount one), and between workers and
coordinator is a network that cuts, delays and repeats requests, damages pictures and files, and
loses answers to what was done. Then it becomes quiet, and every job must be complete and, to the
pixel, what plain POV-Ray makes; or have failed and tell why. A job whose renderers were killed
until its tries were used up is retried. No process, no lease, no file may be left over.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
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
from typing import Any, Callable, Counter, Dict, Iterator, List, Optional, Tuple

from crash import POVFARM, ROOT, SCENE, Lost, check_data, free_port, pixels, until

sys.path.insert(0, str(ROOT))

import povfarm

LEASE_TIME = 3.0
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


class Network:
    """Passes connections on to the coordinator, and does to them what networks do."""

    def __init__(self, to: int, seed: int) -> None:
        self.faults: Counter[str] = collections.Counter()
        self.bad = True
        self._to = to
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
                socket.create_connection(("127.0.0.1", self._to), 5) as server:
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
                if fault == "damaged":
                    request = self._damage(request)
                server.sendall(request)
                if fault == "repeated":
                    with socket.create_connection(("127.0.0.1", self._to), 5) as again:
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
        kinds += ["damaged"] * 3 if request.startswith(b"PUT ") else []
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

    def __init__(self, place: Path, name: str, *args: str) -> None:
        self.name = name
        self.ends: List[int] = []
        self._command = [*POVFARM, *args]
        self._place = place
        self._wanted = True
        self._pause = 0.0
        self.process = self._start()
        threading.Thread(target=self._guard, daemon=True).start()

    def signal(self, number: int, pause: float = 0.0) -> None:
        """Send a signal; when it ends the process, it is away for ``pause`` seconds."""
        self._pause = pause
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def stop(self) -> None:
        """End it in good order, and wait for that."""
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
                                    stdout=output, stderr=output)

    def _guard(self) -> None:
        while True:
            self.ends.append(self.process.wait())
            time.sleep(self._pause)
            if not self._wanted:
                return
            self.process = self._start()


class Farm:
    """The farm, the jobs that it was given, and the faults that it was dealt."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.random = random.Random(seed)
        self.faults: Counter[str] = collections.Counter()
        self.jobs: Dict[int, str] = {}
        self.data = place / "data"
        self.mounted = self._mount()
        port = free_port()
        self.coordinator = Program(
            place, "coordinator", "serve", "--data", str(self.data), "--bind", "127.0.0.1",
            "--port", str(port), "--no-discovery", "--lease-time", f"{LEASE_TIME}s")
        key = until(self._key, "the coordinator does not start")
        self.client = povfarm.Client(f"http://127.0.0.1:{port}", key, retry_for=60)
        self.network = Network(port, seed)
        self.workers = [Program(
            place, name, "work", "--server", f"http://127.0.0.1:{self.network.port}", "--key", key,
            "--data", str(place / name), "--cores", "1", "--worker-name", name)
            for name in ("anna", "berta", "carla")]
        (place / "project").mkdir()
        for name, (scene, _, _) in JOBS.items():
            (place / "project" / f"{name}.pov").write_text(scene)

    def submit(self) -> None:
        """Queue one of the jobs."""
        name = self.random.choice(list(JOBS))
        _, arguments, options = JOBS[name]
        for _ in range(20):
            result = subprocess.run(
                [*POVFARM, "submit", f"{name}.pov", "+FP", *arguments, *options, "--data",
                 str(self.data), "--server", self.client.base_url], cwd=self.place / "project", text=True,
                stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if result.returncode == 0:
                self.jobs[int(result.stdout)] = name
                return
            time.sleep(0.5)  # the disk may be full just now
        raise Lost(f"{name} cannot be submitted: {result.stderr}")

    def harm(self) -> None:
        """Do one thing that should not happen."""
        worker = self.random.choice(self.workers)
        renderers, launchers = self._processes("povray"), self._launchers(worker)
        pause = self.random.uniform(0, 2)
        kinds: Dict[str, Callable[[], Any]] = {
            "worker killed": lambda: worker.signal(signal.SIGKILL, pause),
            "worker held": lambda: self._hold(worker.process.pid, 2 * pause),
            "coordinator killed": lambda: self.coordinator.signal(signal.SIGKILL, pause),
            "coordinator held": lambda: self._hold(self.coordinator.process.pid, pause),
        }
        if renderers:
            kinds["renderer killed"] = lambda: _kill(self.random.choice(renderers), signal.SIGKILL)
            kinds["renderer held"] = lambda: self._hold(self.random.choice(renderers), pause)
        if launchers:
            kinds["launcher killed"] = lambda: _kill(launchers[0], signal.SIGKILL)
        if self.mounted:
            kinds["disk full"] = lambda: self._fill(2 * pause)
        kind = self.random.choice(list(kinds))
        self.faults[kind] += 1
        kinds[kind]()

    def settle(self, seconds: float) -> Counter[str]:
        """Wait for all jobs; return how many of them ended how."""
        self.network.bad = False
        end, ended = time.monotonic() + seconds, collections.Counter()  # type: Counter[str]
        for job, name in self.jobs.items():
            state = self._settled(job, name, end)
            ended[state] += 1
            if (state == "failed") != (name == "broken"):
                raise Lost(f"job {job} ({name}) is {state}")
        with povfarm.Store(self.data).read() as tx:
            if tx.live_leases():
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

    def stop(self) -> None:
        """End everything in good order and look for what is left."""
        for program in (*self.workers, self.coordinator):
            program.stop()
        left = [pid for name in ("povray", "python") for pid in self._processes(name)]
        if left:
            raise Lost(f"processes are left over: {left}")
        povfarm.Coordinator(self.data, bind="127.0.0.1").stop()  # which sweeps
        check_data(self.data)
        files = [path for program in self.workers for path in (self.place / program.name).iterdir()
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
        self.network.close()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.data)], check=False)

    def _settled(self, job: int, name: str, end: float) -> str:
        path = f"/api/v1/jobs/{job}"
        while time.monotonic() < end:
            view = self.client.request("GET", path).json()
            if view["state"] in ("done", "failed", "paused"):
                if name == "broken" or view["state"] == "done":
                    if name == "broken" and "Parse Error" not in view["failure"]["message"]:
                        raise Lost(f"job {job} does not tell why it failed: {view['failure']}")
                    return "done" if view["state"] == "done" else "failed"
                if not re.search("killed|Timed out waiting", view["failure"]["message"]):
                    raise Lost(f"job {job} ({name}) failed: {view['failure']}")
                self.faults["retried"] += 1
                self.client.request("POST", f"{path}/retry", json={})
            time.sleep(0.1)
        raise Lost(f"job {job} ({name}) does not end: {view}")

    def _mount(self) -> bool:
        self.data.mkdir()
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(self.data)],
            capture_output=True, check=False).returncode == 0

    def _key(self) -> Optional[str]:
        with contextlib.suppress(OSError, ValueError):
            json.loads((self.data / "coordinator.json").read_text())
            return (self.data / "farm.key").read_text()
        return None

    def _hold(self, pid: int, seconds: float) -> None:
        """Hold a process still for a time, while other things go on."""
        _kill(pid, signal.SIGSTOP)
        threading.Timer(seconds, _kill, (pid, signal.SIGCONT)).start()

    def _fill(self, seconds: float) -> None:
        """Fill the disk of the coordinator to the brim for a time."""
        ballast = self.data / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb") as file:
            free = shutil.disk_usage(self.data).free
            os.posix_fallocate(file.fileno(), 0, free - self.random.choice([0, 1 << 20]))
        threading.Timer(seconds, ballast.unlink, (True,)).start()

    def _processes(self, name: str) -> List[int]:
        """Return the processes of a program that work below our directory."""
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                cwd = Path(os.readlink(process / "cwd"))
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                if (process / "comm").read_text().startswith(name) and state != "Z" and (
                        cwd == self.place or self.place in cwd.parents):
                    found.append(int(process.name))
        return found

    def _launchers(self, worker: Program) -> List[int]:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text()
            return [int(pid) for pid in text.split()]
        return []


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


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
        next_job = 0.0
        while time.monotonic() < end:
            if time.monotonic() > next_job:
                farm.submit()
                next_job = time.monotonic() + farm.random.uniform(1, 4)
            farm.harm()
            time.sleep(farm.random.uniform(0.1, 1))
        ended = farm.settle(60 + 2 * seconds)
        count = farm.check(images)
        farm.stop()
        faults = farm.faults + farm.network.faults
        text = ", ".join(f"{number} {kind}" for kind, number in sorted(faults.items()))
        return (f"{sum(ended.values())} jobs ({ended['failed']} failed as they should), "
                f"{count} pictures right, 0 wrong or lost; faults: {text}")


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
