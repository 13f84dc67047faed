"""RenderOnline's nodes, both ways: this computer as one, and those that render for the farm."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import threading
from dataclasses import replace
from hashlib import sha256 as _sha256
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, cast

import pytest

import povfarm
from helpers.base import run_povray, wait_until
from helpers.farm import STILL, run
from helpers.farm import Farm as RealFarm
from helpers.farm_in_a_box import Farm, Reply, manifest, pov_job
from helpers.pictures import pixels, png
from povfarm import (
    Bounds,
    Ended,
    Engine,
    HpcNode,
    Identity,
    JobOptions,
    Machines,
    OnlineRules,
    Process,
    Request,
    Router,
    UserError,
    node_text,
    program_job,
    words_of,
)

LINES = """\
engine povray = .pov $RENDERONLINE:@uploaded_file +W$RENDERONLINE:width +H30
engine render = .blend /bin/sh -b $RENDERONLINE:@uploaded_file -o $RENDERONLINE:@output \
-F $RENDERONLINE:output_format -s $RENDERONLINE:start_frame -e $RENDERONLINE:end_frame -a
argument width = natural
argument start_frame = natural
argument end_frame = natural
argument output_format = word
"""
JSON = "application/json; charset=utf-8"


def rules() -> OnlineRules:
    return OnlineRules.of([(*map(str.strip, line.partition("=")[::2]), "here")
                           for line in LINES.splitlines()], node=True)


def sha256(data: bytes) -> str:
    return _sha256(data).hexdigest()


class Held:
    """A launcher whose programs run until they are told to end."""

    def __init__(self) -> None:
        self.started: List[Tuple[Tuple[str, ...], Path, Dict[str, str], Bounds]] = []
        self.ini = ""
        self.end = threading.Event()
        self.code = 0

    def start(self, argv: Any, cwd: Path, environment: Any, bounds: Bounds) -> Process:
        if self.code == 127:
            raise povfarm.FarmError("it cannot be started")
        self.started.append((tuple(argv), cwd, dict(environment), bounds))
        if "POVINI" in environment:
            self.ini = Path(environment["POVINI"]).read_text()
        self.end.clear()
        return HeldProcess(self)


class HeldProcess(Process):
    def __init__(self, owner: Held) -> None:
        self.owner = owner
        self.kill = self.killed

    def killed(self) -> None:
        self.owner.code = -9
        self.owner.end.set()

    def lines(self) -> Iterator[str]:
        self.owner.end.wait(60)
        yield "the end"

    def wait(self) -> Ended:
        return Ended(self.owner.code, 0.0, 0)


class Box:
    """A node without a socket, and a directory with a scene."""

    def __init__(self, root: Path) -> None:
        self.launcher, self.files = Held(), root / "files"
        self.scene = self.files / "7" / "a.blend"
        self.scene.parent.mkdir(parents=True)
        for name in ("a.blend", "a.pov", "b.txt"):
            (self.scene.parent / name).write_text("x")
        (root / "outside.blend").write_text("x")
        (self.scene.parent / "link.blend").symlink_to(root / "outside.blend")
        self.node = HpcNode(rules(), self.files, Engine("/usr/bin/povray", "3.7", ("/lib",)),
                            self.launcher, Bounds((), memory=1 << 30))  # type: ignore[arg-type]
        self.router = Router(self.node, authenticate=lambda request: Identity())

    def ask(self, what: str, body: Any = None, kind: str = JSON) -> Tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        post = what != "status"
        answer = Reply(self.router.handle(Request(
            "POST" if post else "GET", f"/hpc/{what}", {}, {"content-type": kind} if post else {},
            povfarm.BodyReader.of(data if post else b""))))
        return answer.status, json.loads(answer.body) if answer.body else None

    def words(self, scene: str = "", output: str = "", **more: str) -> str:
        place = self.scene.parent
        return (f"-b {scene or place / 'a.blend'} -o {output or place / 'image'} -F "
                f"{more.get('form', 'PNG')} -s {more.get('first', '1')} -e 3 -a")

    def start(self, text: str, engine: str = "render", number: Any = 5) -> Tuple[int, Any]:
        return self.ask("start", {"EngineId": engine, "TaskId": number, "Arguments": text})

    def over(self, code: int = 0) -> Any:
        self.launcher.code = code
        self.launcher.end.set()
        return wait_until(lambda: not self.task()["IsRunning"]) and self.task()

    def task(self) -> Any:
        return self.ask("status")[1]["Task"]


@pytest.fixture(name="box")
def box_fixture(tmp_path: Path) -> Box:
    return Box(tmp_path)


def refused(message: str) -> Tuple[int, Any]:
    return 400, {"IsSuccess": False, "Message": message}


def done(message: str) -> Tuple[int, Any]:
    return 200, {"IsSuccess": True, "Message": message}


# --- this computer as a node, as the protocol's document has it

def test_a_task_from_its_start_to_its_end(box: Box) -> None:
    assert box.ask("status") == (200, {"EngineIds": ["povray", "render"], "Task": None})
    assert box.ask("stop", b"no JSON") == done("No active render!")
    assert box.start(box.words(), "RENDER") == done(
        "Rendering using engine with identifier: RENDER")
    task = box.task()
    assert task.pop("TotalSeconds") >= 0
    assert list(task.items()) == [("TaskId", 5), ("IsSuccess", False), ("IsRunning", True)]
    place = box.scene.parent
    argv, cwd, environment, bounds = box.launcher.started[0]
    assert argv == ("/bin/sh", "-b", str(box.scene), "-o", str(place / "image"), "-F", "PNG", "-s",
                    "1", "-e", "3", "-a")
    assert cwd == place and bounds.writes == str(place) and bounds.reads is not None
    assert bounds.reads[0] == str(place) and str(box.files) not in bounds.reads
    assert set(environment) == {"HOME", "TMPDIR", "PATH", "LANG"}
    assert box.start(box.words(), number=6) == refused("There already is an active render!")
    assert box.start("", "none", 6) == refused("There already is an active render!")
    assert box.task()["TaskId"] == 5
    assert box.over()["IsSuccess"] and box.task()["TaskId"] == 5
    assert not list(place.glob(".povfarm-*"))
    assert box.ask("stop", {"TaskId": 5}) == done("No active render!")


def test_the_name_of_the_program_may_stand_in_front_once_more(box: Box) -> None:
    assert box.start(f"render {box.words()}")[0] == 200
    assert box.launcher.started[0][0][:2] == ("/bin/sh", "-b")
    assert not box.over(1)["IsSuccess"]


def test_a_render_is_stopped_by_its_task(box: Box) -> None:
    assert box.ask("start", {"engineid": "render", "taskid": 5, "arguments": box.words()})[0] == 200
    assert box.ask("stop", {"TaskId": 6}) == refused(
        "No process running with provided task identifier!")
    assert box.ask("stop", b"null") == refused("Invalid render arguments!")
    assert box.ask("stop", b"{") == refused("Failed to terminate the current render task!")
    assert box.ask("stop", {"TaskId": 5}, "text/plain") == refused(
        "Failed to terminate the current render task!")
    assert box.task()["IsRunning"]
    assert box.ask("stop", {"taskId": 5}) == done("Active render terminated!")
    wait_until(lambda: not box.task()["IsRunning"])
    assert not box.task()["IsSuccess"]


def test_a_paused_node_is_busy_and_a_drained_one_finishes(box: Box) -> None:
    box.start(box.words())
    box.node.rest("drained")
    assert box.over()["IsSuccess"] and box.start(box.words(), number=6) == refused(
        "There already is an active render!")
    box.node.rest("")
    box.launcher.code = 0
    assert box.start(box.words(), number=6)[0] == 200
    box.node.rest("paused", "outside of its hours (sun)")
    busy = {"TaskId": 0, "IsSuccess": False, "IsRunning": True, "TotalSeconds": 0}
    wait_until(lambda: box.task() == busy, "what it rendered goes on")
    assert box.launcher.code == -9 and box.start(box.words(), number=7)[0] == 400
    box.node.rest("", "outside of its hours (sun)")
    assert (box.task()["TaskId"], box.task()["IsRunning"]) == (6, False)
    box.launcher.code = 0
    assert box.start(box.words(), number=8)[0] == 200


def test_what_cannot_be_started_is_said_in_the_protocols_words(box: Box) -> None:
    assert box.start(box.words(), "none") == refused(
        "Requested rendering engine not configured: none")
    for body in (b"null", b"[]", {"EngineId": None, "Arguments": ""}, {"EngineId": "render"},
                 {"EngineId": "render", "Arguments": box.words(), "TaskId": -1},
                 {"EngineId": "render", "Arguments": box.words(), "TaskId": "5"}):
        assert box.ask("start", body) == refused("Invalid render arguments!")
    assert box.ask("start", b"{") == (500, None)
    assert box.ask("start", {"EngineId": "render"}, "text/plain") == (500, None)
    (box.scene.parent / "bad.ini").write_bytes(b"\xff\xfe")
    assert box.start(f"{box.scene.parent / 'bad.ini'}", "povray") == refused("Invalid render arguments!")
    assert box.task() is None
    box.launcher.code = 127
    assert box.start(box.words()) == refused("")
    assert box.launcher.started == []


def test_a_refused_start_changes_what_is_shown_as_the_real_one_does(box: Box) -> None:
    box.start(box.words())
    assert box.over()["IsSuccess"]
    assert box.start("x", "none", 9)[0] == 400
    assert (box.task()["TaskId"], box.task()["IsSuccess"]) == (9, False)


@pytest.mark.parametrize("change", [
    {"scene": "OUTSIDE"}, {"scene": "PLACE/none.blend"}, {"scene": "PLACE/link.blend"},
    {"scene": "PLACE/b.txt"}, {"scene": "PLACE/../../outside.blend"}, {"scene": "PLACE"},
    {"output": "/tmp/image"}, {"output": "PLACE/../image"}, {"output": "FILES/image"},
    {"form": "P-G"}, {"first": "x"}, {"first": "1 --python evil.py"}, {"first": "-1"},
    {"form": '"PNG x"'}, {"scene": '"PLACE/a.blend'}, {"scene": '"PLACE\\a.blend\\"'},
])
def test_arguments_are_the_owners_words_with_values_that_fit(change: Dict[str, str], box: Box) -> None:
    names = {"OUTSIDE": str(box.files.parent / "outside.blend"), "FILES": str(box.files),
             "PLACE": str(box.scene.parent)}
    for name, path in names.items():
        change = {key: value.replace(name, path) for key, value in change.items()}
    assert box.start(box.words(**change)) == refused("Invalid render arguments!")
    assert box.launcher.started == []


@pytest.mark.parametrize("text", [
    "", "--help", "-b", "; ls", "--python-expr 1 WORDS", "WORDS --python x", "WORDS -a", "WORDS;ls",
    "WORDS | sh", "$(ls)",
])
def test_nothing_is_added_to_the_owners_words(text: str, box: Box) -> None:
    assert box.start(text.replace("WORDS", box.words())) == refused("Invalid render arguments!")
    assert box.launcher.started == []


def test_povray_renders_a_scene_by_the_owners_line_and_an_ini_that_povfarm_wrote(box: Box) -> None:
    place = box.scene.parent
    assert box.start(f"{place / 'a.pov'} +W40 +H30", "povray")[0] == 200
    argv, _, environment, bounds = box.launcher.started[0]
    assert argv == ("/usr/bin/povray", str(place / "a.pov"), "+W40", "+H30")
    assert box.launcher.ini == "Display=Off\nLibrary_Path=\"/lib\"\n" and "/lib" in (bounds.reads or ())
    assert environment["HOME"].startswith(f"{place}/.povfarm-")
    box.over()
    text = povfarm.client_ini(pov_job(3), str(place), [1, 2])
    (place / "povfarm.ini").write_text(text)
    assert box.start(str(place / "povfarm.ini"), "povray")[0] == 200
    assert box.launcher.started[1][0] == ("/usr/bin/povray",) and box.launcher.ini == text
    box.over()
    for line in ("Pre_Scene_Command=touch x\n", "Post_Frame_Command=ls\n", "Include_Ini=/etc/x\n",
                 "+Iother.pov\n", "# a comment\n"):
        (place / "povfarm.ini").write_text(text + line)
        assert box.start(str(place / "povfarm.ini"), "povray") == refused(
            "Invalid render arguments!")
    for words in ("+W40 +H30 Pre_Scene_Command=ls", "+W40x +H30", "+W40"):
        assert box.start(f"{place / 'a.pov'} {words}", "povray")[0] == 400
    assert len(box.launcher.started) == 2


@pytest.mark.parametrize("text, words", [
    ("-b  a.blend -a", ["-b", "a.blend", "-a"]), ('-b "a b.blend"', ["-b", "a b.blend"]),
    ('a"b c"d', ["ab cd"]), ("it's", ["it's"]), ("a\\b", ["a\\b"]), ("", []),
])
def test_a_command_line_is_taken_apart_as_net_does(text: str, words: List[str]) -> None:
    assert words_of(text) == words


def test_what_is_told_to_a_node_is_what_it_reads() -> None:
    for words in (["a b", "c"], ["/x/it's", "+W3"], ["a\\b"]):
        assert words_of(node_text(words)) == words
    for bad in ('a"b', "a\nb", "a b\\"):
        with pytest.raises(UserError):
            node_text([bad])


def test_browsers_are_not_lured_to_a_node(box: Box) -> None:
    """A page of another origin can send no JSON unasked, and there is nobody to ask."""
    for what in ("start", "stop"):
        answer = box.router.handle(Request("OPTIONS", f"/hpc/{what}"))
        assert answer.status == 405 and "Access-Control-Allow-Origin" not in answer.headers
    body = {"EngineId": "render", "TaskId": 5, "Arguments": box.words()}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert box.ask("start", body, kind)[0] == 500
    assert box.launcher.started == []


# --- nodes that render for the farm

class StandIn(http.server.ThreadingHTTPServer):
    """A node by the recorded rules, which makes the pictures that it is asked for."""

    def __init__(self) -> None:
        self.asked: List[Tuple[str, Dict[str, str], bytes]] = []
        self.task: Optional[Dict[str, Any]] = None
        self.engines, self.wrong, self.renders = ["PovRay", "render"], "", True
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def answer(self, what: str, body: Any) -> Tuple[int, Any]:
        if what == "status":
            return 200, {"EngineIds": self.engines, "Task": self.task}
        if what == "stop":
            assert self.task
            self.task.update(IsRunning=False)
            return done("Active render terminated!")
        if self.wrong:
            return refused(self.wrong)
        self.task = {"TaskId": body["TaskId"], "IsSuccess": True, "IsRunning": not self.renders,
                     "TotalSeconds": 0}
        if self.renders:
            self.render(body)
        return done("")

    def render(self, body: Any) -> None:
        words = words_of(body["Arguments"])
        if body["EngineId"] == "povray":
            text = Path(words[0]).read_text()
            povfarm.check_ini(text)
            values = dict(line.split("=", 1) for line in text.splitlines())
            first, last = (int(values[f"Subset_{end}_Frame"]) for end in ("Start", "End"))
            image = values["Output_File_Name"].strip('"')
        else:
            assert Path(words[1]).read_bytes() == b"the scene"
            first, last = (int(words[words.index(one) + 1]) for one in ("-s", "-e"))
            image = words[words.index("-o") + 1]
        for frame in range(first, last + 1):
            Path(f"{image}{frame:04d}.png").write_bytes(png(frame))


class Answer(http.server.BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.asked.append((self.path, dict(self.headers.items()), data))
        status, answer = self.server.answer(self.path[5:], json.loads(data) if data else None)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


class NodeFarm(Farm):
    """A farm that has one node, a stand-in."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, cast(Any, povfarm.Clock()))
        self.machines = Machines(self.scheduler, self.access, rules())
        self.router = Router(self.api, self.machines, authenticate=self.access.identify)
        self.node = StandIn()

    def use(self) -> None:
        assert self.ask("POST", "/api/v1/machines",
                        json_body={"address": self.node.address}).status == 204

    def ended(self, job: int) -> Any:
        wait_until(lambda: self.view(job)["state"] in ("done", "failed"))
        return self.view(job)

    def view(self, job: int) -> Any:
        return self.ask("GET", f"/api/v1/jobs/{job}").json()

    def told(self) -> str:
        """All that happened, in words."""
        with self.store.read() as look:
            return "\n".join(event.text for event in look.events(0, 10_000))

    def close(self) -> None:
        self.scheduler.close()
        self.machines.stop()
        self.node.shutdown()
        self.node.server_close()
        super().close()


