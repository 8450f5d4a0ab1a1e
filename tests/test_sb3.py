"""Somebody else's learner on `RobotEnv`: Stable-Baselines3 (`make bench` installs it)."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]  # its warnings are not ours


def test_stable_baselines3_trains_on_the_car():
    sb3 = pytest.importorskip("stable_baselines3")
    pytest.importorskip("mujoco")
    from stable_baselines3.common.env_checker import check_env

    env = gymnasium.make("tether.launch.twins:tether/car-loop-v0")
    check_env(env.unwrapped, skip_render_check=True)
    model = sb3.SAC("MlpPolicy", env, learning_starts=50, batch_size=32, policy_kwargs={"net_arch": [16]}, seed=0)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(200)
    assert model.num_timesteps == 200 and model.replay_buffer.size() == 200
    assert all(p.isfinite().all() for p in model.policy.parameters())
    assert any((p != old).any() for p, old in zip(model.policy.parameters(), before, strict=True))
    action, _ = model.predict(env.reset(seed=1)[0], deterministic=True)
    assert env.action_space.contains(action.astype(np.float32))
    env.close()
