"""WORKER: how many runs to keep going, and the cache of projects."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

import povfarm
from helpers.farm_in_a_box import FakeClock
from helpers.standin import STATE_HEADER, make_block
from povfarm import (
    Cache,
    Cost,
    FarmError,
    FileEntry,
    LeaseSpec,
    Manifest,
    Pace,
    PovJob,
    Reply,
    Run,
    RunState,
    TaskKind,
    TaskSpec,
    UserError,
    lease_size,
)


class FakeRun:
    """A run whose duty so far is given."""

    def __init__(self, job: int = 1, threads: int = 1, so_far: float = 0.5) -> None:
        self.job, self.threads, self._so_far = job, threads, so_far

    def duty_so_far(self) -> float:
        """What it looks like until its job was measured."""
        return self._so_far


LOTS = 10**12


def test_frames_that_only_sleep_get_many_processes() -> None:
    pace = Pace(2)
    pace.measured(1, 6, cpu=0.15, wall=1.9, threads=1)
    assert pace.more_runs([FakeRun()] * 4, LOTS) >= 12


def test_heavy_frames_get_a_process_a_core() -> None:
    pace = Pace(4)
    pace.measured(1, 1, cpu=60, wall=60.5, threads=1)
    assert pace.more_runs([FakeRun()] * 4, LOTS) == 0
    assert pace.more_runs([FakeRun()] * 3, LOTS) == 1


def test_runs_that_sleep_half_of_the_time_get_more_than_two_a_core() -> None:
    """Four of them would leave a core idle, by chance, for a fifth of the time."""
    pace = Pace(2)
    pace.measured(1, 1, cpu=0.52, wall=1.04, threads=1)
    assert pace.more_runs([FakeRun()] * 4, LOTS) in (2, 3)


def test_waiting_for_a_core_is_not_taken_for_sleep() -> None:
    """Eight runs on two cores take four times as long: that is no reason to start more."""
    pace = Pace(2)
    pace.measured(1, 1, cpu=20, wall=80, threads=1)
    assert pace.more_runs([FakeRun()] * 2, LOTS) == 0


def test_a_still_on_every_core_leaves_no_room() -> None:
    pace = Pace(8)
    assert pace.more_runs([FakeRun(threads=8, so_far=1.0)], LOTS) == 0


def test_memory_holds_the_runs_down() -> None:
    pace = Pace(4)
    pace.measured(1, 6, cpu=0.15, wall=1.9, threads=1)
    pace.measured_memory(1, 1000)
    assert pace.more_runs([FakeRun()] * 2, free_memory=2600) == 2
    assert pace.more_runs([FakeRun()] * 2, free_memory=100) == 0


def test_the_number_of_runs_is_bounded() -> None:
    pace = Pace(2)
    pace.measured(1, 1, cpu=0.0, wall=1.0, threads=1)
    assert pace.more_runs([FakeRun()] * 30, LOTS) == 2
    assert pace.more_runs([FakeRun()] * 32, LOTS) == 0


@pytest.mark.parametrize(("queued", "slots", "cpu", "size"), [
    (100, 4, None, 1),  # nothing is known yet
    (130, 24, 0.04, 6),  # as cheap as a start: all of the fair share
    (20, 20, 0.04, 1),
    (300, 4, 0.3, 18),
    (1000, 4, 0.3, 18),  # ten seconds of it
    (1000, 4, 60.0, 1),
    (8, 4, 1.0, 1),  # half of the fair share, to even out at the end
    (1, 50, 0.01, 1),
    (0, 0, 0.01, 1),
])
def test_how_many_frames_a_run_gets(
        queued: int, slots: int, cpu: Any, size: int) -> None:
    assert lease_size(queued, slots, None if cpu is None else Cost(cpu, cpu)) == size


class FakeCoordinator:
    """Hands out manifests and blobs, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.blobs: Dict[str, bytes] = {}
        self.manifests: Dict[str, Manifest] = {}
        self.asked: List[str] = []

    def project(self, files: Dict[str, bytes], late: Dict[str, int]) -> str:
        """Add a project; ``late`` files are for frames after a number. Returns its key."""
        entries = []
        for path, data in sorted(files.items()):
            sha256 = hashlib.sha256(data).hexdigest()
            self.blobs[sha256] = data
            entries.append(FileEntry(path, sha256, len(data), 1e9 + len(data), late.get(path)))
        manifest = Manifest(tuple(entries))
        self.manifests[manifest.key] = manifest
        return manifest.key

    def request(self, method: str, path: str, **options: Any) -> Reply:
        """Answer like the API."""
        import json
        manifest = self.manifests[path.rpartition("/")[2]]
        return Reply(200, {}, json.dumps(manifest.to_wire()).encode())

    def download(self, path: str, to: Path, sha256: str, **options: Any) -> None:
        """Answer like the API."""
        self.asked.append(sha256)
        to.write_bytes(self.blobs[sha256])


