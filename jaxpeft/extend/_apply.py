"""How a method puts its weights into a tree: the loop and the checks that all methods share."""

import dataclasses
from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Concatenated, Placeholder, Trainable
from jaxpeft._sites import Site, Sites
from jaxpeft._tree import flatten, key_for_path, unflatten
from jaxpeft._view import View, is_view
from jaxpeft._weight import IN, OUT


def apply_to_sites(
    key: jax.Array,
    tree: Any,
    sites: Sites,
    make: Callable[[jax.Array, Site, View], View],
    *,
    caller: str,
    vectors: bool = False,
    parts: bool = False,
) -> Any:
    """The tree with `make(key, site, view)` in the place of every selected parameter.

    Args:
      key: The method's PRNG key. `make` gets it with the path folded in, so that selecting more
        weights changes no other weight's initial values.
      tree: Parameters, or what another method returned.
      sites: The selected parameters.
      make: Returns the new view. The old one holds the array, or another method's weight.
      caller: Name of the method as the user calls it, for messages.
      vectors: Whether biases and scales may be selected too.
      parts: Whether `make` respects `site.part`. If not, a selected slice of the outputs is
        refused.

    Raises:
      ValueError: Nothing is selected, a selected parameter is not a matrix, or the tree has no
        such path or another shape there.
    """
    check_any(caller, sites)
    if not parts:
        check_whole(caller, sites)
    flat, treedef = flatten(
        tree, is_leaf=lambda x: is_view(x) or isinstance(x, (Trainable, Concatenated))
    )
    for path, site in sites.items():
        if path not in flat:
            raise ValueError(
                f"`{caller}` selects '{path}', which this tree does not have. It has "
                f"{list(flat)[:20]}. Were the sites found on another model?"
            )
        if tuple(flat[path].shape) != site.shape:
            raise ValueError(
                f"`{caller}`: '{path}' has shape {tuple(flat[path].shape)}, but had "
                f"{site.shape} when the sites were found."
            )
        if not vectors and not site.is_matrix:
            raise ValueError(
                f"`{caller}` selects '{path}' of shape {site.shape}, which the model uses as "
                f"{', '.join(sorted(site.kinds)) or 'nothing'}, not as a matrix. Select from "
                "`sites.matrices`."
            )
        if isinstance(flat[path], Concatenated):
            raise ValueError(
                f"`{caller}`: another method trains a part of '{path}' already. Leave it out of "
                "the sites of one of the two."
            )
        flat[path] = signed(
            make(key_for_path(key, path), site, site.view(flat[path])), caller, path
        )
    return unflatten(treedef, list(flat.values()))


def signed(node: Any, caller: str, path: str) -> Any:
    """The node with the method's name and the path in the marks that it made, for messages."""

    def one(x: Any) -> Any:
        if not isinstance(x, Trainable) or x.method is not None:
            return x
        return dataclasses.replace(x, method=caller, path=path)

    return jax.tree.map(one, node, is_leaf=lambda x: isinstance(x, Trainable))


def check_any(caller: str, sites: Sites) -> None:
    """Raises ValueError if nothing is selected; lists the parameters to choose from.

    Args:
      caller: Name of the method as the user calls it.
      sites: The selection.
    """
    if not sites:
        raise ValueError(f"`{caller}` selects no parameter. {sites.choices()}")


def check_whole(caller: str, sites: Sites) -> None:
    """Raises ValueError if a slice of the outputs is selected (`Sites.output_slice`).

    Args:
      caller: Name of the method as the user calls it.
      sites: The selection.
    """
    for site in sites.values():
        if site.part is not None:
            raise ValueError(
                f"`{caller}`: a part of the columns of '{site.path}' is selected ({site.part}), "
                "but the method acts on all of them. Select the whole weight, or use `lora` or "
                "`ia3`."
            )


