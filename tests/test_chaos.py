"""Seconds' worth of the campaigns in tests/chaos, and that they would notice what they look for."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import pytest

pytest.importorskip("jax")  # the learner's module imports it

from tether.drivers.fake import Fake
from tether.launch import learner, transport
from tether.robot_env import record
from tether.robot_env.record import SegmentWriter, encode

from tests.chaos import campaign, ends, fuzz, measure, nemesis
from tests.chaos.proxy import Proxy

PATIENCE = 20.0
STREAM = ends.SPEC.stream


def rows(count):
    robot = Fake()
    robot.open()
    return [encode(ends.example(seq, robot)) for seq in range(1, count + 1)]


def test_faults_at_random_lose_and_double_nothing(tmp_path):
    totals = campaign.run(8, seed=5, folder=tmp_path / "run")
    print(campaign.line(totals))
    assert totals["ok"] and totals["faults"] >= 8 and totals["records"] > 500, totals["worst"]


@pytest.mark.parametrize("kind", ["learner killed", "all killed", "actor's disk full", "learner's disk full"])
def test_each_of_the_worst_faults_loses_and_doubles_nothing(tmp_path, kind):
    with nemesis.Nemesis(tmp_path / "run", seed=1) as one:
        one.fault(kind)
        totals = one.finish()
    assert not any(totals[key] for key in campaign.BAD), totals
    assert (totals["cut_by_kill"] <= nemesis.ACTORS) if kind == "all killed" else totals["cut_by_kill"] == 0


def history(folder, stored, made=20):
    """As if an actor had made `made` records and a learner stored those numbers."""
    payloads = rows(max(made, *stored))
    ends.new_history(folder, STREAM)
    ends.made(folder, STREAM)[:made] = [ends.checksum(payload) for payload in payloads[:made]]
    writer = SegmentWriter(folder / "steps" / STREAM, ends.SPEC)
    for seq in stored:
        writer.append(seq, payloads[seq - 1])
    writer.close()


@pytest.mark.parametrize("stored, bad", [
    (range(1, 21), {}), (range(1, 20), {"lost": 1}), ([*range(1, 8), *range(9, 21)], {"lost": 1}),
    ([*range(1, 21), 20], {"doubled": 1}), ([1, 2, 4, 3, *range(5, 21)], {"disordered": 1}),
    (range(1, 22), {"altered": 1}), ([*range(1, 8), *range(5, 21)], {"doubled": 3, "disordered": 1}),
])  # fmt: skip
def test_the_checker_finds_what_is_lost_doubled_or_out_of_order(tmp_path, stored, bad):
    history(tmp_path, stored)
    found = nemesis.check(tmp_path, killed=set())
    assert {key: value for key, value in found.items() if value and key not in ("records", "streams", "worst")} == bad
    assert found["records"] == 20 and bool(found["worst"]) == bool(bad)


def test_of_a_killed_actor_the_last_record_may_be_missing_and_only_that(tmp_path):
    history(tmp_path, range(1, 20))
    found = nemesis.check(tmp_path, {STREAM})
    assert (found["lost"], found["cut_by_kill"]) == (0, 1)
    ends.made(tmp_path, STREAM)[20] = 1
    found = nemesis.check(tmp_path, {STREAM})
    assert (found["lost"], found["cut_by_kill"]) == (1, 1)


def test_the_checker_finds_an_altered_record(tmp_path):
    history(tmp_path, range(1, 21))
    ends.made(tmp_path, STREAM)[3] ^= 2
    assert nemesis.check(tmp_path, set())["altered"] == 1


def test_what_is_acknowledged_was_synced_in_every_segment_it_lies_in(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SEGMENT_RECORDS", 10)
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    journal = learner.Journal(tmp_path)
    assert journal(ends.SPEC, 1, rows(25)) == 25
    journal.close()
    assert synced == {path.stat().st_ino for path in (tmp_path / STREAM).iterdir()} and len(synced) == 3


# --- malice


def test_malformed_messages_crash_neither_end():
    found = fuzz.fuzz(3000, seed=11)
    assert found["crashes"] == found["hangs"] == 0, found["first_crashes"]
    assert 100 < found["taken"] < 1500 and found["refused_actors"] > 3  # good ones are among them


def test_the_fuzzer_finds_a_crash_and_a_hang(monkeypatch):
    monkeypatch.setattr(transport.LearnerLink, "_on_data", lambda *_: {}["no"])
    waits = [PATIENCE]
    monkeypatch.setattr(transport.ActorLink, "_on_welcome", lambda *_, **__: waits and time.sleep(waits.pop()))
    monkeypatch.setattr(fuzz, "HANG_S", 0.2)
    found = fuzz.fuzz(600, seed=1)
    assert found["crashes"] > 3 and "KeyError" in found["first_crashes"][0] and found["hangs"] == 1


def test_strangers_who_never_finish_saying_hello_do_not_stop_the_service():
    found = fuzz.half_open(50, seconds=0.5)
    assert found["flooded_ms"]["trips"] > 5


def test_weights_pass_a_slow_line_and_acknowledgements_beside_them():
    found = measure.weights(1_000_000, 0.0)
    assert found["disconnects"] == 0 and found["seconds"] >= 0.3  # it was slow


# --- the proxy itself


class Echo:
    """A connection through a proxy, and its other end."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.proxy = Proxy(f"tcp://127.0.0.1:{self.listener.getsockname()[1]}")
        port = int(self.proxy.address.rsplit(":", 1)[1])
        self.near = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.far, _ = self.listener.accept()
        self.far.settimeout(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.proxy.close()
        for each in (self.near, self.far, self.listener):
            each.close()

    def passed(self, data):
        """Seconds that `data` takes from near to far."""
        began, came = time.monotonic(), b""
        self.near.sendall(data)
        while len(came) < len(data):
            came += self.far.recv(1 << 20)
        assert came == data
        return time.monotonic() - began


def test_the_proxy_passes_delays_and_throttles_what_it_is_given():
    with Echo() as pair:
        data = np.random.default_rng(0).bytes(200_000)
        pair.passed(data)
        pair.proxy.delay_s = 0.1
        assert pair.passed(b"x") >= 0.1
        pair.proxy.delay_s, pair.proxy.bytes_per_s = 0.0, 1e6
        assert pair.passed(data) >= 0.15
        pair.proxy.bytes_per_s, pair.proxy.recorded = 0.0, []
        pair.far.sendall(b"not from a client")
        pair.passed(b"abc")
        assert b"".join(pair.proxy.recorded) == b"abc"


def test_the_proxy_stalls_and_then_passes_all():
    with Echo() as pair:
        pair.proxy.stalled = True
        time.sleep(0.05)  # it may be in the middle of a turn
        pair.near.sendall(b"abc")
        pair.far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            pair.far.recv(9)
        pair.proxy.stalled = False
        pair.far.settimeout(PATIENCE)
        assert pair.far.recv(9) == b"abc"


@pytest.mark.parametrize("reset", [False, True])
def test_the_proxy_cuts_with_and_without_reset(reset):
    with Echo() as pair:
        pair.passed(b"abc")
        pair.proxy.cut(reset)
        if reset:
            with pytest.raises(ConnectionResetError):
                pair.near.recv(9)
        else:
            assert pair.near.recv(9) == b""


def test_the_proxy_truncates_and_ends_with_the_client():
    with Echo() as pair:
        pair.proxy.truncate = True
        pair.near.sendall(b"abcdef")
        assert pair.far.recv(9) == b"abc" and pair.far.recv(9) == b"" and not pair.proxy.truncate
    with Echo() as pair:
        pair.near.sendall(b"last words")
        pair.near.close()
        assert pair.far.recv(99) == b"last words" and pair.far.recv(9) == b""
