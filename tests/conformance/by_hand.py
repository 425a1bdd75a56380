"""Models of the table written by hand, for methods whose weights have no dense equivalent.

Nothing here goes through the library: loops are unrolled, layers are read off by index, and
every product of a weight is a call `product(path, h, w, b, layer)`, which is `h @ w + b` with
the method in it; `around(y)` is what the model makes of the output y of a sub-layer and of the
stream around it. A model is `model(p, product, *args)`, where `p` holds plain arrays by path;
one that looks rows up has `longer(path, table)`, the table with the method's rows behind it,
in the place of `product`. A row that is not here is one whose model was not written twice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .rows import transformer
from .rows.row import E, H, L, N, V, attend, norm

# ---- methods


def fields(adapter, path, layer, *names):
    """The adapter's arrays at a weight, those of one layer of a stack; `None` if it has none."""
    if not any(k.startswith(path + "/") for k in adapter):
        return None
    arrays = [adapter[f"{path}/{n}"] for n in names]
    return arrays if layer is None else [a[layer] for a in arrays]


def bottleneck(adapter, given):
    """An adapter after each product and its bias."""

    def product(path, h, w, b=0.0, layer=None, around=None):
        y = h @ w + b
        down, c, up, e = fields(adapter, path, layer, "down", "down_bias", "up", "up_bias")
        return y + jnp.maximum(y @ down + c, 0) @ up + e

    return product


def on_the_sum(adapter, given):
    """An adapter after a product that reads its sum with the residual stream."""

    def product(path, h, w, b=0.0, layer=None, around=None):
        y = h @ w + b
        found = fields(adapter, path, layer, "down", "down_bias", "up", "up_bias")
        if not found:
            return y
        down, c, up, e = found
        return y + jnp.maximum(around(y) @ down + c, 0) @ up + e

    return product


def parallel(adapter, given):
    """An adapter from the input of `up` to the output of `down`."""
    inputs = {}

    def product(path, h, w, b=0.0, layer=None, around=None):
        here = path.split("/")
        if fields(adapter, path, layer) is None:
            return h @ w + b
        if "up" in here:
            down, c = fields(adapter, path, layer, "down", "down_bias")
            inputs[path, layer] = jnp.tanh(h @ down + c)
            return h @ w + b
        up, e = fields(adapter, path, layer, "up", "up_bias")
        start = "/".join("up" if name == "down" else name for name in here)
        return h @ w + b + 1.5 * (inputs[start, layer] @ up + e)

    return product


def prefix(adapter, given):
    """Trained rows in the place of what a projection gives at virtual positions."""
    virtual_positions = np.asarray(given["virtual_positions"])

    def product(path, h, w, b=0.0, layer=None, around=None):
        y = h @ w + b
        found = fields(adapter, path, layer, "rows")
        for example, time in np.argwhere(virtual_positions >= 0) if found else ():
            y = y.at[example, time].set(found[0][virtual_positions[example, time]])
        return y

    return product


def encoded_prefix(adapter, given):
    """A prefix whose rows a network computes from a table."""
    (start,) = {name.removesuffix("/table") for name in adapter if name.endswith("/table")}
    hidden = adapter[f"{start}/table"] @ adapter[f"{start}/down"] + adapter[f"{start}/down_bias"]
    ups = [name for name in adapter if name.endswith("/up")]
    rows = {
        name.removesuffix("up") + "rows": jnp.tanh(hidden) @ adapter[name]
        + adapter[name + "_bias"][..., None, :]
        for name in ups
    }
    return prefix(rows, given)


def mam(adapter, given):
    """A prefix at keys and values, and around the feed-forward block an adapter."""
    rows = {name: v for name, v in adapter.items() if name.endswith("/rows")}
    rest = {name: v for name, v in adapter.items() if name not in rows}
    attend, beside = prefix(rows, given), parallel(rest, given)

    def product(path, *args, **kwargs):
        return (attend if f"{path}/rows" in rows else beside)(path, *args, **kwargs)

    return product


