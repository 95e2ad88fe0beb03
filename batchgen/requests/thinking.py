"""What models think before they answer: by which marks, whether a prompt has begun it, and where it ends. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from batchgen.requests.tools import gpt_oss
from batchgen.types import Thinking


class Marks(NamedTuple):
    """What stands around the thinking."""

    start: str
    end: str


HARMONY = Marks(gpt_oss.THINKING_START, gpt_oss.THINKING_END)
"""Of gpt-oss, whose thinking is a message among others."""

_THINK = Marks("<think>", "</think>")
# The first that is in a template. Models of these names write so; several others write as the last ones do.
_FORMS: Mapping[str, Marks] = {
    "gpt_oss": HARMONY,
    "seed_oss": Marks("<seed:think>", "</seed:think>"),
    "minimax_m3": Marks("<mm:think>", "</mm:think>"),
    "gemma4": Marks("<|channel>thought", "<channel|>"),
    "cohere": Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    "mistral": Marks("[THINK]", "[/THINK]"),
    "think": _THINK,
}
# vLLM's names for the same forms.
_ALIASES: Mapping[str, str] = {
    "openai_gptoss": "gpt_oss",
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "minimax_m2", "kimi_k2", "ernie45", "step3", "olmo3"), "think"
    ),
}
MARKS = tuple(_FORMS.values())
"""Those that are known."""

FORMS = (*_FORMS, *_ALIASES)
"""What `--reasoning-parser` takes besides auto and none."""


@lru_cache(64)
def marks_in_template(template: str) -> Marks | None:
    """The marks of thinking that a chat template knows; None: the model does not think."""
    if gpt_oss.is_in(template):
        return HARMONY
    forms = (marks for marks in _FORMS.values() if marks != HARMONY)
    return next((marks for marks in forms if marks.start in template or marks.end in template), None)


def marks_of(name: str) -> Marks:
    """The marks of a form that `--reasoning-parser` calls by any of its names."""
    return _FORMS[_ALIASES.get(name, name)]


def thinking_of(marks: Marks, turn: str, *, may_call: bool) -> Thinking | None:
    """What the model may think; None: the prompt has ended its thinking already, so that it answers at once.

    Args:
        turn: the end of the prompt that belongs to the turn of the assistant that is to be written.
        may_call: calls of tools may follow the thinking in the place of an answer.
    """
    started, ended = turn.rfind(marks.start), turn.rfind(marks.end)
    if ended > started:
        return None
    end = marks.end
    if marks == HARMONY and not may_call:
        # What may follow is an answer alone. So it begins behind its own header, where a constraint can begin, too.
        end += gpt_oss.ANSWER_START
    return Thinking(marks.start, end, is_open=started >= 0)


def split_thinking(text: str, thinking: Thinking) -> tuple[str | None, str]:
    """What was thought, without white space around it, and the text behind it; None: the text begins with no thinking.

    A text that begins with the start mark has it again where the prompt has it already. Without an end mark, all is
    thinking.
    """
    begun = text.lstrip()
    if begun.startswith(thinking.start):
        begun = begun[len(thinking.start) :]
    elif not thinking.is_open:
        return None, text
    thought, _, answer = begun.partition(thinking.end)
    return thought.strip(), answer.lstrip()
