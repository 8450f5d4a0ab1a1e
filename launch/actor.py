"""The actor: read, act, gate, write, wait, record. It never waits for the network, the disk or the learner.

(In the twin it does wait, between steps, for the learner's `run_until`: simulated time costs nothing.)
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..robot_env.env import RobotEnv
from ..robot_env.gym_env import GymEnv
from ..robot_env.record import Record, encode
from ..robot_env.safety import CLAMPS
from ..robot_env.takeover import BY_HAND, Takeover, check
from . import catalog
from .evaluate import practise
from .flight import FlightRecorder
from .kept import Kept
from .onboard import BundleError, Policy
from .signals import stoppable
from .spool import Spool, hours, left_behind
from .teach import intervener
from .transport import ActorLink, NoLearner
from .wire import Params, WireError

SPOOL = "~/.local/state/tether/spool"
STATUS_EVERY_S = 0.5
LEARNER_WAIT_S = 60.0  # a learner that is being started takes a while to answer
ALONE_AFTER_S = 10.0  # the wait for it where there are weights to drive with
SILENT_S = 5.0  # without a word from the learner until it is told
PROBED = 16  # newest observations on which weights have to answer before they drive


def tell(text: str) -> None:
    """Say something without waiting for the terminal, which may hang: the loop goes on."""
    threading.Thread(target=os.write, args=(2, f"actor: {text}\n".encode()), daemon=True).start()


def noise_seed(seed: int, number: int) -> int:
    """Of the actor before which there were `number`: the same noise again would teach nothing new."""
    return seed + 1000 * number


class Leave(Exception):
    """Leaves a reset, or the wait for the first weights, when a stop was asked for; never an error."""


Seen = tuple[tuple[np.ndarray, np.ndarray], ...]  # observations, and the action before each


def probed(spec: dict[str, Any], params: Params, seen: Seen, current: Policy | None) -> tuple[Policy, float]:
    """The policy, and by how much its actions on `seen` differ from the current one's (mean; NaN without one).

    Raises WireError where it does not fit or gives an action that is none.
    """
    try:
        policy = Policy(spec, params)
    except BundleError as error:
        raise WireError(str(error)) from None
    seen = tuple(pair for pair in seen if np.isfinite(pair[0]).all())  # a broken sensor is not the weights' fault
    seen = seen or ((np.zeros(policy.observation_size), np.zeros(policy.action_size)),)
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):  # of what overflows only the outcome counts
        means = np.array([policy.act(*pair) for pair in seen])
        drawn = np.array([policy.act(*pair, rng) for pair in seen])
        before = np.array([current.act(*pair) for pair in seen]) if current else np.full(means.shape, np.nan)
    if means.shape != (len(seen), policy.action_size) or not (np.abs([means, drawn]) <= 1.0).all():
        raise WireError(f"an action on {len(seen)} probes is not finite, or leaves [-1, 1]")
    return policy, float(np.abs(means - before).mean())


class Pilot:
    """What drives an actor's environment: random for the first steps, then the newest weights, until `stopped()`.

    Sends every record to the learner; with `lockstep` (the twin) waits after each until it may go on.
    `orders` are the learner's; weights it sends are probed, and now and then put into `kept`, in the link's thread.
    `taker` may take the stick.
    """

    def __init__(
        self, env: RobotEnv | GymEnv, link: ActorLink, stopped: Callable[[], str], orders: dict[str, Any],
        seed: int, lockstep: bool, kept: Kept | None = None, taker: Takeover | None = None,
    ) -> None:
        self._env, self._link, self._stopped, self._lockstep = env, link, stopped, lockstep
        self._orders, self._spec, self._kept, self._taker = orders, orders["policy"], kept, taker
        self._random_steps, self._random_bound = int(orders["random_steps"]), float(orders.get("random_bound", 1.0))
        self._rng = np.random.default_rng(seed)
        self._policy: Policy | None = None
        self._seen: Seen = ()
        self._change = np.nan  # of the actions by the newest weights
        link.prepare = self.prepare
        self.steps = 0
        self._silent = False
        self._reported = 0, time.monotonic()  # steps and time at the last report
        env.on_record.append(self._send)

    def prepare(self, version: int, params: Params) -> Policy:
        """The policy of weights that came; raises WireError to refuse them."""
        policy, self._change = probed(self._spec, params, self._seen, self._policy)
        if self._kept is not None:
            self._kept.save(self._orders, version, params)
        return policy

    def swap(self, version: int, policy: Policy) -> None:
        """Drive with these from the next step on."""
        self._env.version, self._policy = version, policy

    def refresh(self, timeout: float = 0.0) -> bool:
        """Swap in the newest weights, between steps; False while there are none yet."""
        newest = self._link.weights(timeout)
        if newest is not None:
            self.swap(*newest)
        return self._policy is not None

    def wish(self, obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray | None:
        """(a,) action: of who took over, else of the policy with exploration; None to end."""
        self.refresh()
        self._seen = (*self._seen[1 - PROBED :], (obs, prev_action))  # as a whole: another thread reads it
        if self._stopped():
            return None
        if self._taker is not None:
            assert isinstance(self._env, RobotEnv)
            taken = self._taker.wish(self._env.reading, prev_action)
            self._env.source = "policy" if taken is None else "takeover"
            if taken is not None:
                return taken
        return self._explore(obs, prev_action)

    def _explore(self, obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray:
        """The policy's; at random, uniform in what bound and action-rate limit leave."""
        if self._policy is not None and self.steps >= self._random_steps:
            return self._policy.act(obs, prev_action, self._rng)
        before, delta = np.clip(prev_action, -1.0, 1.0), self._spec.get("max_delta") or 2.0
        ends = -self._random_bound, self._random_bound
        low, high = (np.clip(end, before - delta, before + delta) for end in ends)
        return self._rng.uniform(low, high).astype(np.float32)

    def _send(self, record: Record) -> None:
        self._link.send(record.seq, encode(record))
        self.steps += record.action is not None
        self._report()
        self._listen()
        if record.action is None:
            if self._taker is not None:
                self._taker.begin()
                self._env.source = "policy"
            if self._link.full:
                self._pause()
        while self._lockstep and not self._link.wait_run_until(self.steps + 1, timeout=0.5) and not self._stopped():
            self._listen()
        if record.source == "reset" and self._stopped():
            raise Leave

    def _listen(self) -> None:
        """Say when the learner has fallen silent, and when it is back."""
        silent = self._link.silent_s > SILENT_S
        if silent == self._silent:
            return
        self._silent = silent
        goes_on = "the twin waits for it" if self._lockstep else "the actor drives on with the weights it has"
        tell(f"not a word from the learner for {SILENT_S:.0f} s; {goes_on}" if silent else "the learner is back")

    def _pause(self) -> None:
        """Stand still until the spool has room again: records are never dropped."""
        if isinstance(self._env, RobotEnv):
            self._env.robot.stop()
        tell("paused, the spool is full or cannot be written")
        while self._link.full and not self._stopped():
            time.sleep(0.2)

    def _report(self) -> None:
        """Tell the learner, now and then, how the loop does."""
        (steps, then), now = self._reported, time.monotonic()
        if now - then < STATUS_EVERY_S:
            return
        self._reported = self.steps, now
        stats = {"rate/hz": (self.steps - steps) / (now - then), "link/weights_change": self._change}
        if isinstance(self._env, RobotEnv):
            late = self._env.rate.lateness_ms()
            stats |= {"rate/late": self._env.rate.late} | {f"rate/late_{k}_ms": v for k, v in late.items()}
            for fault, count in self._env.gate.counts.items():
                stats[f"gate/clamped_{fault}" if fault in CLAMPS else f"gate/veto_{fault}"] = count
            stats["gate/clamped"] = sum(self._env.gate.counts.get(clamp, 0) for clamp in CLAMPS)
        self._link.report(stats)


