"""The status page: what it says, who may do what, and that nothing on it is taken for HTML."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import re
import shutil
import time
import urllib.parse
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import pytest

import povfarm
from helpers.base import need, run_povray
from helpers.browser import ELEMENT, browser
from helpers.invariants import broken
from helpers.pages import Dom, Recorder, chromium
from helpers.pictures import png, png_of, png_rows
from helpers.trust import place_of
from povfarm import (
    Access,
    Api,
    BodyReader,
    Clock,
    Coordinator,
    Cost,
    FileEntry,
    Html,
    JobOptions,
    LeaseSpec,
    Manifest,
    Offer,
    Pages,
    PovJob,
    Request,
    Response,
    Role,
    Router,
    Scheduler,
    Store,
    WorkerInfo,
    element,
)

HOSTILE = "<script>alert('1')</script>\"><b onclick=x>&amp;"
SCENE = """#version 3.7; global_settings { assumed_gamma 1 }
camera { location -3*z look_at 0 } light_source { <5, 5, -5> rgb 1 }
sphere { 0, 1 pigment { rgb <1, .5, .2> } }"""


class Farm:
    """A coordinator without a socket, and a worker that delivers what it is told to."""

    def __init__(self, path: Path, private: bool = False) -> None:
        self.store = Store(path, durable=False)
        with self.store.tx() as tx:
            tx.set_meta("farm_id", "0123456789abcdef")
        self.scheduler = Scheduler(self.store, Clock())
        self.access = Access(self.store, "k" * 64, private, Clock(), self.scheduler.people)
        self.api = Api(self.scheduler, self.access, "the attic")
        pages = Pages(self.api, self.scheduler, self.access)
        self.router = Router(self.api, pages, authenticate=self.access.identify,
                             error_page=pages.error_page)
        self.admin, self.did = self.log_in(), ""

    def log_in(self) -> str:
        return f"{self.access.cookie}={self.access.log_in(self.access.login_code())}"

    def send(self, method: str, address: str, cookie: str = "",
             body: Optional[Dict[str, str]] = None, **headers: str) -> Response:
        path, _, query = address.partition("?")
        place = place_of(self.access, cookie)
        headers = {"host": "farm.local:2271", "accept": "text/html", "cookie": cookie,
                   **{name.replace("_", "-"): value for name, value in headers.items()},
                   "content-type": "application/x-www-form-urlencoded"}
        answer = self.router.handle(Request(
            method, place + path, dict(urllib.parse.parse_qsl(query)), headers,
            BodyReader.of(urllib.parse.urlencode(body or {}).encode())))
        if answer.status == 303 and place:
            start, _, to = answer.headers["Location"].partition(place)
            answer.headers["Location"], _, self.did = to.partition("?did=")
            assert not start
        return answer

    def page(self, address: str, cookie: str = "", status: int = 200, **headers: str) -> Dom:
        response = self.send("GET", address, cookie, **headers)
        assert response.status == status and isinstance(response.body, bytes)
        place = place_of(self.access, cookie)
        if cookie and self.access.identify(Request("GET", place + "/", headers={"cookie": cookie})).name:
            assert not re.findall(f' (?:href|src|action)="/(?!{place[1:]})', response.body.decode())
        dom = Dom(response.body.decode().replace(f'"{place}/', '"/'))
        dom.harmless()
        return dom

    def token(self, cookie: str) -> str:
        return self.access.form_token(Request("GET", place_of(self.access, cookie) + "/",
                                              headers={"cookie": cookie}))

    def submit(self, frames: int = 5, name: str = "marbles", slices: str = "auto",
               **values: str) -> int:
        values = {"Input_File_Name": "a.pov", "Width": "4", "Height": "3",
                  "Output_File_Type": "N", "Final_Frame": str(frames), **values}
        return self.scheduler.submit(name, "somebody", PovJob(values, (), (), "."),
                                     Manifest(()), JobOptions(retry_limit=1, slices=slices))[0]

    def join(self, name: str = "laptop", admitted: bool = True, version: str = "3.7.0.10") -> int:
        info = WorkerInfo(name, 2, 1 << 30, "Linux", {"povray": version})
        return self.scheduler.join(info, name, "10.0.0.7",
                                   "" if admitted else "ABCDEF")

    def lease(self, worker: int) -> LeaseSpec:
        """One frame, as they are said to take long."""
        lease, = self.scheduler.lease(worker, Offer(1, 1, 1), 0, always)
        assert len(lease.tasks) == 1
        return lease

    def deliver(self, worker: int, count: int, image: bytes = b"") -> None:
        for _ in range(count):
            lease = self.lease(worker)
            self.scheduler.finish(worker, lease.id, lease.tasks[0].id, image or png(), b"a log",
                                  Cost(cpu=20, wall=20))

    def fail(self, worker: int, message: str) -> int:
        lease = self.lease(worker)
        self.scheduler.fail(worker, lease.id, lease.tasks[0].id, message,
                            f"POV-Ray says {HOSTILE}".encode(), False)
        return lease.tasks[0].frame


def always() -> bool:
    return True


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    made = Farm(tmp_path)
    yield made
    assert broken(made.scheduler) == []
    made.store.close()


def test_element_escapes_all_that_is_not_html() -> None:
    inner = element("i", "<", class_="a\"b'")
    assert inner == "<i class=\"a&quot;b&#x27;\">&lt;</i>"
    assert element("p", inner, ["&", None, 7], title=None) == f"<p>{inner}&amp;7</p>"
    assert element("meta", http_equiv="refresh") == '<meta http-equiv="refresh">'
    assert not isinstance(inner + "<", Html), "what is put together by hand is escaped again"


def test_an_empty_farm_says_what_to_type(farm: Farm) -> None:
    dom = farm.page("/")
    assert "the attic" in dom.text and "Nothing to render" in dom.text
    assert "povfarm.py submit scene.pov +W640 +H480" in dom.text
    for address in ("/", "/computers"):
        assert "povfarm.py work --server http://farm.local:2271" in farm.page(address).text


def test_only_workers_of_ours_are_missed(farm: Farm) -> None:
    """Clients of other systems sleep for minutes, and end without a word."""
    for name, token in (("attic", "HTTPov attic"), ("cellar", "c" * 64)):
        worker = farm.scheduler.join(povfarm.WorkerInfo(name, 1, 0, "", {}), token, "::1")
        farm.scheduler._states.presence(worker).seen = farm.scheduler.clock.monotonic() - 200
    assert re.findall(r"(\w+) has been silent", farm.page("/").text) == ["cellar"]


def test_who_rendered_what_is_told_below_the_workers(farm: Farm) -> None:
    assert "Rendered so far" not in farm.page("/computers").text
    farm.submit()
    farm.deliver(farm.join(), 2)
    text, heads = farm.page("/computers").text, "FramesTimeFailed tries"
    assert f"Worker{heads}laptop240 s0" in text and f"Computer{heads}" not in text, "it is the same"
    farm.submit()
    farm.deliver(farm.scheduler.join(
        povfarm.WorkerInfo("eve@attic", 1, 0, "", {}, ("roof",)), "t", "::1"), 2)
    text = farm.page("/computers").text
    assert f"Computer{heads}" in text and "attic" in text and f"Group{heads}" in text, text


@pytest.mark.parametrize("host", ["x;rm -rf ~", "$(id)", "<b>", ""])
def test_a_host_that_a_shell_would_act_on_is_not_shown(farm: Farm, host: str) -> None:
    dom = farm.page("/computers", host=host)
    assert "work --server http://HOST:2271" in dom.text and (not host or host not in dom.text)


@pytest.mark.parametrize("remote, host", [
    ("192.168.1.9", "farm.local:2271"), ("192.168.1.9", "127.0.0.1:2271"),
    ("127.0.0.1", "farm.local"), ("192.168.1.9", "localhost")])
def test_where_povfarm_and_its_data_are_is_shown_on_this_computer_only(
        farm: Farm, remote: str, host: str) -> None:
    """Also not to who says that he is here, or right after it was shown here."""
    job = farm.submit()
    pages = Pages(farm.api, farm.scheduler, farm.access,
                  typed="python3 /home/anna/povfarm.py {} --data /home/anna/farm".format)
    router = Router(pages, authenticate=farm.access.identify, error_page=pages.error_page)

    def shown(remote: str, host: str) -> str:
        return "".join(bytes(router.handle(Request(
            "GET", path, headers={"host": host, "accept": "text/html", "cache-control": "max-age=1"},
            remote=remote)).body or b"").decode()
            for path in ("/", f"/jobs/{job}", "/computers", "/events", "/people", "/none"))

    here = shown("127.0.0.1", "127.0.0.1:2271")
    assert "/home/anna/povfarm.py login --data /home/anna/farm" in here
    assert shown("::1", "[::1]:2271").count("/home/anna") == here.count("/home/anna")
    there = shown(remote, host)
    assert "povfarm.py login" in there and "anna" not in there and "python3" not in there


def test_the_farm_while_it_renders(farm: Farm) -> None:
    job, worker = farm.submit(), farm.join()
    farm.deliver(worker, 2)
    lease = farm.lease(worker)
    farm.scheduler.beat(worker, {lease.id: {lease.tasks[0].id: 0.5}}, 0)
    dom = farm.page("/")
    assert "Rendering marbles" in dom.text and "1 of 1 computer at work" in dom.text
    assert "2 of 5" in dom.text and "● working marbles frame 3" in dom.text
    assert "1 of 2 cores busy" in dom.text and "3.7.0.10" in farm.page("/computers").text
    assert "frame 2 is done, like 1 other before it" in dom.text and "was submitted, by somebody: 5 frames" in dom.text
    assert dom.all("img", src=f"/api/v1/jobs/{job}/frames/2/image")
    bars = dom.all("svg")
    assert dom.all("div", id="player")[0]["data-frames"] == "1-2"
    assert "Farm Computers What happened" in dom.text, "also in a browser that knows no style"
    assert re.search(r"2 of 5 \d+ seconds? left", dom.text)
    assert [bar["aria-label"] for bar in bars] == ["50 percent"] * 2, "now, and in the queue"
    assert [float(rect["width"]) for rect in dom.all("rect")] == [400, 100, 0] * 2
    assert dom.all("title") and "50 % marbles" in dom.text


def test_the_page_of_a_job(farm: Farm) -> None:
    job, worker = farm.submit(frames=9), farm.join()
    farm.deliver(worker, 2)
    failed = farm.fail(worker, "no such colour")
    lease = farm.lease(worker)
    farm.scheduler.beat(worker, {lease.id: {lease.tasks[0].id: 0.4}}, 0)
    dom = farm.page(f"/jobs/{job}")
    frames = f"/jobs/{job}/frames"
    assert [cell["class"] for cell in dom.all("a", title="frame ")] == [
        "done", "done", "failed", "leased p4", *["queued"] * 5]
    assert dom.all("a", href=f"{frames}/1", class_="done")
    assert dom.all("a", href=f"{frames}/{failed}#log", class_="failed")
    assert f"Frame {failed} failed: no such colour" in dom.text and "40%" in dom.text
    assert dom.all("a", href=f"/api/v1/jobs/{job}/archive.zip")
    assert "Width=4" in dom.text and "somebody" in dom.text
    assert "2 finished" in dom.text and "1 in work" in dom.text and "1 failed" in dom.text
    assert len(dom.all("div", class_="picture")) == 1, "the newest image"
    player, = dom.all("div", id="player")
    assert player["data-frames"] == "1-2"
    farm.scheduler.leave(worker)


def test_the_page_of_a_frame(farm: Farm) -> None:
    job, worker = farm.submit(), farm.join()
    farm.deliver(worker, 1)
    farm.fail(worker, "the sky fell")
    done, failed = farm.page(f"/jobs/{job}/frames/1"), farm.page(f"/jobs/{job}/frames/2")
    assert done.all("img", src=f"/api/v1/jobs/{job}/frames/1/image", width="4", height="3")
    assert "✓ finished" in done.text and "a1.png" in done.text and "laptop" in done.text
    assert "a log" in done.text and done.all("a", href=f"/jobs/{job}/frames/2")
    assert not failed.all("img", src="/api/") and "the sky fell" in failed.text
    assert f"POV-Ray says {HOSTILE}" in failed.text
    assert failed.all("p", class_="notice failed") and not done.all("p", class_="notice")


@pytest.mark.parametrize("address, words", [
    ("/jobs/77", "There is no job 77."), ("/jobs/77/frames/1", "There is no job 77."),
    ("/jobs/1/frames/99", "Job 1 has no frame 99."),
])
def test_what_is_not_there_is_a_page_too(farm: Farm, address: str, words: str) -> None:
    farm.submit()
    dom = farm.page(address, status=404)
    assert words in dom.text and dom.all("a", href="/")


def test_ten_thousand_frames_are_a_small_page_of_blocks(farm: Farm) -> None:
    job, worker = farm.submit(frames=10_000), farm.join()
    farm.deliver(worker, 30)
    farm.fail(worker, "")
    response = farm.send("GET", f"/jobs/{job}")
    assert isinstance(response.body, bytes) and len(response.body) < 60_000
    dom = farm.page(f"/jobs/{job}")
    blocks = dom.all("a", title="frames ")
    assert len(blocks) == 400 and not dom.all("a", title="frame ")
    assert [block["class"] for block in blocks[:3]] == ["done", "failed", "queued p0"]
    assert blocks[0]["title"] == "frames 1 to 25: 25 ✓ finished"
    part = farm.page(blocks[1]["href"].partition("#")[0])
    cells = part.all("a", title="frame ")
    assert [cell["title"].split(":")[0] for cell in cells] == [
        f"frame {number}" for number in range(26, 51)]


def test_a_type_that_no_browser_shows_is_shown_as_a_png(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    job, worker = farm.submit(Output_File_Type="P"), farm.join()
    pixels = bytes(range(36))
    farm.deliver(worker, 1, b"P6\n4 3\n255\n" + pixels)
    for address in ("/", f"/jobs/{job}", f"/jobs/{job}/frames/1"):
        image, *_ = farm.page(address).all("img", src="/thumb/")
    assert image["src"].startswith(f"/jobs/{job}/frames/1/thumb/4096/")
    answer = farm.send("GET", image["src"])
    assert isinstance(answer.body, bytes) and b"".join(png_rows(answer.body)) == pixels
    assert "immutable" in answer.headers["Cache-Control"]
    monkeypatch.setattr(povfarm, "small_png", None)
    assert farm.send("GET", image["src"]).body == answer.body, "it is made once"
    for wrong in (image["src"][:-1], image["src"].replace("4096", "4095"),
                  image["src"].replace("frames/1", "frames/2")):
        assert farm.send("GET", wrong).status == 404, wrong
    farm.scheduler.delete(job)
    assert not list(farm.store.root.rglob("*thumbs*"))


def test_how_bright_light_is_shown_can_be_chosen(farm: Farm) -> None:
    job, worker = farm.submit(Output_File_Type="H"), farm.join()
    farm.deliver(worker, 1, b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 3 +X 4\n" + b"\x80\x40\x20\x80" * 12)
    latest = f"/jobs/{job}/frames/1/thumb/4096/latest"
    plain, more = farm.send("GET", latest), farm.send("GET", f"{latest}?stops=1")
    assert more.headers["Location"] == plain.headers["Location"] + "?stops=1"
    made = [farm.send("GET", one.headers["Location"]).body for one in (plain, more)]
    assert [png_rows(one)[0][:3] for one in made if isinstance(one, bytes)] == [
        bytes([188, 137, 99]), bytes([255, 188, 137])]
    assert any("data-light" in one for one in farm.page(f"/jobs/{job}").all("a"))
    for wrong in ("5", "-5", "x", "1/../.."):
        assert farm.send("GET", f"{plain.headers['Location']}?stops={wrong}").status == 404
    other = farm.submit(Output_File_Type="P")
    farm.scheduler.cancel(job)
    farm.deliver(worker, 1, b"P6\n4 3\n255\n" + bytes(36))
    address = farm.send("GET", f"/jobs/{other}/frames/1/thumb/4096/latest").headers["Location"]
    assert farm.send("GET", f"{address}?stops=1").status == 404
    assert not any("data-light" in one for one in farm.page(f"/jobs/{other}").all("a"))


def test_a_large_picture_is_shown_small(farm: Farm) -> None:
    noise = b"".join(b"\0" + random.Random(row).randbytes(600) for row in range(150))
    job, worker = farm.submit(Width="200", Height="150"), farm.join()
    farm.deliver(worker, 1, png_of(noise, 200, 150))
    thumb, = [one["src"] for one in farm.page("/").all("img", src="/thumb/160/")][:1]
    answer = farm.send("GET", thumb)
    assert isinstance(answer.body, bytes)
    info = povfarm.check_image(answer.body, ".png", 160, 120)
    assert info.channels == 3 and not farm.page(f"/jobs/{job}").all("img", src="/thumb/4096")


def test_a_small_picture_that_goes_while_it_is_asked_for_is_not_here(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    job, worker = farm.submit(Output_File_Type="P"), farm.join()
    farm.deliver(worker, 1, b"P6\n4 3\n255\n" + bytes(36))
    thumb = farm.send("GET", f"/jobs/{job}/frames/1/thumb/160/latest").headers["Location"]
    assert farm.send("GET", thumb).status == 200
    outside = farm.store.gate.outside

    @contextlib.contextmanager
    def meanwhile() -> Iterator[None]:
        with outside():
            yield
        for path in farm.store.root.rglob("thumbs/*"):
            path.unlink()

    monkeypatch.setattr(farm.store.gate, "outside", meanwhile)
    assert farm.send("GET", thumb).status == 404


def test_an_ended_job_has_no_image_yet_to_come(farm: Farm) -> None:
    job = farm.submit()
    assert "No image yet" in farm.page("/").text
    farm.scheduler.cancel(job)
    for address in ("/", f"/jobs/{job}"):
        text = farm.page(address).text
        assert "No image" in text and "No image yet" not in text


def test_what_is_rendered_now_comes_first(farm: Farm) -> None:
    for name in ("first", "second", "third"):
        farm.submit(name=name)
    farm.lease(farm.join())
    page = farm.page("/")
    links = [link["href"] for link in page.all("a", href="/jobs/")]
    assert list(dict.fromkeys(links))[:3] == ["/jobs/1", "/jobs/2", "/jobs/3"], "as they are served"
    assert "◷ waiting: next in line" in page.text and "◷ waiting: 1 job before it" in page.text


def test_a_still_in_slices(farm: Farm) -> None:
    job, worker = farm.submit(frames=1, slices="3", Height="96"), farm.join()
    lease = farm.lease(worker)
    farm.scheduler.finish(worker, lease.id, lease.tasks[0].id, png(0, 4, 32), b"", Cost(1, 1, 1), 32)
    farm.lease(worker)
    dom = farm.page(f"/jobs/{job}")
    assert "slices done1" in dom.text and "finished33 %" in dom.text
    assert "an hour" not in dom.text and "0 of 1" not in dom.text
    assert dom.all("image", href=f"/api/v1/jobs/{job}/slices/")
    assert "rows 32 to 63: ● in work" in dom.text
    assert dom.text.count("laptop") == 2  # on each of its slices
    text = farm.page("/").text
    assert "marbles, a slice of it, is done" in text and "slice leased" not in text


def test_older_jobs_are_on_another_page(farm: Farm) -> None:
    for number in range(povfarm.JOBS_SHOWN + 2):
        farm.scheduler.cancel(farm.submit(name=f"job number {number}."))
    newest = farm.page("/")
    assert "job number 2." in newest.text and "job number 1." not in newest.text
    older, = newest.all("a", href="/?before")
    dom = farm.page(older["href"])
    assert dom.all("h1") and "Nothing to render" not in dom.text
    assert "job number 1." in dom.text and "job number 2." not in dom.text
    assert not dom.all("a", href="/?before")


@pytest.mark.parametrize("state, words", [
    ("pending", "? asks to join"), ("idle", "○ idle"), ("gone", "◌ gone"), ("working", "● working"),
])
def test_what_a_worker_does_is_told_in_words(farm: Farm, state: str, words: str) -> None:
    worker = farm.join(admitted=state != "pending")
    if state == "working":
        farm.submit()
        farm.lease(worker)
    elif state == "gone":
        farm.scheduler.leave(worker)
    assert words in farm.page("/computers").text


def test_nothing_hostile_becomes_html(farm: Farm) -> None:
    job, worker = farm.submit(name=HOSTILE), farm.join(HOSTILE, version=HOSTILE)
    farm.join(HOSTILE + "2", admitted=False)
    farm.deliver(worker, 1)
    farm.fail(worker, HOSTILE)
    farm.scheduler.pause(job)
    for address in ("/", f"/jobs/{job}", f"/jobs/{job}/frames/1", f"/jobs/{job}/frames/2"):
        for cookie in ("", farm.admin):
            assert farm.page(address, cookie).text.count(HOSTILE) >= 2
    assert farm.page("/").text.count(HOSTILE) >= 8
    error = farm.page("/login/" + urllib.parse.quote(HOSTILE, safe=""), status=403)
    assert "used before" in error.text


def test_every_page_has_the_policy_and_is_not_kept(farm: Farm) -> None:
    job = farm.submit()
    code = farm.access.login_code()
    for address in ("/", f"/jobs/{job}", f"/jobs/{job}/frames/1", "/jobs/9", f"/login/{code}"):
        headers = farm.send("GET", address).headers
        policy = dict(part.strip().split(" ", 1)
                      for part in headers["Content-Security-Policy"].split(";"))
        assert policy == {
            "default-src": "'none'", "img-src": "'self'", "style-src": "'self'",
            "script-src": "'self'", "connect-src": "'self'",
            "form-action": "'self'", "frame-ancestors": "'none'", "base-uri": "'none'"}
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize("path, mime", [
    ("/style.css", "text/css"), ("/favicon.svg", "image/svg"), ("/script.js", "text/javascript")])
def test_what_pages_are_made_with_is_served(farm: Farm, path: str, mime: str) -> None:
    page = farm.page("/")
    link, = page.all("link", href=path) or page.all("script", src=path)
    response = farm.send("GET", link.get("href") or link["src"])
    assert response.headers["Content-Type"].startswith(mime) and response.status == 200
    assert "immutable" in response.headers["Cache-Control"]
    assert b"http:" not in response.body.replace(b"http://www.w3.org/2000/svg", b"")  # type: ignore


def refresh(dom: Dom) -> str:
    return "".join(meta["content"] for meta in dom.all("meta") if meta.get("http-equiv"))


def test_how_often_pages_load_themselves_again(farm: Farm) -> None:
    assert refresh(farm.page("/")) == "5", "somebody is just setting the farm up"
    worker = farm.join()
    assert refresh(farm.page("/")) == "30"
    job = farm.submit(frames=2)
    assert refresh(farm.page("/")) == refresh(farm.page(f"/jobs/{job}")) == "3"
    assert refresh(farm.page(f"/jobs/{job}/frames/1")) == "5"
    still, = farm.page("/").all("a", href="?still")
    assert refresh(farm.page(still["href"])) == ""
    still, = farm.page(f"/jobs/{job}?from=2").all("a", href="still=1")
    again, = farm.page(still["href"]).all("a", href="?")
    assert still["href"].endswith("&from=2") and again["href"] == f"/jobs/{job}?from=2"
    farm.deliver(worker, 2)
    assert refresh(farm.page("/")) == "30"
    assert refresh(farm.page(f"/jobs/{job}")) == refresh(farm.page(f"/jobs/{job}/frames/1")) == ""


@pytest.mark.parametrize("state, actions", [
    ("active", ["pause", "cancel"]), ("paused", ["resume", "cancel"]),
    ("cancelled", ["retry", "delete"]), ("done", ["delete"]),
])
def test_only_what_is_possible_has_a_button(farm: Farm, state: str, actions: List[str]) -> None:
    job = farm.submit(frames=2)
    if state == "done":
        farm.deliver(farm.join(), 2)
    elif state != "active":
        getattr(farm.scheduler, {"paused": "pause", "cancelled": "cancel"}[state])(job)
    page = farm.page(f"/jobs/{job}", farm.admin)
    may = [form["action"] for form in page.all("form", action="/jobs/")
           if form.get("class") != "some" and not form["action"].endswith("/set")]
    may += [f"/jobs/{job}/delete"] * len(page.all("a", href=f"ask=%2Fjobs%2F{job}%2Fdelete"))
    assert may == [f"/jobs/{job}/{action}" for action in actions]
    page = farm.page(f"/jobs/{job}")
    assert not page.all("form", method="post") + page.all("button", formmethod="post"), \
        "a stranger has no forms that change anything"


def asked(farm: Farm, address: str, question: str) -> Dom:
    """The page after a click on what asks first: it waits for the answer and does not reload."""
    link, = farm.page(address, farm.admin).all("a", href=urllib.parse.quote(question, safe=""))
    page = farm.page(link["href"].partition("#")[0], farm.admin)
    assert not any("http-equiv" in meta for meta in page.all("meta"))
    return page


def test_the_forms_steer_a_job(farm: Farm) -> None:
    job = farm.submit()
    for action, state in (("pause", "paused"), ("resume", "active"), ("cancel", "cancelled"),
                          ("retry", "active"), ("cancel", "cancelled"), ("delete", None)):
        page = farm.page(f"/jobs/{job}", farm.admin)
        if action == "delete":
            page = asked(farm, f"/jobs/{job}", f"/jobs/{job}/delete")
        form = page.all("form", action=f"/jobs/{job}/{action}")[0]
        token = page.all("input", name="token")[0]["value"]
        answer = farm.send("POST", form["action"], farm.admin, {"token": token})
        assert (answer.status, answer.headers["Location"]) == (
            303, f"/jobs/{job}" if state else "/")
        with farm.store.read() as tx:
            row = tx.find_job(job)
        assert (row.state if row else None) == state


def test_selected_frames_are_cancelled_by_a_button_but_never_all_for_want_of_a_name(
        farm: Farm) -> None:
    job = farm.submit(3)
    page = farm.page(f"/jobs/{job}", farm.admin)
    button, = page.all("button", formaction=f"/jobs/{job}/cancel")
    for frames, status, states in (("", 400, "qqq"), (" ", 400, "qqq"), ("2-3", 303, "qcc")):
        answer = farm.send("POST", button["formaction"], farm.admin, {
            "token": button["value"], "frames": frames})
        assert answer.status == status
        with farm.store.read() as tx:
            assert tx.frame_states(tx.job(job))[1] == states
    page = farm.page(f"/jobs/{job}/frames/1", farm.admin)
    assert page.all("form", action=f"/jobs/{job}/cancel?frames=1")


def test_a_frame_is_rendered_again_by_a_button_for_who_may_steer_its_job(farm: Farm) -> None:
    job = farm.submit(frames=2)
    assert not farm.page(f"/jobs/{job}/frames/1", farm.admin).all("form", action="retry")
    farm.deliver(farm.join(), 2)
    assert not farm.page(f"/jobs/{job}/frames/1").all("form", action="/jobs/")
    form, = farm.page(f"/jobs/{job}/frames/1", farm.admin).all("form", action="/jobs/")
    assert farm.send("POST", form["action"], farm.admin, {"token": "x"}).status == 403
    answer = farm.send("POST", form["action"], farm.admin, {"token": farm.token(farm.admin)})
    assert (answer.status, answer.headers["Location"]) == (303, f"/jobs/{job}")
    with farm.store.read() as tx:
        assert tx.frame_states(tx.job(job)) == (range(1, 3), "qd")


def test_an_admin_admits_a_worker_by_its_code(farm: Farm) -> None:
    worker = farm.join(admitted=False)
    with farm.store.read() as tx:
        code = tx.worker(worker).code
    stranger = farm.page("/")
    assert f"povfarm.py admit {code}" in stranger.text and not stranger.all("form")
    form, = farm.page("/", farm.admin).all("form", action="admit")
    body = {"token": farm.token(farm.admin)}
    assert farm.send("POST", form["action"], farm.admin, body).status == 303
    assert "○ idle" in farm.page("/").text
    again = farm.send("POST", form["action"], farm.admin, body)
    assert again.status == 400 and isinstance(again.body, bytes)
    assert f"No worker waits with the code '{code}'" in Dom(again.body.decode()).text


def test_an_admin_removes_a_worker(farm: Farm) -> None:
    worker = farm.join()
    assert not farm.page("/computers").all("form")
    assert not farm.page("/computers", farm.admin).all("form", action="remove")
    page = asked(farm, "/computers?before=99", f"/workers/{worker}/remove")
    assert page.all("a", href="/computers?before=99")  # "No"
    form, = page.all("form", action="remove")
    assert form["action"] == f"/workers/{worker}/remove"
    body = {"token": farm.token(farm.admin)}
    assert farm.send("POST", form["action"], farm.admin, body).status == 303
    assert not farm.page("/", farm.admin).all("form", action="remove")
    assert farm.send("POST", form["action"], farm.admin, body).status == 400


POSTS = ["/workers/1/remove", "/workers/1/pause", "/jobs/1/pause", "/jobs/1/cancel", "/jobs/1/delete", "/workers/CODE12/admit", "/logout"]


@pytest.mark.parametrize("path", POSTS)
def test_a_form_that_is_not_ours_changes_nothing(farm: Farm, path: str) -> None:
    farm.submit()
    other = farm.log_in()
    nobody = farm.token("")
    for cookie, token, status in (
            (farm.admin, None, 403), (farm.admin, "", 403), (farm.admin, nobody, 403),
            (farm.admin, farm.token(other), 403), ("", nobody, 401),
            ("", farm.token(farm.admin), 401), (f"{farm.access.cookie}=made up", nobody, 401)):
        answer = farm.send("POST", path, cookie, {} if token is None else {"token": token})
        assert answer.status == status and "Set-Cookie" not in answer.headers
    assert farm.send("POST", path, "", authorization="Bearer wrong").status == 401
    with farm.store.read() as tx:
        assert tx.job(1).state == "active"


def test_the_posts_above_are_all_there_are(farm: Farm) -> None:
    patterns = [one for one in farm.router.routes
                if one.route.method == "POST" and not one.route.pattern.startswith("/api/")]
    assert all(any(one.regex.fullmatch(path) for path in POSTS) for one in patterns)
    assert {one.route.role for one in patterns} == {"person", "user", "admin"}


def test_a_private_farm_shows_a_stranger_nothing(tmp_path: Path) -> None:
    farm = Farm(tmp_path, private=True)
    farm.submit()
    for address in ("/", "/jobs/1", "/jobs/1/frames/1"):
        stranger = farm.page(address, status=401)
        assert "Log in first" in stranger.text and "povfarm.py login" in stranger.text
        assert "marbles" not in stranger.text and not stranger.all("form")
        assert farm.send("GET", address, accept="*/*").headers["Content-Type"] == "application/json"
        assert "marbles" in farm.page(address, farm.admin).text


def test_a_login_link_works_once(farm: Farm) -> None:
    link = f"/login/{farm.access.login_code()}"
    assert "Set-Cookie" not in farm.send("HEAD", link).headers, "a link's preview"
    answer = farm.send("GET", link)
    cookie, *rest = [part.strip() for part in answer.headers["Set-Cookie"].split(";")]
    place = place_of(farm.access, cookie)
    assert (answer.status, answer.headers["Location"]) == (303, f"{place}/")
    assert set(rest) == {"HttpOnly", "SameSite=Strict", f"Path={place}/"}
    secure = Request("GET", f"/login/{farm.access.login_code()}", secure=True)
    assert farm.router.handle(secure).headers["Set-Cookie"].endswith("; Secure")
    assert "used before" in farm.page(link, status=403).text
    page = farm.page("/", cookie)
    token = page.all("input", name="token")[0]["value"]
    out = farm.send("POST", page.all("form", action="/logout")[0]["action"], cookie,
                    {"token": token})
    assert out.headers["Set-Cookie"].startswith(f"{farm.access.cookie}=; ")
    assert "Max-Age=0" in out.headers["Set-Cookie"]


def test_what_cannot_be_done_is_told_on_a_page(farm: Farm) -> None:
    job = farm.submit()
    farm.scheduler.cancel(job)
    body = {"token": farm.token(farm.admin)}
    for action, status in (("pause", 409), ("explode", 404)):
        answer = farm.send("POST", f"/jobs/{job}/{action}", farm.admin, body)
        assert answer.status == status and isinstance(answer.body, bytes)
        assert "That did not work" in Dom(answer.body.decode()).text


def test_chromium_shows_a_real_farm(povray: str, tmp_path: Path) -> None:
    """Under our content policy the style and the image are fetched, and no name is HTML."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    need("chromium", browser is not None, "Chromium is not installed: apt-get install chromium")
    (tmp_path / "a.pov").write_text(SCENE)
    assert run_povray(["a.pov", "+W32", "+H24", "+Ob.png"], tmp_path).returncode == 0
    farm = Coordinator(tmp_path / "data", bind="127.0.0.1", name=HOSTILE, durable=False)
    recorder = Recorder(farm.router)
    farm.server.router = recorder  # type: ignore[assignment]
    farm.start()
    try:
        worker = farm.scheduler.join(WorkerInfo(HOSTILE, 2, 1, "x", {}), "t", "10.0.0.7")
        pov = PovJob({"Input_File_Name": "a.pov", "Width": "32", "Height": "24",
                      "Output_File_Type": "N"}, (), (), ".")
        job, _ = farm.scheduler.submit(HOSTILE, "me", pov, Manifest(()), JobOptions())
        lease, = farm.scheduler.lease(worker, Offer(1, 1, 1), 0, always)
        farm.scheduler.finish(worker, lease.id, lease.tasks[0].id,
                              (tmp_path / "b.png").read_bytes(), b"", Cost())
        dom = chromium(str(browser), f"{farm.url}/", tmp_path)
    finally:
        farm.stop()
    dom.harmless()
    assert dom.text.count(HOSTILE) >= 3 and "✓ finished" in dom.text
    image = f"/api/v1/jobs/{job}/frames/0/image"
    assert dom.all("img", src=image)
    assert {path: recorder.answers.get(path) for path in ("/", "/style.css", image)} == {
        "/": 200, "/style.css": 200, image: 200}


