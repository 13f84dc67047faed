"""Every route against every kind of sender, taken from the router itself: none can be forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import socket
import sqlite3
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Tuple
from urllib.parse import parse_qsl

import pytest

import povfarm
from helpers.base import tried
from helpers.farm_in_a_box import FakeClock, manifest, pov_job
from helpers.invariants import broken
from helpers.pictures import png
from helpers.sockets import until_closed
from helpers.trust import place_of, request_of, signer_of
from povfarm import (
    BodyReader,
    BoundRoute,
    Coordinator,
    JobOptions,
    LeaseSpec,
    Offer,
    Request,
    Response,
    Role,
    WorkerInfo,
)

READER, PENDING = frozenset({"reader"}), frozenset({"reader", "pending"})
WORKER, ADMIN = PENDING | {"worker"}, READER | {"person", "submit", "user", "admin"}
USER, VIEWER = ADMIN - {"admin"}, READER | {"person"}
PROGRAM = READER | {"submit"}  # like a stranger, it looks only where everybody may
# What each kind of sender may be; None is a key that is refused wherever it is shown.
SENDERS: Dict[str, Any] = {
    "nobody": READER, "worker asking to join": PENDING, "worker": WORKER, "another worker": WORKER,
    "HTTPov client": READER, "admin": ADMIN, "browser": ADMIN, "browser that logged out": READER, "made-up cookie": READER,
    "made-up key": None, "removed worker": None, "made-up worker": None,
    "user": USER, "viewer": VIEWER, "submitting program": PROGRAM, "browser of a user": USER,
    "browser of a viewer": VIEWER, "somebody under another's name": None, "removed person": None,
    "browser of a removed person": READER, "name of the admin with a made-up key": None,
    "worker without its secret": None, "Bearer of the key": None, "Bearer of a worker's": None,
    "Bearer of a user's": None, "Bearer of a program's": None, "Bearer of a viewer's": VIEWER,
    "hash of a person's key": None,
}
NOT_READERS = ("submitting program", "browser of a removed person")
STRANGERS = ("nobody", "HTTPov client", "browser that logged out", "made-up cookie")
LETTERS = {"": "abc", ":int": "7", ":path": "a/b"}
BODIES: Mapping[str, bytes] = {
    "POST /api/v1/leases/<lease>/release": b"{}",
    "POST /api/v1/leases/<lease>/tasks/<task:int>/fail":
        b'{"message": "x", "scene": true, "log": ""}',
    "PUT /api/v1/leases/<lease>/tasks/<task:int>": png(),
    "PUT /api/v1/leases/<lease>/tasks/<task:int>/state": b"where it stopped",
}


class House:
    """A coordinator as ``serve`` makes it, that never listens, and all who may knock."""

    def __init__(self, data: Path, private: bool = False) -> None:
        self.coordinator = Coordinator(data, bind="127.0.0.1", private=private, durable=False,
                                       httpov=True, sheepit=True,
                                       renderonline=povfarm.OnlineRules((), {}),
                                       clock=FakeClock())  # wrong keys are held up
        self.data = data
        self.scheduler = self.coordinator.scheduler
        self.access = self.coordinator.access
        self.router = self.coordinator.router
        self.entered: List[str] = []
        self.job, missing = self.scheduler.submit(
            "ball", "admin", pov_job(4), manifest({"scene.pov": b"sphere"}), JobOptions())
        for sha256 in missing:
            self.scheduler.put_blob(sha256, [b"sphere"])
        self.workers = {name: self.join(name) for name in ("worker", "another worker",
                                                           "removed worker")}
        self.workers["worker asking to join"] = self.join("worker asking to join", admitted=False)
        self.lease = self.scheduler.lease(
            self.workers["worker"], Offer(1, 1, 1), 0.0, lambda: True)[0]
        self.scheduler.remove_worker(self.workers["removed worker"])
        keys = {who: self.add(who.replace(" ", "-"), role) for who, role in (
            ("user", Role.USER), ("viewer", Role.VIEWER), ("submitting program", Role.SUBMIT),
            ("removed person", Role.USER))}
        session = self.access.log_in(self.access.login_code())
        gone = self.access.log_in(self.access.login_code())
        cookies = {"browser": session, "browser that logged out": gone, "made-up cookie": "x" * 43,
                   **{f"browser of a {who}": self.access.log_in(
                       self.access.login_code(who.replace(" ", "-")))
                      for who in ("user", "viewer", "removed person")}}
        self.scheduler.people.remove("removed-person")
        keys.update({
            "admin": self.coordinator.key, "made-up key": "x" * 64,
            "somebody under another's name": keys["viewer"].replace("viewer", "user"),
            "name of the admin with a made-up key": "admin:" + "x" * 64,
            "hash of a person's key": "user:" + povfarm.secret_hash(keys["user"]),
            "made-up worker": "#99:x", "worker without its secret": "#1:hello",
            **{name: f"#{number}:{name}" for name, number in self.workers.items()}})
        self.signer, self.keys = signer_of(self.access), keys
        self.headers: Dict[str, Dict[str, str]] = {
            **{who: {} for who in SENDERS},
            **{who: {"cookie": f"{self.access.cookie}={one}"} for who, one in cookies.items()},
            "Bearer of the key": {"authorization": f"Bearer {self.coordinator.key}"},
            "Bearer of a worker's": {"authorization": "Bearer #1:worker"},
            "Bearer of a user's": {"authorization": f"Bearer {keys['user']}"},
            "Bearer of a program's": {"authorization": f"Bearer {keys['submitting program']}"},
            "Bearer of a viewer's": {"authorization": f"Bearer {keys['viewer']}"},
        }
        self.access.log_out(request_of(self.access, self.headers["browser that logged out"]))

    def join(self, name: str, admitted: bool = True) -> int:
        info = WorkerInfo(name, 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
        token = povfarm.hashlib.sha256(name.encode()).hexdigest()
        return self.scheduler.join(info, token, "192.168.1.5", "" if admitted else "CODE")

    def add(self, name: str, role: Role) -> str:
        """Add a person; return the key."""
        self.access.add(name, role, {}, "a-ticket-that-is-new")
        return povfarm.person_key(name, self.coordinator.key, "a-ticket-that-is-new")

    def spy(self) -> None:
        """Let every route only note that it was reached."""
        self.router.routes = [dataclasses.replace(bound, handler=self._enter)
                              for bound in self.router.routes]

    def _enter(self, request: Request) -> Response:
        self.entered.append(request.path)
        return Response(204)

    def send(self, method: str, path: str, who: str, body: bytes = b"",
             **headers: str) -> Response:
        target = path
        path, _, query = path.partition("?")
        fields = {"host": "127.0.0.1", "content-type": "application/json", **self.headers[who],
                  **self.signer.headers(self.keys.get(who), method, target, body),
                  **{name.replace("_", "-"): value for name, value in headers.items()}}
        place = place_of(self.access, fields.get("cookie", ""))
        return self.router.handle(Request(method, place + path, dict(parse_qsl(query)), fields,
                                          BodyReader.of(body), target=target))

    def truth(self) -> Tuple[Any, ...]:
        """All that the farm has written down, and the names of its files."""
        with sqlite3.connect(self.data / "farm.db") as db:
            tables = [row[0] for row in db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
            rows = [(table, db.execute(f"SELECT * FROM {table}").fetchall()) for table in tables]
        files = sorted(str(path) for path in self.data.rglob("*") if "farm.db" not in path.name)
        return rows, files

    def close(self) -> None:
        problems = broken(self.scheduler)
        self.coordinator.stop()
        assert problems == []


@pytest.fixture(name="house")
def house_fixture(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "data")
    yield house
    house.close()


def example(bound: BoundRoute, **values: str) -> str:
    """A path that the route matches."""
    path = re.sub(r"<(\w+)(:\w+)?>",
                  lambda found: values.get(found[1], LETTERS[found[2] or ""]), bound.route.pattern)
    assert bound.regex.fullmatch(path)
    return path


def allowed(roles: Any, who: str, bound: BoundRoute, private: bool) -> bool:
    """The rule: the role that the route declares, and nothing more."""
    if roles is None:
        return False
    if private and who in (*STRANGERS, *NOT_READERS, "worker asking to join"):
        roles = roles - {"reader"}
    if cookie_of(who) and bound.route.pattern.startswith("/api/") and bound.route.method != "GET":
        roles = roles & READER  # a cookie alone only looks: any page can make a browser send it
    return bound.route.role == "anyone" or bound.route.role in roles


def cookie_of(who: str) -> bool:
    return who.startswith("browser")


def knock(house: House, who: str, private: bool) -> int:
    """Try every door; return how many there are."""
    roles: FrozenSet[str] = SENDERS[who]
    house.spy()
    for bound in house.router.routes:
        method = bound.route.method
        # Its key is good at its own routes alone, where others are refused in its own words.
        path = example(bound, **({"key": house.access.guest_key} if who == "HTTPov client" else {}))
        first = next(one for one in house.router.routes
                     if one.route.method == method and one.regex.fullmatch(path))
        house.entered.clear()
        group = house.access.guest_key if who == "HTTPov client" else "abc"
        response = house.send(method, f"{path}?cgroup={group}", who)
        place = f"{who} at {method} {bound.route.pattern}"
        good = allowed(roles, who, first, private)
        tried("senders at every route", let_in_by_right=bool(good and house.entered),
              let_in_wrongly=bool(house.entered and not good))
        if good:
            assert house.entered == [path] and response.status == 204, place
            continue
        assert house.entered == [], place
        refusal = 401 if roles is None or who in (*STRANGERS, "browser of a removed person") else 403
        assert response.status == refusal, place
    return len(house.router.routes)


@pytest.mark.parametrize("who", SENDERS)
def test_every_route_lets_in_its_role_and_no_other(who: str, house: House) -> None:
    assert knock(house, who, private=False) > 30


@pytest.mark.parametrize("who", SENDERS)
def test_on_a_private_farm_strangers_do_not_even_look(who: str, tmp_path: Path) -> None:
    house = House(tmp_path / "data", private=True)
    assert knock(house, who, private=True) > 30
    house.close()


# What is sent at every route beside its own line and ``Host``: a head, the body, and more of the target.
ODD: Mapping[str, Tuple[str, bytes, str]] = {
    "nothing": ("", b"", ""), "chunks": ("Transfer-Encoding: chunked", b"2;x=y\r\n{}\r\n0\r\n\r\n", ""),
    "a length and chunks": ("Transfer-Encoding: chunked\r\nContent-Length: 2", b"{}", ""),
    "two lengths": ("Content-Length: 2\r\nContent-Length: 3", b"{}", ""),
    "a length without end": ("Content-Length: 999999999999999999", b"", ""),
    "no number": ("Content-Length: +2", b"{}", ""), "two hosts": ("Host: evil.example", b"", ""),
    "a body that waits": ("Expect: 100-continue\r\nContent-Length: 70000000", b"", ""),
    "another coding": ("Transfer-Encoding: gzip, chunked", b"", ""), "a fold": ("X: a\r\n b", b"", ""),
    "a blank": ("Content-Length : 2", b"{}", ""), "a zero byte": ("X: a\0b", b"", ""),
    "names of proxies": ("X-Forwarded-For: 127.0.0.1\r\nX-Original-URL: /\r\nX-HTTP-Method-Override: GET",
                         b"", ""),
    "an empty key": ("Authorization: Bearer ", b"", ""), "an empty proof": ("Authorization: Povfarm ", b"", ""),
    "an empty token": ("token: \r\nemail: user", b"", "?login=user&password=&cgroup=&token="),
    "nobody's token": ("token: 0\r\nemail: ", b"", ""), "the admin's mail": ("token: 0\r\nemail: admin@x", b"", ""),
    "an empty form": ("Content-Type: multipart/form-data; boundary=a\r\nContent-Length: 5", b"--a--", ""),
    "half a form": ("Content-Type: multipart/form-data; boundary=a\r\nContent-Length: 5", b"--a\r\n", ""),
    "a list": ("Content-Type: application/json\r\nContent-Length: 2", b"[]", ""),
    "dots": ("", b"", "/../../api/v1/farm"), "dots in code": ("", b"", "/..%2f..%2fapi%2fv1%2ffarm"),
    "a parameter": ("", b"", ";a=b"), "another zero byte": ("", b"", "%00"), "no UTF-8": ("", b"", "%ff"),
    "many words": ("", b"", "?" + "a=b&" * 1200),
}


def test_nothing_odd_over_a_socket_gets_in_at_any_route(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private farm with every dialect; also with a token that is good for RenderOnline alone."""
    monkeypatch.setattr(povfarm, "FREE_TRIES", 1 << 30)
    house = House(tmp_path / "data", private=True)
    house.coordinator.start()
    with house.coordinator.store.read() as look:
        user = look.person("user")
    assert user
    right = f"token: {povfarm.online_token(house.coordinator.key, 'user', user.added)}\r\nemail: user"
    before = house.truth()
    try:
        for bound, (what, (head, body, more)) in itertools.product(
                house.router.routes, [*ODD.items(), ("the right token", (right, b"", ""))]):
            if what == "the right token" and bound.route.pattern.startswith("/renderapi/"):
                continue
            lines = [f"{bound.route.method} {example(bound)}{more} HTTP/1.1", "Host: 127.0.0.1",
                     "Connection: close", *filter(None, [head]), "", ""]
            with socket.create_connection(("127.0.0.1", house.coordinator.port), 60) as sock:
                sock.sendall("\r\n".join(lines).encode() + body)
                status = int(until_closed(sock)[9:12])
            wrong = (status < 400 and bound.route.role != "anyone") or (status >= 500 and status != 501)
            tried("odd requests over a socket at every route", let_in=wrong)
            assert not wrong, (what, bound.route, status)
        assert house.truth() == before
    finally:
        house.close()


