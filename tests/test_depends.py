"""Frames that depend on each other through files, and files that a scene appends to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Dict

import pytest

from helpers.base import run_povray, wait_until
from helpers.farm import SMALL, Farm, farm_fixture, run
from helpers.pictures import pixels
from povfarm import STANDARD, scan_in_place, standard_library

__all__ = ["farm_fixture"]

HEAD = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 0, -5> look_at 0 }
light_source { <2, 4, -3> 1 }
"""
BALL = "\nsphere { <Pos - 1, 0, 0>, 0.5 pigment { rgb 1 } }\n"
COUNT = """#if (file_exists(%s)) #fopen F %s read #read (F, Pos) #fclose F #else #declare Pos = 0; #end
#declare Pos = Pos + 0.2;
#fopen F %s write #write (F, Pos) #fclose F""" + BALL
LOAD = COUNT[:COUNT.index("\n")].replace("%s", "N")
SAVE = "#fopen F N write #write (F, Pos) #fclose F"
TREE = """#if (!file_exists(%s))
  #declare S = seed(frame_number);
  #fopen F %s write #write (F, "#declare Tree = union {")
  #for (I, 1, 20) #write (F, "sphere { <", rand(S) * 2 - 1, ",", rand(S) * 2 - 1, ",0>, 0.1 }") #end
  #write (F, "}") #fclose F
#end
#include %s
object { Tree pigment { rgb 1 } }
"""
SAY = '#fopen L %s append #write (L, "frame ", frame_number, "\\n") #fclose L\nsphere { 0, 1 }\n'
STATE = """#macro Name(I) concat("state", str(I, 0, 0)) #end
"""

