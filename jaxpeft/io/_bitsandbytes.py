"""Linear weights in four bits as bitsandbytes stores them, beside the other tensors of a folder.

Of a weight (out, in) with n entries there are

    X.weight                                 uint8 (n / 2, 1)  codes, two to a byte
    X.weight.absmax                          one scale per block, float32, or uint8 where nested
    X.weight.quant_map                       float32 (16,), the values of the codes
    X.weight.nested_absmax                   float32, one per 256 scales
    X.weight.nested_quant_map                float32 (256,), the values of the scales' codes
    X.weight.quant_state.bitsandbytes__nf4   uint8, JSON: block size, shape, dtype, the offset

the nested ones only where the scales are quantized too. Layers are stacked to one `Flat`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._view import View, is_view
from jaxpeft._weight import STACK
from jaxpeft.io._coded import Coded, view_of
from jaxpeft.io._safetensors import NAMES, Lazy, Tensor, read
from jaxpeft.io._stacked import Stack, disassemble, flat, nested, refuse
from jaxpeft.quant._book import GROUP, Book
from jaxpeft.quant._dynamic import dynamic_map
from jaxpeft.quant._flat import Flat
from jaxpeft.quant._fp4 import FP4
from jaxpeft.quant._nf4 import NF4

__all__ = ["configured", "stored", "written"]

_CONFIG = "quantization_config"
BOOKS = {"nf4": NF4, "fp4": FP4}
DTYPES = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, jnp.bfloat16)}
ABSMAX, MAP, NESTED, NESTED_MAP = "absmax", "quant_map", "nested_absmax", "nested_quant_map"
STATE = "quant_state.bitsandbytes__"
# Maps are computed where a file is written, and may differ by the last bit of a float32.
LAST_BITS = 3e-7


class State(NamedTuple):
    """What a stack of layers must agree in."""

    book: Book
    block: int
    nested: bool


class Entry(NamedTuple):
    """One weight of a file: its state, and what is its own."""

    state: State
    dtype: np.dtype
    offset: float


# Reading -----------------------------------------------------------------------------------------


def configured(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed `config.json` without its `quantization_config`, if that is what is read here."""
    about = hf.get("quantization_config") or {}
    ours = about.get("quant_method") == "bitsandbytes" and (
        about.get("load_in_4bit") or about.get("_load_in_4bit")
    )
    return {name: value for name, value in hf.items() if not (ours and name == _CONFIG)}


def stored(
    tensors: Mapping[str, Tensor], plan: Mapping[str, Stack], dtype: Any = None
) -> tuple[dict[str, Tensor], dict[str, Stack], dict[str, Coded]]:
    """Takes the weights in four bits out of a folder.

    The numbers of the file are kept as they are. Only the maps are not: they must be those of
    the format, up to the last bit of a float32, and are then written nowhere else.

    Args:
      tensors: All of the folder.
      plan: All that is wanted.
      dtype: That the program is to see. `None` keeps what the files say (the wider, where
        layers differ).
    Returns:
      The tensors and the plan without those weights, and the weights by path.
    Raises:
      ValueError: Names every weight and file in which a part is missing, of another size or
        kind than the others say, or of a form that `Flat` is not; and every stack whose layers
        differ.
    """
    parts = _parts(tensors, plan)
    coded: dict[str, Coded] = {}
    faults: list[str] = []
    for path, stack in plan.items():
        if any(name in parts for name in stack.names):
            found = _stack(path, stack, tensors, parts, dtype, faults)
            if found is not None:
                coded[path] = found
    refuse(
        "These weights in four bits cannot be read:",
        faults,
        "Fetch the folder again, or quantize the original model: load(folder, quantize='nf4').",
    )
    used = {f"{name}.{part}" for name, own in parts.items() for part in own} | set(parts)
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return rest, {path: stack for path, stack in plan.items() if path not in coded}, coded