def test_each_role_is_used_and_every_change_needs_one(house: House) -> None:
    routes = [bound.route for bound in house.router.routes]
    assert {one.role for one in routes} == set(povfarm.ROLES)
    # Who changes something without a key: a worker that asks to join, who has a code, a login link.
    # RenderOnline's clients are refused in their own words, which the next test looks at.
    assert {one.pattern for one in routes if one.role == "anyone" and one.method != "GET"} == {
        "/api/v1/hello", "/api/v1/workers", "/api/v1/users/come", "/renderapi/v1/<what>",
        "/server/<what>.php",  # for these clients, test_sheepit.py does
        "/httpov.php", "/<key>/httpov.php"}
    assert not [one for one in routes if one.role == "reader" and one.method != "GET"]


@pytest.mark.parametrize("who", SENDERS)
def test_renderonlines_routes_are_for_its_tokens_alone(who: str, house: House) -> None:
    house.scheduler.people.add(povfarm.Person("eve", Role.USER, "0" * 64, "{}", 5.0))
    before = house.truth()
    calls = ("info", "enqueue", "dequeue", "download", "delete")
    for what in calls:
        answer = house.send("GET" if what == "info" else "POST", f"/renderapi/v1/{what}", who,
                            b'{"TaskId": 1}', email="user", token=house.keys.get(who, ""))
        assert answer.status == 401, what
    assert house.truth() == before
    tried("calls of RenderOnline without a token", len(calls), let_in=0)
    right = povfarm.online_token(house.coordinator.key, "eve", 5.0)
    assert house.send("GET", "/renderapi/v1/info", who, email="eve", token=right).status == 200


