"""The farm's own JSON: each route, who may use it, and what it answers to nonsense."""

from __future__ import annotations

import collections
import copy
import io
import itertools
import json
import re
import threading
import tracemalloc
import zipfile
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Optional, Tuple
from urllib.parse import parse_qsl, urlencode

import pytest

import povfarm
from helpers.farm_in_a_box import (
    KEY,
    SCENE,
    FakeClock,
    Farm,
    Reply,
    farm_fixture,
    manifest,
    pov_job,
    sha256,
)
from helpers.pictures import png
from helpers.trust import join_by, key_of_worker, request_of
from povfarm import BodyReader, JobOptions, JobState, LeaseSpec, ProtocolError, Request, TaskState

__all__ = ["farm_fixture"]

WORKER = {"name": "anna", "cores": 4, "memory": 1 << 33, "system": "Linux 6",
          "engines": {"povray": "3.7.0.10"}, "tags": ["fast"]}
OFFER = {"want": 1, "slots": 1, "idle": 1, "wait": 0}
ZEROS = "0" * 64

# Every route and who may use it, with an example of its path.
ROUTES: Dict[Tuple[str, str], Tuple[str, str]] = {
    ("GET", "/api/v1/farm"): ("reader", "/api/v1/farm"),
    ("GET", "/api/v1/jobs"): ("reader", "/api/v1/jobs"),
    ("GET", "/api/v1/jobs/<job:int>"): ("reader", "/api/v1/jobs/1"),
    ("GET", "/api/v1/jobs/<job:int>/frames"): ("reader", "/api/v1/jobs/1/frames"),
    ("GET", "/api/v1/jobs/<job:int>/frames/<frame:int>/image"):
        ("reader", "/api/v1/jobs/1/frames/1/image"),
    ("GET", "/api/v1/jobs/<job:int>/frames/<frame:int>/log"):
        ("reader", "/api/v1/jobs/1/frames/1/log"),
    ("GET", "/api/v1/jobs/<job:int>/slices/<task:int>/image"):
        ("reader", "/api/v1/jobs/1/slices/1/image"),
    ("GET", "/api/v1/jobs/<job:int>/files"): ("reader", "/api/v1/jobs/1/files"),
    ("GET", "/api/v1/jobs/<job:int>/files/<hash>"): ("reader", f"/api/v1/jobs/1/files/{ZEROS}"),
    ("GET", "/api/v1/jobs/<job:int>/archive.zip"): ("reader", "/api/v1/jobs/1/archive.zip"),
    ("GET", "/api/v1/jobs/<job:int>/film.png"): ("reader", "/api/v1/jobs/1/film.png"),
    ("GET", "/api/v1/workers"): ("reader", "/api/v1/workers"),
    ("GET", "/api/v1/totals"): ("reader", "/api/v1/totals"),
    ("GET", "/api/v1/events"): ("reader", "/api/v1/events?wait=0"),
    ("GET", "/api/v1/openapi.json"): ("reader", "/api/v1/openapi.json"),
    ("GET", "/api/v1/metrics"): ("reader", "/api/v1/metrics"),
    ("POST", "/api/v1/jobs"): ("submit", "/api/v1/jobs"),
    ("PUT", "/api/v1/blobs/<hash>"): ("submit", f"/api/v1/blobs/{ZEROS}"),
    ("POST", "/api/v1/jobs/<job:int>/<action>"): ("user", "/api/v1/jobs/1/pause"),
    ("PATCH", "/api/v1/jobs/<job:int>"): ("user", "/api/v1/jobs/1"),
    ("DELETE", "/api/v1/jobs/<job:int>"): ("user", "/api/v1/jobs/1"),
    ("POST", "/api/v1/workers/admit"): ("admin", "/api/v1/workers/admit"),
    ("POST", "/api/v1/workers/<worker:int>/<action>"): ("user", "/api/v1/workers/99/pause"),
    ("DELETE", "/api/v1/workers/<worker:int>"): ("admin", "/api/v1/workers/99"),
    ("POST", "/api/v1/login"): ("person", "/api/v1/login"),
    ("GET", "/api/v1/users"): ("person", "/api/v1/users"),
    ("POST", "/api/v1/users"): ("admin", "/api/v1/users"),
    ("POST", "/api/v1/users/come"): ("anyone", "/api/v1/users/come"),
    ("PATCH", "/api/v1/users/<name>"): ("admin", "/api/v1/users/anna"),
    ("DELETE", "/api/v1/users/<name>"): ("admin", "/api/v1/users/anna"),
    ("POST", "/api/v1/workers"): ("anyone", "/api/v1/workers"),
    ("POST", "/api/v1/hello"): ("anyone", "/api/v1/hello"),
    ("POST", "/api/v1/lease"): ("pending", "/api/v1/lease"),
    ("POST", "/api/v1/leave"): ("pending", "/api/v1/leave"),
    ("POST", "/api/v1/beat"): ("worker", "/api/v1/beat"),
    ("POST", "/api/v1/leases/<lease>/release"): ("worker", "/api/v1/leases/abc/release"),
    ("PUT", "/api/v1/leases/<lease>/tasks/<task:int>"): ("worker", "/api/v1/leases/abc/tasks/1"),
    ("POST", "/api/v1/leases/<lease>/tasks/<task:int>/fail"):
        ("worker", "/api/v1/leases/abc/tasks/1/fail"),
    ("PUT", "/api/v1/leases/<lease>/tasks/<task:int>/state"):
        ("worker", "/api/v1/leases/abc/tasks/1/state"),
    ("POST", "/api/v1/jobs/<job:int>/fetched"): ("user", "/api/v1/jobs/1/fetched"),
    ("POST", "/api/v1/tidy"): ("admin", "/api/v1/tidy"),
    ("GET", "/api/v1/tasks/<task:int>/<what>"): ("worker", "/api/v1/tasks/1/result"),
    ("GET", "/api/v1/manifests/<key>"): ("worker", f"/api/v1/manifests/{ZEROS}"),
    ("GET", "/api/v1/blobs/<hash>"): ("worker", f"/api/v1/blobs/{ZEROS}"),
}
ROLES: Dict[str, FrozenSet[str]] = {
    "stranger": frozenset({"reader"}),
    "pending": frozenset({"reader", "pending"}),
    "worker": frozenset({"reader", "pending", "worker"}),
    "admin": frozenset({"reader", "person", "submit", "user", "admin"}),
}


def join(farm: Farm, name: str = "anna", key: Optional[str] = KEY, **more: Any) -> Dict[str, Any]:
    """Join as a worker; return the answer with its key and its code."""
    return join_by(farm.ask, key, {**WORKER, "name": name}, farm.access.farm_id, **more)


def secret_of(key: str) -> str:
    return key.partition(":")[2]


def key_of(who: str, farm: Farm) -> Optional[str]:
    if who in ("stranger", "admin"):
        return KEY if who == "admin" else None
    return str(join(farm, key=None if who == "pending" else KEY)["key"])


def working(farm: Farm, frames: int = 3) -> Tuple[str, LeaseSpec]:
    """A job, a worker's token, and its lease."""
    farm.submit(frames)
    token = join(farm)["key"]
    reply = farm.ask("POST", "/api/v1/lease", key=token, json_body=OFFER).json()
    return token, LeaseSpec.from_wire(reply["leases"][0])


def deliver(farm: Farm, token: str, lease: LeaseSpec, index: int = 0, query: str = "",
            image: Optional[bytes] = None) -> Reply:
    task = lease.tasks[index]
    text = b"POV-Ray said something\n"
    return farm.ask("PUT", f"/api/v1/leases/{lease.id}/tasks/{task.id}?log={len(text)}{query}",
                    key=token, body=text + (png(task.id) if image is None else image))


def is_refusal(reply: Reply) -> bool:
    wire = reply.json()
    return set(wire) == {"error", "detail"} and bool(wire["error"]) and "\n" not in wire["error"]


# --- who may come in

