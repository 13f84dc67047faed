"""Whole farms: real processes, real POV-Ray, real sockets, compared with plain POV-Ray."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.server
import io
import json
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Type

import pytest

import povfarm
from helpers.base import POVFARM, need, run_povray, wait_until
from helpers.farm import (
    HEAVY,
    SMALL,
    STILL,
    Ends,
    Farm,
    at_once,
    environment,
    farm_fixture,
    longer_than_a_frame,
    made_in,
    pictures,
    project,
    renderers,
    run,
    stop_renderer,
    submit_and_stop,
)
from helpers.pictures import pixels

__all__ = ["farm_fixture"]
pytestmark = pytest.mark.usefixtures("povray", "no_process_is_left")

# --- the same files, names and pixels as povray

# By a part of their frames, each another; c_colors where numbers get a third digit. All of them
# with --long.
ANIMATIONS = {
    "animations/ambient/ambient.ini": ["+SF18"], "animations/camera2/camera2.ini": ["+EF9"],
    "animations/clockd/clockd.ini": ["+SF8", "+EF13"], "animations/diffuse/diffuse.ini": ["+SF14"],
    "animations/float1/float1.ini": ["+EF8"], "animations/float2/float2.ini": ["+SF22", "+EF29"],
    "animations/float3/float3.ini": ["+SF45"], "animations/float4/float4.ini": ["+SF2", "+EF9"],
    "animations/fractalzoom/fractalzoom.ini": ["+SF5", "+EF11"], "animations/l_o/l_o.ini": [],
    "animations/quilted/plotqlt.ini": [], "animations/raddem/raddem.ini": ["+SF7", "+EF11"],
    "animations/speclr/speclr.ini": [], "animations/splinefollow/splinefollow.ini": ["+EF10"],
    "animations/vect1/vect1.ini": ["+EF12"], "animations/vect2/vect2.ini": ["+SF35", "+EF43"],
    "portfolio/c_colors.ini": ["+SF92", "+EF107"], "advanced/desk/desk.ini": [],
}
# Radiosity is the same from run to run with one thread only, and so is desk.
ONE_THREAD = ["animations/raddem/raddem.ini", "advanced/desk/desk.ini"]


@pytest.fixture(scope="module")
def animated(examples: Path, pytestconfig: pytest.Config,
             tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """What plain POV-Ray and we make of every animation."""
    frames = {} if pytestconfig.getoption("long") else ANIMATIONS

    def both(ini: str, place: Path) -> List[Dict[str, bytes]]:
        places = [place / "plain", place / "ours"]
        for each in places:
            shutil.copytree(examples / ini.rpartition("/")[0], each)
        before = made_in(places[0])
        given = [Path(ini).name, *SMALL, *frames.get(ini, ()), *["+WT1"] * (ini in ONE_THREAD)]
        plain = run_povray(given, places[0])
        result = run(place, "render", *given, cwd=places[1])
        assert (plain.returncode, result.returncode) == (0, 0), result.stderr
        after = made_in(places[1])
        assert {name: after[name] for name in before} == before
        return [made_in(each, before) for each in places]

    with at_once(both, ANIMATIONS, tmp_path_factory.mktemp("animated")) as ends:
        yield ends


@pytest.mark.parametrize("ini", ANIMATIONS)
def test_render_leaves_what_povray_leaves(ini: str, animated: Ends) -> None:
    expected, made = animated[ini].result()
    assert set(made) == set(expected) and made == expected and len(made) > 2


# Writes three files: one that all frames write, one for each frame, and one in a directory.
WRITER = STILL + """
#fopen LAST "last.txt" write
#write (LAST, "frame ", frame_number, "\\n")
#fclose LAST
#fopen EACH concat("each", str(frame_number, 0, 0), ".csv") write
#write (EACH, clock)
#fclose EACH
#fopen OWN "sub/own.inc" write
#write (OWN, "#declare N = 1;")
#fclose OWN
"""


@pytest.fixture(scope="module")
def written(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """What is made of a scene that writes files; by us twice: the second finds them there."""
    def both(arguments: str, place: Path) -> List[Dict[str, bytes]]:
        places = [place / "plain" / "project", place / "ours" / "project"]
        for each in places:
            (each / "sub").mkdir(parents=True)
            (each / "scene.pov").write_text(WRITER)
            (each / "sub" / "there.inc").touch()
        made = []
        assert run_povray(["scene.pov", *SMALL, *arguments.split()], places[0]).returncode == 0
        for _ in range(2):
            result = run(place, "render", "scene.pov", *SMALL, *arguments.split(), cwd=places[1])
            assert result.returncode == 0, result.stderr
            made.append(made_in(places[1]))
        return [made_in(places[0]), *made]

    with at_once(both, WRITING, tmp_path_factory.mktemp("written")) as ends:
        yield ends


WRITING = ["+KFF7", "+KFF7 -F", ""]


@pytest.mark.parametrize("arguments", WRITING)
def test_files_that_a_scene_writes_are_where_povray_puts_them(
        arguments: str, written: Ends) -> None:
    plain, ours, again = written[arguments].result()
    assert ours == again == plain
    assert ours["last.txt"].split() == [b"frame", b"7" if arguments else b"0"]


def test_an_ini_that_names_a_scene_that_is_not_there_is_told_so(
        examples: Path, tmp_path: Path) -> None:
    shutil.copytree(examples / "animations/reflection", tmp_path / "p")
    result = run(tmp_path, "render", "reflection.ini", cwd=tmp_path / "p")
    assert result.returncode == 2
    assert "reflect.pov" in result.stderr and len(result.stderr.splitlines()) == 1


def test_frames_that_read_what_earlier_frames_wrote_run_in_order_unless_told_otherwise(
        examples: Path, tmp_path: Path) -> None:
    shutil.copytree(examples / "advanced/desk", tmp_path / "p")
    result = run(tmp_path, "render", "desk.ini", *SMALL, "+EF2", cwd=tmp_path / "p")
    assert result.returncode == 0 and "in order on one computer" in result.stderr
    for image in (tmp_path / "p").glob("*.png"):
        image.unlink()
    result = run(tmp_path, "render", "--in-order=no", "desk.ini", *SMALL, "+SF2", "+EF2",
                 cwd=tmp_path / "p")
    assert result.returncode == 1 and "desk1.png" in result.stderr


OUTPUTS = [
    "scene.pov +FP", "scene.pov +FT", "scene.pov +FC", "scene.pov +FB", "scene.pov +FJ",
    "scene.pov +FE", "scene.pov +FH", "scene.pov +FN16", "scene.pov +UA", "scene.pov +Oout/",
    "scene.pov +Oother.name", "+Iscene.pov +KFI0 +KFF3 +SF1 +EF2", "scene.pov +KFF12 +STP5",
    "scene.pov +SR10 +ER20", "+Iscene.pov Declare=x=1 '+O\"my name.png\"'",
]


@pytest.fixture(scope="module")
def outputs(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """Where plain POV-Ray and we leave outputs of every kind."""
    def both(arguments: str, place: Path) -> List[Path]:
        places = [place / "plain", place / "ours"]
        for each in places:
            (each / "out").mkdir(parents=True)
            (each / "scene.pov").write_text(STILL)
        given = [*shlex.split(arguments), *SMALL]
        plain = run_povray(given, places[0])
        result = run(place, "render", *given, cwd=places[1])
        assert (plain.returncode, result.returncode) == (0, 0), result.stderr
        return places

    with at_once(both, OUTPUTS, tmp_path_factory.mktemp("outputs")) as ends:
        yield ends


@pytest.mark.parametrize("arguments", OUTPUTS)
def test_output_of_every_kind_is_where_povray_puts_it(arguments: str, outputs: Ends) -> None:
    places = outputs[arguments].result()
    names = [sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
             for place in places]
    assert names[0] == names[1] and len(names[0]) > 1
    for name in names[0]:
        left, right = (place / name for place in places)
        if name.endswith(".png"):
            assert pixels(left) == pixels(right)
        elif not name.endswith(".exr"):  # tells when it was written, as does not PPM
            assert len(left.read_bytes()) == len(right.read_bytes())


def test_a_directory_and_a_zip_render_into_frames_directories(tmp_path: Path) -> None:
    place = project(tmp_path)
    (place / "pov.ini").write_text("Input_File_Name=scene.pov\n+KFF2 +W40 +H30\n")
    here = tmp_path / "here"
    here.mkdir()
    shutil.make_archive(str(here / "my film"), "zip", place)
    for argument, frames in ((str(place), "project-frames"), ("my film.zip", "my film-frames")):
        result = run(tmp_path, "render", argument, cwd=here)
        assert result.returncode == 0, result.stderr
        assert sorted(os.listdir(here / frames)) == ["scene1.png", "scene2.png"]


def test_a_scene_whose_name_povray_itself_cannot_read_is_rendered(tmp_path: Path) -> None:
    (tmp_path / "prüject").mkdir()
    place = project(tmp_path / "prüject", name="süß ünd 'gut'")
    result = run(tmp_path, "render", "+I\"süß ünd 'gut'.pov\"", "+KFF2", *SMALL, cwd=place)
    assert result.returncode == 0, result.stderr
    names = sorted(os.listdir(place))
    assert names == ["süß ünd 'gut'.pov", "süß ünd 'gut'1.png", "süß ünd 'gut'2.png"]
    (place / "plain.pov").write_text(STILL)
    run_povray(["plain.pov", "+KFF2", *SMALL], place)
    assert pixels(place / "süß ünd 'gut'2.png") == pixels(place / "plain2.png")


# --- one clear line, and nothing left behind

BAD = {
    "nothing.pov": (STILL, 2, "nothing.pov"),
    "scene.pov": (STILL + "sphere {", 1, "Parse Error"),
    "./scene.pov": (STILL + '#include "gone.inc"\n', 1, "gone.inc"),
    "evil.ini": (STILL, 2, "Pre_Scene_Command"),
    "scene.pov +Onowhere/": (STILL, 2, "nowhere"),
    "scene.pov --povray /nowhere/povray": (STILL, 2, "/nowhere/povray"),
    "broken.zip": (STILL, 2, "broken.zip"),
    "scene.pov +W0": (STILL, 2, ""),
    "scene.pov --no-such-option": (STILL, 2, "--no-such-option"),
    "": (STILL, 2, "scene.pov"),
    "scene.pov +Z7": (STILL, 2, "Z7"),
}


@pytest.fixture(scope="module")
def refusals(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """How ``render`` ends with bad input."""
    def render(arguments: str, place: Path) -> "subprocess.CompletedProcess[str]":
        there = project(place, BAD[arguments][0])
        (there / "evil.ini").write_text("Input_File_Name=scene.pov\nPre_Scene_Command=touch evil\n")
        (there / "broken.zip").write_bytes(b"PK\3\4 this is no zip")
        before = sorted(os.listdir(there))
        size = SMALL if arguments and "+W0" not in arguments else []
        result = run(place, "render", *arguments.split(), *size, cwd=there)
        made = set(os.listdir(there)) - set(before)
        assert made == ({"scene.log"} if result.returncode == 1 else set())
        return result

    with at_once(render, BAD, tmp_path_factory.mktemp("refusals")) as ends:
        yield ends


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_gets_one_clear_line(arguments: str, refusals: Ends) -> None:
    _, code, words = BAD[arguments]
    result = refusals[arguments].result()
    assert result.returncode == code, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith("povfarm: ")
            and not line.startswith("povfarm: all that POV-Ray printed is in ")]
    assert len(ours) == 1, result.stderr


def test_without_povray_it_says_what_to_install(tmp_path: Path) -> None:
    result = subprocess.run(
        [*POVFARM, "render", "scene.pov"], cwd=project(tmp_path), text=True, capture_output=True,
        env={**environment(tmp_path), "PATH": str(tmp_path)}, check=False)
    assert result.returncode == 2 and "install" in result.stderr


def test_a_program_that_is_not_povray_is_told(tmp_path: Path) -> None:
    fake = tmp_path / "povray"
    fake.write_text("#!/bin/sh\necho hello\n")
    fake.chmod(0o755)
    result = run(tmp_path, "render", "scene.pov", "--povray", str(fake), cwd=project(tmp_path))
    assert result.returncode != 0 and len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr and "POV-Ray" in result.stderr


def test_a_port_in_use_is_told(farm: Farm, tmp_path: Path) -> None:
    result = run(tmp_path, "serve", "--bind", "127.0.0.1", "--port", farm.port, "--data",
                 str(tmp_path / "other"), cwd=tmp_path)
    assert result.returncode == 2 and farm.port in result.stderr


def test_a_second_coordinator_leaves_the_data_alone(farm: Farm, tmp_path: Path) -> None:
    result = run(tmp_path, "serve", "--port", "0", "--no-discovery", cwd=tmp_path)
    assert result.returncode == 1 and "--data" in result.stderr


def test_a_wrong_key_and_no_coordinator_are_told(farm: Farm, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{farm.port}"
    wrong = run(tmp_path, "status", "--server", url, "--key", "wrong", cwd=tmp_path)
    assert wrong.returncode == 1 and "key" in wrong.stderr
    farm.close()
    gone = run(tmp_path, "status", "--server", url, cwd=tmp_path)
    assert gone.returncode == 1 and url in gone.stderr
    assert len(gone.stderr.splitlines()) == len(wrong.stderr.splitlines()) == 1


# --- a farm of several processes

def test_a_job_from_submit_to_fetch(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path)
    farm.work()
    job = farm.submit(place, "scene.pov", "+KFF6", *SMALL)
    assert farm.finished(job)["frames"]["done"] == 6
    result = run(tmp_path, "fetch", str(job), cwd=place)
    assert result.returncode == 0, result.stderr
    run_povray(["scene.pov", "+KFF6", *SMALL], place)
    assert pictures(place / "scene-frames") == {
        name: data for name, data in pictures(place).items() if "/" not in name}
    logs = run(tmp_path, "logs", str(job), "3", cwd=place)
    assert "Trace Time" in logs.stdout and "frame 3" in logs.stdout
    status = json.loads(run(tmp_path, "status", str(job), "--json", cwd=place).stdout)
    assert status["frames"]["done"] == 6 and status["state"] == "done"
    farm.check()


def decoded(film: Path, *options: str) -> bytes:
    """Return the pixels of every frame of a film, as ffmpeg decodes them."""
    return subprocess.run(
        ["ffmpeg", "-loglevel", "error", *options, "-i", str(film), "-f", "rawvideo",
         "-pix_fmt", "rgb24", "-"], capture_output=True, check=True).stdout


def test_files_that_a_scene_writes_are_fetched_and_in_the_zip(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, WRITER.replace("sub/own.inc", "own.inc"))
    farm.work()
    job = farm.submit(place, "scene.pov", "+KFF5", *SMALL)
    farm.finished(job)
    for new in (True, False):
        result = run(tmp_path, "fetch", str(job), "--json", cwd=place)
        assert bool(json.loads(result.stdout)["files"]) is new
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(place / "scene.pov", bare)
    run_povray(["scene.pov", "+KFF5", *SMALL], bare)
    archive = io.BytesIO(farm.client.request("GET", f"/api/v1/jobs/{job}/archive.zip").body)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "zip")
    expected = made_in(bare, {"scene.pov"})
    assert made_in(place / "scene-frames") == made_in(tmp_path / "zip") == expected
    farm.check()


def test_a_worker_whose_data_is_named_from_here_renders(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path)
    farm.work("--data", "there", "--server", farm.client.base_url, "--key",
              (tmp_path / "farm" / "farm.key").read_text())
    assert farm.finished(farm.submit(place, "scene.pov", *SMALL))["state"] == "done"
    assert (tmp_path / "there" / "cache").is_dir()


def test_what_a_scene_writes_stays_at_the_farm_unless_images_are_asked_for(
        farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, WRITER.replace("sub/own.inc", "own.inc"))
    farm.work()
    farm.submit(place, "scene.pov", *SMALL, "--wait")
    assert set(made_in(place)) == {"scene.pov"}
    farm.submit(place, "scene.pov", *SMALL, "--wait", "--output", "out")
    assert set(made_in(place / "out")) == {"scene.png", "last.txt", "each0.csv", "own.inc"}


def test_images_that_were_waited_for_are_not_replaced_by_another_job(
        farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path)
    farm.work()
    given = ["submit", "scene.pov", *SMALL, "--wait", "--output", "out"]
    assert run(tmp_path, *given, cwd=place).returncode == 0
    before = made_in(place / "out")
    again = run(tmp_path, *given, "+Q0", cwd=place)
    assert (again.returncode, again.stdout) == (2, "") and len(again.stderr.splitlines()) == 1
    assert "scene.png is of job 1" in again.stderr
    other = run(tmp_path, *given, "+Oother", cwd=place)
    assert other.returncode == 0, other.stderr
    fetched = run(tmp_path, "fetch", "1", "--output", "out", "--json", cwd=place)
    assert json.loads(fetched.stdout)["files"] == []
    assert {name: data for name, data in made_in(place / "out").items() if name in before} == before
    assert len(farm.client.request("GET", "/api/v1/jobs").json()["jobs"]) == 2


def test_films_are_made_of_all_frames(farm: Farm, tmp_path: Path) -> None:
    need("ffmpeg", shutil.which("ffmpeg") is not None, "apt-get install ffmpeg")
    place = project(tmp_path, name="50%d")
    farm.work()
    job = farm.submit(place, "50%d.pov", "+KFF12", "+W41", "+H31", "--name", "job")
    farm.finished(job)
    result = run(tmp_path, "fetch", str(job), "--apng", "film.png", "--video", "it's %d.mp4",
                 "--fps", "5", cwd=place)
    assert result.returncode == 0, result.stderr
    frames = sorted((place / "job-frames").iterdir())
    assert len(frames) == 12
    (tmp_path / "all").write_bytes(b"".join(frame.read_bytes() for frame in frames))
    plain = decoded(tmp_path / "all", "-f", "png_pipe")
    assert decoded(place / "film.png", "-f", "apng") == plain
    film = decoded(place / "it's %d.mp4")
    assert len(film) == 12 * 42 * 32 * 3  # sizes made even
    for number in (0, 11):
        shown = [film[3 * (42 * (32 * number + row)):][:3 * 41] for row in range(31)]
        ours = plain[number * 41 * 31 * 3:][:41 * 31 * 3]
        differences = [abs(a - b) for a, b in zip(b"".join(shown), ours)]
        assert sum(differences) / len(differences) < 8  # H.264 and half the colours' resolution
    assert sorted(path.name for path in place.iterdir()) == [
        "50%d.pov", "film.png", "it's %d.mp4", "job-frames"]
    failed = run(tmp_path, "fetch", str(job), "--video", "film.nothing", cwd=place)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1
    assert "film.nothing is no name of a film" in failed.stderr and "film.webm" in failed.stderr


def test_render_makes_films_as_fetch_does(tmp_path: Path) -> None:
    need("ffmpeg", shutil.which("ffmpeg") is not None, "apt-get install ffmpeg")
    place = project(tmp_path)
    result = run(tmp_path, "render", "scene.pov", "+KFF4", "+W32", "+H24", "--frames", "2-4",
                 "--apng", "film.png", "--video", "film.mp4", "--json", cwd=place)
    assert result.returncode == 0, result.stderr
    films = [str(place / name) for name in ("film.png", "film.mp4")]
    assert json.loads(result.stdout)["films"] == films
    plain = b"".join(decoded(place / f"scene{number}.png") for number in (2, 3, 4))
    assert decoded(place / "film.png", "-f", "apng") == plain
    assert len(decoded(place / "film.mp4")) == len(plain)


@pytest.mark.parametrize(("args", "words"), [
    ("+FT --apng film.png", "these are .tga"), ("+FH --video film.mp4", "makes no film of .hdr"),
    ("--video gone/film.mp4", "film.mp4 cannot be written"), ("-F --apng film.png", "is off"),
    ("--apng scene2.png", "scene2.png is one of the images"),
    ("--apng film.mp4", "film.mp4 is no name of an animated PNG"),
])
def test_render_says_before_it_begins_that_there_can_be_no_film(
        args: str, words: str, tmp_path: Path) -> None:
    need("ffmpeg", shutil.which("ffmpeg") is not None, "apt-get install ffmpeg")
    place = project(tmp_path)
    result = run(tmp_path, "render", "scene.pov", "+KFF4", *SMALL, *args.split(), cwd=place)
    assert result.returncode == 2 and words in result.stderr
    assert result.stderr.count("\n") == 1 and [path.name for path in place.iterdir()] == ["scene.pov"]


@pytest.mark.skipif(povfarm.landlock_abi() == 0, reason="needs Landlock")
def test_what_makes_a_film_reads_the_images_and_writes_the_film(tmp_path: Path) -> None:
    place, programs = project(tmp_path), tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "secret").write_text("secret\n")
    program = programs / "ffmpeg"
    program.write_text(
        "#!/bin/sh\nfor last; do :; done\n"  # it may start no others
        f"read word <{tmp_path}/secret; read image <../images/0.png\n"
        'echo "film${word:+ with a secret}${image:+ with an image}" >$last\n'
        f"for name in {place}/new ../images/0.png ../images/new; do echo x >>$name; done; exit 0\n")
    program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [*POVFARM, "render", "scene.pov", "+KFF2", *SMALL, "--video", "film.mp4"], cwd=place,
        capture_output=True, env={**environment(tmp_path), "PATH": path}, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (place / "film.mp4").read_text() == "film with an image\n"
    assert sorted(each.name for each in place.iterdir()) == [
        "film.mp4", "scene.pov", "scene1.png", "scene2.png"]
    assert not (place / "scene1.png").read_bytes().endswith(b"x\n")


def test_no_film_is_made_without_ffmpeg_or_a_frame(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path)
    job = farm.submit(place, "scene.pov", "+KFF3", *SMALL)
    result = run(tmp_path, "fetch", str(job), "--apng", "film.png", cwd=place)
    assert result.returncode == 1 and "3 of 3 frames are not finished" in result.stderr
    missing = subprocess.run(
        [*POVFARM, "fetch", str(job), "--video", "film.mp4"], cwd=place, text=True,
        capture_output=True, env={**environment(tmp_path), "PATH": str(tmp_path)}, check=False)
    assert missing.returncode == 1 and "install ffmpeg" in missing.stderr
    for each in (result, missing):
        assert len(each.stderr.splitlines()) == 1, each.stderr
    assert not list(place.glob("film*"))
    farm.work()
    tga = farm.submit(place, "scene.pov", "+KFF2", "+FT", *SMALL)
    farm.finished(tga)
    result = run(tmp_path, "fetch", str(tga), "--apng", "film.png", cwd=place)
    assert result.returncode == 1 and "these are .tga" in result.stderr


def test_the_same_project_with_one_changed_file_sends_one_file(
        farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, STILL + '#include "a.inc"\n#include "b.inc"\n')
    for name in "ab":
        (place / f"{name}.inc").write_text(f"// {name}\n")
    farm.submit(place, "scene.pov", *SMALL)
    blobs = tmp_path / "farm" / "blobs"
    before = {path for path in blobs.rglob("*") if path.is_file()}
    (place / "b.inc").write_text("// changed\n")
    farm.submit(place, "scene.pov", *SMALL)
    after = {path for path in blobs.rglob("*") if path.is_file()}
    assert len(before) == 3 and len(after - before) == 1


@pytest.mark.parametrize("farm", ["3s"], indirect=True)
def test_a_worker_killed_in_mid_frame_loses_nothing(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, HEAVY)
    first = farm.work()
    given = ["scene.pov", "+KFF4", "+W120", "+H90", "+A0.1"]
    job, _ = submit_and_stop(farm, place, *given)
    first.kill()
    wait_until(lambda: not renderers(tmp_path), "POV-Ray lives on without its worker")
    farm.work()
    assert farm.finished(job, 120)["frames"]["done"] == 4
    run(tmp_path, "fetch", str(job), cwd=place)
    run_povray(given, place)
    assert pictures(place / "scene-frames") == {
        name: data for name, data in pictures(place).items() if "/" not in name}
    farm.check()


def test_a_coordinator_killed_in_mid_job_goes_on_where_it_was(
        farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, HEAVY)
    farm.work()
    job = farm.submit(place, "scene.pov", "+KFF9", "+W100", "+H75", "+A0.1")
    wait_until(lambda: farm.job(job)["frames"]["done"] >= 3, "no frame is finished", 60)
    route = f"/api/v1/jobs/{job}/frames"
    # Of one that comes just now the file may lie there, and nobody was told that it was taken.
    taken = {frame["name"] for frame in farm.client.get(route)["frames"] if frame["state"] == "done"}
    farm.coordinator.kill()
    farm.coordinator.wait()
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "farm" / "jobs").rglob("*.png")
              if path.name in taken}
    assert len(images) >= 3
    farm.coordinator = farm.serve()
    assert farm.finished(job, 120)["frames"]["done"] == 9
    # What had been delivered is still the same file.
    done = {frame["name"]: frame["sha256"] for frame in farm.client.get(route)["frames"]}
    for path, written in images.items():
        assert path.stat().st_mtime_ns == written
        assert povfarm.sha256_file(path) == done[path.name]
    farm.check()


def test_the_first_ctrl_c_finishes_frames_and_hands_back(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, HEAVY)
    worker = farm.work("--cores", "1")
    job = farm.submit(place, "scene.pov", "+KFF9", "+W120", "+H90")
    wait_until(lambda: renderers(tmp_path), "nothing is rendered")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(60) == 130
    view = farm.job(job)["frames"]
    assert view["leased"] == 0 and view["done"] + view["queued"] == 9 and view["done"] >= 1


def test_a_worker_comes_back_at_once_when_a_coordinator_announces_itself(
        farm: Farm, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] - 1
    farm.work("--discovery-port", str(port), "--server", farm.client.base_url, "--key", farm.client.token)
    wait_until(lambda: farm.client.request("GET", "/api/v1/farm").json()["workers"], "none comes")
    farm.coordinator.kill()
    farm.coordinator.wait()
    with socket.create_server(("127.0.0.1", int(farm.port))) as gone, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as beacon:
        gone.settimeout(60)
        pause, tried = 0.0, time.monotonic()
        while pause < 4:  # the next one would be no shorter
            gone.accept()[0].close()
            pause, tried = time.monotonic() - tried, time.monotonic()
        time.sleep(1.2)  # what is announced right after a try has just been tried
        gone.settimeout(pause - 1.3)
        beacon.sendto(povfarm._packet("hint"), ("127.0.0.1", port + 1))
        gone.accept()[0].close()


@pytest.mark.parametrize("key", [True, False])
def test_a_worker_follows_its_farm_to_another_address(
        farm: Farm, tmp_path: Path, key: bool) -> None:
    """Whether it has the key or was let in; nobody types anything at the worker."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        found_at = "--discovery-port", str(free.getsockname()[1] - 1)
    data = tmp_path / "moving"

    def serve() -> "subprocess.Popen[str]":
        return farm.start("serve", "--data", str(data), "--port", "0", "--bind", "127.0.0.1",
                          *found_at, *["--open"] * (not key))

    def client() -> povfarm.Client:
        note = json.loads((data / "coordinator.json").read_text())
        return povfarm.Client(note["url"], (data / "farm.key").read_text())

    first = serve()
    wait_until(lambda: (data / "coordinator.json").exists(), "no coordinator")
    worker = farm.work("--data", str(tmp_path / "mine"), *found_at,
                       *["--key-file", str(data / "farm.key")] * key)
    wait_until(lambda: (tmp_path / "mine" / "workers" / "farm.json").exists(), "none comes")
    before = client().base_url
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    with socket.socket() as taken:  # else the next one may get the same port
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its connections have just ended
        taken.bind(("127.0.0.1", int(before.rpartition(":")[2])))
        serve()
        wait_until(lambda: (data / "coordinator.json").exists(), "no second coordinator")
        assert client().base_url != before
        wait_until(lambda: client().get("/api/v1/farm")["workers"], "it stays where nothing is")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(60) == 130 and worker.stdout is not None
    assert " now\n" in worker.stdout.read()


