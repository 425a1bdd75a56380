"""Bottleneck adapters: what they read, however the model is written, and where they start."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp
from jaxpeft.bridge import from_linen, from_nnx

from .toy import normal, perturbed

F8 = jnp.float64
KEY = jax.random.key(0)
D, F, L, M, T = 8, 12, 3, 5, 4
EPS = 0.1
SUM = "output_plus_residual"


def adapted(fn, params, x, target, rows=None, **options):
    """Outputs under an adapter away from its init, the adapter, and the tree for more calls."""
    sites = jp.sites(fn, params, x if rows is None else rows)
    method = jp.bottleneck_adapter(M, sites.match(target), dtype=F8, **options)
    frozen, adapter = jp.split(method(KEY, params))
    adapter = perturbed(adapter)
    return jax.jit(jp.lift(fn))(jp.combine(frozen, adapter), x), adapter


def start(method, params):
    return jp.combine(*jp.split(method(KEY, params)))


def network(z, adapter, path, layer=..., act=jax.nn.relu):
    down, c, up, e = (adapter[f"{path}/{n}"] for n in ("down", "down_bias", "up", "up_bias"))
    return act(z @ down[layer] + c[layer]) @ up[layer] + e[layer]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# ---- What is read


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS) * p["scale"] + p["bias"]


def ffn(x, p):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"] + p["down"]["bias"]


def postnorm(p, x):
    """Norms the sum of each sub-layer and its input, as BERT does."""
    return jax.lax.scan(lambda x, p: (norm(x + ffn(x, p), p["norm"]), None), x, p)[0]


def rematerialized(p, x):
    step = jax.checkpoint(lambda x, p: (norm(x + ffn(x, p), p["norm"]), None))
    return jax.lax.scan(step, x, p)[0]


def layers():
    return {
        "up": {"kernel": normal(0, L, D, F)},
        "down": {"kernel": normal(1, L, F, D), "bias": normal(2, L, D)},
        "norm": {"scale": 1 + normal(3, L, D), "bias": normal(4, L, D)},
    }


INPUT = normal(9, 2, T, D) * 3
ADAPTER_INPUTS = {
    "output": lambda h, x, p: h,
    "residual": lambda h, x, p: x,
    SUM: lambda h, x, p: x + h,
    "output_plus_residual, normed": lambda h, x, p: norm(x + h, p),
}


def option(adapter_input, sites):
    norms = sites.match("norm/*") if "normed" in adapter_input else None
    return {"adapter_input": adapter_input.split(",")[0], "norms": norms, "eps": EPS}


@pytest.mark.parametrize("fn", [postnorm, rematerialized])
@pytest.mark.parametrize("adapter_input", ADAPTER_INPUTS)
def test_the_adapter_input_is_the_chosen_one(adapter_input, fn):
    p, sites = layers(), jp.sites(fn, layers(), INPUT)
    out, adapter = adapted(
        fn, p, INPUT, "down/kernel", scale=2.5, activation="gelu", **option(adapter_input, sites)
    )
    x = INPUT
    for i in range(L):
        here = jax.tree.map(lambda a, i=i: a[i], p)
        h = ffn(x, here)
        z = ADAPTER_INPUTS[adapter_input](h, x, here["norm"])
        h = h + 2.5 * network(z, adapter, "down/kernel", i, jax.nn.gelu)
        x = norm(x + h, here["norm"])
    close(out, x)
    assert jnp.abs(out - postnorm(p, INPUT)).max() > 0.1


def test_the_adapter_normalizes_its_input_with_the_trained_norm():
    p, sites = layers(), jp.sites(postnorm, layers(), INPUT)
    behind = jp.bottleneck_adapter(
        M, sites.match("down/kernel"), dtype=F8, **option("output_plus_residual, normed", sites)
    )
    frozen, adapter = jp.split(jp.chain(behind, jp.norm_tuning(sites))(KEY, p))
    adapter = perturbed(adapter)
    x = INPUT
    for i in range(L):
        here = jax.tree.map(lambda a, i=i: a[i], p)
        trained = {name: adapter[f"norm/{name}"][i] for name in ("scale", "bias")}
        h = ffn(x, here)
        h = h + network(norm(x + h, trained), adapter, "down/kernel", i)
        x = norm(x + h, trained)
    close(jp.lift(postnorm)(jp.combine(frozen, adapter), INPUT), x)


def unrolled(p, x):
    for name in ("first", "second"):
        x = norm(x + ffn(x, p[name]), p[name]["norm"])
    return x


def two_layers():
    take = lambda i: jax.tree.map(lambda a: a[i], layers())  # noqa: E731
    return {"first": take(0), "second": take(1)}


def test_norms_belong_to_the_kernels_in_their_order():
    p, sites = two_layers(), jp.sites(unrolled, two_layers(), INPUT)
    norms = sites.match("*/norm/*")
    out, adapter = adapted(
        unrolled, p, INPUT, "*/down/kernel", adapter_input=SUM, norms=norms, eps=EPS
    )
    x = INPUT
    for name in ("first", "second"):
        h, here = ffn(x, p[name]), p[name]["norm"]
        h = h + network(norm(x + h, here), adapter, f"{name}/down/kernel")
        x = norm(x + h, here)
    close(out, x)


# ---- However the model is written


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(F, use_bias=False, param_dtype=F8, name="u")(x))
        return x + nn.Dense(D, param_dtype=F8, name="w")(h)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.u = nnx.Linear(D, F, use_bias=False, param_dtype=F8, rngs=rngs)
        self.w = nnx.Linear(F, D, param_dtype=F8, rngs=rngs)

    def __call__(self, x):
        return x + self.w(jnp.tanh(self.u(x)))


def hidden(p, x):
    return jnp.tanh(x @ p["u"])


def plain(p, x):
    return x + (hidden(p, x) @ p["w"] + p["b"])


def in_a_step_of_a_loop(p, x):
    return jax.lax.scan(lambda x, _: (plain(p, x), None), x, None, length=1)[0]


def through_reshapes_and_names(p, x):
    y = (hidden(p, x) @ p["w"]).astype(jnp.float32).astype(F8) + p["b"]
    y = checkpoint_name(jax.lax.optimization_barrier(y.reshape(-1)), "y")
    return x + y.reshape(x.shape)


def turned(x):
    """The last axis (2, D / 2), as (D / 2, 2)."""
    return x.reshape(*x.shape[:-1], 2, D // 2).swapaxes(-1, -2).reshape(x.shape)


def outputs_in_another_order(p, x):
    y = turned(x) + (hidden(p, x) @ turned(p["w"]) + turned(p["b"]))
    return y.reshape(*x.shape[:-1], D // 2, 2).swapaxes(-1, -2).reshape(x.shape)


WAYS = {
    "plain": plain,
    "the stream first": lambda p, x: x + hidden(p, x) @ p["w"] + p["b"],
    "the bias first": lambda p, x: p["b"] + hidden(p, x) @ p["w"] + x,
    "a repeated bias": lambda p, x: x + (hidden(p, x) @ p["w"] + jnp.broadcast_to(p["b"], x.shape)),
    "another sub-layer later": lambda p, x: jax.lax.sub(plain(p, x) + jnp.tanh(x), jnp.tanh(x)),
    "jit": lambda p, x: jax.jit(plain)(p, x),
    "jit around the product": lambda p, x: x + (jax.jit(jnp.matmul)(hidden(p, x), p["w"]) + p["b"]),
    "jit in jit": lambda p, x: x
    + jax.jit(lambda h: jax.jit(jnp.matmul)(h, p["w"]) + p["b"])(hidden(p, x)),
    "remat": lambda p, x: jax.checkpoint(plain)(p, x),
    "cond": lambda p, x: jax.lax.cond(x.sum() < jnp.inf, plain, lambda p, x: x, p, x),
    "scan": in_a_step_of_a_loop,
    "vmap": lambda p, x: jax.vmap(plain, (None, 0))(p, x) if x.ndim > 1 else plain(p, x),
    "reshapes and names": through_reshapes_and_names,
    "outputs in another order": outputs_in_another_order,
}


@pytest.mark.parametrize("adapter_input", [SUM, "residual"])
@pytest.mark.parametrize("way", WAYS)
def test_the_residual_stream_is_found_however_the_model_adds_it(way, adapter_input):
    """Also beside a single row, where a bias is as long as the stream."""
    p = {"u": normal(0, D, F), "w": normal(1, F, D), "b": normal(2, D)}
    for shape in (T, D), (1, D), (1, 1, D), (D,):
        x = normal(3, *shape)
        # Sites are those of several rows, as where a model is trained on these and then decodes.
        rows = normal(4, *(3 for _ in shape[:-1]), D)
        out, adapter = adapted(WAYS[way], p, x, "w", rows, adapter_input=adapter_input)
        h = hidden(p, x) @ p["w"] + p["b"]
        z = x + h if adapter_input == SUM else x
        # One of the ways leads through float32.
        rtol = 1e-5 if way == "reshapes and names" else 1e-10
        np.testing.assert_allclose(out, x + h + network(z, adapter, "w"), rtol=rtol)


def flax_models(x):
    module = Linen()
    linen, linen_params, _ = from_linen(module, module.init(KEY, x))
    fn, params, rest, _ = from_nnx(NNX(nnx.Rngs(0)))
    return {
        "linen": (lambda p, x: linen(p, {}, x), linen_params),
        "nnx": (lambda p, x: fn(p, rest, x)[0], params),
    }


@pytest.mark.parametrize("adapter_input", [SUM, "residual"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_the_residual_stream_is_found_in_flax_modules(kind, adapter_input):
    for x in normal(3, T, D), normal(3, 1, D):
        fn, params = flax_models(x)[kind]
        out, adapter = adapted(
            fn, params, x, "w/kernel", normal(4, T, D), adapter_input=adapter_input
        )
        p = {"u": params["u"]["kernel"], "w": params["w"]["kernel"], "b": params["w"]["bias"]}
        h = fn(params, x) - x
        close(h, hidden(p, x) @ p["w"] + p["b"])
        close(out, x + h + network(x + h if adapter_input == SUM else x, adapter, "w/kernel"))


@pytest.mark.parametrize("adapter_input", [SUM, "residual"])
def test_an_adapter_on_the_residual_works_over_int8_and_lora_under_vmap_and_grad(adapter_input):
    p = {"u": normal(0, D, F), "w": normal(1, F, D), "b": normal(2, D)}
    x, w = normal(3, T, D), jp.sites(plain, p, normal(3, T, D)).match("w")
    below = jp.chain(jp.quantize("int8", w), jp.lora(2, w, dtype=F8))
    method = jp.chain(below, jp.bottleneck_adapter(M, w, adapter_input=adapter_input, dtype=F8))
    frozen, adapter = jp.split(method(KEY, p))
    adapter = perturbed(adapter)
    factors = {f"w/{name}": adapter[f"w/w/{name}"] for name in "ab"}
    dense = jp.merge(jp.combine(jp.split(below(KEY, p))[0], factors))

    def lifted(adapter, x):
        return jp.lift(plain)(jp.combine(frozen, adapter), x)

    def by_hand(adapter, x):
        h = plain(dense, x) - x
        return x + h + network(x + h if adapter_input == SUM else x, adapter, "w")

    close(lifted(adapter, x), by_hand(adapter, x))
    close(jax.vmap(lifted, (None, 0))(adapter, x), by_hand(adapter, x))
    got, want = (jax.grad(lambda a, f=f: (f(a, x) ** 2).sum())(adapter) for f in (lifted, by_hand))
    for name in ("down", "down_bias", "up", "up_bias"):
        close(got[f"w/{name}"], want[f"w/{name}"])


@pytest.mark.parametrize("rows", [T, 1])
@pytest.mark.parametrize("adapter_input", ["output", SUM, "residual"])
def test_a_model_in_bfloat16_keeps_its_dtype(adapter_input, rows):
    p = {"u": normal(0, D, F), "w": normal(1, F, D), "b": normal(2, D)}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
    x = normal(3, rows, D).astype(jnp.bfloat16)
    sites = jp.sites(plain, half, normal(4, T, D).astype(jnp.bfloat16))
    method = jp.bottleneck_adapter(M, sites.match("w"), adapter_input=adapter_input)
    frozen, adapter = jp.split(method(KEY, half))
    assert {a.dtype for a in adapter.values()} == {jnp.dtype(jnp.float32)}
    adapter = perturbed(adapter)
    out = jp.lift(plain)(jp.combine(frozen, adapter), x)
    assert out.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda a: a.astype(F8), half)
    x = x.astype(F8)
    h = hidden(wide, x) @ wide["w"] + wide["b"]
    z = {"output": h, SUM: x + h, "residual": x}[adapter_input]
    want = x + h + network(z, adapter, "w")
    # A few roundings to eight bits, of h, z and the sum.
    assert jnp.abs(out.astype(F8) - want).max() < 0.01 * jnp.abs(want).max()


# ---- Where the stream is not found


def two_readers(p, x):
    y = x @ p["w"]
    return x + y + jnp.tanh(y)


def summed_and_returned(p, x):
    y = x @ p["w"]
    return x + y, y


def summed_outside(p, x):
    return x + jax.checkpoint(lambda x: x @ p["w"])(x)


def to_itself(p, x):
    y = x @ p["w"]
    return y + y


def to_a_later_value(p, x):
    y = x @ p["w"]
    return y + jnp.tanh(x)


def beside_another_sublayer(p, x):
    other = jnp.tanh(x)
    return other + x @ p["w"] + x


HERE = r"\(\S*test_bottleneck\.py:\d+"
LOST = {
    "two readers": (two_readers, "is read at 2 places of its scope"),
    "summed and returned": (summed_and_returned, "is read at 1 places of its scope"),
    "summed outside": (summed_outside, "is read at 0 places of its scope"),
    "no sum": (lambda p, x: x @ p["w"], "is read at 0 places of its scope"),
    "scaled": (lambda p, x: x + 0.5 * (x @ p["w"]), rf"meets `mul` first {HERE}"),
    "to itself": (to_itself, rf"is added to itself {HERE}"),
    "to another sub-layer too": (
        beside_another_sublayer,
        rf"is added to several values {HERE}",
    ),
    "to a later value": (to_a_later_value, rf"added to what is computed after it {HERE}"),
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("adapter_input", [SUM, "residual"])
def test_a_residual_that_is_not_found_is_an_error_that_says_what_the_model_does(
    case, adapter_input
):
    fn, message = LOST[case]
    p, x = {"w": normal(0, D, D)}, normal(1, T, D)
    method = jp.bottleneck_adapter(M, jp.sites(fn, p, x).match("w"), adapter_input=adapter_input)
    with pytest.raises(ValueError, match=rf"adapter at 'w' reads the residual stream.*{message}"):
        jp.lift(fn)(start(method, p), x)


@pytest.mark.parametrize(
    "fn, shape",
    [
        (lambda p, x: x + (p["w"].T @ x.T).T, (D, D)),
        (lambda p, x: x + jnp.einsum("td,tdm->tm", x, p["w"]), (T, D, D)),
    ],
    ids=["the weight comes first", "experts"],
)
def test_a_product_without_a_residual_stream_is_an_error(fn, shape):
    p, x = {"w": normal(0, *shape)}, normal(1, T, D)
    method = jp.bottleneck_adapter(M, jp.sites(fn, p, x).match("w"), adapter_input="residual")
    with pytest.raises(
        jp.NotMergeableError, match=r"Bottleneck at 'w' .* `dot_general` .*test_bott"
    ):
        jp.lift(fn)(start(method, p), x)


# ---- Where it starts, how many numbers it trains


@pytest.mark.parametrize("adapter_input", ADAPTER_INPUTS)
def test_training_starts_at_the_base_model_with_2md_d_m_parameters(adapter_input):
    p, sites = layers(), jp.sites(postnorm, layers(), INPUT)
    method = jp.bottleneck_adapter(
        M, sites.match("down/kernel"), dtype=F8, **option(adapter_input, sites)
    )
    frozen, adapter = jp.split(method(KEY, p))
    assert sum(a.size for a in adapter.values()) == L * (2 * M * D + D + M)
    close(jp.lift(postnorm)(jp.combine(frozen, adapter), INPUT), postnorm(p, INPUT))


def wide():
    p = {"w": normal(0, 2, 8, 256)}
    fn = lambda p, x: jax.lax.scan(lambda x, p: (x, x @ p["w"]), x, p)[1]  # noqa: E731
    return p, jp.sites(fn, p, normal(1, T, 8))


def test_down_starts_with_variance_one_over_d():
    p, sites = wide()
    _, adapter = jp.split(jp.bottleneck_adapter(16, sites.match("w"))(KEY, p))
    down = np.asarray(adapter["w/down"])
    assert down.shape == (2, 256, 16)
    assert abs(down.std() * 16 - 1) < 0.05 and abs(down.mean()) < 0.01
    assert not any(jnp.abs(adapter[f"w/{n}"]).max() for n in ("up", "down_bias", "up_bias"))


def test_normal_starts_near_the_model():
    """Houlsby: Normal(0, 0.01 ** 2), cut off at two deviations, which leaves 0.8796 of it."""
    p, sites = wide()
    _, adapter = jp.split(jp.bottleneck_adapter(16, sites.match("w"), init="normal")(KEY, p))
    for name in ("down", "up"):
        drawn = np.asarray(adapter[f"w/{name}"])
        assert np.abs(drawn).max() <= 0.02 and abs(drawn.std() / 0.008796 - 1) < 0.05
        assert np.abs(drawn[0] - drawn[1]).max() > 0.01  # each layer has its own
    assert np.abs(adapter["w/down"].ravel() - adapter["w/up"].ravel()).max() > 0.01
    assert not any(jnp.abs(adapter[f"w/{n}"]).max() for n in ("down_bias", "up_bias"))
    p, sites = layers(), jp.sites(postnorm, layers(), INPUT)
    method = jp.bottleneck_adapter(M, sites.match("down/kernel"), init="normal")
    off = jnp.abs(jp.lift(postnorm)(start(method, p), INPUT) - postnorm(p, INPUT)).max()
    assert 0 < off < 0.02


# ---- Dropout


def steps(p, x):
    """Each layer's own output."""
    return jax.lax.scan(lambda x, p: (x, (x @ p["a"], x @ p["b"])), x, p)[1]


