"""The link: one ROUTER at the learner, one DEALER an actor, each owned by a thread that nobody waits for.

Records go to the learner in order, each once: the sender keeps them until they are acknowledged and goes back
to the first unacknowledged one after a second without progress or a new connection (go-back-N); the learner
takes only the one it expects. Weights and permissions to go on (`run_until`) come back on the same socket.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import zmq

from ..robot_env.record import MAX_PAYLOAD, Meta, Record, RecordError, decode
from . import wire
from .wire import MAX_BATCH, MAX_BODY, Message, VersionError, WireError

WINDOW = 256  # records sent and not acknowledged
GO_BACK_S = 1.0
STATUS_S = 0.5
HELLO_S = 1.0  # between two attempts
GONE_S = 5.0  # an actor silent for so long does not count as connected
MAX_STREAMS = 1024  # a learner's, over its life
MAX_QUEUED = 8192  # records the learner's main thread may lag behind
MAX_SPOOL = 256 << 20  # bytes an actor keeps while the learner is away
WEIGHTS_TIMEOUT_S, WEIGHTS_ATTEMPTS = 5.0, 3
LINGER_MS = 300  # for the last messages at close

OPTIONS = {
    zmq.MAXMSGSIZE: 1 << 20, zmq.SNDHWM: 64, zmq.RCVHWM: 64, zmq.LINGER: 0, zmq.HANDSHAKE_IVL: 3000,
    zmq.HEARTBEAT_IVL: 500, zmq.HEARTBEAT_TIMEOUT: 1500, zmq.HEARTBEAT_TTL: 2000, zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 2000, zmq.TCP_KEEPALIVE: 1,
}  # fmt: skip


def configure(socket: zmq.Socket, address: str) -> str:
    """Set a socket up, before it binds or connects, for `address`, which is returned as ZeroMQ wants it.

    Keys belong here. Until they exist, raises WireError for an address off loopback.
    """
    match = re.fullmatch(r"tcp://([^:/]+):(\*|\d{1,5})", address)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise WireError(f"{address!r} is not an address; it looks like tcp://127.0.0.1:5555")
    host = "127.0.0.1" if match[1] == "localhost" else match[1]
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise WireError(
            f"{address} is not on this machine: the link has no keys yet, so it works on "
            "tcp://127.0.0.1:PORT only; between machines use a tunnel: "
            "`ssh -L 5555:127.0.0.1:5555 WORKSTATION`"
        )
    for option, value in OPTIONS.items():
        socket.setsockopt(option, value)
    socket.setsockopt(*((zmq.ROUTER_MANDATORY, 1) if socket.type == zmq.ROUTER else (zmq.IMMEDIATE, 1)))
    return f"tcp://{host}:{match[2]}"


def software() -> str:
    """The version of tether that runs."""
    try:
        return version("tether")
    except PackageNotFoundError:
        return "unknown"


class _Waker:
    """Wakes a thread out of its poll, from any other."""

    def __init__(self) -> None:
        self._in, self._out = sockets.socketpair()
        for end in (self._in, self._out):
            end.setblocking(False)

    def fileno(self) -> int:
        return self._out.fileno()

    def set(self) -> None:
        with suppress(BlockingIOError, OSError):  # already set, or closed
            self._in.send(b"!")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            self._out.recv(4096)

    def close(self) -> None:
        self._in.close()
        self._out.close()


def _receive(socket: zmq.Socket, limit: int = 64) -> Iterator[list[bytes]]:
    """Up to `limit` waiting messages, of each no more frames than one too many."""
    for _ in range(limit):
        try:
            frames = [socket.recv(zmq.NOBLOCK)]
        except zmq.Again:
            return
        while socket.getsockopt(zmq.RCVMORE):
            frame = socket.recv()
            if len(frames) < 4:
                frames.append(frame)
        yield frames


@dataclass
class _Stream:
    """What the learner knows of one stream, and of the actor that sends it."""

    meta: Meta | None = None
    route: bytes | None = None  # ROUTER identity of the actor's connection
    expected: int | None = None  # next sequence number; None: wherever the actor begins
    run_until: int = 0
    ack_due: bool = False
    seen: float = 0.0
    state: str = "new"
    spool: int = 0
    weights_version: int = 0
    stats: dict[str, float] = field(default_factory=dict)
    received: int = 0
    duplicates: int = 0
    missing: int = 0
    rate_hz: float = 0.0
    rate_from: tuple[float, int] = (0.0, 0)
    transfer: wire.Weights | None = None  # being sent, or sent and not yet answered
    messages: Iterator[list[bytes]] = iter(())
    pending: list[bytes] | None = None
    sent_bytes: int = 0
    came_bytes: int = 0
    sent_at: float = 0.0
    refused: tuple[int, int, str] = (0, 0, "")  # version, times, reason

    def begin_transfer(self, weights: wire.Weights, now: float) -> None:
        self.transfer, self.messages, self.sent_at = weights, weights.messages(), now
        self.pending, self.sent_bytes, self.came_bytes = next(self.messages), -len(weights.layout), 0


class LearnerLink:
    """The learner's end. Actors come and go; each stream's records are given out in order, each once.

    `journal(meta, first_seq, payloads)` stores records before they are acknowledged; it runs in the network
    thread. `expected` maps stream -> next sequence number, to go on with streams of an earlier life.
    `welcome` is what an actor is told when it asks (JSON). Raises WireError; an error of the thread is
    raised by the next call.
    """

    def __init__(
        self,
        bind: str,
        spec: Meta | None,
        welcome: Mapping[str, Any],
        journal: Callable[[Meta, int, list[bytes]], None] | None = None,
        expected: Mapping[str, int] | None = None,
    ) -> None:
        self._spec, self._welcome, self._journal = spec, wire.pack_json(welcome), journal
        self._session = secrets.token_hex(8)
        self._streams = {s: _Stream(expected=n, state="away") for s, n in (expected or {}).items()}
        self._routes: dict[bytes, str] = {}
        self._queue: deque[tuple[str, Record]] = deque()
        self._weights: wire.Weights | None = None
        self._published: dict[int, float] = {}
        self._stop: str | None = None
        self._closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self.malformed = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._socket.bind(configure(self._socket, bind))
        except (zmq.ZMQError, WireError) as error:
            self._socket.close(0)
            self._context.term()
            if isinstance(error, WireError):
                raise
            raise WireError(
                f"cannot listen on {bind}: {error.strerror}; stop what runs there "
                "(another `tether learner` or `tether run`?), or choose another port with --bind"
            ) from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._waker = _Waker()
        self._thread = threading.Thread(target=self._run, name="learner link", daemon=True)
        self._thread.start()

    def poll(self, timeout: float = 0.0) -> list[tuple[str, Record]]:
        """(stream, record) of all that came since the last call; waits up to `timeout` s for the first.

        A jump in a stream's sequence numbers means that the records between are lost for good.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._error, timeout)
            self._raise()
            found = list(self._queue)
            self._queue.clear()
        return found

    def set_run_until(self, stream: str, step: int) -> None:
        """Let the actor of `stream` go up to `step`; never less than before."""
        with self._changed:
            self._raise()
            entry = self._streams.get(stream)
            if entry is None or step <= entry.run_until:
                return
            entry.run_until, entry.ack_due = step, True
        self._waker.set()

    def publish(self, version: int, params: Mapping[str, np.ndarray]) -> None:
        """Send weights to every actor, now and whenever one connects. Raises WireError if not finite."""
        weights = wire.pack_weights(version, params)
        with self._changed:
            self._raise()
            if self._weights is not None and version <= self._weights.version:
                raise WireError(f"weights {version} are not newer than {self._weights.version}")
            self._weights = weights
            self._published[version] = time.monotonic()
            if len(self._published) > 256:
                self._published.pop(next(iter(self._published)))
        self._waker.set()

    def status(self) -> dict[str, dict[str, Any]]:
        """What is known of every stream and its actor; ages in seconds, -1 where there is none."""
        now = time.monotonic()
        with self._changed:
            self._raise()
            return {name: {
                "state": s.state if now - s.seen < GONE_S else "away",
                "age_s": now - s.seen if s.seen else -1.0,
                "expected": s.expected or 1, "run_until": s.run_until, "received": s.received,
                "duplicates": s.duplicates, "missing": s.missing, "rate_hz": s.rate_hz, "spool": s.spool,
                "weights_version": s.weights_version,
                "weights_age_s": now - self._published.get(s.weights_version, now + 1.0),
                "weights_refused": s.refused[2], "stats": dict(s.stats),
            } for name, s in self._streams.items()}  # fmt: skip

    def stop(self, reason: str) -> None:
        """Tell every actor, those that connect later too, to end cleanly."""
        with self._changed:
            self._stop = wire.clip(reason)
            for stream in self._streams.values():
                stream.ack_due = True  # STOP goes with it
        self._waker.set()

    def wait_closed(self, timeout: float) -> bool:
        """Wait until every connected actor has ended, and so delivered what it had."""
        def ended() -> bool:
            now = time.monotonic()
            return all(s.state in ("away", "closed") or now - s.seen > GONE_S for s in self._streams.values())

        with self._changed:
            self._changed.wait_for(lambda: self._error or ended(), timeout)
            self._raise()
            return ended()

    def close(self) -> None:
        """Send what is due and let go of the address. Idempotent."""
        self._closing = True
        self._waker.set()
        self._thread.join()
        self._context.term()
        self._waker.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise WireError(f"the link failed: {self._error}") from self._error

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        wait_ms = 500
        try:
            while True:
                poller.poll(wait_ms)
                self._waker.clear()
                closing = self._closing
                for route, *frames in _receive(self._socket):
                    self._take(route, frames)
                wait_ms = min(self._acknowledge(), self._send_weights())
                if closing:
                    return
        except BaseException as error:  # noqa: BLE001 - comes back from the next call
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._socket.close(LINGER_MS)

    def _send(self, route: bytes, frames: list[bytes]) -> bool:
        """False when the actor's pipe is full or it is gone."""
        try:
            self._socket.send_multipart([route, *frames], zmq.NOBLOCK)
            return True
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            stream = self._streams.get(self._routes.pop(route, ""))
            if stream is not None and stream.route == route:
                stream.route = stream.transfer = None
            return False

    def _take(self, route: bytes, frames: list[bytes]) -> None:
        try:
            message = wire.decode(frames, "actor")
            if message.kind == "HELLO":
                self._hello(route, message)
                return
            name = self._routes.get(route)
            stream = self._streams[name] if name is not None else None
            if stream is None or message.fields.get("stream_id", name) != name:
                self._refuse(route, "say HELLO first", again=True)
                return
            with self._changed:
                stream.seen = time.monotonic()
            getattr(self, f"_on_{message.kind.lower()}")(name, stream, message)
        except VersionError as error:
            self.malformed += 1
            self._refuse(route, str(error))
        except WireError:
            self.malformed += 1  # dropped; whoever sent it is served on
        finally:
            with self._changed:
                self._changed.notify_all()

    def _refuse(self, route: bytes, reason: str, again: bool = False, lines: list[str] | None = None) -> None:
        body = "\n".join(lines or []).encode()[:MAX_BODY]
        self._send(route, wire.encode("REFUSE", body, reason=wire.clip(reason), again=again))

    def _hello(self, route: bytes, message: Message) -> None:
        fields, name = message.fields, message.fields["stream_id"]
        if not message.body:  # asks what there is to do
            self._welcome_to(route, 1, 0, self._welcome)
            return
        try:
            meta = Meta.from_json(message.body)
        except RecordError as error:
            raise WireError(str(error)) from None
        if meta.stream != name or meta.spec_hash != fields["spec_hash"]:
            raise WireError("HELLO contradicts its body")
        differences = self._spec.differences(meta) if self._spec is not None else []
        if differences:
            self._refuse(route, "the actor's robot is not the one this learner trains (here: the learner)",
                         lines=differences)
            return
        first, after = fields["first_seq"], fields["next_seq"]
        with self._changed:
            stream = self._streams.get(name)
            if stream is None and len(self._streams) < MAX_STREAMS:
                stream = self._streams[name] = _Stream()
            if stream is None or not 1 <= first <= after or (stream.expected or 1) > after:
                stream = None
            else:
                if stream.expected is None:
                    stream.expected = first
                self._routes.pop(stream.route or b"", None)
                before = self._streams.get(self._routes.get(route, ""))
                if before is not None:
                    before.route = None
                stream.meta, stream.route, stream.transfer, stream.state = meta, route, None, "run"
                stream.seen, stream.spool = time.monotonic(), fields["spool"]
                stream.weights_version, stream.refused = fields["weights_version"], (0, 0, "")
                self._routes[route] = name
        if stream is None:
            self._refuse(route, "this stream cannot go on here: start the actor again")
            return
        self._welcome_to(route, stream.expected or 1, stream.run_until, b"")
        stream.ack_due = self._stop is not None

    def _welcome_to(self, route: bytes, expected: int, run_until: int, body: bytes) -> None:
        newest = self._weights.version if self._weights is not None else 0
        self._send(route, wire.encode(
            "WELCOME", body, session=self._session, expected_seq=expected, weights_version=newest,
            run_until=run_until,
        ))

    def _on_data(self, name: str, stream: _Stream, message: Message) -> None:
        seq, expected = message.fields["seq0"], stream.expected or 1
        first, payloads, records = expected, [], []
        stream.ack_due = True  # also for what came before, or too early
        for payload in wire.unpack_records(message.body, message.fields["n"]):
            if seq == expected and len(self._queue) + len(records) < MAX_QUEUED:
                try:
                    record = decode(payload)
                except RecordError as error:
                    raise WireError(str(error)) from None
                if record.seq != seq:
                    raise WireError("a record under another number")
                payloads.append(payload)
                records.append((name, record))
                expected += 1
            elif seq < expected:
                stream.duplicates += 1
            seq += 1
        if not records:
            return
        if self._journal is not None:
            assert stream.meta is not None
            self._journal(stream.meta, first, payloads)
        with self._changed:
            stream.expected, stream.received = expected, stream.received + len(records)
            self._queue.extend(records)

    def _on_gap(self, name: str, stream: _Stream, message: Message) -> None:
        first, last = message.fields["first"], message.fields["last"]
        expected = stream.expected or 1
        stream.ack_due = True
        if first <= expected <= last:
            with self._changed:
                stream.missing += last + 1 - expected
                stream.expected = last + 1

    def _on_status(self, name: str, stream: _Stream, message: Message) -> None:
        fields, now = message.fields, time.monotonic()
        with self._changed:
            since, before = stream.rate_from
            if now - since > 0.8 * STATUS_S:
                stream.rate_hz = (stream.received - before) / (now - since) if since else 0.0
                stream.rate_from = now, stream.received
            stream.came_bytes = fields["weights_bytes"]
            stream.state, stream.spool = fields["state"], fields["spool"]
            stream.weights_version, stream.stats = fields["weights_version"], fields["stats"]
            stream.ack_due = True

    def _on_wresult(self, name: str, stream: _Stream, message: Message) -> None:
        number = message.fields["version"]
        with self._changed:
            if message.fields["applied"]:
                stream.weights_version = number
            if stream.transfer is not None and stream.transfer.version == number:
                if not message.fields["applied"]:
                    self._failed(stream, message.fields["reason"])
                stream.transfer = None

    def _failed(self, stream: _Stream, reason: str) -> None:
        number = stream.transfer.version if stream.transfer is not None else 0
        times = stream.refused[1] + 1 if stream.refused[0] == number else 1
        stream.refused = (number, times, f"weights {number}: {reason}")

    def _acknowledge(self) -> int:
        """Send the acknowledgements that are due; milliseconds until it is worth another attempt."""
        wait_ms = 500
        with self._changed:
            due = [(name, s) for name, s in self._streams.items() if s.ack_due and s.route is not None]
        for name, stream in due:
            route = stream.route
            stream.ack_due = False
            frames = wire.encode(
                "ACK", stream_id=name, cum_seq=(stream.expected or 1) - 1, run_until=stream.run_until
            )
            sent = route is not None and self._send(route, frames)
            if sent and route is not None and self._stop is not None:
                sent = self._send(route, wire.encode("STOP", reason=self._stop))
            if not sent:
                stream.ack_due, wait_ms = True, 10
        return wait_ms

    def _send_weights(self) -> int:
        """A message of each transfer in flight, so that acknowledgements pass between them."""
        newest, now, wait_ms = self._weights, time.monotonic(), 500
        if newest is None:
            return wait_ms
        for stream in list(self._streams.values()):
            if stream.route is None:
                continue
            if stream.transfer is not None and now - stream.sent_at > WEIGHTS_TIMEOUT_S:
                self._failed(stream, "no answer")
                stream.transfer = None
            given_up = stream.refused[0] == newest.version and stream.refused[1] >= WEIGHTS_ATTEMPTS
            if stream.transfer is None:
                begin = stream.weights_version != newest.version and not given_up
            else:
                begin = stream.pending is not None and stream.transfer is not newest  # superseded
            if begin:
                stream.begin_transfer(newest, now)
            if stream.transfer is None or stream.pending is None:
                continue
            if stream.sent_bytes - stream.came_bytes > wire.CHUNK:
                continue  # its STATUS will say that more may come
            if self._send(stream.route, stream.pending):
                stream.sent_bytes += len(stream.pending[1])
                stream.pending, stream.sent_at = next(stream.messages, None), now
                wait_ms = 0
            else:
                wait_ms = min(wait_ms, 10)
        return wait_ms


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
        if len(payload) > MAX_PAYLOAD:
            raise WireError(f"record {seq} has {len(payload)} bytes, more than {MAX_PAYLOAD}")
        if self._bytes + len(payload) > MAX_SPOOL:
            raise WireError(
                f"{len(self)} records wait for the learner and no more fit: "
                "start it again with `tether learner`"
            )
        self._payloads.append(payload)
        self._bytes += len(payload)

    def ack(self, seq: int) -> None:
        """Forget the records up to `seq`."""
        while self._payloads and self.first <= seq:
            self._bytes -= len(self._payloads.popleft())
            self.first += 1

    def batch(self, seq: int) -> list[bytes]:
        """The records from `seq` on that fit one message."""
        found, room = [], MAX_BODY
        for at in range(seq - self.first, min(seq - self.first + MAX_BATCH, len(self._payloads))):
            room -= len(self._payloads[at]) + 4
            if room < 0:
                break
            found.append(self._payloads[at])
        return found


