"""The course: checkpoints in order, reward towards the next one, laps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..drivers.base import Channel, Command, Reading
from .fit import check_channels
from .task import Batch, Body, Observer, Outcome, Recovery, TaskError, TaskSpec
from .track import STEP_M, Line, resample, walls

GOAL_SCALE_M = 5.0  # divides the distance to the checkpoint in the observation
# Places on the course's line this far ahead, in the body frame: what FastRLAP's camera sees of the way, from
# the map alone. Without it the policy must learn the map by heart.
PREVIEW_M = (0.5, 1.0, 2.0, 3.0, 4.0)
PREVIEW_SCALE_M = 2.0
SPARSE_M = 1.0  # points of a centre line further apart than this are joined by straight lines
HINDSIGHT_M = 4.0  # spread of goals drawn around the car, FastRLAP hindsight.py


@dataclass
class Progress:
    """Where a stream of readings stands on the course. Moved by `Course.advance` alone."""

    goal: int
    body: Any  # what the body remembers
    lap_started: float | None = None  # stamp of the pose that began the lap
    lap_clean: bool = True  # no trouble since then


class Course:
    """A `Task` of kind "course" for a robot that reads pose and velocity."""

    relabels = True

    def __init__(self, spec: TaskSpec, channels: tuple[Channel, ...], command: Command, body: Body) -> None:
        check_channels(spec, channels, ("pose", "velocity", *body.needs))
        if spec.hindsight and not body.pays_speed:
            raise TaskError(f"{spec.name}: task.hindsight must be 0: {spec.robot} is not rewarded by its speed alone")
        self.spec, self._body, self.from_rest = spec, body, body.from_rest
        self._observer = Observer(channels)
        self._goals = np.array([c.at[:2] for c in spec.checkpoints])  # (k, 2)
        self._radii = np.array([c.radius_m for c in spec.checkpoints])
        points = np.asarray(spec.course.centerline) if spec.course.centerline else self._goals
        # a smooth line, without a centre line through the checkpoints
        if spec.course.centerline and np.linalg.norm(np.diff(points, axis=0), axis=1).max() > SPARSE_M:
            straight = Line(points, spec.course.loop)  # as the walls are: a curve would leave them
            points = straight.at(np.arange(0.0, straight.length, STEP_M))
        self.line = Line(resample(points, STEP_M, spec.course.loop), spec.course.loop)
        self.start = (*map(float, self.line.at(0.0)), float(self.line.heading(0.0)))
        self._goal_s = np.array([self.line.project(g)[0] for g in self._goals])
        self.rest = command.to_action(np.asarray(command.safe))
        self.observation_size = self._observer.size + 3 + 2 * len(PREVIEW_M) + command.size

    def walls(self) -> list[np.ndarray]:
        """Closed polylines (k, 2) in m around the free way; none on an open floor."""
        course = self.spec.course
        return walls(np.asarray(course.centerline), course.width_m, course.loop) if course.centerline else []

    def begin(self, reading: Reading) -> Progress:
        """The goal is the first checkpoint ahead along the course."""
        s, _ = self.line.project(reading.values["pose"][:2])
        ahead = (self._goal_s - s) % self.line.length
        ahead[np.linalg.norm(self._goals - reading.values["pose"][:2], axis=1) < self._radii] = np.inf
        return Progress(int(np.argmin(ahead)), self._body.begin())

    def observe(self, progress: Progress, reading: Reading, action: np.ndarray) -> np.ndarray:
        """Channels; checkpoint in the body frame (unit x, unit y, distance); the way ahead; previous action."""
        x, y, c, s = reading.values["pose"].tolist()
        along, _ = self.line.project((x, y))
        ahead = self.line.at(along + np.asarray(PREVIEW_M)) - (x, y)
        ahead = ahead @ np.array([[c, -s], [s, c]]) / PREVIEW_SCALE_M
        goal = self._to_goal(progress, reading)
        parts = (self._observer(reading), goal, ahead.ravel(), np.minimum(np.maximum(action, -1.0), 1.0))
        return np.concatenate(parts).astype(np.float32)

    def advance(self, progress: Progress, action: np.ndarray, reading: Reading) -> Outcome:
        """The body's reward for going towards the checkpoint.

        Computed on the newer reading with the checkpoint that was pursued.
        """
        events: dict[str, float] = {}
        ahead, left, distance = self._to_goal(progress, reading)
        trouble = self._body.trouble(progress.body, reading)
        if trouble:
            events[trouble] = 1.0
            progress.lap_clean = False
        if distance * GOAL_SCALE_M < self._radii[progress.goal]:
            self._reach(progress, reading, events)
        reward, ended = self._body.reward(reading, ahead, left, trouble), trouble in self._body.terminal
        return Outcome(reward, ended, bool(trouble) and not ended, events, reset=bool(trouble))

    def recover(self, reading: Reading, outcome: Outcome) -> Recovery:
        """The body's own, along the line."""
        return self._body.recover(
            outcome.events, self.line, self.spec.course.width_m or 2.0 * float(self._radii.min())
        )

    def spot(self, reading: Reading) -> tuple[float, float, float]:
        """Where a hand would set the robot down: on the line, facing along it."""
        s, _ = self.line.project(reading.values["pose"][:2])
        return (*map(float, self.line.at(s)), float(self.line.heading(s)))  # type: ignore[return-value]

    def in_hindsight(self, batch: Batch, future: np.ndarray, rng: np.random.Generator) -> Batch:
        """FastRLAP's relabelling (hindsight.py): half of the new goals are places the car came to later
        (`future`, (n, o) observations), half lie around it, N(0, 4^2) m. One-step batches only."""
        n = len(future)
        here, there = (self._decode(batch[name]) for name in ("obs", "next_obs"))
        later = rng.random((n, 1)) < 0.5
        around = here[0][:, :2] + rng.normal(0.0, HINDSIGHT_M, (n, 2))
        drawn = np.where(later, self._decode(future)[0][:, :2], around)
        chosen = rng.random(n) < self.spec.hindsight
        out = {name: values.copy() for name, values in batch.items()}
        at = slice(self._observer.size, self._observer.size + 3)
        # not the goal of next_obs: where a checkpoint was reached, that is already the one after it
        old = _relative(there[0], _goals(here[0], batch["obs"][:, at]))[:, :2]
        for name, (pose, _) in (("obs", here), ("next_obs", there)):
            out[name][chosen, at] = _relative(pose, drawn)[chosen]
        new = _relative(there[0], drawn)[:, :2]
        out["reward"] += np.where(chosen, (there[1] * (new - old)).sum(1), 0.0)
        return out

    def _decode(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, 4) pose and (n, 2) velocity of (n, o) observations."""
        raw = obs[:, : self._observer.size] * self._observer.scale
        return raw[:, self._observer.places["pose"]], raw[:, self._observer.places["velocity"]]

    def _to_goal(self, progress: Progress, reading: Reading) -> tuple[float, float, float]:
        """`_relative` of one pose; on so few numbers NumPy takes ten times as long."""
        x, y, c, s = reading.values["pose"].tolist()
        to_x, to_y = (self._goals[progress.goal] - (x, y)).tolist()
        distance = math.hypot(to_x, to_y)
        scale = 1.0 / max(distance * math.hypot(c, s), 1e-6)
        return (c * to_x + s * to_y) * scale, (c * to_y - s * to_x) * scale, distance / GOAL_SCALE_M

    def _reach(self, progress: Progress, reading: Reading, events: dict[str, float]) -> None:
        if progress.goal == 0:
            stamp = reading.stamps["pose"]
            if progress.lap_started is not None:
                events["lap_time_s"] = stamp - progress.lap_started
                events["lap_clean"] = float(progress.lap_clean)
            events["lap_started"] = 1.0
            progress.lap_started, progress.lap_clean = stamp, True
        progress.goal = (progress.goal + 1) % len(self._goals)


def _goals(pose: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """(n, 2) goals of (n, 4) poses and what `_relative` gave for them."""
    c, s = (pose[:, 2:] / np.maximum(np.hypot(pose[:, 2], pose[:, 3]), 1e-6)[:, None]).T
    ahead, left = (relative[:, :2] * relative[:, 2:] * GOAL_SCALE_M).T
    return pose[:, :2] + np.stack([c * ahead - s * left, s * ahead + c * left], axis=1)


def _relative(pose: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """(n, 3) unit x, unit y and scaled distance of (n, 2) goals in the body frame of (n, 4) poses."""
    delta = goals - pose[:, :2]
    c, s = pose[:, 2], pose[:, 3]
    distance = np.hypot(delta[:, 0], delta[:, 1])
    scale = 1.0 / np.maximum(distance * np.hypot(c, s), 1e-6)
    ahead, left = c * delta[:, 0] + s * delta[:, 1], c * delta[:, 1] - s * delta[:, 0]
    return np.stack([ahead * scale, left * scale, distance / GOAL_SCALE_M], axis=1)
