"""Prompts: networks that are told in words what to draw.

A text encoder turns each prompt into a row of one or several tensors. The condition of an image is the number of its
row, so executors pass on plain numbers, and every prompt is encoded once, whatever the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.model.network import device_of

__all__ = ["Guided", "Prompted", "TextEncoder", "prompted"]

TextEncoder = Callable[[Sequence[str]], tuple[Any, ...]]  # prompts to tensors with one row per prompt


class Guided(nn.Module, ABC):
    """A network with guidance of its own, which encodes its prompts itself."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it works."""

    @property
    @abstractmethod
    def guidance(self) -> float:
        """The weight of its guidance; 1 if it has none."""

    @abstractmethod
    def told(self, subjects: Sequence[str]) -> tuple[nn.Module, Tensor]:
        """Return the network for these prompts, and the number of each, which is its condition, `(prompts,)`."""

    @abstractmethod
    def guided(self, guidance: float | None, negative: str = "") -> nn.Module:
        """Return the network with another weight of its guidance, if one is given, or with a negative prompt."""


class Prompted(nn.Module):
    """`(u, t, rows) -> prediction` of a network `(u, t, *tensors)`, which gets these rows of the prompts' tensors.

    Args:
        network: the network.
        embeddings: tensors of the prompts, each `(prompts, ...)`; row 0, the negative prompt, is used where no prompt
            is given.
    """

    def __init__(self, network: nn.Module, embeddings: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.network = network
        self.count = len(embeddings)
        for k, tensor in enumerate(embeddings):
            self.register_buffer(f"embedding{k}", tensor, persistent=False)

    @property
    def embeddings(self) -> tuple[Tensor, ...]:
        """The prompts' tensors."""
        return tuple(self.get_buffer(f"embedding{k}") for k in range(self.count))

    def forward(self, u: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            rows = torch.zeros(len(u), dtype=torch.long, device=u.device)
        answer: Tensor = self.network(u, t, *(tensor[rows] for tensor in self.embeddings))
        return answer


def prompted(network: nn.Module, text: TextEncoder, prompts: Sequence[str], negative: str) -> tuple[Prompted, Tensor]:
    """Make a network that knows these prompts; also return the row of each in its table, `(prompts,)`."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys([negative, *prompts]))}
    place = device_of(network)
    embeddings = tuple(tensor.to(place) for tensor in text(list(rows)))
    numbers = torch.tensor([rows[prompt] for prompt in prompts], dtype=torch.long, device="cpu")
    return Prompted(network, embeddings), numbers
