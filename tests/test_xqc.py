import pytest

pytest.importorskip("jax")

from tether.agents import xqc  # noqa: E402

from tests import reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")

CFG = xqc.Config(hidden=(16, 12), batch=8, utd=2, atoms=11, max_delta=0.3, init_temperature=0.7)
def test_losses_and_gradients_of_an_update_equal_numpy():
    reference.check_update(reference.Xqc(), xqc, CFG)