@pytest.mark.parametrize("who", SENDERS)
def test_httpovs_routes_are_for_its_key_alone(who: str, house: House) -> None:
    before, right = house.truth(), house.access.guest_key
    query = "client=a:1&version=1.2&job=1&batch=1"
    for command in ("hello", "getjob", "getbatch", "postbatch", "abortbatch", "active", "dance"):
        for method in ("GET", "POST"):
            for path in ("/httpov.php", f"/{right[::-1]}/httpov.php"):
                answer = house.send(method, f"{path}?command={command}&{query}", who)
                refused = SENDERS[who] is None or b"error=the key is wrong: set HP_GROUP" in (
                    answer.body if isinstance(answer.body, bytes) else b"")
                tried("commands of HTTPov without its key", let_in=not refused)
                assert refused, (command, answer)
    assert house.truth() == before


def test_a_key_in_another_scheme_or_place_is_none(house: House) -> None:
    key = house.coordinator.key
    for header in (f"Basic {key}", key, f"Bearer{key}", "Bearer", f"Bearer {key}x",
                   f"Bearer {key}", "Bearer \u00e9", f"Bearer {key} {key}", f"Povfarm {key}",
                   "Povfarm", "Povfarm session=,count=1,mac=" + "0" * 64,
                   f"Povfarm session=.{'0' * 32}.1.{'0' * 64},count=1,mac={'0' * 64}"):
        answer = house.send("POST", "/api/v1/login", "nobody", authorization=header)
        assert answer.status == 401, header
    assert house.send("POST", "/api/v1/login", "nobody", cookie=f"key={key}").status == 401
    proof = house.signer.headers(key, "POST", "/api/v1/login")["authorization"]
    assert house.send("POST", "/api/v1/login", "nobody",
                      authorization=proof.replace("Povfarm ", "povfarm  ")).status == 200


