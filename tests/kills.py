"""Real runs killed with -9 at random moments and started again; then the proof that nothing was lost or done twice.

    scripts/kills [KILLS [SEED [ENGINE]]]

kills a run of 300 prompts on a tiny random model that often. The suite does the same with fewer kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

PROMPTS = 300
# Of the prompts. Float32 rounds differently in batches of another shape; with this seed no two best logits of any step
# are closer than 1e-4, where other seeds have steps at 1e-6, and then a text may change with the batch.
PROMPT_SEED = 6
_LOADING_SECONDS = 5.0  # about what a start takes until its ranks work: early kills are spread over it
MOST_TOKENS = 128  # to generate for a prompt


@dataclass
class History:
    """What happened to one run, and what its attempts generated."""

    kills: list[str] = field(default_factory=list)  # ranks, batch size and the state in which each attempt was killed
    attempts: int = 0
    full_pass: int = 0  # tokens of the unbroken run
    committed: int = 0  # tokens in recorded batches, over all attempts
    generated: int = 0  # tokens that the heartbeats of all attempts counted
    in_flight: list[int] = field(default_factory=list)  # of each attempt: generated and not recorded
    most_in_flight: list[int] = field(default_factory=list)  # of each attempt: what its ranks' batches can hold


def save_model(folder: Path) -> Path:
    """A random Llama slow enough to be killed in the middle of a batch."""
    from tests import models

    return models.save(folder, partial(models.llama, hidden_size=128, intermediate_size=256, num_hidden_layers=6))


def write_prompts(path: Path) -> None:
    """Prompts of 1 to 120 letters, each with a length of its own to generate."""
    choose = random.Random(PROMPT_SEED)
    with path.open("w", encoding="utf-8") as file:
        for number in range(PROMPTS):
            prompt = "".join(choose.choice("abcdefgh ijklmno") for _ in range(choose.randint(1, 120)))
            row = {"id": f"row-{number}", "prompt": prompt, "max_new_tokens": choose.randint(8, MOST_TOKENS)}
            file.write(json.dumps(row) + "\n")


def kill_and_resume(model: Path, folder: Path, kills: int, seed: int, engine: str = "accelerate") -> History:
    """One run, killed `kills` times; afterwards its output is that of an unbroken run.

    Raises:
        AssertionError: it is not, or too much was generated.
    """
    choose = random.Random(seed)
    history = History()
    prompts, broken, unbroken = folder / "prompts.jsonl", folder / "broken", folder / "unbroken"
    write_prompts(prompts)
    assert _start(model, prompts, unbroken, 1, 16, "accelerate").wait() == 0
    history.full_pass = sum(row["generated_tokens"] for row in _lines(unbroken / "generations.jsonl"))
    for _ in range(kills):
        ranks, batch_size = choose.choice((1, 2)), choose.choice((3, 5, 8, 16))
        history.most_in_flight.append(ranks * batch_size * MOST_TOKENS)
        # Spread over the work by tokens, not by seconds: machines are fast and slow.
        tokens = choose.randint(1, history.full_pass // kills)
        early = choose.uniform(0.0, _LOADING_SECONDS) if choose.random() < 0.2 else None
        doing = _kill(model, prompts, broken, ranks, batch_size, engine, tokens, early)
        history.kills.append(f"{ranks} rank(s), batch {batch_size}: {doing}")
    history.most_in_flight.append(0)
    assert _start(model, prompts, broken, 2, 7, engine).wait() == 0, "the last start did not finish"
    _check(broken, unbroken, history)
    return history


def _start(model: Path, prompts: Path, out: Path, ranks: int, batch_size: int, engine: str) -> subprocess.Popen[bytes]:
    words = f"--engine {engine} --dtype float32 --ranks {ranks} --batch-size {batch_size} --heartbeat-seconds 0.05"
    command = [
        sys.executable,
        "-m",
        "batchgen",
        "run",
        str(prompts),
        "-o",
        str(out),
        "--model",
        str(model),
        *words.split(),
    ]
    with (out.parent / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _kill(
    model: Path, prompts: Path, out: Path, ranks: int, batch_size: int, engine: str, tokens: int, early: float | None
) -> str:
    """Starts, waits until the ranks have generated `tokens`, kills them all; says what they were doing.

    `early`: so many seconds after the start of the process instead: before the claim, or while the model loads.
    """
    number = 1 + len(list(out.glob("attempts/?????.json")))
    starter = _start(model, prompts, out, ranks, batch_size, engine)
    if early is not None:
        time.sleep(early)
    while early is None and starter.poll() is None and _generated(out, number) < tokens:
        time.sleep(0.02)
    doing = ", ".join(str(beat["state"]) for beat in _beats(out, number)) or "starting"
    for process in [starter.pid, *_descendants(starter.pid)]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    starter.wait()
    return doing


def _beats(out: Path, attempt: int) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(out.glob(f"attempts/{attempt:05d}-*.json"))]


def _generated(out: Path, attempt: int) -> int:
    return sum(int(beat["generated_tokens"]) for beat in _beats(out, attempt))


def _descendants(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            child = int(stat.parent.name)
            found += [child, *_descendants(child)]
    return found


def _check(broken: Path, unbroken: Path, history: History) -> None:
    mine, theirs = _lines(broken / "generations.jsonl"), _lines(unbroken / "generations.jsonl")
    assert [row["index"] for row in mine] == list(range(PROMPTS)), "rows are lost, doubled or out of order"
    for own, other in zip(mine, theirs, strict=True):
        assert own == other, f"row {own['id']} differs from the unbroken run"
    assert len({row["text"] for row in theirs}) > PROMPTS // 2, "the model repeats itself, so equality means nothing"
    timing = _lines(broken / "timing.jsonl")
    assert history.full_pass == sum(row["generated_tokens"] for row in theirs)
    history.committed = sum(batch["generated_tokens"] for batch in timing)
    assert sum(batch["prompts"] for batch in timing) == PROMPTS, "a row was recorded twice"
    assert history.committed == history.full_pass
    history.attempts = len(list(broken.glob("attempts/?????.json")))
    status = json.loads(subprocess.check_output([sys.executable, "-m", "batchgen", "status", str(broken), "--json"]))
    for attempt in status["attempts"]:
        history.generated += attempt["generated_tokens"]
        history.in_flight.append(attempt["lost_tokens"])
    # A start killed before its claim left no attempt; those that have one are bounded by what they could hold.
    assert history.generated == history.full_pass + sum(history.in_flight)
    assert max(history.in_flight) <= max(history.most_in_flight)
    assert sum(history.in_flight) <= sum(history.most_in_flight), "more was lost than was in flight"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(kills: int, seed: int, engine: str) -> None:
    """Runs one history on a model made on the spot, and prints it."""
    with tempfile.TemporaryDirectory(prefix="batchgen-kills-") as name:
        folder = Path(name)
        model = save_model(folder / "model")
        begun = time.monotonic()
        history = kill_and_resume(model, folder, kills, seed, engine)
    for number, kill in enumerate(history.kills, 1):
        print(f"kill {number:2}: {kill}")
    print(
        f"{PROMPTS} prompts, {engine}, {kills} kills (seed {seed}), {history.attempts} attempts, "
        f"{time.monotonic() - begun:.0f} s: rows lost 0, rows doubled 0, text equal to the unbroken run\n"
        f"tokens: {history.full_pass} in one full pass, {history.generated} generated in all attempts; "
        f"in flight at the kills {sum(history.in_flight)} (at most {max(history.in_flight)} at one)"
    )


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    main(int(given.get(0, 20)), int(given.get(1, 1)), given.get(2, "accelerate"))
