"""Hooks: the owner's programs and addresses hear what happens, and none of them costs anything."""

from __future__ import annotations

import contextlib
import email.policy
import hashlib
import hmac
import http.server
import json
import re
import shutil
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest

import povfarm
from helpers import farm_in_a_box
from helpers.base import wait_until
from helpers.farm_in_a_box import Farm
from povfarm import Herald, Hook, Machines, OnlineRules, RequestRefused, UserError

farm_fixture = farm_in_a_box.farm_fixture  # what each test is given
KEEPS = "import sys; open(sys.argv[1], 'ab').write(sys.stdin.buffer.read() + b'\\n')"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "HOOK_LOOK", 0.02)


def keeper(to: Path, *events: str) -> Hook:
    """A program that appends what it is told to a file."""
    return Hook(events or tuple(povfarm.HOOKS), (sys.executable, "-c", KEEPS, str(to)))


def script(code: str, *events: str) -> Hook:
    return Hook(events or ("done",), (sys.executable, "-c", code))


@contextlib.contextmanager
def telling(farm: Farm, *hooks: Hook) -> Iterator[List[Herald]]:
    heralds = [Herald(hook, farm.api, farm.store, farm.clock) for hook in hooks]
    try:
        for herald in heralds:
            herald.start()
        yield heralds
    finally:
        for herald in heralds:
            herald.stop()


def told(path: Path, number: int) -> List[Dict[str, Any]]:
    """What a keeper was told, when it is so much."""
    def lines() -> Any:
        found = path.read_bytes().splitlines() if path.exists() else []
        return found if len(found) >= number else None
    return [json.loads(line) for line in wait_until(lines, f"{path.name} is not told")]


