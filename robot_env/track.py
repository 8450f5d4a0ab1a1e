"""Geometry of a course: centre lines, walls, the lap in a recording, checkpoints, projection. Pure functions.

Lengths in m, map frame. A closed line does not repeat its first point.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np

APART_M = 10.0  # stretches further apart than this along the track may not be joined (task-file contract)
THIN_M = 0.02  # less than this between two walls is no room for them
WALL_STEP_M = 0.03  # spacing of the points walls are made of ...
WALL_TOLERANCE_M = 0.01  # ... before they are thinned to this
HEADING_M = 0.2
NEAR_M = 2.0  # a neighbouring stretch that is no further along than this may be the own one
STEP_M = 0.25  # spacing of the points of a line to be followed: half the tightest bend a car can take
SMOOTH_M = 0.3  # standard deviation of the smoothing of a driven lap
LAP_M = 5.0  # shorter is no lap
CHECKPOINTS = (4, 8)  # fewest and most that are chosen, one for ...
CHECKPOINT_EVERY_M = 6.0  # ... so much of the way
PLACES = 96  # to choose from
RADIUS_M = 1.0  # of a checkpoint where no width is known (RACER's default)
MARGIN_M = 0.25  # a checkpoint reaches this far beyond the walls, so that it cannot be driven past


class TrackError(ValueError):
    """A track that cannot be used: the message says where, why and what to do."""


class Line:
    """A polyline to be followed, through (n, 2) points; repeated ones are dropped. Raises TrackError below 2."""

    def __init__(self, points: np.ndarray, loop: bool) -> None:
        points = np.asarray(points, np.float64)
        if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
            raise TrackError(f"a line is (n, 2) finite numbers in m, not an array of shape {points.shape}")
        corners = np.vstack((points, points[:1])) if loop else points
        moved = np.hypot(*np.diff(corners, axis=0).T) > 1e-9
        if not moved.any():
            raise TrackError("a line needs at least 2 different points")
        self.loop = loop
        self.corners = np.vstack((corners[:1], corners[1:][moved]))  # the points, and in a loop the first one again
        self.points = self.corners[:-1] if loop else self.corners
        self.along = np.append(0.0, np.cumsum(np.hypot(*np.diff(self.corners, axis=0).T)))  # m, at the corners
        self.length = float(self.along[-1])  # m, with the closing segment of a loop
        # x + iy, so that both take one operation: every step asks for places on the line
        self._places = self.corners @ (1, 1j)
        self._vectors, self._lengths = np.diff(self._places), np.diff(self.along)

    def at(self, s: float | np.ndarray) -> np.ndarray:
        """(..., 2) point at `s` m along; a loop wraps round, an open line stops at its ends."""
        s = np.mod(s, self.length) if self.loop else s
        return np.asarray(np.interp(s, self.along, self._places))[..., None].view(np.float64)

    def heading(self, s: float | np.ndarray) -> np.ndarray:
        """(...) rad, direction of travel at `s` m: the chord from HEADING_M behind to HEADING_M ahead."""
        # a hair less behind, so that a turn on the spot has the direction it leaves in
        chord = self.at(s + HEADING_M) - self.at(s - HEADING_M + 1e-6)
        return np.arctan2(chord[..., 1], chord[..., 0])

    def apart(self, s: np.ndarray, other: np.ndarray | float) -> np.ndarray:
        """m along from `s` to `other`, in a loop the shorter way round."""
        apart = np.abs(s - other)
        return np.minimum(apart, self.length - apart) if self.loop else apart

    def project(self, point: np.ndarray | tuple[float, float], near: float | None = None) -> tuple[float, float]:
        """The nearest point of the line: (m along, m to the left of it).

        With `near`, m along, what lies more than NEAR_M along from there counts as further away, by half of the
        difference.
        """
        to = complex(*point) - self._places[:-1]
        across = to * self._vectors.conj()  # real: along a segment, imaginary: to the left of it
        t = np.minimum(np.maximum(across.real / self._lengths**2, 0.0), 1.0)
        off = counted = np.abs(to - t * self._vectors)
        s = self.along[:-1] + t * self._lengths
        if near is not None:
            counted = off + np.maximum(self.apart(s, near) - NEAR_M, 0.0) / 2
        i = int(counted.argmin())
        return float(s[i] % self.length if self.loop else s[i]), math.copysign(off[i], across.imag[i])


def read_csv(path: Path, length_m: float | None = None, width_m: float | None = None) -> tuple[np.ndarray, float]:
    """A centre line (n, 2) and its width from a race-track CSV, as `x_m, y_m, w_tr_right_m, w_tr_left_m`.

    Scaled so that the closed line is `length_m` long; the width is the scaled median unless given.
    Raises TrackError with file, line, cause and remedy.
    """
    for name, value in (("length", length_m), ("width", width_m)):
        if value is not None and not 0 < value < math.inf:
            raise TrackError(f"{path}: the {name} must be a positive number of metres, not {value}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrackError(f"{path}: cannot be read as a centre-line CSV: {error}") from None
    names = ["x_m", "y_m"] + ["w_tr_right_m", "w_tr_left_m"] * (width_m is None)
    header: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        cells = [c.strip() for c in line.strip("# \t").split(",")]
        if "x_m" in cells:
            header = cells
        elif line.strip() and not line.startswith("#"):
            try:
                rows.append([float(cells[header.index(name)]) for name in names])
                if not np.isfinite(rows[-1]).all() or min(rows[-1][2:], default=0.0) < 0:
                    raise ValueError
            except (ValueError, IndexError):
                raise TrackError(
                    f"{path}:{number}: {line[:80]!r} does not give {', '.join(names)} in m (finite, no width below 0), "
                    "below a line '# x_m,y_m,w_tr_right_m,w_tr_left_m' (with --width no w are needed)"
                ) from None
    if len({(x, y) for x, y, *_ in rows}) < 4:
        raise TrackError(f"{path}: {len(rows)} points; a closed track needs at least 4 different ones")
    table = np.array(rows)
    track = Line(table[:, :2], True)
    scale = (length_m or track.length) / track.length
    return track.points * scale, width_m or float(np.median(table[:, 2:].sum(axis=1))) * scale


def resample(polyline: np.ndarray, spacing: float, loop: bool) -> np.ndarray:
    """(m, 2) evenly spaced points of a smooth curve through (n, 2): Catmull-Rom over chord lengths."""
    line = Line(polyline, loop)
    corners, along = line.corners, line.along[:, None]
    before, after = (-2, 1) if loop else (0, -1)  # the neighbours of the ends
    wrap = line.length if loop else 0.0
    points = np.vstack((corners[before], corners, corners[after]))
    knots = np.vstack((along[before] - wrap, along, along[after] + wrap))
    tangents = (points[2:] - points[:-2]) / (knots[2:] - knots[:-2])
    s = np.linspace(0.0, line.length, 4 * math.ceil(line.length / spacing) + 4 * len(corners))
    i = np.minimum(np.searchsorted(line.along, s, side="right"), len(corners) - 1) - 1
    h = along[i + 1] - along[i]
    t = (s[:, None] - along[i]) / h
    chord = corners[i + 1] - corners[i]
    bend = (1 - t) * (h * tangents[i] - chord) - t * (h * tangents[i + 1] - chord)
    curve = Line(corners[i] + t * chord + t * (1 - t) * bend, False)
    count = max(3 if loop else 1, round(curve.length / spacing))
    return curve.at(np.linspace(0.0, curve.length, count + (not loop), endpoint=not loop))


def walls(centerline: np.ndarray, width_m: float, loop: bool = True) -> list[np.ndarray]:
    """Closed polylines (k, 2) around the union of discs of radius `width_m` / 2 along (n, 2), longest first,
    the corridor on their left.

    Both sides of the line are offset; what comes closer to another part of it is dropped; ends are joined.
    Raises TrackError where that corridor joins stretches more than 10 m apart along the track.
    """
    if not 0 < width_m < math.inf:
        raise TrackError(f"the width of a course must be a positive number of metres, not {width_m}")
    line = Line(centerline, loop)
    _refuse_joined(line, width_m)
    step = max(WALL_STEP_M, line.length / 10_000)
    back = line.points[::-1]
    runs: list[np.ndarray] = []
    for side in [line.points, back] if loop else [np.vstack((line.points, back[1:-1]))]:
        offset = _right_of(side, width_m / 2, step)
        clear = [_off_chord(offset, *chord) > width_m / 2 - 1e-4 for chord in pairwise(line.corners)]
        kept = offset[np.all(clear, axis=0)]
        breaks = np.flatnonzero(np.hypot(*(np.roll(kept, -1, axis=0) - kept).T) > 4 * step)
        kept = np.roll(kept, -1 - breaks[0], axis=0) if len(breaks) else kept
        runs += [run for run in np.split(kept, breaks[1:] - breaks[:1]) if len(run) > 1]
    closed = []
    while runs:  # where two sides meet, the end of one run is beside the start of another
        run = runs.pop()
        starts = np.array([r[0] for r in [run, *runs]])
        following = int(np.hypot(*(starts - run[-1]).T).argmin())
        if following:
            runs.append(np.vstack((run, runs.pop(following - 1))))
        else:
            closed.append(Line(run, True))
    closed.sort(key=lambda wall: -wall.length)
    return [_thin(wall.corners)[:-1] for wall in closed if wall.length > 8 * step]  # less is no wall


def _right_of(closed: np.ndarray, radius: float, step: float) -> np.ndarray:
    """(m, 2) points `radius` to the right of a closed polyline, about `step` apart, round outer bends."""
    vectors = np.roll(closed, -1, axis=0) - closed
    headings = np.arctan2(vectors[:, 1], vectors[:, 0])
    turns = math.pi - (headings - np.roll(headings, -1) + math.pi + 1e-9) % (2 * math.pi)  # back is left
    offset = []
    for start, vector, heading, turn in zip(closed, vectors, headings, turns, strict=True):
        pieces = math.ceil(math.hypot(*vector) / step)
        fan = 2 + int(turn * radius / step) if turn > 0 else 0
        share = np.append((np.arange(pieces) + 0.5) / pieces, np.ones(fan))[:, None]
        angle = heading + turn * np.append(np.zeros(pieces), np.linspace(0.0, 1.0, fan))
        offset.append(start + share * vector + radius * np.stack((np.sin(angle), -np.cos(angle)), axis=1))
    return np.vstack(offset)


def _off_chord(points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(k,) distances of (k, 2) points from the segment a-b."""
    to, chord = points - a, b - a
    t = (to @ chord / max(float(chord @ chord), 1e-12)).clip(0.0, 1.0)
    return np.hypot(*(to - t[:, None] * chord).T)


