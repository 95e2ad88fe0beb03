"""A trial at load: a small random model of the same config, patched, beside Transformers' own forward.

The model is made from the config (`small_config`), in float32, on the CPU: the kernels of a GPU are compared with
attention in torch by their own tests, and would take half a minute to compile for this. Three sequences go through
three steps over pages: whole prompts side by side in one row, a chunk behind a cached beginning, single tokens. Their
logits must be those that Transformers computes for each sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from batchgen import device
from batchgen.engine import EngineError
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.cache import make_caches
from batchgen.engines.paged.layout import LayerCache, Layout, lay_out
from batchgen.engines.paged.models.patching import PatchedModel, patch
from batchgen.engines.paged.models.small_config import shrink, shrink_whole
from batchgen.engines.paged.not_covered import NotCovered
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.step import Chunk
from batchgen.models import architectures

TOLERANCE = 3e-4
"""Of the largest logit: ten times what rounding makes of float32 (2e-5 and less, over all kinds of models that are
covered), and a seventh of what a scale makes that is off by 1 %, or a window by one (2e-3 and more)."""

_SEEDS = 3
_LENGTHS = (75, 9, 40)
_STEPS = ((50, 8, 17), (24, 0, 22), (1, 1, 1))  # tokens of each sequence in each step
_COLUMNS = -(-max(_LENGTHS) // PAGE_SIZE)  # pages of each sequence
_WEIGHTS = 3.0  # standard deviation of what a product adds up to: large, so that softmax is far from uniform
_EMBEDDINGS = 0.2  # of that in embeddings: small, since what a layer adds to them must not be lost beside them
_VECTORS = 0.3  # of biases, sinks, and around the weights of norms


def check(config: Any) -> None:
    """Makes the trial.

    Raises:
        EngineError: a patched model of this config computes something else; the message says what to use instead.
    """
    why = find_difference(config)
    if why:
        raise EngineError(word_refusal(config, why))


def word_refusal(config: Any, why: str) -> str:
    """Returns the sentence for a config that is not covered."""
    return f"--engine paged does not cover this model, of type {config.model_type}: {why}; use --engine accelerate"


def find_difference(config: Any) -> str:
    """Returns what a patched model of this config does otherwise than Transformers; "" for nothing."""
    failure = ""
    # Of some families no model can be made with fewer heads, since other sizes hang on their number.
    for cuts_heads in (True, False):
        try:
            return _find_difference(config, cuts_heads)
        except NotCovered as error:
            return str(error)
        except Exception as error:  # the code of hundreds of families, called as it has never been called
            first = str(error).strip().splitlines()
            failure = f"{type(error).__name__}: {first[0] if first else ''}"
    return f"a small model of its config fails in pages ({failure})"


def _find_difference(config: Any, cuts_heads: bool) -> str:
    # In a mixture rounding may exchange two experts whose scores are nearly equal; other weights have no such pair.
    for seed in range(_SEEDS):
        difference = measure_difference(config, seed, cuts_heads=cuts_heads)
        if difference <= TOLERANCE:
            return ""
    return (
        "beside Transformers' own forward, the logits of a small model of its config differ by "
        f"{difference:.1%} of the largest"
    )


def measure_difference(config: Any, seed: int = 0, *, cuts_heads: bool = True) -> float:
    """Returns the largest difference of a logit in pages from Transformers' own, as a share of the largest logit.

    Args:
        seed: of the weights and the prompts.
        cuts_heads: as `small_config.shrink` takes it.

    Raises:
        NotCovered: the model asks for something that is known not to be done here.
    """
    with device.use_one_core(), torch.inference_mode(), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = _build_small(config, cuts_heads)
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (max(_LENGTHS),))
        sequences = [ids.roll(number)[:length] for number, length in enumerate(_LENGTHS)]
        expected = [_compute_alone(model, sequence) for sequence in sequences]
        patched = patch(model, Alone())
        caches = make_caches(model.config, _COLUMNS * len(_LENGTHS), 1, torch.float32, torch.device("cpu"))
        actual = _compute_in_pages(patched, caches, sequences)
        if not all(cache.keys.any() for cache in caches):
            raise NotCovered("its attention does not ask Transformers' attention interface")
    largest = max(float(logits.abs().max()) for logits in expected)
    return max(float((own - given).abs().max()) for own, given in zip(expected, actual, strict=True)) / largest


def _build_small(config: Any, cuts_heads: bool) -> Any:
    """A model in float32 whose weights make every feature of attention matter."""
    small = shrink(config, cuts_heads=cuts_heads)
    if architectures.auto_class(small) is None:  # no class of Transformers continues texts with the text part alone
        small = shrink_whole(config, small)
    # With the attention that Transformers takes by itself: eager Falcon, for one, adds its biases twice.
    make = architectures.auto_class(small)
    attention = architectures.attention_arguments(small)
    model = make.from_config(small, dtype=torch.float32, trust_remote_code=False, **attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, _WEIGHTS * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * _VECTORS)
    model.get_input_embeddings().weight.mul_(_EMBEDDINGS)
    return model.eval()


def _compute_alone(model: Any, sequence: torch.Tensor) -> torch.Tensor:
    """Transformers' own logits of one sequence, [tokens, vocabulary], computed as `generate` does it.

    The last tokens come one by one, behind a cache: of some kinds, Moshi for one, a cache holds a window that a forward
    over the whole sequence does not know.
    """
    parts, cache, ids = [], None, sequence[None]
    for begin, end in ((0, len(sequence) - 2), (len(sequence) - 2, len(sequence) - 1), (len(sequence) - 1, None)):
        out = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0].float())
    return torch.cat(parts)


def _compute_in_pages(
    patched: PatchedModel, caches: Sequence[LayerCache], sequences: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The logits of the same sequences, computed together, in steps."""
    # Pages in no order; the last slot is that of padding.
    pages = torch.randperm(len(sequences) * _COLUMNS).int().view(len(sequences), _COLUMNS)
    prompt_tokens = torch.tensor(_LENGTHS, dtype=torch.int32)[:, None]
    table = F.pad(torch.cat([pages, prompt_tokens], 1), (0, 0, 0, 1))
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for step in _STEPS:
        spans = [(slot, done[slot], done[slot] + count) for slot, count in enumerate(step) if count]
        layout = _make_layout(spans, caches, table)
        with lay_out(layout):
            ids = torch.cat([sequences[slot][begin:end] for slot, begin, end in spans])
            logits = patched.compute_logits(patched.compute_hidden(ids, layout.positions)).float()
        for slot, begin, end in spans:
            parts[slot].append(logits[: end - begin])
            logits = logits[end - begin :]
            done[slot] = end
    return [torch.cat(part) for part in parts]


def _make_layout(spans: Sequence[tuple[int, int, int]], caches: Sequence[LayerCache], table: torch.Tensor) -> Layout:
    """The layout of a step; each of `spans` is a slot, and the first and the last position of its tokens, plus one."""
    decoding = len(spans) if all(end - begin == 1 for _, begin, end in spans) else 0
    chunks: list[Chunk] = []
    slots: list[int] = []
    positions: list[int] = []
    for slot, begin, end in spans:
        if not decoding:
            chunks.append(Chunk(len(slots), end - begin, slot, end))
        slots += [slot] * (end - begin)
        positions += range(begin, end)
    numbers = [torch.tensor(values, dtype=torch.int32) for values in (slots, positions, [decoding])]
    return Layout(caches, table, numbers[0], numbers[1], decoding, chunks, numbers[2])
