"""Runs the recipes of docs/clusters.md and of the manual: real programs of others, real POV-Ray.

    python tests/tools/clusters.py [PART ...]

Each part is one recipe, with the files of docs/clusters/ as they are there; without a name all
are run. What needs root or a program that is not here is named as not tried. Ends with 1 when
something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
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
            print(f"--- {log.name}\n{log.read_text('utf-8', 'replace')[-600:]}")
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
        f"{farm.place}/povfarm.crt", str(farm.place / "farm" / "tls.crt")).replace("studio:2271", f"127.0.0.1:{farm.port}")
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


# --- systemd

CGROUP = Path("/sys/fs/cgroup/systemd")
BOOT = """set -e
mount --make-rprivate /
for place in $(awk '$2 ~ "^/sys/fs/cgroup/" {{print $2}}' /proc/mounts); do umount -l $place; done
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
for place in /run /etc/systemd/system /var/lib /opt; do mount -t tmpfs tmpfs $place; done
cp {place}/*.service {place}/test.target /etc/systemd/system/
install -m 755 {program} /opt/povfarm.py
for name in povfarm povfarm-work; do
    install -d -o daemon /var/lib/$name
    install -o daemon {place}/farm.key /var/lib/$name/farm.key
    install -o daemon {place}/$name.ini /var/lib/$name/povfarm.ini
done
export container=povfarm
exec /lib/systemd/systemd --system --unit=test.target --show-status=no
"""


def systemd(farm: Bench) -> str:
    """The units are good and open little; a systemd of its own starts, watches and stops both."""
    need("systemd-analyze")
    levels = []
    for unit in sorted((DOCS / "clusters").glob("*.service")):
        text = unit.read_text().replace("User=render", "User=daemon")
        (farm.place / unit.name).write_text(text.replace("/usr/local/bin/povfarm.py", "/usr/bin/env"))
        farm.run("systemd-analyze", "verify", unit.name)
        said = farm.run("systemd-analyze", "security", "--offline=true", unit.name)
        level = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
        assert level and float(level[1]) < 3, said[-300:]
        levels.append(level[1])
        log = f"append:{farm.place}/{unit.stem}.log"
        (farm.place / unit.name).write_text(
            text.replace("/usr/local/bin", "/opt").replace("WatchdogSec=2min", "WatchdogSec=8s")
            .replace("[Unit]", "[Unit]\nDefaultDependencies=no").replace(
                "[Service]", f"[Service]\nStandardOutput={log}\nStandardError={log}"))
    verified = f"verified, exposure {' and '.join(levels)}"
    if os.geteuid() or not CGROUP.is_dir() or not shutil.which("unshare"):
        return f"{verified}; not tried: started, which needs root and {CGROUP}"
    port, key = free_port(), "0123456789abcdef" * 4
    url = f"http://127.0.0.1:{port}"
    for name, text in (
            ("farm.key", key), ("test.target", "[Unit]\nDefaultDependencies=no\n"
                                "Wants=povfarm-serve.service povfarm-work.service\n"),
            ("povfarm.ini", f"[povfarm]\nport = {port}\nbind = 127.0.0.1\nno-discovery = on\n"),
            ("povfarm-work.ini", f"[povfarm]\nserver = {url}\nkey-file = /var/lib/povfarm-work/farm.key\n"),
            ("boot", BOOT.format(place=farm.place, program=ROOT / "povfarm.py"))):
        (farm.place / name).write_text(text)
    farm.place.chmod(0o755)
    group = CGROUP / farm.place.name
    group.mkdir()
    farm.held.callback(subprocess.run, ["sh", "-c", f"""for try in 1 2 3 4 5 6 7 8 9; do
        find {group} -depth -type d -exec rmdir {{}} + 2> /dev/null
        test -d {group} || break
        sleep 1  # its processes are ending
    done"""], check=False)
    outside = farm.start(
        "sh", "-c", f"echo $$ > {group}/cgroup.procs; exec unshare --mount --pid --fork --cgroup --uts "
        "--ipc --mount-proc --kill-child sh boot", log="boot.log")
    wait_until(lambda: below(outside.pid)[1:], "no systemd")
    inside = str(below(outside.pid)[1])

    def shown(unit: str, what: str) -> str:
        return farm.run("nsenter", "-t", inside, "-m", "-p", "-C", "systemctl", "show", "--value", "-p",
                        what, unit).strip()

    def is_shown(unit: str, what: str, value: str) -> bool:
        with contextlib.suppress(AssertionError):
            return value in shown(unit, what)
        return False

    wait_until(lambda: is_shown("povfarm-work", "StatusText", "working for"), "no worker", 60)
    to = ["--server", url, "--key-file", str(farm.place / "farm.key")]
    farm.povfarm("submit", "scene.pov", "+W40", "+H30", "+KFF4", "--wait", "--output", "out", *to,
                 cwd=farm.project())
    served = next(one for one in below(int(inside)) if b"serve" in readable(Path(f"/proc/{one}/cmdline")))
    os.kill(served, 19)  # it hangs
    wait_until(lambda: is_shown("povfarm-serve", "NRestarts", "1"), "it is not started again", 60)
    farm.run("nsenter", "-t", inside, "-m", "-p", "-C", "systemctl", "stop", "povfarm-work")
    assert shown("povfarm-work", "Result") == "success" and shown("povfarm-work", "ExecMainStatus") == "130"
    assert shown("povfarm-work", "StatusText") == "rendered 4 frames"
    assert "whatever you can" not in (farm.place / "povfarm-work.log").read_text()  # confined
    farm.end(outside)
    return f"{verified}; started by a systemd: 4 frames, started again when it hung, stopped"


# --- nginx

def certificate(farm: Bench, name: str) -> None:
    """Make a certificate for a name, in ``tls.crt`` and ``tls.key``."""
    farm.run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-days", "2", "-keyout", "tls.key", "-out", "tls.crt", "-subj", f"/CN={name}",
             "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1")


def nginx(farm: Bench) -> str:
    """TLS by the file as it is: workers, an upload of 300 MB, an event stream, the page."""
    need("nginx", "openssl", "curl")
    certificate(farm, "localhost")
    farm.serve("--tls-cert", "tls.crt", "--tls-key", "tls.key", "--host", "localhost")
    port = free_port()
    text = (DOCS / "clusters" / "nginx.conf").read_text()
    for old, new in (("443 ssl", f"127.0.0.1:{port} ssl"), ("render.example.org", "localhost"),
                     ("/etc/povfarm/", f"{farm.place}/"), ("127.0.0.1:2271", f"127.0.0.1:{farm.port}")):
        assert old in text
        text = text.replace(old, new)
    (farm.place / "nginx.conf").write_text(
        f"user root; pid {farm.place}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log {farm.place}/access.log;\n{text} }}\n")
    farm.run("nginx", "-t", "-p", str(farm.place), "-c", str(farm.place / "nginx.conf"))
    farm.start("nginx", "-p", str(farm.place), "-c", str(farm.place / "nginx.conf"), "-g", "daemon off;")
    url = f"https://localhost:{port}"
    to = ["--server", url, "--pin", farm.pin, "--key-file", str(farm.place / "farm" / "farm.key")]
    farm.start(*POVFARM, "work", *to, "--worker-name", "outside", "--cores", "1", log="work.log")
    wait_until(lambda: farm.client.get("/api/v1/workers")["workers"], "no worker comes by nginx", 60)
    stream = farm.start("curl", "-sNk", f"{url}/api/v1/events?after=0", log="events.log")
    place = farm.project()
    (place / "large.inc").write_bytes(os.urandom(1 << 20) * 300)
    began = time.monotonic()
    job = int(farm.povfarm("submit", "scene.pov", "+W40", "+H30", "+KFF4", *to, cwd=place).split()[0])
    took = time.monotonic() - began
    farm.finished(job)
    wait_until(lambda: b"event: change" in (farm.place / "events.log").read_bytes(), "no events come", 30)
    farm.end(stream)
    farm.povfarm("fetch", str(job), "--output", "by-nginx", *to)
    assert len(list((farm.place / "by-nginx").glob("*.png"))) == 4
    assert "povfarm" in farm.run("curl", "-sk", f"{url}/")
    log = (farm.place / "access.log").read_text()
    assert "POST /api/v1/lease" in log and "PUT /api/v1/blobs/" in log
    # Another certificate is somebody in the middle, also where it is the proxy's.
    certificate(farm, "localhost")
    farm.run("nginx", "-p", str(farm.place), "-c", str(farm.place / "nginx.conf"), "-s", "reload")
    time.sleep(1)
    wrong = subprocess.run([*POVFARM, "set", str(job), "priority=1", *to], env=farm.env, text=True,
                           cwd=farm.place, capture_output=True, check=False)
    assert wrong.returncode and "certificate" in wrong.stderr, wrong.stderr
    return f"300 MB sent in {took:.1f} s, 4 frames, events; another certificate is refused"


# --- Slurm

SLURM = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={place}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n.spool
SlurmctldPidFile={place}/ctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/slurmctld-says.log
SlurmdLogFile={place}/%n.log
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
"""


def put_on_path(farm: Bench) -> None:
    """Let ``povfarm.py`` be found as a command."""
    (farm.place / "bin").mkdir()
    program = farm.place / "bin" / "povfarm.py"
    program.write_text(f'#!/bin/sh\nexec {" ".join(POVFARM)} "$@"\n')
    program.chmod(0o755)
    farm.env["PATH"] = f"{farm.place}/bin:{farm.env['PATH']}"


def below(process: int) -> List[int]:
    """A process and those that it started, the youngest last."""
    found = [process]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def slurm(farm: Bench) -> str:
    """A slurmctld and three nodes: an array of workers, a node that is lost, one render alone."""
    need("slurmctld", "slurmd", "munged", "sbatch")
    if os.geteuid():
        raise NotTried("it needs root")
    farm.place.chmod(0o755)
    host, ports = os.uname().nodename, [free_port() for _ in range(4)]
    (farm.place / "state").mkdir()
    (farm.place / "munge.key").write_bytes(os.urandom(128))
    (farm.place / "munge.key").chmod(0o400)
    (farm.place / "slurm.conf").write_text(
        SLURM.format(host=host, place=farm.place, ports=ports) + "".join(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs=1\n"
            for number in (1, 2, 3)) + "PartitionName=all Nodes=ALL Default=YES MaxTime=10 State=UP\n")
    farm.env["SLURM_CONF"] = str(farm.place / "slurm.conf")
    put_on_path(farm)
    farm.start("munged", "--foreground", "--force", f"--socket={farm.place}/munge.socket",
               f"--key-file={farm.place}/munge.key", f"--pid-file={farm.place}/munge.pid",
               f"--seed-file={farm.place}/munge.seed", f"--log-file={farm.place}/munge.log")
    wait_until(lambda: (farm.place / "munge.socket").exists(), "no munge")
    farm.start("slurmctld", "-D", "-f", farm.env["SLURM_CONF"])
    nodes = {f"n{number}": farm.start("slurmd", "-D", "-N", f"n{number}", "-f", farm.env["SLURM_CONF"],
                                      log=f"slurmd{number}.log") for number in (1, 2, 3)}

    def states() -> str:
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%N %T"], env=farm.env, text=True,
                              capture_output=True, check=False)
        return done.stdout

    wait_until(lambda: states().count("idle") == 3, "the nodes are not there", 60)
    farm.serve("--lease-time", "5s")
    job = farm.submit(60, "--batch", "1", text=HEAVY)
    array = farm.run("sbatch", "--parsable", "--array=1-3", "--output", str(farm.place / "array-%a.log"),
                     str(DOCS / "clusters" / "slurm-work.sbatch"), farm.url,
                     str(farm.place / "farm" / "farm.key")).strip()

    def working() -> List[str]:
        return [view["name"].partition("-")[0] for view in farm.client.get("/api/v1/workers")["workers"]
                if view["runs"]]

    wait_until(lambda: sorted(working()) == ["n1", "n2", "n3"], "the array does not work", 60)
    wait_until(lambda: farm.job(job)["frames"]["done"] >= 3, "nothing is rendered", 60)
    # The second node loses its power: its daemon, and whatever it started.
    steps = [int(line.split()[0]) for line in farm.run("ps", "-eo", "pid,args").splitlines()[1:]
             if "slurmstepd" in line and "n2" in Path(f"/proc/{line.split()[0]}/cmdline").read_text()]
    lost = [*below(nodes["n2"].pid), *(one for step in steps for one in below(step))]
    lost += [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ")
             if b"SLURMD_NODENAME=n2" in readable(path)]
    for one in dict.fromkeys(lost):
        with contextlib.suppress(OSError):
            os.kill(one, 9)
    before = farm.job(job)["frames"]
    farm.finished(job, 300)
    wait_until(lambda: "n2 down" in states(), "Slurm does not see that the node is lost", 90)
    wait_until(lambda: not farm.run("squeue", "-h", "-j", array, "-t", "R"), "workers do not end", 60)
    farm.povfarm("fetch", str(job), "--output", "out")
    assert len(list((farm.place / "out").glob("*.png"))) == 60
    place = farm.project(name="alone")
    farm.run("sbatch", "--wait", "--output", str(farm.place / "alone.log"),
             str(DOCS / "clusters" / "slurm-render.sbatch"), "scene.pov", "+W40", "+H30", "+KFF4", cwd=place)
    assert len(list(place.glob("*.png"))) == 4
    return (f"60 frames by an array of three, a node lost after {before['done']}; "
            "4 frames by a render of its own")


def readable(path: Path) -> bytes:
    """What a file has, nothing where its process is gone."""
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


# --- ssh and GNU parallel, several computers at once

def parallel(farm: Bench) -> str:
    """Twenty computers by one sshd: key, pin and address come in files, workers end by themselves."""
    need("parallel", "sshd", "ssh", "ssh-keygen", "openssl")
    if os.geteuid():
        raise NotTried("it needs root")
    put_on_path(farm)
    Path("/run/sshd").mkdir(exist_ok=True)
    farm.place.chmod(0o755)
    for name in ("host", "user"):
        farm.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", name)
    port = free_port()
    (farm.place / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {farm.place}/host\nPidFile none\n"
        f"AuthorizedKeysFile {farm.place}/user.pub\nStrictModes no\nUsePAM no\nMaxStartups 100\n"
        f"SetEnv PATH={farm.env['PATH']} TMPDIR={farm.place}/tmp\n")
    farm.start(shutil.which("sshd") or "", "-D", "-e", "-f", str(farm.place / "sshd_config"))
    computers = [f"room{number}" for number in range(1, 21)]
    (farm.place / "ssh_config").write_text(
        f"Host room*\nHostName 127.0.0.1\nPort {port}\nUser root\nIdentityFile {farm.place}/user\n"
        f"StrictHostKeyChecking no\nUserKnownHostsFile {farm.place}/known\nLogLevel ERROR\n")
    (farm.place / "computers.txt").write_text("".join(f"{name}\n" for name in computers))
    farm.serve("--tls", "auto")
    (farm.place / "povfarm.ini").write_text(
        f"[povfarm]\nserver = {farm.url}\nkey-file = farm.key\npin = {farm.pin}\n")
    shutil.copy(farm.place / "farm" / "farm.key", farm.place / "farm.key")
    recipe = re.search(r"```sh\n(parallel .*?)```", (DOCS / "clusters.md").read_text(), re.DOTALL)
    assert recipe, "clusters.md has no parallel"
    job = farm.submit(40, "--batch", "1")
    ssh = farm.place / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {farm.place}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    farm.run("sh", "-ec", recipe[1])
    farm.finished(job)
    came = {view["name"] for view in farm.client.get("/api/v1/workers")["workers"]}
    assert came == set(computers), came
    worked = [row for row in farm.client.get("/api/v1/totals")["workers"] if row["frames"]]
    left = [path.name for path in (farm.place / "tmp").glob("tmp.*")]
    assert not left, left
    return f"20 came, {len(worked)} of them rendered 40 frames, and nothing is left there"


# --- subnets

def subnets(farm: Bench) -> str:
    """Two networks and a router: nothing is found by broadcast, by its address everything is."""
    need("ip")
    if os.geteuid():
        raise NotTried("it needs root")
    tag = f"pf{os.getpid() % 100000}"
    near, far, router = f"{tag}a", f"{tag}b", f"{tag}r"

    def ip(*words: str) -> None:
        farm.run("ip", *words)

    for name in (near, far, router):
        ip("netns", "add", name)
        farm.held.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        ip("-n", name, "link", "set", "lo", "up")
    for number, name in ((1, near), (2, far)):
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"eth{number}",
           "netns", router)
        for where, link, last in ((name, "eth0", 2), (router, f"eth{number}", 1)):
            ip("-n", where, "addr", "add", f"10.78.{number}.{last}/24", "brd", "+", "dev", link)
            ip("-n", where, "link", "set", link, "up")
        ip("-n", name, "route", "add", "default", "via", f"10.78.{number}.1")
    ip("netns", "exec", router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    farm.start("ip", "netns", "exec", near, *POVFARM, "serve", "--port", "2271", log="serve.log")
    data = farm.place / "farm"
    wait_until((data / "coordinator.json").exists, "the coordinator does not start")
    there = ["ip", "netns", "exec", far, *POVFARM]
    found = subprocess.run([*there, "discover", "--data", "other"], env=farm.env, cwd=farm.place, text=True,
                           capture_output=True, check=False)
    assert "10.78.1.2" not in found.stdout + found.stderr
    job = int(farm.run("ip", "netns", "exec", near, *POVFARM, "submit", "scene.pov", "+W40", "+H30",
                       "+KFF3", cwd=farm.project()).split()[0])
    farm.run(*there, "work", "--until-idle", "--data", "other", "--server", "http://10.78.1.2:2271",
             "--key-file", str(data / "farm.key"))
    farm.run(*there, "fetch", str(job), "--data", "third", "--server", "http://10.78.1.2:2271",
             "--output", "out")
    assert len(list((farm.place / "out").glob("*.png"))) == 3
    return "not found by broadcast, 3 frames by --server"


# --- containers, Kubernetes, machines that are taken away

def container(farm: Bench) -> str:
    """A worker as process 1 of its own namespace, as an engine starts it; the Containerfile is read."""
    need("unshare")
    if os.geteuid():
        raise NotTried("it needs root")
    farm.serve()
    job = farm.submit(400, "--batch", "1", text=HEAVY)
    outside = farm.start("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *POVFARM, "work",
                         "--server", farm.url, "--key-file", str(farm.place / "farm" / "farm.key"),
                         "--data", str(farm.place / "work"), "--cores", "1", log="work.log")
    wait_until(lambda: farm.job(job)["frames"]["done"] >= 3, "process 1 renders nothing", 60)
    first = below(outside.pid)[1]
    began = time.monotonic()
    os.kill(first, 15)
    wait_until(lambda: outside.poll() is not None, "process 1 does not end", 110)
    took = time.monotonic() - began
    assert outside.returncode == 130, outside.returncode
    frames = farm.job(job)["frames"]
    assert frames["leased"] == 0 and frames["failed"] == 0 and frames["done"] < 400, frames
    said = (farm.place / "work.log").read_text()
    assert f"rendered {frames['done']} frames" in said, said
    try:
        from dockerfile_parse import DockerfileParser  # type: ignore[import-not-found]
    except ImportError:
        parsed = "the Containerfile was not parsed: no dockerfile-parse"
    else:
        with open(DOCS / "clusters" / "Containerfile", "rb") as file:
            read = DockerfileParser(fileobj=io.BytesIO(file.read()))
        steps = [step["instruction"] for step in read.structure if step["instruction"] != "COMMENT"]
        assert steps[0] == "FROM" and {"USER", "ENTRYPOINT", "VOLUME"} <= set(steps)
        parsed = f"{len(steps)} steps of the Containerfile parsed"
    return (f"process 1 took SIGTERM, and ended after {took:.0f} s with nothing lost; {parsed}; "
            "not tried: an image, as no engine is here")


def kubernetes(farm: Bench) -> str:
    """The manifests fit the published schemas."""
    need("kubernetes-validate")
    said = subprocess.run(["kubernetes-validate", "--strict", str(DOCS / "clusters" / "kubernetes.yaml")],
                          capture_output=True, text=True, check=False)
    assert said.returncode == 0 and (said.stdout + said.stderr).count("passed") == 5, said
    # Of a Service with our name it would make a variable that is our option.
    wrong = subprocess.run([*POVFARM, "status"], text=True, capture_output=True, check=False,
                           env={**farm.env, "POVFARM_PORT": "tcp://10.0.0.1:2271"})
    assert wrong.returncode == 2 and "POVFARM_PORT" in wrong.stderr, wrong
    return "5 manifests fit the schemas; not tried: a cluster"


PARTS: Mapping[str, Callable[[Bench], str]] = {
    part.__name__: part for part in (
        prometheus, systemd, nginx, slurm, parallel, subnets, container, kubernetes)}


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
