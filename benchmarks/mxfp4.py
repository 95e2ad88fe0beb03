"""A checkpoint in the form of gpt-oss: experts in MXFP4, random bytes; `python benchmarks/mxfp4.py SHAPE FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from batchgen.models import shapes
from batchgen.models.definition.build import build_empty

GROUP = 32  # numbers that have a scale together
FILE_BYTES = 4 << 30


def write(shape: str, folder: Path) -> None:
    """Writes it into the new folder, on the GPU if there is one; scales give numbers the spread of a new model's."""
    config = shapes.config_of(shape)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    config.dtype = torch.bfloat16
    empty = build_empty(config, torch.bfloat16)
    tied = "lm_head.weight" if config.tie_word_embeddings else ""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes._write_tokenizer(folder, config.vocab_size)
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router"]}
    (folder / "config.json").write_text(json.dumps(written))
    part: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    for name, parameter in empty.named_parameters():
        if name != tied:
            part |= make_tensors(name, parameter.shape)
        if sum(tensor.nbytes for tensor in part.values()) > FILE_BYTES:
            write_part(folder, part, places)
            part = {}
    write_part(folder, part, places)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_tensors(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
    """What the files have of a parameter: of experts, [experts, in, out], bytes and exponents."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 3:
        experts, inner, outer = shape
        blocks = torch.randint(0, 256, (experts, outer, inner // GROUP, GROUP // 2), dtype=torch.uint8, device=device)
        # Numbers of about 3 times 2^-7: 0.02, as Transformers makes them.
        exponents = torch.randint(119, 121, (experts, outer, inner // GROUP), dtype=torch.uint8, device=device)
        return {f"{name}_blocks": blocks.cpu(), f"{name}_scales": exponents.cpu()}
    if len(shape) == 1:
        return {name: torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)}
    made = torch.randn(shape, dtype=torch.float32, device=device).mul_(0.02).bfloat16().cpu()
    return {name: made}


def write_part(folder: Path, part: dict[str, torch.Tensor], places: dict[str, str]) -> None:
    file = f"part-{len(set(places.values()))}.safetensors"
    save_file(part, folder / file, {"format": "pt"})
    places |= dict.fromkeys(part, file)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
