"""A small pre-norm decoder with biases, scanned and rematerialized, and the same by hand.

The model knows nothing of methods. `by_hand` is its loop unrolled, with places at which a
test writes a method into it: the definition that lifted models are held against.
"""

import jax
import jax.numpy as jnp

D, F, V, B, T, L, H = 16, 24, 50, 3, 6, 3, 4
P = 20  # rows of the position table


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64) * 0.3


def params():
    kernels = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, F), "down": (F, D)}
    layers = {
        name: {"kernel": normal(i, L, *shape), "bias": normal(i + 20, L, shape[1])}
        for i, (name, shape) in enumerate(kernels.items())
    }
    layers["norm1"] = {"scale": 1 + normal(40, L, D)}
    layers["norm2"] = {"scale": 1 + normal(41, L, D)}
    return {"embed": normal(50, V, D), "positions": normal(51, P, D), "layers": layers}


def ids():
    return jax.random.randint(jax.random.key(60), (B, T), 0, V)


def _norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]


def _linear(x, p):
    return x @ p["kernel"] + p["bias"]


def _attend(q, k, v, causal_shift=0):
    """q (B, T, H, h) over k, v (B, S, H, h), where position t sees keys up to t + shift."""
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 2
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool), causal_shift)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(*q.shape[:2], -1)


def _heads(x):
    return x.reshape(*x.shape[:-1], H, -1)


def _layer(x, p, hooks=None, i=None):
    hooks = hooks or {}
    after = hooks.get("after", lambda name, y, i: y)
    h = _norm(x, p["norm1"])
    q, k, v = (_heads(after(n, _linear(h, p[n]), i)) for n in "qkv")
    shift = 0
    if "prefix" in hooks:
        k, v, shift = hooks["prefix"](k, v, i)
    x = x + after("o", _linear(_attend(q, k, v, shift), p["o"]), i)
    h = _norm(x, p["norm2"])
    inner = hooks.get("inner", lambda y, i: y)(jax.nn.gelu(_linear(h, p["up"])), i)
    y = after("down", _linear(inner, p["down"]), i)
    return x + y + hooks.get("beside", lambda h, i: 0)(h, i)


def model(p, ids):
    x = p["embed"][ids] + p["positions"][jnp.arange(ids.shape[1])]
    step = jax.checkpoint(lambda x, layer: (_layer(x, layer), None))
    return jax.lax.scan(step, x, p["layers"])[0] @ p["embed"].T


def by_hand(p, ids, first=0, **hooks):
    """Logits with a method written in, the positions counted from `first`."""
    x = p["embed"][ids] + p["positions"][first + jnp.arange(ids.shape[1])]
    for i in range(L):
        x = _layer(x, jax.tree.map(lambda a, i=i: a[i], p["layers"]), hooks, i)
    return x @ p["embed"].T


def perturbed(adapter, size=0.3):
    """Every trained array moved away from where it starts."""
    return {
        path: x + size * jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        for i, (path, x) in enumerate(sorted(adapter.items()))
    }
