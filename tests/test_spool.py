"""Records that wait for the learner: none lost, none doubled, whatever dies; the disk gets its room back."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.drivers.base import Reading
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import spool as spools
from tether.launch import wire
from tether.launch.actor import deliver
from tether.launch.spool import Spool, left_behind
from tether.launch.transport import ActorLink, LearnerLink
from tether.launch.wire import WireError
from tether.robot_env import record
from tether.robot_env.record import Meta, Record, encode

META = Meta.of("car", "the task", 10, CHANNELS, COMMAND)


def payload(seq):
    reading = Reading({"pose": np.full(2, seq, np.float32)}, {"pose": 0.1 * seq})
    return encode(Record(seq, 0.1 * seq, reading, np.zeros(1, np.float32), 1.0, False, False, "policy", 0, {}))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "ack", "batch"]), st.integers(0, 80)), max_size=60))
def test_the_spool_equals_a_plain_list(operations):
    spool, kept, acked = Spool(), [], 0
    for what, number in operations:
        if what == "append":
            for _ in range(number % 40):
                kept.append(bytes([len(kept) % 256]) * 9)
                spool.append(len(kept), kept[-1])
        elif what == "ack" and number <= len(kept):
            acked = max(acked, number)
            spool.ack(number)
        elif what == "batch":
            seq = spool.first + number % (len(spool) + 1)
            assert spool.batch(seq) == kept[seq - 1 : seq - 1 + wire.MAX_BATCH]
        assert (spool.first, spool.next_seq, len(spool)) == (acked + 1, len(kept) + 1, len(kept) - acked)


def test_the_spool_asks_for_a_pause_and_refuses_what_it_cannot_keep(monkeypatch):
    spool = Spool()
    with pytest.raises(WireError, match="record 2 came where 1 was due"):
        spool.append(2, b"")
    monkeypatch.setattr(spools, "BUDGET", 10)
    spool.append(1, b"12345678")
    assert not spool.full
    spool.append(2, b"9")
    assert spool.full
    with pytest.raises(WireError, match="2 records wait for the learner, and no more fit"):
        spool.append(3, b"ab")
    spool.ack(1)
    assert not spool.full
    spool.append(3, b"ab")


def test_a_batch_never_exceeds_a_chunk_unless_one_record_does():
    spool = Spool()
    sizes = [30_000] * 6 + [200_000] * 2
    for seq, size in enumerate(sizes, 1):
        spool.append(seq, bytes(size))
    assert [len(spool.batch(seq)) for seq in range(1, 9)] == [4, 4, 4, 3, 2, 1, 1, 1]
    assert len(msgpack.packb(spool.batch(1))) <= wire.CHUNK


def files(folder):
    return sorted(path.name for path in folder.glob("*/*.seg"))


def test_what_is_acknowledged_leaves_the_disk_and_an_empty_spool_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SEGMENT_RECORDS", 10)
    spool = Spool(tmp_path / META.stream, META)
    for seq in range(1, 36):
        spool.append(seq, payload(seq))
    assert len(files(tmp_path)) == 4
    spool.ack(9)
    assert len(files(tmp_path)) == 4
    spool.ack(20)
    assert len(files(tmp_path)) == 2
    spool.ack(35)
    assert len(files(tmp_path)) == 1  # it may go on
    spool.close()
    assert list(tmp_path.iterdir()) == []
    spool.close()


def test_what_is_left_behind_is_found_once_its_actor_is_gone(tmp_path):
    spool = Spool(tmp_path / META.stream, META)
    for seq in range(1, 31):
        spool.append(seq, payload(seq))
    with left_behind(tmp_path) as found:
        assert found == []  # it lives
    spool.close()
    with left_behind(tmp_path) as found:
        [(folder, meta, left)] = found
        assert (folder, meta, left.first, left.next_seq) == (tmp_path / META.stream, META, 1, 31)
        assert left.batch(1)[0] == payload(1)
        with left_behind(tmp_path) as other:
            assert other == []  # one at a time
    with left_behind(tmp_path / "none") as found:
        assert found == []


def test_a_killed_actor_leaves_all_it_appended(tmp_path):
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests_spool import META, payload
from tether.launch.spool import Spool
spool = Spool(Path({str(tmp_path / "spool")!r}) / META.stream, META)
for seq in range(1, 10**6):
    spool.append(seq, payload(seq))
    if seq % 50 == 0:
        print(seq, flush=True)
"""
    (tmp_path / "tests_spool.py").write_text(Path(__file__).read_text())
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path, text=True) as process:
        for _ in range(12):
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    with left_behind(tmp_path / "spool") as found:
        [(_, meta, left)] = found
        assert left.first == 1 and left.next_seq > told
        assert left.batch(told)[0] == payload(told)


def test_a_damaged_record_is_named_and_the_rest_delivered_in_two_rows(tmp_path, capsys):
    spool = Spool(tmp_path / META.stream, META)
    for seq in range(1, 31):
        spool.append(seq, payload(seq))
    spool.close()
    [file] = (tmp_path / META.stream).glob("*.seg")
    data = bytearray(file.read_bytes())
    data[data.index(payload(12))] ^= 1
    file.write_bytes(data)
    with left_behind(tmp_path) as found:
        assert [(left.first, left.next_seq) for _, _, left in found] == [(1, 12), (13, 31)]
    assert "records 12 to 12 are missing" in capsys.readouterr().err