def deliver(address: str, folder: Path) -> None:
    """Bring the learner what actors that are gone left in the spool. What it does not take stays there."""
    with left_behind(folder) as found:
        for where, meta, spool in found:
            link = ActorLink(address)
            try:
                link.begin(meta, spool=spool)
            except WireError as error:
                print(f"warning: {where} stays where it is: {error}", file=sys.stderr)
            link.close(LEARNER_WAIT_S)
        for where in {where for where, _, _ in found} - {where for where, _, spool in found if len(spool)}:
            shutil.rmtree(where)


def _orders(link: ActorLink, task: str | None, folder: Path) -> tuple[dict[str, Any], tuple[int, Params] | None]:
    """What the learner says there is to do. Where none answers, what it said last of this task, and its weights."""
    found = None if task is None else Kept(folder, catalog.load_spec(task).text).load()
    if found is None:
        return link.start(LEARNER_WAIT_S), None
    try:
        return link.start(ALONE_AFTER_S), None
    except NoLearner as error:
        orders, version, params = found
        told = f"until then the actor drives with weights {version}, its last here, and records wait in {folder}"
        print(f"{error}; {told}", file=sys.stderr, flush=True)
        return orders | {"random_steps": 0}, (version, params)


def _check(task: str | None, fail: Sequence[str], takeover: str | None) -> None:
    """Raise, before anybody is waited for, for what cannot be in this task."""
    if task is not None:
        spec = catalog.load_spec(task)
        catalog.failures(spec, fail)
        if takeover is not None:
            check(takeover, spec, catalog.declaration(spec)[1])


