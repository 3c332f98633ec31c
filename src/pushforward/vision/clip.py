"""CLIP: images and words as vectors of one space (Radford et al., arXiv 2103.00020).

All but the choice of weights is differentiable in the images: they are scaled in PyTorch, as CLIP's own processor does
(shortest side to the model's, bicubic, antialiased, then cut around the centre), but neither rounded to 8 bits nor
clipped, so that gradients pass everywhere.

- **similarity**: the cosine of an image and a prompt;
- **directional similarity**: the cosine of what changed in an image and what changed in the prompt,
  `cos(E_I(x') - E_I(x), E_T(y') - E_T(y))` (Gal et al., StyleGAN-NADA, arXiv 2108.00946, equation 2; used to measure
  edits by Wu & De la Torre, arXiv 2210.05559).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, normalize

from pushforward.errors import PushforwardError

__all__ = ["Clip", "alignment", "load_clip"]


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model, frozen.

    Args:
        model: `transformers.CLIPModel`.
        tokenizer: its tokenizer.
        shortest: side that an image's shorter side is scaled to.
        mean: of the colours in [0, 1] that the model was trained on.
        deviation: of them.
    """

    model: Any
    tokenizer: Any
    shortest: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._like.device

    @property
    def side(self) -> int:
        """Height and width of the images that the model sees."""
        return int(self.model.config.vision_config.image_size)

    def pixels(self, images: Tensor) -> Tensor:
        """What the model sees, `(count, 3, side, side)`, of images in [-1, 1], `(count, 1 or 3, height, width)`.

        Raises:
            PushforwardError: not images.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise PushforwardError(f"CLIP sees images (count, 1 or 3, height, width); got shape {tuple(images.shape)}.")
        x = (images.to(self._like).expand(-1, 3, -1, -1) + 1) / 2
        height, width = x.shape[2:]
        if min(height, width) != self.shortest:
            short, long = self.shortest, int(max(height, width) * self.shortest / min(height, width))
            size = (long, short) if height > width else (short, long)
            x = interpolate(x, size, mode="bicubic", antialias=True)
        top, left = ((length - self.side) // 2 for length in x.shape[2:])
        x = x[:, :, top : top + self.side, left : left + self.side]
        mean, deviation = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.deviation))
        return (x - mean) / deviation

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors of images in [-1, 1], `(count, d)`, differentiable in the images.

        Raises:
            PushforwardError: not images.
        """
        seen = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return normalize(self.model.visual_projection(seen), dim=1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors of prompts, `(count, d)`; of a prompt, what goes beyond the model's length (77) is not read."""
        longest = self.model.config.text_config.max_position_embeddings
        found = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        told = {name: found[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return normalize(self.model.text_projection(self.model.text_model(**told).pooler_output), dim=1)

    def similarity(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Cosine of each image and its prompt, `(count,)`.

        Args:
            images: in [-1, 1], `(count, 1 or 3, height, width)`.
            prompts: one of each image, or one for all.

        Raises:
            PushforwardError: another number of prompts.
        """
        return (self.images(images) * self.fitting(prompts, len(images))).sum(1)

    def directional(
        self,
        source_images: Tensor,
        target_images: Tensor,
        source_prompts: str | Sequence[str],
        target_prompts: str | Sequence[str],
    ) -> Tensor:
        """Cosine of the change of each image and that of its prompt, `(count,)`; 0 for an image that did not change.

        At an image that did not change the cosine has no gradient to speak of: begin an optimisation elsewhere.

        Args:
            source_images: in [-1, 1], `(count, 1 or 3, height, width)`.
            target_images: as many.
            source_prompts: one of each image, or one for all.
            target_prompts: likewise.

        Raises:
            PushforwardError: another number of images or prompts, or a prompt that does not change.
        """
        count = len(source_images)
        if len(target_images) != count:
            raise PushforwardError(
                f"A direction needs as many images after as before; got {len(target_images)} and {count}."
            )
        words = self.fitting(target_prompts, count) - self.fitting(source_prompts, count)
        return alignment(self.images(target_images) - self.images(source_images), words)

    def fitting(self, prompts: str | Sequence[str], count: int) -> Tensor:
        """Unit vectors of one prompt an image, `(count, d)`, given one each or one for all.

        Raises:
            PushforwardError: another number of prompts.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        if len(several) not in (1, count):
            raise PushforwardError(f"{count} images need 1 prompt or {count}; got {len(several)}.")
        return self.texts(several).expand(count, -1)

    @property
    def _like(self) -> Tensor:
        """A tensor of the model's device and type."""
        found: Tensor = next(self.model.parameters())
        return found


def alignment(images: Tensor, words: Tensor) -> Tensor:
    """Cosine of changes in images and in prompts, both `(count, d)`; 0 for an image that did not change.

    Raises:
        PushforwardError: a prompt that does not change.
    """
    if not bool(words.norm(dim=1).gt(1e-5).all()):  # a hundred roundings of unit vectors
        raise PushforwardError(
            "A direction needs source and target prompts that differ; at least one pair says the same to CLIP."
        )
    return cosine_similarity(images, words)


def load_clip(name: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Clip:
    """A CLIP model from a folder of `transformers` or by hub name, such as `openai/clip-vit-base-patch32`.

    How images are scaled and normalised is read from its `preprocessor_config.json`.

    Args:
        name: folder or hub name.
        device: where to compute.

    Raises:
        PushforwardError: no such model, one of another kind, or `transformers` is missing.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer, CLIPModel
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as error:
        raise PushforwardError("CLIP needs `pip install 'pushforward[diffusers]'`.") from error
    from pushforward.model.diffusers.folders import FAULTS

    place = os.fspath(name)
    try:
        kind = AutoConfig.from_pretrained(place).model_type
        if kind != "clip":
            raise PushforwardError(
                f"{place} is a model of kind {kind!r}, not clip; name one such as openai/clip-vit-base-patch32."
            )
        model = CLIPModel.from_pretrained(place).float().eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(place)
        config, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except PushforwardError:
        raise
    except FAULTS as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise PushforwardError(
            f"{place} cannot be read as a CLIP model with its tokenizer and preprocessor_config.json: {reason}"
        ) from error
    try:
        mean, deviation = (tuple(float(v) for v in config[key]) for key in ("image_mean", "image_std"))
        shortest = _shortest(config["size"])
    except (KeyError, TypeError) as error:
        raise PushforwardError(
            f"The preprocessor_config.json of {place} lacks size, image_mean or image_std."
        ) from error
    clip = Clip(model.to(device), tokenizer, shortest, mean, deviation)
    if shortest < clip.side:
        raise PushforwardError(
            f"{place} scales images to {shortest}, and its model sees {clip.side}: mend its preprocessor_config.json."
        )
    return clip


def _shortest(size: int | Mapping[str, int]) -> int:
    """The side that a processor's configuration names, which writes it in one of three ways."""
    return size if isinstance(size, int) else int(size.get("shortest_edge") or size["height"])
