"""What an adapter does to one weight of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A new value of a weight, or two small matrices whose product is added to it, or both, the value first.

    All tensors lie on the CPU, mapped from the adapter's file, in the type that they are saved in.
    """

    tensor: str  # the name of one of them in the adapter's file, for sentences
    value: torch.Tensor | None = None  # in the place of the model's own
    down: torch.Tensor | None = None  # A [rank, columns]
    up: torch.Tensor | None = None  # B [rows, rank]
    scale: float = 1.0  # of the product, or of `bias`
    magnitude: torch.Tensor | None = None  # DoRA's length of each row [rows]; None: not DoRA
    bias: torch.Tensor | None = None  # that is added to a bias [rows]
    is_turned: bool = False  # the model keeps the weight as [columns, rows]: an embedding, a layer of GPT-2
    experts: int = 0  # whose weights are one parameter [experts, rows, columns]; 0: a matrix

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is the product alone, so that it can be made to any part of the weight."""
        return self.up is not None and self.value is None and self.magnitude is None and not self.experts

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this is a change of."""
        if self.up is not None and self.down is not None:
            sizes = (len(self.up), self.down.shape[1])
            return (*([self.experts] if self.experts else []), *(reversed(sizes) if self.is_turned else sizes))
        tensor = self.value if self.value is not None else self.bias
        assert tensor is not None
        return tuple(tensor.shape)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the changed weight in float32, of the shape of `weight` and on its device."""
        device = weight.device
        changed = (weight if self.value is None else self.value.to(device)).float()
        if self.bias is not None:
            changed = changed + self.scale * self.bias.to(device).float()
        if self.up is not None:
            changed = changed + (self._compute_of_experts(device) if self.experts else self.compute_product(device))
        if self.magnitude is not None:
            changed = self._give_length(changed, self.magnitude.to(device).float())
        return changed

    def compute_product(
        self, device: torch.device, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns what is added to a weight, float32, turned if the weight is.

        Args:
            rows, columns: the numbers of those of the weight, as the model keeps it, that are wanted; None: all.
        """
        assert self.up is not None
        assert self.down is not None
        if self.is_turned:
            rows, columns = columns, rows
        up = self.up if rows is None else self.up[rows]
        down = self.down if columns is None else self.down[:, columns]
        product: torch.Tensor = self.scale * (up.to(device).float() @ down.to(device).float())
        return product.T if self.is_turned else product

    def _compute_of_experts(self, device: torch.device) -> torch.Tensor:
        """Returns what is added to the weights of all experts, float32, in the shape of the parameter.

        peft keeps A as [experts * rank, columns], and B as [rows, rank * experts].
        """
        assert self.up is not None
        assert self.down is not None
        down = self.down.to(device).float().reshape(self.experts, -1, self.down.shape[1])
        up = self.up.to(device).float().reshape(len(self.up), -1, self.experts)
        form = "ore,erc->eco" if self.is_turned else "ore,erc->eoc"
        product: torch.Tensor = torch.einsum(form, up, down)
        return self.scale * product

    def _give_length(self, weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """Returns `weight` with rows of these lengths: DoRA, https://arxiv.org/abs/2402.09353, equation 5."""
        dimension = 0 if self.is_turned else 1
        factors: torch.Tensor = magnitude / torch.linalg.vector_norm(weight, dim=dimension)
        return weight * factors.unsqueeze(dimension)
