"""Methods that add nothing: they only say which of the model's own arrays are trained."""

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

    Where another method has put a weight, the array at the bottom of it is trained.

    Raises:
      ValueError: Nothing is selected, a path is not in the tree, or its array is quantized.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> sites = jp.sites(f, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.unfreeze(sites.match("b"))(jax.random.key(0), params))
      >>> list(adapter)
      ['b']
    """

    return _unfrozen(sites, "unfreeze")


def _unfrozen(sites: Sites, caller: str) -> Method:
    """`unfreeze` under the name of the method that is built on it, which its messages say."""

    def apply(key: jax.Array, tree: Any) -> Any:
        del key  # nothing is drawn
        return _mark(tree, sites, caller, _trained)

    return Method("unfreeze", {"sites": sites}, apply)


@register_method
def full_finetuning(sites: Sites) -> Method:
    """Full fine-tuning: every array of the program is trained."""
    return _unfrozen(sites.every, "full_finetuning")


@register_method
def norm_tuning(sites: Sites) -> Method:
    """Trains the scales and biases of normalizations.

    References:
      Qi et al., Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language
      Models, 2022. https://arxiv.org/abs/2211.08682
      Zhao et al., Tuning LayerNorm in Attention, 2023. https://arxiv.org/abs/2312.11420
    """
    return _unfrozen(sites.norm, "norm_tuning")


@register_method
def linear_probe(sites: Sites, *head: str) -> Method:
    """Trains the head and nothing below it.

    Args:
      sites: The parameters of the program.
      head: Path patterns of the head's arrays.
    """
    return _unfrozen(sites.every.match(*head), "linear_probe")


#: The names of the BitFit paper and the path patterns under which the field keeps these
#: biases: BERT's of Flax and PyTorch, and those of decoders. The most special comes first.
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
    """BitFit: trains biases only, those of normalizations included.

    Args:
      sites: The parameters of the program.
      subset: Which biases, by the paper's names: "query", "key", "value", "intermediate",
        "output", "attention_layernorm", "output_layernorm". `("query", "intermediate")` is
        the paper's small variant. `None` means all. Models whose paths follow none of the
        field's conventions are served by `unfreeze(sites.bias.match(...))`.

    Raises:
      ValueError: The model has no bias, a name is none of the paper's, or no bias of the model
        goes by it.

    References:
      Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
      Masked Language-models, 2021, section 3. https://arxiv.org/abs/2106.10199
    """
    biases = sites.every.bias
    if not biases:
        raise ValueError(
            f"`bitfit` trains biases, and this model adds none to anything: of its "
            f"{len(sites.every)} parameters {list(sites.every)[:20]} none is a bias. Use another "
            "method, such as `lora(8, sites.linear)`."
        )
    if subset is None:
        chosen = biases
    else:
        if unknown := sorted(set(subset) - set(_BITFIT)):
            raise ValueError(f"`bitfit(subset={unknown})`: the paper's names are {list(_BITFIT)}.")
        named = {path: _bitfit_name(path) for path in biases}
        for name in subset:
            if name not in named.values():
                raise ValueError(
                    f"`bitfit`: no bias of this model is recognized as '{name}'. Its biases are "
                    f"{list(biases)}. Select them yourself: `unfreeze(sites.bias.match(...))`."
                )
        chosen = biases.match(lambda site: named[site.path] in subset)
    return _unfrozen(chosen, "bitfit")


def _bitfit_name(path: str) -> str | None:
    for name, pattern in _BITFIT.items():
        if re.search(pattern, path):
            # "attention/output/dense" is the attention's own output, which the paper leaves out.
            inside = name == "output" and re.search(r"attention[/.]output[/.]dense", path)
            return None if inside else name
    return None


@register_method
def last_layers(sites: Sites, k: int, pattern: str = "*layer*") -> Method:
    """Trains the last k layers.

    Layers that lie in one stacked array (under a scan) are cut: the frozen and the trained
    part are joined when the tree is combined. Layers with paths of their own are told by the
    first number in the path.

    Args:
      sites: The parameters of the program.
      k: How many layers.
      pattern: Of the paths that belong to layers.

    Raises:
      ValueError: There are fewer layers, or the pattern matches none.
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
            f"`last_layers`: neither a number in a path nor a stack tells the layers of "
            f"{list(layers)[:10]} apart. Use `unfreeze(sites.match(...))`."
        )
    if not 1 <= k <= depth:
        raise ValueError(f"`last_layers(k={k})`: the model has {depth} layers; 1 <= k <= {depth}.")

    def mark(leaf: Any, path: str) -> Any:
        if numbers[path] is not None:
            return _trained(leaf, path)
        if is_view(leaf):
            raise ValueError(f"`last_layers`: '{path}' already holds another method's weight.")
        axis = [axis.role for axis in layers[path].axes].index("stack")
        cut = leaf.shape[axis] - k
        frozen, trained = (
            jax.lax.slice_in_dim(leaf, 0, cut, axis=axis),
            jax.lax.slice_in_dim(leaf, cut, leaf.shape[axis], axis=axis),
        )
        return Concatenated(frozen, Trainable(trained), axis)

    options = {"sites": sites, "k": k, "pattern": pattern}
    return Method(
        "last_layers", options, lambda key, tree: _mark(tree, chosen, "last_layers", mark)
    )


def _layer_number(path: str) -> int | None:
    found = re.search(r"(?:^|[/._])(\d+)(?=[/._]|$)", path)
    return int(found.group(1)) if found else None


def _trained(leaf: Any, path: str) -> Any:
    if isinstance(leaf, Trainable):
        return leaf
    if not is_view(leaf):
        return Trainable(leaf, fresh=False)
    inner = innermost(leaf.weight)
    if isinstance(inner, Trainable):
        return leaf
    if isinstance(inner, Weight):
        raise ValueError(
            f"`unfreeze`: '{path}' is {type(inner).__name__}, which has no array of real numbers "
            "to train. Leave it out, or train before quantizing."
        )
    weight = with_innermost(leaf.weight, lambda w: Trainable(w, fresh=False))
    return View(weight, leaf.axes, leaf.dims, leaf.dtype, leaf.path, leaf.natural)


def _mark(tree: Any, sites: Sites, caller: str, mark: Any) -> Any:
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
