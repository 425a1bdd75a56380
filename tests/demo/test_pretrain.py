"""The tokenizer, the command that makes the base, and the base that ships."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="the demo needs jaxpeft[train]")
pytest.importorskip("grain", reason="the demo needs jaxpeft[train]")

from jaxpeft.data import TextTokenizer  # noqa: E402
from jaxpeft.models import decoder  # noqa: E402
from tests.demo import DEMO, corpus  # noqa: E402

import pretrain  # noqa: E402  # isort: skip

BASE = DEMO / "base"


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(BASE)


def texts(name):
    return [json.loads(line)["text"] for line in (DEMO / "data" / name).read_text().splitlines()]


def test_the_tokenizer_gives_back_any_text(tokenizer):
    held_out = texts("heldout.jsonl") + corpus.held_out_documentation()[:50]
    for text in [*held_out, "\ttabs \r\n and  blanks ", "naïve ∀x∈ℝ 🐍\x00\x7f"]:
        ids = tokenizer.tokenizer.encode(text).ids
        assert tokenizer.tokenizer.decode(ids) == text


def test_the_tokenizer_is_of_use_on_english_and_on_code(tokenizer):
    """About three characters to a token; byte by byte it would be one."""
    for group in (corpus.held_out_documentation(), texts("heldout.jsonl")):
        tokens = sum(len(e.ids) for e in tokenizer.tokenizer.encode_batch(group))
        assert sum(map(len, group)) / tokens > 2.5


def test_a_document_ends_with_the_end_token(tokenizer):
    assert tokenizer.tokenizer.token_to_id(pretrain.END) == tokenizer.eos_id == 0
    assert tokenizer.encode("x = 1").ids[-1] == 0


def test_every_shipped_record_fits_the_context(tokenizer):
    for name in ("train.jsonl", "heldout.jsonl"):
        lengths = [len(tokenizer.encode(text).ids) for text in texts(name)]
        assert max(lengths) <= pretrain.CONTEXT


def test_the_base_is_a_llama_folder_of_at_most_6_mb():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 6_000_000
    config, params = decoder.load(BASE)
    assert config == pretrain.CONFIG
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))


def test_the_base_has_the_losses_that_are_written_beside_it(tokenizer):
    """Evaluated anew, on shipped text only: the documentation differs between Pythons."""
    report = json.loads((BASE / "PRETRAINING.json").read_text())
    config, params = decoder.load(BASE, jnp.float32)
    forward = decoder.pure(config, attention_fn=pretrain.blocked)
    documents = [e.ids for e in tokenizer.tokenizer.encode_batch(texts("heldout.jsonl"))]
    loss = pretrain.mean_loss(forward, params, documents)
    assert loss == pytest.approx(report["held_out_loss"]["code"], rel=1e-3)
    assert report["trained_tokens"] > 1e6 and report["minutes"] > 0


def test_rows_hold_every_token_as_a_target_once():
    documents = [list(range(1, 300)), list(range(300, 900))]
    rows = pretrain.rows(documents)
    assert rows.shape == (3, pretrain.CONTEXT + 1)
    stream = [0, *documents[0], 0, *documents[1]]
    assert rows[:, 1:].ravel().tolist() == stream[1 : 1 + rows[:, 1:].size]
    assert (rows[1:, 0] == rows[:-1, -1]).all()


def test_batches_repeat_with_the_seed_and_differ_between_epochs():
    documents = [[i] * 300 for i in range(1, 30)]
    first, again = pretrain.batches(documents, 0), pretrain.batches(documents, 0)
    one, two = ([next(b) for _ in range(16)] for b in (first, again))
    np.testing.assert_array_equal(one, two)
    assert not (one[0] == one[8]).all()
    assert not (one[0] == next(pretrain.batches(documents, 1))).all()


def test_blocked_attention_is_the_decoders_own():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 300, heads, 8))) for heads in (4, 2, 2))
    segment = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], 100, axis=1))
    order = jnp.asarray(np.stack([np.r_[0:100, 0:100, 0:100], np.r_[0:200, 0:100]]))

    def gradients(attention, **where):
        def loss(*qkv):
            return (attention(*qkv, **where) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    packed = decoder.Place(order, segment)
    for place, window in ((decoder.Place(jnp.arange(300)[None], None), None), (packed, 70)):
        where = {"queries": place, "keys": place, "window": window}
        mine = gradients(pretrain.blocked, **where)
        own = gradients(decoder.attention, **where)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), mine, own)


def test_the_command_writes_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    documents = corpus.reference(held_out=True)[:4]
    held_out = corpus.held_out_documentation()[-20:]
    config = decoder.Config(2048, 16, 32, 1, 2, 1, 8, tied=True, context=pretrain.CONTEXT, eos=(0,))
    monkeypatch.setattr(pretrain, "CONFIG", config)
    monkeypatch.setattr(corpus, "documentation", lambda: documents)
    monkeypatch.setattr(corpus, "held_out_documentation", lambda: held_out)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", str(tmp_path), "--steps", "40"])
    pretrain.main()
    assert "step 40/40" in capsys.readouterr().out
    loaded, _ = decoder.load(tmp_path)
    assert loaded == config
    report = json.loads((tmp_path / "PRETRAINING.json").read_text())
    assert report["trained_tokens"] == 40 * pretrain.ROWS * pretrain.CONTEXT
    assert 0 < report["held_out_loss"]["documentation"] < np.log(2048)
    assert report["curve"][-1]["step"] == 40
