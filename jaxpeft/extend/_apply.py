"""How a method puts its weights into a tree: the one loop that all methods share."""

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
    """The tree with `make(key, site, view)` at the place of every selected matrix.

    Args:
      key: Folded by path, so that selecting more weights changes no other one.
      tree: Parameters, in part structured weights already.
      sites: The selected parameters.
      make: The new view from the old one, which may hold another method's weight.
      caller: The call as the user wrote it, for messages.
      vectors: Whether biases and scales may be among them.
      parts: Whether `make` minds `site.part`; if not, a part of the outputs is refused.

    Raises:
      ValueError: Nothing is selected, a selected parameter is no matrix, or the tree has no
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
            raise ValueError(f"`{caller}`: '{path}' is trained in part by another method already.")
        flat[path] = signed(
            make(key_for_path(key, path), site, site.view(flat[path])), caller, path
        )
    return unflatten(treedef, list(flat.values()))


def signed(node: Any, caller: str, path: str) -> Any:
    """The node with the name of the method in the marks that it has made, for messages."""

    def one(x: Any) -> Any:
        if not isinstance(x, Trainable) or x.method is not None:
            return x
        return dataclasses.replace(x, method=caller, path=path)

    return jax.tree.map(one, node, is_leaf=lambda x: isinstance(x, Trainable))


def check_any(caller: str, sites: Sites) -> None:
    """Raises ValueError where nothing is selected; lists what there is to choose from."""
    if not sites:
        raise ValueError(f"`{caller}` selects no parameter. {sites.what_there_is()}")


def check_whole(caller: str, sites: Sites) -> None:
    """Raises ValueError where a part of the outputs is selected; names the weight."""
    for site in sites.values():
        if site.part is not None:
            raise ValueError(
                f"`{caller}`: a part of the columns of '{site.path}' is selected ({site.part}), but "
                "the method acts on all of them. Select the weight, or use `lora` or `ia3`."
            )


def check_rank(caller: str, rank: int, site: Site) -> None:
    """Raises ValueError where a rank is no whole number in [1, min(in, out)]; names the weight."""
    n, m = site.size(IN), site.size(OUT)
    m = site.part.size(m) if site.part else m
    if not (isinstance(rank, Integral) and 1 <= rank <= min(n, m)):
        raise ValueError(
            f"`{caller}(rank={rank})` needs 1 <= rank <= min(in, out), a whole number, but "
            f"'{site.path}' of shape {site.shape} is {n} x {m}. Choose another rank, or leave this "
            "weight out of the sites."
        )


def check_entries(caller: str, site: Site, view: View) -> None:
    """Raises ValueError where another method's weight is no matrix; names both."""
    if not view.is_mergeable:
        raise ValueError(
            f"`{caller}`: '{site.path}' holds {type(view.weight).__name__}, which is no matrix and "
            f"has no entries to change. Put that method behind `{caller}` in the `chain`, or leave "
            "the weight out."
        )


def check_floating(caller: str, path: str, dtype: Any, *, instead: str = "use `lora`") -> None:
    """Raises ValueError where a weight is of complex numbers or integers; names it.

    Args:
      caller: The call as the user wrote it.
      path: Of the weight.
      dtype: Of the weight.
      instead: What to do other than to leave it out.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{caller}`: '{path}' is {dtype}, but the method computes with floating-point numbers "
            f"and would drop a part of it. Leave the weight out of the sites, or {instead}."
        )


def at_its_start(view: View) -> View:
    """The view with trained arrays where they start, and nothing of what a call gives."""

    def value(x: Any) -> Any:
        return x.value if isinstance(x, Trainable) else None if isinstance(x, Placeholder) else x

    return jax.tree.map(value, view, is_leaf=lambda x: isinstance(x, (Trainable, Placeholder)))


def bias_of(site: Site, sites: Sites) -> Placeholder | None:
    """The bias that the model adds to a weight's product, for a field with axes ("out",).

    Raises:
      ValueError: The bias has not one number for each output, belongs to another stack, or is
        not added as it is, once to each product.
    """
    if site.unlike:
        raise ValueError(
            f"The method needs to know what the model adds to the product of '{site.path}': one "
            f"bias, as it is, each time. But the model {site.unlike}. Leave '{site.path}' out of "
            "the targets, or fold the sign or the factor into the bias."
        )
    if site.bias is None:
        return None
    bias = sites.every[site.bias]
    if bias.size(OUT) != site.size(OUT) or bias.stack not in ((), site.stack):
        raise ValueError(
            f"The model adds '{bias.path}' of shape {bias.shape} to the product of "
            f"'{site.path}' of shape {site.shape}, and the method needs to know which number "
            f"belongs to which output: {bias.size(OUT)} numbers for {site.size(OUT)} outputs, "
            f"in stacks {bias.stack} and {site.stack}. Leave '{site.path}' out of the targets."
        )
    return Placeholder(bias.path, stack=site.stack, axes=bias.axes)


def vector_of(vector: Site, site: Site) -> Placeholder:
    """A scale or a bias of the model for a field with axes ("out",) of a weight at `site`.

    Raises:
      ValueError: It has not one number for each output, or belongs to another stack.
    """
    if vector.size(OUT) != site.size(OUT) or vector.stack not in ((), site.stack):
        raise ValueError(
            f"'{vector.path}' of shape {vector.shape} does not have one number for each of the "
            f"{site.size(OUT)} outputs of '{site.path}', in its stack {site.stack}. Choose the "
            "norm that follows this weight."
        )
    return Placeholder(vector.path, stack=site.stack, axes=vector.axes)
