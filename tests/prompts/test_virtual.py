"""Virtual tokens where rows are packed, a window slides, or a model reads what it should not."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import data, train
from jaxpeft.models import decoder, encoder, shifted_sparse
from tests.methods import toy

F8 = jnp.float64
KEY = jax.random.key(0)
N = 3  # virtual tokens
CONFIG = decoder.Config(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    qkv_bias=True,
)
WINDOWED = dataclasses.replace(CONFIG, sliding_window=4, model_type="mistral")
ROPE = CONFIG.rope.frequencies(CONFIG.head_dim)


@functools.cache
def params(layers=2):
    shapes = decoder.shapes(dataclasses.replace(CONFIG, num_layers=layers))
    leaves, treedef = jax.tree.flatten(shapes)
    around = [1.0 if "norm" in jax.tree_util.keystr(k) else 0.0 for k, _ in paths(shapes)]
    values = [
        toy.normal(i, *x.shape) + c for i, (x, c) in enumerate(zip(leaves, around, strict=True))
    ]
    return treedef.unflatten(values)


def paths(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


EXAMPLES = [np.arange(1, 8), np.arange(11, 15), np.arange(20, 29)]


def one(example):
    return jnp.asarray(example)[None]


@functools.cache
def tuned(name, layers=2):
    """(frozen, adapter, the ids or the placeholder in front) of a prefix or a prompt."""
    p = params(layers)
    forward = decoder.apply_fn(dataclasses.replace(CONFIG, num_layers=layers))
    found = jp.sites(forward, p, one(EXAMPLES[0]))
    if "prefix" in name:
        rope = None if name == "unturned prefix" else ROPE
        keys, values = (found.match(f"*/attn/{n}/kernel") for n in "kv")
        method, fill = jp.prefix_tuning(N, keys, values, rope=rope, dtype=F8), 0
    else:
        method = jp.prompt_tuning(N, found.embedding, dtype=F8)
        fill = jp.prompts.virtual_token_ids(found["embed/embedding"], N)
    frozen, adapter = jp.split(method(KEY, p))
    return frozen, toy.perturbed(adapter, 1.0), fill


def tree_of(name, virtual_positions, layers=2):
    frozen, adapter, _ = tuned(name, layers)
    return jp.combine(
        frozen, adapter, **({"virtual_positions": virtual_positions} if "prefix" in name else {})
    )


@functools.partial(jax.jit, static_argnames="config")
def lifted(config, tree, ids, segments, positions):
    return jp.lift(decoder.apply_fn(config))(tree, ids, segment_ids=segments, positions=positions)


def run(name, config, ids, virtual_positions, segments=None, positions=None):
    return lifted(config, tree_of(name, virtual_positions), ids, segments, positions)


def packed():
    """The three examples in two rows, with padding, and what is next to each token."""
    rows, segments = np.zeros((2, 12), int), np.zeros((2, 12), int)
    rows[0, :11], segments[0, :11] = np.concatenate(EXAMPLES[:2]), [1] * 7 + [2] * 4
    rows[1, :9], segments[1, :9] = EXAMPLES[2], 1
    return jnp.asarray(rows), jnp.asarray(segments)


def losses(logits, tokens, segments):
    """Of the next tokens within a segment."""
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return train.cross_entropy(logits[:, :-1], tokens[:, 1:], inside)[0]


def alone(name, config):
    """The loss of each example in a row of its own, behind its own virtual tokens."""
    ids = jnp.stack([jnp.pad(jnp.asarray(x), (0, 9 - len(x))) for x in EXAMPLES])
    segments = jnp.asarray([[int(i < len(x)) for i in range(9)] for x in EXAMPLES])
    longer, virtual_positions, shown = jp.prompts.prepend_virtual_tokens(
        ids, N, tuned(name)[2], segments
    )
    shown = shown if config.sliding_window else None  # without a window no segments are needed
    return losses(run(name, config, longer, virtual_positions, shown)[:, N:], ids, segments)


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_packed_examples_have_the_loss_of_each_alone(name, config):
    ids, segments = packed()
    longer, virtual_positions, shown = jp.prompts.prepend_virtual_tokens(
        ids, N, tuned(name)[2], segments
    )
    got = losses(run(name, config, longer, virtual_positions, shown)[:, N:], ids, segments)
    want = alone(name, config)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    # As it was: virtual tokens in the segment of a row's first example.
    first = jnp.concatenate([jnp.ones((2, N), int), segments], axis=1)
    wrong = losses(run(name, config, longer, virtual_positions, first)[:, N:], ids, segments)
    assert abs(wrong - want) > 1e-3


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_batches_give_each_packed_example_virtual_tokens_of_its_own(name):
    tokens = [data.Tokens(x.astype(np.int32), np.ones(len(x), bool)) for x in EXAMPLES]
    examples = data.Examples(tokens, max_length=12)
    fill = tuned(name)[2]
    batches = data.Batches(
        examples, batch_size=2, num_epochs=1, virtual_tokens=N if name == "prefix" else fill
    )
    (batch,) = (batches[i] for i in range(len(batches)))
    assert batch["tokens"].shape == batch["virtual_positions"].shape == (2, 12 + N)
    assert batch["segment_ids"].max() == 2
    for front in (batch["virtual_positions"] == j for j in range(N)):
        assert front.sum() == 3 and not batch["weights"][front].any()
    where = (batch[k] for k in ("tokens", "virtual_positions", "segment_ids", "positions"))
    logits = run(name, CONFIG, *map(jnp.asarray, where))
    got = train.cross_entropy(logits, batch["targets"], batch["weights"])
    assert got[1] == sum(len(x) - 1 for x in EXAMPLES)
    np.testing.assert_allclose(got[0], alone(name, CONFIG), rtol=1e-10)


def test_rows_of_several_tasks_are_packed_behind_the_prefix_of_their_own():
    ids, segments = packed()
    tokens, virtual_positions, shown = jp.prompts.prepend_prefixes(
        ids, (1, 2), np.array([1, 0]), 0, segments
    )
    assert virtual_positions[:, :2].tolist() == [[1, 2], [-1, 0]]
    assert shown[:, :2].tolist() == [[-1, -1], [0, -1]]
    np.testing.assert_array_equal(shown[:, 2:], segments)
    assert tokens.shape == (2, 14)


def test_batches_without_virtual_tokens_are_as_they_were():
    tokens = [data.Tokens(x.astype(np.int32), np.ones(len(x), bool)) for x in EXAMPLES]
    batch = data.Batches(data.Examples(tokens, max_length=12), batch_size=2)[0]
    assert "virtual_positions" not in batch and batch["tokens"].shape == (2, 12)


# Windows ------------------------------------------------------------------------------------------


def test_a_window_leaves_the_prefix_in_sight_as_in_a_model_written_by_hand():
    """Rows in front of the keys, which each token sees, and of the tokens the last four."""
    _, adapter, _ = tuned("unturned prefix", 1)
    angles = jnp.arange(N, dtype=jnp.float32)[None, :, None, None] * ROPE
    ids = jnp.stack([jnp.arange(1, 10), jnp.arange(11, 20)])
    longer, virtual_positions, shown = jp.prompts.prepend_virtual_tokens(
        ids, N, segment_ids=jnp.ones_like(ids)
    )
    config = dataclasses.replace(WINDOWED, num_layers=1)
    tree = tree_of("unturned prefix", virtual_positions, 1)
    out = lifted(config, tree, longer, shown, None)

    def attend(q, k, v, *, query_positions, key_positions, window):
        rows = [adapter[f"layers/attn/{n}/kernel/rows"][0].reshape(1, N, 1, 6) for n in "kv"]
        rows[0] = decoder._rotate(rows[0], jnp.cos(angles), jnp.sin(angles))
        k, v = (
            jnp.concatenate([jnp.broadcast_to(r, (2, N, 1, 6)), x], axis=1)
            for r, x in zip(rows, (k, v), strict=True)
        )
        t = np.arange(9)
        near = (t[:, None] >= t) & (t[:, None] - t < 4)
        seen = np.concatenate([np.ones((9, N), bool), near], axis=1)
        scores = jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0]) / 6**0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        return jnp.einsum("bnts,bsh->btnh", weights, v[:, :, 0])

    by_hand = decoder.apply_fn(config, attention_fn=attend)
    want = jax.jit(by_hand)(params(1), ids, positions=N + jnp.arange(9)[None])
    np.testing.assert_allclose(out[:, N:], want, atol=1e-10)
    hidden = lifted(config, tree, longer, None, None)[:, N:]
    assert np.abs(hidden - want)[:, 0].max() < 1e-10 < 1e-3 < np.abs(hidden - want)[:, -1].max()


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_decoding_after_a_windowed_prefill_still_sees_the_virtual_tokens(name):
    ids = jnp.stack([jnp.arange(1, 10), jnp.arange(11, 20)])
    longer, virtual_positions, shown = jp.prompts.prepend_virtual_tokens(
        ids, N, tuned(name)[2], jnp.ones_like(ids)
    )
    whole = run(name, WINDOWED, longer, virtual_positions, shown)
    forward = jax.jit(jp.lift(decoder.apply_fn(WINDOWED)))
    cache = decoder.init_cache(WINDOWED, 2, 12, F8)
    cut = N + 6
    first, cache = forward(
        tree_of(name, virtual_positions[:, :cut]),
        longer[:, :cut],
        segment_ids=shown[:, :cut],
        cache=cache,
    )
    np.testing.assert_allclose(first, whole[:, :cut], atol=1e-10)
    for at in range(cut, 12):
        step, cache = forward(
            tree_of(name, virtual_positions[:, at : at + 1]), longer[:, at : at + 1], cache=cache
        )
        np.testing.assert_allclose(step[:, 0], whole[:, at], atol=1e-10)


def test_groups_of_tokens_that_do_not_see_the_prefix_are_refused():
    ids = jnp.arange(1, 10)[None]
    longer, virtual_positions, shown = jp.prompts.prepend_virtual_tokens(
        ids, N, segment_ids=jnp.ones_like(ids)
    )
    model = jp.lift(decoder.apply_fn(CONFIG, attention_fn=shifted_sparse(4)))
    out = jax.jit(model)(tree_of("prefix", virtual_positions), longer, segment_ids=shown)
    assert jnp.isnan(out).all()
    where = decoder.TokenPositions(jnp.arange(12)[None], shown)
    q = jnp.ones((1, 12, 2, 6))
    with pytest.raises(ValueError, match="own group only, but 3 tokens are virtual"):
        shifted_sparse(4)(q, q, q, query_positions=where, key_positions=where, window=None)
    within = jp.lift(decoder.apply_fn(CONFIG, attention_fn=shifted_sparse(12)))
    got = jax.jit(within)(tree_of("prefix", virtual_positions), longer, segment_ids=shown)
    np.testing.assert_allclose(
        got, run("prefix", CONFIG, longer, virtual_positions, shown), atol=1e-10
    )


@pytest.mark.parametrize(
    "segments, message",
    [
        (np.ones((1, 4), int), "`segment_ids` have shape (1, 4), but the tokens have (2, 5)"),
        (np.full((2, 5), -1), "`segment_ids` contain -1, but must be 0 for padding"),
    ],
)
def test_segment_ids_that_do_not_fit_the_tokens_are_refused(segments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jp.prompts.prepend_virtual_tokens(jnp.ones((2, 5), int), N, segment_ids=segments)


@pytest.mark.parametrize("virtual", [-2, [[1]]])
def test_batches_say_what_virtual_tokens_are(virtual):
    examples = data.Examples([data.Tokens(np.arange(4), np.ones(4, bool))], max_length=4)
    with pytest.raises(ValueError, match=re.escape(f"sequence of ids; got {virtual!r}.")):
        data.Batches(examples, batch_size=1, virtual_tokens=virtual)


# Models that read placeholders --------------------------------------------------------------------

P = {
    "embed": toy.normal(0, 20, 8),
    "k": toy.normal(1, 8, 8),
    "v": toy.normal(2, 8, 8),
    "q": toy.normal(3, 8, 8),
}
IDS = jax.random.randint(KEY, (3, 7), 1, 20)


def attended(p, x, seen=True):
    """One layer of attention in both directions, (B, T, D)."""
    q, k, v = (x @ p[name] for name in "qkv")
    scores = jnp.where(seen, jnp.einsum("btd,bsd->bts", q, k), -1e30)
    return x + jax.nn.softmax(scores) @ v


def reading(how):
    """The layer, and something more that `how` makes of its output (B, T, D) and of the ids."""
    return lambda p, ids: how(attended(p, p["embed"][ids]), ids)


def conv(x, ids):
    del ids
    padded = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
    return x + padded[:, :-1]


READERS = {
    "a pooler of position 0": lambda x, ids: jnp.tanh(x[:, 0]),
    "a mean over all positions": lambda x, ids: x.mean(1),
    "the largest of all positions": lambda x, ids: x.max(1),
    "a causal convolution over time": conv,
    "tokens rolled by one": lambda x, ids: jnp.roll(x, 1, axis=1),
    "running sums": lambda x, ids: jnp.cumsum(x, axis=1),
    "positions counted from ids": lambda x, ids: x * jnp.cumsum(ids != 0, axis=1)[..., None],
    "normed over time": lambda x, ids: x - x.mean(1, keepdims=True),
}


def with_prefix(fn, ids=IDS, p=P, n=2, **options):
    found = jp.sites(fn, p, ids)
    method = jp.prefix_tuning(n, found.match("k"), found.match("v"), dtype=F8, **options)
    frozen, adapter = jp.split(method(KEY, p))
    longer, virtual_positions = jp.prompts.prepend_virtual_tokens(ids, n)
    tree = jp.combine(frozen, toy.perturbed(adapter, 1.0), virtual_positions=virtual_positions)
    return tree, longer, virtual_positions


@pytest.mark.parametrize("name", READERS)
def test_a_model_that_reads_a_placeholder_is_refused(name):
    fn = reading(READERS[name])
    tree, ids, virtual_positions = with_prefix(fn)
    with pytest.raises(
        ValueError, match=r"output 0 of shape \(3, [89].*depends on a placeholder: with"
    ):
        jp.prompts.check_prefix(fn, tree, ids, virtual_positions)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, ids: x,
        lambda x, ids: jnp.tanh(x[:, 2]),
        lambda x, ids: x[:, 2:].mean(1),
        lambda x, ids: x[:, -1],
        lambda x, ids: (x, x[:, -1], ids.shape[1] * jnp.ones(3)),
        lambda x, ids: jnp.swapaxes(x, 0, 1),
    ],
    ids=["as it is", "position 2", "a mean of tokens", "the last", "several", "turned at the end"],
)
@pytest.mark.parametrize("hidden", [None, 4], ids=["rows", "encoded"])
def test_a_model_that_reads_none_passes(how, hidden):
    fn = reading(how)
    jp.prompts.check_prefix(fn, *with_prefix(fn, hidden=hidden))


def test_a_prefix_hidden_by_a_mask_or_a_window_is_named():
    t = np.arange(9)
    masks = {
        "masked": (t >= 2)[None],
        "windowed": (t[:, None] >= t) & (t[:, None] - t < 4),
        "packed": (t[:, None] < 5) == (t < 5),
    }
    places = {
        "masked": "0, one of 3,",
        "windowed": "0, position 5, one of",
        "packed": "0, position 5",
    }
    for name, seen in masks.items():

        def fn(p, ids, name=name, seen=seen):
            length = ids.shape[1]  # the model's sites are found without virtual tokens
            out = attended(p, p["embed"][ids], seen[:length, :length])
            return out[:, -1] if name == "masked" else out

        tree, ids, virtual_positions = with_prefix(fn)
        with pytest.raises(
            ValueError,
            match=f"output at example {places[name]}.* not depend on the prefix at '[kv]'",
        ):
            jp.prompts.check_prefix(fn, tree, ids, virtual_positions)


def test_segment_ids_make_a_prefix_visible_beyond_the_window_and_in_packed_rows():
    ids, segments = packed()
    ids = ids[:, :9]
    longer, virtual_positions, shown = jp.prompts.prepend_virtual_tokens(
        ids, N, segment_ids=jnp.where(segments == 2, 2, 1)[:, :9]
    )
    forward, tree = decoder.apply_fn(WINDOWED), tree_of("prefix", virtual_positions)
    jp.prompts.check_prefix(forward, tree, longer, virtual_positions, segment_ids=shown)
    at = "example 0, position 6, .* does not depend on the prefix at 'layers/attn/k/kernel'"
    with pytest.raises(ValueError, match=at):
        jp.prompts.check_prefix(forward, tree, longer, virtual_positions)
    with pytest.raises(ValueError, match="output at example 0, position 10, one of"):
        first = jnp.where(shown == -1, 1, shown)
        jp.prompts.check_prefix(
            decoder.apply_fn(CONFIG), tree, longer, virtual_positions, segment_ids=first
        )


def test_an_encoder_pools_its_first_token_behind_virtual_ones():
    config = encoder.Config(
        vocab_size=23, hidden_size=12, intermediate_size=16, num_layers=1, num_heads=3, pooler=True
    )
    leaves, treedef = jax.tree.flatten(encoder.shapes(config))
    p = treedef.unflatten([toy.normal(i, *x.shape) for i, x in enumerate(leaves)])
    forward, ids = encoder.apply_fn(config, "pooled"), IDS
    found = jp.sites(forward, p, ids)
    frozen, adapter = jp.split(
        jp.prefix_tuning(2, *(found.match(f"layers/attn/{n}/kernel") for n in "kv"), dtype=F8)(
            KEY, p
        )
    )
    longer, virtual_positions = jp.prompts.prepend_virtual_tokens(ids, 2)
    tree = jp.combine(frozen, toy.perturbed(adapter), virtual_positions=virtual_positions)
    with pytest.raises(ValueError, match=r"output 0 of shape \(3, 12\) depends on a placeholder"):
        jp.prompts.check_prefix(forward, tree, longer, virtual_positions)
    jp.prompts.check_prefix(forward, tree, longer, virtual_positions, virtual=2)
    x = jax.jit(jp.lift(encoder.apply_fn(config)))(tree, longer)[:, 2]
    got = jax.jit(lambda *given: jp.lift(forward)(*given, virtual=2))(tree, longer)
    want = jnp.tanh(x @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_check_needs_the_tokens_and_the_tree_of_the_same_positions():
    fn = reading(lambda x, ids: x)
    tree, ids, virtual_positions = with_prefix(fn)
    for given in [
        (P, ids, virtual_positions),
        (tree, ids[:, 2:], virtual_positions),
        (tree, ids, -jnp.ones_like(virtual_positions)),
    ]:
        with pytest.raises(
            ValueError,
            match=r"`check_prefix`: tokens of shape \(3, .*virtual positions of shape \(3, 9\)",
        ):
            jp.prompts.check_prefix(fn, *given)


# Time before batch --------------------------------------------------------------------------------


def time_first(p, ids, outputs=lambda x: x):
    """Ids (B, T) to (B, T, D), with (T, B, D) in between."""
    x = p["embed"][ids].transpose(1, 0, 2)
    q, k, v = (x @ p[name] for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("tbd,sbd->bts", q, k))
    return outputs((x + jnp.einsum("bts,sbd->tbd", weights, v)).transpose(1, 0, 2))


@pytest.mark.parametrize("rows", [3, 8])
@pytest.mark.parametrize("hidden", [None, 4], ids=["rows", "encoded"])
def test_a_model_with_time_first_is_refused_whatever_the_batch(rows, hidden):
    """With eight rows of eight positions too, where shapes alone say nothing."""
    ids = jax.random.randint(KEY, (rows, 6), 1, 20)
    tree, longer, virtual_positions = with_prefix(time_first, ids, hidden=hidden)
    batch = min(rows, 7)
    told = rf"prefix at 'k' was given virtual positions of shape \({batch}, 8\).*\(8, {batch}\)"
    for run in (jp.lift(time_first), jax.jit(jp.lift(time_first))):
        with pytest.raises(ValueError, match=told):
            run(tree, longer)


def test_a_square_batch_of_a_model_with_batch_first_is_right():
    """Also where the model is made for as many rows as there are, so that fewer show nothing."""
    fn = reading(lambda x, ids: x)
    made_for = lambda p, ids: fn(p, ids) + jnp.zeros((8, 1, 1))  # noqa: E731
    ids = jax.random.randint(KEY, (8, 6), 1, 20)
    tree, longer, virtual_positions = with_prefix(fn, ids)
    whole = jax.jit(jp.lift(fn))(tree, longer)
    np.testing.assert_array_equal(jax.jit(jp.lift(made_for))(tree, longer), whole)
    some, where = jp.prompts.prepend_virtual_tokens(ids[:3], 2)
    few = jp.lift(fn)(with_prefix(fn, ids[:3])[0], some)
    np.testing.assert_allclose(whole[:3], few, atol=1e-12)
    del where


def test_moments_of_a_model_with_time_first_are_refused_too():
    """Which inputs count is told by batch and time as well."""

    def fn(p, batch):
        return p["embed"][batch["ids"]].transpose(1, 0, 2) @ p["k"]

    batch = {"ids": jax.random.randint(KEY, (8, 8), 1, 20), "mask": jnp.ones((8, 8))}
    found = jp.sites(fn, P, batch).match("k")
    with pytest.raises(ValueError, match=r"mask of shape \(7, 8\).*leading axes \(8, 7\)"):
        jp.calibration.input_moments(fn, P, found, [batch], mask=lambda batch: batch["mask"])


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("at", [0, 2])
def test_fit_refuses_a_loss_that_reads_a_placeholder(at, jitted):
    fn = reading(lambda x, ids: x[:, at])
    found = jp.sites(fn, P, IDS)
    frozen, adapter = jp.split(
        jp.prefix_tuning(2, found.match("k"), found.match("v"), dtype=F8)(KEY, P)
    )

    def loss(frozen, adapter, batch, key):
        ids, virtual_positions = jp.prompts.prepend_virtual_tokens(batch, 2)
        out = jp.lift(fn)(jp.combine(frozen, adapter, virtual_positions=virtual_positions), ids)
        return jnp.sum(out**2), jnp.float32(3)

    loss = jax.jit(loss) if jitted else loss
    go = functools.partial(
        train.fit, loss, optax.sgd(0.1), frozen, adapter, [np.asarray(IDS)], progress=False
    )
    if at == 0:
        with pytest.raises(
            ValueError, match=r"loss depends on a placeholder.* it is [\d.]+ instead of"
        ):
            go()
        return
    assert int(go().state.step) == 1


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_fit_refuses_packed_rows_of_which_the_first_examples_alone_have_virtual_tokens(name):
    frozen, adapter, fill = tuned(name)
    tokens = [data.Tokens(x.astype(np.int32), np.ones(len(x), bool)) for x in EXAMPLES]
    batches = data.Batches(data.Examples(tokens, max_length=12), batch_size=2, num_epochs=1)

    def loss(mind, frozen, adapter, batch, key):
        shown = batch["segment_ids"] if mind else None
        ids, virtual_positions, *shown = jp.prompts.prepend_virtual_tokens(
            batch["tokens"], N, fill, shown
        )
        tree = jp.combine(
            frozen,
            adapter,
            **({"virtual_positions": virtual_positions} if name == "prefix" else {}),
        )
        out = jp.lift(decoder.apply_fn(CONFIG))(tree, ids, segment_ids=shown[0] if mind else None)
        return train.cross_entropy(out[:, N:], batch["targets"], batch["weights"])

    def go(mind):
        some = functools.partial(loss, mind)
        return train.fit(some, optax.sgd(0.1), frozen, adapter, [batches[0]], progress=False)

    with pytest.raises(
        ValueError, match=r"Row \d of the batch packs 2 examples, but the loss puts"
    ):
        go(False)
    assert int(go(True).state.step) == 1


def test_fit_refuses_gates_over_packed_rows():
    """A gate of UniPELT is a mean over the row, in which examples would mix."""
    found = jp.sites(decoder.apply_fn(CONFIG), params(), one(EXAMPLES[0]))
    k, v, down = (found.match(f"*/{name}/kernel") for name in ("attn/k", "attn/v", "down"))
    method = jp.unipelt(found.match("*/q/kernel"), k, v, down, rank=2, length=N, bottleneck_dim=2)
    frozen, adapter = jp.split(method(KEY, params()))
    batch = {"segment_ids": np.array([[1, 1, 0], [1, 2, 3]])}
    loss = lambda *given: None  # noqa: E731
    with pytest.raises(ValueError, match="Row 1 of the batch packs 3 examples, but a gate of `uni"):
        train.fit(loss, optax.sgd(0.1), frozen, adapter, [batch], progress=False)


# Rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, small, large",
    [(F8, 1e-14, 1e-10), (jnp.float32, 1e-7, 1e-4), (jnp.bfloat16, 1e-2, 0.1)],
)
def test_a_copied_row_may_differ_by_rounding_and_by_no_more(dtype, small, large):
    p = {"embed": toy.normal(0, 20, 8).astype(dtype)}

    def fn(off, p, ids):
        x = jnp.tanh(p["embed"][ids].cumsum(1))
        return x * jnp.where((ids >= 20).any(), 1 + off, 1).astype(dtype)

    site = jp.sites(functools.partial(fn, 0.0), p, IDS)["embed"]
    jp.prompts.check_prompt(functools.partial(fn, small), p, site, IDS)
    with pytest.raises(ValueError, match="does more with ids than look them up in 'embed'"):
        jp.prompts.check_prompt(functools.partial(fn, large), p, site, IDS)
