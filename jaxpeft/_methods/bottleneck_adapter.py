"""Bottleneck adapters: a small feed-forward network behind a sub-layer, or beside it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Unsupported, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, bias_of, check_whole, vector_of
from jaxpeft.extend._dropout import check_rate, dropout_key, dropped

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
READS = ("output", "sum", "residual")


@weight
class Bottleneck(Weight):
    """y + scale * (act(z @ down + down_bias) @ up + up_bias), where y = x @ w.

    The adapter reads z: the sub-layer's output y + bias, the sum of that and the residual
    stream (under the model's LayerNorm, where its scale is here), or the stream alone. The
    program adds its own bias and its stream to what this returns.
    """

    w: Any = base_weight()
    down: Any = axes("out", "hidden")
    down_bias: Any = axes("hidden")
    up: Any = axes("hidden", "out")
    up_bias: Any = axes("out")
    bias: Any = axes("out", optional=True)
    norm_scale: Any = axes("out", optional=True)
    norm_bias: Any = axes("out", optional=True)
    key: Any = axes(optional=True)
    reads: str = static("output")
    activation: str = static("relu")
    scale: float = static(1.0)
    dropout: float = static(0.0)
    eps: float = static(1e-12)

    is_mergeable = False

    def forward(self, x):
        y = x @ self.w
        return y + self.delta(self.read(y))

    def read(self, y):
        """z, of the product y."""
        h = y if self.bias is None else y + self.bias
        if self.reads == "output":
            return h
        stream = self.down.site.residual(y, self.bias)
        if self.reads == "residual":
            return stream
        return self._norm(h + stream)

    def delta(self, z):
        """What is added to the output."""
        h = ACTIVATIONS[self.activation](z @ self.down + self.down_bias)
        return dropped(self.scale * (h @ self.up + self.up_bias), self.key, self.dropout)

    def _norm(self, z):
        if self.norm_scale is None:
            return z
        wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.norm_scale + self.norm_bias).astype(z.dtype)


@weight
class Tap(Weight):
    """x @ w, and act(x @ down + down_bias) left for the `Add` of the same name."""

    w: Any = base_weight()
    down: Any = axes("in", "hidden")
    down_bias: Any = axes("hidden")
    activation: str = static("relu")
    name: str = static("")

    is_mergeable = False

    def forward(self, x):
        taps = self.down.site.taps
        if taps is None:
            raise Unsupported("a parallel adapter on a stack of experts")
        if self.name in taps:
            raise ValueError(
                f"The model multiplies by the input of the parallel adapter '{self.name}' a second "
                f"time ({self.down.site.where}) before it has reached its output, so it is not "
                "known which input the adapter is to read. Choose a sub-layer whose first kernel "
                "runs once."
            )
        taps[self.name] = ACTIVATIONS[self.activation](x @ self.down + self.down_bias)
        return x @ self.w


@weight
class Add(Weight):
    """x @ w + scale * (h @ up + up_bias), where h is what the `Tap` of the same name left."""

    w: Any = base_weight()
    up: Any = axes("hidden", "out")
    up_bias: Any = axes("out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)
    name: str = static("")

    is_mergeable = False

    def forward(self, x):
        taps = self.up.site.taps
        if taps is None or self.name not in taps:
            raise ValueError(
                f"The parallel adapter '{self.name}' is to add at its sub-layer's output, but "
                "nothing has passed its input in the same scope of the model. Choose an input "
                "that the model multiplies first, in the same loop body or branch."
            )
        change = self.scale * (taps.pop(self.name) @ self.up + self.up_bias)
        return x @ self.w + dropped(change, self.key, self.dropout)


@register_method
def bottleneck_adapter(
    width: int,
    sites: Sites,
    *,
    reads: Literal["output", "sum", "residual"] = "output",
    norms: Sites | None = None,
    eps: float = 1e-12,
    activation: str = "relu",
    scale: float = 1.0,
    dropout: float = 0.0,
    init: Literal["zero", "normal"] = "zero",
    dtype: Any = jnp.float32,
) -> Method:
    """Bottleneck adapter at the end of a sub-layer.

    The output h = x @ w + b of each selected kernel becomes

        h + scale * (act(z @ down + c) @ up + e)

    where z is what the adapter reads, and r the residual stream that the model adds to h:

    - "output": z = h, Houlsby's sequential adapter.
    - "sum": z = h + r, or LayerNorm(h + r) with the `norms` of a model that norms the sum. The
      model then norms its own sum again: Pfeiffer's adapter, LN(r + h + adapter(LN(h + r))).
    - "residual": z = r, an adapter parallel to the sub-layer in a model without a norm at its
      input. `parallel` reads the input itself, behind such a norm. (The `adapters` library reads
      r in both cases.)

    The stream is what is added to h next. A bias may come before it, but no dropout and no scale,
    and where two sub-layers lie side by side, h + other + r, it is not known which is meant: both
    are errors when the model is called.

    The LayerNorms that a paper trains beside its adapters are one method more:
    `chain(bottleneck(...), norm_tuning(sites))` is Houlsby's recipe.

    Args:
      width: m, the size of the bottleneck.
      sites: The kernels that end a sub-layer. The bias that follows is known from the sites, the
        stream is found when the model is traced.
      reads: See above.
      norms: For "sum": scales and biases of the LayerNorms behind the sums, as many of each as
        there are `sites`, in their order.
      eps: Of these norms.
      activation: "relu", "gelu", "silu" or "tanh".
      scale: Factor of the adapter's output.
      dropout: Probability with which an entry of the adapter's output is dropped, in calls that
        give a key, `combine(frozen, adapter, dropout=key)`.
      init: "zero" lets training start at the base model: `up` and both biases are zero, `down`
        is Normal(0, 1 / d). "normal" starts near it, `down` and `up` Normal(0, 0.01 ** 2) cut
        off at two deviations, as Houlsby's.
      dtype: Of the adapter.

    Returns:
      A method with 2md + d + m trained numbers per kernel with d outputs.

    Raises:
      ValueError: An option out of range, a part of the outputs, or norms that do not fit the
        sites. When the model is
        called: the stream cannot be found; says what the model does instead of adding one.

    References:
      Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019, section 2.1.
      https://arxiv.org/abs/1902.00751
      Pfeiffer et al., AdapterFusion, 2021, section 3.2.2 and appendix.
      https://arxiv.org/abs/2005.00247
    """
    _check("bottleneck_adapter", width, activation, dropout)
    check_whole("bottleneck_adapter", sites)
    if reads not in READS or init not in ("zero", "normal"):
        raise ValueError(
            f"`bottleneck_adapter(reads='{reads}', init='{init}')`: an adapter reads one of {READS} and "
            "starts at 'zero' or 'normal'."
        )
    found = _norms(sites, norms, reads)

    def make(key: jax.Array, site: Site, view: View) -> View:
        d = site.size("out")
        weight = Bottleneck(
            view.weight,
            *_network(key, site.stack, d, width, d, dtype, init),
            bias_of(site, sites),
            norm_scale=vector_of(found[site.path][0], site) if found else None,
            norm_bias=vector_of(found[site.path][1], site) if found else None,
            key=dropout_key(site, view, dropout),
            reads=reads,
            activation=activation,
            scale=scale,
            dropout=dropout,
            eps=eps,
        )
        return dataclasses.replace(view, weight=weight)

    options = dict(
        width=width,
        sites=sites,
        reads=reads,
        norms=norms,
        eps=eps,
        activation=activation,
        scale=scale,
        dropout=dropout,
        init=init,
        dtype=dtype,
    )
    return Method(
        "bottleneck_adapter",
        options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="bottleneck_adapter"),
    )


@register_method
def parallel_adapter(
    width: int,
    inputs: Sites,
    outputs: Sites,
    *,
    scale: float = 1.0,
    activation: str = "relu",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Parallel adapter around a sub-layer f: f(x) + scale * (act(x @ down + c) @ up + e).

    One weight reads x where the sub-layer's first kernel does, another adds where its last
    one ends; they meet when the model is traced.

    Args:
      width: m, the size of the bottleneck.
      inputs: The first kernel of each sub-layer.
      outputs: The last one, in the same order.
      scale: s of the scaled parallel adapter.
      activation: "relu", "gelu", "silu" or "tanh".
      dropout: Probability with which an entry of the adapter's output is dropped, in calls that
        give a key, `combine(frozen, adapter, dropout=key)`.
      dtype: Of the adapter.

    Returns:
      A method with m (in + out) + m + out trained numbers per sub-layer.

    Raises:
      ValueError: Inputs and outputs differ in number, a part of the outputs is selected, or (when
        the model is called) the two ends lie in scopes of the model that cannot see each other,
        or the first kernel runs twice before the last one.

    References:
      He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021,
      section 4.1. https://arxiv.org/abs/2110.04366
    """
    _check("parallel_adapter", width, activation, dropout)
    check_whole("parallel_adapter", inputs | outputs)
    if len(inputs) != len(outputs) or set(inputs) & set(outputs):
        raise ValueError(
            f"`parallel` pairs the first and the last kernel of each sub-layer, but got "
            f"{list(inputs)} and {list(outputs)}."
        )
    name = dict(zip(inputs, outputs, strict=True)) | {path: path for path in outputs}

    def tap(key: jax.Array, site: Site, view: View) -> View:
        down, c, _, _ = _network(key, site.stack, site.size("in"), width, 1, dtype)
        weight = Tap(view.weight, down, c, activation, name[site.path])
        return dataclasses.replace(view, weight=weight)

    def add(key: jax.Array, site: Site, view: View) -> View:
        _, _, up, e = _network(key, site.stack, 1, width, site.size("out"), dtype)
        mask = dropout_key(site, view, dropout)
        weight = Add(view.weight, up, e, mask, scale, dropout, name[site.path])
        return dataclasses.replace(view, weight=weight)

    def apply(key: jax.Array, tree: Any) -> Any:
        tree = apply_to_sites(key, tree, inputs, tap, caller="parallel_adapter")
        return apply_to_sites(key, tree, outputs, add, caller="parallel_adapter")

    options = dict(
        width=width,
        inputs=inputs,
        outputs=outputs,
        scale=scale,
        activation=activation,
        dropout=dropout,
        dtype=dtype,
    )
    return Method("parallel_adapter", options, apply)


def _check(caller: str, width: int, activation: str, dropout: float) -> None:
    if width < 1:
        raise ValueError(f"`{caller}(width={width})`: the bottleneck needs at least one unit.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"`{caller}(activation='{activation}')`: choose of {sorted(ACTIVATIONS)}.")
    check_rate(caller, dropout)


def _norms(sites: Sites, norms: Sites | None, reads: str) -> dict[str, tuple[Site, Site]]:
    """The scale and the bias of the norm behind each site."""
    if norms is None:
        return {}
    scales = [site for site in norms.values() if "bias" not in site.kinds]
    biases = [site for site in norms.values() if "bias" in site.kinds]
    if reads != "sum" or not len(scales) == len(biases) == len(sites):
        raise ValueError(
            f"`bottleneck_adapter(reads='{reads}', norms=...)`: an adapter that reads the 'sum' takes one "
            f"scale and one bias for each of {list(sites)}, but got "
            f"{[s.path for s in scales]} and {[s.path for s in biases]}."
        )
    return dict(zip(sites, zip(scales, biases, strict=True), strict=True))


def _network(
    key: jax.Array,
    stack: tuple[int, ...],
    n: int,
    m: int,
    d: int,
    dtype: Any,
    init: str = "zero",
) -> tuple[Trainable, Trainable, Trainable, Trainable]:
    """down (n, m), its bias, up (m, d) and its bias."""
    c, up, e = (jnp.zeros((*stack, *shape), dtype) for shape in ((m,), (m, d), (d,)))
    if init == "zero":
        down = jax.random.normal(key, (*stack, n, m), dtype) / n**0.5
    else:
        first, second = jax.random.split(key)
        down = 0.01 * jax.random.truncated_normal(first, -2, 2, (*stack, n, m), dtype)
        up = 0.01 * jax.random.truncated_normal(second, -2, 2, up.shape, dtype)
    return Trainable(down), Trainable(c), Trainable(up), Trainable(e)
