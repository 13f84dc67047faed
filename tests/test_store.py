"""The database and the blobs: all or nothing, one writer, all SQL in one place."""

from __future__ import annotations

import ast
import contextlib
import gc
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple, Type

import pytest

import povfarm
from helpers.farm_in_a_box import SCENE, Farm, farm_fixture, manifest, pov_job, sha256
from helpers.pictures import png
from helpers.source import SOURCE, nodes, tree
from povfarm import (
    AttemptState,
    Coordinator,
    Cost,
    JobOptions,
    JobState,
    ProtocolError,
    Store,
    StoreError,
    TaskKind,
    TaskState,
    Tx,
    UserError,
    WorkerInfo,
    WorkerState,
)

__all__ = ["farm_fixture"]

INFO = WorkerInfo("anna", 2, 1 << 30, "Linux", {"povray": "3.7"}, ("fast",))
HELLO = sha256(b"hello")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    one = Store(tmp_path / "data", durable=False)
    yield one
    one.close()


def add_job(tx: Tx, frames: int = 2) -> int:
    project = manifest({"scene.pov": b"hello"})
    tx.add_manifest(project)
    job = tx.reserve_job()
    tx.add_tasks(job, [(frame, f"out{frame}.png") for frame in range(1, frames + 1)])
    tx.add_job(job, "ball", "me", pov_job(frames), project.key, JobOptions(), 1.0)
    return job


def files_in(root: Path) -> Set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


# --- transactions

@pytest.mark.parametrize("error", [
    ValueError, UserError, sqlite3.IntegrityError, KeyboardInterrupt, GeneratorExit, SystemExit,
])
def test_a_transaction_rolls_back_on_any_exception(
        error: Type[BaseException], store: Store) -> None:
    with pytest.raises(error), store.tx() as tx:
        tx.set_meta("a", "1")
        raise error("in the middle")
    with store.tx() as tx:
        assert tx.meta("a") == ""
        tx.set_meta("b", "2")
    with store.read() as tx:
        assert (tx.meta("a"), tx.meta("b")) == ("", "2")


def test_a_transaction_rolls_back_when_its_commit_fails(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError), store.tx() as tx:
        # With this, a broken foreign key is found only by the commit.
        tx._db.execute("PRAGMA defer_foreign_keys = ON")
        tx.set_meta("a", "1")
        tx.add_lease("L", worker=77, job=88, tasks=[], now=1.0)
    with store.tx() as tx:
        assert tx.meta("a") == "" and tx.attempt(1, "L") is None


def test_a_row_without_its_parent_is_refused(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError), store.tx() as tx:
        tx.add_lease("L", worker=77, job=88, tasks=[], now=1.0)