def check_rank(caller: str, rank: int, site: Site) -> None:
    """Raises ValueError unless a rank is an integer in [1, min(in, out)].

    Args:
      caller: Name of the method as the user calls it.
      rank: The rank.
      site: The matrix, which the message names.
    """
    n, m = site.size(IN), site.size(OUT)
    m = site.part.size(m) if site.part else m
    if not (isinstance(rank, Integral) and 1 <= rank <= min(n, m)):
        raise ValueError(
            f"`{caller}(rank={rank})` needs 1 <= rank <= min(in, out), a whole number, but "
            f"'{site.path}' of shape {site.shape} is {n} x {m}. Choose another rank, or leave this "
            "weight out of the sites."
        )


def check_entries(caller: str, site: Site, view: View) -> None:
    """Raises ValueError if another method's weight has no dense equivalent.

    For methods that act on the entries of the matrix.

    Args:
      caller: Name of the method as the user calls it.
      site: The matrix, which the message names.
      view: What the tree has there.
    """
    if not view.is_mergeable:
        raise ValueError(
            f"`{caller}`: '{site.path}' holds {type(view.weight).__name__}, which has no dense "
            f"equivalent, and so no entries for `{caller}` to act on. Put that method behind "
            f"`{caller}` in the `chain`, or leave the weight out of the sites."
        )


def check_floating(caller: str, path: str, dtype: Any, *, instead: str = "use `lora`") -> None:
    """Raises ValueError if a weight is complex or of integers.

    Args:
      caller: Name of the method as the user calls it.
      path: Path of the weight, which the message names.
      dtype: Dtype of the weight.
      instead: What the message advises other than to leave the weight out.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{caller}`: '{path}' is {dtype}, but the method computes with real floating-point "
            "numbers and would lose the imaginary parts of others, or round integers. Leave the "
            f"weight out of the sites, or {instead}."
        )


def at_its_start(view: View) -> View:
    """The view with the initial values of trained arrays, and without values of the call."""

    def value(x: Any) -> Any:
        return x.value if isinstance(x, Trainable) else None if isinstance(x, Placeholder) else x

    return jax.tree.map(value, view, is_leaf=lambda x: isinstance(x, (Trainable, Placeholder)))


def bias_of(site: Site, sites: Sites) -> Placeholder | None:
    """The bias that the model adds to a weight's product, for a field with axes ("out",).

    Args:
      site: The weight.
      sites: Any selection of the sites that it comes from.

    Returns:
      What to put into the field; `None` if the model adds no bias.

    Raises:
      ValueError: The bias does not have one entry for each output, belongs to another stack, or
        is not added unscaled, once to each product.
    """
    if site.bias_mismatch:
        raise ValueError(
            f"The method needs to know what the model adds to the product of '{site.path}': one "
            f"bias, as it is, each time. But the model {site.bias_mismatch}. Leave '{site.path}' "
            "out of the targets, or fold the sign or the factor into the bias."
        )
    if site.bias is None:
        return None
    bias = sites.every[site.bias]
    if bias.size(OUT) != site.size(OUT) or bias.stack not in ((), site.stack):
        raise ValueError(
            f"The model adds '{bias.path}' of shape {bias.shape} to the product of "
            f"'{site.path}' of shape {site.shape}, and the method needs to know which entry "
            f"belongs to which output: {bias.size(OUT)} entries for {site.size(OUT)} outputs, "
            f"in stacks {bias.stack} and {site.stack}. Leave '{site.path}' out of the targets."
        )
    return Placeholder(bias.path, stack=site.stack, axes=bias.axes)


def vector_of(vector: Site, site: Site) -> Placeholder:
    """A scale or bias of the model, for a field with axes ("out",) of a weight at `site`.

    Raises:
      ValueError: It does not have one entry for each output, or belongs to another stack.
    """
    if vector.size(OUT) != site.size(OUT) or vector.stack not in ((), site.stack):
        raise ValueError(
            f"'{vector.path}' of shape {vector.shape} does not have one entry for each of the "
            f"{site.size(OUT)} outputs of '{site.path}', in its stack {site.stack}. Choose the "
            "norm that follows this weight."
        )
    return Placeholder(vector.path, stack=site.stack, axes=vector.axes)
