"""What somebody meets who is new: the README's commands, and what is printed in three terminals."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Iterator, List

import pytest

from helpers.base import POVFARM, ROOT
from helpers.farm import stop_renderer
from helpers.sockets import free_port

TYPED = subprocess.run([str(ROOT / ".ci" / "run"), "--print"], stdout=subprocess.PIPE, text=True,
                       check=True).stdout.splitlines()


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# --- the README

@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("sudo", [True, False])
def test_the_readmes_commands_run_with_sudo_and_for_root_without_it(
        shell: str, sudo: bool, tmp_path: Path) -> None:
    """Each of their programs is one that only writes down what it was told."""
    note = f'echo "$(basename "$0") $*" >> {tmp_path}/story'
    for name in ("bin/apt-get", "bin/python3", ".venv/bin/pip", ".venv/bin/python"):
        program(tmp_path / name, note)
    if sudo:
        program(tmp_path / "bin" / "sudo", 'printf "sudo " >> ' f'{tmp_path}/story; "$@"')
    (tmp_path / "bin" / "basename").symlink_to(shutil.which("basename") or "")
    story: List[str] = []
    for command in TYPED:
        assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        subprocess.run([shutil.which(shell) or shell, "-c", command], cwd=tmp_path, check=True,
                       env={"PATH": str(tmp_path / "bin")})
        story += (tmp_path / "story").read_text().splitlines()
        (tmp_path / "story").unlink()
    by = "sudo " if sudo else ""
    assert story == [
        f"{by}apt-get update", f"{by}apt-get install -y python3 povray",
        "python3 povfarm.py render examples/animtest",
        f"{by}apt-get update", f"{by}apt-get install -y povray povray-examples python3-venv",
        "python3 -m venv .venv", "pip install -q pytest pytest-xdist",
        "python -m pytest -n auto"]


# --- three terminals

SCENE = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 1, -5> look_at 0 }
light_source { <5, 5, -5>, 1 }
sphere { 0, 1 pigment { rgb 1 } }
"""


WAY = f"{sys.executable} {ROOT / 'povfarm.py'}"
STARTED = " ".join(POVFARM)  # which does the same, and is compiled once for all tests


