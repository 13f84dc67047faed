"""Routes without sockets, and the adaptor with real ones, abused."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest

import povfarm
from helpers.base import need, tried, wait_until
from helpers.sockets import SlowLink, until_closed
from povfarm import BodyReader, Identity, Limits, Request, Response, Router, Server, route

ROLES = ("reader", "user", "pending", "worker", "admin")


class Pages:
    """Routes that show what reached them."""

    def __init__(self, directory: Optional[Path] = None) -> None:
        self.directory = directory or Path()
        self.entered = threading.Event()
        self.ended = threading.Event()
        self.error: Exception = ValueError("the secret of the house")

    @route("GET", "/", role="anyone")
    def start(self, request: Request) -> Response:
        """Answer with what was asked."""
        return povfarm.json_response({"query": dict(request.query), "remote": request.remote})

    @route("GET", "/jobs/<n:int>", role="anyone")
    def job(self, request: Request) -> Response:
        return povfarm.json_response(dict(request.params))

    @route("GET", "/jobs/<name>", role="anyone")
    def job_by_name(self, request: Request) -> Response:
        return povfarm.json_response(dict(request.params))

    @route("GET", "/jobs/new", role="anyone")
    def new(self, request: Request) -> Response:
        return povfarm.text_response("<p>new", mime="text/html")

    @route("GET", "/tree/<n:int>/<rest:path>", role="anyone")
    def tree(self, request: Request) -> Response:
        return povfarm.json_response(dict(request.params))

    @route("POST", "/echo", role="anyone", max_body=200_000)
    def echo(self, request: Request) -> Response:
        return Response(200, {"Content-Type": "text/plain"}, request.body.read())

    @route("POST", "/json", role="anyone", max_body=1000)
    @route("PUT", "/json", role="anyone", max_body=1000)
    def json(self, request: Request) -> Response:
        return povfarm.json_response(request.json())

    @route("POST", "/form", role="anyone")
    def form(self, request: Request) -> Response:
        return povfarm.json_response(request.form())

    @route("POST", "/unread", role="anyone")
    def unread(self, request: Request) -> Response:
        return povfarm.text_response("did not look")

    @route("GET", "/fail", role="anyone")
    def fail(self, request: Request) -> Response:
        raise self.error

    @route("GET", "/away", role="anyone")
    def away(self, request: Request) -> Response:
        return povfarm.redirect(request.query["to"])

    @route("GET", "/file/<name>", role="anyone")
    def file(self, request: Request) -> Response:
        path = povfarm.safe_join(self.directory, request.params["name"])
        return povfarm.file_response(path, "image/png", request, request.query.get("etag", ""))

    @route("GET", "/stream/<n:int>", role="anyone")
    def stream(self, request: Request) -> Response:
        return povfarm.stream_response(self._count(request.params["n"]), "text/plain")

    def _count(self, last: int) -> Iterator[bytes]:
        if last == 0:
            raise self.error
        for n in range(last):
            yield f"{n} ".encode()
            if n == 9:
                raise self.error

    @route("GET", "/events", role="anyone")
    def events(self, request: Request) -> Response:
        return povfarm.stream_response(self._events(), "text/event-stream")

    def _events(self) -> Iterator[bytes]:
        try:
            yield b"data: hello\n\n"
            while True:
                self.entered.wait(0.005)
                yield b""
        finally:
            self.ended.set()

    @route("GET", "/poll", role="anyone")
    def poll(self, request: Request) -> Response:
        self.entered.set()
        while request.alive():
            self.ended.wait(0.005)
        self.ended.set()
        return Response(204)


class Doors:
    """One route for each role."""

    @route("GET", "/anyone", role="anyone")
    @route("GET", "/reader", role="reader")
    @route("GET", "/user", role="user")
    @route("GET", "/pending", role="pending")
    @route("GET", "/worker", role="worker")
    @route("GET", "/admin", role="admin")
    def enter(self, request: Request) -> Response:
        return povfarm.json_response(request.identity.name)


def stranger(request: Request) -> Identity:
    return Identity()


def known(request: Request) -> Identity:
    name = request.headers.get("authorization", "")
    return Identity(frozenset([name]), name=name)


def ask(pages: Pages, method: str, path: str, body: bytes = b"", **headers: str) -> Response:
    """A request without a socket, to a path as a handler sees it."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(method, path, {}, fields, BodyReader.of(body))
    return Router(pages, authenticate=stranger).handle(request)


def content(response: Response) -> Any:
    assert isinstance(response.body, bytes)
    return json.loads(response.body)


# Router


@pytest.mark.parametrize("path, expected", [
    ("/jobs/7", {"n": 7}),
    ("/jobs/007", {"n": 7}),
    ("/jobs/seven", {"name": "seven"}),
    ("/jobs/9999999999999999999", {"name": "9999999999999999999"}),
    ("/jobs/a b\u00fc", {"name": "a b\u00fc"}),
    ("/tree/3/a/b.png", {"n": 3, "rest": "a/b.png"}),
])
def test_a_wildcard_gives(path: str, expected: Dict[str, Any]) -> None:
    response = ask(Pages(), "GET", path)
    assert (response.status, content(response)) == (200, expected)


def test_a_literal_path_wins_over_a_wildcard() -> None:
    assert ask(Pages(), "GET", "/jobs/new").body == b"<p>new"


@pytest.mark.parametrize("path", ["/nothing", "/jobs/", "/jobs/7/", "/jobs/7/8", "/tree/3/", "x"])
def test_no_such_path(path: str) -> None:
    response = ask(Pages(), "GET", path)
    assert response.status == 404
    assert set(content(response)) == {"error", "detail"}


