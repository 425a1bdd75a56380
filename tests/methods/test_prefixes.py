"""Prefixes: lengths per task, encoders, encoder-decoders, the cache, every refusal."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.io import load_adapter, save_adapter
from jaxpeft.models import decoder, encoder, encoder_decoder
from jaxpeft.models._encoder_decoder_layers import buckets
from jaxpeft.serve import generator

from . import toy

F8 = jnp.float64
KEY = jax.random.key(0)
B, T = 3, 6


def random_(shapes):
    leaves, treedef = jax.tree.flatten(shapes)
    around = [1.0 if x.ndim == 1 else 0.0 for x in leaves]
    values = [
        toy.normal(i, *x.shape) * 2 + c for i, (x, c) in enumerate(zip(leaves, around, strict=True))
    ]
    return treedef.unflatten(values)


def close(a, b, by=1e-10):
    np.testing.assert_allclose(a, b, rtol=by, atol=by)


# A decoder with rotary positions, biases and windows ----------------------------------------------

CONFIG = decoder.Config(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    model_type="qwen2",
    qkv_bias=True,
    sliding_window=7,
)
FORWARD = decoder.apply_fn(CONFIG)
ROPE = CONFIG.rope.frequencies(CONFIG.head_dim)
LENGTHS = (1, 3, 2)


@functools.cache
def params():
    return random_(decoder.shapes(CONFIG))


def ids():
    return jax.random.randint(jax.random.key(9), (B, T), 1, CONFIG.vocab_size)


@functools.cache
def sites():
    return jp.sites(FORWARD, params(), ids())


def projections():
    return sites().match("*/attn/k/kernel"), sites().match("*/attn/v/kernel")


def split(method, p=None):
    return jp.split(method(KEY, params() if p is None else p))


def prefixed(length, **options):
    """A prefix with rows so large that outputs depend on it."""
    options = dict(rope=ROPE, dtype=F8) | options
    frozen, adapter = split(jp.prefix_tuning(length, *projections(), **options))
    return frozen, toy.perturbed(adapter, 1.0)


@jax.jit
def lifted(frozen, adapter, virtual_positions, tokens, mask):
    tree = jp.combine(frozen, adapter, virtual_positions=virtual_positions)
    return jp.lift(FORWARD)(tree, tokens, mask=mask)


def rows_of(adapter, task):
    """The adapter of a prefix that is one task's of several."""
    start = sum(LENGTHS[:task])
    part = slice(start, start + LENGTHS[task])
    return {name: rows[:, part] for name, rows in adapter.items()}


TASKS = np.array([2, 0, 1])


@functools.cache
def mixed():
    """(frozen, adapter, tokens, positions, mask) of three tasks, the last padded at the left."""
    tokens, virtual_positions, mask = jp.prompts.prepend_prefixes(ids(), LENGTHS, TASKS)
    real = jnp.arange(T) >= jnp.array([[0], [0], [2]])
    mask = mask & jnp.concatenate([jnp.ones((B, 3), bool), real], axis=1)
    return *prefixed(LENGTHS), tokens, virtual_positions, mask


def alone(adapter, example):
    """(frozen, adapter, tokens, virtual_positions) of one example behind its own task's prefix."""
    task = int(TASKS[example])
    frozen, _ = prefixed(LENGTHS[task])
    own = ids()[example : example + 1, 2 if example == 2 else 0 :]
    return frozen, rows_of(adapter, task), *jp.prompts.prepend_virtual_tokens(own, LENGTHS[task])


def test_virtual_positions_of_tasks_follow_each_other_next_to_the_input():
    tokens, virtual_positions, mask = jp.prompts.prepend_prefixes(
        jnp.full((3, 2), 5), LENGTHS, TASKS, fill=9
    )
    assert tokens.tolist() == [[9, 9, 9, 5, 5]] * 3
    assert virtual_positions.tolist() == [
        [-1, 4, 5, -1, -1],
        [-1, -1, 0, -1, -1],
        [1, 2, 3, -1, -1],
    ]
    assert mask.tolist() == [[False, *[True] * 4], [False, False, *[True] * 3], [True] * 5]


