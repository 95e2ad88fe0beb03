"""`scripts/families`: small models of well-known families through engine `paged`, beside Transformers.

A line for each family: greedy and sampled rows that are equal, the largest difference of log-probabilities, and how
often a row was preempted. Families that must be refused are refused with their sentence.

With `--rounded`, in bfloat16 on the GPU that there is, or the CPU: how far the log-probabilities of `paged` are from
exact ones (median, 99 % quantile or 97 % of a mixture, largest), and the same of Transformers itself. Compiling takes
most of the time on a GPU, so several processes may share one: `--part 1/14`, …, `--part 14/14`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from batchgen.models import loading
from batchgen.world import World
from tests.engines.paged.families import contract, rounded
from tests.engines.paged.families.dense import DENSE
from tests.engines.paged.families.mixtures import MIXTURES, REFUSED

FAMILIES = DENSE | MIXTURES

say = partial(print, flush=True)

_COUNT_HELP = (
    "how many prompts each family gets; 60 unless given, 12 with --rounded. Without that, a family is also wrong if no "
    "row of it was preempted, which was seen with 8 prompts and more, and not with 2"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a family does not keep the contract."""
    parser = _make_parser()
    given = parser.parse_args(arguments)
    device = loading.device_of(World()).type
    if given.device not in (None, device):
        parser.error(f"--device {given.device}: here torch computes on {device}; CUDA_VISIBLE_DEVICES= hides all GPUs")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    part, parts = given.part
    names = [name for name in FAMILIES if not given.families or any(each in name for each in given.families)]
    if not names:
        parser.error(f"no family has any of these in its name: {', '.join(given.families)}")
    names = names[part - 1 :: parts]
    judge, count = (_judge_rounded, given.count or 12) if given.rounded else (_judge, given.count or 60)
    not_taken = [name for name in names if given.rounded and _say_not_taken(name)]
    wrong = [name for name in names if name not in not_taken and not _say_outcome(name, partial(judge, count=count))]
    if not given.families and not given.rounded:
        wrong += [name for name in list(REFUSED)[part - 1 :: parts] if not _say_refusal(name)]
    if not_taken:
        say(f"{len(not_taken)} refused: {', '.join(not_taken)}")
    say(f"{len(names)} families, {len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}")
    return int(bool(wrong))


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/families", description=__doc__.partition("\n\n")[0])
    parser.add_argument("families", nargs="*", metavar="PART", help="of the names of families; all unless given")
    parser.add_argument("--count", type=int, metavar="N", help=_COUNT_HELP)
    parser.add_argument("--rounded", action="store_true", help="bfloat16: log-probabilities beside exact ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="end at once unless torch computes there")
    parser.add_argument(
        "--part", type=_read_part, default=(1, 1), metavar="I/N", help="every Nth family, from the Ith on"
    )
    return parser


def _read_part(text: str) -> tuple[int, int]:
    """Reads `I/N`; raises `ArgumentTypeError`."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: give I/N, with I from 1 to N")
    return int(part), int(parts)


def _say_outcome(name: str, judge: Callable[[str, Path], tuple[Sequence[str], str, bool]]) -> bool:
    """Prints the line of a family; returns whether it is as it must be."""
    since = time.monotonic()
    kind = FAMILIES[name]["model_type"]
    try:
        with tempfile.TemporaryDirectory(prefix="batchgen-families-") as folder:
            cells, wrong, is_kept = judge(name, Path(folder))
    except Exception as error:  # a family that fails must not hide the others
        say(f"| {name} | {kind} | {type(error).__name__}: {' '.join(str(error).split())} |")
        return False
    say(f"| {name} | {kind} | {' | '.join(cells)} | {time.monotonic() - since:.1f} s |{' ' if wrong else ''}{wrong}")
    return is_kept


def _judge(name: str, folder: Path, count: int) -> tuple[Sequence[str], str, bool]:
    """Returns the cells of a family's line, what is wrong, and whether it is as it must be."""
    found = contract.check(FAMILIES[name], folder, count)
    cells = (
        f"{found.greedy} of {found.rows}",
        f"{found.sampled} of {found.rows}",
        f"{found.apart:.1e}",
        f"{found.preemptions} preemptions",
        f"{found.texts} texts",
        f"{found.ties} ties",
    )
    wrong = found.wrong
    if not wrong and not found.preemptions:
        wrong = "no row was preempted, so that preemption was not tried: give a larger --count"
    return cells, wrong, found.is_kept


def _judge_rounded(name: str, folder: Path, count: int) -> tuple[Sequence[str], str, bool]:
    """As `_judge`, in bfloat16."""
    if torch.cuda.is_available():
        torch.compiler.reset()  # or the compiler gives up after the layers of some families, and they run without it
    found = rounded.check(FAMILIES[name], folder, count)
    texts = f"{found.texts} texts of {found.rows}"
    cells = (found.device, texts, f"{found.tokens} tokens", f"paged {found.paged}", f"own {found.own}")
    return cells, "" if found.is_kept else "not within the tolerance", found.is_kept


def _say_not_taken(name: str) -> bool:
    """Prints the line of a family whose heads a GPU's kernels do not take; returns whether it is one."""
    said = rounded.find_refusal(FAMILIES[name])
    if said:
        say(f"| {name} | {FAMILIES[name]['model_type']} | refused: {said} |")
    return bool(said)


def _say_refusal(name: str) -> bool:
    settings, reason = REFUSED[name]
    said = contract.find_refusal(settings)
    say(f"| {name} | {settings['model_type']} | refused: {said} |")
    return reason in said


if __name__ == "__main__":
    sys.exit(main())
