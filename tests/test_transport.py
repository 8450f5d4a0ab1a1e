"""The link on real sockets: each record once and in order whatever restarts, weights whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import socket as sockets
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq
from tether.drivers.base import Channel, Command, Reading
from tether.launch import catalog, pump, transport, wire
from tether.launch.transport import ActorLink, LearnerLink
from tether.launch.wire import WireError
from tether.robot_env.record import Meta, Record, encode

from tests.chaos.proxy import Proxy
from tests.conftest import free_address

CHANNELS = (Channel("pose", 2, "m", 50, 0.05, (1.0, 1.0)),)
COMMAND = Command(("v",), ("m/s",), (-1.0,), (1.0,), (-1.0,), (1.0,), (5.0,), (0.0,))
ANY = "tcp://127.0.0.1:*"
PATIENCE = 20.0  # s, for what is awaited; never for what is asserted
PARAMS = {"mean/kernel": np.ones((2, 1), np.float32), "mean/bias": np.zeros(1, np.float32)}


def describe(**changes):
    return replace(Meta.of("car", "the task", 10, CHANNELS, COMMAND), **changes)


SPEC = describe()


def payload(seq, number=None):
    reading = Reading({"pose": np.full(2, seq, np.float32)}, {"pose": 0.1 * seq})
    action = np.zeros(1, np.float32)
    return encode(Record(number or seq, 0.1 * seq, reading, action, 1.0, False, False, "policy", 0, {}))


@contextmanager
def learner(bind=ANY, spec=SPEC, welcome=None, journal=lambda meta, first, payloads: len(payloads), expected=None):
    link = LearnerLink(bind, spec, welcome or {"task": "the task"}, journal, expected or {})
    try:
        yield link
    finally:
        link.close()


@contextmanager
def actor(address, meta=None, flush=PATIENCE):
    link = ActorLink(address)
    try:
        if meta is not None:
            link.begin(meta, PATIENCE)
        yield link
    finally:
        link.close(flush)


@contextmanager
def raw(kind, address):
    """A peer that says what it likes."""
    context = zmq.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
    if kind == zmq.ROUTER:
        socket.bind(address)
    else:
        socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


def until(link, predicate):
    assert link._pump.wait(predicate, PATIENCE)


def collect(link, count):
    found = []
    while len(found) < count:
        came = link.poll(PATIENCE)
        assert came, f"{len(found)} of {count} records"
        found += came
    assert len(found) == count
    return found


def seqs(found, stream=None):
    return [record.seq for name, record in found if stream in (None, name)]


def hello(meta, first=1, after=1, **changes):
    return wire.encode("HELLO", meta.to_json(), **{"stream": meta.stream, "first": first, "next": after} | changes)


def data(meta, first, *payloads):
    return wire.encode("DATA", msgpack.packb(payloads), stream=meta.stream, seq=first)


def next_of(socket, kind):
    """The next message of a kind that a raw actor gets."""
    while True:
        message = wire.decode(socket.recv_multipart(), "learner")
        if message.kind == kind:
            return message


# --- records


def test_records_arrive_in_order_and_are_stored_before_they_are_acknowledged():
    stored, meta = [], describe()

    def journal(whose, first, payloads):
        assert whose == meta and left._spool.first <= first
        stored.extend(payloads)
        return len(payloads)

    with learner(journal=journal) as link, actor(link.address) as left:
        assert left.start(PATIENCE)["task"] == "the task"
        left.begin(meta, PATIENCE)
        sent = [payload(i) for i in range(1, 301)]
        for i, p in enumerate(sent):
            left.send(i + 1, p)
        found = collect(link, 300)
        assert seqs(found, meta.stream) == list(range(1, 301))
        assert found[7][1].reading.values["pose"].tolist() == [8.0, 8.0]
        until(left, lambda: len(left._spool) == 0)
        assert stored == sent
        assert link.status()[meta.stream].received == 300


def test_what_is_sent_before_there_is_a_learner_is_kept():
    address, meta = free_address(), describe()
    link = ActorLink(address)
    for i in range(1, 51):
        link.send(i, payload(i))
    with learner(address) as there:
        link.begin(meta, PATIENCE)
        assert seqs(collect(there, 50)) == list(range(1, 51))
        assert link.close() == 0


def test_a_restarted_learner_that_knows_its_journal_gets_each_record_once():
    address, meta, stored = free_address(), describe(), []
    total, per_life = 1200, 300

    def journal(_, first, payloads):
        stored.extend(range(first, first + len(payloads)))
        return len(payloads)

    link = ActorLink(address)
    feeder = threading.Thread(target=lambda: [link.send(i, payload(i)) for i in range(1, total + 1)])
    given = []
    while len(given) < total:
        expected = {meta.stream: len(stored) + 1} if stored else None
        with learner(address, journal=journal, expected=expected) as there:
            if not given:
                link.begin(meta, PATIENCE)
                feeder.start()
            target = min(len(given) + per_life, total)
            while len(given) < target:
                given += seqs(there.poll(PATIENCE))
            there.close()
            given += seqs(there.poll())  # what was acknowledged counts, taken or not
    feeder.join()
    assert given == stored == list(range(1, total + 1))
    link.close(0)


def test_a_learner_that_forgot_a_stream_goes_on_where_the_actor_is():
    address, meta = free_address(), describe()
    with learner(address) as first:
        link = ActorLink(address)
        link.begin(meta, PATIENCE)
        for i in range(1, 6):
            link.send(i, payload(i))
        assert seqs(collect(first, 5)) == [1, 2, 3, 4, 5]
        until(link, lambda: link._spool.first == 6)
    for i in range(6, 9):
        link.send(i, payload(i))
    with learner(address) as second:
        assert seqs(collect(second, 3)) == [6, 7, 8]
        assert link.close() == 0


def test_acknowledged_records_that_a_learner_lost_are_a_jump_and_no_deadlock():
    address, meta = free_address(), describe()
    with learner(address) as first:
        link = ActorLink(address)
        link.begin(meta, PATIENCE)
        for i in range(1, 6):
            link.send(i, payload(i))
        collect(first, 5)
        until(link, lambda: link._spool.first == 6)
    link.send(6, payload(6))
    with learner(address, expected={meta.stream: 3}) as second:
        assert seqs(collect(second, 1)) == [6]
        assert link.close() == 0


def test_a_restarted_actor_is_a_new_stream():
    with learner() as link:
        metas = [describe(), describe()]
        for meta in metas:
            with actor(link.address, meta) as one:
                for i in range(1, 4):
                    one.send(i, payload(i))
        found = collect(link, 6)
        assert all(seqs(found, meta.stream) == [1, 2, 3] for meta in metas)
        assert link.wait_closed(PATIENCE)
        assert {s.report["state"] for s in link.status().values()} == {"closed"}


def test_several_actors_feed_one_learner():
    metas, count = [describe() for _ in range(4)], 200

    def drive(meta):
        with actor(link.address, meta) as one:
            for i in range(1, count + 1):
                one.send(i, payload(i))
                assert one.wait_run_until(i // 50, PATIENCE)

    with learner() as link:
        threads = [threading.Thread(target=drive, args=(meta,)) for meta in metas]
        for thread in threads:
            thread.start()
        found = []
        while len(found) < count * len(metas):
            for name, record in link.poll(PATIENCE):
                found.append((name, record))
                link.set_run_until({name: record.seq})
        for thread in threads:
            thread.join()
    for meta in metas:
        assert seqs(found, meta.stream) == list(range(1, count + 1))


def test_cut_connections_neither_lose_nor_double_a_record():
    rng, total, meta = random.Random(3), 3000, describe()
    cuts = set(rng.sample(range(1, total), 8))
    with learner() as link:
        proxy = Proxy(link.address)
        with actor(proxy.address, meta) as one:
            found = []
            for i in range(1, total + 1):
                one.send(i, payload(i))
                if i in cuts:
                    proxy.cut(reset=bool(i % 2))
                    link.publish(i, PARAMS)
                if i % 100 == 0:  # let it come through, so that cuts fall on a live connection
                    until(one, lambda i=i: one._spool.first > i - 50)
                    found += link.poll()
            found += collect(link, total - len(found))
            until(one, lambda: one._inbox.version == max(cuts))
        assert seqs(found) == list(range(1, total + 1))
        assert link.poll() == []
        proxy.close()


def test_an_actor_tries_another_connection_when_the_learner_is_silent(monkeypatch):
    monkeypatch.setattr(transport, "SILENT_S", 0.2)
    address = free_address()
    with raw(zmq.ROUTER, address) as mute, actor(address, flush=0):
        first = mute.recv_multipart()[0]
        while (route := mute.recv_multipart()[0]) == first:
            pass
        mute.send_multipart([route, *wire.encode("REFUSE", b"and is heard there")])


# With ZMTP's heartbeats libzmq aborted here: a blocked disk, and messages of a dead actor that wait to be read.
OUTLIVES = """
import os, threading, zmq
from tests.test_transport import ANY, SPEC, LearnerLink, data, hello, payload
blocked, go_on = threading.Event(), threading.Event()
link = LearnerLink(ANY, SPEC, {}, lambda meta, first, payloads: (blocked.set(), go_on.wait(), len(payloads))[-1], {})
with zmq.Context() as context, context.socket(zmq.DEALER) as dying:
    for option in (zmq.HEARTBEAT_IVL, zmq.HEARTBEAT_TIMEOUT, zmq.HEARTBEAT_TTL):
        dying.setsockopt(option, 500)  # theirs do no harm
    dying.connect(link.address)
    dying.send_multipart(hello(SPEC))
    dying.recv_multipart()
    for seq in range(1, 300):
        dying.send_multipart(data(SPEC, seq, payload(seq)))
    blocked.wait()
    dying.close(1000)