def words_of(process: Any) -> str:
    """The command line of a process, empty when it has ended; another may have its number."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""


def finished(farm: Farm, frames: int = 1, name: str = "ball") -> int:
    job = farm.submit(frames, name=name)
    farm.render(farm.worker())
    assert farm.state(job) == "done"
    return job


# --- what is told

def test_a_program_hears_what_happens_in_json(farm: Farm, tmp_path: Path) -> None:
    """Names of strangers are data there: what a job is called starts and changes nothing."""
    name = f"$(touch {tmp_path}/harm) `id` \"'; rm -rf"
    with telling(farm, keeper(tmp_path / "all")):
        job = finished(farm, 2, name=name)
        [done] = told(tmp_path / "all", 1)
        assert (done["event"], done["text"], done["farm"], done["worker"]) == ("done", "", "box", None)
        assert done["time"] == farm.clock.wall
        about = done["job"]
        assert {key: about[key] for key in ("id", "name", "owner", "state")} == {
            "id": job, "name": name, "owner": "admin", "state": "done"}
        assert about["frames"]["done"] == about["frames"]["total"] == 2
        assert (Path(about["directory"]) / "out1.png").is_file()

        bad, worker = farm.submit(9, retry_limit=1), farm.worker("bert")
        while farm.state(bad) == "active":
            farm.fail(worker, farm.lease(worker))
        assert farm.state(bad) == "paused"
        farm.scheduler.cancel(bad)
        by_hand = farm.submit(3)
        farm.scheduler.pause(by_hand)
        farm.scheduler.resume(by_hand)

        farm.clock.advance(31)
        farm.scheduler.expire()
        farm.clock.advance(31)
        farm.scheduler.expire()  # is said once
        said = told(tmp_path / "all", 4)[1:]
    assert (said[0]["event"], said[0]["job"]["id"]) == ("paused", bad) and said[0]["text"]
    assert [(one["event"], one["worker"], one["job"]) for one in said[1:]] == [
        ("lost", name, None) for name in ("anna", "bert")]
    assert not (tmp_path / "harm").exists()


def test_a_failed_job_and_a_full_disk_are_told(farm: Farm, tmp_path: Path) -> None:
    """The disk takes no event then, and all the same it is told, once."""
    with telling(farm, keeper(tmp_path / "all", "failed", "full")):
        job, worker = farm.submit(1, retry_limit=1), farm.worker()
        farm.fail(worker, farm.lease(worker))
        assert [one["event"] for one in told(tmp_path / "all", 1)] == ["failed"]
        farm.store._no_room()
        full = told(tmp_path / "all", 2)[1]
        assert full["event"] == "full" and "make room there" in full["text"]
        assert farm.scheduler.look_for_room() is None and not farm.store.notice
        farm.scheduler.retry(job)
        farm.fail(worker, farm.lease(worker))
        assert [one["event"] for one in told(tmp_path / "all", 3)] == ["failed", "full", "failed"]


def test_a_worker_that_left_or_waits_to_be_admitted_is_not_lost(farm: Farm, tmp_path: Path) -> None:
    with telling(farm, keeper(tmp_path / "all", "lost")):
        farm.scheduler.leave(farm.worker("left"))
        farm.worker("stranger", admitted=False)
        gone = farm.worker("gone")
        for _ in range(2):
            farm.clock.advance(31)
            farm.scheduler.expire()
        farm.scheduler.rejoin(gone, povfarm.WorkerInfo("gone", 2, 0, "Linux", {}), "192.168.1.5")
        farm.clock.advance(31)
        farm.scheduler.expire()
        assert [one["worker"] for one in told(tmp_path / "all", 2)] == ["gone", "gone"]


def test_each_event_is_told_after_a_restart_and_none_twice(farm: Farm, tmp_path: Path) -> None:
    """What happened before there was a hook is not told; what happened while it was away, is."""
    finished(farm)
    path = tmp_path / "all"
    with telling(farm, keeper(path, "done")) as [herald]:
        second = finished(farm)
        told(path, 1)
        with farm.store.read() as look:
            newest = look.last_event()
        wait_until(lambda: herald._after >= newest, "it is not noted")
    third = finished(farm)
    with telling(farm, keeper(path, "done")):
        assert [one["job"]["id"] for one in told(path, 2)] == [second, third]
        fourth = finished(farm)
        assert [one["job"]["id"] for one in told(path, 3)][-1] == fourth


def test_a_program_that_is_cut_off_by_the_end_of_the_farm_is_started_again(
        farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "all"
    code = (f"import os, time; open({str(path)!r}, 'a').write(str(os.getpid()) + chr(10)); "
            f"time.sleep(600 if os.path.getsize({str(path)!r}) < 20 else 0)")
    with telling(farm, script(code)):
        finished(farm)
        [number] = told(path, 1)
    wait_until(lambda: str(path) not in words_of(number), "it runs on")
    with telling(farm, script(code)):
        assert len(told(path, 2)) == 2


# --- hooks that are no good

def test_programs_that_hang_fail_or_flood_are_ended_and_named(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    """Each only hinders itself, and what it has started ends with it."""
    monkeypatch.setattr(povfarm, "HOOK_SECONDS", 1.0)
    child = tmp_path / "child"
    hang = script("import subprocess, sys, time; "
                  "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
                  f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)")
    flood = script("import os\nfor _ in range(1000): os.write(1, bytes(1 << 20))")
    gone = Hook(("done",), (str(tmp_path / "nowhere"),))
    fails = script("import sys; sys.exit('no mail\\x1b[31m today')")
    deaf = script("import os; os.close(0)")
    with telling(farm, hang, flood, gone, fails, deaf, keeper(tmp_path / "all", "done")):
        finished(farm)
        told(tmp_path / "all", 1)
        wait_until(lambda: sum("of event" in one for one in caplog.messages) == 4)
        finished(farm)
        wait_until(lambda: sum("of event" in one for one in caplog.messages) == 8)
        assert len(told(tmp_path / "all", 2)) == 2
    text = "\n".join(caplog.messages)
    for words in ("ran for longer than 1 seconds", "printed more than 1.0 MB", "cannot be started",
                  r"ended with code 1: no mail\?\[31m today"):
        assert len(re.findall(words, text)) == 2, text
    wait_until(lambda: "sleep(600)" not in words_of(child.read_text()), "the child runs on")


def test_bad_hooks_cost_the_farm_nothing(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor time of the same frames, with hooks that hang and flood, and without."""
    def cost() -> float:
        begun = time.process_time()
        finished(farm, 60)
        return time.process_time() - begun

    with silent() as url:
        bad = [script("import time; time.sleep(600)"), Hook(("done",), url=url, secret="x"),
               script("import os\nwhile True: os.write(1, bytes(1 << 16))")]
        ratios = []
        for _ in range(5):
            alone = cost()
            with telling(farm, *bad):
                finished(farm)
                ratios.append(cost() / alone)
            if min(ratios) < 1.2:
                break
    print(f"{alone / 60 * 1000:.2f} ms a frame, with bad hooks {min(ratios):.2f} times that")
    assert min(ratios) < 1.3, ratios


