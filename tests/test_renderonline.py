"""RenderOnline's clients: each answer to the letter, and scenes rendered as its document says."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import re
import socket
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import pytest

import povfarm
from helpers.base import ROOT, run_povray, wait_until
from helpers.farm import STILL, run
from helpers.farm import Farm as RealFarm
from helpers.farm_in_a_box import KEY, Farm, Reply
from helpers.pictures import pixels
from povfarm import Coordinator, OnlineRules, RenderOnline, Role, Router, UserError, WorkerInfo

LINES = """\
engine povray = .pov povray $RENDERONLINE:@uploaded_file +W4 +H3 \
+KFI$RENDERONLINE:start_frame +KFF$RENDERONLINE:end_frame +F$RENDERONLINE:output_format
argument start_frame = natural
argument end_frame = natural
argument output_format = word
"""
SCENE = b"sphere { <0, 0, 3>, 1 pigment { rgb <1, clock, 0> } finish { ambient 1 } }\n"
FRAMES = (("start_frame", "1"), ("end_frame", "3"), ("output_format", "PNG"))
QUEUED = {"IsAdded": True, "ErrorMessage": "Task successfully enqueued."}


def rules(text: str = LINES) -> OnlineRules:
    return OnlineRules.of((*map(str.strip, line.partition("=")[::2]), "here")
                          for line in text.splitlines())


def form(*parts: Tuple[str, Optional[str], bytes], edge: str = "9c5f2b1e") -> Tuple[str, bytes]:
    """A form as .NET writes it: a part's type before its name, the boundary in quotes."""
    data = b""
    for name, file, contents in parts:
        more = f"; filename={file}; filename*=utf-8''x" if file else ""
        kind = "application/octet-stream" if file else "application/json; charset=utf-8"
        data += (f"--{edge}\r\nContent-Type: {kind}\r\nContent-Disposition: form-data; name={name}"
                 f"{more}\r\n\r\n").encode() + contents + b"\r\n"
    return f'multipart/form-data; boundary="{edge}"', data + f"--{edge}--\r\n".encode()


def wish(arguments: Sequence[Tuple[str, str]] = FRAMES, engine: str = "1") -> bytes:
    return json.dumps({"EngineId": engine, "Arguments": [
        {"ArgTypeId": name, "Value": value} for name, value in arguments]}).encode()


class OnlineFarm(Farm):
    """A farm that takes scenes from RenderOnline's clients: anna's, unless it says so."""

    def __init__(self, root: Path, text: str = LINES, **more: Any) -> None:
        super().__init__(root, **more)
        self.online = RenderOnline(self.scheduler, self.access, KEY, rules(text))
        self.router = Router(self.api, self.entrance, self.online, authenticate=self.access.identify)
        for name, role in (("anna", Role.USER), ("bob", Role.USER), ("vera", Role.VIEWER),
                           ("sam", Role.SUBMIT)):
            self.access.add(name, role, {}, "a-ticket-that-is-new")

    def token(self, name: str) -> str:
        with self.store.read() as tx:
            person = tx.person(name)
        assert person
        return povfarm.online_token(KEY, person.name, person.added)

    def call(self, what: str, body: bytes = b"", kind: str = "application/json; charset=utf-8",
             who: str = "anna", **headers: str) -> Reply:
        fields = {"email": f"{who}@example.com", "token": self.token(who), "content-type": kind}
        return self.ask("POST" if what != "info" else "GET", f"/renderapi/v1/{what}", key=None,
                        body=body, headers={**fields, **headers})

    def task(self, what: str, number: Any, **more: Any) -> Tuple[int, Any]:  # type: ignore[override]
        reply = self.call(what, json.dumps({"taskId": number}).encode(), **more)
        return reply.status, json.loads(reply.body)

    def enqueue(self, *parts: Tuple[str, Optional[str], bytes], **more: Any) -> Tuple[int, Any]:
        kind, body = form(*parts)
        reply = self.call("enqueue", body, kind, **more)
        return reply.status, reply.json()

    def queued(self, arguments: Sequence[Tuple[str, str]] = FRAMES, who: str = "anna",
               scene: bytes = SCENE) -> int:
        """The number of a task that was taken."""
        assert self.enqueue(("request", None, wish(arguments)), ("file", "a.pov", scene),
                            who=who) == (200, QUEUED)
        with self.store.read() as tx:
            return tx.newest_job()

    def info(self, who: str = "anna") -> Any:
        return self.call("info", who=who).json()


@pytest.fixture(name="farm")
def farm_fixture(tmp_path: Path) -> Iterator[OnlineFarm]:
    one = OnlineFarm(tmp_path / "data")
    yield one
    problems = [*one.problems(), *map(str, one.leftovers()), *map(str, one.root.glob("incoming/*"))]
    assert not problems, "\n".join(problems)
    one.close()


def everything(farm: OnlineFarm) -> List[str]:
    """The names of all files that are kept."""
    with farm.store.read() as tx:
        jobs = [f"job {row.id} {row.state}" for row in tx.jobs(0, 100)]
    return sorted(jobs + [str(path) for path in farm.root.rglob("*") if path.is_file()
                          and "farm.db" not in path.name])


# --- who is let in

def test_a_user_is_a_person_with_a_token_of_its_own(farm: OnlineFarm) -> None:
    for mail in ("anna", "anna@example.com", "Anna@elsewhere"):
        reply = farm.ask("GET", "/renderapi/v1/info", key=None,
                         headers={"email": mail, "token": farm.token("anna")})
        user = reply.json()["User"]
        assert 0 < user.pop("UserId") < 1 << 16
        assert user == {"FirstName": "anna", "LastName": "", "Email": mail, "SubscriptionId": 1,
                        "IsActive": True}
    assert farm.info("bob")["User"]["FirstName"] == "bob"
    assert len({farm.token(name) for name in ("anna", "bob", "vera")}) == 3