def test_what_was_left_behind_is_delivered_and_removed_or_stays(tmp_path, capsys):
    stored = []

    def journal(meta, first, payloads):
        stored.extend((meta.stream, seq) for seq in range(first, first + len(payloads)))
        return len(payloads)

    other = Meta.of("dog", "the task", 10, CHANNELS, COMMAND)
    for meta, acked in ((META, 7), (other, 0)):
        spool = Spool(tmp_path / meta.stream, meta)
        for seq in range(1, 301):
            spool.append(seq, payload(seq))
        spool.ack(acked)
        spool.close()
    learner = LearnerLink("tcp://127.0.0.1:*", META, {}, journal, {META.stream: 101})
    try:
        deliver(learner.address, tmp_path)
    finally:
        learner.close()
    assert stored == [(META.stream, seq) for seq in range(101, 301)]
    assert [path.name for path in tmp_path.iterdir()] == [other.stream]
    assert "stays where it is: the link failed: the learner at" in capsys.readouterr().err


def test_what_a_link_could_not_deliver_is_on_the_disk(tmp_path):
    learner = LearnerLink("tcp://127.0.0.1:*", META, {}, lambda meta, first, payloads: 0, {})  # its disk is full
    link = ActorLink(learner.address)
    link.begin(META, spool=Spool(tmp_path / META.stream, META))
    link.send(1, payload(1))
    assert link.close(0.0) == 1
    learner.close()
    with left_behind(tmp_path) as found:
        assert [(meta, left.first, len(left)) for _, meta, left in found] == [(META, 1, 1)]


def test_what_the_learner_has_already_is_not_left_behind_for_ever(tmp_path):
    """A disk that was full for a while, or a loss of power: the learner has more than the spool."""
    spool = Spool(tmp_path / META.stream, META)
    for seq in range(1, 101):
        spool.append(seq, payload(seq))
    spool.close()
    learner = LearnerLink("tcp://127.0.0.1:*", META, {}, lambda *_: pytest.fail("again"), {META.stream: 301})
    try:
        deliver(learner.address, tmp_path)
        assert learner.poll() == [] and list(tmp_path.iterdir()) == []
    finally:
        learner.close()


def test_an_actor_that_was_killed_at_its_beginning_leaves_nothing(tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    living = Spool(tmp_path / META.stream, META)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "00000001.seg").write_bytes(b"")
    with left_behind(tmp_path) as found:
        assert found == []
    assert [path.name for path in tmp_path.iterdir()] == [META.stream] and not capsys.readouterr().err
    living.close()


def test_actors_that_begin_while_others_look_for_what_was_left_keep_their_folders(tmp_path):
    done = threading.Event()

    def look():
        while not done.is_set():
            with left_behind(tmp_path) as found:
                assert found == []

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for number in range(300):
            meta = replace(META, stream=f"{number:016x}")
            spool = Spool(tmp_path / meta.stream, meta)
            spool.append(1, payload(1))
            assert [r.seq for r in record.read_recording(tmp_path / meta.stream, pytest.fail)[1]] == [1]
            spool.ack(1)
            spool.close()
    finally:
        done.set()
        looking.join()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk():
    """No file of this process grows."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_did_not_fit_is_on_the_disk_once_there_is_room_even_in_a_new_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SEGMENT_RECORDS", 10)
    monkeypatch.setattr(spools, "CATCH_UP", 4)
    spool = Spool(tmp_path / META.stream, META)
    for seq in range(1, 11):
        spool.append(seq, payload(seq))
    with full_disk():
        for seq in range(11, 17):
            spool.append(seq, payload(seq))
        assert spool.full and "was not written" in spool.trouble
    spool.append(17, payload(17))
    assert spool.full  # some are still in memory alone
    spool.append(18, payload(18))
    assert not spool.full and not spool.trouble
    spool.ack(10)
    assert len(files(tmp_path)) == 1  # and it says whose records it holds
    spool.close()
    with left_behind(tmp_path) as found:
        assert [(meta, left.first, left.next_seq) for _, meta, left in found] == [(META, 11, 19)]


def test_a_segment_that_cannot_be_opened_is_opened_later(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SEGMENT_RECORDS", 2)
    spool = Spool(tmp_path / META.stream, META)
    for seq in (1, 2):
        spool.append(seq, payload(seq))
    (tmp_path / META.stream).rename(tmp_path / "away")
    (tmp_path / META.stream).write_text("in the way")
    spool.append(3, payload(3))
    assert spool.full and "cannot be written" in spool.trouble
    (tmp_path / META.stream).unlink()
    (tmp_path / "away").rename(tmp_path / META.stream)
    spool.append(4, payload(4))
    assert not spool.trouble
    assert [r.seq for r in record.read_recording(tmp_path / META.stream, pytest.fail)[1]] == [1, 2, 3, 4]
    spool.ack(4)
    spool.close()


def test_a_full_disk_loses_nothing_and_asks_for_a_pause(tmp_path):
    spool = Spool(tmp_path / META.stream, META)
    spool.append(1, payload(1))
    working = spool._writer._file

    class Full:
        fileno = working.fileno

        def write(self, data):
            return working.write(data[:20])  # as a disk that is just full does

    spool._writer._file = Full()
    spool.append(2, payload(2))
    assert spool.full and "the disk is full" in spool.trouble
    assert spool.batch(1) == [payload(1), payload(2)]
    spool.ack(2)
    assert not spool.full  # all that waited is where it should be
    spool._writer._file = working
    spool.append(3, payload(3))
    assert not spool.trouble and not spool.full
    assert [r.seq for r in record.read_recording(tmp_path / META.stream, print)[1]] == [1, 3]
    spool.close()
