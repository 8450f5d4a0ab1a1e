"""A gamepad through Linux's joystick interface: 8-byte events, no dependency, works over SSH."""

from __future__ import annotations

import io
import os
import struct

from .base import DriverError

EVENT = struct.Struct("<IhBB")  # time ms, value, type, number (linux/joystick.h)
BUTTON, AXIS, INIT = 1, 2, 0x80


class Gamepad:
    """Left stick steers, right stick forward and back drives, button 0 stops."""

    STEER_AXIS, SPEED_AXIS, STOP_BUTTON = 0, 4, 0

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
                f"no gamepad at {self._path} ({error.strerror}); plug one in, or use --teleop keyboard"
            ) from None

    def read(self) -> tuple[float, float, bool]:
        """(steering -1..1 left positive, speed -1..1, stop) without waiting. Raises DriverError when it is gone."""
        assert self._file is not None, "open() first"
        try:
            while len(event := self._file.read(EVENT.size) or b"") == EVENT.size:
                _, value, kind, number = EVENT.unpack(event)
                self._now[kind & ~INIT, number] = value
        except OSError as error:
            raise DriverError(f"the gamepad at {self._path} is gone ({error.strerror})") from None
        steer, speed = (-self._now.get((AXIS, n), 0) / 32767 for n in (self.STEER_AXIS, self.SPEED_AXIS))
        return steer, speed, bool(self._now.get((BUTTON, self.STOP_BUTTON)))

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()
