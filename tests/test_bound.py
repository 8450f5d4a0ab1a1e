"""The soft bound: what is beyond it pays, nothing else changes; it grows, and falls when the world surprises."""

from dataclasses import replace

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import bound, droq, rlpd, xqc  # noqa: E402
from tether.agents.replay import Replay, Strata, minibatches  # noqa: E402
from tether.robot_env.sample import Sample  # noqa: E402

from tests.reference import ACT, OBS, batches_of  # noqa: E402

SMALL = dict(hidden=(16, 12), batch=8, utd=2, init_temperature=0.7)
CFG = droq.Config(**SMALL, dropout=0.25, bound_start=0.35)
ZERO = np.float32(0.0)


@pytest.mark.parametrize("agent", [rlpd, xqc])  # with and without batch norm
def test_without_a_price_an_update_is_what_it_was(agent):
    with_bound = agent.Config(**SMALL | {"bound_start": 0.35, "bound_weight": 0.0, "actor_every": None})
    without = replace(with_bound, bound_start=None)
    batches = batches_of(without, without.utd)
    (state, metrics), (other, said) = (
        agent.update(cfg, agent.init(cfg, jax.random.key(0), OBS, ACT), batches) for cfg in (with_bound, without)
    )
    assert metrics.keys() - said.keys() == {"action_bound"}
    for name, value in said.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name
    for a, b in ((state.actor, other.actor), (bound.inner(state.critic), other.critic)):
        for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_each_value_of_an_action_pays_for_what_is_beyond_the_bound():
    critic = bound.soft(droq.rlpd.CRITIC)
    variables = droq.init(CFG, jax.random.key(0), OBS, ACT).critic
    obs = np.zeros((4, OBS), np.float32)
    action = np.array([[0.3, -0.3], [0.35, -0.35], [0.45, -0.3], [-1.0, 0.85]], np.float32)
    free, priced = (
        np.asarray(critic.value(replace(CFG, bound_weight=w), variables, {"obs": obs}, action, jax.random.key(1)))
        for w in (0.0, 12.0)
    )
    np.testing.assert_allclose(free - priced, 12.0 * np.array([0, 0, 0.1, 0.65 + 0.5]), atol=1e-4)


def test_the_price_is_in_reward_whatever_the_critics_count_in():
    """XQC's values lie within 5; with rewards and price 8 times as large an actor learns the same."""
    cfg = xqc.Config(**SMALL, bound_start=0.1, actor_every=2)
    batches = batches_of(cfg, cfg.utd)
    larger = batches | {name: 8 * batches[name] for name in ("reward", "return_max")}
    dear = replace(cfg, bound_weight=8 * cfg.bound_weight)
    one, other, dearer = (
        xqc.update(c, xqc.init(c, jax.random.key(0), OBS, ACT), b)[0].actor
        for c, b in ((cfg, batches), (dear, larger), (dear, batches))
    )
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    assert all(same)  # a power of 2 is exact
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(dearer), strict=True))


def followed(cfg, errors):
    """The bound after each of these errors of the model, one step each."""
    step = jax.jit(lambda now, error: bound.moved(cfg, now, error))
    now, seen = {"now": np.float32(cfg.bound_start)} | dict.fromkeys(("recent", "usual", "age"), ZERO), []
    for error in errors:
        for _ in range(cfg.utd):
            now = step(now, np.float32(error))
        seen.append(float(now["now"]))
    return np.array(seen)


def test_the_bound_grows_step_by_step_to_its_end():
    cfg = replace(CFG, bound_steps=100)
    seen = followed(cfg, np.ones(150))
    np.testing.assert_allclose(seen[[0, 49, 99, 149]], [0.3525, 0.475, 0.6, 0.6], rtol=1e-3)


def test_noise_is_no_surprise_and_another_world_is(monkeypatch):
    monkeypatch.setattr(bound, "SETTLED", 600)
    cfg, rng = replace(CFG, utd=1, bound_steps=1000), np.random.default_rng(0)
    seen = followed(cfg, np.concatenate([rng.exponential(1.0, 3000), rng.exponential(3.0, 400)]))
    assert (np.diff(seen[:3000]) >= 0).all() and seen[2999] == pytest.approx(0.6)
    fell = np.flatnonzero(np.diff(seen) < 0) + 1
    assert len(fell) == 1 and 3000 <= fell[0] < 3200 and seen[fell[0]] == pytest.approx(cfg.bound_start)
    assert seen[-1] > cfg.bound_start  # and grows again


def test_the_model_learns_what_the_world_does():
    cfg = replace(CFG, utd=20, critic_lr=3e-3, batch=64, dropout=0.0)
    rng = np.random.default_rng(0)
    state = droq.init(cfg, jax.random.key(0), OBS, ACT)
    for _ in range(60):
        batches = batches_of(cfg, cfg.utd, seed=int(rng.integers(1 << 30)))
        change = np.tanh(batches["action"].sum(-1, keepdims=True))
        state, metrics = droq.update(cfg, state, batches | {"next_obs": batches["obs"] + change})
    assert float(state.critic["stats"]["bound"]["recent"]) < 0.1 * change.var()  # which it errs by when it says nothing
    assert cfg.bound_start < float(metrics["action_bound"]) < 0.36


@pytest.mark.parametrize("wrong", [{"bound_start": 0.0}, {"bound_end": 0.2}, {"bound_steps": 0}, {"surprise": 1.0}])
def test_a_setting_that_cannot_be_is_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: must"):
        replace(CFG, **wrong)


def test_there_is_no_native_update():
    with pytest.raises(ValueError, match="no native update"):
        replace(CFG, native=True)


def test_one_of_the_newest_steps_comes_first_in_every_mini_batch():
    online, prior = Replay(12, 1, 1, 1, 0.9), Replay(12, 1, 1, 1, 0.9)
    strata = Strata(online, prior, 3, 4, newest=4)
    one, rng, seen = np.zeros(1, np.float32), np.random.default_rng(0), set()
    for n in range(40):  # three times round the ring; every fifth step is not to be learned from
        online.add("a", Sample(np.float32([n]), one, one, 0.0, False, False, n % 5 > 0))
        if n > 3:
            first = minibatches(strata.draw(rng, 0.5), 3, 4)["obs"][:, 0, 0]
            assert ((n - first >= 1) & (n - first <= 3) & (first % 5 > 0)).all()  # the last has no successor
            seen |= set(n - first)
    assert seen == {1, 2, 3}
    for n in range(30, 40):
        prior.add("b", Sample(np.float32([n]), one, one, 0.0, False, False, True))
    drawn = [minibatches(strata.draw(rng, 1.0), 3, 4)["obs"] for _ in range(20)]
    assert len(np.unique([batch[:, 0] for batch in drawn])) > 1  # of prior data none is newer than another


def test_where_no_new_step_can_be_drawn_any_other_is():
    online = Replay(12, 1, 1, 1, 0.9)
    strata, one = Strata(online, Replay(1, 1, 1), 3, 4, newest=4), np.zeros(1, np.float32)
    for n in range(12):
        online.add("a", Sample(np.float32([n]), one, one, 0.0, False, False, n < 5))
    assert (strata.draw(np.random.default_rng(0), 0.5)["obs"] < 5).all()
