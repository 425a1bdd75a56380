"""Bottleneck adapters: a small feed-forward network after a sub-layer, or parallel to it."""

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
ADAPTER_INPUTS = ("output", "output_plus_residual", "residual")


@weight
class Bottleneck(Weight):
    """y + scale * (act(z @ down + down_bias) @ up + up_bias), where y = x @ w.

    The adapter's input z is the sub-layer's output h = y + bias, the sum of h and the residual
    stream (normalized, if there is a `norm_scale`), or the residual stream alone. After this
    weight, the model adds its own bias and its residual stream, as it does without the adapter.
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
    adapter_input: str = static("output")
    activation: str = static("relu")
    scale: float = static(1.0)
    dropout: float = static(0.0)
    eps: float = static(1e-12)

    is_mergeable = False

    def forward(self, x):
        y = x @ self.w
        return y + self.delta(self.input_of(y))

    def input_of(self, y):
        """z (..., out), from the product y (..., out)."""
        h = y if self.bias is None else y + self.bias
        if self.adapter_input == "output":
            return h
        residual = self.down.site.residual(y, self.bias)
        if self.adapter_input == "residual":
            return residual
        return self._norm(h + residual)

    def delta(self, z):
        """The output of the adapter (..., out), which is added to the product."""
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
class ParallelAdapterInput(Weight):
    """x @ w; keeps act(x @ down + down_bias) for the `ParallelAdapterOutput` of the same name."""

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
                f"The model uses the input weight of the parallel adapter '{self.name}' a second "
                f"time ({self.down.site.where}) before its output is reached, so it is not known "
                "which of the two inputs is meant. Choose a sub-layer whose first kernel is used "
                "once."
            )
        taps[self.name] = ACTIVATIONS[self.activation](x @ self.down + self.down_bias)
        return x @ self.w


@weight
class ParallelAdapterOutput(Weight):
    """x @ w + scale * (h @ up + up_bias), h from the `ParallelAdapterInput` of the same name."""

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
                f"The model has reached the output of the parallel adapter '{self.name}', but "
                "not its input in the same scope before. Choose an input weight that the model "
                "uses before the output weight, in the same loop body or branch."
            )
        delta = self.scale * (taps.pop(self.name) @ self.up + self.up_bias)
        return x @ self.w + dropped(delta, self.key, self.dropout)


@register_method
def bottleneck_adapter(
    bottleneck_dim: int,
    sites: Sites,
    *,
    adapter_input: Literal["output", "output_plus_residual", "residual"] = "output",
    norms: Sites | None = None,
    eps: float = 1e-12,
    activation: str = "relu",
    scale: float = 1.0,
    dropout: float = 0.0,
    init: Literal["zero", "normal"] = "zero",
    dtype: Any = jnp.float32,
) -> Method:
    """Bottleneck adapter after a sub-layer.

    The output h = x @ w + b (..., d) of each selected kernel becomes

        h + scale * (act(z @ down + down_bias) @ up + up_bias)

    with a trainable `down` (d, m), `down_bias` (m,), `up` (m, d) and `up_bias` (d,). The input z
    of the adapter depends on `adapter_input`, where r is the residual stream that the model adds
    to h:

    - "output": z = h. This is Houlsby's sequential adapter.
    - "output_plus_residual": z = h + r, or LayerNorm(h + r) if `norms` has the LayerNorms of a
      model that normalizes this sum. The model then normalizes its own sum again, which is
      Pfeiffer's adapter, LayerNorm(r + h + adapter(LayerNorm(h + r))).
    - "residual": z = r, an adapter in parallel with a sub-layer that has no norm at its input.
      For a sub-layer with such a norm, use `parallel_adapter`, whose input is the normalized one.
      (The AdapterHub library uses r in both cases.)

    The residual stream is the next array that the model adds to h. A bias may be added before it,
    but a dropout or a scale between the two is an error when the model is called, and so are two
    sub-layers in parallel, h + other + r, because it is not known which of the two is meant.

    To train LayerNorms as well, as in Houlsby's paper, use
    `chain(bottleneck_adapter(...), norm_tuning(sites))`.

    Args:
      bottleneck_dim: m, the number of hidden units, at least 1.
      sites: The last kernel of each sub-layer, with all of its outputs. Its bias is known from the
        sites, and its residual stream is found when the model is traced.
      adapter_input: See above.
      norms: Only for "output_plus_residual": scales and biases of the LayerNorms after the sums,
        one of each for each of `sites`, in the same order.
      eps: Epsilon of these LayerNorms.
      activation: "relu", "gelu", "silu" or "tanh".
      scale: Factor of the adapter's output.
      dropout: Probability with which each entry of the adapter's output is dropped, in calls that
        give a key, `combine(frozen, adapter, dropout=key)`.
      init: With "zero", training starts at the base model: `up` and both biases start at zero,
        `down` at Normal(0, 1 / d). With "normal", it starts near the base model: `down` and `up`
        start at a normal distribution with standard deviation 0.01, truncated at two standard
        deviations, as in Houlsby's paper.
      dtype: Dtype of the adapter's arrays.

    Returns:
      A `Method` with 2 m d + d + m trainable parameters per kernel with d outputs.

    Raises:
      ValueError: An option is out of range, a slice of the outputs is selected, or the norms do
        not fit the sites. When the model is called: the residual stream cannot be found; the
        message says what the model does instead.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x + x @ p["w"], {"w": jnp.ones((4, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 4)))
      >>> method = jp.bottleneck_adapter(2, sites.linear)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/down': (4, 2), 'w/down_bias': (2,), 'w/up': (2, 4), 'w/up_bias': (4,)}

    References:
      Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019, section 2.1.
      https://arxiv.org/abs/1902.00751
      Pfeiffer et al., AdapterFusion, 2021, section 3.2.2 and appendix.
      https://arxiv.org/abs/2005.00247
    """
    _check("bottleneck_adapter", bottleneck_dim, activation, dropout)
    check_whole("bottleneck_adapter", sites)
    if adapter_input not in ADAPTER_INPUTS:
        raise ValueError(
            f"`bottleneck_adapter(adapter_input='{adapter_input}')`: choose one of "
            f"{ADAPTER_INPUTS}."
        )
    if init not in ("zero", "normal"):
        raise ValueError(f"`bottleneck_adapter(init='{init}')`: choose 'zero' or 'normal'.")
    norm_of = _norm_of_each(sites, norms, adapter_input)

    def make(key: jax.Array, site: Site, view: View) -> View:
        d = site.size("out")
        weight = Bottleneck(
            view.weight,
            *_network(key, site.stack, d, bottleneck_dim, d, dtype, init),
            bias_of(site, sites),
            norm_scale=vector_of(norm_of[site.path][0], site) if norm_of else None,
            norm_bias=vector_of(norm_of[site.path][1], site) if norm_of else None,
            key=dropout_key(site, view, dropout),
            adapter_input=adapter_input,
            activation=activation,
            scale=scale,
            dropout=dropout,
            eps=eps,
        )
        return dataclasses.replace(view, weight=weight)

    options = dict(
        bottleneck_dim=bottleneck_dim,
        sites=sites,
        adapter_input=adapter_input,
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
    bottleneck_dim: int,
    inputs: Sites,
    outputs: Sites,
    *,
    scale: float = 1.0,
    activation: str = "relu",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Parallel adapter: a small feed-forward network beside a sub-layer.

    The output f(x) (..., out) of each selected sub-layer with input x (..., in) becomes

        f(x) + scale * (act(x @ down + down_bias) @ up + up_bias)

    with a trainable `down` (in, m), `down_bias` (m,), `up` (m, out) and `up_bias` (out,). `down`
    starts at Normal(0, 1 / in) and the others at zero, so that training starts at the base model.
    A weight at the sub-layer's first kernel computes the hidden units from x, and a second one at
    its last kernel adds the output; the hidden units pass from one to the other when the model is
    traced.

    Args:
      bottleneck_dim: m, the number of hidden units, at least 1.
      inputs: The first kernel of each sub-layer.
      outputs: The last kernel of each sub-layer, in the same order.
      scale: Factor of the adapter's output.
      activation: "relu", "gelu", "silu" or "tanh".
      dropout: Probability with which each entry of the adapter's output is dropped, in calls that
        give a key, `combine(frozen, adapter, dropout=key)`.
      dtype: Dtype of the adapter's arrays.

    Returns:
      A `Method` with m * (in + out) + m + out trainable parameters per sub-layer.

    Raises:
      ValueError: An option is out of range, inputs and outputs differ in number, or a slice of the
        outputs is selected. When the model is called: the two kernels are in different scopes,
        such as the body of a loop and the code around it, or the first kernel is used twice before
        the last one.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: jax.nn.relu(x @ p["first"]) @ p["last"]
      >>> params = {"first": jnp.ones((4, 8)), "last": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 4)))
      >>> method = jp.parallel_adapter(2, sites.match("first"), sites.match("last"))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'first/down': (4, 2), 'first/down_bias': (2,), 'last/up': (2, 4), 'last/up_bias': (4,)}

    References:
      He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021,
      section 4.1. https://arxiv.org/abs/2110.04366
    """
    _check("parallel_adapter", bottleneck_dim, activation, dropout)
    check_whole("parallel_adapter", inputs | outputs)
    if len(inputs) != len(outputs) or set(inputs) & set(outputs):
        raise ValueError(
            "`parallel_adapter` takes the first and the last kernel of each sub-layer, two "
            f"different ones, but got the inputs {list(inputs)} and the outputs {list(outputs)}."
        )
    # The two weights of a sub-layer find each other by the path of its last kernel.
    name = dict(zip(inputs, outputs, strict=True)) | {path: path for path in outputs}

    def at_input(key: jax.Array, site: Site, view: View) -> View:
        n = site.size("in")
        down, down_bias, _, _ = _network(key, site.stack, n, bottleneck_dim, 1, dtype)
        weight = ParallelAdapterInput(view.weight, down, down_bias, activation, name[site.path])
        return dataclasses.replace(view, weight=weight)

    def at_output(key: jax.Array, site: Site, view: View) -> View:
        d = site.size("out")
        _, _, up, up_bias = _network(key, site.stack, 1, bottleneck_dim, d, dtype)
        mask_key = dropout_key(site, view, dropout)
        weight = ParallelAdapterOutput(
            view.weight, up, up_bias, mask_key, scale, dropout, name[site.path]
        )
        return dataclasses.replace(view, weight=weight)

    def apply(key: jax.Array, tree: Any) -> Any:
        tree = apply_to_sites(key, tree, inputs, at_input, caller="parallel_adapter")
        return apply_to_sites(key, tree, outputs, at_output, caller="parallel_adapter")

    options = dict(
        bottleneck_dim=bottleneck_dim,
        inputs=inputs,
        outputs=outputs,
        scale=scale,
        activation=activation,
        dropout=dropout,
        dtype=dtype,
    )
    return Method("parallel_adapter", options, apply)


