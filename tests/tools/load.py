"""Thousands of idle and slow connections beside one honest worker, by hand:

    python tests/tools/load.py --connections 10000 [--tls]

starts a coordinator of its own on loopback, opens the connections (a third says
nothing, a third sends its head a little at a time, a third has asked once), and
prints how soon a worker's requests are answered meanwhile, and the coordinator's
memory. It ends by itself.

    python tests/tools/load.py --lookers 128 [--frames 100000]

lets so many strangers from four networks look at the page of such a job without end, instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

import povfarm
from helpers.base import POVFARM
from helpers.trust import join_at

FILLER = b"X-Filler: " + b"x" * 4000 + b"\r\n"
WORKER = {"name": "honest", "cores": 1, "memory": 1 << 30, "system": "x",
          "engines": {"povray": "3.7.0"}, "tags": []}


@contextlib.contextmanager
def coordinator(data: Path, *more: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """A real ``serve`` in a process of its own: its process id, and where it is."""
    command = [*POVFARM, "serve", "--data", str(data), "--port",
               "0", "--bind", "127.0.0.1", "--no-discovery", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
        try:
            assert one.stdout is not None
            assert "is at" in one.stdout.readline()
            yield one.pid, json.loads((data / "coordinator.json").read_text())
        finally:
            one.terminate()
            one.wait(30)


def memory(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if "VmHWM" in line).split()[1])


def open_many(port: int, number: int, tls: Optional[ssl.SSLContext]) -> List[socket.socket]:
    """Strangers, from a few hundred addresses: silent, slow, and done with their request."""
    socks = []
    for index in range(number):
        source = (f"127.1.{index // 50 // 250}.{index // 50 % 250 + 1}", 0)
        sock = socket.create_connection(("127.0.0.1", port), 30, source)
        if tls is not None and index % 3:
            sock = tls.wrap_socket(sock)
        if index % 3 == 1:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + FILLER)
        elif index % 3 == 2:
            sock.sendall(b"GET /favicon.svg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        socks.append(sock)
    return socks


def still_open(socks: List[socket.socket]) -> int:
    """How many the coordinator has not closed; slow ones send a little more."""
    count = 0
    for index, sock in enumerate(socks):
        with contextlib.suppress(OSError):
            if index % 3 == 1:
                sock.sendall(b"X-More: y\r\n")
            sock.settimeout(0)
            try:
                count += bool(socket.socket.recv(sock, 1, socket.MSG_PEEK))
            except BlockingIOError:
                count += 1
            sock.settimeout(30)
    return count


def leases(client: povfarm.Client, rounds: int) -> List[float]:
    """How long a worker's requests for work take, each with a new connection: that must be had."""
    times = []
    for _ in range(rounds):
        client.transport.close()
        began = time.monotonic()
        offer = {"want": 1, "slots": 1, "idle": 1, "wait": 0}
        client.request("POST", "/api/v1/lease", json=offer, timeout=30)
        times.append(time.monotonic() - began)
    return times


def is_good(figures: Dict[str, float]) -> bool:
    """Whether the worker hardly notices the others, on a computer as fast as this one is.

    Figures with most of the others gone, or of no time and no memory, tell nothing.
    """
    return figures["held"] > figures["connections"] / 2 and (
        0 < figures["lease_seconds_median"] < max(20 * figures["lease_seconds_alone"], 0.1)) and (
        10e6 < figures["memory_before"] <= figures["memory"] < 300e6)


def looks_good(figures: Dict[str, float]) -> bool:
    """Whether the worker hardly notices who looks; it tells nothing when they saw no page."""
    return figures["pages"] > 0 and 10e6 < figures["memory"] < 300e6 and (
        0 < figures["beat_seconds_median"] <= figures["beat_seconds_99"] < 0.5)


