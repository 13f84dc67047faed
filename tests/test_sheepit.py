"""SheepIt's clients: recorded conversations, every status of the protocol, and whole animations."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple
from xml.etree import ElementTree

import pytest

import povfarm
from helpers.base import POVFARM, ROOT, need, run_povray, tried, wait_until
from helpers.clients import ANIMATION, FORM, MACHINE, PART, SheepitClient, form_of
from helpers.farm import environment, run
from helpers.farm_in_a_box import KEY, SCENE, FakeClock, Farm, Reply, manifest, pov_job
from helpers.invariants import broken
from helpers.pictures import png, png_rows
from povfarm import (
    BodyReader,
    Coordinator,
    JobOptions,
    PovJob,
    Request,
    Role,
    Router,
    Sheepit,
    secret_hash,
    sheepit_password,
)
from tools import fuzz

RECORDED = ROOT / "tests" / "data" / "sheepit"
VERSIONS = ("2015-03", "2016-10")
PASSWORD = sheepit_password(secret_hash(KEY))
ADMIN = {"login": "admin", "password": PASSWORD}


class Flock(Farm):
    """A farm that lets SheepIt's clients in."""

    def __init__(self, root: Path, *args: Any, **more: Any) -> None:
        super().__init__(root, *args, **more)
        self.sheepit = Sheepit(self.scheduler, self.access, KEY)
        self.router = Router(self.api, self.entrance, self.sheepit, authenticate=self.access.identify)

    def restarted(self) -> Flock:
        again = super().restarted()
        again.store.close()
        clock = FakeClock(mono=5.0)
        clock.wall = again.clock.wall
        return Flock(self.root, clock)

    def person(self, name: str, role: Role = Role.USER) -> Dict[str, str]:
        """Add somebody; return what the client is started with."""
        key = self.access.add(name, role, {}, "ticket")
        return {"login": name, "password": sheepit_password(secret_hash(key))}

    def send(self, what: str, values: Mapping[str, str] = {}, cookie: str = "", body: bytes = b"",
             method: str = "POST", headers: Mapping[str, str] = {}, remote: str = "10.0.0.7",
             alive: Any = lambda: True) -> Reply:
        lines = {"host": "box", **headers, **({"cookie": cookie} if cookie else {})}
        path = what if what.startswith("/") else f"/server/{what}.php"
        return Reply(self.router.handle(Request(
            method, path, dict(values), lines, BodyReader.of(body), remote, target=path,
            alive=alive)))

    def told(self, what: str, *args: Any, **more: Any) -> ElementTree.Element:
        """What a client is answered, as its strict parser sees it."""
        reply = self.send(what, *args, **more)
        assert reply.status == 200, reply.body
        assert reply.headers["Content-Type"].startswith("text/xml")
        return ElementTree.fromstring(reply.body)

    def status(self, what: str, *args: Any, **more: Any) -> int:
        return int(self.told(what, *args, **more).attrib["status"])

    def client(self, login: Mapping[str, str] = ADMIN, **machine: str) -> str:
        """Log in; return the cookie, as the old client sends it back."""
        reply = self.send("config", {**MACHINE, **login, **machine}, method="GET")
        assert b'status="0"' in reply.body, reply.body
        return str(reply.headers["Set-Cookie"])

    def job_of(self, cookie: str) -> Dict[str, str]:
        """Ask for a job that there is."""
        said = self.told("request_job", {"computemethod": "1"}, cookie)
        job = said.find("job")
        assert said.attrib["status"] == "0" and job is not None, ElementTree.tostring(said)
        return dict(job.attrib)

    def deliver(self, job: Mapping[str, str], cookie: str, image: Optional[bytes] = None,
                **values: str) -> int:
        return self.status(
            "send_frame", {"job": job["id"], "frame": job["frame"], "rendertime": "2",
                           "memoryused": "12500", "extras": "", **values}, cookie,
            form_of(png(int(job["frame"])) if image is None else image), headers=FORM)


def worker_of(cookie: str) -> int:
    return int(cookie.partition("=")[2].partition(".")[0])


@pytest.fixture(name="farm")
def farm_fixture(tmp_path: Path) -> Iterator[Flock]:
    one = Flock(tmp_path / "data")
    yield one
    problems = [*one.problems(), *map(str, one.leftovers()), *map(
        str, (tmp_path / "data" / "incoming").glob("*"))]
    assert not problems, "\n".join(problems)
    one.close()


# --- config

def test_by_itself_a_coordinator_knows_nothing_of_sheepit(tmp_path: Path) -> None:
    for sheepit in (False, True):
        farm = Coordinator(tmp_path / str(sheepit), bind="127.0.0.1", durable=False,
                           sheepit=sheepit)
        for path in ("/server/config.php", "/server/request_job.php", "/account.php"):
            reply = farm.router.handle(Request("GET", path))
            assert reply.status == (200 if sheepit else 404), path
        assert any(isinstance(getattr(one, "__self__", None), Sheepit)
                   for one in farm.access.dialects) == sheepit
        farm.stop()


def test_a_login_is_told_where_to_ask(farm: Flock) -> None:
    reply = farm.send("config", {**MACHINE, **ADMIN}, method="GET")
    assert reply.body.decode() == (
        '<?xml version="1.0" encoding="utf-8" ?>\n<config status="0" publickey="">'
        '<request type="validate-job" path="/server/send_frame.php"/>'
        '<request type="request-job" path="/server/request_job.php"/>'
        '<request type="download-archive" path="/server/download.php"/>'
        '<request type="error" path="/server/error.php"/>'
        '<request type="keepmealive" path="/server/keepmealive.php" max-period="120"/>'
        '<request type="logout" path="/account.php?mode=logout&amp;worker=1"/></config>')
    assert re.fullmatch(r"PHPSESSID=\d+\.[0-9a-f]{32}; path=/; HttpOnly",
                        reply.headers["Set-Cookie"])
    row = farm.ask("GET", "/api/v1/workers").json()["workers"][0]
    assert (row["name"], row["system"], row["cores"], row["memory"], row["address"]) == (
        "admin@host1", "SheepIt linux", 2, 24903680 * 1024, "10.0.0.7")


@pytest.mark.parametrize("status, change", [
    (104, {"login": ""}), (104, {"password": ""}), (102, {"password": "s3cret"}),
    (102, {"login": "nobody"}), (102, {"login": "farm"}), (102, {"login": "#1"}),
    (102, {"password": KEY}), (102, {"password": secret_hash(KEY)}), (102, {"login": "\u00fc"}),
    (100, {"version": ""}), (101, {"version": "2.9.9"}), (101, {"version": "new"}),
    (104, {"os": ""}), (104, {"bits": ""}), (104, {"cpu_cores": ""}), (104, {"cpu_cores": "0"}),
    (104, {"cpu_cores": "many"}), (0, {"version": "3.3.1762"}), (0, {"version": "3.3.2"}),
    (0, {"hostname": "\u00e4 b\n<c>"}), (0, {"hostname": "x" * 300}), (0, {"ram": "9" * 15}),
    (0, {"os": "<&\"" * 9}),
])
def test_every_status_of_config(status: int, change: Mapping[str, str], farm: Flock) -> None:
    values = {**MACHINE, **ADMIN, **change}
    assert farm.status("config", values, method="GET") == status
    form = urllib.parse.urlencode(values).encode()
    assert farm.status("config", {}, "", form, headers={
        "content-type": "application/x-www-form-urlencoded"}) == status
    for name in ("login", "password", "version", "os", "bits", "cpu_cores"):
        fewer = {key: value for key, value in values.items() if key != name}
        assert farm.status("config", fewer) in (100, 101, 102, 104)
    assert bool(farm.ask("GET", "/api/v1/workers").json()["workers"]) == (status == 0)