class Terminals:
    """Programs that are typed in one directory, below the home of its user."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.started: List["subprocess.Popen[str]"] = []
        place.mkdir()
        (place / "scene.pov").write_text(SCENE)
        self.environ = {**os.environ, "HOME": str(place.parent), "TMPDIR": str(place.parent),
                        "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
        for name in [name for name in self.environ if name.startswith("POVFARM")]:
            del self.environ[name]

    def start(self, typed: str) -> "subprocess.Popen[str]":
        """Type a command, the output of which is then read line by line."""
        one = subprocess.Popen(["sh", "-c", f"exec {typed.replace(WAY, STARTED)}"], cwd=self.place,
                               env=self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
        self.started.append(one)
        return one

    def run(self, typed: str, code: int = 0) -> str:
        """Type a command and return all that it says."""
        done = subprocess.run(["sh", "-c", typed.replace(WAY, STARTED)], cwd=self.place,
                              env=self.environ, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                              check=False)
        assert done.returncode == code, done.stdout
        return done.stdout

    def close(self) -> None:
        for one in reversed(self.started):
            one.terminate()
            assert one.stdout is not None
            one.stdout.close()
            one.wait(60)


def until(process: "subprocess.Popen[str]", words: str) -> str:
    """Read what a program says until there are these words; return all of it."""
    said = ""
    assert process.stdout is not None
    enough = threading.Timer(120, process.kill)  # or a test that fails would not end
    enough.start()
    try:
        while words not in said:
            line = process.stdout.readline()
            assert line, f"it ended without {words!r}: {said}"
            said += "" if "this worker runs as root" in line else line
    finally:
        enough.cancel()
    return said


@pytest.fixture
def terminals(tmp_path: Path, povray: str) -> Iterator[Terminals]:
    one = Terminals(tmp_path / "my scenes")
    yield one
    one.close()


@pytest.mark.parametrize("program, way", [
    ("povfarm.py", "python3 povfarm.py"), ("a b/povfarm.py", '"a b/povfarm.py"'),
    ("bin/povfarm", "povfarm")])
def test_what_serve_prints_runs_as_it_is_printed(
        program: str, way: str, terminals: Terminals) -> None:
    (terminals.place / program).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "povfarm.py", terminals.place / program)
    (terminals.place / program).chmod(0o755)
    port = free_port(socket.SOCK_DGRAM)
    serve = terminals.start(f'{way} serve --port 0 --data "the farm" --discovery-port {port}')
    said = until(serve, "Ctrl-C")
    typed = [line.partition(way)[2] for line in said.splitlines() if f" {way} " in line]
    assert [line.split()[0] for line in typed] == ["work", "admit", "submit", "work"], said
    assert "renders nothing itself" in said
    works, admits, submits, works_here = (way + line for line in typed)
    assert terminals.run(submits) == (
        f"1\npovfarm: job 1 waits: no worker is there: start one with '{works_here}'\n")
    where = f'--data "{terminals.place}/the farm" --discovery-port {port}'
    assert f"take the id from '{way} workers {where}'\n" in terminals.run(
        f"{way} workers remove nobody {where}", 2)
    if way == "povfarm":  # it does not take so many
        elsewhere = terminals.start(f"{works} --until-idle --worker-name elsewhere")
        code = re.search(r"the code (\w{6}),", until(elsewhere, "waiting to be let in"))
        assert code
        terminals.run(admits.replace("CODE", code[1]))
        assert elsewhere.wait(60) == 0
        assert terminals.run(submits).startswith("2\n")
        terminals.run(f"{works_here} --until-idle")
        assert terminals.run(f"{way} status {where}").count("done") == 2
    url = json.loads((terminals.place / "the farm" / "coordinator.json").read_text())["url"]
    page = re.sub("<[^>]*>", "", urllib.request.urlopen(url).read().decode())
    assert f"To make changes: {way} login {where}" in html.unescape(page)


def test_the_settings_of_the_data_directory_that_is_typed_are_read(terminals: Terminals) -> None:
    (terminals.place / "srv").mkdir()
    (terminals.place / "srv" / "povfarm.ini").write_text(
        f"[povfarm]\nname = attic\nport = 0\nno-discovery = yes\npovray = {terminals.place}\n")
    assert "povfarm 'attic' is at" in until(terminals.start(f"{WAY} serve --data srv"), "Ctrl-C")
    assert f"{terminals.place}" in terminals.run(f"{WAY} work --data srv", 2)  # no renderer
    (terminals.place / "srv" / "povfarm.ini").write_text("[povfarm]\n\ncores = few\n")
    assert terminals.run(f"{WAY} status --data srv", 2).startswith(
        f"povfarm: {terminals.place}/srv/povfarm.ini, line 3: cores: 'few' is not a whole number from 1 up")


class Farm:
    """A coordinator of which the others know nothing but what it calls out, and its name."""

    def __init__(self, terminals: Terminals, name: str, port: int, more: str = "") -> None:
        self.name = name
        self.talk = f'--data "{terminals.place / name}" --discovery-port {port}'
        self.process = terminals.start(f"{WAY} serve --port 0 {self.talk} --name {name} {more}")
        until(self.process, "Ctrl-C")
        note = json.loads((terminals.place / name / "coordinator.json").read_text())
        self.port = note["url"].rpartition(":")[2]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def test_a_worker_says_that_it_works_when_it_is_let_in(terminals: Terminals) -> None:
    port = free_port(socket.SOCK_DGRAM)
    farm = Farm(terminals, "attic", port)
    worker = terminals.start(f"{WAY} work --server 127.0.0.1:{farm.port} --data w --cores 1 "
                             f"--discovery-port {port}")
    said = until(worker, "waiting to be let in")
    assert "working for" not in said
    code = re.search(r"the code (\w{6}),", said)
    assert code and f"the admit command that it has printed, with {code[1]}\n" in said
    submitted = terminals.run(f"{WAY} submit scene.pov +W32 +H24 {farm.talk}")
    assert "1 worker waits to be let in" in submitted and f"'{WAY} admit {farm.talk} CODE'" in submitted
    assert "1 worker waits to be let in" in terminals.run(f"{WAY} status {farm.talk}")
    terminals.run(f"{WAY} admit {code[1]} {farm.talk}")
    assert until(worker, "working for").count("\n") == 1
    again = terminals.run(f"{WAY} work --data w --server 127.0.0.1:1", 1)
    assert again.startswith("povfarm: a worker runs on this computer already") and "--worker-name" in again


def test_a_worker_is_let_into_a_render_from_another_terminal(terminals: Terminals) -> None:
    """As the render itself says how; its worker is held, or it would be done before that."""
    calls = f"--discovery-port {free_port(socket.SOCK_DGRAM)}"
    render = terminals.start(f"{WAY} render --lan scene.pov +W32 +H24 {calls}")
    said = re.search(rf"others help with: ({WAY} work --server \S+) \(and to let them in, here: "
                     rf"({WAY} admit --server \S+) CODE,", until(render, "others help with"))
    assert said, "it does not say how"
    held = stop_renderer(terminals.place.parent)
    try:
        worker = terminals.start(f"{said[1]} --data w {calls}")
        code = re.search(r"the code (\w{6}),", until(worker, "waiting to be let in"))
        assert code
        assert "log in first" in terminals.run(f"{said[2]} {code[1]} --data w", 1)
        assert "may work now" in terminals.run(f"{said[2]} {code[1]}")
        until(worker, "working for")
    finally:
        os.kill(int(held), signal.SIGCONT)
    assert render.wait(60) == 0


def test_a_worker_waits_for_the_address_that_it_was_given(terminals: Terminals) -> None:
    port, calls = free_port(), free_port(socket.SOCK_DGRAM)
    worker = terminals.start(f"{WAY} work --server 127.0.0.1:{port} --data w --discovery-port {calls}")
    assert "does not answer (Connection refused)" in until(worker, "trying again until it answers")
    farm = Farm(terminals, "attic", calls, f"--port {port} --open")
    assert f"working for http://127.0.0.1:{farm.port}" in until(worker, "working for")
    farm.stop()
    assert until(worker, "trying again until it answers").count("\n") == 1
    stopped = terminals.start(f"{WAY} work --server 127.0.0.1:1 --data v --discovery-port {calls} "
                              "--worker-name second")
    until(stopped, "trying again until it answers")
    stopped.terminate()
    assert stopped.wait(60) == 130


def test_a_worker_goes_back_to_its_farm_though_another_has_appeared(terminals: Terminals) -> None:
    port = free_port(socket.SOCK_DGRAM)
    one = Farm(terminals, "one", port, "--open")
    work = f"{WAY} work --data w --discovery-port {port}"
    worker = terminals.start(work)
    assert f":{one.port} " in until(worker, "working for")
    two = Farm(terminals, "two", port, "--open")
    worker.terminate()
    worker.wait(60)
    worker = terminals.start(work)
    assert f":{one.port} " in until(worker, "working for")
    worker.terminate()
    worker.wait(60)
    one.stop()
    worker = terminals.start(work)
    said = until(worker, "waiting for one, which has let this computer in")
    assert f"here is two (http://127.0.0.1:{two.port})" in said
    one = Farm(terminals, "one", port, "--open")
    assert f":{one.port} " in until(worker, "working for")


def test_a_new_worker_does_not_end_because_there_are_two_coordinators(
        terminals: Terminals) -> None:
    port = free_port(socket.SOCK_DGRAM)
    one, two = (Farm(terminals, name, port, "--open") for name in ("one", "two"))
    worker = terminals.start(f"{WAY} work --data w --discovery-port {port}")
    said = until(worker, "Waiting until one is alone")
    assert f"one (http://127.0.0.1:{one.port}), two (http://127.0.0.1:{two.port})" in said
    named = terminals.start(f"{WAY} work --data v --discovery-port {port} --name two")
    assert f":{two.port} " in until(named, "working for")
    one.stop()
    assert f":{two.port} " in until(worker, "working for")
