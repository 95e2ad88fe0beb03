"""A tokenizer without a model, and rows to read with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchgen.types import Row, RowError

BOS = 256


class ByteTokenizer:
    """One token a byte, and a beginning of sequence before plain texts if asked."""

    vocabulary: int | None = 257

    def __init__(self, context: int | None = None, bos: bool = True, eos: bool = False) -> None:
        self.context = context
        self.calls: list[bool] = []
        self._before = [BOS] if bos else []
        self._after = [0] if eos else []

    def chat(self, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        if any(message["role"] == "nobody" for message in messages):
            raise ValueError("the chat template refused the conversation: there is no role nobody")
        turns = "".join(f"<{message['role']}>{message.get('content')}" for message in messages)
        return turns + "".join(f"[{name}={value}]" for name, value in sorted(kwargs.items()))

    def template_text(self, **kwargs: object) -> str | None:
        return None

    def find_turn(self, text: str, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        return ""

    def token_name(self, token: int) -> str | None:
        return "<bos>" if token == BOS else None

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[Sequence[int]]:
        self.calls.append(special)
        before, after = (self._before, self._after) if special else ([], [])
        return [[*before, *text.encode(), *after] for text in texts]

    def find_lost(self, text: str) -> str:
        return ""


def rows(*values: Mapping[str, object] | RowError) -> list[Row]:
    return [Row(index, "prompts.jsonl", index + 3, value) for index, value in enumerate(values)]


def request(body: Mapping[str, object], url: str = "/v1/chat/completions", **line: object) -> dict[str, object]:
    return {"custom_id": "r1", "method": "POST", "url": url, "body": body, **line}
