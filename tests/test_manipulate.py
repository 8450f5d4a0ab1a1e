"""Manipulation on a tool that does what it is told: checkpoints, rewards, the scripted hand and its way back."""

from __future__ import annotations

import numpy as np
import pytest
from tether.drivers import arm
from tether.drivers.base import Reading, Twin
from tether.launch import catalog, teach
from tether.launch.evaluate import Tally
from tether.robot_env import hand
from tether.robot_env.env import RobotEnv
from tether.robot_env.hand import PutBack
from tether.robot_env.manipulate import Manipulate, shown_task
from tether.robot_env.rate import Rate
from tether.robot_env.record import Record, read_recording
from tether.robot_env.safety import Gate
from tether.robot_env.sample import samples
from tether.robot_env.task import TaskError, load, parse

REST = arm.COMMAND.to_action(np.array(arm.HOME))
CUBE_M = 0.015  # half its edge
TOP_M = 0.4  # as wide as the table is either way


class Ideal:
    """A tool that is where it is told to be, a tick later; jaws that hold what is between them when they close."""

    channels, command = arm.CHANNELS, arm.COMMAND

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.time, self.placed, self.stopped = 0.0, 0, 0
        self.tool, self.jaws, self.held = np.array(arm.HOME[:3]), arm.HOME[3], False
        self.object = np.array([0.25, 0.05, CUBE_M])
        self.told = np.array(arm.HOME)

    def open(self) -> None: ...

    def close(self) -> None: ...

    def stop(self) -> None:
        self.stopped += 1

    def read(self) -> Reading:
        joints = np.append(arm.inverse(self.tool), self.jaws)
        seen = self.object + 1e-4 * self._rng.standard_normal(3)
        values = {"joint_position": joints, "tool": self.tool, "object": seen}
        values |= {name: np.zeros(6) for name in ("joint_velocity", "load")}
        return Reading(
            {k: np.array(v, np.float32) for k, v in values.items()}, dict.fromkeys(values, self.time - 0.01)
        )

    def write(self, command: np.ndarray) -> None:
        self.told = command

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        before, self.tool = self.tool, self.told[:3].copy()
        self.jaws = self.told[3]
        closed = self.jaws < 0.3
        self.held = closed and (self.held or bool(np.linalg.norm(self.object - self.tool) < 0.012))
        if self.held:
            self.object = self.object + self.tool - before
        elif self.object[2] > CUBE_M or np.abs(self.object[:2]).max() > TOP_M:
            self.object[2] = CUBE_M if np.abs(self.object[:2]).max() < TOP_M else -0.7

    def place(self, pose: tuple[float, float, float]) -> None:
        self.placed += 1
        self.tool, self.jaws, self.held = np.array(arm.HOME[:3]), arm.HOME[3], False
        self.object = np.array([*self._rng.uniform((0.1, -0.15), (0.36, 0.15)), CUBE_M])

    def truth(self) -> dict[str, float]:
        return {"x": 0.0, "y": 0.0, "heading": 0.0, "speed": 0.0, "upright": 1.0, "contacts": 0.0, "touching": 0.0}


def make(name: str = "arm-pick", seed: int = 0, **changes: str) -> tuple[RobotEnv, list[Record]]:
    spec = load(name)
    for old, new in changes.items():
        spec = parse(spec.text.replace(old, new), name)
    robot, task = Ideal(seed), catalog.make_task(spec)
    env = RobotEnv(robot, task, Gate(arm.COMMAND, catalog.limits(spec)), Rate(spec.hz, robot.now, robot.sleep))
    records: list[Record] = []
    env.on_record.append(records.append)
    return env, records


def tries(env: RobotEnv, records: list[Record], count: int, quality: float = 1.0, seed: int = 0) -> Tally:
    """So many tries of the scripted teacher."""
    tally, teacher = Tally(env), teach.shown(env, 0.2, quality, seed)
    env.source = "teacher"
    obs, _ = env.reset()
    while len(tally.returns) < count:
        _, _, terminated, truncated, _ = env.step(teacher(obs, env.action))
        if terminated or truncated:
            env.reset()
    return tally