def test_there_is_one_writer_at_a_time(store: Store) -> None:
    def add_one_by_one() -> None:
        for _ in range(50):
            with store.tx() as tx:
                tx.set_meta("n", str(int(tx.meta("n") or 0) + 1))

    threads = [threading.Thread(target=add_one_by_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as tx:
        assert tx.meta("n") == "200"


def test_a_reader_sees_one_moment(store: Store) -> None:
    with store.tx() as tx:
        tx.set_meta("a", "before")
    with store.read() as reader:
        assert reader.meta("a") == "before"
        with store.tx() as tx:
            tx.set_meta("a", "after")
        assert reader.meta("a") == "before"
    with store.read() as reader:
        assert reader.meta("a") == "after"


def test_a_reader_that_fails_leaves_a_reader_that_works(store: Store) -> None:
    for _ in range(3):
        with pytest.raises(ValueError), store.read():
            raise ValueError
    with store.read() as tx:
        assert tx.meta("a") == ""


WRITES: Dict[str, Callable[[Tx], Any]] = {
    "set_meta": lambda tx: tx.set_meta("a", "b"),
    "add_event": lambda tx: tx.add_event(1.0, "x", "y"),
    "drop_events": lambda tx: tx.drop_events(1),
    "take_images": lambda tx: tx.take_images(1, ["a"]),
    "deliver": lambda tx: tx.deliver(povfarm.Due(1, "x", 1, "a.png", HELLO, None, False)),
    "add_worker": lambda tx: tx.add_worker(INFO, "t", WorkerState.PENDING, "c", "a", 1.0),
    "set_worker_info": lambda tx: tx.set_worker_info(1, INFO, "a"),
    "set_worker_state": lambda tx: tx.set_worker_state(1, WorkerState.REMOVED),
    "add_blob": lambda tx: tx.add_blob(HELLO, 5, 1.0),
    "add_manifest": lambda tx: tx.add_manifest(manifest({"a": b"b"})),
    "drop_manifests": lambda tx: tx.drop_manifests(),
    "drop_blob": lambda tx: tx.drop_blob(HELLO),
    "reserve_job": lambda tx: tx.reserve_job(),
    "drop_rows": lambda tx: tx.drop_rows(1, 1),
    "move_frames": lambda tx: tx.move_frames(
        1, TaskState.QUEUED, TaskState.CANCELLED, "", 1.0, -1, 1),
    "add_job": lambda tx: tx.add_job(1, "n", "o", pov_job(), "k", JobOptions(), 1.0),
    "add_tasks": lambda tx: tx.add_tasks(1, [(1, "a.png")]),
    "set_job_state": lambda tx: tx.set_job_state(1, JobState.ACTIVE, JobState.DONE, "", None),
    "set_job_options": lambda tx: tx.set_job_options(1, JobOptions()),
    "set_job_engines": lambda tx: tx.set_job_engines(1, "{}"),
    "put_person": lambda tx: tx.put_person(
        povfarm.Person("anna", povfarm.Role.USER, "t", "{}", 1.0)),
    "forget_worker": lambda tx: tx.forget_worker(1),
    "forget_guest": lambda tx: tx.forget_guest(1),
    "count_work": lambda tx: tx.count_work(1, 1.0, 1.0),
    "drop_person": lambda tx: tx.drop_person("anna"),
    "begin_turn": lambda tx: tx.begin_turn("anna", 0),
    "set_aside": lambda tx: tx.set_aside(1, "odd"),
    "add_job_cost": lambda tx: tx.add_job_cost(1, Cost(1, 1, 1)),
    "add_kept": lambda tx: tx.add_kept(1, 1),
    "drop_job": lambda tx: tx.drop_job(1),
    "count_task": lambda tx: tx.count_task(1, TaskState.QUEUED, TaskState.LEASED),
    "set_task_state": lambda tx: tx.set_task_state(1, TaskState.QUEUED, TaskState.LEASED),
    "set_task_result": lambda tx: tx.set_task_result(1, 1, HELLO, 5, Cost(), 1.0),
    "set_tries": lambda tx: tx.set_tries(1, 1),
    "add_lease": lambda tx: tx.add_lease("L", 1, 1, [1], 1.0),
    "end_lease": lambda tx: tx.end_lease("L", 1, "why", 1.0),
    "end_attempt": lambda tx: tx.end_attempt(1, "L", AttemptState.DONE, 1.0),
    "end_attempts": lambda tx: tx.end_attempts("L", AttemptState.RELEASED, 1.0, ""),
    "forget_failures": lambda tx: tx.forget_failures(1),
    "add_part": lambda tx: tx.add_part(
        SimpleNamespace(id=1, job=1, frame=1, name="a"), TaskKind.SLICE, 0, 1),
    "set_cut": lambda tx: tx.set_cut(1, 0, 1),
    "drop_parts": lambda tx: tx.drop_parts(1),
    "make_void": lambda tx: tx.make_void(1),
    "set_bottom": lambda tx: tx.set_bottom(1, 1),
    "set_state_of": lambda tx: tx.set_state_of(1, "3.7"),
    "move_attempts": lambda tx: tx.move_attempts(1, 2),
    "add_written": lambda tx: tx.add_written(1, "a.txt", 1, HELLO, 5),
}


@pytest.mark.parametrize("name", WRITES)
def test_readers_cannot_write(name: str, store: Store) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"), store.read() as look:
        WRITES[name](Tx(look._db, look._known))


def test_the_list_of_writes_is_whole() -> None:
    """All that a transaction adds to a look is in it, and nothing that only looks."""
    classes = {node.name: node for node in tree().body if isinstance(node, ast.ClassDef)}
    writing = {name: {function.name for function in classes[name].body
                      if isinstance(function, ast.FunctionDef)
                      for text in strings_in(function)
                      if text.lstrip().startswith(("INSERT", "UPDATE", "DELETE", "REPLACE"))}
               for name in ("_Register", "Look", "Tx")}
    assert writing == {"_Register": set(), "Look": set(), "Tx": set(WRITES)}


def strings_in(function: ast.FunctionDef) -> List[str]:
    return [node.value for node in ast.walk(function)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_counters_follow_their_tasks(store: Store) -> None:
    with store.tx() as tx:
        job = add_job(tx)
        task = tx.tasks(job)[0].id
        for frm, to in [("queued", "leased"), ("leased", "done")]:
            assert tx.set_task_state(task, TaskState(frm), TaskState(to))
            tx.count_task(job, TaskState(frm), TaskState(to))
        row = tx.job(job)
        assert (row.queued, row.leased, row.done) == (1, 0, 1)
        states = [task.state for task in tx.tasks(job)]
        assert row.counts == {state: states.count(state) for state in TaskState}


def test_a_state_changes_only_from_the_one_that_is_named(store: Store) -> None:
    with store.tx() as tx:
        job = add_job(tx)
        task = tx.tasks(job)[0].id
        assert not tx.set_task_state(task, TaskState.LEASED, TaskState.DONE)
        assert not tx.set_job_state(job, JobState.ACTIVE, JobState.DONE, "", None)
        assert not tx.set_worker_state(5, WorkerState.ADMITTED)
        assert tx.tasks(job)[0].state == "queued"


# --- blobs and images

def test_a_blob_lies_under_its_hash(store: Store) -> None:
    assert store.put_blob(HELLO, [b"he", b"", b"llo"]) == 5
    assert store.put_blob(HELLO, [b"hello"]) == 5
    assert files_in(store.root / "blobs") == {f"{HELLO[:2]}/{HELLO[2:]}"}
    assert store.blob_path(HELLO).read_bytes() == b"hello"


def test_a_blob_under_a_wrong_hash_is_refused(store: Store) -> None:
    with pytest.raises(povfarm.Damaged):
        store.put_blob(HELLO, [b"hullo"])
    assert files_in(store.root / "blobs") == set()


def test_a_blob_that_breaks_off_leaves_nothing(store: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield b"hel"
        raise ProtocolError(400, "the body ended early")

    store.put_blob(HELLO, [b"hello"])
    for sha in (HELLO, sha256(b"other")):
        with pytest.raises(ProtocolError, match="ended early"):
            store.put_blob(sha, broken())
    assert store.blob_path(HELLO).read_bytes() == b"hello"
    assert len(files_in(store.root / "blobs")) == 1


@pytest.mark.parametrize("name", [
    "camera2", "../../etc", "a/b", "..", "", "....", "Müller & Söhne", "a" * 500, "CON", "a\0b",
    "-rf", "\n", "日本",
])
def test_a_job_has_a_directory_of_its_own(name: str, store: Store) -> None:
    first, second = (store.job_directory(number, name) for number in (7, 8))
    assert first != second
    assert first.parent == store.root / "jobs" and first.name.startswith("7-")
    assert first.name.isascii() and len(first.name) < 50 and "." not in first.name


def test_the_directory_of_a_job_has_its_name(store: Store) -> None:
    assert store.job_directory(7, "camera2") == store.root / "jobs" / "7-camera2"


def test_an_image_is_there_whole_or_not_at_all(
        store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = store.root / "jobs" / "1-x"
    store.put_image(directory, "out1.png", b"old picture")
    monkeypatch.setattr(povfarm.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError):
        store.put_image(directory, "out1.png", b"new")
    monkeypatch.undo()
    assert (directory / "out1.png").read_bytes() == b"old picture"
    assert files_in(directory) == {"out1.png"}


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "a\\b.png", "", ".."])
def test_images_and_logs_stay_in_their_directory(name: str, store: Store) -> None:
    before = files_in(store.root.parent)
    directory = store.root / "jobs" / "1-x"
    with pytest.raises(UserError):
        store.put_image(directory, name, b"x")
    with pytest.raises(UserError):
        store.put_log(directory, name, b"x")
    assert files_in(store.root.parent) == before


def test_a_log_is_named_below_its_job(store: Store) -> None:
    directory = store.root / "jobs" / "1-x"
    assert store.put_log(directory, "out1.png.5.txt", b"text") == "logs/out1.png.5.txt"
    assert (directory / "logs" / "out1.png.5.txt").read_bytes() == b"text"


# --- opening

def schema(path: Path) -> Tuple[int, List[Any]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name")
        return db.execute("PRAGMA user_version").fetchone()[0], rows.fetchall()


def test_a_new_database_has_the_newest_version(tmp_path: Path) -> None:
    Store(tmp_path).close()
    version, tables = schema(tmp_path / "farm.db")
    assert version == povfarm.SCHEMA_VERSION
    Store(tmp_path).close()
    assert schema(tmp_path / "farm.db") == (version, tables)


def test_a_schema_that_fails_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "SCHEMA", povfarm.SCHEMA + "INSERT INTO nowhere VALUES (1)")
    with pytest.raises(StoreError):
        Store(tmp_path)
    monkeypatch.undo()
    gc.collect()
    assert schema(tmp_path / "farm.db") == (0, [])
    Store(tmp_path).close()


def test_a_log_left_by_a_crash_of_a_newer_version_stays(tmp_path: Path) -> None:
    Store(tmp_path / "one").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "one" / "farm.db")) as db:
        db.execute(f"PRAGMA user_version = {povfarm.SCHEMA_VERSION + 1}")
        shutil.copytree(tmp_path / "one", tmp_path / "two")  # as it is when the program is killed
    before = {path.name: path.read_bytes() for path in (tmp_path / "two").glob("farm.db*")}
    assert "farm.db-wal" in before
    with pytest.raises(StoreError, match="newer povfarm"):
        Store(tmp_path / "two")
    gc.collect()
    assert {name: (tmp_path / "two" / name).read_bytes() for name in before
            if name != "farm.db-shm"} == {name: data for name, data in before.items()
                                          if name != "farm.db-shm"}


def test_a_reader_at_work_is_closed_when_it_has_ended(tmp_path: Path) -> None:
    one = Store(tmp_path, durable=False)
    with one.read() as tx:
        one.close()
        assert tx.last_event() == 0
        connection = tx._db
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
    assert files_in(tmp_path) == {"farm.db"}


def test_a_connection_that_is_taken_while_the_store_is_closed_is_left_to_who_took_it(
        tmp_path: Path) -> None:
    """SQLite dies when a connection is closed in which another thread is."""
    one, looks = Store(tmp_path, durable=False), contextlib.ExitStack()
    with one.read():
        pass
    writer, taken = one._writer, one._readers[0]

    def close() -> None:
        looks.enter_context(one.read())
        writer.close()

    one._writer = SimpleNamespace(close=close)  # type: ignore[assignment]
    one.close()
    assert taken.execute("SELECT 1").fetchone()[0] == 1
    looks.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        taken.execute("SELECT 1")
    assert files_in(tmp_path) == {"farm.db"}


@pytest.mark.parametrize("version, age", [(povfarm.SCHEMA_VERSION + 1, "a newer"), (1, "an older")])
@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_the_database_of_another_version_is_refused_untouched(
        journal: str, version: int, age: str, tmp_path: Path) -> None:
    Store(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "farm.db")) as db:
        db.execute(f"PRAGMA journal_mode = {journal}")
        db.execute("CREATE TABLE future (x)")
        db.execute(f"PRAGMA user_version = {version}")
    before = (tmp_path / "farm.db").read_bytes()
    with pytest.raises(StoreError, match=f"{age} povfarm: use that version, or another --data"):
        Store(tmp_path)
    gc.collect()
    assert (tmp_path / "farm.db").read_bytes() == before
    assert files_in(tmp_path) == {"farm.db"}


