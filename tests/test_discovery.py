"""Beacons and probes: on loopback, between processes, and between hosts on a LAN of our own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

import povfarm
from helpers.base import wait_until
from helpers.lan import Lan, ip, lan
from helpers.sockets import KEY, beacon, shared_socket
from povfarm import Beacon, Found, discover, look_out

__all__ = ["lan"]

ROUND = 0.25  # seconds, with the first probe and a second one


def probe(**fields: Any) -> bytes:
    return json.dumps({"povfarm": "probe", "version": 1, "nonce": "ab" * 16, **fields}).encode()


@contextlib.contextmanager
def rogue(reply: Callable[[bytes], List[bytes]], source: str = "127.0.0.1") -> Iterator[int]:
    """Somebody without the key, who answers every probe from ``source`` as he likes."""
    with shared_socket() as ears, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        mouth.bind((source, 0))
        thread = threading.Thread(target=_serve_rogue, args=(ears, mouth, reply), daemon=True)
        thread.start()
        port = ears.getsockname()[1]
        yield port
        mouth.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        mouth.sendto(b"stop", ("127.255.255.255", port))
        thread.join(60)


def _serve_rogue(ears: socket.socket, mouth: socket.socket,
                 reply: Callable[[bytes], List[bytes]]) -> None:
    while True:
        packet, sender = ears.recvfrom(4096)
        if packet == b"stop":
            return
        for answer in reply(packet):
            mouth.sendto(answer, sender)


def found(key: Optional[bytes], port: int, least: int = 1) -> List[Found]:
    """What the first round finds in which so many answer in time: the computer may be busy."""
    def of_a_round() -> Any:
        heard = discover(ROUND, key, port)
        return len(heard) >= least and heard

    heard: List[Found] = wait_until(of_a_round, "too few answer")
    return heard


def test_a_coordinator_on_this_machine_is_found_by_its_loopback_address() -> None:
    with beacon() as one:
        url = "http://127.0.0.1:2271"
        assert found(KEY, one.port) == [Found("studio", "f1", url, True, "127.0.0.1")]
        assert found(None, one.port) == [Found("studio", "f1", url, False, "127.0.0.1")]
        assert discover(ROUND, b"another key", one.port) == []


def test_a_coordinator_that_speaks_tls_says_by_which_certificate_it_is_known() -> None:
    pin = "ab" * 32
    with beacon(pin=pin) as one:
        url = "https://127.0.0.1:2271"
        for key in (KEY, None):
            assert found(key, one.port) == [
                Found("studio", "f1", url, key is not None, "127.0.0.1", pin)]


def test_a_stopped_beacon_is_silent() -> None:
    with beacon() as one:
        pass
    assert discover(ROUND, KEY, one.port) == []


def test_two_coordinators_of_one_machine_are_both_listed() -> None:
    with beacon("b", "f2") as two, beacon("a", "f1", two.port), beacon("a", "f0", two.port):
        heard = found(KEY, two.port, 3)
        assert [(one.name, one.farm_id) for one in heard] == [("a", "f0"), ("a", "f1"), ("b", "f2")]
        # Found by name, the round is not waited for.
        assert [one.farm_id for one in discover(60, KEY, two.port, "B")] == ["f2"]
        assert discover(ROUND, KEY, two.port, "c") == []


SCRIPT = """
import sys, povfarm
beacon = povfarm.Beacon(sys.argv[1], sys.argv[1], 2271, b"the farm key", port=int(sys.argv[2]))
beacon.start()
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has said "ready"."""
    env = {**os.environ, "PYTHONPATH": str(Path(povfarm.__file__).parent)}
    with subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as one:
        try:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
            yield one
        finally:
            one.kill()


def test_coordinators_in_two_processes_are_both_listed() -> None:
    with beacon("here", "here") as one, \
            process(sys.executable, "-c", SCRIPT, "there", str(one.port)):
        assert [two.name for two in found(KEY, one.port, 2)] == ["here", "there"]


TRUE = Beacon("studio", "f1", 2271, KEY)


def tampered(*all_changes: Dict[str, Any]) -> Callable[[bytes], List[bytes]]:
    """Replies of a true coordinator with some fields changed or, by None, left out."""

    def reply(packet: bytes) -> List[bytes]:
        true = json.loads(TRUE.answer(packet, "127.0.0.1") or b"null")
        messages = [{**true, **changes} for changes in all_changes if true]
        return [
            json.dumps({k: v for k, v in message.items() if v is not None}).encode()
            for message in messages
        ]

    return reply


FORGED: List[Dict[str, Any]] = [
    {"mac": "0" * 64}, {"mac": None}, {"mac": 7}, {"mac": "\u00fc\ud800"}, {"name": "other"},
    {"id": "f2"}, {"port": 2272}, {"scheme": "https"}, {"nonce": "cd" * 16}, {"address": None},
    {"address": "127.0.0.2"}, {"more": 1}, {"scheme": "https", "pin": "ab" * 32},
]
MALFORMED: List[Dict[str, Any]] = [
    {"povfarm": "probe"}, {"povfarm": None}, {"version": 2}, {"nonce": "cd" * 16}, {"nonce": None},
    {"name": ""}, {"name": "x" * 101}, {"name": "\x1b[2J"}, {"name": 7}, {"name": None},
    {"id": ""}, {"id": ["f1"]}, {"port": 0}, {"port": 65536}, {"port": "2271"}, {"port": 22.5},
    {"port": True}, {"scheme": "file"}, {"scheme": None}, {"padding": "x" * 2048}, {"scheme": "https"},
    {"pin": "ab" * 32}, {"scheme": "https", "pin": "ab"}, {"scheme": "https", "pin": 7},
    {"pin": None},
]


@pytest.mark.parametrize("key, bad", [(KEY, FORGED), (KEY, MALFORMED), (None, MALFORMED)],
                         ids=["forged", "malformed", "malformed without a key"])
def test_a_bad_answer_is_ignored(key: Optional[bytes], bad: List[Dict[str, Any]]) -> None:
    # All have what would show that they were taken; the last and only good one has not.
    marked = [{"port": 666, **changes} if key is None else changes for changes in bad]
    with rogue(tampered(*marked, {})) as port:
        url = "http://127.0.0.1:2271"
        assert found(key, port) == [Found("studio", "f1", url, bool(key), "127.0.0.1")]


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is no address of this system")
def test_a_true_answer_passed_on_from_another_address_is_not_believed() -> None:
    with rogue(tampered({}), source="127.0.0.2") as port:
        assert discover(ROUND, KEY, port) == []
        # Without a key there is nothing to tell it by.
        assert [one.address for one in discover(60, None, port, "studio")] == ["127.0.0.2"]


def test_a_rogue_beside_a_true_coordinator_does_not_displace_it() -> None:
    with rogue(tampered({"mac": None, "port": 666})) as port, beacon(port=port):
        assert [one.url for one in found(KEY, port)] == ["http://127.0.0.1:2271"]


def test_a_worker_with_the_key_waits_for_its_coordinator_and_follows_no_rogue(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``work --key`` looks for it; a rogue answers meanwhile, also with a true answer."""
    asked, waits = threading.Semaphore(0), threading.Event()
    rounds: Dict[str, int] = {}
    monkeypatch.setattr(povfarm, "_say", lambda text: waits.set())
    monkeypatch.setattr(povfarm, "discover", lambda seconds, *rest: discover(ROUND, *rest))

    def reply(packet: bytes) -> List[bytes]:
        if not waits.is_set() or b"probe" not in packet:
            return []
        nonce = json.loads(packet)["nonce"]
        if nonce not in rounds:
            rounds[nonce] = len(rounds)
            asked.release()
        return tampered({"mac": "0" * 64, "port": 666}, {"port": 667})(packet)

    found: List[Any] = []
    stop = threading.Event()
    with rogue(reply) as port:
        options = argparse.Namespace(key=KEY.decode(), server="", data=Path("nowhere"), name="",
                                     command="work", discovery_port=port, pin="", key_file="",
                                     worker_name="anna", code="")
        worker = threading.Thread(
            target=lambda: found.append(povfarm._find_coordinator(options, stop)))
        worker.start()
        try:
            hint = povfarm._packet("hint")  # the rogue's: it lets them look sooner, no more
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
                while len(rounds) < 5:  # whoever follows has done so by the fourth
                    mouth.sendto(hint, ("127.0.0.1", port + 1))
                    asked.acquire(timeout=0.5)
                    assert not found
            with beacon(port=port, url_port=4711):
                worker.join(60)
        finally:
            stop.set()
            worker.join(60)
    assert [client.base_url for client in found] == ["http://127.0.0.1:4711"]
    assert found[0].token == KEY.decode()


