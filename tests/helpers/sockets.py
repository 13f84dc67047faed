"""Sockets that behave badly, and ports."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Iterator

from povfarm import Beacon

KEY = b"the farm key"


class SlowLink:
    """A socket through which little goes at a time, and that only after most of the timeout.

    No time passes for that.
    """

    def __init__(self) -> None:
        self.arrived = b""
        self.timeout = 0.0

    def settimeout(self, seconds: float) -> None:
        """Set the timeout, as of a socket."""
        self.timeout = seconds

    def send(self, data: Any) -> int:
        """Take at most 1000 bytes, as a socket may."""
        self.arrived += bytes(data[:1000])
        return min(len(data), 1000)

    def sendall(self, data: Any) -> None:
        """Send in no more time than the timeout for all of it, as Python's sockets do."""
        self.send(data)
        if len(data) > 1000:
            raise socket.timeout("timed out")


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def beacon(name: str = "studio", farm_id: str = "f1", port: int = 0, key: bytes = KEY,
           url_port: int = 2271, pin: str = "") -> Iterator[Beacon]:
    one = Beacon(name, farm_id, url_port, key, port=port, pin=pin)
    one.start()
    try:
        yield one
    finally:
        one.stop()


def shared_socket(port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for name in ("SO_REUSEADDR", "SO_REUSEPORT"):
        if hasattr(socket, name):
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
    sock.bind(("", port))
    sock.settimeout(60)
    return sock


def until_closed(sock: socket.socket) -> bytes:
    data = b""
    while True:
        block = sock.recv(65536)
        if not block:
            return data
        data += block
