"""`batchgen run-batch`: in the place of `vllm run-batch`."""

from __future__ import annotations

import gzip
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from batchgen.commands import run_batch
from batchgen.runs import transfer
from tests.bad_input.command import call as fork
from tests.commands.starts import Started, batchgen, call, found, read_rows, recorded, step, until, write_rows


def chat(custom_id: str, content: str = "Hi", **body: object) -> dict[str, object]:
    messages = [{"role": "user", "content": content}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }


def completion(custom_id: str, prompt: str, **body: object) -> dict[str, object]:
    url = "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", "prompt": prompt, **body}}


def answer(*arguments: object) -> list[object]:
    return ["run-batch", *arguments, "--model", "m", "--engine", "echo"]


LINES: list[object] = [
    chat("chat", max_completion_tokens=4),
    completion("completion", "echo this"),
    chat("other", model="another"),
    chat("stream", stream=True),
    {**chat("url"), "url": "/v1/embeddings"},
    "{broken",
]


def test_answers_every_line_in_order_and_parses_with_openai(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", LINES)
    ended = call(tmp_path, *answer("-i", "in.jsonl", "-o", "out.jsonl"))
    assert (ended.code, ended.out) == (3, "out.jsonl\n"), ended.err
    answers = read_rows(tmp_path / "out.jsonl")
    ids = ["chat", "completion", "other", "stream", "url", "line-6"]
    assert [line["custom_id"] for line in answers] == ids
    assert [line["response"]["status_code"] for line in answers] == [200, 200, 404, 400, 400, 400]
    first = ChatCompletion.model_validate(answers[0]["response"]["body"])
    assert (first.choices[0].message.content, first.choices[0].finish_reason) == ("user", "length")
    second = Completion.model_validate(answers[1]["response"]["body"])
    assert (second.choices[0].text, second.model) == ("echo this", "m")
    assert answers[2]["error"]["error"]["code"] == 404
    assert answers[3]["error"] == "Request must not be sent in stream mode"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl", "out.jsonl.run"]


def test_error_format_openai_has_http_errors(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", LINES)
    call(tmp_path, *answer("-i", "in.jsonl", "-o", "out.jsonl"), "--error-format", "openai")
    answers = read_rows(tmp_path / "out.jsonl")
    assert [line["error"] for line in answers] == [None] * 6
    assert answers[2]["response"]["body"]["error"]["code"] == "model_not_found"


def test_flags_of_vllm_are_taken_or_ignored_with_a_warning(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [completion("a", "x"), completion("b", "y"), completion("c", "z")])
    flags = "--tensor-parallel-size 2 --enable-metrics --dtype half --max-num-seqs 2 --max-model-len=4096 -tp 4"
    ended = call(tmp_path, *answer(*flags.split(), "--input-file", "in.jsonl", "--output-file", "out.jsonl"))
    assert ended.code == 0, ended.err
    ignored = "--tensor-parallel-size, --enable-metrics, --max-model-len, -tp"
    assert f"batchgen: ignored, since no answer depends on them here: {ignored}\n" in ended.err
    assert [batch["prompts"] for batch in read_rows(tmp_path / "out.jsonl.run/timing.jsonl")] == [2, 1]


def test_served_model_name_is_what_lines_must_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [completion("a", "x", model="served"), completion("b", "x")])
    assert call(tmp_path, *answer("-i", "in.jsonl", "-o", "out.jsonl"), "--served-model-name", "served").code == 3
    answers = read_rows(tmp_path / "out.jsonl")
    assert [line["response"]["status_code"] for line in answers] == [200, 404]
    assert answers[0]["response"]["body"]["model"] == "served"


def test_another_input_replaces_a_finished_run_and_leaves_other_files_alone(tmp_path: Path) -> None:
    command = answer("-i", "in.jsonl", "-o", "out.jsonl", "--run-folder", ".")
    write_rows(tmp_path / "in.jsonl", [completion("first", "x"), completion("more", "x")])
    assert call(tmp_path, *command).code == 0
    write_rows(tmp_path / "in.jsonl", [completion("second", "x")])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "input/mine").mkdir()
    assert call(tmp_path, *command).code == 0
    assert [line["custom_id"] for line in read_rows(tmp_path / "out.jsonl")] == ["second"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert found(tmp_path).rows == 1
    assert len(found(tmp_path).attempts) == 1


def test_stopped_run_refuses_another_input_and_goes_on_with_its_own(tmp_path: Path) -> None:
    lines = [completion(f"row-{number}", "x" * (number % 9 + 1)) for number in range(100)]
    write_rows(tmp_path / "in.jsonl", lines)
    write_rows(tmp_path / "other.jsonl", lines[:50])
    slow = ["--set", "seconds=0.01", "--batch-size", 5]
    with Started(batchgen(*answer("-i", "in.jsonl", "-o", "out.jsonl"), *slow), tmp_path) as process:
        until(lambda: recorded(tmp_path / "out.jsonl.run"), process)
        process.send(signal.SIGTERM)
        assert process.end().code == 75
    assert not (tmp_path / "out.jsonl").exists()
    ended = call(tmp_path, *answer("-i", "other.jsonl", "-o", "out.jsonl"))
    assert ended.code == 4
    assert "is not what the run began with" in ended.err
    assert call(tmp_path, *answer("-i", "in.jsonl", "-o", "out.jsonl"), "--ranks", 2).code == 0
    answers = read_rows(tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in answers] == [line["custom_id"] for line in lines]
    assert found(tmp_path / "out.jsonl.run").attempts[0].generated_tokens > 0


def test_a_file_that_has_more_lines_is_answered_anew_with_the_old_answers_in_it(tmp_path: Path) -> None:
    lines = [completion(f"row-{number}", "x" * (number + 1)) for number in range(7)]
    words = answer("-i", "in.jsonl", "-o", "out.jsonl")
    write_rows(tmp_path / "in.jsonl", lines[:4])
    assert fork(tmp_path, *words).code == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    write_rows(tmp_path / "in.jsonl", lines)
    ended = fork(tmp_path, *words)
    assert (ended.code, "3 rows have been appended to the input" in ended.err) == (0, True), ended.err
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)
    assert [line["custom_id"] for line in read_rows(tmp_path / "out.jsonl")] == [line["custom_id"] for line in lines]
    assert len(found(tmp_path / "out.jsonl.run").attempts) == 2
    write_rows(tmp_path / "in.jsonl", lines[1:])  # another job, which takes the place of the finished one
    assert fork(tmp_path, *words).code == 0
    assert len(read_rows(tmp_path / "out.jsonl")) == 6
    assert not list((tmp_path / "out.jsonl.run").glob("grown-*"))


