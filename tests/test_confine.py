"""Renders are confined: a hostile scene touches nothing but its own run's directory.

Every scene here is rendered twice at the same time, free and confined. Only
what succeeds when it is free proves something when it is refused.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest

import povfarm
from helpers.base import ROOT, need, tried
from helpers.farm import SMALL, Farm, environment, project, run
from helpers.pictures import pixels, png
from helpers.runs import HEAD, MARK, make_run
from povfarm import (
    Bounds,
    Engine,
    Launcher,
    landlock_abi,
    make_launcher,
    standard_library,
)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """The launcher of POSIX systems, on a kernel that has Landlock."""
    need("landlock", landlock_abi() > 0, "the kernel has no Landlock")
    launcher = make_launcher()
    assert isinstance(launcher, Launcher)
    yield launcher
    launcher.close()


# --- what the kernel refuses, to a program that tries everything

TRIES = """
import ctypes, fcntl, mmap, os, resource, socket, sys
out, other = sys.argv[1], int(sys.argv[3])
sock = os.path.join(out, "sock")
C = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    got = getattr(C, name)(*arguments)
    if got < 0:
        raise OSError(ctypes.get_errno(), name)
    return got
tries = {
    "a file read": lambda: open(out + "/private"),
    "a file written": lambda: open(out + "/private", "w"),
    "a file appended": lambda: open(out + "/private", "a"),
    "a file cut off": lambda: os.truncate(out + "/private", 1),
    "a file made": lambda: open(out + "/new", "w"),
    "a file made above": lambda: open("../new", "w"),
    "a file opened to everybody": lambda: os.chmod(out + "/private", 0o777),
    "a file dated": lambda: os.utime(out + "/private"),
    "a file moved": lambda: os.rename(out + "/private", out + "/moved"),
    "a file moved here": lambda: os.rename(out + "/other", "other"),
    "a file linked here": lambda: os.link(out + "/more", "more"),
    "a file deleted": lambda: os.unlink(out + "/more"),
    "a directory made": lambda: os.mkdir(out + "/newer"),
    "a directory deleted": lambda: os.rmdir(out + "/empty"),
    "a directory listed": lambda: os.listdir(out),
    "a link here": lambda: os.symlink(out + "/private", "link"),
    "a pipe here": lambda: os.mkfifo("pipe"),
    "a TCP connection": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2]))),
    "a TCP server": lambda: socket.create_server(("127.0.0.1", 0)),
    "a UDP packet": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(
        b"x", ("127.0.0.1", 9)),
    "a unix socket": lambda: socket.socket(socket.AF_UNIX).connect(sock),
    "a process": lambda: os.fork() or os._exit(0),
    "a shell": lambda: os.system("exit 0") and 1 / 0,
    "a signal": lambda: os.kill(int(sys.argv[3]), 0),
    "another program's memory": lambda: open("/proc/%s/mem" % sys.argv[3], "rb"),
    "another program's environment": lambda: open("/proc/%s/environ" % sys.argv[3]),
    "the system's files": lambda: open("/proc/meminfo"),
    "the system's settings": lambda: open("/etc/passwd"),
    "a device": lambda: open("/dev/zero"),
    "a file of another run": lambda: open("../run2/scene", "w"),
    "the project changed": lambda: open("../tree/scene.pov", "w"),
    "memory that no limit counts": lambda: mmap.mmap(-1, 4096),
    "memory as a file": lambda: os.memfd_create("x"),
    "another program's limits": lambda: resource.prlimit(other, resource.RLIMIT_CORE),
    "another program's priority": lambda: os.setpriority(
        os.PRIO_PROCESS, other, os.getpriority(os.PRIO_PROCESS, other)),
    "another program's processors": lambda: os.sched_setaffinity(
        other, os.sched_getaffinity(other)),
    "another program's scheduling": lambda: os.sched_setscheduler(
        other, os.SCHED_OTHER, os.sched_param(0)),
    "signals of a file to another program": lambda: fcntl.fcntl(1, fcntl.F_SETOWN, other),
    "another signal of a file": lambda: fcntl.fcntl(1, 10, 9),
    "a lease of a file": lambda: fcntl.fcntl(os.open("../tree", os.O_RDONLY), 1026, 1),
    "two sockets": lambda: socket.socketpair(),
    "a queue of System V": lambda: call("msgctl", call("msgget", 0, 0o1600), 0, None),
    "memory of System V": lambda: call("shmctl", call("shmget", 0, 4096, 0o1600), 0, None),
    "semaphores of System V": lambda: call("semctl", call("semget", 0, 1, 0o1600), 0, 0),
    "a life after its worker": lambda: call("prctl", 1, 0),
    "looks by other programs": lambda: call("prctl", 4, 1),
    "news of files": lambda: call("inotify_init1", 0),
    "a name space": lambda: call("unshare", 0x200),
}
for name, attempt in tries.items():
    try:
        attempt()
        print("yes", name)
    except (OSError, ZeroDivisionError):
        print("no", name)
