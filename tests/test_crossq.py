"""CrossQ against NumPy, and when its actor moves."""

from dataclasses import replace

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import crossq  # noqa: E402

from tests import reference  # noqa: E402
from tests.reference import ACT, OBS, batches_of, flat, moved  # noqa: E402

CFG = crossq.Config(
    hidden=(16, 12), actor_hidden=(14, 10), batch=8, max_delta=0.3, init_temperature=0.7, actor_every=1
)


def one(batches, u):
    return {name: value[u : u + 1] for name, value in batches.items()}


def test_losses_gradients_and_statistics_of_an_update_equal_numpy():
    state, _ = reference.check_update(reference.CrossQ(), crossq, CFG)
    assert state.target == {}  # there is no target network


def test_the_actor_moves_at_every_third_update_and_nothing_of_it_in_between():
    cfg = replace(CFG, actor_every=3)
    state, batches = moved(crossq.init(CFG, jax.random.key(0), OBS, ACT)), batches_of(cfg, 6)
    state = jax.tree.map(np.array, state._replace(key=None))._replace(key=state.key)
    of_the_actor = ("actor", "average", "actor_opt", "log_temperature", "temp_opt")
    for u in range(6):
        before, key = jax.tree.map(np.array, state._replace(key=None)), state.key
        drawn = reference.draws(cfg, key)
        state, metrics = crossq.update(cfg, state, one(batches, u))
        due = u % 3 == 2
        for name in of_the_actor:
            was, now = jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(state, name))
            assert all((w == n).all() for w, n in zip(was, now, strict=True)) != due, name
        for was, now in zip(jax.tree.leaves(before.critic), jax.tree.leaves(state.critic), strict=True):
            assert (was != now).any()
        assert float(metrics["temperature"]) == pytest.approx(np.exp(before.log_temperature))
        assert np.isfinite([metrics["actor_loss"], metrics["entropy"]]).all() == due
        assert np.isfinite(metrics["critic_loss"]) and int(state.updates) == u + 1
        if due:  # the same update as elsewhere
            want = reference.actor_update(
                reference.CrossQ(), cfg, before, flat(state.critic), one(batches, u), drawn
            )
            assert float(metrics["actor_loss"]) == pytest.approx(want.metrics["actor_loss"], rel=1e-5)
    assert int(state.actor_opt[0].count) == int(state.temp_opt[0].count) == 2


def test_the_actor_moves_whatever_was_counted_before():
    """A run may start from one that made another number of updates a step."""
    cfg = replace(CFG, utd=2, actor_every=4)
    state = crossq.init(CFG, jax.random.key(0), OBS, ACT)._replace(updates=np.int32(5))
    for u in range(4):
        state, metrics = crossq.update(cfg, state, batches_of(cfg, 2, u))
    assert int(state.updates) == 13 and int(state.actor_opt[0].count) == 2


def test_two_updates_of_critic_and_actor_in_one_call_are_two_calls():
    batches = batches_of(CFG, 2)
    start = jax.tree.map(np.array, moved(crossq.init(CFG, jax.random.key(0), OBS, ACT))._replace(key=None))
    state, metrics = crossq.update(replace(CFG, utd=2), start._replace(key=jax.random.key(1)), batches)
    other, said = start._replace(key=jax.random.key(1)), []
    for u in range(2):
        other, more = crossq.update(CFG, other, one(batches, u))
        said.append(more)
    assert int(state.actor_opt[0].count) == int(other.actor_opt[0].count) == 2
    assert (jax.random.key_data(state.key) == jax.random.key_data(other.key)).all()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(np.mean([float(one[name]) for one in said]), rel=1e-4), name
    for name in ("actor", "average", "critic"):
        before, now, want = (flat(getattr(one, name)) for one in (start, state, other))
        assert not np.array_equal(before["dense0/kernel"], now["dense0/kernel"])
        reference.same(getattr(state, name), want)
