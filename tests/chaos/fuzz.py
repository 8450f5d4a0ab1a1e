"""`make fuzz N=1000000`: malformed messages into both ends of the link, and strangers at the learner's door."""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import resource
import signal
import socket
import statistics
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import numpy as np
import zmq
from tether.launch import transport, wire
from tether.launch.transport import NOBODY, ActorLink, LearnerLink
from tether.launch.wire import Malformed, WireError
from tether.robot_env.record import RecordError, encode

from tests.chaos.ends import SPEC, example

PATIENCE = 20.0
WARM = 1000  # messages before memory counts
SUSPECT_MS = 5.0  # a message that took longer is tried again
HANG_S = 5.0  # that no message may take
PARAMS = {"w": np.ones((3, 5), np.float32)}
WEIGHTS = wire.pack_weights(3, PARAMS)
NASTY: list[Callable[[random.Random], Any]] = [
    lambda rng: rng.choice([0, 1, -1, 2**53 - 1, 2**53, 2**63, 2**64 - 1, -(2**63)]),
    lambda rng: rng.choice([None, True, 0.5, math.nan, math.inf, -1e308, "", b"", [], {}, "\0", "../../x", "0" * 16]),
    lambda rng: rng.randbytes(rng.choice([1, 64, 65, 5000])),
    lambda rng: "ä" * rng.choice([1, 128, 129, 4000]),
    lambda rng: nested(rng.choice([2, 60, 600])),
    lambda rng: list(range(rng.choice([1, 64, 65, 2000]))),
    lambda rng: {str(i): rng.random() for i in range(rng.choice([1, 64, 65, 400]))},
    lambda rng: {i: i for i in range(3)},
    lambda rng: msgpack.ExtType(rng.randrange(128), b"x" * rng.choice([0, 4, 300])),
    lambda rng: msgpack.Timestamp(rng.randrange(2**40), 1),
    lambda rng: f"{rng.getrandbits(64):016x}",
]


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def messages(rng: random.Random, robot: Any) -> dict[str, list[tuple[str, dict, bytes]]]:
    """Good messages of every kind, by sender."""
    stream = SPEC.stream
    rows = [encode(example(seq, robot)) for seq in range(1, 4)]
    status = {"state": "run", "spool": 3, "weights": 3, "refused": "", "stats": {"rate/hz": 9.9}}
    about = {"version": 3, "offset": 0, "nbytes": len(WEIGHTS.data), "layout": WEIGHTS.layout, "sha256": WEIGHTS.sha256}
    orders = msgpack.packb({"task": "x" * 3000, "policy": {"hidden": [64, 64]}})
    return {
        "actor": [
            ("HELLO", {"stream": stream, "first": 1, "next": 1}, SPEC.to_json()),
            ("HELLO", {"stream": NOBODY, "first": 1, "next": 1}, b""),
            ("DATA", {"stream": stream, "seq": 1}, msgpack.packb(rows)),
            ("STATUS", {"stream": stream, **status}, b""),
            ("WANT", {"stream": stream, "version": 3, "offset": 0}, b""),
        ],
        "learner": [
            ("WELCOME", {"stream": stream}, orders), ("REFUSE", {}, b""), ("REFUSE", {}, b"hz: 10 here, 20 there"),
            ("ACK", {"seq": 1, "run_until": 9, "weights": 3, "stop": ""}, b""), ("WEIGHTS", about, WEIGHTS.data),
        ],
    }  # fmt: skip