def test_the_wrong_method_is_told_the_right_ones() -> None:
    assert ask(Pages(), "GET", "/json").headers["Allow"] == "POST, PUT"
    response = ask(Pages(), "DELETE", "/")
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("role", ["anyone", *ROLES])
def test_a_route_lets_in_its_role_and_no_other(role: str) -> None:
    router = Router(Doors(), authenticate=known)
    statuses = {
        who: router.handle(Request("GET", f"/{role}", {}, {"authorization": who})).status
        for who in ("", *ROLES)
    }
    if role == "anyone":
        assert set(statuses.values()) == {200}
    else:
        assert statuses == {"": 401, **dict.fromkeys(ROLES, 403), role: 200}


def test_a_route_needs_a_role_that_exists() -> None:
    with pytest.raises(ValueError, match="no role 'wroker'"):
        route("GET", "/x", role="wroker")(stranger)
    with pytest.raises(TypeError):
        route("GET", "/x")  # type: ignore[call-arg]


def test_two_routes_cannot_be_the_same() -> None:
    with pytest.raises(ValueError, match="the same"):
        Router(Pages(), Pages(), authenticate=stranger)


def test_routes_are_told_for_a_document() -> None:
    routes = Router(Pages(), Doors(), authenticate=stranger).routes
    told = {(one.route.method, one.route.pattern): one for one in routes}
    assert len(told) == len(routes)
    assert told["GET", "/"].handler.__doc__ == "Answer with what was asked."
    assert told["GET", "/worker"].route.role == "worker"


@pytest.mark.parametrize("error, status", [
    (povfarm.ProtocolError(418, "a teapot", {"lid": 1}), 418),
    (povfarm.UserError("no such option"), 400),
    (povfarm.StaleLease("that lease has ended"), 410),
    (povfarm.IllegalTransition("done cannot become leased"), 409),
    (povfarm.StoreError("the disk is full"), 500),
    (povfarm.FarmError("it failed"), 409),
])
def test_an_error_becomes_a_response(error: povfarm.FarmError, status: int) -> None:
    pages = Pages()
    pages.error = error
    response = ask(pages, "GET", "/fail")
    assert response.status == status
    assert content(response) == {"error": str(error), "detail": getattr(error, "detail", None)}


def test_a_mistake_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    response = ask(Pages(), "GET", "/fail")
    assert response.status == 500
    assert isinstance(response.body, bytes)
    assert b"secret" not in response.body
    assert "GET '/fail' failed" in caplog.text
    assert "the secret of the house" in caplog.text


@pytest.mark.parametrize("to", ["/a\r\nSet-Cookie: a=b", "/a\nb", "/\u20ac"])
def test_a_header_that_would_break_out_is_a_mistake(to: str) -> None:
    router = Router(Pages(), authenticate=stranger)
    response = router.handle(Request("GET", "/away", {"to": to}))
    assert (response.status, response.headers) == (500, {"Content-Type": "application/json"})
    assert router.handle(Request("GET", "/away", {"to": "/b"})).headers["Location"] == "/b"


JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("path, body, kind, status", [
    ("/json", b'{"a": [1, 2.5, "\xc3\xbc"]}', JSON, 200),
    ("/json", b"{}", "Application/JSON; charset=utf-8", 200),
    ("/json", b"{}", "text/plain", 415),
    ("/json", b"{}", "", 415),
    ("/json", b"{", JSON, 400),
    ("/json", b"", JSON, 400),
    ("/json", b"NaN", JSON, 400),
    ("/json", b'"\xff"', JSON, 400),
    ("/json", b"[" * 999, JSON, 400),
    ("/json", b"1" * 1001, JSON, 413),
    ("/echo", b"x" * 200_000, "", 200),
    ("/echo", b"x" * 200_001, "", 413),
    ("/form", b"a=1&b=%C3%BC+x&c=", FORM, 200),
    ("/form", b"a=1", JSON, 415),
    ("/form", b"&".join([b"a=1"] * 1001), FORM, 400),
])
def test_a_body(path: str, body: bytes, kind: str, status: int) -> None:
    assert ask(Pages(), "POST", path, body, content_type=kind).status == status


def test_a_form_gives_its_fields() -> None:
    response = ask(Pages(), "POST", "/form", b"a=1&b=%C3%BC+x&c=", content_type=FORM)
    assert content(response) == {"a": "1", "b": "\u00fc x", "c": ""}


@pytest.mark.parametrize("host, status", [
    ("farm", 200), ("farm:2271", 200), ("FARM", 200), ("[::1]:2271", 200), ("[::1]", 200),
    (None, 200), ("192.168.1.5:2271", 200), ("farm.", 200), ("evil.example", 403), ("", 403),
    ("farm.evil.example:2271", 403), ("192.168.1.5.evil.example", 403), ("farm:2271@evil", 403),
    ("evil.example:2271:farm", 403), ("1", 403), ("[farm]:x", 403),
])
def test_a_host_name_must_be_ours(host: Optional[str], status: int) -> None:
    router = Router(Pages(), authenticate=stranger, hosts={"farm"})
    headers = {} if host is None else {"host": host}
    assert router.handle(Request("GET", "/", {}, headers)).status == status