def _parts(
    tensors: Mapping[str, Tensor], plan: Mapping[str, Stack]
) -> dict[str, dict[str, Tensor]]:
    """The parts beside each weight in four bits, by the rest of their names."""
    names = {name: stack for stack in plan.values() for name in stack.names}
    parts: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        for name in (full.rsplit(".", 1)[0], full.rsplit(".", 2)[0]):
            part = full[len(name) + 1 :]
            if name in names and (
                part in (ABSMAX, MAP, NESTED, NESTED_MAP) or part.startswith("quant_state.")
            ):
                parts.setdefault(name, {})[part] = tensor
        # Codes alone: their parts are missing, rather than that they have a wrong shape.
        stack = names.get(full)
        if stack and stack.transposed and tensor.dtype == np.uint8:
            if tensor.shape != stack.tensor_shape:
                parts.setdefault(full, {})
    return parts


def _stack(
    path: str,
    stack: Stack,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
    dtype: Any,
    faults: list[str],
) -> Coded | None:
    """The weights of one path; `None` after a fault has been noted."""
    if not stack.transposed:
        faults.append(f"{stack.names[0]} ('{path}') is no linear weight, but has quantized parts")
        return None
    before = len(faults)
    entries: dict[str, Entry] = {}
    for name in stack.names:
        at = tensors.get(name)
        if at is None:
            faults.append(f"missing: {name}")
        elif name not in parts:
            other = next(n for n in stack.names if n in parts)
            faults.append(
                f"layers of '{path}' differ: {name} in {at.file} is dense, {other} is quantized"
            )
        else:
            entry, found = _entry(stack.tensor_shape, at, parts[name])
            faults.extend(f"{name} in {at.file}: {fault}" for fault in found)
            if entry is not None:
                entries[name] = entry
    if len(faults) > before:
        return None
    first, state = stack.names[0], entries[stack.names[0]].state
    for name, entry in entries.items():
        if entry.state != state:
            faults.append(
                f"layers of '{path}' differ: {name} in {tensors[name].file} is "
                f"{_described(entry.state)}, {first} in {tensors[first].file} is "
                f"{_described(state)}"
            )
            return None
    kept = reduce(jnp.promote_types, (entry.dtype for entry in entries.values()))
    shape = (stack.shape[-2], stack.shape[-1])

    def layer(i: int) -> Flat:
        name = stack.names[i]
        return _flat(name, tensors[name], parts[name], entries[name], shape)

    view = view_of(path, stack.shape, np.dtype(dtype or kept), _shapes(state, shape))
    return Coded(view, layer)


def _described(state: State) -> str:
    nested = " with nested scales" if state.nested else ""
    return f"{state.book.name} in blocks of {state.block}{nested}"


def _counts(size: int, block: int) -> tuple[int, int, int]:
    """Bytes of codes, scales, and scales of scales."""
    blocks = math.ceil(size / block)
    return math.ceil(size / 2), blocks, math.ceil(blocks / GROUP)


def _shapes(state: State, shape: tuple[int, int]) -> Flat:
    codes, blocks, groups = _counts(math.prod(shape), state.block)
    scale = np.uint8 if state.nested else np.float32
    return Flat(
        jax.ShapeDtypeStruct((codes,), np.uint8),
        jax.ShapeDtypeStruct((blocks,), scale),
        jax.ShapeDtypeStruct((groups,), np.float32) if state.nested else None,
        jax.ShapeDtypeStruct((), np.float32) if state.nested else None,
        shape,
        state.block,
        state.book,
    )


def _flat(
    name: str, codes: Tensor, parts: Mapping[str, Tensor], entry: Entry, shape: tuple[int, int]
) -> Flat:
    state = entry.state
    scales = read(parts[ABSMAX]).reshape(-1)
    tiles = read(parts[NESTED]).reshape(-1) if state.nested else None
    part, values = (ABSMAX, scales) if tiles is None else (NESTED, tiles)
    if bad := int(np.sum(~np.isfinite(values))):
        raise ValueError(
            f"{name}.{part} in {parts[part].file} has {bad} entries of {values.size} that are "
            "infinite or NaN. Fetch the folder again."
        )
    # Codes may be stored under the name of another dtype, as bytes all the same.
    packed = read(codes).reshape(-1).view(np.uint8)
    offset = np.asarray(entry.offset, np.float32) if state.nested else None
    return Flat(packed, scales, tiles, offset, shape, state.block, state.book)


