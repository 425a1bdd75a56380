"""Task heads for any trunk: the map from hidden states to the outputs of a task, and its loss.

Axes: B rows, T tokens, D hidden size, C choices, V vocabulary.

A trunk is any function `hidden(params, *args, **kwargs) -> (B, T, D)`, used as it is. A head puts
one linear map on it, and the two are one function of one tree, {"trunk": ..., "head": ...}:

    head = heads.sequence_classification(config.hidden_size, num_classes=6, pool="mean")
    model = head.on(encoder.apply_fn(config))
    params = {"trunk": params, "head": head.init(key)}
    sites = jp.sites(model, params, tokens, mask=mask)
    method = jp.chain(jp.lora(8, sites.match("trunk/*attn*kernel")),
                      jp.unfreeze(sites.match("head/*")))
    frozen, adapter = jp.split(method(key, params))

    def loss_fn(frozen, adapter, batch, key):
        logits = jp.lift(model)(jp.combine(frozen, adapter), batch["tokens"], mask=batch["mask"])
        return head.loss(logits, batch["labels"])

The head is trained and saved with the adapter. To load, put `head.init(key)` with any key among
the params; its values come from the adapter's folder.
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
    "IGNORE_INDEX",
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

#: The label of tokens or rows that do not count in a loss.
IGNORE_INDEX = -100


class Head(NamedTuple):
    """A task head: three functions, without state.

    Attributes:
      init: `init(key, dtype=float32)`, new parameters: a kernel (in, out) of Normal(0, 0.02 ** 2),
        and a bias of zeros where the head has one.
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
          mask: Which argument of the trunk is the mask (B, T): its keyword, or its index among
            the arguments after the params. Where a call leaves it out, all are tokens.
          virtual: The number of virtual positions in front (of a prompt or a prefix). They are
            dropped before the head, so that outputs and labels have the same positions. Decoding
            steps through a cache have none: generate with a model made with `virtual=0`.
        Returns:
          A function of {"trunk": ..., "head": ...}.
        """

        def model(params: Params, *args: Any, **kwargs: Any) -> Any:
            given = args[mask] if isinstance(mask, int) else kwargs.get(mask)
            lead: tuple[int, ...] = ()
            if self.choices:
                args, kwargs, lead = _merge_choices(args, kwargs)
            hidden = trunk(params["trunk"], *args, **kwargs)
            hidden, *more = hidden if isinstance(hidden, tuple) else (hidden,)
            hidden = hidden.reshape(lead + hidden.shape[1:]) if lead else hidden
            hidden = hidden[..., virtual:, :]
            outputs = self.forward(params["head"], hidden, _drop_virtual(given, virtual, hidden))
            return (outputs, *more) if more else outputs

        return model


# Heads -------------------------------------------------------------------------------------------


def sequence_classification(hidden_size: int, num_classes: int, *, pool: str = "first") -> Head:
    """Sequence classification: logits (B, num_classes) = pool(hidden) @ kernel + bias.

    The loss is cross entropy with labels (B,).

    Args:
      hidden_size: Size of the hidden states, D.
      num_classes: The number of classes.
      pool: "first" or "last" token of the mask, or "mean" over it.
    Raises:
      ValueError: An unknown `pool`. In `forward`, hidden states or parameters of another size.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> head = sequence_classification(4, num_classes=3, pool="last")
      >>> model = head.on(lambda params, ids, mask: params[ids])  # the trunk is a table
      >>> params = {"trunk": jnp.ones((9, 4)), "head": head.init(jax.random.key(0))}
      >>> logits = model(params, jnp.array([[5, 6, 0]]), mask=jnp.array([[1, 1, 0]]))
      >>> logits.shape, head.loss(logits, jnp.array([2]))[1].item()
      ((1, 3), 1.0)
    """
    pooled = _pooling(pool)

    def forward(params: Params, hidden: Array, mask: Array | None = None) -> Array:
        return apply(params, pooled(hidden, mask))

    init, apply = _linear("sequence_classification", hidden_size, num_classes)
    return Head(init, forward, _class_loss)


def token_classification(hidden_size: int, num_classes: int) -> Head:
    """Token classification: logits (B, T, num_classes) = hidden @ kernel + bias.

    The loss is cross entropy with labels (B, T); the padding mask can be its `mask`.

    Args:
      hidden_size: Size of the hidden states, D.
      num_classes: The number of classes.
    Raises:
      ValueError: In `forward`, hidden states or parameters of another size.
    """
    init, apply = _linear("token_classification", hidden_size, num_classes)
    return Head(init, lambda params, hidden, mask=None: apply(params, hidden), _class_loss)


def question_answering(hidden_size: int) -> Head:
    """Extractive question answering: logits (B, T, 2) = hidden @ kernel + bias.

    The two logits of a token are those that the answer starts and that it ends there. Padding has
    the lowest logit of the dtype, so no answer starts or ends in it. The loss is cross entropy
    over the T positions, with labels (B, 2): the positions of the first and of the last token.

    Args:
      hidden_size: Size of the hidden states, D.
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

    init, apply = _linear("question_answering", hidden_size, 2)
    return Head(init, forward, loss)


