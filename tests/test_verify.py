"""Pictures that fit each other: one POV-Ray for a job, frames compared, sick workers."""

from __future__ import annotations

import itertools
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

import povfarm
from helpers.base import run_povray
from helpers.farm_in_a_box import Farm, farm_fixture, sha256
from helpers.pictures import chunk, png, png_of

__all__ = ["farm_fixture"]


def worker(farm: Farm, name: str, cores: int = 2, **engines: str) -> int:
    """Let a worker with this POV-Ray join."""
    info = povfarm.WorkerInfo(name, cores, 1 << 30, "Linux", engines, ())
    return farm.scheduler.join(info, sha256(name.encode()), "192.168.1.5")


def waiting_for(farm: Farm, job: int) -> str:
    return str(farm.ask("GET", f"/api/v1/jobs/{job}").json()["waiting_for"])


# --- one POV-Ray for all frames of a job

def test_a_job_keeps_the_povray_of_its_first_frame(farm: Farm) -> None:
    anna, bert, carl = (worker(farm, name, povray=version) for name, version in (
        ("anna", "3.7.0.10"), ("bert", "3.8.0"), ("carl", "3.7.0.10")))
    job = farm.submit(4)
    lease = farm.lease(anna)
    assert farm.leases(bert) == []
    farm.finish(carl, farm.lease(carl))
    farm.finish(anna, lease)
    assert farm.leases(bert) == []
    assert waiting_for(farm, job).startswith(
        "1 worker waits: this job's frames are rendered with POV-Ray 3.7.0.10, theirs is 3.8.0")
    assert farm.render(anna, job) == [3, 4] and farm.state(job) == "done"
    assert waiting_for(farm, job) == ""


def test_where_as_many_cores_have_each_the_first_worker_decides(farm: Farm) -> None:
    anna, bert = worker(farm, "anna", povray="3.7.0.10"), worker(farm, "bert", povray="3.8.0")
    farm.submit(1)
    farm.render(anna)
    job = farm.submit(1)
    assert farm.render(bert, job) == [0]


def test_a_job_takes_the_povray_that_most_cores_have_whoever_comes_first(farm: Farm) -> None:
    anna = worker(farm, "anna", cores=7, povray="3.8.0")
    others = [worker(farm, f"w{number}", cores=4, povray="3.7.0.10") for number in range(2)]
    windows = worker(farm, "windows", cores=1, povray="3.7")  # as little as that tells, it fits
    plain = worker(farm, "plain", cores=100)  # does not tell, so it has no say
    job = farm.submit(3)
    assert farm.leases(anna) == []
    assert waiting_for(farm, job).startswith(
        "1 worker waits: this job's frames are rendered with POV-Ray 3.7, theirs is 3.8.0")
    assert [task.frame for task in farm.lease(windows).tasks] == [1]
    farm.scheduler.leave(windows)
    assert [task.frame for task in farm.lease(plain).tasks] == [1]
    farm.scheduler.leave(plain)
    assert "3.7.0.10" not in farm.job(job).engines_json  # nothing is there of it, so it is chosen anew
    farm.scheduler.leave(others[0])
    assert farm.leases(others[1]) == []  # they have fewer now
    assert farm.render(anna, job) == [1, 2, 3]


def test_one_that_claims_many_cores_does_not_choose_for_a_room(farm: Farm) -> None:
    liar = worker(farm, "liar", cores=10_000, povray="9.9")
    others = [worker(farm, f"w{number}", cores=4, povray="3.7.0.10") for number in range(3)]
    job = farm.submit(1)
    assert farm.leases(liar) == []
    assert "rendered with POV-Ray 3.7.0.10, theirs is 9.9" in waiting_for(farm, job)
    assert farm.render(others[0], job) == [0]


