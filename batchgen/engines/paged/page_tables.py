"""Which pages each sequence has, in each group of layers, and what of that the device has to learn. Pure.

All groups have a page for the same tokens: column `c` of a block table is the page of tokens `16 c` to `16 c + 15`. In
groups with a window the first columns are given back as the sequence grows. What lies there then does not matter:
attention masks what a window does not show, whatever another sequence has written there since.

Steps run on the device in the order in which they are planned. So a page that nothing sees after a step may be taken by
the next one while that step is still in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchgen.engines.paged.layer_groups import LayerGroups
from batchgen.engines.paged.pages import GONE, PAGE_SIZE, Node, Pages, find_root
from batchgen.engines.paged.step import Ints, Sequence, StepLimits


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Pages that hold the beginning of a sequence already, and have one more user for it."""

    node: int  # the number of that of the last page
    columns: int = 0  # how many pages a group has, those that its window has passed included
    passed: int = 0  # how many of these it has
    # [groups, columns]; what stands in the columns that a window has passed is no page of this sequence.
    pages: Ints = field(default_factory=lambda: np.zeros((1, 0), np.int32))

    @property
    def tokens(self) -> int:
        """How many tokens need not be computed."""
        return self.columns * PAGE_SIZE


class PageTables:
    """The pages of all sequences that run, by their slots.

    Args:
        limits: of steps and sequences.
        pages: how many the cache has for tokens in all layers; there are as many pages for each group.
        groups: of the model's layers.
    """

    def __init__(self, limits: StepLimits, pages: int, groups: LayerGroups) -> None:
        self._limits, self._groups, self.pages = limits, groups, pages
        self._pages = Pages(pages * groups.count, groups.full)
        # [groups, slots, columns]. The operating system gives zeros memory where they are written.
        self._tables = np.zeros((groups.count, limits.slots, limits.columns), np.int32)
        self._columns = np.zeros(limits.slots, np.int32)  # of each slot's sequence, those given back included
        self._passed = np.zeros(limits.slots, np.int32)  # of these, how many groups with a window have given back
        # The beginning of each group's block table in all of them, flattened, as the device has them.
        width = limits.table_width
        self._begins = np.arange(groups.count, dtype=np.int64)[:, None] * ((limits.slots + 1) * width)
        self._changed_places: list[NDArray[np.int64]] = []
        self._changed_pages: list[Ints] = []
        # Of sequences that have begun: places behind their pages, with the adapter and the number of prompt tokens.
        self._slot_numbers: list[tuple[int, int]] = []

    @property
    def available(self) -> int:
        """How many pages could be taken now, of whichever group."""
        return self._pages.available

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence that has the cache for itself."""
        return min(self._groups.find_most_columns(self._pages.count), self._limits.columns) * PAGE_SIZE

    def count_room(self, slot: int) -> int:
        """How many tokens the sequence in this slot could have with all the pages that are available."""
        return (int(self._columns[slot]) + self.available // self._groups.count) * PAGE_SIZE

    def can_extend(self, sequences: int) -> bool:
        """Whether there are pages for one more column of this many sequences."""
        return sequences * self._groups.count <= self.available

    def find_prefix(self, sequence: Sequence) -> SharedPrefix:
        """Finds the longest prefix of a sequence of which all pages are there that the tokens behind it see.

        There is none where the prompt's own logits are wanted: it has to be computed whole.
        """
        root = find_root(sequence.adapter, is_long=self._limits.is_long(sequence.position_tokens))
        path = self._pages.find_path(sequence.tokens, root) if sequence.has_prompt_logprobs else []
        columns, passed = self._find_shared(path)
        if not columns:
            return SharedPrefix(root)
        pages = np.array([own for _, own in path[:columns]], np.int32).T
        np.maximum(pages, 0, out=pages)  # where a page is gone nothing is read, but the address must exist
        for part in self._split(pages, passed):
            self._pages.share(part)
        return SharedPrefix(path[columns - 1][0], columns, passed, pages)

    def drop(self, prefix: SharedPrefix) -> None:
        """The sequence that was to share this prefix does not begin."""
        self._give_back(prefix.pages, prefix.passed)

    def begin(self, sequence: Sequence, prefix: SharedPrefix) -> None:
        """A sequence begins in its slot, with the pages of `prefix`."""
        slot, sequence.prefix = sequence.slot, prefix.node
        self._columns[slot], self._passed[slot] = prefix.columns, prefix.passed
        self._tables[:, slot, : prefix.columns] = prefix.pages
        behind = slot * self._limits.table_width + self._limits.columns
        self._slot_numbers += [(behind, sequence.adapter), (behind + 1, sequence.position_tokens)]
        if prefix.columns:
            self._record(slot, np.arange(prefix.columns), prefix.pages)

    def extend_one(self, slot: int, tokens: int) -> None:
        """Takes pages for the sequence in this slot, which will have so many tokens. As many must be available."""
        before, columns = int(self._columns[slot]), -(-tokens // PAGE_SIZE)
        if columns > before:
            pages = self._pages.take((columns - before) * self._groups.count).reshape(self._groups.count, -1)
            self._tables[:, slot, before:columns] = pages
            self._columns[slot] = columns
            self._record(slot, np.arange(before, columns), pages)

    def extend(self, slots: Ints) -> None:
        """Takes pages for one more column of the sequences in `slots`, [sequences]. There must be as many available."""
        if not len(slots):
            return
        columns = self._columns[slots]
        pages = self._pages.take(len(slots) * self._groups.count).reshape(self._groups.count, -1)
        self._tables[:, slots, columns] = pages
        self._columns[slots] += 1
        self._record(slots, columns, pages)

    def remember(self, sequence: Sequence, begin: int, end: int) -> None:
        """Remembers what full pages hold of tokens `begin` to `end` of a sequence, once the planned step has run."""
        first, last = begin // PAGE_SIZE, end // PAGE_SIZE
        if last > first:
            tokens = sequence.tokens[first * PAGE_SIZE : last * PAGE_SIZE]
            pages = self._tables[:, sequence.slot, first:last].T.tolist()
            sequence.prefix = self._pages.remember(sequence.prefix, tokens, pages)

    def give_back_passed(self, slots: NDArray[np.integer], positions: Ints) -> None:
        """Gives back the pages that windows have passed.

        Args:
            slots: [sequences].
            positions: of their next tokens, [sequences]; all tokens before them are in planned steps, and no page is
                taken for one of these steps any more.
        """
        if not self._groups.windowed:
            return
        passed = self._groups.count_passed(positions)
        rows, columns = _list_places(slots, self._passed[slots], passed)
        if len(rows):
            self._pages.give_back(self._tables[self._groups.full :, rows, columns].ravel())
            self._passed[slots] = passed

    def release(self, slot: int) -> None:
        """Gives back all pages of the sequence in this slot."""
        self._give_back(self._tables[:, slot, : self._columns[slot]], int(self._passed[slot]))
        self._columns[slot] = self._passed[slot] = 0

    def pop_changes(self) -> tuple[NDArray[np.int64], Ints]:
        """What has changed in the block tables since the last call.

        Returns:
            Places in the tables [groups, slots + 1, table width], flattened, and what they become: [changes] each.
        """
        numbers = np.array(self._slot_numbers, np.int64).reshape(-1, 2)
        places, pages = [numbers[:, 0], *self._changed_places], [numbers[:, 1].astype(np.int32), *self._changed_pages]
        self._slot_numbers, self._changed_places, self._changed_pages = [], [], []
        return np.concatenate(places), np.concatenate(pages)

    def _find_shared(self, path: list[Node]) -> tuple[int, int]:
        """The most columns of a path that can be shared, and how many of them windows have passed by then."""
        if not self._groups.windowed:
            return len(path), 0
        best = run = 0
        for columns, (_, pages) in enumerate(path, 1):
            run = run + 1 if GONE not in pages else 0  # columns down to here of which no page is gone
            if run >= columns - self._groups.count_passed(columns * PAGE_SIZE):
                best = columns
        return best, self._groups.count_passed(best * PAGE_SIZE) if best else 0

    def _split(self, pages: Ints, passed: int) -> tuple[Ints, ...]:
        """Of [groups, columns], the pages that a sequence has of which windows have passed so many columns: those of
        all groups, and those of groups without a window before them. In the order of their tokens."""
        rest = pages[:, passed:].T.ravel()
        return (pages[: self._groups.full, :passed].T.ravel(), rest) if passed else (rest,)

    def _give_back(self, pages: Ints, passed: int) -> None:
        for part in reversed(self._split(pages, passed)):
            self._pages.give_back(part)

    def _record(self, slots: Ints | int, columns: NDArray[np.integer], pages: Ints) -> None:
        """The device has to learn these pages, [groups, places], of columns [places] of one slot, or of one each."""
        self._changed_places.append((self._begins + slots * np.int64(self._limits.table_width) + columns).ravel())
        self._changed_pages.append(pages.ravel())


def _list_places(
    slots: NDArray[np.integer], begins: NDArray[np.integer], ends: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Lists columns `begins` to `ends` of each of these slots, [slots] each: the slot of each, and the column."""
    counts = ends - begins
    if len(counts) and (counts == 1).all():
        return slots, begins
    before = counts.cumsum() - counts  # places of the slots before each
    return np.repeat(slots, counts), np.arange(counts.sum()) - np.repeat(before - begins, counts)
