"""Pages of the cache: which are free, which are shared, and which prefixes lie in some of them already. Pure.

A page holds the keys and values of `PAGE_SIZE` consecutive tokens of a sequence, for the layers of one group
(`layer_groups`). Sequences that begin alike share the full pages of their common prefix. A page that nobody uses any
more is kept as long as there are others to take, since a later prompt may begin with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE = 16
"""Tokens of a page: small enough that half a page a sequence is little, large enough that a page of one head is a
kilobyte or more of adjacent memory."""

ROOT, ROOT_OF_LONG = 0, -1
"""The roots of two trees of prefixes; the second one is for prompts beyond the original context (LongRoPE)."""


def find_root(adapter: int, *, is_long: bool) -> int:
    """Returns the root of the tree for prompts with an adapter: their keys and values are those of nobody else.

    Args:
        adapter: its number, from 1; 0: none.
        is_long: the prompt goes beyond the original context.
    """
    return (ROOT_OF_LONG if is_long else ROOT) - 2 * adapter


GONE = -1
"""In the place of a page that a prefix has lost."""

Key = tuple[int, tuple[int, ...]]
"""The number of the node before, and the tokens that follow there."""

Node = tuple[int, tuple[int, ...]]
"""A prefix of whole pages: its number, and the pages of its last tokens, one of each group. Plain tuples of numbers, of
which there may be hundreds of thousands: the garbage collector does not look at them."""


class Pages:
    """Counts the users of each page; pages are numbered from 0.

    Args:
        count: how many pages the cache has.
        full_groups: groups without a window. A prefix has all pages of these, or is forgotten; pages of other groups
            may be gone from it.
    """

    def __init__(self, count: int, full_groups: int = 1) -> None:
        self.count, self._full_groups = count, full_groups
        self._users = np.zeros(count, np.int32)
        self._free = np.arange(count - 1, -1, -1, dtype=np.int32)  # the first `_free_count` of these, the last one next
        self._free_count = count
        self._unused: dict[int, None] = {}  # pages of a prefix without a user, in the order in which they are given up
        # Prefixes of prompts form a tree. Its nodes have numbers of their own, never used twice, so that a page which
        # was given up and taken again cannot be mistaken for what it was.
        self._nodes: dict[Key, Node] = {}
        self._owners: list[Key | None] = [None] * count  # of the node that a page belongs to
        self._is_owned = np.zeros(count, np.bool_)  # whether there is one
        self._last_number = ROOT
        # Of nodes by their numbers, where they may be left without a page: how many continue them, and their keys.
        self._children: dict[int, int] = {}
        self._keys: dict[int, Key] = {}

    @property
    def available(self) -> int:
        """How many pages `take` could give now."""
        return self._free_count + len(self._unused)

    def take(self, count: int) -> NDArray[np.int32]:
        """Takes this many pages, each for one user. There must be as many `available`."""
        while self._free_count < count:
            self._give_up(next(iter(self._unused)))
        self._free_count -= count
        taken = self._free[self._free_count : self._free_count + count][::-1].copy()
        self._users[taken] = 1
        return taken

    def give_back(self, pages: NDArray[np.int32]) -> None:
        """One user of each of these pages needs it no longer. A page stands there as often as it loses a user.

        Args:
            pages: [pages], in the order of their tokens: the end of a prefix is given up before its beginning.
        """
        if (self._users[pages] == 1).all():
            self._users[pages], ended = 0, pages[::-1]
        else:  # a page may stand there several times, which takes much longer
            np.subtract.at(self._users, pages, 1)
            ended = pages[self._users[pages] == 0][::-1]
            ended = ended[np.sort(np.unique(ended, return_index=True)[1])]
        owned = self._is_owned[ended]
        self._unused.update(dict.fromkeys(ended[owned].tolist()))
        self._add_free(ended[~owned])

    def share(self, pages: NDArray[np.int32]) -> None:
        """Each of these pages, which are pages of a prefix, gets one more user."""
        self._users[pages] += 1
        for page in pages.tolist():
            self._unused.pop(page, None)

    def find_path(self, tokens: Sequence[int], root: int = ROOT) -> list[Node]:
        """Finds the longest prefix that `tokens` begin with: its nodes, one for each `PAGE_SIZE` tokens.

        At least one token is left out: its logits are wanted, so it has to be computed.

        Args:
            root: the tree to look in; prefixes of another one have other keys and values.
        """
        number, path = root, []
        for begin in range(0, len(tokens) - PAGE_SIZE, PAGE_SIZE):
            node = self._nodes.get((number, tuple(tokens[begin : begin + PAGE_SIZE])))
            if node is None:
                break
            number = node[0]
            path.append(node)
        return path

    def remember(self, number: int, tokens: Sequence[int], pages: list[list[int]]) -> int:
        """Remembers that pages hold these tokens after the prefix of a node, or will when the planned step has run.

        Args:
            number: of that node.
            tokens: `PAGE_SIZE` for each of `pages`.
            pages: for each of them, the page of each group.

        Returns:
            The number of the node of that longer prefix.
        """
        owned: list[int] = []
        for begin, new in zip(range(0, len(tokens), PAGE_SIZE), pages, strict=True):
            key = (number, tuple(tokens[begin : begin + PAGE_SIZE]))
            node = self._nodes.get(key)
            if node is None:
                node = self._add_node(key, tuple(new))
            elif GONE in node[1]:
                new = [page if there == GONE else GONE for there, page in zip(node[1], new, strict=True)]
                self._nodes[key] = node[0], tuple(map(max, node[1], new))
            else:
                new = []  # another sequence computes the same at the same time
            for page in new:
                if page != GONE:
                    self._owners[page] = key
                    owned.append(page)
            number = node[0]
        self._is_owned[owned] = True
        return number

    def _add_node(self, key: Key, pages: tuple[int, ...]) -> Node:
        self._last_number += 1
        node = self._nodes[key] = self._last_number, pages
        if not self._full_groups:
            self._children[key[0]] = self._children.get(key[0], 0) + 1
            self._keys[self._last_number] = key
        return node

    def _give_up(self, page: int) -> None:
        """A page of a prefix, without a user, becomes free."""
        key = self._owners[page]
        assert key is not None
        number, pages = self._nodes[key]
        group = pages.index(page)
        self._free_page(page)
        self._nodes[key] = number, (*pages[:group], GONE, *pages[group + 1 :])
        if group < self._full_groups:
            self._forget(key)
        elif not self._full_groups:
            self._forget_without_pages(key)

    def _forget(self, key: Key) -> None:
        """A prefix is not found any more; those that continue it are not, either."""
        _, pages = self._nodes.pop(key)
        for page in pages:
            if page in self._unused:
                self._free_page(page)
            elif page != GONE:
                self._owners[page], self._is_owned[page] = None, False

    def _forget_without_pages(self, key: Key | None) -> None:
        """Forgets a prefix if nothing is left of it, and none that continues it; then the one before, likewise."""
        while key is not None:
            number, pages = self._nodes[key]
            if self._children.get(number) or any(page != GONE for page in pages):
                return
            del self._nodes[key], self._keys[number]
            self._children.pop(number, None)
            self._children[key[0]] -= 1
            if not self._children[key[0]]:
                del self._children[key[0]]
            key = self._keys.get(key[0])  # None: a root

    def _free_page(self, page: int) -> None:
        """A page of a prefix, which nobody uses, is not a part of it any more."""
        del self._unused[page]
        self._owners[page], self._is_owned[page] = None, False
        self._add_free(np.array([page], np.int32))

    def _add_free(self, pages: NDArray[np.int32]) -> None:
        self._free[self._free_count : self._free_count + len(pages)] = pages
        self._free_count += len(pages)
