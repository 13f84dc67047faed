"""What strangers may send: names that want to be scripts, broken HTTP, packets, zips and pictures."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import load
import pytest
from conftest import need, run_povray
from farm_in_a_box import manifest, png
from test_pages import Recorder, chromium

import povfarm
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
            "/stage": povfarm.html_response(FRAMES + "".join(frames)),
            "/taken": povfarm.html_response(hostile("taken")),
            "/policy": povfarm.html_response(hostile("policy")),
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
    pages = ["/", "/jobs/1", "/jobs/1/frames/1", "/jobs/1/frames/2", "/jobs/2", "/jobs/9",
             "/" + povfarm.urllib.parse.quote(hostile("path")), "/taken", "/policy"]
    farm.server.router = stage = Stage(farm.router, pages)  # type: ignore[assignment]
    farm.start()
    try:
        info = WorkerInfo(hostile("worker"), 2, 1, hostile("system"),
                          {"povray": hostile("version")}, (hostile("tag"),))
        worker = farm.scheduler.join(info, "t", "10.0.0.7", True)[0]
        farm.scheduler.join(info, "u", "10.0.0.8", False)
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
    assert ran == {"taken"}, "only the page that is meant to be taken in"
    shown = " ".join(dom.text.split())
    for where in ("farm", "worker", "version", "job", "paused", "message", "output", "path",
                  "declare", "owner", "scene"):
        for payload in PAYLOADS[:ROOM.get(where)]:
            assert " ".join((payload % where).split()) in shown.replace("\u2215", "/"), where


# --- many who come and say little; the long form is load.py

@pytest.mark.skipif(sys.platform != "linux", reason="other addresses of loopback, and /proc")
def test_a_worker_is_served_beside_hundreds_of_idle_and_slow_strangers(tmp_path: Path) -> None:
    figures = load.measure(tmp_path, 300, tls=False, rounds=5)
    assert figures["held"] == 300
    assert figures["lease_seconds_most"] < 1 and figures["memory"] < 300e6
    # Were it a thread for each: 300 more than the 20 MB or so that Python itself takes.
    assert figures["memory"] - figures["memory_before"] < 10e6