def test_wrong_passwords_are_slowed_down_like_wrong_keys(farm: Flock) -> None:
    began = farm.clock.mono
    for _ in range(povfarm.FREE_TRIES + 3):
        assert farm.status("config", {**MACHINE, **ADMIN, "password": "x"}) == 102
    assert farm.clock.mono > began
    farm.access._held["10.0.0.7"] = povfarm.MAX_HELD
    assert farm.status("config", {**MACHINE, **ADMIN}) == 999
    assert farm.status("config", {**MACHINE, **ADMIN}, remote="10.0.0.8") == 0


def test_a_password_is_good_for_nothing_else(farm: Flock) -> None:
    anna = farm.person("anna")
    cookie = farm.client(anna)
    for secret in (anna["password"], f"anna:{anna['password']}", PASSWORD):
        assert farm.ask("GET", "/api/v1/jobs", key=secret).status == 401, secret
    for method, path in (("GET", "/api/v1/users"), ("POST", "/api/v1/login"),
                         ("POST", "/api/v1/lease")):
        reply = farm.ask(method, path, key=None, headers={"cookie": cookie})
        assert reply.status in (401, 403), path


def test_a_person_who_is_gone_has_no_session(farm: Flock) -> None:
    job, anna = farm.submit(3), farm.person("anna")
    cookie = farm.client(anna)
    task = farm.job_of(cookie)
    farm.scheduler.people.remove("anna")
    assert farm.deliver(task, cookie) == 304 and "done" not in farm.states(job)
    assert farm.status("request_job", {}, cookie) == 202
    assert farm.status("keepmealive", {"job": "1", "frame": "1"}, cookie) == 400
    assert farm.status("config", {**MACHINE, **anna}, cookie) == 102
    assert farm.send("download", {"type": "job", "job": "1"}, cookie).status == 404
    farm.access.add("anna", Role.USER, {}, "another ticket")  # another one of that name
    assert farm.status("request_job", {}, cookie) == 202


def test_who_is_removed_while_it_waits_gets_nothing(farm: Flock) -> None:
    anna = farm.person("anna")
    cookie = farm.client(anna)

    def meanwhile() -> None:
        farm.submit(2)
        with farm.store.tx() as tx:  # so that the wait goes on
            tx.drop_person("anna")

    farm.clock.meanwhile.append(meanwhile)
    assert farm.status("request_job", {}, cookie) == 202
    assert farm.states(1) == ["queued", "queued"]


def test_clients_on_one_computer_are_workers_of_their_own_and_keep_their_record(
        farm: Flock) -> None:
    one, two = farm.client(), farm.client()
    assert worker_of(one) != worker_of(two)
    assert worker_of(farm.client(hostname="host2")) not in (worker_of(one), worker_of(two))
    assert worker_of(farm.client(farm.person("anna"))) > 3
    farm.send("/account.php", {"mode": "logout"}, two, method="GET")
    assert worker_of(farm.client()) == worker_of(two)
    again = farm.send("config", {**MACHINE, **ADMIN}, one)
    assert worker_of(str(again.headers["Set-Cookie"])) == worker_of(one)
    farm.clock.advance(200)
    assert worker_of(farm.client()) == worker_of(one)


def test_a_login_has_so_many_clients_and_no_more(
        farm: Flock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "MAX_CLIENTS", 3)
    cookies = [farm.client(hostname=f"host{number}") for number in range(3)]
    assert farm.status("config", {**MACHINE, **ADMIN, "hostname": "new"}) == 999
    anna = farm.person("anna")
    assert [farm.status("config", {**MACHINE, **anna, "login": login, "hostname": "new"})
            for login in ("anna", "Anna", "ANNA", "anNa")] == [0, 0, 0, 999]
    farm.send("/account.php", {}, cookies[1], method="GET")
    assert worker_of(farm.client(hostname="new")) == worker_of(cookies[1])


def test_who_has_a_session_is_no_stranger_there_and_one_elsewhere(farm: Flock) -> None:
    """Requests for jobs are held open: of strangers only so many may be at a time."""
    cookie = farm.client()
    for path, good in (("/server/request_job.php", True), ("/account.php", True),
                       ("/api/v1/jobs", False), ("/", False)):
        identity = farm.access.identify(Request("GET", path, headers={"cookie": cookie}))
        assert identity.trusted == good and identity.worker == good * worker_of(cookie), path


def test_the_cookie_cannot_be_made_up(farm: Flock) -> None:
    cookie = farm.client()
    other = farm.client(hostname="host2")
    farm.submit(3)
    for wrong in ("", "PHPSESSID=", "PHPSESSID=1", "PHPSESSID=1." + "0" * 32, "PHPSESSID=abc123",
                  cookie.replace("=1.", "=2."), other.replace("=2.", "=1."),
                  cookie.replace("=1.", "=99."), cookie[:30]):
        assert farm.status("request_job", {}, wrong) == 202, wrong
        assert farm.status("send_frame", {"job": "1", "frame": "1"}, wrong) == 304
        assert farm.send("download", {"job": "1", "type": "job"}, wrong).status == 404
    for form in (cookie, cookie.partition(";")[0], f"a=b; {cookie}"):
        assert farm.job_of(form)["frame"] == "0001"


# --- request_job

REQUIRED = {  # what the clients of 2015, 2016, 2019 and 2020 cannot do without
    "job": {"id", "archive_md5", "path", "revision", "use_gpu", "frame", "extras", "name",
            "password", "synchronous_upload", "validation_url"},
    "renderer": {"md5", "commandline", "update_method"}, "frames": {"remaining"},
    "stats": {"credits_session", "credits_total", "frame_remaining", "waiting_project",
              "connected_machine", "renderable_project"}}


def test_a_frame_is_told_as_all_clients_need_it(farm: Flock) -> None:
    farm.submit(12, name="A <b> & \"c\" \u0007\u00e9\u4e2d")
    said = farm.told("request_job", {"computemethod": "1"}, farm.client(),
                     b'<?xml version="1.0" encoding="UTF-8" standalone="no"?><cache/>',
                     headers={"content-type": "application/x-www-form-urlencoded"})
    elements = {element.tag: element for element in said.iter()}
    for name, needed in REQUIRED.items():
        assert needed <= elements[name].attrib.keys(), name
    job = elements["job"].attrib
    assert (job["frame"], job["path"], job["synchronous_upload"], job["use_gpu"]) == (
        "0001", "pov.ini", "0", "0")
    assert job["name"].startswith('A <b> & "c" ') and "\u4e2d" in job["name"]
    assert elements["renderer"].attrib["commandline"] == ".e .c .o .f"
    assert elements["frames"].attrib["remaining"] == "12"
    assert elements["script"].text, "those since the end of 2019 take no empty element"
    assert "status" in said.attrib and "publickey" not in said.attrib
    assert job["validation_url"] == f"http://box/server/send_frame.php?job={job['id']}&frame=1"


def test_a_client_of_2020_sends_a_frame_where_it_is_told(farm: Flock) -> None:
    """It takes what is told as encoded, and says no more than this."""
    job, cookie = farm.submit(1), farm.client()
    url = urllib.parse.unquote_plus(farm.job_of(cookie)["validation_url"])
    parts = urllib.parse.urlsplit(f"{url}&rendertime=2&memoryused=12500")
    assert farm.status(parts.path, dict(urllib.parse.parse_qsl(parts.query)), cookie,
                       form_of(png(0)), headers=FORM) == 0
    assert farm.states(job) == ["done"]