class ActorLink:
    """The actor's end. `start` asks the learner what there is to do, `begin` opens the stream; after that
    nothing here waits for the network but `wait_run_until` and `close`. Raises WireError; an error of the
    thread is raised by the next call.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.stopped = threading.Event()  # the learner said stop; see stop_reason
        self.stop_reason = ""
        self.malformed = 0
        self._meta: Meta | None = None
        self._spool = Spool()
        self._sent = 0  # highest sequence number sent on this connection
        self._progress_at = 0.0
        self._inbox = wire.Inbox()
        self._fresh: tuple[int, dict[str, np.ndarray]] | None = None
        self._run_until = 0
        self._session = ""
        self._answer: bytes | None = None  # the body of the WELCOME to what was last asked
        self._open = False  # the learner took our HELLO on this connection
        self._hello_at = 0.0  # when to say HELLO; infinity: not needed
        self._status_at = 0.0
        self._stats: dict[str, float] = {}
        self._heard_at: float | None = None
        self._outbox: deque[list[bytes]] = deque()
        self._flush_until: float | None = None  # set by close
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        try:
            self._socket.connect(configure(self._socket, address))
        except WireError:
            self._socket.close(0)
            self._context.term()
            raise
        self._waker = _Waker()
        self._ask = secrets.token_hex(8)  # stands in for the stream until there is one
        self._thread = threading.Thread(target=self._run, name="actor link", daemon=True)
        self._thread.start()

    def start(
        self, timeout: float | None = 10.0, on_wait: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        """What the learner tells an actor. `timeout` None: keep trying. `on_wait(seconds so far)` is called
        twice a second meanwhile, and may raise to give up. Raises WireError when no learner answers."""
        return wire.unpack_json(self._await_answer(timeout, on_wait))

    def begin(self, meta: Meta, timeout: float | None = 10.0) -> None:
        """Open the stream `meta`. Raises WireError with the differences when the learner refuses it."""
        with self._changed:
            self._raise()
            self._meta, self._answer, self._open, self._hello_at = meta, None, False, 0.0
        self._waker.set()
        self._await_answer(timeout, None)

    def send(self, seq: int, payload: bytes) -> None:
        """Hand over the next record (`record.encode`). Raises WireError when no more fit in memory."""
        with self._changed:
            self._raise()
            self._spool.append(seq, payload)
        self._waker.set()

    def weights(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """(version, parameters) of the newest complete set, once; None when there is none since."""
        with self._changed:
            self._raise()
            fresh, self._fresh = self._fresh, None
        return fresh

    def wait_weights(self, timeout: float) -> tuple[int, dict[str, np.ndarray]] | None:
        """As `weights`, waiting up to `timeout` s; returns early when the learner says stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._fresh or self.stopped.is_set() or self._error, timeout)
        return self.weights()

    @property
    def run_until(self) -> int:
        """The step the actor may reach."""
        with self._changed:
            self._raise()
            return self._run_until

    def wait_run_until(self, step: int, timeout: float | None = None) -> bool:
        """Wait until the actor may reach `step`; False after `timeout` s or when the learner said stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._run_until >= step or self.stopped.is_set() or self._error, timeout
            )
            self._raise()
            return self._run_until >= step

    def report(self, stats: Mapping[str, float]) -> None:
        """Numbers for the learner to show (at most 64); they go out twice a second."""
        clean = {wire.clip(name): float(value) for name, value in stats.items()}
        wire.encode("STATUS", stream_id=self._ask, state="run", spool=0, weights_version=0, weights_bytes=0,
                    stats=clean)
        with self._changed:
            self._raise()
            self._stats = clean

    def status(self) -> dict[str, Any]:
        """The state of the link; `age_s` since the learner was last heard, -1 for never."""
        with self._changed:
            self._raise()
            return {
                "connected": self._open, "spool": len(self._spool), "acked": self._spool.first - 1,
                "weights_version": self._inbox.version,
                "age_s": -1.0 if self._heard_at is None else time.monotonic() - self._heard_at,
            }

    def close(self, timeout: float = 5.0) -> int:
        """Deliver what is left, for at most `timeout` s, and end. Returns the records not delivered."""
        with self._changed:
            if self._flush_until is None:
                self._flush_until = time.monotonic() + timeout
        self._waker.set()
        self._thread.join()
        self._context.term()
        self._waker.close()
        return len(self._spool)

    def _raise(self) -> None:
        if isinstance(self._error, WireError):
            raise WireError(str(self._error)) from self._error
        if self._error is not None:
            raise WireError(f"the link failed: {self._error}") from self._error

    def _await_answer(self, timeout: float | None, on_wait: Callable[[float], None] | None) -> bytes:
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            left = 0.5 if timeout is None else min(0.5, timeout - waited)
            with self._changed:
                self._changed.wait_for(lambda: self._answer is not None or self._error, left)
                self._raise()
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

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._waker.fileno(), zmq.POLLIN)
        full = False
        try:
            while True:
                poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if full else 0))
                poller.poll(self._wait_ms(full))
                self._waker.clear()
                for frames in _receive(self._socket):
                    self._take(frames)
                messages, sent = self._due(time.monotonic()), True
                while sent:  # the lock is let go between two messages
                    with self._changed:
                        message = next(messages, None)
                        sent = message is not None and self._transmit(message)
                    full = message is not None and not sent
                with self._changed:
                    if self._error is not None or self._flushed(time.monotonic()):
                        return
        except BaseException as error:  # noqa: BLE001 - comes back from the next call
            self._fail(error)
        finally:
            self._socket.close(LINGER_MS)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _wait_ms(self, full: bool) -> int:
        """Until something is due."""
        with self._changed:
            due = [self._hello_at, self._status_at if self._open else np.inf]
            if self._open and self._sent >= self._spool.first:
                due.append(self._progress_at + GO_BACK_S)
            if self._flush_until is not None:
                due.append(self._flush_until)
        wait_ms = (min(due) - time.monotonic()) * 1000
        return int(min(max(wait_ms, 50.0 if full else 0.0), 1000.0)) + 1

    def _transmit(self, message: tuple[list[bytes], Callable[[], Any]]) -> bool:
        frames, done = message
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        done()
        return True

    def _due(self, now: float) -> Iterator[tuple[list[bytes], Callable[[], Any]]]:
        """The messages to send now, each with what to note once it is sent."""
        spool = self._spool
        if now >= self._hello_at:
            yield self._hello(), partial(setattr, self, "_hello_at", now + HELLO_S)
        if not self._open or self._meta is None:
            return
        while self._outbox:
            yield self._outbox[0], self._outbox.popleft
        if self._sent >= spool.first and now - self._progress_at > GO_BACK_S:
            self._sent, self._progress_at = spool.first - 1, now
        self._sent = max(self._sent, spool.first - 1)  # an ack may overtake us
        while self._sent + 1 < spool.next_seq and self._sent - spool.first + 1 < WINDOW:
            if self._sent < spool.first:
                self._progress_at = now
            batch = spool.batch(self._sent + 1)
            body, last = wire.pack_records(batch), self._sent + len(batch)
            frames = wire.encode("DATA", body, stream_id=self._meta.stream, seq0=self._sent + 1, n=len(batch))
            yield frames, partial(setattr, self, "_sent", last)
        if now >= self._status_at:
            yield self._status("run"), partial(setattr, self, "_status_at", now + STATUS_S)

    def _hello(self) -> list[bytes]:
        meta = self._meta
        return wire.encode(
            "HELLO", meta.to_json() if meta else b"", stream_id=meta.stream if meta else self._ask,
            spec_hash=meta.spec_hash if meta else "", first_seq=self._spool.first,
            next_seq=self._spool.next_seq, software=software(), spool=len(self._spool),
            weights_version=self._inbox.version,
        )

    def _status(self, state: str) -> list[bytes]:
        assert self._meta is not None
        return wire.encode(
            "STATUS", stream_id=self._meta.stream, state=state, spool=len(self._spool),
            weights_version=self._inbox.version, weights_bytes=self._inbox.filled, stats=self._stats,
        )

    def _flushed(self, now: float) -> bool:
        """Whether close may end: all delivered (and said so), or out of time, or nothing ever begun."""
        if self._flush_until is None:
            return False
        if self._meta is not None and len(self._spool) and now < self._flush_until:
            return False
        if self._open and self._meta is not None:
            self._transmit((self._status("closed"), lambda: None))
        return True

    def _take(self, frames: list[bytes]) -> None:
        try:
            message = wire.decode(frames, "learner")
            self._heard_at = time.monotonic()
            if message.kind in ("WBEGIN", "WCHUNK", "WEND"):
                self._on_weights(message)
                return
            with self._changed:
                getattr(self, f"_on_{message.kind.lower()}")(message)
                self._changed.notify_all()
        except VersionError as error:
            self._fail(error)
        except WireError:
            self.malformed += 1

    def _on_welcome(self, message: Message) -> None:
        fields = message.fields
        if bool(message.body) != (self._meta is None):
            return  # the answer to an earlier question
        if fields["session"] != self._session:  # another life of the learner counts weights anew
            self._session, self._inbox = fields["session"], wire.Inbox()
        self._hello_at, self._answer = np.inf, message.body
        if self._meta is None:
            return
        expected, spool = fields["expected_seq"], self._spool
        if expected > spool.next_seq:
            raise WireError("WELCOME expects a record that does not exist")
        spool.ack(expected - 1)
        self._outbox.clear()
        if expected < spool.first:
            self._outbox.append(wire.encode(
                "GAP", stream_id=self._meta.stream, first=expected, last=spool.first - 1,
                reason="acknowledged by an earlier learner",
            ))
        self._sent, self._progress_at, self._open = spool.first - 1, time.monotonic(), True
        self._status_at = 0.0
        self._run_until = max(self._run_until, fields["run_until"])

    def _on_refuse(self, message: Message) -> None:
        if message.fields["again"]:
            if self._open:
                self._open, self._hello_at = False, 0.0
            return
        lines = message.body.decode(errors="replace").splitlines()
        self._error = WireError("; ".join([f"{self.address} refuses: {message.fields['reason']}", *lines]))

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
        with self._changed:
            self._status_at = 0.0  # tells the learner how much came, so that it sends more
            if params is not None:
                self._fresh = number, params
            if params is not None or reason:
                self._outbox.append(wire.encode("WRESULT", version=number, applied=not reason, reason=reason))

    def _on_stop(self, message: Message) -> None:
        self.stop_reason = message.fields["reason"]
        self.stopped.set()
