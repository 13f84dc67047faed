"""Runs the recipes of docs/clusters.md and of the manual: real programs of others, real POV-Ray.

    python tests/tools/clusters.py [PART ...]

Each part is one recipe, with the files of docs/clusters/ as they are there; without a name all
are run. What needs root or a program that is not here is named as not tried. Ends with 1 when
something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

import povfarm
from helpers.base import POVFARM, ROOT, wait_until
from helpers.farm import STILL, environment
from helpers.sockets import free_port

DOCS = ROOT / "docs"
HEAVY = STILL.replace("sphere {", """#declare N = 0;
#while (N < 60) sphere { <mod(N, 7) - 3, mod(N, 5) - 2, N / 10>, 0.45
  pigment { rgbt <1, 1, 1, 0.3> } finish { reflection 0.6 } interior { ior 1.4 } }
#declare N = N + 1; #end
sphere {""", 1)


class NotTried(Exception):
    """What a recipe needs is not here."""


def need(*programs: str) -> None:
    """Go on only where these programs are."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        raise NotTried(f"{', '.join(missing)} not found")


class Bench:
    """A directory, the processes that work in it, and a coordinator."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.env = environment(place)
        self.held = contextlib.ExitStack()

    def start(self, *command: str, log: str = "", env: Mapping[str, str] = {},
              cwd: Optional[Path] = None) -> "subprocess.Popen[bytes]":
        """Start a program; what it says goes to ``log``."""
        with open(self.place / (log or f"{Path(command[0]).name}.log"), "ab") as file:
            process = subprocess.Popen(command, cwd=cwd or self.place, env={**self.env, **env},
                                       stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self.held.callback(self.end, process)
        return process

    def end(self, process: "subprocess.Popen[bytes]") -> int:
        """Ask a process to end, and see to it."""
        if process.poll() is None:
            process.terminate()
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def run(self, *command: str, cwd: Optional[Path] = None, env: Mapping[str, str] = {}) -> str:
        """Run a program to its good end, and return what it says."""
        done = subprocess.run(command, cwd=cwd or self.place, env={**self.env, **env}, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def povfarm(self, *arguments: str, cwd: Optional[Path] = None) -> str:
        """Run a povfarm command."""
        return self.run(*POVFARM, *arguments, cwd=cwd)

    def serve(self, *arguments: str, bind: str = "127.0.0.1") -> "subprocess.Popen[bytes]":
        """Start a coordinator."""
        process = self.start(*POVFARM, "serve", "--bind", bind, "--port", "0", "--no-discovery",
                             *arguments, log="serve.log")
        note = self.place / "farm" / "coordinator.json"
        wait_until(lambda: note.exists() or process.poll() is not None, "the coordinator does not start")
        self.url = json.loads(note.read_text())["url"]
        self.pin = json.loads(note.read_text())["pin"]
        self.port = int(self.url.rpartition(":")[2])
        self.client = povfarm.Client(self.url, (self.place / "farm" / "farm.key").read_text().strip(),
                                     fingerprint=self.pin, retry_for=20)
        return process

    def project(self, text: str = STILL, name: str = "project") -> Path:
        """Make a project of one scene."""
        place = self.place / name
        place.mkdir(exist_ok=True)
        (place / "scene.pov").write_text(text)
        return place

    def submit(self, frames: int, *arguments: str, text: str = STILL) -> int:
        """Queue an animation, and return its number."""
        return int(self.povfarm("submit", "scene.pov", "+W40", "+H30", f"+KFF{frames}", *arguments,
                                cwd=self.project(text)).split()[0])

    def job(self, job: int) -> Dict[str, Any]:
        """A job as it stands."""
        return dict(self.client.get(f"/api/v1/jobs/{job}"))

    def finished(self, job: int, seconds: float = 120) -> Dict[str, Any]:
        """Wait until a job is done."""
        wait_until(lambda: self.job(job)["state"] in ("done", "failed"), f"job {job} does not end",
                   seconds)
        view = self.job(job)
        assert view["state"] == "done", view["failure"]
        return view


@contextlib.contextmanager
def bench(name: str) -> Iterator[Bench]:
    """Give a directory and processes that are gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix=f"povfarm-{name}-"))
    made = Bench(place)
    try:
        yield made
    except BaseException:
        for log in sorted(place.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text('utf-8', 'replace')[-1500:]}")
        raise
    finally:
        made.held.close()
        shutil.rmtree(place, ignore_errors=True)