def test_each_example_of_several_tasks_is_the_one_behind_its_own_prefix():
    """With rotary positions counted from the first of its own prefix, and padding."""
    frozen, adapter, tokens, virtual_positions, mask = mixed()
    out = lifted(frozen, adapter, virtual_positions, tokens, mask)
    for i in range(B):
        base, own, one, at = alone(adapter, i)
        want = jp.prompts.drop_virtual_positions(
            lifted(base, own, at, one, None), LENGTHS[TASKS[i]]
        )
        close(out[i, -want.shape[1] :], want[0])
        plain = FORWARD(params(), one[:, LENGTHS[TASKS[i]] :])[0]
        assert np.abs(plain - want[0])[-1].max() > 0.1


def test_generation_reads_the_prefixes_out_of_the_cache():
    """Decoding steps have no virtual positions; the second example has padding in its middle."""

    def forward(parts, tokens, **where):
        frozen, adapter, virtual_positions = parts
        here = (
            virtual_positions
            if virtual_positions.shape == tokens.shape
            else jnp.full(tokens.shape, -1)
        )
        return jp.lift(FORWARD)(
            jp.combine(frozen, adapter, virtual_positions=here), tokens, **where
        )

    cache = functools.partial(decoder.init_cache, CONFIG, dtype=F8)
    write = generator(forward, cache, max_new_tokens=4)
    frozen, adapter, tokens, virtual_positions, mask = mixed()
    got = np.asarray(write((frozen, adapter, virtual_positions), tokens, mask).tokens)
    # The whole sequence again without a cache: what was written is what is likeliest there.
    full = jnp.concatenate([tokens, got], axis=1)
    more = jnp.full((B, 4), -1)
    out = lifted(
        frozen,
        adapter,
        jnp.concatenate([virtual_positions, more], axis=1),
        full,
        jnp.concatenate([mask, more < 0], axis=1),
    )
    np.testing.assert_array_equal(got, jnp.argmax(out[:, tokens.shape[1] - 1 : -1], -1))
    base = generator(FORWARD, cache, max_new_tokens=4)(params(), ids()).tokens
    assert (got[:2] != base[:2]).any(1).all() and len(np.unique(got)) > 3


def test_prefixes_of_several_tasks_are_trained_together_and_then_one_by_one():
    frozen, adapter, tokens, virtual_positions, mask = mixed()

    @jax.jit
    def gradient(shares):
        def loss(a):
            return shares @ jnp.sin(lifted(frozen, a, virtual_positions, tokens, mask))[:, -1].sum(
                -1
            )

        return jax.grad(loss)(adapter)

    for example, task in enumerate(TASKS):
        shares = jnp.zeros(B).at[example].set(1.0)
        start = sum(LENGTHS[:task])
        for g in gradient(shares).values():
            touched = np.flatnonzero(np.abs(g).max((0, 2)))
            assert touched.tolist() == list(range(start, start + LENGTHS[task]))
    # The first task goes on alone, from the rows of the second: a start is a slice.
    base, fresh = prefixed(LENGTHS[1])
    start = rows_of(adapter, 1)
    assert {k: v.shape for k, v in start.items()} == {k: v.shape for k, v in fresh.items()}
    one, at = jp.prompts.prepend_virtual_tokens(ids()[:1], LENGTHS[1])
    both, where, seen = jp.prompts.prepend_prefixes(ids()[:1], LENGTHS, np.array([1]))
    close(lifted(base, start, at, one, None), lifted(frozen, adapter, where, both, seen))


def test_dropping_the_encoder_of_a_prefix_leaves_plain_rows():
    """Of several tasks; the network has one table for all layers, `rows` are of each."""
    frozen, adapter = prefixed(LENGTHS, hidden=5, embed=4)
    keys = {f"layers/attn/k/kernel/{n}" for n in ("table", "down", "down_bias", "up", "up_bias")}
    assert adapter.keys() == keys | {f"layers/attn/v/kernel/{n}" for n in ("up", "up_bias")}
    plain, rows = jp.adapters.drop_reparameterization(frozen, adapter)
    again, start = prefixed(LENGTHS)
    assert {k: v.shape for k, v in rows.items()} == {k: v.shape for k, v in start.items()}
    _, _, tokens, virtual_positions, mask = mixed()
    want = lifted(frozen, adapter, virtual_positions, tokens, mask)
    close(lifted(plain, rows, virtual_positions, tokens, mask), want, by=1e-12)
    close(lifted(again, rows, virtual_positions, tokens, mask), want, by=1e-12)
    other = {name: -x for name, x in rows.items()}
    assert np.abs(lifted(plain, other, virtual_positions, tokens, mask) - want)[:, -1].max() > 0.1


