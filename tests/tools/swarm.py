"""Measures a coordinator with many workers: a real ``serve``, and simulated workers over HTTP.

    python tests/tools/swarm.py [--short] [rates] [steady] [idle] [bulk] [jobs] [viewers]

All workers live in this process, on one selector: they join, ask with a long poll, beat as real
ones do, and deliver real, tiny PNGs. Prints figures as JSON and ends with 1 when one of them is
impossible or when what was promised is missed by far. ``--short`` takes a few seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import http.client
import itertools
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

from helpers.pictures import HEIGHT, WIDTH, png
from helpers.trust import join_at, signer_at
from povfarm import BEATS, LEASE_WAIT, Client

PROGRAM = Path(os.environ.get("POVFARM_PY", Path(__file__).resolve().parents[2] / "povfarm.py"))
BEAT_WAIT = 2.0  # seconds, as of a real worker
LEASE_TIME = 30.0  # seconds, the default
ASKED = ("lease", "beat", "delivery")  # what workers ask for
SPREAD = 20.0  # seconds in which many begin to wait: a connection without a request may be closed
TRIVIAL = {"cpu": 0.03, "wall": 0.35}  # what POV-Ray's smallest render costs, in seconds
Then = Callable[[int, Any, float], None]  # status, answer, seconds


class Serve:
    """A real coordinator in a process of its own, and the farm's key."""

    def __init__(self, data: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "serve", "--data", str(data), "--port", "0",
             "--bind", "127.0.0.1", "--no-discovery"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "is at" in line, line
        self.port = int(json.loads((data / "coordinator.json").read_text())["url"].rpartition(":")[2])
        self.key = (data / "farm.key").read_text().strip()
        self.pid = self.process.pid
        self.client = Client(f"http://127.0.0.1:{self.port}", self.key, retry_for=0)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request; its answer."""
        data = self.client.request(method, path, json=body, timeout=600).body
        return json.loads(data) if data else None

    def join(self, number: int) -> str:
        """A worker joins; its token."""
        return join_at(self.client, {
            "name": f"w{number}", "cores": 1, "memory": 1 << 30, "system": "x",
            "engines": {"povray": "3.7.0.10"}, "tags": []})

    def submit(self, frames: int, name: str = "swarm", priority: int = 0) -> int:
        """A job without files, of tiny frames; its number."""
        values = {"Input_File_Name": "scene.pov", "Output_File_Name": "out", "Width": str(WIDTH),
                  "Height": str(HEIGHT), "Initial_Frame": "1", "Final_Frame": str(frames)}
        pov = {"values": values, "declares": [], "library": [], "run_dir": ".", "uses": []}
        return int(self.call("POST", "/api/v1/jobs", {
            "name": name, "pov": pov, "manifest": {"files": []},
            "options": {"priority": priority}})["id"])

    def cpu(self) -> float:
        """The seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """The bytes that are resident."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(next(line for line in text.splitlines() if "VmRSS" in line).split()[1])


@contextlib.contextmanager
def serving() -> Iterator[Serve]:
    with tempfile.TemporaryDirectory(prefix="povfarm-swarm-") as scratch:
        serve = Serve(Path(scratch))
        try:
            yield serve
        finally:
            serve.stop()


class Line:
    """One connection, of one request at a time."""

    def __init__(self, swarm: Swarm, token: str) -> None:
        self.swarm, self.token = swarm, token
        self.sock = socket.create_connection(("127.0.0.1", swarm.port), 60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.came = b""
        self.then: Optional[Then] = None
        self.began = 0.0
        swarm.selector.register(self.sock, selectors.EVENT_READ, self)

    def close(self) -> None:
        self.swarm.selector.unregister(self.sock)
        self.sock.close()

    def ask(self, method: str, path: str, body: bytes, then: Then) -> None:
        """Send a request; ``then`` is called with its answer."""
        assert self.then is None
        self.then, self.began = then, time.monotonic()
        fields = {"Host": "127.0.0.1", "Content-Type": "application/json",
                  "Content-Length": str(len(body)),
                  **self.fields(method, path, body)}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.sock.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)  # little enough to be taken at once

    def fields(self, method: str, path: str, body: bytes) -> Dict[str, str]:
        """What the head says of who asks."""
        return self.swarm.signer.headers(self.token, method, path, body)

    def read(self) -> None:
        """Take in what has come, and go on where an answer is whole."""
        data = self.sock.recv(1 << 16)
        assert data, "the coordinator has closed a connection"
        self.came += data
        head, found, body = self.came.partition(b"\r\n\r\n")
        if not found:
            return
        size = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
        if len(body) < int(size or 0):
            return
        then, self.then, self.came = self.then, None, b""
        assert then is not None
        then(int(head[9:12]), json.loads(body) if body[:1] == b"{" else body, time.monotonic() - self.began)


class Swarm:
    """The workers, and how long their requests took."""

    def __init__(self, port: int, frame_seconds: float = 0.0,
                 told: Optional[Dict[str, float]] = None) -> None:
        self.port, self.frame_seconds = port, frame_seconds
        self.told = told or TRIVIAL
        self.signer = signer_at(f"http://127.0.0.1:{port}")
        self.selector = selectors.DefaultSelector()
        self.workers: List[Worker] = []
        self.delivered = self.refused = 0
        self.taken: Dict[str, List[Tuple[float, float]]] = {
            what: [] for what in (*ASKED, "farm", "page")}
        self.timers: List[Tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + seconds, next(self.numbers), call))

    def note(self, what: str, seconds: float) -> None:
        self.taken[what].append((time.monotonic(), seconds))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let the workers work for so long."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end and not until():
            while self.timers and self.timers[0][0] <= now:
                heapq.heappop(self.timers)[2]()
            due = self.timers[0][0] if self.timers else end
            for key, _ in self.selector.select(max(min(due, end) - time.monotonic(), 0.0)):
                key.data.read()

    def since(self, began: float, what: str) -> List[float]:
        return [seconds for at, seconds in self.taken[what] if at >= began]


class Viewer(Line):
    """A visible page, which the script keeps up to date; ``cookie`` is of who looks."""

    def __init__(self, swarm: Swarm, place: str, cookie: str, page: str) -> None:
        super().__init__(swarm, cookie)
        self.place, self.page, self.event, self.loaded = place, place + page, -1, 0.0

    def fields(self, method: str, path: str, body: bytes) -> Dict[str, str]:
        return {"Accept": "text/html", "Cache-Control": "max-age=1",
                **({"Cookie": self.token} if self.token else {})}

    def look(self) -> None:
        """As ``beat`` of the script does."""
        self.ask("GET", f"{self.place}/api/v1/farm", b"", self._told)

    def _told(self, status: int, answer: Any, seconds: float) -> None:
        assert status == 200, answer
        self.swarm.note("farm", seconds)
        if answer["event"] != self.event and time.monotonic() - self.loaded > 1.4:
            self.event = answer["event"]
            self.ask("GET", self.page, b"", self._shown)
        else:
            self.swarm.later(1.0, self.look)

    def _shown(self, status: int, answer: Any, seconds: float) -> None:
        assert status == 200 and b'id="main"' in answer, answer[:300]
        self.swarm.note("page", seconds)
        self.loaded = time.monotonic()
        self.swarm.later(1.8, self.look)


class Worker:
    """Renders one lease at a time, whose frames take a time that is given."""

    def __init__(self, swarm: Swarm, token: str) -> None:
        self.swarm = swarm
        self.asking, self.beating = Line(swarm, token), Line(swarm, token)
        self.lease = ""
        self.tasks: Deque[int] = deque()

    def ask(self) -> None:
        offer = {"want": 1, "slots": 1, "idle": 1, "wait": LEASE_WAIT}
        self.asking.ask("POST", "/api/v1/lease", json.dumps(offer).encode(), self._leased)

    def _leased(self, status: int, answer: Any, seconds: float) -> None:
        assert status == 200, answer
        if not answer["leases"]:
            self.ask()
            return
        self.swarm.note("lease", seconds)
        lease = answer["leases"][0]
        self.lease, self.tasks = lease["id"], deque(task["id"] for task in lease["tasks"])
        if self.beating.then is None:
            self._beat()
        self._render()

    def _render(self) -> None:
        if self.swarm.frame_seconds:
            self.swarm.later(self.swarm.frame_seconds, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        task, told = self.tasks[0], self.swarm.told
        body = b"log\n" + png(task)
        self.asking.ask(
            "PUT", f"/api/v1/leases/{self.lease}/tasks/{task}?log=4&memory=1000000&parse=0.01"
            f"&cpu={told['cpu']}&wall={told['wall']}", body, self._delivered)

    def _delivered(self, status: int, answer: Any, seconds: float) -> None:
        if status == 200 and answer["accepted"]:
            self.swarm.delivered += 1
            self.swarm.note("delivery", seconds)
        else:
            self.swarm.refused += 1
        self.tasks.popleft()
        if self.tasks:
            self._render()
        else:
            self.lease = ""
            self.ask()

    def _beat(self) -> None:
        leases = {self.lease: {str(task): 0.5 for task in itertools.islice(self.tasks, 1)}}
        self.beating.ask("POST", "/api/v1/beat",
                         json.dumps({"leases": leases, "wait": BEAT_WAIT}).encode(), self._beaten)

    def _beaten(self, status: int, answer: Any, seconds: float) -> None:
        assert status == 200, answer
        held = not answer["ended"] and not answer["cuts"]
        wait = max(BEAT_WAIT, min(len(self.swarm.workers) / BEATS, LEASE_TIME / 3))
        self.swarm.note("beat", max(seconds - wait, 0.0) if held else 0.0)
        if self.lease:
            self._beat()


def gathered(serve: Serve, number: int, **how: Any) -> Swarm:
    """So many workers that have joined."""
    swarm = Swarm(serve.port, **how)
    swarm.workers = [Worker(swarm, serve.join(index)) for index in range(number)]
    return swarm


def most(times: List[float], part: float = 0.99) -> float:
    """The time that so large a part of the requests took at most."""
    return round(sorted(times)[int(part * (len(times) - 1))], 4) if times else -1.0


def checked(serve: Serve, swarm: Swarm, job: int) -> None:
    """What was counted here is what the farm has counted."""
    done = serve.call("GET", f"/api/v1/jobs/{job}")["frames"]["done"]
    under_way = len(swarm.workers)
    assert swarm.delivered <= done <= swarm.delivered + under_way, (swarm.delivered, done)
    assert not swarm.refused, f"{swarm.refused} deliveries were refused"


def rate(number: int, seconds: float) -> Dict[str, float]:
    """Deliveries a second of so many workers, whose frames cost nothing."""
    with serving() as serve:
        swarm = gathered(serve, number)
        job = serve.submit(100_000)
        for worker in swarm.workers:
            worker.ask()
        swarm.run(60, lambda: swarm.delivered >= 3 * number)
        before, began, cpu = swarm.delivered, time.monotonic(), serve.cpu()
        swarm.run(seconds)
        spent = time.monotonic() - began
        rate = (swarm.delivered - before) / spent
        checked(serve, swarm, job)
        return {"workers": number, "deliveries_a_second": round(rate, 1),
                "cpu_ms_a_delivery": round(1000 * (serve.cpu() - cpu) / max(rate * spent, 1), 2),
                "delivery_p99": most(swarm.since(began, "delivery")), "memory": serve.memory()}


def steady(number: int, a_second: float, seconds: float) -> Dict[str, float]:
    """What workers wait for that deliver at a certain rate together."""
    each = number / a_second
    with serving() as serve:
        swarm = gathered(serve, number, frame_seconds=each, told={"cpu": each, "wall": each})
        job = serve.submit(100_000)
        for index, worker in enumerate(swarm.workers):
            swarm.later(each * index / number, worker.ask)
        swarm.run(1.5 * each)
        before, began, cpu = swarm.delivered, time.monotonic(), serve.cpu()
        swarm.run(seconds)
        spent = time.monotonic() - began
        checked(serve, swarm, job)
        return {"workers": number,
                "deliveries_a_second": round((swarm.delivered - before) / spent, 1),
                "cores": round((serve.cpu() - cpu) / spent, 3),
                **{f"{what}_p99": most(swarm.since(began, what)) for what in ASKED},
                **{f"{what}_most": most(swarm.since(began, what), 1.0) for what in ASKED}}


def idle(number: int, seconds: float) -> Dict[str, float]:
    """What workers cost that wait for work."""
    with serving() as serve:
        swarm = gathered(serve, number)
        for index, worker in enumerate(swarm.workers):
            worker.beating.close()  # the coordinator closes what is not used
            swarm.later(SPREAD * index / number, worker.ask)
        swarm.run(SPREAD + 2)
        began, cpu = time.monotonic(), serve.cpu()
        swarm.run(seconds)
        return {"workers": number,
                "cores": round((serve.cpu() - cpu) / (time.monotonic() - began), 4),
                "memory": serve.memory()}


def bulk(frames: int) -> Dict[str, float]:
    """How long others wait while a large job is submitted, cancelled, retried, deleted."""
    figures: Dict[str, float] = {"frames": frames}
    with serving() as serve:
        swarm = gathered(serve, 10, frame_seconds=0.05, told={"cpu": 20, "wall": 20})
        serve.submit(100_000, "others", priority=9)
        for worker in swarm.workers:
            worker.ask()
        swarm.run(3)
        alone, looks = time.monotonic() - 2, Looks(serve)
        figures["others_alone"] = max(itertools.chain(*(swarm.since(alone, what)
                                                        for what in swarm.taken)))
        jobs: List[int] = []
        steps: List[Tuple[str, Callable[[], Any]]] = [
            ("submit", lambda: jobs.append(serve.submit(frames, "large"))),
            *((action, lambda action=action: serve.call(  # type: ignore[misc]
                "POST", f"/api/v1/jobs/{jobs[0]}/{action}")) for action in ("cancel", "retry")),
            ("delete", lambda: serve.call("DELETE", f"/api/v1/jobs/{jobs[0]}"))]
        expected = {"cancel": "cancelled", "retry": "queued"}
        for name, step in steps:
            thread = threading.Thread(target=step)
            began = time.monotonic()
            thread.start()
            swarm.run(300, lambda thread=thread: not thread.is_alive())  # type: ignore[misc]
            thread.join()
            took = time.monotonic() - began
            swarm.run(1.0)  # also those that were held up to the end
            held_up = {what: most(swarm.since(began, what), 1.0) for what in swarm.taken}
            figures[f"{name}_took"] = round(took, 2)
            figures[f"{name}_held_up"] = max([*held_up.values(), looks.most(began)])
            if name in expected:
                counts = serve.call("GET", f"/api/v1/jobs/{jobs[0]}")["frames"]
                assert counts[expected[name]] == counts["total"] == frames, counts
        looks.stop()
    return figures


def logged_in(serve: Serve) -> Tuple[str, str]:
    """Where the pages are of the admin in a new browser, and its cookie."""
    line = http.client.HTTPConnection("127.0.0.1", serve.port, timeout=60)
    line.request("GET", serve.call("POST", "/api/v1/login", {})["path"])
    cookie = line.getresponse().headers["Set-Cookie"]
    line.close()
    place = cookie.partition("Path=")[2].partition(";")[0].rstrip("/")
    return place, cookie.partition(";")[0]


def viewers(number: int, people: int, seconds: float, frames: int = 100_000) -> Dict[str, float]:
    """What visible pages of a large job cost, with workers that deliver ten frames a second; of
    ``number`` strangers, or of so many ``people``, each with a browser of their own."""
    with serving() as serve:
        swarm = gathered(serve, 10, frame_seconds=1.0, told={"cpu": 1.0, "wall": 1.0})
        job = serve.submit(frames)
        alone = Looks(serve)
        time.sleep(2)
        alone.stop()
        for index, worker in enumerate(swarm.workers):
            swarm.later(index / 10, worker.ask)
        swarm.run(3)
        began, cpu, delivered = time.monotonic(), serve.cpu(), swarm.delivered
        swarm.run(seconds)
        before, delivered = (serve.cpu() - cpu) / (time.monotonic() - began), swarm.delivered
        for index in range(max(number, people)):
            place, cookie = logged_in(serve) if people else ("", "")
            swarm.later(index / 20, Viewer(swarm, place, cookie, f"/jobs/{job}").look)
        swarm.run(4)
        began, cpu, delivered = time.monotonic(), serve.cpu(), swarm.delivered
        looks = Looks(serve)
        swarm.run(seconds)
        spent = time.monotonic() - began
        figures = {"viewers": max(number, people), "cores_before": round(before, 3),
                   "cores_of_viewers": round((serve.cpu() - cpu) / spent - before, 3),
                   "deliveries_a_second": round((swarm.delivered - delivered) / spent, 1),
                   "pages_a_second": round(len(swarm.since(began, "page")) / spent, 1),
                   "page_median": most(swarm.since(began, "page"), 0.5),
                   "api_median_idle": alone.median(), "api_median": looks.median()}
        looks.stop()
        return figures


class Looks:
    """Somebody who looks at the list of jobs all the time."""

    def __init__(self, serve: Serve) -> None:
        self._serve, self._ends = serve, threading.Event()
        self._taken: List[Tuple[float, float]] = []
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ends.wait(0.05):
            began = time.monotonic()
            self._serve.call("GET", "/api/v1/jobs")
            self._taken.append((time.monotonic(), time.monotonic() - began))

    def most(self, began: float) -> float:
        return round(max(seconds for at, seconds in self._taken if at >= began), 4)

    def median(self) -> float:
        return round(statistics.median(seconds for _, seconds in self._taken), 4)

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()


def lease_cost(jobs: int, rounds: int = 60) -> float:
    """Seconds of a lease with so many active jobs, in the middle of several."""
    with serving() as serve:
        for number in range(jobs):
            serve.submit(100, f"job{number}")
        swarm = gathered(serve, 1)
        taken: List[float] = []
        for _ in range(rounds):
            swarm.workers[0].asking.ask(
                "POST", "/api/v1/lease",
                json.dumps({"want": 1, "slots": 1, "idle": 1, "wait": 0}).encode(),
                lambda status, answer, seconds: taken.append(seconds))
            swarm.run(60, lambda: swarm.workers[0].asking.then is None)
        assert len(taken) == rounds
        return round(statistics.median(taken), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    parts = options.parts or ["rates", "steady", "idle", "bulk", "jobs", "viewers"]
    short, wrong = options.short, []
    with contextlib.suppress(ImportError):
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def told(what: str, figures: Dict[str, float], good: bool) -> None:
        print(json.dumps({what: figures}), flush=True)
        if not good or min(figures.values()) < 0:
            wrong.append(what)

    cores = os.cpu_count() or 1
    if "rates" in parts:
        for number in (10, 100) if short else (10, 50, 200, 1000):
            figures = rate(number, 2 if short else options.seconds)
            busy = figures["cpu_ms_a_delivery"] * figures["deliveries_a_second"] / 1000
            told("rate", figures, figures["deliveries_a_second"] > 20 and 0.05 < busy < cores + 0.1)
    if "steady" in parts:
        figures = steady(*((100, 20, 4) if short else (1000, 100, 2 * options.seconds)))
        told("steady", figures, 0.01 < figures["cores"] < cores + 0.1)
    if "idle" in parts and not short:
        figures = idle(1000, LEASE_WAIT)
        told("idle", figures, 0 < figures["cores"] < 0.1 and 1e7 < figures["memory"] < 1e9)
    if "bulk" in parts:
        figures = bulk(20_000 if short else 1_000_000)
        told("bulk", figures, all(0 < seconds < 1 for name, seconds in figures.items()
                                  if name.endswith("_held_up")))
    if "jobs" in parts:
        many = 50 if short else 1000
        one, more = lease_cost(1), lease_cost(many)
        told("jobs", {"one": one, str(many): more, "ratio": round(more / one, 2)},
             0.2 < more / one < 20)
    if "viewers" in parts:
        for number, people in ((20, 0), (0, 20)):
            figures = viewers(number, people, 3 if short else options.seconds)
            told("people" if people else "strangers", figures, figures["pages_a_second"] > 1
                 and figures["cores_of_viewers"] < 1 and figures["api_median"] < 0.5)
    if wrong:
        print(f"impossible, or far from what was promised: {', '.join(wrong)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
