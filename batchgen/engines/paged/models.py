"""Which models are covered, and how they are patched to attend over pages.

Models of Transformers ask its attention interface for a function by the name in their config, so most are covered by
registering one. Each kind in `COVERED` is tested against `generate`; any other is refused, since an attention with a
detail that ours does not know (a cap on scores, sinks, several kinds of layers) would give wrong text in silence.
BLOOM does not use the interface: its attention modules get a class of our own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel

from batchgen.engine import EngineError, Peers
from batchgen.engines.paged import linear
from batchgen.engines.paged.attention import attend
from batchgen.engines.paged.layout import AttentionShape
from batchgen.models.architectures import OF_THE_LONGEST

NAME = "batchgen_paged"
COVERED = ("bloom", "llama", "mistral", "qwen2", "qwen3")


def covers(config: Any) -> bool:
    """Whether models of this config are covered."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_only_these = kinds <= {"full_attention", "sliding_attention"}
    return str(config.model_type) in COVERED and has_only_these and _rope_type(config) not in OF_THE_LONGEST


def _rope_type(config: Any) -> str:
    """The type of the model's rotary positions, as Transformers calls it."""
    return str((getattr(config.get_text_config(), "rope_parameters", None) or {}).get("rope_type", "default"))


def check(config: Any) -> None:
    """Raises EngineError if models of this config are not covered; the message says what to use instead."""
    if not covers(config):
        if _rope_type(config) in OF_THE_LONGEST:
            raise EngineError(
                f"--engine paged does not cover rotary positions of type {_rope_type(config)}, which hang on the "
                "longest row of a step; use --engine accelerate"
            )
        raise EngineError(
            f"--engine paged does not cover models of type {config.model_type} (it does {', '.join(COVERED)}); "
            "use --engine accelerate"
        )


# Warning: `patch` changes modules and a config that Transformers has made, and this module registers an attention
# function there.
#
# Why: the tokens of a step belong to many sequences, and their keys and values to pages. No interface of Transformers
# has room for that, so its attention asks `attention.attend`, which finds the layout of the step by itself.
#
# What breaks:
# - `ALL_ATTENTION_FUNCTIONS.register` and `config._attn_implementation`: a model whose attention does not ask that
#   registry, or passes something that `_attention_interface` drops (a cap on scores, sinks), gives wrong text without
#   an error. That is why only the kinds in `COVERED` are let in, each of them tested against `generate`.
# - `__class__` of BLOOM's model and attention modules: our `forward` replaces theirs, and uses their attributes
#   (word_embeddings_layernorm, query_key_value, inv_norm_factor, _reshape, dense). A version of Transformers that
#   renames one raises AttributeError; one that changes what they mean gives wrong text.
# - `mlp.gelu_impl` of BLOOM is replaced by torch's GELU, which rounds once.
# - A patched model runs inside `layout.lay_out`, or as plain causal attention over one sequence. `generate`, padding
#   masks and caches of Transformers do not work with it any more, and it cannot be patched back.


def patch(model: Any, peers: Peers) -> list[torch.nn.Module]:
    """Gives the attention of a loaded, covered model to `attention.attend`, and its linear layers to `linear`.

    Args:
        peers: the ranks that hold the model together; `model` is this one's shard, with as many heads as each has.

    Returns:
        The model's layers, in order.
    """
    text = model.config.get_text_config()
    is_bloom = text.model_type == "bloom"
    layers = list(model.transformer.h if is_bloom else model.model.layers)
    if is_bloom:
        model.transformer.__class__ = _PagedBloomModel
        slopes = compute_alibi_slopes(text.num_attention_heads).chunk(peers.count)[peers.place].to(model.device)
        for layer in layers:
            layer.self_attention.__class__ = _PagedBloomAttention
            layer.self_attention.slopes = slopes
            # The same function; theirs comes with a backward pass, and rounds after each of its eight operations.
            layer.mlp.gelu_impl = torch.nn.GELU(approximate="tanh")
    for number, layer in enumerate(layers):
        module = layer.self_attention if is_bloom else layer.self_attn
        # A number would be a constant to the compiler, which would then compile each layer anew.
        module.layer_number = torch.tensor([number])
        linear.join_layers(module, ("q_proj", "k_proj", "v_proj"))
        linear.join_layers(layer.mlp, ("gate_proj", "up_proj"))
        linear.replace_layers(layer)
    linear.replace_layers(model.get_output_embeddings())
    model.config._attn_implementation = NAME
    return layers


def compute_alibi_slopes(heads: int) -> torch.Tensor:
    """The slopes of "Train Short, Test Long" (Press et al., 2022), [heads]: a geometric sequence from 2^(-8/n) down by
    the same factor for n a power of two; for other counts, every second one of the next longer sequence follows."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (place + 1) / power) for place in range(power)]
    slopes += [2 ** (-4 * (2 * place + 1) / power) for place in range(heads - power)]
    return torch.tensor(slopes)


def _attention_interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What Transformers calls in each layer; the signature is theirs."""
    return attend(query, key, value, module.layer_number, AttentionShape(scaling, sliding_window or 0)), None


# Warning: for the whole process. The function serves patched models alone (see above `patch`): others keep the name of
# their own attention in their config, and must never be given this one.
ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_interface)


class _PagedBloomModel(BloomModel):  # type: ignore[no-untyped-call]
    """BLOOM without the tensor of position biases, which `attention` does not need."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        for layer in self.h:
            hidden = layer(hidden, alibi=None, attention_mask=None)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(hidden))


class _PagedBloomAttention(BloomAttention):
    """BLOOM's attention, whose biases are worked out where the scores are."""

    layer_number: torch.Tensor
    slopes: torch.Tensor

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        shape = AttentionShape(self.inv_norm_factor, slopes=self.slopes)
        context = attend(query, key, value, self.layer_number, shape)
        return residual + self.dense(context.flatten(2)), None
