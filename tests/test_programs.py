"""Programs that render in POV-Ray's place: what they are given, what they print, and Blender."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import pytest

from helpers.base import ROOT, need, wait_until
from helpers.farm import Farm, run
from helpers.pictures import pixels
from povfarm import (
    LeaseSpec,
    OnlineRules,
    Program,
    ProgramText,
    Run,
    TaskSpec,
    UserError,
    engine_fits,
    owned_programs,
    program_job,
    unsliceable,
    unverifiable,
)

WORDS = ("-b -noaudio --factory-startup $RENDERONLINE:@uploaded_file -t $RENDERONLINE:@threads "
         "-o $RENDERONLINE:@output -F $RENDERONLINE:output_format -x 1 "
         "-s $RENDERONLINE:start_frame -e $RENDERONLINE:end_frame -a")
NOTHING: Mapping[str, str] = {}
ARGUMENTS = """
argument start_frame = natural
argument end_frame = natural
argument output_format = word
argument quality = natural [1-9]
"""


def rules(words: str = WORDS, name: str = "blender", **more: Any) -> OnlineRules:
    text = f"engine {name} = .blend {words}{ARGUMENTS}"
    return OnlineRules.of([(*map(str.strip, line.partition("=")[::2]), "here")
                           for line in text.splitlines() if line], **more)


def run_of(place: Path, frames: Tuple[int, ...] = (3, 4), arguments: Mapping[str, str] = NOTHING,
           **values: str) -> Run:
    wanted = {"Initial_Frame": "1", "Final_Frame": "12", "Output_File_Type": "N", **values}
    pov = program_job("blender", "a b.blend", wanted, "out/film", arguments)
    tasks = tuple(TaskSpec(n, n, Path(pov.plan.output_name(n)).name) for n in frames)
    lease = LeaseSpec("ab", 1, "job", 2, tasks, "0" * 64, pov, False)
    return Run(lease, place / "tree", place / "run", frames)


def program(words: str = WORDS) -> Program:
    mine = rules(words)
    return Program(mine.engines[0], mine, "/opt/blender")


# --- what it is given

def test_the_owners_words_become_a_list_with_the_runs_own_values(tmp_path: Path) -> None:
    command = program().command(run_of(tmp_path))
    image = f"{tmp_path}/run/image"
    assert command.argv == (
        "/opt/blender", "-b", "-noaudio", "--factory-startup", f"{tmp_path}/tree/a b.blend",
        "-t", "2", "-o", image, "-F", "PNG", "-x", "1", "-s", "3", "-e", "4", "-a")
    assert set(command.environment) == {"HOME", "TMPDIR", "PATH", "LANG"}
    assert command.environment["HOME"] == str(tmp_path / "run")


def test_a_still_is_the_frame_that_was_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, (0,), Initial_Frame="1", Final_Frame="1", Output_File_Type="J")
    argv = program().command(run).argv
    assert argv[argv.index("-s") + 1] == argv[argv.index("-e") + 1] == "1"
    assert argv[argv.index("-F") + 1] == "JPEG"


def test_a_jobs_value_is_held_to_the_owners_types(tmp_path: Path) -> None:
    one = program("$RENDERONLINE:@uploaded_file -q$RENDERONLINE:quality -o $RENDERONLINE:@output")
    assert "-q7" in one.command(run_of(tmp_path, arguments={"quality": "7"})).argv
    for name, value, words in (("quality", "10", "must be of type natural"),
                               ("quality", "7 --python x", "must be of type natural"),
                               ("speed", "7", "must be present")):
        with pytest.raises(UserError, match=words):
            one.command(run_of(tmp_path, arguments={name: value}))
    with pytest.raises(UserError, match="Argument quality is missing"):
        one.command(run_of(tmp_path))


def test_a_value_is_no_option() -> None:
    mine = rules("$RENDERONLINE:@uploaded_file $RENDERONLINE:x -o $RENDERONLINE:@output"
                 "\nargument x = sentence").engines[0]
    values = {"@uploaded_file": "a.blend", "@output": "o", "x": "--python"}
    with pytest.raises(UserError, match="cannot begin with a dash"):
        mine.arguments(values)
    assert mine.arguments({**values, "x": "-5"})[1] == "-5"


@pytest.mark.parametrize("frames, made, expected", [
    ((3, 4), "image0004.png", 4), ((3, 4), "image4.png", 4), ((3, 14), "image14.png", 14),
])
def test_a_picture_is_found_by_its_number(
        frames: Tuple[int, ...], made: str, expected: int, tmp_path: Path) -> None:
    run = run_of(tmp_path, frames, Final_Frame="14")
    run.place.mkdir(parents=True)
    for name in (made, "image0013.png", "image0013.png.tmp", "other0004.png", "image0004.txt"):
        (run.place / name).touch()
    assert run.made(expected) == run.place / made
    assert not run.made(2).exists() and run.scene_files() == {}


def test_a_line_for_a_farm_says_where_the_pictures_belong() -> None:
    words = "-b $RENDERONLINE:@uploaded_file -s $RENDERONLINE:start_frame -a"
    with pytest.raises(UserError, match=r"here: write \$RENDERONLINE:@output"):
        rules(words)
    assert owned_programs(rules(f"/bin/sh {words}", node=True)) == {}  # no picture would be found
    with pytest.raises(UserError, match="is not an extension"):
        OnlineRules.of([("engine blender", f"blend {WORDS}", "here")])


def test_only_programs_that_the_owner_named_and_that_are_here_are_offered() -> None:
    assert owned_programs(rules(f"/bin/sh {WORDS}"))["blender"].path == "/bin/sh"
    assert owned_programs(rules(WORDS, "sh"))["sh"].path == shutil.which("sh")
    assert owned_programs(rules(f"/bin/no-such-program {WORDS}")) == {}
    povray = OnlineRules.of([("engine povray", ".pov $RENDERONLINE:@uploaded_file", "here")])
    assert owned_programs(povray) == {}


@pytest.mark.parametrize("values, words", [
    ({"Width": "320"}, "does not know Width"), ({"Frame_Step": "2"}, "does not know Frame_Step"),
    ({"Output_File_Type": "P"}, "makes no pictures of this type"),
    ({"Initial_Frame": "-3", "Final_Frame": "3"}, "numbered from 0 up"),
])
def test_what_only_povray_understands_is_refused(values: Dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        program_job("blender", "a.blend", values, "a", {})


def test_frames_stay_whole_and_are_compared_with_nothing() -> None:
    pov = program_job("blender", "a.blend", {}, "a", {"quality": "7"})
    assert pov.engine == "blender" and pov.arguments == {"quality": "7"} and pov.width == 0
    assert "whole frames" in unsliceable(pov, False) and "blender" in unverifiable(pov, {})  # type: ignore[arg-type]
    assert engine_fits("auto", {"povray": "3.7"}, {"povray": "3.7", "blender": ""})


def test_the_manual_shows_a_line_that_is_good(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```ini\n\[povfarm\]\n\[renderonline\]\n(.*?)```",
                          (ROOT / "docs" / "manual.md").read_text(encoding="utf-8"), re.DOTALL)
    mine = OnlineRules.of([(*map(str.strip, line.partition("=")[::2]), "here")
                           for line in shown.splitlines()])
    assert mine.engines[0].program == "/usr/bin/blender"
    argv = Program(mine.engines[0], mine, "/usr/bin/blender").command(run_of(tmp_path)).argv
    assert sorted(argv[1:]) == sorted([*program().command(run_of(tmp_path)).argv[1:]])


# --- what it prints

PRINTED = """\
Blender 3.4.1
Read blend: /tmp/s.blend
Fra:3 Mem:9.05M (Peak 10.83M) | Time:00:00.00 | Mem:0.00M, Peak:0.00M | Scene, ViewLayer | Initializing
Fra:3 Mem:9.91M (Peak 10.83M) | Time:00:00.04 | Mem:0.76M, Peak:0.76M | Scene, ViewLayer | Sample 1/4
Saved: '/tmp/image0003.png'
 Time: 00:00.17 (Saving: 00:00.12)

