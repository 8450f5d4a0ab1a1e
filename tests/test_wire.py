"""Messages: every kind survives the trip, nothing malformed does, weights arrive whole or not at all."""

from __future__ import annotations

import random
import resource
import zlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.launch import wire
from tether.launch.wire import CHUNK, MESSAGES, Inbox, VersionError, WireError, decode, encode, pack_weights

STREAM, SHA = "0123456789abcdef", "a" * 64
VALUES = {
    "count": st.integers(0, wire.MAX_INT - 1),
    "text": st.text(max_size=60),
    "flag": st.booleans(),
    "stream": st.text("0123456789abcdef", min_size=16, max_size=16),
    "sha256": st.just("") | st.text("0123456789abcdef", min_size=64, max_size=64),
    "numbers": st.dictionaries(
        st.text(max_size=20), st.integers(-9, 9) | st.floats(-1e300, 1e300), max_size=8
    ),
}
EXAMPLE = {
    "count": 7, "text": "why", "flag": True, "stream": STREAM,
    "sha256": SHA, "numbers": {"rate/hz": 9.9},
}
BAD = {
    "count": [-1, wire.MAX_INT, True, 1.0, "1", None, [1]],
    "text": ["x" * 257, "ä" * 129, 1, None, b"x"],
    "flag": [0, 1, None, "True"],
    "stream": ["", STREAM[:-1], STREAM + "0", STREAM.upper(), STREAM + "\n", "../../../../../../", 7],
    "sha256": ["a", "A" * 64, None, 0],
    "numbers": [
        {"x": float("nan")}, {"x": True}, {"x": "1"}, {1: 1.0}, [], None, {"x": {"y": 1}}, {"x" * 300: 1},
        {str(i): 1 for i in range(65)},
    ],
}


def example(kind, **changes):
    return {name: EXAMPLE[check] for name, check in MESSAGES[kind].fields.items()} | changes


def raw(kind, body=b"", **fields):
    """As encode, without its checks."""
    return [msgpack.packb({"v": wire.VERSION, "t": kind, "crc": zlib.crc32(body), **fields}), body]