# --- addresses

class Taker(http.server.BaseHTTPRequestHandler):
    """Answers with the next of the server's answers, and keeps what it was sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.got.append((dict(self.headers), body))  # type: ignore[attr-defined]
        answers: List[int] = self.server.answers  # type: ignore[attr-defined]
        self.send_response(answers.pop(0) if answers else 204)
        self.send_header("Content-Length", "0")
        self.send_header("Location", self.server.location)  # type: ignore[attr-defined]
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def taker(*answers: int, location: str = "", tls: Optional[ssl.SSLContext] = None
          ) -> Iterator[Tuple[str, List[Tuple[Dict[str, str], bytes]]]]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Taker)
    server.got, server.answers, server.location = [], list(answers), location  # type: ignore[attr-defined]
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http{'s' * bool(tls)}://127.0.0.1:{server.server_port}/farm?to=me", server.got  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A web server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


def test_an_address_is_sent_json_that_is_signed(farm: Farm) -> None:
    with taker() as (url, got), telling(farm, Hook(("done",), url=url, secret="long text")):
        job = finished(farm)
        wait_until(lambda: got)
    headers, body = got[0]
    assert json.loads(body)["job"]["id"] == job
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Povfarm-Signature"] == "sha256=" + hmac.new(
        b"long text", body, hashlib.sha256).hexdigest()


def test_an_address_is_tried_until_it_takes_an_event_and_refusals_are_final(
        farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    with taker(503, 404, 204) as (url, got), telling(farm, Hook(("done",), url=url, secret="x")):
        jobs = [finished(farm) for _ in range(3)]
        wait_until(lambda: len(got) == 4)
    assert [json.loads(body)["job"]["id"] for _, body in got] == [jobs[0], *jobs]
    assert [re.sub(".*: ", "", one) for one in caplog.messages if "of event" in one] == [
        "the answer is 503; it is tried again", "the answer is 404"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_answer_sends_us_elsewhere(status: int, farm: Farm, tmp_path: Path) -> None:
    """Neither a hook's address, nor another farm or list of farms, nor a node."""
    (tmp_path / "private").write_text("{}")
    with taker() as (elsewhere, followed):
        for place in (elsewhere, (tmp_path / "private").as_uri()):
            with taker(*[status] * 5, location=place) as (url, got):
                address, hook = url.split("/")[2], Hook(("done",), url=url, secret="x")
                assert Herald(hook, farm.api, farm.store, farm.clock)._post(b"{}") == (
                    f"the answer is {status}", False)
                for method in ("GET", "POST"):
                    with pytest.raises(RequestRefused) as refused:
                        povfarm.Client(f"http://{address}", retry_for=0).request(method, "/x")
                    assert refused.value.status == status
                machines = Machines(farm.scheduler, farm.access, OnlineRules((), {}))
                for body in (None, {"TaskId": 1}):
                    with pytest.raises(ValueError, match="Expecting value"):
                        machines._ask(address, "status", body)
                assert len(got) == 5
        assert not followed


