"""Generation through the cache against generation without one, and how it stops and draws."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import decoder
from jaxpeft.serve import _generate as generate

CONFIG = decoder.Config(
    vocab=23, width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=6, window=5
)
NEW = 6


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: rng.normal(0, 0.3, w.shape), decoder.shapes(CONFIG))


def generator(forward=None, **options):
    cache = functools.partial(decoder.init_cache, CONFIG, dtype=jnp.float64)
    return generate.generator(forward or decoder.pure(CONFIG), cache, **{"max_new": NEW} | options)


@pytest.fixture(scope="module")
def greedy(params):
    """What the likeliest tokens of the prompts are, through the cache."""
    return np.asarray(generator()(params, prompts()).tokens)


def prompts(rows=3, length=7):
    return jax.random.randint(jax.random.key(1), (rows, length), 0, CONFIG.vocab)


@functools.cache
def full_forward():
    return jax.jit(decoder.pure(CONFIG))


def greedy_without_cache(params, tokens):
    # In a buffer of one size, for one compilation: what stands later changes nothing before it.
    rows, length = tokens.shape
    buffer = np.zeros((3, 7 + NEW), int)
    buffer[:rows, :length] = tokens
    for end in range(length, length + NEW):
        logits = full_forward()(params, buffer)
        buffer[:, end] = np.argmax(logits[:, end - 1], axis=-1)
    return buffer[:rows, length : length + NEW]


def test_greedy_is_argmax_of_the_full_forward(params, greedy):
    want = greedy_without_cache(params, prompts())
    assert len(np.unique(want)) > 3  # else a model that always says the same would pass
    np.testing.assert_array_equal(greedy, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_get_what_they_get_alone(params, side):
    tokens = prompts()
    padded, mask = np.full((3, 10), 9), np.zeros((3, 10), bool)
    for row, length in enumerate((7, 4, 1)):
        part = slice(10 - length, 10) if side == "left" else slice(0, length)
        padded[row, part], mask[row, part] = tokens[row, :length], True
    got = generator()(params, padded, mask).tokens
    for row, length in enumerate((7, 4, 1)):
        want = greedy_without_cache(params, tokens[row : row + 1, :length])
        np.testing.assert_array_equal(got[row], want[0])


def test_a_row_ends_with_its_end_token_and_the_others_go_on(params, greedy):
    free, eos = greedy, (int(greedy[0, 2]), int(greedy[1, 0]))
    got = generator(eos=eos, pad=-1)(params, prompts())
    for row in range(3):
        ends = np.flatnonzero(np.isin(free[row], eos))
        length = int(ends[0]) + 1 if len(ends) else NEW
        assert int(got.lengths[row]) == length
        np.testing.assert_array_equal(got.tokens[row, :length], free[row, :length])
        np.testing.assert_array_equal(got.tokens[row, length:], -1)
    assert int(got.lengths[0]) < NEW and int(got.lengths[1]) == 1


def test_the_loop_stops_when_all_rows_have_ended(params, greedy):
    steps = []

    def forward(params, tokens, *, cache, mask=None):
        jax.debug.callback(lambda: steps.append(1))
        return decoder.pure(CONFIG)(params, tokens, mask=mask, cache=cache)

    generator(forward, eos=greedy[:, 0].tolist())(params, prompts()).tokens.block_until_ready()
    jax.effects_barrier()
    assert len(steps) == 1  # the prompt alone


def test_any_function_of_the_signature_is_taken(params, greedy):
    def forward(halves, tokens, **where):
        return decoder.pure(CONFIG)(jax.tree.map(lambda h: h + h, halves), tokens, **where)

    halves = jax.tree.map(lambda w: w / 2, params)
    got = generator(forward)(halves, prompts())
    np.testing.assert_array_equal(got.tokens, greedy)


def test_every_step_and_row_draws_anew():
    # A function without a model, and a cache that is no more than a count.
    def forward(params, tokens, *, cache, mask=None):
        return jnp.zeros((*tokens.shape, 1000)), cache + tokens.shape[1]

    cache = lambda rows, length: jnp.int32(0)  # noqa: E731
    write = generate.generator(forward, cache, max_new=20, temperature=1.0)
    got = write({}, jnp.zeros((4, 3), jnp.int32), key=jax.random.key(0)).tokens
    # 80 draws of 1000 fall on 77 tokens on average.
    assert len(np.unique(got)) > 65


def test_a_second_call_is_not_traced_again(params):
    chex.clear_trace_counter()
    # Once for the prompt, once for a step.
    forward = chex.assert_max_traces(decoder.pure(CONFIG), n=2)
    write = generator(forward, temperature=1.0)
    first = write(params, prompts(), key=jax.random.key(0)).tokens
    second = write(params, prompts(), key=jax.random.key(1)).tokens
    assert (first != second).any()
    np.testing.assert_array_equal(first, write(params, prompts(), key=jax.random.key(0)).tokens)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=["top_k", "top_p"])
def test_the_tightest_restriction_is_greedy(params, greedy, options):
    got = generator(temperature=2.0, **options)(params, prompts(), key=jax.random.key(3))
    np.testing.assert_array_equal(got.tokens, greedy)


PROBABILITIES = np.array([0.4, 0.05, 0.3, 0.2, 0.05])


@pytest.mark.parametrize(
    "temperature, options, kept",
    [
        (1.0, {}, [0, 1, 2, 3, 4]),
        (0.5, {}, [0, 1, 2, 3, 4]),
        (1.0, {"top_k": 2}, [0, 2]),
        (2.0, {"top_k": 99}, [0, 1, 2, 3, 4]),
        (1.0, {"top_p": 0.69}, [0, 2]),
        (1.0, {"top_p": 0.71}, [0, 2, 3]),
        (1.0, {"top_p": 1.0}, [0, 1, 2, 3, 4]),
        # Of the 0.9 that top_k leaves, the first has 0.44.
        (1.0, {"top_k": 3, "top_p": 0.43}, [0]),
        (1.0, {"top_k": 3, "top_p": 0.45}, [0, 2]),
    ],
    ids=str,
)
def test_draws_follow_the_restricted_softmax(temperature, options, kept):
    count = 20_000
    logits = jnp.log(jnp.broadcast_to(jnp.asarray(PROBABILITIES), (count, 5)))
    drawn = generate.sample(jax.random.key(0), logits, temperature=temperature, **options)
    want = np.zeros(5)
    want[kept] = PROBABILITIES[kept] ** (1 / temperature)
    want /= want.sum()
    got = np.bincount(np.asarray(drawn), minlength=5) / count
    assert set(np.flatnonzero(got)) == set(kept)
    # Five standard deviations of a frequency.
    np.testing.assert_array_less(np.abs(got - want), 5 * np.sqrt(want * (1 - want) / count) + 1e-9)


def test_options_out_of_range_are_refused(params):
    with pytest.raises(ValueError, match="max_new=0, temperature=1"):
        generator(max_new=0, temperature=1)
    with pytest.raises(ValueError, match="temperature=-1"):
        generator(temperature=-1)
    with pytest.raises(ValueError, match="top_k=0, top_p=None"):
        generator(temperature=1.0, top_k=0)
    with pytest.raises(ValueError, match=r"top_k=None, top_p=1\.5"):
        generator(temperature=1.0, top_p=1.5)
    with pytest.raises(ValueError, match="top_k=5, top_p=None do nothing at temperature=0"):
        generator(top_k=5)
    with pytest.raises(ValueError, match=r"temperature=0\.7 draws tokens and needs a `key`"):
        generator(temperature=0.7)(params, prompts())
