"""One linear weight in four bits, as bitsandbytes stores it beside the other tensors of a folder.

Of a weight (out, in) with n entries there are

    X.weight                                 uint8 (n / 2, 1)  quantized values, two to a byte
    X.weight.absmax                          one scale per block, float32, or uint8 where nested
    X.weight.quant_map                       float32 (16,), what the quantized values stand for
    X.weight.nested_absmax                   float32, one scale per 256 scales
    X.weight.nested_quant_map                float32 (256,), what the quantized scales stand for
    X.weight.quant_state.bitsandbytes__nf4   uint8, JSON: block size, shape, dtype, the offset

the nested ones only where the scales are quantized too. Such a weight is read into a `Flat`, with
the values of the file; `_stacked.py` stacks the layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._schema import conform
from jaxpeft._view import View
from jaxpeft.io._plan import Stack, folder_of, refuse
from jaxpeft.io._safetensors import NAMES, Lazy, Tensor, read
from jaxpeft.quant._book import GROUP, Book
from jaxpeft.quant._dynamic import dynamic_map
from jaxpeft.quant._flat import Flat
from jaxpeft.quant._fp4 import FP4
from jaxpeft.quant._nf4 import NF4

__all__ = [
    "FourBit",
    "configuration",
    "stored",
    "unwritable",
    "without_configuration",
    "written",
]

BOOKS = {"nf4": NF4, "fp4": FP4}
DTYPES = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, jnp.bfloat16)}
ABSMAX, MAP, NESTED, NESTED_MAP = "absmax", "quant_map", "nested_absmax", "nested_quant_map"
STATE = "quant_state.bitsandbytes__"
# Maps are computed where a file is written, and may differ by the last bit of a float32.
LAST_BITS = 3e-7
# Bytes of a state. It has seven short fields.
LONGEST_STATE = 10_000
# bitsandbytes has blocks of up to 4096 entries.
LARGEST_BLOCK = 4096
_CONFIG = "quantization_config"
_FIELDS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list[int]}
_NESTED_FIELDS = {"nested_blocksize": int, "nested_dtype": str, "nested_offset": float}


class QuantState(NamedTuple):
    """What all layers of a stack must agree in."""

    book: Book
    block: int
    nested: bool

    def __str__(self) -> str:
        nested = " with nested scales" if self.nested else ""
        return f"{self.book.name} in blocks of {self.block}{nested}"


class FourBit(NamedTuple):
    """A weight of a folder whose parts fit together; none of it but its state is in memory."""

    name: str
    values: Tensor
    parts: Mapping[str, Tensor]
    state: QuantState
    dtype: np.dtype  # of the weight that was quantized
    offset: float
    shape: tuple[int, int]  # (in, out)

    @property
    def file(self) -> Path:
        """The file that holds the quantized values."""
        return self.values.file

    def like(self) -> Flat:
        """The weight, with `jax.ShapeDtypeStruct`s for its fields."""
        nested = self.state.nested
        n_bytes, blocks, groups = _counts(math.prod(self.shape), self.state.block)
        scale = np.uint8 if nested else np.float32
        return Flat(
            jax.ShapeDtypeStruct((n_bytes,), np.uint8),
            jax.ShapeDtypeStruct((blocks,), scale),
            jax.ShapeDtypeStruct((groups,), np.float32) if nested else None,
            jax.ShapeDtypeStruct((), np.float32) if nested else None,
            self.shape,
            self.state.block,
            self.state.book,
        )

    def read(self) -> Flat:
        """The weight, with NumPy arrays for its fields.

        Raises:
          ValueError: A scale is infinite or NaN.
        """
        nested = self.state.nested
        scales = read(self.parts[ABSMAX]).reshape(-1)
        scales_of_scales = read(self.parts[NESTED]).reshape(-1) if nested else None
        part, values = (ABSMAX, scales) if scales_of_scales is None else (NESTED, scales_of_scales)
        if bad := int(np.sum(~np.isfinite(values))):
            raise ValueError(
                f"{self.name}.{part} in {self.parts[part].file} has {bad} entries of "
                f"{values.size} that are infinite or NaN. Download the folder again."
            )
        # They may be stored under the name of another dtype, as bytes all the same.
        packed = read(self.values).reshape(-1).view(np.uint8)
        offset = np.asarray(self.offset, np.float32) if nested else None
        state = self.state
        return Flat(packed, scales, scales_of_scales, offset, self.shape, state.block, state.book)


def _counts(size: int, block: int) -> tuple[int, int, int]:
    """Bytes of quantized values, scales, and scales of scales."""
    blocks = math.ceil(size / block)
    return math.ceil(size / 2), blocks, math.ceil(blocks / GROUP)


# Reading -----------------------------------------------------------------------------------------


def without_configuration(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed `config.json` without its `quantization_config`, if that is what is read here."""
    about = hf.get(_CONFIG)
    ours = (
        isinstance(about, Mapping)
        and about.get("quant_method") == "bitsandbytes"
        and (about.get("load_in_4bit") or about.get("_load_in_4bit"))
    )
    return {name: value for name, value in hf.items() if not (ours and name == _CONFIG)}


