"""Plain functions: every way in which a product, a lookup or a convolution is written."""

import jax
import jax.numpy as jnp

from .row import (
    B,
    C,
    Case,
    D,
    E,
    F,
    H,
    N,
    T,
    V,
    activations,
    attend,
    norm,
    params,
    row,
    tokens,
)

# ---- products


@row("x @ w", linear=("up", "down"), everyday=True)
def product():
    def fn(p, x):
        return jnp.tanh(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]

    return Case(fn, params(up=(D, F), up_bias=(F,), down=(F, D), down_bias=(D,)), (x3(),))


@row("x @ w.T", linear=("up", "down"), everyday=True)
def transposed():
    def fn(p, x):
        return jnp.tanh(x @ p["up"].T) @ p["down"].T + p["bias"]

    return Case(fn, params(up=(F, D), down=(D, F), bias=(D,)), (x3(),))


@row("einsum with the weight first", linear=("up", "down"), everyday=True)
def weight_first():
    def fn(p, x):
        h = jnp.einsum("df,btd->ftb", p["up"], x)
        return jnp.einsum("fd,ftb->dbt", p["down"], jnp.tanh(h))

    return Case(fn, params(up=(D, F), down=(F, D)), (x3(),))


@row("tensordot with the weight first", linear=("up", "down"))
def tensordot_first():
    """Unlike einsum, tensordot keeps its operands in the order in which they are written."""

    def fn(p, x):
        h = jnp.tanh(jnp.tensordot(p["up"], x, ((0,), (2,))))  # (F, B, T)
        return jnp.tensordot(p["down"], h, ((1,), (0,))) + p["bias"][:, None, None]

    return Case(fn, params(up=(D, F), down=(D, F), bias=(D,)), (x3(),))


@row("w @ x, a single vector", linear=("up", "down"))
def vector():
    def fn(p, x):
        return jnp.tanh(p["up"] @ x + p["bias"]) @ p["down"]

    return Case(fn, params(up=(F, D), bias=(F,), down=(F, D)), (activations(D),))


@row("vmap over examples", linear=("up", "down"))
def vmap_examples():
    def one(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    def fn(p, x):
        return jax.vmap(jax.vmap(one, (None, 0)), (None, 1), out_axes=1)(p, x)

    return Case(fn, params(up=(D, F), down=(F, D)), (x3(),))


@row("a weight used twice in one layer", linear=("w",), everyday=True)
def twice():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"] + x)

    return Case(fn, params(w=(D, D)), (x3(),))


@row("a weight and its transpose in one layer", linear=("w",))
def both_ways():
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["bias"]) @ p["w"].T

    return Case(fn, params(w=(D, F), bias=(F,)), (x3(),))


@row("contraction written backwards", linear=("w", "u"))
def gradient_inside():
    """The output is the gradient of an energy: each weight meets its own transpose."""

    def energy(x, p):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["u"]))

    def fn(p, x):
        return jax.grad(energy)(x, p)

    return Case(fn, params(w=(D, F), u=(F, D)), (x3(),))


# ---- shapes


@row("(d, heads, head_dim) kernels", linear=("q", "k", "v", "o"), everyday=True)
def head_kernels():
    def fn(p, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[n]) + p["b" + n] for n in "qkv")
        return jnp.einsum("btnh,nhd->btd", attend(q, k, v), p["o"]) + p["bo"]

    heads = {n: (D, N, H) for n in "qkv"} | {"b" + n: (N, H) for n in "qkv"}
    return Case(fn, params(**heads, o=(N, H, D), bo=(D,)), (x3(),))


def _attend_flat(q, k, v):
    q, k, v = (y.reshape(B, -1, N, H) for y in (q, k, v))
    return attend(q, k, v).reshape(B, -1, N * H)


@row("fused qkv", linear=("qkv", "o"), everyday=True)
def fused_qkv():
    def fn(p, x):
        return _attend_flat(*jnp.split(x @ p["qkv"] + p["bias"], 3, -1)) @ p["o"]

    return Case(fn, params(qkv=(D, 3 * N * H), bias=(3 * N * H,), o=(N * H, D)), (x3(),))