def test_a_browser_gets_errors_as_pages_and_a_program_as_json() -> None:
    def page(request: Request, refusal: povfarm.ProtocolError) -> Response:
        return povfarm.text_response(f"<p>{request.path}: {refusal}", refusal.status, "text/html")

    router = Router(Pages(), Doors(), authenticate=stranger, error_page=page)
    for path, status, header in (("/nothing", 404, ""), ("/json", 405, "Allow"), ("/fail", 500, ""),
                                 ("/admin", 401, "WWW-Authenticate")):
        seen = router.handle(Request("GET", path, {}, {"accept": "text/html,*/*;q=0.8"}))
        assert (seen.status, seen.headers["Content-Type"]) == (status, "text/html; charset=utf-8")
        assert isinstance(seen.body, bytes) and seen.body.startswith(f"<p>{path}: ".encode())
        assert b"secret" not in seen.body and (not header or seen.headers[header])
        told = router.handle(Request("GET", path, {}, {"accept": "*/*"}))
        assert told.status == status and set(content(told)) == {"error", "detail"}


# Files


@pytest.mark.parametrize("asked, status, expected, content_range", [
    (None, 200, b"0123456789", None),
    ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
    ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
    ("bytes=-3", 206, b"789", "bytes 7-9/10"),
    ("bytes=-30", 206, b"0123456789", "bytes 0-9/10"),
    ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
    ("bytes=10-", 416, None, "bytes */10"),
    ("bytes=10-12", 416, None, "bytes */10"),
    ("bytes=-0", 416, None, "bytes */10"),
    ("bytes=5-2", 200, b"0123456789", None),
    ("bytes=0-1,4-5", 200, b"0123456789", None),
    ("bytes=-", 200, b"0123456789", None),
    ("lines=1-2", 200, b"0123456789", None),
])
def test_a_range_of_a_file(asked: Optional[str], status: int, expected: Optional[bytes],
                           content_range: Optional[str], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"0123456789")
    headers = {} if asked is None else {"range": asked}
    response = ask(Pages(tmp_path), "GET", "/file/a.png", b"", **headers)
    assert response.status == status
    assert response.headers.get("Content-Range") == content_range
    assert expected is None or response.body == expected


def test_a_file_that_is_known_is_not_sent_again(tmp_path: Path) -> None:
    path, pages = tmp_path / "a.png", Pages(tmp_path)
    path.write_bytes(b"one")
    etag = ask(pages, "GET", "/file/a.png").headers["ETag"]
    for given in (etag, f'"x", {etag}', f"W/{etag}", "*"):
        known = ask(pages, "GET", "/file/a.png", if_none_match=given)
        assert (known.status, known.headers["ETag"], known.body) == (304, etag, b"")
    old = {"range": "bytes=1-", "if_range": etag}
    assert ask(pages, "GET", "/file/a.png", **old).status == 206
    path.write_bytes(b"three")
    assert ask(pages, "GET", "/file/a.png", if_none_match=etag).body == b"three"
    assert ask(pages, "GET", "/file/a.png", **old).body == b"three"


@pytest.mark.parametrize("name, status", [("b.png", 404), ("sub", 404), ("..", 400)])
def test_no_such_file(name: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    assert ask(Pages(tmp_path), "GET", f"/file/{name}").status == status


# The adaptor


@contextlib.contextmanager
def serving(pages: Pages, tls: Optional[ssl.SSLContext] = None, host: str = "127.0.0.1",
            **limits: Any) -> Iterator[Server]:
    server = Server(Router(pages, authenticate=stranger), host, 0, tls, Limits(**limits))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 60)


def exchange(server: Server, *pieces: bytes) -> bytes:
    """Everything that is answered to raw bytes until the server closes."""
    with connect(server) as sock:
        for piece in pieces:
            sock.sendall(piece)
        return until_closed(sock)