def _thin(points: np.ndarray) -> np.ndarray:
    """Without the points within WALL_TOLERANCE_M of the rest (Douglas-Peucker)."""
    off = _off_chord(points, points[0], points[-1])
    k = int(off.argmax())
    if off[k] <= WALL_TOLERANCE_M:
        return points[[0, -1]]
    return np.vstack((_thin(points[: k + 1])[:-1], _thin(points[k:])))


def _refuse_joined(line: Line, width_m: float) -> None:
    count = int(np.clip(math.ceil(line.length / 0.05), 16, 2000))
    s = np.linspace(0.0, line.length, count, endpoint=not line.loop)
    apart, points = line.apart(s[:, None], s), line.at(s)
    gaps = np.hypot(*(points[:, None] - points).T)
    room, scale = width_m + THIN_M, 1.0
    far = np.where(apart > APART_M, gaps, np.inf)
    i, j = divmod(int(far.argmin()), count)
    gap = float(far[i, j])
    if gap >= room:
        return
    remedies = []
    if gap > 0.01 * width_m:
        while (joined := (apart * scale > APART_M) & (gaps * scale < room)).any():
            scale = 1.01 * room / max(float(gaps[joined].min()), 1e-3)
        remedies.append(f"--length {math.ceil(scale * line.length)} or more")
    if gap - THIN_M >= 0.1:
        remedies.append(f"--width {math.floor(10 * (gap - THIN_M)) / 10:g} or less")
    (x1, y1), (x2, y2) = points[[i, j]]
    raise TrackError(
        f"the course joins itself: at {s[i]:.1f} m along ({x1:.1f}, {y1:.1f}) and at {s[j]:.1f} m ({x2:.1f}, "
        f"{y2:.1f}) it is only {gap:.2f} m apart, too little for a width of {width_m:g} m; "
        f"use {' or '.join(remedies) or 'a track that does not cross itself'}"
    )