@pytest.mark.parametrize("headers", [
    {}, {"email": "anna"}, {"email": "anna", "token": ""}, {"email": "anna", "token": "TOKEN"[:-1]},
    {"email": "bob", "token": "TOKEN"}, {"email": "nobody", "token": "TOKEN"},
    {"email": "", "token": "TOKEN"}, {"token": "TOKEN"}, {"email": "anna", "token": KEY},
    {"email": "admin", "token": KEY}, {"email": "anna", "token": "TOKEN\u00e9"},
    {"email": "vera", "token": "VERA"}, {"email": "sam", "token": "SAM"},
])
def test_anybody_else_is_told_so_in_the_dialects_words(
        headers: Mapping[str, str], farm: OnlineFarm) -> None:
    job = farm.queued()
    tokens = {"TOKEN": farm.token("anna"), "VERA": farm.token("vera"),
              "SAM": farm.token("sam")}
    shown = {name: re.sub("TOKEN|VERA|SAM", lambda found: tokens[found[0]], value)
             for name, value in headers.items()}
    if headers.get("token") == "TOKE":
        shown["token"] = tokens["TOKEN"][:-1]
    before = everything(farm)
    for what in ("info", "enqueue", "dequeue", "download", "delete"):
        kind, body = form(("request", None, wish()), ("file", "a.pov", SCENE))
        if what != "enqueue":
            kind, body = "application/json", b'{"TaskId": %d}' % job
        reply = farm.ask("GET" if what == "info" else "POST", f"/renderapi/v1/{what}", key=None,
                         body=body, headers={"content-type": kind, **shown})
        assert (reply.status, reply.body) == (
            401, b'{"IsAdded":false,"ErrorMessage":"Unauthorized."}' if what == "enqueue" else b"")
    assert everything(farm) == before


def test_a_token_is_good_for_nothing_else_and_a_key_is_no_token(farm: OnlineFarm) -> None:
    token = farm.token("anna")
    farm.queued()
    with farm.store.read() as tx:
        mine = tx.person("anna")
    assert mine and token not in (KEY, mine.token)
    for headers in ({"authorization": f"Bearer {token}"}, {"authorization": f"Bearer anna:{token}"}):
        assert farm.ask("GET", "/api/v1/jobs", key=None, headers=headers).status == 401
    for method, target in (("POST", "/api/v1/jobs/1/cancel"), ("GET", "/api/v1/users"),
                           ("POST", "/api/v1/login")):
        assert farm.ask(method, target, key=None,
                        headers={"email": "anna", "token": token}).status == 401
    assert farm.ask("GET", f"/{token}/httpov.php", key=None).status == 404


def test_who_was_removed_comes_back_with_another_token(farm: OnlineFarm) -> None:
    token = farm.token("anna")
    farm.scheduler.people.remove("anna")
    assert farm.call("info", who="bob", email="anna", token=token).status == 401
    farm.clock.advance(1)
    farm.access.add("anna", Role.USER, {}, "a-ticket-that-is-new")
    assert farm.call("info", email="anna", token=token).status == 401
    assert farm.call("info").status == 200 and farm.token("anna") != token


def test_whoever_guesses_is_slowed_down(farm: OnlineFarm) -> None:
    began = farm.clock.mono
    for _ in range(povfarm.FREE_TRIES):
        assert farm.call("info", token="x" * 32).status == 401
    assert farm.clock.mono == began
    assert farm.call("info", token="x" * 32).status == 401
    assert farm.clock.mono > began
    farm.access._held["192.168.1.5"] = povfarm.MAX_HELD  # of where all of them come from
    assert farm.call("info").status == 429
    del farm.access._held["192.168.1.5"]
    assert farm.call("info").status == 200


def test_a_request_counts_as_the_persons(farm: OnlineFarm) -> None:
    """Strangers, however many, keep nobody out who has a token."""
    def entered(token: str) -> povfarm.Identity:
        seen: List[povfarm.Identity] = []
        farm.router.handle(povfarm.Request(
            "GET", "/renderapi/v1/info", {}, {"email": "anna", "token": token}, enter=lambda who, *waits: seen.append(who)))
        return seen[0]

    assert entered(farm.token("anna")).trusted and not entered("").trusted


def test_off_it_is_not_there_and_on_it_is(tmp_path: Path) -> None:
    for given, status in ((None, 404), (rules(), 401)):
        farm = Coordinator(tmp_path / str(status), bind="127.0.0.1", durable=False,
                           renderonline=given)
        for method, what in (("GET", "info"), ("POST", "delete")):
            request = povfarm.Request(method, f"/renderapi/v1/{what}")
            assert farm.router.handle(request).status == status
        farm.stop()


def test_pages_of_any_origin_may_ask(farm: OnlineFarm) -> None:
    """RenderOnline's client also runs in a browser, elsewhere; it shows a token, never a cookie."""
    reply = farm.ask("OPTIONS", "/renderapi/v1/enqueue", key=None)
    assert reply.status == 204
    for answer in (reply, farm.call("info"), farm.call("delete", b"{}"),
                   farm.call("info", token="wrong")):
        assert {name: value for name, value in answer.headers.items() if "Allow" in name} == {
            "Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "*",
            "Access-Control-Allow-Headers": "*"}
    assert farm.ask("OPTIONS", "/renderapi/v1/dance", key=None).status == 204
    for method, what in (("POST", "info"), ("POST", "dance"), ("POST", "_job")):
        assert farm.ask(method, f"/renderapi/v1/{what}", key=None).status == 404
    assert farm.ask("GET", "/renderapi/v1/delete", key=None).status == 405


# --- what is wanted

def test_a_task_is_a_job(farm: OnlineFarm) -> None:
    job = farm.job(farm.queued())
    assert (job.owner, job.name, job.state, len(farm.tasks(job.id))) == ("anna", "a", "active", 3)
    assert dict(job.pov.values) == {
        "Final_Frame": "3", "Height": "3", "Initial_Frame": "1", "Input_File_Name": "a.pov",
        "Output_File_Type": "N", "Output_To_File": "On", "Width": "4"}
    assert farm.ask("GET", f"/api/v1/jobs/{job.id}").json()["owner"] == "anna"


FILE = ("file", "a.pov", SCENE)


