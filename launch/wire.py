"""The messages of the link and their bytes: one table, strict bounds, nothing trusted.

A message is exactly two frames, [header: a msgpack map of at most 8 KB] [body: at most 1 MiB less the header
limit]. The header holds the protocol version `v`, the type `t`, the body's crc32 and the fields of MESSAGES,
no more and no fewer. The format of a record is `robot_env/record.py`'s.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgpack
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from ..robot_env import record
from ..robot_env.record import LIMITS, MAX_TEXT

Params = dict[str, np.ndarray]  # flat name -> float array

VERSION = 2
MAX_HEADER = 8 << 10
MAX_BODY = (1 << 20) - MAX_HEADER
MAX_BATCH = 32  # records in one DATA
CHUNK = 128 << 10  # bytes of weights in one WEIGHTS, of records in one DATA: on 1 Mbit/s the rest waits for 1 s
MAX_WEIGHTS = 64 << 20  # bytes
ENDED = record.MAX_INT - 1  # stands in for the next record of a stream that gets no more

KINDS = record.KINDS | {"sha256": lambda v: type(v) is str and re.fullmatch("[0-9a-f]{64}", v) is not None}

# type: (sender, name:kind of each field of the header)
MESSAGES = {
    # on each connect; body: the stream's Meta as JSON, or empty to ask what there is to do. first: the oldest
    # record the actor still has, those before will never come (again); next: the one it will make next, or ENDED
    "HELLO": ("actor", "stream:stream first:count next:count"),
    # body: what there is to do (task, policy) as a msgpack map
    "WELCOME": ("learner", "stream:stream"),
    # body: UTF-8, why; empty: only because the learner does not know this actor, say HELLO
    "REFUSE": ("learner", ""),
    # body: 1 to 32 records, the first of them number seq
    "DATA": ("actor", "stream:stream seq:count"),
    # all up to seq is stored; the actor may reach step run_until; the newest weights (0: none); stop: why to end
    # cleanly (it may only make the robot safer), or empty. Answers DATA and STATUS
    "ACK": ("learner", "seq:count run_until:count weights:count stop:text"),
    # twice a second, and when weights were taken or refused (why); state: run or closed
    "STATUS": ("actor", "stream:stream state:text spool:count weights:count refused:text stats:numbers"),
    # send me the chunk of this version that begins here (a learner without it begins with its newest). Not asked for
    # twice at once, so that acks pass
    "WANT": ("actor", "stream:stream version:count offset:count"),
    # body: at most CHUNK bytes of a safetensors file, of the newest version; from 0 where it is another one
    "WEIGHTS": ("learner", "version:count offset:count nbytes:count layout:sha256 sha256:sha256"),
}
FIELDS = {kind: dict(field.split(":") for field in header.split()) for kind, (_, header) in MESSAGES.items()}


class WireError(RuntimeError):
    """The link failed or a message is malformed: names the cause and, where there is one, the remedy."""


class Malformed(WireError):
    """A message to be dropped and counted; whoever sent it is served on."""


class VersionError(WireError):
    """The other side speaks another version of the protocol."""


class Message(NamedTuple):
    """A message that passed every check."""

    kind: str
    fields: dict[str, Any]
    body: bytes


def encode(kind: str, body: bytes = b"", **fields: Any) -> list[bytes]:
    """The two frames of a message. Raises Malformed for one that `decode` would refuse."""
    _check(kind, fields)
    header = msgpack.packb({"v": VERSION, "t": kind, "crc": zlib.crc32(body), **fields})
    if len(header) > MAX_HEADER or len(body) > MAX_BODY:
        raise Malformed(f"{kind}: {len(header)} + {len(body)} bytes do not fit a message")
    return [header, body]


def decode(frames: Sequence[bytes], sender: str) -> Message:
    """The message of frames from `sender`, whom nobody vouches for. Raises Malformed or VersionError."""
    if len(frames) != 2 or len(frames[0]) > MAX_HEADER or len(frames[1]) > MAX_BODY:
        raise Malformed("a message is two frames, neither of them too long")
    fields = unpack(frames[0], dict)
    version, kind, crc = fields.pop("v", None), fields.pop("t", None), fields.pop("crc", None)
    if type(version) is int and version != VERSION:
        cause = f"the other side speaks version {version} of the protocol, this one {VERSION}"
        raise VersionError(f"{cause}: install the same tether on both")
    if version != VERSION or type(kind) is not str or crc != zlib.crc32(frames[1]):
        raise Malformed("a header without a version or a type, or a body that does not match its checksum")
    _check(kind, fields)
    if MESSAGES[kind][0] != sender:
        raise Malformed(f"{kind} is not for the {sender} to send")
    return Message(kind, fields, frames[1])


def _check(kind: str, fields: dict[str, Any]) -> None:
    due = FIELDS.get(kind)
    if due is None or fields.keys() != due.keys():
        raise Malformed(f"no message {kind!r} has the fields {', '.join(map(str, fields))}")
    for name, what in due.items():
        if not KINDS[what](fields[name]):
            raise Malformed(f"{kind}: {name} is of the wrong type or out of bounds")


def clip(text: str) -> str:
    """The beginning of a text, as much of it as fits a field."""
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore")


def unpack(data: bytes, kind: type, **bounds: int) -> Any:
    """A msgpack `kind` of bytes nobody vouches for, within LIMITS or the wider `bounds`. Raises Malformed."""
    try:
        value = msgpack.unpackb(data, **LIMITS | {"max_bin_len": 64} | bounds)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Malformed(f"malformed: {error}") from None
    if type(value) is not kind:
        raise Malformed(f"malformed: not a {kind.__name__}")
    return value


def unpack_records(body: bytes) -> list[bytes]:
    """The payloads of a DATA body, which is a msgpack array of them. Raises Malformed."""
    payloads = unpack(body, list, max_array_len=MAX_BATCH, max_bin_len=MAX_BODY)
    if not payloads or not all(type(payload) is bytes for payload in payloads):
        raise Malformed("DATA: not a list of records")
    return payloads


class Weights(NamedTuple):
    """The parameters of a policy, ready to send."""

    version: int
    data: bytes  # a safetensors file
    layout: str
    sha256: str
    made_at: float  # s, monotonic

    def chunk(self, offset: int) -> list[bytes]:
        """The WEIGHTS that begins at `offset`."""
        return _chunk(self, offset)

    def __hash__(self) -> int:
        return hash(self.sha256)  # not of all the data


@lru_cache(8)  # many actors ask for the same ones
def _chunk(weights: Weights, offset: int) -> list[bytes]:
    return encode("WEIGHTS", weights.data[offset : offset + CHUNK], version=weights.version, offset=offset,
                  nbytes=len(weights.data), layout=weights.layout, sha256=weights.sha256)


NO_WEIGHTS = Weights(0, b"", "0" * 64, "0" * 64, math.inf)


def pack_weights(version: int, params: Params) -> Weights:
    """Ready to send. Raises WireError where a number is not finite."""
    arrays = {name: np.array(value, "<f4", order="C") for name, value in params.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise WireError(f"weights {version} are not published: {name} is not finite")
    data = safetensors.save(arrays)
    return Weights(version, data, _layout(data), _sha256(data), time.monotonic())


class Inbox:
    """Puts weights together, chunk by chunk. What it returns is complete, checked and newer than before.

    `prepare(version, params)` has the last word: it raises WireError to refuse them, and what it returns is what
    `take` returns.
    """

    def __init__(self, prepare: Callable[[int, Params], Any] = lambda version, params: params) -> None:
        self._prepare = prepare
        self.version = 0  # of the newest complete set
        self.tried = 0  # of the newest that was complete or refused
        self.refused = ""  # why the last one that was refused was
        self._coming, self._data = 0, bytearray()
        self._layout = ""  # of the first complete set: a policy does not change its shape

    def filled(self, version: int) -> int:
        """Bytes that came of a version."""
        return len(self._data) if version == self._coming else 0

    def due(self, newest: int) -> tuple[int, int]:
        """Version and offset of the next chunk: of what has begun to come, though newer ones may be published faster
        than any comes, else of `newest`."""
        return (self._coming, len(self._data)) if self._data else (newest, 0)

    def take(self, body: bytes, version: int, offset: int, nbytes: int, layout: str, sha256: str) -> Any:
        """The parameters that a WEIGHTS completes, prepared. One that is not the next due chunk changes nothing."""
        if version <= self.tried or offset != self.filled(version):
            return None
        if version != self._coming:
            self._coming, self._data = version, bytearray()
        self._data += body
        try:
            if not body or not len(self._data) <= nbytes <= MAX_WEIGHTS:
                raise WireError(f"{len(self._data)} of {nbytes} bytes")
            if self._layout not in ("", layout):
                raise WireError("the layout changed within a run")
            if len(self._data) < nbytes:
                return None
            prepared = self._prepare(version, _parse(bytes(self._data), layout, sha256))
            self.version, self._layout = version, layout
        except WireError as error:
            self.refused, prepared = clip(f"weights {version}: {error}"), None
        self.tried, self._data = version, bytearray()
        return prepared


def _parse(data: bytes, layout: str, sha256: str) -> Params:
    if (_sha256(data), _layout(data)) != (sha256, layout):
        raise WireError("the data or their layout do not match the checksum")
    try:
        params = safetensors.load(data)
    except (SafetensorError, ValueError, LookupError) as error:
        raise WireError(f"malformed: {error}") from None
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in params.values()):
        raise WireError("a number is not finite or not a float32")
    return params


def _layout(data: bytes) -> str:
    """Of the header of a safetensors file: names, shapes and types."""
    return _sha256(data[: 8 + int.from_bytes(data[:8], "little")])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
