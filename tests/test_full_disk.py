"""Full disks, of the coordinator and of workers: nothing is lost, and all goes on with room."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Sequence

import pytest

import povfarm
from helpers import slices
from helpers.base import wait_until
from helpers.farm import Farm as RealFarm
from helpers.farm import project, run
from helpers.farm_in_a_box import SCENE, Farm, farm_fixture, manifest, pov_job, sha256
from helpers.pictures import png
from povfarm import JobOptions, NoRoom

__all__ = ["farm_fixture"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 160 MB, which takes no memory until it is filled."""
    place = tmp_path / "small"
    place.mkdir()
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "none", str(place)],
                            capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"only root can make a small disk: {result.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> None:
    """Fill a disk so that so many bytes are left."""
    with open(place / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(place).free - leave)


def test_a_farm_whose_disk_fills_up_goes_on_when_there_is_room(
        povray: str, small_disk: Path, tmp_path: Path) -> None:
    """Each frame takes 1.5 MB and is rendered once."""
    (small_disk / "farm").mkdir()
    (tmp_path / "farm").symlink_to(small_disk / "farm")
    farm = RealFarm(tmp_path)
    try:
        place = project(tmp_path)
        size = ["+W700", "+H700", "+FP", "+KFF8"]
        job = farm.submit(place, "scene.pov", *size)
        farm.work("--cores", "2", "--data", str(tmp_path / "worker"), "--server",
                  farm.client.base_url, "--key", farm.client.token)
        wait_until(lambda: farm.job(job)["frames"]["done"] >= 1, "nothing is rendered")
        fill(small_disk, povfarm.LEFT_FREE + 1_000_000)
        wait_until(lambda: farm.job(job)["notice"], "the full disk is not told")
        assert "make room" in run(tmp_path, "status", cwd=tmp_path).stderr
        refused = run(tmp_path, "submit", "scene.pov", "+W4", "+H3", cwd=place)
        assert refused.returncode == 1 and "make room" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        (small_disk / "ballast").unlink()
        assert farm.finished(job)["state"] == "done"
        frames = farm.client.request("GET", f"/api/v1/jobs/{job}/frames").json()["frames"]
        logs = [farm.client.request("GET", f"/api/v1/jobs/{job}/frames/{frame['frame']}/log")
                .body.count(b"--- frame") for frame in frames]
        assert logs == [1] * 8 and {frame["tries"] for frame in frames} == {0}
        farm.check()
    finally:
        farm.close()


def test_a_worker_whose_disk_is_full_waits_and_the_scene_is_not_blamed(
        povray: str, small_disk: Path, tmp_path: Path) -> None:
    farm = RealFarm(tmp_path)
    try:
        fill(small_disk, povfarm.LEFT_FREE + 1_000_000)  # room for the project, not for a picture
        job = farm.submit(project(tmp_path), "scene.pov", "+W800", "+H600", "+FP", "+KFF2")
        worker = farm.work("--data", str(small_disk / "worker"), "--server",
                           farm.client.base_url, "--key", farm.client.token)
        assert worker.stdout is not None
        lines = iter(worker.stdout.readline, "")
        assert any("the disk is full or cannot be written: make room" in line for line in lines)
        assert farm.job(job)["frames"]["failed"] == 0
        (small_disk / "ballast").unlink()
        assert farm.finished(job)["state"] == "done"
        frames = farm.client.request("GET", f"/api/v1/jobs/{job}/frames").json()["frames"]
        assert {frame["tries"] for frame in frames} == {0}
        farm.check()
    finally:
        farm.close()


@pytest.mark.slow
def test_a_data_directory_that_cannot_be_written_is_told_in_one_line(
        small_disk: Path, tmp_path: Path) -> None:
    povfarm.Coordinator(small_disk / "farm", bind="127.0.0.1").stop()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    for data in ("farm", "new"):
        result = run(tmp_path, "serve", "--data", str(small_disk / data), "--port", "0",
                     cwd=tmp_path)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        assert str(small_disk / data) in result.stderr and "ead-only" in result.stderr
    assert {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()} == before


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


