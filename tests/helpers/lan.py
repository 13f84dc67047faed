"""Hosts on a network of their own, for tests of what computers do with each other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
import sys
from typing import Iterator, List

import pytest

from helpers.base import need

_NETWORK = 0x40000000  # CLONE_NEWNET


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Lan:
    """Hosts 10.77.0.1, 2, ... on one bridge, each a network namespace without other routes."""

    def __init__(self, hosts: int) -> None:
        tag = f"pf{random.randrange(10**6):06}"
        self.switch = f"{tag}s"
        self.hosts = [f"{tag}h{n}" for n in range(1, hosts + 1)]

    def __enter__(self) -> Lan:
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
            ip("-n", self.switch, "link", "set", "br0", "up")
            for number, host in enumerate(self.hosts, 1):
                ip("netns", "add", host)
                ip("-n", host, "link", "add", "eth0", "type", "veth",
                   "peer", "name", f"port{number}", "netns", self.switch)
                ip("-n", self.switch, "link", "set", f"port{number}", "master", "br0", "up")
                ip("-n", host, "addr", "add", f"10.77.0.{number}/16", "brd", "+", "dev", "eth0")
                for name in ("lo", "eth0"):
                    ip("-n", host, "link", "set", name, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.hosts, self.switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def command(self, number: int, *args: str) -> List[str]:
        """A command line that runs on a host."""
        return ["ip", "netns", "exec", self.hosts[number - 1], *args]

    def python(self, number: int, script: str, *args: str) -> List[str]:
        """A script that runs on a host."""
        return self.command(number, sys.executable, "-c", script, *args)

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        """Be a program on a host: this thread's sockets, and those of threads that it starts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.hosts[number - 1]}", os.O_RDONLY)
        system = ctypes.CDLL(None, use_errno=True)
        try:
            assert system.setns(there, _NETWORK) == 0, os.strerror(ctypes.get_errno())
            yield
        finally:
            assert system.setns(before, _NETWORK) == 0, os.strerror(ctypes.get_errno())
            os.close(there)
            os.close(before)


def why_no_lan() -> str:
    """Say why there can be no hosts here; nothing where there can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and the ip program: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Lan(1):
            return ""
    except (subprocess.CalledProcessError, OSError) as error:
        return f"there are no network namespaces here: {getattr(error, 'stderr', error)}"


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    """Three hosts."""
    need("netns", not why_no_lan(), why_no_lan())
    with Lan(3) as one:
        yield one
