"""Conversations reach a model's chat template in the form that it takes, for templates of many families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchgen.engine import EngineError
from batchgen.models.message_content import ChatTemplate, loops_over_content
from batchgen.models.tokenizer import HfTokenizer
from tests.conversations import EITHER, PARTS_ALONE, TEMPLATES, TOOL, families, family, joined, parts, save, split
from tests.fuzz.conversations import case

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a turn": [{"role": "user", "content": "Hello"}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " Hello "}],
    "turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>x</think>Hi"},
        {"role": "user", "content": "Bye"},
    ],
    "no user": [{"role": "assistant", "content": "Hi"}],
    "two users": [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}],
    "call": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "No.", "tool_call_id": "abcdefghi", "name": "weather"},
    ],
    "call without content": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"rain": false}', "tool_call_id": "abcdefghi", "name": "weather"},
    ],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}],
    "odd role": [{"role": "critic", "content": "Boo"}, {"role": "user", "content": "Hello"}],
}


def chat(folder: Path, name: str, messages: Sequence[dict[str, Any]], **kwargs: Any) -> str | None:
    try:
        return family(name, folder).tokenizer.chat(messages, **kwargs)
    except ValueError:
        return None


@pytest.mark.parametrize("name", families())
def test_texts_are_rendered_as_transformers_renders_them(tmp_path: Path, name: str) -> None:
    variables: list[dict[str, Any]] = [{}, {"tools": [TOOL]}, {"enable_thinking": False}]
    for messages in CONVERSATIONS.values():
        as_read = split(messages) if name in PARTS_ALONE else messages
        for kwargs in variables:
            own = family(name, tmp_path).rendered(as_read, **kwargs)
            said = [word for word in ("Boo", "No.", "rain") if any(word in str(one["content"]) for one in messages)]
            is_left_out = own is not None and any(word not in own for word in said)
            # Of a role that the template does not know.
            assert chat(tmp_path, name, messages, **kwargs) == (None if is_left_out else own)


@pytest.mark.parametrize("name", families())
def test_parts_are_joined_as_transformers_joins_them_or_else_by_line_breaks(tmp_path: Path, name: str) -> None:
    """Only where a template reads no parts does a line break stand between them, as vLLM has it."""
    messages = [
        {"role": "user", "content": parts("First part. ", "Second part.")},
        {"role": "assistant", "content": parts("Hi")},
        {"role": "user", "content": parts(" Three", "four", "")},
    ]
    as_read = messages if name in (*PARTS_ALONE, *EITHER) else joined(messages)
    assert chat(tmp_path, name, messages) == family(name, tmp_path).rendered(as_read)


@pytest.mark.parametrize("name", families())
def test_no_part_of_a_system_message_is_lost(tmp_path: Path, name: str) -> None:
    """Some templates read parts of a user's message, but of a system message only a text, or its first part."""
    text = chat(
        tmp_path, name, [{"role": "system", "content": parts("One.", "Two.")}, {"role": "user", "content": "Hi"}]
    )
    if text is None:
        assert name == "gemma-2"  # which knows no system
        return
    assert "One." in text
    assert "Two." in text
    assert "'text'" not in text


@pytest.mark.parametrize("name", families())
def test_a_developer_is_a_system_where_the_template_knows_only_that(tmp_path: Path, name: str) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    as_read = split(messages) if name in PARTS_ALONE else messages
    text, own = chat(tmp_path, name, messages), family(name, tmp_path).rendered(as_read)
    if own is not None and "Be brief." in own:
        assert text == own
    else:
        assert text == family(name, tmp_path).rendered([{**messages[0], "role": "system"}, messages[1]])
        assert (text is None) == (name == "gemma-2")  # which knows neither


def test_a_developer_beside_a_system_is_not_made_a_second_one(tmp_path: Path) -> None:
    """A template may keep the last system message alone."""
    messages = [{"role": role, "content": "Hi"} for role in ("system", "developer", "user")]
    with pytest.raises(ValueError, match="does not know the role developer, and there is another message"):
        family("deepseek-r1", tmp_path).tokenizer.chat(messages)
    assert chat(tmp_path, "chatml", messages) == family("chatml", tmp_path).rendered(messages)


def test_a_family_that_reads_parts_has_a_loop_over_them() -> None:
    looping = {name for name in families() if loops_over_content((TEMPLATES / f"{name}.jinja").read_text())}
    assert looping == {*PARTS_ALONE, *EITHER}


@pytest.mark.parametrize(
    ("source", "loops"),
    [
        ("{% for m in messages %}{% for p in m['content'] %}{{ p }}{% endfor %}{% endfor %}", True),
        ("{% set c = messages[0].content %}{% set d = c %}{% for p in d %}{{ p }}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m.content | selectattr('type') %}{{ p }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m.content[1:] %}{{ p }}{% endfor %}{% endfor %}", True),
        ("{% macro f(content) %}{% for p in content %}{{ p }}{% endfor %}{% endmacro %}", True),
        ("{% generation %}{% for p in m.content %}{% continue %}{% endfor %}{% endgeneration %}", True),
        ("{% for m in messages %}{% for p in m.content.split('x') %}{{ p }}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}{% for t in m.tool_calls %}{{ t }}{% endfor %}{% endfor %}", False),
        ("{% for", False),
    ],
)  # fmt: skip
def test_loops_over_the_content_are_found_in_the_syntax(source: str, loops: bool) -> None:
    assert loops_over_content(source) is loops


