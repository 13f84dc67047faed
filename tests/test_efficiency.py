"""How well unequal workers share one picture: the real scheduler on a clock of its own.

The renderer is a model of POV-Ray as tests/standin.py is one, with the same costs: it sleeps at
its start, parses, renders block after block, and may be ended where others go on. bench.py
--slices measures the same with real processes in real time.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import List, Optional, Sequence

import pytest
from bench import HEIGHT, IDEAL, PARSE, PROFILES, TEAMS
from farm_in_a_box import FakeClock, Farm, png

from povfarm import SLICE_BEAT_WAIT, Cost, LeaseSpec, slice_block

STEP = 0.05  # seconds between two looks at everything
SLEEP = 0.3  # seconds of a start
WIDTH = 4


class Render:
    """One lease that is rendered by a worker of a given speed."""

    def __init__(self, lease: LeaseSpec, now: float, parse: float) -> None:
        self.lease, self.task, self.granted = lease, lease.tasks[0], now
        self.block = slice_block(lease.pov.options)
        self.bottom = self.task.bottom or HEIGHT
        self.row = self.task.top
        self.cut: Optional[int] = None
        self.ready = now + SLEEP + parse  # when the rows begin, or the picture is there
        self.first = (0.0, 0.0)  # when the first rows were there, and what part they were
        self.work = 0.0
        self.ended = False

    @property
    def part(self) -> float:
        return (self.row - self.task.top) / (self.bottom - self.task.top)

    def trace(self, work: float, rows: Sequence[float], now: float, parse: float) -> None:
        """Spend so much on the rows that come next."""
        self.work += work
        while self.row < self.bottom:
            below = min(self.row + self.block, self.bottom)
            if self.work < sum(rows[self.row:below]):
                return
            self.work -= sum(rows[self.row:below])
            self.row = below
            self.first = self.first if self.first[0] else (now, self.part)
            if self.cut is not None and self.row >= self.cut and self.part < 0.97:
                # Ended, and the picture made by a new start from what is there.
                self.bottom, self.ended, self.ready = self.cut, True, now + SLEEP + parse
                return
        self.ended, self.ready = True, now + STEP

    def cost(self, now: float) -> Cost:
        """What the worker measures of it."""
        wall = now - self.granted
        seen, part = self.first
        parse = (seen - self.granted - part * wall) / (1 - part) if part < 1 else 0.0
        return Cost(wall, wall, 1 << 20, min(max(parse, 0.0), wall))


class Team:
    """A coordinator, and workers that render one at a time and look ahead as real ones do."""

    def __init__(self, root: Path, speeds: Sequence[float], rows: Sequence[float],
                 seed: int) -> None:
        self.chance = random.Random(seed)
        self.clock = FakeClock()
        self.farm = Farm(root, self.clock)
        self.rows = rows
        self.speeds = {self.farm.worker(f"w{number}"): speed
                       for number, speed in enumerate(speeds)}
        self.renders: dict[int, List[Render]] = {worker: [] for worker in self.speeds}
        self.beats = dict.fromkeys(self.speeds, 0.0)
        for worker in self.speeds:
            self.farm.leases(worker)

    def seconds(self) -> float:
        """Return how long the team takes for the picture."""
        start = self.clock.mono
        job = self.farm.submit(1, values={"Width": str(WIDTH), "Height": str(HEIGHT)})
        while self.farm.state(job) != "done":
            assert self.clock.mono < start + 10 * IDEAL
            self.clock.advance(STEP)
            for worker in self.speeds:
                self.go_on(worker)
        assert self.farm.problems() == []
        self.farm.close()
        return self.clock.mono - start

    def go_on(self, worker: int) -> None:
        now, parse = self.clock.mono, PARSE / self.speeds[worker]
        renders = self.renders[worker]
        waiting = [render for render in renders if not render.ended and render.ready <= now]
        for render in waiting[:1]:
            render.trace(STEP * self.speeds[worker], self.rows, now, parse)
        for render in [render for render in renders if render.ended and render.ready <= now]:
            renders.remove(render)
            strip = png(1, WIDTH, render.bottom - render.task.top)
            self.farm.scheduler.finish(worker, render.lease.id, render.task.id, strip, b"",
                                       render.cost(now), render.bottom)
        if renders and now >= self.beats[worker]:
            self.beats[worker] = now + SLICE_BEAT_WAIT
            self.beat(worker, renders)
        # A request for work is held, and looked at again whenever anything changes.
        if len(renders) < 2 and self.chance.random() < 0.3:
            idle = 0 if waiting else 1
            for lease in self.farm.leases(worker, 2 - len(renders), 2, idle):
                renders.append(Render(lease, now, parse))

    def beat(self, worker: int, renders: List[Render]) -> None:
        parts = {render.lease.id: {render.task.id: 1.0 if render.ended else
                                   int(100 * render.part) / 100} for render in renders}
        ended, cuts = self.farm.scheduler.beat(worker, parts, 0)
        for render in list(renders):
            render.cut = cuts.get(render.task.id, render.cut)
            if render.lease.id in ended:
                renders.remove(render)


@pytest.mark.parametrize("profile", list(PROFILES))
@pytest.mark.parametrize("team", list(TEAMS))
def test_a_team_comes_near_to_the_ideal(profile: str, team: str, tmp_path: Path) -> None:
    speeds, least = TEAMS[team]
    weight = IDEAL * sum(speeds) / sum(PROFILES[profile])
    rows = [cost * weight for cost in PROFILES[profile]]
    found = [IDEAL / Team(tmp_path / str(seed), speeds, rows, seed).seconds()
             for seed in range(3)]
    assert sum(found) / len(found) >= least, found
    assert min(found) >= least - 0.05, found
