"""LongLoRA's shifted sparse attention: training on long texts at the cost of short ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft.models.decoder import Place, attention


def shifted_sparse(group: int) -> Callable[..., Array]:
    """An `attention_fn` for training: attention within groups of tokens, shifted in half the heads.

    The heads' first half sees groups [0, g), [g, 2 g), ..., the second half groups that begin g / 2
    later, so that from layer to layer what a token knows passes on to its neighbours. A token sees
    those of its group that are not after it; the half groups at both ends, which shifting puts
    into one, do not see each other. T tokens cost T g instead of T^2. Used in training alone: the
    tuned model runs with full attention and, where the context has grown, with interpolated
    positions (`Rope(kind="linear", factor=...)`), which training has too.

        train_fn = decoder.pure(config, attention_fn=shifted_sparse(2048), remat="full")
        model = decoder.pure(config)

    Args:
      group: g, an even number of tokens; a quarter of the context in the paper. Texts of at most
        as many see full attention.

    Returns:
      A function of the signature of `decoder.attention`.

    Raises:
      ValueError: An odd group; when called, a length that groups do not divide, an odd number of
        heads, keys of other tokens than the queries, as with a cache, or virtual tokens for all
        (segment -1; under jit the result is NaN then).

    References:
      Chen et al., LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models, 2023,
      section 3.2. https://arxiv.org/abs/2309.12307
    """
    if group < 2 or group % 2:
        raise ValueError(f"`shifted_sparse({group})`: an even number of tokens is needed.")

    def attention_fn(
        q: Array, k: Array, v: Array, *, queries: Place, keys: Place, window: int | Array | None
    ) -> Array:
        length, heads = q.shape[1:3]
        if k.shape[1] != length:
            raise ValueError(
                f"`shifted_sparse` is for training: {length} queries meet {k.shape[1]} keys. "
                "Generate with the decoder's own attention."
            )
        if length <= group:
            return attention(q, k, v, queries=queries, keys=keys, window=window)
        if length % group or heads % 2:
            raise ValueError(
                f"`shifted_sparse({group})`: {length} tokens must be a multiple of the group, and "
                f"{heads} heads of 2. Pad the texts, or choose another group."
            )
        if k.shape[2] % 2:  # the halves of the heads share keys
            k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
        near = group if window is None else jnp.minimum(window, group)
        halves = []
        for half, shift in ((0, 0), (1, group // 2)):
            parts = [jnp.split(x, 2, axis=2)[half] for x in (q, k, v)]
            q_, k_, v_ = (_grouped(x, group, shift) for x in parts)
            place = _places(queries, q.shape[0], group, shift)
            y = attention(q_, k_, v_, queries=place, keys=place, window=near)
            halves.append(jnp.roll(y.reshape(parts[0].shape), shift, axis=1))
        y = jnp.concatenate(halves, axis=2)
        if queries.segment is None:
            return y
        # Under jit nothing can raise; a prefix must not be out of sight in silence.
        return jnp.where(_any_virtual(queries.segment), jnp.nan, y)

    return attention_fn


def _any_virtual(segment: Array) -> Array:
    """Whether there are virtual tokens that every segment is to see, which groups cannot."""
    virtual = segment == -1
    if not isinstance(virtual, jax.core.Tracer) and virtual.any():
        raise ValueError(
            f"`shifted_sparse` shows tokens their group alone, but {int(virtual.sum())} "
            "tokens are virtual (segment -1), for every token to see. Train with the decoder's "
            "own attention."
        )
    return virtual.any()


def _grouped(x: Array, group: int, shift: int) -> Array:
    """(B, T, ...) as groups (B * T / g, g, ...), the first of which begins at `shift`."""
    return jnp.roll(x, -shift, axis=1).reshape(-1, group, *x.shape[2:])


def _places(places: Place, rows: int, group: int, shift: int) -> Place:
    order = jnp.broadcast_to(places.order, (rows, places.order.shape[1]))
    segment = places.segment
    return Place(
        _grouped(order, group, shift),
        None if segment is None else _grouped(segment, group, shift),
    )
