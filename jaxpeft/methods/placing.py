"""How a method puts its weights into a tree: the one loop that all methods share."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Hole, Joined, Train, flatten, fold, unflatten
from jaxpeft.weight import IN, OUT, View, is_view


def place(
    key: jax.Array,
    tree: Any,
    sites: Sites,
    make: Callable[[jax.Array, Site, View], View],
    *,
    who: str,
    vectors: bool = False,
    parts: bool = False,
) -> Any:
    """The tree with `make(key, site, view)` at the place of every selected matrix.

    Args:
      key: Folded by path, so that selecting more weights changes no other one.
      tree: Parameters, in part structured weights already.
      sites: The selected parameters.
      make: The new view from the old one, which may hold another method's weight.
      who: The call as the user wrote it, for messages.
      vectors: Whether biases and scales may be among them.
      parts: Whether `make` minds `site.part`; if not, a part of the outputs is refused.

    Raises:
      ValueError: Nothing is selected, a selected parameter is no matrix, or the tree has no
        such path or another shape there.
    """
    check_any(who, sites)
    if not parts:
        check_whole(who, sites)
    flat, treedef = flatten(tree, is_leaf=lambda x: is_view(x) or isinstance(x, (Train, Joined)))
    for path, site in sites.items():
        if path not in flat:
            raise ValueError(
                f"`{who}` selects '{path}', which this tree does not have. It has "
                f"{list(flat)[:20]}. Were the sites found on another model?"
            )
        if tuple(flat[path].shape) != site.shape:
            raise ValueError(
                f"`{who}`: '{path}' has shape {tuple(flat[path].shape)}, but had "
                f"{site.shape} when the sites were found."
            )
        if not vectors and not site.is_matrix:
            raise ValueError(
                f"`{who}` selects '{path}' of shape {site.shape}, which the model uses as "
                f"{', '.join(sorted(site.kinds)) or 'nothing'}, not as a matrix. Select from "
                "`sites.matrices`."
            )
        if isinstance(flat[path], Joined):
            raise ValueError(f"`{who}`: '{path}' is trained in part by another method already.")
        flat[path] = signed(make(fold(key, path), site, site.view(flat[path])), who, path)
    return unflatten(treedef, list(flat.values()))


def signed(node: Any, who: str, path: str) -> Any:
    """The node with the name of the method in the marks that it has made, for messages."""

    def one(x: Any) -> Any:
        if not isinstance(x, Train) or x.method is not None:
            return x
        return dataclasses.replace(x, method=who, path=path)

    return jax.tree.map(one, node, is_leaf=lambda x: isinstance(x, Train))


def check_any(who: str, sites: Sites) -> None:
    """Raises ValueError where nothing is selected; lists what there is to choose from."""
    if not sites:
        raise ValueError(f"`{who}` selects no parameter. {sites.what_there_is()}")


F = TypeVar("F", bound=Callable)


def takes_sites(factory: F) -> F:
    """A factory that says so where a selection of sites is something else, such as a path.

    Raises:
      TypeError: An argument annotated `Sites` is none; shows it and what to write.
    """
    signature = inspect.signature(factory)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is Sites or Sites in typing.get_args(parameter.annotation)
    ]

    @functools.wraps(factory)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the call itself says what is missing or unknown
        for name in names:
            value = given.get(name)
            if value is not None and not isinstance(value, Sites):
                raise TypeError(_no_sites(factory.__name__, name, value))
        return factory(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _no_sites(who: str, name: str, value: Any) -> str:
    patterns = [value] if isinstance(value, str) else value
    if isinstance(value, Site):
        patterns = [value.path]
    if isinstance(patterns, (list, tuple, set)) and all(isinstance(p, str) for p in patterns):
        way = f"sites.match({', '.join(map(repr, patterns))})"
    else:
        way = "sites.linear"
    shown = repr(value) if isinstance(value, (str, int, list, tuple)) else "..."
    return (
        f"`{who}({name}={shown})`: give a selection of sites, not a {type(value).__name__}: "
        f"`{way}`, with `sites = jaxpeft.sites(fn, params, *inputs)`."
    )


def check_whole(who: str, sites: Sites) -> None:
    """Raises ValueError where a part of the outputs is selected; names the weight."""
    for site in sites.values():
        if site.part is not None:
            raise ValueError(
                f"`{who}`: a part of the columns of '{site.path}' is selected ({site.part}), but "
                "the method acts on all of them. Select the weight, or use `lora` or `ia3`."
            )


def check_rank(who: str, rank: int, site: Site) -> None:
    """Raises ValueError where a rank is no whole number in [1, min(in, out)]; names the weight."""
    n, m = site.size(IN), site.size(OUT)
    m = site.part.size(m) if site.part else m
    if not (isinstance(rank, Integral) and 1 <= rank <= min(n, m)):
        raise ValueError(
            f"`{who}(rank={rank})` needs 1 <= rank <= min(in, out), a whole number, but "
            f"'{site.path}' of shape {site.shape} is {n} x {m}. Choose another rank, or leave this "
            "weight out of the sites."
        )


def check_entries(who: str, site: Site, view: View) -> None:
    """Raises ValueError where another method's weight is no matrix; names both."""
    if not view.is_matrix:
        raise ValueError(
            f"`{who}`: '{site.path}' holds {type(view.weight).__name__}, which is no matrix and "
            f"has no entries to change. Put that method behind `{who}` in the `chain`, or leave "
            "the weight out."
        )


def check_floating(who: str, path: str, dtype: Any, *, instead: str = "use `lora`") -> None:
    """Raises ValueError where a weight is of complex numbers or integers; names it.

    Args:
      who: The call as the user wrote it.
      path: Of the weight.
      dtype: Of the weight.
      instead: What to do other than to leave it out.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{who}`: '{path}' is {dtype}, but the method computes with floating-point numbers "
            f"and would drop a part of it. Leave the weight out of the sites, or {instead}."
        )


def at_its_start(view: View) -> View:
    """The view with trained arrays where they start, and nothing of what a call gives."""

    def value(x: Any) -> Any:
        return x.value if isinstance(x, Train) else None if isinstance(x, Hole) else x

    return jax.tree.map(value, view, is_leaf=lambda x: isinstance(x, (Train, Hole)))


def bias_of(site: Site, sites: Sites) -> Hole | None:
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
    return Hole(bias.path, stack=site.stack, axes=bias.axes)


def vector_of(vector: Site, site: Site) -> Hole:
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
    return Hole(vector.path, stack=site.stack, axes=vector.axes)
