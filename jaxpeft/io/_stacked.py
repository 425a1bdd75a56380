"""From the tensors of a model folder, one per layer, to stacked parameters, and back.

    model.layers.{0, 1, ...}.mlp.up_proj.weight (out, in)  <->  layers/mlp/up/kernel (L, in, out)

A model says with one `Stack` per parameter which tensors it is made of. `assemble` then reads each
parameter in one of three ways, all of which go layer by layer into the buffers of its shards:

    floating-point tensors                       an array
    floating-point tensors, with a quantizer     a quantized weight; one layer is dense at a time
    tensors that bitsandbytes has quantized      a `Flat` weight, with the values of the file

`disassemble` takes parameters apart into tensors again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxpeft._sites import Pattern, Site, Sites
from jaxpeft._tree import flatten
from jaxpeft._view import View, is_view, roles_of
from jaxpeft._weight import IN, OUT, STACK, Weight
from jaxpeft.io import _bitsandbytes as bitsandbytes
from jaxpeft.io._bitsandbytes import FourBit
from jaxpeft.io._buffers import Layers, Parts, aligned, build
from jaxpeft.io._plan import Stack, folder_of, refuse
from jaxpeft.io._safetensors import CONFIG, NAMES, Lazy, Tensor, read
from jaxpeft.quant._quantize import quantizer

__all__ = ["Format", "Formats", "Stack", "assemble", "disassemble", "quantization_config"]

Tree = dict[str, Any]
#: A function from a matrix (in, out) to a quantized weight.
Quantizer = Callable[[jax.Array], Weight]
#: The name of a format such as "nf4+dq", or a quantizer: `partial(nf4, block=128)`.
Format = str | Quantizer
#: One format for all weights that are usually quantized, or one per pattern of path.
Formats = Format | Mapping[Pattern, Format | None] | None

# Rows transposed at once: strips that stay in the cache, five times as fast as a whole matrix.
BLOCK = 64
# Bytes of a tensor read at once.
STRIP = 8_000_000


# Reading -----------------------------------------------------------------------------------------


def assemble(
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, Stack],
    *,
    dtype: Any = None,
    sharding: Any = None,
    quantize: Formats = None,
    ignore: Callable[[str], bool] = lambda name: False,
) -> Tree:
    """Builds the parameters of a model from the tensors of a folder.

    Every shard of every array is one buffer, which is filled layer by layer and which JAX takes
    over, on CPU without a copy. The peak of the memory is therefore the size of the parameters as
    they are stored, and of one dense layer where weights are quantized. A process reads only what
    its own devices hold.

    Args:
      tensors: All tensors of the folder.
      plan: The parameters that are wanted, by path.
      dtype: Dtype of all parameters; of a quantized weight, the dtype that the program sees. `None`
        keeps that of the file (the widest, where layers differ).
      sharding: One `jax.sharding.Sharding` for all parameters, or a nested dict with one per path
        of the plan. `None` is the default device.
      quantize: The format of the stacked linear weights, or a mapping from patterns of path to
        formats, in which the first match wins; a matrix stays dense where that is `None` or
        where no pattern matches.
      ignore: Says which tensors may be left over.
    Returns:
      A nested dict of arrays and of views of quantized weights.
    Raises:
      ValueError: Tensors are missing, left over, of another shape, or not floating-point (all are
        named); a weight in four bits is damaged (all are named); a weight to be quantized is
        quantized already, or has entries that are infinite or NaN; a format is unknown, a pattern
        matches no matrix; a weight cannot be divided as `sharding` says.
      TypeError: A format is neither a name nor a function.
    """
    quantizers = _quantizers(quantize, plan)
    stored, parts = bitsandbytes.stored(tensors, plan)
    if twice := [path for path in quantizers if path in stored]:
        raise ValueError(
            f"`load(quantize={quantize!r})`: {', '.join(map(repr, twice))} of {folder_of(tensors)} "
            "are quantized already. Leave `quantize` out, or give a mapping that spares them."
        )
    _check_tensors(tensors, plan, stored, lambda name: name in parts or ignore(name))
    shardings = _shardings(sharding, plan)
    params: dict[str, Any] = {}
    for path, stack in plan.items():
        if path in stored:
            layers = _four_bit_layers(path, stack, stored[path], dtype)
        elif path in quantizers:
            layers = _quantized_layers(path, stack, tensors, dtype, quantizers[path])
        else:
            layers = _dense_layers(stack, tensors, dtype)
        params[path] = build(layers, shardings[path])
    return _nested(params)


def _quantizers(formats: Formats, plan: Mapping[str, Stack]) -> dict[str, Quantizer]:
    """The quantizer of each parameter that is to be quantized as it is read."""
    if formats is None:
        return {}
    if not isinstance(formats, Mapping):
        # The parameters that `sites.hidden` selects.
        hidden = [path for path, stack in plan.items() if stack.stacked and stack.transposed]
        return dict.fromkeys(hidden, _quantizer(formats))
    matrices = Sites({path: _site(path, stack) for path, stack in plan.items() if stack.is_matrix})
    chosen: dict[str, Format | None] = {}
    for pattern, format in reversed(list(formats.items())):
        chosen |= dict.fromkeys(matrices.match(pattern), format)
    return {path: _quantizer(chosen[path]) for path in plan if chosen.get(path) is not None}


def _quantizer(format: Any) -> Quantizer:
    if isinstance(format, str):
        return quantizer(format)
    if not callable(format):
        raise TypeError(
            f"`quantize={format!r}`: a format is a name such as 'nf4+dq' or a function from a "
            "matrix to a weight such as `functools.partial(jp.quant.nf4, block=128)`."
        )
    return format


def _site(path: str, stack: Stack) -> Site:
    return Site(path, stack.shape, None, _axes(stack))


def _axes(stack: Stack) -> Any:
    return roles_of(*[STACK] * stack.stacked, IN, OUT)(stack.shape)


def _check_tensors(
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, Stack],
    stored: Mapping[str, Any],
    ignore: Callable[[str], bool],
) -> None:
    """Raises ValueError unless the folder holds what the plan wants, and nothing else."""
    wanted = {name: stack for stack in plan.values() for name in stack.names}
    checked = {name for path in plan if path in stored for name in plan[path].names}
    faults = []
    for name, stack in wanted.items():
        if name in checked:
            continue
        shape = stack.tensor_shape
        if name not in tensors:
            faults.append(f"missing: {name} of shape {shape}")
        elif tensors[name].shape != shape:
            faults.append(f"wrong shape: {name} is {tensors[name].shape}, should be {shape}")
        elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            faults.append(f"not floating-point: {name} is {NAMES[tensors[name].dtype]}")
    extra = [name for name in tensors if name not in wanted and not ignore(name)]
    faults += [f"left over: {name} of shape {tensors[name].shape}" for name in extra]
    refuse(
        f"{folder_of(tensors)} does not hold the tensors that its {CONFIG} describes:",
        faults,
        f"Download the folder again, or correct its {CONFIG}.",
    )


def _shardings(sharding: Any, plan: Mapping[str, Stack]) -> dict[str, Sharding]:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, Sharding):
        return dict.fromkeys(plan, sharding)
    shardings = _by_path(sharding)
    refuse("`sharding` does not fit the parameters:", _difference(plan, shardings))
    return shardings


# One layer ---------------------------------------------------------------------------------------


def _dense_layers(stack: Stack, tensors: Mapping[str, Tensor], dtype: Any) -> Layers:
    """Each layer is read into the buffers directly, and only the rows that these hold."""

    def fill(i: int, fields: list[Parts]) -> None:
        (parts,) = fields
        for index, target in parts:
            _read_into(target, tensors[stack.names[i]], index, stack.transposed)

    like = jax.ShapeDtypeStruct(stack.shape, _dtype(stack, tensors, dtype))
    return Layers(like, stack.stacked, len(stack.names), fill)


def _quantized_layers(
    path: str, stack: Stack, tensors: Mapping[str, Tensor], dtype: Any, quantizer: Quantizer
) -> Layers:
    """Each layer is read whole and quantized; of it, only the quantized weight is kept."""
    shape, dtype = stack.shape[-2:], _dtype(stack, tensors, dtype)
    run = _compiled(quantizer)

    def layer(i: int) -> Weight:
        tensor = tensors[stack.names[i]]
        matrix = aligned(shape, dtype)
        _read_into(matrix, tensor, (slice(None), slice(None)), stack.transposed)
        weight, bad = run(matrix)
        if bad:
            raise ValueError(
                f"{stack.names[i]} in {tensor.file} has {bad} entries of {matrix.size} that are "
                "infinite or NaN, which would spoil all values of their blocks. Fix the file, or "
                f"do not quantize '{path}'."
            )
        return weight

    one = jax.eval_shape(quantizer, jax.ShapeDtypeStruct(shape, dtype))
    return _layers_of_weights(path, stack, dtype, one, layer)


def _four_bit_layers(path: str, stack: Stack, weights: Sequence[FourBit], dtype: Any) -> Layers:
    """Each layer is read as it is stored."""
    seen = np.dtype(dtype or reduce(jnp.promote_types, (weight.dtype for weight in weights)))

    return _layers_of_weights(path, stack, seen, weights[0].like(), lambda i: weights[i].read())


def _layers_of_weights(
    path: str, stack: Stack, dtype: np.dtype, one: Weight, layer: Callable[[int], Weight]
) -> Layers:
    """A stack of weights, each of which is made when its turn comes.

    Args:
      path: Path of the parameter.
      stack: What it is made of.
      dtype: Dtype of the parameter, as the program sees it.
      one: Shapes of the weight of a layer.
      layer: Makes the weight of layer i, with NumPy arrays for fields.
    """
    lead = stack.shape[:-2]
    weight = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), one)
    view = View.of(jax.ShapeDtypeStruct(stack.shape, dtype), _axes(stack), path)
    view = dataclasses.replace(view, weight=weight, natural=False)

    def fill(i: int, fields: list[Parts]) -> None:
        for field, parts in zip(jax.tree.leaves(layer(i)), fields, strict=True):
            for index, target in parts:
                target[...] = field[index]

    return Layers(view, stack.stacked, len(stack.names), fill)


def _dtype(stack: Stack, tensors: Mapping[str, Tensor], dtype: Any) -> np.dtype:
    return np.dtype(dtype or reduce(jnp.promote_types, (tensors[n].dtype for n in stack.names)))


@functools.cache
def _compiled(quantizer: Quantizer) -> Callable[[np.ndarray], tuple[Weight, int]]:
    """A function from a matrix to its weight, with NumPy arrays for fields, and to the number of
    entries of the matrix that are infinite or NaN."""

    @jax.jit
    def compiled(matrix: jax.Array) -> tuple[Weight, jax.Array]:
        return quantizer(matrix), jnp.sum(~jnp.isfinite(matrix))

    def run(matrix: np.ndarray) -> tuple[Weight, int]:
        weight, bad = compiled(jax.device_put(matrix))
        return jax.tree.map(np.asarray, weight), int(bad)

    return run


def _read_into(
    target: np.ndarray, tensor: Tensor, index: tuple[slice, ...], transposed: bool
) -> None:
    """Reads the part of a tensor that lies at this index of its layer."""
    # Only the first axis of the file is read in part; the others are cut afterwards.
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


# Writing -----------------------------------------------------------------------------------------


def disassemble(params: Tree, plan: Mapping[str, Stack]) -> dict[str, Lazy]:
    """The tensors to write for a model's parameters; each is fetched when its turn comes.

    Arrays become floating-point tensors, and `Flat` weights in four bits the tensors that
    bitsandbytes has for them.

    Raises:
      ValueError: Names every weight that no such folder can hold, or else every parameter that is
        missing, left over, or of another shape.
    """
    found = _by_path(params)
    views = {path: leaf for path, leaf in found.items() if is_view(leaf) and path in plan}
    refuse(
        "Of all structured weights, a folder can only hold `Flat` ones in the formats of "
        "bitsandbytes:",
        [
            f"'{path}' is a {type(view.weight).__name__}{fault}"
            for path, view in views.items()
            if (fault := _unwritable(view, plan[path])) is not None
        ],
        "Save `jp.merge(params)`, all arrays, or quantize those with "
        "`jp.quantize('nf4', sites, layout='flat')`.",
    )
    faults = _difference(plan, found)
    for path in (path for path in plan if path in found):
        shape = getattr(found[path], "shape", f"a {type(found[path]).__name__}")
        if shape != plan[path].shape:
            faults.append(f"wrong shape: {path} is {shape}, should be {plan[path].shape}")
    refuse("`params` does not fit its configuration:", faults)
    tensors: dict[str, Lazy] = {}
    for path, stack in plan.items():
        for i, name in enumerate(stack.names):
            layer = i if stack.stacked else None
            if path in views:
                tensors.update(bitsandbytes.written(name, views[path], layer, stack.tensor_shape))
            else:
                dtype = np.dtype(found[path].dtype)
                tensors[name] = Lazy(stack.tensor_shape, dtype, _fetcher(found[path], stack, i))
    return tensors


def quantization_config(params: Tree, plan: Mapping[str, Stack]) -> dict[str, Any]:
    """What config.json says of weights in four bits, `{}` where there are none.

    Args:
      params: As `disassemble` takes them.
      plan: Their plan.
    """
    views = {path: leaf for path, leaf in _by_path(params).items() if is_view(leaf)}
    if not views:
        return {}
    # transformers puts four-bit modules in the place of all linear ones but these. A tied head
    # has no tensor, and is one.
    linear = {
        name.removesuffix(".weight"): path in views
        for path, stack in plan.items()
        for name in stack.names
        if stack.transposed
    }
    linear.setdefault("lm_head", False)
    dense = [name for name, quantized in linear.items() if not quantized]
    return bitsandbytes.configuration(next(iter(views.values())), dense)


def _unwritable(view: View, stack: Stack) -> str | None:
    """Why a view cannot be written, as the end of a sentence about its kind."""
    if (fault := bitsandbytes.unwritable(view)) is not None:
        return fault
    if not stack.transposed:
        return " of no linear weight"
    if view.shape != stack.shape or len(view.sizes(STACK)) != stack.stacked:
        return f" of shape {view.shape}, should be {stack.shape}"
    return None


def _fetcher(array: Any, stack: Stack, index: int) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        tensor = np.asarray(array[index] if stack.stacked else array)
        return tensor.T if stack.transposed else tensor

    return fetch


def _difference(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    faults = [f"missing: {path}" for path in wanted if path not in given]
    return faults + [f"left over: {path}" for path in given if path not in wanted]


def _by_path(tree: Any) -> dict[str, Any]:
    return flatten(tree, is_leaf=lambda x: not isinstance(x, Mapping))[0]


def _nested(params: Mapping[str, Any]) -> Tree:
    """The nested dict of {path: parameter}."""
    tree: Tree = {}
    for path, value in params.items():
        *above, name = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[name] = value
    return tree
