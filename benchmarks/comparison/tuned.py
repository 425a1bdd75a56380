"""A method that is trained in a way of its own: its optimizer wrapped, or with a penalty."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from comparison.cell import CLIP, Cell, optimizer, trimmed
from comparison.places import places
from comparison.tasks import Split
from jaxpeft import train


class Tuned(Cell):
    """A cell whose row says how the adapter's optimizer is wrapped and what the loss has added."""

    def tx(self, rate: Any) -> optax.GradientTransformation:
        """The comparison's optimizer, with the row's own around that of the adapter."""
        plain = optimizer(rate, self.steps, self.labels)
        if self.row.wrap is None:
            return plain
        # The head is left to the plain one: what is wrapped never sees it.
        where = places(self.sites, self.task.base)
        both = {"head": plain, "adapter": self.row.wrap(plain, where, self.steps)}
        return optax.partition(both, dict(self.labels))

    def loss(self, adapter: Any, frozen: Any, batch: Split, key: Any) -> tuple[Any, Any]:
        total, weight = super().loss(adapter, frozen, batch, key)
        if self.row.penalty is not None:
            total = total + weight * self.row.penalty(adapter)
        return total, weight

    def start(self, seed: int) -> tuple[train.State, Any]:
        frozen, adapter = self.untrained(seed)
        return train.init(adapter, self.tx(0.0)), frozen

    @functools.cached_property
    def step(self) -> Any:
        def step(state: Any, frozen: Any, batch: Split, rate: Any) -> Any:
            once = train.train_step(self.loss, self.tx(rate), clip=CLIP)
            return trimmed(lambda x: once(state, frozen, x, None), batch, self.task.lengths)

        batch = self.task.train.rows(np.zeros(self.task.rows, int))
        shapes = jax.eval_shape(lambda: (*self.start(0), batch, jnp.float32(0)))
        return jax.jit(step, donate_argnums=0).lower(*shapes).compile()