def unipelt(adapter, given):
    """LoRA at q and v, a prefix at k and v, an adapter behind `down`, each times its gate."""
    virtual_positions = np.asarray(given["virtual_positions"])
    real = jnp.asarray(virtual_positions < 0)[..., None]

    def gate(x, name, layer):
        v, c = (adapter[f"{name}/{part}"] for part in ("gate", "gate_bias"))
        v, c = (v, c) if layer is None else (v[layer], c[layer])
        opened = jnp.where(real, 1 / (1 + jnp.exp(-(x @ v[:, None] + c))), 0)
        return opened.sum(1, keepdims=True) / real.sum(1, keepdims=True)

    def product(path, h, w, b=0.0, layer=None, around=None):
        y = h @ w + b
        under = f"{path}/w" if path == "v" else path  # the prefix stands on top of LoRA
        if path in "qv":
            a, low = fields(adapter, under, layer, "a", "b")
            y = y + gate(h, f"{path}/lora", layer) * (h @ a @ low)
        if path in "kv":
            (rows,) = fields(adapter, path, layer, "rows")
            g = gate(h, "k/prefix", layer)
            for example, time in np.argwhere(virtual_positions >= 0):
                virtual = rows[virtual_positions[example, time]] * g[example, 0]
                y = y.at[example, time].set(virtual)
        if path == "down":
            down, c, up, e = fields(adapter, path, layer, "down", "down_bias", "up", "up_bias")
            z = around(y)
            y = y + gate(z, "down/bottleneck", layer) * (jnp.maximum(z @ down + c, 0) @ up + e)
        return y

    return product


def moelora(adapter, given):
    """Two experts of rank 2, weighted by the task."""
    (start,) = {name.removesuffix("/tasks") for name in adapter if name.endswith("/tasks")}
    weights = jnp.exp(adapter[f"{start}/tasks"][given["task"]] @ adapter[f"{start}/gate"])
    weights = weights / weights.sum()

    def product(path, h, w, b=0.0, layer=None, around=None):
        y = h @ w + b
        found = fields(adapter, path, layer, "a", "b")
        for i in range(2) if found else ():
            rows = slice(2 * i, 2 * i + 2)
            y = y + 1.5 * weights[i] * (h @ found[0][:, rows] @ found[1][rows])
        return y

    return product


def poly(adapter, given):
    """Four skills of rank 2, of which a task uses a weighted mean."""

    def product(path, h, w, b=0.0, layer=None, around=None):
        y = h @ w + b
        found = fields(adapter, path, layer, "a", "b", "logits")
        if not found:
            return y
        a, low, logits = found
        open_ = 1 / (1 + jnp.exp(-logits[given["task"]]))
        share = open_ / open_.sum()
        mean_a = sum(share[k] * a[:, 2 * k : 2 * k + 2] for k in range(4))
        mean_b = sum(share[k] * low[2 * k : 2 * k + 2] for k in range(4))
        return y + 1.5 * (h @ mean_a @ mean_b)

    return product


def xlora(adapter, given):
    """Two frozen experts, of ranks 2 and 1, weighted by a gate on hidden states."""

    def product(path, h, w, b=0.0, layer=None, around=None):
        gate, bias = fields(adapter, f"{path}/experts", layer, "gate", "bias")
        weights = jnp.exp(given["hidden_states"] @ gate + bias)
        weights = weights / weights.sum()
        a, low = (given[f"{path}/experts/{name}"] for name in "ab")
        first, second = h @ a[:, :2] @ low[:2], h @ a[:, 2:] @ low[2:]
        return h @ w + b + weights[0] * first + weights[1] * second

    return product


def prompt(adapter, given):
    """Trainable rows after those of the table."""
    return lambda path, table: jnp.concatenate([table, adapter[f"{path}/rows"]])


