"""The engines: each module or package here is one, and its name is what `--engine` takes.

An engine is a concrete class that derives from `batchgen.engine.Engine`: the only one in `NAME.py`, or in
`NAME/engine.py`. The settings that `--set NAME=VALUE` takes are the fields of its `Options`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Sequence
from typing import Any

from batchgen.engine import Engine, EngineError
from batchgen.packages import without_garbage_collection


def names() -> list[str]:
    """Every engine there is, as `--engine` takes it. Reads file names only."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def find(name: str) -> type[Engine]:
    """The engine class called `name`.

    Raises:
        EngineError: there is none; the message lists those there are.
    """
    if name not in names():
        raise EngineError(f"there is no engine {name!r}. Engines: {', '.join(names())}")
    with without_garbage_collection():
        module = importlib.import_module(f"batchgen.engines.{name.replace('-', '_')}")
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{module.__name__}.engine")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Engine) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one engine"
    return found[0]


def name_of(engine: type[Engine]) -> str:
    """What `--engine` calls it; of a class that is defined elsewhere, its own name."""
    package, _, rest = engine.__module__.partition(".engines.")
    return rest.partition(".")[0].replace("_", "-") if package == "batchgen" and rest else engine.__name__


def check_dtype(engine: type[Engine], dtype: str) -> None:
    """Checks that the engine computes in `dtype`, as `--dtype` takes it, from what its class says: no weight is read.

    Raises:
        EngineError: it does not; the message lists the types that it takes.
    """
    if dtype not in engine.dtypes:
        raise EngineError(
            f"engine {name_of(engine)} has no dtype {dtype}. Its dtypes: {', '.join(engine.dtypes)}. Choose one of "
            "them, or another engine"
        )


def parse_options(engine: type[Engine], settings: Sequence[str]) -> Any:
    """The engine's `Options` from `name=value` settings, each typed by its annotation.

    Raises:
        EngineError: an unknown name (the message lists the known ones), or a value of the wrong type.
    """
    kinds = typing.get_type_hints(engine.Options)
    values: dict[str, object] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise EngineError(f"--set takes name=value, not {setting!r}")
        if name not in kinds:
            known = ", ".join(kinds) or "none"
            raise EngineError(f"engine {name_of(engine)} has no setting {name!r}. Its settings: {known}")
        values[name] = _typed(name, text, kinds[name])
    return engine.Options(**values)


def _typed(name: str, text: str, kind: Any) -> object:
    kinds = typing.get_args(kind) or (kind,)
    if type(None) in kinds and text.lower() in ("", "none"):
        return None
    if typing.get_origin(kind) is typing.Literal:
        if text not in kinds:
            raise EngineError(f"--set {name}={text}: must be one of {', '.join(map(str, kinds))}")
        return text
    if bool in kinds:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise EngineError(f"--set {name}={text}: must be true or false")
        return text.lower() in ("true", "1", "yes", "on")
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    raise EngineError(f"--set {name}={text}: must be {' or '.join(k.__name__ for k in kinds if k is not type(None))}")


def list_settings(engine: type[Engine]) -> list[str]:
    """The names of the engine's settings."""
    return [option.name for option in dataclasses.fields(engine.Options)]


def settings_of(options: Any) -> dict[str, object]:
    """The values of an `Options`, to be recorded."""
    return dataclasses.asdict(options)
