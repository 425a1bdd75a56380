import json
import shutil
import sys

import pytest

pytest.importorskip("tokenizers")
import folder as model_folder  # noqa: E402
from test_chat import CHATML, TALK  # noqa: E402

from jaxpeft.data import TextTokenizer  # noqa: E402
from jaxpeft.train import UserError  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder.make(tmp_path_factory.mktemp("model"))


def pieces(tokenizer, tokens, counted=True):
    """The text of the tokens that count, or do not."""
    ids = [int(i) for i, mark in zip(*tokens, strict=True) if mark == counted]
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_document_has_the_folders_begin_and_an_end(folder):
    tokenizer = TextTokenizer(folder)
    tokens = tokenizer.encode("The quick brown fox")
    assert (tokens.ids[0], tokens.ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert pieces(tokenizer, tokens) == "<s>The quick brown fox</s>"
    assert (tokens.ids == tokenizer.eos_id).sum() == 1


@pytest.mark.parametrize("joint", ["do?", "do? ", "do?\n\n", "do?\n"])
@pytest.mark.parametrize(
    "completion", ["it jumped", " it jumped", "\n\n", "\nit \n", "é\n", "日本"]
)
def test_only_the_completion_and_the_end_are_counted(folder, joint, completion):
    """Also where the border lies in blanks, that byte-level offsets leave out."""
    tokenizer = TextTokenizer(folder)
    prompt = "Question: what did the fox " + joint
    text = prompt + completion
    tokens = tokenizer.encode(text, [(len(prompt), len(text))])
    counted = pieces(tokenizer, tokens)
    assert counted.endswith(completion + "</s>")
    # What more is counted is the begin of the token that reaches over the border.
    more = counted.removesuffix(completion + "</s>")
    assert prompt.endswith(more) and len(more) <= 2 and not more.strip()
    assert pieces(tokenizer, tokens, False) == "<s>" + prompt.removesuffix(more)


def test_a_conversation_counts_the_assistants_turns_and_adds_nothing(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer = TextTokenizer(tmp_path)
    tokens = tokenizer.encode_chat(TALK)
    assert pieces(tokenizer, tokens) == "Hello!<|im_end|>\nBecause.<|im_end|>\n"
    assert tokenizer.bos_id not in tokens.ids


def test_the_marker_of_the_next_role_is_counted_as_the_one_token_that_it_is(tmp_path, caplog):
    folder = model_folder.make(tmp_path)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endfor %}"
    )
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + prompt)
    tokenizer = TextTokenizer(folder)
    tokens = tokenizer.encode_chat(TALK)
    assert pieces(tokenizer, tokens) == "Hello!<|im_start|>Because.<|im_start|>"
    start = tokenizer.tokenizer.token_to_id("<|im_start|>")
    assert tokens.ids[-1] == start and tokens.counted[-1]
    tokenizer.encode_chat(TALK)
    (record,) = caplog.records  # once: this folder's end token is another
    assert f"turns end with '<|im_start|>' (id {start}), which is none of the end" in record.message
    assert f"[{tokenizer.eos_id}] of {folder}" in record.message
    assert tokenizer.stop_ids == sorted([tokenizer.eos_id, start])


def test_turns_that_end_with_one_of_the_folders_end_tokens_are_no_news(tmp_path, caplog):
    folder = model_folder.make(tmp_path)
    (folder / "chat_template.jinja").write_text(CHATML)
    end = TextTokenizer(folder).tokenizer.token_to_id("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    TextTokenizer(folder).encode_chat(TALK)
    assert not caplog.records


def test_completions_without_an_end_token_are_said(tmp_path, caplog):
    tokenizer = TextTokenizer(model_folder.make(tmp_path, {}, adds_bos=False))
    tokenizer.encode("the fox")
    assert not caplog.records
    tokenizer.encode("the fox", [(4, 7)])
    assert f"{tmp_path} names no eos_token: completions have no end" in caplog.text


def test_the_template_may_stand_in_the_config_alone_or_among_others(tmp_path):
    for template in (
        CHATML,
        [{"name": "x", "template": ""}, {"name": "default", "template": CHATML}],
    ):
        folder = model_folder.make(tmp_path, {"chat_template": template})
        assert TextTokenizer(folder).encode_chat(TALK).counted.any()


def test_a_folder_without_a_template_is_named(folder):
    with pytest.raises(UserError, match=rf"{folder} has no chat template, in chat_template.jinja"):
        TextTokenizer(folder).encode_chat(TALK)


def test_special_tokens_come_from_the_configs_in_their_order(tmp_path):
    folder = model_folder.make(tmp_path, {}, adds_bos=False)
    assert TextTokenizer(folder).eos_id is None
    assert len(TextTokenizer(folder).encode("the").ids) == 1
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 5}))
    assert (TextTokenizer(folder).bos_id, TextTokenizer(folder).eos_id) == (5, 7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert TextTokenizer(folder).eos_id == 9
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    end = TextTokenizer(folder)
    assert end.eos_id == end.tokenizer.token_to_id("</s>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    end = TextTokenizer(folder)
    assert end.eos_id == end.tokenizer.token_to_id("<|im_end|>")


def test_a_begin_that_only_the_config_asks_for_is_added_once(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    for adds_bos in (True, False):
        tokenizer = TextTokenizer(model_folder.make(tmp_path, config, adds_bos))
        tokens = tokenizer.encode("the", [(0, 3)])
        assert tokens.ids[0] == tokenizer.bos_id != tokens.ids[1]
        assert tokens.counted.tolist() == [False, True, True]


def test_cutting_and_padding_that_the_file_asks_for_are_off(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(TextTokenizer(tmp_path).encode("a b c d e f g").ids) > 6


def test_files_that_are_missing_or_broken_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=rf"no {tmp_path}/tokenizer.json: the folder of a model"):
        TextTokenizer(tmp_path)
    folder = model_folder.make(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=rf"{folder}/tokenizer_config.json is not JSON: Expecting"):
        TextTokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{folder}/tokenizer.json is no tokenizer .*: \S+"):
        TextTokenizer(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"tokenizers: pip install 'jaxpeft\[train\]'"):
        TextTokenizer(folder)
