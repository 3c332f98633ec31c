"""Classifiers of images, from files, folders of `transformers` or the package, as functions of images in [-1, 1].

`prepared` turns a network that takes images of another size and scale into one that takes images in [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from pushforward.data.faults import FAULTS
from pushforward.data.hub import check_model
from pushforward.errors import PushforwardError
from pushforward.model.torchscript import SUFFIXES, load_torchscript
from pushforward.vision.features import load_fashion

__all__ = ["Classifier", "ImageNetwork", "load_classifier", "prepared"]

ImageNetwork = Callable[[Tensor], Tensor]

FASHION_LABELS = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
BILINEAR = 2  # Pillow's number; its sharper filters, 1 and 3, are replaced by bicubic
WHOLE = 384  # ConvNeXt's processor scales to smaller sides with a margin, which it cuts off


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network that classifies, and the names of its classes.

    Args:
        logits: function from images in [-1, 1] to logits `(count, classes)`.
        labels: names of the classes; empty if they only have numbers.
    """

    logits: ImageNetwork
    labels: tuple[str, ...] = ()

    def number(self, label: int | str) -> int:
        """Find the number of a class.

        Args:
            label: its number, also as a string of digits; or its name in upper or lower case, or one of several names
                that it lists.

        Raises:
            PushforwardError: there is no such class, or more than one.
        """
        if isinstance(label, str) and (found := self._named(label.strip().lower())):
            if len(found) > 1:
                raise PushforwardError(
                    f"The classifier has {len(found)} classes named {label!r}, {found}; give a number."
                )
            return found[0]
        if isinstance(label, str) and not label.isdecimal():
            known = ", ".join(self.labels[:20]) + " …" * (len(self.labels) > 20)
            why = f"it knows: {known}" if self.labels else "its classes have no names: give a number"
            raise PushforwardError(f"The classifier has no class {label!r}; {why}.")
        number = int(label)
        if number < 0 or (self.labels and number >= len(self.labels)):
            most = f" to {len(self.labels) - 1}" if self.labels else " on"
            raise PushforwardError(f"The classifier's classes go from 0{most}; got {number}.")
        return number

    def _named(self, name: str) -> list[int]:
        names = [label.lower() for label in self.labels]
        exact = [k for k, known in enumerate(names) if known == name]
        return exact or [k for k, known in enumerate(names) if name in (part.strip() for part in known.split(","))]


