"""The contract of an engine: a class that derives from `Engine`, which `batchgen.engines` finds by its file's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from batchgen.types import Batch, Prompt, Tokens, UserError
from batchgen.world import World

DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4", "nf4")
"""The types of numbers that `--dtype` takes. Which of them an engine knows is `Engine.dtypes`."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The part of the input that a rank works on. Ranks of the same index see the same prompts; one of them writes."""

    index: int
    count: int  # of streams
    writes: bool  # this rank writes what the stream has generated


@dataclass(frozen=True, slots=True)
class Placement:
    """One way for an engine to hold a model over the GPUs of a node. Sizes are in bytes."""

    settings: tuple[str, ...]  # the engine's settings for it, each `name=value`
    ranks: int
    streams: int
    device: int  # weights that lie on each device
    gathered: int = 0  # device memory for the weights that a forward gathers
    host: int = 0  # weights in the memory of the host, of all ranks together
    disk: int = 0  # weights on a disk, of all ranks together
    moved: int = 0  # weights that each rank waits for in a step
    path: str = ""  # where they come from: gpus, host or disk
    sharing: int = 1  # devices that share the work on each row
    in_turn: bool = False  # those devices compute one after the other
    most_rows: int | None = None  # of a batch whose size the engine chooses; None: `limits.count_rows_that_fit` says


@dataclass(frozen=True, slots=True)
class Pace:
    """What a decode step takes besides matrix products, by which `plan` estimates the speed of an engine.

    The figures here are those of Transformers' `generate` on an H100 (benchmarks/README.md).
    """

    layer_seconds: float = 0.0010  # that Python takes for each layer, however few the rows
    host_layer_seconds: float = 0.0015  # the same on a CPU, with the operations that are no matrix products
    shared_layer_seconds: float | None = None  # the same where several ranks share each layer; None: as alone
    read_share: float = 0.5  # the part of the bandwidth at which weights are read: many matrices, some of them small
    # How often a step moves the cache: `generate` copies it to make it longer, and attention that writes its scores
    # out (BLOOM's) moves them in several types besides. The first is a count, not measured.
    cache_passes: float = 5.0
    cache_passes_eager: float = 10.0
    continuous: bool = False  # when a row ends, another one takes its place at once
    page_size: int = 1  # tokens that the cache gives out memory for at once


