"""`tether report`: one HTML page about a run, from its config, metrics and records alone.

No JAX, no MuJoCo: it works on any machine that holds the run folder, also while the run goes on. The page is
`report.html` beside this file with the data put in; it needs nothing else to be looked at.
"""

from __future__ import annotations

import base64
import contextlib
import html
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ..robot_env.gym_env import PREFIX
from ..robot_env.record import SOURCES, SUFFIX, Record, RecordError, read_recording
from ..robot_env.task import TaskError, parse
from . import catalog, config
from .folder import RunError
from .log import read_metrics

TEMPLATE = Path(__file__).with_name("report.html")
MAX_POINTS = 600  # of a curve on the page
MAX_FRAMES = 60_000  # of the replay, 9 bytes each; a longer run keeps its beginning, its end and two laps
MAX_MARKS = 2_000
MAX_RUNS = 20  # lines about disk
CLIP_S = 60.0
RUNNING_S = 90.0  # metrics younger than this: the run is going on
TROUBLE = ("collision", "stuck", "flip")
LEARNER = ("critic_loss", "actor_loss", "entropy", "temperature", "utd", "update_ms")
_UNKNOWN = np.full(4, np.nan)
BREAK = 8  # flag of a frame that does not follow from the one before


def write_report(run: Path, out: Path) -> list[str]:
    """Write the page about `run` to `out`; returns lines to print: what is damaged, and disk per run.

    Raises ConfigError for what is not a run folder and RunError where `out` cannot be written.
    """
    folder = run.resolve()
    data = describe(folder)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(data["title"]), 1)
    _replace(out, page.replace("{{data}}", text, 1))
    return [*(f"warning: {note}" for note in data["notes"]), *disk_lines(folder.parent)]


def disk_lines(parent: Path) -> list[str]:
    """How much disk each run in `parent` takes, a line each, the largest first."""
    runs = [r for r in parent.iterdir() if not r.is_symlink() and (r / "config.toml").is_file()]
    rows = ((_size(r), _size(r / "steps"), _size(r / "snapshots"), r.name) for r in runs)
    sizes = sorted(rows, reverse=True)
    lines = [f"disk: {_bytes(sum(s[0] for s in sizes))} in {len(sizes)} run(s) in {parent}"]
    for total, steps, snapshots, name in sizes[:MAX_RUNS]:
        parts = f"steps {_bytes(steps):>8}  snapshots {_bytes(snapshots):>8}"
        lines.append(f"  {_bytes(total):>8}  {parts}  {name}")
    if rest := [s[0] for s in sizes[MAX_RUNS:]]:
        lines.append(f"  {_bytes(sum(rest)):>8}  in {len(rest)} smaller one(s)")
    return lines


def describe(run: Path) -> dict[str, Any]:
    """Everything the page shows, as JSON-able values. Raises ConfigError for what is not a run folder."""
    settings, facts = config.read(run)
    rows = sorted(read_metrics(run), key=lambda row: row["step"])
    notes: list[str] = []
    drive = read_drive(run / "steps", notes)
    task = str(facts.get("task", ""))
    place = {} if task.startswith(PREFIX) else _map(task, str(facts.get("name")), notes)
    laps = drive.timed_laps(_series(rows, "env/lap_time_s"))
    returns = _series(rows, "env/episode_return") or [(drive.step_at(e[0]), e[1]) for e in drive.episodes]
    steps = max([row["step"] for row in rows] + [drive.steps])
    name, total = str(facts.get("name", "")), settings.learner.steps
    data: dict[str, Any] = {
        "title": f"{run.name} · {name}", "run": run.name, "task": name, "notes": notes, "hz": drive.hz,
        "state": _state(run, steps, total), "steps": steps, "total": total,
        "returns": _returns(returns), "laps": laps, "demo_lap_s": _demonstration(facts.get("prior", ()), run),
        "learn": {n: _pairs(_thin(_series(rows, f"learn/{n}"))) for n in LEARNER},
        "marks": drive.marks_on_page(), "map": place,
    }  # fmt: skip
    data |= {"tiles": _tiles(data, returns, drive), "facts": _facts(settings, facts, rows, steps, drive)}
    return data | drive.film(data["laps"])