@pytest.mark.parametrize("hidden", [None, 5], ids=["rows", "encoded"])
def test_keys_and_values_come_back_from_a_file(tmp_path, hidden):
    """A selection in a file knows only its own parameters, and their biases."""
    method = jp.prefix_tuning(LENGTHS, *projections(), hidden=hidden, rope=ROPE, dtype=F8)
    frozen, adapter = split(method)
    adapter = toy.perturbed(adapter, 1.0)
    save_adapter(tmp_path, adapter, method, params(), key=KEY)
    loaded = load_adapter(tmp_path, params())
    assert loaded.adapter.keys() == adapter.keys()
    _, _, tokens, virtual_positions, mask = mixed()
    got = lifted(loaded.frozen, loaded.adapter, virtual_positions, tokens, mask)
    np.testing.assert_array_equal(got, lifted(frozen, adapter, virtual_positions, tokens, mask))


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_prefix_over_a_quantized_base_is_one_over_the_dequantized_base(format):
    """The biases behind keys and values stay as they are, and are not added to the rows."""
    quantize = jp.quantize(format, sites().linear, **({"block": 4} if format == "nf4" else {}))
    prefix = jp.prefix_tuning(LENGTHS, *projections(), rope=ROPE, dtype=F8)
    _, adapter, tokens, virtual_positions, mask = mixed()
    quantized, _ = split(jp.chain(quantize, prefix))
    dequantized, _ = split(prefix, jp.merge(quantize(KEY, params())))
    want = lifted(dequantized, adapter, virtual_positions, tokens, mask)
    close(lifted(quantized, adapter, virtual_positions, tokens, mask), want)
    assert np.abs(want - lifted(mixed()[0], adapter, virtual_positions, tokens, mask)).max() > 1e-3


def test_a_virtual_position_without_a_row_is_nan():
    frozen, adapter = prefixed(2)
    tokens, virtual_positions = jp.prompts.prepend_virtual_tokens(ids(), 3)
    out = lifted(frozen, adapter, virtual_positions.at[1, 2].set(1).at[2, 2].set(-1), tokens, None)
    assert jnp.isnan(out[0, 3:]).all() and jnp.isfinite(out[1:]).all()


# An encoder, and an encoder-decoder ---------------------------------------------------------------


def in_front(rows, k, v):
    """Keys and values (B, S, N, H) with rows (virtual, N * H) each before them."""
    size = (k.shape[0], -1, *k.shape[2:])
    return (
        jnp.concatenate(
            [jnp.broadcast_to(r.reshape(1, *size[1:]), (size[0], len(r), *size[2:])), x], 1
        )
        for r, x in zip(rows, (k, v), strict=True)
    )


