"""Generation: the prompt or input in one pass, then token by token with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Generated", "generator", "sample", "seq2seq_generator"]


class Generated(NamedTuple):
    """The tokens generated for each prompt or input."""

    tokens: Array  # (B, max_new_tokens), padded after the end
    lengths: Array  # (B,), the number of them that count, the end token included


def generator(
    forward: Callable[..., Any],
    init_cache: Callable[[int, int], Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
) -> Callable[..., Generated]:
    """A compiled function that continues prompts.

    Args:
      forward: `forward(params, tokens, mask=None, cache=) -> (logits, cache)` with tokens and
        mask (B, T) and logits (B, T, V), as `decoder.apply_fn(config)` gives, or `jaxpeft.lift` of
        it.
      init_cache: `init_cache(batch_size, length)` gives an empty cache, as
        `functools.partial(decoder.init_cache, config)` does. That refuses a prompt which, with
        `max_new_tokens`, is longer than the model's context; `beyond_context=True` there allows it.
      max_new_tokens: Most tokens to generate per row.
      temperature: 0 takes the most likely token. Otherwise tokens are sampled from the softmax of
        logits / temperature.
      top_k: Samples among the k most likely tokens only.
      top_p: Then samples among the fewest tokens whose probabilities sum to at least this.
      eos_token_ids: A row ends with any of these ids; the loop ends when all rows have ended.
      pad_token_id: Fills `Generated.tokens` after the end.
    Returns:
      A function of `(params, tokens, mask=None, key=None)` that gives `Generated`. The mask (B, T)
      is false at padding, best on the left; a temperature above 0 needs the key. It is compiled
      once per shape, so reuse it, and reuse the result of `lift` too: a new function object is
      compiled again.
    Raises:
      ValueError: Options out of range, or that a temperature of 0 would ignore; no key; in a call,
        a prompt too long for the model.
    Example:
      >>> from functools import partial
      >>> from jaxpeft.models import decoder
      >>> config = decoder.Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1,
      ...                         num_heads=2, num_kv_heads=1, head_dim=4)
      >>> params = decoder.init(config, jax.random.key(0))
      >>> forward, init_cache = decoder.apply_fn(config), partial(decoder.init_cache, config)
      >>> generate = generator(forward, init_cache, max_new_tokens=3)
      >>> generate(params, jnp.ones((2, 5), int)).tokens.shape
      (2, 3)
    """

    def begin(params: Any, tokens: Array, mask: Array) -> tuple[Array, Any]:
        batch_size, length = tokens.shape
        # The last token is generated but never an input.
        cache = init_cache(batch_size, length + max_new_tokens - 1)
        logits, cache = forward(params, tokens, mask=mask, cache=cache)
        # The position of the last token that is not padding.
        last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], cache

    sampling = temperature, top_k, top_p
    return _loop(begin, forward, max_new_tokens, *sampling, eos_token_ids, pad_token_id)


def seq2seq_generator(
    encode: Callable[..., Any],
    decode: Callable[..., Any],
    init_cache: Callable[[int, int], Any],
    *,
    decoder_start_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
) -> Callable[..., Generated]:
    """A compiled function that generates targets for inputs with an encoder-decoder.

    Args:
      encode: `encode(params, inputs, mask=) -> encoder_output`, as
        `encoder_decoder.apply_fn(config, "encode")` gives, or `jaxpeft.lift` of it.
      decode: `decode(params, targets, encoder_output=None, mask=None, cache=) -> (logits, cache)`,
        as `encoder_decoder.apply_fn(config, "decode")` gives, or `jaxpeft.lift` of it. Only the
        first call has `encoder_output` and `mask`.
      init_cache: `init_cache(batch_size, length)` gives an empty cache, as
        `functools.partial(encoder_decoder.init_cache, config)` does.
      decoder_start_token_id: The first input of the decoder; it is not part of the result.
      max_new_tokens, temperature, top_k, top_p, eos_token_ids, pad_token_id: As in `generator`.
    Returns:
      A function of `(params, inputs, mask=None, key=None)`. The mask (B, S) is false at padding,
      on whichever side; the rest is as in `generator`.
    Raises:
      ValueError: As `generator`.
    Example:
      >>> from functools import partial
      >>> from jaxpeft.models import encoder_decoder as t5
      >>> config = t5.Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1,
      ...                    num_decoder_layers=1, num_heads=2, head_dim=4)
      >>> params = t5.init(config, jax.random.key(0))
      >>> encode, decode = t5.apply_fn(config, "encode"), t5.apply_fn(config, "decode")
      >>> generate = seq2seq_generator(encode, decode, partial(t5.init_cache, config),
      ...                              decoder_start_token_id=0, max_new_tokens=3)
      >>> generate(params, jnp.ones((2, 5), int)).tokens.shape
      (2, 3)
    """

    def begin(params: Any, inputs: Array, mask: Array) -> tuple[Array, Any]:
        first = jnp.full((inputs.shape[0], 1), decoder_start_token_id, inputs.dtype)
        encoder_output = encode(params, inputs, mask=mask)
        # The start token takes a slot, and the last token is generated but never an input.
        cache = init_cache(inputs.shape[0], max_new_tokens)
        logits, cache = decode(params, first, encoder_output, mask=mask, cache=cache)
        return logits[:, 0], cache

    sampling = temperature, top_k, top_p
    return _loop(begin, decode, max_new_tokens, *sampling, eos_token_ids, pad_token_id)


def _loop(
    begin: Callable[..., Any],
    forward: Callable[..., Any],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
) -> Callable[..., Generated]:
    """The loop of generation. `begin(params, tokens, mask)` gives the first logits (B, V) and the
    cache, `forward(params, tokens, cache=)` those that follow."""
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            "Generation needs max_new_tokens >= 1 and temperature >= 0, got "
            f"max_new_tokens={max_new_tokens}, temperature={temperature}."
        )
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"Generation needs top_k >= 1 and 0 < top_p <= 1, got top_k={top_k}, top_p={top_p}."
        )
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise ValueError(
            f"top_k={top_k}, top_p={top_p} have no effect at temperature=0, which takes the most "
            "likely token. Give a temperature, or leave them out."
        )

    def pick(logits: Array, key: Array | None, step: Any) -> Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        assert key is not None
        key = jax.random.fold_in(key, step)
        return sample(key, logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def ends(token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(eos_token_ids, token.dtype))

    @jax.jit
    def run(params: Any, tokens: Array, mask: Array, key: Array | None) -> Generated:
        logits, cache = begin(params, tokens, mask)
        token = pick(logits, key, 0).astype(tokens.dtype)
        generated = jnp.full((len(token), max_new_tokens), pad_token_id, tokens.dtype)
        generated = generated.at[:, 0].set(token)

        def unfinished(state: Any) -> Array:
            step, _, done, *_ = state
            return (step < max_new_tokens) & ~jnp.all(done)

        def extend(state: Any) -> Any:
            step, token, done, lengths, generated, cache = state
            # Rows that have ended are computed too, and their tokens replaced by padding.
            logits, cache = forward(params, token[:, None], cache=cache)
            token = pick(logits[:, 0], key, step).astype(tokens.dtype)
            token = jnp.where(done, pad_token_id, token)
            generated = generated.at[:, step].set(token)
            lengths = lengths + ~done
            return step + 1, token, done | ends(token), lengths, generated, cache

        lengths = jnp.ones(token.shape, jnp.int32)
        state = jnp.int32(1), token, ends(token), lengths, generated, cache
        *_, lengths, generated, _ = jax.lax.while_loop(unfinished, extend, state)
        return Generated(generated, lengths)

    def generate(
        params: Any, tokens: Array, mask: Array | None = None, key: Array | None = None
    ) -> Generated:
        if temperature > 0 and key is None:
            raise ValueError(
                f"temperature={temperature} samples tokens, which needs a `key`. Give "
                "jax.random.key(seed), or temperature=0."
            )
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        return run(params, jnp.asarray(tokens), mask, key)

    return generate


def sample(
    key: Array,
    logits: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    """Samples ids (...) from the softmax of logits (..., V) / temperature.

    Tokens as likely as the last one that `top_k` or `top_p` keeps are kept too.

    Args:
      key: A key of `jax.random`.
      logits: Real numbers (..., V).
      temperature: Above 0.
      top_k: Samples among the k most likely tokens only.
      top_p: Then samples among the fewest tokens whose probabilities sum to at least this.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)