# --- leases of others

def lease_routes(house: House) -> List[BoundRoute]:
    return [bound for bound in house.router.routes if "<lease>" in bound.route.pattern]


def test_every_route_of_a_lease_is_tried_below(house: House) -> None:
    assert {f"{bound.route.method} {bound.route.pattern}" for bound in lease_routes(house)} == \
        set(BODIES)


def shown(lease: LeaseSpec, house: House) -> Iterator[Tuple[str, str, bytes]]:
    """Every request that shows the lease."""
    for bound in lease_routes(house):
        body = BODIES[f"{bound.route.method} {bound.route.pattern}"]
        yield bound.route.method, example(
            bound, lease=lease.id, task=str(lease.tasks[0].id)), body


@pytest.mark.parametrize("who, status", [
    ("another worker", 410), ("worker asking to join", 403), ("removed worker", 401),
    ("admin", 403), ("nobody", 401), ("browser", 403),
])
def test_the_lease_of_another_can_be_neither_beaten_nor_ended(
        who: str, status: int, house: House) -> None:
    before = house.truth()
    for method, path, body in shown(house.lease, house):
        assert house.send(method, path, who, body).status == status, path
        tried("requests that show the lease of another")
    grant = house.scheduler.grants.get(house.lease.id)
    assert grant
    grant.brings = True  # which only its worker hears
    beat = house.send("POST", "/api/v1/beat", who,
                      b'{"leases": {"%s": {}}}' % house.lease.id.encode())
    grant.brings = False
    if who == "another worker":
        assert isinstance(beat.body, bytes) and beat.status == 200
        assert beat.body == b'{"ended":["%s"],"cuts":{},"bring":[],"ends":false,"rest":""}' % house.lease.id.encode()
    else:
        assert beat.status == status
    assert house.truth() == before