# What a scene is, and other files of its directory. All names are seen in the scene's text.
CERTAIN: Dict[str, Dict[str, str]] = {
    "a counter in a text file": {"walk.pov": COUNT.replace("%s", '"pos.txt"')},
    "a counter in a directory, by a variable": {
        "walk.pov": '#declare P = "data/deep/pos.txt";\n' + COUNT.replace("%s", "P"),
        "data/deep/keep.txt": ""},
    "a state in an include file": {"walk.pov": """
#if (frame_number > 1) #include "state.inc" #else #declare Pos = 0; #end
#declare Pos = Pos + 0.2;
#fopen F "state.inc" write #write (F, "#declare Pos = ", str(Pos, 0, 4), ";\\n") #fclose F""" + BALL},
    "a cache made once": {"walk.pov": TREE.replace("%s", '"tree.inc"')},
    "a cache in a library directory": {
        "walk.pov": TREE.replace("%s", '"lib/tree.inc"', 2).replace("%s", '"tree.inc"'),
        "lib/keep.inc": ""},
    "a counter by macros of an include file": {
        "walk.pov": '#include "lib.inc"\nLoad("pos.txt")\n#declare Pos = Pos + 0.2;\n'
                    'Save("pos.txt")' + BALL,
        "lib.inc": f"#macro Load(N) {LOAD} #end\n#macro Save(N) {SAVE} #end\n"},
    "a scene that writes itself anew": {"walk.pov": (
        BALL.replace("Pos", "0") + '#fopen F "walk.pov" write\n#write (F, "camera { location -9*z } '
        'sphere { 0, 2 pigment { rgb y } finish { ambient 1 } }\\n")\n#fclose F\n')},
    "photons of the first frame": {"walk.pov": """
global_settings { photons { spacing 0.1
  #if (frame_number = 1) save_file "x.ph" #else load_file "x.ph" #end } }
plane { y, -1 pigment { rgb 1 } }
sphere { <frame_number * 0.1, 0, 0>, 0.5 pigment { rgbf 1 } interior { ior 1.5 }
         photons { target refraction on } }
"""},
    "an image by a variable": {"walk.pov": """
#declare B = "walk";
#declare Before = concat(B, str(frame_number - 1, 0, 0), ".png");
#if (frame_number > 1) box { <-3, -3, 2>, <3, 3, 2.1>
  pigment { image_map { png Before } scale 4 translate -2 } } #end
sphere { <frame_number / 6 - 1, 0, 0>, 0.5 pigment { rgb 1 } }
"""},
    "a log": {"walk.pov": SAY % '"log.txt"', "log.txt": "rows of a year of work"},
    "a log by a macro of an include file": {
        "walk.pov": '#include "log.inc"\nSay()\n',
        "log.inc": '#declare Log = "notes/run log.txt";\n#macro Say() ' + SAY % "Log" + "#end\n",
        "notes/run log.txt": "old\n"},
    "a log beyond ASCII": {"walk.pov": SAY % '"zähler.txt"', "z  hler.txt": "old\n"},
}
# What is seen only when a frame has written it.
GUESSED: Dict[str, Dict[str, str]] = {
    "a cache made once": {"walk.pov": '#declare N = concat("tree", str(3, 0, 0), ".inc");\n'
                                      + TREE.replace("%s", "N")},
    "written by one frame": {"walk.pov": STATE + """
#if (frame_number = 1) #fopen F Name(0) write #write (F, 0.7) #fclose F #end
#if (file_exists(Name(0))) #fopen F Name(0) read #read (F, Pos) #fclose F #else #declare Pos = 0; #end
""" + BALL},
    "without the file of another frame it fails": {"walk.pov": STATE + """
#if (frame_number > 1) #fopen F Name(frame_number - 1) read #read (F, Pos) #fclose F
#else #declare Pos = 0; #end
#declare Pos = Pos + 0.2;
#fopen F Name(frame_number) write #write (F, Pos) #fclose F""" + BALL},
    "a log": {"walk.pov": SAY % 'concat("log", str(5, 0, 0), ".txt")', "log5.txt": "old\n"},
}
# What does not need other frames, though the scene writes files.
ALONE: Dict[str, str] = {
    "a table that nobody reads": '#fopen F "x.csv" write #write (F, 1) #fclose F #include "y.inc"',
    "read after it was written": '#fopen F "x.inc" write #fclose F\n#include "x.inc"',
    "a file for each frame": '#declare N = concat("m", str(frame_number, 0, 0), ".inc");\n'
                             '#fopen F N write #fclose F\n#include N',
    "read after it was written, in a macro": '#macro P(S) #fopen F "t.inc" write #write (F, S) '
                                             '#fclose F #include "t.inc" #end\nP("x")',
    "a macro that nobody calls": "#macro Save(N) " + SAVE + ' #end\n#include "y.inc"',
    "names that cannot meet": '#fopen F concat("a", str(1, 0, 0)) write #fclose F\n'
                              '#include concat("b", str(1, 0, 0))',
    "POV-Ray's own macros, not told to write": '#include "meshmaker.inc"\nMSM(A, 1, "", 2, "")',
}
# What does, to show that each of those is a near miss.
NOT_ALONE: Dict[str, str] = {
    "read before": '#include "x.inc"\n#fopen F "x.inc" write #fclose F',
    "written in another branch": '#if (clock) #fopen F "x.inc" write #fclose F #else '
                                 '#include "x.inc" #end',
    "another name in the meantime": '#declare N = "a.inc";\n#fopen F N write #fclose F\n'
                                    '#declare N = "b.inc";\n#fopen F "b.inc" write #fclose F\n'
                                    "#if (clock) #include N #end\n#fopen F \"a.inc\" read",
    "a macro that one of a macro's calls": "#macro Save(N) " + SAVE + ' #end\n#macro Do() '
                                           'Save("x.inc") #end\nDo()\n#include "x.inc"',
    "names in an array": '#declare A = array[2] { "x.inc", "y.inc" }\n#include A[1]\n'
                         '#fopen F "y.inc" write #fclose F',
    "POV-Ray's own macros": '#include "meshmaker.inc"\nMSM(A, 1, "", 2, "vase.inc")',
    "a name that stands in a file": '#declare N = "y.inc";\n#fopen L "list.txt" read #read (L, N)\n'
                                    '#include N\n#fopen F "x.inc" write #fclose F',
}


