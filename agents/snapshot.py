"""Saved training state: written beside, verified, then renamed, so that a crash never costs the last one.

    snapshots/000007/{task.safetensors, manifest.json}    snapshots/latest: the text "000007"

The experience itself is not in here; it is in the run's records.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

FORMAT = "tether-snapshot"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_TEMPORARY = ".writing-"


class SnapshotError(RuntimeError):
    """A snapshot that cannot be written or used: where, why, and what to do."""


class _Damaged(Exception):
    """This snapshot is not what was written; another one may be."""


@dataclass(frozen=True)
class Snapshot:
    """What `load` found. `warning` is empty, or says which snapshots were damaged and which one was used."""

    path: Path
    states: dict[str, Any]  # by policy name, shaped like the templates
    counters: dict[str, Any]
    generators: dict[str, np.random.Generator]
    warning: str


def save(
    folder: str | os.PathLike[str],
    states: Mapping[str, Any],
    counters: Mapping[str, Any],
    generators: Mapping[str, np.random.Generator],
    keep: int = 3,
) -> Path:
    """Write a snapshot into `folder`, point `latest` to it and remove all but the newest `keep`.

    `states`: a pytree of arrays (PRNG keys too) for each policy name; `counters`: anything JSON holds;
    `generators`: NumPy's default ones. Returns the snapshot's folder. Raises SnapshotError; whatever goes
    wrong, the snapshots before stay as they are.
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
        for file, payload in files.items():
            _write(temporary / file, payload)
        made = {
            "format": FORMAT,
            "version": VERSION,
            "counters": dict(counters),
            "generators": {k: _generator_state(k, g) for k, g in generators.items()},
            "files": {file: hashlib.sha256(payload).hexdigest() for file, payload in files.items()},
        }
        manifest = json.loads(json.dumps(made))  # as it will be read: the keys are text
        _write(temporary / MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1).encode())
        _sync(temporary)
        _read(temporary)  # what is on the disk, not what should be
        path = temporary.rename(folder / name)
        _write(folder / f"{LATEST}.new", name.encode())
        os.replace(folder / f"{LATEST}.new", folder / LATEST)
        _sync(folder)
        for old in _all(folder)[keep:]:
            shutil.rmtree(old)
    except (OSError, _Damaged, TypeError, ValueError) as error:
        raise SnapshotError(f"{folder}: snapshot not written: {error}; the ones before are intact") from error
    return path


def load(folder: str | os.PathLike[str], templates: Mapping[str, Any]) -> Snapshot | None:
    """The newest snapshot that is intact, or None where none was ever written.

    `templates`: for each policy name a state of the same structure, shapes and types (a fresh one).
    Raises SnapshotError when all are damaged, when the format is another one's, or when an intact snapshot
    does not fit the templates: a part of an agent is never restored.
    """
    folder = Path(folder)
    damaged: list[str] = []
    found = _candidates(folder)
    for path in found:
        try:
            manifest, payloads = _read(path)
            arrays = {file: parse_arrays(payload) for file, payload in payloads.items()}
        except (_Damaged, OSError, SafetensorError) as error:
            damaged.append(f"{path.name} ({error})")
            continue
        _same("policies", path, {f"{name}.safetensors" for name in templates}, set(arrays))
        states = {k: _restore(path, k, t, arrays[f"{k}.safetensors"]) for k, t in templates.items()}
        generators = {k: _generator(v) for k, v in manifest["generators"].items()}
        warning = f"damaged snapshots: {', '.join(damaged)}; using {path.name}" if damaged else ""
        return Snapshot(path, states, manifest["counters"], generators, warning)
    if damaged:
        raise SnapshotError(f"{folder}: every snapshot is damaged: {', '.join(damaged)}; start a new run")
    return None


def _all(folder: Path) -> list[Path]:
    """Complete snapshots, newest first."""
    return sorted((p for p in folder.glob("[0-9]*") if p.name.isdigit()), key=lambda p: -int(p.name))


def _candidates(folder: Path) -> list[Path]:
    """What `latest` names, then the others, newest first."""
    found = _all(folder)
    try:
        latest = (folder / LATEST).read_text()
    except (OSError, UnicodeDecodeError):  # gone or damaged: the newest will do
        latest = ""
    return sorted(found, key=lambda p: p.name != latest)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and payloads of a snapshot, all checked. Raises _Damaged, or SnapshotError for its format."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        found, claimed = (manifest["format"], manifest["version"]), manifest.pop("sha256")
    except FileNotFoundError:
        raise _Damaged(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise _Damaged(f"{MANIFEST} is unreadable") from None
    if found != (FORMAT, VERSION):  # first: another version may count its checksums otherwise
        raise SnapshotError(
            f"{path}: format {found[0]!r} version {found[1]!r}; this tether reads {FORMAT!r} "
            f"version {VERSION}: resume with the version that wrote it, or start a new run"
        )
    if _digest(manifest) != claimed:
        raise _Damaged(f"{MANIFEST} has another checksum")
    payloads = {}
    for file, digest in manifest["files"].items():
        try:
            payloads[file] = (path / file).read_bytes()
        except FileNotFoundError:
            raise _Damaged(f"{file} is missing") from None
        if hashlib.sha256(payloads[file]).hexdigest() != digest:
            raise _Damaged(f"{file} has another checksum")
    return manifest, payloads


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path: "critic_opt/0/mu/dense0_kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _flatten(state: Any) -> dict[str, np.ndarray]:
    """NumPy copies of all leaves; a PRNG key as its words."""
    return {k: np.array(jax.random.key_data(v) if _is_key(v) else v) for k, v in _named(state).items()}


def _restore(path: Path, policy: str, template: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    leaves = _named(template)
    _same(f"weights of {policy!r}", path, set(leaves), set(arrays))
    out = []
    for name, leaf in leaves.items():
        key = _is_key(leaf)
        want, got = jax.random.key_data(leaf) if key else leaf, arrays[name]
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            raise SnapshotError(
                f"{path}: {policy}/{name} is {got.dtype}{list(got.shape)}, this run needs "
                f"{want.dtype}{list(want.shape)}: resume with the settings it was saved with"
            )
        value = jax.numpy.array(got)
        out.append(jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if key else value)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(template), out)


def _same(what: str, path: Path, ours: set[str], theirs: set[str]) -> None:
    if ours != theirs:
        raise SnapshotError(
            f"{path}: {what} differ: this run lacks {sorted(theirs - ours)[:3]}, the snapshot lacks "
            f"{sorted(ours - theirs)[:3]}: resume with the settings it was saved with"
        )


def _generator_state(name: str, generator: np.random.Generator) -> Mapping[str, Any]:
    if not isinstance(generator.bit_generator, np.random.PCG64):
        raise TypeError(f"generator {name!r} is not one of np.random.default_rng")
    return generator.bit_generator.state


def _generator(state: Mapping[str, Any]) -> np.random.Generator:
    generator = np.random.default_rng()
    generator.bit_generator.state = state
    return generator


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the folder's entries durable (POSIX; elsewhere a folder cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
