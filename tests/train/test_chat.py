import sys

import pytest

pytest.importorskip("jinja2")

from jaxpeft.train import UserError  # noqa: E402
from jaxpeft.train.chat import ChatTemplate  # noqa: E402

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {{- message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MARKED = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message.content + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content }}
    {%- endif %}
{%- endfor %}
"""

# Thoughts stand in the last turn only, and roles must alternate in some: as Qwen 3 has it.
THINKING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

ALTERNATING = """\
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def said(source, messages=TALK, **options):
    text, spans = ChatTemplate(source, SPECIAL).render(messages, **options)
    return text, [text[begin:end] for begin, end in spans]


def test_assistant_turns_are_found_by_their_prefixes_with_the_token_that_ends_them():
    text, turns = said(CHATML)
    assert text.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!")
    assert turns == ["Hello!<|im_end|>\n", "Because.<|im_end|>\n"]


def test_generation_blocks_are_the_assistants_turns_where_the_template_has_them():
    text, turns = said(MARKED)
    assert text == ("<s><|user|>Hi<|assistant|>Hello!</s><|user|>Why?<|assistant|>Because.</s>")
    assert turns == ["Hello!</s>", "Because.</s>"]


def test_the_word_generation_in_a_template_is_no_block():
    source = "{# generation #}{% if add_generation_prompt %}A:{% endif %}" + CHATML
    assert said(source.replace("A:", ""))[1] == ["Hello!<|im_end|>\n", "Because.<|im_end|>\n"]


def test_a_turn_that_is_written_otherwise_when_it_is_last_is_found_all_the_same():
    text, turns = said(THINKING)
    assert text.count("<think>") == 1
    assert turns == ["Hello!<|im_end|>\n", "<think></think>Because.<|im_end|>\n"]


def test_a_template_that_refuses_other_orders_works_on_those_it_takes():
    assert said(ALTERNATING)[1] == [" Hello! </s>", " Because. </s>"]
    with pytest.raises(UserError, match="refuses the conversation: roles must alternate"):
        said(ALTERNATING, TALK[1:])


def test_a_turn_whose_place_is_unknown_is_an_error_with_the_way_out():
    source = "{{ messages | length }}" + CHATML
    with pytest.raises(UserError, match=r"messages\[1\] differently .*\{% generation %\}"):
        said(source)


def test_the_dialect_of_chat_templates():
    source = """\
{%- set state = namespace(n=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% continue %}{% endif %}
    {%- set state.n = state.n + 1 %}
{%- endfor %}
{{- state.n }} {{ {'a': '<é>'} | tojson }} {{ strftime_now('%d %b %Y') }} {{ tools[0].name -}}
"""
    template = ChatTemplate("{% generation %}" + source + "{% endgeneration %}", SPECIAL)
    text, _ = template.render(TALK, [{"name": "look_up"}])
    assert text == '2 {"a": "<é>"} 26 Jul 2024 look_up'


def test_lines_of_statements_leave_no_blanks():
    source = """\
{% for m in messages %}
    {% if m.role %}
{{ m.content }}
    {% endif %}
{% endfor %}"""
    assert ChatTemplate(source, {}).render(TALK[:1])[0] == "Hi\n"


def test_a_template_runs_in_a_sandbox():
    with pytest.raises(UserError, match="refuses the conversation: .*unsafe"):
        said("{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="refuses the conversation"):
        said("{{ messages.append(1) }}")


def test_a_template_that_is_not_valid_is_named_with_its_line():
    with pytest.raises(UserError, match="not valid: .*'endfor'.*, at its line 2"):
        ChatTemplate("{% for m in messages %}\n{% endif %}", {})


def test_without_jinja_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"jinja2: pip install 'jaxpeft\[train\]'"):
        ChatTemplate("", {})
