"""ENGINES: command lines for POV-Ray on every system, and what its text means."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

import povfarm
from helpers.base import run_povray
from helpers.runs import make_run
from povfarm import (
    LINK,
    Engine,
    PovText,
    Run,
    UserError,
    WindowsEngine,
    joined_texts,
    locate_engine,
    standard_library,
)

LIBRARY = ("/usr/share/povray-3.7/include",)


def ini(command: Any) -> Dict[str, str]:
    """Return the last value of each key of the one INI file of a command."""
    return dict(line.split("=", 1) for line in ini_text(command).splitlines())


def ini_text(command: Any) -> str:
    """Return the one INI file of a command."""
    (text,) = [text for path, text in command.files.items() if path.suffix == ".ini"]
    return str(text)


def test_a_run_is_one_ini_file_with_short_names(tmp_path: Path) -> None:
    command = Engine("/usr/bin/povray", "3.7", LIBRARY).command(make_run(tmp_path))
    values = ini(command)
    assert command.argv == ("/usr/bin/povray",)
    assert command.environment["POVINI"] == f"{LINK}/{LINK}.ini"
    confs = [text for path, text in command.files.items() if path.name == "povray.conf"]
    assert confs and all("[Shellout Security]\nforbidden\n" in text for text in confs)
    assert command.environment["HOME"] == str(tmp_path / "run" / LINK)
    assert set(command.environment) == {"POVINI", "HOME", "PATH", "LANG", "POV_TEMP_DIR"}
    assert (values["Subset_Start_Frame"], values["Subset_End_Frame"]) == ("3", "4")
    assert values["Work_Threads"] == "1" and values["Display"].lower() == "off"
    libraries = [line.split("=")[1].strip('"') for line in ini_text(command).splitlines()
                 if line.startswith("Library_Path")]
    assert libraries == [f"{LINK}0", LIBRARY[0], f"{LINK}2"]
    assert command.links == {
        tmp_path / "run" / f"{LINK}0": tmp_path / "tree",
        tmp_path / "run" / f"{LINK}2": tmp_path / "tree" / "_lib1"}


def test_a_still_has_no_subset_and_all_threads(tmp_path: Path) -> None:
    run = make_run(tmp_path, (0,), 8, Initial_Frame="0", Final_Frame="0")
    values = ini(Engine("povray", "3.7", LIBRARY).command(run))
    assert "Subset_Start_Frame" not in values and values["Work_Threads"] == "8"


MADE = {
    "": "scene3.png", "film": "film3.png", "out/film": "out/film3.png",
    "/elsewhere/film": "film3.png", "../film": "film3.png", "a.b.png": "a.b3.png",
    "a.png.png": "a.png3.png", "füm": "image3.png", "ö/film": "film3.png",
}


@pytest.fixture(scope="module")
def made(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, Any]]:
    """A run of the real POV-Ray for each name, all at once: it sleeps most of the time."""
    place = tmp_path_factory.mktemp("made")
    with ThreadPoolExecutor(len(MADE)) as pool:
        yield {output: pool.submit(make, place / str(number), output, povray)
               for number, output in enumerate(MADE)}


def make(place: Path, output: str, povray: str) -> Run:
    """Let POV-Ray render a run of frame 3."""
    run = make_run(place, (3,), **({"Output_File_Name": output} if output else {}))
    for path in (run.tree, run.place, run.made(3).parent):
        path.mkdir(parents=True, exist_ok=True)
    (run.tree / "scene.pov").write_text("#version 3.7; camera { location -z }")
    run.state.touch()
    command = Engine(povray, "3.7", standard_library()).command(run)
    for path, text in command.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path, target in command.links.items():
        path.symlink_to(target)
    done = subprocess.run([*command.argv, "-D"], cwd=run.place, env=command.environment, check=False,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return run


@pytest.mark.parametrize("output", MADE)
def test_images_are_made_where_the_scene_expects_them(output: str, made: Dict[str, Any]) -> None:
    """And the real POV-Ray makes them there."""
    run = made[output].result()
    assert run.made(3) == run.place / MADE[output]
    assert run.made(3).is_file()
    assert not run.state.exists(), "POV-Ray deletes it at the end"


def test_a_run_goes_on_only_from_its_own_state(tmp_path: Path) -> None:
    engine, run = Engine("povray", "3.7", LIBRARY), make_run(tmp_path, Preview_Start_Size="16")
    assert ini(engine.command(run))["Continue_Trace"] == "Off"
    run.state.parent.mkdir()
    run.state.touch()
    values = ini(engine.command(run))
    assert (values["Continue_Trace"], values["Preview_Start_Size"]) == ("On", "1")
    assert run.state.name == "scene3.pov-state"


def test_names_that_povray_cannot_read_are_linked(tmp_path: Path) -> None:
    run = make_run(tmp_path, (3,), run_dir="ünder", Input_File_Name="süß.pov")
    (run.tree / "ünder").mkdir(parents=True)
    (run.tree / "ünder" / "süß.pov").write_text("")
    command = Engine("povray", "3.7", LIBRARY).command(run)
    text = ini_text(command)
    assert text.isascii() and f'Input_File_Name="{LINK}.pov"' in text
    assert command.links == {
        run.place / f"{LINK}.pov": run.tree / "ünder" / "süß.pov",
        run.place / f"{LINK}0": run.tree / "ünder", run.place / f"{LINK}2": run.tree / "_lib1"}


def test_windows_gets_pvengines_switches_and_paths(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    engine = WindowsEngine("C:/POV-Ray/bin/pvengine64.exe", "3.7", ("C:/POV-Ray/include",))
    command = engine.command(run)
    assert command.argv == ("C:/POV-Ray/bin/pvengine64.exe", "/NR", "/RENDER",
                            str(run.place / f"{LINK}.ini"), "/EXIT")
    values = ini(command)
    assert values["All_File"].strip('"') == f"{LINK}.txt"
    assert "C:/POV-Ray/include" in "".join(command.files.values())
    assert not command.links


def test_the_povray_of_this_machine_is_found(povray: str) -> None:
    engine = locate_engine("")
    assert engine.program == povray
    assert any((Path(path) / "colors.inc").is_file() for path in engine.library)


def test_the_version_is_in_what_povray_says(tmp_path: Path) -> None:
    engine = Engine("povray", "", ())
    assert engine.that_says("POV-Ray 3.8.0-beta.2.unofficial\n\nThis is").version == (
        "3.8.0-beta.2.unofficial")
    with pytest.raises(UserError, match=r"is not POV-Ray.* says 'hello'"):
        engine.that_says("hello\nyou")
    with pytest.raises(UserError, match="no program"):
        locate_engine(str(tmp_path / "gone"))


def test_pvengine_is_recognised_by_its_name(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "pvengine64.exe"
    program.parent.mkdir()
    shutil.copy("/bin/true", program)
    engine = locate_engine(str(program))
    assert isinstance(engine, WindowsEngine)
    assert engine.library == (str(tmp_path / "include"),)


def test_a_run_that_goes_on_counts_from_what_is_done() -> None:
    text = PovText(done=40)
    assert text.percent == 40
    text.feed("Rendered 10 of 100 pixels (10%)\r")
    assert text.percent == 50
    text.feed("Rendered 61 of 100 pixels (61%)\r")
    assert text.percent == 100
    text.feed("Rendering frame 2 of 2 (#2)")
    text.feed("Rendered 10 of 100 pixels (10%)\r")
    assert text.percent == 10


def test_the_text_of_a_real_animation_is_followed(tmp_path: Path, povray: str) -> None:
    (tmp_path / "s.pov").write_text("#version 3.7; camera { location -z } #debug \"hello\\n\"")
    shown = subprocess.run(["povray", "-D", "s.pov", "+KFF3", "+SF2", "+W64", "+H48", "+V"],
                           cwd=tmp_path, stderr=subprocess.PIPE, check=True).stderr.decode()
    text, begun, percents = PovText(), [], []
    for line in re.split(r"(?<=\r)|\n", shown):
        if text.feed(line):
            begun.append(text.index)
        percents.append(text.percent)
    assert begun == [1] and text.traced and max(percents) == 100
    assert "hello" in text.text and not text.scene_is_wrong


@pytest.mark.parametrize(("scene", "words"), [
    ("sphere {", "File 's.pov' line 1: Parse Error"),
    ('#include "gone.inc"', "Cannot open include file gone.inc"),
    ("#version 3.7;\n#error \"my own words\"", "my own words"),
])
def test_the_error_is_povrays_own_line(
        tmp_path: Path, povray: str, scene: str, words: str) -> None:
    (tmp_path / "s.pov").write_text(scene)
    text = PovText()
    for line in run_povray(["s.pov", "+W8", "+H6"], tmp_path).stderr.splitlines():
        text.feed(line)
    assert words in text.error() and text.scene_is_wrong
    assert "\n" not in text.error()


def test_of_endless_text_the_beginning_and_the_end_are_kept() -> None:
    text = PovText()
    for number in range(100_000):
        text.feed(f"line {number}")
    assert len(text.lines) < 10_000
    assert text.lines[:1000] == [f"line {n}" for n in range(1000)]
    assert text.lines[-1000:] == [f"line {n}" for n in range(99_000, 100_000)]
    assert text.text.count("left out") == 1


def test_prefixes_of_this_machine_are_taken_out_of_the_text() -> None:
    text = PovText()
    text.feed(f"File '{LINK}0/s.pov' line 3: Parse Error: no")
    assert text.error() == "File 's.pov' line 3: Parse Error: no"


def test_a_frame_that_was_tried_again_is_once_in_a_text_file() -> None:
    """POV-Ray was killed in frame 3, and later an image of frame 6 was not taken."""
    parts = {1: "1|2|cut", 3: "3", 5: "5|6, lost|7", 6: "6", 4: "|4"}
    marked = {first: text.replace("|", povfarm._APPENDED) for first, text in parts.items()}
    joined = joined_texts("All_File", marked, append=False)
    assert joined.split(povfarm._APPENDED) == ["1", "2", "3", "4", "5", "6", "7"]
    assert joined_texts("All_File", marked, append=True) == povfarm._APPENDED + joined
    assert joined_texts("Debug_File", {2: "b", 1: "a"}, append=True) == "ab"


def test_all_that_a_run_leaves_is_the_scenes_but_its_images_and_states(tmp_path: Path) -> None:
    run = make_run(tmp_path, (3, 4), Output_File_Name="out/film")
    ours = ("out/film3.png", "out/film4.png", "out/film4.pov-state", f"{LINK}/pov123",
            f"{LINK}.txt")
    theirs = {"pov123", "film4.pov-state", "out/film5.pov-state", "out/pov7", "povfarm.txt"}
    for name in (*ours, *theirs):
        (run.place / name).parent.mkdir(parents=True, exist_ok=True)
        (run.place / name).write_text("x")
    assert set(run.scene_files()) == theirs
