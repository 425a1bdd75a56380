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

from jaxpeft._weight import Weight
from jaxpeft.io._coded import Coded, Encoder, aligned, encoding, place, view_of
from jaxpeft.io._safetensors import CONFIG, MAX_FAULTS, NAMES, Lazy, Tensor, read

__all__ = ["Stack", "assemble", "disassemble", "flat", "nested", "refuse"]

Tree = dict[str, Any]

# Rows transposed at once: strips that stay in the cache, five times as fast as a whole matrix.
BLOCK = 64
# Bytes of a tensor read at once.
STRIP = 8_000_000


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
    encoders: Mapping[str, Encoder] | None = None,
    coded: Mapping[str, Coded] | None = None,
) -> Tree:
    """Builds arrays from the tensors of a folder, each in its final place from the start.

    Every shard of every array is one buffer. Tensors are read into it one by one, and JAX takes
    it over, on CPU without a copy. So the peak is the model and little more. A process reads only
    what its own devices hold. A matrix that is to be encoded is read whole, into memory of its
    own, and leaves its codes alone behind: the model then counts as it is stored.

    Args:
      tensors: What the folder has.
      plan: What is wanted, by path.
      dtype: Of all arrays. `None` keeps what the file has (the wider, where layers differ).
      sharding: One `jax.sharding.Sharding` for all arrays, or a nested dict of them, one per
        path of the plan. `None` is the default device.
      ignore: Says which tensors may be left over.
      encoders: For paths of the plan that are to be weights: functions from a matrix (in, out).
      coded: Further paths, whose weights come from elsewhere.
    Returns:
      The arrays in a nested dict, views of weights among them.
    Raises:
      ValueError: Names every tensor that is missing, left over, of another shape, or no float.
        A matrix to be encoded has entries that are infinite or NaN. A weight cannot be cut as
        `sharding` says.
    """
    encoders, coded = encoders or {}, coded or {}
    refuse(
        f"{_folder(tensors)} does not hold the tensors that its {CONFIG} describes:",
        _faults(tensors, plan, ignore),
        f"Fetch the folder again, or correct its {CONFIG}.",
    )
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    paths = [*plan, *coded]
    if isinstance(sharding, jax.sharding.Sharding):
        shardings = dict.fromkeys(paths, sharding)
    else:
        shardings = flat(sharding)
        refuse("`sharding` does not fit the parameters:", _difference(paths, shardings))
    arrays: dict[str, Any] = {path: place(coded[path], shardings[path]) for path in coded}
    for path, stack in plan.items():
        kept = reduce(jnp.promote_types, (tensors[name].dtype for name in stack.names))
        final = np.dtype(dtype or kept)
        if path in encoders:
            made = _encoded(tensors, path, stack, final, encoders[path])
            arrays[path] = place(made, shardings[path])
        else:
            shard = _reader(tensors, stack, final)
            arrays[path] = jax.make_array_from_callback(stack.shape, shardings[path], shard)
    return nested(arrays)


def disassemble(params: Tree, plan: Mapping[str, Stack]) -> dict[str, Lazy]:
    """The tensors to write for a nested dict of arrays; each is fetched when its turn comes.

    Raises:
      ValueError: Names every array that is missing, left over, or of another shape.
    """
    arrays = flat(params)
    faults = _difference(plan, arrays)
    for path in filter(arrays.__contains__, plan):
        shape = getattr(arrays[path], "shape", f"a {type(arrays[path]).__name__}")
        if shape != plan[path].shape:
            faults.append(f"wrong shape: {path} is {shape}, should be {plan[path].shape}")
    refuse("`params` does not fit its configuration:", faults)
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
        out = aligned([stop - start for start, stop in bounds], dtype)
        names, targets = stack.names, [out]
        if stack.stacked:
            names, targets, index = names[index[0]], list(out), index[1:]
        for name, target in zip(names, targets, strict=True):
            _fill(target, tensors[name], index, stack.transposed)
        return out

    return shard


def _fill(target: np.ndarray, tensor: Tensor, index: tuple[slice, ...], transposed: bool) -> None:
    """Reads the part of a tensor at this index of the array, its own for one of a stack."""
    # The first axis of the file is read in part, the others are cut afterwards.
    first, *rest = index[::-1] if transposed else index
    start, stop, _ = first.indices(tensor.shape[0])
    row = max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize)
    step = max(BLOCK, STRIP // row // BLOCK * BLOCK)
    for at in range(start, stop, step):
        part = read(tensor, slice(at, min(at + step, stop)))[(slice(None), *rest)]
        if not transposed:
            target[at - start : at - start + len(part)] = part
            continue
        for i in range(0, len(part), BLOCK):
            target[:, at - start + i : at - start + i + BLOCK] = part[i : i + BLOCK].T


def _encoded(
    tensors: Mapping[str, Tensor], path: str, stack: Stack, dtype: np.dtype, encode: Encoder
) -> Coded:
    """The weights of a stack, each encoded from its tensor when its turn comes."""
    shape = stack.shape[-2:]
    run = encoding(encode)

    def layer(i: int) -> Weight:
        tensor = tensors[stack.names[i]]
        matrix = aligned(shape, dtype)
        _fill(matrix, tensor, (slice(None), slice(None)), stack.transposed)
        weight, bad = run(matrix)
        if bad:
            raise ValueError(
                f"{stack.names[i]} in {tensor.file} has {bad} entries of {matrix.size} that are "
                "infinite or NaN. They would take their block with them; mend the file, or do "
                f"not quantize '{path}'."
            )
        return weight

    one = jax.eval_shape(encode, jax.ShapeDtypeStruct(shape, dtype))
    return Coded(view_of(path, stack.shape, dtype, one), layer)


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


def _difference(wanted: Iterable[str], given: Mapping[str, Any]) -> list[str]:
    wanted = list(wanted)
    faults = [f"missing: {path}" for path in wanted if path not in given]
    return faults + [f"left over: {path}" for path in given if path not in wanted]


def refuse(head: str, faults: list[str], remedy: str = "") -> None:
    """Raises one error with all faults, if there are any."""
    if faults:
        more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        lines = "".join(f"\n  {fault}" for fault in faults[:MAX_FAULTS] + more)
        raise ValueError(head + lines + (remedy and "\n" + remedy))


def _folder(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.file.parent) for tensor in tensors.values()}))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{path: leaf} of a nested dict."""
    leaves = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        leaves.update(flat(value, path) if isinstance(value, Mapping) else {path: value})
    return leaves


def nested(leaves: Mapping[str, Any]) -> Tree:
    """The nested dict of {path: leaf}."""
    tree: Tree = {}
    for path, value in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree
