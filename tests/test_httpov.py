"""HTTPov's clients: every reply byte by byte, and a whole animation through a client's own steps."""

from __future__ import annotations

import argparse
import http.client
import io
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import pytest

import povfarm
from helpers.base import POVFARM, ROOT, need, run_povray
from helpers.clients import ANIMATION, PART, BashClient, fields
from helpers.farm_in_a_box import KEY, SCENE, Farm, manifest, pov_job
from helpers.invariants import broken
from helpers.pictures import chunk, png, png_file, png_rows
from povfarm import Coordinator, Httpov, JobOptions, PovJob, Router

WHO = "client=anna:17&version=1.2"
OTHER = "client=bob:4&version=1.2"
PYTHON = "client=eva:4&version=2.2"
RECORDED = ROOT / "tests" / "data" / "httpov"


class OldFarm(Farm):
    """A farm that lets HTTPov's clients in."""

    def __init__(self, root: Path, *args: Any, **more: Any) -> None:
        super().__init__(root, *args, **more)
        self.router = Router(self.api, Httpov(self.scheduler, self.access),
                             authenticate=self.access.identify)

    @property
    def guest_key(self) -> str:
        return self.access.guest_key

    def get(self, query: str, who: str = WHO, **more: Any) -> str:
        """What a client is answered, whose server address ends in the key."""
        reply = self.ask("GET", f"/{self.guest_key}/httpov.php?command={query}&{who}", key=None,
                         **more)
        assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/plain")
        return reply.body.decode()

    def batch(self, job: int, who: str = WHO) -> Dict[str, str]:
        """Fetch a batch as clients do: first the job, then a batch of it."""
        assert f"\njob={job}\n" in self.get("getjob", who)
        return fields(self.get(f"getbatch&job={job}", who))

    def post(self, batch: str, files: Mapping[str, bytes], who: str = WHO, job: int = 1) -> str:
        return self.upload(batch, zipped(files), who, job)

    def upload(self, batch: str, data: bytes, who: str = WHO, job: int = 1) -> str:
        kind, body = curl_form(data)
        reply = self.ask(
            "POST", f"/{self.guest_key}/httpov.php?command=postbatch&job={job}&batch={batch}&{who}",
            key=None, body=body, headers={"content-type": kind})
        assert reply.status == 200
        return reply.body.decode()


