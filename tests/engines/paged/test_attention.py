"""Attention over pages beside attention over one sequence at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from batchgen.engines.paged.attention import attend, attend_in_torch
from batchgen.engines.paged.layout import lay_out
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import widen_numbers
from tests.engines.paged import kernel_cases
from tests.engines.paged.attention_cases import (
    FEATURES,
    TOLERANCES,
    Case,
    Features,
    Heads,
    case,
    copy_cache,
    find_error,
    make_wrong_shapes,
    with_broken_key,
    with_broken_token,
    with_rounded_cache,
    with_stale_cache,
)
from tests.kernels import assert_none_wrong

HEADS = (Heads(4, 4, 16, 16), Heads(6, 2, 16, 16), Heads(6, 2, 24, 16), Heads(4, 2, 16, 40))


def alone(of: Case, slot: int, first: int, count: int, length: int) -> torch.Tensor:
    """[count, heads, value size], in float64: the last tokens of one sequence, score by score."""
    _, cache = of.reference()
    halves = [half if isinstance(half, torch.Tensor) else widen_numbers(half, torch.float64) for half in cache.halves]
    shape = of.shape
    pages = of.layout.block_table[slot].long()
    group = of.query.shape[1] // of.key.shape[1]
    out = []
    for token in range(count):
        place = length - count + token
        begin = max(0, place + 1 - shape.window) if shape.window else 0
        places = torch.arange(begin, place + 1)
        # [places, key heads, size] each
        keys, values = (half[pages[places // PAGE_SIZE], :, places % PAGE_SIZE] for half in halves)
        rows = []
        for head in range(of.query.shape[1]):
            query = of.query[0, head, first + token].double()
            scores = keys[:, head // group] @ query * shape.scale
            if shape.softcap:
                scores = shape.softcap * (scores / shape.softcap).tanh()
            if shape.slopes is not None:
                scores += shape.slopes[head].double() * (places - place)
            if shape.sinks is not None:
                scores = torch.cat([scores, shape.sinks[head : head + 1].double()])
            rows.append(scores.softmax(0)[: len(places)] @ values[:, head // group])
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("is_rounded", [False, True], ids=["", "rounded"])
def test_each_sequence_is_as_if_it_were_alone(heads: Heads, features: Features, is_rounded: bool) -> None:
    of = case(heads, torch.float64, features)
    of = with_stale_cache(with_rounded_cache(of) if is_rounded else of)
    out, _ = of.reference()
    for slot in range(of.layout.decoding - 1):
        length = int(of.layout.positions[slot]) + 1
        torch.testing.assert_close(out[0, slot : slot + 1], alone(of, slot, slot, 1, length))
    for chunk in of.layout.chunks:
        tokens = slice(chunk.first, chunk.first + chunk.count)
        torch.testing.assert_close(out[0, tokens], alone(of, chunk.slot, chunk.first, chunk.count, chunk.length))


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_rounding_is_that_of_the_type(features: Features) -> None:
    for dtype, tolerance in TOLERANCES.items():
        of = case(Heads(6, 2, 24, 16), dtype, features)
        out, _ = of.attend()
        assert out.dtype == dtype
        real = of.layout.positions >= 0
        assert find_error(out[:, real], of.reference()[0][:, real]) < tolerance


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("is_rounded", [False, True], ids=["", "rounded"])
def test_a_broken_token_reaches_those_that_see_it_alone(features: Features, number: float, is_rounded: bool) -> None:
    clean = case(Heads(6, 2, 24, 16), torch.float64, features)
    clean = with_rounded_cache(clean) if is_rounded else clean
    broken = with_broken_token(clean, 3, 40, number)
    expected, _ = clean.reference()
    out, _ = broken.reference()
    chunk = clean.layout.chunks[3]
    places = torch.arange(out.shape[1]) - chunk.first
    window = features.window
    sees = (places >= 40) & (places < (40 + window if window else chunk.count)) & (places < chunk.count)
    assert out[0, sees].isnan().all()
    torch.testing.assert_close(out[0, ~sees], expected[0, ~sees])


def test_a_cap_does_not_hide_a_broken_key() -> None:
    """A score of infinity would be the cap: a text, where there is none."""
    of = case(Heads(6, 2, 24, 16), torch.float64, Features(softcap=5.0))
    chunk = of.layout.chunks[1]
    out, _ = with_broken_key(of, 6, chunk.first + 40).reference()
    broken = torch.zeros(out.shape[1], dtype=torch.bool)
    broken[6] = True  # of a sequence that decodes
    broken[chunk.first + 40 : chunk.first + chunk.count] = True
    assert out[0, broken].isnan().all()
    assert out[0, ~broken].isfinite().all()


def test_layers_may_differ_in_their_key_heads() -> None:
    """The rows of pages are worked out once a step, for layers of each number of heads."""
    two, four = (case(Heads(8, keys, 16, 16), torch.float64, Features(window=37)) for keys in (2, 4))
    assert torch.equal(two.layout.block_table, four.layout.block_table)
    for of in (two, four, two):
        one_layout = replace(of, layout=two.layout)
        cache = copy_cache(of.layout.caches[0])
        out = attend_in_torch(of.query, of.key, of.value, cache, one_layout.layout, of.shape)
        expected, kept = of.reference()
        torch.testing.assert_close(out, expected)
        assert all(torch.equal(half, other) for half, other in zip(cache[:2], kept[:2], strict=True))


@pytest.mark.parametrize("features", [FEATURES[0], FEATURES[-1]], ids=str)
def test_the_operator_takes_all_features_through_the_compiler(features: Features) -> None:
    """Of the right size where the compiler only works out sizes; without a layout, causal over the given tokens."""
    of = case(Heads(6, 2, 24, 16), torch.float64, features)
    layer = torch.tensor([0])

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(query, key, value, layer, of.shape).flatten(2)

    with lay_out(replace(of.layout, caches=[copy_cache(of.layout.caches[0])])):
        out = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)(of.query, of.key, of.value)
    torch.testing.assert_close(out, of.reference()[0].flatten(2))
    chunk = of.layout.chunks[1]
    assert chunk.count == chunk.length
    tokens = slice(chunk.first, chunk.first + chunk.count)
    plain = forward(*(tensor[:, :, tokens] for tensor in (of.query, of.key, of.value)))
    torch.testing.assert_close(plain, out[:, tokens])


def test_only_the_places_of_the_tokens_change() -> None:
    of = case(Heads(4, 2, 24, 16), torch.float64)
    _, cache = of.reference()
    real = of.layout.positions >= 0
    slots, positions = of.layout.slots[real].long(), of.layout.positions[real].long()
    pages = of.layout.block_table[slots, positions // PAGE_SIZE]
    expected = set(zip(pages.tolist(), (positions % PAGE_SIZE).tolist(), strict=True))
    for half, before in zip(cache[:2], of.layout.caches[0][:2], strict=True):
        changed = (half != before).any(-1).any(1)  # [pages, PAGE_SIZE]
        assert {(page, place) for page, place in changed.nonzero().tolist()} == expected


_SMALL = 1024  # numbers in all heads of the query
_CASES = [
    pytest.param(*of, marks=() if of[0].queries * of[0].key_size <= _SMALL else pytest.mark.slow)
    for of in kernel_cases.CASES
]


@pytest.mark.parametrize(("heads", "dtype", "features"), _CASES, ids=str)
def test_no_case_is_blind(heads: Heads, dtype: torch.dtype, features: Features) -> None:
    """A feature that is left out or wrong changes the output of each case by far more than it tolerates."""
    of = case(heads, dtype, features)
    real = of.layout.positions >= 0
    expected = of.reference()[0][:, real]
    for what, shape in make_wrong_shapes(of.shape).items():
        wrong = replace(of, shape=shape).reference()[0][:, real]
        assert find_error(wrong, expected) > 2 * TOLERANCES[dtype], what


@pytest.mark.slow
def test_kernels_compute_the_same() -> None:
    """Interpreted, where there is no GPU. Triton is not in the environment: what finds it takes it for a GPU's."""
    assert_none_wrong("tests.engines.paged.kernel_cases")
