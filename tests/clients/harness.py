"""Models of other libraries under five methods: what a client is, and the laws that it is held to.

A client is a function of parameters as its library writes it, with random parameters of a few
entries. Under a mergeable method the lifted model equals the merged one, outputs and gradients of
the adapter. A prefix has no dense equivalent: there the library itself is told to put the trained
rows at the virtual positions, and what the placeholders are may change nothing.
"""

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._tree import flatten
from jaxpeft.prompts import drop_virtual_positions, prepend_virtual_tokens

from .outcomes import DENSE, FAULTS, REFUSED

VOCAB, PAD = 37, 0  # tokens of 1 and 2 are placeholders
LENGTH = 3  # of a prefix
MOVED = 0.02  # of its norm, by which an adapter has to move the output before a law means anything

#: {client: {column: text}}, printed at the end of the run.
RESULTS: dict[str, dict[str, str]] = {}


class Model(NamedTuple):
    """`fn(params, *args)` of another library."""

    fn: Callable[..., Any]
    params: Any
    args: tuple


#: What puts rows at the output of projections, as a context, of {path of the kernel: (rows,
#: virtual positions)}.
Rows = Callable[[dict[str, tuple[jax.Array, jax.Array]]], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True, eq=False)
class Client:
    """A model of another library, and where methods act in it.

    Attributes:
      name: For the table.
      build: Makes it.
      kernels, tables, heads: Patterns of paths: all that multiplies an activation, all that is
        read by row, and the kernels that give the result. `None`: there are none.
      norms, biases: Patterns of scales and biases of normalizations, and of all biases.
      keys, values, feedforward: Patterns of the projections for IA3 and prefix.
      scaled: What IA3 scales instead of keys and values, such as a part of a fused kernel.
      rows: How the library is told of rows at the output of a projection.
      unrolled: The same function to tell of it, where layers are one program in a loop.
      virtual: {position in args: name of its virtual_positions}: the arguments that hold tokens.
      virtual_positions: From the path of a projection to the name of its virtual_positions.
      tolerance: 1e-10 where the library computes in float64 throughout.
    """

    name: str
    build: Callable[[], Model]
    kernels: str
    keys: str
    values: str
    feedforward: str | None = None
    tables: str | None = None
    heads: str | None = None
    norms: str | None = None
    biases: str | None = None
    scaled: Callable[[jp.Sites], jp.Sites] | None = None
    rows: Rows | None = None
    unrolled: Callable[..., Any] | None = None
    virtual: Mapping[int, str] = dataclasses.field(default_factory=lambda: {0: "virtual_positions"})
    virtual_positions: Callable[[str], str] = lambda path: "virtual_positions"
    tolerance: float = 1e-10

    @functools.cached_property
    def model(self) -> Model:
        return self.build()

    @functools.cached_property
    def sites(self) -> jp.Sites:
        return jp.sites(self.model.fn, self.model.params, *self.model.args)

    def paths(self, pattern: str | None) -> set[str]:
        """The paths that a pattern speaks of, whatever the library takes them for."""
        every = flatten(self.model.params)[0]
        return {path for path in every if pattern and re.search(pattern, path)}

    def match(self, pattern: str | None) -> jp.Sites:
        """The sites at these paths."""
        assert pattern is None or self.paths(pattern), pattern
        return self.sites - self.sites if pattern is None else self.sites.match(re.compile(pattern))


# --- The five methods ------------------------------------------------------------------------


def _ia3(c: Client, dtype: Any) -> jp.Method:
    feedforward = c.match(c.feedforward) if c.feedforward else None
    scaled = c.scaled(c.sites) if c.scaled else c.match(c.keys) | c.match(c.values)
    return jp.ia3(scaled, feedforward, dtype=dtype)


def _nf4_lora(c: Client, dtype: Any) -> jp.Method:
    linear = c.sites.linear or c.sites.conv
    quantize = jp.quantize("nf4", linear, block=8)
    return jp.chain(quantize, jp.lora(2, linear, alpha=3.0, dtype=dtype))


def _prefix(c: Client, dtype: Any) -> jp.Method:
    """One prefix for each name of virtual_positions that the model has."""
    keys, values = c.match(c.keys), c.match(c.values)
    names = dict.fromkeys(c.virtual_positions(path) for path in keys)
    parts = []
    for name in names:
        mine = lambda site, name=name: c.virtual_positions(site.path) == name  # noqa: E731
        parts.append(
            jp.prefix_tuning(
                LENGTH, keys.match(mine), values.match(mine), positions_name=name, dtype=dtype
            )
        )
    return jp.chain(*parts)


METHODS: dict[str, Callable[[Client, Any], jp.Method]] = {
    "LoRA": lambda c, dtype: jp.lora(2, c.sites.matrices, alpha=3.0, dtype=dtype),
    "DoRA": lambda c, dtype: jp.dora(2, c.sites.matrices, alpha=3.0, dtype=dtype),
    "IA3": _ia3,
    "NF4 + LoRA": _nf4_lora,
    "prefix": _prefix,
}


