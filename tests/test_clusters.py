"""What the documents say to programs of others: the figures, the rules, the recipes."""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import pytest

import povfarm
from helpers.base import POVFARM, ROOT
from helpers.farm import environment
from helpers.farm_in_a_box import Farm, farm_fixture

DOCS = ROOT / "docs"

__all__ = ["farm_fixture"]


def test_rules_and_dashboard_ask_for_figures_that_there_are() -> None:
    board = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = (DOCS / "alerts.yml").read_text("utf-8")
    asked += re.findall(r"expr: (.*)", rules)
    named = {name for query in asked for name in re.findall(r"povfarm_(\w+)", query)}
    assert len(asked) > 25 and named > {"job_progress", "disk_full"}
    assert named <= set(povfarm.FIGURES)
    assert "\t" not in rules and all(len(line) - len(line.lstrip()) in (0, 2, 4, 6, 8, 10)
                                     for line in rules.splitlines())


def test_every_figure_is_described() -> None:
    text = (DOCS / "api.md").read_text("utf-8")
    assert set(re.findall(r"^\| `povfarm_(\w+)` \|", text, re.MULTILINE)) == set(povfarm.FIGURES)


# What `status --json` prints of a job, with what kind of value: programs rely on it. Add what is
# new where it is described, take nothing away.
JOB: Dict[str, Any] = {
    "id": int, "name": str, "state": str, "reason": str, "owner": str, "priority": int,
    "max_workers": int, "retry_limit": int, "in_order": bool, "created": float,
    "started": (float, type(None)), "finished": (float, type(None)), "frames": dict, "why": str,
    "cure": str, "progress": float, "elapsed": float, "rate": float, "eta": (float, type(None)),
    "cpu": float, "wall": float, "slices": dict, "slicing": str, "radiosity": str, "povray": str,
    "frame_timeout": int, "verify": int, "first": str, "order": str, "batch": int,
    "waiting_for": str}
ONE_JOB: Dict[str, Any] = {
    "width": (int, type(None)), "height": (int, type(None)), "extension": str,
    "failure": (dict, type(None)), "notice": str, "files": int, "size": int, "written": int,
    "active": bool, "last_start": (float, type(None)), "directory": str, "engine": str,
    "pov": dict}


def test_what_status_prints_for_programs_is_described_and_stays(farm: Farm) -> None:
    job = farm.submit(3)
    section = (DOCS / "api.md").read_text("utf-8").partition("### `GET /api/v1/jobs/{job}`\n")[2]
    described = set(re.findall(r'"(\w+)":|`(\w+)`', section.partition("\n### ")[0]))
    names = {name for pair in described for name in pair}
    for view, kinds in ((farm.ask("GET", "/api/v1/jobs").json()["jobs"][0], JOB),
                        (farm.ask("GET", f"/api/v1/jobs/{job}").json(), {**JOB, **ONE_JOB})):
        wrong = [name for name, kind in kinds.items()
                 if name not in view or not isinstance(view[name], kind)]
        assert wrong == []
        assert set(view) - names == set(), "not in api.md"
    assert set(view["frames"]) == {"total", *map(str, povfarm.TaskState)}


def named_by(file: Any) -> str:
    """How systemd names the stream that leads to the journal."""
    stream = os.fstat(file.fileno())
    return f"{stream.st_dev}:{stream.st_ino}"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd is Linux's")