def test_where_no_conversation_can_be_tried_out_the_syntax_decides() -> None:
    def refuse(messages: object, tools: object) -> str:
        raise ValueError("there is no pleasing it")

    message = {"role": "user", "content": parts("a", "b")}
    looping = ChatTemplate("{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}", refuse)
    assert looping.fit([message], with_tools=False) == [message]
    flat = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", refuse)
    assert flat.fit([message], with_tools=False) == [{"role": "user", "content": "a\nb"}]


def test_a_template_that_reads_the_first_part_alone_gets_all_of_them_as_one(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(str(save(tmp_path, "{{ messages[0].content[0].text }}")))
    assert tokenizer.chat([{"role": "user", "content": parts("One.", "Two.")}]) == "One.\nTwo."
    assert tokenizer.chat([{"role": "user", "content": "One."}]) == "One."


NAMED = [{"name": "default", "template": "plain {{ messages[0].content }}"},
         {"name": "tool_use", "template": "tools {{ messages[0].content }}"}]  # fmt: skip
HELLO = [{"role": "user", "content": "Hello"}]


def test_of_several_templates_the_default_is_taken_and_with_tools_that_for_tools(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(str(save(tmp_path, NAMED)))
    assert tokenizer.chat(HELLO) == "plain Hello"
    assert tokenizer.chat(HELLO, tools=[TOOL]) == "tools Hello"


def test_several_templates_without_a_default_are_named(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(str(save(tmp_path, NAMED[1:])))
    with pytest.raises(ValueError, match="has chat templates named tool_use, and none named default"):
        tokenizer.chat(HELLO)


@pytest.mark.parametrize("given", ["plain {{ messages[0].content }}", NAMED, {"default": NAMED[0]["template"]}])
def test_a_template_may_stand_in_a_file_of_a_processor(tmp_path: Path, given: object) -> None:
    save(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": given}))
    assert HfTokenizer(str(tmp_path)).chat(HELLO) == "plain Hello"


def test_the_tokenizers_own_template_comes_before_that_of_a_processor(tmp_path: Path) -> None:
    save(tmp_path, "own {{ messages[0].content }}")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "other {{ messages[0].content }}"}))
    assert HfTokenizer(str(tmp_path)).chat(HELLO) == "own Hello"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"chat_template": 7}', '{"chat_template": []}', "\x00"])
def test_a_damaged_file_of_a_template_is_one_sentence(tmp_path: Path, content: str) -> None:
    save(tmp_path)
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(EngineError, match=r"chat_template\.json"):
        HfTokenizer(str(tmp_path))


@pytest.mark.parametrize("given", [7, [], ["x"], [{"name": "default"}], {"default": 7}, [{"template": "x"}]])
def test_a_tokenizers_template_that_is_none_is_one_sentence(tmp_path: Path, given: object) -> None:
    with pytest.raises(EngineError, match=r"tokenizer_config\.json: chat_template must be a Jinja template"):
        HfTokenizer(str(save(tmp_path, given)))


def test_a_byte_order_mark_before_the_template_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    folder = save(tmp_path)
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8-sig")
    assert HfTokenizer(str(folder)).chat([{"role": "user", "content": "Hello"}]) == "Hello"


@pytest.mark.parametrize(
    ("name", "messages", "place"),
    [
        ("qwen2.5", [{"role": "human", "content": "odd words"}], 1),
        ("phi-3", [{"role": "User", "content": "in capitals"}], 1),
        ("olmo", [{"role": "user", "content": "a"}, {"role": "function", "content": "a"}], 2),
        ("zephyr", [{"role": "user", "content": "Rain?"}, {"role": "tool", "content": "No"}], 2),
        ("gemma-3", [{"role": "system", "content": "on its own"}], 1),
        ("gpt-oss", [{"role": "user", "content": "one"}, {"role": "system", "content": "late"}], 2),
        ("deepseek-r1", [{"role": "human", "content": parts("odd", "words")}, {"role": "user", "content": "odd"}], 1),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(
    tmp_path: Path, name: str, messages: list[dict[str, Any]], place: int
) -> None:
    role = messages[place - 1]["role"]
    with pytest.raises(
        ValueError, match=rf'leaves out what message {place} of {len(messages)} says, whose role is "{role}"\.'
    ):
        family(name, tmp_path).tokenizer.chat(messages)


def test_what_an_assistant_has_said_may_be_left_out_as_the_template_likes(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>quietly</think>Hi"},
        {"role": "user", "content": "Bye"},
    ]
    assert "quietly" not in family("qwen3", tmp_path).tokenizer.chat(messages)


def test_words_that_a_template_writes_in_another_way_are_not_missed(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content | replace('ü', 'ue') }}{% endfor %}"
    tokenizer = HfTokenizer(str(save(tmp_path, template)))
    assert tokenizer.chat([{"role": "user", "content": "grün"}]) == "gruen"


def test_random_conversations_lose_no_word(tmp_path: Path) -> None:
    """A few seeds of the fuzzer, which runs thousands."""
    outcomes = {case(seed, tmp_path) for seed in range(1000)}
    assert outcomes >= {"good", "faulty", "refused"}
