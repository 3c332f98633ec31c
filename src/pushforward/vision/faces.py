"""dlib's network for recognising faces, in PyTorch: descriptors that are near for the same person.

The weights are not part of the package. They are read from a `.safetensors` file that names them as face-api.js does:
for every convolution `conv/filters (out, in, height, width)`, `conv/bias`, `scale/weights` and `scale/biases`, and `fc
(256, 128)`. Two faces count as one person's if their descriptors are less than 0.6 apart (King, dlib, 2017). That holds
for faces cut out as dlib does, upright and with a margin of a quarter of their size; loosely cut ones are nearer.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad, relu

from pushforward.data.files import read_tensors
from pushforward.errors import PushforwardError
from pushforward.execute.host import undisturbed

__all__ = ["FaceNet", "load_faces"]

FILE = "dlib_face_resnet.safetensors"
SIDE = 150
MEAN = (122.782, 117.001, 104.298)  # red, green, blue, from 0 to 255
SCALE = 256.0
STEM = "conv32_down"
BLOCKS = {  # channels in and out
    "conv32_1": (32, 32), "conv32_2": (32, 32), "conv32_3": (32, 32),
    "conv64_down": (32, 64), "conv64_1": (64, 64), "conv64_2": (64, 64), "conv64_3": (64, 64),
    "conv128_down": (64, 128), "conv128_1": (128, 128), "conv128_2": (128, 128),
    "conv256_down": (128, 256), "conv256_1": (256, 256), "conv256_2": (256, 256), "conv256_down_out": (256, 256),
}  # fmt: skip


class _Block(nn.Module):
    """Two convolutions beside the identity, or, `down`, beside the means over 2 x 2 pixels."""

    def __init__(self, channels: int, out: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(channels, out, 3, 2 if down else 1, 0 if down else 1)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        changed = self.conv2(relu(self.conv1(x)))
        if not self.down:
            return relu(changed + x)
        kept = avg_pool2d(x, 2)
        below, right = (a - b for a, b in zip(kept.shape[2:], changed.shape[2:], strict=True))
        kept = pad(kept, (0, 0, 0, 0, 0, changed.shape[1] - kept.shape[1]))
        return relu(pad(changed, (0, right, 0, below)) + kept)


class FaceNet(nn.Module):
    """The residual network of dlib, with the scale after each convolution folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2)
        self.blocks = nn.ModuleDict({name: _Block(*sizes, "down" in name) for name, sizes in BLOCKS.items()})
        self.fc = nn.Linear(256, 128, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Describe images in [-1, 1], `(count, 1 or 3, height, width)`, each filled by a face, by `(count, 128)`.

        They are scaled to 150 x 150, bilinear and antialiased, and neither rounded nor clipped.

        Raises:
            PushforwardError: the shape is not that of images.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise PushforwardError(
                f"The face network takes images (count, 1 or 3, height, width); got shape {tuple(images.shape)}."
            )
        x = (images.to(self.fc.weight).expand(-1, 3, -1, -1) + 1) * 127.5
        if tuple(x.shape[2:]) != (SIDE, SIDE):
            x = interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = (x - x.new_tensor(MEAN).reshape(3, 1, 1)) / SCALE
        x = max_pool2d(relu(self.stem(x)), 3, 2)
        for block in self.blocks.values():
            x = block(x)
        return self.fc(x.mean((2, 3)))


@undisturbed
def load_faces(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> FaceNet:
    """Read dlib's face network, frozen.

    Args:
        path: the `.safetensors` file, or the folder of `dlib_face_resnet.safetensors`.
        device: device to compute on.

    Raises:
        PushforwardError: the file does not exist, is damaged, or belongs to another network.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    tensors, _ = read_tensors(file, "file of dlib's face network", "fetch it again")
    with torch.random.fork_rng(devices=()):  # the first weights are drawn, and thrown away
        net = FaceNet()
    names = {"stem": STEM}
    for block in BLOCKS:
        names |= {f"blocks.{block}.{conv}": f"{block}/{conv}" for conv in ("conv1", "conv2")}
    try:
        state = {"fc.weight": tensors["fc"].float().T}
        for ours, theirs in names.items():
            filters, bias = (tensors[f"{theirs}/conv/{what}"].float() for what in ("filters", "bias"))
            factor, shift = (tensors[f"{theirs}/scale/{what}"].float() for what in ("weights", "biases"))
            state |= {f"{ours}.weight": filters * factor[:, None, None, None], f"{ours}.bias": bias * factor + shift}
    except KeyError as error:
        raise PushforwardError(f"{file} has no tensor {error.args[0]!r}; it is not dlib's face network.") from error
    except (RuntimeError, IndexError) as error:
        raise PushforwardError(
            f"The tensors of {file} do not fit one another; it is not dlib's face network."
        ) from error
    try:
        net.float().load_state_dict(state)
    except RuntimeError as error:
        raise PushforwardError(f"The tensors of {file} have other shapes than those of dlib's face network.") from error
    return net.eval().requires_grad_(False).to(device)