def reading(tool=(0.2, 0.0, 0.12), thing=(0.25, 0.05, CUBE_M)) -> Reading:
    values = {"tool": tool, "object": thing, **{k: np.zeros(6) for k in ("joint_position", "joint_velocity", "load")}}
    return Reading({k: np.array(v, np.float32) for k, v in values.items()}, dict.fromkeys(values, 0.0))


def test_the_ideal_arm_is_a_twin():
    assert isinstance(Ideal(), Twin)


def test_it_observes_the_ways_between_tool_command_object_and_checkpoint():
    task = catalog.make_task(load("arm-pick"))
    action = arm.COMMAND.to_action(np.array([0.22, 0.01, 0.11, 0.3]))
    progress = task.begin(reading())
    for stage, gap in enumerate(((0.05, 0.05, CUBE_M - 0.12), (0.0, -0.05, 0.12 - CUBE_M))):
        progress.stage = stage
        obs = task.observe(progress, reading(), action)
        ahead, between = (0.02, 0.01, -0.01), (0.03, 0.04, CUBE_M - 0.11)
        known = *np.array([*ahead, *between, *gap]) / 0.1, *np.eye(2)[stage], *action
        assert obs.shape == (task.observation_size,) and obs[-len(known) :] == pytest.approx(known, abs=1e-5)


def test_the_script_passes_every_checkpoint_and_the_object_is_put_back_without_a_hand():
    env, records = make()
    tally = tries(env, records, 8)
    assert tally.successes == [1.0] * 8 and tally.returns == [1.0] * 8
    assert tally.episodes.interventions == 0 and env.robot.placed == 1
    low, high = env.task.spec.manipulate.area
    spots = [r.reading.values["object"] for a, r in zip(records, records[1:], strict=False)
             if a.action is None and r.source == "teacher"]  # fmt: skip
    assert len(spots) >= 7 and all((np.array(low) <= s[:2]).all() and (s[:2] <= high).all() for s in spots)
    assert np.std([s[:2] for s in spots], axis=0).min() > 0.04  # all over it
    assert {r.terminated for r in records if r.events.get("progress") == 1.0 and r.source == "teacher"} == {True}


def test_a_script_that_misses_fails_and_the_next_try_begins_at_home():
    env, records = make(**{"episode_s = 10": "episode_s = 6"})
    tally = tries(env, records, 20, quality=0.0)
    assert 0.1 < np.mean(tally.successes) < 0.9
    begins = [r for a, r in zip(records, records[1:], strict=False) if a.action is None and r.source == "teacher"]
    assert begins and max(np.linalg.norm(r.reading.values["tool"] - arm.HOME[:3]) for r in begins) < 0.02


def test_checkpoints_count_in_their_order_and_anew_from_home():
    task = catalog.make_task(load("arm-pick"))
    assert isinstance(task, Manipulate)
    progress = task.begin(reading())
    at_goal, at_object = (0.25, 0.0, 0.12), (0.25, 0.05, CUBE_M)
    advance = lambda tool, thing: task.advance(progress, REST, reading(tool, thing))  # noqa: E731
    assert advance((0.35, 0.1, 0.1), at_goal).events == {"progress": 0.0}  # held up by somebody: not in order
    assert advance(at_object, at_object).events == {"progress": 0.5}
    assert advance(arm.HOME[:3], at_object).events == {"progress": 0.0}
    assert advance(at_object, at_object).events == {"progress": 0.5}
    assert advance((0.25, 0.05, CUBE_M + 0.028), at_object).events == {"progress": 0.5}
    assert advance((0.25, 0.05, CUBE_M + 0.032), at_object).events == {"progress": 0.0}  # it slipped out
    assert advance((0.25, 0.0, 0.15), at_goal).events == {"progress": 0.0}
    assert advance(at_goal, at_goal).events == {"progress": 0.5}
    done = advance((0.25, 0.0, 0.14), at_goal)
    assert (done.reward, done.terminated, done.truncated, done.events) == (1.0, True, False, {"progress": 1.0})
    assert advance((0.25, 0.0, 0.15), at_goal).events == {"progress": 0.0}


