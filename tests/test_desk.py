"""Jobs that a browser hands in, and the page of the people: also as plain forms, and in real Chromium."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import urllib.parse
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

import povfarm
from helpers.base import need
from helpers.browser import Browser, browser
from helpers.invariants import broken
from helpers.pages import Dom
from helpers.trust import place_of, request_of
from povfarm import BodyReader, Coordinator, JobState, Request, Response, Role

HOSTILE = "<script>alert(1)</script>"
BALL = b'#include "colors.inc"\n#include "tex.inc"\nsphere { 0, 1 pigment { Mine } }\n'
TEX = b"#declare Mine = pigment { rgb x }\n"
File = Tuple[str, bytes]


class House:
    """A coordinator that does not listen, with browsers that are logged in."""

    def __init__(self, data: Path) -> None:
        self.farm = Coordinator(data, bind="127.0.0.1", durable=False)
        self.farm.access.add("anna", Role.USER, {"jobs": 2}, "a-ticket-that-is-new")
        self.cookies = {name: f"{self.farm.access.cookie}=" + self.farm.access.log_in(
            self.farm.access.login_code(name)) for name in ("admin", "anna")}
        self.tells_length = True  # as browsers do

    def send(self, method: str, path: str, who: str, body: bytes = b"",
             kind: str = "application/x-www-form-urlencoded") -> Response:
        path, _, query = path.partition("?")
        cookie = self.cookies[who]
        return self.farm.router.handle(Request(
            method, place_of(self.farm.access, cookie) + path, dict(urllib.parse.parse_qsl(query)),
            {"host": "127.0.0.1", "accept": "text/html", "cookie": cookie, "content-type": kind},
            BodyReader.of(body) if self.tells_length else BodyReader(iter([body, b""]), None)))

    def page(self, path: str, who: str = "admin", status: int = 200) -> Dom:
        return self.shown(self.send("GET", path, who), status)

    def shown(self, answer: Response, status: int) -> Dom:
        assert isinstance(answer.body, bytes) and answer.status == status, answer.body
        dom = Dom(answer.body.decode())
        dom.harmless()
        return dom

    def token(self, who: str) -> str:
        return self.farm.access.form_token(
            request_of(self.farm.access, {"cookie": self.cookies[who]}))

    def press(self, path: str, who: str = "admin", **fields: str) -> Response:
        """Send a plain form."""
        body = urllib.parse.urlencode({"token": self.token(who), **fields}).encode()
        return self.send("POST", path, who, body)

    def hand_in(self, *files: File, who: str = "admin", **fields: str) -> Response:
        """Send the form with files as a browser does."""
        parts: List[Tuple[str, bytes]] = [(f'name="{name}"', value.encode()) for name, value in
                                          {"token": self.token(who), **fields}.items()]
        parts += [(f'name="files"; filename="{name}"', data) for name, data in files]
        body = b"".join(b'--EDGE\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n' % (
            head.encode(), data) for head, data in parts) + b"--EDGE--\r\n"
        return self.send("POST", "/submit", who, body, "multipart/form-data; boundary=EDGE")

    def kept(self) -> List[str]:
        """What is there of uploads."""
        place = self.farm.data / "incoming"
        return sorted(path.name for path in place.rglob("*") if path.is_file())

    def jobs(self) -> List[Any]:
        with self.farm.store.read() as tx:
            return list(tx.jobs(0, -1))


@pytest.fixture(name="house")
def house_fixture(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "data")
    yield house
    assert broken(house.farm.scheduler) == []
    house.farm.stop()


# --- jobs

def test_a_job_is_handed_in_by_plain_forms(house: House) -> None:
    page = house.page("/submit", "anna")
    form, = page.all("form", enctype="multipart/form-data")
    assert form["action"].endswith("/submit") and page.all("input", webkitdirectory="")
    assert house.hand_in(("ball.pov", BALL), who="anna",
                         command="povray ball.pov +W320 +H240 +KFF24").status == 303
    page = house.page("/submit", "anna")
    assert "ball.pov:2 includes 'tex.inc': it can only use what was sent" in page.text
    assert not page.all("button", value="render"), "what is missing is said before"
    assert house.hand_in(who="anna", command="+KFF24", do="render").status == 303, "no way around"
    assert house.jobs() == []
    house.hand_in(("tex.inc", TEX), who="anna", command="+KFF12 +W320 +H240", do="render")
    page = house.page("/submit", "anna")
    for words in ("ball is ready", "12 frames", "320 x 240", "ball01.png to ball12.png",
                  f"2 files, {len(BALL + TEX)} B",
                  "Render 12 frames"):
        assert words in page.text, page.text
    assert page.all("input", name="command", value="+KFF12 +W320 +H240")
    assert house.jobs() == [], "nothing is rendered that was not seen"
    answer = house.hand_in(who="anna", command="+KFF12 +W320 +H240", do="render")
    job, = house.jobs()
    assert (answer.status, f"/jobs/{job.id}?did=" in answer.headers["Location"]) == (303, True)
    assert (job.name, job.owner, job.state, len(job.pov.plan.frames)) == (
        "ball", "anna", JobState.ACTIVE, 12)
    assert house.kept() == [] and "Drop a scene" in house.page("/submit", "anna").text


def packed(**files: bytes) -> bytes:
    to = io.BytesIO()
    with zipfile.ZipFile(to, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), data)
    return to.getvalue()


@pytest.mark.parametrize("files", [
    [("p.zip", packed(balls__ball_pov=BALL, balls__tex_inc=TEX))],
    [("balls/ball.pov", BALL), ("balls/tex.inc", TEX)],
    [("balls/ball.pov", BALL), ("tex.inc", TEX)],  # the second comes later
    [("C:\\balls\\ball.pov", BALL), ("C:\\balls\\tex.inc", TEX)],
    [("ball.pov", BALL), ("tex.inc", TEX), ("ball.ini", b"Input_File_Name=ball.pov\nWidth=99\n")],
])
def test_a_zip_a_folder_and_an_ini_file_are_taken_as_they_are(house: House, files: List[File]) -> None:
    for file in files:
        assert house.hand_in(file).status == 303
    page = house.page("/submit")
    assert "ball is ready to render" in page.text
    assert ("99 x" in page.text) == any(name == "ball.ini" for name, _ in files)


@pytest.mark.parametrize("files, command, words", [
    ([], "", "No file was chosen"),
    ([("../ball.pov", BALL)], "", "is not a name of a file inside a project"),
    ([("a/../../ball.pov", BALL)], "", "is not a name of a file inside a project"),
    ([("p.zip", b"PK")], "", "damaged or no zip file"),
    ([("p.zip", packed(___etc__passwd=b""))], "", "is not a name of a file inside a project"),
    ([("a", b""), ("a/b", b"")], "", "These files cannot be kept"),
    ([("d/" * 1500 + "a.pov", BALL)], "", "lies in more than 100 directories"),
])
def test_what_cannot_be_taken_is_refused_and_nothing_is_kept(
        house: House, files: List[File], command: str, words: str) -> None:
    text = house.shown(house.hand_in(*files, command=command), 400).text
    assert words in text and str(house.farm.data) not in text
    assert house.kept() == []


@pytest.mark.parametrize("scene, command, words", [
    (b"", "two.pov", "the scene 'two.pov' is not there"),
    (b"", "ball.pov +KFF0 +KFI5", "no frames"),
    (b"", "ball.pov +W'3", "a quote in the command line has no other end"),
    (b"", "ball.pov -D /etc/hostname", "scene or INI file called '/etc/hostname' here"),
    (b"", "ball.pov HERE/secret", "scene or INI file called 'HERE/secret' here"),
    (b"", "ball.pov hostname", "scene or INI file called 'hostname' here"),
    (b"", "ball.pov +L/etc", "the library path '/etc' is not in what was sent"),
    (b"", "ball.pov +L..", "the library path '..' is not in what was sent"),
    *((b"", f"ball.pov {switch}{name}", f"the {what} '{name}' is not in what was sent")
      for switch, what in (("+I", "scene"), ("+RFI +RF", "file"))
      for name in ("HERE/secret.pov", "HERE/gone.pov", "../../../../secret.pov", "../../../../gone.pov")),
    (b'#include "/etc/hostname"', "", "ball.pov:1 includes '/etc/hostname': it can"),
    (b'#include "../../../../secret.inc"', "", "ball.pov:1 includes '../../../../secret.inc': it can"),
    (b'#include "../../../../SECRET.inc"', "", "ball.pov:1 includes '../../../../SECRET.inc': it can"),
    *((b'#if (0) #include "../../../../%s.inc" #end' % name, "",
       f"ball.pov:1 includes '../../../../{name.decode()}.inc' (it may not be needed)")
      for name in (b"secret", b"gone")),
    (b'#include "other.ini"', "other.ini", "there is no INI file 'HERE/secret.ini'"),
    (b"", "ball.pov HERE/secret.ini", "there is no INI file 'HERE/secret.ini'"),
    pytest.param(bytes(povfarm.MAX_SCENE + 1), "", "too long to be looked into here",
                 marks=pytest.mark.slow),  # looked into by a process of its own
    (b"", 'ball.pov Pre_Frame_Command="rm -rf /"', "Pre_Frame_Command"),
    (f"// {HOSTILE}".encode(), f"{HOSTILE}.pov", HOSTILE),
])
def test_a_report_says_what_is_wrong_and_nothing_of_this_computer(
        house: House, scene: bytes, command: str, words: str) -> None:
    """Out of what was sent no name leads: not of the scene, an INI file or the command line."""
    here = str(house.farm.data.parent)
    Path(here, "secret.inc").write_text("#declare A = 1;")
    Path(here, "secret.ini").write_text("Width=77")
    Path(here, "secret.pov").touch()
    assert house.hand_in(("ball.pov", scene), ("other.ini", f'"{here}/secret.ini"\n'.encode()),
                         command=(command or "ball.pov").replace("HERE", here)).status == 303
    page = house.page("/submit")
    assert words.replace("HERE", here) in page.text, page.text
    for secret in (str(house.farm.data), "neither in", "77 x", "which is"):
        assert secret not in page.text, page.text


def test_a_form_shows_its_token_before_its_files(house: House) -> None:
    def edge(name: str, value: bytes) -> bytes:
        return b'--E\r\nContent-Disposition: form-data; name=%s\r\n\r\n%s\r\n' % (name.encode(), value)

    file, token = edge('"files"; filename="a.pov"', b""), edge('"token"', house.token("anna").encode())
    for parts, status in ((file + token, 403), (file, 403), (edge('"token"', b"x") + file, 403),
                          (token + file, 303)):
        answer = house.send("POST", "/submit", "anna", parts + b"--E--\r\n",
                            "multipart/form-data; boundary=E")
        assert answer.status == status
        assert house.kept() == ["a.pov", "command"] * (status == 303)


def test_an_upload_is_bounded_and_everybodys_own(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.hand_in(("ball.pov", b""), who="anna")
    assert "Drop a scene" in house.page("/submit", "admin").text
    house.farm.scheduler.people.change("anna", {"space": 1000})
    text = house.shown(house.hand_in(("big.pov", bytes(2000)), who="anna"), 400).text
    assert "all may have 1.0 kB" in text
    for at in range(3):  # each by itself would do
        status = house.hand_in((f"{at}.inc", bytes(400)), who="anna").status
    assert status == 400
    house.tells_length = False
    assert house.hand_in(("small.inc", b""), who="anna").status == 400
    assert house.hand_in(("small.inc", b""), who="admin").status == 303
    house.tells_length = True
    house.press("/submit/forget", "admin")
    monkeypatch.setattr(povfarm, "MAX_FILES", 1)
    assert house.hand_in(("a.inc", b""), ("b.inc", b""), who="anna").status == 400
    house.press("/submit/forget", "anna")
    assert house.kept() == []
    house.hand_in(("ball.pov", b""), who="anna")
    monkeypatch.setattr(povfarm, "UPLOAD_TIME", -1.0)
    house.page("/submit", "admin")
    assert house.kept() == [], "old ones go when somebody looks"


def test_a_limit_is_told_before_anything_is_rendered(house: House) -> None:
    for _ in range(2):
        house.hand_in(("ball.pov", b""), who="anna")
        house.hand_in(who="anna", do="render")
    house.hand_in(("ball.pov", b""), who="anna")
    assert "and may have 2" in house.page("/submit", "anna").text
    assert len(house.jobs()) == 2


# --- people

def test_who_one_is_and_may_have(house: House) -> None:
    page = house.page("/people", "anna")
    assert "You are anna. You submit jobs" in page.text and "0 of 2" in page.text
    assert not page.all("form", action="/people/") and "Invite" not in page.text
    for path in ("invite", "anna/set", "anna/remove"):
        assert house.press(f"/people/{path}", "anna").status == 403


def test_the_admin_invites_changes_and_removes_by_forms(house: House) -> None:
    values: Dict[str, str] = {"role": "user", "jobs": "0", "frames": "0", "priority": "0",
                              "workers": "3", "space": "5G"}
    assert house.press("/people/invite", uses="30", **values).status == 303
    told = house.page("/people").text
    assert "login --" in told and "--code CODE --user NAME" in told
    assert "127.0.0.1" not in told, "an address that no other computer reaches"
    with house.farm.store.read() as tx:
        invitation, = tx.people(invited=True)
    assert invitation.limits == {"workers": 3, "space": 5_000_000_000} and invitation.uses == 30
    code = house.farm.access.code_of(invitation)
    assert invitation.token == povfarm.invitation_secret(code), "people come by it"
    assert code in house.page("/people").text and code not in house.page("/people", "anna").text
    assert "workers 3, space 5.0 GB" in house.page("/people").text
    link, = house.page("/people").all("a", href="ask=%2Fpeople%2Fanna%2Fset")
    page = house.page(link["href"][link["href"].index("/people"):].partition("#")[0])
    assert page.all("form", action="/people/anna/set") and page.all("input", name="jobs", value="2")
    assert house.press("/people/anna/set", **{**values, "role": "viewer", "jobs": "7"}).status == 303
    with house.farm.store.read() as tx:
        anna = tx.person("anna")
    assert anna and anna.role == "viewer" and anna.limits["jobs"] == 7
    assert house.send("GET", "/submit", "anna").status == 403, "from now on"
    assert "anna: jobs = 7, workers = 3, space = 5000000000, role = viewer" in house.page("/events").text
    for wrong in ({"role": "admin"}, {"jobs": "-1"}, {"space": "much"}, {"uses": "0"}):
        assert house.press("/people/invite", **{"uses": "1", **values, **wrong}).status == 400
    assert house.press("/people/bob/set", **values).status == 404
    assert house.press("/people/anna/remove").status == 303
    assert "anna" not in [row["name"] for row in house.page("/people").all("input")]
    ask, = house.page("/people").all("a", href="remove#asked")
    page = house.page(ask["href"][ask["href"].index("/people"):].partition("#")[0])
    form, = page.all("form", action=f"/people/{invitation.name}/remove")
    assert house.press(form["action"][form["action"].index("/people"):]).status == 303
    with house.farm.store.read() as tx:
        assert tx.person("anna") is None and tx.people(invited=True) == []


# --- in a real browser

DROP = """
const entry = (name, text) => ({isFile: true, name, file: good => good(new File([text], name))});
let inside = [entry('ball.pov', arguments[0]), {isFile: false, name: 'more', createReader: () => {
  let rest = [entry('tex.inc', arguments[1])];
  return {readEntries: good => { good(rest); rest = []; }};
}}];
const folder = {isFile: false, name: 'balls', createReader: () => ({readEntries: good => {
  good(inside); inside = [];
}})};
const drop = new Event('drop', {bubbles: true, cancelable: true});
drop.dataTransfer = {types: ['Files'], items: [{webkitGetAsEntry: () => folder}]};
document.querySelector('.drop p').dispatchEvent(drop);
"""


# How many stops Tab makes, and what a finger or a pointer cannot hit: smaller than so many pixels.
STOPS = """return [...document.querySelectorAll('a[href], button, input, select, summary, [tabindex]')]
  .filter(one => one.tabIndex >= 0 && one.type !== 'hidden' && one.checkVisibility()).length"""
SMALL = """return [...document.querySelectorAll(
    'button, .button, input:not([type=hidden]), select, summary, nav a, .grid a')]
  .filter(one => one.checkVisibility()).map(one => [one, one.getBoundingClientRect()])
  .filter(([one, box]) => box.height < arguments[0] || box.width < 24)
  .map(([one, box]) => one.outerHTML.slice(0, 80) + box.width + 'x' + box.height)"""


def well_made(window: Browser, touch: bool) -> None:
    """Nothing scrolls sideways, nothing is too small, and Tab is soon through."""
    assert window.run("return document.documentElement.scrollWidth") <= 320
    assert window.run(STOPS) <= 40
    assert window.run(SMALL, 44 if touch else 24) == []


@pytest.mark.slow
@pytest.mark.parametrize("touch", [False, True])
def test_every_page_fits_a_finger_a_small_screen_and_the_keyboard(tmp_path: Path, touch: bool) -> None:
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False)
    farm.start()
    farm.access.add("anna", Role.USER, {}, "a-ticket-that-is-new")
    farm.scheduler.join(povfarm.WorkerInfo(HOSTILE, 64, 1, "x", {}), "t", "10.0.0.7", "ABCDEF")
    pov = povfarm.PovJob({"Input_File_Name": "a.pov", "Final_Frame": "2000"}, (), (), ".")
    farm.scheduler.submit("W" * 90, "anna", pov, povfarm.Manifest(()), povfarm.JobOptions())
    try:
        with browser(tmp_path, width=320) as window:
            window.devtools("Emulation.setTouchEmulationEnabled", enabled=touch)
            window.open(farm.url + f"/login/{farm.access.login_code()}")
            here = window.run("return location.href")
            for page in ("", "submit", "people", "people?ask=/people/anna/set", "computers", "events",
                         "jobs/1", "jobs/1/frames/1"):
                window.open(here + page)
                assert window.run("return matchMedia('(pointer: coarse)').matches") == touch
                well_made(window, touch)
                assert window.complaints() == [], page
    finally:
        farm.stop()


def test_a_text_browser_shows_every_state_in_words(tmp_path: Path) -> None:
    """In w3m and in lynx, logged in by a link as by any browser."""
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False)
    farm.start()
    farm.scheduler.join(povfarm.WorkerInfo("laptop", 2, 1, "x", {}), "t", "10.0.0.7", "ABCDEF")
    for name in ("waits", "held", "off"):
        pov = povfarm.PovJob({"Input_File_Name": "a.pov", "Final_Frame": "3"}, (), (), ".")
        farm.scheduler.submit(name, "me", pov, povfarm.Manifest(()), povfarm.JobOptions())
    farm.scheduler.pause(2)
    farm.scheduler.cancel(3)
    session = farm.access.log_in(farm.access.login_code())
    place = farm.access.place(session)
    cookies = tmp_path / "cookies"  # in Netscape's format
    cookies.write_text(f"127.0.0.1\tFALSE\t{place}/\tFALSE\t4000000000\t{farm.access.cookie}\t{session}\n")
    said = dict.fromkeys(("/", "/jobs/1", "/computers", "/submit", "/people"), "")
    config = tmp_path / "lynx.cfg"
    config.write_text("PERSISTENT_COOKIES:TRUE\nCOOKIE_SAVE_FILE:/dev/null\n")
    try:
        for command in (["w3m", "-dump", "-cols", "100", "-header", f"Cookie: {farm.access.cookie}={session}"],
                        ["lynx", "-dump", "-width=100", "-display_charset=utf-8", f"-cfg={config}",
                         f"-cookie_file={cookies}"]):
            need(command[0], shutil.which(command[0]) is not None,
                 f"{command[0]} is not installed: apt-get install {command[0]}")
            for page in said:
                said[page] = subprocess.run(
                    [*command, farm.url + place + page], env={**os.environ, "HOME": str(tmp_path)},
                    stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True).stdout
            every_state_is_said(said)
    finally:
        farm.stop()


def every_state_is_said(said: Dict[str, str]) -> None:
    for page, words in (("/", ["waits is waiting", "‖ paused", "⊘ cancelled", "asks to join", "Admit",
                               "Refuse", "Resume"]), ("/jobs/1", ["3 queued", "Pause", "Cancel"]),
                        ("/computers", ["? asks to join"]), ("/submit", ["Files, or a zip", "Look at it"]),
                        ("/people", ["Make a code"])):
        for word in words:
            assert word in said[page], said[page]


@pytest.mark.slow
def test_without_javascript_a_job_is_handed_in_and_steered(tmp_path: Path) -> None:
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", durable=False)
    farm.start()
    (tmp_path / "ball.pov").write_bytes(b"sphere { 0, 1 }")
    try:
        with browser(tmp_path, javascript=False) as window:
            window.open(farm.url + f"/login/{farm.access.login_code()}")
            window.type("[name=files]", str(tmp_path / "ball.pov"))
            window.type("[name=command]", "+W64 +H48")
            window.click("button[value=look]")
            window.wait("document.body.innerText.includes('ball is ready to render')", "no report")
            window.click("button[value=render]")
            window.wait("document.body.innerText.includes('ball was submitted, by admin') ||"
                        " document.body.innerText.includes('ball is ready to render, by admin')", "no job")
            window.click("form[action$='/pause'] button")
            window.wait("document.body.innerText.includes('ball is paused, by admin')", "not paused")
    finally:
        farm.stop()


@pytest.mark.slow
def test_a_pupil_drops_a_folder_and_the_teacher_lets_a_computer_in(tmp_path: Path) -> None:
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", name=HOSTILE, durable=False)
    farm.start()
    farm.access.add("anna", Role.USER, {}, "a-ticket-that-is-new")
    info = povfarm.WorkerInfo(HOSTILE, 2, 1, HOSTILE, {"povray": HOSTILE}, (HOSTILE,))
    farm.scheduler.join(info, "t", "10.0.0.7", "ABCDEF")
    try:
        with browser(tmp_path, width=320) as window:
            window.open(farm.url + f"/login/{farm.access.login_code('anna')}")
            assert "You are anna" in window.text()
            window.type("[name=command]", f"+W64 '{HOSTILE}.ini'")
            window.run(DROP, BALL.decode(), TEX.decode())
            window.wait("document.querySelector('h1').innerText.includes('cannot')", "no report")
            assert HOSTILE in window.text()
            window.run("document.querySelector('[name=command]').value = '+W64 +H48 +Lmore'")
            window.click("button[value=look]")
            window.wait("document.querySelector('button[value=render]')", "it is not ready")
            assert "ball is ready to render" in window.text() and "64 x 48" in window.text()
            assert window.run("return document.documentElement.scrollWidth") <= 320
            window.click("button[value=render]")
            window.wait("location.pathname.endsWith('/jobs/1')", "no job")
            window.open(farm.url + f"/login/{farm.access.login_code()}")
            for page in ("submit", "people", "computers"):
                window.run("location.href = document.querySelector("
                           "`nav a[href$='/${arguments[0]}']`).href", page)
                window.wait(f"location.pathname.endsWith('/{page}')", "no page")
                assert window.run("return document.documentElement.scrollWidth") <= 320, page
            window.click("form[action$='/admit'] button")
            window.wait("document.body.innerText.includes('○ idle')", "it is not let in")
            assert not window.run("return [...document.querySelectorAll('body script')].length")
            assert window.complaints() == []
    finally:
        farm.stop()
