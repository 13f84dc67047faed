"""What strangers send costs little: readers that take time by the length of a text, bounds, words."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import itertools
import json
import os
import sys
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest

import povfarm
from helpers import farm as whole_farm
from helpers.base import POVFARM, wait_until
from helpers.farm import run
from helpers.farm_in_a_box import KEY, SCENE, FakeClock, Farm, farm_fixture, manifest, pov_job
from helpers.trust import join_by
from povfarm import BodyReader, FarmError, Request, Response, Shares, UserError

__all__ = ["farm_fixture"]

# --- time by the length, whatever is in a text

WIDE = "x" * 80
# What a text is made of that a reader with second thoughts goes over again and again.
UNITS = ["a", " ", "\n", "\r", " \n", "\n\r ", '"', '\\"', "#", "# ", "(", "Rendered ", "Rendered (",
         "pretrace: (1", "Rendered (1%", f"{WIDE}\n", f"{WIDE}\n  ", "File '", "File 'a' line 1", "1",
         "Information Output Options\n", "Render Options\n x\n", "-" * 70 + "\n", "==== [x] =",
         "Library_Path=", "a=", "+I", ";", "[", "]", "* , ", ",", "png ", "#version 1", "/*",
         "FORMAT=32-bit_rle_rgbe\n", "# \n", "1 ", "povfarm1/", "Declare=a=1 ", "\"a\" 'b"]


def fed(text: str, end: str) -> None:
    said = povfarm.PovText()
    for line in text.split("\n"):
        said.feed(line + end)
    said.error()


def asked(text: str) -> None:
    here = Path(povfarm.__file__)
    povfarm.file_response(here, "text/plain", Request(
        "GET", "/", headers={"if-none-match": "x" + text + "x"}), "etag").close()


READERS: Dict[str, Callable[[str], object]] = {
    "a scene's words": lambda text: list(povfarm._events(text)),
    "a scene's version": lambda text: povfarm._VERSION.search(f"#version {text}"),
    "what writes": lambda text: povfarm._WRITES.search(text.encode()),
    "an INI file": lambda text: povfarm._CommandLine(Path(), "3.7").read_text(
        povfarm._Text(text, "a.ini")),
    "an argument": lambda text: povfarm._CommandLine(Path(), "3.7").read_text(
        povfarm._Text(text, "")),
    "messages": povfarm.messages_of,
    "remarks": lambda text: povfarm.remarks_in(f"Render Options\n{text}"),
    "what POV-Ray prints": lambda text: fed(text, ""),
    "status lines": lambda text: fed(text, "\r"),
    "a PPM's head": lambda text: povfarm._TEXT_HEADERS["PPM"].match(b"P6" + text.encode()),
    "an HDR's head": lambda text: povfarm._TEXT_HEADERS["HDR"].match(
        b"#?RADIANCE\n" + text.encode()),
    "an EXR's channels": lambda text: povfarm._exr_channels(text.encode()),
    "tags of a cache": asked,
    "a field": lambda text: povfarm._FIELD.fullmatch(f"a:{text}"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_text_takes_no_longer_than_its_length(name: str) -> None:
    def seconds(unit: str, size: int) -> float:
        text = unit * (size // len(unit))
        start = time.process_time()
        try:
            READERS[name](text)
        except povfarm.FarmError:
            pass
        return time.process_time() - start

    slow: List[str] = []
    for unit in UNITS:
        if seconds(unit, 16_000) > 25 * max(seconds(unit, 1600), 0.002) and (
                seconds(unit, 32_000) > 50 * max(seconds(unit, 1600), 0.002)):  # not by chance
            slow.append(unit)
    assert not slow


def collect(place: Path, scene: str) -> float:
    (place / "s.pov").write_text(scene)
    start = time.process_time()
    povfarm.collect_project("s.pov", [], place, None, ["s.png"], [1], [])
    return time.process_time() - start


MANY = "#declare A = array[900] {" + ",".join(f'"{number}"' for number in range(900)) + "}\n"
NAMES = {
    "each may be many": (MANY, '#fopen F concat(A, "%s") write\n'),
    "each may meet many": (MANY, '#fopen F "%s" write #fopen G concat("%s", A) read\n'),
    "from one to the next": ("", "#fopen F a%s write #declare a%s = a0;\n"),
}


@pytest.mark.parametrize("what", NAMES)
def test_names_that_are_worked_out_take_no_longer_than_their_number(
        what: str, tmp_path: Path) -> None:
    head, line = NAMES[what]
    few, many = (collect(tmp_path, head + "".join(
        line.replace("%s", str(number)) for number in range(count))) for count in (200, 1000))
    assert many < 8 * max(few, 0.2)  # of five times as many; by their square it would be 25


def test_names_that_are_missing_are_not_looked_for_one_by_one(tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / f"f{number}").write_text("")
    scene = "#if (0)\n" + "".join(f'#include "n{number}"\n' for number in range(3000)) + "#end"
    listed = 0
    real = Path.iterdir

    def counted(self: Path) -> object:
        nonlocal listed
        listed += 1
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", counted)
        collect(tmp_path, scene)
    assert 0 < listed < 500


def test_no_more_strings_are_tried_than_a_project_has_files(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: List[str] = []
    monkeypatch.setattr(povfarm, "MAX_FILES", 50)
    monkeypatch.setattr(povfarm._Scan, "_try_string", lambda scan, name, readers: tried.append(name))
    collect(tmp_path, "".join(f'"f{number}" ' for number in range(80)))
    assert tried == [f"f{number}" for number in range(50)]


def test_the_memory_for_a_string_does_not_grow_with_its_escapes() -> None:
    text = '"' + '\\"' * 1_000_000 + '" "b"'
    tracemalloc.start()
    try:
        assert [token[-3:] for _, token in povfarm._tokens(text)] == ['\\""', '"b"']
        assert tracemalloc.get_traced_memory()[1] < 10 * len(text)
    finally:
        tracemalloc.stop()


def test_ini_files_that_name_each_other_end(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number}.ini").write_text(f"{number + 1}.ini\n" * 2)
    (tmp_path / "25.ini").write_text("Input_File_Name=a.pov\n")
    with pytest.raises(UserError, match="more than 1000 times"):
        povfarm.read_command_line(["0.ini"], tmp_path, {}, [])


# --- what comes back is written where it belongs

class Rogue:
    """What a client sees of a farm that says whatever it likes."""

    def __init__(self, images: Sequence[str], written: Sequence[str], data: bytes = b"evil") -> None:
        self.data, self.sha256 = data, povfarm.hashlib.sha256(data).hexdigest()
        self.frames = [{"frame": number, "name": name, "state": "done", "sha256": self.sha256}
                       for number, name in enumerate(images)]
        self.files = [{"path": name, "sha256": self.sha256, "appended": name.endswith(".log")}
                      for name in written]

    def get(self, target: str, timeout: float = 0) -> Dict[str, Any]:
        return {"frames": [] if "after=-1" not in target else self.frames, "files": self.files}

    def download(self, target: str, to: Path, sha256: str = "") -> None:
        to.write_bytes(self.data)

    def request(self, method: str, target: str, json: object = None) -> None:
        """It is told what has come, like any farm."""


VIEW = {"id": 7, "name": "job", "created": 1.0, "state": "done", "held": 0,
        "frames": {"total": 1}}


def fetch(here: Path, farm: Rogue) -> str:
    options = SimpleNamespace(output=here, data=here.parent / "data", json=True, apng=None, video=None,
                              typed=())
    try:
        povfarm._fetch_job(farm, VIEW, options)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return ""


KEPT = ["Makefile", "photo.png", "render.ini", "run.sh", "notes.log", ".bashrc", ".ssh/authorized_keys",
        "link.txt", "linked/x.txt", "outside.png"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with much that is somebody's own, and links that lead out of it."""
    here, out = tmp_path / "here", tmp_path / "out"
    for place in (here / ".ssh", out):
        place.mkdir(parents=True)
    for name in ("Makefile", "photo.png", "render.ini", "run.sh", "notes.log", ".bashrc",
                 ".ssh/authorized_keys"):
        (here / name).write_bytes(b"mine")
    (here / "run.sh").chmod(0o755)
    for name in ("x.txt", "target.txt", "target.png"):
        (out / name).write_bytes(b"mine")
    (here / "linked").symlink_to(out)
    (here / "link.txt").symlink_to(out / "target.txt")
    (here / "outside.png").symlink_to(out / "target.png")
    return here


