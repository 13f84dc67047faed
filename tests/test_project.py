"""PROJECT: the files that a job needs, found as the real POV-Ray finds them."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import pytest

import povfarm
from helpers.base import run_povray, tried

STANDARD = povfarm.STANDARD
INSTALLED = Path("/usr/share/povray-3.7")
OWN = [INSTALLED, INSTALLED / "ini", INSTALLED / "include"]
HEAD = "#version 3.7; global_settings { assumed_gamma 1 }\ncamera { location -z*3 look_at 0 }\n"
BALL = "light_source { -z*5 1 } sphere { 0, 1 pigment { rgb 1 } }\n"


def make(root: Path, files: Dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def collect(cwd: Path, scene: str = "s.pov", library: Sequence[str] = (STANDARD,),
            root: Optional[Path] = None, outputs: Sequence[str] = (),
            frames: Sequence[int] = range(1), **more: Any) -> povfarm.Project:
    more.setdefault("standard_dirs", OWN)
    return povfarm.collect_project(scene, library, cwd, root, outputs, frames, **more)


def paths(project: povfarm.Project) -> List[str]:
    return [file.path for file in project.manifest.files]


def unpack(project: povfarm.Project, tree: Path) -> Path:
    """Make the tree that a worker has, of exactly the manifest's files, and return run_dir."""
    for file in project.manifest.files:
        path = povfarm.safe_join(tree, file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(povfarm.file_blocks(project.sources[file.path])))
    for folder in project.manifest.directories:
        povfarm.safe_join(tree, folder).mkdir(parents=True, exist_ok=True)
    (tree / project.run_dir).mkdir(parents=True, exist_ok=True)
    return tree / project.run_dir


def render_tree(project: povfarm.Project, tree: Path) -> subprocess.CompletedProcess[str]:
    """Run the real POV-Ray over a manifest's files and nothing else of ours."""
    run_dir = unpack(project, tree)
    lines = [f'Input_File_Name="{project.scene}"', 'Output_File_Name="out.png"']
    lines += [f'Library_Path="{os.path.relpath(tree / folder, run_dir)}"'
              for folder in project.library if folder != STANDARD]
    (run_dir / "zz.ini").write_text("\n".join(lines), encoding="utf-8")
    done = run_povray(["zz.ini", "+W16", "+H12", "+Q3", "+WT1", "-GA"], run_dir)
    assert (run_dir / "out.png").is_file() == (done.returncode == 0)
    return done


def test_a_farms_own_data_and_keys_are_no_part_of_a_project(tmp_path: Path) -> None:
    """A data directory may well lie beside the scene: ``serve --data farm``."""
    make(tmp_path, {"s.pov": "sphere{0,1}", "maps/a.inc": "", "farm/farm.key": "secret",
                    "farm/farm.db": "", "w/worker/workers/anna-1": "secret",
                    "w/worker/cache/x/tree/s.pov": "", "w/workers/bee.inc": ""})
    assert paths(collect(tmp_path)) == ["maps/a.inc", "s.pov", "w/workers/bee.inc"]


# --- POV-Ray's own examples

NOT_RENDERABLE = {
    "advanced/cliche/cliche.pov": "'sign'",  # only sign.png is tried; the file is sign.jpg
    "incdemo/sort.pov": "'arial.ttf'",
}


def test_every_example_is_accepted_that_povray_accepts(examples: Path) -> None:
    wrong, cache = {}, {}
    for scene in sorted(examples.rglob("*.pov")):
        name = str(scene.relative_to(examples))
        try:
            collect(scene.parent, scene.name, hash_cache=cache)
        except povfarm.UserError as error:
            wrong[name] = str(error)
    assert sorted(wrong) == sorted(NOT_RENDERABLE)
    for name, missing in NOT_RENDERABLE.items():
        assert missing in wrong[name]


@pytest.mark.parametrize("name", NOT_RENDERABLE)
def test_povray_too_misses_what_is_missing(examples: Path, tmp_path: Path, name: str) -> None:
    scene = examples / name
    done = run_povray([scene.name, f"+O{tmp_path}/", "+W16", "+H12", "+Q3"], scene.parent)
    assert done.returncode == 1 and f"find file {NOT_RENDERABLE[name]}" in done.stderr


def test_every_example_animation_is_accepted(examples: Path) -> None:
    own = []
    inis = sorted(examples.rglob("*.ini"))
    assert len(inis) > 30
    for ini in inis:
        if ini.name == "__empty.ini":
            continue  # a form to fill in
        options = povfarm.read_command_line([ini.name], ini.parent, {})
        plan = povfarm.plan_frames(options)
        if ini.name == "reflection.ini":
            with pytest.raises(povfarm.UserError, match=r"'reflect\.pov'.*is reflection\.pov"):
                collect(ini.parent, options.scene, options.library)
            continue
        outputs = [plan.output_name(frame) for frame in plan.frames]
        project = collect(ini.parent, options.scene, options.library, None, outputs, plan.frames)
        assert project.scene == options.scene and project.run_dir == "."
        own += [ini.name] if "own-output" in project.uses else []
    assert own == ["desk.ini"]


# These need maps, height fields, fonts, media or includes of their own, also from other places.
COMPLETE = """advanced/balcony/balcony.pov advanced/blocks/stackernight.pov advanced/mtmand.pov
    advanced/crater/crater.pov advanced/drums2/drums.pov advanced/glasschess/glasschess.pov
    advanced/teapot/teapot.pov camera/mesh_camera/meshcam_persp_demo.pov
    incdemo/glasses/samp_demo.pov incdemo/metals/golds.pov incdemo/woods/teak.pov
    incdemo/texture1.pov incdemo/logo.pov language/macros/local.pov objects/prism3a.pov
    textures/patterns/densfile.pov textures/pigments/matmap.pov
    textures/normals/bumpmap.pov objects/ttf1.pov""".split()


