"""The client against real servers that refuse, vanish and come back, and on a fake clock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import pytest

import povfarm
from helpers.base import need
from helpers.clocks import Frozen, Pauses
from helpers.sockets import SlowLink
from povfarm import (
    Answer,
    Call,
    Client,
    Identity,
    Limits,
    Request,
    RequestRefused,
    Response,
    Router,
    Server,
    ServerGone,
    Transport,
    route,
)

DATA = os.urandom(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


class Farm:
    """A coordinator that knows nothing but to echo."""

    def __init__(self) -> None:
        self.entered = threading.Event()

    @route("POST", "/echo", role="anyone")
    @route("GET", "/echo", role="anyone")
    @route("GET", "/prefix/echo", role="anyone")
    def echo(self, request: Request) -> Response:
        value = request.json() if request.body.length else None
        return povfarm.json_response({"json": value, "headers": dict(request.headers)})

    @route("PUT", "/blob", role="anyone")
    def blob(self, request: Request) -> Response:
        return povfarm.text_response(hashlib.sha256(request.body.read()).hexdigest())

    @route("PUT", "/told", role="anyone")
    def told(self, request: Request) -> Response:
        return povfarm.text_response(request.headers["x-sha256"])

    @route("PUT", "/small", role="anyone", max_body=10)
    def small(self, request: Request) -> Response:
        return povfarm.text_response(request.body.read().decode())

    @route("GET", "/data", role="anyone")
    def data(self, request: Request) -> Response:
        return Response(200, {}, DATA)

    @route("POST", povfarm.HELLO, role="anyone")
    def hello(self, request: Request) -> Response:
        told = request.json()
        session = povfarm.Session("abc", told["nonce"], povfarm.secret_hash("secret"), "f1", "")
        return povfarm.json_response({"session": "abc", "farm_id": "f1", "proof": session.proof})

    @route("GET", "/stream", role="anyone")
    def stream(self, request: Request) -> Response:
        return povfarm.stream_response(iter([DATA[:1000], DATA[1000:]]), "image/png")

    @route("GET", "/refuse", role="anyone")
    def refuse(self, request: Request) -> Response:
        raise povfarm.ProtocolError(409, "the job is done", {"job": 7})

    @route("GET", "/away", role="anyone")
    def away(self, request: Request) -> Response:
        return povfarm.redirect("/echo")

    @route("GET", "/poll", role="anyone")
    def poll(self, request: Request) -> Response:
        self.entered.set()
        while request.alive():
            threading.Event().wait(0.005)
        return Response(204)


def start(farm: Farm, port: int = 0, tls: Optional[ssl.SSLContext] = None, host: str = "127.0.0.1",
          **limits: float) -> Server:
    router = Router(farm, authenticate=lambda request: Identity())
    server = Server(router, host, port, tls, Limits(**limits))  # type: ignore[arg-type]
    server.start()
    return server


@pytest.fixture
def server() -> Iterator[Server]:
    one = start(Farm())
    yield one
    one.stop()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def client(server: Server, **options: Any) -> Client:
    return Client(url(server), retry_for=0, **options)


class Scripted(Transport):
    """Answers with statuses, or as if the network had failed, one after the other."""

    def __init__(self, *script: Union[int, Tuple[int, Dict[str, str]], Exception]) -> None:
        super().__init__("http://farm:2271")
        self.clock = Frozen()
        self.script = list(script)
        self.calls: List[Call] = []
        self.times: List[float] = []

    @property
    def gaps(self) -> List[float]:
        """The seconds between one try and the next."""
        return [later - time for time, later in zip(self.times, self.times[1:])]

    def exchange(self, call: Call) -> Answer:
        self.calls.append(call)
        self.times.append(self.clock.now)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, Exception):
            raise step
        status, headers = step if isinstance(step, tuple) else (step, {})
        blocks = [json.dumps({"error": f"status {status}"}).encode()]
        return Answer(status, headers, lambda size: blocks.pop() if blocks else b"", lambda: None)


def scripted(*script: Any) -> Tuple[Client, Scripted, Pauses]:
    transport = Scripted(*script)
    return (Client("http://farm:2271", clock=transport.clock, transport=transport), transport,
            Pauses(transport.clock))


def test_json_goes_there_and_back(server: Server) -> None:
    one = client(server)
    one.token = "secret"
    reply = one.request("POST", "/echo", json={"a": [1, "\u00fc"]}, headers={"X-A": "b"})
    assert reply.status == 200
    assert reply.json()["json"] == {"a": [1, "\u00fc"]}
    headers = reply.json()["headers"]
    assert headers["authorization"].startswith("Povfarm session=abc,count=1,mac=")
    assert "secret" not in str(headers)
    assert headers["x-a"] == "b"
    assert headers["host"] == f"127.0.0.1:{server.port}"
    assert reply.headers["content-type"] == "application/json"
    assert "authorization" not in client(server).request("GET", "/echo").json()["headers"]


def test_what_is_not_json_is_said_to_be_no_answer(server: Server) -> None:
    with pytest.raises(povfarm.FarmError, match="wrong address"):
        client(server).request("PUT", "/blob").json()


def test_the_prefix_of_the_address_is_kept(server: Server) -> None:
    one = Client(url(server) + "/prefix/", retry_for=0)
    assert one.request("GET", "/echo").status == 200


def test_one_connection_serves_many_requests() -> None:
    server = Server(Router(Farm(), authenticate=lambda request: Identity()), "127.0.0.1", 0)
    server.start()
    one = client(server)
    one.request("GET", "/echo")
    first = set(server.connections)
    for path in ("/echo", "/data", "/stream", "/refuse", "/away", "/nothing") * 2:
        with contextlib.suppress(RequestRefused):
            one.request("GET", path)
    assert server.connections == first and len(first) == 1
    one.transport.close()
    with server.changed:
        assert server.changed.wait_for(lambda: not server.connections, 60)
    server.stop()


def test_proxies_are_ignored(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert client(server).request("GET", "/echo").status == 200


def test_ipv6_addresses_are_taken() -> None:
    try:
        one = start(Farm(), host="::1")
    except povfarm.UserError:
        pytest.skip("this machine has no IPv6")
    reply = Client(f"http://[::1]:{one.port}", retry_for=0).request("GET", "/echo")
    one.stop()
    assert reply.json()["headers"]["host"] == f"[::1]:{one.port}"


@pytest.mark.parametrize("address", [
    "", "farm", "farm:2271", "ftp://farm", "http://", "http://farm:port", "http://farm:99999",
    "http://farm:0", "http://[::1", "http://farm/?a=b", "http://farm/#a",
])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(povfarm.UserError, match="http://NAME:2271"):
        Client(address)


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: y"])
def test_what_cannot_be_sent_is_refused(path: str, server: Server) -> None:
    with pytest.raises(povfarm.UserError, match="cannot be sent"):
        client(server).request("GET", path)


def test_a_refusal_carries_the_words_of_the_coordinator(server: Server) -> None:
    with pytest.raises(RequestRefused, match=r"^the job is done$") as caught:
        client(server).request("GET", "/refuse")
    assert (caught.value.status, caught.value.detail) == (409, {"job": 7})


@pytest.mark.parametrize("path, status", [("/nothing", 404), ("/away", 303)])
def test_other_statuses_are_refusals_too(path: str, status: int, server: Server) -> None:
    with pytest.raises(RequestRefused) as caught:
        client(server).request("GET", path)
    assert caught.value.status == status


# Trying again


def test_pauses_double_up_to_half_a_minute_and_vary() -> None:
    one, transport, pauses = scripted(ServerGone("no"))
    with pytest.raises(ServerGone):
        one.request("GET", "/x", retry_for=300, stop=pauses)
    waits = transport.gaps
    for wait, longest in zip(waits, (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30)):
        assert longest / 2 <= wait <= longest
    assert len({wait / 2**n for n, wait in enumerate(waits[:8])}) > 1
    assert 270 < sum(waits) <= 300


def test_who_waits_for_an_answer_is_told_now_and_then_what_for() -> None:
    gone = ServerGone("no answer")
    one, transport, pauses = scripted(*[gone] * 40, 200)
    told: List[Tuple[float, str]] = []
    one.keep_trying(lambda text: told.append((transport.clock.now, text)), pauses)
    start = transport.clock.now
    assert one.request("GET", "/x").status == 200
    assert max(transport.gaps) <= 5.001
    assert 3 <= told[0][0] - start < 8 and "no answer (trying again" in told[0][1]
    between = [later - time for (time, _), (later, _) in zip(told, told[1:-1])]
    assert between and all(60 <= pause < 65 for pause in between)
    assert told[-1][1] == "http://farm:2271 answers again"


def test_news_of_a_coordinator_ends_a_pause_and_the_next_are_short_again() -> None:
    one, transport, pauses = scripted(*[ServerGone("no")] * 12, 200)
    pauses.then = lambda count: one.hurry() if len(transport.calls) == 9 else None
    assert one.request("GET", "/x", retry_for=float("inf"), stop=pauses).status == 200
    assert transport.gaps[7] > 6
    assert transport.gaps[8] <= 1.5  # instead of half a minute; a flood of news does not count
    assert transport.gaps[9] <= 0.1


def test_a_flood_of_news_is_no_flood_of_requests() -> None:
    one, transport, pauses = scripted(ServerGone("no"))
    pauses.then = lambda count: one.hurry()
    with pytest.raises(ServerGone):
        one.request("GET", "/x", retry_for=300, stop=pauses)
    assert len(transport.calls) < 5 * 300


@pytest.mark.parametrize("script, tries, outcome", [
    ([ServerGone("no"), 503, 502, 504, 200], 5, 200),
    ([400], 1, 400), ([401], 1, 401), ([404], 1, 404), ([409], 1, 409), ([410], 1, 410),
    ([500], 1, 500), ([ServerGone("no"), 404], 2, 404), ([304], 1, 304),
    ([povfarm.UserError("bad certificate")], 1, None),
], ids=str)
def test_only_what_may_pass_is_tried_again(script: List[Any], tries: int,
                                           outcome: Optional[int]) -> None:
    one, transport, pauses = scripted(*script)
    try:
        status: Optional[int] = one.request("GET", "/x", stop=pauses).status
    except RequestRefused as error:
        status = error.status
    except povfarm.UserError:
        status = None
    assert (len(transport.calls), status) == (tries, outcome)


def test_later_is_as_late_as_the_server_says() -> None:
    one, transport, pauses = scripted((503, {"retry-after": "7"}), (503, {"retry-after": "900"}),
                              (503, {"retry-after": "Fri, 31 Dec 1999"}), 200)
    one.request("GET", "/x", stop=pauses)
    assert transport.gaps[:2] == [7, 30]
    assert transport.gaps[2] <= 0.4


def test_a_server_that_stays_busy_is_a_refusal_in_the_end() -> None:
    one, transport, pauses = scripted(503)
    with pytest.raises(RequestRefused, match="status 503"):
        one.request("GET", "/x", retry_for=10, stop=pauses)
    assert len(transport.calls) > 3
    one, transport, pauses = scripted(503)
    with pytest.raises(RequestRefused):
        one.request("GET", "/x", retry_for=0, stop=pauses)
    assert (len(transport.calls), pauses.waits) == (1, [])


def test_a_stop_ends_the_tries() -> None:
    one, transport, pauses = scripted(ServerGone("no"))
    pauses.then = lambda count: count == 3 and pauses.set()
    with pytest.raises(ServerGone, match="stopped"):
        one.request("GET", "/x", retry_for=float("inf"), stop=pauses)
    assert len(transport.calls) == 3
    with pytest.raises(ServerGone, match="stopped"):
        one.request("GET", "/x", stop=pauses)
    assert len(transport.calls) == 3


def test_a_stop_ends_a_long_poll() -> None:
    farm, stop, caught = Farm(), threading.Event(), []
    server = start(farm)

    def poll() -> None:
        with pytest.raises(ServerGone, match="stopped") as error:
            client(server).request("GET", "/poll", timeout=600, stop=stop)
        caught.append(error)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    assert farm.entered.wait(60)
    stop.set()
    thread.join(60)
    server.stop()
    assert caught


def test_silence_is_an_end_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        one = Client(f"http://127.0.0.1:{deaf.getsockname()[1]}", retry_for=0)
        with pytest.raises(ServerGone, match=r"does not answer.*serve"):
            one.request("GET", "/x", timeout=0.05)


def test_a_server_that_dies_and_comes_back_is_found_again() -> None:
    servers = [start(Farm())]
    port = servers[0].port

    def come_back(count: int) -> None:
        if count == 3:
            servers.append(start(Farm(), port))

    pauses = Pauses(Frozen(), come_back)
    one = Client(url(servers[0]), clock=pauses.clock)
    assert one.request("GET", "/data", stop=pauses).body == DATA
    servers[0].stop()
    assert one.request("GET", "/data", stop=pauses).body == DATA
    assert len(pauses.waits) == 3
    servers[1].stop()
    with pytest.raises(ServerGone, match=rf":{port} does not answer.*refused.*serve"):
        one.request("GET", "/data", stop=pauses)


def test_a_connection_that_was_closed_while_idle_costs_no_pause(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    server = start(Farm(), idle_seconds=0.02)
    one = client(server)
    for _ in range(2):
        assert one.request("POST", "/echo", json=1).json()["json"] == 1
        with server.changed:
            assert server.changed.wait_for(lambda: not server.connections, 60)
        assert one.request("PUT", "/blob", body=tmp_path / "file").body.decode() == SHA256
    server.stop()


@contextlib.contextmanager
def raw_server(*answers: bytes) -> Iterator[Tuple[str, List[bytes], List[int]]]:
    """Sends one answer to each connection, whatever it asks, and closes it.

    Gives its address, what it saw first, and how many packets had come by then.
    """
    seen: List[bytes] = []
    packets: List[int] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                seen.append(connection.recv(65536))
                if sys.platform == "linux":
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 200)
                    packets.extend(struct.unpack_from("I", info, 152))  # tcpi_data_segs_in
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen, packets
        thread.join(60)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("answer", [
    b"", b"HTT", b"hello\r\n\r\n", OK, OK + b"Content-Length: 9\r\n\r\nhalf",
    OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nhalf", OK + b"A: b\r\n" * 200 + b"\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
])
def test_half_an_answer_is_none(answer: bytes, tmp_path: Path) -> None:
    with raw_server(answer, answer) as (address, *_):
        one = Client(address, retry_for=0)
        with pytest.raises(ServerGone):
            one.request("GET", "/x")
        with pytest.raises(ServerGone):
            one.download("/x", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_small_request_is_one_packet() -> None:
    with raw_server(OK + b"Content-Length: 0\r\n\r\n") as (address, seen, packets):
        Client(address, retry_for=0).request("POST", "/x", json={"a": 1})
    assert seen[0].startswith(b"POST /x HTTP/1.1\r\n")
    assert seen[0].endswith(b'Content-Length: 7\r\n\r\n{"a":1}')
    assert packets in ([1], [])


@pytest.mark.parametrize("method, body, expected", [
    ("GET", b"", None), ("DELETE", b"", None), ("POST", b"", b"0"), ("DELETE", b"x", b"1"),
])
def test_a_length_is_sent_where_a_body_could_be(method: str, body: bytes,
                                                expected: Optional[bytes]) -> None:
    with raw_server(OK + b"Content-Length: 0\r\n\r\n") as (address, seen, _):
        Client(address, retry_for=0).request(method, "/x", body=body)
    length = seen[0].partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
    assert length == (expected or b"")


def test_an_error_page_of_something_else_is_a_refusal() -> None:
    page = b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\n<html>"
    with raw_server(page, page.replace(b"<html>", b'["no"]')) as (address, *_):
        for _ in range(2):
            with pytest.raises(RequestRefused, match="answered with status 404"):
                Client(address, retry_for=0).request("GET", "/x")


# Files


@pytest.mark.parametrize("path", ["/data", "/stream"])
def test_a_file_is_downloaded(path: str, server: Server, tmp_path: Path) -> None:
    to = tmp_path / "file"
    for sha256 in (None, SHA256):
        client(server).download(path, to, sha256)
        assert to.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [to]


@pytest.mark.parametrize("path, options, match", [
    ("/data", {"sha256": "0" * 64}, "other contents"),
    ("/data", {"limit": 299_999}, "file is larger than 300 kB"),
    ("/refuse", {}, "the job is done"),
])
def test_a_bad_download_changes_nothing(path: str, options: Dict[str, Any], match: str,
                                        server: Server, tmp_path: Path) -> None:
    to = tmp_path / "file"
    to.write_bytes(b"before")
    with pytest.raises(povfarm.FarmError, match=match):
        client(server).download(path, to, **options)
    assert to.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [to]


def test_a_download_that_breaks_off_is_begun_again(tmp_path: Path) -> None:
    head = OK + f"Content-Length: {len(DATA)}\r\n\r\n".encode()
    pauses = Pauses(Frozen())
    with raw_server(head + DATA[:100_000], head + DATA) as (address, *_):
        one = Client(address, clock=pauses.clock)
        one.download("/x", tmp_path / "file", SHA256, stop=pauses)
    assert (tmp_path / "file").read_bytes() == DATA
    assert len(pauses.waits) == 1


def test_trouble_with_local_files_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    pauses = Pauses(Frozen())
    one = Client(url(server), clock=pauses.clock)
    with pytest.raises(povfarm.FarmError, match=r"file cannot be written: No such file"):
        one.download("/data", tmp_path / "no" / "file", stop=pauses)
    with pytest.raises(povfarm.FarmError, match=r"file cannot be read: No such file"):
        one.request("PUT", "/blob", body=tmp_path / "file", stop=pauses)
    assert pauses.waits == []


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_a_file_is_uploaded(size: int, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:size])
    reply = client(server).request("PUT", "/blob", body=tmp_path / "file")
    assert reply.body.decode() == hashlib.sha256(DATA[:size]).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_a_body_of_several_parts_is_one(size: int, server: Server, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(DATA[:size])
    whole = b"text" + DATA[:size] + DATA[:size] + b"end"
    one = client(server, token="secret")
    for _ in range(2):
        reply = one.request("PUT", "/blob", body=(b"text", tmp_path / "one", b"", tmp_path / "two",
                                                  b"end"))
        assert reply.body.decode() == hashlib.sha256(whole).hexdigest()
        reply = one.request("PUT", "/told", body=(b"text", tmp_path / "one"))
        assert reply.body.decode() == hashlib.sha256(b"text" + DATA[:size]).hexdigest()


def test_a_large_picture_takes_as_long_as_it_takes_while_it_moves() -> None:
    """Else it would be sent again and again, and never arrive."""
    transport, link = Transport("http://127.0.0.1"), SlowLink()
    call = Call("PUT", "/blob", {}, (DATA,), 30.0, threading.Event())
    assert transport._send(link, call)  # type: ignore[arg-type]
    assert link.arrived.endswith(b"\r\n\r\n" + DATA) and link.timeout == 30


@pytest.mark.parametrize("linger", [2, 0], ids=["kind", "rude"])
def test_a_refusal_in_mid_upload_is_read(linger: float, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(30_000_000))
    server = start(Farm(), linger_seconds=linger)
    one = client(server)
    for _ in range(2):
        with pytest.raises(RequestRefused, match="larger than 10 B"):
            one.request("PUT", "/small", body=tmp_path / "file")
    assert one.request("PUT", "/small", body=b"1234567890").body == b"1234567890"
    server.stop()


def test_of_connections_that_are_dead_only_one_is_waited_for(server: Server) -> None:
    """A laptop that was closed has kept them all, and nobody is at their other ends."""
    transport = Transport(f"http://127.0.0.1:{server.port}")
    pairs = [socket.socketpair() for _ in range(3)]
    transport._idle += [ours for ours, _ in pairs]
    pauses = Pauses(Frozen())
    one = Client(transport._base_url, transport=transport, clock=pauses.clock)
    assert one.request("GET", "/echo", timeout=1, stop=pauses).status == 200
    assert len(pauses.waits) == 1 and [ours.fileno() for ours, _ in pairs] == [-1] * 3
    one.transport.close()
    for _, other in pairs:
        other.close()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("openssl", shutil.which("openssl") is not None, "apt-get install openssl")
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=farm",
         "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-keyout", "key.pem",
         "-out", "cert.pem"],
        cwd=directory, check=True, capture_output=True,
    )
    return directory


def test_tls_accepts_only_the_right_certificate(
        certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    der = ssl.PEM_cert_to_DER_cert((certificate / "cert.pem").read_text())
    fingerprint = hashlib.sha256(der).hexdigest().upper()
    server = start(Farm(), tls=context)
    try:
        address = f"https://127.0.0.1:{server.port}"
        pinned = ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2))
        for fingerprint in (pinned, ""):
            if not fingerprint:  # one that the system trusts
                monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
            one = Client(address, retry_for=0, fingerprint=fingerprint)
            assert one.request("GET", "/data").body == DATA
            assert one.request("GET", "/stream").body == DATA
            assert one.request("PUT", "/blob", body=certificate / "cert.pem").status == 200
            one.transport.close()
        monkeypatch.delenv("SSL_CERT_FILE")
        for fingerprint, match in (("0" * 64, "another certificate"), ("", "not trusted")):
            with pytest.raises(povfarm.UserError, match=match):
                Client(address, fingerprint=fingerprint).request("GET", "/data")
    finally:
        server.stop()
