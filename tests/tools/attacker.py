"""Listens to a farm's whole traffic, then tries to come in with everything that it has heard.

    python tests/tools/attacker.py

starts a private farm, whose workers and commands all go through a
relay that writes everything down: one worker with the key, one that is admitted by its code, a
job, its pictures. Then it sends everything again, as it was and changed, also after a restart;
shows and signs with everything heard that may be a secret; and pretends to be the coordinator, with
true answers of before. It ends with 1 when anything was let in, or given to it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Set, Tuple

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

import povfarm
from helpers.base import POVFARM, wait_until
from helpers.farm import SMALL, STILL, environment
from helpers.trust import Signer

PUBLIC = (povfarm.HELLO,)  # what anybody may ask


class Heard(NamedTuple):
    """One request as it went by."""

    method: str
    target: str
    headers: Dict[str, str]
    body: bytes

    @property
    def signed(self) -> bool:
        return "authorization" in self.headers


class Relay:
    """Passes everything on to a coordinator, and writes it down."""

    def __init__(self, port: int) -> None:
        self.to = port
        self.said: List[bytes] = []  # by clients, one for each connection
        self.answered: List[bytes] = []
        self._ears = socket.create_server(("127.0.0.1", 0))
        self.port = self._ears.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._ears.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self.to))
            self.said.append(b"")
            self.answered.append(b"")
            number = len(self.said) - 1
            back = threading.Thread(target=self._pass, args=(server, client, self.answered, number),
                                    daemon=True)
            back.start()
            self._pass(client, server, self.said, number)

    def _pass(self, source: socket.socket, sink: socket.socket, notes: List[bytes],
              number: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                notes[number] += data
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def heard(self) -> List[Heard]:
        """Every request."""
        return [request for stream in list(self.said) for request in requests_in(stream)]

    def close(self) -> None:
        self._ears.close()


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


class Farm:
    """A private farm and its people; all of them talk through the relay."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.port = 0
        (place / "project").mkdir()
        (place / "project" / "scene.pov").write_text(STILL)
        self.process = self.serve()
        self.relay = Relay(self.port)
        self.key = place / "farm" / "farm.key"

    def start(self, *args: str) -> "subprocess.Popen[str]":
        return subprocess.Popen([*POVFARM, *args], cwd=self.place / "project", text=True,
                                env=environment(self.place), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def serve(self) -> "subprocess.Popen[str]":
        process = self.start("serve", "--private", "--bind", "127.0.0.1", "--port", str(self.port),
                             "--no-discovery")
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "is at" in line, line
        note = json.loads((self.place / "farm" / "coordinator.json").read_text())
        self.port = int(note["url"].rpartition(":")[2])
        return process

    def there(self, name: str, port: int, key: bool = True) -> List[str]:
        """The options of somebody at another computer."""
        return ["--data", str(self.place / name), "--server", f"127.0.0.1:{port}",
                *(["--key-file", str(self.key)] if key else [])]

    def run(self, *args: str) -> Tuple[int, str]:
        process = self.start(*args)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def live(self) -> None:
        """Everything that happens on a farm, heard by the relay."""
        port = self.relay.port
        pupil = self.start("work", "--worker-name", "pupil", *self.there("pupil", port, key=False))
        assert pupil.stdout is not None
        code = re.search(r"the code (\w{6}),", pupil.stdout.readline())
        assert code, "no code is shown"
        for args in (["admit", code[1]], ["submit", "--wait", "scene.pov", *SMALL],
                     ["submit", "scene.pov", *SMALL], ["status"], ["workers"], ["logs", "1"],
                     ["delete", "2"], ["users", "add", "anna"]):
            status, said = self.run(*args, *self.there("teacher", port))
            assert status == 0, said
        pupil.terminate()
        pupil.communicate(timeout=60)
        status, said = self.run("work", "--until-idle", "--worker-name", "own", *self.there("own", port))
        assert status == 0, said

    def restart(self) -> None:
        self.end()
        self.process = self.serve()

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)


