"""Generators: maps from Gaussian codes to images in one call, or a few, such as GANs and decoders of VAEs.

A code is always of standard normal variables; the `prior` turns it into the latents that the network was trained with,
so samplers over codes never know which. `Generator` is a `Pushforward` as `Diffusion` is. `maps.load` reads them from
files.

    faces = gan(network, 100)                                       # latents (count, 100), images in [-1, 1]
    digits = gan(network, (64, 1, 1), "uniform", range=(0, 1))      # latents uniform on [-1, 1], images in [0, 1]
    drawn = gan(vae.decode, (4, 32, 32))                            # the decoder of a VAE
    quick = consistency(network, (3, 64, 64), sigmas=(80.0, 24.4))  # a consistency model, in two steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.data.faults import FAULTS, reason
from pushforward.data.memory import check_images
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.maps.code import Code, GaussianStream, batches, numbered
from pushforward.maps.labels import Condition, Labels, listed
from pushforward.model import gan as networks
from pushforward.model.labels import class_numbers
from pushforward.model.model import sizes
from pushforward.model.network import device_of

__all__ = ["PRIORS", "Generator", "Prior", "consistency", "gan", "stylegan"]

Prior = str | Callable[[Tensor], Tensor]

SAME = 1e-2  # of the largest value: what rounding may change in an image from one batch to another, TF32 included


def uniform(z: Tensor) -> Tensor:
    """Uniform on [-1, 1]: `2 Phi(z) - 1`."""
    return torch.erf(z * math.sqrt(0.5))


def sphere(z: Tensor) -> Tensor:
    """On the sphere of radius `sqrt(d)`, with d the numbers of one image's z."""
    flat = z.flatten(1)
    return (flat * (flat.shape[1] ** 0.5 / flat.norm(dim=1, keepdim=True))).view_as(z)


PRIORS: dict[str, Callable[[Tensor], Tensor]] = {"normal": lambda z: z, "uniform": uniform, "sphere": sphere}