def test_dropout_draws_a_different_mask_for_every_layer_and_weight():
    """With zeros for all else, an output is `up_bias` where it is kept."""
    rate, big = 0.25, (40, D)
    p, x = {"a": jnp.zeros((L, D, D)), "b": jnp.zeros((L, D, D))}, jnp.zeros(big)
    sites = jp.sites(steps, p, x)
    frozen, adapter = jp.split(
        jp.bottleneck_adapter(M, sites.linear, dropout=rate, dtype=F8)(KEY, p)
    )
    adapter |= {name: jnp.ones_like(a) for name, a in adapter.items() if name.endswith("up_bias")}
    call = lambda **key: np.stack(jp.lift(steps)(jp.combine(frozen, adapter, **key), x))  # noqa: E731
    assert (call() == 1).all()
    out = call(dropout=jax.random.key(1)).reshape(2 * L, -1)
    kept = out > 0
    np.testing.assert_allclose(out[kept], 1 / (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 0.05
    for i in range(2 * L):
        for j in range(i):
            assert 0.2 < (kept[i] != kept[j]).mean() < 0.55  # independent: 0.375
    np.testing.assert_array_equal(call(dropout=jax.random.key(1)).reshape(2 * L, -1), out)
    assert (call(dropout=jax.random.key(2)).reshape(2 * L, -1) != out).any()


# ---- Refusals


def kernels(sites):
    return sites.match("*/down/kernel")


REFUSED = {
    "no hidden unit": (
        lambda s: jp.bottleneck_adapter(0, kernels(s)),
        r"bottleneck_adapter\(bottleneck_dim=0\)",
    ),
    "activation": (
        lambda s: jp.bottleneck_adapter(M, kernels(s), activation="elu"),
        r"bottleneck_adapter\(activation='elu'\)`: choose one of \['gelu', 'relu', 's",
    ),
    "dropout": (
        lambda s: jp.bottleneck_adapter(M, kernels(s), dropout=1.0),
        r"bottleneck_adapter\(dropout=1.0\)",
    ),
    "adapter input": (
        lambda s: jp.bottleneck_adapter(M, kernels(s), adapter_input="input"),
        r"\(adapter_input='input'\)`: .*'output', 'output_plus_residual', 'residual'",
    ),
    "init": (
        lambda s: jp.bottleneck_adapter(M, kernels(s), init="ones"),
        r"bottleneck_adapter\(init='ones'\)`: .*'zero' or 'normal'",
    ),
    "norms of too few": (
        lambda s: jp.bottleneck_adapter(
            M, kernels(s), adapter_input=SUM, norms=s.match("first/norm/*")
        ),
        r"one scale and one bias for each of \['first/down/kernel', 'second/down/kernel'\], but "
        r"got the scales \['first/norm/scale'\] and the biases \['first/norm/bias'\]",
    ),
    "norms without biases": (
        lambda s: jp.bottleneck_adapter(
            M, kernels(s), adapter_input=SUM, norms=s.match("*/norm/scale")
        ),
        r"but got the scales \['first/norm/scale', 'second/norm/scale'\] and the biases \[\]",
    ),
    "norms without the sum": (
        lambda s: jp.bottleneck_adapter(
            M, kernels(s), adapter_input="residual", norms=s.match("*/norm/*")
        ),
        r"\(adapter_input='residual', norms=...\)`: norms are for 'output_plus_residual' only",
    ),
    "norms of another size": (
        lambda s: jp.bottleneck_adapter(
            M, s.match("first/up/kernel"), adapter_input=SUM, norms=s.match("first/norm/*")
        ),
        r"'first/norm/scale' of shape \(8,\) does not have one entry for each of the 12 outputs "
        r"of 'first/up/kernel', in its stack \(\)",
    ),
    "nothing": (
        lambda s: jp.bottleneck_adapter(M, kernels(s) - kernels(s)),
        "`bottleneck_adapter` selects no parameter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_say_what_was_given_and_what_to_give(case):
    make, message = REFUSED[case]
    sites = jp.sites(unrolled, two_layers(), INPUT)
    with pytest.raises(ValueError, match=message):
        make(sites)(KEY, two_layers())