def serve(
    address: str, task: str | None = None, real: bool = False, seed: int | None = None,
    realtime: bool = False, view: bool = False, parent: int | None = None, spool: str | None = None,
    fail: Sequence[str] = (), takeover: str | None = None,
) -> str:
    """One actor: ask the learner what there is to do, drive until told to stop. Returns what to say of it.

    Records wait in the folder `spool` (default: SPOOL) until the learner has them; what earlier actors left there
    is delivered first. Where no learner answers and there are weights from an earlier life for `task`, it drives
    with those, in real time, until one does.

    `fail`: what breaks in the twin, and when. `parent`: process id of the `tether run` that it must not outlive.
    `takeover`: who takes over (one of takeover.WHO; default: whom the learner says). With a person in real time.
    Raises WireError, DriverError or TaskError with one line when it cannot begin.
    """
    _check(task, fail, takeover)
    link, parent_folder = ActorLink(address), Path(spool or SPOOL).expanduser()
    taker: Takeover | None = None

    def cause() -> str:
        if parent is not None and os.getppid() != parent:
            return "the run it belongs to is gone"
        if taker is not None and taker.stopped():
            return "the person at the stick said so"
        return f"the learner said stop: {link.stopped}" if link.stopped else ""

    try:
        orders, alone = _orders(link, task, parent_folder)
        with stoppable(cause) as stopped, ExitStack() as at_the_end:
            spec = catalog.spec_of(str(orders["task"]), str(orders["name"]))
            if task is not None and catalog.load_spec(task).text != spec.text:
                other = f"the learner at {address} trains {spec.name!r}, not {task!r} as it is here"
                raise WireError(f"{other}; leave the task out")
            seed = noise_seed(int(orders["seed"]), int(orders.get("number", 0))) if seed is None else seed
            who = str(orders.get("takeover", "none")) if takeover is None else takeover
            realtime |= who in BY_HAND or alone is not None  # there is nobody to give run_until
            env = catalog.make_env(catalog.make_task(spec), real, seed, realtime, view, fail)
            if fail:
                print(f"actor: in the twin fails {' '.join(fail)}", file=sys.stderr)
            if isinstance(env, RobotEnv):
                env.auto_reset = bool(orders["auto_reset"])
            taker = at_the_end.enter_context(intervener(who, env, float(orders.get("takeover_quality", 1.0)), seed))
            meta = catalog.stream_meta(spec)
            flight = FlightRecorder(meta)
            env.on_record.append(flight)  # first, so that it has the record at which another one failed
            lockstep = not (real or realtime)
            pilot = Pilot(env, link, stopped, orders, seed, lockstep, Kept(parent_folder, spec.text), taker)
            if alone is None:
                deliver(address, parent_folder)
            else:
                pilot.swap(alone[0], pilot.prepare(*alone))
            link.begin(meta, 10.0 if alone is None else 0.0, Spool(parent_folder / meta.stream, meta), stopped)
            room = f"takeovers: {who}; {parent_folder} has room for {hours(meta, parent_folder):.1f} h of records"
            print(f"actor: drives {spec.name} for the learner at {address}; {room}", file=sys.stderr)
            try:
                if not pilot.refresh(2.0):  # nothing moves before the first weights
                    print("actor: waits for the first weights", file=sys.stderr, flush=True)
                while not pilot.refresh(0.5):
                    if stopped():
                        raise Leave
                practise(env, pilot.wish, seed)
            except Leave:
                pass
            except Exception as error:  # the motors have stopped
                print(f"actor: stopped; {flight.save(parent_folder.parent / 'failures', error)}", file=sys.stderr)
                raise
            return f"actor: {pilot.steps:,} steps, stopped: {stopped()}"
    finally:
        left = link.close()
        if left:
            where = f"wait in {parent_folder} for the next actor" if link.on_disk else "were not delivered"
            print(f"actor: {left} records {where}", file=sys.stderr)