def test_the_routes_are_these(farm: Farm) -> None:
    found = {(bound.route.method, bound.route.pattern): bound.route.role
             for bound in farm.router.routes}
    assert found == {place: role for place, (role, _) in ROUTES.items()}


@pytest.mark.parametrize("place", ROUTES, ids=" ".join)
def test_a_route_is_open_to_its_role_and_closed_to_others(
        place: Tuple[str, str], farm: Farm) -> None:
    farm.submit()
    role, target = ROUTES[place]
    for who, roles in ROLES.items():
        key = key_of(who, farm)
        before = farm.scheduler.wait_events(0, 0, 100)
        reply = farm.ask(place[0], target, key=key)
        if role == "anyone" or role in roles:
            assert reply.status not in (401, 403), who
        else:
            assert reply.status == (401 if who == "stranger" else 403), who
            assert is_refusal(reply)
            assert farm.scheduler.wait_events(0, 0, 100) == before
        if place[0] == "DELETE" and who == "admin":
            farm.submit()


@pytest.mark.parametrize("who", ["wrong key", "removed worker"])
def test_a_key_that_is_not_the_farms_opens_nothing(who: str, farm: Farm) -> None:
    key = "x" * 64
    if who == "removed worker":
        worker = join(farm)
        key = worker["key"]
        assert farm.ask("DELETE", f"/api/v1/workers/{worker['id']}").status == 204
    for (method, _), (_, target) in ROUTES.items():
        reply = farm.ask(method, target, key=key)
        assert reply.status == 401 and is_refusal(reply), target


def test_a_private_farm_shows_strangers_nothing(tmp_path: Any) -> None:
    farm = Farm(tmp_path, private=True)
    farm.submit()
    for (method, _), (role, target) in ROUTES.items():
        reply = farm.ask(method, target, key=None)
        assert (reply.status == 401) is (role != "anyone"), target
    assert farm.ask("GET", "/api/v1/jobs", key=KEY).status == 200
    farm.close()


def browser(farm: Farm) -> Dict[str, str]:
    session = farm.access.log_in(farm.access.login_code())
    return {"cookie": f"other=1; {farm.access.cookie}={session}"}


def test_a_browser_that_logged_in_sees_a_private_farm(tmp_path: Any) -> None:
    farm = Farm(tmp_path, private=True)
    cookie = browser(farm)
    assert farm.ask("GET", "/api/v1/jobs", key=None, headers=cookie).status == 200
    wrong = {"cookie": f"{farm.access.cookie}=guess"}
    assert farm.ask("GET", "/api/v1/jobs", key=None, headers=wrong).status == 401
    farm.clock.advance(povfarm.SESSION_TIME + 1)
    assert farm.ask("GET", "/api/v1/jobs", key=None, headers=cookie).status == 401
    farm.close()


def test_a_cookie_alone_changes_nothing(farm: Farm) -> None:
    """Any page on this host can make a browser send it: see Access.identify."""
    job = farm.submit()
    before = farm.job(job), farm.scheduler.wait_events(0, 0, 100)
    cookie = browser(farm)
    for (method, _), (role, target) in ROUTES.items():
        if role in ("user", "admin"):
            assert farm.ask(method, target, key=None, headers=cookie).status in (401, 403), target
    assert (farm.job(job), farm.scheduler.wait_events(0, 0, 100)) == before


def test_a_login_code_is_good_once_and_for_ten_minutes(farm: Farm) -> None:
    path = farm.ask("POST", "/api/v1/login", json_body={}).json()["path"]
    code = path.rpartition("/")[2]
    assert path == f"/login/{code}" and farm.access.log_in(code)
    for bad in (code, "", "x", "ä"):
        with pytest.raises(ProtocolError) as caught:
            farm.access.log_in(bad)
        assert caught.value.status == 403
    late = farm.access.login_code()
    farm.clock.advance(601)
    with pytest.raises(ProtocolError):
        farm.access.log_in(late)


def test_one_person_has_so_many_links_and_browsers_and_takes_those_of_nobody_else(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "MAX_LOGINS", 3)
    access = farm.access
    farm.ask("POST", "/api/v1/users", json_body={
        "name": "anna", "role": "user", "limits": {}, "ticket": "ab" * 16, "uses": 0})
    others = access.log_in(access.login_code("anna")), access.login_code("anna")
    codes = [access.login_code() for _ in range(5)]
    for code in codes[:2]:
        with pytest.raises(ProtocolError):
            access.log_in(code)
    sessions = [access.log_in(code) for code in codes[2:]]
    sessions.append(access.log_in(access.login_code()))
    known = access._sessions.keys()
    assert [povfarm.secret_hash(one) in known for one in (*sessions, others[0])] == [
        False, True, True, True, True]
    assert access.log_in(others[1]) and len(access._codes) == 0


def test_a_form_holds_the_token_of_its_own_browser(farm: Farm) -> None:
    mine, other = browser(farm), browser(farm)
    fields = {**mine, "content-type": "application/x-www-form-urlencoded"}
    good = farm.access.form_token(request_of(farm.access, mine))
    bad = farm.access.form_token(request_of(farm.access, other))
    for token in (good, bad, "", "ä", "x" * 64, None):
        body = urlencode({} if token is None else {"token": token}).encode()
        request = request_of(farm.access, fields, body)
        if token == good:
            farm.access.check_form(request)
            continue
        with pytest.raises(ProtocolError) as caught:
            farm.access.check_form(request)
        assert caught.value.status == 403


# --- workers come

def test_with_the_key_a_worker_is_in_at_once(farm: Farm) -> None:
    answer = join(farm)
    assert answer["admitted"] is True and "code" not in farm.ask("GET", "/api/v1/workers").json()
    farm.submit()
    reply = farm.ask("POST", "/api/v1/lease", key=answer["key"], json_body=OFFER).json()
    assert len(reply["leases"]) == 1 and reply["pending"] is False and reply["open"] == 3


def test_without_a_key_a_worker_waits_to_be_admitted(farm: Farm) -> None:
    farm.submit()
    answer = join(farm, key=None)
    assert answer["admitted"] is False and re.fullmatch("[A-Z2-9]{6}", answer["code"])
    reply = farm.ask("POST", "/api/v1/lease", key=answer["key"], json_body=OFFER).json()
    assert reply == {"leases": [], "open": 0, "pending": True, "gone": [], "ends": False,
                     "rest": ""}
    assert farm.ask("GET", "/api/v1/workers").json()["workers"][0]["code"] == answer["code"]
    admit = farm.ask("POST", "/api/v1/workers/admit", json_body={"code": answer["code"]})
    assert admit.json() == {"name": "anna"}
    reply = farm.ask("POST", "/api/v1/lease", key=answer["key"], json_body=OFFER).json()
    assert len(reply["leases"]) == 1
    assert "code" not in farm.ask("GET", "/api/v1/workers").json()["workers"][0]


@pytest.mark.parametrize("remote, admitted", [
    ("127.0.0.1", True), ("192.168.1.9", True), ("10.1.2.3", True), ("fe80::1", True), ("::1", True),
    ("172.16.0.1", True), ("172.31.255.255", True), ("169.254.7.7", True), ("fd12::1", True),
    ("fe80::1%eth0", True), ("8.8.8.8", False), ("2a00:1450:4001::5", False), ("172.32.0.1", False),
    ("100.64.0.1", False), ("0.0.0.0", False), ("192.0.2.1", False), ("240.0.0.1", False),
    ("2001:0:808:808::1", False), ("2001:db8::1", False),
])
def test_an_open_farm_admits_private_addresses(
        remote: str, admitted: bool, tmp_path: Any) -> None:
    farm = Farm(tmp_path, admit_private=True)
    assert join(farm, key=None, remote=remote)["admitted"] is admitted
    assert join(farm, key=KEY, remote=remote)["admitted"] is True
    farm.close()