def laid_out(place: Path, files: Dict[str, str]) -> Path:
    """Write a scene and what is beside it."""
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(HEAD + text if name.endswith(".pov") else text, "utf-8")
    return place


def result(place: Path) -> Dict[str, bytes]:
    """Return every file, of pictures what they show."""
    return {path.relative_to(place).as_posix():
            pixels(path) if path.suffix == ".png" else path.read_bytes()
            for path in place.rglob("*") if path.is_file()}


def both(tmp_path: Path, files: Dict[str, str], *args: str) -> str:
    """Render with POV-Ray and with povfarm, compare; return what povfarm said."""
    plain, ours = (laid_out(tmp_path / name, files) for name in ("plain", "ours"))
    run_povray(["walk.pov", *SMALL, *args], plain)
    done = run(tmp_path, "render", "walk.pov", *SMALL, *args, cwd=ours)
    assert done.returncode == 0, done.stderr
    assert result(ours) == result(plain)
    return done.stderr


@pytest.mark.parametrize("what", CERTAIN)
def test_frames_that_read_what_others_write_run_in_order(
        what: str, povray: str, tmp_path: Path) -> None:
    said = both(tmp_path, CERTAIN[what], "+KFF4", *["+Llib"][:"library" in what])
    assert "rendered in order" in said and "again" not in said


def test_a_state_in_an_include_header_runs_in_order(povray: str, tmp_path: Path) -> None:
    count = COUNT.replace("%s", '"pos.txt"')
    files = {"walk.pov": BALL, "head.inc": count.replace(BALL, "")}
    assert "rendered in order" in both(tmp_path, files, "+KFF4", "+HIhead.inc")


@pytest.mark.parametrize("what", GUESSED)
def test_they_begin_again_in_order_when_they_turn_out_to(
        what: str, povray: str, tmp_path: Path) -> None:
    assert "rendered again, in order" in both(tmp_path, GUESSED[what], "+KFF4")


@pytest.mark.parametrize("name", ['"log.txt"', 'concat("log", ".txt")'])
def test_a_still_appends_to_what_is_there(name: str, povray: str, tmp_path: Path) -> None:
    both(tmp_path, {"walk.pov": SAY % name, "log.txt": "rows of a year of work"})


def test_samples_that_are_read_and_written_run_in_order(povray: str, tmp_path: Path) -> None:
    scene = ("global_settings { radiosity { count 20 } } plane { y, -1 pigment { rgb 1 } }\n"
             "sphere { <clock, 0, 0>, 1 pigment { rgb 1 } }")
    said = both(tmp_path, {"walk.pov": scene}, "+KFF3", "+RFO", "+RFI", "+WT1")
    assert "rendered in order" in said


def test_the_last_samples_that_povray_saves_are_there(povray: str, tmp_path: Path) -> None:
    """It writes them when it ends, after the image."""
    scene = ("global_settings { radiosity { count 20 } }\nplane { z, 1 pigment { rgb 0.7 } finish { "
             "ambient 1 diffuse 0 } }\nsphere { 0, 1 pigment { rgb 1 } } sphere { x + y, 0.5 "
             "pigment { rgb x } }")
    both(tmp_path, {"walk.pov": scene}, "+RFO", "+RFI", "+WT1", "+KFF3")


def depends(tmp_path: Path, text: str) -> bool:
    """Tell whether the scan of a scene finds that its frames may need each other."""
    place = laid_out(tmp_path, {"walk.pov": text, "y.inc": ""})
    project, _, _ = scan_in_place(
        "walk.pov", [STANDARD], place, [f"walk{frame}.png" for frame in range(1, 5)],
        [Path(path) for path in standard_library()])
    return "own-output" in project.uses or bool(project.reads)


