"""A render on one computer talks to its own coordinator without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Iterator

import pytest

import povfarm
from helpers.base import POVFARM, need
from helpers.farm import STILL, environment, project
from povfarm import Client, Coordinator, RequestRefused, ServerGone, Within


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A client within a coordinator that is open to nobody else."""
    farm = Coordinator(tmp_path / "farm", port=None, durable=False)
    farm.start()
    assert isinstance(farm.server, povfarm.Inside)
    client = Client(farm.url, farm.key, transport=Within(farm.server), retry_for=0)
    client.farm = farm  # type: ignore[attr-defined]
    yield client
    farm.stop()


def test_answers_are_those_that_would_be_sent(client: Client, tmp_path: Path) -> None:
    farm = client.farm  # type: ignore[attr-defined]
    assert client.request("GET", "/api/v1/farm").json()["name"] == farm.name
    with pytest.raises(RequestRefused) as refusal:
        client.request("GET", "/api/v1/jobs/7?x=%20")
    assert refusal.value.status == 404
    data = os.urandom(200_000)
    (tmp_path / "blob").write_bytes(data)
    sha256 = povfarm.sha256_file(tmp_path / "blob")
    with pytest.raises(RequestRefused):  # no job names it
        client.request("PUT", f"/api/v1/blobs/{sha256}", body=tmp_path / "blob")
    farm.scheduler.store.put_blob(sha256, [data])
    client.token = "wrong"
    with pytest.raises(RequestRefused):
        client.request("POST", "/api/v1/login", json={})


def test_a_closed_client_asks_nothing_more(client: Client) -> None:
    client.transport.close()
    with pytest.raises(ServerGone):
        client.get("/api/v1/farm")


def test_who_is_stopped_is_not_told_that_it_goes_on(
        client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "_TELL_FIRST", 0.1)
    stop, said = threading.Event(), []
    client.keep_trying(said.append, stop)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(ServerGone, match="stopped before"):
        client.get("/api/v1/events?after=1000000&wait=60", timeout=90)
    assert said == []


def test_a_long_poll_ends_with_the_coordinator_and_nothing_is_answered_after_it(
        client: Client) -> None:
    farm = client.farm  # type: ignore[attr-defined]
    ends = []

    def wait() -> None:
        try:
            client.request("GET", "/api/v1/events?after=1000000&wait=60", timeout=90)
            ends.append("answered")
        except ServerGone:
            ends.append("gone")

    thread = threading.Thread(target=wait)
    thread.start()
    while not farm.server._under_way:
        assert thread.is_alive()
    farm.stop()
    thread.join(30)
    assert ends in (["answered"], ["gone"])
    with pytest.raises(ServerGone):
        client.request("GET", "/api/v1/farm")


def test_a_render_listens_on_no_port(povray: str, tmp_path: Path) -> None:
    """So there is nothing for another account of this computer to ask."""
    need("strace", shutil.which("strace") is not None, "strace is not installed")
    place = project(tmp_path, STILL)
    trace = tmp_path / "trace"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=socket,bind,listen", "-o", str(trace), *POVFARM,
         "render", "scene.pov", "+W40", "+H30"], cwd=place, env=environment(tmp_path),
        capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    calls = [line for line in trace.read_text().splitlines()
             if "listen(" in line or "AF_INET" in line]
    assert calls == []
