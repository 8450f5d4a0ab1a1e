"""Both ends of the link as processes that learn nothing and drive nothing: real links, spool and steps/.

They keep the history in files mapped into memory, which outlive a kill: `made/STREAM` holds a checksum of each record
before the link gets it, `seen/STREAM` the last one the learner stored and when.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from tether.drivers.car import CHANNELS, COMMAND
from tether.drivers.fake import Fake
from tether.launch.actor import deliver
from tether.launch.learner import Journal
from tether.launch.spool import Spool
from tether.launch.transport import ActorLink, LearnerLink
from tether.robot_env import record
from tether.robot_env.rate import Rate
from tether.robot_env.record import Meta, Record, encode

SPEC = Meta.of("fake", "chaos", 100.0, CHANNELS, COMMAND)
MOST = 1 << 20  # records of one stream
PATIENCE = 30.0
EPISODE = 200  # records
WEIGHTS = {"w": np.ones(40_000, np.float32)}  # 160 kB: two chunks


def checksum(payload: bytes) -> int:
    """Of a record; never 0, which stands for none."""
    return zlib.crc32(payload) | 1


def made(folder: Path, stream: str, mode: str = "r+") -> np.ndarray:
    """Checksums of the records that an actor made."""
    return np.memmap(folder / "made" / stream, np.uint32, mode, shape=(MOST,))  # type: ignore[call-overload]


def seen(folder: Path, stream: str, mode: str = "r+") -> np.ndarray:
    """Number of the last record that a learner stored, when (s, monotonic)."""
    return np.memmap(folder / "seen" / stream, np.float64, mode, shape=(2,))  # type: ignore[call-overload]


def new_history(folder: Path, stream: str) -> None:
    """Room for one stream; made by who starts its actor, whose disk may be full."""
    for kind, create in (("made", made), ("seen", seen)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        create(folder, stream, "w+")


def example(seq: int, robot: Fake) -> Record:
    """A record of the fake robot; the last of an episode has readings only."""
    action = None if seq % EPISODE == 0 else np.full(2, seq % 2, np.float32)
    return Record(seq, robot.now(), robot.read(), action, 1.0, action is None, False, "policy", 0, {})


def last_stored(steps: Path) -> int:
    """Number of the newest record of a stream. The real learner reads all, which takes longer with every restart."""
    for path in sorted(steps.glob(f"*{record.SUFFIX}"), reverse=True):
        rows = [seq for kind, _, seq, _ in record._frames(path.read_bytes(), "", []) if kind == record._RECORD]
        if rows:
            return rows[-1]
    return 0


def _enter(folder: Path) -> None:
    """What every end begins with: its own way to end, and a file for what it says."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: ENDING.append(True))


ENDING: list[bool] = []


def learner(address: str, folder: Path) -> None:
    """A learner with a null update, which checks that records are given out in order; SIGTERM ends it."""
    _enter(folder)
    journal, last, marks = Journal(folder / "steps"), {}, {}

    def store(meta: Meta, first: int, payloads: list[bytes]) -> int:
        stored = journal(meta, first, payloads)
        if stored:
            marks.setdefault(meta.stream, seen(folder, meta.stream))[:] = first + stored - 1, time.monotonic()
        return stored

    for steps in (folder / "steps").glob("*"):
        last[steps.name] = last_stored(steps)
    link = LearnerLink(address, SPEC, {"task": "chaos"}, store, {name: seq + 1 for name, seq in last.items()})
    published = 0.0
    while not ENDING:
        if time.monotonic() - published > 0.5:
            published = time.monotonic()
            link.publish(int(published * 1000), WEIGHTS)
        for stream, row in link.poll(0.05):
            if row.seq != last.get(stream, 0) + 1:
                raise AssertionError(f"{stream}: {row.seq} was given out after {last.get(stream, 0)}")
            last[stream] = row.seq
            link.set_run_until({stream: row.seq + 1})
    link.close()
    journal.close()


def actor(address: str, folder: Path, stream: str, hz: float) -> None:
    """An actor that first delivers what others left; then `hz` records a second (0: none), until SIGTERM."""
    _enter(folder)
    link = ActorLink(address)
    link.start(PATIENCE)
    deliver(address, folder / "spool")
    if hz:
        _drive(link, folder, stream, hz)
    left = link.close(PATIENCE)
    if left:
        raise AssertionError(f"{stream}: {left} records were not delivered")


def _drive(link: ActorLink, folder: Path, stream: str, hz: float) -> None:
    meta = replace(SPEC, stream=stream)
    link.begin(meta, PATIENCE, Spool(folder / "spool" / stream, meta))
    history, robot, rate = made(folder, stream), Fake(), Rate(hz, time.monotonic, time.sleep)
    robot.open()
    rng, seq = random.Random(stream), 0
    while not ENDING:
        robot.write(np.array([1.0, rng.uniform(-0.3, 0.3)]))
        robot.sleep(1 / hz)
        seq += 1
        payload = encode(example(seq, robot))
        history[seq - 1] = checksum(payload)
        link.send(seq, payload)
        link.weights()
        rate.wait()
        while link.full and not ENDING:  # as the real one does at the end of an episode
            time.sleep(0.02)
