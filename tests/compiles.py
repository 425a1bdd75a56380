"""What XLA compiles inside a `with`, by the name of the jitted function.

A jitted function's own cache may be emptied at any time, for the limits that JAX keeps for all
of them together; the compilations themselves cannot be missed.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

from jax import monitoring

EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[Counter]:
    """Counts by name: {"step": 1} where a jitted `step` was compiled once."""
    counts: Counter = Counter()

    def listen(event: str, seconds: float, **about: str) -> None:
        if event == EVENT:
            counts[about["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        monitoring.unregister_event_duration_listener(listen)
