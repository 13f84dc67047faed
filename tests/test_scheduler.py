"""The rules of the farm: every change of a task and of a job, leases, retries, order, restarts."""

from __future__ import annotations

import cProfile
import itertools
import pstats
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import pytest

import povfarm
from helpers.anything import Chaos, drive
from helpers.farm_in_a_box import SCENE, Farm, farm_fixture, manifest, pov_job, sha256
from helpers.invariants import broken
from helpers.pictures import png
from povfarm import (
    JOB_TRANSITIONS,
    TRANSITIONS,
    Cost,
    Damaged,
    IllegalTransition,
    ImageError,
    JobOptions,
    JobState,
    LeaseSpec,
    NotFound,
    Offer,
    StaleLease,
    TaskState,
    UserError,
    WorkerInfo,
)

__all__ = ["farm_fixture"]


def leased(farm: Farm, frames: int = 3, **options: Any) -> Tuple[int, int, LeaseSpec]:
    """A worker, a job, and the lease of its first frame."""
    worker, job = farm.worker(), farm.submit(frames, **options)
    return worker, job, farm.lease(worker)


def use_up(farm: Farm, worker: int, frame: int, tries: int = 3) -> LeaseSpec:
    """Fail one frame, which has to be the next, until it is given up."""
    for _ in range(tries):
        lease = farm.lease(worker)
        assert lease.tasks[0].frame == frame
        farm.fail(worker, lease)
    return lease


# --- the changes of a task, each by its name

def test_queued_to_leased_when_a_worker_asks(farm: Farm) -> None:
    _, job, lease = leased(farm)
    assert farm.story(job, 1) == ["leased"] and farm.states(job) == ["leased", "queued", "queued"]
    assert [(task.frame, task.name) for task in lease.tasks] == [(1, "out1.png")]


