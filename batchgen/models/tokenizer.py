"""Text to tokens and back, from a model's folder alone: tokenizer, chat template, config. Reads no weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from batchgen.engine import Setup
from batchgen.models.byte_tokens import decode_parts
from batchgen.models.conversation import Conversations
from batchgen.models.definition.build import build_empty
from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.model_config import read_config
from batchgen.models.definition.tokenizer import LETTERS, find_lost, read_tokenizer
from batchgen.models.generation_config import read_generation_config
from batchgen.types import Tokens

# What Transformers' tokenizers around a tokenizer of the library `tokenizers` do before and behind it.
_AROUND_BACKEND = ("__call__", "_encode_plus", "decode", "_decode")

# What configs call the longest sequence. BLOOM (ALiBi) has no limit of its own, but may say what it was trained with.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


class HfTokenizer:
    """The tokenizer (see `engine.Tokenizer`) of a model folder in the layout of the Hugging Face hub. Reads no weights.

    Raises:
        ModelError: the folder holds no config or no tokenizer that this version of Transformers can read, or no model
            can be made of that config.
    """

    context: int | None
    vocabulary: int | None

    def __init__(self, model: str) -> None:
        self.config = read_config(model)
        build_empty(self.config)
        self._hf_tokenizer = read_tokenizer(model)
        # Only a warning hangs on this number, and `prompts` measures against the model's context itself.
        self._hf_tokenizer.model_max_length = 10**30
        self._backend = _find_backend(self._hf_tokenizer)
        text = self.config.get_text_config()
        lengths = (getattr(text, name, None) for name in _CONTEXT_NAMES)
        self.context = next((length for length in lengths if type(length) is int and length > 0), None)
        self.vocabulary = getattr(text, "vocab_size", None)
        self.end_tokens = _find_end_tokens(model, self.config, self._hf_tokenizer)
        """Every id that ends a text, sorted: generation_config.json's, the config's and the tokenizer's."""
        self.pad_token = self._choose_pad_token(text)
        """What fills a row; an id that the embedding has, and no end token unless there is no other."""
        self.special_tokens: dict[str, int] = {
            str(token.content): index
            for index, token in self._hf_tokenizer.added_tokens_decoder.items()
            if token.special
        }
        # Sentencepiece-like decoders drop the first token's leading space; after another token it stays.
        self._anchor: list[int] = self._hf_tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor_text = self._plain_decode(self._anchor)
        self._token_texts: dict[int, str] = {}
        self._conversations = Conversations(model, self._hf_tokenizer)
        self._loses_letters = bool(find_lost(self._hf_tokenizer, LETTERS))
        self._lost_letters: dict[str, bool] = {}

    def chat(self, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        """Returns the conversation through the model's chat template, ready for the assistant's turn.

        A content may be a text or a list of parts of type "text": it becomes what the template takes. For `kwargs`, see
        `engine.Tokenizer.chat`.

        Raises:
            ValueError: there is no template, or it refused the conversation, or leaves words of it out.
        """
        return self._conversations.chat(messages, **kwargs)

    def template_text(self, **kwargs: object) -> str:
        """Returns the text of the chat template that `chat` takes for these variables.

        Raises:
            ValueError: there is none.
        """
        return self._conversations.template_text(**kwargs)

    def find_turn(self, text: str, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        """Returns the end of `text`, which `chat` has made, that belongs to the assistant's next turn."""
        return self._conversations.find_turn(text, messages, **kwargs)

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[Tokens]:
        """Returns the token ids of each text; see `engine.Tokenizer.tokenize`.

        A text that begins with the beginning-of-sequence token itself does not get a second one. A lone surrogate,
        which JSON can escape but UTF-8 cannot hold, is read as U+FFFD.
        """
        if not texts:
            return []
        readable = [_make_readable(text) for text in texts]
        encoded = self._encode(readable, special)
        begin = self._hf_tokenizer.bos_token_id
        if special and begin is not None:
            encoded = [tokens[1:] if tokens[:2] == [begin, begin] else tokens for tokens in encoded]
        return list(encoded)

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if self._backend is not None:  # which lets other threads work meanwhile, and finds no places in the texts
            return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=special)]
        tokens = self._hf_tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        return list(tokens)

    def find_lost(self, text: str) -> str:
        """Returns the letters and digits of `text` that become no token; see `engine.Tokenizer.find_lost`."""
        if not self._loses_letters:
            return ""
        letters = {letter for letter in _make_readable(text) if letter.isalnum()}
        new = "".join(sorted(letters - self._lost_letters.keys()))
        lost = find_lost(self._hf_tokenizer, new)
        self._lost_letters |= {letter: letter in lost for letter in new}
        return "".join(sorted(letter for letter in letters if self._lost_letters[letter]))

    def find_foreign(self, names: Sequence[str]) -> list[str]:
        """Returns those of `names` that are no token's name."""
        vocabulary = self._hf_tokenizer.get_vocab()
        return [name for name in names if name not in vocabulary]

    @property
    def can_be_shared(self) -> bool:
        """Whether several threads may use it at the same time, which tokenizers written in Python are not made for."""
        return self._backend is not None

    @property
    def size(self) -> int:
        """How many tokens there are, added ones included; the model may know more."""
        return len(self._hf_tokenizer)

    def read_definition(self) -> str | None:
        """Returns the tokenizer as the library `tokenizers` writes it, in JSON; None: it is not one of that library."""
        backend = getattr(self._hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        whole = copy.deepcopy(backend)
        whole.no_padding()
        whole.no_truncation()
        return str(whole.to_str())

    def decode(self, tokens: Tokens, *, skip_special_tokens: bool = True) -> str:
        """Returns the text of generated tokens; nothing is stripped or cleaned up.

        Args:
            skip_special_tokens: special ones are left out; else they are written as their names.
        """
        special = not skip_special_tokens
        text = self._plain_decode([*self._anchor, *tokens], special)
        if self._anchor_text and text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._plain_decode(tokens, special)

    def decode_all(self, rows: Sequence[Tokens], *, skip_special_tokens: bool = True) -> list[str]:
        """Returns what `decode` returns of each row's tokens; other threads work meanwhile, where the tokenizer can."""
        if self._backend is None:
            return [self.decode(tokens, skip_special_tokens=skip_special_tokens) for tokens in rows]
        behind = [[*self._anchor, *tokens] for tokens in rows]
        texts = self._backend.decode_batch(behind, skip_special_tokens=skip_special_tokens)
        anchor, begin = self._anchor_text, len(self._anchor_text)
        return [
            text[begin:] if anchor and text.startswith(anchor) else self._plain_decode(tokens, not skip_special_tokens)
            for tokens, text in zip(rows, texts, strict=True)
        ]

    def token_text(self, token: int) -> str:
        """Returns the text of one token behind another one.

        The text of a special token is its name. Bytes that are only a part of a character are lone surrogates, as
        Python's error handler "surrogateescape" writes them, so that the bytes of the token can be read off the text.
        """
        text = self._token_texts.get(token)
        if text is None:
            text = self._plain_decode([*self._anchor, token], special=True).removeprefix(self._anchor_text)
            if "\ufffd" in text:
                text = decode_parts(self.token_name(token) or "") or text
            self._token_texts[token] = text
        return text

    def token_name(self, token: int) -> str | None:
        """Returns the tokenizer's name of a token, also of a special one; None: it has no token of this id."""
        try:
            name = self._hf_tokenizer.convert_ids_to_tokens(token)
        except (OverflowError, LookupError):  # beyond what a tokenizer in Rust can count; beyond one in Python
            return None
        return None if name is None else str(name)

    def _plain_decode(self, tokens: Tokens, special: bool = False) -> str:
        if self._backend is not None:
            return str(self._backend.decode(tokens, skip_special_tokens=not special))
        text = self._hf_tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)

    def _choose_pad_token(self, config: Any) -> int:
        proposed = (
            self._hf_tokenizer.pad_token_id,
            getattr(config, "pad_token_id", None),
            self._hf_tokenizer.unk_token_id,
        )
        size = self.vocabulary or len(self._hf_tokenizer)
        ids = itertools.chain((i for i in proposed if i is not None and 0 <= i < size), range(size))
        return next((i for i in ids if i not in self.end_tokens), 0)


