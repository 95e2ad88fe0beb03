"""`batchgen pull` against a server that speaks the hub's API, then `resolve` with that server gone.

In processes of their own: huggingface_hub reads its variables once, when it is imported.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.weights import pickled, safetensors

ROOT = Path(__file__).parents[2]
COMMIT, OLDER = "a" * 40, "b" * 40
TOKEN = "hf_a_very_secret_token"
RESOLVE = (
    "import sys; from pathlib import Path; from batchgen import models\n"
    "try: found = models.resolve(sys.argv[1], Path('/nowhere'), print)\n"
    "except models.ModelError as error: sys.exit(f'sentence: {error}')\n"
    "print(found.folder, found.name, found.revision)"
)
DEFINITION = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "LICENSE": b"terms"}
SHARDS = ["model_00001-of-00002.safetensors", "model_00002-of-00002.safetensors"]
REPOSITORIES = {
    "org/one": {
        **DEFINITION,
        "model.safetensors": safetensors(),
        "pytorch_model.bin": b"not needed",
        "original/tokenizer.model": b"not needed",
        "onnx/model.onnx": b"not needed",
        "model.fp16.safetensors": b"not needed",
    },
    "org/shards": {
        **DEFINITION,
        "model.safetensors.index.json": json.dumps(
            {"metadata": {}, "weight_map": {"x": SHARDS[0], "y": SHARDS[1]}}
        ).encode(),
        SHARDS[0]: safetensors(b"first"),
        SHARDS[1]: safetensors(b"second"),
        "pytorch_model.bin": b"not needed",
    },
    "org/folder": {
        **DEFINITION,
        "model.safetensors.index.json": json.dumps(
            {"metadata": {}, "weight_map": {"x": f"parts/{SHARDS[0]}"}}
        ).encode(),
        f"parts/{SHARDS[0]}": safetensors(),
        f"parts/{SHARDS[1]}": b"not needed",
        SHARDS[0]: b"not needed",
    },
    "org/bin": {**DEFINITION, "pytorch_model.bin": pickled()},
    "org/gguf": {**DEFINITION, "model.gguf": b"other"},
    "org/data": {"data.csv": b"1,2"},
    "org/gated": {**DEFINITION, "model.safetensors": safetensors()},
}


class Hub(http.server.ThreadingHTTPServer):
    """Serves REPOSITORIES: `main` is COMMIT, the tag `v1` is OLDER; `org/gated` and `org/busy` refuse to hand out."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fetched: list[str] = []  # files whose content was asked for
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._answer_api("/".join(parts[2:4]), parts[4], parts[5])
        else:
            self._answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _answer_api(self, model: str, question: str, revision: str) -> None:
        commit = self._commit(model, revision)
        if commit is None:
            return
        files = REPOSITORIES[model]
        if question == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": digest(files[name])} for name in files
            ]
            self._send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        else:
            names = [{"rfilename": name} for name in files]
            about = {"id": model, "modelId": model, "sha": commit, "siblings": names, "private": False, "tags": []}
            self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, model: str, revision: str, name: str) -> None:
        commit = self._commit(model, revision)
        if commit is None:
            return
        content = REPOSITORIES[model].get(name)
        if model == "org/gated":  # what it holds may be seen, only the files are refused
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        if self.command == "GET":
            self.server.fetched.append(name)
        self._send(200, content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit})

    def _commit(self, model: str, revision: str) -> str | None:
        """The commit, or None once a refusal was sent."""
        if model == "org/busy":
            self._send(429, b"", {})
        elif model not in REPOSITORIES:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision in ("main", COMMIT):
            return COMMIT
        elif revision in ("v1", OLDER):
            return OLDER
        else:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return None

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))  # s between looks for the end
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def python(home: Path, address: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def pull(home: Path, address: str, model: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return python(home, address, "-m", "batchgen", "pull", model, **settings)


def resolve(home: Path, model: str) -> subprocess.CompletedProcess[str]:
    return python(home, "http://127.0.0.1:9", "-c", RESOLVE, model)  # the discard port: nobody answers


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("org/one", ["model.safetensors"]),
        ("org/shards", SHARDS),
        ("org/folder", [f"parts/{SHARDS[0]}"]),
        ("org/bin", ["pytorch_model.bin"]),
    ],
)
def test_pull_fetches_what_is_needed_and_resolve_finds_it_offline(
    tmp_path: Path, hub: Hub, model: str, weights: list[str]
) -> None:
    done = pull(tmp_path, hub.address, model)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.removesuffix("\n"))  # the path and nothing else
    assert folder == tmp_path / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / COMMIT
    index = [name for name in REPOSITORIES[model] if name.endswith("index.json")]
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    assert sorted(files) == sorted([*DEFINITION, *index, *weights])
    for path, file in files.items():
        assert file.read_bytes() == REPOSITORIES[model][path]
    for name in (model, f"{model}@main", f"{model}@{COMMIT}", str(folder)):
        assert resolve(tmp_path, name).stdout == f"{folder} {model} {COMMIT}\n"


