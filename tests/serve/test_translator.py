"""Generation by an encoder-decoder against its full forward, plain and lifted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.models import encoder_decoder
from jaxpeft.serve import _generate as generate

CONFIG = encoder_decoder.Config(
    vocab=23,
    width=16,
    mlp_width=24,
    layers=1,
    decoder_layers=2,
    heads=4,
    head_dim=6,
    buckets=6,
    reach=7,
    tied=False,
    start=3,
    mlp="gated-gelu",
)
NEW = 6


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: rng.normal(0, 0.7, w.shape), encoder_decoder.shapes(CONFIG))


def inputs(rows=3, length=7):
    return np.random.default_rng(1).integers(0, CONFIG.vocab, (rows, length))


def halves():
    return [encoder_decoder.pure(CONFIG, call) for call in ("encode", "decode")]


def translator(encode=None, decode=None, **options):
    cache = functools.partial(encoder_decoder.init_cache, CONFIG, dtype=jnp.float64)
    ours = halves()
    options = {"max_new": NEW, "start": CONFIG.start} | options
    return generate.seq2seq_generator(encode or ours[0], decode or ours[1], cache, **options)


@pytest.fixture(scope="module")
def greedy(params):
    """What the likeliest tokens are, through the cache."""
    return np.asarray(translator()(params, inputs()).tokens)


def without_cache(forward, params, tokens):
    # Targets in a buffer of one size: what stands later changes nothing before it.
    known = np.full((len(tokens), NEW + 1), CONFIG.start)
    for end in range(NEW):
        logits = forward(params, tokens, known[:, :NEW])
        known[:, end + 1] = np.argmax(logits[:, end], axis=-1)
    return known[:, 1:]


def test_greedy_is_argmax_of_the_full_forward(params, greedy):
    want = without_cache(jax.jit(encoder_decoder.pure(CONFIG)), params, inputs())
    assert len(np.unique(want)) > 3  # else a model that always says the same would pass
    np.testing.assert_array_equal(greedy, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_get_what_they_get_alone(params, side):
    tokens = inputs()
    padded, mask = np.full((3, 10), 9), np.zeros((3, 10), bool)
    for row, length in enumerate((7, 4, 1)):
        part = slice(10 - length, 10) if side == "left" else slice(0, length)
        padded[row, part], mask[row, part] = tokens[row, :length], True
    got = translator()(params, padded, mask).tokens
    for row, length in enumerate((7, 4, 1)):
        alone = translator()(params, tokens[row : row + 1, :length]).tokens
        np.testing.assert_array_equal(got[row], alone[0])


def test_a_row_ends_with_its_end_token_and_the_others_go_on(params, greedy):
    eos = (int(greedy[0, 2]), int(greedy[1, 0]))
    got = translator(eos=eos, pad=-1)(params, inputs())
    for row in range(3):
        ends = np.flatnonzero(np.isin(greedy[row], eos))
        length = int(ends[0]) + 1 if len(ends) else NEW
        assert int(got.lengths[row]) == length
        np.testing.assert_array_equal(got.tokens[row, :length], greedy[row, :length])
        np.testing.assert_array_equal(got.tokens[row, length:], -1)


def test_the_input_is_encoded_once_and_a_second_call_is_not_traced_again(params):
    calls = []

    def counted(name, half):
        return lambda *args, **where: calls.append(name) or half(*args, **where)

    encode, decode = map(counted, ("encode", "decode"), halves())
    write = translator(encode, decode, temperature=1.0)
    first = write(params, inputs(), key=jax.random.key(0)).tokens
    second = write(params, inputs(), key=jax.random.key(1)).tokens
    assert (first != second).any()
    np.testing.assert_array_equal(first, write(params, inputs(), key=jax.random.key(0)).tokens)
    assert calls == ["encode", "decode", "decode"]  # the first target, and a step


def test_the_tightest_restriction_is_greedy(params, greedy):
    write = translator(temperature=2.0, top_k=1)
    got = write(params, inputs(), key=jax.random.key(3))
    np.testing.assert_array_equal(got.tokens, greedy)


def test_a_lifted_model_writes_what_the_merged_one_does(params, greedy):
    sites = jp.sites(encoder_decoder.pure(CONFIG), params, inputs(), inputs())
    method = jp.lora(2, sites.linear, dtype=jnp.float64)
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    rng = np.random.default_rng(3)
    tree = jp.combine(frozen, {k: x + rng.normal(0, 0.3, x.shape) for k, x in adapter.items()})
    lifted = [jp.lift(half, materialize="error") for half in halves()]
    got = translator(*lifted)(tree, inputs()).tokens
    np.testing.assert_array_equal(got, translator()(jp.merge(tree), inputs()).tokens)
    assert (got != greedy).any()


def test_virtual_tokens_pass_through_the_encoder(params):
    """A prompt whose rows are those of real tokens acts like these tokens before the input."""
    sites = jp.sites(encoder_decoder.pure(CONFIG), params, inputs(), inputs())
    table = sites.match("embed/embedding")
    frozen, adapter = jp.split(
        jp.prompt_tuning(2, table, dtype=jnp.float64)(jax.random.key(0), params)
    )
    (path,) = adapter
    tree = jp.combine(frozen, {path: params["embed"]["embedding"][jnp.array([5, 8])]})
    lifted = [jp.lift(half, materialize="error") for half in halves()]
    before = lambda ids: np.concatenate([np.tile(ids, (3, 1)), inputs()], axis=1)  # noqa: E731
    got = translator(*lifted)(tree, before([CONFIG.vocab, CONFIG.vocab + 1])).tokens
    np.testing.assert_array_equal(got, translator()(params, before([5, 8])).tokens)


def test_options_out_of_range_are_refused(params):
    with pytest.raises(ValueError, match="max_new=0, temperature=1"):
        translator(max_new=0, temperature=1)
    with pytest.raises(ValueError, match="top_k=5, top_p=None do nothing at temperature=0"):
        translator(top_k=5)
    with pytest.raises(ValueError, match=r"temperature=0\.7 draws tokens and needs a `key`"):
        translator(temperature=0.7)(params, inputs())