class Attacker:
    """Tries, and counts."""

    def __init__(self, farm: Farm, tell: Callable[[str], None]) -> None:
        self.farm, self.tell = farm, tell
        self.heard = farm.relay.heard()
        self.tried = 0
        self.let_in: List[str] = []

    def send(self, what: str, method: str, target: str, headers: Dict[str, str],
             body: bytes = b"") -> None:
        """One try; whoever is answered with what is not for everybody is in."""
        # Who guesses is slowed down by address; here the attacker has many.
        address = f"127.{1 + self.tried // 800 % 250}.{self.tried // 4 % 200}.1"
        connection = http.client.HTTPConnection("127.0.0.1", self.farm.port, timeout=10,
                                                source_address=(address, 0))
        kept = {name: value for name, value in headers.items()
                if name in ("authorization", "x-sha256", "content-type", "cookie")}
        try:
            connection.request(method, target, body or None, kept)
            status = connection.getresponse().status
        except socket.timeout:  # it waits for work
            status = 200
        finally:
            connection.close()
        self.tried += 1
        if status < 400 and target.partition("?")[0] not in PUBLIC:
            self.let_in.append(f"{what}: {method} {target} is answered with {status}")

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
            for method, target, body in TARGETS:
                self.send(f"other request {when}", method, target, {
                    **one.headers, "content-type": "application/json",
                    "x-sha256": hashlib.sha256(body).hexdigest()}, body)

    def secrets(self) -> Set[str]:
        """Whatever was heard and is long enough to be a secret."""
        text = b"\n".join([*self.farm.relay.said, *self.farm.relay.answered]).decode("latin-1")
        found = set(re.findall(r"(?<![0-9A-Za-z])[0-9a-f]{32,128}(?![0-9A-Za-z])", text))
        return {one for one in found if len(one) <= 128}

    def use_secrets(self, most: int) -> None:
        """Show each, and sign with it, as everybody."""
        def hello(who: str, nonce: str) -> Dict[str, str]:
            client = povfarm.Client(f"http://127.0.0.1:{self.farm.port}", retry_for=0)
            told: Dict[str, str] = client.request(
                "POST", povfarm.HELLO, json={"who": who, "nonce": nonce}).json()
            client.close()
            return told

        for number, one in enumerate(sorted(self.secrets())[:most]):
            for index, key in enumerate((one, f"#1:{one}", f"#2:{one}", f"anna:{one}")):
                # Who guesses is slowed down, so each is tried with one request.
                method, target, body = TARGETS[(number + index) % len(TARGETS)]
                self.send("secret", method, target, {
                    **Signer(hello).headers(key, method, target, body),
                    "content-type": "application/json"}, body)
            self.send("secret shown", "GET", "/api/v1/jobs", {"authorization": f"Bearer {one}"})
        assert self.farm.key.read_text().strip() not in self.secrets(), "the key was sent"

    def pretend(self) -> None:
        """Be the coordinator, with its own answers of before; whoever says more than hello fails."""
        for args in (["submit", "scene.pov", *SMALL, *self.farm.there("teacher", 0)],
                     ["status", *self.farm.there("teacher", 0)],
                     ["work", "--worker-name", "own", "--until-idle", *self.farm.there("own", 0)],
                     ["work", "--worker-name", "pupil", "--until-idle",
                      *self.farm.there("pupil", 0, key=False)]):
            with rogue(self.farm.relay) as (port, asked):
                process = self.farm.start(*[arg.replace("127.0.0.1:0", f"127.0.0.1:{port}")
                                            for arg in args])
                try:
                    wait_until(functools.partial(self._over, process, asked), "nobody came", 60)
                finally:
                    process.kill()
                    said, _ = process.communicate(timeout=60)
            self.tried += 1
            more = [one for one in asked if one.target not in (*PUBLIC, "/api/v1/farm") or one.signed]
            if not asked or more or process.returncode == 0:
                self.let_in.append(f"pretended to {args[0]}: {process.returncode} {said} {more[:1]}")

    @staticmethod
    def _over(process: "subprocess.Popen[str]", asked: List[Heard]) -> bool:
        return process.poll() is not None or len(asked) > 3


TARGETS: Tuple[Tuple[str, str, bytes], ...] = (
    ("GET", "/api/v1/jobs", b""), ("GET", "/api/v1/jobs/1/frames/0/image", b""),
    ("POST", "/api/v1/jobs/1/cancel", b"{}"), ("POST", "/api/v1/login", b"{}"),
    ("POST", "/api/v1/lease", b'{"want": 1, "slots": 1, "idle": 1}'),
    ("DELETE", "/api/v1/jobs/1", b""), ("POST", "/api/v1/workers/admit", b'{"code": "AAAAAA"}'),
)


@contextlib.contextmanager
def rogue(relay: Relay) -> Iterator[Tuple[int, List[Heard]]]:
    """What pretends to be the coordinator: it says again what that has answered to a hello."""
    told = re.findall(rb'\{"session":"[^}]*\}', b"".join(relay.answered))
    asked: List[Heard] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = ears.accept()
                client.settimeout(5)
                stream = b""
                with client, contextlib.suppress(OSError):
                    while data := client.recv(1 << 16):
                        stream += data
                        for one in requests_in(stream):
                            asked.append(one)
                            body = told[len(asked) % len(told)] if one.target in PUBLIC else b"{}"
                            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"
                                           % (len(body), body))
                            stream = b""

    with socket.create_server(("127.0.0.1", 0)) as ears:
        threading.Thread(target=serve, daemon=True).start()
        yield ears.getsockname()[1], asked


def attack(place: Path, most: int = 10_000, tell: Callable[[str], None] = lambda text: None
           ) -> Tuple[int, List[str]]:
    """Return how often was tried, and what was let in."""
    farm = Farm(place)
    try:
        farm.live()
        attacker = Attacker(farm, tell)
        tell(f"heard {len(attacker.heard)} requests and {len(attacker.secrets())} that may be secrets")
        attacker.replay("at once")
        tell(f"sent again: tried {attacker.tried}, let in {len(attacker.let_in)}")
        attacker.pretend()
        tell(f"pretended: tried {attacker.tried}, let in {len(attacker.let_in)}")
        farm.restart()
        attacker.replay("after a restart")
        tell(f"after a restart: tried {attacker.tried}, let in {len(attacker.let_in)}")
        attacker.use_secrets(most)
        return attacker.tried, attacker.let_in
    finally:
        farm.end()
        farm.relay.close()


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="povfarm-attacker-") as scratch:
        number, let_in = attack(Path(scratch), tell=print)
    print(*let_in, sep="\n")
    print(f"tried {number:,}, let in {len(let_in)} ({time.monotonic() - began:.0f} s)")
    return 1 if let_in else 0


if __name__ == "__main__":
    sys.exit(main())
