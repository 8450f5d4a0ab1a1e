"""Messages: every kind survives the trip, nothing malformed does, weights arrive whole or not at all."""

from __future__ import annotations

import hashlib
import json
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
from tether.robot_env.record import MAX_INT

STREAM, SHA = "0123456789abcdef", "a" * 64
VALUES = {
    "count": st.integers(0, MAX_INT - 1),
    "text": st.text(max_size=60),
    "stream": st.text("0123456789abcdef", min_size=16, max_size=16),
    "sha256": st.text("0123456789abcdef", min_size=64, max_size=64),
    "numbers": st.dictionaries(st.text(max_size=20), st.floats(-1e300, 1e300), max_size=8),
}
EXAMPLE = {
    "count": 7, "text": "why", "stream": STREAM,
    "sha256": SHA, "numbers": {"rate/hz": 9.9},
}
BAD = {
    "count": [-1, MAX_INT, True, 1.0, "1", None, [1]],
    "text": ["x" * 257, "ä" * 129, 1, None, b"x"],
    "stream": ["", STREAM[:-1], STREAM + "0", STREAM.upper(), STREAM + "\n", "../../../../../../", 7],
    "sha256": ["", "a", "A" * 64, None, 0],
    "numbers": [
        {"x": float("nan")}, {"x": 1}, {"x": "1"}, {1: 1.0}, [], None, {"x": {"y": 1}}, {"x" * 300: 1.0},
        {str(i): 1.0 for i in range(65)},
    ],
}


def example(kind, **changes):
    return {name: EXAMPLE[check] for name, check in wire.FIELDS[kind].items()} | changes


def raw(kind, body=b"", **fields):
    """As encode, without its checks."""
    return [msgpack.packb({"v": wire.VERSION, "t": kind, "crc": zlib.crc32(body), **fields}), body]


@pytest.mark.parametrize("kind", MESSAGES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_message_round_trips(kind, data):
    fields = {name: data.draw(VALUES[check]) for name, check in wire.FIELDS[kind].items()}
    body = data.draw(st.binary(max_size=200))
    assert decode(encode(kind, body, **fields), MESSAGES[kind][0]) == (kind, fields, body)


@pytest.mark.parametrize("kind", MESSAGES)
def test_wrong_fields_are_refused_on_both_sides(kind):
    sender = MESSAGES[kind][0]
    good = example(kind)
    assert decode(raw(kind, **good), sender).fields == good
    cases = [good | {"extra": 1}, *({k: v for k, v in good.items() if k != name} for name in good)]
    cases += [good | {name: bad} for name, check in wire.FIELDS[kind].items() for bad in BAD[check]]
    for fields in cases:
        with pytest.raises(WireError, match=kind):
            encode(kind, **fields)
        with pytest.raises(WireError):
            decode(raw(kind, **fields), sender)
    with pytest.raises(WireError, match="not for the"):
        decode(raw(kind, **good), {"actor": "learner", "learner": "actor"}[sender])


def test_frames_are_bounded_before_anything_is_unpacked():
    header, body = encode("WELCOME", **example("WELCOME"))
    for frames in ([], [header], [header, body, b""], [b"", header, body]):
        with pytest.raises(WireError, match="two frames"):
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
    [b"", b"\xc1", b"\x01", b"\x90", b"\x80", msgpack.packb({"v": 2}), msgpack.packb({"v": 2, "t": []}),
     msgpack.packb({"t": "REFUSE"}), msgpack.packb({"v": True, "t": "REFUSE"}),
     msgpack.packb({"v": 2, "t": "NO"}), msgpack.packb({b"v": 1}), msgpack.packb({1: 1}),
     b"\xdf\xff\xff\xff\xff", b"\x81\xa1v" * 500,
     b"\x91" * 5000, msgpack.packb({"v": 2, "t": msgpack.ExtType(1, b"x")}), msgpack.packb({"v": 2}) + b"\0",
     b"\x82\xa1v\xd6\xff\x00\x00\x00\x00\xa1t\xa1x"],
)
def test_malformed_headers_are_refused(header):
    with pytest.raises(WireError):
        decode([header, b""], "learner")


