"""Text to tokens with the files of a model folder, and which tokens have a loss."""

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
    """The tokens of one example."""

    ids: np.ndarray  # int32[n]
    loss_mask: np.ndarray  # bool[n], whether the prediction of this token has a loss


class TextTokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, with the configs beside it.

    Special tokens come from `tokenizer_config.json` and `special_tokens_map.json`, else from
    the ids in `generation_config.json` and `config.json`; the chat template comes from
    `chat_template.jinja` or `tokenizer_config.json`. All files but `tokenizer.json` are optional.

    Args:
      folder: The folder of the model.
    Raises:
      UserError: where a file is missing or cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tokenizer = _load(self.folder / "tokenizer.json")
        # `tokenizer.json` may ask for truncation and padding. `Examples` does both, and reports it.
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
        self._logged: set[str] = set()

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
        """Where generation is to stop: the end tokens of the folder, and the tokens that have ended
        the assistant's turns in what was encoded so far."""
        return sorted(self._ends | self._turn_ends)

    @property
    def chat(self) -> ChatTemplate:
        """The folder's chat template."""
        if self._chat is None:
            file = self.folder / "chat_template.jinja"
            source = file.read_text() if file.exists() else self._config.get("chat_template")
            if isinstance(source, list):  # several templates by name
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

    def encode(self, text: str, target_spans: Spans | None = None) -> Tokens:
        """The tokens of a document, between the folder's begin token, if any, and an end token.

        Args:
          text: The document.
          target_spans: Ranges (begin, end) of characters that have a loss, in order. A token that
            overlaps a range is in it. The end token has a loss, too. `None`: all of the text.
        """
        encoding = self.tokenizer.encode(text)
        ids = list(encoding.ids)
        mask = _loss_mask(encoding.offsets, target_spans)
        begin = self._config.get("add_bos_token") and self.bos_id is not None
        if begin and (not ids or ids[0] != self.bos_id):
            ids, mask = [self.bos_id, *ids], [target_spans is None, *mask]
        if self.eos_id is not None:
            if ids[-1:] == [self.eos_id]:
                mask[-1] = True
            else:
                ids, mask = [*ids, self.eos_id], [*mask, True]
        elif target_spans is not None:
            self._log_once(
                f"{self.folder} has no eos_token: completions end without an end token, and the "
                f"model will not learn to stop. Set one in tokenizer_config.json."
            )
        return Tokens(np.array(ids, np.int32), np.array(mask, bool))

    def encode_chat(self, messages: list[dict[str, Any]], tools: Any = None) -> Tokens:
        """The tokens of a conversation, as the chat template writes it.

        The assistant's turns and the tokens that end them have a loss. The one thing that is added
        is the end of the last turn, where the template writes none.

        Args:
          messages: Each with `role` and `content`.
          tools: Passed to the template.
        Raises:
          TemplateError: where the template refuses the conversation, or the turns of the assistant
            cannot be found in what it writes.
        """
        text, spans = self.chat.render(messages, tools)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        mask = _loss_mask(encoding.offsets, spans)
        self._check_end([i for i, target in zip(encoding.ids, mask, strict=True) if target])
        return Tokens(np.array(encoding.ids, np.int32), np.array(mask, bool))

    def _check_end(self, targets):
        """Warns where turns end with a token at which generation would not stop."""
        # Blanks may follow the end of a turn, as in ChatML.
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=False)
        end = next((i for i in reversed(targets) if decode([i]).strip()), None)
        if end is not None and self._ends and end not in self._ends:
            self._turn_ends.add(end)
            self._log_once(
                f"assistant turns end with {decode([end])!r} (id {end}), which is not one of the "
                f"end tokens {sorted(self._ends)} of {self.folder}. Let generation stop there, "
                f"too: generator(..., eos_token_ids=tokenizer.stop_ids)."
            )

    def _log_once(self, message):
        if message not in self._logged:
            self._logged.add(message)
            _log.warning("%s", message)


def _loss_mask(offsets, target_spans):
    """Whether each token overlaps one of the ranges of characters, which are in order."""
    if target_spans is None:
        return [True] * len(offsets)
    return [any(_overlaps(offset, span) for span in target_spans) for offset in offsets]


def _overlaps(offset, span):
    (start, stop), (begin, end) = offset, span
    if start == stop:
        # Byte-level tokenizers trim blanks off the left of an offset, so that the range of a token
        # of blanks is empty: its text is before `stop`. Tokens that are not in the text have
        # (0, 0).
        return begin < stop <= end
    return start < end and begin < stop


def _load(file):
    tokenizers = need("tokenizers", "train", "reading text")
    if not file.exists():
        raise UserError(
            f"there is no {file}. Give the folder of a model with its tokenizer. A model that was "
            f"saved with tokenizer_from=... has one."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"{file} cannot be read as a tokenizer: {error}.") from error


def _json(file):
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def _content(token):
    """The text of a token: a JSON string, or the `content` of an object with its options."""
    return token.get("content") if isinstance(token, dict) else token
