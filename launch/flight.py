"""The flight recorder: what an actor saw and did before it failed."""

from __future__ import annotations

import traceback
from collections import deque
from pathlib import Path

from ..robot_env.record import Meta, Record, RecordError, SegmentWriter, encode

KEEP_S = 5.0


class FlightRecorder:
    """Keeps the last KEEP_S seconds of records in memory, for `env.on_record`."""

    def __init__(self, meta: Meta) -> None:
        self._meta = meta
        self._records: deque[Record] = deque()

    def __call__(self, record: Record) -> None:
        self._records.append(record)
        while record.time - self._records[0].time > KEEP_S:
            self._records.popleft()

    def save(self, parent: Path, error: BaseException) -> str:
        """Write a recording, and the traceback as `error.txt`, to a new folder in `parent`. Returns what to say."""
        folder = parent / self._meta.stream
        try:
            writer = SegmentWriter(folder, self._meta)
            for record in self._records:
                writer.append(record.seq, encode(record))
            writer.close()
            (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except (OSError, RecordError) as trouble:
            return f"what it did last could not be kept: {trouble}"
        return f"its last {KEEP_S:g} s and the traceback are in {folder}"
