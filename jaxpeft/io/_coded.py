"""Matrices that come as codes: a stack of weights filled layer by layer, in its final place."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jaxpeft._rules.sharding import acts_on_parts, field_specs
from jaxpeft._view import View, roles_of
from jaxpeft._weight import IN, OUT, STACK, Weight

__all__ = ["Coded", "Encoder", "aligned", "encoding", "place", "view_of"]

#: From a matrix (in, out) to a weight.
Encoder = Callable[[jax.Array], Weight]
# Where a part of an array lies: its start and stop along each axis.
Bounds = tuple[tuple[int, int], ...]


class Coded(NamedTuple):
    """A stack of weights, or a single one, each of which is made when its turn comes."""

    view: View  # of the whole; `jax.ShapeDtypeStruct`s stand for its fields
    layer: Callable[[int], Weight]  # one of the stack, or the single one, its fields numpy arrays


def view_of(path: str, shape: Sequence[int], dtype: Any, one: Weight) -> View:
    """The view of a stack of weights like `one`, by shapes alone.

    Args:
      path: Of the array that it replaces.
      shape: Of that array, (in, out) or (layers, in, out).
      dtype: Of that array.
      one: A weight of the stack, or shapes of one.
    """
    lead = tuple(shape[:-2])
    weight = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), one)
    axes = roles_of(*[STACK] * len(lead), IN, OUT)(tuple(shape))
    view = View.of(jax.ShapeDtypeStruct(tuple(shape), dtype), axes, path)
    return dataclasses.replace(view, weight=weight, natural=False)


def place(coded: Coded, sharding: Sharding) -> View:
    """Makes the layers one by one and puts their fields where they belong.

    Every shard of every field is one buffer, which JAX takes over. A layer of which no device of
    this process holds a part is not made.

    Args:
      coded: What to make.
      sharding: Of the array that the weight replaces; every field is cut as the array would be.
    Raises:
      ValueError: The weight cannot be cut so.
    """
    shapes, treedef = jax.tree.flatten(coded.view.weight)
    shardings = _of_fields(coded.view, sharding)
    buffers: list[dict[Bounds, np.ndarray]] = []
    for x, where in zip(shapes, shardings, strict=True):
        indices = where.addressable_devices_indices_map(x.shape).values()
        held = {_bounds(index, x.shape) for index in indices if index is not None}
        buffers.append({b: aligned([stop - start for start, stop in b], x.dtype) for b in held})
    stack = coded.view.sizes(STACK)
    for i in range(*stack or (1,)):
        targets = [_layer(parts, i) if stack else list(parts.items()) for parts in buffers]
        if not any(targets):
            continue
        fields = jax.tree.leaves(coded.layer(i))
        for field, parts in zip(fields, targets, strict=True):
            for bounds, target in parts:
                target[...] = field[tuple(slice(*b) for b in bounds)]
    arrays = [
        jax.make_array_from_callback(x.shape, where, _giver(parts, x.shape))
        for x, where, parts in zip(shapes, shardings, buffers, strict=True)
    ]
    return dataclasses.replace(coded.view, weight=jax.tree.unflatten(treedef, arrays))


def aligned(shape: Iterable[int], dtype: Any) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which the CPU backend takes over as it is."""
    shape, dtype = tuple(shape), np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


@functools.cache
def encoding(encode: Encoder) -> Callable[[np.ndarray], tuple[Weight, int]]:
    """Compiles an encoder: a function from a matrix to its weight, of numpy arrays, and to the
    number of its entries that are infinite or NaN."""

    @jax.jit
    def compiled(matrix: jax.Array) -> tuple[Weight, jax.Array]:
        return encode(matrix), jnp.sum(~jnp.isfinite(matrix))

    def run(matrix: np.ndarray) -> tuple[Weight, int]:
        weight, bad = compiled(jax.device_put(matrix))
        return jax.tree.map(np.asarray, weight), int(bad)

    return run


def _of_fields(view: View, sharding: Sharding) -> list[Sharding]:
    """Per field of a view's weight, its sharding when the array it stands for has this one."""
    if not isinstance(sharding, NamedSharding):
        if len(sharding.device_set) == 1:
            return [sharding] * len(jax.tree.leaves(view.weight))
        raise ValueError(
            f"`sharding` of '{view.path}' is a {type(sharding).__name__}, which says nothing of "
            f"the parts of a {type(view.weight).__name__}. Give a `jax.sharding.NamedSharding`."
        )
    mesh, spec = sharding.mesh, sharding.spec
    cut = {axis: (n,) if isinstance(n, str) else tuple(n) for axis, n in enumerate(spec) if n}
    for axis, names in cut.items():
        role, size = view.axes[axis].role, view.axes[axis].size
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts or not view.divides(axis, parts) or not acts_on_parts(view, {role}):
            raise ValueError(
                f"`sharding` cuts the axis of length {size} ({role}) of '{view.path}' into "
                f"{parts} parts, which a {_described(view.weight)} cannot be cut into. Cut another "
                "axis or none; or choose a block of which each part holds a whole number (of four "
                "blocks or 64 columns, with double quantization). Flat weights are cut between "
                "layers only."
            )
    specs = field_specs(view, spec)
    assert specs is not None, view.path
    return [NamedSharding(mesh, s, memory_kind=sharding.memory_kind) for s in specs]


def _described(weight: Weight) -> str:
    block = getattr(weight, "block", None)
    return type(weight).__name__ + (f" in blocks of {block}" if block else "")


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _layer(parts: dict[Bounds, np.ndarray], i: int) -> list[tuple[Bounds, np.ndarray]]:
    """Slice `i` of the first axis in each of the parts that hold it, as an array (not a scalar)."""
    return [
        (bounds[1:], buffer[i - bounds[0][0], ...])
        for bounds, buffer in parts.items()
        if bounds[0][0] <= i < bounds[0][1]
    ]


def _giver(parts: dict[Bounds, np.ndarray], shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
    """The callback that gives each device its part: the first the buffer itself, others copies."""
    given: set[Bounds] = set()

    def give(index: tuple[slice, ...]) -> np.ndarray:
        bounds = _bounds(index, shape)
        if bounds not in given:
            given.add(bounds)
            return parts[bounds]
        copy = aligned(parts[bounds].shape, parts[bounds].dtype)
        copy[...] = parts[bounds]
        return copy

    return give
