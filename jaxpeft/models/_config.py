"""Between the `config.json` of a Hugging Face folder and the `Config` of a reference model.

A model family is a table, an entry of the model's `FAMILIES`: one row for each option that its
`config.json` holds, and one for each kind of tensor. The rows read the options into the fields of
`Config`, check them, and write them back in the same order. A family that stores a decoder under
other names is added so:

    FAMILIES["other"] = Family(
        options={
            "model_type": Option("model_type"),
            "n_embd": Option("hidden_size"),
            "n_positions": Option("max_position_embeddings", default=1024),
            "hidden_act": Constant(("silu", "swish"), written="silu"),
            ...
        },
        tensors=((r"embed/embedding", r"transformer.wte.weight", False), ...),
        fields={"qk_norm": True},
        absent=("mlp_bias",),
    )
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxpeft.models import _hf_folder as folders

__all__ = ["Constant", "Family", "Group", "Kind", "Option", "Reading", "check", "field"]
__all__ += ["find", "read", "refusal", "write"]
__all__ += ["COUNT", "FLAG", "INTEGERS", "NON_NEGATIVE", "NUMBER", "SIZE", "TEXT", "TOKEN_ID"]
__all__ += ["TOKEN_IDS", "choice", "optional"]

C = TypeVar("C")


# What a field may hold ---------------------------------------------------------------------------


def _same(value: Any) -> Any:
    return value


class Kind(NamedTuple):
    """Which values a field may hold.

    Attributes:
      words: What the value must be, as errors say it: "a positive integer".
      accepts: Whether a value is one.
      is_choice: Whether other values make sense too, but are not computed here.
      from_json: The value of the field for that in `config.json`; other values are returned
        as they are, for `accepts` to refuse.
      to_json: The inverse.
    """

    words: str
    accepts: Callable[[Any], bool]
    is_choice: bool = False
    from_json: Callable[[Any], Any] = _same
    to_json: Callable[[Any], Any] = _same


def _is_integer(value: Any, least: float = -math.inf) -> bool:
    # In Python, True is an integer.
    return (
        isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_integers(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_integer(item) for item in value)


def _ids_from_json(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _ids_to_json(ids: tuple[int, ...]) -> Any:
    return ids[0] if len(ids) == 1 else list(ids) or None


SIZE = Kind("a positive integer", lambda value: _is_integer(value, 1))
COUNT = Kind("an integer of at least 0", lambda value: _is_integer(value, 0))
NUMBER = Kind("a positive number", lambda value: _is_number(value) and value > 0)
NON_NEGATIVE = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
FLAG = Kind("a boolean", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
TOKEN_ID = Kind("an integer", _is_integer)
INTEGERS = Kind("a tuple of integers", _are_integers)
TOKEN_IDS = Kind(
    "a tuple of integers (in config.json an integer, a list of integers or null)",
    _are_integers,
    from_json=_ids_from_json,
    to_json=_ids_to_json,
)


def optional(kind: Kind) -> Kind:
    """The kind of the same values, or None (in `config.json` null)."""
    return kind._replace(
        words=f"{kind.words} or null",
        accepts=lambda value: value is None or kind.accepts(value),
    )


def choice(*values: str) -> Kind:
    """The kind of a string that is one of `values`, those that the model computes."""
    words = " or ".join(map(repr, values))
    return Kind(words, lambda value: isinstance(value, str) and value in values, is_choice=True)


def field(kind: Kind, default: Any = dataclasses.MISSING, *, in_json: bool = True) -> Any:
    """A field of a `Config`.

    Args:
      kind: Which values it may hold.
      default: Its default; without one it must be given.
      in_json: Whether `config.json` tells its value. If not, `load` finds it in the tensors.
    Returns:
      The field for a dataclass.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "in_json": in_json})


def check(config: Any) -> None:
    """Checks each field of a dataclass by its kind.

    Raises:
      ValueError: A field holds no value of its kind.
    """
    for name, kind in _kinds(type(config)).items():
        value = getattr(config, name)
        if not kind.accepts(value):
            call = f"{type(config).__name__}({name}={reprlib.repr(value)})"
            raise ValueError(f"`{call}`: `{name}` must be {kind.words.replace('null', 'None')}.")


def _kinds(cls: type) -> dict[str, Kind]:
    fields = dataclasses.fields(cls)
    return {field.name: field.metadata["kind"] for field in fields if "kind" in field.metadata}


# The rows of a family ----------------------------------------------------------------------------


_REQUIRED: Any = object()


class Option(NamedTuple):
    """The row of an option that is a field of `Config`.

    Attributes:
      fields: The field, or all fields that have the value of this one option.
      default: The value of an absent option, as in transformers. Without one it must be there.
      fallback: The field's value where the option is null, from the fields that are known: a
        number of heads, for example. Without one, null is a value like any other.
    """

    fields: str | tuple[str, ...]
    default: Any = _REQUIRED
    fallback: Callable[[Mapping[str, Any]], Any] | None = None


class Constant(NamedTuple):
    """The row of an option that the model computes for one meaning only.

    Attributes:
      allowed: The values with that meaning; the first is also that of an absent option. Without
        any, the option means nothing to the model.
      written: What is written. `...` writes nothing.
    """

    allowed: tuple[Any, ...] = ()
    written: Any = ...


class Group(NamedTuple):
    """The row of several options that make sense together only, such as those of RoPE.

    Attributes:
      read: The fields that the options decide, from the other fields and all options.
      write: The options that say so, of a `Config`.
    """

    read: Callable[[Reading], Mapping[str, Any]]
    write: Callable[[Any], Mapping[str, Any]]


