"""Tasks with fewer examples to train on."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from comparison.tasks import TASKS, Task

FEW = (100, 1000)


def first(name: str, count: int) -> Task:
    """A task with `count` of its training examples, drawn once, and all of its questions."""
    task = TASKS[name]()
    chosen = np.random.default_rng(0).permutation(len(task.train))[:count]
    return dataclasses.replace(task, name=f"{name} {count}", train=task.train.rows(chosen))


#: As TASKS.
SIZES: dict[str, Callable[[], Task]] = {
    f"{name} {count}": functools.partial(first, name, count)
    for name in ("snips", "trec")
    for count in FEW
}