def find_loop(positions: np.ndarray, hz: float, close_m: float = RADIUS_M) -> tuple[int, int]:
    """(start, stop): `positions[start:stop]`, of (n, 2) at `hz`, is one lap: of several the quickest, which
    did not stop or crash, and that closes well.

    A lap comes back to within `close_m` of where it began, going the same way, after 5 m or more.
    Raises TrackError when the drive never closes.
    """
    kept = _moved(positions, STEP_M)
    points = positions[kept]
    if len(points) * STEP_M < LAP_M:
        raise TrackError(f"the drive is only {len(points) * STEP_M:.1f} m long; drive a whole lap and a bit")
    ways = np.diff(points, axis=0, append=points[-1:] * 2 - points[-2:-1])
    lengths = np.hypot(*ways.T)
    ways /= lengths[:, None]
    along = np.cumsum(lengths) - lengths
    laps = []  # start, stop, length, s it took and what its gap counts as
    for i in range(len(points) - 1):
        gaps = np.hypot(*(points - points[i]).T)
        back = np.flatnonzero((along - along[i] >= LAP_M) & (ways @ ways[i] > 0.5) & (gaps < close_m))
        if len(back):  # the first time back, where it is closest
            back = back[along[back] < along[back[0]] + 2 * close_m]
            j = int(back[gaps[back].argmin()])
            laps.append((kept[i], kept[j], along[j] - along[i], (kept[j] - kept[i]) / hz + 10 * gaps[j]))
    if not laps:
        apart = float(np.hypot(*(points[-1] - points[0])))
        raise TrackError(f"the drive never closes: it ends {apart:.1f} m from its start; drive on past it")
    found = np.array(laps)
    usual = np.abs(found[:, 2] / np.median(found[:, 2]) - 1) < 0.3  # going back and forth is no lap
    start, stop = found[np.where(usual, found[:, 3], np.inf).argmin(), :2]
    return int(start), int(stop)


