"""What an author of a prompt file, or another user of the cluster, cannot do. docs/security.md says the same in words.

Models of strangers: tests/engines/test_hostile_models.py.
"""

from __future__ import annotations

import ast
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchgen.commands import main, run_batch
from batchgen.files import write_atomic
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.requests.refusal import Refused
from batchgen.requests.template import compile_template, template_kwargs
from batchgen.types import Prompt
from tests.byte_tokenizer import ByteTokenizer, request, rows
from tests.commands.starts import call, echo, prompts, read_rows, write_rows

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "batchgen").rglob("*.py"))

# Text that would do something if a shell, a path or a template took it for its own.
NASTY = (
    "two words",
    "a'b\"c",
    "$(touch x)",
    "`touch x`",
    "; touch x",
    "& touch x #",
    "line\ntouch x",
    "-rf",
    "--engine=evil",
    "${HOME}",
    "back\\slash",
    "*",
    "~",
    "!!",
    "\ttab",
    "é ￼",
)


# --- a row ---

REACHING = {
    "trust_remote_code": True,
    "model": "evil/model",
    "model_folder": "/etc",
    "engine": "accelerate",
    "settings": {"device_map": "cuda"},
    "dtype": "float16",
    "chat_template": "{{ 1 }}",
    "tokenizer": "/etc/passwd",
    "template": "{{ x }}",
    "prompt_column": "id",
    "out": "/tmp/elsewhere",
    "batch_size": 1_000_000,
    "adapter": "evil",
    "line": 9,
    "index": 9,
    "tokens": [1, 2],
    "params": {"max_new_tokens": 9},
}


@pytest.mark.parametrize("key", REACHING)
def test_a_row_sets_nothing_but_its_sampling_parameters(key: str) -> None:
    given, plain = ({"prompt": "x", "temperature": 0.5}, {key: REACHING[key]})
    [bare, reaching] = PromptReader(Recipe(), ByteTokenizer(), {}).read(rows(given, {**given, **plain}))
    assert isinstance(bare, Prompt)
    assert isinstance(reaching, Prompt)
    assert (reaching.text, reaching.tokens, reaching.params) == (bare.text, bare.tokens, bare.params)
    assert reaching.columns == {**given, **plain}  # it travels along, and that is all


