"""What a training computes on, and the folder that keeps what was compiled for it."""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from .config import RunError

CACHE_BYTES = 512 << 20  # those used longest ago go first


def mesh(devices: int, batch: int) -> Mesh:
    """The first `devices` of this machine, to split every batch of `batch` rows between. Raises RunError."""
    found = jax.devices()
    if devices > len(found):
        raise RunError(f"--devices {devices}: this machine has {len(found)} ({found[0].device_kind})")
    if batch % devices:
        raise RunError(f"--devices {devices}: agent.batch = {batch} cannot be split evenly; use a multiple")
    return Mesh(np.array(found[:devices]), ("batch",))


def keep_compiled() -> None:
    """Keep what JAX compiles in ~/.cache/tether/jax, where it is not told another folder; before it compiles.

    A folder that cannot be written is not used: then it compiles each time.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tether" / "jax"
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder, CACHE_BYTES)
        tempfile.TemporaryFile(dir=folder).close()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compiling.folder = folder


class Compiling:
    """Where something is compiled, in any thread: a cache that cannot be read or written is emptied, silently.

    JAX compiles what it cannot read and goes on, but never replaces it.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # of the cache
        self._lock, self._inside = threading.Lock(), 0
        self._catch = warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        with self._lock:  # who catches warnings catches those of all threads
            if not self._inside:
                self._catch = warnings.catch_warnings(record=True)
                self._caught = self._catch.__enter__()
                warnings.simplefilter("always")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            self._catch.__exit__(None, None, None)
            for each in self._caught or ():
                if "persistent compilation cache" not in str(each.message):
                    warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
                elif self.folder is not None:
                    with suppress(OSError):
                        _prune(self.folder, -1)  # empty files too


compiling = Compiling()


def _prune(folder: Path, most: int) -> None:
    """Remove the files used longest ago until those left have at most `most` bytes."""
    files = sorted(((path.stat(), path) for path in folder.rglob("*") if path.is_file()), key=lambda f: -f[0].st_atime)
    for stat, path in files:
        most -= stat.st_size
        if most < 0:
            path.unlink(missing_ok=True)