def zipped(files: Mapping[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("N_frame_00000001/", b"")
        for name, contents in files.items():
            archive.writestr(name, contents)
    return data.getvalue()


def frames(*numbers: int, **more: bytes) -> Dict[str, bytes]:
    """What a client packs: the pictures of these frames."""
    folder = f"N_frame_{numbers[0]:08d}"
    return {f"{folder}/N_{number}.png": png(number) for number in numbers}


def curl_form(data: bytes) -> Tuple[str, bytes]:
    edge = "------------------------d74496d66958873e"
    head = (f'--{edge}\r\nContent-Disposition: form-data; name="filedata"; filename="N.zip"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n")
    return (f"multipart/form-data; boundary={edge}",
            head.encode() + data + f"\r\n--{edge}--\r\n".encode())


@pytest.fixture(name="farm")
def farm_fixture(tmp_path: Path) -> Iterator[OldFarm]:
    one = OldFarm(tmp_path / "data")
    yield one
    problems = [*one.problems(), *map(str, one.leftovers())]
    assert not problems, "\n".join(problems)
    one.close()


# --- letting in

def test_the_key_is_in_the_path_or_the_name_of_the_group(farm: OldFarm) -> None:
    key, hello = farm.guest_key, "command=hello&client=a:1&version=1.2"
    assert re.fullmatch("[0-9a-f]{32}", key) and key not in KEY and KEY not in key
    for method in ("GET", "POST"):
        for target in (f"/{key}/httpov.php?{hello}", f"/httpov.php?{hello}&cgroup={key}",
                       f"/{key}/httpov.php?{hello}&cgroup=mine"):
            reply = farm.ask(method, target, key=None)
            assert (reply.status, reply.body) == (
                200, b"message=HTTPov server version 0.8 ready.\n"), target


def test_a_python_client_with_the_key_in_its_address_ends_before_it_renders(farm: OldFarm) -> None:
    """It fetches and renders with such an address, and ends when it is to deliver the picture."""
    farm.submit(1)
    assert farm.get("getjob", PYTHON).startswith("error=the Python client delivers nothing")
    reply = farm.ask("GET", f"/httpov.php?command=getjob&{PYTHON}&cgroup={farm.guest_key}", key=None)
    assert reply.body.startswith(b"command=getbatch\n")


def test_any_other_key_is_told_where_it_belongs_and_slowed_down(farm: OldFarm) -> None:
    """Both clients print a line with error, and end; what is not 200 makes one try for minutes."""
    def took(target: str) -> float:
        began = farm.clock.mono
        reply = farm.ask("GET", target, key=None, remote="10.0.0.66")
        assert (reply.status, reply.body) == ((404, reply.body) if target[:6] == "/jobs/" else (
            200, b"error=the key is wrong: set HP_GROUP to the one that 'povfarm.py serve --httpov' "
            b"prints\n"))
        return farm.clock.mono - began

    wrong = [f"/{KEY}/httpov.php?command=hello&{WHO}", f"/httpov.php?command=hello&{WHO}",
             f"/httpov.php?command=hello&{WHO}&cgroup={KEY}",
             f"/{farm.guest_key[:-1]}/httpov.php?command=hello&{WHO}",
             f"/x/httpov.php?command=hello&{WHO}&cgroup={farm.guest_key}", "/jobs/1-ball-abc.zip"]
    assert [took(target) for target in wrong[:5]] == [0] * 5
    assert [took(target) > 0 for target in wrong] == [True] * 6
    assert farm.ask("GET", "/api/v1/jobs", key=farm.guest_key).status == 401


def test_whoever_guesses_from_an_address_holds_up_only_that(farm: OldFarm) -> None:
    farm.access._held["10.0.0.66"] = povfarm.MAX_HELD
    target = f"/{farm.guest_key}/httpov.php?command=hello&{WHO}"
    assert farm.ask("GET", target, key=None, remote="10.0.0.66").status == 429
    assert farm.ask("GET", target, key=None).status == 200


def test_the_name_of_an_archive_cannot_be_guessed(farm: OldFarm) -> None:
    farm.submit(2)
    farm.submit(2)
    name = fields(farm.get("getjob"))["name"]
    for wrong in ("1-ball", f"1-ball-{'0' * 24}", name[:-1], f"2{name[1:]}", f"x{name}", f"9{name[1:]}"):
        assert farm.ask("GET", f"/jobs/{wrong}.zip").status == 404, wrong
    assert farm.ask("GET", f"/jobs/{name}.zip", key=None).status == 200


def test_by_itself_a_coordinator_knows_nothing_of_httpov(tmp_path: Path) -> None:
    for httpov, status in ((False, 404), (True, 200)):
        farm = Coordinator(tmp_path / str(httpov), bind="127.0.0.1", durable=False, httpov=httpov)
        target = f"/{farm.access.guest_key}/httpov.php"
        query = {"command": "hello", "client": "a:1", "version": "1.2"}
        assert farm.router.handle(povfarm.Request("GET", target, query)).status == status
        farm.stop()


def test_one_command_makes_both_clients_join(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, httpov=True)
    (tmp_path / ".httpovclient").mkdir()
    prefs = tmp_path / ".httpovclient" / "prefs"
    prefs.write_text('HP_SERVER="old"\nHP_POV="mine"\n')
    try:
        options = argparse.Namespace(bind="127.0.0.1", httpov=False, sheepit=False,
                                     renderonline=False)
        povfarm._greet(farm, options, None)
        assert "HTTPov" not in capsys.readouterr().out
        options.httpov = True
        povfarm._greet(farm, options, None)
        command = re.search("HTTPov clients join: +(.*)", capsys.readouterr().out)
        assert command and farm.key not in command[1]
        for _ in range(2):
            subprocess.run(["bash", "-c", command[1]], env={"HOME": str(tmp_path), "PATH": os.defpath},
                           check=True)
        wanted = [f"127.0.0.1:{farm.port}", farm.access.guest_key, "mine", "30", "0"]
        numbers = ("sleepmax", "HP_TRYTIMES")
        shown = subprocess.run(
            ["bash", "-c", f'. {prefs}; echo "$HP_SERVER $HP_GROUP $HP_POV" '
             '$sleepmax $HP_TRYTIMES; test $(date +%s) -lt $HP_VERPER'], check=True,
            capture_output=True, text=True).stdout.split()
        names: Dict[str, str] = {}
        exec(prefs.read_text(), names)  # as the Python client reads it
        assert wanted == shown == [names["HP_SERVER"], names["HP_GROUP"], names["HP_POV"],
                                   *(str(names[name]) for name in numbers)]
    finally:
        farm.stop()


# --- the replies

@pytest.mark.parametrize("query, reply", [
    ("command=hello&version=1.2", "message=HTTPov server version 0.8 ready.\n"),
    (f"command=getjob&{WHO}", "command=sleep\n"),
    ("command=getjob&client=a:1&version=1.1",
     "command=sleep\nmessage=HTTPov client 1.2 or later recommended.\n"),
    ("command=getjob&client=a:1&version=3.2.1", "command=sleep\n"),
    (f"command=getbatch&job=1&{WHO}", "command=getjob\n"),
    (f"command=getbatch&job=x&{WHO}", "command=getjob\n"),
    ("command=getbatch&job=1&client=a:1&version=1.0", "command=getjob\n"),
    (f"command=postbatch&job=1&batch=1&{WHO}", "status=error\n"),
    (f"command=abortbatch&job=1&batch=1&{WHO}", "status=error\n"),
    (f"command=active&job=1&batch=1&{WHO}", "status=ok\n"),
    (f"command=dance&{WHO}", "command=unknown\n"), (WHO, "command=unknown\n"),
    ("command=_lease&client=a:1&version=1.2", "command=unknown\n"),
    ("command=getjob&version=1.2", "error=client must be in the request\n"),
    ("command=getbatch&version=1.2", "error=job and client must be in the request\n"),
    (f"command=active&{WHO}", "error=job and batch must be in the request\n"),
    ("command=getjob&client=a&version=1.2", "error=client must be in the request\n"),
    ("command=getjob&client=a:x&version=1.2", "error=client must be in the request\n"),
    *((f"command=getjob&client=a:1{version}",
       "command=sleep\nmessage=HTTPov client 1.0 or later required.\n")
      for version in ("", "&version=", "&version=0.9", "&version=1", "&version=.2", "&version=x.2")),
])
def test_a_reply_is_these_lines_in_this_order(query: str, reply: str, farm: OldFarm) -> None:
    answer = farm.ask("GET", f"/{farm.guest_key}/httpov.php?{query}", key=None)
    assert (answer.status, answer.body.decode()) == (200, reply)


def test_a_job_and_a_batch_are_named_in_the_order_that_clients_expect(farm: OldFarm) -> None:
    job = farm.submit(3)
    answer = farm.get("getjob")
    match = re.fullmatch("command=getbatch\njob=1\nname=(1-ball-[0-9a-f]{24})\nframes=3\n", answer)
    assert match, answer
    batch = farm.get(f"getbatch&job={job}")
    assert re.fullmatch(
        "command=render\nbatch=[0-9a-f]{32}\nstartframe=1\nstopframe=1\n", batch), batch
    assert "\nmessage=HTTPov client 1.2" in farm.get("getjob", "client=c:1&version=1.1")
    assert "message" not in farm.get(f"getbatch&job={job}", "client=c:1&version=1.1")


def test_an_answer_that_was_lost_is_given_again(farm: OldFarm) -> None:
    job = farm.submit(3)
    assert farm.get("getjob") == farm.get("getjob")
    batch = farm.get(f"getbatch&job={job}")
    assert batch == farm.get(f"getbatch&job={job}") and farm.states(job).count("leased") == 1
    assert fields(farm.get(f"getbatch&job={job}", OTHER))["startframe"] == "2"


def test_a_batch_is_of_the_job_that_the_client_has(farm: OldFarm) -> None:
    first, second = farm.submit(2), farm.submit(2, name="cube", priority=5)
    assert "job=2\n" in farm.get("getjob")
    assert farm.get(f"getbatch&job={first}").startswith("command=render\n")
    assert farm.states(first) == ["leased", "queued"] and farm.states(second)[0] == "leased"


def test_clients_are_workers_of_their_own(farm: OldFarm) -> None:
    job = farm.submit(3)
    for who in (WHO, OTHER, WHO, f"{OTHER}&cgroup=attic"):
        farm.get("getjob", who)
    views = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert [(view["name"], view["system"], view["state"], view["tags"]) for view in views] == [
        ("anna", "HTTPov", "working", []), ("bob", "HTTPov", "working", ["attic"])]
    second = fields(farm.get(f"getbatch&job={job}", "client=anna:18&version=1.2"))
    assert second["startframe"] == "3" and farm.states(job) == ["leased"] * 3
    assert {one: fields(farm.get(f"getbatch&job={job}", f"client=anna:{one}&version=1.2"))
            ["startframe"] for one in (17, 18)} == {17: "1", 18: "3"}
    farm.get(f"abortbatch&job={job}&batch={second['batch']}")  # another one's of its computer
    assert farm.states(job) == ["leased"] * 3
    farm.get(f"abortbatch&job={job}&batch={second['batch']}", "client=anna:18&version=1.2")
    assert farm.states(job) == ["leased", "leased", "queued"] and len(farm.scheduler.live_workers()) == 2
    for secret in ("HTTPov anna:17", "anna:17"):  # nobody is let in by a name
        assert farm.ask("GET", "/api/v1/farm", key=secret).status == 401
    farm.scheduler.remove_worker(views[0]["id"])
    assert farm.get("getjob") == "error=this client was removed from the farm\n"


def test_too_many_computers_are_told_to_come_later(
        farm: OldFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "MAX_GUESTS", 2)
    for who in (WHO, OTHER, f"{OTHER}1"):
        assert farm.get("getjob", who) == "command=sleep\n"
    late = "client=late:1&version=1.2"
    for command in ("getjob", "getbatch&job=1", "active&job=1&batch=1"):
        assert farm.get(command, late) == "command=sleep\nmessage=Too many clients work here.\n"
    farm.clock.advance(povfarm.CLIENT_PAUSE + 1)
    assert farm.get("getjob", late) == "command=sleep\n"


def test_a_computer_that_was_forgotten_may_come_again(farm: OldFarm) -> None:
    farm.get("getjob")
    farm.clock.advance(povfarm.KEEP_GUESTS + 1)
    farm.scheduler.tidy()
    assert farm.ask("GET", "/api/v1/workers").json()["workers"] == []
    job = farm.submit(1)
    assert farm.post(farm.batch(job)["batch"], {"N_0.png": png(1)}) == "status=ok\n"
    assert [view["name"] for view in farm.ask("GET", "/api/v1/workers").json()["workers"]] == ["anna"]


def test_a_broken_client_in_a_loop_does_not_fail_a_good_job(farm: OldFarm) -> None:
    """It is started again and again, each time with another number; one that is well looks in."""
    job, failed = farm.submit(12), 0
    for number in range(100):
        who = f"client=broken:{number + 1}&version=1.2"
        farm.get("getjob", who)
        batch = fields(farm.get(f"getbatch&job={job}", who))
        if batch["command"] == "render":
            farm.get(f"abortbatch&job={job}&batch={batch['batch']}", who)
            failed += 1
        farm.clock.advance(1)
        if number % 20 == 5 and farm.state(job) == "active":
            good = farm.batch(job)
            farm.post(good["batch"], frames(*range(
                int(good["startframe"]), int(good["stopframe"]) + 1)))
        elif number % 20 < 5 or number % 20 > 15:
            farm.get("getjob")
    while farm.state(job) == "active":
        good = farm.batch(job)
        farm.post(good["batch"], frames(*range(int(good["startframe"]), int(good["stopframe"]) + 1)))
    assert failed > 1 and farm.states(job) == ["done"] * 12


def test_a_job_in_fixed_batches_is_given_to_clients_in_these(farm: OldFarm) -> None:
    job = farm.submit(10, batch=4)
    found = []
    for number in range(3):
        batch = farm.batch(job, f"client=c{number}:1&version=1.2")
        found.append((batch["startframe"], batch["stopframe"]))
    assert found == [("1", "4"), ("5", "8"), ("9", "10")]


# --- what comes back

@pytest.mark.parametrize("form", ["curl", "python"])
def test_what_is_uploaded_is_the_frames(form: str, farm: OldFarm) -> None:
    job = farm.submit(1, values={"Initial_Frame": "9", "Final_Frame": "10"})
    batch = farm.batch(job)
    data = zipped({"N_frame_00000009/N_09.png": png(9), "N_frame_00000009/batchreport.txt": b"hm"})
    kind, body = curl_form(data)
    if form == "python":
        edge = "---------HTTPov_file_upload_boundary_$"
        kind, body = kind.replace("-" * 24 + "d74496d66958873e", edge), body.replace(
            b"-" * 24 + b"d74496d66958873e", edge.encode())
    reply = farm.ask("POST", f"/httpov.php?command=postbatch&job={job}&batch={batch['batch']}&{WHO}"
                     f"&cgroup={farm.guest_key}", key=None, body=body, headers={
                         "content-type": kind})
    assert reply.body == b"status=ok\n"
    assert farm.states(job) == ["done", "queued"]
    assert farm.ask("GET", f"/api/v1/jobs/{job}/frames/9/image").body == png(9)
    assert farm.ask("GET", f"/api/v1/jobs/{job}/frames/9/log").body.endswith(b"hm")


def test_a_whole_job_and_then_there_is_none(farm: OldFarm) -> None:
    job = farm.submit(3)
    for frame in (1, 2, 3):
        batch = farm.batch(job)
        assert batch["startframe"] == batch["stopframe"] == str(frame)
        farm.clock.advance(20)
        assert farm.post(batch["batch"], frames(frame)) == "status=ok\n"
    assert farm.get(f"getbatch&job={job}") == "command=getjob\n"
    assert farm.get("getjob") == "command=sleep\n"
    assert farm.state(job) == "done" and farm.job(job).wall == 60


def test_a_second_upload_changes_nothing(farm: OldFarm) -> None:
    """The Python client renders its last batch again when there is none, and posts it as job 0."""
    job = farm.submit(2)
    batch = farm.batch(job)["batch"]
    assert farm.post(batch, frames(1)) == "status=ok\n"
    before = farm.tasks(job)
    again = {"N_frame_00000001/N_1.png": png(99)}
    assert farm.get(f"active&job=0&batch={batch}") == "status=ok\n"
    assert farm.post(batch, again, job=0) == farm.post(batch, again) == "status=ok\n"
    assert farm.tasks(job) == before
    assert farm.ask("GET", f"/api/v1/jobs/{job}/frames/1/image").body == png(1)


def test_whoever_is_first_wins_and_the_other_is_thanked(farm: OldFarm) -> None:
    job = farm.submit(1)
    first = farm.batch(job)["batch"]
    farm.clock.advance(131)
    farm.scheduler.expire()
    second = farm.batch(job, OTHER)["batch"]
    assert first != second
    assert farm.post(first, {"N_0.png": png(1)}) == "status=ok\n"  # late, and taken
    assert farm.state(job) == "done"
    assert farm.post(second, {"N_0.png": png(2)}, OTHER) == "status=ok\n"
    assert farm.ask("GET", f"/api/v1/jobs/{job}/frames/0/image").body == png(1)


@pytest.mark.parametrize("data, words", [
    (b"", "damaged"), (b"no zip", "damaged"), (zipped(frames(1))[50:], "damaged"),
    (zipped({}), "frame 1 is not in"),
    (zipped({"N_2.png": png(1)}), "frame 1 is not in"),
    (zipped({"N_1.ppm": png(1)}), "frame 1 is not in"),
    (zipped({"N_1.png": png(1)[:-20]}), "PNG"), (zipped({"N_1.png": png(1, width=9)}), "9"),
    (zipped({"../../N_1.png": png(1)}), "not a name"), (zipped({"/N_1.png": png(1)}), "not a name"),
    (zipped({f"{number}": b"" for number in range(1001)}), "more files"),
])
def test_an_upload_that_is_wrong_costs_a_try(data: bytes, words: str, farm: OldFarm) -> None:
    job = farm.submit(2)
    batch = farm.batch(job)["batch"]
    assert farm.upload(batch, data) == "status=error\n"
    assert farm.states(job) == ["queued", "queued"] and farm.task(job, 1).tries == 1
    failure = farm.ask("GET", f"/api/v1/jobs/{job}").json()["failure"]
    assert failure["frame"] == 1 and words in failure["message"]
    assert not list(farm.root.rglob("N_*"))


def test_a_wrong_upload_that_is_late_leaves_no_trace(farm: OldFarm) -> None:
    job = farm.submit(2)
    batch = farm.batch(job)["batch"]
    farm.clock.advance(131)
    farm.scheduler.expire()
    assert farm.post(batch, {"N_1.png": b"", "batchreport.txt": b"hm"}) == "status=error\n"
    assert farm.task(job, 1).tries == 0 and not list(farm.root.rglob("logs/*"))


def test_the_file_is_found_among_other_fields(farm: OldFarm) -> None:
    job = farm.submit(2)
    batch = farm.batch(job)["batch"]
    kind, body = curl_form(zipped(frames(1)))
    edge = body.partition(b"\r\n")[0]
    body = edge + b'\r\nContent-Disposition: form-data; name="other"\r\n\r\nx\r\n' + body
    farm.ask("POST", f"/{farm.guest_key}/httpov.php?command=postbatch&job={job}&batch={batch}&{WHO}",
             key=None, body=body, headers={"content-type": kind})
    assert farm.states(job) == ["done", "queued"]


def test_a_form_without_the_file_is_an_error(farm: OldFarm) -> None:
    job = farm.submit(2)
    for body, kind in ((b"x=1", "application/x-www-form-urlencoded"), (b"--e--", "multipart/form-data; boundary=e"),
                       (b"\r\n--e\r\nname=\"other\"\r\n\r\nx\r\n--e--", "multipart/form-data; boundary=e"),
                       (b"", "")):
        reply = farm.ask("POST", f"/{farm.guest_key}/httpov.php?command=postbatch&job={job}"
                         f"&batch={farm.batch(job)['batch']}&{WHO}", key=None, body=body,
                         headers={"content-type": kind})
        assert reply.body == b"status=error\n"


# --- leases

def test_a_client_that_says_every_minute_that_it_renders_keeps_its_batch(farm: OldFarm) -> None:
    job = farm.submit(2)
    batch = farm.batch(job)["batch"]
    for _ in range(10):
        farm.clock.advance(60)
        farm.scheduler.expire()
        assert farm.states(job)[0] == "leased"
        assert farm.get(f"active&job={job}&batch={batch}") == "status=ok\n"
    farm.clock.advance(129)
    farm.scheduler.expire()
    assert farm.states(job)[0] == "leased" and farm.scheduler.live_workers()
    farm.clock.advance(2)
    farm.scheduler.expire()
    assert farm.states(job)[0] == "queued" and not farm.scheduler.live_workers()


def test_a_client_that_has_delivered_is_there(farm: OldFarm) -> None:
    """It asks for the next batch a moment later, and was silent for long while it rendered."""
    job = farm.submit(3)
    for deliver in (lambda batch: farm.post(batch["batch"], frames(int(batch["startframe"]))),
                    lambda batch: farm.post(batch["batch"], {"none.txt": b""})):
        batch = farm.batch(job)
        farm.clock.advance(59)
        deliver(batch)
        assert [view["state"] for view in farm.ask("GET", "/api/v1/workers").json()["workers"]] == [
            "idle"]


def test_fetching_the_archive_may_take_as_long(farm: OldFarm) -> None:
    job = farm.submit(2)
    farm.get("getjob")
    batches = set()
    for _ in range(3):
        farm.clock.advance(100)
        farm.scheduler.expire()
        batches.add(farm.get(f"getbatch&job={job}"))
    assert farm.states(job) == ["leased", "queued"] and len(batches) == 1


def test_ours_are_missed_as_soon_as_ever(farm: OldFarm) -> None:
    job = farm.submit(2)
    farm.lease(farm.worker())
    farm.batch(job)
    farm.clock.advance(31)
    farm.scheduler.expire()
    assert farm.states(job) == ["queued", "leased"]


def test_the_batch_outlives_a_restart(tmp_path: Path) -> None:
    farm = OldFarm(tmp_path)
    job = farm.submit(2)
    batch = farm.batch(job)["batch"]
    farm.store.close()
    farm = OldFarm(tmp_path)
    farm.clock.advance(100)
    farm.scheduler.expire()
    assert farm.states(job)[0] == "leased"
    assert fields(farm.get(f"getbatch&job={job}"))["batch"] == batch
    assert farm.post(batch, frames(1)) == "status=ok\n" and farm.problems() == []
    farm.close()


def test_a_batch_is_its_own_clients(farm: OldFarm) -> None:
    job = farm.submit(2)
    batch = farm.batch(job)["batch"]
    assert farm.get(f"abortbatch&job={job}&batch={batch}", OTHER) == "status=error\n"
    assert farm.post(batch, frames(1), OTHER) == "status=error\n"
    assert farm.states(job) == ["leased", "queued"]
    farm.clock.advance(100)
    farm.get(f"active&job={job}&batch={batch}", OTHER)
    farm.clock.advance(31)
    farm.scheduler.expire()
    assert farm.states(job) == ["queued", "queued"]


def test_frames_that_failed_together_are_tried_one_by_one(farm: OldFarm) -> None:
    """A client fails with all of a batch at once and ends; one frame may be to blame."""
    job = farm.submit(60, name="cheap")
    for _ in range(4):
        batch = farm.batch(job)
        first, last = int(batch["startframe"]), int(batch["stopframe"])
        farm.clock.advance(2 * (last - first + 1))
        farm.post(batch["batch"], frames(*range(first, last + 1)))
    batch = farm.batch(job)
    first, last = int(batch["startframe"]), int(batch["stopframe"])
    assert last > first + 1
    assert farm.get(f"abortbatch&job={job}&batch={batch['batch']}") == "status=error\n"
    assert {farm.task(job, frame).tries for frame in range(first, last + 1)} == {1}
    after = []
    while not after or after[-1]:
        farm.get(f"getjob&client=c{len(after)}:1&version=1.2", "")
        batch = fields(farm.get(f"getbatch&job={job}&client=c{len(after)}:1&version=1.2", ""))
        after.append(range(int(batch.get("startframe", 1)), int(batch.get("stopframe", 0)) + 1))
    assert after[0][0] == last + 1  # what failed comes last, and alone
    assert after[-1 - (last - first + 1):] == [
        *(range(frame, frame + 1) for frame in range(first, last + 1)), range(1, 1)]


def test_a_client_that_failed_has_ended_and_nobody_waits_for_it(farm: OldFarm) -> None:
    job, worker = farm.submit(2), farm.worker("ours")
    batch = farm.batch(job)
    farm.get(f"abortbatch&job={job}&batch={batch['batch']}", OTHER)  # not its own: nothing happens
    assert len(farm.scheduler.live_workers()) == 3
    farm.get(f"abortbatch&job={job}&batch={batch['batch']}")
    views = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert {view["name"]: view["state"] for view in views} == {
        "ours": "idle", "anna": "gone", "bob": "idle"}
    assert farm.render(worker, job) == [1, 2]
    log = farm.ask("GET", f"/api/v1/jobs/{job}/frames/1/log").body.decode()
    assert "frame 1 on anna: failed: POV-Ray failed" in log


# --- which jobs

@pytest.mark.parametrize("values, options, uses, files", [
    ({"Output_File_Type": "J"}, {}, (), {}), ({"Output_File_Type": "P"}, {}, (), {}),
    ({"Frame_Step": "2"}, {}, (), {}), ({}, {"in_order": True}, (), {}),
    ({"Height": "600", "Output_Alpha": "On"}, {"slices": "3"}, (), {}), ({}, {"radiosity": "animation"}, ("radiosity",), {}),
    ({}, {}, ("own-output",), {}), ({}, {}, ("photons", "load_file a.ph"), {}),
    ({}, {}, (), {"\u00fc.inc": b""}), ({"Input_File_Name": "\u00fc.pov"}, {}, (), {}),
    ({"Initial_Frame": "5", "Final_Frame": "5"}, {}, (), {}),
])
def test_a_job_that_clients_would_render_otherwise_is_not_given_to_them(
        values: Dict[str, str], options: Dict[str, Any], uses: Tuple[str, ...],
        files: Dict[str, bytes], farm: OldFarm) -> None:
    job = farm.submit(4, values=values, uses=uses, files={"scene.pov": SCENE, **files}, **options)
    assert farm.get("getjob") == "command=sleep\n"
    assert farm.get(f"getbatch&job={job}") == "command=getjob\n"
    name = next(tag for tag in farm.router.routes if tag.route.pattern == "/jobs/<name>.zip")
    with farm.store.read() as tx:
        seal = name.handler.__self__._name(tx.job(job))  # type: ignore[attr-defined]
    assert farm.ask("GET", f"/jobs/{seal}.zip", key=None).status == 404
    assert farm.leases(farm.worker())


@pytest.mark.parametrize("place", ["run_dir", "library", "none"])
def test_a_job_of_which_files_would_be_found_elsewhere_is_not_given_to_them(
        place: str, farm: OldFarm) -> None:
    base = pov_job(3)
    jobs = {"run_dir": PovJob(base.values, (), base.library, "sub"),
            "library": PovJob(base.values, (), ("inc", *base.library), "."),
            "none": PovJob(base.values, (), (), ".")}
    _, missing = farm.scheduler.submit("x", "admin", jobs[place], manifest({"scene.pov": SCENE}),
                                       JobOptions())
    farm.scheduler.put_blob(missing[0], [SCENE])
    assert farm.get("getjob") == "command=sleep\n"


def test_a_job_whose_files_come_later_is_given_to_them_with_all_of_them(farm: OldFarm) -> None:
    for after in (None, 2):
        files = [povfarm.FileEntry("scene.pov", povfarm.hashlib.sha256(SCENE).hexdigest(),
                                   len(SCENE), 1.0, after)]
        _, missing = farm.scheduler.submit("x", "admin", pov_job(3, Width=str(4 + (after or 0))),
                                           povfarm.Manifest(tuple(files)), JobOptions())
        for sha256 in missing:
            farm.scheduler.put_blob(sha256, [SCENE])
    assert farm.get("getbatch&job=1").startswith("command=render\n")
    assert farm.get("getbatch&job=2", OTHER).startswith("command=render\n")


BIG = {"Width": "4", "Height": "600"}


ALPHA = {**BIG, "Output_Alpha": "On"}


def test_clients_get_no_slices_with_alpha_and_leave_frames_to_be_sliced(farm: OldFarm) -> None:
    job = farm.submit(3, values=ALPHA)
    ours = [farm.worker(name) for name in ("anna", "berta", "carla", "dora")]
    for worker in ours:
        farm.lease(worker)
    assert {task.parent is None for task in farm.tasks(job)} == {True}
    assert farm.get("getjob") == "command=sleep\n"
    farm.clock.advance(31)  # ours are gone: better whole than not at all
    farm.scheduler.expire()
    batch = farm.batch(job)
    assert batch["command"] == "render" and "slice" not in batch


def test_a_slice_does_not_wait_for_a_client(farm: OldFarm) -> None:
    job = farm.submit(1, values=ALPHA, slices="2")
    worker = farm.worker()
    farm.get("getjob")
    lease = farm.lease(worker)
    assert lease.tasks[0].kind is povfarm.TaskKind.SLICE
    farm.fail(worker, lease)
    farm.get("getjob")
    assert farm.lease(worker).tasks == lease.tasks, "there is nobody else who could"
    assert farm.state(job) == "active"


def test_a_frame_to_compare_does_not_wait_for_a_client_that_never_gets_it(farm: OldFarm) -> None:
    job = farm.submit(2, verify=100, values={"Output_File_Type": "B"})
    worker = farm.worker()
    farm.get("getjob")
    lease = farm.lease(worker)
    image = farm_bmp()
    farm.finish(worker, lease, image=image)
    assert farm.states(job)[0] == "done"


# --- slices

def ppm(rows: bytes, width: int = 4, height: int = 600, most: int = 255, form: int = 6) -> bytes:
    """A picture as POV-Ray writes it with +FP, of rows that may be fewer than it has."""
    size = width * height * (3 if form == 6 else 2) * (1 + (most > 255))
    return (b"P%d\n# Software: POV-Ray 3.7.0.10.unofficial\n%d %d\n%d\n"
            % (form, width, height, most)) + rows.ljust(size, b"\0")


def noise(rows: int, width: int = 4, size: int = 3) -> bytes:
    return random.Random(rows).randbytes(rows * width * size)


def strip(rows: bytes, bits: int = 8) -> bytes:
    """What one of ours delivers of a slice."""
    step = 4 * 3 * bits // 8
    filtered = b"".join(b"\0" + rows[at:at + step] for at in range(0, len(rows), step))
    return png_file(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 4, len(rows) // step, bits, 2, 0, 0, 0)),
        chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"IDAT", zlib.compress(filtered)),
        chunk(b"IEND", b""))


def sliced(picture: bytes, number: int = 0, report: bytes = b"printed") -> Dict[str, bytes]:
    return {f"N_frame_00000000/slice_{number:04d}.ppm": picture,
            f"N_frame_00000000/batchreport_{number:04d}.txt": report}


@pytest.mark.parametrize("bits, size", [("8", 3), ("16", 6)])
def test_clients_render_slices_of_one_picture_with_ours(bits: str, size: int, farm: OldFarm) -> None:
    job = farm.submit(1, values={**BIG, "Bits_Per_Color": bits}, slices="3")
    first, most = farm.get("getjob") and farm.get(f"getbatch&job={job}"), (1 << int(bits)) - 1
    assert re.fullmatch("command=render\nbatch=[0-9a-f]{32}\nstartframe=0\nstopframe=0\nslice=0\n"
                        "startrow=1\nendrow=200\n", first), first
    second = farm.get(f"getbatch&job={job}", OTHER)
    assert second.endswith("\nslice=1\nstartrow=201\nendrow=400\n")
    assert farm.get(f"getbatch&job={job}", OTHER) == second
    worker, rows = farm.worker("ours"), noise(600, size=size)
    mine = farm.lease(worker)
    assert (mine.tasks[0].top, mine.tasks[0].bottom) == (400, 600)
    step = 4 * size
    for text, top, bottom, who in ((second, 200, 400, OTHER), (first, 0, 200, WHO)):
        farm.clock.advance(5)
        picture = ppm(bytes(top * step) + rows[top * step:bottom * step], most=most)
        assert farm.post(fields(text)["batch"], sliced(picture), who) == "status=ok\n"
    farm.finish(worker, mine, image=strip(rows[400 * step:], int(bits)))
    assert farm.states(job) == ["done"]
    image = farm.ask("GET", f"/api/v1/jobs/{job}/frames/0/image").body
    assert b"".join(png_rows(image)) == rows
    log = farm.ask("GET", f"/api/v1/jobs/{job}/frames/0/log").body.decode()
    assert "frame 0, rows 0 to 199 on anna: done\nprinted" in log
    totals = farm.ask("GET", "/api/v1/totals").json()["computers"]
    assert {view["name"]: round(3 * view["frames"], 6) for view in totals} == {
        "anna": 1, "bob": 1, "ours": 1}


@pytest.mark.parametrize("picture, words", [
    (ppm(b"")[:-1], "ends too early"), (ppm(b"") + b"x", "goes on"), (b"", "empty"),
    (ppm(b"", height=200), "4 x 200 pixels, not 4 x 600"), (ppm(b"", width=5), "5 x 600"),
    (ppm(b"", most=65535), "three colours of 8 bits"), (ppm(b"", most=31), "three colours of 8 bits"),
    (ppm(b"", form=5), "three colours of 8 bits"), (png(1, height=600), "not a PPM"),
])
def test_a_slice_that_is_wrong_costs_a_try(picture: bytes, words: str, farm: OldFarm) -> None:
    job = farm.submit(1, values=BIG, slices="2")
    batch = farm.batch(job)["batch"]
    assert farm.post(batch, sliced(picture)) == "status=error\n"
    failure = farm.ask("GET", f"/api/v1/jobs/{job}").json()["failure"]
    assert words in failure["message"] and farm.states(job) == ["queued"]


def test_whole_frames_are_no_slices_and_slices_no_frames(farm: OldFarm) -> None:
    job = farm.submit(1, values=BIG, slices="2")
    assert farm.post(farm.batch(job)["batch"], {"N_0.png": png(1, height=600)}) == "status=error\n"
    other = farm.submit(2, values=BIG, slices="off", priority=9)
    batch = farm.batch(other, OTHER)["batch"]
    assert farm.post(batch, sliced(ppm(b"")), OTHER, other) == "status=error\n"
    assert farm.states(job) == ["queued"] and farm.states(other) == ["queued", "queued"]


def test_slices_are_of_the_rows_that_are_asked_for(farm: OldFarm) -> None:
    """The first and the last have what is outside of them, which the client leaves black."""
    job = farm.submit(1, values={**BIG, "Start_Row": "101", "End_Row": "500"}, slices="2")
    rows, found = noise(600), []
    for who in (WHO, OTHER):
        batch = farm.batch(job, who)
        found.append((batch["startrow"], batch["endrow"]))
        top, bottom = int(batch["startrow"]) - 1, int(batch["endrow"])
        picture = ppm(bytes(12 * top) + rows[12 * top:12 * bottom])
        assert farm.post(batch["batch"], sliced(picture), who) == "status=ok\n"
    assert found == [("101", "300"), ("301", "500")]
    image = farm.ask("GET", f"/api/v1/jobs/{job}/frames/0/image").body
    assert b"".join(png_rows(image)) == bytes(1200) + rows[1200:6000] + bytes(1200)


def test_anti_aliased_slices_begin_with_a_block(farm: OldFarm) -> None:
    job = farm.submit(1, values={**BIG, "Antialias": "On"}, slices="7")
    ends = []
    for number in range(7):
        batch = farm.batch(job, f"client=c{number}:1&version=1.2")
        assert (int(batch["startrow"]) - 1) % 32 == 0
        ends.append(int(batch["endrow"]))
    assert ends[-1] == 600


def test_a_slice_of_which_others_got_the_lower_rows_is_taken_with_all_of_them(farm: OldFarm) -> None:
    job, ours, rows = farm.submit(1, values=BIG), list(map(farm.worker, "abc")), noise(600)
    batch = farm.batch(job, OTHER)
    top, bottom = int(batch["startrow"]) - 1, int(batch["endrow"])
    grant = next(iter(farm.scheduler.grants))
    for part in (0.1, 0.2):
        farm.scheduler.beat(grant.worker, {grant.id: dict.fromkeys(grant.portions, part)}, 0.0)
        farm.clock.advance(20)
    for worker in ours * 20:
        farm.beat(worker)
        for lease in farm.leases(worker) if not grant.cut else ():
            task = lease.tasks[0]
            if not grant.cut:
                farm.finish(worker, lease, image=strip(rows[12 * task.top:12 * task.bottom]))
    assert grant.cut
    assert grant.cut[1] < bottom
    assert fields(farm.get(f"getbatch&job={job}", OTHER)) == batch, "it knows nothing of that"
    picture = ppm(bytes(12 * top) + rows[12 * top:12 * bottom])
    assert farm.post(batch["batch"], sliced(picture), OTHER) == "status=ok\n"
    assert farm.states(job) == ["done"]
    image = farm.ask("GET", f"/api/v1/jobs/{job}/frames/0/image").body
    assert b"".join(png_rows(image)) == rows
    frames = {view["name"]: view["frames"] for view in farm.ask(
        "GET", "/api/v1/totals").json()["computers"]}
    assert frames["bob"] == (bottom - top) / 600 and sum(frames.values()) == pytest.approx(1)


def farm_bmp() -> bytes:
    """A picture of the box's size, as a BMP."""
    rows = bytes(12) * 3
    return (b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 4, 3, 1, 24, 0, len(rows), 0, 0, 0, 0) + rows)


# --- the archive

def test_an_archive_is_one_directory_and_always_the_same_bytes(farm: OldFarm) -> None:
    base = pov_job(12)
    pov = PovJob({**base.values, "Antialias": "On"}, ('Look="red"',),
                 (*base.library, "lib", "."), ".")
    files = {"scene.pov": SCENE, "lib/deep/a.inc": b"a", "pov.ini": b"evil", "povray.ini": b"evil",
             "POV.INI": b"evil", "lib/pov.ini": b"a text"}
    farm.scheduler.submit("My ball!", "admin", pov, manifest(files), JobOptions())
    for data in set(files.values()):
        farm.scheduler.put_blob(povfarm.hashlib.sha256(data).hexdigest(), [data])
    name = fields(farm.get("getjob"))["name"]
    assert re.fullmatch("1-My-ball-[0-9a-f]{24}", name)
    one = farm.ask("GET", f"/jobs/{name}.zip", key=None)
    two = farm.ask("GET", f"/{farm.guest_key}/jobs/{name}.zip", key=None)
    assert one.status == two.status == 200 and one.body == two.body
    with zipfile.ZipFile(io.BytesIO(one.body)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{name}/{path}" for path in (
            "", "lib/", "lib/deep/", "pov.ini", "lib/deep/a.inc", "lib/pov.ini", "scene.pov")]
        ini = archive.read(f"{name}/pov.ini").decode().splitlines()
        assert archive.getinfo(f"{name}/").external_attr >> 16 == 0o40755
    assert {"Initial_Frame=1", "Final_Frame=12", "Antialias=On", "Width=4", "Height=3",
            "Output_File_Type=N", "Library_Path=\"lib\"", "Library_Path=\".\""} <= set(ini)
    assert not [line for line in ini if "Output_File_Name" in line or "POVRAY" in line]


