"""Control flow: loops over stacked layers, rematerialization, branches, custom rules."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .row import B, Case, D, F, L, T, activations, norm, params, row


def _block(x, p):
    return x + jnp.tanh(norm(x, p["scale"]) @ p["up"] + p["bias"]) @ p["down"]


def _stack(*lead):
    return params(up=(*lead, D, F), bias=(*lead, F), down=(*lead, F, D), scale=(*lead, D))


def _x():
    return (activations(B, T, D),)


_BOTH = dict(linear=("up", "down"))


# ---- loops over layers


@row("lax.scan over layers", **_BOTH, everyday=True)
def scan():
    def fn(p, x):
        return jax.lax.scan(lambda x, p: (_block(x, p), jnp.sum(x, -1)), x, p)

    return Case(fn, _stack(L), _x())


@row("lax.scan, reversed and unrolled", **_BOTH)
def scan_reversed():
    def fn(p, x):
        return jax.lax.scan(lambda x, p: (_block(x, p), None), x, p, reverse=True, unroll=2)[0]

    return Case(fn, _stack(L), _x())


@row("lax.scan of remat with a policy", **_BOTH, everyday=True)
def scan_remat_policy():
    block = jax.checkpoint(_block, policy=jax.checkpoint_policies.dots_saveable)

    def fn(p, x):
        return jax.lax.scan(lambda x, p: (block(x, p), None), x, p)[0]

    return Case(fn, _stack(L), _x())


@row("remat of a lax.scan", **_BOTH)
def remat_scan():
    @jax.checkpoint
    def fn(p, x):
        return jax.lax.scan(lambda x, p: (_block(x, p), None), x, p)[0]

    return Case(fn, _stack(L), _x())


@row("remat with a policy by names", **_BOTH)
def remat_names():
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    @functools.partial(jax.checkpoint, policy=policy)
    def block(p, x):
        h = checkpoint_name(norm(x, p["scale"]) @ p["up"] + p["bias"], "hidden")
        return x + jnp.tanh(h) @ p["down"]

    return Case(block, _stack(), _x())


@row("scan of scans, the stack reshaped into groups", **_BOTH, everyday=True)
def scan_groups():
    def fn(p, x):
        groups = jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), p)

        @jax.checkpoint
        def group(x, p):
            return jax.lax.scan(lambda x, p: (_block(x, p), None), x, p)[0]

        return jax.lax.scan(lambda x, p: (group(x, p), None), x, groups)[0]

    return Case(fn, _stack(4), _x())


@row("lax.scan over time with constant weights", linear=("w", "u"))
def scan_constant():
    def fn(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"])
            return h, h

        return jax.lax.scan(step, jnp.zeros((B, F), x.dtype), x.swapaxes(0, 1))[1]

    return Case(fn, params(w=(D, F), u=(F, F)), _x())


@row("w[i] in a fori_loop", **_BOTH, everyday=True)
def indexed_fori():
    """Vectors of a stack read by w[i] look like rows of a table to `sites`."""

    def fn(p, x):
        body = lambda i, x: _block(x, jax.tree.map(lambda w: w[i], p))  # noqa: E731
        return jax.lax.fori_loop(0, L, body, x)

    return Case(fn, _stack(L), _x())


@row("w[i] in a scan over indices", **_BOTH)
def indexed_scan():
    """Vectors of a stack read by w[i] look like rows of a table to `sites`."""

    def fn(p, x):
        def body(x, i):
            layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, 0, False), p)
            return _block(x, layer), None

        return jax.lax.scan(body, x, jnp.arange(L)[::-1])[0]

    return Case(fn, _stack(L), _x())


@row("w[i] in a Python loop", **_BOTH)
def indexed_python():
    def fn(p, x):
        for i in range(L):
            x = _block(x, jax.tree.map(lambda w: w[i], p))  # noqa: B023
        return x

    return Case(fn, _stack(L), _x())


@row("lax.map over experts", **_BOTH)
def mapped():
    def fn(p, x):
        return jax.lax.map(lambda p: _block(x, p), p)

    return Case(fn, _stack(L), _x())


@row("a scan that returns its weights", **_BOTH)
def scan_returns():
    def fn(p, x):
        x, p = jax.lax.scan(lambda x, p: (_block(x, p), p), x, p)
        return jax.lax.scan(lambda x, p: (_block(x, p), None), x, p)[0]

    return Case(fn, _stack(L), _x())


@row("while_loop", **_BOTH, reverse=False, everyday=True)
def while_loop():
    def fn(p, x):
        going = lambda c: (c[1] < 3) & (jnp.sum(c[0] @ p["up"]) < 1e9)  # noqa: E731
        return jax.lax.while_loop(going, lambda c: (_block(c[0], p), c[1] + 1), (x, 0))[0]

    return Case(fn, _stack(), _x())


@row("fori_loop with a bound known at run time", **_BOTH, reverse=False)
def fori_dynamic():
    """Vectors of a stack read by w[i] look like rows of a table to `sites`."""

    def fn(p, x, n):
        body = lambda i, x: _block(x, jax.tree.map(lambda w: w[i], p))  # noqa: E731
        return jax.lax.fori_loop(0, n, body, x)

    return Case(fn, _stack(L), (*_x(), jnp.int32(2)))


@row("a weight carried through a loop", linear=("w", "u"), materializes=("w",))
def carried():
    """The body returns a changed weight: no rule can say what a factored one would become."""

    def fn(p, x):
        def body(c, _):
            w, x = c
            return (0.5 * w + 0.5 * w.T, jnp.tanh(x @ w)), None

        (w, x), _ = jax.lax.scan(body, (p["w"], jnp.tanh(x @ p["w"])), None, length=3)
        return x @ p["u"]

    return Case(fn, params(w=(D, D), u=(D, F)), _x())


# ---- branches and calls


@row("cond", **_BOTH, everyday=True)
def cond():
    def fn(p, x):
        wide = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
        back = lambda p, x: x @ p["down"].T @ p["up"].T  # noqa: E731
        h = jax.lax.cond(jnp.sum(x) > 0, wide, back, p, x)
        return h + jax.lax.cond(jnp.sum(x) < 0, wide, back, p, 2 * h)

    return Case(fn, params(up=(D, F), down=(F, D)), _x())


@row("switch over layers", **_BOTH)
def switch():
    def fn(p, x, i):
        layers = [functools.partial(lambda k, x: _block(x, k), _at(p, k)) for k in range(L)]
        return jax.lax.switch(i, layers, jax.lax.switch((i + 1) % L, layers, x))

    return Case(fn, _stack(L), (*_x(), jnp.int32(1)))


def _at(p, k):
    return jax.tree.map(lambda w: w[k], p)


@row("jit inside", **_BOTH, everyday=True)
def jit_inside():
    @jax.jit
    def hidden(p, x):
        return jnp.tanh(norm(x, p["scale"]) @ p["up"] + p["bias"])

    @functools.partial(jax.jit, static_argnums=2, inline=False)
    def project(w, x, sign):
        return sign * (x @ w)

    def fn(p, x):
        h = hidden(p, x)
        with jax.named_scope("out"):
            return project(p["down"], h, 1) + project(p["up"].T, h, -1)

    return Case(fn, _stack(), _x())


@row("a barrier and a name on the weight", **_BOTH)
def barrier():
    def fn(p, x):
        p = jax.lax.optimization_barrier(p)
        return _block(x, {**p, "up": checkpoint_name(p["up"], "up")})

    return Case(fn, _stack(), _x())


@row("a weight whose gradient is stopped", **_BOTH, stopped=("up",))
def stopped():
    def fn(p, x):
        return _block(x, {**p, "up": jax.lax.stop_gradient(p["up"])})

    return Case(fn, _stack(), _x())


# ---- custom rules that are deliberately not the derivative


@row("custom_vjp that halves the gradient", **_BOTH, rule=("up", "down"), everyday=True)
def custom_vjp():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        return x @ w, (x, w)

    def backward(saved, g):
        x, w = saved
        return 0.5 * g @ w.T, 0.5 * jnp.einsum("bti,bto->io", x, g)

    product.defvjp(forward, backward)

    def fn(p, x):
        return product(jnp.tanh(product(x, p["up"])), p["down"].T.T)

    return Case(fn, params(up=(D, F), down=(F, D)), _x())


@row("custom_vjp that clips the gradient of its input", **_BOTH)
def custom_vjp_clip():
    """The weight passes through the rule's neighbour, not through the rule."""

    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.3, 0.3),))

    def fn(p, x):
        return clipped(jnp.tanh(clipped(x @ p["up"]))) @ p["down"]

    return Case(fn, params(up=(D, F), down=(F, D)), _x())