class Pretender(http.server.BaseHTTPRequestHandler):
    """Says that it is a coordinator, and has the key ``k``."""

    def do_GET(self) -> None:
        self.say({"farm_id": "f" * 16, "name": "slow", "version": "1"})

    def do_POST(self) -> None:
        wire = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != povfarm.HELLO:
            self.join(wire)
            return
        told = povfarm.Session("a", wire["nonce"], povfarm.secret_hash("k"), "f" * 16, "")
        self.say({"session": "a", "farm_id": "f" * 16, "proof": told.proof})

    def join(self, wire: Dict[str, Any]) -> None:
        raise NotImplementedError

    def say(self, answer: Dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def joining(tmp_path: Path, coordinator: Type[Pretender]) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker that is told to join what pretends to be a coordinator."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), coordinator) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        worker = subprocess.Popen(
            [*POVFARM, "work", "--server", f"http://127.0.0.1:{server.server_port}", "--key", "k"],
            env=environment(tmp_path), stdin=subprocess.DEVNULL)
        try:
            yield worker
        finally:
            worker.kill()
            worker.wait()
            server.shutdown()


@pytest.mark.parametrize("answers", [True, False])
def test_a_worker_that_is_stopped_while_it_joins_ends(answers: bool, tmp_path: Path) -> None:
    asked, stopped = threading.Event(), threading.Event()

    class Coordinator(Pretender):
        def join(self, wire: Dict[str, Any]) -> None:
            asked.set()
            stopped.wait(300)
            if answers:
                self.say({"id": 1, "admitted": True})

    with joining(tmp_path, Coordinator) as worker:
        try:
            assert asked.wait(60)
            worker.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            if answers:
                stopped.set()
            assert worker.wait(60) == 130
        finally:
            stopped.set()