def test_a_still_is_the_first_frame_of_an_animation(farm: OldFarm) -> None:
    farm.submit(1, values={"Clock": "0.3"})
    answer = fields(farm.get("getjob"))
    assert answer["frames"] == "1"
    ini = povfarm.client_ini(pov_job(1, Clock="0.3")).splitlines()
    assert {"Initial_Frame=0", "Final_Frame=2", "Initial_Clock=0.3", "Final_Clock=0.3"} <= set(ini)
    assert not [line for line in ini if line.startswith("Clock")]
    batch = fields(farm.get("getbatch&job=1"))
    assert (batch["startframe"], batch["stopframe"]) == ("0", "0")


@pytest.mark.parametrize("values, frames_line", [
    ({"Initial_Frame": "0", "Final_Frame": "9"}, "9"), ({"Final_Frame": "10"}, "10"),
    ({"Final_Frame": "9", "Cyclic_Animation": "On"}, "10"),
    ({"Initial_Frame": "100", "Final_Frame": "124", "Subset_End_Frame": "104"}, "124"),
])
def test_frames_has_as_many_digits_as_the_names_that_povray_gives(
        values: Dict[str, str], frames_line: str, farm: OldFarm) -> None:
    job = farm.submit(1, values=values)
    assert fields(farm.get("getjob"))["frames"] == frames_line
    digits = re.sub(r"out|\.png", "", farm.tasks(job)[0].name)
    assert len(digits) == len(frames_line)