def test_the_task_of_another_lease_cannot_be_settled_with_ones_own(house: House) -> None:
    lease, = house.scheduler.lease(
        house.workers["another worker"], Offer(1, 1, 1), 0.0, lambda: True)
    assert lease.tasks[0].id != house.lease.tasks[0].id
    before = house.truth()
    for method, path, body in shown(house.lease, house):
        if "tasks" in path:
            mine = path.replace(house.lease.id, lease.id)
            assert house.send(method, mine, "another worker", body).status == 410, path
    assert house.truth() == before


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_its_own_worker_ends_the_lease(number: int, house: House) -> None:
    """The same requests as above are good ones when the right worker sends them."""
    before = house.truth()
    method, path, body = list(shown(house.lease, house))[number]
    assert house.send(method, path, "worker", body).status in (200, 204)
    assert house.truth() != before


def test_a_browser_changes_nothing_without_the_token_of_a_form(house: House) -> None:
    before = house.truth()
    form = "application/x-www-form-urlencoded"
    other = house.access.form_token(request_of(house.access, house.headers["nobody"]))
    for bound in house.router.routes:
        if bound.route.method == "GET" or bound.route.role == "anyone":
            continue
        for values in ({"job": "1", "action": "cancel"}, {"job": "1", "action": "delete"}):
            path = example(bound, **values)
            for body in (b"", b"token=", b"token=" + other.encode(), b"token=%FF"):
                answer = house.send(bound.route.method, path, "browser", body, content_type=form)
                tried("forms without their token", let_in=answer.status != 403)
                assert answer.status == 403, (path, body)
    assert house.truth() == before
    assert "user" in house.access.identify(
        request_of(house.access, house.headers["browser"])).roles, "it is still logged in"


