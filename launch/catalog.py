"""The tables of robots, task kinds and algorithms. Rows name things by string: nothing is imported until asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

from ..drivers.base import Channel, Command, DriverError, Twin
from ..robot_env import gym_env, task
from ..robot_env.env import RobotEnv
from ..robot_env.fit import boxed, check_twin
from ..robot_env.rate import Rate
from ..robot_env.record import Meta
from ..robot_env.safety import Gate, Limits, SafetyError
from ..robot_env.task import Task, TaskError, TaskSpec


@dataclass(frozen=True)
class RobotRow:
    """A robot: where its declaration, its twin, its driver and its body are ("package.module:name")."""

    declaration: str  # module with CHANNELS and COMMAND
    # (walls, start, seed, realtime) -> Twin. One that can fail on purpose has `failures` and `fail`. One that takes
    # more keywords has `settings`: {name: ("choices", ...) or (lowest, highest) of a number, or of a pair to draw from}
    twin: str
    driver: str | None  # () -> Robot; None: no driver yet
    about: str
    # (command, hz) -> robot_env.task.Body; None: it stays where it is
    body: str | None = "tether.robot_env.reset:Wheeled"
    family: str = ""  # of the presets, for all its tasks; "": the task's kind


ROBOTS = {
    "car": RobotRow("tether.drivers.car", "tether.sim.car:CarTwin", None, "1/10 RC car, VESC and tracking camera"),
    "quadruped": RobotRow(
        "tether.drivers.quadruped", "tether.sim.quadruped:QuadrupedTwin", None, "Go1-class quadruped, 12 kg, 12 joints",
        "tether.robot_env.legs:Legged", "walk",
    ),
    "arm": RobotRow("tether.drivers.arm", "tether.sim.arm:ArmTwin", None, "SO-101-class arm, six servos", None),
    "arm-joints": RobotRow("tether.drivers.arm_joints", "tether.sim.arm:JointArmTwin", None, "arm, by joints", None),
    "fake": RobotRow("tether.drivers.fake", "tether.drivers.fake:Fake", None, "a point on a plane, for tests"),
}  # fmt: skip
KINDS = {
    "course": "tether.robot_env.course:Course", "walk": "tether.robot_env.walk:Walk",
    "manipulate": "tether.robot_env.manipulate:Manipulate",
}  # fmt: skip
ALGORITHMS = {name: f"tether.agents.{name}" for name in ("rlpd", "droq", "crossq", "xqc", "bc")}
FAILURE = re.compile(r"(\w+):(\w+)@(\d+(?:\.\d+)?)s?(?:\+(\d+(?:\.\d+)?)s?)?")


class CatalogError(ValueError):
    """A name that is not in the catalog; the message lists those that are."""


def robots() -> dict[str, RobotRow]:
    """The rows of this package and those of the `tether.robots` entry points."""
    return ROBOTS | {e.name: e.load() for e in entry_points(group="tether.robots")}


def algorithms() -> dict[str, Callable[[], ModuleType]]:
    """What imports each algorithm, those of the `tether.algorithms` entry points too."""
    plugged = {e.name: e.load for e in entry_points(group="tether.algorithms")}
    return {name: partial(import_module, module) for name, module in ALGORITHMS.items()} | plugged


def algorithm(name: str) -> ModuleType:
    """The module with Config, State, init, act, update. Raises CatalogError."""
    return _chosen("algorithm", name, algorithms())()


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
    """What the task's robot reads and takes, without importing its twin or driver. Raises TaskError."""
    if spec.kind == "gym":
        env = gym_env.make(spec.robot)
        found = gym_env.declare(env, spec.hz)
        env.close()
        return found
    module = import_module(row(spec.robot).declaration)
    return module.CHANNELS, boxed(spec, module.COMMAND)


def family(spec: TaskSpec) -> str:
    """Whose tables of the presets hold for the task."""
    entry = robots().get(spec.robot)  # a task that names no robot of ours is refused elsewhere
    return (entry.family if entry else "") or spec.kind


def check_actions(spec: TaskSpec, other: TaskSpec) -> None:
    """Raise TaskError unless an action means the same in both tasks."""
    if spec.robot != other.robot:
        raise TaskError(f"{spec.name}: {other.name} was trained on {other.robot}; this task's robot is {spec.robot}")
    if declaration(spec)[1] != declaration(other)[1]:
        raise TaskError(f"{spec.name}: in {other.name} an action is another command; same robot and [action], please")
    if spec.hz != other.hz:
        raise TaskError(f"{spec.name}: runs at {spec.hz:g} Hz, and {other.name} at {other.hz:g}; same hz, please")


