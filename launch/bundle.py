"""Freezing a trained policy into a folder that runs onboard, and refusing to where it would not do.

The format is `launch/onboard.py`'s, which reads it; a copy of that file goes into the bundle as `run.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..drivers.base import Channel, Command
from ..robot_env.safety import Limits
from ..robot_env.task import TaskSpec
from . import catalog, onboard
from .onboard import Bundle, BundleError, Policy

MAX_CHECKED = 1000  # recorded observations to compare the two runtimes on
TIMED = 1000  # forward passes the latency comes from
MAX_ERROR = 1e-5  # relative, float32
PERIOD_SHARE = 0.5  # of the control period that the policy may take, p99
FILES = {"policy.json", "weights.safetensors", "run.py", "__pycache__"}


@dataclass(frozen=True)
class Trained:
    """One policy to freeze, and what it is checked on: n recorded observations and JAX's answers."""

    spec: Mapping[str, Any]  # as onboard.Policy takes it
    weights: Mapping[str, np.ndarray]
    observations: np.ndarray  # (n, o)
    prev_actions: np.ndarray  # (n, a)
    expected: np.ndarray  # (n, a) mean actions of the training runtime


def export(
    out: str | os.PathLike[str], policies: Mapping[str, Trained], task: TaskSpec, origin: Mapping[str, str | int]
) -> dict[str, Any]:
    """Check the policies (by name; `task` is the one that drives), then write the bundle.

    `origin` says where it comes from (run, task, git, preset). Returns what was checked. Raises BundleError,
    with the figures, for a policy unequal to its training runtime or too slow for its rate, and for an `out`
    that is there and no bundle; then nothing is written.
    """
    folder = Path(out).resolve()
    _free(folder)
    checked = {name: _check(name, trained, task.hz) for name, trained in policies.items()}
    weights = {
        f"{name}/{key}": np.ascontiguousarray(value, np.float32)
        for name, trained in policies.items()
        for key, value in trained.weights.items()
    }
    files = {"weights.safetensors": save(weights), "run.py": Path(onboard.__file__).read_bytes()}
    spec = {
        "format": onboard.FORMAT,
        "version": onboard.VERSION,
        **_declared(task),
        "gate": _fields(catalog.limits(task)),
        "task": task.text,
        "from": dict(origin),
        "policies": {name: dict(trained.spec) for name, trained in policies.items()},
        "checked": checked,
    }
    checksums = {name: hashlib.sha256(payload).hexdigest() for name, payload in files.items()}
    spec["checksums"] = checksums | {"policy.json": onboard.digest(spec)}
    files["policy.json"] = json.dumps(spec, indent=1, allow_nan=False).encode()
    _write(folder, files)
    return checked


def check_robot(bundle: Bundle, task: TaskSpec) -> None:
    """Raise BundleError with the difference unless the bundle was made for this task's robot and rate."""
    wanted = _declared(task)
    robot, made = _flat(wanted), _flat({key: bundle.spec[key] for key in wanted})
    found = [
        f"{key} is {json.dumps(made.get(key))} in the bundle, {json.dumps(robot.get(key))} on the robot"
        for key in robot | made
        if robot.get(key) != made.get(key)
    ]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise BundleError(
            f"{bundle.folder}: made for another robot: {'; '.join(found[:3])}{more}; "
            "use a bundle exported for this one"
        )


def _declared(task: TaskSpec) -> dict[str, Any]:
    """What an observation is made of and an action means. Latencies differ from rig to rig."""
    channels, command = catalog.declaration(task)
    observation = [_fields(channel) for channel in channels]
    for row in observation:
        del row["latency_s"]
    return {"observation": observation, "action": _fields(command), "hz": float(task.hz)}


def _fields(source: Channel | Command | Limits) -> dict[str, Any]:
    """As JSON takes it, which has no infinity: None is "no limit"."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, np.ndarray)):
            return [plain(v) for v in np.asarray(value).tolist()]
        return None if value in (math.inf, -math.inf) else value

    # how a robot is led by its tool is code, and no matter of policies
    return {name: plain(value) for name, value in vars(source).items() if name != "tool"}


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """{"observation.1.scale.2": 3.0, ...}: the leaves of nested objects and lists."""
    if not isinstance(value, (dict, list)):
        return {where[1:]: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for k, v in items for key, leaf in _flat(v, f"{where}.{k}").items()}


def _check(name: str, trained: Trained, hz: float) -> dict[str, Any]:
    """Compare and time one policy."""
    policy = Policy(trained.spec, trained.weights)
    observations, previous, expected = trained.observations, trained.prev_actions, trained.expected
    actions = np.stack([policy.act(o, p) for o, p in zip(observations, previous, strict=True)])
    error = float(np.abs(actions - expected).max() / max(np.abs(expected).max(), 1e-3))
    if not error <= MAX_ERROR:  # also when it is not a number
        raise BundleError(
            f"policy {name}: NumPy and the training runtime differ by {error:.1e} relative on {len(actions)} "
            f"observations, at most {MAX_ERROR:.0e} is allowed; nothing was written"
        )
    timed = [np.resize(rows, (TIMED, rows.shape[1])) for rows in (observations, previous)]
    took = onboard.latency_ms(policy, *timed)
    allowed = PERIOD_SHARE * 1000 / hz
    if took["p99"] >= allowed:
        raise BundleError(
            f"policy {name}: p99 latency {took['p99']:.3g} ms, at {hz:g} Hz it must stay below "
            f"{allowed:.3g} ms; use smaller layers or a lower rate; nothing was written"
        )
    return {"observations": len(actions), "max_error": error, "latency_ms": took}


def _free(folder: Path) -> None:
    """Raise BundleError unless `folder` may be written: absent, empty, or a bundle and nothing else."""
    if not folder.exists():
        return
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else {folder.name}
    ours = "policy.json" in names <= FILES and onboard.FORMAT in (folder / "policy.json").read_text()
    if names and not ours:
        raise BundleError(f"{folder}: is there and not (only) a bundle; give another --out")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files or none: written beside, read back, renamed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            new = Path(beside) / "new"
            new.mkdir()
            for name, payload in files.items():
                (new / name).write_bytes(payload)
            onboard.load_bundle(new)
            if folder.exists():
                folder.rename(Path(beside) / "old")
            new.rename(folder)
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error.strerror}; give another --out") from None