def only_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every root too large, so that only the files go that the scene names."""
    monkeypatch.setattr(povfarm, "GUARD_FILES", -1)


def test_all_examples_render_from_the_files_that_scanning_finds(
    povray: str, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config
) -> None:
    """Those of many sorts of files without an error that POV-Ray goes on after.

    Besides these every fourth, or all with ``--long``.
    """
    only_scanned(monkeypatch)

    def render(scene: Path) -> Optional[str]:
        name = str(scene.relative_to(examples))
        if name in NOT_RENDERABLE:
            return None
        project = collect(scene.parent, scene.name)
        done = render_tree(project, tmp_path / name)
        wrong = bool(done.returncode) and scene.parent.name != "portfolio"
        if name in COMPLETE:
            assert len(project.manifest.files) < 20
            wrong = wrong or "error" in done.stderr.lower().replace("possible parse error", "")
        return done.stderr[-2000:] if wrong else None

    scenes = sorted(examples.rglob("*.pov"))
    assert {examples / name for name in COMPLETE} <= {*scenes} and not {*COMPLETE} & {*NOT_RENDERABLE}
    if not pytestconfig.getoption("long"):
        scenes = sorted({*scenes[::4], *(examples / name for name in COMPLETE)})
    with ThreadPoolExecutor(14) as pool:  # POV-Ray sleeps most of the time
        assert {str(s): text for s, text in zip(scenes, pool.map(render, scenes)) if text} == {}


# --- what POV-Ray reads

# What a scene says, and the files that lie there. POV-Ray itself tells whether that is enough.
STATEMENTS = {
    "include": ('#include "a.inc"', ["a.inc"]),
    "include without extension": ('#include "a"', ["a.inc"]),
    "include with capital extension": ('#include "a"', ["a.INC"]),
    "include of another extension": ('#include "a.txt"', ["a.txt"]),
    "include with extension appended": ('#include "a.txt"', ["a.txt.inc"]),
    "mixed case extension": ('#include "a.Inc"', ["a.inc"]),
    "other case": ('#include "A.inc"', ["a.inc"]),
    "with a blank and an umlaut in the directory": ('#include "x y/a b.inc"', ["x y/a b.inc"]),
    "quote in the name": (r'#include "a\"b.inc"', ['a"b.inc']),
    "backslash": (r'#include "x\a.inc"', ["x/a.inc"]),
    "dots": ('#include "x/../a.inc"', ["a.inc", "x/b.inc"]),
    "missing": ('#include "a.inc"', []),
    "spaces in the directive": ('#   include"a.inc"', ["a.inc"]),
    "missing with spaces in the directive": ('#   include"a.inc"', []),
    "in a line comment": ('// #include "a.inc"', []),
    "in a nested comment": ('/* /* */ #include "a.inc" */', []),
    "after a nested comment": ('/* /* */ */ #include "a.inc"', []),
    "line comment in a comment": ('/* // */ #include "a.inc"', []),
    "comment in a line comment": ('// /* \n#include "a.inc"', []),
    "quote in a comment": ('/* " */ #include "a.inc" // "', []),
    "comment in a string": ('#declare S = "/*"; #include "a.inc" #declare S = "*/";', []),
    "string over lines": ('#declare S = "one\n#include";', []),
    "never reached": ('#if (0) #include "a.inc" #end', []),
    "a macro not called": ('#macro M() #include "a.inc" #end', []),
    "after a macro": ('#macro M() #if (1) #end #end #include "a.inc"', []),
    "written before": (
        '#fopen F "a.inc" write #write (F, "#declare A = 1;") #fclose F #include "a.inc"', []),
    "written by a macro": (
        '#macro W(N) #fopen F N write #write (F, "#declare A = 1;") #fclose F #end\n'
        'W("a.inc") #include "a.inc"', []),
    "opened for reading": ('#fopen F "a.txt" read', []),
    "opened for appending": ('#fopen F "a.txt" append', []),
    "asked for": ('#if (file_exists("a.txt")) #end', []),
    "font without extension": ('text { ttf "timrom" "x" 1, 0 }', []),
    "font": ('text { ttf "cyrvetic.ttf" "x" 1, 0 }', []),
    "font in capitals": ('text { ttf "TIMROM.TTF" "x" 1, 0 }', []),
    "image": ('plane { z, 1 pigment { image_map { png "m.png" } } }', ["m.png"]),
    "image without extension": ('plane { z, 1 pigment { image_map { png "m" } } }', ["m.PNG"]),
    "image without type": ('plane { z, 1 pigment { image_map { "m.png" } } }', ["m.png"]),
    "image without type, missing": ('plane { z, 1 pigment { image_map { "m.png" } } }', []),
    "image without all": ('plane { z, 1 pigment { image_map { "m" } } }', ["m.png"]),
    "image of a wrong type": ('plane { z, 1 pigment { image_map { gif "m" } } }', ["m.png"]),
    "height field": ('height_field { png "m.png" }', []),
    "image pattern": ('plane { z, 1 pigment { image_pattern { png "m.png" } } }', []),
    "bump map": ('plane { z, 1 normal { bump_map { png "m.png" } } }', []),
    "standard image": ('plane { z, 1 pigment { image_map { png "plasma2.png" } } }', []),
    "standard include": ('#include "colors.inc"', []),
    "standard include without extension": ('#include "colors"', []),
    "density": ('sphere { 0, 1 pigment { density_file df3 "d.df3" } }', []),
}


@pytest.fixture(scope="module")
def povray_says(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, bool]:
    root = tmp_path_factory.mktemp("statements")
    picture = OWN[-1] / "plasma3.png"

    def renders(name: str) -> bool:
        text, files = STATEMENTS[name]
        place = root / name.replace(" ", "_")
        make(place, {"s.pov": HEAD + text + "\n" + BALL, **dict.fromkeys(files, "// empty\n")})
        for file in files:
            if file.lower().endswith(".png"):
                shutil.copyfile(picture, place / file)
        return run_povray(["+Is.pov", "+W16", "+H12"], place).returncode == 0

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(STATEMENTS, pool.map(renders, STATEMENTS)))


@pytest.mark.parametrize("name", STATEMENTS)
def test_missing_is_what_povray_misses(
    povray_says: Dict[str, bool], tmp_path: Path, name: str
) -> None:
    text, files = STATEMENTS[name]
    make(tmp_path, {"s.pov": HEAD + text + "\n" + BALL, **dict.fromkeys(files, "// empty\n")})
    try:
        collect(tmp_path)
    except povfarm.UserError as error:
        assert "\n" not in str(error) and "s.pov:" in str(error)
        assert povray_says[name] is False, error
    else:
        assert povray_says[name] is True


# What a scene says (its third line is the first of it): what the error says.
MESSAGES = {
    '\n#include "foo.inc"': (
        "s.pov:4 includes 'foo.inc', which is neither in {cwd} nor in a library path (+L...)"),
    'height_field { png "f.png" }\n#include "b.inc"': "s.pov:3 reads 'f.png', which is neither",
    '#include "a.inc" #include "b.inc"': "(+L...); missing too: 'b.inc'",
    '#include "inc/Sub.inc"': "there is 'inc/sub.inc', so mind capital and small letters",
    '#include "INC/sub.inc"': "there is 'inc/sub.inc'",
    r'#include "inc\sub.inc"': "write its directories with forward slashes",
    '#include "inc/sub.inc"': "inc/sub.inc:2 includes 'more.inc', which is neither in {cwd} nor in "
                              "a library path (+L...), but in {cwd}/inc: go there first, or add",
    '#include "/etc/passwd"': "s.pov:3 includes '/etc/passwd', which other computers do not have",
    r'#include "C:\a.inc"': r"includes 'C:\a.inc', which other computers do not have there",
    '#include "../not.inc"': "includes '../not.inc', which is neither in {cwd}",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_a_missing_file_is_named_with_its_place(tmp_path: Path, text: str) -> None:
    cwd = tmp_path / "p"
    make(tmp_path, {"p/s.pov": HEAD + text, "p/inc/more.inc": "",
                    "p/inc/sub.inc": '\n#include "more.inc"'})
    with pytest.raises(povfarm.UserError) as error:
        collect(cwd)
    assert MESSAGES[text].format(cwd=cwd) in str(error.value)


def test_what_may_not_be_needed_is_only_warned_of(tmp_path: Path) -> None:
    make(tmp_path, {"s.pov": '#if (clock > 1) #include "a.inc" #include "b.inc" #end',
                    "a.inc": '#include "/x/c.inc"'})
    warnings = collect(tmp_path).warnings
    assert ["'b.inc'" in warnings[0], "'/x/c.inc'" in warnings[1], len(warnings)] == [True, True, 2]


SCENES_MISSING = {
    "nowhere.pov": "the scene 'nowhere.pov' is neither in {cwd} nor in a library path (+L{cwd}/x)"
                   ": there is S.pov, a.pov",
    "s.pov": "there is 'S.pov', so mind capital and small letters",
    "beside.pov": "it is beside its INI file, so do first: cd \"{cwd}/an ini\"",
    "no/where.pov": "the scene 'no/where.pov' is neither",
    "": "the scene '' is neither",
}


@pytest.mark.parametrize("scene", SCENES_MISSING)
def test_a_missing_scene_is_named_with_the_places_searched(tmp_path: Path, scene: str) -> None:
    make(tmp_path, {"a.pov": "", "S.pov": "", "an ini/beside.pov": "", "x/y": ""})
    with pytest.raises(povfarm.UserError) as error:
        collect(tmp_path, scene, ["x"], ini_dirs=[tmp_path / "x" / ".." / "an ini"])
    assert SCENES_MISSING[scene].format(cwd=tmp_path) in str(error.value)


def test_without_povray_its_own_files_are_known_by_name(tmp_path: Path) -> None:
    for name in sorted(path.name for path in OWN[-1].iterdir()):
        kind = {".inc": "#include", ".ttf": "text { ttf", ".df3": "df3"}.get(name[-4:], "sys")
        make(tmp_path, {"s.pov": f'{kind} "{name}"'})
        assert paths(collect(tmp_path, standard_dirs=[])) == ["s.pov"]
    make(tmp_path, {"s.pov": '#include "colours.inc"'})
    with pytest.raises(povfarm.UserError):
        collect(tmp_path, standard_dirs=[])


USES = {
    "global_settings { radiosity { count 5 } }": {"radiosity"},
    "#macro R() radiosity { count 5 } #end global_settings { R() }": {"radiosity"},
    "global_settings { #if (1) photons { count 5 } #end }": {"photons"},
    "sphere { 0, 1 photons { target } }": set(),
    "// radiosity { } photons { }": set(),
    "#declare radiosity_on = 1;": set(),
    'png "old/so03.png"': {"own-output"},
    '#declare Name = "so03.png";': {"own-output"},
    'png concat("so", str(frame_number - 1, -2, 0), ".png")': {"own-output"},
    '#debug concat("sox", "x")': set(),
    '#debug concat("s", "x")': set(),
    '#if (0) png "so04.png" #end': set(),
}


@pytest.mark.parametrize("text", USES)
def test_uses_are_seen(tmp_path: Path, text: str) -> None:
    make(tmp_path, {"s.pov": '#include "a.inc"', "a.inc": text})
    outputs = [f"so{frame:02}.png" for frame in range(1, 4)]
    assert collect(tmp_path, outputs=outputs, frames=range(1, 4)).uses == USES[text]


def test_includes_that_include_each_other_end(tmp_path: Path) -> None:
    make(tmp_path, {"s.pov": '#include "a.inc"', "a.inc": '#ifndef (A) #include "b.inc" #end',
                    "b.inc": '#include "a.inc"', "c.inc": ""})
    assert paths(collect(tmp_path)) == ["a.inc", "b.inc", "c.inc", "s.pov"]


NAMES_OF_NO_FILE = {
    '#include "a\0b.inc"': "s.pov:1 includes 'a\0b.inc', which is neither",
    '#include "a\0b/c.inc"': "which is neither", '#include "/a\0b/c.inc"': "other computers",
    f'#include "{"a" * 300}/c.inc"': "which is neither", f'#include "/{"a" * 300}/c"': "other",
}


@pytest.mark.parametrize("text", NAMES_OF_NO_FILE)
def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path, text: str) -> None:
    make(tmp_path, {"s.pov": text})
    with pytest.raises(povfarm.UserError) as error:
        collect(tmp_path)
    assert NAMES_OF_NO_FILE[text] in str(error.value)
    with pytest.raises(povfarm.UserError, match="is neither"):
        collect(tmp_path, "a\0b/s.pov")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("scene, library", [("k\udcfc.pov", ()), ("s.pov", ("k\udcfc",))])
def test_a_name_that_is_no_utf_8_is_told(
    tmp_path: Path, scene: str, library: Sequence[str]
) -> None:
    make(tmp_path, {scene: '#include "a.inc"', "k\udcfc/a.inc": ""} if library else {scene: ""})
    with pytest.raises(povfarm.UserError, match=r"'k\\udcfc.* not a name that every system"):
        collect(tmp_path, scene, library)


# --- the layout of the tree

class Layout:
    """A project and how it is called; and the tree that a worker is to get."""

    def __init__(self, files: Dict[str, str], tree: str, cwd: str = "p", scene: str = "s.pov",
                 library: Sequence[str] = (STANDARD,), root: Optional[str] = None,
                 run_dir: str = ".", new_scene: Optional[str] = None,
                 new_library: Sequence[str] = (STANDARD,)) -> None:
        self.files, self.tree, self.cwd, self.scene = files, tree.split("|"), cwd, scene
        self.library, self.root, self.run_dir = library, root, run_dir
        self.new_scene = scene if new_scene is None else new_scene
        self.new_library = new_library


def scene(*includes: str) -> str:
    return HEAD + "".join(f'#include "{name}"\n' for name in includes) + BALL


INC = "// an include\n"
LAYOUTS = {
    "all in the current directory": Layout(
        {"p/s.pov": scene("i/a.inc"), "p/i/a.inc": INC, "out.inc": INC}, "i/a.inc|s.pov"),
    "a scene below the current directory": Layout(
        {"p/d/s.pov": scene("i/a.inc"), "p/i/a.inc": INC, "p/x.inc": INC, "p/d/y.inc": INC},
        "d/s.pov|d/y.inc|i/a.inc|x.inc", scene="d/s.pov"),
    "a root above the current directory": Layout(
        {"p/d/s.pov": scene("../i/a.inc"), "p/i/a.inc": INC}, "d/s.pov|i/a.inc",
        cwd="p/d", root="p", run_dir="d"),
    "a scene elsewhere": Layout(
        {"q/s.pov": scene("a.inc"), "q/b.inc": INC, "p/a.inc": INC, "p/c.inc": INC},
        "p/a.inc|q/b.inc|q/s.pov", scene="../q/s.pov", run_dir="p"),
    "a scene elsewhere, by its whole path": Layout(
        {"q/s.pov": scene(), "q/_cwd/x.inc": INC}, "_lib1/_cwd/x.inc|_lib1/s.pov",
        scene="{top}/q/s.pov", new_scene="_lib1/s.pov"),
    "a whole path": Layout(
        {"p/d/s.pov": scene()}, "d/s.pov", scene="{top}/p/d/s.pov", new_scene="d/s.pov"),
    "a library outside": Layout(
        {"p/s.pov": scene("a.inc", "sub/b"), "l/a.inc": scene("c.inc"), "l/sub/b.inc": INC,
         "l/unused.inc": INC, "m/c.inc": INC},
        "_lib1/a.inc|_lib1/sub/b.inc|_lib1/unused.inc|_lib2/c.inc|s.pov",
        library=("../l", "../m", STANDARD), new_library=("_lib1", "_lib2", STANDARD)),
    "a library inside": Layout(
        {"p/s.pov": scene("a.inc"), "p/l/a.inc": INC}, "l/a.inc|s.pov",
        library=(STANDARD, "l"), new_library=(STANDARD, "l")),
    "a library inside, above the current directory": Layout(
        {"p/d/s.pov": scene("a.inc"), "p/l/a.inc": INC}, "d/s.pov|l/a.inc", cwd="p/d", root="p",
        library=("../l",), run_dir="d", new_library=("l",)),
    "a library that holds the project": Layout(
        {"p/s.pov": scene("a.inc", "p/b.inc"), "a.inc": INC, "p/b.inc": INC},
        "a.inc|p/b.inc|p/s.pov", library=("..",), run_dir="p", new_library=(".",)),
    "the first place counts": Layout(
        {"p/s.pov": scene("a.inc"), "l/a.inc": "#error", "p/a.inc": INC},
        "_lib1/a.inc|a.inc|s.pov", library=("../l",), new_library=("_lib1",)),
    "a scene in the library": Layout(
        {"l/s.pov": scene("a.inc"), "l/a.inc": INC, "p/a.inc": scene("b.inc"), "p/b.inc": INC},
        "_lib1/a.inc|_lib1/s.pov|a.inc|b.inc", library=("../l",), new_library=("_lib1",)),
    "an include in the parent": Layout(
        {"lib.inc": INC, "other.inc": INC, "p/s.pov": scene("../lib.inc")}, "lib.inc|p/s.pov",
        run_dir="p"),
    "an include two above": Layout(
        {"p/i/lib.inc": INC, "p/d/e/s.pov": scene("../../i/lib.inc")}, "d/e/s.pov|i/lib.inc",
        cwd="p/d/e", run_dir="d/e"),
    "an include in the parent, in a scene below": Layout(
        {"lib.inc": INC, "p/d/s.pov": scene("../lib.inc", "i.inc"), "p/i.inc": INC},
        "lib.inc|p/d/s.pov|p/i.inc", scene="d/s.pov", run_dir="p"),
    "up through a directory of which nothing is needed": Layout(
        {"x/y.inc": INC, "lib.inc": INC, "p/s.pov": scene("../x/../lib.inc")},
        "lib.inc|p/s.pov", run_dir="p"),
    "from a library up": Layout(
        {"p/s.pov": scene("../m/c.inc"), "l/a.inc": INC, "x/m/c.inc": INC, "x/l/b.inc": INC},
        "_lib1/a.inc|_lib2/l/b.inc|_lib2/m/c.inc|s.pov", library=("../l", "../x/l"),
        new_library=("_lib1", "_lib2/l")),
    "a whole path into the project": Layout(
        {"p/s.pov": scene("TOP/p/i/a.inc"), "p/i/a.inc": scene("TOP/l/b.inc"), "l/b.inc": INC},
        "l/b.inc|p/i/a.inc|p/s.pov", run_dir="p"),
    "a whole path into a library": Layout(
        {"p/s.pov": scene("TOP/l/b.inc"), "l/b.inc": INC}, "_lib1/b.inc|s.pov",
        library=("../l",), new_library=("_lib1",)),
    "names put together": Layout(
        {"p/s.pov": "#macro I(A) #include concat(A, \".inc\") #end\n" + scene()
         + 'I("../t/a") I(".h/b") I("TOP/u/c") #declare D = "../v"; I(concat(D, "/d"))',
         "t/a.inc": INC, "t/aa.inc": INC, "t/b.inc": INC, "p/.h/b.inc": INC, "p/.i/b.inc": INC,
         "u/c.inc": INC, "u/d.inc": INC, "v/d.inc": INC, "v/w/e.inc": INC, "x.inc": INC},
        "p/.h/b.inc|p/s.pov|t/a.inc|t/aa.inc|u/c.inc|v/d.inc|v/w/e.inc", run_dir="p"),
    "a scene without extension": Layout({"p/s.pov": scene()}, "s.pov", scene="s"),
    "a library that is not there": Layout(
        {"p/s.pov": scene()}, "s.pov", library=("nothing", STANDARD)),
    "a library that is POV-Ray's own": Layout(
        {"p/s.pov": scene("colors.inc")}, "s.pov", library=("/usr/share/povray-3.7/include",)),
    "a name of our own in use": Layout(
        {"p/s.pov": scene("a.inc"), "p/_lib1/x.inc": INC, "l/a.inc": INC},
        "_lib1/x.inc|_lib1_/a.inc|s.pov", library=("../l",), new_library=("_lib1_",)),
    "blanks and quotes": Layout(
        {"p/my s.pov": scene("it's/a b.inc"), "p/it's/a b.inc": INC}, "it's/a b.inc|my s.pov",
        scene="my s.pov"),
    "umlauts, which POV-Ray takes for blanks": Layout(
        {"p/Küche.pov": scene("büro/tür.inc"), "p/büro/tür.inc": INC},
        "K  che.pov|K che.pov|Küche.pov|b  ro/t  r.inc|b ro/t r.inc|büro/tür.inc",
        scene="Küche.pov", new_scene="K  che.pov"),
    "umlauts in a scene in UTF-8": Layout(
        {"p/s.pov": scene("tür.inc").replace("assumed_gamma 1", "assumed_gamma 1 charset utf8"),
         "p/tür.inc": INC}, "s.pov|t  r.inc|t r.inc|tür.inc"),
    "umlauts in directories": Layout(
        {"p/ö/s.pov": scene("a.inc", "c.inc"), "p/ö/a.inc": INC, "ä/c.inc": INC},
        "_lib1/c.inc|  /a.inc|  /s.pov| /a.inc| /s.pov|ö/a.inc|ö/s.pov", cwd="p/ö", root="p",
        library=("../../ä",), run_dir="  ", new_library=("_lib1",)),
    "umlauts in a library": Layout(
        {"p/s.pov": scene("c.inc"), "p/ä/c.inc": INC}, "  /c.inc| /c.inc|s.pov|ä/c.inc",
        library=("ä",), new_library=("  ",)),
}


@pytest.fixture(scope="module")
def laid_out(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """Each layout's project, and how the real POV-Ray fares in a tree of exactly its files."""
    def render(name: str) -> Any:
        case, place = LAYOUTS[name], tmp_path_factory.mktemp("layout")
        make(place / "from", {name: text.replace("TOP", str(place / "from"))
                              for name, text in case.files.items()})
        cwd = place / "from" / case.cwd
        cwd.mkdir(exist_ok=True)
        project = collect(cwd, case.scene.format(top=place / "from"), case.library,
                          place / "from" / case.root if case.root else None)
        return project, render_tree(project, place / "tree")

    with ThreadPoolExecutor(6) as pool:
        return dict(zip(LAYOUTS, pool.map(render, LAYOUTS)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_povray_renders_in_the_tree_of(laid_out: Dict[str, Any], name: str) -> None:
    case, (project, done) = LAYOUTS[name], laid_out[name]
    assert paths(project) == sorted(case.tree)
    assert [project.run_dir, project.scene] == [case.run_dir, case.new_scene]
    assert list(project.library) == list(case.new_library)
    assert done.returncode == 0, done.stderr


# --- which files of the root go

FILES = """s.pov a.inc b.inc maps/m.png maps/raw/r.tif critters/bug.inc critters/old/bug.inc
    Frames/f1.inc CVS/x sub/CVS/y sub/c.inc notes.txt""".split()
ALL = sorted(set(FILES) - {"CVS/x", "sub/CVS/y"})

# Texts of .bsac files by directory: the files that go, FILE>N when only after a frame.
BSACS = {
    "none": ({}, ALL),
    "BSAC's own example": ({".": "Include\n*.pov\n*.inc\nExclude\nCVS\nFrames\n"},
                           "a.inc b.inc critters/bug.inc critters/old/bug.inc s.pov sub/c.inc"),
    "keywords in any case, blanks, carriage returns": (
        {".": "INCLUDE\r\n  a.inc  \r\n\r\neXCLUDE\r\na*\r\n"}, "s.pov"),
    "a directory": ({".": "Include\nmaps\n"}, "maps/m.png maps/raw/r.tif s.pov"),
    "a directory with a slash": ({".": "Include\nmaps/\n"}, "maps/m.png maps/raw/r.tif s.pov"),
    "a path": ({".": "Include\ncritters/bug.inc\n"}, "critters/bug.inc s.pov"),
    "a path as Windows has it": ({".": "Include\ncritters\\old\n"}, "critters/old/bug.inc s.pov"),
    "a path with wildcards": ({".": "Include\ncri*/b?g.inc\n"}, "critters/bug.inc s.pov"),
    "a name is a name anywhere": ({".": "Include\nbug.inc\n"},
                                  "critters/bug.inc critters/old/bug.inc s.pov"),
    "a name is not in capitals": ({".": "Include\nA.inc\n"}, "s.pov"),
    "excluded first": ({".": "Exclude\nold\nInclude\ncritters\n"}, "critters/bug.inc s.pov"),
    "excluded only": ({".": "Exclude\n*.inc\nmaps\nFrames"}, "notes.txt s.pov"),
    "what the scene names goes anyway": ({".": "Exclude\n*\n"}, "s.pov"),
    "a wildcard does not take CVS": ({".": "Include\n*\n"}, ALL),
    "a name takes even CVS": ({".": "Include\nCVS\n"}, "CVS/x s.pov sub/CVS/y"),
    "a condition": ({".": "Include\na.inc\nif %f > 100\ncritters\n"},
                    "a.inc critters/bug.inc>100 critters/old/bug.inc>100 s.pov"),
    "a condition ends": ({".": "Include\nIF %f>7\na.inc\nendif\nb.inc\nif %f > 8\nsub\n"
                               "Include\nnotes.txt\n"},
                         "a.inc>7 b.inc notes.txt s.pov sub/c.inc>8"),
    "the weaker condition counts": (
        {".": "Include\nif %f > 9\ncritters\nif %f > 5\nbug.inc\nif %f > 7\n*.inc"},
        "a.inc>7 b.inc>7 critters/bug.inc>5 critters/old/bug.inc>5 Frames/f1.inc>7 s.pov "
        "sub/c.inc>7"),
    "a condition that no frame meets": ({".": "Include\nif %f > 200\na.inc\n"}, "s.pov"),
    "excluded for some frames only": ({".": "Include\n*.inc\nExclude\nFrames\nif %f > 3\na.inc"},
                                      "a.inc b.inc critters/bug.inc critters/old/bug.inc s.pov "
                                      "sub/c.inc"),
    "a subdirectory takes out": ({".": "Include\ncritters\nb.inc", "critters": "Exclude\nold"},
                                 "b.inc critters/bug.inc s.pov"),
    "a subdirectory adds": ({".": "Include\nb.inc", "critters": "Include\nold"},
                            "b.inc critters/old/bug.inc s.pov"),
    "a subdirectory chooses": (
        {"maps": "Include\n*.png"}, [path for path in ALL if path != "maps/raw/r.tif"]),
    "an excluded subdirectory has no say": (
        {".": "Include\n*.pov\nExclude\ncritters", "critters": "Include\n*"}, "s.pov"),
}


@pytest.mark.parametrize("name", BSACS)
def test_bsac(tmp_path: Path, name: str) -> None:
    texts, wanted = BSACS[name]
    make(tmp_path, dict.fromkeys(FILES, ""))
    make(tmp_path, {f"{folder}/.bsac": text for folder, text in texts.items()})
    wanted = wanted.split() if isinstance(wanted, str) else wanted
    found = [file.path + ("" if file.after_frame is None else f">{file.after_frame}")
             for file in collect(tmp_path, frames=range(1, 151)).manifest.files]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("text, problem", [
    ("*.inc\n", ".bsac:1 names '*.inc' before any line Include or Exclude"),
    ("Include\nif %f < 3\n", ".bsac:2 cannot be read: a condition is 'if %f > 100'"),
])
def test_bsac_that_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    make(tmp_path, {"s.pov": "", ".bsac": text})
    with pytest.raises(povfarm.UserError) as error:
        collect(tmp_path)
    assert problem in str(error.value)


def test_a_bsac_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reading(path: Path, *how: str) -> str:
        raise PermissionError(13, "Permission denied")

    make(tmp_path, {"s.pov": "", ".bsac": ""})
    monkeypatch.setattr(Path, "read_text", no_reading)
    with pytest.raises(povfarm.UserError, match=r"\.bsac cannot be read: Permission denied"):
        collect(tmp_path)


@pytest.mark.parametrize("text, after", [
    ('#include "critters/bug.inc"', None),
    ('#if (clock > 5) #include "critters/bug.inc" #end', 100),
    ('', 100),
])
def test_a_condition_holds_unless_the_scene_surely_reads_the_file(
    tmp_path: Path, text: str, after: Optional[int]
) -> None:
    make(tmp_path, {"s.pov": text, "critters/bug.inc": "",
                    ".bsac": "Include\nif %f > 100\ncritters\n"})
    manifest = collect(tmp_path, frames=range(1, 200)).manifest
    assert {file.path: file.after_frame for file in manifest.files} == {
        "critters/bug.inc": after, "s.pov": None}


def test_what_is_nobodys_work_stays(tmp_path: Path) -> None:
    stay = """s01.png s02.png s.pov-state .git/config .hidden CVS/Root .svn/x __pycache__/a.pyc
        Thumbs.db sub/desktop.ini sub/s01.png made-frames/s01.png""".split()
    go = """s.pov s.png.txt s_1.png s03.png s3.png s01.tga maps/s01.png other01.png frames/x.inc
        s-frames/s01.png old.bak note.pov~ sub/s02.png made/x.png""".split()
    make(tmp_path, dict.fromkeys([*stay, *go], ""))
    project = collect(tmp_path, outputs=["s01.png", "s02.png", "sub/s01.png"], frames=range(1, 3),
                      made=lambda path: path.name.startswith("made"))
    assert paths(project) == sorted(go)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_followed_where_names_may_lead(tmp_path: Path) -> None:
    root = tmp_path / "p"
    make(tmp_path, {"p/s.pov": '#include "scanned.inc"', "p/a.inc": "A", "p/d/b.inc": "",
                    "out.inc": "O", "shared/c.inc": "", ".secret/key": ""})
    for name, target in {"in.inc": "a.inc", "out1.inc": "../out.inc", "scanned.inc": "../out.inc",
                         "inside": "d", "away": "../shared", "d/loop": "../d", "d/up": "..",
                         "farther": "../..", "key": "../.secret/key", "secret": "../.secret",
                         "etc": "/etc", "hosts": "/etc/hosts", "broken.inc": "nothing"}.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    project = collect(root)
    assert paths(project) == ("a.inc away/c.inc d/b.inc in.inc inside/b.inc out1.inc s.pov "
                              "scanned.inc").split()
    assert "links that lead out" in project.warnings[0] and "etc, farther, hosts" in (
        project.warnings[0])
    unpack(project, tmp_path / "tree")
    assert (tmp_path / "tree/scanned.inc").read_text() == "O"


def test_a_root_that_is_too_large_sends_only_what_the_scene_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {"s.pov": '#include "a.inc"', "a.inc": "", "b.inc": "12345"})
    assert paths(collect(tmp_path)) == ["a.inc", "b.inc", "s.pov"]
    for guard, value in (("GUARD_FILES", 2), ("GUARD_SIZE", 4), ("HOME", str(tmp_path))):
        with monkeypatch.context() as patch:
            patch.setenv(guard, value) if guard == "HOME" else patch.setattr(povfarm, guard, value)
            project = collect(tmp_path)
            assert paths(project) == ["a.inc", "s.pov"]
            assert f"--root or in {tmp_path}/.bsac" in project.warnings[0]
            assert ("is or holds your home directory" in project.warnings[0]) == (guard == "HOME")
            assert paths(collect(tmp_path, root=tmp_path)) == ["a.inc", "b.inc", "s.pov"]
            make(tmp_path, {".bsac": "Include\nb.inc\n"})
            assert paths(collect(tmp_path)) == ["a.inc", "b.inc", "s.pov"]
            (tmp_path / ".bsac").unlink()
    monkeypatch.setattr(povfarm, "MAX_FILES", 2)
    with pytest.raises(povfarm.UserError, match="more than 2 files"):
        collect(tmp_path, root=tmp_path)


def test_of_two_names_povrays_first_is_taken(
    povray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension that is not the kind's own is only part of the name."""
    wrong = '#error "the wrong one"'
    make(tmp_path, {"s.pov": scene("a.txt", "b.inc"), "a.txt": wrong, "a.txt.inc": INC,
                    "b.inc": INC, "b.inc.inc": wrong})
    only_scanned(monkeypatch)
    project = collect(tmp_path)
    assert paths(project) == ["a.txt.inc", "b.inc", "s.pov"]
    assert run_povray(["+Is.pov", "+W16", "+H12"], tmp_path).returncode == 0


def test_a_string_that_names_a_file_takes_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {"p/s.pov": '#declare Map = "m.png"; #declare I = "i.inc"; #include I',
                    "l/i.inc": '#declare Deeper = "j.txt";', "l/j.txt": "", "p/m.png": ""})
    only_scanned(monkeypatch)
    assert paths(collect(tmp_path / "p", library=["../l"])) == [
        "_lib1/i.inc", "_lib1/j.txt", "m.png", "s.pov"]


def test_a_file_that_cannot_be_read_is_named_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reading(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    make(tmp_path, {"s.pov": '', "b.txt": ""})
    cache = {(str(tmp_path / "s.pov"), 0, (tmp_path / "s.pov").stat().st_mtime_ns): "0" * 64}
    monkeypatch.setattr(povfarm, "sha256_file", no_reading)
    assert "cannot be read are left out: b.txt" in collect(tmp_path, hash_cache=cache).warnings[0]
    with pytest.raises(povfarm.UserError, match=r"s\.pov cannot be read: Permission denied"):
        collect(tmp_path)


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"s.pov": "", "a.inc": "x"})
    cache: Dict[Any, str] = {}
    before = collect(tmp_path, hash_cache=cache).manifest
    monkeypatch.setattr(povfarm, "sha256_file", None)
    assert collect(tmp_path, hash_cache=cache).manifest == before
    make(tmp_path, {"a.inc": "xy"})
    with pytest.raises(TypeError):
        collect(tmp_path, hash_cache=cache)


