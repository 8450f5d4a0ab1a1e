"""Pure parts of `make curves`: figures over seeds, curves on a common grid, and an SVG of them without any library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

POINTS = 100  # of a curve
WINDOW = 0.05  # of a curve's length: it is the mean of the episodes that ended in the window before
COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8a5fbf", "#c98a00", "#3b3b3b", "#00909e", "#a0522d")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 460, 300, 62, 40, 46, 24
LEGEND_LINE = 18


def mean_se(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error over seeds; of one seed there is no error, of none no mean."""
    known = [float(v) for v in values if v is not None]
    if not known:
        return None, None
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return float(np.mean(known)), error


def last_tenth(episodes: Sequence[Sequence[float]], steps: int) -> float | None:
    """Mean return of the episodes (step, time_s, return) that ended in the last 10 % of the steps."""
    late = [episode[2] for episode in episodes if episode[0] > 0.9 * steps]
    return float(np.mean(late)) if late else None


def on_grid(x: Sequence[float], y: Sequence[float], grid: np.ndarray, window: float) -> np.ndarray:
    """At each point of the grid the mean of y over the window before it, or where it is empty the last y before it;
    NaN before the first. `x` ascends."""
    at, values = np.asarray(x, float), np.asarray(y, float)
    out = np.full(len(grid), np.nan)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for i, end in enumerate(np.searchsorted(at, grid, side="right")):
        if end:
            begin = min(int(np.searchsorted(at, grid[i] - window, side="right")), int(end) - 1)
            out[i] = (sums[end] - sums[begin]) / (end - begin)
    return out


def band(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest of the seeds' curves, where all of them have a value."""
    table = np.array(curves)
    table[:, np.isnan(table).any(axis=0)] = np.nan
    return table.mean(axis=0), table.min(axis=0), table.max(axis=0)


def curves(groups: dict[str, list[dict[str, Any]]], column: int, scale: float) -> list[dict[str, Any]]:
    """For each group of seeds' results its band against `column` of the episodes (0 steps, 1 seconds) times `scale`.

    A band ends where its first seed ends: beyond, it would be the mean of fewer.
    """
    ends = {
        name: min((r["episodes"][-1][column] * scale for r in results if r["episodes"]), default=0.0)
        for name, results in groups.items()
    }
    out = []
    for name, results in groups.items():
        if ends[name] > 0 and all(r["episodes"] for r in results):
            grid = np.linspace(0.0, ends[name], POINTS + 1)[1:]
            rows = [np.array(r["episodes"], float) for r in results]
            found = [on_grid(row[:, column] * scale, row[:, 2], grid, WINDOW * ends[name]) for row in rows]
            out.append({"name": name, "x": grid, "seeds": len(results), "bands": band(found)})
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    size *= next(m for m in (1, 2, 5, 10) if m * size >= 0.75 * raw)
    return [n * size for n in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's text."""
    return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k" if abs(value) >= 1e4 else f"{value:g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>{escape(text)}</text>'


def _axes(left: float, size: tuple[float, float, float], label: str) -> list[str]:
    """Grid lines and their numbers of one panel; `size`: the ends of x, and of y."""
    x_max, low, high = size
    out = []
    for value in ticks(low, high):
        y = TOP + (high - value) / (high - low) * HEIGHT
        out.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(_text(left - 6, y + 4, number(value), "end"))
    for value in ticks(0.0, x_max):
        out.append(_text(left + value / x_max * WIDTH, TOP + HEIGHT + 18, number(value)))
    out.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888888"/>')
    out.append(_text(left + WIDTH / 2, TOP + HEIGHT + 38, label))
    return out


def _panel(left: float, label: str, drawn: list[dict[str, Any]], colours: dict[str, str]) -> list[str]:
    """One panel: axes, and of each curve the band of its seeds below its mean."""
    if not drawn:
        return [_text(left + WIDTH / 2, TOP + HEIGHT / 2, "no episode has ended yet")]
    ends = np.concatenate([edge for curve in drawn for edge in curve["bands"]])
    x_max = max(float(curve["x"][-1]) for curve in drawn)
    low, high = (float(f(ends)) for f in (np.nanmin, np.nanmax)) if np.isfinite(ends).any() else (0.0, 1.0)
    room = 0.04 * (high - low) or max(1.0, abs(high)) * 0.1
    low, high = low - room, high + room

    def place(x: np.ndarray, y: np.ndarray) -> list[str]:
        across, down = left + x / x_max * WIDTH, TOP + (high - y) / (high - low) * HEIGHT
        return [f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True)]

    out = _axes(left, (x_max, low, high), label)
    for curve in drawn:
        mean, lowest, highest = curve["bands"]
        seen = np.isfinite(mean)
        x, colour = curve["x"][seen], colours[curve["name"]]
        if curve["seeds"] > 1:
            outline = " ".join([*place(x, lowest[seen]), *reversed(place(x, highest[seen]))])
            out.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.15" stroke="none"/>')
        line = " ".join(place(x, mean[seen]))
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return out


def svg(title: str, groups: dict[str, list[dict[str, Any]]]) -> str:
    """Training returns of all groups of seeds, against steps and against minutes, with a legend."""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}
    right = 2 * LEFT + WIDTH + GAP
    below = TOP + HEIGHT + BOTTOM
    width, height = right + WIDTH + GAP, below + LEGEND_LINE * (len(groups) + 1) + 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    out = [f'{head} font-family="sans-serif" fill="#222222">', f"<title>{escape(title)}</title>"]
    out.append('<rect width="100%" height="100%" fill="#ffffff"/>')
    out.append(_text(LEFT, 24, title, "start", 15, 'font-weight="bold"'))
    out += _panel(LEFT, "steps", curves(groups, 0, 1.0), colours)
    out += _panel(right, "wall-clock, minutes", curves(groups, 1, 1 / 60), colours)
    for i, (name, results) in enumerate(groups.items()):
        y = below + LEGEND_LINE * (i + 1)
        line = f'<line x1="{LEFT}" x2="{LEFT + 24}" y1="{y - 4}" y2="{y - 4}"'
        out.append(f'{line} stroke="{colours[name]}" stroke-width="3"/>')
        seeds = f"{len(results)} seed{'s' if len(results) > 1 else ''}"
        out.append(_text(LEFT + 32, y, f"{name} ({seeds})", "start"))
    said = "line: mean over seeds of the training episodes' returns; band: lowest to highest seed"
    out.append(_text(width - GAP, below + LEGEND_LINE, said, "end", 11))
    return "\n".join([*out, "</svg>", ""])