def a_file(path: Path) -> None:
    path.write_text("I was here first")


def a_broken_database(path: Path) -> None:
    path.mkdir()
    (path / "farm.db").write_bytes(b"this is no database " * 500)


def a_file_for_blobs(path: Path) -> None:
    path.mkdir()
    (path / "blobs").write_text("I was here first")


@pytest.mark.parametrize("make", [a_file, a_broken_database, a_file_for_blobs])
def test_a_directory_that_cannot_be_used_is_named(
        make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "data")
    assert str(tmp_path / "data") in str(caught.value) and "\n" not in str(caught.value)


def test_a_second_coordinator_on_the_same_data_is_refused(tmp_path: Path) -> None:
    first = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False)
    first.start()
    try:
        with pytest.raises(StoreError, match="another povfarm"):
            Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False)
        here = "\n".join([
            "import sys, pathlib, povfarm",
            "try: povfarm.Coordinator(pathlib.Path(sys.argv[1]), bind='127.0.0.1')",
            "except povfarm.StoreError as error: print(error)"])
        other = subprocess.run(
            [sys.executable, "-c", here, str(tmp_path / "data")], capture_output=True, text=True,
            check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path(povfarm.__file__).parent)})
        assert "another povfarm" in other.stdout
        elsewhere = Coordinator(tmp_path / "more", bind="127.0.0.1", durable=False)
        elsewhere.start()
        elsewhere.stop()
    finally:
        first.stop()
    again = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False)
    again.start()
    again.stop()