# ------------------------------------------------------------------------------------------ records


@dataclass
class _Stream:
    """One actor's records, folded into what the page needs. Frames are its steps, and the last reading."""

    created: str = ""
    hz: float = 0.0
    # x, y, heading, speed, source, version, acted
    frames: list[tuple[float, ...]] = field(default_factory=list)
    episodes: list[tuple[int, float, int]] = field(default_factory=list)  # last frame, return, length
    laps: list[tuple[float, bool, int, int]] = field(default_factory=list)  # s, clean, first frame, end frame
    marks: list[tuple[int, str, bool]] = field(default_factory=list)  # frame, what happened, by hand
    _seq: int = 0
    _tail: tuple[float, ...] | None = None
    _lap: int = -1
    _trouble: tuple[int, str] = (0, "reset")
    _return: float = 0.0
    _length: int = 0

    def push(self, record: Record) -> None:
        """Take the next record; one that was seen already is left out."""
        if record.seq <= self._seq:
            return
        self._seq = record.seq
        acted = record.action is not None
        self._tail = None if acted else self._frame(record)
        if acted:
            self.frames.append(self._frame(record))
            if record.source != "reset":
                self._return += record.reward
                self._length += 1
                trouble = (t for t in TROUBLE if t in record.events)
                self._trouble = len(self.frames) - 1, next(trouble, "reset")
        elif self._length:
            self.episodes.append((len(self.frames) - 1, self._return, self._length))
            self._return, self._length = 0.0, 0
        if "lap_time_s" in record.events:
            clean = bool(record.events.get("lap_clean", 1.0))
            self.laps.append((record.events["lap_time_s"], clean, self._lap, len(self.frames)))
        if "lap_started" in record.events:
            self._lap = len(self.frames)
        if "reset" in record.events:
            self.marks.append((*self._trouble, "intervention" in record.events))

    def close(self) -> None:
        """The stream is over: its last reading is a frame too."""
        if self._tail is not None:
            self.frames.append(self._tail)

    def _frame(self, record: Record) -> tuple[float, ...]:
        pose = record.reading.values.get("pose", _UNKNOWN)
        pose = pose if len(pose) == 4 else _UNKNOWN
        speed = float(np.linalg.norm(record.reading.values.get("velocity", _UNKNOWN)[:2]))
        heading = math.atan2(float(pose[3]), float(pose[2]))
        source, acted = SOURCES.index(record.source), record.action is not None
        return float(pose[0]), float(pose[1]), heading, speed, source, record.version, acted


