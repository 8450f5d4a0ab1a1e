"""Who may take the stick in the middle of an episode: a person, or a script that stands in for one.

Either begins at the action executed last and moves no faster than a hand does, so that nothing jumps. What it wishes
goes through the gate, as what a policy wishes does.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from ..drivers.base import Command, Reading, Sticks
from .hand import Scripted, holds, miss, show
from .manipulate import Manipulate, Progress
from .task import TaskError, TaskSpec

BY_HAND = ("keyboard", "gamepad")
WHO = ("none", "script", *BY_HAND)

# --- by hand
STEERED, LED = ("speed", "steering"), ("x", "y", "z", "grip")  # the commands that sticks can give
# m/s at full deflection; of a tool so slow that a key, which counts for a while, is still a correction
HAND_MPS = {"course": 1.0, "manipulate": 0.06}
MIDDLE = 0.1  # a stick that is closer to its middle is let go: springs wear out
LET_GO_S = 0.5  # after that, a person still has it (SERL, systems.md 6.1)
ACROSS_S = 0.5  # from one end of the action box to the other, where sticks say how it shall be and not what changes

# --- by script
SCRIPT_MPS = 0.15
STUCK_S, CLOSER_M = 1.5, 0.01  # it takes the stick when the way did not become so much shorter for so long
KEEPS_S = 5.0  # and has it no longer than this


class Takeover(Protocol):
    """Asked once a step of an episode, before the policy is."""

    def wish(self, reading: Reading, action: np.ndarray) -> np.ndarray | None:
        """(n,) wish in action units while it has the stick, else None.

        reading: the newest; action (n,): the one executed last, in action units.
        """

    def begin(self) -> None:
        """An episode ended, or its reset did: whatever was under way is over."""

    def stopped(self) -> bool:
        """Whether it wants all of it to end."""


class Device(Protocol):
    """A gamepad or a keyboard."""

    def read(self) -> Sticks:
        """Where the sticks are, without waiting. Raises DriverError when it is gone."""


def check(who: str, spec: TaskSpec, command: Command) -> None:
    """Raise TaskError where `who` cannot take over in this task."""
    if who not in WHO:
        raise TaskError(f"{spec.name}: {who!r} cannot take over, only {', '.join(WHO)}")
    if who == "script" and spec.kind != "manipulate":
        raise TaskError(f"{spec.name}: --takeover script is for tasks of kind manipulate, not {spec.kind}")
    if who in BY_HAND and (spec.kind not in HAND_MPS or command.led.command.names not in (STEERED, LED)):
        raise TaskError(f"{spec.name}: a person takes over cars on a course and tools that are led, and nothing else")


def by_sticks(sticks: Sticks, command: Command, hz: float, speed_mps: float, action: np.ndarray) -> np.ndarray:
    """(n,) wish in action units: a car's speed, up to `speed_mps`, and steering; of a tool that is led, the place that
    its action before, `action`, comes to at up to that speed, and its jaws as fast as they may.
    """
    if command.names == STEERED:
        return command.to_action(np.array([sticks.ahead * speed_mps, sticks.left * command.high[1]]))
    way = np.array([sticks.ahead, sticks.left, sticks.up])
    way *= speed_mps / hz / max(1.0, float(np.linalg.norm(way)))
    led, told = command.led, command.to_command(action)
    place, change = led.of(told), np.array([*way, sticks.grip * led.command.rate[3] / hz])
    told = told + led.by(place + change) - led.by(place)  # by joints: a tool that was turned stays turned
    return _boxed(command.to_action(told), action)


def _boxed(wish: np.ndarray, action: np.ndarray) -> np.ndarray:
    """A wish within the action box, so that it is learned from; where the action before was not, no further off."""
    return np.clip(wish, np.minimum(action, -1.0), np.maximum(action, 1.0))


class ByHand:
    """A person, who has the stick while it is off its middle and LET_GO_S after that."""

    def __init__(self, device: Device, command: Command, hz: float, speed_mps: float) -> None:
        self._device, self._command, self._hz, self._speed = device, command, hz, speed_mps
        self._keeps = 0  # ticks that are left
        self._stop = False

    def wish(self, reading: Reading, action: np.ndarray) -> np.ndarray | None:
        """As `by_sticks`; a car's changes no faster than in ACROSS_S through all of the action box."""
        sticks = self._read()
        if any(sticks[:4]):
            self._keeps = round(LET_GO_S * self._hz)
        elif self._keeps:
            self._keeps -= 1
        else:
            return None
        wish = by_sticks(sticks, self._command, self._hz, self._speed, action)
        if self._command.names == STEERED:
            most = 2.0 / (ACROSS_S * self._hz)
            wish = np.clip(wish, action - most, action + most)
        return wish

    def begin(self) -> None:
        """The stick is the policy's."""
        self._keeps = 0

    def stopped(self) -> bool:
        """Whether the person stopped it. Ask during resets too: it forgets keys that were pressed meanwhile."""
        self._read()
        return self._stop

    def _read(self) -> Sticks:
        sticks = self._device.read()
        self._stop |= sticks.stop
        ahead, left, up, grip = (value if abs(value) > MIDDLE else 0.0 for value in sticks[:4])
        return Sticks(ahead, left, up, grip)


