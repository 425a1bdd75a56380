"""Every method in float32, compiled, at sizes as models have them, against itself in float64.

The other laws are of float64 and of sizes below thirty. There XLA never takes the kernels that
it has for float32 on CPU, nor the threads that it gives to large products: 0.10 puts a weighted
sum, the products around it and its broadcast in one of them, whose numbers are wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from .methods import METHODS
from .rows.row import activations, attend, norm, params, random, tokens
from .subject import is_real, real

B, T, D, F, N, H, V = 4, 160, 64, 172, 2, 16, 29

PARAMS = params(
    **dict(table=(V, D), q=(D, N * H), k=(D, N * H), v=(D, N * H), o=(N * H, D)),
    **dict(up=(D, F), down=(F, D), mlp_scale=(D,), mlp_bias=(D,)),
)
ARGS = (activations(B, T, D), tokens(B, T, high=V))


def model(p, x, ids):
    """A layer: attention, and a feed-forward block with the norm of its sum behind it."""
    x = x + p["table"][ids]
    q, k, v = ((x @ p[n]).reshape(*x.shape[:-1], N, H) for n in "qkv")
    x = norm(x + attend(q, k, v).reshape(*x.shape[:-1], N * H) @ p["o"], 1.0)
    return norm(x + jnp.tanh(x @ p["up"]) @ p["down"], p["mlp_scale"]) + p["mlp_bias"]


def to(dtype):
    """A cast of the floating arrays of a tree."""
    return lambda tree: jax.tree.map(lambda x: x.astype(dtype) if is_real(x) else x, tree)


wide, narrow = to(jnp.float64), to(jnp.float32)


def given(method, sites, args):
    """What `combine` is given: the table's own, but experts of this model's sizes."""
    if method.name != "xlora":
        return method.given(args)
    experts = params(
        **{f"{p}/experts/a": (s.size("in"), 3) for p, s in sites.linear.items()},
        **{f"{p}/experts/b": (3, s.size("out")) for p, s in sites.linear.items()},
    )
    return {**experts, "hidden_states": activations(5)}


def outputs(frozen, adapter, args, values):
    return jp.lift(model)(jp.combine(frozen, adapter, **values), *args)


def gradients(frozen, adapter, args, values):
    return jax.grad(lambda a: jnp.sum(outputs(frozen, a, args, values) ** 2))(adapter)


@pytest.mark.parametrize("call", [outputs, pytest.param(gradients, marks=pytest.mark.conformance)])
@pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])
@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_it_is_what_it_is_in_float64(method, call):
    base = narrow(PARAMS)
    sites = jp.sites(model, base, *narrow(ARGS))
    args = method.args(narrow(ARGS), sites)
    frozen, start = jp.split(method.make(sites, jnp.float32)(jax.random.key(1), base))
    adapter = {
        k: v + random(*v.shape, seed=i, scale=0.1).astype(v.dtype)
        for i, (k, v) in enumerate(start.items())
    }
    values = given(method, sites, args)

    def run(cast):
        # Values of the call stay constants of the program, like the index of a task in training.
        return real(jax.jit(lambda *x: call(*x, cast(values)))(*map(cast, (frozen, adapter, args))))

    exact, found = run(wide), run(narrow)
    total = np.sqrt(sum(np.linalg.norm(y) ** 2 for y in exact))
    for x, y in zip(found, exact, strict=True):
        # Some gradients are zero but for rounding, such as that of a constant added to all keys.
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y) + 1e-7 * total
