"""One step as it is stored and sent: the record, its bytes, and the append-only files that hold them.

A file is a row of frames, the first of which says whose records follow:

    magic u32 | kind u8 | stream id 8 bytes | seq u64 | length u32 | crc32 u32 | payload

(little-endian; the crc covers everything after the magic but itself). The payload of a record is the same
here and on the wire: a msgpack array

    [seq, time, reward, flags, source, version, action, {channel: [stamp, values]}, {event: value}]

where arrays are raw little-endian float32 and `flags` is 1 for terminated plus 2 for truncated.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from ..drivers.base import Channel, Command, Reading

SOURCES = ("policy", "reset", "takeover", "teacher")
FORMAT = 1  # of files and payloads
MAX_PAYLOAD = (1 << 20) - (16 << 10)  # bytes; one record always fits a message of the wire
MAX_ITEMS = 64  # channels, command values, events
MAX_TEXT = 256  # bytes of a name
MAX_INT = 1 << 53
SEGMENT_RECORDS, SEGMENT_BYTES = 256, 16 << 20
SUFFIX = ".seg"

_MAGIC = b"TTHR"
_HEAD = struct.Struct("<4sB8sQII")
_CRC_AT = _HEAD.size - 4
_META, _RECORD = 0, 1
_TYPES = [int, float, float, int, int, int]  # of seq, time, reward, flags, source and version
LIMITS: dict[str, Any] = {
    "max_str_len": MAX_TEXT, "max_bin_len": MAX_PAYLOAD, "max_array_len": MAX_ITEMS,
    "max_map_len": MAX_ITEMS, "max_ext_len": 0, "strict_map_key": True, "raw": False,
}

# What a value nobody vouches for may be; the wire adds kinds of its own.
KINDS: dict[str, Callable[[Any], bool]] = {
    "count": lambda v: type(v) is int and 0 <= v < MAX_INT,
    "number": lambda v: type(v) is float and math.isfinite(v),
    "text": lambda v: type(v) is str and len(v.encode(errors="replace")) <= MAX_TEXT,
    "long": lambda v: type(v) is str and len(v) < MAX_PAYLOAD // 2,
    "stream": lambda v: type(v) is str and re.fullmatch("[0-9a-f]{16}", v) is not None,
    "numbers": lambda v: type(v) is dict and len(v) <= MAX_ITEMS and all(_fit("text number", row) for row in v.items()),
}


class RecordError(RuntimeError):
    """A record or a file of records that cannot be used: names the file, the cause and the remedy."""


class Record(NamedTuple):
    """One control step: what was read, what was done on it, and what came of that."""

    seq: int  # 1, 2, ... within its stream
    time: float  # s, the robot's clock, when the action was sent
    reading: Reading  # what the action was chosen on
    action: np.ndarray | None  # (n,) float32 as executed, may leave [-1, 1]; None ends a segment
    reward: float
    terminated: bool
    truncated: bool
    source: str  # one of SOURCES
    version: int  # of the weights the action came from; 0: none
    events: dict[str, float]


@dataclass(frozen=True)
class Meta:
    """What a stream of records was recorded with. Raises RecordError where a field is out of bounds."""

    stream: str  # 16 hex digits
    robot: str
    task: str  # the task file's text
    hz: float
    channels: tuple[tuple[str, int, str, float], ...]  # name, size, unit, hz
    command: tuple[tuple[str, float, float], ...]  # name, SI value of action -1, of action +1
    created: str  # wall-clock time, for people
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise RecordError(f"record format {self.format}, not {FORMAT}: use the tether that wrote it")
        plain = _fit("stream text long text number", (self.stream, self.robot, self.task, self.created, self.hz))
        channels = all(_fit("text count text number", row) for row in self.channels)
        command = all(_fit("text number number", row) for row in self.command)
        if not (plain and channels and command and self.hz > 0):
            raise RecordError("the description of the stream is malformed; it was not written by tether")

    @classmethod
    def of(cls, robot: str, task: str, hz: float, channels: Sequence[Channel], command: Command) -> Meta:
        """The description of a new stream."""
        ends = zip(command.names, command.action_low, command.action_high, strict=True)
        return cls(
            secrets.token_hex(8), robot, task, float(hz),
            tuple((c.name, c.size, c.unit, float(c.hz)) for c in channels),
            tuple((name, float(low), float(high)) for name, low, high in ends),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def to_json(self) -> bytes:
        """UTF-8 JSON."""
        return json.dumps(asdict(self), allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Meta:
        """The inverse of `to_json`, for bytes nobody vouches for. Raises RecordError."""
        try:
            found = json.loads(data)
            return cls(**found | {key: tuple(map(tuple, found[key])) for key in ("channels", "command")})
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise RecordError(f"the description of the stream is malformed: {error}") from None

    def differences(self, other: Meta) -> list[str]:
        """What two sides must agree on to exchange records and do not, a readable line each."""
        ours, theirs = self._spec(), other._spec()
        lines = [f"{key}: {ours.get(key, 'none')} here, {theirs.get(key, 'none')} there"
                 for key in ours | theirs if ours.get(key) != theirs.get(key)]  # fmt: skip
        rows = enumerate(zip_longest(self.task.splitlines(), other.task.splitlines(), fillvalue=""), 1)
        # one line of the task says enough: it may have hundreds
        return lines + [f"task, line {n}: {a:.60} here, {b:.60} there" for n, (a, b) in rows if a != b][:1]

    def _spec(self) -> dict[str, Any]:
        lines: dict[str, Any] = {"robot": self.robot, "hz": self.hz}
        lines |= {f"channel {row[0]}": list(row[1:]) for row in self.channels}
        lines |= {f"command {row[0]}": list(row[1:]) for row in self.command}
        return lines | {"order": [row[0] for row in (*self.channels, *self.command)]}


def _fit(kinds: str, values: Sequence[Any]) -> bool:
    due = kinds.split()
    return len(due) == len(values) and all(KINDS[k](v) for k, v in zip(due, values, strict=True))


def encode(record: Record) -> bytes:
    """The record's bytes. Raises RecordError for what `decode` refuses."""
    payload = msgpack.packb((
        record.seq, float(record.time), float(record.reward),
        bool(record.terminated) + 2 * bool(record.truncated), SOURCES.index(record.source), record.version,
        None if record.action is None else np.asarray(record.action, "<f4").tobytes(),
        {name: (float(record.reading.stamps[name]), np.asarray(value, "<f4").tobytes())
         for name, value in record.reading.values.items()},
        {name: float(value) for name, value in record.events.items()},
    ))  # fmt: skip
    decode(payload)  # nothing is kept that could not be read again
    return payload