@pytest.fixture
def farm() -> FakeCoordinator:
    """A coordinator in memory."""
    return FakeCoordinator()


def test_a_project_is_fetched_once_and_only_what_changed(
        farm: FakeCoordinator, tmp_path: Path) -> None:
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    first = farm.project({"a.pov": b"a", "sub/ä b.inc": b"b", "big.png": b"c" * 1000}, {})
    for _ in range(2):
        with cache.project(first, 1) as (tree, directories, _, reads):
            assert (tree / "sub" / "ä b.inc").read_bytes() == b"b"
            assert directories == {".", "sub"} and reads == (str(tree),)
    assert len(farm.asked) == 3
    second = farm.project({"a.pov": b"new", "sub/ä b.inc": b"b", "big.png": b"c" * 1000}, {})
    with cache.project(second, 1) as (tree, *_):
        assert (tree / "a.pov").read_bytes() == b"new"
    assert len(farm.asked) == 4
    again: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    with again.project(second, 1):
        assert len(farm.asked) == 4


@pytest.mark.parametrize("near", [False, True])
def test_files_have_the_times_that_they_had_where_they_come_from(
        farm: FakeCoordinator, tmp_path: Path, near: bool) -> None:
    key = farm.project({"a.pov": b"1", "sub/b.inc": b"22", "c.inc": b"333"}, {})
    for name, data in ((hashlib.sha256(data).hexdigest(), data) for data in farm.blobs.values()):
        (tmp_path / name).write_bytes(data)
    cache: Any = Cache(tmp_path / "cache", 10**9, farm,  # type: ignore[arg-type]
                       tmp_path.joinpath if near else None)
    with cache.project(key, 1) as (tree, *_):
        assert {path.name: path.stat().st_mtime for path in tree.rglob("*.*")} == {
            "a.pov": 1e9 + 1, "b.inc": 1e9 + 2, "c.inc": 1e9 + 3}


@pytest.mark.parametrize("time", [1e18, -1e18, 2.0**62])
def test_a_time_that_no_file_can_have_stops_nothing(
        farm: FakeCoordinator, tmp_path: Path, time: float) -> None:
    key = farm.project({"a.pov": b"1"}, {})
    entry = dataclasses.replace(farm.manifests[key].files[0], mtime=time)
    farm.manifests[key] = Manifest((entry,))
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    with cache.project(key, 1) as (tree, *_):
        assert (tree / "a.pov").read_bytes() == b"1"


def test_projects_are_deleted_that_their_farm_has_no_more(
        farm: FakeCoordinator, tmp_path: Path) -> None:
    ours, theirs = (Cache(tmp_path, 10**9, farm, farm=name)  # type: ignore[arg-type]
                    for name in ("ours", "theirs"))
    keys = [farm.project({"a.pov": bytes([number])}, {}) for number in range(4)]
    for cache, key in ((ours, 0), (ours, 1), (ours, 2), (theirs, 2), (theirs, 3)):
        with cache.project(keys[key], 1):
            pass
    assert sorted(ours.known()) == sorted(keys[:3]) and sorted(theirs.known()) == sorted(keys[2:])
    (tmp_path / "other").mkdir()
    with ours.project(keys[1], 1):  # it is in use
        ours.forget([*keys, "../other", "other", "0" * 64])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {keys[1], keys[2], keys[3], "other"}  # the third is of another farm, too
    assert ours.known() == [keys[1]] and sorted(theirs.known()) == sorted(keys[2:])
    ours.forget([keys[1]])
    theirs.forget([keys[2]])
    assert {path.name for path in tmp_path.iterdir()} == {keys[3], "other"}
    with ours.project(keys[0], 1) as (tree, *_):  # as if it had never been here
        assert (tree / "a.pov").read_bytes() == bytes([0]) and ours.known() == [keys[0]]


def test_files_of_later_frames_come_when_they_are_needed(
        farm: FakeCoordinator, tmp_path: Path) -> None:
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    key = farm.project({"a.pov": b"a", "critters/c.inc": b"c"}, {"critters/c.inc": 100})
    with cache.project(key, 100) as (tree, *_):
        assert not (tree / "critters" / "c.inc").exists()
    with cache.project(key, 101) as (tree, *_):
        assert (tree / "critters" / "c.inc").exists()


