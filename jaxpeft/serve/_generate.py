"""Generation: the prompt or input in one pass, then token by token through a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Generated", "generator", "sample", "seq2seq_generator"]


class Generated(NamedTuple):
    """What was written behind each prompt."""

    tokens: Array  # (B, max_new), padded behind the end
    lengths: Array  # (B,), how many of them count, the end token included


def generator(
    forward: Callable[..., Any],
    init_cache: Callable[[int, int], Any],
    *,
    max_new: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: Sequence[int] = (),
    pad: int = 0,
) -> Callable[..., Generated]:
    """A compiled function that continues prompts.

    Args:
      forward: `forward(params, tokens, mask=None, cache=) -> (logits, cache)` with tokens and
        mask (B, T) and logits (B, T, V), as `decoder.pure` gives, or `jaxpeft.lift` of it.
      init_cache: `init_cache(rows, length)` gives an empty cache, as
        `functools.partial(decoder.init_cache, config)` does. That refuses a prompt which, with
        `max_new`, is longer than the model's context; `beyond_context=True` there allows it.
      max_new: Most tokens to write per row.
      temperature: 0 takes the likeliest token. Otherwise tokens are drawn from the softmax of
        logits / temperature.
      top_k: Draw among the k likeliest tokens only.
      top_p: Then draw among the fewest tokens whose probabilities sum up to it.
      eos: A row ends with any of these ids; the loop ends when all rows have.
      pad: Fills `Generated.tokens` behind the end.
    Returns:
      A function of `(params, tokens, mask=None, key=None)`. The mask (B, T) is false on padding,
      best on the left; the key is needed at a temperature. It is compiled once per shape, so keep
      it, and keep what `lift` returned: another function object is another program.
    Raises:
      ValueError: Options out of range, or that a temperature of 0 would ignore; no key; in a call,
        a prompt too long for the model.
    Example:
      >>> from functools import partial
      >>> from jaxpeft.models import decoder
      >>> config = decoder.Config(vocab=9, width=8, mlp_width=8, layers=1, heads=2, kv_heads=1,
      ...                         head_dim=4)
      >>> params = decoder.init(config, jax.random.key(0))
      >>> write = generator(decoder.pure(config), partial(decoder.init_cache, config), max_new=3)
      >>> write(params, jnp.ones((2, 5), int)).tokens.shape
      (2, 3)
    """

    def begin(params: Any, tokens: Array, mask: Array) -> tuple[Array, Any]:
        rows, length = tokens.shape
        # The last token is written but never read.
        cache = init_cache(rows, length + max_new - 1)
        logits, cache = forward(params, tokens, mask=mask, cache=cache)
        # Of the last real token, wherever the padding is.
        last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], cache

    return _writer(begin, forward, max_new, temperature, top_k, top_p, eos, pad)


def seq2seq_generator(
    encode: Callable[..., Any],
    decode: Callable[..., Any],
    init_cache: Callable[[int, int], Any],
    *,
    start: int,
    max_new: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: Sequence[int] = (),
    pad: int = 0,
) -> Callable[..., Generated]:
    """A compiled function that answers inputs by an encoder-decoder.

    Args:
      encode: `encode(params, inputs, mask=) -> memory`, as `encoder_decoder.pure(config, "encode")`
        gives, or `jaxpeft.lift` of it.
      decode: `decode(params, targets, memory=None, mask=None, cache=) -> (logits, cache)`, as
        `encoder_decoder.pure(config, "decode")` gives, or `jaxpeft.lift` of it. Memory and mask
        come with the first call alone.
      init_cache: `init_cache(rows, length)` gives an empty cache, as
        `functools.partial(encoder_decoder.init_cache, config)` does.
      start: What targets begin with; it is not part of what is written.
      max_new, temperature, top_k, top_p, eos, pad: As in `generator`.
    Returns:
      A function of `(params, inputs, mask=None, key=None)`. The mask (B, S) is false on padding,
      on whichever side; the rest as in `generator`.
    Raises:
      ValueError: As `generator`.
    Example:
      >>> from functools import partial
      >>> from jaxpeft.models import encoder_decoder as t5
      >>> config = t5.Config(vocab=9, width=8, mlp_width=8, layers=1, decoder_layers=1, heads=2,
      ...                    head_dim=4)
      >>> halves = t5.pure(config, "encode"), t5.pure(config, "decode")
      >>> write = seq2seq_generator(*halves, partial(t5.init_cache, config), start=0, max_new=3)
      >>> write(t5.init(config, jax.random.key(0)), jnp.ones((2, 5), int)).tokens.shape
      (2, 3)
    """

    def begin(params: Any, inputs: Array, mask: Array) -> tuple[Array, Any]:
        first = jnp.full((inputs.shape[0], 1), start, inputs.dtype)
        memory = encode(params, inputs, mask=mask)
        # `start` takes a slot, and the last token is written but never read.
        cache = init_cache(inputs.shape[0], max_new)
        logits, cache = decode(params, first, memory, mask=mask, cache=cache)
        return logits[:, 0], cache

    return _writer(begin, decode, max_new, temperature, top_k, top_p, eos, pad)


def _writer(
    begin: Callable[..., Any],
    forward: Callable[..., Any],
    max_new: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos: Sequence[int],
    pad: int,
) -> Callable[..., Generated]:
    """The loop: `begin` gives the first logits (B, V) and the cache, `forward` goes on."""
    if max_new < 1 or temperature < 0:
        raise ValueError(
            "Generation needs max_new >= 1 and temperature >= 0, got "
            f"max_new={max_new}, temperature={temperature}."
        )
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"Generation needs top_k >= 1 and 0 < top_p <= 1, got top_k={top_k}, top_p={top_p}."
        )
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise ValueError(
            f"top_k={top_k}, top_p={top_p} do nothing at temperature=0, which takes the likeliest "
            "token. Give a temperature, or leave them out."
        )

    def pick(logits: Array, key: Array | None, step: Any) -> Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        assert key is not None
        key = jax.random.fold_in(key, step)
        return sample(key, logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def ends(token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(eos, token.dtype))

    @jax.jit
    def run(params: Any, tokens: Array, mask: Array, key: Array | None) -> Generated:
        logits, cache = begin(params, tokens, mask)
        token = pick(logits, key, 0).astype(tokens.dtype)
        written = jnp.full((len(token), max_new), pad, tokens.dtype).at[:, 0].set(token)

        def go_on(state: Any) -> Array:
            step, _, done, *_ = state
            return (step < max_new) & ~jnp.all(done)

        def write(state: Any) -> Any:
            step, token, done, lengths, written, cache = state
            # Rows that have ended run on, unseen: the others do not depend on them.
            logits, cache = forward(params, token[:, None], cache=cache)
            token = pick(logits[:, 0], key, step).astype(tokens.dtype)
            token = jnp.where(done, pad, token)
            written = written.at[:, step].set(token)
            lengths = lengths + ~done
            return step + 1, token, done | ends(token), lengths, written, cache

        lengths = jnp.ones(token.shape, jnp.int32)
        state = jnp.int32(1), token, ends(token), lengths, written, cache
        *_, lengths, written, _ = jax.lax.while_loop(go_on, write, state)
        return Generated(written, lengths)

    def write_on(
        params: Any, tokens: Array, mask: Array | None = None, key: Array | None = None
    ) -> Generated:
        if temperature > 0 and key is None:
            raise ValueError(f"temperature={temperature} draws tokens and needs a `key`.")
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        return run(params, jnp.asarray(tokens), mask, key)

    return write_on


def sample(
    key: Array,
    logits: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    """Draws ids (...) from logits (..., V), restricted as `generator` says.

    Tokens as likely as the last one kept are kept too.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        falling = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(share, axis=-1) - share < top_p
        least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)
