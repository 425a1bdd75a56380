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
    tree = jp.combine(*jp.split(jp.bottleneck_adapter(2, sites.linear, dtype=F8)(KEY, p)))
    with pytest.raises(jp.NotMergeableError, match="Bottleneck at 'w'.*sharding that the weight"):
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
    tree = jp.combine(*jp.split(jp.prompt_tuning(2, sites.embedding, dtype=F8)(KEY, p)))
    with pytest.raises(
        jp.NotMergeableError, match="SoftPrompt at 'embed'.*sharding that the weight"
    ):
        jp.lift(fn)(tree, ids)


def gathering(mesh):
    """A feed-forward block on parts of a batch, each weight gathered before its use."""

    def fn(p, x):
        def body(x, p):
            up = jax.lax.all_gather(p["up"], "t", tiled=True)
            down = jax.lax.all_gather(p["down"], "t", axis=1, tiled=True)
            return jnp.tanh(x @ up) @ down

        specs = (P("t"), {"up": P("t"), "down": P(None, "t")})
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("t"))(x, p)

    return fn


def test_a_bottleneck_on_a_gathered_weight_is_the_bottleneck_on_the_whole_one(mesh):
    fn = gathering(mesh)
    p, x = {"up": toy.normal(0, 8, 12), "down": toy.normal(1, 12, 8)}, toy.normal(2, 4, 8)
    sites = jp.sites(fn, p, x)
    method = jp.bottleneck_adapter(3, sites.match("down"), dtype=F8)
    frozen, adapter = jp.split(method(KEY, p))
    adapter = toy.perturbed(adapter)
    y = jnp.tanh(x @ p["up"]) @ p["down"]
    hidden = jax.nn.relu(y @ adapter["down/down"] + adapter["down/down_bias"])
    by_hand = y + hidden @ adapter["down/up"] + adapter["down/up_bias"]
    out = jax.jit(jp.lift(fn))(jp.combine(frozen, adapter), x)
    np.testing.assert_allclose(out, by_hand, rtol=1e-10)


@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_replicas_and_layers_of_each_device_are_not_shards_of_one_weight(mesh):
    """Gathered they are another array: its factors are not those of one weight, end to end."""

    def copies(p, x):
        body = lambda x, w: x @ jax.lax.all_gather(w[0], "t", tiled=True)  # noqa: E731
        return jax.shard_map(
            body, mesh=mesh, in_specs=(P("t"), P()), out_specs=P("t"), check_vma=False
        )(jnp.tile(x, (1, 4)), p["w"])

    def own_layers(p, x):
        def body(x, w):
            mine = jax.lax.dynamic_index_in_dim(w, jax.lax.axis_index("t"), 0, keepdims=False)
            return x @ jax.lax.all_gather(mine, "t", tiled=True)

        return jax.shard_map(
            body, mesh=mesh, in_specs=(P("t"), P(None, "t")), out_specs=P("t"), check_vma=False
        )(x, p["w"])

    for fn in (copies, own_layers):
        p, x = {"w": toy.normal(0, 4, 8, 6)}, toy.normal(1, 4, 8)
        sites = jp.sites(lambda p, x: jnp.einsum("bd,ldo->lbo", x, p["w"]), p, x)
        sites = sites.override("w", "stack", "in", "out")
        frozen, adapter = jp.split(jp.lora(2, sites, dtype=F8)(KEY, p))
        tree = jp.combine(frozen, toy.perturbed(adapter))
        out = jax.jit(jp.lift(fn))(tree, x)
        np.testing.assert_allclose(out, fn(jp.merge(tree), x), rtol=1e-10)


@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_blocks_that_devices_would_cut_are_decoded_outside(mesh):
    """Two of eight rows on each device, but one block of them all."""
    fn, p, x = row_parallel(mesh), {"w": toy.normal(0, 8, 6)}, toy.normal(1, 3, 8)
    tree = jp.quantize("nf4", jp.sites(fn, p, x).linear)(KEY, p)
    np.testing.assert_allclose(jax.jit(jp.lift(fn))(tree, x), x @ jp.merge(tree)["w"], rtol=1e-10)
