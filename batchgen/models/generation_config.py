"""The model author's own settings for generation: `generation_config.json` of a model folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from batchgen.engine import EngineError
from batchgen.models.definition.files import read_json
from batchgen.requests.recipe import Recipe
from batchgen.requests.refusal import Refused, sampling_params
from batchgen.types import SamplingParams

logger = logging.getLogger(__name__)

_FILE = "generation_config.json"

# What of it decides how a row is sampled: what vLLM takes of it and batchgen knows, whatever `do_sample` says there.
_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
TAKEN_LATER = ("min_p", "repetition_penalty")
"""Those of it that the first versions did not take: a run that began without them goes on without them."""
# A model whose author names one of these is meant to be sampled, at temperature 1 where none is named.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
# What changes answers and batchgen does not know, with the values that change nothing.
_NOT_KNOWN: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("encoder_repetition_penalty", "typical_p", "top_h", "length_penalty"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "num_return_sequences"), (1,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"), ([],)),
    **dict.fromkeys(("stop_strings", "sequence_bias", "constraints"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("watermarking_config", "dola_layers", "token_healing"), (False,)),
}


def read_generation_config(model: str) -> dict[str, object]:
    """What the file says, nulls left out; empty if there is no such file.

    Raises:
        ModelError: it cannot be read, or is no JSON object. The message names the file and the line.
    """
    values = read_json(Path(model) / "generation_config.json") or {}
    return {key: value for key, value in values.items() if value is not None}


def with_authors_sampling(recipe: Recipe, model: str, *, say: bool) -> Recipe:
    """`recipe` with the sampling that the model's author recommends, where its `generation_config` asks for that.

    What the recipe has chosen itself stays. As with vLLM, `do_sample` is not looked at, and a file that names only
    `top_p`, say, means temperature 1.

    Args:
        model: the model's folder; "" if there is no model.
        say: log what is taken, and what cannot be.

    Raises:
        EngineError: the file cannot be used, or the folder that was named has none; a sentence.
    """
    if recipe.generation_config == "none" or (recipe.generation_config == "auto" and not model):
        return recipe
    folder = model if recipe.generation_config == "auto" else recipe.generation_config
    path = Path(folder) / _FILE
    if recipe.generation_config != "auto" and not path.is_file():
        hint = "; what vLLM calls vllm is none, with --temperature 1" if recipe.generation_config == "vllm" else ""
        raise EngineError(f"there is no {path}: --generation-config must be auto, none, or a folder that has one{hint}")
    given = read_generation_config(folder)
    values = {name: given[name] for name in _TAKEN if name in given}
    if "temperature" not in values and any(name in given for name in _OF_SAMPLING):
        values["temperature"] = 1.0
    checked = _checked(values, path)
    set_by_user = recipe.set_by_user | {
        field.name for field in fields(SamplingParams) if getattr(recipe.sampling, field.name) != field.default
    }
    taken = {name: getattr(checked, name) for name in values if name not in set_by_user}
    if say:
        _say(path, taken, given)
    sampling = replace(recipe.sampling, **taken)
    return replace(recipe, sampling=sampling, set_by_user=set_by_user, authors=frozenset(taken))


def _checked(values: Mapping[str, object], path: Path) -> SamplingParams:
    try:
        return sampling_params(SamplingParams(), values, {})
    except Refused as refused:
        raise EngineError(
            f"{path}: {refused.message}. Mend the file, or leave it out with --generation-config none"
        ) from refused


def _say(path: Path, taken: Mapping[str, object], given: Mapping[str, object]) -> None:
    if taken:
        what = ", ".join(f"{name} {value}" for name, value in taken.items())
        logger.info("what a row does not say itself is taken from %s: %s", path, what)
    unknown = [name for name, neutral in _NOT_KNOWN.items() if name in given and given[name] not in neutral]
    if unknown:
        logger.warning("%s sets %s, which batchgen does not have: answers can differ", path, ", ".join(unknown))
