import pytest

pytest.importorskip("jax")

from tether.agents import crossq  # noqa: E402

from tests import reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")

CFG = crossq.Config(hidden=(16, 12), actor_hidden=(14, 10), batch=8, max_delta=0.3, init_temperature=0.7, actor_every=1)
def test_losses_and_gradients_of_an_update_equal_numpy():
    reference.check_update(reference.CrossQ(), crossq, CFG)
