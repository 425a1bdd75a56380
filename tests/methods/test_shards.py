"""What would be silently wrong on a shard of a weight is refused; what is right there works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxpeft as jp

from . import toy

F8 = jnp.float64
KEY = jax.random.key(0)
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("t",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


def row_parallel(mesh):
    """A product whose partial sums are added over devices."""

    def fn(p, x):
        def body(x, w):
            return jax.lax.psum(x @ w, "t")

        specs = (P(None, "t"), P("t", None))
        mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())
        return mapped(x, p["w"])

    return fn


def test_a_bottleneck_on_partial_sums_is_refused(mesh):
    """act(a + b) is not act(a) + act(b): each device would adapt its part of the sum."""
    fn, p, x = row_parallel(mesh), {"w": toy.normal(0, 8, 6)}, toy.normal(1, 3, 8)
    sites = jp.sites(fn, p, x)
    tree = jp.combine(*jp.split(jp.bottleneck(2, sites.linear, dtype=F8)(KEY, p)))
    with pytest.raises(jp.NotAMatrixError, match="Bottleneck at 'w'.*sharding that the weight"):
        jp.lift(fn)(tree, x)


@pytest.mark.parametrize("name", ["lora", "ia3", "int8"])
def test_linear_methods_are_right_on_partial_sums(mesh, name):
    fn, p, x = row_parallel(mesh), {"w": toy.normal(0, 8, 6)}, toy.normal(1, 3, 8)
    linear = jp.sites(fn, p, x).linear
    method = {
        "lora": jp.lora(2, linear, dtype=F8),
        "ia3": jp.ia3(linear, dtype=F8),
        "int8": jp.chain(jp.quantize("int8", linear), jp.lora(2, linear, dtype=F8)),
    }[name]
    frozen, adapter = jp.split(method(KEY, p))
    tree = jp.combine(frozen, toy.perturbed(adapter))
    out = jax.jit(jp.lift(fn, materialize="error"))(tree, x)
    np.testing.assert_allclose(out, x @ jp.merge(tree)["w"], rtol=1e-10)


def test_a_prompt_behind_a_sharded_vocabulary_is_refused(mesh):
    """Each device masks the ids that are not its own, so virtual ones would be nobody's."""

    def fn(p, ids):
        def body(table, ids):
            local = ids - jax.lax.axis_index("t") * table.shape[0]
            mine = (local >= 0) & (local < table.shape[0])
            rows = table[jnp.clip(local, 0, table.shape[0] - 1)]
            return jax.lax.psum(jnp.where(mine[..., None], rows, 0), "t")

        specs = (P("t", None), P())
        mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return mapped(p["embed"], ids)

    p, ids = {"embed": toy.normal(0, 48, 6)}, jnp.arange(5)[None]
    sites = jp.sites(fn, p, ids)
    tree = jp.combine(*jp.split(jp.prompt(2, sites.embedding, dtype=F8)(KEY, p)))
    with pytest.raises(jp.NotAMatrixError, match="SoftPrompt at 'embed'.*sharding that the weight"):
        jp.lift(fn)(tree, ids)