def load_classifier(name: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Classifier:
    """Load a classifier, frozen, from a folder of `transformers` or its hub name, a TorchScript file, or by name.

    Args:
        name: `fashion`, the classifier of Fashion-MNIST that comes with the package, for grey images of 28 x 28; a
            TorchScript file `.pt`, `.pth`, `.ts` or `.torchscript` that maps images in [-1, 1] to logits
            `(count, classes)`, without names; or a folder or hub name of a `transformers` image classifier, whose
            images are scaled and normalised, in PyTorch, as its `preprocessor_config.json` says.
        device: device to compute on.

    Raises:
        PushforwardError: there is no such classifier, it is of another kind, or `transformers` is missing.
    """
    place = os.fspath(name)
    if place == "fashion":
        net = load_fashion().to(device)
        return Classifier(lambda images: net.head(net((images.to(net.head.weight) + 1) * 127.5)), FASHION_LABELS)
    if Path(place).is_file() or Path(place).suffix in SUFFIXES:
        script = load_torchscript(Path(place), device)
        like = next(script.parameters(), torch.zeros(0, device=device))
        return Classifier(lambda images: script(images.to(like)))
    return _transformers(place, device)


def prepared(
    network: ImageNetwork,
    *,
    size: int | tuple[int, int] | None = None,
    mean: float | Sequence[float] = 0.0,
    deviation: float | Sequence[float] = 1.0,
) -> ImageNetwork:
    """Make a network of images in [-1, 1] from one that takes them in [0, 1] or normalised from there.

    Args:
        network: a network that takes `((x + 1) / 2 - mean) / deviation`.
        size: side, or height and width, in pixels to scale images to (bilinear, antialiased); by default their own.
        mean: one number, or one per channel: with three, grey images become colour images.
        deviation: one number, or one per channel.
    """
    shape = (size, size) if isinstance(size, int) else size

    def answer(images: Tensor) -> Tensor:
        x = (images + 1) / 2
        return network(_normalised(x if shape is None else _scaled(x, shape), mean, deviation))

    return answer


def _transformers(place: str, device: str | torch.device) -> Classifier:
    try:
        from transformers import AutoModelForImageClassification
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as error:
        raise PushforwardError("Classifiers from folders need `pip install 'pushforward[diffusers]'`.") from error
    try:
        check_model(place)
        model, report = AutoModelForImageClassification.from_pretrained(place, output_loading_info=True)
        config, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except FAULTS as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise PushforwardError(
            f"{place} cannot be read as an image classifier with its preprocessor_config.json: {reason}"
        ) from error
    if report["missing_keys"]:
        raise PushforwardError(
            f"The weights in {place} lack {len(report['missing_keys'])} of the classifier's tensors, among them "
            f"{min(report['missing_keys'])}; name a model that was trained to classify."
        )
    see = _processor(config, place)
    model = model.float().eval().requires_grad_(False).to(device)
    like = next(model.parameters())
    names = model.config.id2label
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    return Classifier(lambda images: model(pixel_values=see(images.to(like))).logits, labels)


def _processor(config: Mapping[str, Any], place: str) -> ImageNetwork:
    """Make a function that does to images in [-1, 1] what an image processor of `transformers` does."""
    try:
        scale = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
        shift = 1.0 if config.get("rescale_offset", False) else 0.0
        mode = "bilinear" if config.get("resample", BILINEAR) == BILINEAR else "bicubic"
        resize = _resizing(config["size"], config.get("crop_pct")) if config.get("do_resize", True) else None
        crop = _pair(config["crop_size"]) if config.get("do_center_crop", False) else None
        mean, deviation = 0.0, 1.0
        if config.get("do_normalize", True):
            mean, deviation = config["image_mean"], config["image_std"]
    except (KeyError, TypeError, ValueError) as error:
        raise PushforwardError(
            f"The preprocessor_config.json of {place} lacks size, crop_size, image_mean or image_std."
        ) from error

    def see(images: Tensor) -> Tensor:
        x = (images + 1) / 2
        if resize is not None:
            shape, cut = resize(*x.shape[2:])
            x = _cropped(_scaled(x, shape, mode), cut)
        return _normalised(_cropped(x, crop) * scale - shift, mean, deviation).expand(-1, 3, -1, -1)

    return see


_Shape = tuple[int, int]


def _resizing(size: Any, margin: float | None) -> Callable[[int, int], tuple[_Shape, _Shape | None]]:
    """Make a function from an image's size to the size to scale to, and the size then kept around the centre."""
    if isinstance(size, int) and margin is not None:
        size = {"shortest_edge": size}  # as ConvNeXt's processor reads it
    if isinstance(size, int) or "shortest_edge" not in size:
        shape = _pair(size)
        return lambda height, width: (shape, None)  # noqa: ARG005 - whatever they are
    shortest = int(size["shortest_edge"])

    def resized(height: int, width: int) -> tuple[_Shape, _Shape | None]:
        if margin is not None and shortest >= WHOLE:
            return (shortest, shortest), None
        short = shortest if margin is None else int(shortest / margin)
        long = int(max(height, width) * short / min(height, width))
        kept = None if margin is None else (shortest, shortest)
        return ((long, short) if height > width else (short, long)), kept

    return resized


def _pair(size: Any) -> _Shape:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _scaled(x: Tensor, shape: _Shape, mode: str = "bilinear") -> Tensor:
    return x if tuple(x.shape[2:]) == shape else interpolate(x, shape, mode=mode, antialias=True)


def _cropped(x: Tensor, shape: _Shape | None) -> Tensor:
    """Cut out the middle of an image, with 0 around it where it is smaller."""
    if shape is None:
        return x
    height, width = (wanted - length for wanted, length in zip(shape, x.shape[2:], strict=True))
    top, left = height - height // 2, width - width // 2
    return pad(x, (left, width - left, top, height - top))


def _normalised(x: Tensor, mean: float | Sequence[float], deviation: float | Sequence[float]) -> Tensor:
    shift, scale = (x.new_tensor(v).reshape(-1, 1, 1) for v in (mean, deviation))
    return (x - shift) / scale
