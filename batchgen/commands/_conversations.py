"""Options about conversations, thinking and calls of tools, of `run` and `run-batch` alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from batchgen.commands._options import add_options

CONVERSATION_OPTIONS = ("reasoning_parser", "tool_parser", "trusts_templates")
"""Their names in `Recipe`."""

_OPTIONS = (
    click.option(
        "--reasoning-parser",
        metavar="NAME",
        default="auto",
        show_default=True,
        help="The marks that the model puts around its thinking, which is split off from the answer; auto takes those "
        "in its chat template, none leaves the text as it is. Give an unknown name to see the list.",
    ),
    click.option(
        "--tool-parser",
        "--tool-call-parser",
        "tool_parser",
        metavar="NAME",
        default="auto",
        show_default=True,
        help="The form in which the model calls tools; auto takes that of its chat template, none leaves calls in the "
        "text. Give an unknown name to see the list.",
    ),
    click.option(
        "--trust-templates",
        "--trust-request-chat-template",
        "trusts_templates",
        is_flag=True,
        help="Render rows that bring a chat template of their own by it, in a sandbox.",
    ),
)


def conversation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options."""
    return add_options(command, _OPTIONS)
