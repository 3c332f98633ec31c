"""Networks that turn Gaussian codes into images in one call: DCGAN, StyleGAN and consistency models.

Conventions fill in what a checkpoint does not say; each reader's docstring states them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.data.faults import FAULTS, reason
from pushforward.data.files import read_tensors
from pushforward.errors import PushforwardError

__all__ = ["Consistency", "Dcgan", "Preconditioned", "StyleGan", "dcgan", "read_checkpoint"]

COUNTER = ".num_batches_tracked"
STATISTICS = {"running_mean", "running_var"}


class Dcgan(nn.Module):
    """Turns `z (count, d)`, or `d` numbers of any shape, into images `(count, channels, height, width)`.

    Args:
        main: the layers, from `(count, d, 1, 1)`.
        size: number `d` of latent numbers.
    """

    def __init__(self, main: nn.Sequential, size: int) -> None:
        super().__init__()
        self.main = main
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.flatten(1)[..., None, None])


def dcgan(checkpoint: Mapping[str, Any], source: str = "The checkpoint") -> Dcgan:
    """Make a DCGAN generator in evaluation mode, with its architecture read from the shapes of its tensors.

    They are those of transposed convolutions `(in, out, k, k)` and of batch norms, in order. The first convolution
    makes one pixel k x k; the others double the side (stride 2, padding (k - 2) / 2, k even), or keep it (k = 1). Every
    layer but the last ends with ReLU, the last with tanh, as in the paper and in PyTorch's tutorial.

    Args:
        checkpoint: the state, or a mapping that contains the state, for example beside that of a discriminator. If it
            has several generators, one with "ema" in its name is used, else the first.
        source: where the checkpoint is from, for messages.

    References:
        Unsupervised Representation Learning with Deep Convolutional GANs, Radford et al., arXiv 1511.06434, figure 1.

    Raises:
        PushforwardError: there is no such generator, or it has layers of another kind.
    """
    faults: list[str] = []
    found: list[tuple[str, Dcgan]] = []
    for name, state in _states(checkpoint):
        try:
            found.append((name, _dcgan(state)))
        except PushforwardError as error:
            faults.append(str(error))
    if not found:
        why = faults[0] if faults else "it has no tensors"
        raise PushforwardError(
            f"{source} is no DCGAN generator: {why}. Build the network yourself and pass it to pushforward.gan."
        )
    return next((module for name, module in found if "ema" in name.lower()), found[0][1])


def _states(checkpoint: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every network's state in a checkpoint, with its name: nested mappings, and parts `generator.…` of one."""
    tensors = {str(key): value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
        heads = {head: None for key in tensors if not (head := key.partition(".")[0]).isdigit()}
        if len(heads) > 1:
            for head in heads:
                part = {key: value for key, value in tensors.items() if key.startswith(f"{head}.")}
                yield f"{name}.{head}", part
    for key, value in checkpoint.items():
        if isinstance(value, Mapping):
            yield from _states(value, f"{name}.{key}")


def _natural(key: str) -> list[tuple[int, str]]:
    """Make a sorting key by which `main.10` comes after `main.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _dcgan(state: Mapping[str, Tensor]) -> Dcgan:
    """Make the generator of a state whose layers are in order.

    Raises:
        PushforwardError: it is not one; the message is half a sentence.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if not key.endswith(COUNTER):
            layer, _, field = key.rpartition(".")
            layers.setdefault(layer, {})[field] = value
    main: list[nn.Module] = []
    size = channels = depth = 0
    for name, tensors in layers.items():
        weight = tensors.get("weight")
        norm = set(tensors) in (STATISTICS, STATISTICS | {"weight", "bias"})
        if norm and _shapes(tensors) == {(channels,)}:
            main.append(_filled(nn.BatchNorm2d(channels, affine=weight is not None), tensors))
        elif weight is not None and weight.ndim == 4 and set(tensors) <= {"weight", "bias"}:
            given, made, kernel = weight.shape[:3]
            if _shapes(tensors) - {(made,)} != {(given, made, kernel, kernel)} or channels not in (0, given):
                raise PushforwardError(
                    f"layer {name!r} with weights {tuple(weight.shape)} does not follow on {channels} channels"
                )
            if channels and kernel > 1 and kernel % 2:
                raise PushforwardError(
                    f"layer {name!r} has a kernel of {kernel}, which does not determine its stride and padding"
                )
            stride, padding = (2, (kernel - 2) // 2) if channels and kernel > 1 else (1, 0)
            main += [nn.ReLU()] if channels else []
            bias = "bias" in tensors
            main.append(_filled(nn.ConvTranspose2d(given, made, kernel, stride, padding, bias=bias), tensors))
            size, channels, depth = size or given, made, depth + 1
        else:
            shapes = ", ".join(f"{field} {tuple(value.shape)}" for field, value in tensors.items())
            raise PushforwardError(
                f"layer {name!r} ({shapes}) is neither a transposed convolution nor a batch norm that fits"
            )
    if depth < 2:
        raise PushforwardError(f"it has {depth} convolutions, not two or more")
    if channels not in (1, 3):
        raise PushforwardError(f"its last layer makes {channels} channels, not 1 or 3")
    return Dcgan(nn.Sequential(*main, nn.Tanh()), size).eval().requires_grad_(False)


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[int, ...]]:
    return {tuple(value.shape) for value in tensors.values()}


def _filled(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    layer.float().load_state_dict({field: value.float() for field, value in tensors.items()}, strict=False)
    return layer


class StyleGan(nn.Module):
    """`(z, labels) -> images` of a StyleGAN generator `(z, c)`, the same at every call: its inner noises are constant.

    Args:
        module: generator with `z_dim` and `c_dim`, called as `module(z, c, truncation_psi=, noise_mode="const")`, like
            NVIDIA's.
        truncation: truncation psi, 1 for none (Karras et al., arXiv 1812.04948, appendix B).
        label: class of all images of a conditional network; `None` to give each image its own.

    Raises:
        PushforwardError: the module is of another kind, or does not have the label.
    """

    def __init__(self, module: nn.Module, truncation: float = 1.0, label: int | None = None) -> None:
        super().__init__()
        if not all(isinstance(getattr(module, key, None), int) for key in ("z_dim", "c_dim")):
            raise PushforwardError(
                f"A {type(module).__name__} is no StyleGAN generator: it has no z_dim and c_dim. Give the module that "
                "NVIDIA's pickle holds under 'G_ema', or use pushforward.gan."
            )
        sizes: Any = module
        self.module, self.truncation, self.label = module, truncation, label
        self.size, self.classes = int(sizes.z_dim), int(sizes.c_dim)
        if label is not None and not 0 <= label < self.classes:
            known = f"has the labels 0 to {self.classes - 1}" if self.classes else "takes no labels"
            raise PushforwardError(f"This StyleGAN generator {known}; got {label}.")

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        c = z.new_zeros(len(z), self.classes)
        if self.classes:
            where: Any = self.label if labels is None else labels
            c[torch.arange(len(z), device=z.device), where] = 1
        return self.module(z, c, truncation_psi=self.truncation, noise_mode="const")


class Preconditioned(nn.Module):
    """`(x, sigma, labels) -> clean image` of a network `(x, time, labels)` of a consistency model.

    `f(x, sigma) = c_skip x + c_out F(c_in x, 250 log sigma)`, with c_in = 1 / sqrt(sigma^2 + s^2),
    c_skip = s^2 / ((sigma - sigma_min)^2 + s^2) and c_out = s (sigma - sigma_min) / sqrt(sigma^2 + s^2).

    Args:
        network: the network F, which takes times `(count,)`.
        sigma_min: noise level at which f is the identity.
        sigma_data: standard deviation s of the data.
        clip: whether to clamp the image to [-1, 1].

    References:
        Consistency Models, Song et al., arXiv 2303.01469, appendix C.
    """

    def __init__(self, network: nn.Module, sigma_min: float = 0.002, sigma_data: float = 0.5, clip: bool = True):
        super().__init__()
        self.network, self.sigma_min, self.sigma_data, self.clip = network, sigma_min, sigma_data, clip

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        level, data = sigma.view(-1, *[1] * (x.ndim - 1)), self.sigma_data
        scale = (level.square() + data**2).sqrt()
        c_skip = data**2 / ((level - self.sigma_min).square() + data**2)
        answer = self.network(x / scale, 250 * sigma.log(), labels)
        found = c_skip * x + data * (level - self.sigma_min) / scale * answer
        return found.clamp(-1, 1) if self.clip else found


class Consistency(nn.Module):
    """Multistep sampling by a consistency model: `(z, [noises,] [labels]) -> images`; noises with several levels.

    `x = f(sigma_0 z, sigma_0)`, then `x = f(x + sqrt(sigma_i^2 - sigma_min^2) noise_i, sigma_i)` for the levels that
    follow.

    Args:
        function: the function f, `(x, sigma (count,)) -> images`, or `(x, sigma, labels) -> images`.
        sigmas: decreasing noise levels.
        sigma_min: the least noise level.
        gain: factor of the noises.

    References:
        Consistency Models, Song et al., arXiv 2303.01469, algorithm 1.

    Raises:
        PushforwardError: the levels do not decrease, or go below the least.
    """

    def __init__(
        self, function: Callable[..., Tensor], sigmas: Sequence[float], sigma_min: float = 0.002, gain: float = 1.0
    ) -> None:
        super().__init__()
        falls = all(high > low for high, low in pairwise(sigmas))
        if not sigmas or not falls or not 0 < sigma_min <= sigmas[-1]:
            raise PushforwardError(
                f"Noise levels of a consistency model must decrease, to no less than {sigma_min:g}; got {list(sigmas)}."
            )
        self.function, self.sigmas, self.sigma_min, self.gain = function, tuple(sigmas), sigma_min, gain

    def forward(self, z: Tensor, *told: Tensor) -> Tensor:
        first, *rest = self.sigmas
        noises = told[0] if rest else ()
        labels = told[1:] if rest else told
        x = self.function(first * z, z.new_full((len(z),), first), *labels)
        for sigma, noise in zip(rest, noises, strict=True):
            x = x + self.gain * (sigma**2 - self.sigma_min**2) ** 0.5 * noise
            x = self.function(x, z.new_full((len(z),), sigma), *labels)
        return x


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a file of `torch.save` or a `.safetensors` file to the CPU, without running any code in it.

    A `.safetensors` file does not keep the order of its tensors: they are sorted by name, numbers by value.

    Raises:
        PushforwardError: it is damaged, holds a pickled module, or has no names.
    """
    if path.suffix == ".safetensors":
        found, _ = read_tensors(path, "file of weights", "fetch the model again")
        return {key: found[key] for key in sorted(found, key=_natural)}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FAULTS as error:
        raise PushforwardError(
            f"{path} cannot be read as a state that torch.save wrote ({reason(error)}). Load a pickled module with its "
            "own code, and pass it to pushforward.gan or to pushforward.maps.generator.stylegan."
        ) from None
    if not isinstance(found, Mapping):
        raise PushforwardError(f"{path} holds a {type(found).__name__}; expected a state, which maps names to tensors.")
    return found