def test_a_prefix_of_an_encoder_takes_no_place_where_positions_are_given():
    config = encoder.Config(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=16,
        num_layers=1,
        num_heads=3,
        model_type="bert",
        max_position_embeddings=T + 1,
    )
    p, tokens, n = random_(encoder.shapes(config)), ids() % 23, 4
    forward = encoder.apply_fn(config)
    found = jp.sites(forward, p, tokens)
    keys, values = (found.match(f"layers/attn/{name}/kernel") for name in "kv")
    frozen, adapter = split(jp.prefix_tuning(n, keys, values, dtype=F8), p)
    adapter = toy.perturbed(adapter, 1.0)
    longer, virtual_positions = jp.prompts.prepend_virtual_tokens(tokens, n)
    tree = jp.combine(frozen, adapter, virtual_positions=virtual_positions)
    real = jnp.arange(T) < jnp.array([[T], [4], [5]])
    mask = jnp.concatenate([jnp.ones((B, n), bool), real], axis=1)
    positions = jnp.maximum(jnp.arange(n + T) - n, 0)[None]
    out = jp.lift(forward)(tree, longer, mask=mask, positions=positions)

    def attend(q, k, v, *, mask):
        rows = [adapter[f"layers/attn/{name}/kernel/rows"][0] for name in "kv"]
        whole = jnp.concatenate([jnp.ones((B, n), bool), mask], axis=1)
        return encoder.attention(q, *in_front(rows, k, v), mask=whole)

    want = encoder.apply_fn(config, attention_fn=attend)(p, tokens, mask=real)
    close(jp.prompts.drop_virtual_positions(out, n)[real], want[real])
    assert np.abs(want - forward(p, tokens, mask=real))[real].max() > 0.1
    # Left to itself, the model has no room for more virtual tokens than it has positions.
    with pytest.raises(ValueError, match=f"{n + T} tokens do not fit in the {T + 1} positions"):
        jp.lift(forward)(tree, longer, mask=mask)


T5 = encoder_decoder.Config(
    vocab_size=23,
    hidden_size=12,
    intermediate_size=16,
    num_layers=1,
    num_decoder_layers=1,
    num_heads=2,
    head_dim=6,
    num_buckets=6,
    max_distance=9,
    feed_forward_proj="gated-gelu",
)


def test_an_encoder_decoder_has_a_prefix_before_inputs_and_one_before_targets():
    """[PREFIX; x; PREFIX; y]; the first stands in the decoder's attention to the encoder, too."""
    n, m = 3, 2
    p, inputs, targets = random_(encoder_decoder.shapes(T5)), ids() % 23, (ids() + 3)[:, :5] % 23
    forward = encoder_decoder.apply_fn(T5)
    found = jp.sites(forward, p, inputs, targets)
    where = ("encoder/layers/attn", "decoder/layers/attn", "decoder/layers/cross")
    pairs = [[found.match(f"{at}/{name}/kernel") for name in "kv"] for at in where]
    method = jp.chain(
        jp.prefix_tuning(n, *pairs[0], dtype=F8),
        jp.prefix_tuning(m, *pairs[1], positions_name="virtual_target_positions", dtype=F8),
        jp.prefix_tuning(n, *pairs[2], dtype=F8),
    )
    frozen, adapter = split(method, p)
    adapter = toy.perturbed(adapter, 1.0)
    xs, virtual_positions = jp.prompts.prepend_virtual_tokens(inputs, n)
    ys, target_positions = jp.prompts.prepend_virtual_tokens(targets, m)
    tree = jp.combine(
        frozen,
        adapter,
        virtual_positions=virtual_positions,
        virtual_target_positions=target_positions,
    )
    real = jnp.arange(T) < jnp.array([[T], [4], [5]])
    mask = jnp.concatenate([jnp.ones((B, n), bool), real], axis=1)
    out = jp.prompts.drop_virtual_positions(jp.lift(forward)(tree, xs, ys, mask=mask), m)

    calls = iter(where)

    def attend(q, k, v, *, mask, bias):
        """Each attention of the one layer in its turn: rows in front, with their distances."""
        at = next(calls)
        rows = [adapter[f"{at}/{name}/kernel/rows"][0] for name in "kv"]
        before, tower = len(rows[0]), at.split("/")[0]
        free = jnp.ones((*mask.shape[:2], before), bool)
        mask = jnp.concatenate([free, mask], axis=2)
        if bias is not None:
            query, key = before + np.arange(q.shape[1]), np.arange(before)
            kinds = buckets(
                jnp.asarray(query[:, None] - key),
                T5.num_buckets,
                T5.max_distance,
                tower == "encoder",
            )
            far = jnp.moveaxis(p[tower]["bias"]["embedding"][kinds], -1, 0)[None]
            far = jnp.broadcast_to(far, (bias.shape[0], *far.shape[1:]))
            bias = jnp.concatenate([far, bias], axis=3)
        return encoder_decoder.attention(q, *in_front(rows, k, v), mask=mask, bias=bias)

    want = encoder_decoder.apply_fn(T5, attention_fn=attend)(p, inputs, targets, mask=real)
    assert not list(calls)
    close(out, want)
    for at in where:  # The outputs depend on each of the three.
        silent = {k: -x if k.startswith(at) else x for k, x in adapter.items()}
        tree = jp.combine(
            frozen,
            silent,
            virtual_positions=virtual_positions,
            virtual_target_positions=target_positions,
        )
        other = jp.prompts.drop_virtual_positions(jp.lift(forward)(tree, xs, ys, mask=mask), m)
        assert np.abs(other - want)[:, -1].max() > 1e-2
    with pytest.raises(KeyError, match="Nothing is given for 'virtual_target_positions'"):
        jp.combine(frozen, adapter, virtual_positions=virtual_positions)


