"""Flax NNX modules, split into parameters and the rest, merged inside the function."""

import jax
import jax.numpy as jnp
from flax import nnx

from .row import B, Case, D, F, H, L, N, T, V, activations, randomized, row, tokens

X = jnp.float64


def _case(module, *args, call=lambda m, *a: m(*a)):
    """The outputs, and nothing of the state."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params, rest, *args):
        return call(nnx.merge(graph, params, rest, copy=True), *args)

    return Case(fn, randomized(params), (rest, *args))


def _stateful(module, *args):
    """The outputs and the new rest."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    rest = jax.tree.map(_in_float64, rest)

    def fn(params, rest, *args):
        module = nnx.merge(graph, params, rest, copy=True)
        y = module(*args)
        return y, nnx.state(module, nnx.Not(nnx.Param))

    return Case(fn, randomized(params), (rest, *args))


def _in_float64(x):
    return x.astype(X) if jnp.issubdtype(x.dtype, jnp.floating) else x


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, param_dtype=X, rngs=rngs)
        self.up = nnx.Linear(D, F, param_dtype=X, rngs=rngs)
        self.down = nnx.Linear(F, D, param_dtype=X, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


@row("nnx Linear", linear=("up/kernel", "down/kernel"), everyday=True)
def linear():
    return _case(Mlp(nnx.Rngs(0)), activations(B, T, D))


@row("nnx LinearGeneral", linear=("up/kernel", "down/kernel"))
def linear_general():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.LinearGeneral(D, (N, H), param_dtype=X, rngs=rngs)
            self.down = nnx.LinearGeneral((N, H), D, axis=(-2, -1), param_dtype=X, rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    return _case(Model(nnx.Rngs(0)), activations(B, T, D))


@row("nnx Einsum", linear=("up/kernel", "down/kernel"))
def einsum():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Einsum("btd,ndh->btnh", (N, D, H), (N, H), param_dtype=X, rngs=rngs)
            self.down = nnx.Einsum("nhd,btnh->btd", (N, H, D), (D,), param_dtype=X, rngs=rngs)

        def __call__(self, x):
            # The second einsum has the weight first, which nnx.Einsum calls with the input second.
            h = jnp.tanh(self.up(x))
            return jnp.einsum("nhd,btnh->btd", self.down.kernel[...], h) + self.down.bias[...]

    return _case(Model(nnx.Rngs(0)), activations(B, T, D))


_HEADS = tuple(f"{n}/kernel" for n in ("query", "key", "value", "out"))


def _attention(**more):
    module = nnx.MultiHeadAttention(
        N,
        D,
        N * H,
        D,
        decode=False,
        param_dtype=X,
        dtype=X,
        keep_rngs=False,
        rngs=nnx.Rngs(0),
        **more,
    )
    return _case(module, activations(B, T, D))


@row("nnx MultiHeadAttention", linear=_HEADS, everyday=True)
def attention():
    def attend(query, key, value, **_):
        """In float64 throughout: JAX's own takes its softmax in float32."""
        scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / H**0.5
        return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)

    return _attention(attention_fn=attend)


@row("nnx MultiHeadAttention, JAX's own attention", linear=_HEADS, tolerance=1e-6)
def attention_of_jax():
    return _attention()


@row("nnx Embed.attend", embedding=("embed/embedding",), linear=("up/kernel",), everyday=True)
def embed_attend():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, D, param_dtype=X, rngs=rngs)
            self.norm = nnx.RMSNorm(D, param_dtype=X, rngs=rngs)
            self.up = nnx.Linear(D, D, param_dtype=X, rngs=rngs)

        def __call__(self, ids):
            x = self.norm(self.embed(ids))
            return self.embed.attend(x + jnp.tanh(self.up(x)))

    return _case(Model(nnx.Rngs(0)), tokens(B, T))


@row("nnx Conv", conv=("a/kernel", "b/kernel"))
def conv():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(10, 14, (3, 2), strides=(2, 1), param_dtype=X, rngs=rngs)
            self.b = nnx.Conv(14, 6, (3, 3), feature_group_count=2, param_dtype=X, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.gelu(self.a(x)))

    return _case(Model(nnx.Rngs(0)), activations(B, 8, 5, 10))


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=L)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Mlp(rngs)

        self.layers = make(rngs)

    def __call__(self, x, layer=lambda m, x: m(x)):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, m):
            return layer(m, x)

        return through(x, self.layers)


_STACK = dict(linear=("layers/up/kernel", "layers/down/kernel"))


@row("nnx.scan", **_STACK, everyday=True)
def scan():
    return _case(Stack(nnx.Rngs(0)), activations(B, T, D))


@row("nnx.scan of nnx.remat", **_STACK)
def scan_remat():
    layer = nnx.remat(lambda m, x: m(x))
    return _case(Stack(nnx.Rngs(0)), activations(B, T, D), call=lambda m, x: m(x, layer))


@row("a stacked weight that nnx.scan returns", **_STACK, everyday=True)
def scan_returns():
    """nnx.scan hands the layers' state back as outputs; the second pass reads what came back."""
    return _case(Stack(nnx.Rngs(0)), activations(B, T, D), call=lambda m, x: m(m(x)))


@row("nnx.vmap of a stack", **_STACK)
def vmap():
    def call(m, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0), out_axes=0)(m.layers, x)

    return _case(Stack(nnx.Rngs(0)), activations(L, T, D), call=call)


@row("nnx.vmap of a stack on one input", **_STACK)
def vmap_shared():
    def call(m, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=0)(m.layers, x)

    return _case(Stack(nnx.Rngs(0)), activations(B, T, D), call=call)


@row("nnx.remat", linear=("up/kernel", "down/kernel"))
def remat():
    call = nnx.remat(lambda m, x: m(x))
    return _case(Mlp(nnx.Rngs(0)), activations(B, T, D), call=call)


@row("split and merge inside jax.checkpoint", linear=("up/kernel", "down/kernel"), everyday=True)
def split_in_checkpoint():
    def call(module, x):
        graph, state = nnx.split(module)

        @jax.checkpoint
        def layer(state, x):
            inner = nnx.merge(graph, state)
            _, again = nnx.split(inner)
            return nnx.merge(graph, again)(x)

        return layer(state, x)

    return _case(Mlp(nnx.Rngs(0)), activations(B, T, D), call=call)


@row("nnx RngState", linear=("up/kernel", "down/kernel"))
def rng_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(D, F, param_dtype=X, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, deterministic=False, rngs=rngs)
            self.down = nnx.Linear(F, D, param_dtype=X, rngs=rngs)

        def __call__(self, x):
            return self.down(self.dropout(nnx.gelu(self.up(x))))

    return _stateful(Model(nnx.Rngs(0)), activations(B, T, D))


@row("nnx BatchStat", linear=("up/kernel", "down/kernel"), everyday=True)
def batch_stat():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(D, F, param_dtype=X, rngs=rngs)
            self.norm = nnx.BatchNorm(F, use_running_average=False, param_dtype=X, rngs=rngs)
            self.down = nnx.Linear(F, D, param_dtype=X, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.gelu(self.norm(self.up(x))))

    return _stateful(Model(nnx.Rngs(0)), activations(B, T, D))