def test_a_flipped_body_is_refused():
    header, body = encode("WEIGHTS", b"abcd", **example("WEIGHTS"))
    with pytest.raises(WireError, match="checksum"):
        decode([header, b"abcc"], "learner")


def test_another_version_is_told_apart_from_garbage():
    with pytest.raises(VersionError, match="version 99 .* install the same"):
        decode([msgpack.packb({"v": 99, "t": "HI", "new": 1}), b""], "actor")


def test_twenty_thousand_mutated_messages_raise_nothing_else():
    rng = random.Random(1)
    corpus = [(encode(kind, b"body", **example(kind)), MESSAGES[kind][0]) for kind in MESSAGES]
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
        assert fields.keys() == wire.FIELDS[kind].keys()
        assert all(wire.KINDS[k](fields[name]) for name, k in wire.FIELDS[kind].items())
    assert passed  # a flipped digit is still a number
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=50), min_size=1, max_size=wire.MAX_BATCH), st.data())
def test_batches_of_records_fill_the_body_exactly(payloads, data):
    body = msgpack.packb(payloads)
    assert wire.unpack_records(body) == payloads
    for bad in (body[: data.draw(st.integers(0, len(body) - 1))], body + b"\0"):
        with pytest.raises(WireError):
            wire.unpack_records(bad)


@pytest.mark.parametrize("value", [[], [b""] * 33, ["text"], [b"", None], {b"": b""}, 7, b"bytes"])
def test_what_is_no_batch_is_refused(value):
    with pytest.raises(WireError):
        wire.unpack_records(msgpack.packb(value))


def test_maps_have_bounded_texts():
    orders = {"task": "ä" * 5000, "policy": {"hidden": [16, 16], "max_delta": None}}
    assert wire.unpack(msgpack.packb(orders), dict, max_str_len=wire.MAX_BODY) == orders
    for bad in (b"", msgpack.packb(orders), msgpack.packb([1]), b"\xdf\xff\xff\xff\xff"):
        with pytest.raises(WireError, match="malformed"):
            wire.unpack(bad, dict)


def test_clipped_text_always_fits():
    for text in ("short", "ä" * 500, "x" * 255 + "ä", "\ud800" * 400):
        assert wire.KINDS["text"](wire.clip(text))
    assert wire.clip("short") == "short"


PARAMS = {
    "mean/kernel": np.arange(12, dtype=np.float32).reshape(4, 3),
    "dense0/kernel": np.ones((200, 250), np.float32), "scalar": np.float32(3), "mean/bias": np.zeros(3),
}


def messages(version=1, params=PARAMS):
    """All the chunks of a set of weights, as an actor gets them."""
    return chunks(pack_weights(version, params))


def chunks(weights):
    return [decode(weights.chunk(at), "learner") for at in range(0, max(len(weights.data), 1), CHUNK)]


def take(inbox, message):
    return inbox.take(message.body, **message.fields)


def deliver(inbox, sequence):
    found = None
    for message in sequence:
        found = take(inbox, message) or found
    return found


