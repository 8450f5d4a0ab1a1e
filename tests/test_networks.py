"""The parts of the nets: dropout's masks, batch norm, ensembles."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import networks  # noqa: E402
from tether.agents.networks import Actor, BatchNorm, Critics, dropout_mask  # noqa: E402

from tests import reference  # noqa: E402

SHAPE = (4, 250, 256)  # members, batch, width


@pytest.fixture(scope="module")
def masked():
    """A mask with a rate, as the critics draw it for a key and a layer."""
    draw = jax.jit(dropout_mask, static_argnums=(1, 2))
    return lambda seed, layer, rate: np.asarray(draw(jax.random.fold_in(jax.random.key(seed), layer), SHAPE, rate))


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.9])
def test_a_mask_keeps_its_share_and_the_mean(masked, rate):
    mask = masked(0, 0, rate)
    kept = mask > 0
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / (1 - rate))}
    for axis in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):  # all, each member, each row, each unit
        share = kept.mean(axis)
        error = np.sqrt(rate * (1 - rate) * share.size / kept.size)
        # of that many numbers the farthest off
        assert (np.abs(share - (1 - rate)) <= (4 if share.size == 1 else 5) * error).all(), axis
        assert (np.abs(mask.mean(axis) - 1) <= 5 * error / (1 - rate)).all(), axis


def test_masks_of_layers_members_keys_and_neighbours_have_nothing_in_common(masked):
    rate = 0.25
    mask = masked(0, 0, rate) > 0

    def correlation(a, b):
        return np.mean((a - (1 - rate)) * (b - (1 - rate))) / (rate * (1 - rate)) * np.sqrt(a.size)

    found = {
        "layers": correlation(mask, masked(0, 1, rate) > 0),
        "keys": correlation(mask, masked(1, 0, rate) > 0),
        "members": correlation(mask[0], mask[1]),
        "rows": correlation(mask[:, 1:], mask[:, :-1]),
        "units": correlation(mask[..., 1:], mask[..., :-1]),
    }
    assert all(abs(value) < 4 for value in found.values()), found  # standard errors
    assert abs(correlation(mask, mask)) > 100


def test_a_mask_is_the_hash_of_element_and_key(masked):
    words = jax.random.key_data(jax.random.fold_in(jax.random.key(5), 2))
    np.testing.assert_allclose(masked(5, 2, 0.1), reference.dropout_mask(words, SHAPE, 0.1), rtol=1e-6)


def test_dropout_is_off_without_a_key_and_another_with_another():
    critics = Critics(2, (16, 12), dropout=0.5)
    obs, action = np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)
    params = jax.jit(critics.init)(jax.random.key(0), obs, action)
    value = jax.jit(lambda key: critics.apply(params, obs, action, key=key))
    plain = np.asarray(Critics(2, (16, 12)).apply(params, obs, action))
    np.testing.assert_allclose(value(None), plain, rtol=1e-5)
    first, second = (np.asarray(value(jax.random.key(seed))) for seed in (1, 2))
    assert (first != plain).all() and (first != second).all()
    assert (first[0, 0] != first[0, 1]).all()  # rows alike, masks not
    np.testing.assert_array_equal(first, value(jax.random.key(1)))


def test_running_statistics_come_to_those_of_the_data_and_stand_in_for_them():
    norm, rng = BatchNorm(), np.random.default_rng(0)
    mean, deviation = np.array([3.0, -1.0, 0.0]), np.array([0.1, 2.0, 30.0])
    data = (mean + deviation * rng.standard_normal((1000, 64, 3))).astype(np.float32)
    variables = norm.init(jax.random.key(0), data[0], True)
    np.testing.assert_array_equal(variables["stats"]["mean"], np.zeros(3))  # making it is no training

    @jax.jit
    def fed(variables, data):
        step = lambda v, x: ({"params": v["params"]} | norm.apply(v, x, True, mutable=["stats"])[1], None)  # noqa: E731
        return jax.lax.scan(step, variables, data)[0]

    variables = fed(variables, data)
    error = deviation / 8 * np.sqrt(0.01 / 1.99)  # standard, of a mean of means of 64
    assert (np.abs(variables["stats"]["mean"] - mean) < 4 * error).all()
    np.testing.assert_allclose(np.sqrt(variables["stats"]["var"]), deviation, rtol=0.1)
    plain = np.asarray(norm.apply(variables, data[-1], False))
    one = np.asarray(norm.apply(variables, data[-1, 0], False))  # without a batch, as in a robot
    np.testing.assert_allclose(one, plain[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain.std(0), 1, rtol=0.4)
    batch = np.asarray(norm.apply(variables, data[-1], True, mutable=["stats"])[0])
    np.testing.assert_allclose(batch.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(batch.std(0), 1, rtol=1e-3)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_members_share_nothing(norm):
    critics, obs, action = Critics(3, (8, 6), norm, outputs=2), np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)
    obs = obs * np.arange(1, 5, dtype=np.float32)[:, None]
    variables = jax.tree.map(np.array, jax.jit(critics.init)(jax.random.key(0), obs, action))
    bias = "norm0" if norm == "batch" else "dense0"  # no unit is off
    variables["params"] = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.5 if jax.tree_util.keystr(path, simple=True, separator="_") == f"{bias}_bias" else x,
        variables["params"],
    )
    for train in (False, True) if norm == "batch" else (False,):
        value = jax.jit(lambda v, train=train: critics.apply(v, obs, action, train, mutable=["stats"])[0])
        before = np.asarray(value(variables))
        assert before.shape == (3, 4, 2)
        changed = jax.tree.map(np.array, variables)
        for leaf in jax.tree.leaves(changed):
            leaf[1] = leaf[1] * 1.5 + 0.25
        after = np.asarray(value(changed))
        np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
        assert (after[1] != before[1]).all()


def test_unit_kernels_are_the_hidden_ones():
    critics = jax.jit(Critics(2, (8, 6), "batch").init)(jax.random.key(0), np.ones((1, 3)), np.ones((1, 1)))
    actor = jax.jit(Actor((8,), 2, True).init)(jax.random.key(0), np.ones((1, 3)))
    for before in (critics, actor):
        after = reference.flat(jax.jit(networks.unit_kernels)(before))
        for name, value in reference.flat(before).items():
            if name.startswith("dense") and name.endswith("kernel"):
                value = value / np.linalg.norm(value, axis=-2, keepdims=True)
                np.testing.assert_allclose(after[name], value, rtol=1e-5)
            else:
                np.testing.assert_array_equal(after[name], value)