def test_what_xml_cannot_hold_is_told_as_a_question_mark() -> None:
    assert povfarm._tag("a", {"b": "\0\x1b\ud800\uffff<\"'&\u00e9"}) == \
        '<a b="????&lt;&quot;&#x27;&amp;\u00e9"/>'


@pytest.mark.parametrize("frames, values, name", [
    (1, {}, "0000"), (3, {}, "0001"), (3, {"Initial_Frame": "9998", "Final_Frame": "10000"}, "09998"),
])
def test_no_name_of_an_image_begins_like_anothers(
        frames: int, values: Dict[str, str], name: str, farm: Flock) -> None:
    """Clients take the first file of which the name begins with job and frame."""
    farm.submit(frames, values=values)
    assert farm.job_of(farm.client())["frame"] == name


def test_every_refusal_of_a_job_request(farm: Flock) -> None:
    for role in (Role.VIEWER, Role.SUBMIT):
        who = farm.client(farm.person(f"p-{role.value}", role))
        assert farm.status("request_job", {}, who) == 201
    cookie = farm.client(hostname="nothing")
    assert farm.status("request_job", {"computemethod": "1"}, cookie) == 200  # after hours
    assert farm.clock.mono > 1000 + povfarm.SESSION_WAIT - 1
    assert farm.status("request_job", {}, cookie, alive=lambda: False) == 999
    farm.submit(3)
    assert farm.status("request_job", {"computemethod": "2"}, cookie) == 205
    assert farm.status("request_job", {}, farm.client(os="windows")) == 205
    for system in ("linux", "mac"):
        assert farm.status("request_job", {}, farm.client(os=system, hostname=system)) == 0
    with farm.store.tx() as tx:
        tx.set_aside(worker_of(cookie), "its pictures differ")
    assert farm.status("request_job", {}, cookie) == 203
    farm.send("/account.php", {}, cookie, method="GET")
    mended = farm.client(hostname="nothing")  # as with our own workers that are started again
    assert worker_of(mended) == worker_of(cookie) and farm.status("request_job", {}, mended) == 0
    gone = farm.client(hostname="gone")
    farm.scheduler.remove_worker(worker_of(gone))
    assert farm.status("request_job", {}, gone) == 203
    assert farm.status("config", {**MACHINE, **ADMIN}, gone) == 103


def test_a_request_is_held_open_until_there_is_work(farm: Flock) -> None:
    cookie = farm.client()
    farm.clock.meanwhile.extend([lambda: None] * 9 + [lambda: farm.submit(2)])
    began = farm.clock.mono
    assert farm.job_of(cookie)["frame"] == "0001"
    assert 200 < farm.clock.mono - began < 300


def test_who_hangs_up_after_a_minute_of_silence_hears_blanks_until_there_is_work(
        farm: Flock) -> None:
    """So do clients of 2020: what they say of their cache is XML that begins otherwise."""
    cookie = farm.client()
    farm.clock.meanwhile.extend([lambda: None] * 9 + [lambda: farm.submit(2)])
    began = farm.clock.mono
    reply = farm.send("request_job", {"computemethod": "1"}, cookie, b"<cache/>")
    head, blanks, _ = re.split(rb"( *)(?=<jobrequest)", reply.body, maxsplit=1)
    assert head == b'<?xml version="1.0" encoding="utf-8" ?>\n'
    assert ElementTree.fromstring(reply.body).attrib["status"] == "0"
    assert 200 < farm.clock.mono - began < 30 * (len(blanks) + 1)
    assert farm.status("request_job", {}, farm.client(), b"<cache/>", alive=lambda: False) == 999


def test_an_answer_that_was_lost_is_given_again(farm: Flock) -> None:
    farm.submit(3)
    cookie = farm.client()
    assert farm.job_of(cookie) == farm.job_of(cookie)
    assert farm.job_of(farm.client())["frame"] == "0002"


@pytest.mark.parametrize("values, options, uses", [
    ({"Frame_Step": "2"}, {}, ()), ({}, {"in_order": True}, ()), ({}, {"slices": "3"}, ()),
    ({}, {"radiosity": "animation"}, ("radiosity",)), ({}, {}, ("own-output",)),
    ({"Input_File_Name": "\u00fc.pov"}, {}, ()),
])
def test_a_job_that_clients_would_render_otherwise_is_not_given_to_them(
        values: Dict[str, str], options: Dict[str, Any], uses: Tuple[str, ...],
        farm: Flock) -> None:
    farm.submit(4, values=values, uses=uses, **options)
    assert farm.status("request_job", {}, farm.client(), alive=lambda: farm.clock.mono < 2000) == 999
    assert farm.ask("GET", "/api/v1/jobs/1").json()["waiting_for"] == (
        "the clients of other systems that are there do not get it (see the manual): start a "
        "worker with 'povfarm.py work'")
    assert farm.leases(farm.worker())


@pytest.mark.parametrize("letter", povfarm.IMAGE_TYPES)
def test_every_format_is_rendered(letter: str, farm: Flock) -> None:
    farm.submit(2, values={"Output_File_Type": letter})
    cookie = farm.client()
    farm.job_of(cookie)
    packed = farm.send("download", {"type": "job", "job": "1"}, cookie).body
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert f"Output_File_Type={letter}\n" in archive.read("pov.ini").decode()


def test_a_client_has_one_frame_at_a_time_however_cheap(farm: Flock) -> None:
    job, cookie, given = farm.submit(60), farm.client(), []
    for _ in range(60):
        task = farm.job_of(cookie)
        farm.clock.advance(1)
        given.append(int(task["frame"]))
        assert farm.states(job).count("leased") == 1
        assert farm.deliver(task, cookie, rendertime="0") == 0
    assert given == list(range(1, 61)) and farm.state(job) == "done"
    assert farm.status("request_job", {}, cookie, alive=lambda: False) == 999


def test_a_session_outlives_a_restart(tmp_path: Path) -> None:
    farm = Flock(tmp_path / "data")
    job, anna = farm.submit(3), farm.person("anna")
    cookie = farm.client(anna)
    task = farm.job_of(cookie)
    farm = farm.restarted()
    assert farm.status("keepmealive", {"job": "1", "frame": "0001"}, cookie) == 0
    farm.clock.advance(960)  # it may be one of those that beat no more often
    farm.scheduler.expire()
    assert farm.states(job)[0] == "leased"
    again = farm.job_of(cookie)
    assert again == task, "the archive as well: the client has it already"
    assert farm.deliver(task, cookie) == 0 and farm.states(job) == ["done", "queued", "queued"]
    assert farm.problems() == []
    farm.close()


# --- download

