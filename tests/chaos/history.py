"""A whole history: a run that is struck, harmed and started again until it ends; then the proof of exactly once."""

from __future__ import annotations

import gzip
import random
import re
import shutil
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from batchgen.formats import Changed
from tests.chaos import disk
from tests.chaos.checker import Fault, check, check_kept, finished
from tests.chaos.draw import APPEND, FILL_DISK, REFUSED, Harm, Start, draw
from tests.chaos.harm import harm
from tests.chaos.power import shim
from tests.chaos.rows import MOST_TOKENS, Known, Rows, beginning_of, known_prompts, save_models, write_rows
from tests.chaos.starts import ROOT, End, Place, carry_out

_FILES = 6  # prompt files of each model: their unbroken runs take longer than most histories


@dataclass
class History:
    """What happened to one run."""

    engine: str
    rows: Rows
    steps: list[str] = field(default_factory=list)  # in words
    faults: list[str] = field(default_factory=list)  # kinds of what was really done to it
    ends: list[End] = field(default_factory=list)
    in_flight: dict[int, int] = field(default_factory=dict)  # most tokens in the batches of an attempt, by its number


class Ground:
    """What histories share: models, known prompts, unbroken runs, the library that cuts the power."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.library = shim(folder)

    @cached_property
    def _models(self) -> list[tuple[Path, list[Known]]]:
        return [(model, known_prompts(model)) for model in save_models(self._folder)]

    def rows(self, seed: int, engine: str) -> tuple[Path | None, Rows, Path]:
        """The model, the prompts, and the unbroken run over them."""
        model, number = None, seed
        if engine == "echo":
            choose = random.Random(f"echo {seed}")
            letters = string.ascii_lowercase + " äß€\n"
            texts = ["".join(choose.choices(letters, k=choose.choice((1, 5, 40, 300)))) for _ in range(40)]
            known = [Known(text, ["?"] * MOST_TOKENS, MOST_TOKENS) for text in texts]
        else:
            number = seed % _FILES
            model, known = self._models[number % len(self._models)]
        folder = self._folder / f"{'echo' if model is None else 'model'}-{number}"
        known_already = folder.exists()
        folder.mkdir(exist_ok=True)
        rows = write_rows(folder / "prompts.jsonl", number, known)
        if model is None and number % 4 == 0:  # unpacked into the run folder, where it can be harmed
            packed = folder / "prompts.jsonl.gz"
            packed.write_bytes(gzip.compress(rows.path.read_bytes()))
            rows = replace(rows, path=packed)
        unbroken = folder / "unbroken"
        if not known_already:
            start = Start("echo" if model is None else "accelerate", 1, 16, 1.0)
            carry_out(start, Place(folder, rows, model, self.library, ROOT, False, unbroken, set()))
        return model, rows, unbroken

    def forget(self, seed: int, engine: str) -> None:
        """Removes what only this history needs."""
        if engine == "echo":
            shutil.rmtree(self._folder / f"echo-{seed}", ignore_errors=True)


def live(
    seed: int,
    engine: str,
    folder: Path,
    ground: Ground,
    steps: Sequence[Start | Harm] | None = None,
    product: Path = ROOT,
) -> History:
    """One history in `folder`; afterwards the run's output is that of an unbroken run.

    Raises:
        Fault: it is not, or a start hung or ended as it may not.
    """
    model, original, unbroken = ground.rows(seed, engine)
    rows = replace(original, path=folder / original.path.name)
    shutil.copy(original.path, rows.path)
    history = History(engine, rows)
    steps = draw(seed, engine) if steps is None else steps
    with disk.mounted(folder / "disk") as is_mounted:
        out = folder / "disk" / "out"
        place = Place(folder, rows, model, ground.library, product, is_mounted, out, set())
        for step in steps:
            if step.kind == APPEND and isinstance(step, Harm):
                place.rows = beginning_of(rows, random.Random(step.seed))
        try:
            _live_through(steps, place, history, original.path)
            check(place.out, unbroken, rows, history.in_flight)
        except Fault as fault:
            shutil.copytree(place.disk, folder / "kept-disk", symlinks=True)
            raise Fault(fault.kind, "\n    ".join([str(fault), *history.steps]), fault.rows) from fault
    return history


def _live_through(steps: Sequence[Start | Harm], place: Place, history: History, original: Path) -> None:
    for step in steps:
        if isinstance(step, Start):
            _start(step, place, history)
        elif step.kind in REFUSED:
            _refuse(step, place, history)
        elif step.kind == APPEND:
            before, place.rows = place.rows.count, history.rows
            shutil.copy(original, place.rows.path)
            history.steps.append(f"{step}: {place.rows.count - before}")
            history.faults += [step.kind] if (place.out / "run.json").exists() else []
        else:
            place.out, names, what = harm(step.kind, place.out, random.Random(step.seed))
            place.harmed |= names
            history.steps.append(f"{step}: {what}")
            history.faults += [step.kind] if "nothing" not in what else []
            for attempt in {int(number) for name in names for number in re.findall(r"\d{5}", name)[:1]}:
                history.in_flight.pop(attempt, None)


def _start(start: Start, place: Place, history: History) -> None:
    before, last = finished(place.out), place.attempts
    end = carry_out(start, place)
    history.steps.append(str(end))
    history.ends.append(end)
    history.faults += [start.kind] if end.struck else []
    check_kept(before, place.out, "a start")
    # `paged` holds back finished rows for a second.
    if start.kind not in _NO_HEARTBEATS and start.engine != "paged" and place.attempts > last:
        history.in_flight[place.attempts] = start.ranks * start.batch_size * MOST_TOKENS


_NO_HEARTBEATS = ("cut power", "fail disk", FILL_DISK)  # the last one may be lost


def _refuse(step: Harm, place: Place, history: History) -> None:
    """Harms something that the next start must refuse with a sentence; then undoes it."""
    engine = "echo" if place.model is None else "accelerate"
    probe = Start(engine, 1, 4, 1.0)
    choose = random.Random(step.seed)
    run_file = place.out / "run.json"
    before = finished(place.out)
    if not run_file.exists() or (step.kind == "lose run.json" and not before):
        return
    if step.kind == "change input":
        content = place.rows.path.read_bytes()
        packed = place.rows.path.suffix == ".gz"
        text = gzip.decompress(content) if packed else content
        text = text.replace(b"{", b"{ ", 1) + choose.choice((b"", b'{"prompt": "x"}\n'))
        place.rows.path.write_bytes(gzip.compress(text) if packed else text)
        _probe(probe, place, history, step, (Changed.CAUSE,))
        place.rows.path.write_bytes(content)
    elif step.kind == "lose run.json":
        content = run_file.read_bytes()
        if choose.random() < 0.5:
            run_file.unlink()
        else:
            run_file.write_bytes(content[: choose.randrange(len(content) - 2)])
        _probe(probe, place, history, step, ("run.json",))
        run_file.write_bytes(content)
    else:
        with disk.read_only(place.disk, place.is_mounted) as is_read_only:
            if is_read_only:
                _probe(probe, place, history, step, ("Read-only file system", "Permission denied"))
    check_kept(before, place.out, str(step))


def _probe(probe: Start, place: Place, history: History, step: Harm, sentences: tuple[str, ...]) -> None:
    carry_out(probe, place, sentences)
    history.steps.append(f"{step}: refused")
    history.faults.append(step.kind)