@row("fused qkv, transposed", linear=("qkv", "o"))
def fused_qkv_transposed():
    def fn(p, x):
        y = jnp.einsum("btd,od->bto", x, p["qkv"]) + p["bias"]
        q, k, v = y[..., : N * H], y[..., N * H : 2 * N * H], y[..., 2 * N * H :]
        return _attend_flat(q, k, v) @ p["o"].T

    return Case(fn, params(qkv=(3 * N * H, D), bias=(3 * N * H,), o=(D, N * H)), (x3(),))


@row("fused qkv, interleaved by heads", linear=("qkv", "o"))
def fused_qkv_interleaved():
    def fn(p, x):
        y = (x @ p["qkv"] + p["bias"]).reshape(B, -1, N, 3 * H)
        return attend(*jnp.split(y, 3, -1)).reshape(B, -1, N * H) @ p["o"]

    return Case(fn, params(qkv=(D, N * 3 * H), bias=(N * 3 * H,), o=(N * H, D)), (x3(),))


@row("fused (d, 3, heads, head_dim) kernel", linear=("qkv", "o"))
def fused_qkv_kernel():
    def fn(p, x):
        q, k, v = jnp.einsum("btd,dcnh->cbtnh", x, p["qkv"])
        return jnp.einsum("btnh,nhd->btd", attend(q, k, v), p["o"])

    return Case(fn, params(qkv=(D, 3, N, H), o=(N, H, D)), (x3(),))


@row("reshape before use", linear=("up", "down"), everyday=True)
def reshaped():
    def fn(p, x):
        h = jnp.einsum("btd,dnh->btnh", x, p["up"].reshape(D, N, H))  # cuts an axis
        return h.reshape(B, T, -1) @ p["down"].reshape(N * H, D)  # merges two

    return Case(fn, params(up=(D, N * H), down=(N, H, D)), (x3(),))


@row("reshape and transpose before use", linear=("w",))
def reshaped_and_transposed():
    def fn(p, x):
        w = p["w"].reshape(D, N, H).transpose(1, 2, 0).reshape(N, H * D)
        return jnp.einsum("btd,nhd->bnth", x, w.reshape(N, H, D)) * p["scale"]

    return Case(fn, params(w=(D, N * H), scale=(H,)), (x3(),))


@row("weight sliced into parts before use", linear=("up", "down"))
def sliced():
    def fn(p, x):
        gate, value = x @ p["up"][:, :F], x @ p["up"][:, F:]
        h = jax.nn.gelu(gate) * value
        return h[..., :8] @ p["down"][:8] + h[..., 8:] @ p["down"][8:]

    return Case(fn, params(up=(D, 2 * F), down=(F, D)), (x3(),))


@row("weight split into parts before use", linear=("qkv", "o"))
def split():
    def fn(p, x):
        q, k, v = (x @ w for w in jax.lax.split(p["qkv"], (N * H,) * 3, axis=1))
        return _attend_flat(q, k, v) @ p["o"]

    return Case(fn, params(qkv=(D, 3 * N * H), o=(N * H, D)), (x3(),))


@row("two weights stacked in one array", linear=("w", "down"))
def stacked_pair():
    """Gate and value of a feed-forward block are w[0] and w[1]."""

    def fn(p, x):
        return (jax.nn.silu(x @ p["w"][0]) * (x @ p["w"][1])) @ p["down"]

    return Case(fn, params(w=(2, D, F), down=(F, D)), (x3(),))


@row("astype float32", linear=("up", "down"), tolerance=1e-5, everyday=True)
def cast():
    def fn(p, x):
        x = x.astype(jnp.float32)
        return jnp.tanh(x @ p["up"].astype(jnp.float32)) @ p["down"].astype(jnp.float32)

    return Case(fn, params(up=(D, F), down=(F, D)), (x3(),))


