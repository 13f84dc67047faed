"""Who is who: both ends prove that they know a secret, and no secret is sent."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.cookiejar
import itertools
import json
import random
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

import povfarm
from helpers.base import POVFARM, REQUIRED, ROOT, need, tried
from helpers.farm import Farm as Processes
from helpers.farm import environment, run
from helpers.farm_in_a_box import KEY, FakeClock, Farm, Reply, farm_fixture
from helpers.lan import why_no_lan
from helpers.trust import Signer, join_at, join_by, signer_of
from povfarm import (
    Access,
    BodyReader,
    Client,
    Coordinator,
    Pairing,
    Request,
    Session,
    UserError,
    WrongFarm,
)
from tools import attacker

WORKER = {"name": "anna", "cores": 2, "memory": 1 << 30, "system": "Linux",
          "engines": {"povray": "3.7"}, "tags": []}
__all__ = ["farm_fixture"]
LOGIN = "/api/v1/login"


def send(farm: Farm, method: str, target: str, body: bytes = b"", **headers: str) -> Reply:
    """A request just as it is given."""
    path, _, query = target.partition("?")
    fields = {"content-type": "application/json",
              **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Reply(farm.router.handle(Request(
        method, path, dict(povfarm.urllib.parse.parse_qsl(query)), fields, BodyReader.of(body),
        "192.168.1.5", target=target)))


# --- both prove it

def test_the_coordinator_proves_that_it_has_the_key_and_tells_nothing_of_it(farm: Farm) -> None:
    for key, good in ((KEY, True), ("another key", False), (f"#1:{KEY}", False),
                      (f"nobody:{KEY}", False)):
        who, secret = povfarm.split_key(key)
        told = farm.access.hello(who, "ab" * 16)
        session = Session(told["session"], "ab" * 16, povfarm.secret_hash(secret),
                          told["farm_id"], "")
        assert (session.proof == told["proof"]) is good, key
        assert KEY not in json.dumps(told) and povfarm.secret_hash(KEY) not in json.dumps(told)
    assert not farm.access._proven, "nothing is kept of who only asks"


def test_a_proof_is_for_one_question_only(farm: Farm) -> None:
    proofs = {farm.access.hello(povfarm.FARM, nonce)["proof"]
              for nonce in ("ab" * 16, "cd" * 16, "ab" * 16 + "00")}
    assert len(proofs) == 3
    told = farm.access.hello(povfarm.FARM, "ab" * 16)
    again = Session(told["session"], "cd" * 16, povfarm.secret_hash(KEY), told["farm_id"], "")
    assert again.proof != told["proof"], "an old answer is none to a new question"


@pytest.mark.parametrize("wire", [
    {}, {"who": "farm"}, {"who": "farm", "nonce": ""}, {"who": "farm", "nonce": "ab" * 15},
    {"who": "farm", "nonce": "AB" * 16}, {"who": 1, "nonce": "ab" * 16},
    {"who": "x" * 101, "nonce": "ab" * 16}, {"who": "farm", "nonce": "ab" * 33}])
def test_a_hello_that_is_none_is_refused(wire: Dict[str, Any], farm: Farm) -> None:
    assert farm.ask("POST", povfarm.HELLO, key=None, json_body=wire).status == 400


def test_nobody_is_known_by_the_name_of_a_guest(farm: Farm) -> None:
    """The names that HTTPov's clients give themselves stand where others have a hash."""
    guest = farm.scheduler.join(
        povfarm.WorkerInfo("guest", 1, 1, "", {}), f"HTTPov {povfarm.secret_hash('mine')}", "::1")
    assert farm.ask("GET", "/api/v1/farm", key=f"#{guest}:mine").status == 401


# --- a signed request is the sender's own

