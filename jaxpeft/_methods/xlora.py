"""X-LoRA: frozen LoRA adapters as experts, and trainable gates that compute routing weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._marks import Expected, Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.task_routing import PerCall
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole

GATE_INPUTS = ("hidden_states", "input")


@weight
class RoutedByHiddenStates(Weight):
    """x @ w + ((x @ a) * p) @ b, with routing weights p = softmax((h @ gate + bias) / temperature).

    h are hidden states that the call gives. `a` holds the experts' first factors side by side, in
    blocks of `ranks[i]` columns; all columns of expert i are multiplied by p[i].
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("hidden", "expert")
    bias: Any = axes("expert")
    hidden_states: Any = axes(shared=True)  # (*lead, hidden_size)
    ranks: tuple[int, ...] = static()
    temperature: float = static(1.0)
    top_k: int | None = static(None)
    path: str = static("")

    is_mergeable = False
    local_in = local_out = True

    def forward(self, x):
        """x @ w + ((x @ a) * p) @ b."""
        return x @ self.w + self._weighted(x @ self.a) @ self.b

    def transposed(self, y):
        """y @ w.T + ((y @ b.T) * p) @ a.T."""
        return y @ self.w.T + self._weighted(y @ self.b.T) @ self.a.T

    def lookup(self, ids):
        """w[ids] + (a[ids] * p) @ b."""
        delta = self._weighted(self.a[ids]) @ self.b
        return self.with_delta(self.w[ids], ids, delta, self.a.site.rows)

    def _weighted(self, low):
        # `matrix` refuses a model that sorts its tokens by experts of its own: there the rows of h
        # would not be those of the tokens.
        gate, h = self.gate.matrix, self.hidden_states.array
        lead = h.shape[:-1]
        if h.shape[-1:] != gate.shape[:1] or low.shape[:-1][: len(lead)] != lead:
            raise ValueError(
                f"The gate at '{self.path}' takes hidden states of size {gate.shape[0]} and got "
                f"them with shape {h.shape} (*lead, hidden_size), but the input of this product "
                f"has the leading axes {low.shape[:-1]}. `lead` should be (), (batch,), or "
                "(batch, tokens), as this product has them. If the model merges or moves these "
                "axes, lift it over one example and use `jax.vmap`."
            )
        weights = gate_weights(h @ gate + self.bias.matrix, self.temperature, self.top_k)
        weights = weights.reshape(*lead, *(1,) * (low.ndim - len(lead)), -1)
        return _weighted(low, weights, self.ranks)


@weight
class RoutedByInput(Weight):
    """x @ w + ((x @ a) * p) @ b, p = softmax((x @ gate + bias) / temperature)."""

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("in", "expert")
    bias: Any = axes("expert")
    ranks: tuple[int, ...] = static()
    temperature: float = static(1.0)
    top_k: int | None = static(None)
    path: str = static("")

    is_mergeable = False
    # Not `local_in`: on a shard of `in`, the softmax would be over partial sums.
    local_out = True

    def forward(self, x):
        logits = x @ self.gate + self.bias
        logits = logits.reshape(*logits.shape[:-1], -1, len(self.ranks))
        weights = gate_weights(logits, self.temperature, self.top_k)
        return x @ self.w + _weighted(x @ self.a, weights, self.ranks) @ self.b


def _weighted(low: jax.Array, weights: jax.Array, ranks: Sequence[int]) -> jax.Array:
    """Each column of low (..., columns) times the routing weight of its expert.

    Args:
      low: x @ a (..., columns). A convolution in groups has the columns once for each group.
      weights: Routing weights (..., groups or 1, experts).
      ranks: Number of columns of each expert.
    """
    expert = np.repeat(np.arange(len(ranks)), ranks)  # of each column
    grouped = low.reshape(*low.shape[:-1], -1, len(expert))
    return (grouped * weights[..., expert]).reshape(low.shape)