@pytest.fixture(name="farm")
def farm_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeFarm]:
    monkeypatch.setattr(povfarm, "NODE_LOOK", 0.01)
    monkeypatch.setattr(povfarm, "NODE_PAUSE", 0.05)
    monkeypatch.setattr(povfarm, "NODE_WAIT", 0.1)
    farm = NodeFarm(tmp_path / "data")
    yield farm
    farm.close()


def blend(farm: NodeFarm) -> int:
    pov = program_job("render", "a.blend", {"Initial_Frame": "1", "Final_Frame": "3"}, "a", {})
    job, _ = farm.scheduler.submit("a", "admin", pov, manifest({"a.blend": b"the scene"}),
                                   JobOptions())
    farm.scheduler.put_blob(sha256(b"the scene"), [b"the scene"])
    return job


@pytest.mark.parametrize("kind", ["povray", "render"])
def test_a_node_renders_the_frames_of_a_job(kind: str, farm: NodeFarm) -> None:
    job = farm.submit(3) if kind == "povray" else blend(farm)
    farm.use()
    assert farm.ended(job)["state"] == "done"
    (_, headers, body), *_ = [one for one in farm.node.asked if one[0] == "/hpc/start"]
    wish = json.loads(body)
    assert [*wish] == ["EngineId", "TaskId", "Arguments"] and wish["EngineId"] == kind
    assert body == json.dumps(wish, separators=(",", ":")).encode()
    assert headers["Content-Type"] == JSON and headers["Content-Length"] == str(len(body))
    assert "User-Agent" not in headers and "Transfer-Encoding" not in headers
    wait_until(lambda: not list((farm.root / "hpc").glob("*/*")))
    (machine,) = farm.ask("GET", "/api/v1/workers").json()["workers"]
    assert machine["name"] == f"machine-{farm.node.address.replace(':', '-')}"