# --- Numbers ---------------------------------------------------------------------------------


def random(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def tokens(seed: int, time: int = 6) -> jax.Array:
    """Two rows of tokens, the second with padding at its end."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (2, time))
    ids[1, -2:] = PAD
    return jnp.asarray(ids)


def random_params(shapes: Any, dtype: Any = jnp.float64) -> Any:
    """Every array random: kernels keep lengths, scales and variances are around one."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)

    def one(i: int, path: Any, x: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        rng = np.random.default_rng(i)
        vector = x.size == max(x.shape, default=1)
        if vector and re.search(r"(scale|var|var_ema/\w+|norm.*/weight|norm.*/w)$", name):
            return jnp.asarray(rng.uniform(0.7, 1.3, x.shape), dtype)
        fan_in = max(1, int(np.prod(x.shape[:-1]))) if x.ndim > 1 else 10
        return jnp.asarray(rng.normal(size=x.shape) / fan_in**0.5, dtype)

    return treedef.unflatten([one(i, path, x) for i, (path, x) in enumerate(flat)])


def real(tree: Any) -> list[jax.Array]:
    """The floating leaves."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def worst(a: Any, b: Any) -> float:
    """The largest of |x - y| / (1 + |y|) over all leaves, infinite where one is no number."""
    a, b = real(a), real(b)
    assert [x.shape for x in a] == [y.shape for y in b]
    pairs = zip(map(np.float64, a), map(np.float64, b), strict=True)
    errors = [np.max(np.abs(x - y) / (1 + np.abs(y)), initial=0.0) for x, y in pairs]
    return float(np.nan_to_num(max(errors), nan=np.inf))


def far(a: Any, b: Any) -> float:
    """|a - b| / |b| over all leaves together."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in real(tree)])  # noqa: E731
    return float(np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b)))


def score(outputs: Any) -> jax.Array:
    """A number that depends on every output in its own way."""
    terms = [jnp.sum(jnp.sin(y) * random(50 + i, *y.shape)) for i, y in enumerate(real(outputs))]
    return sum(terms[1:], terms[0])


def moved(adapter: Mapping[str, jax.Array], scale: float) -> dict[str, jax.Array]:
    """The adapter away from its start, every array in its own way."""
    return {
        path: (x + random(i + 7, *x.shape, scale=scale)).astype(x.dtype)
        for i, (path, x) in enumerate(adapter.items())
    }


# --- Laws ------------------------------------------------------------------------------------


def check(client: Client, name: str) -> str:
    """Holds a client to the law of a method, and says by how much it was missed."""
    dtype = next(x.dtype for x in real(client.model.params))
    method = METHODS[name](client, dtype)
    frozen, start = jp.split(method(jax.random.key(1), client.model.params))
    law = _prefix_law if name == "prefix" else _merged_law
    outputs, slope = law(client, frozen, moved(start, 0.3))
    assert outputs <= client.tolerance, f"outputs differ by {outputs:.2g}"
    # A gradient sums over more terms than the outputs it comes from.
    assert slope <= 10 * client.tolerance, f"gradients differ by {slope:.2g}"
    return f"{outputs:.0e}, {slope:.0e}"


def _compare(given: Callable, wanted: Callable, adapter: Any, plain: Any) -> tuple[float, float]:
    """How far outputs and gradients are apart; both functions take an adapter."""

    def with_slope(f):
        def scored(adapter):
            outputs = real(f(adapter))
            return score(outputs), outputs

        return jax.jit(jax.value_and_grad(scored, has_aux=True))(adapter)

    (_, outputs), slope = with_slope(given)
    (_, wanted_outputs), wanted_slope = with_slope(wanted)
    assert far(wanted_outputs, plain) >= MOVED, "the adapter does nothing"
    still = [path for path, g in wanted_slope.items() if not jnp.any(g != 0)]
    assert len(still) < len(wanted_slope) / 2, f"the model does not use {still}"
    return worst(outputs, wanted_outputs), worst(slope, wanted_slope)


def _plain(client: Client) -> Any:
    """The outputs without a method. Parameters are closed over: a tree may hold functions."""
    fn, params, args = client.model
    return jax.jit(lambda *args: fn(params, *args))(*args)


def _merged_law(client: Client, frozen: Any, adapter: Any) -> tuple[float, float]:
    """lift(fn)(tree) = fn(merge(tree))."""
    fn, _, args = client.model
    tree = lambda adapter: jp.combine(frozen, adapter)  # noqa: E731
    given = lambda adapter: jp.lift(fn)(tree(adapter), *args)  # noqa: E731
    wanted = lambda adapter: fn(jp.merge(tree(adapter)), *args)  # noqa: E731
    return _compare(given, wanted, adapter, _plain(client))