def test_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [completion("a", "x")])
    before = (tmp_path / "in.jsonl").read_bytes()
    ended = call(tmp_path, *answer("-i", "in.jsonl", "-o", "./in.jsonl"))
    assert ended.code == 4
    assert "./in.jsonl is the input: the answers would take its place" in ended.err
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_output_that_cannot_be_written_is_a_sentence_and_the_answers_stay(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [completion("a", "x")])
    long = "x" * 250  # with what stands behind the name of a scratch file it is longer than a name may be
    ended = call(tmp_path, *answer("-i", "in.jsonl", "-o", long, "--run-folder", "rf"))
    assert ended.code == 75
    assert f"cannot write {long}: File name too long. All answers are in rf/generations.jsonl" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "rf"]


@pytest.mark.parametrize("words", [["-o", "there"], ["-o", "none/out.jsonl", "--run-folder", "rf"]])
def test_output_that_can_never_be_written_is_refused_before_anything_is_generated(
    words: list[str], tmp_path: Path
) -> None:
    write_rows(tmp_path / "in.jsonl", [completion("a", "x")])
    (tmp_path / "there").mkdir()
    ended = call(tmp_path, *answer("-i", "in.jsonl", *words))
    assert ended.code == 4
    assert f"{words[1]} cannot be written" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "there"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shard", "0/2"], "run-batch has no --shard; `batchgen run` has"),
        (["--strict"], "run-batch has no --strict; `batchgen run` has"),
        (["--chat-template", "x"], "run-batch has no --chat-template, which would change the answers"),
        (["--max-new-token", "3"], "run-batch has no --max-new-token; is --max-new-tokens meant?"),
    ],
)
def test_options_that_would_change_the_answers_are_not_ignored(words: list[str], sentence: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [completion("a", "x")])
    ended = call(tmp_path, *answer("-i", "in.jsonl", "-o", "out.jsonl", *words))
    assert (ended.code, sentence in ended.err) == (4, True), ended.err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_finished_run_that_is_thrown_away_is_said_and_its_removal_is_gone_on_with(tmp_path: Path) -> None:
    words = answer("-i", "in.jsonl", "-o", "out.jsonl")
    write_rows(tmp_path / "in.jsonl", [completion("a", "x")])
    assert call(tmp_path, *words).code == 0
    write_rows(tmp_path / "in.jsonl", [completion("b", "y"), completion("c", "z")])
    (tmp_path / "out.jsonl.run" / "discarding").touch()  # as if a start had been killed while it removed the run
    (tmp_path / "out.jsonl.run" / "run.json").unlink()
    assert call(tmp_path, *words).code == 0
    assert [line["custom_id"] for line in read_rows(tmp_path / "out.jsonl")] == ["b", "c"]
    write_rows(tmp_path / "in.jsonl", [completion("d", "x")])
    ended = call(tmp_path, *words)
    assert ended.code == 0
    assert "the run in out.jsonl.run is finished, so this is a new one, from the beginning" in ended.err


