"""Roles that only the whole program reveals: heads, statistics, changed biases, experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import bridge
from jaxpeft.extend import bias_of

D, V = 6, 9
IDS = jnp.array([[1, 2, 3], [4, 5, 6]])


def arrays(**shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def stream(p, ids, *, at=None):
    """A decoder whose positions are as many as its width, and its width as its hidden units."""
    at = jnp.arange(ids.shape[1]) if at is None else at
    x = p["table"][ids] + p["positions"][at]
    bucket = jnp.minimum(jnp.abs(jnp.arange(3) - 1), 2)
    x = x + p["relative"][bucket]
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


STREAM = dict(table=(V, D), positions=(D, D), relative=(D, D), up=(D, D), down=(D, D))


def logits(p, ids, **where):
    return stream(p, ids, **where) @ p["head"]


def loss(p, ids):
    scores = jax.nn.log_softmax(30.0 * jnp.tanh(logits(p, ids).astype(jnp.float32) / 30.0))
    return -jnp.mean(jnp.take_along_axis(scores[:, :-1], ids[:, 1:, None], -1))


def with_cache(p, ids, at):
    x = stream(p, ids, at=at)
    return (x + (x @ p["keys"]) @ p["out"]) @ p["head"], x @ p["keys"]


@pytest.mark.parametrize(
    "fn, args, more, head",
    [
        (logits, (IDS,), ["head"], {"head"}),
        (lambda p, ids: loss(p, ids), (IDS,), ["head"], {"head"}),
        (lambda p, ids: logits(p, ids % V)[:, -1], (IDS,), ["head"], {"head"}),
        (lambda p: logits(p, jnp.clip(IDS, 0, V - 1)), (), ["head"], {"head"}),
        # A position that the caller gives is a number, too, but what is of its size goes on.
        (lambda p, ids, at: logits(p, ids, at=at), (IDS, IDS), ["head"], {"head"}),
        (with_cache, (IDS, IDS), ["head", "keys", "out"], {"head"}),
        (stream, (IDS,), [], set()),
        (lambda p, ids, at: stream(p, ids, at=at), (IDS, IDS), [], set()),
        (lambda p, ids: stream(p, ids) @ p["table"].T, (IDS,), [], {"table"}),
    ],
    ids=[
        "logits",
        "a loss",
        "the last token",
        "ids closed over",
        "positions given",
        "a cache of keys returned",
        "hidden states",
        "hidden states, positions given",
        "tied",
    ],
)
def test_a_head_is_what_gives_the_scores_of_the_vocabulary(fn, args, more, head):
    shapes = STREAM | {"head": (D, V), "keys": (D, D), "out": (D, D)}
    p = arrays(**{n: s for n, s in shapes.items() if n in STREAM or n in more})
    sites = jp.sites(fn, p, *args)
    assert set(sites.head) == head
    assert set(sites.hidden) == {"up", "down", *more} - {"head"}


def test_a_user_can_say_what_the_head_is():
    p = arrays(up=(D, D), classes=(D, 4))
    sites = jp.sites(lambda p, x: jnp.tanh(x @ p["up"]) @ p["classes"], p, jnp.ones((2, D)))
    assert set(sites.hidden) == {"up", "classes"}
    overridden = sites.linear.with_head("clas*")
    assert set(overridden.head) == {"classes"} and set(overridden.hidden) == {"up"}
    assert set(overridden.every.head) == {"classes"} and not overridden.with_head().head
    with pytest.raises(ValueError, match=r"'klass' matches none.*There are: classes"):
        sites.with_head("klass")


# ---- statistics and norms


def _normalized(form):
    def fn(p, x):
        x = x @ p["w"] + p["b"]
        mean, variance, scale, shift = (p[n] for n in ("mean", "var", "scale", "shift"))
        inverse = jax.lax.rsqrt(variance + 1e-5)
        return {
            "as written": lambda: (x - mean) * inverse * scale + shift,
            "scale first": lambda: (x - mean) * (inverse * scale) + shift,
            "a quotient": lambda: (x - mean) / jnp.sqrt(jnp.maximum(variance, 0) + 1e-5),
            "a spread": lambda: (x - mean) / variance,
            "folded": lambda: x * (scale * inverse) + (shift - mean * (scale * inverse)),
        }[form]()

    return fn


@pytest.mark.parametrize("form", ["as written", "scale first", "a quotient", "a spread", "folded"])
def test_a_running_mean_and_variance_are_no_bias_and_no_norm(form):
    vectors = dict.fromkeys(("b", "mean", "var", "scale", "shift"), (D,))
    sites = jp.sites(_normalized(form), arrays(w=(D, D), **vectors), jnp.ones((2, D)))
    used = form not in ("a quotient", "a spread")
    assert set(sites.statistic) == {"mean", "var"}
    assert set(sites.bias) == {"b", "shift"} - (set() if used else {"shift"})
    assert set(sites.norm) == ({"scale", "shift"} if used else set())
    assert sites["w"].bias == "b"


def test_bitfit_leaves_the_averages_of_batch_norm():
    module = nn.Sequential([nn.Conv(5, (3,)), nn.BatchNorm(use_running_average=True)])
    x = jnp.ones((2, 4, 3))
    variables = module.init(jax.random.key(0), x)
    sites = jp.sites(module.apply, variables, x)
    _, trained = jp.split(jp.bitfit(sites)(jax.random.key(0), variables))
    assert set(trained) == {"params/layers_0/bias", "params/layers_1/bias"}
    _, trained = jp.split(jp.norm_tuning(sites)(jax.random.key(0), variables))
    assert set(trained) == {"params/layers_1/bias", "params/layers_1/scale"}


def _by_its_length(p, x):
    w = p["kernel"] * jax.lax.rsqrt(jnp.sum(p["kernel"] ** 2, 0) + 1e-6)
    return x @ (w * p["scale"]) + p["bias"]


def _standardized(p, x):
    w = p["kernel"] - p["kernel"].mean(0)
    return x @ (w * jax.lax.rsqrt(w.var(0) + 1e-6) * p["scale"]) + p["bias"]


def _by_flax(p, x):
    inner = {"kernel": p["kernel"], "bias": p["bias"]}
    variables = {"params": {"layer_instance": inner, "layer_instance/kernel/scale": p["scale"]}}
    return nn.WeightNorm(nn.Dense(4)).apply(variables, x)


@pytest.mark.parametrize("fn", [_by_its_length, _standardized, _by_flax])
def test_a_normalized_weight_is_no_norm_of_activations(fn):
    p = arrays(kernel=(D, 4), scale=(4,), bias=(4,))
    assert not jp.sites(fn, p, jnp.ones((2, D))).norm


def test_the_power_iteration_of_a_spectral_norm_does_not_turn_its_kernel():
    module, x = nn.SpectralNorm(nn.Dense(4)), jnp.ones((2, D))
    variables = module.init(jax.random.key(0), x, update_stats=False)
    fn, params, rest = bridge.from_linen(module, variables)
    sites = jp.sites(fn, params, rest, x, update_stats=True, mutable=["batch_stats"])
    (kernel,) = sites.linear.values()
    assert [axis.role for axis in kernel.axes] == ["in", "out"]
    assert kernel.bias == "layer_instance/bias" and not kernel.bias_mismatch


def test_a_weight_divided_by_its_own_largest_stretch_keeps_its_sides():
    def fn(p, x, u):
        v = p["w"] @ u
        v = v / jnp.linalg.norm(v)
        return x @ (p["w"] / (v @ p["w"] @ u))

    sites = jp.sites(fn, arrays(w=(D, 4)), jnp.ones((2, D)), jnp.ones(4))
    assert [axis.role for axis in sites["w"].axes] == ["in", "out"]


# ---- biases that are not added as they are


def _in_a_scan(p, x):
    step = lambda x, _: (jnp.tanh(x @ p["w"] + 0.5 * p["b"]), None)  # noqa: E731
    return jax.lax.scan(step, x, length=2)[0]


TURNED = [
    (lambda p, x: x @ p["w"] - p["b"], r"subtracts or scales 'b' \(.*test_roles.py:\d+"),
    (lambda p, x: x @ p["w"] + 2 * p["b"], "subtracts or scales 'b'"),
    (lambda p, x: x @ p["w"] + -p["b"], "subtracts or scales 'b'"),
    (lambda p, x: p["b"] - x @ p["w"], "subtracts or scales 'b'"),
    (lambda p, x: x + (x @ p["w"] - p["b"]), "subtracts or scales 'b'"),
    (_in_a_scan, "subtracts or scales 'b'"),
    (lambda p, x: x @ p["w"] + p["b"] + p["c"], r"more than one bias: 'b' \(.*, 'c' \(.*"),
    (lambda p, x: x @ p["w"] + p["b"] + p["b"], "multiplies by the weight 1 times and adds 'b' 2"),
    (lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"], "by the weight 2 times and adds 'b' 1"),
    (lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["c"], "more than one bias: 'b'"),
]


@pytest.mark.parametrize("fn, message", TURNED)
@pytest.mark.parametrize(
    "method",
    [lambda s: jp.bottleneck_adapter(2, s), lambda s: jp.prefix_tuning(1, s, s - s)],
    ids=["reads", "rows"],
)
def test_a_method_that_reads_the_bias_refuses_one_that_is_not_added_as_it_is(fn, message, method):
    p = arrays(w=(D, D), b=(D,), c=(D,))
    sites = jp.sites(fn, p, jnp.ones((2, 3, D)))
    with pytest.raises(ValueError, match=f"product of 'w'.*{message}"):
        method(sites.linear)(jax.random.key(0), p)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jax.nn.relu(x @ p["w"]) + p["b"],
        lambda p, x: 0.5 * (x @ p["w"]) + p["b"],
        lambda p, x: -(x @ p["w"]) + p["b"],
    ],
)
def test_what_is_added_after_something_else_happened_is_no_bias_of_the_product(fn):
    site = jp.sites(fn, arrays(w=(D, D), b=(D,)), jnp.ones((2, D)))["w"]
    assert site.bias is None and not site.bias_mismatch


def test_a_bias_is_added_as_it_is_under_casts_jit_and_a_stream():
    def fn(p, x):
        return x + jax.jit(lambda x: x @ p["w"] + p["b"].astype(x.dtype))(x)

    site = jp.sites(fn, arrays(w=(D, D), b=(D,)), jnp.ones((2, D)))["w"]
    assert site.bias == "b" and not site.bias_mismatch


def test_a_parallel_adapter_whose_input_runs_twice_is_refused_with_the_line():
    def fn(p, x):
        h = jnp.tanh(x @ p["up"]) + jnp.tanh(2 * x @ p["up"])
        return h @ p["down"]

    p = arrays(up=(D, 4), down=(4, D))
    sites = jp.sites(fn, p, jnp.ones((2, D)))
    method = jp.parallel_adapter(2, sites.match("up"), sites.match("down"))
    tree = jp.combine(*jp.split(method(jax.random.key(0), p)))
    with pytest.raises(ValueError, match=r"adapter 'down' a second time \(.*test_roles.py:\d+"):
        jp.lift(fn)(tree, jnp.ones((2, D)))
    once = lambda p, x: jnp.tanh(jnp.tanh(x @ p["up"]) @ p["down"] @ p["up"]) @ p["down"]  # noqa: E731
    jp.lift(once)(tree, jnp.ones((2, D)))


# ---- experts

T, F, E = 5, 8, 3
EXPERTS = dict(up=(E, D, F), down=(E, F, D), router=(D, E))


def _shares(p, x):
    return jax.nn.softmax(x @ p["router"])


def _one_by_one(p, x):
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("te,ted->td", _shares(p, x), jnp.einsum("tef,efd->ted", h, p["down"]))


def _three_at_once(p, x):
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("te,tef,efd->td", _shares(p, x), h, p["down"])


def _side_by_side(p, x):
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"])) * _shares(p, x)[..., None]
    return h.reshape(T, E * F) @ p["down"].reshape(E * F, D)


def _gathered(p, x):
    e = jnp.argmax(x @ p["router"], -1)
    return jnp.einsum("tf,tfd->td", jnp.tanh(jnp.einsum("td,tdf->tf", x, p["up"][e])), p["down"][e])


def _taken(p, x):
    e = jnp.argmax(x @ p["router"], -1)
    up, down = (jnp.take(p[n], e, axis=0, mode="clip") for n in ("up", "down"))
    return (jnp.tanh(x[:, None] @ up) @ down)[:, 0]


def _each_token(p, x):
    def token(x):
        e = jnp.argmax(x @ p["router"])
        return jnp.tanh(x @ p["up"][e]) @ jax.lax.dynamic_index_in_dim(p["down"], e, 0, False)

    return jax.vmap(token)(x)


def _shared_slices(p, x):
    e = jnp.argmax(x @ p["router"], -1)
    one = jax.nn.one_hot(e, E)
    h = jnp.tanh(jnp.einsum("td,tdf->tf", x, jnp.einsum("te,edf->tdf", one, p["up"])))
    return jnp.einsum("tf,tfd->td", h, jnp.einsum("te,efd->tfd", one, p["down"]))


MIXTURES = [_one_by_one, _three_at_once, _side_by_side, _gathered, _taken, _each_token]


@pytest.mark.parametrize("fn", [*MIXTURES, _shared_slices])
def test_an_expert_has_an_adapter_of_its_own_however_it_is_reached(fn):
    p, x = arrays(**EXPERTS), jax.random.normal(jax.random.key(1), (T, D))
    sites = jp.sites(fn, p, x)
    for path in ("up", "down"):
        assert [axis.role for axis in sites[path].axes] == ["stack", "in", "out"]
        assert "embedding" not in sites[path].kinds and path in sites.expert
        assert bool(sites[path].materialized) == (fn is _shared_slices)
    assert set(sites.linear) == {"up", "down", "router"}


HEADS = [
    lambda p, x: jnp.einsum("tef,efd->td", jnp.einsum("td,edf->tef", x, p["up"]), p["down"]),
    # A gate of each head is no share of a mixture.
    lambda p, x: jnp.einsum(
        "tef,efd->td",
        jnp.einsum("td,edf->tef", x, p["up"]) * jax.nn.sigmoid(x @ p["router"])[..., None],
        p["down"],
    ),
    # Attention: the outputs that a softmax weights have been mixed over time before.
    lambda p, x: jnp.einsum(
        "sef,efd->sd",
        jnp.einsum(
            "ste,tef->sef",
            jax.nn.softmax(jnp.einsum("se,te->ste", x @ p["router"], x @ p["router"]), 1),
            jnp.einsum("td,edf->tef", x, p["up"]),
        ),
        p["down"],
    ),
]


@pytest.mark.parametrize("fn", HEADS)
def test_heads_stay_outputs_and_can_be_overridden_as_experts(fn):
    p, x = arrays(**EXPERTS), jax.random.normal(jax.random.key(1), (T, D))
    p = jax.tree.map(lambda w: w.astype(jnp.float64), p)
    sites = jp.sites(fn, p, x)
    assert [axis.role for axis in sites["up"].axes] == ["out", "in", "out"]
    overridden = sites.override("up", "stack", "in", "out").override("down", "stack", "in", "out")
    method = jp.lora(2, overridden.match("up", "down"), dtype=jnp.float64)
    frozen, adapter = jp.split(method(jax.random.key(0), p))
    assert adapter["up/a"].shape == (E, D, 2) and adapter["down/b"].shape == (E, 2, D)
    tree = jp.combine(frozen, {n: a + 0.3 for n, a in adapter.items()})
    lifted = jp.lift(fn, materialize="error")(tree, x)
    assert jnp.max(jnp.abs(lifted - fn(jp.merge(tree), x))) < 1e-10


def test_a_matrix_for_each_head_leaves_kernels_of_heads_and_of_blocks_alone():
    """(in, heads, head_dim), and a flat kernel whose outputs are cut into blocks afterwards."""

    def fn(p, x):
        heads = jnp.einsum("td,dnh->tnh", x, p["q"]) + (x @ p["flat"]).reshape(-1, 2, 4)
        return jnp.einsum("tnh,nhk->tnk", heads, p["each"])

    sites = jp.sites(fn, arrays(q=(D, 2, 4), flat=(D, 8), each=(2, 4, 4)), jnp.ones((T, D)))
    assert [axis.role for axis in sites["q"].axes] == ["in", "out", "out"]
    assert [axis.role for axis in sites["flat"].axes] == ["in", "out"]
    assert [axis.role for axis in sites["each"].axes] == ["stack", "in", "out"]


def test_a_table_of_several_axes_is_read_by_rows():
    """Relative positions of heads, multiplied by queries over the whole of a row's last axis."""

    def fn(p, x):
        rows = p["relative"][jnp.arange(3)[:, None] - jnp.arange(3) + 2]
        return jnp.einsum("tnh,tsnh->nts", x, rows)

    sites = jp.sites(fn, arrays(relative=(5, 2, 4)), jnp.ones((3, 2, 4)))
    assert list(sites.embedding) == ["relative"]


