"""Power cuts and failing disks: `power.c` preloaded into a run, and the folder as a disk would show it afterwards.

A disk keeps what was synced. Of all else (the end of a file, a name in a folder) each part may be there or not, and the
end of a file may hold zeros where data did not arrive. `Journal.cut` builds one such folder, drawn at random.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("power.c")


@cache
def shim(folder: Path) -> Path:
    """The compiled library, made in `folder`."""
    library = folder / "power.so"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(library),
        str(SOURCE),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return library


@dataclass(eq=False)
class File:
    """What one file held: `size` bytes at the cut, of which `synced` are on the disk."""

    synced: int = 0
    size: int = 0
    content: bytes = b""  # filled last, with all that was ever in it


@dataclass
class Names:
    """A tree of files, by absolute path."""

    files: dict[str, File] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)

    def copy(self) -> Names:
        return Names(dict(self.files), set(self.folders))

    def remove(self, name: str) -> None:
        self.files.pop(name, None)


Change = Callable[[Names], None]


class Journal:
    """What one start did to the files below `place`."""

    def __init__(self, place: Path, scratch: Path) -> None:
        """To be made before the start: what lies in `place` by then is on the disk. `scratch` is not below it."""
        self._place, self._kept, self.path = place, scratch / "kept", scratch / "journal"
        shutil.rmtree(self._kept, ignore_errors=True)
        self._kept.mkdir()
        self.path.unlink(missing_ok=True)
        self._inodes: dict[str, File] = {}
        self._disk = Names()
        for path in place.rglob("*"):
            if path.is_dir():
                self._disk.folders.add(str(path))
            else:
                content = path.read_bytes()
                file = File(len(content), len(content), content)
                self._disk.files[str(path)] = self._inodes[str(path.stat().st_ino)] = file
        self._now = self._disk.copy()  # as the processes see it
        self._waiting: list[tuple[str, Change]] = []  # changes of names that are not synced, with their folder
        self.struck = ""  # the operation at which the disk failed or the power went
        self._at_cut = self._now

    def environment(self, library: Path, at: int, error: int) -> dict[str, str]:
        """For the start: operation `at` (from 1; 0: none) and all later ones fail with `error`; 0: the power goes."""
        names = {"ROOT": self._place, "JOURNAL": self.path, "KEPT": self._kept, "AT": at, "ERROR": error}
        return {"LD_PRELOAD": str(library), **{f"BATCHGEN_CHAOS_{name}": str(value) for name, value in names.items()}}

    def read(self) -> Journal:
        """Follows the operations, when all processes are gone."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            self._follow(*line.split("\t"))
        for name, file in self._now.files.items():
            if not file.content and Path(name).is_file():
                file.content = Path(name).read_bytes()
        return self

    def _follow(self, what: str, first: str, second: str = "") -> None:
        if what == "X":
            if not self.struck:
                self.struck, self._at_cut = f"{first} of {Path(second).name}", self._now.copy()
        elif what == "K":
            self._inodes[first].content = Path(second).read_bytes()
        elif what in "WFT":
            self._written(what, first, int(second or 0))
        elif what == "D":
            self._synced(first)
        else:
            self._renamed(what, first, second)

    def _written(self, what: str, inode: str, size: int) -> None:
        file = self._inodes.get(inode)
        if file is None or self.struck:
            return
        if what == "F":
            file.synced = file.size = size
        else:
            file.size, file.synced = size, min(file.synced, size) if what == "T" else file.synced

    def _synced(self, folder: str) -> None:
        if not self.struck:
            for where, change in self._waiting:
                if where == folder:
                    change(self._disk)
            self._waiting = [(where, change) for where, change in self._waiting if where != folder]

    def _renamed(self, what: str, first: str, second: str) -> None:
        change = self._change(what, first, second)
        change(self._now)
        if not self.struck:
            path = first if what in "UM" else second
            self._waiting.append((str(Path(path).parent), change))

    def _change(self, what: str, first: str, second: str) -> Change:
        if what == "M":
            return lambda names: names.folders.add(first)
        if what == "U":
            return lambda names: names.remove(first)
        if what == "C":
            self._inodes[first] = File()
        file = self._inodes[first] if what == "C" else self._now.files[first]

        def change(names: Names) -> None:
            names.files[second] = file
            if what == "R" and names.files.get(first) is file:
                del names.files[first]

        return change

    def acknowledged(self) -> dict[str, bytes]:
        """What was synced of every batches file, whose name need not be: the run has said that it is finished."""
        seen = self._at_cut.files
        return {Path(name).name: file.content[: file.synced] for name, file in seen.items() if "/batches-" in name}

    def cut(self, choose: random.Random) -> None:
        """Puts into the folder what is there after the power cut."""
        keep = choose.choice((0.0, 0.5, 1.0))
        for _, change in self._waiting:
            if choose.random() < keep:
                change(self._disk)
        for path in self._place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in sorted(self._disk.folders):
            if Path(name).parent.is_dir():
                Path(name).mkdir(exist_ok=True)
        for name, file in self._disk.files.items():
            if Path(name).parent.is_dir():  # else the name of its folder is lost
                Path(name).write_bytes(_after(file, choose))


def _after(file: File, choose: random.Random) -> bytes:
    size = choose.choice((file.synced, choose.randint(file.synced, file.size), file.size))
    arrived = choose.randint(file.synced, size) if choose.random() < 0.5 else size
    return file.content[:arrived] + bytes(size - arrived)
