"""What a person's Ctrl-C, or a SIGTERM, does to a process that trains or drives."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stoppable(cause: Callable[[], str]) -> Iterator[Callable[[], str]]:
    """Gives `stopped()`, to be looked at between steps: why to end (SIGINT, SIGTERM or what `cause()` says), or "".

    Meanwhile a first signal asks for a clean end, and a second one ends at once.
    """
    asked: list[str] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0] if asked else cause()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """For imports: in the middle of one a signal is swallowed or crashes the interpreter. It comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
