"""One step as it is stored and sent: the record, its bytes, and the append-only files that hold them.

A file is a row of frames, the first of which says whose records follow:

    magic u32 | kind u8 | stream id 8 bytes | seq u64 | length u32 | crc32 u32 | payload

(little-endian; the crc covers everything after the magic but itself). The payload of a record is the same
here and on the wire: a msgpack array

    [seq, time, reward, flags, source, version, action, {channel: [stamp, values]}, {event: value}]

where arrays are raw little-endian float32 and `flags` is 1 for terminated plus 2 for truncated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ..drivers.base import Channel, Command, Reading

SOURCES = ("policy", "reset", "takeover", "teacher")
FORMAT = 1  # of files and payloads
MAX_PAYLOAD = (1 << 20) - (16 << 10)  # bytes; one record always fits a message of the wire
MAX_ITEMS = 64  # channels, command values, events
MAX_NAME = 256  # bytes
MAX_SEQ = 1 << 53
SEGMENT_RECORDS, SEGMENT_BYTES = 256, 16 << 20
SUFFIX = ".seg"

_MAGIC = b"TTHR"
_HEAD = struct.Struct("<4sB8sQII")
_CRC_AT = _HEAD.size - 4
_META, _RECORD = 0, 1
_LIMITS: dict[str, Any] = {
    "max_str_len": MAX_NAME, "max_bin_len": MAX_PAYLOAD, "max_array_len": MAX_ITEMS,
    "max_map_len": MAX_ITEMS, "max_ext_len": 0, "strict_map_key": True, "raw": False,
}


class RecordError(ValueError):
    """A record or a file of records that cannot be used: names the file, the cause and the remedy."""


class _NothingInside(RecordError):
    """Not one whole frame: the writer died before it had written anything."""


@dataclass(frozen=True)
class Record:
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
        good = (
            _fits(self.stream, str) and re.fullmatch("[0-9a-f]{16}", self.stream) is not None
            and _fits(self.robot, str) and type(self.task) is str and len(self.task) < MAX_PAYLOAD // 2
            and _fits(self.hz, float) and self.hz > 0 and _fits(self.created, str)
            and _rows(self.channels, (str, int, str, float)) and _rows(self.command, (str, float, float))
            and all(0 < row[1] <= MAX_PAYLOAD // 4 for row in self.channels)
        )
        if not good:
            raise RecordError("the description of the stream is malformed; it was not written by tether")

    @classmethod
    def of(
        cls, robot: str, task: str, hz: float, channels: Sequence[Channel], command: Command
    ) -> Meta:
        """The description of a new stream."""
        return cls(
            secrets.token_hex(8), robot, task, float(hz),
            tuple((c.name, c.size, c.unit, float(c.hz)) for c in channels),
            tuple(
                (n, float(a), float(b))
                for n, a, b in zip(command.names, command.action_low, command.action_high, strict=True)
            ),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def to_json(self) -> bytes:
        """UTF-8 JSON."""
        return json.dumps(asdict(self), allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Meta:
        """The inverse of `to_json`, for bytes nobody vouches for. Raises RecordError."""
        try:
            found = json.loads(bytes(data).decode()) if len(data) <= MAX_PAYLOAD else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or set(found) != {f.name for f in fields(cls)}:
            raise RecordError("the description of the stream is malformed; it was not written by tether")
        for name in ("channels", "command"):
            rows = found[name] if isinstance(found[name], list) else []
            found[name] = tuple(tuple(row) if isinstance(row, list) else () for row in rows)
        return cls(**found)

    @property
    def spec_hash(self) -> str:
        """sha256 of what two sides must agree on to exchange records."""
        return hashlib.sha256(json.dumps(self._spec()).encode()).hexdigest()

    def differences(self, other: Meta) -> list[str]:
        """What the two do not agree on, a readable line each."""
        ours, theirs = self._spec(), other._spec()
        return [f"{key}: {ours.get(key, 'none')} here, {theirs.get(key, 'none')} there"
                for key in ours | theirs if ours.get(key) != theirs.get(key)]

    def _spec(self) -> dict[str, Any]:
        lines: dict[str, Any] = {"robot": self.robot, "hz": self.hz}
        lines |= {f"channel {row[0]}": list(row[1:]) for row in self.channels}
        lines |= {f"command {row[0]}": list(row[1:]) for row in self.command}
        return lines | {"order": [row[0] for row in (*self.channels, *self.command)]}


def encode(record: Record) -> bytes:
    """The record's bytes. Raises RecordError for what `decode` would refuse."""
    action = None if record.action is None else np.asarray(record.action, "<f4")
    payload = msgpack.packb((
        record.seq, float(record.time), float(record.reward),
        bool(record.terminated) + 2 * bool(record.truncated), SOURCES.index(record.source), record.version,
        None if action is None else action.tobytes(),
        {name: (float(record.reading.stamps[name]), np.asarray(value, "<f4").tobytes())
         for name, value in record.reading.values.items()},
        {name: float(value) for name, value in record.events.items()},
    ))  # fmt: skip
    finite = math.isfinite(record.time) and math.isfinite(record.reward)
    finite = finite and (action is None or bool(np.isfinite(action).all()))
    if not finite or not all(map(math.isfinite, record.events.values())):
        raise RecordError(f"record {record.seq}: its time, reward, action and events must be finite")
    if len(payload) > MAX_PAYLOAD or max(len(record.events), len(record.reading.values)) > MAX_ITEMS:
        raise RecordError(f"record {record.seq}: {len(payload)} bytes, more than fit in one record")
    return payload


