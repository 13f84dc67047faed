"""The records between coordinator and worker, the states, and the changes that are allowed."""

from __future__ import annotations

import itertools
import json
from typing import Any, Callable, Dict, List, Mapping, Tuple

import pytest

import povfarm
from helpers.farm_in_a_box import pov_job
from povfarm import (
    JOB_TRANSITIONS,
    STANDARD,
    TRANSITIONS,
    Cost,
    JobOptions,
    JobState,
    LeaseSpec,
    PovJob,
    TaskSpec,
    TaskState,
    UserError,
    WorkerInfo,
    job_state,
    lease_size,
    pause_reason,
    runs_at_once,
)

Q, L, D, F, C = (TaskState.QUEUED, TaskState.LEASED, TaskState.DONE, TaskState.FAILED,
                 TaskState.CANCELLED)


# --- states

def test_a_task_changes_only_in_these_ways() -> None:
    assert frozenset({(Q, L), (Q, D), (Q, C), (L, Q), (L, D), (L, F), (L, C), (F, D), (F, Q),
                      (C, Q), (D, Q)}) == TRANSITIONS


def test_a_finished_picture_is_never_thrown_away_but_to_be_rendered_again() -> None:
    assert [to for frm, to in TRANSITIONS if frm is D] == [Q]


def test_a_done_job_stays_done_unless_frames_are_rendered_again() -> None:
    assert [to for frm, to in JOB_TRANSITIONS if frm is JobState.DONE] == [JobState.ACTIVE]


def test_every_state_but_the_first_can_be_reached() -> None:
    assert {to for _, to in TRANSITIONS} == set(TaskState)
    assert {to for _, to in JOB_TRANSITIONS} == set(JobState)
    assert all(frm is not to for frm, to in [*TRANSITIONS, *JOB_TRANSITIONS])


def counted(**counts: int) -> Dict[TaskState, int]:
    return {state: counts.get(state.value, 0) for state in TaskState}


@pytest.mark.parametrize("state, counts, then", [
    ("active", {"queued": 1, "done": 5}, "active"),
    ("active", {"leased": 1, "failed": 5}, "active"),
    ("active", {"done": 3}, "done"),
    ("active", {"done": 2, "failed": 1}, "failed"),
    ("active", {"failed": 3}, "failed"),
    ("active", {"done": 2, "cancelled": 1}, "done"),
    ("active", {"done": 2, "failed": 1, "cancelled": 1}, "failed"),
    ("active", {"cancelled": 3}, "cancelled"),
    ("waiting", {"cancelled": 3}, "cancelled"),
    ("paused", {"queued": 1}, "paused"),
    ("paused", {"leased": 1}, "paused"),
    ("paused", {"done": 3}, "done"),
    ("paused", {"failed": 1, "done": 2}, "failed"),
    ("waiting", {"queued": 3}, "waiting"),
    ("failed", {"queued": 1, "done": 2}, "active"),
    ("failed", {"done": 3}, "done"),
    ("cancelled", {"queued": 1}, "cancelled"),
    ("cancelled", {"cancelled": 2, "done": 1}, "cancelled"),
    ("cancelled", {"failed": 1, "done": 1}, "cancelled"),
])
def test_a_job_is_what_its_tasks_make_it(state: str, counts: Dict[str, int], then: str) -> None:
    assert job_state(JobState(state), counted(**counts)) is JobState(then)


@pytest.mark.parametrize("state", [JobState.ACTIVE, JobState.PAUSED, JobState.FAILED])
def test_a_job_never_goes_where_it_may_not(state: JobState) -> None:
    for numbers in itertools.product((0, 1, 3), repeat=5):
        counts = dict(zip(TaskState, numbers))
        possible = any(numbers) and not (
            state is JobState.FAILED and counts[C] == sum(numbers))
        if possible:
            to = job_state(state, counts)
            assert to is state or (state, to) in JOB_TRANSITIONS, (state, counts)


@pytest.mark.parametrize("done, failed, pauses", [
    (0, 0, False), (0, 2, False), (0, 3, True), (0, 3000, True), (1, 3, False), (500, 2500, False),
])
def test_a_new_job_that_only_fails_should_pause(done: int, failed: int, pauses: bool) -> None:
    assert bool(pause_reason(done, failed)) is pauses


# --- sizes of leases

def test_while_nothing_is_measured_one_frame_is_tried() -> None:
    assert lease_size(3000, 1, None) == 1


def test_the_first_runs_of_many_frames_do_not_all_end_together() -> None:
    assert [lease_size(3000, 4, None, runs=runs) for runs in range(6)] == [1, 2, 3, 1, 2, 3]
    assert [lease_size(12, 4, None, runs=runs) for runs in range(6)] == [1] * 6


COSTS = [Cost(cpu, cpu) for cpu in (0.0, 0.001, 0.02, 0.1, 1.0, 4.0, 60.0, 4000.0)]