@row("astype bfloat16", linear=("up", "down"), tolerance=5e-2)
def cast_bf16():
    def fn(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        return jnp.tanh(x.astype(jnp.bfloat16) @ p["up"]) @ p["down"]

    return Case(fn, params(up=(D, F), down=(F, D)), (x3(),))


@row("a weight times a number", linear=("up", "down"))
def scaled():
    def fn(p, x):
        return jnp.tanh(x @ (p["up"] * 0.5)) @ -(p["down"] / 1.5)

    return Case(fn, params(up=(D, F), down=(F, D)), (x3(),))


@row("a multi-hot input", linear=("up", "down"))
def multi_hot():
    """Booleans meet the weight in the product itself, which promotes them."""

    def fn(p, x):
        return jnp.tanh((x > 0.5) @ p["up"] + p["bias"]) @ p["down"]

    return Case(fn, params(up=(D, F), bias=(F,), down=(F, D)), (x3(),))


# A Fourier transform of bfloat16 there is not.
@row("complex activations", linear=("up", "down"), bf16=False)
def spectrum():
    """Real weights on a spectrum, along axes of which a transform keeps the length."""

    def fn(p, x):
        h = jnp.fft.fft(x) @ p["up"]
        return jnp.fft.ifft(jnp.tanh(h.real) + 1j * h.imag).real @ p["down"]

    return Case(fn, params(up=(D, F), down=(F, D)), (x3(),))


# ---- experts


@row("experts by a batch axis", linear=("up", "down"), everyday=True)
def experts():
    def fn(p, x):
        h = jnp.tanh(jnp.einsum("ecd,edf->ecf", x, p["up"]) + p["bias"])
        return jnp.einsum("ecf,efd->ecd", h, p["down"])

    return Case(fn, params(up=(E, D, F), bias=(E, 1, F), down=(E, F, D)), (activations(E, C, D),))


@row("experts by vmap", linear=("up", "down"))
def experts_by_vmap():
    def fn(p, x):
        return jax.vmap(lambda up, down, x: jnp.tanh(x @ up) @ down)(p["up"], p["down"], x)

    return Case(fn, params(up=(E, D, F), down=(E, F, D)), (activations(E, C, D),))


@row("experts that share their input", linear=("up", "down"))
def ensemble():
    def fn(p, x):
        h = jax.vmap(lambda up, x: jnp.tanh(x @ up), (0, None))(p["up"], x)
        return jnp.einsum("ebtf,efd->btd", h, p["down"])  # two contracted axes

    return Case(fn, params(up=(E, D, F), down=(E, F, D)), (x3(),))


# JAX has no vmap of ragged_dot here, of the dense program neither.
@row("experts by ragged_dot", linear=("up", "down"), vmap=False, everyday=True)
def ragged():
    def fn(p, x, sizes):
        h = jnp.tanh(jax.lax.ragged_dot(x, p["up"], sizes))
        return jax.lax.ragged_dot(h, p["down"], sizes)

    sizes = jnp.array([4, 0, 5, 2], jnp.int32)  # an expert without a token, too
    return Case(fn, params(up=(E, D, F), down=(E, F, D)), (activations(11, D), sizes))


# Outputs of experts: E * G is unlike D * E, so that scales of all experts are not as many as the
# router's numbers.
G = 19


def _shares(p, x):
    """What each expert counts for each token: a softmax over experts."""
    return jax.nn.softmax(x @ p["router"])


@row("all experts on all tokens", linear=("router", "up", "gate", "down"), everyday=True)
def experts_on_all_tokens():
    def fn(p, x):
        h = jnp.einsum("btd,edf->btef", x, p["up"]) + p["bias"]
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["gate"])) * h
        return jnp.einsum(
            "bte,bted->btd", _shares(p, x), jnp.einsum("btef,efd->bted", h, p["down"])
        )

    shapes = dict(router=(D, E), up=(E, D, F), gate=(E, D, F), bias=(E, F), down=(E, F, G))
    return Case(fn, params(**shapes), (x3(),))


@row("all experts on all tokens, weighted before they are summed", linear=("router", "up", "down"))
def experts_weighted_inside():
    def fn(p, x):
        h = jnp.tanh(jnp.einsum("btd,edf->btef", x, p["up"])) * _shares(p, x)[..., None]
        return jnp.einsum("btef,efd->btd", h, p["down"])

    return Case(fn, params(router=(D, E), up=(E, D, F), down=(E, F, G)), (x3(),))


