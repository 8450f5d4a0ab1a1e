"""What a robot is: five verbs, a clock, and a declaration of what it reads and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class DriverError(RuntimeError):
    """A device failed, is missing or answered nonsense. The message says which and what to do."""


@dataclass(frozen=True)
class Channel:
    """One thing a robot reads: its shape, unit, rate, age and the scale the observation divides it by."""

    name: str
    size: int  # values are float32 vectors of this length
    unit: str
    hz: float  # how often the sensor itself measures
    latency_s: float  # typical age of a fresh value when it is read
    scale: tuple[float, ...]  # one number a value, in the channel's unit
    observed: bool = True  # part of the policy's observation
    most: tuple[float, ...] = ()  # largest magnitude the sensor can give; empty: not known
    noisy: bool = False  # two measurements are never equal to the last bit

    def __post_init__(self) -> None:
        if len(self.scale) != self.size or len(self.most) not in (0, self.size):
            raise ValueError(f"channel {self.name}: {self.size} values, not as many scales or largest ones")

    @property
    def range(self) -> np.ndarray:
        """(size,) largest magnitude of a value that can be used: at least it is finite."""
        return np.array(self.most or (np.finfo(np.float32).max,) * self.size)


@dataclass(frozen=True)
class Command:
    """What the motors take, in SI units, and how an action in [-1, 1] maps onto it (linearly).

    The absolute limits may be wider than the action box: a reset drives backwards, a policy need not.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    action_low: tuple[float, ...]  # the command of action -1
    action_high: tuple[float, ...]  # the command of action +1
    low: tuple[float, ...]  # absolute limits of the robot
    high: tuple[float, ...]
    rate: tuple[float, ...]  # largest change per second
    safe: tuple[float, ...]  # what stops the robot
    keeps: tuple[bool, ...] = ()  # what stays as it was while the gate holds it or nobody drives; empty: nothing
    measured: tuple[str, ...] = ()  # each value: "channel" (its first number) or "channel[3]"; "" or empty: nothing
    reach: tuple[float, ...] = ()  # a command goes no further than this from what is measured; empty: any
    tolerance: tuple[float, ...] = ()  # an actuator that follows is within this of its command; empty: any
    stays: bool = False  # it stops where it is, and not by `safe`, which is where it rests
    tool: Led | None = None  # of one that is told its joints

    @property
    def size(self) -> int:
        """Number of values in a command, and in an action."""
        return len(self.names)

    @property
    def led(self) -> Led:
        """How it is led by its tool; what is told that already takes it as it is."""
        return self.tool or Led(self, np.asarray, np.asarray)

    def to_command(self, action: np.ndarray) -> np.ndarray:
        """(size,) action -> (size,) float64 command; actions beyond the box map linearly beyond it."""
        low, high = np.asarray(self.action_low), np.asarray(self.action_high)
        return low + (np.asarray(action, np.float64) + 1.0) * 0.5 * (high - low)

    def to_action(self, command: np.ndarray) -> np.ndarray:
        """(size,) command -> (size,) float32 action; outside [-1, 1] where the command left the action box."""
        low, high = np.asarray(self.action_low), np.asarray(self.action_high)
        return (2.0 * (np.asarray(command, np.float64) - low) / (high - low) - 1.0).astype(np.float32)


@dataclass(frozen=True)
class Led:
    """A robot led by its tool: what that is told, and the two ways between this and the robot's own command."""

    command: Command  # x, y, z and grip: m, m, m, rad
    of: Callable[[np.ndarray], np.ndarray]  # (n,) command of the robot -> (4,) of its tool
    by: Callable[[np.ndarray], np.ndarray]  # (4,) -> (n,)


@dataclass(frozen=True)
class Reading:
    """The newest value of every channel and the time each was captured (s, the robot's clock)."""

    values: dict[str, np.ndarray]  # channel name -> (size,) float32, copies
    stamps: dict[str, float]


class Sticks(NamedTuple):
    """What a person does with a gamepad or a keyboard: how far each stick is pushed, -1..1, and whether to stop."""

    ahead: float = 0.0
    left: float = 0.0
    up: float = 0.0
    grip: float = 0.0  # 1 opens, -1 closes
    stop: bool = False


@runtime_checkable
class Robot(Protocol):
    """A robot, real or twin. `stop` and `close` are idempotent; `stop` may be called in any state."""

    channels: tuple[Channel, ...]
    command: Command

    def open(self) -> None:
        """Connect. Raises DriverError with the remedy when the device is missing."""

    def read(self) -> Reading:
        """The newest values, without waiting for newer ones. Raises DriverError when the device fails."""

    def write(self, command: np.ndarray) -> None:
        """Send a (size,) command. Raises DriverError when the device fails."""

    def stop(self) -> None:
        """Bring the motors to their safe state now."""

    def close(self) -> None:
        """Stop and let go of the device."""

    def now(self) -> float:
        """Time in seconds: monotonic on hardware, simulated in the twin."""

    def sleep(self, seconds: float) -> None:
        """Wait; in the twin this advances the physics by that time."""


@runtime_checkable
class Twin(Robot, Protocol):
    """A simulated robot: it can be placed, and it knows what only a simulator can know."""

    def place(self, pose: tuple[float, float, float]) -> None:
        """Set the robot at rest, upright, at (x m, y m, heading rad)."""

    def truth(self) -> dict[str, float]:
        """For eval, report and tests only: x, y, heading, speed, upright, and `contacts`, a running count
        of contacts with walls (a new one each time a wall is touched after 0.5 s without)."""
