"""A render on one computer reads what its person can read, and writes where POV-Ray would."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, List

import pytest

from helpers.base import POVFARM, need, run_povray, wait_until
from helpers.farm import SMALL, environment
from helpers.pictures import pixels
from helpers.runs import HEAD, MARK
from povfarm import all_but, landlock_abi

READ = '#fopen F %s read #read (F, S) #debug concat(S, "\\n")\n'
WRITE = '#fopen F %s write #write (F, "new") #fclose F\n'


def render(tmp_path: Path, cwd: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Render the scene in a directory for somebody whose home is tmp_path/home."""
    return subprocess.run(
        [*POVFARM, "render", *SMALL, *args], cwd=cwd, text=True, capture_output=True, check=False,
        env={**environment(tmp_path), "HOME": str(tmp_path / "home")}, timeout=300)


@pytest.fixture
def home(povray: str, tmp_path: Path) -> Path:
    """A home with secrets, fonts and a project in it."""
    need("landlock", landlock_abi() > 0, "the kernel has no Landlock")
    home = tmp_path / "home"
    for folder in (".ssh", ".fonts", ".cache/here", "work", "lib", "farm"):
        (home / folder).mkdir(parents=True)
    for name in (".ssh/id", ".netrc", ".fonts/words", ".cache/here/words", "work/words", "words",
                 "lib/words", "farm/farm.key"):
        (home / name).write_text(f'"{MARK}"')
    (home / "work" / "link").symlink_to(home / ".ssh")
    return home


def reads(tmp_path: Path, cwd: Path, name: str, *args: str) -> bool:
    """Tell whether a scene in a directory gets the contents of a file."""
    expression = f'concat("{name[:3]}", "{name[3:]}")'  # no name that povfarm sees
    (cwd / "scene.pov").write_text(HEAD + READ % expression + "\n#if (strcmp(S, \"" + MARK + "\")) "
                                   '#error "other words" #end')
    result = render(tmp_path, cwd, "scene.pov", "--data", str(tmp_path / "home" / "farm"), *args)
    assert result.returncode == 0 or "Cannot open" in result.stderr, result.stderr
    return result.returncode == 0


@pytest.mark.parametrize("name", [
    "../.ssh/id", "link/id", "HOME/.ssh/id", "../.netrc", "HOME/farm/farm.key",
    "/proc/self/cwd/words", "../.cache/here/words"])
def test_secrets_of_a_home_are_not_read(home: Path, tmp_path: Path, name: str) -> None:
    name = name.replace("HOME", str(home))
    assert not reads(tmp_path, home / "work", name)
    if not name.startswith("/proc"):
        assert reads(tmp_path, home / "work", name, "--unconfined")


@pytest.mark.parametrize("name", [
    "words", "../words", "../lib/words", "HOME/lib/words", "HOME/.fonts/words"])
def test_everything_else_is_read_where_it_is(home: Path, tmp_path: Path, name: str) -> None:
    assert reads(tmp_path, home / "work", name.replace("HOME", str(home)))


def test_who_stands_in_a_hidden_place_or_names_it_has_opened_it(
        home: Path, tmp_path: Path) -> None:
    assert reads(tmp_path, home / ".cache" / "here", "words")
    (home / "work" / "words").unlink()
    assert reads(tmp_path, home / "work", "words", f"+L{home}/.cache/here")
    # A home itself is not hidden, so standing there opens nothing in it.
    assert not reads(tmp_path, home, ".ssh/id")


def test_what_is_not_hidden_is_named_along_the_way(tmp_path: Path) -> None:
    for name in ("a/secret/x", "a/b", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "way").symlink_to(tmp_path / "a" / "secret")
    assert all_but({tmp_path / "a" / "secret"}, tmp_path) == [
        str(tmp_path / "a" / "b"), str(tmp_path / "c")]


@pytest.mark.parametrize("name", [
    "new.txt", "../beside/new.txt", ".cache", "sub/.x/new.inc", "pov7", "povfarm.txt",
    "other.pov-state", "povfarm.ini"])
def test_a_scene_writes_where_povray_does(povray: str, tmp_path: Path, name: str) -> None:
    """With the rights that a new file has, not with those of a renderer."""
    for place in ("plain", "home/farm"):
        for folder in ("project/sub/.x", "beside"):
            (tmp_path / place / folder).mkdir(parents=True)
        (tmp_path / place / "project" / "scene.pov").write_text(
            HEAD + f'#declare N = "{name}";\n' + WRITE % "N")
    assert run_povray(["scene.pov", *SMALL], tmp_path / "plain" / "project").returncode == 0
    result = render(tmp_path, tmp_path / "home/farm/project", "scene.pov")
    assert result.returncode == 0, result.stderr
    for file in (name, "scene.png"):
        plain, ours = (tmp_path / place / "project" / file for place in ("plain", "home/farm"))
        assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert ours.parent.joinpath(name).read_bytes() == plain.parent.joinpath(name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("scene", "name"), [
    ("scene.pov", "povfarm.ini"), ("tür.pov", "scene.pov"), ("scene.pov", ".povray/3.7/povray.conf")])
