"""Where things are kept: run folders, their names, and what a stream says of itself."""

from __future__ import annotations

from pathlib import Path

from ..robot_env.record import Meta
from ..robot_env.task import TaskSpec
from . import catalog


class RunError(ValueError):
    """A run folder that cannot be used; the message says which, why and what to do."""


def stream_meta(spec: TaskSpec) -> Meta:
    """What a new stream of records says of itself."""
    channels, command = catalog.declaration(spec)
    return Meta.of(robot=spec.robot, task=spec.text, hz=spec.hz, channels=channels, command=command)


def new_folder(parent: str, name: str) -> Path:
    """The first of parent/name-1, -2, … that is free."""
    for n in range(1, 100_000):
        path = Path(parent) / f"{name}-{n}"
        if not path.exists():
            return path
    raise RunError(f"{parent} has too many folders called {name}-N; remove some or give --out")


def point_latest(folder: Path) -> None:
    """Make runs/latest point to the newest run, where it lies in a folder called runs."""
    link = Path("runs") / "latest"
    link.parent.mkdir(exist_ok=True)
    fresh = link.with_name(f".latest-{folder.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.resolve())
    fresh.replace(link)