# --- jobs of others

ACTIONS = ("pause", "resume", "cancel", "retry", "delete")


def doors_to_a_job(house: House, job: int) -> Iterator[Tuple[str, str]]:
    """Every request by which a job is changed."""
    for bound in house.router.routes:
        if "<job:int>" in bound.route.pattern and bound.route.method != "GET":
            assert bound.route.role == "user", bound.route.pattern
            for action in ACTIONS if "<action>" in bound.route.pattern else ("",):
                yield bound.route.method, example(bound, job=str(job), action=action)


@pytest.mark.parametrize("who", ["user", "browser of a user"])
def test_a_user_gets_through_no_door_to_the_job_of_another(who: str, house: House) -> None:
    cookie = who.startswith("browser")
    doors = [door for door in doors_to_a_job(house, house.job) if cookie != ("/api/" in door[1])]
    assert len(doors) == (5 if cookie else 8)
    before = house.truth()
    token = house.access.form_token(request_of(house.access, house.headers[who])).encode()
    body = b"token=" + token if cookie else b'{"priority": -1}'
    kind = "application/x-www-form-urlencoded" if cookie else "application/json"
    for method, path in doors:
        sent = b'{"images": []}' if path.endswith("/fetched") else body
        answer = house.send(method, path, who, sent, content_type=kind)
        if path.endswith("/api/v1/jobs/1/delete"):  # there is no such action, only the method
            assert answer.status in (403, 404)
            continue
        tried("doors to the job of another", let_in=answer.status != 403)
        assert answer.status == 403, path
        assert isinstance(answer.body, bytes) and b"job 1 is admin's" in answer.body
    assert house.truth() == before
    # The same requests are good ones for a job that is theirs.
    mine, _ = house.scheduler.submit("mine", "user", pov_job(4), manifest({}), JobOptions())
    path = f"/jobs/{mine}/pause" if cookie else f"/api/v1/jobs/{mine}/pause"
    assert house.send("POST", path, who, body, content_type=kind).status in (200, 303)


# --- what is shown

