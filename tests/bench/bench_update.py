"""What one step of learning costs: every algorithm's update, beside sbx's and SB3's where they are installed.

    python tests/bench/bench_update.py [--calls 9] [--out bench_update.json]

Observation 48, action 12, batch 256, 2 x 256; a call draws its batch and makes 20 critic updates and one of the actor
(CrossQ and XQC as their settings have it). Medians of calls that take turns, so that all have the same weather; the
floor is what the matrix products alone would take at this machine's sgemm rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tether.agents import crossq, droq, native, rlpd, xqc
from tether.agents.replay import Replay, Strata, minibatches
from tether.robot_env.sample import Sample

OBS, ACT, BATCH, WIDTH, UTD = 48, 12, 256, 256, 20
SHAPES = {"E2": 2, "E10": 10}
FILLED = 5_000  # steps in a replay buffer
WARM = 6  # calls before any is measured: an actor that moves now and then is compiled by then, too
Call = Callable[[], None]


def ours(algorithm: Any, **settings: Any) -> Call:
    """A step's batch drawn from a filled replay, as peers' calls draw theirs, and the update on it."""
    cfg = algorithm.Config(**settings)
    rng, state = np.random.default_rng(0), algorithm.init(cfg, jax.random.key(0), OBS, ACT)
    online = Replay(FILLED, OBS, ACT)
    for _ in range(FILLED):
        obs, (previous, action) = rng.standard_normal(OBS), rng.uniform(-1, 1, (2, ACT))
        online.add("a", Sample(obs, previous, action, float(rng.standard_normal()), False, False, True))
    strata = Strata(online, Replay(1, OBS, ACT), cfg.utd, cfg.batch)

    def call() -> None:
        nonlocal state
        batches = minibatches(strata.draw(rng, 0.0), cfg.utd, cfg.batch)
        state, metrics = algorithm.update(cfg, state, batches)
        jax.block_until_ready((state, metrics))

    return call


def peer(package: str, name: str, updates: int, **settings: Any) -> Call:
    """`updates` gradient steps of a learner of sbx or stable_baselines3 on its own filled buffer."""
    import importlib

    import gymnasium
    from stable_baselines3.common.logger import configure

    class Env(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (OBS,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (ACT,), np.float32)

    algorithm = getattr(importlib.import_module(package), name)
    model = algorithm("MlpPolicy", Env(), batch_size=BATCH, buffer_size=20_000, seed=0, **settings)
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    for _ in range(FILLED):
        obs, following = rng.standard_normal((2, 1, OBS)).astype(np.float32)
        model.replay_buffer.add(obs, following, rng.uniform(-1, 1, (1, ACT)), np.zeros(1), np.zeros(1, bool), [{}])
    if package == "sbx":
        return lambda: (model.train(updates, BATCH), jax.block_until_ready(model.policy.qf_state.params))[0]
    return lambda: model.train(updates, BATCH)


def gflop(ensemble: int, subset: int = 2) -> float:
    """Of the matrix products of UTD critic updates and one actor update."""
    critic, actor = [OBS + ACT, WIDTH, WIDTH, 1], [OBS, WIDTH, WIDTH, 2 * ACT]
    q, a = ([2 * BATCH * x * y for x, y in zip(d[:-1], d[1:], strict=True)] for d in (critic, actor))
    update = ensemble * (2 * sum(q) + sum(q[1:])) + subset * sum(q) + sum(a)
    climb = 2 * sum(a) + sum(a[1:]) + ensemble * (sum(q) + sum(q[1:]) + 2 * BATCH * ACT * WIDTH)
    return (UTD * update + climb) / 1e9


def sgemm() -> float:
    """GFLOP/s of NumPy's matrix product, the best of several."""
    a, best = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32), np.inf
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def rivals() -> dict[str, Call]:
    """The calls, by name; those of one shape, and their peers, one after the other."""
    calls: dict[str, Call] = {}
    try:
        native.load()
        compiled = {"": {}, ", native": {"native": True}}
    except native.NativeError as error:
        print(f"without the native update: {error}")
        compiled = {"": {}}
    with_sbx, with_sb3 = (find_spec(package) is not None for package in ("sbx", "stable_baselines3"))
    layers = {"net_arch": [WIDTH, WIDTH], "layer_norm": True}
    for shape, ensemble in SHAPES.items():
        for suffix, settings in compiled.items():
            calls[f"rlpd {shape}{suffix}"] = ours(rlpd, ensemble=ensemble, utd=UTD, **settings)
        if with_sbx:
            kind = {"policy_kwargs": layers | {"n_critics": ensemble}, "policy_delay": UTD}
            calls[f"sbx SAC {shape}"] = peer("sbx", "SAC", UTD, gradient_steps=UTD, **kind)
        if with_sb3:
            kind = {"policy_kwargs": {"net_arch": [WIDTH, WIDTH], "n_critics": ensemble}}
            calls[f"SB3 SAC {shape}, actor each time"] = peer("stable_baselines3", "SAC", UTD, **kind)
    for suffix, settings in compiled.items():
        calls[f"droq{suffix}"] = ours(droq, utd=UTD, **settings)
    if with_sbx:
        kind = {"policy_kwargs": layers | {"n_critics": 2, "dropout_rate": 0.01}, "policy_delay": UTD}
        calls["sbx DroQ"] = peer("sbx", "SAC", UTD, gradient_steps=UTD, **kind)
    calls["crossq"] = ours(crossq)
    if with_sbx:
        calls["sbx CrossQ"] = peer("sbx", "CrossQ", 1)
    calls["xqc"] = ours(xqc)
    return calls


def versus(name: str) -> str:
    """The peer a call is compared with."""
    if name.startswith(("rlpd", "SB3")):
        return f"sbx SAC {'E10' if 'E10' in name else 'E2'}"
    return {"droq": "sbx DroQ", "crossq": "sbx CrossQ"}.get(name.split(",")[0], "")


def measure(calls: int) -> dict[str, Any]:
    """Print the table; return it."""
    running, times = rivals(), {}
    first = {}
    for name, call in running.items():
        start = time.perf_counter()
        call()
        first[name], times[name] = time.perf_counter() - start, []
        for _ in range(WARM):
            call()
    peak = sgemm()
    for _ in range(calls):
        for name, call in running.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    peak = max(peak, sgemm())
    print(f"{os.cpu_count()} cores, sgemm {peak:.0f} GFLOP/s; medians of {calls} calls in turn")
    print(f"{'':32} {'ms':>8} {'of sbx':>7} {'of the floor':>13} {'first s':>8}")
    rows: dict[str, Any] = {}
    for name, found in times.items():
        row = rows[name] = {"ms": float(np.median(found)), "first_s": first[name]}
        other = times.get(versus(name))
        if other is not None:
            row["of_sbx"] = row["ms"] / float(np.median(other))
        if name.startswith(("rlpd", "droq")):
            row["floor_share"] = 1e3 * gflop(10 if "E10" in name else 2) / peak / row["ms"]
        ratio, share = (f"{row[k]:.2f}" if k in row else "" for k in ("of_sbx", "floor_share"))
        print(f"{name:32} {row['ms']:8.1f} {ratio:>7} {share:>13} {row['first_s']:8.1f}")
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__, "sgemm_gflops": peak}
    return {"machine": machine, "calls": calls, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=9, help="measured calls of each")
    parser.add_argument("--out", type=Path, default=Path("bench_update.json"))
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(measure(arguments.calls), indent=1))
    print(arguments.out)


if __name__ == "__main__":
    main()