def mutated(rng: random.Random, kind: str, fields: dict, body: bytes) -> list[bytes]:
    """Frames of a message that is broken in one of many ways, most of them with a right checksum."""
    header: dict[Any, Any] = {"v": wire.VERSION, "t": kind, **fields}
    how = rng.randrange(8)
    if how == 0:  # a field
        header[rng.choice(list(header))] = rng.choice(NASTY)(rng)
    elif how == 1:  # fields come and go
        header.pop(rng.choice(list(header)))
        header |= {rng.choice(["x", "seq", "stream", "crc"]): rng.choice(NASTY)(rng)} if rng.random() < 0.5 else {}
    elif how == 2:
        body = _bytes(rng, body)
    elif how == 3 and kind == "DATA":  # inside a record
        rows = [msgpack.unpackb(row, strict_map_key=False) for row in msgpack.unpackb(body)]
        row = rng.choice(rows)
        at = rng.randrange(len(row))
        row[at] = {**row[at], "pose": rng.choice(NASTY)(rng)} if type(row[at]) is dict else rng.choice(NASTY)(rng)
        body = msgpack.packb([msgpack.packb(row) for row in rows])
    elif how == 3 and kind == "HELLO":  # another stream, or inside its description
        meta = json.loads(SPEC.to_json())
        header["stream"] = meta["stream"] = f"{rng.getrandbits(64):016x}"
        if rng.random() < 0.5:
            meta["task"] = "x" * rng.choice([10, 10_000, 500_000])
        else:
            bad = [None, [], {}, 1e999, -1, "", 2**70, "ä" * 300, nested(900), [[]]]
            meta[rng.choice(list(meta))] = rng.choice(bad)
        body = json.dumps(meta).encode()
    elif how == 4:  # what the checksum does not notice
        body = rng.choice([b"[" * 100_000, b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"9" * 9999, b"", msgpack.packb(
            [rng.choice(NASTY)(rng) for _ in range(rng.choice([1, 32, 33]))])])  # fmt: skip
    packed = msgpack.packb({"crc": zlib.crc32(body), **header})
    if how == 5:
        packed = _bytes(rng, packed)
    elif how == 6:
        packed = rng.choice([b"", packed + packed, packed * 300, b"\x91" * 5000, rng.randbytes(rng.randrange(300))])
    frames = [packed, body]
    if how == 7:
        frames = rng.choice([[], frames[:1], frames * 2, frames * 30, [b"", *frames], [body, packed], [*frames, b""]])
    return frames


