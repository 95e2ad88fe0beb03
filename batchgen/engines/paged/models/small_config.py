"""A config like another one, of a model that is small enough to be built and run in a second.

What attention sees stays: the size of a head, how many heads share a key, caps, scales, kinds of layers. What only
takes time goes: layers beyond the first of each kind, hidden sizes, the vocabulary. Windows are cut, so that short
prompts reach beyond them.
"""

from __future__ import annotations

import copy
from typing import Any

from batchgen.models.quantised import make_plain

WINDOW = 24  # tokens
ORIGINAL_CONTEXT = 32  # tokens, of models that were made for longer ones afterwards
VOCABULARY = 256
_INNER = 64
_FEW_HEADS = 4  # of keys
_MOST_LAYERS = 12
_INNER_SIZES = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size",
                "shared_expert_intermediate_size", "shared_intermediate_size", "expert_intermediate_size")  # fmt: skip
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "num_encoder_layers")
_FIRST_OF_A_KIND = ("first_k_dense_replace", "moe_layer_start_index", "decoder_sparse_step", "moe_layer_interval")


def shrink(config: Any, *, cuts_heads: bool = True) -> Any:
    """Returns the config of a small text model with the features of `config`.

    Args:
        cuts_heads: leave a few heads alone; of some families no model can be made then, since other sizes hang on it.
    """
    small = cut_layers(config, least=2)
    if cuts_heads:
        _cut_heads(small)
    _cut_sizes(small)
    small.vocab_size = min(small.vocab_size, VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    return small


def cut_layers(config: Any, least: int = 1) -> Any:
    """Returns the config of a text model with the first layers of `config` alone: one of each kind, and at least so
    many. All sizes stay."""
    text = copy.deepcopy(config.get_text_config())
    layers = _count_layers(text, least)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers:
            setattr(text, name, type(value)(value[:layers]))
    text.num_hidden_layers = layers
    return make_plain(text)


def shrink_whole(config: Any, text: Any) -> Any:
    """Returns a config of a model that sees, or hears: its text part is `text`, and its other parts have one layer."""
    small = make_plain(config)
    whole_text = small.get_text_config()
    for name in small.sub_configs:
        part = getattr(small, name, None)
        if part is whole_text:
            setattr(small, name, text)
        elif part is not None:
            for depth in _DEPTHS:
                if isinstance(getattr(part, depth, None), int):
                    setattr(part, depth, 1)
    return small


def _cut_heads(text: Any) -> None:
    """Leaves a few heads of keys, with as many heads of queries each as before, and a hidden size to match."""
    sizes = [getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")]
    heads, cached, hidden = (size if isinstance(size, int) else 0 for size in sizes)
    cached = cached or heads
    # Falcon has another name for its key heads, and uses it in one of its layouts alone.
    if not heads or not hidden or heads % cached or hidden % heads or getattr(text, "num_kv_heads", None):
        return
    # Biases of positions are computed otherwise where the number of heads is no power of two.
    few = _FEW_HEADS if cached & (cached - 1) == 0 else _FEW_HEADS + 2
    if cached > few:
        text.num_attention_heads = few * (heads // cached)
        if getattr(text, "num_key_value_heads", None):
            text.num_key_value_heads = few
        text.hidden_size = text.num_attention_heads * (hidden // heads)


def _count_layers(text: Any, least: int) -> int:
    """Returns how many of the first layers have one of each kind; at least `least`, if there are so many."""
    count: int = text.num_hidden_layers
    lists = [value for value in vars(text).values() if isinstance(value, (list, tuple)) and len(value) == count]
    kinds = list(zip(*[[str(each) for each in value] for value in lists], strict=True)) or [()] * count
    needed = max(least, max(kinds.index(kind) + 1 for kind in set(kinds)))
    for name in _FIRST_OF_A_KIND:
        given = getattr(text, name, None)
        if isinstance(given, int) and given < count:
            needed = max(needed, given + 1)
    return min(count, needed, _MOST_LAYERS)


def _cut_sizes(text: Any) -> None:
    """Makes a text config's hidden sizes small, and its windows short."""
    for name in _INNER_SIZES:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > _INNER:
            setattr(text, name, _INNER)
    context = getattr(text, "max_position_embeddings", None)
    window = getattr(text, "sliding_window", None)
    # A window as long as the context hides nothing, whether or not the model tells attention of it.
    if isinstance(window, int) and window > WINDOW and not (isinstance(context, int) and window >= context):
        text.sliding_window = WINDOW
    rope = getattr(text, "rope_parameters", None) or {}
    if "original_max_position_embeddings" in rope and rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = ORIGINAL_CONTEXT
