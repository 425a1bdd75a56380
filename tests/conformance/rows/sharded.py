"""Models on a mesh of 4 devices: shard_map, Automatic and Explicit axes."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .row import Case, activations, params, row

# All dimensions that a mesh axis splits are multiples of 4, unlike the sizes of the other rows.
_B, _T, _D, _F = 4, 3, 20, 28
_SIZES = dict(up=(_D, _F), bias=(_F,), down=(_F, _D))
_MESH = dict(linear=("up", "down"))


def _mesh(kind):
    return jax.make_mesh((4,), ("t",), axis_types=(kind,), devices=jax.devices()[:4])


def _x():
    return activations(_B, _T, _D)


def _shard_map(check):
    mesh = _mesh(AxisType.Auto)

    def body(x, up, bias, down):
        h = jnp.tanh(x @ up + bias)  # column-parallel: each device has some hidden units
        return jax.lax.psum(h @ down, "t")  # row-parallel: partial sums

    split = (P(), P(None, "t"), P("t"), P("t", None))
    inner = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=P(), check_vma=check)

    def fn(p, x):
        return inner(x, p["up"], p["bias"], p["down"])

    return Case(fn, params(**_SIZES), (_x(),), mesh=mesh)


@row("shard_map, column- then row-parallel", **_MESH, everyday=True)
def shard_map():
    return _shard_map(True)


@row("shard_map, column- then row-parallel, replication unchecked", **_MESH)
def shard_map_unchecked():
    return _shard_map(False)


@row("shard_map with a gathered output", linear=("up",))
def shard_map_gather():
    mesh = _mesh(AxisType.Auto)

    def body(x, up):
        return jax.lax.all_gather(jnp.tanh(x @ up), "t", axis=-1, tiled=True)

    inner = jax.shard_map(
        body, mesh=mesh, in_specs=(P(), P(None, "t")), out_specs=P(), check_vma=False
    )
    return Case(lambda p, x: inner(x, p["up"]), params(up=(_D, _F)), (_x(),), mesh=mesh)


@row("shard_map over the batch, weights replicated", **_MESH)
def shard_map_batch():
    mesh = _mesh(AxisType.Auto)

    def body(p, x):
        return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]

    fn = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("t")), out_specs=P("t"))
    return Case(fn, params(**_SIZES), (_x(),), mesh=mesh)


@row("shard_map, weights gathered by each device before use", **_MESH, everyday=True)
def shard_map_fsdp():
    """Fully sharded data parallel by hand."""
    mesh = _mesh(AxisType.Auto)
    whole = functools.partial(jax.lax.all_gather, axis_name="t", tiled=True)

    def body(x, up, bias, down):
        return jnp.tanh(x @ whole(up) + bias) @ whole(down)

    split = (P("t"), P("t"), P(), P("t"))
    inner = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=P("t"))

    def fn(p, x):
        return inner(x, p["up"], p["bias"], p["down"])

    return Case(fn, params(**_SIZES), (_x(),), mesh=mesh)


@row("shard_map, layers scanned and gathered one by one", **_MESH)
def shard_map_fsdp_scan():
    """Fully sharded data parallel by hand: a device holds its part of every layer."""
    mesh = _mesh(AxisType.Auto)
    whole = functools.partial(jax.lax.all_gather, axis_name="t", tiled=True)

    @jax.checkpoint
    def layer(x, p):
        h = jnp.tanh(x @ whole(p["up"], axis=1) + p["bias"])
        return x + h @ whole(p["down"]), None

    def body(x, p):
        return jax.lax.scan(layer, x, p)[0]

    split = dict(up=P(None, None, "t"), bias=P(), down=P(None, "t"))
    inner = jax.shard_map(body, mesh=mesh, in_specs=(P("t"), split), out_specs=P("t"))
    p = params(**{k: (3, *s) for k, s in _SIZES.items()})
    return Case(lambda p, x: inner(x, p), p, (_x(),), mesh=mesh)


def _on_mesh(mesh, fn):
    specs = dict(up=P(None, "t"), bias=P("t"), down=P("t", None))
    p = {k: jax.device_put(w, NamedSharding(mesh, specs[k])) for k, w in params(**_SIZES).items()}
    return Case(fn, p, (jax.device_put(_x(), NamedSharding(mesh, P())),), mesh=mesh)


@row("a mesh with Automatic axes", **_MESH, everyday=True)
def automatic():
    mesh = _mesh(AxisType.Auto)
    constrain = jax.lax.with_sharding_constraint

    def fn(p, x):
        up = constrain(p["up"], NamedSharding(mesh, P(None, "t")))
        h = constrain(jnp.tanh(x @ up + p["bias"]), NamedSharding(mesh, P(None, None, "t")))
        return constrain(h @ p["down"], NamedSharding(mesh, P()))

    return _on_mesh(mesh, fn)


@row("a mesh with Explicit axes", **_MESH, everyday=True)
def explicit():
    mesh = _mesh(AxisType.Explicit)

    def fn(p, x):
        h = jnp.tanh(x @ p["up"] + p["bias"])
        return jnp.einsum("btf,fd->btd", h, p["down"], out_sharding=NamedSharding(mesh, P()))

    return _on_mesh(mesh, fn)


@row("a mesh with Explicit axes, layers scanned", linear=("up", "down"))
def explicit_scan():
    mesh = _mesh(AxisType.Explicit)

    def fn(p, x):
        def layer(x, p):
            h = jnp.tanh(x @ p["up"] + p["bias"])
            y = jnp.einsum("btf,fd->btd", h, p["down"], out_sharding=NamedSharding(mesh, P()))
            return x + y, None

        return jax.lax.scan(jax.checkpoint(layer), x, p)[0]

    specs = dict(up=P(None, None, "t"), bias=P(None, "t"), down=P(None, "t", None))
    p = params(**{k: (3, *s) for k, s in _SIZES.items()})
    p = {k: jax.device_put(w, NamedSharding(mesh, specs[k])) for k, w in p.items()}
    return Case(fn, p, (jax.device_put(_x(), NamedSharding(mesh, P())),), mesh=mesh)