def lap_line(lap: np.ndarray) -> np.ndarray:
    """(m, 2) points STEP_M apart, the smoothed closed line of one lap of noisy positions (n, 2) from `find_loop`."""
    lap = lap[_moved(lap, 0.05)]
    if len(lap) < 8:
        raise TrackError(f"a lap of {len(lap)} positions is too short to follow")
    # the end meets the start over the last quarter, not with a step
    blend = np.linspace(-3.0, 1.0, len(lap)).clip(0.0, 1.0)[:, None]
    line = Line(lap + blend * (lap[0] - lap[-1]), True)
    count = max(16, round(line.length / 0.05))
    x, y = line.at(np.arange(count) * (line.length / count)).T
    low_pass = np.exp(-2.0 * (math.pi * SMOOTH_M * np.fft.fftfreq(count, line.length / count)) ** 2)
    smooth = np.fft.ifft(np.fft.fft(x + 1j * y) * low_pass)
    return resample(np.stack((smooth.real, smooth.imag), axis=1), STEP_M, True)


def _moved(positions: np.ndarray, step_m: float) -> np.ndarray:
    """Indices at least `step_m` from the one before: standing still and its noise drop out."""
    kept: list[int] = []
    for i, place in enumerate(positions):
        if not kept or math.dist(place, positions[kept[-1]]) >= step_m:
            kept.append(i)
    return np.array(kept, int)


