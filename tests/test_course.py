"""The course: rewards, checkpoints, laps and trouble from readings made by hand; false trips on the twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.drivers.base import Reading
from tether.drivers.car import CHANNELS, COMMAND
from tether.launch import catalog
from tether.launch.evaluate import pursuit
from tether.robot_env import course
from tether.robot_env.course import Course
from tether.robot_env.env import RobotEnv
from tether.robot_env.reset import COLLISION_MPS2, FAIL_PENALTY, Wheeled
from tether.robot_env.safety import CLAMPS
from tether.robot_env.task import TaskError, parse

from tests.conftest import square

REST = np.zeros(2, np.float32)


def make(hindsight: float = 0.0) -> Course:
    spec = parse(square("car", hindsight=hindsight), "square")
    return Course(spec, CHANNELS, COMMAND, Wheeled(COMMAND, spec.hz))


def reading(x=0.0, y=0.0, heading=0.0, v=(0.0, 0.0), up=9.81, shock=0.0, time=0.0) -> Reading:
    values = {c.name: np.zeros(c.size, np.float32) for c in CHANNELS}
    values |= {
        "pose": np.array([x, y, math.cos(heading), math.sin(heading)], np.float32),
        "velocity": np.array(v, np.float32), "accel": np.array([0, 0, up], np.float32),
        "shock": np.array([shock], np.float32),
    }  # fmt: skip
    return Reading(values, dict.fromkeys(values, time))


# --- goal, reward, laps


def test_the_first_goal_is_the_next_checkpoint_along_the_course():
    task = make()
    goals = [task.begin(reading(*at)).goal for at in ((0, 0), (6.5, 0), (10, 7), (2, 10), (0, 0.5))]
    assert goals == [0, 1, 2, 3, 0]
    assert task.begin(reading(5.2, 0.0)).goal == 1  # not the one it stands in


def test_it_starts_on_the_line_facing_along_it():
    task = make()
    x, y, heading = task.start
    assert task.line.project((x, y))[1] == pytest.approx(0.0, abs=1e-3)
    ahead = task.line.at(0.5) - task.line.at(-0.5)
    assert math.atan2(ahead[1], ahead[0]) == pytest.approx(heading, abs=0.3)
    for name in ("car-loop", "hook"):
        shipped = catalog.make_task(catalog.load_spec(name))
        x, y, heading = shipped.start
        goal = np.array(shipped.spec.checkpoints[shipped.begin(reading(x, y, heading)).goal].at)
        assert (goal - (x, y)) @ (
            math.cos(heading),
            math.sin(heading),
        ) > 0  # and towards its first checkpoint


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-4, 4), st.floats(-2, 5), st.floats(-2, 2))
def test_the_reward_is_the_speed_towards_the_checkpoint(x, y, heading, forward, left):
    task = make()
    progress = task.begin(reading(0, 0))
    outcome = task.advance(progress, REST, reading(x, y, heading, (forward, left)))
    c, s = math.cos(heading), math.sin(heading)
    velocity = np.array([c * forward - s * left, s * forward + c * left])  # in the map
    to_goal = np.array([5.0, 0.0]) - np.float32([x, y])
    assert outcome.reward == pytest.approx(velocity @ to_goal / np.linalg.norm(to_goal), abs=1e-4)
    assert not outcome.terminated and not outcome.truncated and not outcome.reset


def test_a_checkpoint_is_reached_within_its_radius_and_the_reward_is_for_the_one_pursued():
    task = make()
    progress = task.begin(reading())
    assert progress.goal == 0
    outcome = task.advance(progress, REST, reading(3.99, 0.0, 0.0, (2.0, 0.0)))
    assert progress.goal == 0
    outcome = task.advance(progress, REST, reading(4.01, 0.0, 0.0, (2.0, 0.0)))
    assert progress.goal == 1 and outcome.reward == pytest.approx(2.0)  # towards (5, 0), not (10, 5)


def around(task: Course, progress, laps: float, bump_at: float = -1.0, dt: float = 0.1):
    """Events of driving along the line at 2 m/s; `bump_at` s a collision."""
    out, length = [], task.line.length
    for k in range(round(laps * length / (2.0 * dt))):
        s = 2.0 * dt * k
        x, y = task.line.at(s)
        shock = 50.0 if abs(k * dt - bump_at) < dt / 2 else 0.0
        out.append(
            task.advance(progress, REST, reading(x, y, task.line.heading(s), (2.0, 0.0), 9.81, shock, k * dt))
        )
    return out


def test_laps_are_counted_and_timed_from_checkpoint_to_checkpoint():
    task = make()
    progress = task.begin(reading())
    events = [o.events for o in around(task, progress, 3.3)]
    laps = [e["lap_time_s"] for e in events if "lap_time_s" in e]
    assert laps == pytest.approx([task.line.length / 2.0] * 3, abs=0.11)
    assert [e["lap_clean"] for e in events if "lap_time_s" in e] == [1.0, 1.0, 1.0]
    assert sum("lap_started" in e for e in events) == 4


def test_a_lap_with_a_collision_is_not_clean_and_the_next_one_is():
    task = make()
    outcomes = around(task, task.begin(reading()), 3.3, bump_at=10.0)
    assert [o.events["lap_clean"] for o in outcomes if "lap_time_s" in o.events] == [0.0, 1.0, 1.0]
    bump = next(o for o in outcomes if "collision" in o.events)
    assert bump.terminated and not bump.truncated and bump.reset
    assert bump.reward < 2.0 - FAIL_PENALTY - 4.9  # up to 5 for the force of the hit


def test_driving_backwards_through_checkpoints_is_no_lap():
    task = make()
    progress = task.begin(reading())
    for k in range(390):  # almost two laps
        s = -0.2 * k
        x, y = task.line.at(s)
        outcome = task.advance(
            progress, REST, reading(x, y, task.line.heading(s) + math.pi, (2, 0), time=k * 0.1)
        )
        assert "lap_time_s" not in outcome.events


# --- trouble


def test_a_flip_terminates_on_the_roof_at_once_and_on_the_side_after_a_while():
    task = make()
    progress = task.begin(reading())
    outcome = task.advance(progress, REST, reading(up=-9.0))
    assert outcome.terminated and outcome.events == {"flip": 1.0} and outcome.reset
    progress = task.begin(reading())
    seen = ["flip" in task.advance(progress, REST, reading(x=k, up=0.5)).events for k in range(5)]
    assert seen == [False] * 4 + [True]
    progress = task.begin(reading())
    for k in range(20):  # kerbs and jumps are shorter
        assert "flip" not in task.advance(progress, REST, reading(x=k, up=0.5 if k % 4 else 9.8)).events


def test_stuck_truncates_after_three_seconds_within_a_foot():
    task = make()
    progress = task.begin(reading())
    seen = [task.advance(progress, REST, reading(x=-2 + 0.1 * (k % 3))) for k in range(40)]
    first = next(k for k, o in enumerate(seen) if o.events)
    assert first == 30 and seen[first].events == {"stuck": 1.0}
    assert seen[first].truncated and not seen[first].terminated and seen[first].reset
    progress = task.begin(reading())
    for k in range(100):  # slow is not stuck
        assert not task.advance(progress, REST, reading(x=-2 + 0.011 * k)).events


def test_the_line_stays_between_the_walls_also_where_its_points_are_far_apart():
    task = make()
    for line in (task, catalog.make_task(catalog.load_spec("car-loop"))):
        points = line.line.at(np.arange(0, line.line.length, 0.1))
        free = min(np.linalg.norm(points[:, None] - wall[None], axis=-1).min() for wall in line.walls())
        assert free > 0.9 * line.spec.course.width_m / 2
    assert (
        np.abs(task.line.at(np.arange(0, 40, 0.1)).clip(0, 10) - task.line.at(np.arange(0, 40, 0.1))).max()
        < 0.2
    )


def test_a_robot_without_the_channels_is_refused():
    with pytest.raises(TaskError, match="no channel shock"):
        Course(
            parse(square("car"), "square"),
            tuple(c for c in CHANNELS if c.name != "shock"),
            COMMAND,
            Wheeled(COMMAND, 10.0),
        )


# --- hindsight


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0]))
def test_hindsight_is_what_the_task_would_have_given_for_the_new_goal(seed, share):
    rng = np.random.default_rng(seed)
    task, n = make(share), 24
    progress = task.begin(reading())
    rows: dict[str, list] = {"obs": [], "next_obs": [], "reward": [], "discount": []}
    pairs = []
    now = reading(0, 0)
    for k in range(n):  # a walk that passes checkpoints, and collides now and then
        s = 0.9 * (k + 1)
        x, y = task.line.at(s) + rng.normal(0, 0.2, 2)
        then = reading(x, y, rng.uniform(-3, 3), rng.normal(0, 2, 2), 9.81, 40.0 * (rng.random() < 0.2))
        rows["obs"].append(task.observe(progress, now, REST))
        outcome = task.advance(progress, REST, then)
        rows["next_obs"].append(task.observe(progress, then, REST))
        rows["reward"].append(outcome.reward)
        rows["discount"].append(0.0 if outcome.terminated else 0.97)
        pairs.append((now, then))
        now = then
    batch = {k: np.array(v, np.float32) for k, v in rows.items()}
    kept = {k: v.copy() for k, v in batch.items()}
    future = batch["next_obs"][rng.integers(0, n, n)]
    out = task.in_hindsight(batch, future, rng)
    assert all((batch[k] == kept[k]).all() for k in kept)  # a sampled batch is nobody's to change
    at = slice(-3 - 2 * len(course.PREVIEW_M) - 2, -2 * len(course.PREVIEW_M) - 2)
    changed = (out["obs"][:, at] != kept["obs"][:, at]).any(1)
    assert changed.all() if share == 1.0 else changed.any() and not changed.all()
    future_places = future[:, task._observer.places["pose"]][:, :2] * 5.0
    drawn = course._goals(np.array([before.values["pose"] for before, _ in pairs]), out["obs"][:, at])
    for i, (before, after) in enumerate(pairs):
        assert (np.delete(out["obs"][i], np.r_[at]) == np.delete(kept["obs"][i], np.r_[at])).all()
        if not changed[i]:
            assert all((out[k][i] == kept[k][i]).all() for k in kept)
            continue
        # the same steps, judged by a course whose only goal is the one drawn
        judge = make()
        judge._goals = np.tile(drawn[i], (4, 1))
        progress = judge.begin(before)
        progress.goal = 0
        assert judge.observe(progress, before, REST) == pytest.approx(out["obs"][i], abs=2e-4)
        outcome = judge.advance(progress, REST, after)
        progress.goal = 0
        if np.linalg.norm(drawn[i] - after.values["pose"][:2]) < 0.1:
            continue  # on the spot no direction is right
        assert outcome.reward == pytest.approx(out["reward"][i], abs=3e-3)
        assert judge.observe(progress, after, REST) == pytest.approx(out["next_obs"][i], abs=2e-3)
        assert out["discount"][i] == kept["discount"][i]
    near = np.linalg.norm(drawn - future_places, axis=1) < 1e-3
    if share == 1.0:
        assert near.any() and not near.all()  # half of the goals are places it came to


# --- the detectors on the twin: never without a reason, always with one


def pursue(speed: float, lookahead: float, seconds: float, seed: int) -> list[float]:
    """Shocks of clean driving; fails on an event while the twin touches nothing."""
    env = catalog.make_env(catalog.make_task(catalog.load_spec("car-loop")), seed=seed)
    assert isinstance(env, RobotEnv)
    try:
        obs, _ = env.reset()
        driver = pursuit(env, speed, lookahead)
        shocks = []
        for _ in range(round(seconds * 10)):
            obs, _, _, truncated, info = env.step(driver(obs, env.action))
            assert env.robot.truth()["contacts"] == 0, (
                f"{speed} m/s is too fast to tell false trips from true ones"
            )
            assert not {"collision", "flip", "stuck"} & set(info), (speed, info)
            assert not set(info["faults"]) - set(CLAMPS), (speed, info)
            shocks.append(float(env.reading.values["shock"][0]))
            if truncated:
                obs, _ = env.reset()
        return shocks
    finally:
        env.close()


PACES = ((1.0, 0.8), (1.5, 1.0), (2.0, 0.6), (2.5, 1.0), (3.0, 1.2), (3.5, 1.2))


def test_no_false_trips_in_three_minutes_of_pure_pursuit():
    pytest.importorskip("mujoco")
    shocks = [s for i, (speed, ahead) in enumerate(PACES) for s in pursue(speed, ahead, 30.0, i)]
    assert max(shocks) < 0.7 * COLLISION_MPS2  # and not by a hair


@pytest.mark.slow
def test_no_false_trips_in_an_hour_of_pure_pursuit():
    for i, (speed, ahead) in enumerate(PACES):
        pursue(speed, ahead, 600.0, 100 + i)


def test_a_wall_is_always_felt_at_a_metre_and_a_half_a_second():
    pytest.importorskip("mujoco")
    env = catalog.make_env(catalog.make_task(catalog.load_spec("car-loop")))
    assert isinstance(env, RobotEnv)
    rng = np.random.default_rng(0)
    env.reset()
    try:
        for k in range(12):
            s = rng.uniform(0, env.task.line.length)
            angle = (-1) ** k * rng.uniform(0.6, 1.4)  # to the walls, left and right
            env.robot.place((*map(float, env.task.line.at(s)), float(env.task.line.heading(s)) + angle))
            env._progress, contacts = None, env.robot.truth()["contacts"]
            env._start(None)
            wish = COMMAND.to_action(np.array([rng.uniform(2.0, 4.5), 0.0]))
            for _ in range(20):
                speed = env.robot.truth()["speed"]
                _, _, terminated, _, info = env.step(wish)
                if terminated or env.robot.truth()["contacts"] > contacts:
                    break
            if not terminated:  # touched at the end of a tick: felt within a sensor's latency
                _, _, terminated, _, info = env.step(wish)
            assert terminated and {"collision", "flip"} & set(info), (k, speed, angle, info)
    finally:
        env.close()
