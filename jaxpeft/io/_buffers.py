"""Parameters that are filled layer by layer, in buffers that JAX takes over.

Every shard of every field of a parameter is one buffer, in its final place from the start, so that
filling a parameter takes no more memory than the parameter and one of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jaxpeft._rules.sharding import acts_on_parts, field_specs
from jaxpeft._view import View, is_view

__all__ = ["Layers", "Parts", "aligned", "build"]

#: Parts of an array: where each lies in it, and the buffer that holds it.
Parts = list[tuple[tuple[slice, ...], np.ndarray]]
# Where a part lies in an array, hashable: its start and stop along each axis.
Bounds = tuple[tuple[int, int], ...]


class Layers(NamedTuple):
    """A parameter that is filled one layer at a time.

    Attributes:
      like: A `jax.ShapeDtypeStruct`, or a view with such in the place of its fields.
      stacked: Whether layers lie along the first axis; else there is one layer, the whole.
      number: How many layers there are.
      fill: Called as `fill(i, fields)`; writes layer i into the parts of each field.
    """

    like: Any
    stacked: bool
    number: int
    fill: Callable[[int, list[Parts]], None]


def build(layers: Layers, sharding: Sharding) -> Any:
    """Fills a parameter: an array, or a view of a weight.

    A layer of which no device of this process holds a part is not asked for.

    Args:
      layers: The parameter.
      sharding: Sharding of the parameter; the fields of a weight are divided as the array that it
        stands for would be.
    Raises:
      ValueError: The weight cannot be divided so.
    """
    fields, treedef = jax.tree.flatten(layers.like)
    shardings = _field_shardings(layers.like, sharding)
    buffers: list[dict[Bounds, np.ndarray]] = []
    for x, where in zip(fields, shardings, strict=True):
        indices = where.addressable_devices_indices_map(x.shape).values()
        held = {_bounds(index, x.shape) for index in indices if index is not None}
        buffers.append({b: aligned([stop - start for start, stop in b], x.dtype) for b in held})
    for i in range(layers.number):
        parts = [_parts_of_layer(held, i if layers.stacked else None) for held in buffers]
        if any(parts):
            layers.fill(i, parts)
    arrays = [
        jax.make_array_from_callback(x.shape, where, _giver(held, x.shape))
        for x, where, held in zip(fields, shardings, buffers, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def aligned(shape: Iterable[int], dtype: Any) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which the CPU backend takes over as it is."""
    shape, dtype = tuple(shape), np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _field_shardings(like: Any, sharding: Sharding) -> list[Sharding]:
    """Per field, its sharding when the array that the weight stands for has this one.

    Raises:
      ValueError: The weight cannot be divided so.
    """
    if not is_view(like):
        return [sharding]
    view: View = like
    if not isinstance(sharding, NamedSharding):
        if len(sharding.device_set) == 1:
            return [sharding] * len(jax.tree.leaves(view.weight))
        raise ValueError(
            f"`sharding` of '{view.path}' is a {type(sharding).__name__}, which does not say how "
            f"to divide the fields of a {type(view.weight).__name__}. Give a "
            "`jax.sharding.NamedSharding`."
        )
    mesh, spec = sharding.mesh, sharding.spec
    divided = {axis: (n,) if isinstance(n, str) else tuple(n) for axis, n in enumerate(spec) if n}
    for axis, names in divided.items():
        role, size = view.axes[axis].role, view.axes[axis].size
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts or not view.divides(axis, parts) or not acts_on_parts(view, {role}):
            block = getattr(view.weight, "block", None)
            kind = type(view.weight).__name__ + (f" in blocks of {block}" if block else "")
            raise ValueError(
                f"`sharding` cuts the axis of length {size} ({role}) of '{view.path}' into "
                f"{parts} parts, which a {kind} cannot be cut into. Cut another axis or none; or "
                "choose a block of which each part holds a whole number (of four blocks or 64 "
                "columns, with double quantization). Flat weights are cut between layers only."
            )
    specs = field_specs(view, spec)
    assert specs is not None, view.path
    return [NamedSharding(mesh, s, memory_kind=sharding.memory_kind) for s in specs]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _parts_of_layer(held: Mapping[Bounds, np.ndarray], i: int | None) -> Parts:
    """The parts of layer `i` that the buffers hold; `None` stands for the whole array."""
    parts: Parts = []
    for bounds, buffer in held.items():
        if i is not None:
            start, stop = bounds[0]
            if not start <= i < stop:
                continue
            bounds = bounds[1:]
            buffer = buffer[i - start, ...]  # an array even where the layer is a scalar
        parts.append((tuple(slice(*b) for b in bounds), buffer))
    return parts


def _giver(held: Mapping[Bounds, np.ndarray], shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """The callback that gives each device its part: the first the buffer itself, others copies."""
    given: set[Bounds] = set()

    def give(index: tuple[slice, ...]) -> np.ndarray:
        bounds = _bounds(index, shape)
        if bounds not in given:
            given.add(bounds)
            return held[bounds]
        copy = aligned(held[bounds].shape, held[bounds].dtype)
        copy[...] = held[bounds]
        return copy

    return give
