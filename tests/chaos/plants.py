"""Faults planted into a copy of the package, each of which the suite must find."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.chaos.starts import ROOT

_TRUST = """            yield record
            end, last = record.end, record
        import dataclasses
        text.seek(end)
        for line in text if last else ():
            try:
                rows = [json.loads(line)["index"]]
            except (ValueError, KeyError):
                continue
            begin, end = end, end + len(line)
            yield dataclasses.replace(last, begin=begin, end=end, rows=rows, failed=[], checksum=zlib.crc32(line))
"""

# By name: the file, and what is put in the place of what.
PLANTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "record-first": (
        "checkpoint/records.py",
        (
            (
                "        append(self._generations, data)\n        append(self._batches, _line_of(record))\n",
                "        append(self._batches, _line_of(record))\n        append(self._generations, data)\n",
            ),
        ),
    ),
    "text-not-synced": (
        "checkpoint/records.py",
        (("append(self._generations, data)", "os.write(self._generations, data)"),),
    ),
    "nothing-synced": (
        "checkpoint/files.py",
        (
            (
                "        view = view[os.write(descriptor, view) :]\n    os.fsync(descriptor)\n",
                "        view = view[os.write(descriptor, view) :]\n",
            ),
        ),
    ),
    "names-not-synced": (
        "files.py",
        (("        _sync(folder)\n", "        pass\n"),),
    ),
    "trust-tail": (
        "checkpoint/records.py",
        (
            (
                "        size = os.fstat(text.fileno()).st_size\n        for",
                "        end, last = 0, None\n        size = os.fstat(text.fileno()).st_size\n        for",
            ),
            ("            yield record\n", _TRUST),
        ),
    ),
    "checksum-ignored": (
        "checkpoint/records.py",
        (("            if verify:\n", "            if verify and False:\n"),),
    ),
    "claim-ignored": ("checkpoint/attempt.py", (("    if live is not None:\n", "    if False:\n"),)),
    "input-not-compared": (
        "checkpoint/manifest.py",
        (
            ('str(one["digest"])', '""'),
            ('    if "input" in recorded and ', "    if False and "),
            ("    if differing:\n", "    if False:\n"),
        ),
    ),
}


def plant(name: str, folder: Path) -> Path:
    """Makes `folder` the place of a package `batchgen` with that fault; gives `folder`."""
    shutil.copytree(ROOT / "batchgen", folder / "batchgen", ignore=shutil.ignore_patterns("__pycache__"))
    where, changes = PLANTS[name]
    path = folder / "batchgen" / where
    source = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{name}: {where} has changed; plant it anew"
        source = source.replace(old, new)
    path.write_text(source, encoding="utf-8")
    return folder
