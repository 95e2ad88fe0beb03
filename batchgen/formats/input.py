"""The input of a run: files of any format, one after the other, as rows numbered from 0."""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import pkgutil
import stat
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Self

from batchgen import formats
from batchgen.formats import Changed, InputError, Original, Source, Value, place_of
from batchgen.formats._json_files import begins_as_lines
from batchgen.types import Row

if TYPE_CHECKING:  # its import takes a quarter of a second, which JSONL does without
    import pyarrow as pa


# Rows whose ids are compared in a set, which takes some 70 bytes each; more are sorted, for which pyarrow is imported.
_FEW = 100_000


class Input:
    """The files of a run, one after the other."""

    def __init__(
        self, sources: Sequence[Source], cache: Path, into: Path | None, files_before: int | None = None
    ) -> None:
        self.sources, self._cache, self._into = sources, cache, into
        self._files_before = len(sources) if files_before is None else files_before  # that the run has begun with
        self._begins = list(accumulate(map(len, sources), initial=0))

    @classmethod
    def open(
        cls,
        paths: Sequence[str],
        cache: Path,
        *,
        scan: bool,
        into: Path | None = None,
        originals: Sequence[Original] | None = None,
        lines: bool = False,
    ) -> Self:
        """The input that `paths` name: files, folders, or patterns, whose files are taken in the order of their names.

        One process opens it with `scan`, which reads every file once; then others may, without, from the same `cache`.

        Args:
            into: where a scan leaves what it found, until `keep` moves it into the cache; None: there at once.
            originals: the files that a run has begun with; None: none has.
            lines: files are JSON lines whatever they are called, unless they are tables.

        Raises:
            InputError: as `Source`; or there is nothing to read, a pattern matches nothing, a file is named twice.
            Changed: the run has begun with something else, to which more has been done than to append rows.
        """
        files = files_of(paths)
        place = (into or cache) if scan else None
        names = names_of(files)
        if originals is not None and len(files) < len(originals):
            raise Changed(listed(files), f", {len(files)} of {len(originals)} files")
        recorded = chain(originals or (), repeat(None))
        try:
            sources = [
                find(path, lines)(path, names[number], cache, number, place, original)
                for number, (path, original) in enumerate(zip(files, recorded, strict=False))
            ]
        except Changed as error:
            if originals is None or len(files) == len(originals):
                raise
            more = f"{error.where}. There are further files, which must come behind the {len(originals)} it began with"
            raise Changed(error.what, more) from error
        if originals is None:
            return cls(sources, cache, place)
        _check_appended(sources, originals)
        return cls(sources, cache, place, len(originals))

    def keep(self) -> None:
        """Moves what the scan has left into the cache: the run goes on with this input.

        Raises:
            InputError: the cache cannot be written.
        """
        if self._into is None or self._into == self._cache:
            return
        try:
            for file in sorted(self._into.iterdir()):
                os.replace(file, self._cache / file.name)
        except OSError as error:
            raise InputError(f"cannot write {error.filename}: {error.strerror or error}") from error
        for source in self.sources:
            source.settle()

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def digest(self) -> str:
        """SHA-256 over what the files hold, hex: the same wherever they lie and whatever they are called."""
        return _digest_of((source.scanned.digest, len(source)) for source in self.sources)

    @property
    def has_grown(self) -> bool:
        """Whether files or rows have been appended since the run began with it, or went on with it."""
        return self.began_with != (self.digest, len(self))

    @property
    def began_with(self) -> tuple[str, int]:
        """The `digest` and the number of rows that it had when the run began with it, or went on with it."""
        files = [source.began_with for source in self.sources[: self._files_before]]
        return _digest_of(files), sum(rows for _, rows in files)

    @property
    def originals(self) -> list[Original]:
        """The files, as a run that begins with them records them."""
        return [source.original for source in self.sources]

    def bytes_of(self, number: int) -> int:
        """About how many bytes of its file a row takes."""
        place = bisect_right(self._begins, number) - 1 if len(self.sources) > 1 else 0
        return self.sources[place].bytes_of(number - self._begins[place])

    def rows(self, numbers: Iterable[int]) -> Iterator[Row]:
        """The rows of these numbers, which must ascend; as `Source.rows`."""
        for place, part in groupby(numbers, partial(bisect_right, self._begins)):
            begin, source = self._begins[place - 1], self.sources[place - 1]
            for number, line, value in source.rows(number - begin for number in part) if begin else source.rows(part):
                yield Row(begin + number, source.name, line, value, source.has_every_key)

    def schema(self) -> pa.Schema | None:
        """The types of the columns, if all files have the same."""
        first, *others = [source.schema() for source in self.sources]
        same = first is not None and all(other is not None and first.equals(other) for other in others)
        return first if same else None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, few at a time. Only where there is a `schema`."""
        from batchgen.formats._record_batches import readable

        for source in self.sources:
            source.check_unchanged()
            yield from (readable(batch) for _, batch in source.pieces())

    def duplicates(self, id_of: Callable[[Value], str | None], by_file: bool = False) -> dict[int, str]:
        """Row number of each repeated id -> where it stands first. A row without an id is called by its place.

        With `by_file`, the file's name stands before each id, so that the ids of two files are never the same.
        Reads all rows once, and those again that may be repeated. 8 bytes a row, 24 while sorting.
        """
        each = (source.hashes(id_of, f"{source.name}:" if by_file else "") for source in self.sources)
        hashes = array("q", chain.from_iterable(each))
        if len(hashes) <= _FEW and len(set(hashes)) == len(hashes):
            return {}
        import pyarrow as pa
        import pyarrow.compute as pc

        values = pa.Array.from_buffers(pa.int64(), len(hashes), [None, pa.py_buffer(hashes)])
        order = pc.sort_indices(values)
        ordered = values.take(order)
        same = pc.equal(ordered[1:], ordered[:-1])
        suspects = pa.concat_arrays([order[1:].filter(same), order[:-1].filter(same)]).unique().sort()
        first: dict[str, Row] = {}
        repeated = {}
        for row in self.rows(number.as_py() for number in suspects):
            own = id_of(row.value)
            id = place_of(row.source, row.line) if not own else f"{row.source}:{own}" if by_file else own
            if first.setdefault(id, row) is not row:
                repeated[row.index] = f"line {first[id].line} of {first[id].source}"
        return repeated


def _digest_of(files: Iterable[tuple[str, int]]) -> str:
    return hashlib.sha256(json.dumps(list(files)).encode()).hexdigest()


def _check_appended(sources: Sequence[Source], originals: Sequence[Original]) -> None:
    """Checks that rows were appended behind all others alone, and that further files bring names of their own.

    Raises:
        Changed: rows were appended to one of the run's files that others of them follow.
        InputError: a further file has the name of one that the run began with.
    """
    for source in sources[: len(originals) - 1]:
        if source.rows_before not in (None, len(source)):
            where = f", {len(source)} rows where it had {source.rows_before}, before rows of other files"
            raise Changed(source.path, f"{where}. Rows can be appended to the last file alone, or as further files")
    taken = {original.name for original in originals}
    for source in sources[len(originals) :]:
        if source.name in taken:
            raise InputError(
                f"{source.path} is a further file, but has the name of one that the run began with, by which rows "
                "without ids are called. Give it another name"
            )


def files_of(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` name.

    Raises:
        InputError: there is none, or a pattern matches nothing.
    """
    files = [path for text in paths for path in _expand(text)]
    if not files:
        raise InputError("there is no input: name at least one file")
    return files


