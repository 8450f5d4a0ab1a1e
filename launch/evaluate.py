"""Driving without exploration and counting what matters: laps, contacts, returns, latency. No JAX here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..drivers.base import Robot, Twin
from ..robot_env.course import Course
from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.pursuit import LOOKAHEADS, SPEEDS, Pursuit
from ..robot_env.record import Record
from ..robot_env.task import TaskError

Driver = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (observation, previous action) -> action
SLOWEST_MPS = 0.2  # laps that take longer than at this speed are given up; a dog walks at twice that or more
TUNE_LAPS = 3  # clean ones that a tuned pursuit must drive


@dataclass
class Episodes:
    """What the records of one stream, in order, say of its laps and episodes."""

    seq: int = 0  # of the newest record
    steps: int = 0
    resets: int = 0
    interventions: int = 0
    falls: int = 0
    _episode: list[Record] = field(default_factory=list)  # its steps so far, without those of resets

    def push(self, record: Record) -> dict[str, float]:
        """`env/...` metrics that this record completes."""
        self.seq = record.seq
        out: dict[str, float] = {}
        if "lap_time_s" in record.events:
            out["env/lap_time_s"] = record.events["lap_time_s"]
            out["env/lap_clean"] = record.events.get("lap_clean", 1.0)
        if record.action is not None:
            self.steps += 1
            self.falls += "fall" in record.events and record.source != "reset"
            if record.source != "reset":
                self._episode.append(record)
            return out
        self.resets += int(record.events.get("reset", 0))
        self.interventions += int(record.events.get("intervention", 0))
        if self._episode:
            out |= {
                "env/episode_return": sum(step.reward for step in self._episode),
                "env/episode_length": len(self._episode),
                "env/success": _succeeded(self._episode[-1]),
                "env/takeovers": float(np.mean([step.source == "takeover" for step in self._episode])),
            }
            speeds = [step.reading.values["velocity"][0] for step in self._episode if "velocity" in step.reading.values]
            out |= {"env/speed_mps": float(np.mean(speeds))} if speeds else {}
            out |= {"env/falls": self.falls} if self.falls else {}
        self._episode.clear()
        return out | {"env/resets": self.resets, "env/interventions": self.interventions}


def _succeeded(last: Record) -> float:
    """Of an episode's last step: where there is something to be done, whether it was; else whether it went on."""
    return float(last.events["progress"] >= 1.0 if "progress" in last.events else not last.terminated)


class Tally:
    """What a drive was like, from the records of its environment."""

    def __init__(self, env: RobotEnv | GymEnv) -> None:
        self.env = env
        self.episodes = Episodes()
        self.returns: list[float] = []
        self.successes: list[float] = []
        self.policy_ms: list[float] = []
        self.laps: list[float] = []
        self.cycles: list[float] = []  # s, of the episodes that succeeded
        self.contacts: int | None = None  # with walls, as the twin knows them (law 13); on hardware nobody does
        self._astray: float | None = None  # m, at most, from where the robot believes that it is; likewise
        self._clean: list[bool] = []
        self._moved: list[tuple[float, float]] = []  # m forward, and s it took, in the steps of episodes
        self._before: tuple[float, dict[str, float]] | None = None  # time and truth after the step before
        self._contacts_before: int | None = None  # this lap
        env.on_record.append(self._see)

    @property
    def median_s(self) -> float | None:
        """The median lap time."""
        return round(float(np.median(self.laps)), 3) if self.laps else None

    @property
    def cycle_s(self) -> float | None:
        """The mean time that a success took."""
        return round(float(np.mean(self.cycles)), 3) if self.cycles else None

    def report(self) -> dict[str, Any]:
        """The keys of DESIGN's `eval` and `drive`, once the environment is closed."""
        p50, p99, worst = np.percentile(self.policy_ms, [50, 99, 100]).round(4).tolist()
        out: dict[str, Any] = {
            "task": self.env.task.spec.name, "episodes": len(self.returns), "steps": self.episodes.steps,
            "return_mean": float(np.mean(self.returns)), "returns": self.returns,
            "success_rate": float(np.mean(self.successes)), "policy_ms": {"p50": p50, "p99": p99, "max": worst},
            "late": self.env.rate.late if isinstance(self.env, RobotEnv) else 0,
        }  # fmt: skip
        if isinstance(self.env, RobotEnv):
            ahead, seconds = np.sum([(0.0, 1e-9), *self._moved], axis=0)
            out |= {"speed_mps": round(float(ahead / seconds), 3), "falls": self.episodes.falls,
                    "interventions": self.episodes.interventions}  # fmt: skip
        if self.env.task.spec.kind == "manipulate":
            out["cycle_s"] = self.cycle_s
        if isinstance(self.env.task, Course):
            rows = (len(list(row)) for clean, row in itertools.groupby(self._clean) if clean)
            out |= {
                "laps": len(self.laps), "clean_laps": max(rows, default=0), "contacts": self.contacts,
                "pose_error_m": None if self._astray is None else round(self._astray, 3),
                "lap_time_s": {"median": self.median_s, "best": min(self.laps, default=None), "all": self.laps},
            }  # fmt: skip
        return out

    def _see(self, record: Record) -> None:
        found = self.episodes.push(record)
        if isinstance(self.env, RobotEnv):
            self._move(self.env.robot, record)
        if "env/lap_time_s" in found:
            self.laps.append(round(found["env/lap_time_s"], 3))
            self._clean.append(bool(found["env/lap_clean"]) and self.contacts == self._contacts_before)
        if "lap_started" in record.events:
            self._contacts_before = self.contacts
        if "env/episode_return" in found:
            self.returns.append(found["env/episode_return"])
            self.successes.append(found["env/success"])
            if found["env/success"]:
                self.cycles.append(found["env/episode_length"] / self.env.task.spec.hz)

    def _move(self, robot: Robot, record: Record) -> None:
        """How far this step went: by what a twin knows, where it went; else by what was measured."""
        step = record.action is not None and record.source != "reset"
        if not isinstance(robot, Twin):
            if step and "velocity" in record.reading.values:
                self._moved.append((float(record.reading.values["velocity"][0]), 1.0))
            return
        now, here = robot.now(), robot.truth()
        self.contacts = int(here["contacts"])
        if isinstance(self.env.task, Course):
            believed = self.env.reading.values["pose"][:2]
            self._astray = max(self._astray or 0.0, math.dist(believed, (here["x"], here["y"])))
        if step and self._before:  # not the first of an episode: before it a twin may have been placed
            then, there = self._before
            x, y = here["x"] - there["x"], here["y"] - there["y"]
            self._moved.append((x * math.cos(there["heading"]) + y * math.sin(there["heading"]), now - then))
        self._before = (now, here) if step else None