def place_checkpoints(
    line: np.ndarray, count: int | None = None, centerline: np.ndarray | None = None, width_m: float | None = None
) -> tuple[np.ndarray, float]:
    """Checkpoints (c, 2) on a closed driven line (n, 2), in order, and their radius in m.

    Placed by dynamic programming such that the way straight to the next one keeps to the driven line. The
    first lies ahead of the start (of the centre line, where there is one). Without `count` there are 4 to 8,
    by length. With a width none can be driven past inside it.
    """
    if count is not None and not 2 <= count <= 50:
        raise TrackError(f"{count} checkpoints; a course takes 2 to 50, and 4 to 8 are usual")
    driven = Line(line, True)
    middle = driven if centerline is None else Line(centerline, True)
    count = count or int(np.clip(driven.length / CHECKPOINT_EVERY_M, *CHECKPOINTS))
    radius = RADIUS_M if width_m is None else width_m / 2 + MARGIN_M
    step = driven.length / PLACES
    points = driven.at(step * np.arange(2 * PLACES))  # two rounds
    cost = np.full((len(points), len(points)), np.inf)
    nearest = math.ceil(min(2 * radius, driven.length / (2 * count)) / step)  # no two closer than this
    for i in range(len(points) - 1):
        to = (points[i + 1 : i + PLACES + 1] - points[i]).T  # (2, k): places on the way, and ends of the chord
        t = (to.T @ to / np.maximum((to**2).sum(0), 1e-9)).clip(0.0, 1.0)  # (place, end)
        off = np.triu(np.hypot(*(to[:, :, None] - t * to[:, None, :])))
        cost[i, i + nearest : i + PLACES + 1] = (off**4).sum(0)[nearest - 1 :]
    _, places = min(_cheapest(cost, count, first) for first in range(PLACES))
    s = step * np.array(places[1:])
    ahead_of_start = (s - driven.project(middle.points[0])[0] - radius) % driven.length
    chosen = driven.at(np.roll(s, -int(ahead_of_start.argmin())))
    if width_m is not None:  # off the middle, the further wall is further away
        radius += max(abs(middle.project(p)[1]) for p in chosen)
    return chosen, math.ceil(20 * radius - 1e-6) / 20


def _cheapest(legs: np.ndarray, count: int, first: int) -> tuple[float, list[int]]:
    """The least cost of `count` legs from place `first` to PLACES further, and where they begin and end."""
    legs = legs[first : first + PLACES + 1, first : first + PLACES + 1]
    total, came = legs[0], []
    for _ in range(count - 1):
        ways = total[:, None] + legs
        came.append(ways.argmin(axis=0))
        total = ways.min(axis=0)
    places = [PLACES]
    for back in reversed(came):
        places.insert(0, int(back[places[0]]))
    return float(total[-1]), [first, *(first + p for p in places)]


def task_toml(
    centerline: np.ndarray, width_m: float, checkpoints: np.ndarray, radius_m: float,
    hz: float = 10, episode_s: float = 60,
) -> str:  # fmt: skip
    """The text of a car's task file; points rounded to mm. An empty centre line leaves the floor open."""
    pairs = [f"[{x:.3f}, {y:.3f}]" for x, y in centerline]
    rows = [", ".join(pairs[i : i + 6]) for i in range(0, len(pairs), 6)]
    lines = ["[task]", 'robot = "car"', 'kind = "course"', f"hz = {hz:g}", f"episode_s = {episode_s:g}", ""]
    lines += ["[course]", "loop = true"]
    if rows:
        lines += [f"width_m = {round(float(width_m), 3)}", "centerline = [", *(f"  {r}," for r in rows), "]"]
    for x, y in checkpoints:
        lines += ["", "[[checkpoint]]", f"at = [{x:.3f}, {y:.3f}]", f"radius_m = {round(float(radius_m), 3)}"]
    return "\n".join(lines).replace("-0.000", "0.000") + "\n"