def p_tuning(adapter, given):
    """Rows after those of the table that an LSTM and a linear network compute."""
    (table,) = {name.removesuffix("/rows") for name in adapter if name.endswith("/rows")}
    network = {
        name.removeprefix(f"{table}/encoder/"): v
        for name, v in adapter.items()
        if "/encoder/" in name
    }
    sigmoid = lambda x: 1 / (1 + jnp.exp(-x))  # noqa: E731

    def lstm(xs, name):
        w, u, a, b = (
            network[f"{name}/{part}"] for part in ("input", "hidden", "input_bias", "hidden_bias")
        )
        h = c = jnp.zeros(u.shape[0])
        out = []
        for x in xs:
            i, f, g, o = jnp.split(x @ w + a + h @ u + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
            h = sigmoid(o) * jnp.tanh(c)
            out.append(h)
        return out

    rows = list(adapter[f"{table}/rows"])
    for layer in ("lstm0", "lstm1"):
        ahead = lstm(rows, f"{layer}/forward")
        back = lstm(rows[::-1], f"{layer}/backward")[::-1]
        rows = [jnp.concatenate(both) for both in zip(ahead, back, strict=True)]
    h = jnp.stack(rows) @ network["mlp0/kernel"] + network["mlp0/bias"]
    made = jnp.maximum(h, 0) @ network["mlp1/kernel"] + network["mlp1/bias"]
    return lambda path, table: jnp.concatenate([table, made])


# ---- feed-forward blocks


def two_products(p, product, x):
    h = product("up", x, p["up"], p["up_bias"])
    return product("down", jnp.tanh(h), p["down"], p["down_bias"])


def transposed(p, product, x):
    h = product("up", x, p["up"].T)
    return product("down", jnp.tanh(h), p["down"].T, p["bias"])


def weight_first(p, product, x):
    h = product("up", x, p["up"])
    return product("down", jnp.tanh(h), p["down"]).transpose(2, 0, 1)


def twice(p, product, x):
    h = jnp.tanh(product("w", x, p["w"]))
    return jnp.tanh(product("w", h, p["w"]) + x)


def experts(p, product, x):
    def expert(i):
        h = product("up", x[i], p["up"][i], p["bias"][i], i)
        return product("down", jnp.tanh(h), p["down"][i], layer=i)

    return jnp.stack([expert(i) for i in range(E)])


def ragged(p, product, x, sizes):
    expert_of = np.repeat(np.arange(E), np.asarray(sizes))

    def token(x, i):
        h = product("up", x, p["up"][i], layer=i)
        return product("down", jnp.tanh(h), p["down"][i], layer=i)

    return jnp.stack([token(x[t], i) for t, i in enumerate(expert_of)])


def on_mesh(p, product, x):
    h = product("up", x, p["up"], p["bias"])
    return product("down", jnp.tanh(h), p["down"])


def on_explicit_mesh(p, product, x):
    """A model with every weight replicated on every device."""
    whole = lambda w: jax.NamedSharding(jax.typeof(w).sharding.mesh, PartitionSpec())  # noqa: E731
    return on_mesh({k: jax.reshard(w, whole(w)) for k, w in p.items()}, product, x)


def block(x, p, product, layer=None):
    """The block of loops.py."""
    p = p if layer is None else {k: w[layer] for k, w in p.items()}
    h = product("up", norm(x, p["scale"]), p["up"], p["bias"], layer)
    return x + product("down", jnp.tanh(h), p["down"], layer=layer, around=lambda y: x + y)


def blocks(*order):
    """The block with the weights of these layers, one after the other."""

    def model(p, product, x, *_):
        return functools.reduce(lambda x, layer: block(x, p, product, layer), order, x)

    return model


def blocks_with_sums(p, product, x):
    sums = []
    for layer in range(L):
        sums.append(jnp.sum(x, -1))
        x = block(x, p, product, layer)
    return x, jnp.stack(sums)


def each_block(p, product, x):
    return jnp.stack([block(x, p, product, layer) for layer in range(L)])


def layer_norm(x, scale, bias):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6) * scale + bias


