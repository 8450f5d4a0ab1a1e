"""What an actor keeps until the learner has it."""

from __future__ import annotations

from collections import deque
from itertools import islice

from .wire import MAX_BATCH, MAX_BODY, WireError

MAX_SPOOL = 256 << 20  # bytes an actor keeps while the learner is away


class Spool:
    """The records of an actor that are not acknowledged, in memory. Not thread-safe."""

    def __init__(self) -> None:
        self.first = 1  # sequence number of the oldest record kept
        self._payloads: deque[bytes] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._payloads)

    @property
    def next_seq(self) -> int:
        """The number of the next record."""
        return self.first + len(self._payloads)

    def append(self, seq: int, payload: bytes) -> None:
        """Keep a record. Raises WireError when it is out of order or does not fit."""
        if seq != self.next_seq:
            raise WireError(f"record {seq} came where {self.next_seq} was due")
        if self._bytes + len(payload) > MAX_SPOOL:
            raise WireError(f"{len(self)} records wait and no more fit: start `tether learner` again")
        self._payloads.append(payload)
        self._bytes += len(payload)

    def ack(self, seq: int) -> None:
        """Forget the records up to `seq`."""
        while self._payloads and self.first <= seq:
            self._bytes -= len(self._payloads.popleft())
            self.first += 1

    def batch(self, seq: int) -> list[bytes]:
        """The records from `seq` on that fit one message."""
        found, room, at = [], MAX_BODY, seq - self.first
        for payload in islice(self._payloads, at, at + MAX_BATCH):
            room -= len(payload) + 8  # as msgpack frames it
            if room < 0:
                break
            found.append(payload)
        return found
