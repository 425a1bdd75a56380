"""Task heads for any trunk: what turns hidden states into the outputs of a task, and its loss.

Axes: B rows, T tokens, D width, C choices, V vocabulary.

A trunk is any function `hidden(params, *args, **kwargs) -> (B, T, D)`, used as it is. A head puts
one linear map on it, and the two are one function of one tree, {"trunk": ..., "head": ...}:

    head = heads.sequence(config.width, classes=6, pool="mean")
    model = head.on(encoder.pure(config))
    params = {"trunk": params, "head": head.init(key)}
    sites = jp.sites(model, params, tokens, mask=mask)
    method = jp.chain(jp.lora(8, sites.match("trunk/*attn*kernel")),
                      jp.unfreeze(sites.match("head/*")))
    frozen, adapter = jp.split(method(key, params))

    def loss_fn(adapter, frozen, batch, key):
        logits = jp.lift(model)(jp.combine(frozen, adapter), batch["tokens"], mask=batch["mask"])
        return head.loss(logits, batch["labels"])

So the head is trained with the adapter and saved with it. To load, `head.init` with any key gives
it its place among the params; its values come from the adapter's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxpeft._losses import cross_entropy, next_token
from jaxpeft.models._layers import normal

__all__ = [
    "IGNORED",
    "Head",
    "causal_lm",
    "multiple_choice",
    "question_answering",
    "regression",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
]

Params = dict[str, Any]

#: The label of what does not count in a loss.
IGNORED = -100


class Head(NamedTuple):
    """A task head: three functions, without state.

    Attributes:
      init: `init(key, dtype=float32)`, new parameters: a kernel (in, out) of Normal(0, 0.02), and
        where the head has one a bias of zeros.
      forward: `forward(params, hidden, mask=None)`, the outputs for hidden states (B, T, D) and
        their mask (B, T), true for tokens.
      loss: `loss(outputs, labels, mask=None)`, `(sum, count)` over a batch as in
        `jaxpeft.train.cross_entropy`: the mean is `sum / count`. In float32 or wider. `mask` has
        the shape of the labels: true, or a weight, for those that count. Labels of -100 do not
        count; any other label that is none of the classes makes the loss NaN.
      choices: Whether inputs are (B, C, ...): one row of tokens for each of C choices.
    """

    init: Callable[..., Params]
    forward: Callable[..., Array]
    loss: Callable[..., tuple[Array, Array]]
    choices: bool = False

    def on(
        self, trunk: Callable[..., Any], *, mask: str | int = "mask", virtual: int = 0
    ) -> Callable[..., Any]:
        """The function `model(params, *args, **kwargs) -> outputs` of trunk and head together.

        Args:
          trunk: `trunk(params["trunk"], *args, **kwargs)` gives hidden states (B, T, D), or a
            tuple of them and more (a cache), which the model then gives with the outputs.
          mask: Which argument of the trunk is the mask (B, T): its keyword, or its place after
            the params. Where a call leaves it out, all are tokens.
          virtual: How many positions at the front belong to no token (of a prompt or a prefix).
            They are cut off before the head, so that outputs and labels stand at the same places.
            Decoding steps through a cache have none: generate with a model without it.
        Returns:
          A function of {"trunk": ..., "head": ...}.
        """

        def model(params: Params, *args: Any, **kwargs: Any) -> Any:
            kept = args[mask] if isinstance(mask, int) else kwargs.get(mask)
            lead: tuple[int, ...] = ()
            if self.choices:
                args, kwargs, lead = _fold(args, kwargs)
            hidden = trunk(params["trunk"], *args, **kwargs)
            hidden, *more = hidden if isinstance(hidden, tuple) else (hidden,)
            hidden = hidden.reshape(lead + hidden.shape[1:]) if lead else hidden
            hidden = hidden[..., virtual:, :]
            outputs = self.forward(params["head"], hidden, _cut(kept, virtual, hidden))
            return (outputs, *more) if more else outputs

        return model


# Heads -------------------------------------------------------------------------------------------


def sequence_classification(width: int, classes: int, *, pool: str = "first") -> Head:
    """Sequence classification: logits (B, classes) = pool(hidden) @ kernel + bias.

    The loss is cross entropy with labels (B,).

    Args:
      width: Of the hidden states, D.
      classes: How many there are.
      pool: "first" or "last" token of the mask, or "mean" over it.
    Raises:
      ValueError: An unknown `pool`. In `forward`, hidden states or parameters of another size.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> head = sequence_classification(4, classes=3, pool="last")
      >>> model = head.on(lambda params, ids, mask: params[ids])  # the trunk is a table
      >>> params = {"trunk": jnp.ones((9, 4)), "head": head.init(jax.random.key(0))}
      >>> logits = model(params, jnp.array([[5, 6, 0]]), mask=jnp.array([[1, 1, 0]]))
      >>> logits.shape, head.loss(logits, jnp.array([2]))[1].item()
      ((1, 3), 1.0)
    """
    pooled = _pooling(pool)

    def forward(params: Params, hidden: Array, mask: Array | None = None) -> Array:
        return apply(params, pooled(hidden, mask))

    init, apply = _linear("sequence", width, classes)
    return Head(init, forward, _class_loss)


def token_classification(width: int, classes: int) -> Head:
    """Token classification: logits (B, T, classes) = hidden @ kernel + bias.

    The loss is cross entropy with labels (B, T); the padding mask does as its `mask`.

    Args:
      width: Of the hidden states, D.
      classes: How many there are.
    Raises:
      ValueError: In `forward`, hidden states or parameters of another size.
    """
    init, apply = _linear("tokens", width, classes)
    return Head(init, lambda params, hidden, mask=None: apply(params, hidden), _class_loss)


def question_answering(width: int) -> Head:
    """Spans: logits (B, T, 2) = hidden @ kernel + bias, that a span starts and that it ends there.

    Padding has the lowest logit there is, so no span starts or ends in it. The loss is cross
    entropy over the T places, with labels (B, 2): the places of the first and of the last token.

    Args:
      width: Of the hidden states, D.
    Raises:
      ValueError: In `forward`, hidden states or parameters of another size.
    """

    def forward(params: Params, hidden: Array, mask: Array | None = None) -> Array:
        logits = apply(params, hidden)
        if mask is None:
            return logits
        # Finite: in a row of padding alone, infinities would give NaNs.
        return jnp.where(jnp.asarray(mask, bool)[..., None], logits, jnp.finfo(logits.dtype).min)

    def loss(logits: Array, labels: Array, mask: Array | None = None) -> tuple[Array, Array]:
        return _class_loss(jnp.swapaxes(logits, -1, -2), labels, mask)

    init, apply = _linear("spans", width, 2)
    return Head(init, forward, loss)


def multiple_choice(width: int, *, pool: str = "first") -> Head:
    """Multiple choice: logits (B, C) = pool(hidden) @ kernel + bias, one for each choice.

    Inputs are (B, C, T), each choice a row of its own for the trunk: of a model's arguments, the
    arrays whose first two axes are those of the first one are folded into rows (B * C, ...), the
    others pass on as they are. The loss is cross entropy over the choices, with labels (B,).

    Args:
      width: Of the hidden states, D.
      pool: "first" or "last" token of the mask, or "mean" over it.
    Raises:
      ValueError: An unknown `pool`. In `forward`, hidden states or parameters of another size; in
        the model, a first argument that is not (B, C, T).
    """
    pooled = _pooling(pool)

    def forward(params: Params, hidden: Array, mask: Array | None = None) -> Array:
        return apply(params, pooled(hidden, mask))[..., 0]

    init, apply = _linear("choice", width, 1)
    return Head(init, forward, _class_loss, choices=True)


def regression(width: int, outputs: int = 1, *, pool: str = "first") -> Head:
    """Regression: predictions (B, outputs) = pool(hidden) @ kernel + bias.

    The loss is the sum of (prediction - label) ** 2 with labels (B, outputs), real numbers, so
    that only its mask says which of them do not count: -100 is a number like any other.

    Args:
      width: Of the hidden states, D.
      outputs: Numbers to predict for each row.
      pool: "first" or "last" token of the mask, or "mean" over it.
    Raises:
      ValueError: An unknown `pool`. In `forward`, hidden states or parameters of another size; in
        `loss`, labels of another shape than the predictions.
    """
    pooled = _pooling(pool)

    def forward(params: Params, hidden: Array, mask: Array | None = None) -> Array:
        return apply(params, pooled(hidden, mask))

    init, apply = _linear("regression", width, outputs)
    return Head(init, forward, _square_loss)


def causal_lm(width: int, vocab: int) -> Head:
    """Causal language modelling: logits (B, T, V) = hidden @ kernel, of the token that follows.

    The kernel is one of its own, also where the trunk's model ties its head to the embedding;
    instead of `init`, a copy of that head is a good start: {"kernel": embedding.T + 0}.

    The loss is cross entropy with labels (B, T) that stand where their tokens do: place t is
    asked for label t + 1. The padding mask does as its `mask`.

    Args:
      width: Of the hidden states, D.
      vocab: How many tokens there are, V.
    Raises:
      ValueError: In `forward`, hidden states or parameters of another size.
    """

    def loss(logits: Array, labels: Array, mask: Array | None = None) -> tuple[Array, Array]:
        weights = _weights(labels, mask, logits.shape[-1])
        return cross_entropy(logits, *next_token(labels, weights))

    init, apply = _linear("causal_lm", width, vocab, bias=False)
    return Head(init, lambda params, hidden, mask=None: apply(params, hidden), loss)


def seq2seq_lm(width: int, vocab: int) -> Head:
    """Sequence-to-sequence language modelling: logits (B, T, V) = hidden @ kernel.

    The trunk's hidden states are those of the decoder, which has read the labels one place later:
    place t is asked for label t. The loss is cross entropy with labels (B, T).

    Args:
      width: Of the hidden states, D.
      vocab: How many tokens there are, V.
    Raises:
      ValueError: In `forward`, hidden states or parameters of another size.
    """
    init, apply = _linear("seq2seq_lm", width, vocab, bias=False)
    return Head(init, lambda params, hidden, mask=None: apply(params, hidden), _class_loss)


# What they are made of ---------------------------------------------------------------------------


def _linear(
    name: str, width: int, outputs: int, *, bias: bool = True
) -> tuple[Callable[..., Params], Callable[[Params, Array], Array]]:
    """`init(key, dtype)` and `apply(params, x)` of x @ kernel + bias."""

    def init(key: Array, dtype: Any = jnp.float32) -> Params:
        kernel = {"kernel": normal(key, (width, outputs), dtype)}
        return {**kernel, "bias": jnp.zeros((outputs,), dtype)} if bias else kernel

    def apply(params: Params, x: Array) -> Array:
        if x.shape[-1] != width:
            raise ValueError(
                f"`heads.{name}(width={width})` is on a trunk whose hidden states have width "
                f"{x.shape[-1]}. Make the head with width={x.shape[-1]}."
            )
        if params["kernel"].shape != (width, outputs):
            raise ValueError(
                f"This `heads.{name}` has a kernel of shape {(width, outputs)}, but its parameters "
                f"hold one of {params['kernel'].shape}. Make the head with the sizes it was "
                "trained with, or take new parameters from its `init`."
            )
        y = x @ params["kernel"]
        return y + params["bias"] if bias else y

    return init, apply


def _pooling(pool: str) -> Callable[[Array, Array | None], Array]:
    """The function from hidden states (..., T, D) and their mask (..., T) to (..., D)."""
    if pool not in _POOLS:
        raise ValueError(f"`pool` must be one of {', '.join(_POOLS)}, got {pool!r}.")
    return _POOLS[pool]


def _first(x: Array, mask: Array | None) -> Array:
    # Not simply at 0: on the left there may be padding.
    return x[..., 0, :] if mask is None else _pick(x, jnp.argmax(mask, axis=-1))


def _last(x: Array, mask: Array | None) -> Array:
    if mask is None:
        return x[..., -1, :]
    return _pick(x, mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1))


def _mean(x: Array, mask: Array | None) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return jnp.mean(wide, axis=-2).astype(x.dtype)
    count = jnp.maximum(jnp.sum(mask, axis=-1, dtype=wide.dtype), 1)
    # `where` and not a product, which would make NaNs of padding into NaNs of the mean.
    total = jnp.sum(jnp.where(mask[..., None], wide, 0), axis=-2)
    return (total / count[..., None]).astype(x.dtype)


def _pick(x: Array, at: Array) -> Array:
    return jnp.take_along_axis(x, at[..., None, None], axis=-2)[..., 0, :]


_POOLS = {"first": _first, "last": _last, "mean": _mean}


def _cut(mask: Any, virtual: int, hidden: Array) -> Array | None:
    """The mask at the places of the hidden states that the head reads."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)[..., virtual:]
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(
            f"The head reads hidden states {hidden.shape} under a mask {mask.shape}, both without "
            f"the {virtual} virtual positions; the mask must be {hidden.shape[:-1]}. Say with "
            "`on(..., virtual=...)` how many positions at the front of both are no tokens."
        )
    return mask


