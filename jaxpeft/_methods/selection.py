"""Methods that add no arrays: they select which of the model's own arrays are trained."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxpeft._marks import Concatenated, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import Sites
from jaxpeft._tree import flatten, unflatten
from jaxpeft._view import View, is_view
from jaxpeft._weight import Weight, innermost, with_innermost
from jaxpeft.extend._apply import check_any, check_whole, signed


@register_method
def unfreeze(sites: Sites) -> Method:
    """Trains the selected arrays themselves.

    If another method was put on a selected array before, the base array inside that method's
    weight is trained, beside the arrays that the other method trains.

    Args:
      sites: The arrays to train: matrices, biases, scales, or others.

    Returns:
      A `Method` with all parameters of the selected arrays as trainable parameters.

    Raises:
      ValueError: Nothing is selected, a path is not in the tree, or its array is quantized.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.unfreeze(sites.match("b"))(jax.random.key(0), params))
      >>> list(adapter)
      ['b']
    """
    return _unfrozen(sites, "unfreeze")


def _unfrozen(sites: Sites, caller: str) -> Method:
    """`unfreeze` for methods that are built on it, with their name in its error messages."""

    def apply(key: jax.Array, tree: Any) -> Any:
        del key  # nothing is random
        return _mark(tree, sites, caller, _trainable)

    return Method("unfreeze", {"sites": sites}, apply)


@register_method
def full_finetuning(sites: Sites) -> Method:
    """Full fine-tuning: trains every array of the model.

    Args:
      sites: The parameters of the model, or any selection of them.

    Returns:
      A `Method` with all parameters of the model as trainable parameters.

    Raises:
      ValueError: The model has no parameter, or one of its arrays is quantized.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> method = jp.full_finetuning(jp.sites(fn, params, jnp.ones((1, 8))))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> sorted(adapter)
      ['b', 'w']
    """
    return _unfrozen(sites.every, "full_finetuning")


@register_method
def norm_tuning(sites: Sites) -> Method:
    """Trains the scales and biases of normalizations, such as LayerNorm and RMSNorm.

    Args:
      sites: The parameters of the model. `sites.norm` are the ones that are trained.

    Returns:
      A `Method` with all parameters of the normalizations as trainable parameters.

    Raises:
      ValueError: The selection has no normalization.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: jax.nn.standardize(x @ p["w"]) * p["norm/scale"] + p["norm/bias"]
      >>> params = {"w": jnp.ones((8, 4)), "norm/scale": jnp.ones(4), "norm/bias": jnp.ones(4)}
      >>> method = jp.norm_tuning(jp.sites(fn, params, jnp.ones((1, 8))))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> sorted(adapter)
      ['norm/bias', 'norm/scale']

    References:
      Qi et al., Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language
      Models, 2022. https://arxiv.org/abs/2211.08682
      Zhao et al., Tuning LayerNorm in Attention, 2023. https://arxiv.org/abs/2312.11420
    """
    return _unfrozen(sites.norm, "norm_tuning")


@register_method
def linear_probe(sites: Sites, *head: str) -> Method:
    """Linear probing: trains the head and freezes the rest of the model.

    Args:
      sites: The parameters of the model.
      head: Path patterns of the head's arrays.

    Returns:
      A `Method` with all parameters of the head as trainable parameters.

    Raises:
      ValueError: There is no pattern, or one matches no parameter.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: jax.nn.relu(x @ p["trunk"]) @ p["head"]
      >>> params = {"trunk": jnp.ones((8, 4)), "head": jnp.ones((4, 2))}
      >>> method = jp.linear_probe(jp.sites(fn, params, jnp.ones((1, 8))), "head")
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> sorted(adapter)
      ['head']
    """
    if not head:
        raise ValueError(
            "`linear_probe(sites, *head)` needs path patterns of the head, such as "
            "`linear_probe(sites, 'head*')`."
        )
    return _unfrozen(sites.every.match(*head), "linear_probe")


#: Names of biases in the BitFit paper, and regular expressions for their usual paths in BERT models
#: of Flax and PyTorch and in decoders. The first one that matches a path wins.
_BITFIT = {
    "attention_layernorm": r"attention[/.]output[/.](LayerNorm|layer_norm)|attn_norm|attention_norm"
    r"|sa_layer_norm|input_layernorm",
    "output_layernorm": r"(^|[/.])(\d+|layers?|output)[/.](output[/.])?(LayerNorm|layer_norm)"
    r"|output_layer_norm|mlp_norm|post_attention_layernorm",
    "query": r"query|q_proj|q_lin|attn[/.]q[/.]|attention[/.]q[/.]",
    "key": r"key|k_proj|k_lin|attn[/.]k[/.]|attention[/.]k[/.]",
    "value": r"value|v_proj|v_lin|attn[/.]v[/.]|attention[/.]v[/.]",
    "intermediate": r"intermediate|fc1|up_proj|mlp[/.]up|lin1|c_fc",
    "output": r"output[/.]dense|fc2|down_proj|mlp[/.]down|lin2|mlp[/.]c_proj",
}


@register_method
def bitfit(sites: Sites, subset: Sequence[str] | None = None) -> Method:
    """BitFit: trains the biases only, including those of normalizations.

    Args:
      sites: The parameters of the model.
      subset: The biases to train, by their names in the paper: "query", "key", "value",
        "intermediate", "output", "attention_layernorm", "output_layernorm". The paper's small
        variant is `("query", "intermediate")`. `None` trains all biases. The names are recognized
        by the usual paths of Flax and PyTorch models; for other paths, use
        `unfreeze(sites.bias.match(...))`.

    Returns:
      A `Method` with all parameters of the selected biases as trainable parameters.

    Raises:
      ValueError: The model has no bias, a name is not one of the paper's, or no bias of the model
        is recognized by it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> method = jp.bitfit(jp.sites(fn, params, jnp.ones((1, 8))))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> list(adapter)
      ['b']

    References:
      Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
      Masked Language-models, 2021, section 3. https://arxiv.org/abs/2106.10199
    """
    biases = sites.every.bias
    if not biases:
        raise ValueError(
            f"`bitfit` trains biases, but none of the {len(sites.every)} parameters of this model "
            f"is one: {list(sites.every)[:20]}. Use another method, such as "
            "`lora(8, sites.linear)`."
        )
    if subset is None:
        chosen = biases
    else:
        if unknown := sorted(set(subset) - set(_BITFIT)):
            raise ValueError(f"`bitfit(subset={unknown})`: choose from {list(_BITFIT)}.")
        named = {path: _bitfit_name(path) for path in biases}
        for name in subset:
            if name not in named.values():
                raise ValueError(
                    f"`bitfit`: no bias of this model is recognized as '{name}'. Its biases are "
                    f"{list(biases)}. Select them by path: `unfreeze(sites.bias.match(...))`."
                )
        chosen = biases.match(lambda site: named[site.path] in subset)
    return _unfrozen(chosen, "bitfit")


def _bitfit_name(path: str) -> str | None:
    """The paper's name of a bias with this path, or `None`."""
    for name, pattern in _BITFIT.items():
        if re.search(pattern, path):
            # The paper has no name for the bias of the attention's output projection.
            inside = name == "output" and re.search(r"attention[/.]output[/.]dense", path)
            return None if inside else name
    return None


