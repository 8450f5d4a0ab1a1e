"""Task files: what is read from TOML, checked, and said when it is wrong."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..drivers.base import Command, Reading

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("course",)  # walk and manipulate come with their robots
MAX_FILE_BYTES = 4_000_000
_SHIPPED = Path(__file__).parent / "tasks"


class TaskError(ValueError):
    """A task file that cannot be used: the message names file, key and remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A place the task passes through: reached when closer than `radius_m` (m, map frame)."""

    at: tuple[float, ...]
    radius_m: float


@dataclass(frozen=True)
class CourseSpec:
    """The `[course]` table. Without a centre line the floor is open."""

    loop: bool = True
    width_m: float = 0.0
    centerline: tuple[tuple[float, float], ...] = ()


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
    gate: dict[str, float] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one step brought. `events` are what a person and the metrics hear of (`collision`, `lap_time_s`…)."""

    reward: float
    terminated: bool
    truncated: bool
    events: dict[str, float]
    reset: bool = False  # the robot must recover before it can go on


class Recovery(Protocol):
    """A reset in progress: asked for one wish a tick until it has none."""

    needs_hand: bool  # what motion cannot undo: a person, or the twin, must set the robot upright

    def wish(self, reading: Reading) -> np.ndarray | None:
        """(n,) action-unit wish (it may leave the action box), or None when the robot can try again."""
        ...


