"""A worker's own page: what it shows, what can be done there, and by nobody else."""

from __future__ import annotations

import io
import json
import re
import stat
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple, cast

import pytest

import povfarm
from helpers.base import run_povray, wait_until
from helpers.farm import HEAVY, SMALL, Farm, farm_fixture, pictures, project, run
from helpers.pages import Dom
from povfarm import BodyReader, Cache, Delivery, Request, Response, UserError, Worker, route

__all__ = ["farm_fixture"]
EVIL = "<script>alert(1)</script>"


class FakeWorker:
    """Shows runs, and notes what it is told."""

    def __init__(self, place: Path) -> None:
        self.cache = Cache(place / "cache", 10**9, cast(Any, None))
        self.told: List[Any] = []
        self.state = "working"
        self.stays: Dict[str, List[Delivery]] = {}
        self.outbox = self

    def held(self) -> Dict[str, List[Delivery]]:
        """Return what was put there."""
        return self.stays

    def bring(self, runs: Any) -> None:
        """Note of which job."""
        self.told += [run.job for run in runs]

    def view(self) -> Dict[str, Any]:
        """Return what a worker with a hostile farm shows."""
        return {"farm": f"http://{EVIL}", "trouble": EVIL, "state": self.state,
                "delivered": {"frame": 7, "slice": 1},
                "waiting": 2, "rest": "".join(self.told[-1:]), "runs": [{
                    "job": 3, "name": EVIL, "frame": 12, "percent": 40, "threads": 2,
                    "frames": [12, 13], "seconds": 61.0}]}

    def stop(self) -> None:
        """Note it."""
        self.told.append("stop")

    def rest(self, how: str) -> None:
        """Note it."""
        self.told.append(how)