@register_method
def last_layers(sites: Sites, k: int, pattern: str = "*layer*") -> Method:
    """Trains the last k layers.

    Layers that are stacked in one array, as under a scan, are split into a frozen array and a
    trainable one, which `combine` concatenates. Layers with their own paths are recognized by the
    first number in the path.

    Args:
      sites: The parameters of the model.
      k: Number of layers to train, at least 1.
      pattern: Path pattern of the parameters that belong to layers.

    Returns:
      A `Method` with all parameters of the last k layers as trainable parameters.

    Raises:
      ValueError: The model has fewer than k layers, or layers cannot be recognized in the paths
        that the pattern matches.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"])[0]
      >>> params = {"layers": jnp.ones((6, 4, 4))}
      >>> method = jp.last_layers(jp.sites(fn, params, jnp.ones((1, 4))), 2)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'layers/trained_part': (2, 4, 4)}
    """
    layers = sites.every.match(pattern)
    numbers = {path: _layer_number(path) for path in layers}
    stacked = {path: site.stack[0] for path, site in layers.items() if site.stack}
    if any(n is not None for n in numbers.values()):
        depth = 1 + max(n for n in numbers.values() if n is not None)
        chosen = layers.match(lambda s: (numbers[s.path] or 0) >= depth - k)
    elif stacked:
        depth, chosen = max(stacked.values()), layers
    else:
        raise ValueError(
            f"`last_layers`: the paths {list(layers)[:10]} have no layer number, and their arrays "
            "are not stacks of layers. Use `unfreeze(sites.match(...))`."
        )
    if not 1 <= k <= depth:
        raise ValueError(
            f"`last_layers(k={k})`: the model has {depth} layers; give 1 <= k <= {depth}."
        )

    def mark(leaf: Any, path: str) -> Any:
        if numbers[path] is not None:
            return _trainable(leaf, path)
        if is_view(leaf):
            raise ValueError(
                f"`last_layers`: '{path}' holds the weight of another method already, so its stack "
                "of layers cannot be split. Leave it out of the pattern."
            )
        axis = [axis.role for axis in layers[path].axes].index("stack")
        n_frozen = leaf.shape[axis] - k
        frozen, last = (
            jax.lax.slice_in_dim(leaf, 0, n_frozen, axis=axis),
            jax.lax.slice_in_dim(leaf, n_frozen, leaf.shape[axis], axis=axis),
        )
        return Concatenated(frozen, Trainable(last), axis)

    options = {"sites": sites, "k": k, "pattern": pattern}
    return Method(
        "last_layers", options, lambda key, tree: _mark(tree, chosen, "last_layers", mark)
    )


