"""From records to what a learner trains on: the fold that gives a stream of readings its meaning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .record import Record
from .safety import CLAMPS
from .task import Outcome, Task

TAKEOVER = "takeover"
TRAINED_SOURCES = ("policy", TAKEOVER, "teacher")
_LOW, _HIGH = np.float32(-1.0), np.float32(1.0)
BOX_TOLERANCE = 1e-4  # an action this far outside [-1, 1] is rounding


class Sample(NamedTuple):
    """One step as the learner stores it; `action` None is the observation that ends a segment."""

    obs: np.ndarray  # (o,) float32
    prev_action: np.ndarray  # (a,) float32, in [-1, 1]
    action: np.ndarray | None  # (a,) float32, in [-1, 1]
    reward: float
    terminated: bool
    truncated: bool
    train: bool  # False where the gate held the robot, where the command left the action box, for resets (law 5)
    part: int = 0  # of its stream, rises where records are lost: samples of two parts are never paired
    takeover: bool = False  # a person drove


class Fold:
    """Turns the records of one stream, in order, into samples of a task.

    With `relabel` the reward and the termination are computed again by the task (a recording made for
    another task, or before there was one); otherwise they are the recorded ones. With `takeover_reward` the step
    before a takeover begins has that reward, and every other step none (RLIF, systems.md 7).
    """

    def __init__(self, task: Task, relabel: bool = False, takeover_reward: float | None = None) -> None:
        self._task, self._relabel, self._takeover_reward = task, relabel, takeover_reward
        self.waits = relabel or takeover_reward is not None  # a step is complete when the record after it is there
        self._progress: Any = None
        self._action, self._boxed = task.rest, _boxed(task.rest)[0]  # executed before, and that within [-1, 1]
        self._pending: Sample | None = None
        self._part = 0
        self._last: Record | None = None  # the record before

    def push(self, record: Record) -> list[Sample]:
        """The samples that `record` completes: itself, or where that `waits` the one before it."""
        outcome = None
        last, self._last = self._last, record
        lost = last is not None and last.seq != record.seq - 1
        out = self.close() if lost else []
        if lost:  # what was done, and with it what came of it, is not known: begin anew
            self._part, self._progress = self._part + 1, None
            self._action, self._boxed = self._task.rest, _boxed(self._task.rest)[0]
        if self._progress is None:
            self._progress = self._task.begin(record.reading)
        elif last is not None and last.action is not None:  # time has passed
            outcome = self._task.advance(self._progress, self._action, record.reading)
        before, action, inside = self._boxed, None, False
        obs = self._task.observe(self._progress, record.reading, self._action)
        if record.action is not None:
            self._action = record.action
            action, inside = _boxed(record.action)
            self._boxed = action
        vetoed = any(name.startswith("gate_") and name[5:] not in CLAMPS for name in record.events)
        train = inside and not lost and not vetoed and record.source in TRAINED_SOURCES
        ended = record.terminated, record.truncated
        takeover = record.source == TAKEOVER
        sample = Sample(obs, before, action, record.reward, *ended, train, self._part, takeover)
        if not self.waits:
            return [sample]
        done, self._pending = self._pending, sample if action is not None else None
        if done is not None:
            out.append(self._complete(done, outcome, action is not None and takeover))
            if (out[-1].terminated or out[-1].truncated) and action is not None:
                out.append(sample._replace(action=None, train=False))  # the task ends, though the recording goes on
        if action is None:
            out.append(sample)
        return out

    def _complete(self, done: Sample, outcome: Outcome | None, takeover: bool) -> Sample:
        """The sample before, after whose step `outcome` was found; `takeover`: a person drives on."""
        if self._relabel and outcome is not None:
            ended = outcome.terminated, outcome.truncated
            done = done._replace(reward=outcome.reward, terminated=ended[0], truncated=ended[1])
        if self._takeover_reward is not None:
            done = done._replace(reward=self._takeover_reward if takeover and not done.takeover else 0.0)
        return done

    def close(self) -> list[Sample]:
        """The end of a recording that was cut short: its last observation closes the segment."""
        pending, self._pending = self._pending, None
        return [] if pending is None else [pending._replace(action=None, train=False)]


def _boxed(action: np.ndarray) -> tuple[np.ndarray, bool]:
    """An action within [-1, 1], and whether it was there but for rounding. Lists: NumPy is slow on a few numbers."""
    furthest = max(map(abs, action.tolist()))
    return (action if furthest <= 1.0 else action.clip(_LOW, _HIGH)), furthest <= 1.0 + BOX_TOLERANCE


def samples(task: Task, records: Iterable[Record], takeover_reward: float | None = None) -> Iterator[Sample]:
    """The samples of a recording under `task`: reward and termination computed again where it can."""
    fold = Fold(task, task.relabels, takeover_reward)
    for record in records:
        yield from fold.push(record)
    yield from fold.close()
