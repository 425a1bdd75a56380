import json
import logging
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft import data, train
from jaxpeft.data import Batches, Chat, Completion, Examples, Text, Tokens
from jaxpeft.data._examples import pack
from jaxpeft.train import UserError

ARRAYS = ["tokens", "targets", "weights", "segment_ids", "positions"]


def example(number, length, prompt=1):
    """Tokens that tell where they come from: 1000 * number + place."""
    return Tokens(np.arange(length, dtype=np.int32) + 1000 * number, np.arange(length) >= prompt)


def examples(lengths=(5, 3, 9, 2, 7, 4, 4, 6), context=8, **options):
    return Examples([example(i, n) for i, n in enumerate(lengths, 1)], context=context, **options)


def read(batches):
    return [batches[i] for i in range(len(batches))]


def segments(batches):
    """The (tokens, targets, weights) of every segment of every row, in order."""
    for batch in batches:
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            for segment in range(1, ids.max() + 1):
                place = ids == segment
                assert (batch["positions"][row][place] == np.arange(place.sum())).all()
                yield tuple(batch[name][row][place].tolist() for name in ARRAYS[:3])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_comes_once_in_an_epoch_with_its_targets(packed, shuffle):
    data = examples()
    batches = Batches(data, batch_size=3, epochs=1, pack=packed, shuffle=shuffle)
    got = sorted(segments(read(batches)))
    assert got == [
        (ids[:-1].tolist(), ids[1:].tolist(), counted[1:].astype(float).tolist())
        for ids, counted in sorted((data[i] for i in range(len(data))), key=lambda e: e.ids[0])
    ]


def test_packing_leaves_little_room_and_padding_has_no_weight():
    batches = Batches(examples(), batch_size=2, epochs=1)
    assert len(batches) == 3  # 32 places in rows of 8: five rows, and one of padding
    for batch in read(batches):
        assert [batch[name].dtype for name in ARRAYS] == [np.int32] * 2 + [np.float32] + [
            np.int32
        ] * 2
        assert all(batch[name].shape == (2, 8) for name in ARRAYS)
        empty = batch["segment_ids"] == 0
        assert not any(batch[name][empty].any() for name in ARRAYS)
    assert len(Batches(examples(), batch_size=2, epochs=1, pack=False)) == 4


