"""A whole coordinator in one process: no sockets, no waiting, and a clock that the test turns."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, Callable, Deque, Iterator, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import parse_qsl

import pytest

import povfarm
from helpers.invariants import broken
from helpers.pictures import HEIGHT, WIDTH, png
from helpers.trust import place_of, signer_of
from povfarm import (
    Access,
    Api,
    BodyReader,
    Clock,
    Cost,
    Entrance,
    FileEntry,
    FileSlice,
    JobOptions,
    LeaseSpec,
    Manifest,
    Offer,
    PovJob,
    Request,
    Response,
    Router,
    Scheduler,
    Store,
    WorkerInfo,
)

KEY = "the farm key"
SCENE = b"sphere { 0, 1 }\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(files: Mapping[str, bytes]) -> Manifest:
    return Manifest(tuple(FileEntry(path, sha256(data), len(data), 1.0)
                          for path, data in sorted(files.items())))


def pov_job(frames: int = 3, uses: Sequence[str] = (), **values: str) -> PovJob:
    """An animation of so many frames, out1.png and on; a still, out.png, when it is one."""
    base = {"Input_File_Name": "scene.pov", "Output_File_Name": "out", "Width": str(WIDTH),
            "Height": str(HEIGHT)}
    if frames > 1:
        base.update(Initial_Frame="1", Final_Frame=str(frames))
    return PovJob({**base, **values}, (), (povfarm.STANDARD,), ".", tuple(uses))


class FakeClock(Clock):
    """Stands still until somebody waits.

    Every wait first does the next thing of ``meanwhile``, if there is one, and
    then lets time pass, calling ``housekeeping`` every second.
    """

    def __init__(self, mono: float = 1000.0) -> None:
        self.wall = 1_700_000_000.0
        self.mono = mono
        self.meanwhile: Deque[Callable[[], Any]] = collections.deque()
        self.housekeeping: Callable[[], Any] = lambda: None

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.mono

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds

    def wait(self, condition: Any, seconds: float) -> bool:
        assert 0 <= seconds < 1e6, f"a wait of {seconds} seconds"
        notified: List[bool] = []
        condition.notify_all = lambda: notified.append(True)
        try:
            if self.meanwhile:
                self.meanwhile.popleft()()
            end = self.mono + seconds
            while not notified and self.mono < end:
                self.advance(min(1.0, end - self.mono))
                self.housekeeping()
            return bool(notified)
        finally:
            del condition.notify_all


class Farm:
    """A coordinator without sockets, and what a test does with it."""

    def __init__(self, root: Path, clock: Optional[FakeClock] = None, lease_time: float = 30.0,
                 private: bool = False, admit_private: bool = False,
                 allowance: Optional[povfarm.Allowance] = None) -> None:
        self.root = root
        self.clock = clock or FakeClock()
        self.store = Store(root, durable=False)
        with self.store.tx() as tx:
            tx.set_meta("farm_id", "f" * 16)
        self.scheduler = Scheduler(self.store, self.clock, lease_time,
                                   allowance or povfarm.Allowance())
        self.access = Access(self.store, KEY, private, self.clock, self.scheduler.people)
        self.api = Api(self.scheduler, self.access, "box")
        self.entrance = Entrance(self.scheduler, self.access, admit_private)
        self.router = Router(self.api, self.entrance, authenticate=self.access.identify)
        self.api.routes = self.router.routes
        self.signer = signer_of(self.access)

    def restarted(self) -> Farm:
        """The same data after a reboot: nothing in memory, and another monotonic clock."""
        self.store.close()
        clock = FakeClock(mono=5.0)
        clock.wall = self.clock.wall + 100
        return Farm(self.root, clock, self.scheduler.lease_time)

    # --- jobs

    def submit(self, frames: int = 3, files: Optional[Mapping[str, bytes]] = None,
               send: bool = True, uses: Sequence[str] = (), name: str = "ball",
               values: Optional[Mapping[str, str]] = None, **options: Any) -> int:
        """Submit a job, and send its files; return its number."""
        files = {"scene.pov": SCENE} if files is None else files
        job, missing = self.scheduler.submit(
            name, "admin", pov_job(frames, uses, **(values or {})), manifest(files),
            JobOptions().changed(options))
        for data in files.values():
            if send and sha256(data) in missing:
                self.scheduler.put_blob(sha256(data), [data])
        return job

    def job(self, job: int) -> povfarm.Job:
        with self.store.read() as tx:
            return tx.job(job)

    def state(self, job: int) -> str:
        return str(self.job(job).state)

    def tasks(self, job: int) -> List[povfarm.Task]:
        with self.store.read() as tx:
            return tx.tasks(job)

    def task(self, job: int, frame: int) -> povfarm.Task:
        return next(task for task in self.tasks(job) if task.frame == frame)

    def states(self, job: int) -> List[str]:
        return [row.state for row in self.tasks(job)]

    def attempts(self, task: int) -> List[Tuple[str, str]]:
        """Who tried a task, and how it ended."""
        with self.store.read() as tx:
            return [(tx.worker(row.worker).name, row.state) for row in tx.attempts(task)]

    def story(self, job: int, frame: Optional[int] = None) -> List[str]:
        """Every state that a frame, or the job itself, came into."""
        with self.store.read() as tx:
            events = tx.events(0, 1_000_000)
        return [event.what.replace("job ", "") for event in events
                if event.job == job and event.frame == frame
                and (frame is not None or event.what.startswith("job "))]

    # --- workers

    def worker(self, name: str = "anna", admitted: bool = True) -> int:
        """Let a computer join: with the farm key, or it waits to be admitted."""
        info = WorkerInfo(name, 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
        with self.store.read() as look:
            address = f"192.168.1.{len(look.workers()) % 250 + 5}"
        return self.scheduler.join(info, sha256(name.encode()), address,
                                   "" if admitted else f"CODE OF {name}".upper(),
                                   "admin" if admitted else "")

    def leases(self, worker: int, want: int = 1, slots: int = 1, idle: int = 1,
               wait: float = 0.0) -> List[LeaseSpec]:
        return self.scheduler.lease(worker, Offer(want, slots, idle), wait, lambda: True)

    def lease(self, worker: int, **offer: Any) -> LeaseSpec:
        leases = self.leases(worker, **offer)
        assert len(leases) == 1, f"worker {worker} got {len(leases)} leases"
        return leases[0]

    def finish(self, worker: int, lease: LeaseSpec, index: int = 0, cpu: float = 1.0,
               image: Optional[bytes] = None, written: Mapping[str, bytes] = {}) -> bool:
        task = lease.tasks[index]
        return self.scheduler.finish(
            worker, lease.id, task.id, png(task.id) if image is None else image,
            b"rendered", Cost(cpu, cpu, 1 << 20), written=written)

    def fail(self, worker: int, lease: LeaseSpec, index: int = 0, scene: bool = False) -> None:
        self.scheduler.fail(worker, lease.id, lease.tasks[index].id, "it broke", b"the log", scene)

    def beat(self, worker: int, *leases: LeaseSpec, wait: float = 0.0) -> List[str]:
        return self.scheduler.beat(worker, {lease.id: {} for lease in leases}, wait)[0]

    def render(self, worker: int, job: Optional[int] = None) -> List[int]:
        """Let one worker render all that it is given; return the frames in order."""
        frames: List[int] = []
        while True:
            leases = self.leases(worker)
            if not leases:
                return frames
            for index, task in enumerate(leases[0].tasks):
                assert job is None or leases[0].job == job
                self.finish(worker, leases[0], index)
                frames.append(task.frame)

    # --- requests

    def ask(self, method: str, target: str, *, key: Optional[str] = KEY, json_body: Any = None,
            body: bytes = b"", headers: Optional[Mapping[str, str]] = None,
            remote: str = "192.168.1.5") -> Reply:
        """One request by its target, as it would come in over a socket."""
        path, _, query = target.partition("?")
        lines = {"host": "box", **(headers or {})}
        if json_body is not None:
            body = json_body if isinstance(json_body, bytes) else json.dumps(json_body).encode()
            lines["content-type"] = "application/json"
        lines.update(self.signer.headers(key, method, target, body))
        reply = Reply(self.router.handle(Request(
            method, place_of(self.access, lines.get("cookie", "")) + path, dict(parse_qsl(query, keep_blank_values=True)), lines,
            BodyReader.of(body), remote, target=target)))
        if path.startswith("/api/") and reply.body and reply.headers["Content-Type"].startswith("application/json"):
            check_described(self.router, method, path, reply)
        return reply

    # --- truth

    def problems(self) -> List[str]:
        """What is wrong with the farm's data."""
        return broken(self.scheduler)

    def leftovers(self) -> List[Path]:
        """Files that were begun and not finished."""
        return list(self.root.rglob("*.part"))

    def close(self) -> None:
        self.store.close()


