"""What a farm deletes by itself, what it never does, and images that go to a directory by themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest

import povfarm
from helpers import farm_in_a_box
from helpers.base import wait_until
from helpers.farm import SMALL, STILL, run
from helpers.farm import Farm as Processes
from helpers.farm_in_a_box import Farm
from helpers.pictures import png
from povfarm import Deliverer, Keeping, UserError
from tools.year import grown, year

farm_fixture = farm_in_a_box.farm_fixture  # what each test is given
DAY = 86400.0


def made(farm: Farm, frames: int = 2, name: str = "ball") -> int:
    job = farm.submit(frames, name=name)
    farm.render(farm.worker())
    assert farm.state(job) == "done"
    return job


def there(farm: Farm) -> Set[int]:
    with farm.store.read() as look:
        return {job.id for job in look.jobs(0, -1)}


def hashes(farm: Farm, job: int) -> List[str]:
    return [str(task.sha256) for task in farm.tasks(job)]


# --- retention

@pytest.mark.parametrize("text, value", [
    ("30d", Keeping(30 * DAY, 30 * DAY, 30 * DAY)),
    ("done=1d12h, logs=7d", Keeping(done=1.5 * DAY, logs=7 * DAY)),
    ("unfetched=90d,blobs=1h,events=1d", Keeping(unfetched=90 * DAY, blobs=3600, events=DAY)),
])
def test_what_is_kept_is_one_option(text: str, value: Keeping) -> None:
    assert Keeping.of(text) == value


@pytest.mark.parametrize("text, words", [
    ("ever", "'ever' is not a time"), ("active=3d", "'active' is not one of done, failed, cancelled, "
     "unfetched, logs, blobs, events"), ("done=", "'' is not a time"), ("", "'' is not a time"),
])
def test_a_bad_time_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        povfarm.setting("keep").parse(text, "--keep")


def test_nothing_goes_unless_it_is_told(farm: Farm) -> None:
    job = made(farm)
    farm.scheduler.fetched(job, hashes(farm, job))
    farm.clock.advance(10_000 * DAY)
    farm.scheduler.tidy()
    assert there(farm) == {job} and len(list(farm.root.glob("jobs/*/*.png"))) == 2


def test_jobs_go_by_their_state_and_age_and_only_when_all_images_were_fetched(farm: Farm) -> None:
    """A viewer, a wrong hash or half of the images do not count; an image that changed does not."""
    fetched, half, never, again = (made(farm, name=name) for name in ("one", "two", "three", "four"))
    active = farm.submit(5)
    farm.scheduler.pause(active)
    cancelled = farm.submit(2)
    farm.scheduler.cancel(cancelled)
    with pytest.raises(povfarm.NotYours):
        farm.scheduler.fetched(never, hashes(farm, never), "anna")
    farm.scheduler.fetched(fetched, hashes(farm, fetched))
    farm.scheduler.fetched(half, [hashes(farm, half)[0], "0" * 64, *hashes(farm, never)])
    farm.scheduler.fetched(again, hashes(farm, again))
    farm.scheduler.again(again, "1")
    farm.finish(farm.worker(), farm.lease(farm.worker(), idle=0), image=png(99))
    keeping = Keeping.of("done=30d,cancelled=40d")
    farm.clock.advance(30 * DAY - 1)
    farm.scheduler.tidy(keeping)
    assert there(farm) == {fetched, half, never, again, active, cancelled}
    farm.clock.advance(2)
    gone, waiting = farm.scheduler.overdue(keeping)
    assert ([job.id for job in gone], [job.id for job in waiting]) == (
        [fetched], [half, never, again])
    farm.scheduler.tidy(keeping)
    assert there(farm) == {half, never, again, active, cancelled}
    assert not list(farm.root.glob("jobs/*-one"))
    farm.clock.advance(10 * DAY)
    farm.scheduler.tidy(keeping)
    assert there(farm) == {half, never, again, active}
    farm.scheduler.tidy(keeping._replace(unfetched=39 * DAY))
    assert there(farm) == {active}


def test_a_job_that_is_rendered_again_meanwhile_stays(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    job = made(farm)
    farm.scheduler.fetched(job, hashes(farm, job))
    farm.clock.advance(2 * DAY)
    overdue = farm.scheduler.overdue
    monkeypatch.setattr(farm.scheduler, "overdue", lambda keeping: (
        overdue(keeping), farm.scheduler.again(job, "1"))[0])
    farm.scheduler.tidy(Keeping.of("1d"))
    assert there(farm) == {job} and farm.state(job) == "active"


def test_logs_and_events_go_by_themselves(farm: Farm) -> None:
    """A job without its logs is as whole as before: its frames have an empty one."""
    job = made(farm)
    log = f"/api/v1/jobs/{job}/frames/1/log?plain"
    assert farm.ask("GET", log).body == b"rendered"
    farm.clock.advance(8 * DAY)
    farm.submit(1)
    farm.scheduler.tidy(Keeping.of("logs=7d,events=7d"))
    assert farm.ask("GET", log).body == b"" and farm.ask("GET", log).status == 200
    assert len(list(farm.root.glob("jobs/*/*.png"))) == 2
    with farm.store.read() as look:
        assert {event.job for event in look.events(0, 1000)} == {job + 1}


def test_who_has_the_farm_key_tidies_by_hand_and_fetching_is_told_by_the_owner(farm: Farm) -> None:
    one, two = made(farm), made(farm)
    told = {"images": hashes(farm, one)}
    assert farm.ask("POST", f"/api/v1/jobs/{one}/fetched", key=None, json_body=told).status == 401
    assert farm.ask("POST", f"/api/v1/jobs/{one}/fetched", json_body=told).status == 204
    assert farm.ask("POST", f"/api/v1/jobs/{one}/fetched", json_body={"images": 7}).status == 400
    assert farm.ask("POST", "/api/v1/jobs/99/fetched", json_body=told).status == 404
    farm.clock.advance(2 * DAY)
    bad = farm.ask("POST", "/api/v1/tidy", json_body={"keep": "soon", "dry": True})
    assert bad.status == 400 and "'soon' is not a time" in bad.json()["error"]
    assert farm.ask("POST", "/api/v1/tidy", key=None, json_body={"keep": "1d"}).status == 401
    assert farm.ask("POST", "/api/v1/tidy", json_body={"dry": False}).json() == {"jobs": [], "unfetched": []}
    for dry, left in ((True, {one, two}), (False, {two})):
        said = farm.ask("POST", "/api/v1/tidy", json_body={"keep": "1d", "dry": dry}).json()
        assert [job["id"] for job in said["jobs"]] == [one] and said["jobs"][0]["kept"] > 0
        assert [job["id"] for job in said["unfetched"]] == [two]
        assert there(farm) == left


# --- delivery

@contextlib.contextmanager
def delivering(farm: Farm, to: Path) -> Iterator[Deliverer]:
    deliverer = Deliverer(to, farm.scheduler, "f" * 16)
    deliverer.start()
    try:
        yield deliverer
    finally:
        deliverer.stop()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "DELIVERY_LOOK", 0.02)
    monkeypatch.setattr(povfarm, "DELIVERY_PAUSE", 0.05)


def due(farm: Farm) -> int:
    with farm.store.read() as look:
        return len(look.due(0, 0, 1000))


def files(place: Path) -> List[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*")
                  if path.is_file() and not path.name.startswith("."))


def same(farm: Farm, job: int, place: Path) -> bool:
    """What was delivered of a job is what the farm has."""
    folder = farm.store.job_directory(job, farm.job(job).name)
    return all((place / folder.name / task.name).read_bytes() == (folder / task.name).read_bytes()
               for task in farm.tasks(job))


def test_images_are_delivered_as_they_come_and_jobs_are_not_mixed(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more at once than are noted together; and the delivered go when their time has come."""
    monkeypatch.setattr(povfarm, "DELIVERIES", 2)
    old = os.umask(0o077)  # as ``serve`` has it
    to = tmp_path / "drive"
    to.mkdir()
    to.chmod(0o755)
    with delivering(farm, to):
        first, second = made(farm, 5), made(farm, 2, name="../../a b\n$(x)")
        wait_until(lambda: not due(farm))
        os.umask(old)
        assert files(to) == [*(f"1-ball/out{number}.png" for number in range(1, 6)),
                             "2-a-b-x/out1.png", "2-a-b-x/out2.png"]
        assert same(farm, first, to) and same(farm, second, to)
        assert (to / "1-ball").stat().st_mode & 0o777 == 0o755
        assert (to / "1-ball/out1.png").stat().st_mode & 0o777 == 0o644
        farm.scheduler.again(first, "3")
        farm.finish(farm.worker(), farm.lease(farm.worker(), idle=0), image=png(77))
        wait_until(lambda: not due(farm))
        assert same(farm, first, to) and len(files(to)) == 7
    farm.clock.advance(2 * DAY)
    farm.scheduler.tidy(Keeping.of("1d"))
    assert there(farm) == set() and len(files(to)) == 7