def multiple_choice(hidden_size: int, *, pool: str = "first") -> Head:
    """Multiple choice: logits (B, C) = pool(hidden) @ kernel + bias, one for each choice.

    Inputs are (B, C, T), and the trunk sees each choice as a row of its own: arguments whose first
    two axes are those of the first argument are reshaped to (B * C, ...), all others are passed on
    as they are. The loss is cross entropy over the choices, with labels (B,).

    Args:
      hidden_size: Size of the hidden states, D.
      pool: "first" or "last" token of the mask, or "mean" over it.
    Raises:
      ValueError: An unknown `pool`. In `forward`, hidden states or parameters of another size; in
        the model, a first argument that is not (B, C, T).
    """
    pooled = _pooling(pool)

    def forward(params: Params, hidden: Array, mask: Array | None = None) -> Array:
        return apply(params, pooled(hidden, mask))[..., 0]

    init, apply = _linear("multiple_choice", hidden_size, 1)
    return Head(init, forward, _class_loss, choices=True)


def regression(hidden_size: int, num_outputs: int = 1, *, pool: str = "first") -> Head:
    """Regression: predictions (B, num_outputs) = pool(hidden) @ kernel + bias.

    The loss is the sum of (prediction - label) ** 2 with labels (B, num_outputs). Labels are real
    numbers, -100 too: only the mask of the loss says which of them do not count.

    Args:
      hidden_size: Size of the hidden states, D.
      num_outputs: The number of values to predict for each row.
      pool: "first" or "last" token of the mask, or "mean" over it.
    Raises:
      ValueError: An unknown `pool`. In `forward`, hidden states or parameters of another size; in
        `loss`, labels of another shape than the predictions.
    """
    pooled = _pooling(pool)

    def forward(params: Params, hidden: Array, mask: Array | None = None) -> Array:
        return apply(params, pooled(hidden, mask))

    init, apply = _linear("regression", hidden_size, num_outputs)
    return Head(init, forward, _square_loss)


def causal_lm(hidden_size: int, vocab_size: int) -> Head:
    """Causal language modelling: logits (B, T, V) = hidden @ kernel, of the next token.

    The head has a kernel of its own, even where the trunk's model ties its head to the embedding;
    a copy of that head is a good start in the place of `init`: {"kernel": embedding.T + 0}.

    The loss is cross entropy with labels (B, T) at the positions of their tokens: the logits at
    position t predict label t + 1. The padding mask can be its `mask`.

    Args:
      hidden_size: Size of the hidden states, D.
      vocab_size: The number of tokens, V.
    Raises:
      ValueError: In `forward`, hidden states or parameters of another size.
    """

    def loss(logits: Array, labels: Array, mask: Array | None = None) -> tuple[Array, Array]:
        weights = _weights(labels, mask, logits.shape[-1])
        return cross_entropy(logits, *next_token(labels, weights))

    init, apply = _linear("causal_lm", hidden_size, vocab_size, bias=False)
    return Head(init, lambda params, hidden, mask=None: apply(params, hidden), loss)


def seq2seq_lm(hidden_size: int, vocab_size: int) -> Head:
    """Sequence-to-sequence language modelling: logits (B, T, V) = hidden @ kernel.

    The trunk's hidden states are those of the decoder, whose input are the labels shifted right by
    one: the logits at position t predict label t. The loss is cross entropy with labels (B, T).

    Args:
      hidden_size: Size of the hidden states, D.
      vocab_size: The number of tokens, V.
    Raises:
      ValueError: In `forward`, hidden states or parameters of another size.
    """
    init, apply = _linear("seq2seq_lm", hidden_size, vocab_size, bias=False)
    return Head(init, lambda params, hidden, mask=None: apply(params, hidden), _class_loss)


# Parts of heads ----------------------------------------------------------------------------------