@row("experts gathered for each token", linear=("router", "up", "down"))
def experts_gathered():
    def fn(p, x):
        shares, chosen = jax.lax.top_k(_shares(p, x), 2)
        h = jnp.tanh(jnp.einsum("cd,ckdf->ckf", x, p["up"][chosen]) + p["bias"][chosen])
        return jnp.einsum("ck,ckf,ckfd->cd", shares, h, p["down"][chosen])

    shapes = dict(router=(D, E), up=(E, D, F), bias=(E, F), down=(E, F, G))
    return Case(fn, params(**shapes), (activations(C, D),))


@row("experts gathered under vmap", linear=("router", "up", "down"))
def experts_gathered_under_vmap():
    def fn(p, x):
        def token(x):
            shares = _shares(p, x)
            e = jnp.argmax(shares)
            h = jnp.tanh(x @ p["up"][e] + p["bias"][e])
            return jnp.max(shares) * (h @ p["down"][e])

        return jax.vmap(token)(x)

    shapes = dict(router=(D, E), up=(E, D, F), bias=(E, F), down=(E, F, G))
    return Case(fn, params(**shapes), (activations(C, D),))


# The slices of the weight are formed by the program's own one-hot product.
@row(
    "experts chosen by a one-hot product",
    linear=("up", "down"),
    materializes=("up", "down"),
)
def experts_one_hot():
    def fn(p, x, chosen):
        one_hot = jax.nn.one_hot(chosen, E, dtype=x.dtype)
        h = jnp.einsum("cd,cdf->cf", x, jnp.einsum("ce,edf->cdf", one_hot, p["up"]))
        return jnp.einsum("cf,cfd->cd", jnp.tanh(h), jnp.einsum("ce,efd->cfd", one_hot, p["down"]))

    return Case(fn, params(up=(E, D, F), down=(E, F, D)), (activations(C, D), tokens(C, high=E)))


# ---- biases and statistics


@row("a bias subtracted, a bias times two", linear=("up", "down"))
def biases_with_a_changed_sign_or_scale():
    def fn(p, x):
        return jnp.tanh(x @ p["up"] - p["up_bias"]) @ p["down"] + 2 * p["down_bias"]

    return Case(fn, params(up=(D, F), up_bias=(F,), down=(F, D), down_bias=(D,)), (x3(),))


@row("a normalization by counted statistics", linear=("up", "down"), everyday=True)
def counted_statistics():
    def fn(p, x):
        h = x @ p["up"] + p["up_bias"]
        h = (h - p["mean_bias"]) * (jax.lax.rsqrt(p["variance_scale"] ** 2 + 1.0) * p["scale"])
        return jax.nn.gelu(h + p["bias"]) @ p["down"]

    vectors = dict.fromkeys(("up_bias", "mean_bias", "variance_scale", "scale", "bias"), (F,))
    return Case(fn, params(up=(D, F), **vectors, down=(F, D)), (x3(),))


# ---- embeddings


def _lookup(read, ids=None, rows=V):
    def fn(p, ids):
        return jnp.tanh(norm(read(p["table"], ids), p["scale"]) @ p["out"])

    return Case(
        fn,
        params(table=(rows, D), scale=(D,), out=(D, F)),
        (tokens(B, T) if ids is None else ids,),
    )


def _out_of_range():
    """Ids of which some lie outside the table, on either side."""
    return tokens(B, T).at[0, 1].set(V + 3).at[1, 2].set(-V - 4).at[1, 0].set(-2)


@row("table[ids]", embedding=("table",), linear=("out",), everyday=True)
def getitem():
    return _lookup(lambda w, i: w[i], tokens(B, T).at[0, 1].set(-1).at[1, 2].set(-V))


@row("take, filled", embedding=("table",), linear=("out",))
def take_fill():
    return _lookup(lambda w, i: jnp.take(w, i, axis=0, fill_value=0.5), _out_of_range())


@row("take, clipped", embedding=("table",), linear=("out",))
def take_clip():
    return _lookup(lambda w, i: jnp.take(w, i, axis=0, mode="clip"), _out_of_range())