def act(farm: Coordinator, worker: int, count: int) -> None:
    """Deliver so many frames, one after the other."""
    for _ in range(count):
        lease, = farm.scheduler.lease(worker, Offer(1, 1, 1), 0, always)
        farm.scheduler.finish(worker, lease.id, lease.tasks[0].id, png(), b"", Cost(20, 20))


def served(place: Path, port: int = 0) -> Coordinator:
    farm = Coordinator(place, bind="127.0.0.1", name="the attic", durable=False, port=port)
    farm.start()
    return farm


@pytest.mark.slow
def test_what_one_does_on_a_page_survives_what_happens_on_the_farm(tmp_path: Path) -> None:
    """Focus, selection, scroll; the coordinator ends and comes back; nothing is complained of."""
    farm = served(tmp_path / "data")
    worker = farm.scheduler.join(WorkerInfo("anna", 2, 1, "x", {}), "t", "10.0.0.7")
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "4", "Height": "3", "Final_Frame": "40",
                  "Output_File_Type": "N"}, (), (), ".")
    try:
        for name in ("marbles", "later", "last"):
            farm.scheduler.submit(name, "me", pov, Manifest(()), JobOptions())
        act(farm, worker, 1)
        with browser(tmp_path, height=400) as window:
            window.open(farm.url + f"/login/{farm.access.login_code()}")
            window.wait("document.querySelector('#live').textContent === 'Live'", "it never lives")
            window.run("""
                window.button = document.querySelector('form[action$="/jobs/2/pause"] button');
                window.button.focus();
                getSelection().selectAllChildren(document.querySelector('#j3 h3'));
                scrollTo(0, 300);
                const fade = Element.prototype.animate;
                Element.prototype.animate = function (...given) {
                    window.faded = given[0][0].opacity < 1 && given[1] === 150;
                    return fade.apply(this, given);
                };""")
            for done in (2, 3):
                act(farm, worker, 1)
                window.wait(f"document.body.innerText.includes('{done} of 40')", "no news", 10)
            assert window.run("""return [document.activeElement === window.button,
                getSelection().toString(), scrollY, faded]""") == [True, "last #3 · me", 300, True]
            window.press("\ue007")  # Enter, on the button with the focus
            window.wait("document.querySelector('h1') && location.pathname.endsWith('/jobs/2')",
                        "the button does nothing")
            assert "‖ paused" in window.text()
            port = farm.port
            farm.stop()
            window.wait("document.querySelector('#live').textContent.startsWith('Reconnecting, data"
                        " from ')", "it does not say that nobody answers", 10)
            assert "later" in window.text() and "‖ paused" in window.text()
            farm = served(tmp_path / "data", port)
            window.wait("document.querySelector('#live').textContent === 'Live'", "it stays away")
            assert [text for text in window.complaints() if "ERR_CONNECTION" not in text] == []
    finally:
        farm.stop()


