"""Listens to a farm's whole traffic, then tries to come in with everything that it has heard.

    python tests/tools/attacker.py

makes a network of seven computers (network namespaces, which need root; without them all are this
one): a private coordinator, a teacher, a pupil whose worker is admitted by its code, and four of
the attacker's. One hears every packet, sends everything again, as it was and changed, also after
a restart, and shows and signs with everything heard that may be a secret. One is a relay, which
sends what it likes with each signature before that has arrived, and pairs in its own name. One
pretends to be the coordinator, with true answers of before. One takes the coordinator's place when
that has died. It ends with 1 when anything was let in, or given to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import json
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Set,
    Tuple,
    Union,
)

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

import povfarm
from helpers.base import POVFARM, wait_until
from helpers.farm import SMALL, STILL, environment
from helpers.lan import Lan, ip, why_no_lan
from helpers.trust import Signer

COORDINATOR, TEACHER, PUPIL, LISTENER, RELAY, ROGUE, SQUATTER = range(1, 8)
PUBLIC = (povfarm.HELLO,)  # what anybody may ask
Said = Tuple[List[bytes], List[bytes]]  # by clients and by the coordinator, of each connection


class Heard(NamedTuple):
    """One request as it went by."""

    method: str
    target: str
    headers: Dict[str, str]
    body: bytes

    @property
    def signed(self) -> bool:
        return "authorization" in self.headers


def requests_in(stream: bytes) -> Iterator[Heard]:
    """The requests of one connection."""
    while stream:
        head, found, stream = stream.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(fields.get("content-length", "0"))
        method, target, _ = first.split(" ")
        yield Heard(method, target, fields, stream[:size])
        stream = stream[size:]


# --- where they are


class Loopback:
    """All are one computer; what they say goes through a relay that writes it down."""

    def __init__(self) -> None:
        self._to = 0
        self._said: Said = [], []
        self._ears = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        self._ears.close()

    def command(self, host: int, *args: str) -> List[str]:
        return list(args)

    def on(self, host: int) -> ContextManager[None]:
        return contextlib.nullcontext()

    def address(self, host: int) -> str:
        return "127.0.0.1"

    def source(self, host: int, number: int) -> str:
        """One of an attacker's many addresses."""
        return f"127.{1 + number // 200 % 250}.{number % 200}.{host}"

    def server(self, port: int) -> List[str]:
        """Options that lead to the coordinator."""
        self._to = port
        return ["--server", f"127.0.0.1:{self._ears.getsockname()[1]}"]

    def said(self, port: int) -> Said:
        return self._said

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._ears.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self._to))
            said, answered = self._said
            said.append(b"")
            answered.append(b"")
            number = len(said) - 1
            threading.Thread(target=self._pass, args=(server, client, answered, number),
                             daemon=True).start()
            self._pass(client, server, said, number)

    def _pass(self, source: socket.socket, sink: socket.socket, notes: List[bytes],
              number: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                notes[number] += data
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Network(Lan):
    """Each is a host of its own, and the switch sends every packet to all of them."""

    def __enter__(self) -> Network:
        super().__enter__()
        ip("-n", self.switch, "link", "set", "br0", "type", "bridge", "ageing_time", "0")
        ip("-n", self.hosts[LISTENER - 1], "link", "set", "eth0", "promisc", "on")
        for host in (LISTENER, RELAY):
            ip("-n", self.hosts[host - 1], "route", "add", "local", f"10.77.{32 * host}.0/19",
               "dev", "lo")
        self._streams: List[Tuple[int, int, int, Dict[int, bytes]]] = []
        with self.on(LISTENER):
            self._ears = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._ears.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE: miss nothing
            self._ears.bind(("eth0", 3))
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._ears.close()

    def address(self, host: int) -> str:
        return f"10.77.0.{host}"

    def source(self, host: int, number: int) -> str:
        """One of an attacker's many addresses."""
        return f"10.77.{32 * host + number // 200 % 32}.{1 + number % 200}"

    def server(self, port: int) -> List[str]:
        """The coordinator is found."""
        return []

    def said(self, port: int) -> Said:
        said, answered = [], []
        for _source, to, begin, parts in list(self._streams):
            stream = b""
            while begin + len(stream) & 0xffffffff in parts:
                stream += parts[begin + len(stream) & 0xffffffff]
            (said if to == port else answered).append(stream)
        return said, answered

    def _listen(self) -> None:
        known: Dict[bytes, int] = {}
        with contextlib.suppress(OSError):
            while True:
                frame = self._ears.recv(1 << 17)
                if frame[12:14] != b"\x08\0" or frame[23] != socket.IPPROTO_TCP:
                    continue
                tcp = 14 + 4 * (frame[14] & 15)
                source, to, count = struct.unpack_from(">HHI", frame, tcp)
                ends = frame[26:34] + frame[tcp:tcp + 4]
                if frame[tcp + 13] & 2:  # SYN
                    known[ends] = len(self._streams)
                    self._streams.append((source, to, count + 1 & 0xffffffff, {}))
                size = struct.unpack_from(">H", frame, 16)[0]
                data = frame[tcp + 4 * (frame[tcp + 12] >> 4):14 + (size or len(frame))]
                if data and ends in known:
                    parts = self._streams[known[ends]][3]
                    parts[count] = max(parts.get(count, b""), data, key=len)


Place = Union[Loopback, Network]


# --- who is there


class Farm:
    """A private farm and its people."""

    def __init__(self, place: Path, net: Place) -> None:
        self.place, self.net = place, net
        self.port = 0
        (place / "project").mkdir()
        (place / "project" / "scene.pov").write_text(STILL)
        self.key = place / "farm" / "farm.key"
        self.process = self.serve()

    def start(self, host: int, *args: str, said: Any = subprocess.PIPE) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.net.command(host, *POVFARM, *args), cwd=self.place / "project", text=True,
            env=environment(self.place), stdin=subprocess.DEVNULL, stdout=said,
            stderr=subprocess.STDOUT)

    def serve(self) -> "subprocess.Popen[str]":
        alone = ["--bind", "127.0.0.1", "--no-discovery"] if isinstance(self.net, Loopback) else []
        process = self.start(COORDINATOR, "serve", "--private", "--port", str(self.port), *alone)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "is at" in line, line
        note = json.loads((self.place / "farm" / "coordinator.json").read_text())
        self.port = int(note["url"].rpartition(":")[2])
        return process

    def there(self, name: str, key: bool = True) -> List[str]:
        """The options of somebody at another computer."""
        return ["--data", str(self.place / name), *(["--key-file", str(self.key)] if key else [])]

    def run(self, host: int, *args: str) -> Tuple[int, str]:
        process = self.start(host, *args)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def pupil(self, name: str, *args: str) -> Tuple["subprocess.Popen[str]", str]:
        """A worker without the key, and the code that it shows."""
        process = self.start(PUPIL, "work", "--worker-name", name, *self.there(name, key=False), *args)
        assert process.stdout is not None
        said = ""
        while not (code := re.search(r"the code (\w{6}),", said)):
            line = process.stdout.readline()
            assert line, f"no code is shown: {said}"
            said += line
        return process, code[1]

    def live(self) -> None:
        """Everything that happens on a farm."""
        server, teacher = self.net.server(self.port), self.there("teacher")
        process, code = self.pupil("pupil", *server)
        for args in (["admit", code], ["submit", "--wait", "scene.pov", *SMALL],
                     ["submit", "scene.pov", *SMALL], ["status"], ["workers"], ["logs", "1"],
                     ["delete", "2"], ["users", "add", "anna"]):
            status, said = self.run(TEACHER, *args, *teacher, *server)
            assert status == 0, said
        process.terminate()
        process.communicate(timeout=60)
        status, said = self.run(TEACHER, "work", "--until-idle", "--worker-name", "own",
                                *self.there("own"), *server)
        assert status == 0, said

    def heard(self) -> List[Heard]:
        return [one for stream in self.net.said(self.port)[0] for one in requests_in(stream)]

    def end(self, kill: bool = False) -> None:
        (self.process.kill if kill else self.process.terminate)()
        self.process.communicate(timeout=60)


