"""Frames in slices, on a farm in a box."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import povfarm
from helpers.farm_in_a_box import Farm
from helpers.pictures import png, png_apart
from povfarm import Cost, LeaseSpec, TaskKind

WIDTH, HEIGHT = 8, 96


SIZE = {"Width": str(WIDTH), "Height": str(HEIGHT), "Render_Block_Size": "4"}


def submit(farm: Farm, frames: int = 1, values: Optional[Dict[str, str]] = None,
           uses: Tuple[str, ...] = (), **options: Any) -> int:
    return farm.submit(frames, uses=uses, values={**SIZE, **(values or {})}, **options)


def hand_in(farm: Farm, worker: int, lease: LeaseSpec, bottom: int = 0, wall: float = 1.0,
            image: Optional[bytes] = None) -> bool:
    """Deliver the strip of a slice, down to ``bottom``, in a shade that is the task's own."""
    task = lease.tasks[0]
    bottom = bottom or task.bottom or HEIGHT
    if image is None:
        image = (b"what a pass made" if task.kind is TaskKind.PASS
                 else png(task.id, WIDTH, bottom - task.top))
    return farm.scheduler.finish(worker, lease.id, task.id, image, b"log",
                                 Cost(wall, wall, 1 << 20), bottom)


def spans(farm: Farm, job: int, frame: int = 1, kind: str = "slice") -> List[Tuple[int, int]]:
    return [(part.top, part.bottom) for part in parts(farm, job, frame, kind)]


def parts(farm: Farm, job: int, frame: int = 1, kind: str = "slice") -> List[povfarm.Task]:
    with farm.store.read() as tx:
        return [part for part in tx.parts(number(farm, job, frame)) if part.kind == kind]


def number(farm: Farm, job: int, frame: int = 1) -> int:
    rows = farm.tasks(job)
    return int(next((row for row in rows if row.frame == frame), rows[0]).id)


def states(farm: Farm, job: int, frame: int = 1) -> List[str]:
    return [part.state for part in parts(farm, job, frame)]


def picture(farm: Farm, job: int, frame: int = 1) -> List[int]:
    """The shade of every row of a finished frame: the task that it came from."""
    row = next(row for row in farm.tasks(job) if row.id == number(farm, job, frame))
    assert row.state == "done"
    data = (farm.store.job_directory(job, "ball") / row.name).read_bytes()
    povfarm.check_image(data, ".png", WIDTH, HEIGHT)
    rows = png_apart(data)[1]
    assert set(rows[::1 + 3 * WIDTH]) == {0}  # no filter: as these tests write them
    return [rows[at + 1] + 256 * rows[at + 2] for at in range(0, len(rows), 1 + 3 * WIDTH)]


def work(farm: Farm, *workers: int) -> List[LeaseSpec]:
    """Let workers render whatever they get, in turn, until nobody gets anything."""
    leases: List[LeaseSpec] = []
    while True:
        mine = [(worker, lease) for worker in workers for lease in farm.leases(worker)]
        if not mine:
            return leases
        for worker, lease in mine:
            hand_in(farm, worker, lease)
            leases.append(lease)


def part_files(farm: Farm, job: int) -> List[str]:
    place = farm.store.job_directory(job, "ball") / "parts"
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []
