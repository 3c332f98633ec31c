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

from pushforward.data.faults import FAULTS
from pushforward.data.hub import check_model
from pushforward.data.words import many
from pushforward.errors import PushforwardError

__all__ = ["Clip", "alignment", "load_clip"]


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model, frozen.

    Args:
        model: the model, a `transformers.CLIPModel`.
        tokenizer: its tokenizer.
        shortest: length in pixels that an image's shorter side is scaled to.
        mean: mean of the colours in [0, 1] that the model was trained on.
        deviation: standard deviation of these colours.
    """

    model: Any
    tokenizer: Any
    shortest: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._like.device

    @property
    def side(self) -> int:
        """Height and width of the images that the model sees."""
        return int(self.model.config.vision_config.image_size)

    def pixels(self, images: Tensor) -> Tensor:
        """Turn images in [-1, 1], `(count, 1 or 3, height, width)`, into the model's input, `(count, 3, side, side)`.

        Raises:
            PushforwardError: the shape is not that of images.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            shape = tuple(images.shape)
            raise PushforwardError(f"CLIP takes images (count, 1 or 3, height, width); got shape {shape}.")
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
        """Return unit vectors of images in [-1, 1], `(count, d)`, differentiable in the images.

        Raises:
            PushforwardError: the shape is not that of images.
        """
        seen = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return normalize(self.model.visual_projection(seen), dim=1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors of prompts, `(count, d)`; tokens beyond the model's length (77) are not read."""
        longest = self.model.config.text_config.max_position_embeddings
        found = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        told = {name: found[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return normalize(self.model.text_projection(self.model.text_model(**told).pooler_output), dim=1)

    def similarity(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Return the cosine of each image and its prompt, `(count,)`.

        Args:
            images: images in [-1, 1], `(count, 1 or 3, height, width)`.
            prompts: one prompt per image, or one for all.

        Raises:
            PushforwardError: there is another number of prompts.
        """
        return (self.images(images) * self.fitting(prompts, len(images))).sum(1)

    def directional(
        self,
        source_images: Tensor,
        target_images: Tensor,
        source_prompts: str | Sequence[str],
        target_prompts: str | Sequence[str],
    ) -> Tensor:
        """Return the cosine of each image's change and its prompt's, `(count,)`; 0 for an image that did not change.

        The cosine has practically no gradient at an image that did not change; begin an optimisation elsewhere.

        Args:
            source_images: images before, in [-1, 1], `(count, 1 or 3, height, width)`.
            target_images: images after, as many as before.
            source_prompts: prompts of the images before, one per image or one for all.
            target_prompts: prompts of the images after, one per image or one for all.

        Raises:
            PushforwardError: there is another number of images or prompts, or a prompt does not change.
        """
        count = len(source_images)
        if len(target_images) != count:
            raise PushforwardError(
                f"A direction needs as many target as source images; got {len(target_images)} and {count}."
            )
        words = self.fitting(target_prompts, count) - self.fitting(source_prompts, count)
        return alignment(self.images(target_images) - self.images(source_images), words)

    def fitting(self, prompts: str | Sequence[str], count: int) -> Tensor:
        """Return the unit vector of each image's prompt, `(count, d)`, from one prompt per image or one for all.

        Raises:
            PushforwardError: there is another number of prompts.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        if len(several) not in (1, count):
            raise PushforwardError(f"For {many(count, 'image')} give as many prompts, or one; got {len(several)}.")
        return self.texts(several).expand(count, -1)

    @property
    def _like(self) -> Tensor:
        """A tensor with the model's device and dtype."""
        found: Tensor = next(self.model.parameters())
        return found


def alignment(images: Tensor, words: Tensor) -> Tensor:
    """Return the cosine of changes in images and in prompts, both `(count, d)`; 0 for an image that did not change.

    Raises:
        PushforwardError: a prompt does not change.
    """
    if not bool(words.norm(dim=1).gt(1e-5).all()):  # a hundred roundings of unit vectors
        raise PushforwardError(
            "A direction needs source and target prompts that differ; at least one pair means the same to CLIP."
        )
    return cosine_similarity(images, words)


def load_clip(name: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Clip:
    """Load a CLIP model from a folder of `transformers` or by hub name, such as `openai/clip-vit-base-patch32`.

    Images are scaled and normalised as its `preprocessor_config.json` says.

    Args:
        name: folder or hub name.
        device: device to compute on.

    Raises:
        PushforwardError: there is no such model, it is of another kind, or `transformers` is missing.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer, CLIPModel
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as error:
        raise PushforwardError("CLIP needs `pip install 'pushforward[diffusers]'`.") from error

    place = os.fspath(name)
    try:
        check_model(place)
        kind = AutoConfig.from_pretrained(place).model_type
        if kind != "clip":
            raise PushforwardError(
                f"{place} is a model of kind {kind!r}, not clip; name a CLIP, such as openai/clip-vit-base-patch32."
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
            f"{place} scales images to {shortest}, but its model takes {clip.side}; fix its preprocessor_config.json."
        )
    return clip


def _shortest(size: int | Mapping[str, int]) -> int:
    """Read the side that a processor's configuration states in one of three ways."""
    return size if isinstance(size, int) else int(size.get("shortest_edge") or size["height"])
