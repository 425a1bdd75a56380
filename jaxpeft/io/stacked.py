"""Between the tensors of a model folder, one per layer, and stacked arrays, one per kind.

    model.layers.{0, 1, ...}.mlp.up_proj.weight (out, in)  <->  layers/mlp/up/kernel (L, in, out)

A model says with one `Stack` per array what it is made of; both directions follow from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.io.safetensors import CONFIG, MAX_FAULTS, NAMES, Lazy, Tensor, read

__all__ = ["Stack", "assemble", "disassemble"]

Tree = dict[str, Any]

# Rows transposed at once: strips that stay in the cache, five times as fast as a whole matrix.
BLOCK = 64


class Stack(NamedTuple):
    """How one array is made of tensors: of one per index of its first axis, or of just one."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool  # False: `names` has one entry, which is the whole array
    transposed: bool  # (out, in) in the file, (in, out) in the array

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the file."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def assemble(
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, Stack],
    *,
    dtype: Any = None,
    sharding: Any = None,
    ignore: Callable[[str], bool] = lambda name: False,
) -> Tree:
    """Builds arrays from the tensors of a folder, each in its final place from the start.

    Every shard of every array is one buffer. Tensors are read into it one by one, and JAX takes
    it over, on CPU without a copy. So the peak is the model and one tensor. A process reads only
    what its own devices hold.

    Args:
      tensors: What the folder has.
      plan: What is wanted, by path.
      dtype: Of all arrays. `None` keeps what the file has (the wider, where layers differ).
      sharding: One `jax.sharding.Sharding` for all arrays, or a nested dict of them, one per
        path of the plan. `None` is the default device.
      ignore: Says which tensors may be left over.
    Returns:
      The arrays in a nested dict.
    Raises:
      ValueError: Names every tensor that is missing, left over, of another shape, or no float.
    """
    _raise(
        f"{_folder(tensors)} does not hold the tensors that its {CONFIG} describes:",
        _faults(tensors, plan, ignore),
        f"Fetch the folder again, or correct its {CONFIG}.",
    )
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        shardings = dict.fromkeys(plan, sharding)
    else:
        shardings = _flat(sharding)
        _raise("`sharding` does not fit the parameters:", _difference(plan, shardings))
    arrays: dict[str, jax.Array] = {}
    for path, stack in plan.items():
        kept = reduce(jnp.promote_types, (tensors[name].dtype for name in stack.names))
        shard = _reader(tensors, stack, np.dtype(dtype or kept))
        arrays[path] = jax.make_array_from_callback(stack.shape, shardings[path], shard)
    return _nested(arrays)


def disassemble(params: Tree, plan: Mapping[str, Stack]) -> dict[str, Lazy]:
    """The tensors to write for a nested dict of arrays; each is fetched when its turn comes.

    Raises:
      ValueError: Names every array that is missing, left over, or of another shape.
    """
    arrays = _flat(params)
    faults = _difference(plan, arrays)
    for path in plan.keys() & arrays.keys():
        shape = getattr(arrays[path], "shape", f"a {type(arrays[path]).__name__}")
        if shape != plan[path].shape:
            faults.append(f"wrong shape: {path} is {shape}, should be {plan[path].shape}")
    _raise("`params` does not fit its configuration:", faults)
    tensors = {}
    for path, stack in plan.items():
        for i, name in enumerate(stack.names):
            dtype = np.dtype(arrays[path].dtype)
            tensors[name] = Lazy(stack.tensor_shape, dtype, _fetcher(arrays[path], stack, i))
    return tensors


def _fetcher(array: Any, stack: Stack, index: int) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        tensor = np.asarray(array[index] if stack.stacked else array)
        return tensor.T if stack.transposed else tensor

    return fetch


def _reader(
    tensors: Mapping[str, Tensor], stack: Stack, dtype: np.dtype
) -> Callable[[Any], np.ndarray]:
    """The callback that reads one shard of an array, given the shard's index."""

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [part.indices(n)[:2] for part, n in zip(index, stack.shape, strict=True)]
        out = _aligned([stop - start for start, stop in bounds], dtype)
        names, targets = stack.names, [out]
        if stack.stacked:
            names, targets, index = names[index[0]], list(out), index[1:]
        for name, target in zip(names, targets, strict=True):
            # The first axis of the file is read in part, the others are cut afterwards.
            first, *rest = index[::-1] if stack.transposed else index
            part = read(tensors[name], first)[(slice(None), *rest)]
            if not stack.transposed:
                target[...] = part
                continue
            for row in range(0, len(part), BLOCK):
                target[:, row : row + BLOCK] = part[row : row + BLOCK].T
        return out

    return shard


def _aligned(shape: Iterable[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which the CPU backend takes over as it is."""
    shape = tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _faults(
    tensors: Mapping[str, Tensor], plan: Mapping[str, Stack], ignore: Callable[[str], bool]
) -> list[str]:
    wanted = {name: stack.tensor_shape for stack in plan.values() for name in stack.names}
    faults = []
    for name, shape in wanted.items():
        if name not in tensors:
            faults.append(f"missing: {name} of shape {shape}")
        elif tensors[name].shape != shape:
            faults.append(f"wrong shape: {name} is {tensors[name].shape}, should be {shape}")
        elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            faults.append(f"no float: {name} is {NAMES[tensors[name].dtype]}")
    extra = [name for name in tensors if name not in wanted and not ignore(name)]
    return faults + [f"left over: {name} of shape {tensors[name].shape}" for name in extra]


def _difference(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    faults = [f"missing: {path}" for path in wanted if path not in given]
    return faults + [f"left over: {path}" for path in given if path not in wanted]


def _raise(head: str, faults: list[str], remedy: str = "") -> None:
    """Raises one error with all faults, if there are any."""
    if faults:
        more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        lines = "".join(f"\n  {fault}" for fault in faults[:MAX_FAULTS] + more)
        raise ValueError(head + lines + (remedy and "\n" + remedy))


def _folder(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.file.parent) for tensor in tensors.values()}))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        flat.update(_flat(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def _nested(flat: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree
