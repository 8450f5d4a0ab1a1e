"""The flight recorder: the last seconds before an actor failed, as a recording."""

from __future__ import annotations

import numpy as np
from tether.drivers.fake import Fake
from tether.launch import catalog
from tether.launch.flight import KEEP_S, FlightRecorder
from tether.robot_env.record import Record, read_recording
from tether.robot_env.task import parse

from tests.conftest import FAKE

SPEC = parse(FAKE, "fake")


def recorded(flight: FlightRecorder, seconds: float) -> None:
    robot = Fake()
    robot.open()
    for tick in range(round(seconds * 10)):
        action = np.zeros(2, np.float32)
        flight(Record(tick + 1, 0.1 * tick, robot.read(), action, 0.0, False, False, "policy", 0, {}))


def test_it_keeps_the_last_seconds_and_the_traceback(tmp_path):
    flight = FlightRecorder(catalog.stream_meta(SPEC))
    recorded(flight, 60.0)
    try:
        raise RuntimeError("the wheel came off")
    except RuntimeError as error:
        said = flight.save(tmp_path, error)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in said
    _, records = read_recording(folder)
    assert [r.seq for r in records] == list(range(550, 601)) and records[-1].time - records[0].time <= KEEP_S
    text = (folder / "error.txt").read_text()
    assert "the wheel came off" in text and "Traceback" in text


def test_a_full_disk_is_said_and_hides_nothing(tmp_path):
    flight = FlightRecorder(catalog.stream_meta(SPEC))
    recorded(flight, 1.0)
    (tmp_path / "taken").write_text("")
    assert "could not be kept" in flight.save(tmp_path / "taken", RuntimeError())
