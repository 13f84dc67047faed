"""A short run of tests/tools/swarm.py."""

from __future__ import annotations

import pytest

from tools import swarm


@pytest.mark.slow
def test_every_delivery_of_many_workers_is_taken_and_counted_once() -> None:
    figures = swarm.rate(20, 1)  # compares its own count with the farm's
    assert figures["deliveries_a_second"] > 0