def check_start(spec: TaskSpec, other: TaskSpec) -> int:
    """How many numbers `other` observes. Raise TaskError unless what was learned there can begin with `spec`: an action
    means the same, and where `other` observes fewer these are the robot's channels and the previous action alone."""
    check_actions(spec, other)
    new, old = (make_task(one).observation_size for one in (spec, other))
    channels, command = declaration(spec)
    if old != new and old != sum(c.size for c in channels if c.observed) + command.size:
        raise TaskError(f"{spec.name}: {other.name} observes what this task does not; start from one that sees no more")
    return old


def stream_meta(spec: TaskSpec) -> Meta:
    """What a new stream of records says of itself."""
    channels, command = declaration(spec)
    return Meta.of(robot=spec.robot, task=spec.text, hz=spec.hz, channels=channels, command=command)


def limits(spec: TaskSpec) -> Limits:
    """The gate's limits: the robot's own, tightened by the task. Raises SafetyError."""
    channels, command = declaration(spec)
    return Limits.of(channels, command, spec.gate)


def make_task(spec: TaskSpec) -> Task:
    """The task's behaviour. Raises TaskError for a file that cannot be used."""
    try:
        channels, command = declaration(spec)
        limits(spec)
    except (CatalogError, SafetyError) as error:
        raise TaskError(f"{spec.name}: {error}") from None
    if spec.kind == "gym":
        return gym_env.GymTask(spec, channels, command)  # type: ignore[return-value]
    make, body = resolve_name(KINDS[spec.kind]), row(spec.robot).body
    if spec.kind == "manipulate":
        return make(spec, channels, command)
    if body is None:
        raise TaskError(f'{spec.name}: robot {spec.robot} goes nowhere; task.kind must be "manipulate" for it')
    return make(spec, channels, command, resolve_name(body)(command, spec.hz))


def failures(spec: TaskSpec, wanted: Sequence[str]) -> list[tuple[str, str, float, float]]:
    """The failures PART:KIND@TIME[+DURATION] of the task's twin: (part, kind, start s, duration s).

    Raises DriverError naming what can fail, and how.
    """
    found = []
    for text in wanted:
        can = {} if spec.kind == "gym" else getattr(resolve_name(row(spec.robot).twin), "failures", {})
        if not can:
            raise DriverError(f"--fail {text}: {spec.robot} has no twin that can fail; leave out --fail")
        match = FAILURE.fullmatch(text)
        if match is None:
            raise DriverError(f"--fail {text}: write PART:KIND@TIME, as in {next(iter(can))}:off@12s, or TIME+DURATION")
        part, kind, start, lasts = match.groups()
        if part not in can:
            raise DriverError(f"--fail {text}: {spec.robot} has no {part!r}; what can fail is {', '.join(can)}")
        if kind not in can[part]:
            raise DriverError(f"--fail {text}: {part} cannot be {kind!r}, only {', '.join(can[part])}")
        if lasts and float(lasts) == 0:
            raise DriverError(f"--fail {text}: it would last 0 s")
        found.append((part, kind, float(start), float(lasts or math.inf)))
    return found


def make_env(
    task: Task, real: bool = False, seed: int = 0, realtime: bool = False, view: bool = False, fail: Sequence[str] = ()
) -> RobotEnv | gym_env.GymEnv:
    """The environment an actor drives: a robot (the twin, or with `real` the hardware) behind its gate, or a
    Gymnasium environment. `view` opens MuJoCo's viewer on a twin; `fail` is what breaks in it, and when.

    Raises DriverError where there is no driver, no twin to view or to fail, or no display; TaskError for a twin that
    is not as `[twin]` wants it.
    """
    spec = task.spec
    broken = failures(spec, fail)
    if broken and real:
        raise DriverError("--fail breaks twins; leave it out with --real")
    if spec.kind == "gym":
        if real or view:
            raise DriverError(f"{spec.name} is not a robot; leave out --real and --view")
        env = gym_env.make(spec.robot)
        return gym_env.GymEnv(task, env, gym_env.declare(env, spec.hz)[1])  # type: ignore[arg-type]
    entry = row(spec.robot)
    where = entry.driver if real else entry.twin
    if where is None:
        raise DriverError(f"robot {spec.robot} has no hardware driver yet; leave out --real to use its twin")
    make = resolve_name(where)
    if real:
        robot = make()
    else:
        check_twin(spec, make)
        robot = make(walls=task.walls(), start=task.start, seed=seed, realtime=realtime, **spec.twin)
    for failure in broken:
        robot.fail(*failure)
    env = RobotEnv(robot, task, Gate(declaration(spec)[1], limits(spec)), Rate(spec.hz, robot.now, robot.sleep))
    if view:
        if not isinstance(robot, Twin):
            raise DriverError("--view shows twins; leave it out with --real")
        viewer = resolve_name("tether.sim.render:view")(robot)
        env.on_record.append(lambda record: viewer.sync())
    return env