NOISE = [
    b"", b"{", b"[]", b"7", b"null", b"[" * 2000, b"\xff\xfe", b'{"povfarm": "probe"}',
    probe(nonce=None), probe(nonce=7), probe(nonce="ab"), probe(nonce="ab" * 100),
    probe(nonce="zz" * 16), probe(version=2), probe(povfarm="answer"), probe(name="other"),
    probe(padding="x" * 2048), *(secrets.token_bytes(n) for n in range(100)),
]


def test_noise_is_not_answered_and_does_no_harm() -> None:
    with beacon() as one, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert [one.answer(packet, "127.0.0.1") for packet in NOISE] == [None] * len(NOISE)
        for packet in NOISE:
            sock.sendto(packet, ("127.0.0.1", one.port))
        sock.sendto(secrets.token_bytes(9000), ("127.0.0.1", one.port))
        assert len(discover(60, KEY, one.port, "studio")) == 1


def test_noise_instead_of_answers_does_no_harm() -> None:
    with rogue(lambda packet: [*NOISE, packet]) as port:
        assert discover(ROUND, None, port) == []


def test_answers_are_rationed() -> None:
    class Frozen(povfarm.Clock):
        now = 7.0

        def monotonic(self) -> float:
            return self.now

    clock = Frozen()
    one = Beacon("studio", "f1", 2271, KEY, clock=clock)
    for second in (7.2, 8.1):
        clock.now = second
        answers = [one.answer(probe(), "127.0.0.1") for _ in range(60)]
        assert [answer is not None for answer in answers] == [True] * 20 + [False] * 40
        # Who sends too many takes little: others in the network still get their answers.
        answers = [one.answer(probe(), f"127.0.0.{2 + number % 9}") for number in range(120)]
        assert [answer is not None for answer in answers] == [True] * 80 + [False] * 40