OTHER = b'{"priority": 9}'
CHANGES: Dict[str, Callable[[List[Any]], None]] = {
    "method": lambda sent: sent.__setitem__(0, "DELETE"),
    "path": lambda sent: sent.__setitem__(1, "/api/v1/jobs/2"),
    "query": lambda sent: sent.__setitem__(1, sent[1] + "?x=1"),
    "body": lambda sent: sent.__setitem__(2, OTHER),
    "body and its hash": lambda sent: (
        sent.__setitem__(2, OTHER),
        sent[3].__setitem__("x-sha256", hashlib.sha256(OTHER).hexdigest()))[0],
    "hash": lambda sent: sent[3].__setitem__("x-sha256", "0" * 64),
    "no hash": lambda sent: sent[3].pop("x-sha256"),
    "count": lambda sent: sent[3].__setitem__(
        "authorization", sent[3]["authorization"].replace("count=1,", "count=2,")),
    "mac": lambda sent: sent[3].__setitem__("authorization", sent[3]["authorization"][:-1]
                                            + ("1" if sent[3]["authorization"][-1] == "0" else "0")),
    "session": lambda sent: sent[3].__setitem__(
        "authorization", sent[3]["authorization"].replace("session=", "session=aa")),
}


@pytest.mark.parametrize("what", ["nothing", *CHANGES])
def test_what_was_changed_on_its_way_does_nothing(what: str, farm: Farm) -> None:
    jobs = [farm.submit() for _ in range(2)]
    sent: List[Any] = ["PATCH", f"/api/v1/jobs/{jobs[0]}", b'{"priority": 5}']
    sent.append(farm.signer.headers(KEY, *sent))
    CHANGES.get(what, lambda sent: None)(sent)
    status = send(farm, *sent[:3], **sent[3]).status
    assert status == (200 if what == "nothing" else 503 if what == "body" else 401)
    assert [farm.job(job).options.priority for job in jobs] == [5 * (what == "nothing"), 0]


def test_a_body_that_is_not_what_was_signed_is_not_looked_at(farm: Farm) -> None:
    job = farm.submit()
    target, good, bad = f"/api/v1/jobs/{job}", b'{"priority": 5}', b'{"priority": 9}'
    headers = farm.signer.headers(KEY, "PATCH", target, good)
    assert send(farm, "PATCH", target, bad, **headers).status == 503
    headers = {**farm.signer.headers(KEY, "PATCH", target)}
    assert send(farm, "PATCH", target, bad, **headers).status == 503, "signed as one without a body"
    assert farm.job(job).options.priority == 0
    headers = farm.signer.headers(KEY, "PATCH", target, good)
    assert send(farm, "PATCH", target, good, **headers).status == 200
    assert farm.job(job).options.priority == 5


def test_a_request_is_taken_once(farm: Farm) -> None:
    for key in (KEY, join_by(farm.ask, KEY, WORKER, farm.access.farm_id)["key"]):
        heard = [("GET", target, farm.signer.headers(key, "GET", target))
                 for target in ("/api/v1/farm", "/api/v1/jobs", "/api/v1/workers")]
        assert [send(farm, method, target, **headers).status
                for method, target, headers in heard] == [200] * 3
        for method, target, headers in heard:
            again = send(farm, method, target, **headers)
            assert again.status == 401 and again.json()["detail"] == povfarm.SESSION_OVER


def test_requests_that_overtake_each_other_are_all_taken_once(farm: Farm) -> None:
    session = farm.signer.session(KEY)
    counts = list(range(1, 3000))
    random.Random(1).shuffle(counts)
    assert all(session.is_new(count) for count in counts)
    assert not any(session.is_new(count) for count in counts)
    assert session.is_new(10 ** 15) and not session.is_new(2), "it is too old to be known as new"
    assert not session.is_new(10 ** 15) and session.is_new(10 ** 15 - 4095)
    assert not session.is_new(10 ** 15 - 4096) and not session.is_new(0)


