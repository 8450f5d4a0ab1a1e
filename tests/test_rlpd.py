"""RLPD against NumPy, what its equations leave open, and a point that learns."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import rlpd, sac  # noqa: E402
from tether.agents.networks import Critics  # noqa: E402
from tether.agents.replay import Replay, Strata, minibatches  # noqa: E402

from tests import reference  # noqa: E402
from tests.reference import ACT, OBS, batches_of  # noqa: E402

CASES = {  # between them every switch is on and off
    "window": rlpd.Config(ensemble=3, hidden=(16, 12), batch=8, utd=1, max_delta=0.3, init_temperature=0.7),
    "plain": rlpd.Config(
        ensemble=2, subset=2, hidden=(16, 12), actor_hidden=(14, 10), batch=8, utd=3, backup_entropy=False,
        layer_norm=False, target_entropy=-1.5, gamma=0.9, tau=0.1,
    ),
    "relative": rlpd.Config(ensemble=2, hidden=(16, 12), batch=8, utd=2, max_delta=0.3, relative=True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_an_update_equal_numpy(case):
    reference.check_update(reference.Rlpd(), rlpd, CASES[case])


# ------------------------------------------------------------------ what the equations leave open


def test_a_true_terminal_cuts_the_bootstrap_and_a_truncation_does_not():
    cfg = CASES["window"]
    batches = batches_of(cfg, cfg.utd)
    other = batches | {"next_obs": -batches["next_obs"], "next_prev_action": -batches["next_prev_action"]}

    def loss(batches, discount):
        state = rlpd.init(cfg, jax.random.key(0), OBS, ACT)
        batches = batches | {"discount": np.full_like(batches["discount"], discount)}
        return float(rlpd.update(cfg, state, batches)[1]["critic_loss"])

    assert loss(batches, 0.0) == loss(other, 0.0)
    assert loss(batches, 0.99) != loss(other, 0.99)


def test_members_share_nothing_and_start_apart():
    cfg = CASES["window"]
    critic = rlpd.init(cfg, jax.random.key(0), OBS, ACT).critic["params"]
    obs, action = np.ones((4, OBS), np.float32), np.zeros((4, ACT), np.float32)
    value = jax.jit(lambda params: Critics(3, cfg.hidden).apply({"params": params}, obs, action)[..., 0])
    before = np.asarray(value(critic))
    assert len(np.unique(before[:, 0])) == cfg.ensemble
    for name in critic:
        if name.endswith("kernel"):
            changed = np.array(critic[name])
            changed[1] += 0.5
            after = np.asarray(value(critic | {name: changed}))
            np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
            assert (after[1] != before[1]).all(), name
    limit = math.sqrt(6 / (OBS + ACT + 16))  # Glorot uniform, of each member's own fan
    assert limit * 0.95 < np.abs(critic["dense0_kernel"]).max() <= limit


def test_subsets_are_drawn_without_replacement_and_all_alike():
    cfg = rlpd.Config(ensemble=5, subset=2)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda key: rlpd._draw(cfg, key)[0])(keys))
    assert drawn.shape == (4000, 2) and (drawn[:, 0] != drawn[:, 1]).all()
    share = np.bincount(drawn.ravel(), minlength=5) / 4000
    np.testing.assert_allclose(share, 0.4, atol=0.03)


@pytest.mark.parametrize("case", CASES)
def test_actions_stay_in_the_box_and_its_window(case):
    cfg = CASES[case]
    params = jax.tree.map(lambda x: 4 * x, rlpd.init(cfg, jax.random.key(0), OBS, ACT).actor)
    rng = np.random.default_rng(0)
    obs = 10 * rng.standard_normal((200, OBS)).astype(np.float32)
    prev = rng.choice([-1.4, -1, -0.9, 0, 0.3, 1, 1.4], (200, ACT)).astype(np.float32)
    mean = np.asarray(rlpd.act(cfg, params, obs, prev))
    sampled = np.asarray(rlpd.act(cfg, params, obs, prev, jax.random.key(1)))
    assert mean.shape == (200, ACT) and mean.dtype == np.float32 and (mean != sampled).any()
    np.testing.assert_allclose(rlpd.act(cfg, params, obs[0], prev[0]), mean[0], rtol=1e-5, atol=1e-6)
    for action in (mean, sampled):
        assert (np.abs(action) <= 1).all()
        if cfg.max_delta is not None:
            assert (np.abs(action - prev.clip(-1, 1)) <= cfg.max_delta + 1e-6).all()
            assert (np.abs(action - prev.clip(-1, 1)) > cfg.max_delta - 0.01).any()


def test_critics_that_see_changes_need_a_window():
    for wrong in ({"relative": True}, {"relative": True, "max_delta": 0.1, "bound_start": 0.3}):
        with pytest.raises(ValueError, match="relative = True: needs max_delta"):
            rlpd.Config(**wrong)


def test_the_entropy_goal_is_within_reach_of_the_window():
    assert rlpd.Config().entropy_goal(4) == -2.0
    assert rlpd.Config(target_entropy=-3.0, max_delta=0.2).entropy_goal(2) == -3.0
    for delta in (0.05, 0.2, 1.0):
        uniform = 2 * math.log(2 * delta)  # the largest entropy the window allows
        goal = rlpd.Config(max_delta=delta).entropy_goal(2)
        assert uniform - goal == pytest.approx(2 * math.log(2) + 1)  # as without a window


# ------------------------------------------------------------------ from records to a policy

POINT = rlpd.Config(
    ensemble=2, hidden=(32, 32), batch=64, utd=8, max_delta=0.4, gamma=0.9, critic_lr=3e-3, actor_lr=3e-3,
    temp_lr=3e-3, tau=0.02, init_temperature=0.1,
)  # fmt: skip


def point_replay(seed):
    """Random driving of a point on a line: x' = x + 0.2 a, reward -|x'|."""
    rng, replay = np.random.default_rng(seed), Replay(5000, 2, 1, gamma=POINT.gamma)
    for _ in range(50):
        x, prev = rng.uniform(-1, 1), 0.0
        for i in range(21):
            action = np.clip(rng.uniform(prev - 0.4, prev + 0.4), -1, 1)
            nxt = x + 0.2 * action
            replay.add(
                "point",
                SimpleNamespace(
                    obs=[x, prev], prev_action=[prev], action=None if i == 20 else [action], reward=-abs(nxt),
                    terminated=False, truncated=i == 19, train=True,
                ),
            )  # fmt: skip
            x, prev = nxt, action
    return replay


def train_point(updates):
    online, prior, rng = point_replay(1), point_replay(2), np.random.default_rng(3)
    state = rlpd.init(POINT, jax.random.key(4), 2, 1)
    strata = Strata(online, prior, POINT.utd, POINT.batch)
    for _ in range(updates):
        batch = strata.draw(rng, 0.5)
        state, _ = jax.block_until_ready(rlpd.update(POINT, state, minibatches(batch, POINT.utd, POINT.batch)))
    return state


def test_the_same_seed_and_records_give_the_same_weights_to_the_bit():
    first, second = train_point(5), train_point(5)
    for a, b in zip(jax.tree.leaves(first[:-1]), jax.tree.leaves(second[:-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    params = rlpd.policy_params(POINT, first)
    assert sorted(params) == [
        f"{layer}/{name}" for layer in ("dense0", "dense1", "log_std", "mean") for name in ("bias", "kernel")
    ]
    kernel = params["dense0/kernel"].copy()
    rlpd.update(POINT, first, minibatches(point_replay(1).sample(np.random.default_rng(0), 512), 8, 64))
    np.testing.assert_array_equal(params["dense0/kernel"], kernel)  # not a view of what update consumes
    assert rlpd.policy_spec(POINT, second) == {
        "observation_size": 2, "action_size": 1, "hidden": [32, 32], "max_delta": 0.4,
    }  # fmt: skip


def test_a_point_learns_to_come_home_within_its_window():
    state = train_point(150)
    for start in (-1.0, -0.4, 0.5, 1.0):
        x, prev = start, np.zeros(1, np.float32)
        for _ in range(20):
            action = np.asarray(rlpd.act(POINT, state.actor, np.float32([x, prev[0]]), prev))
            x, prev = x + 0.2 * float(action[0]), action
        assert abs(x) < 0.1, f"from {start}: {x}"


def test_what_is_frozen_is_the_mean_of_the_actors_so_far_and_later_of_the_last_ones():
    state, batch = rlpd.init(POINT, jax.random.key(0), 2, 1), point_replay(1).sample(np.random.default_rng(0), 512)
    actors = []
    for _ in range(3):
        state, _ = rlpd.update(POINT, state, minibatches(batch, 8, 64))
        actors.append(rlpd.policy_params(POINT, state))
    for name, value in rlpd.policy_params(POINT, rlpd.frozen(state)).items():
        np.testing.assert_allclose(value, np.mean([a[name] for a in actors], axis=0), rtol=1e-4, atol=1e-6)
    assert rlpd.frozen(state).critic is state.critic
    many = state.actor_opt[0]._replace(count=jax.numpy.int32(10_000))
    before = rlpd.policy_params(POINT, rlpd.frozen(state))
    state, _ = rlpd.update(POINT, state._replace(actor_opt=(many, *state.actor_opt[1:])), minibatches(batch, 8, 64))
    newest, share = rlpd.policy_params(POINT, state), 1 / sac.AVERAGED
    for name, value in rlpd.policy_params(POINT, rlpd.frozen(state)).items():
        np.testing.assert_allclose(value, (1 - share) * before[name] + share * newest[name], rtol=1e-4, atol=1e-6)


def test_the_mean_of_actors_is_over_as_many_steps_however_rarely_the_actor_moves():
    rare, shares = replace(POINT, utd=2, actor_every=20), {}
    for cfg in (replace(POINT, utd=2), rare):
        state = rlpd.init(cfg, jax.random.key(0), 2, 1)
        many = state.actor_opt[0]._replace(count=jax.numpy.int32(10_000))
        state = state._replace(actor_opt=(many, *state.actor_opt[1:]))
        before = rlpd.policy_params(cfg, rlpd.frozen(state))
        while state.actor_opt[0].count == 10_000:
            batch = point_replay(1).sample(np.random.default_rng(0), 128)
            state, _ = rlpd.update(cfg, state, minibatches(batch, 2, 64))
        newest, after = rlpd.policy_params(cfg, state), rlpd.policy_params(cfg, rlpd.frozen(state))
        name = "mean/kernel"
        moved = [np.linalg.norm(params[name] - before[name]) for params in (after, newest)]
        shares[cfg.period] = moved[0] / moved[1]
    assert shares[2] == pytest.approx(1 / sac.AVERAGED, rel=0.01)
    assert shares[20] == pytest.approx(10 / sac.AVERAGED, rel=0.01)
