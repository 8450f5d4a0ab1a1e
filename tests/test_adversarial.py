"""Policies that want harm, on the car's twin: what reaches the driver stays within the limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tether.drivers.car import COMMAND
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.safety import MAX_DT_S, SafetyError

pytest.importorskip("mujoco")

LOW, HIGH, RATE = np.array(COMMAND.low), np.array(COMMAND.high), np.array(COMMAND.rate)


def constant(*action: float):
    return lambda rng: itertools.repeat(np.array(action))


def bang_bang(ticks: int):
    """Full one way, full the other."""
    return lambda rng: itertools.cycle([np.ones(2)] * ticks + [-np.ones(2)] * ticks)


def sweep(rng):
    for tick in itertools.count():
        yield np.sin(np.array([0.003, 0.002]) * tick**1.5)


def walk(rng):
    at = np.zeros(2)
    while True:
        at = np.clip(at + rng.normal(0, 0.5, 2), -3, 3)
        yield at


def uniform(scale: float):
    return lambda rng: (rng.uniform(-scale, scale, 2) for _ in itertools.count())


def now_and_then(value, share: float):
    return lambda rng: (value if rng.random() < share else rng.uniform(-1, 1, 2) for _ in itertools.count())


POLICIES = {
    "full speed, straight": constant(1.0, 0.0), "full speed, left": constant(1.0, 1.0),
    "full speed, right": constant(1.0, -1.0), "backwards": constant(-2.0, 0.3), "far out": constant(1e38, -1e38),
    "bang-bang every tick": bang_bang(1), "bang-bang every third": bang_bang(3),
    "bang-bang every second": bang_bang(10),
    "sine sweep": sweep, "random walk": walk, "uniform": uniform(1.0), "uniform beyond": uniform(5.0),
    "not a number": constant(np.nan, 0.0), "infinite": constant(0.0, np.inf),
    "now and then not a number": now_and_then(np.full(2, np.nan), 0.02),
    "now and then infinite": now_and_then(np.array([np.inf, -np.inf]), 0.02),
    "now and then far out": now_and_then(np.array([1e38, 1e38]), 0.2),
    "now and then the wrong size": now_and_then(np.zeros(3), 0.02), "always the wrong size": constant(1.0),
    "now and then the other way": now_and_then(np.array([-2.0, 2.0]), 0.3),
}  # fmt: skip


def attack(name: str, seconds: float) -> None:
    env = catalog.make_env(catalog.make_task(catalog.load_spec("car-loop")), seed=1)
    assert isinstance(env, RobotEnv)
    write, written = env.robot.write, []

    def spy(command: np.ndarray) -> None:
        written.append((env.robot.now(), command.copy(), env.gate.state))
        write(command)

    env.robot.write = spy
    wishes = POLICIES[name](np.random.default_rng(1))
    stopped = 0
    try:
        env.reset()
        while env.robot.now() < seconds:
            try:
                _, _, terminated, truncated, _ = env.step(next(wishes))
                if terminated or truncated:
                    env.reset()
            except SafetyError:  # it is stopped for good; a person clears and arms it
                stopped += 1
                person = iter([("clear",), *[()] * 12, *[("arm",)] * 5, *[()] * 100])
                while env.gate.state != "stopped":
                    env.step(np.zeros(2))
                env.events = lambda person=person: next(person, ())
                env.reset()
                env.events = tuple
    finally:
        env.close()
    assert len(written) > 5 * seconds
    assert stopped or name not in ("not a number", "infinite", "always the wrong size")
    before, last = 0.0, np.array(COMMAND.safe)
    for now, command, state in written:
        assert np.isfinite(command).all() and (command >= LOW).all() and (command <= HIGH).all()
        if state == "run":
            assert (np.abs(command - last) <= RATE * min(now - before, MAX_DT_S) + 1e-9).all()
        else:
            assert command[0] == COMMAND.safe[0]
        before, last = now, command


@pytest.mark.parametrize("name", POLICIES)
def test_what_reaches_the_driver_stays_within_the_limits(name):
    attack(name, 15.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_ten_minutes(name):
    attack(name, 600.0)
