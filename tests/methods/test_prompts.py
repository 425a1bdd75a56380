"""Prompts and P-tuning: where rows start, whose they are, over which bases, and through a cache."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.io import load_adapter, save_adapter
from jaxpeft.models import decoder
from jaxpeft.serve import generator

from . import toy

F8 = jnp.float64
KEY = jax.random.key(0)
B, T, V = toy.B, toy.T, toy.V


@pytest.fixture(scope="module")
def sites():
    return jp.sites(toy.model, toy.params(), toy.ids())


@pytest.fixture(scope="module")
def table(sites):
    return sites.match("embed")


lifted = jax.jit(lambda frozen, adapter, ids: jp.lift(toy.model)(jp.combine(frozen, adapter), ids))
plain = jax.jit(lambda p, table, ids: toy.by_hand(p | {"embed": table}, ids)[..., :V])


def by_hand(p, rows, ids):
    """Logits of the model whose table has these rows behind its own."""
    return plain(p, jnp.concatenate([p["embed"], rows]), ids)


def close(a, b, by=1e-10):
    np.testing.assert_allclose(a, b, rtol=by, atol=by)


def behind(site, length, start, ids):
    """Ids behind the virtual tokens `start`, `start` + 1, ..."""
    virtual = jp.prompts.virtual_token_ids(site, length, start)
    return jnp.concatenate([jnp.broadcast_to(virtual, (len(ids), length)), ids], axis=1)


def made(method, p=None):
    return jp.split(method(KEY, toy.params() if p is None else p))


# Where rows start --------------------------------------------------------------------------------

WORDS = {"good": 7, "or": 3, "bad": 41}


def words(text):
    return [WORDS[word] for word in text.split()]


class Tokenizer:
    """What `tokenizers.Tokenizer` is to us."""

    def encode(self, text, add_special_tokens=True):
        ids = words(text) + [0] * add_special_tokens
        return type("Encoding", (), {"ids": ids})


@pytest.mark.parametrize("tokenizer", [words, Tokenizer()], ids=["function", "tokenizer"])
@pytest.mark.parametrize(
    "length, ids", [(2, [7, 3]), (3, [7, 3, 41]), (7, [7, 3, 41, 7, 3, 41, 7])]
)
def test_a_text_gives_the_embeddings_of_its_tokens_truncated_or_repeated(
    table, tokenizer, length, ids
):
    _, adapter = made(
        jp.prompt_tuning(length, table, init_text="good or bad", tokenizer=tokenizer, dtype=F8)
    )
    np.testing.assert_array_equal(adapter["embed/rows"], toy.params()["embed"][jnp.array(ids)])
    _, same = made(jp.prompt_tuning(length, table, init=np.array([7, 3, 41]), dtype=F8))
    np.testing.assert_array_equal(adapter["embed/rows"], same["embed/rows"])


def test_rows_of_the_vocabulary_are_drawn_anew_by_each_key(table):
    method = jp.prompt_tuning(40, table, init="vocabulary", dtype=F8)
    p = np.asarray(toy.params()["embed"])
    drawn = []
    for key in (KEY, jax.random.key(1)):
        rows = np.asarray(jp.split(method(key, toy.params()))[1]["embed/rows"])
        drawn.append([int(np.flatnonzero((p == row).all(1))[0]) for row in rows])
    assert len(set(drawn[0])) > 20 and drawn[0] != drawn[1]


def test_random_rows_have_the_given_standard_deviation(table):
    _, adapter = made(jp.prompt_tuning(4000, table, init_std=0.5))
    rows = adapter["embed/rows"]
    assert rows.shape == (4000, toy.D) and rows.dtype == jnp.float32
    assert abs(float(rows.std()) - 0.5) < 0.01 and abs(float(rows.mean())) < 0.01


@pytest.mark.parametrize("below", ["lora", "int8", "prompt", "full"])
def test_rows_start_at_the_table_as_it_is_under_other_methods(sites, table, below):
    methods = {
        "lora": jp.lora(2, table, dtype=F8),
        "int8": jp.quantize("int8", table),
        "prompt": jp.prompt_tuning(2, table, dtype=F8),
        "full": jp.unfreeze(table),
    }
    _, adapter = made(
        jp.chain(methods[below], jp.prompt_tuning(3, table, init=[9, 8, 7], dtype=F8))
    )
    want = toy.params()["embed"]
    if below == "int8":  # The others start at the table.
        want = jp.merge(methods[below](KEY, toy.params()))["embed"]
    np.testing.assert_array_equal(adapter["embed/rows"], want[jnp.array([9, 8, 7])])


# Whose rows they are -----------------------------------------------------------------------------


def test_prompts_of_three_tasks_mix_in_one_batch(table):
    """Of lengths 1, 2 and 3, each example behind its own alone; the shorter ones are padded."""
    frozen, adapter = made(jp.prompt_tuning(6, table, dtype=F8))
    adapter = toy.perturbed(adapter)
    rows, tasks = adapter["embed/rows"], ((1, 0), (2, 1), (3, 3))  # length, start
    ids = [behind(table["embed"], *task, toy.ids()[i : i + 1]) for i, task in enumerate(tasks)]
    # The model is causal and has no mask: padding stands at the end.
    batch = jnp.concatenate([jnp.pad(x, ((0, 0), (0, 3 + T - x.shape[1]))) for x in ids])
    out = lifted(frozen, adapter, batch)

    @jax.jit
    def gradient(i):
        loss = lambda a: jnp.sum(jnp.sin(lifted(frozen, a, batch)[i]))  # noqa: E731
        return jnp.abs(jax.grad(loss)(adapter)["embed/rows"]).max(1)

    for i, (length, start) in enumerate(tasks):
        own = jnp.zeros_like(rows).at[start : start + length].set(rows[start : start + length])
        close(out[i, : length + T], by_hand(toy.params(), own, batch[i : i + 1])[0, : length + T])
        assert np.flatnonzero(gradient(i)).tolist() == list(range(start, start + length))


def test_a_second_prompt_stands_behind_the_first(sites, table):
    both = jp.chain(jp.prompt_tuning(2, table, dtype=F8), jp.prompt_tuning(3, table, dtype=F8))
    frozen, adapter = made(both)
    adapter = toy.perturbed(adapter)
    assert adapter.keys() == {"embed/w/rows", "embed/rows"}
    rows = jnp.concatenate([adapter["embed/w/rows"], adapter["embed/rows"]])
    ids = behind(table["embed"], 5, 0, toy.ids())
    close(lifted(frozen, adapter, ids), by_hand(toy.params(), rows, ids))
    tree = jp.combine(frozen, adapter)
    jp.prompts.check_token_ids(tree, table["embed"], ids)
    with pytest.raises(ValueError, match="Token id 55 has no row: 'embed' has 50 rows and 5 virt"):
        jp.prompts.check_token_ids(tree, table["embed"], ids + 1)


def p_tuned(table, lengths=(2, 3), **options):
    method = jp.p_tuning(lengths, table, hidden=5, embed=4, dtype=F8, **options)
    frozen, adapter = made(method)
    return method, frozen, toy.perturbed(adapter)


def test_two_tasks_train_one_encoder_jointly_and_their_own_tables(table):
    _, frozen, adapter = p_tuned(table)
    site = table["embed"]
    batch = [behind(site, 2, 0, toy.ids()), behind(site, 3, 2, toy.ids())]

    @jax.jit
    def gradient(shares):
        def loss(adapter):
            each = [jnp.sum(jnp.sin(lifted(frozen, adapter, ids)[:, -1])) for ids in batch]
            return shares @ jnp.stack(each)

        return jax.grad(loss)(adapter)

    first, second, both = (gradient(jnp.array(shares)) for shares in ([1.0, 0], [0, 1.0], [1.0, 1]))
    encoder = [name for name in adapter if "/encoder/" in name]
    assert len(encoder) == 2 * 2 * 4 + 4
    for name in encoder:
        # The backward direction of a task has no first cell to come from: all have gradients.
        assert np.abs(first[name]).max() > 0 and np.abs(second[name]).max() > 0, name
    touched = [np.flatnonzero(np.abs(g["embed/rows"]).max(1)).tolist() for g in (first, second)]
    assert touched == [[0, 1], [2, 3, 4]]
    jax.tree.map(lambda a, b, c: close(a + b, c), first, second, both)


def test_an_lstm_reads_the_table_of_one_task_at_a_time(table):
    """A task's rows are those that it has alone, whatever the other's table."""
    _, frozen, adapter = p_tuned(table)
    rows = jp.adapters.drop_reparameterization(frozen, adapter)[1]["embed/rows"]
    for part in (slice(0, 2), slice(2, 5)):
        _, alone, fresh = p_tuned(table, part.stop - part.start)
        own = adapter | {"embed/rows": adapter["embed/rows"][part]}
        assert fresh.keys() == own.keys()
        close(
            jp.adapters.drop_reparameterization(alone, own)[1]["embed/rows"], rows[part], by=1e-14
        )


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_dropping_the_encoder_leaves_the_rows_of_a_plain_prompt(table, encoder):
    _, frozen, adapter = p_tuned(table, encoder=encoder)
    ids = behind(table["embed"], 5, 0, toy.ids())
    folded, rows = jp.adapters.drop_reparameterization(frozen, adapter)
    again, start = made(jp.prompt_tuning(5, table, dtype=F8))
    assert {k: v.shape for k, v in rows.items()} == {k: v.shape for k, v in start.items()}
    want = lifted(frozen, adapter, ids)
    close(lifted(folded, rows, ids), want, by=1e-12)
    close(lifted(again, rows, ids), want, by=1e-12)
    other = lifted(folded, {"embed/rows": -rows["embed/rows"]}, ids)
    assert np.abs(other - want)[:, -1].max() > 0.1


def test_training_of_an_encoder_goes_on_from_a_file(table, tmp_path):
    method, frozen, adapter = p_tuned(table)
    ids = behind(table["embed"], 5, 0, toy.ids())
    tx = optax.adam(1e-2)

    @jax.jit
    def step(frozen, adapter, state):
        loss = lambda a: jnp.mean(jnp.sin(jp.lift(toy.model)(jp.combine(frozen, a), ids)))  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(adapter, updates), state, value

    adapter, state, before = step(frozen, adapter, tx.init(adapter))
    save_adapter(tmp_path, adapter, method, toy.params(), key=KEY)
    loaded = load_adapter(tmp_path, toy.params())
    want, _, value = step(frozen, adapter, state)
    got, _, same = step(loaded.frozen, loaded.adapter, state)
    assert value == same != before
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_many_prompts_share_one_base_under_vmap(table):
    frozen, adapter = made(jp.prompt_tuning(3, table, dtype=F8))
    many = [toy.perturbed(adapter, size) for size in (0.1, 0.5, 1.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    ids = behind(table["embed"], 3, 0, toy.ids())
    run = jax.vmap(lambda a, i: jp.lift(toy.model)(jp.combine(frozen, a), i[None])[0])
    out = jax.jit(run)(stacked, ids)
    for i, one in enumerate(many):
        close(out[i], by_hand(toy.params(), one["embed/rows"], ids[i : i + 1])[0])


# Other bases, other methods ----------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize("encoded", [False, True], ids=["prompt", "p_tuning"])
def test_a_prompt_over_a_quantized_table_is_one_over_the_dequantized_table(
    sites, table, format, encoded
):
    """The table, which is the head as well, and all layers are quantized."""
    options = {"block": 8} if format == "nf4" else {}
    quantize = jp.quantize(format, sites.matrices, **options)
    method = (
        jp.p_tuning(3, table, hidden=4, dtype=F8)
        if encoded
        else jp.prompt_tuning(3, table, dtype=F8)
    )
    frozen, adapter = made(jp.chain(quantize, method))
    adapter = toy.perturbed(adapter)
    dequantized = jp.merge(quantize(KEY, toy.params()))
    assert np.abs(dequantized["embed"] - toy.params()["embed"]).max() > 1e-3
    rows = (jp.adapters.drop_reparameterization(frozen, adapter)[1] if encoded else adapter)[
        "embed/rows"
    ]
    ids = behind(table["embed"], 3, 0, toy.ids())
    close(lifted(frozen, adapter, ids), by_hand(dequantized, rows, ids))


def test_a_prompt_over_lora_on_the_tied_table_and_everywhere_else(sites, table):
    lora = jp.lora(2, sites.matrices, dtype=F8)
    frozen, adapter = made(jp.chain(lora, jp.prompt_tuning(3, table, dtype=F8)))
    adapter = toy.perturbed(adapter)
    below, low = made(lora)
    names = {"embed/a": "embed/w/a", "embed/b": "embed/w/b"}
    merged = jp.merge(jp.combine(below, {k: adapter[names.get(k, k)] for k in low}))
    ids = behind(table["embed"], 3, 0, toy.ids())
    close(lifted(frozen, adapter, ids), by_hand(merged, adapter["embed/rows"], ids))


# Through the cache -------------------------------------------------------------------------------

CONFIG = decoder.Config(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    sliding_window=6,
)


def test_generation_is_that_of_a_model_with_the_rows_in_its_table():
    """Padded on the left, virtual tokens before and among the text, and sliding windows."""
    shapes = decoder.shapes(CONFIG)
    leaves, treedef = jax.tree.flatten(shapes)
    p = treedef.unflatten([toy.normal(i, *x.shape) * 2 for i, x in enumerate(leaves)])
    tokens = jax.random.randint(jax.random.key(3), (2, 8), 0, CONFIG.vocab_size)
    forward = decoder.apply_fn(CONFIG)
    found = jp.sites(forward, p, tokens)
    site = found["embed/embedding"]
    table = found.match("embed/embedding")
    frozen, adapter = made(jp.p_tuning(3, table, hidden=4, dtype=F8), p)
    adapter = toy.perturbed(adapter, 1.0)
    tree = jp.combine(frozen, adapter)
    rows = jp.adapters.drop_reparameterization(frozen, adapter)[1]["embed/embedding/rows"]
    longer = p | {"embed": {"embedding": jnp.concatenate([p["embed"]["embedding"], rows])}}
    fill = jp.prompts.prompt_template(
        jp.prompts.virtual_token_ids(site, 2), "{x}", jp.prompts.virtual_token_ids(site, 1, 2)
    )
    full = [fill(x=tokens[0]), fill(x=tokens[1, :4])]
    assert [len(x) for x in full] == [11, 7]
    padded = jnp.stack([jnp.pad(jnp.asarray(x), (11 - len(x), 0)) for x in full])
    mask = jnp.arange(11) >= jnp.array([[0], [4]])
    cache = functools.partial(decoder.init_cache, CONFIG, dtype=F8)
    ours = generator(jp.lift(forward), cache, max_new_tokens=6)
    theirs = generator(forward, cache, max_new_tokens=6)
    got = np.asarray(ours(tree, padded, mask).tokens)
    np.testing.assert_array_equal(got, theirs(longer, padded, mask).tokens)
    # The second row alone, without padding, and the model without its virtual tokens.
    np.testing.assert_array_equal(got[1:], theirs(longer, full[1][None]).tokens)
    bare = theirs(p, tokens[:1]).tokens
    assert len(np.unique(got)) > 4 and (got < CONFIG.vocab_size).all() and (got[:1] != bare).any()


# Templates ---------------------------------------------------------------------------------------


def test_a_template_puts_pieces_where_they_stand():
    fill = jp.prompts.prompt_template(
        "good {x} or", [100, 101], "{y}", np.array([102]), "bad", tokenizer=words
    )
    got = fill(x="bad bad", y=[5, 6])
    assert got.tolist() == [7, 41, 41, 3, 100, 101, 5, 6, 102, 41] and got.dtype == np.int32
    assert fill(y=np.array([9]), x=()).tolist() == [7, 3, 100, 101, 9, 102, 41]
    assert jp.prompts.prompt_template([4], [])().tolist() == [4]
    # As in the paper: [h0 .. hi; e(x); hi+1 .. hm; e(y)], the same input twice.
    twice = jp.prompts.prompt_template([50], "{x}", [51, 52], "{x}")
    assert twice(x=jnp.array([1, 2])).tolist() == [50, 1, 2, 51, 52, 1, 2]


def test_a_template_of_a_tokenizer_adds_no_special_tokens():
    assert jp.prompts.prompt_template("good", tokenizer=Tokenizer())().tolist() == [7]


@pytest.mark.parametrize(
    "pieces, inputs, message",
    [
        (["{x}", [1]], {}, r"takes the inputs ['x'], but was given []."),
        (["{x}", "{y}"], {"x": [1]}, r"takes the inputs ['x', 'y'], but was given ['x']."),
        (["{x}"], {"x": [1], "z": [2]}, r"takes the inputs ['x'], but was given ['x', 'z']."),
        (["{x}"], {"x": "good"}, "the text 'good' needs the model's tokenizer"),
    ],
)
def test_a_template_names_what_is_missing(pieces, inputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jp.prompts.prompt_template(*pieces)(**inputs)


def test_a_template_with_text_needs_its_tokenizer_at_once():
    with pytest.raises(ValueError, match="the text 'It was ' needs the model's"):
        jp.prompts.prompt_template("It was {x}")


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda t: jp.prompt_tuning(0, t),
            "`prompt_tuning(length=0)`: `length` must be at least 1",
        ),
        (
            lambda t: jp.prompt_tuning(2, t, init="zeros"),
            "`prompt_tuning(init='zeros')`: `init` must be 'random', 'vocabulary' or",
        ),
        (
            lambda t: jp.prompt_tuning(2, t, init=[]),
            "`prompt_tuning(init=[])`: `init` must contain at least one token id",
        ),
        (
            lambda t: jp.prompt_tuning(2, t, init=[3, 50]),
            "`prompt_tuning(init=[3, 50])` has ids out of range: 'embed' has 50 rows, "
            "so ids are from 0 to 49",
        ),
        (
            lambda t: jp.prompt_tuning(2, t, init=[-1]),
            "`prompt_tuning(init=[-1])` has ids out of range",
        ),
        (
            lambda t: jp.prompt_tuning(2, t, init="vocabulary", init_text="good", tokenizer=words),
            "`prompt_tuning(init='vocabulary', init_text='good')`: give either `init` or "
            "`init_text`",
        ),
        (
            lambda t: jp.prompt_tuning(2, t, init_text="good or bad"),
            "`prompt_tuning(init_text='good or bad')` needs the model's tokenizer",
        ),
        (
            lambda t: jp.prompt_tuning(2, t, init_text="", tokenizer=words),
            "`prompt_tuning(init_text='')`: the tokenizer gives no token for this text.",
        ),
        (lambda t: jp.p_tuning(0, t), "`p_tuning(length=0, hidden=None, layers=2, embed=None)`"),
        (lambda t: jp.p_tuning([2, 0], t), "`p_tuning(length=[2, 0], hidden=None"),
        (lambda t: jp.p_tuning([], t), "`p_tuning(length=[], hidden=None"),
        (lambda t: jp.p_tuning(2, t, hidden=0), "`p_tuning(length=2, hidden=0, layers=2"),
        (lambda t: jp.p_tuning(2, t, layers=0), "`p_tuning(length=2, hidden=None, layers=0"),
        (
            lambda t: jp.p_tuning(2, t, embed=-4),
            "layers=2, embed=-4)`: each of them must be at least 1",
        ),
        (
            lambda t: jp.p_tuning(2, t, encoder="gru"),
            "`p_tuning(encoder='gru')`: `encoder` must be one of ['lstm', 'mlp']",
        ),
    ],
)
def test_prompts_refuse_wrong_options(table, make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(table)(KEY, toy.params())


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning"])
def test_only_a_table_that_is_looked_up_by_id_has_virtual_tokens(sites, name):
    method = functools.partial(getattr(jp, name), 2)
    with pytest.raises(ValueError, match=f"`{name}`: the model uses 'layers/q/kernel' as linear"):
        method(sites.match("*/q/kernel"))(KEY, toy.params())
    p = {"w": toy.normal(0, 4, 9, 8)}

    def tables(p, ids):
        return jax.vmap(lambda w, ids: w[ids])(p["w"], ids)

    stacked = jp.sites(tables, p, jnp.zeros((4, 3), int))
    with pytest.raises(ValueError, match=rf"`{name}`: 'w' is a stack of tables \(4,\)"):
        method(stacked.match("w"))(KEY, p)


def test_ids_without_a_row_are_named_whatever_the_tree(sites, table):
    site, p = table["embed"], toy.params()
    tree = jp.combine(*made(jp.prompt_tuning(2, table)))
    jp.prompts.check_token_ids(tree, site, [[0, 51]])
    jp.prompts.check_token_ids(tree, site, [])
    with pytest.raises(ValueError, match="Token id -3 has no row: 'embed' has 50 rows and 2 virt"):
        jp.prompts.check_token_ids(tree, site, [[5, -3]])
    for bare in (p, jp.combine(*made(jp.lora(2, sites.match("*/q/kernel"))))):
        jp.prompts.check_token_ids(bare, site, [[0, 49]])
        with pytest.raises(ValueError, match="Token id 50 .* 50 rows and 0 virtual.* from 0 to 49"):
            jp.prompts.check_token_ids(bare, site, [[0, 50]])


def test_virtual_tokens_keep_their_rows_under_a_lora_of_the_table():
    table = jax.random.normal(jax.random.key(0), (7, 5))
    f = lambda p, ids: p["table"][ids]  # noqa: E731
    sites = jp.sites(f, {"table": table}, jnp.zeros((2,), int))
    method = jp.chain(jp.prompt_tuning(2, sites.embedding), jp.lora(2, sites.embedding))
    frozen, adapter = jp.split(method(jax.random.key(1), {"table": table}))
    adapter = {n: v + 1 for n, v in adapter.items()}
    ids = jnp.array([6, 7, 8])
    got = jp.lift(f)(jp.combine(frozen, adapter), ids)
    np.testing.assert_allclose(got[1:], adapter["table/w/rows"], rtol=1e-12)
    low = adapter["table/a"][6] @ adapter["table/b"]
    np.testing.assert_allclose(got[0], table[6] + low, rtol=1e-12)
