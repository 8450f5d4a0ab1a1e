"""The tables of robots, task kinds and algorithms. Rows name things by string: nothing is imported until asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from ..drivers.base import Channel, Command, DriverError, Robot
from ..robot_env import gym_env, task
from ..robot_env.env import RobotEnv
from ..robot_env.rate import Rate
from ..robot_env.safety import Gate, Limits, SafetyError
from ..robot_env.task import Task, TaskError, TaskSpec


@dataclass(frozen=True)
class RobotRow:
    """A robot: where its declaration, its twin and its driver are ("module:name" below tether)."""

    declaration: str  # module with CHANNELS and COMMAND
    twin: str  # (walls, start, seed, realtime) -> Twin
    driver: str | None  # () -> Robot; None: no driver yet
    about: str


ROBOTS = {
    "car": RobotRow("drivers.car", "sim.car:CarTwin", None, "1/10 RC car, VESC and tracking camera"),
    "fake": RobotRow("drivers.fake", "drivers.fake:fake_twin", None, "a point on a plane, for tests"),
}
KINDS = {"course": "robot_env.course:Course"}
ALGORITHMS = {"rlpd": "agents.rlpd"}


class CatalogError(ValueError):
    """A name that is not in the catalog; the message lists those that are."""


def robots() -> dict[str, RobotRow]:
    """The rows of this package and those of the `tether.robots` entry points."""
    return ROBOTS | {e.name: e.load() for e in entry_points(group="tether.robots")}


def algorithms() -> dict[str, Callable[[], ModuleType]]:
    """What imports each algorithm, those of the `tether.algorithms` entry points too."""
    plugged = {e.name: e.load for e in entry_points(group="tether.algorithms")}
    return {name: partial(import_module, f"..{module}", __package__) for name, module in ALGORITHMS.items()} | plugged


def algorithm(name: str) -> ModuleType:
    """The module with Config, State, init, act, update. Raises CatalogError."""
    return _chosen("algorithm", name, algorithms())()


def find(path: str) -> Any:
    """The object at "module:name" below tether."""
    module, name = path.split(":")
    return getattr(import_module(f"..{module}", __package__), name)


def row(name: str) -> RobotRow:
    """The row of a robot. Raises CatalogError naming the choices."""
    return _chosen("robot", name, robots())


def _chosen(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise CatalogError(f"unknown {what} {name!r}; this installation has {', '.join(table)}")
    return table[name]


def load_spec(source: str) -> TaskSpec:
    """A task by name, path or `gym:<id>`. Raises TaskError."""
    return gym_env.spec(source) if source.startswith(gym_env.PREFIX) else task.load(source)


def spec_of(text: str, name: str) -> TaskSpec:
    """The task that a run, a bundle or a learner holds the text of (`gym:<id>` stands for itself)."""
    return gym_env.spec(text) if text.startswith(gym_env.PREFIX) else task.parse(text, name, f"the task {name}")


def declaration(spec: TaskSpec) -> tuple[tuple[Channel, ...], Command]:
    """What the task's robot reads and takes, without importing its twin or driver."""
    if spec.kind == "gym":
        env = gym_env.make(spec.robot)
        found = gym_env.declare(env, spec.hz)
        env.close()
        return found
    module = import_module(f"..{row(spec.robot).declaration}", __package__)
    return module.CHANNELS, module.COMMAND


def limits(spec: TaskSpec) -> Limits:
    """The gate's limits: the robot's own, tightened by the task. Raises SafetyError."""
    channels, command = declaration(spec)
    return Limits.of(channels, command).tightened(command, spec.gate)


def make_task(spec: TaskSpec) -> Task:
    """The task's behaviour. Raises TaskError for a file that cannot be used."""
    try:
        channels, command = declaration(spec)
        limits(spec)
    except (CatalogError, SafetyError) as error:
        raise TaskError(f"{spec.name}: {error}") from None
    kind = gym_env.GymTask if spec.kind == "gym" else find(KINDS[spec.kind])
    return kind(spec, channels, command)


def make_robot(
    task: Task, real: bool = False, seed: int = 0, realtime: bool = False
) -> Robot:
    """The twin, or with `real` the hardware. Raises DriverError when there is no driver."""
    entry = row(task.spec.robot)
    if real:
        if entry.driver is None:
            raise DriverError(f"robot {task.spec.robot} has no hardware driver yet; leave out --real to use its twin")
        return find(entry.driver)()
    try:
        twin: Callable[..., Robot] = find(entry.twin)
    except ModuleNotFoundError as error:
        raise DriverError(f"the twin needs {error.name}: pip install 'tether[sim]'") from None
    return twin(walls=task.walls(), start=task.start, seed=seed, realtime=realtime)


def make_env(
    task: Task, real: bool = False, seed: int = 0, realtime: bool = False
) -> RobotEnv | gym_env.GymEnv:
    """The environment an actor drives: a robot behind its gate, or a Gymnasium environment."""
    if task.spec.kind == "gym":
        if real:
            raise DriverError(f"{task.spec.name} is not a robot; leave out --real")
        env = gym_env.make(task.spec.robot)
        return gym_env.GymEnv(task, env, gym_env.declare(env, task.spec.hz)[1])  # type: ignore[arg-type]
    robot = make_robot(task, real, seed, realtime)
    gate = Gate(robot.command, limits(task.spec))
    return RobotEnv(robot, task, gate, Rate(task.spec.hz, robot.now, robot.sleep))