def test_systemd_is_told_that_a_coordinator_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard, open(tmp_path / "log", "w+b") as log:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(60)
        process = subprocess.Popen(
            [*POVFARM, "serve", "--bind", "127.0.0.1", "--port", "0", "--no-discovery"],
            stdout=subprocess.DEVNULL, stderr=log, env={
                **environment(tmp_path), "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "WATCHDOG_USEC": "200000", "JOURNAL_STREAM": named_by(log)})
        try:
            assert [heard.recv(1000) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            assert (tmp_path / "farm" / "coordinator.json").exists()  # it was not ready before
            process.send_signal(signal.SIGTERM)
            told: List[bytes] = []
            while not told or not told[-1].startswith(b"STATUS="):
                told.append(heard.recv(1000))
            assert told[-2:] == [b"STOPPING=1", b"STATUS=stopping"]
            assert process.wait(60) == 130
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        assert log.read() == b"<6>stopping\n"


@pytest.mark.slow
@pytest.mark.parametrize("into_journal, head", [(True, "<3>"), (False, "povfarm: ")])
def test_the_journal_is_told_how_bad_a_line_is(into_journal: bool, head: str, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w+b") as log, open(tmp_path / "other", "wb") as other:
        done = subprocess.run(
            [*POVFARM, "status", "--server", "http://127.0.0.1:9"], stderr=log, check=False,
            env={**environment(tmp_path), "JOURNAL_STREAM": named_by(log if into_journal else other)})
        log.seek(0)
        said = log.read().decode()
    assert done.returncode == 1
    assert [line[:len(head)] for line in said.splitlines()] == [head] * said.count("\n")


def test_who_hangs_or_fails_is_not_called_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    told: List[str] = []
    answers = iter([povfarm.ServerGone("it does not answer"), None])

    def alive() -> None:
        answer = next(answers)
        if answer:
            raise answer
    monkeypatch.setattr(povfarm, "_tell_systemd", told.append)
    monkeypatch.setattr(povfarm.time, "sleep", lambda seconds: told.append(f"slept {seconds}"))
    with pytest.raises(StopIteration):
        povfarm._reassure(alive, 7.0)
    assert told == ["slept 7.0", "WATCHDOG=1", "slept 7.0"]


def unit(name: str) -> configparser.ConfigParser:
    """A unit of the documents."""
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read_string((DOCS / "clusters" / name).read_text("utf-8"))
    return read


@pytest.mark.parametrize("command", ["serve", "work"])
def test_units_start_what_there_is(command: str) -> None:
    service = unit(f"povfarm-{command}.service")["Service"]
    words = service["ExecStart"].split()
    assert words[1] == command and service["Type"] == "notify" and service["SuccessExitStatus"] == "130"
    options = {row.name for row in povfarm.SETTINGS if command in row.commands.split()}
    assert {word[2:] for word in words if word.startswith("--")} <= options
    assert words[-1] == f"/var/lib/{service['StateDirectory']}"
    # Renderers do not survive a SIGTERM, so only the worker may be sent it.
    assert service.get("KillMode") == ("mixed" if command == "work" else None)
    assert povfarm.parse_duration(service["TimeoutStopSec"].replace("min", "m")) > povfarm.PATIENCE \
        if command == "work" else True


def recipes() -> List[str]:
    """Every command of povfarm in the recipes."""
    texts = [path.read_text("utf-8") for path in (DOCS / "clusters").iterdir()]
    texts = [text.replace("\\\n", " ") for text in [*texts, (DOCS / "clusters.md").read_text("utf-8")]]
    found = [line for text in texts for line in re.findall(r"povfarm(?:\.py)? ((?:serve|work|render) [^\n`;|]*)", text)]
    return found + [", ".join(words.split(", ")).replace(", ", " ") for text in texts
                    for words in re.findall(r"args: \[([^\]]*)\]", text)]


def test_recipes_use_options_that_there_are() -> None:
    assert len(recipes()) > 10
    for line in recipes():
        command = line.split()[0]
        options = {row.name for row in povfarm.SETTINGS if command in row.commands.split()
                   or (command == "render" and "job" in row.commands.split())}
        used = set(re.findall(r"(?<!\S)--([a-z-]+)", line))
        assert used <= options, line


def test_no_variable_of_kubernetes_is_taken_for_an_option() -> None:
    text = (DOCS / "clusters" / "kubernetes.yaml").read_text("utf-8")
    parts = text.split("\n---\n")
    assert [re.findall(r"^kind: (\w+)", part, re.MULTILINE) for part in parts] == [
        ["PersistentVolumeClaim"], ["Service"], ["Deployment"], ["Deployment"], ["Job"]]
    assert "metadata: {name: povfarm" not in text
    for part in parts[2:]:
        assert "enableServiceLinks: false" in part and "runAsNonRoot: true" in part
    for part in parts[3:]:
        grace = re.search(r"terminationGracePeriodSeconds: (\d+)", part)
        assert grace and int(grace[1]) > povfarm.PATIENCE + 30


def test_nginx_waits_longer_than_workers_do() -> None:
    text = (DOCS / "clusters" / "nginx.conf").read_text("utf-8")
    seconds = re.search(r"proxy_read_timeout (\d+)s;", text)
    assert seconds and int(seconds[1]) > povfarm.LEASE_WAIT
    assert text.count("{") == text.count("}") == text.count("http { }") + 2


@pytest.mark.parametrize("name", ["slurm-work.sbatch", "slurm-render.sbatch"])
def test_scripts_of_slurm_are_scripts(name: str) -> None:
    subprocess.run(["sh", "-n", str(DOCS / "clusters" / name)], check=True)