def mlp(x, p, product, prefix="", norm="LayerNorm_0", layer=None, axis=0):
    """The Mlp of linen.py and nnx.py."""

    def get(name):
        w = p[prefix + name]
        return w if layer is None else jnp.moveaxis(w, axis, 0)[layer]

    def linear(name, h):
        path = f"{prefix}{name}/kernel"
        around = lambda y: x + y  # noqa: E731
        return product(path, h, get(f"{name}/kernel"), get(f"{name}/bias"), layer, around)

    h = layer_norm(x, get(f"{norm}/scale"), get(f"{norm}/bias"))
    return x + linear("down", jax.nn.gelu(linear("up", h)))


def module(layers=(None,), **where):
    """The Mlp with the weights of these layers; an NNX model has its other state in between."""

    def model(p, product, *args):
        return functools.reduce(
            lambda x, layer: mlp(x, p, product, layer=layer, **where), layers, args[-1]
        )

    return model


LINEN = dict(prefix="layers/mlp/")
NNX = dict(norm="norm")

FEED_FORWARD = {
    "x @ w": two_products,
    "lax.scan over layers": blocks_with_sums,
    "lax.scan, reversed and unrolled": blocks(2, 1, 0),
    "lax.scan of remat with a policy": blocks(0, 1, 2),
    "remat of a lax.scan": blocks(0, 1, 2),
    "remat with a policy by names": blocks(None),
    "scan of scans, the stack reshaped into groups": blocks(0, 1, 2, 3),
    "w[i] in a fori_loop": blocks(0, 1, 2),
    "w[i] in a scan over indices": blocks(2, 1, 0),
    "w[i] in a Python loop": blocks(0, 1, 2),
    "a scan that returns its weights": blocks(0, 1, 2, 0, 1, 2),
    "lax.map over experts": each_block,
    "while_loop": blocks(None, None, None),
    "switch over layers": blocks(2, 1),
    "a barrier and a name on the weight": blocks(None),
    "linen Dense": module(),
    "linen nn.scan": module(range(L), **LINEN),
    "linen nn.scan over axis 1": module(range(L), axis=1, **LINEN),
    "linen nn.scan of nn.remat": module(range(L), **LINEN),
    "linen nn.remat": module(prefix="mlp/"),
    "nnx Linear": module(**NNX),
    "nnx.scan": module(range(L), prefix="layers/", **NNX),
    "nnx.scan of nnx.remat": module(range(L), prefix="layers/", **NNX),
    "a stacked weight that nnx.scan returns": module([0, 1, 2] * 2, prefix="layers/", **NNX),
    "nnx.remat": module(**NNX),
    "split and merge inside jax.checkpoint": module(**NNX),
    "a mesh with Automatic axes": on_mesh,
}

OTHER_PRODUCTS = {
    "x @ w.T": transposed,
    "einsum with the weight first": weight_first,
    "experts by a batch axis": experts,
    "experts by ragged_dot": ragged,
    "a weight used twice in one layer": twice,
}

EXPLICIT = {"a mesh with Explicit axes": on_explicit_mesh}

# Each device has some examples of the batch: for a method that is not told of positions.
BATCH_ON_MESH = {
    "shard_map over the batch, weights replicated": on_mesh,
    "shard_map, weights gathered by each device before use": on_mesh,
}


RESIDUAL = {name: model for name, model in FEED_FORWARD.items() if model is not two_products}
del RESIDUAL["a mesh with Automatic axes"]

# ---- attention


def attention(p, product, x, names, path, bias):
    def project(name, h):
        w, b = p[path.format(name)], p.get(bias.format(name), jnp.zeros(()))
        split = w.reshape(h.shape[-1], -1)
        return product(path.format(name), h, split, b.reshape(-1))

    q, k, v = (project(n, x).reshape(*x.shape[:-1], 3, -1) for n in names[:3])
    return project(names[3], attend(q, k, v).reshape(*x.shape[:-1], -1))


def heads(p, product, x):
    return attention(p, product, x, "qkvo", "{}", "b{}")