def _bytes(rng: random.Random, data: bytes) -> bytes:
    """Flipped, cut, doubled or lengthened."""
    found, at = bytearray(data), rng.randrange(len(data) + 1)
    if not data or rng.random() < 0.2:
        found[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif rng.random() < 0.3:
        del found[at : at + rng.randrange(1, 40)]
    else:
        for _ in range(rng.randrange(1, 5)):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


class Still:
    """In the place of a Pump: no socket, no thread; whoever holds the link calls it."""

    def __init__(self, kind: int, address: str) -> None:
        self.address, self.peer, self.end_by, self.locked = address, "", math.inf, False

    def send(self, frames: list[bytes]) -> bool:
        return True

    def wait(self, ready: Callable[[], Any], timeout: float) -> bool:
        return bool(ready())

    def nothing(self, *_: Any) -> None:
        """Neither is there anything to do."""

    start = reconnect = wake = check = close = nothing


class Target:
    """Both ends, fresh ones after an actor was refused, which is how one ends."""

    def __init__(self) -> None:
        with mock.patch.object(transport, "Pump", Still):
            self.learner = LearnerLink("", SPEC, {"task": "x"}, lambda meta, first, rows: len(rows), {})
            self.actor = ActorLink("")
        self.learner.publish(3, PARAMS)
        self.ended = 0
        self._begin_actor()

    def _begin_actor(self) -> None:
        self.actor._hello = (SPEC.stream, SPEC.to_json())
        self.seq = 0

    def take(self, sender: str, frames: list[bytes]) -> bool:
        """What the network thread does with a message and then by itself; whether it was taken."""
        taken = True
        try:
            if sender == "actor":
                self.learner._take([b"route", *frames])
            else:
                self.actor._take(frames)
        except (Malformed, RecordError):
            taken = False
        except WireError:
            if sender == "actor":
                raise  # nothing an actor says may end a learner
            self.ended += 1
            with mock.patch.object(transport, "Pump", Still):
                self.actor = ActorLink("")
            self._begin_actor()
        (self.learner if sender == "actor" else self.actor)._turn()
        return taken

    def settle(self, payload: Callable[[int], bytes]) -> None:
        """What the main threads do, now and then."""
        self.learner.poll()
        self.actor.weights()
        self.seq += 1
        self.actor.send(self.seq, payload(self.seq))


def fuzz(count: int, seed: int, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`count` messages into a target; what came of it."""
    from tether.drivers.fake import Fake

    rng, robot, target = random.Random(seed), Fake(), Target()
    robot.open()
    corpus = messages(rng, robot)
    crashes: Counter[str] = Counter()
    taken = hangs = base = 0
    worst_ms = worst_wall_ms = 0.0

    def hung(*_: Any) -> None:
        raise TimeoutError

    gc.collect()
    gc.freeze()
    gc.disable()  # else now and then a message waits while the whole process is searched for garbage
    before = signal.signal(signal.SIGALRM, hung)
    try:
        for number in range(count):
            if number % 1000 == 0:
                gc.collect()
                target.settle(lambda seq: encode(example(seq, robot)))
                if number <= WARM:
                    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                if number % 100_000 == 0 and number:
                    tell(f"{number:,} messages, {sum(crashes.values())} crashes")
            sender = rng.choice(("actor", "learner"))
            good = rng.choice(corpus[sender])
            frames = wire.encode(good[0], good[2], **good[1]) if rng.random() < 0.05 else mutated(rng, *good)
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                taken += target.take(sender, frames)
            except TimeoutError:
                hangs += 1
            except Exception as error:  # noqa: BLE001 - it is what is looked for
                crashes["".join(traceback.format_exception(error)[-3:])] += 1
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            worst_wall_ms = max(worst_wall_ms, 1e3 * (time.perf_counter() - wall))
            spent_ms = 1e3 * (time.thread_time() - cpu)
            if spent_ms > worst_ms and spent_ms > SUSPECT_MS:  # the message, or the machine?
                cpu = time.thread_time()
                with suppress(Exception):
                    target.take(sender, frames)
                spent_ms = min(spent_ms, 1e3 * (time.thread_time() - cpu))
            worst_ms = max(worst_ms, spent_ms)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
        gc.unfreeze()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    return {
        "messages": count, "taken": taken, "refused_actors": target.ended, "crashes": sum(crashes.values()),
        "hangs": hangs, "worst_ms": round(worst_ms, 2), "worst_wall_ms": round(worst_wall_ms, 2),
        "growth_mb": round(growth, 1), "first_crashes": list(crashes)[:5],
    }  # fmt: skip


def half_open(count: int, seconds: float = 2.0) -> dict[str, Any]:
    """Round trips of a good actor's records, without and with `count` connections that never finish a handshake.

    The learner drops each after zmq.HANDSHAKE_IVL; so it is asked again, as somebody who means harm would.
    """
    learner = LearnerLink("tcp://127.0.0.1:*", SPEC, {}, lambda meta, first, rows: len(rows), {})
    host, port = learner.address.removeprefix("tcp://").split(":")
    link = ActorLink(learner.address)
    strangers: list[socket.socket] = []
    from tether.drivers.fake import Fake

    robot = Fake()
    robot.open()
    seq = 0

    def trips() -> list[float]:
        nonlocal seq
        found: list[float] = []
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            seq += 1
            payload, began = encode(example(seq, robot)), time.perf_counter()
            link.send(seq, payload)
            assert link._pump.wait(lambda: not len(link._spool), PATIENCE), "no service"
            found.append(1e3 * (time.perf_counter() - began))
            learner.poll()
            time.sleep(0.005)
        return found

    try:
        link.begin(replace(SPEC, stream="5" * 16), PATIENCE)
        calm = trips()
        greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03"  # the beginning of ZMTP's
        for number in range(count):
            strangers.append(socket.create_connection((host, int(port))))
            strangers[-1].sendall((b"", b"\xff", greeting, b"GET / HTTP/1.1\r\n")[number % 4])
        flooded = trips()
    finally:
        for stranger in strangers:
            with suppress(OSError):
                stranger.close()
        link.close()
        learner.close()
    return {"connections": count, "calm_ms": _row(calm), "flooded_ms": _row(flooded)}


def _row(values: list[float]) -> dict[str, float]:
    p50, p99 = statistics.median(values), float(np.percentile(values, 99))
    return {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(max(values), 2), "trips": len(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--out", default="fuzz.json")
    options = parser.parse_args()
    print(f"seed {options.seed}, pyzmq {zmq.__version__}", flush=True)
    found = {"seed": options.seed, **fuzz(options.messages, options.seed, lambda text: print(text, flush=True))}
    for text in found["first_crashes"]:
        print(text)
    found["half_open"] = half_open(options.connections)
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['messages']:,} messages: {found['crashes']} crashes, {found['hangs']} hangs, worst "
          f"{found['worst_ms']} ms of processor time ({found['worst_wall_ms']} ms), memory +{found['growth_mb']} MB")
    print(f"{options.connections} half-open connections: round trip {found['half_open']['flooded_ms']} ms, "
          f"without {found['half_open']['calm_ms']} ms")  # fmt: skip
    print(Path(options.out).resolve())
    return 1 if found["crashes"] or found["hangs"] else 0


if __name__ == "__main__":
    sys.exit(main())