@pytest.mark.slow
def test_a_film_is_played_and_frames_are_chosen_by_keys_and_by_hand(tmp_path: Path) -> None:
    farm = served(tmp_path / "data")
    worker = farm.scheduler.join(WorkerInfo("anna", 2, 1, "x", {}), "t", "10.0.0.7")
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "4", "Height": "3", "Final_Frame": "30",
                  "Output_File_Type": "P"}, (), (), ".")
    farm.scheduler.submit("marbles", "me", pov, Manifest(()), JobOptions())
    long = PovJob({**pov.values, "Initial_Frame": "10", "Final_Frame": "2009", "Frame_Step": "2",
                   "Output_File_Type": "N"}, (), (), ".")
    unfinished: List[str] = []
    try:
        for number in range(8):
            lease, = farm.scheduler.lease(worker, Offer(1, 1, 1), 0, always)
            if number in (3, 4, 5, 6):  # missing in the film
                unfinished.append(lease.id)
                continue
            farm.scheduler.finish(worker, lease.id, lease.tasks[0].id,
                                  b"P6 4 3 255\n" + bytes([number]) * 36, b"", Cost(20, 20))
        for name in unfinished:
            farm.scheduler.release(worker, name)
        with browser(tmp_path) as window:
            window.open(farm.url + f"/login/{farm.access.login_code()}")
            window.open(window.run("return location.href") + "jobs/1")
            said = "document.querySelector('output').textContent"
            assert window.run(f"return {said}") == "frame 8"
            window.run("document.activeElement.blur()")
            window.press("\ue012")  # arrow left
            window.wait(f"{said} === 'frame 3'", "no step")
            window.wait("document.querySelector('.stage img').currentSrc.includes('/frames/3/thumb/')",
                        "another image")
            window.press("\ue012", "\ue012", "\ue012")
            window.wait(f"{said} === 'frame 8'", "the film does not go round")
            window.run("window.seen = {}; setInterval(() => { const now = document.querySelector"
                       "('output').textContent; seen[now] = seen[now] || performance.now(); }, 5)")
            window.press(" ")
            window.wait("seen['frame 8, 12 a second']", "it is not played")
            held = window.run("return seen['frame 8, 12 a second'] - seen['frame 3, 12 a second']")
            assert held > 1000 * 4 / 12, "the last picture stays where frames are missing"
            window.run("seen = {}")
            window.wait("seen['frame 8, 12 a second']", "it is not played again and again")
            window.press("o")
            assert window.run("return document.querySelector('[data-key=o]').ariaPressed") == "false"
            window.wait(f"{said} === 'frame 8'", "it does not end with the last frame")
            window.press("o")
            window.run("document.activeElement.blur()")
            window.press("f")
            window.wait("document.fullscreenElement", "it does not fill the screen")
            window.press("k", "f")
            window.click(".stage .large a")
            read = "document.querySelector('#box output').textContent"
            for _ in range(4):
                now = int(window.run(f"return {said}").split()[1])
                window.wait(f"{read} === 'x 2, y 1: {(now - 1)} {(now - 1)} {(now - 1)}'", "another colour")
                window.press("\ue012")
            window.press("p", "\ue014", "d", "8")
            window.wait(f"{read}.endsWith(', frame { {1: 8, 8: 3}.get(now, now - 1)} pinned')", "nothing is pinned")
            look = window.run("""const [one, other] = document.querySelectorAll('#box img');
                return [one.width, other.width, other.style.mixBlendMode, one.src !== other.src]""")
            assert look == [32, 32, "difference", True]
            window.press("\ue00c")
            window.wait("!document.querySelector('#box').open", "it stays open")
            stops = window.run("return [...document.querySelectorAll('a, button, input, select, "
                               "summary, [tabindex]')].filter(one => one.tabIndex >= 0 && "
                               "one.checkVisibility()).length")
            assert stops <= 40
            window.run("document.querySelector('#part a').focus()")
            window.press("\ue014")  # arrow right
            assert window.run("return document.activeElement.textContent") == "2"
            window.send("actions", actions=[{"type": "key", "id": "keys", "actions": [
                {"type": "keyDown", "value": "\ue008"}, {"type": "keyDown", "value": "\ue014"},
                {"type": "keyUp", "value": "\ue014"}, {"type": "keyUp", "value": "\ue008"}]}])
            assert window.run("return document.querySelector('#picked').value") == "2-3"
            cells = [window.element(f"#part a:nth-child({number})") for number in (1, 4)]
            window.send("actions", actions=[{"type": "pointer", "id": "mouse", "actions": [
                {"type": "pointerMove", "origin": {ELEMENT: cells[0]}, "x": 0, "y": 0},
                {"type": "pointerDown", "button": 0},
                {"type": "pointerMove", "origin": {ELEMENT: cells[1]}, "x": 0, "y": 0},
                {"type": "pointerUp", "button": 0}]}])
            assert window.run("return document.querySelector('#picked').value") == "1-4"
            window.click(".some [name=token]")
            window.wait("document.querySelectorAll('#part .queued').length === 29", "none again")
            window.run("document.querySelector('#picked').value = '7'")
            window.click(".some button")
            window.wait("location.pathname.endsWith('/jobs/1/frames/7')", "it is not shown")
            farm.scheduler.submit("long", "me", long, Manifest(()), JobOptions(),
                                  frames="10-12,18-2008")
            window.open(window.run("return location.href").replace("1/frames/7", "2"))
            window.wait("told.textContent === 'Frame 10: queued'", "no map")
            window.run("document.querySelector('#map').focus()")
            window.press("\ue014", "\ue014", "\ue012", "\ue015")  # right, right, left, down
            across = window.run("return +told.textContent.match(/[0-9]+/)[0] / 2 - 8")
            assert across > 30 and across == int(across)
            chosen = "return document.querySelector('#picked').value"
            window.send("actions", actions=[{"type": "key", "id": "keys", "actions": [
                {"type": "keyDown", "value": "\ue008"}, {"type": "keyDown", "value": "\ue011"},
                {"type": "keyUp", "value": "\ue011"}, {"type": "keyUp", "value": "\ue008"}]}])
            assert window.run(chosen) == f"10-{2 * int(across) + 16}"  # Home, with shift
            cell = window.run("return map.clientWidth") // int(across)
            middle = {ELEMENT: window.element("#map")}
            window.send("actions", actions=[{"type": "pointer", "id": "mouse", "actions": [
                {"type": "pointerMove", "origin": middle, "x": 0, "y": 0},
                {"type": "pointerDown", "button": 0},
                {"type": "pointerMove", "origin": middle, "x": 5 * cell, "y": 0},
                {"type": "pointerUp", "button": 0}]}])
            low, high = map(int, window.run(chosen).split("-"))
            assert high - low == 10
            farm.scheduler.cancel(1)
            act(farm, worker, 1)  # what is selected stays
            window.wait("document.body.innerText.includes('1 finished')", "no news")
            assert window.run(chosen) == f"{low}-{high}"
            window.press("\ue007")  # Enter
            window.wait(f"location.pathname.endsWith('/jobs/2/frames/{high}')", "it is not shown")
            assert window.complaints() == []
    finally:
        farm.stop()


