"""`tether doctor`: ready where all is well, not ready and why where one thing is not; and it changes nothing."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import zmq
from tether.drivers.base import Reading
from tether.drivers.fake import Fake
from tether.launch import catalog, cli, doctor, spool, wire
from tether.launch.transport import NOBODY, LearnerLink
from tether.robot_env.record import encode

from tests.conftest import FAKE, free_address


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty home with `fake.toml`, a short look, and nothing that depends on how busy or full this machine is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TETHER_KEYS", str(tmp_path / "keys"))
    Path("fake.toml").write_text(FAKE)
    for name, value in {"WATCH_S": 0.3, "LATE_SHARE": 1e3, "FREE_SHARE": 0.0, "MEMORY_SHARE": 0.0}.items():
        monkeypatch.setattr(doctor, name, value)


def examined(capsys, *arguments: object) -> tuple[int, dict[str, dict]]:
    """Exit status, and the checks by name; what is printed and the JSON agree."""
    status = cli.main(["doctor", "fake.toml", "--json", *map(str, arguments)])
    *lines, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert set(told) == {"ready", "checks"} and told["ready"] == (status == 0)
    assert all(set(check) == {"name", "value", "limit", "ok"} for check in told["checks"])
    assert told["ready"] == all(check["ok"] for check in told["checks"])
    assert [line[:4].strip() for line in lines[1:-1]] == ["ok" if c["ok"] else "NOT" for c in told["checks"]]
    assert lines[-1].startswith("ready" if told["ready"] else "not ready: ") and len(lines) <= 40  # one screen
    return status, {check["name"]: check for check in told["checks"]}


def bad(checks) -> set[str]:
    if isinstance(checks, dict):
        return {name for name, check in checks.items() if not check["ok"]}
    return {check.name for check in checks if not check.ok}


def test_ready_where_all_is_well_and_nothing_is_changed(capsys, monkeypatch, tmp_path):
    before, closed = sorted(tmp_path.rglob("*")), []
    monkeypatch.setattr(Fake, "write", lambda self, command: pytest.fail("wrote to the robot"))
    monkeypatch.setattr(Fake, "close", lambda self: closed.append(self))
    status, checks = examined(capsys)
    assert status == 0
    for channel in Fake.channels:
        assert checks[f"{channel.name} rate, Hz"]["value"] >= channel.hz
        assert checks[f"{channel.name} age, ms"]["value"] == 0.0
    assert {"values", "loop late p50, ms", "loop late p99, ms", "link", "link round trip p50, ms",
            "link throughput, kB/s", "disk free, run folder", "disk free, spool", "spool, hours of records",
            "clock resolution, ns", "clock", "key files", "versions"} <= set(checks)  # fmt: skip
    for part in ("python 3.", "numpy ", "pyzmq ", "libzmq 4."):
        assert part in checks["versions"]["value"]
    assert sorted(tmp_path.rglob("*")) == before and len(closed) == 1


def test_not_ready_with_a_channel_that_is_off(capsys, monkeypatch):
    read = Fake.read

    def without_pose(self) -> Reading:
        reading = read(self)
        reading.stamps["pose"] = 0.0
        return reading

    monkeypatch.setattr(Fake, "read", without_pose)
    status, checks = examined(capsys)
    assert status == 1 and bad(checks) == {"pose rate, Hz", "pose age, ms"}
    assert checks["pose rate, Hz"]["value"] == 0.0 and "declared 50" in checks["pose rate, Hz"]["limit"]


@pytest.mark.parametrize(
    "kind, seen",
    [("", set()), ("off", {"pose rate, Hz", "pose age, ms"}), ("slow", {"pose rate, Hz", "pose age, ms"}),
     ("delayed", {"pose age, ms"}), ("garbage", {"values"})],
)  # fmt: skip
def test_what_is_wrong_with_a_twins_channel(kind, seen):
    pytest.importorskip("mujoco")
    from tether.sim.car import CarTwin

    robot = CarTwin(seed=1)  # in simulated time
    robot.open()
    if kind:
        robot.fail("pose", kind, 0.5)
        robot.sleep(2.0)
    checks = doctor.channels(robot, 1.0)
    assert bad(checks) == seen and len(checks) == 15
    if kind == "garbage":
        assert checks[-1].value == "not finite: pose"


def test_a_loop_whose_robot_is_slow_to_read_is_late(monkeypatch):
    monkeypatch.setattr(doctor, "LATE_SHARE", 0.25)
    robot = Fake()
    robot.open()
    read = robot.read

    def slowly() -> Reading:
        time.sleep(0.015)
        return read()

    monkeypatch.setattr(robot, "read", slowly)
    assert bad(doctor.lateness(robot, 100.0, 0.1)) == {"loop late p50, ms", "loop late p99, ms"}


def test_not_ready_with_a_loose_key_file(capsys, tmp_path):
    for name in ("learner.key", "actors/dog.key"):
        file = tmp_path / "keys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
    assert examined(capsys)[1]["key files"]["value"].startswith("2 in ")
    file.chmod(0o640)
    status, checks = examined(capsys)
    assert status == 1 and bad(checks) == {"key files"}
    assert checks["key files"]["value"] == "readable by others: actors/dog.key"


def test_a_learner_is_asked_and_nothing_begins_there(capsys):
    spec = catalog.load_spec("fake.toml")
    learner = LearnerLink("tcp://127.0.0.1:*", catalog.stream_meta(spec), {"task": spec.text}, lambda *a: 0, {})
    status, checks = examined(capsys, "--learner", learner.address)
    assert status == 0 and checks["link"]["value"] == learner.address
    assert 0.0 < checks["link round trip p50, ms"]["value"] < 300.0
    assert learner.status() == {}
    learner.close()


def test_not_ready_without_an_answer_of_the_learner(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ANSWER_S", 0.2)
    address = free_address()
    status, checks = examined(capsys, "--learner", address)
    assert status == 1 and bad(checks) == {"link"} and f"no learner at {address}" in checks["link"]["value"]
    elsewhere = examined(capsys, "--learner", "tcp://10.0.0.1:5555")[1]
    assert bad(elsewhere) == {"link"} and "`tether keys NAME`" in elsewhere["link"]["value"]
    nowhere = examined(capsys, "--learner", "here")[1]
    assert "'here' is no address" in nowhere["link"]["value"]


@contextmanager
def raw_learner(serve):
    """The address of a thread that does `serve(socket)`; a receive that waits for 0.1 s raises zmq.Again."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.RCVTIMEO, 100)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    thread = threading.Thread(target=serve, args=(socket,))
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        thread.join()
        socket.close(0)
        context.term()


