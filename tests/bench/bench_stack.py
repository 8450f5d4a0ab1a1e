"""What a learner costs around its update, in CPU seconds of its process; ratios of medians of interleaved chunks.

python tests/bench/bench_stack.py stack [--chunks 9] [--updates 30]    one actor that streams, on all cores
python tests/bench/bench_stack.py actors [--seconds 30]    16 actors x 50 steps/s on core 1, the learner on core 0
python tests/bench/bench_stack.py first    seconds from process start to first update, cold and warm cache

Bare: `update` over and over on one ready batch. Learner: the real one, with link, journal, replay, metrics, weights
sent, fed by another process. Both in one process, in turn: they share the compiled update and the weather.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

OBS, ACT, HZ = 48, 12, 50.0
EPISODE = 1000  # steps
SAC = ["agent.algorithm=rlpd", "agent.ensemble=2", "agent.subset=2", "agent.utd=20", "agent.batch=256",
       "agent.hidden=[256,256]", "learner.publish_every=1", "learner.max_lead=20"]  # fmt: skip
ACTORS = 16
STOPPED_S = 0.5  # a load that is so late was stopped


class Stand(gymnasium.Env):
    """Nothing but the spaces of a quadruped."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACT,), np.float32)
    metadata = {"render_fps": HZ, "render_modes": []}


gymnasium.register("TetherBench-v0", Stand, max_episode_steps=EPISODE)
TASK = "gym:TetherBench-v0"


def stream(address: str, task: str, actors: int, hz: float, steps: int) -> None:
    """The load: gym-like records over so many links, `hz` each or (0) as fast as run_until lets one."""
    from tether.drivers.base import Reading
    from tether.launch import catalog
    from tether.launch.transport import ActorLink
    from tether.robot_env.record import Record, encode

    spec = catalog.load_spec(task)
    channels, command = catalog.declaration(spec)
    rng, links, made = np.random.default_rng(0), [], 0
    for _ in range(actors):
        link = ActorLink(address)
        link.start(60.0)
        link.begin(catalog.stream_meta(spec))
        links.append(link)
    while not links[0].weights(1.0):
        pass
    start, seq = time.monotonic(), 0
    while not links[0].stopped and not (steps and made >= steps):
        seq += 1
        made += 1
        for i, link in enumerate(links):
            early = start + (made + i / actors) / hz - time.monotonic() if hz else 0.0  # not all at once
            time.sleep(max(early, 0.0))
            start += -early if early < -STOPPED_S else 0.0  # it is not made up for
            if not hz and not link.wait_run_until(made, 1.0) and link.stopped:
                break
            values = {c.name: rng.standard_normal(c.size).astype(np.float32) for c in channels}
            reading = Reading(values, dict.fromkeys(values, made / spec.hz))
            action = rng.uniform(-1, 1, len(command.names)).astype(np.float32)
            if seq % (EPISODE + 1) == 0:
                action = None
            ended = seq % (EPISODE + 1) == EPISODE
            link.send(seq, encode(Record(seq, made / spec.hz, reading, action, 1.0, False, ended, "policy", 0, {})))
            link.weights()
        made -= seq % (EPISODE + 1) == 0
    rate = made / (time.monotonic() - start)
    left = sum(link.close(60.0) for link in links)
    print(json.dumps({"sent": seq, "left": left, "steps_per_s": rate}))


