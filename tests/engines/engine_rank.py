"""One rank of an engine for the tests: several sets of prompts through one engine, started by `ranks`.

    python -m tests.engines.engine_rank MODEL[:MODEL…] OPTIONS-AND-SETS RESULT

writes to RESULT/<rank>, or RESULT/<name of the model>/<rank> if there are several, the text of each prompt that this
rank's stream generated, for each set; beside it, to logprobs-<rank> the log-probabilities of those that ask, and to
swapped-<rank> how many swap files it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from batchgen import engines
from batchgen.engine import Setup
from batchgen.models import cache_folder
from batchgen.runs.schedule import order, shard
from batchgen.types import Generation, Prompt
from batchgen.world import free_port, from_environment
from tests.generation import parameter_cases
from tests.tiny_models import random_prompts

SETS = (1, 2, 3, 7, 50)  # prompts
CASES = 0  # in the place of their number: the prompts of `parameter_cases`, of which the tokens are what is written
PATIENCE = 600.0  # s for all the sets


def prompts(count: int, most_tokens: int = 40) -> list[Prompt]:
    """Of very unequal lengths, and as unequally many tokens to generate, up to `most_tokens`; every third asks for
    logprobs."""
    made = random_prompts(count, longest=100)
    tokens = [1 + (prompt.params.max_new_tokens - 1) % most_tokens for prompt in made]
    return [
        replace(prompt, params=replace(prompt.params, max_new_tokens=most, logprobs=prompt.index % 3 == 0))
        for prompt, most in zip(made, tokens, strict=True)
    ]


def cases() -> list[Prompt]:
    """The prompts of `parameter_cases`; every third asks for the logprobs of its prompt."""
    made = parameter_cases.prompts_of_cases()
    for prompt in made[::3]:
        prompt.params = replace(prompt.params, prompt_logprobs=1)
    return made


def ranks(
    count: int,
    model: Path | Sequence[Path],
    options: Sequence[str],
    folder: Path,
    sets: Sequence[int] = SETS,
    most_tokens: int = 40,
    patience: float = PATIENCE,
    engine: str = "ds-zero",
    dtype: str = "float32",
) -> dict[int, dict[int, str]]:
    """Texts by prompt and set, from `count` ranks; of several models, each one's results are in the folder of its name,
    and none are given."""
    models = [model] if isinstance(model, Path) else model
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    # One meeting place a model: at the same one, a rank could find what another has left there of the model before.
    environment |= {"MASTER_ADDR": "127.0.0.1", "PORTS": ",".join(str(free_port()) for _ in models)}
    command = [
        sys.executable,
        "-m",
        "tests.engines.engine_rank",
        ":".join(map(str, models)),
        json.dumps([engine, dtype, list(options), list(sets), most_tokens]),
        str(folder),
    ]
    processes = []
    for rank in range(count):
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"log-{rank}").open("w") as log:
            processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=patience) == 0, (folder / f"log-{rank}").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return texts(folder)


def texts(folder: Path) -> dict[int, dict[int, str]]:
    """Those of all ranks whose results are in `folder`, by set and prompt."""
    found: dict[int, dict[int, str]] = {}
    for file in folder.glob("[0-9]*"):
        for set_, by_prompt in json.loads(file.read_text()).items():
            found.setdefault(int(set_), {}).update({int(index): text for index, text in by_prompt.items()})
    return found


def logprobs(folder: Path) -> dict[int, dict[int, list[float]]]:
    """Those of all ranks whose results are in `folder`, by set and prompt."""
    found: dict[int, dict[int, list[float]]] = {}
    for file in folder.glob("logprobs-*"):
        for set_, values in json.loads(file.read_text()).items():
            found.setdefault(int(set_), {}).update({int(index): value for index, value in values.items()})
    return found


def swap_files(folder: Path) -> list[int]:
    """How many each rank had, of the ranks whose results are in `folder`."""
    return [int(file.read_text()) for file in sorted(folder.glob("swapped-*"))]


def main(
    model: str, name: str, dtype: str, options: Sequence[str], sets: Sequence[int], most_tokens: int, folder: Path
) -> None:
    """This rank's part of every set."""
    kind = engines.find(name)
    world = from_environment(os.environ)
    chosen = engines.parse_options(kind, options)
    stream = kind.stream(world, chosen)
    texts: dict[int, dict[int, str | None]] = {}
    logprobs: dict[int, dict[int, Sequence[float]]] = {}
    setup = Setup(model, dtype, 4, world, run=str(folder), cache=str(cache_folder(os.environ)))
    with kind(setup, chosen) as made:
        disk = (getattr(chosen, "offload", None) or "").partition("=")[2]
        swapped = len(list(Path(disk).rglob(f"rank{world.rank}/*.swp"))) if disk else 0
        (folder / f"swapped-{world.rank}").write_text(str(swapped))
        for count in sets:
            every = prompts(count, most_tokens) if count != CASES else cases()
            mine = order([every[index] for index in shard(len(every), stream)], 0)
            batches = made.generate(iter(mine), lambda: False)
            done = [generation for batch in batches for generation in batch.generations]
            done = done if stream.writes else []
            texts[count] = {one.index: one.text if count != CASES else _name_tokens(one) for one in done}
            logprobs[count] = {one.index: one.logprobs for one in done if one.logprobs is not None}
            if count == CASES:
                logprobs[count] = {one.index: _find_prompt_logprobs(one) for one in done if one.index % 3 == 0}
    (folder / f"logprobs-{world.rank}").write_text(json.dumps(logprobs))
    (folder / str(world.rank)).write_text(json.dumps(texts))


def _name_tokens(generation: Generation) -> str:
    assert generation.details is not None, generation.error
    return str(list(generation.details.token_ids or ()))


def _find_prompt_logprobs(generation: Generation) -> list[float]:
    assert generation.details is not None
    return [place[0].logprob for place in generation.details.prompt_logprobs or () if place]


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    every = sys.argv[1].split(":")
    for one, port in zip(every, os.environ["PORTS"].split(","), strict=True):
        os.environ["MASTER_PORT"] = port
        results = Path(sys.argv[3], *([Path(one).name] if len(every) > 1 else []))
        results.mkdir(exist_ok=True)
        main(one, *given, results)
