"""Records on their way to the learner: on the actor's disk until the learner has them on its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..drivers.base import Reading
from ..robot_env.record import Meta, Record, RecordError, SegmentWriter, encode, read_recording
from . import wire
from .wire import WireError

BUDGET = 1 << 30  # bytes of records that may wait
PAUSE_AT = 0.8  # share of it at which the robot should pause at the end of an episode
CATCH_UP = 32  # records that could not be written before, and are with the next one


class Spool:
    """The records of one stream that are not acknowledged. One thread appends, one sends and forgets.

    With a `folder` they are in its segments too, from before they are sent; segments whose records are all
    acknowledged are removed, and the folder with the last of them. What does not fit a full disk is in memory
    alone, until it fits again; meanwhile `trouble` says so.
    """

    def __init__(self, folder: Path | None = None, meta: Meta | None = None, first: int = 1) -> None:
        self.first = self.next_seq = first  # sequence numbers of the oldest record kept and of the next one
        self.sealed = False  # no more will come, the actor is gone
        self.trouble = ""  # why records are not on the disk
        self._payloads: dict[int, bytes] = {}
        self._came = self._gone = 0  # bytes, each counted by one thread
        self._ends: dict[Path, int] = {}  # the newest record of each segment
        self._written = 0  # the newest record on the disk
        self._writer: SegmentWriter | None = None
        if folder is not None and meta is not None:
            self._lock = _new_folder(folder)
            self._writer = SegmentWriter(folder, meta)

    def __len__(self) -> int:
        return self.next_seq - self.first

    @property
    def on_disk(self) -> bool:
        """Whether what is left outlives this process."""
        return self._writer is not None and not self.trouble

    @property
    def full(self) -> bool:
        """Whether it is time to pause: it is nearly full, or what waits is not on the disk."""
        return bool(self.trouble and len(self)) or self._came - self._gone > PAUSE_AT * BUDGET

    def append(self, seq: int, payload: bytes) -> None:
        """Keep a record. Raises WireError when it is out of order or one too many."""
        if seq != self.next_seq:
            raise WireError(f"record {seq} came where {self.next_seq} was due")
        if self._came - self._gone + len(payload) > BUDGET:
            raise WireError(f"{len(self)} records wait for the learner, and no more fit the spool")
        self._came += len(payload)
        self._payloads[seq] = payload
        if self._writer is not None:
            self._write(self._writer)
        self.next_seq += 1  # last: from here on it is there for the other thread

    def _write(self, writer: SegmentWriter) -> None:
        """Put the newest records on the disk, and some that did not fit before."""
        begin = max(self._written + 1, self.first)
        try:
            for seq in range(begin, min(begin + CATCH_UP, self.next_seq + 1)):
                payload = self._payloads.get(seq)
                if payload is not None:  # else the learner has it by now
                    writer.append(seq, payload)
                    self._ends[writer.path] = seq
                self._written = seq
            if self._written == self.next_seq:
                self.trouble = ""
        except RecordError as error:
            self.trouble = str(error)

    def ack(self, seq: int) -> None:
        """Forget the records up to `seq`."""
        while self.first <= min(seq, self.next_seq - 1):
            self._gone += len(self._payloads.pop(self.first))
            self.first += 1
        for path, end in list(self._ends.items()):
            if end < self.first and self._writer is not None and path != self._writer.path:
                path.unlink()
                del self._ends[path]

    def batch(self, seq: int) -> list[bytes]:
        """The records from `seq` on that fit one message."""
        found: list[bytes] = []
        room = wire.CHUNK
        for number in range(seq, min(seq + wire.MAX_BATCH, self.next_seq)):
            room -= len(self._payloads[number]) + 8  # as msgpack frames it
            if room < 0 and found:
                break
            found.append(self._payloads[number])
        return found

    def close(self) -> None:
        """Let go of the folder; with nothing left to deliver it is removed. Idempotent."""
        if self._writer is not None:
            self._writer.close()
            if not len(self):
                shutil.rmtree(self._writer.folder)
            os.close(self._lock)
            self._writer = None


def record_bytes(meta: Meta) -> int:
    """Size of a record of such a stream: one is encoded, without events."""
    values = {name: np.zeros(size, np.float32) for name, size, _, _ in meta.channels}
    reading, action = Reading(values, dict.fromkeys(values, 0.0)), np.zeros(len(meta.command), np.float32)
    return len(encode(Record(1 << 20, 0.0, reading, action, 0.0, False, False, "policy", 1 << 20, {})))


def hours(meta: Meta, folder: Path) -> float:
    """For how long the records of such a stream can wait in `folder` until the actor pauses."""
    room = min(PAUSE_AT * BUDGET, shutil.disk_usage(existing(folder)).free)
    return room / (record_bytes(meta) * meta.hz) / 3600.0


def existing(path: Path) -> Path:
    """The path itself, or of its parents the nearest there is."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


@contextmanager
def left_behind(parent: Path) -> Iterator[list[tuple[Path, Meta, Spool]]]:
    """What actors that are gone did not deliver: (folder, meta, spool) of each unbroken row of records.

    While in the context nobody else takes them. What is damaged is named on standard error and left out.
    """
    found, locks = [], []
    for folder in sorted(path for path in parent.glob("*") if path.is_dir()):
        with suppress(BlockingIOError, FileNotFoundError):  # its actor lives; somebody delivered it
            locks.append(_lock(folder))
            if not any(path.stat().st_size for path in folder.glob("*")):  # killed while it began or ended
                shutil.rmtree(folder)
                continue
            try:
                meta, records = read_recording(folder)
            except RecordError as error:
                print(f"warning: {error}", file=sys.stderr)
                continue
            spool: Spool | None = None
            for record in records:
                if spool is None or record.seq != spool.next_seq:  # the first, or the first after a gap
                    spool = Spool(first=record.seq)
                    found.append((folder, meta, spool))
                spool.append(record.seq, encode(record))
                spool.sealed = True
            if not records:
                shutil.rmtree(folder)
    try:
        yield found
    finally:
        for lock in locks:
            os.close(lock)


def _new_folder(folder: Path) -> int:
    """Make `folder` and hold it, so that nobody takes it for one that was left behind."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(BlockingIOError, FileNotFoundError):
            descriptor = _lock(folder)
            if folder.exists():
                return descriptor
            os.close(descriptor)
        time.sleep(0.01)  # somebody found it empty, and removes it


def _lock(folder: Path) -> int:
    """A descriptor that holds `folder` until it is closed, or its process is gone. BlockingIOError if held."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor
