"""Engine `paged` on one GPU: `python benchmarks/paged.py MODEL JOB…`; random weights made on the spot.

MODEL is a shape (`bloom-7b1`, `llama-8b`, `qwen3-0.6b`); JOB one of `seed:ROWS` (prompts of 8 tokens, 100 new ones),
`equal:ROWS:PROMPT:NEW` (so many tokens each),
`mixed` (1,024 prompts of 32 to 512 tokens, 16 to 512 new ones), `mixed4096` (as many of them), `short` (8,192 prompts
of 16 to 64, 16 to 128 new ones), the last three also with `+` and one of `VARIANTS`; `samples` (eight of each of 128
prompts) and `shared` (1,024 rows, of which eight each have the same prompt); each is timed three times (RUNS) after a
warm-up. The last is `check` (tokens and log-probabilities against a float32 model). PROFILE=1 prints the kernels that
take most time, TRACE=1 the steps. Lengths are those of `batchgen.bench.workloads`, and no row ends before its length.
FOLDER keeps the model, and DTYPE=fp8 (int8, int4) quantises it while it is loaded; DTYPE=mxfp4 makes files in MXFP4
of the shape gpt-oss-20b.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the command line does

import mxfp4
import torch

from batchgen.bench import workloads
from batchgen.engine import Setup
from batchgen.engines import find, parse_options
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.models import shapes
from batchgen.runs.samples import Samples
from batchgen.types import Constraint, Prompt
from batchgen.world import from_environment

JOBS = {
    "mixed": (1024, (32, 512), (16, 512)),
    "mixed4096": (4096, (32, 512), (16, 512)),
    "short": (8192, (16, 64), (16, 128)),
    "check": (64, (8, 700), (16, 100)),
}

SAMPLED = {"temperature": 0.8, "top_p": 0.95}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}

# What a row of the job asks for besides, by its number.
VARIANTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "": lambda number: {},
    "logprobs": lambda number: {"logprobs": True},
    "sampled": lambda number: SAMPLED,
    "penalties": lambda number: PENALTIES,
    "sampled-penalties": lambda number: {**SAMPLED, **PENALTIES},
    "schemas": lambda number: {"constraint": endless_schema(number % 16)},
    "sampled-schemas": lambda number: {**SAMPLED, "constraint": endless_schema(number % 16)},
}


def endless_schema(number: int) -> Constraint:
    """One of 16 schemas whose texts are all longer than any row."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    items = [
        {"type": "integer"},
        {"type": "number"},
        {"type": "string"},
        {"type": "string", "maxLength": 12},
        {"type": "boolean"},
        {"enum": ["yes", "no", "perhaps", "never"]},
        {"type": "string", "pattern": "^[a-z]{3}-[0-9]{4}$"},
        {"type": "string", "format": "date"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
        {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 8}, {"type": "null"}]},
        person,
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"of": person, "is_known": {"type": "boolean"}}, "required": ["of"]},
        {"type": "array", "items": person, "minItems": 1, "maxItems": 3},
        {"type": "object", "properties": {"text": {"type": "string", "minLength": 50}}, "required": ["text"]},
        {"type": "string", "pattern": "^([A-Z][a-z]+ )+[.]$"},
    ]
    return Constraint("json_schema", json.dumps({"type": "array", "items": items[number], "minItems": 4000}))


def job(name: str) -> list[Prompt]:
    """The prompts of a job."""
    if name.startswith("seed:"):
        return workloads.mixed(int(name.partition(":")[2]), 32_000, (8, 8), (100, 100))
    if name.startswith("equal:"):
        count, prompt, new = map(int, name.split(":")[1:])
        return workloads.mixed(count, 32_000, (prompt, prompt), (new, new))
    if name in ("samples", "shared"):
        rows = [with_params(prompt, **SAMPLED) for prompt in workloads.mixed(128, 32_000, (32, 512), (16, 512))]
        if name == "samples":
            return list(Samples().spread(with_params(prompt, n=8) for prompt in rows))
        return [replace(prompt, index=8 * prompt.index + n, id=f"{prompt.id}-{n}") for prompt in rows for n in range(8)]
    rows, prompt_tokens, new_tokens = JOBS[name.partition("+")[0]]
    prompts = workloads.mixed(rows, 32_000, prompt_tokens, new_tokens)
    _, _, variant = name.partition("+")
    return [with_params(prompt, **VARIANTS[variant](number)) for number, prompt in enumerate(prompts)]


def with_params(prompt: Prompt, **values: Any) -> Prompt:
    """The same, with other sampling parameters."""
    return replace(prompt, params=replace(prompt.params, **values))


