"""Whole layers: attention and a feed-forward block, each with the norm of its sum behind it."""

import jax
import jax.numpy as jnp

from .row import B, Case, D, F, H, L, N, T, V, activations, attend, params, row, tokens


def layer_norm(x, scale, bias):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-12) * scale + bias


def _layer(x, p, attend=attend):
    q, k, v = ((x @ p[n] + p[f"{n}_bias"]).reshape(*x.shape[:-1], N, H) for n in "qkv")
    attended = attend(q, k, v).reshape(*x.shape[:-1], N * H) @ p["o"] + p["o_bias"]
    x = layer_norm(x + attended, p["attn_scale"], p["attn_bias"])
    h = jnp.tanh(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
    return layer_norm(x + h, p["mlp_scale"], p["mlp_bias"])


def _params(*lead):
    kernels = dict(q=(D, N * H), k=(D, N * H), v=(D, N * H), o=(N * H, D), up=(D, F), down=(F, D))
    biases = {f"{name}_bias": shape[1:] for name, shape in kernels.items()}
    norms = {f"{at}_{what}": (D,) for at in ("attn", "mlp") for what in ("scale", "bias")}
    return params(**{n: (*lead, *shape) for n, shape in (kernels | biases | norms).items()})


_ALL = dict(linear=("q", "k", "v", "o", "up", "down"))


@row("post-norm layers, lax.scan", **_ALL, everyday=True)
def scanned():
    def fn(p, x):
        return jax.lax.scan(lambda x, p: (_layer(x, p), None), x, p)[0]

    return Case(fn, _params(L), (activations(B, T, D),))


@row("post-norm layer, jit in remat", **_ALL)
def remat():
    @jax.checkpoint
    def fn(p, x):
        return jax.jit(_layer)(x, p)

    return Case(fn, _params(), (activations(B, T, D),))


@row("layers with time before batch, as many of both", **_ALL)
def time_first():
    """The shapes do not tell batch and time apart, so a weight with positions has to check them."""

    def time_before_batch(*qkv):
        return jnp.swapaxes(attend(*(jnp.swapaxes(x, 0, 1) for x in qkv)), 0, 1)

    def fn(p, x):
        step = lambda x, p: (_layer(x, p, time_before_batch), None)  # noqa: E731
        return jnp.swapaxes(jax.lax.scan(step, jnp.swapaxes(x, 0, 1), p)[0], 0, 1)

    return Case(fn, _params(L), (activations(T, T, D),))


@row(
    "a pooler of the first position",
    embedding=("table",),
    linear=(*_ALL["linear"], "pool"),
    stopped=("q", "k"),  # the first position sees itself alone, whatever its scores
)
def pooled():
    def fn(p, ids):
        return jnp.tanh(_layer(p["table"][ids], p)[:, 0] @ p["pool"])

    more = params(table=(V, D), pool=(D, F + 2))
    return Case(fn, {**_params(), **more}, (tokens(B, T),))