class Disk:
    """A disk that has ``free`` bytes, as far as anybody asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 40
        monkeypatch.setattr(povfarm.shutil, "disk_usage", lambda _: Usage(1 << 41, 0, self.free))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def deliver(farm: Farm, worker_token: str, lease: Any) -> Any:
    task = lease.tasks[0]
    return farm.ask("PUT", f"/api/v1/leases/{lease.id}/tasks/{task.id}?log=8", key=worker_token,
                    body=b"rendered" + png(task.id))


def test_an_image_for_which_there_is_no_room_is_refused_with_507(farm: Farm, disk: Disk) -> None:
    worker, job = farm.worker("anna"), farm.submit(frames=2)
    lease = farm.lease(worker)
    disk.free = povfarm.LEFT_FREE + 10
    answer = deliver(farm, "#1:anna", lease)
    assert answer.status == 507 and "make room" in answer.json()["error"]
    assert "\n" not in answer.json()["error"] and str(farm.root) not in answer.json()["error"]
    assert farm.states(job) == ["leased", "queued"] and farm.problems() == []
    assert farm.ask("GET", "/api/v1/farm").json()["notice"] == answer.json()["error"]
    assert farm.ask("GET", f"/api/v1/jobs/{job}").json()["notice"] == answer.json()["error"]
    assert farm.leases(worker) == []  # nothing is rendered that could not be stored
    farm.scheduler.look_for_room()
    assert farm.leases(worker) == []
    assert farm.beat(worker, lease) == []  # what is rendered already stays its worker's
    disk.free = 1 << 30
    farm.scheduler.look_for_room()
    assert farm.ask("GET", "/api/v1/farm").json()["notice"] == ""
    assert deliver(farm, "#1:anna", lease).json() == {"accepted": True}
    assert farm.render(worker) == [2]


def test_nothing_is_given_out_before_the_disk_is_full_to_the_brim(farm: Farm, disk: Disk) -> None:
    worker, job = farm.worker(), farm.submit(frames=1)
    disk.free = povfarm.LEFT_FREE - 1
    farm.scheduler.look_for_room()
    assert farm.leases(worker) == []
    farm.scheduler.delete(job)  # for which the room is left
    disk.free = 3 * povfarm.LEFT_FREE
    farm.scheduler.look_for_room()
    assert farm.store.notice == ""


def test_a_waiting_worker_gets_work_as_soon_as_there_is_room(farm: Farm, disk: Disk) -> None:
    worker = farm.worker()
    farm.submit(frames=1)
    disk.free = 0
    farm.scheduler.look_for_room()

    def make_room() -> None:
        disk.free = 1 << 30
        farm.scheduler.look_for_room()

    farm.clock.meanwhile.append(make_room)
    start = farm.clock.mono
    lease = farm.lease(worker, wait=25.0)
    assert farm.clock.mono == start
    farm.finish(worker, lease)


def test_a_job_is_refused_where_there_is_hardly_room(farm: Farm, disk: Disk) -> None:
    disk.free = povfarm.LEFT_FREE + povfarm.LEAST_FREE - 1
    with pytest.raises(NoRoom, match="make room"):
        farm.submit(frames=1)
    assert farm.ask("GET", "/api/v1/jobs").json()["jobs"] == []
    assert farm.store.notice == ""  # the jobs that are there go on
    disk.free += 1
    farm.submit(frames=1)


def test_render_names_the_disk_that_is_full_before_it_begins(
        disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    disk.free = povfarm.LEFT_FREE + povfarm.LEAST_FREE - 1
    monkeypatch.chdir(tmp_path)
    Path("scene.pov").write_bytes(SCENE)
    assert povfarm.main(["render", "scene.pov", "+W8", "+H6"]) == 1
    told = capsys.readouterr().err
    assert tempfile.gettempdir() in told and "TMPDIR" in told and "coordinator" not in told


def test_a_job_is_refused_whose_files_have_no_room(farm: Farm, disk: Disk) -> None:
    disk.free = 1 << 30
    big = povfarm.Manifest((povfarm.FileEntry("a.pov", sha256(SCENE), len(SCENE), 1.0),
                            povfarm.FileEntry("b.df3", "0" * 64, 1 << 31, 1.0)))
    with pytest.raises(NoRoom, match=r"2\.1 GB"):
        farm.scheduler.submit("big", "me", pov_job(1), big, JobOptions())


def test_a_file_that_fills_the_disk_while_it_comes_leaves_nothing(farm: Farm, disk: Disk) -> None:
    data = bytes(100_000)
    farm.scheduler.submit("x", "me", pov_job(1), manifest({"scene.pov": data}), JobOptions())

    def chunks() -> Any:
        yield data[:50_000]
        disk.free = 0
        yield data[50_000:]

    with pytest.raises(NoRoom):
        farm.scheduler.put_blob(sha256(data), chunks())
    assert not list((farm.root / "blobs").rglob("*.*"))
    disk.free = 1 << 40
    farm.scheduler.look_for_room()
    farm.scheduler.put_blob(sha256(data), [data])
    assert farm.state(1) == "active"


def break_writes(error: Exception) -> Callable[..., Any]:
    def broken(*args: Any, **options: Any) -> Any:
        raise error
    return broken


@pytest.mark.parametrize("number", [
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EPERM, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_every_way_to_run_out_of_room_is_told_alike(
        number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota is not seen in how much is free: only by trying."""
    farm = Farm(tmp_path / "data")
    farm.store.durable = True
    worker, job = farm.worker("anna"), farm.submit(frames=1)
    lease = farm.lease(worker)
    where: Any = Path if call == "mkdir" else povfarm.os
    monkeypatch.setattr(where, call, break_writes(OSError(number, "no")))
    assert deliver(farm, "#1:anna", lease).status == 507
    farm.scheduler.look_for_room()
    assert farm.store.notice or call == "mkdir"
    monkeypatch.undo()
    assert farm.leftovers() == [] and farm.states(job) == ["leased"]
    farm.scheduler.look_for_room()
    assert farm.store.notice == ""
    assert deliver(farm, "#1:anna", lease).status == 200
    assert farm.problems() == [] and farm.leftovers() == []
    farm.close()


