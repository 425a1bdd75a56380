"""X-LoRA: LoRA adapters that are trained already, side by side, and gates that weigh them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._marks import Expected, Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.task_mixtures import PerCall
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole

READS = ("hidden", "input")


@weight
class RoutedByHidden(Weight):
    """x @ w + ((x @ a) * share) @ b: expert i has the next ranks[i] columns of `a`.

    share = softmax((h @ gate + bias) / temperature), of hidden states h that the call gives.
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("width", "expert")
    bias: Any = axes("expert")
    hidden: Any = axes(shared=True)  # (*lead, width)
    ranks: tuple[int, ...] = static()
    temperature: float = static(1.0)
    top: int | None = static(None)
    path: str = static("")

    is_mergeable = False
    local_in = local_out = True

    def forward(self, x):
        """x @ w + ((x @ a) * share) @ b."""
        return x @ self.w + self._weighed(x @ self.a) @ self.b

    def transposed(self, y):
        """y @ w.T + ((y @ b.T) * share) @ a.T."""
        return y @ self.w.T + self._weighed(y @ self.b.T) @ self.a.T

    def lookup(self, ids):
        """w[ids] + (a[ids] * share) @ b."""
        return self.with_delta(
            self.w[ids], ids, self._weighed(self.a[ids]) @ self.b, self.a.site.rows
        )

    def _weighed(self, low):
        # As a plain array: where the program sorts its tokens by experts of its own, no row of h
        # belongs to a token, and there is no such array.
        gate, h = self.gate.matrix, self.hidden.array
        lead = h.shape[:-1]
        if h.shape[-1:] != gate.shape[:1] or low.shape[:-1][: len(lead)] != lead:
            raise ValueError(
                f"The gate at '{self.path}' reads a width of {gate.shape[0]} and is given hidden "
                f"states {h.shape} (*lead, width), but its input leads with {low.shape[:-1]}: "
                "`lead` should be nothing, (batch,), or (batch, tokens), as this product has them. "
                "If the model merges or moves them, lift it over one example and use `jax.vmap`."
            )
        shares = gate_weights(h @ gate + self.bias.matrix, self.temperature, self.top)
        shares = shares.reshape(*lead, *(1,) * (low.ndim - len(lead)), -1)
        return _weighed(low, shares, self)


@weight
class RoutedByInput(Weight):
    """x @ w + ((x @ a) * share) @ b, with share = softmax((x @ gate + bias) / temperature)."""

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("in", "expert")
    bias: Any = axes("expert")
    ranks: tuple[int, ...] = static()
    temperature: float = static(1.0)
    top: int | None = static(None)
    path: str = static("")

    is_mergeable = False
    local_out = True  # not on a part of `in`: shares of partial sums are not parts of shares

    def forward(self, x):
        logits = x @ self.gate + self.bias
        logits = logits.reshape(*logits.shape[:-1], -1, len(self.ranks))
        shares = gate_weights(logits, self.temperature, self.top)
        return x @ self.w + _weighed(x @ self.a, shares, self) @ self.b


def _weighed(low: jax.Array, shares: jax.Array, w: Any) -> jax.Array:
    """low (..., columns), each times the share (..., groups or 1, experts) of its expert.

    A convolution in groups has the columns once for each of them.
    """
    owner = np.repeat(np.arange(len(w.ranks)), w.ranks)
    grouped = low.reshape(*low.shape[:-1], -1, len(owner))
    return (grouped * shares[..., owner]).reshape(low.shape)


