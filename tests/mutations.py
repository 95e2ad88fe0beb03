"""Rows of every kind and files of every format, good ones and damaged ones: for the property tests and the fuzzer."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]

# What stands where something else is meant.
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 2**53 + 1, 2**70, 10**400, "", " ", "\0", "é", "é", "🙂"),
    *("\u2028", "\ufeff", "1", "POST", "user", "x" * 300, "../../etc/passwd", "a\nb", [], {}, [None], [1, 2], ["a"]),
    *([[]], {"a": None}, [{"role": "user", "content": "Hi"}], [{"role": "nobody", "content": [{"type": "text"}]}]),
    *([{"role": "assistant", "tool_calls": [1]}], [{"type": "image_url"}], {"type": "text"}, "{{ 1 // 0 }}", "NaN"),
]
_NAMES = (
    *(
        "id",
        "custom_id",
        "prompt",
        "messages",
        "body",
        "url",
        "method",
        "temperature",
        "max_new_tokens",
        "top_p",
        "top_k",
    ),
    *(
        "seed",
        "stop",
        "logprobs",
        "text",
        "error",
        "index",
        "topic",
        "chat_template_kwargs",
        "é",
        "",
        "a b",
        "input_text",
    ),
)
_BODY = (
    *(
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stop",
        "n",
        "tools",
    ),
    *("stream", "logit_bias", "logprobs", "top_logprobs", "seed", "response_format", "user", "mystery"),
)


def rows(random: Random, count: int) -> list[dict[str, Any]]:
    """Plain rows, conversations or request lines, some of them strange."""
    make = random.choice([_plain, _plain, _chat, _request])
    found = [make(random, number) for number in range(count)]
    for row in found:
        if random.random() < 0.3:
            row[random.choice(_NAMES)] = deepcopy(random.choice(STRANGE))
        if isinstance(row.get("body"), dict) and random.random() < 0.4:
            row["body"][random.choice(_BODY)] = deepcopy(random.choice(STRANGE))
        if random.random() < 0.1:
            row.pop(random.choice(list(row)))
    return found


def _plain(random: Random, number: int) -> dict[str, Any]:
    return {"id": f"row-{number}", "prompt": "word " * random.randint(1, 30), "topic": random.choice(["a", "b"])}


def _chat(random: Random, number: int) -> dict[str, Any]:
    return {"id": number, "messages": [{"role": "user", "content": "Hi " * random.randint(1, 9)}]}


def _request(random: Random, number: int) -> dict[str, Any]:
    url = random.choice(["/v1/chat/completions", "/v1/completions"])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in url else {"prompt": "Hi"}
    return {"custom_id": f"r-{number}", "method": "POST", "url": url, "body": body}


def _lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=bool(len(row) % 2)).encode() + b"\n" for row in rows)


def _table(rows: Rows) -> pa.Table:
    """Columns of the type of their first value; what does not fit is JSON text or null."""
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        found = [row.get(name) for row in rows]
        found = [_filled(value) for value in found]
        try:
            columns[name] = pa.array(found)
        except (pa.ArrowException, OverflowError, UnicodeError):
            columns[name] = pa.array([value if isinstance(value, str) else json.dumps(value) for value in found])
    count = range(len(rows))
    columns["nested"] = pa.array([{"a": [number, None], "b": "z"} for number in count])
    columns["word"] = pa.array(["k" * (number % 3) for number in count]).dictionary_encode()
    columns["when"] = pa.array(count, pa.timestamp("us", tz="UTC"))
    columns["view"] = pa.array([f"longer than twelve {number}" for number in count]).cast(pa.string_view())
    return pa.table(columns)


def _filled(value: Any) -> Any:
    """`value` without empty objects, which Parquet has no type for."""
    if isinstance(value, dict):
        return {name: _filled(part) for name, part in value.items()} or None
    return [_filled(part) for part in value] if isinstance(value, list) else value


def _parquet(rows: Rows, **options: Any) -> bytes:
    packed = io.BytesIO()
    pq.write_table(_table(rows), packed, row_group_size=7, **options)
    return packed.getvalue()


def _ipc(new: Callable[..., Any], rows: Rows, compression: str | None = None) -> bytes:
    packed = io.BytesIO()
    table = _table(rows)
    with new(packed, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=7)
    return packed.getvalue()


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": _lines,
    "b.jsonl.gz": lambda rows: gzip.compress(_lines(rows), mtime=0),
    "c.ndjson.zst": lambda rows: bytes(pa.compress(_lines(rows), codec="zstd", asbytes=True)),
    "d.parquet": _parquet,
    "e.pq": lambda rows: _parquet(rows, compression="zstd", use_dictionary=False),
    "f.arrow": lambda rows: _ipc(pa.ipc.new_stream, rows),
    "g.arrow": lambda rows: _ipc(pa.ipc.new_file, rows),
    "h.feather": lambda rows: _ipc(pa.ipc.new_file, rows, "zstd"),
    "i": lambda rows: _ipc(pa.ipc.new_stream, rows),  # a folder of datasets: its one Arrow file
}


def write(folder: Path, name: str, content: bytes) -> Path:
    """`content` as the file, or as the data file of the folder, of that name."""
    path = folder / name
    if "." in name:
        path.write_bytes(content)
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "data.arrow").write_bytes(content)
    (path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    return path


def mutate(random: Random, content: bytes, most: int = 4) -> bytes:
    """`content` with some bytes flipped, cut out, put in, set, moved or doubled, or cut off."""
    for _ in range(random.randint(0, most)):
        at = random.randrange(len(content) + 1)
        end = min(len(content), at + random.randint(1, 1 << random.randrange(12)))
        piece = content[at:end]
        content = random.choice(
            [
                content[:at] + bytes(byte ^ (1 << random.randrange(8)) for byte in piece[:1]) + content[at + 1 :],
                content[:at] + content[end:],
                content[:at] + random.randbytes(random.randint(1, 9)) + content[at:],
                content[:at]
                + random.choice([b"\0", b"\xff", b"\n", b"\r\n", b'"', b"\xef\xbb\xbf"])
                + content[at + 1 :],
                content[:at] + piece + content[at:],
                content[:at] if random.random() < 0.2 else content,
            ]
        )
    return content
