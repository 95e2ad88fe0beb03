"""Attention over pages beside attention over one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchgen.engines.paged.pages import PAGE_SIZE
from tests.engines.paged.attention_cases import CHUNKS, DECODING, Case, case, with_broken_token, with_stale_cache
from tests.kernels import assert_none_wrong

ROOT = Path(__file__).parents[3]


def alone(of: Case, slot: int, first: int, count: int, length: int) -> torch.Tensor:
    """[count, heads, size]: the last tokens of one sequence, score by score."""
    _, cache = of.reference()
    pages = of.layout.block_table[slot].long()
    group = of.query.shape[1] // of.key.shape[1]
    out = []
    for token in range(count):
        place = length - count + token
        begin = max(0, place + 1 - of.shape.window) if of.shape.window else 0
        places = torch.arange(begin, place + 1)
        # [places, key heads, size] each
        keys, values = cache[:, pages[places // PAGE_SIZE], :, places % PAGE_SIZE].unbind(1)
        rows = []
        for head in range(of.query.shape[1]):
            query = of.query[0, head, first + token].double()
            scores = keys[:, head // group] @ query * of.query.shape[-1] ** -0.5
            if of.shape.slopes is not None:
                scores += of.shape.slopes[head].double() * places
            rows.append(scores.softmax(0) @ values[:, head // group])
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize(("window", "alibi"), [(0, False), (0, True), (37, False), (200, True)])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_each_sequence_is_as_if_it_were_alone(heads: int, key_heads: int, window: int, alibi: bool) -> None:
    of = with_stale_cache(case((heads, key_heads, 16), torch.float64, window=window, alibi=alibi))
    out, _ = of.reference()
    for slot, length in enumerate(DECODING):
        torch.testing.assert_close(out[0, slot : slot + 1], alone(of, slot, slot, 1, length))
    for chunk, (count, length) in zip(of.layout.chunks, CHUNKS, strict=True):
        tokens = slice(chunk.first, chunk.first + count)
        torch.testing.assert_close(out[0, tokens], alone(of, chunk.slot, chunk.first, count, length))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize(("window", "alibi"), [(0, False), (0, True), (37, False), (200, True)])
def test_a_broken_token_reaches_those_that_see_it_alone(window: int, alibi: bool, number: float) -> None:
    clean = case((6, 2, 16), torch.float64, window=window, alibi=alibi)
    broken = with_broken_token(clean, 3, 40, number)
    expected, _ = clean.reference()
    out, _ = broken.reference()
    chunk = clean.layout.chunks[3]
    places = torch.arange(out.shape[1]) - chunk.first
    sees = (places >= 40) & (places < (40 + window if window else chunk.count)) & (places < chunk.count)
    assert out[0, sees].isnan().all()
    torch.testing.assert_close(out[0, ~sees], expected[0, ~sees])


def test_only_the_places_of_the_tokens_change() -> None:
    of = case((4, 2, 16), torch.float64)
    _, cache = of.reference()
    changed = (cache != of.layout.caches[0]).flatten(3).any(-1).any(2).any(0)  # pages
    real = of.layout.positions >= 0
    slots, positions = of.layout.slots[real].long(), of.layout.positions[real].long()
    expected = of.layout.block_table[slots, positions // PAGE_SIZE]
    assert set(changed.nonzero().flatten().tolist()) == set(expected.tolist())


@pytest.mark.slow
def test_kernels_compute_the_same() -> None:
    """Interpreted, where there is no GPU. Triton is not in the environment: what finds it takes it for a GPU's."""
    assert_none_wrong("tests.engines.paged.kernel_cases")