class Task(Protocol):
    """A task's behaviour: pure functions of readings, folded over a stream through `progress`."""

    spec: TaskSpec
    observation_size: int
    relabels: bool  # reward and termination can be computed from readings alone
    rest: np.ndarray  # (n,) the action of a robot at rest: what was "executed" before the first step
    start: tuple[float, float, float]  # where a twin is placed, x m, y m, heading rad

    def walls(self) -> list[np.ndarray]:
        """Closed polylines (k, 2) in m that a twin puts up."""
        ...

    def begin(self, reading: Reading) -> Any:
        """Progress at the first reading of a stream."""
        ...

    def observe(self, progress: Any, reading: Reading, action: np.ndarray) -> np.ndarray:
        """(observation_size,) float32 from a reading and the action executed before it."""
        ...

    def advance(self, progress: Any, action: np.ndarray, reading: Reading) -> Outcome:
        """Move `progress` to the reading that followed `action`; the outcome of that step."""
        ...

    def recover(self, command: Command, reading: Reading, outcome: Outcome) -> Recovery:
        """The reset after `outcome`."""
        ...


    def spot(self, reading: Reading) -> tuple[float, float, float]:
        """Where a hand would set the robot down after a flip: x m, y m, heading rad."""
        ...


    def in_hindsight(
        self, batch: dict[str, np.ndarray], future: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """A sampled batch with `spec.hindsight` of its goals drawn again; `future` (n, o): later observations."""
        ...


def shipped() -> list[str]:
    """Names of the tasks in the package."""
    return sorted(p.stem for p in _SHIPPED.glob("*.toml"))


def load(source: str) -> TaskSpec:
    """A shipped task by name, or a task file by path. Raises TaskError with file, key and remedy."""
    path = Path(source)
    if source in shipped():
        return parse(_SHIPPED.joinpath(f"{source}.toml").read_text(encoding="utf-8"), source, source)
    if path.suffix == ".toml" and path.is_file():
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TaskError(f"{source}: larger than {MAX_FILE_BYTES} bytes; this is not a task file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{source}: cannot be read: {error}") from None
        return parse(text, path.stem, source)
    raise TaskError(
        f"no task {source!r}: give a shipped one ({', '.join(shipped())}), the path of a .toml file, or gym:<id>"
    )


def parse(text: str, name: str, file: str = "task") -> TaskSpec:
    """A TaskSpec from TOML text; `file` is what errors name."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"{file}: not valid TOML: {error}") from None
    _keys(data, file, "", ("task", "course", "checkpoint", "gate"))
    task = _table(data, "task", file)
    _keys(task, file, "task.", ("robot", "kind", "hz", "episode_s", "hindsight"))
    for key in ("robot", "kind", "hz", "episode_s"):
        if key not in task:
            raise TaskError(f"{file}: [task] {key} is missing; add it, as in car-loop.toml")
    kind = _text(task["kind"], file, "task.kind")
    if kind not in KINDS:
        raise TaskError(f"{file}: task.kind = {kind!r} is unknown; this version has {', '.join(KINDS)}")
    course = _course(_table(data, "course", file), file)
    spec = TaskSpec(
        name=name,
        robot=_text(task["robot"], file, "task.robot"),
        kind=kind,
        hz=_number(task["hz"], file, "task.hz", 0.1, 1000),
        episode_s=_number(task["episode_s"], file, "task.episode_s", 0.1, 1e6),
        hindsight=_number(task.get("hindsight", 0.0), file, "task.hindsight", 0, 1),
        course=course,
        checkpoints=_checkpoints(data.get("checkpoint", []), file),
        gate={k: _number(v, file, f"gate.{k}", 0, 1e6) for k, v in _table(data, "gate", file).items()},
        text=text,
    )
    _check_inside(spec, file)
    return spec


def _course(table: dict[str, Any], file: str) -> CourseSpec:
    _keys(table, file, "course.", ("loop", "width_m", "centerline"))
    loop = table.get("loop", True)
    if not isinstance(loop, bool):
        raise TaskError(f"{file}: course.loop must be true or false, not {loop!r}")
    line = table.get("centerline", [])
    if not isinstance(line, list):
        raise TaskError(f"{file}: course.centerline must be a list of [x, y] in m")
    points = tuple(_point(p, file, f"course.centerline[{i}]", 2) for i, p in enumerate(line))
    if points and len(points) < 4:
        raise TaskError(f"{file}: course.centerline has {len(points)} points; a course needs at least 4")
    width = _number(table.get("width_m", 0.0), file, "course.width_m", 0, 100)
    if points and width <= 0:
        raise TaskError(f"{file}: course.width_m is missing; say how wide the free way around the centre line is")
    return CourseSpec(loop, width, points)  # type: ignore[arg-type]


def _checkpoints(rows: Any, file: str) -> tuple[Checkpoint, ...]:
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise TaskError(f"{file}: checkpoints are [[checkpoint]] tables with at = [x, y] and radius_m")
    points = []
    for i, row in enumerate(rows):
        _keys(row, file, f"checkpoint[{i}].", ("at", "radius_m"))
        if "at" not in row:
            raise TaskError(f"{file}: checkpoint[{i}].at is missing; add at = [x, y] in m")
        radius = _number(row.get("radius_m", 1.0), file, f"checkpoint[{i}].radius_m", 0.01, 100)
        points.append(Checkpoint(_point(row["at"], file, f"checkpoint[{i}].at", 2), radius))
    if len(points) < 2:
        raise TaskError(f"{file}: a course needs at least 2 [[checkpoint]] tables, found {len(points)}")
    return tuple(points)


def _check_inside(spec: TaskSpec, file: str) -> None:
    if not spec.course.centerline:
        return
    line = np.asarray(spec.course.centerline)
    ends = np.roll(line, -1, axis=0) if spec.course.loop else line[1:]
    starts = line[: len(ends)]
    along = ends - starts
    for i, checkpoint in enumerate(spec.checkpoints):
        point = np.asarray(checkpoint.at[:2])
        t = ((point - starts) * along).sum(1) / np.maximum((along**2).sum(1), 1e-12)
        off = np.linalg.norm(starts + np.clip(t, 0, 1)[:, None] * along - point, axis=1).min()
        if off > spec.course.width_m / 2:
            raise TaskError(
                f"{file}: checkpoint[{i}].at = {list(checkpoint.at)} is outside the walls "
                f"({off:.2f} m from the centre line, {spec.course.width_m / 2:.2f} m are free); move it inside"
            )


def _keys(table: dict[str, Any], file: str, prefix: str, known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            raise TaskError(f"{file}: unknown key {prefix}{key}; valid are {', '.join(known)}")


def _table(data: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise TaskError(f"{file}: [{key}] must be a table")
    return value


def _text(value: Any, file: str, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise TaskError(f"{file}: {key} must be a name in quotes, not {value!r}")
    if not value.replace("-", "").replace("_", "").isalnum():
        raise TaskError(f"{file}: {key} = {value!r}: a name from the catalog, not a module path")
    return value


def _number(value: Any, file: str, key: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TaskError(f"{file}: {key} must be a number, not {value!r}")
    if not low <= value <= high:
        raise TaskError(f"{file}: {key} = {value:g} is out of range; between {low:g} and {high:g}")
    return float(value)


def _point(value: Any, file: str, key: str, size: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != size:
        raise TaskError(f"{file}: {key} must be {size} numbers in m, not {value!r}")
    return tuple(_number(v, file, key, -1e5, 1e5) for v in value)