@pytest.mark.parametrize("parts, status, words", [
    ([], 400, "No files were uploaded."),
    ([("request", None, wish())], 400, "No files were uploaded."),
    ([("file", None, SCENE), ("request", None, wish())], 400, "No files were uploaded."),
    ([FILE], 400, 'Header "request" is empty.'),
    ([("request", None, b" "), FILE], 400, 'Header "request" is empty.'),
    *(([("request", None, text), FILE], 400, "Invalid enqueue request arguments.") for text in (
        b"{", b"null", b"[]", b"{}", b'"x"', b'{"EngineId": "1"}', b'{"EngineId": 1, "Arguments": []}',
        b'{"EngineId": "1", "Arguments": {}}', b'{"EngineId": "1", "Arguments": [1]}', b"\xff",
        b'{"EngineId": "1", "Arguments": [{"ArgTypeId": "start_frame"}]}', b"[" * 100_000,
        b'{"EngineId": "1", "Arguments": [{"ArgTypeId": "start_frame", "Value": 1}]}',
        b'{"EngineId": "\\ud800", "Arguments": []}',
        wish().replace(b"{", b"{" + b" " * povfarm.BODY_LIMIT, 1))),
    ([("request", None, b" " * povfarm.BODY_LIMIT + wish()), FILE], 400,
     'Header "request" is empty.'),
    ([("request", None, wish()), ("file", "a.pov", bytes(povfarm.MAX_SCENE + 1))], 413,
     "the scene is larger than 8.4 MB"),
    ([("request", None, wish()), ("file", "a.pov", bytes(povfarm.MAX_FORM))], 413,
     "the body is larger than 67.1 MB"),
    ([("request", None, wish()), FILE, ("other", "b.pov", b"")], 400,
     "Only 1 file may be uploaded per request."),
    *(([("request", None, wish(engine=engine)), FILE], 400,
       f"Engine with identifier {engine} not found.") for engine in ("2", "", "povray", "01", "-1")),
    ([("request", None, wish()), ("file", "a.blend", b"")], 400,
     "Engine extension .pov not matching with files extension .blend."),
    ([("request", None, wish()), ("file", "a.POV", b"")], 400,
     "Engine extension .pov not matching with files extension .POV."),
    ([("request", None, wish()), ("file", "pov", b"")], 400,
     "Engine extension .pov not matching with files extension ."),
    ([("request", None, wish([*FRAMES, ("colour", "1")])), FILE], 400,
     "Argument type identifier colour must be present in database."),
    ([("request", None, wish([("start_frame", "-1")])), FILE], 400,
     "Value -1 must be of type natural."),
    ([("request", None, wish([("output_format", ".png")])), FILE], 400,
     "Value .png must be of type word."),
    ([("request", None, wish(FRAMES[:1])), FILE], 400, "Argument end_frame is missing."),
    ([("request", None, wish([("start_frame", "3"), ("end_frame", "2"), FRAMES[2]])), FILE], 400,
     "no frames: Final_Frame=2 comes before Initial_Frame=3"),
    ([("request", None, wish([*FRAMES[:2], ("output_format", "RAWTGA")])), FILE], 400,
     "argument '+FRAWTGA': POV-Ray has no file type 'RAWTGA', but +FN and +FN16"),
    ([("request", None, wish()), ("file", "a.pov", b'#include "/etc/hostname"\n')], 400,
     "a.pov:1 includes '/etc/hostname': it can only use what was sent with it, and "
     "POV-Ray's own files"),
    ([("request", None, wish()), ("file", "a.pov", b'#include "missing.inc"\n')], 400,
     "a.pov:1 includes 'missing.inc': it can only use what was sent with it, and "
     "POV-Ray's own files"),
])
def test_what_is_wrong_is_said_in_the_dialects_words_and_nothing_is_kept(
        parts: Any, status: int, words: str, farm: OnlineFarm) -> None:
    before = everything(farm)
    answer, reply = farm.enqueue(*parts)
    assert answer == status and reply.pop("IsAdded") is False
    assert reply == {"ErrorMessage": words}
    assert everything(farm) == before


@pytest.mark.parametrize("kind, body", [
    ("application/json", b"{}"), ("", b""), ("multipart/form-data", form(FILE)[1]),
    (form()[0], form(FILE)[1][:-9]), (form()[0], form(FILE)[1][:60]),
    (form()[0], b"--9c5f2b1e\r\nX: " + b"x" * 100_000)])
def test_what_is_no_whole_form_has_no_files(kind: str, body: bytes, farm: OnlineFarm) -> None:
    reply = farm.call("enqueue", body, kind)
    assert (reply.status, reply.json()["ErrorMessage"]) == (400, "No files were uploaded.")


def test_the_queue_has_the_limit_of_the_subscription(farm: OnlineFarm) -> None:
    farm.scheduler.people.change("anna", {"jobs": 2})
    first = farm.queued()
    farm.queued()
    assert farm.enqueue(("request", None, wish()), FILE) == (403, {
        "IsAdded": False, "ErrorMessage": "Queue limit 2 reached for your subscription."})
    # It is looked at before the engine, and after the form.
    assert farm.enqueue(("request", None, wish(engine="9")), FILE)[0] == 403
    assert farm.enqueue(FILE)[1]["ErrorMessage"] == 'Header "request" is empty.'
    farm.queued(who="bob")
    assert farm.task("dequeue", first)[0] == 200
    farm.queued()
    farm.scheduler.people.change("bob", {"frames": 4})
    status, reply = farm.enqueue(("request", None, wish()), FILE, who="bob")
    assert status == 400 and "you may have 4 frames" in reply["ErrorMessage"]


