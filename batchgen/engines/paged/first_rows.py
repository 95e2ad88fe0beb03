"""The self-test: the first rows that finish are computed again, alone, before anybody sees their text."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from batchgen.device import is_out_of_memory
from batchgen.engines.paged.finished_rows import FinishedRow
from batchgen.engines.paged.layout import round_as_cache, use_adapter
from batchgen.engines.paged.lockstep import Leader
from batchgen.engines.paged.step import StepLimits
from batchgen.generation import selftest
from batchgen.generation.selftest import SelfTest

logger = logging.getLogger(__name__)

_MOST_ROWS, _MOST_SECONDS = 64, 10.0  # that rows wait for better ones to be tested


class FirstRows:
    """Holds back the first rows that finish until the self-test has passed.

    Args:
        test: of this model.
        leader: of the other ranks that hold the model, which take part in each forward; None: there are none.
        limits: of steps; they know the adapters.
    """

    def __init__(self, test: SelfTest, leader: Leader | None, limits: StepLimits) -> None:
        self._test, self._leader, self._limits = test, leader, limits
        self._rows: list[FinishedRow] = []
        self._since = 0.0
        self._has_passed = False

    def release(self, finished: list[FinishedRow], *, is_last: bool = False) -> list[FinishedRow]:
        """Takes rows that have finished; those that may be shown, all of them once the self-test has passed.

        Args:
            is_last: no more rows will come.

        Raises:
            EngineError: the self-test says that a row has a text which the model would not have said alone.
        """
        if self._has_passed:
            return finished
        if finished and not self._rows:
            self._since = time.monotonic()
        self._rows += finished
        if not self._rows:
            return []
        have_waited = len(self._rows) >= _MOST_ROWS or time.monotonic() - self._since > _MOST_SECONDS
        if not (is_last or have_waited or (finished and self._are_enough())):
            return []
        rows, self._rows = self._rows, []
        try:
            self._check(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self._leader is not None:
                raise
            logger.warning("there is no memory for the self-test: the text of the first rows was not looked at")
        self._has_passed = True
        return rows

    def _are_enough(self) -> bool:
        return len(selftest.choose([row.prompt for row in _find_long_rows(self._rows)])) == selftest.ROWS

    def _check(self, rows: list[FinishedRow]) -> None:
        rows = _find_long_rows(rows) or rows
        for place in selftest.choose([row.prompt for row in rows]):
            prompt, tokens = rows[place].prompt, rows[place].tokens or []
            adapter = self._limits.find_adapter(prompt.adapter)
            if self._leader is not None:
                self._leader.announce_self_test(prompt.tokens, tokens, adapter)
            with use_adapter(adapter), round_as_cache(self._limits.kv_dtype):
                self._test.check(prompt, tokens)


def _find_long_rows(rows: Sequence[FinishedRow]) -> list[FinishedRow]:
    """Those whose text says something about decoding: a row that ends at once is all prefill."""
    return [row for row in rows if len(row.tokens or ()) >= selftest.TOKENS // 2]
