"""POV-Ray 3.8: its words, its INI files and its seed, with a stand-in that is strict about them.

The stand-in says that it is a 3.8 beta, notes down the INI file that it gets, refuses keys that 3.8
does not have, and lets the real POV-Ray 3.7 render without the new ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

import povfarm
from helpers.base import wait_until
from helpers.farm import Farm, environment, run
from povfarm import (
    Engine,
    JobOptions,
    PovJob,
    UserError,
    collect_project,
    engine_fits,
    read_command_line,
    region_of,
    release,
    unrenderable,
    unsliceable,
    unverifiable,
)

VERSION = "3.8.0-beta.2.unofficial"
SCENE = """#version 3.7;
#include "only38.inc"
global_settings { assumed_gamma 1 }
camera { location -5*z look_at 0 } light_source { -5*z, 1 }
sphere { <clock, 0, 0>, 1 pigment { Only38 } }
"""
SEED = "453955340"  # of pictures that are called s
NEW = ["Stochastic_Seed", "Antialias_Confidence", "Create_Continue_Trace_Log"]
SOURCE = '''#!{python} -SE
import json, os, sys
if "--version" in sys.argv:
    sys.exit(print("POV-Ray {version}\\n\\nThis is an unofficial version"))
lines = [line.rstrip("\\n").partition("=") for line in open(os.environ["POVINI"])]
with open({journal!r}, "a") as journal:
    journal.write(json.dumps([[key, value] for key, _, value in lines]) + "\\n")
unknown = [key for key, _, _ in lines if key not in {known!r}]
if unknown:
    sys.exit(f"Unknown option {{unknown}}")
with open("plain.ini", "w") as plain:
    plain.writelines(f"{{key}}={{value}}\\n" for key, _, value in lines
                     if key not in {new!r} and value not in {codes!r})
os.environ["POVINI"] = "plain.ini"
os.execv({povray!r}, ["povray"])
'''


class Beta:
    """A POV-Ray 3.8 in a prefix of its own, with its INI file and an include file."""

    def __init__(self, place: Path, povray: str) -> None:
        self.prefix = place / "opt" / "pov38"
        self.program = self.prefix / "bin" / "povray"
        self.journal = place / "journal"
        self.include = self.prefix / "share" / "povray-3.8" / "include"
        for path in (self.program.parent, self.include, self.ini.parent):
            path.mkdir(parents=True)
        known = [name for name, _, _ in povfarm._KEYS.values()]
        self.program.write_text(SOURCE.format(
            python=sys.executable, version=VERSION, journal=str(self.journal), povray=povray,
            known=known, new=NEW, codes=["AT", "BK", "BN", "BNX", "JN", "ST"]))
        self.program.chmod(0o755)
        self.ini.write_text(f'Width=40\nHeight=30\nLibrary_Path="{self.include}"\n')
        (self.include / "only38.inc").write_text("#declare Only38 = pigment { rgb 1 }\n")
        (place / "s.pov").write_text(SCENE)

    @property
    def ini(self) -> Path:
        """The INI file of its system."""
        return self.prefix / "etc" / "povray" / "3.8" / "povray.ini"

    def runs(self) -> List[Dict[str, str]]:
        """Return the options of each run so far."""
        text = self.journal.read_text() if self.journal.exists() else ""
        return [dict(json.loads(line)) for line in text.splitlines()]


@pytest.fixture
def beta(tmp_path: Path, povray: str) -> Beta:
    """A POV-Ray 3.8, and s.pov, which needs its include file."""
    return Beta(tmp_path, povray)


def render(tmp_path: Path, *args: str, beta: Beta | None = None) -> "subprocess.CompletedProcess[str]":
    """Render in a directory, with the 3.8 if there is one."""
    program = ["--povray", str(beta.program), "--unconfined"] if beta else []
    return run(tmp_path, "render", *program, *args, cwd=tmp_path)


# --- words

WORDS = [
    ("+SS7", {"Stochastic_Seed": "7"}), ("Stochastic_Seed=7", {"Stochastic_Seed": "7"}),
    ("+AC0.9", {"Antialias_Confidence": "0.9"}), ("+CC", {"Create_Continue_Trace_Log": "On"}),
    ("-CC", {"Create_Continue_Trace_Log": "Off"}), ("Greyscale_Output=on", {"Grayscale_Output": "On"}),
    ("+FNg16", {"Grayscale_Output": "On", "Bits_Per_Color": "16", "Output_File_Type": "N"}),
    *((f"+TH{code.lower()}", {"Dither": "On", "Dither_Method": code})
      for code in ("AT", "BK", "BN", "BNX", "JN", "ST")),
    ("Dither_Method=bnx", {"Dither_Method": "BNX"}),
    ("+A1.5", {"Antialias": "On", "Antialias_Threshold": "1.5"}),
    ("File_Gamma=bt709", {"File_Gamma": "BT709"}),
]


@pytest.mark.parametrize(("word", "values"), WORDS, ids=[word for word, _ in WORDS])
def test_a_word_of_3_8_means_what_it_does_there(
        word: str, values: Dict[str, str], tmp_path: Path) -> None:
    options = read_command_line(["s.pov", word], tmp_path, {}, [], VERSION)
    assert {key: options.values.get(key) for key in values} == values
    said = word.partition("=")[0] if word.endswith(("=7", "=on")) else word
    assert options.needs == ("3.8", said)
    lenient = read_command_line(["s.pov", word], tmp_path, {}, [], "3.7", strict=False)
    assert lenient == options
    with pytest.raises(UserError) as error:
        read_command_line(["s.pov", word], tmp_path, {}, [], "3.7.0.10")
    assert str(error.value) == f"{said} needs POV-Ray 3.8; this is 3.7.0.10"


def test_a_word_in_an_ini_file_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.ini").write_text("+Q3\nStochastic_Seed=7\n")
    with pytest.raises(UserError, match=r"^x\.ini, line 2: Stochastic_Seed needs POV-Ray 3\.8; "):
        read_command_line(["s.pov", "x.ini"], tmp_path, {}, [])


def test_words_of_3_7_need_nothing(tmp_path: Path) -> None:
    line = "s.pov +A +AM3 +THB2 +FNg +C File_Gamma=srgb".split()
    assert read_command_line(line, tmp_path, {}, []).needs == ("", "")


@pytest.mark.parametrize(("args", "block"), [
    *((f"+TH{code}", 100) for code in ("AT", "BK", "JN", "ST", "S2")), ("+THBN", 1), ("+THBNX", 1),
    ("+THBN +A", 32),
])
def test_patterns_can_be_sliced_and_error_diffusion_cannot(
        args: str, block: int, tmp_path: Path) -> None:
    options = read_command_line(["s.pov", "+H100", *args.split()], tmp_path, {}, [], VERSION)
    assert region_of(options).block == block


# --- versions

@pytest.mark.parametrize(("wanted", "first", "theirs", "least", "fits"), [
    ("3.8", "", VERSION, "", True), ("3.8.0-beta.2", "", VERSION, "", True),
    ("3.8.0-beta.1", "", VERSION, "", False), ("3.7", "", VERSION, "", False),
    (VERSION, "", VERSION, "3.8", True), ("any", "", "3.7.0.10", "3.8", False),
    ("any", "", VERSION, "3.8", True), ("auto", "3.7.0.10", VERSION, "", False),
    ("auto", "", "3.7", "3.8", False), ("auto", "", "3.10", "3.8", True),
    ("auto", VERSION, VERSION, "3.8", True), ("auto", "", "", "3.8", True),
])
def test_which_povray_fits(
        wanted: str, first: str, theirs: str, least: str, fits: bool) -> None:
    assert engine_fits(wanted, {"povray": first}, {"povray": theirs}, least) == fits


def test_the_version_of_a_beta_can_be_asked_for() -> None:
    assert JobOptions().changed({"povray": VERSION}).povray == VERSION
    assert release(VERSION) == (3, 8) and release("auto") == ()


def job_of(*uses: str, **values: str) -> PovJob:
    wire = PovJob({"Input_File_Name": "s.pov", "Width": "80", "Height": "60", **values}, (), (), ".",
                  uses).to_wire()
    return PovJob.from_wire(json.loads(json.dumps(wire)))


def test_what_a_job_needs_is_told_by_its_options_and_by_its_scene() -> None:
    assert job_of(Stochastic_Seed="7").needs == ("3.8", "Stochastic_Seed")
    assert job_of(Dither="On", Dither_Method="BN").needs == ("3.8", "Dither_Method=BN")
    assert job_of("radiosity", "povray 3.8 #version 3.8").needs == ("3.8", "#version 3.8")
    assert job_of("povray", "povray x y", "povray  ").needs == ("", "")
    assert unrenderable(job_of(Stochastic_Seed="7"), "3.7") == (
        "Stochastic_Seed needs POV-Ray 3.8; this is 3.7")
    for choice in ("3", "3.8", VERSION, "auto", "any"):
        assert unrenderable(job_of(Stochastic_Seed="7"), choice) == ""


def test_stochastic_pictures_are_sliced_only_when_asked_to_be_and_can_be_verified() -> None:
    job = job_of(Antialias="On", Sampling_Method="3")
    assert "(+AM3)" in unsliceable(job, False) and unsliceable(job, False, "4") == ""
    assert unverifiable(job, JobOptions(verify=100)) == "" and job.thread_safe


def test_where_a_version_has_its_files(beta: Beta, tmp_path: Path) -> None:
    engine = povfarm.locate_engine(str(beta.program))
    assert engine.guess == "3.8" and engine.library == (str(beta.include),)
    assert povfarm.system_ini(VERSION, str(beta.program))[0] == beta.ini
    assert povfarm.system_ini("3.7", "/usr/bin/povray")[1:] == (
        Path("/etc/povray/3.7/povray.ini"), Path("/usr/local/etc/povray/3.7/povray.ini"),
        Path("/etc/povray.ini"))
    home = tmp_path / ".povray" / "3.8"
    home.mkdir(parents=True)
    (home / "povray.ini").write_text("+W9\n")
    for version, width in ((VERSION, 9), ("3.7", 160)):
        options = read_command_line(["s.pov"], tmp_path, {"HOME": str(tmp_path)}, [], version)
        assert options.width == width


# --- scenes

NEW_SYNTAX = """// made for 3.8
/* #version 3.7; */ #version 3.8;
#declare (A, B) = array[2] { 1, 2 }
#local (C, D) = func(1);
#declare D = dictionary { ["key"]: "v.inc", .Other: 5 };
#macro M(X, optional Y)
  #if (defined(Y)) #include "gone.inc" #elseif (defined(D["key"])) #include "maybe.inc" #else 1 #end
