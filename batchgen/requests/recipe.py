"""What the user asked for: how rows become prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from batchgen.requests import thinking, tools
from batchgen.requests.constraints import check
from batchgen.requests.refusal import Refused
from batchgen.requests.row_ids import IdPrefix
from batchgen.requests.template import template_kwargs
from batchgen.types import FIT, SamplingParams


@dataclass(frozen=True)
class Recipe:
    """How rows become prompts: what the user asked for, recorded with the run and compared at its next start.

    Raises:
        ValueError: the settings exclude each other; a sentence.
    """

    prompt_column: str | None = None  # None: prompt, or messages where a row has them
    template: str | None = None  # Jinja text over the row's columns
    sampling: SamplingParams = field(default_factory=SamplingParams)  # for what a row does not set itself
    truncate: Literal["left", "right"] | None = None  # the side cut off a prompt that is too long; None: an error row
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)  # a row's own win
    id_prefix: IdPrefix | None = None  # what stands before a row's own id; None: nothing
    reasoning_parser: str = "auto"  # the form of thinking: auto (as the chat template shows it), none or its name
    tool_parser: str = "auto"  # the same of calls of tools
    trusts_templates: bool = False  # a row may bring a chat template of its own
    model: str | None = None  # every row must be a request line, for this model or none; None: any row, any model
    adapters: tuple[str, ...] = ()
    """The names of adapters, of which a row may have one: a plain row by its `adapter`, a request by its `model`; a run
    finds them out itself."""
    base_names: tuple[str, ...] = ()
    """Beside `adapters` and without a `model`: what a request calls the model itself; a run finds them out itself."""
    generation_config: str = "none"
    """Whose `generation_config.json` says what neither a row nor `sampling` says: none, auto (the model's own), or that
    of a folder."""
    set_by_user: frozenset[str] = frozenset()
    """Names of what stays in `sampling` although it is the default; what is not the default stays anyway."""
    authors: frozenset[str] = frozenset()
    """Names of what in `sampling` is from a `generation_config.json`; a run finds them out itself."""

    def __post_init__(self) -> None:
        if self.template is not None and self.prompt_column is not None:
            raise ValueError("--template and --prompt-column exclude each other: the template can use any column")
        if self.sampling.max_new_tokens == FIT and self.truncate is not None:
            raise ValueError(
                "--max-new-tokens fit and --truncate exclude each other: a prompt that fills the context leaves no "
                "room. Give the number of tokens to leave room for"
            )
        if self.sampling.constraint is not None:
            try:
                check(self.sampling.constraint)
            except ValueError as error:
                flag = self.sampling.constraint.kind.replace("_", "-")
                raise ValueError(f"--{flag}: {error}") from None
        if self.model in self.adapters:
            raise ValueError(
                f"an adapter cannot be called {self.model!r}, as the model itself is, since lines ask for either by "
                "its name; give the adapter another name, or the model with --served-model-name"
            )
        for flag, name, forms in (
            ("--reasoning-parser", self.reasoning_parser, thinking.FORMS),
            ("--tool-parser", self.tool_parser, tools.FORMS),
        ):
            if name not in ("auto", "none", *forms):
                raise ValueError(f"{flag} must be auto, none or one of {', '.join(forms)}, not {name!r}")
        try:
            template_kwargs(self.chat_template_kwargs, "chat_template_kwargs")
        except Refused as refused:
            raise ValueError(refused.message) from None

    @property
    def knows_temperature(self) -> bool:
        """Whether somebody has said how freely to sample, or greedy is what the command does anyway."""
        return self.generation_config == "none" or "temperature" in self.set_by_user | self.authors

    @property
    def request_models(self) -> tuple[str, ...]:
        """The names that a request may have in its `model`, those of adapters behind the others; none: any name."""
        if self.model is None and not self.adapters:
            return ()
        return (*((self.model,) if self.model is not None else self.base_names), *self.adapters)

    @property
    def authors_length(self) -> int | None:
        """The length that the model's author recommends, as far as the context goes; None: another one counts."""
        return self.sampling.max_new_tokens if "max_new_tokens" in self.authors else None
