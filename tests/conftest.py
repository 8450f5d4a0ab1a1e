"""What every test and its child processes run under: one thread a library, JAX that refuses to broadcast."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib.util import find_spec

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
# (256,) - (256, 1) is otherwise a silent 256 x 256 loss; read by JAX when it is imported
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # many processes compile the same small update
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="tether-jax-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("tether", deadline=None)  # no test depends on how busy the machine is
    settings.load_profile("tether")
