"""sites(fn, params, ...): what a program does with each of its parameters.

The jaxpr of `fn` is walked with labelled dimensions, so that where a parameter meets a
product, a gather or a sum it is known which of its axes are inputs, outputs, or a stack of
layers or experts. Nothing is computed.
"""

import dataclasses
import difflib
import fnmatch
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from jaxpeft import _tracing as tracing
from jaxpeft._axes import Digit
from jaxpeft._export import exportable
from jaxpeft._interpreter import Interpreter, Materialized
from jaxpeft._marks import is_array
from jaxpeft._schema import conform_fields
from jaxpeft._tracing.values import Use
from jaxpeft._tree import flatten
from jaxpeft._view import Axis, View
from jaxpeft._weight import IN, OUT, STACK, Weight, base_weight, dense, weight

Pattern = str | re.Pattern | Callable[["Site"], bool]


@exportable
@dataclasses.dataclass(frozen=True)
class OutputSlice:
    """A part of the output axis: block `index` of `of` equal ones, in each of `groups` groups.

    The value third of a fused qkv kernel is `OutputSlice(2, 3)`; interleaved by heads, where every
    head has its own q, k and v side by side, it is `OutputSlice(2, 3, groups=heads)`.
    """

    index: int
    of: int
    groups: int = 1

    def size(self, out: int) -> int:
        """How many of `out` columns belong to the part."""
        return out // self.of

    def spread(self, y: jax.Array, rest: float) -> jax.Array:
        """Columns y (..., size) of the part at their places among all, the others `rest`."""
        fill, size = jax.numpy.asarray(rest, y.dtype), y.shape[-1]
        if self.groups == 1:  # without a reshape, which no mesh with Explicit axes follows
            ends = (self.index * size, (self.of - self.index - 1) * size, 0)
            return jax.lax.pad(y, fill, [*[(0, 0, 0)] * (y.ndim - 1), ends])
        blocks = y.reshape(*y.shape[:-1], self.groups, 1, -1)
        pad = [(0, 0, 0)] * blocks.ndim
        pad[-2] = (self.index, self.of - self.index - 1, 0)
        return jax.lax.pad(blocks, fill, pad).reshape(*y.shape[:-1], size * self.of)


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter and what the program does with it.

    Attributes:
      path: Its name in the tree.
      shape, dtype: Of the array.
      axes: Its axes with their roles; finer than `shape` where the program cuts an axis.
      uses: Every use, one for each kind and place.
      bias: Path of the bias that is added to its product, if there is exactly one.
      unlike: What the program does instead of adding one bias as it is to each product of this
        weight, and where; empty where it does not.
      of: For a bias or scale: paths of the weights whose product it acts on.
      materialized: Where `lift` would have to turn it into a dense array.
      part: The part of the output axis that a method is to act on; `None` for all of it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axis, ...] = ()
    uses: tuple[Use, ...] = ()
    bias: str | None = None
    of: tuple[str, ...] = ()
    materialized: tuple[Materialized, ...] = ()
    part: OutputSlice | None = None
    unlike: str = ""

    @property
    def kinds(self) -> frozenset[str]:
        """What it is: "linear", "embedding", "conv", "expert", "bias", "norm", "scale", ..."""
        return frozenset(use.kind for use in self.uses)

    @property
    def is_matrix(self) -> bool:
        """Whether it has an input and an output side, so that a delta or a scale can act."""
        roles = {axis.role for axis in self.axes}
        return bool(self.kinds & {"linear", "embedding", "conv"}) and {IN, OUT} <= roles

    @property
    def is_vector(self) -> bool:
        """Whether it is a vector, or a stack of them."""
        return sum(axis.role != STACK and axis.size > 1 for axis in self.axes) <= 1

    def size(self, role: str) -> int:
        """Length of a side: the product of the axes with this role."""
        size = 1
        for axis in self.axes:
            size *= axis.size if axis.role == role else 1
        return size

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stack axes."""
        return tuple(axis.size for axis in self.axes if axis.role == STACK)

    def view(self, leaf: Any) -> View:
        """The leaf of the tree at this path as a view."""
        return leaf if isinstance(leaf, View) else View.of(leaf, self.axes, self.path)

    def matrices(self, array: jax.Array) -> jax.Array:
        """(*stack, in, out) of an array as the program lays this parameter out."""
        return View.of(array, self.axes).canonical()

    def array(self, matrices: jax.Array) -> jax.Array:
        """The other way round."""
        like = View.of(jax.ShapeDtypeStruct(self.shape, matrices.dtype), self.axes)
        return dataclasses.replace(like, weight=matrices, natural=False).materialize()


class Sites(Mapping[str, Site]):
    """The parameters of a program by path, and selections of them.

    `sites.linear`, `.embedding`, `.conv`, `.expert`, `.bias`, `.norm`, `.matrices` select by
    what a parameter does; `match` by path or predicate; `|`, `&` and `-` combine. A selection
    is itself a `Sites`.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda p, x: x @ p["w"] + p["b"]
      >>> s = sites(f, {"w": jnp.ones((3, 5)), "b": jnp.ones(5)}, jnp.ones((2, 3)))
      >>> print(s)
      path  shape   axes     kinds
      b     (5,)    out      bias of w
      w     (3, 5)  in, out  linear
    """

    def __init__(self, selected: Mapping[str, Site], every: Mapping[str, Site] | None = None):
        self._selected = dict(selected)
        self._every = dict(every if every is not None else selected)

    def __getitem__(self, path: str) -> Site:
        if path not in self._selected:
            raise KeyError(f"No parameter is called '{path}'. {_nearest(path, self._every)}")
        return self._selected[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._selected)

    def __len__(self) -> int:
        return len(self._selected)

    # Selecting ---------------------------------------------------------------------------

    def _of_kind(self, *kinds: str) -> "Sites":
        return self._keep(lambda site: bool(site.kinds & set(kinds)))

    def _keep(self, condition: Callable[[Site], bool]) -> "Sites":
        kept = {path: site for path, site in self.items() if condition(site)}
        return Sites(kept, self._every)

    @property
    def every(self) -> "Sites":
        """All parameters of the program, whatever is selected here."""
        return Sites(self._every)

    @property
    def linear(self) -> "Sites":
        """Weights that multiply an activation, experts too; a table that is also looked up
        (a tied head) is an embedding."""
        return self._keep(lambda s: s.is_matrix and "linear" in s.kinds) - self.embedding

    @property
    def embedding(self) -> "Sites":
        """Tables that are read by row."""
        return self._keep(lambda s: s.is_matrix and "embedding" in s.kinds)

    @property
    def hidden(self) -> "Sites":
        """Linear weights and convolutions but for the `head`: what is usually quantized."""
        return (self.linear | self.conv) - self.head

    @property
    def head(self) -> "Sites":
        """Weights whose product is the scores of a vocabulary, a tied table among them.

        They have as many outputs as a table has rows that is read by whole numbers which the
        caller gives, and what they give goes on to the result, or to a loss, with no other
        weight after it. Where a program does not tell, `with_head` does.
        """
        return self._of_kind("head")

    @property
    def conv(self) -> "Sites":
        """Convolution kernels."""
        return self._keep(lambda s: s.is_matrix and "conv" in s.kinds)

    @property
    def expert(self) -> "Sites":
        """Stacks of which each product takes one slice per expert: side by side, gathered by id,
        or all of them on all tokens, which the shares of a router or a second stack tell from
        heads."""
        return self._of_kind("expert")

    @property
    def matrices(self) -> "Sites":
        """Everything that has an input and an output side."""
        return self._keep(lambda s: s.is_matrix)

    @property
    def bias(self) -> "Sites":
        """Vectors added to an activation, those of normalizations included."""
        return self._keep(lambda s: "bias" in s.kinds or s.is_vector and "added" in s.kinds)

    @property
    def norm(self) -> "Sites":
        """Scales and biases of normalizations."""
        return self._of_kind("norm")

    @property
    def statistic(self) -> "Sites":
        """Means and variances that a normalization runs on: counted, not trained."""
        return self._of_kind("statistic")

    def with_head(self, *patterns: Pattern) -> "Sites":
        """The same sites with other weights as the `head`; without patterns, with none.

        For what no program reveals: `sites.with_head("classifier/kernel").hidden`.

        Raises:
          ValueError: A pattern matches nothing; lists the paths there are, nearest first.
        """
        told = set(self.every._matching(patterns))

        def one(site: Site) -> Site:
            uses = tuple(use for use in site.uses if use.kind != "head")
            head = (Use("head"),) if site.path in told else ()
            return dataclasses.replace(site, uses=uses + head)

        every = {path: one(site) for path, site in self._every.items()}
        return Sites({path: one(site) for path, site in self.items()}, every)

    def match(self, *patterns: Pattern, exclude: Pattern | Iterable[Pattern] = ()) -> "Sites":
        """Those whose path or site matches one of the patterns and none of `exclude`.

        Args:
          patterns: A glob on the whole path ("*attn*"), a compiled regular expression
            (searched), or a predicate of the `Site`.

        Raises:
          ValueError: A pattern matches nothing; lists the paths there are, nearest first.
        """
        if isinstance(exclude, (str, re.Pattern)) or callable(exclude):
            exclude = (exclude,)
        out = self._matching(patterns)
        for path in self._matching(tuple(exclude)):
            out.pop(path, None)
        if not out:
            raise ValueError(
                f"After leaving out {list(exclude)}, nothing of {list(patterns)} is left."
            )
        return Sites({p: s for p, s in self.items() if p in out}, self._every)

    def _matching(self, patterns: Sequence[Pattern]) -> dict[str, Site]:
        out: dict[str, Site] = {}
        for pattern in patterns:
            hits = {path: site for path, site in self.items() if matches(pattern, site)}
            if not hits:
                raise ValueError(
                    f"The pattern {_show(pattern)} matches none of the {len(self)} parameters "
                    f"to choose from. {_nearest(_show(pattern), self)}"
                )
            out.update(hits)
        return out

    def __or__(self, other: "Sites") -> "Sites":
        self._same_parts(other, "|")
        both = {**self._selected, **other._selected}
        # A selection that was read from a file knows no other parameters.
        every = {**self._every, **{p: s for p, s in other._every.items() if p not in self._every}}
        return Sites({path: both[path] for path in every if path in both}, every)

    def __and__(self, other: "Sites") -> "Sites":
        self._same_parts(other, "&")
        return self._keep(lambda site: site.path in other)

    def __sub__(self, other: "Sites") -> "Sites":
        self._same_parts(other, "-")
        return self._keep(lambda site: site.path not in other)

    def _same_parts(self, other: "Sites", sign: str) -> None:
        """A selection holds each weight once, so it cannot say what two parts of it make."""
        for path, site in self.items():
            if path in other and other[path].part != site.part:
                raise ValueError(
                    f"`{sign}` of two selections with different columns of '{path}': "
                    f"{site.part or 'all'} and {other[path].part or 'all'}. Give each selection a "
                    "method of its own, and `chain` the methods."
                )

    def output_slice(self, index: int, of: int, groups: int = 1) -> "Sites":
        """The same weights, but only a part of their output axis: see `Part`.

        Raises:
          ValueError: The output axis does not divide into `of * groups` equal blocks, or is a
            part already.
        """
        for site in self.values():
            if site.part is not None:
                raise ValueError(
                    f"Of '{site.path}', {site.part} is selected already, and a part of a part is "
                    f"none. Take one with a larger `of` from the whole weight: `.output_slice({index}, "
                    f"{of * site.part.of}, ...)`."
                )
        part = OutputSlice(
            *map(operator.index, (index, of, groups))
        )  # of NumPy too; files take int
        for site in self.values():
            _check_part(site, part)
        chosen = {p: dataclasses.replace(s, part=part) for p, s in self.items()}
        return Sites(chosen, self._every)

    def override(self, path: str, *roles: str) -> "Sites":
        """The same sites with other roles for the axes of one parameter.

        For what no program reveals: an ensemble under `vmap` looks like heads, and so do experts
        that are summed with other weights than the shares of a softmax. Products that share
        their input among a stack, or sum over it, keep every factor apart. With an input and an
        output side a parameter is a matrix from then on, also where the model computes something
        of it before it uses it; `lift` forms the array there, with a warning.

        Raises:
          ValueError: A role is not "stack", "in" or "out", or their number differs.
        """
        site = self[path]
        if len(roles) != len(site.shape) or set(roles) - {STACK, IN, OUT}:
            raise ValueError(
                f"'{path}' has shape {site.shape}; give one of 'stack', 'in', 'out' for each "
                f"of its {len(site.shape)} axes, not {roles}."
            )
        axes = tuple(Axis(n, r) for n, r in zip(site.shape, roles, strict=True))
        changed = dataclasses.replace(site, axes=axes)
        if {IN, OUT} <= set(roles) and not changed.is_matrix:
            uses = (*site.uses, Use("linear", source="as `override` says"))
            changed = dataclasses.replace(changed, uses=uses)
        return Sites({**self._selected, path: changed}, {**self._every, path: changed})

    def what_there_is(self) -> str:
        """The parameters to choose from, for who was given an empty selection of them."""
        if not self._every:
            return "The sites given are empty, and no parameter is known to choose from."
        others = [site for site in self._every.values() if not site.is_matrix]
        names = [f"'{s.path}' {s.shape} ({', '.join(sorted(s.kinds)) or 'unused'})" for s in others]
        matrices = [f"'{path}'" for path in self._every if path not in {s.path for s in others}]
        told = f"The sites given are empty. The model has the matrices {_some(matrices)}"
        told += f", and beside them {_some(names)}."
        wide = next((site for site in others if len(site.shape) > 1), None)
        if wide is None:
            return told
        roles = ", ".join(f"'{r}'" for r in (*[STACK] * (len(wide.shape) - 2), IN, OUT))
        return (
            f"{told} If another one acts as a matrix, say which of its axes are inputs and "
            f"outputs: `sites.override('{wide.path}', {roles}).match('{wide.path}')`."
        )

    # Printing and storing ------------------------------------------------------------------

    def __str__(self) -> str:
        rows = [("path", "shape", "axes", "kinds")]
        for site in self.values():
            kinds = [
                kind
                + (f" of {', '.join(site.of)}" if kind in ("bias", "scale") and site.of else "")
                for kind in dict.fromkeys(use.kind for use in site.uses)
            ]
            kinds += [f"materialized {event.primitive}" for event in site.materialized]
            axes = ", ".join(axis.role for axis in site.axes)
            rows.append((site.path, str(site.shape), axes, "; ".join(kinds) or "unused"))
        width = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, width, strict=False)), row[3]])
            for row in rows
        )

    __repr__ = __str__

    def to_json(self) -> dict:
        """What a method needs to know of the selected parameters and their biases, as JSON."""
        biases = {site.bias for site in self.values()} - {None}
        known = [s for path, s in self._every.items() if path in self or path in biases]
        return {
            "selected": list(self),
            "parameters": [
                {
                    "path": site.path,
                    "shape": list(site.shape),
                    "axes": [[axis.size, axis.role] for axis in site.axes],
                    "kinds": sorted(site.kinds),
                    "bias": site.bias,
                    "part": dataclasses.astuple(site.part) if site.part else None,
                }
                for site in (self.get(s.path, s) for s in known)
            ],
        }

    @classmethod
    def from_json(cls, stored: Any, at: str = "sites") -> "Sites":
        """The selection that `to_json` wrote.

        Raises:
          ValueError: It is none. Names the field, beneath `at`.
        """
        conform_fields(stored, {"selected": list[str], "parameters": list[Mapping]}, at)
        every: dict[str, Site] = {}
        for i, row in enumerate(stored["parameters"]):
            site = _stored_site(row, f"{at}.parameters[{i}]")
            if site.path in every:
                raise ValueError(f"`{at}.parameters` has '{site.path}' twice.")
            every[site.path] = site
        named = [(path, "selected") for path in stored["selected"]]
        named += [(site.bias, "parameters") for site in every.values() if site.bias is not None]
        for path, field in named:
            if path not in every:
                raise ValueError(
                    f"`{at}.{field}` names '{path}', which is none of the parameters "
                    f"{list(every)[:20]}."
                )
        return cls({path: every[path] for path in stored["selected"]}, every)


_STORED = {
    "path": str,
    "shape": list[int],
    "axes": list[tuple[int, Literal["stack", "in", "out"]]],
    "kinds": list[str],
    "bias": str | None,
    "part": tuple[int, int, int] | None,
}


def _stored_site(row: Any, at: str) -> Site:
    """One parameter of `Sites.to_json`."""
    conform_fields(row, _STORED, at)
    site = Site(
        row["path"],
        tuple(row["shape"]),
        None,
        tuple(Axis(size, role) for size, role in row["axes"]),
        tuple(Use(kind) for kind in row["kinds"]),
        row["bias"],
        part=OutputSlice(*row["part"]) if row["part"] else None,
    )
    # Each axis of the array is one of those with a role, or several next to each other.
    fine = list(itertools.accumulate((axis.size for axis in site.axes), operator.mul, initial=1))
    whole = list(itertools.accumulate(site.shape, operator.mul, initial=1))
    if min(0, *fine, *whole) < 0 or fine[-1] != whole[-1] or not {*whole} <= {*fine}:
        raise ValueError(
            f"`{at}.axes` are {row['axes']}, which do not make up the shape {site.shape}."
        )
    if site.part is not None:
        _check_part(site, site.part)
    return site


def _check_part(site: Site, part: OutputSlice) -> None:
    out = site.size(OUT)
    if not 0 <= part.index < part.of or part.groups < 1 or out % (part.of * part.groups):
        raise ValueError(
            f"Block {part.index} of {part.of} in {part.groups} groups does not exist in the output "
            f"axis of '{site.path}', which has length {out}: it must be a multiple of "
            f"{part.of} * {part.groups}, and the index below {part.of}."
        )


def matches(pattern: Pattern, site: Site) -> bool:
    """Whether a glob, a regular expression or a predicate holds for a site."""
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(site.path, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.search(site.path) is not None
    return bool(pattern(site))


def by_pattern(value: Any, sites: Sites, what: str) -> dict[str, Any]:
    """{path: value}, where `value` may be a mapping from patterns: the first match wins.

    Raises:
      ValueError: A path is covered by no pattern, or a pattern is never used.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(sites, value)
    unused, out = set(value), {}
    for path, site in sites.items():
        hit = next((p for p in value if matches(p, site)), None)
        if hit is None:
            raise ValueError(
                f"No pattern of {what}={dict(value)} covers '{path}'. Add one; '*' covers all."
            )
        unused.discard(hit)
        out[path] = value[hit]
    if unused:
        name = sorted(map(str, unused))[0]
        raise ValueError(f"The pattern '{name}' of `{what}` is never used. {_nearest(name, sites)}")
    return out