def _linear(
    name: str, hidden_size: int, outputs: int, *, bias: bool = True
) -> tuple[Callable[..., Params], Callable[[Params, Array], Array]]:
    """The functions `init(key, dtype)` and `apply(params, x)` of x @ kernel + bias."""

    def init(key: Array, dtype: Any = jnp.float32) -> Params:
        kernel = {"kernel": normal(key, (hidden_size, outputs), dtype)}
        return {**kernel, "bias": jnp.zeros((outputs,), dtype)} if bias else kernel

    def apply(params: Params, x: Array) -> Array:
        size, kernel = x.shape[-1], (hidden_size, outputs)
        if size != hidden_size:
            raise ValueError(
                f"`heads.{name}(hidden_size={hidden_size})` is on a trunk whose hidden states have "
                f"size {size}. Make the head with hidden_size={size}."
            )
        if params["kernel"].shape != kernel:
            raise ValueError(
                f"This `heads.{name}` has a kernel of shape {kernel}, but its parameters hold one "
                f"of shape {params['kernel'].shape}. Make the head with the sizes it was trained "
                "with, or take new parameters from its `init`."
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
    # Not simply at 0, since there may be padding on the left.
    return x[..., 0, :] if mask is None else _pick(x, jnp.argmax(mask, axis=-1))


def _last(x: Array, mask: Array | None) -> Array:
    if mask is None:
        return x[..., -1, :]
    return _pick(x, mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1))


def _mean(x: Array, mask: Array | None) -> Array:
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return jnp.mean(y, axis=-2).astype(x.dtype)
    count = jnp.maximum(jnp.sum(mask, axis=-1, dtype=y.dtype), 1)
    # `where` and not a product, with which NaNs at padding would be NaNs of the mean.
    total = jnp.sum(jnp.where(mask[..., None], y, 0), axis=-2)
    return (total / count[..., None]).astype(x.dtype)


def _pick(x: Array, at: Array) -> Array:
    return jnp.take_along_axis(x, at[..., None, None], axis=-2)[..., 0, :]


_POOLS = {"first": _first, "last": _last, "mean": _mean}


def _drop_virtual(mask: Any, virtual: int, hidden: Array) -> Array | None:
    """The mask at the positions of the hidden states that the head reads."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)[..., virtual:]
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(
            f"The head reads hidden states {hidden.shape} under a mask {mask.shape}, both without "
            f"the {virtual} virtual positions; the mask must be {hidden.shape[:-1]}. Give "
            "`on(..., virtual=...)` the number of virtual positions in front of both."
        )
    return mask


def _merge_choices(args: tuple, kwargs: dict) -> tuple[tuple, dict, tuple[int, ...]]:
    """The arguments with rows and choices as one axis (B * C, ...), and (B, C)."""
    shape = jnp.shape(args[0]) if args else ()
    if len(shape) != 3:
        raise ValueError(
            "`heads.multiple_choice` needs inputs (rows, choices, tokens), got a first argument of "
            f"shape {shape}. Stack the choices of a row along a second axis."
        )
    lead = shape[:2]

    def merge(x: Any) -> Any:
        has_choices = hasattr(x, "shape") and x.ndim > 2 and x.shape[:2] == lead
        return x.reshape(-1, *x.shape[2:]) if has_choices else x

    args, kwargs = jax.tree.map(merge, (args, kwargs))
    return args, kwargs, lead


# Losses ------------------------------------------------------------------------------------------


def _class_loss(logits: Array, labels: Array, mask: Array | None = None) -> tuple[Array, Array]:
    return cross_entropy(logits, labels, _weights(labels, mask, logits.shape[-1]))


def _weights(labels: Array, mask: Array | None, classes: int) -> Array:
    """The weight of each label: 0 where it is ignored, NaN where it is none of the classes."""
    mask = jnp.ones(labels.shape) if mask is None else _checked_mask(mask, labels)
    known = (labels >= 0) & (labels < classes)
    counts = (labels != IGNORE_INDEX) & (mask != 0)
    return jnp.where(counts, jnp.where(known, mask, jnp.nan), 0)


def _square_loss(outputs: Array, labels: Array, mask: Array | None = None) -> tuple[Array, Array]:
    if outputs.shape != labels.shape:
        raise ValueError(
            f"The labels of a regression have the shape of its predictions {outputs.shape}, got "
            f"{labels.shape}. Reshape them."
        )
    y = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    weights = jnp.ones(labels.shape, y.dtype)
    if mask is not None:
        weights = _checked_mask(mask, labels).astype(y.dtype)
    # Labels that do not count may be NaN; their gradient must be zero too.
    labels = jnp.where(weights == 0, jax.lax.stop_gradient(y), labels)
    return jnp.sum(weights * optax.losses.squared_error(y, labels)), jnp.sum(weights)


def _checked_mask(mask: Any, labels: Array) -> Array:
    mask = jnp.asarray(mask)
    if mask.shape != labels.shape:
        raise ValueError(
            f"The mask of a loss says which labels count, so it has their shape {labels.shape}, "
            f"got {mask.shape}."
        )
    return mask
