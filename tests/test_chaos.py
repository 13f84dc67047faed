"""A short run of tests/chaos.py."""

from __future__ import annotations

import chaos


def test_a_farm_to_which_everything_happens_finishes_all_of_its_jobs(povray: str) -> None:
    assert "0 wrong or lost" in chaos.chaos(8, seed=1)
