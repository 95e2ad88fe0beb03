"""Pages of the cache: which are free, which are shared, and what prefixes lie in some already. Pure.

A page holds the keys and values of `SIZE` consecutive tokens of a sequence, for all layers. Sequences that begin alike
share the full pages of their common beginning. A page that nobody uses any more is kept as long as there are others to
take, since a later prompt may begin with it.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZE = 16
"""Tokens of a page: small enough that half a page a sequence is little, large enough that a page of one head is a
kilobyte or more of adjacent memory."""

_ROOT = 0


class Pages:
    """Counts the uses of each page, numbered from 0.

    Args:
        count: of all pages.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._uses = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._unused: dict[int, None] = {}  # known pages without a user, in the order in which they are given up
        # Beginnings of prompts form a tree. Its nodes have numbers of their own, never used twice, so that a page which
        # was given up and taken again cannot be mistaken for what it was.
        self._nodes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # parent, tokens → node, page
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # page → its key in `_nodes`
        self._last_node = _ROOT

    @property
    def available(self) -> int:
        """How many `take` could give now."""
        return len(self._free) + len(self._unused)

    def take(self, count: int) -> list[int]:
        """So many pages, each with one user. There must be as many `available`."""
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._unused))
                del self._unused[page]
                del self._nodes[self._key_of.pop(page)]
            self._uses[page] = 1
            taken.append(page)
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """One user of each of these pages, in the order of their tokens, has ended."""
        for page in reversed(pages):  # the end of a beginning is given up before the beginning itself
            self._uses[page] -= 1
            if self._uses[page] == 0:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The pages that `tokens` begin with, now with one more user, and the node of the last one.

        At least one token is left out: its logits are wanted, so it has to be computed.
        """
        node, found = _ROOT, []
        for begin in range(0, len(tokens) - SIZE, SIZE):
            known = self._nodes.get((node, tuple(tokens[begin : begin + SIZE])))
            if known is None:
                break
            node, page = known
            self._uses[page] += 1
            self._unused.pop(page, None)
            found.append(page)
        return found, node

    def remember(self, node: int, tokens: Sequence[int], page: int) -> int:
        """`page` holds these `SIZE` tokens behind the beginning of `node`, or will when the planned step has run.

        Returns:
            The node of that longer beginning.
        """
        key = (node, tuple(tokens))
        known = self._nodes.get(key)
        if known is not None:
            return known[0]  # somebody else computes the same at the same time
        self._last_node += 1
        self._nodes[key] = self._last_node, page
        self._key_of[page] = key
        return self._last_node