def test_ids_beyond_a_stack_are_what_the_program_makes_of_them():
    """NaN where a gather fills, the last matrix where it clips."""
    p = {"w": jax.random.normal(jax.random.key(0), (E, D, 4), jnp.float64)}
    x, e = jnp.ones((T, D), jnp.float64), jnp.array([0, 2, -1, E, E + 5])
    for mode in ("fill", "clip"):

        def fn(p, x, e, mode=mode):
            return jnp.einsum("td,tdf->tf", x, p["w"].at[e].get(mode=mode))

        sites = jp.sites(fn, p, x, e)
        frozen, adapter = jp.split(
            jp.lora(2, sites.linear, dtype=jnp.float64)(jax.random.key(0), p)
        )
        tree = jp.combine(frozen, {n: a + 0.3 for n, a in adapter.items()})
        got, want = jp.lift(fn, materialize="error")(tree, x, e), fn(jp.merge(tree), x, e)
        assert bool(jnp.isnan(want[3:]).all()) == (mode == "fill")
        assert bool(jnp.allclose(got, want, rtol=0, atol=1e-10, equal_nan=True))


def test_tokens_of_one_expert_draw_masks_of_their_own():
    p = {"w": jnp.zeros((E, D, 4))}

    def fn(p, x, e):
        return jnp.einsum("td,tdf->tf", x, p["w"][e])

    x, e = jnp.ones((T, D)), jnp.zeros(T, jnp.int32)
    sites = jp.sites(fn, p, x, e)
    method = jp.lora(2, sites.linear, dropout=0.5)
    frozen, adapter = jp.split(method(jax.random.key(0), p))
    adapter = {n: jnp.ones_like(a) for n, a in adapter.items()}
    out = jp.lift(fn)(jp.combine(frozen, adapter, dropout=jax.random.key(3)), x, e)
    assert len({float(row[0]) for row in out}) > 1


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, y: p["scale"] * y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6),
        lambda p, y: (y * p["scale"]) * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6),
        lambda p, y: jnp.einsum(
            "be,e->be", y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6), p["scale"]
        ),
        lambda p, y: jnp.einsum("e,be->be", p["scale"], y / jnp.std(y, -1, keepdims=True)),
    ],
    ids=["scale first", "scale first, rsqrt", "einsum", "einsum, scale first"],
)
def test_the_scale_of_a_normalization_is_found_wherever_it_stands(apply):
    sites = jp.sites(
        lambda p, x: apply(p, x @ p["w"]) @ p["v"],
        arrays(w=(D, D), v=(D, D), scale=(D,)),
        jnp.ones((2, D)),
    )
    assert set(sites.norm) == {"scale"}
    assert set(sites.linear) == {"w", "v"} and not sites.expert


