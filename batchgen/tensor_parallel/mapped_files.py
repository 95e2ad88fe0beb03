"""Where this process has mapped the files of a folder, and the reading of parts of them."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from pathlib import Path

import torch

from batchgen.tensor_parallel.file_views import Pieces

_MADV_DONTNEED = 4  # see madvise(2)


class MappedFiles:
    """Where this process has mapped the files of a folder.

    Pages that were read count as this process's memory until the kernel needs room, or until they are forgotten.
    """

    def __init__(self, folder: Path) -> None:
        files = {str(path.resolve()) for path in folder.rglob("*")}  # an index may name files in a subfolder
        self._ranges = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in files:
                begin, end = (int(edge, 16) for edge in fields[0].split("-"))
                self._ranges.append((begin, end))
        self._advise = ctypes.CDLL(None, use_errno=True).madvise
        self._advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def forget(self, view: torch.Tensor) -> None:
        """Lets go of the pages of `view`, if it is part of one of the files; they can be read again."""
        if view.numel() == 0:
            return
        last = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
        begin, end = view.data_ptr(), view.data_ptr() + (last + 1) * view.element_size()
        if any(first <= begin and end <= after for first, after in self._ranges):
            # Whole pages between the edges: those at the edges may be another's, who is about to read them.
            begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                self._advise(begin, end - begin, _MADV_DONTNEED)

    def read(self, part: torch.Tensor | Pieces, device: torch.device) -> torch.Tensor:
        """Returns a copy of `part` on `device`, and lets go of the pages that it was read from."""
        if isinstance(part, Pieces):
            whole = part.assemble(device)
            for piece in itertools.chain(*part.experts):
                self.forget(piece)
            return whole
        copied = part.to(device, copy=True)
        self.forget(part)
        return copied