def _fold(args: tuple, kwargs: dict) -> tuple[tuple, dict, tuple[int, ...]]:
    """The arguments with choices folded into rows, and (B, C)."""
    shape = jnp.shape(args[0]) if args else ()
    if len(shape) != 3:
        raise ValueError(
            f"`heads.choice` needs inputs (rows, choices, tokens), got a first argument of shape "
            f"{shape}. Stack the choices of a row along a second axis."
        )
    lead = shape[:2]

    def fold(x: Any) -> Any:
        folds = hasattr(x, "shape") and x.ndim > 2 and x.shape[:2] == lead
        return x.reshape(-1, *x.shape[2:]) if folds else x

    args, kwargs = jax.tree.map(fold, (args, kwargs))
    return args, kwargs, lead


# Losses ------------------------------------------------------------------------------------------


def _class_loss(logits: Array, labels: Array, mask: Array | None = None) -> tuple[Array, Array]:
    return cross_entropy(logits, labels, _weights(labels, mask, logits.shape[-1]))


def _weights(labels: Array, mask: Array | None, classes: int) -> Array:
    """What each label counts: 0 where it is ignored, NaN where it is none of the classes."""
    mask = jnp.ones(labels.shape) if mask is None else _fitting(mask, labels)
    known = (labels >= 0) & (labels < classes)
    counts = (labels != IGNORED) & (mask != 0)
    return jnp.where(counts, jnp.where(known, mask, jnp.nan), 0)


def _square_loss(outputs: Array, labels: Array, mask: Array | None = None) -> tuple[Array, Array]:
    if outputs.shape != labels.shape:
        raise ValueError(
            f"The labels of a regression have the shape of its predictions {outputs.shape}, got "
            f"{labels.shape}. Reshape them."
        )
    wide = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    weights = jnp.ones(labels.shape, wide.dtype)
    if mask is not None:
        weights = _fitting(mask, labels).astype(wide.dtype)
    # What does not count may be NaN; also its gradient must be zero.
    labels = jnp.where(weights == 0, jax.lax.stop_gradient(wide), labels)
    return jnp.sum(weights * optax.losses.squared_error(wide, labels)), jnp.sum(weights)


def _fitting(mask: Any, labels: Array) -> Array:
    mask = jnp.asarray(mask)
    if mask.shape != labels.shape:
        raise ValueError(
            f"The mask of a loss says which labels count, so it has their shape {labels.shape}, "
            f"got {mask.shape}."
        )
    return mask
