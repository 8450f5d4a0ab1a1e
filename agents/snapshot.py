"""Saved training state: written beside, verified, then renamed, so that a crash never costs the last one.

    snapshots/000007/{task.safetensors, counters.json, sha256.json}    snapshots/latest: the text "000007"

The experience itself is not in here; it is in the run's records.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

COUNTERS = "counters.json"
SUMS = "sha256.json"  # of the other files
LATEST = "latest"
_TEMPORARY = ".writing-"
# as files that are not ours make them
_DAMAGED = (OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class SnapshotError(RuntimeError):
    """A snapshot that cannot be written or used: where, why, and what to do."""


@dataclass(frozen=True)
class Snapshot:
    """What `load` found. `warning` is empty, or says which snapshots were damaged and which one was used."""

    path: Path
    states: dict[str, Any]  # by policy name, shaped like the templates
    counters: dict[str, Any]
    warning: str


def save(
    folder: str | os.PathLike[str], states: Mapping[str, Any], counters: Mapping[str, Any], keep: int = 3
) -> Path:
    """Write a snapshot into `folder`, point `latest` to it and remove all but the newest `keep`.

    `states`: a pytree of arrays (PRNG keys too) for each policy name; `counters`: anything JSON holds, such
    as the state of NumPy's default generator. Returns the snapshot's folder. Raises SnapshotError; whatever
    goes wrong, the snapshots before stay as they are.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_TEMPORARY}*"):  # of a crash
            shutil.rmtree(left)
        name = f"{max([int(p.name) for p in _all(folder)], default=0) + 1:06d}"
        temporary = folder / f"{_TEMPORARY}{name}"
        temporary.mkdir()
        files = {f"{policy}.safetensors": pack_arrays(_flatten(state)) for policy, state in states.items()}
        files[COUNTERS] = json.dumps(counters, indent=1).encode()
        files[SUMS] = _manifest({file: _sum(payload) for file, payload in files.items()})
        for file, payload in files.items():
            _write(temporary / file, payload)
        _read(temporary)  # what is on the disk, not what should be
        _sync(temporary)
        path = temporary.rename(folder / name)
        _sync(folder)  # before any other is removed
        _write(folder / f"{LATEST}.new", name.encode())
        os.replace(folder / f"{LATEST}.new", folder / LATEST)
        for old in _all(folder)[keep:]:
            shutil.rmtree(old)
    except (OSError, TypeError, ValueError) as error:
        for left in folder.glob(f"{_TEMPORARY}*"):  # the records need the room
            shutil.rmtree(left, ignore_errors=True)
        raise SnapshotError(f"{folder}: snapshot not written: {error}; the ones before are intact") from error
    return path


def load(folder: str | os.PathLike[str], templates: Mapping[str, Any]) -> Snapshot | None:
    """The newest snapshot that is intact, or None where none was ever written.

    `templates`: for each policy name a state of the same structure, shapes and types (a fresh one).
    Raises SnapshotError when all are damaged, or when an intact snapshot does not fit the templates: a part
    of an agent is never restored.
    """
    folder = Path(folder)
    damaged: list[str] = []
    for path in _all(folder):
        try:
            counters, payloads = _read(path)
        except _DAMAGED as error:
            damaged.append(f"{path.name} ({error})")
            continue
        files = {name: f"{name}.safetensors" for name in templates}
        if payloads.keys() != set(files.values()):
            raise SnapshotError(f"{path} holds {sorted(payloads)}, this run needs {sorted(files.values())}")
        states = {k: _restore(f"{path}: {k}", t, payloads[files[k]]) for k, t in templates.items()}
        warning = f"damaged snapshots: {', '.join(damaged)}; using {path.name}" if damaged else ""
        return Snapshot(path, states, counters, warning)
    if damaged:
        raise SnapshotError(f"{folder}: every snapshot is damaged: {', '.join(damaged)}; start a new run")
    return None


def widened(narrow: Any, wide: Any, at: int) -> Any:
    """A state of an agent that observes more, with all that one learned that observes less.

    `narrow`: its state; `wide`: a fresh one; `at`: where what is new begins among the observed numbers. New inputs have
    no weight yet, so that it acts and values as before.
    """

    def leaf(path: tuple[Any, ...], old: jax.Array, fresh: jax.Array) -> jax.Array:
        for axis, (size, more) in enumerate(zip(old.shape, fresh.shape, strict=True)):
            if size < more:
                new = jax.lax.slice_in_dim(fresh, at, at + more - size, axis=axis)
                new *= "kernel" not in jax.tree_util.keystr(path)
                before, behind = jax.numpy.split(old, [at], axis)
                old = jax.numpy.concatenate([before, new, behind], axis)
        return old

    return jax.tree_util.tree_map_with_path(leaf, narrow, wide)


def _all(folder: Path) -> list[Path]:
    """Complete snapshots, newest first."""
    return sorted((p for p in folder.glob("[0-9]*") if p.name.isdigit()), key=lambda p: -int(p.name))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Counters and packed states, all checked. Raises one of _DAMAGED."""
    manifest = (path / SUMS).read_bytes()
    sums = json.loads(manifest)
    if manifest != _manifest(sums) or any(Path(file).name != file for file in sums):
        raise ValueError(f"{SUMS} is not as it was written")
    payloads = {file: (path / file).read_bytes() for file in sums}
    for file, payload in payloads.items():
        if _sum(payload) != sums[file]:
            raise ValueError(f"{file} has another checksum")
    return json.loads(payloads.pop(COUNTERS)), payloads


def _manifest(sums: dict[str, str]) -> bytes:
    return json.dumps(sums, indent=1).encode()


def _sum(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _plain(leaf: Any) -> Any:
    """A PRNG key as its words."""
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _flatten(state: Any) -> dict[str, np.ndarray]:
    """NumPy copies of all leaves by path: "critic_opt/0/mu/dense0_kernel"."""
    named = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {named(path): np.array(_plain(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _restore(where: str, template: Any, payload: bytes) -> Any:
    arrays, fresh = parse_arrays(payload), _flatten(template)
    for name in sorted(arrays.keys() | fresh.keys()):
        saved, needed = _shape(arrays.get(name)), _shape(fresh.get(name))
        if saved != needed:
            raise SnapshotError(
                f"{where}/{name} is {saved}, this run needs {needed}: give the settings it was saved with"
            )
    leaves, structure = jax.tree.flatten(template)
    values = [jax.numpy.array(arrays[name]) for name in fresh]
    for i, leaf in enumerate(leaves):
        if _plain(leaf) is not leaf:
            values[i] = jax.random.wrap_key_data(values[i], impl=jax.random.key_impl(leaf))
    return jax.tree.unflatten(structure, values)


def _shape(array: np.ndarray | None) -> str:
    return "absent" if array is None else f"{array.dtype}{list(array.shape)}"


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Wait until the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
