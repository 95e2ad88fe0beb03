"""Text to tokens and back, from a model's folder alone: tokenizer, chat template, config. Reads no weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchgen.definition.build import build_empty, can_build
from batchgen.definition.errors import ModelError
from batchgen.definition.model_config import read_config
from batchgen.definition.tokenizer import LETTERS, find_lost, read_tokenizer
from batchgen.generation_config import read_generation_config
from batchgen.types import Tokens

# What configs call the longest sequence. BLOOM (ALiBi) has no limit of its own, but may say what it was trained with.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


class HfEncoder:
    """The encoder (see `engine.Encoder`) of a model folder in the layout of the Hugging Face hub. Reads no weights.

    Raises:
        ModelError: the folder holds no config or no tokenizer that this version of Transformers can read, or no model
            can be made of that config.
    """

    context: int | None
    vocabulary: int | None

    def __init__(self, model: str) -> None:
        self.config = read_config(model)
        if can_build(self.config):
            build_empty(self.config)
        self._tokenizer = read_tokenizer(model)
        # Only a warning hangs on this number, and `prompts` measures against the model's context itself.
        self._tokenizer.model_max_length = 10**30
        text = self.config.get_text_config()
        self._model = model
        lengths = (getattr(text, name, None) for name in _CONTEXT_NAMES)
        self.context = next((length for length in lengths if type(length) is int and length > 0), None)
        self.vocabulary = getattr(text, "vocab_size", None)
        self.end_tokens = _end_tokens(model, text, self._tokenizer)
        """Every id that ends a text, sorted: generation_config.json's, the config's and the tokenizer's."""
        self.pad_token = self._choose_pad_token(text)
        """What fills a row; an id that the embedding has, and no end token unless there is no other."""
        self.special_tokens: dict[str, int] = {
            str(token.content): index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        # Sentencepiece-like decoders drop the first token's leading space; after another token it stays.
        self._anchor: list[int] = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor_text = self._plain_decode(self._anchor)
        self._token_texts: dict[int, str] = {}
        self._loses_letters = bool(find_lost(self._tokenizer, LETTERS))
        self._lost_letters: dict[str, bool] = {}

    def chat(self, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        """The conversation through the model's chat template, ready for the assistant's turn.

        Raises:
            ValueError: there is no template, or it refused the conversation.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the model in {self._model} has no chat template, so it cannot take messages; "
                "give the text as `prompt`, or render it with --template"
            )
        options = {"add_generation_prompt": True, **kwargs, "tokenize": False}
        try:
            return str(self._tokenizer.apply_chat_template([dict(message) for message in messages], **options))
        except Exception as error:  # a template is a program that came with the model: it can raise anything
            detail = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"the model's chat template refused these messages: {detail}") from error

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[Tokens]:
        """Token ids of each text; see `engine.Encoder.tokenize`.

        A text that begins with the beginning-of-sequence token itself does not get a second one. A lone surrogate,
        which JSON can escape but UTF-8 cannot hold, is read as U+FFFD.
        """
        if not texts:
            return []
        readable = [_readable(text) for text in texts]
        encoded = self._tokenizer(readable, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        begin = self._tokenizer.bos_token_id
        if special and begin is not None:
            encoded = [tokens[1:] if tokens[:2] == [begin, begin] else tokens for tokens in encoded]
        return list(encoded)

    def find_lost(self, text: str) -> str:
        """Letters and digits of `text` that become no token; see `engine.Encoder.find_lost`."""
        if not self._loses_letters:
            return ""
        letters = {letter for letter in _readable(text) if letter.isalnum()}
        new = "".join(sorted(letters - self._lost_letters.keys()))
        lost = find_lost(self._tokenizer, new)
        self._lost_letters |= {letter: letter in lost for letter in new}
        return "".join(sorted(letter for letter in letters if self._lost_letters[letter]))

    def decode(self, tokens: Tokens) -> str:
        """The text of generated tokens, special ones left out, nothing stripped or cleaned up."""
        text = self._plain_decode([*self._anchor, *tokens])
        if self._anchor_text and text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._plain_decode(tokens)

    def token_text(self, token: int) -> str:
        """The text of one token behind another, a special one's name included; U+FFFD for a part of a character."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._plain_decode([*self._anchor, token], special=True).removeprefix(self._anchor_text)
            self._token_texts[token] = text
        return text

    def _plain_decode(self, tokens: Tokens, special: bool = False) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)

    def _choose_pad_token(self, config: Any) -> int:
        known = (self._tokenizer.pad_token_id, config.pad_token_id, self._tokenizer.unk_token_id)
        most = self.vocabulary or len(self._tokenizer)
        ids = itertools.chain((i for i in known if i is not None and 0 <= i < most), range(most))
        return next((i for i in ids if i not in self.end_tokens), 0)


def _readable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _end_tokens(model: str, config: Any, tokenizer: Any) -> list[int]:
    found = {tokenizer.eos_token_id}
    of_author = read_generation_config(model).get("eos_token_id")
    for name, ids in (("generation_config.json", of_author), ("config.json", config.eos_token_id)):
        given = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
        if any(type(i) is not int for i in given):
            raise ModelError(
                f"{Path(model) / name}: eos_token_id must be a token's number or a list of them, not {ids!r}"
            )
        found.update(given)
    return sorted(i for i in found if i is not None and i >= 0)
