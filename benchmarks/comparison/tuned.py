"""A method that is trained in a way of its own: its optimizer wrapped, or with a penalty."""

from typing import Any

import optax

from comparison.cell import Cell
from comparison.places import places
from comparison.tasks import Split


class Tuned(Cell):
    """A cell whose row says how the adapter's optimizer is wrapped and what the loss has added."""

    def tx(self, rate: Any) -> optax.GradientTransformation:
        """The comparison's optimizer, with the row's own around that of the adapter."""
        plain = super().tx(rate)
        if self.row.wrap is None:
            return plain
        # The head is left to the plain one: what is wrapped never sees it.
        where = places(self.sites, self.task.base)
        both = {"head": plain, "adapter": self.row.wrap(plain, where, self.steps)}
        return optax.partition(both, dict(self.labels))

    def loss(self, frozen: Any, adapter: Any, batch: Split, key: Any) -> tuple[Any, Any]:
        total, weight = super().loss(frozen, adapter, batch, key)
        if self.row.penalty is not None:
            total = total + weight * self.row.penalty(adapter)
        return total, weight
