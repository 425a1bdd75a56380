"""Task heads against NumPy, on the reference trunks, with adapters, and through their folders."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.io import load_adapter, save_adapter
from jaxpeft.models import decoder, encoder, heads
from jaxpeft.serve import generator
from jaxpeft.train import init as init_state
from jaxpeft.train import train_step

D, B, T = 12, 3, 7
ENCODER = encoder.Config(
    vocab_size=19,
    hidden_size=D,
    intermediate_size=20,
    num_layers=2,
    num_heads=3,
    max_position_embeddings=16,
)
DECODER = decoder.Config(
    vocab_size=19,
    hidden_size=D,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    tie_word_embeddings=True,
)
# Compiled once for all tests: a loop over layers that runs eagerly is compiled at every call.
TRUNKS = {
    "encoder": (jax.jit(encoder.apply_fn(ENCODER)), encoder.shapes(ENCODER)),
    "decoder": (jax.jit(decoder.apply_fn(DECODER, method="hidden")), decoder.shapes(DECODER)),
}
# Padding on the right, on the left and on both sides, and none.
MASK = np.array([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]], bool)
FIRST, LAST = [0, 2, 1], [2, 6, 4]
HEADS = {
    "sequence_classification": lambda: heads.sequence_classification(D, 4),
    "sequence_classification, last": lambda: heads.sequence_classification(D, 4, pool="last"),
    "sequence_classification, mean": lambda: heads.sequence_classification(D, 4, pool="mean"),
    "token_classification": lambda: heads.token_classification(D, 4),
    "question_answering": lambda: heads.question_answering(D),
    "multiple_choice": lambda: heads.multiple_choice(D),
    "regression": lambda: heads.regression(D, 2, pool="mean"),
    "causal_lm": lambda: heads.causal_lm(D, 19),
    "seq2seq_lm": lambda: heads.seq2seq_lm(D, 19),
}
SHARP = {"rtol": 1e-10, "atol": 1e-10}


def draw(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape)), tree)


def ids(shape=(B, T), seed=0):
    return np.random.default_rng(seed).integers(2, 19, shape)


def hidden(seed=0):
    return np.random.default_rng(seed).normal(0, 1, (B, T, D))


def whole(name, trunk="encoder"):
    """The head, the model of it on a trunk, parameters all drawn at random, and a batch."""
    head, (forward, shapes) = HEADS[name](), TRUNKS[trunk]
    params = draw({"trunk": shapes, "head": jax.eval_shape(head.init, jax.random.key(0))})
    tokens, mask = ids(), MASK
    if name == "multiple_choice":
        tokens, mask = ids((2, 3, T)), np.stack([MASK, MASK[::-1]])
    return head, head.on(forward), params, tokens, mask


def labels_of(name, outputs):
    if name == "regression":
        return np.random.default_rng(3).normal(size=outputs.shape)
    shape = (outputs.shape[0], 2) if name == "question_answering" else outputs.shape[:-1]
    if name == "question_answering":
        return np.stack([FIRST, LAST], axis=1)
    return np.random.default_rng(3).integers(0, outputs.shape[-1], shape)


# Outputs -----------------------------------------------------------------------------------------


def test_init_is_normal_with_a_bias_of_zeros():
    params = heads.sequence_classification(300, 50).init(jax.random.key(0), jnp.bfloat16)
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
        "kernel": ((300, 50), jnp.bfloat16),
        "bias": ((50,), jnp.bfloat16),
    }
    kernel = np.asarray(params["kernel"], np.float32)
    assert abs(kernel.std() - 0.02) < 1e-3 and abs(kernel.mean()) < 1e-3
    assert not params["bias"].any()
    assert set(heads.causal_lm(300, 50).init(jax.random.key(0))) == {"kernel"}


WHAT_IS_POOLED = {
    "first": lambda x, row: x[row, FIRST[row]],
    "last": lambda x, row: x[row, LAST[row]],
    "mean": lambda x, row: x[row, MASK[row]].mean(0),
}
WITHOUT_A_MASK = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "mean": lambda x: x.mean(1),
}


@pytest.mark.parametrize("make", [heads.sequence_classification, heads.regression])
@pytest.mark.parametrize("pool", WHAT_IS_POOLED)
def test_pooling_reads_tokens_and_not_padding(make, pool):
    head, x = make(D, 4, pool=pool), hidden()
    x[~MASK] = np.nan
    params = draw(jax.eval_shape(head.init, jax.random.key(0)))
    rows = np.stack([WHAT_IS_POOLED[pool](x, row) for row in range(B)])
    want = rows @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(head.forward(params, jnp.asarray(x), MASK), want, **SHARP)
    as_numbers = head.forward(params, jnp.asarray(x), MASK.astype(np.int32))
    np.testing.assert_allclose(as_numbers, want, **SHARP)
    x = hidden()
    want = WITHOUT_A_MASK[pool](x) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(head.forward(params, jnp.asarray(x)), want, **SHARP)


@pytest.mark.parametrize("name", HEADS)
def test_rows_without_a_token_give_no_nan(name):
    head, model, params, tokens, mask = whole(name)
    outputs = model(params, tokens, mask=np.zeros_like(mask))
    assert jnp.isfinite(outputs).all()


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize(
    "name", [n for n in HEADS if n != "multiple_choice" and "sequence" not in n]
)
def test_outputs_are_the_kernel_on_the_hidden_states(name, trunk):
    head, model, params, tokens, mask = whole(name, trunk)
    x = np.asarray(TRUNKS[trunk][0](params["trunk"], tokens, mask=mask))
    if name == "regression":
        x = np.stack([x[row, MASK[row]].mean(0) for row in range(B)])
    want = x @ params["head"]["kernel"] + params["head"].get("bias", 0)
    if name == "question_answering":
        want = np.where(MASK[..., None], want, np.finfo(np.float64).min)
    np.testing.assert_allclose(model(params, tokens, mask=mask), want, **SHARP)


def test_no_span_starts_or_ends_in_padding():
    head, model, params, tokens, _ = whole("question_answering")
    probabilities = jax.nn.softmax(model(params, tokens, mask=MASK), axis=1)
    assert not probabilities[~MASK].any()
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_choices_are_rows_of_their_own():
    head, _, params, tokens, mask = whole("multiple_choice")
    forward = TRUNKS["encoder"][0]
    types, turn = ids(tokens.shape, 1) % 2, draw(np.zeros((D, D)))

    def trunk(params, tokens, turn, **where):  # `turn` has no choices: it is not folded
        return forward(params, tokens, **where) @ turn

    got = head.on(trunk)(params, tokens, turn, mask=mask, token_type_ids=types)
    assert got.shape == (2, 3)
    alone = heads.sequence_classification(D, 1).on(trunk)
    for row in range(2):
        want = alone(params, tokens[row], turn, mask=mask[row], token_type_ids=types[row])[:, 0]
        np.testing.assert_allclose(got[row], want, **SHARP)


def test_the_mask_may_have_another_name_or_a_place():
    head, model, params, tokens, mask = whole("sequence_classification, mean")
    want = model(params, tokens, mask=mask)
    trunk = TRUNKS["encoder"][0]
    named = head.on(
        lambda p, ids, attention_mask: trunk(p, ids, mask=attention_mask), mask="attention_mask"
    )
    placed = head.on(lambda p, ids, kept: trunk(p, ids, mask=kept), mask=1)
    np.testing.assert_array_equal(named(params, tokens, attention_mask=mask), want)
    np.testing.assert_array_equal(placed(params, tokens, mask), want)


@pytest.mark.parametrize("name", HEADS)
def test_virtual_positions_are_cut_off_before_the_head(name):
    head, _, params, tokens, mask = whole(name)
    trunk = TRUNKS["encoder"][0]
    front = [(0, 0)] * (tokens.ndim - 1) + [(2, 0)]
    longer, kept = np.pad(tokens, front, constant_values=5), np.pad(mask, front, constant_values=1)
    got = head.on(trunk, virtual=2)(params, longer, mask=kept)
    cut = head.on(lambda p, ids, mask, inner: trunk(p, ids, mask=inner)[:, 2:])
    if name == "multiple_choice":  # `inner` is folded like everything of that shape
        assert got.shape == (2, 3)
    want = cut(params, longer, mask=mask, inner=kept)
    np.testing.assert_allclose(got, want, **SHARP)


def test_a_cache_of_the_trunk_comes_out_with_the_outputs():
    """A copy of the tied head as a head of its own writes what the model writes."""
    params = draw(TRUNKS["decoder"][1])
    model = heads.causal_lm(D, 19).on(TRUNKS["decoder"][0])
    tree = {"trunk": params, "head": {"kernel": params["embed"]["embedding"].T + 0}}
    cache = functools.partial(decoder.init_cache, DECODER, dtype=jnp.float64)
    got = generator(model, cache, max_new_tokens=4)(tree, ids())
    want = generator(decoder.apply_fn(DECODER), cache, max_new_tokens=4)(params, ids())
    np.testing.assert_array_equal(got.tokens, want.tokens)


# Losses ------------------------------------------------------------------------------------------


def cross_entropy_by_hand(rows):
    """Sum and count over pairs of logits and label, in NumPy."""
    total = 0.0
    for logits, label in rows:
        p = np.exp(logits - logits.max())
        total -= np.log(p[label] / p.sum())
    return total, len(rows)


def same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-10)
    np.testing.assert_allclose(got[1], want[1], rtol=0)


@pytest.mark.parametrize(
    "make",
    [heads.sequence_classification(D, 4), heads.multiple_choice(D)],
    ids=["sequence_classification", "multiple_choice"],
)
def test_the_loss_of_a_row_is_the_cross_entropy_of_its_label(make):
    logits = np.random.default_rng(0).normal(size=(5, 4))
    labels = np.array([2, -100, 0, 3, 1])
    keep = np.array([1, 1, 1, 0, 1], bool)
    rows = [(logits[i], labels[i]) for i in (0, 2, 4)]
    same(make.loss(logits, labels, keep), cross_entropy_by_hand(rows))
    rows.append((logits[3], 3))
    same(make.loss(logits, labels), cross_entropy_by_hand(rows))


@pytest.mark.parametrize(
    "head",
    [heads.token_classification(D, 4), heads.seq2seq_lm(D, 4)],
    ids=["token_classification", "seq2seq_lm"],
)
def test_the_loss_of_tokens_counts_those_of_the_mask(head):
    logits = np.random.default_rng(0).normal(size=(B, T, 4))
    labels = np.random.default_rng(1).integers(0, 4, (B, T))
    labels[1, 3] = -100
    places = [(b, t) for b in range(B) for t in range(T) if MASK[b, t] and (b, t) != (1, 3)]
    rows = [(logits[at], labels[at]) for at in places]
    same(head.loss(logits, labels, MASK), cross_entropy_by_hand(rows))


def test_the_loss_of_a_causal_model_asks_for_the_token_that_follows():
    logits = np.random.default_rng(0).normal(size=(B, T, 4))
    labels = np.random.default_rng(1).integers(0, 4, (B, T))
    labels[1, 3] = -100
    rows = [
        (logits[b, t - 1], labels[b, t])
        for b in range(B)
        for t in range(1, T)
        if MASK[b, t] and (b, t) != (1, 3)
    ]
    same(heads.causal_lm(D, 4).loss(logits, labels, MASK), cross_entropy_by_hand(rows))


def test_the_loss_of_a_span_is_that_of_its_two_ends():
    logits = np.random.default_rng(0).normal(size=(B, T, 2))
    labels = np.array([[0, 2], [-100, -100], [1, 4]])
    rows = [(logits[b, :, end], labels[b, end]) for b in (0, 2) for end in (0, 1)]
    same(heads.question_answering(D).loss(logits, labels), cross_entropy_by_hand(rows))
    keep = np.array([[1, 1], [1, 1], [0, 1]])
    del rows[2]
    same(heads.question_answering(D).loss(logits, labels, keep), cross_entropy_by_hand(rows))


def test_the_loss_of_a_regression_is_the_squared_error():
    predictions = np.random.default_rng(0).normal(size=(4, 2))
    labels = np.array([[1.0, -100.0], [0.5, np.nan], [2.0, 0.0], [np.nan, 1.0]])
    keep = np.array([[1, 1], [1, 0], [0, 1], [0, 1]], bool)
    want = ((predictions - labels)[keep] ** 2).sum()
    loss = heads.regression(D, 2).loss
    same(loss(predictions, labels, keep), (want, 5))
    gradient = jax.grad(lambda p: loss(p, labels, keep)[0])(jnp.asarray(predictions))
    want = np.where(keep, 2 * (predictions - labels), 0)
    np.testing.assert_allclose(gradient, want, **SHARP)
    assert loss(predictions, np.zeros((4, 2)))[1] == 8


def test_losses_are_weighted_by_their_mask():
    logits, labels = np.random.default_rng(0).normal(size=(2, 4)), np.array([1, 3])
    total, count = heads.sequence_classification(D, 4).loss(logits, labels, np.array([0.5, 2.0]))
    one, two = (cross_entropy_by_hand([(logits[i], labels[i])])[0] for i in range(2))
    np.testing.assert_allclose(total, 0.5 * one + 2 * two)
    assert count == 2.5


@pytest.mark.parametrize("name", HEADS)
def test_losses_of_half_precision_are_in_float32(name):
    head, model, params, tokens, mask = whole(name)
    outputs = model(params, tokens, mask=mask)
    labels = labels_of(name, outputs).astype(np.float32 if name == "regression" else np.int32)
    total, _ = head.loss(outputs.astype(jnp.bfloat16), labels)
    assert total.dtype == jnp.float32
    assert head.loss(outputs, labels)[0].dtype == jnp.float64


@pytest.mark.parametrize("wrong", [4, -1, -99])
def test_a_label_that_is_no_class_gives_nan_and_not_a_wrong_loss(wrong):
    loss = heads.sequence_classification(D, 4).loss
    logits, labels = np.zeros((2, 4)), np.array([1, wrong])
    assert jnp.isnan(loss(logits, labels)[0])
    assert loss(logits, labels, np.array([1, 0]))[0] == pytest.approx(np.log(4))


# With adapters -----------------------------------------------------------------------------------


def adapted(name, trunk="encoder"):
    head, model, params, tokens, mask = whole(name, trunk)
    sites = jp.sites(model, params, tokens, mask=mask)
    method = jp.chain(
        jp.lora(2, sites.match("trunk/layers/attn/*/kernel"), dtype=jnp.float64),
        jp.unfreeze(sites.match("head/*")),
    )
    return head, model, params, tokens, mask, method


ON_DECODERS = ("sequence_classification, last", "question_answering", "causal_lm")


@pytest.mark.parametrize(
    "name, trunk", [(n, "encoder") for n in HEADS] + [(n, "decoder") for n in ON_DECODERS]
)
def test_gradients_reach_the_head_and_the_adapter_alone(name, trunk):
    head, model, params, tokens, mask, method = adapted(name, trunk)
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    arrays = {f"head/{array}" for array in params["head"]}
    factors = {f"trunk/layers/attn/{n}/kernel/{f}" for n in "qkvo" for f in "ab"}
    assert set(adapter) == arrays | factors
    adapter = draw(adapter, 1)
    lifted = jp.lift(model, materialize="error")
    labels = labels_of(name, model(params, tokens, mask=mask))

    @jax.jit
    @jax.grad
    def gradient(adapter):
        return head.loss(lifted(jp.combine(frozen, adapter), tokens, mask=mask), labels)[0]

    found = gradient(adapter)
    # One bias for all choices, or for all places of a span, cancels in their softmax.
    zero = {"head/bias"} if name in ("multiple_choice", "question_answering") else set()
    for path, array in found.items():
        assert jnp.isfinite(array).all(), path
        assert (np.abs(array).max() > 1e-9) == (path not in zero), path
    tree = jp.combine(frozen, adapter)
    got, want = (
        lifted(tree, tokens, mask=mask),
        model(jp.merge(tree), tokens, mask=mask),
    )
    np.testing.assert_allclose(got, want, **SHARP)


def test_head_and_adapter_are_trained_by_the_step_of_the_library():
    head, model, params, tokens, mask, method = adapted("sequence_classification, mean")
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    batch = {"tokens": tokens, "mask": mask, "labels": np.array([0, 3, 1])}
    lifted = jp.lift(model)

    def loss_fn(frozen, adapter, batch, key):
        tree = jp.combine(frozen, adapter)
        return head.loss(lifted(tree, batch["tokens"], mask=batch["mask"]), batch["labels"])

    tx = optax.adam(0.1)
    step, state = jax.jit(train_step(loss_fn, tx)), init_state(adapter, tx)
    losses = []
    for _ in range(30):
        state, metrics = step(state, frozen, batch, jax.random.key(1))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["sequence_classification", "causal_lm"])
def test_the_head_is_saved_with_the_adapter(name, tmp_path):
    head, model, params, tokens, mask, method = adapted(name)
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    adapter = {path: x + 0.1 for path, x in adapter.items()}
    save_adapter(tmp_path, adapter, method, params, key=jax.random.key(0))
    # Only the trunk has to be the one of training; the head's values come from the folder.
    base = {"trunk": params["trunk"], "head": head.init(jax.random.key(7), jnp.float64)}
    loaded = load_adapter(tmp_path, base)
    got, want = (
        jp.lift(model)(jp.combine(*parts), tokens, mask=mask)
        for parts in ((loaded.frozen, loaded.adapter), (frozen, adapter))
    )
    np.testing.assert_array_equal(got, want)
    other = jax.tree.map(lambda x: x + 1, params["trunk"])
    with pytest.raises(ValueError, match="the values of 'trunk/.* differ"):
        load_adapter(tmp_path, base | {"trunk": other})


# Bad input ---------------------------------------------------------------------------------------


def test_a_head_of_the_wrong_size_at_load_is_named_with_what_would_work(tmp_path):
    head, _, params, _, _, method = adapted("sequence_classification")
    _, adapter = jp.split(method(jax.random.key(0), params))
    save_adapter(tmp_path, adapter, method, params, key=jax.random.key(0))
    for head, found in (
        (heads.sequence_classification(D, 5), "given [5]"),
        (heads.causal_lm(D, 4), "lacks"),
    ):
        base = params | {"head": head.init(jax.random.key(0), jnp.float64)}
        with pytest.raises(ValueError) as info:
            load_adapter(tmp_path, base)
        message = str(info.value)
        assert "'head/bias'" in message and found in message
        assert (
            "Give an array of shape [4] in float64 with any values: the adapter replaces" in message
        )


@pytest.mark.parametrize("name", HEADS)
def test_sizes_that_do_not_fit_are_named(name):
    head, model, params, tokens, mask = whole(name)
    kernel = params["head"]["kernel"]
    message = f"has a kernel of shape {kernel.shape}, but its parameters hold one of shape (12, 77)"
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong = params["head"] | {"kernel": jnp.zeros((12, 77))}
        model(params | {"head": wrong}, tokens, mask=mask)
    made = name.split(",")[0]
    message = f"`heads.{made}(hidden_size=12)` is on a trunk whose hidden states have size 9. Make"
    with pytest.raises(ValueError, match=re.escape(message)):
        head.forward(params["head"], jnp.zeros((B, 1, T, 9)))


@pytest.mark.parametrize("make", [heads.sequence_classification, heads.regression])
def test_an_unknown_pool_is_refused(make):
    with pytest.raises(ValueError, match="must be one of first, last, mean, got 'max'"):
        make(D, 3, pool="max")
    with pytest.raises(ValueError, match="must be one of first, last, mean, got 'cls'"):
        heads.multiple_choice(D, pool="cls")


def test_a_mask_of_other_places_is_refused():
    head, model, params, tokens, _ = whole("sequence_classification")
    trunk = head.on(lambda p, ids, mask: jnp.zeros((B, T + 2, D)))
    message = "hidden states (3, 9, 12) under a mask (3, 7), both without the 0 virtual positions"
    with pytest.raises(ValueError, match=re.escape(message)):
        trunk(params, tokens, mask=MASK)


def test_choices_need_their_axis():
    _, model, params, _, _ = whole("multiple_choice")
    with pytest.raises(ValueError, match=r"got a first argument of shape \(3, 7\)"):
        model(params, ids())


def test_masks_and_labels_of_another_shape_are_refused():
    message = re.escape("so it has their shape (2,), got (2, 7)")
    with pytest.raises(ValueError, match=message):
        heads.sequence_classification(D, 4).loss(
            np.zeros((2, 4)), np.zeros(2, int), np.ones((2, 7))
        )
    with pytest.raises(ValueError, match=message):
        heads.regression(D).loss(np.zeros(2), np.zeros(2), np.ones((2, 7)))
    with pytest.raises(ValueError, match=re.escape("logits (2, 4) and targets (3,)")):
        heads.sequence_classification(D, 4).loss(np.zeros((2, 4)), np.zeros(3, int))
    with pytest.raises(ValueError, match=re.escape("its predictions (2, 1), got (2,)")):
        heads.regression(D).loss(np.zeros((2, 1)), np.zeros(2))
