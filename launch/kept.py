"""The last good weights of a task on the actor's own disk, to drive with while there is no learner.

One file a task, beside its spool: the sha256 of all that follows, then a msgpack map.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack

from . import wire
from .wire import Params, WireError

EVERY_S = 10.0  # between two writes at least: the weights kept may be so much older than the newest
_DIGEST = 32


class Kept:
    """What the learner told an actor last for one task: its orders, and weights that were taken."""

    def __init__(self, folder: Path, task: str) -> None:
        self.path = folder / f"{hashlib.sha256(task.encode()).hexdigest()[:16]}.weights"
        self._task = task
        self._written = -EVERY_S

    def save(self, orders: dict[str, Any], version: int, params: Params) -> None:
        """Put them where the older ones were, if it is time. A disk that cannot take them costs a warning."""
        if time.monotonic() - self._written < EVERY_S:
            return
        self._written = time.monotonic()
        weights = wire.pack_weights(version, params)
        content = msgpack.packb({"protocol": wire.VERSION, "orders": orders, "version": version,
                                 "layout": weights.layout, "sha256": weights.sha256, "data": weights.data})  # fmt: skip
        beside = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            print(f"warning: {self.path}: the weights are not kept: {error.strerror}", file=sys.stderr)

    def load(self) -> tuple[dict[str, Any], int, Params] | None:
        """Orders, version and weights; None where there are none for this task, or what is there is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
                raise WireError("another checksum")
            bounds = {"max_str_len": wire.MAX_BODY, "max_bin_len": wire.MAX_WEIGHTS}
            found = wire.unpack(content[_DIGEST:], dict, **bounds)
            if found["protocol"] != wire.VERSION or found["orders"]["task"] != self._task:
                raise WireError("of another tether, or another task")
            about = {"layout": found["layout"], "sha256": found["sha256"]}
            inbox = wire.Inbox()
            params = inbox.take(found["data"], found["version"], 0, len(found["data"]), **about)
            if params is None:
                raise WireError(inbox.refused)
        except WireError as error:
            print(f"warning: {self.path} is not used: {error}", file=sys.stderr)
            return None
        return found["orders"], found["version"], params