def test_a_scene_reads_its_own_files_whatever_they_are_called(
        povray: str, tmp_path: Path, scene: str, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f'#declare S = "{MARK}";')
    (tmp_path / scene).write_text(HEAD + f'#include "{name}"\n#debug concat(S, "\\n")\n')
    result = render(tmp_path, tmp_path, scene)
    assert result.returncode == 0 and MARK in result.stderr, result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(povray: str, tmp_path: Path, closed: str) -> None:
    (tmp_path / "scene.pov").write_text(HEAD)
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *POVFARM, "render", *SMALL, "scene.pov"],
        cwd=tmp_path, env=environment(tmp_path), timeout=300, capture_output=True, check=False)
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert (tmp_path / "scene.png").is_file()


@pytest.mark.slow
def test_a_current_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    result = subprocess.run(
        ["sh", "-c", 'cd gone; rmdir ../gone; exec "$@"', "sh", *POVFARM, "render", "x.pov"],
        cwd=tmp_path, env=environment(tmp_path), timeout=300, capture_output=True, text=True,
        check=False)
    assert result.returncode == 2 and "povfarm: the current directory was deleted" in result.stderr


@pytest.mark.parametrize("how", ["write", "append"])
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_that_is_there_keeps_its_rights(
        povray: str, tmp_path: Path, how: str, mode: int) -> None:
    """One that may only be read cannot be written, but by root."""
    ends = []
    for place in ("plain", "ours"):
        work = tmp_path / "home" / place
        work.mkdir(parents=True)
        (work / "log.txt").write_text("old")
        (work / "log.txt").chmod(mode)
        (work / "scene.pov").write_text(
            f'{HEAD}#fopen F "log.txt" {how} #write (F, "new") #fclose F')
        result = (run_povray(["scene.pov", *SMALL], work) if place == "plain"
                  else render(tmp_path, work, "scene.pov"))
        left = work / "log.txt"
        ends.append((result.returncode, left.read_bytes(), stat.S_IMODE(left.stat().st_mode)))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", [
    "set.ini", ".old", "program", "../.profile", "../new.txt", "link/id"])
def test_a_scene_replaces_nothing_that_is_more_than_a_file(
        home: Path, tmp_path: Path, name: str) -> None:
    work = home / "work"
    for old in ("set.ini", ".old", "program"):
        (work / old).write_text("old")
    (work / "program").chmod(0o755)
    (home / ".profile").write_text("old")
    (work / "scene.pov").write_text(HEAD + f'#declare N = "{name}";\n' + WRITE % "N")
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    result = render(tmp_path, work, "scene.pov")
    assert os.path.relpath((work / name).resolve(), work) in result.stderr, result.stderr
    after = {path: path.read_bytes() for path in home.rglob("*")
             if path.is_file() and path.suffix != ".png"}
    assert after == before


def test_a_render_writes_nothing_outside(home: Path, tmp_path: Path) -> None:
    (home / "work" / "scene.pov").write_text(HEAD + WRITE % f'"{home}/lib/words"')
    result = render(tmp_path, home / "work", "scene.pov")
    assert result.returncode == 2 and "--unconfined" in result.stderr
    (home / "work" / "scene.pov").write_text(HEAD + WRITE % f'concat("{home}", "/lib/words")')
    result = render(tmp_path, home / "work", "scene.pov")
    assert result.returncode == 1 and "Cannot open user file" in result.stderr
    assert (home / "lib" / "words").read_text() == f'"{MARK}"'


def test_files_that_povray_finds_under_garbled_names_only_are_found(
        povray: str, examples: Path, tmp_path: Path) -> None:
    work = tmp_path / "home" / "wörk"
    (work / "bäume").mkdir(parents=True)
    shutil.copyfile(next(Path("/usr/share/povray-3.7/include").glob("test.png")),
                    work / "bäume" / "grün.png")
    image = 'plane { z, 0 pigment { image_map { png "%s" } } }'
    for charset in ("utf-8", "latin-1"):
        (work / "scene.pov").write_bytes((HEAD + image % "bäume/grün.png").encode(charset))
        result = render(tmp_path, work, "scene.pov", "+FP")
        assert result.returncode == 0, result.stderr
        (work / "scene.pov").write_text(HEAD + image % "test.png")
        assert run_povray(["scene.pov", "+Oplain.ppm", "+FP", *SMALL], work).returncode == 0
        assert pixels(work / "scene.ppm") == pixels(work / "plain.ppm")


