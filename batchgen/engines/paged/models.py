"""Which models are covered, and how their attention is exchanged.

Models of Transformers ask its attention interface for a function by the name in their config, so most are covered by
registering one. Each kind in `COVERED` is tested against `generate`; any other is refused, since an attention with a
detail that ours does not know (a cap on scores, sinks, several kinds of layers) would give wrong text in silence.
BLOOM does not use the interface: its attention modules become our own class.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel

from batchgen.engine import EngineError
from batchgen.engines.paged import linear
from batchgen.engines.paged.attention import attend
from batchgen.models.architectures import OF_THE_LONGEST

NAME = "batchgen_paged"
COVERED = ("bloom", "llama", "mistral", "qwen2", "qwen3")


def covers(config: Any) -> bool:
    """Whether models of this config are covered."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    known = str(config.model_type) in COVERED and kinds <= {"full_attention", "sliding_attention"}
    return known and _positions(config) not in OF_THE_LONGEST


def _positions(config: Any) -> str:
    """The type of the rotary positions."""
    return str((getattr(config.get_text_config(), "rope_parameters", None) or {}).get("rope_type", "default"))


def check(config: Any) -> None:
    """Raises EngineError if models of this config are not covered; the message says what to use instead."""
    if not covers(config):
        if _positions(config) in OF_THE_LONGEST:
            raise EngineError(
                f"--engine paged does not cover rotary positions of type {_positions(config)}, which hang on the "
                "longest row of a step; use --engine accelerate"
            )
        raise EngineError(
            f"--engine paged does not cover models of type {config.model_type} (it does {', '.join(COVERED)}); "
            "use --engine accelerate"
        )


def exchange(model: Any, place: int = 0, ranks: int = 1) -> list[torch.nn.Module]:
    """Gives the attention of a loaded, covered model to `attention.attend` and its products to `products`; its layers,
    in order. Their products of the same input become one.

    Args:
        place, ranks: of those that share the model: `model` is that one's share, with as many of the heads as each.
    """
    text = model.config.get_text_config()
    layers = list(model.transformer.h if text.model_type == "bloom" else model.model.layers)
    if text.model_type == "bloom":
        model.transformer.__class__ = _PagedBloomModel
        slopes = alibi_slopes(text.num_attention_heads).chunk(ranks)[place].to(model.device)
        for layer in layers:
            layer.self_attention.__class__ = _PagedBloomAttention
            layer.self_attention.slopes = slopes
            # The same function; theirs comes with a backward pass, and rounds after each of its eight operations.
            layer.mlp.gelu_impl = torch.nn.GELU(approximate="tanh")
    for number, layer in enumerate(layers):
        module = layer.self_attention if text.model_type == "bloom" else layer.self_attn
        # A number would be a constant to the compiler, which would then compile each layer anew.
        module.layer_number = torch.tensor([number])
        linear.join(module, ("q_proj", "k_proj", "v_proj"))
        linear.join(layer.mlp, ("gate_proj", "up_proj"))
        linear.exchange(layer)
    linear.exchange(model.get_output_embeddings())
    model.config._attn_implementation = NAME
    return layers


def alibi_slopes(heads: int) -> torch.Tensor:
    """[heads], of "Train Short, Test Long" (Press et al., 2022): a geometric sequence from 2^(-8/n) down by the same
    factor for n a power of two; for other counts, every second one of the next longer sequence follows."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (place + 1) / power) for place in range(power)]
    slopes += [2 ** (-4 * (2 * place + 1) / power) for place in range(heads - power)]
    return torch.tensor(slopes)


def _interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    return attend(query, key, value, module.layer_number, scaling, sliding_window or 0, None), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _interface)


class _PagedBloomModel(BloomModel):  # type: ignore[no-untyped-call]
    """BLOOM without the tensor of position biases, which `attention` has no use for."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        for layer in self.h:
            hidden = layer(hidden, alibi=None, attention_mask=None)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(hidden))


class _PagedBloomAttention(BloomAttention):
    """BLOOM's attention with its biases worked out where the scores are."""

    layer_number: torch.Tensor
    slopes: torch.Tensor

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        context = attend(query, key, value, self.layer_number, self.inv_norm_factor, 0, self.slopes)
        return residual + self.dense(context.flatten(2)), None
