"""What becomes of a row that has ended: its text, and what it has asked to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.generation.choice import ChosenLogprob
from batchgen.generation.ends import End, find_stop
from batchgen.generation.prompt_logprobs import PromptLogprobs
from batchgen.generation.thinking import follow
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Alternative, Details, Generation, Prompt


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that has ended."""

    prompt: Prompt
    tokens: Sequence[int]  # generated, up to and including the one that ended it
    end: End
    logprobs: Sequence[ChosenLogprob] | None = None  # of `tokens`, if the prompt asks for them
    prompt_logprobs: PromptLogprobs | None = None  # if the prompt asks for them


def make_generation(row: Ended, tokenizer: HfTokenizer) -> Generation:
    """Returns the generation of a row that has ended.

    The text is that of its tokens without the one that ended it, and up to the stop text that did; with both if the
    row wants it (`include_stop_str_in_output`).
    """
    return make_generations([row], tokenizer)[0]


def make_generations(rows: Sequence[Ended], tokenizer: HfTokenizer) -> list[Generation]:
    """Returns what `make_generation` returns of each row; their texts are made together, which is quicker."""
    return [_describe(row, text, tokenizer) for row, text in zip(rows, _find_texts(rows, tokenizer), strict=True)]


def _describe(row: Ended, text: str, tokenizer: HfTokenizer) -> Generation:
    logprobs = None if row.logprobs is None else [one.logprob for one in row.logprobs]
    details = _find_details(row, tokenizer)
    return Generation.of(row.prompt, text, row.end.reason, len(row.tokens), logprobs, details)


def fail_constraint(prompt: Prompt, reason: str) -> Generation:
    """Returns the failed generation of a prompt whose constraint could not be followed, for llguidance's reason."""
    return Generation.failed(
        prompt,
        "constraint",
        f"line {prompt.line}: the constraint could not be followed: {reason}. Make it simpler, or leave it out",
    )


def fail_impossible(prompt: Prompt) -> Generation:
    """Returns the failed generation of a prompt that has forbidden every token."""
    return Generation.failed(
        prompt,
        "no_token",
        f"line {prompt.line}: no token was left that may come next. Look at logit_bias, allowed_token_ids, bad_words "
        "and min_tokens, which together forbid all of them, or all that the constraint allows",
    )


def _find_texts(rows: Sequence[Ended], tokenizer: HfTokenizer) -> list[str]:
    """The text of each row. Those that end by a stop text need a second one, to find it."""
    texts: dict[int, str] = {}
    for skips in (True, False):
        alike = [place for place, row in enumerate(rows) if row.prompt.params.skip_special_tokens is skips]
        plain = [place for place in alike if not isinstance(rows[place].end.stop_reason, str)]
        tokens = [_find_shown_tokens(rows[place], tokenizer) for place in plain]
        texts |= zip(plain, tokenizer.decode_all(tokens, skip_special_tokens=skips), strict=True)
        for place in set(alike).difference(plain):
            texts[place] = _find_text(rows[place], tokenizer, skip_special_tokens=skips)
    return [texts[place] for place in range(len(rows))]


def _find_text(row: Ended, tokenizer: HfTokenizer, *, skip_special_tokens: bool) -> str:
    tokens, stop, includes = row.tokens, row.end.stop_reason, row.prompt.params.include_stop_str_in_output

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    if isinstance(stop, str):
        text, before = decode(tokens), decode(tokens[:-1])
        found = find_stop(text, before, [stop])
        if found is not None:
            return text[: found[0] + (len(stop) if includes else 0)]
        return before + (stop if includes else "")  # the name of a special token, which has no text
    return decode(_find_shown_tokens(row, tokenizer))


def _find_shown_tokens(row: Ended, tokenizer: HfTokenizer) -> Sequence[int]:
    """The tokens whose text is shown, of a row that no stop text has ended."""
    is_left_out = _has_end_token(row, tokenizer) and not row.prompt.params.include_stop_str_in_output
    return row.tokens[:-1] if is_left_out else row.tokens


def _has_end_token(row: Ended, tokenizer: HfTokenizer) -> bool:
    """Whether the last token is there only to end the text."""
    if row.end.reason != "stop" or not row.tokens:
        return False
    return isinstance(row.end.stop_reason, int) or (
        row.end.stop_reason is None and row.tokens[-1] in tokenizer.end_tokens
    )


def _find_details(row: Ended, tokenizer: HfTokenizer) -> Details | None:
    prompt, params = row.prompt, row.prompt.params
    details = Details(stop_reason=row.end.stop_reason)
    if row.logprobs is not None and prompt.request is not None:
        details.token_texts = [tokenizer.token_text(token) for token in row.tokens]
    if row.logprobs is not None and params.top_logprobs:
        details.top_logprobs = [
            _likeliest(one.top_ids[: params.top_logprobs], one.top_logprobs, tokenizer) for one in row.logprobs
        ]
    if params.return_token_ids:
        details.token_ids, details.prompt_token_ids = list(row.tokens), list(prompt.tokens)
    if prompt.request is not None and (params.return_token_ids or params.prompt_logprobs is not None):
        details.prompt_token_texts = [tokenizer.token_text(token) for token in prompt.tokens]
    if row.prompt_logprobs is not None:
        details.prompt_logprobs = _describe_prompt(prompt, row.prompt_logprobs, tokenizer)
    if prompt.markup is not None:
        details.raw_text = _find_text(row, tokenizer, skip_special_tokens=False)
        if prompt.markup.thinking is not None:
            tokens = row.tokens[:-1] if _has_end_token(row, tokenizer) else row.tokens
            details.reasoning_tokens = follow(prompt.markup.thinking, tokens, tokenizer).tokens
    return details if details != Details() else None


def _likeliest(ids: Sequence[int], logprobs: Sequence[float], tokenizer: HfTokenizer) -> list[Alternative]:
    """The likeliest tokens of a place, the best first."""
    ranked = enumerate(zip(ids, logprobs, strict=False), 1)
    return [Alternative(token, tokenizer.token_text(token), logprob, rank) for rank, (token, logprob) in ranked]


def _describe_prompt(
    prompt: Prompt, logprobs: PromptLogprobs, tokenizer: HfTokenizer
) -> list[list[Alternative] | None]:
    places: list[list[Alternative] | None] = [None]
    numbers = zip(logprobs.logprobs, logprobs.ranks, logprobs.top_ids, logprobs.top_logprobs, strict=True)
    for token, (logprob, rank, top_ids, top_logprobs) in zip(prompt.tokens[1:], numbers, strict=True):
        own = Alternative(token, tokenizer.token_text(token), logprob, rank)
        places.append([own, *_likeliest(top_ids, top_logprobs, tokenizer)])
    return places