class Family(NamedTuple):
    """How the Hugging Face folders of one `model_type` describe and store a reference model.

    Attributes:
      options: A row for each option of `config.json`, by its name there, in the order in which
        they are written.
      tensors: The names of the tensors, or the function that gives them for a `Config`.
      fields: Fields of `Config` that the family has no choice about.
      absent: Options of related families that this one does not have; null, false and 0 are passed
        over.
      renamed: Replacements (pattern, replacement) that give the tensors of older folders the names
        of the table.
      ignored: Patterns of the names of tensors that are passed over.
    """

    options: Mapping[str, Option | Constant | Group]
    tensors: folders.Table | Callable[[Any], folders.Table]
    fields: Mapping[str, Any] = {}
    absent: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


class Reading(NamedTuple):
    """A `config.json` that is being read.

    Attributes:
      options: What it holds.
      fields: The fields of `Config` that are known so far.
      model: What the model is, as errors say it: "decoder".
    """

    options: Mapping[str, Any]
    fields: dict[str, Any]
    model: str

    def value(self, name: str, kind: Kind, default: Any = None) -> Any:
        """The option `name`, or the default where it is absent or null.

        Raises:
          ValueError: It is of another kind.
        """
        value = self.options.get(name)
        if value is None:
            return default
        self.check(name, kind, value)
        return value

    def check(self, name: str, kind: Kind, value: Any, given: Any = ...) -> None:
        """Raises a ValueError where the value of an option is not of its kind.

        Args:
          name: Name of the option.
          kind: That it should be of.
          value: In the form of the field.
          given: The value in `config.json`, if that has another form.
        """
        if kind.accepts(value):
            return
        given = value if given is ... else given
        if kind.is_choice:
            raise refusal(self.model, name, given, kind.words)
        raise ValueError(
            f"config.json has {name}={reprlib.repr(given)}, but it must be {kind.words}. Correct "
            "it, or copy the model's own config.json."
        )


def refusal(model: str, name: str, value: Any, allowed: str) -> ValueError:
    """The error for an option that is sound but not computed."""
    return ValueError(
        f"config.json has {name}={value!r}, which this {model} does not compute; it must be "
        f"{allowed}. Use a model without it."
    )


def find(families: Mapping[str, Family], model_type: Any, model: str) -> Family:
    """The family of a `model_type`.

    Raises:
      ValueError: There is none, named with those that there are.
    """
    if not isinstance(model_type, str) or model_type not in families:
        known = ", ".join(families)
        known = f"one of {known}" if len(families) > 1 else repr(known)
        raise refusal(model, "model_type", model_type, known)
    return families[model_type]


def read(cls: type[C], options: Mapping[str, Any], families: Mapping[str, Family], model: str) -> C:
    """The `Config` that a parsed `config.json` describes.

    Args:
      cls: The class of the `Config`.
      options: The contents of `config.json`.
      families: The families of this model, by `model_type`.
      model: What the model is, for errors: "decoder".
    Raises:
      ValueError: An option is missing, of another kind, or not computed by this model.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"config.json must hold an object, got {reprlib.repr(options)}.")
    family = find(families, options.get("model_type"), model)
    rows = family.options
    missing = [
        name
        for name, row in rows.items()
        if isinstance(row, Option) and row.default is _REQUIRED and name not in options
    ]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}. Copy the model's own one.")
    reading = Reading(options, dict(family.fields), model)
    for name in family.absent:
        if options.get(name):
            no_option = f"absent, since {options['model_type']} has no such option"
            raise refusal(model, name, options[name], no_option)
    for name, row in rows.items():
        if isinstance(row, Constant) and row.allowed:
            if options.get(name, row.allowed[0]) not in row.allowed:
                raise refusal(model, name, options[name], " or ".join(map(repr, row.allowed)))
    kinds = _kinds(cls)
    # A fallback may need fields whose rows come later, and a group needs all fields.
    fallbacks: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {}
    for name, row in rows.items():
        if not isinstance(row, Option):
            continue
        fields = (row.fields,) if isinstance(row.fields, str) else row.fields
        given = options.get(name, row.default)
        if given is None and row.fallback is not None:
            fallbacks[fields] = row.fallback
            continue
        value = kinds[fields[0]].from_json(given)
        reading.check(name, kinds[fields[0]], value, given)
        reading.fields.update(dict.fromkeys(fields, value))
    for fields, fallback in fallbacks.items():
        reading.fields.update(dict.fromkeys(fields, fallback(reading.fields)))
    for row in rows.values():
        if isinstance(row, Group):
            reading.fields.update(row.read(reading))
    return cls(**reading.fields)


def write(config: Any, families: Mapping[str, Family], model: str) -> dict[str, Any]:
    """The contents of a `config.json`, such that `read` gives this `Config` again.

    Args:
      config: The `Config`.
      families: As in `read`.
      model: As in `read`.
    Raises:
      ValueError: The family has no option for the value of a field.
    """
    kinds, options = _kinds(type(config)), {}
    for name, row in find(families, config.model_type, model).options.items():
        if isinstance(row, Option):
            field = row.fields if isinstance(row.fields, str) else row.fields[-1]
            options[name] = kinds[field].to_json(getattr(config, field))
        elif isinstance(row, Group):
            options |= row.write(config)
        elif row.written is not ...:
            options[name] = row.written
    again = read(type(config), options, families, model)
    for field_ in dataclasses.fields(config):
        mine, theirs = getattr(config, field_.name), getattr(again, field_.name)
        if field_.metadata.get("in_json", True) and mine != theirs:
            raise ValueError(
                f"config.json of a {config.model_type} cannot say {field_.name}={mine!r}, it would "
                f"be read as {theirs!r}. Choose another `model_type`, or keep the field as it says."
            )
    return options
