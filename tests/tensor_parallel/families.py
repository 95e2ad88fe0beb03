"""Every kind of model that `ds-inference` splits, tiny and random: logits of several ranks against those of one.

    torchrun --nproc-per-node N -m tests.tensor_parallel.families

Rank 0 prints a JSON object: by name the largest difference of two logits, in standard deviations, the share of the
parameters that it holds, and whether the generated tokens are equal; or the sentence with which a split was refused.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from batchgen.engine import EngineError
from batchgen.tensor_parallel import check_split, copy_weights, process_group, split

_SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
_LLAMA_LIKE = {**_SIZES, "num_key_value_heads": 4, "intermediate_size": 128, "initializer_range": 0.3}
_GPT_LIKE = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 8, "initializer_range": 0.3}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SHARED = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
_IN_TURN = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_NO_ENDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

# By kind of model; behind a space, what is tried of it besides.
SHAPES: dict[str, dict[str, Any]] = {
    "apertus": _LLAMA_LIKE,
    "arcee": _LLAMA_LIKE,
    "bloom": {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 8, "initializer_range": 0.3},
    "codegen": _GPT_LIKE,
    "cohere": _LLAMA_LIKE,
    "cohere norms": {**_LLAMA_LIKE, "use_qk_norm": True},
    "cohere2": {**_LLAMA_LIKE, **_IN_TURN, "logit_scale": 0.25},
    "deepseek_v2": {**_LLAMA_LIKE, **_SHARED, **_LATENT, "num_key_value_heads": 8, "routed_scaling_factor": 2.0},
    "deepseek_v3": {**_LLAMA_LIKE, **_SHARED, **_LATENT, "num_key_value_heads": 8, "topk_group": 1, "q_lora_rank": 24},
    "ernie4_5": {**_LLAMA_LIKE, "head_dim": 16},
    "ernie4_5_moe": {**_LLAMA_LIKE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 128},
    "exaone4": {**_LLAMA_LIKE, **_IN_TURN},
    "falcon": {**_SIZES, "initializer_range": 0.3, "new_decoder_architecture": True, "num_kv_heads": 4},
    "gemma": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {**_LLAMA_LIKE, **_IN_TURN, "head_dim": 16},
    "gemma3_text": {**_LLAMA_LIKE, **_IN_TURN, "head_dim": 16, "query_pre_attn_scalar": 20},
    "glm": {**_LLAMA_LIKE, "head_dim": 8, "attention_bias": True},
    "glm4": {**_LLAMA_LIKE, "head_dim": 8, "attention_bias": True},
    "glm4_moe": {**_LLAMA_LIKE, **_SHARED, "topk_group": 1, "use_qk_norm": True, "head_dim": 16},
    "gpt_neo": {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 8,
        "initializer_range": 0.3,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": {**_SIZES, "intermediate_size": 128, "initializer_range": 0.3},
    "gpt_oss": {**_LLAMA_LIKE, **_IN_TURN, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "gpt_oss split": {**_LLAMA_LIKE, **_IN_TURN, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "gptj": _GPT_LIKE,
    "granite": {**_LLAMA_LIKE, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "granitemoe": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {**_LLAMA_LIKE, "head_dim": 8},
    "hunyuan_v1_dense": {**_LLAMA_LIKE, "head_dim": 16},
    "hunyuan_v1_moe": {**_LLAMA_LIKE, "head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "llama": _LLAMA_LIKE,
    "minimax_m2": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "ministral": {**_LLAMA_LIKE, **_IN_TURN, "head_dim": 16},
    "mistral": _LLAMA_LIKE,
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4},
    "mpt": {"vocab_size": 300, "d_model": 64, "n_layers": 2, "n_heads": 8, "initializer_range": 0.3},
    "nemotron": {**_LLAMA_LIKE, "head_dim": 8},
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "olmo3": {**_LLAMA_LIKE, **_IN_TURN},
    "olmoe": {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.3},
    "phi": {**_SIZES, "intermediate_size": 128, "initializer_range": 0.3},
    "phi3": _LLAMA_LIKE,
    "phimoe": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _LLAMA_LIKE,
    "qwen2_moe": {**_LLAMA_LIKE, **_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "qwen3_moe": {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 16},
    "qwen3_moe split": {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 16},
    "qwen3_moe spread": {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 16},
    "seed_oss": {**_LLAMA_LIKE, "head_dim": 16},
    "smollm3": {**_LLAMA_LIKE, "no_rope_layers": [1, 0]},
    "stablelm": _LLAMA_LIKE,
    "stablelm norms": {**_LLAMA_LIKE, "qk_layernorm": True},
    "starcoder2": _LLAMA_LIKE,
    # Not among those that are split: what happens to them then.
    "gpt2": {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 8},
}
_TIED = ("bloom", "gemma", "gemma2", "gemma3_text", "cohere2", "qwen2", "opt", "smollm3")


def compared(name: str, scratch: str) -> dict[str, object]:
    """What the ranks make of a model of that name in `SHAPES`; `scratch` is an empty folder."""
    torch.manual_seed(0)
    kind, _, tried = name.partition(" ")
    config = AutoConfig.for_model(kind, **SHAPES[name], **_NO_ENDS)
    config.tie_word_embeddings = kind in _TIED
    whole = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in whole.parameters():  # norms, biases and sinks that matter, and differ from head to head
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(4, 299, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    try:
        check_split(config, dist.get_world_size())
    except EngineError as error:
        return {"refused": str(error)}
    mine = copy.deepcopy(whole)
    group = dist.group.WORLD
    assert group is not None
    split(mine, group, tried if tried in ("split", "spread") else None)
    copy_weights(mine, scratch, torch.device("cpu"), torch.float32)
    furthest = 0.0
    equal = True
    with torch.no_grad():
        for given in (mask, None):
            expected = whole(input_ids=ids, attention_mask=given).logits
            found = mine(input_ids=ids, attention_mask=given).logits
            seen = slice(None) if given is None else given.bool()
            furthest = max(furthest, float((found - expected)[seen].abs().max() / expected[seen].std()))
            rows = [model.generate(ids, attention_mask=given, **settings) for model in (whole, mine)]
            equal &= torch.equal(*rows)
    held, all_of_it = (sum(p.numel() for p in model.parameters()) for model in (mine, whole))
    return {"furthest": furthest, "share": held / all_of_it, "equal": equal}


def main(kinds: list[str]) -> None:
    """Prints what rank 0 found."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    dist.init_process_group("gloo")
    process_group.disable_shared_memory_all_reduce()
    with tempfile.TemporaryDirectory() as scratch:
        found = {kind: compared(kind, scratch) for kind in kinds or SHAPES}
    if dist.get_rank() == 0:
        sys.stdout.write(f"\n{json.dumps(found)}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", "0")
    main(sys.argv[1:])
