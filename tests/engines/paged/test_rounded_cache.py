"""`--kv-dtype fp8`: the tokens are those of Transformers over a cache that is rounded in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import batchgen
from batchgen.checkpoint import read_json
from batchgen.engine import EngineError
from batchgen.engines import parse_options
from batchgen.engines.accelerate import Accelerate
from batchgen.engines.paged.cache import find_format
from batchgen.engines.paged.engine import Paged
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import NOT_FINITE, round_numbers, widen_numbers
from batchgen.models import footprint
from batchgen.models.shapes import config_of
from tests import tiny_models as models
from tests.commands.starts import call
from tests.engines.paged.families import contract
from tests.engines.paged.families.mixtures import MIXTURES
from tests.engines.paged.test_paged import load, prompts, texts

# Two ways to compute a number of 32 bits differ in its last bits, of which rounding to 8 bits makes two neighbours once
# in some ten thousand numbers. Behind each kind: most rows that may become others by it. Small models have none here.
KINDS: dict[str, tuple[Callable[[int], PreTrainedModel], int]] = {
    "llama": (models.llama, 0),
    "bloom": (models.bloom, 0),  # ALiBi
    "mistral": (models.mistral, 0),  # a window in all layers
    # A window in every other layer, sinks.
    "gpt-oss": (lambda _: contract.build(MIXTURES["gpt-oss 20B"] | {"sliding_window": 24}), 4),
}
SETTINGS = (
    ("kv_dtype=fp8",),
    ("kv_dtype=fp8", "step_tokens=17"),
    ("kv_dtype=fp8", "cache_tokens=160", "expected_share=0.02", "step_tokens=64"),  # rows are preempted
)


def round_slowly(numbers: torch.Tensor) -> torch.Tensor:
    """As `rounding` says it: each row over the smallest power of two with which nothing is above 448."""
    largest = numbers.double().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scale = 2 ** (largest / 448).log2().ceil()
    rounded: torch.Tensor = (numbers.double() / scale).float().to(torch.float8_e4m3fn).double() * scale
    return rounded.to(numbers.dtype)


@contextmanager
def rounded_transformers() -> Iterator[None]:
    """The caches of Transformers keep what they are given rounded, and give it back so."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (DynamicLayer, DynamicSlidingWindowLayer):
            update = kind.update

            def rounding(self: Any, key: Any, value: Any, *rest: Any, update: Any = update, **options: Any) -> Any:
                return update(self, round_slowly(key), round_slowly(value), *rest, **options)

            patch.setattr(kind, "update", rounding)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_a_cache_that_is_rounded(kind: str, tmp_path: Path) -> None:
    build, most_others = KINDS[kind]
    path = models.save(tmp_path / kind, build)
    rows = prompts(18)
    model = models.Model(path)
    with rounded_transformers():
        expected = {row.id: model.tokenizer.decode(model.alone(row)) for row in rows}
    plain = {row.id: model.tokenizer.decode(model.alone(row)) for row in rows}
    assert sum(plain[row.id] != expected[row.id] for row in rows) > len(rows) / 3  # or this test shows nothing
    for settings in SETTINGS:
        with load(path, *settings, batch_size=16) as engine:
            said = {id: one.text for id, one in texts(engine, rows).items()}
            assert sum(said[row.id] != expected[row.id] for row in rows) <= most_others, settings
            assert (engine.preemptions > 0) == (len(settings) == 4)
            assert engine._runner is not None
            assert all(cache.keys.dtype == torch.float8_e4m3fn for cache in engine._runner._caches)


def test_a_row_has_the_same_text_whatever_is_beside_it(tiny_llama: Path) -> None:
    """A scale that hung on the rows which came first would make a resumed run have other texts than a whole one."""
    rows = prompts(12)
    with load(tiny_llama, *SETTINGS[0]) as engine:
        together = texts(engine, rows)
    with load(tiny_llama, *SETTINGS[0], batch_size=1) as engine:
        assert texts(engine, rows[::-1]) == together


def test_rounding_is_to_the_nearest_number_over_the_smallest_scale() -> None:
    source = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        numbers = torch.randn(400, 3, 24, generator=source) * torch.exp2(torch.randn(400, 3, 1, generator=source) * 8)
        numbers = numbers.to(dtype)
        rounded = round_numbers(numbers)
        wide = widen_numbers(rounded, dtype)
        assert torch.equal(wide, round_slowly(numbers))
        assert torch.equal(widen_numbers(round_numbers(wide), dtype), wide)
        assert rounded.numbers.float().abs().amax(-1).min() >= 224