def test_anothers_end_is_not_credited_to_our_task(farm: NodeFarm) -> None:
    farm.node.renders = False
    job = farm.submit(1)
    farm.use()
    wait_until(lambda: farm.node.task)
    farm.node.task = {"TaskId": 999, "IsSuccess": True, "IsRunning": False, "TotalSeconds": 1}
    wait_until(lambda: "renders something else" in farm.told())
    assert farm.job(job).done == 0


def test_what_a_paused_node_rendered_goes_elsewhere_and_costs_no_try(farm: NodeFarm) -> None:
    farm.node.renders = False
    job = farm.submit(1, retry_limit=1)
    farm.use()
    wait_until(lambda: farm.node.task)
    farm.node.task = {"TaskId": 0, "IsSuccess": False, "IsRunning": True, "TotalSeconds": 0}
    wait_until(lambda: farm.job(job).leased == 0, "it is not handed back")
    assert farm.view(job)["state"] == "active"
    farm.node.renders, farm.node.task = True, None
    assert farm.ended(job)["state"] == "done"


def test_a_busy_node_is_left_alone_and_one_that_is_gone_comes_back(farm: NodeFarm) -> None:
    farm.node.task = {"TaskId": 3, "IsSuccess": False, "IsRunning": True, "TotalSeconds": 1}
    job = farm.submit(1)
    farm.use()
    wait_until(lambda: len(farm.node.asked) > 3)
    assert {path for path, _, _ in farm.node.asked} == {"/hpc/status"}
    farm.node.task, farm.node.wrong = None, povfarm.RENDERS_ALREADY
    wait_until(lambda: sum(path == "/hpc/start" for path, _, _ in farm.node.asked) > 4)
    assert farm.view(job)["state"] == "active"  # which counts as no try
    farm.node.wrong = ""
    assert farm.ended(job)["state"] == "done"