class Drive:
    """What all actors of a run did, in the order the learner saw it, as far as records tell."""

    def __init__(self, streams: Sequence[_Stream]) -> None:
        streams = sorted((s for s in streams if s.frames), key=lambda s: s.created)
        self.hz = streams[0].hz if streams else 0.0
        starts = np.cumsum([0, *(len(s.frames) for s in streams)]).astype(int)
        table = np.array([frame for s in streams for frame in s.frames], np.float64).reshape(-1, 7)
        self.frames = table[:, :5]
        self.begins = set(starts[:-1].tolist())
        # Actors side by side: the version of the weights they drove with says who came before whom.
        versions = [np.maximum.accumulate(table[a:b, 5]) for a, b in itertools.pairwise(starts)]
        order = np.argsort(np.concatenate([np.zeros(0), *versions]), kind="stable")
        self._steps = np.zeros(len(table), int)
        self._steps[order] = np.cumsum(table[order, 6])
        self.steps = int(table[:, 6].sum())
        at = list(zip(starts[:-1].tolist(), streams, strict=True))
        self.episodes = sorted((o + f, r, n) for o, s in at for f, r, n in s.episodes)
        self.laps = [(t, c, o + a if a >= 0 else -1, o + b) for o, s in at for t, c, a, b in s.laps]
        self.marks = [(o + f, what, hand) for o, s in at for f, what, hand in s.marks]
        self.pushed = float(np.mean(table[:, 4] == SOURCES.index("takeover"))) if len(table) else 0.0

    def step_at(self, frame: int) -> int:
        """The run's step of a frame."""
        return int(self._steps[min(frame, len(self._steps) - 1)])

    def timed_laps(self, logged: Sequence[tuple[int, float]]) -> list[list[Any]]:
        """[step, seconds, clean, first frame or -1, end frame] of the laps; metrics know the step."""
        if not self.laps:
            return [[step, seconds, True, -1, -1] for step, seconds in logged]
        at: dict[float, list[int]] = {}
        for step, seconds in logged:
            at.setdefault(round(seconds, 6), []).append(step)
        laps = []
        for seconds, clean, begin, end in self.laps:
            known = at.get(round(seconds, 6), [])
            step = known.pop(0) if known else self.step_at(end - 1)
            laps.append([step, round(seconds, 3), clean, begin, end])
        return sorted(laps)

    def marks_on_page(self) -> list[list[Any]]:
        """[step, x, y, what happened, by hand] of every reset, evenly thinned."""
        keep = self.marks[:: max(1, -(-len(self.marks) // MAX_MARKS))]
        return [[self.step_at(f), *map(_number, self.frames[f, :2]), what, hand] for f, what, hand in keep]

    def film(self, laps: list[list[Any]]) -> dict[str, Any]:
        """`frames` (base64 columns) and `clips` for the replay; rewrites the laps' frames to the film's."""
        n, hz = len(self.frames), self.hz
        if not n or np.isnan(self.frames[:, 0]).all():
            return {"frames": None, "clips": []}
        best = min((lap for lap in laps if lap[3] >= 0), key=lambda lap: (not lap[2], lap[1]), default=None)
        first = next((lap for lap in laps if lap[3] >= 0), None)
        keep = np.ones(n, bool)
        if n > MAX_FRAMES:
            keep[MAX_FRAMES // 4 : n - MAX_FRAMES // 2] = False
            for lap in filter(None, (first, best)):
                keep[lap[3] : min(lap[4] + 1, lap[3] + MAX_FRAMES // 8)] = True
        index = np.append(np.cumsum(keep) - 1, keep.sum() - 1)
        for lap in laps:
            whole = lap[3] >= 0 and bool(keep[lap[3] : lap[4] + 1].all())
            lap[3:] = [int(index[lap[3]]), int(index[min(lap[4], n - 1)])] if whole else [-1, -1]
        minute, last = round(CLIP_S * hz), int(keep.sum()) - 1
        clips: list[list[Any]] = [["First minute", 0, min(minute, last)]]
        if first and first[3] >= 0:
            clips.append(["First lap", *first[3:]])
        if best and best[3] >= 0 and best is not first:
            clips.append(["Best lap", *best[3:]])
        if self.marks and keep[self.marks[-1][0]]:
            at = int(index[self.marks[-1][0]])
            clips.append(["Last reset", max(0, at - round(3 * hz)), min(last, at + round(9 * hz))])
        clips.append(["Last minute", max(0, last - minute), last])
        return {"frames": self._columns(keep), "clips": clips}

    def _columns(self, keep: np.ndarray) -> dict[str, Any]:
        """The kept frames, quantised: places to 1/65535 of the extent, headings to 1.4 degrees."""
        x, y, heading, speed, source = (_filled(column) for column in self.frames.T)
        jump = np.hypot(np.diff(x, prepend=x[:1]), np.diff(y, prepend=y[:1]))
        apart = jump > 0.5 + 3 * np.maximum(speed, 1.0) / self.hz  # set down by hand, or carried
        apart[list(self.begins)] = True
        kept = np.flatnonzero(keep)
        follows = np.diff(kept, prepend=kept[0] - 1) == 1
        flags = source[kept].astype(int) | np.where(apart[kept] | ~follows, BREAK, 0)
        scale = max(float(np.ptp(x)), float(np.ptp(y)), 1e-3) / 65535
        top = max(float(speed.max()), 0.1)
        begins = np.flatnonzero((flags & BREAK) > 0)
        return {
            "n": len(kept), "scale": scale, "x0": float(x.min()), "y0": float(y.min()), "top": round(top, 3),
            "x": _packed((x[kept] - x.min()) / scale, "<u2"),
            "y": _packed((y[kept] - y.min()) / scale, "<u2"),
            "heading": _packed(heading[kept] / math.tau * 256 % 256, "u1"),
            "speed": _packed(speed[kept] / top * 255, "u1"), "flags": _packed(flags, "u1"),
            "steps": [[int(i), int(self._steps[kept[i]])] for i in begins[:MAX_MARKS]],
        }  # fmt: skip


def read_drive(steps: Path, notes: list[str]) -> Drive:
    """The records of a run's `steps/`, a file at a time; what is damaged goes to `notes` and is left out."""
    streams = []
    damage: list[str] = []
    for sub in sorted(p for p in steps.glob("*") if p.is_dir()):
        stream = _Stream()
        for file in sorted(sub.glob(f"*{SUFFIX}")):
            try:
                meta, records = read_recording(file, damage.append)
                stream.created, stream.hz = stream.created or meta.created, meta.hz
                for record in records:
                    stream.push(record)
            except RecordError as error:
                damage.append(str(error))
        stream.close()
        streams.append(stream)
    if damage:
        notes.append(f"{len(damage)} damaged place(s) in steps/ left out; the first: {damage[0]}")
    return Drive(streams)


def _demonstration(sources: Iterable[Any], run: Path) -> float | None:
    """Median lap of the recordings a run began with, where they are still there; runs do not count."""
    times: list[float] = []
    for source in sources:
        found = next((p / str(source) for p in (Path(), *run.parents) if (p / str(source)).exists()), None)
        if found is None or (found / "steps").is_dir():
            continue
        try:
            _, records = read_recording(found, lambda line: None)
        except RecordError:
            continue
        times += [r.events["lap_time_s"] for r in records if "lap_time_s" in r.events]
    return round(float(np.median(times)), 3) if times else None


# ------------------------------------------------------------------------------------- small things


def _map(text: str, name: str, notes: list[str]) -> dict[str, Any]:
    try:
        spec = parse(text, name, "the run's task")
        walls = catalog.make_task(spec).walls()
    except (TaskError, catalog.CatalogError) as error:
        notes.append(f"no map: {error}")
        return {}
    rings = [np.round(np.asarray(wall)[:, :2], 3).tolist() for wall in walls]
    return {"walls": rings, "checkpoints": [[*c.at[:2], c.radius_m] for c in spec.checkpoints]}


def _series(rows: Iterable[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever the metric is a finite number."""
    found = ((row["step"], row.get(name)) for row in rows)
    return [(s, float(v)) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS: means over stretches of equally many."""
    if len(points) <= MAX_POINTS:
        return list(points)
    parts = np.array_split(np.array(points), MAX_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _pairs(points: Sequence[tuple[float, float]]) -> list[list[float | None]]:
    return [[round(s), _number(v)] for s, v in points]


def _number(value: float) -> float | None:
    """Rounded to five significant digits; what is not finite is None."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _returns(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Returns as they came (thinned to the extremes of stretches) and their trailing mean."""
    if not points:
        return {"raw": [], "smooth": [], "window": 0}
    values = np.array([v for _, v in points])
    window = int(np.clip(len(values) // 15, 5, 200))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    smooth = (sums[end] - sums[begin]) / (end - begin)
    raw = list(points)
    if len(raw) > MAX_POINTS:  # the extremes of every stretch
        parts = np.array_split(np.arange(len(raw)), MAX_POINTS // 2)
        ends = ({int(p[values[p].argmin()]), int(p[values[p].argmax()])} for p in parts)
        raw = [raw[i] for pair in ends for i in sorted(pair)]
    means = [(step, float(mean)) for (step, _), mean in zip(points, smooth, strict=True)]
    return {"raw": _pairs(raw), "smooth": _pairs(_thin(means)), "window": window}


def _state(run: Path, steps: int, total: int) -> str:
    """done, failed: why, running or unfinished."""
    error, metrics = run / "error.txt", run / "metrics.jsonl"
    if steps >= total:
        return "done"
    if error.is_file():
        text = error.read_text(encoding="utf-8", errors="replace").strip()
        return f"failed: {text[text.rfind(chr(10)) + 1 :][:300] or 'see error.txt'}"
    fresh = metrics.is_file() and time.time() - metrics.stat().st_mtime < RUNNING_S
    return "running" if fresh else "unfinished"


def _tiles(data: dict[str, Any], returns: Sequence[tuple[int, float]], drive: Drive) -> list[list[str]]:
    """[label, value, remark] of the figures a person looks for first."""
    tiles, laps, demo = [], data["laps"], data["demo_lap_s"]
    times = [lap[1] for lap in laps if lap[2]]
    if times:
        ratio = f"{min(times) / demo:.2f} × the demonstration" if demo else f"of {len(times)} clean laps"
        first, recent = next(lap for lap in laps if lap[2]), times[-10:]
        tiles += [
            ["best clean lap", f"{min(times):.1f} s", ratio],
            ["median lap", f"{np.median(recent):.1f} s", f"of the last {len(recent)} clean ones"],
            ["first clean lap", f"{first[0]:,}", f"step; it took {first[1]:.1f} s"],
        ]
    if laps or data["map"]:
        tiles.append(["laps", str(len(laps)), f"{len(times)} clean" if laps else "none yet"])
        hands = sum(hand for *_, hand in drive.marks)
        tiles.append(["resets", str(len(drive.marks)), f"{hands} intervention(s)"])
    elif returns:
        values = [v for _, v in returns]
        tiles += [
            ["episodes", f"{len(values):,}", ""],
            ["return", f"{np.mean(values[-10:]):.4g}", f"mean of the last {len(values[-10:])}"],
            ["best return", f"{max(values):.4g}", "one episode"],
        ]
    if drive.pushed:
        tiles.append(["takeovers", f"{100 * drive.pushed:.1f} %", "of all steps"])
    return tiles


def _facts(
    settings: config.Config, facts: dict[str, Any], rows: list[dict[str, Any]], steps: int, drive: Drive
) -> list[list[str]]:
    """[name, value] of what the run was decided by and how far it got."""
    wall, updates, version = (
        max((v for _, v in _series(rows, name)), default=0.0)
        for name in ("time_s", "learn/updates", "link/weights_version")
    )
    table: list[tuple[str, Any]] = [
        ("task", facts.get("name")), ("algorithm", settings.algorithm), ("preset", settings.preset),
        ("seed", facts.get("seed")), ("git", facts.get("git")),
        ("steps", f"{steps:,} of {settings.learner.steps:,}"),
        ("updates", f"{updates:,.0f}"), ("wall-clock", _clock(wall)),
        ("driven", _clock(steps / drive.hz) if drive.hz else ""),
        ("control rate", f"{drive.hz:g} Hz" if drive.hz else ""),
        ("weights", f"version {version:,.0f}" if version else ""),
        ("prior data", ", ".join(map(str, facts.get("prior", ())))), ("started from", facts.get("from")),
    ]  # fmt: skip
    return [[name, str(value)] for name, value in table if value not in (None, "")]


def _clock(seconds: float) -> str:
    """h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def _filled(column: np.ndarray) -> np.ndarray:
    """A column whose missing values are the last good ones (0 where there never was one)."""
    good = np.isfinite(column)
    if not good.any():
        return np.zeros_like(column)
    last = np.maximum.accumulate(np.where(good, np.arange(len(column)), 0))
    return np.where(good[last], column[last], column[good][0])


def _packed(values: np.ndarray, kind: str) -> str:
    top = np.iinfo(np.dtype(kind)).max
    return base64.b64encode(np.clip(np.rint(values), 0, top).astype(kind).tobytes()).decode()


def _replace(out: Path, text: str) -> None:
    """Write beside, then rename: a report that is open stays whole."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        cause = error.strerror or str(error)
        raise RunError(f"{out} cannot be written: {cause}; choose another place with --out") from None


def _size(folder: Path) -> int:
    """Bytes of all files below; those that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
