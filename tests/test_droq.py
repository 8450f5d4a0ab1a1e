"""DroQ against NumPy. Its masks as such: test_networks."""

import pytest

pytest.importorskip("jax")

from tether.agents import droq  # noqa: E402

from tests import reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_losses_and_gradients_of_an_update_equal_numpy():
    cfg = droq.Config(
        ensemble=3, subset=2, hidden=(16, 12), batch=8, utd=2, dropout=0.25, max_delta=0.3, init_temperature=0.7
    )
    reference.check_update(reference.Rlpd(), droq, cfg)
