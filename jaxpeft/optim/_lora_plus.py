"""LoRA+: a larger learning rate for `b` than for `a`."""

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
    learning_rate: float | Callable[[Any], Any],
    frozen: Any,
    sites: Sites,
    *,
    ratio: float = 16.0,
    embedding_learning_rate: float | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: an optimizer with a `ratio` times larger learning rate for the factors `b`.

    A step of Adam moves every entry by about its learning rate, so in y = x @ a @ b

        x @ da @ b    changes by sums of `in` terms, learning rate of a * in
        x @ a @ db    changes by sums of r terms, learning rate of b * r

    and as the width of the model grows, both contribute only if the learning rate of `b` is larger
    by a factor of the order of `in`. This depends on the sides, not on which of the two starts at
    zero: `b` is (..., r, out) in LoRA and its relatives, also where `a` is frozen (`lora_fa`)
    or where both start at other values (`pissa`). Other arrays called `b` are not meant: biases,
    vectors of `vera`, shared rows of `miss`.

    An embedding reads single rows of `a`, so none of its sums grow with the width and both
    factors take one learning rate, `embedding_learning_rate`; the authors' code uses 1e-6. In a
    tied head, where b.T meets the input, a larger learning rate for `b` would be the wrong one.

    Args:
      optimizer: A function from a learning rate to an optimizer, such as `optax.adamw`.
      learning_rate: Learning rate of everything but `b`: a number, or a schedule.
      frozen: From `split`. It shows which arrays of the adapter are factors; no array of it is
        kept.
      sites: Any sites of the model. They show which weights are embeddings, tied heads included.
      ratio: Learning rate of `b` divided by `learning_rate`; 16 in the paper, with a
        `learning_rate` as for LoRA or a little lower.
      embedding_learning_rate: Learning rate of both factors of an embedding: a number, or a
        schedule. `None` means `learning_rate`.

    Returns:
      A transformation of adapters {path: array}.

    Raises:
      ValueError: A ratio that is not positive; a low-rank weight that the sites do not have
        (names it); no `b` is trained but those of embeddings; from `init`, an adapter without
        any `b` of the frozen tree.

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
      Learning rate of embeddings: https://github.com/nikhil-ghosh-berkeley/loraplus
    """
    if ratio <= 0:
        raise ValueError(f"`lora_plus(ratio={ratio})`: `ratio` must be positive, such as 16.")
    kinds: dict[str, str] = {}
    for path, a, b in _factors(frozen):
        if path not in sites.every:
            raise ValueError(
                f"`lora_plus`: the sites do not have '{path}', which has low-rank factors, so it "
                f"is unknown whether it is an embedding. They have {list(sites.every)[:20]}. Give "
                "sites of this model."
            )
        if "embedding" in sites.every[path].kinds:
            kinds |= {name: "embedding" for name in (a, b) if name is not None}
        else:
            kinds[b] = "b"
    if "b" not in kinds.values():
        raise ValueError(
            "`lora_plus`: this tree has no low-rank weight whose `b` is trained"
            + (f" but the embeddings' {sorted(kinds)}" if kinds else "")
            + ". Use it with LoRA and its relatives, and give the frozen tree from `split`."
        )

    def larger(count: Any) -> Any:
        return ratio * learning_rate(count)  # type: ignore[operator]

    def labels(adapter: Mapping[str, Any]) -> dict[str, str]:
        found = {path: kinds.get(path, "other") for path in adapter}
        if "b" not in found.values():
            fast = sorted(path for path, kind in kinds.items() if kind == "b")
            raise ValueError(
                f"`lora_plus`: the frozen tree has placeholders for {fast}, but this adapter has "
                f"{sorted(adapter)}. Give the frozen tree and the adapter of the same `split`."
            )
        return found

    of_embeddings = embedding_learning_rate
    learning_rates = {
        "b": larger if callable(learning_rate) else ratio * learning_rate,
        "embedding": learning_rate if of_embeddings is None else of_embeddings,
        "other": learning_rate,
    }
    return optax.partition({kind: optimizer(x) for kind, x in learning_rates.items()}, labels)


def _factors(frozen: Any) -> Iterator[tuple[str, str | None, str]]:
    """Yields (path of the weight, name of `a`, name of `b`) for each trained `b`.

    The name of a frozen `a` is `None`.
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
    """Whether its class declares `a` with axes (in, k) and `b` with axes (k, out), for any k."""
    sides = {f.name: f.metadata.get("axes", ()) for f in dataclasses.fields(weight)}  # type: ignore
    a, b = sides.get("a", ()), sides.get("b", ())
    return len(a) == len(b) == 2 and (a[0], b[1]) == (IN, OUT) and a[1] == b[0]