def _check(caller: str, bottleneck_dim: int, activation: str, dropout: float) -> None:
    if bottleneck_dim < 1:
        raise ValueError(
            f"`{caller}(bottleneck_dim={bottleneck_dim})`: give at least 1 hidden unit."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`{caller}(activation='{activation}')`: choose one of {sorted(ACTIVATIONS)}."
        )
    check_rate(caller, dropout)


def _norm_of_each(
    sites: Sites, norms: Sites | None, adapter_input: str
) -> dict[str, tuple[Site, Site]]:
    """{path of a kernel: scale and bias of the LayerNorm after it}, empty without norms."""
    if norms is None:
        return {}
    scales = [site for site in norms.values() if "bias" not in site.kinds]
    biases = [site for site in norms.values() if "bias" in site.kinds]
    if adapter_input != "output_plus_residual" or not len(scales) == len(biases) == len(sites):
        raise ValueError(
            f"`bottleneck_adapter(adapter_input='{adapter_input}', norms=...)`: norms are for "
            "'output_plus_residual' only, one scale and one bias for each of "
            f"{list(sites)}, but got the scales {[s.path for s in scales]} and the biases "
            f"{[s.path for s in biases]}."
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
    """`down` (n, m), `down_bias` (m,), `up` (m, d) and `up_bias` (d,), each with its stack."""
    down_bias, up, up_bias = (jnp.zeros((*stack, *shape), dtype) for shape in ((m,), (m, d), (d,)))
    if init == "zero":
        down = jax.random.normal(key, (*stack, n, m), dtype) / n**0.5
    else:
        first, second = jax.random.split(key)
        down = 0.01 * jax.random.truncated_normal(first, -2, 2, (*stack, n, m), dtype)
        up = 0.01 * jax.random.truncated_normal(second, -2, 2, up.shape, dtype)
    return Trainable(down), Trainable(down_bias), Trainable(up), Trainable(up_bias)
