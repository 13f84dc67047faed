"""Which files go along with ``submit``: what POV-Ray renders here, a farm renders as well."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

from helpers.base import run_povray, wait_until
from helpers.farm import Farm, run
from helpers.pictures import pixels_of

HEAD = "#version 3.7; global_settings { assumed_gamma 1 } camera { location -z*3 look_at 0 }\n"
RED = "light_source { -z*5 1 } sphere { 0, 1 pigment { rgb x } }\n"
PICTURE = "/usr/share/povray-3.7/include/plasma3.png"


def tile(name: str) -> str:
    """A scene part that reads an image whose name is put together."""
    return (f"#macro Tile(N) plane {{ z, 2 + N pigment {{ image_map {{ png concat({name}, "
            'str(N, 0, 0), ".png") } } finish { ambient 1 } } #end Tile(1) Tile(2)\n')


def site(name: str) -> str:
    """A scene that is another one where a file is there."""
    return f'#if (file_exists("{name}")) #include "{name}" #end\n'


# By name: the files (PNG where they are called so), the current directory, the arguments.
CASES: Dict[str, Tuple[Dict[str, str], str, List[str]]] = {
    "include in the parent": (
        {"sc/s.pov": '#include "../lib.inc"\n', "lib.inc": RED}, "sc", ["s.pov"]),
    "scene in a subdirectory": (
        {"sc/s.pov": tile('"tex/t"'), "tex/t1.png": "", "tex/t2.png": ""}, ".", ["sc/s.pov"]),
    "computed names in the parent": (
        {"sc/s.pov": tile('"../tex/t"'), "tex/t1.png": "", "tex/t2.png": ""}, "sc", ["s.pov"]),
    "library": (
        {"p/s.pov": tile('"t"'), "lib/t1.png": "", "lib/t2.png": ""}, "p", ["s.pov", "+L../lib"]),
    "directory called -frames": (
        {"s.pov": tile('"a-frames/t"'), "a-frames/t1.png": "", "a-frames/t2.png": "",
         "a-file-called-frames": ""}, ".", ["s.pov"]),
    "hidden directory": (
        {"s.pov": tile('".tex/t"'), ".tex/t1.png": "", ".tex/t2.png": ""}, ".", ["s.pov"]),
    "tiles beside the scene": (
        {"tile.pov": tile('"tile"'), "tile1.png": "", "tile2.png": ""}, ".", ["tile.pov"]),
    "include header": (
        {"sub/s.pov": "Ball\n", "c.inc": "#declare Ball = sphere { 0, 1 pigment { rgb 1 } "
         "finish { ambient 1 } }\n#macro Dummy() #end\n"}, ".", ["sub/s.pov", "+HIc.inc"]),
    "whole path": (
        {"s.pov": 'plane { z, 2 pigment { image_map { png "TOP/sub/t1.png" } } '
         "finish { ambient 1 } }\n", "sub/t1.png": ""}, ".", ["s.pov"]),
    "POV-Ray's own by its whole path": (
        {"s.pov": '#include "/usr/share/povray-3.7/include/colors.inc"\n' + RED}, ".", ["s.pov"]),
    "perhaps there, above": ({"p/s.pov": site("../site.inc"), "site.inc": RED}, "p", ["s.pov"]),
    "perhaps there, beside": (
        {"sc/s.pov": site("site.inc"), "site.inc": RED}, ".", ["sc/s.pov"]),
    "an INI file elsewhere": (
        {"set/a.ini": "Input_File_Name=sc/s.pov\n", "sc/s.pov": '#include "inc/a.inc"\n',
         "inc/a.inc": RED}, ".", ["set/a.ini"]),
    "written by the scene, in a library": (
        {"s.pov": '#fopen F "lib/a.inc" write #write (F, "// made\\n") #fclose F\n'
         '#include "a.inc"\n' + RED, "lib/b.inc": ""}, ".", ["s.pov", "+Llib"]),
    # Nothing tells of these before POV-Ray has missed them.
    "found out": (
        {"sc/s.pov": tile('concat("..", "/tex/t")'), "tex/t1.png": "", "tex/t2.png": ""}, "sc",
        ["s.pov"]),
}


def lay_out(place: Path, files: Dict[str, str]) -> None:
    """Make a project; scenes begin with a head, images are POV-Ray's own."""
    for name, text in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            shutil.copyfile(PICTURE, path)
        else:
            head = HEAD if name.endswith(".pov") else ""
            path.write_text(head + text.replace("TOP", str(place)))


