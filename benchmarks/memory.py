"""Memory of ranks that share a model, on CPUs: what each holds once it is loaded, and the most it held on the way.

    python benchmarks/memory.py ds-zero|ds-inference [MEGABYTES [NAME=VALUE …]]

One, two and three ranks of the engine on this machine load a random Llama in float32 (400 MB unless said
otherwise, files of at most 100 MB), made on the spot in a temporary folder; the rest are settings of the engine.
Anonymous memory (RssAnon in /proc/PID/status) is what a rank takes away from others; pages of the weights' files
(RssFile) are the kernel's to drop, and shared with whoever else reads them. Both are counted from the moment when all
that a load imports is imported, and looked at every 2 ms. glibc's malloc keeps part of what is freed; what it gives
back when asked (malloc_trim) is told apart. Generating is 2 tokens for one prompt.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY = 1024, 8192
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 2816  # elements, without norms
COLUMNS = (
    "ranks",
    "rank",
    "parameters held",
    "of the whole",
    "in MB",
    "anonymous, after loading",
    "once malloc gives free pages back",
    "most while loading",
    "most while generating",
    "files' pages, most while loading",
    "after loading",
)
_INTERVAL = 0.002  # s
_PATIENCE = 900  # s for a start of ranks

Record = dict[str, float]


def make_weights(folder: Path, megabytes: int) -> None:
    """A random Llama of about that size, and a tokenizer that nobody asks for words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    layers = max(1, round((megabytes * 1e6 / 4 - 2 * HIDDEN * VOCABULARY) / LAYER))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(100)}, unk_token="w0"))
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, pad_token="w3").save_pretrained(folder)


def resident() -> Record:
    """This process's resident memory in bytes, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return {kind: int(found[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}


@contextmanager
def peaks() -> Iterator[Record]:
    """The most of each kind while the block runs; complete when it has ended."""
    most, ended = resident(), threading.Event()

    def sample() -> None:
        while not ended.wait(_INTERVAL):
            for kind, size in resident().items():
                most[kind] = max(most[kind], size)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def rank(name: str, model: str, options: Sequence[str], folder: Path) -> None:
    """One rank: loads, generates, and writes what it held to `folder`."""
    # All that a load imports, so that it counts neither as weights nor as their way in.
    import deepspeed  # noqa: F401
    import transformers.integrations.deepspeed
    import transformers.models.llama.modeling_llama  # noqa: F401

    from batchgen import engine, engines
    from batchgen.types import Prompt, SamplingParams
    from batchgen.world import from_environment

    world, kind = from_environment(os.environ), engines.find(name)
    setup = engine.Setup(model, "float32", 1, world, run=str(folder), cache=str(folder / "cache"))
    before = resident()
    with peaks() as loading:
        made: Any = kind(setup, engines.parse_options(kind, options))
    with made:
        after = resident()
        ctypes.CDLL(None).malloc_trim(0)
        trimmed = resident()
        gathered = getattr(made, "_gathered", None)
        # One that DeepSpeed has sharded is empty, and keeps its share elsewhere.
        shares = [getattr(one, "ds_tensor", one) for one in made._batches.loaded.model.parameters()]
        record = {
            "held": sum(one.numel() for one in shares) if gathered is None else gathered.elements,
            "after": after["RssAnon"] - before["RssAnon"],
            "trimmed": trimmed["RssAnon"] - before["RssAnon"],
            "loading": loading["RssAnon"] - before["RssAnon"],
            "files": loading["RssFile"] - before["RssFile"],
            "files_after": after["RssFile"] - before["RssFile"],
        }
        prompt = Prompt(world.rank, "", 1, "", list(range(10, 18)), SamplingParams(max_new_tokens=2), {})
        with peaks() as generating:
            list(made.generate(iter([prompt]), lambda: False))
        record["generating"] = generating["RssAnon"] - before["RssAnon"]
    (folder / f"{world.rank}.json").write_text(json.dumps(record))


def start(name: str, count: int, model: Path, options: Sequence[str], folder: Path) -> list[Record]:
    """What each of `count` ranks held."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--rank", name, str(model), json.dumps(options), str(folder)]
    started = []
    for number in range(count):
        variables = shared | {"RANK": str(number), "LOCAL_RANK": str(number)}
        with (folder / f"log-{number}").open("w") as log:
            started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
    try:
        for number, process in enumerate(started):
            if process.wait(timeout=_PATIENCE) != 0:
                raise SystemExit(f"rank {number} failed:\n{(folder / f'log-{number}').read_text()[-3000:]}")
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(count)]


def main(engine: str, megabytes: int, options: Sequence[str]) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory(prefix="batchgen-bench-") as name:
        model = Path(name, "model")
        make_weights(model, megabytes)
        files = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        whole = files // 4  # of float32; the headers of the files are nothing beside them
        print(
            f"{engine}, {os.cpu_count()} cores; weights {files / 1e6:.1f} MB; "
            f"settings: {' '.join(options) or 'none'}; MB"
        )
        print(f"| {' | '.join(COLUMNS)} |\n{'|--:' * len(COLUMNS)}|")
        for count in (1, 2, 3):
            begun = time.perf_counter()
            for number, record in enumerate(start(engine, count, model, options, Path(name, str(count)))):
                sizes = [
                    record[kind] / 1e6 for kind in ("after", "trimmed", "loading", "generating", "files", "files_after")
                ]
                print(
                    f"| {count} | {number} | {record['held']:,} | {record['held'] / whole:.1%} | "
                    f"{record['held'] * 4 / 1e6:.1f} | {' | '.join(f'{size:+.0f}' for size in sizes)} |",
                    flush=True,
                )
            print(f"{count} ranks: {time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), Path(sys.argv[5]))
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 400, sys.argv[3:])