def test_a_worker_that_joins_again_because_the_answer_was_lost_has_the_same_ticket(
        tmp_path: Path) -> None:
    asked: "queue.Queue[Dict[str, Any]]" = queue.Queue()

    class Coordinator(Pretender):
        def join(self, wire: Dict[str, Any]) -> None:  # without an answer
            asked.put(wire)

    with joining(tmp_path, Coordinator):
        first, again = asked.get(timeout=60), asked.get(timeout=30)
        assert first == again and re.fullmatch("[A-Za-z0-9_-]{32,100}", first["ticket"])


def test_ctrl_c_in_render_stops_at_once_and_leaves_no_more_than_a_state(tmp_path: Path) -> None:
    place = project(tmp_path, HEAVY)
    process = subprocess.Popen(
        [*POVFARM, "render", "scene.pov", "+W1600", "+H1200", "+A0.01"], cwd=place,
        env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    stop_renderer(tmp_path)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert {*os.listdir(place)} <= {"scene.pov", "scene.pov-state"}
    assert os.listdir(tmp_path / "tmp") == []


def test_a_cancelled_job_stops_its_renders_at_once(farm: Farm, tmp_path: Path) -> None:
    farm.work()
    job = farm.submit(project(tmp_path, HEAVY), "scene.pov", "+W1600", "+H1200", "+A0.01")
    stop_renderer(tmp_path)  # so it does not end by itself
    run(tmp_path, "cancel", str(job), cwd=tmp_path)
    wait_until(lambda: not renderers(tmp_path), "the render goes on")


def test_a_worker_without_the_key_waits_until_it_is_admitted(farm: Farm, tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    worker = subprocess.Popen(
        [*POVFARM, "work", "--server", f"127.0.0.1:{farm.port}", "--until-idle"], cwd=home,
        env={**environment(tmp_path), "POVFARM_DATA": str(home / "data")}, text=True,
        stderr=subprocess.PIPE)
    farm.processes.append(worker)
    job = farm.submit(project(tmp_path), "scene.pov", *SMALL)
    assert worker.stderr is not None
    code = worker.stderr.readline().split()[-1]
    assert farm.job(job)["frames"]["queued"] == 1
    shown = run(tmp_path, "workers", cwd=tmp_path).stdout
    assert "pending" in shown and code in shown
    assert run(tmp_path, "admit", code.lower(), cwd=tmp_path).returncode == 0
    assert farm.finished(job)["state"] == "done"
    assert worker.wait(60) == 0
    worker.stderr.close()


def test_a_scene_error_pauses_a_new_job_and_shows_povrays_words(
        farm: Farm, tmp_path: Path) -> None:
    farm.work("--cores", "2")
    job = farm.submit(project(tmp_path, STILL + "oops\n"), "scene.pov", "+KFF50", *SMALL)
    view = wait_until(lambda: farm.job(job)["state"] == "paused" and farm.job(job), "no pause")
    assert view["frames"]["failed"] <= 2 + 4 * 2  # the third, and what else was under way then
    assert "scene.pov' line 6" in view["failure"]["message"]


def test_a_frame_that_never_ends_is_ended(farm: Farm, tmp_path: Path) -> None:
    farm.work("--cores", "1")
    place = project(tmp_path, STILL + "#if (clock > 0) #while (1) #end #end\n")
    limit = longer_than_a_frame(place)
    job = farm.submit(place, "scene.pov", "+KFF2", *SMALL, "--frame-timeout", limit, "--retries", "1")
    view = farm.finished(job, 300)
    assert (view["frames"]["done"], view["frames"]["failed"]) == (1, 1)
    assert "longer than" in view["failure"]["message"]


def test_a_renderer_that_stands_still_is_ended_and_its_frame_done_elsewhere(
        farm: Farm, tmp_path: Path) -> None:
    for name in ("anna", "berta"):
        farm.work("--cores", "1", "--worker-name", name, "--data", str(tmp_path / name), "--server",
                  farm.client.base_url, "--key", farm.client.token)
    wait_until(lambda: farm.client.request("GET", "/api/v1/farm").json()["workers"] == 2,
               "the workers do not come")
    place = project(tmp_path, HEAVY)
    limit = longer_than_a_frame(place)
    job, held = submit_and_stop(farm, place, "scene.pov", *SMALL, "--frame-timeout", limit)
    on = Path(os.readlink(f"/proc/{held}/cwd")).relative_to(tmp_path).parts[0]
    assert farm.finished(job, 300)["state"] == "done"
    frame, = farm.client.request("GET", f"/api/v1/jobs/{job}/frames").json()["frames"]
    assert {on, frame["worker"]} == {"anna", "berta"}
    wait_until(lambda: held not in renderers(tmp_path), "it is still there")
    farm.check()


def test_jobs_of_higher_priority_go_first(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path)
    low = farm.submit(place, "scene.pov", "+KFF4", *SMALL)
    high = farm.submit(place, "scene.pov", "+KFF4", *SMALL, "--priority", "5")
    farm.work("--cores", "1")
    farm.finished(low)
    assert farm.job(high)["started"] <= farm.job(low)["started"]


def test_an_idle_worker_starts_at_once(farm: Farm, tmp_path: Path) -> None:
    worker = farm.work()
    assert worker.stdout is not None
    assert "working for" in worker.stdout.readline()
    job = farm.submit(project(tmp_path), "scene.pov", *SMALL)
    view = farm.finished(job)
    # It would ask again after povfarm.LEASE_WAIT seconds only.
    assert view["started"] - view["created"] < povfarm.LEASE_WAIT / 5


def test_names_with_blanks_umlauts_and_quotes_travel(farm: Farm, tmp_path: Path) -> None:
    place = tmp_path / "my 'own' prüject"
    (place / "mäps & more").mkdir(parents=True)
    (place / "sub scene.pov").write_text(STILL + '#include "mäps & more/ä \'x\'.inc"\n')
    (place / "mäps & more" / "ä 'x'.inc").write_text("// here\n")
    farm.work()
    job = farm.submit(place, '+I"sub scene.pov"', *SMALL)
    assert farm.finished(job)["state"] == "done"


def test_two_workers_share_an_animation(farm: Farm, tmp_path: Path) -> None:
    for number in (1, 2):
        farm.work("--cores", "1", "--worker-name", f"worker {number}")
    wait_until(lambda: farm.client.request("GET", "/api/v1/farm").json()["workers"] == 2,
               "the workers do not come")
    job = farm.submit(project(tmp_path, HEAVY), "scene.pov", "+KFF10", "+W100", "+H75")
    farm.finished(job)
    frames = farm.client.request("GET", f"/api/v1/jobs/{job}/frames").json()["frames"]
    assert {frame["worker"] for frame in frames} == {"worker 1", "worker 2"}
    farm.check()


def test_one_worker_renders_for_two_farms_in_turn_while_a_third_is_away(
        farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "other" / "farm").mkdir(parents=True)
    shutil.copy(tmp_path / "farm" / "farm.key", tmp_path / "other" / "farm")
    other = Farm(tmp_path / "other")
    place, addresses = project(tmp_path), [farm.client.base_url, f"{other.client.base_url}=2"]
    with socket.socket() as away, contextlib.closing(other):
        away.bind(("127.0.0.1", 0))
        addresses.append(f"http://127.0.0.1:{away.getsockname()[1]}")
        jobs = [one.submit(place, "scene.pov", "+KFF4", *SMALL) for one in (farm, other)]
        worker = farm.work("--cores", "1", "--data", str(tmp_path / "work"),
                           "--key-file", str(tmp_path / "farm" / "farm.key"),
                           *(word for address in addresses for word in ("--server", address)))
        for one, job in zip((farm, other), jobs):
            ended = one.finished(job, 120)
            assert ended["frames"]["done"] == 4, ended["failure"]
        # Also who has not the turn is there, and neither waits for the other.
        assert [one.client.get("/api/v1/farm")["workers"] for one in (farm, other)] == [1, 1]
        worker.send_signal(signal.SIGINT)
        assert worker.wait(60) == 130 and worker.stdout is not None
        text = worker.stdout.read()
        assert "rendered 8 frames" in text and text.count("working for") == 2, text
        other.check()
    farm.check()


def test_a_list_of_farms_is_kept_for_other_networks(farm: Farm, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    away = f"127.0.0.1:{port}"
    farm.start("discover", "--serve", "--discovery-port", port, farm.client.base_url, away)
    told = wait_until(lambda: run(tmp_path, "discover", away, "--json", cwd=tmp_path).stdout, "no list")
    known = farm.client.get("/api/v1/farm")
    assert json.loads(told) == [{"name": known["name"], "url": farm.client.base_url,
                                 "farm_id": known["farm_id"], "pin": ""}]
    for address, told in (("127.0.0.1:9", "is 'discover --serve' running there?"),
                          (farm.client.base_url[7:], "keeps no list of farms, as '")):
        result = run(tmp_path, "discover", address, cwd=tmp_path)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert told in result.stderr


@pytest.mark.parametrize("servers", [["a=0"], ["a=x"], ["a", "b=1=2"]])
def test_a_share_that_is_none_is_refused(tmp_path: Path, servers: List[str]) -> None:
    typed = [word for server in servers for word in ("--server", server)]
    result = run(tmp_path, "work", *typed, cwd=tmp_path)
    assert result.returncode == 2 and "--server studio=2" in result.stderr
    result = run(tmp_path, "status", "--server", "a b", cwd=tmp_path)
    assert result.returncode == 2 and "only a worker" in result.stderr


def test_a_backup_made_while_frames_come_in_is_a_farm_that_finishes_them(
        farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path, HEAVY)
    job = farm.submit(place, "scene.pov", "+KFF6", *SMALL)
    farm.work("--cores", "1")
    wait_until(lambda: farm.job(job)["frames"]["done"] >= 1, "nothing is rendered")
    result = run(tmp_path, "backup", "copy", cwd=tmp_path)
    assert result.returncode == 0 and "serve --data copy" in result.stderr, result.stderr
    again = run(tmp_path, "backup", "copy", cwd=tmp_path)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
    farm.close()
    shutil.rmtree(tmp_path / "farm")
    (tmp_path / "copy").rename(tmp_path / "farm")
    farm.serve()
    farm.work()
    assert farm.finished(job)["state"] == "done"
    farm.check()


def test_serve_with_work_renders_too_when_its_owner_wants_it(tmp_path: Path) -> None:
    def serve(*args: str) -> "subprocess.Popen[str]":
        farm.processes[-1].send_signal(signal.SIGTERM)
        farm.processes[-1].wait()
        served = farm.start("serve", "--bind", "127.0.0.1", "--port", farm.port, "--no-discovery",
                            "--work", "--tags", "room3", *args)
        assert served.stdout is not None and "is at" in served.stdout.readline()
        return served

    farm = Farm(tmp_path)
    try:
        job = farm.submit(project(tmp_path), "scene.pov", *SMALL, "--only", "room3")
        hours = time.strftime("%a", time.localtime(time.time() + 3 * 86400)).lower()
        serve("--hours", hours)
        why = f"{socket.gethostname()} rests: paused outside of its hours ({hours})"
        wait_until(lambda: farm.job(job)["waiting_for"] == why, "it does not rest")
        served = serve()
        assert farm.finished(job)["state"] == "done"
        served.send_signal(signal.SIGUSR1)
        wait_until(lambda: farm.client.get("/api/v1/workers")["workers"][0].get("reason") ==
                   "paused on this computer", "the signal does nothing")
    finally:
        farm.close()


def test_a_still_uses_every_core_in_one_process(tmp_path: Path) -> None:
    seen: List[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            seen.append(len(renderers(tmp_path)))

    thread = threading.Thread(target=look)
    thread.start()
    result = run(tmp_path, "render", "scene.pov", "+W160", "+H120", "--json", "--verbose",
                 cwd=project(tmp_path, HEAVY))
    stop.set()
    thread.join()
    assert result.returncode == 0 and max(seen) == 1


def test_saved_photons_are_found_where_povray_looks_for_them(tmp_path: Path) -> None:
    scene = STILL.replace("assumed_gamma 1", "assumed_gamma 1 photons { spacing 0.2 %s }") + (
        "sphere { <2, 0, 0>, 0.5 photons { target reflection on refraction on }"
        " pigment { rgbt 1 } interior { ior 1.5 } }\n")
    place = project(tmp_path, scene % 'save_file "saved.ph"')
    assert run_povray(["scene.pov", *SMALL], place).returncode == 0
    expected = pixels(place / "scene.png")
    (place / "scene.pov").write_text(scene % 'load_file "saved.ph"')
    (place / "scene.png").unlink()
    result = run(tmp_path, "render", "scene.pov", *SMALL, cwd=place)
    assert result.returncode == 0, result.stderr
    assert pixels(place / "scene.png") == expected


def test_several_farms_are_listed_and_chosen_by_name_and_key(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        udp = str(probe.getsockname()[1])
    env = environment(tmp_path)
    farms = []
    try:
        for name in ("attic", "cellar"):
            farms.append(subprocess.Popen(
                [*POVFARM, "serve", "--bind", "127.0.0.1", "--port", "0", "--name", name,
                 "--discovery-port", udp, "--data", str(tmp_path / name)],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
            assert farms[-1].stdout is not None and name in farms[-1].stdout.readline()

        def ask(*args: str) -> "subprocess.CompletedProcess[str]":
            return run(tmp_path, *args, "--discovery-port", udp, cwd=tmp_path)

        key = (tmp_path / "attic" / "farm.key").read_text()
        url = json.loads((tmp_path / "attic" / "coordinator.json").read_text())["url"]
        with concurrent.futures.ThreadPoolExecutor(7) as pool:  # they mostly wait for answers
            found, both, named, by_key, login, wrong, rejected = pool.map(lambda args: ask(*args), (
                ["discover"], ["status"], ["status", "--name", "cellar"], ["workers", "--key", key],
                ["login", "--key", key], ["status", "--key", "wrong", "--name", "attic"],
                ["work", "--server", url, "--key", "wrong"]))
        assert "attic" in found.stdout and "cellar" in found.stdout
        assert both.returncode == 2 and "attic" in both.stderr and "cellar" in both.stderr
        assert named.returncode == by_key.returncode == 0
        assert url in login.stdout
        assert wrong.returncode == rejected.returncode == 1 and "another key" in wrong.stderr
        assert len(wrong.stderr.splitlines()) == len(rejected.stderr.splitlines()) == 1
    finally:
        for farm in farms:
            farm.terminate()
            farm.communicate()


def test_two_workers_render_every_frame_that_is_verified(tmp_path: Path, farm: Farm) -> None:
    for name in ("anna", "bert"):
        farm.work("--worker-name", name, "--cores", "1")
    wait_until(lambda: farm.client.request("GET", "/api/v1/farm").json()["workers"] == 2,
               "the workers do not come")
    place = project(tmp_path)
    job = farm.submit(place, "scene.pov", *SMALL, "+KFF4", "--verify", "100")
    assert farm.finished(job)["state"] == "done"
    events = farm.client.request("GET", "/api/v1/events?after=0&wait=0").json()["events"]
    assert [event["text"] for event in events if event["what"] in ("doubtful", "set aside")] == [
        "checked only by a worker behind which the same person may be"]  # of one address
    farm.check()
    with contextlib.closing(povfarm.Store(tmp_path / "farm")) as store, store.read() as tx:
        for task in tx.tasks(job):
            tries = {(tx.worker(row.worker).name, row.state) for row in tx.attempts(task.id)}
            assert {state for _, state in tries} == {"kept", "done"}, tries
            assert {name for name, _ in tries} == {"anna", "bert"}, tries


MANY = STILL + """#for (I, 1, 1010)
#fopen F concat("p", str(I, -4, 0), ".inc") write #write (F, I) #fclose F
#end
#fopen F ".hidden" write #write (F, "x") #fclose F
"""


def test_files_that_stay_behind_are_told_of(farm: Farm, tmp_path: Path) -> None:
    """By number and names; as many as a frame may leave come."""
    farm.work()
    place = project(tmp_path, MANY)
    done = run(tmp_path, "submit", "scene.pov", *SMALL, "--wait", "--output", "got", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "11 files that the scene wrote did not come back" in done.stderr
    assert "'.hidden', 'p1001.inc'" in done.stderr
    assert len(list((place / "got").glob("p*.inc"))) == 1000
    got = run(tmp_path, "render", "scene.pov", *SMALL, cwd=place)
    assert got.returncode == 0 and (place / ".hidden").is_file(), got.stderr
    assert len(list(place.glob("p*.inc"))) == 1010
