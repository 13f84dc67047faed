"""A coordinator that is away, or has no room: finished frames are kept, and nothing is done twice."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List
from urllib.parse import parse_qsl

import pytest

import povfarm
from helpers.base import wait_until
from helpers.clocks import Pauses, Skipping
from helpers.farm_in_a_box import Farm, Reply
from helpers.pictures import HEIGHT, WIDTH, png
from povfarm import Answer, Cache, Call, Client, Command, ServerGone, Transport, Worker


class Wire(Transport):
    """A network to the coordinator in this process that can be cut."""

    def __init__(self, farm: Farm) -> None:
        super().__init__("http://box")
        self.farm = farm
        self.away: Callable[[Call], bool] = lambda call: False
        self.lie: Callable[[Call, bytes], bytes] = lambda call, answer: answer
        self.uploads: List[int] = []  # the statuses of the images that were sent
        self.counted, self.under_way = threading.Lock(), 0

    def exchange(self, call: Call) -> Answer:
        with self.counted:
            self.under_way += 1
        try:
            return self.answer(call)
        finally:
            with self.counted:
                self.under_way -= 1

    def answer(self, call: Call) -> Answer:
        if self.away(call):
            raise ServerGone("no answer")
        path, _, query = call.target.partition("?")
        body = b"".join(part if isinstance(part, bytes) else part.read_bytes() for part in call.body)
        headers = {name.lower(): value for name, value in call.fields().items()}
        reply = Reply(self.farm.router.handle(povfarm.Request(
            call.method, path, dict(parse_qsl(query, keep_blank_values=True)),
            {"host": "box", **headers}, povfarm.BodyReader.of(body), "127.0.0.1",
            target=call.target)))
        if call.method == "PUT":
            self.uploads.append(reply.status)
        blocks = [self.lie(call, reply.body)]
        headers = {name.lower(): value for name, value in reply.headers.items()}
        return Answer(reply.status, headers, lambda size: blocks.pop() if blocks else b"",
                      lambda: None)


class Copier(povfarm.Engine):
    """Renders every frame by copying one picture, and says what POV-Ray would say."""

    def command(self, run: povfarm.Run) -> Command:
        steps = ["set -e"]
        for number, frame in enumerate(run.frames, 1):
            steps += [f"echo Rendering frame {number} of {len(run.frames)}",
                      f"cp {shlex.quote(self.program)} {shlex.quote(str(run.made(frame)))}"]
        return Command(("/bin/sh", "-c", "\n".join(steps)), {"PATH": os.defpath}, {}, {})


class Room:
    """A farm in this process and a worker with three cores."""

    def __init__(self, tmp_path: Path) -> None:
        (tmp_path / "picture.png").write_bytes(png(7, WIDTH, HEIGHT))
        self.clock = Skipping()
        self.place = tmp_path / "worker"
        self.farm = Farm(tmp_path / "data", povfarm.Clock())  # type: ignore[arg-type]
        self.farm.worker("anna")
        self.wire = Wire(self.farm)
        client = Client("http://box", "#1:anna", clock=self.clock, transport=self.wire)
        self.worker = Worker(
            client, Copier(str(tmp_path / "picture.png"), "3.7", ()), povfarm.WindowsLauncher(),
            Cache(self.place / "cache", 10**9, client), 3, clock=self.clock)
        self.thread = threading.Thread(target=self.worker.run)

    def start(self) -> None:
        self.thread.start()

    def waiting(self) -> List[Path]:
        """The files of the finished frames that the worker keeps."""
        return sorted(self.place.glob("run-*-out-*/*"))

    def attempts(self, job: int) -> List[Any]:
        return [self.farm.attempts(task.id) for task in self.farm.tasks(job)]

    def end(self) -> None:
        self.worker.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.wire.away = lambda call: True
        self.farm.scheduler.close()  # which answers its last beat
        wait_until(lambda: not self.wire.under_way, "its last beat is still on its way")
        assert self.farm.problems() == []
        assert list(self.place.iterdir()) == [self.place / "cache"]
        self.farm.close()


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    monkeypatch.setattr(povfarm, "LEASE_WAIT", 0.2)  # nobody can hang up on a wire without sockets
    one = Room(tmp_path)
    yield one
    one.wire.away = lambda call: True
    one.worker.stop()
    one.worker.stop()


def test_frames_that_were_finished_while_nobody_answered_are_delivered_after_an_hour(
        room: Room) -> None:
    job = room.farm.submit(frames=6)
    tries: List[str] = []

    def away(call: Call) -> bool:
        """From the first image until an hour later."""
        if call.method == "PUT" or tries:
            tries.append(call.method)
        return bool(tries) and room.clock.skipped < 3600

    room.wire.away = away
    room.worker.outbox._ending = Pauses(room.clock, lambda _: time.sleep(0.0005))
    room.start()
    wait_until(lambda: room.farm.state(job) == "done")
    assert room.clock.skipped >= 3600 and 100 < tries.count("PUT") < 1000
    assert {len(attempts) for attempts in room.attempts(job)} == {1}  # none is rendered again
    room.end()


@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_that_stays_until_idle_goes_when_its_farm_ends_for_good(
        room: Room, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copier, "command", lambda engine, run: Command(
        ("/bin/sleep", "600"), {"PATH": os.defpath}, {}, {}))
    room.worker.until_idle = True
    job = room.farm.submit(frames=6, povray="auto" if busy else "3.6")
    room.start()
    wait_until(lambda: 1 in room.farm.scheduler.live_workers() and (
        not busy or "leased" in room.farm.states(job)))
    room.farm.api.ends = True
    room.farm.scheduler.close()
    room.thread.join(60)
    assert not room.thread.is_alive() and room.farm.api.untold == set()


NO_ANSWERS = [b"", b"null", b"5", b"[5]", b'"x"', b"{}", b"[" * 60_000]
MUST = ("leases", "open", "pending", "ended", "cuts")  # what those of older coordinators have, too
ODD = [None, 5, 1.5, True, "x", [None], [[]], {"1": None}, {"x": 1.5}]


def odd_answers(good: Dict[str, Any]) -> List[bytes]:
    """``good`` with each of its fields as each of what it must not be."""
    said = [(name, odd) for name in good for odd in ODD
            if type(odd) is not type(good[name]) or isinstance(odd, (list, dict))]
    return [*NO_ANSWERS, *(json.dumps({**good, name: odd}).encode() for name, odd in said
                           if odd is not None or name in MUST)]


def test_a_worker_refuses_an_answer_that_is_none_in_one_sentence(room: Room) -> None:
    task = povfarm.TaskSpec(1, 1, "a.png")
    pov = povfarm.PovJob({"Input_File_Name": "a.pov"}, (), (), ".")
    leases = [povfarm.LeaseSpec("ab", 1, "job", 1, tasks, "0" * 64, pov, False).to_wire()
              for tasks in ((task, task), ())]
    good = {"leases": [], "open": 0, "pending": False, "gone": [], "ends": False, "rest": ""}
    told = [*odd_answers(good), *(json.dumps({**good, "leases": [one]}).encode()
                                  for one in leases)]
    for answer in told:
        room.wire.lie = lambda call, _, answer=answer: answer  # type: ignore[misc]
        with pytest.raises(povfarm.FarmError, match=r"^(the|this is no) answer of |^a lease has one"):
            room.worker._ask()
    assert len(told) > 50 and not room.worker._runs
    room.wire.lie = lambda call, answer: answer
    room.start()
    room.end()


def test_a_worker_keeps_its_leases_alive_whatever_it_is_answered(
        room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(povfarm, "BEAT_WAIT", 0.01)
    good = {"ended": [], "cuts": {}, "bring": [], "ends": False, "rest": ""}
    lies = [*odd_answers(good)[::4], *(json.dumps({**good, **more}).encode() for more in (
        {"ended": ["nobody"]}, {"bring": ["nobody"]}, {"cuts": {"x": 1}}))]
    beats = []

    def lie(call: Call, answer: bytes) -> bytes:
        if not call.target.endswith("/beat"):
            return answer
        beats.append(call)
        return lies.pop() if lies else answer

    room.wire.lie, room.wire.away = lie, lambda call: call.method == "PUT"
    job, count = room.farm.submit(frames=6), len(lies)
    room.start()
    wait_until(lambda: len(beats) > count)
    room.wire.away = lambda call: False
    room.worker.client.hurry()
    wait_until(lambda: room.farm.state(job) == "done")
    assert {len(attempts) for attempts in room.attempts(job)} == {1}
    assert "Traceback" not in caplog.text
    room.end()


def test_finished_frames_are_kept_on_the_disk_and_not_in_memory(room: Room) -> None:
    job = room.farm.submit(frames=6)
    room.wire.away = lambda call: call.method == "PUT"
    room.start()
    wait_until(lambda: len(room.waiting()) == 6)
    assert [path.read_bytes() for path in room.waiting()] == [png(7, WIDTH, HEIGHT)] * 6
    room.wire.away = lambda call: False
    room.worker.client.hurry()
    wait_until(lambda: room.farm.state(job) == "done")
    wait_until(lambda: room.waiting() == [])
    assert room.wire.uploads == [200] * 6
    room.end()


def test_a_coordinator_without_room_gets_the_frames_later_and_none_is_rendered_again(
        room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    job = room.farm.submit(frames=90)
    monkeypatch.setattr(povfarm, "MOST_WAITING", 50)
    need = room.farm.store.need

    def refuse(size: int) -> None:
        raise room.farm.store._no_room()

    monkeypatch.setattr(room.farm.store, "need", refuse)
    monkeypatch.setattr(povfarm.random, "uniform", lambda low, high: 0.05)
    room.start()
    wait_until(lambda: len(room.wire.uploads) > 10)
    leased = room.farm.states(job).count("leased")
    wait_until(lambda: len(room.wire.uploads) > 40)
    assert set(room.wire.uploads) == {507}
    assert 0 < leased == room.farm.states(job).count("leased") == len(room.waiting()) < 90
    assert room.worker._trouble == room.farm.store.notice != ""
    assert sum("make room there" in text for text in caplog.messages) == 2  # here and there
    monkeypatch.setattr(room.farm.store, "need", need)
    room.farm.scheduler.look_for_room()
    wait_until(lambda: room.farm.state(job) == "done")
    assert [[how for _, how in tries] for tries in room.attempts(job)] == [["done"]] * 90
    room.end()


def test_a_frame_with_which_the_coordinator_makes_mistakes_is_given_up_in_the_end(
        room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    room.farm.submit(frames=1)
    monkeypatch.setattr(room.farm.store, "put_image", lambda *_: 1 / 0)
    room.worker.outbox._ending = Pauses(room.clock, lambda _: time.sleep(0.0005))
    room.start()
    wait_until(lambda: "was not taken" in caplog.text and room.waiting() == [])
    assert room.clock.skipped > povfarm.OFFER_TIME / 2
    assert set(room.wire.uploads) == {500} and len(room.wire.uploads) > 50
    room.end()


def test_a_worker_whose_disk_is_full_hands_its_frames_back_and_waits(
        room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of it counts as a try of the scene."""
    job = room.farm.submit(frames=6)
    free = povfarm.free_room
    full: List[Path] = []

    def free_here(place: Path) -> int:
        return -1 if place in full or place.parent in full else free(place)

    monkeypatch.setattr(povfarm, "free_room", free_here)
    room.place.mkdir(exist_ok=True)
    original = Copier.command

    def abort(self: Copier, run: povfarm.Run) -> Command:
        full.append(room.place)
        command = original(self, run)
        return povfarm.replace(command, argv=("/bin/sh", "-c", "kill -ABRT $$"))

    monkeypatch.setattr(Copier, "command", abort)
    room.start()
    wait_until(lambda: full and set(room.farm.states(job)) == {"queued"})
    wait_until(lambda: "the disk is full" in room.worker._trouble)
    assert sum("the disk is full" in text for text in caplog.messages) == 1
    assert {how for tries in room.attempts(job) for _, how in tries} == {"released"}
    wait_until(lambda: not list(room.place.rglob("manifest.json")))  # room is made
    monkeypatch.setattr(Copier, "command", original)
    full.clear()
    wait_until(lambda: room.farm.state(job) == "done")
    assert {task.tries for task in room.farm.tasks(job)} == {0}
    room.end()