def test_a_node_that_will_not_or_makes_nothing_has_failed(farm: NodeFarm) -> None:
    farm.node.wrong = "Invalid render arguments!"
    job = farm.submit(1, retry_limit=1)
    farm.use()
    assert farm.ended(job)["state"] == "failed"
    farm.node.wrong = ""
    farm.node.render = lambda body: None  # type: ignore[method-assign]
    other = farm.submit(1, retry_limit=1)
    assert farm.ended(other)["state"] == "failed"
    assert "refused it: Invalid render arguments!" in farm.told()
    assert "made no picture of it" in farm.told()


def test_a_cancelled_job_stops_the_node(farm: NodeFarm) -> None:
    farm.node.renders = False
    job = farm.submit(1)
    farm.use()
    wait_until(lambda: farm.node.task)
    assert farm.ask("POST", f"/api/v1/jobs/{job}/cancel").status < 300
    wait_until(lambda: not farm.node.task or not farm.node.task["IsRunning"])
    (stop,) = [body for path, _, body in farm.node.asked if path == "/hpc/stop"]
    assert farm.node.task and json.loads(stop) == {"TaskId": farm.node.task["TaskId"]}


def test_nodes_get_only_what_they_render_as_we_do(farm: NodeFarm) -> None:
    farm.node.engines = ["blender"]
    farm.submit(1)
    blend(farm)
    farm.submit(1, uses=("own-files",))
    farm.use()
    wait_until(lambda: farm.node.asked)
    farm.node.engines = ["povray"]
    wait_until(lambda: sum(view["state"] == "done" for view in farm.ask(
        "GET", "/api/v1/jobs").json()["jobs"]) == 1)
    assert {json.loads(body)["EngineId"] for path, _, body in farm.node.asked
            if path == "/hpc/start"} == {"povray"}


