"""Manipulation: checkpoints in order, each a place for the tool or for the object. The last one is the success."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..drivers.base import Channel, Command, Reading
from .fit import check_channels
from .hand import HANGS_M, HELD_M, PutBack, grips, holds, place_of
from .record import Record
from .task import Batch, Observer, Outcome, Recovery, TaskError, TaskSpec

NEAR_M = 0.1  # divides what is observed of how far tool, object and checkpoint are apart
WAY = 5.0  # 1/m: what the way towards a checkpoint is worth, where the reward is for progress
SHARED_M = 0.1  # tries that are further apart at some share of their way have no place there in common
NOISE_M = 0.005  # of a tracker, and what is lost where numbers are written down
OUT_M = 0.015  # further outside its area than this, the object is lost for this try
HOME_M = 0.04  # nearer to where it rests than this, a try begins


@dataclass
class Progress:
    """Where a stream of readings stands. Moved by `Manipulate.advance` alone."""

    stage: int = 0  # of the checkpoints, how many were reached
    left_m: float | None = None  # of the way, at the reading before; None: there was none since it began


class Manipulate:
    """A `Task` of kind "manipulate" for a robot with a tool that grips and a tracker for one object.

    What it observes: the channels; from the tool to where it was last told to be, from there to the object, and from
    what shall be at the checkpoint to there; how many checkpoints were reached; the previous action.
    """

    relabels = True
    from_rest = False

    def __init__(self, spec: TaskSpec, channels: tuple[Channel, ...], command: Command) -> None:
        check_channels(spec, channels, ("tool", "object", "joint_position"))
        self._led = command.led
        led = self._led.command
        if led.names[:3] != ("x", "y", "z") or led.size != 4:
            raise TaskError(f"{spec.name}: robot {spec.robot} has no tool to be led by x, y, z and grip")
        if spec.hindsight:
            raise TaskError(f"{spec.name}: task.hindsight must be 0: its goals are not drawn again")
        self.spec, self._command = spec, command
        self._observer, self._checkpoints = Observer(channels), spec.checkpoints
        self._home = np.array(led.safe[:3])
        self._area = np.array(spec.manipulate.area, float) if spec.manipulate.area else None
        for corner in () if self._area is None else self._area:
            low, high = np.array(led.low[:2]), np.array(led.high[:2])
            if (corner < low).any() or (high < corner).any():
                raise TaskError(
                    f"{spec.name}: manipulate.area: {corner.tolist()} is not within the robot's reach, "
                    f"{low.tolist()} to {high.tolist()} m"
                )
        self._check_reach(np.array(led.low[:3]), np.array(led.high[:3]))
        self._grips: list[int | None] = []  # of each checkpoint: the one where what it is about was gripped
        grip = None
        for i, (goal, following) in enumerate(zip(spec.checkpoints, (*spec.checkpoints[1:], None), strict=True)):
            self._grips.append(grip if goal.of == "object" else None)
            if goal.of == "tool":
                grip = i if grips(goal, following) else None
        self.rest = command.to_action(np.asarray(command.safe))
        self.start = (float(led.safe[0]), float(led.safe[1]), 0.0)
        self.observation_size = self._observer.size + 9 + len(spec.checkpoints) + command.size

    def walls(self) -> list[np.ndarray]:
        """None."""
        return []

    def begin(self, reading: Reading) -> Progress:
        """None of the checkpoints is reached."""
        return Progress()

    def observe(self, progress: Progress, reading: Reading, action: np.ndarray) -> np.ndarray:
        """Channels; tool to command to object; to the checkpoint; checkpoints reached (one-hot); previous action.

        A tool comes up to 5 cm behind its command: steered by where it is alone, it swings to and fro.
        """
        values = reading.values
        told = self._led.of(self._command.to_command(action))[:3]
        reached = np.zeros(len(self._checkpoints))
        reached[min(progress.stage, len(reached) - 1)] = 1.0
        ways = told - values["tool"], values["object"] - told, self._gap(progress, reading)
        parts = self._observer(reading), np.concatenate(ways) / NEAR_M, reached, np.clip(action, -1, 1)
        return np.concatenate(parts).astype(np.float32)

    def advance(self, progress: Progress, action: np.ndarray, reading: Reading) -> Outcome:
        """1 when the last checkpoint is reached, which ends the episode; with reward "progress" also for the way made.

        At home the checkpoints begin anew. What was gripped and slipped has to be gripped again. An object that leaves
        its area ends the episode, too: it shall never seem worth anything from there.
        """
        count, tool = len(self._checkpoints), reading.values["tool"]
        if progress.stage == count or np.linalg.norm(tool - self._home) < HOME_M:
            progress.stage, progress.left_m = 0, None
        elif (grip := self._grips[progress.stage]) is not None and not holds(reading):
            progress.stage = grip
        if np.linalg.norm(self._gap(progress, reading)) < self._checkpoints[progress.stage].radius_m:
            progress.stage += 1
        done = progress.stage == count
        left = 0.0 if done else self._left(progress, reading)
        way = 0.0 if progress.left_m is None else WAY * (progress.left_m - left)
        progress.left_m = left
        events = {"progress": progress.stage / count}
        lost = not done and self._lost(reading)
        if lost:
            events["lost"] = 1.0
        reward = float(done) + (way if self.spec.manipulate.reward == "progress" else 0.0)
        return Outcome(reward, done or lost, False, events, reset=True)

    def recover(self, reading: Reading, outcome: Outcome) -> Recovery:
        """Put the object back, and go home."""
        return PutBack(self._command, self.spec.hz, self._area, self.spec.manipulate.spread_m)

    def spot(self, reading: Reading) -> tuple[float, float, float]:
        """The middle of the area."""
        return self.start

    def in_hindsight(self, batch: Batch, future: np.ndarray, rng: np.random.Generator) -> Batch:
        """There is no goal to draw again."""
        return batch

    def _check_reach(self, low: np.ndarray, high: np.ndarray) -> None:
        """Raise TaskError for a place where no tool between these corners (3,) m gets to, nor what it holds above a
        table at 0; or where an object would be lost on its way."""
        held = np.maximum(low - HANGS_M, [-math.inf, -math.inf, 0.0]), high + HANGS_M
        for i, goal in enumerate(self._checkpoints):
            where = f"{self.spec.name}: checkpoint[{i}].at = {list(goal.at)}"
            if goal.of == goal.near:
                raise TaskError(f"{where}: an object is always as near to itself; give near = \"map\"")
            first, last = (low, high) if goal.of == "tool" else held
            least = most = np.array(goal.at)
            if goal.near == "object":  # wherever that lies, at whatever height its middle is, or in the jaws
                of = held if self._area is None else np.column_stack([self._area, [0.0, HANGS_M]])
                least, most = least + of[0], most + of[1]
            if np.maximum(first - most, least - last).max() > goal.radius_m:
                raise TaskError(f"{where} is out of reach: the tool goes from {low.tolist()} to {high.tolist()} m")
            if goal.of == "object" and not self._within(np.array(goal.at), goal.radius_m):
                raise TaskError(f"{where} is outside manipulate.area: the object is lost there")

    def _lost(self, reading: Reading) -> bool:
        place = reading.values["object"]
        return not self._within(place) or (self._area is not None and bool(place[2] < -OUT_M))

    def _within(self, place: np.ndarray, more_m: float = 0.0) -> bool:
        """Whether an object at `place` (3,) m is in its area, or no further than OUT_M and so far outside."""
        if self._area is None:
            return True
        out = OUT_M + more_m
        return bool((self._area[0] - out <= place[:2]).all() and (place[:2] <= self._area[1] + out).all())

    def _gap(self, progress: Progress, reading: Reading) -> np.ndarray:
        """(3,) m from what shall be at the next checkpoint to there."""
        goal = self._checkpoints[min(progress.stage, len(self._checkpoints) - 1)]
        return place_of(goal, reading) - reading.values[goal.of]

    def _left(self, progress: Progress, reading: Reading) -> float:
        """m to the next checkpoint, and on from each to the one after it. The reward for progress is a difference of
        this alone, so that a way there and back sums to nothing (a potential, as in Ng et al. 1999, not discounted)."""
        places = [place_of(goal, reading) for goal in self._checkpoints[progress.stage :]]
        on = sum(float(np.linalg.norm(b - a)) for a, b in pairwise(places))
        return float(np.linalg.norm(self._gap(progress, reading))) + on


def shown_task(spec: TaskSpec, records: Sequence[Record], count: int = 2) -> str:
    """The text of `spec` with checkpoints from a recording: the object gripped, and `count` - 1 places on its way, the
    last where it ended; means over the recorded tries that moved it. Raises TaskError."""
    ways: list[np.ndarray] = []
    for part in _tries(records):
        tool, thing = (np.array([r.reading.values[k] for r in part], float) for k in ("tool", "object"))
        held = np.flatnonzero(np.linalg.norm(tool - thing, axis=1) < HELD_M)
        failed = part[-1].events.get("progress", 1.0) < 1.0
        if len(held) and np.linalg.norm(thing[-1] - thing[held[0]]) > HELD_M and not failed:
            ways.append(thing[held[0] :])
    if not ways:
        raise TaskError(f"{spec.name}: the recording has no try in which the tool moved the object by {HELD_M} m")
    text = re.sub(r"^\[\[checkpoint\]\].*?(?=^\[|\Z)", "", spec.text, flags=re.M | re.S).rstrip() + "\n"
    text = f"# As {spec.name}, its checkpoints from {len(ways)} tries.\n" + re.sub(r"\A(#.*\n)+", "", text)
    text += f'\n[[checkpoint]]\nof = "tool"\nnear = "object"\nat = [0.0, 0.0, 0.0]\nradius_m = {HELD_M / 2:g}\n'
    for share in np.linspace(0.0, 1.0, count)[1:]:
        places = np.array([_along(way, share) for way in ways])
        apart = float(np.linalg.norm(places - places.mean(0), axis=1).max())
        if apart > SHARED_M:
            raise TaskError(
                f"{spec.name}: after {share:.0%} of their way the tries are up to {apart:.2f} m from their mean place; "
                "give fewer --checkpoints (2: the object gripped, and where it ends), or show it again"
            )
        at = ", ".join(f"{v:.3f}" for v in places.mean(0))
        text += f'\n[[checkpoint]]\nof = "object"\nat = [{at}]\nradius_m = {max(apart, 0.02) + NOISE_M:.3f}\n'
    return text


def _tries(records: Sequence[Record]) -> list[list[Record]]:
    """The steps of each try that somebody showed."""
    tries: list[list[Record]] = [[]]
    for record in records:
        if record.action is None:
            tries.append([])
        elif record.source in ("teacher", "takeover"):
            tries[-1].append(record)
    return [part for part in tries if part]


def _along(way: np.ndarray, share: float) -> np.ndarray:
    """The place at this share of the length of a way (n, 3)."""
    length = np.append(0.0, np.cumsum(np.linalg.norm(np.diff(way, axis=0), axis=1)))
    return np.array([np.interp(share * length[-1], length, way[:, i]) for i in range(3)])