def test_a_scene_that_povray_cannot_open_for_its_name_is_rendered(
        povray: str, tmp_path: Path) -> None:
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    (work / "größe.pov").write_text(HEAD)
    result = render(tmp_path, work, "größe.pov")
    assert result.returncode == 0 and (work / "größe.png").is_file(), result.stderr
    assert os.listdir(work) == ["größe.pov", "größe.png"] or len(os.listdir(work)) == 2


@pytest.mark.parametrize(("scene", "says"), [
    ('#include "Gone.inc"', "mind capital and small letters"),
    ('#include "beside.inc"', "+L"),
    ('#include concat("../.ssh/", "id")', "hidden from scenes")])
def test_a_file_that_is_missed_is_looked_for(
        home: Path, tmp_path: Path, scene: str, says: str) -> None:
    """POV-Ray's own words come first."""
    (home / "work" / "gone.inc").touch()
    (home / "work" / "scene.pov").write_text(HEAD + scene)
    result = render(tmp_path, home / "work", "scene.pov")
    assert result.returncode == 1
    line = next(line for line in result.stderr.splitlines() if line.startswith("povfarm: "))
    assert "Cannot open include file" in line.partition(";")[0] and says in line


def while_it_renders(tmp_path: Path, scene: str, do: Callable[[], object],
                     *args: str) -> "subprocess.CompletedProcess[str]":
    """Render a scene, and do something when POV-Ray has begun with it."""
    (tmp_path / "home").mkdir()
    for name in ("begun", "go"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "scene.pov").write_text(
        f'{HEAD}#if (file_exists("begun") & file_exists("go")) #end\n{scene}')
    held: List[int] = []  # POV-Ray opens them more than once

    def opened(name: str) -> bool:
        """Tell whether the render has ended, or POV-Ray waits for somebody to write into a pipe."""
        with contextlib.suppress(OSError):
            held.append(os.open(tmp_path / name, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return made.done()

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(render, tmp_path, tmp_path, "scene.pov", *args)
        wait_until(lambda: opened("begun"), "POV-Ray does not begin")
        do()
        wait_until(lambda: opened("go"), "POV-Ray does not go on")
        result = made.result()
    for descriptor in held:
        os.close(descriptor)
    return result


def meanwhile(tmp_path: Path, scene: str, name: str, *args: str) -> str:
    """Render while another program writes a line to the end of a file; return what is in it."""

    def add() -> None:
        with open(tmp_path / name, "a") as file:
            file.write("theirs\n")

    result = while_it_renders(tmp_path, scene, add, *args)
    assert result.returncode == 0, result.stderr
    return (tmp_path / name).read_text()


APPEND = '#fopen F %s append #write (F, "ours\\n") #fclose F\n'


@pytest.mark.parametrize(("name", "there"), [
    ('"log.txt"', True), ('"log.txt"', False), ('concat("lo", "g.txt")', False)])
def test_what_others_append_meanwhile_stays(
        povray: str, tmp_path: Path, name: str, there: bool) -> None:
    if there:
        (tmp_path / "log.txt").write_text("old\n")
        os.link(tmp_path / "log.txt", tmp_path / "same.txt")
    assert meanwhile(tmp_path, APPEND % name, "log.txt") == "old\n" * there + "theirs\nours\n"
    assert not there or (tmp_path / "same.txt").read_text() == "old\ntheirs\nours\n"


def test_text_files_go_on_behind_what_others_append_meanwhile(povray: str, tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("old\n")
    text = meanwhile(tmp_path, '#debug "ours\\n"', "said.txt", "+GDsaid.txt", "+GP")
    assert text == "old\ntheirs\nours\n"


def test_a_file_that_a_scene_writes_anew_keeps_its_other_name(povray: str, tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_text("old")
    os.link(tmp_path / "n.txt", tmp_path / "same.txt")
    (tmp_path / "home").mkdir()
    (tmp_path / "scene.pov").write_text(HEAD + WRITE % '"n.txt"')
    assert render(tmp_path, tmp_path, "scene.pov").returncode == 0
    assert (tmp_path / "same.txt").read_text() == "new"


def test_a_file_that_cannot_be_written_does_not_hold_up_the_others(
        povray: str, tmp_path: Path) -> None:
    names, sub = ("a.txt", "sub/b.txt", "loop", "z.txt"), tmp_path / "sub"
    sub.mkdir()
    (tmp_path / "loop").symlink_to("loop")

    def replace() -> None:
        sub.rmdir()
        sub.write_text("a file now")

    result = while_it_renders(tmp_path, "".join(WRITE % f'"{name}"' for name in names), replace)
    assert result.returncode == 1, result.stderr
    assert all(f"{path} cannot be written" in result.stderr
               for path in (sub / "b.txt", tmp_path / "loop"))
    assert [(tmp_path / name).is_file() for name in names] == [True, False, False, True]
    assert (tmp_path / "scene.png").is_file()