def stored(
    tensors: Mapping[str, Tensor], plan: Mapping[str, Stack]
) -> tuple[dict[str, list[FourBit]], set[str]]:
    """The layers of every parameter that bitsandbytes has quantized, and all tensors of these.

    Raises:
      ValueError: Names every weight and file in which a part is missing, of another size or kind
        than the others say, or of a form that is not read; and every stack whose layers differ.
    """
    found = _parts(tensors)
    weights: dict[str, list[FourBit]] = {}
    faults: list[str] = []
    used: set[str] = set()
    for path, stack in plan.items():
        own = {name: found.get(name, {}) for name in stack.names if name in found}
        for name in stack.names:  # Values alone: their parts are missing, not their shape wrong.
            tensor = tensors.get(name)
            if tensor and tensor.dtype == np.uint8 and tensor.shape != stack.tensor_shape:
                if stack.transposed:
                    own.setdefault(name, {})
        if not own:
            continue
        used |= own.keys() | {f"{name}.{part}" for name in own for part in own[name]}
        before = len(faults)
        layers = _layers(path, stack, tensors, own, faults)
        if len(faults) == before:
            weights[path] = layers
    refuse(
        f"{folder_of(tensors)} holds weights in four bits that cannot be read:",
        faults,
        "Download the folder again, or quantize the original model: load(folder, quantize='nf4').",
    )
    return weights, used


