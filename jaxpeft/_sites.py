"""Sites: the parameters of a program by path, and selections of them."""

import dataclasses
import difflib
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxpeft._schema import conform_fields
from jaxpeft._site import OutputSlice, Pattern, Site, matches
from jaxpeft._tracing.values import Use
from jaxpeft._view import Axis
from jaxpeft._weight import IN, OUT, STACK


class Sites(Mapping[str, Site]):
    """The parameters of a program by path, or a selection of them. A mapping `{path: Site}`.

    `jaxpeft.sites` returns all parameters of a program. The properties `linear`, `embedding`,
    `conv`, `expert`, `bias`, `norm` and others select by what a parameter does, `match` selects by
    path or predicate, and `|`, `&` and `-` combine selections. Each selection is a `Sites` again,
    and is what a method takes.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> f = lambda p, x: x @ p["w"] + p["b"]
      >>> s = jp.sites(f, {"w": jnp.ones((3, 5)), "b": jnp.ones(5)}, jnp.ones((2, 3)))
      >>> print(s)
      path  shape   axes     kinds
      b     (5,)    out      bias of w
      w     (3, 5)  in, out  linear
      >>> list(s.linear), list(s.match("*", exclude="w"))
      (['w'], ['b'])
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
        """All parameters of the program, including those that are not selected here."""
        return Sites(self._every)

    @property
    def linear(self) -> "Sites":
        """Weights that multiply an activation, experts included.

        A table that is looked up as well, such as that of a tied head, is an embedding instead.
        """
        return self._keep(lambda s: s.is_matrix and "linear" in s.kinds) - self.embedding

    @property
    def embedding(self) -> "Sites":
        """Tables whose rows are looked up."""
        return self._keep(lambda s: s.is_matrix and "embedding" in s.kinds)

    @property
    def hidden(self) -> "Sites":
        """Linear weights and convolutions without the `head`: what is usually quantized."""
        return (self.linear | self.conv) - self.head

    @property
    def head(self) -> "Sites":
        """Weights whose product is the logits of a vocabulary, a tied table included.

        A weight counts as one if it has as many outputs as an embedding of the caller's ids has
        rows, and if no other weight comes between its product and the result or loss. Where the
        program does not reveal it, use `with_head`.
        """
        return self._of_kind("head")

    @property
    def conv(self) -> "Sites":
        """Convolution kernels."""
        return self._keep(lambda s: s.is_matrix and "conv" in s.kinds)

    @property
    def expert(self) -> "Sites":
        """Stacks of matrices, one for each expert of a mixture.

        Products take one matrix per expert: side by side, gathered by id, or all of them on all
        tokens. In the last case, routing weights or a second stack distinguish experts from
        attention heads.
        """
        return self._of_kind("expert")

    @property
    def matrices(self) -> "Sites":
        """All parameters that have inputs and outputs."""
        return self._keep(lambda s: s.is_matrix)

    @property
    def bias(self) -> "Sites":
        """Vectors that are added to an activation, those of normalizations included."""
        return self._keep(lambda s: "bias" in s.kinds or s.is_vector and "added" in s.kinds)

    @property
    def norm(self) -> "Sites":
        """Scales and biases of normalizations."""
        return self._of_kind("norm")

    @property
    def statistic(self) -> "Sites":
        """Means and variances that a normalization uses, which are not trained."""
        return self._of_kind("statistic")

    def with_head(self, *patterns: Pattern) -> "Sites":
        """The same sites with other weights as the `head`.

        For heads that the program does not reveal: `sites.with_head("classifier/kernel").hidden`.

        Args:
          patterns: As for `match`. Without patterns, no weight is a head.

        Raises:
          ValueError: There is no pattern, or one matches nothing; lists the paths, nearest first.
        """
        heads = set(self.every._matching(patterns))

        def one(site: Site) -> Site:
            uses = tuple(use for use in site.uses if use.kind != "head")
            head = (Use("head"),) if site.path in heads else ()
            return dataclasses.replace(site, uses=uses + head)

        every = {path: one(site) for path, site in self._every.items()}
        return Sites({path: one(site) for path, site in self.items()}, every)

    def match(self, *patterns: Pattern, exclude: Pattern | Iterable[Pattern] = ()) -> "Sites":
        """Those that match at least one of the patterns and none of `exclude`.

        Args:
          patterns: A glob on the whole path ("*attn*"), a compiled regular expression that is
            searched in the path, or a predicate of the `Site`.
          exclude: One such pattern, or several.

        Raises:
          ValueError: A pattern matches nothing; lists the paths there are, nearest first.
        """
        if isinstance(exclude, (str, re.Pattern)) or callable(exclude):
            exclude = (exclude,)
        if not patterns:
            raise ValueError("`match` needs at least one pattern, such as `match('*attn*')`.")
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
        self._check_same_slices(other, "|")
        both = {**self._selected, **other._selected}
        # A selection that was read from a file knows no other parameters.
        every = {**self._every, **{p: s for p, s in other._every.items() if p not in self._every}}
        return Sites({path: both[path] for path in every if path in both}, every)

    def __and__(self, other: "Sites") -> "Sites":
        self._check_same_slices(other, "&")
        return self._keep(lambda site: site.path in other)

    def __sub__(self, other: "Sites") -> "Sites":
        self._check_same_slices(other, "-")
        return self._keep(lambda site: site.path not in other)

    def _check_same_slices(self, other: "Sites", sign: str) -> None:
        """Raises ValueError if a weight is selected with different slices of its outputs.

        A selection holds each weight once, so that it cannot hold two slices of one.
        """
        for path, site in self.items():
            if path in other and other[path].part != site.part:
                raise ValueError(
                    f"`{sign}` of two selections with different columns of '{path}': "
                    f"{site.part or 'all'} and {other[path].part or 'all'}. Give each selection a "
                    "method of its own, and `chain` the methods."
                )

    def output_slice(self, index: int, of: int, groups: int = 1) -> "Sites":
        """The same weights with a slice of their outputs selected; see `OutputSlice`.

        `lora` and `ia3` then act on the slice alone; other methods refuse it.

        Args:
          index: Which of the `of` blocks, from 0.
          of: How many blocks a group of outputs has.
          groups: How many groups the outputs have, such as the number of heads.

        Raises:
          ValueError: The outputs do not divide into `of * groups` equal blocks, or a slice of
            them is selected already.
        """
        for site in self.values():
            if site.part is not None:
                raise ValueError(
                    f"Of '{site.path}', {site.part} is selected already, and of a slice no slice "
                    "can be taken. Select one with a larger `of` from the whole weight: "
                    f"`.output_slice({index}, {of * site.part.of}, ...)`."
                )
        # Files hold integers of Python, not of NumPy.
        part = OutputSlice(*map(operator.index, (index, of, groups)))
        for site in self.values():
            _check_slice(site, part)
        chosen = {p: dataclasses.replace(s, part=part) for p, s in self.items()}
        return Sites(chosen, self._every)

    def override(self, path: str, *roles: str) -> "Sites":
        """The same sites with other roles for the axes of one parameter.

        For roles that the program does not reveal: an ensemble under `vmap` looks like attention
        heads, and so do experts that are not weighted by a softmax. With roles "in" and "out",
        the parameter counts as a matrix from then on, even if the model computes something from
        it before it uses it. `lift` materializes the weight there, with a warning.

        Args:
          path: The parameter.
          roles: "stack", "in" or "out" for each axis of the array.

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

    def choices(self) -> str:
        """The parameters to choose from, as the text of an error about an empty selection."""
        if not self._every:
            return "The sites given are empty, and no parameter is known to choose from."
        others = [site for site in self._every.values() if not site.is_matrix]
        names = [f"'{s.path}' {s.shape} ({', '.join(sorted(s.kinds)) or 'unused'})" for s in others]
        matrices = [f"'{path}'" for path in self._every if path not in {s.path for s in others}]
        text = f"The sites given are empty. The model has the matrices {_some(matrices)}"
        text += f", and {_some(names) if names else 'no other parameters'}."
        wide = next((site for site in others if len(site.shape) > 1), None)
        if wide is None:
            return text
        roles = ", ".join(f"'{r}'" for r in (*[STACK] * (len(wide.shape) - 2), IN, OUT))
        return (
            f"{text} If another one acts as a matrix, say which of its axes are inputs and "
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
        """The selected parameters and their biases, with all that a method reads, as JSON."""
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

        Args:
          stored: A value read from JSON, which is checked.
          at: Name of the field of the file, for messages.

        Raises:
          ValueError: A field is not what it should be; names the field.
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
                    f"`{at}.{field}` names '{path}', which is not one of the parameters "
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
    """The site of one parameter that `Sites.to_json` wrote."""
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
    # Each axis of the array consists of one axis with a role, or of several neighbours.
    fine = list(itertools.accumulate((axis.size for axis in site.axes), operator.mul, initial=1))
    whole = list(itertools.accumulate(site.shape, operator.mul, initial=1))
    if min(0, *fine, *whole) < 0 or fine[-1] != whole[-1] or not {*whole} <= {*fine}:
        raise ValueError(
            f"`{at}.axes` are {row['axes']}, which do not make up the shape {site.shape}."
        )
    if site.part is not None:
        _check_slice(site, site.part)
    return site


def _check_slice(site: Site, part: OutputSlice) -> None:
    out = site.size(OUT)
    if not 0 <= part.index < part.of or part.groups < 1 or out % (part.of * part.groups):
        raise ValueError(
            f"Block {part.index} of {part.of} in {part.groups} groups does not exist in the output "
            f"axis of '{site.path}', which has length {out}: it must be a multiple of "
            f"{part.of} * {part.groups}, and the index below {part.of}."
        )


def by_pattern(value: Any, sites: Sites, what: str) -> dict[str, Any]:
    """The value of an option for each path, where it may be a mapping from patterns.

    Args:
      value: One value for all, or `{pattern: value}`, of which the first match wins.
      sites: The selected parameters.
      what: Name of the option, for messages.

    Returns:
      `{path: value}`.

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
    """The first twenty names, and how many more there are."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more if names else "none"


def _nearest(name: str, paths: Iterable[str]) -> str:
    """The paths that there are, those most similar to `name` first."""
    bare = name.strip("'*").replace("*", "")

    def likeness(path: str) -> float:
        return -difflib.SequenceMatcher(None, bare, path).ratio()

    ranked = sorted(paths, key=likeness)
    more = f" and {len(ranked) - 20} more" if len(ranked) > 20 else ""
    return f"There are: {', '.join(ranked[:20])}{more}." if ranked else "There are none."
