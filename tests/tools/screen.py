"""How soon what happens is seen: a real browser's page, and twenty tabs of it.

    python tests/tools/screen.py [--events 20] [--tabs 20]

starts a coordinator and headless Chromium, delivers frames at random times, and prints how long each
took to the screen, in seconds. Ends with 1 when one took longer than 2.5 s, or a tab is not live.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

from helpers.browser import browser
from helpers.pictures import HEIGHT, WIDTH, png
from povfarm import Coordinator, Cost, JobOptions, Manifest, Offer, PovJob, WorkerInfo


def measure(place: Path, events: int, tabs: int) -> Dict[str, Any]:
    """Seconds from a delivery to the screen, and how many of so many tabs say that they are live."""
    farm = Coordinator(place / "data", bind="127.0.0.1", name="screen", durable=False)
    farm.start()
    worker = farm.scheduler.join(WorkerInfo("anna", 2, 1, "x", {}), "t", "10.0.0.7")
    pov = PovJob({"Input_File_Name": "a.pov", "Width": str(WIDTH), "Height": str(HEIGHT),
                  "Final_Frame": "999"}, (), (), ".")
    farm.scheduler.submit("marbles", "me", pov, Manifest(()), JobOptions())
    taken = []
    try:
        with browser(place) as window:
            window.open(farm.url + "/")
            window.wait("document.querySelector('#live').textContent === 'Live'", "it never lives")
            for done in range(1, events + 1):
                time.sleep(random.uniform(0, 4))
                lease, = farm.scheduler.lease(worker, Offer(1, 1, 1), 0, lambda: True)
                began = time.monotonic()
                farm.scheduler.finish(worker, lease.id, lease.tasks[0].id, png(done), b"", Cost(20, 20))
                window.wait(f"document.body.innerText.includes('{done} of 999')", "it is never seen", 60)
                taken.append(round(time.monotonic() - began, 2))
            alive = 0
            for _ in range(tabs):
                window.send("window", handle=window.send("window/new", type="tab")["handle"])
                window.open(farm.url + "/")
                alive += bool(window.wait("document.querySelector('#live').textContent === 'Live'", "dead"))
    finally:
        farm.stop()
    return {"median": statistics.median(taken), "most": max(taken), "taken": taken, "tabs_live": alive}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--tabs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="povfarm-screen-") as scratch:
        figures = measure(Path(scratch), options.events, options.tabs)
    print(json.dumps(figures))
    sys.exit(0 if figures["most"] < 2.5 and figures["tabs_live"] == options.tabs else 1)


if __name__ == "__main__":
    main()
