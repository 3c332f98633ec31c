"""What the families share: seeds, noise on the weights that are zero at birth, pictures, tokenizers."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from support import pipelines
from support.families.tiny import Tiny


def seeded(make: Callable[[], Tiny]) -> Callable[[], Tiny]:
    """Give a maker a seed of its own, and leave the global random numbers as they were."""

    @functools.wraps(make)
    def made() -> Tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny = make()
        tiny.pipe.set_progress_bar_config(disable=True)
        for part in tiny.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return tiny

    return made


def roughen(module: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Add Gaussian noise to the parameters that are constant, so that every input of the module matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.min() == parameter.max():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def picture(seed: int = 0, width: int = 8, height: int = 8) -> Any:
    """Draw a picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def half(size: int) -> Any:
    """Draw a mask that is white on the left."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    return mask


def embeds(seed: int = 0, *shape: int) -> torch.Tensor:
    """Draw embeddings, by default of a text of eight tokens, as wide as those of the tiny T5."""
    return torch.randn(shape or (1, 8, 24), generator=torch.Generator().manual_seed(seed))


def words(make: Callable[[Path], Any] = pipelines.clip_tokenizer) -> Any:
    """Make a tokenizer that is read from a folder, by default CLIP's."""
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder) / "words")