def test_a_disk_that_was_full_when_the_renderer_began_costs_no_try(
        room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    job = room.farm.submit(frames=1)
    free, original = povfarm.free_room, Copier.command
    looks: List[Path] = []

    def free_here(place: Path) -> int:
        """There is room again before anybody looks a second time."""
        if place.name.startswith("run-") and not looks:
            looks.append(place)
            return -1
        return free(place)

    def abort(self: Copier, run: povfarm.Run) -> Command:
        command = original(self, run)
        return command if looks else povfarm.replace(command, argv=("/bin/sh", "-c", "exit 1"))

    monkeypatch.setattr(povfarm, "free_room", free_here)
    monkeypatch.setattr(Copier, "command", abort)
    room.start()
    wait_until(lambda: room.farm.state(job) == "done")
    assert [how for tries in room.attempts(job) for _, how in tries] == ["released", "done"]
    assert {task.tries for task in room.farm.tasks(job)} == {0}
    room.end()


@pytest.mark.parametrize("where", ["mkdtemp", "copyfile", "write_bytes"])
def test_an_error_that_says_full_costs_no_try(
        where: str, room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota does not show in what is free."""
    job = room.farm.submit(frames=2)
    if where == "copyfile":
        room.worker.cache._near = room.farm.store.blob_path
    owner: Any = {"mkdtemp": povfarm.tempfile, "copyfile": povfarm.shutil, "write_bytes": Path}[where]
    failed = threading.Event()
    original = getattr(owner, where)

    def fail(*args: Any, **options: Any) -> Any:
        if where == "mkdtemp" and "out-" in options["prefix"]:
            return original(*args, **options)
        failed.set()
        raise OSError(povfarm.errno.EDQUOT, "Disk quota exceeded")

    if where == "write_bytes":
        command = Copier.command
        monkeypatch.setattr(Copier, "command", lambda self, run: povfarm.replace(
            command(self, run), files={run.place / "povfarm.ini": "x"}))
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fail)
        room.start()
        assert failed.wait(60)
        wait_until(lambda: set(room.farm.states(job)) == {"queued"} and room.worker._trouble)
    room.clock.skipped += 61
    wait_until(lambda: room.farm.state(job) == "done")
    assert {task.tries for task in room.farm.tasks(job)} == {0}
    room.end()


def test_a_coordinator_that_cannot_be_reached_is_not_the_scenes_fault(room: Room) -> None:
    job = room.farm.submit(frames=1)
    gone: List[Call] = []

    def away(call: Call) -> bool:
        """For the first time that the project is asked for, and long enough to give that up."""
        if "/manifests/" in call.target and not gone:
            room.clock.skipped += 301
            gone.append(call)
            return True
        return False

    room.wire.away = away
    room.start()
    wait_until(lambda: room.farm.state(job) == "done")
    assert gone and room.farm.tasks(job)[0].tries == 0
    assert [how for _, how in room.attempts(job)[0]] == ["released", "done"]
    room.end()


def test_an_image_that_is_damaged_on_its_way_is_sent_again(room: Room) -> None:
    job = room.farm.submit(frames=3)
    damaged: List[Call] = []
    exchange = room.wire.exchange

    def damage(call: Call) -> Answer:
        if call.method == "PUT" and len(damaged) < 3:
            text, image = call.body
            assert isinstance(text, bytes)
            damaged.append(call)
            # In the log in front of the picture: nothing else would notice it.
            call = povfarm.replace(call, body=(bytes([text[0] ^ 4]) + text[1:], image))
        return exchange(call)

    room.wire.exchange = damage  # type: ignore[method-assign]
    room.start()
    wait_until(lambda: room.farm.state(job) == "done")
    assert room.wire.uploads.count(503) == 3
    assert {len(attempts) for attempts in room.attempts(job)} == {1}
    room.end()


def test_a_mistake_of_the_workers_own_is_told_and_holds_up_nothing(
        room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    job = room.farm.submit(frames=1, retry_limit=1)
    monkeypatch.setattr(Copier, "command", lambda *_: 1 / 0)
    room.start()
    wait_until(lambda: room.farm.state(job) == "failed")
    with room.farm.store.read() as tx:
        failure = tx.first_failure(job)
    assert failure is not None and "division by zero" in failure.message
    wait_until(lambda: not room.worker._runs and not room.worker._held)
    room.end()


def test_a_worker_whose_launcher_was_killed_hands_back_and_ends(room: Room) -> None:
    job = room.farm.submit(frames=2)
    room.worker._launcher.gone = True
    room.worker._launcher.start = lambda *_: (_ for _ in ()).throw(  # type: ignore[method-assign]
        povfarm.FarmError(povfarm.LAUNCHER_GONE))
    with pytest.raises(povfarm.FarmError, match="start the worker again"):
        room.worker.run()
    assert room.farm.states(job) == ["queued"] * 2
    assert {task.tries for task in room.farm.tasks(job)} == {0}


def test_what_is_finished_is_delivered_after_the_launcher_was_killed(room: Room) -> None:
    first = room.farm.submit(frames=2)
    room.wire.away = lambda call: call.method == "PUT"
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(room.worker.run)
        wait_until(lambda: len(room.waiting()) == 2)
        room.worker._launcher.gone = True
        room.worker._launcher.start = lambda *_: (_ for _ in ()).throw(  # type: ignore[method-assign]
            povfarm.FarmError(povfarm.LAUNCHER_GONE))
        second = room.farm.submit(frames=40)  # in several runs at once
        wait_until(room.worker._stopping.is_set)
        wait_until(lambda: not room.worker._runs)
        room.wire.away = lambda call: False
        room.worker.client.hurry()
        with pytest.raises(povfarm.FarmError, match="start the worker again"):
            ended.result(20)
    assert room.farm.state(first) == "done" and room.wire.uploads == [200] * 2
    assert set(room.farm.states(second)) == {"queued"}


class Sleeper(Copier):
    """Begins with its first frame, and then does nothing for ever."""

    def command(self, run: povfarm.Run) -> Command:
        script = "echo Rendering frame 1 of 1; exec sleep 1000"
        return povfarm.replace(super().command(run), argv=("/bin/sh", "-c", script))


@pytest.mark.parametrize(("timeout", "passes", "words"), [
    (40, 41, "longer than 40 s .see --frame-timeout"),
    (0, povfarm.HANG_TIME + 1, "POV-Ray did nothing for 10:00"),
])
def test_a_renderer_that_takes_too_long_or_does_nothing_is_ended(
        timeout: int, passes: float, words: str, room: Room) -> None:
    job = room.farm.submit(frames=1, frame_timeout=timeout, retry_limit=1)
    room.worker.engine = Sleeper("", "3.7", ())
    room.start()
    wait_until(lambda: any(run.process and run.process.pid for run in room.worker._watched))
    time.sleep(1.5)  # longer than somebody takes to look
    assert room.farm.state(job) == "active"
    room.clock.skipped += passes
    wait_until(lambda: room.farm.state(job) == "failed")
    with room.farm.store.read() as tx:
        failure = tx.first_failure(job)
    assert failure is not None and re.search(words, failure.message)
    assert not room.worker._watched
    room.end()


def test_a_renderer_that_computes_without_a_word_is_left_alone(room: Room) -> None:
    """Parsing or photons may take hours, without any progress."""
    job = room.farm.submit(frames=1)
    runs: List[Any] = []
    cpu = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(povfarm.Process, "cpu_now", lambda _: cpu[0])
        room.worker.engine = Sleeper("", "3.7", ())
        room.start()
        wait_until(lambda: room.worker._watched)
        runs += room.worker._watched
        for _ in range(4):
            cpu[0] += 0.03 * povfarm.HANG_TIME
            assert runs[0].why_overdue() == ""
            room.clock.skipped += 0.9 * povfarm.HANG_TIME
        assert room.farm.state(job) == "active" and not runs[0].overdue
        room.clock.skipped += 0.9 * povfarm.HANG_TIME
        wait_until(lambda: room.farm.states(job) == ["failed"] or room.farm.tasks(job)[0].tries)
    room.worker.stop()
    room.worker.stop()
    room.end()


def test_frames_are_delivered_from_a_disk_that_lets_nothing_be_deleted(
        room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if "-out-" in str(path.parent):
            raise OSError(errno.EROFS, "Read-only file system")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    job = room.farm.submit(frames=5)
    room.start()
    wait_until(lambda: room.farm.state(job) == "done")
    room.end()


def test_a_beat_that_is_refused_is_not_repeated_without_a_pause(
        room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: List[Any] = []
    handle = room.farm.router.handle

    def refuse(request: povfarm.Request) -> povfarm.Response:
        if request.path != "/api/v1/beat":
            return handle(request)
        beats.append(request)
        return povfarm.json_response({"error": "no"}, 500)

    monkeypatch.setattr(povfarm, "BEAT_WAIT", 3600.0)
    monkeypatch.setattr(room.farm.router, "handle", refuse)
    job = room.farm.submit(frames=1)
    room.worker.engine = Sleeper("", "3.7", ())
    room.start()
    wait_until(lambda: beats)
    time.sleep(0.5)  # longer than it takes to send another
    assert len(beats) == 1
    assert room.farm.state(job) == "active"
    room.worker.stop()
    room.end()


def test_a_worker_that_is_stopped_while_it_fetches_a_project_ends(room: Room) -> None:
    """It has begun nothing: the coordinator may have gone meanwhile, and is not waited for."""
    job = room.farm.submit(frames=1)
    asked = threading.Event()

    def away(call: Call) -> bool:
        if "/manifests/" in call.target:
            asked.set()
        return "/manifests/" in call.target

    room.wire.away = away
    room.start()
    assert asked.wait(60)
    room.worker.stop()
    room.thread.join(60)
    assert not room.thread.is_alive() and room.farm.states(job) == ["queued"]
    room.end()


def test_a_render_that_takes_longer_than_it_looked_ends_a_minute_after_the_stop(room: Room) -> None:
    job = room.farm.submit(frames=1)
    room.worker.engine = Sleeper("", "3.7", ())
    room.start()
    wait_until(lambda: any(run.process and run.process.pid for run in room.worker._watched))
    room.worker.stop()
    room.thread.join(2.5)  # longer than somebody takes to look
    assert room.thread.is_alive()
    room.clock.skipped += povfarm.PATIENCE
    room.thread.join(60)
    assert not room.thread.is_alive() and room.farm.states(job) == ["queued"]
    room.end()


def test_what_cannot_be_handed_in_does_not_hold_up_a_worker_that_ends_at_once(
        room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    handing_in, gone = threading.Event(), threading.Event()
    monkeypatch.setattr(povfarm, "_hand_in", lambda *_: handing_in.set() or gone.wait(60))
    room.farm.submit(frames=1)
    room.worker.engine = Sleeper("", "3.7", ())
    room.start()
    wait_until(lambda: any(run.process and run.process.pid for run in room.worker._watched))
    room.worker.stop()
    room.worker.stop()
    assert handing_in.wait(60)
    room.thread.join(2.5)  # longer than somebody takes to look
    assert room.thread.is_alive()
    room.clock.skipped += povfarm.HAND_IN_TIME
    room.thread.join(60)
    assert not room.thread.is_alive()
    gone.set()
    room.end()


def test_to_stop_twice_ends_a_worker_whose_coordinator_is_gone(
        room: Room, caplog: pytest.LogCaptureFixture) -> None:
    room.farm.submit(frames=2)
    gone = threading.Event()
    room.wire.away = lambda call: gone.is_set() or (call.method == "PUT" and not gone.set())
    room.start()
    wait_until(lambda: len(room.waiting()) >= 1 and gone.is_set())
    room.worker.stop()
    room.thread.join(0.3)
    assert room.thread.is_alive()  # it keeps what is finished
    room.clock.skipped += 10
    wait_until(lambda: any("gives them up" in text for text in caplog.messages))
    room.worker.stop()
    room.thread.join(60)
    assert not room.thread.is_alive()
    assert list(room.place.iterdir()) == [room.place / "cache"]
