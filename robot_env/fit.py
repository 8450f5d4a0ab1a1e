"""How a task fits a robot: the channels it needs, what its actions mean, and what its twin is to be like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..drivers.base import Channel, Command
from .record import Meta, Record
from .task import TaskError, TaskSpec


def boxed(spec: TaskSpec, command: Command) -> Command:
    """The robot's command with the action box of the task's `[action]`. Raises TaskError."""
    if not spec.action:
        return command
    ends = {key: tuple(map(float, spec.action[key])) for key in ("low", "high")}
    for key, values in ends.items():
        if len(values) != command.size:
            names = ", ".join(command.names)
            raise TaskError(f"{spec.name}: action.{key} has {len(values)} values, {spec.robot} takes {names}")
    for name, *row in zip(command.names, command.low, ends["low"], ends["high"], command.high, strict=True):
        if not row[0] <= row[1] < row[2] <= row[3]:
            raise TaskError(
                f"{spec.name}: action: {name} from {row[1]:g} to {row[2]:g}: must rise, within the robot's own "
                f"{row[0]:g} to {row[3]:g}"
            )
    return replace(command, action_low=ends["low"], action_high=ends["high"])


def check_channels(spec: TaskSpec, channels: Sequence[Channel], needs: Sequence[str]) -> None:
    """Raise TaskError naming what the task needs and the robot does not read."""
    missing = [name for name in dict.fromkeys(needs) if name not in {c.name for c in channels}]
    if missing:
        raise TaskError(f"{spec.name}: robot {spec.robot} has no channel {', '.join(missing)} for a {spec.kind}")


def translated(meta: Meta, records: list[Record], command: Command) -> list[Record]:
    """Records whose actions mean what they do with `command`: another task may have given them another box."""
    ends = [tuple(end) for end in zip(*(row[1:] for row in meta.command), strict=True)]
    if ends == [command.action_low, command.action_high]:
        return records
    theirs = replace(command, action_low=ends[0], action_high=ends[1])
    return [
        r if r.action is None else r._replace(action=command.to_action(theirs.to_command(r.action))) for r in records
    ]


def check_twin(spec: TaskSpec, twin: Any) -> None:
    """Raise TaskError for what the task's `[twin]` wants of its robot's twin and that cannot be."""
    settings: Mapping[str, tuple[Any, ...]] = getattr(twin, "settings", {})
    for name, value in spec.twin.items():
        if name not in settings:
            has = f"takes {', '.join(settings)}" if settings else "takes none: remove it"
            raise TaskError(f"{spec.name}: unknown key twin.{name}; the twin of {spec.robot} {has}")
        first, *others = settings[name]
        if first == "choices":
            fits, must = value in others, f"one of {', '.join(others)}"
        else:
            ends = value if isinstance(value, list) else [value]
            fits = all(not isinstance(end, str) and first <= end <= others[0] for end in ends)
            must = f"a number from {first:g} to {others[0]:g}, or a pair of them"
        if not fits:
            raise TaskError(f"{spec.name}: twin.{name} must be {must}, not {value!r:.80}")