class Bench:
    """A learner in this process, and its bare update."""

    def __init__(self, task: str, settings: list[str], folder: Path) -> None:
        import jax
        from tether.launch import catalog, config
        from tether.launch.learner import Job, Learner
        from tether.launch.log import Log

        spec = catalog.load_spec(task)
        chosen = config.load("cpu", spec.kind, [*settings, "learner.start_steps=300", "learner.steps=1000000000"])
        folder.mkdir(parents=True)
        self.task, self.jax = task, jax
        self.log = Log(folder, stream=open(os.devnull, "w"))
        self.learner = Learner(Job(spec, chosen, folder), self.log)
        self.learner.ready()
        self.trainer = self.learner.trainer
        agent, algorithm = self.trainer.agent, self.trainer._algorithm
        n, m = self.trainer.task.observation_size, len(self.trainer.task.rest)
        rng, lead = np.random.default_rng(1), (agent.utd, agent.batch)
        widths = {"obs": (n,), "action": (m,), "prev_action": (m,), "next_obs": (n,), "next_prev_action": (m,),
                  "reward": (), "discount": ()}  # fmt: skip
        batches = {k: rng.uniform(-1, 1, (*lead, *w)).astype(np.float32) for k, w in widths.items()}
        self._batches = jax.device_put(batches, self.trainer._split)
        self._state = jax.tree.map(lambda x: x.copy(), self.trainer.state)
        self._update = lambda state: algorithm.update(agent, state, self._batches)

    def bare(self, updates: int) -> float:
        """CPU s of an update."""
        start, metrics = time.process_time(), None
        for _ in range(updates):
            self.jax.block_until_ready(metrics)  # as the learner: one in flight
            self._state, metrics = self._update(self._state)
        self.jax.block_until_ready(self._state)
        return (time.process_time() - start) / updates

    def turns(self, updates: int) -> float:
        """CPU s of an update with all that a learner does around it."""
        enough = self.trainer.updates + updates * self.trainer.agent.utd
        return self.until(lambda: self.trainer.updates >= enough)

    def until(self, done: Callable[[], bool]) -> float:
        """As `turns`, until `done`."""
        start, before = time.process_time(), self.trainer.updates
        while not done():
            self.learner._turn()
        self.jax.block_until_ready(self.trainer.state)
        updates = (self.trainer.updates - before) / self.trainer.agent.utd
        return (time.process_time() - start) / updates

    @contextmanager
    def fed(self, actors: int, hz: float, steps: int = 0, core: int | None = None) -> Iterator[subprocess.Popen]:
        """While a process streams."""
        command = [sys.executable, __file__, "stream", self.learner.link.address, "--task", self.task,
                   "--actors", str(actors), "--hz", str(hz), "--steps", str(steps)]  # fmt: skip
        before = os.sched_getaffinity(0)
        if core is not None:
            os.sched_setaffinity(0, {core})  # a child has its parent's
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(0, before)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def close(self) -> None:
        """Let go of everything."""
        self.learner.link.close()
        self.learner.journal.close()
        self.log.close()


def medians(bare: list[float], whole: list[float]) -> dict[str, float]:
    """In ms of CPU, and their ratio."""
    a, b = float(np.median(bare)), float(np.median(whole))
    return {"bare_ms": round(1e3 * a, 3), "learner_ms": round(1e3 * b, 3), "ratio": round(b / a, 3)}


def stack(chunks: int = 9, updates: int = 30) -> dict[str, Any]:
    """One actor streams as fast as it may."""
    found = {}
    for name, task, settings in (("sac E2 UTD20 256x256", TASK, SAC), ("car-loop cpu", "car-loop", [])):
        with tempfile.TemporaryDirectory() as folder, closing(Bench(task, settings, Path(folder) / "run")) as bench:
            more = updates * 20 // bench.trainer.agent.utd
            with bench.fed(1, 0.0):
                bench.turns(3)
                bench.bare(3)
                pairs = [(bench.bare(more), bench.turns(more)) for _ in range(chunks)]
        found[name] = medians(*map(list, zip(*pairs, strict=True)))
        print(name, found[name], flush=True)
    return found


