"""Who gets in: keys that are made, kept secret, asked for off loopback, and what happens without the right ones."""

from __future__ import annotations

import os
import re
import shutil
import socket as sockets
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import keys, pump, wire
from tether.launch.keys import KeysError
from tether.launch.transport import ActorLink, LearnerLink
from tether.launch.wire import WireError
from tether.robot_env.record import Meta

from tests.chaos.proxy import Proxy

NOWHERE = re.compile("(?!)")
REFUSED = (zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
           | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED)  # fmt: skip


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """Key folders of a learner, which has made keys for `car` and `dog`, and of both robots; loopback needs keys."""
    monkeypatch.setattr(keys, "LOOPBACK", NOWHERE)

    def at(name):
        monkeypatch.setenv("TETHER_KEYS", str(tmp_path / name))
        return tmp_path / name

    at("learner")
    keys.make(["car", "dog"])
    for name in ("car", "dog"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "learner" / "actors" / f"{name}.key", tmp_path / name / "actor.key")
    return at


class End:
    """A pump that keeps what came."""

    def __init__(self, kind, address):
        self.pump, self.came, self.out = pump.Pump(kind, address), [], []
        self.pump.start(lambda frames: self.came.append((self.pump.peer, frames)), self.turn)

    def turn(self):
        if self.pump.end_by < float("inf"):
            return None
        while self.out and self.pump.send(self.out[0]):  # the other thread appends
            self.out.pop(0)
        return False

    def send(self, *frames):
        self.out.append(list(frames))
        self.pump.wake()


def test_an_actor_is_known_by_its_key_and_both_ends_hear_each_other(homes):
    homes("learner")
    learner = End(zmq.ROUTER, "tcp://127.0.0.1:*")
    ends = []
    for name in ("car", "dog"):
        homes(name)
        ends.append(End(zmq.DEALER, learner.pump.address))
        ends[-1].send(b"from", name.encode())
    try:
        assert learner.pump.wait(lambda: len(learner.came) == 2, 10)
        assert {(peer, frames[2]) for peer, frames in learner.came} == {("car", b"car"), ("dog", b"dog")}
        learner.send(learner.came[0][1][0], b"welcome")
        first = ends[0] if learner.came[0][0] == "car" else ends[1]
        assert first.pump.wait(lambda: first.came, 10) and first.came[0][1] == [b"welcome"]
    finally:
        for end in (*ends, learner):
            end.pump.close()


@pytest.mark.parametrize("case", ["no key", "unknown key", "wrong learner", "shut out"])
def test_nobody_else_gets_a_message_in(homes, case, tmp_path):
    homes("learner")
    learner = End(zmq.ROUTER, "tcp://127.0.0.1:*")
    context = zmq.Context()
    intruder = context.socket(zmq.DEALER)
    monitor = intruder.get_monitor_socket(REFUSED)
    pair = keys._pair()
    known = keys._read(homes("car") / "actor.key")
    if case == "unknown key":
        keys.Keys("car", *pair, known.learner).lock(intruder)
    elif case == "wrong learner":
        keys.Keys("car", known.public, known.secret, pair[0]).lock(intruder)
    elif case == "shut out":
        (tmp_path / "learner" / "actors" / "car.pub").unlink()
        known.lock(intruder)
    intruder.connect(learner.pump.address)
    intruder.send(b"let me in")
    try:
        assert monitor.poll(10_000), "nothing was refused"
        homes("dog")
        dog = End(zmq.DEALER, learner.pump.address)  # who belongs there is served meanwhile
        dog.send(b"me")
        assert learner.pump.wait(lambda: learner.came, 10)
        assert [peer for peer, _ in learner.came] == ["dog"] and learner.pump.malformed == 0
        dog.pump.close()
    finally:
        learner.pump.close()
        intruder.disable_monitor()
        context.destroy(0)


def test_a_robot_is_shown_its_key_and_makes_none(homes):
    homes("car")
    learner = keys._read(keys.folder() / "actor.key").learner
    (line,) = keys.make([])
    assert line.startswith("actor car ") and f"of learner {learner}" in line
    assert [path.name for path in keys.folder().iterdir()] == ["actor.key"]