def decode(payload: bytes) -> Record:
    """The record of bytes nobody vouches for; arrays are read-only views. Raises RecordError.

    Readings may hold NaN, a broken sensor is worth recording; everything else is finite.
    """
    try:
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"{len(payload)} bytes, at most {MAX_PAYLOAD} fit")
        row = msgpack.unpackb(payload, **LIMITS)
        seq, time, reward, flags, source, version, action, channels, events = row
        in_bounds = [*map(type, row[:6])] == _TYPES and 1 <= seq < MAX_INT and 0 <= version < MAX_INT
        in_bounds = in_bounds and 0 <= flags <= 3 and 0 <= source and math.isfinite(time) and math.isfinite(reward)
        if not (in_bounds and KINDS["numbers"](events)):
            raise ValueError("a field of the wrong type, out of bounds or not finite")
        reading = Reading({}, {})
        for name, (stamp, values) in channels.items():
            if type(name) is not str or type(stamp) is not float:
                raise ValueError("a channel of the wrong type")
            reading.values[name], reading.stamps[name] = _floats(values), stamp
        executed = None if action is None else _floats(action)
        if executed is not None and not (0 < len(executed) <= MAX_ITEMS and math.isfinite(sum(executed.tolist()))):
            raise ValueError("an action that is empty, too long or not finite")
        ended = bool(flags & 1), bool(flags & 2)
        return Record(seq, time, reading, executed, reward, *ended, SOURCES[source], version, events)
    except (ValueError, TypeError, LookupError, AttributeError, msgpack.UnpackException) as error:
        raise RecordError(f"malformed record: {error}") from None


def _floats(data: Any) -> np.ndarray:
    if type(data) is not bytes:
        raise ValueError("an array that is not bytes")
    return np.frombuffer(data, "<f4")  # a length that does not fit is a ValueError


