"""CLI: options, help, tables, the progress bar; commands themselves are in test_farm.py."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, cast

import pytest

import povfarm
from helpers.base import POVFARM, ROOT
from helpers.pictures import png
from povfarm import SETTINGS, _ProgressBar, main

COMMANDS = list(povfarm._commands())


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see the data of whoever runs it."""
    monkeypatch.setenv("POVFARM_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in text
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_shows_its_options(
        name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    first = capsys.readouterr().out
    assert main(["help", name]) == 0
    assert capsys.readouterr().out == first
    assert first.startswith(f"usage: povfarm.py {name}")


def test_every_setting_is_an_option_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for name in COMMANDS:
        main([name, "--help"])
        shown += capsys.readouterr().out
    for row in SETTINGS:
        assert f"--{row.name}" in shown


@pytest.mark.parametrize(("arguments", "words"), [
    (["nonsense"], "no command 'nonsense'"),
    (["scene.pov"], "no command 'scene.pov', as in 'povfarm.py render "),
    (["status", "--nonsense"], "--nonsense"),
    (["render", "--wait"], "'render' has no option --wait, which is for submit"),
    (["logs"], "usage: povfarm.py logs"),
    (["cancel"], "usage: povfarm.py cancel"),
    (["admit", "1", "2"], "usage: povfarm.py admit"),
    (["users", "anna"], "usage: povfarm.py users"),
    (["users", "add"], "usage: povfarm.py users"),
    (["users", "set", "anna"], "usage: povfarm.py users"),
    (["users", "set", "anna", "colour=red"], "'colour' cannot be set: there are jobs-limit"),
    (["users", "set", "anna", "jobs-limit=-1"], "'-1' is not a whole number"),
    (["users", "remove", "anna", "bert"], "usage: povfarm.py users"),
    (["work", "--cores", "none"], "--cores"),
    (["work", "--cores"], "needs a value"),
    (["serve", "--port", "70000"], "70000"),
    (["set", "1", "priority"], "KEY=VALUE"),
    (["status", "--key-file", "nowhere"], "no key can be read from nowhere: No such file or d"),
    (["status", "--key-file", "."], "no key can be read from .: Is a directory"),
    (["render", "--in-order=perhaps", "x.pov"], "perhaps"),
    (["render", "nodir"], "there is no directory, scene or INI file called 'nodir' here: look at"),
    (["help", "nonsense"], "nonsense"),
])
def test_wrong_usage_is_one_line_and_exit_code_2(
        arguments: List[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_an_environment_variable_that_is_wrong_is_named(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("POVFARM_CORES", "many")
    assert main(["doctor"]) == 2
    assert "POVFARM_CORES" in capsys.readouterr().err


def test_what_starts_with_two_dashes_is_ours_and_the_rest_povrays() -> None:
    tag, _ = povfarm._command("submit")
    options = povfarm._parse(tag, [
        "scene.pov", "--priority", "5", "+W320", "-D", "--name=my job", "+Oout/", "--wait",
        "--", "--odd"])
    assert options.rest == ["scene.pov", "+W320", "-D", "+Oout/", "--odd"]
    assert (options.priority, options.name, options.wait) == (5, "my job", True)


PROGRAMS = [
    # How it was started, with the words that Python tells, and how it is typed again.
    ("povfarm.py", ["python3", "povfarm.py"], False, "python3 povfarm.py"),
    ("povfarm.py", ["/opt/p/python3", "povfarm.py"], False, "/opt/p/python3 povfarm.py"),
    ("povfarm.py", [sys.executable, "-X", "utf8", "povfarm.py"], False, "PYTHON -X utf8 povfarm.py"),
    ("./povfarm.py", ["python3", "./povfarm.py"], False, "./povfarm.py"),
    ("./povfarm.py", ["python3.9", "./povfarm.py"], False, "python3.9 ./povfarm.py"),
    ("a b/povfarm.py", ["python3", "a b/povfarm.py"], False, 'python3 "a b/povfarm.py"'),
    ("$x/povfarm.py", ["python3", "$x/povfarm.py"], False, "python3 '$x/povfarm.py'"),
    ("venv/povfarm", ["/venv/bin/python", "venv/povfarm"], False, "venv/povfarm"),
    ("bin/povfarm", ["/venv/bin/python", "bin/povfarm"], False, "povfarm"),
    ("C:\\a b\\povfarm.py", ["python", "C:\\a b\\povfarm.py"], True, 'python "C:\\a b\\povfarm.py"'),
    ("povfarm.py", ["/Python/python.exe", "povfarm.py"], True, "py povfarm.py"),
]


@pytest.mark.parametrize("script, started, windows, typed", PROGRAMS)
def test_how_it_was_started_is_how_it_is_typed(
        script: str, started: List[str], windows: bool, typed: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("povfarm.py", "venv/povfarm", "bin/povfarm", "bin/py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o755)
    here = Path(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{here.parent}")
    assert povfarm.program_typed(script, started, windows) == typed.replace("PYTHON", here.name)


def test_what_was_typed_is_typed_again_with_all_its_options(
        monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--lan", "--discovery-port=23071", "--data=a b", "s.ini", "+W64"]
    monkeypatch.setattr(sys, "argv", ["povfarm.py", "render", *words])
    options = povfarm._parse(povfarm._command("render")[0], words)
    again = povfarm._typed(povfarm._again(options, "+C"))
    assert again.endswith('--lan --discovery-port=23071 "--data=a b" s.ini +W64 +C')
    assert again.count("--discovery-port") == again.count("--data") == 1


@pytest.mark.parametrize("words, shown", [
    (["--server", "attic", "--key-file", "my key"], ' --server attic --key-file "my key"'),
    (["--key-file=-"], ""),  # standard input is another one each time
    (["--key", "secret"], ""),
    (["--server", "attic", "--pin", "ab" * 32], f" --server attic --pin {'ab' * 32}"),
    (["--name", "my job"], ""),
])
def test_a_command_that_is_shown_is_for_the_farm_that_was_meant_and_shows_no_key(
        words: List[str], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["povfarm.py", "submit", *words, "s.pov"])
    monkeypatch.delenv("POVFARM_DATA")
    assert povfarm._typed("see 'povfarm.py status'").endswith(f" status{shown}'")


def test_a_farm_that_was_chosen_by_its_name_is_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["povfarm.py", "status", "--name", "class room"])
    monkeypatch.delenv("POVFARM_DATA")
    assert povfarm._typed("see 'povfarm.py workers'").endswith(' workers --name "class room"\'')
    assert povfarm._typed("see 'povfarm.py submit'").endswith(" submit'"), "that is a job's name"


def test_a_coordinator_is_to_be_started_again_as_it_was(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real, data = povfarm.Coordinator, str(tmp_path / "the farm")
    made: List[povfarm.Coordinator] = []

    class Killed(povfarm.Coordinator):
        def start(self) -> None:
            made.append(self)
            raise KeyboardInterrupt

    options = ["--port", "0", "--no-discovery", "--tls-cert=x/c.pem", "--name=our farm"]
    monkeypatch.setattr(povfarm, "Coordinator", Killed)
    monkeypatch.setattr(povfarm, "_tls_files", lambda options: None)
    assert main(["serve", "--data", data, *options, "--invite=3"]) == 130
    real.start(made[0])
    again = f'--port=0 --no-discovery --tls-cert={tmp_path}/x/c.pem "--name=our farm"'
    try:
        assert main(["backup", str(tmp_path / "copy"), "--data", data]) == 0
        assert f" serve --data {tmp_path}/copy {again}'" in capsys.readouterr().err
        for words in (["--data", data], ["--data", data, "--server", "x"]):
            monkeypatch.setattr(sys, "argv", ["povfarm.py", "status", *words])
            assert povfarm._typed("'povfarm.py serve'").endswith(f' serve --data "{data}" {again}\'')
    finally:
        made[0].stop()
    assert povfarm._typed("'povfarm.py serve'").endswith(f' serve --data "{data}"\'')


def test_every_line_says_who_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    povfarm._say("it broke\nall is in x.log")
    assert capsys.readouterr().err == "povfarm: it broke\npovfarm: all is in x.log\n"


def test_a_render_that_others_help_leaves_the_key_that_admits_them_and_nothing_else(
        tmp_path: Path) -> None:
    options = povfarm._parse(povfarm._command("render")[0], [
        "--lan", "--discovery-port=0", "s.pov", f"--data={tmp_path / 'data'}"])
    draft = cast(povfarm._Draft, SimpleNamespace(name="s"))
    coordinator = povfarm._private_farm(options, tmp_path, draft)
    coordinator.start()
    coordinator.stop()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["farm.key"]
    assert (tmp_path / "data" / "farm.key").read_text() == coordinator.key


@pytest.mark.parametrize("text, shown", [
    ("see 'povfarm.py status'", "see 'P status'"), ("povfarm.py work --server x", "P work --server x"),
    ("usage: povfarm.py work X", "usage: P work X"), ("povfarm.py is old", "P is old"),
    ("/opt/povfarm.py work", "/opt/povfarm.py work"), ("mypovfarm.py is", "mypovfarm.py is"),
    ("povfarm.py", "povfarm.py"),
])
def test_commands_in_messages_are_typed(text: str, shown: str) -> None:
    said: List[str] = []
    assert povfarm.with_commands(text, lambda name: said.append(name) or f"P {name}") == shown
    where = [name for name in said if name]
    assert where == (["status"] if "status" in text else ["is"] if "is old" in text else [])


def test_no_coordinator_is_told_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--discovery-port", "59999"]) == 1
    assert "povfarm.py serve" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["", "{}", "[]", "null", '{"name": "x"}', '{"name": "x", "url": 5}'])
def test_a_note_of_a_coordinator_that_cannot_be_read_is_none(
        note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """So the network is asked, where nobody is."""
    asked: List[Any] = []
    monkeypatch.setattr(povfarm, "discover", lambda *args: asked.append(args) or [])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coordinator.json").write_text(note)
    assert main(["status", "--discovery-port", "59999"]) == 1 and asked
    assert "no coordinator answers" in capsys.readouterr().err


def test_doctor_finds_this_machine_fit(povray: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert all(check["good"] for check in checks)
    assert povray in json.dumps(checks)
    assert main(["doctor", "--povray", "/nowhere/povray"]) == 1


def test_doctor_says_why_a_disk_is_of_no_use(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "_is_writable", lambda place: False)
    assert main(["doctor"]) == 1
    assert re.search(r"NO +disk .* may not write: choose .* --data", capsys.readouterr().out)


def test_the_name_of_a_farm_is_no_address_of_a_computer(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert main(["status", "--server", "studio"]) == 1
    assert "(Name unknown): no computer is known by this name" in capsys.readouterr().err


def test_a_signal_while_python_ends_shows_no_traceback() -> None:
    ending = ("import os, signal, sys, threading, povfarm; sys.argv = ['povfarm.py', 'help'];"
              "threading._register_atexit(os.kill, os.getpid(), signal.SIGINT);"
              "sys.exit(povfarm.main())")
    ended = subprocess.run([sys.executable, "-c", ending], cwd=ROOT, capture_output=True, text=True,
                           check=False)
    assert ended.returncode == -signal.SIGINT and ended.stderr == ""


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def view(**changes: Any) -> Dict[str, Any]:
    """Return a job as the API shows it."""
    frames = {"total": 30, "queued": 10, "leased": 8, "done": 12, "failed": 0, "cancelled": 0}
    slices = {"total": 0, "queued": 0, "leased": 0, "done": 0, "failed": 0, "cancelled": 0}
    return {"frames": frames, "slices": slices, "progress": 0.4, "rate": 3.2, "eta": 65.0,
            **changes}


def test_the_progress_bar_is_redrawn_on_a_terminal() -> None:
    file = Terminal()
    bar = _ProgressBar("camera2", file)
    bar.show(view())
    assert "\r" in file.getvalue() and "\n" not in file.getvalue()
    for part in ("camera2", "12/30 frames", "40 %", "3.20/s", "1:05 left"):
        assert part in file.getvalue()
    bar.close()
    assert file.getvalue().endswith("\r")


def test_the_progress_bar_stays_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    file = Terminal()
    _ProgressBar("a name that is long", file).show(view())
    assert len(file.getvalue()) == 40 and file.getvalue().startswith("\ra name that is long [")


def test_a_pipe_gets_plain_lines() -> None:
    file = io.StringIO()
    bar = _ProgressBar("camera2", file)
    assert bar.due()
    bar.show(view())
    assert not bar.due()
    assert file.getvalue().count("\n") == 1 and "\r" not in file.getvalue()


def test_slices_of_the_frames_in_work_are_counted() -> None:
    file = io.StringIO()
    frames = {**view()["frames"], "cancelled": 7}
    _ProgressBar("camera2", file).show(view(slices={"total": 8, "done": 5}, frames=frames))
    assert "5/8 slices" in file.getvalue() and "7 cancelled" in file.getvalue()


@pytest.mark.parametrize("done, part, shown", [
    (0, 0.0, False), (0, 0.004, False), (0, 0.01, True), (40, 0.004, True)])
def test_how_long_it_lasts_is_not_guessed_from_nothing(
        done: int, part: float, shown: bool) -> None:
    frames = {**view()["frames"], "total": 10_000, "done": done}
    text = _ProgressBar("camera2", Terminal()).line(view(frames=frames, progress=part, eta=900.0))
    assert ("left" in text) == ("/s" in text) == shown, text


def cpu_of(*command: str) -> float:
    """The least CPU-seconds of some runs of Python."""
    spent = []
    for _ in range(4):
        before = os.times()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        spent.append(after.children_user + after.children_system
                     - before.children_user - before.children_system)
    return min(spent)


@pytest.mark.slow
def test_a_start_is_hardly_dearer_than_to_read_the_file() -> None:
    """Python compiles it each time; all imports and tables together take less than that."""
    file = str(ROOT / "povfarm.py")
    reading = cpu_of("-c", "import sys; compile(open(sys.argv[1], 'rb').read(), '', 'exec')", file)
    assert cpu_of(file, "--version") < 2 * reading


def test_a_worker_is_removed_by_its_name_or_its_number(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    farm = povfarm.Coordinator(tmp_path / "farm", bind="127.0.0.1", durable=False)
    farm.start()
    try:
        for number, name in enumerate(("anna", "bert", "bert", "2")):
            info = povfarm.WorkerInfo(name, 1, 1, "x", {}, ())
            farm.scheduler.join(info, str(number), "10.0.0.7")
        place = ["--server", farm.url, "--key", farm.key]
        for rest, code, words in (
                (["remove", "anna"], 0, "anna is removed"), (["remove", "anna"], 2, "no worker"),
                (["remove", "bert"], 2, "several workers"), (["remove", "2"], 0, "bert is removed"),
                (["remove", "bert"], 0, "bert is removed"), (["remove", "2"], 0, "2 is removed"),
                (["drop", "anna"], 2, "usage"), (["remove"], 2, "usage")):
            assert main(["workers", *place, *rest]) == code, rest
            assert words in capsys.readouterr().err
        assert main(["workers", "--json", *place]) == 0
        assert json.loads(capsys.readouterr().out) == []
    finally:
        farm.stop()


def test_a_key_that_is_another_farms_does_not_keep_anybody_from_looking(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a farm that was killed may be that of another one by now: one looks for it."""
    farm = povfarm.Coordinator(tmp_path / "farm", bind="127.0.0.1", durable=False)
    farm.start()
    try:
        (tmp_path / "data").mkdir()
        note = (tmp_path / "farm" / "coordinator.json").read_bytes()
        (tmp_path / "data" / "coordinator.json").write_bytes(note)
        (tmp_path / "data" / "farm.key").write_text("0" * 64)
        answering: List[povfarm.Found] = []
        monkeypatch.setattr(povfarm, "discover", lambda *_: answering)
        assert main(["workers", "--json"]) == 1
        answering.append(povfarm.Found("farm", farm.access.farm_id, farm.url, False, "127.0.0.1"))
        capsys.readouterr()
        assert main(["workers", "--json"]) == 0, capsys.readouterr().err
    finally:
        farm.stop()


def test_a_file_where_a_directory_should_be_is_one_line(
        tmp_path: Path, povray: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "scene.pov").write_text("camera { location -z }")
    (tmp_path / "scene-frames").touch()
    assert main(["render", "scene"]) == 1
    error = capsys.readouterr().err
    assert "scene-frames cannot be used" in error and len(error.splitlines()) == 1


def test_an_option_may_be_longer_than_a_name(
        povray: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "Declare=size=" + "1" * 300]) == 2
    assert "no scene" in capsys.readouterr().err
    assert main(["render", "nowhere/"]) == 2
    assert "there is no directory nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_name_neither_breaks_nor_steers_the_terminal(tmp_path: Path) -> None:
    farm = povfarm.Coordinator(tmp_path / "farm", bind="127.0.0.1", durable=False)
    farm.start()
    try:
        info = povfarm.WorkerInfo("\u6771\x1b[2J\x9b2J", 1, 1, "x", {}, ())
        farm.scheduler.join(info, "1", "10.0.0.7")
        shown = subprocess.run(
            [*POVFARM, "workers", "--server", farm.url, "--key",
             farm.key], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
            text=True, check=False)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "\\u6771?[2J?2J" in shown.stdout
    finally:
        farm.stop()


def test_a_full_stop_is_not_in_the_middle_of_a_sentence() -> None:
    ended = view(state="failed", failure={"message": "it broke.", "frame": 3})
    ended["frames"] = {**ended["frames"], "total": 4, "failed": 1}
    draft = povfarm._Draft("x", *[None] * 7, True, None, None)  # type: ignore[arg-type,call-arg]
    with pytest.raises(povfarm.FarmError, match=r"^1 of 4 frames failed: it broke \(frame 3\)$"):
        povfarm._conclude(ended, [], [], draft, 1.0, argparse.Namespace(json=False, command="render"))


def test_images_of_another_size_are_told_of_in_one_line(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pov = povfarm.PovJob({"Input_File_Name": "s.pov", "Final_Frame": "60", "Width": "64",
                          "Height": "48", "Continue_Trace": "On"}, (), (), ".")
    for frame in range(1, 40):
        (tmp_path / f"s{frame:02}.png").write_bytes(png(frame, *((10, 8) if frame > 1 else (64, 48))))
    (tmp_path / "s02.png").write_bytes(b"")
    draft = povfarm._Draft("s", pov, cast(povfarm.Project, SimpleNamespace(reads=False)), pov.plan,
                          [*pov.plan.frames], tmp_path, povfarm.JobOptions(), True, cast(Any, None),
                          tmp_path)
    left = povfarm._left_to_do(draft, argparse.Namespace(command="submit", in_order=None))
    assert left.frames == [*range(2, 61)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "s02.png is rendered again: " in lines[0]
    assert "s03.png and 36 others are rendered again: the PNG picture is 10 x 8" in lines[1]


def test_a_job_that_was_cancelled_does_not_end_with_frames_that_failed(tmp_path: Path) -> None:
    ended = view(state="cancelled", reason="by hand", failure=None)
    draft = povfarm._Draft("x", *[None] * 7, True, None, None)  # type: ignore[arg-type,call-arg]
    with pytest.raises(povfarm.FarmError, match=r"^the job is cancelled: by hand$"):
        povfarm._conclude(ended, [], [], draft, 1.0, argparse.Namespace(json=False, command=""))


@pytest.mark.parametrize("state", ["active", "done"])
def test_a_job_that_has_ended_meanwhile_is_given_up_all_the_same(state: str) -> None:
    asked: List[str] = []

    class Ended:
        def request(self, method: str, path: str) -> None:
            asked.append(f"{method} {path}")
            if method == "POST":
                raise povfarm.RequestRefused(409, "job 7 is done: it cannot become cancelled")

    povfarm._give_up(cast(povfarm.Client, Ended()), 7, state)
    assert asked[-1] == "DELETE /api/v1/jobs/7"


def test_a_scene_with_ever_so_many_warnings_shows_some_and_their_number(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f'#include "{number}.inc"\n' for number in range(povfarm.MOST_WARNINGS + 50))
    (tmp_path / "s.pov").write_text(f"#if (0)\n{lines}#end\n")
    monkeypatch.chdir(tmp_path)
    options = povfarm._parse(povfarm._command("submit")[0], ["s.pov", "+W8", "+H6"])
    povfarm._draft(options, tmp_path / "scratch", povfarm._Renderer(options, None))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == povfarm.MOST_WARNINGS + 1 and said[-1] == "povfarm: there are 50 more warnings"
