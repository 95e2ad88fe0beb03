"""`--engine auto`: on machines that are described, not here; and on this one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from batchgen import engines
from batchgen.checkpoint import read_json
from batchgen.engine import EngineError, Tokenizer
from batchgen.models import shapes, split_folder
from batchgen.planning import auto
from batchgen.planning.auto import Choice
from batchgen.planning.hardware import CARDS, Machine, Nodes, recognise_card
from batchgen.planning.work import Work
from tests.commands.starts import call

HOST = 200 * 10**9
CPU = Machine(CARDS["V100"], 0, HOST)


def of(card: str, gpus: int) -> Machine:
    return Machine(CARDS[card], gpus, HOST)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shapes")
    return {name: shapes.make(name, torch.bfloat16, root / name) for name in ("bloom-7b1", "llama-70b")}


def chosen(
    model: Path,
    machine: Machine,
    ranks: int = 1,
    settings: Sequence[str] = (),
    dtype: str = "auto",
    lengths: Sequence[tuple[int, int]] = ((8, 100),) * 64,
    hosts: int = 1,
) -> Choice:
    def drawn(tokenizer: Tokenizer) -> Work:
        assert tokenizer.tokenize(["w5 w6"], special=True)
        return Work(lengths, 1000)

    return auto.choose_fastest(model, dtype, settings, drawn, Nodes(machine, ranks, hosts))


def test_what_fits_and_is_the_fastest_is_chosen(folders: dict[str, Path]) -> None:
    small, large = folders["bloom-7b1"], folders["llama-70b"]
    alone = chosen(small, of("H100", 1))
    assert alone.name not in ("echo", "ds-zero")
    assert "tokens/s are forecast; " in alone.why
    # 141 GB: shared by all eight, on each of which a group of two has more room and of eight waits less.
    shared = chosen(large, of("H100", 8), ranks=8)
    assert shared.name == "paged"
    assert shared.options.tp > 1
    assert "accelerate does not fit: 141.1 GB of weights are more than the 84.0 GB of a GPU" in shared.why
    assert str(shared) == f"paged --set tp={shared.options.tp}"
    # One that fits is held whole by each where rows are many: ranks of a group wait for each other.
    assert str(chosen(small, of("H100", 2), ranks=2)) == "paged"
    # One rank that sees eight spreads it.
    assert chosen(large, of("H100", 8)).name == "accelerate"
    # One GPU: only ZeRO's weights in the host's memory are left.
    waiting = chosen(large, of("H100", 1))
    assert (waiting.name, waiting.options.offload) == ("ds-zero", "cpu")


def test_the_same_is_chosen_again_from_what_was_recorded(folders: dict[str, Path]) -> None:
    first = chosen(folders["llama-70b"], of("H100", 8), ranks=8)
    provenance = {"engine": first.name, "settings": engines.settings_of(first.options), "engine_reason": first.why}
    assert auto.read_recorded_choice(json.loads(json.dumps(provenance))) == first


def test_groups_stay_in_a_host(folders: dict[str, Path]) -> None:
    found = chosen(folders["llama-70b"], of("A100-40", 2), ranks=8, hosts=4)
    assert found.name == "ds-zero", "two of these have no room for half of the weights each, and four are in two hosts"
    assert "over the network between hosts" in found.why


def test_settings_leave_the_engines_that_know_them(folders: dict[str, Path]) -> None:
    model = folders["bloom-7b1"]
    assert chosen(model, CPU).name in [name for name in engines.names() if engines.find(name).serves_cpu]
    two = chosen(model, CPU, ranks=2, settings=["tp=2"])
    assert (two.name, two.options.tp) == ("paged", 2)
    two = chosen(model, of("H100", 4), ranks=4, settings=["tp=2"])
    assert (two.name, two.options.tp) == ("paged", 2)
    assert " of paged" not in two.why, "other groups were not asked for"
    assert " of ds-inference tp=2; the model has 7.1 B parameters; " in two.why
    whole = chosen(model, of("H100", 2), ranks=2, settings=["tp=1"])
    assert (whole.name, whole.options.tp) == ("paged", 1), "a group of one is a rank with a whole model"
    waits = chosen(model, of("H100", 2), ranks=2, settings=["offload=cpu"])
    assert (waits.name, waits.options.offload) == ("ds-zero", "cpu")
    assert chosen(model, of("H100", 1), settings=["offload=nvme=/scratch"]).options.offload == "nvme=/scratch"
    assert chosen(model, of("H100", 1), settings=["attn_implementation=eager"]).options.attn_implementation == "eager"
    assert chosen(model, of("H100", 1), dtype="nf4").name == "accelerate"
    assert {chosen(model, of("H100", 1), dtype=dtype).name for dtype in ("fp8", "int8", "int4")} == {"paged"}
    rounded = chosen(model, of("H100", 1), settings=["kv_dtype=fp8"])
    assert (rounded.name, rounded.options.kv_dtype) == ("paged", "fp8")
    assert "no setting kv_dtype: accelerate, ds-inference, ds-zero" in rounded.why
    with pytest.raises(EngineError, match="no setting speed: accelerate, ds-inference, ds-zero"):
        chosen(model, CPU, settings=["speed=3"])
    with pytest.raises(EngineError, match=r"no setting tp: accelerate, .* no dtype nf4: ds-inference"):
        chosen(model, CPU, settings=["tp=2"], dtype="nf4")


def test_settings_that_leave_one_engine_leave_its_groups_to_be_chosen(folders: dict[str, Path]) -> None:
    def find(*settings: str, dtype: str = "auto", card: str = "H100", ranks: int = 8) -> Choice:
        return chosen(folders["llama-70b"], of(card, ranks), ranks, settings, dtype, lengths=[(1000, 1000)])

    usual, rounded = find("kv_dtype=auto"), find("kv_dtype=fp8")
    assert "paged does not fit: 141.1 GB of weights" in rounded.why, "the usual tp"
    assert usual.options.tp == rounded.options.tp == 4
    slower, faster = (int(one.why.partition(" tokens/s")[0].replace(",", "")) for one in (usual, rounded))
    assert faster > 1.1 * slower, "twice the rows"
    assert "165,120 bytes of KV cache for a token" in rounded.why
    assert "(not asked: no setting kv_dtype: accelerate, ds-inference, ds-zero)" in rounded.why
    assert "paged does not fit" not in find(dtype="int4", card="A100-40", ranks=4).why
    narrow = find("group_size=32", dtype="int4", card="A100-40", ranks=4)
    assert "paged does not fit: 44.8 GB of weights" in narrow.why, "smaller groups have more scales"
    assert find("kv_dtype=fp8", "tp=8").why.startswith("the only one left (no setting kv_dtype")


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "paged"), ("int8", "ds-inference")])
def test_files_that_are_split_by_rank_are_read_by_groups_of_as_many(dtype: str, name: str, tmp_path: Path) -> None:
    folder = shapes.make("bloom-7b1", torch.bfloat16, tmp_path / "model")
    split = split_folder.Split(2, dtype, "bfloat16", "m", "", [[], []], "0.19.8")
    (folder / split_folder.NAME).write_bytes(split_folder.to_json(split))
    found = chosen(folder, of("H100", 4), ranks=4, dtype="int8" if dtype == "int8" else "auto")
    assert (found.name, found.options.tp) == (name, 2)
    assert "no use for files that are split by rank: accelerate, ds-zero" in found.why


@pytest.mark.parametrize(("ranks", "tp"), [(8, 3), (16, 16)])
def test_groups_that_cannot_be_are_not_forecast(ranks: int, tp: int, folders: dict[str, Path]) -> None:
    found = chosen(folders["llama-70b"], of("H100", ranks), ranks=ranks, settings=[f"tp={tp}"])
    assert found.options.tp == tp, "its start says what can be"
    assert found.why.startswith("no engine can be forecast with these settings")


def test_engines_for_gpus_are_asked_where_those_for_cpus_do_not_know_the_model(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(n_embd=64, n_inner=96, n_layer=2, n_head=4, rotary_dim=8)
    config.save_pretrained(tmp_path)
    folder = shapes.make(str(tmp_path / "config.json"), torch.float32, tmp_path / "model")
    found = chosen(folder, CPU, ranks=2, settings=["tp=2"])
    assert (found.name, found.options.tp) == ("ds-inference", 2)
    whole = chosen(folder, CPU)
    assert whole.name == "accelerate"
    assert "; no forecast for paged: --engine paged says why; the model has " in whole.why


def test_nothing_fits_is_said_of_each_engine_with_what_to_do(folders: dict[str, Path]) -> None:
    poor = Machine(CARDS["A100-40"], 4, 10**9)
    with pytest.raises(EngineError) as caught:
        chosen(folders["llama-70b"], Machine(CARDS["V100"], 1, 10**9))
    said = str(caught.value)
    assert "accelerate: 141.1 GB of weights are more than the" in said
    assert "ds-zero offload=cpu: 141.1 GB of weights are more than the host's memory" in said
    assert "--offload nvme=FOLDER" in said
    assert "echo" not in said
    with pytest.raises(EngineError, match=r"With --gpus 4, paged tp=4 has"):
        chosen(folders["llama-70b"], poor, ranks=3)


def test_a_row_that_does_not_fit_refuses_no_others(folders: dict[str, Path]) -> None:
    found = chosen(folders["bloom-7b1"], of("V100", 1), lengths=[(8, 100), (300_000, 8)])
    assert "though the longest rows do not fit" in found.why


@pytest.mark.parametrize(
    ("device", "size", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85_017_493_504, "H100"),
        ("NVIDIA A100-SXM4-80GB", 85_000_000_000, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 42_000_000_000, "A100-40"),
        ("Tesla V100-SXM2-16GB", 17_000_000_000, "V100"),
        ("NVIDIA RTX A6000", 51_000_000_000, "A6000"),
        ("NVIDIA GH200 480GB", 141_000_000_000, "H200"),  # not known: by its memory
    ],
)
def test_a_card_is_known_by_torchs_name(device: str, size: int, name: str) -> None:
    found = recognise_card(device, size)
    assert found.memory == size
    assert (found.bandwidth, found.operations) == (CARDS[name].bandwidth, CARDS[name].operations)


def test_a_card_that_is_not_known_counts_as_not_measured() -> None:
    assert recognise_card("NVIDIA H100 80GB HBM3", 85_000_000_000).measured
    assert not recognise_card("NVIDIA B17 80GB", 85_000_000_000).measured


@pytest.mark.slow
def test_a_run_records_what_was_chosen_and_its_ranks_read_it(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n' * 6)
    words = ["run", "p.jsonl", "-o", "out", "--model", str(tiny_llama), "--max-new-tokens", "3", "--ranks", "2"]
    dry = call(tmp_path, *words, "--dry-run")
    assert dry.code == 0, dry.err
    assert "\nbecause:  " in dry.out
    done = call(tmp_path, *words)
    assert done.code == 0, done.err
    attempt = read_json(tmp_path / "out" / "attempts" / "00001.json")
    assert engines.find(attempt["engine"]).serves_cpu
    assert attempt["engine_reason"]
    assert f"engine {attempt['engine']}: " in done.err
    assert done.err.count("batchgen: engine ") == 1, "the ranks do not choose again"
    timing = [json.loads(line) for line in (tmp_path / "out" / "timing.jsonl").read_text().splitlines()]
    assert {line["rank"] for line in timing} == {0, 1}


def test_engines_for_gpus_that_settings_ask_for_are_compared_without_one(tiny_llama: Path) -> None:
    here = Machine.here(2)
    if here.gpus:
        pytest.skip("there is a GPU here")
    device = here.device(torch.float32)
    assert not device.gpu
    assert device.memory == here.host_memory // 2
    found = chosen(tiny_llama, here, ranks=2, settings=["timeout_seconds=5", "attn_implementation=eager"])
    assert found.name in ("ds-inference", "ds-zero")
    assert found.options.timeout_seconds == 5
    assert "tokens/s are forecast; " in found.why
