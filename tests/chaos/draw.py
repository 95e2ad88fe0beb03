"""What happens to a run, drawn from a seed: its starts, what strikes each, and what befalls the folder between them."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

ENGINES = ("echo", "accelerate", "paged", "ds-zero", "ds-inference")
# A start of a DeepSpeed engine takes 10 s or more on two cores, one of echo half a second.
WEIGHTS = {"echo": 136, "accelerate": 26, "paged": 26, "ds-zero": 6, "ds-inference": 6}
TOGETHER = ("ds-zero", "ds-inference")  # ranks wait for each other, so that a frozen one is missed
PATIENCE_SECONDS = 4  # of ranks whose peer is frozen for good

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)

# While a start works:
SIGNALS = ("stop all", "stop one", "stop two", "kill one", "kill starter", "kill all", "pause one", "freeze one")
CUT_POWER, FAIL_DISK, FILL_DISK, SECOND_START = "cut power", "fail disk", "fill disk", "second start"
STRIKES = (*SIGNALS, CUT_POWER, CUT_POWER, FAIL_DISK, FILL_DISK, SECOND_START)
_NEEDS_PEERS = ("stop two", "freeze one")  # a lone process is the starter too, and nobody is there to miss it

# Between two starts:
HARMS = ("cut file", "flip bytes", "tear tail", "delete file", "move folder")
REFUSED = ("change input", "read-only folder", "lose run.json")  # the next start says why, and this one is undone

APPEND = "append rows"  # to the input: until then, the run has only the beginning of it

KINDS = tuple(dict.fromkeys((*STRIKES, *HARMS, *REFUSED, APPEND)))
_STARTS = 3  # of a history that `deal` makes, besides the last one


@dataclass(frozen=True)
class Start:
    """How a run is started, and what then happens to it."""

    engine: str
    ranks: int
    batch_size: int
    heartbeat: float
    settings: tuple[str, ...] = ()
    kind: str = "none"
    early: bool = False  # while it loads: `moment` counts from the start of the process
    moment: float = 0.0  # 0 to 1: of the time, or of the operations on files, that a start takes
    victims: tuple[int, ...] = ()  # ranks, in the order in which they are struck
    signals: tuple[int, ...] = ()
    gap: float = 0.0  # seconds between two strokes; how long a rank pauses
    error: int = 0  # of a disk that fails
    operation: int = 0  # at which the disk fails or the power goes; 0: by `moment`

    def __str__(self) -> str:
        names = "+".join(signal.Signals(number).name for number in self.signals)
        names = names or (errno.errorcode[self.error] if self.error else "")
        ranks = f" (rank {', '.join(map(str, self.victims))})" if self.victims else ""
        when = ", loading" if self.early else ", working"
        more = f" {' '.join(self.settings)}" if self.settings else ""
        what = f"{' '.join(filter(None, (self.kind, names)))}{ranks}{when}" if self.kind != "none" else "undisturbed"
        return f"{self.ranks} rank(s), batch {self.batch_size}{more}: {what}"


@dataclass(frozen=True)
class Harm:
    """Something that befalls the folder while nobody works on it."""

    kind: str
    seed: int

    def __str__(self) -> str:
        return self.kind


def engine_of(seed: int) -> str:
    """The engine of history `seed`, where none is named."""
    return random.Random(f"engine {seed}").choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


def draw(seed: int, engine: str) -> list[Start | Harm]:
    """The steps of a history; the last one is an undisturbed start."""
    choose = random.Random(f"{engine} {seed}")
    steps: list[Start | Harm] = []
    for _ in range(choose.randint(1, 4 if engine == "echo" else 2)):
        steps.append(_struck(choose, engine, choose.choice(strikes_of(engine))))
        steps += [Harm(choose.choice(HARMS), choose.getrandbits(32)) for _ in range(choose.choice((0, 0, 1, 1, 2)))]
        if choose.random() < 0.25:
            steps.append(Harm(choose.choice(REFUSED), choose.getrandbits(32)))
    last = _start(choose, engine, choose.randint(1, 3))
    if choose.random() < 0.3:
        steps.insert(choose.randint(1, len(steps)), Harm(APPEND, choose.getrandbits(32)))
    return [*steps, last]


def strikes_of(engine: str) -> Sequence[str]:
    """What can strike a start of `engine`; twice, what shall do so more often."""
    return [kind for kind in STRIKES if engine in TOGETHER or kind != "freeze one"]


def deal(seed: int, times: int) -> list[list[Start | Harm]]:
    """Few histories of `echo` that have every kind of fault `times` times, but for those that need a model."""
    choose = random.Random(f"deal {seed}")
    struck = [_struck(choose, "echo", kind) for kind in dict.fromkeys(strikes_of("echo")) for _ in range(times)]
    choose.shuffle(struck)
    befallen: list[list[Start | Harm]] = [[start] for start in struck]
    for kind in (*HARMS, *REFUSED) * times:
        choose.choice(befallen).append(Harm(kind, choose.getrandbits(32)))
    for part in befallen[::_STARTS][:times]:  # one of a history
        part.append(Harm(APPEND, choose.getrandbits(32)))
    parts = [befallen[first : first + _STARTS] for first in range(0, len(befallen), _STARTS)]
    return [[*chain.from_iterable(part), _start(choose, "echo", choose.randint(1, 3))] for part in parts]


def _struck(choose: random.Random, engine: str, kind: str) -> Start:
    start = _start(choose, engine, choose.randint(2 if kind in _NEEDS_PEERS else 1, 3), together=kind == "freeze one")
    common = replace(start, kind=kind, early=choose.random() < 0.3, moment=choose.random())
    if kind not in SIGNALS:
        return replace(common, error=choose.choice(DISK_ERRORS) if kind == FAIL_DISK else 0)
    if kind == "freeze one":
        common = replace(common, settings=(*common.settings, f"timeout_seconds={PATIENCE_SECONDS}"))
    verb, whom = kind.split()
    signals: dict[str, tuple[int, ...]] = {
        "stop": tuple(choose.choices(STOPS, k=2 if whom == "two" else 1)),
        "kill": (signal.SIGKILL,),
        "freeze": (signal.SIGSTOP,),
        "pause": (signal.SIGSTOP, signal.SIGCONT),
    }
    victims = tuple(choose.sample(range(start.ranks), {"one": 1, "two": 2}.get(whom, 0)))
    return replace(common, victims=victims, signals=signals[verb], gap=choose.uniform(0.0, 3.0))


def _start(choose: random.Random, engine: str, ranks: int, together: bool = False) -> Start:
    settings: tuple[str, ...] = ()
    if engine == "echo":
        settings = (f"seconds={choose.choice((0.003, 0.01, 0.03))}",)
    elif engine == "ds-zero" and choose.random() < 0.25:
        settings = ("offload=cpu",)
    elif engine == "ds-inference":
        ranks = min(ranks, 2)
        settings = (f"tp={ranks if together else choose.randint(1, ranks)}",)
    return Start(engine, ranks, choose.choice((1, 2, 3, 5, 8)), choose.uniform(0.05, 0.1), settings)
