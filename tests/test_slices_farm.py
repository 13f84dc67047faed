"""One picture on several workers: real processes, real POV-Ray, and its own pixels."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List

import pytest

from helpers.base import run_povray, wait_until
from helpers.farm import (
    HEAVY,
    SMALL,
    STILL,
    Farm,
    farm_fixture,
    project,
    renderers,
    run,
)
from helpers.pictures import rows_of, seams

__all__ = ["farm_fixture"]
pytestmark = pytest.mark.usefixtures("povray", "no_process_is_left")

# Something on every row, and edges for anti-aliasing, at once.
BUSY = STILL.replace("sphere {", "plane { y, -1 pigment { checker rgb 1 rgb 0 } }\nsphere {")
SIZE = ["+W64", "+H96"]
# For HEAVY: enough to be stopped in the middle of it on any computer, see `hold`.
LONG = ["+W128", "+H128", "+A0.02", "+R7"]
PIXELS = 128 * 128


def pictures(farm: Farm, job: int) -> Dict[str, List[bytes]]:
    """Return every finished picture of a job from the coordinator's directory."""
    place = next((farm.tmp_path / "farm" / "jobs").glob(f"{job}-*"))
    return {path.name: rows_of(path) for path in place.iterdir() if path.is_file()}


def plain(place: Path, *args: str) -> Dict[str, List[bytes]]:
    """Return what plain POV-Ray makes of a scene in a directory of its own."""
    place.mkdir()
    for path in place.parent.glob("project/*"):
        shutil.copy(path, place)
    before = set(place.iterdir())
    result = run_povray(list(args), place)
    assert result.returncode == 0, result.stderr[-2000:]
    return {path.name: rows_of(path) for path in place.iterdir() if path not in before}


@pytest.fixture(scope="module", name="heavy")
def heavy_fixture(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, List[bytes]]:
    """The heavy scene as plain POV-Ray renders it."""
    place = tmp_path_factory.mktemp("heavy")
    project(place, HEAVY)
    return plain(place / "plain", "scene.pov", *LONG)


def frames_of(farm: Farm, job: int) -> List[Dict[str, Any]]:
    frames: List[Dict[str, Any]] = farm.client.request(
        "GET", f"/api/v1/jobs/{job}/frames").json()["frames"]
    return frames


def attempts_of(farm: Farm, job: int, frame: int = 0) -> List[str]:
    """Return what was tried of a frame, as its log says it: the heading and the text of each."""
    text = farm.client.request("GET", f"/api/v1/jobs/{job}/frames/{frame}/log").body.decode()
    return re.split(r"^--- ", text, flags=re.MULTILINE)[1:]


def hold(place: Path, share: float) -> int:
    """Stop POV-Ray where a share of the picture is finished; return its number.

    Its state file tells how far it is, and a fast one gets no more than some milliseconds
    between two looks.
    """
    pid = int(wait_until(lambda: renderers(place), "nothing is rendered")[0])
    state = Path(os.readlink(f"/proc/{pid}/cwd")) / "scene.pov-state"
    end = time.monotonic() + 300
    while not state.exists() or state.stat().st_size < 20 * share * PIXELS:
        assert time.monotonic() < end, "it does not get on"
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.002)
        os.kill(pid, signal.SIGSTOP)
    return pid


def two_workers(farm: Farm) -> List["subprocess.Popen[str]"]:
    workers = [farm.work("--cores", "1", "--worker-name", name) for name in ("anna", "bert")]
    wait_until(lambda: farm.client.request("GET", "/api/v1/farm").json()["workers"] == 2,
               "the workers do not come")
    return workers


def test_slices_of_two_workers_are_povrays_own_pixels(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, BUSY)
    asked = [["+A0.3"], ["+A0.3", "+AM1", "+FP"], ["+A0.3", "+AM2", "+KFF3"],
             ["+A0.3", "+SR21", "+ER90"], ["+SC0.3", "+EC50", "+SR0.5"]]
    workers = two_workers(farm)
    jobs = [farm.submit(place, "scene.pov", *SIZE, *args, "--slices", "3") for args in asked]
    with ThreadPoolExecutor(len(asked)) as pool:  # POV-Ray sleeps most of the time
        expected = list(pool.map(lambda job, args: plain(
            tmp_path / f"plain{job}", "scene.pov", *SIZE, *args), jobs, asked))
    for job, args, pictures_of_povray in zip(jobs, asked, expected):
        farm.finished(job)
        for frame in frames_of(farm, job):
            tried = attempts_of(farm, job, frame["frame"])
            assert len(tried) == 3 and all("Trace Time" in text for text in tried)
        assert pictures(farm, job) == pictures_of_povray, args
    assert list((tmp_path / "farm" / "jobs").glob("*/parts/*")) == []
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    said = [worker.communicate()[0].strip().rpartition("\n")[2] for worker in workers]
    slices = [re.fullmatch("povfarm: rendered ([0-9]+) slices?", line) for line in said]
    assert sum(int(found[1]) for found in slices if found) >= 21 and all(slices), said
    farm.check()


def test_slices_with_radiosity_have_no_seams(farm: Farm, examples: Path) -> None:
    two_workers(farm)
    job = farm.submit(examples / "animations/raddem", "raddem.pov", "+W320", "+H240", "+A0.3",
                      "+FP", "--slices", "4")
    farm.finished(job, 200)
    [rows] = pictures(farm, job).values()
    assert max(seams(rows, [0, 64, 128, 192])) <= 1.15
    farm.check()


