"""The limits of steps and sequences, from the settings, the model, and the memory that there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from batchgen.engine import Peers, Setup
from batchgen.engines.paged import sizing
from batchgen.engines.paged.models import longrope
from batchgen.engines.paged.step import StepLimits
from batchgen.models import footprint
from batchgen.models.footprint import CacheFormat
from batchgen.models.tokenizer import HfTokenizer


class Room(NamedTuple):
    """What a rank has for the model, and beside it."""

    parameters: int  # that the rank holds
    kept: CacheFormat
    free: int  # bytes beside the weights
    device: torch.device


def choose_limits(setup: Setup, options: Any, tokenizer: HfTokenizer, room: Room, peers: Peers) -> StepLimits:
    """Returns the limits; ranks that hold the model together call this together.

    Args:
        options: the engine's.
    """
    token_bytes = footprint.cache_bytes_per_token(tokenizer.config, room.kept) // peers.count
    slots = peers.least(setup.batch_size or sizing.choose_slots(room.free, token_bytes, room.device))
    parameters = peers.least(room.parameters)
    text = tokenizer.config.get_text_config()
    return StepLimits(
        slots,
        sizing.choose_sequence_tokens(tokenizer, options.cache_tokens),
        options.step_tokens or sizing.choose_step_tokens(parameters),
        original_context=longrope.find_original_context(text),
        adapters=tuple(setup.adapters),
        restretched_at=longrope.find_restretched_at(text),
        kv_dtype=options.kv_dtype,
    )
