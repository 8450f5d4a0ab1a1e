"""A walking robot's body: what a fall is, what walking is worth, and how it gets up."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from ..drivers.base import Command, Reading
from .stand_up import StandUp
from .task import Recovery
from .track import Line

TILT_RAD = math.radians(30.0)  # of roll or pitch: a fall (A Walk in the Park, systems.md 2.1)
WANTED_MPS = 0.5
STEER_RADPS = 1.0  # largest turning rate that is wanted; within it, so much a second as the goal is off in rad
STEER_WEIGHT = 0.4  # of being off that by 1 rad/s, where walking is worth 1
TUMBLE_S, KICK_S, LIE_S = 2.0, 0.4, 1.0


def tilt(gravity: np.ndarray) -> tuple[float, float]:
    """(roll, pitch) in rad of gravity's direction (3,) in the body frame, which is (0, 0, -1) upright.

    Roll is positive with the left side up, pitch with the nose down.
    """
    x, y, z = (float(v) for v in gravity)
    return math.atan2(-y, -z), math.atan2(x, math.hypot(y, z))


def near(value: float, low: float, high: float, margin: float) -> float:
    """1 from `low` to `high`, falling linearly to 0 at `margin` from them: dm_control's `tolerance`."""
    return max(0.0, 1.0 - max(low - value, value - high, 0.0) / margin)


def walking(reading: Reading, wanted_mps: float, wanted_radps: float = 0.0, turning: float = 0.1) -> float:
    """The reward of A Walk in the Park (run.py, systems.md 2.1): for walking forward, at most 10, less for turning at
    another rate than `wanted_radps`, with `turning` as its weight.

    Half of it is for standing still, so that it says little about walking.
    """
    level = math.cos(tilt(reading.values["gravity"])[1]) * float(reading.values["velocity"][0])
    off = abs(float(reading.values["gyro"][2]) - wanted_radps)
    return 10.0 * (near(level, wanted_mps, 2.0 * wanted_mps, 2.0 * wanted_mps) - turning * off)


class Legged:
    """The `Body` of a robot on legs: a fall terminates, and it stands up again by itself."""

    needs = ("gravity", "gyro", "joint_position", "joint_velocity")
    terminal = ("fall",)
    from_rest = pays_speed = False

    def __init__(self, command: Command, hz: float) -> None:
        self._command, self._hz = command, hz

    def begin(self) -> None:
        """It needs no memory."""

    def trouble(self, memory: None, reading: Reading) -> str:
        """"fall" or "": by gravity alone."""
        return "fall" if max(map(abs, tilt(reading.values["gravity"]))) > TILT_RAD else ""

    def reward(self, reading: Reading, ahead: float, left: float, trouble: str) -> float:
        """`walking`, and turning to where it shall go; what comes after a fall is worth nothing, which is enough.

        Forward is always the body's own. Paid for its speed towards the goal, and beginning from nothing, it stood
        still for 14,000 steps.
        """
        steer = max(-STEER_RADPS, min(STEER_RADPS, math.atan2(left, ahead)))
        return walking(reading, WANTED_MPS, steer, STEER_WEIGHT)

    def recover(self, trouble: Collection[str], line: Line | None, width_m: float) -> Recovery:
        """Get up from whatever pose."""
        return StandUp(self._command, self._hz)


class Tumble:
    """A `Recovery` that makes a robot fall: it kicks about within its limits, and lies down. To learn to get up.

    What it does comes from the noise of the first reading: the same readings give the same tumble.
    """

    needs_hand = False

    def __init__(self, command: Command, hz: float) -> None:
        self._command, self._hz = command, hz
        self._ticks = 0
        self._rng: np.random.Generator | None = None
        self._kick = command.to_action(np.asarray(command.safe))

    def wish(self, reading: Reading) -> np.ndarray | None:
        """(n,) action-unit wish, or None when it lies."""
        command, seconds = self._command, self._ticks / self._hz
        if self._rng is None:
            self._rng = np.random.default_rng(reading.values["joint_position"].view(np.uint32))
        if seconds >= TUMBLE_S + LIE_S:
            return None
        if seconds >= TUMBLE_S:
            self._kick = command.to_action(np.asarray(command.safe))
        elif self._ticks % max(1, round(KICK_S * self._hz)) == 0:
            self._kick = command.to_action(self._rng.uniform(command.low, command.high))
        self._ticks += 1
        return self._kick