allowed = {
    "here": lambda: open("here", "w").write("x"),
    "moved here": lambda: os.rename("here", "there"),
    "deleted here": lambda: os.unlink("there"),
    "project": lambda: open("../tree/scene.pov").read(),
    "itself": lambda: os.kill(os.getpid(), 0),
    "threads": lambda: __import__("threading").Thread(target=print).start(),
    "its own limits": lambda: resource.prlimit(os.getpid(), resource.RLIMIT_CORE),
    "memory": lambda: mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
}
for name, attempt in allowed.items():
    attempt()
print("end", flush=True)
"""


def python_reads() -> Tuple[str, ...]:
    """What a Python needs to start, which may lie in somebody's home."""
    return tuple({sys.prefix, sys.base_prefix, sys.base_exec_prefix})


def attempts(launcher: Launcher, place: Path, confined: bool) -> Dict[str, bool]:
    """Let a program try everything; return what it achieved and what not."""
    for name in ("run", "run2", "tree", "out", "out/empty"):
        (place / name).mkdir(parents=True)
    for name in ("out/private", "out/other", "out/more", "run2/scene", "tree/scene.pov"):
        (place / name).write_text(MARK)
    reads = (*python_reads(), str(place / "tree")) if confined else None
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(
            socket.AF_UNIX) as local:
        local.bind(os.path.relpath(place / "out" / "sock"))  # a long path has no room there
        local.listen()
        argv = [sys.executable, "-I", "-S", "-c", TRIES, str(place / "out"),
                str(server.getsockname()[1]), str(os.getpid())]
        process = launcher.start(argv, place / "run", {"PATH": os.defpath}, Bounds(reads))
        lines = [line for line in process.lines() if line]
    assert lines[-1] == "end", lines
    return {line.partition(" ")[2]: line.startswith("yes ") for line in lines[:-1]}


def test_every_attempt_gets_through_without_confinement(
        launcher: Launcher, tmp_path: Path) -> None:
    """Else the next test would prove nothing."""
    refused = [name for name, done in attempts(launcher, tmp_path, False).items() if not done]
    # Many systems let only a debugger look into another program.
    assert refused in ([], ["another program's memory"])


def test_no_attempt_gets_through_confinement(launcher: Launcher, tmp_path: Path) -> None:
    done = attempts(launcher, tmp_path, True)
    tried("attempts of a confined program", len(done), achieved=sum(done.values()))
    assert len(done) > 45 and [name for name, achieved in done.items() if achieved] == []
    assert (tmp_path / "out" / "private").read_text() == MARK
    assert sorted((tmp_path / "run").iterdir()) == []


# Every number up to those of calls to come, with arguments that are good for nothing.
EVERYTHING = """
import ctypes, sys
C = ctypes.CDLL(None, use_errno=True)
for number in map(int, sys.argv[1:]):
    C.syscall(number, *[ctypes.c_long(-1)] * 6)
    print(number, ctypes.get_errno(), flush=True)
print("end", flush=True)
"""


