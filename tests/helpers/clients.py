"""What the clients of other systems do, with the programs that they start; a scene for them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple
from xml.etree import ElementTree

# Without assumed_gamma, of which POV-Ray warns in words that clients take for an error.
ANIMATION = """#version 3.7;
#include "colours.inc"
#include "part.inc"
camera { location <0, 1, -5> look_at 0 }
light_source { <5, 5, -5>, 1 }
sphere { <clock, 0, 0>, 1 pigment { rgb <frame_number / 20, final_frame / 20, clock_delta> } }
Part(initial_clock, final_clock, initial_frame)
"""
PART = """#macro Part(A, B, C) sphere { <A, B, C> / 3, 0.5 pigment { Mine } } #end
"""

EDGE = "***232404jkg4220957934FW**"
FORM = {"content-type": f"multipart/form-data;boundary={EDGE}"}
MACHINE = {"cpu_family": "26", "cpu_model": "2", "cpu_model_name": "AMD EPYC", "cpu_cores": "2",
           "os": "linux", "ram": "24903680", "bits": "64bit", "version": "5.0.0",
           "hostname": "host1", "extras": ""}


def form_of(data: bytes, name: str = "file") -> bytes:
    return (f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"; filename="7_1.png"\r\n\r\n'
            .encode() + data + f"\r\n--{EDGE}--\r\n".encode())


def fields(text: str) -> Dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


class BashClient:
    """Does what the bash client does, with the programs that it starts."""

    def __init__(self, server: str, group: str, place: Path) -> None:
        self.server, self.place = server, place
        self.tail = "client=anna:17&version=1.2" + (f"&cgroup={group}" if group else "")
        self.batches: List[Tuple[int, int]] = []
        self.slices = 0

    def run(self, *words: str, cwd: Optional[Path] = None) -> str:
        done = subprocess.run(words, cwd=cwd or self.place, stdin=subprocess.DEVNULL, check=True,
                              capture_output=True, timeout=60)
        return (done.stdout + done.stderr).decode(errors="replace")

    def ask(self, query: str, *options: str) -> Dict[str, str]:
        text = self.run("curl", "-sS", *options, f"{self.server}/httpov.php?{query}&{self.tail}")
        return fields(text)

    def work(self) -> None:
        """Render all that there is."""
        while True:
            job = self.ask("command=getjob")
            if job["command"] != "getbatch":
                return
            self.run("curl", "-sS", "-o", f"{job['name']}.zip",
                     f"{self.server}/jobs/{job['name']}.zip")
            self.run("unzip", "-o", f"{job['name']}.zip")
            while self.render(job):
                pass
            shutil.rmtree(self.place / job["name"])

    def render(self, job: Mapping[str, str]) -> bool:
        name, here = job["name"], self.place / job["name"]
        batch = self.ask(f"command=getbatch&job={job['job']}")
        if batch["command"] != "render":
            return False
        first, last = int(batch["startframe"]), int(batch["stopframe"])
        self.batches.append((first, last))
        self.slices += "slice" in batch
        rows = [f"+SR{batch['startrow']}", f"+ER{batch['endrow']}", "+FP"] if "slice" in batch else []
        report = self.run("povray", "-D", "pov.ini", f"+O{name}_", f"+SF{first}", f"+EF{last}",
                          *rows, cwd=here)
        assert "Aborting render" not in report and "Parse Error" not in report, report
        packed = here / f"{name}_frame_{first:08d}"
        packed.mkdir()
        for frame in range(first, last + 1):
            image = f"{name}_{str(frame).zfill(len(job['frames']))}.{'ppm' if rows else 'png'}"
            (here / image).rename(
                packed / (f"slice_{int(batch['slice']):04d}.ppm" if rows else image))
            if rows:
                (packed / f"batchreport_{int(batch['slice']):04d}.txt").write_text(report)
        self.run("zip", "-r", packed.name, packed.name, cwd=here)
        shutil.rmtree(packed)
        self.run("curl", "-sS", "-o", "upload", "-F",
                 f"filedata=@{packed}.zip;filename={packed.name}.zip",
                 f"{self.server}/httpov.php?command=postbatch&job={job['job']}"
                 f"&batch={batch['batch']}&{self.tail}")
        return True


class SheepitClient:
    """Does what the clients do, the worst of all of them: what it is given, it deletes early."""

    def __init__(self, server: str, login: Mapping[str, str], cache: Path, cores: int = 0) -> None:
        self.server, self.login, self.cache, self.cores = server, login, cache, cores
        self.cookie, self.paths, self.frames = "", {}, []  # type: str, Dict[str, str], List[str]
        self.downloads: List[str] = []
        self.printed: List[str] = []
        cache.mkdir()

    def ask(self, path: str, query: Mapping[str, Any] = {}, body: Optional[bytes] = None,
            kind: str = "application/x-www-form-urlencoded") -> bytes:
        url = self.server + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        headers = {"Content-type": kind, **({"Cookie": self.cookie} if self.cookie else {})}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers),
                                    timeout=120) as reply:
            self.cookie = reply.headers.get("Set-Cookie", self.cookie)
            return bytes(reply.read())

    def log_in(self) -> None:
        said = ElementTree.fromstring(self.ask("/server/config.php", {**MACHINE, **self.login}))
        self.paths = {one.attrib["type"]: one.attrib["path"] for one in said}

    def log_out(self) -> None:
        self.ask(self.paths["logout"])

    def task(self) -> Tuple[str, Dict[str, str], Dict[str, str]]:
        """Ask what to do; return the status, the job and the renderer."""
        held = "".join(f'<file md5="{path.stem}"/>' for path in self.cache.glob("*.zip"))
        said = ElementTree.fromstring(self.ask(
            self.paths["request-job"], {"computemethod": 1},
            f'<?xml version="1.0" encoding="UTF-8"?><cache>{held}</cache>'.encode()))
        job, renderer = (dict(element.attrib) for path in ("job", "job/renderer")
                         for element in [*said.findall(path), ElementTree.Element("none")][:1])
        return said.attrib["status"], job, renderer

    def work(self) -> None:
        """Render until there is nothing to do."""
        while True:
            status, job, renderer = self.task()
            if status != "0":
                assert status == "200"
                return
            self.render(job, renderer)

    def fetch(self, kind: str, job: str, md5: str) -> Path:
        """Return the directory of an archive, fetched unless it is in the cache."""
        archive, place = self.cache / f"{md5}.zip", self.cache / md5
        if not archive.exists():
            self.downloads.append(kind)
            archive.write_bytes(self.ask(self.paths["download-archive"], {"type": kind, "job": job}))
            assert hashlib.md5(archive.read_bytes()).hexdigest() == md5
        if not place.exists():
            shutil.unpack_archive(archive, place)
            for path in place.rglob("*"):
                path.chmod(0o755)
        return place

    def render(self, job: Mapping[str, str], renderer: Mapping[str, str]) -> None:
        program = self.fetch("binary", job["id"], renderer["md5"]) / "rend.exe"
        scene = self.fetch("job", job["id"], job["archive_md5"])
        words: List[str] = []
        for word in renderer["commandline"].split(" "):
            words += {".e": [str(program), *(["-t", str(self.cores)] if self.cores else [])],
                      ".c": [str(scene / job["path"]), "-P", str(self.cache / "script_1")],
                      ".o": [str(self.cache / f"{job['id']}_")], ".f": [job["frame"]]}.get(
                          word, [word])
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.printed.append(line.decode())
                shutil.rmtree(scene, ignore_errors=True)
        process.wait()
        name = f"{job['id']}_{job['frame']}"
        images = [path for path in self.cache.iterdir() if path.name.startswith(name)]
        ends = {"job": job["id"], "frame": job["frame"], "extras": job["extras"]}
        if not images:
            crash = self.cache / job["path"].replace(".ini", ".crash.txt")
            text = "renderer output\n" + "".join(self.printed) + "end of rendering\n"
            self.ask(self.paths["error"], {"type": "12" if crash.exists() else "8", **ends},
                     form_of(text.encode()), FORM["content-type"])
            crash.unlink()  # it is there: else the client would wait for five minutes
            return
        self.frames.append(job["frame"])
        said = self.ask(self.paths["validate-job"], {**ends, "rendertime": 1, "memoryused": 12500},
                        form_of(images[0].read_bytes()), FORM["content-type"])
        assert b'<jobvalidate status="0"/>' in said
        images[0].unlink()
        shutil.rmtree(scene, ignore_errors=True)