def test_what_is_there_and_links_are_left_alone(farm: Farm, tmp_path: Path) -> None:
    to, other = tmp_path / "drive", tmp_path / "other"
    (to / "1-ball").mkdir(parents=True)
    other.mkdir()
    (to / "1-ball/out1.png").write_bytes(b"mine")
    (to / "2-ball").symlink_to(other)
    with delivering(farm, to) as deliverer:
        one, two = made(farm, 2), made(farm, 1)
        third = made(farm, 1, name="next")
        wait_until(lambda: due(farm) == 1)
        assert (to / "1-ball/out1.png").read_bytes() == b"mine"
        assert (to / f"1-ball/out1-{hashes(farm, one)[0][:8]}.png").read_bytes() == (
            farm.root / "jobs/1-ball/out1.png").read_bytes()
        assert same(farm, third, to) and not list(other.iterdir())
        wait_until(lambda: "is a link" in deliverer._problem)
        (to / "2-ball").unlink()
        wait_until(lambda: not due(farm))
    assert same(farm, two, to)


@pytest.mark.skipif(sys.platform != "linux", reason="the system cannot hold a directory so")
@pytest.mark.parametrize("what", ["the new file", "a directory above it"])
def test_no_rights_are_changed_of_what_another_program_puts_there_meanwhile(
        what: str, farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in the place of the file; or the directory is moved to where others lie above it."""
    to, secret, has_hash = tmp_path / "drive", tmp_path / "secret", povfarm.has_hash
    for place, mode in ((to, 0o777), (secret, 0o700)):
        place.mkdir()
        place.chmod(mode)

    def swapped(path: Path, *more: Any) -> bool:
        found = has_hash(path, *more)
        if path.name.endswith(".part") and found:
            if what == "the new file":
                path.unlink()
                path.symlink_to(secret)
            elif (to / "1-ball/a").exists():
                (to / "1-ball/a").rename(secret / "a")
        return found

    monkeypatch.setattr(povfarm, "has_hash", swapped)
    worker = farm.worker()
    farm.submit(1, uses=("own-files",))
    farm.finish(worker, farm.lease(worker), written={"a/b.txt": b"text"})
    with delivering(farm, to), contextlib.suppress(OSError):
        wait_until(lambda: not due(farm))
    assert secret.stat().st_mode & 0o777 == 0o700


SWAPPER = """  # what is below a directory are links into another one, again and again
import os, sys, itertools
place, mine = sys.argv[1:]
os.chdir(place)
for number in itertools.count():
    for folder, folders, names in os.walk("."):
        for one in [os.path.join(folder, name) for name in folders + names]:
            try:
                if one.endswith(".part"):
                    os.unlink(one)
                    os.symlink(os.path.join(mine, "secret"), one)
                elif os.path.isdir(one) and not one.endswith("~"):
                    os.rename(one, one + "~")
                    os.symlink(mine, one)
                    os.unlink(one)
                    os.rename(one + "~", one)
            except OSError:
                pass
    if number % 50 == 0:
        print("swapped", flush=True)
"""


@contextlib.contextmanager
def swapping(place: Path, mine: Path) -> Iterator[Any]:
    """Another program does that meanwhile; give what it says of it."""
    with subprocess.Popen([sys.executable, "-c", SWAPPER, str(place), str(mine)],
                          stdout=subprocess.PIPE) as process:
        try:
            yield process.stdout
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system cannot hold a directory so")
def test_a_program_that_swaps_links_all_the_time_gets_nothing_put_or_changed_elsewhere(
        tmp_path: Path) -> None:
    farm, mine = Farm(tmp_path / "farm"), tmp_path / "mine"
    worker = farm.worker()
    for place in (mine, tmp_path / "drive", tmp_path / "fetched"):
        place.mkdir()
        place.chmod(0o700)
    (mine / "secret").write_bytes(b"mine")
    (mine / "secret").chmod(0o600)
    job = farm.submit(30, uses=("own-files",), batch=1)
    for number in range(30):
        farm.finish(worker, farm.lease(worker), written={f"a/b/{number}.txt": b"deep"})
    farm.close()
    (farm.root / "povfarm.ini").write_text(f"[povfarm]\ndeliver = {tmp_path / 'drive'}\n")
    served = Processes(tmp_path)
    try:
        for place in ("drive", "fetched"):
            with swapping(tmp_path / place, mine) as swaps:
                for _ in range(3):
                    swaps.readline()
                    if place == "fetched":
                        run(tmp_path, "fetch", str(job), "--output", place, cwd=tmp_path)
    finally:
        served.close()
    assert [path.name for path in mine.iterdir()] == ["secret"]
    assert (mine / "secret").read_bytes() == b"mine"
    assert [path.stat().st_mode & 0o777 for path in (mine, mine / "secret")] == [0o700, 0o600]


def test_a_pipe_in_the_place_of_an_image_holds_nobody_up(farm: Farm, tmp_path: Path) -> None:
    to = tmp_path / "drive"
    (to / "1-ball").mkdir(parents=True)
    os.mkfifo(to / "1-ball/out1.png")
    job = made(farm, 2)
    with delivering(farm, to):
        wait_until(lambda: not due(farm))
    assert (to / "1-ball/out1.png").is_fifo() and (to / "1-ball/out2.png").is_file()
    assert (to / f"1-ball/out1-{hashes(farm, job)[0][:8]}.png").is_file()


def test_what_the_scene_wrote_is_delivered_with_its_frame(farm: Farm, tmp_path: Path) -> None:
    """What it appends to grows there; what is of another stays, and a bad place keeps all waiting."""
    def frame(number: int, texts: Dict[str, bytes]) -> None:
        farm.finish(worker, farm.lease(worker), image=png(number), written=texts)

    to, old = tmp_path / "drive", os.umask(0o077)  # as ``serve`` has it
    to.mkdir()
    to.chmod(0o755)
    (to / "1-ball").mkdir()
    (to / "1-ball/mine.txt").write_bytes(b"mine")
    (to / "1-ball/bad").symlink_to(tmp_path)
    worker, job = farm.worker(), farm.submit(4, uses=("own-files",), batch=1)
    with delivering(farm, to) as deliverer:
        frame(1, {"log.txt": b"1", "mine.txt": b"theirs", "a/b/c.txt": b"deep"})
        wait_until(lambda: not due(farm))
        frame(2, {"log.txt": b"12"})
        wait_until(lambda: not due(farm))
        place = to / "1-ball"
        assert [path for path in files(place) if "out" not in path] == [
            "a/b/c.txt", "log.txt", f"mine-{hashlib.sha256(b'theirs').hexdigest()[:8]}.txt", "mine.txt"]
        assert (place / "log.txt").read_bytes() == b"12" and (place / "mine.txt").read_bytes() == b"mine"
        assert (place / "a").stat().st_mode & 0o777 == (place / "a/b").stat().st_mode & 0o777 == 0o755
        frame(3, {"log.txt": b"123", "bad/x.txt": b"out", "PovRay.INI": b""})
        wait_until(lambda: "is a link" in deliverer._problem
                   and (place / "log.txt").read_bytes() == b"123")
        assert due(farm) == 2 and not (tmp_path / "x.txt").exists()
        (place / "bad").unlink()
        frame(4, {})
        wait_until(lambda: not due(farm))
    os.umask(old)
    assert (place / "bad/x.txt").read_bytes() == b"out" and farm.state(job) == "done"
    assert not (place / "PovRay.INI").exists()  # which POV-Ray would obey


def test_a_drive_that_is_away_or_full_gets_its_images_later(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is written in its place, nothing is left half, and nothing of it is deleted."""
    to, away = tmp_path / "drive", tmp_path / "away"
    to.mkdir()
    copy = shutil.copyfileobj

    def full(source: Any, part: Any) -> None:
        part.write(b"half")
        raise OSError(28, "No space left on device")

    with delivering(farm, to):
        made(farm)
        wait_until(lambda: not due(farm))
        to.rename(away)
        to.mkdir()  # where the drive was mounted
        second = made(farm)
        wait_until(lambda: "is not what it was: mount it" in caplog.text)
        farm.scheduler.fetched(second, hashes(farm, second))  # does not count here
        farm.clock.advance(2 * DAY)
        farm.scheduler.tidy(Keeping.of("1d"))
        assert there(farm) == {second} and not list(to.iterdir())
        monkeypatch.setattr(shutil, "copyfileobj", full)
        to.rmdir()
        away.rename(to)
        wait_until(lambda: "No space left on device" in caplog.text)
        assert due(farm) == 2 and not list(to.glob("*/.*.part"))
        monkeypatch.setattr(shutil, "copyfileobj", copy)
        wait_until(lambda: not due(farm))
        assert same(farm, second, to)
        wait_until(lambda: "again" in caplog.text)
    with farm.store.read() as look:
        said = [event.text for event in look.events(0, 1000) if event.what == "not delivered"]
    assert len(said) == 2 and "mount it" in said[0] and "No space" in said[1]


def test_a_farm_delivers_after_a_restart_what_is_missing_and_starts_without_its_drive(
        farm: Farm, tmp_path: Path) -> None:
    to = tmp_path / "drive"
    with pytest.raises(UserError, match="there is no directory"):
        Deliverer(to, farm.scheduler, "f" * 16)
    to.mkdir()
    old = made(farm)
    with delivering(farm, to):
        wait_until(lambda: not due(farm))
    new = made(farm)
    shutil.rmtree(to)
    with delivering(farm, to) as deliverer:
        wait_until(lambda: "mount it" in deliverer._problem)
        to.mkdir()
        (to / f".povfarm-{'f' * 16}").touch()
        wait_until(lambda: not due(farm))
    assert same(farm, new, to) and not (to / f"{old}-ball").exists()


def test_an_image_that_changes_while_it_is_copied_is_copied_again(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, wrong = shutil.copyfileobj, [b"another", b"another"]

    def changing(source: Any, part: Any) -> Any:
        return part.write(wrong.pop()) if wrong else copy(source, part)

    monkeypatch.setattr(shutil, "copyfileobj", changing)
    with delivering(farm, tmp_path):
        job = made(farm, 1)
        wait_until(lambda: not due(farm))
    image = (tmp_path / f"{job}-ball/out.png").read_bytes()
    assert hashlib.sha256(image).hexdigest() == hashes(farm, job)[0] and not wrong


# --- real processes

def test_a_farm_delivers_tells_and_tidies(povray: str, tmp_path: Path) -> None:
    """As somebody has it: a settings file, a drive, a worker that is killed, jobs that go."""
    drive, mails = tmp_path / "drive", tmp_path / "mails"
    for place in (drive, tmp_path / "farm", tmp_path / "scene"):
        place.mkdir()
    (tmp_path / "scene" / "scene.pov").write_text(
        STILL + '#fopen F concat("at", str(frame_number, 0, 0), ".txt") write\n#write(F, clock)\n')
    (tmp_path / "farm" / "povfarm.ini").write_text(
        f"[povfarm]\ndeliver = {drive}\n[hooks]\ndone, lost = tee -a {mails}\n")
    farm = Processes(tmp_path, lease_time="2s")
    worker = farm.work("--worker-name", "attic")
    job = farm.submit(tmp_path / "scene", "scene.pov", *SMALL, "+KFF3", "--name", "film")
    farm.finished(job)
    found = wait_until(lambda: len(files(drive)) == 6 and files(drive))
    images = [f"{job}-film/scene{number}.png" for number in (1, 2, 3)]
    texts = [f"{job}-film/{name}.txt" for name in ("at1", "at2", "at3")]
    assert found == sorted(images + texts) and (drive / texts[1]).read_text() == "0.5"
    for image in images:
        assert (drive / image).read_bytes() == (tmp_path / "farm/jobs" / image).read_bytes()
    worker.kill()
    told = wait_until(lambda: mails.exists() and (text := mails.read_text()).count("}{") and text)
    done, lost = (json.loads(part) for part in told.replace("}{", "}\n{").splitlines())
    assert (done["event"], done["job"]["name"], done["job"]["frames"]["done"]) == ("done", "film", 3)
    assert (lost["event"], lost["worker"]) == ("lost", "attic")
    shown = run(tmp_path, "tidy", "--keep", "1s", "--dry-run", cwd=tmp_path)
    assert shown.stdout.splitlines()[0].split() == ["job", "name", "state", "ended", "takes"]
    assert shown.stdout.splitlines()[-1].startswith("1 job, ") and "would be deleted" in shown.stdout
    assert farm.job(job)["kept"] > 0
    farm.client.request("POST", "/api/v1/tidy", json={"keep": "1s", "dry": False})
    assert len(files(drive)) == 6 and not list((tmp_path / "farm" / "jobs").iterdir())
    farm.check()


@pytest.mark.slow
def test_half_a_year_of_a_farm_takes_no_more_than_its_second_month(tmp_path: Path) -> None:
    """The short form of ``tests/tools/year.py``: rows, files, bytes and memory, and the data whole."""
    months = year(tmp_path / "data", 180, 180)
    assert len(months) == 6 and months[-1].jobs > 5
    assert grown(months) == []