@pytest.mark.parametrize("kind", MESSAGES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_message_round_trips(kind, data):
    shape = MESSAGES[kind]
    fields = {name: data.draw(VALUES[check]) for name, check in shape.fields.items()}
    body = data.draw(st.binary(max_size=200))
    assert decode(encode(kind, body, **fields), shape.sender) == (kind, fields, body)


@pytest.mark.parametrize("kind", MESSAGES)
def test_wrong_fields_are_refused_on_both_sides(kind):
    shape = MESSAGES[kind]
    good = example(kind)
    assert decode(raw(kind, **good), shape.sender).fields == good
    cases = [good | {"extra": 1}, *({k: v for k, v in good.items() if k != name} for name in good)]
    cases += [good | {name: bad} for name, check in shape.fields.items() for bad in BAD[check]]
    for fields in cases:
        with pytest.raises(WireError, match=kind):
            encode(kind, **fields)
        with pytest.raises(WireError):
            decode(raw(kind, **fields), shape.sender)
    with pytest.raises(WireError, match="not for the"):
        decode(raw(kind, **good), {"actor": "learner", "learner": "actor"}[shape.sender])


def test_frames_are_bounded_before_anything_is_unpacked():
    header, body = encode("WEND", version=1)
    for frames in ([], [header], [header, body, b""], [b"", header, body]):
        with pytest.raises(WireError, match="frames"):
            decode(frames, "learner")
    for frames in ([header + b"\0" * wire.MAX_HEADER, body], [header, b"\0" * (wire.MAX_BODY + 1)]):
        with pytest.raises(WireError, match="too long"):
            decode(frames, "learner")
    with pytest.raises(WireError, match="do not fit"):
        encode("WELCOME", b"\0" * (wire.MAX_BODY + 1), **example("WELCOME"))
    with pytest.raises(WireError, match="do not fit"):
        encode("STATUS", **example("STATUS", stats={f"{i:0200}": 1.0 for i in range(60)}))


@pytest.mark.parametrize(
    "header",
    [b"", b"\xc1", b"\x01", b"\x90", b"\x80", msgpack.packb({"v": 1}), msgpack.packb({"v": 1, "t": []}),
     msgpack.packb({"t": "WEND"}), msgpack.packb({"v": True, "t": "WEND"}),
     msgpack.packb({"v": 1, "t": "NO"}), msgpack.packb({b"v": 1}), msgpack.packb({1: 1}),
     b"\xdf\xff\xff\xff\xff", b"\x81\xa1v" * 500,
     b"\x91" * 5000, msgpack.packb({"v": 1, "t": msgpack.ExtType(1, b"x")}), msgpack.packb({"v": 1}) + b"\0",
     b"\x82\xa1v\xd6\xff\x00\x00\x00\x00\xa1t\xa1x"],
)
def test_malformed_headers_are_refused(header):
    with pytest.raises(WireError):
        decode([header, b""], "learner")


def test_a_flipped_body_is_refused():
    header, body = encode("WCHUNK", b"abcd", version=1, offset=0)
    with pytest.raises(WireError, match="checksum"):
        decode([header, b"abcc"], "learner")


def test_another_version_is_told_apart_from_garbage():
    with pytest.raises(VersionError, match="version 2 .* install the same"):
        decode([msgpack.packb({"v": 2, "t": "HI", "new": 1}), b""], "actor")


def test_twenty_thousand_mutated_messages_raise_nothing_else():
    rng = random.Random(1)
    corpus = [(encode(kind, b"body", **example(kind)), MESSAGES[kind].sender) for kind in MESSAGES]
    before, passed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for _ in range(20_000):
        frames, sender = rng.choice(corpus)
        header = bytearray(frames[0])
        for _ in range(rng.randint(1, 3)):
            header[rng.randrange(len(header))] = rng.randrange(256)
        if rng.random() < 0.1:
            header = header[: rng.randrange(len(header))]
        try:
            kind, fields, _ = decode([bytes(header), frames[1]], sender)
        except WireError:
            continue
        passed += 1
        assert fields.keys() == MESSAGES[kind].fields.keys()
        assert all(wire.KINDS[k](fields[name]) for name, k in MESSAGES[kind].fields.items())
    assert passed  # a flipped digit is still a number
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=50), min_size=1, max_size=wire.MAX_BATCH), st.data())
def test_batches_of_records_fill_the_body_exactly(payloads, data):
    body = wire.pack_records(payloads)
    assert wire.unpack_records(body, len(payloads)) == payloads
    cut = data.draw(st.integers(0, len(body) - 1))
    for bad, count in ((body[:cut], len(payloads)), (body + b"\0", len(payloads)), (body, 0), (body, 33)):
        with pytest.raises(WireError):
            wire.unpack_records(bad, count)
    with pytest.raises(WireError, match="beyond"):
        wire.unpack_records(b"\xff\xff\xff\xff", 1)


def test_json_bodies_are_objects_that_fit():
    assert wire.unpack_json(wire.pack_json({"task": "ä", "n": [1]})) == {"task": "ä", "n": [1]}
    with pytest.raises(WireError, match="do not fit"):
        wire.pack_json({"task": "x" * wire.MAX_BODY})
    for bad in (b"", b"[]", b"{", b"\xff", b'{"a":' * 50_000):
        with pytest.raises(WireError, match="JSON"):
            wire.unpack_json(bad)


def test_clipped_text_always_fits():
    for text in ("short", "ä" * 500, "x" * 255 + "ä", "\ud800" * 400):
        assert wire.KINDS["text"](wire.clip(text))
    assert wire.clip("short") == "short"


PARAMS = {
    "mean/kernel": np.arange(12, dtype=np.float32).reshape(4, 3),
    "dense0/kernel": np.ones((200, 500), np.float32), "scalar": np.float32(3), "mean/bias": np.zeros(3),
}


def messages(version=1, params=PARAMS):
    return [decode(frames, "learner") for frames in pack_weights(version, params).messages()]


def deliver(inbox, sequence):
    found = None
    for message in sequence:
        found = inbox.take(message) or found
    return found


