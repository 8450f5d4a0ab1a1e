"""The record format: exact round trips, files that survive being cut or damaged, input nobody vouches for."""

from __future__ import annotations

import json
import os
import random
import resource
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.drivers.base import Channel, Command, Reading
from tether.robot_env import record as module
from tether.robot_env.record import (
    MAX_PAYLOAD,
    SOURCES,
    Meta,
    Record,
    RecordError,
    SegmentWriter,
    decode,
    encode,
    read_recording,
    read_streams,
)

CHANNELS = (
    Channel("imu", 3, "m/s^2", 100, 0.04, (9.81,) * 3),
    Channel("pose", 4, "m", 50, 0.05, (1.0,) * 4),
)
COMMAND = Command(
    ("speed", "steering"), ("m/s", "rad"), action_low=(0.5, -0.38), action_high=(4.5, 0.38),
    low=(-1.5, -0.38), high=(4.5, 0.38), rate=(9.0, 4.0), safe=(0.0, 0.0),
)


def meta(**changes):
    return replace(Meta.of("car", '[task]\nrobot = "car"\n', 10, CHANNELS, COMMAND), **changes)


def make(seq, action=True):
    rng = np.random.default_rng(seq)
    reading = Reading(
        {c.name: rng.standard_normal(c.size).astype(np.float32) for c in CHANNELS},
        {c.name: seq * 0.1 - c.latency_s for c in CHANNELS},
    )
    executed = rng.standard_normal(2).astype(np.float32) if action else None
    truncated = seq % 7 == 0
    return Record(seq, seq * 0.1, reading, executed, 0.25 * seq, False, truncated, "policy", 3, {"stuck": 1})


def same(a, b):
    for x, y in ((a.reading.values, b.reading.values), ({"a": a.action}, {"a": b.action})):
        assert list(x) == list(y)
        for name, value in x.items():
            if value is None:
                assert y[name] is None
            else:
                assert y[name].dtype == np.float32
                np.testing.assert_array_equal(np.asarray(value, np.float32), y[name])
    plain = [r._replace(reading=Reading({}, r.reading.stamps), action=None) for r in (a, b)]
    assert plain[0] == plain[1]
    return True


def add(writer, record):
    writer.append(record.seq, encode(record))


def write(folder, count):
    """Records in one segment, whose path is returned with them."""
    writer = SegmentWriter(folder, meta())
    records = [make(i + 1, action=i % 5 != 4) for i in range(count)]
    for record in records:
        add(writer, record)
    writer.close()
    return folder / "00000001.seg", records


finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(max_size=20)
floats32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 2**53 - 1), finite, st.dictionaries(names, st.lists(st.floats(width=32), max_size=5)),
    st.none() | st.lists(floats32, min_size=1, max_size=12), finite, st.booleans(), st.booleans(),
    st.sampled_from(SOURCES), st.integers(0, 2**53 - 1), st.dictionaries(names, finite, max_size=5),
)
def test_round_trip_is_exact(
    seq, time, values, action, reward, terminated, truncated, source, version, events
):
    reading = Reading({k: np.array(v, np.float32) for k, v in values.items()}, dict.fromkeys(values, time))
    executed = None if action is None else np.array(action, np.float32)
    record = Record(seq, time, reading, executed, reward, terminated, truncated, source, version, events)
    assert same(record, decode(encode(record)))