def test_archives_are_always_the_same_bytes_and_have_the_md5_that_was_told(farm: Flock) -> None:
    base = pov_job(12)
    pov = PovJob(base.values, ('Look="red"',), (*base.library, "lib"), ".")
    files = {"scene.pov": SCENE, "lib/a.inc": b"a" * 100_000, "povray.ini": b"evil"}
    farm.scheduler.submit("My ball!", "admin", pov, manifest(files), JobOptions())
    for data in files.values():
        farm.scheduler.put_blob(povfarm.hashlib.sha256(data).hexdigest(), [data])
    cookie = farm.client()
    said = farm.told("request_job", {}, cookie)
    job, renderer = said.find("job"), said.find("job/renderer")
    assert job is not None and renderer is not None
    for kind, element, name in (("job", job, "archive_md5"), ("binary", renderer, "md5")):
        values = {"type": kind, "job": "1", "revision": "0"}
        one, two = (farm.send("download", values, cookie, method=method).body
                    for method in ("GET", "POST"))
        assert one == two and hashlib.md5(one).hexdigest() == element.attrib[name]
        with zipfile.ZipFile(io.BytesIO(one)) as archive:
            assert archive.testzip() is None
            assert {info.flag_bits & 8 for info in archive.infolist()} == {0}  # sizes come first
            names = archive.namelist()
            assert not [info for info in archive.infolist()
                        if not info.is_dir() and not info.external_attr >> 16 & stat.S_IXUSR]
        assert names == (["lib/", "pov.ini", "lib/a.inc", "scene.pov"] if kind == "job" else
                         ["rend.exe", "Blender/blender.app/Contents/MacOS/blender"])


def test_what_is_not_there_to_fetch_is_404(farm: Flock) -> None:
    cookie = farm.client()
    farm.submit(3)
    other = farm.submit(3, in_order=True)
    for values in ({}, {"type": "job"}, {"type": "job", "job": "x"}, {"type": "job", "job": "9"},
                   {"type": "dance", "job": "1"}, {"type": "job", "job": str(other)},
                   {"type": "binary", "job": "9" * 15}, {"job": "1"}):
        assert farm.send("download", values, cookie, method="GET").status == 404, values
    assert farm.send("download", {"type": "job", "job": "1"}, cookie, method="GET").status == 200
    assert farm.send("dance", {}, cookie).status == 404


def test_a_client_drops_the_archives_of_jobs_that_have_ended(farm: Flock) -> None:
    cookie, held = farm.client(), {}
    for number in range(1, 5):
        farm.submit(2, files={"scene.pov": b"sphere {} // %d" % number}, priority=number)
        held[number] = farm.job_of(cookie)["archive_md5"]
        farm.send("/account.php", {}, cookie, method="GET")
    farm.scheduler.cancel(2, "admin")
    farm.scheduler.delete(3, "admin")
    cache = "".join(f'<file md5="{md5}"/>' for md5 in [*held.values(), "0" * 32])
    said = farm.told("request_job", {}, cookie, f"<cache>{cache}</cache>".encode())
    assert said.attrib["status"] == "0"
    assert {(one.attrib["md5"], one.attrib["action"]) for one in said.findall("file")} == {
        (held[2], "delete"), (held[3], "delete")}
    assert not farm.told("request_job", {}, cookie, b"<cache/>").findall("file")
    for body in (b"\xff<cache", b'<file md5="' * 999, b"<!DOCTYPE x [<!ENTITY a 'b'>]>&a;"):
        assert farm.status("request_job", {}, cookie, body) == 0


# --- send_frame

