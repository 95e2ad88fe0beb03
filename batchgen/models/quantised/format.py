"""What each format of quantised checkpoints is to the rest: a finder of the layers that are stored in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn

from batchgen.models.definition.errors import ModelError
from batchgen.models.quantised.stored import StoredTensor, StoredWeight


class Format(ABC):
    """A format, with what a checkpoint's `quantization_config` says of it.

    A layer that is left alone has plain tensors, so that the list of these layers in the config is not needed.
    """

    name: str
    """As `quant_method` has it."""
    ends: tuple[str, ...]
    """How the names of tensors end that belong to a quantised layer."""
    has_weights = True
    """Whether weights are quantised: the settings may be of the cache alone."""

    @abstractmethod
    def find_weights(self, tensors: Mapping[str, StoredTensor]) -> list[StoredWeight]:
        """Returns the quantised weights that `tensors` hold; nothing but their headers has been read.

        Raises:
            ModelError: a tensor of a layer is missing, or has another type or shape than the config says.
        """


def refuse(method: str, detail: str) -> NoReturn:
    """Raises ModelError: a checkpoint of this method has a detail that is not read."""
    raise ModelError(
        f"the weights are quantised by {method} with {detail}, which is not read; take the model in another precision: "
        "fp8, int8, int4 by groups, or bfloat16"
    )


def check_choices(method: str, settings: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    """Checks settings of a `quantization_config`; those that are not there are not looked at.

    Args:
        choices: the values of each setting that are read.

    Raises:
        ModelError: one has another value.
    """
    for name, values in choices.items():
        value = settings.get(name)
        if value is not None and value not in values:
            refuse(method, f"{name} {value!r}")


def take_group_size(method: str, settings: Mapping[str, Any]) -> int:
    """Returns how many columns have a scale together; -1: all of a row.

    Raises:
        ModelError: it is no such number.
    """
    size = settings.get("group_size", 128)
    if type(size) is not int or not (size == -1 or (size > 0 and size % 8 == 0)):
        refuse(method, f"group_size {size!r}")
    return size


def take_block(method: str, settings: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """Returns the rows and columns that have a scale together; None: the setting `name` is not there.

    Raises:
        ModelError: it is no such pair.
    """
    block = settings.get(name)
    if block is None:
        return None
    if not (isinstance(block, (list, tuple)) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        refuse(method, f"{name} {block!r}")
    return block[0], block[1]