def test_what_a_killed_program_left_behind_is_swept_away(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(frames=2)
    farm.finish(worker, farm.lease(worker))
    gone = farm.submit(frames=1, name="gone")
    farm.render(worker)
    kept = files_in(farm.root) - {"farm.db-wal", "farm.db-shm"}
    farm.scheduler.delete(gone)
    kept -= {f"jobs/{gone}-gone/out.png", f"jobs/{gone}-gone/logs/out.png.3.txt"}
    jobs = farm.root / "jobs"
    for left in (farm.root / ".coordinator.json.1.2.part", jobs / f"{job}-ball" / ".00ff.part",
                 jobs / f"{job}-ball" / "parts" / "999.png", farm.root / "blobs" / "ab" / ".1.part",
                 jobs / f"{job}-ball" / "parts" / "1.state", farm.root / "blobs" / "ab" / ("c" * 62),
                 jobs / f"{gone}-gone" / "out.png"):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"left behind")
    newer = jobs / "7-of-a-newer-database" / "out.png"
    newer.parent.mkdir()
    newer.write_bytes(b"rendered")
    (jobs / "notes.txt").write_bytes(b"mine")
    farm.store.sweep()
    assert files_in(farm.root) - {"farm.db-wal", "farm.db-shm"} == {
        *kept, "jobs/7-of-a-newer-database/out.png", "jobs/notes.txt"}
    assert not (jobs / f"{gone}-gone").exists()