@pytest.mark.slow
def test_without_javascript_the_page_reloads_and_its_forms_work(tmp_path: Path) -> None:
    farm = served(tmp_path / "data")
    worker = farm.scheduler.join(WorkerInfo("anna", 2, 1, "x", {}), "t", "10.0.0.7", "ABCDEF")
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "4", "Height": "3"}, (), (), ".")
    farm.scheduler.submit("marbles", "me", pov, Manifest(()), JobOptions())
    try:
        with browser(tmp_path, javascript=False, width=320) as window:
            window.open(farm.url + f"/login/{farm.access.login_code()}")
            assert "asks to join" in window.text() and "As of " in window.text()
            window.click("form[action$='/admit'] button")
            window.wait("!document.body.innerText.includes('the code')", "it is not let in")
            assert "○ idle" in window.text()
            assert window.run("return document.documentElement.scrollWidth") <= 320
            farm.scheduler.remove_worker(worker)
            window.wait("document.body.innerText.includes('No computer is here')", "no reload", 20)
    finally:
        farm.stop()


# --- people

def add(farm: Farm, name: str, role: Role = Role.USER) -> str:
    """Add a person whose browser is logged in; return its cookie."""
    farm.access.add(name, role, {}, "a-ticket-that-is-new")
    return f"{farm.access.cookie}={farm.access.log_in(farm.access.login_code(name))}"