def test_weights_arrive_equal_whatever_the_order_of_the_dict():
    sequence = messages()
    assert [m.kind for m in sequence] == ["WBEGIN", "WCHUNK", "WCHUNK", "WEND"]
    assert all(len(m.body) <= CHUNK for m in sequence)
    inbox = Inbox()
    found = deliver(inbox, sequence)
    assert inbox.version == 1 and found.keys() == PARAMS.keys()
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32 and found[name].shape == np.shape(value)
    turned = pack_weights(1, dict(reversed(PARAMS.items())))
    assert turned == pack_weights(1, PARAMS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
@pytest.mark.filterwarnings("ignore:overflow")
def test_weights_that_are_not_finite_are_never_published(bad):
    with pytest.raises(WireError, match="mean/bias is not finite"):
        pack_weights(1, PARAMS | {"mean/bias": np.array([0.0, bad, 0.0])})


def forged(version, layout, data, **changes):
    """The messages of a sender that checks nothing."""
    weights = wire.Weights(version, layout, data)
    sequence = [decode(frames, "learner") for frames in weights.messages()]
    return [sequence[0]._replace(fields=sequence[0].fields | changes), *sequence[1:]]


def row(name="w", dtype="f4", shape=(2,)):
    return [name, dtype, list(shape)]


@pytest.mark.parametrize(
    "layout, data, changes, reason",
    [
        ([row()], np.float32([1, np.nan]).tobytes(), {}, "not finite"),
        ([row()], bytes(8), {"sha256": SHA}, "checksum"),
        ([row()], bytes(8), {"layout_hash": SHA}, "checksum"),
        ([row()], bytes(8), {"nbytes": 12}, "malformed layout"),
        ([row()], bytes(8), {"nbytes": wire.MAX_WEIGHTS + 1}, "more than"),
        ([row(shape=(3,))], bytes(8), {}, "malformed layout"),
        ([row(shape=(2**40, 2**40))], bytes(8), {}, "malformed layout"),
        ([row(shape=(-1, -2))], bytes(8), {}, "malformed layout"),
        ([row(shape=(True, 2))], bytes(8), {}, "malformed layout"),
        ([row(dtype="O")], bytes(8), {}, "malformed layout"),
        ([row(dtype="f8", shape=(1,))], bytes(8), {}, "malformed layout"),
        ([row("b"), row("a")], bytes(16), {}, "malformed layout"),
        ([row("a"), row("a")], bytes(16), {}, "malformed layout"),
        ([row(7)], bytes(8), {}, "malformed layout"),
        ([row(shape=(1,) * 9)], bytes(4), {}, "malformed layout"),
        ([], b"", {}, "malformed layout"),
        ({"w": 1}, bytes(8), {}, "malformed layout"),
        (7, bytes(8), {}, "malformed layout"),
    ],
)
def test_forged_weights_are_refused_with_the_reason(layout, data, changes, reason):
    inbox = Inbox()
    with pytest.raises(WireError, match=reason):
        deliver(inbox, forged(1, msgpack.packb(layout), data, **changes))
    assert inbox.version == 0
    assert deliver(inbox, messages(1)) is not None  # and the next good set is taken


def test_chunks_lost_repeated_or_out_of_place_are_refused():
    begin, first, second, end = good = messages()
    lost, repeated, swapped = [begin, second, end], [begin, first, first], [begin, second, first, end]
    for bad in (lost, repeated, swapped, [begin, first, end]):
        inbox = Inbox()
        with pytest.raises(WireError, match="due|bytes came"):
            deliver(inbox, bad)
        assert deliver(inbox, good[1:3]) is None  # the rest of a refused set is ignored
        with pytest.raises(WireError, match="refused or lost"):
            inbox.take(end)
        assert inbox.version == 0


def test_a_newer_version_supersedes_and_an_older_one_is_refused():
    inbox, old, new = Inbox(), messages(4), messages(5, {**PARAMS, "scalar": np.float32(9)})
    assert deliver(inbox, old[:2] + new[:1] + old[2:] + new[1:])["scalar"] == 9
    for version in (5, 4, 0):
        with pytest.raises(WireError, match="not newer than version 5"):
            deliver(inbox, messages(version))
    with pytest.raises(WireError, match="layout changed"):
        deliver(inbox, messages(6, {"w": np.zeros(3)}))
    assert inbox.version == 5


def test_mutated_transfers_are_never_applied():
    rng, applied = random.Random(2), 0
    params = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    good = messages(3, params)
    for _ in range(3000):
        sequence = list(good)
        at = rng.randrange(len(sequence))
        kind, fields, body = sequence[at]
        if body and rng.random() < 0.5:
            flipped = bytearray(body)
            flipped[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            body = bytes(flipped)
        else:
            name = rng.choice(list(fields))
            fields = fields | {name: fields[name] + 1 if type(fields[name]) is int else SHA}
        sequence[at] = wire.Message(kind, fields, body)
        try:
            applied += deliver(Inbox(), sequence) is not None
        except WireError:
            pass
    assert applied == 0