@row("take, wrapped", embedding=("table",), linear=("out",))
def take_wrap():
    return _lookup(lambda w, i: jnp.take(w, i, axis=0, mode="wrap"), _out_of_range())


@row("at get, in bounds", embedding=("table",), linear=("out",))
def get_in_bounds():
    return _lookup(lambda w, i: w.at[i].get(mode="promise_in_bounds"))


@row("at get, filled with zero", embedding=("table",), linear=("out",))
def get_fill():
    return _lookup(lambda w, i: w.at[i].get(mode="fill", fill_value=0), _out_of_range())


@row("at get, dropped", embedding=("table",), linear=("out",))
def get_drop():
    return _lookup(lambda w, i: w.at[i].get(mode="drop", fill_value=0.25), _out_of_range())


@row("at get, clipped", embedding=("table",), linear=("out",))
def get_clip():
    return _lookup(lambda w, i: w.at[i].get(mode="clip"), _out_of_range())


@row("take along the last axis", embedding=("table",), linear=("out",))
def take_columns():
    """A table kept as (width, vocabulary), which `lift` transposes as a whole before it reads."""

    def fn(p, ids):
        x = jnp.moveaxis(jnp.take(p["table"], ids, axis=1), 0, -1)
        return jnp.tanh(norm(x, p["scale"]) @ p["out"])

    return Case(fn, params(table=(D, V), scale=(D,), out=(D, F)), (tokens(B, T),))


@row("a lookup under vmap", embedding=("table",), linear=("out",))
def lookup_vmapped():
    return _lookup(lambda w, i: jax.vmap(lambda i: w[i])(i))


@row("a lookup by dynamic slices", embedding=("table",), linear=("out",))
def lookup_by_slice():
    """A gather that keeps its row dimension: `sites` does not take it for a lookup."""

    def read(w, ids):
        one = lambda i: jax.lax.dynamic_index_in_dim(w, i, 0, keepdims=False)  # noqa: E731
        return jax.vmap(jax.vmap(one))(ids)

    return _lookup(read)


@row("a table cast before the lookup", embedding=("table",), linear=("out",), tolerance=1e-5)
def lookup_cast():
    return _lookup(lambda w, i: w.astype(jnp.float32)[i])


@row("one-hot product", linear=("table", "out"), everyday=True)
def one_hot():
    """What is written as a product is one; `sites` notes that its input is one-hot."""

    return _lookup(lambda w, i: jax.nn.one_hot(i, V, dtype=w.dtype) @ w)


@row("ids clamped by the model", embedding=("table",), linear=("out",))
def clamped():
    return _lookup(lambda w, i: w[jnp.clip(i, 0, V - 1)], _out_of_range())


@row("a table padded past the vocabulary", embedding=("table",), everyday=True)
def padded():
    def fn(p, ids):
        x = norm(p["table"][ids], p["scale"])
        return (x @ p["table"].T)[..., :V]

    return Case(fn, params(table=(V + 2, D), scale=(D,)), (tokens(B, T),))


@row("tied head", embedding=("table",), linear=("w",), everyday=True)
def tied():
    def fn(p, ids):
        x = p["table"][ids] + p["positions"]
        x = x + jnp.tanh(norm(x, p["scale"]) @ p["w"])
        return jnp.einsum("btd,vd->btv", x, p["table"])

    shapes = dict(table=(V, D), positions=(T, D), scale=(D,), w=(D, D))
    return Case(fn, params(**shapes), (tokens(B, T),))


@row("tied head, table kept as (width, vocabulary)", embedding=("table",))
def tied_columns():
    def fn(p, ids):
        return norm(p["table"].T[ids], p["scale"]) @ p["table"]

    return Case(fn, params(table=(D, V), scale=(D,)), (tokens(B, T),))


