"""Scripted motion of a tool that grips: what a reset and the scripted teacher are made of. By readings alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np

from ..drivers.base import Command, Reading
from .task import Checkpoint

Motion = Generator[np.ndarray, Reading, Reading]  # takes the newest reading, gives a command in SI units

SPEED_MPS = 0.25  # of a reset, if the gate lets it
GAIN, MOST_M = 2.0, 0.03  # 1/s: how fast a tool that stays off its place is corrected, and by how much at most
ARRIVED_M = 0.006  # closer than this
LATE_S = 3.0  # after the way should be done, it is not going to arrive
GRIP_S = 0.8  # for the jaws to close or open
AJAR_RAD = 0.1  # nearer to open than this, they are
HOVER_M = 0.07  # above what is gripped, and above the table on the way
EDGE_M = 0.01  # twice so far from its area's edges an object is laid down, or in the middle; so far beyond it may lie
HELD_M = 0.03  # an object closer than this to the tool is between the jaws
HANGS_M = 0.06  # nothing that is held reaches further from the tool
MISS_M = 0.02  # standard deviation of how far beside its object a script of quality 0 grips


class Hand:
    """Where a tool is led, and how its jaws are. The command is (x, y, z, grip): m, m, m, rad.

    It begins where the tool is; where `told` (4,) is given, which is a command, there, jaws and all.
    """

    def __init__(
        self, command: Command, hz: float, speed_mps: float = SPEED_MPS, told: np.ndarray | None = None
    ) -> None:
        self._command, self._hz, self._speed = command, hz, speed_mps
        self.low, self.high = np.array(command.low[:3]), np.array(command.high[:3])
        self.shut, self.open = command.action_low[3], command.action_high[3]
        self._at = None if told is None else np.array(told[:3], float)  # led to, so far
        self._off = np.zeros(3)  # what is added so that the tool is there
        self._grip = None if told is None else float(told[3])  # rad that the jaws are told; None: what they shall be
        self.jaws = self._grip  # rad that they shall be; None: as they are

    def go(self, reading: Reading, place: np.ndarray, arrived_m: float = ARRIVED_M) -> Motion:
        """In a straight line to `place` (3,) m, and until it is there."""
        place = np.clip(place, self.low, self.high)
        self._begin(reading)
        assert self._at is not None
        ticks = int((np.linalg.norm(place - self._at) / self._speed + LATE_S) * self._hz)
        for _ in range(ticks):
            way, off = place - self._at, place - reading.values["tool"]
            left = float(np.linalg.norm(way))
            if np.linalg.norm(off) < arrived_m:
                break
            if left < 1e-6:
                self._off = np.clip(self._off + GAIN / self._hz * off, -MOST_M, MOST_M)
            self._at = self._at + way * min(1.0, self._speed / self._hz / max(left, 1e-9))
            reading = yield self._told()
        return reading

    def grip(self, reading: Reading, grip: float) -> Motion:
        """Stay until the jaws are closed or open."""
        self.jaws = grip
        for _ in range(round(GRIP_S * self._hz)):
            reading = yield from self.stay(reading)
        return reading

    def stay(self, reading: Reading) -> Motion:
        """One tick."""
        self._begin(reading)
        return (yield self._told())

    def _begin(self, reading: Reading) -> None:
        if self._at is None:
            self._at = reading.values["tool"].astype(float)
            self.jaws = float(reading.values["joint_position"][5]) if self.jaws is None else self.jaws

    def pick(self, reading: Reading, error: np.ndarray | None = None) -> Motion:
        """Grip the object, where it is seen or that far (3,) m from it: from above, if not at once."""
        place = reading.values["object"] + (np.zeros(3) if error is None else error)
        above = np.linalg.norm((reading.values["tool"] - place)[:2]) < 2 * ARRIVED_M
        self.jaws = self.open
        if not (above and self._opened(reading)):
            reading = yield from self.go(reading, place + (0.0, 0.0, HOVER_M), 3 * ARRIVED_M)
        for _ in range(round(LATE_S * self._hz)):  # jaws that are not open yet would push it away
            if self._opened(reading):
                break
            reading = yield from self.stay(reading)
        reading = yield from self.go(reading, place)
        return (yield from self.grip(reading, self.shut))

    def _opened(self, reading: Reading) -> bool:
        return bool(reading.values["joint_position"][5] > self.open - AJAR_RAD)

    def carry(self, reading: Reading, place: np.ndarray, arrived_m: float = ARRIVED_M) -> Motion:
        """Bring the object that is held to `place`, up first and along then, however far it hangs from the tool."""
        held = reading.values["object"] - reading.values["tool"]
        far = max(float(np.linalg.norm(held)), 1e-9)
        held = held * min(1.0, HANGS_M / far)  # what was lost is not followed
        high = max(place[2], HOVER_M) - held[2]
        if reading.values["tool"][2] < high:
            reading = yield from self.go(reading, np.array([*reading.values["tool"][:2], high]), 3 * ARRIVED_M)
        reading = yield from self.go(reading, np.array([*(place - held)[:2], high]), 3 * ARRIVED_M)
        return (yield from self.go(reading, place - held, arrived_m))

    def _told(self) -> np.ndarray:
        assert self._at is not None and self.jaws is not None
        grip, most = self.jaws, self._command.rate[3] / self._hz
        if self._grip is not None:
            grip = self._grip = self._grip + min(max(self.jaws - self._grip, -most), most)
        return np.array([*np.clip(self._at + self._off, self.low, self.high), grip])


def holds(reading: Reading) -> bool:
    """Whether the object is where the jaws are."""
    return bool(np.linalg.norm(reading.values["object"] - reading.values["tool"]) < HELD_M)


def place_of(goal: Checkpoint, reading: Reading) -> np.ndarray:
    """(3,) m: where a checkpoint lies now."""
    return np.array(goal.at) + (reading.values["object"] if goal.near == "object" else 0.0)


def grips(goal: Checkpoint, following: Checkpoint | None) -> bool:
    """Whether at this checkpoint the object comes between the jaws, to be moved to the next."""
    at_it = goal.of == "tool" and goal.near == "object" and float(np.linalg.norm(goal.at)) < HELD_M
    return at_it and following is not None and following.of == "object"


class Scripted:
    """A motion asked for one wish a tick. `needs_hand` is for those that ask a person for help, as a reset may."""

    def __init__(self, command: Command, make: Callable[[Reading], Motion]) -> None:
        self.needs_hand = False
        self._command, self._make = command, make
        self._motion: Motion | None = None

    def wish(self, reading: Reading) -> np.ndarray | None:
        """(n,) action-unit wish, or None when the motion is over."""
        try:
            if self._motion is None:
                self._motion = self._make(reading)
                return self._wish(next(self._motion))
            return self._wish(self._motion.send(reading))
        except StopIteration:
            return None

    def _wish(self, told: np.ndarray) -> np.ndarray:
        return self._command.to_action(self._command.led.by(told))


class PutBack(Scripted):
    """A `Recovery`: the object is laid down anew somewhere in `area` ((2, 2) m, corners), fetched first where it is not
    held; the tool goes back up the way it came down, and home: there, or up to `spread_m` off along each axis.

    Without an area what is held is kept. Where an object cannot be fetched, it asks for a hand.
    """

    TRIES = 3  # to fetch the object

    def __init__(self, command: Command, hz: float, area: np.ndarray | None, spread_m: float = 0.0) -> None:
        super().__init__(command, self._back)
        command = command.led.command
        self._hand, self._area, self._spread = Hand(command, hz), area, spread_m
        self._lowest, self._home = command.action_low[2], np.array(command.safe)

    def _back(self, reading: Reading) -> Motion:
        hand, area = self._hand, self._area
        # where to: by the noise of the reading, so that the same readings give the same motion
        rng = np.random.default_rng(np.concatenate([reading.values[k] for k in ("tool", "object")]).view(np.uint32))
        home = self._home[:3] + self._spread * rng.uniform(-1.0, 1.0, 3)
        if area is None or not holds(reading):
            reading = yield from self._up(reading)
        if area is not None:
            inside = np.minimum(2 * EDGE_M, (area[1] - area[0]) / 2)
            spot = rng.uniform(area[0] + inside, area[1] - inside)
            for _ in range(self.TRIES):
                if not holds(reading):
                    if not self._in_reach(reading):
                        break
                    reading = yield from hand.pick(reading)
                hand.jaws = hand.shut
                reading = yield from self._lay(reading, spot)
                if np.linalg.norm(reading.values["object"][:2] - spot) < HELD_M:
                    break  # else the tool came back without it
        hand.jaws = hand.shut if area is None else self._home[3]
        reading = yield from hand.go(reading, home, 3 * ARRIVED_M)
        while area is not None and not self._lies_well(reading):
            self.needs_hand = True
            reading = yield from hand.stay(reading)
        self.needs_hand = False
        return reading

    def _lay(self, reading: Reading, spot: np.ndarray) -> Motion:
        """Bring what is held to `spot` (2,) m on the table."""
        reading = yield from self._hand.carry(reading, np.array([*spot, self._lowest]))
        reading = yield from self._hand.grip(reading, self._hand.open)
        return (yield from self._up(reading))

    def _up(self, reading: Reading) -> Motion:
        x, y, z = reading.values["tool"]
        up = np.array([x, y, max(z, HOVER_M)])
        return (yield from self._hand.go(reading, up, 3 * ARRIVED_M))

    def _lies_well(self, reading: Reading) -> bool:
        """On the table and in the area."""
        assert self._area is not None
        return _within(reading, self._area[0] - EDGE_M, self._area[1] + EDGE_M)

    def _in_reach(self, reading: Reading) -> bool:
        return _within(reading, self._hand.low[:2] - EDGE_M, self._hand.high[:2] + EDGE_M)


def _within(reading: Reading, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether the object lies on the table between these corners (2,) m."""
    place = reading.values["object"]
    return bool((low <= place[:2]).all() and (place[:2] <= high).all() and place[2] > -HELD_M)


