"""Renders that are stopped and gone on with: real processes that are killed, real POV-Ray."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import pytest

from helpers.base import POVFARM, run_povray, wait_until
from helpers.pictures import pixels_of

pytestmark = pytest.mark.usefixtures("povray")
SMALL = ["+W32", "+H24", "+FP"]

SCENE = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 1, -5> look_at 0 }
light_source { <2, 4, -3>, 1 }
sphere { 0, 1 pigment { rgb <1, clock, 0.3> } }
"""
# Its fourth frame does not end before there is a file "go"; it looks for it without rest.
PATIENTLY = ["nice", "-n", "10"]
HANGS = SCENE + '#if (frame_number = 4) #while (!file_exists("go")) #end #end\n'


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Place]:
    """A place with a coordinator; all that was started is killed at the end."""
    place = Place(tmp_path, SCENE)
    place.serve()
    yield place
    for process in place.processes:
        process.kill()
        process.communicate()


class Place:
    """A directory with a scene, where povfarm is started; its home is beside it."""

    def __init__(self, tmp_path: Path, scene: str) -> None:
        self.path = tmp_path / "place"
        self.processes: List["subprocess.Popen[str]"] = []
        self.temporary = tmp_path / "tmp"
        self.temporary.mkdir()
        self.path.mkdir()
        (self.path / "s.pov").write_text(scene)
        self.environment: Dict[str, str] = {
            **os.environ, "HOME": str(tmp_path), "TMPDIR": str(self.temporary),
            "POVFARM_DATA": str(tmp_path / "farm")}

    def start(self, *arguments: str, before: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """Start a povfarm command."""
        self.processes.append(subprocess.Popen(
            [*before, *POVFARM, *arguments], cwd=self.path, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return self.processes[-1]

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a povfarm command to its end."""
        return subprocess.run(
            [*POVFARM, *arguments], cwd=self.path, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False)

    def hangs(self, name: str = "s") -> "subprocess.Popen[str]":
        """Start a render whose fourth frame does not end, and whose first has ended."""
        process = self.start("render", "s.pov", *SMALL, "+KFF9", f"+O{name}", before=PATIENTLY)
        wait_until((self.path / f"{name}1.ppm").exists, "the first frame does not come")
        return process

    def serve(self, port: str = "0") -> "subprocess.Popen[str]":
        """Start a coordinator; ``port`` becomes its port."""
        process = self.start("serve", "--bind", "127.0.0.1", "--port", port, "--no-discovery")
        assert process.stdout is not None
        assert "is at http" in process.stdout.readline()
        note = (self.path.parent / "farm" / "coordinator.json").read_text()
        self.port = json.loads(note)["url"].rpartition(":")[2]
        return process

    def names(self) -> List[str]:
        """Return what is in the directory."""
        return sorted(os.listdir(self.path))


def test_what_a_killed_render_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    place = Place(tmp_path, HANGS)
    living, killed = place.hangs(), place.hangs("t")
    try:
        (place.path / "still.pov").write_text(SCENE)
        before = set(os.listdir(place.temporary))
        assert len(before) == 2
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=180)
        # Its launcher and renderers go with it, and so does what they hold.
        assert place.run("render", "still.pov", *SMALL).returncode == 0
        left = set(os.listdir(place.temporary))
        assert len(left) == 1 and left < before
        (place.path / "go").touch()
    finally:
        living.send_signal(signal.SIGINT)
        living.communicate(timeout=180)
        killed.kill()
    assert os.listdir(place.temporary) == []


def test_half_an_image_of_a_killed_render_is_deleted_by_the_next(tmp_path: Path) -> None:
    place = Place(tmp_path, SCENE)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    parts = {name: place.path / f".{owner}.0123456789abcdef.part" for name, owner in (
        ("old", ended.pid), ("new", ended.pid + (1 << 22)), ("living", os.getppid()))}
    for name, part in parts.items():
        part.touch()
        if name != "new":  # of another computer, perhaps
            os.utime(part, (time.time() - 100,) * 2)
    assert place.run("render", "s.pov", *SMALL).returncode == 0
    assert [name for name, part in parts.items() if part.exists()] == ["new", "living"]


def same_as_povray(place: Place, names: List[str], *arguments: str) -> None:
    """Compare images with those that plain POV-Ray, left alone, makes of the scene elsewhere."""
    plain = place.path.parent / "plain"
    plain.mkdir(exist_ok=True)
    shutil.copy(place.path / "s.pov", plain)
    (plain / "go").touch()
    assert run_povray(["s.pov", *arguments], plain).returncode == 0
    for name in names:
        assert pixels_of(place.path / name) == pixels_of(plain / name), name


def test_chosen_frames_are_those_of_the_whole_animation(tmp_path: Path) -> None:
    place = Place(tmp_path, SCENE)
    wanted = ["s02.ppm", "s03.ppm", "s12.ppm"]
    result = place.run("render", "s.pov", *SMALL, "+KFF12", "--frames", "12,2-3,3")
    assert result.returncode == 0 and "3 frames" in result.stdout
    assert place.names() == ["s.pov", *wanted]
    same_as_povray(place, wanted, *SMALL, "+KFF12")


def test_frames_that_are_not_there_change_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path, SCENE)
    result = place.run("render", "s.pov", *SMALL, "+KFF12", "--frames=3,13")
    assert (result.returncode, result.stdout, place.names()) == (2, "", ["s.pov"])
    assert result.stderr == ("povfarm: '13' names no frames of this animation: it has 1 to 12\n")


def lines_of(process: "subprocess.Popen[str]") -> "queue.Queue[str]":
    """Return what a process says as it says it."""
    said: "queue.Queue[str]" = queue.Queue()
    assert process.stderr is not None
    threading.Thread(target=lambda file: [said.put(line) for line in file],
                     args=(process.stderr,), daemon=True).start()
    return said


def heard(said: "queue.Queue[str]", text: str) -> str:
    """Wait until a line with this text comes; return it."""
    while True:
        line = said.get(timeout=60)
        if text in line:
            return line


def test_who_waits_for_a_job_is_as_patient_as_a_worker(farm: Place) -> None:
    coordinator = farm.processes[0]
    waiting = farm.start("submit", "s.pov", *SMALL, "+KFF4", "--wait", "--output", "got")
    assert waiting.stdout is not None and waiting.stdout.readline() == "1\n"
    watching = farm.start("status", "--watch")
    assert watching.stdout is not None and "job" in watching.stdout.readline()
    said, also = lines_of(waiting), lines_of(watching)
    coordinator.kill()
    coordinator.wait()
    assert "does not answer" in heard(said, "povfarm: http") and heard(also, "does not answer")
    never = farm.run("fetch", "1", "--server", f"127.0.0.1:{farm.port}")
    assert never.returncode == 1 and "does not answer" in never.stderr
    farm.serve(farm.port)
    assert heard(said, "answers again") and heard(also, "answers again")
    farm.start("work", "--cores", "1")
    assert waiting.wait(120) == 0
    watching.send_signal(signal.SIGINT)
    assert watching.wait(60) == 130
    assert sorted(os.listdir(farm.path / "got")) == [f"s{number}.ppm" for number in range(1, 5)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP])
def test_who_stops_waiting_for_a_job_is_told_how_to_get_it(farm: Place, how: int) -> None:
    waiting = farm.start("submit", "s.pov", *SMALL, "+KFF4", "--wait", "--output", "got it",
                         "--server", f"127.0.0.1:{farm.port}")
    assert waiting.stdout is not None and waiting.stdout.readline() == "1\n"
    waiting.send_signal(how)
    _, error = waiting.communicate(timeout=180)
    assert waiting.returncode == 130 and "job 1 goes on" in error
    assert farm.run("work", "--until-idle").returncode == 0
    command = error.rpartition("with: ")[2]
    assert subprocess.run(shlex.split(command), cwd=farm.path, env=farm.environment,
                          check=False, timeout=300).returncode == 0
    assert len(os.listdir(farm.path / "got it")) == 4


# Its pixels take long.
SLOW = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 1, -5> look_at 0 }
light_source { <2, 4, -3>, 1 area_light x*4, y*4, 40, 40 }
sphere { 0, 1 pigment { rgb <1, clock, 0.3> } }
plane { y, -1 pigment { checker rgb 1 rgb 0.2 } }
"""
BLOCKS = ["+FP", "+W64", "+H64", "+BS16"]  # sixteen of them, of 5,364 bytes in a state


def in_the_middle(process: "subprocess.Popen[str]", place: Path, how: int) -> str:
    """Stop a program when two blocks or more of a frame are finished; return what it says."""
    def begun() -> bool:
        return any(path.stat().st_size > 12_000 for path in place.rglob("*.pov-state"))
    wait_until(begun, "no block is finished")
    process.send_signal(how)
    return process.communicate(timeout=120)[1]


def stopped(place: Place, how: int, *arguments: str) -> str:
    """Stop a render in the middle of a frame, and return what it says."""
    process = place.start("render", "s.pov", *arguments)
    error = in_the_middle(process, place.temporary, how)
    assert process.returncode == 130 and os.listdir(place.temporary) == []
    return error


def stop_povray(place: Place, how: int, *arguments: str) -> None:
    """Stop plain POV-Ray in the middle of a frame."""
    process = subprocess.Popen(["povray", "s.pov", "-D", *arguments], cwd=place.path, text=True,
                               stderr=subprocess.PIPE)
    in_the_middle(process, place.path, how)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_still_that_was_stopped_is_gone_on_with(how: int, tmp_path: Path) -> None:
    place = Place(tmp_path, SLOW)
    error = stopped(place, how, *BLOCKS)
    assert place.names() == ["s.pov", "s.pov-state"]
    again = error.rpartition("Go on with: ")[2]
    assert "+W64" in again and again.rstrip().endswith("+C")
    done = subprocess.run(shlex.split(again), cwd=place.path, env=place.environment, text=True,
                          capture_output=True, check=False, timeout=300)
    assert done.returncode == 0 and "going on with what is done of s.pov-state" in done.stderr
    assert place.names() == ["s.pov", "s.ppm"]
    same_as_povray(place, ["s.ppm"], *BLOCKS)


def test_povray_goes_on_with_what_a_stopped_render_left(tmp_path: Path) -> None:
    place = Place(tmp_path, SLOW)
    stopped(place, signal.SIGINT, *BLOCKS)
    assert run_povray(["s.pov", *BLOCKS, "+C"], place.path).returncode == 0
    same_as_povray(place, ["s.ppm"], *BLOCKS)


@pytest.mark.parametrize("how, frames", [
    (signal.SIGINT, []), (signal.SIGKILL, ["+KFF3", "+Oout/a"])])
def test_what_a_stopped_povray_left_is_gone_on_with(
        how: int, frames: List[str], tmp_path: Path) -> None:
    place = Place(tmp_path, SLOW)
    (place.path / "out").mkdir()
    stop_povray(place, how, *BLOCKS, *frames)
    result = place.run("render", "s.pov", *BLOCKS, *frames, "+C")
    assert result.returncode == 0 and "going on with what is done of" in result.stderr
    names = ["out/a1.ppm", "out/a2.ppm", "out/a3.ppm"] if frames else ["s.ppm"]
    assert not list(place.path.rglob("*.pov-state"))
    (tmp_path / "plain" / "out").mkdir(parents=True)
    same_as_povray(place, names, *BLOCKS, *frames)


@pytest.mark.parametrize("other", [["+W48"], ["+BS8"], ["+SR20"]])
def test_a_state_that_does_not_fit_is_not_gone_on_with(other: List[str], tmp_path: Path) -> None:
    place = Place(tmp_path, SLOW)
    stop_povray(place, signal.SIGKILL, *BLOCKS)
    result = place.run("render", "s.pov", *BLOCKS, *other, "+C")
    assert result.returncode == 0, result.stderr
    assert place.names() == ["s.pov", "s.ppm"]
    same_as_povray(place, ["s.ppm"], *BLOCKS, *other)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path, HANGS)
    process = place.hangs()
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode == 130 and os.listdir(place.temporary) == []


NINE = [f"s{number}.ppm" for number in range(1, 10)]


def times(place: Place) -> Dict[str, int]:
    """Return when each image was written."""
    return {path.name: path.stat().st_mtime_ns for path in place.path.glob("*.ppm")}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_frames_that_are_there_are_not_rendered_again(how: int, tmp_path: Path) -> None:
    place = Place(tmp_path, HANGS)
    process = place.hangs()
    process.send_signal(how)
    _, error = process.communicate(timeout=180)
    assert ("Go on with" in error) == (how == signal.SIGINT)
    before = times(place)
    assert "s1.ppm" in before and "s4.ppm" not in before
    states = {name for name in place.names() if name.endswith(".pov-state")}  # of others under way
    assert {*place.names()} == {"s.pov", *before, *states} and (not states or "Go on" in error)
    (place.path / "go").touch()
    result = place.run("render", "s.pov", *SMALL, "+KFF9", "+C")
    assert result.returncode == 0, result.stderr
    assert f"{len(before)} of 9 images are there already" in result.stderr
    after = times(place)
    assert sorted(after) == NINE and {name: after[name] for name in before} == before
    same_as_povray(place, NINE, *SMALL, "+KFF9")
    assert os.listdir(place.temporary) == []


def test_images_that_are_not_what_was_asked_for_are_rendered_again(tmp_path: Path) -> None:
    place = Place(tmp_path, SCENE)
    assert place.run("render", "s.pov", *SMALL, "+KFF6").returncode == 0
    first = times(place)
    (place.path / "s2.ppm").write_bytes((place.path / "s2.ppm").read_bytes()[:-1])
    assert run_povray(["s.pov", "+W16", "+H24", "+FP", "+KFF6", "+SF3", "+EF3"],
                      place.path).returncode == 0
    assert run_povray(["s.pov", "+W32", "+H24", "+FN", "+KFF6", "+SF4", "+EF4"],
                      place.path).returncode == 0
    (place.path / "s4.png").rename(place.path / "s4.ppm")
    (place.path / "s5.ppm").unlink()
    result = place.run("render", "s.pov", *SMALL, "+KFF6", "+C")
    assert result.returncode == 0 and "2 of 6 images are there already" in result.stderr
    assert "s2.ppm is rendered again" in result.stderr
    assert {name for name, time in times(place).items() if time == first[name]} == {
        "s1.ppm", "s6.ppm"}
    same_as_povray(place, NINE[:6], *SMALL, "+KFF6")


def test_where_all_images_are_there_nothing_is_rendered(tmp_path: Path) -> None:
    place = Place(tmp_path, SCENE)
    for more in ([], ["+KFF3"]):
        assert place.run("render", "s.pov", *SMALL, *more).returncode == 0
        before = times(place)
        result = place.run("render", "s.pov", *SMALL, *more, "+C")
        assert result.returncode == 0 and "nothing is left to render" in result.stdout
        told = place.run("render", "s.pov", *SMALL, *more, "+C", "--json")
        assert told.returncode == 0 and json.loads(told.stdout)["files"] == []
        assert times(place) == before


def test_submit_leaves_images_alone_that_are_in_their_place(farm: Place) -> None:
    farm.start("work", "--cores", "1")
    submit = ["submit", "s.pov", *SMALL, "+KFF4", "--wait", "--output", "got"]
    assert farm.run(*submit).returncode == 0
    got = farm.path / "got"
    (got / "s2.ppm").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in got.iterdir()}
    result = farm.run(*submit, "+C")
    assert result.returncode == 0, result.stderr
    assert "3 of 4 images are there already" in result.stderr
    after = {path.name: path.stat().st_mtime_ns for path in got.iterdir()}
    assert {**after, **before} == after and len(after) == 4
    assert "nothing is left to render" in farm.run(*submit, "+C").stdout
    assert "+C does nothing here" in farm.run("submit", "s.pov", *SMALL, "+C").stderr


# Each frame draws a ball more than the one before, whose picture it reads.
CHAIN = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { orthographic location <0, 0, -5> look_at 0 right 4*x up 3*y }
#if (frame_number > 1)
plane { z, 1 pigment { image_map { ppm concat("s", str(frame_number - 1, 0, 0), ".ppm") }
  translate -0.5 scale <4, 3, 1> } finish { ambient 1 diffuse 0 } }
#end
sphere { <frame_number / 3 - 1.5, 0, 0>, 0.3 pigment { rgb 1 } finish { ambient 1 diffuse 0 } }
"""


def test_chosen_frames_that_read_earlier_ones_begin_where_povray_would(tmp_path: Path) -> None:
    place = Place(tmp_path, CHAIN)
    plain = place.path.parent / "plain"
    shutil.copytree(place.path, plain)
    for directory in (place.path, plain):
        assert run_povray(["s.pov", *SMALL, "+KFF8", "+EF3"], directory).returncode == 0
    assert run_povray(["s.pov", *SMALL, "+KFF8", "+SF4", "+EF7"], plain).returncode == 0
    result = place.run("render", "s.pov", *SMALL, "+KFF8", "--frames", "4-5,7")
    assert result.returncode == 0, result.stderr
    assert place.names() == ["s.pov", "s1.ppm", "s2.ppm", "s3.ppm", "s4.ppm", "s5.ppm", "s7.ppm"]
    for name in ("s4.ppm", "s5.ppm", "s7.ppm"):
        assert pixels_of(place.path / name) == pixels_of(plain / name), name


def test_frames_that_read_earlier_images_go_on_with_the_first_that_is_missing(
        tmp_path: Path) -> None:
    hangs = '#if (frame_number = 4) #while (!file_exists("go")) #end #end\n'
    place = Place(tmp_path, CHAIN + hangs)
    process = place.start("render", "s.pov", *SMALL, "+KFF6", before=PATIENTLY)
    wait_until((place.path / "s3.ppm").exists, "the third frame does not come")
    process.send_signal(signal.SIGINT)
    assert "Go on with" in process.communicate(timeout=180)[1]
    before = times(place)
    assert sorted(before) == NINE[:3]
    (place.path / "go").touch()
    result = place.run("render", "s.pov", *SMALL, "+KFF6", "+C")
    assert result.returncode == 0 and "3 of 6 images are there already" in result.stderr
    assert {**times(place), **before} == times(place)
    same_as_povray(place, NINE[:6], *SMALL, "+KFF6")


# The ball goes on from where it was in the frame before, as a file says.
WALK = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 0, -5> look_at 0 }
light_source { <2, 4, -3> 1 }
#if (frame_number = 1) #declare Pos = 0; #else
#fopen F "pos.txt" read #read (F, Pos) #fclose F #end
#declare Pos = Pos + 0.2;
#fopen F "pos.txt" write #write (F, Pos) #fclose F
sphere { <Pos - 1, 0, 0>, 0.5 pigment { rgb 1 } }
"""


def test_frames_that_read_files_of_earlier_ones_are_rendered_with_those(tmp_path: Path) -> None:
    place = Place(tmp_path, WALK)
    assert place.run("render", "s.pov", *SMALL, "+KFF5").returncode == 0
    for number in (2, 4):
        (place.path / f"s{number}.ppm").unlink()
    (place.path / "pos.txt").write_text("9")
    result = place.run("render", "s.pov", *SMALL, "+KFF5", "+C")
    assert result.returncode == 0 and "all are rendered again" in result.stderr
    same_as_povray(place, NINE[:5], *SMALL, "+KFF5")
    assert "nothing is left" in place.run("render", "s.pov", *SMALL, "+KFF5", "+C").stdout


@pytest.mark.parametrize("more", [[], ["+GP"]])
def test_what_is_rendered_again_says_its_text_anew(tmp_path: Path, more: List[str]) -> None:
    place = Place(tmp_path, WALK + '#debug concat(str(frame_number, 0, 0), "\\n")\n')
    args = ["render", "s.pov", *SMALL, "+KFF3", "+GDdebug", *more]
    assert place.run(*args).returncode == 0
    (place.path / "s2.ppm").unlink()
    assert place.run(*args, "+C").returncode == 0
    assert (place.path / "debug").read_text() == "1\n2\n3\n" * (1 + len(more))
    for path in place.path.glob("*.ppm"):
        path.unlink()
    assert place.run(*args, "+C").returncode == 0
    assert (place.path / "debug").read_text() == "1\n2\n3\n" * (2 + len(more))


def test_a_render_whose_terminal_is_closed_keeps_what_is_done(tmp_path: Path) -> None:
    place = Place(tmp_path, HANGS)
    master, slave = os.openpty()
    # The terminal that the first process of a session opens is that session's.
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave),
         *POVFARM, "render", "s.pov", "+KFF9", *SMALL], cwd=place.path, env=place.environment,
        start_new_session=True)
    wait_until((place.path / "s1.ppm").exists, "the first frame does not come")
    os.close(slave)
    os.close(master)
    assert process.wait(60) == 130
    assert os.listdir(place.temporary) == [] and "s4.ppm" not in place.names()
    # Whatever was half rendered in that moment may be gone on with.
    assert not [name for name in place.names()
                if not re.fullmatch(r"s\d\.(ppm|pov-state)|s\.pov", name)]
    (place.path / "go").touch()
    assert place.run("render", "s.pov", "+KFF9", "+C", *SMALL).returncode == 0
    assert place.names() == sorted(["go", "s.pov", *(f"s{n}.ppm" for n in range(1, 10))])


