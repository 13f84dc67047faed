"""Links in a project: a name leads where the system leads it, alone and on a farm."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from helpers.base import run_povray
from helpers.farm import SMALL, Farm, made_in, run
from helpers.runs import MARK, make_run
from povfarm import MAX_LINKS, FileEntry, Manifest, Outbox, PovJob, UserError, _links_of, _place_in

HEAD = """#version 3.7; global_settings { assumed_gamma 1 }
camera { location -5*z look_at 0 }
"""
PLANE = "\nplane { z, 1 pigment { color rgb C } finish { ambient 1 } }\n"
RED, GREEN, BLUE = (f"#declare C = {color};\n" for color in "xyz")
UP = {"project/link": "-> ../beside/deep", "beside/deep/keep": "", "beside/x.inc": GREEN,
      "project/x.inc": RED}
WITHIN = {"project/link": "-> real", "project/real/x.inc": GREEN}
ONE_FILE = {"project/x.inc": "-> real/x.inc", "project/real/x.inc": GREEN}


def write(name: str, text: str = BLUE, how: str = "write") -> str:
    return f'#fopen F {name} {how} #write (F, "{text.strip()}\\n") #fclose F\n'


def include(name: str) -> str:
    return f"#include {name}"


# By name: the files, "-> " before where a link leads; the scene; more arguments.
CASES: Dict[str, Tuple[Dict[str, str], str, List[str]]] = {
    "an include above what a link leads to": (UP, include('"link/../x.inc"'), []),
    "and the one above the link, too": (
        UP, include('"x.inc"') + "\nsphere { 0, 1 pigment { color rgb C } finish { ambient 1 } }\n"
        + include('"link/../x.inc"'), []),
    "the same, put together": (UP, include('concat("link/..", "/x.inc")'), []),
    "the same, by a variable": (UP, '#declare D = "link/../";' + include('concat(D, "x.inc")'), []),
    "the same, as a library": (
        {**UP, "project/x.inc": "-> nothing"}, include('"x.inc"'), ["+Llink/.."]),
    "the same, as a header": (UP, "", ["+HIlink/../x.inc"]),
    "written above what a link leads to": (
        {**UP, "project/link": "-> sub/deep", "project/sub/deep/keep": ""},
        write('"link/../new.inc"') + include('"sub/new.inc"'), []),
    "samples above what a link leads to": (
        {**UP, "project/link": "-> sub/deep", "project/sub/deep/keep": ""},
        RED + "global_settings { radiosity { count 5 } }",
        ["+RFO", "+RFlink/../new.rca", "+WT1"]),
    "written by a link, read without": (
        WITHIN, write('"link/x.inc"') + include('"real/x.inc"'), []),
    "written by a link with a computed name": (
        {"project/link": "-> real", "project/real/keep": ""},
        write('concat("link/", "x", ".inc")') + include('concat("real/", "x.inc")'), []),
    "written without, read by a link": (
        WITHIN, write('"real/x.inc"') + include('"link/x.inc"'), []),
    "written by a link to one file": (
        ONE_FILE, write('"x.inc"') + include('"real/x.inc"'), []),
    "read by a link to one file": (ONE_FILE, write('"real/x.inc"') + include('"x.inc"'), []),
    "written by a link that leads to nothing yet": (
        {"project/x.inc": "-> real/x.inc", "project/real/keep": ""},
        write('"x.inc"') + include('"real/x.inc"'), []),
    "appended to by a link": (
        {**ONE_FILE, "project/log": "-> real/log", "project/real/log": "old\n"},
        write('"log"', "new", "append") + include('"x.inc"'), []),
    "an INI file above what a link leads to": (
        {"project/link": "-> sub/deep", "project/sub/deep/keep": ""}, RED,
        ["+GIlink/../new.ini"]),
    "links in circles": (
        {"project/x.inc": RED, "project/a": "-> b", "project/b": "-> a", "project/c": "-> c",
         "project/sub/up": "-> ..", "project/sub/here": "-> ."},
        include('"sub/up/sub/here/../x.inc"'), []),
}


def lay_out(place: Path, name: str) -> Path:
    files, scene, _ = CASES[name]
    for path, text in {**files, "project/s.pov": HEAD + scene + PLANE}.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            (place / path).symlink_to(text[3:])
        else:
            (place / path).write_text(text)
    return place / "project"


def made(place: Path) -> Dict[str, bytes]:
    """What is there now; not what is in an INI file, as a farm's POV-Rays have no -D."""
    return {name: b"" if name.endswith(".ini") else data
            for name, data in made_in(place.parent).items()}


