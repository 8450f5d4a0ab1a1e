"""Task files: what is read from TOML, checked, and said when it is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..drivers.base import Channel, Reading
from .track import Line, TrackError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# what each kind of task has of its own in a file
KINDS: dict[str, tuple[str, ...]] = {
    "course": ("course", "checkpoint"), "walk": ("walk",), "manipulate": ("manipulate", "checkpoint"),
}  # fmt: skip
REWARDS = {"walk": ("witp", "aprl", "stand"), "manipulate": ("sparse", "progress")}
_SHIPPED = Path(__file__).parent / "tasks"
Batch = dict[str, np.ndarray]  # of samples, by their fields


class TaskError(ValueError):
    """A task file that cannot be used: the message names file, key and remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A place the task passes through: reached when closer than `radius_m` (m, map frame).

    Of kind manipulate: the place is that of `of`, the tool or the object, and lies `at` in the map frame or, with
    `near = "object"`, so far from the object.
    """

    at: tuple[float, ...]
    radius_m: float = 1.0
    of: str = "tool"
    near: str = "map"


@dataclass(frozen=True)
class CourseSpec:
    """The `[course]` table. Without a centre line the floor is open."""

    loop: bool = True
    width_m: float = 0.0
    centerline: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class WalkSpec:
    """The `[walk]` table."""

    reward: str = "witp"  # one of REWARDS["walk"]
    speed_mps: float = 0.5  # that is wanted (A Walk in the Park)


@dataclass(frozen=True)
class ManipulateSpec:
    """The `[manipulate]` table."""

    reward: str = "sparse"  # one of REWARDS["manipulate"]: 1 at the last checkpoint, or the way made towards each too
    area: Sequence[Sequence[float]] = ()  # [x, y] m of two corners: where the object may lie; not given: it is held
    spread_m: float = 0.0  # a try begins up to so far from home, along each axis


@dataclass(frozen=True)
class TaskSpec:
    """A task file, checked. `text` is the file as it was, for records, runs and bundles."""

    name: str
    robot: str
    kind: str
    hz: float
    episode_s: float
    hindsight: float = 0.0  # share of each batch whose goals are drawn again in hindsight
    course: CourseSpec = field(default_factory=CourseSpec)
    checkpoints: tuple[Checkpoint, ...] = ()
    walk: WalkSpec = field(default_factory=WalkSpec)
    manipulate: ManipulateSpec = field(default_factory=ManipulateSpec)
    gate: dict[str, float] = field(default_factory=dict)
    action: dict[str, list[float]] = field(default_factory=dict)  # low, high: SI; empty: the robot's own box
    twin: dict[str, Any] = field(default_factory=dict)  # more keywords of the twin
    text: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one step brought. `events` are what a person and the metrics hear of (`collision`, `lap_time_s`…)."""

    reward: float
    terminated: bool
    truncated: bool
    events: dict[str, float]
    reset: bool = False  # the robot must recover before it can go on


class Observer:
    """The observed channels in declared order, each divided by its declared scale: (size,) float32."""

    def __init__(self, channels: tuple[Channel, ...]) -> None:
        self._names = [c.name for c in channels if c.observed]
        self.scale = np.array([s for c in channels if c.observed for s in c.scale], np.float32)
        self.size = len(self.scale)
        ends = np.cumsum([c.size for c in channels if c.observed])
        self.places = dict(zip(self._names, np.split(np.arange(self.size), ends), strict=False))  # in the vector
        self._factor = 1.0 / self.scale

    def __call__(self, reading: Reading) -> np.ndarray:
        return np.concatenate([reading.values[n] for n in self._names]).astype(np.float32) * self._factor


class Recovery(Protocol):
    """A reset in progress: asked for one wish a tick until it has none."""

    needs_hand: bool  # what motion cannot undo: a person, or the twin, must set the robot upright

    def wish(self, reading: Reading) -> np.ndarray | None:
        """(n,) action-unit wish (it may leave the action box), or None when the robot can try again."""


class Body(Protocol):
    """What a task must know of the robot that does it. Named in the robot's row, made of (command, hz)."""

    needs: tuple[str, ...]  # the channels it reads
    terminal: tuple[str, ...]  # the trouble that ends an episode; any other truncates it
    from_rest: bool  # it can begin where it rests; else it recovers first
    pays_speed: bool  # its reward is the speed, and what does not depend on it

    def begin(self) -> Any:
        """What `trouble` remembers of a stream of readings."""

    def trouble(self, memory: Any, reading: Reading) -> str:
        """What is wrong with the robot, by name, or ""."""

    def reward(self, reading: Reading, ahead: float, left: float, trouble: str) -> float:
        """What a step is worth; (ahead, left) is the unit vector to where it shall go, in the body frame."""

    def recover(self, trouble: Collection[str], line: Line | None, width_m: float) -> Recovery:
        """The reset after this trouble; on a course, along its line with so much room."""


