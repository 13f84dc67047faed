"""Runs of POV-Ray as a worker starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Tuple

from povfarm import STANDARD, LeaseSpec, PovJob, Run, TaskSpec, plan_frames


def make_run(place: Path, frames: Tuple[int, ...] = (3, 4), threads: int = 1,
             run_dir: str = ".", **values: str) -> Run:
    """Return a run of a small animation."""
    wanted: Dict[str, str] = {
        "Input_File_Name": "scene.pov", "Width": "32", "Height": "24", "Output_File_Type": "N",
        "Initial_Frame": "1", "Final_Frame": "9", **values}
    pov = PovJob(wanted, ("x=1",), (STANDARD, "_lib1"), run_dir)
    plan = plan_frames(pov.options)
    tasks = tuple(TaskSpec(n, n, Path(plan.output_name(n)).name) for n in frames)
    lease = LeaseSpec("ab", 1, "job", threads, tasks, "0" * 64, pov, False)
    return Run(lease, place / "tree", place / "run", frames)


HEAD = """#version 3.7; global_settings { assumed_gamma 1 }
camera { location -5*z } light_source { -9*z, 1 } plane { z, 1 pigment { rgb 1 } }
"""


MARK = "the-private-words"