def _entry(
    shape: tuple[int, ...], codes: Tensor, parts: Mapping[str, Tensor]
) -> tuple[Entry | None, list[str]]:
    """What the parts of one weight say, and what is wrong with them."""
    found = [part for part in parts if part.startswith("quant_state.")]
    missing = [f"{part} is missing" for part in (ABSMAX, MAP) if part not in parts]
    if len(found) != 1:
        kinds = " or ".join(f"{STATE}{kind}" for kind in BOOKS)
        said = f"{kinds} is missing" if not found else f"there are {' and '.join(sorted(found))}"
        return None, [*missing, said]
    kind = found[0].removeprefix(STATE)
    if kind not in BOOKS:
        return None, [*missing, f"unknown quant_type: {found[0]}, known are {', '.join(BOOKS)}"]
    try:
        about = json.loads(read(parts[found[0]]).tobytes().decode())
        block, dtype = int(about["blocksize"]), DTYPES[about["dtype"]]
        said_kind, said_shape = about["quant_type"], tuple(about["shape"])
        nested = any(key.startswith("nested_") for key in (*about, *parts))
        offset = float(about["nested_offset"]) if nested else 0.0
        group = about["nested_blocksize"] if nested else GROUP
    except (ValueError, KeyError, TypeError) as error:
        return None, [*missing, f"{found[0]} cannot be read: {error!r}"]
    if nested:
        missing += [f"{part} is missing" for part in (NESTED, NESTED_MAP) if part not in parts]
    if missing:
        return None, missing
    size = math.prod(shape)
    faults = []
    if said_kind != kind:
        faults.append(f"{found[0]} says quant_type={said_kind!r}")
    if said_shape != shape:
        faults.append(f"wrong shape: {said_shape}, should be {shape}")
    if block < 1:
        faults.append(f"foreign block size: blocksize={block}, must be 1 or more")
    if group != GROUP:
        faults.append(f"foreign block size: nested_blocksize={group!r}, only {GROUP} is read")
    if not math.isfinite(offset):
        faults.append(f"nested_offset={offset} is no number")
    if faults:
        return None, faults
    n_codes, blocks, groups = _counts(size, block)
    n_bytes = math.prod(codes.shape) * codes.dtype.itemsize
    if n_bytes != n_codes:
        faults.append(f"{n_bytes} bytes of codes, should be {n_codes} for {shape}")
    scales = [(ABSMAX, blocks, np.dtype(np.uint8 if nested else np.float32))]
    scales += [(NESTED, groups, np.dtype(np.float32))] * nested
    for part, count, wanted in scales:
        tensor = parts[part]
        if (math.prod(tensor.shape), tensor.dtype) != (count, wanted):
            faults.append(
                f"{part} is {NAMES[tensor.dtype]} {tensor.shape}, should be {NAMES[wanted]} "
                f"({count},) for {shape} in blocks of {block}"
            )
    maps = [(MAP, np.asarray(BOOKS[kind].values, np.float32), f"the values of {kind}")]
    maps += [(NESTED_MAP, dynamic_map(), "the signed dynamic map of 8 bits")] * nested
    for part, values, what in maps:
        if not _same(parts[part], values):
            faults.append(f"{part} is not {what}, so its codes mean something else")
    return None if faults else Entry(State(BOOKS[kind], block, nested), dtype, offset), faults


def _same(tensor: Tensor, values: np.ndarray) -> bool:
    return (
        tensor.dtype == np.float32
        and math.prod(tensor.shape) == values.size
        and np.allclose(read(tensor).reshape(-1), values, rtol=LAST_BITS, atol=0)
    )


# Writing -----------------------------------------------------------------------------------------


