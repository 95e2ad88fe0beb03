"""The options of `SamplingParams`, and what they mean together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from batchgen.commands import fail
from batchgen.commands._options import add_options
from batchgen.commands._values import FileText, TokenLimit, file_text, stop_texts
from batchgen.types import FIT, MOST_ALTERNATIVES, MOST_SAMPLES, PARAMS, Constraint, SamplingParams

_OPTIONS = (
    click.option(
        "--max-new-tokens",
        type=TokenLimit(),
        metavar="N|fit",
        default=SamplingParams.max_new_tokens,
        show_default=True,
        help="The most tokens to generate for a row; fit is as many as the model's context leaves.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=SamplingParams.temperature,
        show_default=True,
        help="The sampling temperature; 0 is greedy decoding.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=SamplingParams.top_p,
        show_default=True,
        help="Sample from the likeliest tokens that together have this probability; 1 is all.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=SamplingParams.top_k,
        show_default=True,
        help="Sample from this many of the likeliest tokens; 0 is all.",
    ),
    click.option(
        "--seed",
        type=int,
        default=SamplingParams.seed,
        show_default=True,
        help="The seed of sampling; a row is sampled by this seed and its id.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        callback=stop_texts,
        help="End a text before this one; the option may be given several times. \\n is a line end, \\t a tab, "
        "\\\\ a backslash.",
    ),
    click.option(
        "--logprobs",
        is_flag=True,
        default=SamplingParams.logprobs,
        help="Write the log-probability of every generated token.",
    ),
    click.option(
        "--top-logprobs",
        type=click.IntRange(0, MOST_ALTERNATIVES),
        metavar="N",
        default=SamplingParams.top_logprobs,
        show_default=True,
        help="Write the N likeliest tokens beside every generated token, with their log-probabilities.",
    ),
    click.option(
        "--prompt-logprobs",
        type=click.IntRange(0, MOST_ALTERNATIVES),
        metavar="N",
        default=SamplingParams.prompt_logprobs,
        help="Write the log-probability of every token of the prompt, with the N likeliest tokens beside it.",
    ),
    click.option(
        "--return-token-ids",
        is_flag=True,
        default=SamplingParams.return_token_ids,
        help="Write the token ids of the prompt and of the text.",
    ),
    click.option(
        "--samples",
        "n",
        type=click.IntRange(1, MOST_SAMPLES),
        metavar="N",
        default=SamplingParams.n,
        show_default=True,
        help="The number of texts for each row, each with a seed of its own; greedy texts are all the same.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=SamplingParams.min_p,
        show_default=True,
        help="Draw no token that is less likely than this share of the likeliest one; 0 is all.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=SamplingParams.repetition_penalty,
        show_default=True,
        help="Divide the logits of tokens that the prompt or the text has, if they are above 0, and multiply them "
        "otherwise; 1 is off.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=SamplingParams.presence_penalty,
        show_default=True,
        help="Subtract this from the logits of tokens that the text has.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=SamplingParams.frequency_penalty,
        show_default=True,
        help="Subtract this from the logits of tokens that the text has, as often as it has them.",
    ),
    click.option(
        "--min-tokens",
        type=click.IntRange(min=0),
        metavar="N",
        default=SamplingParams.min_tokens,
        show_default=True,
        help="The fewest tokens to generate for a row: only a completed constraint may end it earlier.",
    ),
    click.option(
        "--ignore-eos",
        is_flag=True,
        default=SamplingParams.ignore_eos,
        help="Go on behind the end of a sequence, up to --max-new-tokens.",
    ),
    click.option(
        "--thinking-tokens",
        type=click.IntRange(min=0),
        metavar="N",
        default=SamplingParams.thinking_tokens,
        help="The most tokens that a model may think before it answers; unless it is given, there is no limit.",
    ),
    click.option(
        "--json-schema",
        metavar="FILE",
        callback=file_text,
        help="Make every text JSON that is valid by the schema in this file.",
    ),
    click.option("--regex", metavar="REGEX", help="Make every text match this regular expression as a whole."),
    click.option(
        "--choice",
        multiple=True,
        metavar="TEXT",
        help="Make every text one of these; the option is given once for each.",
    ),
    click.option(
        "--grammar",
        metavar="FILE",
        callback=file_text,
        help="Make every text match the grammar in this file, in Lark's or GBNF's notation.",
    ),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `SamplingParams`, each with the default that stands there."""
    return add_options(command, _OPTIONS)


def read_sampling(options: dict[str, Any]) -> tuple[SamplingParams, frozenset[str]]:
    """Takes what belongs to `SamplingParams` out of `options`; and says which of it somebody has set.

    Raises:
        CommandError: constraints exclude each other, or one cannot be enforced.
        ValueError: a value is out of range; a sentence.
    """
    source = click.get_current_context().get_parameter_source
    names = sorted(PARAMS & options.keys())
    set_by_user = frozenset(name for name in names if source(name) not in (None, click.core.ParameterSource.DEFAULT))
    values = {name: options.pop(name) for name in names}
    values["logprobs"] = values["logprobs"] or values["top_logprobs"] > 0
    constraint = _read_constraint({name: options.pop(name) for name in ("json_schema", "regex", "choice", "grammar")})
    return SamplingParams(**values, constraint=constraint), set_by_user


def _read_constraint(given: Mapping[str, Any]) -> Constraint | None:
    values = {name: value for name, value in given.items() if value not in (None, ())}
    if not values:
        return None
    from batchgen.requests.constraints import KINDS, read_constraint
    from batchgen.requests.refusal import Refused

    kind, *others = [kind for kind in KINDS if kind in values]
    flag = _flag(kind)
    if others:
        raise fail(ValueError(f"{flag} and {_flag(others[0])} both say what the text must be; give one of them"))
    value = values[kind]
    if isinstance(value, FileText):
        flag, value = f"{flag} {value.name}", value.text
    try:
        return read_constraint(kind, list(value) if isinstance(value, tuple) else value, flag)
    except Refused as refused:
        raise fail(ValueError(refused.message)) from None


def sampling_words(params: SamplingParams, files: Mapping[str, FileText | None]) -> list[str]:
    """The words of a command line that say the same.

    Args:
        files: what `--json-schema` and `--grammar` were given, by their names.
    """
    from batchgen.commands._values import escape

    words: list[str] = []
    for name, value in params.changed().items():
        if name == "constraint":
            words += _constraint_words(params, files)
        elif name == "stop":
            words += [word for text in params.stop for word in ("--stop", escape(text))]
        elif value is True:
            words.append(_flag(name))
        elif name != "logprobs":
            words += [_flag(name), "fit" if name == "max_new_tokens" and value == FIT else str(value)]
    return words


def _constraint_words(params: SamplingParams, files: Mapping[str, FileText | None]) -> list[str]:
    constraint = params.constraint
    if constraint is None:
        return []
    flag = _flag(constraint.kind)
    if (file := files.get(constraint.kind)) is not None:
        return [flag, file.name]
    texts = json.loads(constraint.text) if constraint.kind == "choice" else [constraint.text]
    return [word for text in texts for word in (flag, text)]


def _flag(name: str) -> str:
    return "--samples" if name == "n" else f"--{name.replace('_', '-')}"