threading.Event().wait(2.5)  # as long as five heartbeats nothing may happen
go_on.set()
assert link.poll(20)
os._exit(0)
"""


def test_the_learner_outlives_an_actor_that_dies_while_the_disk_is_slow():
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", OUTLIVES], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_unacknowledged_records_are_sent_again_and_acks_that_overtake_are_taken(monkeypatch):
    monkeypatch.setattr(transport, "GO_BACK_S", 0.05)
    address, meta = free_address(), describe()
    with raw(zmq.ROUTER, address) as fake, actor(address, flush=0) as one:
        def answer(kind, body=b"", **fields):
            fake.send_multipart([route, *wire.encode(kind, body, **fields)])

        def expect(kind):
            while True:
                route, *frames = fake.recv_multipart()
                message = wire.decode(frames, "actor")
                if message.kind == kind and message.fields["stream"] == meta.stream:
                    return route, message

        opener = threading.Thread(target=one.begin, args=(meta, PATIENCE))
        opener.start()
        route, _ = expect("HELLO")
        answer("WELCOME", stream=transport.NOBODY)  # to an earlier question
        answer("WELCOME", msgpack.packb({}), stream=meta.stream)
        opener.join()
        for i in range(1, 4):
            one.send(i, payload(i))
        seen = []
        while seen.count(1) < 3:  # twice again, without an ack
            seen.append(expect("DATA")[1].fields["seq"])
        for seq in (9, 3):  # the first is of a record that does not exist
            answer("ACK", seq=seq, run_until=5, weights=0, stop="")
        assert one.wait_run_until(5, PATIENCE)
        assert one._spool.first == 4 and one._pump.malformed == 1
        answer("ACK", seq=2, run_until=2, weights=0, stop="")  # old: changes nothing
        one.send(4, payload(4))
        while (got := expect("DATA")[1].fields["seq"]) != 4:
            assert got < 4  # sent before the ack came
        assert one.wait_run_until(5, 0.0) and not one.wait_run_until(6, 0.0)
        answer("ACK", seq=3, run_until=6, weights=0, stop="enough")
        answer("ACK", seq=3, run_until=7, weights=0, stop="")
        until(one, lambda: one._run_until == 7)
        assert one.stopped == "enough"  # a stop is never taken back
        answer("REFUSE")  # it forgot us: we say what we still have
        while (after := expect("HELLO")[1].fields) != {"stream": meta.stream, "first": 4, "next": 5}:
            assert after["first"] == 1  # from the beginning


def test_doubled_early_and_foreign_data_are_not_taken():
    meta, other = describe(), describe()
    with learner() as link, raw(zmq.DEALER, link.address) as peer:
        peer.send_multipart(data(meta, 1, payload(1)))
        assert next_of(peer, "REFUSE").body == b""  # say HELLO
        peer.send_multipart(hello(meta))
        assert next_of(peer, "ACK").fields["seq"] == 0
        peer.send_multipart(data(meta, 1, payload(1), payload(2)))
        peer.send_multipart(data(meta, 1, payload(1), payload(2), payload(3)))
        peer.send_multipart(data(meta, 7, payload(7)))
        while next_of(peer, "ACK").fields["seq"] != 3:
            pass
        peer.send_multipart(data(other, 4, payload(4)))
        assert next_of(peer, "REFUSE").body == b""  # say HELLO
        for bad in (payload(4, number=5), b"nonsense", b""):
            peer.send_multipart(data(meta, 4, bad))
        until(link, lambda: link._pump.malformed == 3)
        peer.send_multipart(data(meta, 4, payload(4)))
        assert seqs(collect(link, 4)) == [1, 2, 3, 4]


def test_close_says_how_much_was_not_delivered():
    with learner() as link:
        one = ActorLink(link.address)
        one.begin(describe(), PATIENCE)
    for i in range(1, 4):
        one.send(i, payload(i))
    assert one.close(0.0) == 3
    assert one.close() == 3


# --- saying hello


def test_no_learner_is_one_clear_line():
    address = free_address()
    with actor(address) as one:
        with pytest.raises(WireError, match=f"no learner at {address} .*tether learner"):
            one.start(timeout=0.0)


def test_who_is_told_to_stop_waits_for_no_learner():
    with actor(free_address()) as one:
        with pytest.raises(WireError, match="no learner"):
            one.begin(describe(), 0.01)
        one.begin(describe(), 0.01, stopped=lambda: "a person")


def test_a_learner_that_comes_later_is_found():
    address = free_address()
    with actor(address) as one:
        started = []
        thread = threading.Thread(target=lambda: started.append(one.start(PATIENCE)))
        thread.start()
        with learner(address, welcome={"task": "later", "seed": 3}):
            thread.join()
    assert [(orders["task"], orders["seed"]) for orders in started] == [("later", 3)]


def test_every_actor_that_asks_gets_another_number():
    with learner(expected={"a" * 16: 5}) as link:
        numbers = []
        for _ in range(3):
            with actor(link.address) as one:
                numbers.append(one.start(PATIENCE)["number"])
    assert numbers == sorted(set(numbers)) and numbers[0] == 2  # after the one there was and `tether run`'s own


def test_another_robot_is_refused_with_the_difference():
    with learner() as link:
        for changes, line in (
            ({"hz": 20.0}, "hz: 10.0 here, 20.0 there"), ({"robot": "arm"}, "robot: car here, arm there"),
            ({"channels": (("pose", 3, "m", 50.0),)}, r"channel pose: \[2, 'm'.* here, \[3, 'm'"),
        ):
            with pytest.raises(WireError, match=line), actor(link.address) as one:
                one.begin(describe(**changes), PATIENCE)
        with actor(link.address) as one:
            with pytest.raises(WireError, match="refuses"):
                one.begin(describe(hz=7.0), PATIENCE)
            with pytest.raises(WireError, match="refuses"):
                one.send(1, payload(1))
        assert link.status() == {}


def edit(spec, rng):
    """The same with one thing changed."""
    rows, commands, lines = list(spec.channels), list(spec.command), spec.task.splitlines()
    i, k, n = rng.randrange(len(rows)), rng.randrange(len(commands)), rng.randrange(len(lines))
    (name, size, unit, hz), (value, low, high) = rows[i], commands[k]
    rows[i] = rng.choice([(name + "x", size, unit, hz), (name, size + 1, unit, hz), (name, size, "km", hz),
                          (name, size, unit, hz + 1)])  # fmt: skip
    commands[k] = rng.choice([(value + "x", low, high), (value, low - 1, high), (value, low, high + 1)])
    lines[n] += rng.choice([" # changed", "0", "x"])
    return rng.choice([{"channels": tuple(rows)}, {"channels": spec.channels[:i] + spec.channels[i + 1 :]},
                       {"command": tuple(commands)}, {"hz": spec.hz + 1}, {"robot": spec.robot + "x"},
                       {"task": "\n".join(lines)}])  # fmt: skip


def test_every_edit_of_the_description_is_refused_at_once_with_the_difference():
    spec = catalog.stream_meta(catalog.load_spec("car-loop"))
    rng = random.Random(5)
    with learner(spec=spec) as link:
        for _ in range(50):
            change = edit(spec, rng)
            with pytest.raises(WireError, match=" here, .* there"), actor(link.address) as one:
                one.begin(replace(spec, stream=f"{rng.getrandbits(64):016x}", **change), 1.0)
        assert link.status() == {}


def test_a_stream_from_the_learners_future_is_refused():
    meta = describe()
    with learner(expected={meta.stream: 10}) as link, actor(link.address) as one:
        with pytest.raises(WireError, match="cannot go on here"):
            one.begin(meta, PATIENCE)


def test_hello_that_contradicts_itself_is_refused():
    meta = describe()
    with learner() as link, raw(zmq.DEALER, link.address) as peer:
        for bad in (hello(meta, first=0), hello(meta, stream="0" * 16)):
            peer.send_multipart(bad)
            assert b"cannot go on here" in next_of(peer, "REFUSE").body
        peer.send_multipart(wire.encode("HELLO", b"{}", **wire.decode(hello(meta), "actor").fields))
        until(link, lambda: link._pump.malformed == 1)
        assert link.status() == {}


def test_an_actor_that_was_told_what_to_do_is_silent_until_it_begins():
    address = free_address()
    with raw(zmq.ROUTER, address) as fake, actor(address, flush=0) as one:
        route, *_ = fake.recv_multipart()
        fake.send_multipart([route, *wire.encode("WELCOME", msgpack.packb({}), stream=transport.NOBODY)])
        assert one.start(PATIENCE) == {}
        one.send(1, payload(1))
        opener = threading.Thread(target=one.begin, args=(describe(), PATIENCE))
        opener.start()
        message = wire.decode(fake.recv_multipart()[1:], "actor")
        while (message.kind, message.body) == ("HELLO", b""):  # asked again before the answer came
            message = wire.decode(fake.recv_multipart()[1:], "actor")
        assert message.kind == "HELLO" and message.body
        fake.send_multipart([route, *wire.encode("WELCOME", msgpack.packb({}), stream=message.fields["stream"])])
        opener.join()


def test_another_protocol_is_said_on_both_sides():
    foreign = [msgpack.packb({"v": 99, "t": "HI"}), b""]
    with learner() as link, raw(zmq.DEALER, link.address) as peer:
        peer.send_multipart(foreign)
        assert b"version 99" in next_of(peer, "REFUSE").body
    address = free_address()
    with raw(zmq.ROUTER, address) as fake, actor(address) as one:
        fake.send_multipart([fake.recv_multipart()[0], *foreign])
        with pytest.raises(WireError, match="version 99 .*install the same tether on both"):
            one.start(PATIENCE)


# --- weights


def test_weights_reach_every_actor_now_and_later_and_are_given_once():
    big = PARAMS | {"dense0/kernel": np.random.default_rng(0).standard_normal((400, 500)).astype(np.float32)}
    with learner() as link, actor(link.address, describe()) as one:
        assert one.weights() is None
        link.publish(3, big)
        until(one, lambda: one._fresh)
        number, params = one.weights()
        assert number == 3 and all(np.array_equal(params[k], v) for k, v in big.items())
        assert one.weights() is None
        link.publish(5, big)
        link.publish(6, big)
        until(one, lambda: one._inbox.version == 6)
        assert one.weights(PATIENCE)[0] == 6
        assert one.weights() is None
        with actor(link.address, describe()) as late:
            until(late, lambda: late._fresh)
            until(link, lambda: all(s.report.get("weights") == 6 for s in link._streams.values()))
        assert all(0 < s.weights_at < math.inf for s in link.status().values())
        with pytest.raises(WireError, match="not newer"):
            link.publish(6, big)
        with pytest.raises(WireError, match="not finite"):
            link.publish(7, PARAMS | {"mean/bias": np.array([np.nan])})


def test_a_restarted_learner_may_count_weights_from_the_start_again():
    address = free_address()
    with learner(address) as link:
        one = ActorLink(address)
        one.begin(describe(), PATIENCE)
        link.publish(40, PARAMS)
        until(one, lambda: one._inbox.version == 40)
    for number in (40, 2):
        with learner(address) as link:
            link.publish(number, PARAMS)
            while one.weights(PATIENCE)[0] != number:
                assert number == 2  # those before may have come twice
    one.close(0)


@pytest.mark.parametrize(
    "how, reason", [("corrupt", "checksum"), ("nan", "not finite"), ("layout", "changed")]
)
def test_bad_weights_are_refused_with_the_reason_and_the_next_ones_taken(how, reason):
    params = {"w": np.ones(100_000, np.float32)}
    with learner() as link, actor(link.address, describe()) as one:
        link.publish(1, params)
        assert one.weights(PATIENCE)[0] == 1
        good = wire.pack_weights(2, params)
        nan = good.data[:-4] + b"\0\0\xc0\x7f"
        bad = {
            "corrupt": good._replace(data=good.data[:-4] + bytes(4)),
            "nan": good._replace(data=nan, sha256=hashlib.sha256(nan).hexdigest()),
            "layout": wire.pack_weights(2, {"v": params["w"]}),
        }[how]
        link._weights = bad
        link._pump.wake()
        until(link, lambda: any(s.report.get("refused") for s in link._streams.values()))
        (stream,) = link.status().values()
        assert reason in stream.report["refused"] and stream.report["weights"] == 1
        assert one.weights() is None
        link.publish(3, params)
        assert one.weights(PATIENCE)[0] == 3


def test_a_chunk_is_sent_when_it_is_asked_for_so_that_acknowledgements_pass():
    meta = describe()
    def want(version, offset):
        peer.send_multipart(wire.encode("WANT", stream=meta.stream, version=version, offset=offset))
        return next_of(peer, "WEIGHTS")

    with learner() as link, raw(zmq.DEALER, link.address) as peer:
        peer.send_multipart(hello(meta))
        assert next_of(peer, "ACK").fields["weights"] == 0
        link.publish(1, {"w": np.ones(1_000_000, np.float32)})
        assert next_of(peer, "ACK").fields["weights"] == 1
        assert want(1, 0).fields["offset"] == 0
        peer.send_multipart(data(meta, 1, payload(1)))
        next_of(peer, "ACK")
        assert len(want(1, wire.CHUNK).body) == wire.CHUNK
        assert want(1, 1 << 40).body == b""
        link.publish(2, {"w": np.ones(1_000_000, np.float32)})
        rest = want(1, 2 * wire.CHUNK).fields  # what has begun is sent to its end ...
        assert (rest["version"], rest["offset"]) == (1, 2 * wire.CHUNK)
        newer = want(2, 0).fields
        assert (newer["version"], newer["offset"]) == (2, 0)
        newest = want(1, 2 * wire.CHUNK).fields  # ... and what is gone begins with the newest
        assert (newest["version"], newest["offset"]) == (2, 0)


def test_weights_arrive_though_newer_ones_come_before_all_of_their_chunks():
    params = {"w": np.ones(3 * wire.CHUNK // 4, np.float32)}
    with learner() as link, actor(link.address, describe()) as one:
        serve, versions, taken = link._serve, itertools.count(2), []

        def published(stream):  # with every chunk that goes out
            before = stream.want
            serve(stream)
            if before is not None and stream.want is None and not taken:
                link._weights = wire.pack_weights(next(versions), params)

        link._serve = published
        link.publish(1, params)
        taken.append(one.weights(PATIENCE))
        assert taken[0][0] == 1


def test_messages_gather_while_the_learner_has_records_and_come_at_once_when_it_waits(monkeypatch):
    for module, name in ((pump, "GATHER_S"), (transport, "STORE_S")):
        monkeypatch.setattr(module, name, 2 * PATIENCE)  # nobody here waits for so long
    stored = []

    def journal(meta, first, payloads):
        stored.append(len(payloads))
        return len(payloads)

    with learner(journal=journal) as link, actor(link.address, describe(), flush=0) as one:
        one.send(1, payload(1))
        until(one, lambda: one._spool.first == 2)
        assert len(link._queue) == 1
        for i in range(2, 22):
            one.send(i, payload(i))
        assert seqs(link.poll(), None) == [1]
        assert seqs(collect(link, 20)) == list(range(2, 22))
        assert sum(stored) == 21 and len(stored) <= 4
        one.send(22, payload(22))
        assert seqs(link.poll(PATIENCE)) == [22]


def test_poll_gives_no_more_than_asked_for():
    with learner() as link, actor(link.address, describe()) as one:
        for i in range(1, 6):
            one.send(i, payload(i))
        until(link, lambda: link.waiting == 5)
        assert [seqs(link.poll(0.0, 3)), link.waiting, seqs(link.poll(0.0, 3))] == [[1, 2, 3], 2, [4, 5]]


# --- permission to go on, status, stop


def test_run_until_wakes_the_actor_and_never_falls():
    meta = describe()
    with learner() as link, actor(link.address, meta) as one:
        assert not one.wait_run_until(1, timeout=0.0)
        waiting = threading.Thread(target=lambda: reached.append(one.wait_run_until(7, PATIENCE)))
        reached = []
        waiting.start()
        link.set_run_until({meta.stream: 7})
        waiting.join()
        assert reached == [True]
        link.set_run_until({meta.stream: 3})
        link.set_run_until({"f" * 16: 9})  # unknown: nobody to tell
        one.send(1, payload(1))
        collect(link, 1)
        until(one, lambda: len(one._spool) == 0)
        assert one.wait_run_until(7, 0.0) and link.status()[meta.stream].run_until == 7


def test_what_the_actor_reports_is_in_the_learners_status():
    meta = describe()
    with learner() as link, actor(link.address, meta) as one:
        one.report({"rate/late": 3, "rate/hz": np.float32(9.5), "rate/nan": float("nan")})
        until(link, lambda: link._streams[meta.stream].report["stats"])
        status = link.status()[meta.stream]
        assert status.report["stats"] == {"rate/late": 3.0, "rate/hz": 9.5}
        assert status.connected and status.report["state"] == "run" and status.report["spool"] == 0


def test_stop_reaches_actors_that_wait_and_those_that_come_later():
    with learner() as link, actor(link.address, describe()) as one:
        waiting = threading.Thread(target=one.wait_run_until, args=(9, PATIENCE))
        waiting.start()
        link.stop("enough")
        assert waiting.join() is None and one.stopped == "enough"
        with actor(link.address, describe()) as late:
            until(late, lambda: late.stopped)
            assert not link.wait_closed(0.0)
        one.close()
        assert link.wait_closed(PATIENCE)


# --- addresses


def test_a_busy_port_is_one_clear_line():
    with learner() as link:
        with pytest.raises(WireError, match=f"cannot listen on {link.address}: .*in use.*--bind"):
            LearnerLink(link.address, SPEC, {}, print, {})


def test_localhost_is_loopback():
    with learner("tcp://localhost:*") as link, actor(link.address.replace("127.0.0.1", "localhost")) as one:
        assert one.start(PATIENCE)


def test_every_option_is_set_before_bind_or_connect():
    with learner() as link, actor(link.address) as one:
        for each in (link, one):
            for option, value in pump.OPTIONS.items():
                assert each._pump._socket.getsockopt(option) == value
        assert one._pump._socket.getsockopt(zmq.IMMEDIATE) == 1


# --- malice and failure


def test_malformed_input_is_counted_and_the_others_are_served_on():
    rng, meta, other = random.Random(5), describe(), describe()
    want = wire.encode("WANT", stream=other.stream, version=1, offset=9)
    corpus = [hello(other), data(other, 1, payload(1)), want]
    with learner() as link, actor(link.address, meta) as one, raw(zmq.DEALER, link.address) as peer:
        host, port = link.address.removeprefix("tcp://").split(":")
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(5000), b"\xff" + b"\0" * 8 + b"\x7f"):
            with sockets.create_connection((host, int(port))) as stray, suppress(OSError):
                stray.sendall(garbage)
        bad = 0
        for _ in range(3000):
            frames = [bytearray(frame) for frame in rng.choice(corpus)]
            frames[0][rng.randrange(len(frames[0]))] ^= 1 << rng.randrange(8)
            frames = rng.choice([frames, frames[:1], frames * 3, [b""], [rng.randbytes(50), b""]])
            with suppress(zmq.Again):
                peer.send_multipart([bytes(frame) for frame in frames])
            try:
                wire.decode([bytes(frame) for frame in frames], "actor")
            except WireError:
                bad += 1
            while peer.poll(0):
                peer.recv_multipart()
        for i in range(1, 101):
            one.send(i, payload(i))
        mine = []
        while len(mine) < 100:
            came = link.poll(PATIENCE)
            assert came
            mine += seqs(came, meta.stream)
        until(link, lambda: link._pump.malformed >= bad)
        assert mine[-1] == 100 and one._pump.malformed == 0


def test_what_could_not_be_stored_is_not_acknowledged_and_comes_again(monkeypatch):
    monkeypatch.setattr(transport, "GO_BACK_S", 0.05)
    stored, room = [], [7]

    def journal(meta, first, payloads):
        fits = payloads[: max(0, room[0] - len(stored))]
        stored.extend(range(first, first + len(fits)))
        return len(fits)

    with learner(journal=journal) as link, actor(link.address, describe()) as one:
        for i in range(1, 41):
            one.send(i, payload(i))
        assert seqs(collect(link, 7)) == list(range(1, 8))
        until(one, lambda: one._spool.first == 8)
        room[0] = 100
        assert seqs(collect(link, 33)) == list(range(8, 41)) and stored == list(range(1, 41))


def test_an_error_of_the_learners_thread_comes_back_and_nothing_is_acknowledged():
    def journal(meta, first, payloads):
        raise OSError("no space left on the disk")

    with learner(journal=journal) as link, actor(link.address, describe(), flush=0) as one:
        one.send(1, payload(1))
        with pytest.raises(WireError, match="no space left"):
            link.poll(PATIENCE)
        with pytest.raises(WireError, match="no space left"):
            link.publish(1, PARAMS)
        assert one.close(0) == 1


def test_an_error_of_the_actors_thread_comes_back(monkeypatch):
    def broken(self, body, **fields):
        raise ZeroDivisionError("broken")

    with learner() as link, actor(link.address, describe(), flush=0) as one:
        monkeypatch.setattr(ActorLink, "_on_ack", broken)
        one.send(1, payload(1))
        with pytest.raises(WireError, match="broken"):
            one.wait_run_until(1, PATIENCE)
        send, report = (lambda: one.send(2, payload(2))), (lambda: one.report({}))
        for call in (one.weights, send, report, lambda: one.wait_run_until(1, 0.0)):
            with pytest.raises(WireError, match="broken"):
                call()


def test_a_learner_that_lags_takes_no_more_and_goes_on_later(monkeypatch):
    monkeypatch.setattr(transport, "MAX_QUEUED", 10)
    monkeypatch.setattr(transport, "GO_BACK_S", 0.05)
    with learner() as link, actor(link.address, describe()) as one:
        for i in range(1, 41):
            one.send(i, payload(i))
        until(link, lambda: len(link._queue) == 10)
        found = []
        while len(found) < 40:
            came = link.poll(PATIENCE)
            assert 0 < len(came) <= 10
            found += came
        assert seqs(found) == list(range(1, 41))