def practise(env: RobotEnv | GymEnv, wish: Callable[..., np.ndarray | None], seed: int | None = None) -> None:
    """Drive by `wish(observation, previous action)`, resetting in between, until it returns None; then close."""
    try:
        obs, _ = env.reset(seed=seed)
        while (action := wish(obs, env.action)) is not None:
            obs, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                obs, _ = env.reset()
    finally:
        env.close()


def drive(
    env: RobotEnv | GymEnv, driver: Driver, laps: int | None = None, episodes: int | None = None,
    steps: int | None = None, seed: int | None = None,
) -> dict[str, Any]:
    """Drive until so many laps, episodes or steps are done, whichever comes first, and close the environment.

    Returns the keys of DESIGN's `eval` and `drive`.
    """
    tally = Tally(env)
    limit = steps or np.inf
    if laps is not None and isinstance(env.task, Course):
        limit = min(limit, patience(env.task, laps))

    def wish(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        done = len(tally.laps) >= (laps or np.inf) or len(tally.returns) >= (episodes or np.inf)
        if done or tally.episodes.steps >= limit:
            return None
        start = time.perf_counter()
        action = driver(obs, prev_action)
        tally.policy_ms.append(1e3 * (time.perf_counter() - start))
        return action

    practise(env, wish, seed)
    return tally.report()


def patience(course: Course, laps: int) -> float:
    """Ticks after which so many laps, and one to begin with, are given up."""
    return (laps + 1) * course.line.length / SLOWEST_MPS * course.spec.hz


def pursuit(env: RobotEnv, speed_mps: float, lookahead_m: float) -> Driver:
    """Pure pursuit as a driver: it looks at the newest reading, through the same sensors and gate."""
    assert isinstance(env.task, Course)
    follow = Pursuit(env.task.line, speed_mps, lookahead_m)
    return lambda obs, prev: env.command.to_action(np.array(follow.act(env.reading.values["pose"])))


def tune(make_env: Callable[[], RobotEnv], say: Callable[[str], None]) -> dict[str, Any]:
    """The fastest pure pursuit on the grid that drives 3 clean laps, by its median lap, and the whole grid.

    Raises TaskError where none does.
    """
    grid: list[dict[str, Any]] = []
    for lookahead, speed in itertools.product(LOOKAHEADS, SPEEDS):
        env = make_env()
        found = drive(env, pursuit(env, speed, lookahead), laps=TUNE_LAPS)
        clean, median = found["clean_laps"] >= TUNE_LAPS, found["lap_time_s"]["median"]
        grid.append({"speed_mps": speed, "lookahead_m": lookahead, "clean": clean, "lap_time_s": median})
        say(f"speed {speed:.2f} m/s, look-ahead {lookahead:.1f} m: {'clean' if clean else 'not clean'}, {median}")
    fit = [row for row in grid if row["clean"]]
    if not fit:
        raise TaskError(f"no pure pursuit on the grid drives {TUNE_LAPS} clean laps; widen the course")
    return {"best": min(fit, key=lambda row: row["lap_time_s"]), "grid": grid}