def _layers(
    path: str,
    stack: Stack,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
    faults: list[str],
) -> list[FourBit]:
    """The layers of one parameter, checked; what is wrong is added to `faults`."""
    if not stack.transposed or not stack.is_matrix:
        name, own = next(iter(parts.items()))
        files = ", ".join(sorted({str(part.file) for part in own.values()}))
        faults.append(
            f"{name} ('{path}') is not a linear weight, but has quantized parts in {files}"
        )
        return []
    layers = []
    for name in stack.names:
        tensor = tensors.get(name)
        if tensor is None:
            files = ", ".join(sorted({str(part.file) for part in parts.get(name, {}).values()}))
            faults.append(f"missing: {name}" + (f", whose parts are in {files}" if files else ""))
        elif name not in parts:
            faults.append(
                f"layers of '{path}' differ: {name} in {tensor.file} is dense, "
                f"{next(iter(parts))} is quantized"
            )
        else:
            layer, found = _check(name, tensor, parts[name], stack.tensor_shape)
            faults.extend(found)
            layers += [layer] if layer else []
    for layer in layers[1:]:
        if (first := layers[0]).state != layer.state:
            faults.append(
                f"layers of '{path}' differ: {layer.name} in {layer.file} is {layer.state}, "
                f"{first.name} in {first.file} is {first.state}"
            )
            break
    return layers


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors beside each weight in four bits, {weight: {rest of the name: tensor}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        weight, _, part = name.rpartition(".")
        if weight.endswith(".quant_state"):
            weight, part = weight.removesuffix(".quant_state"), f"quant_state.{part}"
        if part in (ABSMAX, MAP, NESTED, NESTED_MAP) or part.startswith("quant_state."):
            found.setdefault(weight, {})[part] = tensor
    return found


def _check(
    name: str, values: Tensor, parts: Mapping[str, Tensor], shape: Sequence[int]
) -> tuple[FourBit | None, list[str]]:
    """Whether the parts of a weight fit together, as far as can be told before it is read.

    The maps must be those of the format, up to the last bit of a float32.

    Args:
      name: Name of the weight.
      values: Its quantized values.
      parts: What is beside it, from `_parts`.
      shape: (out, in), as the model wants it.
    Returns:
      The weight, or else what is wrong with it, each fault with the names of tensor and file.
    """
    here = f"{name} in {values.file}"
    found = [part for part in parts if part.startswith("quant_state.")]
    missing = [f"{here}: {part} is missing" for part in (ABSMAX, MAP) if part not in parts]
    if len(found) != 1:
        kinds = " or ".join(f"{STATE}{kind}" for kind in BOOKS)
        said = f"{kinds} is missing" if not found else f"there are {' and '.join(sorted(found))}"
        return None, [*missing, f"{here}: {said}"]
    kind = found[0].removeprefix(STATE)
    if kind not in BOOKS:
        known = ", ".join(BOOKS)
        return None, [*missing, f"{here}: unknown quant_type: {found[0]}, known are {known}"]
    nested = any(part.startswith("nested_") for part in parts)
    at = f"{name}.{found[0]} in {parts[found[0]].file}"
    try:
        about = _parsed(parts[found[0]])
        nested = nested or any(field.startswith("nested_") for field in about)
        _check_fields(about, _FIELDS | (_NESTED_FIELDS if nested else {}))
    except (ValueError, RecursionError) as error:
        return None, [*missing, f"{at} cannot be read: {error}"]
    if nested:
        wanted = [part for part in (NESTED, NESTED_MAP) if part not in parts]
        missing += [f"{here}: {part} is missing" for part in wanted]
    faults = [f"{at} {fault}" for fault in _foreign(about, kind, tuple(shape), nested)]
    if missing or faults:
        return None, missing + faults
    state = QuantState(BOOKS[kind], about["blocksize"], nested)
    faults = _sizes(name, values, parts, tuple(shape), state) + _maps(name, parts, state)
    if faults:
        return None, faults
    offset = float(about["nested_offset"]) if nested else 0.0
    dtype = DTYPES[about["dtype"]]
    return FourBit(name, values, parts, state, dtype, offset, (shape[1], shape[0])), []


def _parsed(state: Tensor) -> dict[str, Any]:
    """The JSON object that a state holds."""
    if state.dtype != np.uint8 or math.prod(state.shape) > LONGEST_STATE:
        raise ValueError(
            f"it is {NAMES[state.dtype]} {state.shape}, and should be U8, of at most "
            f"{LONGEST_STATE} bytes"
        )
    about = json.loads(read(state).tobytes().decode())
    conform(about, Mapping[str, Any], "quant_state")
    return about


def _check_fields(about: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    if lacks := [field for field in fields if field not in about]:
        raise ValueError(f"it lacks {', '.join(lacks)}")
    for field, kind in fields.items():
        conform(about[field], kind, field)


def _foreign(
    about: Mapping[str, Any], kind: str, shape: tuple[int, ...], nested: bool
) -> list[str]:
    """In what a state differs from those that are read."""
    faults = []
    if about["quant_type"] != kind:
        faults.append(f"says quant_type={about['quant_type']!r}")
    if about["dtype"] not in DTYPES:
        faults.append(f"says dtype={about['dtype']!r}, should be one of {', '.join(DTYPES)}")
    if tuple(about["shape"]) != shape:
        faults.append(f"has the wrong shape: {tuple(about['shape'])}, should be {shape}")
    # A block may be longer than the weight, but decoding takes as much memory as a block.
    largest = max(LARGEST_BLOCK, math.prod(shape))
    if not 1 <= about["blocksize"] <= largest:
        faults.append(f"has blocksize={about['blocksize']}, should be 1 to {largest}")
    if nested:
        if about["nested_blocksize"] != GROUP:
            faults.append(f"has nested_blocksize={about['nested_blocksize']}, only {GROUP} is read")
        if about["nested_dtype"] != "float32":
            faults.append(f"has nested_dtype={about['nested_dtype']!r}, only float32 is read")
        if abs(about["nested_offset"]) > float(np.finfo(np.float32).max):
            faults.append(f"has nested_offset={about['nested_offset']}, too large for a float32")
    return faults


def _sizes(
    name: str,
    values: Tensor,
    parts: Mapping[str, Tensor],
    shape: tuple[int, ...],
    state: QuantState,
) -> list[str]:
    faults = []
    wanted_bytes, blocks, groups = _counts(math.prod(shape), state.block)
    n_bytes = math.prod(values.shape) * values.dtype.itemsize
    if n_bytes != wanted_bytes:
        faults.append(
            f"{name} in {values.file} has {n_bytes} bytes of quantized values, should have "
            f"{wanted_bytes} for {shape}"
        )
    scales = [(ABSMAX, blocks, np.dtype(np.uint8 if state.nested else np.float32))]
    scales += [(NESTED, groups, np.dtype(np.float32))] * state.nested
    for part, count, wanted in scales:
        tensor = parts[part]
        if (math.prod(tensor.shape), tensor.dtype) != (count, wanted):
            faults.append(
                f"{name}.{part} in {tensor.file} is {NAMES[tensor.dtype]} {tensor.shape}, should "
                f"be {NAMES[wanted]} ({count},) for {shape} in blocks of {state.block}"
            )
    return faults


def _maps(name: str, parts: Mapping[str, Tensor], state: QuantState) -> list[str]:
    book = state.book
    maps = [(MAP, np.asarray(book.values, np.float32), f"the values of {book.name}")]
    maps += [(NESTED_MAP, dynamic_map(), "the signed dynamic map of 8 bits")] * state.nested
    return [
        f"{name}.{part} in {parts[part].file} is not {what}, so that the quantized values mean "
        "something else"
        for part, values, what in maps
        if not _same(parts[part], values)
    ]


def _same(tensor: Tensor, values: np.ndarray) -> bool:
    return (
        tensor.dtype == np.float32
        and math.prod(tensor.shape) == values.size
        and np.allclose(read(tensor).reshape(-1), values, rtol=LAST_BITS, atol=0)
    )


# Writing -----------------------------------------------------------------------------------------


def unwritable(view: View) -> str | None:
    """Why no file holds a weight: the end of a sentence that begins with its kind."""
    weight = view.weight
    if not isinstance(weight, Flat):
        return ""
    if weight.book not in BOOKS.values():
        return f" in the format {weight.book.name}"
    if (weight.scales if weight.nested is None else weight.nested).dtype != np.float32:
        return f" with scales of {weight.scales.dtype}, should be float32"
    if view.dtype not in DTYPES.values():
        return f" that stands for {view.dtype}, should be one of {', '.join(DTYPES)}"
    return None


def written(
    name: str, view: View, layer: int | None, shape: tuple[int, ...]
) -> Iterable[tuple[str, Lazy]]:
    """The tensors of a weight, by name.

    Args:
      name: Name of the weight.
      view: View of a `Flat`, or of a stack of them.
      layer: Which of the stack; `None` where there is none.
      shape: (out, in).
    """
    w: Flat = view.weight

    def part(field: Any) -> Any:
        return field if layer is None else field[layer]

    def fetched(field: Any, shape: tuple[int, ...]) -> Lazy:
        return Lazy(shape, np.dtype(field.dtype), lambda: np.asarray(part(field)).reshape(shape))

    about: dict[str, Any] = {
        "quant_type": w.book.name,
        "blocksize": w.block,
        "dtype": np.dtype(view.dtype).name,
        "shape": shape,
    }
    yield name, fetched(w.values, (w.values.shape[-1], 1))
    yield f"{name}.{ABSMAX}", fetched(w.scales, w.scales.shape[-1:])
    yield f"{name}.{MAP}", _lazy(np.asarray(w.book.values, np.float32))
    if w.nested is not None:
        yield f"{name}.{NESTED}", fetched(w.nested, w.nested.shape[-1:])
        yield f"{name}.{NESTED_MAP}", _lazy(dynamic_map())
        about |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}
        about["nested_offset"] = float(np.asarray(part(w.offset)))
    state = np.frombuffer(json.dumps(about).encode(), np.uint8)
    yield f"{name}.{STATE}{w.book.name}", _lazy(state)


def _lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, array.dtype, lambda: array)


def configuration(view: View, dense: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json that transformers needs to load weights in four bits.

    Args:
      view: One of the weights.
      dense: Names of the linear modules that are not quantized.
    """
    return {
        _CONFIG: {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": view.weight.book.name,
            "bnb_4bit_use_double_quant": view.weight.nested is not None,
            "bnb_4bit_compute_dtype": np.dtype(view.dtype).name,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(dense),
        }
    }
