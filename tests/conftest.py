"""How JAX runs in every test: float64, 8 virtual CPU devices, little optimization by XLA.

Tests of float32 switch float64 off for themselves. Shapes and dtypes promote as in JAX's defaults.
"""

import itertools
import os
from importlib.metadata import version
from pathlib import Path

# Before jax starts. The concurrency-optimized scheduler trades memory for overlap, so that
# memory_analysis() would measure the scheduler instead of the program.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        # Programs here run once, on a handful of numbers: compiling is what takes the time.
        "--xla_backend_optimization_level=0",
    ]
    # Half of what is left goes into the emitters of fusions. XLA can do without them in 0.10.
    + ["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10.")
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

#: Of memory, beyond which Linux gives a process no more: it then dies. Programs hold a few each.
PIECES = 65_530
MAPS = Path("/proc/self/maps")
_tests = itertools.count(1)


def pytest_runtest_teardown():
    """Lets go of compiled programs before a worker has too many of them."""
    if next(_tests) % 20 == 0 and MAPS.exists():
        if MAPS.read_bytes().count(b"\n") > PIECES // 2:
            jax.clear_caches()
