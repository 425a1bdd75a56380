"""A stack of feed-forward layers under a scan, and a head: as small as a model can be."""

import jax
import jax.numpy as jnp
import numpy as np


def model(params, x):
    """x (..., D) to (..., outputs)."""

    def layer(h, p):
        return h + jnp.tanh(h @ p["up"]) @ p["down"], None

    h, _ = jax.lax.scan(layer, x, params["layers"])
    return h @ params["head"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def params(layers, width, hidden, outputs):
    up, down = normal(0, layers, width, hidden) / 2, normal(1, layers, hidden, width) / 2
    return {"layers": {"up": up, "down": down}, "head": normal(2, width, outputs)}
