"""What POV-Ray says while it renders, and where it goes, beside plain POV-Ray."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List

import pytest

import povfarm
from helpers.base import POVFARM, run_povray
from helpers.farm import SMALL, STILL, environment, run

pytestmark = pytest.mark.usefixtures("povray")

SCENE = """camera { location <0, 0, -5> look_at 0 }
light_source { <2, 4, -3> 1 }
#debug "a line\\n  and one that is indented\\n\\nafter an empty one\\n"
#debug "no end"
#debug " but here, in a line that is so long that it does not fit into eighty columns of text\\n"
#warning "the wall is thin"
#include "deep.inc"
sphere { 0, 1 pigment { rgb 1 } }
isosurface { function { x*x + y*y + z*z - 1 } max_gradient 0.1 pigment { rgb 1 } translate 2*x }
"""
DEEP = '#warning "that comes out of a directory, and where it is broken depends on its name"\n'
FOLDER = "a/directory/whose/name/is/long/enough"
FRAMES = STILL + """
#debug concat("all but ", str(mod(frame_number, 2), 0, 0), "\\n")
#if (frame_number = 3) #warning "three" #end
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with the scenes."""
    here = tmp_path / "here"
    (here / FOLDER).mkdir(parents=True)
    texts: Dict[str, str] = {"scene.pov": SCENE, f"{FOLDER}/deep.inc": DEEP, "frames.pov": FRAMES,
                             "wrong.pov": STILL + '#debug "before\\n"\nsphere {'}
    for name, text in texts.items():
        (here / name).write_text(text)
    return here


def render(place: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Render in a directory as a person would."""
    return run(place.parent, "render", *args, *SMALL, cwd=place)


def said_by_povray(place: Path, *args: str) -> str:
    """Return what plain POV-Ray prints without its credits, options, statistics and progress."""
    quiet, some = (lines_of(subprocess.run(
        ["povray", "-D", *args, *SMALL, *more], cwd=place, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, check=True).stderr.decode()) for more in (["-GA"], ["-GR", "-GS"]))
    credits = next(at for at, line in enumerate(quiet) if line.startswith("==== [Parsing"))
    said = [line for line in some[credits:] if not re.match(r"==== \[|POV-Ray finished", line)]
    return "".join(said).rstrip("\n") + "\n" * bool(said)


def lines_of(text: str) -> List[str]:
    """Return the lines of a console without status lines and the line feed that ends them."""
    return re.sub(r"(?:[^\n]*\r)+(==== .*\n)?\n?", r"\1", text).splitlines(keepends=True)


@pytest.mark.parametrize("args", ["", "-GD", "-GW", "Debug_Console=Off +GW -V", "+A", "+SR3 +ER9"])
def test_what_a_scene_says_is_shown_as_povray_shows_it(place: Path, args: str) -> None:
    command = ["scene.pov", f"+L{FOLDER}", *args.split()]
    said = said_by_povray(place, *command)
    assert ("a line\n  and one" in said) == ("D" not in args)
    assert ("Warning: the\n wall" in said or "Warning: the wall" in said) == ("-GW" not in args)
    result = render(place, *command)
    assert (result.stderr, result.returncode) == (said, 0)


def test_all_streams_are_off_or_on_whatever_is_said_of_one(place: Path) -> None:
    command = ["scene.pov", f"+L{FOLDER}"]
    assert render(place, *command, "-GA", "+GD").stderr == ""
    assert "indented" in render(place, *command, "-GD", "+GA").stderr


def test_of_an_animation_each_text_is_shown_once_in_the_order_of_frames(place: Path) -> None:
    result = render(place, "frames.pov", "+KFF4", "--log", "all.txt", "--json")
    assert result.stderr == ("all but 1\nall but 0\n"
                             "File 'frames.pov' line 8: Parse Warning: three\n")
    assert result.stdout.startswith("{") and result.stdout.count("\n") == 1
    log = (place / "all.txt").read_text()
    found = re.findall(r"(?m)^  Output file\.+(\S+),|^(all but \d)$|(Warning: three)$", log)
    assert ["".join(groups) for groups in found] == [
        "frames1.png", "all but 1", "frames2.png", "all but 0",
        "frames3.png", "all but 1", "Warning: three", "frames4.png", "all but 0"]
    assert log.count("Trace Time:") == 4 and "pixels (" not in log
    plain = run_povray(["frames.pov", "+KFF4", *SMALL], place).stderr
    options = re.compile(r"^Parser Options\n(?:  .*\n)*Animation Options", re.MULTILINE)
    assert options.findall(log) == options.findall(plain)


def test_verbose_shows_all_that_povray_prints(place: Path) -> None:
    said = render(place, "frames.pov", "--verbose").stderr
    assert "Ray Tracer Version" in said and "Trace Time:" in said and "all but 0" in said


def test_the_log_of_a_frame_that_failed_is_kept_and_told(place: Path) -> None:
    (place / "wrong.log").write_text("mine")
    for _ in range(2):
        result = render(place, "wrong.pov")
        assert result.returncode == 1
        before, error, told = result.stderr.splitlines()
        assert before == "before" and error.startswith("povfarm: File 'wrong.pov' line 7: Parse")
        assert told == f"povfarm: all that POV-Ray printed is in {place / 'wrong-2.log'}"
    log = (place / "wrong-2.log").read_text()
    assert "before\n" in log and log.startswith("File 'wrong.pov' line 7: Parse Error")
    assert (place / "wrong.log").read_text() == "mine"
    assert sorted(path.name for path in place.glob("wrong*")) == [
        "wrong-2.log", "wrong.log", "wrong.pov"]


