"""A tensor-parallel group of one rank."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from batchgen.engine import Peers


class Alone(Peers):
    """The peers of a rank that has the whole model: nobody but itself."""

    @property
    def count(self) -> int:
        return 1

    @property
    def place(self) -> int:
        return 0

    def any_rank(self, flag: bool) -> bool:
        return flag

    def least(self, number: int) -> int:
        return number

    def tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def tell(self, numbers: NDArray[np.int64]) -> None:
        pass  # there is nobody to tell it to

    def told(self) -> NDArray[np.int64]:
        raise AssertionError("a rank that is alone is told nothing")
