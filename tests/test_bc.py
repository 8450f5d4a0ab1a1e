"""Behaviour cloning against NumPy, with its own backward pass, and that it does clone."""

from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import bc  # noqa: E402

from tests.reference import ACT, OBS, Adam, batches_of, body, dense, flat, moved, relative, same, window  # noqa: E402

CASES = {
    "window": bc.Config(hidden=(16, 12), batch=8, utd=1, max_delta=0.3),
    "plain": bc.Config(hidden=(16, 12), batch=8, utd=2),
}


def numpy_loss(cfg, p, batch):
    """Squared error of the action, and the gradients of it and of the likelihood of the rest."""
    h, back, _ = body(p, batch["obs"], len(cfg.hidden), "none")
    mean, mean_back = dense(p, "mean", h)
    raw, std_back = dense(p, "log_std", h)
    low, half = window(cfg, batch["prev_action"])
    t = np.tanh(mean)
    error = low + (t + 1) * half - batch["action"]
    dmean = 2 * error * half * (1 - t**2) / error.size
    inner = np.clip((batch["action"] - low) / half - 1, -0.999, 0.999)
    log_std = np.clip(raw, -5, 2)
    off = (np.arctanh(inner) - mean) / np.exp(log_std)
    dlog_std = (1 - off**2) * ((raw > -5) & (raw < 2)) / error.size  # of off^2 / 2 + log_std; the mean is held
    (dh, grads), (more, others) = mean_back(dmean), std_back(dlog_std)
    return (error**2).mean(), grads | others | back(dh + more)[1]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_of_an_update_equal_numpy(case):
    cfg = CASES[case]
    state, batches = moved(bc.init(cfg, jax.random.key(0), OBS, ACT)), batches_of(cfg, cfg.utd)
    state.actor["params"]["log_std"]["bias"][0] -= 4.5  # on either side of the floor
    before = jax.tree.map(np.array, state)
    new, metrics = bc.update(cfg, state, batches)

    p, adam, losses, actors = flat(before.actor), Adam(cfg.actor_lr), [], []
    for u in range(cfg.utd):
        loss, grads = numpy_loss(cfg, p, {name: value[u].astype(np.float64) for name, value in batches.items()})
        p = adam.step(p, grads)
        losses.append(loss)
        actors.append(p)
    assert metrics.keys() == {"actor_loss"}
    assert float(metrics["actor_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    for name, value in flat({"params": new.actor_opt[0].mu}).items():
        assert relative(value, adam.mu[name]) <= 1e-5, name
    same(new.actor, p)
    same(new.average, {name: np.mean([a[name] for a in actors], 0) for name in p})


def test_it_acts_as_it_was_shown_within_its_window():
    cfg = bc.Config(hidden=(32, 32), batch=64, utd=20, max_delta=0.4, actor_lr=3e-3)
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (cfg.utd * 40, cfg.batch, OBS)).astype(np.float32)
    prev = rng.uniform(-1.2, 1.2, (*obs.shape[:2], ACT)).astype(np.float32)
    goal = np.stack([obs[..., 0] * obs[..., 1], 0.5 * obs[..., 2]], -1)
    noise = 0.05 * rng.standard_normal(prev.shape)
    inside = prev.clip(-1, 1)
    action = np.clip(goal + noise, np.maximum(inside - 0.4, -1), np.minimum(inside + 0.4, 1)).astype(np.float32)
    state = bc.init(cfg, jax.random.key(0), OBS, ACT)
    obs = np.concatenate([obs, prev], -1)  # as an environment has it
    state = bc.init(cfg, jax.random.key(0), OBS + ACT, ACT)
    for at in range(0, len(obs), cfg.utd):
        part = slice(at, at + cfg.utd)
        state, metrics = bc.update(cfg, state, {"obs": obs[part], "prev_action": prev[part], "action": action[part]})
    act = partial(bc.act, cfg, state.actor, obs[-1], prev[-1])
    assert np.sqrt(np.square(np.asarray(act()) - action[-1]).mean()) < 0.1
    sampled = np.asarray(act(jax.random.key(1)))
    assert (sampled != np.asarray(act())).all()
    for found in (np.asarray(act()), sampled):
        assert (np.abs(found) <= 1).all() and (np.abs(found - inside[-1]) <= 0.4 + 1e-6).all()