class Attacker:
    """Tries, and counts."""

    def __init__(self, farm: Farm) -> None:
        self.farm, self.net = farm, farm.net
        self.heard = farm.heard()
        self.tried = 0
        self.let_in: List[str] = []

    def send(self, what: str, method: str, target: str, headers: Dict[str, str],
             body: bytes = b"", host: int = LISTENER) -> None:
        """One try; whoever is answered with what is not for everybody is in."""
        # Who guesses is slowed down by address; the attacker has many.
        source = self.net.source(host, self.tried // 4), 0
        connection = http.client.HTTPConnection(
            self.net.address(COORDINATOR), self.farm.port, timeout=10, source_address=source)
        kept = {name: value for name, value in headers.items()
                if name in ("authorization", "x-sha256", "content-type", "cookie")}
        try:
            with self.net.on(host):
                connection.request(method, target, body or None, kept)
            status = connection.getresponse().status
        except socket.timeout:  # it waits for work
            status = 200
        finally:
            connection.close()
        self.tried += 1
        if status < 400 and target.partition("?")[0] not in PUBLIC:
            self.let_in.append(f"{what}: {method} {target} is answered with {status}")

    def send_with(self, what: str, proof: str, number: int, host: int = LISTENER) -> None:
        """Another request than the one that was signed."""
        method, target, body = TARGETS[number % len(TARGETS)]
        self.send(what, method, target, {
            "authorization": proof, "content-type": "application/json",
            "x-sha256": hashlib.sha256(body).hexdigest() if body else ""}, body, host)

    def replay(self, when: str) -> None:
        """All signed requests again, and with other targets, methods and bodies."""
        for one in [one for one in self.heard if one.signed]:
            self.send(f"replay {when}", *one)
        last = {one.headers["authorization"].partition(",")[0]: one
                for one in self.heard if one.signed}
        for one in last.values():
            proof = one.headers["authorization"]
            for count in (0, 1, 999, 10**14):
                changed = {**one.headers, "authorization": re.sub(
                    "count=[0-9]+", f"count={count}", proof)}
                self.send(f"count {when}", one.method, one.target, changed, one.body)
            for number in range(len(TARGETS)):
                self.send_with(f"other request {when}", proof, number)

    def secrets(self) -> Set[str]:
        """Whatever was heard and is long enough to be a secret."""
        said, answered = self.net.said(self.farm.port)
        text = b"\n".join([*said, *answered]).decode("latin-1")
        return set(re.findall(r"(?<![0-9A-Za-z])[0-9a-f]{32,128}(?![0-9A-Za-z])", text))

    def use_secrets(self, most: int) -> None:
        """Show each, and sign with it, as everybody."""
        def hello(who: str, nonce: str) -> Dict[str, str]:
            url = f"http://{self.net.address(COORDINATOR)}:{self.farm.port}"
            client = povfarm.Client(url, retry_for=0)
            with contextlib.closing(client.transport):
                told: Dict[str, str] = client.request(
                    "POST", povfarm.HELLO, json={
                        "who": who, "nonce": nonce, "wire": povfarm.WIRE}).json()
            return told

        for number, one in enumerate(sorted(self.secrets())[:most]):
            for index, key in enumerate((one, f"#1:{one}", f"#2:{one}", f"anna:{one}")):
                # Who guesses is slowed down, so each is tried with one request.
                method, target, body = TARGETS[(number + index) % len(TARGETS)]
                with self.net.on(LISTENER):
                    signed = Signer(hello).headers(key, method, target, body)
                self.send("secret", method, target,
                          {**signed, "content-type": "application/json"}, body)
            self.send("secret shown", "GET", "/api/v1/jobs", {"authorization": f"Bearer {one}"})
        assert self.farm.key.read_text().strip() not in self.secrets(), "the key was sent"

    def relay(self) -> None:
        """Be what people take for the coordinator's address, with that behind."""
        farm = self.farm
        with Relay(self) as relay:
            server = ["--server", relay.url]
            for args in (["submit", "scene.pov", *SMALL], ["status"], ["delete", "3"]):
                status, said = farm.run(TEACHER, *args, *farm.there("teacher"), *server)
                assert status == 0, f"what is only passed on arrives: {said}"
            process, code = farm.pupil("second", *server)
            try:
                self.tried += 1
                if farm.run(TEACHER, "admit", code, *farm.there("teacher"),
                            *self.net.server(farm.port))[0] == 0:
                    self.let_in.append(f"the relay was admitted by the code {code} of another")
            finally:
                process.kill()
                process.communicate(timeout=60)
            assert relay.pairings == 2, "nobody has paired with the relay"

    def pretend(self, host: int, port: int = 0, at: int = 0) -> None:
        """Be the coordinator, for all who name this one or look for theirs; whoever says more
        than hello fails."""
        farm = self.farm
        own = ["work", "--worker-name", "own", "--until-idle"]
        pupil = ["work", "--worker-name", "pupil", "--until-idle", *farm.there("pupil", key=False)]
        finds = isinstance(self.net, Network)  # there are those who look for their farm
        with Rogue(farm, host, port, finds) as rogue:
            server = ["--server", f"{self.net.address(at or host)}:{rogue.port}"]
            self._lure(rogue, [
                (TEACHER, [*args, *server]) for args in (
                    ["submit", "scene.pov", *SMALL, *farm.there("teacher")],
                    ["status", *farm.there("teacher")], [*own, *farm.there("own")], pupil)])
            if finds:
                self._lure(rogue, [(TEACHER, [*own, *farm.there("own")]), (PUPIL, pupil),
                                   (TEACHER, ["submit", "scene.pov", *farm.there("teacher")])],
                           looks=True)

    def squat(self) -> None:
        """Be at the coordinator's port when that has died, on its own computer."""
        with Rogue(self.farm, COORDINATOR, self.farm.port) as rogue:
            self._lure(rogue, [(COORDINATOR, args) for args in (
                ["submit", "scene.pov", *SMALL], ["status"], ["admit", "AAAAAA"],
                ["work", "--until-idle", "--worker-name", "here"])])

    def _lure(self, rogue: Rogue, victims: List[Tuple[int, List[str]]], looks: bool = False) -> None:
        """See what those do whom the rogue answers; they name it, or look for their farm."""
        rogue.asked.clear()
        started = []
        for host, args in victims:
            self.tried += 1
            text = self.farm.place / f"said {self.tried}"
            with text.open("w") as file:
                started.append((self.farm.start(host, *args, said=file), text, args))

        wait_until(lambda: rogue.given() or all(
            process.poll() is not None or "waiting for" in text.read_text().lower()
            for process, text, _ in started), "somebody goes on", 60)
        for process, text, args in started:
            ended = process.poll()
            process.kill()
            process.communicate(timeout=60)
            if rogue.given() or (ended == 0 and not looks):
                self.let_in.append(f"{args[0]} ({ended}): {text.read_text()} {rogue.given()[:1]}")
        assert looks or len(rogue.asked) >= len(victims), "nobody came"


TARGETS: Tuple[Tuple[str, str, bytes], ...] = (
    ("GET", "/api/v1/jobs", b""), ("GET", "/api/v1/jobs/1/frames/0/image", b""),
    ("POST", "/api/v1/jobs/1/cancel", b"{}"), ("POST", "/api/v1/login", b"{}"),
    ("POST", "/api/v1/lease", b'{"want": 1, "slots": 1, "idle": 1}'),
    ("DELETE", "/api/v1/jobs/1", b""), ("POST", "/api/v1/workers/admit", b'{"code": "AAAAAA"}'),
)


class Server:
    """Takes requests on one of the attacker's hosts."""

    def __init__(self, net: Place, host: int, port: int = 0) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                fields = {name.lower(): value for name, value in self.headers.items()}
                status, headers, data = outer.answer(Heard(self.command, self.path, fields, body))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data if status != 204 else b"")

            def log_message(self, *_: object) -> None:
                pass

        with net.on(host):
            own = "" if isinstance(net, Network) else net.address(host)
            self._server = http.server.ThreadingHTTPServer((own, port), Handler)
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                setattr(Handler, f"do_{method}", Handler.answer)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.port = self._server.server_port
        self.url = f"http://{net.address(host)}:{self.port}"

    def answer(self, one: Heard) -> Tuple[int, Dict[str, str], bytes]:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Relay(Server):
    """Passes everything on, but first uses its signature for something else, and pairs itself."""

    def __init__(self, attacker: Attacker) -> None:
        self._attacker, self._farm = attacker, attacker.farm
        self._to_farm, self._to_worker = povfarm.Pairing(), povfarm.Pairing()
        self.pairings = 0
        super().__init__(attacker.net, RELAY)

    def answer(self, one: Heard) -> Tuple[int, Dict[str, str], bytes]:
        if one.signed:
            for number, target in enumerate(TARGETS):
                if target[:2] != (one.method, one.target):  # which would be to pass it on
                    self._attacker.send_with("a fresh signature", one.headers["authorization"],
                                             number, RELAY)
        body, pairs = one.body, b'"commitment"' in one.body
        if pairs:
            self.pairings += 1
            mine, wire = self._to_farm, json.loads(body)
            wire["commitment"] = mine.commitment
            if "share" in wire:
                wire.update(share=mine.share, nonce=mine.nonce)
            body = json.dumps(wire).encode()
        connection = http.client.HTTPConnection(
            self._attacker.net.address(COORDINATOR), self._farm.port, timeout=60)
        with contextlib.closing(connection):
            headers = {name: value for name, value in one.headers.items()
                       if name not in ("host", "content-length")}
            connection.request(one.method, one.target, body or None, headers)
            reply = connection.getresponse()
            data = reply.read()
        if pairs and b'"share"' in data:
            data = json.dumps({"share": self._to_worker.share,
                               "nonce": self._to_worker.nonce}).encode()
        kept = {name: value for name, value in reply.getheaders()
                if name.lower() in ("etag", "content-type", "retry-after")}
        return reply.status, kept, data


