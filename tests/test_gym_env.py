"""Any Gymnasium environment behind the same records."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from tether.launch import catalog
from tether.robot_env.sample import Fold
from tether.robot_env.task import TaskError


def test_pendulum_is_driven_recorded_and_folded():
    task = catalog.make_task(catalog.load_spec("gym:Pendulum-v1"))
    env = catalog.make_env(task)
    records = []
    env.on_record.append(records.append)
    obs, _ = env.reset(seed=7)
    seen, rng = [], np.random.default_rng(0)
    for _ in range(450):
        action = rng.uniform(-1.2, 1.2, 1).astype(np.float32)
        then, reward, terminated, truncated, _ = env.step(action)
        seen.append((obs, np.clip(action, -1, 1), reward, terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else then
    env.close()
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert sum(r.truncated for r in records) == 2 and records[-1].action is None
    assert [r.action is None for r in records].count(True) == 3
    fold = Fold(task)
    samples = [s for r in records for s in fold.push(r) if s.action is not None]
    for sample, (obs, action, reward, terminated, truncated) in zip(samples, seen, strict=True):
        assert (sample.obs == obs).all() and (sample.action == action).all() and sample.train
        assert (sample.reward, sample.terminated, sample.truncated) == (reward, terminated, truncated)


def test_actions_cover_the_environments_own_box_and_seeds_repeat():
    def run() -> list[np.ndarray]:
        env = catalog.make_env(catalog.make_task(catalog.load_spec("gym:Pendulum-v1")))
        out = [env.reset(seed=3)[0], *(env.step(np.ones(1, np.float32))[0] for _ in range(5))]
        env.close()
        return out

    native = gymnasium.make("Pendulum-v1")
    expected = [native.reset(seed=3)[0], *(native.step(np.full(1, 2.0, np.float32))[0] for _ in range(5))]
    native.close()
    for a, b, c in zip(run(), run(), expected, strict=True):
        assert (a == b).all() and a == pytest.approx(c, abs=1e-6)


@pytest.mark.parametrize("name, says", [
    ("gym:Nope-v1", "gym:Nope-v1: .*Nope"), ("gym:CartPole-v1", "action space"), ("gym:no.module:X-v0", "no"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(name, says):
    with pytest.raises(TaskError, match=says):
        catalog.load_spec(name)


def test_a_gym_environment_is_no_robot():
    task = catalog.make_task(catalog.load_spec("gym:Pendulum-v1"))
    with pytest.raises(catalog.DriverError, match="leave out --real"):
        catalog.make_env(task, real=True)
