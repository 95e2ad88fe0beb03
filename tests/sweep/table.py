"""The page of the manual that says which kinds of models run with which engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers

from batchgen.models import architectures
from tests.sweep.compare import ENGINES, Outcome, Swept
from tests.sweep.kinds import SEEING, make_config

PAGE = Path("docs/models.md")

_TOP = """# Which models run

`scripts/sweep --write` has written this page, with Transformers {version}. It builds a tiny random model of every kind
that Transformers continues a text with (`model_type` in config.json), runs rows of different lengths through each
engine in batches, greedily and in float32 on one rank of a CPU, and compares them with Transformers' own `generate` of
each row alone, token for token.

* **yes**: every row is what it is alone.
* **no**: the engine refuses the model before it loads any weights, and says why.
* **alone**, in the column "padded": rows of these kinds change when they are padded, in Transformers itself. A batch
  holds rows of equal length, which is slower where few rows have the same length.
* **sees**: the kind takes pictures too. Its language part answers rows of text.

More than one rank for a model (`--tp`) is a question of its own: see [Several GPUs](gpus.md#tensor-parallelism).
`--engine auto` takes none of the engines that say no here.

Engine `paged` goes by what a model asks of attention, and not by its kind: before it loads weights, it builds a small
random model of the same config, and compares its logits with those of Transformers. So a model of a kind that runs here
is refused if its config asks for more, a window that Transformers applies outside of attention, say, or if its latent
attention takes too much of the cache: it is kept as whole keys and values, which may take 2 MiB a token in 16 bits.
Small models of kind `deepseek_v3` run, and DeepSeek V3 itself and Kimi K2 are refused. And a model of a kind that is
refused here may run if its config asks for less: `phimoe` with the config of Phi-3.5-MoE does. Why other kinds are
refused is said [further down](#kinds-that-paged-refuses).
"""


def write(swept: Sequence[Swept]) -> None:
    """Writes the page anew."""
    text = _TOP.format(version=transformers.__version__)
    compared = [one for one in swept if one.outcomes and not one.impossible and not _is_refused(one)]
    refused = [one for one in swept if _is_refused(one)]
    rest = [one for one in swept if not one.outcomes]
    text += f"\n## {len(compared)} kinds that run\n\n| `model_type` | {' | '.join(ENGINES)} | padded | |\n"
    text += f"|---|{'---|' * (len(ENGINES) + 2)}\n" + "".join(map(_row, _sort(compared)))
    text += "\n## Kinds that `paged` refuses\n\nThese run with other engines.\n\n| `model_type` | why |\n|---|---|\n"
    text += "".join(
        f"| `{one.kind}` | {_cell(_why_not_paged(one))} |\n" for one in _sort(compared) if _why_not_paged(one)
    )
    text += f"\n## {len(refused)} kinds that no engine takes\n\n| `model_type` | what engines say |\n|---|---|\n"
    for one in _sort(refused):
        text += f"| `{one.kind}` | {_cell(_outcome(one, 'accelerate').detail)} |\n"
    text += (
        f"\n## {len(rest)} kinds that were not tried\n\nThey could not be built small here. The self-test looks at the "
    )
    text += "first rows of every run all the same.\n\n| `model_type` | why |\n|---|---|\n"
    for one in _sort(rest):
        text += f"| `{one.kind}` | {_cell(one.impossible)} |\n"
    PAGE.write_text(text, encoding="utf-8")


def read_promised() -> set[tuple[str, str]]:
    """Kinds and engines that the page says run together."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = ((kind, row.split(" | ")[: len(ENGINES)]) for kind, row in rows)
    return {(kind, name) for kind, words in cells for name, word in zip(ENGINES, words, strict=False) if word == "yes"}


def _sort(swept: Iterable[Swept]) -> list[Swept]:
    return sorted(swept, key=lambda one: one.kind)


def _why_not_paged(one: Swept) -> str:
    """What `paged` says of a kind, without the beginning and the end that all such sentences share; "": it runs."""
    outcome = _outcome(one, "paged")
    if outcome.word != "refused":
        return ""
    return outcome.detail.partition(f"of type {one.kind}: ")[2].partition("; use --engine")[0] or outcome.detail


def _is_refused(one: Swept) -> bool:
    return bool(one.outcomes) and all(outcome.word == "refused" for outcome in one.outcomes.values())


def _outcome(one: Swept, name: str) -> Outcome:
    return one.outcomes[name]


def _row(one: Swept) -> str:
    words = {"equal": "yes", "refused": "no"}
    cells = [words.get(outcome.word, outcome.word) for outcome in (_outcome(one, name) for name in ENGINES)]
    padded = "alone" if architectures.most_padded_tokens(make_config(one.kind)) == 0 else "yes"
    return f"| `{one.kind}` | {' | '.join(cells)} | {padded} | {'sees' if one.kind in SEEING else ''} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("FOLDER", "…")