# Refusals -----------------------------------------------------------------------------------------


def on_toy():
    return jp.sites(toy.model, toy.params(), toy.ids())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda k, v: jp.prefix_tuning(0, k, v),
            "`prefix_tuning(length=0)`: `length` must be at least 1",
        ),
        (
            lambda k, v: jp.prefix_tuning([2, 0], k, v),
            "`prefix_tuning(length=[2, 0])`: `length` must be at least 1",
        ),
        (
            lambda k, v: jp.prefix_tuning([], k, v),
            "`prefix_tuning(length=[])`: `length` must be at least 1",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, k, v, hidden=0),
            "`prefix_tuning(hidden=0, embed=None)`: both must be",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, k, v, hidden=4, embed=0),
            "`prefix_tuning(hidden=4, embed=0)`",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, k, v, embed=4),
            "`prefix_tuning(hidden=None, embed=4)`: both must be",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, k, k | v),
            "['layers/k/kernel'] are among the keys and among",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, k, v, rope=[0.1] * 3),
            "`prefix_tuning(rope=...)` has 3 frequencies, one per pair, so heads of size 6, but "
            "'layers/k/kernel' has 16 outputs",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, k.output_slice(0, 2), v),
            "`prefix_tuning`: a part of the columns of 'layers/k/kernel' is selected",
        ),
        (
            lambda k, v: jp.chain(
                jp.prefix_tuning(2, k, v), jp.lora(2, v), jp.prefix_tuning(3, v, v - v)
            ),
            "`prefix_tuning`: 'layers/v/kernel' already has a prefix at the positions "
            "'virtual_positions', which",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, on_toy().match("embed"), v),
            "`prefix_tuning`: the model uses 'embed' as embedding, head, linear, which is not a "
            "projection",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, on_toy().match("positions"), v),
            "`prefix_tuning`: the model uses 'positions' as embedding, which is not a projection",
        ),
        (
            lambda k, v: jp.prefix_tuning(2, on_toy().match("*/q/bias"), v),
            "'layers/q/bias' of shape (3, 16)",
        ),
    ],
)
def test_prefixes_refuse_wrong_options(make, message):
    found = on_toy()
    with pytest.raises(ValueError, match=re.escape(message)):
        make(found.match("*/k/kernel"), found.match("*/v/kernel"))(KEY, toy.params())


@pytest.mark.parametrize(
    "tasks, message",
    [
        ([0, 3, 1], "tasks [0, 3, 1] for 3 examples; give each example an index from 0 to 2"),
        ([0, -1, 1], "tasks [0, -1, 1] for 3 examples"),
        (
            [0, 1],
            "tasks [0, 1] for 3 examples; give each example an index from 0 to 2, for prefixes of ",
        ),
    ],
)
def test_tasks_without_a_prefix_are_named(tasks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jp.prompts.prepend_prefixes(ids(), LENGTHS, np.array(tasks))


def test_tasks_may_be_traced():
    got = jax.jit(lambda tasks: jp.prompts.prepend_prefixes(ids(), LENGTHS, tasks))(TASKS)
    jax.tree.map(
        np.testing.assert_array_equal, got, jp.prompts.prepend_prefixes(ids(), LENGTHS, TASKS)
    )
    with pytest.raises(ValueError, match=r"tasks of shape \(2,\) for 3 examples"):
        jax.jit(lambda tasks: jp.prompts.prepend_prefixes(ids(), LENGTHS, tasks))(TASKS[:2])