class Tokenizer(Protocol):
    """The part of a model that turns rows into tokens. It needs no weights and no device."""

    context: int | None  # the most tokens of prompt and generation together; None: there is no limit
    vocabulary: int | None  # all token ids are below this number; None: the model does not say

    def chat(self, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        """Returns the conversation as one text, through the model's chat template, ready for the assistant's turn.

        Args:
            kwargs: variables of the template, `tools` and `documents` among them; `add_generation_prompt` and
                `continue_final_message` as Transformers has them; `chat_template`, to be taken in the place of the
                model's.

        Raises:
            ValueError: the model has no chat template, or the template refused the conversation or leaves a part of it
                out.
        """

    def template_text(self, **kwargs: object) -> str | None:
        """Returns the text of the chat template that `chat` takes for these variables; None: it is no template.

        Raises:
            ValueError: the model has none.
        """

    def find_turn(self, text: str, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        """Returns the end of `text`, which `chat` has made of the same, that belongs to the assistant's next turn: its
        header, and what the prompt has begun of it."""

    def token_name(self, token: int) -> str | None:
        """Returns the tokenizer's name of a token, for a sentence; None: it has no such token, or no names."""

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[Tokens]:
        """Returns the token ids of each text.

        Args:
            special: add what the tokenizer puts around a plain text (beginning of sequence); a text from a chat
                template has it already.
        """

    def find_lost(self, text: str) -> str:
        """Returns the letters and digits of `text` that the tokenizer drops without a token in their place."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every engine is told besides its own `Options`."""

    model: str  # the folder of the model; "" for an engine that needs none
    dtype: str  # one of DTYPES
    batch_size: int | None  # the most prompts in a batch; None: the engine chooses
    world: World
    selftest: bool = True  # rows of the first batch are computed again alone, and compared
    run: str = ""  # tells this run, or its shard, from all others; the same in all its attempts
    cache: str = ""  # batchgen's own folder on this machine, for files that are built once
    adapter: str = ""  # the folder of a LoRA adapter that is merged into the weights; "": none
    adapters: Mapping[str, str] = field(default_factory=dict)  # folders of the LoRA adapters that rows name, by name
    limits: Mapping[int, int] = field(default_factory=dict)
    """Most rows of a batch, by its length in tokens: what earlier attempts died of (`OutOfStep`)."""
    tokenizer: Tokenizer | None = None  # the model's, as rows are read with it; None: nobody has read it


@dataclass(slots=True)
class SignsOfLife:
    """What an engine shows of its progress. The threads of the heartbeat and of the watchdog read it."""

    generated_tokens: int = 0  # so far, by this rank, also in batches that are not finished
    steps: int = 0  # forwards so far, also those that were made only because other ranks need them
    idle_reports: int = 0  # how often another rank has said that it is alive and has nothing to do
    timeout_seconds: float | None = None  # without a step or such a report, a rank is taken for dead; None: never
    awaited_ranks: Collection[int] | None = None  # whose steps this rank's steps wait for; None: all of the world's
    is_waiting: bool = False  # its own part is done, and it waits for others, for as long as they take


class Peers(Protocol):
    """The ranks that compute one model together, this rank included.

    All of them make the same calls in the same order, and a call returns the same on each of them. Tensors and arrays
    are `Any` here because this module loads neither torch nor NumPy.
    """

    @property
    def count(self) -> int:
        """The number of these ranks, this one included."""

    @property
    def place(self) -> int:
        """The position of this rank among them, from 0; the first one leads."""

    def any_rank(self, flag: bool) -> bool:
        """Returns whether `flag` is true on at least one rank."""

    def least(self, number: int) -> int:
        """Returns the smallest of the ranks' numbers."""

    def tokens(self, tokens: Any) -> Any:
        """Overwrites `tokens`, an integer tensor of the same shape on all ranks, with the leader's; returns it."""

    def tell(self, numbers: Any) -> None:
        """Sends an int64 array, [numbers], to the other ranks. Only the leader calls it; the others call `told`."""

    def told(self) -> Any:
        """Waits, for as long as it takes, for the array that the leader sends next; returns it."""


class Engine(ABC):
    """Turns prompts into generations, for one stream.

    The life of an engine: its class methods are called before any weights are loaded; the constructor loads them;
    `generate` is called once; the end of the `with` statement frees memory and process groups.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of this engine alone, set with `--set name=value`. An engine with settings defines its own."""

    needs_model: ClassVar[bool] = True
    needed_packages: ClassVar[Sequence[str]] = ()  # whatever its options are
    serves_cpu: ClassVar[bool] = False
    """It is meant for machines without a GPU, too: there `--engine auto` chooses among such engines."""
    reads_split: ClassVar[Collection[str]] = ()
    """It reads models whose files are split by rank, in these types."""
    takes_adapters: ClassVar[bool] = False
    """Rows may each name one of several adapters."""
    keeps_quantised: ClassVar[bool] = False  # it computes with weights as they are stored; others widen them
    group_setting: ClassVar[str | None] = None
    """The setting that says how many ranks share a model; None: there is none."""
    dtypes: ClassVar[Sequence[str]] = ("auto", "float32", "bfloat16", "float16")
    pace: ClassVar[Pace] = Pace()
    calls_together: bool = False
    """Ranks take part in each other's steps: each rank is needed even when its own queue is empty."""

    @cached_property
    def signs(self) -> SignsOfLife:
        """What this engine shows of its progress, for the heartbeat and the watchdog."""
        return SignsOfLife()

    @classmethod
    def packages(cls, options: Any, dtype: str) -> Sequence[str]:
        """Returns the packages that it needs besides torch and Transformers."""
        return cls.needed_packages

    @classmethod
    def check(cls, setup: Setup, tokenizer: Any, options: Any) -> None:
        """Checks what would end every rank alike, as far as it shows without weights and devices.

        Raises:
            EngineError: the engine cannot run like this; the message says why and what to do.
        """
        if setup.adapters and not cls.takes_adapters:
            raise EngineError(
                "this engine has one model for all rows, which cannot name adapters of their own: --adapter FOLDER, "
                "without a name, merges one adapter for all of them, and --engine paged has several at once"
            )
        cls.stream(setup.world, options)

    @classmethod
    def stream(cls, world: World, options: Any) -> Stream:
        """Returns this rank's part of the input: by default every rank is a stream of its own."""
        return Stream(world.rank, world.size, writes=True)

    @classmethod
    def will_call_together(cls, options: Any) -> bool:
        """Returns what `calls_together` will be of an engine with these options."""
        return cls.calls_together

    @classmethod
    def placements(cls, config: Any, weights: Any, gpus: int) -> list[Placement]:
        """Returns the ways to hold a model over `gpus` GPUs, whatever their memory; none: it cannot hold such a model.

        Args:
            config: the model's Transformers config.
            weights: its `batchgen.models.parameters.Parameters`.
        """
        return []

    @classmethod
    @abstractmethod
    def tokenizer(cls, model: str) -> Tokenizer:
        """Returns the tokenizer of the model in folder `model`; no weights are read."""

    @abstractmethod
    def __init__(self, setup: Setup, options: Any) -> None:
        """Loads the model.

        Raises:
            EngineError: it cannot run here; the message says why and what to do.
        """

    @abstractmethod
    def generate(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """Pulls prompts as memory becomes free, and yields batches as they finish.

        Every pulled prompt is in exactly one yielded batch, unless `stop()` became true: then the engine returns soon,
        at the latest after the current decode step where it can, and what was in flight is done again by the next
        start. An engine whose ranks make each step together lets them agree on `stop()` before a step, and never acts
        on the answer of one rank alone: ranks that stop at different steps wait for each other for ever.
        Out of memory never leaves this function: the batch is split, and a prompt that does not fit even alone is a
        failed generation.
        """

    def abandon(self) -> None:
        """Ends what waits for other ranks, which may be gone. It is called before `close`, after an exception."""

    def close(self) -> None:
        """Frees devices and process groups."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abandon()
        self.close()


class Died(Exception):
    """The attempt cannot go on, but the next start can. The message is a sentence for the person at the terminal."""


class OutOfStep(Died):
    """A rank ran out of memory in the middle of a step that all ranks take together.

    The others wait for it inside that step, so that nobody can agree on anything: the attempt ends, resumable, and the
    next one makes smaller batches.
    """

    length: int = 0  # tokens of each row of the batch that did not fit, prompt and new ones; 0: nobody knows
    rows: int = 0  # rows of that batch


class EngineError(UserError):
    """The engine cannot run with these settings on this machine. The message is a sentence for the user."""