#end
#ifdef (D.Other) #include concat("a", "b") #elseif (1) #end
#for (I, 0, 2) #if (I = 1) #break #end #end
#include "there.inc"
camera { user_defined location { function { u } function { v } function { 0 } } }
"""


def scan(place: Path, scene: str) -> "povfarm.Project":
    (place / "s.pov").write_text(scene)
    return collect_project("s.pov", (), place, None, set(), range(1), [])


def test_new_syntax_does_not_lead_the_scan_astray(tmp_path: Path) -> None:
    for name in ("there", "maybe", "v"):
        (tmp_path / f"{name}.inc").write_text("\n")
    project = scan(tmp_path, NEW_SYNTAX)
    assert {"there.inc", "maybe.inc", "v.inc"} <= set(project.sources)
    assert project.uses == {"povray 3.8 #version 3.8"}
    assert [text for text in project.warnings if "gone.inc" in text]
    with pytest.raises(UserError, match=r"includes 'missing\.inc'"):
        scan(tmp_path, NEW_SYNTAX + '#include "missing.inc"')


@pytest.mark.parametrize("text", [
    "#version 3.7;", "#version 3.5;\n", "// #version 3.8;\n", "#if (1) #version 3.8; #end", ""])
def test_other_scenes_need_no_newer_povray(text: str, tmp_path: Path) -> None:
    assert scan(tmp_path, text + "sphere { 0, 1 }").uses == set()


# --- whole renders

def test_render_takes_the_words_and_the_ini_file_of_the_povray_that_renders(
        beta: Beta, tmp_path: Path) -> None:
    done = render(tmp_path, "s.pov", "+A", "+AM3", "+AC0.9", "-CC", "+THBN", "+FNg16", beta=beta)
    assert done.returncode == 0, done.stderr
    (values,) = beta.runs()
    assert (values["Width"], values["Height"]) == ("40", "30")
    assert values["Antialias_Confidence"] == "0.9" and values["Dither_Method"] == "BN"
    assert values["Create_Continue_Trace_Log"] == "On", "what is unfinished is gone on with"
    assert values["Stochastic_Seed"] == SEED
    assert "16-bit gray" in subprocess.run(
        ["file", "s.png"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("args", "seeds"), [
    ("", {None}), ("+A +AM3", {SEED}), ("+A +AM3 +SS7", {"7"}), ("+A +AM3 +SS0", {SEED}),
    ("+A +AM2 +SS7", {"7"}), ("-A +AM3", {None}),
])
def test_all_runs_have_one_seed(
        args: str, seeds: Tuple[str, ...], beta: Beta, tmp_path: Path) -> None:
    done = render(tmp_path, "s.pov", "+KFF4", *args.split(), beta=beta)
    assert done.returncode == 0, done.stderr
    assert {values.get("Stochastic_Seed") for values in beta.runs()} == seeds


@pytest.mark.slow
def test_a_seed_is_not_given_to_a_3_7(tmp_path: Path) -> None:
    (tmp_path / "s.pov").write_text(SCENE.replace('#include "only38.inc"', "").replace(
        "Only38", "rgb 1"))
    done = render(tmp_path, "s.pov", "+W40", "+H30", "+A", "+AM3")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("word", ["+SS7", "+FNg16", "+THAT"])
def test_a_3_7_refuses_the_words_before_anything_else(word: str, tmp_path: Path) -> None:
    (tmp_path / "s.pov").write_text("sphere { 0, 1 }")
    done = render(tmp_path, "s.pov", word)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"povfarm: {word} needs POV-Ray 3.8; this is 3.7.")
    assert done.stderr.count("\n") == 1 and list(tmp_path.glob("*.png")) == []


def test_slices_of_a_stochastic_picture_are_warned_of(beta: Beta, tmp_path: Path) -> None:
    done = render(tmp_path, "s.pov", "+A", "+AM3", "+BS8", "--slices", "2", beta=beta)
    assert done.returncode == 0 and "(+AM3) draws other pixels in slices" in done.stderr
    assert [values["Stochastic_Seed"] for values in beta.runs()] == [SEED, SEED]


def test_the_seed_stays_when_a_job_is_begun_again_or_gone_on_with(
        beta: Beta, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("old\n")
    with open(tmp_path / "s.pov", "a") as file:
        file.write('\n#fopen F concat("lo", "g.txt") append #write (F, "new\\n") #fclose F\n')
    done = render(tmp_path, "s.pov", "+KFF3", "+A", "+AM3", beta=beta)
    assert done.returncode == 0 and "rendered again, in order" in done.stderr, done.stderr
    (tmp_path / "s2.png").unlink()
    done = render(tmp_path, "s.pov", "+KFF3", "+A", "+AM3", "+C", beta=beta)
    assert done.returncode == 0, done.stderr
    runs = beta.runs()
    assert len(runs) > 3 and {values["Stochastic_Seed"] for values in runs} == {SEED}


@pytest.mark.parametrize("args", ["+TH", "+THAT"])
def test_errors_that_are_carried_on_are_not_sliced(
        args: str, beta: Beta, tmp_path: Path) -> None:
    done = render(tmp_path, "s.pov", args, "+BS8", "--slices", "2", beta=beta)
    assert done.returncode == 2 and "cannot be sliced" in done.stderr, done.stderr
    done = render(tmp_path, "s.pov", args, "+BS8", beta=beta)
    (values,) = beta.runs()
    assert done.returncode == 0 and values["Dither"] == "On", done.stderr
    assert values.get("Dither_Method") == (args[3:] or None)


def test_a_job_waits_for_a_worker_that_knows_its_words(beta: Beta, tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    try:
        farm.work("--worker-name", "old")
        text = SCENE.replace('#include "only38.inc"', "").replace("Only38", "rgb 1")
        (tmp_path / "s.pov").write_text(text)
        asked = run(tmp_path, "submit", "s.pov", "+W40", "+H30", "+SS7", "--povray-version", "3.7",
                    cwd=tmp_path)
        assert asked.returncode == 2 and "+SS7 needs POV-Ray 3.8; this is 3.7" in asked.stderr
        number = run(tmp_path, "submit", "s.pov", "+W40", "+H30", "+SS7", cwd=tmp_path)
        assert number.returncode == 0, number.stderr
        shown = wait_until(
            lambda: [text for text in [run(tmp_path, "status", cwd=tmp_path).stdout]
                     if "waits" in text or "needs" in text], "status says nothing")
        assert "+SS7 needs POV-Ray 3.8, which no worker here has" in shown[0]
        farm.work("--worker-name", "new", "--povray", str(beta.program), "--unconfined")
        wait_until(lambda: "done" in run(tmp_path, "status", cwd=tmp_path).stdout, "not rendered")
        assert [values["Stochastic_Seed"] for values in beta.runs()] == ["7"]
    finally:
        farm.close()


def test_a_3_8_of_the_command_line_is_asked_only_when_it_matters(
        beta: Beta, tmp_path: Path) -> None:
    engine = Engine("/usr/bin/povray", "", ())
    assert engine.guess == "3.7", "then a render need not wait for what it says"
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {beta.program} "$@"\n')
    wrapper.chmod(0o755)
    assert povfarm.locate_engine(str(wrapper)).guess == ""
    (tmp_path / ".povray" / "3.8").mkdir(parents=True)
    (tmp_path / ".povray" / "3.8" / "povray.ini").write_text(
        f'Library_Path="{beta.include}"\n+W8 +H6\n')
    done = run(tmp_path, "render", "--povray", str(wrapper), "--unconfined", "s.pov", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert beta.runs()[0]["Width"] == "8"
    assert environment(tmp_path)["HOME"] == str(tmp_path)


@pytest.mark.slow
def test_a_scene_of_3_8_fails_in_a_3_7_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "s.pov").write_text("#version 3.8;\nsphere { 0, 1 }")
    done = render(tmp_path, "s.pov", "+W8", "+H6")
    assert done.returncode == 1 and "requires POV-Ray version 3.8 or later" in done.stderr
    assert "no worker" not in done.stderr


def test_a_povray_may_be_called_from_here(beta: Beta, tmp_path: Path) -> None:
    program = beta.program.relative_to(tmp_path)
    done = run(tmp_path, "render", "--povray", str(program), "--unconfined", "s.pov", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert beta.runs()[0]["Width"] == "40"
