"""Rows become prompts or error rows, whatever they hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.requests.row_ids import row_id
from batchgen.types import FIT, Generation, Prompt, RowError, SamplingParams
from tests.byte_tokenizer import BOS, ByteTokenizer, request, rows


def read(
    value: Mapping[str, object] | RowError, recipe: Recipe | None = None, tokenizer: ByteTokenizer | None = None
) -> Prompt | Generation:
    [result] = PromptReader(recipe or Recipe(), tokenizer or ByteTokenizer(), {}).read(rows(value))
    return result


def prompt(value: Mapping[str, object], recipe: Recipe | None = None, tokenizer: ByteTokenizer | None = None) -> Prompt:
    result = read(value, recipe, tokenizer)
    assert isinstance(result, Prompt), result
    return result


def error(
    value: Mapping[str, object] | RowError, recipe: Recipe | None = None, tokenizer: ByteTokenizer | None = None
) -> RowError:
    result = read(value, recipe, tokenizer)
    assert isinstance(result, Generation), result
    assert result.error is not None
    assert (result.index, result.text, result.finish_reason, result.error.line) == (0, None, None, 3)
    return result.error


HELLO = [{"role": "user", "content": "Hello"}]


def test_plain_row_keeps_its_text_and_columns() -> None:
    result = prompt({"id": "a", "prompt": " Hi \n", "topic": {"x": [1]}})
    assert (result.id, result.text, result.line, result.index) == ("a", " Hi \n", 3, 0)
    assert result.columns == {"id": "a", "prompt": " Hi \n", "topic": {"x": [1]}}
    assert list(result.tokens) == [BOS, *b" Hi \n"]
    assert result.request is None


def test_row_without_id_is_named_after_its_place() -> None:
    assert prompt({"prompt": "x"}).id == "prompts.jsonl:3"
    assert prompt({"id": None, "prompt": "x"}).id == "prompts.jsonl:3"


def test_number_as_id_is_its_decimal_text() -> None:
    assert prompt({"id": 7, "prompt": "x"}).id == "7"


def test_custom_id_of_a_plain_row_is_its_id_and_stays_a_column() -> None:
    result = prompt({"custom_id": "c", "prompt": "x"})
    assert (result.id, result.columns) == ("c", {"custom_id": "c", "prompt": "x"})


@pytest.mark.parametrize("bad", [True, 1.5, "", [], {}])
def test_id_of_another_type_is_an_error(bad: object) -> None:
    failed = error({"id": bad, "prompt": "x"})
    assert failed.type == "wrong_type"
    assert failed.message.startswith("line 3 of prompts.jsonl: id must be a text")


def test_ids_of_prompts_equal_those_of_the_duplicate_search() -> None:
    ids: list[dict[str, object]] = [{"id": "a"}, {"id": 1}, {}, {"custom_id": "c"}, {"id": 1.5}, {"id": ""}]
    window = rows(*[{"prompt": "x", **own} for own in ids], request({"messages": HELLO}, id="other"))
    results = PromptReader(Recipe(), ByteTokenizer(), {}).read(window)
    assert [result.id for result in results] == [row_id(row) for row in window]


def test_row_that_could_not_be_read_keeps_its_error() -> None:
    given_error = RowError("malformed_json", "line 3 of prompts.jsonl is no JSON", 3)
    assert error(given_error) is given_error


def test_missing_prompt_names_the_columns_there_are() -> None:
    assert error({"a": 1, "b": 2}) == RowError(
        "missing_prompt",
        'line 3 of prompts.jsonl: there is no column "prompt" or "messages"; its columns are a, b. '
        "Give it one of them, or use --prompt-column or --template",
        3,
    )
    assert "its columns are none" in error({}).message
    assert 'the "prompt" column is null' in error({"prompt": None}).message
    named = error({"a": 1}, Recipe(prompt_column="b")).message
    assert named.endswith('there is no "b" column; its columns are a. Use --prompt-column or --template')


def test_prompt_of_another_type_is_an_error() -> None:
    failed = error({"prompt": ["x"]})
    assert (failed.type, failed.message) == (
        "wrong_type",
        'line 3 of prompts.jsonl: the "prompt" column must hold a text, not a list',
    )


def test_half_a_surrogate_pair_fails_its_own_row_only() -> None:
    results = PromptReader(Recipe(), ByteTokenizer(), {}).read(rows({"prompt": "\ud800"}, {"prompt": "ü"}))
    assert isinstance(results[0], Generation)
    assert results[0].error is not None
    assert results[0].error.type == "wrong_type"
    assert isinstance(results[1], Prompt)


def test_empty_prompt_needs_a_beginning_of_sequence() -> None:
    assert list(prompt({"prompt": ""}).tokens) == [BOS]
    assert error({"prompt": ""}, tokenizer=ByteTokenizer(bos=False)).type == "empty_prompt"


def test_prompt_column() -> None:
    recipe = Recipe(prompt_column="question")
    assert prompt({"question": "q", "messages": HELLO, "prompt": "p"}, recipe).text == "q"
    assert '"question"' in error({"prompt": "p"}, recipe).message


def test_messages_go_through_the_chat_template_without_special_tokens() -> None:
    result = prompt({"messages": HELLO, "prompt": None})
    assert result.text == "<user>Hello"
    assert list(result.tokens) == list(b"<user>Hello")


def test_a_row_with_prompt_and_messages_is_refused_unless_it_is_said_which(caplog: pytest.LogCaptureFixture) -> None:
    both = {"messages": HELLO, "prompt": "p"}
    failed = error(both)
    assert failed.type == "ambiguous_prompt"
    assert "Say which with --prompt-column prompt or --prompt-column messages" in failed.message
    assert prompt(both, Recipe(prompt_column="prompt")).text == "p"
    assert prompt(both, Recipe(prompt_column="messages")).text == "<user>Hello"
    assert prompt(both, Recipe(template="{{ prompt }}!")).text == "p!"
    assert prompt({**both, "messages": None}).text == "p"
    assert not caplog.records


def test_chat_template_that_refuses_is_an_error_row() -> None:
    failed = error({"messages": [{"role": "nobody", "content": ""}]})
    assert failed.type == "template"
    assert failed.message.startswith("line 3 of prompts.jsonl: the chat template refused")


def test_chat_template_kwargs_of_the_row_win() -> None:
    recipe = Recipe(chat_template_kwargs={"a": 1, "b": 1})
    kwargs = {"b": 2, "c": None}
    assert prompt({"messages": HELLO, "chat_template_kwargs": kwargs}, recipe).text == "<user>Hello[a=1][b=2]"
    body = {"messages": HELLO, "chat_template_kwargs": kwargs}
    assert prompt(request(body), recipe).text == "<user>Hello[a=1][b=2]"


def test_recipe_refuses_what_excludes_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Recipe(template="x", prompt_column="y")
    with pytest.raises(ValueError, match=r'may not set "messages"'):
        Recipe(chat_template_kwargs={"messages": []})


def test_template_is_rendered_as_plain_text_with_its_last_newline() -> None:
    result = prompt({"a": "<1>", "messages": HELLO}, Recipe(template="Q: {{ a }}\n"))
    assert result.text == "Q: <1>\n"
    assert result.tokens[0] == BOS


def test_template_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="--template is no Jinja template: line 2"):
        PromptReader(Recipe(template="x\n{% if %}"), ByteTokenizer(), {})


def test_template_that_fails_is_an_error_row() -> None:
    failed = error({"a": "x"}, Recipe(template="{{ b }}"))
    assert failed.type == "template"
    assert failed.message == "line 3 of prompts.jsonl: the template failed: 'b' is undefined"


def test_row_sets_its_own_parameters() -> None:
    own = {"max_new_tokens": 5.0, "temperature": 1, "top_p": 0.5, "top_k": 3, "seed": 9, "stop": "."}
    assert prompt({"prompt": "x", **own}).params == SamplingParams(5, 1, 0.5, 3, 9, (".",))
    assert prompt({"prompt": "x", "stop": ["a", "b"]}).params.stop == ("a", "b")


def test_null_parameter_is_the_runs() -> None:
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=7, seed=1))
    assert prompt({"prompt": "x", "max_new_tokens": None, "seed": 2}, recipe).params == SamplingParams(7, seed=2)


def test_rows_without_parameters_share_the_runs() -> None:
    recipe = Recipe()
    assert prompt({"prompt": "x", "colour": 1}, recipe).params is recipe.sampling


def test_bad_parameter_names_place_field_rule_and_value() -> None:
    assert error({"prompt": "x", "temperature": "hot"}) == RowError(
        "wrong_type", 'line 3 of prompts.jsonl: temperature must be a number from 0 to 100, not "hot"', 3
    )


def test_repeated_id_is_an_error_that_names_the_first_row() -> None:
    window = rows({"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}, request({"messages": HELLO}))
    first, second, third = PromptReader(
        Recipe(), ByteTokenizer(), {1: "line 3 of prompts.jsonl", 2: "line 3 of prompts.jsonl"}
    ).read(window)
    assert isinstance(first, Prompt)
    assert isinstance(second, Generation)
    assert isinstance(third, Generation)
    assert second.error == RowError(
        "duplicate_id", 'line 4 of prompts.jsonl: the id "a" is that of line 3 of prompts.jsonl', 4
    )
    assert (second.id, second.columns) == ("a", {"id": "a", "prompt": "y"})
    assert third.request == window[2].value


def test_too_long_prompt_says_by_how_much() -> None:
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=4))
    assert len(prompt({"prompt": "12345"}, recipe, ByteTokenizer(context=10)).tokens) == 6
    assert error({"prompt": "123456"}, recipe, ByteTokenizer(context=10)) == RowError(
        "too_long",
        "line 3 of prompts.jsonl: the prompt has 7 tokens and may generate 4, together 11; the model's context is 10. "
        "Shorten it, lower max_new_tokens, or use --truncate left|right",
        3,
    )


@pytest.mark.parametrize(
    ("truncate", "eos", "kept"),
    [
        ("left", False, [BOS, *b"45678"]),
        ("right", False, [BOS, *b"12345"]),
        ("left", True, [BOS, *b"5678", 0]),
        ("right", True, [BOS, *b"1234", 0]),
    ],
)
def test_truncate_cuts_one_side_and_keeps_special_tokens(truncate: str, eos: bool, kept: list[int]) -> None:
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=4), truncate=truncate)  # type: ignore[arg-type]
    result = prompt({"prompt": "12345678"}, recipe, ByteTokenizer(context=10, eos=eos))
    assert list(result.tokens) == kept
    assert result.text == "12345678"


def test_truncate_without_special_tokens() -> None:
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=4), truncate="left")
    result = prompt({"messages": HELLO}, recipe, ByteTokenizer(context=10))
    assert list(result.tokens) == list(b">Hello")


@pytest.mark.parametrize(("budget", "complaint"), [(10, "max_new_tokens is 10"), (9, "the prompt has 4 tokens")])
def test_truncate_cannot_help_where_no_room_is_left_for_the_prompt(budget: int, complaint: str) -> None:
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=budget), truncate="left")
    failed = error({"prompt": "123"}, recipe, ByteTokenizer(context=10))
    assert failed.type == "too_long"
    assert complaint in failed.message


def test_window_is_tokenized_in_two_calls() -> None:
    tokenizer = ByteTokenizer()
    window = rows({"prompt": "p"}, {"messages": HELLO}, {}, {"prompt": "p"}, {"messages": HELLO})
    results = PromptReader(Recipe(), tokenizer, {}).read(window)
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    assert tokenizer.calls == [True, False]


def test_request_line_becomes_a_prompt_that_remembers_it() -> None:
    line = request({"messages": HELLO, "max_tokens": 5, "temperature": 0.5})
    result = prompt(line)
    assert (result.id, result.text, result.columns) == ("r1", "<user>Hello", {})
    assert result.request is line
    assert result.params == SamplingParams(max_new_tokens=5, temperature=0.5)


def test_completion_prompt_may_be_token_ids() -> None:
    line = request({"prompt": [5, 6]}, "/v1/completions")
    tokenizer = ByteTokenizer()
    assert list(prompt(line, tokenizer=tokenizer).tokens) == [5, 6]
    assert tokenizer.calls == []
    assert error(request({"prompt": []}, "/v1/completions")).type == "empty_prompt"
    failed = error(request({"prompt": [257]}, "/v1/completions"))
    assert failed.message == "line 3 of prompts.jsonl: body.prompt has token 257, but the model has 257 tokens"


@pytest.mark.parametrize("value", [{"prompt": "é"}, {"messages": HELLO}, request({"messages": HELLO})])
def test_every_prompt_has_tokens_that_the_model_has(value: dict[str, object]) -> None:
    tokenizer = ByteTokenizer(bos=False)
    tokenizer.vocabulary = 0xC3 if "prompt" in value else 111
    token = 0xC3 if "prompt" in value else 117
    failed = error(value, tokenizer=tokenizer)
    sentence = f"line 3 of prompts.jsonl: the prompt has token {token}, but the model has {tokenizer.vocabulary} tokens"
    assert (failed.type, failed.message) == ("unknown_token", sentence)
    tokenizer.vocabulary = token + 1
    assert prompt(value, tokenizer=tokenizer).tokens
    tokenizer.vocabulary = None
    assert prompt(value, tokenizer=tokenizer).tokens


def test_a_token_that_the_model_has_not_is_named() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocabulary = 256
    failed = error({"prompt": "x"}, tokenizer=tokenizer)
    assert 'the prompt has token 256 ("<bos>"), but the model has 256 tokens' in failed.message


def test_new_tokens_as_far_as_the_context_goes() -> None:
    recipe, tokenizer = Recipe(sampling=SamplingParams(max_new_tokens=FIT)), ByteTokenizer(context=20)
    assert prompt({"prompt": "1234"}, recipe, tokenizer).params.max_new_tokens == 15
    assert prompt(request({"messages": HELLO}), recipe, tokenizer).params.max_new_tokens == 9
    assert prompt({"prompt": "1234", "max_new_tokens": 3}, recipe, tokenizer).params.max_new_tokens == 3
    assert prompt(request({"messages": HELLO, "max_tokens": 3}), recipe, tokenizer).params.max_new_tokens == 3
    assert prompt({"prompt": "x" * 18}, recipe, tokenizer).params.max_new_tokens == 1
    failed = error({"prompt": "x" * 19}, recipe, tokenizer)
    assert (failed.type, "the model's context is 20, which leaves no room" in failed.message) == ("too_long", True)
    with pytest.raises(ValueError, match="states no limit of its context"):
        PromptReader(recipe, ByteTokenizer(), {})
    with pytest.raises(ValueError, match="exclude each other"):
        Recipe(sampling=SamplingParams(max_new_tokens=FIT), truncate="left")


def test_ids_have_the_names_of_their_files_in_front() -> None:
    recipe = Recipe(id_prefix="file")
    assert prompt({"id": "a", "prompt": "x"}, recipe).id == "prompts.jsonl:a"
    assert prompt({"prompt": "x"}, recipe).id == "prompts.jsonl:3"
    assert prompt(request({"messages": HELLO}), recipe).id == "prompts.jsonl:r1"
    result = read({"id": 7}, recipe)
    assert isinstance(result, Generation)
    assert result.id == "prompts.jsonl:7"


def test_id_of_another_file_says_what_to_do() -> None:
    [failed] = PromptReader(Recipe(), ByteTokenizer(), {0: "line 3 of other.jsonl"}).read(rows({"id": "a"}))
    assert isinstance(failed, Generation)
    assert failed.error is not None
    assert failed.error.message.endswith(
        "is that of line 3 of other.jsonl. With --id-prefix file, each id has the name of its file in front"
    )


def test_among_requests_a_row_with_a_custom_id_alone_is_one() -> None:
    line = {"custom_id": "t", "params": {"messages": HELLO}}
    [failed] = PromptReader(Recipe(), ByteTokenizer(), {}, among_requests=True).read(rows(line))
    assert isinstance(failed, Generation)
    assert (failed.id, failed.request) == ("t", line)
    assert failed.error is not None
    assert "method, url and body are missing" in failed.error.message
    assert 'there is no column "prompt" or "messages"' in error(line).message
    line = {"custom_id": "c", "prompt": "x"}
    [plain] = PromptReader(Recipe(), ByteTokenizer(), {}, among_requests=True).read(rows(line))
    assert isinstance(plain, Prompt)


def test_request_parameter_is_named_as_the_body_spells_it() -> None:
    failed = error(request({"messages": HELLO, "max_completion_tokens": 0}))
    assert failed.message == (
        "line 3 of prompts.jsonl: body.max_completion_tokens must be a whole number, 1 or more, not 0"
    )


def test_with_a_model_every_row_must_be_a_request_for_it() -> None:
    recipe = Recipe(model="m")
    assert prompt(request({"messages": HELLO, "model": "m"}), recipe).id == "r1"
    assert error(request({"messages": HELLO, "model": "other"}), recipe).type == "model_not_found"
    result = read({"prompt": "x"}, recipe)
    assert isinstance(result, Generation)
    assert result.error is not None
    assert "custom_id must be a text" in result.error.message
    assert result.request == {"prompt": "x"}


SETTINGS_OF_OTHERS: dict[str, object] = {
    "continue_final_message": True,
    "add_generation_prompt": False,
    "best_of": 2,
    "response_format": {"type": "json_object"},
    "tools": [{}],
    "enable_thinking": False,
    "sampling_params": {"temperature": 0.7},
    "max_completion_tokens": 3,
    "do_sample": True,
    "guided_json": "{}",
    "structured_outputs": {"regex": "a"},
    "maxNewTokens": 3,
    "top-p": 0.5,
    "images": ["a.png"],
    "prompt_token_ids": [1],
    "min_new_tokens": 3,
    "minTokens": 3,
    "truncate_prompt_tokens": 3,
    "echo": True,
}


def test_what_somebody_may_take_for_a_setting_is_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a command line that ran in this process: it says a warning once.
    monkeypatch.setattr(logging.getLogger("batchgen.requests.prompts"), "filters", [])

    def said(recipe: Recipe, *values: object) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="batchgen.requests.prompts"):
            results = PromptReader(recipe, ByteTokenizer(), {}).read(rows(*values, *values))
        assert all(isinstance(result, Prompt) for result in results)
        return [record.getMessage() for record in caplog.records]

    (limit,) = said(Recipe(), request({"messages": HELLO}))
    assert "the body sets no max_tokens: its answer ends after 128 tokens, here and in all other lines" in limit
    assert not said(Recipe(sampling=SamplingParams(max_new_tokens=7)), request({"messages": HELLO}))
    (limit,) = said(Recipe(), request({"input": "Hello"}, url="/v1/responses"))
    assert "the body sets no max_output_tokens: its answer ends after 128 tokens" in limit

    def named(value: Mapping[str, object], **recipe: str) -> list[str]:
        sentence = "is carried along and changes no text, here and in all other lines"
        warnings = said(Recipe(**recipe), value)  # type: ignore[arg-type]
        assert all(sentence in warning for warning in warnings)
        return [warning.split('"')[1] for warning in warnings]

    for key, telling in SETTINGS_OF_OTHERS.items():
        assert named({"prompt": "a", key: telling}) == [key]
        assert named({"prompt": "a", key: None}) == []
    assert named({"prompt": "a", "n": 1, "tools": [], "stream": None, "colour": "red"}) == []
    assert named({"prompt": "a", "best_of": 3, "max_tokens": 5}) == ["best_of", "max_tokens"]
    assert named({"prompt": "a", "chat_template_kwargs": {"a": 1}}) == ["chat_template_kwargs"]
    assert named({"messages": HELLO, "chat_template_kwargs": {"a": 1}}) == []
    assert named({"text": "a", "system": "b", "suffix": "c"}, template="{{ system }} {{ text }}") == ["suffix"]
    assert named({"suffix": "a"}, prompt_column="suffix") == []


def test_unknown_key_of_a_body_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = PromptReader(Recipe(), ByteTokenizer(), {})
    with caplog.at_level(logging.WARNING, logger="batchgen.requests.prompts"):
        for _ in range(2):
            body = {"messages": HELLO, "mystery": 1, "max_tokens": 5}
            results = reader.read(rows(*[request(body) for _ in range(2)]))
            assert all(isinstance(result, Prompt) for result in results)
    assert [record.getMessage() for record in caplog.records] == [
        "line 3 of prompts.jsonl: "
        'the body\'s key "mystery" is not known to batchgen and is ignored, here and in all other lines'
    ]
