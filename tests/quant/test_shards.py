"""Codes lie on devices as the arrays do that they stand for: divided, and no larger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxpeft as jp
from jaxpeft.quant import requantize

FORMATS = {
    "nf4": ("nf4", {}),
    "nf4+dq": ("nf4+dq", {}),
    "nf4+dq, flat": ("nf4+dq", {"layout": "flat"}),
    "int4+asym": ("int4+asym", {}),
    "int8": ("int8", {}),
    "fp8, blocks": ("fp8", {"block": 64}),
}
MODELS = {
    "matrix": lambda p, x: x @ p["w"],
    "stack": lambda p, x: jnp.einsum("bd,edf->ebf", x, p["w"]),
    "heads": lambda p, x: jnp.einsum("bd,dnh->bnh", x, p["w"]),
}
# Eight devices have 32 rows each, so that blocks of 64 end beyond their edges.
PLACES = {
    "inputs": ("matrix", (256, 512), ("x", None)),
    "outputs": ("matrix", (256, 512), (None, "x")),
    "inputs of a stack": ("stack", (3, 256, 128), (None, "x", None)),
    "a stack": ("stack", (8, 256, 128), ("x", None, None)),
    "width of heads": ("heads", (256, 8, 64), (None, None, "x")),
}
EVERYDAY = {("nf4", "inputs"), ("nf4+dq, flat", "inputs"), ("nf4+dq", "a stack")}


def on_mesh(shape, spec, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    return w, jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))


def bytes_of_one_device(tree):
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device.id == 0)


def crossed():
    pairs = ((f, p, k) for f in FORMATS for p in PLACES for k in ("Explicit", "Auto"))
    return [
        pytest.param(
            *c,
            id=": ".join(c),
            marks=() if c[:2] in EVERYDAY and c[2] == "Explicit" else pytest.mark.conformance,
        )
        for c in pairs
    ]


@pytest.mark.parametrize(("format", "place", "kind"), crossed())
def test_quantized_values_are_sharded_as_the_array_was(format, place, kind):
    name, options = FORMATS[format]
    model, shape, spec = PLACES[place]
    w, placed = on_mesh(shape, spec, getattr(AxisType, kind))
    sites = jp.sites(MODELS[model], {"w": w}, jnp.ones((4, 256), jnp.float32)).linear
    method = jp.quantize(name, sites, **options)
    tree = method(jax.random.key(0), {"w": placed})
    # A quarter of the dense shard in 4 bits with their scales, 1/32 more with zero points (those of
    # blocks that end beyond an edge are whole on each device), less than half in 8.
    most = 0.25 + 1 / 32 * name.endswith("asym") if "4" in name else 0.4
    assert bytes_of_one_device(tree) <= placed.nbytes / 8 * most
    whole = method(jax.random.key(0), {"w": w})
    merged = jp.merge(tree)["w"]
    assert (np.asarray(merged) == np.asarray(jp.merge(whole)["w"])).all()
    assert bytes_of_one_device(merged) <= placed.nbytes / (1 if kind == "Auto" else 8)


def test_it_is_right_in_a_program_and_can_be_rounded_anew():
    w, placed = on_mesh((256, 512), ("x", None), AxisType.Explicit)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 256)), jnp.float32)

    def fn(p, x):
        return jnp.dot(x, p["w"], out_sharding=PartitionSpec("x", None))

    sites = jp.sites(MODELS["matrix"], {"w": w}, x).linear
    method = jp.chain(jp.quantize("nf4", sites), jp.lora(2, sites))
    plain, _ = jp.split(method(jax.random.key(0), {"w": w}))
    mesh = placed.sharding.mesh
    with jax.set_mesh(mesh):
        frozen, adapter = jp.split(method(jax.random.key(0), {"w": placed}))
        y = jax.jit(lambda a, f, x: jp.lift(fn)(jp.combine(f, a), x))(
            adapter, frozen, jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", None)))
        )
        again = requantize(jp.combine(frozen, adapter))
    wanted = np.asarray(x) @ np.asarray(jp.merge(jp.combine(plain, adapter))["w"])
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    assert bytes_of_one_device(again.tree) == bytes_of_one_device(frozen)
    assert again.error["w"] < 1e-6  # of an adapter that is at its start


def test_what_cannot_be_divided_is_warned_of_by_name():
    w, placed = on_mesh((24, 64), ("x", None), AxisType.Explicit)
    sites = jp.sites(MODELS["matrix"], {"w": w}, jnp.ones((4, 24), jnp.float32)).linear
    message = r"values of .w., uint8 of shape \(12, 64\), are in 1 shards, .* \(24, 64\) is in 8"
    with pytest.warns(UserWarning, match=message):
        jp.quantize("nf4", sites)(jax.random.key(0), {"w": placed})
