"""The keyboard over a pseudo-terminal and the gamepad over a FIFO: what a hand does, byte by byte."""

from __future__ import annotations

import os
import pty
import select
import termios
from types import SimpleNamespace

import numpy as np
import pytest
from tether.drivers import arm, keyboard
from tether.drivers.base import DriverError, Sticks
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
    "keys, pushed",
    [("w", {"ahead": 1}), ("s", {"ahead": -1}), ("a", {"left": 1}), ("d", {"left": -1}),
     ("wa", {"ahead": 1, "left": 1}), ("\x1b[A\x1b[C", {"ahead": 1, "left": -1}), ("\x1b[B", {"ahead": -1}),
     ("\x1b[D", {"left": 1}), ("xyz", {}), ("r", {"up": 1}), ("f", {"up": -1}), ("o", {"grip": 1}), ("c", {"grip": -1}),
     ("src", {"ahead": -1, "up": 1, "grip": -1})],
)  # fmt: skip
def test_keys_push_sticks(terminal, keys, pushed):
    type_, device, _ = terminal
    device.open()
    assert device.read() == Sticks()
    type_(keys)
    assert device.read() == Sticks(**pushed)


def test_a_key_counts_until_it_has_not_repeated_for_a_while(terminal):
    type_, device, clock = terminal
    device.open()
    type_("w")
    assert device.read() == Sticks(ahead=1)
    clock[0] += 0.9 * HOLD_S
    assert device.read() == Sticks(ahead=1)
    type_("a")  # the other axis does not keep the first alive
    assert device.read() == Sticks(ahead=1, left=1)
    clock[0] += 0.2 * HOLD_S
    assert device.read() == Sticks(left=1)
    clock[0] += HOLD_S
    assert device.read() == Sticks()


def test_the_last_of_two_opposite_keys_counts(terminal):
    type_, device, _ = terminal
    device.open()
    type_("da")
    assert device.read().left == 1
    type_("ad")
    assert device.read().left == -1


def test_q_stops_and_the_terminal_is_given_back(terminal):
    type_, device, _ = terminal
    before = termios.tcgetattr(device._fd)
    device.open()
    assert termios.tcgetattr(device._fd)[3] & termios.ICANON == 0
    type_("wq")
    assert device.read() == Sticks(ahead=1, stop=True)
    device.close()
    device.close()
    assert termios.tcgetattr(device._fd) == before


def test_a_keyboard_needs_a_terminal():
    read, write = os.pipe()
    try:
        with pytest.raises(DriverError, match="needs a terminal.*use gamepad or script"):
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
    assert device.read() == Sticks()
    send(AXIS | INIT, Gamepad.LEFT_AXIS, -32767)  # the driver first tells where everything is
    send(AXIS, Gamepad.AHEAD_AXIS, -32767)  # forward is up is negative
    send(AXIS, 17, 5)
    assert device.read() == Sticks(1, 1)
    assert device.read() == Sticks(1, 1)  # no news: the stick is where it was
    for value in (32767, 16384):  # the newest counts
        send(AXIS, Gamepad.LEFT_AXIS, value)
    assert device.read() == (1, pytest.approx(-0.5, abs=1e-3), 0, 0, False)
    send(BUTTON, Gamepad.STOP_BUTTON, 1)
    assert device.read().stop is True
    send(BUTTON, Gamepad.STOP_BUTTON, 0)
    assert device.read().stop is False


def test_a_gamepad_has_sticks_for_a_tool_and_its_jaws_too(stick):
    send, device = stick
    send(AXIS, Gamepad.UP_AXIS, -32768)  # one further than to the other side
    assert device.read() == Sticks(up=1.0)
    send(AXIS, Gamepad.UP_AXIS, 32767)
    for opens, closes, grip in ((1, 0, 1), (1, 1, 0), (0, 1, -1), (0, 0, 0)):
        send(BUTTON, Gamepad.OPEN_BUTTON, opens)
        send(BUTTON, Gamepad.CLOSE_BUTTON, closes)
        assert device.read() == Sticks(up=-1.0, grip=grip)


def test_no_gamepad_is_one_line_with_a_remedy(tmp_path):
    with pytest.raises(DriverError, match="no gamepad at .*js0 .*use keyboard"):
        Gamepad(str(tmp_path / "js0")).open()


def test_a_gamepad_that_is_gone_is_an_error_and_not_the_last_deflection(stick, monkeypatch):
    send, device = stick
    send(AXIS, Gamepad.AHEAD_AXIS, -32767)
    assert device.read() == Sticks(ahead=1)

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
    drive = by_hand(device, env_of(COMMAND), 1.2)
    send(AXIS, Gamepad.AHEAD_AXIS, -32767)
    send(AXIS, Gamepad.LEFT_AXIS, 32767)
    wish = drive(np.zeros(1), np.zeros(2))
    assert COMMAND.to_command(wish) == pytest.approx([1.2, -0.38], abs=1e-6)
    send(BUTTON, Gamepad.STOP_BUTTON, 1)
    assert drive(np.zeros(1), np.zeros(2)) is None


def env_of(command):
    return SimpleNamespace(command=command, task=SimpleNamespace(spec=SimpleNamespace(hz=10.0)))


def test_sticks_lead_a_tool_from_where_it_was_told_to_be(stick):
    send, device = stick
    drive, told = by_hand(device, env_of(arm.COMMAND), 0.1), np.array([0.2, 0.0, 0.1, 0.4])

    def leads(*changes):
        wish = drive(np.zeros(1), arm.COMMAND.to_action(told))
        return arm.COMMAND.to_command(wish) - told == pytest.approx(changes, abs=1e-6)

    assert leads(0, 0, 0, 0)
    send(AXIS, Gamepad.LEFT_AXIS, -16384)
    assert leads(0, 0.005, 0, 0)
    send(AXIS, Gamepad.LEFT_AXIS, 0)
    send(AXIS, Gamepad.UP_AXIS, 32767)
    send(BUTTON, Gamepad.CLOSE_BUTTON, 1)
    assert leads(0, 0, -0.01, -0.08)
    send(AXIS, Gamepad.AHEAD_AXIS, -32767)  # no faster aslant
    assert leads(0.01 / 2**0.5, 0, -0.01 / 2**0.5, -0.08)
    send(BUTTON, Gamepad.STOP_BUTTON, 1)
    assert drive(np.zeros(1), np.zeros(4)) is None


def test_a_person_leads_a_tool_no_further_than_is_learned_from(stick):
    send, device = stick
    drive, corner = by_hand(device, env_of(arm.COMMAND), 0.1), np.array([1.0, 0.0, -1.01, 0.0])
    send(AXIS, Gamepad.AHEAD_AXIS, -32767)
    wish = drive(np.zeros(1), corner)
    assert wish == pytest.approx(corner)  # and nothing jumps back
    send(AXIS, Gamepad.AHEAD_AXIS, 32767)
    assert drive(np.zeros(1), corner)[0] < 0.95
