"""Pages of the cache: which are free, which are shared, and which prefixes lie in some of them already. Pure.

A page holds the keys and values of `PAGE_SIZE` consecutive tokens of a sequence, for all layers. Sequences that begin
alike share the full pages of their common prefix. A page that nobody uses any more is kept as long as there are others
to take, since a later prompt may begin with it.
"""

from __future__ import annotations

from collections.abc import Sequence

PAGE_SIZE = 16
"""Tokens of a page: small enough that half a page a sequence is little, large enough that a page of one head is a
kilobyte or more of adjacent memory."""

ROOT, ROOT_OF_LONG = 0, -1
"""The roots of two trees of prefixes; the second one is for prompts beyond the original context (LongRoPE)."""


class Pages:
    """Counts the users of each page; pages are numbered from 0.

    Args:
        count: how many pages the cache has.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._users = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._unused: dict[int, None] = {}  # pages of a prefix without a user, in the order in which they are given up
        # Prefixes of prompts form a tree. Its nodes have numbers of their own, never used twice, so that a page which
        # was given up and taken again cannot be mistaken for what it was.
        self._nodes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # parent, tokens → node, page
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # page → its key in `_nodes`
        self._last_node = ROOT

    @property
    def available(self) -> int:
        """How many pages `take` could give now."""
        return len(self._free) + len(self._unused)

    def take(self, count: int) -> list[int]:
        """Takes this many pages, each for one user. There must be as many `available`."""
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._unused))
                del self._unused[page]
                del self._nodes[self._key_of.pop(page)]
            self._users[page] = 1
            taken.append(page)
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """One user of each of these pages, in the order of their tokens, needs them no longer."""
        for page in reversed(pages):  # the end of a prefix is given up before its beginning
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def find_prefix(self, tokens: Sequence[int], root: int = ROOT) -> tuple[list[int], int]:
        """Finds the pages that `tokens` begin with, which get one more user, and the node of the last one.

        At least one token is left out: its logits are wanted, so it has to be computed.

        Args:
            root: the tree to look in; prefixes of another one have other keys and values.
        """
        node, pages = root, []
        for begin in range(0, len(tokens) - PAGE_SIZE, PAGE_SIZE):
            child = self._nodes.get((node, tuple(tokens[begin : begin + PAGE_SIZE])))
            if child is None:
                break
            node, page = child
            self._users[page] += 1
            self._unused.pop(page, None)
            pages.append(page)
        return pages, node

    def remember(self, node: int, tokens: Sequence[int], page: int) -> int:
        """Remembers that `page` holds these `PAGE_SIZE` tokens after the prefix of `node`, or will when the planned
        step has run.

        Returns:
            The node of that longer prefix.
        """
        key = (node, tuple(tokens))
        child = self._nodes.get(key)
        if child is not None:
            return child[0]  # another sequence computes the same at the same time
        self._last_node += 1
        self._nodes[key] = self._last_node, page
        self._key_of[page] = key
        return self._last_node
