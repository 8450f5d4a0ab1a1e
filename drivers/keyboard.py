"""The keyboard through the terminal: raw mode, no display needed, works over SSH."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from typing import Any

from .base import DriverError, Sticks

HOLD_S = 0.6  # a terminal tells no key-up: a key counts until it has not repeated for this long
KEYS = {
    "w": ("ahead", 1.0), "s": ("ahead", -1.0), "a": ("left", 1.0), "d": ("left", -1.0),
    "\x1b[A": ("ahead", 1.0), "\x1b[B": ("ahead", -1.0), "\x1b[D": ("left", 1.0), "\x1b[C": ("left", -1.0),
    "r": ("up", 1.0), "f": ("up", -1.0), "o": ("grip", 1.0), "c": ("grip", -1.0),
}  # fmt: skip


class Keyboard:
    """Sticks from keys: each is pushed as far as it goes while its key is held."""

    HOW = "w s or arrows ahead and back, a d left and right, r f up and down, o c open and close, q stops"

    def __init__(self, file: int | None = None) -> None:
        self._fd = sys.stdin.fileno() if file is None else file
        self._saved: list[Any] | None = None
        self._held: dict[str, tuple[float, float]] = {}  # axis -> (value, until)

    def open(self) -> None:
        """Raises DriverError when this is not a terminal."""
        if not os.isatty(self._fd):
            raise DriverError("the keyboard needs a terminal; run this in one, or use gamepad or script")
        self._saved = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)

    def read(self) -> Sticks:
        """Which keys are held, without waiting: each pushes its stick as far as it goes."""
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
        return Sticks(**axes, stop="q" in text)

    def close(self) -> None:
        """Give the terminal back as it was. Idempotent."""
        if self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            self._saved = None