def test_the_way_towards_a_checkpoint_is_worth_something_where_it_shall_be():
    env = catalog.make_task(load("arm-reach"))
    progress, total = env.begin(reading()), 0.0
    spots = np.linspace((0.2, 0.12, 0.1), (0.25, 0.05, CUBE_M), 20)
    for spot in spots:
        outcome = env.advance(progress, REST, reading(spot))
        total += outcome.reward
        if outcome.terminated:
            break
    assert outcome.terminated and total == pytest.approx(1.0 + 5.0 * np.linalg.norm(spots[0] - spots[-1]), abs=0.1)


def staged(*rows: str) -> Manipulate:
    """arm-pick with other checkpoints: "of near at"."""
    text = load("arm-pick").text
    for row in rows:
        of, near, at = row.split(maxsplit=2)
        text = text.partition("[[checkpoint]]")[0] if row is rows[0] else text
        text += f'[[checkpoint]]\nof = "{of}"\nnear = "{near}"\nat = {at}\nradius_m = 0.015\n'
    task = catalog.make_task(parse(text, "staged"))
    assert isinstance(task, Manipulate)
    return task


def test_what_slipped_is_gripped_again_however_far_it_came():
    task = staged("tool object [0, 0, 0]", "object map [0.25, 0.05, 0.07]", "object map [0.25, 0.0, 0.12]")
    progress, on_table, up = task.begin(reading()), (0.25, 0.05, CUBE_M), (0.25, 0.05, 0.07)
    reached = [
        task.advance(progress, REST, reading(tool, thing)).events["progress"]
        for tool, thing in ((on_table, on_table), (up, up), (up, on_table), (on_table, on_table))
    ]
    assert reached == pytest.approx([1 / 3, 2 / 3, 0.0, 1 / 3])


def test_a_tool_need_not_stay_where_nothing_is_gripped():
    """Above the object, and after it was touched."""
    thing = (0.25, 0.05, CUBE_M)
    for task, ways in (
        (staged("tool object [0, 0, 0.07]", "tool object [0, 0, 0]", "object map [0.25, 0.0, 0.12]"),
         ((0.25, 0.05, CUBE_M + 0.07), (0.25, 0.05, CUBE_M + 0.04), thing)),
        (staged("tool object [0, 0, 0]", "tool map [0.3, 0.0, 0.1]"), (thing, (0.25, 0.05, 0.1))),
    ):  # fmt: skip
        progress = task.begin(reading())
        found = [task.advance(progress, REST, reading(way, thing)).events["progress"] for way in ways]
        assert found == sorted(found) and found[0] > 0.0


def test_a_way_made_twice_is_worth_no_more():
    task = catalog.make_task(parse(load("arm-pick").text.replace('"sparse"', '"progress"'), "arm-pick"))
    on_table, up = (0.25, 0.05, CUBE_M), (0.25, 0.0, 0.07)
    lifts_and_drops = (on_table, on_table), (up, up), ((0.25, 0.05, 0.12), up), ((0.25, 0.05, 0.12), on_table)
    progress, total, sums = task.begin(reading()), 0.0, []
    for _ in range(4):
        for tool, thing in lifts_and_drops:
            total += task.advance(progress, REST, reading(tool, thing)).reward
        sums.append(total)
    assert sums == pytest.approx([sums[0]] * 4)


def test_an_object_that_leaves_its_area_ends_the_try_and_one_that_cannot_be_reached_needs_a_hand():
    task = catalog.make_task(load("arm-pick"))
    for thing, lost in (((0.2, 0.157, CUBE_M), False), ((0.2, 0.25, CUBE_M), True), ((0.2, 0.0, -0.5), True)):
        outcome = task.advance(task.begin(reading()), REST, reading((0.3, 0.1, 0.05), thing))
        assert outcome.terminated == lost and not outcome.truncated and ("lost" in outcome.events) == lost
    env, records = make()
    env.reset()
    env.robot.object = np.array([0.6, 0.0, CUBE_M])
    _, _, ended, _, _ = env.step(REST)
    before = env.robot.placed
    env.reset()
    assert ended and env.robot.placed == before + 1
    assert records[-1].events == {"reset": 1.0, "intervention": 1.0}
    assert np.linalg.norm(records[-1].reading.values["tool"] - arm.HOME[:3]) < 0.02  # the arm was home already


