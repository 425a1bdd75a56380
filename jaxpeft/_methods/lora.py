"""LoRA: a trainable low-rank update beside each frozen matrix."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import OutputSlice, Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_rank
from jaxpeft.extend._dropout import check_rate, dropout_key, dropped


@weight
class LowRank(Weight):
    """The matrix `w + scale * a @ b`, kept factored.

    With `part`, a slice of the outputs, `a @ b` has the columns of that slice only, and the
    other columns of `w` stay as they are.
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)
    part: OutputSlice | None = static(None)

    local_in = local_out = True

    def granularity(self, field, axis):
        # Neighbouring outputs of the matrix need not be neighbours in the slice.
        return (0, 0) if field == "b" and axis == OUT and self.part is not None else (1, 1)

    def forward(self, x):
        """x @ (w + scale * a @ b) = x @ w + scale * (x @ a) @ b."""
        y = x @ self.w
        delta = dropped(x, self.key, self.dropout) @ self.a @ self.b
        return y + self._to_all_outputs(self.scale * delta)

    def transposed(self, y):
        """y @ (w + scale * a @ b).T = y @ w.T + scale * (y @ b.T) @ a.T."""
        adapted = self._adapted_outputs(dropped(y, self.key, self.dropout))
        return y @ self.w.T + self.scale * (adapted @ self.b.T @ self.a.T)

    def lookup(self, ids):
        """(w + scale * a @ b)[ids] = w[ids] + scale * a[ids] @ b."""
        delta = self._to_all_outputs(self.scale * (self.a[ids] @ self.b))
        return self.with_delta(self.w[ids], ids, delta, self.a.site.rows)

    def materialize(self):
        return dense(self.w) + self._to_all_outputs(self.scale * self.a @ self.b)

    def _to_all_outputs(self, y):
        """The adapted outputs (..., slice) among all (..., out), the others of which are zero."""
        if self.part is None:
            return y
        return self.part.spread(y, 0)

    def _adapted_outputs(self, y):
        """The outputs (..., slice) that are adapted, out of all (..., out)."""
        if self.part is None:
            return y
        part = self.part
        blocks = y.reshape(*y.shape[:-1], part.groups, part.of, -1)
        return blocks[..., part.index, :].reshape(*y.shape[:-1], -1)


@register_method
def lora(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    dtype: Any = jnp.float32,
) -> Method:
    """Low-rank adaptation.

    Each selected matrix `w` (in, out) becomes

        w + s * a @ b,    s = alpha / r, or alpha / sqrt(r) (rank-stabilized)

    with trainable factors `a` (in, r), which starts at random, and `b` (r, out), which starts at
    zero, so that training starts at the base model. For an embedding, `a` starts at zero and `b`
    at Normal(0, 1) instead. A stack of matrices (layers of a scan, experts) gets a stack of
    factors.

    Args:
      rank: r, the number of columns of `a`, at most min(in, out). A mapping from path patterns
        to ranks gives each matrix its own; the first pattern that matches wins.
      sites: The matrices to adapt. `Sites.output_slice` selects a slice of their outputs.
      alpha: Strength of the update, or a mapping as for `rank`. `None` means s = 1.
      scaling: The formula of s.
      dropout: Probability with which each entry of the adapter's input is dropped. Dropout is
        active only in calls that give a key, `combine(frozen, adapter, dropout=key)`; every
        layer then draws its own mask.
      init: Distribution of `a` at the start. "kaiming" is uniform between -1 / sqrt(in) and
        1 / sqrt(in); "gaussian" is normal with mean 0 and variance 1 / in.
      dtype: Dtype of both factors. Their product runs in the wider of this and the input's
        dtype; the base product keeps its own dtype.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix.

    Raises:
      ValueError: A rank is out of range (the message names the matrix), the dropout is outside
        [0, 1), or `init` or `scaling` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.lora(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 2), 'w/b': (2, 4)}

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1.
      https://arxiv.org/abs/2106.09685
      Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023.
      https://arxiv.org/abs/2312.03732
    """
    more = dict(alpha=alpha, scaling=scaling, dropout=dropout, init=init, dtype=dtype)
    return low_rank("lora", rank, sites, **more)  # type: ignore[arg-type]


def low_rank(
    caller: str,
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    dtype: Any = jnp.float32,
) -> Method:
    """`lora` for methods that are built on it, with their name in its error messages.

    Args:
      caller: Name of the method that the user called.
      rank, sites, alpha, scaling, dropout, init, dtype: As for `lora`.
    """
    check_rate(caller, dropout)
    if init not in ("kaiming", "gaussian"):
        raise ValueError(f"`{caller}(init='{init}')`: choose 'kaiming' or 'gaussian'.")
    if scaling not in ("alpha/r", "alpha/sqrt(r)"):
        raise ValueError(f"`{caller}(scaling='{scaling}')`: choose 'alpha/r' or 'alpha/sqrt(r)'.")
    ranks = by_pattern(rank, sites, "rank")
    alphas = by_pattern(alpha, sites, "alpha")
    for path, site in sites.items():
        if site.is_matrix:  # `apply_to_sites` refuses parameters that are not matrices
            check_rank(caller, ranks[path], site)

    def make(key: jax.Array, site: Site, view: View) -> View:
        r, own_alpha = ranks[site.path], alphas[site.path]
        n, m = site.size(IN), site.size(OUT)
        m = site.part.size(m) if site.part else m
        if own_alpha is None:
            scale = 1.0
        else:
            scale = own_alpha / (r if scaling == "alpha/r" else math.sqrt(r))
        low = LowRank(
            view.weight,
            *_factors(key, site, (n, m), r, init, dtype),
            key=dropout_key(site, view, dropout),
            scale=scale,
            dropout=dropout,
            part=site.part,
        )
        return dataclasses.replace(view, weight=low)

    options = dict(
        rank=rank,
        sites=sites,
        alpha=alpha,
        scaling=scaling,
        dropout=dropout,
        init=init,
        dtype=dtype,
    )
    return Method(
        caller,
        options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller=caller, parts=True),
    )


def _factors(
    key: jax.Array, site: Site, sides: tuple[int, int], r: int, init: str, dtype: Any
) -> tuple[Trainable, Trainable]:
    """`a` (*stack, in, r) and `b` (*stack, r, out) at their start; `sides` is (in, out)."""
    n, m = sides
    shape_a, shape_b = (*site.stack, n, r), (*site.stack, r, m)
    if "embedding" in site.kinds:
        # A lookup reads one row of `a`, not a sum over its rows. With entries of size
        # 1 / sqrt(vocabulary), `b` would have almost no gradient.
        a = jnp.zeros(shape_a, dtype)
        return Trainable(a), Trainable(jax.random.normal(key, shape_b, dtype))
    if init == "kaiming":
        a = jax.random.uniform(key, shape_a, dtype, -1, 1) / math.sqrt(n)
    else:
        a = jax.random.normal(key, shape_a, dtype) / math.sqrt(n)
    return Trainable(a.astype(dtype)), Trainable(jnp.zeros(shape_b, dtype))
