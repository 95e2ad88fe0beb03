"""Where the time of a whole `batchgen run` goes that is not the device's: `python benchmarks/whole_command.py [ROWS]`.

Makes a model of one tiny layer with a vocabulary of Qwen3's size, and ROWS rows of 16 to 64 words that generate 16 to
128 tokens. Then it runs, each in a process of its own:

* `echo`: the whole command with an engine that costs nothing;
* `paged`: the whole command with engine `paged`, whose device is a clock: a step takes 6 ms and 4 us a token, about
  what Qwen3-0.6B takes on an H200, and its tokens are drawn at random. All that the host does is real;
* `alone`: the same engine, given all prompts at once, and nothing is done with what it yields.

It prints seconds and seconds of the processor by phase, for how long the clock waited for the host, and what a row
costs the thread that reads, makes texts and commits. On a machine where others are at work, compare the processor's
seconds, and versions in turn: the variable PYTHONPATH says which one is measured.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_VOCABULARY = 151_936
_SLOTS = 2048
_STEP_SECONDS, _TOKEN_SECONDS = 0.006, 0.000004


def make_model(folder: Path) -> list[str]:
    """Writes the model into `folder`; returns words of its vocabulary."""
    import byte_tokenizer
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = Qwen3Config(
        vocab_size=_VOCABULARY, max_position_embeddings=40_960, initializer_range=0.3, **sizes, **heads
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save(folder, _VOCABULARY)
    texts = (text.removeprefix("Ġ") for text in AutoTokenizer.from_pretrained(folder).get_vocab() if text[0] == "Ġ")
    return sorted(text for text in texts if text.isascii() and text.isalpha() and 3 <= len(text) <= 9)


def write_rows(path: Path, rows: int, words: list[str]) -> None:
    """Writes the input."""
    choose = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = " ".join(choose.choices(words, k=choose.randint(16, 64)))
            row = {"id": f"row-{number}", "prompt": prompt, "max_new_tokens": choose.randint(16, 128)}
            file.write(json.dumps({**row, "ignore_eos": True}) + "\n")


class Phases:
    """The moments at which phases of a run end."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, float, float]] = []

    def end(self, name: str) -> None:
        """A phase ends now."""
        self.ends.append((name, time.time(), time.process_time()))

    def end_with(self, owner: Any, function: str, name: str) -> None:
        """A phase ends whenever `function` of `owner` returns."""
        real = getattr(owner, function)

        def timed(*arguments: Any, **named: Any) -> Any:
            try:
                return real(*arguments, **named)
            finally:
                self.end(name)

        setattr(owner, function, timed)


class Clock:
    """A device that does nothing and takes its time."""

    def __init__(self) -> None:
        import torch

        self._tokens = torch.randint(0, _VOCABULARY - 1, (1 << 16,))
        self._free_at = 0.0
        self.waited = self.busy = 0.0
        self.tokens = self.steps = 0

    def launch(self, step: Any) -> Any:
        """Queues a step of the engine behind those that are queued."""
        from batchgen.engines.paged.launched_step import LaunchedStep

        now = time.perf_counter()
        self.waited += max(0.0, now - self._free_at) if self.steps else 0.0
        seconds = _STEP_SECONDS + _TOKEN_SECONDS * len(step.slots)
        self._free_at = max(now, self._free_at) + seconds
        self.busy += seconds
        self.steps += 1
        self.tokens += len(step.rows)
        begin = self.steps * 37 % 50_000
        launched = LaunchedStep(step, [], None, None, self._tokens[begin : begin + len(step.rows)])
        launched.is_choice_launched = True
        launched.arrival = _Arrival(self._free_at)  # type: ignore[assignment]
        return launched


class _Arrival:
    def __init__(self, at: float) -> None:
        self._at = at

    def synchronize(self) -> None:
        """Waits until the clock has come to this moment."""
        time.sleep(max(0.0, self._at - time.perf_counter()))


def run_timed(mode: str, words: list[str]) -> None:
    """Runs the command in this process; prints its phases as JSON."""
    from batchgen.commands import main
    from batchgen.runs import flow, prepare

    phases, said = Phases(), {}
    phases.end("python")
    phases.end_with(prepare, "_named_or_recorded", "imports")
    phases.end_with(prepare, "_open_input", "scan of the input")
    phases.end_with(prepare, "find_duplicates", "model's folder, repeated ids")
    phases.end_with(flow, "begin", "tokenizer, run folder")
    if mode != "echo":
        said = _with_a_clock(phases, is_alone=mode == "alone")
    phases.end_with(flow._Start, "generate", "last commit, engine's end" if said else "batches")
    phases.end_with(flow._Start, "finish", "verification and merge")
    try:
        main(["run", *words], prog_name="batchgen")
    except SystemExit as error:
        if error.code and mode != "alone":  # of which nothing is recorded
            raise
    print(json.dumps({"ends": phases.ends, **{name: value() for name, value in said.items()}}))