@pytest.mark.parametrize("key", sorted(REACHING))
def test_nor_does_the_body_of_a_request(key: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    reader = PromptReader(Recipe(model="m"), ByteTokenizer(), {})
    [bare, reaching] = reader.read(
        rows(request({**body, "model": "m"}), request({"model": "m", **body, key: REACHING[key]}))
    )
    assert isinstance(bare, Prompt)
    if isinstance(reaching, Prompt):
        assert (reaching.text, reaching.tokens, reaching.params) == (bare.text, bare.tokens, bare.params)
    else:
        assert key in ("model", "chat_template")  # error rows: this run has another model, and one template


def test_variables_of_a_row_for_the_chat_template_cannot_set_an_argument_of_its_call() -> None:
    import inspect

    from transformers import PreTrainedTokenizerBase

    arguments = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    for name in arguments - {"tools", "documents", "kwargs"}:  # these are the template's own variables
        with pytest.raises(Refused):
            template_kwargs({name: "x"}, "chat_template_kwargs")


def test_ids_never_become_paths(tmp_path: Path) -> None:
    ids = ["../../../x", "/etc/x", "..", ".", "nul\0byte", *NASTY, "a" * 5000, "CON", "run.json", "attempts/00001.json"]
    given: list[object] = [{"id": name, "prompt": "x"} for name in ids]
    given += [{**request({"prompt": "x"}, url="/v1/completions"), "custom_id": f"r{name}"} for name in ids]
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    file = write_rows(tmp_path / "a" / "b" / "c" / "prompts.jsonl", given)
    before = files(tmp_path)
    ended = call(file.parent, *echo(file.name, "-o", "out"))
    assert ended.code == 0, ended.err
    run = file.parent / "out"
    made = {path.relative_to(run).as_posix() for path in files(tmp_path) - before}
    assert {name for name in made if not name.startswith(("attempts/", "input/"))} == {
        *("run.json", "generations.jsonl", "errors.jsonl", "timing.jsonl", "merged.json"),
        *("generations-00001-00000.jsonl", "batches-00001-00000.jsonl"),
    }
    assert {name for name in made if name.startswith("attempts/")} == {
        "attempts/00001.json",
        "attempts/00001-00000.json",
    }
    found = read_rows(run / "generations.jsonl")
    assert [row.get("custom_id", row["id"]) for row in found] == [*ids, *(f"r{name}" for name in ids)]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    "template",
    [
        "{{ x.__class__ }}",
        "{{ x.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ x | attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('touch x') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(x) }}",
        "{% import 'os' as os %}",
        "{{ 'x' * 10 ** 15 }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_reaches_nothing_but_its_row(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    render = compile_template(template)
    with pytest.raises(Refused):
        render({"x": "row"})
    assert not files(tmp_path)


# --- a job's script ---


@pytest.mark.parametrize("text", NASTY)
def test_a_job_hands_every_word_on_as_it_was_typed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is run by bash; what it calls is a Python with a nasty path of its own, which notes its words."""
    folder = tmp_path / "it's $(touch x)"
    folder.mkdir()
    python, noted = folder / "py thon", tmp_path / "words.json"
    python.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(noted)!r}, 'w'))\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(folder)
    (folder / "p.jsonl").write_text('{"prompt": "x"}\n')
    words = [
        "run",
        "p.jsonl",
        "-o",
        f"out{text}".replace("\n", ""),
        "--engine",
        "echo",
        f"--stop={text}",
        "--stop",
        f"{text} ",
    ]
    done = CliRunner().invoke(main, ["submit", "--print", f"--comment={text}".replace("\n", ""), "--", *words])
    assert done.exit_code == 0, done.output
    bash = subprocess.run(["bash"], input=done.stdout, text=True, capture_output=True, cwd=folder)
    assert bash.returncode == 0, bash.stderr
    called = json.loads(noted.read_text())
    assert called[:2] == ["-m", "batchgen"]
    assert called[-len(words) - 3 :] == [str(python), "-m", "batchgen", *words]
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("where", ["run folder", "working folder"])
def test_a_line_break_in_a_path_is_no_line_of_a_script(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "plain", "out"
    if where == "working folder":
        folder = tmp_path / "work\ntouch x\n"
    else:
        out = "out\ntouch x\n"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "p.jsonl").write_text('{"prompt": "x"}\n')
    done = CliRunner().invoke(main, ["submit", "--print", "--", "run", "p.jsonl", "-o", out, "--engine", "echo"])
    assert done.exit_code == 4, done.output
    assert "line break" in done.output
    assert "#!/bin/bash" not in done.output


# --- another user, and who reads the run folder ---


SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz012345",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdefghijklmnop",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MY_SERVICE_PASSWORD": "correct horse battery staple",
}


def left_in(folder: Path, *said: str) -> str:
    """All that can be read afterwards."""
    texts = [path.read_text("utf-8", "replace") for path in files(folder)]
    return "\n".join([*texts, *said])


def test_no_secret_of_the_environment_gets_into_the_run_folder_or_a_message(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "prompts.jsonl", prompts(5))
    token, password = SECRETS["HF_TOKEN"], SECRETS["MY_SERVICE_PASSWORD"]
    run = echo(
        file, "-o", tmp_path / "out", "--stop", f"Bearer {token}", "--chat-template-kwargs", json.dumps({"key": "k"})
    )
    ended = call(tmp_path, *run, "--prompt-column", "prompt", environment=SECRETS)
    assert ended.code == 0, ended.err
    wrong = call(tmp_path, *echo(f"/no/{token}/{password}.jsonl", "-o", "other"), environment=SECRETS)
    assert wrong.code == 4
    model = call(tmp_path, "run", file, "--model", f"https://user:{password}@hub/x", "-o", "third", environment=SECRETS)
    assert model.code == 4
    said = [one for ended in (ended, wrong, model) for one in (ended.out, ended.err)]
    everything = left_in(tmp_path, *said)
    for name, secret in SECRETS.items():
        if name != "HF_TOKEN":
            assert secret not in everything, name
    # A stop text is the user's own, decides the text, and is kept to be compared; the command line is kept without.
    kept = json.loads((tmp_path / "out" / "run.json").read_text())
    assert token in json.dumps(kept.pop("asked"))
    assert token not in json.dumps(kept)
    assert token not in (tmp_path / "out" / "attempts" / "00001.json").read_text()
    assert token not in "\n".join(said)


class Store(BaseHTTPRequestHandler):
    """Takes what is put, and has nothing else."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "address", ["ann:pass-word-1@127.0.0.1/in", "ann:pass-word-1@127.0.0.1:9/in", "127.0.0.1:9/in?sig=pass-word-1"]
)
def test_no_signature_or_password_of_an_address_gets_into_a_message(address: str, tmp_path: Path) -> None:
    words = ("run-batch", "-i", f"http://{address}", "-o", "out.jsonl", "--model", "m", "--engine", "echo")
    ended = call(tmp_path, *words)
    assert ended.code == 4
    assert "127.0.0.1" in ended.err
    assert "pass-word-1" not in left_in(tmp_path, ended.out, ended.err)


def test_the_signature_of_an_address_is_not_kept(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", [request({"model": "m", "prompt": "x"}, url="/v1/completions")])
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_address[1]}/out.jsonl?sig=pass-word-2"
        ended = call(tmp_path, "run-batch", "-i", file, "-o", where, "--model", "m", "--engine", "echo")
        server.shutdown()
    assert ended.code == 0, ended.err
    assert "/out.jsonl?[hidden]" in ended.out
    assert "pass-word-2" not in left_in(tmp_path, ended.out, ended.err)


@pytest.mark.parametrize("mask", [0o077, 0o007])
def test_what_is_written_is_as_open_as_the_users_umask_says(mask: int, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "prompts.jsonl", prompts(5))
    ended = call(tmp_path, *echo(file, "-o", "out"), before=lambda: os.umask(mask) and None)
    assert ended.code == 0, ended.err
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        full = 0o777 if path.is_dir() else 0o666
        assert mode & ~(full & ~mask) == 0, (path, oct(mode))
    assert stat.S_IMODE((tmp_path / "out" / "generations.jsonl").stat().st_mode) == 0o666 & ~mask


PLANTED = (
    ("run.json",),
    ("attempts/00001.json",),
    ("generations-00001-00000.jsonl",),
    ("batches-00001-00000.jsonl",),
    ("generations.jsonl", "errors.jsonl", "timing.jsonl", "attempts/00001-00000.json"),
    ("input/00000.json", "input/00000.index", "input/duplicates.json"),
)


@pytest.mark.parametrize("names", PLANTED)
def test_links_planted_in_the_run_folder_are_not_written_through(names: Sequence[str], tmp_path: Path) -> None:
    """Where somebody else may write into a run folder, as on scratch space of a group."""
    file = write_rows(tmp_path / "prompts.jsonl", prompts(5))
    precious, content = tmp_path / "precious", '{"ended": "as a claim it is of no attempt that anybody waits for"}\n'
    precious.write_text(content)
    for name in names:
        link = tmp_path / "out" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(precious)
    call(tmp_path, *echo(file, "-o", "out"))
    assert precious.read_text() == content


def test_nor_is_one_beside_the_answers_of_run_batch(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    (tmp_path / "generations.jsonl").write_text("{}\n")
    (tmp_path / f"out.jsonl.{os.getpid()}").symlink_to(precious)
    run_batch._deliver(tmp_path / "generations.jsonl", str(tmp_path / "out.jsonl"))
    assert precious.read_text() == "precious\n"
    assert (tmp_path / "out.jsonl").read_text() == "{}\n"


def test_nor_is_one_in_the_place_of_a_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch here
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "out.sbatch").symlink_to(tmp_path / "elsewhere")
    done = CliRunner().invoke(main, ["submit", "--", "run", "p.jsonl", "-o", "out", "--engine", "echo"])
    assert "was not submitted" in done.output
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "out.sbatch").read_text().startswith("#!/bin/bash")


