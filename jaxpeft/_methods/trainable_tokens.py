"""Trainable tokens: chosen rows of an embedding table, trained, the others left as they are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.prompt_tuning import embeddings
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites


@weight
class NewRows(Weight):
    """The matrix `w` with other rows at `ids`."""

    w: Any = base_weight()
    rows: Any = axes("tokens", "out")
    ids: tuple[int, ...] = static(())

    def forward(self, x):
        """x @ W = x @ w + x[ids] @ (rows - w[ids])."""
        ids = jnp.asarray(self.ids)
        change = self.rows.matrix - self.w[ids]
        return x @ self.w + (x[..., ids] @ change).astype(x.dtype)

    def transposed(self, y):
        """y @ W.T: the columns at ids are y @ rows.T."""
        out = y @ self.w.T
        return out.at[..., jnp.asarray(self.ids)].set((y @ self.rows.T).astype(out.dtype))

    def lookup(self, ids):
        """W[i] is a new row where i is among the chosen ids."""
        rows = self.w[ids]
        hit = ids[..., None] == jnp.asarray(self.ids, ids.dtype)
        new = self.rows[jnp.argmax(hit, axis=-1)].astype(rows.dtype)
        return jnp.where(hit.any(axis=-1)[..., None], new, rows)

    def materialize(self):
        w = dense(self.w)
        return w.at[jnp.asarray(self.ids)].set(self.rows.astype(w.dtype))


@register_method
def trainable_tokens(ids: Sequence[int], sites: Sites, *, dtype: Any = jnp.float32) -> Method:
    """Trains the embeddings of chosen tokens, such as new ones, and of no others.

    A table that is also the head (a tied one) has the new rows there too. They start where the
    table has them, so that training starts at the base model.

    Args:
      ids: The tokens, each once.
      sites: The embedding table.
      dtype: Of the rows.

    Returns:
      A method with len(ids) * width trained numbers.

    Raises:
      ValueError: No id, one that occurs twice, or one that the table does not have; a weight
        that is no table.

    References:
      The trainable tokens of Hugging Face PEFT, of which there is no paper.
    """
    chosen = tuple(int(i) for i in ids)
    if not chosen or len(set(chosen)) < len(chosen):
        twice = sorted({i for i in chosen if chosen.count(i) > 1})
        raise ValueError(
            "`trainable_tokens(ids)`: "
            + (f"{twice} occur more than once." if twice else "no token is chosen.")
        )

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        if "embedding" not in site.kinds or site.stack:
            raise ValueError(
                f"`trainable_tokens`: the model uses '{site.path}' of shape {site.shape} as "
                f"{', '.join(sorted(site.kinds))}, not as one table that is read by id."
            )
        if min(chosen) < 0 or max(chosen) >= site.size(IN):
            wrong = max(chosen) if max(chosen) >= site.size(IN) else min(chosen)
            raise ValueError(
                f"`trainable_tokens`: '{site.path}' has {site.size(IN)} rows, so no token {wrong}."
            )
        rows = embeddings(view, jnp.asarray(chosen)).astype(dtype)
        return dataclasses.replace(view, weight=NewRows(view.weight, Trainable(rows), chosen))

    return Method(
        "trainable_tokens",
        {"ids": list(chosen), "sites": sites, "dtype": dtype},
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="trainable_tokens"),
    )