def _with_a_clock(phases: Phases, *, is_alone: bool) -> dict[str, Callable[[], float]]:
    """Gives engine `paged` a clock for a device; returns what to ask in the end."""
    from batchgen.packages import without_garbage_collection

    with without_garbage_collection():
        from batchgen.engines.paged.engine import Paged
        from batchgen.engines.paged.runner import Runner
    clock, generate = Clock(), Paged.generate

    def timed(self: Paged, prompts: Iterator[Any], stop: Callable[[], bool]) -> Iterator[Any]:
        phases.end("first window, engine")
        batches = generate(self, iter(list(prompts)) if is_alone else prompts, stop)
        if is_alone:
            phases.end("all prompts")
            batches = iter([list(batches)][:0])  # all are generated, and none is recorded
        yield from batches
        phases.end("batches")

    Paged.generate = timed  # type: ignore[method-assign]
    Runner.launch = lambda self, step: clock.launch(step)  # type: ignore[method-assign]
    Runner.choose = lambda self, launched: None  # type: ignore[method-assign]
    return {name: lambda name=name: getattr(clock, name) for name in ("waited", "busy", "tokens", "steps")}  # type: ignore[misc]


def measure_rows(folder: Path, rows: int) -> dict[str, float]:
    """Microseconds of this thread, a row, for what is done of each row besides generating."""
    from batchgen.engines.paged import finished_rows
    from batchgen.formats.input import Input
    from batchgen.generation.ends import LENGTH
    from batchgen.generation.results import Ended
    from batchgen.models.tokenizer import HfTokenizer
    from batchgen.requests.output import renderer
    from batchgen.requests.prompts import PromptReader
    from batchgen.requests.recipe import Recipe

    gc.set_threshold(100_000, 50, 100)  # as the command does
    tokenizer = HfTokenizer(str(folder / "model"))
    source = Input.open([str(folder / "rows.jsonl")], folder, scan=True)
    reader, render = PromptReader(Recipe(), tokenizer, {}), renderer("model", 1, "openai", False)
    make = getattr(finished_rows, "make_generations", None) or (  # as it was before rows were made together
        lambda finished, *others: [row.to_generation(*others) for row in finished]
    )
    said = random.Random(2).choices(range(_VOCABULARY - 1), k=1 << 16)
    spent = dict.fromkeys(("rows are read", "prompts and tokens", "texts", "lines"), 0.0)

    def timed(what: str, work: Callable[[], Any]) -> Any:
        begun = time.thread_time()
        result = work()
        spent[what] += time.thread_time() - begun
        return result

    for begin in range(0, rows, 2048):
        window = range(begin, min(begin + 2048, rows))
        read = timed("rows are read", lambda window=window: list(source.rows(window)))
        prompts = timed("prompts and tokens", lambda read=read: reader.read(read))
        finished = [
            finished_rows.FinishedRow(prompt, Ended(prompt, said[place : place + prompt.params.max_new_tokens], LENGTH))
            for place, prompt in enumerate(prompts, begin % 32_768)
        ]
        generations = timed("texts", lambda finished=finished: make(finished, tokenizer, "float32"))
        timed("lines", lambda generations=generations: b"".join(map(render, generations)))
    return {what: round(seconds / rows * 1e6, 1) for what, seconds in spent.items()}


def main(rows: int) -> None:
    """Prints a table a mode."""
    with tempfile.TemporaryDirectory(prefix="batchgen-bench-") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", rows, make_model(folder / "model"))
        paged = ["--engine", "paged", "--model", folder / "model", "--dtype", "float32", "--no-selftest"]
        for mode, engine in (("echo", ["--engine", "echo"]), *((m, [*paged, "--batch-size", _SLOTS]) for m in MODES)):
            words = [__file__, mode, folder / "rows.jsonl", "-o", folder / mode, *engine]
            begun = time.time()
            with (folder / "said").open("wb") as said:
                process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=said)
                assert process.stdout is not None
                out = process.stdout.read()
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit((folder / "said").read_text())
            ended = (time.time(), usage.ru_utime + usage.ru_stime)
            print_phases(mode, begun, ended, json.loads(out.splitlines()[-1]))
        print("us of the main thread a row:", measure_rows(folder, min(rows, 16_384)))


MODES = ("paged", "alone")


def print_phases(mode: str, begun: float, ended: tuple[float, float], said: dict[str, Any]) -> None:
    """Prints seconds and processor's seconds of each phase, and what the clock says."""
    print(f"{mode}: {ended[0] - begun:.1f} s, {ended[1]:.1f} s of the processor")
    before = (begun, 0.0)
    for phase, when, used in [*said.pop("ends"), ("end of the process", *ended)]:
        print(f"  {phase:32} {when - before[0]:7.2f} s {used - before[1]:7.2f} s of the processor")
        before = (when, used)
    if said:
        seconds = said["busy"] + said["waited"]
        print(f"  {said['tokens'] / seconds:,.0f} tokens/s; the clock waited {said['waited']:.2f} of {seconds:.2f} s")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("echo", *MODES):
        run_timed(sys.argv[1], sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 40_000)
