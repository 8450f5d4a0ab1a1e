"""`make link`: what the link costs a robot's loop and how fast it comes back, on this machine, as a table and JSON."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tether.launch import catalog
from tether.launch.spool import Spool
from tether.launch.transport import ActorLink, LearnerLink
from tether.robot_env import task as tasks
from tether.robot_env.rate import Rate
from tether.robot_env.record import Record, encode

from tests.chaos import ends
from tests.chaos.nemesis import PROCESSES, Nemesis
from tests.chaos.proxy import Proxy
from tests.conftest import free_address, square

HZ = 20.0
PATIENCE = 60.0
MBIT_S = 20e6 / 8  # bytes/s of the slow line


def drive(address: str, folder: Path, stream: str, out: Path) -> None:
    """An actor in real time on the fake robot, behind its gate, until SIGTERM; writes how late its ticks were."""
    ends._enter(folder)
    spec = tasks.parse(square().replace("hz = 10", f"hz = {HZ:g}"), "square", "square")
    env = catalog.make_env(catalog.make_task(spec))
    robot = env.robot

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        robot.sleep(seconds)

    env.rate = Rate(HZ, time.monotonic, sleep)
    meta = replace(ends.SPEC, stream=stream)
    link, history = ActorLink(address), ends.made(folder, stream)
    link.begin(meta, PATIENCE, Spool(folder / "spool" / stream, meta))
    busy, cpu = [], []  # ms a record costs the loop

    def send(record: Record) -> None:
        began, used = time.perf_counter(), time.thread_time()
        payload = encode(record)
        history[record.seq - 1] = ends.checksum(payload)
        link.send(record.seq, payload)
        link.weights()
        busy.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.thread_time() - used))

    env.on_record.append(send)
    rng, missed_at = np.random.default_rng(0), []
    env.reset()
    while not ends.ENDING:
        before = env.rate.late
        _, _, terminated, truncated, _ = env.step(np.array([rng.uniform(-0.3, 0.3), 0.5], np.float32))
        if terminated or truncated:
            env.reset()
        if env.rate.late > before:
            missed_at.append(time.monotonic())
    link.close(PATIENCE)
    result: dict[str, Any] = {"missed_at": missed_at, "ticks": len(busy), "missed": env.rate.late}
    result |= {"link_ms": _row(busy), "link_cpu_ms": _row(cpu)}
    result["lateness_ms"] = {key: round(value, 2) for key, value in env.rate.lateness_ms().items()}
    out.write_text(json.dumps(result))


def loop(stops: int, stop_s: float, control_s: float = 0.0) -> dict[str, Any]:
    """The loop's missed ticks while the learner is stopped `stops` times; or, with none, for `control_s`."""
    folder = Path(tempfile.mkdtemp(prefix="tether-measure-"))
    stream, address, out = "a" * 16, free_address(), folder / "out.json"
    ends.new_history(folder, stream)
    learner = PROCESSES.Process(target=ends.learner, args=(address, folder), daemon=True)
    learner.start()
    actor = PROCESSES.Process(target=drive, args=(address, folder, stream, out), daemon=True)
    actor.start()
    seen, made = ends.seen(folder, stream), ends.made(folder, stream)

    def await_stored(number: int) -> None:
        ends_at = time.monotonic() + PATIENCE
        while seen[0] < number:
            assert time.monotonic() < ends_at and actor.is_alive(), folder / "log.txt"
            time.sleep(0.002)

    await_stored(20)
    began, caught_up, backlogs, edges = time.monotonic(), [], [], []
    for _ in range(stops):
        edges.append(time.monotonic())
        os.kill(learner.pid, signal.SIGSTOP)
        time.sleep(stop_s)
        backlog = int(np.count_nonzero(made))
        backlogs.append(backlog - int(seen[0]))
        os.kill(learner.pid, signal.SIGCONT)
        on = time.monotonic()
        await_stored(backlog)
        caught_up.append(time.monotonic() - on)
        edges.append(on)
        time.sleep(2.0)
    if not stops:
        time.sleep(control_s)
    seconds = time.monotonic() - began
    for process in (actor, learner):
        os.kill(process.pid, signal.SIGTERM)
        process.join(PATIENCE)
        assert process.exitcode == 0, folder / "log.txt"
    result = json.loads(out.read_text())
    missed_at = result.pop("missed_at")  # of a busy machine's misses few follow a stop or its end
    result["missed_1s_after_an_edge"] = sum(any(0 <= at - edge < 1.0 for edge in edges) for at in missed_at)
    found = {"seconds": round(seconds, 1), **result}
    if stops:
        found |= {"stops": stops, "stop_s": stop_s, "backlog_max": max(backlogs),
                  "share_of_outage_max": round(max(caught_up) / stop_s, 4)}  # fmt: skip
    return found