@pytest.mark.skipif(os.uname().machine not in povfarm._MACHINES, reason="has no filter")
def test_every_system_call_that_is_not_listed_is_refused(
        launcher: Launcher, tmp_path: Path) -> None:
    listed = set(povfarm._calls_of(os.uname().machine).values())
    # 335 and 336, uretprobe and uprobe, a kernel takes past all filters, and ends who calls them.
    others = [number for number in range(600) if number not in listed | {335, 336}]
    # The same call by the other numbers of x86-64.
    others += [1 << 30 | number for number in (0, 1, 41)]
    argv = [sys.executable, "-I", "-S", "-c", EVERYTHING, *map(str, others)]
    lines = list(launcher.start(argv, tmp_path, {}, Bounds(python_reads())).lines())
    assert lines[-1:] == ["end"], lines[-3:]
    answers = dict(map(int, line.split()) for line in lines[:-1])
    got_in = [number for number, error in answers.items()
              if error != (errno.ENOSYS if 435 <= number < 1 << 30 else errno.EACCES)]
    tried("system calls that are not listed", len(answers), let_in=len(got_in))
    assert len(answers) > 400 and got_in == []


def run_filter(code: bytes, machine: int, number: int, arguments: Sequence[int] = ()) -> int:
    """Return what a filter answers, as the kernel would read it (seccomp(2), bpf(4))."""
    data = struct.pack("=IIQ6Q", number, machine, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    lines, at, register = list(struct.iter_unpack("=HBBI", code)), 0, 0
    while True:
        (operation, yes, no, value), at = lines[at], at + 1
        if operation == 0x20:
            register, = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            register &= value
        elif operation == 0x06:
            return int(value)
        else:
            true = {0x15: register == value, 0x35: register >= value,
                    0x45: bool(register & value)}[operation]
            at += yes if true else no


ALLOWED, REFUSED, MISSING = 0x7FFF0000, 0x50000 | errno.EACCES, 0x50000 | errno.ENOSYS
ITSELF = povfarm._ITSELF
ARGUMENTS = [  # those of a call that are let through, and those that are not
    ("clone", [(0x10F00,)], [(17,), (0x4111,)]),
    ("kill", [(ITSELF, 9)], [(1, 9), (0,), ((1 << 32) - 1,)]),
    ("tgkill", [(ITSELF, 5, 6)], [(1, 1, 9)]),
    ("prlimit64", [(0, 7), (ITSELF, 7)], [(1, 7)]),
    ("prctl", [(15,), (16,)], [(1,), (4,), (22,), (38,)]),
    ("fcntl", [(3, 2), (3, 1030), (3, 6)], [(3, 8), (3, 10), (3, 15), (3, 1024), (3, 1026)]),
    ("ioctl", [(1, 0x5401), (1, 0x5413)], [(1, 0x5412), (1, 0x541C), (1, 0x8901)]),
    ("mmap", [(0, 1, 3, 0x22), (0, 1, 3, 2), (0, 1, 1, 1)],
     [(0, 1, 3, 0x21), (0, 1, 3, 0x23), (0, 1, 3, 0x10021)]),
]


@pytest.mark.parametrize("machine", povfarm._MACHINES)
def test_the_filter_allows_what_is_listed_on_each_machine(machine: str) -> None:
    audit, calls = povfarm._MACHINES[machine][0], povfarm._calls_of(machine)
    code = povfarm._filter(audit, calls)
    looked_at = {name for name, _, _ in ARGUMENTS}
    assert looked_at == set(povfarm._TESTS) and len(set(calls.values())) == len(calls)
    for name, good, bad in ARGUMENTS:
        assert {run_filter(code, audit, calls[name], each) for each in good} == {ALLOWED}, name
        assert {run_filter(code, audit, calls[name], each) for each in bad} == {REFUSED}, name
    for number in range(600):
        if number not in {calls[name] for name in looked_at}:
            expected = (ALLOWED if number in calls.values() else
                        MISSING if number >= 435 else REFUSED)
            assert run_filter(code, audit, number) == expected
    assert run_filter(code, audit, 1 << 30 | calls["read"]) == REFUSED
    assert run_filter(code, 0x40000003, calls["read"]) == REFUSED  # 32 bits


def test_a_render_that_the_kernel_does_not_confine_is_not_started(
        launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "_OF_ABI", (1 << 60,) * 6)  # rights that no kernel knows
    own = make_launcher()
    try:
        process = own.start([sys.executable, "-c", "open('here', 'w')"], tmp_path, {}, Bounds(()))
        text = "".join(process.lines())
        assert "cannot start" in text and process.wait().code == 127
    finally:
        own.close()
    assert not (tmp_path / "here").exists()


def test_nothing_is_inherited(launcher: Launcher, tmp_path: Path) -> None:
    """Neither by the launcher from this process nor by a renderer from the launcher."""
    code = ("import os; print([n for n in range(256) if os.path.exists(f'/proc/self/fd/{n}')"
            "], oct(os.umask(0)), sorted(os.environ))")
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        own = make_launcher()
        try:
            starts = [own.start([sys.executable, "-I", "-S", "-c", code], tmp_path,
                                {"LC_ALL": "C.UTF-8"}) for _ in range(5)]
            lines = [line for process in starts for line in process.lines()]
        finally:
            own.close()
    assert lines == ["[0, 1, 2] 0o77 ['LC_ALL']"] * 5


# --- what a hostile scene can try

class Evil(NamedTuple):
    """A scene or an option that wants something; ``says`` is what POV-Ray then tells."""

    scene: str
    says: str
    values: Tuple[Tuple[str, str], ...] = ()


# OUT is a private directory, TREE the project's, RUN2 another run's.
PHOTONS = """global_settings { photons { spacing 0.5 %s "OUT/%s.ph" } }
sphere { 0, 1 photons { target reflection on } finish { reflection 1 } }"""
WRITE = '#fopen F "%s" write #write (F, "x")'
READ = '#fopen F "%s" read #read (F, S) #debug concat(S, "\\n")'
EVIL = {
    "write": Evil(WRITE % "OUT/evil.txt", "Cannot open user file"),
    "write above": Evil(WRITE % "../evil.txt", "Cannot open user file"),
    "write over": Evil(WRITE % "OUT/words.inc", "Cannot open user file"),
    "append": Evil('#fopen F "OUT/words.inc" append #write (F, "x")', "Cannot open user file"),
    "write to another run": Evil(WRITE % "RUN2/scene.pov", "Cannot open user file"),
    "write to the project": Evil(WRITE % "TREE/own.inc", "Cannot open user file"),
    "write to the project by our link": Evil(WRITE % "_povfarm0/own.inc", "Cannot open user file"),
    "write by a link in the project":
        Evil(WRITE % "_povfarm0/link/evil.txt", "Cannot open user file"),
    # Of the next two POV-Ray says nothing: it goes on without.
    "write photons": Evil(PHOTONS % ("save_file", "evil"), ""),
    "write radiosity": Evil("global_settings { radiosity {} }", "", (
        ("Radiosity_File_Name", "OUT/evil.rca"), ("Radiosity_To_File", "On"))),
    "read": Evil(READ % "OUT/words.txt", "Cannot open user file"),
    "read above": Evil(READ % "../out/words.txt", "Cannot open user file"),
    "read another run's": Evil('#include "RUN2/scene.pov"', "Cannot open include file"),
    "include": Evil('#include "OUT/words.inc"', "Cannot open include file"),
    "include by a link in the project":
        Evil('#include "link/words.inc"', "Cannot open include file"),
    "include as a header": Evil("", "Cannot open include header file", (
        ("Include_Header", "OUT/words.inc"),)),
    "another scene": Evil("", "Cannot open input file", (
        ("Input_File_Name", "OUT/words.inc"),)),
    "picture": Evil('plane { z, 0 pigment { image_map { png "OUT/map.png" } } }',
                    "Cannot open file"),
    "heights": Evil('height_field { png "OUT/map.png" }', "Cannot open file"),
    "density": Evil('plane { z, 0 pigment { density_file df3 "OUT/cloud.df3" color_map {'
                    "[0 rgb 0] [1 rgb 1] } } }", "Cannot read media density file"),
    "font": Evil('text { ttf "OUT/font.ttf" "a" 1, 0 }', "Cannot open font file"),
    "photons": Evil(PHOTONS % ("load_file", "map"), "Could not load photon map"),
}


class Verdict(NamedTuple):
    """How a scene ended: exit code, POV-Ray's text, and what it changed outside of its run."""

    code: int
    text: str
    changed: List[str]


def run_scene(launcher: Launcher, place: Path, evil: Evil, confined: bool,
              photons: bytes) -> Verdict:
    """Render a hostile scene as a worker would, in a world of its own."""
    for name in ("run", "run2", "out", "tree"):
        (place / name).mkdir(parents=True)
    names = {"OUT": place / "out", "TREE": place / "tree", "RUN2": place / "run2"}
    scene, values = evil.scene, dict(evil.values)
    for word, path in names.items():
        scene = scene.replace(word, str(path))
        values = {key: value.replace(word, str(path)) for key, value in values.items()}
    words = f'#debug "{MARK}\\n"'
    for name, text in (("tree/scene.pov", HEAD + scene), ("tree/own.inc", ""),
                       ("out/words.inc", words), ("run2/scene.pov", words),
                       ("out/words.txt", f'"{MARK}"')):
        (place / name).write_text(text)
    shutil.copyfile(Path(standard_library()[-1]) / "timrom.ttf", place / "out" / "font.ttf")
    (place / "out" / "map.png").write_bytes(png(7, 2, 2))
    (place / "out" / "map.ph").write_bytes(photons)
    (place / "out" / "cloud.df3").write_bytes(struct.pack(">3H", 2, 2, 2) + bytes(range(8)))
    (place / "tree" / "link").symlink_to(place / "out")
    before = snapshot(place)
    run = make_run(place, (1,), Final_Frame="1", **values)
    command = Engine(shutil.which("povray") or "", "3.7", standard_library()).command(run)
    for path, text in command.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path, target in command.links.items():
        path.symlink_to(target)
    process = launcher.start(command.argv, run.place, command.environment,
                             Bounds((str(run.tree), *command.reads) if confined else None))
    text = "\n".join(process.lines())
    code = process.wait().code
    after = snapshot(place)
    return Verdict(code, text, sorted(name for name in {**before, **after}
                                      if before.get(name) != after.get(name)))


def snapshot(place: Path) -> Dict[str, bytes]:
    """Return every file that is not the run's own."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*")
            if path.is_file() and "run" not in path.relative_to(place).parts}


@pytest.fixture(scope="module")
def verdicts(povray: str, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
             ) -> Dict[Tuple[str, bool], Verdict]:
    """How every scene ended, free (False) and confined (True); POV-Ray mostly sleeps."""
    place = tmp_path_factory.mktemp("evil")
    run_scene(launcher, place / "free", EVIL["write photons"], False, b"")
    photons = (place / "free" / "out" / "evil.ph").read_bytes()
    with ThreadPoolExecutor(16) as pool:
        ends = {(name, confined): pool.submit(
            run_scene, launcher, place / f"{number}-{confined}", evil, confined, photons)
            for number, (name, evil) in enumerate(EVIL.items()) for confined in (False, True)}
    return {key: end.result() for key, end in ends.items()}


@pytest.mark.parametrize("name", EVIL)
def test_a_hostile_scene_achieves_nothing(
        name: str, verdicts: Dict[Tuple[str, bool], Verdict]) -> None:
    free, confined = verdicts[name, False], verdicts[name, True]
    assert free.code == 0 and bool(free.changed) == name.startswith(("write", "append"))
    assert (MARK in free.text) == name.startswith(("read", "include", "another"))
    tried("hostile scenes", achieved=bool(confined.changed or MARK in confined.text))
    assert confined.changed == [] and MARK not in confined.text
    if EVIL[name].says:
        assert EVIL[name].says in confined.text and confined.code == 1


# --- limits

def test_a_file_that_grows_without_end_is_ended(
        povray: str, launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "s.pov").write_text('#fopen F "f.txt" write #while (1) #write (F, "0123456789") #end')
    process = launcher.start(
        (povray, "s.pov", "-D"), tmp_path, {"HOME": str(tmp_path)}, Bounds((), 0, 2_000_000))
    timer = threading.Timer(30, process.kill)
    timer.start()
    list(process.lines())
    timer.cancel()
    assert process.wait().code == -signal.SIGXFSZ
    assert (tmp_path / "f.txt").stat().st_size == 2_000_000


def test_a_big_picture_keeps_its_pixels_in_the_runs_own_directory(
        povray: str, launcher: Launcher, tmp_path: Path) -> None:
    """POV-Ray puts those that do not fit into Max_Image_Buffer_Memory into a file."""
    evil = Evil("", "", (("Max_Image_Buffer_Memory", "1"), ("Width", "600"), ("Height", "400")))
    free, confined = (run_scene(launcher, tmp_path / str(number), evil, bool(number), b"")
                      for number in range(2))
    assert free.code == confined.code == 0
    assert "configuration file" not in free.text + confined.text  # the run has its own
    one, other = (sorted(tmp_path.glob(f"{number}/run/*.png")) for number in range(2))
    assert [pixels(path) for path in one] == [pixels(path) for path in other] != []


def test_povray_itself_is_told_to_start_no_programs(
        povray: str, launcher: Launcher, tmp_path: Path) -> None:
    """Should a command ever get into an INI file: unconfined, so that nothing else refuses it."""
    for name in ("run", "tree"):
        (tmp_path / name).mkdir()
    (tmp_path / "tree" / "scene.pov").write_text(HEAD)
    run = make_run(tmp_path, (1,), Final_Frame="1")
    command = Engine(povray, "3.7", standard_library()).command(run)
    for path, text in command.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + ("Pre_Scene_Command=touch x\n" if path.suffix == ".ini" else ""))
    for path, target in command.links.items():
        path.symlink_to(target)
    process = launcher.start(command.argv, run.place, command.environment, Bounds(None))
    assert "shellout" in "\n".join(process.lines()).lower()
    assert process.wait().code == 0 and not (run.place / "x").exists()


# --- a whole farm

READ_PRIVATE = HEAD + '''#declare Name = concat("%s/pri", "vate.inc");
#include Name
'''
# POV-Ray tells of the first that memory is at its end, of the second nothing.
EAT_WORDS = HEAD + '#declare S = "word"; #while (1) #declare S = concat(S, S); #end'
EAT_SPHERES = HEAD + "union { #while (1) sphere { 0, 1 } #end }"


def test_render_says_what_a_hostile_scene_may_not(povray: str, tmp_path: Path) -> None:
    (tmp_path / ".private").mkdir()
    (tmp_path / ".private" / "private.inc").write_text(f'#debug "{MARK}\\n"')
    place = project(tmp_path, READ_PRIVATE % (tmp_path / ".private"))
    free = run(tmp_path, "render", "scene.pov", *SMALL, "--unconfined", cwd=place)
    assert free.returncode == 0 and (place / "scene.png").exists()
    (place / "scene.png").unlink()
    confined = run(tmp_path, "render", "scene.pov", *SMALL, cwd=place)
    assert confined.returncode == 1 and "/.private/" in confined.stderr
    assert MARK not in confined.stderr and not (place / "scene.png").exists()


def test_a_worker_outlives_hostile_scenes(povray: str, tmp_path: Path) -> None:
    (tmp_path / "private.inc").write_text(f'#debug "{MARK}\\n"')
    farm = Farm(tmp_path)
    try:
        farm.work("--cores", "1", "--memory", "100M")
        place = project(tmp_path, READ_PRIVATE % tmp_path)
        scenes = {"scene": "", "words": EAT_WORDS, "spheres": EAT_SPHERES, "good": HEAD}
        for name, text in scenes.items():
            if text:
                (place / f"{name}.pov").write_text(text)
        jobs = [farm.submit(place, f"{name}.pov", *SMALL, "--retries", "1") for name in scenes]
        assert farm.finished(jobs.pop())["state"] == "done"
        for job in jobs:
            assert farm.finished(job)["state"] == "failed"
            tried("hostile scenes in a real farm")
        for job in jobs[1:]:
            assert "needed more than 100 MB of memory" in json.dumps(farm.job(job))
        read = run(tmp_path, "logs", str(jobs[0]), "0", cwd=tmp_path).stdout
        assert "private.inc" in read and MARK not in read
        farm.check()
    finally:
        farm.close()


# --- what this computer can

def test_doctor_tries_it(launcher: Launcher, povray: str, capsys: pytest.CaptureFixture[str],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    def confinement() -> Dict[str, Any]:
        povfarm.main(["doctor", "--json"])
        checks = json.loads(capsys.readouterr().out)
        return {check["check"]: check for check in checks}["confinement"]

    check = confinement()
    assert check["good"] and f"Landlock {landlock_abi()}" in check["text"]
    monkeypatch.setattr(povfarm, "landlock_abi", int)  # a kernel that has none
    check = confinement()
    assert not check["good"] and "a scene can read your files, write your files" in check["text"]

PATCHED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import povfarm
exec(sys.argv.pop(1))
sys.exit(povfarm.main())
"""


def patched(tmp_path: Path, patch: str, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in another user's data directory, on a computer that is different."""
    return subprocess.run(
        [sys.executable, "-c", PATCHED, str(ROOT), patch, *args], text=True, capture_output=True,
        env={**environment(tmp_path), "POVFARM_DATA": str(tmp_path / "guest")}, timeout=60,
        check=False, cwd=tmp_path)


def test_a_renderer_that_cannot_be_started_is_told_in_its_own_words(
        povray: str, tmp_path: Path) -> None:
    patch = "povfarm.Engine.parts = lambda engine: (chr(0),)"
    (tmp_path / "scene.pov").write_text(HEAD)
    result = patched(tmp_path, patch, "render", "scene.pov", *SMALL)
    assert result.returncode == 1 and f"cannot start {povray}: " in result.stderr


def test_many_files_do_not_fill_the_disk(povray: str, tmp_path: Path) -> None:
    """Each is small; the worker's disk has 8 MB left of 10 that shall stay free."""
    patch = """from collections import namedtuple
povfarm.DISK_RESERVE, Disk = 10**7, namedtuple("Disk", "total used free")
povfarm.shutil.disk_usage = lambda path: Disk(
    0, 0, 8 * 10**6 if path.name == "cache" else 10**12)"""
    (tmp_path / "many.pov").write_text(HEAD + """#declare N = 0; #declare S = "0123456789";
        #declare I = 0; #while (I < 14) #declare S = concat(S, S); #declare I = I + 1; #end
        #while (1) #fopen F concat("f", str(N, 0, 0)) write #write (F, S) #fclose F
        #declare N = N + 1; #end""")
    result = patched(tmp_path, patch, "render", "many.pov", *SMALL, "--retries", "1")
    assert result.returncode == 1 and "filled the disk" in result.stderr


def work_without_landlock(tmp_path: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run a worker as on a system without Landlock."""
    return patched(tmp_path, "povfarm.landlock_abi = lambda: 0", "work", "--until-idle", *args)


def test_without_a_key_nothing_is_rendered_unconfined(povray: str, tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    try:
        server = ("--server", f"http://127.0.0.1:{farm.port}")
        refused = work_without_landlock(tmp_path, *server)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert "--key" in refused.stderr and "--unconfined" in refused.stderr
        key = (tmp_path / "farm" / "farm.key").read_text()
        known = work_without_landlock(tmp_path, *server, "--key", key)
        assert known.returncode == 0 and "no Landlock" in known.stderr
        assert ("this worker runs as root" in known.stderr) is (os.geteuid() == 0)
        told = work_without_landlock(tmp_path, *server, "--key", key, "--unconfined")
        assert told.returncode == 0 and "--unconfined was given" in told.stderr
    finally:
        farm.close()
