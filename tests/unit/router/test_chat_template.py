from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from baton.protocol.errors import ConfigError, InvalidRequest
from router import chat_template
from router.chat_template import ChatMessage, ChatTemplate
from router.tokenizer import SpecialTokens

BATON_TINY = Path(__file__).parents[3] / "deploy/models/baton-tiny"
TALK = [
    ChatMessage("system", "You write\nPython."),
    ChatMessage("user", "sort a list"),
    ChatMessage("assistant", "def sort(x):\n    return sorted(x)"),
    ChatMessage("user", "now reversed"),
]


def test_baton_tiny_sees_comments_and_code():
    text = ChatTemplate.load(BATON_TINY).render(TALK)
    assert text == (
        "<|begin|># You write\n# Python.\n# sort a list\n"
        "def sort(x):\n    return sorted(x)\n\n# now reversed\n"
    )


def test_it_renders_as_transformers_does():
    talk = [{"role": m.role, "content": m.content} for m in TALK]
    theirs = AutoTokenizer.from_pretrained(BATON_TINY).apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate.load(BATON_TINY).render(TALK) == theirs


def test_a_template_can_refuse_messages():
    with pytest.raises(InvalidRequest, match="role tool is not one of") as caught:
        ChatTemplate.load(BATON_TINY).render([ChatMessage("tool", "x")])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "found",
    [
        "{{ messages[0].content }}",
        [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tool_use"}],
        [{"name": "only", "template": "{{ messages[0].content }}"}],
    ],
)
def test_templates_in_the_tokenizer_config(tmp_path, found):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    assert ChatTemplate.load(tmp_path).render([ChatMessage("user", "hi")]) == "hi"


def test_the_template_file_wins(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    template = ChatTemplate.load(tmp_path)
    assert template.render([]) == "file "
    assert ChatTemplate("{{ eos_token }}", SpecialTokens("<s>", "</s>")).render([]) == "</s>"


def test_no_template_is_the_requests_problem_and_says_the_way_out(tmp_path):
    with pytest.raises(InvalidRequest, match=r"no chat template.*plain prompt"):
        ChatTemplate.load(tmp_path).render(TALK)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", "{% for %}", "broken at line 1"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.jinja", "x" * (chat_template.MAX_TEMPLATE_BYTES + 1), "allowed: 262144"),
        ("tokenizer_config.json", '{"chat_template": 3}', "neither a string nor a list"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]}',
            "one called default",
        ),
    ],
)
def test_broken_templates_are_found_at_load(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(1000) %}{% for j in range(1000) %}{% for k in range(9) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 10 ** 100000000 }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_run_in_a_sandbox_with_a_budget(source):
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render([ChatMessage("user", "x" * 10_000)])


def test_what_templates_of_known_models_use():
    source = (
        "{%- set ns = namespace(seen=false) -%}"
        "{%- for m in messages if m['role'] != 'skip' -%}"
        "{%- if loop.first -%}{{ m['content'] | trim | tojson }}"
        "{%- else -%}{%- break -%}{%- endif -%}"
        "{%- set ns.seen = true -%}{%- endfor -%}"
        "{{ loop is defined }}{{ 3 * 2 }}{{ ns.seen }}{{ tools is none }}"
        "{% for i in range(2) %}{{ i }}{% endfor %}"
    )
    talk = [ChatMessage("user", ' é"<b> '), ChatMessage("user", "second")]
    assert ChatTemplate(source).render(talk) == '"é\\"<b>"False6TrueTrue01'
