"""Geometry of a course: centre lines, walls, the lap in a recording, checkpoints, projection. Pure functions.

Lengths in m, map frame. A closed line does not repeat its first point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_CSV_BYTES = 8_000_000
MAX_POINTS = 50_000
APART_M = 10.0  # stretches further apart than this along the track may not be joined (task-file contract)
CELL_M = 0.04  # grid of the distance field the walls are traced on
MAX_NODES = 16_000_000
SIMPLIFY_M = 0.01  # walls are thinned to this tolerance
STEP_M = 0.25  # spacing of a lap line
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
    tangents: np.ndarray  # (n, 2) unit, mean of the two segments at a point
    _segments: np.ndarray  # (6, segments): start x, y, vector x, y, length, 1 / length^2

    @classmethod
    def from_points(cls, points: np.ndarray, loop: bool) -> Line:
        """A line through (n, 2) points; repeated points are dropped. Raises TrackError below 2 points."""
        points = _distinct(points, loop)
        ends = np.roll(points, -1, axis=0) if loop else points[1:]
        vectors = ends - points[: len(ends)]
        lengths = np.hypot(vectors[:, 0], vectors[:, 1])
        units = vectors / lengths[:, None]
        after = units if loop else np.vstack((units, units[-1:]))
        before = np.roll(units, 1, axis=0) if loop else np.vstack((units[:1], units))
        tangents = before + after
        norms = np.hypot(tangents[:, 0], tangents[:, 1])[:, None]
        tangents = np.where(norms > 1e-6, tangents / np.maximum(norms, 1e-6), after)  # a turn on the spot
        along = np.concatenate(([0.0], np.cumsum(lengths)))
        segments = np.vstack((points[: len(ends)].T, vectors.T, lengths, 1.0 / lengths**2))
        return cls(points, loop, along[: len(points)], float(along[-1]), tangents, segments)

    def at(self, s: float | np.ndarray) -> np.ndarray:
        """(..., 2) point at `s` m along; a loop wraps round, an open line stops at its ends."""
        index, t = self._locate(s)
        x, y, dx, dy, _, _ = self._segments
        return np.stack((x[index] + t * dx[index], y[index] + t * dy[index]), axis=-1)

    def heading(self, s: float | np.ndarray) -> np.ndarray:
        """(...) rad, direction of travel at `s` m along; it turns evenly between points."""
        index, t = self._locate(s)
        t = np.asarray(t)[..., None]
        tangent = (1 - t) * self.tangents[index] + t * self.tangents[(index + 1) % len(self.points)]
        return np.arctan2(tangent[..., 1], tangent[..., 0])

    def curvature(self) -> np.ndarray:
        """(n,) 1/m at each point, left positive: change of heading over half the two segments at it."""
        _, _, dx, dy, length, _ = self._segments
        heading = np.arctan2(dy, dx)
        turn = heading - np.roll(heading, 1)
        turn = (turn + math.pi) % (2 * math.pi) - math.pi
        curvature = 2 * turn / (length + np.roll(length, 1))
        return curvature if self.loop else np.concatenate(([0.0], curvature[1:], [0.0]))

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

    def _locate(self, s: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = np.asarray(s, np.float64)
        s = s % self.length if self.loop else np.clip(s, 0.0, self.length)
        length = self._segments[4]
        index = np.clip(np.searchsorted(self.along, s, side="right") - 1, 0, len(length) - 1)
        return index, np.clip((s - self.along[index]) / length[index], 0.0, 1.0)


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
    return points * scale, float(np.median(rows[:, 2] + rows[:, 3])) * scale if width_m is None else width_m


def _csv_rows(path: Path, widths: bool) -> np.ndarray:
    """(n, 4) x, y, right, left; the widths are 0 where they are not asked for."""
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
    return np.array(rows) if widths else np.pad(np.array(rows), ((0, 0), (0, 2)))


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
    """(m, 2) evenly spaced points of a smooth curve through (n, 2): cubic between points, Bessel tangents."""
    if not spacing > 0:
        raise TrackError(f"the spacing must be positive, not {spacing}")
    points = _distinct(polyline, loop)
    line = Line.from_points(points, loop)
    if len(points) > 2:
        line = Line.from_points(_cubic(line, spacing), loop)
    count = max(3 if loop else 1, round(line.length / spacing))
    return line.at(np.linspace(0.0, line.length, count + (not loop), endpoint=not loop))


def _cubic(line: Line, spacing: float) -> np.ndarray:
    _, _, dx, dy, length, _ = line._segments
    slope = np.stack((dx, dy), axis=1) / length[:, None]
    h = length[:, None]
    if line.loop:
        before, h0 = np.roll(slope, 1, axis=0), np.roll(h, 1, axis=0)
        tangents = (h * before + h0 * slope) / (h + h0)
        p1, m1 = np.roll(line.points, -1, axis=0), np.roll(tangents, -1, axis=0)
    else:
        inner = (h[1:] * slope[:-1] + h[:-1] * slope[1:]) / (h[1:] + h[:-1])
        tangents = np.vstack((slope[:1], inner, slope[-1:]))
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
    _refuse_joined(line, width_m)
    radius = width_m / 2
    low = line.points.min(axis=0) - radius
    extent = line.points.max(axis=0) + radius - low
    cell = max(min(CELL_M, radius / 8), math.sqrt(float(extent.prod()) / MAX_NODES))
    if cell > radius / 4:
        raise TrackError(
            f"{line.length:.0f} m is too long for walls {width_m:g} m apart; use a shorter --length"
        )
    origin = low - 3 * cell
    field = _distances(line, origin, np.ceil(extent / cell).astype(int) + 7, cell, radius + 2 * cell)
    contours = [_simplify(origin + cell * c, SIMPLIFY_M) for c in _contours(field - radius)]
    contours = [c for c in contours if len(c) > 2 and _perimeter(c) > 4 * cell]
    return sorted(contours, key=_perimeter, reverse=True)


def _refuse_joined(line: Line, width_m: float) -> None:
    gap, s1, s2 = _closest(line, APART_M)
    if gap >= width_m:
        return
    (x1, y1), (x2, y2) = line.at(s1), line.at(s2)
    cause = (
        f"the course joins itself: at {s1:.1f} m along ({x1:.1f}, {y1:.1f}) and at {s2:.1f} m "
        f"({x2:.1f}, {y2:.1f}) it is only {gap:.2f} m apart, less than its width of {width_m:g} m"
    )
    length, remedies = line.length, []
    for _ in range(20):  # a longer course has more pairs of stretches beyond 10 m
        if gap < 0.01 * width_m:
            break
        length = math.ceil(length * max(1.01 * width_m / gap, 1.005))
        gap = _closest(line, APART_M * line.length / length)[0] * length / line.length
        if gap >= width_m:
            remedies.append(f"--length {length} or more")
            break
    narrow = math.floor(10 * _closest(line, APART_M)[0]) / 10
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
        rows = edges[case == value]
        for a, b in pairs:
            follow.update(zip(rows[:, a].tolist(), rows[:, b].tolist(), strict=True))
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
    pairs = [f"[{x:.3f}, {y:.3f}]" for x, y in np.asarray(centerline) + 0.0]
    rows = [", ".join(pairs[i : i + 6]) for i in range(0, len(pairs), 6)]
    lines = ["[task]", 'robot = "car"', 'kind = "course"', f"hz = {hz:g}", f"episode_s = {episode_s:g}", ""]
    lines += ["[course]", f"loop = {str(loop).lower()}"]
    if rows:
        lines += [f"width_m = {width_m:.3f}".rstrip("0"), "centerline = [", *(f"  {r}," for r in rows), "]"]
    for x, y in checkpoints:
        lines += ["", "[[checkpoint]]", f"at = [{x:.3f}, {y:.3f}]", f"radius_m = {round(radius_m, 3):g}"]
    return "\n".join(lines).replace("-0.000", "0.000") + "\n"