def _prefix_law(client: Client, frozen: Any, adapter: Any) -> tuple[float, float]:
    """The library with the rows put at the outputs of its projections; no placeholder is read."""
    fn, params, plain_args = client.model
    times = {plain_args[i].shape[1] + LENGTH for i in client.virtual}

    def trimmed(y):
        return drop_virtual_positions(y, LENGTH) if y.shape[1] in times else y

    def given(adapter, fill=1):
        args, virtual_positions = virtual(client, fill)
        outputs = jp.lift(fn)(jp.combine(frozen, adapter, **virtual_positions), *args)
        return jax.tree.map(trimmed, outputs)

    def wanted(adapter, fill=1):
        args, virtual_positions = virtual(client, fill)
        rows = {
            path.removesuffix("/rows"): (value, virtual_positions[client.virtual_positions(path)])
            for path, value in adapter.items()
        }
        with client.rows(rows):
            outputs = (client.unrolled or fn)(params, *args)
        return jax.tree.map(trimmed, outputs)

    errors = _compare(given, wanted, adapter, _plain(client))
    other = worst(jax.jit(lambda a: given(a, 2))(adapter), jax.jit(given)(adapter))
    if other > client.tolerance:  # what the check is for, which a user runs on a new model
        args, virtual_positions = virtual(client, 1)
        jp.prompts.check_prefix(
            fn,
            jp.combine(frozen, adapter, **virtual_positions),
            args[0],
            *virtual_positions.values(),
            *args[1:],
        )
    assert other <= client.tolerance, f"placeholders are read: outputs differ by {other:.2g}"
    return errors


def virtual(client: Client, fill: int) -> tuple[tuple, dict[str, jax.Array]]:
    """Arguments with virtual tokens in front, and their positions.

    In a model without tokens nothing can be prepended, and all positions are virtual.
    """
    args, virtual_positions = list(client.model.args), {}
    for i, name in client.virtual.items():
        args[i], virtual_positions[name] = prepend_virtual_tokens(args[i], LENGTH, fill)
    if not virtual_positions:
        virtual_positions = {
            "virtual_positions": jnp.zeros((len(real(args)[0]), LENGTH), jnp.int32)
        }
    return tuple(args), virtual_positions


# --- Tests -----------------------------------------------------------------------------------


COLUMNS = ("sites", "roles", *METHODS)


def cases(every: list[Client]) -> Any:
    """Clients crossed with columns; what is known to be at fault carries a strict mark."""
    pairs = []
    for c in every:
        for column in COLUMNS:
            reason = FAULTS.get((c.name, column))
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            pairs.append(pytest.param(c, column, id=f"{c.name}: {column}", marks=marks))
    return pytest.mark.parametrize(("client", "column"), pairs)


def hold(client: Client, column: str) -> None:
    """The one assertion of every file here."""
    if column in METHODS:
        check_method(client, column)
    else:
        {"sites": check_sites, "roles": check_roles}[column](client)


def check_sites(client: Client) -> None:
    """Every kernel, table and head is found, and what would be turned dense is known."""
    with _noted(client.name, "sites"):
        s = client.sites
        kernels, tables = client.paths(client.kernels), client.paths(client.tables)
        assert set(s.linear | s.conv) == kernels
        assert set(s.embedding) == tables
        assert set(s.hidden) == kernels - client.paths(client.heads)
        dense = {path for path, site in s.items() if site.materialized}
        assert dense == client.paths(DENSE.get(client.name))
        known = f"{len(kernels)} kernels, {len(tables)} tables"
        RESULTS[client.name]["sites"] = known + (f", {len(dense)} dense" if dense else "")


def check_roles(client: Client) -> None:
    """Biases, and scales of normalizations, are what the model has of them."""
    with _noted(client.name, "roles"):
        norms, biases = client.paths(client.norms), client.paths(client.biases)
        assert set(client.sites.bias) == biases
        assert set(client.sites.norm) == norms
        RESULTS[client.name]["roles"] = f"{len(norms)} norms, {len(biases)} biases"


def check_method(client: Client, method: str) -> None:
    """The law of the method, or its refusal with the message that is expected."""
    with _noted(client.name, method), warnings.catch_warnings():
        if client.name not in DENSE:
            warnings.simplefilter("error", jp.MaterializedWarning)
        refused = REFUSED.get((client.name, method))
        if refused is None:
            RESULTS[client.name][method] = check(client, method)
            return
        with pytest.raises((ValueError, TypeError), match=refused) as caught:
            check(client, method)
        RESULTS[client.name][method] = f"refused: {_first(str(caught.value))}"


@contextlib.contextmanager
def _noted(client: str, column: str) -> Iterator[None]:
    """Notes a failure, too, so that the table has a cell for everything that has run."""
    row = RESULTS.setdefault(client, {})
    try:
        yield
    except BaseException as error:
        fault = FAULTS.get((client, column))
        text = f"fault: {fault}" if fault else f"FAILED: {type(error).__name__}: {error}"
        row[column] = _first(text)
        raise


def _first(text: str, width: int = 110) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= width else text[: width - 3] + "..."


def table() -> str:
    """The results as Markdown."""
    rows = [["model", *COLUMNS]]
    rows += [[name, *(row.get(c, "") for c in COLUMNS)] for name, row in RESULTS.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
