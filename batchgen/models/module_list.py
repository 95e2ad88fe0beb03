"""Transformers' list of the modules of its models, made once and not twice.

`import transformers` reads its 1,600 files of models to see what they define, and `import transformers.models` reads
all of them again, since what is kept between the two holds only 128 folders: an eighth of the time of all imports.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import import_utils

_FOLDER = Path(transformers.__file__).parent / "models"


def import_auto_classes() -> Any:
    """Imports `transformers.models.auto.modeling_auto`, and hands the list that is there over to its package."""
    utils: Any = import_utils
    read = utils.define_import_structure

    def find(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path) == str(_FOLDER / "__init__.py") and not arguments and not named:
            with suppress(Exception):  # a later Transformers may keep it in another way
                return find_modules()
        return read(path, *arguments, **named)

    if "transformers.models" not in sys.modules:
        utils.define_import_structure = find
    try:
        return importlib.import_module("transformers.models.auto.modeling_auto")
    finally:
        utils.define_import_structure = read


def find_modules() -> dict[Any, dict[str, Any]]:
    """Returns what `transformers.models` is made of, from the list that `import transformers` has made and kept.

    Returns:
        The names that each module defines, by the module, by the packages that they need.
    """
    kept = import_utils.define_import_structure(_FOLDER, prefix="models")
    own = {
        packages: {
            name.removeprefix("models."): defined for name, defined in modules.items() if name.startswith("models.")
        }
        for packages, modules in kept.items()
    }
    return {packages: modules for packages, modules in own.items() if modules}