@pytest.fixture(scope="module")
def farm(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """One farm for all of these."""
    farm = Farm(tmp_path_factory.mktemp("tree"))
    farm.work()
    yield farm
    farm.close()


@pytest.mark.parametrize("name", CASES)
def test_a_farm_renders_what_povray_renders(farm: Farm, tmp_path: Path, name: str) -> None:
    files, cwd, args = CASES[name]
    for place in ("plain", "farm"):
        lay_out(tmp_path / place, files)
    small = ["+W32", "+H24", "+FP"]
    plain = run_povray([*args, *small], tmp_path / "plain" / cwd)
    assert plain.returncode == 0, plain.stderr
    result = run(farm.tmp_path, "submit", "--wait", "--output", str(tmp_path / "out"), *args,
                 *small, cwd=tmp_path / "farm" / cwd)
    assert result.returncode == 0, result.stderr
    assert ("is sent now" in result.stderr) == (name == "found out"), result.stderr
    (image,) = (tmp_path / "plain").rglob("*.ppm")
    assert pixels_of(tmp_path / "out" / image.name) == pixels_of(image)


def test_photons_of_computed_names_are_found_where_povray_looks_for_them(
    farm: Farm, tmp_path: Path
) -> None:
    name = 'concat("maps/p", str(frame_number, 2, 0), ".ph")'
    for word in ("save_file", "load_file"):
        lay_out(tmp_path, {f"{word}.pov": RED + "sphere { y, 0.5 pigment { rgbt 1 } interior { ior 2 } "
                           "photons { target reflection on refraction on } }\n"
                           f"global_settings {{ photons {{ spacing 0.2 {word} {name} }} }}\n",
                           "maps/q.ph": ""})
    args = ["+W32", "+H24", "+KFF3", "+FP"]
    assert run_povray(["save_file.pov", *args], tmp_path).returncode == 0
    assert run_povray(["load_file.pov", *args], tmp_path).returncode == 0
    for command in (["submit", "--wait", "--output", "."], ["render"]):
        place = tmp_path / command[0]
        shutil.copytree(tmp_path / "maps", place / "maps")
        shutil.copyfile(tmp_path / "load_file.pov", place / "load_file.pov")
        result = run(farm.tmp_path, *command, "load_file.pov", *args, cwd=place)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("rendered again, with them") == 1
        for image in (f"load_file{number}.ppm" for number in (1, 2, 3)):
            assert pixels_of(place / image) == pixels_of(tmp_path / image)


@pytest.mark.parametrize("keep", [False, True])
def test_a_scene_writes_into_a_directory_of_which_nothing_goes_along(
    farm: Farm, tmp_path: Path, keep: bool
) -> None:
    lay_out(tmp_path, {"s.pov": '#fopen F "meshes/m.inc" write #write (F, "x") #fclose F\n'})
    (tmp_path / "meshes").mkdir()
    if keep:
        (tmp_path / "meshes/.gitkeep").touch()
    result = run(farm.tmp_path, "submit", "--wait", "s.pov", "+W32", "+H24", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_missed_file_that_may_not_go_along_is_told(farm: Farm, tmp_path: Path) -> None:
    lay_out(tmp_path, {"p/s.pov": tile('concat("../.k", "/t")'), ".k/t1.png": "", ".k/t2.png": ""})
    result = run(farm.tmp_path, "submit", "--wait", "s.pov", "+W32", "+H24", cwd=tmp_path / "p")
    assert result.returncode == 1
    assert f"{tmp_path}/.k/t1.png is here but was not sent, because it is in a hidden" in (
        result.stderr)


def test_a_file_that_does_not_hold_still_stays_out(farm: Farm, tmp_path: Path) -> None:
    lay_out(tmp_path, {"s.pov": RED})
    with open(tmp_path / "live.log", "wb") as log:
        log.truncate(128 << 20)  # it takes a while to read
    with subprocess.Popen(["sh", "-c", "while :; do echo line; done >>live.log"],
                          cwd=tmp_path) as writer:
        try:
            wait_until(lambda: (tmp_path / "live.log").stat().st_size > 128 << 20)
            result = run(farm.tmp_path, "submit", "--wait", "s.pov", "+W32", "+H24", cwd=tmp_path)
        finally:
            writer.kill()
    assert result.returncode == 0, result.stderr
    assert "does not name them: live.log" in result.stderr