def submit_for(farm: Farm, owner: str, name: str = "marbles") -> int:
    values = {"Input_File_Name": "a.pov", "Width": "4", "Height": "3", "Final_Frame": "3"}
    return farm.scheduler.submit(name, owner, PovJob(values, (), (), "."), Manifest(()),
                                 JobOptions())[0]


def test_a_page_says_who_one_is_and_steers_only_what_is_theirs(farm: Farm) -> None:
    anna, prom = add(farm, "anna"), add(farm, "prom", Role.VIEWER)
    hers, his = submit_for(farm, "anna"), submit_for(farm, "bert")
    for who, cookie, mine in (("anna", anna, {hers}), ("admin", farm.admin, {hers, his}),
                              ("prom", prom, set())):
        for job in (hers, his):
            dom = farm.page(f"/jobs/{job}", cookie)
            assert f"You are {who} " in dom.text
            posts = dom.all("form", method="post") + [
                {"action": one["formaction"]} for one in dom.all("button", formmethod="post")]
            assert {form["action"] for form in posts} == {"/logout"} | (
                {f"/jobs/{job}/{action}" for action in ("pause", "cancel", "retry", "set")} if job in mine else set())
    assert "Read-only" in farm.page(f"/jobs/{hers}").text


def test_a_form_for_the_job_of_another_is_refused(farm: Farm) -> None:
    anna, job = add(farm, "anna"), submit_for(farm, "bert")
    for action in ("pause", "cancel", "delete"):
        answer = farm.send("POST", f"/jobs/{job}/{action}", anna, {"token": farm.token(anna)})
        assert answer.status == 403 and isinstance(answer.body, bytes)
        assert f"Job {job} is bert&#x27;s: only bert" in answer.body.decode()
    for path in ("/workers/1/remove", "/workers/ABCDEF/admit"):
        assert farm.send("POST", path, anna, {"token": farm.token(anna)}).status == 403
    with farm.store.read() as tx:
        assert tx.job(job).state == "active"