@row(
    "one tree under two functions",
    embedding=("table",),
    linear=("q", "k", "v", "o"),
    everyday=True,
)
def prefill_and_step():
    """Prefill fills a cache of keys and values, a step reads one token more."""

    def layer(p, x, cached=None):
        h = norm(x, p["scale"])
        q, k, v = ((h @ p[n]).reshape(*h.shape[:-1], N, H) for n in "qkv")
        if cached is not None:
            k, v = (jnp.concatenate([old, new], 1) for old, new in zip(cached, (k, v), strict=True))
            scores = jnp.einsum("btnh,bsnh->bnts", q, k)
            y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        else:
            y = attend(q, k, v)
        return x + y.reshape(*x.shape[:-1], N * H) @ p["o"], (k, v)

    def prefill(p, ids):
        x, cache = layer(p, p["table"][ids])
        return x[:, -1] @ p["table"].T, cache

    def step(p, ids, cache):
        x, cache = layer(p, p["table"][ids], cache)
        return x[:, -1] @ p["table"].T, cache

    heads = {n: (D, N * H) for n in "qkv"}
    cache = (activations(B, T, N, H, seed=1), activations(B, T, N, H, seed=2))
    return Case(
        prefill,
        params(table=(V, D), scale=(D,), o=(N * H, D), **heads),
        (tokens(B, T),),
        also=((step, (tokens(B, 1), cache)),),
    )


# ---- convolutions


@row("convolution, NHWC", conv=("w",), everyday=True)
def conv2d():
    def fn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=dims)
        return jnp.tanh(y + p["bias"])

    return Case(fn, params(w=(3, 3, 5, 7), bias=(7,)), (activations(B, 4, 6, 5),))


@row("convolution, NCHW, strided and dilated", conv=("w",))
def conv_nchw():
    def fn(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (2, 1), ((1, 0), (2, 2)), lhs_dilation=(1, 2), rhs_dilation=(2, 1)
        )
        return jnp.tanh(y * p["scale"][:, None, None])

    return Case(fn, params(w=(7, 5, 3, 2), scale=(7,)), (activations(B, 5, 9, 4),))


@row("convolution in groups", conv=("w",))
def conv_groups():
    """No rule covers groups yet: the kernel is formed, and that is announced."""

    def fn(p, x):
        dims = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=dims, feature_group_count=2
        )

    return Case(fn, params(w=(3, 5, 14)), (activations(B, 6, 10),))


@row("convolution in one group per channel", conv=("w",))
def conv_depthwise():
    def fn(p, x):
        dims = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1,), ((2, 0),), dimension_numbers=dims, feature_group_count=D
        )
        return jnp.tanh(y)

    return Case(fn, params(w=(3, 1, D)), (x3(),))


# ---- the exceptions: here a matrix has to be formed, beside an ordinary use


@row("weights concatenated before use", linear=("q", "k", "o"))
def concatenated():
    """Beside an ordinary use of each."""

    def fn(p, x):
        both = jnp.concatenate([x @ p["q"], x @ p["k"]], -1)
        return jnp.tanh(both + x @ jnp.concatenate([p["q"], p["k"]], 1)) @ p["o"]

    return Case(fn, params(q=(D, F), k=(D, 11), o=(F + 11, 11)), (x3(),))


@row("a weight under a non-linear operation", linear=("w", "u"), materializes=("w",))
def nonlinear():
    def fn(p, x):
        return jnp.tanh(x @ jnp.tanh(p["w"]) + x @ p["w"]) @ p["u"]

    return Case(fn, params(w=(D, F), u=(F, D)), (x3(),))


# In bfloat16 nothing is rounded, and nothing materialized.
@row("a rounded weight", linear=("w", "u"), materializes=("w",), everyday=True, bf16=False)
def rounded():
    """What a product in a wider dtype sees of a narrow one: simulated low precision."""

    def fn(p, x):
        return jnp.tanh(x @ p["w"].astype(jnp.bfloat16).astype(x.dtype)) @ p["u"]

    return Case(fn, params(w=(D, F), u=(F, D)), (x3(),))


@row("a weight times a weight", linear=("w", "u", "o"), materializes=("w", "u"))
def weight_times_weight():
    def fn(p, x):
        return jnp.tanh(x @ (p["w"] @ p["u"]) + jnp.sin(x @ p["w"]) @ p["u"]) @ p["o"]

    return Case(fn, params(w=(D, 19), u=(19, F), o=(F, D)), (x3(),))


def x3():
    return activations(B, T, D)