@pytest.mark.parametrize("cost", COSTS, ids=str)
@pytest.mark.parametrize("slots", [1, 2, 7, 64])
def test_a_lease_is_no_longer_than_ten_seconds_and_no_more_than_a_fair_share(
        cost: Cost, slots: int) -> None:
    for queued in [1, 2, 3, 10, 100, 3000]:
        size = lease_size(queued, slots, cost)
        share = max(-(-queued // slots), 1)
        assert 1 <= size <= min(share, queued)
        assert size == 1 or size * cost.cpu <= 10


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_leases_shrink_to_single_frames_at_the_end(cost: Cost) -> None:
    sizes = [lease_size(queued, 4, cost) for queued in range(2000, 0, -1)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4:] == [1, 1, 1, 1]
    assert sizes[-1] == 1


def test_cheap_frames_share_the_start_of_a_process() -> None:
    assert lease_size(100, 4, Cost(0.02, 0.02)) >= 8


def test_cheap_frames_go_to_those_who_have_none_yet() -> None:
    queued, runs, sizes = 117, 7, []
    while queued and runs < 32:
        sizes.append(lease_size(queued, 32, Cost(0.02, 0.3), runs))
        queued, runs = queued - sizes[-1], runs + 1
    assert queued < 12 and max(sizes) == sizes[0] == 5
    assert [lease_size(8, 32, Cost(0.02, 0.3), runs) for runs in (30, 36)] == [1, 1]


def test_frames_that_hardly_compute_take_many_runs_to_keep_a_core_busy() -> None:
    assert runs_at_once(2, None) == 0
    assert runs_at_once(2, Cost(100, 100)) == 2
    assert runs_at_once(2, Cost(0.05, 0.3)) == 11
    assert runs_at_once(3, Cost(0.0, 0.3)) == 48


def test_no_slots_are_as_one() -> None:
    assert lease_size(10, 0, Cost(1, 1)) == lease_size(10, 1, Cost(1, 1))


# --- the wire

JOB = PovJob({"Input_File_Name": "a b.pov", "Width": "64", "Final_Frame": "5", "Initial_Frame": "1"},
             ("size=5", 'name="x"'), ("inc", STANDARD, "_lib1/sub"), "scenes/a", ("radiosity",))
LEASE = LeaseSpec("ab" * 16, 7, "böll", 2, (TaskSpec(3, 1, "a b1.png"), TaskSpec(4, 2, "a b2.png")),
                  "0" * 64, JOB, True)
WORKER = {"name": "anna", "cores": 4, "memory": 1 << 33, "system": "Linux 6",
          "engines": {"povray": "3.7.0.10"}, "tags": ["fast"]}


def through_json(wire: Any) -> Any:
    return json.loads(json.dumps(wire))


def test_a_job_survives_the_wire() -> None:
    assert PovJob.from_wire(through_json(JOB.to_wire())) == JOB


def test_a_lease_survives_the_wire() -> None:
    assert LeaseSpec.from_wire(through_json(LEASE.to_wire())) == LEASE


def test_a_worker_survives_the_wire() -> None:
    info = WorkerInfo.from_wire(through_json(WORKER))
    assert info == WorkerInfo("anna", 4, 1 << 33, "Linux 6", {"povray": "3.7.0.10"}, ("fast",))


def test_long_names_of_workers_are_cut() -> None:
    info = WorkerInfo.from_wire({**WORKER, "name": "n" * 5000, "system": "s" * 5000})
    assert (len(info.name), len(info.system)) == (100, 100)


WIRES: List[Tuple[str, Callable[[Any], Any], Dict[str, Any]]] = [
    ("job", PovJob.from_wire, JOB.to_wire()),
    ("lease", LeaseSpec.from_wire, LEASE.to_wire()),
    ("worker", WorkerInfo.from_wire, WORKER),
]
PLACES = [pytest.param(read, wire, key, id=f"{name}-{key}")
          for name, read, wire in WIRES for key in wire]
ODD: List[Any] = [None, True, -1, 2.5, "text", [], {}, [1], [None], [[]], {"a": 1}, {"a": None}]


@pytest.mark.parametrize("read, wire, key", PLACES)
def test_a_missing_part_is_refused(
        read: Callable[[Any], Any], wire: Dict[str, Any], key: str) -> None:
    with pytest.raises(UserError):
        read({name: value for name, value in wire.items() if name != key})


@pytest.mark.parametrize("read, wire, key", PLACES)
def test_a_part_of_another_shape_is_refused(
        read: Callable[[Any], Any], wire: Dict[str, Any], key: str) -> None:
    for odd in ODD:
        if type(odd) is not type(wire[key]):
            with pytest.raises(UserError):
                read({**wire, key: odd})
        else:
            try:
                again = read({**wire, key: odd})
            except UserError:
                continue
            assert read(wire) is not again  # whatever is taken is a record


@pytest.mark.parametrize("read", [read for _, read, _ in WIRES])
@pytest.mark.parametrize("odd", [*ODD, 10**30], ids=repr)
def test_what_is_no_record_at_all_is_refused(read: Callable[[Any], Any], odd: Any) -> None:
    with pytest.raises(UserError):
        read(odd)


@pytest.mark.parametrize("change", [
    {"values": {"Pre_Frame_Command": "rm -rf ~"}}, {"values": {"pre_frame_command": "x"}},
    {"values": {"Width": "64\nPre_Frame_Command=x"}}, {"values": {"Width\nPre_Scene_Command": "x"}},
    {"values": {"Width": "sixty"}}, {"values": {"No_Such_Key": "1"}}, {"values": {"Width": 64}},
    {"values": {"Include_Ini": "x.ini"}},
    {"values": {"Input_File_Name": "a\nPre_Scene_Command=x"}},
    {"declares": ['a=1"\nPre_Scene_Command=x']}, {"declares": [1]},
    {"library": ['a"\nPre_Scene_Command=x']}, {"library": ["../up"]}, {"library": ["/etc"]},
    {"library": [None]}, {"run_dir": ".."}, {"run_dir": "/"}, {"run_dir": ""}, {"run_dir": "a/../.."},
    {"uses": [1]},
], ids=repr)
def test_a_job_that_starts_programs_or_leaves_its_directory_is_refused(
        change: Dict[str, Any]) -> None:
    with pytest.raises(UserError):
        PovJob.from_wire({**JOB.to_wire(), **change})


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "", "a\\b.png", "a/../../b.png", "a\0.png"])
def test_a_lease_whose_image_would_leave_its_directory_is_refused(name: str) -> None:
    wire = LEASE.to_wire()
    with pytest.raises(UserError):
        LeaseSpec.from_wire({**wire, "tasks": [{"id": 1, "frame": 1, "name": name}]})