def decode(payload: bytes) -> Record:
    """The record of bytes nobody vouches for; arrays are read-only views. Raises RecordError.

    Readings may hold NaN, a broken sensor is worth recording; everything else is finite.
    """
    try:
        if len(payload) > MAX_PAYLOAD:
            raise ValueError("too long")
        row = msgpack.unpackb(payload, **_LIMITS)
        seq, time, reward, flags, source, version, action, values, events = row
        good = (
            type(seq) is int and 0 < seq < MAX_SEQ and type(version) is int and 0 <= version < MAX_SEQ
            and type(flags) is int and 0 <= flags <= 3 and type(source) is int
            and 0 <= source < len(SOURCES) and type(values) is dict and type(events) is dict
            and all(_fits(v, float) for v in (time, reward, *events.values()))
            and all(type(k) is str for k in (*values, *events))
            and all(type(stamp) is float for stamp, _ in values.values())
        )
        if not good:
            raise ValueError("a field of the wrong type or out of bounds")
        reading = Reading(
            {name: _floats(data) for name, (_, data) in values.items()},
            {name: stamp for name, (stamp, _) in values.items()},
        )
        executed = None if action is None else _floats(action)
        if executed is not None and not (0 < len(executed) <= MAX_ITEMS and np.isfinite(executed).all()):
            raise ValueError("an action that is empty, too long or not finite")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RecordError(f"malformed record: {error}") from None
    ended = bool(flags & 1), bool(flags & 2)
    return Record(seq, time, reading, executed, reward, *ended, SOURCES[source], version, events)


def _floats(data: Any) -> np.ndarray:
    if type(data) is not bytes:
        raise ValueError("an array that is not bytes")
    return np.frombuffer(data, "<f4")  # a length that does not fit is a ValueError


def _fits(value: Any, kind: type) -> bool:
    if kind is str:
        return type(value) is str and len(value.encode(errors="replace")) <= MAX_NAME
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is kind


def _rows(rows: Any, kinds: tuple[type, ...]) -> bool:
    return (
        0 < len(rows) <= MAX_ITEMS
        and all(len(row) == len(kinds) and all(map(_fits, row, kinds)) for row in rows)
        and len({row[0] for row in rows}) == len(rows)
    )


class SegmentWriter:
    """Appends the records of one stream to files that are never rewritten.

    `path` is a folder of segments, to which a later writer adds, or without `roll` one new file. `append`
    leaves the bytes with the operating system (a killed process loses nothing); `sync`, called from another
    thread, makes them safe from a power cut. Raises RecordError for a path that cannot be written.
    """

    def __init__(self, path: str | Path, meta: Meta, roll: bool = True) -> None:
        self.path, self.meta = Path(path), meta
        self._roll = roll
        self._stream = bytes.fromhex(meta.stream)
        self._lock = threading.Lock()  # guards the two lists `sync` looks at
        self._unsynced: list[Path] = []
        self._file: Any = None
        self._open()

    def append(self, record: Record) -> None:
        """Encode and write one record."""
        self.append_payload(record.seq, encode(record))

    def append_payload(self, seq: int, payload: bytes) -> None:
        """Write the bytes of one record."""
        if self._file is None:
            raise RecordError(f"{self.path}: closed")
        if self._roll and (self._count >= SEGMENT_RECORDS or self._size >= SEGMENT_BYTES):
            self._open()
        self._write(_RECORD, seq, payload)
        self._count += 1

    def sync(self) -> None:
        """Wait until everything appended so far is on the disk."""
        with self._lock:
            paths, self._unsynced = self._unsynced, self._unsynced[-1:]
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self.close()
        try:
            target = self.path
            if self._roll:
                self.path.mkdir(parents=True, exist_ok=True)
                last = [0, *(int(p.stem) for p in _segments(self.path))][-1]
                target = self.path / f"{last + 1:08d}{SUFFIX}"
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(target, "xb", buffering=0)
        except FileExistsError:
            raise RecordError(f"{self.path} exists already: choose another name, or remove it") from None
        except OSError as error:
            cause = error.strerror or str(error)
            raise RecordError(f"{self.path} cannot be written: {cause}; choose another place") from None
        with self._lock:
            self._unsynced.append(target)
        self._count = self._size = 0
        self._write(_META, 0, self.meta.to_json())

    def _write(self, kind: int, seq: int, payload: bytes) -> None:
        head = _HEAD.pack(_MAGIC, kind, self._stream, seq, len(payload), 0)
        crc = zlib.crc32(payload, zlib.crc32(head[4:_CRC_AT]))
        frame = head[:_CRC_AT] + crc.to_bytes(4, "little") + payload
        written, cause = 0, "the disk is full"
        try:
            written = self._file.write(frame)
        except OSError as error:
            cause = error.strerror or str(error)
        if written != len(frame):
            os.ftruncate(self._file.fileno(), self._size)  # leave whole frames only
            self._file.seek(self._size)
            raise RecordError(f"{self.path}: record {seq} was not written: {cause}; make room and try again")
        self._size += written


