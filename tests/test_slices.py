"""Frames cut into slices, on a farm without sockets and without waiting."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest

import povfarm
from helpers.anything import Chaos
from helpers.farm_in_a_box import Farm, farm_fixture, pov_job
from helpers.pictures import png
from helpers.slices import (
    HEIGHT,
    SIZE,
    WIDTH,
    hand_in,
    part_files,
    parts,
    picture,
    spans,
    states,
    submit,
    work,
)
from povfarm import Cost, LeaseSpec, Region, SliceCost, TaskKind, TaskState

BLOCKS = {**SIZE, "Antialias": "On", "Render_Block_Size": "32"}

__all__ = ["farm_fixture"]


# --- what these tests do with a farm

def beat(farm: Farm, worker: int, lease: LeaseSpec, part: float) -> Dict[int, int]:
    ended, cuts = farm.scheduler.beat(worker, {lease.id: {lease.tasks[0].id: part}}, 0)
    assert not ended
    return cuts


@pytest.fixture(name="two")
def two_fixture(farm: Farm) -> Tuple[int, int]:
    """Two workers that are there and idle."""
    workers = farm.worker("anna"), farm.worker("bert")
    assert not farm.leases(workers[0]) and not farm.leases(workers[1])
    return workers


# --- a number of slices

@pytest.mark.parametrize(("many", "values", "rows"), [
    (2, SIZE, [48, 48]), (3, SIZE, [32, 32, 32]), (7, SIZE, [13, 14, 14, 13, 14, 14, 14]),
    (16, SIZE, [6] * 16), (500, SIZE, [1] * 96), (2, BLOCKS, [32, 64]), (3, BLOCKS, [32] * 3),
    (16, BLOCKS, [32] * 3),
    # A region's first and last slice take along what lies outside of it.
    (3, {**SIZE, "Start_Row": "11", "End_Row": "40"}, [20, 10, 66]),
    (2, {**BLOCKS, "Start_Row": "21", "End_Row": "84"}, [52, 44]),
])
def test_a_number_of_slices_are_as_many_and_alike(
        farm: Farm, many: int, values: Dict[str, str], rows: List[int]) -> None:
    worker = farm.worker()
    job = submit(farm, values=values, slices=many)
    leases = work(farm, worker)
    assert [lease.tasks[0].bottom - lease.tasks[0].top for lease in leases] == rows
    shades = [lease.tasks[0].id for lease in leases]
    assert picture(farm, job) == [shade for shade, size in zip(shades, rows) for _ in range(size)]
    assert farm.state(job) == "done" and part_files(farm, job) == []
    frame = farm.tasks(job)[0]
    assert frame.cpu == farm.job(job).cpu == len(rows) and frame.memory == 1 << 20


def test_one_worker_does_not_take_all_slices(farm: Farm, two: Tuple[int, int]) -> None:
    submit(farm, slices=4)
    assert len(farm.leases(two[0], want=4, slots=4, idle=4)) == 2
    assert len(farm.leases(two[1], want=4, slots=4, idle=4)) == 2


def test_slices_of_one_are_none(farm: Farm, two: Tuple[int, int]) -> None:
    for slices in (1, "off"):
        job = submit(farm, slices=slices)
        assert farm.lease(two[0]).tasks[0].kind is TaskKind.FRAME
        farm.scheduler.cancel(job)


def test_slices_may_be_changed_midway(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=8)
    for slices in (6, "auto", "off"):
        hand_in(farm, two[0], farm.lease(two[0]))
        farm.scheduler.change(job, {"slices": slices})
    work(farm, *two)
    assert spans(farm, job)[:2] == [(0, 12), (12, 16)] and farm.state(job) == "done"
    assert len(spans(farm, job)) == 4


def test_every_frame_of_an_animation_is_cut(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, 3, slices=2)
    work(farm, *two)
    assert farm.state(job) == "done"
    for frame in (1, 2, 3):
        shades = picture(farm, job, frame)
        assert shades == [shades[0]] * 48 + [shades[-1]] * 48 and shades[0] != shades[-1]


@pytest.mark.parametrize(("values", "options", "words"), [
    ({"Output_File_Type": "J"}, {}, "JPEG"),
    ({}, {"in_order": True}, "in order"),
    ({"Dither": "On"}, {}, "one block"),
])
def test_what_cannot_be_sliced_is_refused_and_rendered_whole_by_auto(
        farm: Farm, two: Tuple[int, int], values: Dict[str, str], options: Dict[str, Any],
        words: str) -> None:
    with pytest.raises(povfarm.UserError, match=words):
        submit(farm, values=values, slices=3, **options)
    job = submit(farm, values=values, **options)
    assert farm.lease(two[0]).tasks[0].kind is TaskKind.FRAME
    with pytest.raises(povfarm.UserError, match=words):
        farm.scheduler.change(job, {"slices": 3})


def test_other_changes_leave_slices_and_radiosity_alone(farm: Farm) -> None:
    job = submit(farm, slices=3, radiosity="animation")
    farm.scheduler.change(job, {"priority": 5})
    assert (farm.job(job).options.slices, farm.job(job).options.radiosity) == ("3", "animation")


# --- auto

def test_auto_leaves_the_frame_whole_for_one_worker(farm: Farm) -> None:
    worker = farm.worker()
    submit(farm)
    assert farm.lease(worker).tasks[0].kind is TaskKind.FRAME


def test_auto_cuts_where_there_are_more_workers_than_frames(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm)
    first, second = farm.lease(two[0]), farm.lease(two[1])
    assert first.tasks[0].kind is second.tasks[0].kind is TaskKind.SLICE
    assert 0 == first.tasks[0].top < first.tasks[0].bottom == second.tasks[0].top
    assert farm.leases(two[0]) == []  # one slice has the whole of a worker
    for worker, lease in zip(two, (first, second)):
        hand_in(farm, worker, lease, wall=30)
    work(farm, *two)
    sizes = [bottom - top for top, bottom in spans(farm, job)]
    assert sum(sizes) == HEIGHT and len(sizes) > 2 and sizes[0] > sizes[-1]
    assert all(top % 8 == 0 for top, _ in spans(farm, job))
    assert farm.state(job) == "done" and len(set(picture(farm, job))) == len(sizes)


def test_a_worker_that_says_it_has_any_number_of_cores_does_not_get_the_whole_picture(
        farm: Farm) -> None:
    """What it says of itself may be a lie, until its slices show how fast it is."""
    workers = [farm.worker(name) for name in ("liar", "anna", "bert", "carl")]
    for cores, worker in zip((10_000, 2, 2, 2), workers):
        farm.scheduler.rejoin(worker, povfarm.WorkerInfo(
            str(worker), cores, 1 << 30, "Linux", {"povray": "3.7.0"}, ()), "10.0.0.1")
    submit(farm, values={"Height": "4096"}, slices="auto")
    rows = []
    for worker in workers:
        task = farm.lease(worker).tasks[0]
        rows.append((task.bottom or 0) - task.top)
    assert max(rows) == rows[0] <= 5 * min(rows), rows


def test_auto_leaves_frames_whole_that_are_many_small_or_cheap(
        farm: Farm, two: Tuple[int, int]) -> None:
    many = submit(farm, 3)
    assert farm.lease(two[0]).tasks[0].kind is TaskKind.FRAME
    farm.scheduler.cancel(many)
    small = submit(farm, values={"Height": "64"})
    assert farm.lease(two[0]).tasks[0].kind is TaskKind.FRAME
    farm.scheduler.cancel(small)
    job = submit(farm, 8)
    while farm.state(job) == "active":
        lease = farm.lease(two[0])
        for index, task in enumerate(lease.tasks):
            assert task.kind is TaskKind.FRAME
            farm.finish(two[0], lease, index, cpu=0.2, image=png(1, WIDTH, HEIGHT))


def test_the_last_frames_of_a_dear_animation_are_cut(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, 3)
    kinds = []
    while farm.state(job) == "active":
        for worker in two:
            for lease in farm.leases(worker):
                kinds.append(lease.tasks[0].kind)
                hand_in(farm, worker, lease, wall=60)
    assert kinds[:2] == [TaskKind.FRAME, TaskKind.FRAME] and set(kinds[2:]) == {TaskKind.SLICE}


# --- failures

def test_a_slice_that_fails_goes_to_another_worker(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2)
    lease = farm.lease(two[0])
    farm.fail(two[0], lease)
    assert farm.task(job, 0).state == "queued" and states(farm, job) == ["queued"]
    other = farm.lease(two[0])
    assert other.tasks[0].id != lease.tasks[0].id
    again = farm.lease(two[1])
    assert again.tasks[0].id == lease.tasks[0].id
    hand_in(farm, two[0], other)
    hand_in(farm, two[1], again)
    assert farm.state(job) == "done"
    assert farm.attempts(lease.tasks[0].id) == [("anna", "failed"), ("bert", "done")]


def test_a_slice_that_fails_for_good_fails_the_frame_until_retry(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=4, retry_limit=1)
    done, bad, under_way = farm.lease(two[0]), farm.lease(two[0]), farm.lease(two[1])
    hand_in(farm, two[0], done)
    farm.fail(two[0], bad)
    assert farm.states(job) == ["failed"] and farm.state(job) == "failed"
    assert states(farm, job) == ["done", "failed", "cancelled"]
    assert farm.beat(two[1], under_way) == [under_way.id]
    assert not hand_in(farm, two[1], under_way)  # too late: nobody knows whether it is wanted
    assert farm.problems() == []
    assert farm.scheduler.retry(job) == 1
    assert states(farm, job) == ["done", "queued", "queued"] and farm.states(job) == ["leased"]
    leases = work(farm, *two)
    assert done.tasks[0].id not in [lease.tasks[0].id for lease in leases]  # what is done stays
    assert farm.state(job) == "done" and len(set(picture(farm, job))) == 4


def test_the_strip_of_a_slice_that_failed_is_taken_late(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2, retry_limit=1)
    first, last = farm.lease(two[0]), farm.lease(two[1])
    farm.clock.advance(31)
    farm.scheduler.expire()
    again = {lease.tasks[0].id: lease for lease in (farm.lease(two[0]), farm.lease(two[0]))}
    hand_in(farm, two[0], again[first.tasks[0].id])
    farm.fail(two[0], again[last.tasks[0].id])
    assert farm.states(job) == ["failed"]
    assert hand_in(farm, two[1], last)
    assert farm.state(job) == "done" and len(set(picture(farm, job))) == 2


# --- the life of a job

def test_a_cancelled_job_cancels_slices_and_goes_on_where_it_was(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=4)
    hand_in(farm, two[0], farm.lease(two[0]))
    farm.fail(two[0], farm.lease(two[0]))
    under_way = farm.lease(two[0])
    farm.scheduler.cancel(job)
    assert farm.states(job) == ["cancelled"]
    assert states(farm, job) == ["done", "cancelled", "cancelled"]
    assert farm.beat(two[0], under_way) == [under_way.id]
    assert farm.leases(two[0]) == [] and farm.problems() == []
    with farm.store.read() as look:
        ended = [attempt.message for attempt in look.attempts(under_way.tasks[0].id)]
    assert ended[-1] == "job cancelled"
    farm.scheduler.retry(job)
    work(farm, *two)
    assert farm.state(job) == "done" and len(set(picture(farm, job))) == 4


def test_a_paused_job_gives_out_no_more_slices(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=3)
    lease = farm.lease(two[0])
    farm.scheduler.pause(job)
    assert farm.leases(two[1]) == [] and hand_in(farm, two[0], lease)
    assert farm.leases(two[0]) == [] and farm.state(job) == "paused"
    farm.scheduler.resume(job)
    work(farm, *two)
    assert farm.state(job) == "done"


def test_a_deleted_job_leaves_no_slices(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=3)
    hand_in(farm, two[0], farm.lease(two[0]))
    lease = farm.lease(two[0])
    farm.scheduler.delete(job)
    assert farm.beat(two[0], lease) == [lease.id]
    assert not farm.store.job_directory(job, "ball").exists()
    with pytest.raises(povfarm.StaleLease):
        hand_in(farm, two[0], lease)


def test_a_frame_that_is_put_together_while_its_job_is_deleted_leaves_nothing(
        farm: Farm, two: Tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(farm, slices=2)
    join = povfarm.join_rows

    def delete_first(strips: Sequence[Path], extension: str, to: Path) -> None:
        farm.scheduler.delete(job)
        join(strips, extension, to)

    monkeypatch.setattr(povfarm, "join_rows", delete_first)
    work(farm, *two)
    assert not farm.store.job_directory(job, "ball").exists()


def test_the_slice_of_a_dead_worker_goes_to_another(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2)
    dead, lease = farm.lease(two[0]), farm.lease(two[1])
    hand_in(farm, two[1], lease)
    farm.clock.advance(31)
    farm.scheduler.expire()
    assert states(farm, job) == ["queued", "done"] and farm.states(job) == ["leased"]
    work(farm, two[1])
    assert farm.attempts(dead.tasks[0].id) == [("anna", "expired"), ("bert", "done")]
    assert not hand_in(farm, two[0], dead)
    assert farm.state(job) == "done"


def test_when_all_slices_are_queued_again_so_is_the_frame(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2)
    for worker in two:
        farm.lease(worker)
        assert farm.states(job) == ["leased"]
    farm.scheduler.leave(two[0])
    assert farm.states(job) == ["leased"]
    farm.scheduler.leave(two[1])
    assert farm.states(job) == ["queued"] and states(farm, job) == ["queued", "queued"]
    assert farm.problems() == []
    work(farm, *two)
    assert len(spans(farm, job)) == 2


def test_a_restarted_coordinator_puts_together_what_was_complete(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = Farm(tmp_path)
    worker, job = farm.worker(), submit(farm, slices=3)
    monkeypatch.setattr(farm.scheduler._deliveries, "join_frames", lambda: None)
    work(farm, worker)
    assert states(farm, job) == ["done"] * 3 and farm.state(job) == "active"
    again = farm.restarted()
    with again.store.read() as tx:
        after = tx.last_event()
    again.clock.meanwhile.append(again.scheduler.expire)
    assert again.scheduler.wait_events(after, 5, 9)  # at once
    assert again.clock.mono == 5.0
    assert again.state(job) == "done" and len(set(picture(again, job))) == 3
    assert part_files(again, job) == [] and again.problems() == []
    again.close()


def test_a_restarted_coordinator_goes_on_with_slices_under_way(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = submit(farm)
    hand_in(farm, anna, farm.lease(anna))
    lease = farm.lease(bert)
    again = farm.restarted()
    assert again.beat(bert, lease) == []
    hand_in(again, bert, lease)
    work(again, anna, bert)
    assert again.state(job) == "done" and again.problems() == []
    again.close()


def test_a_restarted_coordinator_keeps_what_all_frames_share(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    worker = farm.worker()
    job = submit(farm, 3, uses=("radiosity",), radiosity="animation")
    hand_in(farm, worker, farm.lease(worker))
    farm.finish(worker, farm.lease(worker), image=png(1, WIDTH, HEIGHT))
    again = farm.restarted()
    again.store.sweep()
    lease = again.lease(worker)
    place = again.store.job_directory(job, "ball") / "parts"
    assert lease.shares and (place / f"{lease.shares[0]}.zip").is_file()
    assert again.problems() == []
    again.close()


# --- what is no strip of the picture

def test_what_is_not_the_strip_that_was_asked_for_is_refused(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=3)
    first, lease = farm.lease(two[0]), farm.lease(two[1])
    good = png(1, WIDTH, 32)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    spoilt = [good[:-20], bytes(flipped), png(1, WIDTH, 31), png(1, WIDTH + 1, 32),
              png(1, WIDTH, HEIGHT), b"P6 8 32 255\n" + bytes(8 * 32 * 3), b""]
    for image in spoilt:
        with pytest.raises(povfarm.ImageError):
            hand_in(farm, two[1], lease, image=image)
    for bottom in (33, 63, HEIGHT + 1):  # above what was asked for, and below the picture
        with pytest.raises(povfarm.ImageError):
            hand_in(farm, two[1], lease, bottom=bottom)
    assert states(farm, job) == ["leased", "leased"] and part_files(farm, job) == []
    hand_in(farm, two[0], first)
    hand_in(farm, two[1], lease)
    work(farm, *two)
    assert farm.state(job) == "done"


def test_a_part_of_a_whole_frame_is_refused(farm: Farm) -> None:
    worker = farm.worker()
    job = submit(farm)
    lease = farm.lease(worker)
    with pytest.raises(povfarm.ImageError):
        hand_in(farm, worker, lease, bottom=50)
    assert farm.states(job) == ["leased"] and hand_in(farm, worker, lease)


def test_a_refused_strip_is_told_with_422_and_a_slice_is_shown(
        farm: Farm, two: Tuple[int, int]) -> None:
    token = "#1:anna"
    job = submit(farm, slices=2)
    lease = farm.lease(two[0])
    task = lease.tasks[0]
    path = f"/api/v1/leases/{lease.id}/tasks/{task.id}?log=0"
    for body, query in ((png(1, WIDTH, 47), ""), (png(1, WIDTH, 48)[:-9], ""),
                        (png(1, WIDTH, 40), "&bottom=40")):
        assert farm.ask("PUT", path + query, body=body, key=token).status == 422
    image = f"/api/v1/jobs/{job}/slices/{task.id}/image"
    assert farm.ask("GET", image).status == 404
    strip = png(1, WIDTH, 48)
    assert farm.ask("PUT", path + "&bottom=48", body=strip, key=token).json() == {"accepted": True}
    assert farm.ask("GET", image).body == strip
    view = farm.ask("GET", f"/api/v1/jobs/{job}/frames").json()["frames"][0]
    assert [(part["top"], part["bottom"], part["state"]) for part in view["slices"]] == [
        (0, 48, "done")]
    assert view["progress"] == 0.5
    assert farm.ask("GET", f"/api/v1/jobs/{job}").json()["slices"]["done"] == 1
    work(farm, *two)
    assert farm.ask("GET", image).status == 404  # the frame is there
    assert "slices" not in farm.ask("GET", f"/api/v1/jobs/{job}/frames").json()["frames"][0]
    log = farm.ask("GET", f"/api/v1/jobs/{job}/frames/{view['frame']}/log").body.decode()
    assert "rows 0 to 47 on anna" in log and "rows 48 to 95" in log


# --- strips that reach further, and whole pictures that come late

def test_a_strip_that_reaches_further_down_settles_the_slices_below(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=4)
    first, second, third = farm.lease(two[0]), farm.lease(two[0]), farm.lease(two[1])
    assert hand_in(farm, two[0], first, bottom=60)  # of the third it has only some rows
    assert states(farm, job) == ["done", "done", "leased"]
    assert farm.beat(two[0], second) == [second.id] and farm.beat(two[1], third) == []
    assert not hand_in(farm, two[0], second)
    hand_in(farm, two[1], third)
    work(farm, *two)
    last = parts(farm, job)[-1].id
    assert picture(farm, job) == (
        [first.tasks[0].id] * 48 + [third.tasks[0].id] * 24 + [last] * 24)


def test_a_strip_settles_no_pass(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=3, uses=("radiosity",), retry_limit=1)
    for worker in two:
        farm.fail(worker, farm.lease(worker))
    first = farm.lease(two[0])
    assert hand_in(farm, two[0], first, bottom=HEIGHT)
    assert [part.state for part in parts(farm, job, kind="pass")] == ["failed", "failed"]
    work(farm, *two)
    assert farm.state(job) == "done"


def test_a_late_whole_picture_is_taken_for_a_frame_that_was_sliced_meanwhile(farm: Farm) -> None:
    anna = farm.worker("anna")
    job = submit(farm)
    lease = farm.lease(anna)
    farm.clock.advance(31)
    farm.scheduler.expire()
    bert, carl = farm.worker("bert"), farm.worker("carl")
    done, under_way = farm.lease(bert), farm.lease(carl)
    assert done.tasks[0].kind is TaskKind.SLICE
    hand_in(farm, bert, done)
    assert hand_in(farm, anna, lease)
    assert picture(farm, job) == [lease.tasks[0].id] * HEIGHT
    assert farm.state(job) == "done" and farm.beat(carl, under_way) == [under_way.id]
    assert part_files(farm, job) == []
    assert not hand_in(farm, carl, under_way)


def test_of_two_attempts_at_one_slice_the_first_counts(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2)
    slow = farm.lease(two[0])
    other = farm.lease(two[1])
    hand_in(farm, two[1], other)
    farm.clock.advance(20)
    second = farm.lease(two[1])
    assert second.tasks[0].id == slow.tasks[0].id
    assert hand_in(farm, two[1], second)
    assert farm.beat(two[0], slow) == [slow.id] and not hand_in(farm, two[0], slow)
    assert farm.state(job) == "done" and picture(farm, job)[0] == slow.tasks[0].id


def test_a_picture_that_comes_while_slices_are_put_together_is_the_one_on_disk(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    anna = farm.worker("anna")
    job = submit(farm)
    late = farm.lease(anna)
    farm.clock.advance(31)
    farm.scheduler.expire()
    bert = farm.worker("bert")
    farm.worker("carl")
    join = povfarm.join_rows

    def meanwhile(strips: Sequence[Path], extension: str, to: Path) -> None:
        monkeypatch.setattr(povfarm, "join_rows", join)
        monkeypatch.setattr(farm.scheduler._deliveries, "join_frames", lambda: None)
        assert hand_in(farm, anna, late)
        join(strips, extension, to)

    monkeypatch.setattr(povfarm, "join_rows", meanwhile)
    work(farm, bert)
    assert picture(farm, job) == [late.tasks[0].id] * HEIGHT
    assert farm.problems() == []


# --- a frame that drags

def dragging(farm: Farm, values: Optional[Dict[str, str]] = None,
             part: float = 0.25) -> Tuple[int, int, LeaseSpec, int]:
    """A whole frame that is so far after 20 seconds, its worker, and one that comes then."""
    anna = farm.worker("anna")
    job = submit(farm, values=values)
    lease = farm.lease(anna)
    assert lease.tasks[0].kind is TaskKind.FRAME
    farm.clock.advance(20)
    assert beat(farm, anna, lease, part) == {}
    return anna, farm.worker("bert"), lease, job


def told(farm: Farm) -> List[str]:
    """How frames became done, in words."""
    with farm.store.read() as tx:
        return [event.text for event in tx.events(0, 1000) if event.what == "done"]


def test_a_frame_that_drags_is_divided_when_another_is_idle(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm)
    rest = farm.lease(bert)
    assert spans(farm, job) == [(0, 60), (60, 96)]  # half of what is left, in rows
    assert (rest.tasks[0].top, rest.tasks[0].bottom) == (60, 96)
    assert farm.problems() == []
    frame, first = lease.tasks[0].id, parts(farm, job)[0].id
    assert farm.scheduler.progress(first) == pytest.approx(0.25 * 96 / 60)
    assert beat(farm, anna, lease, 0.25) == {frame: 60}
    assert farm.scheduler.progress(first) == pytest.approx(0.25 * 96 / 60)
    assert hand_in(farm, anna, lease, bottom=60)
    hand_in(farm, bert, rest)
    assert picture(farm, job) == [frame] * 60 + [rest.tasks[0].id] * 36
    assert farm.state(job) == "done" and farm.attempts(first) == [("anna", "done")]


def test_a_beat_that_waits_is_answered_when_the_frame_is_divided(farm: Farm) -> None:
    anna, bert, lease, _ = dragging(farm)
    farm.clock.meanwhile.append(lambda: farm.lease(bert))
    before = farm.clock.mono
    cuts = farm.scheduler.beat(anna, {lease.id: {lease.tasks[0].id: 0.25}}, 5)[1]
    assert cuts == {lease.tasks[0].id: 60} and farm.clock.mono == before


def test_a_worker_that_renders_on_to_the_end_takes_the_rest_along(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm)
    rest = farm.lease(bert)
    assert hand_in(farm, anna, lease)
    assert farm.state(job) == "done" and picture(farm, job) == [lease.tasks[0].id] * HEIGHT
    assert farm.beat(bert, rest) == [rest.id]


def test_a_frame_is_divided_again_and_again(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm)
    rest = farm.lease(bert)
    carl = farm.worker("carl")
    farm.clock.advance(5)
    beat(farm, anna, lease, 0.26)  # 25 of 96 rows in 25 seconds: 35 of its 60 are left
    third = farm.lease(carl)
    top = third.tasks[0].top
    assert spans(farm, job) == [(0, top), (top, 60), (60, 96)] and 25 < top < 60
    assert beat(farm, anna, lease, 0.26) == {lease.tasks[0].id: top}
    first = parts(farm, job)[0].id
    assert farm.scheduler.progress(first) == pytest.approx(0.26 * 96 / top)
    assert hand_in(farm, anna, lease, bottom=60)  # it heard of the first cut only
    hand_in(farm, bert, rest)
    assert farm.state(job) == "done" and farm.beat(carl, third) == [third.id]
    assert picture(farm, job) == [lease.tasks[0].id] * 60 + [rest.tasks[0].id] * 36
    assert told(farm)[-1] == "put together from 3 slices"


def test_how_long_a_task_takes_is_told_from_its_last_rows(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm, part=0.05)
    for seconds, part in ((20, 0.06), (9, 0.5), (9, 0.85)):
        farm.clock.advance(seconds)
        beat(farm, anna, lease, part)
    # An eighth is left, at a quarter of a second for each hundredth: not worth dividing.
    assert farm.leases(bert) == [] and spans(farm, job) == []


def test_a_block_that_takes_longer_than_those_before_makes_a_task_longer(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm, part=0.6)
    farm.clock.advance(1)
    beat(farm, anna, lease, 0.7)  # as it looks, it ends in three seconds
    assert farm.leases(bert) == []
    farm.clock.advance(25)
    beat(farm, anna, lease, 0.7)
    assert farm.lease(bert).tasks[0].kind is TaskKind.SLICE and len(spans(farm, job)) == 2


def test_how_fast_a_task_is_stays_known_when_it_is_divided(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm)
    farm.clock.advance(8)
    farm.lease(bert)
    farm.clock.advance(1)
    beat(farm, anna, lease, 0.45)  # blocks came just now: that does not make its worker quick
    assert spans(farm, job) == [(0, 60), (60, 96)]
    assert farm.lease(farm.worker("carl")).tasks[0].bottom == 60


def test_a_slice_of_which_two_workers_have_copies_is_divided_too(
        farm: Farm, two: Tuple[int, int]) -> None:
    anna, bert = two
    job = submit(farm, values={"Height": "800"})
    slow = farm.lease(anna)
    task = slow.tasks[0]
    while any(part.state != "done" for part in parts(farm, job)[1:]) or len(
            spans(farm, job)) == 1 or spans(farm, job)[-1][1] < 800:
        hand_in(farm, bert, farm.lease(bert), wall=1)
    farm.clock.advance(60)
    farm.beat(anna, slow)
    copy = farm.lease(bert)
    assert copy.tasks == slow.tasks
    farm.clock.advance(20)
    assert beat(farm, bert, copy, 0.1) == {} and beat(farm, anna, slow, 0.2) == {}
    assert farm.leases(bert) == []  # not from itself
    rest = farm.lease(farm.worker("carl"))
    top = rest.tasks[0].top
    assert task.top < top < rest.tasks[0].bottom == task.bottom
    assert beat(farm, anna, slow, 0.2) == {task.id: top}
    nearly = 0.98 * (top - task.top) / (task.bottom - task.top)
    assert beat(farm, bert, copy, nearly) == {task.id: top}
    assert farm.leases(bert) == []
    assert hand_in(farm, bert, copy, bottom=top) and farm.beat(anna, slow) == [slow.id]
    assert farm.problems() == []


def copied(farm: Farm) -> Tuple[int, int, LeaseSpec, LeaseSpec]:
    """A frame that was divided, and its first slice lent out again; who has it, and their leases."""
    anna, bert, lease, job = dragging(farm, {"Height": "800"})
    rest = farm.lease(bert)
    farm.clock.advance(10)
    assert beat(farm, anna, lease, 0.25) == {lease.tasks[0].id: rest.tasks[0].top}
    hand_in(farm, bert, rest, wall=0.1)
    first = parts(farm, job)[0]
    while True:  # what is below goes to others, until too little of it is left
        again = farm.lease(bert)
        if again.tasks[0].id == first.id:
            return anna, bert, lease, again
        hand_in(farm, bert, again, wall=0.1)


def test_who_has_a_frame_and_who_has_its_first_slice_are_both_told_of_a_cut(farm: Farm) -> None:
    anna, bert, lease, copy = copied(farm)
    frame, first = lease.tasks[0].id, copy.tasks[0]
    assert beat(farm, anna, lease, 0.02) == {frame: first.bottom}
    assert beat(farm, bert, copy, 0.0) == {}
    farm.clock.advance(20)
    beat(farm, anna, lease, 0.02)
    assert beat(farm, bert, copy, 0.1) == {}
    assert farm.scheduler.progress(first.id) == pytest.approx(0.1)  # of what it was given
    rest = farm.lease(farm.worker("carl"))
    top = rest.tasks[0].top
    assert rest.tasks[0].bottom == first.bottom > top
    assert beat(farm, anna, lease, 0.02) == {frame: top}
    assert beat(farm, bert, copy, 0.1) == {first.id: top}
    assert farm.scheduler.progress(first.id) == pytest.approx(0.1 * first.bottom / top)
    assert hand_in(farm, anna, lease, bottom=top) and farm.beat(bert, copy) == [copy.id]


def test_who_is_further_counts_no_more_when_it_is_gone(farm: Farm) -> None:
    anna, bert, lease, copy = copied(farm)
    beat(farm, anna, lease, 0.01)
    beat(farm, bert, copy, 0.9)
    assert farm.scheduler.progress(copy.tasks[0].id) == 0.9
    farm.scheduler.leave(bert)
    assert farm.scheduler.progress(copy.tasks[0].id) < 0.1


def test_a_cut_is_told_at_once_when_it_was_made_between_two_beats(farm: Farm) -> None:
    anna, bert, lease, _ = dragging(farm)
    farm.lease(bert)
    for seconds in (0, 5):  # and once: then beats are held open again
        before = farm.clock.mono
        cuts = farm.scheduler.beat(anna, {lease.id: {lease.tasks[0].id: 0.25}}, 5)[1]
        assert cuts == {lease.tasks[0].id: 60} and farm.clock.mono == before + seconds


def test_what_is_refused_and_a_restart_forget_no_cut(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    anna, bert, lease, job = dragging(farm)
    rest, first = farm.lease(bert), parts(farm, job)[0].id
    with pytest.raises(povfarm.IllegalTransition):
        farm.scheduler.resume(job)
    assert beat(farm, anna, lease, 0.5) == {lease.tasks[0].id: 60}
    assert farm.scheduler.progress(first) == pytest.approx(0.5 * 96 / 60)
    again = farm.restarted()
    assert beat(again, anna, lease, 0.5) == {lease.tasks[0].id: 60}
    assert again.scheduler.progress(first) == pytest.approx(0.5 * 96 / 60)
    assert beat(again, bert, rest, 0.5) == {}
    again.close()


def test_nobody_is_told_of_a_cut_that_could_not_be_noted(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    anna, bert, lease, job = dragging(farm)
    told: List[Dict[int, int]] = []

    def give(*_: Any) -> None:
        told.append(beat(farm, anna, lease, 0.25))
        raise povfarm.NoRoom("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(povfarm.Tx, "add_lease", give)
        with pytest.raises(povfarm.NoRoom):
            farm.lease(bert)
    assert told == [{}] and beat(farm, anna, lease, 0.25) == {} and spans(farm, job) == []
    assert farm.lease(bert).tasks[0].top == 60


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_divided_while_its_picture_is_stored_keeps_its_own_rows(
        farm: Farm, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    anna, bert, lease, job = dragging(farm)
    if not whole:
        hand_in(farm, bert, farm.lease(bert))
        farm.scheduler.leave(anna)
        lease = farm.lease(anna)
        farm.clock.advance(20)
        assert lease.tasks[0].kind is TaskKind.SLICE and beat(farm, anna, lease, 0.1) == {}
    put, rest = farm.store.put_image, []

    def divide(directory: Path, name: str, data: bytes) -> None:
        if not rest:
            rest.extend(farm.leases(farm.worker("carl")))
            assert rest[0].tasks[0].kind is TaskKind.SLICE
        put(directory, name, data)

    monkeypatch.setattr(farm.store, "put_image", divide)
    assert hand_in(farm, anna, lease)
    assert farm.beat(3, rest[0]) == [rest[0].id]
    assert farm.state(job) == "done" and picture(farm, job)[:60] == [lease.tasks[0].id] * 60


def test_who_renders_a_slice_gets_no_copy_of_another(farm: Farm, two: Tuple[int, int]) -> None:
    anna, bert = two
    job = submit(farm, slices=3)
    first = farm.lease(anna)
    hand_in(farm, bert, farm.lease(bert), wall=5)
    second = farm.lease(bert)
    farm.clock.advance(600)
    for worker, lease in ((anna, first), (bert, second)):
        farm.beat(worker, lease)
    assert farm.leases(anna) == farm.leases(bert) == []
    assert farm.lease(farm.worker("carl")).tasks == first.tasks
    assert farm.state(job) == "active"


def test_a_divided_frame_begins_and_ends_where_blocks_and_the_region_do(farm: Farm) -> None:
    values = {**BLOCKS, "Start_Row": "21", "End_Row": "90", "Render_Block_Size": "10"}
    anna, bert, lease, job = dragging(farm, values, 2 / 7)
    rest = farm.lease(bert)
    top = rest.tasks[0].top
    assert (top - 20) % 10 == 0 and spans(farm, job) == [(0, top), (top, 96)]
    first = parts(farm, job)[0].id
    beat(farm, anna, lease, 2 / 7)  # 20 rows of the region's 70
    assert farm.scheduler.progress(first) == pytest.approx(20 / (top - 20))


def test_what_is_nearly_done_or_not_to_be_divided_is_not(
        farm: Farm, two: Tuple[int, int]) -> None:
    anna, bert = two
    for values, options, part in (
            ({}, {"slices": "off"}, 0.25), ({}, {"in_order": True}, 0.25),
            ({"Output_File_Type": "J"}, {}, 0.25), ({"Height": "64"}, {}, 0.9),
            ({"Height": "64"}, {"uses": ("radiosity",)}, 0.25),
            ({"Height": "64"}, {"uses": ("photons",)}, 0.25)):
        job = submit(farm, values=values, **options)
        lease = farm.lease(anna)
        assert lease.tasks[0].kind is TaskKind.FRAME
        farm.clock.advance(20)
        beat(farm, anna, lease, part)
        assert farm.leases(bert) == []
        farm.scheduler.cancel(job)


def test_a_divided_frame_whose_worker_dies_is_rendered_all_the_same(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm)
    rest = farm.lease(bert)
    farm.clock.advance(29)
    farm.beat(bert, rest)
    farm.clock.advance(2)
    farm.scheduler.expire()
    assert states(farm, job) == ["queued", "leased"] and farm.problems() == []
    hand_in(farm, bert, rest)
    work(farm, bert)
    assert farm.state(job) == "done" and len(set(picture(farm, job))) == 2
    assert farm.scheduler.beat(anna, {lease.id: {lease.tasks[0].id: 0.5}}, 0) == ([lease.id], {})


def test_a_divided_frame_that_fails_above_is_tried_by_the_other(farm: Farm) -> None:
    anna, bert, lease, job = dragging(farm)
    rest = farm.lease(bert)
    farm.fail(anna, lease)
    assert states(farm, job) == ["queued", "leased"]
    hand_in(farm, bert, rest)
    work(farm, bert)
    assert farm.state(job) == "done"


# --- parts that cannot be put together

def test_slices_that_are_gone_fail_the_frame_and_retry_renders_it(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2)
    first, second = farm.lease(two[0]), farm.lease(two[1])
    hand_in(farm, two[0], first)
    parts_place = farm.store.job_directory(job, "ball") / "parts"
    (parts_place / f"{first.tasks[0].id}.png").unlink()
    hand_in(farm, two[1], second)
    assert farm.state(job) == "failed" and parts(farm, job) == []
    assert "put together" in farm.ask("GET", "/api/v1/events?after=0").body.decode()
    assert part_files(farm, job) == [] and farm.problems() == []
    farm.scheduler.change(job, {"slices": "off"})
    farm.scheduler.retry(job)
    lease = farm.lease(two[0])
    assert lease.tasks[0].kind is TaskKind.FRAME
    hand_in(farm, two[0], lease)
    assert farm.state(job) == "done"


def test_a_full_disk_while_slices_are_put_together_loses_none(
        farm: Farm, two: Tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(farm, slices=2)

    def full(made: Path, directory: Path, name: str) -> None:
        raise povfarm.NoRoom("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(farm.store, "move_image", full)
        work(farm, *two)
        farm.scheduler.expire()
    assert farm.states(job) == ["leased"] and states(farm, job) == ["done", "done"]
    farm.scheduler.expire()
    assert farm.state(job) == "done"


def test_strips_of_different_kinds_fail_the_frame(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2, values={"Output_File_Type": "P"})
    for worker, depth in zip(two, (255, 65535)):
        lease = farm.lease(worker)
        image = b"P6\n%d 48\n%d\n" % (WIDTH, depth) + bytes(48 * WIDTH * (3 if depth < 256 else 6))
        hand_in(farm, worker, lease, image=image)
    assert farm.state(job) == "failed" and farm.problems() == []


# --- what slices share

def test_slices_wait_for_the_passes_and_are_told_of_them(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2, uses=("radiosity",))
    one, other = farm.lease(two[0]), farm.lease(two[1])
    assert one.tasks[0].kind is other.tasks[0].kind is TaskKind.PASS
    assert spans(farm, job, kind="pass") == [(0, 48), (48, 96)]
    assert one.shares == () and farm.leases(two[0]) == []
    hand_in(farm, two[0], one)
    assert farm.leases(two[0]) == [] and farm.states(job) == ["queued"]
    with pytest.raises(povfarm.ImageError):
        hand_in(farm, two[1], other, image=b"")
    hand_in(farm, two[1], other)
    leases = work(farm, *two)
    assert [lease.tasks[0].kind for lease in leases] == [TaskKind.SLICE] * 2
    passes = tuple(part.id for part in parts(farm, job, kind="pass"))
    assert all(lease.shares == passes for lease in leases)
    assert farm.ask("GET", f"/api/v1/tasks/{passes[0]}/result", key="#1:anna").status in (200, 404)
    assert farm.state(job) == "done" and farm.tasks(job)[0].cpu == 4


def test_a_worker_takes_one_pass_at_a_time(farm: Farm, two: Tuple[int, int]) -> None:
    submit(farm, slices=2, uses=("radiosity",))
    lease = farm.lease(two[0], want=4, slots=4, idle=4)
    assert (lease.tasks[0].kind, lease.threads) == (TaskKind.PASS, 4)
    assert farm.lease(two[1]).tasks[0].kind is TaskKind.PASS


def test_what_a_pass_made_is_given_to_workers(farm: Farm, two: Tuple[int, int]) -> None:
    submit(farm, slices=2, uses=("photons",))
    lease = farm.lease(two[0])
    path = f"/api/v1/tasks/{lease.tasks[0].id}/result"
    assert farm.leases(two[1]) == []  # all photons are shot in one pass
    assert farm.ask("GET", path, key="#2:bert").status == 404
    hand_in(farm, two[0], lease, image=b"photons")
    assert farm.ask("GET", path, key="#2:bert").body == b"photons"
    assert farm.ask("GET", path, key="no worker").status == 401
    assert farm.ask("GET", path.replace("result", "other"), key="#2:bert").status == 404
    assert farm.lease(two[1]).shares == (lease.tasks[0].id,)


def test_a_frame_that_is_not_cut_after_its_passes_is_rendered_in_one_piece(
        farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2, uses=("photons",))
    hand_in(farm, two[0], farm.lease(two[0]), image=b"photons")
    farm.scheduler.change(job, {"slices": "off"})
    hand_in(farm, two[0], farm.lease(two[0]))
    assert farm.state(job) == "done" and spans(farm, job) == [(0, HEIGHT)]
    assert told(farm)[-1] == "rendered in one piece"


def test_a_pass_that_fails_does_not_hold_up_the_frame(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2, uses=("radiosity",), retry_limit=1)
    bad, good = farm.lease(two[0]), farm.lease(two[1])
    farm.fail(two[0], bad)
    hand_in(farm, two[1], good)
    leases = work(farm, *two)
    assert [lease.shares for lease in leases] == [(good.tasks[0].id,)] * 2
    assert farm.state(job) == "done"


def test_a_pass_that_a_worker_failed_is_not_given_to_it_again(
        farm: Farm, two: Tuple[int, int]) -> None:
    submit(farm, 2, slices=2, uses=("photons",))
    bad = farm.lease(two[0])
    farm.fail(two[0], bad)
    assert farm.lease(two[0]).tasks[0].frame == 2
    assert farm.lease(two[1]).tasks[0].id == bad.tasks[0].id


def test_radiosity_off_renders_slices_at_once(farm: Farm, two: Tuple[int, int]) -> None:
    submit(farm, slices=2, uses=("radiosity",), radiosity="off")
    lease = farm.lease(two[0])
    assert lease.tasks[0].kind is TaskKind.SLICE and lease.shares == ()


@pytest.mark.parametrize("slices", ["off", 2, "auto"])
def test_the_frames_of_an_animation_wait_for_the_passes_of_its_first(
        farm: Farm, two: Tuple[int, int], slices: Any) -> None:
    job = submit(farm, 4, slices=slices, uses=("radiosity", "photons"), radiosity="animation")
    one, other = farm.lease(two[0]), farm.lease(two[1])
    assert one.tasks[0].kind is other.tasks[0].kind is TaskKind.PASS
    carl = farm.worker("carl")
    assert farm.leases(carl) == []
    hand_in(farm, two[0], one)
    farm.scheduler.cancel_frames(job, "1")  # but not what all frames share
    assert farm.leases(carl) == [] and farm.leases(two[0]) == []
    hand_in(farm, two[1], other)
    leases = work(farm, *two)
    passes = {one.tasks[0].id, other.tasks[0].id}
    assert leases and all(set(lease.shares) == passes for lease in leases)
    assert all(lease.tasks[0].kind is not TaskKind.PASS for lease in leases)
    assert farm.state(job) == "done"


# --- renders that move house

def test_a_state_is_gone_on_from_with_the_same_povray_only(farm: Farm) -> None:
    anna = farm.worker("anna")
    job = submit(farm)
    lease = farm.lease(anna)
    task = lease.tasks[0].id
    assert not lease.tasks[0].state
    path = f"/api/v1/leases/{lease.id}/tasks/{task}/state"
    assert farm.ask("PUT", path, body=b"half of it", key="#2:bert").status in (401, 404, 409)
    assert farm.ask("PUT", path, body=b"half of it", key="#1:anna").status == 204
    farm.scheduler.leave(anna)
    info = povfarm.WorkerInfo("other", 2, 1 << 30, "Linux", {"povray": "3.7.1"}, ())
    other = farm.scheduler.join(info, "0" * 64, "192.168.1.6")
    for worker, state in ((other, False), (farm.worker("bert"), True)):
        lease = farm.lease(worker)
        assert lease.tasks[0].kind is TaskKind.FRAME  # what is begun is not cut at once
        assert lease.tasks[0].state is state
        if not state:
            farm.scheduler.leave(worker)
    assert farm.ask("GET", f"/api/v1/tasks/{task}/state", key="#3:bert").body == b"half of it"
    hand_in(farm, worker, lease)
    assert part_files(farm, job) == []
    assert farm.ask("GET", f"/api/v1/tasks/{task}/state", key="#3:bert").status == 404


def test_a_state_that_a_render_fails_with_is_not_used_again(
        farm: Farm, two: Tuple[int, int]) -> None:
    submit(farm, slices=2)
    lease = farm.lease(two[0])
    farm.scheduler.keep_state(two[0], lease.id, lease.tasks[0].id, b"half of it")
    farm.scheduler.leave(two[0])
    again = farm.lease(two[1])
    assert again.tasks[0].id == lease.tasks[0].id and again.tasks[0].state
    farm.fail(two[1], again)
    last = farm.lease(two[0])
    assert last.tasks[0].id == lease.tasks[0].id and not last.tasks[0].state


def test_no_state_is_kept_of_what_is_finished(farm: Farm, two: Tuple[int, int]) -> None:
    job = submit(farm, slices=2)
    lease = farm.lease(two[0])
    hand_in(farm, two[0], lease)
    farm.scheduler.keep_state(two[0], lease.id, lease.tasks[0].id, b"late")
    assert part_files(farm, job) == [f"{lease.tasks[0].id}.png"]


# --- pure functions

def regions() -> Iterator[Tuple[random.Random, Region, int]]:
    chance = random.Random(4711)
    for _ in range(3000):
        height = chance.randint(2, 400)
        top = chance.choice((0, chance.randrange(height - 1)))
        bottom = chance.choice((height, chance.randint(top + 2, height)))
        block = min(chance.choice((1, 1, 4, 10, 32)), bottom - top)
        yield chance, Region(top, bottom, 0, 8, block), height


def test_cuts_cover_every_row_once_and_begin_with_blocks() -> None:
    for chance, region, height in regions():
        slices = chance.choice(("auto", "auto", str(chance.randint(1, 40))))
        cuts = [0]
        while cuts[-1] < height:
            share = chance.uniform(0.01, 1)
            cost = chance.choice((None, SliceCost(chance.uniform(0, 1), chance.uniform(0, 9))))
            cuts.append(povfarm.slice_end(cuts[-1], height, region, slices, share, cost))
            assert cuts[-2] < cuts[-1] <= height, (region, cuts)
        assert all(region.top < cut < region.bottom for cut in cuts[1:-1]), (region, cuts)
        assert all((cut - region.top) % region.block == 0 for cut in cuts[1:-1]), (region, cuts)
        blocks = -(-(region.bottom - region.top) // region.block)
        if slices != "auto":
            assert len(cuts) - 1 == min(int(slices), blocks)


def test_a_split_keeps_what_is_rendered_and_gives_something_away() -> None:
    found = 0
    for chance, region, height in regions():
        top, bottom = chance.choice(((0, height), (region.top, region.bottom)))
        progress = chance.random()
        size = region.block * chance.choice((1, 1, 4))  # of the blocks in which it is rendered
        row = povfarm.split_row(top, bottom, region, size, progress, chance.uniform(0.05, 0.95))
        if row is None:
            continue
        found += 1
        first, last = max(top, region.top), min(bottom, region.bottom)
        assert (row - region.top) % size == 0
        assert first + progress * (last - first) <= row < last and top < row < bottom
    assert found > 1000


def test_passes_cover_the_region_once() -> None:
    for chance, region, _ in regions():
        rows = povfarm.pass_rows(region, ["radiosity"], chance.randint(1, 20))
        assert rows[0][0] == region.top and rows[-1][1] == region.bottom
        assert all(top < bottom for top, bottom in rows)
        assert all(one[1] == two[0] for one, two in zip(rows, rows[1:]))
        assert povfarm.pass_rows(region, [], 3) == []
        assert len(povfarm.pass_rows(region, ["photons"], 3)) == 1


@pytest.mark.parametrize(("slices", "before", "after"), [
    ("queued queued", "leased", "queued"), ("queued leased", "queued", "leased"),
    ("done queued", "queued", "leased"), ("done done", "leased", "leased"),
    ("done failed", "leased", "failed"), ("leased cancelled", "leased", "cancelled"),
    ("failed cancelled", "leased", "failed"), ("done queued", "failed", "failed"),
    ("done done", "cancelled", "cancelled"),
])
def test_the_state_of_a_frame_is_that_of_its_slices(
        slices: str, before: str, after: str) -> None:
    found = povfarm.frame_state([TaskState(word) for word in slices.split()], TaskState(before))
    assert found is TaskState(after)


def test_why_a_picture_cannot_be_sliced_is_told() -> None:
    assert povfarm.unsliceable(pov_job(1, Output_File_Type="N"), False) == ""
    assert "JPEG" in povfarm.unsliceable(pov_job(1, Output_File_Type="J"), False)
    assert "order" in povfarm.unsliceable(pov_job(1), True)
    assert "block" in povfarm.unsliceable(pov_job(1, Antialias="On"), False)
    assert "+RFO" in povfarm.unsliceable(pov_job(1, Radiosity_To_File="On"), False)


# --- anything at all

class SlicedChaos(Chaos):
    """Random steps on a farm whose jobs are sliced in every way."""

    def __init__(self, farm: Farm, seed: int) -> None:
        super().__init__(farm, seed)
        self.told: Dict[str, int] = {}  # by lease: the row before which it may end
        self.parts: Dict[str, float] = {}  # by lease: how far it said that it is
        self.told_of_copies = 0

    def look(self) -> None:
        with self.farm.store.read() as tx:
            rows = tx.done_tasks()
            jobs = {row.id: row.pov.options for row in tx.jobs(0, -1)}
        for row in rows:
            if row.kind != TaskKind.PASS:
                place, name = povfarm.place_of(self.farm.store.job_directory(row.job, "ball"), row)
                height = row.bottom - row.top or jobs[row.job].height
                povfarm.check_image((place / name).read_bytes(), ".png", WIDTH, height)
        done = {(row.job, row.frame): row.sha256 for row in rows if not row.parent}
        assert all(done[key] == sha for key, sha in self.done.items() if key[0] in jobs)
        self.done = done

    def do_submit(self) -> None:
        uses = [use for use in ("radiosity", "photons") if self.chance.random() < 0.25]
        values = {**self.chance.choice((SIZE, BLOCKS)), **self.chance.choice((
            {}, {"Start_Row": "21", "End_Row": "84"}))}
        self.jobs.append(submit(
            self.farm, self.chance.choice((1, 1, 2, 5)), values, tuple(uses),
            retry_limit=self.chance.randint(1, 3), slices=self.chance.choice(("auto", "auto", 3, 16)),
            radiosity=self.chance.choice(("share", "animation", "off"))))
        if len(self.jobs) > 5:
            self.farm.scheduler.delete(self.jobs.pop(0))

    def do_finish(self) -> None:
        worker, lease = self.held()
        task = self.chance.choice(lease.tasks)
        height = lease.pov.options.height
        bottom = self.chance.choice((task.bottom, task.bottom, height)) or height
        if self.chance.random() < 0.7:
            bottom = self.told.get(lease.id, bottom)
        image = png(self.chance.randrange(10_000), WIDTH, bottom - task.top)
        wall = self.chance.choice([0.1, 1, 50])
        self.farm.scheduler.finish(
            worker, lease.id, task.id, image[:-1] if self.chance.random() < 0.1 else image, b"log",
            Cost(wall, wall, 1, wall / 4), bottom)

    def do_beat(self) -> None:
        self.beat_of(*self.held(), self.chance.random())

    def do_drag(self) -> None:
        """One picture is all there is to do, and takes long: it is divided, and lent out twice."""
        for job in self.jobs:
            with contextlib.suppress(povfarm.IllegalTransition):
                self.farm.scheduler.pause(job)
        self.jobs.append(submit(self.farm, 1, self.chance.choice((SIZE, BLOCKS, {"Height": "800"}))))
        for _ in range(25):
            for worker, lease in self.leases[-8:]:
                if lease.job == self.jobs[-1]:
                    self.beat_of(worker, lease, self.parts.get(lease.id, 0) + 0.02)
            self.farm.clock.advance(self.chance.choice((1, 5, 20)))
            self.do_lease()
            if self.chance.random() < 0.2:
                self.do_finish()
        for job in self.jobs:
            with contextlib.suppress(povfarm.IllegalTransition):
                self.farm.scheduler.resume(job)
        if len(self.jobs) > 5:
            self.farm.scheduler.delete(self.jobs.pop(0))

    def beat_of(self, worker: int, lease: LeaseSpec, part: float) -> None:
        """What the beat is told of a cut, and what is known of its progress, fits the task."""
        given, self.parts[lease.id] = lease.tasks[0], part
        ended, cuts = self.farm.scheduler.beat(worker, {lease.id: {given.id: part}}, 0)
        with self.farm.store.read() as tx:
            attempt = tx.attempt(given.id, lease.id)
            task = tx.task(attempt.task) if attempt else None
            live = len(self.farm.scheduler.grants.at(task.id)) if task else 0
        if ended or not attempt or not task or attempt.state != "live":
            return
        region, height = povfarm.region_of(lease.pov.options), lease.pov.options.height
        rows = [min(bottom, region.bottom) - max(given.top, region.top)
                for bottom in (given.bottom or height, task.bottom or height)]
        assert cuts == ({given.id: task.bottom} if rows[0] > rows[1] else {})
        progress, mine = self.farm.scheduler.progress(task.id), min(part * rows[0] / rows[1], 1)
        assert progress == pytest.approx(mine) or (live > 1 and progress > mine)
        self.told.update(dict.fromkeys([lease.id] if cuts else [], task.bottom))
        self.told_of_copies += live > 1 and bool(cuts)

    def do_keep(self) -> None:
        worker, lease = self.held()
        self.farm.scheduler.keep_state(worker, lease.id, lease.tasks[0].id, b"half of it")

    def do_change(self) -> None:
        self.farm.scheduler.change(self.job(), {
            "slices": self.chance.choice(("auto", "off", 2, 16)),
            "radiosity": self.chance.choice(("share", "animation", "off"))})

    def bring_to_an_end(self) -> None:
        helpers = [self.farm.worker(f"good{number}") for number in range(2)]
        for _ in range(3):
            for job in self.jobs:
                for steer in (self.farm.scheduler.resume, self.farm.scheduler.retry):
                    with contextlib.suppress(povfarm.IllegalTransition):
                        steer(job)
            self.farm.clock.advance(31)
            self.farm.scheduler.expire()
            for _ in range(200):
                for worker in helpers:
                    for lease in self.farm.leases(worker):
                        for task in lease.tasks:
                            bottom = task.bottom or lease.pov.options.height
                            image = png(task.id, WIDTH, bottom - task.top)
                            self.farm.scheduler.finish(worker, lease.id, task.id, image, b"",
                                                       Cost(1, 1, 1))
        assert self.farm.problems() == [] and self.farm.leftovers() == []
        self.look()
        assert {self.farm.state(job) for job in self.jobs} == {"done"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 12])
def test_after_anything_at_all_slices_make_up_their_frames(tmp_path: Path, seed: int) -> None:
    chaos = SlicedChaos(Farm(tmp_path), seed)
    for _ in range(400):
        chaos.step()
    assert chaos.told_of_copies > 0  # divided while two had it
    chaos.do_submit()
    chaos.bring_to_an_end()
    chaos.farm.close()
