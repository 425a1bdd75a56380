"""LoKr: the Kronecker product of two small matrices."""

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
class Kronecker(Weight):
    """The matrix `w + scale * kron(w1, w2)`, each of the two whole or of low rank.

    With `in` = i1 * i2 and `out` = o1 * o2, `w1` is (i1, o1) and `w2` (i2, o2) = `inner`. An
    input seen as a matrix (i1, i2) gives the matrix w1.T @ x @ w2, from two small products.
    """

    w: Any = base_weight()
    w1: Any = axes("in", "out", optional=True)
    a1: Any = axes("in", "rank", optional=True)
    b1: Any = axes("rank", "out", optional=True)
    w2: Any = axes("rows", "columns", optional=True)
    a2: Any = axes("rows", "rank", optional=True)
    b2: Any = axes("rank", "columns", optional=True)
    key: Any = axes(optional=True)
    inner: tuple[int, int] = static((1, 1))
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_in = local_out = True

    def granularity(self, field, axis):
        # A row of `w1` stands for i2 rows of the whole, a column for o2.
        if field in ("w1", "a1", "b1") and axis in (IN, OUT):
            return self.inner[axis == OUT], 1
        return 1, 1

    @property
    def _outer(self):
        return [f for f in (self.w1, self.a1, self.b1) if f is not None]

    @property
    def _inner(self):
        return [f for f in (self.w2, self.a2, self.b2) if f is not None]

    def forward(self, x):
        """x @ w + scale * (w1.T @ (x as i1, i2) @ w2)."""
        low = dropped(x, self.key, self.dropout)
        change = _product(low, self.inner[0], self._outer, self._inner)
        return x @ self.w + self.scale * change

    def transposed(self, y):
        """y @ w.T + scale * (w1 @ (y as o1, o2) @ w2.T)."""
        low = dropped(y, self.key, self.dropout)
        change = _product(low, self.inner[1], _transposed(self._outer), _transposed(self._inner))
        return y @ self.w.T + self.scale * change

    def lookup(self, ids):
        """w[ids] + scale * kron(w1[ids // i2], w2[ids % i2])."""
        outer = _row(ids // self.inner[0], self._outer)
        inner = _row(ids % self.inner[0], self._inner)
        change = self.scale * outer[..., :, None] * inner[..., None, :]
        change = change.reshape(*ids.shape, -1)
        return self.with_delta(self.w[ids], ids, change, self._outer[0].site.rows)

    def materialize(self):
        w1 = self.a1 @ self.b1 if self.w1 is None else self.w1
        w2 = self.a2 @ self.b2 if self.w2 is None else self.w2
        return dense(self.w) + self.scale * jnp.kron(w1, w2)


def _product(x: jax.Array, i2: int, outer: list, inner: list) -> jax.Array:
    """x (..., i1 * i2) to (..., o1 * o2): the first inner factor, the outer ones, the others."""
    x = x.reshape(*x.shape[:-1], -1, i2)
    x = _by_row(x, inner[0])
    x = jnp.swapaxes(x, -1, -2)
    for factor in outer:
        x = _by_row(x, factor)
    x = jnp.swapaxes(x, -1, -2)
    for factor in inner[1:]:
        x = _by_row(x, factor)
    return x.reshape(*x.shape[:-2], -1)


def _transposed(factors: list) -> list:
    return [factor.T for factor in reversed(factors)]


def _row(ids: jax.Array, factors: list) -> jax.Array:
    """Rows of the product of the factors."""
    row = factors[0][ids]
    for factor in factors[1:]:
        row = row @ factor
    return row


def _by_row(x: jax.Array, op: Operand) -> jax.Array:
    """x (..., k, n) @ op (n, m), for each of the k rows."""
    groups = op.site.arrays.get("groups")
    if groups is None:
        return x @ op
    # Tokens sorted by expert stay so where each becomes k of them.
    site = op.site.with_arrays({"groups": groups * x.shape[-2]})
    y = x.reshape(-1, x.shape[-1]) @ Operand(op.array, op.roles, op.rows, op.cols, site)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@register_method
def lokr(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    factor: int
    | Sequence[int | None]
    | Mapping[str, int | Sequence[int | None] | None]
    | None = None,
    both: bool = False,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Low-rank Kronecker product: a small matrix for the blocks, and one for what is in a block.

    Each selected matrix `w` (in, out) becomes `w + s * kron(w1, w2)` with `w1` (i1, o1) and `w2`
    (i2, o2), in = i1 * i2 and out = o1 * o2. Where r < max(i2, o2) / 2, `w2` is `a2 @ b2` of
    rank r; with `both`, where r < max(i1, o1) / 2, `w1` is `a1 @ b1` as well; otherwise they are
    kept whole. `w1` (or `a1` and `b1`) and `a2` are uniform within 1 / sqrt(rows), each by its own
    number of rows (those of an embedding, which are read one by one, count as one), and `b2`, or
    a whole `w2`, starts at zero, so that training starts at the base model; `s` is alpha / r.

    A side d is cut into (d1, d2) as in LyCORIS: of all pairs d1 <= d2 with d1 * d2 = d, the one
    nearest to the square root, so that a prime side becomes (1, d). `factor` says d1 instead.

    Args:
      rank: Of `w2` (and `w1`), or a mapping as for `lora`.
      sites: The linear weights and embeddings to adapt. The window of a convolution is no part of
        a Kronecker product by channels, so `loha` is for these.
      factor: i1 and o1: one number for both, a pair, or a mapping from path patterns to these.
        `None` takes the pairs nearest to the square roots.
      both: Whether `w1` may be of low rank, too.
      alpha: Strength of the update, or a mapping. `None` means `s` = 1.
      dropout, dtype: As for `lora`.

    Returns:
      A method with i1 * o1 + r * (i2 + o2) trained numbers per matrix where `w2` is of low rank,
      i1 * o1 + i2 * o2 where it is whole; with `both`, r * (i1 + o1) in the place of i1 * o1.

    Raises:
      ValueError: A rank below 1, a factor that is no number or pair or does not divide its side
        (names the weight, the side and what does), a convolution, a dropout outside [0, 1), or a
        part of the outputs is selected.

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
    factors = by_pattern(factor, sites, "factor")
    for path, r in ranks.items():
        if r < 1:
            raise ValueError(f"`lokr(rank={r})` for '{path}': a rank of at least 1 is needed.")
    sides = {path: _sides(site, factors[path]) for path, site in sites.items()}

    def make(key: jax.Array, site: Site, view: View) -> View:
        r, alpha = ranks[site.path], alphas[site.path]
        (i1, i2), (o1, o2) = sides[site.path]
        keys = iter(jax.random.split(key, 3))

        alone = "embedding" in site.kinds  # rows that are read one by one

        def random(n: int, m: int, terms: int) -> Trainable:
            x = jax.random.uniform(next(keys), (*site.stack, n, m), dtype, -1, 1)
            return Trainable((x / math.sqrt(terms)).astype(dtype))

        def zeros(n: int, m: int) -> Trainable:
            return Trainable(jnp.zeros((*site.stack, n, m), dtype))

        fields: dict[str, Any]
        if both and 2 * r < max(i1, o1):
            fields = {"a1": random(i1, r, 1 if alone else i1), "b1": random(r, o1, r)}
        else:
            fields = {"w1": random(i1, o1, 1 if alone else i1)}
        if 2 * r < max(i2, o2):
            fields |= {"a2": random(i2, r, 1 if alone else i2), "b2": zeros(r, o2)}
        else:
            fields |= {"w2": zeros(i2, o2)}
        weight = Kronecker(
            view.weight,
            **fields,
            key=dropout_key(site, view, dropout),
            inner=(i2, o2),
            scale=1.0 if alpha is None else alpha / r,
            dropout=dropout,
        )
        return dataclasses.replace(view, weight=weight)

    options = dict(
        rank=rank, sites=sites, factor=factor, both=both, alpha=alpha, dropout=dropout, dtype=dtype
    )
    return Method(
        "lokr", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="lokr")
    )


def _sides(site: Site, factor: Any) -> list[tuple[int, int]]:
    """((i1, i2), (o1, o2)) of a weight.

    Raises:
      ValueError: The weight is a convolution's, or a factor does not divide its side.
    """
    if "conv" in site.kinds:
        raise ValueError(
            f"`lokr`: '{site.path}' of shape {site.shape} is a convolution's kernel, which is no "
            "Kronecker product of small matrices. Leave it out of the sites, or use `loha`."
        )
    pair = factor if isinstance(factor, Sequence) else (factor, factor)
    if len(pair) != 2:
        raise ValueError(
            f"`lokr(factor={factor})` for '{site.path}': a pair has two numbers, of `in` and `out`."
        )
    found = []
    for role, first in zip((IN, OUT), pair, strict=True):
        size = site.size(role)
        works = [n for n in range(1, size + 1) if size % n == 0]
        if first is None:
            first = max(n for n in works if n * n <= size)
        if first not in works:
            raise ValueError(
                f"`lokr(factor={factor})`: {first} does not divide the {role} side of "
                f"'{site.path}' of shape {site.shape}, which is {size}. These do: {works}. Give "
                "one of them, a pair (in, out), or a mapping from path patterns."
            )
        found.append((first, size // first))
    return found