@pytest.mark.parametrize(
    ("largest", "exponent", "number"),
    [
        (0.0, 1, 0.0),
        (1e-40, 1, 0.0078125),  # a subnormal number of float32, over the smallest scale that there is
        (1.0, 119, 256.0),
        (1.75, 119, 448.0),
        (1.7500001, 120, 224.0),
        (448.0, 127, 448.0),
        (449.0, 128, 224.0),
        (3e38, 247, 224.0),
        (torch.inf, NOT_FINITE, 0.0),
        (-torch.inf, NOT_FINITE, 0.0),
        (torch.nan, NOT_FINITE, 0.0),
    ],
)
def test_a_scale_is_the_smallest_power_of_two_under_which_nothing_is_above_448(
    largest: float, exponent: int, number: float
) -> None:
    rounded = round_numbers(torch.tensor([0.0, largest, -largest / 2]))
    assert (int(rounded.exponents), float(rounded.numbers[1])) == (exponent, number)
    wide = widen_numbers(rounded, torch.float32)
    assert wide.isnan().all() if exponent == NOT_FINITE else wide.isfinite().all()


def test_there_is_room_for_nearly_twice_the_tokens_of_16_bits_in_the_same_memory(tiny_llama: Path) -> None:
    config = models.Model(tiny_llama).model.config
    heads = 2 * 2  # layers, and heads of keys in each
    sizes = []
    for settings in ((), SETTINGS[0]):
        with load(tiny_llama, *settings, "cache_tokens=1600", selftest=False) as engine:
            runner = engine._runner
            assert runner is not None
            made = [part for cache in runner._caches for part in cache if part is not None]
            kept = sum(part.numel() * part.element_size() for part in made)
            assert kept == runner.token_bytes * runner.pages * PAGE_SIZE
            sizes.append(runner.token_bytes)
    numbers = config.hidden_size // config.num_attention_heads
    assert sizes == [heads * 2 * numbers * 4, heads * 2 * (numbers + 1)]
    kept_in = [find_format(name, torch.bfloat16) for name in footprint.KV_DTYPES]
    llama = config_of("llama-8b")
    wide, narrow = (footprint.cache_bytes_per_token(llama, kept) for kept in kept_in)
    assert wide / narrow == pytest.approx(2 * 128 / 129)


def test_a_start_records_the_type_of_its_cache_and_the_next_may_have_another(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "x", "max_new_tokens": 0}\n')
    words = ["run", "p.jsonl", "-o", "out", "--model", str(tiny_llama), "--max-new-tokens", "3", "--engine", "paged"]
    for more, recorded in ((["--kv-dtype", "fp8"], "fp8"), ([], "auto")):  # the bad row is tried again
        ended = call(tmp_path, *words, *more)
        assert ended.code == 3, ended.err
        attempt = sorted((tmp_path / "out" / "attempts").glob("?????.json"))[-1]
        assert read_json(attempt)["settings"]["kv_dtype"] == recorded


def test_other_engines_and_types_are_refused_by_name() -> None:
    with pytest.raises(EngineError, match="engine accelerate has no setting 'kv_dtype'"):
        parse_options(Accelerate, ("kv_dtype=fp8",))
    with pytest.raises(EngineError, match="kv_dtype=int8: must be one of auto, fp8"):
        parse_options(Paged, ("kv_dtype=int8",))


@pytest.mark.slow
def test_the_self_test_allows_for_what_rounding_decides(smollm2: Path, tmp_path: Path) -> None:
    """In float32: a key at the border of two numbers of 8 bits goes either way, by the order of a sum."""
    lines = [
        {"prompt": "The capital of France is", "max_new_tokens": 16},
        {"prompt": "One, two, three, four,", "max_new_tokens": 16},
        {"messages": [{"role": "user", "content": "Write two lines about the sea."}], "max_new_tokens": 24},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"engine_settings": ["kv_dtype=fp8"], "engine": "paged", "dtype": "float32"}
    status = batchgen.run(
        str(tmp_path / "p.jsonl"), tmp_path / "out", batchgen.RunSettings(model=str(smollm2), **settings)
    )
    assert (status.good, status.failed) == (3, 0)
