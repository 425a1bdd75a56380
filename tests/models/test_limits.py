"""What a model cannot hold or does not know is said: dtypes of its weights, and its context."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import decoder, encoder, encoder_decoder, heads
from jaxpeft.serve import generator

DECODER = decoder.Config(11, 8, 8, 1, 2, 1, 4, max_position_embeddings=6)
CONFIGS = {
    decoder: DECODER,
    encoder: encoder.Config(11, 8, 8, 1, 2, max_position_embeddings=6),
    encoder_decoder: encoder_decoder.Config(11, 8, 8, 1, 1, 2, 4),
}
MODELS = pytest.mark.parametrize("model", CONFIGS, ids=lambda m: m.__name__.split(".")[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each model, by module."""
    made = {}
    for model, config in CONFIGS.items():
        made[model] = tmp_path_factory.mktemp("model")
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), model.shapes(config))
        model.save(made[model], config, ones)
    return made


@MODELS
@pytest.mark.parametrize("dtype", [jnp.int32, "uint8", bool, jnp.complex64])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_weights_are_loaded_in_no_dtype_that_cannot_hold_them(folders, model, dtype, quantize):
    """In integers every one of them would be 0."""
    with pytest.raises(ValueError, match=rf"`dtype={jnp.dtype(dtype)}` cannot hold weights"):
        model.load(folders[model], dtype, quantize=quantize)


@MODELS
def test_weights_are_made_and_used_in_no_such_dtype_either(model):
    config = CONFIGS[model]
    with pytest.raises(ValueError, match="`param_dtype=int32` cannot hold weights"):
        model.init(config, jax.random.key(0), jnp.int32)
    with pytest.raises(ValueError, match="`param_dtype=int32` cannot hold weights"):
        model.shapes(config, jnp.int32)
    with pytest.raises(ValueError, match="`dtype=int32` cannot hold weights"):
        model.apply_fn(config, dtype=jnp.int32)
    if model is not encoder:
        with pytest.raises(ValueError, match="`logits_dtype=int32` cannot hold weights"):
            model.apply_fn(config, logits_dtype=jnp.int32)
        with pytest.raises(ValueError, match="`dtype=int32` cannot hold weights"):
            model.init_cache(config, 1, 4, jnp.int32)


def test_a_head_is_made_in_no_such_dtype_and_what_is_no_dtype_is_named(folders):
    with pytest.raises(ValueError, match="`dtype=int32` cannot hold weights"):
        heads.sequence_classification(8, num_classes=2).init(jax.random.key(0), jnp.int32)
    with pytest.raises(ValueError, match="`dtype='nf4'` is not a dtype"):
        decoder.load(folders[decoder], "nf4")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "float16"])
def test_every_floating_dtype_is_loaded(folders, dtype):
    _, params = decoder.load(folders[decoder], dtype)
    assert params["norm"]["scale"].dtype == jnp.dtype(dtype)


def abstract(forward, length, config=DECODER, **where):
    shapes = decoder.shapes(config), jax.ShapeDtypeStruct((2, length), jnp.int32)
    return jax.eval_shape(functools.partial(forward, **where), *shapes)


def test_more_tokens_than_the_context_are_said_when_the_forward_pass_is_traced():
    message = "7 tokens are more than the 6 positions that this llama knows "
    message += r"\(max_position_embeddings=6\)"
    with pytest.warns(UserWarning, match=message):
        abstract(decoder.apply_fn(DECODER), 7)
    with pytest.warns(UserWarning, match=message):
        abstract(decoder.apply_fn(DECODER, "hidden"), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abstract(decoder.apply_fn(DECODER), 6)
        abstract(decoder.apply_fn(DECODER), 7, positions=jnp.arange(7)[None] % 4)


def test_interpolated_positions_reach_as_many_times_further():
    wide = decoder.Config(
        11,
        8,
        8,
        1,
        2,
        1,
        4,
        max_position_embeddings=6,
        rope=decoder.Rope(rope_type="linear", factor=2.0),
    )
    assert wide.max_length == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abstract(decoder.apply_fn(wide), 12, wide)
    with pytest.warns(UserWarning, match="13 tokens are more than the 12 positions"):
        abstract(decoder.apply_fn(wide), 13, wide)


def test_a_table_of_positions_has_an_end():
    config = CONFIGS[encoder]
    with pytest.raises(ValueError, match="7 tokens do not fit in the 6 positions"):
        jax.eval_shape(
            encoder.apply_fn(config),
            encoder.shapes(config),
            jax.ShapeDtypeStruct((2, 7), jnp.int32),
        )


def test_a_prompt_too_long_for_the_context_is_refused_unless_asked_for():
    cache = functools.partial(decoder.init_cache, DECODER)
    beyond = functools.partial(cache, beyond_context=True)

    def written(cache, length):
        return abstract(
            generator(decoder.apply_fn(DECODER), cache, max_new_tokens=3), length
        ).tokens.shape

    assert written(cache, 4) == (2, 3)  # the last token that is written takes no slot
    with pytest.raises(ValueError, match="cache of 7 tokens is longer than the 6 positions"):
        written(cache, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was asked for
        assert written(beyond, 5) == (2, 3)