def test_without_shuffling_and_packing_the_order_is_that_of_the_file():
    batches = Batches(examples(), batch_size=3, epochs=2, pack=False, shuffle=False)
    firsts = [int(batch["tokens"][row, 0]) // 1000 for batch in read(batches) for row in range(3)]
    assert firsts == [*range(1, 9), *range(1, 9), 0, 0]


def test_each_epoch_has_its_own_order_that_the_seed_decides():
    data = examples([3] * 50)

    def order(seed):
        batches = Batches(data, batch_size=10, pack=False, seed=seed)
        return [int(x) for i in range(10) for x in batches[i]["tokens"][:, 0] // 1000]

    first, second = order(0)[:50], order(0)[50:]
    assert sorted(first) == sorted(second) == list(range(1, 51))
    assert first != second
    assert order(0) == order(0) != order(1)


def test_a_batch_depends_on_its_number_alone():
    data = examples()
    forward = [Batches(data, batch_size=3)[i] for i in range(12)]
    jumping = Batches(data, batch_size=3)
    for i in (11, 0, 7, 7, 3):
        for name in ARRAYS:
            np.testing.assert_array_equal(jumping[i][name], forward[i][name])


def test_shards_are_the_rows_of_the_whole_batch():
    data = examples()
    whole = Batches(data, batch_size=4, epochs=2)
    parts = [Batches(data, batch_size=4, epochs=2, shard=(i, 2)) for i in range(2)]
    for i in range(len(whole)):
        for name in ARRAYS:
            joined = np.concatenate([part[i][name] for part in parts])
            np.testing.assert_array_equal(joined, whole[i][name])


def test_a_grain_iterator_goes_on_where_its_state_says():
    pytest.importorskip("grain")
    batches = Batches(examples(), batch_size=3, epochs=4)
    straight = list(batches)
    assert len(straight) == len(batches)
    for stop in (0, 1, 5, len(straight)):
        first = iter(batches)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        again = iter(Batches(examples(), batch_size=3, epochs=4))
        again.set_state(state)
        rest = list(again)
        assert len(rest) == len(straight) - stop
        for got, want in zip(rest, straight[stop:], strict=True):
            for name in ARRAYS:
                np.testing.assert_array_equal(got[name], want[name])


def test_data_without_an_end_goes_through_grain_too():
    grain = pytest.importorskip("grain")
    batches = Batches(examples(), batch_size=3)
    iterator = iter(batches)
    for i in range(9):
        np.testing.assert_array_equal(next(iterator)["tokens"], batches[i]["tokens"])
    assert isinstance(batches.dataset(), grain.MapDataset)


@settings(deadline=None)
@given(st.lists(st.integers(1, 16), max_size=60))
def test_packed_rows_fit_and_hold_everything_once(lengths):
    rows = pack(lengths, 16)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < n <= 16 for n in fill)
    # Best fit opens a row only where no other has room: two rows that are half empty
    # cannot both be there.
    assert sum(2 * n <= 16 for n in fill) <= 1


def test_the_fullest_row_with_room_is_chosen():
    assert pack([5, 4, 3, 4, 1], 8) == [[0, 2], [1, 3], [4]]
    assert pack([5, 6, 2], 8) == [[0], [1, 2]]


def test_long_examples_are_cut_off_counted_and_said(caplog):
    with caplog.at_level(logging.WARNING, "jaxpeft"):
        data = examples([5, 12, 9], context=8, source="a.jsonl")
    assert (len(data), data.too_long, data.dropped) == (3, 1, 0)
    assert data[1].ids.tolist() == list(range(2000, 2009))
    assert caplog.messages == [
        "a.jsonl: 1 of 3 records are longer than the context of 8 tokens and were cut off there; "
        "0 in all were left out, too long or without a token for the loss."
    ]


def test_long_examples_are_left_out_counted_and_said(caplog):
    with caplog.at_level(logging.WARNING, "jaxpeft"):
        data = examples([5, 12, 9], context=8, long="drop")
    assert (len(data), data.too_long, data.dropped) == (2, 1, 1)
    assert "1 of 3 records" in caplog.text and "were left out; 1 in all" in caplog.text


def test_long_examples_are_split_so_that_each_token_is_a_target_once():
    data = examples([26, 9, 10], context=8, long="split")
    assert [len(data[i].ids) for i in range(len(data))] == [9, 9, 9, 2, 9, 9, 2]
    targets = [int(t) for i in range(len(data)) for t in data[i].ids[1:]]
    assert targets == [*range(1001, 1026), *range(2001, 2009), *range(3001, 3010)]
    assert data.targets == 25 + 8 + 9


def test_what_has_no_token_left_for_the_loss_is_left_out(caplog):
    long_prompt = example(1, 12, prompt=10)
    with caplog.at_level(logging.WARNING, "jaxpeft"):
        data = Examples([long_prompt, example(2, 4)], context=8)
    assert (len(data), data.too_long, data.dropped) == (1, 1, 1)
    assert "1 in all were left out" in caplog.text


def test_nothing_is_said_where_all_fits(caplog):
    examples([5, 9])
    assert caplog.messages == []


def test_if_nothing_is_left_it_says_why():
    with pytest.raises(UserError, match=r"a.csv: nothing is left .* 1 of 1 records .* of 8 tokens"):
        examples([12], long="drop", source="a.csv")


def test_options_out_of_range_are_named():
    data = examples()
    with pytest.raises(ValueError, match=r"`context` .* at least 1; got 0"):
        examples(context=0)
    with pytest.raises(ValueError, match=r'"truncate", "drop" or "split", got \'cut\''):
        examples(long="cut")
    with pytest.raises(ValueError, match=r"`batch_size` .* at least 1; got 0"):
        Batches(data, batch_size=0)
    with pytest.raises(ValueError, match=r"`epochs` is at least 1, .*; got 0"):
        Batches(data, batch_size=1, epochs=0)
    for shard in ((2, 2), (0, 3)):
        with pytest.raises(ValueError, match=re.escape(f"got {shard} and 4")):
            Batches(data, batch_size=4, shard=shard)


def test_without_grain_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r"grain: pip install 'jaxpeft\[train\]'"):
        iter(Batches(examples(), batch_size=2))


# Reading files.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    import folder
    from test_chat import CHATML

    made = folder.make(tmp_path_factory.mktemp("model"))
    (made / "chat_template.jinja").write_text(CHATML)
    return data.TextTokenizer(made)


def read_file(tmp_path, tokenizer, records, name="data.jsonl", **options):
    file = tmp_path / name
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    file.write_text("\n".join(lines) + "\n")
    return data.read_examples(file, tokenizer, **{"context": 64} | options)


def counted(tokenizer, data, index=0):
    ids = data[index].ids[data[index].counted]
    return tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


TALK = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it jumped"}]


@pytest.mark.parametrize(
    ("record", "fields", "want"),
    [
        ({"prompt": "what? ", "completion": "it jumped"}, None, "it jumped</s>"),
        ({"q": "what?", "a": "it jumped"}, Completion("q", "a", "\n"), "it jumped</s>"),
        ({"messages": TALK}, None, "it jumped<|im_end|>\n"),
        ({"talk": TALK}, Chat("talk"), "it jumped<|im_end|>\n"),
        ({"text": "the fox"}, None, "<s>the fox</s>"),
        ({"body": "the fox"}, Text("body"), "<s>the fox</s>"),
    ],
)
def test_the_three_kinds_of_records(tmp_path, tokenizer, record, fields, want):
    data = read_file(tmp_path, tokenizer, [record, record], fields=fields)
    assert len(data) == 2
    assert counted(tokenizer, data).removeprefix(" ") == want


