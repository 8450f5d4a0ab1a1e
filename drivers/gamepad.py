"""A gamepad through Linux's joystick interface: 8-byte events, no dependency, works over SSH."""

from __future__ import annotations

import io
import os
import struct

from .base import DriverError, Sticks

EVENT = struct.Struct("<IhBB")  # time ms, value, type, number (linux/joystick.h)
BUTTON, AXIS, INIT = 1, 2, 0x80


class Gamepad:
    """Sticks and buttons of a gamepad that numbers them as Xbox's does."""

    HOW = "right stick ahead and back, left stick left and right, up and down; LB opens, RB closes, A stops"

    LEFT_AXIS, UP_AXIS, AHEAD_AXIS = 0, 1, 4  # all of them are negative to the left and up
    STOP_BUTTON, OPEN_BUTTON, CLOSE_BUTTON = 0, 4, 5

    def __init__(self, path: str = "/dev/input/js0") -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._now: dict[tuple[int, int], int] = {}  # (AXIS or BUTTON, number) -> value

    def open(self) -> None:
        """Raises DriverError when there is no gamepad."""
        try:
            self._file = io.FileIO(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            raise DriverError(
                f"no gamepad at {self._path} ({error.strerror}); plug one in, or use keyboard"
            ) from None

    def read(self) -> Sticks:
        """Where the sticks are, without waiting. Raises DriverError when it is gone."""
        assert self._file is not None, "open() first"
        try:
            while len(event := self._file.read(EVENT.size) or b"") == EVENT.size:
                _, value, kind, number = EVENT.unpack(event)
                self._now[kind & ~INIT, number] = value
        except OSError as error:
            raise DriverError(f"the gamepad at {self._path} is gone ({error.strerror})") from None
        axes = self.AHEAD_AXIS, self.LEFT_AXIS, self.UP_AXIS
        ahead, left, up = (min(max(-self._now.get((AXIS, n), 0) / 32767, -1.0), 1.0) for n in axes)
        buttons = self.OPEN_BUTTON, self.CLOSE_BUTTON, self.STOP_BUTTON
        opens, closes, stop = (bool(self._now.get((BUTTON, n))) for n in buttons)
        return Sticks(ahead, left, up, float(opens - closes), stop)

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()
