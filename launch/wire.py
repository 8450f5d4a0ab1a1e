"""The messages of the link and their bytes: one table, strict bounds, no pickle, nothing trusted.

A message is exactly two frames, [header: a msgpack map of at most 8 KB] [body: at most 1 MiB less the header
limit]. The header holds the protocol version `v`, the type `t`, the body's crc32 and the fields of MESSAGES,
no more and no fewer. The format of a record is `robot_env/record.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np

VERSION = 1
MAX_HEADER = 8 << 10
MAX_BODY = (1 << 20) - MAX_HEADER
MAX_TEXT = 256  # bytes
MAX_BATCH = 32  # records in one DATA
MAX_INT = 1 << 53
CHUNK = 256 << 10  # bytes of weights in one WCHUNK: larger ones starve heartbeats on a slow link
MAX_WEIGHTS = 64 << 20  # bytes
MAX_ARRAYS = 256

_BOUNDS: dict[str, Any] = {
    "max_str_len": MAX_TEXT, "max_bin_len": 64, "max_array_len": 64, "max_map_len": 64, "max_ext_len": 0,
    "strict_map_key": True, "raw": False,
}


class WireError(RuntimeError):
    """The link failed or a message is malformed: names the cause and, where there is one, the remedy."""


class VersionError(WireError):
    """The other side speaks another version of the protocol."""


KINDS: dict[str, Callable[[Any], bool]] = {
    "count": lambda v: type(v) is int and 0 <= v < MAX_INT,
    "text": lambda v: type(v) is str and len(v.encode(errors="replace")) <= MAX_TEXT,
    "flag": lambda v: type(v) is bool,
    "stream": lambda v: type(v) is str and re.fullmatch("[0-9a-f]{16}", v) is not None,
    "sha256": lambda v: type(v) is str and re.fullmatch("([0-9a-f]{64})?", v) is not None,
    "numbers": lambda v: type(v) is dict and len(v) <= 64 and all(
        KINDS["text"](k) and type(x) in (int, float) and math.isfinite(x) for k, x in v.items()
    ),
}


@dataclass(frozen=True)
class Shape:
    """One type of message: who sends it, what its header holds, what it is for."""

    sender: str  # "actor" or "learner"
    header: str  # name:kind of each field
    about: str

    @property
    def fields(self) -> dict[str, str]:
        """Field name -> one of KINDS."""
        return dict(field.split(":") for field in self.header.split())  # type: ignore[misc]


MESSAGES = {
    "HELLO": Shape(
        "actor", "stream_id:stream spec_hash:sha256 first_seq:count next_seq:count software:text spool:count "
        "weights_version:count",
        "on each connect; body: the stream's Meta as JSON, or empty to ask what there is to do"),
    "WELCOME": Shape(
        "learner", "session:stream expected_seq:count weights_version:count run_until:count",
        "body: JSON for the actor that asked (task, policy), else empty"),
    "REFUSE": Shape(
        "learner", "reason:text again:flag",
        "body: UTF-8, the differences; again: the learner does not know this actor, say HELLO"),
    "DATA": Shape(
        "actor", "stream_id:stream seq0:count n:count",
        "records seq0 .. seq0+n-1, n from 1 to 32; body: each as length u32 and payload"),
    "ACK": Shape(
        "learner", "stream_id:stream cum_seq:count run_until:count",
        "all up to cum_seq is stored; run_until: the step the actor may reach; answers STATUS too"),
    "GAP": Shape("actor", "stream_id:stream first:count last:count reason:text", "these will never come"),
    "STATUS": Shape(
        "actor", "stream_id:stream state:text spool:count weights_version:count weights_bytes:count "
        "stats:numbers",
        "twice a second, and after each WCHUNK: weights_bytes came of the transfer; state: run or closed"),
    "WBEGIN": Shape(
        "learner", "version:count layout_hash:sha256 nbytes:count sha256:sha256",
        "weights follow; body: their layout; a newer version supersedes an unfinished one"),
    "WCHUNK": Shape("learner", "version:count offset:count", "body: at most 256 KiB"),
    "WEND": Shape("learner", "version:count", "all chunks were sent"),
    "WRESULT": Shape("actor", "version:count applied:flag reason:text", "the verdict; asks for the next"),
    "STOP": Shape("learner", "reason:text", "end cleanly; it may only make the robot safer"),
}
_FIELDS = {kind: shape.fields for kind, shape in MESSAGES.items()}


class Message(NamedTuple):
    """A message that passed every check."""

    kind: str
    fields: dict[str, Any]
    body: bytes


def encode(kind: str, body: bytes = b"", **fields: Any) -> list[bytes]:
    """The two frames of a message. Raises WireError for one that `decode` would refuse."""
    _check(kind, fields)
    header = msgpack.packb({"v": VERSION, "t": kind, "crc": zlib.crc32(body), **fields})
    if len(header) > MAX_HEADER or len(body) > MAX_BODY:
        raise WireError(f"{kind}: {len(header)} + {len(body)} bytes do not fit a message")
    return [header, body]


def decode(frames: Sequence[bytes], sender: str) -> Message:
    """The message of frames from `sender`, whom nobody vouches for. Raises WireError."""
    if len(frames) != 2:
        raise WireError(f"{len(frames)} frames where a message has 2")
    header, body = frames
    if len(header) > MAX_HEADER or len(body) > MAX_BODY:
        raise WireError("a frame is too long")
    try:
        fields = msgpack.unpackb(header, **_BOUNDS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"malformed header: {error}") from None
    if type(fields) is not dict:
        raise WireError("the header is not a map")
    version, kind, crc = fields.pop("v", None), fields.pop("t", None), fields.pop("crc", None)
    if type(version) is int and version != VERSION:
        raise VersionError(
            f"the other side speaks version {version} of the protocol, this one {VERSION}: "
            "install the same tether on both"
        )
    if type(version) is not int or type(kind) is not str:
        raise WireError("the header has no version or no type")
    _check(kind, fields)
    if MESSAGES[kind].sender != sender:
        raise WireError(f"{kind} is not for the {sender} to send")
    if type(crc) is not int or crc != zlib.crc32(body):
        raise WireError(f"{kind}: the body does not match its checksum")
    return Message(kind, fields, body)


def _check(kind: str, fields: dict[str, Any]) -> None:
    due = _FIELDS.get(kind)
    if due is None:
        raise WireError(f"unknown message {clip(kind)!r}")
    if fields.keys() != due.keys():
        raise WireError(f"{kind} has the fields {', '.join(due)}")
    for name, what in due.items():
        if not KINDS[what](fields[name]):
            raise WireError(f"{kind}: {name} is of the wrong type or out of bounds")


def clip(text: str) -> str:
    """The beginning of a text, as much of it as fits a field."""
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore")


def pack_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as a body. Raises WireError when it does not fit."""
    body = json.dumps(value, allow_nan=False).encode()
    if len(body) > MAX_BODY:
        raise WireError(f"{len(body)} bytes of JSON do not fit a message (at most {MAX_BODY})")
    return body


