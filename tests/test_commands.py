"""CLI: the commands that look at jobs and steer them, at a coordinator in this process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest

import povfarm
from helpers.farm_in_a_box import Farm, sha256
from helpers.pictures import png
from povfarm import main


class Served(Farm):
    """A farm in a box that answers over HTTP, where the commands look for it first."""

    def __init__(self, root: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.coordinator = povfarm.Coordinator(root, bind="127.0.0.1", durable=False)
        self.store, self.scheduler = self.coordinator.store, self.coordinator.scheduler
        self.coordinator.start()
        self._capture = capture

    def says(self, *arguments: Any, code: int = 0) -> Tuple[str, List[str]]:
        """Run a command that ends with this code; return its output, and the lines of stderr."""
        self._capture.readouterr()
        ended = main([str(argument) for argument in arguments])
        out, errors = self._capture.readouterr()
        assert ended == code, (arguments, out, errors)
        assert "Traceback" not in errors
        return out, errors.splitlines()

    def wire(self, *arguments: Any, code: int = 0) -> Any:
        """Run a command with --json and return what it printed."""
        return json.loads(self.says(*arguments, "--json", code=code)[0])

    def states_of(self, *jobs: int) -> List[str]:
        return [self.state(job) for job in jobs]


@pytest.fixture(name="farm")
def farm_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> Iterator[Served]:
    """A farm whose user is in an empty directory."""
    monkeypatch.setenv("POVFARM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(povfarm, "_command_typed", "povfarm.py {}".format)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    farm = Served(tmp_path / "data", capsys)
    yield farm
    problems = farm.problems()
    farm.coordinator.stop()
    assert not problems


def test_totals_are_of_workers_computers_and_groups(farm: Served) -> None:
    farm.submit(2)
    assert farm.says("workers", "--totals") == ("nothing was rendered yet\n", [])
    one = farm.scheduler.join(povfarm.WorkerInfo("eve@attic", 1, 0, "", {}, ("roof",)), "t", "::1")
    farm.finish(one, farm.lease(one), cpu=90.0)
    farm.fail(one, farm.lease(one))
    assert [line.split() for line in farm.says("workers", "--totals")[0].splitlines()] == [
        ["worker", "frames", "time", "failed", "tries"], ["eve@attic", "1", "1:30", "1"], [],
        ["computer", "frames", "time", "failed", "tries"], ["attic", "1", "1:30", "1"], [],
        ["group", "frames", "time", "failed", "tries"], ["roof", "1", "1:30", "1"], [],
        *[line.split() for line in (
            "A frame that several rendered counts as a part of one for each. A computer is what stands",
            "behind the @ of a worker's name, or else that name.")]]
    assert farm.wire("workers", "--totals")["groups"] == [
        {"name": "roof", "frames": 1.0, "wall": pytest.approx(90, abs=5), "failures": 1}]


def test_what_is_made_for_people_comes_with_what_they_do(farm: Served) -> None:
    for words, said in (("add ben", "give that with --key-file FILE"),
                        ("token ben", "ben is the e-mail address"),
                        ("invite", f"work --server {farm.coordinator.url} --code "),
                        ("invite --role viewer", f"login --server {farm.coordinator.url} --code ")):
        out, errors = farm.says("users", *words.split())
        assert len(out.split()) == 1 and len(errors) == 1 and said in errors[0]


def test_open_invitations_are_listed_and_withdrawn_by_their_codes(farm: Served) -> None:
    code = farm.says("users", "invite", "--uses", "30", "--jobs-limit", "5")[0].strip()
    [one] = farm.wire("users")["invited"]
    assert (one["code"], one["uses"], one["limits"]) == (code, 30, {"jobs": 5})
    assert farm.says("users")[0].splitlines()[1].split()[:3] == [code, "30", "user"]
    assert "no invitation that is open has the code 'AAAAA'" in farm.says(
        "users", "withdraw", "AAAAA", code=2)[1][0]
    assert farm.says("users", "withdraw", code.lower().replace("-", ""))[1][0].endswith(
        "is withdrawn: nobody can come by it any more; who has come stays")
    assert farm.wire("users") == {"users": [], "invited": []}


def test_a_farm_that_answers_no_calls_is_found_where_commands_look(
        farm: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "discover", lambda *_: [])
    [view] = farm.wire("discover")
    assert (view["url"], view["yours"]) == (farm.coordinator.url, True)
    monkeypatch.setenv("POVFARM_DATA", str(tmp_path / "none"))
    assert "no coordinator answers" in farm.says("discover", code=1)[0]
    [view] = farm.wire("discover", "--server", farm.coordinator.url)
    assert (view["url"], view["yours"]) == (farm.coordinator.url, False)


def test_who_has_no_key_is_told_of_the_ways_to_come(
        farm: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POVFARM_DATA", str(tmp_path / "none"))
    _, errors = farm.says("admit", "--server", farm.coordinator.url, "ABCDEF", code=1)
    assert all(way in errors[0] for way in ("--data DIR", "--key-file", "--code CODE"))
    found = povfarm.Found("klasse", "f1", farm.coordinator.url, False, "127.0.0.1")
    monkeypatch.setattr(povfarm, "discover", lambda *_: [found])
    Path("s.pov").write_text("camera { location -z }")
    _, errors = farm.says("submit", "s.pov", code=2)
    assert "you have no key for klasse" in errors[-1] and "--code CODE" in errors[-1]
    monkeypatch.setattr(povfarm, "discover", lambda *_: [])
    assert "add --server URL" in farm.says("status", "--code", "A", code=1)[1][0]


def test_answers_that_are_not_understood_are_one_line(
        farm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ({}, [], {"notice": "", "jobs": [{}]}, "x"):
        monkeypatch.setattr(povfarm.Client, "get", lambda *_, answer=answer, **__: answer)
        for words in ("status", "status 1", "workers", "users"):
            out, errors = farm.says(*words.split(), code=1)
            assert out == "" and len(errors) == 1 and "cannot be understood" in errors[0]


# --- which jobs are meant

def test_jobs_are_named_by_number_range_name_and_last(farm: Served) -> None:
    jobs = [farm.submit(name=name) for name in ("anna", "bert", "bert", "camera 2", "2024")]
    farm.scheduler.delete(jobs[1])
    for words, states in (
            (["1"], "paaa"), (["3-4"], "appa"), (["1-3"], "ppaa"), (["camera 2"], "aapa"),
            (["last"], "aaap"), (["2024"], "aaap"), (["bert"], "apaa"), (["1", "5"], "paap"),
            (["0-99"], "pppp")):
        farm.says("pause", *words)
        now = farm.states_of(1, 3, 4, 5)
        assert "".join(state[0] for state in now) == states, words
        for job, state in zip((1, 3, 4, 5), now):
            if state == "paused":
                farm.scheduler.resume(job)


@pytest.mark.parametrize("word", ["99", "5-7", "7-5", "nobody", "last", "99999999999999999999"])
@pytest.mark.parametrize("command", [
    "status", "logs", "fetch", "pause", "resume", "cancel", "retry", "delete", "set"])
def test_a_job_that_there_is_not_is_one_line(command: str, word: str, farm: Served) -> None:
    more = {"logs": ["0"], "set": ["priority=1"]}.get(command, [])
    out, errors = farm.says(command, word, *more, code=2)
    assert out == "" and len(errors) == 1
    assert word in errors[0] and "there is no job" in errors[0] and "status" in errors[0]


def test_of_several_jobs_of_a_name_the_newest_is_looked_at_and_none_is_changed(
        farm: Served) -> None:
    jobs = [farm.submit(name="ball") for _ in range(3)]
    out, errors = farm.says("status", "ball", "--json")
    assert json.loads(out)["id"] == jobs[2]
    assert errors == ["povfarm: 3 jobs are called 'ball' (3, 2, 1): this is the newest"]
    _, errors = farm.says("cancel", "ball", code=2)
    assert errors == ["povfarm: 3 jobs are called 'ball' (3, 2, 1): give the number of the one "
                      "that you mean"]
    assert farm.states_of(*jobs) == ["active"] * 3


# --- steering

def test_one_job_that_cannot_does_not_stop_the_others(farm: Served) -> None:
    jobs = [farm.submit() for _ in range(4)]
    farm.scheduler.cancel(jobs[1])
    farm.scheduler.delete(jobs[2])
    out, errors = farm.says("pause", 1, 2, 4, code=1)
    assert out == "" and [line.removeprefix("povfarm: ") for line in errors] == [
        "job 1 (ball) is paused", "job 2 is cancelled: it cannot become paused",
        "job 4 (ball) is paused"]
    assert farm.states_of(1, 2, 4) == ["paused", "cancelled", "paused"]


def test_where_one_word_is_no_job_nothing_is_done_to_the_others(farm: Served) -> None:
    """As 'cancel 1 5-20' of somebody who means frames."""
    farm.submit()
    out, errors = farm.says("cancel", 1, "5-20", "nobody", code=2)
    assert out == "" and [line.removeprefix("povfarm: ") for line in errors] == [
        "there is no job 5-20: 'povfarm.py status' shows the jobs",
        "there is no job 'nobody': 'povfarm.py status' shows the jobs"]
    assert farm.states_of(1) == ["active"]


@pytest.mark.parametrize(("command", "before", "after"), [
    ("pause", "active", "paused"), ("resume", "paused", "active"),
    ("cancel", "active", "cancelled"), ("delete", "active", "deleted")])
def test_several_jobs_are_steered_at_once(
        command: str, before: str, after: str, farm: Served) -> None:
    for job in [farm.submit() for _ in range(3)]:
        if before != "active":
            getattr(farm.scheduler, {"paused": "pause", "cancelled": "cancel"}[before])(job)
    told = farm.wire(command, "1-2", "last")
    assert told == [{"job": job, "name": "ball", "state": after} for job in (2, 1, 3)]
    if command == "delete":
        assert farm.wire("status") == []
    else:
        assert farm.states_of(1, 2, 3) == [after] * 3


def test_frames_are_rendered_again(farm: Served) -> None:
    worker = farm.worker()
    for _ in range(2):
        farm.submit(5)
    farm.render(worker)
    assert farm.says("retry", 1, "2-3,5", code=0) == ("", [
        "povfarm: job 1 (ball): frames 2-3,5 are rendered again"])
    assert farm.states(1) == ["done", "queued", "queued", "done", "queued"]
    assert farm.states(2) == ["done"] * 5
    assert farm.wire("retry", "last", "4") == [{"job": 2, "name": "ball", "state": "active"}]
    assert farm.states(2) == ["done", "done", "done", "queued", "done"]


def test_status_shows_the_frames_that_changed_within_a_time(farm: Served) -> None:
    farm.submit(3)
    farm.render(farm.worker())
    with farm.store.tx() as tx:  # an hour ago
        tx._do("UPDATE event SET time = time - 3600")
    farm.says("retry", 1, 2)
    assert [line.split()[:2] for line in farm.says("status", 1, "--since", "10m")[0].splitlines()
            ] == [["frame", "state"], ["2", "queued"]]
    assert [frame["frame"] for frame in farm.wire("status", 1, "--since", "2h")] == [1, 2, 3]
    for words in ((), (1, "--watch")):
        assert "--since is for jobs that are named" in farm.says(
            "status", "--since", "1h", *words, code=2)[1][0]


def test_retry_says_that_nothing_failed_and_counts_one_frame(farm: Served) -> None:
    farm.submit(2)
    farm.render(farm.worker())
    assert farm.says("retry", 1) == ("", [
        "povfarm: job 1 (ball) is done and nothing failed; to render frames again, name them: "
        "'povfarm.py retry 1 FRAMES'"])
    assert farm.says("retry", 1, 2) == ("", ["povfarm: job 1 (ball): frame 2 is rendered again"])
    log = farm.says("logs", 1, 2)[0]
    assert "counts no more" in log and "void" not in log


def test_frames_are_cancelled_and_the_others_are_all_there_is(farm: Served) -> None:
    farm.submit(3)
    assert farm.says("cancel", 1, "--frames", "2-3") == ("", [
        "povfarm: job 1 (ball): frames 2-3 are cancelled"])
    assert "none of the frames 2 of job 1 waits" in farm.says("cancel", 1, "--frames=2", code=2)[1][0]
    farm.render(farm.worker())
    assert "1 of 3 done, 2 cancelled" in farm.says("status", 1)[0]
    assert farm.says("fetch", 1, "--apng", "film.png")[1][:1] == [
        "povfarm: job 1 (ball) is done: 2 of 3 frames are not finished; "
        "'povfarm.py retry 1' renders the rest"]
    assert Path("film.png").is_file()


def test_jobs_that_refuse_alike_share_a_line(farm: Served) -> None:
    for job in [farm.submit() for _ in range(4)]:
        farm.scheduler.cancel(job)
    assert farm.says("pause", "1-3", code=1) == ("", [
        "povfarm: jobs 3, 2, 1: each is cancelled: it cannot become paused"])
    assert farm.says("cancel", 4, code=1) == ("", ["povfarm: job 4 is cancelled already"])


@pytest.mark.parametrize("words", [
    "retry 1 40", "logs 1 99", "set 1 first=99", "admit abc", "users set nobody jobs=1",
    "users remove ben", "users add anna", "set 1 slices=4"])
def test_bad_input_that_the_coordinator_refuses_is_exit_code_2(words: str, farm: Served) -> None:
    farm.submit(2)
    farm.says("set", 1, "in-order=yes")
    farm.says("users", "add", "anna")
    out, errors = farm.says(*words.split(), code=2)
    assert out == "" and len(errors) == 1
    assert "leave out --slices" in errors[0] or "slices" not in words


@pytest.mark.parametrize("words", [
    "pause 1", "set 1 retries=5", "retry 1", "users add ben", "users token anna", "users token nobody",
    "users withdraw AAAAA", "users remove ben", "machines", "tidy", "admit ABCDEF",
    "workers pause studio"])
def test_what_is_refused_to_a_person_is_exit_code_1(words: str, farm: Served) -> None:
    farm.submit(2)
    farm.worker("studio")
    Path("key").write_text(farm.says("users", "add", "anna")[0])
    out, errors = farm.says(*words.split(), "--key-file", "key", code=1)
    assert out == "" and len(errors) == 1
    assert "the farm's key: --key-file" in errors[0] or "who has the farm key may do that" in errors[0]
    assert "admin and" not in errors[0], "nobody is called so"


def test_what_nobody_may_yet_or_any_more_is_exit_code_1(farm: Served) -> None:
    farm.worker("stranger", admitted=False)
    assert "stranger was not let in: 'povfarm.py workers' shows" in farm.says(
        "workers", "pause", "stranger", code=1)[1][0]
    Path("no-key").write_text("0" * 64)
    farm.says("status", "--key-file", "no-key", code=1)


def test_a_file_is_no_directory_for_images(farm: Served) -> None:
    rendered(farm, 2)
    Path("afile").touch()
    _, errors = farm.says("fetch", 1, "--output", "afile", code=2)
    assert len(errors) == 1 and "afile is a file: name a directory with --output" in errors[0]


def test_what_is_watched_has_a_time_between_the_tables(
        farm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, events = povfarm.Client.request, []

    def asked(client: povfarm.Client, method: str, path: str, **more: Any) -> Any:
        if "/events?" in path:
            events.append(path)
            if len(events) > 3:
                raise KeyboardInterrupt
            if len(events) == 2:
                return povfarm.json_response({})  # nothing has happened for half a minute
            farm.submit()
        return ask(client, method, path, **more)

    monkeypatch.setattr(povfarm.Client, "request", asked)
    out, _ = farm.says("status", "--watch", code=130)
    assert len(re.findall(r"\n\n--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", out)) == 2


@pytest.mark.parametrize(("words", "meant"), [
    ("status --wacth", "--watch"), ("sumbit", "submit"), ("status --qqqqqq", "")])
def test_what_was_meant_is_guessed(words: str, meant: str, farm: Served) -> None:
    errors = farm.says(*words.split(), code=2)[1]
    assert (f"(do you mean {meant}?)" in errors[0]) is bool(meant)
    assert bool(meant) or "mean" not in errors[0]


def test_fetch_replaces_its_copy_of_a_frame_that_was_rendered_again(
        farm: Served, tmp_path: Path) -> None:
    worker, job, out = farm.worker(), farm.submit(3), tmp_path / "out"
    farm.render(worker)
    farm.says("fetch", job, "--output", str(out), code=0)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    farm.says("retry", job, "2", code=0)
    text, _ = farm.says("fetch", job, "--output", str(out), code=0)
    assert "0 new of 2 finished images" in text
    farm.finish(worker, farm.lease(worker), image=png(99))
    text, _ = farm.says("fetch", job, "--output", str(out), code=0)
    assert "1 new of 3 finished images" in text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {**before, "out2.png": png(99)}


@pytest.mark.parametrize("frames, problem", [
    ("6", "it has 1 to 5"), ("last", "neither a frame nor a range"), ("1&x=2", "neither a frame")])
def test_what_is_no_frame_is_not_rendered_again(
        farm: Served, frames: str, problem: str) -> None:
    farm.submit(5)
    out, errors = farm.says("retry", 1, frames, code=2)
    assert out == "" and len(errors) == 1 and problem in errors[0]


def test_retry_without_frames_is_for_what_failed_of_the_jobs_of_a_range(farm: Served) -> None:
    for job in [farm.submit() for _ in range(3)]:
        farm.scheduler.cancel(job)
    told = farm.wire("retry", "1-2")
    assert told == [{"job": job, "name": "ball", "state": "active"} for job in (2, 1)]
    assert farm.states_of(1, 2, 3) == ["active", "active", "cancelled"]


def test_json_tells_of_each_job_what_became_of_it(farm: Served) -> None:
    farm.submit()
    assert farm.wire("resume", 1, code=1) == [
        {"job": 1, "name": "ball", "error": "job 1 is active: only a paused job resumes"}]
    assert farm.wire("resume", 1, 2, code=2) == [
        {"job": "2", "error": "there is no job 2: 'povfarm.py status' shows the jobs"}]


# --- options of a job

@pytest.mark.parametrize(("words", "changes"), [
    (["retries=5", "frame-timeout=2h"], {"retry_limit": 5, "frame_timeout": 7200}),
    (["--retries", "5", "--frame-timeout", "2h"], {"retry_limit": 5, "frame_timeout": 7200}),
    (["--priority=-5", "max-workers=2"], {"priority": -5, "max_workers": 2}),
    (["max_workers=0", "retry_limit=7"], {"max_workers": 0, "retry_limit": 7}),
    (["in_order=true"], {"in_order": 1}), (["--in-order"], {"in_order": 1}),
    (["povray-version=3.8"], {"povray": "3.8"}), (["povray=any"], {"povray": "any"}),
    (["slices=off", "radiosity=animation"], {"slices": "off", "radiosity": "animation"}),
    (["verify=20", "slices=off", "radiosity=share=animation"],
     {"verify": 20, "slices": "off", "radiosity": "animation"}),
])
def test_set_speaks_as_submit_does(
        words: List[str], changes: Any, farm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POVFARM_PRIORITY", "9")  # is for new jobs
    jobs = [farm.submit(), farm.submit()]
    before = farm.job(jobs[0])
    _, errors = farm.says("set", "1-2", *words)
    assert len(errors) == 2 and errors[1].startswith("povfarm: job 1 (ball): ")
    for job in jobs:
        now = farm.job(job)
        assert {name: vars(now.options)[name] for name in changes} == changes
        assert replace(now, id=before.id, created=before.created,
                       options_json=before.options_json) == before
        assert now.options == replace(before.options, **changes)


@pytest.mark.parametrize(("words", "says"), [
    (["1", "colour=red"], "'colour' cannot be set: there are priority, max-workers, retries, "),
    (["1", "retries=many"], "retries: 'many'"), (["1", "--retries", "0"], "--retries: '0'"),
    (["1", "priority=1001"], "-1000 to 1000"), (["1", "frame-timeout=soon"], "90s, 5m"),
    (["1", "in-order=perhaps"], "in-order: 'perhaps'"), (["1", "slices=0"], "slices: '0'"),
    (["1"], "usage: povfarm.py set"), (["priority=1"], "usage: povfarm.py set"),
    (["1", "priority=1", "verify=101"], "verify: '101'"),
])
def test_what_cannot_be_set_is_one_line_and_changes_nothing(
        words: List[str], says: str, farm: Served) -> None:
    before = farm.job(farm.submit())
    _, errors = farm.says("set", *words, code=2)
    assert len(errors) == 1 and says in errors[0]
    assert farm.job(1) == before


def test_the_help_of_set_lists_its_keys(farm: Served) -> None:
    out, _ = farm.says("help", "set")
    keys = set(vars(povfarm.JobOptions()))
    assert set(povfarm.JOB_OPTIONS) == keys
    assert all(f"--{row.name} " in out for row in povfarm.JOB_OPTIONS.values())


# --- JSON everywhere

def test_json_is_printed_by_every_command_that_talks_to_a_coordinator(farm: Served) -> None:
    url = farm.wire("login")["url"]
    assert url.startswith(farm.coordinator.url + "/login/")
    assert farm.says("login")[0].startswith(farm.coordinator.url)
    worker = farm.worker(admitted=False)
    with farm.store.read() as tx:
        code = tx.worker(worker).code
    assert farm.wire("admit", code) == {"name": "anna"}
    for action, state in ("pause", "paused"), ("drain", "drained"), ("resume", "admitted"):
        assert farm.wire("workers", action, "anna") == {
            "id": worker, "name": "anna", "state": state}
    assert farm.wire("workers", "remove", "anna") == {
        "id": worker, "name": "anna", "state": "removed"}
    farm.submit()
    assert farm.wire("set", 1, "priority=1") == [{"job": 1, "name": "ball", "state": "active"}]
    assert farm.wire("backup", "copy") == {"directory": "copy", "missing": []}
    commands = povfarm._commands()
    assert {name for name, (tag, _) in commands.items()
            if "json" not in [row.name for row in tag.settings()]} == {"serve", "work", "help"}


# --- fetching

def files_in(place: Path) -> List[str]:
    return sorted(path.name for path in place.iterdir())


def rendered(farm: Served, *frames: int, **options: Any) -> List[int]:
    """Jobs of so many frames, which are done."""
    jobs = [farm.submit(count, **options) for count in frames]
    farm.render(farm.worker())
    return jobs


def test_each_job_has_a_directory_of_its_own_and_comes_back_to_it(
        farm: Served, tmp_path: Path) -> None:
    rendered(farm, 2, 3, 1)
    here = Path.cwd()
    places = [farm.wire("fetch", job)["directory"] for job in (1, 2, 3)]
    assert places == ["ball-frames", "ball-2-frames", "ball-3-frames"]
    assert [len(files_in(here / place)) for place in places] == [2, 3, 1]
    before = {path: path.read_bytes() for path in here.rglob("*.png")}
    for job in (3, 1, 2):
        again = farm.wire("fetch", job)
        assert again == {"job": job, "directory": places[job - 1], "files": [], "films": []}
    assert {path: path.read_bytes() for path in here.rglob("*.png")} == before
    (here / places[1] / "out1.png").unlink()
    assert farm.wire("fetch", "2")["files"] == [f"{places[1]}/out1.png"]
    told = farm.wire("fetch", "1-2", "last")
    assert [one["directory"] for one in told] == [places[1], places[0], places[2]]


def test_a_job_of_which_nothing_is_finished_has_its_directory_already(farm: Served) -> None:
    first, second = farm.submit(2), farm.submit(2)
    assert [farm.wire("fetch", job)["directory"] for job in (first, second, first)] == [
        "ball-frames", "ball-2-frames", "ball-frames"]
    farm.render(farm.worker())
    assert farm.wire("fetch", second)["files"] == [
        "ball-2-frames/out1.png", "ball-2-frames/out2.png"]
    assert farm.wire("fetch", first)["directory"] == "ball-frames"


def test_a_directory_that_somebody_else_filled_is_left_alone(farm: Served) -> None:
    Path("ball-frames").mkdir()
    Path("ball-frames/out1.png").write_bytes(b"of a render")
    rendered(farm, 2)
    assert farm.wire("fetch", 1)["directory"] == "ball-1-frames"
    assert Path("ball-frames/out1.png").read_bytes() == b"of a render"
    assert farm.wire("fetch", 1)["directory"] == "ball-1-frames"


def test_images_of_another_job_are_not_replaced(farm: Served) -> None:
    rendered(farm, 2, 2)
    farm.says("fetch", 1, "--output", "one")
    before = [Path("one", name).read_bytes() for name in ("out1.png", "out2.png")]
    out, errors = farm.says("fetch", 2, "--output", "one", code=2)
    assert out == "" and len(errors) == 1 and "one/out1.png is of job 1" in errors[0]
    assert [Path("one", name).read_bytes() for name in ("out1.png", "out2.png")] == before
    farm.says("fetch", 1, "--output", "one")
    for name in files_in(Path("one")):
        Path("one", name).unlink()
    farm.says("fetch", 2, "--output", "one")
    assert farm.says("fetch", 1, "--output", "one", code=2)[0] == ""


def test_jobs_whose_images_have_other_names_may_share_a_directory(farm: Served) -> None:
    for name in ("a", "b"):
        rendered(farm, 1, values={"Output_File_Name": name})
    for job in (1, 2, 1):
        farm.says("fetch", job, "--output", "both")
    assert files_in(Path("both")) == ["a.png", "b.png"]


def test_a_job_of_another_farm_is_another_job(farm: Served, tmp_path: Path) -> None:
    rendered(farm, 1)
    farm.says("fetch", 1)
    mine = Path("ball-frames/out.png").read_bytes()
    notes = next((tmp_path / "data" / "fetched").iterdir())
    with open(notes, "a", encoding="ascii") as file:
        file.write("half a li")
    with farm.store.tx() as tx:  # the first job of a farm that began a minute later
        tx._db.execute("UPDATE job SET created = created + 60")
    assert farm.wire("fetch", 1)["directory"] == "ball-1-frames"
    assert "job 1" in farm.says("fetch", 1, "--output", "ball-frames", code=2)[1][0]
    for other in (tmp_path / "data" / "fetched").iterdir():
        if other != notes:
            other.unlink()
    _, errors = farm.says("fetch", 1, code=2)
    assert len(errors) == 1 and "--output" in errors[0]
    assert Path("ball-frames/out.png").read_bytes() == mine


def test_what_a_scene_wrote_is_not_replaced_by_another_scene(farm: Served) -> None:
    for number, name in enumerate(("a", "b"), 1):
        rendered(farm, 1, values={"Output_File_Name": name})
        text = f"of {name}".encode()
        farm.store.put_blob(sha256(text), [text])
        with farm.store.tx() as tx:
            tx.add_blob(sha256(text), len(text), 0.0)
            tx.add_written(number, "log.txt", 0, sha256(text), len(text))
    farm.says("fetch", 1, "--output", "both")
    _, errors = farm.says("fetch", 2, "--output", "both", code=2)
    assert len(errors) == 1 and "log.txt is of job 1" in errors[0]
    assert files_in(Path("both")) == ["a.png", "log.txt"]
    assert Path("both/log.txt").read_text() == "of a"


def test_who_may_not_have_frames_brought_gets_what_is_with_the_farm(
        farm: Served, tmp_path: Path) -> None:
    worker, job = farm.worker(), farm.submit(2)
    farm.finish(worker, farm.lease(worker))
    held = farm.lease(worker)
    farm.scheduler.beat(worker, {held.id: {held.tasks[0].id: 1.0}}, 0)
    key = tmp_path / "eve.key"
    key.write_text(farm.wire("users", "add", "eve", "--role", "viewer")["key"])
    out, errors = farm.says("fetch", job, "--key-file", key, "--server", farm.coordinator.url)
    assert "1 new of 1 finished image" in out, (out, errors)
    assert "1 frame of job 1 stay with workers" in errors[0] and farm.job(job).leased == 1


def test_nothing_is_made_where_nothing_is_finished(farm: Served) -> None:
    farm.submit()
    out, errors = farm.says("fetch", 1)
    assert (out, errors) == ("", ["povfarm: job 1 (ball) is active: 3 of 3 frames are not "
                                  "finished; fetch again later"])
    assert list(Path.cwd().iterdir()) == []


def test_fetch_says_what_is_missing_and_what_to_do(farm: Served) -> None:
    worker = farm.worker()
    for job in [farm.submit(2, retry_limit=1) for _ in range(2)]:
        farm.says("set", job, "batch=1")
    farm.finish(worker, farm.lease(worker))
    out, errors = farm.says("fetch", 1)
    assert "1 new of 1 finished image in " in out
    assert errors == ["povfarm: job 1 (ball) is active: 1 of 2 frames is not finished; "
                      "fetch again later"]
    farm.says("cancel", 1)
    assert "retry 1' renders the rest" in farm.says("fetch", 1)[1][0]
    farm.says("pause", 2)
    assert "'povfarm.py status 2' shows why" in farm.says("fetch", 2)[1][0]


def test_fetch_of_a_job_that_failed_is_no_success(farm: Served) -> None:
    farm.submit(1, retry_limit=1)
    farm.fail(worker := farm.worker(), farm.lease(worker))
    assert farm.states_of(1) == ["failed"]
    out, errors = farm.says("fetch", 1, code=1)
    assert (out, errors) == ("", [
        "povfarm: job 1 (ball) is failed: 1 of 1 frame is not finished; 'povfarm.py logs 1' "
        "shows why, 'povfarm.py retry 1' renders the rest"])
    assert "logs 1" in farm.says("fetch", 1, "--apng", "film.png", code=1)[1][0]


@pytest.mark.parametrize(("words", "says"), [
    ("--video film.xyz", "film.webm"), ("--fps 12", "--fps is for a film")])
@pytest.mark.parametrize("command", ["fetch 1", "render scene.pov +W8 +H6 +KFF2"])
def test_what_makes_no_film_is_refused_before_anything_is_made(
        command: str, words: str, says: str, farm: Served,
        monkeypatch: pytest.MonkeyPatch) -> None:
    rendered(farm, 2)
    monkeypatch.setattr(povfarm, "_ffmpeg", lambda: "ffmpeg")
    Path("scene.pov").write_text("sphere { 0, 1 }")
    errors = farm.says(*command.split(), *words.split(), code=2)[1]
    assert len(errors) == 1 and says in errors[0]
    assert [path.name for path in Path.cwd().iterdir()] == ["scene.pov"]


@pytest.mark.parametrize(("name", "engine", "says"), [
    ("a.pov", "blender", "blender renders .blend files, and not a.pov"),
    ("a.pov", "houdini", "houdini renders its own files"), ("a.hip", "houdini", ""),
    ("a.blend", "blender", "")])
def test_a_program_gets_no_files_of_another_one(
        name: str, engine: str, says: str, farm: Served) -> None:
    Path(name).write_text("x")
    out, errors = farm.says("submit", name, "--engine", engine, code=2 if says else 0)
    assert says in errors[0] if says else out == "1\n"


@pytest.mark.parametrize("output", ["", "here"])
def test_submit_that_waits_says_where_the_images_are(
        output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = povfarm._parse(povfarm._command("submit")[0], [
        "s.pov", "--wait", *(["--output", output] if output else [])])
    draft = povfarm._Draft("x", *[None] * 7, bool(output), None, None)  # type: ignore[arg-type,call-arg]
    view = {"id": 27, "state": "done", "frames": {"total": 3, "done": 3, "failed": 0},
            "failure": None, "reason": ""}
    files = [str(tmp_path / f"{number}.png") for number in range(3 if output else 0)]
    assert povfarm._conclude(view, files, [], draft, 1.0, options) == 0
    out, errors = capsys.readouterr()
    assert "3 frames" in out and ("fetch 27" in errors) is not bool(output)
    view.update(state="failed", frames={"total": 4, "done": 3, "failed": 1},
                failure={"frame": 2, "message": "no such thing"})
    with pytest.raises(povfarm.FarmError) as caught:
        povfarm._conclude(view, files, [], draft, 1.0, options)
    lines = str(caught.value).split("\n")
    assert "logs 27" in lines[1] and "3 of 4 images are finished" in lines[2]
    assert ("they are in" in lines[2]) is bool(output) is not ("fetch 27" in lines[2])


def test_what_a_job_is_rendered_again_as_replaces_its_images(farm: Served) -> None:
    """The same job, whose image was spoilt here."""
    rendered(farm, 1)
    farm.says("fetch", 1)
    good = Path("ball-frames/out.png").read_bytes()
    Path("ball-frames/out.png").write_bytes(b"spoilt")
    farm.says("fetch", 1)
    assert Path("ball-frames/out.png").read_bytes() == good


def test_a_film_is_made_of_one_job(farm: Served) -> None:
    rendered(farm, 2, 2)
    assert "one job" in farm.says("fetch", "1-2", "--apng", "film.png", code=2)[1][0]
    assert farm.wire("fetch", 2, "--apng", "film.png")["films"] == [str(Path.cwd() / "film.png")]


def test_no_film_takes_the_place_of_an_image(farm: Served) -> None:
    rendered(farm, 2)
    farm.says("fetch", 1)
    image = Path("ball-frames", files_in(Path("ball-frames"))[0])
    good = image.read_bytes()
    told = farm.says("fetch", 1, "--apng", image, code=1)[1]
    assert "is one of the images" in told[-1] and image.read_bytes() == good


def test_output_needs_wait(farm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("scene.pov").write_text("sphere { 0, 1 }")
    out, errors = farm.says("submit", "scene.pov", "--output", "got", code=2)
    assert out == "" and len(errors) == 1
    assert "--wait" in errors[0] and "fetch JOB --output" in errors[0]
    assert farm.wire("status") == [] and not Path("got").exists()
    monkeypatch.setenv("POVFARM_OUTPUT", "got")  # is meant for fetch as well
    assert farm.says("submit", "scene.pov")[0] == "1\n"


# --- looking at jobs

WIDE = "東京の球体アニメーション" * 4


def widest(text: str) -> int:
    """The columns of the longest line: letters of East Asia take two, accents none."""
    return max(sum(2 if "\u1100" <= letter <= "\uffef" else letter != "\u0301" for letter in line)
               for line in text.splitlines())


def test_a_list_of_jobs_keeps_to_80_columns_and_the_ends_of_names(farm: Served) -> None:
    names = ["short", "a name with a beginning and then " + "x" * 60 + " and its end", WIDE,
             "e\u0301" * 60, "two\nlines\x1b[2J\tof it"]
    jobs = [farm.submit(100_000 if name == WIDE else 3, name=name) for name in names]
    farm.scheduler.pause(jobs[0])
    with farm.store.tx() as tx:
        farm.scheduler._states.move_job(tx, tx.job(jobs[0]), povfarm.JobState.CANCELLED, "because of " + WIDE * 3)
    out, _ = farm.says("status")
    lines = out.splitlines()
    assert widest(out) <= 80 and "100000" in out and "\x1b" not in out
    shown = {line.split()[0]: line for line in lines if line[0] not in " j"}
    assert sorted(shown) == ["1", "2", "3", "4", "5"]
    assert "a name with" in shown["2"] and "and its end" in shown["2"] and "..." in shown["2"]
    assert shown["3"].split()[1][:4] == WIDE[:4] and shown["3"].split()[1][-4:] == WIDE[-4:]
    assert "two lines?[2J of it" in shown["5"]
    assert "".join("".join(lines[-5:]).split()).endswith("".join(("because of " + WIDE * 3).split()))


def test_all_about_a_job_is_shown_in_80_columns(farm: Served) -> None:
    name = "y" * 90
    job = farm.submit(3, name=name, files={"scene.pov": b"sphere {}", "a.inc": b"//"},
                      priority=4)
    worker = farm.worker()
    lease = farm.lease(worker)
    farm.fail(worker, lease)
    farm.finish(worker, farm.lease(worker))
    farm.scheduler.pause(job)
    out, _ = farm.says("status", job)
    assert widest(out) <= 80
    facts = {line[:11].strip(): line[11:] for line in out.splitlines() if line[0] != " "}
    assert name in "".join(line[11:] for line in out.splitlines())
    assert facts["state"] == "paused" and facts["reason"] == "paused by hand"
    assert facts["frames"].startswith("1 of 3 done")
    assert facts["owner"] == "admin" and facts["size"] == "4 x 3 pixels, .png"
    assert facts["POV-Ray"] == "3.7.0 (auto)" and facts["files"] == "2, 11 B"
    assert facts["options"].startswith("priority=4 max-workers=0 retries=3 in-order=no")
    assert "Height=3" in facts["command"] and "took" in facts and "CPU time" in facts
    assert {facts[word][:2] for word in ("submitted", "started")} == {"20"}
    assert facts["images"].startswith(str(farm.root)[:40])
    assert facts["get them"] == f"povfarm.py fetch {job}"
    assert facts["go on"] == f"povfarm.py resume {job}"
    assert facts["failure"] == "it broke" and facts["its log"] == f"povfarm.py logs {job} 1"
    place = farm.wire("status", job)["directory"]
    assert (farm.root / place / "out1.png").is_file() or (farm.root / place / "out2.png").is_file()


def test_a_job_that_failed_or_is_paused_is_shown_with_what_to_type(farm: Served) -> None:
    failed, paused = farm.submit(1, retry_limit=1), farm.submit()
    farm.scheduler.pause(paused)
    worker = farm.worker()
    farm.fail(worker, farm.lease(worker))
    lines = [line.strip() for line in farm.says("status")[0].splitlines()]
    assert lines[lines.index("paused by hand:") + 1] == f"povfarm.py resume {paused}"
    assert lines[lines.index("1 frame of 1 failed:") + 1] == f"povfarm.py logs {failed}"
    assert "1 failed" not in lines
    facts = farm.says("status", failed)[0]
    assert "get them" not in facts and "waiting" not in facts
    assert f"\ngo on      povfarm.py retry {failed}\n" in facts


def test_commands_have_lines_of_their_own_and_are_never_broken(
        farm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    job = farm.submit(povray="3.8")
    farm.worker()
    out, _ = farm.says("status", job)
    command = f"povfarm.py set {job} povray=any"
    assert command in [line.strip() for line in out.splitlines()] and widest(out) <= 80
    assert povfarm._beside("", "type 'povfarm.py a', or 'povfarm.py b'").splitlines() == [
        "type", "povfarm.py a", "or", "povfarm.py b"]
    place = "a/" * 50
    monkeypatch.setattr(povfarm, "_command_typed", f"povfarm.py {{}} --data {place}".format)
    for words in ([], [job]):
        lines = [line.strip() for line in farm.says("status", *words)[0].splitlines()]
        assert f"povfarm.py set --data {place} {job} povray=any" in lines


def test_slices_and_written_files_are_counted(farm: Served) -> None:
    view = farm.wire("status", farm.submit(3))
    view.update(slices={"total": 8, "done": 5}, written=2, eta=65.0, rate=0.5)
    text = povfarm._job_facts(view, None)
    assert "5/8 slices" in text and "2 files of the scene's own" in text and "1:05" in text
    assert "images" not in text
    assert "5/8 slices" in povfarm._job_table([view])


def test_several_jobs_are_a_table_and_one_is_not(farm: Served) -> None:
    for _ in range(3):
        farm.submit()
    assert [job["id"] for job in farm.wire("status", "1", "3")] == [1, 3]
    assert [job["id"] for job in farm.wire("status", "2-3")] == [3, 2]
    assert [line[0] for line in farm.says("status", 1, 2)[0].splitlines()] == [*"j1  2  "]


def test_workers_keep_to_80_columns(farm: Served) -> None:
    worker = farm.worker("w" * 100)
    out, _ = farm.says("workers")
    assert widest(out) <= 80 and "  -        192.168.1.5" in out and "www...www" in out
    info = povfarm.WorkerInfo("w" * 100, 1, 0, "", {}, (), "0.2.0")
    farm.scheduler.rejoin(worker, info, "192.168.1.5")
    assert "  0.2.0    192.168.1.5" in farm.says("workers")[0]


# --- logs

def test_the_log_of_a_still_needs_no_frame(farm: Served) -> None:
    rendered(farm, 1)
    assert farm.says("logs", 1) == farm.says("logs", "last", 0)
    assert farm.says("logs", "ball")[0] == "--- frame 0 on anna: done\nrendered\n"
    assert farm.wire("logs", 1) == {"job": 1, "frame": 0, "log": "--- frame 0 on anna: done\nrendered"}


def test_the_error_comes_first(farm: Served) -> None:
    farm.submit(3, retry_limit=1)
    worker = farm.worker()
    farm.finish(worker, farm.lease(worker))
    farm.fail(worker, farm.lease(worker))
    shown, _ = farm.says("logs", 1)
    assert shown == farm.says("logs", 1, 2)[0]
    assert shown.splitlines() == ["it broke", "", "--- frame 2 on anna: failed: it broke", "the log"]
    assert farm.says("logs", 1, 1)[0].startswith("--- frame 1 on anna: done\n")


def test_which_frame_of_many_is_asked(farm: Served) -> None:
    farm.submit(3)
    _, errors = farm.says("logs", 1, code=2)
    assert errors == ["povfarm: job 1 has 3 frames, and none failed: name one, such as "
                      "'povfarm.py logs 1 1'"]
    for frame, code in ((7, 2), ("x", 2), ("-1", 2)):
        out, errors = farm.says("logs", 1, frame, code=code)
        assert out == "" and len(errors) == 1 and str(frame) in errors[0]


def test_an_image_that_came_in_the_end_has_no_error_in_front(farm: Served) -> None:
    farm.submit(1)
    worker = farm.worker()
    farm.fail(worker, farm.lease(worker))
    assert "\nfailure    it broke\n" in farm.says("status", 1)[0]
    farm.finish(worker, farm.lease(worker))
    assert farm.says("logs", 1)[0].startswith("--- frame 0 on anna: failed: it broke\n")
    assert "failure" not in farm.says("status", 1)[0]


def test_tidy_deletes_what_was_fetched_and_names_what_was_not(farm: Served) -> None:
    """Who waits or fetches tells the farm; who may not tell it is not held up by that."""
    jobs = [farm.submit(2, name=name) for name in ("one", "two", "three")]
    farm.render(farm.worker())
    farm.says("fetch", jobs[0])
    reader = povfarm.Client(farm.coordinator.url, "")
    povfarm._note_fetched(reader, jobs[1], [str(task.sha256) for task in farm.tasks(jobs[1])])
    for words in ((), ("--dry-run",), ("--keep", "1d")):
        assert farm.says("tidy", *words)[0].startswith("no job goes: they are kept for ever, or ")
    shown, _ = farm.says("tidy", "--keep", "0s", "--dry-run")
    lines = shown.splitlines()
    assert lines[0].split() == ["job", "name", "state", "ended", "takes"]
    assert lines[1].split()[:3] == ["1", "one", "done"]
    assert re.fullmatch(r"1 job, [\d.]+ k?B would be deleted", lines[2])
    assert lines[3] == ("2 jobs of that age stay, as nobody has fetched all images: "
                        "'povfarm.py fetch 2 3'")
    told = farm.wire("tidy", "--keep=done=0s")
    assert [[job["id"] for job in told[name]] for name in ("jobs", "unfetched")] == [[1], [2, 3]]
    assert [job["id"] for job in farm.wire("status")] == [3, 2]
    assert "takes      " in farm.says("status", 2)[0]
    assert "'soon' is not a time" in farm.says("tidy", "--keep", "soon", code=2)[1][0]
