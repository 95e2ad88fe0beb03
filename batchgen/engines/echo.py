"""The engine that repeats its prompt: for dry runs, job-file checks and tests. Needs no model and no device."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from batchgen.engine import DTYPES, Engine, EngineError, Setup, Tokenizer
from batchgen.models.message_content import join_texts
from batchgen.types import Alternative, Batch, Details, Generation, Prompt, Tokens

_ROWS = 4096  # in a batch: more would cost fewer commits, and more for memory that is no longer in the cache


class _ByteTokenizer:
    """The tokenizer whose tokens are the UTF-8 bytes of a text."""

    context: int | None = None
    vocabulary: int | None = 256

    def chat(self, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        text = "".join(f"{message['role']}: {join_texts(message.get('content', ''))}\n" for message in messages)
        return text.removesuffix("\n") if kwargs.get("continue_final_message") else text

    def template_text(self, **kwargs: object) -> str | None:
        return None

    def find_turn(self, text: str, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        return ""

    def token_name(self, token: int) -> str | None:
        return None

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[Tokens]:
        return [text.encode("utf-8", "replace") for text in texts]

    def find_lost(self, text: str) -> str:
        return ""


class Echo(Engine):
    """Answers with the first `max_new_tokens` bytes of the prompt.

    It cannot say anything else, so each of them has probability 1.
    """

    needs_model = False
    takes_adapters = True
    dtypes = DTYPES  # it computes nothing

    @dataclass(frozen=True)
    class Options:
        """Settings of `echo`."""

        seconds: float = 0.0  # what a generation takes, so that there is something to interrupt

        def __post_init__(self) -> None:
            if not 0 <= self.seconds < float("inf"):
                raise EngineError("--set seconds must be a number, 0 or more")

    @classmethod
    def tokenizer(cls, model: str) -> Tokenizer:
        return _ByteTokenizer()

    def __init__(self, setup: Setup, options: Any) -> None:
        self._seconds: float = options.seconds
        self._batch_size = setup.batch_size

    def generate(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        while not stop():
            batch = self._make_batch(prompts, stop)
            if not batch:
                return
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
            yield Batch(batch, peak_memory_bytes=memory)

    def _make_batch(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> list[Generation]:
        """Returns the generations of one batch: of at most a second's work, and of at most the batch size."""
        batch: list[Generation] = []
        ends = time.monotonic() + 1.0
        size = self._batch_size or _ROWS
        while len(batch) < size and time.monotonic() < ends:
            step = list(islice(prompts, 1 if self._seconds else min(256, size - len(batch))))
            if not step:
                break
            batch += map(_echo, step)
            self.signs.steps += 1
            self.signs.generated_tokens += sum(generation.generated_tokens for generation in batch[-len(step) :])
            if self._seconds:
                time.sleep(self._seconds)
            if stop():
                break
        return batch


def _echo(prompt: Prompt) -> Generation:
    room = prompt.params.max_new_tokens
    said = bytes(prompt.tokens[:room])
    params = prompt.params
    logprobs = [0.0] * len(said) if params.logprobs else None
    details = None
    if params.logprobs or params.return_token_ids or params.prompt_logprobs is not None:
        details = _describe(prompt, said)
    if len(prompt.tokens) <= room:
        text = prompt.text or said.decode("utf-8", "replace")
        return Generation.of(prompt, text, "stop", len(said), logprobs, details)
    return Generation.of(prompt, said.decode("utf-8", "replace"), "length", room, logprobs, details)


def _describe(prompt: Prompt, said: bytes) -> Details:
    """What the row asks to know of its tokens; a byte is the likeliest of all, and the only one."""
    params = prompt.params
    before = [*map(_alternative, prompt.tokens)]
    return Details(
        token_texts=[_alternative(byte).text for byte in said] if params.logprobs else None,
        prompt_token_texts=None if prompt.request is None else [each.text for each in before],
        token_ids=list(said) if params.return_token_ids else None,
        prompt_token_ids=list(prompt.tokens) if params.return_token_ids else None,
        top_logprobs=[[_alternative(byte)] for byte in said] if params.top_logprobs else None,
        prompt_logprobs=None if params.prompt_logprobs is None else [None, *([each] for each in before[1:])],
    )


def _alternative(byte: int) -> Alternative:
    return Alternative(byte, bytes([byte]).decode("utf-8", "surrogateescape"), 0.0, 1)