MENTIONED = "#if (0) global_settings { radiosity { count 5 } } #end"
RADIOSITY = "global_settings { radiosity { pretrace_end 0.04 count 5 } }"


@pytest.mark.parametrize(("more", "moves"), [
    ("", True), (MENTIONED, True), (RADIOSITY, False),
    (RADIOSITY.replace("pretrace_end 0.04", "pretrace_start 1 pretrace_end 1"), False),
])
def test_a_render_that_is_stopped_moves_to_another_worker(
        farm: Farm, tmp_path: Path, heavy: Dict[str, List[bytes]], more: str, moves: bool) -> None:
    first = farm.work("--cores", "1", "--worker-name", "anna")
    job = farm.submit(project(tmp_path, HEAVY + more), "scene.pov", *LONG)
    hold(tmp_path, 0.33 if moves else 0.05)
    first.send_signal(signal.SIGINT)
    assert first.stdout is not None
    while "stopping" not in first.stdout.readline():  # or two signals may be one
        assert first.poll() is None
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    assert not renderers(tmp_path) and farm.job(job)["frames"]["queued"] == 1
    if not moves:  # it begins anew: nothing was left
        assert list((tmp_path / "farm" / "jobs").glob("*/parts/*")) == []
        return
    farm.work("--cores", "1", "--worker-name", "bert")
    farm.finished(job, 120)
    assert pictures(farm, job) == heavy
    moved, last = attempts_of(farm, job)
    assert "on anna: released" in moved and "on bert: done" in last
    count = re.search(r"^Pixels: +(\d+)", last, re.MULTILINE)
    assert count and 0 < int(count[1]) < 0.7 * PIXELS  # the rest came from where it was stopped
    farm.check()


def test_what_is_paused_moves_what_is_drained_is_finished_and_both_stay(
        farm: Farm, tmp_path: Path, heavy: Dict[str, List[bytes]]) -> None:
    def reasons() -> Dict[str, str]:
        views = farm.client.request("GET", "/api/v1/workers").json()["workers"]
        return {view["name"]: f"{view['state']}: {view.get('reason')}" for view in views}

    anna = farm.work("--cores", "1", "--worker-name", "anna")
    job = farm.submit(project(tmp_path, HEAVY), "scene.pov", *LONG)
    hold(tmp_path, 0.33)
    said = run(tmp_path, "workers", "pause", "anna", cwd=tmp_path).stderr
    assert "anna is paused, and its renders go to others: it gets no more until" in said
    wait_until(lambda: farm.job(job)["frames"]["queued"] == 1, "it keeps its render", 10)
    assert not renderers(tmp_path) and anna.poll() is None
    assert farm.job(job)["waiting_for"] == "anna rests: paused by hand"
    assert reasons() == {"anna": "resting: paused by hand"}
    bert = farm.work("--cores", "1", "--worker-name", "bert")
    held = hold(tmp_path, 0.4)
    bert.send_signal(signal.SIGUSR2)
    os.kill(held, signal.SIGCONT)
    farm.finished(job, 120)
    moved, last = attempts_of(farm, job)
    assert "on anna: released" in moved and "on bert: done" in last
    count = re.search(r"^Pixels: +(\d+)", last, re.MULTILINE)
    assert count and 0 < int(count[1]) < 0.7 * PIXELS and pictures(farm, job) == heavy
    wait_until(lambda: reasons()["bert"] == "resting: drained on this computer", "it forgot", 10)
    job = farm.submit(project(tmp_path), "scene.pov", *SMALL)
    assert "anna rests, as 1 more: paused by hand" in run(tmp_path, "status", cwd=tmp_path).stdout
    assert run(tmp_path, "workers", "resume", "anna", cwd=tmp_path).returncode == 0
    farm.finished(job)
    bert.send_signal(signal.SIGCONT)
    wait_until(lambda: reasons() == {"anna": "idle: None", "bert": "idle: None"}, "no end", 10)
    assert "on anna: done" in attempts_of(farm, job)[0]
    farm.check()


def test_a_frame_under_way_is_divided_when_a_second_worker_comes(
        farm: Farm, tmp_path: Path, heavy: Dict[str, List[bytes]]) -> None:
    farm.work("--cores", "1", "--worker-name", "anna")
    job = farm.submit(project(tmp_path, HEAVY), "scene.pov", *LONG)
    slow = hold(tmp_path, 0.2)
    farm.work("--cores", "1", "--worker-name", "bert")
    wait_until(lambda: len(renderers(tmp_path)) == 2, "the rest is not given to bert", 120)
    os.kill(slow, signal.SIGCONT)
    farm.finished(job, 300)
    tried = attempts_of(farm, job)
    assert re.match("frame 0, rows 0 to .* on anna: done", tried[0])
    assert re.match("frame 0, rows .* to 127 on bert: done", tried[1]), tried
    assert pictures(farm, job) == heavy
    farm.check()


@pytest.mark.parametrize("option", ["+FJ", "--in-order"])
def test_what_cannot_be_sliced_is_told_in_one_line(farm: Farm, tmp_path: Path, option: str) -> None:
    with pytest.raises(AssertionError, match="cannot be sliced"):
        farm.submit(project(tmp_path), "scene.pov", option, "+KFF2", *SIZE, "--slices", "3")
