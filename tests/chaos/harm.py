"""What befalls a run folder at rest: files cut, bytes flipped, tails torn, files deleted, the folder moved."""

from __future__ import annotations

import random
from pathlib import Path

# Files that hold the work are struck most.
_WEIGHTS = (("generations-", 6), ("batches-", 6), ("attempts/", 3), ("input/", 1), ("generations.", 1), ("", 1))

_MANIFEST = ("run.json", "grown-")


def harm(kind: str, out: Path, choose: random.Random) -> tuple[Path, set[str], str]:
    """Does it; gives where the run folder is now, the names of the files that were harmed, and what was done.

    run.json is left alone, and what was appended to it: without it nobody knows what the run is.
    """
    if kind == "move folder":
        moved = out.with_name(f"{out.name.partition('-')[0]}-{choose.getrandbits(16)}")
        if out.exists():
            out.rename(moved)
        return (moved if moved.exists() else out), set(), f"to {moved.name}"
    files = sorted(path for path in out.rglob("*") if path.is_file() and not path.name.startswith(_MANIFEST))
    if kind == "tear tail":
        files = [path for path in files if path.name.startswith(("generations-", "batches-"))]
    if not files:
        return out, set(), "there was nothing to harm"
    path = choose.choices(files, [_weight(str(file.relative_to(out))) for file in files])[0]
    done = _KINDS[kind](path, choose)
    return out, {path.name}, f"{path.relative_to(out)} {done}"


def _weight(name: str) -> int:
    return next(weight for begin, weight in _WEIGHTS if name.startswith(begin))


def _cut(path: Path, choose: random.Random) -> str:
    content = path.read_bytes()
    end = choose.choice((0, choose.randint(0, len(content)), max(0, len(content) - choose.randint(1, 40))))
    path.write_bytes(content[:end])
    return f"at byte {end} of {len(content)}"


def _flip(path: Path, choose: random.Random) -> str:
    """In the tail, or anywhere."""
    content = bytearray(path.read_bytes())
    if not content:
        return "is empty"
    first = choose.choice((0, max(0, len(content) - 200)))
    places = [choose.randrange(first, len(content)) for _ in range(choose.randint(1, 4))]
    for place in places:
        content[place] ^= 1 << choose.randrange(8)
    path.write_bytes(content)
    return f"at {', '.join(map(str, sorted(places)))} of {len(content)}"


def _tear(path: Path, choose: random.Random) -> str:
    """What a killed process or an old disk leaves behind the end: a part of a line, whole lines, zeros."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True) or [b'{"index": 0}\n']
    one = choose.choice(lines)
    tail = choose.choice((one[: choose.randint(1, len(one))], one, one + one[:5], bytes(choose.randint(1, 600))))
    if path.name.startswith("batches-") and b"\n" in tail:
        tail = tail.partition(b"\n")[0][:-1]  # a second copy of a whole record is nobody's doing
    path.write_bytes(content + tail)
    return f"has {len(tail)} bytes more"


def _delete(path: Path, choose: random.Random) -> str:
    path.unlink()
    return "deleted"


_KINDS = {"cut file": _cut, "flip bytes": _flip, "tear tail": _tear, "delete file": _delete}