def _layer_number(path: str) -> int | None:
    """The first number in a path, or `None`."""
    found = re.search(r"(?:^|[/._])(\d+)(?=[/._]|$)", path)
    return int(found.group(1)) if found else None


def _trainable(leaf: Any, path: str) -> Any:
    """A leaf of the tree with its base array marked as trainable."""
    if isinstance(leaf, Trainable):
        return leaf
    if not is_view(leaf):
        return Trainable(leaf, fresh=False)
    inner = innermost(leaf.weight)
    if isinstance(inner, Trainable):
        return leaf
    if isinstance(inner, Weight):
        raise ValueError(
            f"`unfreeze`: '{path}' is {type(inner).__name__}, which has no floating-point array to "
            "train. Leave it out of the sites, or unfreeze a base that is not quantized."
        )
    weight = with_innermost(leaf.weight, lambda w: Trainable(w, fresh=False))
    return View(weight, leaf.axes, leaf.dims, leaf.dtype, leaf.path, leaf.natural)


def _mark(tree: Any, sites: Sites, caller: str, mark: Any) -> Any:
    """The tree with `mark(leaf, path)` at the path of every site."""
    check_any(caller, sites)
    check_whole(caller, sites)
    flat, treedef = flatten(
        tree, is_leaf=lambda x: is_view(x) or isinstance(x, (Trainable, Concatenated))
    )
    for path in sites:
        if path not in flat:
            raise ValueError(f"`{caller}` selects '{path}', but the tree has {list(flat)[:20]}.")
        flat[path] = signed(mark(flat[path], path), caller, path)
    return unflatten(treedef, list(flat.values()))