class Task(Protocol):
    """A task's behaviour: pure functions of readings, folded over a stream through `progress`."""

    spec: TaskSpec
    observation_size: int
    relabels: bool  # reward and termination can be computed from readings alone
    rest: np.ndarray  # (n,) the action of a robot at rest: what was "executed" before the first step
    start: tuple[float, float, float]  # where a twin is placed, x m, y m, heading rad
    from_rest: bool  # it can begin where the robot rests; else the robot recovers first

    def walls(self) -> list[np.ndarray]:
        """Closed polylines (k, 2) in m that a twin puts up."""

    def begin(self, reading: Reading) -> Any:
        """Progress at the first reading of a stream."""

    def observe(self, progress: Any, reading: Reading, action: np.ndarray) -> np.ndarray:
        """(observation_size,) float32 from a reading and the action executed before it."""

    def advance(self, progress: Any, action: np.ndarray, reading: Reading) -> Outcome:
        """Move `progress` to the reading that followed `action`; the outcome of that step."""

    def recover(self, reading: Reading, outcome: Outcome) -> Recovery:
        """The reset after `outcome`."""

    def spot(self, reading: Reading) -> tuple[float, float, float]:
        """Where a hand would set the robot down after a flip: x m, y m, heading rad."""

    def in_hindsight(self, batch: Batch, future: np.ndarray, rng: np.random.Generator) -> Batch:
        """A sampled batch with `spec.hindsight` of its goals drawn again; `future` (n, o): later observations."""


def shipped() -> list[str]:
    """Names of the tasks in the package."""
    return sorted(p.stem for p in _SHIPPED.glob("*.toml"))


def load(source: str) -> TaskSpec:
    """A shipped task by name, or a task file by path. Raises TaskError with file, key and remedy."""
    path = _SHIPPED / f"{source}.toml" if source in shipped() else Path(source)
    if path.suffix != ".toml" or not path.is_file():
        names = ", ".join(shipped())
        raise TaskError(f"no task {source!r}: give a shipped one ({names}), the path of a .toml file, or gym:<id>")
    try:
        return parse(path.read_text(encoding="utf-8"), path.stem, source)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{source}: cannot be read: {error}") from None


