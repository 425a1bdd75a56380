"""LoKr: the Kronecker product of two small matrices as the update."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._operand import Operand
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole
from jaxpeft.extend._dropout import check_rate, dropout_key, dropped


@weight
class KroneckerProduct(Weight):
    """The matrix `w + scale * kron(w1, w2)`, where w1 and w2 may be low-rank products.

    With `in` = i1 * i2 and `out` = o1 * o2, w1 is (i1, o1) and w2 is (i2, o2), which is
    `w2_shape`. Either the field `w1` holds w1, or `a1 @ b1` is w1, and likewise for w2. An input
    reshaped to a matrix X (i1, i2) gives w1.T @ X @ w2, so that no (in, out) matrix is formed.
    """

    w: Any = base_weight()
    w1: Any = axes("in", "out", optional=True)
    a1: Any = axes("in", "rank", optional=True)
    b1: Any = axes("rank", "out", optional=True)
    w2: Any = axes("rows", "columns", optional=True)
    a2: Any = axes("rows", "rank", optional=True)
    b2: Any = axes("rank", "columns", optional=True)
    key: Any = axes(optional=True)
    w2_shape: tuple[int, int] = static((1, 1))
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_in = local_out = True

    def granularity(self, field, axis):
        # A row of w1 belongs to i2 rows of the matrix, a column to o2 columns.
        if field in ("w1", "a1", "b1") and axis in (IN, OUT):
            return self.w2_shape[axis == OUT], 1
        return 1, 1

    @property
    def _w1_factors(self):
        """Operands whose product is w1: one, or two of low rank."""
        return [f for f in (self.w1, self.a1, self.b1) if f is not None]

    @property
    def _w2_factors(self):
        return [f for f in (self.w2, self.a2, self.b2) if f is not None]

    def forward(self, x):
        """x @ w + scale * (w1.T @ X @ w2), with X (i1, i2) reshaped from x (in,)."""
        x_kept = dropped(x, self.key, self.dropout)
        delta = _product(x_kept, self.w2_shape[0], self._w1_factors, self._w2_factors)
        return x @ self.w + self.scale * delta

    def transposed(self, y):
        """y @ w.T + scale * (w1 @ Y @ w2.T), with Y (o1, o2) reshaped from y (out,)."""
        y_kept = dropped(y, self.key, self.dropout)
        w1, w2 = _transposed(self._w1_factors), _transposed(self._w2_factors)
        return y @ self.w.T + self.scale * _product(y_kept, self.w2_shape[1], w1, w2)

    def lookup(self, ids):
        """w[ids] + scale * kron(w1[ids // i2], w2[ids % i2])."""
        w1_rows = _rows(ids // self.w2_shape[0], self._w1_factors)
        w2_rows = _rows(ids % self.w2_shape[0], self._w2_factors)
        delta = self.scale * w1_rows[..., :, None] * w2_rows[..., None, :]
        delta = delta.reshape(*ids.shape, -1)
        return self.with_delta(self.w[ids], ids, delta, self._w1_factors[0].site.rows)

    def materialize(self):
        w1 = self.a1 @ self.b1 if self.w1 is None else self.w1
        w2 = self.a2 @ self.b2 if self.w2 is None else self.w2
        return dense(self.w) + self.scale * jnp.kron(w1, w2)


def _product(x: jax.Array, i2: int, w1: list, w2: list) -> jax.Array:
    """w1.T @ X @ w2 for inputs x (..., i1 * i2), as (..., o1 * o2).

    The first factor of w2 comes first: where w2 has a low rank, what is left is smaller.
    """
    x = x.reshape(*x.shape[:-1], -1, i2)
    x = _times_each_row(x, w2[0])
    x = jnp.swapaxes(x, -1, -2)
    for factor in w1:
        x = _times_each_row(x, factor)
    x = jnp.swapaxes(x, -1, -2)
    for factor in w2[1:]:
        x = _times_each_row(x, factor)
    return x.reshape(*x.shape[:-2], -1)


def _transposed(factors: list) -> list:
    return [factor.T for factor in reversed(factors)]


def _rows(ids: jax.Array, factors: list) -> jax.Array:
    """Rows of the product of the factors."""
    rows = factors[0][ids]
    for factor in factors[1:]:
        rows = rows @ factor
    return rows


def _times_each_row(x: jax.Array, op: Operand) -> jax.Array:
    """x (..., k, n) @ op (n, m), for each of the k rows."""
    groups = op.site.arrays.get("groups")
    if groups is None:
        return x @ op
    # Tokens that are sorted by expert stay sorted if each of them becomes k rows.
    site = op.site.with_arrays({"groups": groups * x.shape[-2]})
    y = x.reshape(-1, x.shape[-1]) @ Operand(op.array, op.roles, op.rows, op.cols, site)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@register_method
def lokr(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    decompose_factor: int
    | Sequence[int | None]
    | Mapping[str, int | Sequence[int | None] | None]
    | None = None,
    decompose_both: bool = False,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Low-rank Kronecker product adaptation.

    Each selected matrix `w` (in, out) becomes

        w + s * kron(w1, w2),    s = alpha / r

    with w1 (i1, o1) and w2 (i2, o2), where in = i1 * i2 and out = o1 * o2. If r < max(i2, o2) / 2,
    w2 is a low-rank product a2 @ b2 of rank r. With `decompose_both`, if r < max(i1, o1) / 2, w1
    is a low-rank product a1 @ b1 as well. Otherwise w1 and w2 are trained as whole matrices.

    `b2`, or a whole w2, starts at zero, so that training starts at the base model. All other
    arrays start uniform between -1 / sqrt(rows) and 1 / sqrt(rows), each with its own number of
    rows. The rows of an embedding are read one at a time, so that they count as one.

    A side d is factored into (d1, d2) as in LyCORIS: of all pairs d1 <= d2 with d1 * d2 = d, the
    one nearest to the square root, so that a prime side becomes (1, d). `decompose_factor` gives
    d1 instead.

    Args:
      rank: r, at least 1, or a mapping as for `lora`.
      sites: The linear weights and embeddings to adapt, with all of their outputs. The kernel of a
        convolution is not a Kronecker product over its channels; use `loha` for it.
      decompose_factor: i1 and o1: one number for both, a pair (i1, o1), or a mapping from path
        patterns to these. `None` takes the pairs nearest to the square roots.
      decompose_both: Whether w1 may be a low-rank product, too.
      alpha: Strength of the update, or a mapping as for `lora`. `None` means s = 1.
      dropout, dtype: As for `lora`.

    Returns:
      A `Method`. Per matrix, w1 has i1 * o1 trainable parameters, or r * (i1 + o1) as a low-rank
      product, and w2 has i2 * o2, or r * (i2 + o2).

    Raises:
      ValueError: A rank is below 1, a factor is neither a number nor a pair or does not divide its
        side (the message names the weight and the divisors of its side), a convolution or a slice
        of the outputs is selected, or the dropout is outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 12))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.lokr(1, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/w1': (2, 3), 'w/a2': (4, 1), 'w/b2': (1, 4)}

    References:
      Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
      Evaluation, 2024. https://arxiv.org/abs/2309.14859
      Edalati et al., KronA: Parameter Efficient Tuning with Kronecker Adapter, 2022.
      https://arxiv.org/abs/2212.10650
    """
    check_rate("lokr", dropout)
    check_whole("lokr", sites)
    ranks = by_pattern(rank, sites, "rank")
    alphas = by_pattern(alpha, sites, "alpha")
    factors = by_pattern(decompose_factor, sites, "decompose_factor")
    for path, r in ranks.items():
        if r < 1:
            raise ValueError(f"`lokr(rank={r})` for '{path}': give a rank of at least 1.")
    factored = {path: _factored_sides(site, factors[path]) for path, site in sites.items()}

    def make(key: jax.Array, site: Site, view: View) -> View:
        r, alpha = ranks[site.path], alphas[site.path]
        (i1, i2), (o1, o2) = factored[site.path]
        keys = iter(jax.random.split(key, 3))
        # A lookup reads one row at a time, where a product sums over all rows.
        looked_up = "embedding" in site.kinds

        def random(n: int, m: int, n_summed: int) -> Trainable:
            x = jax.random.uniform(next(keys), (*site.stack, n, m), dtype, -1, 1)
            return Trainable((x / math.sqrt(n_summed)).astype(dtype))

        def zeros(n: int, m: int) -> Trainable:
            return Trainable(jnp.zeros((*site.stack, n, m), dtype))

        fields: dict[str, Any]
        if decompose_both and 2 * r < max(i1, o1):
            fields = {"a1": random(i1, r, 1 if looked_up else i1), "b1": random(r, o1, r)}
        else:
            fields = {"w1": random(i1, o1, 1 if looked_up else i1)}
        if 2 * r < max(i2, o2):
            fields |= {"a2": random(i2, r, 1 if looked_up else i2), "b2": zeros(r, o2)}
        else:
            fields |= {"w2": zeros(i2, o2)}
        weight = KroneckerProduct(
            view.weight,
            **fields,
            key=dropout_key(site, view, dropout),
            w2_shape=(i2, o2),
            scale=1.0 if alpha is None else alpha / r,
            dropout=dropout,
        )
        return dataclasses.replace(view, weight=weight)

    options = dict(
        rank=rank,
        sites=sites,
        decompose_factor=decompose_factor,
        decompose_both=decompose_both,
        alpha=alpha,
        dropout=dropout,
        dtype=dtype,
    )
    return Method(
        "lokr", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="lokr")
    )


def _factored_sides(site: Site, factor: Any) -> list[tuple[int, int]]:
    """[(i1, i2), (o1, o2)] of a weight.

    Raises:
      ValueError: The weight is the kernel of a convolution, or a factor does not divide its side.
    """
    if "conv" in site.kinds:
        raise ValueError(
            f"`lokr`: '{site.path}' of shape {site.shape} is the kernel of a convolution, which a "
            "Kronecker product does not fit. Leave it out of the sites, or use `loha`."
        )
    pair = factor if isinstance(factor, Sequence) else (factor, factor)
    if len(pair) != 2:
        raise ValueError(
            f"`lokr(decompose_factor={factor})` for '{site.path}': give one number, or a pair of "
            "two, for `in` and for `out`."
        )
    found = []
    for role, first in zip((IN, OUT), pair, strict=True):
        size = site.size(role)
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        if first is None:
            first = max(n for n in divisors if n * n <= size)
        if first not in divisors:
            raise ValueError(
                f"`lokr(decompose_factor={factor})`: {first} does not divide the {role} side of "
                f"'{site.path}' of shape {site.shape}, which is {size}. These do: {divisors}. Give "
                "one of them, a pair (in, out), or a mapping from path patterns."
            )
        found.append((first, size // first))
    return found
