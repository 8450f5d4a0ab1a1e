"""Course geometry on synthetic tracks: walls, CSV files, laps in recordings, checkpoints, projection."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tether.robot_env import track
from tether.robot_env.track import Line, TrackError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TASKS = Path(track.__file__).parent / "tasks"


def car_loop(count: int = 2000, scale: float = 1.0) -> np.ndarray:
    """r = 7 + 2 sin 3a + 0.8 cos 4a m: bends both ways, 53 m."""
    a = np.linspace(0, 2 * np.pi, count, endpoint=False)
    r = scale * (7 + 2 * np.sin(3 * a) + 0.8 * np.cos(4 * a))
    return np.stack((r * np.cos(a), r * np.sin(a)), axis=1)


def circle(radius: float, count: int = 720) -> np.ndarray:
    a = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return radius * np.stack((np.cos(a), np.sin(a)), axis=1)


def stadium(straight: float, radius: float) -> np.ndarray:
    """Two straights joined by half circles of `radius`: legs 2 * radius apart."""
    a = np.linspace(-np.pi / 2, np.pi / 2, 40)
    arc = radius * np.stack((np.cos(a), np.sin(a)), axis=1)
    return np.vstack((arc + [straight, 0], -arc))


def curvature(closed: np.ndarray) -> np.ndarray:
    """1/m between the segments of an evenly spaced closed line, left positive."""
    x, y = (np.roll(closed, -1, axis=0) - closed).T
    heading = np.arctan2(y, x)
    return ((np.roll(heading, -1) - heading + np.pi) % (2 * np.pi) - np.pi) / np.hypot(x, y)


def distances(points: np.ndarray, line: Line) -> np.ndarray:
    return np.array([abs(line.project(p)[1]) for p in points])


def dense(closed: np.ndarray, step: float = 0.05) -> np.ndarray:
    line = Line(closed, True)
    return line.at(np.arange(0, line.length, step))


def area(closed: np.ndarray) -> float:
    x, y = closed.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


# --- the line ---


def test_projection_agrees_with_brute_force():
    rng = np.random.default_rng(0)
    line = Line(track.resample(car_loop(), 0.5, True), True)
    s = np.linspace(0, line.length, 100_000, endpoint=False)
    points = line.at(s)
    for point in rng.uniform(-11, 11, (50, 2)):
        along, offset = line.project(point)
        distance = np.hypot(*(points - point).T)
        assert abs(offset) == pytest.approx(distance.min(), abs=2e-3)
        assert np.hypot(*(line.at(along) - point)) == pytest.approx(abs(offset), abs=1e-9)


def test_offset_is_positive_on_the_left_and_along_wraps():
    line = Line(circle(5.0), True)  # counter-clockwise: the inside is on the left
    assert line.project((4.0, 0.0))[1] == pytest.approx(1.0, abs=1e-3)
    assert line.project((6.0, 0.0))[1] == pytest.approx(-1.0, abs=1e-3)
    assert line.at(line.length + 1.0) == pytest.approx(line.at(1.0))
    assert line.at(np.array([-1.0, 2.0])) == pytest.approx(np.stack((line.at(-1.0), line.at(2.0))))
    assert line.heading(0.0) == pytest.approx(np.pi / 2, abs=1e-6)
    assert abs(float(line.heading(line.length / 4))) == pytest.approx(np.pi, abs=1e-2)


def test_an_open_line_stops_at_its_ends():
    line = Line(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 3.0]]), False)
    assert line.length == pytest.approx(5.0)
    assert line.at(9.0) == pytest.approx([2.0, 3.0])
    assert line.at(-1.0) == pytest.approx([0.0, 0.0])
    assert line.project((2.5, 4.0)) == pytest.approx((5.0, -np.hypot(0.5, 1.0)))
    assert float(line.heading(4.9)) == pytest.approx(np.pi / 2)


def test_projection_near_an_index_never_jumps_to_the_neighbouring_stretch():
    line = Line(track.resample(stadium(20.0, 0.8), 0.25, True), True)
    low = line.project((10.0, -0.8))
    nearer_to_the_other = (10.0, 0.2)
    assert abs(line.project(nearer_to_the_other)[0] - low[0]) > 15
    near = line.project(nearer_to_the_other, near=low[0])
    assert near[0] == pytest.approx(low[0], abs=0.3)
    assert near[1] == pytest.approx(1.0, abs=0.01)


def test_projection_near_moves_on_over_long_segments():
    line = Line(np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0]]), True)
    along = line.project((1.0, 0.0))[0]
    assert line.project((10.0, 1.0), near=along)[0] == pytest.approx(11.0)


@pytest.mark.parametrize("points", [[[0, 0]], [[1, 1], [1, 1]], [[0, 0], [np.nan, 1]], [0, 1, 2]])
def test_a_line_of_nothing_is_refused(points):
    with pytest.raises(TrackError):
        Line(np.array(points, float), True)


def test_resampling_is_even_and_follows_a_sparse_curve():
    points = track.resample(circle(5.0, 24), 0.25, True)
    gaps = np.hypot(*(np.roll(points, -1, axis=0) - points).T)
    assert gaps.max() / gaps.min() < 1.01
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert np.abs(np.hypot(*points.T) - 5.0).max() < 0.005  # chords alone would be 0.04 m off
    ends = track.resample(np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), 0.5, False)
    assert ends == pytest.approx(np.stack((np.arange(7) / 2, np.zeros(7)), axis=1))


# --- walls ---


@pytest.mark.parametrize("width", [1.0, 1.5])
def test_walls_are_half_a_width_from_a_smooth_line(width):
    center = track.resample(car_loop(), 0.25, True)
    line = Line(center, True)
    found = track.walls(center, width)
    assert len(found) == 2  # outside and inside
    for wall in found:
        assert np.abs(distances(dense(wall), line) - width / 2).max() < 0.02
        assert len(wall) < 300


def test_walls_enclose_the_line():
    center = track.resample(car_loop(), 0.5, True)
    outer, inner = (area(w) for w in track.walls(center, 1.5))
    assert outer > 0 > inner  # the corridor is on the left of both
    # Pappus: the corridor's area is its width times the length of the line
    assert outer + inner == pytest.approx(1.5 * Line(center, True).length, rel=0.01)


def test_a_tight_hairpin_does_not_fold():
    """A bend of 0.3 m radius in a corridor 0.75 m to either side: its inner wall is a corner."""
    a = np.linspace(np.pi, 2 * np.pi, 12)[:, None]
    v = np.vstack(([[-3.0, 6.0]], 0.3 * np.hstack((np.cos(a), np.sin(a))), [[3.0, 6.0]]))
    center = track.resample(np.vstack((v, [[3.0, 12.0], [-3.0, 12.0]])), 0.1, True)
    line = Line(center, True)
    walls = track.walls(center, 1.5)
    assert len(walls) == 2
    for wall in walls:
        assert distances(dense(wall), line).min() > 0.75 - 0.02  # a folded offset curve would come closer
        ends = np.roll(wall, -1, axis=0)
        for i in range(len(wall)):  # and would cross itself
            assert not crosses(wall[i], ends[i], wall, ends).any()


def crosses(a: np.ndarray, b: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (
            r[..., 0] - p[..., 0]
        )

    return (side(a, b, starts) * side(a, b, ends) < -1e-12) & (
        side(starts, ends, a) * side(starts, ends, b) < -1e-12
    )


def test_walls_of_an_open_course_close_round_its_ends():
    (wall,) = track.walls(np.array([[0.0, 0.0], [5.0, 0.0]]), 1.0, loop=False)
    assert area(wall) == pytest.approx(5.0 + np.pi / 4, rel=0.01)
    assert wall[:, 0].min() == pytest.approx(-0.5, abs=0.02)


def test_joined_stretches_are_refused_with_a_remedy_that_works():
    center = stadium(20.0, 0.6)  # legs 1.2 m apart
    with pytest.raises(
        TrackError,
        match=r"1\.20 m apart, too little for a width of 2 m; use --length \d+ .* --width 1\.1",
    ) as e:
        track.walls(center, 2.0)
    words = str(e.value).split()
    line = Line(center, True)
    length = float(words[words.index("--length") + 1])
    assert length == pytest.approx(line.length * 2.0 / 1.2, rel=0.05)
    assert len(track.walls(center * length / line.length, 2.0)) == 2
    assert len(track.walls(center, float(words[words.index("--width") + 1]))) == 2


def test_a_course_that_crosses_itself_is_refused():
    a = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    with pytest.raises(TrackError, match="does not cross itself"):
        track.walls(np.stack((10 * np.sin(a), 5 * np.sin(2 * a)), axis=1), 1.0)


def test_near_stretches_may_join():
    """Legs of a short hairpin, less than 10 m apart along the track, may share their floor."""
    center = track.resample(
        np.array([[0, 0], [6, 0], [6, 6], [3.4, 6], [3.2, 3.5], [3.0, 6], [0, 6.0]]), 0.2, True
    )
    assert len(track.walls(center, 1.5)) == 2


def test_stretches_that_join_and_part_again_leave_an_island():
    """A keyhole: its neck is narrower than the corridor, its eye is wider."""
    a = np.linspace(-1.15, np.pi + 1.15, 60)
    eye = 1.2 * np.stack((np.cos(a), np.sin(a)), axis=1) + [0.0, 1.6]
    before = np.array([[6.0, -6.0], [6.0, -0.8], [1.0, -0.8], [0.45, -0.4]])
    center = track.resample(np.vstack((before, eye, before[::-1] * [-1, 1])), 0.1, True)
    line = Line(center, True)
    walls = track.walls(center, 1.5)
    assert len(walls) == 3
    for wall in walls:  # no wall across the neck
        assert np.abs(distances(dense(wall), line) - 0.75).max() < 0.02


def test_stretches_that_almost_join_keep_a_wall_between_them():
    walls = track.walls(stadium(20.0, 0.6), 1.17)  # 3 cm
    assert len(walls) == 2
    assert min(area(w) for w in walls) == pytest.approx(-20.0 * 0.03, abs=0.1)
    with pytest.raises(TrackError, match="joins itself"):
        track.walls(stadium(20.0, 0.6), 1.19)


@pytest.mark.parametrize("width", [0.0, -1.0, np.nan, np.inf])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(TrackError, match="width"):
        track.walls(car_loop(200), width)


# --- CSV ---

HEADER = "# x_m,y_m,w_tr_right_m,w_tr_left_m\n"


def write(
    path: Path, points: np.ndarray, right: float = 5.0, left: float = 6.0, header: str = HEADER
) -> Path:
    rows = "".join(f"{x:.6f},{y:.6f},{right},{left}\n" for x, y in points)
    path.write_text(header + rows, encoding="utf-8")
    return path


def test_a_csv_is_scaled_to_its_length(tmp_path):
    path = write(tmp_path / "t.csv", car_loop(400, scale=50.0))
    center, width = track.read_csv(path, length_m=80.0)
    assert Line(center, True).length == pytest.approx(80.0)
    scale = 80.0 / Line(car_loop(400, scale=50.0), True).length
    assert width == pytest.approx(11.0 * scale, rel=1e-6)
    assert track.read_csv(path, 80.0, 1.4)[1] == 1.4
    assert track.read_csv(path)[0] == pytest.approx(car_loop(400, scale=50.0), abs=1e-5)


def test_a_csv_may_repeat_its_first_point_and_order_its_columns_otherwise(tmp_path):
    points = circle(10.0, 30)
    rows = "".join(f"{y}, {x}\r\n" for x, y in np.vstack((points, points[:1])))
    path = tmp_path / "t.csv"
    path.write_text("\ufeff# made by hand\r\n# y_m, x_m\r\n" + rows + "\r\n", encoding="utf-8")
    center, width = track.read_csv(path, width_m=1.0)
    assert center == pytest.approx(points)
    assert width == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "0 points"),
        (HEADER + "0,0,1,1\n1,0,1,1\n", "2 points"),
        (HEADER + "0,0,1,1\n" * 9, "at least 4 different"),
        ("0,0,1,1\n1,0,1,1\n", ":1: '0,0,1,1' does not give x_m, y_m, .*'# x_m,y_m"),
        ("# x_m,w_tr_right_m,w_tr_left_m\n0,1,1\n", ":2: '0,1,1' does not give x_m, y_m"),
        ("# x_m,y_m\n0,0\n", ":2: '0,0' does not give .*w_tr_right_m.*with --width no w are needed"),
        (HEADER + "0,0,1,1\n1,zero,1,1\n", ":3: '1,zero,1,1' does not"),
        (HEADER + "0,0,1,1\n1,nan,1,1\n", ":3: '1,nan,1,1' does not"),
        (HEADER + "0,0,1,1\n1,1,-1,1\n", ":3: '1,1,-1,1' does not"),
        (HEADER + "0,0,1,1\n1,1\n", ":3: '1,1' does not"),
    ],
)
def test_a_broken_csv_says_where_and_why(tmp_path, text, says):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TrackError, match=says) as error:
        track.read_csv(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_files_that_are_no_csv_are_refused(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00" * 100)
    for path in (tmp_path / "none.csv", tmp_path / "b.csv", tmp_path):
        with pytest.raises(TrackError, match="cannot be read as a centre-line CSV") as error:
            track.read_csv(path)
        assert str(error.value).startswith(str(path))
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(TrackError, match="length must be a positive"):
            track.read_csv(write(tmp_path / "t.csv", circle(5.0)), length_m=bad)


# --- a lap in a recording ---


def drive(laps: float, seed: int = 0, start: float = 3.0, step: float = 0.1) -> np.ndarray:
    """Positions at 10 Hz of a drive at 1 m/s along the loop, wandering and measured with noise."""
    rng = np.random.default_rng(seed)
    line = Line(track.resample(car_loop(), 0.25, True), True)
    s = start + np.arange(0, laps * line.length, step)
    heading = line.heading(s)
    side = 0.25 * np.sin(s / 7.0 + rng.uniform(0, 6))[:, None]
    normal = np.stack((-np.sin(heading), np.cos(heading)), axis=1)
    return line.at(s) + side * normal + rng.normal(0, 0.015, (len(s), 2))


@pytest.mark.parametrize("laps", [1.02, 1.3, 3.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_lap_is_found(laps, seed):
    standing = np.random.default_rng(5).normal(0, 0.01, (300, 2))
    driven = drive(laps, seed)
    driven = np.vstack((driven[0] + standing, driven, driven[-1] + standing))
    start, stop = track.find_loop(driven, 10)
    lap = driven[start:stop]
    assert np.hypot(*(driven[stop] - driven[start])) < 1.0
    assert 480 < len(lap) < 580  # without the half minutes of standing
    length = Line(track.resample(car_loop(), 0.25, True), True).length
    assert np.hypot(*np.diff(track.lap_line(lap), axis=0).T).sum() == pytest.approx(length, rel=0.04)


def test_the_lap_with_the_crash_is_not_chosen():
    """On the first lap the car stops at 20 m, backs off and goes on, twice; the second is clean."""
    driven = drive(2.2, seed=3)
    back = driven[200:180:-1]
    spoilt = np.vstack((driven[:200], back, driven[180:200], back, driven[180:]))
    start, stop = track.find_loop(spoilt, 10)
    assert 500 < stop - start < 560
    assert start > 180 + 20  # after the crash


def test_a_drive_that_never_closes_is_refused():
    with pytest.raises(TrackError, match=r"never closes: it ends \d\.\d m from its start"):
        track.find_loop(drive(0.9), 10)
    with pytest.raises(TrackError, match="only 0.2 m long"):
        track.find_loop(np.zeros((100, 2)), 10)
    with pytest.raises(TrackError, match="only 0.0 m long"):
        track.find_loop(np.zeros((0, 2)), 10)


def test_the_lap_line_is_smooth_and_true():
    driven = drive(1.4, seed=1)
    start, stop = track.find_loop(driven, 10)
    line = track.lap_line(driven[start:stop])
    gaps = np.hypot(*(np.roll(line, -1, axis=0) - line).T)
    assert gaps.max() < 0.26  # no step where it closes
    center = Line(track.resample(car_loop(), 0.25, True), True)
    assert distances(line, center).max() < 0.25 + 0.08
    assert np.abs(curvature(line)).max() < 1.8  # the course itself: 1.2
    with pytest.raises(TrackError, match="too short"):
        track.lap_line(np.zeros((50, 2)))


# --- checkpoints ---


@pytest.mark.parametrize("count", [2, 4, 6, 8, 12])
def test_checkpoints_are_in_order_on_the_line_ahead_of_the_start(count):
    center = track.resample(car_loop(), 0.25, True)
    line = Line(center, True)
    points, radius = track.place_checkpoints(center, count, center, 1.5)
    assert points.shape == (count, 2)
    s = np.array([line.project(p)[0] for p in points])
    s[1:] = np.where(s[1:] < s[0], s[1:] + line.length, s[1:])
    assert (np.diff(s) > 0).all() and s[-1] - s[0] < line.length
    assert s[0] >= radius  # it is still ahead of a car at the start
    assert distances(points, line).max() < 1e-6
    again, _ = track.place_checkpoints(center, count, center, 1.5)
    assert (points == again).all()


def test_checkpoints_cannot_be_driven_past():
    driven = drive(1.3)
    start, stop = track.find_loop(driven, 10)
    lap = track.lap_line(driven[start:stop])
    center = track.resample(car_loop(), 0.25, True)
    points, radius = track.place_checkpoints(lap, 6, center, 1.5)
    walls = [dense(w) for w in track.walls(center, 1.5)]
    for point in points:  # the circle reaches over both walls
        assert all(np.hypot(*(w - point).T).min() < radius - 0.15 for w in walls)
    assert track.place_checkpoints(lap, 6)[1] == track.RADIUS_M


def test_the_first_checkpoint_is_ahead_of_the_courses_start_wherever_the_lap_began():
    center = track.resample(car_loop(), 0.25, True)
    laps = [np.roll(center, k, axis=0) for k in (0, 50, 120)]
    placed = [track.place_checkpoints(lap, 6, center, 1.5)[0][0] for lap in laps]
    assert max(np.hypot(*(p - placed[0])) for p in placed) < 1.0


def test_checkpoints_say_more_than_evenly_spaced_ones():
    center = track.resample(car_loop(), 0.25, True)
    line = Line(center, True)
    points, _ = track.place_checkpoints(center, 8, center, 1.5)
    placed = worst_stray(line, points)
    even = min(
        worst_stray(line, line.at((np.arange(8) + k) * line.length / 8)) for k in (0.0, 0.25, 0.5, 0.75)
    )
    assert placed < 0.85
    assert placed < 0.75 * even


def worst_stray(line: Line, points: np.ndarray) -> float:
    polygon = Line(points, True)
    s = sorted(line.project(p)[0] for p in points)
    return max(abs(polygon.project(line.at(float(k)))[1]) for k in np.arange(s[0], s[0] + line.length, 0.1))


def test_a_hairpin_gets_a_checkpoint_at_its_end():
    """Between two walls 2 m apart the way straight on would lead through them."""
    points, _ = track.place_checkpoints(stadium(16.0, 1.0), 4, None, 1.5)
    assert points[:, 0].max() > 15.0 and points[:, 0].min() < 1.0


def test_the_number_of_checkpoints_is_chosen_by_the_length():
    few, _ = track.place_checkpoints(circle(2.0), None, circle(2.0), 1.5)
    many, _ = track.place_checkpoints(track.resample(car_loop(), 0.25, True), None, None, 1.5)
    assert len(few) == 4 and len(many) == 8


@pytest.mark.parametrize("count", [0, 1, 51])
def test_an_unusual_number_of_checkpoints_is_refused(count):
    with pytest.raises(TrackError, match="a course takes 2 to 50"):
        track.place_checkpoints(car_loop(200), count)


# --- task files ---


def test_the_task_text_is_toml_to_the_millimetre():
    center = track.resample(car_loop(), 0.5, True) - [0.0, 1e-5]
    points, radius = track.place_checkpoints(center, 5, center, 2.0)
    data = tomllib.loads(track.task_toml(center, 2.0, points, radius, hz=12.5))
    assert data["task"] == {"robot": "car", "kind": "course", "hz": 12.5, "episode_s": 60}
    assert data["course"]["loop"] is True and data["course"]["width_m"] == 2.0
    assert np.array(data["course"]["centerline"]) == pytest.approx(center, abs=5.1e-4)
    assert np.array([c["at"] for c in data["checkpoint"]]) == pytest.approx(points, abs=5.1e-4)
    assert {c["radius_m"] for c in data["checkpoint"]} == {radius}
    floor = tomllib.loads(track.task_toml(np.zeros((0, 2)), 0.0, points, radius))
    assert floor["course"] == {"loop": True}


@pytest.mark.parametrize(("name", "length"), [("car-loop", 52.9), ("hook", 50.3)])
def test_shipped_courses_are_what_they_are_called(name, length):
    data = tomllib.loads((TASKS / f"{name}.toml").read_text(encoding="utf-8"))
    center = np.array(data["course"]["centerline"])
    line = Line(center, True)
    assert line.length == pytest.approx(length, abs=0.1)
    reference = car_loop() if name == "car-loop" else track.read_csv(TASKS / "hook.csv")[0]
    assert distances(center, Line(reference, True)).max() < 0.01
    assert curvature(center).min() < -0.3 and curvature(center).max() > 0.3  # bends both ways
    assert len(track.walls(center, data["course"]["width_m"])) == 2
    assert 4 <= len(data["checkpoint"]) <= 8