def gate_weights(
    logits: jax.Array, temperature: float = 1.0, top_k: int | None = None
) -> jax.Array:
    """Routing weights softmax(logits / temperature), in float32 or wider.

    Args:
      logits: (..., experts).
      temperature: With a lower temperature, more weight is on the largest logit.
      top_k: Only the `top_k` largest logits get a weight. Those equal to the last of them get one
        as well, so that equal logits have equal weights. `None` means all.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.nn.softmax(logits, axis=-1)


@register_method
def xlora(
    sites: Sites,
    ranks: Mapping[str, Sequence[int]],
    *,
    hidden_size: int | None = None,
    gate_input: Literal["hidden_states", "input"] = "hidden_states",
    temperature: float = 1.0,
    top_k: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """X-LoRA: frozen LoRA adapters as experts, weighted by trainable gates at every matrix.

    Each matrix `w` (in, out) that an expert adapts gives

        y = x @ w + sum_i p[i] * s_i * x @ a_i @ b_i
        p = softmax((h @ gate + bias) / temperature)

    with frozen experts `a_i` (in, r_i) and `b_i` (r_i, out), and a trainable `gate` (hidden_size,
    experts) and `bias` (experts,) at each matrix. h are hidden states that the call gives,
    `combine(..., hidden_states=h)`: (hidden_size,) for one decision per call, (batch, hidden_size)
    for one per example, (batch, tokens, hidden_size) for one per token. Their axes before the last
    are the first axes of the input of every matrix. In the paper, h are the last hidden states of
    a forward pass without adapters. With `gate_input="input"`, the gate takes x instead of h, and
    no second pass is needed.

    The gates start at zero, so that all experts have equal routing weights, and training starts at
    the base model plus the mean of the experts' updates. At a matrix that an expert does not
    adapt, its routing weight multiplies an update of zero. The experts are not part of the
    adapter: give the arrays of `mixtures.stack_adapters` in each call.

    Args:
      sites, ranks: The `sites` and `ranks` of the stack from `mixtures.stack_adapters`.
      hidden_size: Size of the hidden states h, at least 1. `None` if the gates take "input".
      gate_input: "hidden_states" for h, or "input" for x. With "input", the matrices should be
        used in a product with their input, not as a tied head or in a lookup.
      temperature: Temperature of the softmax, positive.
      top_k: Only the `top_k` largest routing weights of each token are kept, and normalized to a
        sum of one. Those equal to the last of them are kept as well. `None` keeps all.
      dtype: Dtype of the gates.

    Returns:
      A `Method` with (hidden_size + 1) * experts trainable parameters per matrix, or
      (in + 1) * experts with `gate_input="input"`.

    Raises:
      ValueError: The ranks do not belong to the sites, or are of fewer than two experts;
        `hidden_size` is below 1, or given with `gate_input="input"`; `gate_input` is unknown; the
        temperature is not positive; `top_k` is out of range; or a slice of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> key, lora = jax.random.key(0), jp.lora(2, jp.sites(fn, params, jnp.ones((1, 8))))
      >>> trained = [(lora, jp.split(lora(key, params))[1]) for _ in range(3)]
      >>> experts = jp.mixtures.stack_adapters(trained)
      >>> method = jp.xlora(experts.sites, experts.ranks, hidden_size=5)
      >>> frozen, adapter = jp.split(method(key, params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/experts/gate': (5, 3), 'w/experts/bias': (3,)}
      >>> arrays = {**experts.arrays, **adapter}
      >>> tree = jp.combine(frozen, arrays, hidden_states=jnp.ones((1, 5)))
      >>> jp.lift(fn)(tree, jnp.ones((1, 8))).shape
      (1, 4)

    References:
      Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for
      Large Language Models with Applications in Protein Mechanics and Molecular Design, 2024,
      section 2. https://arxiv.org/abs/2402.07148
    """
    check_whole("xlora", sites)
    experts = _check_ranks(sites, ranks)
    if gate_input not in GATE_INPUTS:
        raise ValueError(f"`xlora(gate_input='{gate_input}')`: choose one of {GATE_INPUTS}.")
    if gate_input == "hidden_states" and (hidden_size is None or hidden_size < 1):
        raise ValueError(
            f"`xlora(hidden_size={hidden_size}, gate_input='hidden_states')`: give the size of the "
            "hidden states, at least 1."
        )
    if gate_input == "input" and hidden_size is not None:
        raise ValueError(
            f"`xlora(hidden_size={hidden_size}, gate_input='input')`: a gate has the size of its "
            "matrix's input. Leave `hidden_size` out."
        )
    if not temperature > 0:
        raise ValueError(f"`xlora(temperature={temperature})`: give a positive number.")
    if top_k is not None and not 1 <= top_k <= experts:
        raise ValueError(
            f"`xlora(top_k={top_k})`: there are {experts} experts; choose 1 to {experts}."
        )

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        n = site.size(IN) if hidden_size is None else hidden_size
        columns = sum(ranks[site.path])
        a = (*site.stack, site.size(IN), columns)
        b = (*site.stack, columns, site.size(OUT))
        # Under `experts/`, because a LoRA on top of this weight has arrays `a` and `b`, too.
        prefix = f"{site.path}/experts"
        way = f"Its experts have ranks {ranks[site.path]} there: give the arrays of the same stack."
        fields: dict[str, Any] = dict(
            a=Placeholder(f"{prefix}/a", expects=Expected(a, "floating", method="xlora", way=way)),
            b=Placeholder(f"{prefix}/b", expects=Expected(b, "floating", method="xlora", way=way)),
            gate=Trainable(jnp.zeros((*site.stack, n, experts), dtype), name=f"{prefix}/gate"),
            bias=Trainable(jnp.zeros((*site.stack, experts), dtype), name=f"{prefix}/bias"),
            ranks=tuple(ranks[site.path]),
            temperature=temperature,
            top_k=top_k,
            path=site.path,
        )
        routed: Weight
        if gate_input == "input":
            routed = RoutedByInput(view.weight, **fields)
        else:
            h = PerCall("hidden_states")
            routed = RoutedByHiddenStates(view.weight, **fields, hidden_states=h)
        return dataclasses.replace(view, weight=routed)

    options = dict(
        sites=sites,
        ranks={path: list(ranks[path]) for path in sites},
        hidden_size=hidden_size,
        gate_input=gate_input,
        temperature=temperature,
        top_k=top_k,
        dtype=dtype,
    )
    return Method(
        "xlora", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="xlora")
    )


def _check_ranks(sites: Sites, ranks: Mapping[str, Sequence[int]]) -> int:
    """The number of experts.

    Raises:
      ValueError: The ranks are of other sites, negative, or all zero at a site, or there are fewer
        than two experts or different numbers of them.
    """
    if missing := sorted(set(sites) ^ set(ranks)):
        raise ValueError(
            f"`xlora`: the sites are {list(sites)}, and the ranks are of {list(ranks)}; {missing} "
            "are in only one of the two. Give the `sites` and `ranks` of one stack of adapters."
        )
    for path, own in ranks.items():
        experts = len(next(iter(ranks.values())))
        if len(own) != experts or experts < 2 or min(own) < 0 or max(own) < 1:
            raise ValueError(
                f"`xlora`: the ranks of '{path}' are {list(own)}. There should be one rank for "
                f"each of two or more experts, as many at every matrix (here {experts}), none "
                "of them negative and one positive, as `mixtures.stack_adapters` returns them."
            )
    return len(next(iter(ranks.values()), ()))