def timed(engine: Any, prompts: list[Prompt]) -> tuple[float, int]:
    """Seconds, and tokens generated."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    generated = 0
    for batch in engine.generate(iter(prompts), lambda: False):
        generated += sum(generation.generated_tokens for generation in batch.generations)
    return time.perf_counter() - started, generated


def check(engine: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """How far the chosen tokens are from the best of a float32 forward of each row alone, in standard deviations of
    the logits, and what share of them is the best; how far their log-probabilities are from those of that forward.
    Beside them the choice, and the log-probabilities, of the same model's own forward, which differs by rounding alone.
    """
    generated = finished(engine, [with_params(prompt, logprobs=True) for prompt in prompts])
    engine._runner.allocate(0)  # room for float32
    torch.cuda.empty_cache()
    own = {prompt.index: judged(engine._model, prompt, generated[prompt.index][0]) for prompt in prompts}
    model = engine._model.float()
    behind: dict[str, list[torch.Tensor]] = {"paged": [], "the model's own": []}
    off: dict[str, list[torch.Tensor]] = {"paged": [], "the model's own": []}
    for prompt in prompts:
        tokens, logprobs = generated[prompt.index]
        logits = logits_of(model, prompt, tokens)
        right = logits.log_softmax(1)
        own_best, own_logprobs = own[prompt.index]
        for who, best, given in (
            ("paged", torch.tensor(tokens, device="cuda"), torch.tensor(logprobs, device="cuda")),
            ("the model's own", own_best, own_logprobs),
        ):
            behind[who].append((logits.max(1).values - logits.gather(1, best[:, None])[:, 0]) / logits.std(1))
            off[who].append((given - right.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]).abs())
    return {who: gaps(torch.cat(behind[who]), torch.cat(off[who])) for who in behind}


def finished(engine: Any, prompts: list[Prompt]) -> dict[int, tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities by the rows' numbers."""
    from batchgen.engines.paged.loop import Loop

    rows: dict[int, tuple[list[int], list[float]]] = {}
    collect = Loop.collect

    def keep(self: Loop, timeout: float) -> Any:
        collected = collect(self, timeout)
        for row in collected or []:
            assert row.ended is not None
            rows[row.prompt.index] = list(row.ended.tokens), [each.logprob for each in row.ended.logprobs or ()]
        return collected

    Loop.collect = keep  # type: ignore[method-assign]
    list(engine.generate(iter(prompts), lambda: False))
    Loop.collect = collect  # type: ignore[method-assign]
    return rows