Fra:4 Mem:9.30M (Peak 10.83M) | Time:00:00.00 | Mem:0.00M, Peak:0.00M | Scene, ViewLayer | Initializing
Fra:4 Mem:9.30M (Peak 10.83M) | Time:00:00.00 | Mem:0.00M, Peak:0.00M | Scene, ViewLayer | Sample 3/4
"""


def test_blenders_text_tells_frames_and_progress() -> None:
    """Recorded from Blender 3.4.1."""
    text = ProgramText((3, 4))
    seen: List[Tuple[bool, int, int, bool]] = []
    for line in PRINTED.splitlines():
        begun = text.feed(line)
        seen.append((begun, text.index, text.percent, text.traced))
    assert seen[3] == (False, 0, 25, False) and seen[4] == (False, 0, 25, True)
    assert seen[7] == (True, 1, 0, False) and seen[8] == (False, 1, 75, False)
    assert text.before.startswith("Blender 3.4.1\n") and "Saved" in text.before
    assert "Fra:" not in text.before + text.text and text.error() == ""


@pytest.mark.parametrize("line, error", [
    ("Error: Failed to read blend file '/tmp/b.blend': Missing DNA block", True),
    ("povfarm: cannot start /opt/x: no such file", True), ("RuntimeError: no camera", True),
    ("Failed to symlink /tmp/x: Permission denied", False), ("socket(): Permission denied", False),
])
def test_the_error_is_what_the_program_calls_one(line: str, error: bool) -> None:
    text = ProgramText((0,))
    for one in ("Blender 3.4.1", line, "Blender quit"):
        text.feed(one)
    assert text.error() == (line if error else "")


# --- Blender itself

MAKE = """
import bpy, sys
scene = bpy.context.scene
scene.render.engine = 'CYCLES'
scene.cycles.samples, scene.cycles.device, scene.cycles.use_denoising = 4, 'CPU', False
scene.render.resolution_x, scene.render.resolution_y = 48, 32
scene.render.resolution_percentage = 100
cube = bpy.data.objects['Cube']
for frame in (1, 3):
    cube.rotation_euler = (0, 0, frame * 0.4)
    cube.keyframe_insert('rotation_euler', frame=frame)
