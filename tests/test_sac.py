"""What the soft actor-critics share: settings that cannot be, and the actor as it goes onboard."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import bc, crossq, droq, rlpd, xqc  # noqa: E402
from tether.launch.onboard import Policy  # noqa: E402

from tests.reference import ACT, OBS, moved  # noqa: E402

SHARE = "must lie between 0 and 1"
COUNT = "must be at least 1"
WIDTHS = "must be the widths of the layers"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(({name: 1.5}, f"{name} = 1.5: {SHARE}") for name in ("critic_lr", "actor_lr", "temp_lr", "tau")),
        ({"adam_b1": 1.0}, "adam_b1 = 1.0: must lie in [0, 1)"),
        ({"gamma": -0.1}, f"gamma = -0.1: {SHARE}"),
        ({"gamma": float("nan")}, f"gamma = nan: {SHARE}"),
        *(({name: 0}, f"{name} = 0: {COUNT}") for name in ("ensemble", "n_step", "utd")),
        ({"hidden": (64, 0)}, f"hidden = (64, 0): {WIDTHS}"),
        ({"hidden": ()}, f"hidden = (): {WIDTHS}"),
        ({"actor_hidden": (0,)}, f"actor_hidden = (0,): {WIDTHS}"),
        ({"actor_hidden": []}, f"actor_hidden = (): {WIDTHS}"),
        ({"batch": 15}, "batch = 15: must be even, half of it is prior data"),
        ({"batch": 0}, "batch = 0: must be even"),
        ({"max_delta": 0.0}, "max_delta = 0.0: must lie in (0, 2] or be None"),
        ({"max_delta": 2.1}, "max_delta = 2.1: must lie in (0, 2] or be None"),
        ({"init_temperature": 0.0}, "init_temperature = 0.0: must be above 0"),
        ({"actor_every": 0}, "actor_every = 0: must divide utd = 4, or be a multiple of it"),
        ({"actor_every": 3}, "actor_every = 3: must divide utd = 4, or be a multiple of it"),
        ({"actor_every": 6}, "actor_every = 6: must divide utd = 4, or be a multiple of it"),
    ],
)
@pytest.mark.parametrize("agent", [rlpd, crossq])
def test_a_setting_that_cannot_be_is_named(agent, wrong, says):
    with pytest.raises(ValueError) as caught:
        agent.Config(**{"utd": 4, "actor_every": None} | wrong)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("agent", "wrong", "says"),
    [
        (rlpd, {"subset": 11}, "subset = 11: must lie in 1 ... ensemble = 10"),
        (rlpd, {"subset": 0}, "subset = 0: must lie in 1 ... ensemble = 10"),
        (droq, {"subset": 3}, "subset = 3: must lie in 1 ... ensemble = 2"),
        (droq, {"dropout": 1.0}, "dropout = 1.0: must lie in [0, 1)"),
        (rlpd, {"dropout": -0.1}, "dropout = -0.1: must lie in [0, 1)"),
        (xqc, {"atoms": 1}, "atoms = 1: must be at least 2"),
        (xqc, {"reach": 0.0}, "reach = 0.0: must be above 0"),
        (bc, {"actor_lr": 2}, f"actor_lr = 2: {SHARE}"),
        (bc, {"utd": 0}, f"utd = 0: {COUNT}"),
        (bc, {"hidden": []}, f"hidden = (): {WIDTHS}"),
        (bc, {"batch": 1}, "batch = 1: must be even"),
        (bc, {"max_delta": 3}, "max_delta = 3: must lie in"),
    ],
)
def test_an_algorithm_names_its_own_too(agent, wrong, says):
    with pytest.raises(ValueError) as caught:
        agent.Config(**wrong)
    assert str(caught.value).startswith(says)


def test_what_can_be_is_taken_and_lists_become_tuples():
    for every in (1, 2, 4, 8, 12, None):
        assert rlpd.Config(utd=4, actor_every=every).period == (every or 4)
    for agent in (rlpd, droq, crossq, xqc, bc):
        cfg = agent.Config(hidden=[8, 8], max_delta=2, batch=2)
        assert cfg.hidden == (8, 8) and hash(cfg)
    assert rlpd.Config(actor_hidden=[8]).actor_hidden == (8,)
    assert crossq.Config(actor_every=3).period == 3


@pytest.mark.parametrize(
    ("agent", "settings"),
    [
        (crossq, {"hidden": (16,), "actor_hidden": (14, 10), "max_delta": 0.3}),
        (xqc, {"hidden": (16, 12), "max_delta": None}),
        (bc, {"hidden": (16, 12), "max_delta": 0.3}),
    ],
)
def test_the_actor_onboard_acts_as_the_one_it_was_made_of(agent, settings):
    """Batch norm is folded into the layers, with statistics and scales that are not those of the start."""
    cfg, rng = agent.Config(**settings), np.random.default_rng(5)
    state = moved(agent.init(cfg, jax.random.key(0), OBS, ACT))
    if "stats" in state.actor:
        for name, stats in state.actor["stats"].items():
            stats["mean"][...] = rng.normal(0, 2, stats["mean"].shape)
            stats["var"][...] = rng.uniform(0.01, 9, stats["var"].shape)
            state.actor["params"][name]["scale"][...] = rng.uniform(-2, 2, stats["var"].shape)
        assert set(state.actor["stats"]) == {"input", "norm0", "norm1"}
    obs = (2 * rng.standard_normal((50, OBS))).astype(np.float32)
    previous = rng.uniform(-1.2, 1.2, (50, ACT)).astype(np.float32)
    for one in (state, agent.frozen(state)):  # the newest actor, and the mean of the last
        params = agent.policy_params(cfg, one)
        policy = Policy(agent.policy_spec(cfg, one), params)
        want = np.asarray(agent.act(cfg, one.actor, obs, previous))
        assert want.std(0).min() > 0.02
        for o, p, action in zip(obs, previous, want, strict=True):
            np.testing.assert_allclose(policy.act(o, p), action, rtol=1e-5, atol=5e-6)
        kernel = np.array(params["dense0/kernel"])
        params["dense0/kernel"][...] = 0  # a copy
        np.testing.assert_array_equal(agent.policy_params(cfg, one)["dense0/kernel"], kernel)