def flax_heads(prefix=""):
    names = ("query", "key", "value", "out")

    def model(p, product, *args):
        return attention(p, product, args[-1], names, prefix + "{}/kernel", prefix + "{}/bias")

    return model


ATTENTION = {
    "(d, heads, head_dim) kernels": heads,
    "linen MultiHeadDotProductAttention": flax_heads("MultiHeadDotProductAttention_0/"),
}


# ---- lookups


def rows_of(read):
    """tanh(norm(rows) @ out), where an id below zero counts from the end of the model's table."""

    def model(p, longer, ids):
        ids = jnp.where(ids < 0, ids + V, ids)
        x = read(longer("table", p["table"]), ids)
        return jnp.tanh(norm(x, p["scale"]) @ p["out"])

    return model


def padded(p, longer, ids):
    x = norm(longer("table", p["table"])[ids], p["scale"])
    return (x @ p["table"].T)[..., :V]


def tied(p, longer, ids):
    x = longer("table", p["table"])[ids] + p["positions"]
    x = x + jnp.tanh(norm(x, p["scale"]) @ p["w"])
    return x @ p["table"].T


def tied_columns(p, longer, ids):
    return norm(longer("table", p["table"].T)[ids], p["scale"]) @ p["table"]


def take_columns(p, longer, ids):
    x = longer("table", p["table"].T)[ids]
    return jnp.tanh(norm(x, p["scale"]) @ p["out"])


def linen_tied(p, longer, ids):
    x = longer("embed/embedding", p["embed/embedding"])[ids]
    x = layer_norm(x, p["LayerNorm_0/scale"], p["LayerNorm_0/bias"])
    x = x + jnp.tanh(x @ p["up/kernel"] + p["up/bias"])
    return x @ p["embed/embedding"].T


def nnx_tied(p, longer, *args):
    x = norm(longer("embed/embedding", p["embed/embedding"])[args[-1]], p["norm/scale"])
    x = x + jnp.tanh(x @ p["up/kernel"] + p["up/bias"])
    return x @ p["embed/embedding"].T


LOOKUPS = {
    "table[ids]": rows_of(lambda w, i: w[i]),
    "take, filled": rows_of(
        lambda w, i: jnp.where(((i >= 0) & (i < len(w)))[..., None], w[i], 0.5)
    ),
    "at get, in bounds": rows_of(lambda w, i: w[i]),
    "a lookup under vmap": rows_of(lambda w, i: w[i]),
    "a table cast before the lookup": rows_of(lambda w, i: w.astype(jnp.float32)[i]),
    "take along the last axis": take_columns,
    "a table padded past the vocabulary": padded,
    "tied head": tied,
    "tied head, table kept as (width, vocabulary)": tied_columns,
    "linen Embed.attend": linen_tied,
    "nnx Embed.attend": nnx_tied,
}


# ---- whole layers


def post_norm(*layers):
    """The layer of transformer.py, with the weights of these layers."""

    def one(x, p, product, layer):
        p = p if layer is None else {k: w[layer] for k, w in p.items()}

        def normed(at, y, x):
            return transformer.layer_norm(x + y, p[f"{at}_scale"], p[f"{at}_bias"])

        def linear(name, h, around=None):
            return product(name, h, p[name], p[f"{name}_bias"], layer, around)

        q, k, v = (linear(n, x).reshape(*x.shape[:-1], N, H) for n in "qkv")
        attended = linear("o", attend(q, k, v).reshape(*x.shape[:-1], -1))
        x = normed("attn", attended, x)
        h = linear("down", jnp.tanh(linear("up", x)), lambda y: normed("mlp", y, x))
        return normed("mlp", h, x)

    def model(p, product, x):
        return functools.reduce(lambda x, layer: one(x, p, product, layer), layers, x)

    return model


TRANSFORMER = {
    "post-norm layers, lax.scan": post_norm(0, 1, 2),
    "post-norm layer, jit in remat": post_norm(None),
}