def test_many_threads_at_once_are_each_taken_once(farm: Farm) -> None:
    heard = [farm.signer.headers(KEY, "GET", "/api/v1/farm") for _ in range(100)]
    statuses: List[int] = []
    begin = threading.Barrier(8)

    def knock() -> None:
        begin.wait(60)
        statuses.extend(send(farm, "GET", "/api/v1/farm", **headers).status for headers in heard)

    threads = [threading.Thread(target=knock) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (statuses.count(200), statuses.count(401)) == (100, 700)


# --- conversations end

def test_what_was_heard_before_a_restart_is_no_use_after_it(farm: Farm) -> None:
    early = [farm.signer.headers(KEY, "POST", LOGIN, b"{}") for _ in range(2)]
    assert send(farm, "POST", LOGIN, b"{}", **early[0]).status == 200
    farm.access = Access(farm.store, KEY, False, farm.clock, farm.scheduler.people)
    farm.router._authenticate = farm.access.identify
    for headers in early:
        answer = send(farm, "POST", LOGIN, b"{}", **headers)
        assert answer.status == 401 and answer.json()["detail"] == povfarm.SESSION_OVER


def test_what_was_heard_is_no_use_when_it_was_forgotten(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether by time, or because others came: a session that is not known may be an old one."""
    monkeypatch.setattr(povfarm, "MAX_SESSIONS", 3)
    heard = []
    for _ in range(5):
        farm.clock.advance(1)
        headers = signer_of(farm.access).headers(KEY, "GET", "/api/v1/farm")
        assert send(farm, "GET", "/api/v1/farm", **headers).status == 200
        heard.append(headers)
    assert len(farm.access._proven) == 3
    assert [send(farm, "GET", "/api/v1/farm", **headers).status for headers in heard] == [401] * 5
    farm.clock.advance(povfarm.IDLE_SESSION + 1)
    farm.ask("GET", "/api/v1/farm")
    assert [send(farm, "GET", "/api/v1/farm", **headers).status for headers in heard] == [401] * 5


def test_who_says_hello_has_to_go_on_soon(farm: Farm) -> None:
    late = farm.signer.headers(KEY, "GET", "/api/v1/farm")
    farm.clock.advance(povfarm.HELLO_TIME + 1)
    assert send(farm, "GET", "/api/v1/farm", **late).status == 401


def test_a_removed_worker_is_told_so_and_nobody_else(farm: Farm) -> None:
    worker = join_by(farm.ask, KEY, WORKER, farm.access.farm_id)
    assert farm.ask("GET", "/api/v1/farm", key=worker["key"]).status == 200
    farm.ask("DELETE", f"/api/v1/workers/{worker['id']}")
    for signer in (farm.signer, signer_of(farm.access)):  # the old conversation, and a new one
        answer = Reply(farm.router.handle(Request(
            "GET", "/api/v1/farm", headers=signer.headers(worker["key"], "GET", "/api/v1/farm"),
            target="/api/v1/farm")))
        assert answer.status == 401 and "this worker was removed" in answer.json()["error"]
    guess = farm.ask("GET", "/api/v1/farm", key=f"#{worker['id']}:x")
    assert guess.status == 401 and "removed" not in guess.json()["error"]


# --- a client and whoever answers it

@pytest.fixture(name="served")
def served_fixture(tmp_path: Path) -> Iterator[Coordinator]:
    one = Coordinator(tmp_path / "served", bind="127.0.0.1", durable=False)
    one.start()
    yield one
    one.stop()


def test_a_client_tells_nothing_to_who_does_not_have_its_key(served: Coordinator) -> None:
    heard: List[Tuple[str, bytes, Dict[str, str]]] = []
    handle = served.router.handle

    def listen(request: Request) -> povfarm.Response:
        body = request.body.read()
        heard.append((request.target, body, dict(request.headers)))
        request.body = BodyReader.of(body)
        return handle(request)

    served.router.handle = listen  # type: ignore[method-assign]
    client = Client(served.url, "the key of another farm", retry_for=0)
    with pytest.raises(WrongFarm, match="does not have your farm's key"):
        client.request("POST", "/api/v1/jobs", json={"my": "project"})
    (target, body, headers), = heard
    assert target == povfarm.HELLO and set(json.loads(body)) == {"who", "nonce"}
    assert "authorization" not in headers
    with pytest.raises(WrongFarm, match="the secret that this computer and its farm share"):
        Client(served.url, "#1:x", retry_for=0).get("/api/v1/farm")


def test_a_client_goes_on_after_a_restart(served: Coordinator, tmp_path: Path) -> None:
    client = Client(served.url, served.key)
    assert client.get("/api/v1/farm")
    served.stop()
    again = Coordinator(tmp_path / "served", bind="127.0.0.1", port=served.port, durable=False)
    again.start()
    try:
        assert client.get("/api/v1/farm")["farm_id"] == served.access.farm_id
        assert client.request("POST", LOGIN, json={}).status == 200
    finally:
        again.stop()


def test_a_client_waits_for_its_farm_when_another_has_its_place(tmp_path: Path) -> None:
    """As on a port that another user takes while the coordinator is away."""
    mine = Coordinator(tmp_path / "mine", bind="127.0.0.1", durable=False)
    mine.start()
    client = Client(mine.url, mine.key)
    assert client.get("/api/v1/farm")
    mine.stop()
    thief = Coordinator(tmp_path / "thief", bind="127.0.0.1", port=mine.port, durable=False)
    thief.start()
    got: List[Any] = []
    told = threading.Event()
    client.keep_trying(lambda text: told.set() if "does not have your" in text else None,
                       threading.Event(), longest=0.2)
    waiting = threading.Thread(target=lambda: got.append(client.get("/api/v1/farm")))
    waiting.start()
    assert told.wait(60) and not got
    thief.stop()
    back = Coordinator(tmp_path / "mine", bind="127.0.0.1", port=mine.port, durable=False)
    back.start()
    waiting.join(60)
    back.stop()
    assert got[0]["farm_id"] == mine.access.farm_id


def test_a_relay_with_a_certificate_of_its_own_is_no_way_in(farm: Farm) -> None:
    """Each end puts in what it sees: the client the relay's, the coordinator its own."""
    ours = Access(farm.store, KEY, False, farm.clock, farm.scheduler.people, pin="11" * 32)
    for pin, good in (("11" * 32, True), ("22" * 32, False), ("", False)):
        session = signer_of(ours, pin).session(KEY)
        told: List[Dict[str, Any]] = []

        def hello(who: str, nonce: str, told: List[Dict[str, Any]] = told) -> Dict[str, Any]:
            told.append(ours.hello(who, nonce))
            return told[-1]

        session = Signer(hello, pin).session(KEY)
        assert (session.proof == told[0]["proof"]) is good
        request = Request("GET", "/api/v1/farm", target="/api/v1/farm", headers={
            "authorization": session.sign("GET", "/api/v1/farm", "")})
        if good:
            assert "admin" in ours.identify(request).roles
            continue
        with pytest.raises(povfarm.ProtocolError):
            ours.identify(request)


def test_signing_costs_less_than_a_fifth_of_a_millisecond(farm: Farm) -> None:
    """Both ends of it, in CPU time; the best of some tries, others compute here as well."""
    signer, number = farm.signer, 300
    signer.headers(KEY, "GET", "/api/v1/farm")

    def once() -> float:
        began = time.thread_time()
        for _ in range(number):
            headers = signer.headers(KEY, "GET", "/api/v1/farm")
            farm.access.identify(Request("GET", "/api/v1/farm", headers=headers,
                                         target="/api/v1/farm"))
        return (time.thread_time() - began) / number

    assert min(once() for _ in range(5)) < 0.0002


# --- pairing

def test_both_ends_of_a_pairing_come_to_the_same_code_and_secret(farm: Farm) -> None:
    worker = join_by(farm.ask, None, WORKER, farm.access.farm_id)
    assert not worker["admitted"]
    view, = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert view["code"] == worker["code"]
    assert farm.ask("POST", "/api/v1/lease", key=worker["key"], json_body={
        "want": 1, "slots": 1, "idle": 1}).json()["pending"] is True
    assert farm.ask("POST", "/api/v1/workers/admit", json_body={"code": worker["code"]}).status == 200
    assert farm.ask("POST", "/api/v1/beat", key=worker["key"], json_body={"leases": {}}).status == 200


def test_with_a_relay_in_between_the_two_codes_differ(farm: Farm) -> None:
    """It has to agree with each end, so the worker shows a code that the farm does not know."""
    farm_id = farm.access.farm_id
    for _ in range(20):
        worker, relay = Pairing(), Pairing()
        with_farm = join_by(farm.ask, None, WORKER, farm_id)
        _, shown = worker.agree(relay.share, [farm_id, "", "anna", worker.share, worker.nonce,
                                              relay.share, relay.nonce])
        assert shown != with_farm["code"]
        assert farm.ask("POST", "/api/v1/workers/admit", json_body={"code": shown}).status == 400
        farm.ask("DELETE", f"/api/v1/workers/{with_farm['id']}")


def test_whatever_a_relay_changes_changes_the_code() -> None:
    mine, theirs = Pairing(), Pairing()
    said = ["farm", "pin", "anna", mine.share, mine.nonce, theirs.share, theirs.nonce]
    secret, code = mine.agree(theirs.share, said)
    assert theirs.agree(mine.share, said) == (secret, code)
    assert len(code) == 6 and set(code) <= set("ABCDEFGHJKLMNPQRSTUVWXYZ23456789")
    for place in range(len(said)):
        other = [*said[:place], said[place] + "0", *said[place + 1:]]
        assert mine.agree(theirs.share, other) != (secret, code)
        assert mine.agree(theirs.share, other)[0] != secret


@pytest.mark.parametrize("share", ["", "0", "1", "x", "-2", f"{povfarm._PRIME - 1:x}",
                                   f"{povfarm._PRIME:x}", f"{povfarm._PRIME + 1:x}", "f" * 513])
def test_a_share_that_gives_the_secret_away_is_refused(share: str, farm: Farm) -> None:
    with pytest.raises(UserError):
        Pairing().agree(share, [])
    commitment = povfarm.secret_hash(f"{share} ")
    wire = {**WORKER, "commitment": commitment}
    assert farm.ask("POST", "/api/v1/workers", key=None, json_body=wire).status == 200
    if share:
        assert farm.ask("POST", "/api/v1/workers", key=None,
                        json_body={**wire, "share": share, "nonce": ""}).status == 400
    assert farm.ask("GET", "/api/v1/workers").json()["workers"] == []


def test_a_share_has_to_be_the_one_of_the_commitment(farm: Farm) -> None:
    """Who could choose it later could choose the code."""
    one, other = Pairing(), Pairing()
    wire = {**WORKER, "commitment": one.commitment}
    farm.ask("POST", "/api/v1/workers", key=None, json_body=wire)
    for share, nonce in ((other.share, other.nonce), (one.share, other.nonce),
                         (other.share, one.nonce), (one.share, "")):
        assert farm.ask("POST", "/api/v1/workers", key=None,
                        json_body={**wire, "share": share, "nonce": nonce}).status == 400
    good = {**wire, "share": one.share, "nonce": one.nonce}
    assert farm.ask("POST", "/api/v1/workers", key=None, json_body=good).status == 201


def test_codes_can_be_guessed_a_few_times_a_minute_only(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "MAX_PAIRINGS", 5)
    statuses = [farm.ask("POST", "/api/v1/workers", key=None, remote=f"10.0.0.{number}",
                         json_body={**WORKER, "commitment": f"{number:064x}"}).status
                for number in range(8)]
    assert statuses == [200] * 5 + [429] * 3
    farm.clock.advance(povfarm.HELLO_TIME + 1)
    mine = Pairing()
    late = {**WORKER, "commitment": f"{1:064x}", "share": mine.share, "nonce": mine.nonce}
    answer = farm.ask("POST", "/api/v1/workers", key=None, json_body=late)
    assert answer.status == 404 and answer.json()["detail"] == povfarm.PAIRING_OVER


@pytest.mark.parametrize("private", [True, False])
def test_who_asks_to_join_may_no_more_than_a_stranger(private: bool, tmp_path: Path) -> None:
    farm = Farm(tmp_path, FakeClock(), private=private)
    job = farm.submit()
    worker = join_by(farm.ask, None, WORKER, farm.access.farm_id)
    for bound in farm.router.routes:
        path = (bound.route.pattern.replace("<job:int>", str(job)).replace("<worker:int>", "1")
                .replace("<frame:int>", "1").replace("<task:int>", "1").replace("<hash>", "0" * 64)
                .replace("<lease>", "x").replace("<action>", "cancel").replace("<what>", "state")
                .replace("<key>", "0" * 64))
        if bound.route.method != "GET" or path == "/api/v1/events":
            continue
        stranger = farm.ask("GET", path, key=None).status
        assert farm.ask("GET", path, key=worker["key"]).status == {401: 403}.get(stranger, stranger)
    told = farm.ask("POST", "/api/v1/lease", key=worker["key"], json_body={
        "want": 1, "slots": 1, "idle": 1, "projects": ["0" * 64]}).json()
    assert told == {"leases": [], "open": 0, "pending": True, "gone": [], "ends": False, "rest": ""}
    farm.close()


def test_the_secret_of_a_worker_that_joins_with_the_key_is_not_sent(farm: Farm) -> None:
    heard: List[bytes] = []
    ask = farm.ask

    def listening(*args: Any, **more: Any) -> Reply:
        reply = ask(*args, **more)
        heard.extend([json.dumps(more["json_body"]).encode(), reply.body])
        return reply

    for key in (KEY, None):
        worker = join_by(listening, key, WORKER, farm.access.farm_id)
        secret = worker["key"].partition(":")[2]
        assert len(secret) == 64
        for said, one in itertools.product(heard, (secret, povfarm.secret_hash(secret), KEY)):
            assert one.encode() not in said


# --- other users of the same computer

@pytest.mark.slow
def test_nobody_else_sees_what_serve_work_and_backup_keep(tmp_path: Path, povray: str) -> None:
    (tmp_path / "farm").mkdir(mode=0o755)
    (tmp_path / "farm" / "povfarm.ini").touch(0o644)
    farm = Processes(tmp_path)
    try:
        assert farm.work("--until-idle", "--data", str(tmp_path / "there"), "--server",
                         farm.client.base_url, "--key-file", str(tmp_path / "farm" / "farm.key")
                         ).wait(60) == 0
        assert run(tmp_path, "backup", str(tmp_path / "copy"), cwd=tmp_path).returncode == 0
        for place in ("farm", "there", "copy"):
            assert stat.S_IMODE((tmp_path / place).stat().st_mode) == 0o700, place
            loose = [path for path in (tmp_path / place).rglob("*")
                     if stat.S_IMODE(path.lstat().st_mode) & 0o077 and path.name != "povfarm.ini"]
            assert not loose, loose
    finally:
        farm.close()


def test_localhost_is_the_coordinators_own_address(served: Coordinator) -> None:
    """Nobody gets its port of [::1]; and whoever had that before is not asked."""
    try:
        thief = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with pytest.raises(UserError, match="in use"):
        povfarm.Server(served.router, "::1", served.port)
    with thief:
        server = povfarm.Server(served.router, "127.0.0.1", thief.getsockname()[1])
        server.start()
        client = Client(f"http://localhost:{server.port}", served.key, retry_for=0)
        assert client.get("/api/v1/farm")["farm_id"] == served.access.farm_id
        client.transport.close()
        server.stop()


@pytest.mark.slow
def test_a_key_comes_from_a_file_or_from_standard_input(tmp_path: Path, povray: str) -> None:
    farm = Processes(tmp_path)
    try:
        key = tmp_path / "farm" / "farm.key"
        (tmp_path / "empty").touch()
        there = ["--data", str(tmp_path / "none"), "--server", farm.client.base_url]
        assert run(tmp_path, "login", *there, "--key-file", str(key), cwd=tmp_path).returncode == 0
        piped = subprocess.run(
            [*POVFARM, "login", *there, "--key-file", "-"], input=key.read_text() + "\n", text=True,
            env=environment(tmp_path), capture_output=True, timeout=60, check=False)
        assert piped.returncode == 0 and "/login/" in piped.stdout
        for bad in ("empty", "missing"):
            refused = run(tmp_path, "login", *there, "--key-file", str(tmp_path / bad), cwd=tmp_path)
            assert refused.returncode == 2 and bad in refused.stderr
    finally:
        farm.close()


@pytest.mark.slow
def test_the_program_of_the_description_signs(tmp_path: Path, povray: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    (tmp_path / "call.py").write_text(text.split("```python\n")[1].split("```")[0])
    farm = Processes(tmp_path)
    try:
        for key, code in ((farm.client.token, 0), ("wrong", 1)):
            made = subprocess.run(
                [sys.executable, "call.py", "POST", "/api/v1/login", "{}"], cwd=tmp_path, text=True,
                capture_output=True, timeout=60, check=False,
                env={**environment(tmp_path), "FARM": farm.client.base_url, "KEY": key})
            assert made.returncode == code, made.stderr
            assert ("/login/" in made.stdout) is (code == 0), made.stdout
    finally:
        farm.close()


def test_a_cookie_is_for_one_port_and_one_place(served: Coordinator, tmp_path: Path) -> None:
    """Browsers send the cookies of a host to all of its ports, also to those of other users."""
    thief = Coordinator(tmp_path / "thief", bind="127.0.0.1", durable=False)
    heard: List[str] = []
    handle = thief.router.handle

    def listen(request: Request) -> povfarm.Response:
        heard.append(request.headers.get("cookie", ""))
        return handle(request)

    thief.router.handle = listen  # type: ignore[method-assign]
    thief.start()
    jar = http.cookiejar.CookieJar()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    try:
        page = browser.open(f"{served.url}/login/{served.access.login_code()}")
        assert b"Log out" in page.read()
        place = urllib.parse.urlsplit(page.geturl()).path
        assert b"Log out" in browser.open(served.url + place).read(), "it stays logged in"
        for path in ("/", "/jobs/1", "/login/x", "/-" + "0" * 16 + "/"):
            with contextlib.suppress(urllib.error.HTTPError):
                browser.open(thief.url + path).close()
        assert heard == [""] * 4
        cookie, = jar
        for path in ("/", "/jobs/1", "/-" + "0" * 16 + "/", place):
            identity = served.access.identify(Request("GET", path, headers={
                "cookie": f"{cookie.name}={cookie.value}"}))
            assert ("admin" in identity.roles) is (path == place)
    finally:
        thief.stop()


@pytest.mark.slow
def test_who_heard_everything_comes_in_nowhere(tmp_path: Path, povray: str) -> None:
    """Nor who passes it on, or takes the coordinator's place; on a network where there may be one."""
    if "netns" in REQUIRED:
        need("netns", not why_no_lan(), why_no_lan())
    with attacker.Loopback() if why_no_lan() else attacker.Network(attacker.SQUATTER) as net:
        number, let_in = attacker.attack(tmp_path, net, most=20)
    tried("what a listener, a relay and a rogue have heard", number, let_in=len(let_in))
    assert not let_in, let_in
    assert number > 400


# --- which farm

def options_of(data: Path, command: str) -> argparse.Namespace:
    return argparse.Namespace(data=data, worker_name="anna", name="", key="", key_file="", pin="",
                              server="", code="", discovery_port=1, command=command)


def test_a_worker_follows_only_who_proves_to_be_the_farm_that_let_it_in(
        served: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may answer that it is that farm."""
    place = tmp_path / "pupil" / "workers"
    true, claimed = served.access.farm_id, "a" * 16
    keys = {true: join_at(Client(served.url, served.key), WORKER), claimed: "#1:" + "b" * 64}
    for farm_id, good in ((true, True), (claimed, False)):
        povfarm._Kept(place, "anna", farm_id).write(keys[farm_id], True)
        (place / "farm.json").write_text(json.dumps({"name": "mine", "farm_id": farm_id}))
        here = povfarm.Found("mine", farm_id, served.url, False, "127.0.0.1")
        monkeypatch.setattr(povfarm, "_discover", lambda *_, here=here: [here])
        options = options_of(tmp_path / "pupil", "work")
        chosen = povfarm._LookOut(options, "")._choose()
        assert chosen == here if good else "waiting for mine, which has let" in str(chosen)
        gone = Client("http://127.0.0.1:9", keys[farm_id])
        povfarm._look_elsewhere(gone, options)
        assert gone.base_url == (served.url if good else "http://127.0.0.1:9")


def test_a_project_is_not_given_to_whoever_answers_nor_are_its_images_taken_for_ours(
        served: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    here = povfarm.Found("stranger", "a" * 16, served.url, False, "127.0.0.1")
    monkeypatch.setattr(povfarm, "_discover", lambda *_: [here])
    (tmp_path / "farm.key").write_text("k" * 64)
    with pytest.raises(UserError, match="would be given your project"):
        povfarm._find_coordinator(options_of(tmp_path, "submit"))
    client = povfarm._find_coordinator(options_of(tmp_path, "status"))
    assert client is not None and client.token == "", "one may look"
    assert "the farm that answers here, and does not have your key" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"its images are of other jobs.* name it with --server"):
        povfarm._find_coordinator(options_of(tmp_path, "fetch"))
    (tmp_path / "farm.key").unlink()  # who has no farm of their own means the one that is there
    assert povfarm._find_coordinator(options_of(tmp_path, "fetch"))
    assert not capsys.readouterr().err
    (tmp_path / "farm.key").write_text("k" * 64)
    # What has its coordinator's place may be the program of another user.
    (tmp_path / "coordinator.json").write_text(json.dumps(
        {"name": "mine", "url": served.url, "pin": ""}))
    with pytest.raises(UserError, match="would be given your project"):
        povfarm._find_coordinator(options_of(tmp_path, "submit"))
    (tmp_path / "farm.key").write_text(served.key)
    client = povfarm._find_coordinator(options_of(tmp_path, "submit"))
    assert client is not None and client.token == served.key