def test_of_a_program_that_ended_badly_the_last_picture_is_not_taken(farm: NodeFarm) -> None:
    made = farm.node.render

    def fail(body: Any) -> None:
        made(body)
        assert farm.node.task
        farm.node.task["IsSuccess"] = False

    farm.node.render = fail  # type: ignore[method-assign]
    job = farm.submit(1, retry_limit=1)
    farm.use()
    assert farm.ended(job)["state"] == "failed"


def test_a_job_tells_a_node_nothing_that_the_lines_do_not_allow(farm: NodeFarm) -> None:
    for uses, values in (({"quality": "x"}, {}), ({"width": "--python"}, {}), ({}, {"scene": 1})):
        pov = program_job("render", "a.blend", {}, "a", uses)
        if values:
            pov = replace(pov, values={**pov.values, "Input_File_Name": "../../etc/x.blend"})
        farm.scheduler.submit("a", "admin", pov, manifest({"a.blend": b"the scene"}),
                              JobOptions(retry_limit=1))
        farm.scheduler.put_blob(sha256(b"the scene"), [b"the scene"])
    farm.use()
    for job in (1, 2, 3):
        assert farm.ended(job)["state"] == "failed"
    assert "/hpc/start" not in {path for path, _, _ in farm.node.asked}


def test_what_a_killed_coordinator_laid_out_goes(farm: NodeFarm) -> None:
    farm.use()
    left = farm.root / "hpc" / f"farm-{farm.access.farm_id}" / "1-abc"
    left.mkdir(parents=True)
    (farm.root / "hpc" / "anothers").mkdir()
    again = Machines(farm.scheduler, farm.access, rules())
    again.start()
    again.stop()
    assert not left.exists() and (farm.root / "hpc" / "anothers").exists()


