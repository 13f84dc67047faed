"""TLS from end to end: real certificates, real processes, and everything that can be wrong with it."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest

import povfarm
from helpers.base import POVFARM, need
from helpers.sockets import shared_socket
from helpers.trust import join_at
from povfarm import Client, Coordinator, RequestRefused, ServerGone, UserError, own_certificate
from tools.load import coordinator

SCENE = "camera { location -3*z look_at 0 } light_source { -5, 1 } sphere { 0, 1 pigment { rgb 1 } }"


@pytest.fixture(autouse=True)
def _needs_openssl() -> None:
    need("openssl", shutil.which("openssl") is not None, "apt-get install openssl")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuple[Path, Dict[str, Any]]]:
    """A coordinator in its own process with ``--tls auto``: its data, and where it says it is."""
    need("openssl", shutil.which("openssl") is not None, "apt-get install openssl")
    data = tmp_path_factory.mktemp("served")
    with coordinator(data, "--tls", "auto") as (_, note):
        yield data, note


def run(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HOME": str(tmp_path), "POVFARM_DATA": str(tmp_path / "own")}
    return subprocess.run([*POVFARM, *arguments], text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False,
                          cwd=tmp_path, env=environment)


def test_a_certificate_is_made_once_and_its_key_is_only_ours(tmp_path: Path) -> None:
    first = own_certificate(tmp_path, ["Render.example.org", "no$name"])
    before = [path.read_bytes() for path in first]
    assert own_certificate(tmp_path) == first
    assert [path.read_bytes() for path in first] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tls.crt", "tls.key"]
    if os.name == "posix":
        assert stat.S_IMODE(first[1].stat().st_mode) == 0o600
    shown = subprocess.run(["openssl", "x509", "-in", str(first[0]), "-noout", "-text",
                            "-fingerprint", "-sha256"], check=True, capture_output=True, text=True)
    assert "DNS:render.example.org" in shown.stdout and "no$name" not in shown.stdout
    assert f"DNS:{socket.gethostname().lower()}" in shown.stdout
    farm = Coordinator(tmp_path / "farm", bind="127.0.0.1", tls=first, durable=False)
    farm.stop()
    assert farm.pin == shown.stdout.partition("Fingerprint=")[2].strip().replace(":", "").lower()
    assert farm.url.startswith("https://127.0.0.1:")


def test_a_certificate_may_have_words_around_it(tmp_path: Path) -> None:
    certificate, key = own_certificate(tmp_path)
    words = tmp_path / "words.pem"
    words.write_bytes("Für die Farm\n".encode() + certificate.read_bytes() * 2)
    pins = []
    for one in (certificate, words):
        farm = Coordinator(tmp_path / "farm", bind="127.0.0.1", tls=(one, key), durable=False)
        farm.stop()
        pins.append(farm.pin)
    assert pins[0] == pins[1]


def test_without_openssl_one_line_says_what_to_do(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get install openssl\), or .* --tls-cert") as caught:
        own_certificate(tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["other key", "no key", "no certificate", "encrypted", "noise"])
def test_a_certificate_that_cannot_be_used_is_told_in_one_line(what: str, tmp_path: Path) -> None:
    certificate, key = own_certificate(tmp_path / "one")
    if what == "other key":
        key = own_certificate(tmp_path / "two")[1]
    elif what == "encrypted":  # nobody is asked for its password
        locked = tmp_path / "locked.pem"
        subprocess.run(["openssl", "ec", "-in", str(key), "-aes256", "-passout", "pass:secret",
                        "-out", str(locked)], check=True, capture_output=True)
        key = locked
    elif what == "noise":
        certificate = tmp_path / "noise.pem"
        certificate.write_bytes(os.urandom(2000))
    else:
        key, certificate = (tmp_path / "none", certificate) if what == "no key" else (
            key, tmp_path / "none")
    with pytest.raises(UserError, match=r"cannot be used: \S") as caught:
        Coordinator(tmp_path / "farm", bind="127.0.0.1", tls=(certificate, key), durable=False)
    assert "\n" not in str(caught.value)


def test_the_printed_worker_command_works_and_a_wrong_pin_is_refused(
        povray: str, tmp_path: Path) -> None:
    (tmp_path / "scene.pov").write_text(SCENE)
    farm_data = tmp_path / "farm"
    command = [*POVFARM, "serve", "--data", str(farm_data),
               "--port", "0", "--no-discovery", "--tls", "auto"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout is not None
            lines = [serve.stdout.readline() for _ in range(5)]
            note = json.loads((farm_data / "coordinator.json").read_text())
            assert "/login/" in lines[1] and "https://127.0.0.1:" in lines[1]
            typed = shlex.split(lines[2].partition("povfarm.py ")[2])
            assert typed[0] == "work" and typed[-2:] == ["--pin", note["pin"]]
            typed[1:1] = ["--key-file", str(farm_data / "farm.key")]  # or it waits to be let in
            queued = run(tmp_path, "submit", "scene.pov", "+W40", "+H30", "--data", str(farm_data))
            assert queued.returncode == 0, queued.stderr
            worked = run(tmp_path, *typed, "--until-idle")
            assert worked.returncode == 0 and "rendered 1 frame" in worked.stderr, worked.stderr
            wrong = run(tmp_path, *typed[:-1], "0" * 64, "--until-idle")
            assert wrong.returncode == 2 and "another certificate" in wrong.stderr
            without = run(tmp_path, *typed[:-2], "--until-idle")
            assert without.returncode == 2 and "not trusted" in without.stderr
            assert "--pin" in without.stderr and "\n" not in without.stderr.strip()
        finally:
            serve.terminate()
            serve.wait(60)


@pytest.mark.slow
def test_the_key_goes_nowhere_when_the_certificate_is_another(
        served: Tuple[Path, Dict[str, Any]]) -> None:
    _, note = served
    farm = Client(note["url"], "the farm key", fingerprint="0" * 64, retry_for=0)
    with pytest.raises(UserError, match="another certificate"):
        farm.request("GET", "/api/v1/farm")
    with pytest.raises(UserError, match="not trusted"):
        Client(note["url"], "the farm key", retry_for=0).request("GET", "/api/v1/farm")


@pytest.mark.slow
def test_a_login_over_tls_is_only_ever_sent_over_tls(
        served: Tuple[Path, Dict[str, Any]]) -> None:
    data, note = served
    farm = Client(note["url"], (data / "farm.key").read_text(), fingerprint=note["pin"])
    link = farm.request("POST", "/api/v1/login", json={}).json()["path"]
    context = ssl.create_default_context(cafile=str(data / "tls.crt"))  # its names are right
    port = int(note["url"].rpartition(":")[2])
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=context)
    connection.request("GET", link)
    answer = connection.getresponse()
    cookie = answer.getheader("Set-Cookie") or ""
    assert answer.read() == b"" and answer.status == 303
    assert {part.strip() for part in cookie.split(";")[1:]} == {
        "HttpOnly", "SameSite=Strict", f"Path={answer.getheader('Location')}", "Secure"}
    connection.request("GET", f"{answer.getheader('Location')}computers",
                       headers={"Cookie": cookie.partition(";")[0]})
    page = connection.getresponse().read().decode()
    assert "Log out" in page and f"--server https://127.0.0.1:{port} --pin {note['pin']}" in page
    connection.close()


@pytest.mark.slow
def test_a_worker_that_waits_for_work_over_tls_can_be_stopped(
        served: Tuple[Path, Dict[str, Any]]) -> None:
    """What TLS itself sends on a new connection is not taken for the beginning of an answer."""
    data, note = served
    key = (data / "farm.key").read_text()
    farm = Client(note["url"], key, fingerprint=note["pin"])
    joined = join_at(farm, {
        "name": "anna", "cores": 1, "memory": 1 << 30, "system": "Linux",
        "engines": {"povray": "3.7"}, "tags": []})
    worker, stop = Client(note["url"], joined, fingerprint=note["pin"]), threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(ServerGone, match="stopped"):
        worker.request("POST", "/api/v1/lease", json={
            "want": 1, "slots": 1, "idle": 1, "wait": 20}, stop=stop)  # then it would answer


@pytest.mark.slow
def test_who_mixes_http_and_https_up_is_told_so_at_once(
        served: Tuple[Path, Dict[str, Any]], tmp_path: Path) -> None:
    _, note = served
    with pytest.raises(RequestRefused, match="speaks TLS: write https://"):
        Client(note["url"].replace("https", "http"), retry_for=30).request("GET", "/api/v1/farm")
    plain = Coordinator(tmp_path, bind="127.0.0.1", durable=False)
    plain.start()
    try:
        with pytest.raises(UserError, match="speaks no TLS: write http://"):
            Client(plain.url.replace("http", "https"), retry_for=30).request("GET", "/")
        done = run(tmp_path, "status", "--server", plain.url, "--pin", "0" * 64)
        assert done.returncode == 2 and "speaks no TLS, which --pin asks for" in done.stderr
    finally:
        plain.stop()


@pytest.mark.slow
@pytest.mark.parametrize("key", [True, False], ids=["with the key", "without it"])
def test_a_worker_that_found_it_by_udp_pins_what_the_coordinator_said(
        key: bool, tmp_path: Path) -> None:
    with shared_socket() as free:
        port = free.getsockname()[1]
    farm = Coordinator(tmp_path / "farm", discovery_port=port, durable=False,
                       tls=own_certificate(tmp_path / "farm"))
    farm.start()
    try:
        more = ["--key", farm.key] if key else []
        listed = run(tmp_path, "workers", "--discovery-port", str(port), *more)
        assert listed.returncode == 0 and "no worker has joined" in listed.stdout, listed.stderr
    finally:
        farm.stop()


@pytest.mark.parametrize("text, tls, expected", [
    ("farm", False, "http://farm:2271"), ("farm", True, "https://farm:2271"),
    ("farm:80", True, "https://farm:80"), ("http://farm", False, "http://farm:2271"),
    ("https://farm", False, "https://farm:2271"),
    ("https://farm:443", False, "https://farm:443"), ("https://farm/", True, "https://farm:2271/"),
    ("https://farm:2271", True, "https://farm:2271"),
])
def test_an_address_is_completed(text: str, tls: bool, expected: str) -> None:
    assert povfarm._server_url(text, tls) == expected