def test_csv_files_are_read_too(tmp_path, tokenizer):
    data = read_file(tmp_path, tokenizer, ["prompt,completion", '"what?\n",it jumped'], "data.csv")
    assert counted(tokenizer, data) == "it jumped</s>"


@pytest.mark.parametrize(
    ("records", "options", "problem"),
    [
        ([{"text": "a"}, '{"text": b}'], {}, "line 2: not JSON: Expecting value, at column 10."),
        ([{"text": "a"}, {"body": "b"}], {}, "line 2: no field 'text'. .* are: 'body'."),
        ([{"text": "a"}, {"text": ""}], {}, "line 2: field 'text' is empty."),
        ([{"prompt": "a", "completion": " "}], {}, "line 1: field 'completion' is empty."),
        ([{"prompt": "a", "answer": "b"}], {}, "line 1: no field 'completion'."),
        ([{"q": "a"}], {}, "line 1: none of the fields 'messages', 'prompt', 'text'. .* 'q'"),
        ([{"text": ["a"]}], {}, "line 1: field 'text' is list, not text."),
        ([{"messages": "hi"}], {}, "line 1: field 'messages' is str, not a list"),
        ([{"messages": []}], {}, "line 1: field 'messages' is empty."),
        ([{"messages": ["hi"]}], {}, r"line 1: 'messages\[0\]' is str, not an object"),
        ([{"messages": [{"content": "a"}]}], {}, r"line 1: no field 'messages\[0\].role'"),
        ([{"messages": [{"role": "user"}]}], {}, r"line 1: no field 'messages\[0\].content'"),
        (
            [{"messages": [*TALK, {"role": "assistant", "content": ""}]}],
            {},
            r"line 1: field 'messages\[2\].content' is empty.",
        ),
        ([{"messages": TALK[:1]}], {}, "line 1: field 'messages' has no assistant turn"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_field(
    tmp_path, tokenizer, records, options, problem
):
    place = re.escape(str(tmp_path / "data.jsonl"))
    with pytest.raises(UserError, match=f"^{place}, {problem}"):
        read_file(tmp_path, tokenizer, records, **options)


def test_a_conversation_that_the_template_refuses_is_named_with_its_line(tmp_path, tokenizer):
    class Refusing:
        def encode_chat(self, messages, tools):
            raise train.chat.TemplateError("the chat template refuses the conversation: no.")

    with pytest.raises(UserError, match=r"data.jsonl, line 1: the chat template refuses"):
        read_file(tmp_path, Refusing(), [{"messages": TALK}])


def test_a_call_of_a_tool_needs_no_content(tmp_path, tokenizer):
    talk = [*TALK, {"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}]
    assert len(read_file(tmp_path, tokenizer, [{"messages": talk}])) == 1


def test_an_empty_file_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"data.jsonl holds no records"):
        read_file(tmp_path, tokenizer, [])


def test_a_run_on_a_file_is_resumed_exactly(tmp_path, tokenizer):
    """From text to checkpoint: stopped at a step and started again, the same bytes."""
    pytest.importorskip("grain")
    import jax
    import jax.numpy as jnp
    import optax

    data = read_file(tmp_path, tokenizer, [{"text": "the fox " * n} for n in range(1, 20)])
    size = tokenizer.tokenizer.get_vocab_size()
    table = {"table": jax.random.normal(jax.random.key(0), (size, size))}

    def loss_fn(adapter, frozen, batch, key):
        return train.cross_entropy(
            adapter["table"][batch["tokens"]], batch["targets"], batch["weights"]
        )

    def run(folder, steps):
        return train.fit(
            loss_fn,
            optax.adam(optax.constant_schedule(jnp.float32(1e-2))),
            table,
            None,
            Batches(data, batch_size=2),
            steps=steps,
            held_out=Batches(data, batch_size=2, epochs=1),
            folder=folder,
            save_every=2,
            progress=False,
        )

    straight = run(tmp_path / "straight", 8)
    assert straight.held_out.tokens == data.targets
    run(tmp_path / "stopped", 5)
    (tmp_path / "stopped" / "metrics.jsonl").write_bytes(
        b"".join(
            line
            for line in (tmp_path / "stopped" / "metrics.jsonl").read_bytes().splitlines(True)
            if b'{"step": 5, "held_out' not in line  # the evaluation at the end of the short run
        )
    )
    resumed = run(tmp_path / "stopped", 8)
    np.testing.assert_array_equal(resumed.state.adapter["table"], straight.state.adapter["table"])
    files = [tmp_path / name / "metrics.jsonl" for name in ("straight", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