def test_liars_that_are_more_than_the_others_keep_them_out_until_somebody_decides(
        farm: Farm) -> None:
    """It is said so, and there are two ways out."""
    other = worker(farm, "honest", cores=8, povray="3.7.0.10")
    liars = [worker(farm, f"liar{number}", cores=10_000, povray="9.9") for number in range(2)]
    one, two = farm.submit(1), farm.submit(1)
    assert farm.leases(other) == []
    assert "theirs is 3.7.0.10" in waiting_for(farm, one)
    farm.scheduler.change(one, {"povray": "3.7"}, "admin")
    assert farm.render(other, one) == [0]
    assert farm.leases(other) == []
    for liar in liars:
        farm.scheduler.remove_worker(liar, "admin")
    assert farm.render(other, two) == [0]


def test_who_failed_in_a_job_of_which_nothing_is_done_has_no_say(farm: Farm) -> None:
    anna = worker(farm, "anna", povray="3.8.0")
    others = [worker(farm, f"w{number}", cores=4, povray="3.7.0.10") for number in range(2)]
    job = farm.submit(1)
    for other in others:
        assert farm.leases(anna) == []
        farm.fail(other, farm.lease(other))
    assert farm.render(anna, job) == [0]


def test_most_cores_are_counted_once_for_all_jobs(farm: Farm) -> None:
    """A farm may have many jobs, and many workers."""
    anna = worker(farm, "anna", povray="3.8.0")
    worker(farm, "bert", cores=4, povray="3.7.0.10")
    for _ in range(20):
        farm.submit(1)
    looks = []
    workers = povfarm.Tx.workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(povfarm.Tx, "workers", lambda tx: looks.append(1) or workers(tx))
        assert farm.leases(anna) == []
    assert len(looks) < 5


# --- a job that nobody can render says why

def test_a_job_that_nobody_renders_says_why(farm: Farm) -> None:
    job = farm.submit(2, send=False)
    assert waiting_for(farm, job) == "1 of its files is still to come"
    farm.scheduler.cancel(job)
    job = farm.submit(2)
    assert waiting_for(farm, job) == "no worker is there: start one with 'povfarm.py work'"
    ida = farm.worker("ida", admitted=False)
    assert waiting_for(farm, job).startswith("1 worker waits to be let in: 'povfarm.py workers'")
    farm.worker("joe", admitted=False)
    assert waiting_for(farm, job).startswith("2 workers wait to be let in")
    with farm.store.read() as tx:
        code = next(row.code for row in tx.workers() if row.id == ida)
    farm.scheduler.admit(code)
    assert waiting_for(farm, job) == ""
    with farm.store.tx() as tx:
        tx.set_aside(ida, "its pictures differ")
    assert waiting_for(farm, job).startswith("the workers that are there cannot render it")
    farm.scheduler.pause(job)
    assert waiting_for(farm, job) == ""
    farm.scheduler.cancel(job)


def test_other_include_files_do_not_fit_either(farm: Farm) -> None:
    anna = worker(farm, "anna", povray="3.7.0.10", includes="aa")
    bert = worker(farm, "bert", povray="3.7.0.10", includes="bb")
    job = farm.submit(3)
    farm.lease(anna)
    assert farm.leases(bert) == []
    assert "theirs is the same with other include files" in waiting_for(farm, job)


def test_when_the_first_worker_left_for_good_somebody_is_told_and_can_free_the_job(
        farm: Farm) -> None:
    anna = worker(farm, "anna", povray="3.7.0.10")
    job = farm.submit(3)
    farm.finish(anna, farm.lease(anna))
    farm.scheduler.leave(anna)
    late = [worker(farm, name, povray="3.8") for name in ("bert", "carl")]
    assert farm.leases(late[0]) == []
    text = waiting_for(farm, job)
    assert text.startswith("2 workers wait: this job's frames are rendered with POV-Ray "
                           "3.7.0.10, theirs is 3.8"), text
    assert f"povfarm.py set {job} povray=any" in text
    farm.ask("PATCH", f"/api/v1/jobs/{job}", json_body={"povray": "any"})
    assert waiting_for(farm, job) == ""
    farm.render(late[0], job)
    assert farm.state(job) == "done"


