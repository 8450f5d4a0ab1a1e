"""What a learner's step costs: drawing the batches and one `rlpd.update`. Medians of interleaved runs.

python tests/bench/bench_update.py [--calls 30] [--out bench_update.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from tether.agents import rlpd
from tether.agents.replay import Replay, minibatches, symmetric

OBS, ACT = 20, 2
SETTINGS = {
    "E2 UTD4": rlpd.Config(ensemble=2, utd=4),
    "E2 UTD4 max_delta": rlpd.Config(ensemble=2, utd=4, max_delta=0.2),
    "E10 UTD20": rlpd.Config(ensemble=10, utd=20),
}


def filled(seed: int, steps: int = 20_000) -> tuple[Replay, float]:
    """A replay of random steps, and the microseconds one `add` takes."""
    rng, replay = np.random.default_rng(seed), Replay(steps, OBS, ACT)
    rows = rng.standard_normal((steps, OBS)).astype(np.float32)
    start = time.perf_counter()
    for i, row in enumerate(rows):
        action = None if i % 200 == 199 else row[:ACT].clip(-1, 1)
        replay.add("a", SimpleNamespace(
            obs=row, prev_action=row[:ACT], action=action, reward=float(row[0]), terminated=False,
            truncated=False, train=True,
        ))  # fmt: skip
    return replay, (time.perf_counter() - start) / steps * 1e6


def learner(cfg: rlpd.Config, online: Replay, prior: Replay) -> Callable[[], tuple[float, float]]:
    """One step of learning as a function that returns the seconds of drawing and of updating."""
    rng, half = np.random.default_rng(0), cfg.utd * cfg.batch // 2
    state = rlpd.init(cfg, jax.random.key(0), OBS, ACT)

    def step() -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        batch = symmetric(online.sample(rng, half), prior.sample(rng, half))
        batches = minibatches(batch, cfg.utd, cfg.batch)
        drawn = time.perf_counter()
        state, metrics = rlpd.update(cfg, state, batches)
        jax.block_until_ready((state, metrics))
        return drawn - start, time.perf_counter() - drawn

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=30, help="measured calls of each setting")
    parser.add_argument("--out", type=Path, default=Path("bench_update.json"))
    arguments = parser.parse_args()
    (online, add_us), (prior, _) = filled(0), filled(1)
    steps = {name: learner(cfg, online, prior) for name, cfg in SETTINGS.items()}
    first = {name: sum(step()) for name, step in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(arguments.calls):
        for name, step in steps.items():
            times[name].append(step())
    print(f"observation {OBS}, action {ACT}, batch 256, 2x256; {os.cpu_count()} cores; add {add_us:.0f} us")
    print(f"{'setting':20} {'update ms':>10} {'p90':>8} {'draw ms':>8} {'share':>7} {'first s':>8}")
    rows = {}
    for name, pairs in times.items():
        draw, update = np.array(pairs).T * 1e3
        rows[name] = {
            "update_ms": float(np.median(update)),
            "update_ms_p90": float(np.percentile(update, 90)),
            "draw_ms": float(np.median(draw)),
            "draw_share": float(np.median(draw) / np.median(update)),
            "first_s": first[name],
        }
        r = rows[name]
        print(
            f"{name:20} {r['update_ms']:10.1f} {r['update_ms_p90']:8.1f} {r['draw_ms']:8.2f} "
            f"{r['draw_share']:7.1%} {r['first_s']:8.1f}"
        )
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__}
    report = {"machine": machine, "calls": arguments.calls, "add_us": add_us, "settings": rows}
    arguments.out.write_text(json.dumps(report, indent=1))
    print(arguments.out)


if __name__ == "__main__":
    main()