def check_described(router: Router, method: str, path: str, reply: Reply) -> None:
    """An answer is as the OpenAPI document has it: all that must be there, and no more."""
    for bound in router.routes:
        if bound.route.method == method and bound.regex.fullmatch(path):
            described = povfarm.openapi_document([bound])["paths"].popitem()[1][method.lower()]["responses"]
            content = described["2XX" if reply.status < 300 else "default"]["content"]
            wrong = [*unlike(reply.json(), content["application/json"]["schema"])]
            assert not wrong, wrong
            return


KINDS: Mapping[str, Any] = {"object": dict, "array": list, "string": str, "integer": int,
                            "number": (int, float), "boolean": bool, "": object}


def unlike(value: Any, schema: Mapping[str, Any], where: str = "answer") -> Iterator[str]:
    """What of a value is not as a JSON schema says, or is not in it."""
    kind = schema.get("type", "")
    if value is None and schema.get("nullable"):
        return
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind not in ("boolean", "")) or (
            value not in schema.get("enum", [value])):
        yield f"{where} is {value!r}, and should be {schema}"
    elif kind == "array":
        for one in value:
            yield from unlike(one, schema["items"], f"{where}[]")
    elif kind == "object" and schema.get("properties", True):
        known = schema.get("properties") or dict.fromkeys(value, schema["additionalProperties"])
        yield from (f"{where} has no {name}" for name in schema.get("required", ()) if name not in value)
        yield from (f"{where}.{name} is not described" for name in value if name not in known)
        for name in value.keys() & known.keys():
            yield from unlike(value[name], known[name], f"{where}.{name}")


class Reply:
    """A response with its body read."""

    def __init__(self, response: Response) -> None:
        self.status = response.status
        self.headers = response.headers
        if isinstance(response.body, FileSlice):
            response.body.file.seek(response.body.start)
            self.body = response.body.file.read(response.body.length)
        else:
            parts = [response.body] if isinstance(response.body, bytes) else response.body
            self.body = b"".join(itertools.islice(parts, 1000))  # a stream may have no end
        response.close()

    def json(self) -> Any:
        assert self.headers["Content-Type"].startswith("application/json"), self.body
        return json.loads(self.body)


@pytest.fixture(name="farm")
def farm_fixture(tmp_path: Path) -> Iterator[Farm]:
    """A farm; whatever the test does with it must leave its data whole."""
    one = Farm(tmp_path / "data")
    yield one
    problems = [*one.problems(), *map(str, one.leftovers())]
    assert not problems, "\n".join(problems)
    one.close()
