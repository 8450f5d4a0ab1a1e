"""Learning without a network: records go in, in order; updates, metrics and snapshots come out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..agents import snapshot
from ..agents.replay import Replay, symmetric
from ..robot_env.record import Record
from ..robot_env.sample import Fold, samples
from ..robot_env.task import Task
from . import catalog
from .config import Config


@dataclass
class Episodes:
    """What the metrics say of one stream: returns, laps, resets, interventions."""

    resets: int = 0
    interventions: int = 0
    takeovers: int = 0
    steps: int = 0
    _return: float = 0.0
    _length: int = 0
    _failed: bool = False

    def push(self, record: Record) -> dict[str, float]:
        """`env/...` values that this record completes."""
        out: dict[str, float] = {}
        if "lap_time_s" in record.events:
            out["env/lap_time_s"] = record.events["lap_time_s"]
            out["env/lap_clean"] = record.events.get("lap_clean", 1.0)
        if record.action is not None:
            self.steps += 1
            self.takeovers += record.source == "takeover"
            if record.source != "reset":
                self._return += record.reward
                self._length += 1
                self._failed |= record.terminated
            return out
        self.resets += int(record.events.get("reset", 0))
        self.interventions += int(record.events.get("intervention", 0))
        if self._length:
            out |= {
                "env/episode_return": self._return,
                "env/episode_length": self._length,
                "env/success": float(not self._failed),
                "env/takeovers": self.takeovers / max(self.steps, 1),
            }
        out |= {"env/resets": self.resets, "env/interventions": self.interventions}
        self._return, self._length, self._failed = 0.0, 0, False
        return out


@dataclass
class _Stream:
    fold: Fold
    episodes: Episodes = field(default_factory=Episodes)


class Trainer:
    """The learner's state and what moves it.

    `push` inserts one record and makes the updates of that step, on exactly the records so far: the same
    seed and records give the same weights.
    """

    def __init__(self, task: Task, config: Config, seed: int, prior: Iterable[Iterable[Record]] = ()) -> None:
        self.task, self.config = task, config
        module = catalog.algorithm(config.algorithm)
        self._algorithm = module
        self.agent = module.Config(**config.agent)
        size, actions = task.observation_size, len(task.rest)
        make = lambda capacity: Replay(capacity, size, actions, self.agent.n_step, self.agent.gamma)  # noqa: E731
        self.replay = make(config.learner.replay_capacity)
        self.prior = make(config.learner.replay_capacity)
        for i, records in enumerate(prior):
            self._add_prior(f"prior{i}", records)
        self._key, init_key = jax.random.split(jax.random.key(seed))
        self.state = module.init(self.agent, init_key, size, actions)
        self._rng = np.random.default_rng(seed)
        self._streams: dict[str, _Stream] = {}
        self.steps = 0
        self.updates = 0
        self._metrics: Any = None

    @property
    def start_steps(self) -> int:
        """Steps before the first update; with prior data updates begin at once."""
        return 1 if len(self.prior) else self.config.learner.start_steps

    def push(self, stream: str, record: Record, train: bool = True) -> dict[str, float]:
        """Insert a record and make its step's updates. Returns the `env/...` metrics it completes."""
        if stream not in self._streams:
            self._streams[stream] = _Stream(Fold(self.task))
        entry = self._streams[stream]
        for sample in entry.fold.push(record):
            self.replay.add(stream, sample)
        if record.action is not None:
            self.steps += 1
            if train and self.steps >= self.start_steps and len(self.replay):
                self._update()
        return entry.episodes.push(record)