def test_a_key_in_the_other_ones_place_is_refused(homes):
    homes("car")
    (keys.folder() / "actor.key").rename(keys.folder() / "learner.key")
    with pytest.raises(KeysError, match=r"learner\.key is the key of 'car'"):
        keys.needed("tcp://0.0.0.0:1", "learner.key")
    homes("learner")
    (keys.folder() / "learner.key").rename(keys.folder() / "actor.key")
    with pytest.raises(KeysError, match=r"actor\.key is the key of 'learner'"):
        keys.needed("tcp://0.0.0.0:1", "actor.key")


def test_an_actor_refuses_another_learner(homes, tmp_path):
    homes("other")
    keys.make([])
    imposter = End(zmq.ROUTER, "tcp://127.0.0.1:*")
    homes("car")
    car = End(zmq.DEALER, imposter.pump.address)
    homes("other")
    car.send(b"records")
    try:
        assert not imposter.pump.wait(lambda: imposter.came, 1.0) and not car.came
    finally:
        car.pump.close()
        imposter.pump.close()


def test_off_loopback_keys_are_asked_for_with_the_command_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TETHER_KEYS", str(tmp_path / "none"))
    for kind in (zmq.ROUTER, zmq.DEALER):
        for host in ("0.0.0.0", "*", "192.168.1.7", "workstation", "8.8.8.8", "127.evil.com", "127.0.0.1.evil.com"):
            address = f"tcp://{host}:5555"
            with pytest.raises(KeysError, match="beyond this machine.* `tether keys NAME`"):
                pump.Pump(kind, address)
    bad = ("", "127.0.0.1:5555", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:65536", "ipc://x")
    for address in (*bad, "tcp://127.0.0.1:1;tcp://8.8.8.8:1"):
        with pytest.raises(WireError, match="is no address"):
            pump.Pump(zmq.ROUTER, address)
    assert keys.needed("tcp://127.0.0.1:5555", "learner.key") is None is keys.needed("tcp://localhost:*", "actor.key")


def test_secrets_are_for_their_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TETHER_KEYS", str(tmp_path / "keys"))
    old = os.umask(0)
    try:
        lines = keys.make(["car"])
    finally:
        os.umask(old)
    source, target = str(tmp_path / "keys/actors/car.key"), "ROBOT:.config/tether/keys/actor.key"
    assert f"    scp -p {source} {target} && rm {source}" in lines
    assert any(line.startswith("actor car ") for line in lines)
    secrets = [*Path(tmp_path).rglob("*.key")]
    assert len(secrets) == 2 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)
    learner = tmp_path / "keys" / "learner.key"
    before = learner.read_text()
    assert keys.make(["dog"]) and learner.read_text() == before
    assert set(keys.allowed(keys.folder()).values()) == {"car", "dog"}
    with pytest.raises(KeysError, match="car has keys already"):
        keys.make(["car"])
    for name in ("../x", "", "learner", "A b"):
        with pytest.raises(KeysError, match="name is made of"):
            keys.make([name])
    for mode in (0o640, 0o604, 0o660, 0o644):
        learner.chmod(mode)
        with pytest.raises(KeysError, match="can be read by others; say `chmod 600"):
            keys.needed("tcp://0.0.0.0:1", "learner.key")
    learner.chmod(0o600)
    for broken in ("", "[]", "{}", before[:-20], before.replace('"public": "', '"public": " ')):
        learner.write_text(broken)
        with pytest.raises(KeysError, match="is damaged"):
            keys.needed("tcp://0.0.0.0:1", "learner.key")


def test_a_stream_belongs_to_the_key_it_came_with(homes):
    meta = Meta.of("car", "the task", 10, CHANNELS, COMMAND)
    homes("learner")
    learner = LearnerLink("tcp://127.0.0.1:*", meta, {"task": "the task"}, lambda _, first, rows: len(rows), {})
    links = []
    try:
        for name in ("car", "dog"):
            homes(name)
            links.append(ActorLink(learner.address))
            assert links[-1].start(10.0)["task"] == "the task"
        links[0].begin(meta)
        with pytest.raises(WireError, match="cannot go on here"):
            links[1].begin(meta)
        assert learner.status()[meta.stream].owner == "car"
    finally:
        for link in (*links, learner):
            link.close()


def open_learner(stored):
    meta = Meta.of("car", "the task", 10, CHANNELS, COMMAND)

    def journal(meta, first, payloads):
        stored.extend(payloads)
        return len(payloads)

    return meta, LearnerLink("tcp://127.0.0.1:*", meta, {"task": "the task"}, journal, {})