class Rogue(Server):
    """Pretends to be the coordinator: it says again what that has answered to a hello, and takes
    whatever is given to it."""

    def __init__(self, farm: Farm, host: int, port: int = 0, found: bool = False) -> None:
        answered = farm.net.said(farm.port)[1]
        self._told = re.findall(rb'\{"session":"[^}]*\}', b"".join(answered))
        assert self._told, "no answer to a hello was heard"
        self.farm_id = json.loads(self._told[0])["farm_id"]
        self.asked: List[Heard] = []
        super().__init__(farm.net, host, port)
        self._beacon = povfarm.Beacon("farm", self.farm_id, self.port, b"k" * 64)
        self._net, self._host = farm.net, host
        if found:
            with farm.net.on(host):
                self._beacon.start()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        with self._net.on(self._host):
            self._beacon.stop()

    def given(self) -> List[Heard]:
        """What was said to it but hello, and the question which farm it is."""
        return [one for one in self.asked
                if one.target not in (*PUBLIC, "/api/v1/farm") or one.signed]

    def answer(self, one: Heard) -> Tuple[int, Dict[str, str], bytes]:
        self.asked.append(one)
        if one.target in PUBLIC:
            return 200, {}, self._told[len(self.asked) % len(self._told)]
        told: Dict[str, Any] = {"name": "farm", "farm_id": self.farm_id, "event": 0, "workers": 1,
                                "notice": "", "you": "admin", "id": 1, "admitted": True}
        if one.target == "/api/v1/jobs" and one.method == "POST":
            told["missing"] = [file["sha256"] for file in json.loads(one.body)["manifest"]["files"]]
        return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()


