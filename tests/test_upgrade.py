"""Another povfarm: who joins whom, what is said otherwise, and how a farm gets a newer one."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

import povfarm
from helpers import farm as real
from helpers.base import ROOT, wait_until
from helpers.farm_in_a_box import Farm, farm_fixture
from povfarm import CHANGES, HELLO, SCHEMA_VERSION, VERSION, Store, WorkerInfo

__all__ = ["farm_fixture"]

OLDER = ("this worker's povfarm is older than its coordinator's: copy the coordinator's file, "
         "povfarm.py, to this computer, and start the worker again")
NEWER = ("this worker's povfarm is newer than its coordinator's: update the coordinator (see 'Update' "
         "in the manual), or copy its file, povfarm.py, to this computer; then start the worker again")


@pytest.mark.parametrize(("who", "wire", "said"), [
    ("", None, ""), ("anna", None, ""),  # who only asks and submits
    ("", 2, ""), ("#1", 2, ""), ("", 1, OLDER), ("#1", 1, OLDER), ("#1", -1, OLDER), ("", 3, NEWER),
    ("#1", 3, NEWER), ("#1", None, OLDER),  # it is from before the number was told
])
def test_a_worker_of_another_wire_is_told_what_to_do(
        who: str, wire: Optional[int], said: str, farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "WIRE", 2)
    hello: Dict[str, Any] = {"who": who, "nonce": "0" * 32}
    reply = farm.ask("POST", HELLO, key=None, json_body=hello if wire is None else {**hello, "wire": wire})
    assert (reply.status, reply.json().get("error", "")) == ((400, said) if said else (200, ""))


def test_the_version_of_a_worker_is_shown_as_it_told_it_last(farm: Farm) -> None:
    wire = {"name": "anna", "cores": 1, "memory": 1, "system": "", "engines": {}, "tags": []}
    silent, newer = (WorkerInfo.from_wire({**wire, **more}) for more in ({}, {"povfarm": "1.2\n" * 99}))
    assert silent.povfarm == "" and len(newer.povfarm or "") == 40
    worker = farm.scheduler.join(silent, "t", "::1", who="admin")
    farm.scheduler.rejoin(worker, WorkerInfo("anna", 1, 1, "", {}, (), "0.2.0<"), "::1")
    assert [one["povfarm"] for one in farm.ask("GET", "/api/v1/workers").json()["workers"]] == ["0.2.0<"]


def first_release(root: Path) -> None:
    """Make a farm's database of version 10, with a worker and a frame that it has rendered."""
    schema = povfarm.SCHEMA
    for new, old in ((",\n        povfarm TEXT NOT NULL DEFAULT ''", ""), (" taken TEXT, UNIQUE", " UNIQUE"),
                     (" taken TEXT,\n        PRIMARY", "\n        PRIMARY"), (f"    {povfarm._DUE};\n", "")):
        assert schema.count(new) == 1
        schema = schema.replace(new, old)
    root.mkdir()
    with contextlib.closing(sqlite3.connect(root / "farm.db")) as db:
        db.executescript(f"{schema}; PRAGMA user_version = 10; PRAGMA journal_mode = WAL")


def shape(root: Path) -> Dict[str, Any]:
    """Return the tables of a database with their columns, and its indexes and triggers."""
    with contextlib.closing(sqlite3.connect(root / "farm.db")) as db:
        rows = db.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
        return {name: sorted(row[1:] for row in db.execute(f"PRAGMA table_info ({name})"))
                if kind == "table" else " ".join(sql.split()) for kind, name, sql in rows.fetchall()}


def test_the_database_of_the_first_release_becomes_ours_with_all_that_is_in_it(tmp_path: Path) -> None:
    first_release(tmp_path / "one")
    with contextlib.closing(sqlite3.connect(tmp_path / "one" / "farm.db")) as db, db:
        db.execute("INSERT INTO meta (key, value) VALUES ('farm_id', 'f00')")
    Store.backup(tmp_path / "one", tmp_path / "two")  # of an old one as well
    Store(tmp_path / "new", durable=False).close()
    for place in ("one", "two"):
        for again in "ab":
            store = Store(tmp_path / place, durable=False)
            with store.tx() as tx:
                assert tx.meta("farm_id") == "f00"
                tx.add_worker(WorkerInfo("anna", 2, 1, "Linux", {"povray": "3.7"}, ("fast",)), again,
                              povfarm.WorkerState.ADMITTED, "", "::1", 1.0)
            store.close()
        assert shape(tmp_path / place) == shape(tmp_path / "new")
    assert set(CHANGES) == set(range(10, SCHEMA_VERSION))


