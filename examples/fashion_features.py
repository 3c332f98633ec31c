"""Train the feature network `fashion`, a small classifier of Fashion-MNIST.

    OMP_NUM_THREADS=1 python examples/fashion_features.py fashion.npz src/pushforward/feature_networks/fashion

`examples/zoo_data.py` makes `fashion.npz`. Training takes a few minutes on one core.
"""

import argparse
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from pushforward.data.datasets import ImageData, load_images
from pushforward.data.files import atomic_path
from pushforward.vision.features import FashionNet, load_fashion

EPOCHS, BATCH, RATE = 5, 128, 5e-3
SHIFT = 1  # pixels, each way

CARD = """# Fashion features

This is the classifier behind `pushforward.vision.features.feature_net("fashion")`. Its 64-dimensional penultimate layer
gives features of 28x28 grey images, for distances between sets of images of clothes; its decision judges labels.
Distances in these features are called FD-Fashion. They are useless for other images, and are not the FID.

| | |
|---|---|
| data | Fashion-MNIST (Zalando), training split ({count} images) |
| licence of the data | MIT (Zalando SE) |
| licence of the weights | Apache-2.0, as the package |
| images (channels x height x width) | 1x28x28, uint8; scaled as (x / 255 - 0.286) / 0.353 |
| classes | {classes} |
| network | three convolutions with batch normalisation, two layers; {parameters:,} parameters in 16 bits |
| trained | {epochs} epochs, batches of {batch}, AdamW, one cycle up to {rate}, shifts up to {shift} pixel each way |
| time | {minutes:.1f} minutes of one CPU core |
| accuracy | {accuracy:.2%} of the {test} test images |
| command | `python examples/fashion_features.py fashion.npz src/pushforward/feature_networks/fashion` |

`examples/zoo_data.py` makes the data file.
"""


def shifted(images: Tensor) -> Tensor:
    """Shift each image. None is flipped: all shoes point the same way, and features should see which."""
    n, _, height, width = images.shape
    rows = torch.randint(2 * SHIFT + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * SHIFT + 1, (n, 1)) + torch.arange(width)
    padded = pad(images[:, 0], (SHIFT,) * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def train(data: ImageData, epochs: int) -> FashionNet:
    torch.manual_seed(0)
    net = FashionNet().to(memory_format=torch.channels_last)
    steps = epochs * (len(data) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        began, total = time.process_time(), 0.0
        batches = torch.randperm(len(data))[: steps // epochs * BATCH].split(BATCH)
        for chosen in batches:
            with torch.autocast("cpu", torch.bfloat16):
                found = net(shifted(data.images[chosen]))
            loss = cross_entropy(net.head(found.float()), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(batches)
        print(f"epoch {epoch + 1}: loss {total:.4f}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    return net.eval()


@torch.inference_mode()
def accuracy(net: FashionNet, data: ImageData) -> float:
    batches = zip(data.images.split(500), data.labels.split(500), strict=True)
    right = [net.head(net(images)).argmax(1) == labels for images, labels in batches]
    return float(torch.cat(right).float().mean())


def save(net: FashionNet, folder: Path) -> None:
    """Save weights and running statistics in 16 bits, without the counts of batches."""
    state = {key: value.half().contiguous() for key, value in net.state_dict().items() if value.is_floating_point()}
    with atomic_path(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(state, temporary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    data, test = load_images(args.data), load_images(args.data, split="test")
    began = time.process_time()
    net = train(data, args.epochs)
    minutes = (time.process_time() - began) / 60
    save(net, args.out)
    right = accuracy(load_fashion(args.out), test)
    with atomic_path(args.out / "README.md") as temporary:
        temporary.write_text(
            CARD.format(
                count=len(data),
                classes=", ".join(data.classes),
                parameters=sum(p.numel() for p in net.parameters()),
                epochs=args.epochs,
                batch=BATCH,
                rate=RATE,
                shift=SHIFT,
                minutes=minutes,
                accuracy=right,
                test=len(test),
            ),
            encoding="utf-8",
        )
    print(f"{right:.2%} of the test images right, in {minutes:.1f} minutes of one core")
