"""Takes the pictures of the pages that are in docs/, of a real farm in a real browser.

    python tests/tools/portraits.py [DIRECTORY]

Starts a coordinator and a worker, lets them render an animation, a large picture and small ones
of several kinds, with a scene that fails and a worker that asks to join, and keeps what Chromium
shows: home without a job, home, home in the dark and on a phone, a job, its film, two frames of it
in the lightbox, trouble. Look at each.
Needs povray, chromium and chromedriver. Ends with 1 if the browser complains of anything.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Callable, List

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

from helpers.base import ROOT, wait_until
from helpers.browser import ELEMENT, Browser, browser
from helpers.farm import Farm

BALL = """#version 3.7; global_settings { assumed_gamma 1 }
camera { location <0, 2, -6> look_at y } light_source { <5, 8, -5> rgb 1 }
plane { y, 0 pigment { checker rgb <.9, .95, 1> rgb <.3, .5, .8> } finish { reflection .2 } }
sphere { <2 * sin(clock * 2 * pi), 1.2 + .6 * cos(clock * 4 * pi), 0>, 1
  pigment { rgb <.9, .5, .3> } finish { phong .8 reflection .2 } }
sky_sphere { pigment { gradient y color_map { [0 rgb <1, .95, .85>] [1 rgb <.3, .5, .9>] } } }
"""
POSTER = """#version 3.7; global_settings { assumed_gamma 1 }
camera { location <0, 2, -6> look_at y / 2 } background { rgb <.02, .03, .06> }
light_source { <5, 8, -5> rgb 1 area_light 2*x, 2*y, 5, 5 adaptive 1 }
plane { y, 0 pigment { checker rgb .8 rgb .4 } finish { reflection .3 } }
#for (I, -2, 2) sphere { <I, .5, I>, .5 pigment { rgb <.4 + I / 10, .5, .6 - I / 10> }
  finish { reflection .4 phong 1 } } #end
"""
BROKEN = "#version 3.7;\nsphere { 0, 1 pigment { Goldd } }\n"
SMALL = ("+W320", "+H240")


def look(farm: Farm, to: Path, page: str = "", act: Callable[[Browser], object] | None = None,
         **how: bool | int) -> List[str]:
    """Keep what the farm's admin sees of a page, after ``act``; return what the browser
    complains of."""
    whole = bool(how.pop("whole", False))
    with tempfile.TemporaryDirectory() as place, browser(Path(place), **how) as window:  # type: ignore[arg-type]
        log_in(farm, window)
        window.open(window.run("return location.href") + page)
        window.wait("[...document.images].every(one => one.complete || one.loading === 'lazy' &&"
                    " one.getBoundingClientRect().top > innerHeight)", "an image does not come", 60)
        window.wait("document.querySelector('#live').textContent === 'Live'", "it never lives")
        if act:
            act(window)
        window.picture(to, whole)
        return window.complaints()


def log_in(farm: Farm, window: Browser) -> None:
    """Follow a login link of the admin's."""
    window.open(f"http://127.0.0.1:{farm.port}"
                + farm.client.request("POST", "/api/v1/login").json()["path"])


def name_no_paths(window: Browser) -> None:
    """Show commands as they are typed elsewhere."""
    window.run("""for (const one of document.querySelectorAll('pre'))
        one.textContent = one.textContent.replace(/.*povfarm.py/, 'povfarm.py').replace(/ --data .*farm /, ' ');
        """)


def play(window: Browser) -> None:
    """Watch the film for a moment."""
    window.press(" ")
    window.wait("document.querySelector('output').textContent.startsWith('frame 2')", "no film")


def compare(window: Browser) -> None:
    """Pin a frame in the lightbox, and wipe over to one that comes later."""
    window.press(" ", "k")
    window.click(".stage .large a")
    window.wait("document.querySelector('#box img').naturalWidth", "no picture")
    window.press("p", *["\ue014"] * 12)
    window.wait("document.querySelector('#box img').src.includes('/frames/1')", "no other frame")
    middle = {ELEMENT: window.element(".pane")}
    window.send("actions", actions=[{"type": "pointer", "id": "mouse", "actions": [
        {"type": "pointerMove", "origin": middle, "x": x, "y": 60} for x in (60, -40)]}])
    window.wait("document.querySelector('#box output').textContent.includes('pinned')", "no pin")


def main() -> int:
    """Take them all."""
    to = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "pages")
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        scenes = Path(place, "scenes")
        scenes.mkdir()
        for name, text in (("ball", BALL), ("poster", POSTER), ("teapot", BROKEN)):
            (scenes / f"{name}.pov").write_text(text)
        farm = Farm(Path(place))
        try:
            wrong = look(farm, to / "empty.png", act=name_no_paths)
            farm.work("--cores", "2", "--worker-name", "workshop")
            for kind in "TEHJN":
                farm.finished(farm.submit(scenes, "poster.pov", f"+F{kind}", *SMALL), 300)
            broken = farm.submit(scenes, "teapot.pov", *SMALL, "+KFF5")
            wait_until(lambda: farm.job(broken)["state"] in ("paused", "failed"),
                       "it does not fail", 300)
            paused = farm.submit(scenes, "poster.pov", "+W1600", "+H900", "+A0.1")
            farm.client.request("POST", f"/api/v1/jobs/{paused}/pause")
            film = farm.submit(scenes, "ball.pov", "+W400", "+H225", "+A0.3", "+KFF240")
            wait_until(lambda: farm.job(film)["frames"]["done"] >= 50, "no film", 900)
            farm.start("work", "--cores", "4", "--worker-name", "attic", "--server", f"http://127.0.0.1:{farm.port}",
                       "--data", str(Path(place, "guest")))
            wait_until(lambda: any("code" in one for one in farm.client.request(
                "GET", "/api/v1/workers").json()["workers"]), "nobody asks to join")
            wrong += look(farm, to / "home.png") + look(farm, to / "dark.png", dark=True)
            wrong += look(farm, to / "phone.png", width=390, height=844)
            wrong += look(farm, to / "job.png", f"jobs/{film}")
            wrong += look(farm, to / "player.png", f"jobs/{film}", play)
            wrong += look(farm, to / "lightbox.png", f"jobs/{film}", compare)
            wrong += look(farm, to / "trouble.png", f"jobs/{broken}")
        finally:
            farm.close()
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