def statuses(answers: bytes) -> List[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


def client(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)


HOST = b"Host: farm\r\n"
GOOD = b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\n" + HOST
UNREAD = b"POST /unread HTTP/1.1\r\n" + HOST


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with serving(Pages(), head_fields=20, head_bytes=2000, head_seconds=10,
                 linger_seconds=0.01) as server:
        yield server


BAD_HEADS: List[Tuple[str, bytes, int]] = [
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("noise", b"\x16\x03\x01\x02\x00\x01\xfc\x03\r\n\r\n", 400),
    ("no version", b"GET /\r\n\r\n", 400),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("line feeds only", b"GET / HTTP/1.1\nHost: farm\n\n", 400),
    ("a line feed at the end", b"GET / HTTP/1.1\r\nHost: farm\r\n\n\r\n", 400),
    ("no line end before the empty line", b"GET / HTTP/1.1\nHost: farm\n\r\n", 400),
    ("a carriage return inside", b"GET / HTTP/1.1\r\nHost: farm\rX: y\r\n\r\n", 400),
    ("tab in the request line", b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("two blanks", b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("name and port only", b"CONNECT farm:22 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("asterisk", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("another scheme", b"GET ftp://farm/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("somebody at a host", b"GET http://farm@evil/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("control character in a host", b"GET http://f\1/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("no path", b"GET http://farm HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("overlong UTF-8", b"GET /%c0%ae%c0%ae/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("HTTP/1.10", b"GET / HTTP/1.10\r\n" + HOST + b"\r\n", 400),
    ("two Authorizations", b"GET / HTTP/1.1\r\n" + HOST + b"Authorization: a\r\nAuthorization: b"
     b"\r\n\r\n", 400),
    ("a line feed inside", b"GET / HTTP/1.1\r\nHost: farm\nX: y\r\n\r\n", 400),
    ("blank in the path", b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("small letters", b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("no host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("two hosts", b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    ("blank before the colon", b"GET / HTTP/1.1\r\nHost : farm\r\n\r\n", 400),
    ("continued line", b"GET / HTTP/1.1\r\n" + HOST + b" more\r\n\r\n", 400),
    ("no colon", b"GET / HTTP/1.1\r\n" + HOST + b"what\r\n\r\n", 400),
    ("zero byte", b"GET / HTTP/1.1\r\n" + HOST + b"A: \0\r\n\r\n", 400),
    ("path not UTF-8", b"GET /%ff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("path with a zero", b"GET /%00 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("too many fields", b"GET / HTTP/1.1\r\n" + HOST + b"A: 1\r\n" * 20 + b"\r\n", 431),
    ("too long a field", b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 2000 + b"\r\n\r\n", 431),
    ("endless line", b"GET /" + b"x" * 3000, 431),
]
BAD_BODIES: List[Tuple[str, bytes, int]] = [
    ("two equal lengths", POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("two lengths", POST + b"Content-Length: 3, 3\r\n\r\nabc", 400),
    ("negative length", POST + b"Content-Length: -3\r\n\r\nabc", 400),
    ("signed length", POST + b"Content-Length: +3\r\n\r\nabc", 400),
    ("length with underscore", POST + b"Content-Length: 0_3\r\n\r\nabc", 400),
    ("length and chunks",
     POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("chunks in HTTP/1.0",
     b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("chunks and length", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n"
     b"\r\n", 400),
    ("chunked twice", POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0"
     b"\r\n\r\n", 400),
    ("chunked, chunked", POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501),
    ("identity", POST + b"Transfer-Encoding: identity\r\nX: y\r\n\r\n", 501),
    ("chunked after a vertical tab", POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
     400),
    ("blank before Transfer-Encoding's colon",
     POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    ("length not in our digits", POST + "Content-Length: \u0663\r\n\r\nabc".encode(), 400),
    ("length of many digits", POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nabc", 400),
    ("huge length", POST + b"Content-Length: 999999999999999999\r\n\r\nabc", 413),
    ("chunk size of many digits", POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 20
     + b"3\r\nabc\r\n0\r\n\r\n", 400),
    ("line feed after a chunk size", POST + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n"
     b"\r\n", 400),
    ("empty chunk size", POST + b"Transfer-Encoding: chunked\r\n\r\n\r\n0\r\n\r\n", 400),
    ("gzip", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    ("chunk size not a number", POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n0\r\n\r\n", 400),
    ("negative chunk", POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n0\r\n\r\n", 400),
    ("chunk size 0x3", POST + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", 400),
    ("chunk longer than told", POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
     400),
    ("line feed in a chunk's extension", POST + b"Transfer-Encoding: chunked\r\n\r\n0;\n\r\n\r\n",
     400),
    ("line feed in a trailer", POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\na: b\n\r\n\r\n",
     400),
    ("endless chunk line", POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 2000, 400),
    ("endless trailer", POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 30, 431),
]


@pytest.mark.parametrize("name, sent, status", BAD_HEADS + BAD_BODIES,
                         ids=[case[0] for case in BAD_HEADS + BAD_BODIES])
def test_what_is_no_request_is_refused_once_and_closed(name: str, sent: bytes, status: int,
                                                       shared: Server) -> None:
    # The good request behind it must not be answered: nobody knows where it begins.
    with connect(shared) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent + GOOD)
        answer = until_closed(sock)
    head, _, body = answer.partition(b"\r\n\r\n")
    tried("requests that are none", let_in=b"200" in head[:12])
    assert statuses(answer) == [status]
    assert b"Connection: close" in head
    assert set(json.loads(body)) == {"error", "detail"}


@pytest.mark.parametrize("sent, expected", [
    (b"/?a=1&b=%C3%BC&c", {"a": "1", "b": "\u00fc", "c": ""}),
    (b"http://farm:80/?a=1", {"a": "1"}),
    (b"/", {}),
])
def test_a_query(sent: bytes, expected: Dict[str, str], shared: Server) -> None:
    answer = exchange(shared, b"GET " + sent + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert body == {"query": expected, "remote": "127.0.0.1"}


@pytest.mark.parametrize("path", [b"/jobs/a%20b%C3%BC", b"/jobs/a%20b\xc3\xbc"])
def test_a_path_is_decoded(path: bytes, shared: Server) -> None:
    answer = exchange(shared, b"GET " + path + b" HTTP/1.0\r\n\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"name": "a b\u00fc"}


def test_one_connection_takes_many_requests(shared: Server) -> None:
    connection = client(shared)
    connection.connect()
    sock = connection.sock
    for n in range(5):
        connection.request("POST", "/echo", body=b"x" * n)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"x" * n)
        assert connection.sock is sock
    connection.close()


def test_requests_that_come_together_are_answered_in_order(shared: Server) -> None:
    first = POST + b"Content-Length: 3\r\n\r\none\r\n"  # and a line end too much, as some send
    answers = exchange(shared, first + b"GET /jobs/7 HTTP/1.1\r\n" + HOST + b"\r\n" + GOOD)
    assert statuses(answers) == [200, 200, 200]
    assert answers.index(b"one") < answers.index(b'{"n":7}') < answers.index(b'"query"')


def test_chunks_in_any_pieces_make_a_body(shared: Server) -> None:
    head = POST + b"Connection: close\r\nTransfer-Encoding: Chunked\r\n\r\n"
    body = b"4;ext=1\r\nWiki\r\n0B\r\npedia in \r\n\r\n0\r\nTrailer: x\r\n\r\n"
    whole = head + body
    for step in (1, 7, len(whole)):
        pieces = [whole[i : i + step] for i in range(0, len(whole), step)]
        assert exchange(shared, *pieces).endswith(b"\r\n\r\nWikipedia in \r\n")


def test_http_1_0_is_answered_and_closed(shared: Server) -> None:
    answer = exchange(shared, b"POST /echo HTTP/1.0\r\ncontent-length: 2\r\n\r\nhi")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nhi")
    assert exchange(shared, b"GET /stream/3 HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n0 1 2 ")


def test_head_sends_the_head_only(shared: Server) -> None:
    connection = client(shared)
    for path in ("/", "/stream/3", "/nothing"):
        connection.request("HEAD", path)
        assert connection.getresponse().read() == b""
    connection.request("GET", "/jobs/7")
    assert connection.getresponse().read() == b'{"n":7}'
    connection.close()


def test_a_client_that_waits_with_its_body_is_told_to_go_on(shared: Server) -> None:
    with connect(shared) as sock:
        sock.sendall(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hi" + GOOD)
        assert statuses(until_closed(sock)) == [200, 200]


@pytest.mark.parametrize("path, length, status", [
    ("/echo", 200_001, 413), ("/nothing", 9, 404), ("/unread", 9, 200),
])
def test_a_client_that_waits_is_refused_at_once(path: str, length: int, status: int,
                                                shared: Server) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    assert statuses(exchange(shared, head.encode() + b"Expect: 100-continue\r\n\r\n")) == [status]


@pytest.mark.parametrize("head", [
    b"Content-Length: 30000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1c9c380\r\n",
], ids=["length", "chunks"])
def test_a_client_that_sends_too_much_still_reads_why(head: bytes) -> None:
    with serving(Pages()) as server, connect(server) as sock:
        sock.sendall(POST + head)
        sock.sendall(b"x" * 30_000_000)
        assert statuses(until_closed(sock)) == [413]


class Endless(socket.socket):
    """A client that sends faster than anybody can read."""

    reads = 0
    data = b"GET /\n\n"

    def recv(self, *args: Any) -> bytes:
        self.reads += 1
        assert self.reads < 100, "nobody else has had a turn"
        return self.data


def test_a_client_that_sends_without_end_lets_others_have_their_turn() -> None:
    with serving(Pages()) as server, Endless() as sock, \
            contextlib.closing(povfarm._Connection(sock, ("127.0.0.1", 1), server)) as connection:
        sock.connect(("127.0.0.1", server.port))
        sock.data = b"\r\n" * 30_000  # these are between requests
        for turn in range(1, 5):
            assert not connection.fill() and sock.reads == turn
        sock.data = b"GET /\n\n"  # this is refused, and what follows is thrown away
        for turn in range(5, 9):
            assert not connection.fill() and sock.reads == turn


@pytest.mark.slow
def test_empty_lines_without_end_hold_up_nobody() -> None:
    with serving(Pages(), head_seconds=0.3) as server, connect(server) as sock:
        flood = threading.Thread(target=send_until_closed, args=(sock, b"\r\n" * 1_000_000))
        flood.start()
        while flood.is_alive():  # it is let go in time, however much it sends
            assert statuses(exchange(server, GOOD)) == [200]


def send_until_closed(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(data)


def test_a_small_body_that_nobody_read_costs_no_connection(shared: Server) -> None:
    unread = UNREAD + b"Content-Length: 5\r\n\r\nGET /"
    refused = b"POST /nothing HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    answers = exchange(shared, unread + refused + b"5\r\nGET /\r\n0\r\n\r\n" + GOOD)
    assert statuses(answers) == [200, 404, 200]


def test_a_body_that_ends_early_is_refused(shared: Server) -> None:
    with connect(shared) as sock:
        sock.sendall(POST + b"Content-Length: 10\r\n\r\nhalf")
        sock.shutdown(socket.SHUT_WR)
        assert statuses(until_closed(sock)) == [400]


@pytest.mark.parametrize("limits, sent, expected", [
    ({"idle_seconds": 0.05}, b"", []),
    ({"head_seconds": 0.05}, b"GET / HTTP", [408]),
    ({"body_seconds": 0.05}, POST + b"Content-Length: 10\r\n\r\nhalf", [408]),
    ({"body_seconds": 0.05}, POST + b"Transfer-Encoding: chunked\r\n\r\n5", [408]),
    ({"body_seconds": 0.05}, UNREAD + b"Content-Length: 9\r\n\r\n", [200]),
    ({"idle_seconds": 0.05}, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
], ids=["nothing", "head", "body", "chunks", "unread body", "next request"])
def test_a_client_that_does_not_go_on_is_let_go(limits: Dict[str, float], sent: bytes,
                                                expected: List[int]) -> None:
    with serving(Pages(), linger_seconds=0.01, **limits) as server:
        assert statuses(exchange(server, sent)) == expected


def test_a_body_has_a_deadline_and_not_only_its_pauses() -> None:
    # All of it is there, so no wait is ever too long; but the time is up already.
    with serving(Pages(), body_seconds=-1, body_rate=1e9) as server:
        sent = POST + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000
        assert statuses(exchange(server, sent)) == [408]


def test_a_body_that_comes_steadily_gets_more_time() -> None:
    with serving(Pages(), body_seconds=-1, body_rate=0.001) as server:
        sent = POST + b"Connection: close\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000
        assert statuses(exchange(server, sent)) == [200]


@pytest.mark.parametrize("asked, start, end", [
    (None, 0, 300_000), ("bytes=1000-250999", 1000, 251_000),
])
def test_a_large_file_arrives(asked: Optional[str], start: int, end: int, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "a.png").write_bytes(data)
    with serving(Pages(tmp_path)) as server:
        connection = client(server)
        for _ in range(2):
            connection.request("GET", "/file/a.png", headers={"Range": asked} if asked else {})
            response = connection.getresponse()
            assert int(response.getheader("Content-Length") or 0) == end - start
            assert response.read() == data[start:end]
        connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts them")
@pytest.mark.parametrize("path", ["/jobs/7", "/nothing", "/wrong"])
def test_every_answer_is_nothing_that_a_browser_runs(path: str, shared: Server) -> None:
    answer = exchange(shared, f"GET {path} HTTP/1.1\r\nHost: farm\r\nConnection: close\r\n\r\n".encode())
    head = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert {"X-Content-Type-Options: nosniff", "Cross-Origin-Resource-Policy: same-origin",
            "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'"} <= set(head)


def test_a_small_response_is_one_packet(shared: Server) -> None:
    with connect(shared) as sock:
        sock.sendall(GOOD.replace(b"Connection: close\r\n", b""))
        assert sock.recv(1000)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 200)
    assert struct.unpack_from("I", info, 152) == (1,)  # tcpi_data_segs_in


def test_a_stream_comes_in_chunks(shared: Server) -> None:
    connection = client(shared)
    for _ in range(2):
        connection.request("GET", "/stream/4")
        response = connection.getresponse()
        assert response.getheader("Transfer-Encoding") == "chunked"
        assert response.read() == b"0 1 2 3 "
    connection.close()


def test_a_stream_that_fails_at_once_is_an_error(shared: Server) -> None:
    connection = client(shared)
    connection.request("GET", "/stream/0")
    assert connection.getresponse().status == 500
    connection.close()


def test_a_stream_that_breaks_off_is_seen_as_broken(shared: Server,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    connection = client(shared)
    connection.request("GET", "/stream/20")
    with pytest.raises(http.client.IncompleteRead):
        connection.getresponse().read()
    connection.close()
    assert "the secret of the house" in caplog.text


def test_events_end_when_the_client_goes() -> None:
    pages = Pages()
    with serving(pages) as server:
        connection = client(server)
        connection.request("GET", "/events")
        response = connection.getresponse()
        assert response.readline() == b"data: hello\n"
        assert not pages.ended.is_set()
        response.close()
        connection.close()
        assert pages.ended.wait(60)


@pytest.mark.parametrize("path", ["/events", "/poll"])
def test_what_waits_ends_when_the_server_stops(path: str) -> None:
    pages = Pages()
    with serving(pages, stop_seconds=600) as server, connect(server) as idle, \
            connect(server) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        if path == "/events":
            assert sock.recv(1000)
        else:
            assert pages.entered.wait(60)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 60  # it did not wait for them as long as it may
        assert pages.ended.wait(60)
        assert idle.recv(1) == b""
        until_closed(sock)
        assert not server.connections


def test_any_thread_may_ask_whether_a_client_is_there() -> None:
    """While another one sends: what is sent is whole."""
    size = 50_000_000

    class Large:
        @route("GET", "/large", role="anyone")
        def large(self, request: Request) -> Response:
            self.request = request
            return povfarm.stream_response(itertools.repeat(bytes(100_000), size // 100_000), "x/y")

    pages = Large()
    with serving(pages) as server, connect(server) as sock:  # type: ignore[arg-type]
        sock.sendall(b"GET /large HTTP/1.0\r\n" + HOST + b"\r\n")
        got = len(sock.recv(1000))
        while data := sock.recv(200_000):
            assert got > size // 2 or pages.request.alive()
            got += len(data)
        assert got > size
        assert not pages.request.alive()


def test_a_handler_sees_that_its_client_has_gone() -> None:
    pages = Pages()
    with serving(pages) as server:
        with connect(server) as sock:
            sock.sendall(b"GET /poll HTTP/1.1\r\n" + HOST + b"\r\n")
            assert pages.entered.wait(60)
            assert not pages.ended.is_set()
        assert pages.ended.wait(60)


def test_a_port_in_use_is_said_in_one_line(shared: Server) -> None:
    router = Router(authenticate=stranger)
    with pytest.raises(povfarm.UserError, match=rf"port {shared.port} is in use.*--port"):
        Server(router, "127.0.0.1", shared.port)
    with pytest.raises(povfarm.UserError, match=r"cannot listen on 192\.0\.2\.1"):
        Server(router, "192.0.2.1", 0)
    with pytest.raises(povfarm.UserError, match=r"cannot listen on no\.\.host port 0: (?!Unknown)"):
        Server(router, "no..host", 0)


def test_a_port_can_be_had_again_at_once() -> None:
    with serving(Pages()) as server:
        assert statuses(exchange(server, GOOD)) == [200]
        port = server.port
    again = Server(Router(authenticate=stranger), "127.0.0.1", port)
    again.stop()


def test_localhost_is_the_servers_whichever_address_it_means(
        caplog: pytest.LogCaptureFixture) -> None:
    try:
        other = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    for host in ("127.0.0.1", "0.0.0.0"):
        with serving(Pages(), host=host) as server:
            for address in ("127.0.0.1", "::1"):
                with socket.create_connection((address, server.port), 10) as sock:
                    sock.sendall(GOOD)
                    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        with pytest.raises(OSError):
            socket.create_connection(("::1", server.port), 10)
    assert caplog.messages == []
    with other:  # who has it already keeps it, which is told
        server = Server(Router(authenticate=stranger), "127.0.0.1", other.getsockname()[1])
        server.stop()
    assert [f"port {server.port} of [::1] is another program's" in text
            for text in caplog.messages] == [True]


def test_ipv6_is_served_and_ipv4_clients_of_it_keep_their_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(Pages(), host="::") as server:
        assert b'"remote":"127.0.0.1"' in exchange(server, GOOD)
        with socket.create_connection(("::1", server.port), 60) as sock:
            sock.sendall(GOOD)
            assert b'"remote":"::1"' in until_closed(sock)


def test_the_connection_that_is_idle_for_longest_makes_room() -> None:
    keep = GOOD.replace(b"Connection: close\r\n", b"")
    with serving(Pages(), connections=2) as server, connect(server) as first, \
            connect(server) as second:
        for sock in (first, second, first):  # the first has asked last
            sock.sendall(keep)
            assert statuses(sock.recv(1000)) == [200]
            wait_until(lambda: len(server._held) == 2, "an answered connection is not idle")
        with connect(server) as third:
            third.sendall(keep)
            assert statuses(third.recv(1000)) == [200]
            assert second.recv(1) == b""
            first.sendall(GOOD)
            assert statuses(until_closed(first)) == [200]


def test_a_request_under_way_makes_no_room() -> None:
    pages = Pages()
    with serving(pages, connections=1) as server, connect(server) as first:
        first.sendall(b"GET /poll HTTP/1.1\r\n" + HOST + b"\r\n")
        assert pages.entered.wait(60)
        with connect(server) as second, contextlib.suppress(ConnectionError):
            assert second.recv(1) == b""
        assert server.connections


def test_strangers_leave_threads_for_those_who_were_let_in() -> None:
    doors = Slow()
    server = Server(Router(doors, authenticate=known), "127.0.0.1", 0,
                    limits=Limits(strangers=3, strangers_each=2))
    server.start()
    try:
        with contextlib.ExitStack() as stack:
            def ask(path: str, who: str, source: str = "127.0.0.1") -> socket.socket:
                sock = stack.enter_context(socket.create_connection(
                    ("127.0.0.1", server.port), 10, (source, 0)))
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {who}\r\n"
                             "\r\n".encode())
                return sock

            for number in range(2):
                ask("/wait", ("reader", "pending")[number])
                assert doors.entered.acquire(timeout=60)
            assert statuses(ask("/wait", "reader").recv(1000)) == [503]
            assert statuses(ask("/nothing", "reader").recv(1000)) == [404], "it costs nothing"
            for _ in range(5):  # those who were let in are not counted
                ask("/wait", "worker")
                assert doors.entered.acquire(timeout=60)
            if sys.platform == "linux":  # elsewhere 127.0.0.2 is no address
                ask("/wait", "reader", "127.0.0.2")
                assert doors.entered.acquire(timeout=60)
                assert statuses(ask("/wait", "reader", "127.0.0.3").recv(1000)) == [503]
            doors.over.set()
        with server.changed:
            assert server.changed.wait_for(lambda: not server.connections, 60)
        assert not server.strangers
    finally:
        server.stop()


def test_many_who_end_at_once_wait_for_nobody_to_be_woken() -> None:
    """The pipe by which threads wake the one that holds connections takes some 300 bytes."""
    with serving(Pages()) as server:
        server.stopping.set()
        server._wake()
        server._thread.join(60)
        done = threading.Event()

        def wake() -> None:
            for _ in range(100_000):
                server._wake()
            done.set()

        threading.Thread(target=wake, daemon=True).start()
        woken = done.wait(60)
        server._waker.close()  # or to stop would wait with it
        assert woken


def test_who_was_let_in_leaves_threads_for_others() -> None:
    """One person, all people, one worker: none of them keeps out the admin or another worker."""
    doors = Slow()
    people = {name: Identity(frozenset({"reader", "person"}), name=name) for name in ("ann", "ben", "cem")}
    workers = {f"w{number}": Identity(frozenset({"worker"}), number, "w") for number in (1, 2)}
    guest = Identity(frozenset({"guest"}), name="guest")
    those = {**people, **workers, "guest": guest,
             "admin": Identity(frozenset({"reader", "person", "admin"}), name="admin")}
    server = Server(Router(doors, authenticate=lambda request: those[request.headers["authorization"]]),
                    "127.0.0.1", 0, limits=Limits(known_each=2, people=3, workers=5))
    server.start()
    try:
        with contextlib.ExitStack() as stack:
            def ask(who: str) -> socket.socket:
                sock = stack.enter_context(connect(server))
                sock.sendall(f"GET /wait HTTP/1.1\r\nHost: x\r\nAuthorization: {who}\r\n\r\n".encode())
                return sock

            for who, refused in (("ann", False), ("ann", False), ("ann", True), ("ben", False),
                                 ("cem", True), ("w1", False), ("w1", False), ("w1", True),
                                 ("w2", False), ("guest", False), ("guest", False), ("guest", True), ("w2", True),
                                 *[("admin", False)] * 5):
                sock = ask(who)
                assert statuses(sock.recv(1000)) == [503] if refused else doors.entered.acquire(timeout=60)
            doors.over.set()
        with server.changed:
            assert server.changed.wait_for(lambda: not server.connections, 60)
        assert not server.people and not server.workers
    finally:
        server.stop()


class Slow:
    """Routes that keep whoever comes until they are told to let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.over = threading.Event()

    @route("GET", "/wait", role="anyone")
    def wait(self, request: Request) -> Response:
        self.entered.release()
        self.over.wait(60)
        return Response(204)

    @route("GET", "/stream", role="anyone", waits=True)
    def stream(self, request: Request) -> Response:
        return self.wait(request)


def test_more_requests_than_threads_take_their_turn() -> None:
    doors = Slow()
    server = Server(Router(doors, authenticate=known), "127.0.0.1", 0, limits=Limits(threads=2))
    server.start()
    try:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connect(server)) for _ in range(6)]
            for sock in socks:
                sock.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
            assert all(doors.entered.acquire(timeout=60) for _ in range(2))
            assert not doors.entered.acquire(timeout=0.05)
            doors.over.set()
            assert [statuses(sock.recv(1000)) for sock in socks] == [[204]] * 6
    finally:
        server.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    need("openssl", shutil.which("openssl") is not None, "apt-get install openssl")
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=farm",
         "-days", "2", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory, check=True, capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context


def test_tls_serves_files_and_sees_who_has_gone(certificate: ssl.SSLContext,
                                                tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "a.png").write_bytes(data)
    pages, trusting = Pages(tmp_path), ssl._create_unverified_context()
    with serving(pages, certificate, linger_seconds=0.01, head_seconds=10) as server:
        with connect(server) as plain:
            plain.sendall(GOOD)
            answer = plain.recv(1000)
            assert statuses(answer) == [400] and b"https://" in answer
            plain.sendall(b"and more of it")
            assert plain.recv(1) == b""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", server.port, timeout=60, context=trusting)
        for _ in range(2):
            connection.request("GET", "/file/a.png")
            assert connection.getresponse().read() == data
        connection.request("POST", "/echo", body=b"x" * 300_000)
        assert connection.getresponse().status == 413
        connection.close()
        connection.request("GET", "/poll")
        assert pages.entered.wait(60)
        assert not pages.ended.is_set()
        connection.sock.settimeout(0.01)
        with contextlib.suppress(OSError):
            connection.sock.unwrap()  # says goodbye, and does not close yet
        assert pages.ended.wait(60)
        connection.close()


def test_a_slow_handshake_holds_up_nobody(certificate: ssl.SSLContext) -> None:
    trusting = ssl._create_unverified_context()
    with serving(Pages(), certificate, head_seconds=0.5, linger_seconds=0.01) as server, \
            connect(server) as silent, connect(server) as noisy, connect(server) as half:
        noisy.sendall(os.urandom(300))
        half.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # a record's beginning
        connection = http.client.HTTPSConnection(
            "127.0.0.1", server.port, timeout=60, context=trusting)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        for sock in (noisy, silent, half):  # they are let go in time
            with contextlib.suppress(ConnectionError):
                until_closed(sock)


def test_requests_that_come_together_in_tls_are_all_answered(certificate: ssl.SSLContext) -> None:
    with serving(Pages(), certificate) as server:
        context = ssl._create_unverified_context()
        with context.wrap_socket(connect(server)) as sock:
            first = POST + b"Content-Length: 3\r\n\r\none"
            sock.sendall(first * 3 + GOOD)
            assert statuses(until_closed(sock)) == [200] * 4


def test_a_large_answer_takes_as_long_as_it_takes_while_it_moves() -> None:
    """Over a wireless network, a page of thousands of frames may take minutes."""
    data = os.urandom(300_000)
    connection: Any = object.__new__(povfarm._Connection)
    connection.connection, connection.command, connection.close_connection = SlowLink(), "GET", False
    connection._stage = povfarm._ENTERED
    connection._send(Response(200, {}, data))
    link = connection.connection
    assert link.arrived.endswith(b"\r\n\r\n" + data)


def test_a_stranger_who_takes_an_answer_too_slowly_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    for body in (path.read_bytes(), povfarm.FileSlice(path.open("rb"), 0, 300_000)):
        connection: Any = object.__new__(povfarm._Connection)
        connection.connection, connection.command, connection.close_connection = (
            SlowLink(), "GET", False)
        connection._stage = povfarm._COUNTED
        connection._limits = Limits(answer_seconds=-1.0, answer_rate=1e9)
        with pytest.raises(OSError, match="too slowly"):
            connection._send(Response(200, {}, body))
        connection._limits = Limits()
        if isinstance(body, bytes):
            connection._send(Response(200, {}, body))
            assert connection.connection.arrived.endswith(body)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address")
def test_what_waits_takes_no_place_of_what_does_not() -> None:
    doors = Slow()
    server = Server(Router(doors, authenticate=known), "127.0.0.1", 0,
                    limits=Limits(strangers=2, strangers_network=2, strangers_each=1))
    server.start()
    try:
        with contextlib.ExitStack() as stack:
            def ask(path: str, source: str) -> socket.socket:
                sock = stack.enter_context(socket.create_connection(
                    ("127.0.0.1", server.port), 10, (source, 0)))
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: reader\r\n"
                             "\r\n".encode())
                return sock

            for path in ("/stream", "/wait"):
                for number in (1, 2):
                    ask(path, f"127.0.0.{number}")
                    assert doors.entered.acquire(timeout=60)
                assert statuses(ask(path, "127.0.0.3").recv(1000)) == [503]
            doors.over.set()
        with server.changed:
            assert server.changed.wait_for(lambda: not server.connections, 60)
        assert not server.strangers and not server.waiting
    finally:
        server.stop()