@pytest.mark.parametrize("who", ["admin", "browser", "browser of a user", "worker", "nobody"])
def test_no_secret_is_on_a_page_or_in_another_answer(who: str, house: House) -> None:
    """Neither a key nor the hash of one, which is as good as it, nor what is made of them."""
    with house.coordinator.store.read() as look:
        user, workers = look.person("user"), look.workers()
    assert user
    keys = [key.rpartition(":")[2] for key in house.keys.values() if len(key) > 60]
    hidden = {*keys, user.token, *(row.token for row in workers),
              povfarm.secret_hash(house.coordinator.key), house.access.guest_key,
              povfarm.online_token(house.coordinator.key, "user", user.added),
              povfarm.sheepit_password(user.token)}
    shown = 0
    for bound in house.router.routes:
        if bound.route.method != "GET" or bound.route.pattern.startswith("/login/"):
            continue
        answer = house.send("GET", example(
            bound, job=str(house.job), frame="1", worker="1", task="1") + "?wait=0&after=0", who)
        with contextlib.closing(answer):
            body = answer.body if isinstance(answer.body, bytes) else b"".join(
                [] if isinstance(answer.body, povfarm.FileSlice) else answer.body)
        shown += answer.status == 200
        text = body.decode("utf-8", "replace") + str(answer.headers)
        tried("answers that may show a secret", let_in=any(one in text for one in hidden))
        assert not [one for one in hidden if one in text], bound.route.pattern
    assert shown > 10 and len(hidden) > 9


# --- from where

@pytest.mark.parametrize("host, good", [
    ("127.0.0.1:2271", True), ("192.168.1.5", True), ("[fe80::1]:2271", True),
    ("localhost:2271", True), (socket.gethostname(), True),
    (f"{socket.gethostname()}.local:2271", True), ("Render.Example.org:2271", True),
    ("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
])
def test_a_browser_that_was_lured_here_under_another_name_is_refused(
        host: str, good: bool, tmp_path: Path) -> None:
    farm = Coordinator(tmp_path, bind="127.0.0.1", durable=False,
                       hosts=["render.example.org ", ""])
    for method, path in (("GET", "/"), ("GET", "/api/v1/jobs"), ("GET", "/style.css"),
                         ("POST", "/api/v1/workers")):
        answer = farm.router.handle(Request(method, path, {}, {"host": host, "accept": "*/*"}))
        assert (answer.status == 403) is not good
        assert good or (isinstance(answer.body, bytes) and b"--host NAME" in answer.body)
    farm.stop()


OURS, THEIRS = "http://127.0.0.1", "http://evil.example"


@pytest.mark.parametrize("headers, good", [
    ({}, True),  # no browser, or one from before 2020
    ({"origin": OURS}, True), ({"origin": OURS, "sec-fetch-site": "same-origin"}, True),
    ({"sec-fetch-site": "none"}, True),
    # Behind a proxy the Host may be another; the browser knows better than we do.
    ({"origin": "https://proxy", "sec-fetch-site": "same-origin"}, True),
    ({"origin": THEIRS}, False), ({"origin": "null"}, False), ({"origin": ""}, False),
    ({"origin": OURS + ":81"}, False), ({"origin": OURS + ".evil.example"}, False),
    ({"origin": OURS, "sec-fetch-site": "cross-site"}, False),
    ({"origin": OURS, "sec-fetch-site": "same-site"}, False), ({"sec-fetch-site": ""}, False),
])
def test_a_page_elsewhere_cannot_use_the_cookie(
        headers: Dict[str, str], good: bool, house: House) -> None:
    cookie = {**house.headers["browser"], "host": "127.0.0.1",
              "content-type": "application/x-www-form-urlencoded"}
    token = house.access.form_token(request_of(house.access, cookie))
    before = house.truth()
    place = place_of(house.access, cookie["cookie"])
    request = Request("POST", f"{place}/jobs/{house.job}/pause", {}, {**cookie, **headers},
                      BodyReader.of(f"token={token}".encode()))
    status = house.router.handle(request).status
    tried("requests that a browser says are from elsewhere", not good,
          let_in=not good and status != 403)
    assert status == (303 if good else 403)
    assert (house.truth() != before) is good
    # With a key it is no browser: nobody else can make it send that.
    assert house.send("POST", f"/api/v1/jobs/{house.job}/resume", "admin",
                      **headers).status == (200 if good else 409)
