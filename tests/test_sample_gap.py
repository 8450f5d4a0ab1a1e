"""Records that were lost: nothing is paired across the gap, and what comes after is taken again."""

from __future__ import annotations

import numpy as np
import pytest
from tether.agents.replay import Replay
from tether.drivers.base import Reading
from tether.launch import catalog
from tether.robot_env.record import Record
from tether.robot_env.sample import Fold
from tether.robot_env.task import parse

TASK = """
[task]
robot = "fake"
kind = "course"
hz = 10
episode_s = 60
[[checkpoint]]
at = [50.0, 0.0]
[[checkpoint]]
at = [50.0, 90.0]
"""
COUNT = 12


def made():
    return catalog.make_task(parse(TASK, "x"))


def records():
    """A straight drive whose step `seq` is done at x = seq m; the last record only reads."""
    channels, _ = catalog.declaration(parse(TASK, "x"))
    for seq in range(1, COUNT + 1):
        values = {c.name: np.zeros(c.size, np.float32) for c in channels}
        values["accel"] = np.array([0, 0, 9.81], np.float32)
        values["pose"] = np.array([seq, 0, 1, 0], np.float32)
        reading = Reading(values, dict.fromkeys(values, 0.1 * seq))
        action = None if seq == COUNT else np.full(2, 0.05 * seq, np.float32)
        yield Record(seq, 0.1 * seq, reading, action, float(seq), False, False, "policy", 0, {})


def batch_of(lost):
    """What the replay hands out of the records that came; the last column of an observation is the seq."""
    fold, replay = Fold(made()), None
    for record in records():
        if record.seq in lost:
            continue
        for sample in fold.push(record):
            sample = sample._replace(obs=np.append(sample.obs, record.seq))
            if replay is None:
                replay = Replay(99, len(sample.obs), 2)
            replay.add(sample.part, sample)
    assert replay is not None
    return replay.sample(np.random.default_rng(0), 500)


def test_without_a_gap_each_step_has_the_next_as_its_successor():
    batch = batch_of(())
    assert set(batch["obs"][:, -1]) == set(range(1, COUNT))
    assert (batch["next_obs"][:, -1] == batch["obs"][:, -1] + 1).all()


@pytest.mark.parametrize("lost", [(5,), (5, 6, 7), (2, 9), (3, 5), (11,)])
def test_nothing_is_paired_across_lost_records(lost):
    batch = batch_of(lost)
    assert (batch["next_obs"][:, -1] == batch["obs"][:, -1] + 1).all()
    here = {seq for seq in range(1, COUNT + 1) if seq not in lost}
    # the first after a gap is not trained on: what was done before it is not known
    known = {seq for seq in here if seq + 1 in here and (seq == 1 or seq - 1 in here)} - {COUNT}
    assert set(batch["obs"][:, -1]) == known


@pytest.mark.parametrize("lost", [(5,), (5, 6, 7), (2, 9)])
def test_rewards_that_are_computed_again_are_not_computed_across_lost_records(lost):
    fold, found = Fold(made(), relabel=True), []
    for record in records():
        if record.seq not in lost:
            found += fold.push(record)
    steps = [s for s in found if s.action is not None]
    here = {seq for seq in range(1, COUNT + 1) if seq not in lost}
    assert {round(float(s.action[0]) / 0.05) for s in steps} == {seq for seq in here if seq + 1 in here}
    assert [s.part for s in found] == sorted(s.part for s in found)
    for part in range(max(s.part for s in found) + 1):
        *body, last = [s for s in found if s.part == part]
        assert last.action is None and all(s.action is not None for s in body)