def newer(tmp_path: Path) -> Path:
    """Return a povfarm of another version and another wire."""
    text = (ROOT / "povfarm.py").read_text(encoding="utf-8")
    for old, new in ((f"\nWIRE = {povfarm.WIRE} ", "\nWIRE = 99 "), (f'\nVERSION = "{VERSION}"', '\nVERSION = "9.0"')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    copy = tmp_path / "newer" / "povfarm.py"
    copy.parent.mkdir()
    copy.write_text(text, encoding="utf-8")
    return copy


def ended(worker: "subprocess.Popen[str]") -> str:
    """Return what a worker said that has ended because it was refused."""
    assert worker.wait(60) == 2 and worker.stdout is not None
    said = worker.stdout.read()
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_a_farm_gets_a_newer_povfarm_and_no_frame_is_lost_or_rendered_twice(
        tmp_path: Path, povray: str) -> None:
    """As the manual's Update has it; but the worker is not stopped, and told so."""
    farm = real.Farm(tmp_path)
    try:
        upgrade(farm, [sys.executable, str(newer(tmp_path))])
    finally:
        farm.close()


def upgrade(farm: real.Farm, copy: List[str]) -> None:
    """Render with ours, then with the copy; and let the copy's worker meet ours again."""
    place, ours = farm.tmp_path, farm.program
    old = farm.work("--worker-name", "attic", "--cores", "1")
    scene = real.project(place)
    first, held = real.submit_and_stop(farm, scene, "scene.pov", *real.SMALL, "+KFF20")
    assert attic(farm)["povfarm"] == VERSION
    assert real.run(place, "workers", "drain", "attic", cwd=place).returncode == 0
    second = farm.submit(scene, "scene.pov", *real.SMALL, "+KFF10")
    assert attic(farm)["runs"]
    os.kill(int(held), signal.SIGCONT)
    wait_until(lambda: attic(farm)["state"] == "resting")
    done = farm.job(first)["frames"]["done"]
    assert done > 0 and farm.job(second)["frames"]["done"] == 0

    serve_again(farm, copy)
    assert told(OLDER, old) and farm.job(first)["frames"]["done"] == done
    farm.program = ours
    # One that was there before, and one that was not.
    refused = [farm.work("--worker-name", name) for name in ("attic", "cellar")]
    assert all(told(OLDER, worker) for worker in refused)
    farm.program = copy
    new = farm.work("--worker-name", "attic", "--cores", "2")
    assert {farm.finished(job)["state"] for job in (first, second)} == {"done"}
    assert attic(farm)["povfarm"] == "9.0"
    assert ">9.0</td>" in farm.client.request("GET", "/computers").body.decode()

    serve_again(farm, ours)
    assert told(NEWER, new)
    farm.check()
    with contextlib.closing(sqlite3.connect(place / "farm" / "farm.db")) as db:
        attempts = db.execute("SELECT task, state, lease, message, log FROM attempt").fetchall()
        assert sorted(task for task, state, *_ in attempts if state == "done") == sorted(
            task for task, in db.execute("SELECT id FROM task"))
        # A run in which POV-Ray itself crashes, or gives up as it was stopped while it started,
        # is rendered again, and that is not our doing.
        crashed = {lease for _, _, lease, message, log in attempts if "exit code -11" in message
                   or any("Timed out waiting for worker thread startup" in path.read_text()
                          for path in place.glob(f"farm/jobs/*/{log}") if path.is_file())}
        assert [row for row in attempts if row[1] != "done" and row[2] not in crashed] == []


def attic(farm: real.Farm) -> Dict[str, Any]:
    """Return the only worker."""
    (view,) = farm.client.get("/api/v1/workers")["workers"]
    return dict(view)


def serve_again(farm: real.Farm, program: List[str]) -> None:
    """Stop the coordinator, and start that of a program."""
    farm.coordinator.send_signal(signal.SIGTERM)
    farm.coordinator.wait(60)
    farm.program = program
    farm.coordinator = farm.serve()


def told(what: str, worker: "subprocess.Popen[str]") -> bool:
    """Tell whether a worker has ended with this as its last line, but for how it is started."""
    assert worker.wait(60) == 2 and worker.stdout is not None
    return worker.stdout.read().splitlines()[-1] == f"povfarm: {what}"