def tokenizer_of(setup: Setup) -> HfTokenizer:
    """Returns the tokenizer of an engine's model: the one that rows are read with, if it can be shared with them.

    Raises:
        ModelError: as `HfTokenizer`.
    """
    read = setup.tokenizer
    return read if isinstance(read, HfTokenizer) and read.can_be_shared else HfTokenizer(setup.model)


def _find_backend(hf_tokenizer: Any) -> Any:
    """Returns the tokenizer of the library `tokenizers` that does all that this one does; None: there is none.

    The classes of some models do more, which only they know.
    """
    kind = type(hf_tokenizer)
    as_usual = isinstance(hf_tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in _AROUND_BACKEND
    )
    return hf_tokenizer.backend_tokenizer if as_usual else None


def _make_readable(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _find_end_tokens(model: str, config: Any, hf_tokenizer: Any) -> list[int]:
    """Returns every id that ends a text, sorted.

    Raises:
        ModelError: a file names something else; the message has the file and the field.
    """
    text = config.get_text_config()
    of_author, of_model = read_generation_config(model).get("eos_token_id"), getattr(config, "eos_token_id", None)
    # Where the text part of a model does not name one, its config gives the default of its class, a wrong one perhaps.
    if text is not config and of_author is None and of_model is None:
        of_model = getattr(text, "eos_token_id", None)
    end_tokens = {hf_tokenizer.eos_token_id}
    for name, ids in (("generation_config.json", of_author), ("config.json", of_model)):
        listed = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
        if any(type(i) is not int for i in listed):
            raise ModelError(
                f"{Path(model) / name}: eos_token_id must be a token's number or a list of them, not {ids!r}"
            )
        end_tokens.update(listed)
    return sorted(i for i in end_tokens if i is not None and i >= 0)