def actors(seconds: float = 30.0) -> dict[str, Any]:
    """16 actors at 50 steps/s each from one process on core 1, the learner on core 0. In a process of its own: JAX
    counts the cores when it starts."""
    command = [sys.executable, __file__, "pinned", "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def pinned(seconds: float) -> dict[str, Any]:
    """What `actors` runs. Weights every 400 of the 800 steps a second, twice a second to each actor."""
    from tether.launch.pump import GATHER_S
    from tether.robot_env.record import read_streams

    os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "run"
        bench = stack.enter_context(closing(Bench(TASK, [*SAC, "learner.publish_every=400"], folder)))
        trainer, link = bench.trainer, bench.learner.link
        with bench.fed(1, 0.0, core=1):
            bench.turns(3)
            pairs = [(bench.bare(20), bench.turns(20)) for _ in range(5)]
        one = medians(*map(list, zip(*pairs, strict=True)))
        before = {path.name for path in (folder / "steps").iterdir()}
        with bench.fed(ACTORS, HZ, round(seconds * HZ), core=1) as load:
            while sum(actor.connected for actor in link.status().values()) < ACTORS:
                bench.learner._turn()
            steps, updates, end, chunks = trainer.steps, trainer.updates, time.monotonic() + seconds, []
            while (now := time.monotonic()) < end:
                cpu, wall = bench.until(lambda until=now + 3.0: time.monotonic() > until), time.monotonic() - now
                load.send_signal(signal.SIGSTOP)  # else the bare update would pay for what arrives
                time.sleep(2 * GATHER_S)  # what is under way is taken
                chunks.append((cpu, bench.bare(5)))
                load.send_signal(signal.SIGCONT)
                end += time.monotonic() - now - wall
            utd = (trainer.updates - updates) / (trainer.steps - steps)
            while load.poll() is None:
                bench.learner._turn()
            told = json.loads(load.stdout.read().splitlines()[-1])  # type: ignore[union-attr]
        many = medians([bare for _, bare in chunks], [cpu for cpu, _ in chunks])
        streams = [(m, r) for m, r in read_streams(folder / "steps") if m.stream not in before]
        whole = all([r.seq for r in records] == list(range(1, told["sent"] + 1)) for _, records in streams)
        return {
            "one_actor": one, "sixteen": many, "to_bare": many["ratio"],
            "to_one_actor": round(many["ratio"] / one["ratio"], 3), "utd": round(utd, 3),
            "steps_per_s": round(told["steps_per_s"] * ACTORS, 1), "records": told["sent"] * ACTORS,
            "nothing_lost": whole and len(streams) == ACTORS and told["left"] == 0,
        }  # fmt: skip


def first(repeats: int = 3) -> dict[str, Any]:
    """Seconds from the start of `tether run` to the metrics of its first update; the actor's start is in there."""
    found: dict[str, Any] = {}
    for preset in ("cpu", "full"):
        cold, warm = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as cache:
                cold.append(_first(preset, cache))
                warm.append(_first(preset, cache))
        found[preset] = {"cold_s": round(float(np.median(cold)), 2), "warm_s": round(float(np.median(warm)), 2)}
        print(preset, found[preset], flush=True)
    return found


def _first(preset: str, cache: str) -> float:
    settings = ["learner.start_steps=1", "learner.log_every=1"]
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "run", time.monotonic()
        command = [sys.executable, "-m", "tether.launch.cli", "run", "car-loop", "--preset", preset, "--out", str(out)]
        command += [part for one in settings for part in ("--set", one)]
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        process = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            file = out / "metrics.jsonl"
            while not (file.is_file() and "learn/critic_loss" in file.read_text()):
                if process.poll() is not None:
                    raise RuntimeError(f"tether run ended with {process.returncode}")
                time.sleep(0.01)
            return time.monotonic() - start
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stack", "actors", "first", "pinned", "stream"])
    parser.add_argument("address", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--chunks", type=int, default=9, help="how often in turn (stack)")
    parser.add_argument("--updates", type=int, default=30, help="calls of `update` in a chunk (stack)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load (actors)")
    for name, kind in (("task", str), ("actors", int), ("hz", float), ("steps", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.what == "stream":
        stream(o.address, o.task, o.actors, o.hz, o.steps)
        return
    run = {"stack": lambda: stack(o.chunks, o.updates), "actors": lambda: actors(o.seconds), "first": first,
           "pinned": lambda: pinned(o.seconds)}[o.what]  # fmt: skip
    print(json.dumps(run()))


if __name__ == "__main__":
    main()
