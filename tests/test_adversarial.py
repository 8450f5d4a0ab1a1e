"""Policies that want harm, on the twins of car and arm, led by its tool or by its joints: what reaches the driver stays
within the limits, and beneath it what an arm's servos are told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tether.drivers import arm, arm_joints, car
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.safety import HOLD, LATCHED, MAX_DT_S, RUN, SafetyError

pytest.importorskip("mujoco")

from tether.sim.arm import ENCODER_RAD

ROBOTS = {  # and s of a short test
    "car": (car.COMMAND, "car-loop", 15.0), "arm": (arm.COMMAND, "arm-pick", 5.0),
    "arm-joints": (arm_joints.COMMAND, "arm-pick", 5.0),
}  # fmt: skip
DEAF = ("not a number", "infinite", "always the wrong size")  # who stops a robot for good, again and again


def constant(*action: float):
    """Again and again, as often as the robot takes numbers."""
    return lambda rng, size: itertools.repeat(np.resize(action, size))


def bang_bang(ticks: int):
    """Full one way, full the other."""
    return lambda rng, size: itertools.cycle([np.ones(size)] * ticks + [-np.ones(size)] * ticks)


def sweep(rng, size):
    for tick in itertools.count():
        yield np.sin(np.linspace(0.003, 0.002, size) * tick**1.5)


def walk(rng, size):
    at = np.zeros(size)
    while True:
        at = np.clip(at + rng.normal(0, 0.5, size), -3, 3)
        yield at


def uniform(scale: float):
    return lambda rng, size: (rng.uniform(-scale, scale, size) for _ in itertools.count())


def now_and_then(value: tuple[float, ...], share: float):
    return lambda rng, size: (
        np.resize(value, size) if rng.random() < share else rng.uniform(-1, 1, size) for _ in itertools.count()
    )


def too_long(share: float):
    return lambda rng, size: (
        np.zeros(size + 1) if rng.random() < share else rng.uniform(-1, 1, size) for _ in itertools.count()
    )


POLICIES = {
    "full, and none": constant(1.0, 0.0), "full": constant(1.0, 1.0), "full, either way": constant(1.0, -1.0),
    "backwards": constant(-2.0, 0.3), "far out": constant(1e38, -1e38),
    "bang-bang every tick": bang_bang(1), "bang-bang every third": bang_bang(3),
    "bang-bang every second": bang_bang(10),
    "sine sweep": sweep, "random walk": walk, "uniform": uniform(1.0), "uniform beyond": uniform(5.0),
    "not a number": constant(np.nan, 0.0), "infinite": constant(0.0, np.inf),
    "now and then not a number": now_and_then((np.nan,), 0.02),
    "now and then infinite": now_and_then((np.inf, -np.inf), 0.02),
    "now and then far out": now_and_then((1e38,), 0.2),
    "now and then the wrong size": too_long(0.02), "always the wrong size": lambda rng, size: constant(1.0)(rng, 1),
    "now and then the other way": now_and_then((-2.0, 2.0), 0.3),
}  # fmt: skip


def attack(robot: str, name: str, seconds: float) -> list[tuple[float, np.ndarray, str]]:
    """(time, command, state) of all that the gate gave out: that, and nothing else, reached the driver."""
    command, task, _ = ROBOTS[robot]
    text = catalog.load_spec(task).text.replace('robot = "arm"', f'robot = "{robot}"')
    env = catalog.make_env(catalog.make_task(catalog.spec_of(text, task)), seed=1)
    assert isinstance(env, RobotEnv)
    write, step, given, written = env.robot.write, env.gate.step, [], 0

    def spy(now: float, *args):
        out = step(now, *args)
        given.append((now, out[0], out[1]))
        return out

    def spy_below(command: np.ndarray) -> None:
        nonlocal written
        written += 1
        assert (command == given[-1][1]).all()
        write(command)

    env.gate.step, env.robot.write = spy, spy_below
    wishes = POLICIES[name](np.random.default_rng(1), command.size)
    stopped = 0
    try:
        env.reset()
        end = env.robot.now() + seconds
        while env.robot.now() < end:
            try:
                _, _, terminated, truncated, _ = env.step(next(wishes))
                if terminated or truncated:
                    env.reset()
            except SafetyError:  # it is stopped for good; a person clears and arms it
                stopped += 1
                person = iter([("clear",), *[()] * 12, *[("arm",)] * 5, *[()] * 100])
                while env.gate.state != "stopped":
                    env.step(np.zeros(command.size))
                env.events = lambda person=person: next(person, ())
                env.reset()
                env.events = tuple
    finally:
        env.close()
    assert written > 5 * seconds
    assert stopped or name not in DEAF
    return given


def check(robot: str, given: list[tuple[float, np.ndarray, str]]) -> None:
    """All within the box; driven, within the rates, and from where it was; else told what stops it: an arm stays."""
    command = ROBOTS[robot][0]
    low, high, rate = np.array(command.low), np.array(command.high), np.array(command.rate)
    # one that was left at the end of a joint's range begins there, as it is measured
    slack = 0.0 if command.tool is None else ENCODER_RAD
    before, last, _ = given[0]
    for now, told, state in given[1:]:
        assert np.isfinite(told).all() and (told >= low - slack).all() and (told <= high + slack).all()
        if state == RUN:
            assert (np.abs(told - last) <= rate * min(now - before, MAX_DT_S) + 1e-9).all()
        elif not command.stays:
            assert told[0] == command.safe[0]
        else:  # a person set it down elsewhere, or it stays
            moved = told != last
            assert not moved.any() or state not in (HOLD, *LATCHED)
            assert (np.abs(told - last) > command.reach)[moved].all()
        before, last = now, told


def watch(monkeypatch) -> list[np.ndarray]:
    """What the arm's servos are told from now on: (2, 6) rad, before and after each of their turns."""
    told, step = [], arm.Servos.step

    def spy(servos: arm.Servos, command: np.ndarray) -> np.ndarray:
        before = servos.target.copy()
        target = step(servos, command)
        told.append(np.array([before, target]))
        return target

    monkeypatch.setattr(arm.Servos, "step", spy)
    return told


def run(robot: str, name: str, seconds: float, monkeypatch) -> None:
    told = watch(monkeypatch)
    check(robot, attack(robot, name, seconds))
    if robot != "car":
        targets = np.array(told)  # (turns, 2, 6)
        assert len(targets) > 0.9 * seconds * arm.SERVO_HZ
        assert (targets >= arm.LOW).all() and (targets <= arm.HIGH).all()
        assert np.abs(targets[:, 1] - targets[:, 0]).max() <= arm.JOINT_RADPS / arm.SERVO_HZ + 1e-9
    if robot == "arm-joints":
        before, after = (np.array([[arm.outside(joints), *arm.forward(joints)] for joints in turn]) for turn in
                         (targets[:, 0], targets[:, 1]))  # fmt: skip
        assert (after[:, 0] <= before[:, 0] + 1e-9).all()
        assert np.linalg.norm(after[:, 1:] - before[:, 1:], axis=1).max() <= arm.TOOL_MPS / arm.SERVO_HZ * 1.01


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("robot", ROBOTS)
def test_what_reaches_the_driver_stays_within_the_limits(robot, name, monkeypatch):
    run(robot, name, ROBOTS[robot][2], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("robot", ROBOTS)
def test_ten_minutes(robot, name, monkeypatch):
    run(robot, name, 600.0, monkeypatch)
