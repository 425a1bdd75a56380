"""AdaLoRA: low-rank deltas in the form of a singular value decomposition, with ranks to give up."""

import dataclasses
import glob
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.method import Method
from jaxpeft.methods.dropping import dropped
from jaxpeft.methods.lora import LowRank, low_rank
from jaxpeft.methods.placing import check_whole, place, takes_sites
from jaxpeft.methods.trained import options_of, taken_apart
from jaxpeft.sites import Site, Sites, by_pattern
from jaxpeft.tree import Train
from jaxpeft.weight import View, Weight, axes, base, dense, static, weight


@weight
class Triplets(Weight):
    """The matrix `w + scale * (a * values) @ b`: value k is of column k of a and row k of b."""

    w: Any = base()
    a: Any = axes("in", "rank")
    values: Any = axes("rank")
    b: Any = axes("rank", "out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_in = local_out = True

    def forward(self, x):
        """x @ w + scale * ((x @ a) * values) @ b."""
        low = (dropped(x, self.key, self.dropout) @ self.a * self.values) @ self.b
        return x @ self.w + self.scale * low

    def transposed(self, y):
        """y @ w.T + scale * ((y @ b.T) * values) @ a.T."""
        low = (dropped(y, self.key, self.dropout) @ self.b.T * self.values) @ self.a.T
        return y @ self.w.T + self.scale * low

    def lookup(self, ids):
        """w[ids] + scale * (a[ids] * values) @ b."""
        change = self.scale * ((self.a[ids] * self.values) @ self.b)
        return self.changed(self.w[ids], ids, change, self.a.site)

    def materialize(self):
        return dense(self.w) + self.scale * (self.a * self.values) @ self.b


@takes_sites
def adalora(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """Adaptive budget allocation: LoRA as singular values that can be given up one by one.

    Each selected matrix `w` becomes `w + s * (a * values) @ b`, s = alpha / r, with `a` (in, r)
    and `b` (r, out) from Normal(0, std^2) and `values` (r,) zero, so that training starts at the
    base model. Train it under `train.rank_budget`, which sets the least important values of all
    matrices to zero until a budget is met, with `penalty * orthogonality(adapter)` in the loss;
    `shrunk` then takes them out of the arrays.

    Args:
      rank: What each matrix begins with, 1.5 times the target in the paper.
      sites: The matrices to adapt.
      alpha: `None` means s = 1.
      dropout: As for `lora`.
      std: See above.
      dtype: Of what is trained.

    Returns:
      A method with r * (in + out + 1) trained numbers per matrix.

    Raises:
      ValueError: As `lora`; or a part of the outputs is selected, or a std that is not positive.

    References:
      Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning,
      2023, section 3. https://arxiv.org/abs/2303.10512
    """
    if std <= 0:
        raise ValueError(f"`adalora(std={std})`: factors of zero would stay there.")
    check_whole("adalora", sites)
    low = low_rank("adalora", rank, sites, alpha=alpha, dropout=dropout, dtype=dtype)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del site
        old: LowRank = view.weight
        keys = jax.random.split(key)
        a, b = (
            Train(std * jax.random.normal(k, x.value.shape, dtype))
            for k, x in zip(keys, (old.a, old.b), strict=True)
        )
        values = Train(jnp.zeros((*a.shape[:-2], a.shape[-1]), dtype))
        weight = Triplets(old.w, a, values, b, old.key, old.scale, old.dropout)
        return dataclasses.replace(view, weight=weight)

    def apply(key: jax.Array, tree: Any) -> Any:
        return place(key, low(key, tree), sites, make, who="adalora")

    options = dict(rank=rank, sites=sites, alpha=alpha, dropout=dropout, std=std, dtype=dtype)
    return Method("adalora", options, apply)


def triplets(adapter: Mapping[str, Any]) -> Iterator[str]:
    """The paths at which an adapter holds `a`, `values` and `b`."""
    for path in adapter:
        head, _, last = path.rpartition("/")
        if last == "values" and {f"{head}/a", f"{head}/b"} <= set(adapter):
            yield head


def orthogonality(adapter: Mapping[str, Any]) -> jax.Array:
    """How far singular vectors are from orthonormal, for the loss.

    The sum over all matrices of |a^T a - 1|^2 + |b b^T - 1|^2, squared Frobenius norms (equation
    4 of the paper, whose weight for it is 0.1 to 0.5).

    Args:
      adapter: `{path: array}`, of `adalora`.

    Raises:
      ValueError: The adapter holds nothing of `adalora`.
    """
    heads = list(triplets(adapter))
    if not heads:
        raise ValueError(
            f"`orthogonality`: nothing of `adalora` is among {sorted(adapter)}. Give the adapter."
        )
    total = jnp.float32(0)
    for path in heads:
        a, b = adapter[f"{path}/a"], jnp.swapaxes(adapter[f"{path}/b"], -1, -2)
        for x in (a, b):
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            off = jnp.swapaxes(x, -1, -2) @ x - jnp.eye(x.shape[-1], dtype=x.dtype)
            total = total + jnp.sum(off * off)
    return total


def ranks(adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """How many values of each matrix are not zero: {path: counts (*stack,)}.

    Args:
      adapter: {path: array} of `adalora`, as `split` returned it or as it was trained since.
    """
    found = {path: np.asarray(adapter[f"{path}/values"]) for path in triplets(adapter)}
    return {path: np.count_nonzero(values, axis=-1) for path, values in found.items()}


def shrunk(method: Method, adapter: Mapping[str, Any]) -> tuple[Method, dict[str, jax.Array]]:
    """The same deltas without the values that are zero: smaller arrays.

    Args:
      method: From `adalora`; of a chain, that method of it.
      adapter: Trained, maybe with arrays of other methods.

    Returns:
      The method of the ranks that are left, for the original params, and its adapter. All
      matrices of a stack keep as many as the one that has the most. Matrices without any are
      left out. Arrays of other methods are in it as they were: `chain` those methods with this
      one as before.

    Raises:
      ValueError: It is another method, the adapter lacks arrays, or all values are zero.
    """
    options = options_of(method, ["adalora"], "shrunk")
    sites: Sites = options["sites"]
    names = [f"{path}/{name}" for path in sites for name in ("a", "values", "b")]
    own, others = taken_apart(adapter, names, "shrunk")
    left = {path: int(np.max(count)) for path, count in ranks(own).items()}
    kept = sites.match(lambda site: left[site.path] > 0) if any(left.values()) else None
    if kept is None:
        raise ValueError(
            "`shrunk`: all values of this adapter are zero, as before the first step. There is "
            "nothing to keep."
        )
    alphas = by_pattern(options["alpha"], sites, "alpha")
    smaller: dict[str, jax.Array] = {}
    strengths: dict[str, Any] = {}
    for path in kept:
        values, a, b = (own[f"{path}/{name}"] for name in ("values", "a", "b"))
        # Those that are not zero come first, in their order.
        order = jnp.argsort(values == 0, axis=-1, stable=True)[..., : left[path]]
        smaller[f"{path}/a"] = jnp.take_along_axis(a, order[..., None, :], -1)
        smaller[f"{path}/values"] = jnp.take_along_axis(values, order, -1)
        smaller[f"{path}/b"] = jnp.take_along_axis(b, order[..., :, None], -2)
        alpha = alphas[path]
        # alpha / r stays what it was.
        strengths[glob.escape(path)] = None if alpha is None else alpha * left[path] / a.shape[-1]
    more = {name: options[name] for name in ("dropout", "std", "dtype")}
    ranked = {glob.escape(path): left[path] for path in kept}
    return adalora(ranked, kept, alpha=strengths, **more), {**others, **smaller}
