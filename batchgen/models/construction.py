"""The moment at which Transformers has made a model's modules, and only reads weights into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import modeling_utils


@contextmanager
def tell_when_made(callback: Callable[[], None]) -> Iterator[None]:
    """Meanwhile, calls `callback` each time that `from_pretrained` has made the modules of a model.

    From then on that call changes nothing that belongs to the whole process: while it makes modules, torch's default
    dtype is the model's, and functions of torch and Transformers are others (`PreTrainedModel.get_init_context`).
    """
    transformers_loader: Any = modeling_utils
    original = transformers_loader.get_model_conversion_mapping

    def tell(model: Any, *arguments: Any, **named: Any) -> Any:
        conversions = original(model, *arguments, **named)
        callback()
        return conversions

    # Warning: a function of Transformers is replaced while a model is loaded, as `lora.merged_on_load` does it. It is
    # given the model, so that this one has been made. A version that asks for the conversions by another name never
    # calls back.
    transformers_loader.get_model_conversion_mapping = tell
    try:
        yield
    finally:
        transformers_loader.get_model_conversion_mapping = original