def test_weights_arrive_equal_whatever_the_order_of_the_dict():
    sequence = messages()
    assert len(sequence) == 2 and all(len(m.body) <= CHUNK for m in sequence)
    inbox = Inbox()
    found = deliver(inbox, sequence)
    assert (inbox.version, inbox.tried, inbox.refused) == (1, 1, "") and found.keys() == PARAMS.keys()
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32 and found[name].shape == np.shape(value)
    turned = {name: np.array(value, order="F") for name, value in reversed(PARAMS.items())}
    assert pack_weights(1, turned)[:4] == pack_weights(1, PARAMS)[:4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
@pytest.mark.filterwarnings("ignore:overflow")
def test_weights_that_are_not_finite_are_never_published(bad):
    with pytest.raises(WireError, match="mean/bias is not finite"):
        pack_weights(1, PARAMS | {"mean/bias": np.array([0.0, bad, 0.0])})


def file(header, data):
    """A safetensors file that says what it likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "data, changes, reason",
    [
        (file(tensor(), np.float32([1, np.nan]).tobytes()), {}, "not finite"),
        (file(tensor(dtype="I64", shape=(1,)), bytes(8)), {}, "not a float32"),
        (file(tensor(dtype="O"), bytes(8)), {}, "malformed"),
        (file(tensor(shape=(3,)), bytes(8)), {}, "malformed"),
        (file(tensor(shape=(2**40, 2**40)), bytes(8)), {}, "malformed"),
        (file(tensor(shape=(-1, -2)), bytes(8)), {}, "malformed"),
        (file(tensor(offsets=(0, 2**60)), bytes(8)), {}, "malformed"),
        (file(tensor(offsets=(8, 0)), bytes(8)), {}, "malformed"),
        (file(tensor(), bytes(12)), {}, "malformed"),
        (file(b"[" * 9999, b""), {}, "malformed"),
        (file(b"\xff" * 9, b""), {}, "malformed"),
        ((2**63).to_bytes(8, "little"), {}, "malformed"),
        (b"abc", {}, "malformed"),
        (b"", {}, "0 of 0 bytes"),
        (file(tensor(), bytes(8)), {"sha256": SHA}, "checksum"),
        (file(tensor(), bytes(8)), {"layout": SHA}, "checksum"),
        (file(tensor(), bytes(8)), {"nbytes": 7}, "of 7 bytes"),
        (file(tensor(), bytes(8)), {"nbytes": wire.MAX_WEIGHTS + 1}, "bytes"),
    ],
)
def test_forged_weights_are_refused_with_the_reason(data, changes, reason):
    inbox, header = Inbox(), data[: 8 + int.from_bytes(data[:8], "little")]
    forged = wire.Weights(1, data, hashlib.sha256(header).hexdigest(), hashlib.sha256(data).hexdigest(), 0.0)
    sequence = [message._replace(fields=message.fields | changes) for message in chunks(forged)]
    assert deliver(inbox, sequence) is None
    assert reason in inbox.refused and (inbox.version, inbox.tried) == (0, 1)
    assert deliver(inbox, messages(1)) is None  # refused is refused
    assert deliver(inbox, messages(2)) is not None  # and the next good set is taken


def test_chunks_repeated_or_out_of_place_change_nothing():
    first, second = messages()
    inbox = Inbox()
    assert take(inbox, second) is None and inbox.filled(1) == 0
    assert take(inbox, first) is None and inbox.filled(1) == CHUNK
    assert take(inbox, first) is None and inbox.filled(1) == CHUNK
    assert take(inbox, second) is not None
    assert take(inbox, second) is None and take(inbox, first) is None  # given once
    assert inbox.refused == ""


def test_a_newer_version_supersedes_and_an_older_one_is_not_taken():
    inbox, old, new = Inbox(), messages(4), messages(5, {**PARAMS, "scalar": np.float32(9)})
    assert deliver(inbox, old[:1] + new[:1] + old[1:] + new[1:])["scalar"] == 9
    for version in (5, 4, 0):
        assert deliver(inbox, messages(version)) is None
    assert deliver(inbox, messages(6, {"w": np.zeros(3)})) is None
    assert "weights 6: the layout changed" in inbox.refused and (inbox.version, inbox.tried) == (5, 6)


def test_mutated_transfers_are_never_applied():
    rng, applied = random.Random(2), 0
    params = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    ((kind, fields, body),) = messages(3, params)
    for _ in range(3000):
        changed, flipped = dict(fields), bytearray(body)
        if rng.random() < 0.5:
            flipped[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        else:
            name = rng.choice([name for name in fields if name != "version"])
            changed[name] = fields[name] + 1 if type(fields[name]) is int else SHA
        applied += Inbox().take(bytes(flipped), **changed) is not None
    assert applied == 0