def test_what_lies_outside_its_area_but_in_reach_is_fetched():
    env, records = make(**{"[0.38, 0.15]": "[0.3, 0.1]"})
    env.reset()
    env.robot.object = np.array([0.35, 0.14, CUBE_M])
    env.step(REST)
    env.reset()
    assert records[-1].events == {"reset": 1.0} and env.robot.placed == 1
    assert (env.robot.object[:2] <= (0.31, 0.11)).all()


def test_what_only_lies_beside_the_tool_is_laid_down_anew_too():
    robot = Ideal()
    before = robot.object.copy()
    robot.tool = robot.told[:3] = before + (hand.HELD_M - 0.005, 0.0, 0.0)  # as near as what is held, jaws open
    robot.jaws = robot.told[3] = arm.COMMAND.action_high[3]
    back = PutBack(arm.COMMAND, 10.0, np.array([[0.1, -0.1], [0.3, 0.1]]))
    while (wish := back.wish(robot.read())) is not None:
        robot.write(arm.COMMAND.to_command(wish))
        robot.sleep(0.1)
    assert np.linalg.norm(robot.object - before) > hand.HELD_M


def test_a_hand_comes_down_on_an_object_with_open_jaws():
    env, records = make()
    env.reset()
    above = arm.COMMAND.to_action(np.append(env.robot.object + (0.0, 0.0, hand.HOVER_M), 0.0))
    for _ in range(20):  # the jaws shut above the object: there is no way along which they could open
        env.step(above)
    assert env.robot.jaws < 0.1 and np.linalg.norm(env.robot.tool - env.robot.object) < hand.HOVER_M + 0.01
    records.clear()
    env.reset()
    seen = [(r.reading.values["tool"][2], r.reading.values["joint_position"][5]) for r in records]
    down = next(i for i, (height, _) in enumerate(seen) if height < 2 * CUBE_M)
    assert seen[down][1] > 0.7 and any(grip < 0.1 for _, grip in seen[down:]) and env.robot.placed == 1


@pytest.mark.parametrize("half", [0.0, 0.01])
def test_in_a_small_area_an_object_is_laid_down_in_its_middle(half):
    robot, middle = Ideal(), np.array([0.25, 0.02])
    back = PutBack(arm.COMMAND, 10.0, np.array([middle - half, middle + half]))
    while (wish := back.wish(robot.read())) is not None:
        robot.write(arm.COMMAND.to_command(wish))
        robot.sleep(0.1)
    assert np.linalg.norm(robot.object[:2] - middle) < 0.01


def test_the_hand_that_waits_goes_on_when_the_object_is_back():
    back = PutBack(arm.COMMAND, 10.0, np.array([[0.1, -0.1], [0.3, 0.1]]))
    away = reading(thing=(0.6, 0.0, CUBE_M))
    for _ in range(200):
        wish = back.wish(away)
        if back.needs_hand:
            break
    assert back.needs_hand and wish is not None
    for _ in range(20):
        if back.wish(reading()) is None:
            break
    assert not back.needs_hand and back.wish(reading()) is None


def test_without_an_area_what_is_held_is_kept_and_tries_begin_around_home():
    spec = load("arm-insert")
    places = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        back = PutBack(arm.COMMAND, spec.hz, None, spec.manipulate.spread_m)
        tool = np.array([0.25, 0.0, 0.05]) + 1e-4 * rng.standard_normal(3)
        for _ in range(200):
            wish = back.wish(reading(tool, tool))
            if wish is None:
                break
            command = arm.COMMAND.to_command(wish)
            assert command[3] == pytest.approx(arm.COMMAND.action_low[3])
            tool = command[:3]
        places.append(tool - arm.HOME[:3])
    assert np.abs(places).max() < 0.04 and np.std(places, axis=0).min() > 0.005


def test_the_same_readings_give_the_same_way_back():
    wishes = []
    for _ in range(2):
        env, records = make(seed=3)
        tries(env, records, 2)
        wishes.append([r.action for r in records if r.action is not None])
    np.testing.assert_array_equal(*wishes)


def test_a_hand_keeps_to_its_speed():
    env, records = make()
    tries(env, records, 3)
    tools = [(r.time, r.reading.values["tool"]) for r in records if r.source == "teacher" and r.action is not None]
    tools = tools[3:]  # as the gate arms, the first wish waits for the second
    fastest = max(np.linalg.norm(b - a) for (s, a), (t, b) in zip(tools, tools[1:], strict=False) if t - s < 0.11)
    assert fastest <= 0.2 / env.task.spec.hz + 1e-6


