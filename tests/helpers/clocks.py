"""Clocks and pauses of which a test decides how long they are."""

from __future__ import annotations

import threading
import time
from typing import Callable, List, Optional, Union

import povfarm


class Frozen(povfarm.Clock):
    """A clock that only moves when somebody waits."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def skip(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class Skipping(povfarm.Clock):
    """A clock of which a test can leave out hours."""

    skipped = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def skip(self, seconds: float) -> None:
        """Leave out some time."""
        self.skipped += seconds


class Pauses(threading.Event):
    """A stop event that never takes time: waiting moves the clock, and may do something."""

    def __init__(self, clock: Union[Frozen, Skipping],
                 then: Callable[[int], object] = lambda count: None) -> None:
        super().__init__()
        self.clock = clock
        self.then = then
        self.waits: List[float] = []

    def wait(self, timeout: Optional[float] = None) -> bool:
        self.waits.append(timeout or 0)
        self.clock.skip(timeout or 0)
        self.then(len(self.waits))
        return self.is_set()
