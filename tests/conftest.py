"""What every test and its child processes run under (one thread a library, JAX that refuses to broadcast), and
what several of them share."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import tempfile
from importlib.util import find_spec

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
# (256,) - (256, 1) is otherwise a silent 256 x 256 loss; read by JAX when it is imported
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# a third of a test may go into optimising nets that are too small to gain from it
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# nothing is read from, or left in, the home of who runs the tests
os.environ["HOME"] = _home = tempfile.mkdtemp(prefix="tether-home-")
for _name in ("TETHER_KEYS", "XDG_CACHE_HOME"):
    os.environ.pop(_name, None)
atexit.register(shutil.rmtree, _home, ignore_errors=True)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # many processes compile the same small update
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="tether-jax-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("tether", deadline=None)  # no test depends on how busy the machine is
    settings.load_profile("tether")

TETHER = [sys.executable, "-m", "tether.launch.cli"]
# a training that takes seconds
SETTINGS = ["agent.hidden=[16,16]", "agent.utd=1", "agent.batch=32", "agent.ensemble=2", "learner.start_steps=10"]


def flags(*settings: str) -> list[str]:
    """Settings as options of the command line."""
    return [part for setting in settings for part in ("--set", setting)]


def square(robot: str = "fake", side_m: float = 10.0, episode_s: float = 60.0, hindsight: float = 0.0) -> str:
    """A task file: anticlockwise round a square from the origin, a checkpoint in the middle of every side."""
    d, half = side_m, side_m / 2
    checkpoints = [f"[[checkpoint]]\nat = [{x}, {y}]\n" for x, y in ((half, 0.0), (d, half), (half, d), (0.0, half))]
    return f"""
[task]
robot = "{robot}"
kind = "course"
hz = 10
episode_s = {episode_s:g}
hindsight = {hindsight}
[course]
width_m = 2.0
centerline = [[0.0, 0.0], [{d}, 0.0], [{d}, {d}], [0.0, {d}]]
{"".join(checkpoints)}"""


FAKE = square(side_m=8.0, episode_s=6.0)


def free_address() -> str:
    """An address on this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"