def test_a_picture_is_taken_from_the_jobs_own_directory_only(farm: NodeFarm, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(png(1))

    def lead_away(body: Any) -> None:
        place = Path(words_of(body["Arguments"])[0]).parent
        (place / "made" / "image0.png").symlink_to(tmp_path / "private.png")

    farm.node.render = lead_away  # type: ignore[method-assign]
    job = farm.submit(1, retry_limit=1)
    farm.use()
    assert farm.ended(job)["state"] == "failed"


def test_nodes_are_added_listed_and_removed_by_the_admin(farm: NodeFarm) -> None:
    for wrong in ("nowhere", "a b:1", "http://x:1", "x:port", "x:1/../y"):
        assert farm.ask("POST", "/api/v1/machines", json_body={"address": wrong}).status == 400
    for wrong in ("relative", '/a"b'):
        assert farm.ask("POST", "/api/v1/machines",
                        json_body={"address": "x:1", "directory": wrong}).status == 400
    farm.use()
    shown = farm.ask("GET", "/api/v1/machines").json()["machines"]
    assert shown == [{"address": farm.node.address, "directory": str(farm.root / "hpc")}]
    again = Machines(farm.scheduler, farm.access, rules())
    assert again._known == {farm.node.address: str(farm.root / "hpc")}  # it outlives a restart
    wait_until(lambda: farm.ask("GET", "/api/v1/workers").json()["workers"])
    assert farm.ask("DELETE", f"/api/v1/machines/{farm.node.address}").status == 204
    assert farm.ask("DELETE", f"/api/v1/machines/{farm.node.address}").status == 404
    assert farm.ask("GET", "/api/v1/machines").json()["machines"] == []


# --- both of ours, and whoever else asks a node of ours

@pytest.mark.slow
def test_two_of_ours_and_a_stranger_render_on_a_node(povray: str, tmp_path: Path) -> None:
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "povfarm.ini").write_text(f"[povfarm]\n[renderonline]\n{LINES}")
    (tmp_path / "scene.pov").write_text(STILL)
    options = ["scene.pov", "+W40", "+H30"]
    with contextlib.closing(RealFarm(tmp_path)) as farm:
        node = farm.work("--hpc", "0", "--worker-name", "node")
        assert node.stdout is not None
        said = node.stdout.readline()
        address = said.partition(" at ")[2].partition(" ")[0]
        assert address.startswith("127.0.0.1:") and "povray" in said
        added = run(tmp_path, "machines", "add", address, cwd=tmp_path)
        assert added.returncode == 0 and address in added.stdout
        film = farm.submit(tmp_path, *options, "+KFI1", "+KFF3")
        still = farm.submit(tmp_path, *options, "+Ostill")
        for job in (film, still):
            assert farm.finished(job, 120)["state"] == "done"
            assert run(tmp_path, "fetch", str(job), "--output", str(tmp_path / "made"),
                       cwd=tmp_path).returncode == 0
        place = tmp_path / "farm" / "hpc" / "theirs"
        place.mkdir()
        (place / "scene.pov").write_text(STILL)

        def ask(what: str, body: Any = None) -> Any:
            connection = http.client.HTTPConnection(address, timeout=60)
            with contextlib.closing(connection):
                connection.request("POST" if body else "GET", f"/hpc/{what}",
                                   json.dumps(body) if body else None, {"Content-Type": JSON})
                return json.loads(connection.getresponse().read())

        wish = {"EngineId": "povray", "TaskId": 5, "Arguments": f"{place}/scene.pov +W40 +H30"}
        assert ask("start", wish)["IsSuccess"]
        wait_until(lambda: not ask("status")["Task"]["IsRunning"])
        assert ask("status")["Task"]["IsSuccess"]
        removed = run(tmp_path, "machines", "remove", address, cwd=tmp_path)
        assert removed.returncode == 0 and "no machine is used" in removed.stdout
        assert run(tmp_path, "machines", "remove", address, cwd=tmp_path).returncode == 2
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "scene.pov").write_text(STILL)
    assert run_povray([*options, "+KFI1", "+KFF3"], plain).returncode == 0
    assert run_povray([*options, "+Ostill"], plain).returncode == 0
    for name in ("scene1.png", "scene2.png", "scene3.png", "still.png"):
        assert pixels(tmp_path / "made" / name) == pixels(plain / name), name
    assert pixels(place / "scene.png") == pixels(plain / "still.png")


@pytest.mark.slow
def test_a_node_needs_a_line_for_what_it_renders(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for port in ("here", "1:99999", "x"):
        assert povfarm.main(["work", "--hpc", port, "--data", str(tmp_path)]) == 2
    assert "is not a port" in capsys.readouterr().err
    assert povfarm.main(["work", "--hpc", "0", "--data", str(tmp_path)]) == 2
    assert "has no engine for RenderOnline" in capsys.readouterr().err