def _show(pattern: Pattern) -> str:
    if isinstance(pattern, str):
        return f"'{pattern}'"
    return repr(pattern.pattern) if isinstance(pattern, re.Pattern) else repr(pattern)


def _some(names: Sequence[str]) -> str:
    """The first twenty, and how many more."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more if names else "none"


def _nearest(name: str, paths: Iterable[str]) -> str:
    """The paths there are, those most like `name` first."""
    bare = name.strip("'*").replace("*", "")

    def likeness(path: str) -> float:
        return -difflib.SequenceMatcher(None, bare, path).ratio()

    ranked = sorted(paths, key=likeness)
    more = f" and {len(ranked) - 20} more" if len(ranked) > 20 else ""
    return f"There are: {', '.join(ranked[:20])}{more}." if ranked else "There are none."


# --- Finding roles ---------------------------------------------------------------------------


def sites(fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Sites:
    """What `fn(params, *args, **kwargs)` does with each parameter.

    Args:
      fn: Any JAX function of a parameter tree.
      params: Arrays or `jax.ShapeDtypeStruct`s, in any pytree. Other leaves (functions,
        strings, numbers of Python) reach `fn` as they are and are no parameters.
      args, kwargs: As `fn` takes them. Arrays may be shapes too; anything else (flags,
        strings) reaches `fn` as it is.

    Returns:
      The parameters by path, with roles for their axes. Printing it shows the table.

    Raises:
      TypeError: `fn` is no function.
    """
    if not callable(fn):
        raise TypeError(
            f"`sites(fn, params, *inputs)`: the function comes first, and {type(fn).__name__} "
            "cannot be called."
        )
    leaves, treedef = flatten(params)
    flat = {path: x for path, x in leaves.items() if is_array(x)}
    rest, rest_tree = jax.tree.flatten((args, kwargs))
    at = [i for i, x in enumerate(rest) if is_array(x)]

    def flat_fn(arrays: list, data: list) -> Any:
        values = list(rest)
        for i, x in zip(at, data, strict=True):
            values[i] = x
        args, kwargs = jax.tree.unflatten(rest_tree, values)
        every = {**leaves, **dict(zip(flat, arrays, strict=True))}
        return fn(jax.tree.unflatten(treedef, list(every.values())), *args, **kwargs)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat.values()]
    data = [jax.ShapeDtypeStruct(rest[i].shape, rest[i].dtype) for i in at]
    program = jax.make_jaxpr(flat_fn)(shapes, data)
    uses, unlike = tracing.trace(program, list(flat), shapes)
    found = {path: _site(path, x, uses[path], uses) for path, x in zip(flat, shapes, strict=True)}
    for path, what in unlike.items():
        found[path] = dataclasses.replace(found[path], unlike=what)
    _announce(program, found, shapes, data)
    return Sites(found)


def _site(path: str, x: Any, uses: list[Use], every: Mapping[str, list[Use]]) -> Site:
    axes = _axes(x.shape, uses, every)
    biases = {
        other
        for other, theirs in every.items()
        for use in theirs
        if use.kind == "bias" and use.of == (path,)
    }
    of = tuple(dict.fromkeys(p for use in uses if use.kind in ("bias", "scale") for p in use.of))
    bias = biases.pop() if len(biases) == 1 else None
    return Site(path, tuple(x.shape), x.dtype, axes, tuple(uses), bias, of)


def _axes(
    shape: Sequence[int], uses: list[Use], every: Mapping[str, list[Use]]
) -> tuple[Axis, ...]:
    """The axes of a parameter with their roles, cut where a program uses parts differently."""
    linear = [use for use in uses if use.kind in ("linear", "embedding", "conv")]
    # A table is read by its rows, whatever else is done with it.
    linear.sort(key=lambda use: use.kind != "embedding")
    stack = {d for use in uses for d in use.stack}
    out: list[Axis] = []
    for axis, size in enumerate(shape):
        claims = {d: STACK for d in stack if d.axis == axis}
        if linear:
            sides = [(IN, linear[0].rows), (OUT, linear[0].cols)]
        else:
            sides = [(OUT, frozenset(d for use in uses for d in use.cols))]
        for role, side in sides:
            for digit in side:
                if digit.axis == axis and not _overlaps(digit, claims):
                    claims[digit] = role
        out.extend(_cut(axis, size, claims))
    return tuple(out)


def _overlaps(digit: Digit, claims: Iterable[Digit]) -> bool:
    return any(
        digit.stride < c.stride * c.size and c.stride < digit.stride * digit.size
        for c in claims
        if c.size > 1 or digit.size > 1
    )


def _cut(axis: int, size: int, claims: Mapping[Digit, str]) -> list[Axis]:
    """One axis, or as many as have different roles, most significant first."""
    roles = set(claims.values())
    covered = 1
    for digit in claims:
        covered *= digit.size
    if len(roles) <= 1:
        # An axis of length 1, or one that nothing speaks of, belongs to the outputs.
        return [Axis(size, roles.pop() if roles else OUT)]
    ordered = sorted(claims, key=lambda d: -d.stride)
    if covered != size:
        return [Axis(size, claims[ordered[0]])]
    return [Axis(d.size, claims[d]) for d in ordered]


@weight
class _Probe(Weight):
    """Does nothing, everywhere a matrix can: shows where `lift` would materialize."""

    w: Any = base_weight()
    local_in = local_out = True

    def materialize(self) -> jax.Array:
        return dense(self.w)

    def forward(self, x: Any) -> Any:
        return x @ self.w

    def transposed(self, y: Any) -> Any:
        return y @ self.w.T

    def lookup(self, ids: Any) -> Any:
        return self.w[ids]


def _announce(program: Any, found: dict[str, Site], shapes: list, data: list) -> None:
    """Notes at each site where `lift` would materialize, by evaluating the program abstractly."""
    events: dict[str, list[Materialized]] = {}

    def note(event: Materialized) -> None:
        seen = events.setdefault(event.path, [])
        if event not in seen:
            seen.append(event)

    def evaluated(arrays: list, data: list) -> None:
        values = [
            dataclasses.replace(site.view(x), weight=_Probe(x)).unfolded() if site.is_matrix else x
            for x, site in zip(arrays, found.values(), strict=True)
        ]
        evaluation = Interpreter(note)
        for out in evaluation.run(program, [*values, *data]):
            if not any(out is value for value in values):
                evaluation.dense(out, None)

    jax.eval_shape(evaluated, shapes, data)
    for path, seen in events.items():
        found[path] = dataclasses.replace(found[path], materialized=tuple(seen))