def test_radiosity_is_gathered_by_one_thread_as_our_workers_do(farm: OldFarm) -> None:
    farm.submit(3, uses=("radiosity",))
    assert farm.get("getjob").startswith("command=getbatch\n")
    assert "Work_Threads=1\n" in povfarm.client_ini(pov_job(3, ("radiosity",)))
    assert "Work_Threads" not in povfarm.client_ini(pov_job(3))


def test_what_the_clients_own_ini_file_might_say_is_said(farm: OldFarm) -> None:
    ini = povfarm.client_ini(PovJob({"Input_File_Name": "a.pov"}, (), (povfarm.STANDARD,), "."))
    assert {"Antialias=Off", "Width=160", "Height=120", "Output_To_File=On"} <= set(
        ini.splitlines())


# --- recorded conversations

def told(sock: socket.socket) -> bytes:
    """The body of an answer."""
    with sock, http.client.HTTPResponse(sock) as answer:
        answer.begin()
        return answer.read()


@pytest.mark.parametrize("name", ["bash-sliced", "python-sliced"])
def test_a_recorded_client_is_answered_as_it_was(name: str, tmp_path: Path) -> None:
    """Byte for byte, but for the numbers of batches, the name of the job, and the key."""
    project, farm = {}, Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, httpov=True)
    packed = (RECORDED / name / "02-archive.response").read_bytes().partition(b"\r\n\r\n")[2]
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        for path in archive.namelist():
            if not path.endswith(("/", ".ini")):
                project[path.partition("/")[2]] = archive.read(path)
    pov = PovJob({"Input_File_Name": "scene.pov", "Output_File_Name": "ball", "Width": "64",
                  "Height": "64", "Initial_Frame": "0", "Final_Frame": "1", "Antialias": "On",
                  "Antialias_Threshold": "0.3"}, (), (povfarm.STANDARD,), ".")
    farm.scheduler.submit("ball", "admin", pov, manifest(project), JobOptions(slices="2"))
    for data in project.values():
        farm.scheduler.put_blob(povfarm.hashlib.sha256(data).hexdigest(), [data])
    farm.start()
    key, batch, calls, rows = farm.access.guest_key.encode(), b"", 0, {0: b"", 1: b""}
    known = {b"ball": b"ball"}
    try:
        for path in sorted((RECORDED / name).glob("*.request")):
            data = path.read_bytes()
            recorded = path.with_suffix(".response").read_bytes().partition(b"\r\n\r\n")[2]
            data = (data.replace(b" /", b" /" + key + b"/", 1) if name == "bash-sliced" else
                    data.replace(b"cgroup=attic", b"cgroup=" + key, 1))
            data = re.sub(rb"&batch=\d+", b"&batch=" + batch, data, count=1)
            data = data.replace(b"/ball.zip", b"/" + known[b"ball"] + b".zip", 1)
            sock = socket.create_connection(("127.0.0.1", farm.port), timeout=60)
            sock.sendall(data)
            answer = told(sock)
            found = re.search(rb"batch=(\w+)", answer)
            batch = found[1] if found else batch
            if "archive" in path.name:
                with zipfile.ZipFile(io.BytesIO(answer)) as archive:
                    assert {one.partition("/")[2]: archive.read(one) for one in archive.namelist()
                            if not one.endswith(("/", ".ini"))} == project
                continue
            if answer.startswith(b"command=getbatch"):
                known[b"ball"] = answer.split()[2][5:]
                recorded = recorded.replace(b"ball", known[b"ball"]).replace(
                    b"frames=2", b"frames=1")  # of which only the number of digits counts
            calls += 1
            assert answer == re.sub(rb"batch=\d+", b"batch=" + batch, recorded), path.name
            if b"filedata" in data:
                edge = re.search(rb"boundary=(\S+)", data)
                assert edge
                body = data.partition(b"\r\n\r\n")[2].partition(b"\r\n\r\n")[2]
                with zipfile.ZipFile(io.BytesIO(body[:body.rfind(b"\r\n--" + edge[1])])) as archive:
                    sent = next(one for one in archive.namelist() if one.endswith(".ppm"))
                    frame, number = int(sent[11:19]), int(sent[-8:-4])
                    pixels = archive.read(sent)[-64 * 64 * 3:]
                    rows[frame] = rows[frame][:6144 * number] + pixels[6144 * number:][:6144]
        with farm.store.read() as tx:
            assert [task.state for task in tx.tasks(1)] == ["done", "done"]
            views = {view["name"]: view for view in farm.api.views.workers(tx)}
        assert views["host1"]["tags"] == (["attic"] if name == "bash-sliced" else [])
        assert calls == {"bash-sliced": 11, "python-sliced": 12}[name]
        assert broken(farm.scheduler) == []
    finally:
        farm.stop()
    for frame in (0, 1):
        image = (tmp_path / "data" / "jobs" / "1-ball" / f"ball{frame}.png").read_bytes()
        assert b"".join(png_rows(image)) == rows[frame]