@dataclass(frozen=True, eq=False)
class Generator:
    """A network that makes images of latents; see `gan`, which makes one.

    Args:
        name: for reports.
        function: `(latents, [noises,] [labels]) -> images`, a tensor, or something with the tensor as its `sample`
            or first; noises only where there are some, labels `(count,)` only where there are classes.
        latent_shape: of one image's latents.
        prior: what makes them of standard normal variables: a name of `PRIORS`, or any function of `(count,
            *latent_shape)`.
        classes: names of its labels.
        noises: how many more variables, each `(count, *latent_shape)`, it takes besides the latents.
        range: the values of black and white.
        image_shape: of one image, `(channels, height, width)`; by default found by a trial, in which it is also tested
            that an image depends on its own latents alone.
        device: device of the latents; by default the function's.
        dtype: dtype of the latents; by default the function's, or else the code's.
        labels: classes of the images; see `given`.
    """

    name: str
    function: Callable[..., Any]
    latent_shape: tuple[int, ...]
    prior: Prior = "normal"
    classes: tuple[str, ...] = ()
    noises: int = 0
    range: tuple[float, float] = (-1.0, 1.0)
    image_shape: tuple[int, ...] | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prior, str) and self.prior not in PRIORS:
            raise PushforwardError(
                f"Unknown prior {self.prior!r} of generator {self.name!r}; known are {', '.join(PRIORS)}."
            )
        if not self.range[0] < self.range[1]:
            raise PushforwardError(
                f"The range of generator {self.name!r} is black, then white, such as (0, 1); got {self.range}."
            )
        if self.image_shape is None:
            object.__setattr__(self, "image_shape", self._trial())

    def __repr__(self) -> str:
        """Show name and sizes; a network fills pages."""
        sides = {"latents": self.latent_shape, "images": self.image_shape or ()}
        said = [f"{name}={'x'.join(map(str, shape))}" for name, shape in sides.items()]
        said += [f"classes={len(self.classes)}"] if self.classes else []
        return f"Generator({', '.join([self.name, *said])})"

    @property
    def module(self) -> nn.Module | None:
        """The function's module, if it is one or a method of one."""
        owner = getattr(self.function, "__self__", self.function)
        return owner if isinstance(owner, nn.Module) else None

    def given(self, labels: Condition) -> Generator:
        """The same generator for these classes.

        Args:
            labels: by name or number, one per image or one for all; `None` for a generator without classes.

        Raises:
            PushforwardError: it has no classes, or no such class.
        """
        return replace(self, labels=self._numbered(listed(labels)))

    def some(self, which: slice | Tensor) -> Generator:
        """The same generator for some of the images; a single class is every image's."""
        place = which.cpu() if isinstance(which, Tensor) else which
        labels = self.labels
        return self if labels is None or len(labels) == 1 else replace(self, labels=labels[place])

    def draw(self, count: int, *, seed: int = 0, first: int | Sequence[int] = 0) -> Code:
        """Codes of `count` images, where the network is; an image's depends on the seed and its number alone.

        Args:
            count: how many.
            seed: seed of all.
            first: number of the first image, or the number of each.

        Raises:
            PushforwardError: a count below 1.
        """
        if count < 1:
            raise PushforwardError(f"Codes are drawn for at least 1 image; got {count}.")
        stream = GaussianStream(seed, numbered(first, count), self.latent_shape)
        return stream.code(self.noises, self._like(torch.empty(0, device="cpu")))

    def decode(self, code: Code) -> Tensor:
        """The images behind a code in [-1, 1], `(count, channels, height, width)`, where the network is.

        Differentiable in the code.

        Args:
            code: `start (count, *latent_shape)`, and noises where the generator takes some.

        Raises:
            PushforwardError: a code or labels that do not fit; the function gives no images.
        """
        images = self._images(code, self.labels_for(len(code)))
        if tuple(images.shape[1:]) != self.image_shape:
            raise PushforwardError(
                f"Generator {self.name!r} gave images of shape {tuple(images.shape[1:])}, not {self.image_shape}."
            )
        return images

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0, first: int = 0, batch: int = 64) -> Tensor:
        """`count` images in [-1, 1], `(count, channels, height, width)`, on the CPU.

        Args:
            count: how many.
            seed: seed of the codes; image i depends on the seed and `first + i` alone.
            first: number of the first image.
            batch: images at a time.

        Raises:
            PushforwardError: a count or batch below 1, or labels that do not fit.
        """
        pieces, images = batches(count, batch), []
        check_images(count, self.image_shape or ())
        self.labels_for(count)
        for some in pieces:
            code = self.draw(some.stop - some.start, seed=seed, first=first + some.start)
            images.append(self.some(some).decode(code).float().cpu())
        return torch.cat(images)

    def _images(self, code: Code, labels: Tensor | None) -> Tensor:
        """As `decode`, with labels that fit and images of any size."""
        self._check(code)
        like = self._like(code.start)
        prior = PRIORS[self.prior] if isinstance(self.prior, str) else self.prior
        told: list[Tensor] = [] if code.noises is None else [code.noises.to(like)]
        told += [] if labels is None else [labels.to(like.device)]
        answer = self.function(prior(code.start.to(like)), *told)
        answer = getattr(answer, "sample", answer)
        images = answer[0] if isinstance(answer, tuple) else answer
        pictures = isinstance(images, Tensor) and images.is_floating_point()
        if not pictures or images.ndim != 4 or len(images) != len(code):
            what = f"shape {tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else None
            raise PushforwardError(
                f"Generator {self.name!r} must make images ({len(code)}, channels, height, width) of "
                f"{many(len(code), 'code')}, of floating point; it gave {what or f'a {type(images).__name__}'}."
            )
        low, high = self.range
        return images if (low, high) == (-1, 1) else (images - low) * (2 / (high - low)) - 1

    def _check(self, code: Code) -> None:
        shape = tuple(code.start.shape[1:])
        if shape != self.latent_shape:
            raise PushforwardError(
                f"Generator {self.name!r} takes codes of shape {self.latent_shape} an image; got {shape}."
            )
        given = () if code.noises is None else tuple(code.noises.shape)
        wanted = (self.noises, *code.start.shape) if self.noises else ()
        if given != wanted or code.end is not None or code.residual is not None:
            has = f"noises of shape {wanted}" if wanted else "no noises"
            got = f"noises of shape {given}" if given != wanted else "a noise or a residual on the last state"
            raise PushforwardError(f"The codes of generator {self.name!r} have a start and {has}; this one has {got}.")

    def _numbered(self, labels: Labels) -> Tensor | None:
        """Classes by their numbers, one or more."""
        if labels is None:
            return None
        if not self.classes:
            raise PushforwardError(f"Generator {self.name!r} has no classes; leave the labels out.")
        if isinstance(labels, Tensor) and labels.is_floating_point():
            raise PushforwardError(
                f"Generator {self.name!r} reads no prompts: give its labels as a tensor of integers."
            )
        return class_numbers(self, labels)

    def labels_for(self, count: int) -> Tensor | None:
        """The labels of `count` images."""
        if self.labels is None:
            if self.classes:
                raise PushforwardError(
                    f"Generator {self.name!r} draws images by class: give labels, from 0 to {len(self.classes) - 1}."
                )
            return None
        labels = self.labels.expand(count) if len(self.labels) == 1 else self.labels
        if tuple(labels.shape) != (count,):
            raise PushforwardError(
                f"For {many(count, 'image')} give as many labels, or one; got shape {tuple(labels.shape)}."
            )
        return labels

    def _like(self, start: Tensor) -> Tensor:
        """An empty tensor of the latents' type and device."""
        weights = () if self.module is None else self.module.parameters()
        own = next((weight.dtype for weight in weights if weight.is_floating_point()), start.dtype)
        return torch.empty(0, device=self.device or device_of(self.module), dtype=self.dtype or own)

    @torch.no_grad()
    def _trial(self) -> tuple[int, ...]:
        """The shape of an image; two are made, and one of them once more by itself."""
        code, labels = self.draw(2), torch.zeros(2, dtype=torch.long, device="cpu") if self.classes else None
        try:
            both = self._images(code, labels)
            alone = self._images(code[1:], None if labels is None else labels[1:])
        except PushforwardError:
            raise
        except (*FAULTS, AssertionError) as error:
            raise PushforwardError(
                f"Generator {self.name!r} fails on latents of shape {(2, *self.latent_shape)}: {reason(error)}; see "
                "that latent_shape and classes are what it takes, and that it is in evaluation mode."
            ) from error
        if not bool(both.isfinite().all()):
            raise PushforwardError(f"Generator {self.name!r} gives values that are not finite.")
        gap, scale = (alone - both[1:]).abs().max().item(), both.abs().max().item()
        if both.shape[1:] != alone.shape[1:] or gap > max(SAME, 3 * torch.finfo(both.dtype).eps ** 0.5) * scale:
            raise PushforwardError(
                f"Generator {self.name!r} does not make the same image of the same code at every call: put it into "
                "evaluation mode, and keep its inner noises constant (StyleGAN: noise_mode='const')."
            )
        return tuple(both.shape[1:])


