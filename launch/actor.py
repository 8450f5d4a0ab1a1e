"""The actor: read, act, gate, write, wait, record. It never waits for the network, the disk or the learner.

(In the twin it does wait, between steps, for the learner's `run_until`: simulated time costs nothing.)
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.record import Record, encode
from .onboard import Policy
from .transport import ActorLink

STATUS_EVERY_S = 0.5


@dataclass
class Stop:
    """Set by SIGINT, SIGTERM or the learner; looked at between steps."""

    reason: str = ""

    def install(self) -> None:
        """Take over SIGINT and SIGTERM: the first asks for a clean end, a second one ends at once."""

        def ask(number: int, frame: Any) -> None:
            if self.reason:
                raise KeyboardInterrupt
            self.reason = signal.Signals(number).name

        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)


class Stopped(Exception):
    """Leaves a reset in the middle when a stop was asked for; never an error."""


class Pilot:
    """The policy that drives now: random until told otherwise, then the newest weights."""

    def __init__(self, spec: dict[str, Any], seed: int, random_steps: int) -> None:
        self._spec, self._random_steps = spec, random_steps
        self._rng = np.random.default_rng(seed)
        self._policy: Policy | None = None
        self.version = 0

    def take(self, version: int, params: dict[str, np.ndarray]) -> None:
        """Swap the weights; called between steps."""
        self._policy, self.version = Policy(self._spec, params), version

    def act(self, obs: np.ndarray, prev_action: np.ndarray, step: int) -> np.ndarray:
        """(a,) action with exploration."""
        if self._policy is None or step < self._random_steps:
            return random_action(self._spec, prev_action, self._rng)
        return self._policy.act(obs, prev_action, self._rng)


def random_action(spec: dict[str, Any], prev_action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform in the action box, or in the part of it the action-rate limit leaves."""
    delta = spec.get("max_delta")
    before = np.clip(prev_action, -1.0, 1.0)
    low, high = (before - delta, before + delta) if delta else (-1.0, 1.0)
    return rng.uniform(np.clip(low, -1, 1), np.clip(high, -1, 1), before.shape).astype(np.float32)


def act(
    env: RobotEnv | GymEnv, link: ActorLink, pilot: Pilot, lockstep: bool, stop: Stop, seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> int:
    """Drive until stopped. With `lockstep` (the twin) wait between steps for the learner. Returns steps."""
    steps = 0

    def send(record: Record) -> None:
        nonlocal steps
        link.send(record.seq, encode(record))
        steps += record.action is not None
        on_step()
        while lockstep and link.run_until <= steps and not _asked(stop, link):
            link.wait_run_until(steps + 1, timeout=0.5)
        if _asked(stop, link) and record.source == "reset":
            raise Stopped

    env.on_record.append(send)
    try:
        obs, _ = env.reset(seed=seed)
        while not _asked(stop, link):
            newest = link.weights()
            if newest is not None:
                pilot.take(*newest)
                env.version = pilot.version
            obs, _, terminated, truncated, _ = env.step(pilot.act(obs, env.action, steps))
            if terminated or truncated:
                obs, _ = env.reset()
    except Stopped:
        pass
    finally:
        env.close()
    return steps


def _asked(stop: Stop, link: ActorLink) -> bool:
    if link.stopped.is_set() and not stop.reason:
        stop.reason = "the learner said stop"
    return bool(stop.reason)