def gate_weights(logits: jax.Array, temperature: float = 1.0, top: int | None = None) -> jax.Array:
    """softmax(logits / temperature) over the last axis, at least in float32.

    Args:
      logits: (..., experts).
      temperature: The lower, the more of the whole goes to the largest.
      top: Only so many of the largest get a share; those as large as the last of them get one
        too, so that equal logits have equal shares. `None` for all.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    if top is not None:
        last = jax.lax.top_k(logits, top)[0][..., -1:]
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return jax.nn.softmax(logits, axis=-1)


# The method --------------------------------------------------------------------------------------


@register_method
def xlora(
    sites: Sites,
    ranks: Mapping[str, Sequence[int]],
    *,
    width: int | None = None,
    reads: Literal["hidden", "input"] = "hidden",
    temperature: float = 1.0,
    top: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """X-LoRA: frozen LoRA adapters, weighed at every weight and layer by trained gates.

    Each matrix w of a bank gives y = x @ w + sum_i share_i * s_i * x @ a_i @ b_i, with

        share = softmax((h @ gate + bias) / temperature).

    h are hidden states that the call gives: (width,) for one decision, (batch, width) for one of
    each example, (batch, tokens, width) for one of each token; the axes before the width are the
    first of the input of every weight. In the paper they are the last hidden states of a pass
    without adapters. Or the gate reads x itself, in the same pass.

    Gates start at zero, so that all experts have equal shares: training starts at the base plus
    the mean of the experts' changes. An expert that does not adapt a weight keeps its share there,
    for no change. The experts are no part of the adapter: give them by the call.

    Args:
      sites, ranks: Those of the `bank`.
      width: Of h. `None` where the gates read "input".
      reads: "hidden" for h; "input" for x, at weights that are used as a product with it.
      temperature: The lower, the more of the whole goes to one expert.
      top: Only the largest so many shares of each token count, and are scaled up to a sum of one;
        those equal to the last of them count too. `None` for all.
      dtype: Of the gates.

    Returns:
      A method with (width + 1) * experts trained numbers per matrix, or (in + 1) * experts.

    Raises:
      ValueError: Ranks that do not belong to the sites or of fewer than two experts, a width below
        one or one that is not needed, an unknown `reads`, a temperature that is not positive, a
        `top` out of range, or a part of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> from jaxpeft import xlora
      >>> from jaxpeft.mixtures import stack_adapters
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> key, method = jax.random.key(0), jp.lora(2, jp.sites(f, params, jnp.ones((1, 8))))
      >>> experts = stack_adapters([(method, jp.split(method(key, params))[1]) for _ in range(3)])
      >>> gates = xlora(experts.sites, experts.ranks, width=5)
      >>> frozen, adapter = jp.split(gates(key, params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/experts/gate': (5, 3), 'w/experts/bias': (3,)}
      >>> tree = jp.combine(frozen, {**experts.arrays, **adapter}, hidden=jnp.ones((1, 5)))
      >>> jp.lift(f)(tree, jnp.ones((1, 8))).shape
      (1, 4)

    References:
      Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for
      Large Language Models with Applications in Protein Mechanics and Molecular Design, 2024,
      section 2. https://arxiv.org/abs/2402.07148
    """
    check_whole("xlora", sites)
    experts = _check_ranks(sites, ranks)
    if reads not in READS:
        raise ValueError(f"`xlora(reads='{reads}')`: choose 'hidden' or 'input'.")
    if reads == "hidden" and (width is None or width < 1):
        raise ValueError(
            f"`xlora(width={width}, reads='hidden')`: give the width of the hidden states, at "
            "least 1."
        )
    if reads == "input" and width is not None:
        raise ValueError(
            f"`xlora(width={width}, reads='input')`: a gate is as wide as its weight's input. "
            "Leave `width` out."
        )
    if not temperature > 0:
        raise ValueError(f"`xlora(temperature={temperature})`: a positive number is needed.")
    if top is not None and not 1 <= top <= experts:
        raise ValueError(f"`xlora(top={top})`: there are {experts} experts; choose 1 to {experts}.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        n = site.size(IN) if width is None else width
        columns, sides = sum(ranks[site.path]), (site.size(IN), site.size(OUT))
        a, b = (*site.stack, sides[0], columns), (*site.stack, columns, sides[1])
        # With names of their own: those of a LoRA on top of this weight would be the same.
        at = f"{site.path}/experts"
        way = f"Its experts have ranks {ranks[site.path]} there: give the arrays of the same bank."
        fields: dict[str, Any] = dict(
            a=Placeholder(f"{at}/a", expects=Expected(a, "floating", method="xlora", way=way)),
            b=Placeholder(f"{at}/b", expects=Expected(b, "floating", method="xlora", way=way)),
            gate=Trainable(jnp.zeros((*site.stack, n, experts), dtype), name=f"{at}/gate"),
            bias=Trainable(jnp.zeros((*site.stack, experts), dtype), name=f"{at}/bias"),
            ranks=tuple(ranks[site.path]),
            temperature=temperature,
            top=top,
            path=site.path,
        )
        gated: Weight
        if reads == "input":
            gated = RoutedByInput(view.weight, **fields)
        else:
            gated = RoutedByHidden(view.weight, **fields, hidden=PerCall("hidden"))
        return dataclasses.replace(view, weight=gated)

    options = dict(
        sites=sites,
        ranks={path: list(ranks[path]) for path in sites},
        width=width,
        reads=reads,
        temperature=temperature,
        top=top,
        dtype=dtype,
    )
    return Method(
        "xlora", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="xlora")
    )


def _check_ranks(sites: Sites, ranks: Mapping[str, Sequence[int]]) -> int:
    """How many experts there are.

    Raises:
      ValueError: Ranks are missing, unknown, negative or all zero, or of a different number or
        fewer than two.
    """
    if missing := sorted(set(sites) ^ set(ranks)):
        raise ValueError(
            f"`xlora`: the sites are {list(sites)}, and the ranks those of {list(ranks)}; "
            f"{missing} stand in one of them only. Give the sites and ranks of one bank."
        )
    for path, own in ranks.items():
        experts = len(next(iter(ranks.values())))
        if len(own) != experts or experts < 2 or min(own) < 0 or max(own) < 1:
            raise ValueError(
                f"`xlora`: the ranks of '{path}' are {list(own)}. There should be one for each of "
                f"two or more experts, as many at every weight (here {experts}), none of them "
                "negative and one of them positive. `bank` makes them."
            )
    return len(next(iter(ranks.values()), ()))