@pytest.mark.parametrize("what", ALONE)
def test_frames_that_need_no_others_are_shared_out(
        what: str, povray: str, tmp_path: Path) -> None:
    assert not depends(tmp_path, ALONE[what])


@pytest.mark.parametrize("what", NOT_ALONE)
def test_frames_that_may_need_others_are_found(
        what: str, povray: str, tmp_path: Path) -> None:
    assert depends(tmp_path, NOT_ALONE[what])


def test_two_names_of_one_file_are_seen_to_be_of_one(povray: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for read, written in (("x.inc", f"../{tmp_path.name}/x.inc"), ("link/x.inc", "real/x.inc")):
        assert depends(tmp_path, f'#include "{read}"\n#fopen F "{written}" write #fclose F')


@pytest.mark.parametrize("log", ['"link/log.txt"', 'concat("link/lo", "g.txt")'])
def test_a_link_is_the_directory_that_it_leads_to(
        log: str, povray: str, tmp_path: Path) -> None:
    for name in ("plain", "ours"):
        (tmp_path / name / "real").mkdir(parents=True)
        (tmp_path / name / "link").symlink_to("real")
    count = COUNT.replace("%s", '"link/pos.txt"', 2).replace("%s", '"real/pos.txt"')
    said = both(tmp_path, {"walk.pov": count + SAY % log, "real/log.txt": "old\n"}, "+KFF3")
    assert "rendered in order" in said


def test_in_order_no_is_obeyed_and_the_failure_names_the_cure(
        farm: Farm, tmp_path: Path) -> None:
    files = GUESSED["without the file of another frame it fails"]
    farm.work()
    job = farm.submit(laid_out(tmp_path / "ours", files), "--in-order=no", "walk.pov", *SMALL,
                      "+KFF4")
    wait_until(lambda: "with --in-order" in (farm.job(job)["failure"] or {}).get("message", ""),
               "no failure names the cure")
    assert not farm.job(job)["in_order"]


def test_a_farm_renders_such_frames_as_povray_does(farm: Farm, tmp_path: Path) -> None:
    farm.work()
    for number, what in enumerate(["a log", "written by one frame"], 1):
        files = GUESSED[what]
        plain, ours = (laid_out(tmp_path / f"{name}{number}", files) for name in ("plain", "ours"))
        run_povray(["walk.pov", *SMALL, "+KFF4"], plain)
        done = run(tmp_path, "submit", "walk.pov", *SMALL, "+KFF4", "--wait", "--output", ".",
                   cwd=ours)
        assert done.returncode == 0, done.stderr
        assert "in order" in done.stderr and result(ours) == result(plain)


@pytest.mark.parametrize("name", ['"log.txt"', 'concat("lo", "g.txt")'])
def test_what_was_appended_is_fetched_once_and_replaces_nothing(
        name: str, farm: Farm, tmp_path: Path) -> None:
    farm.work()
    ours = laid_out(tmp_path / "ours", {
        path: text.replace('"log.txt"', name) for path, text in CERTAIN["a log"].items()})
    done = run(tmp_path, "submit", "walk.pov", *SMALL, "+KFF2", "--wait", cwd=ours)
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    shutil.copy(ours / "log.txt", fetched)
    text = "rows of a year of work" + "frame 1\nframe 2\n"
    for _ in range(2):
        assert run(tmp_path, "fetch", "last", "--output", str(fetched), cwd=tmp_path).returncode == 0
        assert (fetched / "log.txt").read_text() == text
    (fetched / "log.txt").write_text("rows of a year of work\nand one more\n")
    for _ in range(2):
        assert run(tmp_path, "fetch", "last", "--output", str(fetched), cwd=tmp_path).returncode == 0
        assert (fetched / "log.txt").read_text() == "rows of a year of work\nand one more\n"
        beside, = fetched.glob("log-*.txt")
        assert beside.read_text() == text
    assert os.listdir(ours).count("log.txt") == 1
