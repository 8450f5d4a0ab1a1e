"""What a training computes on, and the folder that keeps what was compiled for it."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..agents.native import cache_folder
from .config import RunError

CACHE_BYTES = 512 << 20  # those used longest ago go first


def mesh(devices: int, agent: Any) -> Mesh:
    """The first `devices` of this machine, to split every batch of an agent between. Raises RunError.

    Native updates are computed on the CPU, whatever else there is.
    """
    native, batch = getattr(agent, "native", False), agent.batch
    found = jax.devices("cpu") if native else jax.devices()
    if native and devices > 1:
        raise RunError(f"agent.native computes on one CPU: leave it out, or --devices {devices}")
    if devices > len(found):
        raise RunError(f"--devices {devices}: this machine has {len(found)} ({found[0].device_kind})")
    if batch % devices:
        raise RunError(f"--devices {devices}: agent.batch = {batch} cannot be split evenly; use a multiple")
    return Mesh(np.array(found[:devices]), ("batch",))


def full_precision() -> None:
    """Matrix products in float32 wherever they are computed: a GPU would take TF32, with 10 bits, and the policy that
    runs onboard would be another one than was trained. A CPU has nothing else."""
    jax.config.update("jax_default_matmul_precision", "highest")


def keep_compiled() -> None:
    """Keep what JAX compiles in ~/.cache/tether/jax, where it is not told another folder; before it compiles.

    A folder that cannot be written is not used, and a file that cannot be read neither: then it compiles again.
    """
    warnings.filterwarnings("ignore", ".*persistent compilation cache")  # is how JAX says so
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = cache_folder() / "jax"
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder, CACHE_BYTES)
        tempfile.TemporaryFile(dir=folder).close()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _prune(folder: Path, most: int) -> None:
    """Remove the files used longest ago until those left have at most `most` bytes."""
    files = sorted(((path.stat(), path) for path in folder.rglob("*") if path.is_file()), key=lambda f: -f[0].st_atime)
    for stat, path in files:
        most -= stat.st_size
        if most < 0:
            path.unlink(missing_ok=True)