def test_only_my_jobs(farm: Farm) -> None:
    anna = add(farm, "anna")
    submit_for(farm, "anna", "apples")
    submit_for(farm, "bert", "pears")
    everything, mine = farm.page("/", anna), farm.page("/?mine=1", anna)
    assert everything.all("a", href="/?mine=1") and mine.all("a", href="/")
    cards = [[one for one in page.all("a", href="/jobs/") if "#" not in one["href"]]
             for page in (everything, mine)]
    assert {one["href"] for one in cards[0]} == {"/jobs/1", "/jobs/2"}
    assert "apples" in mine.text and "anna" in mine.text
    assert [len(page.all("li", id="j")) for page in (everything, mine)] == [2, 1]
    assert not farm.page("/").all("a", href="/?mine=1")


# --- what waits for somebody, and why

def test_a_job_that_fails_needs_somebody_and_one_click_tries_again(farm: Farm) -> None:
    job, worker = farm.submit(), farm.join()
    for _ in range(3):
        farm.fail(worker, "line 5: undeclared identifier 'Goldd'")
    page, text = farm.page("/", farm.admin), farm.page("/").text
    assert "Needs you 1" in text and "the first frames all failed" in text
    assert "undeclared identifier 'Goldd'" in text and text.startswith("! ")
    icon, = page.all("link", rel="icon")
    assert icon["href"].endswith("state=bad") and b"#d93025" in bytes(farm.send(  # type: ignore[arg-type]
        "GET", icon["href"]).body)
    assert page.all("a", class_="button", href=f"/jobs/{job}/frames/1#log")
    form, *_ = page.all("form", action=f"/jobs/{job}/retry")
    assert not farm.page("/").all("form")
    assert farm.send("POST", form["action"], farm.admin,
                     {"token": farm.token(farm.admin)}).status == 303
    assert "Needs you" not in farm.page("/").text


def test_one_cause_for_many_jobs_is_one_row(farm: Farm) -> None:
    for number in range(3):
        farm.submit(name=f"job{number}")
    for address in ("/", "/jobs/1"):
        assert "no worker is there: start one with 'povfarm.py work'" in farm.page(address).text
    text = farm.page("/").text
    assert "Needs you 1" in text and "job0 and 2 more jobs: no worker is there" in text
    worker = farm.join()
    farm.lease(worker)
    assert "Needs you" not in farm.page("/").text
    assert "next in line" in farm.page("/jobs/2").text
    assert "1 job before it" in farm.page("/jobs/3").text


def test_a_job_for_another_povray_has_a_button_that_lets_any_render_it(farm: Farm) -> None:
    old, new = farm.join("old"), farm.join("new", version="3.8.0")
    job = farm.submit()
    farm.deliver(old, 1)
    farm.scheduler.leave(old)
    page = farm.page("/", farm.admin)
    assert "rendered with POV-Ray 3.7.0.10, theirs is 3.8.0" in page.text
    form, = page.all("form", action=f"/jobs/{job}/set")
    assert page.all("input", name="povray", value="any")
    assert "Let any POV-Ray render it" in farm.page(f"/jobs/{job}", farm.admin).text
    body = {"token": farm.token(farm.admin), "povray": "any"}
    assert farm.send("POST", form["action"], farm.admin, body).status == 303
    assert farm.lease(new).job == job
    for wrong in ({"povray": "$"}, {"priority": "much"}):
        answer = farm.send("POST", form["action"], farm.admin, {**body, **wrong})
        assert answer.status == 400, wrong


def test_who_has_as_many_workers_as_may_be_is_told_so(farm: Farm) -> None:
    farm.access.add("anna", Role.USER, {"workers": 1}, "a-ticket-that-is-new")
    first, second = submit_for(farm, "anna"), submit_for(farm, "anna")
    lease = farm.lease(farm.join())
    farm.join("idle")
    waits = second if lease.job == first else first
    assert "as many workers as anna may have (1) render other jobs" in farm.page(f"/jobs/{waits}").text


def test_a_full_disk_is_told_above_everything(farm: Farm) -> None:
    farm.submit()
    farm.store.notice = "the disk is full: free 3 GB"
    for address in ("/", "/jobs/1", "/computers"):
        page = farm.page(address)
        assert page.all("p", class_="notice failed") and "the disk is full: free 3 GB" in page.text
    farm.store.notice = ""


def test_who_keeps_a_page_up_to_date_shares_one_that_is_some_seconds_old(farm: Farm) -> None:
    live = {"cache-control": "max-age=9"}
    assert "marbles" not in farm.page("/", **live).text
    farm.submit()
    assert "marbles" not in farm.page("/", **live).text
    assert "marbles" in farm.page("/").text, "who asks for it anew gets a new one"
    assert "marbles" in farm.page("/", **live).text
    farm.submit(name="pebbles")
    assert "pebbles" in farm.page("/", farm.admin, **live).text


def test_many_frames_hide_nothing_that_happened_to_the_farm_and_all_is_on_a_page(farm: Farm) -> None:
    job = farm.submit(name="marbles", frames=500)
    farm.scheduler.cancel_frames(job, "452-499")
    farm.deliver(farm.join("a rare name"), 450)
    farm.scheduler.cancel_frames(job, "451")
    text = farm.page("/").text
    assert "a rare name joined" in text
    assert "marbles frame 450 is done, like 449 others before it" in text, "not all are counted"
    assert "marbles frame 451 was cancelled, by admin, like 48 others before it" in text
    page = farm.page("/events")
    assert "marbles frame 450 is done, like" in page.text
    older = page.all("a", href="/events?before=")
    seen = [page.text]
    while older:
        page = farm.page(older[0]["href"])
        seen.append(page.text)
        older = page.all("a", href="/events?before=")
    assert "a rare name joined" in seen[-1] and "was submitted" in seen[-1] and len(seen) > 1


def test_what_a_hand_paused_asks_nobody(farm: Farm) -> None:
    farm.scheduler.pause(farm.submit())
    page = farm.page("/", farm.admin)
    assert "Needs you" not in page.text and "‖ paused by hand" in page.text
    assert page.all("form", action="/jobs/1/resume")


def test_refusing_a_worker_is_a_button_too(farm: Farm) -> None:
    worker = farm.join(admitted=False)
    form, = farm.page("/", farm.admin).all("form", action="/remove")
    assert form["action"] == f"/workers/{worker}/remove"


# --- a job's page

def test_the_options_of_a_job_are_a_form(farm: Farm) -> None:
    job = farm.submit()
    page = farm.page(f"/jobs/{job}", farm.admin)
    assert {one["name"] for one in [*page.all("input"), *page.all("select")] if one.get("name")} == {
        "token", "frames", *povfarm.JOB_OPTIONS}
    fields = {one["name"]: one["value"] for one in page.all("input") if one.get("name") in povfarm.JOB_OPTIONS}
    body = {"token": farm.token(farm.admin), **fields, "in_order": "no", "priority": "7"}
    assert farm.send("POST", f"/jobs/{job}/set", farm.admin, body).status == 303
    with farm.store.read() as tx:
        assert tx.job(job).options.priority == 7
        assert [event.text for event in tx.events(0, 99) if event.what == "changed"] == ["priority = 7"]
    farm.scheduler.change(job, {"bring": True, "retry_limit": 1})
    assert "bring = yes, retries = 1" in farm.page("/").text


