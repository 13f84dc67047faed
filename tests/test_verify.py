"""Pictures that fit each other: one POV-Ray for a job, sick workers and their way back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Dict

import pytest
from farm_in_a_box import Farm, farm_fixture, sha256

import povfarm

__all__ = ["farm_fixture"]


def worker(farm: Farm, name: str, **engines: str) -> int:
    """Let a worker with this POV-Ray join."""
    info = povfarm.WorkerInfo(name, 2, 1 << 30, "Linux", engines, ())
    return farm.scheduler.join(info, sha256(name.encode()), "192.168.1.5", True)[0]


def waiting_for(farm: Farm, job: int) -> str:
    return str(farm.ask("GET", f"/api/v1/jobs/{job}").json()["waiting_for"])


# --- one POV-Ray for all frames of a job

def test_a_job_takes_the_first_workers_povray(farm: Farm) -> None:
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


def test_the_next_job_takes_another_first_workers_povray(farm: Farm) -> None:
    anna, bert = worker(farm, "anna", povray="3.7.0.10"), worker(farm, "bert", povray="3.8.0")
    farm.submit(1)
    farm.render(anna)
    job = farm.submit(1)
    assert farm.render(bert, job) == [0]


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
    assert "3.8" in farm.job(job)["engines"]


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
    row = farm.job(job)
    assert (row["priority"], row["slices"], row["radiosity"], row["povray"]) == (
        5, "4", "off", "3.7")


def test_a_worker_tells_what_its_include_files_are(tmp_path: Path) -> None:
    real = povfarm.standard_library()
    if not real:
        pytest.skip("POV-Ray's include files are not here")
    copy = tmp_path / "include"
    for place in real:
        shutil.copytree(place, copy, dirs_exist_ok=True)

    def told(*library: object) -> str:
        return povfarm.Engine("povray", "3.7", tuple(map(str, library))).told()["includes"]

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
    """Let anna fail everything while bert does not; return a job with frames left."""
    for number in range(3):
        job = farm.submit(9, name=f"j{number}", priority=number)
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
