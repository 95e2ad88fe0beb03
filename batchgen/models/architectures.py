"""What Transformers has for a kind of model: the class that loads it, and whether its rows may be padded."""

from __future__ import annotations

from typing import Any

from batchgen.models.module_list import import_auto_classes

_auto = import_auto_classes()

# Kinds whose rows change when they are padded: they count positions from the left end of the row, padded or not, look
# at the padding, or let it into a state. A batch holds rows of equal length alone. scripts/sweep shows it of each.
_UNPADDED = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "deepseek_v4",
        "git",
        "kosmos-2.5",
        "marian",
        "mbart",
        "mvp",
        "paligemma",
        "pegasus",
        "plbart",
        "prophetnet",
        "recurrent_gemma",
        "rwkv",
        "trocr",
        "unlimited_ocr",
        "whisper",
        "xlnet",
        "xlstm",
    }
)

_FROM_A_PICTURE = "Transformers generates with it from a picture alone, and batchgen gives rows of text"
_WITH_AN_ENCODER = "it answers a text that an encoder reads and does not continue one, and batchgen runs models that do"
# Why models of these kinds answer no rows of text.
_REFUSED = {
    **dict.fromkeys(("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2"), _FROM_A_PICTURE),
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop"), _WITH_AN_ENCODER),
    "vision-encoder-decoder": _WITH_AN_ENCODER,
    "blt": "its config does not say how many layers it has, without which Transformers makes no cache for it",
    "diffusion_gemma": "it fills in blocks of text, and Transformers does not let it continue a text token by token",
    "janus": "its `generate` in Transformers passes no logits processors on: no row could be sampled or checked",
    "pi0": "it moves a robot, and generates no text",
    "reformer": "its attention groups tokens by random numbers, so that no text of it can be generated twice, and its "
    "cache in Transformers does not know padding",
    "shieldgemma2": "it judges pictures, and generates no text",
}

# Kinds that Transformers does not load while ZeRO shards each weight as it is made: their modules look at weights that
# are not there yet, or the files hold them in other pieces than the model does.
_UNSHARDED = frozenset(
    ("deepseek_v4", "emu3", "marian", "molmo2", "pegasus", "qwen3_vl_moe", "roformer", "rwkv", "xlstm", "youtu")
)

# Types of rotary positions whose frequencies Transformers takes, beyond the original context, from the longest row.
OF_THE_LONGEST = ("longrope", "dynamic")

# Kinds whose rows have a state in the model's modules, beside the cache that `generate` makes for them.
_STATE_OUTSIDE_CACHE = frozenset(("recurrent_gemma",))


def why_refused(config: Any) -> str:
    """Why a model of this config answers no rows of text; "" if it does."""
    return _REFUSED.get(config.model_type, "")


def why_not_sharded(config: Any) -> str:
    """Why ZeRO cannot shard a model of this config; "" if it can."""
    if getattr(config, "quantization_config", None):
        return (
            "the weights of this model are packed (quantization_config in config.json), and Transformers does not load "
            "such weights while they are sharded; use --engine accelerate, or the model in another precision"
        )
    if not {config.model_type, config.get_text_config().model_type} & _UNSHARDED:
        return ""
    return (
        f"Transformers does not load models of type {config.model_type} while their weights are sharded; "
        "use --engine accelerate"
    )


def most_padded_tokens(config: Any) -> int | None:
    """Up to how many tokens, prompt and new ones, rows of different lengths can be in one batch; None: any number.

    Beyond it a batch holds rows of equal length alone, which count the same positions at each step.
    """
    text = config.get_text_config()
    if {config.model_type, text.model_type} & _UNPADDED:
        return 0
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in OF_THE_LONGEST:
            return int(part.get("original_max_position_embeddings") or text.max_position_embeddings)
    return None


def holds_state_in_cache(config: Any) -> bool:
    """Returns whether all that a model of this config knows of a row is in the cache that `generate` gives it."""
    return not {config.model_type, config.get_text_config().model_type} & _STATE_OUTSIDE_CACHE


def attention_arguments(config: Any) -> dict[str, str]:
    """What a loader of Transformers has to be told of a model's attention; nothing: Transformers chooses.

    Of Gemma 2, Transformers up to 5.17 (5.23 no longer) chooses SDPA, which leaves out the cap of the scores without a
    word, and gives another text.
    """
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if is_capped else {}


def auto_class(config: Any) -> Any:
    """The automatic class of Transformers that loads a model of this config whole; None: there is none.

    A model that sees is loaded with what it sees with: its text is what it says to rows without pictures. Where
    Transformers also knows a class for the text alone, the class that the model's files were written by is taken, since
    the other may look for weights under other names.
    """
    sees = type(config) in _auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) not in _auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return _auto.AutoModelForImageTextToText if sees else None
    written_by = getattr(config, "architectures", None) or [""]
    if sees and _auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type) == written_by[0]:
        return _auto.AutoModelForImageTextToText
    return _auto.AutoModelForCausalLM


def model_class(config: Any) -> Any:
    """The class itself; imports the module that it is in. None: there is none."""
    mapping = {
        _auto.AutoModelForCausalLM: _auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        _auto.AutoModelForImageTextToText: _auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    found = auto_class(config)
    return None if found is None else mapping[found][type(config)]
