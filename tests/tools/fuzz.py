"""Good input changed at random, for every reader that strangers can reach. By hand:

    python tests/tools/fuzz.py --rounds 100000 --seed 7 [--only http,zip]

prints how many inputs each reader was given, how many it accepted, how many ended in
an error that is not its own ("crashes") or were accepted against a rule that is
checked here in another way ("wrong"), and the peak memory. The same seed gives the
same inputs. The short form is a test in test_hostile.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple
from xml.etree import ElementTree

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

import povfarm
from helpers.farm_in_a_box import SCENE, FakeClock, manifest, pov_job, sha256
from helpers.invariants import broken
from helpers.pictures import crop_rows, join_rows, png_of
from helpers.trust import signer_of
from povfarm import BodyReader, Request, UserError

WORDS = [
    b"\0", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b"=", b";", b",", b"/", b"\\", b"..",
    b"../", b"%2e%2e%2f", b"%00", b"%", b"-1", b"0", b"00", b"0x10", b"1e9", b"4294967296", b"\xff",
    b"99999999999999999999", b"\xc3\xa9", b"\xc0\xae", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"'", b'"',
    b"[", b"]", b"{", b"}", b"null", b"true", b"NaN", b"<script>", b"CON", b"aux.png", b"C:",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"HTTP/1.1", b"+I",
    b"Post_Frame_Command=ls\n", b"pre_scene_command = x\n", b"Include_Ini=x\n", b"PK\1\2", b"IDAT",
]
Result = str  # "accepted", "refused", "crash" or "wrong"


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change a few bytes: flip, replace, insert, remove, repeat, cut off."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(changed) + 1)
        end = min(len(changed), at + chance.choice((1, 1, 2, 4, 16, 64)))
        kind = chance.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at:end] = chance.randbytes(end - at)
        elif kind == 2:
            changed[at:at] = chance.choice(WORDS)
        elif kind == 3:
            changed[at:end] = chance.choice(WORDS)
        elif kind == 4:
            del changed[at:end]
        elif kind == 5:
            changed[at:at] = changed[at:end] * chance.choice((1, 2, 50))
        elif chance.random() < 0.2:
            del changed[at:]
    return bytes(changed)


# --- HTTP, over real sockets

HTTP_SEEDS = [
    b"GET /a?x=1&y=%20 HTTP/1.1\r\nHost: farm\r\nAccept: */*\r\n\r\n",
    b"GET http://farm:80/b HTTP/1.1\r\nHost: farm\r\nCookie: a=b; c=d\r\nRange: bytes=0-3\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: farm\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /echo HTTP/1.1\r\nHost: farm\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;x=y\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\nT: u\r\n\r\n",
    b"POST /json HTTP/1.1\r\nHost: farm\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    b'\r\n{"a":[1]}',
    b"PUT /echo HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi",
]
LAST = b"GET /last HTTP/1.1\r\nHost: farm\r\nConnection: close\r\n\r\n"


class Echo:
    """Routes that read what they are sent."""

    @povfarm.route("POST", "/echo", role="anyone")
    @povfarm.route("PUT", "/echo", role="anyone")
    def echo(self, request: Request) -> povfarm.Response:
        return povfarm.json_response({"size": len(request.body.read())})

    @povfarm.route("POST", "/json", role="anyone")
    def json(self, request: Request) -> povfarm.Response:
        return povfarm.json_response(request.json())

    @povfarm.route("GET", "/<rest:path>", role="anyone")
    def get(self, request: Request) -> povfarm.Response:
        return povfarm.json_response({"path": request.path, "query": dict(request.query)})


def ambiguous(sent: bytes) -> bool:
    """Whether the first head is one that two readers may understand differently."""
    head = sent.lstrip(b"\r\n").partition(b"\r\n\r\n")[0]
    lines = head.split(b"\r\n")
    names = [line.partition(b":")[0].lower() for line in lines[1:]]
    return bool(
        re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n", head)
        or any(line[:1] in (b" ", b"\t") or b":" not in line for line in lines[1:])
        or any(re.search(rb"\s", name) for name in names)
        or names.count(b"content-length") > 1 or names.count(b"host") > 1
        or (b"content-length" in names and b"transfer-encoding" in names))


@contextlib.contextmanager
def http_target(scratch: Path) -> Iterator[Callable[[random.Random], Result]]:
    """A real server; what a client sends is followed by one good request."""
    limits = povfarm.Limits(head_seconds=0.05, body_seconds=0.05, idle_seconds=0.05,
                            linger_seconds=0.01)
    server = povfarm.Server(povfarm.Router(Echo(), authenticate=lambda request: povfarm.Identity()),
                            "127.0.0.1", 0, limits=limits)
    server.start()

    def once(chance: random.Random) -> Result:
        sent = mutated(chance.choice(HTTP_SEEDS), chance)
        with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
            answer = bytearray()
            with contextlib.suppress(ConnectionError):
                sock.sendall(sent + LAST)
                while True:
                    block = sock.recv(65536)  # a hang is a timeout, and that a crash
                    if not block:
                        break
                    answer += block
        statuses = re.findall(rb"HTTP/1\.1 (\d\d\d) ", bytes(answer))
        if b"500" in statuses:
            return "crash"
        good = statuses[:1] in ([b"200"], [b"404"], [b"405"])
        if good and ambiguous(sent + LAST):
            return "wrong"
        return "accepted" if good else "refused"

    try:
        yield once
    finally:
        server.stop()


# --- UDP

@contextlib.contextmanager
def udp_target(scratch: Path) -> Iterator[Callable[[random.Random], Result]]:
    """Probes for a beacon, answers for a worker with the key: both read by the code of sockets."""
    beacon = povfarm.Beacon("studio", "f1", 2271, b"key", pin="ab" * 32)
    nonce = "ab" * 16
    probe = json.dumps({"povfarm": "probe", "version": 1, "nonce": nonce, "name": "studio"}).encode()
    true = beacon.answer(probe, "127.0.0.1") or b""

    def once(chance: random.Random) -> Result:
        beacon._answers.clear()
        if chance.random() < 0.5:
            packet = mutated(probe, chance)
            answer = beacon.answer(packet, "127.0.0.1")
            if answer is not None and len(answer) > 1000:
                return "wrong"
            return "refused" if answer is None else "accepted"
        packet = mutated(true, chance)
        found = povfarm._read_answer(packet, "127.0.0.1", nonce, b"key")
        if found is None:
            return "refused"
        return "accepted" if json.loads(packet) == json.loads(true) else "wrong"

    yield once


# --- zip files

def zip_seed() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("a.pov", "sphere"), ("d/b.inc", "x" * 3000), ("d/e/c.png", "y" * 50),
                           ("empty/", "")):
            archive.writestr(name, text)
    return data.getvalue()


@contextlib.contextmanager
def zip_target(scratch: Path) -> Iterator[Callable[[random.Random], Result]]:
    """Zip files as ``submit`` unpacks them: everything lands in one directory or nothing does."""
    seed, file, place = zip_seed(), scratch / "in.zip", scratch / "place"
    place.mkdir()

    def once(chance: random.Random) -> Result:
        file.write_bytes(mutated(seed, chance))
        try:
            povfarm.read_zip(file, place / "to")
            result = "accepted"
        except UserError:
            result = "refused"
        inside = list((place / "to").rglob("*"))
        if (result == "refused" and list(place.iterdir())) or any(
                one.is_symlink() or not (one.is_file() or one.is_dir()) for one in inside):
            result = "wrong"
        if sorted(one.name for one in scratch.iterdir()) != ["in.zip", "place"]:
            result = "wrong"
        shutil.rmtree(place / "to", ignore_errors=True)
        return result

    yield once


# --- jobs: options, manifest, and the router that takes them

JOB = {
    "name": "ball", "options": {"priority": 1, "retry_limit": 3},
    "pov": {"values": {"Input_File_Name": "a.pov", "Width": "4", "Height": "3", "Clock": "0.5",
                       "Output_File_Name": "out", "Final_Frame": "3", "Initial_Frame": "1"},
            "declares": ["x=1", 'text="a b"'], "library": ["inc", "STANDARD"], "run_dir": ".",
            "uses": []},
    "manifest": {"files": [{"path": path, "sha256": "ab" * 32, "size": 5, "mtime": 1.5,
                            "after_frame": None} for path in ("a.pov", "d/b.inc")]},
}


@contextlib.contextmanager
def job_target(scratch: Path) -> Iterator[Callable[[random.Random], Result]]:
    """Submissions through the whole coordinator, without a socket."""
    farm = povfarm.Coordinator(scratch / "farm", bind="127.0.0.1", durable=False)
    fields = {"host": "127.0.0.1", "content-type": "application/json"}
    signer = signer_of(farm.access)
    seed = json.dumps(JOB).encode()

    def once(chance: random.Random) -> Result:
        body = mutated(seed, chance)
        signed = {**fields, **signer.headers(farm.key, "POST", "/api/v1/jobs", body)}
        answer = farm.router.handle(Request("POST", "/api/v1/jobs", {}, signed, BodyReader.of(body),
                                            target="/api/v1/jobs"))
        if answer.status >= 500:
            return "crash"
        if answer.status != 201:
            return "refused"
        wire = json.loads(body)
        root = scratch / "root"
        for entry in wire["manifest"]["files"]:
            if root.resolve() not in (root / entry["path"]).resolve().parents:
                return "wrong"
        if any("command" in key.lower() for key in wire["pov"]["values"]):
            return "wrong"
        job = json.loads(answer.body)["id"]
        directory = farm.store.job_directory(job, wire["name"][:100])
        if farm.data / "jobs" not in directory.resolve().parents:
            return "wrong"
        farm.scheduler.cancel(job)
        farm.scheduler.delete(job)
        return "accepted"

    try:
        yield once
    finally:
        problems = broken(farm.scheduler)
        farm.stop()
        assert problems == []


# --- clients of other systems: forms, zip files, XML and JSON

SIDE = 16  # pixels
ENGINE = [("engine povray", ".pov povray $RENDERONLINE:@uploaded_file +W16 +H16 "
           "+KFF$RENDERONLINE:last", "here"), ("argument last", "natural", "here")]


def form_of(*parts: Tuple[str, str, bytes]) -> bytes:
    """A form whose boundary is EDGE: the name, the name of the file and what is in it."""
    return b"".join(b'--EDGE\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (
        name.encode(), b'; filename="%s"' % file.encode() if file else b"", data)
        for name, file, data in parts) + b"--EDGE--\r\n"


def zip_of(files: Dict[str, bytes], method: int) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return data.getvalue()


class Strangers:
    """Clients of HTTPov, SheepIt and RenderOnline at a coordinator that takes them all."""

    def __init__(self, scratch: Path) -> None:
        self.clock = FakeClock()
        self.farm = povfarm.Coordinator(
            scratch / "farm", bind="127.0.0.1", durable=False, httpov=True, sheepit=True,
            renderonline=povfarm.OnlineRules.of(ENGINE), clock=self.clock)
        size = {"Width": f"{SIDE}", "Height": f"{SIDE}"}
        for values, slices in (({}, "2"), ({"Output_Alpha": "On"}, "off")):
            self.farm.scheduler.submit(
                "ball", "admin", pov_job(20_000, **size, **values), manifest({"scene.pov": SCENE}),
                povfarm.JobOptions(slices=slices, retry_limit=99))
        self.farm.scheduler.put_blob(sha256(SCENE), [SCENE])
        self.farm.access.add("anna", povfarm.Role.USER, {}, "a-ticket-that-is-new")
        with self.farm.store.read() as tx:
            self.token = povfarm.online_token(self.farm.key, "anna", tx.people()[0].added)
        self.picture = b"P6\n# x\n%d %d\n255\n" % (SIDE, SIDE) + bytes(range(256)) * 3

    def ask(self, path: str, query: Dict[str, str], body: bytes = b"", kind: str = "",
            method: str = "POST", **headers: str) -> Tuple[int, bytes]:
        self.clock.advance(1)
        answer = self.farm.router.handle(Request(
            method, path, query, {"host": "127.0.0.1", "content-type": kind, **headers},
            BodyReader.of(body)))
        with contextlib.closing(answer):
            data = answer.body if isinstance(answer.body, bytes) else b""
        assert answer.status < 500, (path, query, answer)
        return answer.status, data

    def httpov(self, chance: random.Random, number: int) -> Result:
        """A slice: the picture, the zip file that it is in, or the form is changed, or the query."""
        key = self.farm.access.guest_key
        query = {"client": f"h{number}:1", "version": "1.2", "cgroup": key, "job": "1"}
        batch = self.ask("/httpov.php", {**query, "command": "getbatch"})[1]
        if not batch.startswith(b"command=render\n"):
            return "wrong"
        query["batch"] = batch.split()[1][6:].decode()
        where = chance.randrange(4)
        picture = mutated(self.picture, chance) if where == 0 else self.picture
        packed = zip_of({"N_frame_00000001/slice_0000.ppm": picture,
                         "N_frame_00000001/batchreport_0000.txt": b"printed"}, chance.choice((0, 8)))
        form = form_of(("filedata", "N.zip", mutated(packed, chance) if where == 1 else packed))
        if where == 3:
            name = chance.choice([*query])
            query[name] = mutated(query[name].encode(), chance).decode("utf-8", "replace")
        answer = self.ask("/httpov.php", {"command": "postbatch", **query}, mutated(
            form, chance) if where == 2 else form, "multipart/form-data; boundary=EDGE")[1]
        if not re.fullmatch(rb"(?:(?:status|command|error|message)=[^\n]+\n){1,2}", answer):
            return "wrong"
        head = re.match(rb"P6(?:\s|#[^\n]*\n)+(\d+)\s+(\d+)\s+255\s", picture)
        good = head and (int(head[1]), int(head[2])) == (SIDE, SIDE) and len(
            picture) == head.end() + SIDE * SIDE * 3
        if answer == b"status=ok\n":
            return "accepted" if good or where else "wrong"
        return "refused"

    def sheepit(self, chance: random.Random, number: int) -> Result:
        """A login, a request with the list of a cache, a frame, an error."""
        login = {"login": "admin", "password": povfarm.sheepit_password(
            povfarm.secret_hash(self.farm.key)), "cpu_cores": "2", "os": "linux", "bits": "64bit",
            "version": "5.0.0", "hostname": f"s{number}"}
        answer = self.farm.router.handle(Request("GET", "/server/config.php", login))
        cookie = answer.headers["Set-Cookie"]
        cache = b'<?xml version="1.0" encoding="UTF-8"?><cache><file md5="%s"/></cache>' % (b"ab" * 16)
        said = self.ask("/server/request_job.php", {"computemethod": "1"}, mutated(cache, chance)
                        if chance.random() < 0.5 else cache, "application/x-www-form-urlencoded",
                        cookie=cookie)[1]
        frame = re.search(rb'frame="(\d+)"', said)
        values = {"job": "2", "frame": str(int(frame[1])) if frame else "1", "rendertime": "3",
                  "memoryused": "5", "extras": "", "type": "12"}
        if chance.random() < 0.3:
            name = chance.choice([*values])
            values[name] = mutated(values[name].encode(), chance).decode("utf-8", "replace")
        rows = (b"\0" + bytes(range(4 * SIDE))) * SIDE
        picture = png_of(rows, SIDE, SIDE, 8, 6)
        what = chance.choice(("send_frame", "send_frame", "error", "keepmealive"))
        form = form_of(("file", "1.png", picture if what == "send_frame" else b"renderer output\nx"))
        said = self.ask(f"/server/{what}.php", values, mutated(form, chance) if chance.random() < 0.7
                        else form, "multipart/form-data; boundary=EDGE", cookie=cookie)[1]
        root = ElementTree.fromstring(said)
        return "accepted" if root.attrib["status"] == "0" else "refused"

    def online(self, chance: random.Random, number: int) -> Result:
        """A scene with a wish in JSON, then what becomes of it."""
        fields = {"email": "anna", "token": self.token}
        wish = json.dumps({"EngineId": "1", "Arguments": [{"ArgTypeId": "last", "Value": "3"}]}).encode()
        where = chance.randrange(3)
        form = form_of(("request", "", mutated(wish, chance) if where == 0 else wish),
                       ("file", "a.pov", SCENE))
        status, said = self.ask("/renderapi/v1/enqueue", {}, mutated(form, chance) if where == 1
                                else form, "multipart/form-data; boundary=EDGE", **fields)
        if json.loads(said)["IsAdded"] is not (status == 200):
            return "wrong"
        with self.farm.store.read() as tx:
            newest = tx.newest_job()
        call = b'{"TaskId": %d}' % newest
        for what, flag in (("dequeue", "IsRemoved"), ("delete", "IsDeleted")):
            answer = self.ask(f"/renderapi/v1/{what}", {}, mutated(call, chance) if where == 2 else
                              call, "application/json", **fields)
            if json.loads(answer[1])[flag] is not (answer[0] == 200):
                return "wrong"
        with self.farm.store.read() as tx:
            left = tx.find_job(newest) if newest > 2 else None
        if left is not None:
            self.farm.scheduler.delete(newest)
        return "accepted" if status == 200 else "refused"

    def tidy(self, number: int) -> None:
        self.clock.advance(300)
        self.farm.scheduler.expire()
        if number % 100 == 99:
            self.clock.advance(povfarm.KEEP_GUESTS)
            self.farm.scheduler.tidy()


@contextlib.contextmanager
def dialects_target(scratch: Path) -> Iterator[Callable[[random.Random], Result]]:
    """What clients of other systems send, through the whole coordinator, without a socket."""
    strangers, numbers = Strangers(scratch), itertools.count()

    def once(chance: random.Random) -> Result:
        number = next(numbers)
        result = chance.choice((strangers.httpov, strangers.sheepit, strangers.online))(
            chance, number)
        strangers.tidy(number)
        outside = sorted(one.name for one in scratch.iterdir()) != ["farm"]
        return "wrong" if outside or list((scratch / "farm").glob("incoming/*")) else result

    try:
        yield once
    finally:
        problems = broken(strangers.farm.scheduler)
        strangers.farm.stop()
        assert problems == []


# --- pictures

def picture_seeds(scratch: Path) -> List[Tuple[bytes, str]]:
    """Small pictures of 5 by 4: some by the books, and what POV-Ray writes, where it is there."""
    rows = b"".join(b"\0" + bytes(range(y * 15, y * 15 + 15)) for y in range(4))
    seeds = [(png_of(rows, 5, 4), ".png"), (b"P6\n5 4\n255\n" + bytes(60), ".ppm"),
             (b"P5\n5 4\n65535\n" + bytes(40), ".ppm")]
    if shutil.which("povray"):
        (scratch / "s.pov").write_text("camera { location -3*z look_at 0 } light_source { -5, 1 } "
                                       "sphere { 0, 1 pigment { checker rgb 1 rgb x scale 0.1 } }")
        runs = [subprocess.Popen(["povray", "s.pov", f"+F{kind}", f"+O{kind}", "+W5", "+H4", "-D"],
                                 cwd=scratch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for kind in povfarm.IMAGE_TYPES]
        assert [run.wait(60) for run in runs] == [0] * len(runs)
        for kind, image in povfarm.IMAGE_TYPES.items():
            written, = scratch.glob(f"{kind}.*")
            seeds.append((written.read_bytes(), image.extension))
    return seeds


@contextlib.contextmanager
def picture_target(scratch: Path) -> Iterator[Callable[[random.Random], Result]]:
    """Pictures and slices of them as a worker delivers them; a PNG is decoded once more here."""
    seeds = picture_seeds(scratch)

    def once(chance: random.Random) -> Result:
        seed, extension = chance.choice(seeds)
        data = mutated(seed, chance)
        if extension == ".png" and chance.random() < 0.5:
            data = with_checksums(data)
        try:
            povfarm.check_image(data, extension, 5, 4)
        except povfarm.ImageError:
            return "refused"
        if extension != ".jpg":  # the one that cannot be cut: what is taken is whole
            strips = [crop_rows(data, extension, top, 2) for top in (0, 2)]
            whole = join_rows(strips, extension)
            povfarm.check_image(whole, extension, 5, 4)
        return "accepted" if extension != ".png" or decodes(data) else "wrong"

    yield once


def png_chunks(data: bytes) -> Iterator[Tuple[int, bytes, bytes]]:
    at = 8
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + size > len(data):
            return
        yield at, kind, data[at + 8:at + 8 + size]
        at += 12 + size


def with_checksums(data: bytes) -> bytes:
    """The same chunks with right checksums: the change is to be found behind them."""
    changed = bytearray(data)
    for at, kind, body in png_chunks(data):
        struct.pack_into(">I", changed, at + 8 + len(body), zlib.crc32(kind + body))
    return bytes(changed)


def decodes(data: bytes) -> bool:
    """Whether a PNG of 5 by 4 has all of its pixels."""
    chunks = list(png_chunks(data))
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[0][2])
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    pixels = zlib.decompress(b"".join(body for _, kind, body in chunks if kind == b"IDAT"))
    row = 1 + (width * channels * depth + 7) // 8
    return (width, height) == (5, 4) and len(pixels) == row * height


# --- INI files

INI_SEED = b"""; a job
Input_File_Name="a.pov"
Width=320
+H240 -J
Output_File_Name='out dir/b'
Output_File_Type=N8
Declare=x=1.5
Library_Path="inc"
Initial_Frame=1
Final_Frame=20
Clock=0.25
[other]
Antialias=On
Antialias_Threshold=0.3 ; more
"""


@contextlib.contextmanager
def ini_target(scratch: Path) -> Iterator[Callable[[random.Random], Result]]:
    """INI files as they lie beside a scene, and INI text as it goes to a worker."""
    (scratch / "a.pov").write_text("sphere { 0, 1 }")
    file = scratch / "x.ini"

    def once(chance: random.Random) -> Result:
        data = mutated(INI_SEED, chance)
        try:
            if chance.random() < 0.3:
                text = data.decode("latin-1")
                povfarm.check_ini(text)
            else:
                file.write_bytes(data)
                options = povfarm.read_command_line(["x"], scratch, {}, ())
                text = povfarm.to_ini(options.values, options.declares, options.library)
                povfarm.check_ini(text)
                povfarm.plan_frames(options)
        except UserError:
            return "refused"
        return "wrong" if re.search(r"(?im)^\s*\w*_command\s*=", text) else "accepted"

    yield once


TARGETS: Dict[str, Any] = {
    "http": http_target, "udp": udp_target, "zip": zip_target, "job": job_target,
    "dialects": dialects_target,
    "picture": picture_target, "ini": ini_target,
}


MOST_MEMORY = 300_000_000  # bytes: several times what this takes


def fuzz(name: str, rounds: int, seed: int, report: Callable[[str], Any]) -> Dict[str, int]:
    """Run one target; whatever is not as it should be is reported with its number."""
    counts = {"accepted": 0, "refused": 0, "crash": 0, "wrong": 0}
    with tempfile.TemporaryDirectory(prefix="povfarm-fuzz-") as scratch, \
            TARGETS[name](Path(scratch)) as once:
        for number in range(rounds):
            try:
                result = once(random.Random(f"{name} {seed} {number}"))
            except Exception as error:
                result = "crash"
                report(f"{name} --seed {seed}, number {number}: {error!r}")
            if result == "wrong":
                report(f"{name} --seed {seed}, number {number}: accepted wrongly")
            counts[result] += 1
    return counts


def peak_memory() -> int:
    """The most memory that this process has had, in bytes; 0 where nobody tells."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in text.splitlines() if "VmHWM" in line).split()[1])
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(TARGETS))
    options = parser.parse_args()
    total: Dict[str, int] = {}
    for name in options.only.split(","):
        began = time.monotonic()
        counts = fuzz(name, options.rounds, options.seed, print)
        for result, count in counts.items():
            total[result] = total.get(result, 0) + count
        if options.rounds >= 100 and not (counts["accepted"] and counts["refused"]):
            total["wrong"] += 1
            print(f"{name} takes everything or nothing: what is tried there tells nothing")
        print(f"{name:8} {options.rounds} inputs in {time.monotonic() - began:.1f} s: {counts}",
              flush=True)
    print(f"{sum(total.values())} inputs, {total['crash']} crashes, "
          f"{total['wrong']} accepted wrongly, peak memory {peak_memory() / 1e6:.0f} MB")
    sys.exit(1 if total["crash"] or total["wrong"] or peak_memory() > MOST_MEMORY else 0)


if __name__ == "__main__":
    main()