class SegmentWriter:
    """Appends the records of one stream to a folder of files that are never rewritten.

    A later writer adds to the folder. `append` leaves the bytes with the operating system: a killed process
    loses nothing. Raises RecordError for a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, meta: Meta) -> None:
        self.folder, self.meta = Path(folder), meta
        self._stream = bytes.fromhex(meta.stream)
        self._open()

    def append(self, seq: int, payload: bytes) -> None:
        """Write one record: its number and what `encode` made of it."""
        self.extend(seq, [payload])

    def extend(self, first: int, payloads: Sequence[bytes]) -> int:
        """Write records, number `first` and on, by one call of the system: as many as the segment takes, at least
        one. Returns how many; raises RecordError where not all of these could be written, and then none is."""
        if self._count >= SEGMENT_RECORDS or self._size >= SEGMENT_BYTES:
            former = self._file
            self._open()
            former.close()
        frames = [] if self._size else [self._frame(_META, 0, self.meta.to_json())]
        size, count = self._size, 0
        for payload in payloads[: SEGMENT_RECORDS - self._count]:
            if size >= SEGMENT_BYTES:
                break
            frames.append(self._frame(_RECORD, first + count, payload))
            size, count = size + len(frames[-1]), count + 1
        self._write(first, b"".join(frames))
        self._count += count
        return count

    def sync(self) -> None:
        """Let what was written last survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._file.close()

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            last = max((int(path.stem) for path in _segments(self.folder)), default=0)
            path = self.folder / f"{last + 1:08d}{SUFFIX}"
            self._file = open(path, "ab", buffering=0)
        except OSError as error:
            raise RecordError(f"{self.folder} cannot be written: {error.strerror}; choose another") from None
        self.path, self._count, self._size = path, 0, 0  # of the segment that grows

    def _frame(self, kind: int, seq: int, payload: bytes) -> bytes:
        head = _HEAD.pack(_MAGIC, kind, self._stream, seq, len(payload), 0)
        crc = zlib.crc32(payload, zlib.crc32(head[4:_CRC_AT]))
        return head[:_CRC_AT] + crc.to_bytes(4, "little") + payload

    def _write(self, seq: int, frames: bytes) -> None:
        try:
            if self._file.write(frames) != len(frames):
                raise OSError(errno.ENOSPC, "the disk is full")
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)  # leave whole frames only
            cause = f"was not written: {error.strerror}"
            raise RecordError(f"{self.folder}: record {seq} {cause}; make room and try again") from None
        self._size += len(frames)


def _complain(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def read_recording(path: str | Path, on_damage: Callable[[str], None] = _complain) -> tuple[Meta, list[Record]]:
    """The records of a file, or of a folder of segments, in order and each once.

    A torn tail is cut and damaged records are left out; `on_damage` (default: a line on standard error) is
    told which. Raises RecordError for what is not a recording.
    """
    path = Path(path)
    meta: Meta | None = None
    records: list[Record] = []
    damage: list[str] = []
    for file in _segments(path) if path.is_dir() else [path]:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise RecordError(f"{file} cannot be read: {error.strerror}; make one with `tether record`") from None
        for kind, stream, seq, payload in _frames(data, str(file), damage):
            try:
                if kind == _META:
                    meta = meta or Meta.from_json(payload)
                elif meta is not None:
                    record, due = decode(payload), records[-1].seq + 1 if records else seq
                    if stream != meta.stream or record.seq != seq or seq < due:
                        raise RecordError("it is there twice, or another's")
                    if seq > due:
                        damage.append(f"{file}: records {due} to {seq - 1} are missing")
                    records.append(record)
            except RecordError as error:
                if kind == _META:
                    raise RecordError(f"{file}: {error}") from None
                damage.append(f"{file}: record {seq} left out: {error}")
    if meta is None:
        raise RecordError(f"{path} is not a recording or lost its beginning; make one with `tether record`")
    for line in damage:
        on_damage(line)
    return meta, records


def read_streams(folder: str | Path, on_damage: Callable[[str], None] = _complain) -> list[tuple[Meta, list[Record]]]:
    """The streams of a run's `steps/`, one sub-folder each, in the order they began.

    One that was never written to is left out, and one that cannot be read, which `on_damage` is told.
    """
    streams = []
    for sub in sorted({path.parent for path in Path(folder).glob(f"*/*{SUFFIX}") if path.stat().st_size}):
        try:
            streams.append(read_recording(sub, on_damage))
        except RecordError as error:
            on_damage(str(error))
    return sorted(streams, key=lambda stream: stream[0].created)


def _segments(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())


def _frames(data: bytes, name: str, damage: list[str]) -> Iterator[tuple[int, str, int, bytes]]:
    """(kind, stream, seq, payload) of every whole frame; what lies between two is named in `damage`."""
    at = 0
    for match in re.finditer(_MAGIC, data):
        start, begin = match.start(), match.start() + _HEAD.size
        if start < at or begin > len(data):
            continue
        _, kind, stream, seq, length, crc = _HEAD.unpack_from(data, start)
        payload = data[begin : begin + length] if length <= MAX_PAYLOAD else b""
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(data[start + 4 : start + _CRC_AT])) != crc:
            continue
        if start > at:
            damage.append(f"{name}: bytes {at} to {start} are damaged, left out")
        yield kind, stream.hex(), seq, payload
        at = begin + length
    if at < len(data):
        damage.append(f"{name}: cut at byte {at}, the rest ({len(data) - at} bytes) is not a whole record")
