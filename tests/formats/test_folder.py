"""Folders saved by datasets, and folders that are something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from batchgen.formats import InputError
from batchgen.formats.input import Input


def opened(path: Path) -> Input:
    return Input.open([str(path)], path.parent / "cache", scan=True)


def test_rows_chosen_and_shuffled_before_saving(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"n": list(range(100))}).shuffle(seed=1).select(range(30))
    dataset.save_to_disk(str(tmp_path / "set"), num_shards=4)
    source = opened(tmp_path / "set")
    assert [row.value for row in source.rows(range(30))] == list(dataset)
    assert {row.source for row in source.rows(range(30))} == {"set"}


def test_more_shards_than_sort_by_name(tmp_path: Path) -> None:
    Dataset.from_dict({"n": list(range(24))}).save_to_disk(str(tmp_path / "set"), num_shards=12)
    assert [row.value for row in opened(tmp_path / "set").rows(range(24))] == [{"n": n} for n in range(24)]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    split = Dataset.from_dict({"n": [1]})
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(InputError, match=r"holds several splits\. Name one of them instead: .*set/train, .*set/test"):
        opened(tmp_path / "set")
    assert len(opened(tmp_path / "set" / "train")) == 1


def test_any_other_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match="is a folder, but not one that datasets saved"):
        opened(tmp_path / "set")


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("{", "state.json is damaged"),
        ("[]", "state.json is damaged: it holds no object"),
        ("{}", "does not name the files"),
        ('{"_data_files": []}', "is a dataset without files"),
        ('{"_data_files": [{"filename": "none.arrow"}]}', "none.arrow: No such file"),
        ('{"_data_files": [], "_indices_data_files": [{}]}', "saved by an old version of datasets"),
    ],
)
def test_a_damaged_folder(state: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(InputError, match=sentence):
        opened(tmp_path / "set")


def test_files_of_two_datasets_in_one_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Dataset.from_dict({name: [1]}).save_to_disk(str(tmp_path / name))
    (other,) = (tmp_path / "b").glob("*.arrow")
    other.rename(tmp_path / "a" / "other.arrow")
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    state["_data_files"].append({"filename": "other.arrow"})
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"other\.arrow has other columns than data-00000-of-00001\.arrow"):
        opened(tmp_path / "a")
