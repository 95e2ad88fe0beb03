"""The kernels that sample and edit logits compute what torch does."""

from __future__ import annotations

import pytest

from tests.kernels import assert_none_wrong


@pytest.mark.slow
def test_kernels_choose_the_same_tokens() -> None:
    assert_none_wrong("tests.generation.kernel_cases")