def unpack_json(body: bytes) -> dict[str, Any]:
    """The inverse of `pack_json`. Raises WireError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise WireError("the body is not a JSON object")
    return value


def pack_records(payloads: Sequence[bytes]) -> bytes:
    """The body of a DATA message."""
    return b"".join(part for p in payloads for part in (len(p).to_bytes(4, "little"), p))


def unpack_records(body: bytes, count: int) -> list[bytes]:
    """The `count` payloads of a DATA body, which they fill exactly. Raises WireError."""
    if not 1 <= count <= MAX_BATCH:
        raise WireError(f"DATA: {count} records, not 1 to {MAX_BATCH}")
    payloads, at = [], 0
    for _ in range(count):
        end = at + 4 + int.from_bytes(body[at : at + 4], "little")
        if end > len(body):
            raise WireError("DATA: a record reaches beyond the body")
        payloads.append(body[at + 4 : end])
        at = end
    if at != len(body):
        raise WireError("DATA: bytes after the last record")
    return payloads


@dataclass(frozen=True)
class Weights:
    """The parameters of a policy, ready to send."""

    version: int
    layout: bytes  # msgpack [[name, "f4", [sizes]], ...], by name
    data: bytes

    def messages(self) -> Iterator[list[bytes]]:
        """WBEGIN, WCHUNK ..., WEND."""
        yield encode(
            "WBEGIN", self.layout, version=self.version, nbytes=len(self.data),
            layout_hash=_sha256(self.layout), sha256=_sha256(self.data),
        )
        for at in range(0, len(self.data), CHUNK):
            yield encode("WCHUNK", self.data[at : at + CHUNK], version=self.version, offset=at)
        yield encode("WEND", version=self.version)


def pack_weights(version: int, params: Mapping[str, np.ndarray]) -> Weights:
    """Flat name -> float array. Raises WireError where a number is not finite or the set is too large."""
    arrays = {name: np.ascontiguousarray(params[name], "<f4") for name in sorted(params)}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise WireError(f"weights {version} are not published: {name} is not finite")
    layout = msgpack.packb([[name, "f4", np.shape(params[name])] for name in arrays])
    data = b"".join(array.tobytes() for array in arrays.values())
    _parse_layout(layout, len(data))
    return Weights(version, layout, data)


class Inbox:
    """Puts one transfer of weights together. What it returns is complete, checked and newer than before."""

    def __init__(self) -> None:
        self.version = 0  # of the newest complete set
        self._layout_hash = ""  # of the first complete set: a policy does not change its shape
        self._begin: dict[str, Any] | None = None
        self._layout: list[tuple[str, tuple[int, ...]]] = []
        self._data = bytearray()
        self._filled = 0

    @property
    def filled(self) -> int:
        """Bytes that came of the transfer under way."""
        return self._filled

    def take(self, message: Message) -> dict[str, np.ndarray] | None:
        """The parameters that `message` completes (read-only views). Raises WireError: the set is refused."""
        try:
            return getattr(self, f"_{message.kind.lower()}")(message)
        except WireError:
            self._begin = None
            raise

    def _wbegin(self, message: Message) -> None:
        fields = message.fields
        self._begin = None
        if fields["version"] <= self.version:
            raise WireError(f"not newer than version {self.version}")
        if _sha256(message.body) != fields["layout_hash"]:
            raise WireError("the layout does not match its checksum")
        if self._layout_hash not in ("", fields["layout_hash"]):
            raise WireError("the layout changed within a run")
        self._layout = _parse_layout(message.body, fields["nbytes"])
        self._begin, self._data, self._filled = fields, bytearray(fields["nbytes"]), 0

    def _wchunk(self, message: Message) -> None:
        if self._begin is None or message.fields["version"] != self._begin["version"]:
            return  # of a set that was refused or superseded
        end = self._filled + len(message.body)
        if message.fields["offset"] != self._filled or len(message.body) > CHUNK or end > len(self._data):
            raise WireError(f"chunk at {message.fields['offset']} where {self._filled} was due")
        self._data[self._filled : end] = message.body
        self._filled = end

    def _wend(self, message: Message) -> dict[str, np.ndarray] | None:
        begin = self._begin
        if begin is None:
            raise WireError("its beginning was refused or lost")
        if message.fields["version"] != begin["version"]:
            return None  # superseded
        if self._filled != len(self._data):
            raise WireError(f"{self._filled} of {len(self._data)} bytes came")
        data = bytes(self._data)
        if _sha256(data) != begin["sha256"]:
            raise WireError("the data does not match its checksum")
        flat, params, at = np.frombuffer(data, "<f4"), {}, 0
        if not np.isfinite(flat).all():
            raise WireError("a number is not finite")
        for name, shape in self._layout:
            params[name] = flat[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
        self.version, self._layout_hash, self._begin = begin["version"], begin["layout_hash"], None
        return params


def _parse_layout(layout: bytes, nbytes: int) -> list[tuple[str, tuple[int, ...]]]:
    """[(name, shape)] of a layout that describes `nbytes` bytes. Raises WireError."""
    if nbytes > MAX_WEIGHTS or len(layout) > MAX_BODY:
        raise WireError(f"{nbytes} bytes of weights, more than {MAX_WEIGHTS}")
    try:
        rows = msgpack.unpackb(layout, **_BOUNDS | {"max_array_len": MAX_ARRAYS})
        found = [(name, tuple(shape)) for name, dtype, shape in rows if dtype == "f4"]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"malformed layout: {error}") from None
    names, shapes = [name for name, _ in found], [shape for _, shape in found]
    good = len(found) == len(rows) > 0 and all(map(KINDS["text"], names)) and names == sorted(set(names))
    good = good and all(len(shape) <= 8 and all(map(KINDS["count"], shape)) for shape in shapes)
    if not good or sum(4 * math.prod(shape) for shape in shapes) != nbytes:
        raise WireError("malformed layout")
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