def gan(
    function: Callable[..., Any],
    latent_shape: int | Sequence[int],
    prior: Prior = "normal",
    *,
    name: str | None = None,
    classes: Sequence[str] = (),
    range: tuple[float, float] = (-1.0, 1.0),
    image_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Generator:
    """A network that makes images of latents as a `Pushforward`: of a GAN, or the decoder of a VAE (`vae.decode`).

    Args:
        function: `latents (count, *latent_shape) -> images (count, channels, height, width)`, or, with classes,
            `(latents, labels) -> images`. A module, or a method of one, is put into evaluation mode.
        latent_shape: of one image's latents.
        prior: prior of the latents: "normal"; "uniform" on [-1, 1]; "sphere", of radius `sqrt(d)`; or any function that
            makes them of standard normal variables.
        name: for reports; by default the function's.
        classes: names of its labels.
        range: the values of black and white: (0, 1) for a generator that ends with a sigmoid.
        image_shape: of one image; by default found by a trial.
        device: device of the latents; by default the network's.
        dtype: dtype of the latents; by default the network's.

    Raises:
        PushforwardError: an unknown prior, or a function that makes no images of such latents, or not the same ones
            at every call.
    """
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        owner.eval()
    shape = sizes("The shape of latents", (latent_shape,) if isinstance(latent_shape, int) else latent_shape)
    called = name or str(getattr(function, "__name__", type(function).__name__))
    known = None if image_shape is None else sizes("The shape of images", image_shape)
    return Generator(called, function, shape, prior, tuple(classes), 0, range, known, device, dtype)


def stylegan(
    module: nn.Module, *, truncation: float = 1.0, label: int | None = None, name: str = "stylegan"
) -> Generator:
    """A StyleGAN 2 or 3 generator, or another with its interface `(z, c)`, as a `Pushforward`.

    NVIDIA's pickles need their own code: unpickle `G_ema` with it. Inner noises are held constant.

    Args:
        module: with `z_dim` and `c_dim`.
        truncation: psi; 1 for none. Below, images are drawn towards the mean.
        label: class of all images, for a conditional network; without it, each image is told its own.
        name: for reports.

    Raises:
        PushforwardError: a module of another kind, or a label that it does not have.
    """
    network = networks.StyleGan(module, truncation, label)
    classes = () if label is not None else tuple(map(str, range(network.classes)))
    return gan(network, network.size, name=name, classes=classes)


def consistency(
    function: Callable[..., Tensor],
    shape: Sequence[int],
    *,
    sigmas: Sequence[float] = (80.0,),
    sigma_min: float = 0.002,
    gain: float = 1.0,
    name: str = "consistency",
    classes: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> Generator:
    """A consistency model as a `Pushforward`: one call, or one for each noise level (arXiv 2303.01469, algorithm 1).

    A code is the noise of the first level (`start`) and a fresh one for each of the others (`noises`).

    Args:
        function: f, `(noisy images, sigma (count,)) -> images`, or, with classes, `(noisy, sigma, labels) -> images`.
        shape: of one image, `(channels, height, width)`.
        sigmas: noise levels, falling.
        sigma_min: the least.
        gain: that fresh noises are multiplied by.
        name: for reports.
        classes: names of its labels.
        device: device of the images; by default the network's.

    Raises:
        PushforwardError: levels that do not fall, or a function that makes no images so.
    """
    network = networks.Consistency(function, sigmas, sigma_min, gain).eval()
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        owner.eval()
        device = device or device_of(owner)
    size = sizes("The shape of images", shape)
    return Generator(name, network, size, "normal", tuple(classes), len(sigmas) - 1, device=device)