@pytest.mark.parametrize("name", [*KEPT, "../out/x.txt", "linked/new.txt", ".new", "povray.ini",
                                  "sub/POVRAY.INI", "sub/.new"])
@pytest.mark.parametrize("what", ["image", "file"])
def test_a_rogue_farm_replaces_nothing(what: str, name: str, home: Path) -> None:
    farm = Rogue([name], []) if what == "image" else Rogue([], [name])
    for _ in range(2):  # what was refused once is not ours the next time
        fetch(home, farm)
    found = {path: path.read_bytes() for path in home.parent.rglob("*")
             if path.is_file() and "data" not in path.parts}
    # An image with such a name is no image; what was appended to is put beside what is there.
    new = {path.name[:6].lower() for path, data in found.items() if data == b"evil"}
    assert new <= {"povray" if what == "image" else "notes-"}
    assert list(found.values()).count(b"mine") == 12


class Says(http.server.BaseHTTPRequestHandler):
    """A farm that is not ours: it says who it is, and answers all that is posted with the same."""

    status, said = 200, b"{}"

    def answer(self, status: int, said: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"name": "f", "version": povfarm.VERSION, "farm_id": "f" * 16,
                                     "event": 0, "workers": 1, "notice": "", "you": ""}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(self.status, self.said)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("status, said", [
    (201, {"id": "7\x1b[2J", "missing": [], "event": 0}), (201, {"id": 7, "missing": [], "event": "x"}),
    (201, {"id": 7, "missing": [1], "event": 0}),
    (400, {"error": "no\npovfarm: all images are here\x1b[2J"})])
