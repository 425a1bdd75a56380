import sys

import pytest

pytest.importorskip("jinja2")

from jaxpeft.data._chat import ChatTemplate  # noqa: E402
from jaxpeft.train import UserError  # noqa: E402

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

# A turn ends where the marker of the next role begins: as GLM 4 has it.
NEXT_ROLE = """\
[gMASK]<sop>
{%- for item in messages %}
    {%- if item['tool_calls'] is defined %}
        {{- '<|' + item['role'] + '|>' + item['tool_calls'][0]['name'] + '\\n{}' }}
    {%- else %}
        {{- '<|' + item['role'] + '|>\\n' + item['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Headers between special tokens, and nothing at the end of a turn.
HEADERS = LLAMA_3.replace(" + '<|eot_id|>'", "")

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

VICUNA = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}
    {%- else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""

ALPACA = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- else %}
        {{- '### Response:\\n' + message['content'] + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}
"""

# The end token behind the last turn alone, another between: as gpt-oss has it.
TWO_ENDS = """\
{%- for message in messages %}
    {{- '<|start|>' + message.role + '<|message|>' + message.content }}
    {{- '<|return|>' if loop.last and message.role == 'assistant' else '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}
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


TOKENS = ("<|user|>", "<|assistant|>", "<|observation|>", "<|start_header_id|>", "</s>")


@pytest.mark.parametrize(
    ("source", "ends"),
    [
        (CHATML, ("<|im_end|>\n", "<|im_end|>\n")),
        (LLAMA_3, ("<|eot_id|>", "<|eot_id|>")),
        (GEMMA, ("<end_of_turn>\n", "<end_of_turn>\n")),
        (VICUNA, ("</s>", "</s>")),
        (ALTERNATING, (" </s>", " </s>")),
        (TWO_ENDS, ("<|end|>", "<|return|>")),
        (NEXT_ROLE, ("<|user|>", "<|user|>")),
        (HEADERS, ("<|start_header_id|>", "<|start_header_id|>")),
        (ALPACA, ("\n\n### Instruction:", "\n\n</s>")),
    ],
    ids="ChatML Llama-3 Gemma Vicuna Mistral gpt-oss GLM-4 headers Alpaca".split(),
)
def test_every_turn_is_counted_to_its_end_whatever_ends_it(source, ends):
    template = ChatTemplate(source, SPECIAL, TOKENS)
    text, spans = template.render(TALK)
    turns = [text[begin:end] for begin, end in spans]
    assert [turn.lstrip() for turn in turns] == ["Hello!" + ends[0], "Because." + ends[1]]
    assert spans[-1][1] == len(text)
    # What is counted in a shorter conversation is what is counted in its begin.
    first, spans = template.render(TALK[:2])
    begin, end = spans[0]
    assert first[begin:end].lstrip() == "Hello!" + ends[1] and len(spans) == 1
    # Nothing is added where the user has the last word.
    unanswered = template.render(TALK[:3])[0]
    assert unanswered == template._text(TALK[:3], None)


def test_a_turn_that_calls_a_tool_ends_with_the_marker_of_the_tools_role():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look_up"}]}
    talk = [TALK[0], call, {"role": "observation", "content": "4"}, TALK[1]]
    text, spans = ChatTemplate(NEXT_ROLE, SPECIAL, TOKENS).render(talk)
    turns = [text[begin:end] for begin, end in spans]
    assert turns == ["look_up\n{}<|observation|>", "\nHello!<|user|>"]
    text, spans = ChatTemplate(NEXT_ROLE, SPECIAL, TOKENS).render(talk[:2])
    assert text.endswith("look_up\n{}<|user|>") and spans[0][1] == len(text)


def test_a_marker_that_is_text_is_said_and_the_end_token_ends_the_last_turn(caplog):
    template = ChatTemplate(ALPACA, SPECIAL, TOKENS)
    for _ in range(2):
        template.render(TALK)
    (record,) = caplog.records
    assert "the next one's '### Instruction:', which is no token" in record.message
    assert "ends with '</s>'. Stop generation at both." in record.message
    text, spans = ChatTemplate(ALPACA, {}).render(TALK)  # no end token at all
    assert text[slice(*spans[-1])] == "Because.\n\n### Instruction:"


def test_a_turn_without_any_end_is_an_error_with_the_way_out():
    alone = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + (
        NEXT_ROLE
    )
    with pytest.raises(UserError, match="no eos_token, .* name it in tokenizer_config.json"):
        ChatTemplate(alone, {"bos_token": "<s>"}, TOKENS).render(TALK[:2])
    text, spans = ChatTemplate(alone, SPECIAL, TOKENS).render(TALK[:2])
    assert text[slice(*spans[0])] == "\nHello!</s>"
    reworded = NEXT_ROLE.replace("item['content'] }}", "item['content'] | replace('\x00', '') }}")
    with pytest.raises(UserError, match=r"nothing behind messages\[1\] that ends the turn"):
        ChatTemplate(reworded, SPECIAL, TOKENS).render(TALK)


def test_a_generation_block_that_ends_before_the_end_token_is_said(caplog):
    source = MARKED.replace("message.content + eos_token }}", "message.content }}").replace(
        "{%- endgeneration %}", "{%- endgeneration %}{{ eos_token }}"
    )
    assert said(MARKED)[1][0] == "Hello!</s>" and not caplog.records
    assert said(source)[1] == ["Hello!", "Because."]
    assert "ends before a token that ends the turn" in caplog.text


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
