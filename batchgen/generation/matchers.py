"""Constraints, compiled for a model's tokenizer by llguidance: one matcher for each distinct one, copied for each row.

A matcher follows the bytes of tokens, so that a character may be spread over several. It never raises: what goes wrong
(a limit of its parser, a token that does not match) is found in it afterwards, and concerns its own row alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from batchgen.models.tokenizer import HfTokenizer
from batchgen.requests.constraints import make_grammar
from batchgen.requests.token_texts import to_bytes
from batchgen.types import Constraint

_MOST_KEPT = 4096  # compiled constraints; a medium schema takes some hundred kilobytes
_BYTES = 256
_NO_FORCING = '%llguidance {"no_forcing": true}\n'
_REASONS = {"NoExtensionBias": "none of the model's tokens can come next, and the text is not complete"}


class Matchers:
    """Compiles constraints for one tokenizer.

    Attributes:
        words: of a mask, each with the bits of 32 tokens.
        threads: makes masks for many rows at once.
        worker: the thread in which masks are made while the device computes.
    """

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._tokenizer = _make_tokenizer(tokenizer)
        self._special = tokenizer.special_tokens.keys()
        self.words = -(-self._tokenizer.vocab_size // 32)
        self.threads = LLExecutor()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._compiled: dict[Constraint, LLMatcher] = {}

    def copy(self, constraint: Constraint) -> LLMatcher:
        """Returns a matcher at the beginning of a text; it has an error where the constraint cannot be compiled."""
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = self._compile(constraint)
            while len(self._compiled) >= _MOST_KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[constraint] = compiled
        return compiled.deep_copy()

    def _compile(self, constraint: Constraint) -> LLMatcher:
        limits = LLParserLimits(verbose_errors=False)
        grammar = make_grammar(constraint)
        if self._spells_special_token(constraint):
            grammar = _without_forcing(grammar)
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)

    def _spells_special_token(self, constraint: Constraint) -> bool:
        """Whether the name of a special token may be a part of the text, such as "</s>"."""
        written = constraint.text
        if constraint.kind in ("json_schema", "choice"):
            written = json.dumps(json.loads(written), ensure_ascii=False)
        return any(name in written.replace("\\", "") for name in self._special)


@lru_cache(2)
def matchers_of(tokenizer: HfTokenizer) -> Matchers:
    """Returns the matchers of a tokenizer: made once, since that takes a second for 150,000 tokens."""
    return Matchers(tokenizer)


def describe_error(matcher: LLMatcher) -> str:
    """Returns what is wrong with a matcher, on one line; "" for nothing."""
    if not matcher.is_error():
        return ""
    lines = [line.strip() for line in re.split(r"\n|<", matcher.get_error()) if line.strip()]
    if not lines:
        return "llguidance does not say why"
    return _REASONS.get(lines[0]) or lines[0][:300].rstrip(".")


def _without_forcing(grammar: str) -> str:
    """Returns the same grammar, of which a text that can only go on in one way is left to the model, token by token.

    llguidance takes the tokens of such a text from the tokenizer, which makes one special token of its name.
    """
    if not grammar.startswith("{"):
        return grammar if "%llguidance" in grammar else _NO_FORCING + grammar
    [part] = json.loads(grammar)["grammars"]
    return _NO_FORCING + (part["lark_grammar"] or f"start: %json {json.dumps(part['json_schema'])}")


def _make_tokenizer(tokenizer: HfTokenizer) -> LLTokenizer:
    definition = tokenizer.read_definition()
    ends = [token for token in tokenizer.end_tokens if token < tokenizer.size]
    if definition is not None:
        try:
            return LLTokenizer(definition, eos_token=ends or None)
        except ValueError:
            pass  # its decoder is none of those that llguidance knows
    return LLTokenizer(TokenizerWrapper(_TokenTexts(tokenizer)), eos_token=ends or None)


class _TokenTexts:
    """A tokenizer as llguidance takes it, by the texts of single tokens."""

    def __init__(self, tokenizer: HfTokenizer) -> None:
        special = set(tokenizer.special_tokens.values())
        texts = [tokenizer.token_text(token) for token in range(tokenizer.size)]
        # A part of a character of which nobody knows the bytes is no token of a constrained text.
        self.tokens = [
            b"" if "\ufffd" in text and token not in special else to_bytes(text) for token, text in enumerate(texts)
        ]
        self.special_token_ids = sorted(special)
        self.bos_token_id = None
        self.eos_token_id = next(iter(tokenizer.end_tokens), 0)
        self._ids = {text: token for token, text in enumerate(self.tokens) if text and token not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes | str) -> Sequence[int]:
        """Returns tokens of `text`, each the longest that there is; bytes that no token begins with are left out."""
        data, found, place = text.encode() if isinstance(text, str) else bytes(text), [], 0
        while place < len(data):
            ends = range(min(len(data), place + self._longest), place, -1)
            end = next((end for end in ends if data[place:end] in self._ids), None)
            if end is not None:
                found.append(self._ids[data[place:end]])
            place = end or place + 1
        return found
