"""From records to samples: relabelling a recording for another task, and what is not trained on."""

from __future__ import annotations

import numpy as np
import pytest
from tether.drivers.fake import Fake
from tether.launch import catalog
from tether.robot_env.env import RobotEnv
from tether.robot_env.rate import Rate
from tether.robot_env.safety import Gate
from tether.robot_env.sample import Fold, samples
from tether.robot_env.task import parse

TASK = """
[task]
robot = "fake"
kind = "course"
hz = 10
episode_s = 4
[[checkpoint]]
at = [5.0, 0.0]
[[checkpoint]]
at = {a}
[[checkpoint]]
at = [0.0, 9.0]
"""
HERE, THERE = "[10.0, 5.0]", "[4.0, -5.0]"


def task(a: str):
    return catalog.make_task(parse(TASK.format(a=a), "x"))


def recording(a: str, ticks: int = 200, seed: int = 0):
    made, robot = task(a), Fake()
    env = RobotEnv(
        robot, made, Gate(robot.command, catalog.limits(made.spec)), Rate(10, robot.now, robot.sleep)
    )
    records: list = []
    env.on_record.append(records.append)
    rng = np.random.default_rng(seed)
    env.source = "teacher"
    env.reset()
    for _ in range(ticks):
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 2))
        if terminated or truncated:
            env.reset()
    env.close()
    return made, records


def rows(found):
    return [s for s in found if s.action is not None]


def test_a_recording_of_the_same_task_gives_the_same_rewards_and_ends():
    made, records = recording(HERE)
    fold = Fold(made)
    as_recorded = rows(s for r in records for s in fold.push(r))
    again = rows(samples(made, records))
    sources = [r.source for r in records if r.action is not None]
    assert len(again) == len(as_recorded) == len(sources)
    for a, b, source in zip(as_recorded, again, sources, strict=True):
        assert (a.obs == b.obs).all() and (a.action == b.action).all() and a.train == b.train
        if source != "reset":
            assert a.reward == b.reward and a.terminated == b.terminated


def test_a_recording_for_another_task_has_the_rewards_of_the_new_one():
    _, records = recording(HERE)
    new = task(THERE)
    found = list(samples(new, records))
    progress, action, expected = new.begin(records[0].reading), new.rest, []
    for before, after in zip(records, records[1:], strict=False):
        if before.action is None:
            continue
        obs = new.observe(progress, before.reading, action)
        action = before.action
        outcome = new.advance(progress, action, after.reading)
        expected.append((obs, outcome.reward, outcome.terminated))
    assert len(rows(found)) == len(expected)
    for sample, (obs, reward, terminated) in zip(rows(found), expected, strict=True):
        assert (sample.obs == obs).all() and (sample.reward, sample.terminated) == (reward, terminated)
    old = rows(samples(task(HERE), records))
    assert sum(abs(a.reward - b.reward) > 1e-3 for a, b in zip(old, rows(found), strict=True)) > 50


def test_where_the_new_task_ends_the_segment_is_closed():
    _, records = recording(HERE)
    found = list(samples(task(HERE), records))
    for before, after in zip(found, found[1:], strict=False):
        if before.action is not None and (before.terminated or before.truncated):
            assert after.action is None


def test_a_recording_cut_short_still_closes_its_last_segment():
    made, records = recording(HERE, 20)
    whole, cut = list(samples(made, records)), list(samples(made, records[:10]))
    assert cut[-1].action is None and len(rows(cut)) == 9
    for a, b in zip(rows(cut), rows(whole), strict=False):
        assert (a.obs == b.obs).all() and a.reward == b.reward


def test_resets_and_what_left_the_box_are_not_trained_on():
    made, records = recording(HERE, 400)
    fold = Fold(made)
    for record in records:
        for sample in fold.push(record):
            inside = record.action is not None and bool((np.abs(record.action) <= 1.0001).all())
            assert sample.train == (inside and record.source != "reset")
            assert sample.action is None or (np.abs(sample.action) <= 1).all()
    assert {r.source for r in records} == {"teacher", "reset"}


