"""Weights that are rounded here: how far from what they were, and that parts are rounded as the whole."""

from __future__ import annotations

import pytest
import torch

from batchgen.models.quantised import rounding
from batchgen.models.quantised.rounding import Scheme, round_weight
from batchgen.models.quantised.weight import QuantisedWeight

SCHEMES = {"fp8": Scheme("fp8"), "int8": Scheme("int8"), "int4": Scheme("int4", 32)}


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    """[96, 128]: rows of very different sizes, one of zeros, one with a number far from the others, one of one sign."""
    source = torch.Generator().manual_seed(3)
    made = torch.randn(96, 128, generator=source) * torch.logspace(-7, 2, 96)[:, None]
    made[5] = 0
    made[6, 9] *= 300
    made[7] = made[7].abs() + 1
    return made


def equal(one: QuantisedWeight, other: QuantisedWeight) -> bool:
    pairs = [(one.values, other.values), (one.scales, other.scales)]
    pairs += [] if one.zeros is None or other.zeros is None else [(one.zeros, other.zeros)]
    same_kind = (one.kind, one.inputs, one.zeros is None) == (other.kind, other.inputs, other.zeros is None)
    # torch.equal is not there for 8-bit floats.
    return same_kind and all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_number_is_moved_by_half_a_step_at_most(kind: str, dtype: torch.dtype, matrix: torch.Tensor) -> None:
    weight = round_weight(matrix, SCHEMES[kind], dtype)
    wide = weight.widen()
    assert torch.isfinite(wide).all()
    assert weight.shape == matrix.shape
    assert not wide[5].any()
    error = (wide - matrix).abs().double()
    largest = matrix.abs().amax(1, keepdim=True).double()
    if kind == "fp8":  # three bits behind the point; the smallest step is 2^-9 of a scale
        assert weight.inputs == "fp8"
        assert (error <= (matrix.abs() * 2**-4).maximum(largest / 448 * 2**-10) * 1.001).all()
    elif kind == "int8":
        assert weight.inputs == "int8"
        assert (error <= largest / 127 * 0.501).all()
    else:  # a span that is cut short moves its ends further, so this holds of the sum of squares
        assert weight.inputs == ""
        groups = matrix.view(96, -1, 32)
        span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
        assert (error.view(96, -1, 32).square().mean(-1).sqrt() <= span / 15 * 0.52 + 2**-14).all()


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(kind: str, odd: float, matrix: torch.Tensor) -> None:
    """Or rows would get texts of a damaged model."""
    damaged = matrix.clone()
    damaged[9, 40] = odd
    wide = round_weight(damaged, SCHEMES[kind], torch.bfloat16).widen()
    assert not wide[9, 40].isfinite()
    others = torch.arange(96) != 9
    assert torch.equal(wide[others], round_weight(matrix, SCHEMES[kind], torch.bfloat16).widen()[others])


def test_spans_of_int4_that_are_cut_short_lose_less_than_whole_ones(
    matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = round_weight(matrix, SCHEMES["int4"], torch.float32).widen()
    monkeypatch.setattr(rounding, "_SPANS", (1.0,))
    whole = round_weight(matrix, SCHEMES["int4"], torch.float32).widen()
    losses = [(wide - matrix).view(-1, 32).square().sum(1) for wide in (chosen, whole)]
    assert (losses[0] <= losses[1] * 1.0001).all()
    assert (losses[0] < 0.9 * losses[1]).float().mean() > 0.1


@pytest.mark.parametrize("kind", SCHEMES)
def test_parts_are_rounded_as_the_whole(kind: str, matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = round_weight(matrix, SCHEMES[kind], torch.bfloat16)
    monkeypatch.setattr(rounding, "_NUMBERS_AT_ONCE", 500)  # three rows
    assert equal(round_weight(matrix, SCHEMES[kind], torch.bfloat16), whole)
    experts = round_weight(matrix.view(4, 24, 128), SCHEMES[kind], torch.bfloat16)
    assert experts.shape == (4, 24, 128)
    assert equal(experts.map(lambda tensor: tensor.flatten(0, 1)), whole)
    transposed = round_weight(matrix.T.contiguous().T, SCHEMES[kind], torch.bfloat16)
    assert equal(transposed, whole)


def test_memory_is_that_of_the_scheme() -> None:
    weight = torch.randn(64, 256)
    sizes = {kind: round_weight(weight, scheme, torch.bfloat16).nbytes for kind, scheme in SCHEMES.items()}
    groups = 64 * 256 // 32
    assert sizes == {"fp8": 64 * 256 + 64 * 4, "int8": 64 * 256 + 64 * 4, "int4": 64 * 256 // 2 + groups * (2 + 1)}


@pytest.mark.parametrize(
    ("given", "columns", "expected"),
    [
        (Scheme("int4"), (4096, 14336), Scheme("int4", 128)),
        (Scheme("int4"), (576, 1536), Scheme("int4", 64)),
        (Scheme("int4"), (576, 96), Scheme("int4", 32)),
        (Scheme("int4", 32), (4096,), Scheme("int4", 32)),
        (Scheme("int4"), (), Scheme("int4")),
        (Scheme("fp8"), (17,), Scheme("fp8")),
    ],
)
def test_the_group_divides_all_matrices(given: Scheme, columns: tuple[int, ...], expected: Scheme) -> None:
    assert given.fit(columns) == expected


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 128 columns do not divide the 576 columns"):
        Scheme("int4", 128).fit((4096, 576))
    with pytest.raises(ValueError, match="has 40 columns, which no group of 128, 64, 32 divides"):
        Scheme("int4").fit((64, 40))
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        Scheme("int4", 12)
    with pytest.raises(ValueError, match="no groups of columns"):
        Scheme("fp8", 64)