def judged(model: Any, prompt: Prompt, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own choice in the place of each token, and the log-probability it gives that token."""
    logits = logits_of(model, prompt, tokens)
    at = torch.tensor(tokens, device="cuda")[:, None]
    return logits.argmax(1), logits.float().log_softmax(1).gather(1, at)[:, 0]


def logits_of(model: Any, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """Of each generated token, in a forward of the whole row."""
    whole = torch.tensor([[*prompt.tokens, *tokens[:-1]]], device="cuda")
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=whole, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return logits


def gaps(behind: torch.Tensor, off: torch.Tensor) -> dict[str, float]:
    """Those of all tokens, and of their log-probabilities."""
    return {
        "tokens": len(behind),
        "most behind": round(behind.max().item(), 4),
        "99 % behind less than": round(behind.quantile(0.99).item(), 4),
        "share that is the best": round((behind == 0).float().mean().item(), 4),
        "log-probability off, median": round(off.median().item(), 5),
        "log-probability off, 99 % less than": round(off.quantile(0.99).item(), 4),
        "log-probability off, most": round(off.max().item(), 4),
    }


def trace(engine: Any, prompts: list[Prompt]) -> None:
    """Where the time of a job's steps goes: those with prefill chunks, and pure decode steps by their size."""
    runner = engine._runner
    launch = runner.launch
    steps: list[tuple[int, int, float, float, Any, Any]] = []

    def timed_launch(step: Any) -> Any:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started = time.perf_counter()
        before.record()
        launched = launch(step)
        after.record()
        steps.append((len(step.slots), step.decoding, started, time.perf_counter() - started, before, after))
        return launched

    runner.launch = timed_launch
    seconds, tokens = timed(engine, prompts)
    runner.launch = launch
    print(f"{seconds:.2f} s, {tokens} tokens, preempted {engine._scheduler.preemptions}")
    kinds: dict[str, list[list[float]]] = {}
    for at, (count, decoding, started, launching, before, after) in enumerate(steps):
        kind = f"decode <= {1 << (count - 1).bit_length()}" if count == decoding else "mixed"
        gap = steps[at - 1][5].elapsed_time(before) / 1e3 if at else 0.0
        planning = started - steps[at - 1][2] - steps[at - 1][3] if at else 0.0
        spent = before.elapsed_time(after) / 1e3
        kinds.setdefault(kind, []).append([count, decoding, spent, gap, launching, planning])
    for kind, rows in kinds.items():
        sums = [sum(column) for column in zip(*rows, strict=True)]
        count, decoding, spent, gap, launching, planning = sums
        print(
            f"{kind:15} {len(rows):5} steps, {count / len(rows):6.0f} tokens, {decoding / len(rows):6.0f} decoding; "
            f"device {spent:.2f} s and {gap:.2f} s between; launching {launching:.2f} s, reading and planning "
            f"{planning:.2f} s"
        )


def main() -> None:
    """Makes the model, loads it, does the jobs."""
    shape, *jobs = sys.argv[1:]
    started = time.perf_counter()
    # A folder that is named is kept, so that a second run finds its files in the page cache.
    dtype = os.environ.get("DTYPE", "bfloat16")
    folder = Path(os.environ.get("FOLDER", tempfile.mkdtemp())) / (f"{shape}-mxfp4" if dtype == "mxfp4" else shape)
    if not folder.exists() and dtype == "mxfp4":
        mxfp4.write(shape, folder)
    elif not folder.exists():
        shapes.make(shape, torch.bfloat16, folder)
    started = time.perf_counter() if "FOLDER" in os.environ else started
    if any("schemas" in name for name in jobs):
        write_tokenizer(folder)
    kind = find(os.environ.get("ENGINE", "paged"))
    settings = os.environ.get("SETTINGS", "").split()
    rows = int(os.environ["ROWS"]) if "ROWS" in os.environ else None
    dtype = "bfloat16" if dtype == "mxfp4" else dtype  # its files say how they are quantised
    setup = Setup(str(folder), dtype, rows, from_environment({}), selftest=False)
    with kind(setup, parse_options(kind, settings)) as engine:
        torch.cuda.synchronize()
        report: dict[str, object] = {"shape": shape, "ready_seconds": round(time.perf_counter() - started, 1)}
        first = time.perf_counter()
        timed(engine, job("seed:8"))
        report["first_batch_seconds"] = round(time.perf_counter() - first, 1)
        if "_scheduler" in vars(engine):
            report["allocated_GB"] = round(torch.cuda.memory_allocated() / 1e9, 2)
            report["slots"], report["cache_tokens"] = engine._runner.limits.slots, engine._scheduler.pages * PAGE_SIZE
        print(json.dumps(report), flush=True)
        warm: set[str] = set()
        for name in jobs:
            prompts = job(name)
            if os.environ.get("TRACE"):
                trace(engine, prompts)
                continue
            if name == "check":
                print(json.dumps({"shape": shape, **check(engine, prompts)}), flush=True)
                continue
            if name not in warm:  # a job that is named again is timed again
                timed(engine, prompts)
                warm.add(name)
            runs = [timed(engine, prompts) for _ in range(int(os.environ.get("RUNS", "3")))]
            seconds = statistics.median(run[0] for run in runs)
            tokens = runs[0][1]
            figures = {"seconds": [round(run[0], 3) for run in runs], "tokens": tokens}
            figures |= {"tokens_per_second": round(tokens / seconds), "ms_per_token": round(seconds / tokens * 1e3, 5)}
            print(json.dumps({"shape": shape, "job": name, **figures}), flush=True)
            if os.environ.get("PROFILE"):
                profile(engine, prompts, name)


def write_tokenizer(folder: Path) -> None:
    """Gives the model a byte-level tokenizer in the place of its words; TOKENIZER is a folder that has one already."""
    if made := os.environ.get("TOKENIZER"):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return
    from byte_tokenizer import save

    save(folder, json.loads((folder / "config.json").read_text())["vocab_size"])


def profile(engine: Any, prompts: list[Prompt], name: str) -> None:
    """The kernels that a run of the job takes most time in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        seconds, _ = timed(engine, prompts)
    averages = seen.key_averages()
    busy = sum(entry.self_device_time_total for entry in averages) / 1e6
    print(f"{name}: {seconds:.2f} s with the profiler, the device busy for {busy:.2f} s")
    for entry in sorted(averages, key=lambda entry: -entry.self_device_time_total)[:14]:
        print(f"  {entry.self_device_time_total / 1e6:7.3f} s {entry.count:7d} x  {entry.key[:100]}")


if __name__ == "__main__":
    main()
