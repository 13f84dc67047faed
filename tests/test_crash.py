"""Some of the points of tests/tools/crash.py."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Dict

import pytest

from helpers.base import need, tried
from tools import crash

pytestmark = pytest.mark.usefixtures("povray")
SEED = 1
TRIED = {"start": 3, "serve": 5, "work": 3}  # points of each phase


@pytest.fixture(autouse=True)
def _needs_strace() -> None:
    need("strace", shutil.which("strace") is not None, "apt-get install strace")


@pytest.fixture(scope="module")
def images() -> Dict[str, bytes]:
    return crash.expected_images()


@pytest.mark.parametrize("phase", TRIED)
def test_a_kill_while_writing_loses_nothing(
        phase: str, images: Dict[str, bytes], pytestconfig: pytest.Config) -> None:
    number = TRIED[phase] * (10 if pytestconfig.getoption("long") else 1)
    calls = crash.watch(phase, images)
    if phase == "serve":
        assert crash.check_order(calls) >= 1 + crash.FRAMES + 4  # a blob, a film, a still of 3 slices
    chosen = random.Random(SEED).sample(crash.points(calls), number)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda point: crash.crash(phase, point, images), chosen))
    killed, lost = sum(killed for killed, _ in results), [text for _, text in results if text]
    tried(f"kills while writing ({phase})", killed, lost_or_wrong=len(lost))
    assert lost == []
    assert killed >= number // 2  # threads of a worker differ