def attack(place: Path, net: Place, most: int = 10_000,
           tell: Callable[[str], None] = lambda text: None) -> Tuple[int, List[str]]:
    """Return how often was tried, and what was let in."""
    farm = Farm(place, net)
    try:
        farm.live()
        attacker = Attacker(farm)
        tell(f"heard {len(attacker.heard)} requests and {len(attacker.secrets())} that may be secrets")
        for what, do in (
                ("sent again", lambda: attacker.replay("at once")),
                ("passed on", attacker.relay),
                ("pretended", lambda: attacker.pretend(ROGUE)),
                ("died", lambda: farm.end(kill=True)),
                ("in its place", attacker.squat),
                ("with its address", lambda: with_its_address(attacker)),
                ("restarted", lambda: setattr(farm, "process", farm.serve())),
                ("sent again after a restart", lambda: attacker.replay("after a restart")),
                ("used as secrets", lambda: attacker.use_secrets(most))):
            do()
            tell(f"{what}: tried {attacker.tried}, let in {len(attacker.let_in)}")
        return attacker.tried, attacker.let_in
    finally:
        farm.end()


def with_its_address(attacker: Attacker) -> None:
    """Be at the coordinator's address and port while that is away."""
    net, port = attacker.net, attacker.farm.port
    if isinstance(net, Loopback):
        attacker.pretend(COORDINATOR, port)
        return
    ip("-n", net.switch, "link", "set", f"port{COORDINATOR}", "down")
    squatter = net.hosts[SQUATTER - 1]
    own = f"{net.address(COORDINATOR)}/16"
    ip("-n", squatter, "addr", "add", own, "dev", "eth0")
    for host in (TEACHER, PUPIL):  # as if it had said so by ARP
        ip("-n", net.hosts[host - 1], "neigh", "flush", "all")
    try:
        attacker.pretend(SQUATTER, port, COORDINATOR)
    finally:
        ip("-n", squatter, "addr", "del", own, "dev", "eth0")
        ip("-n", net.switch, "link", "set", f"port{COORDINATOR}", "up")


def main() -> int:
    began = time.monotonic()
    missing = why_no_lan()
    if missing:
        print(f"all are one computer, as {missing}")
    with tempfile.TemporaryDirectory(prefix="povfarm-attacker-") as scratch, \
            Loopback() if missing else Network(SQUATTER) as net:
        number, let_in = attack(Path(scratch), net, tell=print)
    print(*let_in, sep="\n")
    print(f"tried {number:,}, let in {len(let_in)} ({time.monotonic() - began:.0f} s)")
    return 0 if number and not let_in else 1


if __name__ == "__main__":
    sys.exit(main())