def test_not_ready_where_the_learner_refuses(capsys):
    def refuse(socket) -> None:
        assert socket.poll(10_000)
        route, *_ = socket.recv_multipart()
        socket.send_multipart([route, *wire.encode("REFUSE", b"another version")])

    with raw_learner(refuse) as address:
        checks = examined(capsys, "--learner", address)[1]
    assert bad(checks) == {"link"} and "refuses: another version" in checks["link"]["value"]


def test_no_more_is_asked_than_a_learner_has_room_to_answer(monkeypatch):
    monkeypatch.setattr(doctor, "ROUND_TRIPS", 2)
    together = []

    def answer_when_it_is_quiet(socket) -> None:
        waiting = []
        while sum(together) < 1 + doctor.ROUND_TRIPS + doctor.BURST:
            with suppress(zmq.Again):
                waiting.append(socket.recv_multipart()[0])
                continue
            together.append(len(waiting))
            while waiting:
                socket.send_multipart([waiting.pop(), *wire.encode("WELCOME", bytes(1000), stream=NOBODY)])

    with raw_learner(answer_when_it_is_quiet) as address:
        checks = doctor.link(address, catalog.stream_meta(catalog.load_spec("fake.toml")))
    assert 1 < max(together) <= doctor.IN_FLIGHT
    trip, rate = checks[1:]
    assert trip.value >= 100.0  # it waited for 0.1 s
    assert 0 < rate.value < doctor.IN_FLIGHT * 1.2 / 0.1  # kB/s, of messages of a little over 1 kB


def test_a_robot_that_cannot_be_opened_is_a_check_like_others(capsys):
    status, checks = examined(capsys, "--real")
    assert status == 1 and bad(checks) == {"robot"} and "no hardware driver" in checks["robot"]["value"]
    assert "link" in checks and "versions" in checks


@pytest.mark.parametrize(
    "where, name, value, seen",
    [(doctor, "FREE_SHARE", 1.1, {"disk free, run folder", "disk free, spool"}),
     (doctor, "MEMORY_SHARE", 1.1, {"memory free"}),
     (spool, "BUDGET", 1000, {"spool, hours of records"}),
     (doctor, "TICK_NS", 0.5, {"clock resolution, ns"}),
     (doctor, "RELEASED", datetime(2999, 1, 1, tzinfo=timezone.utc), {"clock"})],
    ids=["disk", "memory", "spool", "tick", "clock"],
)  # fmt: skip
def test_what_is_wrong_with_the_machine(where, name, value, seen, monkeypatch):
    if name == "MEMORY_SHARE" and not Path("/proc/meminfo").exists():
        pytest.skip("not Linux")
    monkeypatch.setattr(where, name, value)
    assert bad(doctor.host(catalog.stream_meta(catalog.load_spec("fake.toml")))) == seen


def test_a_slow_link_cannot_catch_up(monkeypatch):
    meta = catalog.stream_meta(catalog.load_spec("fake.toml"))
    monkeypatch.setattr(doctor, "CATCH_UP", 1e9)
    assert bad(doctor.link(None, meta)) == {"link throughput, kB/s"}


def test_a_gymnasium_environment_has_no_channels_to_watch(capsys):
    assert cli.main(["doctor", "gym:Pendulum-v1", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    assert checks[0]["name"] == "link"


def test_a_task_that_is_not_there_is_one_line(capsys):
    assert cli.main(["doctor", "nope"]) == 2
    assert "no task 'nope'" in capsys.readouterr().err


def test_the_hours_of_a_spool_are_those_of_its_records(tmp_path):
    spec = catalog.load_spec("fake.toml")
    env, payloads = catalog.make_env(catalog.make_task(spec)), []
    env.on_record.append(lambda record: payloads.append(encode(record)))
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.zeros(2, np.float32))
    env.close()
    meta = catalog.stream_meta(spec)
    assert spool.record_bytes(meta) == pytest.approx(np.mean([len(p) for p in payloads]), rel=0.1)
    fits = spool.PAUSE_AT * spool.BUDGET / spool.record_bytes(meta)  # records
    assert spool.hours(meta, tmp_path / "not" / "yet") == pytest.approx(fits / spec.hz / 3600)