script = sys.argv[sys.argv.index('--') + 2]
if script:
    text = bpy.data.texts.new('escape.py')
    text.write(script)
    text.use_module = True
bpy.ops.wm.save_as_mainfile(filepath=sys.argv[sys.argv.index('--') + 1])
"""
ESCAPE = """
import os, socket, subprocess
def tried(what):
    try:
        return what() or 'done'
    except Exception as error:
        return type(error).__name__
print('ESCAPE read', tried(lambda: open({secret!r}).read()), flush=True)
print('ESCAPE write', tried(lambda: open({outside!r}, 'w').close()), flush=True)
print('ESCAPE run', tried(lambda: subprocess.run(['/bin/true'])), flush=True)
print('ESCAPE net', tried(lambda: socket.create_connection(('127.0.0.1', 9), 1)), flush=True)
"""


def blender(*args: str) -> str:
    """Run Blender by hand."""
    done = subprocess.run(["blender", "-b", "--factory-startup", *args], text=True, timeout=300,
                          capture_output=True, check=True, stdin=subprocess.DEVNULL)
    return done.stdout


def blend_file(to: Path, script: str = "") -> None:
    """Have Blender make a small animation."""
    (to.parent / "make.py").write_text(MAKE)
    blender("-P", str(to.parent / "make.py"), "--", str(to), script)


@pytest.mark.slow
def test_blenders_frames_through_the_farm_are_those_made_by_hand(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("blender", bool(shutil.which("blender")), "there is no Blender here")
    (tmp_path / "farm").mkdir()
    line = WORDS.replace("startup", "startup -y")  # it runs the file's script: what can that do?
    (tmp_path / "farm" / "povfarm.ini").write_text(
        f"[povfarm]\n[renderonline]\nengine blender = .blend {shutil.which('blender')} {line}"
        f"{ARGUMENTS}")
    secret, outside = tmp_path / "farm" / "farm.key", tmp_path / "outside"
    blend_file(tmp_path / "film.blend",
               ESCAPE.format(secret=str(secret), outside=str(outside)))
    by_hand = blender("-y", str(tmp_path / "film.blend"), "-o", str(tmp_path / "hand" / "f"), "-F",
                      "PNG", "-s", "1", "-e", "3", "-a")
    assert "ESCAPE write done" in by_hand and "ESCAPE run Completed" in by_hand
    outside.unlink()
    (tmp_path / "bad.blend").write_bytes((tmp_path / "film.blend").read_bytes()[:3000])
    with contextlib.closing(Farm(tmp_path)) as farm:
        film = farm.submit(tmp_path, "film.blend", "--engine", "blender", "+KFI1", "+KFF3")
        bad = farm.submit(tmp_path, "bad.blend", "--engine", "blender", "--retries", "1")
        other = farm.submit(tmp_path, "film.blend", "--engine", "houdini")
        monkeypatch.setenv("PATH", "/nowhere")  # where no POV-Ray is
        farm.work("--cores", "1")
        assert farm.finished(film, 180)["state"] == "done"
        assert farm.finished(bad, 120)["state"] == "failed"
        assert "none" in run(tmp_path, "workers", cwd=tmp_path).stdout
        logs = run(tmp_path, "logs", str(bad), cwd=tmp_path).stdout
        assert "Failed to read blend file" in logs.splitlines()[0] + logs.splitlines()[1]
        wait_until(lambda: "houdini renders it" in farm.job(other)["waiting_for"])
        shown = run(tmp_path, "status", str(film), cwd=tmp_path).stdout
        assert "as the scene says, .png" in shown and re.search("program +blender", shown)
        escaped = run(tmp_path, "logs", str(film), "1", cwd=tmp_path).stdout
        assert run(tmp_path, "fetch", str(film), "--output", str(tmp_path / "made"),
                   cwd=tmp_path).returncode == 0
    for frame in (1, 2, 3):
        assert pixels(tmp_path / "made" / f"film{frame}.png") == pixels(
            tmp_path / "hand" / f"f{frame:04d}.png"), frame
    for what in ("read", "write", "run", "net"):
        assert f"ESCAPE {what} PermissionError" in escaped, escaped
    assert not outside.exists()
