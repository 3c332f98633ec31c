"""Train a small GAN on Fashion-MNIST, or on any 28 x 28 grey images, and draw from it.

    python examples/gan_fashion.py fashion.npz
    python examples/gan_fashion.py fashion.npz --rare 8:0.01 --data-out rare.npz    # keep 1 in 100 images of class 8
    pushforward train rare-model --data rare.npz --process vp             # a diffusion on the same, without labels

`fashion.npz` is what `zoo_data.py` makes: `x_train` and `y_train`. The generator is saved as `gan.safetensors`, for
`pushforward.load_generator`. Training takes about 15 minutes on one free CPU core.

It uses the non-saturating loss with the gradient penalty R1 (Mescheder et al., arXiv 1801.04406) in every eighth step
(Karras et al., arXiv 1912.04958, appendix B), and a moving average of the generator's weights.
"""

# %% What is needed
import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from pushforward.data.pictures import save_image, sheet
from pushforward.maps.load import load_generator

LATENTS, EVERY = 64, 8


# %% Images
def thinned(arrays: dict[str, np.ndarray], rare: dict[int, float]) -> dict[str, np.ndarray]:
    """Keep only a share of the training images of some classes: the first ones."""
    labels = arrays["y_train"]
    kept = np.ones(len(labels), bool)
    for label, share in rare.items():
        of_class = np.flatnonzero(labels == label)
        kept[of_class[max(1, round(share * len(of_class))) :]] = False
    return {**arrays, "x_train": arrays["x_train"][kept], "y_train": labels[kept]}


def part(text: str) -> tuple[int, float]:
    """Parse `8:0.01` as class and share."""
    label, share = text.split(":")
    if not 0 < float(share) <= 1:
        raise ValueError
    return int(label), float(share)


# %% Networks
# Transposed convolutions 1 -> 7 -> 14 -> 28. `load_generator` reads the architecture from the tensors' shapes.
def make_generator(width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(LATENTS, 4 * width, 7, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, 2, 1),
        nn.Tanh(),
    )


def make_discriminator(width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(4 * width * 16, 1),
    )


# %% Training
def penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Compute R1, the squared slope at real images."""
    images = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def train(
    images: Tensor, steps: int, *, batch: int = 64, rate: float = 5e-4, weight: float = 0.5, decay: float = 0.999
) -> nn.Sequential:
    """Train on images (count, 1, 28, 28) in [-1, 1], and return the averaged generator; `weight` is that of R1."""
    generator, discriminator = make_generator(), make_discriminator()
    average = copy.deepcopy(generator).requires_grad_(False)
    of_generator = torch.optim.Adam(generator.parameters(), rate, (0.0, 0.99))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), rate, (0.0, 0.99))
    rng = torch.Generator().manual_seed(0)
    bar = tqdm(range(steps), desc="training", unit="step")
    for step in bar:
        real = images[torch.randint(len(images), (batch,), generator=rng)]
        fake = generator(torch.randn(batch, LATENTS, 1, 1, generator=rng))
        judged = softplus(discriminator(fake.detach())).mean() + softplus(-discriminator(real)).mean()
        if step % EVERY == 0:
            judged = judged + EVERY * weight / 2 * penalty(discriminator, real)
        of_discriminator.zero_grad()
        judged.backward()
        of_discriminator.step()

        discriminator.requires_grad_(False)
        fooled = softplus(-discriminator(fake)).mean()
        of_generator.zero_grad()
        fooled.backward()
        discriminator.requires_grad_(True)
        of_generator.step()
        with torch.no_grad():
            now = min(decay, (step + 1) / (step + 10))  # soon forgets how it began
            for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
                mean.lerp_(value, 1 - now)
        if step % 100 == 0:
            bar.set_postfix(discriminator=f"{judged.item():.2f}", generator=f"{fooled.item():.2f}")
    return settled(average, rng)


@torch.no_grad()
def settled(generator: nn.Sequential, rng: torch.Generator, batches: int = 20) -> nn.Sequential:
    """Give the generator the batch-norm statistics of its own weights, not of those that were averaged."""
    for layer in generator:
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over all batches
    generator.train()
    for _ in range(batches):
        generator(torch.randn(128, LATENTS, 1, 1, generator=rng))
    return generator.eval()


# %% Train, save, draw
def main(
    data: str,
    steps: int = 7_000,
    out: str = "gan.safetensors",
    *,
    rare: dict[int, float] | None = None,
    data_out: str | None = None,
    picture: str = "gan.png",
) -> Tensor:
    """Train on an `.npz`, save the generator, draw 64 images, and return them."""
    with np.load(data) as file:
        arrays = thinned(dict(file), rare or {})
    if data_out:
        np.savez_compressed(data_out, x_train=arrays["x_train"], x_test=arrays["x_test"])
        print(f"{data_out} has {len(arrays['x_train'])} training images.")
    pixels = torch.from_numpy(arrays["x_train"]).view(-1, 1, 28, 28)
    torch.manual_seed(0)
    network = train(pixels / 127.5 - 1, steps)
    save_file({f"main.{key}": value for key, value in network.state_dict().items()}, out)

    images = load_generator(out).sample(64)
    save_image(sheet(images), Path(picture))
    print(f"The generator is {out}, its samples are {picture}.")
    return images


# %% Run
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="NPZ", help="x_train (uint8, 28 x 28) and y_train")
    parser.add_argument("--steps", type=int, default=7_000)
    parser.add_argument("--rare", type=part, nargs="*", default=[], metavar="CLASS:SHARE", help="keep a part of these")
    parser.add_argument("--data-out", metavar="NPZ", help="also write the images, without labels")
    parser.add_argument("--out", default="gan.safetensors")
    parser.add_argument("--picture", default="gan.png")
    given = vars(parser.parse_args())
    main(**{**given, "rare": dict(given["rare"])})
