"""`tether report`: one HTML page about a run, from its config, metrics and records alone.

No JAX, no MuJoCo: it works on any machine that holds the run folder, also while the run goes on. The page is
`report.html` beside this file with the data put in, which its script counts and draws; it needs nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..robot_env.gym_env import PREFIX
from ..robot_env.record import SOURCES, Record, read_streams
from ..robot_env.task import TaskError
from . import catalog, config
from .config import RunError
from .log import read_metrics

TEMPLATE = Path(__file__).with_name("report.html")
TROUBLE = ("collision", "stuck", "flip", "fall")
UNKNOWN = np.full(4, np.nan)


def write_report(run: Path, out: Path) -> list[str]:
    """Write the page about `run` to `out`; returns lines to print: what is damaged, and disk per run.

    Raises ConfigError for what is not a run folder and RunError where `out` cannot be written.
    """
    folder = run.resolve()
    data = describe(folder)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    try:
        out.write_text(TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}; choose another place with --out") from None
    return [*(f"warning: {note}" for note in data["notes"]), *disk_lines(folder.parent)]


def disk_lines(parent: Path) -> list[str]:
    """How much disk each run in `parent` takes, a line each, the largest first."""
    runs = [r for r in parent.iterdir() if not r.is_symlink() and (r / "config.toml").is_file()]
    sizes = sorted(((_megabytes(r), r) for r in runs), reverse=True)
    lines = [f"disk: {sum(size for size, _ in sizes):.1f} MB in {len(runs)} run(s) in {parent}"]
    for size, run in sizes:
        steps, snapshots = _megabytes(run / "steps"), _megabytes(run / "snapshots")
        lines.append(f"{size:9.1f} MB  (steps {steps:.1f}, snapshots {snapshots:.1f})  {run.name}")
    return lines


def describe(run: Path) -> dict[str, Any]:
    """Everything the page shows, as JSON-able values. Raises ConfigError for what is not a run folder."""
    settings, facts = config.read(run)
    rows = sorted(read_metrics(run), key=lambda row: row["step"])
    error = run / "error.txt"
    notes: list[str] = []
    driven = _driven(run / "steps", notes)
    return driven | {
        "run": run.name,
        "facts": {key: facts.get(key) for key in ("name", "preset", "seed", "git", "prior", "from")},
        "algorithm": settings.algorithm,
        "steps": max([driven["steps"], *(row["step"] for row in rows)]),
        "total": settings.learner.steps,
        "error": error.read_text(encoding="utf-8", errors="replace") if error.is_file() else "",
        "metrics": {name: _series(rows, name) for name in {name for row in rows for name in row}},
        "map": _map(facts, notes),
        "notes": notes,
    }


def _driven(steps: Path, notes: list[str]) -> dict[str, Any]:
    """What all actors did, a frame each record, the actors after one another.

    `frames` is base64 of float32 rows x m, y m, heading rad, speed m/s, source (of SOURCES), step of the run;
    `begins` the first frame of each actor, `laps` [first frame or -1, end frame, s, clean], and `marks` the
    trouble met: [frame, what, set back by hand]. What is damaged goes to `notes` and is left out.
    """
    damage: list[str] = []
    streams = read_streams(steps, damage.append)
    if damage:
        notes.append(f"{len(damage)} damaged place(s) in steps/ left out; the first: {damage[0]}")
    rows: list[tuple[float, ...]] = []
    begins, laps, marks = [], [], []
    for _, records in streams:
        begins.append(len(rows))
        begun = -1
        for following, record in enumerate(records, len(rows) + 1):
            rows.append(_frame(record))
            if "lap_time_s" in record.events:
                clean = bool(record.events.get("lap_clean", 1.0))
                laps.append([begun, following, record.events["lap_time_s"], clean])
            if "lap_started" in record.events:
                begun = following
            if record.source != "reset":
                marks += [[following - 1, what, False] for what in TROUBLE if what in record.events]
            if "intervention" in record.events and marks:
                marks[-1][2] = True
    table = np.array(rows, np.float64).reshape(-1, 7)
    # Actors side by side: the version of the weights they drove with says who came before whom.
    order = np.argsort(table[:, 5], kind="stable")
    table[order, 5] = np.cumsum(table[order, 6])
    seen = bool(np.isfinite(table[:, 0]).any())
    columns = base64.b64encode(table[:, :6].T.astype("<f4").tobytes()).decode() if seen else None
    return {
        "frames": columns, "begins": begins, "laps": laps, "marks": marks,
        "steps": int(table[:, 6].sum()), "hz": streams[0][0].hz if streams else None,
    }  # fmt: skip


def _frame(record: Record) -> tuple[float, ...]:
    """x, y, heading, speed, source, version, acted."""
    pose = record.reading.values.get("pose", UNKNOWN)
    x, y, cos, sin = pose if len(pose) == 4 else UNKNOWN
    speed = float(np.linalg.norm(record.reading.values.get("velocity", UNKNOWN)[:2]))
    source = SOURCES.index(record.source)
    return float(x), float(y), math.atan2(sin, cos), speed, source, record.version, record.action is not None


def _map(facts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Walls and checkpoints, m; none for what is no course or not known here."""
    if facts["task"].startswith(PREFIX):
        return {"walls": [], "checkpoints": []}
    try:
        task = catalog.make_task(catalog.spec_of(facts["task"], facts["name"]))
    except TaskError as error:
        notes.append(f"no map: {error}")
        return {"walls": [], "checkpoints": []}
    walls = [np.round(wall, 3).tolist() for wall in task.walls()]
    places = task.spec.checkpoints if task.spec.kind == "course" else ()
    return {"walls": walls, "checkpoints": [[*c.at[:2], c.radius_m] for c in places]}


def _series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever the metric is a finite number."""
    found = ((row["step"], row.get(name)) for row in rows)
    return [(s, float(v)) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v)]


def _megabytes(folder: Path) -> float:
    """Of all files below; those that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total / 1e6