class ByScript:
    """A stand-in for a person, for tasks of kind manipulate; it knows readings alone.

    It takes the stick when the way left has not become CLOSER_M shorter for STUCK_S. It moves as `hand.show` does, from
    the action executed last, and hands back when another checkpoint is the next, or after KEEPS_S.
    Below quality 1 it misses what it grips, in each takeover by another distance.
    """

    def __init__(self, task: Manipulate, command: Command, quality: float, seed: int) -> None:
        self._task, self._command, self._quality = task, command, quality
        self._rng = np.random.default_rng(seed)
        self._progress: Progress | None = None
        self._motion: Scripted | None = None  # while it has the stick
        self._nearest = math.inf  # m of the way left, when it became shorter last
        self._ticks = 0  # since then, or since it took the stick

    def wish(self, reading: Reading, action: np.ndarray) -> np.ndarray | None:
        """As the motion of `hand.show`."""
        hz = self._task.spec.hz
        self._ticks += 1
        if self._follow(reading, action) or (self._motion and self._ticks >= KEEPS_S * hz):
            self._watch()
        assert self._progress is not None
        if self._motion is None:
            left = self._progress.left_m
            if left is None or left < self._nearest - CLOSER_M:
                self._watch(math.inf if left is None else left)
            elif self._ticks >= STUCK_S * hz:
                self._motion, self._ticks = self._take(reading, action, self._progress.stage), 0
        wish = None if self._motion is None else self._motion.wish(reading)
        return None if wish is None else _boxed(wish, action)

    def begin(self) -> None:
        """The stick is the policy's, and nothing is known of the way."""
        self._progress = None
        self._watch()

    def stopped(self) -> bool:
        """Never."""
        return False

    def _watch(self, left_m: float = math.inf) -> None:
        """Let go of the stick, and see how the way becomes shorter than this."""
        self._motion, self._nearest, self._ticks = None, left_m, 0

    def _follow(self, reading: Reading, action: np.ndarray) -> bool:
        """Whether the checkpoint that is next is another one now."""
        if self._progress is None:
            self._progress = self._task.begin(reading)
            return False
        before = self._progress.stage
        self._task.advance(self._progress, action, reading)
        return self._progress.stage != before

    def _take(self, reading: Reading, action: np.ndarray, stage: int) -> Scripted:
        """The motion from here on."""
        spec, command, led = self._task.spec, self._command, self._command.led
        told = led.of(command.to_command(action))
        closed = told[3] < (led.command.action_low[3] + led.command.action_high[3]) / 2
        held = not spec.manipulate.area or (closed and holds(reading))
        error = miss(self._quality, self._rng)
        speed = min(SCRIPT_MPS, led.command.rate[0])
        return show(command, spec.hz, spec.checkpoints[stage:], speed, error, told, held)