# --- the manifest

def test_a_manifest_goes_through_json_and_its_key_tells_contents(tmp_path: Path) -> None:
    make(tmp_path, {"s.pov": "", "ü b.inc": "x"})
    one = collect(tmp_path).manifest
    assert povfarm.Manifest.from_wire(povfarm.json.loads(povfarm.json.dumps(one.to_wire()))) == one
    assert [sum(file.size for file in one.files), paths(collect(tmp_path))] == [
        3, ["   b.inc", "  b.inc", "s.pov", "ü b.inc"]]  # the names that POV-Ray reads
    os.utime(tmp_path / "s.pov", (1, 1))
    assert collect(tmp_path).manifest.key == one.key
    make(tmp_path, {"s.pov": " "})
    two = collect(tmp_path).manifest
    (tmp_path / "s.pov").rename(tmp_path / "t.pov")
    three = collect(tmp_path, "t.pov").manifest
    assert len({one.key, two.key, three.key}) == 3


HASH = "0123456789abcdef" * 4
BAD_ROWS: Dict[str, Dict[str, Any]] = {
    "absolute": {"path": "/a"}, "up": {"path": "a/../../b"}, "here": {"path": "./a"},
    "empty": {"path": ""}, "backslash": {"path": "a\\b"}, "control": {"path": "a\nb"},
    "half a letter": {"path": "a\ud800"}, "no text": {"path": 7},
    "short hash": {"sha256": HASH[1:]}, "capital hash": {"sha256": HASH.upper()},
    "hash with a line end": {"sha256": HASH + "\n"}, "no hash": {"sha256": None},
    "negative": {"size": -1}, "half": {"size": 1.5}, "yes": {"size": True}, "text": {"size": "1"},
    "endless": {"mtime": float("inf")}, "no time": {"mtime": None}, "no number": {"mtime": float("nan")},
    "huge": {"size": 10**400}, "far away": {"mtime": 10**400},
    "condition": {"after_frame": "3"}, "unknown": {"more": 1},
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_manifest_with_a_bad_row_is_refused(what: str) -> None:
    row = {"path": "a/b", "sha256": HASH, "size": 1, "mtime": 2.5, "after_frame": None}
    povfarm.Manifest.from_wire({"files": [row]})
    with pytest.raises(povfarm.UserError):
        povfarm.Manifest.from_wire({"files": [{**row, **BAD_ROWS[what]}]})
    tried("manifests with a trick")


@pytest.mark.parametrize("wire", [
    None, [], {}, {"files": {}}, {"files": [None]}, {"files": [[1]]}, {"files": ["a", "a"]},
    {"files": [{"path": "a"}]},
])
def test_a_manifest_of_another_shape_is_refused(wire: Any) -> None:
    with pytest.raises(povfarm.UserError):
        povfarm.Manifest.from_wire(wire)


@pytest.mark.parametrize("names, good", [
    (["a", "b"], True), (["a", "A"], True), (["a", "a"], False), (["a", "a/b"], False),
    (["a/b/c", "a/b"], False), (["a", "ab", "a-b/c"], True),
])
def test_a_manifest_names_each_place_once(names: List[str], good: bool) -> None:
    wire = {"files": [{"path": name, "sha256": HASH, "size": 1, "mtime": 1} for name in names]}
    if good:
        assert [file.path for file in povfarm.Manifest.from_wire(wire).files] == sorted(names)
    else:
        with pytest.raises(povfarm.UserError):
            povfarm.Manifest.from_wire(wire)


def test_a_manifest_of_deep_directories_is_read_fast() -> None:
    files = [{"path": f"{number:05}/" + "a/" * 98 + "b", "sha256": HASH, "size": 1, "mtime": 1}
             for number in range(1000)]
    before = time.process_time()
    povfarm.Manifest.from_wire({"files": files})
    assert time.process_time() - before < 3


# --- zip files

def info(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr, entry.create_system = mode << 16, 3
    return entry


def zip_of(*entries: Any, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Make a zip file of names, or (name or info, contents)."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for entry in entries:
            name, text = entry if isinstance(entry, tuple) else (entry, "")
            archive.writestr(name, text, method)
    return data.getvalue()


def patched(data: bytes, signature: bytes, at: int, form: str, value: int) -> bytes:
    """Change a number in every header with this signature."""
    changed = bytearray(data)
    start = changed.find(signature)
    while start >= 0:
        struct.pack_into(form, changed, start + at, value)
        start = changed.find(signature, start + 4)
    return bytes(changed)


GOOD_ZIP = zip_of(("s.pov", "camera {}"), ("d/a.inc", "x" * 5000))
HOSTILE = {
    "above": zip_of("../a"), "above by Windows": zip_of("..\\a"),
    "hidden above": zip_of("d/../../a"),
    "absolute": zip_of("/etc/a"), "drive": zip_of("C:/a"), "drive of Windows": zip_of("c:a"),
    "share": zip_of("\\\\host\\a"), "twice": zip_of("aaa", "aab").replace(b"aab", b"aaa"),
    "dot": zip_of("./a"),
    "twice by Windows": zip_of("d/a", "d\\a"), "file and directory": zip_of("a", "a/b"),
    "link": zip_of((info("a", stat.S_IFLNK | 0o777), "/etc/passwd")),
    "device": zip_of(info("a", stat.S_IFCHR | 0o666)), "pipe": zip_of(info("a", stat.S_IFIFO)),
    "encrypted": patched(patched(GOOD_ZIP, b"PK\1\2", 8, "<H", 1), b"PK\3\4", 6, "<H", 1),
    "bomb": lambda: zip_of(("a", bytes(50_000_000))), "bzip2": zip_of("a", method=zipfile.ZIP_BZIP2),
    "larger than it says": patched(GOOD_ZIP, b"PK\1\2", 24, "<I", 7),
    "smaller than it says": patched(GOOD_ZIP, b"PK\1\2", 24, "<I", 9_000),
    "larger than allowed": patched(GOOD_ZIP, b"PK\1\2", 24, "<I", 2_100_000_000),
    "wrong checksum": patched(GOOD_ZIP, b"PK\1\2", 16, "<I", 7),
    "no zip": b"hello", "empty": b"", "cut off": GOOD_ZIP[:-30], "without its start": GOOD_ZIP[60:],
    "control character": zip_of("a\nb"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_zip_leaves_nothing_behind(tmp_path: Path, what: str) -> None:
    hostile: Any = HOSTILE[what]
    (tmp_path / "p.zip").write_bytes(hostile() if callable(hostile) else hostile)
    (tmp_path / "in").mkdir()
    with pytest.raises(povfarm.UserError) as error:
        povfarm.read_zip(tmp_path / "p.zip", tmp_path / "in/to")
    assert "p.zip" in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "p.zip"]
    tried("zip files with a trick")


def test_a_damaged_zip_never_ends_in_another_error(tmp_path: Path) -> None:
    for at in range(len(GOOD_ZIP)):
        for byte in (255 * (at % 2), GOOD_ZIP[at] ^ 1 << at % 8):
            (tmp_path / "p.zip").write_bytes(GOOD_ZIP[:at] + bytes([byte]) + GOOD_ZIP[at + 1:])
            try:
                povfarm.read_zip(tmp_path / "p.zip", tmp_path / "to")
                shutil.rmtree(tmp_path / "to")
            except povfarm.UserError:
                assert not (tmp_path / "to").exists()


def test_too_many_entries_and_a_place_in_use_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.zip").write_bytes(zip_of("a", "b", "c"))
    with pytest.raises(povfarm.UserError, match="is there already"):
        povfarm.read_zip(tmp_path / "p.zip", tmp_path)
    with pytest.raises(povfarm.UserError, match="No such file"):
        povfarm.read_zip(tmp_path / "q.zip", tmp_path / "to")
    monkeypatch.setattr(povfarm, "MAX_FILES", 2)
    with pytest.raises(povfarm.UserError, match="more than 2 files"):
        povfarm.read_zip(tmp_path / "p.zip", tmp_path / "to")


def test_zip_names_with_umlauts_blanks_and_backslashes(tmp_path: Path) -> None:
    as_mac = info("K\u251c\u255dche.pov")  # UTF-8 without the flag, as Python reads it
    data = zip_of(("d ü/a b.inc", "1"), ("win\\c.inc", "2"), "leer/", (as_mac, "3"), ("ä.txt", "4"))
    mac = as_mac.filename.encode("utf-8")
    data = data.replace(mac, as_mac.filename.encode("cp437").ljust(len(mac), b"_"))
    data = patched(patched(data, b"PK\1\2", 8, "<H", 0), b"PK\3\4", 6, "<H", 0)
    (tmp_path / "p.zip").write_bytes(data)
    povfarm.read_zip(tmp_path / "p.zip", tmp_path / "to")
    found = sorted(str(path.relative_to(tmp_path / "to")) for path in tmp_path.glob("to/**/*"))
    assert found == [
        "K\u00fcche.pov____", "d ü", "d ü/a b.inc", "leer", "win", "win/c.inc", "ä.txt"]


def test_zip_stream_is_a_zip_of_the_same_bytes_each_time(tmp_path: Path) -> None:
    make(tmp_path, {"ü 1.png": "one" * 40_000, "2.png": "two", "empty": ""})
    entries = [(f"d/{name}", tmp_path / name) for name in ("ü 1.png", "2.png", "empty")]
    pieces = list(povfarm.zip_stream(entries))
    assert max(map(len, pieces)) < 2 * povfarm.BUFFER
    os.utime(tmp_path / "2.png", (1, 1))
    assert b"".join(povfarm.zip_stream(iter(entries))) == b"".join(pieces)
    (tmp_path / "z.zip").write_bytes(b"".join(pieces))
    with zipfile.ZipFile(tmp_path / "z.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [name for name, _ in entries]
        assert archive.read("d/ü 1.png") == b"one" * 40_000
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)
    povfarm.read_zip(tmp_path / "z.zip", tmp_path / "to")
    assert (tmp_path / "to/d/2.png").read_text() == "two"
    assert zipfile.ZipFile(io.BytesIO(b"".join(povfarm.zip_stream([])))).namelist() == []


def test_a_library_or_the_current_directory_may_be_the_top_of_all(tmp_path: Path) -> None:
    make(tmp_path, {"s.pov": scene()})
    top = Path(tmp_path.anchor)
    for library, cwd in (([str(top)], tmp_path), ([], top)):
        name = (tmp_path / "s.pov").relative_to(cwd).as_posix()
        project, _, _ = povfarm.scan_in_place(name, library, cwd, (), OWN)
        assert project.library == (".",) * len(library)
        assert (top / project.run_dir).resolve() == cwd.resolve()


@pytest.mark.parametrize(("library", "ours", "text"), [
    ([], "_povfarm0/x.inc", ""), ([], "_povfarm", ""), ([], "_povfarm.ini", ""),
    (["lib"], "lib/_PovFarm1/x.inc", ""), ([], "", '#fopen F "_povfarm/x" write #fclose F')])
def test_names_of_povfarms_own_are_refused(
        tmp_path: Path, library: List[str], ours: str, text: str) -> None:
    make(tmp_path, {"s.pov": scene(), "lib/x.inc": INC, "sub/_povfarm0/x.inc": INC})
    collect(tmp_path, library=library)  # elsewhere they are in nobody's way
    make(tmp_path, {"s.pov": scene() + text, **({ours: INC} if ours else {})})
    with pytest.raises(povfarm.UserError, match="a name that begins with _povfarm, as povfarm's"):
        collect(tmp_path, library=library)
    with pytest.raises(povfarm.UserError, match="a name that begins with _povfarm, as povfarm's"):
        povfarm.scan_in_place("s.pov", library, tmp_path, (), OWN)


def test_links_go_along_by_all_their_names_and_those_left_out_are_said(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"s.pov": scene() + '#fopen F "link/x" write #fclose F', "real/keep": "",
                    "l nk/keep": ""})
    for name in ("link", "lïnk", "öde"):
        (tmp_path / name).symlink_to("real")
    links = {"link link\nreal", "link lïnk\nreal", "link l  nk\nreal", "link öde\nreal",
             "link   de\nreal", "link  de\nreal"}  # a directory has the name "l nk"
    project = collect(tmp_path)
    assert {use for use in project.uses if use.startswith("link ")} == links
    assert not project.warnings
    monkeypatch.setattr(povfarm, "MAX_LINKS", 1)
    project = collect(tmp_path)
    assert {use for use in project.uses if use.startswith("link ")} == {"link link\nreal"}
    assert [text.partition(":")[0] for text in project.warnings] == [
        "of the project's 3 links the last 2 are no links on a farm"]
    (tmp_path / "s.pov").write_text(scene())  # it writes nothing
    assert not collect(tmp_path).warnings


def test_names_that_are_one_for_povray_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, {"gröxe.pov": scene(), "grüxe.pov": scene("a.inc"), "a.inc": INC})
    for name in ("gröxe.pov", "grüxe.pov"):
        project = collect(tmp_path, name)
        assert project.sources[project.scene] == project.sources[name] != project.sources["a.inc"]
        assert project.manifest.called(".", project.scene) == name
    make(tmp_path, {"s.pov": scene("tür.inc", "tör.inc"), "tür.inc": INC, "tör.inc": "//"})
    with pytest.raises(povfarm.UserError, match=r"takes 't.r.inc' for 't.r.inc': give one"):
        collect(tmp_path)
    with pytest.raises(povfarm.UserError, match=r"takes 't.r.inc' for '.*/t.r.inc': give one"):
        povfarm.scan_in_place("s.pov", (STANDARD,), tmp_path, (), OWN)
    (tmp_path / "gr  xe.pov").write_text("//")  # as POV-Ray reads it
    with pytest.raises(povfarm.UserError, match=r"for 'gr  xe.pov': give one"):
        collect(tmp_path, "grüxe.pov")


@pytest.mark.parametrize("names, chosen", [
    ("pov.ini x.ini a.pov", "pov.ini"), ("POV.INI x.ini", "POV.INI"),
    ("x.ini a.pov b.pov", "x.ini"),
    ("a.pov a.inc", "a.pov"), ("A.POV", "A.POV"), ("top/pov.ini top/a.pov", "top/pov.ini"),
    ("top/in/a.pov __MACOSX/top/in/._a.pov .DS_Store", "top/in/a.pov"),
    ("a.pov sub/pov.ini", "a.pov"),
    ("x.ini y.ini a.pov", "it holds x.ini, y.ini"), ("a.pov b.pov", "it holds a.pov, b.pov"),
    ("readme.txt", "holds no scene"), ("one/a.pov two/b.pov", "holds no scene"),
])
def test_what_to_render_in_a_directory(tmp_path: Path, names: str, chosen: str) -> None:
    make(tmp_path, dict.fromkeys(names.split(), ""))
    if "hold" in chosen:
        with pytest.raises(povfarm.UserError, match=chosen):
            povfarm.find_project(tmp_path)
    else:
        assert povfarm.find_project(tmp_path) == tmp_path / chosen


# --- files that a scene wrote

def zipped(*names: str, data: bytes = b"x", **about: Any) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            for key, value in about.items():
                setattr(info, key, value)
            archive.writestr(info, data)
    return packed.getvalue()


def unpacked(data: bytes, place: Path) -> Dict[str, Optional[bytes]]:
    """What is in a zip file of what a run left."""
    (place / "zip").write_bytes(data)
    files = povfarm.unpack_files(place / "zip", place / "files")
    return {name: path and path.read_bytes() for name, path in files.items()}


def test_files_are_packed_and_unpacked(tmp_path: Path) -> None:
    files = {"a.txt": b"text", "sub/\u00fc b.csv": b"", "big": bytes(10**6)}
    for number, data in enumerate(files.values()):
        (tmp_path / f"{number}").write_bytes(data)
    os.utime(tmp_path / "0", (0, 0))  # before the time of zip files
    places = {name: tmp_path / f"{number}" for number, name in enumerate(files)}
    povfarm.pack_files({**places, "gone": tmp_path / "gone"}, tmp_path / "packed", ["b\u00fc"])
    expected = {**files, ascii("b\u00fc"): None}
    assert unpacked((tmp_path / "packed").read_bytes(), tmp_path) == expected
    assert unpacked(zipped("sub/", "sub/a", "../"), made(tmp_path / "more")) == {"sub/a": b"x"}


def made(place: Path) -> Path:
    place.mkdir()
    return place


@pytest.mark.parametrize("data", [
    b"", b"PK\5\6", zipped("../a"), zipped("/a"), zipped("a/../b"), zipped("a\\b"),
    zipped(".bashrc"), zipped(".git/config"), zipped("a/.b/c"), zipped("a\nb"),
    zipped(*(f"f{number}" for number in range(povfarm.MAX_WRITTEN + 1))),
    zipped("bomb", data=bytes(povfarm.MAX_WRITTEN_SIZE + 1)), zipped("a")[:-30],
    zipped("a", data=b"some text").replace(b"some", b"s0me"),
    zipped("a", data=b"text", compress_type=14).replace(b"a]", b"a\xff"),
    zipped("a", compress_type=12), zipped("a", compress_type=14),
], ids=lambda data: str(len(data)))
def test_files_that_no_scene_may_write_are_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(povfarm.UserError):
        unpacked(data, tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_file_that_is_larger_than_it_says_costs_no_memory(
        method: int, tmp_path: Path) -> None:
    data = patched(zip_of(("a", bytes(30_000_000)), method=method), b"PK\1\2", 24, "<I", 10)
    tracemalloc.start()
    with pytest.raises(povfarm.UserError):
        unpacked(data, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


# --- how far names lead

# By the name in a scene in HOME/p: whether that file goes along. What is typed leads farther.
REACH = {
    "i/a.inc": True, ".h/a.inc": True, "../q/a.inc": False, "../.ssh/key.inc": False,
    "farm/farm.inc": False, ".git/a.inc": False, "link.inc": False, "TOP/home/p/i/a.inc": True,
    "TOP/a.inc": False, "/etc/hosts": False, "../../a.inc": False, "/proc/self/environ": False,
}


@pytest.mark.parametrize("name", REACH)
def test_what_a_scene_says_leads_less_far_than_what_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    name = name.replace("TOP", str(tmp_path))
    make(tmp_path, {f"home/p/{path}": "" for path in (
        "i/a.inc", ".h/a.inc", "farm/farm.inc", "farm/farm.key", ".git/a.inc")})
    make(tmp_path, {"home/q/a.inc": "", "home/.ssh/key.inc": "", "a.inc": "",
                    "home/p/s.pov": f'#if (0) #include "{name}" #end'})
    (home / "p/link.inc").symlink_to("../.ssh/key.inc")
    project = collect(home / "p", standard_dirs=[])
    real = [source.resolve() for source in project.sources.values() if isinstance(source, Path)]
    assert ((home / "p" / name).resolve() in real) == REACH[next(
        key for key in REACH if key.replace("TOP", str(tmp_path)) == name)]
    assert not any(".ssh" in path.parts or "farm.key" in path.parts for path in real)
    refused = any("it may not be needed" in warning for warning in project.warnings)
    assert refused != ((home / "p" / name).resolve() in real)


def test_a_library_of_an_ini_file_leads_no_farther_than_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make(tmp_path, {"home/p/a.ini": "Input_File_Name=s.pov\nLibrary_Path=../.ssh\n",
                    "home/.ssh/id.inc": "", "home/p/s.pov": '#include "id.inc"'})
    cwd = tmp_path / "home/p"
    for typed in ([], ["+L../.ssh"]):
        options = povfarm.read_command_line(["a.ini", *typed], cwd, {}, system=[])
        assert options.by_file == ({"s.pov"} if typed else {"s.pov", "../.ssh"})
        if typed:
            assert paths(collect(cwd, library=options.library, by_file=options.by_file)) == [
                "_lib1/id.inc", "a.ini", "s.pov"]
        else:
            with pytest.raises(povfarm.UserError, match=r"includes 'id\.inc', which is neither"):
                collect(cwd, library=options.library, by_file=options.by_file)


def test_files_of_the_system_stay_where_they_are(tmp_path: Path, povray: str) -> None:
    path = str(INSTALLED / "include/colors.inc")
    make(tmp_path, {"s.pov": f'#include "{path}"'})
    project = collect(tmp_path, standard_dirs=[])
    assert paths(project) == ["s.pov"] and f"system_file {povfarm.sha256_file(Path(path))} {path}" in (
        project.uses)


def test_what_changed_is_looked_at_again(tmp_path: Path) -> None:
    make(tmp_path, {"s.pov": '#include "a.inc"', "a.inc": "old", "b.txt": "old", "c.txt": "old"})
    project = collect(tmp_path)
    make(tmp_path, {"a.inc": "newer", "b.txt": "newer"})
    (tmp_path / "scratch").mkdir()
    now, left = project.as_it_is_now(tmp_path / "scratch", "")
    assert (paths(now), left) == (["a.inc", "c.txt", "s.pov"], ["b.txt"])
    make(tmp_path, {"a.inc": "newest"})
    file = now.manifest.files[0]
    assert povfarm.hashlib.sha256(b"newer").hexdigest() == file.sha256
    assert b"".join(povfarm.file_blocks(now.sources["a.inc"])) == b"newer"


def test_many_files_take_no_longer_than_their_number(tmp_path: Path) -> None:
    def seconds(number: int) -> float:
        place = tmp_path / str(number)
        make(place, {"s.pov": "".join(f'"d/{i}.inc" "x/y{i}" ' for i in range(number)),
                     **{f"d/{i}.inc": "" for i in range(number)}})
        start = time.process_time()
        assert len(collect(place).manifest.files) == number + 1
        return time.process_time() - start

    assert any(seconds(1000) < 40 * seconds(100) for _ in range(3))


# Each is written so often that it is hard for a reader who goes back, or deep into what is nested.
ENDLESS = {
    "escaped quotes": ('\\"', ""), "escapes without an end": ('"\\', ""),
    "names in names": ("concat(", ""), "names in names, and closed": ("concat(", ")"),
    "calls in calls": ("M(concat(", ""), "macros without an end": ("#macro a(", ""),
    "arrays of arrays": ("#declare a[ ", ""), "blocks in blocks": ("#if ", '#fopen a "b" read '),
    "brackets": ("(", ")"), "photons in photons": ("photons {", "}"), "comments": ("/*", "*/"),
    "written and read": ('#fopen a "b" write ', '#fopen a "b" read '),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_hostile_scene_takes_no_longer_than_its_length(what: str, tmp_path: Path) -> None:
    def seconds(size: int) -> float:
        first, second = (part and part * (size // len(part)) for part in ENDLESS[what])
        make(tmp_path, {"s.pov": '#fopen F "o.txt" write\n' + first + second})
        start = time.process_time()
        assert paths(collect(tmp_path)) == ["s.pov"]
        return time.process_time() - start

    # Now and then a busy computer counts as time of ours what it does meanwhile.
    assert any(seconds(50_000) < 40 * seconds(5_000) for _ in range(3))
