"""A car's body: what counts as trouble, and the reset by driving: back off, steer out, turn round, until the car
stands in the course's direction."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from ..drivers.base import Command, Reading
from .track import Line

# Detectors, on measured channels only. FastRLAP/RACER thresholds (systems.md 1.6); `tests/test_course.py`
# holds them against an hour of pure pursuit.
COLLISION_MPS2 = 20.0  # horizontal specific force, peak since the last reading
FLIPPED_MPS2 = -4.0  # vertical specific force: on the roof
TIPPED_MPS2 = 2.0  # below this for TIPPED_S: lying on a side
TIPPED_S = 0.5
STUCK_M = 0.3  # within this for STUCK_S
STUCK_S = 3.0
FAIL_PENALTY = 10.0  # plus up to 5 for the force of the hit, FastRLAP inference_agent.py

PAUSE_S = 0.2  # let the car and its sensors settle (RACER: 0.5 s)
BACK_MPS = -1.3  # FastRLAP: 1 s of raw speed -1 m/s; here until the way ahead is free
FORWARD_MPS = 1.0
BACK_S, FORWARD_S = 1.6, 1.8  # then try the other way
BLOCKED_S, BLOCKED_MPS = 0.6, 0.15  # slower than this after that time: something is in the way
LOOKAHEAD_M = 0.8
ALIGNED_RAD = 0.5
CLEAR_M = 0.3  # driven forward without being blocked
UPRIGHT_MPS2, UPRIGHT_S = 7.0, 2.0  # above this for so long: on its wheels, and out of the hand
DOWN_MPS2, DOWN_S = 2.0, 0.5  # below this for so long: it came down on its side or roof after all


@dataclass
class Memory:
    """Of the readings that have come."""

    tipped: int = 0  # ticks in a row
    trail: deque[np.ndarray] = field(default_factory=deque)  # recent positions, newest last


class Wheeled:
    """The `Body` of a car. A collision or a flip terminates; being stuck truncates."""

    needs = ("pose", "velocity", "accel", "shock")
    terminal = ("collision", "flip")
    from_rest = pays_speed = True

    def __init__(self, command: Command, hz: float) -> None:
        self._command, self._hz = command, hz
        self._stuck_ticks = max(2, round(STUCK_S * hz))
        self._tipped_ticks = max(1, round(TIPPED_S * hz))

    def begin(self) -> Memory:
        """Nothing yet."""
        return Memory()

    def trouble(self, memory: Memory, reading: Reading) -> str:
        """"collision", "flip", "stuck" or ""; after any of them it begins to look anew."""
        found = self._trouble(memory, reading)
        if found:
            memory.trail.clear()
            memory.tipped = 0
        return found

    def reward(self, reading: Reading, ahead: float, left: float, trouble: str) -> float:
        """FastRLAP's: the speed towards (ahead, left), minus 10 for trouble and up to 5 for the force of a hit
        (systems.md 1.4)."""
        speed_mps = float(reading.values["velocity"][:2] @ np.array([ahead, left]))
        if not trouble:
            return speed_mps
        return speed_mps - (FAIL_PENALTY + min(max(float(reading.values["shock"][0]) / 5.0, 0.0), 5.0))

    def recover(self, trouble: Collection[str], line: Line | None, width_m: float) -> DriveReset:
        """Back off, steer out, turn round; a flip needs a hand."""
        assert line is not None  # cars drive on courses
        return DriveReset(self._command, line, width_m, self._hz, flipped="flip" in trouble)

    def _trouble(self, memory: Memory, reading: Reading) -> str:
        up = float(reading.values["accel"][2])
        memory.tipped = memory.tipped + 1 if up < TIPPED_MPS2 else 0
        if up < FLIPPED_MPS2 or memory.tipped >= self._tipped_ticks:
            return "flip"
        if float(reading.values["shock"][0]) > COLLISION_MPS2:
            return "collision"
        trail = memory.trail
        trail.append(reading.values["pose"][:2].copy())
        if len(trail) > self._stuck_ticks:
            trail.popleft()
            if np.linalg.norm(np.asarray(trail) - trail[-1], axis=1).max() < STUCK_M:
                return "stuck"
        return ""


class DriveReset:
    """A `Recovery` for a robot that takes (speed m/s, steering rad) and reads pose and accel."""

    def __init__(self, command: Command, line: Line, width_m: float, hz: float, flipped: bool) -> None:
        self.needs_hand = flipped
        self._command, self._line, self._hz = command, line, hz
        self._free = max(0.2, width_m / 2 - 0.3)  # how far off the line is still well inside
        self._phase, self._ticks, self._switches = "pause", 0, 0
        self._from = np.zeros(2)  # where this phase began
        self._up, self._down = 0, 0  # ticks in a row

    def wish(self, reading: Reading) -> np.ndarray | None:
        """(2,) action-unit wish, or None when the car can try again."""
        up = float(reading.values["accel"][2])
        self._up = self._up + 1 if up > UPRIGHT_MPS2 else 0
        self._down = self._down + 1 if up < DOWN_MPS2 else 0
        up_again, came_down = self._up >= UPRIGHT_S * self._hz, self._down >= DOWN_S * self._hz
        self.needs_hand = not up_again if self.needs_hand else came_down
        if self.needs_hand:  # a person sets it on its wheels; the motors rest until then
            return self._wish(0.0, 0.0)
        position = reading.values["pose"][:2].astype(np.float64)
        angle, heading_error, offset = self._aim(reading)
        aligned = abs(angle) < ALIGNED_RAD and abs(heading_error) < ALIGNED_RAD + 0.2
        self._ticks += 1
        elapsed = self._ticks / self._hz
        speed = float(reading.values["velocity"][0])
        if self._phase == "pause":
            if elapsed >= PAUSE_S:
                self._switch("forward" if aligned else "back", position)
            return self._wish(0.0, 0.0)
        moved = float(np.linalg.norm(position - self._from))
        blocked = elapsed > BLOCKED_S and speed * (1 if self._phase == "forward" else -1) < BLOCKED_MPS
        if self._phase == "back":
            if blocked or elapsed > BACK_S or (abs(angle) < 0.3 and moved > 0.25):
                self._switch("forward", position)
        elif aligned and abs(offset) < self._free and moved > CLEAR_M and speed > BLOCKED_MPS:
            return None
        elif blocked or elapsed > FORWARD_S:
            self._switch("back", position)
        return self._drive(angle)

    def _drive(self, angle: float) -> np.ndarray:
        full = self._command.high[1]
        # every third attempt keeps the wheels straight: what full lock could not free, that may
        steer = 0.0 if self._switches % 6 >= 4 else float(np.clip(1.5 * angle, -full, full))
        return self._wish(FORWARD_MPS, steer) if self._phase == "forward" else self._wish(BACK_MPS, -steer)

    def _aim(self, reading: Reading) -> tuple[float, float, float]:
        """Angle to a point ahead on the line, heading error (rad, body frame), offset from the line (m)."""
        x, y, c, s = (float(v) for v in reading.values["pose"])
        heading = math.atan2(s, c)
        along, offset = self._line.project((x, y))
        target = self._line.at(along + LOOKAHEAD_M)
        angle = math.atan2(target[1] - y, target[0] - x) - heading
        error = float(self._line.heading(along + LOOKAHEAD_M / 2)) - heading
        return math.remainder(angle, math.tau), math.remainder(error, math.tau), offset

    def _switch(self, phase: str, position: np.ndarray) -> None:
        self._phase, self._ticks, self._from = phase, 0, position
        self._switches += 1

    def _wish(self, speed: float, steering: float) -> np.ndarray:
        return self._command.to_action(np.array([speed, steering]))