def test_leased_to_done_when_the_image_comes(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    assert farm.finish(worker, lease) is True
    task = farm.task(job, 1)
    image = png(task.id)
    assert farm.story(job, 1) == ["leased", "done"]
    assert (task.sha256, task.size, task.worker) == (sha256(image), len(image), worker)
    assert (task.cpu, task.wall, task.memory) == (1.0, 1.0, 1 << 20)
    assert (farm.root / "jobs" / f"{job}-ball" / "out1.png").read_bytes() == image


def test_leased_to_queued_when_the_worker_dies(farm: Farm) -> None:
    _, job, _ = leased(farm)
    farm.clock.advance(31)
    farm.scheduler.expire()
    assert farm.story(job, 1) == ["leased", "queued"]
    assert farm.task(job, 1).tries == 0
    assert farm.attempts(farm.task(job, 1).id) == [("anna", "expired")]


def test_leased_to_queued_when_the_worker_hands_it_back(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.scheduler.release(worker, lease.id)
    assert farm.story(job, 1) == ["leased", "queued"] and farm.task(job, 1).tries == 0
    assert farm.attempts(farm.task(job, 1).id) == [("anna", "released")]


def test_leased_to_queued_when_the_worker_leaves(farm: Farm) -> None:
    worker, job, _ = leased(farm)
    farm.scheduler.leave(worker)
    assert farm.story(job, 1) == ["leased", "queued"] and farm.task(job, 1).tries == 0


def test_leased_to_queued_when_the_worker_is_removed(farm: Farm) -> None:
    worker, job, _ = leased(farm)
    farm.scheduler.remove_worker(worker)
    assert farm.story(job, 1) == ["leased", "queued"] and farm.task(job, 1).tries == 0


def test_leased_to_queued_when_a_try_fails(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.fail(worker, lease)
    assert farm.story(job, 1) == ["leased", "queued"] and farm.task(job, 1).tries == 1
    assert farm.attempts(farm.task(job, 1).id) == [("anna", "failed")]


def test_leased_to_failed_when_the_tries_are_used_up(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(1, retry_limit=2)
    use_up(farm, worker, 0, tries=2)
    assert farm.story(job, 0) == ["leased", "queued", "leased", "failed"]


def test_leased_to_cancelled_when_the_job_is_cancelled(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.scheduler.cancel(job)
    assert farm.story(job, 1) == ["leased", "cancelled"]
    assert farm.beat(worker, lease) == [lease.id]


def test_queued_to_cancelled_when_the_job_is_cancelled(farm: Farm) -> None:
    job = farm.submit()
    farm.scheduler.cancel(job)
    assert farm.story(job, 2) == ["cancelled"] and farm.states(job) == ["cancelled"] * 3


def test_queued_to_done_when_a_late_image_comes(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.clock.advance(31)
    farm.scheduler.expire()
    assert farm.finish(worker, lease) is True
    assert farm.story(job, 1) == ["leased", "queued", "done"]
    assert farm.attempts(farm.task(job, 1).id) == [("anna", "done")]


def test_failed_to_done_when_a_late_image_comes(farm: Farm) -> None:
    slow, job, lease = leased(farm, retry_limit=1)
    farm.clock.advance(31)
    farm.scheduler.expire()
    use_up(farm, farm.worker("bert"), 1, tries=1)
    assert farm.task(job, 1).state == "failed"
    assert farm.finish(slow, lease) is True
    assert farm.story(job, 1)[-2:] == ["failed", "done"]


def test_failed_to_queued_when_the_job_is_retried(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(1)
    use_up(farm, worker, 0)
    assert farm.scheduler.retry(job) == 1
    assert farm.story(job, 0)[-2:] == ["failed", "queued"] and farm.task(job, 0).tries == 0
    farm.worker("bert")
    assert farm.lease(worker).tasks[0].frame == 0  # it has all its tries again, on every worker


def test_cancelled_to_queued_when_the_job_is_retried(farm: Farm) -> None:
    job = farm.submit()
    farm.scheduler.cancel(job)
    assert farm.scheduler.retry(job) == 3
    assert farm.story(job, 1) == ["cancelled", "queued"]


def force(farm: Farm, tx: povfarm.Tx, job: int, state: TaskState) -> Any:
    """Put the job's only task into a state by hand; return its row."""
    tx._db.execute("UPDATE task SET state = ? WHERE job = ?", (state.value, job))
    tx.count_task(job, TaskState.QUEUED, state)
    return tx.tasks(job)[0]


class RollBack(Exception):
    """Ends a transaction that is only looked at."""


def test_a_task_takes_the_changes_of_the_table_and_no_others(farm: Farm) -> None:
    job = farm.submit(1)
    for frm, to in itertools.product(TaskState, TaskState):
        right = RollBack if (frm, to) in TRANSITIONS else IllegalTransition
        with pytest.raises((RollBack, IllegalTransition)) as caught, farm.store.tx() as tx:
            farm.scheduler._states.move(tx, force(farm, tx, job, frm), to, "")
            raise RollBack
        assert caught.type is right, (frm, to)
        assert farm.states(job) == ["queued"]


def test_a_job_takes_the_changes_of_the_table_and_no_others(farm: Farm) -> None:
    job = farm.submit(1)
    for frm, to in itertools.product(JobState, JobState):
        right = RollBack if (frm, to) in JOB_TRANSITIONS else IllegalTransition
        with pytest.raises((RollBack, IllegalTransition)) as caught, farm.store.tx() as tx:
            tx._db.execute("UPDATE job SET state = ? WHERE id = ?", (frm.value, job))
            farm.scheduler._states.move_job(tx, tx.job(job), to, "")
            raise RollBack
        assert caught.type is right, (frm, to)


def test_a_change_from_a_state_that_is_no_more_raises(farm: Farm) -> None:
    job = farm.submit(1)
    with pytest.raises(IllegalTransition), farm.store.tx() as tx:
        old = tx.tasks(job)[0]
        farm.scheduler._states.move(tx, old, TaskState.CANCELLED, "")
        farm.scheduler._states.move(tx, old, TaskState.CANCELLED, "")


@pytest.mark.parametrize("table, prefix", [(TRANSITIONS, ""), (JOB_TRANSITIONS, "job_")])
def test_every_change_of_the_table_has_a_test_of_its_name(table: Any, prefix: str) -> None:
    for frm, to in table:
        name = f"test_{prefix}{frm.value}_to_{to.value}_when_"
        assert [test for test in globals() if test.startswith(name)], name


# --- the changes of a job

def test_job_waiting_to_active_when_the_last_file_comes(farm: Farm) -> None:
    files = {"a.pov": b"one", "b.inc": b"two", "c.inc": b"three"}
    job = farm.submit(files=files, send=False)
    for data in files.values():
        assert farm.state(job) == "waiting"
        assert farm.leases(farm.worker(data.decode())) == []
        farm.scheduler.put_blob(sha256(data), [data])
    assert farm.state(job) == "active" and farm.story(job) == ["active"]


def test_job_waiting_to_paused_when_asked(farm: Farm) -> None:
    job = farm.submit(send=False)
    farm.scheduler.pause(job)
    assert farm.story(job) == ["paused"]
    farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    assert farm.state(job) == "paused"


def test_job_waiting_to_cancelled_when_asked(farm: Farm) -> None:
    job = farm.submit(send=False)
    farm.scheduler.cancel(job)
    assert farm.story(job) == ["cancelled"] and farm.states(job) == ["cancelled"] * 3
    farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    assert farm.state(job) == "cancelled"


def test_job_active_to_paused_when_asked(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.scheduler.pause(job)
    assert farm.state(job) == "paused" and farm.leases(worker) == []
    assert farm.beat(worker, lease) == []  # what is being rendered is finished
    assert farm.finish(worker, lease) is True


def test_job_active_to_paused_when_the_first_three_frames_fail(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(100, retry_limit=1)
    for frame in (1, 2, 3):
        assert farm.state(job) == "active"
        use_up(farm, worker, frame, tries=1)
    assert farm.state(job) == "paused" and "failed" in farm.job(job).reason
    assert farm.leases(worker) == []
    farm.scheduler.retry(job)
    assert farm.state(job) == "active" and farm.job(job).reason == ""


def test_job_active_to_done_when_the_last_image_comes(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit()
    assert farm.render(worker, job) == [1, 2, 3]
    assert farm.story(job) == ["active", "done"]
    assert farm.job(job).finished == farm.clock.wall


def test_job_active_to_failed_when_the_last_frame_fails(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(3, retry_limit=1)
    farm.finish(worker, farm.lease(worker))
    farm.finish(worker, farm.lease(worker))
    farm.fail(worker, farm.lease(worker))
    assert farm.story(job) == ["active", "failed"]


def test_job_active_to_cancelled_when_asked(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.finish(worker, lease)
    farm.scheduler.cancel(job)
    assert farm.story(job) == ["active", "cancelled"]
    assert farm.states(job) == ["done", "cancelled", "cancelled"]


def test_a_job_is_done_without_cancelled_frames_which_retry_brings_back(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    assert farm.scheduler.cancel_frames(job, "1-2") == 2
    assert farm.states(job) == ["cancelled", "cancelled", "queued"] and farm.problems() == []
    assert farm.beat(worker, lease) == [lease.id], "it stops"
    assert farm.finish(worker, lease) is False
    with pytest.raises(UserError, match="none of the frames 1-2 of job 1 waits"):
        farm.scheduler.cancel_frames(job, "1-2")
    assert farm.render(worker) == [3] and farm.state(job) == "done"
    assert farm.scheduler.retry(job) == 2 and farm.render(worker) == [1, 2]
    assert farm.story(job) == ["active", "done", "active", "done"]


def test_a_job_of_which_all_frames_are_cancelled_is_cancelled(farm: Farm) -> None:
    job = farm.submit(3, send=False)
    farm.scheduler.cancel_frames(job, "3")
    assert farm.state(job) == "waiting"
    farm.scheduler.cancel_frames(job, "1-3")
    assert farm.state(job) == "cancelled"


def test_job_paused_to_waiting_when_files_are_still_missing(farm: Farm) -> None:
    job = farm.submit(send=False)
    farm.scheduler.pause(job)
    farm.scheduler.resume(job)
    assert farm.story(job) == ["paused", "waiting"]
    farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    assert farm.state(job) == "active"


def test_job_paused_to_active_when_asked(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit()
    farm.scheduler.pause(job)
    farm.scheduler.resume(job)
    assert farm.story(job) == ["active", "paused", "active"]
    assert farm.render(worker) == [1, 2, 3]


def test_job_paused_to_done_when_the_last_image_comes(farm: Farm) -> None:
    worker, job, lease = leased(farm, frames=1)
    farm.scheduler.pause(job)
    farm.finish(worker, lease)
    assert farm.story(job) == ["active", "paused", "done"]


def test_job_paused_to_failed_when_the_last_frame_fails(farm: Farm) -> None:
    worker, job, lease = leased(farm, frames=1, retry_limit=1)
    farm.scheduler.pause(job)
    farm.fail(worker, lease)
    assert farm.story(job) == ["active", "paused", "failed"]


def test_job_paused_to_cancelled_when_asked(farm: Farm) -> None:
    job = farm.submit()
    farm.scheduler.pause(job)
    farm.scheduler.cancel(job)
    assert farm.story(job) == ["active", "paused", "cancelled"]


def test_job_failed_to_active_when_retried(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(1, retry_limit=1)
    use_up(farm, worker, 0, tries=1)
    assert farm.state(job) == "failed" and farm.job(job).finished is not None
    farm.scheduler.retry(job)
    assert farm.state(job) == "active" and farm.job(job).finished is None


def test_job_failed_to_done_when_a_late_image_comes(farm: Farm) -> None:
    slow, job, lease = leased(farm, frames=1, retry_limit=1)
    farm.clock.advance(31)
    farm.scheduler.expire()
    use_up(farm, farm.worker("bert"), 0, tries=1)
    farm.finish(slow, lease)
    assert farm.story(job) == ["active", "failed", "done"]


def test_job_cancelled_to_active_when_retried(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.finish(worker, lease)
    farm.scheduler.cancel(job)
    farm.scheduler.retry(job)
    assert farm.story(job) == ["active", "cancelled", "active"]
    assert farm.render(worker) == [2, 3]  # what was done stays done


def test_job_cancelled_to_waiting_when_retried_before_its_files_came(farm: Farm) -> None:
    job = farm.submit(send=False)
    farm.scheduler.cancel(job)
    farm.scheduler.retry(job)
    assert farm.story(job) == ["cancelled", "waiting"]
    assert farm.leases(farm.worker()) == [] and farm.problems() == []
    farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    assert farm.state(job) == "active"


def in_state(farm: Farm, state: str) -> int:
    """A job of two frames that is in this state."""
    scene = state.encode()
    job = farm.submit(2, {"scene.pov": scene}, retry_limit=1, send=state != "waiting", priority=9)
    worker = farm.worker(state)
    if state == "done":
        farm.render(worker)
    elif state == "failed":
        farm.finish(worker, farm.lease(worker))
        farm.fail(worker, farm.lease(worker))
    elif state in ("paused", "cancelled"):
        getattr(farm.scheduler, {"paused": "pause", "cancelled": "cancel"}[state])(job)
    assert farm.state(job) == state
    return job


@pytest.mark.parametrize("action, becomes", [
    ("pause", {"waiting": "paused", "active": "paused"}),
    ("resume", {"paused": "active"}),
    ("cancel", {"waiting": "cancelled", "active": "cancelled", "paused": "cancelled"}),
    ("retry", {"failed": "active", "cancelled": "active", "waiting": "waiting", "active": "active",
               "paused": "paused", "done": "done"}),
])
def test_steering_a_job_does_what_it_says_or_says_why_not(
        action: str, becomes: Dict[str, str], farm: Farm) -> None:
    steer = getattr(farm.scheduler, action)
    for state in [state.value for state in JobState]:
        job = in_state(farm, state)
        before = farm.job(job)
        if state in becomes:
            steer(job)
            assert farm.state(job) == becomes[state]
        else:
            with pytest.raises(IllegalTransition, match=state):
                steer(job)
            assert farm.job(job) == before
        farm.scheduler.delete(job)


@pytest.mark.parametrize("action", ["pause", "resume", "cancel", "retry", "delete"])
def test_there_is_nothing_to_steer_in_a_job_that_is_not_there(action: str, farm: Farm) -> None:
    with pytest.raises(NotFound, match="no job 99"):
        getattr(farm.scheduler, action)(99)


# --- submitting

def test_a_job_starts_at_once_when_its_files_are_there(farm: Farm) -> None:
    farm.submit(name="first")
    job, missing = farm.scheduler.submit(
        "second", "me", pov_job(), manifest({"scene.pov": SCENE}), JobOptions())
    assert missing == [] and farm.state(job) == "active"


def test_the_same_project_with_one_changed_file_lacks_only_that_one(farm: Farm) -> None:
    files = {f"part{number}.inc": b"%d" % number for number in range(10)}
    farm.submit(files=files)
    changed = {**files, "part3.inc": b"another"}
    job, missing = farm.scheduler.submit("ball", "me", pov_job(), manifest(changed), JobOptions())
    assert missing == [sha256(b"another")]
    farm.scheduler.put_blob(missing[0], [b"another"])
    assert farm.state(job) == "active"


def test_a_file_named_twice_is_asked_for_once(farm: Farm) -> None:
    project = manifest({"a.inc": b"same", "b.inc": b"same"})
    _, missing = farm.scheduler.submit("ball", "me", pov_job(), project, JobOptions())
    assert missing == [sha256(b"same")]
    farm.scheduler.put_blob(missing[0], [b"same"])


def test_one_file_starts_every_job_that_waits_for_it(farm: Farm) -> None:
    jobs = [farm.submit(send=False) for _ in range(3)]
    farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    assert [farm.state(job) for job in jobs] == ["active"] * 3


def test_a_file_under_a_wrong_hash_is_refused(farm: Farm) -> None:
    job = farm.submit(send=False)
    with pytest.raises(Damaged):
        farm.scheduler.put_blob(sha256(SCENE), [b"another text"])
    assert farm.state(job) == "waiting"


def test_a_file_that_nobody_asked_for_is_refused(farm: Farm) -> None:
    with pytest.raises(NotFound):
        farm.scheduler.put_blob(sha256(b"spam"), [b"spam"])
    assert not farm.store.blob_path(sha256(b"spam")).exists()


@pytest.mark.parametrize("values", [
    {"Initial_Frame": "5", "Final_Frame": "2"},
    {"Output_File_Name": "out1", "Final_Frame": "5", "Subset_Start_Frame": "2",
     "Subset_End_Frame": "12"},  # frames 2 and 12 would both be out12.png
    {"Output_File_Name": "stderr"},
    {"Output_File_Name": "a\\b"}, {"Output_File_Name": "a\tb"},  # the farm could not store them
    {"Output_File_Name": "x" * 300},
], ids=repr)
def test_a_job_that_can_have_no_pictures_is_refused(values: Dict[str, str], farm: Farm) -> None:
    with pytest.raises(UserError):
        farm.submit(3, values=values)
    with farm.store.read() as tx:
        assert tx.jobs(0, -1) == []


def test_images_keep_the_names_of_pov_ray_without_its_directories(farm: Farm) -> None:
    job = farm.submit(12, values={"Output_File_Name": "pics/frame_"})
    names = [task.name for task in farm.tasks(job)]
    assert names[0] == "frame_01.png" and names[-1] == "frame_12.png"


# --- leases

def test_a_lease_has_all_that_a_worker_needs(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(3, name="böll")
    lease = farm.lease(worker)
    assert (lease.job, lease.job_name, lease.in_order) == (job, "böll", False)
    assert lease.pov == pov_job(3)
    assert lease.manifest == manifest({"scene.pov": SCENE}).key
    assert len(lease.id) >= 32
    assert povfarm.LeaseSpec.from_wire(lease.to_wire()) == lease


def test_leases_grow_with_what_was_measured_and_shrink_at_the_end(farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(40)
    sizes = []
    while True:
        leases = farm.leases(worker)
        if not leases:
            break
        sizes.append(len(leases[0].tasks))
        for index in range(sizes[-1]):
            farm.finish(worker, leases[0], index, cpu=0.5)
    assert sizes[0] == 1 and max(sizes) >= 6 and sizes[-1] == 1
    assert sum(sizes) == 40


def test_a_lease_is_a_run_of_neighbours(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(90)
    first, second = farm.lease(bert, slots=4), farm.lease(anna, slots=4)
    farm.scheduler.release(bert, first.id)
    for index in range(len(second.tasks)):
        farm.finish(anna, second, index, cpu=0.01)
    assert farm.states(job)[:4] == ["queued", "done", "done", "queued"]
    assert [task.frame for task in farm.lease(anna).tasks] == [1]
    frames = [task.frame for task in farm.lease(anna).tasks]
    assert frames == list(range(4, 4 + len(frames))) and len(frames) > 1


def test_neighbours_of_every_second_frame_are_two_apart(farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(201, values={"Frame_Step": "2"})
    farm.finish(worker, farm.lease(worker), cpu=0.01)
    frames = [task.frame for task in farm.lease(worker).tasks]
    assert frames[:3] == [3, 5, 7]


def test_a_worker_gets_as_many_runs_as_it_wants(farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(10)
    leases = farm.leases(worker, want=4, slots=4)
    assert [lease.tasks[0].frame for lease in leases] == [1, 2, 3, 4]
    assert len({lease.id for lease in leases}) == 4
    assert farm.leases(worker, want=0) == []


def test_leases_expire_by_monotonic_time_and_not_by_the_wall_clock(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    for jump in (86400.0, -10 * 86400.0):
        farm.clock.wall += jump
        farm.scheduler.expire()
        assert farm.states(job)[0] == "leased" and farm.beat(worker, lease) == []
    farm.clock.mono += 29.9
    farm.scheduler.expire()
    assert farm.states(job)[0] == "leased"
    farm.clock.mono += 0.2
    farm.scheduler.expire()
    assert farm.states(job)[0] == "queued"


def test_a_jump_of_the_wall_clock_makes_no_stragglers(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(2)
    farm.finish(anna, farm.lease(anna))
    farm.lease(anna)
    farm.clock.wall += 86400
    assert farm.leases(bert) == []
    farm.clock.wall -= 2 * 86400
    farm.clock.mono += 6
    assert farm.leases(bert) != []


def test_a_beat_keeps_a_lease_alive(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    for _ in range(10):
        farm.clock.advance(20)
        assert farm.beat(worker, lease) == []
        farm.scheduler.expire()
    assert farm.states(job)[0] == "leased"


@pytest.mark.parametrize("lease_time", [1.0, 6.0, 30.0])
def test_a_beat_that_is_held_open_keeps_its_lease_alive(lease_time: float, tmp_path: Path) -> None:
    farm = Farm(tmp_path, lease_time=lease_time)
    worker, job, lease = leased(farm)
    farm.clock.housekeeping = farm.scheduler.expire
    for _ in range(3):
        assert farm.beat(worker, lease, wait=20) == []
    assert farm.states(job)[0] == "leased"


def test_a_poll_that_is_held_open_keeps_its_worker_alive(tmp_path: Path) -> None:
    farm = Farm(tmp_path, lease_time=10)
    worker, seen = farm.worker(), []
    farm.clock.housekeeping = lambda: seen.append(farm.scheduler.live_workers())
    assert farm.leases(worker, wait=25) == []
    assert seen and all(live == {worker} for live in seen)


def test_a_beat_tells_of_leases_that_ended_or_are_not_its_workers(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(3)
    mine, other = farm.lease(anna), farm.lease(bert)
    assert farm.beat(anna, mine, other) == [other.id]
    assert farm.scheduler.beat(anna, {"no such lease": {}}, 0)[0] == ["no such lease"]
    farm.clock.advance(20)
    farm.beat(anna, mine, other)
    farm.clock.advance(20)
    farm.scheduler.expire()  # bert's is over: anna's beats did nothing for it
    assert farm.states(job)[:2] == ["leased", "queued"]
    assert farm.beat(bert, other) == [other.id]


def test_a_beat_is_answered_at_once_when_a_lease_ends(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    start = farm.clock.mono
    assert farm.beat(worker, lease, wait=2) == []
    assert farm.clock.mono == start + 2
    farm.clock.meanwhile.append(lambda: farm.scheduler.cancel(job))
    assert farm.beat(worker, lease, wait=2) == [lease.id]
    assert farm.clock.mono == start + 2


def test_progress_is_what_was_heard_last_and_ends_with_the_try(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    task = lease.tasks[0].id
    assert farm.scheduler.progress(task) == 0.0
    farm.scheduler.beat(worker, {lease.id: {task: 0.25}}, 0)
    farm.scheduler.beat(worker, {lease.id: {task: 0.5}}, 0)
    assert farm.scheduler.progress(task) == 0.5
    farm.fail(worker, lease)
    assert farm.scheduler.progress(task) == 0.0
    assert farm.states(job)[0] == "queued"


def test_progress_is_taken_only_from_the_holder_of_the_lease(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(3)
    mine, other = farm.lease(anna), farm.lease(bert)
    farm.scheduler.beat(bert, {other.id: {}, mine.id: {mine.tasks[0].id: 0.9}}, 0)
    assert farm.scheduler.progress(mine.tasks[0].id) == 0.0


def test_a_beat_that_is_held_open_brings_no_old_progress_back(farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(90)
    farm.finish(worker, farm.lease(worker), cpu=0.01)
    lease = farm.lease(worker)
    assert len(lease.tasks) > 1
    farm.clock.meanwhile.append(lambda: farm.fail(worker, lease))
    farm.scheduler.beat(worker, {lease.id: {lease.tasks[0].id: 0.9}}, 5)
    assert farm.scheduler.progress(lease.tasks[0].id) == 0.0


def test_frames_that_workers_hold_are_rendered_once_and_hinder_nobody(farm: Farm) -> None:
    anna, bert, carl = farm.worker("anna"), farm.worker("bert"), farm.worker("carl")
    job = farm.submit(2, max_workers=1)
    leases = {}

    def hold(*workers: int) -> None:
        for worker in workers:
            lease = leases[worker]
            farm.scheduler.beat(worker, {lease.id: {lease.tasks[0].id: 1.0}}, 0)

    for worker in (anna, bert):  # the second gets one as the first only holds
        leases[worker] = farm.lease(worker)
        assert leases[worker].hold
        hold(worker)
    for _ in range(10):
        farm.clock.advance(20)
        hold(anna, bert)
        for lease in leases.values():  # as while it is on its way: it stays finished
            farm.scheduler.beat(anna, {lease.id: {lease.tasks[0].id: 0.99}}, 0)
        farm.scheduler.expire()
    assert farm.states(job) == ["leased", "leased"] and farm.leases(carl) == []
    with farm.store.read() as look:
        why, cure = farm.scheduler.muster(look).why(look.job(job))
    assert "workers hold 2 frames" in why and cure == "bring=yes"
    began = farm.clock.mono
    farm.clock.meanwhile.append(lambda: farm.scheduler.change(job, {"bring": True}))
    assert farm.beat(anna, leases[anna], wait=9) == [] and farm.clock.mono == began
    with farm.store.read() as look:
        assert farm.scheduler.muster(look).why(look.job(job))[1] == "", "it is done already"
    farm.finish(anna, leases[anna])
    with farm.store.read() as look:  # for 200 seconds nothing was computed
        assert look._do("SELECT spent FROM turn").fetchone()[0] < 20
    farm.clock.advance(31)  # bert is lost, with what it has
    farm.scheduler.expire()
    assert farm.states(job) == ["done", "queued"] and not farm.lease(carl).hold


def test_what_expires_costs_no_try_however_often(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(1, retry_limit=1)
    for _ in range(10):
        farm.lease(worker)
        farm.clock.advance(31)
        farm.scheduler.expire()
    assert farm.task(job, 0).tries == 0
    assert farm.render(worker) == [0]


def test_only_the_unfinished_part_of_a_lease_is_handed_back(farm: Farm) -> None:
    worker = farm.worker()
    job = farm.submit(90)
    farm.finish(worker, farm.lease(worker), cpu=0.01)
    lease = farm.lease(worker)
    farm.finish(worker, lease, 0)
    farm.fail(worker, lease, 1)
    farm.scheduler.release(worker, lease.id)
    assert farm.states(job) == ["done", "done"] + ["queued"] * 88
    assert [task.tries for task in farm.tasks(job)] == [0, 0, 1] + [0] * 87


def test_a_lease_ends_with_its_last_frame(farm: Farm) -> None:
    worker, _, lease = leased(farm)
    farm.finish(worker, lease)
    assert farm.beat(worker, lease) == [lease.id]
    assert list(farm.scheduler.grants) == []


@pytest.mark.parametrize("action", [
    lambda farm, other, lease: farm.finish(other, lease),
    lambda farm, other, lease: farm.fail(other, lease),
    lambda farm, other, lease: farm.scheduler.release(other, lease.id),
    lambda farm, other, lease: farm.scheduler.release(other, "no such lease"),
    lambda farm, other, lease: farm.scheduler.finish(
        other, lease.id, 10**9, png(), b"", Cost()),
], ids=["finish", "fail", "release", "unknown lease", "unknown task"])
def test_a_worker_can_do_nothing_to_the_lease_of_another(
        action: Callable[[Farm, int, LeaseSpec], Any], farm: Farm) -> None:
    _, job, lease = leased(farm)
    with pytest.raises(StaleLease):
        action(farm, farm.worker("bert"), lease)
    assert farm.states(job)[0] == "leased"


# --- deliveries

def test_a_late_image_of_a_finished_frame_changes_nothing(farm: Farm) -> None:
    anna, job, lease = leased(farm)
    farm.clock.advance(31)
    farm.scheduler.expire()
    bert = farm.worker("bert")
    again = farm.lease(bert)
    farm.finish(bert, again, image=png(7))
    before = farm.task(job, 1), farm.job(job)
    assert farm.finish(anna, lease, image=png(8)) is False
    assert farm.finish(bert, again, image=png(9)) is False
    assert (farm.task(job, 1), farm.job(job)) == before
    assert (farm.root / "jobs" / f"{job}-ball" / "out1.png").read_bytes() == png(7)


def test_a_late_image_stops_the_worker_that_renders_it_again(farm: Farm) -> None:
    anna, job, lease = leased(farm)
    farm.clock.advance(31)
    farm.scheduler.expire()
    bert = farm.worker("bert")
    again = farm.lease(bert)
    assert farm.finish(anna, lease) is True
    assert farm.beat(bert, again) == [again.id]
    assert farm.finish(bert, again) is False
    assert farm.attempts(farm.task(job, 1).id) == [("anna", "done"), ("bert", "lost")]


def test_an_image_for_a_cancelled_job_is_answered_kindly(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.scheduler.cancel(job)
    assert farm.finish(worker, lease) is False
    assert farm.states(job) == ["cancelled"] * 3


def test_a_failure_of_a_finished_frame_changes_nothing(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.finish(worker, lease)
    farm.fail(worker, lease)
    assert farm.states(job)[0] == "done" and farm.task(job, 1).tries == 0


@pytest.mark.parametrize("image", [
    b"", png()[:-5], png() + b"x", png(width=5), png().replace(b"IDAT", b"IDAx"), b"P6 4 3 255 ",
], ids=["empty", "cut off", "longer", "another size", "damaged", "another type"])
def test_what_is_not_the_whole_picture_is_refused(image: bytes, farm: Farm) -> None:
    worker, job, lease = leased(farm)
    with pytest.raises(ImageError):
        farm.finish(worker, lease, image=image)
    assert farm.states(job)[0] == "leased"
    assert not (farm.root / "jobs" / f"{job}-ball" / "out1.png").exists()
    assert farm.finish(worker, lease) is True


def at_once(actions: Sequence[Callable[[], Any]]) -> List[Any]:
    """Run each in a thread of its own, all at the same moment; return what they answered."""
    barrier, answers = threading.Barrier(len(actions)), []  # type: ignore[var-annotated]

    def run(action: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            answers.append(action())
        except Exception as error:
            answers.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_of_uploads_at_once_exactly_one_is_accepted(farm: Farm) -> None:
    workers = [farm.worker(f"w{number}") for number in range(4)]
    job = farm.submit(12)
    for frame in range(1, 13):
        held = []
        for worker in workers:
            held.append((worker, farm.lease(worker)))
            farm.clock.advance(31)
            farm.scheduler.expire()
        assert {lease.tasks[0].frame for _, lease in held} == {frame}
        answers = at_once([
            lambda held=held, number=number: farm.finish(
                *held[number % 4], image=png(number + 1)) for number in range(8)])
        assert sorted(map(str, answers)) == ["False"] * 7 + ["True"]
        assert farm.problems() == []
    assert farm.state(job) == "done"


def test_many_workers_at_once_render_every_frame_once(farm: Farm) -> None:
    workers = [farm.worker(f"w{number}") for number in range(4)]
    jobs = [farm.submit(25, name=name) for name in ("one", "two")]
    frames = at_once([lambda worker=worker: farm.render(worker) for worker in workers])
    assert sorted(itertools.chain(*frames)) == sorted([*range(1, 26)] * 2)
    assert [farm.state(job) for job in jobs] == ["done", "done"]


# --- failures

def test_the_log_of_every_try_is_kept(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(1)
    for text in (b"first", b"second"):
        lease = farm.lease(worker)
        farm.scheduler.fail(worker, lease.id, lease.tasks[0].id, "it broke", text, False)
    lease = farm.lease(worker)
    farm.finish(worker, lease)
    with farm.store.read() as tx:
        attempts = tx.attempts(lease.tasks[0].id)
    logs = [(farm.root / "jobs" / f"{job}-ball" / attempt.log).read_bytes()
            for attempt in attempts]
    assert logs == [b"first", b"second", b"rendered"]
    assert [attempt.message for attempt in attempts] == ["it broke", "it broke", ""]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_retries_go_to_different_workers_where_there_are_that_many(
        workers: int, farm: Farm) -> None:
    names = [f"w{number}" for number in range(workers)]
    ids = [farm.worker(name) for name in names]
    job = farm.submit(1)
    for _ in range(20):
        for worker in ids:
            for lease in farm.leases(worker):
                farm.fail(worker, lease)
    tried = [name for name, _ in farm.attempts(farm.task(job, 0).id)]
    assert len(tried) == 3 and len(set(tried)) == min(workers, 3)
    assert farm.state(job) == "failed"


def test_a_frame_that_one_worker_fails_is_done_by_another(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(3)
    farm.fail(anna, farm.lease(anna))
    assert farm.lease(anna).tasks[0].frame == 2
    assert farm.lease(bert).tasks[0].frame == 1
    assert farm.task(job, 1).tries == 1


def test_a_worker_that_went_away_is_not_waited_for(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(1)
    farm.fail(anna, farm.lease(anna))
    assert farm.leases(anna) == []  # it is bert's turn
    farm.clock.advance(31)
    assert bert not in farm.scheduler.live_workers()
    assert farm.lease(anna).tasks[0].frame == 0


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("in_order", [False, True])
def test_a_scene_error_is_tried_once_on_each_worker(
        workers: int, in_order: bool, farm: Farm) -> None:
    """And not on more than the limit. Frame 1 is good, so that nobody is thought hopeless."""
    ids = [farm.worker(f"w{number}") for number in range(workers)]
    job = farm.submit(2, in_order=in_order)
    first = farm.lease(ids[0])
    farm.finish(ids[0], first)
    if in_order:
        farm.fail(ids[0], first, 1, scene=True)
    for _ in range(20):
        for worker in ids:
            for lease in farm.leases(worker):
                farm.fail(worker, lease, scene=True)
    tried = [name for name, state in farm.attempts(farm.task(job, 2).id) if state == "failed"]
    assert len(tried) == len(set(tried)) == min(workers, 3)
    assert farm.states(job) == ["done", "failed"]


def test_failed_frames_do_not_stop_others(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(10, retry_limit=1)
    drive(farm, [worker], lambda worker, frame: "good" if frame % 2 else "error")
    assert farm.states(job) == ["done", "failed"] * 5 and farm.state(job) == "failed"


def test_a_worker_that_only_fails_a_job_gets_no_more_of_it(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    bad = farm.submit(20, name="bad")
    farm.finish(bert, farm.lease(bert))
    for _ in range(3):
        farm.fail(anna, farm.lease(anna))
    assert farm.leases(anna) == []
    good = farm.submit(2, name="good", priority=-1)
    assert farm.lease(anna).job == good
    assert farm.lease(bert).job == bad


def sickness(farm: Farm, worker: int) -> str:
    with farm.store.read() as tx:
        return farm.scheduler.muster(tx).sickness(tx.worker(worker))


def test_a_worker_that_fails_everything_is_sick_and_gets_nothing(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    for number in range(3):
        farm.submit(9, name=f"j{number}", priority=number)
        farm.finish(bert, farm.lease(bert))
    for _ in range(6):
        farm.fail(anna, farm.lease(anna))
    assert sickness(farm, anna) and not sickness(farm, bert)
    assert farm.leases(anna) == []
    farm.lease(bert)


def test_broken_scenes_make_no_worker_sick(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(1)
    farm.finish(bert, farm.lease(bert))
    for number in range(3):
        farm.submit(2, name=f"broken{number}")
        for _ in range(2):
            farm.fail(anna, farm.lease(anna))
    assert not sickness(farm, anna)


def test_alone_nobody_is_sick(farm: Farm) -> None:
    worker = farm.worker()
    for number in range(4):
        job = farm.submit(2, name=f"j{number}", retry_limit=1)
        farm.fail(worker, farm.lease(worker))
        farm.fail(worker, farm.lease(worker))
        assert farm.state(job) == "failed"
    farm.submit(2)
    farm.lease(worker)


@pytest.mark.parametrize("how", ["scene", "error"])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
def test_a_broken_scene_pauses_however_many_workers_there_are(
        how: str, workers: int, farm: Farm) -> None:
    ids = [farm.worker(f"w{number}") for number in range(workers)]
    job = farm.submit(50)
    drive(farm, ids, lambda worker, frame: how, rounds=60)
    assert farm.state(job) == "paused"
    assert 3 <= farm.job(job).failed <= 3 + 2 * workers


@pytest.mark.parametrize("how", ["scene", "error"])
@pytest.mark.parametrize("other", ["pending", "sick", "hopeless", "removed", "left"])
def test_a_frame_does_not_wait_for_a_worker_that_cannot_help(
        how: str, other: str, farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert", admitted=other != "pending")
    if other == "sick":
        farm.submit(1, name="first")
        farm.finish(anna, farm.lease(anna))
        for number in range(3):
            farm.submit(2, name=f"other{number}")
            for _ in range(2):
                farm.fail(bert, farm.lease(bert))
            farm.render(anna)
        assert sickness(farm, bert)
    job = farm.submit(20, name="bad frame 7")
    if other == "hopeless":
        farm.finish(anna, farm.lease(anna))
        for _ in range(3):
            farm.fail(bert, farm.lease(bert))
    if other == "removed":
        farm.scheduler.remove_worker(bert)
    if other == "left":
        farm.scheduler.leave(bert)
    polls = [anna] if other in ("removed", "left") else [bert, anna]
    drive(farm, polls, lambda worker, frame: how if frame == 7 or worker == bert else "good", 60)
    assert farm.state(job) == "failed"
    assert farm.job(job).failed == 1 and farm.job(job).done == 19


@pytest.mark.parametrize("seed", range(12))
def test_every_job_comes_to_an_end(seed: int, tmp_path: Path) -> None:
    """Whoever fails whatever: nothing is left to wait for in the end."""
    chance = random.Random(seed)
    farm = Farm(tmp_path, lease_time=3)
    workers = [farm.worker(f"w{number}") for number in range(chance.randint(1, 5))]
    pending = [farm.worker("pending", admitted=False)] if chance.random() < 0.5 else []
    rates = {worker: chance.choice([0.0, 0.1, 0.6, 1.0]) for worker in workers}
    frames = {frame: chance.choice(["good"] * 6 + ["scene", "error"]) for frame in range(20)}
    jobs = [farm.submit(chance.choice([1, 4, 12]), name=f"j{number}", send=True,
                        in_order=(order := chance.random() < 0.2),
                        verify=0 if order else chance.choice([0, 0, 60]),
                        max_workers=chance.choice([0, 0, 1, 2]),
                        retry_limit=chance.choice([1, 2, 3, 5])) for number in range(4)]

    def behave(worker: int, frame: int) -> str:
        if chance.random() < rates[worker]:
            return chance.choice(["error", "error", "scene", "lost"])
        return frames[frame]

    drive(farm, workers + pending, behave, rounds=150)
    assert [farm.state(job) for job in jobs if farm.state(job) not in ("done", "failed", "paused")
            ] == [], [farm.states(job) for job in jobs]
    assert farm.problems() == []
    farm.close()


# --- whose turn it is

def test_a_higher_priority_goes_first(farm: Farm) -> None:
    worker = farm.worker()
    low, high, middle = (farm.submit(3, name=str(priority), priority=priority)
                         for priority in (-5, 10, 0))
    order = [farm.lease(worker).job for _ in range(9)]
    assert order == [high] * 3 + [middle] * 3 + [low] * 3


def test_equals_get_equal_shares(farm: Farm) -> None:
    workers = [farm.worker(f"w{number}") for number in range(3)]
    jobs = [farm.submit(20, name=f"j{number}") for number in range(3)]
    held = [lease.job for worker in workers for lease in farm.leases(worker, want=4, slots=4)]
    assert sorted(held) == sorted(jobs * 4)


def test_a_new_job_gets_its_share_when_runs_end(farm: Farm) -> None:
    anna = farm.worker()
    old = farm.submit(20, name="old")
    leases = farm.leases(anna, want=4, slots=4)
    new = farm.submit(20, name="new")
    for lease in leases[:2]:
        farm.finish(anna, lease)
    assert [lease.job for lease in farm.leases(anna, want=2, slots=4)] == [new, new]
    assert old in [lease.job for lease in leases]


def test_max_workers_is_the_most_workers_at_a_time(farm: Farm) -> None:
    anna, bert, cleo = (farm.worker(name) for name in ("anna", "bert", "cleo"))
    job = farm.submit(10, max_workers=2)
    first = farm.lease(anna)
    farm.lease(bert)
    assert farm.leases(cleo) == []
    farm.lease(anna)  # who is in may have more
    farm.scheduler.change(job, {"max_workers": 3})
    farm.lease(cleo)
    farm.scheduler.change(job, {"max_workers": 1})
    farm.finish(anna, first)
    assert farm.beat(anna, first) == [first.id]


def test_a_priority_that_is_set_counts_at_once(farm: Farm) -> None:
    worker = farm.worker()
    first, second = farm.submit(5, name="a"), farm.submit(5, name="b")
    farm.scheduler.change(second, {"priority": 1})
    assert [farm.lease(worker, slots=2).job for _ in range(6)] == [second] * 5 + [first]


@pytest.mark.parametrize("changes", [{"priority": "high"}, {"state": "done"}, {"max_workers": -1}])
def test_what_cannot_be_set_changes_nothing(changes: Dict[str, Any], farm: Farm) -> None:
    job = farm.submit()
    before = farm.job(job)
    with pytest.raises(UserError):
        farm.scheduler.change(job, changes)
    assert farm.job(job) == before


def test_a_retry_limit_that_is_set_counts_for_the_next_failure(farm: Farm) -> None:
    worker, job, lease = leased(farm, frames=1)
    farm.scheduler.change(job, {"retry_limit": 1})
    farm.fail(worker, lease)
    assert farm.state(job) == "failed"


# --- stragglers

def straggler(farm: Farm) -> Tuple[int, int, int, LeaseSpec]:
    """Two workers, a job of which all but the last frame is done, and anna's lease of that."""
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(3)
    farm.finish(anna, farm.lease(anna))
    farm.finish(anna, farm.lease(anna))
    return anna, bert, job, farm.lease(anna)


def test_the_oldest_unfinished_frame_is_leased_a_second_time(farm: Farm) -> None:
    anna, bert, job, first = straggler(farm)
    assert farm.leases(bert) == []  # it is too early to give up
    farm.clock.advance(6)
    second = farm.lease(bert)
    assert second.tasks == first.tasks
    assert farm.leases(anna) == [] and farm.leases(farm.worker("cleo")) == []
    assert farm.states(job) == ["done", "done", "leased"]


@pytest.mark.parametrize("winner", ["first", "second"])
def test_the_first_good_result_of_two_wins(winner: str, farm: Farm) -> None:
    anna, bert, job, first = straggler(farm)
    farm.clock.advance(6)
    second = farm.lease(bert)
    pairs = [(anna, first), (bert, second)]
    (won, winning), (lost, losing) = pairs if winner == "first" else pairs[::-1]
    assert farm.beat(lost, losing) == []
    assert farm.finish(won, winning, image=png(1)) is True
    assert farm.beat(lost, losing) == [losing.id]
    assert farm.finish(lost, losing, image=png(2)) is False
    assert (farm.root / "jobs" / f"{job}-ball" / "out3.png").read_bytes() == png(1)
    assert farm.state(job) == "done"


def test_a_waiting_worker_gets_a_straggler_when_it_is_time(farm: Farm) -> None:
    anna, bert, _, first = straggler(farm)
    start = farm.clock.mono
    farm.clock.housekeeping = lambda: farm.beat(anna, first)
    assert farm.lease(bert, wait=25).tasks == first.tasks
    assert 5 <= farm.clock.mono - start < 7


def test_a_slow_job_is_given_its_time(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(2)
    farm.finish(anna, farm.lease(anna), cpu=100)
    lease = farm.lease(anna)
    for _ in range(14):
        farm.clock.advance(10)
        farm.beat(anna, lease)
        assert farm.leases(bert) == []
    farm.clock.advance(20)
    assert farm.lease(bert).tasks == lease.tasks


def test_one_failure_of_two_is_not_the_end(farm: Farm) -> None:
    anna, bert, job, first = straggler(farm)
    farm.clock.advance(6)
    farm.fail(bert, farm.lease(bert))
    assert farm.states(job)[2] == "leased" and farm.task(job, 3).tries == 0
    assert farm.finish(anna, first) is True


def test_who_failed_a_straggler_does_not_get_it_again(farm: Farm) -> None:
    _, bert, _, _ = straggler(farm)
    farm.clock.advance(6)
    farm.fail(bert, farm.lease(bert), scene=True)
    assert farm.leases(bert) == []


def test_when_one_of_two_dies_the_other_goes_on(farm: Farm) -> None:
    _, bert, job, _ = straggler(farm)
    farm.clock.advance(20)
    second = farm.lease(bert)
    farm.clock.advance(20)
    farm.scheduler.expire()
    assert farm.states(job)[2] == "leased"
    assert farm.finish(bert, second) is True


def test_new_frames_of_another_job_go_before_stragglers(farm: Farm) -> None:
    _, bert, _, _ = straggler(farm)
    other = farm.submit(5, name="other", priority=-1)
    farm.clock.advance(6)
    assert farm.lease(bert).job == other


# --- in order

def test_a_job_in_order_goes_to_one_worker_whole(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(6, in_order=True)
    leases = farm.leases(anna, want=3, slots=3, idle=3)
    assert [len(lease.tasks) for lease in leases] == [6] and leases[0].in_order
    farm.finish(anna, leases[0], 0)
    farm.clock.advance(20)
    assert farm.leases(bert) == []


def test_a_frame_that_failed_in_order_waits_for_the_run_to_end(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(6, in_order=True)
    lease = farm.lease(anna)
    farm.fail(anna, lease, 0)
    assert farm.states(job)[:2] == ["queued", "leased"]
    assert farm.leases(bert) == []
    farm.scheduler.release(anna, lease.id)
    assert [task.frame for task in farm.lease(bert).tasks] == [1, 2, 3, 4, 5, 6]


def test_the_rest_of_a_job_in_order_goes_to_another_when_its_worker_dies(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(6, in_order=True)
    lease = farm.lease(anna)
    farm.finish(anna, lease, 0)
    farm.clock.advance(31)
    farm.scheduler.expire()
    assert [task.frame for task in farm.lease(bert).tasks] == [2, 3, 4, 5, 6]


# --- threads

@pytest.mark.parametrize("frames, uses, values, idle, threads", [
    (1, [], {}, 8, [8]),
    (1, ["radiosity"], {}, 8, [8]),  # as POV-Ray itself would
    (1, [], {"Work_Threads": "2"}, 8, [2]),
    (1, [], {"Work_Threads": "64"}, 8, [8]),
    (1, [], {}, 0, [1]),
    (1, [], {"Work_Threads": "0"}, 4, [1]),
    (1, [], {"Work_Threads": "-3"}, 4, [1]),
    (2, [], {}, 8, [4, 4]),
    (3, [], {}, 8, [2, 3, 3]),
    (2, [], {"Work_Threads": "1"}, 8, [1, 1]),
    (2, ["radiosity"], {}, 8, [1, 1]),
    (2, ["photons"], {}, 8, [1, 1]),
    (9, [], {}, 8, [1] * 8),
], ids=str)
def test_threads_are_for_stills_and_for_the_last_frames(
        frames: int, uses: List[str], values: Dict[str, str], idle: int, threads: List[int],
        farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(frames, uses=uses, values=values)
    leases = farm.leases(worker, want=8, slots=8, idle=idle)
    assert [lease.threads for lease in leases] == threads


def test_a_job_in_order_has_the_idle_cores_for_its_one_run(farm: Farm) -> None:
    farm.submit(9, in_order=True)
    assert farm.lease(farm.worker(), want=8, slots=8, idle=8).threads == 8


def test_cheap_frames_are_kept_for_the_runs_that_their_worker_has_not_begun_yet(farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(130)
    for lease in farm.leases(worker, want=8, slots=8):
        farm.finish(worker, lease, cpu=0.02)
    # A run sleeps twelve times as long as it computes: two cores have room for more than eight.
    assert max(len(lease.tasks) for lease in farm.leases(worker, want=20, slots=8)) <= 12


# --- polls

WAKES: Dict[str, Tuple[Callable[[Farm, int, int, LeaseSpec], Any],
                       Callable[[Farm, int, int, LeaseSpec], Any]]] = {
    "a job comes": (lambda farm, job, other, lease: farm.scheduler.pause(job),
                    lambda farm, job, other, lease: farm.submit(name="new")),
    "its last file comes": (
        lambda farm, job, other, lease: (farm.scheduler.pause(job),
                                         farm.submit(files={"x.inc": b"x"}, send=False)),
        lambda farm, job, other, lease: farm.scheduler.put_blob(sha256(b"x"), [b"x"])),
    "a job goes on": (lambda farm, job, other, lease: farm.scheduler.pause(job),
                      lambda farm, job, other, lease: farm.scheduler.resume(job)),
    "a job is retried": (lambda farm, job, other, lease: farm.scheduler.cancel(job),
                         lambda farm, job, other, lease: farm.scheduler.retry(job)),
    "a job may have more workers": (
        lambda farm, job, other, lease: farm.scheduler.change(job, {"max_workers": 1}),
        lambda farm, job, other, lease: farm.scheduler.change(job, {"max_workers": 2})),
    "a frame is handed back": (
        lambda farm, job, other, lease: farm.scheduler.change(job, {"max_workers": 1}),
        lambda farm, job, other, lease: farm.scheduler.release(other, lease.id)),
    "a frame fails": (
        lambda farm, job, other, lease: farm.scheduler.change(job, {"max_workers": 1}),
        lambda farm, job, other, lease: farm.fail(other, lease)),
    "a frame is done": (
        lambda farm, job, other, lease: farm.scheduler.change(job, {"max_workers": 1}),
        lambda farm, job, other, lease: farm.finish(other, lease)),
    "a worker leaves": (
        lambda farm, job, other, lease: farm.scheduler.change(job, {"max_workers": 1}),
        lambda farm, job, other, lease: farm.scheduler.leave(other)),
    "a worker is removed": (
        lambda farm, job, other, lease: farm.scheduler.change(job, {"max_workers": 1}),
        lambda farm, job, other, lease: farm.scheduler.remove_worker(other)),
}


@pytest.mark.parametrize("name", WAKES)
def test_a_poll_is_answered_at_once_when(name: str, farm: Farm) -> None:
    other, job, lease = leased(farm)
    before, change = WAKES[name]
    before(farm, job, other, lease)
    worker, start = farm.worker("bert"), farm.clock.mono
    farm.clock.meanwhile.append(lambda: change(farm, job, other, lease))
    assert len(farm.leases(worker, wait=25)) == 1
    assert farm.clock.mono == start


def test_a_poll_without_work_ends_when_it_is_over(farm: Farm) -> None:
    worker, start = farm.worker(), farm.clock.mono
    assert farm.leases(worker, wait=25) == []
    assert farm.clock.mono == start + 25


def test_who_is_idle_looks_at_what_others_render_now_and_then_and_at_what_is_new_at_once(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(1)
    farm.lease(anna)
    looks: List[float] = []
    monkeypatch.setattr(povfarm._Deal, "_straggler", lambda *_: looks.append(farm.clock.mono))
    waiting = farm.scheduler._states.waiting
    farm.clock.meanwhile.extend([lambda: waiting.ring(waiting.work)] * 20)
    assert farm.leases(bert, wait=3) == []
    assert looks == [1000 + number * povfarm.LOOK_AGAIN for number in range(7)] and looks[-1] == 1003
    farm.clock.meanwhile.extend([lambda: waiting.ring(waiting.work), lambda: farm.submit(1)])
    assert farm.leases(bert, wait=3) and farm.clock.mono == 1003


def looks_of(farm: Farm, worker: int, meanwhile: Callable[[], Any]) -> int:
    """How often a worker looks for work within less than a second, in which something happens."""
    looks: List[int] = []
    farm.clock.meanwhile.append(meanwhile)
    farm.scheduler.lease(worker, Offer(1, 1, 1), 0.9, lambda: not looks.append(1))
    return len(looks)


def test_a_change_wakes_only_those_whom_it_can_serve(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "LOOK_AGAIN", 1.0)  # longer than they wait here
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(2)
    first, second = farm.lease(anna), farm.lease(anna)
    assert looks_of(farm, bert, lambda: None) == 2, "at first and at the end"
    assert looks_of(farm, bert, lambda: farm.finish(anna, first)) == 2
    assert looks_of(farm, bert, lambda: farm.worker("carl")) == 2
    farm.clock.meanwhile.append(lambda: farm.finish(anna, second))
    assert farm.scheduler.beat(bert, {}, 0.9) == ([], {}) and farm.clock.mono > 1003, "nor beats"
    assert looks_of(farm, bert, lambda: farm.submit(1)) == 2 and farm.clock.mono < 1004, "at once"


def test_what_one_cannot_take_is_offered_to_the_next(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "LOOK_AGAIN", 1000.0)
    farm = Farm(tmp_path, povfarm.Clock(), lease_time=10_000)  # type: ignore[arg-type]
    anna, carl, bert = (farm.worker(name) for name in ("anna", "carl", "bert"))
    farm.submit(1)
    farm.fail(carl, farm.lease(carl))
    lease = farm.lease(anna)
    with ThreadPoolExecutor() as pool:
        waiting = []
        for number, worker in enumerate((carl, bert), 1):
            waiting.append(pool.submit(farm.leases, worker, wait=600.0))
            bells = farm.scheduler._states.waiting.work
            while len(bells) < number or any(not bell._waiters for bell in bells):  # type: ignore
                time.sleep(0.01)
        began = time.monotonic()
        farm.scheduler.release(anna, lease.id)
        assert len(waiting[1].result()) == 1 and time.monotonic() < began + 300
        farm.scheduler.close()
        assert waiting[0].result() == []


def test_an_idle_farm_is_silent(farm: Farm) -> None:
    worker, looks = farm.worker(), []
    assert farm.scheduler.lease(worker, Offer(1, 1, 1), 25, lambda: not looks.append(1)) == []
    assert len(looks) <= 2


def test_who_waits_for_work_is_there_and_need_not_wake_for_it(tmp_path: Path) -> None:
    farm = Farm(tmp_path, lease_time=10)
    worker, waits, live = farm.worker(), [], []
    wait = farm.clock.wait
    farm.clock.wait = lambda *what: (waits.append(what), wait(*what))[1]  # type: ignore[method-assign]

    def keep_house() -> None:
        farm.scheduler.expire()
        live.append(farm.scheduler.live_workers())

    farm.clock.housekeeping = keep_house
    assert farm.leases(worker, wait=240) == []
    assert len(waits) == 1 and len(live) == 240 and all(each == {worker} for each in live)
    assert "lost" not in [event.what for event in farm.scheduler.wait_events(0, 0, 1000)]


def test_who_hung_up_while_it_waited_is_lost_in_time(tmp_path: Path) -> None:
    farm = Farm(tmp_path, lease_time=10)
    worker, began = farm.worker(), farm.clock.mono
    farm.clock.housekeeping = farm.scheduler.expire
    assert farm.scheduler.lease(worker, Offer(1, 1, 1), 240,
                                lambda: farm.clock.mono < began + 25) == []
    assert farm.clock.mono <= began + 25 + 11  # its thread is free again
    farm.scheduler.expire()
    assert farm.scheduler.live_workers() == set()
    assert "lost" in [event.what for event in farm.scheduler.wait_events(0, 0, 1000)]


def test_the_beats_of_many_are_held_for_longer(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [farm.worker(name) for name in ("anna", "bert", "cleo")]
    farm.submit(3)
    leases = [farm.lease(worker) for worker in workers]
    for a_second, seconds in ((100.0, 2), (0.5, 6), (0.1, 10)):  # never longer than is good for a lease
        monkeypatch.setattr(povfarm, "BEATS", a_second)
        began = farm.clock.mono
        assert farm.beat(workers[0], leases[0], wait=2) == []
        assert farm.clock.mono == began + seconds
        assert farm.beat(workers[0], leases[0]) == [] and farm.clock.mono == began + seconds


def test_a_poll_that_is_abandoned_gets_nothing(farm: Farm) -> None:
    worker, alive = farm.worker(), [True]

    def hang_up() -> None:
        alive.clear()
        farm.submit()

    farm.clock.meanwhile.append(hang_up)
    assert farm.scheduler.lease(worker, Offer(1, 1, 1), 25, lambda: bool(alive)) == []
    assert list(farm.scheduler.grants) == []


@pytest.mark.parametrize("end", ["leave", "remove_worker"])
def test_a_poll_of_a_worker_that_stopped_gets_nothing(end: str, farm: Farm) -> None:
    worker = farm.worker()
    farm.clock.meanwhile.append(lambda: getattr(farm.scheduler, end)(worker))
    farm.clock.meanwhile.append(lambda: farm.submit())
    assert farm.leases(worker, wait=25) == []
    assert worker not in farm.scheduler.live_workers()


def test_a_worker_that_stops_while_work_is_looked_for_gets_nothing(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(1)

    def alive() -> bool:
        farm.scheduler.leave(worker)
        return True

    assert farm.scheduler.lease(worker, povfarm.Offer(1, 1, 1), 0, alive) == []
    assert farm.states(job) == ["queued"]


def test_a_beat_that_is_open_does_not_revive_a_worker_that_left(farm: Farm) -> None:
    worker, _, lease = leased(farm)
    farm.clock.meanwhile.append(lambda: farm.scheduler.leave(worker))
    assert farm.beat(worker, lease, wait=20) == [lease.id]
    assert worker not in farm.scheduler.live_workers()


def test_a_beat_never_revives_a_lease_that_is_taken_back_meanwhile(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile: List[Callable[[], Any]] = []

    class Slow(povfarm.Grant):
        """Is heard of so slowly that something else happens before that is noted."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "heard" and meanwhile:
                meanwhile.pop()()
            super().__setattr__(name, value)

    monkeypatch.setattr(povfarm, "Grant", Slow)
    worker, job, lease = leased(farm)
    meanwhile.append(lambda: farm.scheduler.release(worker, lease.id))
    farm.beat(worker, lease)
    assert meanwhile == [] and farm.states(job)[0] == "queued"
    assert list(farm.scheduler.grants) == [] and farm.problems() == []
    assert farm.beat(worker, lease) == [lease.id]


def test_everybody_who_waits_is_answered_at_the_end(farm: Farm) -> None:
    worker, job, lease = leased(farm, frames=1)
    idle = farm.worker("bert")
    start = farm.clock.mono
    farm.clock.meanwhile.append(farm.scheduler.close)
    assert farm.leases(idle, wait=25) == []
    assert farm.beat(worker, lease, wait=20) == []
    assert farm.scheduler.wait_events(10**6, 20, 100) == []
    assert farm.clock.mono == start and farm.states(job) == ["leased"]


def test_events_come_once_and_in_order(farm: Farm) -> None:
    job = farm.submit(1)
    events = farm.scheduler.wait_events(0, 0, 100)
    assert [event.what for event in events] == ["submitted", "job active"]
    last = events[-1].id
    farm.clock.meanwhile.append(lambda: farm.scheduler.pause(job))
    start = farm.clock.mono
    assert [event.what for event in farm.scheduler.wait_events(last, 20, 100)] == ["job paused"]
    assert farm.clock.mono == start
    assert farm.scheduler.wait_events(last + 1, 20, 100) == [] and farm.clock.mono == start + 20


# --- workers

def test_a_pending_worker_gets_nothing_until_it_is_admitted(farm: Farm) -> None:
    info = WorkerInfo("zoe", 1, 1, "Linux", {})
    code = "ABCDEF"
    zoe = farm.scheduler.join(info, "hash", "192.168.1.9", code)
    farm.submit()
    assert farm.leases(zoe) == []
    farm.clock.meanwhile.append(lambda: farm.scheduler.admit(f" {code.lower()} "))
    assert farm.leases(zoe, wait=25) == [] and farm.clock.mono == 1000, "this tells it"
    assert len(farm.leases(zoe)) == 1


@pytest.mark.parametrize("code", ["", "AAAAAA", "ÄÖÜ", "x" * 1000, "' OR 1=1 --"])
def test_a_wrong_code_admits_nobody(code: str, farm: Farm) -> None:
    zoe = farm.worker("zoe", admitted=False)
    with pytest.raises(UserError):
        farm.scheduler.admit(code)
    farm.submit()
    assert farm.leases(zoe) == []


def test_a_code_admits_one_worker_once(farm: Farm) -> None:
    codes = {}
    for name in ("zoe", "yann"):
        codes[name] = farm.scheduler.join(WorkerInfo(name, 1, 1, "", {}), name, "::1", name.upper())
    assert farm.scheduler.admit("ZOE") == "zoe"
    farm.submit()
    assert farm.leases(codes["yann"]) == [] and farm.leases(codes["zoe"]) != []
    with pytest.raises(UserError):
        farm.scheduler.admit("ZOE")


def test_a_worker_that_comes_again_is_the_same_with_new_properties(farm: Farm) -> None:
    worker, job, _ = leased(farm)
    farm.scheduler.leave(worker)
    assert worker not in farm.scheduler.live_workers()
    farm.scheduler.rejoin(worker, WorkerInfo("anna", 64, 5, "Plan 9", {"povray": "3.8"}), "::1")
    with farm.store.read() as tx:
        rows = tx.workers()
    assert [(row.id, row.cores, row.system) for row in rows] == [(worker, 64, "Plan 9")]
    assert worker in farm.scheduler.live_workers()
    assert farm.lease(worker).job == job


def test_a_removed_worker_is_gone(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.scheduler.remove_worker(worker)
    assert farm.leases(worker) == [] and farm.beat(worker, lease) == [lease.id]
    with farm.store.read() as tx:
        assert tx.workers() == [] and tx.worker_by_token(sha256(b"anna")) is None
    for number in (worker, 99):
        with pytest.raises(UserError):
            farm.scheduler.remove_worker(number)
    assert farm.states(job)[0] == "queued"


def test_a_worker_is_live_as_long_as_it_is_heard_of(farm: Farm) -> None:
    worker = farm.worker()
    assert farm.scheduler.seen(worker) == 0.0 and farm.scheduler.seen(99) is None
    farm.clock.advance(29)
    assert farm.scheduler.live_workers() == {worker} and farm.scheduler.seen(worker) == 29
    farm.clock.advance(2)
    assert farm.scheduler.live_workers() == set()
    farm.beat(worker)
    assert farm.scheduler.live_workers() == {worker}


# --- deleting and tidying

def test_a_deleted_job_is_gone_with_its_files_and_others_stay(farm: Farm) -> None:
    worker, job, lease = leased(farm)
    farm.finish(worker, lease)
    late = farm.lease(worker)
    other = farm.submit(1, name="other", priority=5)
    farm.finish(worker, farm.lease(worker))
    farm.scheduler.delete(job)
    assert [path.name for path in (farm.root / "jobs").iterdir()] == [f"{other}-other"]
    for act in (farm.finish, farm.fail):
        with pytest.raises(StaleLease):
            act(worker, late)
    assert farm.beat(worker, late) == [late.id]
    assert [path.name for path in (farm.root / "jobs").iterdir()] == [f"{other}-other"]
    with pytest.raises(NotFound):
        farm.scheduler.pause(job)


def test_a_job_can_be_deleted_in_every_state(farm: Farm) -> None:
    for state in JobState:
        farm.scheduler.delete(in_state(farm, state.value))
        with farm.store.read() as tx:
            assert tx.jobs(0, -1) == []
        assert list((farm.root / "jobs").iterdir()) == []


def test_a_failure_told_while_its_job_is_deleted_leaves_no_directory(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, job, lease = leased(farm)
    put_log = farm.store.put_log
    deleter = threading.Thread(target=farm.scheduler.delete, args=(job,))

    def slow_put_log(*arguments: Any) -> str:
        deleter.start()
        deleter.join(0.2)  # it may have to wait for this
        return put_log(*arguments)

    monkeypatch.setattr(farm.store, "put_log", slow_put_log)
    try:
        farm.fail(worker, lease)
    except StaleLease:
        pass
    deleter.join()
    assert list((farm.root / "jobs").iterdir()) == []


def test_contents_are_kept_a_day_after_the_last_job_that_names_them(farm: Farm) -> None:
    files = {"a.pov": b"shared", "b.inc": b"only mine"}
    first, second = farm.submit(files=files), farm.submit(files={"a.pov": b"shared"})
    farm.scheduler.delete(first)
    farm.scheduler.tidy()
    assert farm.store.blob_path(sha256(b"only mine")).exists()
    farm.clock.advance(povfarm.KEEP_BLOBS + 1)
    farm.scheduler.tidy()
    assert not farm.store.blob_path(sha256(b"only mine")).exists()
    assert farm.store.blob_path(sha256(b"shared")).exists()
    job, missing = farm.scheduler.submit("again", "me", pov_job(), manifest(files), JobOptions())
    assert missing == [sha256(b"only mine")]
    farm.scheduler.put_blob(missing[0], [b"only mine"])
    assert farm.state(job) == "active" and farm.state(second) == "active"


def test_old_events_are_forgotten(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "KEEP_EVENTS", 3)
    for _ in range(5):
        farm.submit(1)
    farm.scheduler.tidy()
    with farm.store.read() as tx:
        events = tx.events(0, 100)
        assert [event.id for event in events][-1] == tx.last_event() and len(events) <= 4


# --- a restart

def test_after_a_restart_leases_live_on_and_nothing_is_rendered_again(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    worker, job = farm.worker(), farm.submit(4)
    farm.finish(worker, farm.lease(worker))
    lease = farm.lease(worker)
    farm.clock.advance(29)
    again = farm.restarted()
    assert again.problems() == []
    again.clock.advance(29)
    again.scheduler.expire()
    assert again.beat(worker, lease) == []
    assert [again.finish(worker, lease, index) for index in range(len(lease.tasks))][0] is True
    assert again.render(worker) == [*range(2 + len(lease.tasks), 5)]
    assert again.state(job) == "done" and again.problems() == []
    assert [len(again.attempts(task.id)) for task in again.tasks(job)] == [1] * 4
    again.close()


def test_after_a_restart_silent_workers_lose_their_leases(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    _, job, _ = leased(farm)
    again = farm.restarted()
    again.clock.advance(31)
    again.scheduler.expire()
    assert again.states(job)[0] == "queued" and again.problems() == []
    again.close()


@pytest.mark.parametrize("paused", [False, True])
def test_after_a_restart_a_job_goes_on_waiting_for_its_files(paused: bool, tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    files = {"a.pov": b"one", "b.inc": b"two"}
    job = farm.submit(files=files, send=False)
    farm.scheduler.put_blob(sha256(b"one"), [b"one"])
    if paused:
        farm.scheduler.pause(job)
    again = farm.restarted()
    if paused:
        again.scheduler.resume(job)
    assert again.state(job) == "waiting"
    again.scheduler.put_blob(sha256(b"two"), [b"two"])
    assert again.state(job) == "active"
    again.close()


def test_after_a_restart_the_first_scene_error_is_still_tried_by_others(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(3)
    mine, _ = farm.lease(anna), farm.lease(bert)
    again = farm.restarted()
    again.fail(anna, mine, scene=True)  # before bert is heard of
    assert again.states(job)[0] == "queued"
    again.close()


class FailingCommit:
    """A connection of which one commit fails, as on a full disk."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.left = 1

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql == "COMMIT" and self.left:
            self.left -= 1
            raise sqlite3.OperationalError("database or disk is full")
        return self.connection.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


@pytest.mark.parametrize("action", [
    "finish", "fail", "release", "cancel", "leave", "expire", "lease", "delete", "remove_worker",
    "put_blob"])
def test_when_a_commit_fails_nothing_has_happened(action: str, farm: Farm) -> None:
    """Neither in the database nor in memory: afterwards everything goes on as before."""
    worker, job, lease = leased(farm)
    waiting = farm.submit(1, files={"big.inc": b"big"}, send=False)
    other = farm.worker("bert")
    actions: Dict[str, Callable[[], Any]] = {
        "finish": lambda: farm.finish(worker, lease),
        "fail": lambda: farm.fail(worker, lease),
        "release": lambda: farm.scheduler.release(worker, lease.id),
        "cancel": lambda: farm.scheduler.cancel(job),
        "leave": lambda: farm.scheduler.leave(worker),
        "expire": farm.scheduler.expire,
        "lease": lambda: farm.leases(other),
        "delete": lambda: farm.scheduler.delete(job),
        "remove_worker": lambda: farm.scheduler.remove_worker(worker),
        "put_blob": lambda: farm.scheduler.put_blob(sha256(b"big"), [b"big"]),
    }
    if action == "expire":
        farm.clock.advance(31)
    connection = farm.store._writer
    farm.store._writer = FailingCommit(connection)  # type: ignore[assignment]
    with pytest.raises(povfarm.NoRoom):
        actions[action]()
    farm.store._writer = connection
    farm.scheduler.look_for_room()
    assert farm.problems() == []
    if action not in ("expire", "leave"):
        assert farm.beat(worker, lease) == []
    farm.scheduler.put_blob(sha256(b"big"), [b"big"])
    assert farm.state(waiting) == "active"
    farm.clock.advance(31)
    farm.scheduler.expire()
    assert farm.states(job)[0] == "queued"
    farm.scheduler.rejoin(worker, WorkerInfo("anna", 1, 1, "", {}), "::1")
    assert len(farm.render(worker)) == 4


def test_what_is_refused_disturbs_nobody_else(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that is given while another request fails is known afterwards."""
    worker, _ = farm.worker(), farm.submit()
    live_attempts, others = povfarm.Tx.live_attempts, []

    def look_while_others_work(tx: povfarm.Tx) -> Any:
        rows = live_attempts(tx)
        if not others:
            others.append(threading.Thread(target=farm.leases, args=(worker,)))
            others[0].start()
            others[0].join(0.2)  # it may have to wait for this
        return rows

    monkeypatch.setattr(povfarm.Tx, "live_attempts", look_while_others_work)
    with pytest.raises(NotFound):
        farm.scheduler.pause(99)
    for thread in others:
        thread.join()
    monkeypatch.undo()
    farm.leases(worker)
    assert farm.problems() == []


# --- what is broken is found

def sql(text: str) -> Callable[[Farm], None]:
    def damage(farm: Farm) -> None:
        with farm.store.tx() as tx:
            tx._db.execute(text)
    return damage


def image(farm: Farm) -> Path:
    return next(farm.root.glob("jobs/*/out1.png"))


DAMAGES: Dict[str, Tuple[str, Callable[[Farm], Any]]] = {
    "an image is deleted": ("out1.png", lambda farm: image(farm).unlink()),
    "an image is cut off": ("out1.png", lambda farm: image(farm).write_bytes(png()[:-9])),
    "an image is another": ("out1.png", lambda farm: image(farm).write_bytes(png(99))),
    "an image lies outside": ("task", sql("UPDATE task SET name = '../out1.png' WHERE frame = 1")),
    "a hash is lost": ("out1.png", sql("UPDATE task SET sha256 = NULL WHERE frame = 1")),
    "a done frame is queued": ("counters", sql("UPDATE task SET state = 'queued' WHERE frame = 1")),
    **{f"{name} is miscounted": ("counters", sql(f"UPDATE job SET {name} = {name} + 1"))
       for name in ("queued", "leased", "done", "failed", "cancelled")},
    "a frame is leased to nobody": ("task", sql("UPDATE task SET state = 'leased' WHERE frame = 3")),
    "a frame in work is queued": ("task", sql("UPDATE task SET state = 'queued' WHERE frame = 2")),
    "a try in work is lost": ("task", sql("UPDATE attempt SET state = 'lost' WHERE state = 'live'")),
    "a lease is empty": ("lease", sql("DELETE FROM attempt WHERE state = 'live'")),
    "a lease has ended too early": ("lease", sql("UPDATE lease SET ended = 1, why = 'x'")),
    "a lease is not ended": ("lease", sql("UPDATE lease SET ended = NULL")),
    "a worker is removed with its lease": ("lease", sql("UPDATE worker SET state = 'removed'")),
    "a worker is pending with a lease": ("lease", sql("UPDATE worker SET state = 'pending'")),
    "two results are accepted": ("accepted", sql(
        "INSERT INTO attempt (task, lease, worker, state, started)"
        " SELECT task, (SELECT id FROM lease WHERE ended IS NULL), worker, 'done', 1"
        " FROM attempt WHERE state = 'done'")),
    "a file is forgotten": ("blob", sql("DELETE FROM blob")),
    "a file is deleted": ("blob", lambda farm: farm.store.blob_path(sha256(SCENE)).unlink()),
    "a lease is unknown": ("lease", lambda farm: farm.scheduler.grants.refill(())),
    "a job is done too early": ("job", sql("UPDATE job SET state = 'done'")),
    "a job is failed without reason": ("job", sql("UPDATE job SET state = 'failed'")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_invariants_find_the_damage_when(name: str, tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    worker = farm.worker()
    farm.submit(3)
    farm.finish(worker, farm.lease(worker))
    farm.lease(worker)
    assert broken(farm.scheduler) == []
    says, damage = DAMAGES[name]
    damage(farm)
    found = broken(farm.scheduler)
    assert any(says in problem for problem in found), found
    farm.close()


# --- whatever happens

@pytest.fixture(params=[1, 2])
def chaos(request: Any, tmp_path: Path) -> Iterator[Chaos]:
    one = Chaos(Farm(tmp_path), request.param)
    yield one
    one.farm.close()


@pytest.mark.slow
def test_after_anything_at_all_the_data_is_whole_and_every_job_can_be_finished(
        chaos: Chaos) -> None:
    for _ in range(1000):
        chaos.step()
    chaos.do_submit()
    chaos.bring_to_an_end()


# --- how long a frame may take

def test_a_frame_may_take_twenty_times_what_the_others_took_and_ten_minutes_at_least(
        farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(frames=9)
    lease = farm.lease(worker)
    assert lease.timeout == 0  # nothing is known yet
    farm.finish(worker, lease, cpu=2.0)
    lease = farm.lease(worker)
    assert lease.timeout == 600
    farm.finish(worker, lease, cpu=1000.0)
    lease = farm.lease(worker)
    assert lease.timeout == 10_020  # 20 times the median of 2 and 1000
    farm.finish(worker, lease, cpu=40.0)
    assert farm.lease(worker).timeout == 800


def test_a_time_limit_of_the_job_goes_before_what_its_frames_took(farm: Farm) -> None:
    worker = farm.worker()
    job = farm.submit(frames=9, frame_timeout=30)
    lease = farm.lease(worker)
    assert lease.timeout == 30 and LeaseSpec.from_wire(lease.to_wire()) == lease
    farm.finish(worker, lease, cpu=1000.0)
    assert farm.lease(worker).timeout == 30
    farm.scheduler.change(job, {"frame_timeout": 45})
    assert farm.lease(worker).timeout == 45
    assert farm.ask("GET", f"/api/v1/jobs/{job}").json()["frame_timeout"] == 45


# --- files that scenes write

def write(farm: Farm, worker: int, lease: LeaseSpec, index: int = 0, **files: bytes) -> bool:
    task = lease.tasks[index]
    return farm.scheduler.finish(worker, lease.id, task.id, png(task.id), b"", Cost(1, 1, 1),
                                 written=files)


def written(farm: Farm, job: int) -> Dict[str, Tuple[int, bytes]]:
    with farm.store.read() as tx:
        return {row.path: (row.frame, farm.store.blob_path(row.sha256).read_bytes())
                for row in tx.written(job)}


def test_of_a_file_that_all_frames_write_the_last_frames_stays(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(2)
    first, last = farm.lease(anna), farm.lease(bert)
    assert write(farm, bert, last, a=b"two", b=b"two")
    assert write(farm, anna, first, a=b"one", c=b"one")
    assert written(farm, job) == {"a": (2, b"two"), "b": (2, b"two"), "c": (1, b"one")}


def test_a_picture_that_is_not_taken_brings_no_files(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(1)
    lease = farm.lease(anna)
    farm.clock.advance(60)
    farm.scheduler.expire()
    other = farm.lease(bert)
    assert write(farm, bert, other, a=b"bert's")
    assert not write(farm, anna, lease, a=b"anna's", b=b"anna's")
    assert written(farm, job) == {"a": (0, b"bert's")}


def test_what_scenes_wrote_lives_as_long_as_their_job(farm: Farm) -> None:
    anna = farm.worker("anna")
    job = farm.submit(1)
    write(farm, anna, farm.lease(anna), a=b"text")
    farm.clock.advance(povfarm.KEEP_BLOBS + 1)
    farm.scheduler.tidy()
    assert written(farm, job) == {"a": (0, b"text")}
    farm.scheduler.delete(job)
    farm.scheduler.tidy()
    assert not farm.store.blob_path(sha256(b"text")).exists()


# --- workers of other systems

def guest(farm: Farm, name: str = "old", takes: Callable[[Any, Any], bool] = lambda tx, job: True,
          cuts: bool = False) -> int:
    worker = farm.worker(name)
    farm.scheduler.receive(worker, povfarm.Guest(130.0, 40.0, takes, lambda job: cuts))
    return worker


def test_a_guest_may_be_silent_for_longer(farm: Farm) -> None:
    job, old, ours = farm.submit(2), guest(farm), farm.worker()
    lease = farm.lease(old)
    farm.lease(ours)
    farm.clock.advance(100)
    farm.scheduler.expire()
    assert farm.states(job) == ["leased", "queued"] and farm.scheduler.live_workers() == {old}
    assert farm.beat(old, lease) == []
    farm.clock.advance(131)
    farm.scheduler.expire()
    assert farm.states(job) == ["queued", "queued"] and not farm.scheduler.live_workers()


def test_a_guest_is_given_whole_frames_of_the_jobs_that_it_takes(farm: Farm) -> None:
    jobs = [farm.submit(2, name=name, priority=1) for name in ("no", "yes")]
    sliced = farm.submit(2, values={"Height": "600"}, slices="2", priority=5)
    old = guest(farm, takes=lambda tx, job: job.name != "no")
    lease = farm.lease(old)
    assert (lease.job, lease.tasks[0].kind) == (jobs[1], povfarm.TaskKind.FRAME)
    assert farm.lease(farm.worker()).job == sliced
    more = farm.scheduler.lease(old, Offer(1, 1, 1, jobs[0]), 0.0, lambda: True)
    assert more == [] and farm.states(jobs[0]) == ["queued", "queued"]


BIG = {"Height": "600"}


def test_a_slice_that_failed_does_not_wait_for_a_guest(farm: Farm) -> None:
    farm.submit(1, values=BIG, slices="2")
    worker, old = farm.worker(), guest(farm)
    lease = farm.lease(worker)
    farm.fail(worker, lease)
    assert farm.leases(old) == [] and farm.lease(worker).tasks == lease.tasks


def test_a_slice_of_a_bad_scene_is_not_tried_by_a_guest(farm: Farm) -> None:
    job, worker = farm.submit(1, values=BIG, slices="2"), farm.worker()
    guest(farm)
    farm.fail(worker, farm.lease(worker), scene=True)
    assert farm.states(job)[0] == "failed"


def test_frames_are_not_sliced_for_the_sake_of_guests(farm: Farm) -> None:
    farm.submit(1, values=BIG)
    farm.worker()
    assert farm.lease(guest(farm)).tasks[0].kind is povfarm.TaskKind.FRAME


def test_a_guest_that_has_nothing_is_gone_sooner(farm: Farm) -> None:
    farm.submit(1)
    old, idle = guest(farm), guest(farm, "idle")
    farm.lease(old)
    assert not farm.leases(idle)
    for seconds, there in ((39, {old, idle}), (2, {old}), (88, {old}), (2, set())):
        farm.clock.advance(seconds)
        assert farm.scheduler.live_workers() == there


def test_a_guest_that_can_gets_slices_as_ours_do(farm: Farm) -> None:
    job = farm.submit(1, values=BIG, slices="2")
    old, worker, whole = guest(farm, cuts=True), farm.worker(), guest(farm, "whole")
    lease = farm.lease(old)
    assert (lease.tasks[0].kind, lease.tasks[0].top, lease.tasks[0].bottom) == (
        povfarm.TaskKind.SLICE, 0, 300)
    assert farm.leases(whole) == []
    farm.fail(old, lease)
    assert farm.lease(worker).tasks[0].top == 0 and farm.lease(old).tasks[0].top == 300
    assert farm.states(job) == ["leased"]


def test_what_a_guest_failed_comes_last_until_it_fails_all(farm: Farm) -> None:
    farm.submit(9)
    frames = []
    for name in ("a", "b", "c"):
        one = guest(farm, name)
        lease = farm.lease(one)
        farm.fail(one, lease)
        farm.scheduler.leave(one)
        frames.append(lease.tasks[0].frame)
    assert frames == [1, 2, 3]
    last = guest(farm, "d")
    rest = list(iter(lambda: [task.frame for lease in farm.leases(last) for task in lease.tasks], []))
    assert [frame for some in rest for frame in some] == [4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert rest[-3:] == [[1], [2], [3]]


def test_guests_that_fail_everything_find_out_that_the_scene_is_bad(farm: Farm) -> None:
    job, some = farm.submit(50), [guest(farm, name) for name in "abcd"]
    for _ in range(20):
        for one in some:
            for lease in farm.leases(one):
                farm.fail(one, lease)
    assert farm.state(job) == "paused" and farm.states(job).count("failed") == 3


def test_a_guest_that_is_long_gone_is_forgotten_but_not_what_it_did(farm: Farm) -> None:
    farm.submit(1)
    info = povfarm.WorkerInfo("attic", 1, 0, "HTTPov", {}, ("roof",))
    old, idle = (farm.scheduler.join(info, f"HTTPov {name}", "::1") for name in ("a", "b"))
    ours = farm.worker()
    lease = farm.lease(old)
    farm.finish(old, lease)

    def known(seconds: float) -> List[int]:
        farm.clock.advance(seconds)
        farm.leases(idle, wait=0)  # it goes on asking
        farm.scheduler.tidy()
        with farm.store.read() as tx:
            return [row.id for row in tx.workers()]

    assert known(povfarm.KEEP_GUESTS - 1) == [old, idle, ours]
    assert known(2) == [idle, ours]
    totals = farm.ask("GET", "/api/v1/totals").json()
    assert totals["computers"] == [{"name": "attic", "frames": 1.0, "wall": 1.0, "failures": 0}]
    assert "attic" in farm.ask("GET", "/api/v1/jobs/1/frames/0/log").body.decode()
    assert farm.scheduler.join(info, "HTTPov a", "::1") not in (old, idle, ours)


# --- what was done so far

def test_totals_tell_who_did_what(farm: Farm) -> None:
    job = farm.submit(3)
    some = [farm.scheduler.join(povfarm.WorkerInfo(name, 1, 0, "", {}, tags), name * 64, "::1")
            for name, tags in (("ann", ("roof", "night")), ("eve@roof-pc", ()), ("bob@roof-pc", ("roof",)))]
    for one in some:
        farm.finish(one, farm.lease(one), cpu=2.5)
    sliced = farm.submit(1, values=BIG, slices="4")
    for one, rows in ((some[0], 3), (some[1], 1)):
        for _ in range(rows):
            lease = farm.lease(one)
            farm.finish(one, lease, image=png(1, height=150))
    bad = farm.submit(1)
    lease = farm.lease(some[2])
    farm.clock.advance(7)
    farm.fail(some[2], lease)
    farm.scheduler.delete(job)
    farm.scheduler.remove_worker(some[2])
    assert farm.state(sliced) == "done" and farm.state(bad) == "active"
    totals = farm.ask("GET", "/api/v1/totals").json()
    assert {kind: [tuple(view.values()) for view in views] for kind, views in totals.items()} == {
        "workers": [("ann", 1.75, 5.5, 0), ("eve@roof-pc", 1.25, 3.5, 0),
                    ("bob@roof-pc", 1.0, 9.5, 1)],
        "computers": [("roof-pc", 2.25, 13.0, 1), ("ann", 1.75, 5.5, 0)],
        "groups": [("roof", 2.75, 15.0, 1), ("night", 1.75, 5.5, 0), ("", 1.25, 3.5, 0)]}


def test_nobody_knows_when_a_job_is_done_that_nobody_renders(farm: Farm) -> None:
    job, worker = farm.submit(3), farm.worker()
    farm.finish(worker, farm.lease(worker))
    farm.clock.advance(10)
    assert farm.ask("GET", f"/api/v1/jobs/{job}").json()["eta"] is None
    farm.lease(worker)
    assert farm.ask("GET", f"/api/v1/jobs/{job}").json()["eta"] == 20.0


@pytest.mark.slow
def test_a_guest_gets_no_copy_of_a_slice(farm: Farm) -> None:
    farm.submit(1, values=BIG, slices="1000")
    worker, old = farm.worker(), guest(farm)
    while farm.leases(worker, idle=0):
        pass
    farm.clock.advance(20)
    assert farm.leases(old) == []


def test_an_offer_may_be_for_one_job_only(farm: Farm) -> None:
    farm.submit(2, priority=9)
    job = farm.submit(2)
    lease, = farm.scheduler.lease(farm.worker(), Offer(1, 1, 1, job), 0.0, lambda: True)
    assert lease.job == job


def test_a_worker_that_waits_to_be_let_in_hears_of_it_at_once(farm: Farm) -> None:
    ida = farm.worker("ida", admitted=False)
    with farm.store.read() as tx:
        code = next(row.code for row in tx.workers())
    before = farm.clock.monotonic()
    farm.clock.meanwhile.append(lambda: farm.scheduler.admit(code))
    assert farm.leases(ida, wait=25.0) == []
    assert farm.clock.monotonic() < before + 2


# --- what takes several steps

def test_others_have_their_turn_while_a_large_job_changes(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "STEP", 2)
    worker, small = farm.worker(), farm.submit(1)
    large = farm.submit(5)
    assert farm.states(large) == ["queued"] * 5 and farm.state(large) == "active"
    between: List[List[str]] = []

    def look() -> None:
        between.append(farm.states(large))
        assert farm.problems() == []

    farm.clock.meanwhile.extend([look, lambda: farm.finish(worker, farm.lease(worker))])
    farm.scheduler.cancel(large)
    assert between == [["cancelled"] * 2 + ["queued"] * 3] and farm.state(small) == "done"
    assert farm.states(large) == ["cancelled"] * 5 and farm.state(large) == "cancelled"
    farm.clock.meanwhile.append(look)
    assert farm.scheduler.retry(large) == 5
    assert between[1] == ["queued"] * 2 + ["cancelled"] * 3 and farm.states(large) == ["queued"] * 5
    farm.scheduler.delete(large)
    with farm.store.read() as tx:
        assert tx.left_rows() == set() and tx.task_of_frame(large, 5) is None
    assert farm.problems() == []


def test_what_was_interrupted_is_gone_on_with(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "STEP", 2)
    farm = Farm(tmp_path)
    cancelled, deleted = farm.submit(5), farm.submit(5)

    def crash() -> None:
        raise KeyboardInterrupt

    for action in (lambda: farm.scheduler.cancel(cancelled), lambda: farm.scheduler.delete(deleted),
                   lambda: farm.submit(5)):
        farm.clock.meanwhile.append(crash)
        with pytest.raises(KeyboardInterrupt):
            action()
        assert farm.problems() == []
    with farm.store.read() as tx:
        assert tx.left_rows() == {deleted, deleted + 1} and len(tx.jobs(0, -1)) == 1
    farm = farm.restarted()
    farm.scheduler.expire()
    assert farm.states(cancelled) == ["cancelled"] * 5 and farm.problems() == []
    with farm.store.read() as tx:
        assert tx.left_rows() == set() and tx.task_of_frame(deleted + 1, 1) is None
    assert farm.submit(1) == deleted + 2


def test_the_failure_that_is_shown_is_of_the_first_frame(farm: Farm) -> None:
    """POV-Ray would have stopped there; a try that failed before does not matter."""
    anna = farm.worker("anna")
    job = farm.submit(frames=4, retry_limit=2)
    leases = [farm.lease(anna, slots=4) for _ in range(4)]
    assert [lease.tasks[0].frame for lease in leases] == [1, 2, 3, 4]

    def shown() -> int:
        failure = farm.ask("GET", f"/api/v1/jobs/{job}").json()["failure"]
        return int(failure["frame"]) if failure else 0

    assert shown() == 0
    farm.fail(anna, leases[0])  # which is tried again
    assert shown() == 1
    farm.fail(anna, leases[3], scene=True)
    assert shown() == 4
    farm.fail(anna, leases[1], scene=True)
    assert shown() == 2
    farm.finish(anna, leases[2])
    farm.finish(anna, farm.lease(anna))
    assert farm.state(job) == "failed" and shown() == 2


# --- the order in which frames are handed out

def handed_out(farm: Farm, job: int, **offer: Any) -> List[List[int]]:
    """Let one worker render all of a job; return the frames of each lease."""
    worker, order = farm.worker(), []
    while farm.state(job) == "active":
        lease = farm.lease(worker, **offer)
        order.append([task.frame for task in lease.tasks])
        for index in range(len(lease.tasks)):
            farm.finish(worker, lease, index)
    assert sorted(itertools.chain(*order)) == list(range(1, len(farm.tasks(job)) + 1))
    return order


@pytest.mark.parametrize("options, expected", [
    ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ({"order": "reverse"}, [8, 7, 6, 5, 4, 3, 2, 1]),
    ({"order": "spread"}, [1, 5, 3, 7, 2, 6, 4, 8]),
    ({"first": "5-6"}, [5, 6, 1, 2, 3, 4, 7, 8]),
    ({"first": "7,2-3"}, [7, 2, 3, 1, 4, 5, 6, 8]),
    ({"first": "3-5", "order": "reverse"}, [5, 4, 3, 8, 7, 6, 2, 1]),
])
def test_frames_are_handed_out_in_the_order_that_the_job_asks_for(
        farm: Farm, options: Dict[str, Any], expected: List[int]) -> None:
    job = farm.submit(8, batch=1, **options)
    assert handed_out(farm, job) == [[frame] for frame in expected]


def test_random_is_no_order_and_every_frame_comes_once(farm: Farm) -> None:
    orders = [handed_out(farm, farm.submit(40, order="random")) for _ in range(2)]
    assert orders[0] != orders[1]  # two jobs, two orders
    for order in orders:
        assert all(len(frames) == 1 for frames in order)
        steps = [after[0] - before[0] for before, after in zip(order, order[1:])]
        assert min(steps) < 0 < max(steps) and len(set(steps)) > 10


@pytest.mark.parametrize("options, expected", [
    ({"batch": 3}, [[1, 2, 3], [4, 5, 6], [7, 8]]),
    ({"batch": 3, "order": "reverse"}, [[6, 7, 8], [3, 4, 5], [1, 2]]),
    ({"batch": 3, "first": "5-6"}, [[5, 6], [1, 2, 3], [4], [7, 8]]),
    ({"batch": 2, "order": "spread"}, [[1, 2], [5, 6], [3, 4], [7, 8]]),
])
def test_a_batch_is_so_many_neighbours_however_many_workers_there_are(
        farm: Farm, options: Dict[str, Any], expected: List[List[int]]) -> None:
    for name in "cdefg":
        farm.worker(name)
    assert handed_out(farm, farm.submit(8, **options), slots=7) == expected


def test_the_order_is_changed_while_a_job_runs(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(8, batch=1)
    farm.finish(worker, farm.lease(worker))
    farm.scheduler.change(job, {"first": "6", "order": "reverse"})
    assert [farm.lease(worker).tasks[0].frame for _ in range(3)] == [6, 8, 7]


@pytest.mark.parametrize("options, problem", [
    ({"first": "9"}, "it has 1 to 8"), ({"first": "x"}, "cannot be set"),
    ({"order": "backwards"}, "cannot be set"), ({"batch": 1001}, "cannot be set"),
    ({"in_order": True, "order": "reverse"}, "run in order"),
    ({"in_order": True, "first": "2"}, "run in order"),
])
def test_an_order_that_cannot_be_is_refused(
        farm: Farm, options: Dict[str, Any], problem: str) -> None:
    job = farm.submit(8)
    with pytest.raises(UserError, match=problem):
        farm.scheduler.change(job, options)
    assert farm.job(job).options == JobOptions()


def test_slices_are_begun_in_the_order_that_the_job_asks_for(farm: Farm) -> None:
    worker = farm.worker()
    farm.submit(3, slices="2", order="reverse", values={"Height": "64", "Width": "64"})
    assert [(lease.tasks[0].kind, lease.tasks[0].frame)
            for lease in farm.leases(worker, want=1)] == [("slice", 3)]


# --- frames that are rendered again

def test_done_to_queued_when_rendered_again(farm: Farm) -> None:
    worker, job, lease = leased(farm, 2)
    farm.finish(worker, lease)
    farm.render(worker)
    image = farm.root / "jobs" / f"{job}-ball" / "out1.png"
    assert farm.scheduler.again(job, "1") == 1
    assert farm.story(job, 1) == ["leased", "done", "queued"] and farm.problems() == []
    assert image.read_bytes() == png(lease.tasks[0].id)  # until another comes
    assert farm.ask("GET", f"/api/v1/jobs/{job}/frames/1/image").status == 404
    again = farm.lease(worker)
    farm.finish(worker, again, image=png(99))
    assert image.read_bytes() == png(99) and farm.task(job, 1).sha256 == sha256(png(99))
    assert farm.ask("GET", f"/api/v1/jobs/{job}/frames/1/image").body == png(99)
    assert farm.state(job) == "done" and farm.problems() == [] and farm.leftovers() == []


def test_job_done_to_active_when_frames_are_rendered_again(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(5)
    farm.render(worker)
    farm.scheduler.again(job, "2-3,5")
    assert farm.states(job) == ["done", "queued", "queued", "done", "queued"]
    assert farm.story(job) == ["active", "done", "active"]
    assert (farm.job(job).cpu, farm.job(job).finished) == (2.0, None)  # of what is there
    farm.render(worker)
    assert farm.story(job) == ["active", "done", "active", "done"] and farm.job(job).cpu == 5.0


def test_nothing_that_was_begun_before_is_taken_for_a_frame_that_is_rendered_again(
        farm: Farm) -> None:
    anna, bert, job = farm.worker("anna"), farm.worker("bert"), farm.submit(2, batch=2)
    late = farm.lease(anna)
    farm.clock.advance(31)
    farm.scheduler.expire()
    first = farm.lease(bert)
    farm.finish(bert, first)
    farm.scheduler.again(job, "1")
    assert farm.states(job)[0] == "queued"
    for worker, lease in ((anna, late), (bert, first)):
        with pytest.raises(StaleLease, match="rendered again"):
            farm.finish(worker, lease, image=png(77))
        with pytest.raises(StaleLease):
            farm.fail(worker, lease)
    assert farm.states(job)[0] == "queued"
    farm.finish(bert, farm.lease(bert, want=1))
    assert farm.task(job, 1).sha256 == sha256(png(first.tasks[0].id)) and farm.problems() == []


@pytest.mark.parametrize("state", ["queued", "leased"])
def test_what_waits_or_is_rendered_is_left_alone_when_it_is_to_be_rendered_again(
        farm: Farm, state: str) -> None:
    worker, job = farm.worker(), farm.submit(2)
    lease = farm.lease(worker) if state == "leased" else None
    assert farm.scheduler.again(job, "1") == 0 and farm.states(job)[0] == state
    assert lease is None or farm.finish(worker, lease)


def test_failed_and_cancelled_frames_are_rendered_again_and_no_others_of_them(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(5, retry_limit=1)
    use_up(farm, worker, 1, 1)
    farm.finish(worker, farm.lease(worker))
    farm.scheduler.cancel(job)
    assert farm.scheduler.again(job, "1,3") == 2
    assert farm.states(job) == ["queued", "done", "queued", "cancelled", "cancelled"]
    assert farm.state(job) == "active" and farm.problems() == []
    farm.render(worker)
    assert farm.states(job) == ["done", "done", "done", "cancelled", "cancelled"]
    assert farm.state(job) == "done"


@pytest.mark.parametrize("radiosity, left", [("share", 0), ("animation", 1)])
def test_a_sliced_frame_is_rendered_again_as_a_whole_one(
        farm: Farm, radiosity: str, left: int) -> None:
    worker, job = farm.worker(), farm.submit(
        2, slices="2", radiosity=radiosity, uses=["radiosity"],
        values={"Height": "64", "Width": "64"})
    while farm.state(job) == "active":
        lease = farm.lease(worker)
        task = lease.tasks[0]
        farm.finish(worker, lease, image=b"samples" if task.kind == "pass" else png(
            1, 64, task.bottom - task.top))
    farm.scheduler.again(job, "1")
    with farm.store.read() as look:
        task = farm.task(job, 1)
        assert (task.cut, task.state) == (None, "queued")
        assert [part.kind for part in look.parts(task.id)] == ["pass"] * left
    assert farm.problems() == [] and len(farm.leftovers()) == 0
    assert farm.scheduler.again(job, "2") == 1 and farm.problems() == []


def test_frames_that_were_compared_are_compared_again(farm: Farm) -> None:
    anna, bert, job = farm.worker("anna"), farm.worker("bert"), farm.submit(2, verify=100, first="2")
    for _ in range(2):
        for worker in (anna, bert):
            assert farm.states(job)[1] == "queued"
            farm.finish(worker, farm.lease(worker))
        assert farm.states(job)[1] == "done"
        farm.scheduler.again(job, "2")
    assert farm.story(job, 2).count("done") == 2 and farm.problems() == []


@pytest.mark.parametrize("frames, problem", [
    ("4-9", "it has 1 to 3"), ("x", "neither a frame"), ("", None)])
def test_frames_that_there_are_not_cannot_be_rendered_again(
        farm: Farm, frames: str, problem: Any) -> None:
    worker, job = farm.worker(), farm.submit(3)
    farm.render(worker)
    reply = farm.ask("POST", f"/api/v1/jobs/{job}/retry?frames={frames}", json_body={})
    assert reply.status == (400 if problem else 200)
    assert problem is None or problem in reply.json()["error"]
    assert farm.state(job) == "done"


def test_a_still_is_rendered_again(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(1, values={"Final_Frame": "0", "Initial_Frame": "0"})
    farm.render(worker)
    frame = farm.tasks(job)[0].frame
    assert farm.ask("POST", f"/api/v1/jobs/{job}/retry?frames={frame}", json_body={}).status == 200
    assert farm.states(job) == ["queued"]


def test_a_lease_costs_no_call_for_each_of_the_workers(farm: Farm) -> None:
    farm.submit(frames=50)
    worker = farm.worker()

    def calls() -> int:
        profile = cProfile.Profile()
        profile.runcall(farm.lease, worker, want=1)
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    calls()
    before = calls()
    for number in range(500):
        farm.scheduler._crew._see(1000 + number)
    assert calls() < before + 100
