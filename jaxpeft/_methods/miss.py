"""MiSS: an update whose rows are shared among groups of inputs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank
from jaxpeft._operand import Operand
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole
from jaxpeft.extend._dropout import check_rate, dropout_key, dropped


@weight
class SharedRows(Weight):
    """The matrix `w + b[row]`: inputs with the same `row` share a row of the delta.

    `row[i]` is i modulo the rank, for each of the `n_inputs` inputs. A shard of `in` has its own
    slice of `row`.
    """

    w: Any = base_weight()
    row: Any = axes("in", shared=True)
    b: Any = axes("rank", "out")
    key: Any = axes(optional=True)
    n_inputs: int = static(0)
    rank: int = static(0)
    dropout: float = static(0.0)

    local_in = local_out = True

    def forward(self, x):
        """x @ (w + b[row]) = x @ w + h @ b, h[k] = sum of x[i] with row[i] = k."""
        return x @ self.w + self._group_sums(dropped(x, self.key, self.dropout)) @ self.b

    def transposed(self, y):
        """y @ (w + b[row]).T = y @ w.T + (y @ b.T)[row]."""
        yb = dropped(y, self.key, self.dropout) @ self.b.T
        return y @ self.w.T + jnp.take(yb, self.row.array, axis=-1)

    def lookup(self, ids):
        """(w + b[row])[ids] = w[ids] + b[row[ids]]."""
        delta = self.b[jnp.take(self.row.array, ids, mode="clip")]
        return self.with_delta(self.w[ids], ids, delta, self.row.site.rows)

    def materialize(self):
        return dense(self.w) + self.b[self.row]

    def _group_sums(self, x):
        """h (..., rank) of the inputs x (..., in)."""
        n = x.shape[-1]
        if n != self.n_inputs:  # a shard of `in`, which may start at any row
            ones = _one_hot(self.row.array, self.rank, x.dtype)
            return x @ Operand(ones, (IN, "rank"), IN, "rank", self.row.site)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % self.rank)])
        return jnp.sum(x.reshape(*x.shape[:-1], -1, self.rank), axis=-2)


def _one_hot(row: jax.Array, rank: int, dtype: Any) -> jax.Array:
    """The rows (in,) as one-hot vectors (in, rank)."""
    return jax.nn.one_hot(row, rank, dtype=dtype)


@register_method
def miss(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Matrix shard sharing (first named Bone): a trainable matrix of r rows, repeated along `in`.

    Row i of each selected matrix `w` (in, out) becomes

        w[i] + b[i mod r]

    with a trainable `b` (r, out), which starts at zero, so that training starts at the base
    model. A product sums groups of inputs first,

        y = x @ w + h @ b,    h[k] = x[k] + x[r + k] + x[2 r + k] + ...

    which costs half as much as LoRA's and needs no random factor. If r does not divide `in`, the
    last group is shorter. The inputs are in the order of the weight's axes, for example heads
    before head dimensions. Those of a convolution are its window and its input channels; they are
    summed by a frozen kernel of zeros and ones.

    The paper's variants are left out: "bat", which multiplies blocks of the base by the shared
    matrix, and "mini", which repeats it along `out` as well.

    Args:
      rank: r, the number of rows of `b`, at most `in`, or a mapping as for `lora`.
      sites: The matrices to adapt, with all of their outputs.
      dropout, dtype: As for `lora`.

    Returns:
      A `Method` with r * out trainable parameters per matrix.

    Raises:
      ValueError: A rank is out of range (the message names the matrix), the dropout is outside
        [0, 1), or a slice of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.miss(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/b': (2, 4)}

    References:
      Kang and Yin, MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing, 2024
      (first as Bone: Block Affine). https://arxiv.org/abs/2409.15371
    """
    check_rate("miss", dropout)
    check_whole("miss", sites)
    ranks = by_pattern(rank, sites, "rank")

    def apply(key: jax.Array, tree: Any) -> Any:
        rows = functools.cache(lambda n, r: jnp.arange(n, dtype=jnp.int32) % r)

        def make(key: jax.Array, site: Site, view: View) -> View:
            del key
            r, n = ranks[site.path], site.size(IN)
            if not 1 <= r <= n:
                raise ValueError(
                    f"`miss(rank={r})` needs 1 <= rank <= in, but '{site.path}' of shape "
                    f"{site.shape} has {n} inputs. Lower the rank, or leave this weight out of the "
                    "sites."
                )
            b = Trainable(jnp.zeros((*site.stack, r, site.size(OUT)), dtype))
            mask_key = dropout_key(site, view, dropout)
            weight: Weight
            if "conv" in site.kinds:
                ones = _one_hot(rows(n, r), r, dtype)
                ones = jnp.broadcast_to(ones, (*site.stack, n, r))
                weight = LowRank(view.weight, ones, b, mask_key, 1.0, dropout, part=None)
            else:
                weight = SharedRows(view.weight, rows(n, r), b, mask_key, n, r, dropout)
            return dataclasses.replace(view, weight=weight)

        return apply_to_sites(key, tree, sites, make, caller="miss")

    options = dict(rank=rank, sites=sites, dropout=dropout, dtype=dtype)
    return Method("miss", options, apply)