@pytest.mark.parametrize("name", ["requests", "requests.json", "requests.txt", "b.parquet", "b.arrow", "x.jsonl.gz"])
def test_an_input_is_json_lines_whatever_its_name(name: str, tmp_path: Path) -> None:
    write_rows(tmp_path / name, [completion("a", "x")])
    ended = fork(tmp_path, *answer("-i", name, "-o", "out"))
    assert (ended.code, [line["custom_id"] for line in read_rows(tmp_path / "out")]) == (0, ["a"]), ended.err


def test_nor_does_its_name_say_whether_it_is_compressed(tmp_path: Path) -> None:
    text = write_rows(tmp_path / "lines", [completion("a", "x")]).read_bytes()
    for content in (gzip.compress(text), pa.compress(text, codec="zstd", asbytes=True)):
        (tmp_path / "lines").write_bytes(content)
        ended = fork(tmp_path, *answer("-i", "lines", "-o", "out"))
        assert (ended.code, [line["custom_id"] for line in read_rows(tmp_path / "out")]) == (0, ["a"]), ended.err


def test_a_table_of_requests_is_read_as_before(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([completion("a", "x")]), tmp_path / "in.parquet")
    ended = fork(tmp_path, *answer("-i", "in.parquet", "-o", "out"))
    assert (ended.code, [line["custom_id"] for line in read_rows(tmp_path / "out")]) == (0, ["a"]), ended.err


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf\n", gzip.compress(b"\n", mtime=0)])
def test_an_empty_file_has_an_empty_file_of_answers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(content)
    (tmp_path / "out").write_bytes(b"from before")
    ended = fork(tmp_path, *answer("-i", "in", "-o", "out"))
    assert (ended.code, ended.out, (tmp_path / "out").read_bytes()) == (0, "out\n", b""), ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_empty_file_takes_the_place_of_a_finished_run_but_not_of_another(tmp_path: Path) -> None:
    words = answer("-i", "in.jsonl", "-o", "out.jsonl")
    write_rows(tmp_path / "in.jsonl", [completion(f"row-{number}", "x") for number in range(100)])
    with Started(batchgen(*words, "--set", "seconds=0.01", "--batch-size", 5), tmp_path) as process:
        until(lambda: recorded(tmp_path / "out.jsonl.run"), process)
        process.send(signal.SIGTERM)
        assert process.end().code == 75
    lines = (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "in.jsonl").write_bytes(b"")
    ended = call(tmp_path, *words)
    assert (ended.code, "is not what the run began with" in ended.err) == (4, True), ended.err
    (tmp_path / "in.jsonl").write_bytes(lines)
    assert call(tmp_path, *words).code == 0
    (tmp_path / "in.jsonl").write_bytes(b"")
    ended = call(tmp_path, *words)
    assert (ended.code, (tmp_path / "out.jsonl").read_bytes()) == (0, b""), ended.err