def written(
    params: Mapping[str, Any], plan: Mapping[str, Stack]
) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """The tensors to write for a tree of arrays and `Flat` weights, and what config.json adds.

    Returns:
      The tensors, and the `quantization_config` that transformers needs to load them ({} where
      there are only arrays).
    Raises:
      ValueError: Names every weight that no file holds, and what `disassemble` refuses.
    """
    leaves = flat(params)
    views = {path: leaf for path, leaf in leaves.items() if is_view(leaf) and path in plan}
    faults = [
        f"'{path}' is {fault}"
        for path, view in views.items()
        if (fault := _fault(view, plan[path]))
    ]
    refuse(
        "Of all structured weights, only 'flat' ones with codes of bitsandbytes can be saved:",
        faults,
        "Save `jp.merge(params)`, all arrays, or quantize those with "
        "`jp.quantize('nf4', sites, layout='flat')`.",
    )
    dense = {path: leaf for path, leaf in leaves.items() if path not in views}
    tensors = disassemble(nested(dense), {p: s for p, s in plan.items() if p not in views})
    for path, view in views.items():
        for i, name in enumerate(plan[path].names):
            tensors.update(_tensors(name, view, i, plan[path]))
    return tensors, _config(views, plan) if views else {}


def _fault(view: View, stack: Stack) -> str:
    """Why a view cannot be written; empty if it can."""
    weight, kind = view.weight, type(view.weight).__name__
    if not isinstance(weight, Flat):
        return f"a {kind}"
    if weight.book not in BOOKS.values():
        return f"in codes of {weight.book.name}"
    if not stack.transposed:
        return f"a {kind} of no linear weight"
    if view.shape != stack.shape or len(view.sizes(STACK)) != stack.stacked:
        return f"a {kind} of shape {view.shape}, should be {stack.shape}"
    if (weight.scales if weight.tiles is None else weight.tiles).dtype != np.float32:
        return f"a {kind} with scales of {weight.scales.dtype}, should be float32"
    if view.dtype not in DTYPES.values():
        return f"a {kind} that stands for {view.dtype}, should be one of {', '.join(DTYPES)}"
    return ""


def _tensors(name: str, view: View, index: int, stack: Stack) -> Iterable[tuple[str, Lazy]]:
    w: Flat = view.weight

    def part(field: Any) -> Any:
        return field[index] if stack.stacked else field

    def fetched(field: Any, shape: tuple[int, ...]) -> Lazy:
        return Lazy(shape, np.dtype(field.dtype), lambda: np.asarray(part(field)).reshape(shape))

    about: dict[str, Any] = {
        "quant_type": w.book.name,
        "blocksize": w.block,
        "dtype": np.dtype(view.dtype).name,
        "shape": stack.tensor_shape,
    }
    yield name, fetched(w.codes, (w.codes.shape[-1], 1))
    yield f"{name}.{ABSMAX}", fetched(w.scales, w.scales.shape[-1:])
    yield f"{name}.{MAP}", _lazy(np.asarray(w.book.values, np.float32))
    if w.tiles is not None:
        yield f"{name}.{NESTED}", fetched(w.tiles, w.tiles.shape[-1:])
        yield f"{name}.{NESTED_MAP}", _lazy(dynamic_map())
        about |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}
        about["nested_offset"] = float(np.asarray(part(w.offset)))
    state = np.frombuffer(json.dumps(about).encode(), np.uint8)
    yield f"{name}.{STATE}{w.book.name}", _lazy(state)


def _lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, array.dtype, lambda: array)


def _config(views: Mapping[str, View], plan: Mapping[str, Stack]) -> dict[str, Any]:
    view = next(iter(views.values()))
    # transformers puts four-bit modules in the place of all linear ones but these. A tied head
    # has no tensor, and is one.
    linear = {
        name.removesuffix(".weight"): path in views
        for path, stack in plan.items()
        for name in stack.names
        if stack.transposed
    }
    linear.setdefault("lm_head", False)
    return {
        _CONFIG: {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": view.weight.book.name,
            "bnb_4bit_use_double_quant": view.weight.tiles is not None,
            "bnb_4bit_compute_dtype": np.dtype(view.dtype).name,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [name for name, coded in linear.items() if not coded],
        }
    }