def test_a_port_that_cannot_be_had_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 0))
        with beacon(port=taken.getsockname()[1]):
            assert "start them with --server" in caplog.text


@pytest.mark.parametrize("system, code", [("linux", 0x8919), ("darwin", 0xC0206923)])
def test_every_interface_is_asked_for_its_broadcast_address(
        monkeypatch: pytest.MonkeyPatch, system: str, code: int) -> None:
    """Elsewhere 255.255.255.255 has to do, which leaves by one interface only."""

    def ioctl(descriptor: int, asked: int, request: bytes) -> bytes:
        if request.rstrip(b"\0") != b"en7":
            raise OSError("it has no address")
        assert asked == code
        return request[:20] + socket.inet_aton("10.1.2.255") + request[24:]

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (7, "en7"), (9, "utun0")])
    monkeypatch.setattr(povfarm, "fcntl", argparse.Namespace(ioctl=ioctl))
    assert povfarm._broadcast_addresses() == [
        "127.0.0.1", "127.255.255.255", "255.255.255.255", "10.1.2.255"]


class Waiter(threading.Thread):
    """A worker that waits for a coordinator, for an hour between two rounds."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.stop = threading.Event()
        self.found: Optional[Found] = None

    def look(self) -> Optional[Found]:
        return next(iter(discover(0.8, KEY, self.port)), None)

    def run(self) -> None:
        self.found = look_out(self.look, self.stop, self.port, pause=3600)


def wait_for_three_probes(sock: socket.socket) -> None:
    nonces = []
    while nonces.count(nonces[0] if nonces else "") < 6:  # each to two loopback addresses
        nonces.append(json.loads(sock.recv(2048))["nonce"])


def test_a_waiting_worker_is_woken_by_a_coordinator_that_starts() -> None:
    with shared_socket() as observer:
        waiter = Waiter(observer.getsockname()[1])
        waiter.start()
        wait_for_three_probes(observer)  # it found nobody: only a hint can help now
        with beacon(port=waiter.port):
            waiter.join(60)
            assert waiter.found and waiter.found.name == "studio"


def test_a_waiting_worker_can_be_stopped() -> None:
    with shared_socket() as observer:
        waiter = Waiter(observer.getsockname()[1])
        waiter.start()
        wait_for_three_probes(observer)
        waiter.stop.set()
        waiter.join(60)
        assert waiter.found is None and not waiter.is_alive()


def test_a_worker_that_cannot_have_the_port_for_hints_finds_its_coordinator_all_the_same() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 0))
        with beacon(port=taken.getsockname()[1] - 1) as one:
            waiter = Waiter(one.port)
            waiter.run()
            assert waiter.found and waiter.found.name == "studio"


def test_a_worker_hears_of_coordinators_that_start_and_of_nothing_else() -> None:
    with shared_socket() as one:
        port, heard = one.getsockname()[1] - 1, threading.Event()
    threading.Thread(target=povfarm.listen_for_hints, args=(heard.set, port), daemon=True).start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        for packet in NOISE:
            mouth.sendto(packet, ("127.0.0.1", port + 1))
    assert not heard.wait(0.1)
    deadline = time.monotonic() + 20
    while not heard.is_set() and time.monotonic() < deadline:  # it may not listen yet
        with beacon(port=port):
            heard.wait(0.2)
    assert heard.is_set()


# Hosts on a LAN


# Looks on until a worker has probed three times in vain, and only then becomes a coordinator.
LATE = """
import socket, sys, povfarm
ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ears.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
ears.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
ears.bind(("", 2269))
print("ready", flush=True)
for _ in range(3):
    ears.recv(4096)