# --- Prometheus

def asked(port: int, query: str) -> List[Dict[str, Any]]:
    """What a Prometheus answers to a query."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return list(json.loads(answer.read())["data"]["result"])


def panels() -> List[str]:
    """The queries of the dashboard, for the farm that is asked here."""
    board = json.loads((DOCS / "grafana.json").read_text())
    return [target["expr"].replace("$farm", "farm").replace("[5m]", "[1m]")
            for panel in board["panels"] for target in panel["targets"]]


def prometheus(farm: Bench) -> str:
    """A private farm with TLS, a read-only key, the rules and every query of the dashboard."""
    need("prometheus", "promtool")
    farm.serve("--private", "--tls", "auto", "--sheepit")
    key = json.loads(farm.povfarm("users", "add", "prometheus", "--role", "viewer", "--json"))["key"]
    (farm.place / "prometheus.key").write_text(key)
    (farm.place / "alerts.yml").write_text((DOCS / "alerts.yml").read_text())
    manual = re.search(r"```yaml\n(scrape_configs:.*?)```", (DOCS / "manual.md").read_text(), re.DOTALL)
    assert manual, "the manual has no scrape_configs"
    text = manual[1].replace("/etc/prometheus/", f"{farm.place}/").replace(
        "/srv/povfarm/", f"{farm.place}/farm/").replace("studio:2271", f"127.0.0.1:{farm.port}")
    (farm.place / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [alerts.yml]\n" + text
        + "        labels: {instance: farm}\n")
    farm.run("promtool", "check", "config", "prometheus.yml")
    farm.run("promtool", "check", "rules", str(DOCS / "alerts.yml"))
    job = farm.submit(3)
    port = free_port()
    server = farm.start("prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb",
                        f"--web.listen-address=127.0.0.1:{port}")

    def value(query: str) -> Optional[float]:
        with contextlib.suppress(OSError):
            found = asked(port, query)
            return float(found[0]["value"][1]) if found else None
        return None

    wait_until(lambda: value("up") == 1, "nothing is scraped", 30)
    wait_until(lambda: value('ALERTS{alertname="PovfarmNobodyRenders"}') == 1, "no alert", 30)
    farm.povfarm("work", "--until-idle", "--server", farm.url, "--key-file", "farm/farm.key",
                 "--pin", farm.pin, "--cores", "1")
    farm.finished(job)
    wait_until(lambda: value("povfarm_frames_total") == 3, "the frames are not told", 30)
    time.sleep(3)  # a rate needs two values
    empty = [query for query in panels() if not asked(port, query)]
    # Nothing was refused, and a job that is done fails no more.
    assert len(empty) <= 1, empty
    shown = farm.run("curl", "-sk", "-H", f"Authorization: Bearer {key}", f"{farm.url}/api/v1/metrics")
    lint = subprocess.run(["promtool", "check", "metrics"], input=shown, text=True,
                          capture_output=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    farm.povfarm("users", "remove", "prometheus")
    wait_until(lambda: value("up") == 0, "a key that was removed is still good", 30)
    farm.end(server)
    return f"{len(panels())} queries and all rules, {len(shown.splitlines())} lines a scrape"


PARTS: Mapping[str, Callable[[Bench], str]] = {
    part.__name__: part for part in (prometheus,)}


def main() -> int:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    wrong = 0
    for name in parser.parse_args().parts or PARTS:
        began = time.monotonic()
        try:
            with bench(name) as made:
                said = PARTS[name](made)
            print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
        except NotTried as error:
            print(f"{name}: not tried: {error}", flush=True)
        except Exception:
            wrong += 1
            print(f"{name}: WRONG\n{traceback.format_exc()}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
