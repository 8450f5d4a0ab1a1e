"""The one environment: a robot (real or twin), a task, a gate and a rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np

from ..drivers.base import Command, Reading, Robot, Twin
from .rate import Rate
from .record import Record
from .safety import DISARMED, LATCHED, Gate, SafetyError
from .task import Outcome, Task

GENTLE = Outcome(0.0, False, False, {})
ARM_S = 10.0  # for the channels to come up


class RecordingEnv(gymnasium.Env):
    """Takes actions in [-1, 1], numbers its steps, and gives a Record of each to everyone in `on_record`."""

    def __init__(self, task: Task, command: Command) -> None:
        self.task, self.command = task, command
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (command.size,), np.float32)
        self.action = task.rest  # executed last
        self.on_record: list[Callable[[Record], None]] = []
        self.source = "policy"  # who the next wishes come from
        self.version = 0  # of the weights the next wishes come from
        self._seq = 0

    def _emit(self, now: float, reading: Reading, action: np.ndarray | None, outcome: Outcome, source: str) -> None:
        self._seq += 1
        ended = outcome.terminated, outcome.truncated
        record = Record(self._seq, now, reading, action, outcome.reward, *ended, source, self.version, outcome.events)
        for observer in self.on_record:
            observer(record)


class RobotEnv(RecordingEnv):
    """A gymnasium.Env over a robot. Never subclassed; twin or hardware is which `robot` it is given.

    Every tick, resets included, makes one Record for `on_record`, and every segment ends with a
    readings-only one. `reset` drives the robot back to where it can try again; it never teleports, except
    that `reset(seed=...)` may place a twin, and that a twin (not a real robot) is set on its wheels after
    a flip.
    """

    def __init__(self, robot: Robot, task: Task, gate: Gate, rate: Rate) -> None:
        super().__init__(task, gate.command)
        self.robot, self.gate, self.rate = robot, gate, rate
        self.events: Callable[[], tuple[str, ...]] = tuple  # gate events, e.g. from an e-stop button
        self.auto_reset = True  # off only to show what practice without it is worth
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (task.observation_size,), np.float32)
        self.reading: Reading  # the newest
        self._ranges = {channel.name: channel.range for channel in robot.channels}
        self._range = np.concatenate(list(self._ranges.values()))
        self._open = False
        self._progress: Any = None
        self._outcome = GENTLE
        self._segment = 0  # ticks since the segment began
        self._limit = max(1, round(task.spec.episode_s * task.spec.hz))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Make the robot able to try again, by its own motion. Returns (observation, info)."""
        super().reset(seed=seed)
        try:
            rested = self._open and self.gate.state in (DISARMED, *LATCHED)
            if rested:  # only a person's clear and arm lead on
                self._arm()
            rested |= self._start(seed)
            ended = self._segment > 0
            self._end_segment()
            if self.auto_reset and ((ended and self._outcome.reset) or (rested and not self.task.from_rest)):
                self._recover()
        except BaseException:
            self.robot.stop()
            raise
        self._outcome, self._segment = GENTLE, 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One control tick: gate, write, wait, read. info holds `executed`, `gate`, `faults` and events."""
        try:
            outcome, info = self._tick(np.asarray(action, np.float64), self.source)
        except BaseException:
            self.robot.stop()  # whatever fails, the motors stop first
            raise
        return self._observe(), outcome.reward, outcome.terminated, outcome.truncated, info

    def close(self) -> None:
        """End the open segment and let go of the robot."""
        if not self._open:
            return
        self._open = False
        self.robot.stop()
        try:
            self._end_segment()
        finally:  # an observer may fail, too
            self.robot.close()

    def _start(self, seed: int | None) -> bool:
        """Begin the stream where that is due; whether it was, and the robot rests."""
        first = not self._open
        if first:
            self.robot.open()
            self._open = True
        if isinstance(self.robot, Twin) and (first or seed is not None):  # a real robot is carried there
            self._end_segment()
            self.robot.place(self.task.start)
            self._progress, self._outcome = None, GENTLE
        begins = self._progress is None
        if begins:
            self.rate.restart()
            self.reading = self.robot.read()
            self._arm("arm")
            self._progress = self.task.begin(self.reading)
            self.action = self.task.rest
        return begins

    def _arm(self, *events: str) -> None:
        """Stand still until the gate is armed. Raises SafetyError naming what keeps it from that."""
        for _ in range(math.ceil(ARM_S * self.task.spec.hz)):
            self.reading = self._read()
            command, state, _ = self.gate.step(self.robot.now(), self.reading, None, (*self.events(), *events))
            if state != DISARMED:
                break
            self.robot.write(command)
            self.rate.wait()
        self._refuse_when_still()

    def _read(self) -> Reading:
        """The newest reading. A value that no sensor gives did not come: the one before it stands, and ages."""
        new, old = self.robot.read(), self.reading
        if not (np.abs(np.concatenate([new.values[name] for name in self._ranges])) <= self._range).all():
            for name, largest in self._ranges.items():
                if not (np.abs(new.values[name]) <= largest).all():
                    new.values[name], new.stamps[name] = old.values[name], old.stamps[name]
        return new

    def _tick(self, wish: np.ndarray, source: str) -> tuple[Outcome, dict[str, Any]]:
        now, reading = self.robot.now(), self.reading
        command, state, faults = self.gate.step(now, reading, wish, self.events())
        self.robot.write(command)
        self.action = self.command.to_action(command)
        self.rate.wait()
        self.reading = self._read()
        outcome = self.task.advance(self._progress, self.action, self.reading)
        self._segment += 1
        if source == "reset":  # a reset is not judged
            outcome = Outcome(outcome.reward, False, False, outcome.events)
        else:
            over = self._segment >= self._limit or state in LATCHED
            truncated = not outcome.terminated and (outcome.truncated or over)
            self._outcome = outcome = replace(outcome, truncated=truncated)
        events = outcome.events | {f"gate_{fault}": 1.0 for fault in faults}
        self._emit(now, reading, self.action, replace(outcome, events=events), source)
        return outcome, {"executed": self.action, "gate": state, "faults": faults, **outcome.events}

    def _end_segment(self, events: dict[str, float] | None = None) -> None:
        if self._segment or events:
            self._emit(self.robot.now(), self.reading, None, replace(GENTLE, events=events or {}), self.source)
        self._segment = 0

    def _recover(self) -> None:
        recovery = self.task.recover(self.reading, self._outcome)
        events: dict[str, float] = {"reset": 1.0}
        while True:
            if recovery.needs_hand:
                events["intervention"] = 1.0
                if isinstance(self.robot, Twin):  # only a twin is set on its wheels; a real robot waits
                    self.robot.stop()
                    self.robot.place(self.task.spot(self.reading))
                    self.reading = self.robot.read()
                    self.gate.placed()
                    self.gate.step(self.robot.now(), self.reading, None)  # begin from rest
                    break
            wish = recovery.wish(self.reading)
            if wish is None:
                break
            self._tick(wish, "reset")
            self._refuse_when_still()
        self._end_segment(events)

    def _refuse_when_still(self) -> None:
        if self.gate.state in (DISARMED, *LATCHED):
            why = ", ".join(self.gate.cause) or "nothing is wrong now"
            raise SafetyError(f"the gate is {self.gate.state} ({why}): make the robot safe, then clear and arm it")

    def _observe(self) -> np.ndarray:
        return self.task.observe(self._progress, self.reading, self.action)