def measure(data: Path, number: int, tls: bool, rounds: int = 20) -> Dict[str, float]:
    """Open so many connections; return what a worker sees, in seconds, and the memory."""
    with coordinator(data, *(["--tls", "auto"] if tls else [])) as (pid, note):
        key = (data / "farm.key").read_text().strip()
        context = ssl._create_unverified_context() if tls else None
        url = povfarm.urllib.parse.urlsplit(note["url"])
        client = povfarm.Client(note["url"], key, fingerprint=note.get("pin", ""), retry_for=0)
        client.token = join_at(client, WORKER)
        alone = leases(client, rounds)
        before = memory(pid)
        began = time.monotonic()
        socks = open_many(url.port or 0, number, context)
        opened = time.monotonic() - began
        times = leases(client, rounds)
        held = still_open(socks)
        for sock in socks:
            sock.close()
        return {"connections": number, "held": held, "opened_seconds": round(opened, 2),
                "lease_seconds_alone": round(sorted(alone)[rounds // 2], 4),
                "lease_seconds_median": round(sorted(times)[rounds // 2], 4),
                "lease_seconds_most": round(max(times), 4),
                "memory_before": before, "memory": memory(pid)}


def submit(client: povfarm.Client, frames: int) -> int:
    """A job that nobody renders, of so many frames."""
    text = b"sphere { 0, 1 }"
    file = povfarm.FileEntry("s.pov", povfarm.hashlib.sha256(text).hexdigest(), len(text), 1.0)
    pov = povfarm.PovJob({"Input_File_Name": "s.pov", "Width": "8", "Height": "6",
                          "Final_Frame": str(frames)}, (), (povfarm.STANDARD,), ".")
    job = client.request("POST", "/api/v1/jobs", json={
        "name": "dear", "pov": pov.to_wire(), "options": {},
        "manifest": povfarm.Manifest((file,)).to_wire()}, timeout=60).json()["id"]
    return int(job)


def look(port: int, number: int, path: str, over: threading.Event, seen: List[int]) -> None:
    """Look at a page without end, as a stranger of one of four networks, none like another."""
    while not over.is_set():
        with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", port), 30, (f"127.2.{number % 4}.{1 + number % 7}", 0)) as sock:
            sock.settimeout(60)
            sock.sendall(f"GET {path}?from={number} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                         "Connection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            seen.append(int(answer[9:12] or 0))


def measure_looks(data: Path, lookers: int, frames: int, rounds: int = 100) -> Dict[str, float]:
    """Let strangers look; return how long a worker's beats take, in seconds, and the memory."""
    with coordinator(data) as (pid, note):
        key = (data / "farm.key").read_text().strip()
        admin = povfarm.Client(note["url"], key, retry_for=0)
        job, worker = submit(admin, frames), povfarm.Client(note["url"], key, retry_for=0)
        worker.token = join_at(worker, WORKER)
        over, times = threading.Event(), []
        seen: List[int] = []
        port = povfarm.urllib.parse.urlsplit(note["url"]).port or 0
        threads = [threading.Thread(target=look, args=(port, one, f"/jobs/{job}", over, seen))
                   for one in range(lookers)]
        for thread in threads:
            thread.start()
        while not seen:
            time.sleep(0.01)
        for _ in range(rounds):
            began = time.monotonic()
            worker.request("POST", "/api/v1/beat", json={"leases": {}, "wait": 0}, timeout=60)
            times.append(time.monotonic() - began)
            time.sleep(0.05)
        over.set()
        for thread in threads:
            thread.join(120)
        times.sort()
        return {"lookers": lookers, "frames": frames, "pages": seen.count(200),
                "refused": len(seen) - seen.count(200),
                "beat_seconds_median": round(times[rounds // 2], 4),
                "beat_seconds_99": round(times[rounds * 99 // 100 - 1], 4),
                "memory": memory(pid)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--lookers", type=int, default=0)
    parser.add_argument("--frames", type=int, default=100_000)
    options = parser.parse_args()
    povfarm._descriptors(2 * options.connections)  # for this end of them
    with tempfile.TemporaryDirectory(prefix="povfarm-load-") as scratch:
        if options.lookers:
            figures = measure_looks(Path(scratch), options.lookers, options.frames)
            print(json.dumps(figures, indent=1))
            sys.exit(0 if looks_good(figures) else 1)
        figures = measure(Path(scratch), options.connections, options.tls)
    print(json.dumps(figures, indent=1))
    sys.exit(0 if is_good(figures) else 1)


if __name__ == "__main__":
    main()
