"""DroQ against NumPy, masks included. What the masks are like: test_networks."""

import pytest

pytest.importorskip("jax")

from tether.agents import droq

from tests import reference


def test_losses_and_gradients_of_an_update_equal_numpy():
    cfg = droq.Config(
        ensemble=3, subset=2, hidden=(16, 12), batch=8, utd=2, dropout=0.25, max_delta=0.3, init_temperature=0.7
    )
    reference.check_update(reference.Rlpd(), droq, cfg)


def test_as_published():
    cfg = droq.Config()
    assert (cfg.ensemble, cfg.subset, cfg.dropout, cfg.layer_norm, cfg.utd) == (2, 2, 0.01, True, 20)