def test_a_first_worker_that_left_without_a_picture_binds_nobody(farm: Farm) -> None:
    anna = worker(farm, "anna", povray="3.7.0.10")
    job = farm.submit(2)
    farm.lease(anna)
    farm.scheduler.leave(anna)
    bert = worker(farm, "bert", povray="3.8")
    assert farm.render(bert, job) == [1, 2]
    assert "3.8" in farm.job(job).engines_json


def test_a_frame_does_not_wait_for_a_worker_with_another_povray(farm: Farm) -> None:
    anna = worker(farm, "anna", povray="3.7")
    worker(farm, "bert", povray="3.8")
    job = farm.submit(1)
    farm.fail(anna, farm.lease(anna), scene=True)
    assert farm.states(job) == ["failed"]


def test_a_job_may_ask_for_a_version(farm: Farm) -> None:
    anna, bert = worker(farm, "anna", povray="3.7.0.10"), worker(farm, "bert", povray="3.8.0")
    job = farm.submit(2, povray="3.8")
    assert farm.leases(anna) == []
    assert "rendered with POV-Ray 3.8, theirs is 3.7.0.10" in waiting_for(farm, job)
    assert farm.render(bert, job) == [1, 2]


def test_who_has_only_other_programs_gets_no_scene_of_povrays(farm: Farm) -> None:
    anna = worker(farm, "anna", blender="")
    job = farm.submit(2)
    assert farm.leases(anna) == [] and "cannot render it" in waiting_for(farm, job)
    bert = worker(farm, "bert", povray="3.7")
    assert waiting_for(farm, job) == "" and farm.render(bert, job) == [1, 2]


@pytest.mark.parametrize("wanted, first, mine, fits", [
    ("auto", {}, {"povray": "3.8"}, True),
    ("auto", {"povray": "3.7.0.10"}, {"povray": "3.7.0.10"}, True),
    ("auto", {"povray": "3.7.0.10"}, {"povray": "3.7.0.8"}, False),
    ("auto", {"povray": "3.7.0.10.unofficial"}, {"povray": "3.7"}, True),  # Windows says no more
    ("auto", {"povray": "3.7.0.10", "includes": "a"}, {}, True),
    ("auto", {"povray": "3.7", "includes": "a"}, {"povray": "3.7", "includes": "b"}, False),
    ("auto", {"povray": "3.7", "includes": "a"}, {"povray": "3.7", "includes": ""}, True),
    ("any", {"povray": "3.7", "includes": "a"}, {"povray": "3.8", "includes": "b"}, True),
    ("3.8", {"povray": "3.7"}, {"povray": "3.8.0"}, True),
    ("3.7", {"povray": "3.7", "includes": "a"}, {"povray": "3.7.1", "includes": "b"}, True),
    ("3.7.1", {}, {"povray": "3.7.0"}, False),
    ("3.1", {}, {"povray": "3.10"}, False),
    ("any", {}, {"blender": ""}, False),
])
def test_which_povray_fits(
        wanted: str, first: Dict[str, str], mine: Dict[str, str], fits: bool) -> None:
    assert povfarm.engine_fits(wanted, first, mine) == fits


@pytest.mark.parametrize("value", ["", "3.7;", "newest", "3.", True])
def test_what_is_no_version_is_refused(value: object) -> None:
    with pytest.raises(povfarm.UserError, match="povray"):
        povfarm.JobOptions().changed({"povray": value})


def test_changing_one_option_leaves_the_others(farm: Farm) -> None:
    job = farm.submit(2, slices="4", radiosity="off", povray="3.7")
    farm.scheduler.change(job, {"priority": 5})
    row = farm.job(job).options
    assert (row.priority, row.slices, row.radiosity, row.povray) == (
        5, "4", "off", "3.7")