def test_scratch_files_cannot_be_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a known name, a link is not followed."""
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    monkeypatch.setattr(os, "urandom", lambda count: b"\0" * count)
    monkeypatch.setattr("socket.gethostname", lambda: "h")
    (tmp_path / f".x.json.h.{os.getpid()}.00000000").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "x.json", b"new")
    assert precious.read_text() == "precious\n"


# --- the code itself ---


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Every call in the package, with the last part of what is called."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                yield path, node, name


def keyword(node: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(one.value) for one in node.keywords if one.arg == name), None)


def test_nothing_is_unpickled_evaluated_or_handed_to_a_shell() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "marshal", "shelve", "dill", "joblib"}, (
                    path
                )
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert [alias.name for alias in node.names] == ["UnpicklingError"], path
    for path, node, name in calls():
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        if isinstance(node.func, ast.Name):
            assert name not in ("eval", "exec"), where
        assert name not in ("system", "popen", "getoutput"), where
        assert not keyword(node, "shell") if name in ("run", "Popen", "call", "check_output") else True, where


def test_every_reader_of_a_models_folder_says_that_its_code_is_not_run() -> None:
    found = 0
    for path, node, name in calls():
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        if ast.unparse(node.func) == "torch.load":
            assert keyword(node, "weights_only") is True, where
            found += 1
        if name in ("from_pretrained", "from_config"):
            assert keyword(node, "trust_remote_code") is False, where
            found += 1
        if "trust_remote_code" in {one.arg for one in node.keywords}:
            assert keyword(node, "trust_remote_code") is False, where
    assert found >= 5