def test_a_damaged_file_of_the_cache_is_fetched_again(
        farm: FakeCoordinator, tmp_path: Path) -> None:
    key = farm.project({"a.pov": b"good"}, {})
    for _ in range(2):
        cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
        with cache.project(key, 1) as (tree, *_):
            assert (tree / "a.pov").read_bytes() == b"good"
        (tree / "a.pov").write_bytes(b"evil")
    assert len(farm.asked) == 2


def test_no_file_is_fetched_that_would_fill_the_disk(
        farm: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    monkeypatch.setattr(povfarm, "free_room", lambda place: 100)
    with cache.project(farm.project({"a.pov": b"a" * 100}, {}), 1):
        pass
    with pytest.raises(OSError) as error, cache.project(farm.project({"a.pov": b"a" * 101}, {}), 1):
        pass
    assert povfarm.takes_nothing(error.value)  # so the frame is handed back, and no try lost
    assert len(farm.asked) == 1


def test_the_cache_stays_within_its_size_but_keeps_what_is_used(
        farm: FakeCoordinator, tmp_path: Path) -> None:
    cache: Any = Cache(tmp_path, 2500, farm)  # type: ignore[arg-type]
    keys = [farm.project({"a.pov": bytes([n]) * 2000}, {}) for n in range(3)]
    with cache.project(keys[0], 1):
        with cache.project(keys[1], 1):
            pass
        with cache.project(keys[2], 1):
            assert {path.name for path in tmp_path.iterdir()} == {keys[0], keys[2]}


@pytest.mark.parametrize("key", ["../../etc", "", "A" * 64, "0" * 63])
def test_a_project_key_is_no_path(farm: FakeCoordinator, tmp_path: Path, key: str) -> None:
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    with pytest.raises(UserError), cache.project(key, 1):
        pass


def test_threads_share_one_fetch(farm: FakeCoordinator, tmp_path: Path) -> None:
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    key = farm.project({"a.pov": b"a", "b.inc": b"b"}, {})
    errors: List[FarmError] = []

    def use() -> None:
        try:
            with cache.project(key, 1) as (tree, *_):
                assert (tree / "b.inc").exists()
        except FarmError as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(farm.asked) == 2


def test_a_project_that_comes_slowly_holds_up_no_other(
        farm: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    slow, here = farm.project({"slow.pov": b"s"}, {}), farm.project({"here.pov": b"h"}, {})
    with cache.project(here, 1):
        pass
    coming, come = threading.Event(), threading.Event()

    def download(path: str, to: Path, sha256: str, **options: Any) -> None:
        coming.set()
        assert come.wait(60)
        to.write_bytes(farm.blobs[sha256])

    def use(key: str) -> None:
        with cache.project(key, 1) as (tree, *_):
            assert len(list(tree.iterdir())) == 1
        cache.empty()

    monkeypatch.setattr(farm, "download", download)
    threads = [threading.Thread(target=use, args=(key,)) for key in (slow, here)]
    threads[0].start()
    assert coming.wait(60)
    threads[1].start()
    threads[1].join(60)
    assert not threads[1].is_alive() and threads[0].is_alive()
    assert [path.name for path in tmp_path.iterdir()] == [slow]
    come.set()
    threads[0].join(60)
    assert not threads[0].is_alive() and not list(tmp_path.iterdir())


def test_what_another_project_has_is_looked_at_when_it_is_copied(
        farm: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That project may just be deleted, or its file be on its way."""
    cache: Any = Cache(tmp_path, 10**9, farm)  # type: ignore[arg-type]
    keys = [farm.project({"a.pov": b"a", "b.inc": b"same", "c.inc": name}, {})
            for name in (b"1", b"2")]
    with cache.project(keys[0], 1):
        pass
    whole = povfarm.shutil.copyfile

    def copy(source: Path, to: Path) -> None:
        if source.name == "b.inc":
            to.write_bytes(b"half")
        elif source.name == "a.pov":
            raise FileNotFoundError(source)
        else:
            whole(source, to)

    monkeypatch.setattr(povfarm.shutil, "copyfile", copy)
    with cache.project(keys[1], 1) as (tree, *_):
        assert [(tree / name).read_bytes() for name in ("a.pov", "b.inc", "c.inc")] == [
            b"a", b"same", b"2"]


# --- how long a render still takes

@pytest.mark.parametrize(("done", "percent", "left"), [
    (0, 0, 10.0),  # it is not known: as long again
    (0, 20, 40.0),
    (80, 80, 10.0),
    (80, 85, 30.0),  # it goes on from where another stopped: 5 % took ten seconds
])
def test_how_long_a_render_still_takes(done: int, percent: int, left: float) -> None:
    class Clock(povfarm.Clock):
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    lease = LeaseSpec("ab", 1, "job", 1, (TaskSpec(7, 0, "a.png"),), "0" * 64,
                      PovJob({}, (), (), "."), False)
    run = RunState(lease, clock)
    run.text = povfarm.PovText(done)
    run.text.percent, clock.now = percent, 10.0
    assert run.left() == left


# --- a slice of which others have taken the lower rows

@pytest.mark.parametrize(("percent", "rows", "cut"), [
    (66, 8, True),  # of 12 rows: POV-Ray rounds down
    (66, 4, False),  # one thread may be ahead of another
    (33, 4, False),
    (99, 12, False),  # then it is not worth stopping any more
])
def test_a_slice_ends_when_its_rows_are_there(
        tmp_path: Path, percent: int, rows: int, cut: bool) -> None:
    rows_a_block, width = 4, 4
    task = TaskSpec(7, 0, "a.png", TaskKind.SLICE, 0, 12)
    pov = PovJob({"Input_File_Name": "a.pov", "Width": str(width), "Height": "16",
                  "Output_File_Type": "N", "Render_Block_Size": str(rows_a_block)}, (), (), ".")
    plan = Run(LeaseSpec("ab", 1, "job", 1, (task,), "0" * 64, pov, False), tmp_path, tmp_path,
               (0,))
    blocks = [make_block(number, top, top + rows_a_block, width)
              for number, top in enumerate(range(0, rows, rows_a_block))]
    plan.state.write_bytes(STATE_HEADER + b"".join(blocks))
    run = RunState(plan.lease, povfarm.Clock())
    run.text.percent, run.bottoms = percent, {task.id: 8}
    run.look_again = math.inf
    assert not run.is_cut(plan)
    run.look_again = 0.0
    assert run.is_cut(plan) is cut
    looked = percent == 66
    assert (run.look_again > 0) is looked


def test_what_was_said_before_a_run_was_shortened_counts_no_more(tmp_path: Path) -> None:
    """Not even when POV-Ray has just deleted its state, and all rows are rendered again."""
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "4", "Height": "16", "Final_Frame": "2",
                  "Output_File_Type": "N", "Render_Block_Size": "4"}, (), (), ".")
    tasks = (TaskSpec(6, 1, "a1.png"), TaskSpec(7, 2, "a2.png"))
    plan = Run(LeaseSpec("ab", 1, "job", 1, tasks, "0" * 64, pov, False), tmp_path, tmp_path, (1, 2))
    run = RunState(plan.lease, povfarm.Clock())
    run.bottoms, run.open = {7: 8}, {2: tasks[1]}
    for line in ("Rendering frame 2 of 2 (#2)", "Rendered 53 of 64 pixels (83%)\r",
                 "Trace Time: 3 seconds"):
        run.text.feed(line)
    shorter = run.shortened(plan)
    assert shorter.region.bottom == run.open[2].bottom == 8 and run.cut
    assert not run.text.traced and run.text.percent == 0
    assert run.task.id == 7 and run.progress() == {"7": 1.0}


# --- what a killed worker leaves, and what a full disk does not take

@pytest.mark.parametrize(("code", "says", "free", "now", "lacked"), [
    (-6, "what(): Cannot access data in file.", 1_000_000, 1_000_000, True),  # another run is gone
    (-6, "what(): Cannot access data in file.", 1 << 32, -1, True),
    (-6, "what(): Cannot access data in file.", 1 << 32, 1 << 32, False),
    (1, "Parse Error: Expected 'object'", 1_000_000, 1_000_000, False),
    (1, "Parse Error: Expected 'object'", 1_000_000, -1, True),
    (0, "", 1_000_000, 1_000_000, False),
])
def test_a_renderer_that_failed_where_room_is_short_is_not_to_blame(
        code: int, says: str, free: int, now: int, lacked: bool) -> None:
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "800", "Height": "600"}, (), (), ".")
    task = TaskSpec(7, 1, "a.png")
    run = RunState(LeaseSpec("ab", 1, "job", 1, (task,), "0" * 64, pov, False), povfarm.Clock())
    run.text.feed(says)
    run.ended, run.free = povfarm.Ended(code, 1.0, 1), free
    assert run.lacked_room(now) is lacked
    if lacked and now > 0:  # for one of them there is room, for both there is not
        run.free = run_needs = povfarm.PIXEL_SIZE * 800 * 600
        assert not run.lacked_room(run_needs)
        run.crowd = 2
        assert run.lacked_room(run_needs)


def test_files_that_came_by_half_go_when_their_worker_was_killed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    tree = tmp_path / "cache" / ("0" * 64) / "tree"
    tree.mkdir(parents=True)
    halves = [place / f".{owner}.7f.part" for place in (tree, tree.parent)
              for owner in (gone.pid, os.getpid(), os.getppid())]
    own = [tree / name for name in ("ball.pov", ".own.part", ".own.2.part")]
    for path in (*halves, *own):
        path.write_text("half")
    povfarm._sweep(tmp_path / "cache")
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {halves[2], halves[5], *own}


def test_a_secret_stays_when_another_cannot_be_written(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    def kept() -> povfarm._Kept:
        return povfarm._Kept(tmp_path, "anna", "f" * 16)

    kept().write("#1:" + "a" * 64, True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError):
            kept().write("#1:" + "b" * 64, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept().key == "#1:" + "a" * 64 and kept().admitted
    assert kept().write("#1:c", False, "ABCDEF") == (False, "ABCDEF")
    assert (kept().key, kept().admitted, kept().code) == ("#1:c", False, "ABCDEF")


def test_a_place_that_is_gone_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker looks once a second, and deletes its place when it ends: one may come late."""
    monkeypatch.setattr(povfarm, "DISK_RESERVE", 1 << 62)
    assert povfarm.nearly_full(tmp_path) and not povfarm.nearly_full(tmp_path / "gone")


# --- several farms in turn

class Turns:
    """Workers of several farms that ask as ``Worker`` does, in a time of its own."""

    def __init__(self, *shares: int) -> None:
        self.clock = FakeClock()
        self.rota = povfarm.Rota(self.clock)
        self.farms: List[Any] = [object() for _ in shares]
        for farm, share in zip(self.farms, shares):
            self.rota.add(farm, share)

    def spend(self, seconds: int, work: Callable[[int, int], bool]) -> List[int]:
        """Let time pass; ``work`` tells whether a farm has some. Return who rendered, by second."""
        spent = []
        for second in range(seconds):
            for number, farm in enumerate(self.farms):
                has = work(number, second)
                if not self.rota.has_turn(farm, busy=False):
                    self.rota.hear(farm, has)
                elif has:
                    spent.append(number)
                else:
                    self.rota.has_nothing(farm)
            self.clock.advance(1)
        return spent


@pytest.mark.parametrize("shares", [(1, 1), (2, 1), (1, 3), (1, 2, 3)])
def test_farms_have_a_computer_for_their_shares_of_the_time(shares: Tuple[int, ...]) -> None:
    turns = Turns(*shares)
    spent = turns.spend(20_000, lambda farm, second: True)
    for farm, share in enumerate(shares):
        assert abs(spent.count(farm) / len(spent) - share / sum(shares)) < 0.02
    lengths = [len(list(group)) for _, group in itertools.groupby(spent)]
    assert min(lengths[:-1]) >= povfarm.TURN - 1  # not by the second: what is begun is to be rendered
    assert len(spent) > 19_600


def test_a_farm_that_has_nothing_keeps_nobody_waiting(shares: Any = (1, 1)) -> None:
    turns = Turns(*shares)
    assert set(turns.spend(1000, lambda farm, second: farm == 1)) == {1}
    spent = turns.spend(1000, lambda farm, second: farm == 0 or second > 500)
    assert len(spent) > 950 and 200 < spent.count(1) < 300  # what it did not use is not made up for
    turns.rota.remove(turns.farms.pop(0))
    assert turns.spend(100, lambda farm, second: True) == [0] * 100  # who is left


def test_a_turn_ends_when_what_was_begun_is_rendered() -> None:
    turns = Turns(1, 1)
    first, second = turns.farms
    assert turns.rota.has_turn(first, busy=False) and not turns.rota.has_turn(second, busy=False)
    turns.clock.advance(povfarm.TURN)
    assert turns.rota.has_turn(first, busy=True)  # nobody else wants it
    turns.rota.hear(second, True)
    assert not turns.rota.has_turn(first, busy=True)  # it begins no more
    assert not turns.rota.has_turn(second, busy=False)  # and has not ended
    assert not turns.rota.has_turn(first, busy=False)
    assert turns.rota.has_turn(second, busy=False)