def parse(text: str, name: str, file: str = "task") -> TaskSpec:
    """A TaskSpec from TOML text; `file` is what errors name."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"{file}: not valid TOML: {error}") from None
    _check(data, _FILE, file)
    task, course, gate, walk, manipulate, action, twin = (data.get(key, {}) for key in _FILE if key != "checkpoint")
    rows = data.get("checkpoint", [])
    _check(task, _TASK, file, "task.", "robot kind hz episode_s")
    _check(course, _COURSE, file, "course.", "width_m" if "centerline" in course else "")
    _check(gate, dict.fromkeys(gate, _number(0, 1e6)), file, "gate.")
    _check(walk, _WALK, file, "walk.")
    _check(manipulate, _MANIPULATE, file, "manipulate.")
    _check(action, _ACTION, file, "action.", "low high" if action else "")
    _check(twin, dict.fromkeys(twin, _SETTING), file, "twin.")
    for table in data:
        kinds = [kind for kind, tables in KINDS.items() if table in tables]
        if kinds and task["kind"] not in kinds:
            of = " or ".join(kinds)
            raise TaskError(f"{file}: [{table}] is for tasks of kind {of}, not {task['kind']}; remove it")
    for i, row in enumerate(rows):
        _check(row, _PLACE if task["kind"] == "manipulate" else _CHECKPOINT, file, f"checkpoint[{i}].", "at")
    least = {"course": 2, "manipulate": 1}.get(task["kind"], 0)
    if len(rows) < least:
        raise TaskError(f"{file}: a {task['kind']} needs at least {least} [[checkpoint]], found {len(rows)}")
    checkpoints = tuple(Checkpoint(tuple(map(float, row.pop("at"))), **row) for row in rows)
    spec = TaskSpec(
        name, **task, course=CourseSpec(**course), checkpoints=checkpoints, walk=WalkSpec(**walk),
        manipulate=ManipulateSpec(**manipulate), gate=gate, action=action, twin=twin, text=text,
    )  # fmt: skip
    if spec.course.centerline:
        _check_inside(spec, file)
    return spec


def _check_inside(spec: TaskSpec, file: str) -> None:
    try:
        line = Line(np.array(spec.course.centerline), spec.course.loop)
    except TrackError as error:
        raise TaskError(f"{file}: course.centerline: {error}") from None
    free = spec.course.width_m / 2
    for i, checkpoint in enumerate(spec.checkpoints):
        off = abs(line.project(np.array(checkpoint.at))[1])
        if off > free:
            raise TaskError(
                f"{file}: checkpoint[{i}].at = {list(checkpoint.at)} is outside the walls "
                f"({off:.2f} m from the centre line, {free:.2f} m are free); move it inside"
            )


Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, and whether it is


def _check(table: dict[str, Any], rules: dict[str, Rule], file: str, prefix: str = "", required: str = "") -> None:
    for key in (*table, *required.split()):
        if key not in rules:
            raise TaskError(f"{file}: unknown key {prefix}{key}; valid are {', '.join(rules)}")
        if key not in table:
            raise TaskError(f"{file}: {prefix}{key} is missing; it must be {rules[key][0]}")
    for key, value in table.items():
        must, fits = rules[key]
        if not fits(value):
            raise TaskError(f"{file}: {prefix}{key} must be {must}, not {value!r:.80}")
        if type(value) is int:  # 10 is as good as 10.0
            table[key] = float(value)


def _number(low: float, high: float) -> Rule:
    # type(), because True is an int; nan and infinity fail the comparison
    return f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high


def _is_point(value: Any, size: int = 2) -> bool:
    return isinstance(value, list) and len(value) == size and all(map(_number(-1e5, 1e5)[1], value))


def _rises(value: list[float]) -> bool:
    return len(value) == 2 and value[0] <= value[1]


_TABLE: Rule = ("a table", lambda v: isinstance(v, dict))
_TABLES: Rule = ("[[checkpoint]] tables", lambda v: isinstance(v, list) and all(map(_TABLE[1], v)))
_FILE: dict[str, Rule] = {
    "task": _TABLE, "course": _TABLE, "checkpoint": _TABLES, "gate": _TABLE, "walk": _TABLE,
    "manipulate": _TABLE, "action": _TABLE, "twin": _TABLE,
}  # fmt: skip
_TASK: dict[str, Rule] = {
    "robot": (
        "the name of a robot in the catalog, not a module path",
        lambda v: isinstance(v, str) and v.replace("-", "").replace("_", "").isalnum(),
    ),
    "kind": (f"one of {', '.join(KINDS)}", lambda v: v in tuple(KINDS)),
    "hz": _number(0.1, 1000),
    "episode_s": _number(0.1, 1e6),
    "hindsight": _number(0, 1),
}
_COURSE: dict[str, Rule] = {
    "loop": ("true or false", lambda v: isinstance(v, bool)),
    "width_m": _number(0.01, 100),
    "centerline": ("4 or more points [x, y] in m", lambda v: type(v) is list and len(v) > 3 and all(map(_is_point, v))),
}
_WALK: dict[str, Rule] = {
    "reward": (f"one of {', '.join(REWARDS['walk'])}", lambda v: v in REWARDS["walk"]),
    "speed_mps": _number(0.05, 10),
}
_MANIPULATE: dict[str, Rule] = {
    "reward": (f"one of {', '.join(REWARDS['manipulate'])}", lambda v: v in REWARDS["manipulate"]),
    "area": (
        "two corners [x, y] in m, the nearer and the further one",
        lambda v: type(v) is list and len(v) == 2 and all(map(_is_point, v)) and _rises([v[0][0], v[1][0]])
        and _rises([v[0][1], v[1][1]]),
    ),
    "spread_m": _number(0, 0.1),
}
_END: Rule = ("a list of numbers, one an action", lambda v: type(v) is list and all(map(_number(-1e6, 1e6)[1], v)))
_ACTION: dict[str, Rule] = {"low": _END, "high": _END}
_SETTING: Rule = (
    "a text, a number or a pair [low, high] of numbers",
    lambda v: type(v) is str or _END[1](v if type(v) is list else [v]) and (type(v) is not list or _rises(v)),
)
_CHECKPOINT: dict[str, Rule] = {"at": ("a point [x, y] in m", _is_point), "radius_m": _number(0.01, 100)}
_PLACE: dict[str, Rule] = {
    "at": ("a point [x, y, z] in m", lambda v: _is_point(v, 3)),
    "radius_m": _number(0.001, 1),
    "of": ("tool or object", lambda v: v in ("tool", "object")),
    "near": ("map or object", lambda v: v in ("map", "object")),
}