def test_wrong_keys_are_answered_more_and_more_slowly(farm: Farm) -> None:
    def took(key: str, remote: str = "10.0.0.66") -> float:
        began = farm.clock.mono
        status = farm.ask("GET", "/api/v1/farm", key=key, remote=remote).status
        assert status == (200 if key == KEY else 401)
        return farm.clock.mono - began

    times = [took("wrong") for _ in range(16)]
    assert times[:5] == [0] * 5 and times == sorted(times) and times[5] < 0.5 and times[-1] == 2
    assert took(KEY) == took(KEY, "10.0.0.7") == took("wrong", "10.0.0.7") == 0
    farm.clock.advance(61)
    assert took("wrong") == 0, "it is forgotten"


class Holding(FakeClock):
    """Keeps whoever waits until it is told to let go."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Semaphore(0)
        self.over = False

    def wait(self, condition: Any, seconds: float) -> bool:
        self.waiting.release()
        return bool(condition.wait_for(lambda: self.over, 30))


def test_wrong_keys_at_the_same_time_are_no_way_around(tmp_path: Any) -> None:
    clock = Holding()
    farm = Farm(tmp_path, clock)

    def status(key: str, remote: str) -> int:
        return farm.ask("GET", "/api/v1/farm", key=key, remote=remote).status

    assert [status("wrong", "10.0.0.66") for _ in range(povfarm.FREE_TRIES)] == [401] * 5
    guessers = [threading.Thread(target=status, args=("wrong", "10.0.0.66"))
                for _ in range(povfarm.MAX_HELD)]
    for guesser in guessers:
        guesser.start()
        assert clock.waiting.acquire(timeout=60)
    assert (status(KEY, "10.0.0.66"), status("wrong", "10.0.0.66")) == (429, 429)
    assert (status(KEY, "10.0.0.7"), status("wrong", "10.0.0.7")) == (200, 401)
    clock.over = True
    with farm.access._lock:
        farm.access._lock.notify_all()
    for guesser in guessers:
        guesser.join(60)
    assert status(KEY, "10.0.0.66") == 200 and not farm.access._held
    farm.close()


def test_what_is_remembered_of_strangers_is_bounded(farm: Farm) -> None:
    for number in range(povfarm.MAX_ADDRESSES + 50):
        farm.ask("GET", "/api/v1/farm", key="wrong", remote=f"10.9.{number // 256}.{number % 256}")
    assert len(farm.access._tries) == povfarm.MAX_ADDRESSES
    for _ in range(30):
        farm.access.log_in(farm.access.login_code())
        farm.access.login_code()
        farm.clock.advance(povfarm.SESSION_TIME)
    assert len(farm.access._sessions) <= 2 and len(farm.access._codes) <= 1


def test_a_guessed_login_code_costs_time_too(farm: Farm) -> None:
    began = farm.clock.mono
    for _ in range(16):
        with pytest.raises(ProtocolError):
            farm.access.log_in("guess", "10.0.0.66")
    assert farm.clock.mono - began > 10
    code, began = farm.access.login_code(), farm.clock.mono
    farm.access.log_in(code, "10.0.0.66")
    assert farm.clock.mono == began


def test_so_many_may_ask_to_join_and_those_that_went_away_make_room(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "MAX_PENDING", 20)

    def ask(number: int) -> int:
        remote = f"10.0.{number}.1"
        status = farm.ask("POST", "/api/v1/workers", key=None, remote=remote,
                          json_body={**WORKER, "commitment": f"{number:064x}"}).status
        if status == 200:
            join(farm, key=None, remote=remote)
        return status

    assert {ask(number) for number in range(povfarm.MAX_PENDING)} == {200}
    assert ask(200) == 429
    assert join(farm, remote="10.0.0.1")["admitted"], "with the key one comes in all the same"
    farm.clock.advance(61)
    assert ask(201) == 200
    views = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert len([view for view in views if "code" in view]) == povfarm.MAX_PENDING


def test_no_secret_is_in_the_database(farm: Farm) -> None:
    token = join(farm)["key"]
    session = farm.access.log_in(farm.access.login_code())
    farm.ask("GET", "/api/v1/farm", key=token)
    with farm.store.tx():
        pass
    stored = b"".join(path.read_bytes() for path in farm.root.rglob("*") if path.is_file())
    assert KEY.encode() not in secret_of(token).encode() and b"anna" in stored and sha256(secret_of(token).encode()).encode() in stored
    for secret in (secret_of(token), session, KEY):
        assert secret.encode() not in stored


def test_a_worker_that_comes_again_is_the_same(farm: Farm) -> None:
    first = join(farm)
    again = farm.ask("POST", "/api/v1/workers", key=first["key"],
                     json_body={**WORKER, "cores": 16}).json()
    assert again == {"id": first["id"], "admitted": True}
    views = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert [(view["id"], view["cores"]) for view in views] == [(first["id"], 16)]


def test_a_worker_whose_answer_was_lost_joins_once(farm: Farm) -> None:
    wire = {**WORKER, "ticket": "t" * 32}
    for _ in range(2):
        reply = farm.ask("POST", "/api/v1/workers", json_body=wire)
        assert reply.status == 201 and reply.json() == {"id": 1, "admitted": True}
        views = farm.ask("GET", "/api/v1/workers").json()["workers"]
        assert [view["state"] for view in views] == ["idle"]
    mine = key_of_worker(1, KEY, farm.access.farm_id, "t" * 32)
    assert farm.leases(1) == [] and farm.ask("POST", "/api/v1/leave", key=mine,
                                             json_body={}).status in (200, 204)
    farm.ask("DELETE", "/api/v1/workers/1")
    assert farm.ask("POST", "/api/v1/leave", key=mine, json_body={}).status == 401
    assert farm.ask("POST", "/api/v1/workers", json_body=wire).json()["id"] == 2


def test_a_pairing_whose_answers_were_lost_makes_one_worker(farm: Farm) -> None:
    mine = povfarm.Pairing()
    wire = {**WORKER, "commitment": mine.commitment}
    shown = {**wire, "share": mine.share, "nonce": mine.nonce}
    answers = [farm.ask("POST", "/api/v1/workers", key=None, json_body=body).json()
               for body in (wire, wire, shown, shown)]
    assert answers[0] == answers[1] and answers[2] == answers[3] == {"id": 1, "admitted": False}
    views = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert [view["state"] for view in views] == ["pending"]


@pytest.mark.parametrize("ticket", ["short", "t" * 31, "t" * 101, "t" * 31 + " ", 7, None])
def test_a_ticket_that_could_be_guessed_is_refused(farm: Farm, ticket: Any) -> None:
    reply = farm.ask("POST", "/api/v1/workers", json_body={**WORKER, "ticket": ticket})
    assert reply.status == 400 and "ticket" in reply.json()["error"]


def test_workers_are_shown_with_what_they_do(farm: Farm) -> None:
    token, lease = working(farm)
    join(farm, "idle")
    join(farm, "zoe", key=None)
    views = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert [(view["name"], view["state"], view["runs"]) for view in views] == [
        ("anna", "working", 1), ("idle", "idle", 0), ("zoe", "pending", 0)]
    assert views[0]["engines"] == {"povray": "3.7.0.10"} and views[0]["tags"] == ["fast"]
    assert "token" not in views[0]
    farm.ask("POST", "/api/v1/leave", key=token, json_body={})
    farm.clock.advance(31)
    views = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert [view["state"] for view in views] == ["gone", "gone", "gone"]
    assert farm.states(lease.job)[0] == "queued"


# --- a job from end to end

def test_a_job_from_submit_to_archive(farm: Farm) -> None:
    files = {"scene.pov": SCENE, "inc/colours ä.inc": b"#declare Rot = 1;\n"}
    project = manifest(files)
    body = {"name": "ball", "pov": pov_job(3).to_wire(), "manifest": project.to_wire(),
            "options": {"priority": 3}}
    reply = farm.ask("POST", "/api/v1/jobs", json_body=body)
    answer = reply.json()
    assert reply.status == 201 and sorted(answer["missing"]) == sorted(map(sha256, files.values()))
    for data in files.values():
        assert farm.ask("PUT", f"/api/v1/blobs/{sha256(data)}", body=data).status == 204
    job = answer["id"]
    token = join(farm)["key"]
    while True:
        leases = farm.ask("POST", "/api/v1/lease", key=token, json_body=OFFER).json()["leases"]
        if not leases:
            break
        lease = LeaseSpec.from_wire(leases[0])
        wire = farm.ask("GET", f"/api/v1/manifests/{lease.manifest}", key=token).json()
        assert povfarm.Manifest.from_wire(wire) == project
        for file in project.files:
            blob = farm.ask("GET", f"/api/v1/blobs/{file.sha256}", key=token)
            assert blob.body == files[file.path]
        for index in range(len(lease.tasks)):
            query = "&cpu=1.5&wall=2.0&memory=1000"
            assert deliver(farm, token, lease, index, query).json() == {"accepted": True}
    view = farm.ask("GET", f"/api/v1/jobs/{job}").json()
    assert (view["state"], view["progress"], view["cpu"], view["wall"]) == ("done", 1.0, 4.5, 6.0)
    assert (view["width"], view["height"], view["extension"]) == (4, 3, ".png")
    assert (view["owner"], view["priority"], view["failure"]) == ("admin", 3, None)
    frames = farm.ask("GET", f"/api/v1/jobs/{job}/frames").json()["frames"]
    images = {}
    for frame in frames:
        assert (frame["state"], frame["progress"], frame["worker"]) == ("done", 1.0, "anna")
        image = farm.ask("GET", f"/api/v1/jobs/{job}/frames/{frame['frame']}/image")
        assert image.headers["Content-Type"] == "image/png"
        assert sha256(image.body) == frame["sha256"] and len(image.body) == frame["size"]
        images[frame["name"]] = image.body
    assert sorted(images) == ["out1.png", "out2.png", "out3.png"]
    with zipfile.ZipFile(io.BytesIO(
            farm.ask("GET", f"/api/v1/jobs/{job}/archive.zip").body)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == images
    assert farm.ask("DELETE", f"/api/v1/jobs/{job}").status == 204
    assert farm.ask("GET", f"/api/v1/jobs/{job}").status == 404


def test_the_archive_of_a_job_in_work_has_what_is_finished(farm: Farm) -> None:
    token, lease = working(farm)
    for names in ([], ["out1.png"]):
        reply = farm.ask("GET", "/api/v1/jobs/1/archive.zip")
        assert reply.headers["Content-Type"] == "application/zip"
        assert "1-ball.zip" in reply.headers["Content-Disposition"]
        with zipfile.ZipFile(io.BytesIO(reply.body)) as archive:
            assert archive.namelist() == names
        deliver(farm, token, lease)


def zip_of(files: Mapping[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return data.getvalue()


def test_files_that_the_scene_wrote_come_with_an_image(farm: Farm) -> None:
    token, lease = working(farm)
    files = {"a.txt": b"text", "sub/\u00fc.csv": b"1,2"}
    packed = zip_of(files)
    path = f"/api/v1/leases/{lease.id}/tasks/{lease.tasks[0].id}?log=3&files={len(packed)}"
    reply = farm.ask("PUT", path, key=token, body=b"log" + png(lease.tasks[0].id) + packed)
    assert reply.status == 200 and reply.json() == {"accepted": True}
    listed = farm.ask("GET", "/api/v1/jobs/1/files", key=None).json()["files"]
    assert [file["path"] for file in listed] == list(files)
    for file in listed:
        got = farm.ask("GET", f"/api/v1/jobs/1/files/{file['sha256']}", key=None)
        assert got.body == files[file["path"]] and len(got.body) == file["size"]
        assert got.headers["Content-Type"] == "application/octet-stream"
    with zipfile.ZipFile(io.BytesIO(farm.ask("GET", "/api/v1/jobs/1/archive.zip").body)) as archive:
        assert archive.namelist() == [*files, "out1.png"]
    # Of the contents that the farm keeps only these are a job's to show.
    assert farm.ask("GET", f"/api/v1/jobs/1/files/{sha256(SCENE)}").status == 404


def test_files_that_no_scene_may_write_refuse_the_delivery(farm: Farm) -> None:
    token, lease = working(farm)
    image = png(lease.tasks[0].id)
    for packed in (zip_of({"../up.txt": b"x"}), b"no zip", zip_of({".profile": b"x"})):
        path = f"/api/v1/leases/{lease.id}/tasks/{lease.tasks[0].id}?files={len(packed)}"
        assert farm.ask("PUT", path, key=token, body=image + packed).status == 400
    assert farm.states(1)[0] == "leased" and farm.ask("GET", "/api/v1/jobs/1/files").json() == {
        "files": []}


def test_the_log_has_every_try_with_its_end(farm: Farm) -> None:
    token, lease = working(farm, frames=1)
    farm.ask("POST", f"/api/v1/leases/{lease.id}/tasks/{lease.tasks[0].id}/fail", key=token,
             json_body={"message": "Parse Error: no ball", "scene": False, "log": "line 1\nöl\n"})
    view = farm.ask("GET", "/api/v1/jobs/1").json()
    assert view["failure"] == {"frame": 0, "message": "Parse Error: no ball"}
    leases = farm.ask("POST", "/api/v1/lease", key=token, json_body=OFFER).json()["leases"]
    deliver(farm, token, LeaseSpec.from_wire(leases[0]))
    text = farm.ask("GET", "/api/v1/jobs/1/frames/0/log").body.decode()
    assert text.index("Parse Error: no ball") < text.index("line 1\nöl\n") < text.index(
        "POV-Ray said something")
    assert "failed" in text and "done" in text and "anna" in text


@pytest.mark.parametrize("action, state", [
    ("pause", "paused"), ("cancel", "cancelled"), ("retry", "active")])
def test_a_job_is_steered(action: str, state: str, farm: Farm) -> None:
    job = farm.submit()
    reply = farm.ask("POST", f"/api/v1/jobs/{job}/{action}", json_body={})
    assert reply.status == 200 and reply.json()["state"] == state == farm.state(job)
    if action == "pause":
        assert farm.ask("POST", f"/api/v1/jobs/{job}/resume").json()["state"] == "active"


def test_what_cannot_be_is_a_conflict(farm: Farm) -> None:
    job = farm.submit()
    farm.ask("POST", f"/api/v1/jobs/{job}/cancel")
    for action in ("cancel", "pause", "resume"):
        reply = farm.ask("POST", f"/api/v1/jobs/{job}/{action}")
        assert reply.status == 409 and is_refusal(reply)


def test_a_job_is_changed(farm: Farm) -> None:
    job = farm.submit()
    changes = {"priority": 7, "max_workers": 2, "retry_limit": 5, "in_order": True}
    view = farm.ask("PATCH", f"/api/v1/jobs/{job}", json_body=changes).json()
    assert {name: view[name] for name in changes} == changes


def test_lists_come_in_pages(farm: Farm) -> None:
    jobs = [farm.submit(5, name=f"j{number}") for number in range(5)]
    seen: List[int] = []
    while True:
        after = f"&after={seen[-1]}" if seen else ""
        page = farm.ask("GET", f"/api/v1/jobs?limit=2{after}").json()["jobs"]
        if not page:
            break
        seen += [view["id"] for view in page]
    assert seen == jobs[::-1]
    page = farm.ask("GET", f"/api/v1/jobs/{jobs[0]}/frames?limit=2&after=2").json()["frames"]
    assert [view["frame"] for view in page] == [3, 4]
    page = farm.ask("GET", f"/api/v1/jobs/{jobs[0]}/frames").json()["frames"]
    assert [view["frame"] for view in page] == [1, 2, 3, 4, 5]


def test_a_page_has_an_end_however_much_is_asked_for(farm: Farm) -> None:
    farm.submit(povfarm.MAX_LISTED + 5)
    for limit in ("5000", "9" * 15, "-1"):
        page = farm.ask("GET", f"/api/v1/jobs/1/frames?limit={limit}").json()["frames"]
        assert len(page) == povfarm.MAX_LISTED
    assert farm.ask("GET", "/api/v1/jobs?limit=0").json() == {"jobs": []}


def test_progress_and_the_time_that_is_left(farm: Farm) -> None:
    token, lease = working(farm, frames=4)
    farm.clock.advance(10)
    deliver(farm, token, lease)
    reply = farm.ask("POST", "/api/v1/lease", key=token, json_body=OFFER).json()
    second = LeaseSpec.from_wire(reply["leases"][0])
    beat = {"leases": {second.id: {str(second.tasks[0].id): 0.5}}, "wait": 0}
    assert farm.ask("POST", "/api/v1/beat", key=token, json_body=beat).json() == {
        "ended": [], "cuts": {}, "bring": [], "ends": False, "rest": ""}
    farm.clock.advance(5)
    view = farm.ask("GET", "/api/v1/jobs/1").json()
    assert view["progress"] == pytest.approx(1.5 / 4)
    assert view["elapsed"] == pytest.approx(15) and view["rate"] == pytest.approx(0.1)
    assert view["eta"] == pytest.approx(25)
    assert view["frames"]["total"] == 4 and view["frames"]["done"] == 1
    frame = farm.ask("GET", "/api/v1/jobs/1/frames").json()["frames"][1]
    assert (frame["state"], frame["progress"]) == ("leased", 0.5)
    for asked, share in (("cancel?frames=4", 1.5 / 3), ("cancel", 1 / 4)):
        view = farm.ask("POST", f"/api/v1/jobs/1/{asked}").json()
        assert view["progress"] == pytest.approx(share), "who cancels frames is not waiting for them"


def test_a_frame_that_two_render_counts_once_in_the_progress(farm: Farm) -> None:
    farm.submit(2)
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.finish(anna, farm.lease(anna))
    first = farm.lease(anna)
    farm.clock.advance(6)
    second = farm.lease(bert)
    for worker, lease in ((anna, first), (bert, second)):
        farm.scheduler.beat(worker, {lease.id: {lease.tasks[0].id: 0.9}}, 0)
    view = farm.ask("GET", "/api/v1/jobs/1").json()
    assert view["progress"] == pytest.approx(1.9 / 2) and view["eta"] > 0


def test_a_beat_tells_what_ended(farm: Farm) -> None:
    token, lease = working(farm)
    farm.ask("POST", "/api/v1/jobs/1/cancel")
    reply = farm.ask("POST", "/api/v1/beat", key=token,
                     json_body={"leases": {lease.id: {}, "nonsense": {}}, "wait": 5})
    assert sorted(reply.json()["ended"]) == sorted([lease.id, "nonsense"])


def test_a_lease_is_handed_back(farm: Farm) -> None:
    token, lease = working(farm)
    reply = farm.ask("POST", f"/api/v1/leases/{lease.id}/release", key=token, json_body={})
    assert reply.status == 204 and farm.states(1)[0] == "queued"


def test_a_worker_that_shows_the_lease_of_another_is_told_that_it_is_gone(farm: Farm) -> None:
    _, lease = working(farm)
    other = join(farm, "bert")["key"]
    assert deliver(farm, other, lease).status == 410
    for target, body in ((f"/api/v1/leases/{lease.id}/release", {}),
                         (f"/api/v1/leases/{lease.id}/tasks/{lease.tasks[0].id}/fail",
                          {"message": "x", "scene": False, "log": ""})):
        reply = farm.ask("POST", target, key=other, json_body=body)
        assert reply.status == 410 and is_refusal(reply)
    assert farm.states(1)[0] == "leased"


def ask_in_blocks(farm: Farm, method: str, target: str, headers: Mapping[str, str],
                  blocks: Iterator[bytes], size: Optional[int]) -> povfarm.Response:
    """A request whose body comes a little at a time."""
    path, _, query = target.partition("?")
    body = BodyReader(itertools.chain(blocks, [b""]), size)
    return farm.router.handle(
        Request(method, path, dict(parse_qsl(query)), headers, body, target=target))


def test_a_lease_is_looked_at_before_the_body(farm: Farm) -> None:
    _, lease = working(farm)
    bert = join(farm, "bert")["key"]

    def blocks() -> Iterator[bytes]:
        raise AssertionError("the body is read")
        yield b""

    for what in ("", "/state"):
        target = f"/api/v1/leases/{lease.id}/tasks/1{what}"
        other = farm.signer.headers(bert, "PUT", target, sha256=ZEROS)
        answer = ask_in_blocks(farm, "PUT", target, other, blocks(), 1000)
        assert answer.status == 410
    assert not list(farm.root.glob("incoming/*"))


@pytest.mark.parametrize("known", [True, False], ids=["length", "chunks"])
def test_a_delivery_is_never_whole_in_memory(known: bool, farm: Farm) -> None:
    width, height, mark = 4000, 1000, 1 << 16
    farm.submit(1, values={"Width": f"{width}", "Height": f"{height}", "Output_File_Type": "P"})
    token = join(farm)["key"]
    reply = farm.ask("POST", "/api/v1/lease", key=token, json_body=OFFER).json()
    lease = LeaseSpec.from_wire(reply["leases"][0])
    text, head = b"log", b"P6\n%d %d\n255\n" % (width, height)
    packed = zip_of({"a.txt": bytes(20_000_000)})  # not compressed
    rest, sizes = 3 * width * height, (len(text) + len(head), len(packed))
    digest = sha256(text + head + bytes(rest) + packed)
    blocks = itertools.chain([text + head], itertools.repeat(bytes(mark), rest // mark),
                             [bytes(rest % mark)], [packed[at:at + mark]
                                                    for at in range(0, len(packed), mark)])
    target = (f"/api/v1/leases/{lease.id}/tasks/{lease.tasks[0].id}"
              f"?log={len(text)}&files={len(packed)}")
    headers = farm.signer.headers(token, "PUT", target, sha256=digest)
    tracemalloc.start()
    answer = ask_in_blocks(farm, "PUT", target, headers, blocks,
                           sum(sizes) + rest if known else None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.body == b'{"accepted":true}' and peak < 2_000_000, peak
    image = farm.root / "jobs" / "1-ball" / "out.ppm"
    assert image.stat().st_size == len(head) + rest and not list(farm.root.glob("incoming/*"))
    file, = farm.ask("GET", "/api/v1/jobs/1/files").json()["files"]
    assert (file["path"], file["size"]) == ("a.txt", 20_000_000)


@pytest.mark.parametrize("image", [b"", b"no picture", png()[:-4], png(width=9)])
def test_an_image_that_is_not_the_one_asked_for_is_unprocessable(
        image: bytes, farm: Farm) -> None:
    token, lease = working(farm)
    reply = deliver(farm, token, lease, image=image)
    assert reply.status == 422 and is_refusal(reply)
    assert farm.states(1)[0] == "leased"


def test_a_blob_is_refused_when_wrong_or_not_wanted(farm: Farm) -> None:
    farm.submit(send=False)
    put = f"/api/v1/blobs/{sha256(SCENE)}"
    assert farm.ask("PUT", put, body=b"another text").status == 422
    assert farm.ask("PUT", f"/api/v1/blobs/{sha256(b'spam')}", body=b"spam").status == 404
    for bad in ("xyz", ZEROS[:-1], ZEROS + "0", "G" * 64, sha256(SCENE).upper()):
        assert farm.ask("PUT", f"/api/v1/blobs/{bad}", body=SCENE).status == 400
    assert farm.state(1) == "waiting"
    assert farm.ask("PUT", put, body=SCENE).status == 204 and farm.state(1) == "active"


# --- images: ranges and caching

@pytest.fixture
def still(farm: Farm) -> Farm:
    """A farm with one finished image."""
    token, lease = working(farm, frames=1)
    assert deliver(farm, token, lease, image=png(5)).json() == {"accepted": True}
    return farm


def test_a_job_tells_how_large_it_is_which_povray_it_wants_and_when_it_was_begun(farm: Farm) -> None:
    job = farm.submit(2, files={"scene.pov": b"sphere", "a.inc": b"1234"}, povray="3.7")

    def told() -> Dict[str, Any]:
        view = farm.ask("GET", f"/api/v1/jobs/{job}").json()
        return {name: view[name] for name in ("files", "size", "povray", "created", "last_start",
                                              "active")}

    created = farm.clock.time()
    assert told() == {"files": 2, "size": 10, "povray": "3.7", "created": created,
                      "last_start": None, "active": True}
    worker = farm.worker()
    for _ in range(2):
        farm.clock.advance(10)
        farm.finish(worker, farm.lease(worker))
    assert told() == {"files": 2, "size": 10, "povray": "3.7", "created": created,
                      "last_start": created + 20, "active": False}


def test_frames_that_have_changed_since_a_time(farm: Farm) -> None:
    anna, bert, job = farm.worker("anna"), farm.worker("bert"), farm.submit(5, batch=1)
    begin = farm.clock.time()

    def since(seconds: float) -> List[Tuple[Any, ...]]:
        frames = farm.ask("GET", f"/api/v1/jobs/{job}/frames?since={begin + seconds}").json()["frames"]
        return [(frame["frame"], frame["state"], frame["worker"], frame["started"] and
                 round(frame["started"] - begin), frame["finished"] and round(frame["finished"] - begin))
                for frame in frames]

    farm.clock.advance(10)
    first = farm.lease(anna)
    farm.clock.advance(10)
    farm.finish(anna, first)
    second = farm.lease(bert)
    done, leased = (1, "done", "anna", 10, 20), (2, "leased", "bert", 20, None)
    rest = [(frame, "queued", "", None, None) for frame in (3, 4, 5)]
    assert since(-begin) == since(-1) == [done, leased, *rest]  # all, before the first event
    assert since(15) == [done, leased] and since(20) == []
    farm.clock.advance(10)
    farm.fail(bert, second)
    assert since(20) == [(2, "queued", "", 20, None)]
    farm.scheduler.cancel(job)
    assert [frame[0] for frame in since(25)] == [2, 3, 4, 5]
    farm.scheduler.again(job, "1")
    farm.clock.advance(10)
    farm.lease(anna)
    assert since(35) == [(1, "leased", "anna", 40, None)]
    with farm.store.tx() as tx:
        tx.drop_events(tx.last_event())
    assert len(since(5)) == 5 and since(45) == []  # of what is told no more all are listed


@pytest.mark.parametrize("since", ["soon", "nan", ""])
def test_a_time_that_is_none_is_refused(farm: Farm, since: str) -> None:
    assert is_refusal(farm.ask("GET", f"/api/v1/jobs/{farm.submit()}/frames?since={since}"))


def test_a_worker_is_told_which_of_its_projects_no_job_has_as_soon_as_that_is_so(farm: Farm) -> None:
    token = join(farm)["key"]
    jobs = [farm.submit(1, files={"scene.pov": data}) for data in (b"1", b"2", b"1")]
    keys = [farm.job(job).manifest for job in jobs]
    for job in jobs:
        farm.scheduler.cancel(job)

    def gone(*projects: Any, wait: float = 0.0) -> Any:
        return farm.ask("POST", "/api/v1/lease", key=token, json_body={
            **OFFER, "wait": wait, "projects": projects}).json()["gone"]

    assert gone(*keys) == gone() == [] and gone("0" * 64, keys[0]) == ["0" * 64]
    began = farm.clock.monotonic()
    farm.clock.meanwhile += [lambda job=job: farm.scheduler.delete(job) for job in jobs[:2]]
    assert gone(keys[0], keys[1], wait=100) == [keys[1]]  # the first is that of another job, too
    assert farm.clock.monotonic() < began + 10
    assert is_refusal(farm.ask("POST", "/api/v1/lease", key=token, json_body={
        **OFFER, "projects": [1]}))
    assert is_refusal(farm.ask("POST", "/api/v1/lease", key=token, json_body={
        **OFFER, "projects": ["0"] * 1001}))


IMAGE = "/api/v1/jobs/1/frames/0/image"
SIZE = len(png(5))


@pytest.mark.parametrize("header, status, start, end", [
    ("bytes=0-9", 206, 0, 10), ("bytes=10-", 206, 10, SIZE), ("bytes=-7", 206, SIZE - 7, SIZE),
    (f"bytes=0-{SIZE * 2}", 206, 0, SIZE), (f"bytes=-{SIZE * 2}", 206, 0, SIZE),
    (f"bytes={SIZE}-", 416, 0, 0), ("bytes=5-2", 200, 0, SIZE), ("bytes=0-1,5-6", 200, 0, SIZE),
    ("lines=1-2", 200, 0, SIZE), ("bytes=", 200, 0, SIZE), ("bytes=-", 200, 0, SIZE),
])
def test_a_part_of_an_image(header: str, status: int, start: int, end: int, still: Farm) -> None:
    reply = still.ask("GET", IMAGE, headers={"range": header})
    assert reply.status == status
    if status == 416:
        assert reply.headers["Content-Range"] == f"bytes */{SIZE}"
        return
    assert reply.body == png(5)[start:end]
    if status == 206:
        assert reply.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"


def test_an_image_that_the_browser_has_is_not_sent_again(still: Farm) -> None:
    etag = still.ask("GET", IMAGE).headers["ETag"]
    assert etag == f'"{sha256(png(5))}"'
    for known, status in [(etag, 304), (f"W/{etag}", 304), ('"x", ' + etag, 304), ('"x"', 200)]:
        reply = still.ask("GET", IMAGE, headers={"if-none-match": known})
        assert (reply.status, reply.body) == (status, b"" if status == 304 else png(5))
    part = still.ask("GET", IMAGE, headers={"range": "bytes=0-3", "if-range": '"x"'})
    assert part.status == 200


@pytest.mark.parametrize("target", [
    "/api/v1/jobs/1/frames/5/image", "/api/v1/jobs/1/frames/5/log", "/api/v1/jobs/2/frames/0/image",
    "/api/v1/jobs/2/frames/0/log", "/api/v1/jobs/2", "/api/v1/jobs/2/frames",
    "/api/v1/jobs/2/archive.zip", "/api/v1/jobs/x", "/api/v1/jobs/-1", "/api/v1/nothing",
    f"/api/v1/manifests/{ZEROS}", f"/api/v1/jobs/{'9' * 18}", f"/api/v1/jobs/{'9' * 40}",
])
def test_what_is_not_there_is_not_found(target: str, still: Farm) -> None:
    key = join(still, "bert")["key"] if "manifests" in target else None
    reply = still.ask("GET", target, key=key)
    assert reply.status == 404 and is_refusal(reply)


def test_an_unfinished_frame_has_no_image(farm: Farm) -> None:
    farm.submit()
    assert farm.ask("GET", "/api/v1/jobs/1/frames/1/image").status == 404
    assert farm.ask("GET", "/api/v1/jobs/1/frames/1/log").body == b""


@pytest.mark.parametrize("target", [
    "/api/v1/jobs/2/pause", "/api/v1/jobs/1/explode", "/api/v1/jobs/2/retry"])
def test_there_is_nothing_to_steer_there(target: str, still: Farm) -> None:
    assert still.ask("POST", target).status == 404


# --- nonsense

def bodies(farm: Farm) -> List[Tuple[str, str, str, Any]]:
    """Routes that take JSON: method, target, key and a good body."""
    token, lease = working(farm)
    task = lease.tasks[0].id
    waiting = join(farm, "zoe", key=None)
    return [
        ("POST", "/api/v1/jobs", KEY, {
            "name": "b", "pov": pov_job(2).to_wire(), "options": {"priority": 1},
            "manifest": manifest({"a.inc": b"a"}).to_wire()}),
        ("PATCH", "/api/v1/jobs/1", KEY, {"priority": 1, "max_workers": 0, "in_order": False}),
        ("POST", "/api/v1/workers", KEY, dict(WORKER)),
        ("POST", "/api/v1/workers/admit", KEY, {"code": waiting["code"]}),
        ("POST", "/api/v1/lease", token, dict(OFFER)),
        ("POST", "/api/v1/beat", token, {"leases": {lease.id: {str(task): 0.5}}, "wait": 0}),
        ("POST", f"/api/v1/leases/{lease.id}/tasks/{task}/fail", token,
         {"message": "m", "scene": False, "log": "l"}),
    ]


ODD: List[Any] = [None, True, -1, 2.5, 10**30, 10**4000, "text", "nan", "-inf", "", "x" * 100_000,
                  "\ud800", "\0", [], {}, [1], [[]], {"a": 1}, {"1": "nan"}, {"1": "@huge"},
                  {"x": 0.5}, "@huge"]
SHAPES = [b"", b"{", b"[]", b"null", b"1", b'"text"', b"{}", b"[" * 100_000, b'{"a": NaN}',
          b"\xff\xfe", b'{"a": 1, }', b"1" * 5000]


def odd_bodies(good: Any) -> Iterator[bytes]:
    """The body with each of its parts, on two levels, replaced or left out."""
    for key, value in good.items():
        for odd in ODD:
            yield dump({**good, key: odd})
            if isinstance(value, dict):
                for inner in value:
                    yield dump({**good, key: {**value, inner: odd}})
        yield dump({name: part for name, part in good.items() if name != key})


def dump(value: Any) -> bytes:
    return json.dumps(value).replace('"@huge"', "1e999").encode()


def look_everywhere(farm: Farm) -> None:
    for target in ("farm", "jobs", "jobs/1", "jobs/1/frames", "workers", "metrics",
                   "events?after=0&wait=0"):
        reply = farm.ask("GET", f"/api/v1/{target}")
        assert reply.status == 200, (target, reply.body)


@pytest.mark.parametrize("number", range(7))
def test_nonsense_is_refused_and_breaks_nothing(number: int, farm: Farm) -> None:
    method, target, key, good = bodies(farm)[number]
    for body in [*SHAPES, *odd_bodies(copy.deepcopy(good))]:
        reply = farm.ask(method, target, key=key, json_body=body)
        assert reply.status < 500, (body[:200], reply.body)
        if body in SHAPES and not (body == b"{}" and method == "PATCH"):
            assert reply.status in (400, 413) and is_refusal(reply), body[:200]
        if reply.status < 400:
            look_everywhere(farm)
    look_everywhere(farm)
    reply = farm.ask(method, target, key=key, body=dump(good))
    assert reply.status == 415, "a browser's form is not JSON"


@pytest.mark.parametrize("target", [
    "jobs?after={}", "jobs?limit={}", "jobs/1/frames?after={}", "jobs/1/frames?limit={}",
    "events?after={}&wait=0", "events?wait={}",
])
def test_odd_numbers_in_a_query(target: str, farm: Farm) -> None:
    farm.submit()
    for value in ["", "x", "nan", "inf", "-inf", "1e3", "1.5", "-1", "0", "9" * 15, "9" * 30, "²",
                  "0x10", " 1"]:
        reply = farm.ask("GET", f"/api/v1/{target}".format(value))
        assert reply.status in (200, 400), (value, reply.body)


@pytest.mark.parametrize("value", ["", "x", "9" * 30, "9" * 5000, "-1", "²"],
                         ids=["none", "text", "large", "huge", "negative", "odd digit"])
def test_an_odd_last_event_id_is_no_mistake_of_ours(value: str, farm: Farm) -> None:
    farm.submit()
    response = farm.router.handle(Request("GET", "/api/v1/events",
                                          headers={"last-event-id": value}))
    assert response.status == 200
    stream = iter(response.body)  # type: ignore[arg-type]
    next(stream)
    next(stream)
    response.close()


@pytest.mark.parametrize("name", ["cpu", "wall", "memory", "log"])
def test_odd_costs_of_an_image(name: str, farm: Farm) -> None:
    token = join(farm)["key"]
    for value in ["x", "", "nan", "9" * 30, "-5", "inf", "1e999", "1e308"]:
        job = farm.submit(1)
        wire = farm.ask("POST", "/api/v1/lease", key=token, json_body=OFFER).json()["leases"][0]
        reply = deliver(farm, token, LeaseSpec.from_wire(wire), query=f"&{name}={value}")
        assert reply.status < 500, (value, reply.body)
        view = farm.ask("GET", f"/api/v1/jobs/{job}").json()
        assert 0 <= view["cpu"] < 1e12 and 0 <= view["wall"] < 1e12, value
        assert farm.ask("GET", "/api/v1/jobs").status == 200
        farm.scheduler.delete(job)


# --- events, metrics, the description

def parse_events(chunks: List[bytes]) -> List[Dict[str, Any]]:
    found = []
    for block in b"".join(chunks).decode().split("\n\n"):
        fields: Dict[str, str] = {}
        for line in block.splitlines():
            name, _, value = line.partition(": ")
            fields[name] = value
        if "data" in fields:
            found.append({**json.loads(fields["data"]), "sse": (fields["id"], fields["event"])})
    return found


def open_stream(farm: Farm, query: Mapping[str, str], headers: Mapping[str, str]) -> Any:
    response = farm.router.handle(Request("GET", "/api/v1/events", query, headers))
    assert response.headers["Content-Type"] == "text/event-stream"
    return iter(response.body)  # type: ignore[arg-type]


@pytest.mark.parametrize("query, headers, first", [
    ({}, {}, "job paused"), ({"after": "0"}, {}, "submitted"), ({}, {"last-event-id": "1"},
                                                                "job active"),
])
def test_events_stream_as_they_happen(
        query: Dict[str, str], headers: Dict[str, str], first: str, farm: Farm) -> None:
    job = farm.submit()
    stream = open_stream(farm, query, headers)
    chunks = [next(stream)]
    assert chunks[0].startswith(b"retry: ")
    farm.scheduler.pause(job)
    while not chunks[-1].count(b"job paused"):
        chunks.append(next(stream))
    events = parse_events(chunks)
    assert events[0]["what"] == first and events[-1]["what"] == "job paused"
    assert [event["sse"] for event in events] == [(str(event["id"]), "change") for event in events]
    assert next(stream) == b""  # nothing happens, and it looks whether somebody listens


def test_events_can_be_polled(farm: Farm) -> None:
    after = farm.ask("GET", "/api/v1/farm").json()["event"]
    assert farm.ask("GET", f"/api/v1/events?after={after}&wait=5").json()["events"] == []
    farm.clock.meanwhile.append(lambda: farm.submit())
    events = farm.ask("GET", f"/api/v1/events?after={after}&wait=5").json()["events"]
    assert [event["what"] for event in events][0] == "submitted"


FIGURE = re.compile(r'povfarm_(\w+?)(?:\{((?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (-?\d+(?:\.\d+)?)')


def figures_of(farm: Farm) -> Dict[str, float]:
    """What Prometheus is told: each figure has its help and type before it, and comes once."""
    text = farm.ask("GET", "/api/v1/metrics").body.decode()
    assert text.endswith("\n")
    figures: Dict[str, float] = {}
    told = kind = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            told = line.split(" ")[2]
        elif line.startswith("# TYPE "):
            assert re.fullmatch(rf"# TYPE {told} (gauge|counter)", line)
            kind = told
            assert line.endswith("counter") == kind.endswith("_total")
        else:
            match = FIGURE.fullmatch(line)
            assert match and f"povfarm_{match[1]}" == kind, line
            name = f"{match[1]}{{{match[2]}}}" if match[2] else match[1]
            assert name not in figures
            figures[name] = float(match[3])
    return figures


def test_metrics_are_in_the_format_of_prometheus(farm: Farm) -> None:
    farm.api.answered = farm.router.answered
    token, lease = working(farm)
    farm.clock.advance(7)
    deliver(farm, token, lease, query="&cpu=2.5")
    farm.submit(4, send=False, files={"x.inc": b"x"})
    hard = farm.scheduler.submit('a "b" \\n\nc', "admin", pov_job(2), manifest({}), JobOptions())[0]
    farm.clock.advance(3)
    assert farm.ask("GET", "/api/v1/nowhere").status == 404
    figures = figures_of(farm)
    assert figures['frames{state="done"}'] == 1
    assert figures['frames{state="queued"}'] == 8
    assert figures['jobs{state="active"}'] == 2 and figures['jobs{state="waiting"}'] == 1
    assert figures["workers_live"] == 1 and figures["cpu_seconds"] == 2.5
    worker = next(name.partition("{")[2] for name in figures if name.startswith("worker_up{"))
    assert re.fullmatch(r'id="\d+",worker="\w+"}', worker)
    assert figures[f"worker_up{{{worker}"] == 1
    assert figures[f"worker_frames_total{{{worker}"] == figures["frames_total"] == 1
    one = next(name for name in figures if name.startswith('job_first_frame_seconds{id="1"'))
    assert figures[one] == 7
    assert figures[f'job_frames_left{{id="{hard}",job="a \\"b\\" \\\\n c",owner="admin"}}'] == 2
    assert figures["queue_age_seconds"] == 10 and figures["disk_full"] == 0
    assert figures["disk_free_bytes"] > 0
    assert figures['answers_total{route="",status="404"}'] == 1
    assert figures['answers_total{route="POST /api/v1/lease",status="200"}'] == 1
    assert sum(number for name, number in figures.items() if name.startswith("person_frames")) == 8
    for state in TaskState:
        assert f'frames{{state="{state.value}"}}' in figures
    for job_state in JobState:
        assert f'jobs{{state="{job_state.value}"}}' in figures


def test_a_flood_of_jobs_has_no_more_figures_than_some(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "MAX_FIGURES", 3)
    for number in range(5):
        farm.scheduler.submit(f"ball{number}", f"anna{number}", pov_job(1), manifest({}), JobOptions())
    named = collections.Counter(name.partition("{")[0] for name in figures_of(farm))
    assert named["job_progress"] == named["person_jobs"] == 3
    farm.scheduler.cancel(5)
    farm.clock.advance(601)
    assert not any('id="5"' in name for name in figures_of(farm))


def test_the_description_lists_exactly_the_routes(farm: Farm) -> None:
    document = farm.ask("GET", "/api/v1/openapi.json").json()
    assert re.fullmatch(r"3\.\d\.\d", document["openapi"])
    assert document["info"] == {"title": "povfarm", "version": povfarm.VERSION}
    described = {(method.upper(), path): operation for path, item in document["paths"].items()
                 for method, operation in item.items()}
    assert set(described) == {
        (method, re.sub(r"<(\w+)(:\w+)?>", r"{\1}", pattern)) for method, pattern in ROUTES}
    names = [operation["operationId"] for operation in described.values()]
    assert len(set(names)) == len(names)
    for (_, path), operation in described.items():
        listed = {parameter["name"] for parameter in operation["parameters"]
                  if parameter["in"] == "path"}
        assert listed == set(re.findall(r"{(\w+)}", path))
        assert 8 < len(operation["summary"]) < 110 and not operation["summary"].endswith(".")
        assert operation["description"].startswith(operation["summary"])
        assert set(operation["responses"]) == {"2XX", "default"}
    # The answers themselves are compared with it wherever a test asks a farm in a box.
    assert {key for key, one in described.items() if "content" not in one["responses"]["2XX"]} == {
        (method, re.sub(r"<(\w+)(:\w+)?>", r"{\1}", pattern)) for method, pattern in ROUTES
        if method == "DELETE" or pattern.endswith(("/fail", "/release", "/leave", "/state", "/fetched"))
        or (method, pattern) in {("PUT", "/api/v1/blobs/<hash>"), ("PATCH", "/api/v1/users/<name>"),
                                 ("POST", "/api/v1/users"),
                                 ("POST", "/api/v1/workers/<worker:int>/<action>")}}
    bodies = {(method, path): operation["requestBody"]["content"]["application/json"]["schema"]
              for (method, path), operation in described.items() if "requestBody" in operation}
    changes = {path: schema for (method, path), schema in bodies.items() if method == "PATCH"}
    assert {path: (schema.get("required"), sorted(schema["properties"])) for path, schema in changes.items()} == {
        "/api/v1/jobs/{job}": (None, sorted(povfarm.JOB_OPTIONS)),
        "/api/v1/users/{name}": (None, sorted(povfarm.ALLOWANCES))}
    assert {path: sorted(schema["required"]) for (method, path), schema in bodies.items()
            if method != "PATCH"} == {
        "/api/v1/hello": ["nonce", "who"],
        "/api/v1/jobs": ["manifest", "name", "options", "pov"], "/api/v1/beat": ["leases"],
        "/api/v1/workers": sorted(WORKER), "/api/v1/lease": ["idle", "slots", "want"],
        "/api/v1/workers/admit": ["code"], "/api/v1/tidy": ["dry"],
        "/api/v1/jobs/{job}/fetched": ["images"],
        "/api/v1/users": ["limits", "name", "role", "ticket", "uses"],
        "/api/v1/users/come": ["name", "proof", "share", "ticket"],
        "/api/v1/leases/{lease}/tasks/{task}/fail": ["log", "message", "scene"]}


def test_a_job_has_the_frames_that_were_chosen(farm: Farm) -> None:
    body = {"name": "ball", "pov": pov_job(9).to_wire(), "options": {}, "frames": "7,2-3",
            "manifest": manifest({"scene.pov": SCENE}).to_wire()}
    job = farm.ask("POST", "/api/v1/jobs", json_body=body).json()["id"]
    assert [task.frame for task in farm.tasks(job)] == [2, 3, 7]
    reply = farm.ask("POST", "/api/v1/jobs", json_body={**body, "frames": "10"})
    assert reply.status == 400 and "'10' names no frames" in reply.json()["error"]
    assert farm.ask("POST", "/api/v1/jobs", json_body={**body, "frames": 2}).status == 400


def test_a_job_that_is_submitted_again_with_its_ticket_is_one_job(farm: Farm) -> None:
    """The answer to the first request was lost."""
    body = {"name": "ball", "pov": pov_job(2).to_wire(), "options": {}, "ticket": "A1",
            "manifest": manifest({"scene.pov": SCENE}).to_wire()}
    answers = [farm.ask("POST", "/api/v1/jobs", json_body=body).json() for _ in range(2)]
    assert answers[0] == answers[1] and answers[0]["missing"] == [sha256(SCENE)]
    farm.scheduler.put_blob(sha256(SCENE), [SCENE])
    again = farm.ask("POST", "/api/v1/jobs", json_body=body).json()
    assert again == {**answers[0], "missing": []} and farm.state(1) == "active"
    assert farm.ask("POST", "/api/v1/jobs", json_body={**body, "ticket": "A2"}).json()["id"] == 2
    assert farm.ask("POST", "/api/v1/jobs", json_body={**body, "ticket": 7}).status == 400
    assert [farm.ask("POST", "/api/v1/jobs", json_body={key: body[key] for key in body
                                                        if key != "ticket"}).json()["id"]
            for _ in range(2)] == [3, 4]
    farm.scheduler.delete(1)
    assert farm.ask("POST", "/api/v1/jobs", json_body=body).json()["id"] == 5


def test_the_farm_names_itself(farm: Farm) -> None:
    farm.clock.advance(60)
    answer = farm.ask("GET", "/api/v1/farm", key=None).json()
    assert answer == {"name": "box", "version": povfarm.VERSION, "farm_id": "f" * 16, "event": 0, "notice": "",
                      "you": "", "workers": 0, "uptime": 60.0}


def test_the_clock_of_a_paused_job_stands_still(farm: Farm) -> None:
    anna, job = farm.worker(), farm.submit(4)
    for _ in range(2):
        lease = farm.lease(anna)
        farm.clock.advance(10)
        farm.finish(anna, lease)
    farm.scheduler.pause(job)
    farm.scheduler.leave(anna)
    names = ("elapsed", "rate", "eta", "progress")
    before = farm.ask("GET", f"/api/v1/jobs/{job}").json()
    farm.clock.advance(3600)
    after = farm.ask("GET", f"/api/v1/jobs/{job}").json()
    assert [after[name] for name in names] == [before[name] for name in names] == [20, 0.1, None, 0.5]
