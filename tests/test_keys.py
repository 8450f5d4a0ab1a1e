"""Who gets in: keys that are made, kept secret, asked for off loopback, and what happens without the right ones."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import zmq
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import keys, pump
from tether.launch.keys import KeysError
from tether.launch.transport import ActorLink, LearnerLink
from tether.launch.wire import WireError
from tether.robot_env.record import Meta

NOWHERE = re.compile("(?!)")


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
        self.out = [frames for frames in self.out if not self.pump.send(frames)]
        return False

    def send(self, *frames):
        self.out = [*self.out, list(frames)]
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
    monitor = intruder.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
                                          | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED)  # fmt: skip
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
    assert any("carry" in line for line in lines) and any(line.startswith("actor car ") for line in lines)
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
