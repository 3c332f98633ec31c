"""Energies by networks that look at images: CLIP, classifiers, attributes, scores, identities.

A network here is any differentiable function of images in [-1, 1], `(count, channels, height, width)`, such as
`vision.classifiers.prepared` makes of others. With `views` (see `views`), the energy is the mean over all views of an
image.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax, softplus

from pushforward.errors import PushforwardError
from pushforward.guidance.energies.energy import Energy, of
from pushforward.guidance.energies.references import one_image
from pushforward.guidance.energies.views import Views, average
from pushforward.vision.classifiers import Classifier, ImageNetwork
from pushforward.vision.clip import Clip

__all__ = ["attribute", "classifier", "clip_image", "clip_text", "identity", "score"]

Metric = Literal["cosine", "euclidean"]


# -- CLIP -------------------------------------------------------------------------------------------------------------


def clip_text(clip: Clip, prompt: str, *, views: Views | None = None) -> Energy:
    """Measure how far an image is from a prompt: `1 - cos(E_I(x), E_T(prompt))`.

    Args:
        clip: the CLIP model, see `vision.clip.load_clip`.
        prompt: the prompt, which is encoded once.
        views: views of each image; the paper takes 50, drawn anew at each call.

    Raises:
        PushforwardError: when called with a tensor that is not images.

    References:
        Wu & De la Torre, arXiv 2210.05559, section 4.3.
    """
    with torch.no_grad():
        words = clip.texts([prompt])
    return _averaged(_distance(clip.images, words), views, "clip_text")


def clip_image(clip: Clip, image: Tensor, *, views: Views | None = None) -> Energy:
    """Measure how far an image is from another for CLIP: `1 - cos(E_I(x), E_I(image))`.

    Args:
        clip: the CLIP model, see `vision.clip.load_clip`.
        image: reference image in [-1, 1], `(channels, height, width)` or `(1, channels, height, width)`, of any size;
            it is encoded once.
        views: views of each image, not of the reference.

    Raises:
        PushforwardError: `image` is not an image; or when called with a tensor that is not images.
    """
    return _averaged(_distance(clip.images, _embedded(clip.images, image, "clip_image")), views, "clip_image")


# -- classes ----------------------------------------------------------------------------------------------------------


def classifier(network: Classifier | ImageNetwork, label: int | str, *, views: Views | None = None) -> Energy:
    """Make minus the log probability of a class, `-log softmax(logits(x))[label]`.

    Args:
        network: a `Classifier`, or any function from images in [-1, 1] to logits `(count, classes)`.
        label: number or name of the class; see `Classifier.number`.
        views: views of each image.

    Raises:
        PushforwardError: there is no such class; or when called, if the network's answer has another shape.
    """
    known = _classifier(network)
    number = known.number(label)
    return _averaged(lambda x: -log_softmax(_logits(known, x, number), 1)[:, number], views, f"class {label}")


def attribute(
    network: Classifier | ImageNetwork, label: int | str = 0, *, wanted: bool = True, views: Views | None = None
) -> Energy:
    """Make minus the log probability that an image has an attribute, or lacks it: `softplus(-+ logit)`.

    Each of the network's answers is the logit of one attribute, as `sigmoid` takes it.

    Args:
        network: a `Classifier`, or any function from images in [-1, 1] to logits `(count, attributes)`, or `(count,)`
            for one attribute.
        label: number or name of the attribute; see `Classifier.number`.
        wanted: whether the image should have it.
        views: views of each image.

    Raises:
        PushforwardError: there is no such attribute; or when called, if the network's answer has another shape.
    """
    known = _classifier(network)
    number, sign = known.number(label), -1 if wanted else 1
    name = f"attribute {label}" if wanted else f"attribute not {label}"
    return _averaged(lambda x: softplus(sign * _logits(known, x, number)[:, number]), views, name)


# -- other networks ---------------------------------------------------------------------------------------------------


def score(network: ImageNetwork, *, low: bool = False, views: Views | None = None) -> Energy:
    """Make minus a network's score of an image, such as its beauty or how much people like it: high is good.

    Args:
        network: function from images in [-1, 1] to one number each, `(count,)` or `(count, 1)`.
        low: whether low scores are wanted: then the energy is the score itself.
        views: views of each image.

    Raises:
        PushforwardError: when called, if the network's answer has another shape.
    """

    def value(images: Tensor) -> Tensor:
        found = network(images)
        if tuple(found.shape) not in ((len(images),), (len(images), 1)):
            raise PushforwardError(
                f"A score is one number per image, here ({len(images)},); the network gave {tuple(found.shape)}."
            )
        return found.flatten() if low else -found.flatten()

    return _averaged(value, views, "score")


def identity(network: ImageNetwork, image: Tensor, *, metric: Metric = "cosine", views: Views | None = None) -> Energy:
    """Measure how far an image is from another for a network that recognises identities.

    Args:
        network: function from images in [-1, 1] to embeddings `(count, d)`, such as `load_faces` gives.
        image: reference image in [-1, 1], `(channels, height, width)` or `(1, channels, height, width)`; it is embedded
            once.
        metric: `cosine`, 1 minus the cosine of the embeddings; or `euclidean`, the norm of their difference, which for
            `load_faces` is below 0.6 if the network takes two faces for one person's.
        views: views of each image, not of the reference.

    Raises:
        PushforwardError: `image` is not an image; or when called, if the network's answer has another shape.
    """
    return _averaged(_distance(network, _embedded(network, image, "identity"), metric), views, "identity")


# -- what they share --------------------------------------------------------------------------------------------------


def _averaged(value: ImageNetwork, views: Views | None, name: str) -> Energy:
    return of(lambda images: average(value, images, views), name)


def _embedded(network: ImageNetwork, image: Tensor, name: str) -> Tensor:
    """Embed one image, `(1, d)`."""
    with torch.no_grad():
        return _embeddings(network, one_image(image, name))


def _embeddings(network: ImageNetwork, images: Tensor) -> Tensor:
    found = network(images)
    if found.ndim != 2 or len(found) != len(images):
        raise PushforwardError(
            f"The network must embed {len(images)} images as ({len(images)}, d); it gave {tuple(found.shape)}."
        )
    return found


def _distance(network: ImageNetwork, target: Tensor, metric: Metric = "cosine") -> ImageNetwork:
    """Measure how far a network's embeddings are from one, `(1, d)`."""

    def value(images: Tensor) -> Tensor:
        found = _embeddings(network, images)
        wanted = target.to(found)
        return 1 - cosine_similarity(found, wanted) if metric == "cosine" else (found - wanted).norm(dim=1)

    return value


def _classifier(network: Classifier | ImageNetwork) -> Classifier:
    return network if isinstance(network, Classifier) else Classifier(network)


def _logits(known: Classifier, images: Tensor, number: int) -> Tensor:
    found = known.logits(images)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or len(found) != len(images) or number >= found.shape[1]:
        raise PushforwardError(
            f"A classifier must give logits ({len(images)}, classes) for {len(images)} images, with a class {number}; "
            f"it gave {tuple(found.shape)}."
        )
    return found
