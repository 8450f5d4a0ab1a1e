"""The actor: read, act, gate, write, wait, record. It never waits for the network, the disk or the learner.

(In the twin it does wait, between steps, for the learner's `run_until`: simulated time costs nothing.)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.record import Record, encode
from . import catalog
from .evaluate import practise
from .onboard import Policy
from .transport import ActorLink
from .wire import WireError

STATUS_EVERY_S = 0.5
LEARNER_WAIT_S = 60.0  # a learner that is being started takes a while to answer


@contextmanager
def stoppable(cause: Callable[[], str]) -> Iterator[Callable[[], str]]:
    """Gives `stopped()`, to be looked at between steps: why to end (SIGINT, SIGTERM or what `cause()` says), or "".

    Meanwhile a first signal asks for a clean end, and a second one ends at once.
    """
    asked: list[str] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0] if asked else cause()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Leave(Exception):
    """Leaves a reset, or the wait for the first weights, when a stop was asked for; never an error."""


class Pilot:
    """What drives an actor's environment: random for the first steps, then the newest weights, until `stopped()`.

    Sends every record to the learner; with `lockstep` (the twin) waits after each until it may go on.
    """

    def __init__(
        self, env: RobotEnv | GymEnv, link: ActorLink, stopped: Callable[[], str],
        policy: dict[str, Any], random_steps: int, seed: int, lockstep: bool,
    ) -> None:
        self._env, self._link, self._stopped, self._lockstep = env, link, stopped, lockstep
        self._spec, self._random_steps = policy, random_steps
        self._rng = np.random.default_rng(seed)
        self._policy: Policy | None = None
        self.steps = 0
        self._reported = 0, time.monotonic()  # steps and time at the last report
        env.on_record.append(self._send)

    def refresh(self, timeout: float = 0.0) -> bool:
        """Swap in the newest weights, between steps; False while there are none yet."""
        newest = self._link.weights(timeout)
        if newest is not None:
            self._env.version, params = newest
            self._policy = Policy(self._spec, params)
        return self._policy is not None

    def wish(self, obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        """(a,) action with exploration; None to end. At random: uniform in what the action-rate limit leaves."""
        self.refresh()
        if self._stopped():
            return None
        if self._policy is not None and self.steps >= self._random_steps:
            return self._policy.act(obs, prev_action, self._rng)
        before, delta = np.clip(prev_action, -1.0, 1.0), self._spec.get("max_delta") or 2.0
        low, high = np.maximum(before - delta, -1.0), np.minimum(before + delta, 1.0)
        return self._rng.uniform(low, high).astype(np.float32)

    def _send(self, record: Record) -> None:
        self._link.send(record.seq, encode(record))
        self.steps += record.action is not None
        self._report()
        while self._lockstep and not self._link.wait_run_until(self.steps + 1, timeout=0.5) and not self._stopped():
            pass
        if record.source == "reset" and self._stopped():
            raise Leave

    def _report(self) -> None:
        """Tell the learner, now and then, how the loop does."""
        (steps, then), now = self._reported, time.monotonic()
        if now - then < STATUS_EVERY_S:
            return
        self._reported = self.steps, now
        stats = {"rate/hz": (self.steps - steps) / (now - then)}
        if isinstance(self._env, RobotEnv):
            late = self._env.rate.lateness_ms()
            stats |= {"rate/late": self._env.rate.late} | {f"rate/late_{k}_ms": v for k, v in late.items()}
            for fault, count in self._env.gate.counts.items():
                key = "gate/clamped" if fault in ("limit", "rate") else f"gate/veto_{fault}"
                stats[key] = stats.get(key, 0) + count
        self._link.report(stats)


def serve(
    address: str, task: str | None = None, real: bool = False, seed: int | None = None,
    realtime: bool = False, view: bool = False, parent: int | None = None,
) -> str:
    """One actor: ask the learner what there is to do, drive until told to stop. Returns what to say of it.

    `parent`: process id of the `tether run` that it must not outlive. Raises WireError, DriverError or TaskError
    with one line when it cannot begin.
    """
    link = ActorLink(address)

    def cause() -> str:
        if parent is not None and os.getppid() != parent:
            return "the run it belongs to is gone"
        return f"the learner said stop: {link.stopped}" if link.stopped else ""

    try:
        orders = link.start(LEARNER_WAIT_S)
        with stoppable(cause) as stopped:
            spec = catalog.spec_of(str(orders["task"]), str(orders["name"]))
            if task is not None and catalog.load_spec(task).text != spec.text:
                raise WireError(f"the learner at {address} trains {spec.name!r}, not {task!r}; leave the task out")
            seed = int(orders["seed"]) if seed is None else seed
            env = catalog.make_env(catalog.make_task(spec), real, seed, realtime, view)
            if isinstance(env, RobotEnv):
                env.auto_reset = bool(orders["auto_reset"])
            link.begin(catalog.stream_meta(spec))
            print(f"actor: drives {spec.name} for the learner at {address}", file=sys.stderr)
            lockstep = not (real or realtime)
            pilot = Pilot(env, link, stopped, orders["policy"], int(orders["random_steps"]), seed, lockstep)
            with suppress(Leave):
                while not pilot.refresh(0.5):  # nothing moves before the first weights
                    if stopped():
                        raise Leave
                practise(env, pilot.wish, seed)
            return f"actor: {pilot.steps:,} steps, stopped: {stopped()}"
    finally:
        left = link.close()
        if left:
            print(f"actor: {left} records were not delivered", file=sys.stderr)