def test_recorded_traffic_that_is_replayed_says_nothing(homes):
    stored, secret = [], b"what the robot saw"
    homes("learner")
    learner = End(zmq.ROUTER, "tcp://127.0.0.1:*")
    proxy = Proxy(learner.pump.address)
    proxy.recorded = []
    homes("car")
    car = End(zmq.DEALER, proxy.address)
    try:
        for _ in range(3):
            car.send(secret)
        assert learner.pump.wait(lambda: len(learner.came) == 3, 10)
        car.pump.close()
        recorded, proxy.recorded = b"".join(proxy.recorded), None
        stored = list(learner.came)
        assert len(recorded) > 500 and secret not in recorded
        host, port = learner.pump.address.removeprefix("tcp://").split(":")
        for part in (recorded, recorded[: len(recorded) // 2], recorded * 2):
            with sockets.create_connection((host, int(port)), timeout=10) as thief, suppress(OSError):
                thief.sendall(part)
                while thief.recv(4096):  # the learner's half of a handshake, and then the end
                    pass
        homes("dog")
        dog = End(zmq.DEALER, learner.pump.address)  # who belongs there is served on
        dog.send(b"me")
        assert learner.pump.wait(lambda: len(learner.came) > 3, 10)
        dog.pump.close()
        assert learner.came[:3] == stored and [peer for peer, _ in learner.came[3:]] == ["dog"]
        assert learner.pump.malformed == 0
    finally:
        proxy.close()
        learner.pump.close()


def test_a_key_lets_its_actor_play_no_other_part(homes):
    """An actor that talks as a learner does, and a learner's key at an actor's place, are not heard."""
    homes("learner")
    stored = []
    meta, learner = open_learner(stored)
    homes("car")
    car = End(zmq.DEALER, learner.address)
    try:
        for kind, body, fields in (
            ("WELCOME", b"", {"stream": meta.stream}), ("REFUSE", b"go away", {}),
            ("ACK", b"", {"seq": 1, "run_until": 9, "weights": 1, "stop": "now"}),
            ("WEIGHTS", b"x", {"version": 1, "offset": 0, "nbytes": 1, "layout": "a" * 64, "sha256": "b" * 64}),
        ):
            car.send(*wire.encode(kind, body, **fields))
        car.send(*wire.encode("HELLO", b"", stream=meta.stream, first=1, next=1))
        assert car.pump.wait(lambda: car.came, 10)
        assert wire.decode(car.came[0][1], "learner").kind == "WELCOME"  # to the last of them
        assert learner._pump.malformed == 4 and learner.status() == {} and stored == []
        homes("learner")
        own = keys._read(keys.folder() / "learner.key")
        context = zmq.Context()
        imposter = context.socket(zmq.DEALER)
        keys.Keys("learner", own.public, own.secret, own.public).lock(imposter)
        monitor = imposter.get_monitor_socket(REFUSED)
        imposter.connect(learner.address)
        assert monitor.poll(10_000), "nothing was refused"
        imposter.disable_monitor()
        context.destroy(0)
    finally:
        car.pump.close()
        learner.close()


def test_a_second_key_cannot_go_on_with_a_stream_or_speak_for_it(homes):
    homes("learner")
    stored = []
    meta, learner = open_learner(stored)
    homes("car")
    first = ActorLink(learner.address)
    homes("dog")
    thief = End(zmq.DEALER, learner.address)
    try:
        first.begin(meta)
        status = {"state": "closed", "spool": 0, "weights": 0, "refused": "", "stats": {}}
        for frames in (
            wire.encode("HELLO", meta.to_json(), stream=meta.stream, first=1, next=1),
            wire.encode("DATA", b"\x91\xc4\x01x", stream=meta.stream, seq=1),
            wire.encode("STATUS", stream=meta.stream, **status),
            wire.encode("WANT", stream=meta.stream, version=1, offset=0),
        ):
            thief.send(*frames)
        assert thief.pump.wait(lambda: len(thief.came) == 4, 10)
        answers = [wire.decode(frames, "learner") for _, frames in thief.came]
        assert [answer.kind for answer in answers] == ["REFUSE"] * 4 and b"cannot go on here" in answers[0].body
        stream = learner.status()[meta.stream]
        assert (stream.owner, stream.expected, stream.report["state"]) == ("car", 1, "run") and stored == []
    finally:
        thief.pump.close()
        first.close()
        learner.close()