@row("custom_vjp in a scan", **_BOTH, rule=("up", "down"))
def custom_vjp_scan():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def layer(strength, p, x):
        return _block(x, p)

    def forward(strength, p, x):
        return _block(x, p), (p, x)

    def backward(strength, saved, g):
        _, pull = jax.vjp(lambda p, x: _block(x, p), *saved)
        return jax.tree.map(lambda c: strength * c, pull(g))

    layer.defvjp(forward, backward)

    def fn(p, x):
        return jax.lax.scan(lambda x, p: (layer(0.7, p, x), None), x, p)[0]

    return Case(fn, _stack(L), _x())


@row("custom_jvp that scales the tangent", **_BOTH, rule=("up", "down"), everyday=True)
def custom_jvp():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    @product.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return x @ w, 0.5 * (dx @ w) + 2.0 * (x @ dw)

    def fn(p, x):
        return product(jnp.tanh(product(x, p["up"])), p["down"])

    return Case(fn, params(up=(D, F), down=(F, D)), _x())


@row("custom_jvp on the activation", **_BOTH)
def custom_jvp_activation():
    """relu6 and the like: the rule holds no weight."""

    def fn(p, x):
        return jax.nn.relu6(jax.nn.silu(x @ p["up"] + 0.1)) @ p["down"]

    return Case(fn, params(up=(D, F), down=(F, D)), _x())