def test_frames_that_are_named_are_rendered_again(farm: Farm) -> None:
    job, worker = farm.submit(frames=6), farm.join()
    farm.deliver(worker, 6)
    page = farm.page(f"/jobs/{job}", farm.admin)
    button, = page.all("button", formmethod="post")
    assert button["value"] == farm.token(farm.admin) and not farm.page(f"/jobs/{job}").all(
        "button", name="token")
    zipped = farm.send("GET", f"/api/v1/jobs/{job}/archive.zip?frames=2-3,5")
    assert isinstance(zipped.body, Iterator)
    assert zipfile.ZipFile(io.BytesIO(b"".join(zipped.body))).namelist() == ["a2.png", "a3.png", "a5.png"]
    for text in ("5-6", "05", "%EF%BC%95"):  # the last is another 5, which no header can hold
        found = farm.send("GET", f"/jobs/{job}?frames={text}")
        assert (found.status, found.headers["Location"]) == (303, f"/jobs/{job}/frames/5")
    body = {"token": farm.token(farm.admin), "frames": "2-3,5"}
    assert farm.send("POST", button["formaction"], farm.admin, body).status == 303
    with farm.store.read() as tx:
        assert tx.frame_states(tx.job(job)) == (range(1, 7), "dqqdqd")
    player, = farm.page(f"/jobs/{job}").all("div", id="player")
    assert player["data-frames"] == "1,4,6"


def test_what_povray_said_of_a_failed_frame_is_on_its_jobs_page(farm: Farm) -> None:
    job, worker = farm.submit(), farm.join()
    farm.fail(worker, "the sky fell")
    text = farm.page(f"/jobs/{job}").text
    assert "What POV-Ray printed of frame 1" in text
    assert text.index("the sky fell") < text.index("POV-Ray says")


def test_a_frame_that_is_done_after_all_is_no_failure(farm: Farm) -> None:
    job = submit_for(farm, "anna")
    frame = farm.fail(farm.join(), "the sky fell")
    assert f"Frame {frame} failed: the sky fell" in farm.page(f"/jobs/{job}").text
    farm.deliver(farm.join("desktop"), 3)
    page = farm.page(f"/jobs/{job}")
    assert "the sky fell" not in page.text and not page.all("p", class_="notice failed")
    assert "the sky fell" in farm.page(f"/jobs/{job}/frames/{frame}").text, "its log has it"


def test_the_line_of_the_scene_stands_beside_the_error_for_its_owner_only(farm: Farm) -> None:
    lines = [f"// line {number} {HOSTILE}" for number in range(1, 12)]
    scene = "\n".join(lines).encode()
    sha256 = hashlib.sha256(scene).hexdigest()
    files = (FileEntry("inc/part.inc", sha256, len(scene), 0),)
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "4", "Height": "3"}, (), ("inc",), ".")
    job, _ = farm.scheduler.submit("bad", "somebody", pov, Manifest(files), JobOptions(retry_limit=1))
    farm.scheduler.put_blob(sha256, [scene])
    worker = farm.join()
    lease = farm.lease(worker)
    farm.scheduler.fail(worker, lease.id, lease.tasks[0].id, "File 'part.inc' line 6: Parse Error: no",
                        b"the credits\n==== [Parsing...] ===\nit is said", True)
    for address in (f"/jobs/{job}", f"/jobs/{job}/frames/0"):
        dom, stranger = farm.page(address, farm.admin), farm.page(address)
        assert [line in dom.text for line in lines] == [3 <= number <= 9 for number in range(1, 12)]
        assert dom.text.count(lines[5]) == 1 and lines[5] not in stranger.text
        for one in (dom, stranger):
            assert one.text.index("Parse Error: no") < one.text.index("Credits and options")
            assert one.text.index("the credits") < one.text.index("it is said")
            assert [open_ for open_ in one.all("details", id="try") if "open" in open_] == \
                one.all("details", id="try") and one.all("a", href=f"/api/v1{address[:7]}/frames/0/log")


def test_where_the_time_goes_is_a_bar_for_each_frame_in_the_colour_of_its_computer(
        farm: Farm) -> None:
    job = farm.submit(frames=1000)
    assert "Where the time goes" not in farm.page(f"/jobs/{job}").text
    for name, wall in (("anna", 30.0), ("bert", 10.0)):
        worker = farm.join(name)
        for _ in range(10):
            lease = farm.lease(worker)
            farm.scheduler.finish(worker, lease.id, lease.tasks[0].id, png(), b"", Cost(1, wall))
    dom = farm.page(f"/jobs/{job}")
    assert "anna 75 %" in dom.text and "One of 5 is shown." in dom.text
    bars = dom.all("a", class_="c0") + dom.all("a", class_="c1")
    assert [bar["href"].rpartition("/")[2] for bar in bars] == ["1", "6", "11", "16"]
    assert "frame 11: 10 s on bert" in dom.text and "Frame 1 took longest, 30 s." in dom.text
    assert all(bar["tabindex"] == "-1" for bar in bars)


def test_times_are_looked_up_and_states_read_from_their_index(farm: Farm) -> None:
    """Of 20,000 frames, neither costs a quarter of what it costs to look at each."""
    job = farm.submit(frames=20_000)
    spent = []
    with farm.store.tx() as tx:
        tx._do("UPDATE task SET state = CASE WHEN frame < 9000 OR frame % 7 = 3 THEN 'done'"
               " WHEN frame > 19000 THEN 'failed' ELSE 'queued' END, wall = 9")
        tx._do("UPDATE job SET " + ", ".join(
            f"{state} = (SELECT COUNT(*) FROM task WHERE state = '{state}')" for state in (
                "done", "failed", "queued")))
    with farm.store.read() as look:
        row = look.job(job)
        for one in (lambda: look.tasks(job), lambda: look.frame_states(row),
                    lambda: look.tasks_of_frames(job, range(1, 20_000, 84))):
            start = time.thread_time()
            found = one()
            spent.append(time.thread_time() - start)
        letters = "".join(task.state[0] for task in look.tasks(job))
        assert look.frame_states(row) == (range(1, 20_001), letters)
        assert len(set(letters)) == 3 and "qd" in letters
    assert len(found) == 108 and max(spent[1:]) < spent[0] / 4, spent
    with farm.store.tx() as tx:
        tx._do("UPDATE task SET state = 'queued', wall = NULL")
        tx._do("UPDATE job SET done = 0, failed = 0, queued = 20000")


