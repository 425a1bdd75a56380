"""Kernels that a model computes before it uses them: joined, repeated, scaled, masked, rounded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .plain import x3
from .row import (
    B,
    Case,
    D,
    F,
    H,
    N,
    T,
    V,
    activations,
    attend,
    norm,
    params,
    randomized,
    row,
    tokens,
)

# ---- joined kernels: each stays factored


@row("kernels concatenated along outputs", linear=("q", "k", "v", "o"), everyday=True)
def outputs_joined():
    def fn(p, x):
        kernel = jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
        bias = jnp.concatenate([p["bq"], p["bk"], p["bv"]])
        q, k, v = jnp.split(x @ kernel + bias, 3, -1)
        q, k, v = (y.reshape(B, -1, N, H) for y in (q, k, v))
        return attend(q, k, v).reshape(B, -1, N * H) @ p["o"]

    heads = {n: (D, N * H) for n in "qkv"} | {"b" + n: (N * H,) for n in "qkv"}
    return Case(fn, params(**heads, o=(N * H, D)), (x3(),))


@row("kernels concatenated along inputs", linear=("up", "w", "u"))
def inputs_joined():
    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        return jnp.concatenate([h, x], -1) @ jnp.concatenate([p["w"], p["u"]], axis=0)

    return Case(fn, params(up=(D, F), w=(F, 11), u=(D, 11)), (x3(),))


@row("kernels joined by heads, then split apart", linear=("q", "k", "o"))
def joined_and_split():
    """Five heads of queries and two of keys; the last three go through another activation."""

    def fn(p, x):
        joined = jnp.concatenate([p["q"].T, p["k"].T], 1).T
        first, last = joined[:, :4], joined[:, 4:]
        y = [jnp.tanh(jnp.einsum("btd,dnh->btnh", x, first)), jnp.einsum("btd,dnh->btnh", x, last)]
        return jnp.einsum("btnh,nhd->btd", jnp.concatenate(y, 2), p["o"])

    return Case(fn, params(q=(D, 5, H), k=(D, 2, H), o=(7, H, 11)), (x3(),))


@row("kernels stacked for one product", linear=("up", "gate", "down"))
def stacked():
    def fn(p, x):
        gate, up = jnp.einsum("btd,sdf->sbtf", x, jnp.stack([p["gate"], p["up"]]))
        return (jnp.tanh(gate) * up) @ p["down"]

    return Case(fn, params(up=(D, F), gate=(D, F), down=(F, D)), (x3(),))


@row("layers stacked, then scanned", linear=("0/w", "1/w", "2/w", "head"))
def stacked_and_scanned():
    def fn(p, x):
        layers = jax.tree.map(lambda *xs: jnp.stack(xs), *(p[str(i)] for i in range(3)))

        def layer(x, p):
            return x + jnp.tanh(norm(x, p["scale"]) @ p["w"]), None

        return jax.lax.scan(layer, x, layers)[0] @ p["head"]

    layers = {str(i): params(w=(D, D), scale=(D,)) for i in range(3)}
    return Case(fn, layers | params(head=(D, 7)), (x3(),))


@row("kernels padded with zeros", linear=("up", "down"))
def padded():
    def fn(p, x):
        h = jnp.tanh(x @ jnp.pad(p["up"], ((0, 0), (2, 3))) + 0.1)
        return h @ jnp.pad(p["down"], ((3, 2), (0, 0)))

    return Case(fn, params(up=(D, F), down=(F, 11)), (x3(),))


@row("key and value kernels repeated for groups of heads", linear=("q", "k", "v", "o"))
def repeated_heads():
    def fn(p, x):
        k, v = (jnp.repeat(p[n].reshape(D, N, H), 2, axis=1) for n in "kv")
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in (p["q"].reshape(D, 2 * N, H), k, v))
        return attend(q, k, v).reshape(B, -1, 2 * N * H) @ p["o"]

    heads = dict(q=(D, 2 * N * H), k=(D, N * H), v=(D, N * H))
    return Case(fn, params(**heads, o=(2 * N * H, 11)), (x3(),))


@row("kernels tiled", linear=("up", "down"))
def tiled():
    """Copies of outputs beside each other, and copies of inputs."""

    def fn(p, x):
        h = jnp.tanh(x @ jnp.tile(p["up"], (1, 2)) + p["bias"])
        return h @ jnp.tile(p["down"], (2, 1))

    return Case(fn, params(up=(D, F), bias=(2 * F,), down=(F, 11)), (x3(),))


@row("kernels scaled along a side", linear=("up", "down"))
def scaled():
    def fn(p, x):
        h = jnp.tanh(x @ (p["up"] * p["in_scale"][:, None]))
        return h @ (p["down"] / p["out_scale"])

    shapes = dict(up=(D, F), in_scale=(D,), down=(F, 11), out_scale=(11,))
    return Case(fn, params(**shapes), (x3(),))


@row("tables joined, the head tied", embedding=("table", "new"))
def tables_joined():
    def fn(p, ids):
        table = jnp.concatenate([p["table"], p["new"]])
        return norm(table[ids], p["scale"]) @ table.T

    return Case(fn, params(table=(V, D), new=(12, D), scale=(D,)), (tokens(B, T, high=V + 12),))


@row("convolution of joined kernels", conv=("w", "u"))
def conv_joined():
    """Of pixels, which have no gradient: it would reverse each kernel, and here the joined one."""

    def fn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        kernel = jnp.concatenate([p["w"], p["u"]], axis=-1) * p["scale"]
        x = x.astype(kernel.dtype) / V
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return jnp.tanh(y)

    return Case(fn, params(w=(3, 3, 5, 7), u=(3, 3, 5, 4), scale=(11,)), (tokens(B, 4, 6, 5),))


@row(
    "linen OptimizedLSTMCell under nn.RNN",
    linear=tuple(f"params/cell/{w}{g}/kernel" for w in "ih" for g in "ifgo"),
)
def optimized_lstm():
    model = nn.RNN(nn.OptimizedLSTMCell(F, param_dtype=jnp.float64))
    x = x3()
    return Case(model.apply, randomized(model.init(jax.random.key(0), x)), (x,))


@row("spectral norm", linear=("w", "u"))
def spectral():
    """One step of power iteration: products with vectors of the kernel's sides."""

    def fn(p, x):
        v = jax.lax.stop_gradient(p["w"] @ (p["w"].T @ p["v_scale"]))
        v = v / jnp.linalg.norm(v)
        sigma = jnp.linalg.norm(v @ p["w"])
        return jnp.tanh(x @ (p["w"] / sigma)) @ p["u"]

    return Case(fn, params(w=(D, F), v_scale=(D,), u=(F, 11)), (x3(),))