def test_contents_that_come_again_while_they_are_tidied_away_stay(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.scheduler.delete(farm.submit(frames=1))
    farm.clock.advance(povfarm.KEEP_BLOBS + 1)
    tx, calls = farm.store.tx, [1]

    def between() -> Any:
        """Let them come again after tidy has dropped the row, and before it drops the file."""
        calls.append(1)
        if len(calls) == 3:
            farm.submit(frames=1)
        return tx()

    monkeypatch.setattr(farm.store, "tx", between)
    farm.scheduler.tidy()
    assert len(calls) > 3 and farm.store.blob_path(sha256(SCENE)).is_file()


def test_contents_whose_file_is_tidied_away_before_their_row_are_asked_for_again(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    job = farm.submit(frames=1, send=False)
    put_blob = farm.store.put_blob

    def lose(name: str, chunks: Any, most: float) -> int:
        size = put_blob(name, chunks, most)
        farm.store.blob_path(name).unlink()
        return size

    monkeypatch.setattr(farm.store, "put_blob", lose)
    with pytest.raises(povfarm.TryAgain):
        farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    monkeypatch.undo()
    assert farm.state(job) == "waiting"
    farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    assert farm.state(job) == "active"


def test_a_coordinator_that_never_started_can_be_stopped(tmp_path: Path) -> None:
    Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False).stop()


def test_the_farm_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    key = povfarm.farm_key(tmp_path / "data")
    assert len(key) == 64
    assert povfarm.farm_key(tmp_path / "data") == key
    assert povfarm.farm_key(tmp_path / "other") != key
    if os.name != "nt":
        assert (tmp_path / "data" / "farm.key").stat().st_mode & 0o777 == 0o600


# --- backups

def test_a_backup_of_a_farm_at_work_is_a_farm(farm: Farm, tmp_path: Path) -> None:
    worker, job = farm.worker(), farm.submit(frames=3)
    farm.submit(files={"late.pov": b"not sent yet"}, send=False)
    farm.finish(worker, farm.lease(worker))
    lease = farm.lease(worker)
    (farm.root / "jobs" / f"{job}-ball" / ".0123456789abcdef.part").write_bytes(b"under way")
    (farm.root / "cache").mkdir()
    (farm.root / "cache" / "big").write_bytes(b"not worth it")
    assert Store.backup(farm.root, tmp_path / "deep" / "copy") == []
    (farm.root / "jobs" / f"{job}-ball" / ".0123456789abcdef.part").unlink()
    assert files_in(tmp_path / "deep") == {
        "copy/farm.db", f"copy/blobs/{sha256(SCENE)[:2]}/{sha256(SCENE)[2:]}",
        f"copy/jobs/{job}-ball/out1.png", f"copy/jobs/{job}-ball/logs/out1.png.1.txt"}
    copy = Farm(tmp_path / "deep" / "copy")
    assert copy.problems() == [] and copy.states(job) == ["done", "leased", "queued"]
    copy.clock.advance(31)
    copy.scheduler.expire()
    assert copy.render(worker) == [2, 3]
    assert copy.state(job) == "done" and copy.problems() == []
    copy.close()
    assert farm.states(job) == ["done", "leased", "queued"]  # and the farm itself goes on
    farm.finish(worker, lease)


def test_a_backup_while_jobs_come_and_go_is_whole(farm: Farm, tmp_path: Path) -> None:
    worker, stop = farm.worker(), threading.Event()
    farm.submit(frames=3)

    def live() -> None:
        while not stop.is_set():
            job = farm.submit(frames=5, files={"scene.pov": b"%d" % time.monotonic_ns()})
            farm.render(worker)
            farm.scheduler.delete(job - 1)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        for number in range(8):
            assert Store.backup(farm.root, tmp_path / str(number)) == []
    finally:
        stop.set()
        thread.join()
    for number in range(8):
        copy = Farm(tmp_path / str(number))
        assert copy.problems() == []
        copy.close()


def test_a_backup_is_a_copy_where_nothing_can_be_linked(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.submit(frames=1)
    farm.render(farm.worker())
    monkeypatch.setattr(povfarm.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "EXDEV")))
    assert Store.backup(farm.root, tmp_path / "copy") == []
    copy = Farm(tmp_path / "copy")
    assert copy.problems() == []
    copy.close()