def test_a_recording_of_tries_is_prior_data(tmp_path):
    env, _ = make()
    made = teach.record_tries(env, teach.shown(env, 0.2, 0.5, 1), 3, tmp_path / "tries", 0, lambda line: None)
    assert made["laps"] == 3 and made["tries"] >= 3 and made["lap_time_s"] > 1.0
    _, records = read_recording(tmp_path / "tries")
    found = [s for s in samples(env.task, records) if s.action is not None and s.train]
    assert sum(s.reward for s in found) == 3.0 and sum(s.terminated for s in found) == 3


def test_a_task_from_a_recording_has_its_checkpoints_where_the_object_was_brought(tmp_path):
    env, _ = make(**{"[[0.08, -0.15], [0.38, 0.15]]": "[[0.2, -0.05], [0.3, 0.05]]"})
    teach.record_tries(env, teach.shown(env, 0.2, 0.5, 1), 4, tmp_path / "tries", 0, lambda line: None)
    made = teach.make_course(tmp_path / "tries", tmp_path / "mine.toml", None, None, 3)
    assert made["checkpoints"] == 3
    spec, old = load(str(tmp_path / "mine.toml")), env.task.spec
    first, way, last = spec.checkpoints
    assert (first.of, first.near, first.at) == ("tool", "object", (0.0, 0.0, 0.0))
    assert last.of == "object" and np.linalg.norm(np.subtract(last.at, old.checkpoints[-1].at)) < 0.06
    assert CUBE_M < way.at[2] < last.at[2] + 0.02 and way.radius_m >= last.radius_m
    assert last.radius_m < old.checkpoints[-1].radius_m + 0.02
    assert "cube of 3 cm" not in spec.text and "from 4 tries" in spec.text
    with pytest.raises(TaskError, match="no --width for an arm"):
        teach.make_course(tmp_path / "tries", tmp_path / "mine.toml", None, 1.0, 3)
    assert (spec.manipulate, spec.hz, spec.episode_s, spec.twin) == (old.manipulate, old.hz, old.episode_s, old.twin)
    again, _ = make(**{old.text[old.text.index("[[checkpoint]]"):]: spec.text[spec.text.index("[[checkpoint]]"):]})
    records: list[Record] = []
    again.on_record.append(records.append)
    assert tries(again, records, 4).successes == [1.0] * 4


def test_tries_that_share_no_place_give_no_checkpoint_there(tmp_path):
    env, _ = make()
    teach.record_tries(env, teach.shown(env, 0.2, 1.0, 1), 6, tmp_path / "tries", 0, lambda line: None)
    with pytest.raises(TaskError, match=r"after 25% of their way the tries are up to 0.1\d m .* fewer --checkpoints"):
        teach.make_course(tmp_path / "tries", tmp_path / "mine.toml", None, None, 5)
    assert not (tmp_path / "mine.toml").exists()


def test_a_recording_without_a_moved_object_gives_no_task(tmp_path):
    env, _ = make(**{"[0.25, 0.0, 0.12]": "[0.25, 0.0, 0.27]"})
    env.source = "teacher"
    spec = env.task.spec
    with pytest.raises(TaskError, match="no try in which the tool moved the object"):
        shown_task(spec, [Record(1, 0.0, reading(), REST, 0.0, False, True, "teacher", 0, {})])


def test_a_recording_that_only_fails_is_given_up(tmp_path, monkeypatch):
    env, _ = make(**{"[0.25, 0.0, 0.12]": "[0.25, 0.0, 0.27]"})
    monkeypatch.setattr(teach, "PATIENCE", 2)
    with pytest.raises(Exception, match="0 of 2 tries succeeded"):
        teach.record_tries(env, teach.shown(env, 0.2, 1.0, 1), 1, tmp_path / "tries", 0, lambda line: None)