def test_ids_of_two_files_may_be_the_same_with_their_files_names_in_front(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, [completion("1", name), completion("2", name)])
    ended = fork(tmp_path, *answer("-i", "*.jsonl", "-o", "out"))
    assert (ended.code, "With --id-prefix file, each id has the name of its file in front" in ended.err) == (3, True)
    ended = fork(tmp_path, *answer("-i", "*.jsonl", "-o", "other", "--id-prefix", "file"))
    ids = [line["custom_id"] for line in read_rows(tmp_path / "other")]
    assert (ended.code, ids) == (0, ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]), ended.err


def test_under_srun_the_last_task_writes_the_output(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [completion(str(number), "x") for number in range(10)])
    command = batchgen(*answer("-i", "in.jsonl", "-o", "out.jsonl"))
    with Started(command, tmp_path, step(0, 2)) as first, Started(command, tmp_path, step(1, 2)) as second:
        assert [first.end().code, second.end().code] == [0, 0]
    assert [line["custom_id"] for line in read_rows(tmp_path / "out.jsonl")] == [str(n) for n in range(10)]


class Store(ThreadingHTTPServer):
    """Files that GET gives and PUT replaces; `failures` PUTs are refused first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.types: list[str | None] = []
        self.failures = 0
        self.cut = False

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.server.cut else data)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.types.append(self.headers["Content-Type"])
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        self.server.files[self.path] = data
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def lines_of(path: Path, *ids: str) -> bytes:
    return write_rows(path, [completion(id, "x") for id in ids]).read_bytes()


def test_urls_are_read_with_get_and_written_with_put(tmp_path: Path, store: Store) -> None:
    store.files["/in"] = lines_of(tmp_path / "lines", "a", "b")
    source, target = store.url("/in"), store.url("/folder/answers.jsonl?signature=a/b")
    command = answer("-i", source, "-o", target)
    assert call(tmp_path, *command).code == 0
    assert [line["custom_id"] for line in decoded(tmp_path, store)] == ["a", "b"]
    assert store.types == ["application/octet-stream"]
    assert found(tmp_path / "answers.jsonl.run").good == 2
    # What is behind the URL now is another input, and the run was finished.
    store.files["/in"] = lines_of(tmp_path / "lines", "c")
    assert call(tmp_path, *command).code == 0
    assert [line["custom_id"] for line in decoded(tmp_path, store)] == ["c"]


def decoded(folder: Path, store: Store) -> list[dict[str, Any]]:
    (folder / "put").write_bytes(store.files["/folder/answers.jsonl?signature=a/b"])
    return read_rows(folder / "put")


def test_another_url_is_another_input(tmp_path: Path, store: Store) -> None:
    store.files = {"/a": lines_of(tmp_path / "lines", "a"), "/b": lines_of(tmp_path / "lines", "b", "c")}
    assert call(tmp_path, *answer("-i", store.url("/a"), "-o", "out.jsonl")).code == 0
    assert call(tmp_path, *answer("-i", store.url("/b"), "-o", "out.jsonl")).code == 0
    assert [line["custom_id"] for line in read_rows(tmp_path / "out.jsonl")] == ["b", "c"]


def test_url_that_cannot_be_read_is_exit_4(tmp_path: Path, store: Store) -> None:
    missing = call(tmp_path, *answer("-i", store.url("/none"), "-o", "out.jsonl"))
    assert missing.code == 4
    assert "/none: HTTP Error 404" in missing.err
    store.files["/cut"], store.cut = lines_of(tmp_path / "lines", "a", "b"), True
    cut = call(tmp_path, *answer("-i", store.url("/cut"), "-o", "out.jsonl"))
    assert cut.code == 4
    assert "it broke off after" in cut.err
    assert list((tmp_path / "out.jsonl.run").glob("fetched*")) == []


def test_put_is_tried_again(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_BACKOFF_SECONDS", 0)
    (tmp_path / "answers").write_bytes(b"all answers")
    store.failures = 4
    run_batch._deliver(tmp_path / "answers", store.url("/out"))
    assert store.files["/out"] == b"all answers"
    store.failures = 5
    with pytest.raises(
        run_batch.Unfinished, match=r"HTTP Error 503.*All answers are in .*the same command tries again"
    ):
        run_batch._deliver(tmp_path / "answers", store.url("/out"))
