"""Conversations through a model folder's chat template, and which characters the model said.

The template is a Jinja program that came with the model. It runs in a sandbox, with the
names and the dialect that such templates are written for.
"""

import datetime
import json
import logging
from collections.abc import Collection
from typing import Any

from jaxpeft._errors import UserError, need

_log = logging.getLogger("jaxpeft")

Spans = list[tuple[int, int]]

# In the place of a message, to see what the template writes around it.
_SAID = "\x00said\x00"
# Around what `{% generation %}` encloses. Taken out again after rendering.
_BEGIN, _END = "\x00<generation\x00", "\x00generation>\x00"


class TemplateError(UserError):
    """A conversation that the chat template cannot render or the loss cannot be placed in."""


class ChatTemplate:
    """A compiled chat template.

    Args:
      source: Jinja text.
      special: What templates may call by name: `bos_token`, `eos_token`, ...
      tokens: The texts that the tokenizer reads as one token each, wherever they stand.
    """

    def __init__(self, source: str, special: dict[str, str], tokens: Collection[str] = ()):
        jinja2 = _jinja()
        try:
            self._template = _environment(jinja2).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid: {error.message}, at its line {error.lineno}."
            ) from error
        self._special = special
        self._tokens = sorted({*tokens, *special.values()} - {""}, key=len, reverse=True)
        self._told: set[str] = set()
        self._marks = "generation" in source and any(
            words[:1] == ["generation"] for words in _statements(jinja2, source)
        )

    def render(self, messages: list[dict[str, Any]], tools: Any = None) -> tuple[str, Spans]:
        """The conversation as text, and the characters that the assistant is to learn.

        These are what `{% generation %}` encloses, where the template has it. Else each
        assistant turn is found by rendering the conversation up to it: from after the
        generation prompt to the end of the turn, what ends it included. Where the template
        writes nothing there, it is the marker of the next role that ends a turn (`<|user|>` of
        GLM), and counts; behind the last turn it is added, or the end token where the marker is
        no token of its own.
        """
        if self._marks:
            return self._marked(messages, tools)
        text, spans = self._text(messages, tools), []
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn in turns:
            begin, end = self._turn(messages, tools, text, turn)
            if not self._closing(messages, tools, turn, text[begin:end]).strip():
                if turn + 1 < len(messages):
                    end = self._marker_end(messages, tools, text, turn, end)
                else:
                    text += self._end(messages, tools, text)
                    end = len(text)
            spans.append((begin, end))
        return text, spans

    def _marked(self, messages, tools):
        text, spans = _unmark(self._text(messages, tools))
        for begin, end in spans[-1:]:
            if self._tokens and not text[begin:end].rstrip().endswith(tuple(self._tokens)):
                self._tell(
                    "the chat template's {% generation %} ends before a token that ends the turn: "
                    "the loss counts none, and the model will not learn to stop. Move "
                    "{% endgeneration %} behind it."
                )
        return text, spans

    def _closing(self, messages, tools, turn, said):
        """What the template writes behind what the assistant says, in its turn."""
        content = messages[turn].get("content")
        content = content.strip() if isinstance(content, str) else ""
        if content and not messages[turn].get("tool_calls") and content in said:
            return said[said.rindex(content) + len(content) :]
        plain = {"role": "assistant", "content": _SAID}
        # A call of a tool may be written in any way; it ends as a turn of text does.
        try:
            return self._text([*messages[:turn], plain], tools).rpartition(_SAID)[2]
        except TemplateError:
            return said

    def _marker_end(self, messages, tools, text, turn, end):
        """Where the marker of the role after a turn ends in the text."""
        after = {**messages[turn + 1], "content": _SAID}
        marker = None
        try:
            marker = self._marker([*messages[: turn + 1], after], tools, text[:end])
        except TemplateError:
            pass
        if not marker or not text.startswith(marker, end):
            raise TemplateError(
                f"the chat template writes nothing behind messages[{turn}] that ends the turn, "
                f"and what begins the next one is not known. Let it write an end token, or mark "
                f"the assistant's turns with {{% generation %}} ... {{% endgeneration %}}."
            )
        return end + len(marker)

    def _end(self, messages, tools, text):
        """What ends the last turn of a conversation: the next role's marker, or the end token."""
        marker = None
        try:
            user = {"role": "user", "content": _SAID}
            marker = self._marker([*messages, user], tools, text)
        except TemplateError:  # some allow no further message
            pass
        end_token = self._special.get("eos_token")
        if marker and marker.strip() in self._tokens:
            return marker
        if not (marker or end_token):
            raise TemplateError(
                "the chat template writes nothing that ends the assistant's turn, and the folder "
                "has no eos_token, so the model could not learn to stop. Let the template write "
                "one, or name it in tokenizer_config.json."
            )
        if marker:
            self._tell(
                f"turns of this chat template end with the next one's {marker!r}, which is no "
                f"token of its own; the last turn of a conversation ends with "
                f"{end_token or marker!r}. Stop generation at both."
            )
        return end_token or marker

    def _marker(self, messages, tools, before):
        """What stands between a text and the last message, up to its first token if it has one."""
        text = self._text(messages, tools)
        if not text.startswith(before) or _SAID not in text:
            return None
        between = text[len(before) :].partition(_SAID)[0].rstrip()
        blank = between[: len(between) - len(between.lstrip())]
        for token in self._tokens:
            if between.startswith(token, len(blank)):
                return blank + token
        return between or None

    def _tell(self, message):
        if message not in self._told:
            self._told.add(message)
            _log.warning("%s", message)

    def _turn(self, messages, tools, text, turn):
        before = self._text(messages[:turn], tools, add_generation_prompt=True)
        through = self._text(messages[: turn + 1], tools)
        if text.startswith(before):
            if text.startswith(through):
                return len(before), len(through)
            if turn + 1 < len(messages):
                # The turn is written otherwise when it is the last (Qwen 3 shows the thoughts
                # of the last one only). Then it ends where the message after it begins.
                without = self._text(messages[:turn], tools)
                follow = self._text([*messages[:turn], messages[turn + 1]], tools)
                onward = self._text(messages[: turn + 2], tools)
                added = follow.removeprefix(without)
                if follow.startswith(without) and onward.endswith(added):
                    if text.startswith(onward):
                        return len(before), len(onward) - len(added)
        raise TemplateError(
            f"the chat template writes messages[{turn}] differently when more follows, so its "
            f"place in the text is not known. Mark the assistant's turns in the template with "
            f"{{% generation %}} ... {{% endgeneration %}}."
        )

    def _text(self, messages, tools, add_generation_prompt=False):
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except Exception as error:  # a template may fail in any way
            reason = str(error) or type(error).__name__
            raise TemplateError(f"the chat template refuses the conversation: {reason}.") from error


def _unmark(marked):
    """Text without the marks, and where they stood."""
    text, *parts = marked.split(_BEGIN)
    spans = []
    for part in parts:
        said, _, rest = part.partition(_END)
        spans.append((len(text), len(text) + len(said)))
        text += said + rest
    return text, spans


def _statements(jinja2, source):
    """The words of each `{% statement %}`."""
    words: list[str] = []
    for _, kind, value in _environment(jinja2).lex(source):
        if kind == "block_begin":
            words = []
        elif kind == "block_end":
            yield words
        elif kind == "name":
            words.append(value)


def _environment(jinja2):
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` around what the assistant says."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller):
            return f"{_BEGIN}{caller()}{_END}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    # Templates put the day into their system prompt. A fixed one, the default of Llama 3, so
    # that a run resumed tomorrow reads the same data as today.
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    return environment


def _tojson(value, ensure_ascii=False, **options):
    # Jinja's own escapes characters of HTML, which a language model should see as they are.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message):
    raise ValueError(message)


def _jinja():
    for module in ("jinja2.ext", "jinja2.nodes", "jinja2.sandbox"):
        need(module, "train", "a chat template")
    return need("jinja2", "train", "a chat template")