def _expand(text: str) -> list[Path]:
    """The files that `text` names. What exists is no pattern, whatever characters are in its name."""
    paths = [text] if os.path.exists(text) or not glob.has_magic(text) else sorted(glob.glob(text, recursive=True))
    if not paths:
        raise InputError(f"no file matches {text}")
    return [Path(path) for path in paths]


def listed(files: Sequence[object]) -> str:
    """The files in words, for a sentence that is about all of them."""
    if len(files) == 1:
        return str(files[0])
    some = ", ".join(map(str, files[:3])) + (" …" if len(files) > 3 else "")
    return f"the input of {len(files)} files ({some})"


def names_of(files: Sequence[Path]) -> list[str]:
    """The name of each file; where several have the same, the path from the folder that holds those."""
    full = [Path(os.path.abspath(file)) for file in files]
    alike: dict[str, list[Path]] = {}
    for file in full:
        alike.setdefault(file.name, []).append(file)
        if alike[file.name].count(file) > 1:
            raise InputError(f"{file} is named twice in the input")
    folders = {name: os.path.commonpath([file.parent for file in same]) for name, same in alike.items()}
    return [_printable(file.relative_to(folders[file.name]).as_posix()) for file in full]


def _printable(name: str) -> str:
    """A name may be any bytes, but ids are made from it, and those are texts."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find(path: Path, lines: bool = False) -> type[Source]:
    """The format of `path`, by its name.

    With `lines`, a file is JSON lines whatever it is called, if it begins as they do or its name says nothing.

    Raises:
        InputError: there is no such file, or no such format.
    """
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise InputError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise InputError(
            f"{path} is neither a file nor a folder, and has no end or can be read only once. Put its rows into a file"
        )
    lines = lines and stat.S_ISREG(kind)
    suffixes: list[str] = []
    if not (lines and begins_as_lines(path)):
        for format in _formats(path):
            if format.accepts(path):
                return format
            suffixes += format.suffixes
    if lines:
        return next(format for format in _formats(Path(".jsonl")))
    raise InputError(f"{path} is of no known format: it must be a file that ends in {', '.join(sorted(suffixes))}")


def _formats(path: Path) -> Iterator[type[Source]]:
    """All formats; the one that the file is named after comes first, so that the others need not be imported."""
    modules = [module.name for module in pkgutil.iter_modules(formats.__path__)]
    for module in sorted(modules, key=lambda name: f".{name}" not in path.name):
        for value in vars(importlib.import_module(f"batchgen.formats.{module}")).values():
            if isinstance(value, type) and issubclass(value, Source) and value is not Source:
                yield value
