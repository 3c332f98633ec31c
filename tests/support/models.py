"""Tiny models of random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pushforward.linear import VP
from pushforward.model import save_model, trained
from pushforward.model.backbone import Backbone, BackboneConfig, preset

SIZE = 8


def tiny(process, *, classes=("a", "b"), prediction="residual"):
    torch.manual_seed(0)
    channels = 1 if prediction == "residual" else process.blocks
    config = preset("tiny", field=(SIZE, SIZE), in_channels=process.blocks, out_channels=channels, classes=len(classes))
    module = Backbone(config).eval().requires_grad_(False)
    return trained(module, process, (1, SIZE, SIZE), name="tiny", classes=classes, prediction=prediction)


def saved(process, path):
    """A tiny model whose network says something: fresh ones predict nothing, and invert in one round."""
    model = tiny(process)
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.01 * torch.randn_like(p))
    save_model(model, path)
    return path


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a configuration."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def reading(process=None, side=SIZE):
    """A tiny model that reads, of random weights: its answers depend on the words."""
    process = process or VP()
    torch.manual_seed(0)
    channels = 3 * process.blocks
    config = BackboneConfig(in_channels=channels, out_channels=3, words=64, widths=(16, 16), groups=4)
    return trained(Backbone(config).eval().requires_grad_(False), process, (3, side, side), name="reading")


def tutorial(z: int, channels: tuple[int, ...], kernel: int, *, bias: bool = False, grown: int = 4) -> nn.Sequential:
    """A DCGAN as PyTorch's tutorial writes it, with weights and statistics that are not those of its beginning."""
    layers: list[nn.Module] = []
    for k, (given, made) in enumerate(zip((z, *channels), channels, strict=False)):
        size, stride, padding = (kernel, 1, 0) if k == 0 else (grown, min(grown, 2), max(grown // 2 - 1, 0))
        layers.append(nn.ConvTranspose2d(given, made, size, stride, padding, bias=bias))
        layers += [nn.BatchNorm2d(made), nn.ReLU()] if k < len(channels) - 1 else [nn.Tanh()]
    net = nn.Sequential(*layers)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1 if value.ndim == 1 else torch.randn_like(value) / 4)
    return net.eval()