@pytest.mark.parametrize("change", [
    {"cores": 0}, {"cores": -1}, {"cores": True}, {"cores": 10**30}, {"memory": 10**30},
    {"engines": {"povray": 3.7}}, {"tags": [1]}, {"name": 5},
], ids=repr)
def test_a_worker_that_cannot_be_is_refused(change: Dict[str, Any]) -> None:
    with pytest.raises(UserError):
        WorkerInfo.from_wire({**WORKER, **change})


# --- options

@pytest.mark.parametrize("changes", [
    {}, {"priority": -1000}, {"priority": 1000}, {"max_workers": 0}, {"max_workers": 10_000},
    {"retry_limit": 1}, {"retry_limit": 100}, {"in_order": True}, {"priority": 3, "in_order": False},
], ids=repr)
def test_options_that_can_be_set(changes: Mapping[str, Any]) -> None:
    changed = JobOptions().changed(changes)
    assert vars(changed) == {**vars(JobOptions()), **changes}


@pytest.mark.parametrize("changes", [
    {"priority": 1001}, {"priority": -1001}, {"priority": "5"}, {"priority": True},
    {"priority": 1.0}, {"priority": None}, {"max_workers": -1}, {"retry_limit": 0},
    {"retry_limit": 101}, {"in_order": 1}, {"in_order": "on"}, {"owner": "me"}, {"": 1},
    {"priority": 5, "state": "done"}, {"__class__": 1},
], ids=repr)
def test_options_that_cannot_be_set_are_named(changes: Mapping[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot be set"):
        JobOptions().changed(changes)


# --- threads

@pytest.mark.parametrize("uses, safe", [
    ((), True), (("own-output",), True), (("radiosity",), False), (("photons",), False),
    (("radiosity", "photons"), False),
])
def test_threads_change_pictures_with_radiosity_or_photons(
        uses: Tuple[str, ...], safe: bool) -> None:
    assert pov_job(uses=uses).thread_safe is safe


def test_a_pov_job_tells_size_and_names_like_its_options() -> None:
    options = JOB.options
    assert (options.width, options.scene) == (64, "a b.pov")
    assert povfarm.plan_frames(options).output_name(3) == "a b3.png"


def test_the_schema_of_a_record_is_what_it_is_read_by() -> None:
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    worker = povfarm.schema_of(povfarm.WorkerInfo)
    assert worker["properties"] == {
        "name": {"type": "string"}, "cores": {"type": "integer"}, "memory": {"type": "integer"},
        "system": {"type": "string"}, "engines": texts,
        "tags": {"type": "array", "items": {"type": "string"}},
        "povfarm": {"type": "string", "nullable": True}}
    wire = {"name": "a", "cores": 1, "memory": 1, "system": "", "engines": {}, "tags": []}
    assert povfarm.WorkerInfo.from_wire(wire).to_wire() == {**wire, "povfarm": ""}
    assert sorted(worker["required"]) == sorted(wire)
    for name in wire:
        for odd in ({**wire, name: None}, {key: wire[key] for key in wire if key != name}):
            with pytest.raises(povfarm.UserError, match=f"'{name}' is missing or not a"):
                povfarm.WorkerInfo.from_wire(odd)
    lease = povfarm.schema_of(povfarm.LeaseSpec)["properties"]
    assert lease["pov"] == povfarm.schema_of(povfarm.PovJob)
    assert lease["tasks"]["items"]["properties"]["kind"] == {
        "type": "string", "enum": ["frame", "slice", "pass"]}
