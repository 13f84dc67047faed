"""A short run of tests/tools/chaos.py."""

from __future__ import annotations

import re
from typing import List

import pytest

from helpers.base import need, tried
from tools import chaos


def test_a_farm_to_which_everything_happens_finishes_all_of_its_jobs(
        povray: str, pytestconfig: pytest.Config) -> None:
    text = chaos.chaos(60 if pytestconfig.getoption("long") else 8, seed=1)
    done = re.fullmatch(r"\d+ jobs .* 0 wrong or lost; (\d+) faults: .*; not tried here: (.*)", text)
    assert done, text
    tried(f"faults in a whole farm (not tried here: {done[2]})", int(done[1]), lost_or_wrong=0)
    need("faketime", "faketime" not in done[2], "apt-get install faketime")


def test_the_seed_makes_the_plan_and_every_kind_of_fault_comes_as_often() -> None:
    def kinds(seed: int) -> List[str]:
        return [fault.kind for _, fault in zip(range(3 * len(chaos.KINDS)), chaos.plan(seed))]

    assert kinds(1) == kinds(1) != kinds(2)
    assert all(kinds(1).count(kind) == 3 for kind in chaos.KINDS)
