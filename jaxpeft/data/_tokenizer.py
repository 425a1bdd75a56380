"""Text to tokens with the files of a model folder, and which tokens the loss counts."""

import functools
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpeft._errors import UserError, need
from jaxpeft.data._chat import ChatTemplate, Spans

_log = logging.getLogger("jaxpeft")


class Tokens(NamedTuple):
    """One example."""

    ids: np.ndarray  # int32[n]
    counted: np.ndarray  # bool[n], whether it counts to predict this token


class TextTokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, with the configs beside it.

    Special tokens come from `tokenizer_config.json` and `special_tokens_map.json`, else from
    the ids in `generation_config.json` and `config.json`; the chat template from
    `chat_template.jinja` or `tokenizer_config.json`. All but `tokenizer.json` may be absent.

    Raises:
      UserError: where a file is missing or cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tokenizer = _load(self.folder / "tokenizer.json")
        # Files may ask for cutting and padding, which is done here and said.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._config = _json(self.folder / "tokenizer_config.json")
        special = {**_json(self.folder / "special_tokens_map.json"), **self._config}
        ids = {
            **_json(self.folder / "config.json"),
            **_json(self.folder / "generation_config.json"),
        }
        self._special = {
            name: token
            for name, value in special.items()
            if name.endswith("_token") and (token := _content(value)) is not None
        }
        self.bos_id = self._id("bos", ids)
        self.eos_id = self._id("eos", ids)
        ends = ids.get("eos_token_id")
        self._ends = {self.eos_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._turn_ends: set[int] = set()
        self._chat: ChatTemplate | None = None
        self._told: set[str] = set()

    def _id(self, name, ids):
        token = self._special.get(f"{name}_token")
        if token is not None and (known := self.tokenizer.token_to_id(token)) is not None:
            return known
        value = ids.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) else value
        if value is not None:
            self._special.setdefault(f"{name}_token", self.tokenizer.id_to_token(value) or "")
        return value

    @property
    def stop_ids(self) -> list[int]:
        """Where generation is to stop: the folder's end tokens, and those that end the assistant's
        turns in what has been encoded so far."""
        return sorted(self._ends | self._turn_ends)

    @property
    def chat(self) -> ChatTemplate:
        """The folder's chat template."""
        if self._chat is None:
            file = self.folder / "chat_template.jinja"
            source = file.read_text() if file.exists() else self._config.get("chat_template")
            if isinstance(source, list):  # several by name
                named = {entry["name"]: entry["template"] for entry in source}
                source = named.get("default")
            if source is None:
                raise UserError(
                    f"{self.folder} has no chat template, in chat_template.jinja or "
                    f"tokenizer_config.json. Add one, or train on prompt and completion."
                )
            added = self.tokenizer.get_added_tokens_decoder().values()
            self._chat = ChatTemplate(source, self._special, [token.content for token in added])
        return self._chat

    def encode(self, text: str, counted: Spans | None = None) -> Tokens:
        """A document: with the tokens that the folder puts at its begin, and an end token.

        Args:
          text: The document.
          counted: Ranges of characters that the loss counts, the end token after the last
            one. `None` counts all. A token that reaches into a range is in it.
        """
        encoding = self.tokenizer.encode(text)
        ids = list(encoding.ids)
        marks = _marks(encoding.offsets, counted)
        begin = self._config.get("add_bos_token") and self.bos_id is not None
        if begin and (not ids or ids[0] != self.bos_id):
            ids, marks = [self.bos_id, *ids], [counted is None, *marks]
        if self.eos_id is not None:
            if ids[-1:] == [self.eos_id]:
                marks[-1] = True
            else:
                ids, marks = [*ids, self.eos_id], [*marks, True]
        elif counted is not None:
            self._tell(
                f"{self.folder} names no eos_token: completions have no end that the loss counts, "
                f"and the model will not learn to stop. Name one in tokenizer_config.json."
            )
        return Tokens(np.array(ids, np.int32), np.array(marks, bool))

    def encode_chat(self, messages: list[dict[str, Any]], tools: Any = None) -> Tokens:
        """A conversation: what the template writes, the assistant's turns and their ends counted.

        Nothing else is added but the end of the last turn, where the template writes none.
        """
        text, spans = self.chat.render(messages, tools)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        marks = _marks(encoding.offsets, spans)
        said = [i for i, mark in zip(encoding.ids, marks, strict=True) if mark]
        self._check_end(said)
        return Tokens(np.array(encoding.ids, np.int32), np.array(marks, bool))

    def _check_end(self, said):
        """Says where generation would go on, since it stops at other tokens than turns end with."""
        # Blanks may follow the end of a turn, as in ChatML.
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=False)
        end = next((i for i in reversed(said) if decode([i]).strip()), None)
        if end is not None and self._ends and end not in self._ends:
            self._turn_ends.add(end)
            self._tell(
                f"assistant turns end with {decode([end])!r} (id {end}), which is none of the end "
                f"tokens {sorted(self._ends)} of {self.folder}. Let generation stop there, too: "
                f"generator(..., eos=tokenizer.stop_ids)."
            )

    def _tell(self, message):
        if message not in self._told:
            self._told.add(message)
            _log.warning("%s", message)


def _marks(offsets, counted):
    """Whether each token reaches into one of the ranges, which are in order."""
    if counted is None:
        return [True] * len(offsets)
    return [any(_meets(offset, span) for span in counted) for offset in offsets]


def _meets(offset, span):
    (start, stop), (begin, end) = offset, span
    if start == stop:
        # Byte-level tokenizers trim blanks off the left of an offset, so that a token of
        # blanks has none left: it stands before `stop`. Tokens that were not in the text
        # have (0, 0).
        return begin < stop <= end
    return start < end and begin < stop


def _load(file):
    tokenizers = need("tokenizers", "train", "reading text")
    if not file.exists():
        raise UserError(
            f"no {file}: the folder of a model with its tokenizer is needed. A model that was "
            f"saved with tokenizer_from=... has it."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"{file} is no tokenizer that can be read: {error}.") from error


def _json(file):
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def _content(token):
    """A token's text: written plainly, or as an object with its options."""
    return token.get("content") if isinstance(token, dict) else token
