"""DeepSpeed's AutoTP over weights that still lie in their files: each rank's shard as views, of which nothing is read.

`from_pretrained` in the files' own type, on the CPU, gives parameters that are mapped files; AutoTP with
`keep_module_on_host` cuts them into views. So a whole model costs no memory until `copy_weights` copies the views, one
after the other, and then only this rank's part is read.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from batchgen.engine import EngineError, Placement
from batchgen.models import footprint
from batchgen.tensor_parallel.experts import Way, find_largest_share, keep_routers_whole, split_experts
from batchgen.tensor_parallel.fused import split_fused
from batchgen.tensor_parallel.group import list_divisors
from batchgen.tensor_parallel.heads import split_heads
from batchgen.tensor_parallel.layers import ScaledEmbedding

# Kinds of model, as config.json has them, whose logits have been compared with those of one process
# (tests/tensor_parallel/families.py). AutoTP goes by names of layers, and splits others wrong without a word.
# fmt: off
PROVEN = frozenset({
    "apertus", "arcee", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5",
    "ernie4_5_moe", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe",
    "llama", "minimax_m2", "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe",
    "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
})
# fmt: on

_GRAIN = 64  # matrix products are fastest where each rank's part is a multiple of it: DeepSpeed's own default


def max_ranks(config: Any) -> int:
    """Returns over how many ranks the model can be split: each needs a key/value head of its own."""
    return footprint.cached_heads(config)[0]


def check_split(config: Any, ranks: int, *, evenly: bool = False) -> None:
    """Checks that the model of `config` can be split over `ranks` ranks.

    Args:
        evenly: each rank has to have as many key/value heads as the others.

    Raises:
        EngineError: it cannot; the message says what can be done.
    """
    kind = config.model_type
    if kind not in PROVEN or (kind == "falcon" and not config.new_decoder_architecture):
        raise EngineError(
            f"models of type {kind} have not been shown to generate the right text when DeepSpeed's AutoTP splits "
            "them. --engine ds-zero shards any model; --tp 1 keeps it whole"
        )
    most = max_ranks(config)
    if ranks > most:
        able = "1" if most == 1 else f"1 to {most}"
        raise EngineError(
            f"tp={ranks}: this model has {most} key/value head{'s' if most > 1 else ''}, and each rank of a group "
            f"needs one of its own: tp can be {able}. More ranks can work side by side, as several groups, or share "
            "the weights with --engine ds-zero"
        )
    if evenly and most % ranks:
        raise EngineError(
            f"tp={ranks}: this model has {most} key/value heads, of which each rank of --engine paged takes as many as "
            f"the others: tp can be {list_divisors(most)}. --engine ds-inference splits unevenly, too"
        )


def placements(
    config: Any, weights: Any, gpus: int, *, evenly: bool = False, whole: tuple[str, ...] = ("tp=1",)
) -> list[Placement]:
    """Returns the ways to hold a model of `config` by groups of ranks on `gpus` GPUs, for each size of a group.

    Args:
        weights: its `batchgen.models.parameters.Parameters`.
        whole: the settings of ranks with a whole model each.
    """
    return [
        Placement(whole if tp == 1 else (f"tp={tp}",), gpus, gpus // tp, _count_share(config, weights, tp), sharing=tp)
        for tp in range(1, gpus + 1)
        if gpus % tp == 0 and (tp == 1 or _can_split(config, tp, evenly))
    ]


def _count_share(config: Any, weights: Any, ranks: int) -> int:
    """Returns the bytes of the largest share: of experts as they are shared out, of all else an even part."""
    share = 1 / ranks
    for name, parameter in weights.by_name.items():
        if parameter.token_share < 1 and name.endswith("down_proj"):
            count = parameter.shape[0]
            inner = math.prod(parameter.shape) // (count * config.get_text_config().hidden_size)
            share = max(share, find_largest_share(count, inner, ranks))
    elements: float = (weights.total - weights.experts) / ranks + weights.experts * share
    return math.ceil(elements) * int(weights.dtype.itemsize)


def _can_split(config: Any, ranks: int, evenly: bool) -> bool:
    try:
        check_split(config, ranks, evenly=evenly)
    except EngineError:
        return False
    return True


def split(model: Any, group: dist.ProcessGroup, experts: Way | None = None) -> None:
    """Replaces the layers of `model`, in place, by those of this rank's share; their weights are views of the old ones.

    Embeddings and the output matrix are cut by words, so that a tied one is held once, and a rank's share of a logit
    is a whole product: the ranks gather logits and do not add them up.

    Args:
        experts: how those of a mixture are shared out; None: whichever way is forecast to be faster.

    Raises:
        EngineError: AutoTP does not know how to split this kind of model.
    """
    import deepspeed.comm
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.inference.engine import InferenceEngine
    from deepspeed.module_inject.layers import TensorParallel_Layer
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    # Warning: a private method of DeepSpeed's engine is replaced. If a new version calls it by another name, all
    # weights are read and rounded to float32: the text changes by rounding, and the memory is several times as much.
    class WeightsStay(InferenceEngine):  # type: ignore[misc]
        """AutoTP alone."""

        def _convert_to_dtype(self, config: Any) -> None:
            """Would read all weights, and round buffers that Transformers keeps in float32."""

    # DeepSpeed logs each layer.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.comm.init_distributed(verbose=False)  # torch's is there: DeepSpeed takes it for its own
    TensorParallel_Layer.set_keep_module_on_host(True)
    size = dist.get_world_size(group)
    grain = _choose_grain(model.config, size)
    meta = AutoTPMeta.from_model_config(model.config, grain)
    _split_what_autotp_does_not(model, group, meta)
    config = DeepSpeedInferenceConfig(
        dtype=torch.float32,
        # The groups that DeepSpeed makes itself are always the first ranks of the world.
        tensor_parallel={"tp_size": size, "tp_group": group, "mpu": _ModelParallelUnit(group), "tp_grain_size": grain},
        keep_module_on_host=True,
    )
    if model.config.model_type == "bloom":
        model.register_forward_pre_hook(_add_mask, with_kwargs=True)
    try:
        WeightsStay(model, config)
    except AssertionError as error:
        raise EngineError(
            f"DeepSpeed's AutoTP cannot split {type(model).__name__}: {error}. --engine ds-zero shards any model"
        ) from error
    split_experts(model, group, experts)
    _replace_forwards(model, group)


def _split_what_autotp_does_not(model: Any, group: dist.ProcessGroup, meta: Any) -> None:
    """Splits what AutoTP leaves whole or cuts wrong; `meta` is DeepSpeed's `AutoTPMeta` of the model."""
    _split_vocabulary(model, group, meta)
    split_fused(model, group, meta)
    split_heads(model, group, meta)
    keep_routers_whole(model)
    if model.config.model_type.startswith("hunyuan"):
        _split_hunyuan(model, group, meta)


