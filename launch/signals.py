"""What a person's Ctrl-C, or a SIGTERM, does to a process that trains or drives."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _told(tell: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `tell`, and then to whom they went before."""
    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

    with _told(ask):
        yield lambda: asked[0] if asked else cause()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """For imports: what is raised in the middle of one is swallowed, or crashes Python. A signal comes afterwards."""
    came: list[int] = []
    with _told(lambda number, frame: came.append(number)):
        yield
    for number in came[:1]:
        signal.raise_signal(number)
