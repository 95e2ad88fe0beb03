"""What rounding weights costs: a model's probabilities with and without it, over a text and over its own answers.

    python benchmarks/quantised_loss.py [MODEL]

MODEL is a folder, or the packaged model. All is computed in float32, on the CPU, so that nothing but the rounding of
weights and of the inputs of products makes a difference. Takes some five minutes for SmolLM2-135M on two cores that do
nothing else.

- GB: that the weights take, with what is not rounded in 16 bits
- equal tokens: the share of places where the most probable token is the same
- difference: of the log-probability of the token that stands there, mean of the absolute values
- perplexity: of the text; that of the model as it is stands in the first line
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from batchgen import models
from batchgen.models.quantised.places import get_quantised
from batchgen.models.quantised.rounding import GROUP_SIZES, Scheme
from batchgen.models.quantised.weight import QuantisedWeight
from batchgen.models.tokenizer import HfTokenizer
from batchgen.tensor_parallel import copy_weights, map_model

TEXT = Path(__file__).parents[1] / "docs" / "determinism.md"
TEXT_TOKENS = 1024
QUESTIONS = (
    "Explain in two paragraphs why the sky is blue.",
    "Write a short story about a lighthouse keeper and a lost dog.",
    "How do I make a simple vegetable soup?",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
)
ANSWER_TOKENS = 64


def main() -> None:
    """Prints a table, a line for each scheme."""
    folder = str(models.resolve(sys.argv[1] if len(sys.argv) > 1 else models.DEFAULT, _cache(), print).folder)
    tokenizer = HfTokenizer(folder)
    (tokens,) = tokenizer.tokenize([TEXT.read_text(encoding="utf-8")], special=True)
    text = torch.tensor([list(tokens)[:TEXT_TOKENS]])
    exact = load(folder, None)
    answers = [generate(exact, tokenizer, question) for question in QUESTIONS]
    expected = compute(exact, text, answers)
    print("| weights | GB | equal tokens, answers | text | difference, answers | text | perplexity |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    print(describe("as they are", exact, expected, expected))
    widths = {layer.weight.shape[1] for layer in exact.get_decoder().modules() if isinstance(layer, torch.nn.Linear)}
    schemes = [Scheme("fp8"), Scheme("int8")]
    schemes += [Scheme("int4", size) for size in GROUP_SIZES if not any(width % size for width in widths)]
    for scheme in schemes:
        begin = time.perf_counter()
        model = load(folder, scheme)
        name = scheme.kind + (f", groups of {scheme.group_size}" if scheme.group_size else "")
        print(describe(name, model, expected, compute(model, text, answers)), flush=True)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)


def load(folder: str, scheme: Scheme | None) -> Any:
    """The model in float32, with layers that compute as the kernels of engine `paged` are meant to."""
    model = map_model(folder, None)
    copy_weights(model, folder, torch.device("cpu"), torch.float32, rounding=scheme)
    rounded = {module: weight for module in model.modules() if (weight := get_quantised(module)) is not None}
    placeholders = sum(module.weight.numel() for module in rounded)
    plain = sum(parameter.numel() for parameter in model.parameters()) - placeholders
    model.held_bytes = 2 * plain + sum(weight.nbytes for weight in rounded.values())
    for module, weight in rounded.items():
        module.forward = _Product(weight, module.bias)
    return model


class _Product:
    def __init__(self, weight: QuantisedWeight, bias: torch.Tensor | None) -> None:
        self.weight, self.wide, self.bias = weight, weight.widen(), bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        rounded = self.weight.round_inputs(inputs.flatten(0, -2)).view_as(inputs)
        return F.linear(rounded, self.wide, self.bias)


@torch.inference_mode()
def generate(model: Any, tokenizer: HfTokenizer, question: str) -> tuple[torch.Tensor, int]:
    """The conversation with the model's most probable answer, [1, tokens], and the tokens before the answer."""
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    (tokens,) = tokenizer.tokenize([prompt], special=False)
    ids = torch.tensor([list(tokens)])
    return model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False), ids.shape[1]


@torch.inference_mode()
def compute(model: Any, text: torch.Tensor, answers: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """The most probable token of each place and the log-probability of the one that stands there."""
    found = {}
    for name, places in {"answers": answers, "text": [(text, 1)]}.items():
        best, scores = [], []
        for ids, before in places:
            logits = model(ids).logits[0, before - 1 : -1].log_softmax(-1)
            best.append(logits.argmax(-1))
            scores.append(logits.gather(1, ids[0, before:, None])[:, 0])
        found |= {f"{name} best": torch.cat(best), f"{name} scores": torch.cat(scores)}
    return found


def describe(name: str, model: Any, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """A line of the table."""
    parts = ("answers", "text")
    equal = [(found[f"{part} best"] == expected[f"{part} best"]).double().mean() for part in parts]
    differences = [(found[f"{part} scores"] - expected[f"{part} scores"]).abs().mean() for part in parts]
    perplexity = (-found["text scores"].mean()).exp()
    cells = [name, f"{model.held_bytes / 1e9:.3f}", *(f"{100 * share:.1f} %" for share in equal)]
    return "| " + " | ".join([*cells, *(f"{one:.3f}" for one in differences), f"{perplexity:.2f}"]) + " |"


def _cache() -> Path:
    return models.cache_folder(os.environ)


if __name__ == "__main__":
    main()