def test_a_worker_tells_what_its_include_files_are(tmp_path: Path) -> None:
    real = povfarm.standard_library()
    if not real:
        pytest.skip("POV-Ray's include files are not here")
    copy = tmp_path / "include"
    for place in real:
        shutil.copytree(place, copy, dirs_exist_ok=True)

    def told(*library: object) -> str:
        return povfarm.Engine("povray", "3.7", tuple(map(str, library))).versions()["includes"]

    whole = told(*real)
    assert len(whole) == 64 and told(copy) == whole
    colors = copy / "colors.inc"
    text = colors.read_bytes()
    colors.write_bytes(text.replace(b"\n", b"\r\n"))
    assert told(copy) == whole, "Windows' line ends are no other files"
    colors.write_bytes(text.replace(b"Red", b"Rot", 1))
    assert told(copy) != whole
    assert told(real[-1], copy) == told(real[-1]), "POV-Ray takes the first of a name"
    assert told(tmp_path / "nowhere") == ""


# --- sick workers

def make_sick(farm: Farm, anna: int, bert: int) -> int:
    """Let anna fail all of two jobs while bert does not; return one with frames left."""
    for number in range(2):
        job = farm.submit(40, name=f"j{number}", priority=number)
        farm.finish(bert, farm.lease(bert))
    for _ in range(6):
        farm.fail(anna, farm.lease(anna))
    return job


def states(farm: Farm) -> Dict[str, str]:
    return {view["name"]: view["state"]
            for view in farm.ask("GET", "/api/v1/workers").json()["workers"]}


