"""A control rate that keeps its phase, never bursts, and says how late it was."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np

RECENT = 4096  # ticks whose lateness is remembered


class Rate:
    """Ticks at `hz` on a clock that is passed in (hardware: monotonic; twin: simulated; tests: fake).

    A tick that was missed is skipped and counted in `late`, never made up for: catching up would send the
    motors a burst of commands.
    """

    def __init__(self, hz: float, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        if not (math.isfinite(hz) and hz > 0):
            raise ValueError(f"rate must be a positive number of Hz, got {hz}")
        self.period = 1.0 / hz
        self.late = 0  # ticks that were missed
        self._now, self._sleep = now, sleep
        self._next: float | None = None
        self._lateness: deque[float] = deque(maxlen=RECENT)  # s

    def wait(self) -> None:
        """Sleep until the next tick; return at once when it has passed."""
        now = self._now()
        if self._next is None:
            self._next = now + self.period
        missed = int((now - self._next) / self.period) + 1 if now > self._next + 1e-9 else 0
        if not missed:
            self._sleep(self._next - now)
            now = self._now()
        self._lateness.append(now - self._next)
        self.late += missed
        self._next += max(missed, 1) * self.period

    def restart(self) -> None:
        """Forget the phase: the pause before the next wait is not lateness."""
        self._next = None

    def lateness_ms(self) -> dict[str, float]:
        """p50, p99 and max of how late recent ticks began, in ms."""
        p50, p99, longest = 1e3 * np.percentile(self._lateness or [0.0], [50, 99, 100])
        return {"p50": float(p50), "p99": float(p99), "max": float(longest)}
