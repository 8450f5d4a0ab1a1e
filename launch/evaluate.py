"""Driving without exploration and counting what matters: laps, contacts, returns, latency. No JAX here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..drivers.base import Reading, Twin
from ..robot_env.course import Course
from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.pursuit import LOOKAHEADS, SPEEDS, Pursuit

Driver = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (observation, previous action) -> action
SLOWEST_MPS = 0.4  # a lap that takes longer than at this speed is given up


@dataclass
class Tally:
    """What a drive was like. Contacts are the twin's own (law 13); on hardware they are not known."""

    steps: int = 0
    episodes: int = 0
    failed: int = 0
    returns: list[float] = field(default_factory=list)
    laps: list[float] = field(default_factory=list)
    clean: list[bool] = field(default_factory=list)
    policy_ms: list[float] = field(default_factory=list)
    contacts: int = 0
    resets: int = 0
    interventions: int = 0

    @property
    def clean_row(self) -> int:
        """Longest unbroken row of clean laps."""
        return max((len(list(g)) for ok, g in itertools.groupby(self.clean) if ok), default=0)

    def report(self, task: str, late: int, course: bool) -> dict[str, Any]:
        """The keys of DESIGN's `eval` and `drive`."""
        p50, p99, worst = np.percentile(self.policy_ms or [0.0], [50, 99, 100])
        out: dict[str, Any] = {
            "task": task,
            "episodes": self.episodes,
            "steps": self.steps,
            "return_mean": float(np.mean(self.returns)) if self.returns else 0.0,
            "success_rate": 1.0 - self.failed / max(self.episodes, 1),
            "policy_ms": {"p50": round(p50, 4), "p99": round(p99, 4), "max": round(worst, 4)},
            "late": late,
        }
        if course:
            times = {"median": _or_none(np.median, self.laps), "best": _or_none(np.min, self.laps)}
            out |= {
                "laps": len(self.laps),
                "clean_laps": self.clean_row,
                "contacts": self.contacts,
                "resets": self.resets,
                "interventions": self.interventions,
                "lap_time_s": {**times, "all": [round(t, 3) for t in self.laps]},
            }
        return out


def _or_none(statistic: Callable[[list[float]], Any], values: list[float]) -> float | None:
    return round(float(statistic(values)), 3) if values else None


class Watch:
    """Follows an environment's records into a Tally."""

    def __init__(self, env: RobotEnv | GymEnv) -> None:
        self.tally = Tally()
        self._robot = env.robot if isinstance(env, RobotEnv) else None
        self._lap_contacts = 0
        self._lap_clean = True
        env.on_record.append(self._see)

    def _see(self, record: Any) -> None:
        tally = self.tally
        tally.resets += int(record.events.get("reset", 0))
        tally.interventions += int(record.events.get("intervention", 0))
        tally.steps += record.action is not None
        if isinstance(self._robot, Twin):
            tally.contacts = int(self._robot.truth()["contacts"])
        if "lap_time_s" in record.events:
            tally.laps.append(float(record.events["lap_time_s"]))
            clean = tally.contacts == self._lap_contacts and bool(record.events.get("lap_clean", 1.0))
            tally.clean.append(clean)
        if "lap_started" in record.events:
            self._lap_contacts = tally.contacts


def drive(
    env: RobotEnv | GymEnv,
    driver: Driver,
    laps: int | None = None,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Drive until so many laps, episodes or steps are done, whichever comes first. The caller closes env."""
    watch = Watch(env)
    tally = watch.tally
    limit = steps
    if laps is not None and isinstance(env.task, Course):
        most = int((laps + 1) * env.task.line.length / SLOWEST_MPS * env.task.spec.hz)
        limit = most if limit is None else min(limit, most)
    obs, _ = env.reset(seed=seed)
    total = 0.0
    while True:
        start = time.perf_counter()
        action = driver(obs, env.action)
        tally.policy_ms.append(1e3 * (time.perf_counter() - start))
        obs, reward, terminated, truncated, _ = env.step(action)
        total += reward
        over = (laps is not None and len(tally.laps) >= laps) or (limit is not None and tally.steps >= limit)
        if terminated or truncated or over:
            tally.episodes += 1
            tally.failed += terminated
            tally.returns.append(total)
            total = 0.0
            progress(tally)
            if over or (episodes is not None and tally.episodes >= episodes):
                return tally
            obs, _ = env.reset()


class PursuitDriver:
    """Pure pursuit as a driver: it looks at the newest reading, through the same sensors and gate."""

    def __init__(self, env: RobotEnv, speed_mps: float, lookahead_m: float) -> None:
        assert isinstance(env.task, Course)
        self._env, self._command = env, env.robot.command
        self._pursuit = Pursuit(env.task.line, speed_mps, lookahead_m)

    def __call__(self, obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray:
        reading: Reading = self._env.reading
        return self._command.to_action(np.array(self._pursuit.act(reading.values["pose"])))


def tune(
    make_env: Callable[[], RobotEnv], laps: int = 3, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The fastest pure pursuit on the grid that drives `laps` clean laps. One environment a candidate.

    Fastest speed first at each look-ahead; the lap time is the median of its laps.
    """
    best: dict[str, Any] = {"lap_time_s": None}
    grid = []
    for lookahead, speed in itertools.product(LOOKAHEADS, SPEEDS):
        env = make_env()
        try:
            tally = drive(env, PursuitDriver(env, speed, lookahead), laps=laps)
        finally:
            env.close()
        ok = tally.clean_row >= laps
        median = float(np.median(tally.laps)) if tally.laps else None
        grid.append({"speed_mps": speed, "lookahead_m": lookahead, "clean": ok, "lap_time_s": median})
        progress(f"speed {speed:.2f} m/s, look-ahead {lookahead:.1f} m: {'clean' if ok else 'not clean'}, {median}")
        if ok and median is not None and (best["lap_time_s"] is None or median < best["lap_time_s"]):
            best = grid[-1]
    return {"best": best, "grid": grid}