def after_stall(times: int, stall_s: float, seed: int = 0) -> dict[str, Any]:
    """Seconds from the end of a stall to the first record the learner stores."""
    with Nemesis(Path(tempfile.mkdtemp(prefix="tether-measure-")), seed, HZ, actors=1) as nemesis:
        found = [nemesis.stall_for(stall_s) for _ in range(times)]
        totals = nemesis.finish()
    return {"stall_s": stall_s, "times": times, "first_s": {"p50": round(statistics.median(found), 3),
            "max": round(max(found), 3)}, "lost": totals["lost"], "doubled": totals["doubled"]}  # fmt: skip


def weights(nbytes: int, delay_s: float) -> dict[str, Any]:
    """Weights over a slow line, while records are sent and acknowledged."""
    learner = LearnerLink("tcp://127.0.0.1:*", ends.SPEC, {}, lambda meta, first, rows: len(rows), {})
    proxy = Proxy(learner.address)
    link = ActorLink(proxy.address)
    robot, acks, seq = ends.Fake(), [], 0
    robot.open()
    try:
        link.begin(replace(ends.SPEC, stream="b" * 16), PATIENCE)
        before = proxy.connections
        proxy.bytes_per_s, proxy.delay_s = MBIT_S, delay_s
        learner.publish(1, {"w": np.ones(nbytes // 4, np.float32)})
        began = time.monotonic()
        while link.weights() is None:
            seq += 1
            sent = time.monotonic()
            assert sent - began < PATIENCE
            link.send(seq, encode(ends.example(seq, robot)))
            assert link._pump.wait(lambda: not len(link._spool), PATIENCE)
            acks.append(1e3 * (time.monotonic() - sent))
            learner.poll()
            time.sleep(max(0.0, sent + 1 / HZ - time.monotonic()))
        seconds = time.monotonic() - began
        disconnects = proxy.connections - before
    finally:
        link.close()
        learner.close()
        proxy.close()
    return {"mb": nbytes / 1e6, "mbit_s": 20, "delay_ms": 1e3 * delay_s, "seconds": round(seconds, 2),
            "disconnects": disconnects, "ack_ms": _row(acks)}  # fmt: skip


def _row(values: list[float]) -> dict[str, float]:
    p50, p99, longest = np.percentile(values, [50, 99, 100])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(float(longest), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--stalls", type=int, default=5)
    parser.add_argument("--out", default="link.json")
    options = parser.parse_args()
    found: dict[str, Any] = {}

    def tell(name: str, row: dict[str, Any]) -> None:
        found[name] = row
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    for delay_s in (0.0, 0.005):
        tell(f"weights, {1e3 * delay_s:g} ms each way", weights(8_000_000, delay_s))
    tell("after a stall", after_stall(options.stalls, 9.0))
    tell("learner stopped", loop(options.stops, 10.0))
    tell("control run", loop(0, 0.0, found["learner stopped"]["seconds"]))
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    print(Path(options.out).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
