"""A quantized base and its adapter go through orbax as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxpeft as jp
from jaxpeft.quant import FORMATS


def split(format, params):
    f = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] + p["b"]  # noqa: E731
    sites = jp.sites(f, params, jnp.ones((1, 72)))
    method = jp.chain(jp.quantize(format, sites.linear), jp.lora(2, sites.linear))
    return jp.split(method(jax.random.key(0), params))


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_quantized_base_is_restored_without_the_dense_one(format, tmp_path):
    params = {"w": jax.random.normal(jax.random.key(1), (2, 72, 72)), "b": jnp.ones(72)}
    frozen, adapter = split(format, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", frozen)
        checkpointer.save(tmp_path / "adapter", adapter)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda p: split(format, p), params)
        requantize = [
            checkpointer.restore(tmp_path / name, like)
            for name, like in zip(("base", "adapter"), shapes, strict=True)
        ]
    for found, saved in zip(requantize, (frozen, adapter), strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(saved)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    # The adapter's checkpoint holds the adapter and nothing else.
    assert set(requantize[1]) == {"w/a", "w/b"}
