"""A control rate that keeps its phase, never bursts, and says how late it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


class Rate:
    """Ticks at `hz` on a clock that is passed in (hardware: monotonic; twin: simulated; tests: fake).

    A tick that was missed is skipped and counted in `late`, never made up for: catching up would send the
    motors a burst of commands.
    """

    def __init__(
        self, hz: float, now: Callable[[], float], sleep: Callable[[float], None], window: int = 4096
    ) -> None:
        if not (math.isfinite(hz) and hz > 0):
            raise ValueError(f"rate must be a positive number of Hz, got {hz}")
        self.period = 1.0 / hz
        self.ticks = 0
        self.late = 0  # ticks that were missed
        self._now, self._sleep = now, sleep
        self._next: float | None = None
        self._lateness = np.zeros(window)

    def wait(self) -> None:
        """Sleep until the next tick; return at once when it has passed."""
        now = self._now()
        if self._next is None:
            self._next = now + self.period
        if now > self._next + 1e-9:
            missed = int((now - self._next) / self.period) + 1
            lateness = now - self._next
            self.late += missed
            self._next += missed * self.period
        else:
            self._sleep(self._next - now)
            lateness = self._now() - self._next
            self._next += self.period
        self._lateness[self.ticks % len(self._lateness)] = lateness
        self.ticks += 1

    def restart(self) -> None:
        """Forget the phase: the pause before the next wait is not lateness."""
        self._next = None

    def lateness_ms(self) -> dict[str, float]:
        """p50, p99 and max of how late recent ticks began, in ms."""
        recent = self._lateness[: min(self.ticks, len(self._lateness))]
        if not len(recent):
            return {"p50": 0.0, "p99": 0.0, "max": 0.0}
        p50, p99 = np.percentile(recent, [50, 99])
        return {"p50": 1e3 * float(p50), "p99": 1e3 * float(p99), "max": 1e3 * float(recent.max())}
