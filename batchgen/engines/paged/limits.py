"""The limits of steps and sequences, from the settings, the model, and the memory that there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from batchgen.engine import Peers, Setup
from batchgen.engines.paged import sizing
from batchgen.engines.paged.models import longrope
from batchgen.engines.paged.step import StepLimits
from batchgen.models import footprint
from batchgen.models.tokenizer import HfTokenizer

_LONGEST = 1 << 16  # tokens of a sequence, of a model that sets no limit


class Room(NamedTuple):
    """What a rank has for the model, and beside it."""

    parameters: int  # that the rank holds
    item_bytes: int  # of a number of the model's type
    free: int  # bytes beside the weights
    device: torch.device


def choose_limits(setup: Setup, options: Any, tokenizer: HfTokenizer, room: Room, peers: Peers) -> StepLimits:
    """Returns the limits; ranks that hold the model together call this together.

    Args:
        options: the engine's.
    """
    config = tokenizer.config
    token_bytes = footprint.cache_bytes_per_token(config, room.item_bytes) // peers.count
    slots = peers.least(setup.batch_size or sizing.choose_slots(room.free, token_bytes, room.device))
    parameters = peers.least(room.parameters)
    # What layers with a window keep of a sequence may be less than all of its tokens.
    has_windows = any(layer.window for layer in footprint.list_layer_caches(config))
    longest = _LONGEST if has_windows else options.cache_tokens or _LONGEST
    sequence_tokens = min(tokenizer.context or _LONGEST, longest)
    step_tokens = options.step_tokens or sizing.choose_step_tokens(parameters)
    text = config.get_text_config()
    contexts = longrope.find_original_context(text), longrope.find_restretched_at(text)
    return StepLimits(slots, sequence_tokens, step_tokens, contexts[0], tuple(setup.adapters), contexts[1])
