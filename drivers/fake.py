"""A robot one can read before writing a real one: a point on a plane that goes where it is told.

It has the car's channels and command, counts what is written to it, and can fail on schedule.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np

from .base import DriverError, Reading
from .car import CHANNELS as CAR_CHANNELS
from .car import COMMAND

CHANNELS = tuple(replace(channel, noisy=False) for channel in CAR_CHANNELS)


class Fake:
    """A kinematic car (bicycle model, wheelbase 0.3 m) on simulated time, without walls, delay or noise."""

    channels, command = CHANNELS, COMMAND

    def __init__(
        self, start: tuple[float, float, float] = (0.0, 0.0, 0.0), fail_after: int | None = None,
        realtime: bool = False, **ignored: Any,
    ) -> None:
        self._realtime = realtime
        self.written: list[np.ndarray] = []
        self.stops = 0
        self.fail_after = fail_after  # writes until the device fails
        self._pose, self._command = start, np.zeros(2)
        self._time, self._open = 0.0, False

    def open(self) -> None:
        self._open = True

    def now(self) -> float:
        return self._time

    def sleep(self, seconds: float) -> None:
        if self._realtime:
            time.sleep(seconds)
        x, y, heading = self._pose
        way, turn = seconds * self._command[0], seconds * self._turn()
        middle = heading + turn / 2
        self._pose = (x + way * math.cos(middle), y + way * math.sin(middle), heading + turn)
        self._time += seconds

    def read(self) -> Reading:
        if not self._open:
            raise DriverError("fake: read before open; call open() first")
        (speed, steering), turn, (x, y, heading) = self._command, self._turn(), self._pose
        values = {
            "accel": (0.0, speed * turn, 9.81), "gyro": (0.0, 0.0, turn), "shock": (abs(speed * turn),),
            "velocity": (speed, 0.0), "wheel_speed": (speed,), "steering": (steering,),
            "pose": (x, y, math.cos(heading), math.sin(heading)),
        }
        return Reading({k: np.array(v, np.float32) for k, v in values.items()}, dict.fromkeys(values, self._time))

    def write(self, command: np.ndarray) -> None:
        if not self._open:
            raise DriverError("fake: write before open; call open() first")
        if self.fail_after is not None and len(self.written) >= self.fail_after:
            raise DriverError(f"fake: failed as scheduled after {self.fail_after} writes")
        self._command = np.array(command, np.float64)
        self.written.append(self._command)

    def stop(self) -> None:
        self.stops += 1
        self._command = np.zeros(2)

    def close(self) -> None:
        self.stop()
        self._open = False

    def place(self, pose: tuple[float, float, float]) -> None:
        """Stand still at (x m, y m, heading rad)."""
        self._pose, self._command = pose, np.zeros(2)

    def truth(self) -> dict[str, float]:
        """What the readings say, and no contacts: there are no walls."""
        x, y, heading = self._pose
        return {"x": x, "y": y, "heading": heading, "speed": float(self._command[0]), "upright": 1.0, "contacts": 0.0}

    def _turn(self) -> float:
        return float(self._command[0] * math.tan(self._command[1]) / 0.3)  # rad/s