def test_what_a_farm_answers_to_submit_steers_no_terminal(
        status: int, said: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    handler = type("Handler", (Says,), {"status": status, "said": json.dumps(said).encode()})
    (tmp_path / "s.pov").write_text("sphere { 0, 1 }")
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            code = povfarm.main(["submit", "s.pov", "+W8", "+H6", "--data", str(tmp_path / "data"),
                                 "--server", f"http://127.0.0.1:{server.server_port}"])
        finally:
            server.shutdown()
    printed = capsys.readouterr()
    assert code not in (0, None) and printed.out == ""
    assert printed.err.count("\n") == 1 and not steers(printed.err, lines=True), printed.err


def test_a_list_that_begins_anew_for_ever_is_not_read_for_ever() -> None:
    class Circle(Rogue):
        def get(self, target: str, timeout: float = 0) -> Dict[str, Any]:
            return {"frames": self.frames, "jobs": [VIEW]}

    farm: Any = Circle(["a.png"], [])
    for listed in (povfarm._frames_of(farm, 7), povfarm._listed(farm)):
        with pytest.raises(FarmError, match="again and again"):
            list(listed)


def test_what_a_job_has_brought_it_may_bring_again(tmp_path: Path) -> None:
    here = tmp_path / "here"
    assert fetch(here, Rogue(["a.png"], ["sub/log.txt"], b"first")) == ""
    assert fetch(here, Rogue(["a.png"], ["sub/log.txt"], b"again")) == ""
    assert (here / "a.png").read_bytes() == (here / "sub/log.txt").read_bytes() == b"again"


class Swapper(Rogue):
    """Meanwhile another program of the computer puts a link in the place of a directory."""

    def swap(self, place: Path) -> None:
        while place.name != "sub":
            place = place.parent
        if not place.is_symlink():
            place.rename(place.with_name("moved"))
            place.symlink_to(place.parent.parent / "out")

    def download(self, target: str, to: Path, sha256: str = "") -> None:
        self.swap(Path(os.path.realpath(to.parent)))
        super().download(target, to)


@pytest.mark.skipif(sys.platform != "linux", reason="the system cannot hold a directory so")
@pytest.mark.parametrize("when", ["after the look", "during the download"])
@pytest.mark.parametrize("what", ["image", "file", "appended"])
def test_nothing_is_put_through_a_link_that_comes_meanwhile(
        what: str, when: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"image": "sub/a.png", "file": "sub/deep/a.txt", "appended": "sub/a.log"}[what]
    assert fetch(home, Rogue([name] if what == "image" else [], [name], b"")) == ""
    farm = Swapper([name] if what == "image" else [], [] if what == "image" else [name])
    if when == "after the look":
        begin = povfarm.writing
        monkeypatch.setattr(farm, "swap", lambda place: None)
        monkeypatch.setattr(povfarm, "writing", lambda place: [
            Swapper.swap(farm, place), begin(place)][1])
    with contextlib.suppress(FarmError):  # it may say so
        fetch(home, farm)
    assert (home / "sub").is_symlink()
    assert sorted(path.name for path in (home.parent / "out").rglob("*")) == [
        "target.png", "target.txt", "x.txt"]


@pytest.mark.slow
def test_the_images_of_submit_go_through_no_link_that_comes_meanwhile(
        povray: str, tmp_path: Path) -> None:
    here, out = tmp_path / "project", tmp_path / "out"
    for place in (here / "sub", out):
        place.mkdir(parents=True)
    (out / "photo.png").write_bytes(b"mine")
    (here / "s.pov").write_text(whole_farm.STILL)
    (here / "s.ini").write_text(
        "Input_File_Name=s.pov\nWidth=8\nHeight=6\nOutput_File_Name=photo.png\n")
    farm = whole_farm.Farm(tmp_path)
    try:
        waits = whole_farm.subprocess.Popen(
            [*POVFARM, "submit", "s.ini", "--wait", "--output", "sub"], cwd=here, stderr=whole_farm.subprocess.PIPE,
            env=whole_farm.environment(tmp_path), text=True)
        farm.processes.append(waits)
        assert waits.stderr is not None
        wait_until(lambda: farm.client.get("/api/v1/jobs")["jobs"])
        heard = waits.stderr.readline()  # it follows the job
        (here / "sub").rename(here / "moved")
        (here / "sub").symlink_to(out)
        farm.work("--until-idle")
        said = heard + waits.stderr.read()
        assert waits.wait(60) == 1 and "leads elsewhere" in said, said
    finally:
        farm.close()
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("photo.png", b"mine")]
    assert not list((here / "moved").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("line", [
    "Output_File_Name=../Pictures/photo.png", "Output_File_Name=%s/Pictures/photo.png",
    "Output_File_Name=linked/photo.png", "Output_File_Name=.git/photo.png",
    "Create_Ini=../Pictures/.bashrc", "Create_Ini=povray.ini", "Create_Ini=Makefile",
    "Create_Ini=linked/new.ini"])
def test_an_ini_file_puts_nothing_elsewhere(line: str, tmp_path: Path) -> None:
    here = tmp_path / "project"
    for folder in ("project/.git", "Pictures"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("project/.git/photo.png", "Pictures/photo.png", "Pictures/.bashrc",
                 "project/Makefile"):
        (tmp_path / name).write_bytes(b"mine")
    (here / "linked").symlink_to(tmp_path / "Pictures")
    (here / "s.pov").write_text("sphere { 0, 1 }\n")
    (here / "s.ini").write_text(
        "Input_File_Name=s.pov\nWidth=8\nHeight=6\n" + line.replace("%s", str(tmp_path)) + "\n")
    done = run(tmp_path, "render", "s.ini", cwd=here)
    assert done.returncode == 2 and "only you may name" in done.stderr
    assert {(tmp_path / name).read_bytes() for name in (
        "project/.git/photo.png", "Pictures/photo.png", "Pictures/.bashrc", "project/Makefile")
            } == {b"mine"} and not (here / "povray.ini").exists()
    if line == "Output_File_Name=../Pictures/photo.png":
        done = run(tmp_path, "render", "s.ini", line, cwd=here)
        assert done.returncode == 0 and (tmp_path / "Pictures/photo.png").read_bytes() != b"mine"


@pytest.mark.slow
def test_an_ini_file_puts_images_as_far_up_as_it_was_typed(tmp_path: Path) -> None:
    here = tmp_path / "project" / "scenes"
    here.mkdir(parents=True)
    (here / "s.pov").write_text("sphere { 0, 1 }\n")
    for folder in ("project/out", "out"):
        (tmp_path / folder).mkdir()
        ini = f"Input_File_Name=s.pov\nWidth=8\nHeight=6\nOutput_File_Name={tmp_path}/{folder}/\n"
        (tmp_path / "project" / f"{folder[:3]}.ini").write_text(ini)
    assert run(tmp_path, "render", "../pro.ini", cwd=here).returncode == 0
    refused = run(tmp_path, "render", "../out.ini", cwd=here)
    assert refused.returncode == 2 and "only you may name" in refused.stderr
    (here / "inner.ini").write_text("Include_Ini=../out.ini\n")  # reads it, as POV-Ray does
    assert run(tmp_path, "render", "inner.ini", cwd=here).returncode == 2
    assert [path.name for path in tmp_path.rglob("*.png")] == ["s.png"]


# --- words

# Each steers a terminal, forges a line, or turns the order of what follows.
STEERING = ["\x1b[2J", "\x1b]0;title\x07", "\n", "\r", "\r\n", "\x9b31m", "\x7f", "\u202e", "\u2066",
            "\u200f", "\u2028", "\u2029", "\x0b", "\x85", "\x00", "\ufeff", "\ud800"]


def steers(text: str, lines: bool = False) -> bool:
    kept = text.replace("\n", "").replace("\t", "") if lines else text
    return not kept.isprintable()


@pytest.mark.parametrize("what", STEERING)
def test_a_word_of_a_stranger_steers_nothing(
        what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evil = f"a{what}b"
    assert steers(evil)
    assert not steers(povfarm.one_line(evil)) and not steers(povfarm.plain(evil), lines=True)
    povfarm._say(f"job {evil}")
    povfarm._show(SimpleNamespace(json=False), {}, povfarm._table(  # type: ignore[arg-type]
        [("id", "name"), ("1", evil), ("2", "good")], 1))
    record = povfarm.logging.LogRecord("x", 30, "", 0, "%s has come", (evil,), None)
    povfarm._Log().emit(record)
    said = capsys.readouterr()
    assert not steers(said.out + said.err, lines=True)
    assert (said.out.count("\n"), said.err.count("has come")) == (3, 1)
    assert said.err.splitlines()[-1].endswith("b has come")  # one record is one line
    page = povfarm.element("p", evil, title=evil)
    assert not steers(page, lines=True)


@pytest.mark.parametrize("what", [one for one in STEERING if one != "\ud800"])  # which no JSON brings
def test_a_farm_keeps_no_word_that_steers(what: str, farm: Farm) -> None:
    evil = f"a{what}b"
    worker = {"name": evil, "cores": 1, "memory": 0, "system": evil, "engines": {"povray": "3.7"},
              "tags": []}
    token = join_by(farm.ask, KEY, worker, farm.access.farm_id)["key"]
    sent = farm.ask("POST", "/api/v1/jobs", json_body={
        "name": evil, "pov": pov_job(1).to_wire(), "options": {},
        "manifest": manifest({"scene.pov": SCENE}).to_wire()})
    job = sent.json()["id"]
    farm.scheduler.put_blob(sent.json()["missing"][0], [SCENE])
    lease, = farm.ask("POST", "/api/v1/lease", key=token, json_body={
        "want": 1, "slots": 1, "idle": 1}).json()["leases"]
    failed = farm.ask("POST", f"/api/v1/leases/{lease['id']}/tasks/{lease['tasks'][0]['id']}/fail",
                      key=token, json_body={"message": evil, "scene": True, "log": ""})
    assert (sent.status, failed.status) == (201, 204)
    for target in ("workers", "jobs", f"jobs/{job}", "events?after=0&wait=0"):
        told = farm.ask("GET", f"/api/v1/{target}").json()
        texts = [text for text in strings_in(told) if "a" in text]
        assert texts and not any(steers(text, lines=True) for text in texts)


def strings_in(value: Any) -> List[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inside for text in strings_in(one)]


@pytest.mark.parametrize("field, value", [
    ("engines", {"povray": "3" * 1000}), ("engines", {"x" * 1000: ""}), ("tags", ["x" * 1000]),
    ("engines", {str(number): "" for number in range(1000)}), ("tags", ["x"] * 1000),
    ("engines", {"povray": "3.7\n9"}), ("tags", ["\x1b[2J"])])
def test_a_stranger_tells_little_of_itself(field: str, value: Any) -> None:
    wire = {"name": "x" * 10_000, "cores": 1, "memory": 0, "system": "y" * 10_000, "engines": {},
            "tags": []}
    info = povfarm.WorkerInfo.from_wire(wire)
    assert (len(info.name), len(info.system)) == (100, 100)
    with pytest.raises(UserError):
        povfarm.WorkerInfo.from_wire({**wire, field: value})


# --- what a stranger costs

def test_what_there_is_little_of_is_shared_by_address_and_network() -> None:
    shares = Shares(2, 3, 5)
    takes = [shares.take(address) for address in (
        "10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "fe80::1%eth0",
        "192.168.0.9")]
    assert takes == [True, True, False, True, False, True, True, False] and len(shares) == 5
    shares.give_back("10.0.0.1")
    assert shares.take("10.0.0.3") and not shares.take("10.0.0.4")
    assert povfarm.network_of("2001:db8::1") == povfarm.network_of("2001:db8::ffff:1") != (
        povfarm.network_of("2001:db8:0:1::1"))


@pytest.mark.parametrize("senders", [
    ["10.0.0.66", "10.0.0.67", "10.0.0.68"], ["10.0.0.66", "10.0.1.66", "10.9.0.66"],
    [f"10.1.1.{number}" for number in range(100)]])
def test_who_asks_without_end_silences_no_beacon(senders: List[str]) -> None:
    clock = FakeClock()
    beacon = povfarm.Beacon("farm", "0" * 32, 2271, b"key", clock=clock)
    probe = povfarm._packet("probe", nonce="0" * 32)
    for second in range(3):
        clock.mono = 1000.0 + second
        for number in range(600):
            beacon.answer(probe, senders[number % len(senders)])
        assert beacon.answer(probe, "192.168.1.5") is not None


def info(name: str) -> povfarm.WorkerInfo:
    return povfarm.WorkerInfo(name, 1, 0, "", {})


def rows_of(farm: Farm) -> int:
    with farm.store.read() as tx:
        return len(tx.workers())


def test_who_asks_to_join_again_and_again_leaves_nothing(farm: Farm) -> None:
    before = sum(path.stat().st_size for path in farm.root.rglob("*"))
    for number in range(200):
        farm.clock.advance(61)  # whoever asked before has gone
        farm.scheduler.join(info(f"w{number}"), f"{number}", "10.0.0.66", "CODE")
    assert rows_of(farm) == povfarm.MAX_PENDING_EACH
    with farm.store.read() as tx:
        assert tx._do("SELECT COUNT(*) FROM worker").fetchone()[0] == povfarm.MAX_PENDING_EACH
    assert sum(path.stat().st_size for path in farm.root.rglob("*")) < before + 8_000_000


def test_one_address_or_network_leaves_room_for_others_to_ask(farm: Farm) -> None:
    def ask(number: int, address: str) -> bool:
        try:
            farm.scheduler.join(info(f"w{number}"), f"{number}{address}", address, "CODE")
        except povfarm.Crowded:
            return False
        return True

    assert [ask(number, "10.0.0.66") for number in range(30)] == [True] * 20 + [False] * 10
    assert sum(ask(number, f"10.0.0.{number}") for number in range(200)) == 40
    assert ask(0, "192.168.1.5")
    # All at the same time, none is above the limit.
    with ThreadPoolExecutor(16) as pool:
        [*pool.map(lambda number: ask(number, f"10.{number}.0.1"), range(150))]
    assert rows_of(farm) == povfarm.MAX_PENDING


def test_an_open_farm_takes_so_many(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "MAX_OPEN", 3)
    for number in range(3):
        farm.scheduler.join(info(f"w{number}"), f"{number}", "10.0.0.66")
    with pytest.raises(povfarm.Crowded):
        farm.scheduler.join(info("w4"), "4", "10.0.0.66")
    farm.scheduler.join(info("w5"), "5", "10.0.0.66", who="admin")


@pytest.mark.parametrize("method, target", [
    ("PUT", "/api/v1/leases/none/tasks/1?log=5"), ("PUT", "/api/v1/leases/none/tasks/1/state"),
    ("POST", "/api/v1/leases/none/tasks/1/fail")])
def test_a_body_for_no_lease_is_refused_unread(method: str, target: str, farm: Farm) -> None:
    worker = {"name": "anna", "cores": 1, "memory": 0, "system": "", "engines": {}, "tags": []}
    token = join_by(farm.ask, KEY, worker, farm.access.farm_id)["key"]
    path, _, query = target.partition("?")
    digest = "0" * 64
    headers = {"host": "box", "content-type": "application/json", "x-sha256": digest,
               **farm.signer.headers(token, method, target, sha256=digest)}

    def unread() -> Iterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    response = farm.router.handle(Request(
        method, path, {"log": "5"} if query else {}, headers, BodyReader(unread(), 400 << 20),
        "10.0.0.1", target=target))
    assert response.status == 410


def test_no_log_is_in_memory_before_it_is_whole(farm: Farm) -> None:
    """One worker can send many at a time, and slowly."""
    farm.submit(1)
    worker = {"name": "anna", "cores": 1, "memory": 0, "system": "", "tags": [],
              "engines": {"povray": "3.7"}}
    joined = join_by(farm.ask, KEY, worker, farm.access.farm_id)
    lease = farm.lease(joined["id"])
    target, grown = f"/api/v1/leases/{lease.id}/tasks/{lease.tasks[0].id}?log={povfarm.MAX_LOG}", []

    def slowly() -> Iterator[bytes]:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(povfarm.MAX_LOG // povfarm.BUFFER):
            yield b"x" * povfarm.BUFFER
        grown.append(tracemalloc.get_traced_memory()[0] - before)
        yield b"no picture"

    size = povfarm.MAX_LOG + 10
    sha256 = hashlib.sha256(b"x" * povfarm.MAX_LOG + b"no picture").hexdigest()
    tracemalloc.start()
    try:
        response = farm.router.handle(Request(
            "PUT", target.partition("?")[0], {"log": str(povfarm.MAX_LOG)},
            farm.signer.headers(joined["key"], "PUT", target, sha256=sha256),
            BodyReader(slowly(), size), "10.0.0.1", target=target))
    finally:
        tracemalloc.stop()
    assert response.status == 422 and grown[0] < 1 << 20, (response.body, grown)


@pytest.mark.parametrize("line", ["x" * 5000, "\u00e9" * 5000, "\x01" * 5000])
def test_no_text_of_a_renderer_is_too_long_for_its_coordinator(line: str) -> None:
    said = povfarm.PovText()
    for number in range(6000):
        said.feed(f"{number} {line}")
    body = json.dumps({"message": "", "scene": False, "log": said.text})
    assert len(said.text) > 100_000 and len(body) < povfarm.MAX_LOG
    assert said.text.startswith("0 ") and said.text.endswith(f"{line}\n") and (
        povfarm._LEFT_OUT in said.text)


def packed(tmp_path: Path, entries: int = 1, size: int = 10, comment: int = 0) -> Path:
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(entries):
            with archive.open(f"{number}" + "x" * comment, "w") as file:
                for start in range(0, size, 1 << 20):
                    file.write(bytes(min(1 << 20, size - start)))
    return path


@pytest.mark.parametrize("what, most", [
    ({"entries": 1001}, povfarm.MAX_SHARED), ({"size": 65 << 20}, povfarm.MAX_WRITTEN_SIZE),
    ({"size": 200 << 20}, povfarm.MAX_SHARED), ({"entries": 3000, "comment": 700}, povfarm.MAX_SHARED)])
def test_what_a_run_left_unpacks_to_no_more_than_it_may(
        what: Dict[str, int], most: int, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        povfarm.unpack_files(packed(tmp_path, **what), tmp_path / "into", most)
    assert not (tmp_path / "into").exists()


def test_a_long_list_of_files_is_not_even_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="list of files is too long"):
        povfarm.unpack_files(packed(tmp_path, 3000, 10, 700), tmp_path / "into")


class Dear:
    """Pages that count how often they were made, and how many at a time."""

    def __init__(self) -> None:
        self.made, self.now, self.most = 0, 0, 0
        self.entered, self.over = threading.Semaphore(0), threading.Event()

    @povfarm.route("GET", "/shared", role="reader", shared=True)
    def shared(self, request: Request) -> Response:
        self.made += 1
        return Response(200, {"Number": str(self.made)}, request.headers["host"].encode())

    @povfarm.route("GET", "/long", role="reader")
    def long(self, request: Request) -> Response:
        self.now += 1
        self.most = max(self.most, self.now)
        self.entered.release()
        self.over.wait(60)
        self.now -= 1
        return Response(204)

    @povfarm.route("GET", "/beat", role="worker")
    def beat(self, request: Request) -> Response:
        return Response(204)


def known(request: Request) -> povfarm.Identity:
    worker = request.headers.get("authorization") == "worker"
    return povfarm.Identity(frozenset({"reader", *(["worker"] if worker else [])}), 0,
                            "anna" if worker else "")


def looked(router: povfarm.Router, path: str, who: str = "", host: str = "a") -> Response:
    path, _, query = path.partition("?")
    return router.handle(Request("GET", path, {"q": query} if query else {}, {
        "host": host, "authorization": who}))


class Turn:
    """A lock that tells how many have asked for it."""

    def __init__(self) -> None:
        self.asked, self.lock = itertools.count(), threading.Lock()
        self.most = 0

    def acquire(self) -> None:
        self.most = max(self.most, next(self.asked) + 1)
        self.lock.acquire()

    def release(self) -> None:
        self.lock.release()


def test_a_page_is_made_once_for_all_strangers_who_wait_for_it() -> None:
    dear = Dear()
    router = povfarm.Router(dear, authenticate=known)
    router._turn = turn = Turn()  # type: ignore[assignment]
    with ThreadPoolExecutor(40) as pool:
        pool.submit(looked, router, "/long")  # nobody has a turn meanwhile
        assert dear.entered.acquire(timeout=60)
        strangers = [pool.submit(looked, router, "/shared", host="ab"[number % 2])
                     for number in range(30)]
        wait_until(lambda: turn.most == 31)
        assert looked(router, "/shared", "worker").headers["Number"] == "1"  # and does not wait
        dear.over.set()
        replies = [one.result(60) for one in strangers]
    assert dear.made == 3 and {reply.body for reply in replies[::2]} == {b"a"}
    replies[0].headers["Mine"] = "1"  # whoever gets one may change it
    assert [reply.headers for reply in replies].count(replies[0].headers) == 1
    assert looked(router, "/shared").headers == {"Number": "4"}  # who comes later gets a new one
    for number in range(100):
        looked(router, f"/shared?{number}")
    assert len(router._made) == 20


def test_strangers_take_turns_and_those_who_were_let_in_do_not_wait() -> None:
    dear = Dear()
    router = povfarm.Router(dear, authenticate=known)
    with ThreadPoolExecutor(40) as pool:
        strangers = [pool.submit(looked, router, f"/long?{number}") for number in range(30)]
        assert dear.entered.acquire(timeout=60)
        for _ in range(20):
            assert looked(router, "/beat", "worker").status == 204
        assert looked(router, "/nothing").status == 404
        assert dear.most == 1 and not any(one.done() for one in strangers)
        dear.over.set()
        assert {one.result(60).status for one in strangers} == {204}
    assert dear.most == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes root")
def test_a_worker_that_runs_as_root_says_so(tmp_path: Path) -> None:
    one = whole_farm.Farm(tmp_path)
    try:
        said = one.work().stdout
        assert said is not None and any("let it run as another user" in line for line in said)
    finally:
        one.close()