@pytest.fixture(scope="module", name="farm")
def one_farm(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    farm = Farm(tmp_path_factory.mktemp("links"))
    farm.work()
    yield farm
    farm.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_names_lead_where_they_lead_povray(farm: Farm, tmp_path: Path, name: str) -> None:
    places = [lay_out(tmp_path / place, name) for place in ("plain", "alone", "sent")]
    args = ["s.pov", *SMALL, *CASES[name][2]]
    plain = run_povray(args, places[0])
    assert plain.returncode == 0, plain.stderr
    for place, command in zip(places[1:], (["render"], ["submit", "--wait", "--output", "."])):
        result = run(farm.tmp_path, *command, *args, cwd=place)
        assert result.returncode == 0, result.stderr
        assert made(place) == made(places[0])


@pytest.mark.slow
def test_links_lead_there_below_letters_beyond_ascii_too(farm: Farm, tmp_path: Path) -> None:
    text = HEAD + write('"link/new.inc"') + include('"../x.inc"') + include('"real/new.inc"') + PLANE
    places = [tmp_path / place / "süß" for place in ("plain", "alone", "sent")]
    for place in places:
        (place / "real").mkdir(parents=True)
        (place / "link").symlink_to("real")
        (place / "s.pov").write_text(text)
        (place.parent / "x.inc").write_text(RED)
    assert run_povray(["s.pov", *SMALL], places[0]).returncode == 0
    for place, command in zip(places[1:], (["render"], ["submit", "--wait", "--output", "."])):
        result = run(farm.tmp_path, *command, "s.pov", *SMALL, cwd=place)
        assert result.returncode == 0, result.stderr
        assert made(place) == made(places[0])


@pytest.mark.slow
def test_a_name_of_povfarms_own_is_refused_before_anything_is_rendered(
        farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "s.pov").write_text(HEAD + RED + PLANE)
    (tmp_path / "_povfarm0").mkdir()
    for command in (["render"], ["submit", "--wait", "--output", "."]):
        result = run(farm.tmp_path, *command, "s.pov", *SMALL, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.splitlines() == [
            f"povfarm: {tmp_path / '_povfarm0'} has a name that begins with _povfarm, as povfarm's "
            "own do: give it another"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["_povfarm0", "s.pov"]


@pytest.mark.parametrize("use", [
    "link ../out\nin", "link in\n../out", "link in\n/etc", "link in\n", "link \nin", "link in"])
def test_no_link_of_a_job_leads_out_of_its_run(use: str) -> None:
    assert _links_of(PovJob({}, (), (), ".", ("link a b\nc/d", "append x"))) == {"a b": "c/d"}
    with pytest.raises(UserError):
        _links_of(PovJob({}, (), (), ".", (use,)))


UP_FROM_LINK = "lnk" + "/.." * 12
DEEP = "a/" + "/".join("b" * 20)
OURS = "_povfarm/.povray/3.7/povray.conf"
SAMPLES = {"Radiosity_From_File": "On", "Radiosity_File_Name": "povfarm.rca"}
# What a job says that it uses: names that are one file in its run and another in the project; more
# options; the scene. "@" is a file of the worker's owner.
FORGED: Dict[str, Tuple[List[str], Dict[str, str], str]] = {
    "a file to append to": ([f"append {UP_FROM_LINK}@"], {}, include(f'"{UP_FROM_LINK}@"')),
    "a file of photons": ([f"load_file {UP_FROM_LINK}@"], {}, include(f'"{UP_FROM_LINK}@"')),
    "samples": ([], {"Radiosity_From_File": "On", "Radiosity_File_Name": f"{UP_FROM_LINK}@"},
                include(f'"{UP_FROM_LINK}@"')),
    "an INI file by our link": (["create_ini _povfarm0/planted\nx"], {}, ""),
    "an INI file by our link and another": (
        ["create_ini more/planted\nx", "link more\n_povfarm0"], {}, ""),
    "our own files": ([f"link {OURS}\n_povfarm/_povfarm.ini", "link _povfarm\nlnk",
                       "link _POVFARM.ini\ns.pov", "create_ini _povfarm/planted\nx"], {}, ""),
    # Of what slices share the worker writes into the scene.
    "a scene elsewhere": ([], {**SAMPLES, "Input_File_Name": "../" * 12 + "@"}, ""),
    "a scene by a link": ([], {**SAMPLES, "Input_File_Name": f"{UP_FROM_LINK}@"}, ""),
    "a scene next to the run": ([], {**SAMPLES, "Input_File_Name": "../tree/s.pov"}, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGED)
def test_forged_names_of_a_job_reach_nothing_outside_of_its_run(
        farm: Farm, tmp_path: Path, name: str) -> None:
    uses, values, scene = FORGED[name]
    secret = tmp_path / "secret"
    before = f'#debug "{MARK}\\n"\n'
    secret.write_text(before)
    uses, scene = [use.replace("@", str(secret)) for use in uses], scene.replace("@", str(secret))
    files = {"s.pov": (HEAD + RED + scene + PLANE).encode(), "lnk/keep": b"", "lib/keep": b"",
             "povfarm.rca": b"B0\t0\n"}
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    manifest = Manifest(tuple(FileEntry(path, hashes[path], len(files[path]), 1.0)
                              for path in sorted(files)), ())
    wanted = {"Input_File_Name": "s.pov", "Output_File_Name": "s.png", "Width": "40",
              "Height": "30", **{key: text.replace("@", str(secret)) for key, text in
                                 values.items()}}
    sent = farm.client.request("POST", "/api/v1/jobs", json={
        "name": "forged", "manifest": manifest.to_wire(), "options": {"retry_limit": 1},
        "ticket": name, "frames": "", "pov": {
            "values": wanted, "declares": [], "library": ["lib"], "run_dir": ".",
            "uses": [f"link lnk\n{DEEP}", *uses]}}).json()
    for path in {hashes[path]: path for path in files if hashes[path] in sent["missing"]}.values():
        farm.client.request("PUT", f"/api/v1/blobs/{hashes[path]}", body=files[path])
    good = not scene and "Input_File_Name" not in values
    assert farm.finished(sent["id"])["state"] == ("done" if good else "failed")
    log = farm.client.request("GET", f"/api/v1/jobs/{sent['id']}/frames/0/log").body.decode()
    assert MARK not in log and secret.read_text() == before
    assert good or ("Cannot open include file" if scene else "is not in the project") in log
    assert not (farm.tmp_path / "farm" / "tree").exists()
    there = farm.tmp_path / "farm" / "cache" / manifest.key / "tree"
    assert sorted(path.relative_to(there).as_posix() for path in there.rglob("*")
                  if path.is_file()) == sorted(files)


def test_our_own_files_are_no_place_for_a_name_of_a_job(tmp_path: Path) -> None:
    run = make_run(tmp_path, (1,))
    run.own.mkdir()
    (run.own / "_povfarm0").symlink_to(tmp_path)
    (run.own / "x").symlink_to("_povfarm")
    assert _place_in(run, "a/../b c") == Path("b c")
    for place in ("_povfarm/x", "a/_povfarm.ini", "_PovFarm1", "x/y", "_povfarm0/x", "..", "/x"):
        assert _place_in(run, place) is None
    forged = f"link {OURS}\na", "link a\n_povfarm0/x", *(f"link {n}\nx" for n in range(1000))
    assert len(_links_of(PovJob({}, (), (), ".", forged))) == 3 * MAX_LINKS - 2


def test_no_name_of_a_job_has_a_nul() -> None:
    wire = PovJob({}, (), (), ".", ("append a\0b",)).to_wire()
    with pytest.raises(UserError, match="NUL"):
        PovJob.from_wire(wire)


def test_an_image_by_a_link_outlives_its_run(tmp_path: Path) -> None:
    run, outbox = make_run(tmp_path, (1,)), object.__new__(Outbox)
    made, outbox._place = run.made(1), tmp_path
    (run.own / "real").mkdir(parents=True)
    made.symlink_to(run.own / "real" / "x.png")
    made.write_bytes(b"a picture")
    state: Any = SimpleNamespace(lease=run.lease, started=1.5)
    kept = outbox._kept(state, run, run.lease.tasks[0], 24)
    shutil.rmtree(run.own)
    assert kept.read_bytes() == b"a picture"
