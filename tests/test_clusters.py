"""What the documents say to programs of others: the figures, the rules, the recipes."""

from __future__ import annotations

import json
import re
from typing import Any, Dict

import povfarm
from helpers.base import ROOT
from helpers.farm_in_a_box import Farm, farm_fixture

DOCS = ROOT / "docs"

__all__ = ["farm_fixture"]


def test_rules_and_dashboard_ask_for_figures_that_there_are() -> None:
    board = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = (DOCS / "alerts.yml").read_text("utf-8")
    asked += re.findall(r"expr: (.*)", rules)
    named = {name for query in asked for name in re.findall(r"povfarm_(\w+)", query)}
    assert len(asked) > 25 and named > {"job_progress", "disk_full"}
    assert named <= set(povfarm.FIGURES)
    assert "\t" not in rules and all(len(line) - len(line.lstrip()) in (0, 2, 4, 6, 8, 10)
                                     for line in rules.splitlines())


def test_every_figure_is_described() -> None:
    text = (DOCS / "api.md").read_text("utf-8")
    assert set(re.findall(r"^\| `povfarm_(\w+)` \|", text, re.MULTILINE)) == set(povfarm.FIGURES)


# What `status --json` prints of a job, with what kind of value: programs rely on it. Add what is
# new where it is described, take nothing away.
JOB: Dict[str, Any] = {
    "id": int, "name": str, "state": str, "reason": str, "owner": str, "priority": int,
    "max_workers": int, "retry_limit": int, "in_order": bool, "created": float,
    "started": (float, type(None)), "finished": (float, type(None)), "frames": dict, "why": str,
    "cure": str, "progress": float, "elapsed": float, "rate": float, "eta": (float, type(None)),
    "cpu": float, "wall": float, "slices": dict, "slicing": str, "radiosity": str, "povray": str,
    "frame_timeout": int, "verify": int, "first": str, "order": str, "batch": int,
    "waiting_for": str}
ONE_JOB: Dict[str, Any] = {
    "width": (int, type(None)), "height": (int, type(None)), "extension": str,
    "failure": (dict, type(None)), "notice": str, "files": int, "size": int, "written": int,
    "active": bool, "last_start": (float, type(None)), "directory": str, "engine": str,
    "pov": dict}


def test_what_status_prints_for_programs_is_described_and_stays(farm: Farm) -> None:
    job = farm.submit(3)
    section = (DOCS / "api.md").read_text("utf-8").partition("### `GET /api/v1/jobs/{job}`\n")[2]
    described = set(re.findall(r'"(\w+)":|`(\w+)`', section.partition("\n### ")[0]))
    names = {name for pair in described for name in pair}
    for view, kinds in ((farm.ask("GET", "/api/v1/jobs").json()["jobs"][0], JOB),
                        (farm.ask("GET", f"/api/v1/jobs/{job}").json(), {**JOB, **ONE_JOB})):
        wrong = [name for name, kind in kinds.items()
                 if name not in view or not isinstance(view[name], kind)]
        assert wrong == []
        assert set(view) - names == set(), "not in api.md"
    assert set(view["frames"]) == {"total", *map(str, povfarm.TaskState)}
