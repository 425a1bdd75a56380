"""What a method is told of its task before it is trained: taken at the base with a trained head."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxpeft as jp
from comparison.cell import Cell
from comparison.rows import PROBE, Row
from comparison.tasks import Split, Task
from comparison.tuned import Tuned

BATCHES = 8  # of a task's own size
PROBE_STEPS = 150  # of the head


class Calibration(NamedTuple):
    """A task's base with a trained head, and batches drawn from what it trains on."""

    probe: Cell
    params: Any
    batches: list[Split]

    def forward(self, params: Any, batch: Split) -> jax.Array:
        """The model's outputs."""
        return self.probe.model(params, batch.tokens, mask=batch.mask)

    def loss(self, params: Any, batch: Split) -> jax.Array:
        """The mean loss."""
        total, count = self.probe.task.head.loss(self.forward(params, batch), batch.labels)
        return total / count

    def moments(self, sites: jp.Sites) -> Mapping[str, jp.calibration.Moments]:
        """Of the inputs of these matrices at tokens that are no padding."""
        mask = lambda batch: batch.mask.astype(np.float32)  # noqa: E731
        return jp.calibration.input_moments(
            self.forward, self.params, sites, self.batches, mask=mask
        )

    def gradients(self, sites: jp.Sites) -> Mapping[str, jax.Array]:
        """Of the mean loss."""
        return jp.calibration.mean_gradients(self.loss, self.params, sites, self.batches)


@functools.cache
def calibration(task: Task) -> Calibration:
    """Of a task, the same for every method and seed."""
    probe = Cell(task, PROBE, PROBE_STEPS)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(task.train), size=task.rows) for _ in range(BATCHES)]
    trained = jp.combine(*probe.train(0.0, 0))
    return Calibration(probe, trained, [task.train.rows(at) for at in drawn])


def cell_of(task: Task, row: Row, steps: int) -> Cell:
    """A row on a task, trained in its own way, and told of the task what it needs."""
    kind = Tuned if row.wrap or row.penalty else Cell
    if row.needs is None:
        return kind(task, row, steps)
    told = getattr(calibration(task), row.needs)
    return kind(task, dataclasses.replace(row, make=lambda p: row.make(p, told(p.kernels))), steps)
