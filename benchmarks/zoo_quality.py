r"""How good the embedded models are: loss on images they have not seen, and whether samples look like their label.

    python benchmarks/zoo_quality.py --fashion fashion.npz --emoji emoji.npz     # made by examples/zoo_data.py

- *held-out loss*: the training loss (mean square of the residual, evenly over the whitening angle) on test images.
- *recognised*: share of samples that a classifier gives the label they were drawn with; beside it its accuracy on real
  test images, which bounds what can be had. For clothes it is the package's own. For emoji the label is the drawing
  style, the last word of their captions, and the classifier is trained here; samples are of test captions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import read_json, table, write_json, write_text
from torch import Tensor, nn

from pushforward.data.pictures import from_bytes, to_bytes
from pushforward.linear import Gaussian
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import take_labels
from pushforward.model import Model, Network, load
from pushforward.model.zoo import names
from pushforward.plan import auto
from pushforward.training.targets import TargetTable
from pushforward.vision.features import classify


def read(path: Path) -> dict[str, Tensor]:
    """Images (count, channels, height, width) in [-1, 1] and labels of both splits."""
    arrays = np.load(path)
    data = {}
    for split in ("train", "test"):
        data[f"x_{split}"] = from_bytes(torch.from_numpy(arrays[f"x_{split}"]).permute(0, 3, 1, 2))
        if f"y_{split}" in arrays:
            data[f"y_{split}"] = torch.from_numpy(arrays[f"y_{split}"]).long()
        else:
            data[f"y_{split}"] = torch.tensor([STYLES.index(text.split(", ")[-1]) for text in said(path, split)])
    return data


def said(path: Path, split: str) -> list[str]:
    """The captions of emoji."""
    return [str(text) for text in np.load(path)[f"captions_{split}"]]


def conditions(model: Model, path: Path, count: int, labels: Tensor) -> tuple[Tensor, Tensor | list[str] | None]:
    """Which test images a model was made for, evenly at most `count`, and what it is told of them."""
    if model.text is None:
        return torch.arange(min(count, len(labels))), labels[:count]
    captions, style = said(path, "test"), next((style for style in STYLES if model.name.endswith(style)), "")
    known = [k for k, text in enumerate(captions) if style in ("", text.split(", ")[-1])]
    some = known[:: max(1, len(known) // count)][:count]
    told = [captions[k].rsplit(", ", 1)[0] if style else captions[k] for k in some]
    return torch.tensor(some), told


STYLES = ["noto", "twemoji"]


def classifier(data: dict[str, Tensor], classes: int, epochs: int) -> Callable[[Tensor], Tensor]:
    """Images to labels by a small convolutional network, trained with a fixed seed."""
    torch.manual_seed(0)
    channels = data["x_train"].shape[1]
    net = nn.Sequential(
        nn.Conv2d(channels, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip
    count, batch = len(data["x_train"]), 128
    steps = epochs * count // batch
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = torch.cat([torch.randperm(count) for _ in range(epochs)])
    for some in order[: steps * batch].split(batch):
        nn.functional.cross_entropy(net(data["x_train"][some]), data["y_train"][some]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    net.eval()
    return lambda images: net(images).argmax(1)


@torch.no_grad()
def held_out_loss(model: Model, images: Tensor, labels: Tensor | list[str] | None) -> float:
    """Mean square of prediction less target, at random times of the lesson."""
    assert isinstance(model.denoiser, Network)
    network = model.denoiser
    reference = Gaussian(float(model.reference.variance))
    lesson = TargetTable.make(model.process, network.prediction, reference).to(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for first in range(0, len(images), 128):
        some = slice(first, first + 128)
        x, told = images[some], model.given(take_labels(labels, some)).denoiser
        assert isinstance(told, Network)
        k = torch.randint(0, len(lesson.times), (len(x),), generator=generator)
        noise = torch.randn(model.state_shape(len(x)), generator=generator)
        seen, target = lesson.draw(x, k, noise)
        t = network.time_scale * lesson.times[k].float() + network.time_shift
        losses.append((told.module(seen, t, told.condition) - target).square().flatten(1).mean(1))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def main() -> None:
    """Measure every embedded model that there are data for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--emoji", type=Path)
    parser.add_argument("--count", type=int, default=500, help="samples a model")
    options = parser.parse_args()
    rows = {row["model"]: row for row in read_json("zoo_quality").get("models", [])}  # others than these stay
    for kind, path in (("fashion", options.fashion), ("emoji", options.emoji)):
        models = [name for name in names() if name.startswith(kind)]
        if path is None or not models:
            continue
        data = read(path)
        classes = int(data["y_train"].max()) + 1
        if kind == "fashion":
            judge: Callable[[Tensor], Tensor] = lambda images: classify(to_bytes(images))  # noqa: E731
        else:
            with torch.enable_grad():
                judge = classifier(data, classes, epochs=8)
        real = float((judge(data["x_test"]) == data["y_test"]).float().mean())
        for name in models:
            model = load(name)
            wanted, told = torch.arange(options.count) % classes, None
            if model.text is not None:
                some, told = conditions(model, path, options.count, data["y_test"])
                wanted = data["y_test"][some]
            drawn = Diffusion(model, auto(model.process, 20, model.reference)).given(told or wanted).sample(len(wanted))
            recognised = float((judge(drawn) == wanted).float().mean())
            held, told = conditions(model, path, 2000, data["y_test"])
            loss = held_out_loss(model, data["x_test"][held], told)
            rows[name] = {"model": name, "held_out_loss": loss, "recognised": recognised, "real": real,
                          "count": len(wanted)}  # fmt: skip
            print(rows[name], flush=True)
    found = list(rows.values())
    cells = table(list(found[0]), [list(row.values()) for row in found]) if found else "Give --fashion or --emoji."
    print(cells)
    if options.fashion or options.emoji:
        write_text("zoo_quality", f"# Quality of the embedded models\n\nSolver auto, 20 network calls.\n\n{cells}")
        write_json("zoo_quality", {"models": found})


if __name__ == "__main__":
    main()
