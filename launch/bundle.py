"""Freezing a trained policy into a folder that runs onboard, and refusing to where it would not do.

The format is `launch/onboard.py`'s, which reads it; a copy of that file goes into the bundle as `run.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..drivers.base import Channel, Command
from ..robot_env.safety import Limits
from . import onboard
from .onboard import Bundle, BundleError, Policy

MAX_CHECKED = 1000  # recorded observations the two runtimes are compared on
MIN_TIMED = 500  # forward passes the latency comes from
MAX_ERROR = 1e-5  # relative, float32
PERIOD_SHARE = 0.5  # of the control period that the policy may take, p99
_BREAK = re.compile(r"\n\s*")
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
    out: str | os.PathLike[str],
    policies: Mapping[str, Trained],
    channels: Sequence[Channel],
    command: Command,
    hz: float,
    limits: Limits,
    task: str,
    origin: Mapping[str, str | int],
    inputs: Sequence[Channel] = (),
) -> dict[str, Any]:
    """Check the policies (by name; `task` is the one that drives), then write the bundle.

    `task` is the task file's text, `origin` says where it comes from (run, steps, git), `inputs` describes
    what the task appends to the observation. Returns what was checked. Raises BundleError, with the figures,
    for a policy unequal to its training runtime or too slow for its rate, and for an `out` that is there and
    no bundle; then nothing is written.
    """
    folder = Path(out).resolve()
    _free(folder)
    checked = {name: _check(name, trained, hz) for name, trained in policies.items()}
    weights = {
        f"{name}/{key}": np.ascontiguousarray(value, np.float32)
        for name, trained in policies.items()
        for key, value in trained.weights.items()
    }
    files = {"weights.safetensors": save(weights), "run.py": Path(onboard.__file__).read_bytes()}
    sizes = {trained.spec["observation_size"] for trained in policies.values()}
    description: dict[str, Any] = {
        "format": onboard.FORMAT,
        "version": onboard.VERSION,
        "observation": {"size": max(sizes), **_observation(channels), "then": [_channel(c) for c in inputs]},
        "action": _action(command),
        "hz": float(hz),
        "gate": _gate(limits),
        "task": task,
        "from": dict(origin),
        "policies": {name: dict(trained.spec) for name, trained in policies.items()},
        "checked": checked,
    }
    checksums = {name: hashlib.sha256(payload).hexdigest() for name, payload in files.items()}
    description["checksums"] = {"policy.json": onboard.digest(description), **checksums}
    text = json.dumps(description, indent=1, allow_nan=False)
    # lists of numbers on one line, for people (a raw newline is never inside a JSON string)
    text = re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda m: f"[{re.sub(_BREAK, ' ', m[1])}]", text)
    files["policy.json"] = text.encode() + b"\n"
    _write(folder, files)
    return checked


def check_robot(
    bundle: Bundle,
    channels: Sequence[Channel],
    command: Command,
    hz: float | None = None,
    limits: Limits | None = None,
) -> None:
    """Raise BundleError with the difference unless the bundle was made for this robot, rate and limits."""
    wanted: dict[str, Any] = {"observation": _observation(channels), "action": _action(command)}
    if hz is not None:
        wanted["hz"] = float(hz)
    if limits is not None:
        wanted["gate"] = _gate(limits)
    found = [d for key, value in wanted.items() for d in _differences(bundle.spec.get(key), value, key)]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise BundleError(
            f"{bundle.folder}: made for another robot: {'; '.join(found[:3])}{more}; "
            "use a bundle exported for this one"
        )


def _check(name: str, trained: Trained, hz: float) -> dict[str, Any]:
    """Compare and time one policy."""
    policy = Policy(trained.spec, trained.weights)
    n = len(trained.observations)
    if n == 0 or len(trained.prev_actions) != n or np.shape(trained.expected) != (n, policy.action_size):
        raise BundleError(f"policy {name}: nothing recorded to check it on; let the run drive first")
    chosen = np.linspace(0, n - 1, min(n, MAX_CHECKED)).astype(int)
    observations = np.asarray(trained.observations, np.float32)[chosen]
    previous = np.asarray(trained.prev_actions, np.float32)[chosen]
    expected = np.asarray(trained.expected, np.float32)[chosen]
    actions = np.stack([policy.act(o, p) for o, p in zip(observations, previous, strict=True)])
    with np.errstate(invalid="ignore"):
        worst = float(np.abs(actions - expected).max())
    error = worst / max(float(np.abs(expected).max()), 1e-3)
    if not error <= MAX_ERROR:  # also when it is not a number
        raise BundleError(
            f"policy {name}: NumPy and the training runtime differ by {error:.1e} relative on {len(chosen)} "
            f"observations, at most {MAX_ERROR:.0e} is allowed; nothing was written"
        )
    repeats = math.ceil(MIN_TIMED / len(chosen))
    took = onboard.latency_ms(policy, np.tile(observations, (repeats, 1)), np.tile(previous, (repeats, 1)))
    allowed = PERIOD_SHARE * 1000 / hz
    if took["p99"] >= allowed:
        raise BundleError(
            f"policy {name}: p99 latency {took['p99']:.3g} ms, at {hz:g} Hz it must stay below "
            f"{allowed:.3g} ms; use smaller layers or a lower rate; nothing was written"
        )
    return {"observations": len(chosen), "relative_error": error, "latency_ms": took}


def _observation(channels: Sequence[Channel]) -> dict[str, Any]:
    return {"channels": [_channel(c) for c in channels]}


def _channel(channel: Channel) -> dict[str, Any]:
    return {
        "name": channel.name,
        "size": channel.size,
        "unit": channel.unit,
        "hz": float(channel.hz),
        "scale": [float(s) for s in channel.scale],
        "observed": channel.observed,
    }


def _action(command: Command) -> dict[str, Any]:
    texts = {"names": list(command.names), "units": list(command.units)}
    rows = ("action_low", "action_high", "low", "high", "rate", "safe")
    return texts | {row: _numbers(getattr(command, row)) for row in rows}


def _gate(limits: Limits) -> dict[str, Any]:
    rows = {row: _numbers(getattr(limits, row)) for row in ("low", "high", "rate", "safe")}
    return rows | {"max_age_s": {name: float(age) for name, age in sorted(limits.max_age_s.items())}}


def _numbers(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """JSON has no infinity: None is "no limit"."""
    return [float(v) if math.isfinite(v) else None for v in values]


def _differences(bundle: Any, robot: Any, where: str) -> list[str]:
    """One text for each place where what the bundle says is not what the robot says."""
    if isinstance(robot, dict) and isinstance(bundle, dict):
        return [d for k, value in robot.items() for d in _differences(bundle.get(k), value, f"{where}.{k}")]
    if isinstance(robot, list) and isinstance(bundle, list) and len(robot) == len(bundle):
        label = [f"[{r['name'] if isinstance(r, dict) else i}]" for i, r in enumerate(robot)]
        pairs = zip(bundle, robot, label, strict=True)
        return [d for b, r, name in pairs for d in _differences(b, r, f"{where}{name}")]
    if bundle == robot:
        return []
    return [f"{where} is {_short(bundle)} in the bundle, {_short(robot)} on the robot"]


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        value = [v.get("name") for v in value]  # channels
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _free(folder: Path) -> None:
    """Raise BundleError unless `folder` may be written: absent, empty, or a bundle and nothing else."""
    try:
        names = {p.name for p in folder.iterdir()}
        if not names:
            return
        if not names - FILES and "policy.json" in names:
            with open(folder / "policy.json", "rb") as file:
                if onboard.FORMAT.encode() in file.read(200):
                    return
    except FileNotFoundError:
        return
    except OSError:
        pass  # a file, or not ours to read
    raise BundleError(f"{folder}: is there and not (only) a bundle; give another --out")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files or none: written beside, read back, renamed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            new.mkdir()
            for name, payload in files.items():
                with open(new / name, "wb") as file:
                    file.write(payload)
                    file.flush()
                    os.fsync(file.fileno())
            onboard.load_bundle(new)
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error.strerror}; give another --out") from None
