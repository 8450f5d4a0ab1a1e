"""What a run says while it trains: `metrics.jsonl`, live progress for a person, TensorBoard where asked for.

Each output has its own thread and a bounded queue: a full disk, a paused terminal or a closed pipe is said
once and loses lines; it never stops or slows the training.
"""

from __future__ import annotations

import json
import math
import queue
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

QUEUE = 10_000  # lines an output may be behind
TTY_EVERY_S, PLAIN_EVERY_S = 0.5, 10.0
RATE_OVER_S = 30.0  # steps/s and updates/s are means over this


class LogError(RuntimeError):
    """An output that was asked for cannot be opened."""


class Log:
    """The outputs of one run. `total` (steps of the whole training) is for the ETA; use from one thread.

    `time_s` in metrics.jsonl is wall-clock since the start of the run and goes on where an earlier process
    of the same run stopped. Without a folder there is progress only. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        folder: str | Path | None,
        total: int = 0,
        stream: TextIO | None = None,
        every_s: float | None = None,
        tensorboard: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._tty = stream.isatty()
        self._every_s = (TTY_EVERY_S if self._tty else PLAIN_EVERY_S) if every_s is None else every_s
        self._total, self._clock = total, clock
        self._records: list[_Outlet] = []
        earlier = 0.0
        if folder is not None:
            earlier = max((float(row.get("time_s") or 0.0) for row in read_metrics(folder)), default=0.0)
            if tensorboard:
                self._records.append(_Outlet("TensorBoard", _Board(Path(folder))))
            self._records.append(_Outlet("metrics.jsonl", _Lines(Path(folder) / "metrics.jsonl")))
        self._screen = _Outlet("progress", _Screen(stream, self._tty))
        self._start = clock() - earlier
        self._shown = -math.inf
        self._newest: dict[str, float] = {}
        self._laps: list[float] = []
        self._past: deque[tuple[float, int, float]] = deque()  # time, step, updates

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics ("area/name": a number); what is not finite becomes null."""
        numbers = {name: float(value) for name, value in values.items()}
        row: dict[str, Any] = {"step": int(step), "time_s": round(self._clock() - self._start, 3)}
        row |= {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        for outlet in self._records:
            outlet.put(row)
        self._newest |= numbers
        if "env/lap_time_s" in numbers:
            self._laps.append(numbers["env/lap_time_s"])

    def show(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Refresh the progress if it is time, which is cheap; `values` are newer than the last written."""
        now = self._clock()
        if now - self._shown < self._every_s:
            return
        self._shown = now
        self._newest |= values or {}
        self._past.append((now, step, self._newest.get("learn/updates", 0.0)))
        while now - self._past[0][0] > RATE_OVER_S and len(self._past) > 2:
            self._past.popleft()
        self._screen.put(("status", self._parts(now, step)))

    def note(self, text: str) -> None:
        """A line that stays: a first lap, a snapshot, an evaluation, a warning."""
        self._screen.put(("note", text))

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything said so far is out; False when an output did not get there in time."""
        marks = [outlet.mark() for outlet in (*self._records, self._screen)]
        return all([mark.wait(timeout) for mark in marks])

    def close(self) -> None:
        """Write what is left and let go. Idempotent; gives an output that hangs a few seconds."""
        for outlet in (*self._records, self._screen):
            outlet.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self, now: float, step: int) -> list[str]:
        """The pieces of the progress line; what is not known yet is left out."""
        of = f"/{self._total:,}" if self._total else ""
        parts = [f"{_duration(now - self._start)}", f"step {step:,}{of}"]
        (then, old_step, old_updates), seen = self._past[0], self._newest
        if now > then:
            rate = (step - old_step) / (now - then)
            parts.append(f"{rate:.3g} steps/s")
            if "learn/updates" in seen:
                parts.append(f"{(seen['learn/updates'] - old_updates) / (now - then):.3g} updates/s")
        for name, form in (
            ("learn/utd", "UTD {:.3g}"),
            ("env/episode_return", "return {:.1f}"),
            ("env/resets", "resets {:.0f}"),
            ("env/interventions", "interventions {:.0f}"),
            ("link/weights_age_s", "weights {:.2g} s old"),
        ):
            if name in seen:
                parts.append(form.format(seen[name]))
        if self._laps:
            best = min(self._laps)
            parts.append(f"lap {self._laps[-1]:.1f} s (best {best:.1f}, {len(self._laps)} laps)")
        if now > then and self._total and rate > 0:
            parts.append(f"ETA {_duration(max(self._total - step, 0) / rate)}")
        return parts


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first; torn or damaged lines are left out."""
    try:
        lines = (Path(run) / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class _Outlet:
    """A thread that writes what is put, one after the other; putting never waits."""

    def __init__(self, name: str, sink: _Lines | _Screen | _Board) -> None:
        self._name, self._sink = name, sink
        self._queue: queue.Queue[Any] = queue.Queue(QUEUE)
        self._lost = False
        self._closed = False
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=f"log {name}", daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._lost = True

    def mark(self) -> threading.Event:
        """An event that is set when everything put before is written."""
        event = threading.Event()
        self.put(event)
        return event

    def close(self, timeout: float = 5.0) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._queue.put(None, timeout=timeout)
            except queue.Full:
                return
            self._thread.join(timeout)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                self._sink.write(item)
            except (OSError, ValueError, RuntimeError) as error:
                self._warn(f"cannot be written ({error}); training goes on without it")
            if self._lost:
                self._warn("is too slow; some of it is lost")
        try:
            self._sink.close()
        except (OSError, ValueError, RuntimeError) as error:
            self._warn(f"was not closed ({error})")

    def _warn(self, text: str) -> None:
        if text not in self._warned and len(self._warned) < 3:
            self._warned.add(text)
            try:
                print(f"warning: {self._name} {text}", file=sys.stderr, flush=True)
            except (OSError, ValueError):
                pass  # standard error is gone too


class _Lines:
    """metrics.jsonl: one JSON object a line, written through to the system line by line."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "ab", buffering=0)  # type: ignore[assignment]
        self._torn = False
        if path.stat().st_size:
            with open(path, "rb") as tail:
                tail.seek(-1, 2)
                self._torn = tail.read(1) != b"\n"  # the process before died in the middle of a line

    def write(self, row: Mapping[str, Any]) -> None:
        payload = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self._torn:
            payload = b"\n" + payload
        self._torn = True  # until all of it is written
        while payload:
            payload = payload[self._file.write(payload) :]
        self._torn = False

    def close(self) -> None:
        self._file.close()


class _Screen:
    """Progress on a terminal (a block that is drawn over) or as plain lines; notes stay above it."""

    def __init__(self, stream: TextIO, tty: bool) -> None:
        self._stream, self._tty = stream, tty
        self._block = ""

    def write(self, item: tuple[str, Any]) -> None:
        kind, content = item
        if not self._tty:
            self._print((" | ".join(content) if kind == "status" else content) + "\n")
            return
        above = self._block.count("\n")
        erase = (f"\x1b[{above}F" if above else "\r") + "\x1b[J"
        if kind == "status":
            self._block = _wrap(content, shutil.get_terminal_size().columns - 1)
            self._print(erase + self._block)
        else:
            self._print(f"{erase}{content}\n{self._block}")

    def close(self) -> None:
        if self._tty and self._block:
            self._print("\n")

    def _print(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


class _Board:
    """TensorBoard event files in the run folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            raise LogError("TensorBoard needs tensorboardX: pip install 'tether[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if "/" in name and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def _wrap(parts: list[str], width: int) -> str:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" | {part}"
        else:
            lines.append(part)
    return "\n".join(line[:width] for line in lines)


def _duration(seconds: float) -> str:
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
