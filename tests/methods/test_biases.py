"""An adapter behind a sub-layer knows its bias, however the program lays the bias out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from . import toy

F8 = jnp.float64


def adapted(fn, p, x):
    """Outputs of `fn` with a bottleneck behind its kernel `w`, and the adapter."""
    sites = jp.sites(fn, p, x)
    method = jp.bottleneck_adapter(2, sites.match("w"), dtype=F8)
    frozen, adapter = jp.split(method(jax.random.key(0), p))
    adapter = toy.perturbed(adapter)
    return jax.jit(jp.lift(fn))(jp.combine(frozen, adapter), x), adapter


def by_hand(y, adapter, *slice_):
    down, c, up, e = (adapter[f"w/{n}"][slice_] for n in ("down", "down_bias", "up", "up_bias"))
    return y + jax.nn.relu(y @ down + c) @ up + e


def test_a_bias_has_the_axes_of_the_outputs():
    p, x = {"w": toy.normal(0, 5, 2, 3), "b": toy.normal(1, 2, 3)}, toy.normal(2, 4, 5)
    out, adapter = adapted(lambda p, x: jnp.einsum("td,dnh->tnh", x, p["w"]) + p["b"], p, x)
    y = x @ p["w"].reshape(5, 6) + p["b"].reshape(6)
    np.testing.assert_allclose(out.reshape(4, 6), by_hand(y, adapter), rtol=1e-10)


def test_a_stack_of_biases_lies_along_the_last_axis():
    p, x = {"w": toy.normal(0, 5, 3, 5), "b": toy.normal(1, 5, 3)}, toy.normal(2, 4, 5)

    def fn(p, x):
        layers = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p)
        return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["b"]), None), x, layers)[0]

    out, adapter = adapted(fn, p, x)
    for i in range(3):
        x = jnp.tanh(by_hand(x @ p["w"][:, i] + p["b"][:, i], adapter, i))
    np.testing.assert_allclose(out, x, rtol=1e-10)


@pytest.mark.parametrize("shape", [(6,), (4, 1, 6)], ids=["shared", "each its own"])
def test_experts_share_a_bias_or_have_one_each(shape):
    p, x = {"w": toy.normal(0, 4, 5, 6), "b": toy.normal(1, *shape)}, toy.normal(2, 4, 3, 5)
    out, adapter = adapted(lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]) + p["b"], p, x)
    bias = jnp.broadcast_to(p["b"], (4, 1, 6))
    for i in range(4):
        wanted = by_hand(x[i] @ p["w"][i] + bias[i], adapter, i)
        np.testing.assert_allclose(out[i], wanted, rtol=1e-10)


def test_a_bias_shared_by_heads_is_refused():
    p, x = {"w": toy.normal(0, 5, 2, 3), "b": toy.normal(1, 3)}, toy.normal(2, 4, 5)
    message = r"adds 'b' of shape \(3,\) to the product of 'w'.*3 entries for 6 outputs"
    with pytest.raises(ValueError, match=message):
        adapted(lambda p, x: jnp.einsum("td,dnh->tnh", x, p["w"]) + p["b"], p, x)


# Biases that do not follow a weight output by output, each in a program of its own.
SCALED_WITH_NOTHING = {
    "a half of the outputs": (
        lambda p, x: jnp.split(x @ p["w"], 2, -1)[0] + jnp.split(x @ p["w"], 2, -1)[1] + p["b"],
        {"w": (5, 6), "b": (3,)},
        r"'b' of shape \(3,\) .* 'w' of shape \(5, 6\).*3 entries for 6 outputs",
    ),
    "heads share it": (
        lambda p, x: jnp.einsum("td,dnh->tnh", x, p["w"]) + p["b"],
        {"w": (5, 2, 3), "b": (3,)},
        r"'b' of shape \(3,\) .* 'w' of shape \(5, 2, 3\).*3 entries for 6 outputs",
    ),
    "scanned layers share it": (
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w + p["b"], None), x, p["w"])[0],
        {"w": (2, 5, 5), "b": (5,)},
        r"'b' of shape \(5,\) .* 'w' of shape \(2, 5, 5\).*their stacks are \(\) and \(2,\)",
    ),
    "two weights share it": (
        lambda p, x: jnp.tanh(x @ p["u"] + p["b"]) @ p["w"] + p["b"],
        {"u": (5, 5), "w": (5, 5), "b": (5,)},
        r"adds 'b' to the products of \['u', 'w'\], .* cannot be scaled with 'w'",
    ),
}


@pytest.mark.parametrize("name", SCALED_WITH_NOTHING)
def test_ia3_refuses_a_bias_that_one_vector_cannot_scale_with_its_weight(name):
    fn, shapes, message = SCALED_WITH_NOTHING[name]
    p = {name: toy.normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    sites = jp.sites(fn, p, toy.normal(9, 4, 5))
    assert sites["w"].bias == "b"
    with pytest.raises(ValueError, match=message):
        jp.ia3(sites.match("w"))(jax.random.key(0), p)


def test_ia3_scales_a_bias_that_each_expert_has():
    p, x = {"w": toy.normal(0, 4, 5, 6), "b": toy.normal(1, 4, 1, 6)}, toy.normal(2, 4, 3, 5)
    fn = lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]) + p["b"]  # noqa: E731
    frozen, adapter = jp.split(jp.ia3(jp.sites(fn, p, x).linear)(jax.random.key(0), p))
    adapter = toy.perturbed(adapter)
    out = jp.lift(fn)(jp.combine(frozen, adapter), x)
    np.testing.assert_allclose(out, fn(p, x) * adapter["w/scale"][:, None], rtol=1e-10)