def read_recording(
    path: str | Path, on_damage: Callable[[str], None] | None = None
) -> tuple[Meta, list[Record]]:
    """The records of a file, or of a folder of segments, in order and each once.

    A torn tail is cut and damaged records are left out; `on_damage` (default: a line on standard error) is
    told which. Raises RecordError for what is not a recording.
    """
    path = Path(path)
    files = _segments(path) if path.is_dir() else [path]
    if not files:
        raise RecordError(f"{path} holds no recording (no {SUFFIX} files); make one with `tether record`")
    meta: Meta | None = None
    records: list[Record] = []
    damage: list[str] = []
    torn = True  # every file is empty or broke off within its first frame
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            cause = error.strerror or str(error)
            raise RecordError(f"{file} cannot be read: {cause}; make one with `tether record`") from None
        torn = torn and data[: len(_MAGIC)] in (b"", _MAGIC)
        for kind, stream, seq, payload in _frames(data, str(file), damage):
            torn = False
            try:
                if kind == _META:
                    meta = meta or Meta.from_json(payload)
                elif kind == _RECORD and meta is not None:
                    _keep(records, decode(payload), seq, stream == meta.stream, file, damage)
            except RecordError as error:
                if kind == _META:
                    raise RecordError(f"{file}: {error}") from None
                damage.append(f"{file}: record {seq} left out: {error}")
    if meta is None:
        kind_of = _NothingInside if torn else RecordError
        raise kind_of(f"{path} is not a recording, or its beginning is lost; make one with `tether record`")
    for line in damage:
        (on_damage or _complain)(line)
    return meta, records


def read_streams(
    folder: str | Path, on_damage: Callable[[str], None] | None = None
) -> Iterator[tuple[Meta, list[Record]]]:
    """The streams of a run's `steps/`, one sub-folder each, in the order they began. Raises RecordError."""
    found = []
    for sub in sorted(p for p in Path(folder).glob("*") if p.is_dir()):
        try:
            found.append(read_recording(sub, on_damage))
        except _NothingInside:
            (on_damage or _complain)(f"{sub}: empty, left out")
    yield from sorted(found, key=lambda stream: stream[0].created)


def _complain(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _segments(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"*{SUFFIX}") if p.stem.isdigit())


def _keep(
    records: list[Record], record: Record, seq: int, same: bool, file: Path, damage: list[str]
) -> None:
    if record.seq != seq or not same:
        raise RecordError("its frame belongs to another record")
    expected = records[-1].seq + 1 if records else seq
    if seq < expected:
        raise RecordError("it is there twice")
    if seq > expected:
        damage.append(f"{file}: records {expected} to {seq - 1} are missing")
    records.append(record)


def _frames(
    data: bytes, name: str, damage: list[str]
) -> Iterator[tuple[int, str, int, bytes]]:
    """(kind, stream, seq, payload) of every whole frame; after damage the next frame is searched for."""
    at, bad = 0, -1  # where we are; where the damage we are in began
    while at < len(data):
        frame = _frame_at(data, at)
        if frame is None:
            bad = at if bad < 0 else bad
            at = data.find(_MAGIC, at + 1)
            at = len(data) if at < 0 else at
            continue
        if bad >= 0:
            damage.append(f"{name}: bytes {bad} to {at} are damaged, left out")
            bad = -1
        yield frame
        at += _HEAD.size + len(frame[3])
    if bad >= 0:
        damage.append(f"{name}: cut at byte {bad}, the rest ({len(data) - bad} bytes) is not a whole record")


def _frame_at(data: bytes, at: int) -> tuple[int, str, int, bytes] | None:
    if len(data) - at < _HEAD.size:
        return None
    magic, kind, stream, seq, length, crc = _HEAD.unpack_from(data, at)
    if magic != _MAGIC or length > min(MAX_PAYLOAD, len(data) - at - _HEAD.size):
        return None
    payload = data[at + _HEAD.size : at + _HEAD.size + length]
    if zlib.crc32(payload, zlib.crc32(data[at + 4 : at + _CRC_AT])) != crc:
        return None
    return kind, stream.hex(), seq, payload
