"""Trainable tokens: trains selected rows of an embedding and freezes the others."""

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
class ReplacedRows(Weight):
    """The matrix `w` with the rows at `token_ids` replaced by `rows`."""

    w: Any = base_weight()
    rows: Any = axes("tokens", "out")
    token_ids: tuple[int, ...] = static(())

    def forward(self, x):
        """x @ w + x[token_ids] @ (rows - w[token_ids])."""
        ids = jnp.asarray(self.token_ids)
        delta = self.rows.matrix - self.w[ids]
        return x @ self.w + (x[..., ids] @ delta).astype(x.dtype)

    def transposed(self, y):
        """y @ w.T, with y @ rows.T in the columns at `token_ids`."""
        out = y @ self.w.T
        return out.at[..., jnp.asarray(self.token_ids)].set((y @ self.rows.T).astype(out.dtype))

    def lookup(self, ids):
        """w[ids], with rows[k] where an id is token_ids[k]."""
        rows = self.w[ids]
        matches = ids[..., None] == jnp.asarray(self.token_ids, ids.dtype)
        replaced = self.rows[jnp.argmax(matches, axis=-1)].astype(rows.dtype)
        return jnp.where(matches.any(axis=-1)[..., None], replaced, rows)

    def materialize(self):
        w = dense(self.w)
        return w.at[jnp.asarray(self.token_ids)].set(self.rows.astype(w.dtype))


@register_method
def trainable_tokens(token_ids: Sequence[int], sites: Sites, *, dtype: Any = jnp.float32) -> Method:
    """Trains the embeddings of selected tokens, such as new ones, and freezes all others.

    Each selected embedding `w` (vocabulary, d) becomes

        w[i] = rows[k] if i = token_ids[k], else w[i]

    with trainable `rows` (n, d), which start at w[token_ids], so that training starts at the base
    model. If the embedding is tied to the head, the head has the trainable rows as well.

    Args:
      token_ids: n ids of tokens, each of them once.
      sites: The embedding, or several embeddings of the same vocabulary.
      dtype: Dtype of the trainable rows.

    Returns:
      A `Method` with n * d trainable parameters per embedding.

    Raises:
      ValueError: There is no id, an id occurs twice or is outside the vocabulary, or a selected
        weight is not an embedding.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, ids: p["table"][ids], {"table": jnp.ones((6, 4))}
      >>> sites = jp.sites(fn, params, jnp.zeros((1, 3), int))
      >>> method = jp.trainable_tokens([4, 5], sites.embedding)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'table/rows': (2, 4)}

    References:
      The trainable tokens of Hugging Face PEFT, of which there is no paper.
    """
    chosen = tuple(int(i) for i in token_ids)
    if not chosen:
        raise ValueError("`trainable_tokens(token_ids=[])`: give at least one token id.")
    if repeated := sorted({i for i in chosen if chosen.count(i) > 1}):
        raise ValueError(
            f"`trainable_tokens(token_ids=...)`: {repeated} occur more than once. Give each token "
            "id once."
        )

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        if "embedding" not in site.kinds or site.stack:
            raise ValueError(
                f"`trainable_tokens`: the model uses '{site.path}' of shape {site.shape} as "
                f"{', '.join(sorted(site.kinds))}, not as one embedding whose rows are looked up. "
                "Select from `sites.embedding`."
            )
        if min(chosen) < 0 or max(chosen) >= site.size(IN):
            wrong = max(chosen) if max(chosen) >= site.size(IN) else min(chosen)
            raise ValueError(
                f"`trainable_tokens`: '{site.path}' has {site.size(IN)} rows, so there is no token "
                f"{wrong}. Give ids from 0 to {site.size(IN) - 1}."
            )
        rows = embeddings(view, jnp.asarray(chosen)).astype(dtype)
        return dataclasses.replace(view, weight=ReplacedRows(view.weight, Trainable(rows), chosen))

    return Method(
        "trainable_tokens",
        {"token_ids": list(chosen), "sites": sites, "dtype": dtype},
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="trainable_tokens"),
    )