def miss(quality: float, rng: np.random.Generator) -> np.ndarray:
    """(3,) m: how far a script of that quality, 0 to 1, is off this time."""
    return MISS_M * (1.0 - quality) * rng.standard_normal(3) * (1.0, 1.0, 0.0)


def show(
    command: Command, hz: float, checkpoints: Sequence[Checkpoint], speed_mps: float, error: np.ndarray,
    told: np.ndarray | None = None, held: bool = True,
) -> Scripted:
    """A try by script: each checkpoint in turn, then the last two of an object again and again, or it stays. An object
    that is to be moved is gripped first.

    `error` (3,) m: so far it misses the object when it grips, or the places of one that it held from the start.
    `told`: as of `Hand`. `held`: whether an object that is to be moved at first is between the jaws.
    """
    hand = Hand(command.led.command, hz, speed_mps, told)

    def motion(reading: Reading) -> Motion:
        off, gripped = error, held
        for goal, following in zip(checkpoints, (*checkpoints[1:], None), strict=True):
            place = place_of(goal, reading)
            if goal.of == "object":
                if not gripped:
                    reading, off, gripped = (yield from hand.pick(reading, off)), np.zeros(3), True
                reading = yield from hand.carry(reading, place + off, goal.radius_m / 2)
            elif grips(goal, following):
                reading, off, gripped = (yield from hand.pick(reading, off)), np.zeros(3), True
            else:
                reading = yield from hand.go(reading, place + off, goal.radius_m / 2)
        while True:  # what jammed on the way to the last checkpoint may go in from the one before it
            for goal in checkpoints[-2:] if len(checkpoints) > 1 and checkpoints[-2].of == "object" else ():
                reading = yield from hand.carry(reading, np.array(goal.at) + off, goal.radius_m / 2)
            reading = yield from hand.stay(reading)

    return Scripted(command, motion)