povfarm.Beacon("late", "late", 2271, b"the farm key").start()
sys.stdin.read()
"""

WAIT = """
import threading, povfarm
look = lambda: next(iter(povfarm.discover(0.8, b"the farm key")), None)
print(povfarm.look_out(look, threading.Event(), pause=3600).name)
"""

# Asks the true coordinator what it is asked, and passes on what that answers.
RELAY = """
import socket, sys
ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ears.bind(("", 2269))
mouth = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print("ready", flush=True)
while True:
    packet, sender = ears.recvfrom(4096)
    mouth.sendto(packet, ("10.77.0.1", 2280))
    ears.sendto(mouth.recv(4096), sender)
"""

LIST = """
import sys, povfarm
print(sorted(one.url for one in povfarm.discover(0.5, sys.argv[1].encode() or None)))
"""


def run(command: List[str]) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(povfarm.__file__).parent)}
    return subprocess.run(command, env=env, check=True, text=True, stdout=subprocess.PIPE,
                          timeout=120).stdout.strip()


@pytest.mark.slow
def test_workers_find_coordinators_on_other_hosts_without_a_default_route(lan: Lan) -> None:
    with process(*lan.python(1, SCRIPT, "one", "2269")), \
            process(*lan.python(3, SCRIPT, "three", "2269")):
        urls = "['http://10.77.0.1:2271', 'http://10.77.0.3:2271']"
        wait_until(lambda: run(lan.python(2, LIST, "the farm key")) == urls)
        wait_until(lambda: run(lan.python(2, LIST, "")) == urls)
        assert run(lan.python(2, LIST, "another key")) == "[]"


@pytest.mark.slow
def test_serve_prints_an_address_that_others_can_use_without_a_router(
        lan: Lan, tmp_path: Path) -> None:
    """Also where a host is on two networks, of which one is not up."""
    ip("-n", lan.hosts[0], "link", "add", "eth1", "type", "veth", "peer", "name", "eth2")
    ip("-n", lan.hosts[0], "addr", "add", "10.88.0.1/24", "dev", "eth1")
    command = ["ip", "netns", "exec", lan.hosts[0], sys.executable, povfarm.__file__, "serve",
               "--port", "0", "--data", str(tmp_path / "farm"), "--no-discovery"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout is not None
            said = [serve.stdout.readline() for _ in range(3)]
            port = int(re.findall(r"is at http://10\.77\.0\.1:(\d+)\n", said[0])[0])
            assert f"elsewhere:     {sys.executable} {povfarm.__file__} work --server " \
                f"http://10.77.0.1:{port}\n" in said[2]
            assert run(lan.python(2, FETCH, f"http://10.77.0.1:{port}")) == "200"
        finally:
            serve.terminate()
            serve.wait(60)
    for name in ("eth1", "eth2"):
        ip("-n", lan.hosts[0], "link", "set", name, "up")
    assert run(lan.python(1, "import povfarm; print(*povfarm.own_addresses())")) == (
        "10.77.0.1 10.88.0.1")
    alone = "import povfarm; print(*povfarm.own_addresses())"
    assert run(["unshare", "--net", sys.executable, "-c", alone]) == "127.0.0.1"


FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1] + "/api/v1/farm").status)
"""