def test_numpy_scalars_and_float64_readings_are_taken():
    record = make(1)
    reading = Reading({"pose": np.zeros(4)}, {"pose": np.float64(0.5)})
    odd = record._replace(
        reading=reading, reward=np.float32(0.5), terminated=np.bool_(True),
        events={"x": np.float32(1)},
    )
    back = decode(encode(odd))
    assert back.reward == 0.5 and back.terminated is True and back.reading.values["pose"].dtype == np.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": float("nan")}, {"time": float("inf")}, {"action": np.array([np.nan], np.float32)},
        {"events": {"lap_time_s": float("nan")}}, {"events": {str(i): 0.0 for i in range(65)}},
        {"reading": Reading({"x": np.zeros(MAX_PAYLOAD // 4)}, {"x": 0.0})},
    ],
)
def test_encode_refuses_what_decode_would(changes):
    with pytest.raises(RecordError, match="malformed record"):
        encode(make(1)._replace(**changes))


def rows():
    good = msgpack.unpackb(encode(make(1)))
    swaps = {
        0: [0, -1, True, 1.0, "1", 2**60, None], 1: [float("nan"), 1, None], 2: [float("inf"), "x"],
        3: [4, -1, True], 4: [9, -1, "policy"], 5: [-1, 1.5],
        6: [b"", b"123", "abcd", b"\0\0\xc0\x7f", b"\0" * 400],
        7: [
            [], {"x": [1.0]}, {"x": [1, b""]}, {"x": [1.0, "abcd"]}, {"x": [1.0, b"abc"]}, {1: [1.0, b""]},
            None, {str(i): [1.0, b""] for i in range(65)},
        ],
        8: [{"x": 1}, {"x": float("nan")}, [], {"x" * 300: 1.0}],
    }
    for at, values in swaps.items():
        for value in values:
            yield [*good[:at], value, *good[at + 1 :]]
    yield from ([], good[:-1], [*good, 0], {"seq": 1}, "abcdefghi", 7)


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: repr(row)[-30:])
def test_decode_refuses_wrong_types_and_bounds(row):
    with pytest.raises(RecordError):
        decode(msgpack.packb(row))


def test_decode_of_mutated_bytes_never_raises_anything_else():
    rng, good = random.Random(0), encode(make(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20_000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        if rng.random() < 0.2:
            bad = bad[: rng.randrange(len(bad))]
        try:
            found = decode(bytes(bad))
        except RecordError:
            continue
        assert np.isfinite(found.reward) and found.source in SOURCES
    for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"):  # claims 2^32 items
        with pytest.raises(RecordError):
            decode(kind + b"\xff\xff\xff\xff\1")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_folder_rolls_segments_and_a_later_writer_adds(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_RECORDS", 4)
    described = meta()
    for start in (1, 7):
        writer = SegmentWriter(tmp_path / "s", described)
        for seq in range(start, start + 6):
            add(writer, make(seq))
        writer.close()
    assert len(list((tmp_path / "s").iterdir())) == 4
    found, records = read_recording(tmp_path / "s", pytest.fail)
    assert found == described
    assert [r.seq for r in records] == list(range(1, 13)) and all(map(same, records, map(make, range(1, 13))))


def test_segments_roll_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1000)
    write(tmp_path / "s", 20)
    assert len(list((tmp_path / "s").iterdir())) > 2
    assert len(read_recording(tmp_path / "s", pytest.fail)[1]) == 20


def test_appended_records_are_with_the_system_before_close(tmp_path):
    writer = SegmentWriter(tmp_path / "s", meta())
    for seq in range(1, 4):
        add(writer, make(seq))
        assert len(read_recording(tmp_path / "s", pytest.fail)[1]) == seq
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        add(writer, make(4))


def test_a_file_cut_anywhere_gives_the_whole_records_before_the_cut(tmp_path):
    path, records = write(tmp_path, 3)
    data = path.read_bytes()
    ends = [i for i in range(1, len(data) + 1) if data[i : i + 4] == b"TTHR" or i == len(data)]
    assert len(ends) == 4
    for cut in (*range(0, len(data), 3), *ends[:-1]):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        if whole == 0:
            with pytest.raises(RecordError, match="not a recording"):
                read_recording(path)
            continue
        damage = []
        _, found = read_recording(path, damage.append)
        assert len(found) == whole - 1 and all(map(same, found, records))
        assert len(damage) == (cut not in ends)


def test_a_flipped_byte_loses_only_its_record_and_is_named(tmp_path):
    path, _ = write(tmp_path, 4)
    data = path.read_bytes()
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"TTHR"]
    for at in range(starts[1], len(data), 2):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        damage = []
        _, found = read_recording(path, damage.append)
        hit = sum(start <= at for start in starts) - 1
        assert [r.seq for r in found] == [seq for seq in range(1, 5) if seq != hit]
        assert str(path) in damage[0]


def test_a_magic_inside_a_record_is_no_frame(tmp_path):
    writer = SegmentWriter(tmp_path, meta(task="TTHR" * 9))
    add(writer, make(1)._replace(events={"TTHR" * 9: 1.0}))
    writer.close()
    found, records = read_recording(tmp_path, pytest.fail)
    assert found.task == "TTHR" * 9 and len(records) == 1


def test_damage_is_reported_on_standard_error_by_default(tmp_path, capsys):
    path, _ = write(tmp_path / "lap", 3)
    os.truncate(path, path.stat().st_size - 5)
    assert len(read_recording(tmp_path / "lap")[1]) == 2
    assert "00000001.seg: cut at byte" in capsys.readouterr().err


def test_doubled_missing_and_foreign_records_are_left_out_and_named(tmp_path):
    described = meta()
    writer = SegmentWriter(tmp_path / "s", described)
    for seq in (1, 2, 2, 5):
        add(writer, make(seq))
    writer.append(6, encode(make(9)))
    writer.append(6, b"\x01")
    writer.close()
    other = SegmentWriter(tmp_path / "s", meta())
    add(other, make(6))
    other.close()
    damage = []
    _, found = read_recording(tmp_path / "s", damage.append)
    assert [r.seq for r in found] == [1, 2, 5]
    causes = ("there twice", "records 3 to 4 are missing", "another's", "malformed", "another's")
    assert all(cause in line for cause, line in zip(causes, damage, strict=True))


@pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"TTHR" * 100, os.urandom(5000)])
def test_what_is_no_recording_is_refused_with_the_remedy(tmp_path, content, capsys):
    (tmp_path / "notes.csv").write_bytes(content)
    with pytest.raises(RecordError, match=r"notes.csv is not a recording.*tether record"):
        read_recording(tmp_path / "notes.csv")
    assert capsys.readouterr().err == ""
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(RecordError, match="tether record"):
            read_recording(missing)