def test_a_backup_tells_what_the_farm_itself_lacks(tmp_path: Path) -> None:
    farm = Farm(tmp_path / "data")
    job = farm.submit(frames=2)
    farm.render(farm.worker())
    (farm.root / "jobs" / f"{job}-ball" / "out2.png").unlink()
    assert Store.backup(farm.root, tmp_path / "copy") == [str(Path("jobs", "1-ball", "out2.png"))]
    assert (tmp_path / "copy" / "jobs" / "1-ball" / "out1.png").is_file()
    farm.close()


def test_a_backup_that_cannot_be_made_leaves_nothing(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no farm"):
        Store.backup(tmp_path / "nowhere", tmp_path / "copy")
    with pytest.raises(UserError, match="already"):
        Store.backup(farm.root, tmp_path)
    with pytest.raises(StoreError, match="copy cannot be made: Is a dir"):
        Store.backup(farm.root, farm.root / "farm.key" / "copy")
    farm.submit()
    monkeypatch.setattr(povfarm.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "EXDEV")))
    monkeypatch.setattr(povfarm.shutil, "copy2", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(StoreError, match="full"):
        Store.backup(farm.root, tmp_path / "copy")
    monkeypatch.setattr(povfarm, "SCHEMA_VERSION", povfarm.SCHEMA_VERSION + 1)
    with pytest.raises(StoreError, match="older povfarm"):
        Store.backup(farm.root, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# --- what only a whole farm shows

def test_a_deleted_job_leaves_no_rows(farm: Farm) -> None:
    worker, job = farm.worker(), farm.submit(frames=2)
    farm.finish(worker, farm.lease(worker))
    farm.lease(worker)
    farm.scheduler.delete(job)
    with contextlib.closing(sqlite3.connect(farm.root / "farm.db")) as db:
        for table in ("job", "task", "lease", "attempt", "manifest", "manifest_blob"):
            assert db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] == 0, table


def test_the_picture_is_on_disk_before_its_row(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two may leave a file too many, never a row too many."""
    worker, job = farm.worker(), farm.submit(frames=1)
    lease = farm.lease(worker)
    monkeypatch.setattr(farm.store, "put_image", lambda *_: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError):
        farm.finish(worker, lease)
    monkeypatch.undo()
    assert farm.states(job) == ["leased"] and farm.problems() == []
    monkeypatch.setattr(farm.store, "tx", lambda: (_ for _ in ()).throw(sqlite3.OperationalError()))
    with pytest.raises(sqlite3.OperationalError):
        farm.finish(worker, lease)
    monkeypatch.undo()
    assert farm.states(job) == ["leased"]
    assert (farm.root / "jobs" / f"{job}-ball" / "out.png").read_bytes() == png(1)
    assert farm.finish(worker, lease)


def half_done(root: Path, frames: int) -> Tuple[Farm, int]:
    """A farm, and its worker who has rendered all but ten of so many frames, one by one."""
    farm = Farm(root)
    worker, job = farm.worker(), farm.submit(frames)
    with farm.store.tx() as tx:
        for statement in (
            """INSERT INTO lease (id, worker, job, granted, ended)
               SELECT 'L' || id, :worker, job, 1, 2 FROM task WHERE frame <= :done""",
            """INSERT INTO attempt (task, lease, worker, state, started, ended)
               SELECT id, 'L' || id, :worker, 'done', 1, 2 FROM task WHERE frame <= :done""",
            """UPDATE task SET state = 'done', finished = id WHERE frame <= :done""",
            """UPDATE job SET done = :done, queued = queued - :done, cpu = 60 * :done,
                              wall = 60 * :done WHERE id = :job""",
        ):
            tx._db.execute(statement, {"worker": worker, "job": job, "done": frames - 10})
    return farm, worker


def steps_of_sql(root: Path, frames: int) -> Dict[str, int]:
    """How many steps SQLite takes for what happens all the time, late in a long animation."""
    farm, worker = half_done(root, frames)
    farm.ask("GET", "/api/v1/jobs/1")
    leases: List[Any] = []
    actions: Dict[str, Callable[[], Any]] = {
        "lease": lambda: leases.append(farm.lease(worker)),
        "finish": lambda: farm.finish(worker, leases[0], cpu=60),
        "lease again": lambda: leases.append(farm.lease(worker)),
        "fail": lambda: farm.fail(worker, leases[1]),
        "the job": lambda: farm.ask("GET", "/api/v1/jobs/1"),
        "the jobs": lambda: farm.ask("GET", "/api/v1/jobs"),
        "the workers": lambda: farm.ask("GET", "/api/v1/workers"),
    }
    costs = {name: steps_of(farm, action) for name, action in actions.items()}
    farm.close()
    return costs


def steps_of(farm: Farm, action: Callable[[], Any]) -> int:
    """How many times twenty steps SQLite takes meanwhile."""
    steps: List[int] = []
    for connection in (farm.store._writer, *farm.store._readers):
        connection.set_progress_handler(lambda: steps.append(1), 20)
    action()
    return len(steps)


def test_a_long_animation_is_no_slower_at_its_end(tmp_path: Path) -> None:
    short, long = (steps_of_sql(tmp_path / str(frames), frames) for frames in (200, 4000))
    assert {name: (short[name], steps) for name, steps in long.items()
            if steps > 2 * short[name] + 50} == {}


def steps_of_a_lease(root: Path, others: int, **options: Any) -> Tuple[int, int]:
    """The steps for a lease and its delivery where so many other workers hold one."""
    farm = Farm(root)
    farm.submit(4 * others + 100, **options)
    workers = [farm.worker(f"w{number}") for number in range(others)]
    for worker in workers:
        for lease in farm.leases(worker):
            farm.finish(worker, lease)
        farm.leases(worker)
    leases: List[Any] = []
    costs = (steps_of(farm, lambda: leases.append(farm.lease(farm.worker()))),
             steps_of(farm, lambda: farm.finish(others + 1, leases[0])))
    farm.close()
    return costs


def test_a_lease_is_hardly_dearer_where_many_are_out(tmp_path: Path) -> None:
    few, many = (steps_of_a_lease(tmp_path / str(others), others) for others in (10, 150))
    assert many[0] < few[0] + 140 and many[1] < few[1] + 20, (few, many)


def test_a_worker_that_only_fails_costs_no_more_in_a_long_animation(tmp_path: Path) -> None:
    costs = []
    for frames in (200, 4000):
        farm, anna = half_done(tmp_path / str(frames), frames)
        bert = farm.worker("bert")
        for _ in range(3):
            farm.fail(bert, farm.lease(bert))
        costs.append(steps_of(farm, lambda: farm.leases(bert)))  # noqa: B023 - called at once
        assert farm.lease(anna)
        farm.close()
    assert costs[1] < 2 * costs[0] + 50, costs


def test_a_slice_costs_no_more_where_many_are_done(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    worker, job = farm.worker(), farm.submit(3, slices=3)
    costs = []
    for more in (100, 4000):
        with farm.store.tx() as tx:
            frame = tx.tasks(job)[2]
            tx._db.executemany(
                """INSERT INTO task (job, frame, slice, name, state, kind, top, bottom, parent,
                                     wall, parse, worker, finished)
                   VALUES (:job, 3, :number, 'x', 'done', 'slice', 0, 1, :id, 9, 1, 1, :number)""",
                [{**vars(frame), "number": number} for number in range(10 * more, 11 * more)])
        costs.append(steps_of(farm, lambda: farm.lease(worker)))
    farm.close()
    assert costs[1] < costs[0] + 50, costs


# --- the SQL itself

def calls_of_sql() -> List[Tuple[str, str, ast.expr]]:
    """Where SQL is run: class and function, and the text."""
    found = []
    for owner in nodes():
        if isinstance(owner, ast.ClassDef):
            for function in owner.body:
                found += [(owner.name, function.name, node.args[node.func.attr in ("_all", "_one")])
                          for node in ast.walk(function)
                          if isinstance(function, ast.FunctionDef) and isinstance(node, ast.Call)
                          and isinstance(node.func, ast.Attribute)
                          and node.func.attr in ("execute", "executemany", "executescript", "_do",
                                                 "_all", "_one", "_column", "_value")]
    return found


def test_sql_is_literal_and_only_in_the_store() -> None:
    calls = calls_of_sql()
    odd = {(owner, function) for owner, function, sql in calls
           if not (isinstance(sql, ast.Constant) and isinstance(sql.value, str))}
    # The pragma that says how durable, and the schema, which are constants; what takes the literals.
    assert odd == {("Store", "_connect"), ("Store", "__init__"),
                   ("_Register", "_do"), ("_Register", "_all"), ("_Register", "_one"),
                   ("_Register", "_column"), ("_Register", "_value")}
    assert {owner for owner, _, _ in calls} == {"Store", "_Register", "Look", "Tx"}
    assert len(calls) > 60


def test_no_query_is_unused() -> None:
    used = set(re.findall(r"(?:tx|look|self)\.(?=(\w+))", SOURCE))
    for name in {**vars(povfarm._Register), **vars(povfarm.Look), **vars(Tx)}:
        assert name.startswith("_") or name in used, f"{name} is never called"
