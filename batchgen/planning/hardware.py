"""Kinds of devices, how fast they are, and the one that is here: what a forecast is made for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from batchgen.device import cores, host_bytes, measure_matmul
from batchgen.types import UserError

_GIB = 1 << 30
_FULL = 0.99  # what a card has of the memory that it is sold with, in GiB
_FEEDING_CORES = 4  # that together read all that the host's memory gives


class CardError(UserError):
    """There is no such card: a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of GPU, or the CPU in the place of one."""

    memory: int  # bytes
    bandwidth: float  # bytes/s of its memory
    operations: float  # operations/s of a large product in 16 bits
    host_link: float  # bytes/s from pinned host memory
    gpu_link: float  # bytes/s to another GPU of the host
    measured: bool = False  # else nine tenths of what the maker says
    gpu: bool = True
    fp8: bool = True  # it has products and conversions of 8-bit floats


CARDS: Mapping[str, Card] = {
    "H100": Card(int(80 * _GIB * _FULL), 2.94e12, 760e12, 52e9, 300e9, measured=True),
    "H200": Card(int(141 * 1e9), 4.3e12, 760e12, 52e9, 300e9),
    "A100-80": Card(int(80 * _GIB * _FULL), 1.8e12, 280e12, 23e9, 200e9, fp8=False),
    "A100-40": Card(int(40 * _GIB * _FULL), 1.4e12, 280e12, 23e9, 200e9, fp8=False),
    "A6000": Card(int(48 * _GIB * _FULL), 0.69e12, 140e12, 23e9, 40e9, fp8=False),
    "L40S": Card(int(48 * _GIB * _FULL), 0.78e12, 330e12, 23e9, 20e9),
    "V100": Card(int(32 * _GIB * _FULL), 0.81e12, 112e12, 11e9, 100e9, fp8=False),
}


def card_of(name: str | None, gigabytes: float | None) -> Card:
    """The card called `name`, or the one with the nearest memory; with other memory if both are given.

    Raises:
        CardError: it is not known.
    """
    if name is not None and name not in CARDS:
        raise CardError(f"the GPU {name} is not known: {', '.join(CARDS)}; or give --gpu-memory")
    if gigabytes is None:
        return CARDS[name or "H100"]
    size = int(gigabytes * _GIB * _FULL)
    return replace(CARDS[name or nearest_card(gigabytes)], memory=size)


def nearest_card(gigabytes: float) -> str:
    """The name of the card whose memory is the nearest to this, as it is sold."""
    return _nearest(CARDS, int(gigabytes * _GIB * _FULL))


def recognise_card(device: str, size: int) -> Card:
    """The card that torch calls `device`, like "NVIDIA A100-SXM4-80GB", and that has `size` bytes; one that is not
    known counts as the one with the nearest memory."""
    named = {name: card for name, card in CARDS.items() if re.search(rf"\b{name.partition('-')[0]}\b", device)}
    card = CARDS[_nearest(named or CARDS, size)]
    return replace(card, memory=size, measured=card.measured and bool(named))


def _nearest(cards: Mapping[str, Card], size: int) -> str:
    return min(cards, key=lambda name: abs(math.log(cards[name].memory / size)))


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to compute with."""

    card: Card | None  # each of its GPUs
    gpus: int
    host_memory: int  # bytes, used or not
    local_size: int = 1  # ranks that share the host's cores where there is no GPU

    @classmethod
    def here(cls, local_size: int) -> Machine:
        """This one, for `local_size` ranks. Looking takes no memory of a GPU: a context is made by the first tensor."""
        size = host_bytes()
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            properties = torch.cuda.get_device_properties(0)
            return cls(recognise_card(properties.name, properties.total_memory), gpus, size)
        return cls(None, 0, size, local_size)

    def device(self, dtype: torch.dtype) -> Card:
        """What a rank computes numbers of this type on: a GPU, or its share of the host, which is measured."""
        if self.card is not None:
            return self.card
        reached, count = measure_matmul(dtype), cores()
        speed = reached.bandwidth * min(count, _FEEDING_CORES) / self.local_size
        operations = reached.operations * count / self.local_size
        size = self.host_memory // self.local_size
        return Card(size, speed, operations, speed, speed, measured=True, gpu=False)


@dataclass(frozen=True, slots=True)
class Nodes:
    """The hosts that a run is carried out on, all alike."""

    machine: Machine  # each of them
    ranks: int  # on all of them together
    count: int = 1
