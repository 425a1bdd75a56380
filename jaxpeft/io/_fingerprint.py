"""The fingerprint of a base in an adapter folder, and how another base is compared with it.

The fingerprint of a parameter is its shape, its dtype, a hash of up to 64 of its values, and a few
of these values as they are. The hash detects any difference; the few values tell whether it is
one of rounding or of another model.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from jaxpeft._method import Method
from jaxpeft._tree import flatten
from jaxpeft._view import View, is_view
from jaxpeft._weight import IN
from jaxpeft.io._aliases import current_weight, first_field

#: Which bases are allowed: see `load_adapter`.
Base = Literal["same", "any precision", "any values"]

_HASHED = 64  # values of each parameter that are hashed
_KEPT = 8  # values of these that are kept as numbers

#: The fingerprint of one parameter in a description of format 2.
ENTRY: Mapping[str, Any] = {
    "shape": list[int],
    "dtype": str,
    "weight": str | None,
    "values": str,
    "sample": list[float | None],
}

#: Methods that compute their initial update from the values of the base and subtract it there.
STARTS = ("pissa", "olora", "loftq")


def fingerprint(
    params: Any, replaced: Mapping[str, tuple[int, Sequence[int]]] | None = None
) -> dict[str, dict[str, Any]]:
    """{path: fingerprint} of every parameter of a base, be it an array or a structured weight.

    Args:
      params: The base.
      replaced: {path: (axis, indices)} of the values that an adapter replaces. They are left out
        of the fingerprint.
    """
    flat, _ = flatten(params, is_leaf=is_view)
    return {path: _entry(x, (replaced or {}).get(path)) for path, x in flat.items()}


def _entry(x: Any, replaced: tuple[int, Sequence[int]] | None) -> dict[str, Any]:
    entry = {"shape": list(x.shape), "dtype": jnp.dtype(x.dtype).name}
    if is_view(x):
        leaves = {path: leaf for path, leaf in _fields(x).items() if hasattr(leaf, "shape")}
        rows = [[path, str(leaf.dtype), _hash(_sampled(leaf))] for path, leaf in leaves.items()]
        name = type(x.weight).__name__
        return {**entry, "weight": name, "values": _hash_of_text(str(rows)), "sample": []}
    values = _sampled(x, replaced)
    kept = values[:: max(1, len(values) // _KEPT)][:_KEPT]
    numbers = [] if jnp.issubdtype(kept.dtype, jnp.complexfloating) else kept.astype(float).tolist()
    sample = [float(f"{v:.6g}") if math.isfinite(v) else None for v in numbers]
    return {**entry, "weight": None, "values": _hash(values), "sample": sample}


def _fields(view: View) -> dict[str, Any]:
    """{path: leaf} of a structured weight, by the first names of its fields.

    The hash of a weight is taken over these names too, and has to outlast that they change.
    """
    fields = {}
    for path, leaf in flatten(view)[0].items():
        node, names = view.weight, []
        for name in path.split("/"):
            names.append(first_field(node, name))
            node = getattr(node, name, None)
        fields["/".join(names)] = leaf
    return fields


def _sampled(x: Any, replaced: tuple[int, Sequence[int]] | None = None) -> np.ndarray:
    """Up to 64 values, spread over the array, without those that an adapter replaces."""
    shape = list(x.shape)
    rows = None
    if replaced is not None:
        axis, without = replaced
        rows = np.setdiff1d(np.arange(shape[axis]), np.asarray(without, int))
        shape[axis] = len(rows)
    size = math.prod(shape)
    if not size:
        return np.zeros(0, x.dtype)
    at = np.linspace(0, size - 1, min(_HASHED, size)).astype(np.int64)
    where = list(np.unravel_index(at, shape)) if shape else []
    if rows is not None:
        where[axis] = rows[where[axis]]
    return np.atleast_1d(np.asarray(x[tuple(where)]))


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def _hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def replaced_by(method: Any, trained: Mapping[str, Any]) -> dict[str, tuple[int, Sequence[int]]]:
    """{path: (axis, indices)} of the values of a base that an adapter replaces.

    Args:
      method: The method of the adapter.
      trained: {path: [shape, dtype]} of the adapter's arrays.
    """
    found: dict[str, tuple[int, Sequence[int]]] = {}
    for step in steps(method):
        if step.name == "trainable_tokens":
            ids = step.options.get("token_ids", step.options.get("ids"))
            for path, site in step.options["sites"].items():
                axes = [axis.role for axis in site.axes]
                if len(axes) == len(site.shape) and axes.count(IN) == 1:
                    found[path] = (axes.index(IN), ids)
        if step.name == "last_layers":
            for path, site in step.options["sites"].every.items():
                if f"{path}/trained_part" in trained:
                    ends = trained[f"{path}/trained_part"][0]
                    pairs = enumerate(zip(site.shape, ends, strict=True))
                    axis = next((i for i, (whole, part) in pairs if whole != part), 0)
                    found[path] = (axis, range(site.shape[axis] - ends[axis], site.shape[axis]))
    return found


def steps(method: Any) -> list[Method]:
    """The methods in a chain and in the chains inside it; for any other method, itself alone."""
    if method.name != "chain":
        return [method]
    return [step for one in method.options["methods"] for step in steps(one)]


# Comparing ----------------------------------------------------------------------------------------


def check_base(
    stored: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Mapping[str, Any]],
    method: Method,
    trained: Mapping[str, Any],
    base: Base,
) -> bool:
    """Whether the given base is the one that the adapter was trained on.

    Args:
      stored, found: Fingerprints of the base of training and of the given base.
      method: The method of the adapter.
      trained: {path: ...} of the adapter's arrays. The values of a parameter that is trained as a
        whole (a new head) come from the adapter.
      base: Which other bases are allowed.

    Raises:
      ValueError: The given base is neither that one nor allowed; names the first difference.
    """
    if base not in get_args(Base):
        raise ValueError(f"`load_adapter(base={base!r})` should be one of {list(get_args(Base))}.")
    differs = False
    for path in [*stored, *(p for p in found if p not in stored)]:
        before, now = stored.get(path), found.get(path)
        if before is None or now is None:
            what = "only the given base has" if before is None else "the given base lacks"
            fault = f"{what} '{path}'"
            if path in trained and before is not None:
                raise ValueError(f"{fault}. {_whole(before)}")
            raise ValueError(f"{fault}. {_prefixed(stored, found)}")
        for name in ("shape", "weight", "dtype", "values"):
            was, given = before[name], now[name]
            if name == "weight":
                was, given = current_weight(was), current_weight(given)
            if was == given or was is _UNKNOWN or name == "values" and path in trained:
                continue
            differ = "differ" if name == "values" else "differs"
            fault = f"the {name} of '{path}' {differ}: trained on {was}, given {given}"
            if name == "weight":
                fault = f"'{path}' was {_kind(was)} in training, and is {_kind(given)} here"
            if path in trained and (base == "same" or name == "shape"):
                raise ValueError(f"{fault}. {_whole(before)}")
            if name == "shape":
                raise ValueError(f"{fault}. Give the params of the model that it was trained on.")
            differs = True
            near = _near(before, now)
            if base == "same":
                raise ValueError(f"{fault}. {_remedy(before, now, near, method)}")
            if base == "any precision" and name == "values" and not near:
                raise ValueError(
                    f"{fault}, and by more than rounding. Give the params that it was trained on, "
                    "in any dtype, or allow others: `load_adapter(..., base='any values')`."
                )
    if differs and (names := [step.name for step in steps(method) if step.name in STARTS]):
        raise ValueError(
            f"`{names[0]}` computes its initial update from the base and subtracts it there, so "
            "that it needs exactly the base that it was trained on. Where you have that base, "
            f"{_PLAIN[names[0] == 'loftq']}."
        )
    return not differs


_PLAIN = (
    "convert the adapter to plain LoRA with `to_lora`, and save that",
    "merge the model into plain arrays with `merge`, and save those",
)


#: In format 1: a property of a parameter that is not known, and a structured weight of any class.
_UNKNOWN: Any = object()
_SOME = "of some format"


def _kind(weight: str | None) -> str:
    return "a plain array" if weight is None else f"structured ({weight})"


def _near(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether values are the same except for rounding, as far as this is known.

    It is not known for quantized weights, nor for any values in format 1. Values may have been
    rounded earlier to a coarser dtype than their own, so that the rounding of bfloat16 is always
    allowed.
    """
    if before["weight"] or now["weight"]:
        return True
    if before["sample"] is _UNKNOWN:
        return bool(before["dtype"] != now["dtype"])
    if len(before["sample"]) != len(now["sample"]):
        return False
    dtypes = [jnp.dtype(entry["dtype"]) for entry in (before, now)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return before["sample"] == now["sample"]
    infos = [jnp.finfo(dtype) for dtype in (*dtypes, jnp.bfloat16)]
    step = max(float(info.eps) for info in infos)
    least = max(float(info.smallest_subnormal) for info in infos)
    pairs = zip(before["sample"], now["sample"], strict=True)
    return all(
        a == b or None not in (a, b) and abs(a - b) <= step * max(abs(a), abs(b)) + least
        for a, b in pairs
    )


def _remedy(before: Mapping, now: Mapping, near: bool, method: Method) -> str:
    """What to do where the base is another one of the same shapes."""
    if near:
        allow = "base='any precision'"
        if now["weight"] and any(step.name == "quantize" for step in steps(method)):
            allow += ", quantize=None"
        return (
            "Give the params that it was trained on, in the same dtype. If these are the same "
            f"weights in another precision, allow that: `load_adapter(..., {allow})`."
        )
    return (
        "Give the params that it was trained on. If you mean this base (because it was trained "
        "further, for example), allow it: `load_adapter(..., base='any values')`."
    )


def _whole(before: Mapping[str, Any]) -> str:
    return (
        f"Give an array of shape {before['shape']} in {before['dtype']} with any values: the "
        "adapter replaces them."
    )


def _prefixed(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What to do where paths differ: often the trees differ by one level."""
    for outer, inner, how in ((found, stored, "give what is in"), (stored, found, "put them in")):
        first = {path.split("/")[0] for path in outer}
        if len(first) == 1 and {path.partition("/")[2] for path in outer} == {*inner}:
            return f"All paths differ by '{first.pop()}/': {how} it."
    return "Give the params that it was trained on."


# Format 1 -----------------------------------------------------------------------------------------


def _leaf_fingerprint(params: Any) -> dict[str, list]:
    """{path: [shape, dtype, hash of values]} of every array of a base, as in format 1."""
    leaves: dict[str, Any] = {}
    for path, x in flatten(params, is_leaf=is_view)[0].items():
        fields = _fields(x) if is_view(x) else {"": x}
        leaves |= {f"{path}/{name}" if name else path: leaf for name, leaf in fields.items()}
    return {
        path: [list(x.shape), jnp.dtype(x.dtype).name, _hash(_sampled(x))]
        for path, x in leaves.items()
    }


def of_leaves(
    stored: Mapping[str, list], params: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Fingerprints of the base of training, in format 1, and of a base, in the form of format 2.

    In format 1 every array of a structured weight has a path of its own. Those that lie below a
    parameter of the given base are taken for parts of that parameter.
    """
    flat, _ = flatten(params, is_leaf=is_view)
    leaves = _leaf_fingerprint(params)
    groups: dict[str, list[str]] = {}
    for path in stored:
        above = next((p for p in flat if path.startswith(f"{p}/")), path)
        groups.setdefault(path if path in flat else above, []).append(path)
    before = {}
    for owner, paths in groups.items():
        if paths == [owner]:
            shape, dtype, values = stored[owner]
            before[owner] = _old(shape, dtype, None, values)
        else:
            own = [[path, *stored[path]] for path in paths]
            before[owner] = _old(_UNKNOWN, _UNKNOWN, _SOME, _hash_of_text(str(own)))
    now = {}
    for path, x in flat.items():
        own = [[p, *leaves[p]] for p in leaves if p == path or p.startswith(f"{path}/")]
        plain = [row[0] for row in own] == [path]
        weight, values = (None, own[0][3]) if plain else (_SOME, _hash_of_text(str(own)))
        now[path] = _old(list(x.shape), jnp.dtype(x.dtype).name, weight, values)
    return before, now


def _old(shape: Any, dtype: Any, weight: str | None, values: str) -> dict[str, Any]:
    return dict(shape=shape, dtype=dtype, weight=weight, values=values, sample=_UNKNOWN)
