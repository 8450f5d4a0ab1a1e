"""The actor: read, act, gate, write, wait, record. It never waits for the network, the disk or the learner.

(In the twin it does wait, between steps, for the learner's `run_until`: simulated time costs nothing.)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import numpy as np

from ..drivers.base import DriverError, Twin
from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.record import Record, encode
from . import catalog
from .evaluate import practise
from .folder import stream_meta
from .onboard import Policy
from .transport import ActorLink
from .wire import WireError

STATUS_EVERY_S = 0.5
LEARNER_WAIT_S = 60.0  # a learner that is being started takes a while to answer


@dataclass
class Stop:
    """Set by SIGINT, SIGTERM, the learner or the end of `parent`; looked at between steps."""

    reason: str = ""
    parent: int | None = None  # process id of the `tether run` that this actor must not outlive

    def install(self) -> Callable[[], None]:
        """Take over SIGINT and SIGTERM: the first asks for a clean end, a second one ends at once.

        Returns what gives them back. Does nothing outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return lambda: None

        def ask(number: int, frame: Any) -> None:
            if self.reason:
                raise KeyboardInterrupt
            self.reason = signal.Signals(number).name

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}

        def give_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return give_back


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

    def wait(self, link: ActorLink, stop: Stop) -> None:
        """Wait for the first weights: nothing moves before."""
        while not _asked(stop, link):
            newest = link.weights(0.5)
            if newest is not None:
                return self.take(*newest)

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
        while lockstep and not link.wait_run_until(steps + 1, timeout=0.5) and not _asked(stop, link):
            pass
        if _asked(stop, link) and record.source == "reset":
            raise Stopped

    def wish(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        newest = link.weights()
        if newest is not None:
            pilot.take(*newest)
            env.version = pilot.version
        return None if _asked(stop, link) else pilot.act(obs, prev_action, steps)

    env.on_record.append(send)
    env.version = pilot.version
    with suppress(Stopped):
        practise(env, wish, seed)
    return steps


def serve(
    address: str, task: str | None = None, real: bool = False, seed: int | None = None,
    realtime: bool = False, view: bool = False, parent: int | None = None,
) -> str:
    """One actor: ask the learner what there is to do, drive until told to stop. Returns what to say of it.

    Raises WireError, DriverError or TaskError with one line when it cannot begin.
    """
    stop = Stop(parent=parent)
    stop.install()
    link = ActorLink(address)
    try:
        orders = link.start(LEARNER_WAIT_S, on_wait=lambda: _give_up(stop, link))
        spec = catalog.spec_of(str(orders["task"]), str(orders["name"]))
        if task is not None and catalog.load_spec(task).text != spec.text:
            raise WireError(f"the learner at {address} trains {spec.name!r}, not {task!r}; leave the task out")
        seed = int(orders["seed"]) if seed is None else seed
        env = catalog.make_env(catalog.make_task(spec), real, seed, realtime)
        if isinstance(env, RobotEnv):
            env.auto_reset = bool(orders["auto_reset"])
        if view:
            start_view(env)
        link.begin(stream_meta(spec))
        pilot = Pilot(orders["policy"], seed, int(orders["random_steps"]))
        pilot.wait(link, stop)
        lockstep = not (real or realtime)
        steps = act(env, link, pilot, lockstep, stop, seed, Status(env, link))
    finally:
        left = link.close()
        if left:
            print(f"actor: {left} records were not delivered", file=sys.stderr)
    return f"actor: {steps:,} steps, stopped: {stop.reason}"


def start_view(env: RobotEnv | GymEnv) -> None:
    """Open MuJoCo's viewer on a twin. Raises DriverError where there is no display or no twin."""
    robot = getattr(env, "robot", None)
    if not isinstance(robot, Twin):
        raise DriverError("--view shows twins; this is not one")
    viewer = resolve_name("tether.sim.render:view")(robot)
    env.on_record.append(lambda record: viewer.sync())


class Status:
    """Tells the learner, now and then, how the loop does."""

    def __init__(self, env: RobotEnv | GymEnv, link: ActorLink) -> None:
        self._env, self._link = env, link
        self._due, self._steps, self._since = 0.0, 0, time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        self._steps += 1
        if now < self._due:
            return
        self._due = now + STATUS_EVERY_S
        stats = {"rate/hz": self._steps / max(now - self._since, 1e-6)}
        if isinstance(self._env, RobotEnv):
            late = self._env.rate.lateness_ms()
            stats |= {"rate/late": self._env.rate.late} | {f"rate/late_{k}_ms": v for k, v in late.items()}
            for fault, count in self._env.gate.counts.items():
                clamp = fault in ("limit", "rate")
                key = "gate/clamped" if clamp else f"gate/veto_{fault}"
                stats[key] = stats.get(key, 0) + count
        self._steps, self._since = 0, now
        self._link.report(stats)


def _give_up(stop: Stop, link: ActorLink) -> None:
    if _asked(stop, link):
        raise WireError("stopped before a learner answered")


def _asked(stop: Stop, link: ActorLink) -> bool:
    if link.stopped and not stop.reason:
        stop.reason = f"the learner said stop: {link.stopped}"
    if stop.parent is not None and os.getppid() != stop.parent and not stop.reason:
        stop.reason = "the run it belongs to is gone"
    return bool(stop.reason)