def test_what_is_dear_of_a_job_is_made_once_for_all_who_look(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks, and whatever happens to other jobs; but never once more than is true."""
    looked: List[int] = []
    states = povfarm.Look.frame_states
    monkeypatch.setattr(povfarm.Look, "frame_states", lambda self, job: (
        looked.append(job.id), states(self, job))[1])
    job, worker = farm.submit(frames=500), farm.join()
    farm.deliver(worker, 2)
    other = farm.submit()

    def letters(cookie: str = "") -> Dict[str, int]:
        canvas, = farm.page(f"/jobs/{job}", cookie).all("canvas")
        found = re.findall(r"(\D)(\d*)", canvas["data-map"])
        return {one: sum(int(many or 1) for letter, many in found if letter == one) for one, _ in found}

    for cookie in ("", farm.admin, farm.log_in()):
        assert letters(cookie) == {"d": 2, "q": 498}
        farm.scheduler.pause(other)
        farm.scheduler.resume(other)
    assert looked == [job]
    farm.deliver(worker, 2)
    assert letters() == {"d": 4, "q": 496}
    farm.scheduler.cancel(job)
    assert letters() == {"d": 4, "c": 496}
    farm.scheduler.retry(job)
    old, new = (farm.page(f"/jobs/{job}", farm.admin, cache_control=how) for how in ("max-age=1", ""))
    assert [("c496" in page.all("canvas")[0]["data-map"], page.all("main")[0]["data-event"] == "0")
            for page in (old, new)] == [(True, True), (False, False)], "the older is looked at again"


def test_chosen_frames_of_an_animation_are_shown_with_their_numbers(farm: Farm) -> None:
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "4", "Height": "3", "Final_Frame": "90",
                  "Output_File_Type": "N"}, (), (), ".")
    job, _ = farm.scheduler.submit("some", "me", pov, Manifest(()), JobOptions(), frames="1,11-13,50")
    farm.deliver(farm.join(), 4)
    with farm.store.read() as tx:
        assert tx.frame_states(tx.job(job)) == ((1, 11, 12, 13, 50), "ddddq")
    player, = farm.page(f"/jobs/{job}").all("div", id="player")
    assert (player["data-frames"], player["data-step"]) == ("1,11-13", "1")
    links = [[link["href"] for link in farm.page(f"/jobs/{job}/frames/{frame}").all("a")
              if re.fullmatch(r"/jobs/1/frames/\d+", link["href"])] for frame in (1, 11, 50)]
    assert links == [[f"/jobs/{job}/frames/{frame}" for frame in near]
                     for near in ([11], [1, 12], [13])]


def test_a_map_of_chosen_frames_lists_their_numbers(farm: Farm) -> None:
    pov = PovJob({"Input_File_Name": "a.pov", "Width": "4", "Height": "3", "Initial_Frame": "10",
                  "Final_Frame": "2009", "Frame_Step": "2", "Output_File_Type": "N"}, (), (), ".")
    job, _ = farm.scheduler.submit("some", "me", pov, Manifest(()), JobOptions(),
                                   frames="10-12,18-1500,1600")
    canvas, = farm.page(f"/jobs/{job}").all("canvas")
    assert (canvas["data-frames"], canvas["data-step"], canvas["data-map"]) == (
        "10-12,18-1500,1600", "2", "q745")


def test_the_images_are_downloaded_as_an_animated_png(farm: Farm) -> None:
    job, worker = farm.submit(frames=3), farm.join()
    assert farm.send("GET", f"/api/v1/jobs/{job}/film.png").status == 409
    farm.deliver(worker, 2)
    link, = farm.page(f"/jobs/{job}").all("a", href="film.png")
    answer = farm.send("GET", f"{link['href']}?fps=10")
    assert isinstance(answer.body, Iterator) and "marbles.png" in answer.headers["Content-Disposition"]
    made = b"".join(answer.body)
    assert made == b"".join(povfarm.animated_png([png(), png()], 2, Fraction(1, 10)))
    assert farm.send("GET", f"{link['href']}?fps=x").status == 400
    other = farm.submit(Output_File_Type="P")
    assert not farm.page(f"/jobs/{other}").all("a", href="film.png")


def test_the_film_strip_is_from_all_over_the_animation(farm: Farm) -> None:
    job, worker = farm.submit(frames=120), farm.join()
    farm.deliver(worker, 50)
    links = farm.page(f"/jobs/{job}").all("a", href=f"/jobs/{job}/frames/")
    strip = [one for one in links if "data-frames" not in one and one.get("class") in ("done", "queued", "leased")]
    assert [one["href"].rpartition("/")[2] for one in strip] == [str(n) for n in range(1, 120, 10)]
    assert [one["class"] for one in strip].count("done") == 5


# --- how it looks

def brightness(color: str) -> float:
    """The relative luminance of #rrggbb, as WCAG 2 defines it."""
    digits = color if len(color) == 7 else "#" + "".join(digit * 2 for digit in color[1:])
    parts = [int(digits[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, other: str) -> float:
    high, low = sorted((brightness(one), brightness(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_can_be_told_apart(scheme: int) -> None:
    """Text at 4.5:1 on what it stands on, the edges of controls and of states at 3:1."""
    found = re.findall(r":root \{([^}]*)\}", povfarm.STYLE)
    colors: Dict[str, str] = {}
    for block in found[:scheme + 1]:
        colors.update(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", block))
    assert len(found) == 2 and len(colors) == 14
    texts = [(text, ground) for text in ("ink", "dim", "link", "done", "live", "bad", "hold")
             for ground in ("bg", "card")]
    texts += [("on", "done"), ("on", "bad"), ("bg", "live"), ("ink", "mat"), ("ink", "line"),
              ("dim", "mat"), ("ink", "glow")]
    assert {pair: round(contrast(*(colors[name] for name in pair)), 2) for pair in texts
            if contrast(*(colors[name] for name in pair)) < 4.5} == {}
    shapes = [("edge", "bg"), ("edge", "card"), ("done", "line"), ("live", "line"), ("bad", "line")]
    assert {pair for pair in shapes if contrast(*(colors[name] for name in pair)) < 3} == set()


def test_style_and_script_are_small() -> None:
    assert len(povfarm.STYLE.encode()) + len(povfarm.SCRIPT.encode()) < 60_000


def test_tab_reaches_what_is_shown_by_two_stops(farm: Farm) -> None:
    page = farm.page("/")
    assert page.all("a")[0]["href"] == "#main" and page.all("main", id="main", tabindex="-1")


def test_the_story_tells_who_did_it(farm: Farm) -> None:
    add(farm, "anna")
    job = submit_for(farm, "anna")
    farm.scheduler.pause(job, "anna")
    farm.scheduler.cancel(job)
    text = farm.page("/").text
    for words in ("was submitted, by anna", "is paused, by anna", "was cancelled, by admin",
                  "anna (user) has come, by admin"):
        assert words in text


def test_who_is_removed_is_logged_out(farm: Farm) -> None:
    anna = add(farm, "anna")
    assert "You are anna" in farm.page("/", anna).text
    farm.scheduler.people.remove("anna")
    assert "You are" not in farm.page("/", anna).text


def test_every_action_says_what_it_did(farm: Farm) -> None:
    job = farm.submit()
    body = {"token": farm.token(farm.admin)}
    farm.send("POST", f"/jobs/{job}/pause", farm.admin, body)
    told, = farm.page(f"/jobs/{job}?did={farm.did}", farm.admin).all("p", role="status")
    assert told and "marbles is paused, by admin" in farm.page(f"/computers?did={farm.did}", farm.admin).text
    anna = add(farm, "anna")
    for cookie, did in ((anna, farm.did), ("", farm.did), (farm.admin, "99"), (farm.admin, "x")):
        assert not farm.page(f"/computers?did={did}", cookie).all("p", role="status"), "not theirs"
    job = farm.submit(frames=9)
    farm.send("POST", f"/jobs/{job}/cancel?frames=2-5", farm.admin, body)
    assert "marbles frame 5 was cancelled, by admin, like 3 others before it" in farm.page(
        f"/computers?did={farm.did}", farm.admin).text
    farm.deliver(farm.join(), 5)
    for action, said in (("retry", "is queued again"), ("cancel", "was cancelled")):
        farm.send("POST", f"/jobs/{job}/{action}?frames=3", farm.admin, body)
        page = farm.page(f"/jobs/{job}?did={farm.did}", farm.admin)
        assert f"marbles frame 3 {said}, by admin" in page.text, "what was done, not what came of it"
    done, _, failed = page.all("rect")[:3]
    assert (done["width"], failed["width"]) == ("1000.0", "0.0"), "a finished job's bar is not full"
    assert "cancelled4" in page.text


def test_a_scene_that_takes_too_much_memory_is_named_with_its_cure(farm: Farm) -> None:
    job, worker = farm.submit(), farm.join()
    for _ in range(3):
        farm.fail(worker, "povray needed more than 2.0 GB of memory")
    for address in ("/", f"/jobs/{job}"):
        page = farm.page(address, farm.admin)
        assert "needed more than 2.0 GB of memory" in page.text
        assert page.all("form", action=f"/jobs/{job}/retry")


def test_a_room_of_computers_costs_a_page_as_much_as_one_of_them(
        farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a computer fits a job is looked up once for all that are alike, and not twice."""
    asked: List[int] = []
    fits = povfarm.Muster._fits
    monkeypatch.setattr(povfarm.Muster, "_fits", lambda self, job, row: (
        asked.append(row.id), fits(self, job, row))[1])
    for number in range(20):
        farm.submit(name=f"job{number}")
        farm.join(f"room{number}", version="3.7.0.10" if number % 3 else "3.8.0")
    asked.clear()
    assert "7 workers wait" in farm.page("/").text
    assert len(asked) <= 20 * 2


@pytest.mark.slow
def test_large_pictures_make_no_large_page(farm: Farm) -> None:
    """Home with all that a browser gets for it, of a still that has megabytes."""
    grain = random.Random(1)
    rows = [b"\0" + bytes(at // 99 + grain.randrange(8) for at in range(7200)) for _ in range(8)]
    image, worker = png_of(b"".join(rows) * 225, 2400, 1800), farm.join()
    assert len(image) > 2 << 20
    farm.submit(frames=1, Width="2400", Height="1800")
    farm.deliver(worker, 1, image)
    response = farm.send("GET", "/")
    page = farm.page("/")
    addresses = {one.get("src") or one["href"] for one in (
        *page.all("img"), *page.all("script"), *page.all("link"))}
    sizes = [len(body) for body in [response.body] if isinstance(body, bytes)]
    for address in addresses:
        body = farm.send("GET", address).body
        sizes.append(len(body) if isinstance(body, bytes) else body.length)  # type: ignore[union-attr]
    assert len(sizes) > 4 and sum(sizes) < 500_000, sizes


def test_a_worker_rests_and_goes_on_by_buttons_for_whose_it_is(farm: Farm) -> None:
    worker, anna = farm.join("anvil"), add(farm, "anna")
    assert not farm.page("/computers", anna).all("form", action="/workers/")
    body = {"token": farm.token(farm.admin)}
    for action, words, then in (("pause", "anvil is paused, by admin", ["resume"]),
                                ("resume", "anvil", ["pause", "drain"]),
                                ("drain", "anvil is drained, by admin", ["resume"])):
        answer = farm.send("POST", f"/workers/{worker}/{action}", farm.admin, body)
        assert (answer.status, answer.headers["Location"]) == (303, "/computers")
        page = farm.page(f"/computers?did={farm.did}", farm.admin)
        assert page.all("p", role="status") and words in page.text
        assert [form["action"] for form in page.all("form", action="/workers/")] == [
            f"/workers/{worker}/{one}" for one in then]
    assert "‖ resting" in farm.page("/computers").text
    assert farm.send("POST", f"/workers/{worker}/dance", farm.admin, body).status == 404
    assert farm.send("POST", f"/workers/{worker}/pause", anna,
                     {"token": farm.token(anna)}).status == 403, "it is not hers"