# ---- everything else: the kernel is formed, with a warning


def computed(name, kernel, shapes=None, **facts):
    """A row with the product of `kernel(p, x)` and of an ordinary one."""
    shapes = shapes or dict(w=(D, F))
    linear = tuple(n for n, shape in shapes.items() if len(shape) > 1)

    def build():
        def fn(p, x):
            return jnp.tanh(x @ kernel(p, x)) @ p["u"]

        return Case(fn, params(**shapes, u=(F, 11)), (x3(),))

    row(name, **{"linear": (*linear, "u"), "materializes": linear} | facts)(build)


computed("a masked kernel", lambda p, x: p["w"] * jnp.asarray(np.tri(D, F, 2)))
computed(
    "a Kronecker product of kernels",
    lambda p, x: jnp.pad(jnp.kron(p["a"], p["b"]), ((0, 1), (0, 2))),
    dict(a=(3, 5), b=(4, 3)),
)


def weight_norm(p, x):
    return p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True) * p["g_scale"]


computed(
    "weight norm",
    weight_norm,
    dict(w=(D, F), g_scale=(F,)),
    everyday=True,
    stopped=("w/scale_",),  # the norm takes any scale of a column out again
)
computed("rows of a kernel set to others", lambda p, x: p["w"].at[jnp.array([1, 4])].set(0.1))


def quantized(w):
    """To four bits, by columns."""
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(w), 0) / 7)
    return jnp.clip(jnp.round(w / scale), -7, 7) * scale


computed(
    "fake quantization by stop_gradient",
    lambda p, x: p["w"] + jax.lax.stop_gradient(quantized(p["w"]) - p["w"]),
    bf16=False,  # a rounded number on the edge is a step off
)


@jax.custom_vjp
def straight_through(w):
    return quantized(w)


straight_through.defvjp(lambda w: (quantized(w), None), lambda _, ct: (ct,))
computed(
    "fake quantization by custom_vjp",
    lambda p, x: straight_through(p["w"]),
    bf16=False,
    rule=("w",),
)
_TWO = dict(w=(D, F), v=(D, F))
computed(
    "where between two kernels",
    lambda p, x: jnp.where(jnp.arange(F) % 3 == 0, p["w"], p["v"]),
    _TWO,
    stopped=("w/scale_", "v/scale_"),  # the scaled column is of the other kernel
)
computed(
    "cond between two kernels",
    lambda p, x: jax.lax.cond(
        x.sum() > 0, lambda: p["w"] + 0.5 * p["v"], lambda: p["v"] - 2 * p["w"]
    ),
    _TWO,
)


@row("weight-standardized convolution", conv=("w",), materializes=("w",))
def standardized():
    def fn(p, x):
        w = p["w"]
        mean, var = (f(w, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        kernel = (w - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"]
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return jnp.tanh(y + p["bias"])

    return Case(fn, params(w=(3, 3, 5, 7), scale=(7,), bias=(7,)), (activations(B, 4, 6, 5),))


_KERNEL = "params/layer_instance/kernel"


@row("linen WeightNorm", linear=(_KERNEL, "u"), materializes=(_KERNEL,))
def linen_weight_norm():
    """The scale has a name of its own: flax's is what IA3 calls its field at the kernel."""
    model = nn.WeightNorm(nn.Dense(F, param_dtype=jnp.float64))
    name = "layer_instance/kernel/scale"

    def fn(p, x):
        weights = {k: v for k, v in p["params"].items() if k != "g_scale"}
        h = model.apply({"params": weights | {name: p["params"]["g_scale"]}}, x)
        return jnp.tanh(h) @ p["u"]

    variables = model.init(jax.random.key(0), x3())["params"]
    variables = {k.replace(name, "g_scale"): v for k, v in variables.items()}
    return Case(fn, randomized({"params": variables}) | params(u=(F, 11)), (x3(),))
