"""Text encoders of `diffusers` pipelines: from prompts to the tensors that their networks take.

Each kind of pipeline has one or several encoders, and a rule that combines their outputs into tensors:

| kind | encoders | tensors |
|---|---|---|
| Stable Diffusion 1 and 2 | CLIP | last states, normalised |
| latent diffusion | BERT | last states |
| Stable Diffusion XL | CLIP (may be missing), CLIP projected | last states but one, side by side; the second's vector |
| Stable Diffusion 3 | CLIP projected, another, T5 (may be missing) | T5's states after the others'; both vectors |
| Flux | CLIP, T5 | T5's last states; CLIP's vector |

As in the pipelines, prompts that are too long for an encoder are cut, with a warning that names what is lost, and
shorter ones are filled up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.model.tokens import tell_lost

__all__ = ["Text", "Tower", "clip_and_t5", "joint", "last", "penultimate"]

KEPT = 64  # prompts whose tensors are kept


class Tower(nn.Module):
    """A text encoder with its tokenizer: it turns a prompt into the encoder's output, of one row.

    Args:
        tokenizer: tokenizer of `transformers`.
        encoder: encoder of `transformers`.
        length: tokens per prompt; by default as many as both take.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module, length: int | None = None) -> None:
        super().__init__()
        config: Any = encoder.config
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.length = length or min(tokenizer.model_max_length, config.max_position_embeddings)

    def forward(self, prompt: str) -> Any:
        room = self.length - self.tokenizer.num_special_tokens_to_add()
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > room:
            tell_lost(prompt, type(self.encoder).__name__, room, self.tokenizer.decode(ids[room:]).strip())
        settings = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer([prompt], **settings).input_ids
        return self.encoder(tokens.to(next(self.parameters()).device), output_hidden_states=True)


class Text(nn.Module):
    """Turns prompts into tensors with one row per prompt; those of the last 64 prompts are kept.

    Each prompt is encoded alone, so its tensors do not depend on the prompts beside it.

    Args:
        towers: the encoders.
        combine: function from their outputs for a prompt to its tensors.
        blank: whether the empty prompt's tensors are zeros (`force_zeros_for_empty_prompt`).
    """

    def __init__(
        self, towers: Sequence[Tower], combine: Callable[[Sequence[Any]], tuple[Tensor, ...]], blank: bool = False
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.combine = combine
        self.blank = blank
        self._kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        rows = [self._row(prompt) for prompt in prompts]
        return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))

    def _row(self, prompt: str) -> tuple[Tensor, ...]:
        row = self._kept.pop(prompt, None)
        if row is None:
            row = self.combine([tower(prompt) for tower in self.towers])
            if self.blank and not prompt:
                row = tuple(map(torch.zeros_like, row))
        device = next(self.parameters()).device
        self._kept[prompt] = row = tuple(tensor.to(device) for tensor in row)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return row


def last(outputs: Sequence[Any]) -> tuple[Tensor]:
    """Take the encoder's last states, as for Stable Diffusion and latent diffusion."""
    return (outputs[0][0],)


def penultimate(outputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Take all encoders' last states but one, side by side, and the last encoder's vector (SDXL).

    References:
        SDXL, Podell et al., arXiv 2307.01952, section 2.1.
    """
    return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1][0]


def joint(width: int, length: int) -> Callable[[Sequence[Any]], tuple[Tensor, Tensor]]:
    """Take the states of two CLIPs, filled up to T5's width, then T5's; and the vectors of both CLIPs (SD3).

    Args:
        width: width of T5's states.
        length: number of T5's states, which are zeros if there is no T5.

    References:
        Scaling Rectified Flow Transformers, Esser et al., arXiv 2403.03206, appendix B.3.
    """

    def combine(outputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
        states = torch.cat([output.hidden_states[-2] for output in outputs[:2]], -1)
        states = nn.functional.pad(states, (0, width - states.shape[-1]))
        more = outputs[2][0] if len(outputs) > 2 else states.new_zeros(1, length, width)
        return torch.cat([states, more.to(states)], 1), torch.cat([output[0] for output in outputs[:2]], -1)

    return combine


def clip_and_t5(outputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Take T5's last states, and CLIP's vector (Flux)."""
    return outputs[1][0], outputs[0].pooler_output
