"""Forecasts: beside what was measured on a GPU, and beside the article's own table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from batchgen import engines
from batchgen.bench import workloads
from batchgen.bench.results import Folder
from batchgen.commands import main
from batchgen.engine import Placement
from batchgen.models import shapes
from batchgen.models.footprint import Execution
from batchgen.planning import hardware
from batchgen.planning.forecast import Expected, Forecast, Model, Node, Work, forecasts

ROOT = Path(__file__).parents[2]
H100 = ROOT / "benchmarks" / "h100"


def model(shape: str) -> Model:
    return Model.of(shapes.config_of(shape), torch.bfloat16)


def best(found: list[Forecast], engine: str) -> Forecast:
    return next(one for one in found if one.engine == engine)


@pytest.mark.parametrize("shape", ["bloom-560m", "bloom-7b1"])
def test_the_memory_of_a_batch_is_within_five_percent_of_what_was_measured(shape: str) -> None:
    sized = model(shape)
    checked = 0
    for result in Folder(H100 / shape).results():
        if ":" in result.system or result.batch is None or result.device_bytes is None:
            continue
        prompt = 8  # words of the seed's longest sentence
        predicted = sized.weights.read_bytes + result.batch * sized.row_bytes(
            prompt, 100, Execution(2, eager=sized.eager)
        )
        assert predicted == pytest.approx(result.device_bytes, rel=0.05), result
        checked += 1
    assert checked >= 10


def test_the_time_of_a_decode_step_is_within_a_quarter_of_what_was_measured() -> None:
    off = {}
    for folder in ("h100/bloom-560m", *(f"{host}/bloom-7b1" for host in ("h100", "h100x2", "h200x2", "h200x2b"))):
        place, _, shape = folder.partition("/")
        sized, card = model(shape), hardware.CARDS[place[:4].upper()]
        for result in Folder(ROOT / "benchmarks" / folder).results():
            name, _, setting = result.system.partition(":")
            # One rank of ds-zero has gone without DeepSpeed's hooks since the tables of one H100.
            if (name, place) == ("ds-zero", "h100") or setting.startswith("dtype="):
                continue
            if result.batch is None or result.outcome != "ok":
                continue
            kind, node = engines.find(name), Node(card, result.ranks)
            placements = kind.placements(sized.config, sized.weights, result.ranks)
            placement = next(one for one in placements if not setting or setting in one.settings)
            step, _ = Expected(kind.pace, placement, sized, node, {}).step(result.batch, 8 + 100 / 2)
            off[folder, result.system, result.batch] = step / result.step_seconds - 1
    assert len(off) >= 56
    # Python's part differs that much between hosts, and from one minute to the next: with tp=2 one row took 47 ms, and
    # 128 rows 38. And 1,024 rows of BLOOM take as long on an H200 as on an H100, whatever its memory.
    missed = {cell: share for cell, share in off.items() if abs(share) > 0.25}
    assert set(missed) <= {
        ("h100/bloom-560m", "ds-inference", 8),
        ("h100/bloom-560m", "ds-inference", 128),
        ("h100x2/bloom-7b1", "ds-zero", 32),
        ("h200x2/bloom-7b1", "ds-inference", 1024),
        ("h200x2/bloom-7b1", "ds-zero", 32),
        ("h200x2/bloom-7b1", "ds-zero", 1024),
        ("h200x2b/bloom-7b1", "ds-zero", 1024),
        ("h200x2b/bloom-7b1", "ds-zero", 2048),
        ("h200x2/bloom-7b1", "ds-inference:tp=2", 32),
        ("h200x2/bloom-7b1", "ds-inference:tp=2", 128),
    }, missed
    assert all(abs(share) <= 0.35 for share in missed.values()), missed


# Of `paged`, groups and whole models.
_PAGED = [
    *((f"h200x2b/{shape}{kind}", shape) for shape in ("llama-8b", "bloom-7b1") for kind in ("", "-jobs")),
    *((f"h200x{gpus}/{shape}-jobs", shape) for shape in ("llama-8b", "bloom-7b1") for gpus in (2, 4)),
    ("h200x4/llama-70b", "llama-70b"),
]


@pytest.mark.parametrize(("folder", "shape"), _PAGED)
def test_steps_and_jobs_of_paged_are_within_a_quarter_of_what_was_measured(folder: str, shape: str) -> None:
    sized, checked = model(shape), 0
    for result in Folder(ROOT / "benchmarks" / folder).results():
        name, _, setting = result.system.partition(":")
        if name != "paged":
            continue
        kind, node = engines.find(name), Node(hardware.CARDS["H200"], result.ranks)
        placements = kind.placements(sized.config, sized.weights, result.ranks)
        placement = next(one for one in placements if setting == ":".join(one.settings))
        expected = Expected(kind.pace, placement, sized, node, {})
        if result.batch is not None:
            step, _ = expected.step(result.batch, 8 + 100 / 2)
            assert step == pytest.approx(result.step_seconds, rel=0.25), result
        else:
            rows = workloads.mixed(result.rows, 32_000, (32, 512), (16, 512))  # as `bench` draws them
            work = Work([(len(one.tokens), one.params.max_new_tokens) for one in rows], len(rows))
            assert expected.forecast(name, work).seconds == pytest.approx(result.median, rel=0.15), result
        checked += 1
    assert checked


@pytest.mark.parametrize("shape", ["bloom-560m", "bloom-7b1"])
def test_the_time_of_a_job_of_unequal_lengths_is_within_a_quarter_of_what_was_measured(shape: str) -> None:
    jobs = [one for one in Folder(H100 / shape).results() if one.job.startswith("mixed, 256 rows, ")]
    assert jobs
    rows = workloads.mixed(256, 250_880, (32, 512), (16, 512))  # as `bench` draws them
    work = Work([(len(one.tokens), one.params.max_new_tokens) for one in rows], 256)
    found = forecasts(model(shape), work, Node(hardware.CARDS["H100"], 1), {})
    for result in jobs:
        expected = next(one for one in found if [one.engine, *one.placement.settings][0] == result.system)
        assert expected.seconds == pytest.approx(result.median, rel=0.25), result.system


@pytest.mark.parametrize("name", ["accelerate", "ds-inference", "ds-zero"])
def test_the_largest_batch_is_within_a_tenth_of_what_fits(name: str) -> None:
    found = forecasts(model("bloom-7b1"), Work([(8, 100)], 1), Node(hardware.CARDS["H100"], 1), {})
    results = [one for one in Folder(H100 / "bloom-7b1").results() if one.system == name and one.batch]
    most = max(one.batch for one in results if one.outcome == "ok" and one.batch)
    too_many = min(one.batch for one in results if one.outcome == "oom" and one.batch)
    # What fits lies between; the forecast is within a tenth of either end.
    assert most < too_many
    assert best(found, name).batch == pytest.approx(most, rel=0.1)
    assert best(found, name).batch == pytest.approx(too_many, rel=0.1)


def test_a_sample_stands_for_full_batches() -> None:
    node = Node(hardware.CARDS["H100"], 1)
    sized = model("bloom-560m")
    whole = [(8, 10 + number % 100) for number in range(20_000)]
    drawn = best(forecasts(sized, Work(whole[:400], 20_000), node, {}), "accelerate")
    known = best(forecasts(sized, Work(whole, 20_000), node, {}), "accelerate")
    assert drawn.seconds == pytest.approx(known.seconds, rel=0.1)
    two = forecasts(sized, Work(whole, 20_000), Node(hardware.CARDS["H100"], 2), {})
    assert best(two, "accelerate").seconds == pytest.approx(known.seconds / 2, rel=0.1)


def test_rows_that_come_and_go_are_faster_than_batches() -> None:
    sized = model("bloom-7b1")
    work = Work([(100, 512 if number % 8 == 0 else 32) for number in range(2048)], 2048)
    kind = engines.find("accelerate")
    (placement,) = kind.placements(sized.config, sized.weights, 1)
    seconds = {}
    for continuous in (False, True):
        pace = dataclasses.replace(kind.pace, continuous=continuous)
        expected = Expected(pace, placement, sized, Node(hardware.CARDS["H100"], 1), {})
        forecast = expected.forecast("accelerate", work)
        seconds[continuous] = forecast.seconds
        assert forecast.tokens_per_second == pytest.approx(sum(new for _, new in work.lengths) / forecast.seconds)
    assert seconds[True] < seconds[False]
    # All of these fit at once: the longest row's steps are left, with fewer and fewer rows beside it.
    few = Work([(100, 10)] * 31 + [(100, 500)], 32)
    spent = expected.forecast("accelerate", few).seconds
    assert 500 * expected.step(1, 100)[0] < spent < 500 * expected.step(8, 600)[0]


def test_a_bench_of_the_model_comes_before_the_formulas() -> None:
    work = Work([(8, 100)] * 512, 5120)
    node = Node(hardware.CARDS["H100"], 1)
    found = forecasts(model("bloom-7b1"), work, node, {"accelerate": {128: 0.02, 512: 0.08}})
    measured = best(found, "accelerate")
    assert measured.measured
    # 100 steps of 0.08 s for 512 rows, as many as a run takes, ten times; and the prompts.
    assert measured.seconds == pytest.approx(10 * 100 * 0.08, rel=0.05)
    assert not best(found, "ds-zero").measured


def test_what_a_rank_on_each_gpu_took_is_not_that_of_one_rank_over_all() -> None:
    measured = {"accelerate": {1: 0.001, 512: 0.001}}
    found = forecasts(model("llama-8b"), Work([(8, 100)], 1), Node(hardware.CARDS["H100"], 2), measured)
    taken = {one.placement.ranks: one.measured for one in found if one.engine == "accelerate" and not one.why_not}
    assert taken == {1: False, 2: True}


def test_what_whole_models_took_is_not_that_of_a_group() -> None:
    work, node = Work([(8, 100)], 1), Node(hardware.CARDS["H100"], 2)
    for system, wanted in (
        ("paged", [("paged", ())]),
        ("paged:tp=2", [("paged", ("tp=2",))]),
        ("ds-inference", [("ds-inference", ("tp=2",))]),  # which shares one among all, if nothing is said
        ("ds-zero", [("ds-zero", ())]),
    ):
        found = forecasts(model("llama-8b"), work, node, {system: {1: 0.001, 512: 0.001}})
        assert [(one.engine, one.placement.settings) for one in found if one.measured] == wanted


def test_the_bench_of_another_model_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n')
    words = ["plan", str(tmp_path / "p.jsonl"), "--bench", str(H100 / "bloom-7b1"), "--model"]
    assert CliRunner().invoke(main, [*words, "bloom-7b1"]).exit_code == 0
    assert "was measured with" not in caplog.text
    assert CliRunner().invoke(main, [*words, "llama-8b"]).exit_code == 0
    assert "was measured with bloom-7b1 in bfloat16, and this forecast is for llama-8b in bfloat16" in caplog.text


# The article's largest batches on eight A100s of 80 GB: what ran must fit.
@pytest.mark.parametrize(
    ("engine", "setting", "ran"), [("accelerate", (), 32), ("ds-inference", ("tp=8",), 128), ("ds-zero", (), 8)]
)
def test_the_articles_batches_fit(engine: str, setting: tuple[str, ...], ran: int) -> None:
    work = Work([(8, 100)] * 64, 64)
    found = forecasts(model("bloom-176b"), work, Node(hardware.CARDS["A100-80"], 8), {})
    fits = [one for one in found if one.engine == engine and one.placement.settings == setting and not one.why_not]
    assert max(one.batch for one in fits) >= ran
    whole = next(one for one in found if one.engine == "accelerate" and one.placement.ranks == 8)
    assert whole.why_not.startswith("352.5 GB of weights are more than the 84.0 GB of a GPU")


def test_weights_that_wait_elsewhere_are_what_a_step_waits_for() -> None:
    sized = model("llama-70b")
    node = Node(hardware.CARDS["H100"], 1, host_memory=100 * 10**9, disk_bandwidth=1e9)
    found = {
        one.placement.settings: one for one in forecasts(sized, Work([(8, 10)], 1), node, {}) if one.engine == "ds-zero"
    }
    assert "more than the" in found[()].why_not
    assert "more than the host's memory" in found["offload=cpu",].why_not
    disk = found["offload=nvme=FOLDER",]
    assert disk.bound == "weights from the disk"
    assert disk.seconds == pytest.approx(10 * sized.weights.read_bytes / 1e9, rel=0.01)


def test_a_step_is_not_shared_over_the_network_between_hosts() -> None:
    node = Node(hardware.CARDS["H100"], 8, hosts=4)
    found = forecasts(model("llama-70b"), Work([(8, 10)], 1), node, {}, ["ds-inference"])
    why = {one.placement.settings: one.why_not for one in found}
    assert why["tp=2",] == ""
    assert "over the network between hosts" in why["tp=8",]
    # As many ranks as a host has must be whole groups, whatever the sum.
    node = Node(hardware.CARDS["H100"], 12, hosts=2)
    found = forecasts(model("llama-70b"), Work([(8, 10)], 1), node, {}, ["paged"])
    fits = {one.placement.settings for one in found if not one.why_not}
    assert fits == {("tp=2",)}


def test_a_row_that_does_not_fit_is_said_with_its_size() -> None:
    found = forecasts(model("bloom-7b1"), Work([(200_000, 8)], 1), Node(hardware.CARDS["V100"], 1), {})
    assert "and a row takes" in best(found, "accelerate").why_not


@pytest.mark.parametrize(
    ("name", "gigabytes", "memory"), [("H100", None, 85e9), (None, 24, 25.5e9), ("A100-80", 40, 42.5e9)]
)
def test_a_card_is_named_or_has_so_much_memory(name: str | None, gigabytes: float | None, memory: float) -> None:
    assert hardware.card_of(name, gigabytes).memory == pytest.approx(memory, rel=0.01)
    with pytest.raises(hardware.CardError, match="the GPU B200 is not known: H100, "):
        hardware.card_of("B200", None)


def test_every_placement_of_every_engine_is_whole() -> None:
    sized = model("llama-8b")
    size = sized.weights.read_bytes
    for name in engines.names():
        for one in engines.find(name).placements(sized.config, sized.weights, 4):
            held: Placement = one
            everywhere = held.device * (held.sharing if held.sharing > 1 else 1)
            assert max(everywhere, held.device * held.ranks, held.host, held.disk) >= size, (name, held)
            assert held.ranks % held.streams == 0


def test_the_command_says_lengths_forecasts_and_a_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p q.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"abc " * number}"}}\n' for number in range(1, 9)))
    done = CliRunner().invoke(
        main, ["plan", str(prompts), "--model", str(tiny_llama), "--gpus", "2", "--max-new-tokens", "10"]
    )
    assert done.exit_code == 0, done.output
    assert "8 rows of " in done.stdout
    assert "up to 10 new ones, on the average (as the model's tokenizer has them)" in done.stdout
    assert (
        f"the fastest that fits: batchgen run '{prompts}' --model {tiny_llama} --dtype bfloat16 --max-new-tokens 10 "
        in done.stdout
    )
    shape = ["plan", str(prompts), "--model", "bloom-176b", "--gpu-memory", "80", "--gpus", "8", "--json"]
    values = json.loads(CliRunner().invoke(main, shape).stdout)
    assert values["rows"] == 8
    assert "estimated at 4 bytes a token" in values["lengths"]
    assert {one["engine"] for one in values["forecasts"]} >= {"accelerate", "ds-inference", "ds-zero"}
    assert values["model"]["parameters"] == values["model"]["active_parameters"] == 176_247_271_424
    nothing = CliRunner().invoke(main, ["plan", str(prompts), "--model", "bloom-176b", "--gpu", "V100"])
    assert "ds-zero offload=nvme=FOLDER" in nothing.stdout
    wrong = CliRunner().invoke(main, ["plan", str(prompts), "--model", "no/such"])
    assert wrong.exit_code == 4
    assert "batchgen pull no/such" in wrong.output
