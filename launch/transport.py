"""The link: one ROUTER at the learner, one DEALER an actor, each owned by a thread that nobody waits for.

Records go to the learner in order, each once: the sender keeps them until they are acknowledged and goes back
to the first unacknowledged one after a second without progress or a new connection (go-back-N); the learner
takes only the one it expects. Weights, which the actor asks for chunk by chunk, and permissions to go on
(`run_until`) come back on the same socket.

There are no locks: what two threads share is assigned as a whole by one of them, or is a deque, or the spool,
whose numbers say which of its records belong to whom.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from ..robot_env.record import Meta, Record, decode
from . import wire
from .pump import GATHER_S, Pump
from .spool import Spool
from .wire import Malformed, Message, Params, VersionError, WireError

WINDOW = 256  # records sent and not acknowledged
STORE_S = 2 * GATHER_S  # from one storing of records to the next, while the learner has others to learn from
GO_BACK_S = 1.0
BEAT_S = 0.5  # between two STATUS, or two HELLO
SILENT_S = 2.0  # without an answer until an actor tries another connection
GONE_S = 5.0  # an actor silent for so long does not count as connected
MAX_STREAMS = 1024  # in a learner's life
MAX_QUEUED = 8192  # records the learner's main thread may lag behind
NOBODY = "0" * 16  # stands in for the stream of an actor that asks what there is to do


@dataclass
class Stream:
    """What the learner knows of one stream, and of the actor that sends it."""

    expected: int  # next sequence number
    meta: Meta | None = None
    owner: str = ""  # the actor whose key it came with
    route: bytes = b""  # ROUTER identity of the actor's connection; empty: none
    run_until: int = 0
    told: dict[str, Any] | None = None  # what the last ACK said; None: one is due
    sending: wire.Weights = wire.NO_WEIGHTS  # what it is getting: all of it, though newer ones may have come
    want: int | None = None  # offset of the chunk of them that was asked for
    received: int = 0
    came: list[tuple[bytes, Record]] = field(default_factory=list)  # to be stored, from `expected` on
    weights_at: float = math.inf  # when the actor's weights were published
    seen: float = -math.inf
    report: dict[str, Any] = field(default_factory=lambda: {"state": "run", "stats": {}})  # its last STATUS

    @property
    def connected(self) -> bool:
        """Whether its actor is there and has not said goodbye."""
        return time.monotonic() - self.seen < GONE_S and self.report["state"] != "closed"


class LearnerLink:
    """The learner's end. Actors come and go; each stream's records are given out in order, each once.

    `journal(meta, first_seq, payloads)` stores records before they are acknowledged and returns how many it
    could; it runs in the network thread. `expected` maps stream -> next sequence number, to go on with streams of
    an earlier life. `spec` is the description actors must agree with, `welcome` what they are told when they ask,
    with `number`: how many there were before, counting the one that `tether run` starts itself.
    Every call raises WireError, also for an error of the thread.
    """

    def __init__(
        self, bind: str, spec: Meta, welcome: Mapping[str, Any],
        journal: Callable[[Meta, int, list[bytes]], int], expected: Mapping[str, int],
    ) -> None:
        self._spec, self._welcome, self._journal = spec, welcome, journal
        self._asked = len(expected) + 1  # actors there were, and that asked what there is to do
        self._streams = {name: Stream(seq) for name, seq in expected.items()}
        self._queue: deque[tuple[str, Record]] = deque()
        self._weights = wire.NO_WEIGHTS
        self._stop = ""  # why the actors are to end
        self._came = 0  # records that came and are not stored yet
        self._store_at = 0.0  # when they are at the latest
        self._pump = Pump(zmq.ROUTER, bind)
        self._pump.resting = lambda: self._queue  # while the learner has something to do
        self.address = self._pump.address
        self._pump.start(self._take, self._turn)

    def poll(self, timeout: float = 0.0, most: int = MAX_QUEUED) -> list[tuple[str, Record]]:
        """(stream, record) of what came since the last call, at most so many; waits up to `timeout` s for the first.

        A jump in a stream's sequence numbers means that the records between are lost for good.
        """
        self._pump.wait(lambda: self._queue, timeout)
        found = [self._queue.popleft() for _ in range(min(len(self._queue), most))]
        if found and not self._queue:
            self._pump.wake()  # for more
        return found

    @property
    def waiting(self) -> int:
        """Records that came and were not taken yet."""
        return len(self._queue)

    def set_run_until(self, steps: Mapping[str, int]) -> None:
        """Let the actors of these streams go up to a step; never less than before."""
        due = {n: step for n, step in steps.items() if n in self._streams and step > self._streams[n].run_until}
        for name, step in due.items():
            self._streams[name].run_until = step
        if due:
            self._pump.wake()

    def publish(self, version: int, params: Params) -> None:
        """Offer weights to every actor, now and whenever one connects. They must be finite and newer."""
        if version <= self._weights.version:
            raise WireError(f"weights {version} are not newer than {self._weights.version}")
        self._weights = wire.pack_weights(version, params)
        self._pump.wake()

    def status(self) -> dict[str, Stream]:
        """What is known of every stream and its actor, to be looked at only."""
        self._pump.check()
        return dict(self._streams)

    @property
    def greeted(self) -> bool:
        """Whether any actor has come yet."""
        return any(stream.route for stream in self._streams.values())

    def stop(self, reason: str) -> None:
        """Tell every actor, those that connect later too, to end cleanly."""
        self._stop = wire.clip(reason)
        self._pump.wake()

    def wait_closed(self, timeout: float) -> bool:
        """Wait until every connected actor has ended, and so delivered what it had."""
        return self._pump.wait(lambda: not any(s.connected for s in self.status().values()), timeout)

    def close(self) -> None:
        """Send what is due and let go of the address. Idempotent."""
        self._pump.close()

    def _turn(self) -> bool | None:
        closing = self._pump.end_by < math.inf  # what was due before is sent below
        if closing or not self._queue or time.monotonic() >= self._store_at:
            self._came, self._store_at = 0, time.monotonic() + STORE_S
            for stream in self._streams.values():
                if stream.came and stream.meta:
                    self._store(stream, stream.meta)
        for stream in self._streams.values():
            if stream.route:
                self._serve(stream)
        return None if closing else False

    def _send(self, route: bytes, kind: str, body: bytes = b"", **fields: Any) -> bool:
        return self._pump.send([route, *wire.encode(kind, body, **fields)])

    def _serve(self, stream: Stream) -> None:
        """Send one actor what is due; what the pipe does not take now stays due."""
        news: dict[str, Any] = {"seq": stream.expected - 1, "run_until": stream.run_until,
                                "weights": self._weights.version, "stop": self._stop}  # fmt: skip
        if news != stream.told and self._send(stream.route, "ACK", **news):
            stream.told = news
        if stream.want is not None and self._pump.send([stream.route, *stream.sending.chunk(stream.want)]):
            stream.want = None

    def _take(self, frames: list[bytes]) -> None:
        route, *parts = frames
        try:
            message = wire.decode(parts, "actor")
        except VersionError as error:
            self._send(route, "REFUSE", str(error).encode())
            raise Malformed(str(error)) from None
        stream = self._streams.get(message.fields["stream"])
        if message.kind == "HELLO":
            self._on_hello(route, message)
        elif stream is None or stream.meta is None or stream.route != route:
            self._send(route, "REFUSE")
        else:
            stream.seen = time.monotonic()
            self._on_message(stream, stream.meta, message)

    def _on_hello(self, route: bytes, message: Message) -> None:
        name, first, after = (message.fields[key] for key in ("stream", "first", "next"))
        if message.body:  # else it asks what there is to do
            meta = Meta.from_json(message.body)
            stream = self._streams.get(name) or Stream(first)
            lines = self._spec.differences(meta)  # here: the learner
            possible = meta.stream == name and 1 <= first <= after >= stream.expected
            possible = possible and stream.owner in ("", self._pump.peer)
            if not possible or len(self._streams) > MAX_STREAMS:
                lines.append("this stream cannot go on here: start the actor again")
            if lines:
                self._send(route, "REFUSE", "; ".join(lines).encode())
                return
            stream.came.clear()  # comes again
            stream.expected = max(stream.expected, first)  # what is lost is no reason to wait
            stream.owner = self._pump.peer
            stream.meta, stream.route, stream.want, stream.told = meta, route, None, None
            stream.seen, stream.report = time.monotonic(), stream.report | {"state": "run"}
            self._streams[name] = stream
        welcome = {**self._welcome, "number": self._asked}
        self._asked += name == NOBODY
        self._send(route, "WELCOME", msgpack.packb(welcome), stream=name)

    def _on_message(self, stream: Stream, meta: Meta, message: Message) -> None:
        fields = message.fields
        if message.kind != "WANT":  # which WEIGHTS answers
            stream.told = None
        if message.kind == "DATA":
            self._on_data(stream, meta, fields["seq"], wire.unpack_records(message.body))
        elif message.kind == "STATUS":
            stream.report = fields
            if fields["weights"] == stream.sending.version:
                stream.weights_at = stream.sending.made_at
        elif message.kind == "WANT":
            stream.want = fields["offset"]
            if fields["version"] != stream.sending.version:
                stream.sending, stream.want = self._weights, 0

    def _on_data(self, stream: Stream, meta: Meta, first: int, payloads: list[bytes]) -> None:
        due, room = stream.expected + len(stream.came), MAX_QUEUED - len(self._queue) - self._came
        if first > due:
            return  # too early; the actor goes back
        new = payloads[due - first :][: max(0, room)]
        records = [decode(payload) for payload in new]
        if any(record.seq != seq for seq, record in enumerate(records, due)):
            raise Malformed("a record under another number")
        stream.came += zip(new, records, strict=True)
        self._came += len(new)

    def _store(self, stream: Stream, meta: Meta) -> None:
        """Store what came of a stream and give it out; what does not fit comes again."""
        came, stream.came = stream.came, []
        stored = self._journal(meta, stream.expected, [payload for payload, _ in came])
        stream.expected += stored
        stream.received += stored
        self._queue.extend((meta.stream, record) for _, record in came[:stored])


class NoLearner(WireError):
    """Nobody answers at the learner's address."""


