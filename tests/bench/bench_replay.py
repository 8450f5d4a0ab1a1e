"""What replay costs: adding a step, drawing a learner's step of mini-batches, memory. Medians of interleaved runs.

python tests/bench/bench_replay.py [--calls 60] [--out bench_replay.json]
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tether.agents.replay import Batch, Replay, Strata

OBS, ACT = 48, 12
UTD, BATCH = 20, 256
SMALL, LARGE = 10_000, 1_000_000
SIDES = {64: 20_000, 128: 10_000}  # of an image: frames stored, a quarter and half a gigabyte
CACHES_BYTES = 64 << 20  # more than the processor keeps


def steps(rng: np.random.Generator, side: int = 0) -> list[Any]:
    """Episodes of 200 steps, to be added again and again; with images of `side`."""
    rows = rng.standard_normal((1000, OBS)).astype(np.float32)
    frames = rng.integers(0, 256, (1000, side, side, 3), np.uint8)
    return [
        SimpleNamespace(
            obs=row, prev_action=row[:ACT].clip(-1, 1), action=None if i % 200 == 199 else row[:ACT].clip(-1, 1),
            reward=float(row[0]), terminated=False, truncated=False, train=True, takeover=i % 50 == 0,
            images={"camera": frame},
        )
        for i, (row, frame) in enumerate(zip(rows, frames, strict=True))
    ]  # fmt: skip


def fill(replay: Replay, source: list[Any], count: int) -> float:
    """Add `count` steps; the microseconds each took."""
    start = time.thread_time()
    for i in range(count):
        replay.add("a", source[i % len(source)])
    return (time.thread_time() - start) / count * 1e6


def medians(measured: dict[str, Callable[[], float]], calls: int) -> dict[str, float]:
    """Of each function's value, called in turn; the processor's caches hold none of it, as after an update."""
    caches, values = np.zeros(CACHES_BYTES, np.uint8), {name: [] for name in measured}
    for _ in range(calls + 1):
        for name, function in measured.items():
            caches += 1
            values[name].append(function())
    return {name: float(np.median(found[1:])) for name, found in values.items()}


def drawing(draw: Callable[[], Batch]) -> Callable[[], float]:
    """The milliseconds of one draw."""

    def timed() -> float:
        start = time.thread_time()
        draw()
        return (time.thread_time() - start) * 1e3

    return timed


def state(calls: int) -> dict[str, float]:
    """Buffers of 10,000 and of 1,000,000 steps side by side, both full: their oldest steps are overwritten."""
    rng = np.random.default_rng(0)
    source = steps(rng)
    tracemalloc.start()
    large = Replay(LARGE, OBS, ACT)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    rings = {"10k": Replay(SMALL, OBS, ACT), "1m": large}
    for ring in rings.values():
        fill(ring, source, ring.capacity)
    measured: dict[str, Callable[[], float]] = {}
    for name, ring in rings.items():
        measured[f"add_{name}_us"] = lambda ring=ring: fill(ring, source, 400)
        online, half, future = (Strata(ring, ring, UTD, BATCH, future) for future in (False, False, True))
        measured[f"sample_{name}_ms"] = drawing(lambda online=online: online.draw(rng, 0.0))
        measured[f"strata_{name}_ms"] = drawing(lambda half=half: half.draw(rng, 0.5))
        measured[f"future_{name}_ms"] = drawing(lambda future=future: future.draw(rng, 0.5))
    out = medians(measured, calls)
    return out | {"state_mb_per_million": taken / 1e6, "state_of_raw": taken / (LARGE * 4 * (OBS + 2 * ACT + 2))}


def images(side: int, calls: int) -> dict[str, float]:
    """A ring of images of side x side x 3, and drawing one mini-batch of stacks of three."""
    rng, capacity = np.random.default_rng(0), SIDES[side]
    source, raw = steps(rng, side), capacity * side * side * 3
    tracemalloc.start()
    plain = Replay(capacity, OBS, ACT)
    alone = tracemalloc.get_traced_memory()[0]
    ring = Replay(capacity, OBS, ACT, images={"camera": (side, side, 3)})
    taken = tracemalloc.get_traced_memory()[0] - alone
    tracemalloc.stop()
    del plain
    fill(ring, source, capacity)
    strata = Strata(ring, ring, 1, BATCH)
    out = medians({
        f"image_{side}_add_us": lambda: fill(ring, source, 100),
        f"image_{side}_sample_ms": drawing(lambda: strata.draw(rng, 0.0)),
    }, calls)  # fmt: skip
    return out | {f"image_{side}_frames_of_raw": (taken - alone) / raw, f"image_{side}_with_state_of_raw": taken / raw}


def replay(calls: int = 60) -> dict[str, float]:
    """All of it; keys end in their unit, `of_raw` is bytes taken over bytes of the numbers stored."""
    found = state(calls)
    for side in SIDES:
        found |= images(side, calls)
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=60, help="measured calls of each kind")
    parser.add_argument("--out", type=Path, default=Path("bench_replay.json"))
    arguments = parser.parse_args()
    found = replay(arguments.calls)
    for name, value in found.items():
        print(f"{name:32} {value:12,.4g}")
    arguments.out.write_text(json.dumps(found, indent=1))
    print(arguments.out)


if __name__ == "__main__":
    main()
