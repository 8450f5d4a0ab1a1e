"""The critic updates of `rlpd` and `droq` as one compiled function of our own: `native.cpp`, for CPUs.

It is built once with the machine's C++ compiler and kept in the cache folder; without it nothing changes but speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .networks import LAYER_EPSILON

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("c++", "g++", "clang++")
# not -ffast-math: NaN must stay NaN, and it would change how the whole process treats small numbers
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-w", "-ffp-contract=fast",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
)  # fmt: skip
TARGET = "tether_update"


class NativeError(RuntimeError):
    """The native update cannot be had here: why, and what to do."""


def cache_folder() -> Path:
    """Where tether keeps what it can make again: ~/.cache/tether. Raises RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tether"


def _processor() -> str:
    """What `-march=native` means here: a library of another machine would not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor()


@cache
def load() -> None:
    """Build the library if it is not in the cache yet, and make it known to XLA. Raises NativeError."""
    include = jax.ffi.include_dir()
    made_of = "\0".join((SOURCE.read_text(), *FLAGS, jax.__version__, platform.machine(), _processor()))
    try:
        folder = cache_folder()
    except RuntimeError as error:
        raise NativeError(f"agent.native has no folder to be built in: {error}; set XDG_CACHE_HOME") from None
    library = folder / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            choices = " or ".join(COMPILERS)
            raise NativeError(f"agent.native needs a C++ compiler, {choices}; install one, or leave it out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                built = Path(beside) / "native.so"
                command = [compiler, *FLAGS, f"-I{include}", str(SOURCE), "-o", str(built)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise NativeError(f"agent.native: {' '.join(command)} failed: {done.stderr.strip()[-500:]}")
                code = built.read_bytes()
                built.write_bytes(code + hashlib.sha256(code).digest())  # the loader does not look behind the code
                built.replace(library)  # as a whole: two runs may build at once
        except OSError as error:
            raise NativeError(f"agent.native: {folder}: {error}") from None
    try:
        whole = library.read_bytes()
        if hashlib.sha256(whole[:-32]).digest() != whole[-32:]:  # loading it could end the process
            raise OSError("damaged")
        function = getattr(ctypes.CDLL(str(library)), TARGET)
    except OSError as error:
        raise NativeError(f"agent.native: {library}: {error}; remove it") from None
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(function), platform="cpu")


def critics(
    cfg: Any, online: dict[str, Any], target: dict[str, Any], opt: Any, batches: dict[str, jax.Array],
    next_action: jax.Array, bonus: jax.Array, members: jax.Array, words: jax.Array,
) -> tuple[dict[str, Any], dict[str, Any], Any, jax.Array, jax.Array]:  # fmt: skip
    """`utd` updates of the critics: new parameters, target and optimiser state, losses and values (utd,).

    `online`, `target`: parameters; `opt`: of optax.adam; `members` (utd, subset) of the target's minimum;
    `words` (utd, 2, layers, 2) uint32: keys of the dropout masks of target and online pass.
    Raises NativeError where the library cannot be built.
    """
    load()
    blocks = [("dense", ("kernel", "bias"))] + [("norm", ("scale", "bias"))] * cfg.layer_norm
    names = [f"{b}{i}_{leaf}" for i in range(len(cfg.hidden)) for b, leaves in blocks for leaf in leaves]
    names += ["value_kernel", "value_bias"]
    leaves = [tree[name] for tree in (online, target, opt[0].mu, opt[0].nu) for name in names]
    rows = (
        jnp.concatenate([batches["obs"], batches["action"]], -1),
        jnp.concatenate([batches["next_obs"], next_action], -1),
        batches["reward"], batches["discount"], bonus, members.astype(jnp.int32), words, opt[0].count,
    )  # fmt: skip
    utd = bonus.shape[0]
    shapes = [jax.ShapeDtypeStruct((utd,), jnp.float32)] * 2 + [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    call = jax.ffi.ffi_call(TARGET, shapes, input_output_aliases={len(rows) + i: 2 + i for i in range(len(leaves))})
    numbers = {
        "kept": 1.0 / (1.0 - cfg.dropout), "lr": cfg.critic_lr, "b1": cfg.adam_b1, "b2": 0.999, "eps": 1e-8,
        "tau": cfg.tau, "epsilon": LAYER_EPSILON,
    }  # fmt: skip
    numbers = {name: np.float32(value) for name, value in numbers.items()}
    dropped = np.uint32(int(cfg.dropout * 2**32))  # as in networks.dropout_mask
    losses, values, *made = call(*rows, *leaves, norm=cfg.layer_norm, dropped=dropped, **numbers)
    n = len(names)
    params, average, mu, nu = (dict(zip(names, made[i : i + n], strict=True)) for i in range(0, 4 * n, n))
    first = opt[0]._replace(count=opt[0].count + utd, mu=mu, nu=nu)
    return params, average, (first, *opt[1:]), losses, values
