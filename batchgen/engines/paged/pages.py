"""Pages of the cache: which are free, which are shared, and which prefixes lie in some of them already. Pure.

A page holds the keys and values of `PAGE_SIZE` consecutive tokens of a sequence, for the layers of one group
(`layer_groups`). Sequences that begin alike share the full pages of their common prefix. A page that nobody uses any
more is kept as long as there are others to take, since a later prompt may begin with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


_GONE = -1  # in the place of a page

_Key = tuple[int, tuple[int, ...]]  # the number of the node before, and the tokens that follow there


class PrefixNode:
    """A prefix of whole pages, as a node of their tree: its last tokens, and the pages that hold these."""

    __slots__ = ("children", "key", "number", "pages")

    def __init__(self, number: int, key: _Key, pages: list[int]) -> None:
        self.number = number  # never used twice: a page that is taken again cannot be mistaken for what it was
        self.key = key
        self.pages = pages  # of each group; -1: that one is gone
        self.children = 0  # nodes that continue it


class _Owner(NamedTuple):
    """What a page is remembered as."""

    node: PrefixNode
    group: int


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
        self._nodes: dict[_Key, PrefixNode] = {}
        self._by_number: dict[int, PrefixNode] = {}
        self._owners: dict[int, _Owner] = {}  # of the pages that hold a part of a prefix
        self._is_owned = np.zeros(count, np.bool_)
        self._last_number = ROOT

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

    def find_path(self, tokens: Sequence[int], root: int = ROOT) -> list[PrefixNode]:
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
            number = node.number
            path.append(node)
        return path

    def remember(self, number: int, tokens: Sequence[int], pages: Sequence[int]) -> int:
        """Remembers that `pages` hold these `PAGE_SIZE` tokens after the prefix of a node, or will when the planned
        step has run.

        Args:
            number: of that node.
            pages: one of each group.

        Returns:
            The number of the node of that longer prefix.
        """
        key = (number, tuple(tokens))
        node = self._nodes.get(key)
        if node is None:
            self._last_number += 1
            node = self._nodes[key] = self._by_number[self._last_number] = PrefixNode(
                self._last_number, key, [_GONE] * len(pages)
            )
            if number in self._by_number:
                self._by_number[number].children += 1
        for group, page in enumerate(pages):  # where there is one, another sequence computes the same at the same time
            if node.pages[group] == _GONE:
                node.pages[group] = page
                self._owners[page], self._is_owned[page] = _Owner(node, group), True
        return node.number

    def _give_up(self, page: int) -> None:
        """A page of a prefix, without a user, becomes free."""
        del self._unused[page]
        node, group = self._disown(page)
        self._add_free(np.array([page], np.int32))
        if group < self._full_groups:
            self._forget(node)
        while node.children == 0 and all(each == _GONE for each in node.pages):
            parent = self._by_number.get(node.key[0])
            self._forget(node)
            if parent is None:
                return
            node = parent

    def _disown(self, page: int) -> _Owner:
        owner = self._owners.pop(page)
        self._is_owned[page] = False
        owner.node.pages[owner.group] = _GONE
        return owner

    def _forget(self, node: PrefixNode) -> None:
        """A prefix is not found any more; those that continue it are not, either."""
        for page in node.pages:
            if page != _GONE:
                self._disown(page)
                if page in self._unused:
                    del self._unused[page]
                    self._add_free(np.array([page], np.int32))
        if self._nodes.pop(node.key, None) is not None:
            del self._by_number[node.number]
            if node.key[0] in self._by_number:
                self._by_number[node.key[0]].children -= 1

    def _add_free(self, pages: NDArray[np.int32]) -> None:
        self._free[self._free_count : self._free_count + len(pages)] = pages
        self._free_count += len(pages)