def _replace_forwards(model: Any, group: dist.ProcessGroup) -> None:
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    # Warning: the forward of DeepSpeed's layers is replaced, object by object. Theirs goes through autograd's functions
    # and DeepSpeed's own communication, which is twice the Python of a step. If a new version of DeepSpeed computes
    # something else in them (a scale, another order of the weight), this does not, and the text is wrong without an
    # error: tests/tensor_parallel/test_families.py compares the logits with those of one process.
    for module in model.modules():
        if type(module).forward is LinearAllreduce.forward:
            module.forward = partial(_forward_all_reduce, module, group)
        elif type(module).forward is LinearLayer.forward and not module.gather_output:
            module.forward = partial(_forward_linear, module)


def _forward_linear(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    return functional.linear(inputs, layer.weight, layer.bias)


def _forward_all_reduce(layer: Any, group: dist.ProcessGroup, inputs: torch.Tensor) -> torch.Tensor:
    output = functional.linear(inputs, layer.weight)
    dist.all_reduce(output, group=group)
    return output if layer.bias is None else output + layer.bias


def _split_hunyuan(model: Any, group: dist.ProcessGroup, meta: Any) -> None:
    """Splits the layers that AutoTP would split otherwise: it takes any model with "Yuan" in its name for Yuan."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    for module in list(model.modules()):
        if isinstance(getattr(module, "v_proj", None), torch.nn.Linear):
            module.v_proj = LinearLayer(module.v_proj, group, name="self_attn.v_proj", tp_meta=meta)
            module.o_proj = LinearAllreduce(module.o_proj, group, name="self_attn.o_proj", tp_meta=meta)


def _add_mask(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives BLOOM a mask where Transformers leaves it out, as it does where nothing is padded: without one, BLOOM
    makes the biases of all heads, past what DeepSpeed has put in the way for those of this rank."""
    if named.get("attention_mask") is None and isinstance(ids := named.get("input_ids"), torch.Tensor):
        cache = named.get("past_key_values")
        before = cache.get_seq_length() if cache is not None else 0
        named["attention_mask"] = ids.new_ones(ids.shape[0], before + ids.shape[1])
    return arguments, named


class _ModelParallelUnit:
    """The object that DeepSpeed asks which ranks share a model."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group


def _choose_grain(config: Any, size: int) -> int:
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return _GRAIN if inner >= _GRAIN * size else 1


def _split_vocabulary(model: Any, group: dist.ProcessGroup, meta: Any) -> None:
    from deepspeed.module_inject.layers import LinearLayer, VocabParallelEmbedding

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    cut: Any = None
    plain = type(embedding).forward is torch.nn.Embedding.forward
    scale = None if plain else getattr(embedding, "embed_scale", None)
    if isinstance(scale, torch.Tensor):  # Gemma's: an embedding times a number
        embedding, plain = _make_plain_embedding(embedding), True
    if tied and not plain:
        return  # DeepSpeed's own way holds a tied weight one and a bit times, but is right
    if isinstance(head, torch.nn.Linear):
        cut = LinearLayer(head, group, name="lm_head", gather_output=True, tp_meta=meta)
        model.set_output_embeddings(cut)
    if not plain or (tied and cut is None):
        return  # DeepSpeed's layer looks words up in no other way
    if tied:
        cut.vocab_start_index = sum(cut._partition_sizes[: cut.tp_index])
        cut.vocab_end_index = cut.vocab_start_index + cut._partition_sizes[cut.tp_index]
    # "lm_head": sizes depend on the name, and the two have to agree.
    words = VocabParallelEmbedding(
        embedding, group, name="lm_head", tied_vocab_parallel_linear=cut if tied else None, tp_meta=meta
    )
    model.set_input_embeddings(ScaledEmbedding(words, scale) if isinstance(scale, torch.Tensor) else words)


def _make_plain_embedding(embedding: Any) -> torch.nn.Embedding:
    """Returns an embedding with the same vectors, as they are."""
    plain = torch.nn.Embedding(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
    plain.weight = embedding.weight
    return plain
