"""Eight CPU devices, jax strict about shapes, and each program compiled once however many tests run it."""

import atexit
import itertools
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import jax

compiled = tempfile.mkdtemp(prefix="repo-jax-tests-")
atexit.register(shutil.rmtree, compiled, ignore_errors=True)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", compiled)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Most of the time goes into compiling programs that run once. Processes that tests start have the flags of users.
flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{flags or ''} --xla_backend_optimization_level=0"
jax.devices()  # which reads them
if flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = flags

MAPS, EVERY = (
    40_000,
    20,
)  # of the 65,530 memory maps that Linux gives a process, a few for each compiled program; tests between two looks
finished = itertools.count(1)


def pytest_runtest_teardown():
    """Lets go of compiled programs before there are more than a process may map, past which XLA crashes."""
    if next(finished) % EVERY == 0 and os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", "rb") as maps:
            if sum(1 for _ in maps) > MAPS:
                jax.clear_caches()