@pytest.mark.slow
def test_a_worker_that_waits_is_woken_by_a_coordinator_on_another_host(lan: Lan) -> None:
    with process(*lan.python(1, LATE)):
        assert run(lan.python(2, WAIT)) == "late"


@pytest.mark.slow
def test_a_host_that_passes_on_true_answers_is_not_believed(lan: Lan) -> None:
    with process(*lan.python(1, SCRIPT, "true", "2280")), process(*lan.python(3, RELAY)):
        assert run(lan.python(2, LIST, "the farm key")) == "[]"
        wait_until(lambda: run(lan.python(2, LIST, "")) == "['http://10.77.0.3:2271']")


# A request that is held open, at both ends; each tells when it finds that the other is gone.
HOLDS = """
import time, povfarm
povfarm.PEER_SILENCE = povfarm.PEER_PAUSE = 1
class Pages:
    @povfarm.route("GET", "/held", role="reader")
    def held(self, request):
        print("held", flush=True)
        while request.alive():
            time.sleep(0.05)
        print("gone", flush=True)
        return povfarm.Response(204)
reader = povfarm.Identity(frozenset({"reader"}))
server = povfarm.Server(povfarm.Router(Pages(), authenticate=lambda request: reader), "", 2290)
server.start()
print("ready", flush=True)
time.sleep(100)
"""

WAITS = """
import povfarm
povfarm.PEER_SILENCE = povfarm.PEER_PAUSE = 1
print("ready", flush=True)
try:
    povfarm.Client("http://10.77.0.1:2290").request("GET", "/held", timeout=90, retry_for=0)
except povfarm.ServerGone:
    print("gone", flush=True)
"""


@pytest.mark.slow
def test_a_computer_that_vanishes_while_nothing_is_said_is_missed_soon(lan: Lan) -> None:
    with process(*lan.python(1, HOLDS)) as holds, process(*lan.python(2, WAITS)) as waits:
        assert holds.stdout is not None and waits.stdout is not None
        assert holds.stdout.readline() == "held\n"
        began = time.monotonic()
        ip("-n", lan.switch, "link", "set", "port1", "down")
        try:
            assert [waits.stdout.readline(), holds.stdout.readline()] == ["gone\n"] * 2
            assert time.monotonic() - began < 60  # it would be kept for 90
        finally:
            ip("-n", lan.switch, "link", "set", "port1", "up")
