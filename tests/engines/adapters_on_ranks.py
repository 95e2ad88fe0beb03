"""One rank of a group whose engines load adapters; `test_adapters` starts two.

    python -m tests.engines.adapters_on_ranks TASKS RESULT

TASKS is a JSON list of [name, engine, options, model, adapter, port]; RESULT/<name>-<rank> gets, by prompt, the text
that this rank has generated and the log-probabilities of its tokens.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from batchgen import engines
from batchgen.engine import Setup
from batchgen.runs.schedule import order, shard
from batchgen.types import Prompt
from batchgen.world import from_environment
from tests.tiny_models import random_prompts

Found = dict[str, tuple[str, list[float]]]


def prompts() -> list[Prompt]:
    """Prompts that ask for the log-probabilities of their tokens."""
    made = random_prompts(6, longest=30)
    return [replace(prompt, params=replace(prompt.params, max_new_tokens=12, logprobs=True)) for prompt in made]


def generate(engine: str, options: list[str], model: str, adapter: str) -> Found:
    """What this rank generates, by the number of the prompt."""
    kind = engines.find(engine)
    world, chosen = from_environment(os.environ), engines.parse_options(kind, options)
    stream = kind.stream(world, chosen)
    setup = Setup(model, "float32", 4, world, run=model, selftest=False, adapter=adapter)
    every = prompts()
    found: Found = {}
    with kind(setup, chosen) as made:
        queue = order([every[index] for index in shard(len(every), stream)], 0)
        for batch in made.generate(iter(queue), lambda: False):
            for one in batch.generations if stream.writes else ():
                assert one.text is not None, one.error
                found[str(one.index)] = (one.text, list(one.logprobs or ()))
    return found


def main(tasks: str, result: Path) -> None:
    """Carries out every task; each has a meeting place of its own."""
    for name, engine, options, model, adapter, port in json.loads(tasks):
        os.environ["MASTER_PORT"] = str(port)
        found = generate(engine, options, model, adapter)
        (result / f"{name}-{os.environ['RANK']}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
