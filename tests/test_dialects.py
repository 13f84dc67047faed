"""All who may render at once: clients of HTTPov and SheepIt and ours, on a job of RenderOnline's."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import Dict

import pytest

import povfarm
from helpers.base import POVFARM, need, run_povray, wait_until
from helpers.clients import BashClient, SheepitClient, form_of
from helpers.farm import environment
from helpers.invariants import broken
from helpers.pictures import png_rows

SCENE = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 1, -5> look_at 0 }
light_source { <5, 5, -5>, 1 }
sphere { <clock, 0, 0>, 1 pigment { rgb <1, clock, frame_number / 20> } }
"""
ENGINE = [("engine povray", ".pov povray $RENDERONLINE:@uploaded_file +W40 +H30 "
           "+KFF$RENDERONLINE:last", "here"), ("argument last", "natural", "here")]
LAST = 12


@pytest.mark.slow
def test_each_frame_is_rendered_once_whoever_does_it(povray: str, tmp_path: Path) -> None:
    for program in ("curl", "zip", "unzip"):
        need(program, shutil.which(program) is not None, f"apt-get install {program}")
    plain, place = tmp_path / "plain", tmp_path / "client"
    for one in (plain, place):
        one.mkdir()
    (plain / "scene.pov").write_text(SCENE)
    assert run_povray(["scene.pov", "+W40", "+H30", f"+KFF{LAST}"], plain).returncode == 0
    farm = povfarm.Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, httpov=True,
                               sheepit=True, renderonline=povfarm.OnlineRules.of(ENGINE))
    farm.start()
    try:
        assert submitted(farm) == {"IsAdded": True, "ErrorMessage": "Task successfully enqueued."}
        old = BashClient(f"{farm.url.partition('//')[2]}/{farm.access.guest_key}", "attic", place)
        sheep = SheepitClient(farm.url, {"login": "admin", "password": povfarm.sheepit_password(
            povfarm.secret_hash(farm.key))}, tmp_path / "cache")
        sheep.log_in()
        status, task, renderer = sheep.task()
        job = old.ask("command=getjob")
        assert (status, job["command"]) == ("0", "getbatch")
        ours = subprocess.Popen([
            *POVFARM, "work", "--server", farm.url, "--key", farm.key, "--until-idle",
            "--worker-name", "ours", "--cores", "1", "--tags", "attic"], env=environment(tmp_path),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: len({grant.worker for grant in farm.scheduler.grants}) == 3,
                   "not all three have something")
        threads = [threading.Thread(target=sheep.render, args=(task, renderer)),
                   threading.Thread(target=old.work)]
        for thread in threads:
            thread.start()
        assert ours.wait(120) == 0
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        with farm.store.read() as tx:
            wait_until(lambda: tx.job(1).state == "done", "it is not done")
            tasks, totals = tx.tasks(1), farm.api.views.totals(tx)
            tries = [[row.state for row in tx.attempts(one.id)] for one in tasks]
        # On a computer that is busy an idle worker is given what another has held for long.
        assert len(tries) == LAST and broken(farm.scheduler) == [] and all(
            states.count("done") == 1 and {*states} <= {"done", "lost", "released"}
            for states in tries), tries
    finally:
        farm.stop()
    counts = {view["name"]: view["frames"] for view in totals["workers"]}
    assert counts.keys() == {"anna", "admin@host1", "ours"} and min(counts.values()) >= 1
    assert sum(counts.values()) == LAST and not any(view["failures"] for view in totals["workers"])
    assert {view["name"] for view in totals["computers"]} == {"anna", "host1", "ours"}
    assert {view["name"]: view["frames"] for view in totals["groups"]} == {
        "attic": counts["anna"] + counts["ours"], "": counts["admin@host1"]}
    made = {path.name: path for path in (tmp_path / "data" / "jobs").rglob("*.png")}
    expected = {path.name: path for path in plain.glob("*.png")}
    assert len(expected) == LAST and made.keys() == expected.keys()
    for name, path in expected.items():
        assert png_rows(made[name].read_bytes()) == png_rows(path.read_bytes()), name


def submitted(farm: povfarm.Coordinator) -> Dict[str, object]:
    """Send the scene as a user of RenderOnline does; return the answer."""
    farm.access.add("eve", povfarm.Role.USER, {}, "a-ticket-that-is-new")
    with farm.store.read() as tx:
        token = povfarm.online_token(farm.key, "eve", tx.people()[0].added)
    wish = {"EngineId": "1", "Arguments": [{"ArgTypeId": "last", "Value": f"{LAST}"}]}
    edge, _, scene = form_of(SCENE.encode()).partition(b"\r\n")
    body = (edge + b'\r\nContent-Disposition: form-data; name="request"\r\n\r\n'
            + json.dumps(wish).encode() + b"\r\n" + edge + b"\r\n"
            + scene.replace(b'"7_1.png"', b'"scene.pov"', 1))
    asked = urllib.request.Request(farm.url + "/renderapi/v1/enqueue", body, {
        "content-type": f"multipart/form-data; boundary={edge[2:].decode()}", "email": "eve",
        "token": token})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        answer: Dict[str, object] = json.load(reply)
        return answer
