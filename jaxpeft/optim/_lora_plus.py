"""LoRA+: one learning rate for `a`, a larger one for `b`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optax

from jaxpeft._marks import Placeholder
from jaxpeft._method import takes_sites
from jaxpeft._sites import Sites
from jaxpeft._tree import flatten
from jaxpeft._view import View, is_view
from jaxpeft._weight import IN, OUT, Weight, chain_of


@takes_sites
def lora_plus(
    optimizer: Callable[[Any], optax.GradientTransformation],
    rate: float | Callable[[Any], Any],
    frozen: Any,
    sites: Sites,
    *,
    ratio: float = 16.0,
    embedding: float | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose rate is `ratio` times as large for the factors `b` of low-rank weights.

    A step of Adam moves every entry by about its rate, so that in y = x @ a @ b

        x @ da @ b      moves by sums of `in` terms:    rate of a * in
        x @ a @ db      moves by sums of r terms:       rate of b * r

    and as the model grows wider, both do their part only where the rate of `b` is larger by the
    order of `in`. This depends on the sides, not on which of the two starts at zero: `b` is
    (..., r, out) in LoRA and its relatives, also where `a` is frozen (`lora_fa`) or both start at
    something else (`pissa`). No other array called `b` is meant: no bias, no vector of `vera`, no
    shared rows of `miss`.

    An embedding reads single rows of `a`. No sum is as long as the model is wide, so there is
    nothing to make up for; with `b` random and `a` at zero, a larger rate of `b` would move what
    is multiplied by zero, and in a tied head, where b.T meets the input, it would be the wrong
    factor. Both its factors have one rate of their own, as in the authors' code, which takes 1e-6
    for it.

    Args:
      optimizer: From a rate or a schedule to an optimizer, such as `optax.adamw`.
      rate: Of everything else, `a` above all: a number, or a schedule.
      frozen: From `split`. It tells which arrays of the adapter are factors; nothing of it is
        kept.
      sites: Of the model, any selection. They tell which weights are embeddings, tied heads too.
      ratio: 16 in the paper, for `a` at a rate as for LoRA or a little below.
      embedding: Rate of both factors of an embedding. `None` means `rate`.

    Returns:
      A transformation of adapters `{path: array}`.

    Raises:
      ValueError: A ratio that is not positive, or a low-rank weight that the sites do not know
        (names it); no `b` is trained but those of embeddings; from `init`, an adapter without
        any of them.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp, optax
      >>> f, params = lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> sites = jp.sites(f, params, jnp.ones((1, 8)))
      >>> method = jp.chain(jp.lora(2, sites.linear), jp.bitfit(sites))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> tx = lora_plus(optax.sgd, 1.0, frozen, sites)
      >>> ones = jax.tree.map(jnp.ones_like, adapter)
      >>> updates, _ = tx.update(ones, tx.init(adapter))
      >>> {path: -float(x.max()) for path, x in updates.items()}
      {'b': 1.0, 'w/a': 1.0, 'w/b': 16.0}

    References:
      Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024, sections 3 and 4.
      https://arxiv.org/abs/2402.12354
      The rate of embeddings: https://github.com/nikhil-ghosh-berkeley/loraplus
    """
    if ratio <= 0:
        raise ValueError(f"`lora_plus(ratio={ratio})`: a positive number is needed.")
    kinds: dict[str, str] = {}
    for path, a, b in _factors(frozen):
        if path not in sites.every:
            raise ValueError(
                f"`lora_plus`: the sites do not know '{path}', which has low-rank factors, so "
                "whether it is an embedding is not known. They know "
                f"{list(sites.every)[:20]}. Give those of this model."
            )
        if "embedding" in sites.every[path].kinds:
            kinds |= {name: "embedding" for name in (a, b) if name is not None}
        else:
            kinds[b] = "b"
    if "b" not in kinds.values():
        raise ValueError(
            "`lora_plus`: this tree has no low-rank weight whose `b` is trained"
            + (f" but the embeddings' {sorted(kinds)}" if kinds else "")
            + ". It is for LoRA and its relatives; give the frozen tree that `split` returned."
        )

    def larger(step: Any) -> Any:
        return ratio * rate(step)  # type: ignore[operator]

    def labels(adapter: Mapping[str, Any]) -> dict[str, str]:
        found = {path: kinds.get(path, "other") for path in adapter}
        if "b" not in found.values():
            fast = sorted(path for path, kind in kinds.items() if kind == "b")
            raise ValueError(
                f"`lora_plus`: the frozen tree has places for {fast}, but this adapter has "
                f"{sorted(adapter)}. Give both from the same `split`."
            )
        return found

    rates = {
        "b": larger if callable(rate) else ratio * rate,
        "embedding": rate if embedding is None else embedding,
        "other": rate,
    }
    return optax.partition({kind: optimizer(of) for kind, of in rates.items()}, labels)


def _factors(frozen: Any) -> Iterator[tuple[str, str | None, str]]:
    """(path of the weight, name of `a`, name of `b`) where `b` is a hole.

    The name of an `a` that is frozen is `None`.
    """
    views, _ = flatten(frozen, is_leaf=is_view)
    for path, view in views.items():
        for weight in chain_of(view.weight) if isinstance(view, View) else ():
            if not _is_low_rank(weight):
                continue
            a, b = (getattr(weight, name) for name in "ab")
            if isinstance(b, Placeholder):
                yield path, a.name if isinstance(a, Placeholder) else None, b.name


def _is_low_rank(weight: Weight) -> bool:
    """Whether its class declares `a` (in, k) and `b` (k, out), whatever the name of k."""
    sides = {f.name: f.metadata.get("axes", ()) for f in dataclasses.fields(weight)}  # type: ignore
    a, b = sides.get("a", ()), sides.get("b", ())
    return len(a) == len(b) == 2 and (a[0], b[1]) == (IN, OUT) and a[1] == b[0]