@pytest.mark.parametrize(
    "change, says",
    [
        (('kind = "manipulate"', 'kind = "course"'), r"\[manipulate\] is for tasks of kind manipulate"),
        (("at = [0.25, 0.0, 0.12]", "at = [0.9, 0.0, 0.12]"), r"checkpoint\[1\].at = \[0.9, .* is out of reach"),
        (("[0.38, 0.15]]", "[0.18, 0.15]]"), r"checkpoint\[1\].at = .* is outside manipulate.area"),
        (("at = [0.25, 0.0, 0.12]", "at = [0.25, 0.0, -0.05]"), r"checkpoint\[1\].at = .* is out of reach"),
        (("at = [0.0, 0.0, 0.0]", "at = [0.5, 0.0, 0.0]"), r"checkpoint\[0\].at = .* is out of reach"),
        (("at = [0.0, 0.0, 0.0]", "at = [0.0, 0.0, -0.1]"), r"checkpoint\[0\].at = .* is out of reach"),
        (('of = "tool"', 'of = "object"'), r"checkpoint\[0\].at = .*: an object is always as near to itself"),
        (("at = [0.25, 0.0, 0.12]", "at = [0.25, 0.0]"), r"checkpoint\[1\].at must be a point \[x, y, z\]"),
        (('of = "object"', 'of = "cube"'), r"checkpoint\[1\].of must be tool or object"),
        (('near = "object"', 'near = "tool"'), r"checkpoint\[0\].near must be map or object"),
        (('reward = "sparse"', 'reward = "dense"'), "manipulate.reward must be one of sparse, progress"),
        (("[0.38, 0.15]]", "[0.01, 0.15]]"), "manipulate.area must be two corners"),
        (("[0.38, 0.15]]", "[0.58, 0.15]]"), r"manipulate.area: \[0.58, 0.15\] is not within the robot's reach"),
        (("hz = 10", "hz = 10\nhindsight = 0.5"), "task.hindsight must be 0"),
        (('robot = "arm"', 'robot = "car"'), "robot car has no channel tool, object, joint_position"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_is_named(change, says):
    text = load("arm-pick").text.replace(*change)
    with pytest.raises(TaskError, match=says):
        catalog.make_task(parse(text, "arm-pick", "arm-pick.toml"))


def test_an_arm_does_not_drive():
    text = load("car-loop").text.replace('robot = "car"', 'robot = "arm"')
    with pytest.raises(TaskError, match='robot arm goes nowhere; task.kind must be "manipulate" for it'):
        catalog.make_task(parse(text, "car-loop", "car-loop.toml"))


def test_a_task_without_checkpoints_is_none():
    head = load("arm-pick").text.partition("[[checkpoint]]")[0]
    with pytest.raises(TaskError, match=r"a manipulate needs at least 1 \[\[checkpoint\]\], found 0"):
        parse(head, "arm-pick", "arm-pick.toml")


def test_the_twin_practises_without_a_person():
    pytest.importorskip("mujoco")
    from tests.practice import BAR, POLICIES, practise

    for policy in POLICIES:
        found = practise(policy, 50.0, 1)
        assert found["resets"] >= 3 and found["put_back"] >= BAR and not found["needed"], found


@pytest.mark.parametrize("name", ["arm-reach", "arm-pick", "arm-insert"])
def test_an_arm_told_its_joints_is_led_by_the_same_scripts(name):
    pytest.importorskip("mujoco")
    spec = parse(load(name).text.replace('robot = "arm"', 'robot = "arm-joints"'), name)
    env = catalog.make_env(catalog.make_task(spec), seed=3)
    records: list[Record] = []
    env.on_record.append(records.append)
    tally = tries(env, records, 2)
    assert tally.successes == [1.0] * 2 and tally.episodes.interventions == 0
    actions = np.array([r.action for r in records if r.source == "teacher" and r.action is not None])
    assert actions.shape[1] == 6 and np.abs(actions).max() < 1.001
    env.close()


def test_a_hand_is_never_told_to_leave_the_workspace():
    told = []
    one = hand.Hand(arm.COMMAND, 10.0)
    motion = one.go(reading(), np.array([2.0, 2.0, -1.0]))
    for _ in range(60):
        try:
            told.append(motion.send(None if not told else reading()))
        except StopIteration:
            break
    assert (np.array(told)[:, :3] <= one.high).all() and (np.array(told)[:, :3] >= one.low).all()