def test_a_log_that_cannot_be_written_is_refused_at_once(place: Path) -> None:
    for name in ("gone/log.txt", "a"):
        result = render(place, "frames.pov", "--log", name)
        assert result.returncode == 2 and f"here/{name}: name another file" in result.stderr
        assert result.stderr.count("\n") == 1
    scene = (place / "frames.pov").read_bytes()
    for name in ("frames.pov", "frames.png", "other.INI"):
        result = render(place, "frames.pov", "--log", name)
        assert result.returncode == 2 and f"here/{name} would be lost" in result.stderr
    assert (place / "frames.pov").read_bytes() == scene


# --- pictures on stdout

def picture(place: Path, *command: str) -> bytes:
    """Return what a command leaves on stdout."""
    return subprocess.run([*command, *SMALL], cwd=place, env=environment(place.parent), check=True,
                          stdin=subprocess.DEVNULL, capture_output=True).stdout


def undated(pictures: bytes) -> bytes:
    """Return PPM pictures without the date that POV-Ray writes into each."""
    return re.sub(rb"# Render Date: .*\n", b"", pictures)


@pytest.mark.parametrize("args", ["frames.pov +FP +O-", "frames.pov +FP +KFF3 +Ostdout"])
def test_the_pictures_go_to_stdout_as_povrays_do(place: Path, args: str) -> None:
    ours, theirs = (undated(picture(place, *command, *args.split()))
                    for command in ([*POVFARM, "render"], ["povray", "-D"]))
    assert ours == theirs and ours.count(b"P6\n") == (3 if "KFF3" in args else 1)
    assert not [*place.glob("*.ppm"), *place.glob("stdout*")]


@pytest.mark.parametrize(("letter", "begins"), [
    ("E", b"v/1\x01"), ("J", b"\xff\xd8"), ("N", b"\x89PNG")])
def test_types_that_povray_writes_to_files_only_go_to_stdout_too(
        place: Path, letter: str, begins: bytes) -> None:
    assert picture(place, *POVFARM, "render", "frames.pov", f"+F{letter}", "+O-").startswith(begins)


def test_nothing_but_a_picture_is_on_stdout(place: Path) -> None:
    result = render(place, "wrong.pov", "+O-")
    assert (result.returncode, result.stdout) == (1, "")
    result = render(place, "frames.pov", "+O-", "--json")
    assert (result.returncode, result.stdout) == (2, "") and "+O- is for" in result.stderr


def test_a_farm_has_no_stdout_for_pictures(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    options = povfarm._parse(povfarm._commands()["submit"][0], ["frames.pov", "+O-"])
    with pytest.raises(povfarm.UserError, match="'render' alone"):
        povfarm._draft(options, place, povfarm._Renderer(options, None))


# --- text files

ALL = ["+GAall", "+GDdebug", "+GFfatal", "+GRrender", "+GSstatistics", "+GWwarnings"]


def text_files(place: Path) -> Dict[str, str]:
    """Return what is in a directory but scenes and pictures, without measured times."""
    times = r".*(?:Time: +\d|CPU-seconds).*\n"
    return {str(path.relative_to(place)): re.sub(times, "", path.read_text())
            for path in place.rglob("*")
            if path.is_file() and path.suffix not in (".pov", ".inc", ".png", ".log")}


@pytest.mark.parametrize("args", [
    ["frames.pov", "+KFF5", *ALL],
    ["scene.pov", f"+L{FOLDER}", "+Oa/", "+GAon", "Debug_File=", "-GWyes", "+WT1"],
    ["frames.pov", "+KFF2", *ALL, "+GP"],
    ["wrong.pov", *ALL],
])
def test_text_files_are_those_that_povray_writes(place: Path, args: List[str]) -> None:
    plain = place.parent / "plain"
    for name in ("debug", "warnings"):
        (place / name).write_text("old\n")
    shutil.copytree(place, plain)
    code = run_povray([*args, *SMALL], plain).returncode
    result = render(place, *args)
    assert (result.returncode, text_files(place)) == (code, text_files(plain)), result.stderr
    assert len(text_files(place)) == 2 + (4 if "+GAall" in args else 3)


def test_a_frame_that_was_tried_again_is_once_in_what_debug_left(place: Path) -> None:
    """POV-Ray is killed when it has made its first picture, but before anybody knows that."""
    program, killed = place.parent / "killed-once", place.parent / "killed"
    program.write_text('#!/bin/sh\npovray "$@" || exit\n'
                       f'[ "$1" = --version ] || ! mkdir {killed} || kill -9 $$\n')
    program.chmod(0o755)
    result = render(place, "frames.pov", "+KFF4", "+GDdebug", "--batch=2",
                    "--unconfined", f"--povray={program}")
    assert result.returncode == 0 and killed.is_dir(), result.stderr
    assert (place / "debug").read_text() == "".join(f"all but {n % 2}\n" for n in range(1, 5))


def test_text_files_stay_beside_the_images(place: Path) -> None:
    for name in ("../out", "a/out"):
        result = render(place, "frames.pov", f"+GA{name}")
        assert result.returncode == 2 and "leave the directory out" in result.stderr
    with pytest.raises(povfarm.UserError):
        povfarm.check_ini(f'All_File="{place}/out"\n')
    povfarm.check_ini('All_File="out"\n')