def test_a_second_pull_fetches_nothing_again(tmp_path: Path, hub: Hub) -> None:
    first = pull(tmp_path, hub.address, "org/shards")
    fetched = len(hub.fetched)
    assert fetched == len(set(hub.fetched)) > 0
    assert pull(tmp_path, hub.address, "org/shards").stdout == first.stdout
    assert len(hub.fetched) == fetched


def test_a_revision_is_pinned_to_its_commit(tmp_path: Path, hub: Hub) -> None:
    done = pull(tmp_path, hub.address, "org/one@v1")
    folder = Path(done.stdout.removesuffix("\n"))
    assert folder.name == OLDER
    assert resolve(tmp_path, "org/one@v1").stdout == f"{folder} org/one {OLDER}\n"
    assert "sentence: org/one is not on this machine" in resolve(tmp_path, "org/one").stderr  # main was never pulled


def test_a_model_that_is_not_whole_is_not_used(tmp_path: Path, hub: Hub) -> None:
    folder = Path(pull(tmp_path, hub.address, "org/shards").stdout.removesuffix("\n"))
    (folder / SHARDS[1]).unlink()
    for name in ("org/shards", str(folder)):
        assert "1 of its 2 weight files are missing" in resolve(tmp_path, name).stderr
    assert "run: batchgen pull org/shards" in resolve(tmp_path, "org/shards").stderr
    pull(tmp_path, hub.address, "org/shards")
    assert resolve(tmp_path, "org/shards").returncode == 0


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("org/nothing", "there is no model org/nothing at 127.0.0.1, or it is private"),
        ("org/one@v9", "org/one has no revision 'v9' at 127.0.0.1"),
        ("org/gated", "org/gated asks its users to accept its terms"),
        ("org/busy", "HTTP status 429. Wait some minutes"),
        ("org/gguf", "holds no weights that Transformers reads"),
        ("org/data", "org/data is no model for Transformers: it holds no config.json"),
        ("org/one.git", "'org/one.git' is neither a folder here nor the name of a hub model"),
        ("not-a-name", "a hub model is named ORG/NAME or ORG/NAME@REVISION"),
    ],
)
def test_pull_says_what_is_wrong(tmp_path: Path, hub: Hub, model: str, sentence: str) -> None:
    failed = pull(tmp_path, hub.address, model, HF_TOKEN=TOKEN)
    assert (failed.returncode, failed.stdout) == (4, "")
    assert sentence in failed.stderr
    assert TOKEN not in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_token_goes_to_the_hub_and_nowhere_else(tmp_path: Path, hub: Hub) -> None:
    done = pull(tmp_path, hub.address, "org/one", HF_TOKEN=TOKEN)
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in done.stdout + done.stderr


def test_without_network_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    failed = pull(tmp_path, "http://127.0.0.1:9", "org/one")
    assert failed.returncode == 4
    assert "cannot reach 127.0.0.1 to fetch org/one" in failed.stderr
    offline = pull(tmp_path, "http://127.0.0.1:9", "org/one", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    absent = resolve(tmp_path, "org/one")
    assert absent.stderr == (
        "sentence: org/one is not on this machine. On a node with internet run: batchgen pull org/one\n"
    )


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "file").touch()
    failed = pull(tmp_path / "file", hub.address, "org/one")
    assert failed.returncode == 4
    assert f"cannot write org/one to {tmp_path / 'file'}" in failed.stderr
