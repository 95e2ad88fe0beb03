"""Tiny random models for tests, built on the spot: a byte-level tokenizer and two layers; and prompts for them.

`initializer_range` is large because a tiny model with the usual one repeats a single token, and then any two ways of
generating agree.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from batchgen.engine import SignsOfLife
from batchgen.generation.greedy import LoadedModel
from batchgen.generation.sampling import SamplingTensors, sample
from batchgen.generation.sizing import BatchSizing
from batchgen.generation.static_batches import StaticBatches
from batchgen.models import architectures, loading
from batchgen.models.definition.model_config import read_config
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Batch, Generation, Prompt, SamplingParams

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ' is not known') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SPECIAL = ("<pad>", "<s>", "</s>", "<|end|>")
PAD, BEGIN, END, END_OF_TURN = range(4)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, after four special ones. Plain texts get a beginning-of-sequence token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a leading "▁", whose decoder drops the first space, as Llama 2's does; `<s>` and `</s>` around it."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁good", "▁day", "a", "!"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers, four heads of which two are cached."""
    config = LlamaConfig(**SMALL | {"vocab_size": vocabulary} | settings)
    return LlamaForCausalLM(config)


def bloom(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers with ALiBi. Its embeddings are tied, so it takes larger weights to keep it from repeating itself."""
    config = BloomConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 1.0,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PAD,
        }
        | settings
    )
    return BloomForCausalLM(config)


def qwen3(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers with norms of queries and keys, and heads that are wider than their share."""
    return Qwen3ForCausalLM(Qwen3Config(**SMALL | {"vocab_size": vocabulary, "head_dim": 16} | settings))


def mistral(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers that look back at 24 tokens only."""
    return MistralForCausalLM(MistralConfig(**SMALL | {"vocab_size": vocabulary, "sliding_window": 24} | settings))


def mamba(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers of states, no attention."""
    small = {name: value for name, value in SMALL.items() if "heads" not in name and "position" not in name}
    return MambaForCausalLM(MambaConfig(**small | {"vocab_size": vocabulary, "initializer_range": 1.0} | settings))


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


def save(
    folder: Path, build: Callable[..., PreTrainedModel], *, seed: int = 0, chat: bool = True, **settings: Any
) -> Path:
    """A model folder as the hub has them: config, safetensors, tokenizer, generation config."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(CHAT_TEMPLATE if chat else None)
    build(len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Model:
    """A loaded model, and the batches made of it."""

    def __init__(self, folder: Path, batch_size: int | None = 8, device: str = "cpu") -> None:
        self.tokenizer = HfTokenizer(str(folder))
        self.device = torch.device(device)
        loading.prepare_transformers()
        attention = architectures.attention_arguments(read_config(str(folder)))
        self.model = AutoModelForCausalLM.from_pretrained(folder, **attention).eval().to(self.device)
        self._exact: PreTrainedModel | None = None
        self.signs = SignsOfLife()
        loaded = LoadedModel(self.model, self.tokenizer, self.device)
        self.batches = StaticBatches(loaded, BatchSizing(batch_size), self.signs)

    def run(self, prompts: Sequence[Prompt]) -> list[Batch]:
        return list(self.batches.run(iter(prompts), lambda: False))

    def texts(self, prompts: Sequence[Prompt]) -> dict[str, Generation]:
        return {generation.id: generation for batch in self.run(prompts) for generation in batch.generations}

    def alone(self, prompt: Prompt) -> list[int]:
        """What Transformers itself generates for one prompt, without padding and without anything of ours."""
        ids = torch.tensor([list(prompt.tokens)], device=self.device)
        config = GenerationConfig(
            max_new_tokens=prompt.params.max_new_tokens, do_sample=False, eos_token_id=self.tokenizer.end_tokens
        )
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, pad_token_id=0)
        return output[0, len(prompt.tokens) :].tolist()

    def chosen(self, prompt: Prompt) -> list[int]:
        """The tokens of one prompt, greedy or sampled, past its stop texts. A whole forward each, without a cache."""
        params, seed = prompt.params, prompt.row_seed - (prompt.row_seed >> 63 << 64)
        tokens: list[int] = []
        while len(tokens) < params.max_new_tokens and not (tokens and tokens[-1] in self.tokenizer.end_tokens):
            with torch.inference_mode():
                ids = torch.tensor([[*prompt.tokens, *tokens]], device=self.device)
                logits = self.model(ids, use_cache=False).logits[:, -1].float()
            token = int(logits.argmax())
            if params.temperature > 0:
                numbers = [[params.temperature], [params.top_p]]
                temperature, top_p = torch.tensor(numbers, dtype=torch.float64, device=self.device)
                seeds, steps, top_k = torch.tensor([[seed], [len(tokens)], [params.top_k]], device=self.device)
                tensors = SamplingTensors(temperature, top_k, params.top_k, top_p)
                token = int(sample(logits, seeds, steps, tensors))
            tokens.append(token)
        return tokens

    def logprobs(self, prompt: Prompt, tokens: Sequence[int]) -> list[float]:
        """Those of `tokens` behind `prompt`, in one forward of float64: float32 can be off by more than 1e-4."""
        if self._exact is None:
            self._exact = copy.deepcopy(self.model).double()
            self._exact.set_experts_implementation("eager")  # torch's grouped product knows no float64
        with torch.inference_mode():
            ids = torch.tensor([[*prompt.tokens, *tokens]], device=self.device)
            logits = self._exact(ids, use_cache=False).logits[0, len(prompt.tokens) - 1 : -1]
            found: list[float] = logits.log_softmax(-1).gather(1, ids[0, len(prompt.tokens) :, None])[:, 0].tolist()
        return found

    def check_logprobs(self, prompts: Sequence[Prompt], found: Mapping[str, Generation]) -> None:
        """They are there for the prompts that ask, one for each generated token, and what `logprobs` says."""
        for prompt in prompts:
            generation = found[prompt.id]
            if not prompt.params.logprobs:
                assert generation.logprobs is None
                continue
            tokens, stop = self.chosen(prompt), prompt.params.stop
            count = generation.generated_tokens
            assert count == len(tokens) or (stop and generation.finish_reason == "stop")
            assert generation.text == cut(self.tokenizer.decode(tokens[:count]), stop)
            assert generation.logprobs is not None
            expected = self.logprobs(prompt, tokens[:count])
            apart = [abs(a - b) for a, b in zip(generation.logprobs, expected, strict=True)]
            # BLOOM's own forward of one row alone, in float32, is off by 1.2e-4 on one of these tokens.
            assert max(apart) < 3e-4, prompt.id


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def asking_prompts(count: int = 24) -> list[Prompt]:
    """Greedy and sampled ones, with stop texts and without; most of them ask for logprobs."""
    made = random_prompts(count)
    for number, prompt in enumerate(made):
        kinds: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.5, "top_k": 30}]
        stop = ("a", "é") if number % 5 == 0 else ()
        most = prompt.params.max_new_tokens
        prompt.params = SamplingParams(max_new_tokens=most, stop=stop, logprobs=number % 4 != 2, **kinds[number % 3])
    return made


def random_prompts(count: int, longest: int = 60, **params: Any) -> list[Prompt]:
    """Prompts of 1 to `longest` tokens, each with a length of its own to generate."""
    source = random.Random(7)
    return [
        Prompt(
            number,
            f"row-{number}",
            number + 1,
            "",
            [BEGIN, *(source.randrange(4, 260) for _ in range(source.randrange(longest)))],
            SamplingParams(**{"max_new_tokens": source.randrange(1, 40)} | params),
            {"column": number},
        )
        for number in range(count)
    ]