def test_a_frame_is_checked_and_taken(farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    task = farm.job_of(cookie)
    assert farm.deliver(task, cookie) == 0
    row = farm.task(job, 1)
    assert (row.state, row.wall, row.memory) == ("done", 2.0, 12_500_000)
    assert farm.deliver(task, cookie) == 0, "the same again"
    assert farm.deliver(farm.job_of(cookie), cookie, rendertime="9" * 15) == 0
    assert farm.job(job).wall == 2.0 + povfarm.MAX_COST, "what a worker of ours may say, too"
    job, task = farm.submit(2), farm.job_of(cookie)
    farm.deliver(task, cookie)
    assert farm.states(job) == ["done", "queued"] and row.tries == 0


@pytest.mark.parametrize("status, values, body", [
    (300, {"job": ""}, None), (300, {"frame": ""}, None), (300, {"job": "x"}, None),
    (300, {"frame": "-1"}, None), (0, {"job": "99"}, None), (0, {"frame": "99"}, None),
    (303, {}, b""), (303, {}, form_of(png())[:-40]), (303, {}, form_of(png(), "other")),
    (302, {}, form_of(b"")), (302, {}, form_of(b"GIF89a")), (302, {}, form_of(png()[:-20])),
    (302, {}, form_of(png(1, 5, 3))), (302, {}, form_of(png(1, 4, 4))),
])
def test_every_status_of_send_frame(status: int, values: Mapping[str, str], body: Optional[bytes],
                                    farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    task = farm.job_of(cookie)
    given = {"job": task["id"], "frame": task["frame"], "rendertime": "x", "memoryused": "", **values}
    assert farm.status("send_frame", given, cookie, form_of(png()) if body is None else body,
                       headers=FORM) == status
    assert farm.task(job, 1).tries == (status == 302) and "done" not in farm.states(job)
    assert farm.deliver(task, cookie) == 0, "the client tries once more, or renders it again"
    assert farm.states(job) == ["done", "queued"]


def test_without_a_form_nothing_is_taken(farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    task = farm.job_of(cookie)
    values = {"job": task["id"], "frame": task["frame"]}
    assert farm.status("send_frame", values, cookie, png()) == 303
    assert farm.states(job) == ["leased", "queued"]


def test_only_a_client_that_keeps_failing_is_told_to_end(farm: Flock) -> None:
    job, cookie = farm.submit(20, retry_limit=9), farm.client()
    farm.finish(farm.worker(), farm.lease(farm.worker()))  # the scene is good
    bad = []
    for _ in range(6):
        task = farm.job_of(cookie)
        bad.append(farm.deliver(task, cookie, b"no picture"))
        assert farm.deliver(task, cookie, b"no picture") in (bad[-1], 301)
    assert bad == [302] * 5 + [301]
    assert sum(row.tries for row in farm.tasks(job)) == 6


def test_a_full_disk_is_not_the_clients_fault(farm: Flock, monkeypatch: pytest.MonkeyPatch) -> None:
    job, cookie = farm.submit(2), farm.client()
    task = farm.job_of(cookie)
    with monkeypatch.context() as patch:
        patch.setattr(povfarm, "free_room", lambda path: 0)
        assert farm.deliver(task, cookie) == 303
    assert farm.task(job, 1).tries == 0
    assert farm.deliver(task, cookie) == 0 and farm.states(job)[0] == "done"


def test_the_frame_of_another_is_not_taken(farm: Flock) -> None:
    job, cookie, other = farm.submit(2), farm.client(), farm.client()
    task = farm.job_of(cookie)
    assert farm.deliver(task, other) == 0
    assert farm.states(job) == ["leased", "queued"]
    assert farm.status("keepmealive", {"job": "1", "frame": "1"}, other) == 400
    farm.status("error", {"job": "1", "frame": "1", "type": "12"}, other, headers=FORM)
    farm.send("/account.php", {}, other, method="GET")
    assert farm.task(job, 1).tries == 0 and farm.states(job)[0] == "leased"


# --- keepmealive, error, logout

def test_a_client_that_beats_keeps_its_frame(farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    task = {"job": farm.job_of(cookie)["id"], "frame": "0001", "extras": ""}
    for values in ({}, task, {**task, "rendertime": "30", "remainingtime": "90"}, {}) * 4:
        farm.clock.advance(povfarm.CLIENT_SILENCE - 1)
        farm.scheduler.expire()
        assert farm.status("keepmealive", values, cookie, method="GET") == 0
        assert farm.states(job)[0] == "leased"
    view = farm.ask("GET", f"/api/v1/jobs/{job}/frames").json()["frames"][0]
    assert view["progress"] == 0.25
    farm.clock.advance(povfarm.CLIENT_SILENCE + 1)
    farm.scheduler.expire()
    assert farm.states(job)[0] == "queued"
    assert farm.status("keepmealive", task, cookie, method="GET") == 400


def test_a_client_that_beats_every_quarter_of_an_hour_keeps_its_frame(farm: Flock) -> None:
    """Those since the end of 2019 do, whatever they are told; what they say of their cache is
    XML that begins otherwise."""
    job, cookie = farm.submit(5), farm.client()
    quiet, other = b'<cache>\n   <file md5="0"/>\n</cache>', b'<?xml version="1.0"?><cache/>'
    for spent, cache, state in ((960, b"<cache/>", "leased"), (960, quiet, "leased"),
                                (1021, quiet, "queued"), (129, other, "leased"),
                                (131, other, "queued")):
        task = farm.told("request_job", {"computemethod": "1"}, cookie, cache).find("job")
        assert task is not None
        farm.clock.advance(spent)
        farm.scheduler.expire()
        assert farm.states(job)[int(task.attrib["frame"]) - 1] == state, (spent, cache)
        assert farm.deliver(task.attrib, cookie) == 0


@pytest.mark.parametrize("end", ["cancel", "delete", "done"])
def test_a_frame_that_nobody_wants_any_more_is_stopped(end: str, farm: Flock) -> None:
    job, cookie = farm.submit(1), farm.client()
    task = farm.job_of(cookie)
    values = {"job": task["id"], "frame": task["frame"]}
    assert farm.status("keepmealive", values, cookie) == 0
    if end == "done":
        farm.deliver(task, cookie)
    else:
        farm.ask("POST" if end == "cancel" else "DELETE", f"/api/v1/jobs/{job}" + (
            "/cancel" if end == "cancel" else ""))
    assert farm.status("keepmealive", values, cookie) == 400
    assert farm.status("keepmealive", {}, cookie) == 0
    assert farm.deliver(task, cookie) == 0, "what comes late ends nobody"


@pytest.mark.parametrize("told", [{}, {"rendertime": "61", "remainingtime": "9"}])
def test_a_frame_that_takes_too_long_is_stopped_and_has_failed(
        told: Mapping[str, str], farm: Flock) -> None:
    job, cookie = farm.submit(2, frame_timeout=60), farm.client()
    values = {"job": farm.job_of(cookie)["id"], "frame": "0001", **told}
    early = {**values, **({"rendertime": "59"} if told else {})}
    farm.clock.advance(60)
    assert farm.status("keepmealive", early, cookie) == 0
    farm.clock.advance(1)
    assert farm.status("keepmealive", values, cookie) == 400
    assert farm.task(job, 1).tries == 1
    assert "the frame took longer than 1:00 (see --frame-timeout)" in farm.ask(
        "GET", f"/api/v1/jobs/{job}/frames/1/log").body.decode()
    assert farm.status("error", {**values, "type": "22"}, cookie, form_of(LOG), headers=FORM) == 0
    assert farm.task(job, 1).tries == 1


LOG = b"""29-11 07:17:34 (debug) GUI Rendering
29-11 07:17:34 (debug) renderer output
29-11 07:17:34 (debug) Mem:1.00M (0.00M, Peak 12.50M)
29-11 07:17:35 (debug) pov: File 'scene.pov' line 8: Parse Error: Expected 'object', undeclared
29-11 07:17:35 (debug) pov: Fatal error in parser: Cannot parse input.
29-11 07:17:35 (debug) end of rendering
29-11 07:17:35 (error) Job::render no picture file found
"""


@pytest.mark.parametrize("body, line, log", [
    (form_of(LOG), "POV-Ray failed: File 'scene.pov' line 8: Parse Error: Expected 'object', "
     "undeclared", "Mem:1.00M (0.00M, Peak 12.50M)\nFile 'scene.pov' line 8"),
    (form_of(b"what \xff"), "the client gave it up (error 12)", "what"), (b"", "error 12", ""),
    (form_of(LOG)[:200], "error 12", ""),
])
def test_an_error_is_a_failed_try_with_its_log(body: bytes, line: str, log: str,
                                               farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    task = farm.job_of(cookie)
    values = {"type": "12", "frame": task["frame"], "job": task["id"], "render_time": "1"}
    for _ in range(2):
        assert farm.status("error", values, cookie, body, headers=FORM) == 0
        assert farm.task(job, 1).tries == 1
    text = farm.ask("GET", f"/api/v1/jobs/{job}/frames/1/log").body.decode()
    assert line in text and log in text and "GUI" not in text


@pytest.mark.parametrize("text", [b"renderer output\n", b"x", b"Er", b"29-11 07:17:34 (", b" (debug"])
def test_a_log_is_read_in_one_go(text: bytes) -> None:
    assert povfarm._printed(text * (1 << 20)) is not None


def test_all_that_render_share_one_job(tmp_path: Path) -> None:
    """Ours, HTTPov's and SheepIt's, in turns: every frame once."""
    farm = Flock(tmp_path / "data")
    httpov = povfarm.Httpov(farm.scheduler, farm.access)
    farm.router = Router(farm.api, farm.entrance, farm.sheepit, httpov,
                         authenticate=farm.access.identify)
    job, ours, sheep = farm.submit(30), farm.worker(), [farm.client(), farm.client()]
    server, done = f"/{farm.access.guest_key}/httpov.php", 0
    while farm.state(job) == "active":
        for cookie in sheep:
            if "queued" in farm.states(job):
                assert farm.deliver(farm.job_of(cookie), cookie) == 0
        for lease in farm.leases(ours):
            for index in range(len(lease.tasks)):
                farm.finish(ours, lease, index)
        who = "client=attic:17&version=1.2"
        farm.ask("GET", f"{server}?command=getjob&{who}", key=None)
        batch = farm.ask("GET", f"{server}?command=getbatch&job={job}&{who}", key=None).body
        found = re.search(rb"batch=(\w+)\nstartframe=(\d+)\nstopframe=(\d+)", batch)
        if found:
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:
                for frame in range(int(found[2]), int(found[3]) + 1):
                    archive.writestr(f"N/N_{frame}.png", png(frame))
            farm.ask("POST", f"{server}?command=postbatch&job={job}&batch={found[1].decode()}&{who}",
                     key=None, body=form_of(packed.getvalue(), "filedata"), headers=FORM)
            done += 1
    assert done and farm.states(job) == ["done"] * 30 and farm.problems() == []
    for row in farm.tasks(job):
        assert [state for _, state in farm.attempts(row.id)] == ["done"], row.frame
    names = {name for row in farm.tasks(job) for name, _ in farm.attempts(row.id)}
    assert names == {"anna", "attic", "admin@host1"}
    farm.close()


def test_an_error_without_a_job_changes_nothing(farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    farm.job_of(cookie)
    for values in ({"type": ""}, {"job": "9", "frame": "1"}, {"job": "1", "frame": "2"}):
        assert farm.status("error", values, cookie, form_of(LOG), headers=FORM) == 0
    assert farm.status("error", {"job": "1", "frame": "1"}, "", form_of(LOG), headers=FORM) == 999
    assert farm.states(job) == ["leased", "queued"]


@pytest.mark.parametrize("kind", ["14", "22"])
def test_a_render_that_was_stopped_is_no_failure(kind: str, farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    task = farm.job_of(cookie)
    values = {"type": kind, "frame": task["frame"], "job": task["id"]}
    assert farm.status("error", values, cookie, form_of(LOG), headers=FORM) == 0
    assert farm.task(job, 1).tries == 0 and farm.states(job) == ["queued", "queued"]


def test_who_logs_out_hands_back_what_it_has(farm: Flock) -> None:
    job, cookie = farm.submit(2), farm.client()
    farm.job_of(cookie)
    assert farm.send("/account.php", {"mode": "logout", "worker": "1"}, cookie,
                     method="GET").body == b"bye\n"
    assert farm.states(job) == ["queued", "queued"] and not farm.scheduler.live_workers()
    assert farm.send("/account.php", {}, method="GET").status == 200


def test_a_frame_of_which_others_got_the_lower_rows_is_taken_whole(farm: Flock) -> None:
    """The client tells how far it is, so others may be given a part; it knows nothing of that."""
    job, cookie = farm.submit(1, values={"Height": "600"}), farm.client()
    task, ours = farm.job_of(cookie), farm.worker()
    for spent in (20, 40):
        farm.clock.advance(20)
        assert farm.status("keepmealive", {"frame": task["frame"], "job": task["id"], "rendertime":
                                           str(spent), "remainingtime": "400"}, cookie) == 0
    for _ in range(5):
        farm.leases(ours)
    grant = next(grant for grant in farm.scheduler.grants if grant.worker == worker_of(cookie))
    assert grant.cut, "nobody helps it"
    assert farm.deliver(task, cookie, png(1, height=600)) == 0
    assert farm.states(job) == ["done"]
    image = farm.ask("GET", f"/api/v1/jobs/{job}/frames/0/image").body
    assert png_rows(image) == png_rows(png(1, height=600))


# --- recorded conversations

class Wire:
    """What a client's connection carries, byte for byte, but for what a stub had told it."""

    def __init__(self, farm: Coordinator, login: Mapping[str, str]) -> None:
        self.farm, self.login, self.cookie, self.job = farm, login, "PHPSESSID=none", "7"

    def bytes_of(self, path: Path) -> bytes:
        data = path.read_bytes().replace(b" /KEY/", b" /", 1)
        data = re.sub(rb"Cookie: [^\r]*", f"Cookie: {self.cookie}".encode(), data, count=1)
        data = data.replace(b"login=bob", f"login={self.login['login']}".encode())
        data = data.replace(b"password=s3cret", f"password={self.login['password']}".encode())
        return re.sub(rb"([?&]job=)7\b", rb"\g<1>" + self.job.encode(), data, count=1)

    def send(self, data: bytes) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.farm.port), timeout=60)
        sock.sendall(data)
        return sock

    def answer(self, sock: socket.socket) -> Tuple[int, Dict[str, str], bytes]:
        with sock, sock.makefile("rb") as file:
            status = int(file.readline().split()[1])
            lines = iter(lambda: file.readline().strip().decode("latin-1"), "")
            headers = dict(line.split(": ", 1) for line in lines)
            body = file.read(int(headers["Content-Length"]))
        if "Set-Cookie" in headers:
            self.cookie = headers["Set-Cookie"]
        found = re.search(rb'<job id="(\d+)"', body)
        self.job = found[1].decode() if found else self.job
        return status, headers, body

    def said(self, data: bytes) -> int:
        """The status with which a request is answered."""
        status, _, body = self.answer(self.send(data))
        assert status == 200, body
        return int(ElementTree.fromstring(body).attrib["status"])

    def waits_until_logout(self, data: bytes, logout: bytes) -> None:
        """A request for a job when there is none is answered when the client ends."""
        held = self.send(data)
        wait_until(lambda: self.farm.scheduler.live_workers()
                   and self.farm.scheduler._states.waiting.work, "it does not wait")
        assert self.answer(self.send(logout))[2] == b"bye\n"
        assert b'<jobrequest status="200"/>' in self.answer(held)[2]


@pytest.fixture(name="wire")
def wire_fixture(tmp_path: Path) -> Iterator[Wire]:
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, sheepit=True)
    farm.start()
    key = farm.access.add("carla", Role.USER, {}, "ticket")
    yield Wire(farm, {"login": "carla", "password": sheepit_password(secret_hash(key))})
    problems = broken(farm.scheduler)
    farm.stop()
    assert problems == []


def submit(farm: Coordinator, frames: int) -> None:
    pov = pov_job(5, Width="64", Height="48", Subset_End_Frame=str(frames))
    _, missing = farm.scheduler.submit(
        "ball", "admin", pov, manifest({"scene.pov": SCENE}), JobOptions())
    for sha256 in missing:
        farm.scheduler.put_blob(sha256, [SCENE])


def states(farm: Coordinator) -> List[str]:
    with farm.store.read() as tx:
        return [str(task.state) for task in tx.tasks(1)]


def recorded(version: str, name: str) -> List[Path]:
    return sorted((RECORDED / version / name).glob("*.request"))


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_a_whole_session(version: str, wire: Wire) -> None:
    paths = recorded(version, "whole")
    submit(wire.farm, 2)
    assert wire.said(wire.bytes_of(paths[0])) == wire.said(wire.bytes_of(paths[1])) == 0
    for path in paths[2:4]:
        status, headers, body = wire.answer(wire.send(wire.bytes_of(path)))
        assert (status, headers["Content-Type"], body[:2]) == (200, "application/zip", b"PK")
    assert [wire.said(wire.bytes_of(path)) for path in paths[4:7]] == [0, 0, 0]
    assert states(wire.farm) == ["done", "done"]
    wire.waits_until_logout(wire.bytes_of(paths[7]), wire.bytes_of(paths[8]))


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_a_frame_that_povray_cannot_render(version: str, wire: Wire) -> None:
    paths = recorded(version, "error")
    submit(wire.farm, 3)
    assert wire.said(wire.bytes_of(paths[0])) == wire.said(wire.bytes_of(paths[1])) == 0
    assert [wire.said(wire.bytes_of(path)) for path in paths[4:8]] == [0] * 4
    with wire.farm.store.read() as tx:
        one, two, three = tx.tasks(1)
        failure = tx.attempts(two.id)[0]
    assert (one.state, two.tries, three.state) == ("done", 1, "leased")
    assert "Expected 'object or directive'" in failure.message
    assert wire.answer(wire.send(wire.bytes_of(paths[8])))[2] == b"bye\n"
    assert states(wire.farm) == ["done", "queued", "queued"]


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_a_wrong_password_and_a_dead_session(version: str, wire: Wire) -> None:
    refused = recorded(version, "refused")[0].read_bytes().replace(b" /KEY/", b" /")
    assert wire.said(refused) == 102
    paths = recorded(version, "retry")
    submit(wire.farm, 2)
    assert wire.said(wire.bytes_of(paths[0])) == wire.said(wire.bytes_of(paths[1])) == 0
    broken_on_its_way = wire.bytes_of(paths[4]).replace(b"IDAT", b"IDAX")
    assert wire.said(broken_on_its_way) == 302
    assert wire.said(wire.bytes_of(paths[5])) == 0 and states(wire.farm)[0] == "done"
    wire.cookie = "PHPSESSID=abc123; path=/; HttpOnly"
    assert wire.said(wire.bytes_of(paths[6])) == 202
    assert wire.said(wire.bytes_of(paths[7])) == wire.said(wire.bytes_of(paths[8])) == 0
    assert wire.said(wire.bytes_of(paths[9])) == 0 and states(wire.farm) == ["done", "done"]
    wire.waits_until_logout(wire.bytes_of(paths[10]), wire.bytes_of(paths[11]))


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_a_render_that_is_stopped(version: str, wire: Wire) -> None:
    paths = recorded(version, "stop")
    submit(wire.farm, 2)
    assert [wire.said(wire.bytes_of(path)) for path in paths[:3]] == [0, 0, 0]
    wire.farm.scheduler.cancel(1, "admin")
    assert wire.said(wire.bytes_of(paths[5])) == 400
    assert wire.said(wire.bytes_of(paths[7])) == 0
    wire.waits_until_logout(wire.bytes_of(paths[6]), wire.bytes_of(paths[8]))


def test_who_goes_away_while_it_waits_gets_nothing(wire: Wire) -> None:
    paths = recorded("2016-10", "whole")
    assert wire.said(wire.bytes_of(paths[0])) == 0
    head, end, body = wire.bytes_of(paths[1]).partition(b"\r\n\r\n")
    assert isinstance(wire.farm.server, povfarm.Server)
    wait_until(lambda: not wire.farm.server._threads, "it is still answering")  # type: ignore[union-attr]
    held = wire.send(head + end)
    wait_until(lambda: wire.farm.server._threads, "it does not answer")  # type: ignore[union-attr]
    held.sendall(body)  # on its own, as the clients send it
    wait_until(lambda: wire.farm.scheduler._states.waiting.work, "it does not wait")
    held.close()
    submit(wire.farm, 2)
    wait_until(lambda: not wire.farm.scheduler._states.waiting.work, "it waits on")
    assert states(wire.farm) == ["queued", "queued"]


# --- what is no conversation

def test_requests_changed_at_random_are_answered_in_the_protocols_words(farm: Flock) -> None:
    chance, cookie = random.Random(2026), farm.client()
    farm.submit(50, retry_limit=9)
    requests = [path.read_bytes() for version in VERSIONS for path in RECORDED.glob(
        f"{version}/*/*.request") if b"config" not in path.name.encode()]
    counts = {"refused": 0, "answered": 0}
    for number in range(600):
        head, _, body = chance.choice(requests).partition(b"\r\n\r\n")
        target = head.split()[1].decode()
        path, _, query = target[4:].partition("?")
        fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        fields.update({"job": "1"} if number % 2 and "job" in fields else {})
        if number % 5 == 0 and fields:
            name = chance.choice([*fields])
            fields[name] = fuzz.mutated(fields[name].encode(), chance).decode("utf-8", "replace")
        kind = re.search(rb"(?i)content-type: ([^\r]*)", head)
        headers = {"content-type": fuzz.mutated(kind[1], chance).decode("latin-1")
                   if number % 7 == 0 else kind[1].decode()} if kind else {}
        reply = farm.send(path, fields, cookie if number % 9 else fuzz.mutated(
            cookie.encode(), chance).decode("latin-1"), fuzz.mutated(body, chance),
            head.split()[0].decode(), headers, alive=lambda: False)
        assert reply.status in (200, 404), (target, reply.body)
        if reply.status == 200 and path.endswith(".php") and "xml" in reply.headers["Content-Type"]:
            ElementTree.fromstring(reply.body)
        counts["refused" if reply.status == 404 else "answered"] += 1
    tried("SheepIt requests changed at random", sum(counts.values()), **counts)
    assert min(counts.values()) > 20


# --- the renderer that clients are given

INI = """Input_File_Name=scene.pov
Width=40
Height=30
Antialias=On
Initial_Frame=8
Final_Frame=11
Initial_Clock=-0.7
Final_Clock=1.3
Library_Path=parts
Output_Alpha=On
File_Gamma=1.8
"""


@pytest.fixture(name="project")
def project_fixture(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    (project / "parts").mkdir(parents=True)
    (project / "scene.pov").write_text(ANIMATION)
    (project / "scene.ini").write_text(INI)
    (project / "colours.inc").write_text("#declare Mine = rgb <0.2, 0.9, 0.4>;\n")
    (project / "parts" / "part.inc").write_text(PART)
    return project


def queue(farm: Coordinator, project: Path, *args: str) -> None:
    done = subprocess.run(
        [*POVFARM, "submit", "--server", farm.url, "--key",
         farm.key, *args], cwd=project, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("args, number, cores", [
    (["scene.ini"], 4, 0), (["scene.ini", "+SF9", "+EF9", "+KFI0"], 1, 2),
    (["scene.pov", "+W40", "+H30", "+K0.3", "+Lparts"], 1, 2),
    (["scene.ini", "+SF9", "+EF10", "+FN16"], 2, 0), (["scene.ini", "+SF9", "+EF10", "+FT"], 2, 0),
    (["scene.ini", "+SF9", "+EF9", "+FB", "-UA", "+KFF10"], 1, 0),
    (["scene.ini", "+SF9", "+EF9", "+FP", "-UA"], 1, 0), (["scene.ini", "+SF9", "+EF9", "+FE"], 1, 0),
])
def test_a_clients_pictures_are_those_of_plain_povray(
        args: List[str], number: int, cores: int, povray: str, project: Path, wire: Wire,
        tmp_path: Path) -> None:
    plain = shutil.copytree(project, tmp_path / "plain")
    assert run_povray(args, plain).returncode == 0
    queue(wire.farm, project, *args)
    client = SheepitClient(wire.farm.url, wire.login, tmp_path / "cache", cores)
    client.log_in()
    thread = threading.Thread(target=client.work)
    thread.start()
    wait_until(lambda: states(wire.farm) == ["done"] * number, "it is not rendered")
    wait_until(lambda: wire.farm.scheduler._states.waiting.work, "it does not ask for more")
    client.log_out()
    thread.join(60)
    assert not thread.is_alive() and len(client.frames) == number
    assert client.downloads == ["binary", "job"], "once each"
    expected = {path.name: path for path in set(plain.iterdir()).difference(
        plain / path.name for path in project.iterdir())}
    made = {path.name: path for path in (tmp_path / "data" / "jobs").rglob("*")
            if path.suffix in {path.suffix for path in expected.values()}}
    assert len(expected) == number and made.keys() == expected.keys()
    for name, path in expected.items():
        assert povfarm.same_pixels(made[name], path, path.suffix), name


@pytest.mark.slow
def test_a_scene_that_povray_cannot_parse_fails_with_its_words(
        povray: str, project: Path, wire: Wire, tmp_path: Path) -> None:
    (project / "scene.pov").write_text(ANIMATION + "#if (frame_number = 9) shpere {} #end\n")
    queue(wire.farm, project, "scene.ini", "--retries", "1")
    client = SheepitClient(wire.farm.url, wire.login, tmp_path / "cache")
    client.log_in()
    thread = threading.Thread(target=client.work)
    thread.start()
    wait_until(lambda: sorted(states(wire.farm)) == ["done", "done", "done", "failed"],
               "it does not go on")
    wait_until(lambda: wire.farm.scheduler._states.waiting.work, "it does not ask for more")
    client.log_out()
    thread.join(60)
    assert not thread.is_alive()
    with wire.farm.store.read() as tx:
        failure = tx.first_failure(1)
    assert failure and failure.frame == 9 and "Parse Error" in failure.message, failure
    assert not [line for line in client.printed if line.startswith(" ")]


@pytest.mark.slow
def test_what_serve_prints_lets_a_client_render_also_across_a_kill(
        povray: str, project: Path, tmp_path: Path) -> None:
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "povfarm.ini").write_text("[povfarm]\nsheepit = yes\n")

    def serve(port: str) -> Tuple["subprocess.Popen[str]", List[str]]:
        process = subprocess.Popen(
            [*POVFARM, "serve", "--bind", "127.0.0.1", "--no-discovery", "--port", port],
            env=environment(tmp_path), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout is not None
        line = next(line for line in process.stdout if "SheepIt" in line)
        return process, line.split()

    process, words = serve("0")
    try:
        told = {word: words[words.index(word) + 1] for word in ("-server", "-login", "-password")}
        shown = run(tmp_path, "users", "password", cwd=project).stdout
        assert shown == f"-login admin -password {told['-password']}\n"
        key = run(tmp_path, "users", "add", "anna", cwd=project).stdout.strip()
        login = json.loads(run(tmp_path, "users", "password", "--json", "--key", key, "--server",
                               told["-server"], cwd=project).stdout)
        assert login["login"] == "anna" and login["password"] not in (key, told["-password"])
        first = SheepitClient(told["-server"], {"login": told["-login"], "password": told["-password"]},
                       tmp_path / "first")
        second = SheepitClient(told["-server"], login, tmp_path / "second")
        for client in (first, second):
            client.log_in()
        assert run(tmp_path, "submit", "scene.ini", cwd=project).returncode == 0
        tasks = [client.task() for client in (first, second)]
        process.kill()
        process.wait()
        process, again = serve(told["-server"].rpartition(":")[2])
        assert again == words
        for client, (status, job, renderer) in zip((first, second), tasks):
            assert status == "0"
            client.render(job, renderer)
        for client in (first, second):
            client.render(*client.task()[1:])
        assert sorted(first.frames + second.frames) == ["0008", "0009", "0010", "0011"]
        assert "done" in run(tmp_path, "status", "1", cwd=project).stdout
        assert run(tmp_path, "users", "remove", "anna", cwd=project).returncode == 0
        assert second.task()[0] == "202"
    finally:
        process.kill()
        process.wait()


class Rend:
    """``rend.exe`` as a client has it, with a program in the place of POV-Ray."""

    def __init__(self, root: Path, povray: str) -> None:
        need("sh", shutil.which("sh") is not None, "the renderer is a shell script")
        self.root, self.cache, self.scene = root, root / "ca che", root / "ca che" / "md5"
        self.scene.mkdir(parents=True)
        (self.scene / "pov.ini").write_text("Width=4\n")
        (self.scene / "scene.pov").write_text("sphere {}\n")
        self.program, self.stand_in = root / "rend.exe", root / "stand-in"
        for path, text in ((self.program, povfarm.RENDERER), (self.stand_in, povray)):
            path.write_text(text)
            path.chmod(0o755)
        (root / "tmp").mkdir()

    def start(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        env = {"PATH": os.environ["PATH"], "TMPDIR": str(self.root / "tmp"),
               "POVRAY": str(self.stand_in), "ROOT": str(self.root), **more}
        return subprocess.Popen(
            [str(self.program), *words, str(self.scene / "pov.ini"), "-P", "script",
             f"{self.cache}/7_", "0009"], env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *words: str, **more: str) -> str:
        process = self.start(*words, **more)
        text, _ = process.communicate(timeout=60)
        assert not [*(self.root / "tmp").iterdir()], "it tidies up"
        return text

    def left(self) -> List[str]:
        return sorted(path.name for path in self.cache.iterdir() if path.name != "md5")


@pytest.mark.slow
def test_the_renderer_takes_what_clients_say(tmp_path: Path) -> None:
    rend = Rend(tmp_path, '#!/bin/sh\necho "$@" > "$ROOT/said"\ncp scene.pov .made/f09.png\n')
    assert rend.run("-t", "3") == "" and rend.left() == ["7_0009.png"]
    assert (tmp_path / "said").read_text() == "-D pov.ini +O.made/f +SF9 +EF9 +WT3\n"
    (rend.scene / "pov.ini").write_text("Work_Threads=1\n")
    rend.run("-t", "3")
    assert "+WT" not in (tmp_path / "said").read_text()
    rend.run()
    assert "+WT" not in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_the_renderer_tells_what_the_client_understands_and_no_more(tmp_path: Path) -> None:
    """It waits with its first line until it has a copy of the scene, which is then deleted."""
    rend = Rend(tmp_path, """#!/bin/sh
printf 'remaining:9:00:00 no\\n hello (world)\\nRendered 1 of 4 pixels (25%%)\\r'
while [ ! -e "$ROOT/go" ]; do sleep 0.05; done
cp scene.pov .made/f09.png
""")
    process = rend.start()
    assert process.stdout is not None
    first = process.stdout.readline()
    shutil.rmtree(rend.scene)
    lines = [first, process.stdout.readline(), process.stdout.readline(), process.stdout.readline()]
    (tmp_path / "go").touch()
    lines += process.stdout.read().splitlines(keepends=True)
    assert process.wait(60) == 0 and rend.left() == ["7_0009.png"]
    told = re.compile(r"(remaining:0:00:\d\d of this frame|Mem:1\.00M \(0\.00M, Peak \d+\.\d0M\))\n")
    assert all(told.fullmatch(line) for line in lines), lines
    assert any(line.startswith("remaining") for line in lines)
    assert any(line.startswith("Mem") for line in lines) == Path("/proc/self/status").exists()


@pytest.mark.slow
def test_the_client_need_not_wait_for_what_watches_povray(tmp_path: Path) -> None:
    """It reads what the renderer prints to its end: nothing that lives on may hold that open."""
    rend = Rend(tmp_path, """#!/bin/sh
while [ ! -s "$ROOT/pid" ]; do :; done
cp scene.pov .made/f09.png
""")
    sleep = tmp_path / "bin" / "sleep"
    sleep.parent.mkdir()
    sleep.write_text('#!/bin/sh\necho $$ > "$ROOT/pid"\nexec /bin/sleep 300\n')
    sleep.chmod(0o755)
    try:
        rend.run(PATH=f"{sleep.parent}{os.pathsep}{os.environ['PATH']}")
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert rend.left() == ["7_0009.png"]


@pytest.mark.slow
@pytest.mark.parametrize("program, left, words", [
    ("#!/bin/sh\necho ' Parse Error (bad)'; exit 1\n", ["pov.crash.txt"], "pov: Parse Error (bad)\n"),
    ("#!/bin/sh\nexit 0\n", ["pov.crash.txt"], ""),
    ("#!/bin/sh\ncp scene.pov .made/f09.png; exit 1\n", ["pov.crash.txt"], ""),
])
def test_the_renderer_leaves_the_crash_file_when_povray_fails(
        program: str, left: List[str], words: str, tmp_path: Path) -> None:
    rend = Rend(tmp_path, program)
    assert rend.run() == words and rend.left() == left


@pytest.mark.slow
def test_without_povray_the_client_is_to_wait(tmp_path: Path) -> None:
    rend = Rend(tmp_path, "")
    assert rend.run(POVRAY="no-such-program") == "there is no POV-Ray here: install it\n"
    assert rend.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("client", ["stops it", "is gone"])
def test_a_renderer_that_is_stopped_or_alone_stops_povray(client: str, tmp_path: Path) -> None:
    rend = Rend(tmp_path, '#!/bin/sh\necho $$ > "$ROOT/pid.part"\nmv "$ROOT/pid.part" "$ROOT/pid"\n'
                'printf "Rendered 1 of 4 pixels (25%%)\\r"\nexec sleep 300\n')
    process = rend.start()
    wait_until((tmp_path / "pid").exists, "it does not start")
    pid = int((tmp_path / "pid").read_text())
    if client == "stops it":
        process.send_signal(signal.SIGTERM)
    elif process.stdout is not None:  # was killed itself: nobody reads any more
        process.stdout.close()
    process.wait(60)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "zombie" in Path(
        f"/proc/{pid}/status").read_text(), "it still runs")
    assert process.returncode == 1 and rend.left() == [] and not [*(tmp_path / "tmp").iterdir()]
