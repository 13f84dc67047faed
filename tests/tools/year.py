"""A year of a farm on a clock that is turned: jobs come and go, and nothing grows for ever.

    python tests/tools/year.py [JOBS] [DAYS]

Thousands of jobs are submitted, rendered by workers that have their hours, fetched (most of them),
failed, cancelled and rendered again, while ``--keep`` deletes what is old. Prints the database, the
disk and the memory each month. Ends with 1 when the data is damaged, or when the last months take more
than the first ones: what a farm keeps must depend on what comes in a month, not on its age.
"""

from __future__ import annotations

import gc
import pathlib
import random
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import List, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from helpers.farm_in_a_box import Farm
from povfarm import Keeping

DAY = 86400.0
KEEPING = Keeping.of("done=10d,failed=10d,cancelled=2d,unfetched=20d,logs=5d,events=15d")


class Month(NamedTuple):
    """How large the farm is at one moment: rows and bytes."""

    day: int
    jobs: int
    database: int
    files: int
    disk: int
    memory: int


def year(root: Path, jobs: int = 10_000, days: int = 365, seed: int = 1) -> List[Month]:
    """Let a farm live for so many days; raise ``AssertionError`` when its data is damaged."""
    chance, farm, found = random.Random(seed), Farm(root), []
    tracemalloc.start()
    try:
        for day in range(1, days + 1):
            for _ in range(jobs * day // days - jobs * (day - 1) // days):
                a_job(farm, chance)
                farm.clock.advance(60)
            farm.clock.advance(DAY - farm.clock.wall % DAY)
            farm.scheduler.expire()
            farm.scheduler.tidy(KEEPING)
            if day % 30 == 0:
                problems = farm.problems()
                assert not problems, problems
                found.append(size(farm, day))
    finally:
        tracemalloc.stop()
        farm.close()
    return found


def a_job(farm: Farm, chance: random.Random) -> None:
    """Submit a job with files of its own, and let one of the things become of it that do."""
    fate, frames = chance.random(), chance.randint(1, 3)
    job = farm.submit(frames, {"scene.pov": f"// {chance.random()}".encode(), "a.inc": b"same"},
                      retry_limit=1)
    worker = farm.worker(f"w{chance.randint(1, 20)}")
    if fate < 0.1:
        farm.scheduler.cancel(job)
        return
    while leases := farm.leases(worker):
        for index in range(len(leases[0].tasks)):
            if fate < 0.15:
                farm.fail(worker, leases[0], index)
            else:
                farm.finish(worker, leases[0], index)
    if fate < 0.2 and farm.state(job) == "done":
        farm.scheduler.again(job, str(farm.tasks(job)[0].frame))
        farm.render(worker)
    if fate > 0.3:
        farm.scheduler.fetched(job, [str(task.sha256) for task in farm.tasks(job)])


def size(farm: Farm, day: int) -> Month:
    """Measure a farm."""
    with farm.store.read() as look:
        number = len(look.jobs(0, -1))
    files = [path for path in farm.root.rglob("*") if path.is_file()]
    gc.collect()
    # Not the table of names that Python shares, which pathlib fills: it doubles at some moment.
    own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, pathlib.__file__)])
    return Month(day, number, (farm.root / "farm.db").stat().st_size, len(files),
                 sum(path.stat().st_size for path in files), sum(one.size for one in own.traces))


def grown(months: List[Month]) -> List[str]:
    """Say what the last months have more of than those after the first; nothing is right."""
    half = len(months) // 2
    first, last = months[1:half + 1], months[half:]
    return [f"{name}: from {before:,} to {after:,}" for name in Month._fields[1:]
            if (after := max(getattr(month, name) for month in last)) > 1.25 * (
                before := max(getattr(month, name) for month in first))]


def main() -> int:
    """Live a year, print it, and judge it."""
    jobs, days = (int(word) for word in (sys.argv[1:] + ["10000", "365"][len(sys.argv) - 1:]))
    with tempfile.TemporaryDirectory() as place:
        months = year(Path(place) / "data", jobs, days)
    print(*Month._fields, sep="\t")
    for month in months:
        print(*(f"{number:,}" for number in month), sep="\t")
    print(*grown(months), sep="\n")
    return bool(grown(months))


if __name__ == "__main__":
    sys.exit(main())
