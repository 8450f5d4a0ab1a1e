"""Does an actor ever drive with weights that are not what the learner published? And what does a swap cost it?

    python -m tests.chaos.weights --payloads 10000 --seed 0        (or: make weights)

ends in one line: how many mutated payloads were applied, and the time of a swap in the loop.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import zlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
from safetensors.numpy import save as pack
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import wire
from tether.launch.actor import PROBED, Pilot
from tether.launch.transport import ActorLink, LearnerLink
from tether.launch.wire import Params, Weights, WireError
from tether.robot_env.record import Meta

OBS, ACT = 6, 2
RUNNING = 5  # version of the weights that drive


def spec(hidden: int = 16) -> dict[str, Any]:
    """The layers of a policy."""
    return {"observation_size": OBS, "action_size": ACT, "hidden": [hidden, hidden], "max_delta": None}


def weights(hidden: int = 16, seed: int = 0) -> Params:
    """Weights that fit them."""
    rng = np.random.default_rng(seed)
    sizes = {"dense0": (OBS, hidden), "dense1": (hidden, hidden), "mean": (hidden, ACT), "log_std": (hidden, ACT)}
    kernels = {f"{name}/kernel": rng.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    return kernels | {f"{name}/bias": np.zeros(size[1], np.float32) for name, size in sizes.items()}


def pilot(link: Any, hidden: int = 16) -> Pilot:
    """An actor's Pilot, as far as weights matter; it has seen what an actor sees."""
    env = SimpleNamespace(on_record=[], version=0)
    orders = {"policy": spec(hidden), "random_steps": 0}
    made = Pilot(env, link, lambda: "", orders, seed=0, lockstep=False)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    for _ in range(2 * PROBED):
        made.wish(rng.normal(size=OBS).astype(np.float32), np.zeros(ACT, np.float32))
    return made


class Link:
    """An actor's link of which only the inbox is real."""

    def __init__(self) -> None:
        self.prepare: Any = None
        self.fresh: list[tuple[int, Any]] = []

    def connect(self) -> None:
        """As ActorLink does on each WELCOME."""
        self.inbox = wire.Inbox(self.prepare)

    def weights(self, timeout: float = 0.0) -> tuple[int, Any] | None:
        return self.fresh.pop() if self.fresh else None

    def deliver(self, messages: list[list[bytes]]) -> None:
        """As ActorLink does with what its socket gives it."""
        for frames in messages:
            try:
                message = wire.decode(frames, "learner")
            except WireError:
                continue  # dropped
            if message.kind == "WEIGHTS":
                prepared = self.inbox.take(message.body, **message.fields)
                if prepared is not None:
                    self.fresh.append((message.fields["version"], prepared))


def attack(number: int, seed: int) -> tuple[int, Counter[str]]:
    """How many of so many mutated payloads come to drive, and how often each reason to refuse them was given."""
    rng, applied, reasons = random.Random(seed), 0, Counter[str]()
    for _ in range(number):
        link = Link()
        actor = pilot(link)
        link.connect()
        link.deliver(messages(wire.pack_weights(RUNNING, weights())))
        actor.refresh()
        driving, env = actor._policy, actor._env
        assert driving is not None and env.version == RUNNING
        what = rng.choice(["frame", "header", "body", "bad", "bad", "old"])
        if what != "old" and rng.random() < 0.5:
            link.connect()  # a learner of which nothing is known yet
        link.deliver(mutated(rng, what))
        actor.refresh()
        applied += actor._policy is not driving or env.version != RUNNING
        reasons[link.inbox.refused.partition(": ")[2].split(" (")[0] or "dropped, or never complete"] += 1
    return applied, reasons


def messages(made: Weights) -> list[list[bytes]]:
    """All its chunks, as they are sent."""
    return [made.chunk(at) for at in range(0, len(made.data), wire.CHUNK)]