class ActorLink:
    """The actor's end. `start` asks the learner what there is to do, `begin` opens the stream; from then
    on only the calls with a timeout wait. Every call raises WireError, also for an error of the thread.

    `prepare(version, params)`, in the network thread, makes of weights what `weights` gives out, or raises
    WireError with the reason to refuse them, which the learner is told.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.stopped = ""  # why the learner said stop
        self._hello = NOBODY, b""  # stream and Meta
        self._answer = "", b""  # the WELCOME to it, on this connection
        self._beat_at = 0.0  # when HELLO or, once it was taken, STATUS is due
        self._unanswered_at = math.inf  # when we said the first thing that the learner has not answered
        self._heard_at = time.monotonic()  # its last word
        self._stats: dict[str, float] = {}
        self._spool = Spool()
        self._sent = 0  # highest sequence number sent on this connection
        self._sent_at = 0.0  # when that was
        self._progress_at = 0.0  # when the window last moved
        self.prepare: Callable[[int, Params], Any] = lambda version, params: params
        self._inbox = wire.Inbox()
        self._newest = 0  # version of the weights the learner has
        self._wanting = False  # a chunk of weights was asked for and has not come
        self._fresh: deque[tuple[int, Any]] = deque(maxlen=1)
        self._run_until = 0
        self._pump = Pump(zmq.DEALER, address)
        self._pump.start(self._take, self._turn)

    def start(self, timeout: float = 10.0) -> dict[str, Any]:
        """What the learner tells an actor. NoLearner when none answers."""
        self._meet(timeout, lambda: False)
        return wire.unpack(self._answer[1], dict, max_str_len=wire.MAX_BODY)

    def begin(
        self, meta: Meta, timeout: float = 10.0, spool: Spool | None = None, stopped: Callable[[], Any] = lambda: False
    ) -> None:
        """Open the stream `meta`, whose records wait in `spool` (default: in memory).

        With timeout 0, or once `stopped()`, the learner may come later. WireError with the differences when the
        learner refuses it.
        """
        self._spool = self._spool if spool is None else spool  # an empty one is false
        self._hello, self._beat_at = (meta.stream, meta.to_json()), 0.0
        self._pump.wake()
        if timeout:
            self._meet(timeout, stopped)

    def _meet(self, timeout: float, stopped: Callable[[], Any]) -> None:
        if not self._pump.wait(lambda: self._open or stopped(), timeout):
            remedy = f"start it with `tether learner TASK --bind {self.address}`"
            if self._pump.locked:
                remedy += "; if it runs, it has no key of this robot (`tether keys` there), or another one"
            raise NoLearner(f"no learner at {self.address} after {timeout:.0f} s: {remedy}")

    def send(self, seq: int, payload: bytes) -> None:
        """Hand over the next record (`record.encode`). WireError when no more fit in memory."""
        self._spool.append(seq, payload)
        self._pump.wake()

    def weights(self, timeout: float = 0.0) -> tuple[int, Any] | None:
        """(version, parameters as `prepare` made them) of the newest set, once; None when there is none since.

        Waits up to `timeout` s for one, or until the learner says stop.
        """
        self._pump.wait(lambda: self._fresh or self.stopped, timeout)
        return self._fresh.popleft() if self._fresh else None

    def wait_run_until(self, step: int, timeout: float) -> bool:
        """Wait until the actor may reach `step`; False after `timeout` s or when the learner said stop."""
        self._pump.wait(lambda: self._run_until >= step or self.stopped, timeout)
        return self._run_until >= step

    def report(self, stats: Mapping[str, float]) -> None:
        """Numbers for the learner to show (at most 64, the finite ones); they go out twice a second."""
        self._pump.check()
        self._stats = {wire.clip(k): float(v) for k, v in stats.items() if math.isfinite(v)}

    def close(self, timeout: float = 5.0) -> int:
        """Deliver what is left, for at most `timeout` s, and end. Returns the records not delivered."""
        self._pump.close(timeout)
        self._spool.close()
        return len(self._spool)

    @property
    def silent_s(self) -> float:
        """Seconds since the learner's last word; while it is there it has one twice a second."""
        return time.monotonic() - self._heard_at

    @property
    def on_disk(self) -> bool:
        """Whether records that were not delivered are there for the next actor."""
        return self._spool.on_disk

    @property
    def full(self) -> bool:
        """Whether the spool asks for a pause."""
        return self._spool.full

    @property
    def _open(self) -> bool:
        """Whether the learner took our HELLO on this connection."""
        return self._answer[0] == self._hello[0]

    def _turn(self) -> bool | None:
        now, end_by = time.monotonic(), self._pump.end_by
        if now >= end_by or (end_by < math.inf and not len(self._spool)):
            self._beat("closed")
            return None
        if self._open and not self._hello[1]:
            return False  # it knows what there is to do, and has not begun
        if now >= self._beat_at and self._beat("run"):
            self._beat_at, self._unanswered_at = now + BEAT_S, min(self._unanswered_at, now)
        if now - self._unanswered_at > SILENT_S:
            self._pump.reconnect()
            self._answer, self._beat_at, self._unanswered_at = ("", b""), 0.0, math.inf
        if self._open and self._newest > self._inbox.tried and not self._wanting:
            version, offset = self._inbox.due(self._newest)
            self._wanting = self._send("WANT", version=version, offset=offset)
        return self._open and self._send_records(now)

    def _beat(self, state: str) -> bool:
        """Say that we are there, and how we do."""
        if not self._open:
            after = wire.ENDED if self._spool.sealed else self._spool.next_seq
            return self._send("HELLO", self._hello[1], first=self._spool.first, next=after)
        return self._send("STATUS", state=state, spool=len(self._spool), weights=self._inbox.version,
                          refused=self._inbox.refused, stats=self._stats)

    def _send_records(self, now: float) -> bool:
        """Send the next batch; whether there may be more to send at once."""
        spool = self._spool
        if self._sent < spool.first or now - self._progress_at > GO_BACK_S:
            self._sent, self._progress_at = spool.first - 1, now
        batch = spool.batch(self._sent + 1) if self._sent + 1 - spool.first < WINDOW else []
        under_way = self._sent >= spool.first and now - self._sent_at < STORE_S
        if under_way and self._sent + len(batch) + 1 == spool.next_seq and self._pump.end_by == math.inf:
            return False  # the last ones wait for more, or until those before are acknowledged
        if not batch or not self._send("DATA", msgpack.packb(batch), seq=self._sent + 1):
            return False
        self._sent, self._sent_at = self._sent + len(batch), now
        return True

    def _send(self, kind: str, body: bytes = b"", **fields: Any) -> bool:
        return self._pump.send(wire.encode(kind, body, stream=self._hello[0], **fields))

    def _take(self, frames: list[bytes]) -> None:
        message = wire.decode(frames, "learner")
        self._unanswered_at, self._heard_at = math.inf, time.monotonic()
        getattr(self, f"_on_{message.kind.lower()}")(message.body, **message.fields)

    def _on_welcome(self, body: bytes, stream: str) -> None:
        self._answer, self._sent, self._beat_at = (stream, body), 0, 0.0
        # another learner may count from 1 again
        self._inbox, self._newest, self._wanting = wire.Inbox(self.prepare), 0, False

    def _on_refuse(self, body: bytes) -> None:
        if body:
            raise WireError(f"the learner at {self.address} refuses: {body.decode(errors='replace')}")
        if self._open:
            self._answer, self._beat_at = ("", b""), 0.0

    def _on_ack(self, body: bytes, seq: int, run_until: int, weights: int, stop: str) -> None:
        if seq >= self._spool.next_seq and not self._spool.sealed:
            raise Malformed("ACK of a record that does not exist")
        if seq >= self._spool.first:
            self._spool.ack(seq)
            self._progress_at = time.monotonic()
        self._run_until, self._newest = max(self._run_until, run_until), weights
        self.stopped = self.stopped or stop

    def _on_weights(self, body: bytes, version: int, **about: Any) -> None:
        prepared = self._inbox.take(body, version, **about)
        if prepared is not None:
            self._fresh.append((version, prepared))
        self._newest, self._wanting = version, False
        if self._inbox.tried >= version:
            self._beat_at = 0.0  # tells what became of them
