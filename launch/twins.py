"""The shipped tasks, in their robots' twins, as Gymnasium ids. Importing this module registers them:

    gymnasium.make("tether.launch.twins:tether/car-loop-v0")
"""

from __future__ import annotations

import gymnasium

from ..robot_env import task
from ..robot_env.env import RobotEnv
from . import catalog

NAMESPACE = "tether"


def make(task: str, seed: int = 0) -> RobotEnv:
    """The environment of a shipped task; `seed` is of the twin's noise. Nobody asks MuJoCo before this."""
    env = catalog.make_env(catalog.make_task(catalog.load_spec(task)), seed=seed)
    assert isinstance(env, RobotEnv)
    return env


for _name in task.shipped():
    gymnasium.register(
        f"{NAMESPACE}/{_name}-v0", entry_point=f"{__name__}:make", kwargs={"task": _name}, nondeterministic=True
    )
