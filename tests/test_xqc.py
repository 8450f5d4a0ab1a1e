"""XQC against NumPy: projection, loss, gradients, and the length of its kernels."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import xqc  # noqa: E402

from tests import reference  # noqa: E402
from tests.reference import ACT, OBS, batches_of, flat  # noqa: E402

CFG = xqc.Config(hidden=(16, 12), batch=8, utd=2, atoms=11, reach=3.0, max_delta=0.3, init_temperature=0.7, tau=0.1)


def test_losses_gradients_and_statistics_of_an_update_equal_numpy():
    state, _ = reference.check_update(reference.Xqc(), xqc, CFG)
    for variables in (state.critic, state.actor):
        for name, value in flat(variables).items():
            if name.endswith("kernel"):
                lengths = np.sqrt((value**2).sum(-2))
                assert (np.abs(lengths - 1) < 1e-6).all() == name.startswith("dense"), name


def test_kernels_have_length_1_from_the_start():
    state = xqc.init(CFG, jax.random.key(0), OBS, ACT)
    for variables in (state.critic, state.target, state.actor, state.average):
        hidden = [v for name, v in flat(variables).items() if name.startswith("dense") and name.endswith("kernel")]
        assert len(hidden) == 2
        for kernel in hidden:
            np.testing.assert_allclose((kernel**2).sum(-2), 1, rtol=1e-5)


def project(cfg, probabilities, places):
    return np.asarray(xqc.project(cfg, probabilities.astype(np.float32), places.astype(np.float32)))


def test_the_projection_is_that_of_c51():
    rng = np.random.default_rng(0)
    mass = rng.dirichlet(np.ones(CFG.atoms), 40)
    places = rng.uniform(-1.6 * CFG.reach, 1.6 * CFG.reach, mass.shape)
    places[0] = np.linspace(-CFG.reach, CFG.reach, CFG.atoms)  # on the atoms: nothing moves
    places[1], places[2] = -2 * CFG.reach, 2 * CFG.reach  # all of it at one end
    found = project(CFG, mass, places)
    np.testing.assert_allclose(found, reference.project(CFG, mass, places.astype(np.float32)), atol=2e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(found[0], mass[0], atol=1e-6)
    assert found[1, 0] == pytest.approx(1) and found[2, -1] == pytest.approx(1)


def test_the_projection_keeps_the_mean_of_what_lies_inside():
    rng, support = np.random.default_rng(1), np.linspace(-CFG.reach, CFG.reach, CFG.atoms)
    mass = rng.dirichlet(np.ones(CFG.atoms), 40)
    places = rng.uniform(-CFG.reach, CFG.reach, mass.shape)
    found = project(CFG, mass, places)
    np.testing.assert_allclose(found @ support, (mass * places).sum(-1), atol=1e-5)
    outside = project(CFG, mass, places + CFG.reach)
    assert (outside @ support < (mass * (places + CFG.reach)).sum(-1)).all()


def test_only_the_ratio_of_reward_and_largest_return_counts():
    batches = batches_of(CFG, CFG.utd)
    larger = batches | {name: 8 * batches[name] for name in ("reward", "return_max")}
    (small, said), (large, says) = (
        xqc.update(CFG, xqc.init(CFG, jax.random.key(0), OBS, ACT), one) for one in (batches, larger)
    )
    for a, b in zip(jax.tree.leaves(small[:-1]), jax.tree.leaves(large[:-1]), strict=True):
        np.testing.assert_array_equal(a, b)  # a power of 2 is exact
    assert float(says["q_mean"]) == 8 * float(said["q_mean"])  # in the task's own units
    assert float(says["critic_loss"]) == float(said["critic_loss"])
    other = batches | {"return_max": 8 * batches["return_max"]}
    _, differs = xqc.update(CFG, xqc.init(CFG, jax.random.key(0), OBS, ACT), other)
    assert float(differs["critic_loss"]) != float(said["critic_loss"])