def test_an_address_with_tls_must_have_a_certificate_that_the_system_trusts(
        farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = povfarm.own_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with taker(tls=context) as (url, got):
        herald = Herald(Hook(("done",), url=url, secret="x"), farm.api, farm.store, farm.clock)
        problem, again = herald._post(b"{}")
        assert "certificate verify failed" in problem and again and not got
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert herald._post(b"{}") == ("", False) and got[0][1] == b"{}"
        herald._hook = Hook(("done",), url=url.replace("127.0.0.1", "127.0.0.2"), secret="x")
        assert not herald._post(b"{}")[0].startswith("the answer")


def test_the_manuals_mail_is_one(farm: Farm, tmp_path: Path) -> None:
    """Also of a name that is not ASCII, or that would add a line to its head."""
    manual = (Path(__file__).parent.parent / "docs" / "manual.md").read_text("utf-8")
    (tmp_path / "tell.py").write_text(manual.partition("```python\n")[2].partition("```")[0], "utf-8")
    sendmail = tmp_path / "sendmail"
    sendmail.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/words\ncat > {tmp_path}/mail.part\n"
                        f"mv {tmp_path}/mail.part {tmp_path}/mail\n")
    sendmail.chmod(0o755)
    hook = Hook(("done",), (sys.executable, str(tmp_path / "tell.py"), str(sendmail), "-t"))
    with telling(farm, hook):
        finished(farm, name="Kühe\nBcc: all@example.org")
        wait_until((tmp_path / "mail").exists)
    mail = email.message_from_bytes((tmp_path / "mail").read_bytes(), policy=email.policy.default)
    assert (mail["From"], mail["To"], mail["Bcc"]) == ("ann@example.org", "ann@example.org", None)
    assert mail["Subject"] == "box: Kühe Bcc: all@example.org: done"
    assert (tmp_path / "words").read_text() == "-t\n"


def test_an_address_that_never_answers_is_told_after_a_restart(
        farm: Farm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Pauses double, so it is asked seldom, and stopping does not wait for it."""
    monkeypatch.setattr(povfarm, "HOOK_ANSWER", 0.2)
    monkeypatch.setattr(povfarm, "FAREWELL", 600.0)
    with taker() as (url, got):
        hook = Hook(("done",), url=url, secret="x")
        with silent() as dead, monkeypatch.context() as patch:
            patch.setattr(Hook, "url", url, raising=False)
            with telling(farm, hook) as [herald]:
                herald._hook = Hook(("done",), url=dead, secret="x")
                job = finished(farm)
                wait_until(lambda: "no answer" in caplog.text)
                begun = time.monotonic()
            assert time.monotonic() - begun < 60
        assert not got
        with telling(farm, hook):
            wait_until(lambda: got)
        assert json.loads(got[0][1])["job"]["id"] == job


# --- what the owner writes

def lines(*given: str) -> List[Tuple[str, str, str]]:
    return [(one.partition(" = ")[0], one.partition(" = ")[2], f"line {number}")
            for number, one in enumerate(given, 1)]


def test_hooks_are_read_from_the_settings_file_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").write_text(
        "[povfarm]\non-done = true\n[hooks]\ndone, failed = false 'a b' c\n"
        "done, failed = https://example.org:8443/x?y=1\nsecret = = s\n")
    values = povfarm.configured_defaults({"POVFARM_DATA": str(tmp_path)})
    assert Hook.all_of(values["hooks-lines"], values["on-done"]) == [
        Hook(("done", "failed"), (str(shutil.which("false")), "a b", "c")),
        Hook(("done", "failed"), url="https://example.org:8443/x?y=1", secret="= s"),
        Hook(("done",), (str(shutil.which("true")),))]


@pytest.mark.parametrize("given, words", [
    (["finished = true"], "line 1: there is no event 'finished': there are done, failed, paused, "
     "lost, full, undelivered"),
    (["done, = true"], "line 1: there is no event ''"),
    (["done = nowhere --x"], "line 1: there is no program 'nowhere' that can be started"),
    (["done = "], "line 1: there is no program ''"),
    (["done = 'true"], "line 1: ''true' cannot be taken apart: No closing quotation"),
    (["done = https://example.org/x"], "line 1: the other end cannot know that we call: add the "
     "line 'secret = TEXT'"),
    (["done = http://a b", "secret = x"], "line 1: 'http://a b' is not an address"),
    (["done = http://user@host/", "secret = x"], "is not an address"),
])
def test_a_bad_hook_is_refused_with_its_place(given: Sequence[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        Hook.all_of(lines(*given))


def test_a_bad_hook_starts_no_farm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = povfarm.main(["serve", "--data", str(tmp_path / "farm"), "--port", "0",
                         "--on-done", "nowhere"])
    assert (code, capsys.readouterr().err.strip()) == (
        2, "povfarm: --on-done: there is no program 'nowhere' that can be started: write its "
           "whole path")
    assert not (tmp_path / "farm" / "farm.db").exists()
