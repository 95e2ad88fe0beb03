"""vLLM's `--quantization`: a checkpoint's own format, or what `--dtype` calls a rounding of its weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from batchgen.commands import CommandError, fail

# vLLM's words for the format of a checkpoint, kernels of its own among them; by quant_method of the config.
_FORMATS = {
    **dict.fromkeys(("awq", "awq_marlin", "auto_awq", "awq_triton"), "awq"),
    **dict.fromkeys(("gptq", "gptq_marlin", "auto_gptq", "gptq_bitblas"), "gptq"),
    **dict.fromkeys(("mxfp4", "gpt_oss_mxfp4"), "mxfp4"),
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
}
_ROUNDED = {"fp8": "fp8", "ptpc_fp8": "fp8", "fp8_per_channel": "fp8"}
_NOTHING = ("", "none", "null")

quantization_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "-q",
    "--quantization",
    metavar="METHOD",
    help="vLLM's name for --dtype fp8; awq, gptq, compressed-tensors or mxfp4 if the model's files are of that format.",
)


def choose_dtype(quantization: str | None, dtype: str, model: str | None) -> str:
    """Returns the `--dtype` that means the same as vLLM's `--quantization` beside its `--dtype`.

    Args:
        model: as `--model` names it; None: the default one.

    Raises:
        CommandError: the model's files are of another format, or there is no such rounding here.
    """
    method = (quantization or "").lower()
    if method in _NOTHING:
        return dtype
    if method not in _FORMATS and method not in _ROUNDED:
        raise CommandError(
            f"--quantization {quantization} is not known here: --dtype fp8, int8 or int4 round the weights of a model, "
            "and files that are quantised already are recognised by themselves"
        )
    own = _find_method(model)
    if own:
        if own != _FORMATS.get(method):
            raise CommandError(
                f"--quantization {quantization}: the model's files are of format {own} (quantization_config in its "
                "config.json), which is recognised by itself; leave the flag out"
            )
        return dtype
    if method not in _ROUNDED:
        raise CommandError(
            f"--quantization {quantization}: the model's files are not quantised. Give a model of that format, or "
            "--dtype int4, int8 or fp8, which round its weights"
        )
    return _ROUNDED[method]


def _find_method(model: str | None) -> str:
    """Returns the `quant_method` in the config of a model; "": it has none."""
    from batchgen import models
    from batchgen.models.definition.files import find_packing, read_json
    from batchgen.types import UserError

    try:
        found = models.resolve(model or models.DEFAULT, models.cache_folder(os.environ), lambda sentence: None)
        config = read_json(found.folder / "config.json") or {}
    except UserError as error:
        raise fail(error) from error
    settings = find_packing(config)
    return str(settings.get("quant_method", "")) if isinstance(settings, dict) else ""
