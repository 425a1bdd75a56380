"""A saved folder can be trained on text again: its tokenizer comes with it."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_limits import CONFIGS, MODELS

from jaxpeft.models import decoder, encoder_decoder

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '</s>' }}{% endfor %}"


@pytest.fixture
def source(tmp_path):
    """A folder with the files of a tokenizer, and others."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (folder / "README.md").write_text("of the source")
    return folder


def params(model):
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), model.shapes(CONFIGS[model]))


@MODELS
def test_tokenizer_chat_template_and_generation_config_are_carried_over(tmp_path, source, model):
    out = tmp_path / "out"
    model.save(out, CONFIGS[model], params(model), tokenizer_from=source)
    names = {file.name for file in source.iterdir()} - {"README.md"}
    assert {file.name for file in out.iterdir()} == names | {"config.json", "model.safetensors"}
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert model.load(out)[0] == CONFIGS[model]


def test_the_tokenizer_there_is_replaced_whole_and_other_files_stay(tmp_path, source):
    out = tmp_path / "out"
    decoder.save(out, CONFIGS[decoder], params(decoder), tokenizer_from=source)
    (out / "notes.txt").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "spiece.model").write_bytes(b"pieces")
    encoder_decoder.save(
        out, CONFIGS[encoder_decoder], params(encoder_decoder), tokenizer_from=other
    )
    assert {file.name for file in out.iterdir()} == {
        "config.json", "model.safetensors", "notes.txt", "spiece.model",
    }  # fmt: skip


def test_saving_over_the_folder_itself_keeps_its_tokenizer(source):
    before = (source / "tokenizer.json").read_bytes()
    decoder.save(source, CONFIGS[decoder], params(decoder), tokenizer_from=source / ".." / "source")
    assert (source / "tokenizer.json").read_bytes() == before
    decoder.save(source, CONFIGS[decoder], params(decoder))
    assert (source / "chat_template.jinja").read_text() == CHATML


def test_a_folder_without_a_tokenizer_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no tokenizer, none of tokeniz"):
        decoder.save(out, CONFIGS[decoder], params(decoder), tokenizer_from=tmp_path)
    assert not out.exists()


def test_a_saved_folder_is_trained_on_text_and_chats_again(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "train")
    sys.modules.pop("folder", None)
    import folder as model_folder

    from jaxpeft.data import TextTokenizer
    from jaxpeft.train import UserError

    source = model_folder.make(tmp_path / "source")
    (source / "chat_template.jinja").write_text(CHATML)
    out = tmp_path / "out"
    decoder.save(out, CONFIGS[decoder], params(decoder))
    with pytest.raises(UserError, match=rf"no {out}/tokenizer.json.* saved with tokenizer_from="):
        TextTokenizer(out)
    decoder.save(out, CONFIGS[decoder], params(decoder), tokenizer_from=source)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    got, want = TextTokenizer(out).encode_chat(talk), TextTokenizer(source).encode_chat(talk)
    np.testing.assert_array_equal(got.ids, want.ids)
    assert got.counted.any()
