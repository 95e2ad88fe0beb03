"""The packages that only some runs need: whether they are there and can be imported, said in a sentence."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from batchgen.types import UserError


class PackageError(UserError):
    """A package is not there, or cannot be imported: a sentence for the person at the terminal."""


def is_installed(name: str) -> bool:
    """Whether the package is there. Does not import it, which may take seconds."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def check_installed(names: Iterable[str], what: str) -> None:
    """Raises PackageError if one of the packages that `what` needs is not there. Imports none."""
    for name in names:
        if not is_installed(name):
            raise PackageError(_sentence(what, name, None))


def check_imports(names: Iterable[str], what: str) -> None:
    """Imports the packages that `what` needs; raises PackageError if one is not there or cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # what fails in the middle of a package can raise anything
            raise PackageError(_sentence(what, name, error)) from error


def explain_import_error(error: ImportError) -> str | None:
    """The sentence about a failed import of another project's package; None: the import is batchgen's own fault."""
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = max((place for place, name in enumerate(frames) if _top(name) == "batchgen"), default=-1)
    others = [_top(name) for name in frames[own + 1 :] if _top(name) != "importlib"]
    name = others[0] if others else _top(error.name or "")
    return _sentence("batchgen", name, error) if name not in ("", "batchgen") else None


def _top(module: str) -> str:
    return module.partition(".")[0]


def _sentence(what: str, name: str, error: Exception | None) -> str:
    if error is None or (isinstance(error, ModuleNotFoundError) and error.name == name):
        return f"{what} needs the package {name}, which is not installed here. Install it: pip install {name}"
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return (
        f"{what} needs the package {name}, which cannot be imported ({type(error).__name__}: {reason}). "
        f"Install it anew: pip install --force-reinstall {name}"
    )


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Inside, Python looks for no garbage: an import makes hundreds of thousands of objects that stay.

    To look through all of them again and again takes a fifth of the time in which torch and Transformers are imported.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def without_old_garbage() -> Iterator[None]:
    """Inside, Python looks for garbage only among objects made inside.

    What the imports of torch and Transformers have made takes a quarter of a second to look through.
    """
    is_outermost = gc.get_freeze_count() == 0
    if is_outermost:
        gc.freeze()
    try:
        yield
    finally:
        if is_outermost:
            gc.unfreeze()