class Page:
    """The page of one worker, and a browser that may come in."""

    def __init__(self, place: Path) -> None:
        self.worker = FakeWorker(place)
        self.file = place / "page.link"
        self.page = povfarm._WorkerPage([cast(Worker, self.worker)], "127.0.0.1:0", self.file)
        self.page.start()
        answer = self.ask("GET", self.link())
        cookie, _, path = answer.headers["Set-Cookie"].partition(";")
        self.cookie, self.place = cookie, answer.headers["Location"]
        assert path == f" HttpOnly; SameSite=Strict; Path={self.place}"

    def link(self) -> str:
        """Return the path of the next link."""
        return "/" + self.file.read_text().strip().split("/", 3)[3]

    def ask(self, method: str, path: str, cookie: str = "", token: Optional[str] = None,
            **headers: str) -> Response:
        """Send a request as a browser does."""
        body = b"" if token is None else f"token={token}".encode()
        return self.page.server.router.handle(Request(method, path, headers={
            "cookie": cookie, "host": "127.0.0.1", "accept": "text/html",
            "content-type": "application/x-www-form-urlencoded", **headers},
            body=BodyReader.of(body)))

    def mine(self, method: str, path: str, **more: Any) -> Response:
        """Send a request with what the link has given."""
        return self.ask(method, self.place + path, self.cookie, **more)

    def shown(self) -> Dom:
        """Return the page."""
        answer = self.mine("GET", "")
        assert answer.status == 200 and isinstance(answer.body, bytes)
        return Dom(answer.body.decode())

    def token(self) -> str:
        """Return what the forms have."""
        return str(self.shown().all("input", name="token")[0]["value"])

    def hold(self, job: int, name: str, image: str) -> None:
        """Keep an image as a worker does."""
        path = self.file.with_name("made.png")
        path.write_bytes(b"an image")
        run, task = SimpleNamespace(job=job), SimpleNamespace(name=image)
        self.worker.stays.setdefault(f"{job}-{name}", []).append(cast(Delivery, SimpleNamespace(
            run=run, task=task, image=path)))


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A page that somebody is logged in to."""
    opened = Page(tmp_path)
    yield opened
    opened.page.stop()


def test_it_shows_what_is_rendered_held_and_said_and_nothing_of_it_is_markup(page: Page) -> None:
    page.hold(3, "ball", "a1.png")
    povfarm._say(EVIL)
    answer = page.mine("GET", "")
    assert isinstance(answer.body, bytes) and EVIL not in answer.body.decode()
    text = page.shown().text
    assert text.count(EVIL) == 4
    for words in ("12", "40 %", "1:01", "7 frames, 1 slice delivered, 2 wait", "1 frame", "0 projects"):
        assert words in text
    assert answer.headers["Content-Security-Policy"] == povfarm.PAGE_HEADERS[
        "Content-Security-Policy"]
    told = page.mine("GET", "status.json")
    assert isinstance(told.body, bytes)
    view = json.loads(told.body)
    assert view["workers"][0]["runs"][0]["frames"] == [12, 13]
    assert [*view["held"].values()] == [["a1.png"]]
    looks = [link["href"] for link in page.shown().all("link")]
    assert len(looks) == 2 and all(page.ask("GET", look).status == 200 for look in looks)
    assert page.shown().all("meta", name="viewport")


def test_it_is_steered(page: Page) -> None:
    token = page.token()
    for action, told, buttons in (
            ("pause", "paused", ["resume", "stop"]), ("drain", "drained", ["resume", "stop"]),
            ("resume", "", ["pause", "drain", "stop"]), ("stop", "stop", ["resume", "stop"])):
        answer = page.mine("POST", action, token=token)
        assert (answer.status, answer.headers["Location"]) == (303, page.place)
        assert page.worker.told[-1] == told
        assert [form["action"] for form in page.shown().all("form")] == [
            f"{page.place}{button}" for button in buttons]
        assert told in page.shown().text
    assert page.mine("POST", "explode", token=token).status == 404


def test_what_is_held_is_fetched_and_delivered(page: Page) -> None:
    for job, image in ((3, "../a1.png"), (3, "a2.png"), (4, "b1.png")):
        page.hold(job, "scene", image)
    link, _ = page.shown().all("a", href=".zip")
    answer = page.ask("GET", link["href"], page.cookie)
    packed = zipfile.ZipFile(io.BytesIO(b"".join(cast(Any, answer.body))))
    assert packed.namelist() == ["a1.png", "a2.png"] and packed.read("a1.png") == b"an image"
    form, _ = page.shown().all("form", action="/deliver")
    assert page.ask("POST", form["action"], page.cookie, page.token()).status == 303
    assert set(page.worker.told) == {3}
    for path in ("held/0/5-scene.zip", "held/x/y.zip", "held/1/3-scene.zip", "held/../0/3-scene.zip"):
        assert page.mine("GET", path).status == 404, path


# --- nobody else

def doors() -> List[Tuple[str, str]]:
    """Every route that is not for anyone."""
    found = [tag for member in vars(povfarm._WorkerPage).values()
             for tag in getattr(member, "routes", ())]
    assert all(isinstance(tag, route) for tag in found) and {tag.role for tag in found} == {
        "admin", "anyone"}
    return [(tag.method, tag.pattern.replace("<action>", "stop").replace("<farm>", "0").replace(
        "<job>", "3-ball")) for tag in found if tag.role == "admin"]


@pytest.mark.parametrize("method, path", doors())
def test_nothing_is_for_who_has_not_come_by_a_link(page: Page, method: str, path: str) -> None:
    page.hold(3, "ball", "a1.png")
    token, session = page.token(), page.cookie.partition("=")[2]
    name = page.cookie.partition("=")[0]
    strangers: Dict[str, Tuple[str, str]] = {
        "without anything": (path, ""), "with the path only": (page.place + path[1:], ""),
        "with the cookie, not its path": (path, page.cookie),
        "with the cookie at another path": (f"/-{'0' * 16}{path}", page.cookie),
        "with another cookie": (page.place + path[1:], f"{name}={'x' * 32}"),
        "with another's name": (page.place + path[1:], f"povfarm={session}"),
    }
    for who, (place, cookie) in strangers.items():
        assert page.ask(method, place, cookie, token).status == 401, who
    assert page.worker.told == [] and len(page.page._held()) == 1


@pytest.mark.parametrize("path", [path for method, path in doors() if method == "POST"])
@pytest.mark.parametrize("headers", [
    {"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"}, {"host": "evil.example"}, {"origin": "null"}])
def test_a_page_of_another_site_changes_nothing(
        page: Page, path: str, headers: Dict[str, str]) -> None:
    page.hold(3, "ball", "a1.png")
    answer = page.mine("POST", path[1:], token=page.token(), **headers)
    assert answer.status == 403 and page.worker.told == [] and len(page.page._held()) == 1


@pytest.mark.parametrize("token", ["", "x", "0" * 64])
def test_a_form_of_another_time_changes_nothing(page: Page, token: str) -> None:
    assert page.mine("POST", "stop", token=token).status == 403 and page.worker.told == []
    assert page.mine("POST", "stop").status in (403, 415) and page.worker.told == []


def test_a_link_works_once_and_only_its_owner_can_read_the_next(page: Page) -> None:
    link = page.link()
    assert stat.S_IMODE(page.file.stat().st_mode) == 0o600
    assert page.ask("HEAD", link).status == 403  # a preview does not use it up
    assert page.ask("GET", link).status == 303 and page.link() != link
    for used in (link, "/login/x"):
        answer = page.ask("GET", used)
        assert answer.status == 403 and "Set-Cookie" not in answer.headers
    page.page.stop()
    assert not page.file.exists()


def test_it_listens_on_this_computer_only_unless_told_otherwise(tmp_path: Path) -> None:
    for listen, address in ((":0", "127.0.0.1"), ("0.0.0.0:0", "0.0.0.0")):
        page = povfarm._WorkerPage([], listen, tmp_path / "link")
        assert page.server.server_address[0] == address
        taken = page.server.port
        with pytest.raises(UserError, match="in use"):
            povfarm._WorkerPage([], f"127.0.0.1:{taken}", tmp_path / "link")
        page.server.server_close()


@pytest.mark.parametrize("typed, value", [
    (["--status-port"], ":2270"), (["--status-port", "--hold"], ":2270"), ([], ""),
    (["--status-port", "8000"], ":8000"), (["--status-port=[::1]:80"], "[::1]:80")])
def test_the_port_may_be_left_out(typed: List[str], value: str) -> None:
    tag, _ = povfarm._commands()["work"]
    assert povfarm._parse(tag, typed).status_port == value


# --- with a real worker

class Browser:
    """A browser without a face: keeps the cookie."""

    def __init__(self, link: str) -> None:
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        self.text = self._opener.open(link, timeout=60).read().decode()
        found = re.search(r'action="(/-[0-9a-f]+/)pause".*?value="([0-9a-f]+)"', self.text, re.S)
        assert found
        self.base, self.token = re.sub("/login.*", found[1], link), found[2]

    def get(self, path: str) -> bytes:
        """Return what is there."""
        return bytes(self._opener.open(self.base + path, timeout=60).read())

    def post(self, path: str) -> None:
        """Press a button."""
        self._opener.open(self.base + path, f"token={self.token}".encode(), timeout=60).read()

    def view(self) -> Any:
        """Return what the worker does."""
        return json.loads(self.get("status.json"))


@pytest.mark.slow
@pytest.mark.parametrize("farm", ["10m"], indirect=True)  # of what is held nothing expires
def test_a_worker_is_watched_paused_and_stopped_in_a_browser(
        povray: Any, farm: Farm, tmp_path: Path) -> None:
    place, file = project(tmp_path, HEAVY), tmp_path / "work" / "workers" / "w.link"
    worker = farm.work("--server", farm.client.base_url, "--data", str(tmp_path / "work"),
                       "--key-file", str(tmp_path / "farm" / "farm.key"),
                       "--worker-name", "w", "--status-port", "0", "--hold", "--cores", "1")
    browser = Browser(wait_until(lambda: file.is_file() and file.read_text().strip(), "no page"))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(re.sub("/-.*", "/", browser.base), timeout=60)
    wait_until(lambda: browser.view()["workers"], "it has not joined")
    browser.post("pause")
    first = farm.submit(place, "scene.pov", "+KFF4", *SMALL)
    assert browser.view()["workers"][0]["state"] == "resting"
    wait_until(lambda: farm.job(first)["frames"]["queued"] == 4, "it has kept a frame")
    browser.post("resume")
    wait_until(lambda: farm.job(first)["held"] == 4, "not held", 60)
    view = farm.job(first)
    assert view["frames"]["leased"] == 4 and f"set {first} bring=yes" in view["waiting_for"]
    run_povray(["scene.pov", "+KFF4", *SMALL], place)
    name, = browser.view()["held"]
    zipfile.ZipFile(io.BytesIO(browser.get(f"held/{name}.zip"))).extractall(tmp_path / "got")
    assert pictures(tmp_path / "got") == pictures(place)
    assert not list((tmp_path / "farm" / "jobs").rglob("*.png"))
    told = run(tmp_path, "fetch", str(first), "--output", "here", cwd=tmp_path)
    assert told.returncode == 0 and "bring 4 frames that they hold" in told.stderr, told.stderr
    assert pictures(tmp_path / "here") == pictures(place) and farm.job(first)["state"] == "done"
    assert browser.view()["held"] == {} and "is delivered" in browser.get("").decode()
    second = farm.submit(place, "scene.pov", "+KFF2", *SMALL)
    wait_until(lambda: farm.job(second)["held"] == 2, "not held", 60)
    for job in (first, second):
        assert run(tmp_path, "delete", str(job), cwd=place).returncode == 0
    wait_until(lambda: not any((tmp_path / "work" / "cache").iterdir()) and not list(
        (tmp_path / "work").glob("run-*/*")), "its project or its frames are still there")
    browser.post("stop")
    assert worker.wait(60) == 0 and not file.exists()
    farm.check()
