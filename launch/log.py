"""What a run says while it trains: `metrics.jsonl`, live progress for a person, TensorBoard where asked for.

A full disk or a closed terminal is said once and loses lines; it never ends the training.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

TTY_EVERY_S, PLAIN_EVERY_S = 0.5, 10.0
RATE_OVER = 20  # steps/s and updates/s are means over this many refreshes
SHARE_OVER = 20  # and what is taken over of so many episodes
SHOWN = {
    "learn/utd": "UTD {:.3g}",
    "env/episode_return": "return {:.1f}",
    "env/speed_mps": "{:.2f} m/s",
    "env/resets": "resets {:.0f}",
    "env/interventions": "interventions {:.0f}",
    "link/weights_age_s": "weights {:.2g} s old",
}


class Log:
    """The outputs of the run in `folder`. `total` (steps of the whole training) is for the ETA; use from one thread.

    `time_s` in metrics.jsonl is wall-clock since the start of the run and goes on where an earlier process
    of the same run stopped. Close it.
    """

    def __init__(
        self, folder: Path, total: int = 0, stream: TextIO | None = None, tensorboard: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._every_s = TTY_EVERY_S if self._tty else PLAIN_EVERY_S
        spent_s = max((float(row.get("time_s") or 0.0) for row in read_metrics(folder)), default=0.0)
        self._total, self._clock, self._start = total, clock, clock() - spent_s
        self._board = _board(folder) if tensorboard else None
        self._file = open(folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
        self._shown = -math.inf
        self._block = ""  # what of the terminal is drawn over next time
        self._failed: set[str] = set()
        self._newest: dict[str, float] = {}
        self._laps: list[float] = []
        self._taken: deque[float] = deque(maxlen=SHARE_OVER)  # shares of episodes, from the first takeover on
        self._past: deque[tuple[float, int, float]] = deque(maxlen=RATE_OVER)  # time, step, updates

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics ("area/name": a number); what is not finite becomes null."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._newest |= finite
        if "env/lap_time_s" in finite:
            self._laps.append(finite["env/lap_time_s"])
        if "env/takeovers" in finite and (finite["env/takeovers"] or self._taken):
            self._taken.append(finite["env/takeovers"])
        row = {"step": int(step), "time_s": round(self._clock() - self._start, 3)}
        line = json.dumps(row | dict.fromkeys(values) | finite)
        self._try("metrics.jsonl", self._file.write, line + "\n")
        if self._board:
            for name, value in finite.items():
                self._try("TensorBoard", self._board.add_scalar, name, value, int(step))

    def show(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Refresh the progress if it is time, which is cheap; `values` are newer than the last written."""
        now = self._clock()
        if now - self._shown < self._every_s:
            return
        self._shown = now
        self._newest |= values or {}
        self._past.append((now, step, self._newest.get("learn/updates", 0.0)))
        text = " | ".join(self._parts(now, step))
        if not self._tty:
            self.note(text)
            return
        erase, self._block = self._erase(), textwrap.fill(text, shutil.get_terminal_size().columns - 1)
        self._say(erase + self._block)

    def note(self, text: str) -> None:
        """A line that stays: a first lap, a snapshot, an evaluation, a warning."""
        self._say(f"{self._erase()}{text}\n{self._block}")

    def close(self) -> None:
        """Let go of the outputs. Idempotent."""
        if self._block:
            self._block = ""
            self._say("\n")
        for output in filter(None, (self._file, self._board)):
            self._try("the end of the metrics", output.close)

    def _parts(self, now: float, step: int) -> list[str]:
        """The pieces of the progress line; what is not known yet is left out."""
        of = f"/{self._total:,}" if self._total else ""
        parts = [_clock(now - self._start), f"step {step:,}{of}"]
        (then, old_step, old_updates), seen = self._past[0], self._newest
        rate = (step - old_step) / max(now - then, 1e-9)
        if now > then:
            updates = (seen.get("learn/updates", 0.0) - old_updates) / (now - then)
            parts += [f"{rate:.3g} steps/s", f"{updates:.3g} updates/s"]
        parts += [form.format(seen[name]) for name, form in SHOWN.items() if name in seen]
        if self._taken:
            parts.append(f"taken over {sum(self._taken) / len(self._taken):.0%}")
        if self._laps:
            best = min(self._laps)
            parts.append(f"lap {self._laps[-1]:.1f} s (best {best:.1f}, {len(self._laps)} laps)")
        if self._total and rate > 0:
            parts.append(f"ETA {_clock((self._total - step) / rate)}")
        return parts

    def _erase(self) -> str:
        """What takes the drawn block off a terminal."""
        above = self._block.count("\n")
        return ((f"\x1b[{above}F" if above else "\r") + "\x1b[J") if self._block else ""

    def _say(self, text: str) -> None:
        self._try("progress", self._stream.write, text)
        self._try("progress", self._stream.flush)

    def _try(self, output: str, call: Callable[..., Any], *arguments: Any) -> None:
        """Write, or warn once that this output is lost."""
        try:
            call(*arguments)
        except (OSError, ValueError) as error:
            if output not in self._failed:
                self._failed.add(output)
                self._say(f"warning: {output} cannot be written ({error}); training goes on without it\n")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first; torn or damaged lines are left out."""
    path, rows = Path(run) / "metrics.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _board(folder: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(int(seconds), 0)))
