"""What is measured: the batches of an article, and workloads of unequal lengths. Pure but for the tokenizer.

The article is "Incredibly Fast BLOOM Inference with DeepSpeed and Accelerate". It repeats eight short sentences up to
the batch size, and continues each row greedily by 100 new tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from batchgen.types import Prompt, SamplingParams, Tokens

SENTENCES = (
    "DeepSpeed is a machine learning framework",
    "He is working on",
    "He has a",
    "He got all",
    "Everyone is happy and I can",
    "The new movie that got Oscar this year",
    "In the far far distance from our galaxy,",
    "Peace is the only way",
)


def batch(tokenize: Callable[[Sequence[str]], list[Tokens]], rows: int, new_tokens: int) -> list[Prompt]:
    """The article's batch of `rows` rows, tokenised anew at each call, since the article times that, too."""
    params = SamplingParams(max_new_tokens=new_tokens)
    texts = list(islice(cycle(SENTENCES), rows))
    return [prompt(number, ids, params) for number, ids in enumerate(tokenize(texts))]


def mixed(rows: int, vocabulary: int, prompt_tokens: tuple[int, int], new_tokens: tuple[int, int]) -> list[Prompt]:
    """A workload of `rows` rows with prompts of random tokens, the same at every call.

    Args:
        vocabulary: token ids are below this, and below 32,000.
        prompt_tokens: the fewest and the most, evenly spread.
        new_tokens: the fewest and the most; log-normal between them, which are two standard deviations from the middle.
    """
    choose = random.Random(1)
    shortest, longest = new_tokens
    middle, spread = (math.log(shortest) + math.log(longest)) / 2, (math.log(longest) - math.log(shortest)) / 4
    made = []
    for number in range(rows):
        length = choose.randint(*prompt_tokens)
        new = int(min(longest, max(shortest, round(choose.lognormvariate(middle, spread)))))
        ids = [choose.randrange(4, min(vocabulary, 32_000)) for _ in range(length)]
        made.append(prompt(number, ids, SamplingParams(max_new_tokens=new)))
    return made


def prompt(number: int, ids: Tokens, params: SamplingParams) -> Prompt:
    """Row `number`."""
    return Prompt(number, str(number), number + 1, "", ids, params, {})