def test_another_format_is_refused(tmp_path, monkeypatch):
    described = meta()
    monkeypatch.setattr(module, "FORMAT", 2)
    writer = SegmentWriter(tmp_path / "s", replace(described, format=2))
    add(writer, make(1))
    writer.close()
    monkeypatch.setattr(module, "FORMAT", 1)
    with pytest.raises(RecordError, match="00000001.seg: record format 2, not 1"):
        read_recording(tmp_path / "s")


def test_streams_of_a_run_come_in_order_and_empty_ones_are_skipped(tmp_path):
    for i, stream in enumerate(("f" * 16, "0" * 16)):
        writer = SegmentWriter(tmp_path / stream, meta(stream=stream, created=f"2026-01-0{i + 1}"))
        add(writer, make(1))
        writer.close()
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "00000001.seg").write_bytes(b"")
    assert [m.stream for m, _ in read_streams(tmp_path, pytest.fail)] == ["f" * 16, "0" * 16]
    assert read_streams(tmp_path / "none") == []


def test_a_full_disk_is_said_and_leaves_whole_frames(tmp_path):
    writer = SegmentWriter(tmp_path / "s", meta())
    add(writer, make(1))
    real = writer._file

    class Full:
        def write(self, frame):
            return real.write(frame[:50])

        fileno, close = real.fileno, real.close

    writer._file = Full()
    with pytest.raises(RecordError, match="record 2 was not written: the disk is full"):
        add(writer, make(2))
    writer._file = real
    add(writer, make(2))
    writer.close()
    assert [r.seq for r in read_recording(tmp_path / "s", pytest.fail)[1]] == [1, 2]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file"):
        SegmentWriter(tmp_path / "file", meta())
    with pytest.raises(RecordError, match="cannot be written"):
        SegmentWriter(tmp_path / "file" / "below", meta())


def test_meta_round_trip_and_differences():
    described = meta()
    assert Meta.from_json(described.to_json()) == described
    other = meta(hz=20.0, channels=described.channels[:1], task="another")
    (line,) = described.differences(meta(task=described.task.replace("\n", "\nmore = 1\n", 1)))
    assert line.startswith("task, line 2: ") and line.endswith(" here, more = 1 there")
    lines = described.differences(other)
    assert "hz: 10.0 here, 20.0 there" in lines and any(x.startswith("channel pose: [4, 'm'") for x in lines)
    assert described.differences(meta()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"stream": "xyz"}, {"stream": "../../../../etc/"}, {"hz": 0.0}, {"hz": float("nan")}, {"hz": "10"},
        {"channels": [[]]}, {"channels": [["a", 1.0, "m", 1.0]]}, {"channels": ["abcd"]}, {"channels": [3]},
        {"channels": 3}, {"command": [["a"]]}, {"robot": None}, {"robot": "x" * 300}, {"format": 9},
        {"extra": 1},
    ],
)
def test_malformed_meta_is_refused(change):
    with pytest.raises(RecordError):
        Meta.from_json(json.dumps(json.loads(meta().to_json()) | change).encode())


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b" " * (MAX_PAYLOAD + 1), b"9" * 9999], ids=len
)
def test_meta_of_other_bytes_is_refused(data):
    with pytest.raises(RecordError):
        Meta.from_json(data)