# --- a client's own steps, with the real POV-Ray

INI = """Input_File_Name=scene.pov
Width=40
Height=30
Antialias=On
Antialias_Threshold=0.1
Initial_Frame=8
Final_Frame=10
Initial_Clock=-0.7
Final_Clock=1.3
Library_Path=parts
Output_Alpha=On
File_Gamma=1.8
"""


def chunks(data: bytes) -> List[Tuple[bytes, bytes]]:
    """All of a PNG but the time at which it was made."""
    found, at = [], 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        found.append((kind, data[at + 8:at + 8 + size]))
        at += size + 12
    return [(kind, re.sub(rb"Date: [-0-9 :]+Z", b"", body)) for kind, body in found
            if kind != b"tIME"]


@pytest.mark.parametrize("way, args, number", [
    ("path", ["scene.ini"], 3), ("group", ["scene.ini", "+SF9", "+EF9", "+KFI0"], 1),
    ("group", ["scene.pov", "+W40", "+H30", "+K0.3", "+Lparts"], 1),
])
def test_a_clients_pictures_are_those_of_plain_povray(
        way: str, args: List[str], number: int, povray: str, tmp_path: Path) -> None:
    for program in ("curl", "zip", "unzip"):
        need(program, shutil.which(program) is not None, f"apt-get install {program}")
    project, plain, place = (tmp_path / name for name in ("project", "plain", "client"))
    (project / "parts").mkdir(parents=True)
    (project / "scene.pov").write_text(ANIMATION)
    (project / "scene.ini").write_text(INI)
    (project / "colours.inc").write_text("#declare Mine = rgb <0.2, 0.9, 0.4>;\n")
    (project / "parts" / "part.inc").write_text(PART)
    place.mkdir()
    shutil.copytree(project, plain)
    assert run_povray(args, plain).returncode == 0
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, httpov=True)
    farm.start()
    try:
        done = subprocess.run(
            [*POVFARM, "submit", "--server", farm.url, "--key",
             farm.key, "--name", "Ball game", *args], cwd=project, capture_output=True, text=True,
            timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        address = farm.url.partition("//")[2]
        client = (BashClient(f"{address}/{farm.access.guest_key}", "", place) if way == "path"
                  else BashClient(address, farm.access.guest_key, place))
        client.work()
        with farm.store.read() as tx:
            assert [row.state for row in tx.tasks(1)] == ["done"] * number
        assert broken(farm.scheduler) == []
    finally:
        farm.stop()
    made = {path.name: path for path in (tmp_path / "data" / "jobs").rglob("*.png")}
    expected = {path.name: path for path in plain.glob("*.png")}
    assert len(expected) == number and made.keys() == expected.keys()
    for name, path in expected.items():
        assert chunks(made[name].read_bytes()) == chunks(path.read_bytes()), name


SLICED = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 1, -5> look_at clock * y }
light_source { <5, 5, -5>, 1 }
plane { y, -1 pigment { checker rgb 1, rgb <0.2, 0.3, 0.6> } }
sphere { 0, 1 pigment { rgb <1, 0.5, 0> } finish { phong 0.7 } }
"""


@pytest.mark.parametrize("args, frames, ours", [
    (["+FN8", "+A0.1", "+KFI3", "+KFF4"], 2, True), (["+FN16", "+SR25", "+ER170"], 1, False),
])
def test_slices_of_clients_and_ours_make_the_picture_of_plain_povray(
        args: List[str], frames: int, ours: bool, povray: str, tmp_path: Path) -> None:
    for program in ("curl", "zip", "unzip"):
        need(program, shutil.which(program) is not None, f"apt-get install {program}")
    project, plain, place = (tmp_path / name for name in ("project", "plain", "client"))
    for one in (project, place):
        one.mkdir()
    (project / "scene.pov").write_text(SLICED)
    shutil.copytree(project, plain)
    command = ["scene.pov", "+W80", "+H192", *args]
    assert run_povray(command, plain).returncode == 0
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, httpov=True)
    farm.start()
    main = POVFARM
    reach = ["--server", farm.url, "--key", farm.key]
    try:
        done = subprocess.run(
            [*main, "submit", *reach, "--slices", "4", *command], cwd=project, check=False,
            capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        client = BashClient(f"{farm.url.partition('//')[2]}/{farm.access.guest_key}", "", place)
        job = client.ask("command=getjob")
        client.run("curl", "-sS", "-o", "job.zip", f"{client.server}/jobs/{job['name']}.zip")
        client.run("unzip", "-o", "job.zip")
        assert client.render(job)
        if ours:
            subprocess.run([*main, "work", *reach, "--until-idle", "--cores", "1", "--data",
                            str(tmp_path / "worker")], check=True, capture_output=True, timeout=60)
        else:
            while client.render(job):
                pass
        with farm.store.read() as tx:
            assert [row.state for row in tx.tasks(1)] == ["done"] * frames
            totals = farm.api.views.totals(tx)["workers"]
        assert client.slices == (1 if ours else 4) and len(totals) == 1 + ours
        assert sum(view["frames"] for view in totals) == pytest.approx(frames)
        assert broken(farm.scheduler) == []
    finally:
        farm.stop()
    made = sorted((tmp_path / "data" / "jobs").rglob("*.png"))
    expected = sorted(plain.glob("*.png"))
    assert len(expected) == frames and [path.name for path in made] == [
        path.name for path in expected]
    for one, other in zip(made, expected):
        assert one.read_bytes()[:29] == other.read_bytes()[:29]  # size, depth and colours
        assert png_rows(one.read_bytes()) == png_rows(other.read_bytes()), one.name