def test_a_disk_that_fills_up_while_slices_are_put_together_leaves_no_half_of_a_picture(
        small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = Farm(small_disk / "farm")
    worker, job = farm.worker(), slices.submit(farm, slices=3)
    join = povfarm.join_rows

    def filled(strips: Sequence[Path], extension: str, to: Path) -> None:
        fill(small_disk, 0)
        join(strips, extension, to)

    monkeypatch.setattr(povfarm, "join_rows", filled)
    slices.work(farm, worker)
    assert farm.store.notice and farm.state(job) == "active"
    assert slices.states(farm, job) == ["done"] * 3
    directory = farm.store.job_directory(job, "ball")
    assert list(directory.glob("*.png")) == [] == list(directory.rglob("*.part"))
    assert len(slices.part_files(farm, job)) == 3
    (small_disk / "ballast").unlink()
    monkeypatch.undo()
    farm.scheduler.look_for_room()
    farm.scheduler.expire()
    assert farm.state(job) == "done" and len(slices.picture(farm, job)) == slices.HEIGHT
    assert farm.problems() == []
    farm.close()


class FullDatabase:
    """A connection that cannot write."""

    def __init__(self, connection: sqlite3.Connection, message: str) -> None:
        self.connection, self.message = connection, message

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql.lstrip().startswith(("INSERT", "UPDATE", "DELETE")):
            raise sqlite3.OperationalError(self.message)
        return self.connection.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


@pytest.mark.parametrize("message", [
    "database or disk is full", "disk I/O error", "attempt to write a readonly database"])
def test_a_database_without_room_is_told_alike(message: str, farm: Farm) -> None:
    worker, job = farm.worker("anna"), farm.submit(frames=1)
    lease = farm.lease(worker)
    connection = farm.store._writer
    farm.store._writer = FullDatabase(connection, message)  # type: ignore[assignment]
    assert deliver(farm, "#1:anna", lease).status == 507
    farm.scheduler.look_for_room()
    assert farm.store.notice
    farm.store._writer = connection
    farm.scheduler.look_for_room()
    assert farm.store.notice == "" and farm.states(job) == ["leased"]
    assert deliver(farm, "#1:anna", lease).status == 200


def test_other_errors_of_the_database_are_mistakes(farm: Farm) -> None:
    worker = farm.worker("anna")
    farm.submit(frames=1)
    lease = farm.lease(worker)
    connection = farm.store._writer
    farm.store._writer = FullDatabase(connection, "no such table: job")  # type: ignore[assignment]
    assert deliver(farm, "#1:anna", lease).status == 500
    farm.store._writer = connection
    assert farm.store.notice == ""


def test_the_notice_is_on_every_page(tmp_path: Path, disk: Disk) -> None:
    coordinator = povfarm.Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False)
    try:
        disk.free = 0
        coordinator.scheduler.look_for_room()
        request = povfarm.Request("GET", "/", {}, {"host": "127.0.0.1"},
                                  povfarm.BodyReader.of(b""), "127.0.0.1")
        pages: List[bytes] = []
        for _ in range(2):
            body = coordinator.router.handle(request).body
            assert isinstance(body, bytes)
            pages.append(body)
            disk.free = 1 << 40
            coordinator.scheduler.look_for_room()
        assert [b"full or cannot be written" in page for page in pages] == [True, False]
    finally:
        coordinator.stop()
