"""Everything that is measured, in one go: the update, the twin, the policy, the link. Prints tables, then the JSON.

    make bench
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tether.launch import catalog, evaluate, onboard
from tether.robot_env.env import RobotEnv

HERE = Path(__file__).parent
REPEATS = 5


def median(values: list[float]) -> float:
    return float(np.median(values))


def twin() -> dict[str, float]:
    """Simulated over wall-clock seconds of car-loop's twin with sensors, gate and observation: pure pursuit."""
    task = catalog.make_task(catalog.load_spec("car-loop"))
    speeds = []
    for seed in range(REPEATS):
        env = catalog.make_env(task, seed=seed)
        assert isinstance(env, RobotEnv)
        start = time.process_time()
        tally = evaluate.drive(env, evaluate.PursuitDriver(env, 2.0, 1.0), steps=300)
        speeds.append(tally.steps / task.spec.hz / (time.process_time() - start))
        env.close()
    return {"times_real_time": round(median(speeds), 1)}


def policy() -> dict[str, float]:
    """One action of a 2 x 128 and a 2 x 256 policy on NumPy, in ms."""
    rng, out = np.random.default_rng(0), {}
    for width in (128, 256):
        spec = {"observation_size": 29, "action_size": 2, "hidden": [width, width], "max_delta": 0.2}
        sizes = {"dense0": (29, width), "dense1": (width, width), "mean": (width, 2), "log_std": (width, 2)}
        weights = {}
        for name, shape in sizes.items():
            weights[f"{name}/kernel"] = rng.standard_normal(shape).astype(np.float32)
            weights[f"{name}/bias"] = np.zeros(shape[1], np.float32)
        act = onboard.Policy(spec, weights).act
        times = []
        for obs in rng.standard_normal((2000, 29)).astype(np.float32):
            start = time.perf_counter()
            act(obs, np.zeros(2, np.float32))
            times.append(1e3 * (time.perf_counter() - start))
        out |= {f"{width}_p50_ms": float(np.percentile(times, 50)), f"{width}_p99_ms": float(np.percentile(times, 99))}
    return {k: round(v, 4) for k, v in out.items()}


def main() -> None:
    update = HERE / "update.json"
    subprocess.run([sys.executable, str(HERE / "bench_update.py"), "--out", str(update)], check=True)
    results: dict[str, Any] = {"update": json.loads(update.read_text())}
    update.unlink()
    for bench in (twin, policy):
        results[bench.__name__] = bench()
        print(f"{bench.__name__}: {results[bench.__name__]}")
    out = Path("bench.json")
    out.write_text(json.dumps(results, indent=1))
    print(out)


if __name__ == "__main__":
    main()
