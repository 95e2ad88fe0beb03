"""Batch records: the lines of the batches files, how they are committed, and which of them can be trusted."""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from batchgen.checkpoint.files import append
from batchgen.files import sync_folder
from batchgen.types import Batch, BatchRecord, Generation

logger = logging.getLogger(__name__)


def trusted(path: Path, generations: Path, verify: bool) -> Iterator[BatchRecord]:
    """The records of one file whose generations are all there."""
    try:
        text = open(generations, "rb")
    except FileNotFoundError:
        logger.warning("%s is gone; the rows it held are open again", generations)
        return
    with text, open(path, "rb") as lines:
        size = os.fstat(text.fileno()).st_size
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is not None and record.end > size:
                size = os.fstat(text.fileno()).st_size  # a run that works has committed since we looked
            if record is None or record.end > size:
                # A torn last line is what a kill leaves behind; anything else is damage, and worth a word.
                if line.endswith(b"\n"):
                    logger.warning("%s line %d is damaged or its text is cut; its rows are open again", path, number)
                continue
            if verify:
                text.seek(record.begin)
                if zlib.crc32(text.read(record.end - record.begin)) != record.checksum:
                    logger.warning("%s is damaged at byte %d; those rows are open again", generations, record.begin)
                    continue
            yield record


_SEAL = b',"seal":'  # last in a record: CRC-32 of the bytes before it, since a wrong digit in `rows` is good JSON too


def _parsed(line: bytes) -> BatchRecord | None:
    """The record in `line`, if it is whole. What a later version has added to it is passed over."""
    body, _, seal = line.rpartition(_SEAL)
    if seal != b"%d}\n" % zlib.crc32(body):
        return None
    values = json.loads(line)
    try:
        return BatchRecord(**{name: values[name] for name in BatchRecord.__slots__ if name in values})
    except TypeError:
        return None


def _line_of(record: BatchRecord) -> bytes:
    # Not dataclasses.asdict: it copies row numbers one by one.
    values = {name: getattr(record, name) for name in BatchRecord.__slots__}
    body = json.dumps(values, separators=(",", ":")).encode()[:-1]
    return b"%b%b%d}\n" % (body, _SEAL, zlib.crc32(body))


class Writer:
    """Commits the finished batches of one stream in one attempt. Files are made at the first commit, exclusively."""

    def __init__(self, folder: Path, attempt: int, stream: int, rank: int, render: Callable[[Generation], bytes]):
        self._folder = folder
        self._attempt = attempt
        self._name = f"{attempt:05d}-{stream:05d}.jsonl"
        self._rank = rank
        self._render = render  # one generation as one line, its newline included
        self._generations = self._batches = -1  # file descriptors
        self._end = 0  # bytes of the generations file that are proven
        self.broken = False  # a write failed half-way, so the file's end is not known any more

    def commit(self, batch: Batch, seconds: float) -> BatchRecord:
        """Writes `batch`; when this returns, it is finished for good.

        Raises:
            OSError: the disk is full, say. The batch is not recorded, all before it is; nothing more may be committed.
        """
        assert not self.broken
        self.broken = True
        if self._generations < 0:
            self._open()
        data = b"".join(map(self._render, batch.generations))
        record = self._record(batch, data, seconds)
        append(self._generations, data)
        append(self._batches, _line_of(record))
        self._end = record.end
        self.broken = False
        return record

    def close(self) -> None:
        """Closes the files."""
        for descriptor in (self._generations, self._batches):
            if descriptor >= 0:
                os.close(descriptor)
        self._generations = self._batches = -1

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._generations = os.open(self._folder / f"generations-{self._name}", flags, 0o644)
        self._batches = os.open(self._folder / f"batches-{self._name}", flags, 0o644)
        sync_folder(self._folder)

    def _record(self, batch: Batch, data: bytes, seconds: float) -> BatchRecord:
        generations = batch.generations
        samples = [sample for generation in generations for sample in (generation, *generation.others)]
        generated = sum(sample.generated_tokens for sample in samples) - batch.repeated_tokens
        reasoning = (sample.details.reasoning_tokens or 0 for sample in samples if sample.details is not None)
        return BatchRecord(
            seconds=round(seconds, 6),
            prompts=len(generations),
            prompt_tokens=sum(generation.prompt_tokens for generation in generations),
            generated_tokens=generated,
            padded_tokens=batch.padded_tokens,
            tokens_per_second=round(generated / seconds, 3) if seconds > 0 else 0.0,
            peak_memory_bytes=batch.peak_memory_bytes,
            attempt=self._attempt,
            rank=self._rank,
            first=self._end == 0,
            finished=time.time(),
            begin=self._end,
            end=self._end + len(data),
            rows=[generation.index for generation in generations],
            failed=[generation.index for generation in generations if generation.error is not None],
            checksum=zlib.crc32(data),
            share_of_bound=batch.share_of_bound,
            incomplete=list(batch.incomplete),
            reasoning_tokens=sum(reasoning),
        )
