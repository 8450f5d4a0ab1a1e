"""The keyboard over a pseudo-terminal and the gamepad over a FIFO: what a hand does, byte by byte."""

from __future__ import annotations

import os
import pty
import select
import termios

import numpy as np
import pytest
from tether.drivers import keyboard
from tether.drivers.base import DriverError
from tether.drivers.fake import COMMAND
from tether.drivers.gamepad import AXIS, BUTTON, EVENT, INIT, Gamepad
from tether.drivers.keyboard import HOLD_S, Keyboard
from tether.launch.teach import by_hand

# --- keyboard


@pytest.fixture
def terminal(monkeypatch):
    """(type, keyboard, clock): `type(text)` returns when the keyboard's end has it."""
    master, slave = pty.openpty()
    clock = [100.0]
    monkeypatch.setattr(keyboard.time, "monotonic", lambda: clock[0])
    device = Keyboard(slave)

    def type_(text: str) -> None:
        os.write(master, text.encode())
        assert select.select([slave], [], [], 10)[0]

    yield type_, device, clock
    device.close()
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    "keys, steer, speed",
    [("w", 0, 1), ("s", 0, -1), ("a", 1, 0), ("d", -1, 0), ("wa", 1, 1),
     ("\x1b[A\x1b[C", -1, 1), ("\x1b[B", 0, -1), ("\x1b[D", 1, 0), ("xyz", 0, 0)],
)  # fmt: skip
def test_keys_drive_and_steer(terminal, keys, steer, speed):
    type_, device, _ = terminal
    device.open()
    assert device.read() == (0.0, 0.0, False)
    type_(keys)
    assert device.read() == (steer, speed, False)


def test_a_key_counts_until_it_has_not_repeated_for_a_while(terminal):
    type_, device, clock = terminal
    device.open()
    type_("w")
    assert device.read() == (0, 1, False)
    clock[0] += 0.9 * HOLD_S
    assert device.read() == (0, 1, False)
    type_("a")  # the other axis does not keep the first alive
    assert device.read() == (1, 1, False)
    clock[0] += 0.2 * HOLD_S
    assert device.read() == (1, 0, False)
    clock[0] += HOLD_S
    assert device.read() == (0, 0, False)


def test_the_last_of_two_opposite_keys_counts(terminal):
    type_, device, _ = terminal
    device.open()
    type_("da")
    assert device.read()[0] == 1
    type_("ad")
    assert device.read()[0] == -1


def test_q_stops_and_the_terminal_is_given_back(terminal):
    type_, device, _ = terminal
    before = termios.tcgetattr(device._fd)
    device.open()
    assert termios.tcgetattr(device._fd)[3] & termios.ICANON == 0
    type_("wq")
    assert device.read() == (0, 1, True)
    device.close()
    device.close()
    assert termios.tcgetattr(device._fd) == before


def test_a_keyboard_needs_a_terminal():
    read, write = os.pipe()
    try:
        with pytest.raises(DriverError, match="needs a terminal.*--teleop gamepad or script"):
            Keyboard(read).open()
    finally:
        os.close(read)
        os.close(write)


# --- gamepad


@pytest.fixture
def stick(tmp_path):
    """(send, gamepad) over a FIFO: `send(kind, number, value)`."""
    path = tmp_path / "js0"
    os.mkfifo(path)
    device = Gamepad(str(path))
    device.open()
    file = os.open(path, os.O_WRONLY)
    yield lambda kind, number, value: os.write(file, EVENT.pack(1, value, kind, number)), device
    device.close()
    os.close(file)


def test_axes_and_buttons(stick):
    send, device = stick
    assert device.read() == (0, 0, False)
    send(AXIS | INIT, Gamepad.STEER_AXIS, -32767)  # the driver first tells where everything is
    send(AXIS, Gamepad.SPEED_AXIS, -32767)  # forward is up is negative
    send(AXIS, 17, 5)
    assert device.read() == (1, 1, False)
    assert device.read() == (1, 1, False)  # no news: the stick is where it was
    for value in (32767, 16384):  # the newest counts
        send(AXIS, Gamepad.STEER_AXIS, value)
    assert device.read() == (pytest.approx(-0.5, abs=1e-3), 1, False)
    send(BUTTON, Gamepad.STOP_BUTTON, 1)
    assert device.read()[2] is True
    send(BUTTON, Gamepad.STOP_BUTTON, 0)
    assert device.read()[2] is False


def test_no_gamepad_is_one_line_with_a_remedy(tmp_path):
    with pytest.raises(DriverError, match="no gamepad at .*js0 .*--teleop keyboard"):
        Gamepad(str(tmp_path / "js0")).open()


def test_a_gamepad_that_is_gone_is_an_error_and_not_the_last_deflection(stick, monkeypatch):
    send, device = stick
    send(AXIS, Gamepad.SPEED_AXIS, -32767)
    assert device.read() == (0, 1, False)

    class Unplugged:
        def read(self, size):
            raise OSError(19, "No such device")

    monkeypatch.setattr(device, "_file", Unplugged())
    with pytest.raises(DriverError, match="gone"):
        device.read()


def test_closing_twice_is_fine(stick):
    _, device = stick
    device.close()
    device.close()


def test_full_deflection_means_the_speed_asked_for(stick):
    send, device = stick

    class Env:
        command = COMMAND

    drive = by_hand(device, Env, 1.2)
    send(AXIS, Gamepad.SPEED_AXIS, -32767)
    send(AXIS, Gamepad.STEER_AXIS, 32767)
    wish = drive(np.zeros(1), np.zeros(2))
    assert COMMAND.to_command(wish) == pytest.approx([1.2, -0.38], abs=1e-6)
    send(BUTTON, Gamepad.STOP_BUTTON, 1)
    assert drive(np.zeros(1), np.zeros(2)) is None
