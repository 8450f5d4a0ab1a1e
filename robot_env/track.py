"""Geometry of a course: centre lines, walls, the lap in a recording, checkpoints, projection. Pure functions.

Lengths in m, map frame. A closed line does not repeat its first point.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_CSV_BYTES = 8_000_000
MAX_POINTS = 50_000
APART_M = 10.0  # stretches further apart than this along the track may not be joined (task-file contract)
CELL_M = 0.04  # grid of the distance field the walls are traced on
THIN_M = 0.02  # less than this between two walls is no room for them
MAX_NODES = 16_000_000
SIMPLIFY_M = 0.01  # walls are thinned to this tolerance
HEADING_M = 0.2
STEP_M = 0.25  # spacing of a lap line
SMOOTH_M = 0.75  # half width of the smoothing of a driven lap
LAP_M = 5.0  # shorter is no lap
MAX_STARTS = 4000  # positions a lap is looked for from; so far ahead, too, in steps of STEP_M
CHECKPOINTS = (4, 8)  # fewest and most that are chosen; FastRLAP and RACER ran 3-6 (systems.md 1.5)
RADIUS_M = 1.0  # of a checkpoint where no width is known (RACER's default)
MARGIN_M = 0.25  # a checkpoint reaches this far beyond the walls, so that it cannot be driven past


class TrackError(ValueError):
    """A track that cannot be used: the message says where, why and what to do."""


@dataclass(frozen=True, eq=False)
class Line:
    """A polyline to be followed, with what projection needs computed once. Build with `from_points`."""

    points: np.ndarray  # (n, 2) m
    loop: bool
    along: np.ndarray  # (n,) m, travelled at each point; n segments in a loop, else n - 1
    length: float  # m, closing segment included in a loop
    _segments: np.ndarray  # (6, segments): start x, y, vector x, y, length, 1 / length^2

    @classmethod
    def from_points(cls, points: np.ndarray, loop: bool) -> Line:
        """A line through (n, 2) points; repeated points are dropped. Raises TrackError below 2 points."""
        points = _distinct(points, loop)
        ends = np.roll(points, -1, axis=0) if loop else points[1:]
        vectors = ends - points[: len(ends)]
        lengths = np.hypot(vectors[:, 0], vectors[:, 1])
        along = np.concatenate(([0.0], np.cumsum(lengths)))
        segments = np.vstack((points[: len(ends)].T, vectors.T, lengths, 1.0 / lengths**2))
        return cls(points, loop, along[: len(points)], float(along[-1]), segments)

    def at(self, s: float | np.ndarray) -> np.ndarray:
        """(..., 2) point at `s` m along; a loop wraps round, an open line stops at its ends."""
        index, t = self._locate(s)
        vector = self._segments[2:4].T[index]
        return self.points[index] + (t * vector if isinstance(t, float) else t[..., None] * vector)

    def heading(self, s: float | np.ndarray) -> np.ndarray:
        """(...) rad, direction of travel at `s` m: the chord from HEADING_M behind to HEADING_M ahead."""
        # a hair less behind, so that a turn on the spot has the direction it leaves in
        chord = self.at(s + HEADING_M) - self.at(s - HEADING_M + 1e-6)
        return np.arctan2(chord[..., 1], chord[..., 0])

    def project(
        self, point: np.ndarray | tuple[float, float], near: int | None = None, window_m: float = 2.0
    ) -> tuple[float, float, int]:
        """The nearest point of the line: (m along, m to the left of it, index of its segment).

        With `near`, an index returned before, only segments within `window_m` along of it are looked at.
        """
        px, py = float(point[0]), float(point[1])
        x, y, dx, dy, length, inverse = self._segments
        ex, ey = px - x, py - y
        t = (ex * dx + ey * dy) * inverse
        t = np.minimum(np.maximum(t, 0.0), 1.0)
        fx, fy = ex - t * dx, ey - t * dy
        square = fx * fx + fy * fy
        if near is not None:
            square = np.where(self._within(near, window_m), square, np.inf)
        i = int(square.argmin())
        left = dx[i] * ey[i] - dy[i] * ex[i]
        s = float(self.along[i] + t[i] * length[i])
        return s % self.length if self.loop else s, math.copysign(math.sqrt(square[i]), left), i

    def _within(self, near: int, window_m: float) -> np.ndarray:
        length = self._segments[4]
        middle = self.along[: len(length)] + length / 2
        apart = np.abs(middle - middle[near])
        if self.loop:
            apart = np.minimum(apart, self.length - apart)
        return apart <= window_m + (length + length[near]) / 2

    def _locate(self, s: float | np.ndarray) -> tuple[int | np.ndarray, float | np.ndarray]:
        """Segment and share of it; plain numbers for a plain number, which is ten times as fast."""
        lengths = self._segments[4]
        if isinstance(s, (float, int)):
            s = float(s % self.length if self.loop else min(max(s, 0.0), self.length))
            i = min(bisect_right(self.along, s), len(lengths)) - 1
            return i, float(min((s - self.along[i]) / lengths[i], 1.0))
        s = np.asarray(s, np.float64)
        s = s % self.length if self.loop else np.clip(s, 0.0, self.length)
        index = np.minimum(np.searchsorted(self.along, s, side="right"), len(lengths)) - 1
        return index, np.minimum((s - self.along[index]) / lengths[index], 1.0)


def read_csv(
    path: str | Path, length_m: float | None = None, width_m: float | None = None
) -> tuple[np.ndarray, float]:
    """A centre line (n, 2) and its width from a race-track CSV, as `x_m, y_m, w_tr_right_m, w_tr_left_m`.

    Scaled so that the closed line is `length_m` long; the width is the scaled median unless given.
    Raises TrackError with file, line, cause and remedy.
    """
    for name, value in (("length", length_m), ("width", width_m)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise TrackError(f"{path}: the {name} must be a positive number of metres, not {value}")
    rows = _csv_rows(Path(path), widths=width_m is None)
    points = rows[:, :2]
    keep = np.concatenate(([True], np.any(np.diff(points, axis=0) != 0, axis=1)))
    keep[-1] &= bool(np.any(points[-1] != points[0]))  # some files repeat the first point
    points = points[keep]
    if len(points) < 4:
        raise TrackError(f"{path}: {len(points)} different points; a closed track needs at least 4")
    scale = 1.0 if length_m is None else length_m / Line.from_points(points, True).length
    return points * scale, width_m or float(np.median(rows[:, 2:].sum(axis=1))) * scale


def _csv_rows(path: Path, widths: bool) -> np.ndarray:
    """(n, 4) x, y, right, left, or (n, 2) without widths."""
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise TrackError(f"{path}: larger than {MAX_CSV_BYTES} bytes; this is not a centre line")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise TrackError(f"{path}: not found; give the path of a centre-line CSV") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrackError(f"{path}: cannot be read as text: {error}") from None
    names = ["x_m", "y_m"] + ["w_tr_right_m", "w_tr_left_m"] * widths
    columns: list[int] | None = None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        cells = [c.strip() for c in line.lstrip("# \t").split(",")]
        if columns is None and set(names[:2]) & set(cells):
            missing = [n for n in names if n not in cells]
            if missing:
                hint = "" if set(missing) & set(names[:2]) else ", or give --width"
                raise TrackError(f"{path}:{number}: no column {', '.join(missing)}; add it{hint}")
            columns = [cells.index(n) for n in names]
        elif line.strip() and not line.lstrip().startswith("#"):
            if columns is None:
                raise TrackError(f"{path}:{number}: begin with '# x_m,y_m,w_tr_right_m,w_tr_left_m'")
            if len(rows) >= MAX_POINTS:
                raise TrackError(f"{path}:{number}: more than {MAX_POINTS} points; keep every tenth")
            rows.append(_csv_row(cells, columns, names, f"{path}:{number}"))
    if len(rows) < 4:
        raise TrackError(f"{path}: {len(rows)} points; a closed track needs at least 4")
    return np.array(rows)


def _csv_row(cells: list[str], columns: list[int], names: list[str], where: str) -> list[float]:
    row = []
    for column, name in zip(columns, names, strict=True):
        if column >= len(cells):
            raise TrackError(f"{where}: {len(cells)} columns, {name} is missing; complete or delete the line")
        try:
            value = float(cells[column])
        except ValueError:
            raise TrackError(f"{where}: {name} = {cells[column]!r} is not a number; correct it") from None
        low = -1e6 if name in ("x_m", "y_m") else 0.0
        if not low <= value <= 1e6:
            raise TrackError(f"{where}: {name} = {cells[column]} is not in {low:g} ... 1e6; correct it")
        row.append(value)
    return row


def resample(polyline: np.ndarray, spacing: float, loop: bool) -> np.ndarray:
    """(m, 2) evenly spaced points of a smooth curve through (n, 2): Catmull-Rom over chord lengths."""
    points = _distinct(polyline, loop)
    line = Line.from_points(points, loop)
    if len(points) > 2:
        line = Line.from_points(_cubic(line, spacing), loop)
    count = max(3 if loop else 1, round(line.length / spacing))
    return line.at(np.linspace(0.0, line.length, count + (not loop), endpoint=not loop))


def _cubic(line: Line, spacing: float) -> np.ndarray:
    _, _, dx, dy, length, _ = line._segments
    h = length[:, None]
    vectors = np.stack((dx, dy), axis=1)
    if line.loop:
        tangents = (vectors + np.roll(vectors, 1, axis=0)) / (h + np.roll(h, 1, axis=0))
        p1, m1 = np.roll(line.points, -1, axis=0), np.roll(tangents, -1, axis=0)
    else:
        inner = (vectors[1:] + vectors[:-1]) / (h[1:] + h[:-1])
        tangents = np.vstack((vectors[:1] / h[:1], inner, vectors[-1:] / h[-1:]))
        p1, m1 = line.points[1:], tangents[1:]
    p0, m0 = line.points[: len(p1)], tangents[: len(p1)]
    pieces = int(np.clip(math.ceil(4 * length.max() / spacing), 4, 64))
    t = (np.arange(pieces) / pieces)[None, :, None]
    a, b, c, d = 2 * t**3 - 3 * t**2 + 1, t**3 - 2 * t**2 + t, 3 * t**2 - 2 * t**3, t**3 - t**2
    m0, m1 = (m0 * h)[:, None], (m1 * h)[:, None]
    dense = (a * p0[:, None] + b * m0 + c * p1[:, None] + d * m1).reshape(-1, 2)
    return dense if line.loop else np.vstack((dense, p1[-1:]))


def walls(centerline: np.ndarray, width_m: float, loop: bool = True) -> list[np.ndarray]:
    """Closed polylines (k, 2) around the union of discs of radius `width_m` / 2 along (n, 2), longest first.

    Raises TrackError where that corridor joins stretches more than 10 m apart along the track.
    """
    if not (math.isfinite(width_m) and width_m > 0):
        raise TrackError(f"the width of a course must be a positive number of metres, not {width_m}")
    line = Line.from_points(centerline, loop)
    radius = width_m / 2
    low = line.points.min(axis=0) - radius
    extent = line.points.max(axis=0) + radius - low
    between = _refuse_joined(line, width_m)
    cell = max(min(CELL_M, radius / 8, between / 2), radius / 200, math.sqrt(extent.prod() / MAX_NODES))
    if cell > radius / 4:
        raise TrackError(f"{line.length:.0f} m is too long for a width of {width_m:g} m; shorten --length")
    origin = low - 3 * cell
    field = _distances(line, origin, np.ceil(extent / cell).astype(int) + 7, cell, radius + 2 * cell)
    contours = [_simplify(origin + cell * c, SIMPLIFY_M) for c in _contours(field - radius)]
    contours = [c for c in contours if len(c) > 2 and _perimeter(c) > 4 * cell]
    return sorted(contours, key=_perimeter, reverse=True)


def _refuse_joined(line: Line, width_m: float) -> float:
    """How thick (m) the thinnest wall between two stretches is."""
    gap, s1, s2 = _closest(line, APART_M)
    room = width_m + THIN_M
    if gap >= room:
        return gap - width_m
    (x1, y1), (x2, y2) = line.at(s1), line.at(s2)
    cause = (
        f"the course joins itself: at {s1:.1f} m along ({x1:.1f}, {y1:.1f}) and at {s2:.1f} m "
        f"({x2:.1f}, {y2:.1f}) it is only {gap:.2f} m apart, too little for a width of {width_m:g} m"
    )
    length, remedies, narrow = line.length, [], math.floor(10 * (gap - THIN_M)) / 10
    for _ in range(20):  # a longer course has more pairs of stretches beyond 10 m
        if gap < 0.01 * width_m:
            break
        length = math.ceil(length * max(1.01 * room / gap, 1.005))
        gap = _closest(line, APART_M * line.length / length)[0] * length / line.length
        if gap >= room:
            remedies.append(f"--length {length} or more")
            break
    if narrow > 0:
        remedies.append(f"--width {narrow:g} or less")
    raise TrackError(f"{cause}; use {' or '.join(remedies) or 'a track that does not cross itself'}")


def _closest(line: Line, apart_m: float) -> tuple[float, float, float]:
    """The least distance of two points more than `apart_m` apart along the line, and where they are."""
    count = int(np.clip(math.ceil(line.length / 0.05), 16, 4000))
    s = np.linspace(0.0, line.length, count, endpoint=not line.loop)
    points = line.at(s)
    best = (math.inf, 0.0, 0.0)
    for first in range(0, count, 256):
        block = slice(first, first + 256)
        apart = np.abs(s[block, None] - s[None, :])
        if line.loop:
            apart = np.minimum(apart, line.length - apart)
        square = ((points[block, None] - points[None, :]) ** 2).sum(axis=2)
        square[apart <= apart_m] = np.inf
        i, j = np.unravel_index(int(square.argmin()), square.shape)
        if square[i, j] < best[0] ** 2:
            best = (math.sqrt(square[i, j]), float(s[first + i]), float(s[j]))
    return best


def _distances(line: Line, origin: np.ndarray, shape: np.ndarray, cell: float, reach: float) -> np.ndarray:
    """(nx, ny) distance of each grid node to the line, up to `reach`; further nodes hold more than that."""
    field = np.full(tuple(shape), 2 * reach)
    x = origin[0] + cell * np.arange(shape[0])
    y = origin[1] + cell * np.arange(shape[1])
    ends = np.roll(line.points, -1, axis=0) if line.loop else line.points[1:]
    for a, b in zip(line.points, ends, strict=False):
        pieces = max(1, math.ceil(float(np.abs(b - a).max())))  # small windows
        for k in range(pieces):
            p, v = a + (b - a) * (k / pieces), (b - a) / pieces
            first = np.floor((np.minimum(p, p + v) - reach - origin) / cell).astype(int).clip(0)
            last = np.ceil((np.maximum(p, p + v) + reach - origin) / cell).astype(int) + 1
            ex, ey = x[first[0] : last[0], None] - p[0], y[None, first[1] : last[1]] - p[1]
            t = np.clip((ex * v[0] + ey * v[1]) / (v @ v), 0.0, 1.0)
            window = field[first[0] : last[0], first[1] : last[1]]
            np.minimum(window, np.hypot(ex - t * v[0], ey - t * v[1]), out=window)
    return field


# Marching squares: bit k of a cell's case is set when its corner k is inside; corners and edges go round
# counter-clockwise from the lower left corner and the lower edge. Pairs of edges, inside on the left.
_CASES = (
    (), ((0, 3),), ((1, 0),), ((1, 3),), ((2, 1),), ((0, 3), (2, 1)), ((2, 0),), ((2, 3),),
    ((3, 2),), ((0, 2),), ((1, 0), (3, 2)), ((1, 2),), ((3, 1),), ((0, 1),), ((3, 0),), (),
)  # fmt: skip


def _contours(field: np.ndarray) -> list[np.ndarray]:
    """Closed zero contours (k, 2) of a (nx, ny) grid, in cells, inside (negative) on the left."""
    nx, ny = field.shape
    inside = field < 0
    case = inside[:-1, :-1] + 2 * inside[1:, :-1] + 4 * inside[1:, 1:] + 8 * inside[:-1, 1:]
    cells = np.argwhere((case > 0) & (case < 15))  # (m, 2)
    case = case[cells[:, 0], cells[:, 1]]
    node = cells[:, 0] * ny + cells[:, 1]
    # edges by number: 2 * node is the one along x from that node, 2 * node + 1 the one along y
    edges = np.stack((2 * node, 2 * (node + ny) + 1, 2 * (node + 1), 2 * node + 1), axis=1)
    follow: dict[int, int] = {}
    for value, pairs in enumerate(_CASES):
        for a, b in pairs:
            follow.update(edges[case == value][:, [a, b]].tolist())
    contours = []
    while follow:
        first, edge = follow.popitem()
        loop = [first]
        while edge != first:
            loop.append(edge)
            edge = follow.pop(edge)
        contours.append(_crossings(field, np.array(loop)))
    return contours


def _crossings(field: np.ndarray, edges: np.ndarray) -> np.ndarray:
    ny = field.shape[1]
    i, j = np.divmod(edges // 2, ny)
    along_y = edges % 2
    a, b = field[i, j], field[i + 1 - along_y, j + along_y]
    t = a / (a - b)
    return np.stack((i + t * (1 - along_y), j + t * along_y), axis=1)


def _simplify(closed: np.ndarray, tolerance: float) -> np.ndarray:
    """Douglas-Peucker on a closed polyline (k, 2)."""
    far = int(np.argmax(((closed - closed[0]) ** 2).sum(axis=1)))
    points = np.vstack((closed, closed[:1]))
    keep = np.zeros(len(points), bool)
    keep[[0, far, -1]] = True
    stack = [(0, far), (far, len(points) - 1)]
    while stack:
        a, b = stack.pop()
        if b - a < 2:
            continue
        e, v = points[a + 1 : b] - points[a], points[b] - points[a]
        t = np.clip(e @ v / max(float(v @ v), 1e-12), 0.0, 1.0)
        off = np.hypot(*(e - t[:, None] * v).T)
        k = int(off.argmax())
        if off[k] > tolerance:
            keep[a + 1 + k] = True
            stack += [(a, a + 1 + k), (a + 1 + k, b)]
    return points[:-1][keep[:-1]]


def _perimeter(closed: np.ndarray) -> float:
    return float(np.hypot(*(np.roll(closed, -1, axis=0) - closed).T).sum())


def _distinct(points: np.ndarray, loop: bool) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise TrackError(f"a line is (n, 2) finite numbers in m, not an array of shape {points.shape}")
    keep = np.ones(len(points), bool)
    keep[1:] = np.hypot(*np.diff(points, axis=0).T) > 1e-9
    points = points[keep]
    if loop and len(points) > 1 and np.hypot(*(points[0] - points[-1])) <= 1e-9:
        points = points[:-1]
    if len(points) < 2:
        raise TrackError("a line needs at least 2 different points")
    return points


def find_loop(positions: np.ndarray, hz: float, close_m: float = RADIUS_M) -> tuple[int, int]:
    """(start, stop): `positions[start:stop]`, of (n, 2) at `hz`, is one lap, the cleanest of several.

    A lap comes back to within `close_m` of where it began, going the same way, after 5 m or more.
    Raises TrackError when the drive never closes.
    """
    positions = np.asarray(positions, np.float64)
    kept = _moved(positions, STEP_M)
    points = positions[kept]
    if len(points) * STEP_M < LAP_M:
        raise TrackError(f"the drive is only {len(points) * STEP_M:.1f} m long; drive a whole lap and a bit")
    steps = np.diff(points, axis=0)
    along = np.concatenate(([0.0], np.cumsum(np.hypot(steps[:, 0], steps[:, 1]))))
    headings = np.arctan2(steps[:, 1], steps[:, 0])[np.minimum(np.arange(len(points)), len(steps) - 1)]
    turns = np.abs((np.diff(headings) + math.pi) % (2 * math.pi) - math.pi)
    turned = np.concatenate(([0.0], np.cumsum(turns)))
    laps = []  # start, stop, length, how unclean
    for i in range(0, len(points), 1 + len(points) // MAX_STARTS):
        after = slice(i, i + MAX_STARTS)
        back = (along[after] - along[i] >= LAP_M) & (np.cos(headings[after] - headings[i]) > 0.5)
        later = i + np.flatnonzero(back)
        gaps = np.hypot(points[later, 0] - points[i, 0], points[later, 1] - points[i, 1])
        close = np.flatnonzero(gaps < close_m)
        if len(close):  # the first time back, where it is closest
            close = close[along[later[close]] < along[later[close[0]]] + 2 * close_m]
            k = int(close[gaps[close].argmin()])
            j = int(later[k])
            # needless turns, as after a crash, and standing still make a lap less clean
            unclean = turned[j] - turned[i] + 4 * gaps[k] + (kept[j] - kept[i]) / hz / 4
            laps.append((i, j, along[j] - along[i], unclean))
    if not laps:
        apart = float(np.hypot(*(points[-1] - points[0])))
        raise TrackError(f"the drive never closes: it ends {apart:.1f} m from its start; drive on past it")
    found = np.array(laps)
    usual = np.abs(found[:, 2] / np.median(found[:, 2]) - 1) < 0.3  # going back and forth is no lap
    start, stop = found[np.where(usual, found[:, 3], np.inf).argmin(), :2].astype(int)
    return int(kept[start]), int(kept[stop])


def lap_line(lap: np.ndarray, spacing: float = STEP_M) -> np.ndarray:
    """(m, 2) evenly spaced, smoothed closed line of one lap of noisy positions (n, 2) from `find_loop`."""
    lap = np.asarray(lap, np.float64)
    lap = lap[_moved(lap, 0.05)]
    if len(lap) < 8:
        raise TrackError(f"a lap of {len(lap)} positions is too short to follow")
    # the end meets the start over the last quarter, not with a step
    blend = np.clip(np.linspace(-3.0, 1.0, len(lap)), 0.0, 1.0)[:, None]
    tangent = lap[1] - lap[0]
    gap = lap[0] - lap[-1]
    sideways = gap - tangent * (gap @ tangent) / max(float(tangent @ tangent), 1e-12)
    line = Line.from_points(lap + blend * sideways, True)
    count = max(16, round(line.length / 0.05))
    points = line.at(np.arange(count) * (line.length / count))
    window = max(1, round(SMOOTH_M / line.length * count)) // 2
    for _ in range(2):  # twice a moving average: a triangular one
        wrapped = np.vstack((points[-window:], points, points[:window])) if window else points
        sums = np.cumsum(np.vstack((np.zeros((1, 2)), wrapped)), axis=0)
        points = (sums[2 * window + 1 :] - sums[: -2 * window - 1]) / (2 * window + 1)
    return resample(points, spacing, True)


def _moved(positions: np.ndarray, step_m: float) -> np.ndarray:
    """Indices at least `step_m` from the one before: standing still and its noise drop out."""
    kept: list[int] = []
    x = y = math.inf
    for i, (px, py) in enumerate(positions.tolist()):
        if not kept or math.hypot(px - x, py - y) >= step_m:
            kept.append(i)
            x, y = px, py
    return np.array(kept, int)


def place_checkpoints(
    line: np.ndarray,
    count: int | None = None,
    loop: bool = True,
    centerline: np.ndarray | None = None,
    width_m: float | None = None,
) -> tuple[np.ndarray, float]:
    """Checkpoints (c, 2) on a driven line (n, 2), in order, and their radius in m.

    Placed by dynamic programming where they say most: the way straight to the next one keeps to the
    driven line and to its direction. The first lies ahead of the start (of the centre line, where there
    is one). Without `count` there are 4 to 8, as few as keep the straight way inside the corridor. With
    a width none can be driven past inside it.
    """
    if count is not None and not 2 <= count <= 50:
        raise TrackError(f"{count} checkpoints; a course takes 2 to 50, and 4 to 8 are usual")
    driven = Line.from_points(line, loop)
    free = RADIUS_M if width_m is None else width_m / 2
    radius = RADIUS_M if width_m is None else free + MARGIN_M
    middle = driven if centerline is None else Line.from_points(centerline, loop)
    size = int(np.clip(2 * driven.length, 64, 128))  # places to choose from
    s = np.linspace(0.0, driven.length, size, endpoint=not loop)
    cost = _leg_costs(driven, s, radius, free)
    for tried in [count] if count else range(CHECKPOINTS[0], CHECKPOINTS[1] + 1):
        crowded = _ahead(driven, s) < min(2 * radius, driven.length / (2 * tried))
        chosen = s[_cheapest(np.where(crowded, np.inf, cost), tried, loop)]
        if _strays(driven, chosen) < free:
            break
    if loop:
        start = driven.project(middle.points[0])[0]
        chosen = np.roll(chosen, -int(((chosen - start - radius) % driven.length).argmin()))
    points = driven.at(chosen)
    if width_m is not None:  # off the middle, the further wall is further away
        radius += max(abs(middle.project(p)[1]) for p in points)
    return points, math.ceil(20 * radius - 1e-6) / 20


def _ahead(line: Line, s: np.ndarray) -> np.ndarray:
    """(m, m) m from place i forward to place j; on an open line negative where j lies behind."""
    ahead = s[None, :] - s[:, None]
    return ahead % line.length if line.loop else ahead


def _leg_costs(line: Line, s: np.ndarray, radius: float, free: float) -> np.ndarray:
    """(m, m) what a leg from checkpoint i to j costs, in m: how badly the way straight to j serves there.

    Summed along the leg: 1 - cos of the angle between that way and the line, until j's radius, where the
    next one takes over; and how far the line leaves the chord from i to j, in free widths squared. Then
    what is skipped when j is reached early, from a stretch beside it.
    """
    points, ahead, step = line.at(s), _ahead(line, s), float(s[1] - s[0])
    headings = line.heading(s)
    to = points[None, :] - points[:, None]  # (m, m, 2) from q to j
    distance = np.hypot(to[..., 0], to[..., 1])
    along = to[..., 0] * np.cos(headings)[:, None] + to[..., 1] * np.sin(headings)[:, None]
    missed = np.where(ahead >= radius, 1.0 - along / np.maximum(distance, 1e-9), 0.0)  # (q, j)
    reach = radius + free
    skipped = np.where((distance < reach) & (ahead > 1.6 * reach), ahead, 0.0)
    size = len(s)
    cost = np.full((size, size), np.inf)
    for j in range(size):
        before = (j - np.arange(1, size)) % size if line.loop else np.arange(j - 1, -1, -1)
        x, y = to[before, j].T  # from place q, and also the chord from i; (i, q) below
        t = np.clip((x[:, None] * x + y[:, None] * y) / np.maximum(x * x + y * y, 1e-9)[:, None], 0.0, 1.0)
        off = (x - t * x[:, None]) ** 2 + (y - t * y[:, None]) ** 2
        strayed = np.tril(off**2).sum(axis=1) / free**4
        cost[before, j] = step * (np.cumsum(missed[before, j]) + strayed)
        cost[before, j] += np.maximum.accumulate(skipped[before, j])
    return cost


def _cheapest(cost: np.ndarray, count: int, loop: bool) -> np.ndarray:
    """(count,) places in order whose legs cost least in sum: from the last to the first in a loop, else
    from place 0, which is no checkpoint, to the last place."""
    size, best, chosen = len(cost), math.inf, np.zeros(0, int)
    for first in range(size - count + 1) if loop else [0]:
        legs = np.where(np.tri(size - first, dtype=bool), np.inf, cost[first:, first:])
        total = np.where(np.arange(size - first) == 0, 0.0, np.inf)  # of the best way here
        came = []
        for _ in range(count - loop):
            ways = total[:, None] + legs
            came.append(ways.argmin(axis=0))
            total = ways.min(axis=0)
        if loop:
            total = total + cost[first:, first]
        last = int(total.argmin()) if loop else size - 1
        if total[last] < best:
            best, places = float(total[last]), [last]
            for step in reversed(came):
                places.append(int(step[places[-1]]))
            chosen = first + np.array(places[::-1][0 if loop else 1 :])
    return chosen


def _strays(line: Line, chosen: np.ndarray) -> float:
    """How far (m) the line leaves the straight way between checkpoints at `chosen` m along."""
    starts = np.roll(chosen, 1) if line.loop else np.concatenate(([0.0], chosen[:-1]))
    most = 0.0
    for a, b in zip(starts, chosen, strict=True):
        between = line.at(a + np.linspace(0.0, 1.0, 50) * ((b - a) % line.length if line.loop else b - a))
        chord = Line.from_points(between[[0, -1]], False)
        most = max(most, *(abs(chord.project(p)[1]) for p in between))
    return most


def task_toml(
    centerline: np.ndarray,
    width_m: float,
    checkpoints: np.ndarray,
    radius_m: float,
    loop: bool = True,
    hz: float = 10,
    episode_s: float = 60,
) -> str:
    """The text of a car's task file; points rounded to mm. An empty centre line leaves the floor open."""
    pairs = [f"[{x:.3f}, {y:.3f}]" for x, y in centerline]
    rows = [", ".join(pairs[i : i + 6]) for i in range(0, len(pairs), 6)]
    lines = ["[task]", 'robot = "car"', 'kind = "course"', f"hz = {hz:g}", f"episode_s = {episode_s:g}", ""]
    lines += ["[course]", f"loop = {str(loop).lower()}"]
    if rows:
        lines += [f"width_m = {round(float(width_m), 3)}", "centerline = [", *(f"  {r}," for r in rows), "]"]
    for x, y in checkpoints:
        lines += ["", "[[checkpoint]]", f"at = [{x:.3f}, {y:.3f}]", f"radius_m = {round(float(radius_m), 3)}"]
    return "\n".join(lines).replace("-0.000", "0.000") + "\n"
