"""The link: one ROUTER at the learner, one DEALER an actor, each owned by a thread that nobody waits for.

Records go to the learner in order, each once: the sender keeps them until they are acknowledged and goes back
to the first unacknowledged one after a second without progress or a new connection (go-back-N); the learner
takes only the one it expects. Weights and permissions to go on (`run_until`) come back on the same socket.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from typing import Any, TypeVar

import numpy as np
import zmq

from ..robot_env.record import Meta, Record, RecordError, decode
from . import wire
from .pump import Pump
from .spool import Spool
from .wire import MAX_BODY, Message, VersionError, WireError

WINDOW = 256  # records sent and not acknowledged
GO_BACK_S = 1.0
STATUS_S = 0.5
HELLO_S = 1.0  # between two attempts
GONE_S = 5.0  # an actor silent for so long does not count as connected
RETRY_MS, IDLE_MS = 20, 500  # until a full or unconnected pipe is tried again; at most between two turns
MAX_STREAMS = 1024  # in a learner's life
MAX_QUEUED = 8192  # records the learner's main thread may lag behind

T = TypeVar("T")


@dataclass
class _Stream:
    """What the learner knows of one stream, and of the actor that sends it."""

    expected: int  # next sequence number
    name: str = ""
    meta: Meta | None = None
    route: bytes = b""  # ROUTER identity of the actor's connection; empty: none
    run_until: int = 0
    ack_due: bool = False
    seen: float = -math.inf
    state: str = "away"
    spool: int = 0
    weights_version: int = 0
    stats: dict[str, float] = field(default_factory=dict)
    received: int = 0
    missing: int = 0  # records that the actor said will never come
    transfer: wire.Weights | None = None  # being sent, or sent and not yet answered
    messages: Iterator[list[bytes]] = iter(())
    pending: list[bytes] | None = None  # the next of them
    sent_bytes: int = 0  # of the transfer, and how many of them came
    came_bytes: int = 0
    refused: tuple[int, str] = (0, "")  # version of the weights, reason


def _checked(parse: Callable[[bytes], T], data: bytes) -> T:
    try:
        return parse(data)
    except RecordError as error:
        raise WireError(str(error)) from None


class LearnerLink:
    """The learner's end. Actors come and go; each stream's records are given out in order, each once.

    `journal(meta, first_seq, payloads)` stores records before they are acknowledged; it runs in the network
    thread. `expected` maps stream -> next sequence number, to go on with streams of an earlier life.
    `spec` is the description actors must agree with, `welcome` what they are told when they ask (JSON).
    Every call raises WireError, also for an error of the thread.
    """

    def __init__(
        self, bind: str, spec: Meta | None, welcome: Mapping[str, Any],
        journal: Callable[[Meta, int, list[bytes]], None] | None = None,
        expected: Mapping[str, int] | None = None,
    ) -> None:
        self._spec, self._welcome, self._journal = spec, wire.pack_json(welcome), journal
        self._session = secrets.token_hex(8)
        self._streams = {name: _Stream(seq, name) for name, seq in (expected or {}).items()}
        self._routes: dict[bytes, _Stream] = {}
        self._queue: deque[tuple[str, Record]] = deque()
        self._weights: wire.Weights | None = None
        self._published: dict[int, float] = {}
        self._stop, self._closing = "", False
        self.malformed = 0  # messages dropped
        self._pump = Pump(zmq.ROUTER, bind, self._turn)
        self.address = self._pump.address
        self._pump.start()

    def poll(self, timeout: float = 0.0) -> list[tuple[str, Record]]:
        """(stream, record) of all that came since the last call; waits up to `timeout` s for the first.

        A jump in a stream's sequence numbers means that the records between are lost for good.
        """
        with self._pump.changed:
            self._pump.wait(lambda: self._queue, timeout)
            found = list(self._queue)
            self._queue.clear()
        return found

    def set_run_until(self, stream: str, step: int) -> None:
        """Let the actor of `stream` go up to `step`; never less than before."""
        with self._pump.changed:
            self._pump.check()
            entry = self._streams.get(stream)
            if entry is None or step <= entry.run_until:
                return
            entry.run_until, entry.ack_due = step, True
        self._pump.wake()

    def publish(self, version: int, params: Mapping[str, np.ndarray]) -> None:
        """Send weights to every actor, now and whenever one connects. They must be finite and newer."""
        weights = wire.pack_weights(version, params)
        with self._pump.changed:
            self._pump.check()
            if self._weights is not None and version <= self._weights.version:
                raise WireError(f"weights {version} are not newer than {self._weights.version}")
            self._weights = weights
            self._published[version] = time.monotonic()
            if len(self._published) > 256:
                self._published.pop(next(iter(self._published)))
        self._pump.wake()

    def status(self) -> dict[str, dict[str, Any]]:
        """What is known of every stream and its actor; ages in seconds, -1 where there is none."""
        now = time.monotonic()
        with self._pump.changed:
            self._pump.check()
            return {name: {
                "state": s.state if now - s.seen < GONE_S else "away",
                "age_s": now - s.seen if s.seen > 0 else -1.0,
                "received": s.received, "missing": s.missing, "spool": s.spool, "run_until": s.run_until,
                "weights_version": s.weights_version, "weights_refused": s.refused[1], "stats": s.stats,
                "weights_age_s": now - self._published.get(s.weights_version, now + 1.0),
            } for name, s in self._streams.items()}

    def stop(self, reason: str) -> None:
        """Tell every actor, those that connect later too, to end cleanly."""
        with self._pump.changed:
            self._stop = wire.clip(reason) or "stop"
            for stream in self._streams.values():
                stream.ack_due = True  # STOP goes with it
        self._pump.wake()

    def wait_closed(self, timeout: float) -> bool:
        """Wait until every connected actor has ended, and so delivered what it had."""
        def ended() -> bool:
            since = time.monotonic() - GONE_S
            return all(s.state in ("away", "closed") or s.seen < since for s in self._streams.values())

        with self._pump.changed:
            self._pump.wait(ended, timeout)
            return ended()

    def close(self) -> None:
        """Send what is due and let go of the address. Idempotent."""
        self._closing = True
        self._pump.close()

    def _turn(self, came: list[list[bytes]]) -> int | None:
        closing = self._closing
        with self._pump.changed:
            for route, *frames in came:
                self._take(route, frames)
            if came:
                self._pump.changed.notify_all()
            sleep_ms = min((self._serve(s) for s in self._streams.values() if s.route), default=IDLE_MS)
        return None if closing else sleep_ms

    def _send(self, route: bytes, kind: str, body: bytes = b"", **fields: Any) -> bool:
        return self._send_frames(route, wire.encode(kind, body, **fields))

    def _send_frames(self, route: bytes, frames: list[bytes]) -> bool:
        try:
            return self._pump.send([route, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if route in self._routes:  # gone; it will say HELLO when it is back
                self._routes.pop(route).route = b""
            return False

    def _take(self, route: bytes, frames: list[bytes]) -> None:
        try:
            message = wire.decode(frames, "actor")
            stream, fields = self._routes.get(route), message.fields
            if message.kind == "HELLO":
                self._on_hello(route, message)
            elif stream is None or stream.meta is None or fields.get("stream_id", stream.name) != stream.name:
                self._send(route, "REFUSE", reason="say HELLO first", again=True)
            else:
                stream.seen = time.monotonic()
                getattr(self, f"_on_{message.kind.lower()}")(stream, stream.meta, message)
        except VersionError as error:
            self.malformed += 1
            self._send(route, "REFUSE", reason=wire.clip(str(error)), again=False)
        except WireError:
            self.malformed += 1  # dropped; whoever sent it is served on

    def _on_hello(self, route: bytes, message: Message) -> None:
        fields, reason = message.fields, ""
        if not message.body:  # asks what there is to do
            self._welcome_to(route, _Stream(1), self._welcome)
            return
        meta = _checked(Meta.from_json, message.body)
        first, after = fields["first_seq"], fields["next_seq"]
        stream = self._streams.get(meta.stream) or _Stream(first, meta.stream)
        lines = self._spec.differences(meta) if self._spec is not None else []
        if (meta.stream, meta.spec_hash) != (fields["stream_id"], fields["spec_hash"]):
            raise WireError("HELLO contradicts its body")
        if lines:
            reason = "the actor's robot is not the one this learner trains (here: the learner)"
        elif not 1 <= first <= after or stream.expected > after or len(self._streams) > MAX_STREAMS:
            reason = "this stream cannot go on here: start the actor again"
        if reason:
            self._send(route, "REFUSE", "\n".join(lines).encode()[:MAX_BODY], reason=reason, again=False)
            return
        for other in self._streams.values():  # one stream a connection, one connection a stream
            other.route = b"" if other.route == route else other.route
        self._routes.pop(stream.route, None)
        self._routes[route] = self._streams[meta.stream] = stream
        stream.meta, stream.route, stream.state, stream.transfer = meta, route, "run", None
        stream.seen, stream.spool = time.monotonic(), fields["spool"]
        stream.weights_version, stream.refused = fields["weights_version"], (0, "")
        stream.ack_due = bool(self._stop)
        self._welcome_to(route, stream, b"")

    def _welcome_to(self, route: bytes, stream: _Stream, body: bytes) -> None:
        newest = self._weights.version if self._weights is not None else 0
        self._send(route, "WELCOME", body, session=self._session, expected_seq=stream.expected,
                   weights_version=newest, run_until=stream.run_until)

    def _on_data(self, stream: _Stream, meta: Meta, message: Message) -> None:
        seq = message.fields["seq0"]
        payloads: list[bytes] = []
        records: list[tuple[str, Record]] = []
        stream.ack_due = True  # also for what came before, or too early
        for payload in wire.unpack_records(message.body, message.fields["n"]):
            if seq == stream.expected + len(records) and len(self._queue) + len(records) < MAX_QUEUED:
                record = _checked(decode, payload)
                if record.seq != seq:
                    raise WireError("a record under another number")
                payloads.append(payload)
                records.append((stream.name, record))
            seq += 1
        if records and self._journal is not None:
            self._journal(meta, stream.expected, payloads)
        stream.expected += len(records)
        stream.received += len(records)
        self._queue.extend(records)

    def _on_gap(self, stream: _Stream, meta: Meta, message: Message) -> None:
        after = message.fields["last"] + 1
        stream.ack_due = True
        if message.fields["first"] <= stream.expected < after:
            stream.missing += after - stream.expected
            stream.expected = after

    def _on_status(self, stream: _Stream, meta: Meta, message: Message) -> None:
        fields = message.fields
        stream.state, stream.spool, stream.stats = fields["state"], fields["spool"], fields["stats"]
        stream.weights_version, stream.came_bytes = fields["weights_version"], fields["weights_bytes"]
        stream.ack_due = True

    def _on_wresult(self, stream: _Stream, meta: Meta, message: Message) -> None:
        number, reason = message.fields["version"], message.fields["reason"]
        if message.fields["applied"]:
            stream.weights_version = number
        else:
            stream.refused = (number, f"weights {number}: {reason}")
        if stream.transfer is not None and stream.transfer.version == number:
            stream.transfer = None

    def _serve(self, stream: _Stream) -> int:
        """Send one actor what is due; milliseconds until there may be more to do."""
        if stream.ack_due:
            sent = self._send(stream.route, "ACK", stream_id=stream.name, cum_seq=stream.expected - 1,
                              run_until=stream.run_until)
            if sent and self._stop:
                sent = self._send(stream.route, "STOP", reason=self._stop)
            stream.ack_due = not sent
            if not sent:
                return RETRY_MS
        newest = self._weights
        if newest is None:
            return IDLE_MS
        idle = stream.transfer is None and newest.version not in (stream.weights_version, stream.refused[0])
        superseded = stream.transfer not in (None, newest) and stream.pending is not None
        if idle or superseded:
            stream.transfer, stream.messages = newest, newest.messages()
            stream.pending = next(stream.messages)
            stream.sent_bytes, stream.came_bytes = -len(newest.layout), 0
        waiting = stream.sent_bytes - stream.came_bytes > wire.CHUNK  # its STATUS will ask for more
        if stream.transfer is None or stream.pending is None or waiting:
            return IDLE_MS
        if not self._send_frames(stream.route, stream.pending):
            return RETRY_MS
        stream.sent_bytes += len(stream.pending[1])
        stream.pending = next(stream.messages, None)
        return 0


class ActorLink:
    """The actor's end. `start` asks the learner what there is to do, `begin` opens the stream; from then
    on only the calls named wait, and `close`, wait. Every call raises WireError, also for an error of the
    thread.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.stopped = threading.Event()  # the learner said stop; see stop_reason
        self.stop_reason = ""
        self.malformed = 0  # messages dropped
        self._meta: Meta | None = None
        self._spool = Spool()
        self._sent = 0  # highest sequence number sent on this connection
        self._progress_at = 0.0  # when the window last moved
        self._inbox = wire.Inbox()
        self._fresh: tuple[int, dict[str, np.ndarray]] | None = None
        self._run_until = 0
        self._session = ""
        self._answer: bytes | None = None  # the body of the WELCOME to what was last asked
        self._open = False  # the learner took our HELLO on this connection
        self._hello_at, self._status_at = 0.0, 0.0  # when they are due; infinity: not needed
        self._stats: dict[str, float] = {}
        self._outbox: deque[list[bytes]] = deque()
        self._flush_until = math.inf  # set by close
        self._asker = secrets.token_hex(8)  # stands in for the stream until there is one
        self._pump = Pump(zmq.DEALER, address, self._turn)
        self._pump.start()

    def start(
        self, timeout: float | None = 10.0, on_wait: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        """What the learner tells an actor. `timeout` None: keep trying. `on_wait(seconds so far)` is called
        twice a second meanwhile, and may raise to give up. WireError when no learner answers."""
        return wire.unpack_json(self._await_answer(timeout, on_wait))

    def begin(self, meta: Meta, timeout: float | None = 10.0) -> None:
        """Open the stream `meta`. WireError with the differences when the learner refuses it."""
        with self._pump.changed:
            self._pump.check()
            self._meta, self._answer, self._open, self._hello_at = meta, None, False, 0.0
        self._pump.wake()
        self._await_answer(timeout, None)

    def send(self, seq: int, payload: bytes) -> None:
        """Hand over the next record (`record.encode`). WireError when no more fit in memory."""
        with self._pump.changed:
            self._pump.check()
            self._spool.append(seq, payload)
        self._pump.wake()

    def weights(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """(version, parameters) of the newest complete set, once; None when there is none since."""
        return self.wait_weights(0.0)

    def wait_weights(self, timeout: float | None) -> tuple[int, dict[str, np.ndarray]] | None:
        """As `weights`, but waits up to `timeout` s for a set, or until the learner says stop."""
        with self._pump.changed:
            self._pump.wait(lambda: self._fresh or self.stopped.is_set(), timeout)
            fresh, self._fresh = self._fresh, None
        return fresh

    @property
    def run_until(self) -> int:
        """The step the actor may reach."""
        with self._pump.changed:
            self._pump.check()
            return self._run_until

    def wait_run_until(self, step: int, timeout: float | None = None) -> bool:
        """Wait until the actor may reach `step`; False after `timeout` s or when the learner said stop."""
        with self._pump.changed:
            self._pump.wait(lambda: self._run_until >= step or self.stopped.is_set(), timeout)
            return self._run_until >= step

    def report(self, stats: Mapping[str, float]) -> None:
        """Numbers for the learner to show (at most 64); they go out twice a second."""
        clean = {wire.clip(name): float(value) for name, value in stats.items()}
        self._status("run", self._asker, clean)  # raises what the thread would
        with self._pump.changed:
            self._pump.check()
            self._stats = clean

    def close(self, timeout: float = 5.0) -> int:
        """Deliver what is left, for at most `timeout` s, and end. Returns the records not delivered."""
        with self._pump.changed:
            self._flush_until = min(self._flush_until, time.monotonic() + timeout)
        self._pump.close()
        return len(self._spool)

    def _await_answer(self, timeout: float | None, on_wait: Callable[[float], None] | None) -> bytes:
        began, waited = time.monotonic(), 0.0
        while True:
            with self._pump.changed:
                left = 0.5 if timeout is None else min(0.5, timeout - waited)
                self._pump.wait(lambda: self._answer is not None, left)
                if self._answer is not None:
                    return self._answer
            waited = time.monotonic() - began
            if timeout is not None and waited >= timeout:
                raise WireError(
                    f"no learner at {self.address} after {timeout:.0f} s: start it with "
                    f"`tether learner TASK --bind {self.address}`"
                )
            if on_wait is not None:
                on_wait(waited)

    def _turn(self, came: list[list[bytes]]) -> int | None:
        for frames in came:
            self._take(frames)
        with self._pump.changed:
            if came:
                self._pump.changed.notify_all()
            now = time.monotonic()
            sent = all(map(self._pump.send, self._messages(now)))
            if now >= self._flush_until or (self._flush_until < math.inf and not len(self._spool)):
                if self._open and self._meta is not None:
                    self._pump.send(self._status("closed", self._meta.stream, self._stats))
                return None
            due = [self._hello_at, self._flush_until, now + IDLE_MS / 1000]
            if self._open:
                due.append(now if self._more() else self._status_at)
            if self._open and self._sent >= self._spool.first:
                due.append(self._progress_at + GO_BACK_S)
        return max(0, math.ceil((min(due) - now) * 1000)) if sent else RETRY_MS

    def _more(self) -> bool:
        """Whether there is a record to send and the window is open."""
        return self._spool.first - 1 <= self._sent < min(self._spool.next_seq, self._spool.first + WINDOW) - 1

    def _messages(self, now: float) -> Iterator[list[bytes]]:
        """What to send now; after each `yield` comes what to note once it is sent."""
        spool = self._spool
        if now >= self._hello_at:
            yield self._hello()
            self._hello_at = now + HELLO_S
        if not self._open or self._meta is None:
            return
        while self._outbox:
            yield self._outbox[0]
            self._outbox.popleft()
        if self._sent >= spool.first and now - self._progress_at > GO_BACK_S:
            self._sent, self._progress_at = spool.first - 1, now
        self._sent = max(self._sent, spool.first - 1)  # an ack may overtake us
        if self._more():  # one a turn, so that nobody waits long for the lock
            if self._sent < spool.first:
                self._progress_at = now
            batch, seq = spool.batch(self._sent + 1), self._sent + 1
            body = wire.pack_records(batch)
            yield wire.encode("DATA", body, stream_id=self._meta.stream, seq0=seq, n=len(batch))
            self._sent += len(batch)
        if now >= self._status_at:
            yield self._status("run", self._meta.stream, self._stats)
            self._status_at = now + STATUS_S

    def _hello(self) -> list[bytes]:
        meta, spool = self._meta, self._spool
        return wire.encode(
            "HELLO", meta.to_json() if meta else b"", stream_id=meta.stream if meta else self._asker,
            spec_hash=meta.spec_hash if meta else "", first_seq=spool.first, next_seq=spool.next_seq,
            software=installed("tether"), spool=len(spool), weights_version=self._inbox.version,
        )

    def _status(self, state: str, stream: str, stats: dict[str, float]) -> list[bytes]:
        inbox = self._inbox
        return wire.encode("STATUS", stream_id=stream, state=state, spool=len(self._spool), stats=stats,
                           weights_version=inbox.version, weights_bytes=inbox.filled)

    def _take(self, frames: list[bytes]) -> None:
        try:
            message = wire.decode(frames, "learner")
            if message.kind in ("WBEGIN", "WCHUNK", "WEND"):
                self._on_weights(message)
                return
            with self._pump.changed:
                getattr(self, f"_on_{message.kind.lower()}")(message)
        except VersionError as error:
            self._pump.fail(error)
        except WireError:
            self.malformed += 1

    def _on_welcome(self, message: Message) -> None:
        fields, spool = message.fields, self._spool
        if bool(message.body) != (self._meta is None):
            return  # the answer to an earlier question
        if fields["session"] != self._session:  # another life of the learner counts weights anew
            self._session, self._inbox = fields["session"], wire.Inbox()
        expected = fields["expected_seq"]
        if self._meta is not None:
            if expected > spool.next_seq:
                raise WireError("WELCOME expects a record that does not exist")
            spool.ack(expected - 1)
            self._outbox.clear()
            if expected < spool.first:
                self._outbox.append(wire.encode("GAP", stream_id=self._meta.stream, first=expected,
                                                last=spool.first - 1, reason="acknowledged before"))
            self._sent, self._progress_at = spool.first - 1, time.monotonic()
            self._open, self._status_at = True, 0.0
            self._run_until = max(self._run_until, fields["run_until"])
        self._hello_at, self._answer = math.inf, message.body

    def _on_refuse(self, message: Message) -> None:
        if not message.fields["again"]:
            lines = message.body.decode(errors="replace").splitlines()
            reason = f"the learner at {self.address} refuses: {message.fields['reason']}"
            self._pump.fail(WireError("; ".join([reason, *lines])))
        elif self._open:
            self._open, self._hello_at = False, 0.0

    def _on_ack(self, message: Message) -> None:
        fields = message.fields
        if self._meta is None or fields["stream_id"] != self._meta.stream:
            return
        if fields["cum_seq"] >= self._spool.next_seq:
            raise WireError("ACK of a record that does not exist")
        if fields["cum_seq"] >= self._spool.first:
            self._spool.ack(fields["cum_seq"])
            self._progress_at = time.monotonic()
        self._run_until = max(self._run_until, fields["run_until"])

    def _on_weights(self, message: Message) -> None:
        number, reason, params = message.fields["version"], "", None
        try:
            params = self._inbox.take(message)  # hashing is done without the lock
        except WireError as error:
            reason = wire.clip(str(error))
        with self._pump.changed:
            self._status_at = 0.0  # tells the learner how much came, so that it sends more
            if params is not None:
                self._fresh = number, params
            if params is not None or reason:
                self._outbox.append(wire.encode("WRESULT", version=number, applied=not reason, reason=reason))

    def _on_stop(self, message: Message) -> None:
        self.stop_reason = message.fields["reason"]
        self.stopped.set()
