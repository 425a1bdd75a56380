"""Names that adapter folders of earlier versions have, and what they are called today.

An adapter folder stays readable when a method, an option or an array is renamed: add a row here.
Folders are written with today's names only. Whoever renames anything twice changes the right side
of the first row, and adds one for the name in between.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

Names = Mapping[str, str]  # {old: new}

METHODS: Names = {
    "bottleneck": "bottleneck_adapter",
    "full": "full_finetuning",
    "parallel": "parallel_adapter",
    "prefix": "prefix_tuning",
    "prompt": "prompt_tuning",
    "sparse": "sparse_delta",
}

#: Of a method, by today's name. An option that the method still takes keeps its name.
OPTIONS: Mapping[str, Names] = {
    "adalora": {"std": "init_std"},
    "boft": {"block": "block_size", "factors": "n_butterfly_factors"},
    "bottleneck_adapter": {"reads": "adapter_input", "width": "bottleneck_dim"},
    "loftq": {"start": "init", "steps": "n_iter"},
    "lokr": {"both": "decompose_both", "factor": "decompose_factor"},
    "mam": {"width": "bottleneck_dim"},
    "moelora": {"width": "task_embedding_dim"},
    "oft": {"block": "block_size", "share": "block_share", "terms": "neumann_terms"},
    "p_tuning": {"std": "init_std"},
    "parallel_adapter": {"width": "bottleneck_dim"},
    "pissa": {"turns": "n_iter"},
    "prefix_tuning": {"slots": "positions_name", "std": "init_std"},
    "prompt_tuning": {"std": "init_std", "text": "init_text"},
    "road": {"group": "group_size"},
    "trainable_tokens": {"ids": "token_ids"},
    "unipelt": {"width": "bottleneck_dim"},
    "vera": {"initial": "d_initial"},
    "xlora": {"reads": "gate_input", "top": "top_k", "width": "hidden_size"},
}

#: Of the values of an option: {(method, option): names}, by today's name of the method and the name
#: that the option had then. A value that the option still takes keeps its name.
VALUES: Mapping[tuple[str, str], Names] = {
    ("bottleneck_adapter", "reads"): {"sum": "output_plus_residual"},
    ("loftq", "format"): {"int4/asym": "int4+asym"},
    ("loftq", "start"): {"principal": "pissa", "quantized": "loftq"},
    ("prefix_tuning", "slots"): {"virtual": "virtual_positions"},
    ("quantize", "format"): {"int4/asym": "int4+asym"},
    ("xlora", "reads"): {"hidden": "hidden_states"},
}

#: Of adapter arrays, by today's name of the method: the last part of their path. An array that the
#: method still trains keeps its name.
ARRAYS: Mapping[str, Names] = {}

#: Classes of structured weights, which a base may hold.
WEIGHTS: Names = {
    "Add": "ParallelAdapterOutput",
    "Blocks": "Blockwise",
    "Butterfly": "ButterflyRotation",
    "Columns": "PerChannel",
    "Decomposed": "WeightDecomposed",
    "GatedByInput": "RoutedByInput",
    "Hadamard": "HadamardWithBase",
    "HadamardProduct": "LowRankHadamard",
    "Kronecker": "KroneckerProduct",
    "Mixture": "TaskGatedExperts",
    "NewRows": "ReplacedRows",
    "Orthogonal": "CayleyRotation",
    "Reflected": "HouseholderReflections",
    "RotatedIn": "RotatedInputs",
    "RotatedOut": "PairRotatedOutputs",
    "ScaledIn": "ScaledInputs",
    "ScaledOut": "ScaledOutputs",
    "ScaledPart": "ScaledOutputSlice",
    "ScaledRandom": "ScaledRandomFactors",
    "Skills": "SkillMixture",
    "Tap": "ParallelAdapterInput",
    "Triplets": "SVDTriplets",
    "Turned": "ScaledPairRotations",
    "Weighed": "GatedEntries",
    "WeighedRows": "GatedRows",
}

#: Array fields of such a class, by its name of today.
FIELDS: Mapping[str, Names] = {
    "Blockwise": {"codes": "values"},
    "Codebook": {"codes": "values", "tiles": "nested"},
    "EncodedPrefix": {"slots": "virtual_positions"},
    "Flat": {"codes": "values", "tiles": "nested"},
    "Gated": {"sharpness": "inverse_temperature"},
    "GatedBottleneck": {"slots": "virtual_positions"},
    "GatedLowRank": {"slots": "virtual_positions"},
    "Int4": {"codes": "values"},
    "PerChannel": {"codes": "values"},
    "Prefix": {"slots": "virtual_positions"},
    "WeightDecomposed": {"squares": "squared_norms"},
}


def current_method(stored: Any, factories: Mapping[str, Callable]) -> Any:
    """The description of a method, with today's names.

    Args:
      stored: As JSON, not checked yet: what is not a description of a method stays as it is.
      factories: The methods by today's names.
    """
    if isinstance(stored, list):
        return [current_method(item, factories) for item in stored]
    if not isinstance(stored, dict):
        return stored
    node = {key: current_method(value, factories) for key, value in stored.items()}
    method, options = node.get("method"), node.get("options")
    if node.keys() != {"method", "options"} or not isinstance(method, str):
        return node
    if not isinstance(options, dict):
        return node
    method = METHODS.get(method, method)
    taken = inspect.signature(factories[method]).parameters if method in factories else {}
    renamed = {}
    for option, value in options.items():
        new = OPTIONS.get(method, {}).get(option, option)
        # Where a damaged file has both names, the old one is left, and then refused.
        if option in taken or new in options:
            new = option
        # Today's values stand under today's name of an option.
        stays = option == new and option in OPTIONS.get(method, {})
        names = {} if stays else VALUES.get((method, option), {})
        kept = _literals(taken[new].annotation) if new in taken else set()
        renamed[new] = _current_value(value, {k: v for k, v in names.items() if k not in kept})
    return {"method": method, "options": renamed}


def _literals(annotation: Any) -> set[Any]:
    """The values that the `Literal`s in an annotation allow."""
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return set(args)
    return {value for arg in args for value in _literals(arg)}


def _current_value(value: Any, names: Names) -> Any:
    """The value of an option, or those that it has by pattern of path."""
    if isinstance(value, str):
        return names.get(value, value)
    if (
        isinstance(value, dict)
        and value.keys() == {"mapping"}
        and isinstance(value["mapping"], dict)
    ):
        return {"mapping": {k: _current_value(v, names) for k, v in value["mapping"].items()}}
    return value


def current_arrays(
    paths: Iterable[str], trained: Container[str], methods: Iterable[str]
) -> dict[str, str]:
    """{path in the folder: path of today} of adapter arrays.

    Args:
      paths: Paths of all arrays of the folder.
      trained: Paths of the arrays that the methods train today.
      methods: Today's names of the methods.
    """
    names: dict[str, str] = {}
    for method in methods:
        names |= ARRAYS.get(method, {})
    current = {}
    for path in paths:
        above, slash, name = path.rpartition("/")
        new = f"{above}{slash}{names.get(name, name)}"
        current[path] = new if path not in trained and new in trained else path
    return current


def current_weight(name: str | None) -> str | None:
    """Today's name of a class of weights; `None`, for an array, has none."""
    return None if name is None else WEIGHTS.get(name, name)


def first_field(weight: Any, field: str) -> str:
    """The first name that a field of a weight has had: hashes of a base are taken over these."""
    names = FIELDS.get(current_weight(type(weight).__name__) or "", {})
    return next((old for old, new in names.items() if new == field), field)