def test_the_persons_limits_are_looked_at_before_the_scene_is(
        farm: OnlineFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.scheduler.people.change("anna", {"frames": 2})
    monkeypatch.setattr(povfarm, "collect_project", None)
    status, reply = farm.enqueue(("request", None, wish()), FILE)
    assert status == 400 and "you may have 2 frames" in reply["ErrorMessage"]


def test_a_scene_that_does_not_get_to_its_place_leaves_no_task(
        farm: OnlineFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(farm)
    monkeypatch.setattr(farm.scheduler, "put_blob", lambda sha256, chunks: 1 / 0)
    status, reply = farm.enqueue(("request", None, wish()), FILE)
    assert status == 500 and "the coordinator made a mistake" in reply["ErrorMessage"]
    assert everything(farm) == before


@pytest.mark.slow
def test_a_scene_that_is_not_small_is_looked_into_by_a_process_of_its_own(
        farm: OnlineFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the same, and refuses the same in the same words."""
    reading = SCENE + b'#if (frame_number > 1) box { 0, 1 pigment { image_map { png "a1.png" } } } #end\n'
    missing = SCENE + b'#include "secret.inc"\n'
    said = []
    for small in (povfarm.SMALL_SCENE, 0):
        monkeypatch.setattr(povfarm, "SMALL_SCENE", small)
        job = farm.job(farm.queued(scene=reading))
        said += [(job.pov, job.manifest, job.options, farm.enqueue(
            ("request", None, wish()), ("file", "a.pov", missing)))]
    (pov, *one), (apart, *other) = said
    assert one == other and one[1].in_order and "secret.inc" in str(one[2])
    assert (sorted(pov.uses), pov.values) == (sorted(apart.uses), apart.values)


@pytest.mark.slow
@pytest.mark.parametrize("limit, most", [("SCAN_SECONDS", 0.05), ("SCAN_MEMORY", 48 << 20)])
def test_a_scene_that_is_too_hard_to_read_is_refused_and_its_process_ended(
        limit: str, most: float, farm: OnlineFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, limit, most)
    before, hard = everything(farm), b"".join(b'#declare A%d = "%d"\n' % (n, n) for n in range(200_000))
    status, said = farm.enqueue(("request", None, wish()), ("file", "a.pov", SCENE + hard))
    assert status == 413 and "the scene is too hard to read" in said["ErrorMessage"]
    assert everything(farm) == before
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)


def test_frames_that_read_what_others_made_are_rendered_in_order(farm: OnlineFarm) -> None:
    assert not farm.job(farm.queued()).options.in_order
    scene = SCENE + b'#if (frame_number > 1) box { 0, 1 pigment { image_map { png "a1.png" } } } #end\n'
    assert farm.enqueue(("request", None, wish()), ("file", "a.pov", scene)) == (200, QUEUED)
    assert farm.job(2).options.in_order


def test_a_newer_povrays_words_wait_for_that(farm: OnlineFarm) -> None:
    farm.online._rules = rules(LINES.replace("+W4", "+CC +W4"))
    assert farm.job(farm.queued()).pov.needs == ("3.8", "+CC")


@pytest.mark.parametrize("name, kept", [
    ("a.pov", "a.pov"), ('"my scene.pov"', "my_scene.pov"),
    ('"file:///home/u/my%20scene.pov"', "my_scene.pov"), (r'"C:\\tmp\\a.pov"', "a.pov"),
    ('"../../a.pov"', "a.pov"), ('"=?utf-8?B?L2hvbWUvw6QucG92?="', "_.pov"), ('"-x.pov"', "x.pov"),
    ('"+x;y#.pov"', "_x_y_.pov"), ('"' + "x" * 300 + '.pov"', "x" * 96 + ".pov"),
    ('"' + "x" * 9 + "-" * 4 + "x" * 92 + '.pov"', "x" * 92 + ".pov")])
def test_a_files_name_is_made_a_plain_one(name: str, kept: str, farm: OnlineFarm) -> None:
    """The desktop client sends a URI, the one in a browser a bare name."""
    assert farm.enqueue(("request", None, wish()), ("scene", name, SCENE)) == (200, QUEUED)
    assert farm.job(1).pov.values["Input_File_Name"] == kept
    assert farm.info()["Tasks"][0]["Render"]["FileName"] == kept


BLENDER = """\
engine blender = .blend blender -b $RENDERONLINE:@uploaded_file -o $RENDERONLINE:@output \
-F $RENDERONLINE:output_format -s $RENDERONLINE:start_frame -e $RENDERONLINE:end_frame \
-t $RENDERONLINE:threads -a
argument start_frame = natural
argument end_frame = natural
argument threads = natural
argument output_format = word
"""
BLEND = b"BLENDER-v304" + bytes(povfarm.MAX_SCENE)  # more than a scene of POV-Ray may have


def test_another_programs_scene_is_a_job_for_those_who_have_it(tmp_path: Path) -> None:
    farm = OnlineFarm(tmp_path / "data", BLENDER)
    given = [*FRAMES, ("threads", "2")]
    assert farm.enqueue(("request", None, wish(given)), ("file", "a.blend", BLEND)) == (200, QUEUED)
    with farm.store.read() as tx:
        job = tx.job(tx.newest_job())
    assert (job.pov.engine, job.pov.arguments) == ("blender", {"threads": "2"})
    assert [job.pov.plan.output_name(frame) for frame in job.pov.plan.frames] == [
        "a1.png", "a2.png", "a3.png"]
    (task,) = farm.info()["Tasks"]
    assert task["Render"]["Arguments"] == (
        "blender -b a.blend -o image -F PNG -s 1 -e 3 -t 2 -a")
    assert task["Engine"]["Name"] == "blender" and task["Render"]["FileSize"] == len(BLEND)
    plain, has = farm.worker("plain"), farm.scheduler.join(WorkerInfo(
        "has", 1, 1 << 30, "Linux", {"povray": "3.7.0", "blender": ""}), "5" * 64, "127.0.0.1")
    assert farm.leases(plain) == [] and len(farm.leases(has)) == 1
    for more, words in (((("output_format", "AVIJPEG"),), "makes no pictures of this type"),
                        ((("threads", "x"),), "Value x must be of type natural."),
                        ((), "Argument threads is missing.")):
        changed = [*more, *(FRAMES if not more else given)]
        status, reply = farm.enqueue(("request", None, wish(changed)), ("file", "a.blend", BLEND))
        assert status == 400 and words in reply["ErrorMessage"]
    assert farm.enqueue(("request", None, wish()), FILE) == (400, {
        "IsAdded": False,
        "ErrorMessage": "Engine extension .blend not matching with files extension .pov."})
    farm.close()


def test_as_the_desktop_client_asks(farm: OnlineFarm) -> None:
    """Its engine is the place in a list, its keys may be in any case, and a format has its name."""
    for form_at, letter in (("PNG", "N"), ("JPEG", "J"), ("BMP", "B"), ("TGA", "T"), ("HDR", "H")):
        text = wish([*FRAMES[:2], ("output_format", form_at)], "0").replace(b"EngineId", b"engineid")
        assert farm.enqueue(("request", None, text.replace(b"ArgTypeId", b"argTypeId")), FILE) == (
            200, QUEUED)
        assert farm.job(farm.info()["Tasks"][0]["Task"]["TaskId"]).pov.options.output_type == letter


def test_the_file_may_come_first(farm: OnlineFarm) -> None:
    assert farm.enqueue(FILE, ("request", None, wish())) == (200, QUEUED)


def test_the_first_of_two_values_counts_and_none_is_looked_into(farm: OnlineFarm) -> None:
    farm.online._rules = rules(LINES.replace("output_format = word", "output_format = word .*"))
    job = farm.queued([("start_frame", "2"), ("start_frame", "9"), *FRAMES[1:]])
    assert farm.job(job).pov.plan.frames == range(2, 4)
    status, reply = farm.enqueue(("request", None, wish(
        [*FRAMES[:2], ("output_format", "$RENDERONLINE:start_frame")])), FILE)
    assert status == 400 and "$RENDERONLINE" in reply["ErrorMessage"]


@pytest.mark.parametrize("value", [
    "N /etc/hostname", "N\tx.ini", "N;x.ini", "N#x", "N'x'", 'N"x"', "N\nx", "", " ", "x" * 201])
def test_no_value_becomes_a_word_of_its_own(value: str, farm: OnlineFarm) -> None:
    """Not even where whoever wrote the settings file lets everything through."""
    farm.online._rules = rules(LINES.replace("output_format = word", r"output_format = word [\s\S]*"))
    status, reply = farm.enqueue(
        ("request", None, wish([*FRAMES[:2], ("output_format", value)])), FILE)
    assert status == 400 and reply["ErrorMessage"] in (
        f"Value {value} must be of type word.", "Invalid enqueue request arguments.")


# --- the settings

@pytest.mark.parametrize("kind, good, bad", [
    ("file", ["a.png", "A_-9.pov"], ["a", "a.blend", "a.b/c.d", "a.toolong", ".png", "a b.png"]),
    ("path", ["/a", "/a/b-c/"], ["a", "/", "/a//b", "/../x", "/a.b"]),
    ("extension", [".png", ".exr"], ["png", ".toolong", "."]),
    ("word", ["PNG", "a_1"], ["a-b", "\u00e4", "a.b"]), ("sentence", ["Hi,you!?'.-"[:3]], ["a+b", "a/b"]),
    ("natural", ["0", "17"], ["-1", "1.5", "\u0661", "1\n", "x"]),
    ("integer", ["-3", "3"], ["+3", "3.0", "--3"]), ("real", ["1", "-1.5"], ["1.", ".5", "1e3"])])
def test_every_type_takes_what_the_document_says(
        kind: str, good: Sequence[str], bad: Sequence[str]) -> None:
    mine = rules(f"argument x = {kind}")
    for value in good:
        mine.check("x", value)
    for value in bad:
        with pytest.raises(UserError, match=re.escape(f"Value {value} must be of type {kind}.")):
            mine.check("x", value)


def test_a_regular_expression_takes_the_types_place_and_must_fit_the_whole() -> None:
    mine = rules("argument x = word PNG|JPEG")
    mine.check("x", "JPEG")
    for value in ("PNGs", "png", "a"):
        with pytest.raises(UserError, match="must be of type word"):
            mine.check("x", value)


@pytest.mark.parametrize("text, words", [
    ("argument x = colour", "here: Type colour is not valid for RenderOnline: there are file, path"),
    ("argument x = word (", "is not a regular expression"), ("argument x y = word", "write 'engine"),
    ("motor x = y", "write 'engine"), ("engine povray = .pov", "write 'engine"),
    ("engine blender = .blend $RENDERONLINE:@uploaded_file", "where the pictures' names begin"),
    ("engine ../sh = .sh $RENDERONLINE:@uploaded_file", "write 'engine"),
    ("engine povray = .ini $RENDERONLINE:@uploaded_file", "renders files with the extension .pov"),
    ("engine povray = .pov +W640", "where the scene's name belongs"),
    ("engine povray = .pov $RENDERONLINE:@uploaded_file +W$RENDERONLINE:width",
     "there is no line 'argument width = TYPE'"),
    ('engine povray = .pov $RENDERONLINE:@uploaded_file "', "cannot be taken apart"),
    ("engine povray = .pov $RENDERONLINE:@uploaded_file +Qx", "Qx"),
    ("engine povray = .pov $RENDERONLINE:@uploaded_file Post_Frame_Command=ls", "Post_Frame_Command"),
    *((f"argument x = path\nengine povray = .pov $RENDERONLINE:@uploaded_file {word}", "could lead")
      for word in ("$RENDERONLINE:x", "+L$RENDERONLINE:x", "-l/a$RENDERONLINE:x", "+L/srv/mine", "x.ini", "/etc/",
                   "Library_Path=$RENDERONLINE:x", "INCLUDE_INI=$RENDERONLINE:x", "include_ini=x",
                   "'a b'", "+$RENDERONLINE:x", "$RENDERONLINE:x=1")),
])
def test_a_line_that_is_wrong_is_told_by_its_place(text: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^here: ") as caught:
        rules(text)
    assert words in str(caught.value)


def test_a_value_starts_no_program_and_names_no_scene_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "other.pov").write_bytes(SCENE)
    farm = OnlineFarm(tmp_path / "data", (
        "argument c = word .*\n"
        "engine povray = .pov $RENDERONLINE:@uploaded_file Post_Scene_Command=$RENDERONLINE:c\n"
        "engine povray = .pov $RENDERONLINE:@uploaded_file +I$RENDERONLINE:c\n"
        "engine povray = .pov $RENDERONLINE:@uploaded_file Include_Header=$RENDERONLINE:c\n"))
    before = everything(farm)
    for engine, value in (("1", "ls"), ("2", f"{tmp_path}/other"), ("2", "../../../../other.pov"),
                          ("3", f"{tmp_path}/other.pov")):
        status, reply = farm.enqueue(("request", None, wish([("c", value)], engine)), FILE)
        assert status == 400 and not reply["IsAdded"], (engine, value)
    assert everything(farm) == before
    farm.close()


def test_the_manual_shows_lines_that_are_good() -> None:
    shown = re.search(r"```ini\n\[renderonline\]\n(.*?)```",
                      (ROOT / "docs" / "manual.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown and shown[1].count("\n") == 4
    mine = rules(shown[1])
    mine.check("output_format", "JPEG")
    values = {"start_frame": "1", "end_frame": "9", "output_format": ".png", "@uploaded_file": "a.pov"}
    assert mine.engines[0].arguments(values) == [
        "a.pov", "+W640", "+H480", "+KFI1", "+KFF9", "+FN"]


def test_the_engines_are_listed_and_checked(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(text: str, *words: str) -> Tuple[int, str]:
        (tmp_path / "povfarm.ini").write_text(f"[povfarm]\n[renderonline]\n{text}")
        code = povfarm.main([*words, "--data", str(tmp_path)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, text = shown(LINES, "engines")
    assert code == 0 and re.search(r"1 +povray +[.]pov +povray [$]RENDERONLINE:@up", text)
    assert re.search(r"start_frame +natural, ", text)
    code, text = shown(LINES, "engines", "--json")
    assert json.loads(text)["engines"] == [vars(rules().engines[0])]
    assert json.loads(text)["arguments"]["end_frame"] == "natural, \\d+"
    for words in (["engines"], ["serve", "--renderonline", "--port", "0", "--bind", "127.0.0.1"]):
        code, text = shown("argument x = colour", *words)
        assert code == 2 and f"{tmp_path / 'povfarm.ini'}, line 3: Type colour is not" in text
        code, text = shown("", *words)
        assert code == 2 and "has no engine for RenderOnline's clients" in text
    assert not (tmp_path / "farm.key").exists()


def test_a_token_is_made_by_who_has_the_farm_key(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, renderonline=rules())
    key = farm.access.add("Anna", Role.USER, {}, "a-ticket-that-is-new")
    farm.start()

    def shown(name: str, *words: str) -> Tuple[int, str]:
        code = povfarm.main(["users", "token", name, "--server", farm.url, "--data",
                             str(tmp_path / "own"), *words])
        printed = capsys.readouterr()
        return code, (printed.out or printed.err).strip()

    try:
        with farm.store.read() as tx:
            token = povfarm.online_token(farm.key, "Anna", tx.people()[0].added)
        assert shown("anna", "--key", farm.key) == (0, token)
        assert json.loads(shown("anna", "--key", farm.key, "--json")[1]) == {
            "email": "Anna", "token": token}
        code, text = shown("bob", "--key", farm.key)
        assert code == 2 and "nobody is called 'bob'" in text
        code, text = shown("Anna", "--key", key)
        assert code == 1 and "this takes the farm's key" in text
    finally:
        farm.stop()


# --- tasks

def test_info_has_the_newest_fifteen_of_the_user(farm: OnlineFarm) -> None:
    mine = [farm.queued() for _ in range(17)]
    farm.queued(who="bob")
    farm.scheduler.submit("own", "anna", farm.job(mine[0]).pov.__class__(
        {"Input_File_Name": "a.pov"}, (), (povfarm.STANDARD,), "."),
        povfarm.Manifest(()), povfarm.JobOptions())  # came in another way
    tasks = farm.info()["Tasks"]
    assert [task["Task"]["TaskId"] for task in tasks] == mine[:1:-1]
    assert tasks[0].keys() == {"Task", "Render", "Engine"}
    user, words = farm.info()["User"]["UserId"], "a.pov +W4 +H3 +KFI1 +KFF3 +FN"
    assert tasks[0]["Task"].pop("QueueTime")
    assert tasks[0] == {
        "Task": {"TaskId": mine[-1], "UserId": user, "StartTime": None, "EndTime": None,
                 "IsRunning": False, "IsSuccess": False, "RenderId": mine[-1], "MachineId": None},
        "Render": {"RenderId": mine[-1], "FileName": "a.pov", "FilePath": "", "FileSize": len(SCENE),
                   "Arguments": f"povray {words}", "EngineId": 1},
        "Engine": {"EngineId": 1, "Name": "povray", "Extension": ".pov", "DownloadPath": "",
                   "RenderArgument": LINES.splitlines()[0].partition(".pov ")[2]}}


def test_what_becomes_of_a_task(farm: OnlineFarm) -> None:
    job, worker = farm.queued(), farm.worker()

    def shown() -> Tuple[Any, ...]:
        task = next(one["Task"] for one in farm.info()["Tasks"] if one["Task"]["TaskId"] == job)
        for name in ("QueueTime", "StartTime", "EndTime"):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", task[name] or "0001-01-01T00:00:00")
        return (bool(task["StartTime"]), bool(task["EndTime"]), task["IsRunning"],
                task["IsSuccess"], task["MachineId"])

    assert shown() == (False, False, False, False, None)
    lease = farm.lease(worker)
    assert shown() == (True, False, True, False, 1)
    farm.finish(worker, lease)
    assert shown() == (True, False, True, False, 1)
    farm.render(worker)
    assert farm.state(job) == "done" and shown() == (True, True, False, True, 1)
    job = farm.queued()
    assert farm.task("dequeue", job) == (
        200, {"IsRemoved": True, "ErrorMessage": "Task successfully dequeued."})
    assert farm.state(job) == "cancelled" and shown()[1:4] == (True, False, False)


def test_all_who_render_for_the_farm_render_what_was_sent(farm: OnlineFarm) -> None:
    """An HTTPov client and a worker of ours, on one task of RenderOnline's."""
    httpov = povfarm.Httpov(farm.scheduler, farm.access)
    router = Router(farm.api, farm.entrance, httpov, farm.online, authenticate=farm.access.identify)
    number = farm.queued([("start_frame", "1"), ("end_frame", "5"), FRAMES[2]])
    farm.clock.advance(1)
    lease = farm.lease(farm.worker())
    query = {"client": "anna:17", "version": "1.2", "job": f"{number}"}
    for command in ("getjob", "getbatch"):
        answer = Reply(router.handle(povfarm.Request(
            "GET", f"/{farm.access.guest_key}/httpov.php", {**query, "command": command})))
    assert answer.body.startswith(b"command=render\n"), answer.body
    farm.finish(farm.worker(), lease)
    assert farm.states(number).count("leased") == 1


def test_a_scene_that_fails_is_shown_as_failed(farm: OnlineFarm) -> None:
    job = farm.queued([("start_frame", "1"), ("end_frame", "9"), FRAMES[2]])
    worker = farm.worker()
    while farm.state(job) == "active":
        farm.fail(worker, farm.lease(worker), scene=True)
    task = farm.info()["Tasks"][0]["Task"]
    assert farm.state(job) == "paused"
    assert task["EndTime"] and not task["IsRunning"] and not task["IsSuccess"]


@pytest.mark.parametrize("what, flag", [
    ("dequeue", "IsRemoved"), ("download", "DownloadProvided"), ("delete", "IsDeleted")])
def test_a_task_has_to_be_named_and_ones_own(what: str, flag: str, farm: OnlineFarm) -> None:
    mine, others = farm.queued(), farm.queued(who="bob")
    own, _ = farm.scheduler.submit("own", "anna", farm.job(mine).pov.__class__(
        {"Input_File_Name": "a.pov"}, (), (povfarm.STANDARD,), ".", ("renderonline {", "renderonline 1")),
        povfarm.Manifest(()), povfarm.JobOptions())
    before = everything(farm)
    for number in (others, own, 99, (1 << 63) - 1):
        assert farm.task(what, number) == (400, {
            flag: False, "ErrorMessage": f"Task with identifier {number} not found for the current user."})
    for body in (b"", b"{", b"{}", b"[]", b"null", b'{"TaskId": "1"}', b'{"TaskId": true}',
                 b'{"TaskId": -1}', b'{"TaskId": 1.5}', b'{"TaskId": 18446744073709551616}',
                 b'{"TaskId": NaN}', b"\xff", b"[" * 100_000, b'{"TaskId": %d%s}' % (mine, b" " * povfarm.BODY_LIMIT)):
        reply = farm.call(what, body)
        assert (reply.status, reply.json()) == (400, {
            flag: False, "ErrorMessage": "Request content has an invalid format."}), body[:50]
    for kind in ("", "text/plain", "application/jsonp"):
        reply = farm.call(what, b'{"TaskId": %d}' % mine, kind)
        assert (reply.status, reply.json()) == (400, {
            flag: False, "ErrorMessage": "Request content type must be application/json."})
    assert everything(farm) == before


def test_what_is_over_is_not_in_the_queue(farm: OnlineFarm) -> None:
    job = farm.queued()
    farm.render(farm.worker())
    assert farm.task("dequeue", job) == (400, {
        "IsRemoved": False, "ErrorMessage": f"Task with identifier {job} is not in the queue."})


def test_a_download_is_a_zip_of_the_scene_and_what_is_made(farm: OnlineFarm) -> None:
    job, worker = farm.queued(), farm.worker()

    def names() -> List[str]:
        reply = farm.call("download", b'{"taskId": %d}' % job)
        assert (reply.status, reply.headers["Content-Type"]) == (200, "application/zip")
        assert re.fullmatch("attachment; filename=[0-9a-f-]{36}[.]zip",
                            reply.headers["Content-Disposition"])
        with zipfile.ZipFile(io.BytesIO(reply.body)) as archive:
            assert archive.read("a.pov") == SCENE
            return sorted(archive.namelist())

    assert names() == ["a.pov"]
    farm.finish(worker, farm.lease(worker))
    assert names() == ["a.pov", "a1.png"]
    farm.render(worker)
    assert names() == ["a.pov", "a1.png", "a2.png", "a3.png"]
    with farm.store.read() as tx:
        (farm.store.job_directory(job, "a") / tx.tasks(job)[0].name).rename(farm.root / "gone")
    assert farm.task("download", job) == (500, {
        "DownloadProvided": False,
        "ErrorMessage": "Failed to create ZIP archive after multiple attempts!"})
    (farm.root / "gone").rename(farm.store.job_directory(job, "a") / "a1.png")


def test_a_task_is_deleted_with_all_that_it_made(farm: OnlineFarm) -> None:
    before = everything(farm)
    job, worker = farm.queued(), farm.worker()
    farm.finish(worker, farm.lease(worker))
    farm.lease(worker)
    gone = (200, {"IsDeleted": True,
                  "ErrorMessage": "Task and associated render successfully deleted."})
    assert farm.task("delete", job) == gone
    assert [one for one in everything(farm) if "/blobs/" not in one] == before
    assert farm.info()["Tasks"] == [] and farm.task("delete", job)[0] == 400


def test_a_full_disk_is_told_and_leaves_nothing(
        farm: OnlineFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "free_room", lambda place: 0)
    status, reply = farm.enqueue(("request", None, wish()), FILE)
    assert status == 507 and not reply["IsAdded"] and reply["ErrorMessage"]
    monkeypatch.undo()
    farm.scheduler.look_for_room()


def test_no_form_and_no_json_breaks_it(farm: OnlineFarm) -> None:
    dice = random.Random(15)
    kind, body = form(("request", None, wish()), FILE)
    seen = set()
    for _ in range(150):
        data = bytearray(body)
        for _ in range(dice.randint(1, 6)):
            at = dice.randrange(len(data))
            data[at:at + dice.choice((0, 1, 20))] = bytes(
                dice.choice(b'-\r\n"{}[]:;=0a\xff') for _ in range(dice.choice((0, 1, 9))))
        answer = farm.call("enqueue", bytes(data), kind)
        seen.add(answer.status)
        assert answer.status in (200, 400), data
        task = bytearray(b'{"TaskId": 9999999}')
        task[dice.randrange(len(task))] = dice.randrange(256)
        assert farm.call(dice.choice(("dequeue", "download", "delete")), bytes(task)).status == 400
    assert seen == {200, 400}


# --- over the wire

ENQUEUE = """\
POST /renderapi/v1/enqueue HTTP/1.1
Host: 127.0.0.1
email: anna@example.com
token: TOKEN
Transfer-Encoding: chunked
Content-Type: multipart/form-data; boundary="5f9d3c9e-9c51-4d0e-8d3a-0c4f5b0d6d7a"

--5f9d3c9e-9c51-4d0e-8d3a-0c4f5b0d6d7a
Content-Type: application/json; charset=utf-8
Content-Disposition: form-data; name=request

{"EngineId":"0","Arguments":[{"ArgTypeId":"start_frame","Value":"1"},\
{"ArgTypeId":"end_frame","Value":"2"},{"ArgTypeId":"output_format","Value":"PNG"}]}
--5f9d3c9e-9c51-4d0e-8d3a-0c4f5b0d6d7a
Content-Type: application/octet-stream
Content-Disposition: form-data; name=file; filename="file:///home/u/scene.pov"; \
filename*=utf-8''file%3A%2F%2F%2Fhome%2Fu%2Fscene.pov

sphere { 0, 1 }

--5f9d3c9e-9c51-4d0e-8d3a-0c4f5b0d6d7a--
"""
INFO = """\
GET /renderapi/v1/info HTTP/1.1
Host: 127.0.0.1
email: anna@example.com
token: TOKEN

"""
CALL = """\
POST /renderapi/v1/%s HTTP/1.1
Host: 127.0.0.1
email: anna@example.com
token: TOKEN
Transfer-Encoding: chunked
Content-Type: application/json; charset=utf-8

{"taskId":%d}"""
WRONG = INFO.replace("TOKEN", "mine")
CONVERSATION: Sequence[Tuple[str, str, str]] = [
    (WRONG, "401", ""), (INFO, "200", r'\{"User":\{"UserId":\d+,"FirstName":"anna",.*"Tasks":\[\]\}'),
    (ENQUEUE.replace("TOKEN", "mine"), "401", r'\{"IsAdded":false,"ErrorMessage":"Unauthorized."\}'),
    (ENQUEUE, "200", r'\{"IsAdded":true,"ErrorMessage":"Task successfully enqueued."\}'),
    (INFO, "200", r'.*"TaskId":1,.*"EndTime":null,.*"FileName":"scene.pov".*"Name":"povray".*'),
    (CALL % ("download", 1), "200", "PK.*scene.pov.*"),
    (CALL % ("download", 2), "400", r'\{"DownloadProvided":false,"ErrorMessage":"Task with identifier '
                                    r'2 not found for the current user."\}'),
    (CALL % ("dequeue", 1), "200", r'\{"IsRemoved":true,"ErrorMessage":"Task successfully dequeued."\}'),
    (CALL % ("delete", 1), "200", r'\{"IsDeleted":true,"ErrorMessage":"Task and associated render '
                                  r'successfully deleted."\}'),
    (INFO, "200", r'.*"Tasks":\[\]\}'),
]


def sent(text: str) -> bytes:
    """A request as .NET sends it: what is behind the head in chunks."""
    head, _, body = text.replace("\n", "\r\n").encode().partition(b"\r\n\r\n")
    if b"chunked" not in head:
        return head + b"\r\n\r\n"
    pieces = [body[at:at + 100] for at in range(0, len(body), 100)]
    return head + b"\r\n\r\n" + b"".join(
        b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_a_conversation_as_the_client_has_it(tmp_path: Path) -> None:
    """Byte for byte what the document says of the desktop client, on one connection."""
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False, renderonline=rules())
    farm.access.add("anna", Role.USER, {}, "a-ticket-that-is-new")
    with farm.store.read() as tx:
        token = povfarm.online_token(farm.key, "anna", tx.people()[0].added)
    farm.start()
    try:
        with socket.create_connection(("127.0.0.1", farm.port), 20) as connection:
            for request, status, words in CONVERSATION:
                connection.sendall(sent(request.replace("TOKEN", token)))
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                body = answer.read().decode("latin-1")
                assert str(answer.status) == status, body
                assert re.fullmatch(words, body, re.DOTALL), body
    finally:
        farm.stop()


# --- with POV-Ray

class Client:
    """Does what the desktop client does, as far as its document tells."""

    def __init__(self, server: str, email: str, token: str) -> None:
        self.server, self.login = server, {"email": email, "token": token}

    def ask(self, method: str, what: str, body: bytes = b"", kind: str = "") -> bytes:
        connection = http.client.HTTPConnection(self.server, timeout=60)
        headers = {**self.login, **({"Content-Type": kind} if kind else {})}
        if body:
            connection.request(method, f"/renderapi/v1/{what}", iter([body]), headers,
                               encode_chunked=True)
        else:
            connection.request(method, f"/renderapi/v1/{what}", headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        assert answer.status // 100 == 2, data
        return data

    def validate(self) -> Any:
        return json.loads(self.ask("GET", "info"))

    def upload(self, scene: Path, first: int, last: int, form_at: str) -> int:
        kind, body = form(("request", None, wish([
            ("start_frame", f"{first}"), ("end_frame", f"{last}"), ("output_format", form_at)], "0")),
            ("file", f'"{scene.as_uri()}"', scene.read_bytes()))
        self.ask("POST", "enqueue", body, kind)
        return int(self.newest()["TaskId"])

    def newest(self) -> Dict[str, Any]:
        task: Dict[str, Any] = self.validate()["Tasks"][0]["Task"]
        return task

    def of_task(self, what: str, task: int) -> bytes:
        return self.ask("POST", what, b'{"taskId":%d}' % task, "application/json; charset=utf-8")


@pytest.mark.slow
def test_a_clients_pictures_are_those_of_plain_povray(povray: str, tmp_path: Path) -> None:
    (tmp_path / "farm").mkdir()
    text = LINES.replace("+W4 +H3", "+W40 +H30 +A0.3")
    (tmp_path / "farm" / "povfarm.ini").write_text(
        f"[povfarm]\nrenderonline = yes\n\n[renderonline]\n{text}")
    scene = tmp_path / "home" / "my scene.pov"
    scene.parent.mkdir()
    scene.write_text(STILL)
    shown = run(tmp_path, "engines", cwd=tmp_path)
    assert shown.returncode == 0 and "povray" in shown.stdout and "start_frame" in shown.stdout
    with contextlib.closing(RealFarm(tmp_path)) as farm:
        assert run(tmp_path, "users", "add", "anna", cwd=tmp_path).returncode == 0
        token = run(tmp_path, "users", "token", "Anna", cwd=tmp_path).stdout.strip()
        client = Client(f"127.0.0.1:{farm.port}", "anna@example.com", token)
        assert client.validate()["Tasks"] == []
        farm.work()
        for first, last, form_at, names in (
                (1, 3, "PNG", {"my_scene1.png", "my_scene2.png", "my_scene3.png"}),
                (1, 1, "BMP", {"my_scene.bmp"})):
            number = client.upload(scene, first, last, form_at)
            wait_until(lambda: client.newest()["EndTime"], seconds=120)
            assert client.newest()["IsSuccess"] and not client.newest()["IsRunning"]
            with zipfile.ZipFile(io.BytesIO(client.of_task("download", number))) as archive:
                archive.extractall(tmp_path / f"zip{number}")
            plain = tmp_path / f"plain{number}"
            plain.mkdir()
            (plain / "my_scene.pov").write_text(STILL)
            assert run_povray(["my_scene.pov", "+W40", "+H30", "+A0.3", f"+KFI{first}",
                               f"+KFF{last}", f"+F{form_at[0].replace('P', 'N')}"],
                              plain).returncode == 0
            made = {path.name for path in (tmp_path / f"zip{number}").iterdir()}
            assert made == {"my_scene.pov", *names}
            for name in names:
                look = pixels if name.endswith(".png") else Path.read_bytes
                assert look(tmp_path / f"zip{number}" / name) == look(plain / name), name
            client.of_task("delete", number)
        assert client.validate()["Tasks"] == []
        assert not list((tmp_path / "farm" / "jobs").iterdir())
