"""Flax linen modules, through `module.apply`."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from .row import B, Case, D, F, H, L, N, T, V, activations, randomized, row, tokens

X = jnp.float64


def _case(module, *args):
    variables = randomized(module.init(jax.random.key(0), *args))
    return Case(lambda p, *a: module.apply({"params": p}, *a), variables["params"], args)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(F, param_dtype=X, name="up")(nn.LayerNorm(param_dtype=X)(x)))
        return x + nn.Dense(D, param_dtype=X, name="down")(h)


@row("linen Dense", linear=("up/kernel", "down/kernel"), everyday=True)
def dense():
    return _case(Mlp(), activations(B, T, D))


@row("linen DenseGeneral", linear=("up/kernel", "down/kernel", "batched/kernel"))
def dense_general():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.DenseGeneral((N, H), param_dtype=X, name="up")(x)
            y = nn.DenseGeneral(D, axis=(-2, -1), param_dtype=X, name="down")(h)
            # One kernel per example of the batch.
            return nn.DenseGeneral(F, batch_dims=(0,), param_dtype=X, name="batched")(y)

    return _case(Model(), activations(B, T, D))


@row("linen Einsum", linear=("Einsum_0/kernel",))
def einsum():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Einsum((D, N, H), "btd,dnh->btnh", param_dtype=X)(x))

    return _case(Model(), activations(B, T, D))


@row(
    "linen MultiHeadDotProductAttention",
    linear=tuple(
        f"MultiHeadDotProductAttention_0/{n}/kernel" for n in ("query", "key", "value", "out")
    ),
    everyday=True,
)
def attention():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(x[..., 0])
            return nn.MultiHeadDotProductAttention(
                N, qkv_features=N * H, out_features=D, param_dtype=X, dtype=X
            )(x, mask=mask)

    return _case(Model(), activations(B, T, D))


@row("linen Embed.attend", embedding=("embed/embedding",), linear=("up/kernel",), everyday=True)
def embed_attend():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(V, D, param_dtype=X, name="embed")
            x = nn.LayerNorm(param_dtype=X)(embed(ids))
            return embed.attend(x + jnp.tanh(nn.Dense(D, param_dtype=X, name="up")(x)))

    return _case(Model(), tokens(B, T))


@row("linen Conv, one axis", conv=("Conv_0/kernel", "Conv_1/kernel"))
def conv1d():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Conv(F, (3,), padding="CAUSAL", param_dtype=X)(x))
            return nn.Conv(D, (5,), strides=2, param_dtype=X)(x)

    return _case(Model(), activations(B, 8, D))


@row(
    "linen Conv, two axes, strided and in groups",
    conv=("Conv_0/kernel", "Conv_1/kernel"),
)
def conv2d():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Conv(10, (3, 2), strides=(2, 1), param_dtype=X)(x))
            return nn.Conv(14, (3, 3), feature_group_count=2, param_dtype=X)(x)

    return _case(Model(), activations(B, 8, 5, 7))


@row("linen ConvTranspose", conv=("ConvTranspose_0/kernel",))
def conv_transpose():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.ConvTranspose(F, (3,), strides=(2,), param_dtype=X)(x))

    return _case(Model(), activations(B, T, D))


class Layer(nn.Module):
    """A layer as nn.scan takes it: (carry, input) -> (carry, output)."""

    @nn.compact
    def __call__(self, x, _):
        return Mlp(name="mlp")(x), None


_STACK = ("layers/mlp/up/kernel", "layers/mlp/down/kernel")


def _scanned(layer, axis):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=L
            )
            return stack(name="layers")(x, None)[0]

    return _case(Model(), activations(B, T, D))


@row("linen nn.scan", linear=_STACK, everyday=True)
def scan():
    return _scanned(Layer, 0)


@row("linen nn.scan over axis 1", linear=_STACK, everyday=True)
def scan_axis_1():
    return _scanned(Layer, 1)


@row("linen nn.scan of nn.remat", linear=_STACK)
def scan_remat():
    return _scanned(nn.remat(Layer, prevent_cse=False), 0)


@row("linen nn.remat", linear=("mlp/up/kernel", "mlp/down/kernel"))
def remat():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Mlp)(name="mlp")(x)

    return _case(Model(), activations(B, T, D))


@row("linen nn.vmap of modules", linear=("each/up/kernel", "each/down/kernel"))
def vmap():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            each = nn.vmap(Mlp, variable_axes={"params": 0}, split_rngs={"params": True})
            return each(name="each")(x)

    return _case(Model(), activations(4, T, D))


@row(
    "linen LSTM under nn.RNN",
    linear=tuple(f"cell/{k}/kernel" for k in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")),
)
def lstm():
    """The kernels are constants of a scan over time."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.LSTMCell(F, param_dtype=X, name="cell"))(x)

    return _case(Model(), activations(B, T, D))


