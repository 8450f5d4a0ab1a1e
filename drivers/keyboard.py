"""The keyboard through the terminal: raw mode, no display needed, works over SSH."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from typing import Any

from .base import DriverError

HOLD_S = 0.6  # a terminal tells no key-up: a key counts until it has not repeated for this long
KEYS = {
    "w": ("speed", 1.0), "s": ("speed", -1.0), "a": ("steer", 1.0), "d": ("steer", -1.0),
    "\x1b[A": ("speed", 1.0), "\x1b[B": ("speed", -1.0), "\x1b[D": ("steer", 1.0), "\x1b[C": ("steer", -1.0),
}  # fmt: skip


class Keyboard:
    """w/s or up/down drive, a/d or left/right steer, q stops."""

    def __init__(self, file: int | None = None) -> None:
        self._fd = sys.stdin.fileno() if file is None else file
        self._saved: list[Any] | None = None
        self._held: dict[str, tuple[float, float]] = {}  # axis -> (value, until)

    def open(self) -> None:
        """Raises DriverError when this is not a terminal."""
        if not os.isatty(self._fd):
            raise DriverError("the keyboard needs a terminal; run this in one, or use --teleop gamepad or script")
        self._saved = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)

    def read(self) -> tuple[float, float, bool]:
        """(steering -1..1 left positive, speed -1..1, stop) without waiting."""
        text = ""
        while select.select([self._fd], [], [], 0)[0]:
            if not (read := os.read(self._fd, 64)):
                break
            text += read.decode(errors="ignore")
        now = time.monotonic()
        for key in sorted(KEYS, key=text.rfind):  # of two opposite keys the later one counts
            if key in text:
                axis, value = KEYS[key]
                self._held[axis] = (value, now + HOLD_S)
        axes = {axis: value for axis, (value, until) in self._held.items() if now < until}
        return axes.get("steer", 0.0), axes.get("speed", 0.0), "q" in text

    def close(self) -> None:
        """Give the terminal back as it was. Idempotent."""
        if self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            self._saved = None