def test_a_sick_worker_is_tried_with_one_task_after_ten_minutes(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    make_sick(farm, anna, bert)
    assert farm.leases(anna) == []
    farm.clock.advance(599)
    farm.beat(bert)
    assert farm.leases(anna, want=4) == []
    farm.clock.advance(2)
    farm.beat(bert)
    lease = farm.lease(anna, want=4, slots=4, idle=4)
    assert len(lease.tasks) == 1 and states(farm)["anna"] == "sick"
    farm.fail(anna, lease)
    assert farm.leases(anna) == [], "and not again at once"
    farm.clock.advance(601)
    farm.beat(bert)
    farm.finish(anna, farm.lease(anna))
    assert states(farm)["anna"] != "sick"
    assert len(farm.leases(anna, want=2)) == 2


def test_a_sick_worker_that_comes_again_is_tried_at_once(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    make_sick(farm, anna, bert)
    assert farm.leases(anna) == []
    info = povfarm.WorkerInfo("anna", 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
    farm.scheduler.rejoin(anna, info, "192.168.1.5")
    lease = farm.lease(anna)
    assert farm.leases(anna) == []
    farm.finish(anna, lease)
    assert states(farm)["anna"] != "sick"


# --- frames that two workers render

def dated(picture: bytes) -> bytes:
    """The same pixels in another file: packed otherwise, with a time."""
    time = chunk(b"tIME", struct.pack(">HBBBBB", 2026, 11, 22, 21, 0, 0))
    return picture[:33] + time + picture[33:]


def events(farm: Farm, what: str) -> List[str]:
    with farm.store.read() as tx:
        return [row.text for row in tx.events(0, 1000) if row.what == what]


def image(farm: Farm, job: int, frame: int) -> bytes:
    return farm.ask("GET", f"/api/v1/jobs/{job}/frames/{frame}/image").body


def parts(farm: Farm) -> List[Path]:
    return list(farm.root.glob("jobs/*/parts/*"))


def test_leased_to_queued_to_done_when_two_workers_make_the_same_picture(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(1, verify=100)
    lease = farm.lease(anna)
    assert farm.finish(anna, lease, image=png(5))
    assert farm.states(job) == ["queued"] and len(parts(farm)) == 1
    assert farm.problems() == []
    assert not farm.finish(anna, lease, image=png(5)), "the same once more"
    assert farm.leases(anna) == [], "it is another's turn"
    farm.store.sweep()
    assert farm.finish(bert, farm.lease(bert), image=dated(png(5)))
    assert farm.story(job, 0) == ["leased", "queued", "leased", "done"]
    assert farm.state(job) == "done" and parts(farm) == []
    assert farm.attempts(farm.task(job, 0).id) == [("anna", "kept"), ("bert", "done")]
    assert events(farm, "doubtful") == events(farm, "set aside") == []


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_third_worker_decides_and_the_odd_one_is_set_aside(wrong: int, farm: Farm) -> None:
    workers = [farm.worker(name) for name in ("anna", "bert", "carl")]
    job = farm.submit(1, verify=100)
    other = farm.submit(4, name="other")
    shades = [5, 5, 5]
    shades[wrong] = 9
    for worker, shade in zip(workers, shades):
        leases = farm.leases(worker)
        if leases and leases[0].job == job:
            farm.finish(worker, leases[0], image=png(shade))
    assert farm.states(job) == ["done"]
    assert image(farm, job, 0) == png(5)
    if wrong == 2:
        return  # the first two agreed
    name = ("anna", "bert", "carl")[wrong]
    view = next(view for view in farm.ask("GET", "/api/v1/workers").json()["workers"]
                if view["name"] == name)
    assert view["state"] == "sick" and f"frame 0 of job {job}" in view["reason"]
    assert events(farm, "set aside")[0].startswith(f"{name} made another picture of frame 0")
    assert farm.leases(workers[wrong]) == []
    info = povfarm.WorkerInfo(name, 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
    farm.scheduler.rejoin(workers[wrong], info, "192.168.1.5")
    assert farm.lease(workers[wrong]).job == other, "started again, it is trusted again"


def test_a_worker_set_aside_loses_its_leases_and_delivers_nothing_more(farm: Farm) -> None:
    workers = [farm.worker(name) for name in ("anna", "bert", "carl")]
    job = farm.submit(1, verify=100, priority=1)
    late = farm.submit(1, name="late")
    farm.finish(workers[0], farm.lease(workers[0]), image=png(9))
    held = farm.lease(workers[1])
    assert held.job == job
    mine = farm.lease(workers[0])
    assert mine.job == late
    farm.finish(workers[1], held, image=png(5))
    farm.finish(workers[2], farm.lease(workers[2]), image=png(5))
    assert farm.beat(workers[0], mine) == [mine.id]
    assert not farm.finish(workers[0], mine)
    assert farm.states(late) == ["queued"]


def test_alone_a_frame_is_accepted_as_it_is_and_an_event_says_so(farm: Farm) -> None:
    anna = farm.worker("anna")
    job = farm.submit(2, verify=100)
    assert farm.render(anna, job) == [1, 2] and farm.state(job) == "done"
    assert events(farm, "doubtful") == ["not verified: there is no other worker"] * 2


def test_a_frame_does_not_wait_for_a_worker_that_has_left(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(1, verify=100)
    farm.render(anna, job)
    assert farm.states(job) == ["queued"]
    farm.scheduler.leave(bert)
    assert farm.render(anna, job) == [0] and farm.state(job) == "done"
    assert events(farm, "doubtful") == ["not verified: one worker rendered it twice"]


def test_two_workers_that_differ_without_a_third_leave_a_doubt(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(1, verify=100)
    farm.finish(anna, farm.lease(anna), image=png(5))
    farm.finish(bert, farm.lease(bert), image=png(9))
    assert farm.state(job) == "done" and "sick" not in states(farm).values()
    assert events(farm, "doubtful") == [
        "not verified: all its pictures differ, and the last was taken"]


def test_three_different_pictures_are_enough(farm: Farm) -> None:
    workers = [farm.worker(name) for name in ("anna", "bert", "carl", "dora")]
    job = farm.submit(1, verify=100)
    for shade, worker in enumerate(workers[:3], 5):
        farm.finish(worker, farm.lease(worker), image=png(shade))
    assert farm.state(job) == "done" and len(events(farm, "doubtful")) == 1


LET_IN = {  # how two workers join that one person may have brought: address, code, owner
    "one computer": [("192.168.7.1", "", "admin"), ("192.168.7.1", "", "admin")],
    "one person's key": [("192.168.7.1", "", "eve"), ("192.168.7.2", "", "eve")],
    "an open farm": [("192.168.7.1", "", ""), ("192.168.7.2", "", "")],
}


def accomplices(farm: Farm, how: str) -> List[int]:
    info = povfarm.WorkerInfo("eve", 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
    return [farm.scheduler.join(info, sha256(f"eve {number}".encode()), address, code, owner)
            for number, (address, code, owner) in enumerate(LET_IN[how])]


def tasks_of(farm: Farm, worker: int) -> List[Tuple[povfarm.LeaseSpec, int]]:
    """Take all that the farm gives one worker at a time: leases, and the index of each task."""
    leases: List[povfarm.LeaseSpec] = []
    while more := farm.leases(worker, slots=2):
        leases += more
    return [(lease, index) for lease in leases for index in range(len(lease.tasks))]


@pytest.mark.parametrize("how", LET_IN)
def test_two_that_may_be_one_persons_do_not_confirm_each_other(how: str, farm: Farm) -> None:
    """Though both delivered it, and before anybody honest did."""
    eve, mallory = accomplices(farm, how)
    bert, carl = farm.worker("bert"), farm.worker("carl")
    job = farm.submit(1, verify=100)
    late = farm.lease(eve)
    farm.clock.advance(31)  # it is silent, so another one has its turn meanwhile
    for worker in (eve, mallory, bert, carl):
        farm.beat(worker)
    farm.scheduler.expire()
    second = farm.lease(mallory)
    farm.finish(eve, late, image=png(9))
    farm.finish(mallory, second, image=png(9))
    assert farm.states(job) == ["queued"] and farm.leases(eve) == farm.leases(mallory) == []
    farm.finish(bert, farm.lease(bert), image=png(5))
    assert farm.states(job) == ["queued"] and farm.leases(eve) == farm.leases(mallory) == []
    farm.finish(carl, farm.lease(carl), image=png(5))
    assert farm.state(job) == "done" and image(farm, job, 0) == png(5)
    assert len(events(farm, "set aside")) == 2 and events(farm, "doubtful") == []


@pytest.mark.parametrize("how", LET_IN)
def test_where_nobody_else_is_there_they_check_each_other_and_it_is_said_once(
        how: str, farm: Farm) -> None:
    eve, mallory = accomplices(farm, how)
    job = farm.submit(2, verify=100)
    for worker in (eve, mallory, eve, mallory):
        for lease in farm.leases(worker):
            farm.finish(worker, lease, image=png(lease.tasks[0].frame))
    assert farm.state(job) == "done"
    assert farm.attempts(farm.task(job, 1).id) == [("eve", "kept"), ("eve", "done")]
    assert events(farm, "doubtful") == [
        "checked only by a worker behind which the same person may be"]


def test_it_is_said_once_though_two_frames_come_at_the_same_time(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are on their way before either is settled."""
    eve, mallory = accomplices(farm, "one computer")
    job = farm.submit(2, verify=100)
    for lease, index in tasks_of(farm, eve):
        farm.finish(eve, lease, index, image=png(lease.tasks[index].frame))
    there, store_all = threading.Barrier(2, timeout=60), povfarm._Delivery._store_all

    def after_both_came(delivery: povfarm._Delivery) -> List[Tuple[int, str, int]]:
        there.wait()
        return store_all(delivery)

    monkeypatch.setattr(povfarm._Delivery, "_store_all", after_both_came)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda one: farm.finish(
            mallory, *one, image=png(one[0].tasks[one[1]].frame)), tasks_of(farm, mallory))] == [
                True, True]
    assert farm.state(job) == "done" and events(farm, "doubtful") == [
        "checked only by a worker behind which the same person may be"]


def test_it_is_said_where_frames_that_are_not_compared_were_done_before(farm: Farm) -> None:
    eve, mallory = accomplices(farm, "one computer")
    job = farm.submit(100, verify=10)
    assert not povfarm.is_chosen(job, 0, 10)
    for worker in itertools.islice(itertools.cycle((eve, mallory)), 200):
        for lease, index in tasks_of(farm, worker):
            farm.finish(worker, lease, index, image=png(lease.tasks[index].frame % 250))
    assert farm.state(job) == "done" and events(farm, "doubtful") == [
        "checked only by a worker behind which the same person may be"]


def test_an_honest_one_that_has_left_is_not_outvoted_by_the_two_that_stay(farm: Farm) -> None:
    eve, mallory = accomplices(farm, "one computer")
    bert, carl = farm.worker("bert"), farm.worker("carl")
    job = farm.submit(1, verify=100)
    farm.finish(eve, farm.lease(eve), image=png(9))
    farm.finish(bert, farm.lease(bert), image=png(5))
    farm.scheduler.leave(bert), farm.scheduler.leave(carl)
    farm.finish(mallory, farm.lease(mallory), image=png(9))
    assert farm.state(job) == "done" and events(farm, "set aside") == []
    assert events(farm, "doubtful") == [
        "checked only by a worker behind which the same person may be"]


def test_who_was_let_in_by_a_code_stands_for_itself(farm: Farm) -> None:
    info = povfarm.WorkerInfo("anna", 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
    anna, bert = (farm.scheduler.join(info, sha256(code.encode()), f"192.168.9.{number}", code)
                  for number, code in enumerate(("ABCDEF", "GHJKLM")))
    farm.scheduler.admit("ABCDEF"), farm.scheduler.admit("GHJKLM")
    farm.worker("carl")
    job = farm.submit(1, verify=100)
    farm.finish(anna, farm.lease(anna), image=png(5))
    farm.finish(bert, farm.lease(bert), image=png(5))
    assert farm.state(job) == "done" and events(farm, "doubtful") == []


def test_some_percent_are_the_same_frames_always() -> None:
    chosen = [frame for frame in range(1000) if povfarm.is_chosen(7, frame, 20)]
    assert 150 < len(chosen) < 250
    assert all(povfarm.is_chosen(7, frame, 30) for frame in chosen)
    assert not any(povfarm.is_chosen(7, frame, 0) for frame in range(1000))
    assert all(povfarm.is_chosen(7, frame, 100) for frame in range(1000))


@pytest.mark.parametrize("uses, options, why", [
    (["radiosity"], {}, "radiosity or photons"), (["photons"], {}, "radiosity or photons"),
    ([], {"in_order": True}, "in order"), ([], {"povray": "any"}, "different POV-Rays"),
])
def test_what_cannot_be_compared_is_refused(
        uses: List[str], options: Dict[str, object], why: str, farm: Farm) -> None:
    with pytest.raises(povfarm.UserError, match=f"cannot be verified: .*{why}"):
        farm.submit(2, uses=uses, verify=10, **options)


# --- frames that are black

def deliver(farm: Farm, worker: int, shade: int) -> int:
    lease = farm.lease(worker)
    farm.finish(worker, lease, image=png(shade))
    return lease.tasks[0].frame


def test_a_black_frame_between_others_is_rendered_once_more_by_another(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    job = farm.submit(3)
    assert [deliver(farm, anna, 5), deliver(farm, anna, 0)] == [1, 2]
    assert farm.states(job) == ["done", "queued", "queued"]
    assert deliver(farm, anna, 5) == 3
    assert deliver(farm, bert, 7) == 2
    assert farm.state(job) == "done" and image(farm, job, 2) == png(7)
    assert parts(farm) == []


def test_a_frame_that_stays_black_is_accepted(farm: Farm) -> None:
    anna = farm.worker("anna")
    job = farm.submit(2)
    assert [deliver(farm, anna, shade) for shade in (5, 0, 0)] == [1, 2, 2]
    assert farm.state(job) == "done" and image(farm, job, 2) == png(0)


def test_a_black_frame_is_taken_when_a_picture_beside_it_was_deleted_by_hand(
        farm: Farm) -> None:
    anna = farm.worker("anna")
    job = farm.submit(2)
    deliver(farm, anna, 5)
    path = farm.store.job_directory(job, "ball") / "out1.png"
    picture = path.read_bytes()
    path.unlink()
    assert [deliver(farm, anna, 0) for _ in range(2)] == [2, 2]
    assert farm.state(job) == "done" and image(farm, job, 2) == png(0)
    path.write_bytes(picture)  # for the look at the farm's data


def test_black_frames_among_black_ones_and_the_first_are_as_they_are(farm: Farm) -> None:
    anna = farm.worker("anna")
    job = farm.submit(3)
    assert [deliver(farm, anna, shade) for shade in (0, 0, 0)] == [1, 2, 3]
    assert farm.state(job) == "done"


# --- pictures

KINDS = {"+FN": ".png", "+FN16 +UA": ".png", "+FNg": ".png", "+FP": ".ppm", "+FT": ".tga",
         "+FC": ".tga", "+FB": ".bmp", "+FJ": ".jpg", "+FE": ".exr", "+FH": ".hdr"}


ALPHAS = ["+FN", "+FN16", "+FN +UA", "+FN16 +UA", "+FNg", "+FNg +UA"]
LIT = ("#version 3.7; global_settings {{ assumed_gamma 1 }} camera {{ location -3*z }} "
       "light_source {{ -5*z 1 }} sphere {{ 0, 1 pigment {{ rgb <{red}, 1, 1> }} }}")
SCENES = {
    "one": LIT.format(red=1), "same": LIT.format(red=1), "other": LIT.format(red=0),
    "nothing": "camera { location -9*z }", "unlit": "camera { location -9*z } sphere { 0, 1 }",
    "glowing": "camera { location -9*z } sphere { -y, 0.5 pigment { rgb 1 } finish { ambient 1 } }",
}


@pytest.fixture(scope="module")
def rendered(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[Tuple[str, str], bytes]:
    """The pictures of the scenes by their names and switches."""
    place = tmp_path_factory.mktemp("rendered")
    for name, text in SCENES.items():
        (place / f"{name}.pov").write_text(text)

    def render(number: int) -> bytes:
        name, kind = wanted[number]
        output = place / f"{number}{KINDS.get(kind, '.png')}"
        done = run_povray([f"+I{name}.pov", f"+O{output.name}", "+W40", "+H30", *kind.split()], place)
        assert done.returncode == 0, done.stderr
        return output.read_bytes()

    wanted = [*itertools.product(["one", "same", "other"], KINDS),
              *itertools.product(["nothing", "unlit", "glowing"], ALPHAS)]
    with ThreadPoolExecutor(12) as pool:  # POV-Ray sleeps most of the time
        return dict(zip(wanted, pool.map(render, range(len(wanted)))))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_compared_in_everything_that_povray_writes(
        kind: str, rendered: Dict[Tuple[str, str], bytes]) -> None:
    one, same, other = (rendered[name, kind] for name in ("one", "same", "other"))
    same = dated(same) if kind.startswith("+FN") else same
    assert povfarm.same_pixels(one, same, KINDS[kind])
    assert not povfarm.same_pixels(one, other, KINDS[kind])
    assert not povfarm.is_black(one, KINDS[kind])


def test_png_filters_are_not_pixels() -> None:
    rows = [bytes(range(start, start + 12)) for start in (0, 40, 90)]
    above = [bytes(12), *rows]

    def picture(kind: int) -> bytes:
        data = b"".join(bytes([kind]) + (row if kind == 0 else bytes(
            (a - b) & 255 for a, b in zip(row, up))) for row, up in zip(rows, above))
        return png_of(data, 4, 3)

    assert picture(0) != picture(2)
    assert povfarm.same_pixels(picture(0), picture(2), ".png")
    rows[2] = rows[2][:-1] + b"\0"
    other = picture(2)
    rows[2] = bytes(range(90, 102))
    assert not povfarm.same_pixels(picture(0), other, ".png")


@pytest.mark.parametrize("kind", ALPHAS)
def test_black_is_black_whatever_the_alpha(
        kind: str, rendered: Dict[Tuple[str, str], bytes]) -> None:
    assert povfarm.is_black(rendered["nothing", kind], ".png")
    assert povfarm.is_black(rendered["unlit", kind], ".png")
    assert not povfarm.is_black(rendered["glowing", kind], ".png")