def test_a_step_on_which_the_gate_held_the_robot_is_not_trained_on():
    made, records = recording(HERE)
    found = {}
    for name in ("gate_hold", "gate_stale_pose", "gate_rate", "gate_limit"):
        fold, trained = Fold(made), set()
        for record in records:
            action = None if record.action is None else 0 * record.action
            for sample in fold.push(record._replace(source="policy", events={name: 1.0}, action=action)):
                trained |= set() if action is None else {sample.train}
        found[name] = trained
    assert found == {"gate_hold": {False}, "gate_stale_pose": {False}, "gate_rate": {True}, "gate_limit": {True}}


@pytest.mark.parametrize(
    "source, trained", [("policy", True), ("takeover", True), ("teacher", True), ("reset", False)]
)
def test_who_is_learned_from(source, trained):
    made, records = recording(HERE, 20)
    record = next(r for r in records if r.action is not None and (np.abs(r.action) <= 1).all())
    assert Fold(made).push(record._replace(source=source))[0].train is trained


# --- takeovers as the reward (RLIF)


def driven_by(records: list, seed: int = 3) -> list:
    """The same records, taken over now and then; and whether a takeover begins after each."""
    rng, source, found = np.random.default_rng(seed), "policy", []
    for record in records:
        if rng.random() < 0.3:
            source = "takeover" if source == "policy" else "policy"
        found.append(record if record.source == "reset" else record._replace(source=source))
    steps = [r.action is not None and r.source for r in found]
    return found, [now == "policy" and then == "takeover" for now, then in zip(steps, [*steps[1:], ""], strict=True)]


def rewarded(made, records: list, reward: float | None, relabel: bool = False) -> list:
    fold = Fold(made, relabel, reward)
    return [sample for record in records for sample in fold.push(record)] + fold.close()


@pytest.mark.parametrize("relabel", [False, True])
def test_only_the_step_before_a_takeover_begins_is_paid_for(relabel):
    made, records = recording(HERE, 400)
    records, begins = driven_by(records)
    plain, paid = (rewarded(made, records, reward, relabel) for reward in (None, -2.0))
    assert len(paid) == len(plain)
    for a, b in zip(plain, paid, strict=True):  # all else stays as it is, terminations too
        same = b._replace(reward=a.reward, obs=a.obs, prev_action=a.prev_action, action=a.action)
        assert a == same and (a.obs == b.obs).all() and (a.prev_action == b.prev_action).all()
        assert (a.action is None and b.action is None) or (a.action == b.action).all()
    found = [sample.reward for sample in rows(paid)]
    expected = [-2.0 * before for record, before in zip(records, begins, strict=True) if record.action is not None]
    assert found == expected and sum(begins) > 20
    assert sum(abs(s.reward) for s in rows(plain)) > 1.0


def test_a_takeover_from_the_first_step_on_is_not_paid_for_by_the_episode_before():
    made, records = recording(HERE, 100)
    records = [r._replace(source="takeover") if r.source == "teacher" else r for r in records]
    assert any(r.action is None for r in records[:-1])
    assert {s.reward for s in rows(rewarded(made, records, -1.0))} == {0.0}


def test_a_recording_of_a_teacher_is_paid_for_nothing():
    made, records = recording(HERE, 100)
    assert {s.reward for s in rows(samples(made, records, -1.0))} == {0.0}


def test_a_step_whose_successor_was_lost_is_not_a_step_with_another_reward():
    made, records = recording(HERE, 60)
    records, _ = driven_by([r for r in records if r.source != "reset"][:20])
    lost = records[:8] + records[9:]
    found = rewarded(made, lost, -1.0)
    assert [s.part for s in found] == [0] * 8 + [1] * (len(found) - 8) and found[7].action is None
    assert {s.reward for s in rows(found)} == {0.0, -1.0}