def test_a_scale_that_an_einsum_applies_is_no_norm_where_nothing_is_normalized():
    sites = jp.sites(
        lambda p, x: jnp.einsum("be,e->be", x @ p["w"], p["scale"]) / jnp.sqrt(D * 1.0),
        arrays(w=(D, D), scale=(D,)),
        jnp.ones((2, D)),
    )
    assert sites["scale"].kinds == {"scale"} and sites["scale"].of == ("w",)
    assert not sites.norm and not sites.expert


@pytest.mark.parametrize(
    "add",
    [
        lambda y, b: y[..., 2:] + b,
        lambda y, b: jnp.split(y, [2], axis=-1)[1][..., ::-1] + b,
        lambda y, b: y[..., :-2][..., ::-1] - b,
    ],
    ids=["a slice", "a slice, reversed", "reversed, subtracted"],
)
def test_a_bias_of_a_part_or_of_another_order_is_no_bias_of_the_product(add):
    sites = jp.sites(
        lambda p, x: add(x @ p["w"], p["b"]), arrays(w=(D, D), b=(D - 2,)), jnp.ones((2, D))
    )
    assert sites["w"].bias is None
    says = r"'w'.*adds 'b' to a part of its product, or to it in another order"
    with pytest.raises(ValueError, match=says):
        bias_of(sites["w"], sites)


# Closed-over arrays -----------------------------------------------------------------------------


def test_an_array_that_is_closed_over_is_data_for_a_norm_and_a_constant_for_a_weight():
    """A batch is closed over as often as a frozen delta: see `ancestry.FIXED`."""
    x, delta = jnp.arange(8.0).reshape(2, 4), jnp.ones((4, 3))
    norm = lambda p: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * p["scale"]  # noqa: E731
    assert list(jp.sites(norm, {"scale": jnp.ones(4)}).norm) == ["scale"]
    product = lambda p, x: x @ (p["w"] + delta)  # noqa: E731
    assert list(jp.sites(product, {"w": jnp.ones((4, 3))}, x).linear) == ["w"]
