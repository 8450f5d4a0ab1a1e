"""Everything that is measured, in one go: the update, the twin, the policy, the link, the whole learner. Prints
tables, then the JSON.

    make bench
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from tether.drivers.base import Reading
from tether.launch import catalog, evaluate, onboard
from tether.launch.flight import FlightRecorder
from tether.launch.learner import Journal
from tether.launch.spool import Spool
from tether.launch.transport import ActorLink, LearnerLink
from tether.robot_env.env import RobotEnv
from tether.robot_env.record import Record, encode

from tests.bench.bench_replay import replay
from tests.bench.bench_stack import actors, first, stack

HERE = Path(__file__).parent
REPEATS = 5


def median(values: list[float]) -> float:
    return float(np.median(values))


def twin() -> dict[str, float]:
    """Simulated over processor seconds of car-loop's twin with sensors, gate and observation: pure pursuit. And physics
    steps a second of each twin with its sensors alone: the car drives straight on, the dog trots on the spot."""
    task = catalog.make_task(catalog.load_spec("car-loop"))
    speeds, out = [], {}
    for seed in range(REPEATS):
        env = catalog.make_env(task, seed=seed)
        assert isinstance(env, RobotEnv)
        start = time.process_time()
        driven = evaluate.drive(env, evaluate.pursuit(env, 2.0, 1.0), steps=300)
        speeds.append(driven["steps"] / task.spec.hz / (time.process_time() - start))
    for name, wish in (("car", lambda t: np.zeros(2)), ("quadruped", trot)):
        steps = [physics(resolve_name(catalog.row(name).twin)(seed=seed), wish) for seed in range(REPEATS)]
        out[f"{name}_physics_steps_s"] = round(median(steps))
    return {"times_real_time": round(median(speeds), 1)} | out


def trot(t: float) -> np.ndarray:
    """(12,) action: thighs and calves of a diagonal pair up while the other's are down, twice a second."""
    phase = 4.0 * np.pi * t + np.pi * np.array([0, 1, 1, 0]).repeat(3)
    return 0.4 * np.sin(phase) * np.tile([0.0, 1.0, -1.0], 4)


def physics(robot: Any, wish: Callable[[float], np.ndarray], seconds: float = 20.0, hz: float = 20.0) -> float:
    """Steps per processor second of a twin that is read and written `hz` times a second."""
    robot.open()
    start = time.process_time()
    while robot.now() < seconds:
        robot.write(robot.command.to_command(wish(robot.now())))
        robot.sleep(1.0 / hz)
        robot.read()
    return float(seconds / robot.world.dt / (time.process_time() - start))


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


def link() -> dict[str, float]:
    """Both ends of the link in this process: many records at once, and one record with leave to go on as the answer."""
    spec = catalog.load_spec("car-loop")
    channels, command = catalog.declaration(spec)
    meta = catalog.stream_meta(spec)
    reading = Reading({c.name: np.zeros(c.size, np.float32) for c in channels}, {c.name: 0.0 for c in channels})
    action, rates, trips, seq = np.zeros(len(command.names), np.float32), [], [], 0

    def send(count: int) -> None:
        nonlocal seq
        for _ in range(count):
            seq += 1
            record = Record(seq, 0.1 * seq, reading, action, 1.0, False, False, "policy", 0, {})
            actor.send(seq, encode(record))

    learner = LearnerLink("tcp://127.0.0.1:*", meta, {}, lambda meta, first, payloads: len(payloads), {})
    actor = ActorLink(learner.address)
    actor.begin(meta)
    for _ in range(REPEATS):
        start, got = time.perf_counter(), 0
        send(2000)
        while got < 2000:
            got += len(learner.poll(10.0))
        rates.append(got / (time.perf_counter() - start))
        for _ in range(100):
            start = time.perf_counter()
            send(1)
            learner.poll(10.0)
            learner.set_run_until({meta.stream: seq})
            actor.wait_run_until(seq, 10.0)
            trips.append(1e3 * (time.perf_counter() - start))
    actor.close()
    learner.close()
    return {"records_per_s": round(median(rates)), "round_trip_ms": round(median(trips), 3)}


def cost() -> dict[str, float]:
    """What durability and safety add: to an actor's tick (gate, plausibility, record, spool on disk, flight recorder)
    and to a learner's step (journal, synced before the record is acknowledged)."""
    spec = catalog.load_spec("car-loop")
    env = catalog.make_env(catalog.make_task(spec))
    assert isinstance(env, RobotEnv)
    env.reset()
    env.robot.read = lambda: fresh  # the twin's own time does not count
    meta, gate, reading = catalog.stream_meta(spec), env.gate, env.reading
    ticks, busy, records = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        spool, flight = Spool(Path(folder) / "spool" / meta.stream, meta), FlightRecorder(meta)
        for seq in range(1, 2001):
            wish = np.array([0.0, 0.1 * (seq % 7)])
            now = env.robot.now() + 0.001 * seq  # time goes on, and the reading with it
            fresh = Reading(reading.values, dict.fromkeys(reading.stamps, now))
            start, used = time.perf_counter(), time.thread_time()
            env._read()
            command, *_ = gate.step(now, fresh, wish)
            action = env.robot.command.to_action(command)
            record = Record(seq, now, fresh, action, 0.0, False, False, "policy", 0, {})
            records.append(encode(record))
            flight(record)
            spool.append(seq, records[-1])
            busy.append(1e3 * (time.thread_time() - used))
            ticks.append(1e3 * (time.perf_counter() - start))
            spool.ack(seq)
        spool.close()
        journal, stored, waited = Journal(Path(folder) / "steps"), [], []
        for seq, payload in enumerate(records, 1):
            start, used = time.perf_counter(), time.thread_time()
            journal(meta, seq, [payload])  # one record a message, as with one actor that streams
            stored.append(1e3 * (time.thread_time() - used))
            waited.append(1e3 * (time.perf_counter() - start))
        journal.close()
    env.close()
    rows = {"tick": ticks, "tick_cpu": busy, "store_cpu": stored, "store_wait": waited}
    return {f"{k}_p{q}_ms": round(float(np.percentile(v, q)), 3) for k, v in rows.items() for q in (50, 99)}


def main() -> None:
    update = HERE / "update.json"
    subprocess.run([sys.executable, str(HERE / "bench_update.py"), "--out", str(update)], check=True)
    results: dict[str, Any] = {"update": json.loads(update.read_text())}
    update.unlink()
    for bench in (replay, twin, policy, link, cost, stack, actors, first):
        results[bench.__name__] = bench()
        print(f"{bench.__name__}: {results[bench.__name__]}")
    out = Path("bench.json")
    out.write_text(json.dumps(results, indent=1))
    print(out)


if __name__ == "__main__":
    main()
