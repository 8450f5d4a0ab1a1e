"""SAFETY.md's tables: each failure of a twin is seen as it says and in time, or bounded by the limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tether.drivers import arm, car, quadruped
from tether.drivers.base import Command
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.safety import CLAMPS, SafetyError
from tether.robot_env.task import TaskSpec, load, parse

from tests.conftest import square

pytest.importorskip("mujoco")

from tether.sim.arm import ArmTwin
from tether.sim.car import CarTwin
from tether.sim.quadruped import QuadrupedTwin

PHASES = (0.0, 0.03, 0.07)  # s, between failure and tick
OPEN_FLOOR = re.sub(r"\[course\].*?(?=\[\[checkpoint)", "", square("car", side_m=40.0, episode_s=600.0), flags=re.S)
# nothing lies on it, and its checkpoint is higher than actions lead
BARE_TABLE = re.sub(r"area = .*|near = .*", "", load("arm-reach").text).replace("episode_s = 8", "episode_s = 600")
BARE_TABLE = BARE_TABLE.replace("at = [0.0, 0.0, 0.0]", "at = [0.25, 0.0, 0.234]")


def weave(t: float) -> np.ndarray:
    """1.2 and 3.2 m/s, 2 s each; the wheels 0.3 rad left and right, 1 s each."""
    return car.COMMAND.to_action(np.array([3.2 if t % 4 < 2 else 1.2, 0.3 if t % 2 < 1 else -0.3]))


def tread(t: float) -> np.ndarray:
    """Thighs and calves of a diagonal pair up while the other's are down, twice a second."""
    phase = 4.0 * np.pi * t + np.pi * np.array([0, 1, 1, 0]).repeat(3)
    return 0.2 * np.sin(phase) * np.tile([0.0, 1.0, -1.0], 4)


def sweep(t: float) -> np.ndarray:
    """To and fro above the table, each way in its own time, at 0.1 m/s and less; the jaws open and close."""
    way = np.array([0.07, 0.1, 0.05, 0.3]) * np.sin(np.array([0.9, 0.7, 1.1, 0.8]) * t)
    return arm.COMMAND.to_action(np.array([0.23, 0.0, 0.12, 0.4]) + way)


class Robot(NamedTuple):
    """What breaks, doing what."""

    twin: type
    spec: TaskSpec
    command: Command
    drive: Callable[[float], np.ndarray]
    start: float  # s, by when it does


ROBOTS = {
    "car": Robot(CarTwin, parse(OPEN_FLOOR, "floor"), car.COMMAND, weave, 3.0),
    "quadruped": Robot(QuadrupedTwin, load("dog-walk"), quadruped.COMMAND, tread, 4.0),
    "arm": Robot(ArmTwin, parse(BARE_TABLE, "table"), arm.COMMAND, sweep, 3.0),
}
SEEN: list[tuple[str, str, str, str, float]] = []  # robot, part, kind, fault, seconds
UNSEEN: list[tuple[str, str, str]] = []
for section in (Path(__file__).parents[1] / "SAFETY.md").read_text().split("\n### The ")[1:]:
    robot, section = section.split(None, 1)[0], section.split("\n## ")[0]
    rows = re.findall(r"^\| ([\w ]+) \| (\w+)[^|]*\| `(\w+)`[^|]*\| ([\d.]+) s \|$", section, re.M)
    for parts, kind, name, within in rows:
        SEEN += [(robot, part, kind, name, float(within)) for part in parts.split()]
    for parts, kind in re.findall(r"^\| ([\w ]+) \| (\w+) \| [^|`]*(?:`[^|]*)?[^|\d]*\|$", section, re.M):
        UNSEEN += [(robot, part, kind) for part in parts.split() if kind != "kind"]


def faults(robot: str, fail: list[str], seconds: float, seed: int) -> tuple[list[tuple[float, str]], np.ndarray]:
    """(time, fault) of every tick that had one, and the least and the largest command, (2, n) (SI)."""
    what = ROBOTS[robot]
    env = catalog.make_env(catalog.make_task(what.spec), seed=seed, fail=fail)
    assert isinstance(env, RobotEnv)
    found, told = [], []
    try:
        env.reset()
        while (now := env.robot.now()) < seconds:
            *_, terminated, truncated, info = env.step(what.drive(now))
            found += [(now, fault) for fault in info["faults"] if fault not in CLAMPS]
            told.append(what.command.to_command(info["executed"]))
            if terminated or truncated:
                env.reset()
    except SafetyError:
        pass
    finally:
        env.close()
    return found, np.array([np.min(told, axis=0), np.max(told, axis=0)])


def test_every_failure_of_the_twins_is_in_the_tables():
    listed = [row[:3] for row in (*SEEN, *UNSEEN)]
    assert sorted(listed) == sorted(
        (name, part, kind) for name, robot in ROBOTS.items() for part, kinds in robot.twin.failures.items()
        for kind in kinds
    )  # fmt: skip


@pytest.mark.parametrize("robot, part, kind, name, within", SEEN, ids=lambda v: str(v))
def test_it_is_seen_in_time(robot, part, kind, name, within):
    phases = PHASES if robot == "car" else PHASES[len(part + kind) % 3 :][:1]  # theirs take longer
    for seed, start in enumerate(ROBOTS[robot].start + phase for phase in phases):
        found, _ = faults(robot, [f"{part}:{kind}@{start}s"], start + within + 0.2, seed)
        assert found, "not seen"
        when, fault = found[0]
        assert fault == (name if "_" in name else f"{name}_{part}") and 0.0 <= when - start <= within, found[0]


@pytest.mark.parametrize("robot, part, kind", UNSEEN, ids=lambda v: str(v))
def test_what_cannot_be_seen_stays_within_the_limits(robot, part, kind):
    start = ROBOTS[robot].start
    found, (least, most) = faults(robot, [f"{part}:{kind}@{start}s"], start + (12.0 if robot == "car" else 4.0), 0)
    command = ROBOTS[robot].command
    assert not found and (least >= np.array(command.low) - 1e-6).all() and (most <= np.array(command.high) + 1e-6).all()


@pytest.mark.parametrize("robot", ROBOTS)
def test_without_a_failure_nothing_is_seen(robot):
    assert faults(robot, [], 60.0 if robot == "car" else 20.0, 0)[0] == []
