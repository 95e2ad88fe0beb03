"""`--dtype auto`: settled when a run begins, kept by its later starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchgen import RunSettings, device
from batchgen.checkpoint import DifferentRun, read_json
from batchgen.device import MatmulSpeed
from batchgen.engine import EngineError, Setup
from batchgen.engines import find
from batchgen.models import loading
from batchgen.models.split_folder import Split, to_json
from batchgen.runs.flow import Host, run
from batchgen.world import World
from tests import tiny_models as models

SLOW = {
    torch.float32: MatmulSpeed(5e10, 2e10),
    torch.bfloat16: MatmulSpeed(7e9, 1e10),
    torch.float16: MatmulSpeed(6e9, 1e10),
}
FAST = {**SLOW, torch.bfloat16: MatmulSpeed(2e11, 2e10)}

Machine = Callable[[dict[torch.dtype, MatmulSpeed]], None]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what auto is without a GPU")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this one compute at other speeds: those of a processor that is not here."""
    return lambda speeds: monkeypatch.setattr(device, "measure_matmul", speeds.__getitem__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("bf16") / "m", lambda n: models.llama(n).to(torch.bfloat16))


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "ab", "max_new_tokens": 2}\n' * 3)

    def begin(**options: Any) -> Any:
        run(rows, tmp_path / "out", RunSettings(model=str(folder), **options), host=Host(environment={}))
        return json.loads((tmp_path / "out" / "run.json").read_text())["asked"]["dtype"]

    return begin


def reopen(out: Path) -> None:
    """Leaves the run as one that has done nothing yet."""
    for name in ("batches", "generations", "merged"):
        for path in out.glob(f"{name}*"):
            path.unlink()


def dtype_of(out: Path, attempt: int) -> object:
    return read_json(out / "attempts" / f"{attempt:05}.json")["dtype"]


def test_products_are_measured_and_leave_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    for dtype in SLOW:
        found = device.measure_matmul(dtype)
        assert found.operations > 0
        assert found.bandwidth > 0
    assert torch.get_num_threads() == before
    assert device.is_fast_in(torch.float32)


@pytest.mark.parametrize(
    ("own", "speeds", "on_gpu", "expected"),
    [
        (torch.bfloat16, SLOW, False, torch.float32),
        (torch.bfloat16, SLOW, True, torch.bfloat16),
        (torch.bfloat16, FAST, False, torch.bfloat16),
        (torch.float16, FAST, False, torch.float32),
        (torch.float16, FAST, True, torch.float16),
        (torch.float32, FAST, False, torch.float32),
        (None, FAST, False, torch.float32),
        (torch.float64, SLOW, False, torch.float64),
    ],
)
def test_auto_is_the_models_own_dtype_where_the_machine_is_fast_in_it(
    machine: Machine,
    own: torch.dtype | None,
    speeds: dict[torch.dtype, MatmulSpeed],
    on_gpu: bool,
    expected: torch.dtype,
) -> None:
    machine(speeds)
    config = models.llama(1).config
    config.dtype = own
    assert loading.floating_dtype("auto", config, on_gpu=on_gpu) == expected
    for name in loading.FLOATING:
        assert loading.name_of(loading.floating_dtype(name, config, on_gpu=on_gpu)) == name


@pytest.mark.parametrize("name", ["accelerate", "paged"])
@pytest.mark.parametrize(("speeds", "expected"), [(SLOW, torch.float32), (FAST, torch.bfloat16)])
def test_engines_agree_on_what_auto_is(
    machine: Machine, folder: Path, name: str, speeds: dict[torch.dtype, MatmulSpeed], expected: torch.dtype
) -> None:
    machine(speeds)
    kind = find(name)
    with kind(Setup(str(folder), "auto", 4, World()), kind.Options()) as engine:
        model = engine._model if name == "paged" else engine._batches.loaded.model  # type: ignore[attr-defined]
        assert model.dtype == expected


def test_a_run_keeps_the_dtype_it_began_with_on_another_machine(
    machine: Machine, start: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    machine(SLOW)
    with caplog.at_level(logging.INFO):
        assert start(engine="accelerate") == "float32"
    assert "slow in the model's own bfloat16" in caplog.text
    assert dtype_of(out, 1) == "float32"
    machine(FAST)
    for number, options in enumerate(({"dtype": "auto"}, {"dtype": "float32"}, {"engine": "auto"}), 2):
        reopen(out)
        assert start(**{"engine": "accelerate", **options}) == "float32"
        assert dtype_of(out, number) == "float32"
    with pytest.raises(DifferentRun, match=r'dtype was "float32", now "bfloat16"'):
        start(engine="accelerate", dtype="bfloat16")


def test_a_run_goes_on_with_no_engine_that_has_not_its_dtype(start: Callable[..., Any], tmp_path: Path) -> None:
    start(engine="accelerate", dtype="float32")
    reopen(tmp_path / "out")
    manifest = tmp_path / "out" / "run.json"
    manifest.write_text(manifest.read_text().replace('"dtype": "float32"', '"dtype": "nf4"'))
    with pytest.raises(EngineError, match=r"engine ds-zero has no dtype nf4\. Its dtypes: auto, float32"):
        start(engine="ds-zero")


def test_a_run_of_an_older_version_goes_on_in_the_models_own_dtype(
    machine: Machine, start: Callable[..., Any], tmp_path: Path
) -> None:
    machine(FAST)
    out = tmp_path / "out"
    assert start(engine="accelerate") == "bfloat16"
    manifest = json.loads((out / "run.json").read_text())
    manifest["asked"]["dtype"] = "auto"  # as version 0.1 wrote it
    (out / "run.json").write_text(json.dumps(manifest))
    reopen(out)
    machine(SLOW)
    assert start(engine="accelerate") == "auto"
    assert dtype_of(out, 2) == "bfloat16"
    with pytest.raises(DifferentRun, match=r'dtype was "auto", now "float32"'):
        start(engine="accelerate", dtype="float32")


def test_files_that_are_split_keep_their_dtype(machine: Machine, tmp_path: Path) -> None:
    from batchgen.checkpoint import RunFolder
    from batchgen.runs.dtype import find as find_dtype

    machine(SLOW)
    for dtype, expected in (("bfloat16", "bfloat16"), ("int8", "auto")):
        (tmp_path / "split.json").write_bytes(to_json(Split(1, dtype, "bfloat16", "m", "", [[]], "0")))
        assert find_dtype("auto", RunFolder(tmp_path / "none"), tmp_path).name == expected
