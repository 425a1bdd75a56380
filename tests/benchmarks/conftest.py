"""What the tests of the benchmarks share: their folder on the path, and tasks in small."""

import sys
from pathlib import Path

import jax
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(autouse=True)
def in_float32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder like the real one, with models drawn at random."""
    from comparison import calibration, cell, costs, tasks

    from . import small

    folder = tmp_path_factory.mktemp("data")
    with jax.enable_x64(False):
        small.write(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXPEFT_DATA", str(folder))
    patch.setitem(tasks.LENGTHS, "minilm", (6, 12))
    patch.setitem(tasks.LENGTHS, "stories260k", (48,))
    patch.setattr(cell, "MAX_NEW", 4)
    patch.setattr(calibration, "PROBE_STEPS", 2)
    patch.setattr(cell, "ASKED", 2)
    patch.setattr(costs, "SHAPES", {"1x16": (1, 4), "32x128": (2, 8)})
    patch.setattr(costs, "STORIES", 2)
    patch.setattr(tasks, "BATCH", {"minilm": 2, "stories260k": 2})
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def task(data):
    """A task by name, made once."""
    from comparison import calibration, costs, protocol, tasks

    with jax.enable_x64(False):
        made = {name: make() for name, make in tasks.TASKS.items()}
    yield made.__getitem__
    cached_here = (calibration.calibration, costs.sentences, costs.stories)
    for cached in (tasks.base, protocol._task, *cached_here):
        cached.cache_clear()