@row("linen mutable batch_stats", linear=("up/kernel", "down/kernel"), everyday=True)
def batch_stats():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(F, param_dtype=X, name="up")(x)
            h = nn.BatchNorm(use_running_average=False, param_dtype=X)(h)
            return nn.Dense(D, param_dtype=X, name="down")(nn.gelu(h))

    module, x = Model(), activations(B, T, D)
    variables = randomized(module.init(jax.random.key(0), x))

    def fn(p, stats, x):
        return module.apply({"params": p, "batch_stats": stats}, x, mutable=["batch_stats"])

    return Case(fn, variables["params"], (variables["batch_stats"], x))


@row("linen Dropout", linear=("up/kernel", "down/kernel"))
def dropout():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.gelu(nn.Dense(F, param_dtype=X, name="up")(x))
            h = nn.Dropout(0.3, deterministic=False)(h)
            return nn.Dense(D, param_dtype=X, name="down")(h)

    module, x = Model(), activations(B, T, D)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    p = randomized(module.init(keys, x)["params"])

    def fn(p, x, key):
        return module.apply({"params": p}, x, rngs={"dropout": key})

    return Case(fn, p, (x, jax.random.key(2)))


@row("linen SpectralNorm", linear=("up/kernel", "down/kernel"))
def spectral_norm():
    """The power iteration multiplies by the kernel first, and the other way round."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, update_stats):
            up = nn.SpectralNorm(nn.Dense(F, param_dtype=X, name="up"))
            h = nn.gelu(up(x, update_stats=update_stats))
            return nn.Dense(D, param_dtype=X, name="down")(h)

    module, x = Model(), activations(B, T, D)
    made = module.init(jax.random.key(0), x, update_stats=False)
    rest = {"batch_stats": randomized(made["batch_stats"])}

    def fn(p, rest, x):
        variables = {"params": p, **rest}
        return module.apply(variables, x, update_stats=True, mutable=["batch_stats"])

    return Case(fn, randomized(made["params"]), (rest, x))


@row("linen BatchNorm on averages", linear=("up/kernel", "down/kernel"))
def batch_norm():
    """The averages in one tree with the parameters, as a checkpoint keeps them."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(F, param_dtype=X, name="up")(x)
            h = nn.BatchNorm(use_running_average=True, param_dtype=X, name="norm")(h)
            return nn.Dense(D, param_dtype=X, name="down")(nn.gelu(h))

    module, x = Model(), activations(B, T, D)
    made = module.init(jax.random.key(0), x)
    averages = jax.tree.map(lambda a: a.astype(X) + 0.5, made["batch_stats"])["norm"]
    params = randomized(made["params"])
    params["norm"] |= {"mean_scale": averages["mean"], "var_scale": averages["var"]}

    def fn(p, x):
        norm = {n: w for n, w in p["norm"].items() if n in ("scale", "bias")}
        stats = {"norm": {"mean": p["norm"]["mean_scale"], "var": p["norm"]["var_scale"]}}
        return module.apply({"params": {**p, "norm": norm}, "batch_stats": stats}, x)

    return Case(fn, params, (x,))
