"""What strangers may send: names that want to be scripts, broken HTTP, packets, zips and pictures."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

import povfarm
from helpers.base import need, run_povray, tried
from helpers.farm_in_a_box import manifest
from helpers.pages import Recorder, chromium
from helpers.pictures import png
from helpers.sockets import KEY, beacon, until_closed
from helpers.trust import signer_of
from povfarm import (
    Coordinator,
    Cost,
    JobOptions,
    Offer,
    PovJob,
    Request,
    Response,
    WorkerInfo,
)
from tools import fuzz, load

# --- names in a real browser

# Each of these asks for /pwned/... when it is taken for HTML where text or an attribute belongs.
PAYLOADS = [
    "<img src=x onerror=fetch('/pwned/%s')>", "\"><script>fetch('/pwned/%s')</script>",
    "'><svg onload=fetch('/pwned/%s')>", "</title></textarea><script>fetch('/pwned/%s')</script>",
    "\" autofocus onfocus=fetch('/pwned/%s') x=\"", "<a href=javascript:fetch('/pwned/%s')>",
    "<meta http-equiv=refresh content=0;url=/pwned/%s>", "<link rel=stylesheet href=/pwned/%s>",
    "&lt;img src=/pwned/%s&gt;", "<iframe srcdoc='&lt;img src=/pwned/%s>'>",
]
ROOM = {"output": 1, "declare": 1, "scene": 1, "message": 2, "policy": 5}
FRAMES = """<!DOCTYPE html><title>frames</title><body><script>
addEventListener("load", () => setTimeout(() => {
  for (const frame of document.querySelectorAll("iframe")) {
    const text = document.createElement("pre");
    text.textContent = frame.contentDocument.title + frame.contentDocument.body.innerText;
    document.body.append(text);
    frame.remove();
  }
}, 500));
</script>"""


def hostile(where: str) -> str:
    """All of them, or as many as there is room for."""
    return "".join(PAYLOADS[:ROOM.get(where)]).replace("%s", where)


class Stage(Recorder):
    """Shows all pages in frames of one page, without the policy that would stop a script."""

    def __init__(self, router: Any, pages: List[str]) -> None:
        super().__init__(router)
        frames = [f"<iframe src='{page}'></iframe>" for page in pages]
        self.own: Dict[str, Response] = {
            "/stage": povfarm.text_response(FRAMES + "".join(frames), mime="text/html"),
            "/taken": povfarm.text_response(hostile("taken"), mime="text/html"),
            "/policy": povfarm.text_response(hostile("policy"), mime="text/html"),
        }
        self.own["/policy"].headers["Content-Security-Policy"] = \
            povfarm.PAGE_HEADERS["Content-Security-Policy"].replace("frame-ancestors 'none'", "")

    def handle(self, request: Request) -> Response:
        response = super().handle(request)
        response = self.own.get(request.path, response)
        if request.path != "/policy":
            response.headers["Content-Security-Policy"] = ""
        return response


def real_error(tmp_path: Path) -> Tuple[str, str]:
    """What POV-Ray prints of a scene that fails with HTML, and the line that tells why."""
    names = [(payload % "message").replace('"', '\\"') for payload in PAYLOADS[:4]]
    (tmp_path / "bad.pov").write_text("#version 3.7;\n" + "".join(
        f'#warning "{name}"\n' for name in names) + f'#include "{"".join(names[:2])}"\n')
    done = run_povray(["bad.pov", "+W8", "+H8"], tmp_path)
    seen = povfarm.PovText()
    for line in done.stderr.splitlines():
        seen.feed(line)
    assert done.returncode != 0 and "Warning: <img" in seen.text and "<img" in seen.error()
    return seen.text, seen.error()


def test_no_name_and_no_message_runs_in_a_real_browser(povray: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, (
        "chromium", "chromium-browser", "google-chrome"))), None)
    need("chromium", browser is not None, "Chromium is not installed: apt-get install chromium")
    printed, message = real_error(tmp_path)
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", name=hostile("farm"), durable=False)
    pages = ["/", "/computers", "/jobs/1", "/jobs/1/frames/1", "/jobs/1/frames/2", "/jobs/2", "/jobs/9",
             "/" + povfarm.urllib.parse.quote(hostile("path")), "/taken", "/policy"]
    farm.server.router = stage = Stage(farm.router, pages)  # type: ignore[assignment]
    farm.start()
    try:
        info = WorkerInfo(hostile("worker"), 2, 1, hostile("system"),
                          {"povray": hostile("version")}, (hostile("tag"),))
        worker = farm.scheduler.join(info, "t", "10.0.0.7")
        farm.scheduler.join(info, "u", "10.0.0.8", "ABCDEF")
        pov = PovJob({"Input_File_Name": hostile("scene") + ".pov", "Width": "4", "Height": "3",
                      "Output_File_Name": hostile("output").replace("/", "\u2215"),
                      "Final_Frame": "3"}, (hostile("declare"),), (), ".")
        for name in ("job", "paused"):
            files = {hostile("file").replace("/", "\u2215"): b"x"}
            job, missing = farm.scheduler.submit(
                hostile(name), hostile("owner"), pov, manifest(files), JobOptions(retry_limit=1))
            for sha256 in missing:
                farm.scheduler.put_blob(sha256, [b"x"])
        farm.scheduler.pause(job)
        for number in range(2):
            lease, = farm.scheduler.lease(worker, Offer(1, 1, 1), 0, lambda: True)
            if number:
                farm.scheduler.fail(worker, lease.id, lease.tasks[0].id, message,
                                    printed.encode(), True)
            else:
                farm.scheduler.finish(worker, lease.id, lease.tasks[0].id, png(),
                                      printed.encode(), Cost(20, 20))
        dom = chromium(str(browser), f"{farm.url}/stage", tmp_path, "--virtual-time-budget=5000")
    finally:
        farm.stop()
    asked = stage.answers
    assert {page for page in pages if povfarm.urllib.parse.unquote(page) not in asked} == set()
    ran = {path.split("/")[2] for path in asked if path.startswith("/pwned")}
    tried("hostile names and messages in Chromium", dom.text.count("/pwned/"), ran=len(ran - {"taken"}))
    assert ran == {"taken"}, "only the page that is meant to be taken in"
    shown = " ".join(dom.text.split())
    for where in ("farm", "worker", "version", "job", "paused", "message", "output", "path",
                  "declare", "owner", "scene"):
        for payload in PAYLOADS[:ROOM.get(where)]:
            assert " ".join((payload % where).split()) in shown.replace("\u2215", "/"), where


# --- many who come and say little; the long form is load.py

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other addresses of loopback, and /proc")
def test_a_worker_is_served_beside_hundreds_of_idle_and_slow_strangers(tmp_path: Path) -> None:
    figures = load.measure(tmp_path, 300, tls=False, rounds=5)
    assert figures["held"] == 300
    assert load.is_good(figures), figures
    # Were it a thread for each: 300 more than the 20 MB or so that Python itself takes.
    assert figures["memory"] - figures["memory_before"] < 10e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other addresses of loopback, and /proc")
def test_a_worker_is_served_beside_many_who_look_at_dear_pages(tmp_path: Path) -> None:
    figures = load.measure_looks(tmp_path, 32, 20_000, rounds=20)
    assert figures["pages"] > 0 and figures["beat_seconds_99"] < 2, figures
    assert figures["memory"] < 200e6


# --- broken input: what is known to be tricky, and changes at random; the long form is fuzz.py

@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_input_changed_at_random_is_refused_or_good(name: str) -> None:
    told: List[str] = []
    counts = fuzz.fuzz(name, 300, 2026, told.append)
    tried("inputs changed at random", sum(counts.values()), crashes=counts["crash"],
          let_in_wrongly=counts["wrong"])
    assert told == [] and counts["crash"] == counts["wrong"] == 0
    assert counts["refused"] > 100 and counts["accepted"] > 5, "else it tries nothing"


TARGETS = [
    "/../farm.key", "/..%2ffarm.key", "/%2e%2e/farm.key", "/%2e%2e%2ffarm.key", "/..%5cfarm.key",
    "//farm.key", "/./farm.key", "/style.css/../farm.key", "/jobs/1/../../farm.key",
    "/api/v1/blobs/..%2f..%2ffarm.key", "/api/v1/blobs/%2e%2e", "/api/v1/blobs/" + "a" * 63 + "%2f",
    "/api/v1/manifests/..%2f..%2ffarm.key", "/api/v1/manifests/%00", "/api/v1/manifests/'%20or%201=1",
    "/api/v1/jobs/1/frames/1/image/../../../../farm.key", "/api/v1/jobs/1%2f..%2f2/frames",
    "/api/v1/jobs/%31/archive.zip%00.png", "/api/v1/jobs/-1", "/api/v1/jobs/1.0", "/api/v1/jobs/%D9%A1",
    "/api/v1/jobs/999999999999999999/frames/999999999999999999/image", "/file:///etc/passwd",
    "/login/..%2f..%2ffarm.key", "/login/%0d%0aSet-Cookie:%20a=b", "/%252e%252e%252ffarm.key",
    "/farm.key%3f", "/farm.db", "/jobs/1/frames/..%2f..%2f..%2ffarm.key", "/%ef%bc%8e%ef%bc%8e/farm.key",
]


def test_no_path_leads_out_of_the_farm(tmp_path: Path) -> None:
    farm = Coordinator(tmp_path, bind="127.0.0.1", durable=False)
    farm.start()
    try:
        info = WorkerInfo("anna", 1, 1, "x", {}, ())
        farm.scheduler.join(info, povfarm.secret_hash("token"), "10.0.0.7")
        signer = signer_of(farm.access)
        farm.scheduler.submit("x", "me", PovJob({"Input_File_Name": "a.pov"}, (), (), "."),
                              manifest({}), JobOptions())
        for key, target in itertools.product((farm.key, "#1:token"), TARGETS):
            with socket.create_connection(("127.0.0.1", farm.port), 10) as sock:
                sock.sendall(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                             f"Authorization: {signer.headers(key, 'GET', target)['authorization']}"
                             "\r\n\r\n".encode())
                answer = until_closed(sock)
            tried("paths that lead out of the farm", let_in=int(answer[9:12]) < 400)
            assert 400 <= int(answer[9:12]) < 500, target
            assert farm.key.encode() not in answer and b"Set-Cookie" not in answer, target
    finally:
        farm.stop()


def test_a_flood_of_packets_leaves_the_beacon_at_work() -> None:
    chance = random.Random(2026)
    probe = b'{"povfarm": "probe", "version": 1, "nonce": "' + b"ab" * 16 + b'"}'
    with beacon() as one, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0)
        for number in range(5000):
            size = chance.choice((0, 1, 100, 1400, 2048, 2049, 9000, 60_000))
            packet = (probe, fuzz.mutated(probe, chance), chance.randbytes(size))[number % 3]
            with contextlib.suppress(OSError):  # full
                sock.sendto(packet, ("127.0.0.1", one.port))
        answers = 0
        with contextlib.suppress(OSError):
            while sock.recv(65536):
                answers += 1
        assert answers <= 500, "what is asked is not answered as often, to whoever it may be"
        assert len(povfarm.discover(60, KEY, one.port, "studio")) == 1


def many_entries(count: int) -> bytes:
    """A zip file of empty files, by the book."""
    local, central = bytearray(), bytearray()
    for number in range(count):
        name = b"%d" % number
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0)
        central += b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack(
            "<HHHII", 0, 0, 0, 0, len(local)) + name
        local += b"PK\3\4" + fields + name
    end = struct.pack("<HHHHIIH", 0, 0, count % 65536, count % 65536, len(central), len(local), 0)
    return bytes(local + central + b"PK\5\6" + end)


@pytest.mark.slow
def test_a_zip_of_more_files_than_a_project_may_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.zip").write_bytes(many_entries(3))
    povfarm.read_zip(tmp_path / "few.zip", tmp_path / "few")
    assert len(list((tmp_path / "few").iterdir())) == 3
    (tmp_path / "many.zip").write_bytes(many_entries(povfarm.MAX_FILES + 1))
    with pytest.raises(povfarm.UserError, match=f"more than {povfarm.MAX_FILES} files"):
        povfarm.read_zip(tmp_path / "many.zip", tmp_path / "many")
    assert not (tmp_path / "many").exists()


# --- programs in INI files

COMMANDS = ("Pre_Scene_Command", "Pre_Frame_Command", "Post_Frame_Command", "Post_Scene_Command")
SPELLINGS: Dict[str, Any] = {
    **{name: f"{name}=touch x\n" for name in COMMANDS},
    "small letters": "pre_scene_command=touch x\n", "capitals": "PRE_SCENE_COMMAND=touch x\n",
    "mixed": "pRe_ScEnE_CoMmAnD=touch x\n", "blanks": "  Pre_Scene_Command  =  touch x\n",
    "tabs": "\tPre_Scene_Command\t=\ttouch x\n", "quotes": 'Pre_Scene_Command="touch x"\n',
    "other quotes": "Pre_Scene_Command='touch x'\n", "two on a line": "+Q3 Pre_Scene_Command=touch\n",
    "behind an option": "+Q3\nWidth=9 Pre_Scene_Command=touch\n",
    "no line end": "Pre_Scene_Command=touch x", "old line ends": "+Q3\rPre_Scene_Command=touch x\r",
    "Windows line ends": "+Q3\r\nPre_Scene_Command=touch x\r\n",
    "after a comment": "; c\nPre_Scene_Command=touch x ; d\n",
    "last of two": "Pre_Scene_Command=\nPre_Scene_Command=touch x\n",
    "first of two": "Pre_Scene_Command=touch x\nPre_Scene_Command=\n",
    "in the first section": "[a]\nPre_Scene_Command=touch x\n",
    "before the sections": "Pre_Scene_Command=touch x\n[b]\n+Q3\n",
    "continued": "Pre_Scene_Command=\\\ntouch x\n", "on the next line": "Pre_Scene_Command=\ntouch x\n",
    "a zero byte": "Pre_Scene_Command\0=touch x\n", "form feed": "\fPre_Scene_Command=touch x\n",
    "vertical tab": "Pre_Scene_Command\v=touch x\n", "plus": "+Pre_Scene_Command=touch x\n",
    "minus": "-Pre_Scene_Command=touch x\n", "comma": "+Q3,Pre_Scene_Command=touch x\n",
    "semicolon": "+Q3;Pre_Scene_Command=touch x\n", "shorter": "Pre_Scene_Comm=touch x\n",
    "longer": "Pre_Scene_Commands=touch x\n", "as an option's value": "Declare=Pre_Scene_Command=touch\n",
    "included": {"x.ini": "Include_Ini=y.ini\n", "y.ini": "Pre_Scene_Command=touch x\n"},
    "named": {"x.ini": "y.ini\n", "y.ini": "Pre_Scene_Command=touch x\n"},
    "base INI": {"povray.ini": "Pre_Scene_Command=touch x\n", "x.ini": ""},
    "argument": ["Pre_Scene_Command=touch x"], "argument in quotes": ['"Pre_Scene_Command=touch x"'],
    "argument of two words": ["Pre_Scene_Command", "=touch x"],
    "argument with blanks": [" Pre_Scene_Command = touch x"],
    "argument, small": ["pre_scene_command=touch"], "argument behind": ["+Q3 Pre_Scene_Command=touch"],
}


def test_every_spelling_by_which_povray_starts_a_program_is_refused(
        povray: str, tmp_path: Path) -> None:
    """Debian's POV-Ray says that it was told not to start what it would have started."""
    def try_it(name: str) -> Tuple[str, bool, bool]:
        what, place = SPELLINGS[name], tmp_path / str(list(SPELLINGS).index(name))
        place.mkdir()
        (place / "s.pov").write_text("camera { } sphere { 0, 1 }")
        files = what if isinstance(what, dict) else {"x.ini": what if isinstance(what, str) else ""}
        for file, text in files.items():
            (place / file).write_bytes(text.encode())
        arguments = ["s.pov", "x.ini", "+W8", "+H8", *(what if isinstance(what, list) else [])]
        done = run_povray(arguments, place)
        starts = "shellout" in done.stdout + done.stderr or (place / "x").exists()
        try:
            povfarm.plan_frames(povfarm.read_command_line(arguments, place, {}, ()))
            return name, starts, False
        except povfarm.UserError:
            return name, starts, True

    with ThreadPoolExecutor(8) as pool:  # POV-Ray sleeps most of the time
        results = list(pool.map(try_it, SPELLINGS))
    wrong = [name for name, starts, refused in results if starts and not refused]
    tried("spellings of commands in INI files", len(results), let_in=len(wrong))
    assert wrong == []
    assert sum(starts for _, starts, _ in results) > 15, "or this POV-Ray tells nothing"