def test_a_render_under_nohup_goes_on_without_its_terminal(tmp_path: Path) -> None:
    place = Place(tmp_path, HANGS)
    process = subprocess.Popen(
        ["nohup", *POVFARM, "render", "s.pov", "+KFF5", *SMALL], cwd=place.path,
        env=place.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    wait_until((place.path / "s1.ppm").exists, "the first frame does not come")
    process.send_signal(signal.SIGHUP)
    (place.path / "go").touch()
    process.communicate(timeout=120)
    assert process.returncode == 0 and sorted(times(place)) == NINE[:5]


def test_a_state_is_gone_on_with_by_its_own_frame_only(farm: Place) -> None:
    """Frames in order: those before the one that was stopped are rendered again, from nothing."""
    (farm.path / "s.pov").write_text(SLOW + """#if (frame_number > 1)
        plane { z, 2 pigment { image_map { ppm concat("s", str(frame_number - 1, 0, 0), ".ppm") }
          translate -0.5 scale 6 } finish { ambient 1 diffuse 0 } } #end""")
    worker = farm.start("work", "--cores", "1")
    assert farm.run("submit", "s.pov", *BLOCKS, "+KFF3").returncode == 0

    def begun() -> bool:
        return any(path.stat().st_size > 40_000
                   for path in farm.path.parent.rglob("s2.pov-state"))
    wait_until(begun, "the second frame is not begun")
    worker.send_signal(signal.SIGINT)
    said = lines_of(worker)
    heard(said, "stopping")
    worker.send_signal(signal.SIGINT)
    worker.wait(60)
    assert list(farm.path.parent.rglob("*.state")), "no state was handed in"
    assert farm.run("work", "--until-idle").returncode == 0
    assert farm.run("fetch", "1", "--output", ".").returncode == 0
    same_as_povray(farm, NINE[:3], *BLOCKS, "+KFF3")


def test_a_worker_that_gives_up_says_how_many_frames_are_lost_to_it(farm: Place) -> None:
    worker = farm.start("work", "--cores", "1")
    assert farm.run("submit", "s.pov", *SMALL, "+KFF40").returncode == 0
    said = lines_of(worker)

    def finished() -> List[Path]:
        """What waits for the coordinator."""
        return list(farm.path.parent.rglob("run-*-out-*/*"))
    wait_until(lambda: list(farm.path.parent.rglob("run-*/**/*.pov-state")), "nothing is rendered")
    farm.processes[0].send_signal(signal.SIGSTOP)
    wait_until(finished, "no frame is finished")
    farm.processes[0].kill()
    worker.send_signal(signal.SIGINT)
    heard(said, "finished frames wait")
    worker.send_signal(signal.SIGINT)
    lost = heard(said, "rendered")
    assert re.search(r"; \d+ more did not reach the coordinator and will be rendered again", lost)
    assert worker.wait(60) == 130 and finished() == []