def mutated(rng: random.Random, what: str) -> list[list[bytes]]:
    """A payload of weights: damaged on its way, made wrong before it was sealed, or older than those that drive."""
    good = weights(seed=2)
    if what == "old":
        return messages(wire.pack_weights(rng.randint(1, RUNNING), good))
    if what == "bad":
        return messages(sealed(RUNNING + 1, spoiled(rng, good)))
    frames = messages(wire.pack_weights(RUNNING + 1, good))
    first = frames[0]
    if what == "frame":  # what a network does; a version says nothing of the weights, and may be any
        at = rng.choice([i for i in range(len(first[0])) if i not in range(*_version(first[0]))])
        part = rng.randrange(2)
        data, at = bytearray(first[part]), rng.randrange(len(first[1])) if part else at
        data[at] ^= 1 << rng.randrange(8)
        first[part] = bytes(data if rng.random() < 0.7 else data[:at])
        return frames
    header, body = msgpack.unpackb(first[0]), bytearray(first[1])
    if what == "header":
        name = rng.choice(["offset", "nbytes", "layout", "sha256"])
        header[name] = rng.randrange(1 << 20) | 1 if type(header[name]) is int else rng.randbytes(32).hex()
    else:
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.5:
            del body[rng.randrange(len(body)) :]
        header["crc"] = zlib.crc32(body)
    return [[msgpack.packb(header), bytes(body)], *frames[1:]]


def _version(header: bytes) -> tuple[int, int]:
    """Where the version's value is in a header."""
    end = header.index(b"version") + len(b"version")
    return end, end + 1


def spoiled(rng: random.Random, params: Params) -> bytes:
    """A safetensors file of weights that must not drive, whoever made it."""
    name = rng.choice(sorted(params))
    array = params[name].copy()
    what = rng.choice(["number", "number", "overflow", "shape", "type", "missing", "more", "renamed", "cut", "junk"])
    if what == "number":
        array.flat[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    elif what == "overflow":  # finite, but inf - inf follows
        params = {key: np.where(value >= 0, 1e38, -1e38).astype(np.float32) for key, value in params.items()}
        array = params[name]
    elif what == "shape":
        array = rng.choice([np.zeros((*array.shape, 2), np.float32), np.append(array, np.float32(0)), array[:-1]])
    elif what == "type":
        array = array.astype(rng.choice([np.float64, np.float16, np.int32]))
    elif what == "renamed":
        params = {key: value for key, value in params.items() if key != name}
        name = name.replace("/", "_")
    elif what == "more":
        name = f"more/{name}"
    params = params | {name: array}
    if what == "missing":
        del params[name]
    data = pack(params)
    if what == "cut":
        return data[: rng.randrange(len(data))]
    if what == "junk":
        return rng.choice([rng.randbytes(rng.randint(1, 4096)), json.dumps(name).encode(), bytes(64)])
    return data


def sealed(version: int, data: bytes) -> Weights:
    """With checksums that match."""
    return Weights(version, data, wire._layout(data), wire._sha256(data), 0.0)


def swaps(number: int, hidden: int = 256) -> dict[str, float]:
    """ms that `Pilot.refresh` takes when it swaps, in a loop of 100 Hz, over a real link: p50, p99, max."""
    meta = Meta.of("car", "the task", 100, CHANNELS, COMMAND)
    learner = LearnerLink("tcp://127.0.0.1:*", meta, {}, lambda meta, first, new: len(new), {})
    link = ActorLink(learner.address)
    actor, took = pilot(link, hidden), []
    rng = np.random.default_rng(3)
    try:
        link.start()
        link.begin(meta)
        version, due = 0, time.monotonic()
        while len(took) < number:
            if actor._env.version == version:
                version += 1
                learner.publish(version, weights(hidden, version))
            before, start = actor._env.version, time.perf_counter()
            actor.refresh()
            if actor._env.version != before:
                took.append(1e3 * (time.perf_counter() - start))
            actor.wish(rng.normal(size=OBS).astype(np.float32), np.zeros(ACT, np.float32))
            due += 0.01
            time.sleep(max(0.0, due - time.monotonic()))
    finally:
        link.close(0.1)
        learner.close()
    return {key: float(np.percentile(took, q)) for key, q in (("p50", 50), ("p99", 99), ("max", 100))}


def main() -> int:
    """The campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--payloads", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    applied, reasons = attack(options.payloads, options.seed)
    for reason, number in reasons.most_common():
        print(f"{number:7,}  {reason}")
    took = swaps(options.swaps)
    cost = ", ".join(f"{key} {value:.3f}" for key, value in took.items())
    print(f"weights: {options.payloads} mutated: {applied} applied; {options.swaps} swaps of 2 x 256: {cost} ms")
    return 1 if applied or took["p99"] > 1.0 else 0


if __name__ == "__main__":
    sys.exit(main())
