"""What holds for every engine there is. No weights are loaded."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from pathlib import Path
from typing import Any

import pytest
from click import testing

from batchgen import RunSettings
from batchgen.commands import main
from batchgen.engine import DTYPES, Engine, EngineError, Stream
from batchgen.engines import __path__, _typed, check_dtype, name_of, parse_options, settings_of
from batchgen.engines import find as find_engine
from batchgen.engines import names as engine_names
from batchgen.runs.flow import Host, run
from batchgen.world import World

FOLDER = Path(next(iter(__path__)))
FILES = sorted(
    [path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"]
    + [path.parent.name for path in FOLDER.glob("*/engine.py")]
)


@pytest.fixture(params=[name.replace("_", "-") for name in FILES])
def kind(request: pytest.FixtureRequest) -> type[Engine]:
    return find_engine(request.param)


def test_names_are_the_file_names_with_dashes() -> None:
    assert engine_names() == sorted(name.replace("_", "-") for name in FILES)
    assert {"accelerate", "echo"} <= set(engine_names())


def test_unknown_engine_lists_those_there_are() -> None:
    with pytest.raises(EngineError, match=r"there is no engine 'magic'. Engines: .*accelerate.*echo"):
        find_engine("magic")


@pytest.mark.parametrize(
    ("name", "dtype", "dtypes"),
    [
        ("ds-zero", "nf4", "auto, float32, bfloat16, float16"),
        ("ds-zero", "int8", "auto, float32, bfloat16, float16"),
        ("paged", "nf4", "auto, float32, bfloat16, float16, fp8, int8, int4"),
        ("ds-inference", "nf4", "auto, float32, bfloat16, float16, int8"),
    ],
)
def test_a_dtype_that_an_engine_has_not_is_refused_before_the_model_is_looked_for(
    name: str, dtype: str, dtypes: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt":"one"}\n')
    sentence = f"engine {name} has no dtype {dtype}. Its dtypes: {dtypes}. Choose one of them, or another engine"
    settings = RunSettings(model=str(tmp_path / "no model"), engine=name, dtype=dtype)
    with pytest.raises(EngineError) as raised:
        run(tmp_path / "a.jsonl", tmp_path / "out", settings, host=Host(environment={}))
    assert str(raised.value) == sentence
    assert not (tmp_path / "out").exists()
    for words in (["--dtype", dtype, "--engines", name], ["--engines", f"echo,{name}:dtype={dtype}"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            ended = testing.CliRunner().invoke(main, ["bench", "--random-weights", "llama-8b", *words])
        assert (ended.exit_code, ended.output) == (4, f"Error: {sentence}\n")


def test_every_engine_takes_the_dtypes_that_it_names_and_no_other(kind: type[Engine]) -> None:
    assert set(kind.dtypes) <= set(DTYPES)
    for dtype in kind.dtypes:
        check_dtype(kind, dtype)
    with pytest.raises(EngineError, match="has no dtype float8"):
        check_dtype(kind, "float8")


def test_nothing_is_left_to_implement(kind: type[Engine]) -> None:
    assert not kind.__abstractmethods__
    assert kind.__doc__
    assert importlib.import_module(kind.__module__).__doc__


def test_options_are_a_frozen_dataclass_with_a_default_for_each(kind: type[Engine]) -> None:
    options = parse_options(kind, [])
    assert type(options) is kind.Options
    for setting in dataclasses.fields(options):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, setting.name, None)


def test_defaults_can_be_given_as_text(kind: type[Engine]) -> None:
    defaults = parse_options(kind, [])
    written = [f"{name}={value}" for name, value in settings_of(defaults).items()]
    assert parse_options(kind, written) == defaults


def test_settings_are_of_types_that_can_be_parsed(kind: type[Engine]) -> None:
    texts = {bool: "true", int: "3", float: "2.5", str: "text"}
    for name, annotation in typing.get_type_hints(kind.Options).items():
        if typing.get_origin(annotation) is typing.Literal:
            values = {str(value): value for value in typing.get_args(annotation)}
        else:
            values = {texts[part]: part(texts[part]) for part in parts_of(annotation)}
        for text, value in values.items():
            assert _typed(name, text, annotation) == value


def parts_of(annotation: Any) -> list[Any]:
    return [part for part in typing.get_args(annotation) or (annotation,) if part is not type(None)]


def test_unknown_setting_lists_the_known_ones(kind: type[Engine]) -> None:
    known = ", ".join(setting.name for setting in dataclasses.fields(kind.Options)) or "none"
    with pytest.raises(EngineError) as raised:
        parse_options(kind, ["no_such=1"])
    assert str(raised.value) == f"engine {name_of(kind)} has no setting 'no_such'. Its settings: {known}"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_streams_cover_the_world_and_each_has_one_writer(kind: type[Engine], size: int) -> None:
    options = parse_options(kind, [])
    worlds = [World(rank, rank, size, size) for rank in range(size)]
    streams: list[Stream] = [kind.stream(world, options) for world in worlds]
    [count] = {stream.count for stream in streams}
    assert sorted(stream.index for stream in streams if stream.writes) == list(range(count))
    assert {stream.index for stream in streams} == set(range(count))


@dataclasses.dataclass(frozen=True)
class Settings:
    """One of each kind."""

    flag: bool = False
    count: int = 1
    limit: int | None = 5
    share: float = 0.5
    name: str = "a"
    kind: typing.Literal["left", "right"] = "left"


class Settled(Engine):
    """Only its settings are of interest."""

    Options = Settings  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((f"flag={text}", True) for text in ("true", "1", "yes", "ON")),
        *((f"flag={text}", False) for text in ("false", "0", "no", "off")),
        ("count=7", 7),
        ("limit=none", None),
        ("limit=", None),
        ("limit=9", 9),
        ("share=2", 2.0),
        ("name=b=c", "b=c"),
        ("name=", ""),
        ("kind=right", "right"),
    ],
)
def test_setting_is_typed_by_its_annotation(setting: str, value: object) -> None:
    found = getattr(parse_options(Settled, [setting]), setting.partition("=")[0])
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("flag=maybe", "--set flag=maybe: must be true or false"),
        ("count=1.5", "--set count=1.5: must be int"),
        ("limit=x", "--set limit=x: must be int"),
        ("share=x", "--set share=x: must be float"),
        ("kind=up", "--set kind=up: must be one of left, right"),
        ("count", "--set takes name=value, not 'count'"),
    ],
)
def test_setting_of_the_wrong_type_says_what_it_must_be(setting: str, sentence: str) -> None:
    with pytest.raises(EngineError) as raised:
        parse_options(Settled, [setting])
    assert str(raised.value) == sentence


class Watched(Settled):
    """Says what is asked of it at its end."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def abandon(self) -> None:
        self.said.append("abandon")

    def close(self) -> None:
        self.said.append("close")

    def generate(self, prompts: Any, stop: Any) -> Any:
        raise AssertionError

    @classmethod
    def tokenizer(cls, model: str) -> Any:
        raise AssertionError


def test_what_waits_for_others_is_abandoned_before_an_engine_closes_after_an_exception() -> None:
    with Watched() as engine:
        pass
    assert engine.said == ["close"]
    with pytest.raises(ValueError, match="x"), Watched() as engine:
        raise ValueError("x")
    assert engine.said == ["abandon", "close"]
