"""A part of the rows of an input."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th row from row `index` on, so that long and short parts of a file are shared out evenly.

    All rows by default. Written "3/8".

    Raises:
        ValueError: the index is not from 0 to below the count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"there is no shard {self}: of N, the first is 0/N and the last N-1/N")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that is written `text`.

        Raises:
            ValueError: it is not written like 3/8.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is no shard: write it like 3/8, the first of 8 being 0/8")
        return cls(int(match[1]), int(match[2]))

    def split(self, index: int, count: int) -> Shard:
        """Part `index` of `count` of this one."""
        return Shard(self.index + self.count * index, self.count * count)

    def rows(self, total: int) -> range:
        """Its row numbers in an input of `total` rows."""
        return range(self.index, total, self.count)

    def overlaps(self, other: Shard) -> bool:
        """Whether a row can be in both: rows that are i modulo n and j modulo m exist if gcd(n, m) divides i - j."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0


WHOLE = Shard()
"""All rows."""
